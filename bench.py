"""Parameters, operations, speed and memory: the paper's Table 2 on your device, and our speed beside transformers'.

    python bench.py                           # model: Table 2's columns, as trained and folded
    python bench.py peer                      # the same weights in Hugging Face transformers, in the same run
    python bench.py step                      # a distillation step B2 -> B0, against transformers with textbook losses
    python bench.py model peer step --json bench.json

Every subject has a process of its own; they take turns, so that a machine that slows down slows all of them, and times are
medians: look at the ratios. On a CPU ours stands there twice: with the C library's allocator as it comes, and as train.py
and eval.py run it (they let it keep freed memory). Memory is the growth of the process's peak over its state before the
first run (on CUDA: the allocator's peak). MACs are counted on the operations that really run, attention products apart;
"published" is what the paper's decoder would run for the same outputs.
"""

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval import MISTAKES, UsageError, keep_freed_memory, no_nan, pick_device
from losses import IGNORE, Projections, class_weights, cskd, pekd, weighted_cross_entropy
from model import NORMS, SIZES, SMALLEST, rename, segformer

CLASSES = 19
TABLE_2 = (("SegFormer-B2", "b2", "ln"), ("SegFormer-B0", "b0", "ln"), ("+ Tanh", "b0", "dyt"), ("+ Tanh + Linear", "b0", "dyt-dyl"))


# ---------------------------------------------------------------- measuring

def count_macs(variant, norm, size):
    """MACs of one image of `size` (H, W) -> (as run here folded, as published, the attention products in both)."""
    model = segformer(variant, CLASSES, NORMS[norm]).fold()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *size))
    flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for op, count in flops.items() if "bmm" in op) // 2       # nothing else multiplies in batches
    run, width = sum(flops.values()) // 2 - attention, SIZES[variant]["width"]
    quarter = -(-size[0] // 4) * -(-size[1] // 4)
    return run, run + quarter * 4 * width ** 2, attention                           # the 1x1 convolution 4D -> D


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def status_bytes(field):
    """A line of /proc/self/status in bytes; nan where there is none (not Linux)."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
    except OSError:
        return math.nan


def serve(pipe, keep, make, args):
    """The body of a subject's process: run once for each True received and send the seconds; at the end send the peak."""
    run, device = make(*args)
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim:
        malloc_trim(0)                                            # what building the models freed is not memory to run in
    if keep:
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if device.type != "cuda" and os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")                                       # forget the peak of building the models
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else status_bytes("VmRSS")
    while pipe.recv():
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        pipe.send(time.perf_counter() - start)
    pipe.send((torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")) - before)


def run_in_turns(subjects, rounds, warmup=2):
    """{name: (keep freed memory?, make, args)} -> {name: (median seconds, peak bytes)}; each round runs every subject once."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name, subject in subjects.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, *subject), daemon=True))
        processes[-1].start()
        theirs.close()                                            # so that a dead process is an EOFError here, not a wait
    times = {name: [] for name in subjects}
    for round in range(warmup + rounds):
        for name, pipe in pipes.items():
            try:
                pipe.send(True)
                seconds = pipe.recv()
            except (EOFError, BrokenPipeError):
                raise UsageError(f"{name} failed in its process; its own message stands above") from None
            if round >= warmup:
                times[name].append(seconds)
    results = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        results[name] = statistics.median(times[name]), pipe.recv()
    for process in processes:
        process.join()
    return results


def mib(count):
    return "-" if math.isnan(count) else f"{count / 2 ** 20:,.0f}"


# ---------------------------------------------------------------- what is measured

def inference(variant, norm, folded, size, batch, device, dtype):
    """-> (a function that runs one forward, the device)."""
    device = torch.device(device)
    torch.manual_seed(0)
    model = segformer(variant, CLASSES, NORMS[norm]).eval()
    model, images = (model.fold() if folded else model).to(device), torch.rand(batch, 3, *size, device=device)

    @torch.inference_mode()
    def run():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(images)
    return run, device


def peer_model(variant):
    """transformers' SegFormer with fresh weights. Raises UsageError where transformers is not installed."""
    try:
        import transformers
    except ImportError:
        raise UsageError("the subjects peer and step compare with transformers: pip install transformers==5.23.0") from None
    size = SIZES[variant]
    config = transformers.SegformerConfig(num_labels=CLASSES, hidden_sizes=list(size["dims"]), depths=list(size["depths"]),
                                          decoder_hidden_size=size["width"])
    torch.manual_seed(0)
    return transformers.SegformerForSemanticSegmentation(config)


def same_model(peer, variant):
    """Our model with the weights of transformers' `peer`."""
    model = segformer(variant, CLASSES, lambda dim, site: torch.nn.LayerNorm(dim, eps=1e-5))
    model.load_state_dict(rename(peer.state_dict(), "transformers")[1], strict=False)
    return model


def peer_inference(ours, variant, size, batch, device, dtype):
    """transformers' forward, or ours folded with its weights -> (function, device)."""
    device = torch.device(device)
    peer = peer_model(variant).eval()
    model = same_model(peer, variant)
    images = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    normalised = (images - model.mean.to(device)) / model.std.to(device)
    model, peer = model.fold().to(device), peer.to(device)

    @torch.inference_mode()
    def run():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(images) if ours else peer(normalised).logits
    return run, device


def textbook_losses(student, teacher, labels, weight):
    """Eq. 3, 5-8 as a textbook writes them, every intermediate map in memory. Features of both -> scalar."""
    logits = F.interpolate(student[0], size=labels.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(logits, labels, weight, ignore_index=IGNORE)
    for s, t in zip(student[1], teacher[1]):
        pixel, channel = F.cosine_similarity(s, t, dim=1), F.cosine_similarity(s.flatten(2), t.flatten(2), dim=2)
        guide = ((1 - pixel)[:, None] * (1 - channel)[:, :, None, None]).abs()                    # (B, C, H, W)
        loss = loss + (guide * (t - s) ** 2).mean() + 0.5 * ((1 - pixel).mean() + (1 - channel).mean())
    return loss + sum(beta * F.mse_loss(s, t) for beta, s, t in zip((0.1, 0.1, 0.5, 1.0), student[2], teacher[2]))


def our_losses(student, teacher, labels, weight):
    """The same with losses.py."""
    return weighted_cross_entropy(student[0], labels, weight) + pekd(student[2], teacher[2]) \
        + sum(cskd(s, t) for s, t in zip(student[1], teacher[1]))


def peer_features(peer):
    """-> a function from normalised images to (logits, stages, patch_embeds) of transformers' model, as a user gets them."""
    embeds = []

    def keep(module, inputs, output):
        tokens, height, width = output                            # (B, H*W, C)
        embeds.append(tokens.transpose(1, 2).unflatten(2, (height, width)))         # (B, C, H, W)

    for module in peer.modules():
        if type(module).__name__ == "SegformerOverlapPatchEmbeddings":
            module.register_forward_hook(keep)

    def features(images):
        embeds.clear()
        out = peer(images, output_hidden_states=True)
        return out.logits, list(out.hidden_states[-4:]), list(embeds)
    return features


def distillation_step(ours, training, size, batch, device, dtype):
    """A step B2 -> B0 with CE + CSKD + PEKD and AdamW, in our code or on transformers' models -> (function, device)."""
    device = torch.device(device)
    student, teacher = peer_model("b0"), peer_model("b2").eval().requires_grad_(False)
    mean, std = segformer("b0", 1).mean.to(device), segformer("b0", 1).std.to(device)
    if ours:
        student, teacher = same_model(student, "b0"), same_model(teacher, "b2").fold()
    torch.manual_seed(1)
    projections = Projections(SIZES["b0"]["dims"], SIZES["b2"]["dims"]).to(device)
    student, teacher = student.train(training).to(device), teacher.to(device)
    student_features, teacher_features = (student.features, lambda x: (None, *teacher.encode(x))) if ours else (peer_features(student), peer_features(teacher))
    optimizer = torch.optim.AdamW([*student.parameters(), *projections.parameters()], lr=1e-5)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, *size, generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (batch, *size), generator=generator).to(device)
    weight, losses = class_weights(torch.arange(1, CLASSES + 1)).to(device), our_losses if ours else textbook_losses

    def run():
        x = images if ours else (images - mean) / std
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                target = teacher_features(x)
            logits, stages, patch_embeds = student_features(x)
            stages, patch_embeds = projections(stages, patch_embeds)
            loss = losses((logits.float(), stages, patch_embeds), target, labels, weight)
        loss.backward()
        optimizer.step()
        return loss.detach()
    return run, device


def training_step(ours, *args):
    """`distillation_step` as in training: drop-path and dropout on, BatchNorm of the batch."""
    return distillation_step(ours, True, *args)


# ---------------------------------------------------------------- tables

def bench_model(args, device, dtype):
    """The paper's Table 2 columns. -> rows"""
    common = (tuple(args.size), args.batch, str(device), dtype)
    rows = run_in_turns({(name, folded): (True, inference, (variant, norm, folded, *common))
                         for name, variant, norm in TABLE_2 for folded in (False, True)}, args.rounds)
    print(f"\n{'network':<17}{'params':>12}{'GMACs published':>17}{'as run':>8}{'attention':>11}"
          f"{'FPS':>9}{'folded':>9}{'peak MiB':>10}{'folded':>8}")
    table = []
    for name, variant, norm in TABLE_2:
        params = sum(p.numel() for p in segformer(variant, CLASSES, NORMS[norm]).parameters())
        run, published, attention = count_macs(variant, norm, args.size)
        (seconds, peak), (seconds_folded, peak_folded) = rows[name, False], rows[name, True]
        table.append(dict(network=name, parameters=params, macs_published=published, macs_run=run, macs_attention=attention,
                          fps=args.batch / seconds, fps_folded=args.batch / seconds_folded, peak_bytes=peak, peak_bytes_folded=peak_folded))
        print(f"{name:<17}{params:>12,}{published / 1e9:>17.2f}{run / 1e9:>8.2f}{'+' + format(attention / 1e9, '.2f'):>11}"
              f"{args.batch / seconds:>9.2f}{args.batch / seconds_folded:>9.2f}{mib(peak):>10}{mib(peak_folded):>8}")
    print("MACs are of one image; both columns leave out the attention products (QK^T and AV), which come on top.")
    return table


def compare(make, args, rounds, device):
    """make(ours?, *args), theirs and ours in turns -> {name: (seconds, peak)}."""
    subjects = {"transformers": (False, make, (False, *args)), "ours": (False, make, (True, *args))}
    if device.type == "cpu":
        subjects["ours, memory kept"] = (True, make, (True, *args))
    return run_in_turns(subjects, rounds)


def bench_peer(args, device, dtype):
    """Forward, transformers against ours folded, same weights. -> rows"""
    peer_model("b0")                                              # a sentence now if transformers is absent
    print(f"\n{'forward':<9}{'':<19}{'ms':>9}{'ratio':>8}{'peak MiB':>10}{'largest difference':>20}")
    table = []
    for variant in ("b0", "b2"):
        common = (variant, tuple(args.size), args.batch, str(device), dtype)
        theirs, ours = (peer_inference(which, *common)[0]().float() for which in (False, True))
        difference = (theirs - ours).abs().max().item()
        results = compare(peer_inference, common, args.rounds, device)
        for name, (seconds, peak) in results.items():
            table.append(dict(variant=variant, name=name, seconds=seconds, ratio=results["transformers"][0] / seconds, peak_bytes=peak,
                              difference=0.0 if name == "transformers" else difference))
            print(f"{'B' + variant[1:]:<9}{name:<19}{1e3 * seconds:>9.1f}{table[-1]['ratio']:>8.2f}{mib(peak):>10}{table[-1]['difference']:>20.1e}", flush=True)
    return table


def bench_step(args, device, dtype):
    """The distillation step, transformers with textbook losses against ours. transformers' teacher runs whole, as its users
    call it; ours leaves out the decoder, which none of these losses reads. -> rows"""
    peer_model("b0")
    common = (tuple(args.size), max(args.batch, 2), str(device), dtype)
    losses = [distillation_step(ours, False, *common)[0]().item() for ours in (False, True)]      # eval mode: nothing random
    results = compare(training_step, common, max(3, args.rounds // 3), device)
    print(f"\n{'step B2->B0, batch ' + str(common[1]):<21}{'seconds':>9}{'ratio':>8}{'images/s':>10}{'peak MiB':>10}{'first loss':>13}")
    table = []
    for name, (seconds, peak) in results.items():
        table.append(dict(name=name, seconds=seconds, ratio=results["transformers"][0] / seconds, batch=common[1], peak_bytes=peak,
                          first_loss=losses[name != "transformers"]))
        print(f"{name:<21}{seconds:>9.2f}{table[-1]['ratio']:>8.2f}{common[1] / seconds:>10.2f}{mib(peak):>10}{table[-1]['first_loss']:>13.6f}")
    return table


SUBJECTS = {"model": bench_model, "peer": bench_peer, "step": bench_step}


def main():
    parser = argparse.ArgumentParser(description="Parameters, MACs, speed and memory on this device.")
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"{', '.join(SUBJECTS)} (default: model)")
    parser.add_argument("--size", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"), help="default 512 1024, the paper's")
    parser.add_argument("--batch", type=int, default=1, help="images a forward (default 1); a step takes two at least")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, the median counts (default 9)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "fp16", "bf16"), help="fp32, or autocast to 16 bits")
    parser.add_argument("--json", metavar="FILE", help="write the numbers for machines")
    args = parser.parse_args()
    unknown = [name for name in args.subjects if name not in SUBJECTS]
    if unknown:
        parser.error(f"unknown subject {unknown[0]!r}: choose from {', '.join(SUBJECTS)}")
    if min(args.size) < SMALLEST or min(args.batch, args.rounds) < 1:
        parser.error(f"--size must be at least {SMALLEST} {SMALLEST}, --batch and --rounds at least 1")
    try:
        device = pick_device(args.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        print(f"{name}, torch {torch.__version__}, {args.dtype}, batch {args.batch}, {args.size[0]}x{args.size[1]}, {CLASSES} classes, "
              f"logits at a quarter, median of {args.rounds} rounds", flush=True)
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
        results = {subject: SUBJECTS[subject](args, device, dtype) for subject in args.subjects or ["model"]}
        if args.json:
            with open(args.json, "w") as file:
                json.dump(no_nan(dict(vars(args), device=name, torch=torch.__version__, results=results)), file, indent=1)
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
