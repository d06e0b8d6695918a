"""Speed and memory on your device: the paper's Table 2, our speed beside transformers', and how far both are from the limit.

    python bench.py                           # model: Table 2's columns, as trained and folded
    python bench.py peer                      # the same weights in Hugging Face transformers, in the same run
    python bench.py step                      # a distillation step B2 -> B0, against transformers with textbook losses
    python bench.py losses                    # each loss against its plain version, forward and backward
    python bench.py data [--data camvid:DIR]  # reading and augmenting frames, decoded each time or from the cache
    python bench.py scaling                   # the cost of a pixel from 256x256 to 1024x2048
    python bench.py model peer step --compile --json bench.json

Every subject has a process of its own; they take turns, so that a machine that slows down slows all of them, and times are
medians: look at the ratios. On a CPU ours stands there twice: with the C library's allocator as it comes, and as train.py
and eval.py run it (they let it keep freed memory). Memory is the growth of the process's peak over its state before the
first run (on CUDA: the allocator's peak). MACs are counted on the operations that really run, attention products apart;
"published" is what the paper's decoder would run for the same outputs.

The limits are of this device, measured in the same run: the arithmetic limit is the time of as many MACs in one large matrix
product; the memory limit is the time of copying as many bytes as the operations read and write, each tensor once an
operation (what stays in a cache beats it).
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
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from data import Augment, draw_scene, open_dataset
from eval import HALF, MISTAKES, UsageError, keep_freed_memory, no_nan, pick_device
from losses import (IGNORE, Projections, class_weights, cskd, dice_loss, focal_loss, kl_distillation, pekd, weighted_cross_entropy)
from model import NORMS, SIZES, SMALLEST, rename, segformer

CLASSES = 19
SCALES = [(256, 256), (256, 512), (512, 512), (512, 1024), (1024, 1024), (1024, 2048)]
TABLE_2 = (("SegFormer-B2", "b2", "ln"), ("SegFormer-B0", "b0", "ln"), ("+ Tanh", "b0", "dyt"), ("+ Tanh + Linear", "b0", "dyt-dyl"))


# ---------------------------------------------------------------- work and limits

def convolution_backward_flops(grad, x, weight, *args, **kwargs):
    """Of the shapes; each gradient that is asked for costs a forward. (torch's own formula takes depthwise for dense.)"""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(args[7][:2])


def macs_of(run):
    """MACs of run() -> (without the attention products, the attention products)."""
    formulas = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for op, count in flops.items() if "bmm" in op) // 2       # nothing else multiplies in batches
    return sum(flops.values()) // 2 - attention, attention


def count_macs(variant, norm, size):
    """MACs of one image of `size` (H, W) -> (as run here folded, as published, the attention products in both)."""
    run, attention = macs_of(inference(variant, norm, True, False, size, 1, "cpu", torch.float32)[0])
    quarter = -(-size[0] // 4) * -(-size[1] // 4)
    return run, run + quarter * 4 * SIZES[variant]["width"] ** 2, attention         # the 1x1 convolution 4D -> D


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, each tensor once an operation; views cost nothing."""

    bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if not op.is_view and "empty" not in str(op):
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
        return result


def count_bytes(run):
    with Traffic() as traffic:
        run()
    return traffic.bytes


def best_time(run, device, tries=5):
    """The shortest of some runs, in seconds: a limit is what the device can do. Slow ones (16 bits on a CPU without) are not repeated."""
    times = []
    while len(times) < tries and sum(times) < 2:
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times)


def rates(device, dtype):
    """-> (MACs a second in a matrix product of `dtype`, bytes a second read or written by a copy), both measured."""
    n, size = (8192, 2 ** 30) if device.type == "cuda" else (2048, 2 ** 28)
    a, b = torch.rand(n, n, device=device, dtype=dtype), torch.rand(n, n, device=device, dtype=dtype)
    source, target = torch.zeros(size, dtype=torch.uint8, device=device), torch.ones(size, dtype=torch.uint8, device=device)
    return n ** 3 / best_time(lambda: a @ b, device), 2 * size / best_time(lambda: target.copy_(source), device)


def distance(name, run, seconds, macs_rate, bytes_rate):
    """-> a line about how far `seconds` are from this device's limits, and its numbers."""
    macs, count = sum(macs_of(run)), count_bytes(run)
    arithmetic, memory = macs / macs_rate, count / bytes_rate
    print(f"{name}: {macs / 1e9:.1f} G MACs at {macs_rate / 1e9:.3g} G/s are {1e3 * arithmetic:.0f} ms, {100 * arithmetic / seconds:.0f} % of the time taken (arithmetic "
          f"limit); {count / 1e9:.1f} GB at {bytes_rate / 1e9:.1f} GB/s are {1e3 * memory:.0f} ms, {100 * memory / seconds:.0f} % (memory limit)", flush=True)
    return dict(name=name, macs=macs, bytes=count, arithmetic_limit=arithmetic / seconds, memory_limit=memory / seconds,
                macs_a_second=macs_rate, bytes_a_second=bytes_rate)


# ---------------------------------------------------------------- measuring

class Timing(NamedTuple):
    seconds: float                                                # median of the rounds
    peak: float                                                   # bytes
    first: float                                                  # seconds of the very first run: with --compile, of compiling


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
    """{name: (keep freed memory?, make, args)} -> {name: Timing}; each round runs every subject once."""
    context, pipes, processes, first = multiprocessing.get_context("spawn"), {}, [], {}
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
            first.setdefault(name, seconds)
            if round >= warmup:
                times[name].append(seconds)
    results = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        results[name] = Timing(statistics.median(times[name]), pipe.recv(), first[name])
    for process in processes:
        process.join()
    return results


def mib(count):
    return "-" if math.isnan(count) else f"{count / 2 ** 20:,.0f}"


# ---------------------------------------------------------------- the losses as a textbook writes them

def upsample(logits, labels):
    return F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)


def plain_ce(logits, labels, weight):
    return F.cross_entropy(upsample(logits, labels), labels, weight, ignore_index=IGNORE)


def plain_kl(student, teacher, temperature, labels):
    p, q = ((upsample(x, labels) / temperature).softmax(1) for x in (teacher, student))           # (B, C, H, W)
    return temperature ** 2 * (p * (p.log() - q.log())).sum(1)[labels != IGNORE].mean()


def plain_dice(logits, labels, eps=1.0):
    valid = (labels != IGNORE)[:, None]
    p = upsample(logits, labels).softmax(1) * valid                                               # (B, C, H, W)
    g = F.one_hot(labels.where(labels != IGNORE, 0), p.shape[1]).movedim(3, 1) * valid            # (B, C, H, W)
    return (1 - (2 * (p * g).sum((0, 2, 3)) + eps) / (p.sum((0, 2, 3)) + g.sum((0, 2, 3)) + eps)).mean()


def plain_focal(logits, labels, alpha, gamma=2.0):
    valid, target = labels != IGNORE, labels[labels != IGNORE]
    log_p = upsample(logits, labels).log_softmax(1).movedim(1, 3)[valid].gather(1, target[:, None])[:, 0]
    return (-alpha[target] * (1 - log_p.exp()) ** gamma * log_p).mean()


def plain_cskd(student, teacher):
    """Summed over the stages, every intermediate map in memory."""
    loss = 0
    for s, t in zip(student, teacher):
        pixel, channel = F.cosine_similarity(s, t, dim=1), F.cosine_similarity(s.flatten(2), t.flatten(2), dim=2)
        guide = ((1 - pixel)[:, None] * (1 - channel)[:, :, None, None]).abs()                    # (B, C, H, W)
        loss = loss + (guide * (t - s) ** 2).mean() + 0.5 * ((1 - pixel).mean() + (1 - channel).mean())
    return loss


def plain_pekd(student, teacher):
    return sum(beta * F.mse_loss(s, t) for beta, s, t in zip((0.1, 0.1, 0.5, 1.0), student, teacher))


def textbook_losses(student, teacher, labels, weight):
    """Eq. 3, 5-8. (logits, stages, patch_embeds) of both -> scalar."""
    return plain_ce(student[0], labels, weight) + plain_cskd(student[1], teacher[1]) + plain_pekd(student[2], teacher[2])


# ---------------------------------------------------------------- what is measured

def compiled(function, device):
    """torch.compile for the one size that is measured; on CUDA with CUDA graphs."""
    return torch.compile(function, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)


def inference(variant, norm, folded, compiles, size, batch, device, dtype):
    """-> (a function that runs one forward, the device)."""
    device = torch.device(device)
    torch.manual_seed(0)
    model = segformer(variant, CLASSES, NORMS[norm]).eval()
    model, images = (model.fold() if folded else model).to(device), torch.rand(batch, 3, *size, device=device)
    forward = compiled(model, device) if compiles else model

    @torch.inference_mode()
    def run():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return forward(images)
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


def peer_inference(ours, compiles, variant, size, batch, device, dtype):
    """transformers' forward, or ours folded with its weights -> (function, device)."""
    device = torch.device(device)
    peer = peer_model(variant).eval()
    model = same_model(peer, variant)
    images = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    normalised = (images - model.mean.to(device)) / model.std.to(device)
    model, peer = model.fold().to(device), peer.to(device)
    forward = compiled(model, device) if compiles else model

    @torch.inference_mode()
    def run():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return forward(images) if ours else peer(normalised).logits
    return run, device


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
        out = peer(images, output_hidden_states=True)
        kept = embeds.copy()
        embeds.clear()                                            # so that they live as long as the caller wants
        return out.logits, list(out.hidden_states[-4:]), kept
    return features


def distillation_step(ours, compiles, training, size, batch, device, dtype):
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
    optimizer = torch.optim.AdamW([*student.parameters(), *projections.parameters()], lr=1e-5, fused=ours and device.type != "mps")     # as train.py
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, *size, generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (batch, *size), generator=generator).to(device)
    weight, losses = class_weights(torch.arange(1, CLASSES + 1)).to(device), our_losses if ours else textbook_losses

    def objective(x, target):
        logits, stages, patch_embeds = student_features(x)
        stages, patch_embeds = projections(stages, patch_embeds)
        return losses((logits.float(), stages, patch_embeds), target, labels, weight)

    if compiles:
        objective, teacher_features = (torch.compile(function, dynamic=False) for function in (objective, teacher_features))
    teacher_features = torch.no_grad()(teacher_features)

    def run():
        x = images if ours else (images - mean) / std
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = objective(x, teacher_features(x))
        loss.backward()
        optimizer.step()
        return loss.detach()
    return run, device


def training_step(ours, compiles, *args):
    """`distillation_step` as in training: drop-path and dropout on, BatchNorm of the batch."""
    return distillation_step(ours, compiles, True, *args)


LOSSES = {                                                        # name: (plain, ours), of (student, teacher, labels, weight)
    "weighted CE": (lambda s, t, y, w: plain_ce(s[0], y, w), lambda s, t, y, w: weighted_cross_entropy(s[0], y, w)),
    "KL, T = 4": (lambda s, t, y, w: plain_kl(s[0], t[0], 4.0, y), lambda s, t, y, w: kl_distillation(s[0], t[0], 4.0, y)),
    "Dice": (lambda s, t, y, w: plain_dice(s[0], y), lambda s, t, y, w: dice_loss(s[0], y)),
    "Focal": (lambda s, t, y, w: plain_focal(s[0], y, w), lambda s, t, y, w: focal_loss(s[0], y, w)),
    "CSKD, 4 stages": (lambda s, t, y, w: plain_cskd(s[1], t[1]), lambda s, t, y, w: sum(cskd(a, b) for a, b in zip(s[1], t[1]))),
    "PEKD": (lambda s, t, y, w: plain_pekd(s[1], t[1]), lambda s, t, y, w: pekd(s[1], t[1])),
}


def loss_and_gradient(name, ours, size, batch, device, dtype):
    """One loss, forward and backward, on random maps of B2's widths and quarter-size logits -> (function, device)."""
    device, generator = torch.device(device), torch.Generator().manual_seed(0)
    H, W = size

    def features():
        maps = [torch.randn(batch, dim, -(-H // stride), -(-W // stride), generator=generator) for dim, stride in zip(SIZES["b2"]["dims"], (4, 8, 16, 32))]
        logits = torch.randn(batch, CLASSES, -(-H // 4), -(-W // 4), generator=generator)
        return logits.to(device), [x.to(device).contiguous(memory_format=torch.channels_last) for x in maps]

    student, teacher = features(), features()
    labels = torch.randint(0, CLASSES, (batch, H, W), generator=generator)
    labels[:, :H // 16] = IGNORE
    labels, weight = labels.to(device), class_weights(torch.arange(1, CLASSES + 1)).to(device)
    leaves = [student[0].requires_grad_(), *(x.requires_grad_() for x in student[1])]

    def run():
        for leaf in leaves:
            leaf.grad = None
        loss = LOSSES[name][ours](student, teacher, labels, weight)
        loss.backward()
        return loss.detach()
    return run, device


def reading(spec, cache, augmented, frames=16):
    """Read `frames` frames in one thread, as one of a loader's workers -> (function, device)."""
    torch.set_num_threads(1)
    dataset = open_dataset(spec, "train", cache=cache)
    crop = (288, 288) if dataset.name == "CamVid" else (512, 512)
    augment, rng = Augment(crop, dataset.size), np.random.default_rng(0)

    def run():
        for i in range(frames):
            image, label = dataset[i % len(dataset)]
            if augmented:
                augment(image, label, rng)
            else:
                int(image.sum(dtype=torch.int64)) + int(label.sum(dtype=torch.int64))         # a mapped file is read when it is used
    return run, torch.device("cpu")


def write_frames(folder, frames=16, size=(512, 1024)):
    """Toy scenes as a data set in files, for a bench without one -> its spec."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("".join(f"class {c}\n" for c in range(8)))
    for i in range(frames):
        image, label = (Image.fromarray(part).resize(size[::-1], Image.Resampling.NEAREST) for part in draw_scene(f"train-{i:04d}"))
        image.save(folder / "images" / f"{i}.png")
        label.save(folder / "labels" / f"{i}.png")
    return f"folder:{folder}"


def attention(stages, variant, size, batch, device, dtype):
    """The attention of some stages' blocks alone, which grows with the square of the image -> (function, device)."""
    device = torch.device(device)
    torch.manual_seed(0)
    model = segformer(variant, CLASSES).fold().to(device)
    work = [(block.attn, torch.rand(batch, -(-size[0] // 2 ** (i + 2)), -(-size[1] // 2 ** (i + 2)), SIZES[variant]["dims"][i], device=device))
            for i in stages for block in model.stages[i].blocks]

    @torch.inference_mode()
    def run():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for attend, tokens in work:
                attend(tokens)
    return run, device


# ---------------------------------------------------------------- tables

def bench_model(args, device, dtype):
    """The paper's Table 2 columns. -> rows"""
    common = (tuple(args.size), args.batch, str(device), dtype)
    results = run_in_turns({(name, folded): (True, inference, (variant, norm, folded, args.compile, *common))
                            for name, variant, norm in TABLE_2 for folded in (False, True)}, args.rounds)
    print(f"\n{'network':<17}{'params':>12}{'GMACs published':>17}{'as run':>8}{'attention':>11}"
          f"{'FPS':>9}{'folded':>9}{'peak MiB':>10}{'folded':>8}")
    rows = []
    for name, variant, norm in TABLE_2:
        params = sum(p.numel() for p in segformer(variant, CLASSES, NORMS[norm]).parameters())
        run, published, attention = count_macs(variant, norm, args.size)
        plain, folded = results[name, False], results[name, True]
        rows.append(dict(network=name, parameters=params, macs_published=published, macs_run=run, macs_attention=attention,
                         fps=args.batch / plain.seconds, fps_folded=args.batch / folded.seconds, peak_bytes=plain.peak, peak_bytes_folded=folded.peak))
        print(f"{name:<17}{params:>12,}{published / 1e9:>17.2f}{run / 1e9:>8.2f}{'+' + format(attention / 1e9, '.2f'):>11}"
              f"{rows[-1]['fps']:>9.2f}{rows[-1]['fps_folded']:>9.2f}{mib(plain.peak):>10}{mib(folded.peak):>8}")
    print("MACs are of one image; both columns leave out the attention products (QK^T and AV), which come on top.")
    return rows + say_compiled(args, results)


def say_compiled(args, results):
    """With --compile: what compiling took. -> rows"""
    rows = [dict(compiled=str(name), first_run_seconds=timing.first) for name, timing in results.items()] if args.compile else []
    if rows:
        print(f"compiled; the first run, which compiles, took {min(t.first for t in results.values()):.0f} to {max(t.first for t in results.values()):.0f} s")
    return rows


def compare(make, args, compiles, rounds, device, **more):
    """make(ours?, compiled?, *args), theirs and ours in turns, and before them what `more` holds -> {name: Timing}."""
    subjects = more | {"transformers": (False, make, (False, False, *args)), "ours": (False, make, (True, False, *args))}
    if device.type == "cpu":
        subjects["ours, memory kept"] = (True, make, (True, False, *args))
    if compiles:
        subjects["ours, compiled"] = (True, make, (True, True, *args))
    return run_in_turns(subjects, rounds)


def bench_peer(args, device, dtype):
    """Forward, transformers against ours folded, same weights. -> rows"""
    peer_model("b0")                                              # a sentence now if transformers is absent
    print(f"\n{'forward':<9}{'':<19}{'ms':>9}{'ratio':>8}{'peak MiB':>10}{'largest difference':>20}")
    rows, limits = [], rates(device, dtype)
    for variant in ("b0", "b2"):
        where = (variant, tuple(args.size), args.batch, str(device))
        theirs, ours = (peer_inference(which, False, *where, dtype)[0]().float() for which in (False, True))
        exact = ours if dtype == torch.float32 else peer_inference(True, False, *where, torch.float32)[0]()
        half = {"ours, fp32": (device.type == "cpu", peer_inference, (True, False, *where, torch.float32))} if dtype != torch.float32 else {}
        results = compare(peer_inference, (*where, dtype), args.compile, args.rounds, device, **half)
        for name, timing in results.items():
            output = {"transformers": theirs, "ours, fp32": exact}.get(name, ours)
            rows.append(dict(variant=variant, name=name, seconds=timing.seconds, ratio=results["transformers"].seconds / timing.seconds, peak_bytes=timing.peak,
                             difference=(theirs - output).abs().max().item(), first_run_seconds=timing.first))
            print(f"{'B' + variant[1:]:<9}{name:<19}{1e3 * timing.seconds:>9.1f}{rows[-1]['ratio']:>8.2f}{mib(timing.peak):>10}{rows[-1]['difference']:>20.1e}", flush=True)
        rows.append(distance(f"B{variant[1:]} {name}", peer_inference(True, False, *where, dtype)[0], timing.seconds, *limits))
        if half:
            same = (ours.argmax(1) == exact.argmax(1)).float().mean().item()
            rows.append(dict(variant=variant, to_our_fp32=results["ours, fp32"].seconds / timing.seconds, same_class=same))
            print(f"B{variant[1:]} {name}: {rows[-1]['to_our_fp32']:.2f}x our fp32, the same class on {100 * same:.2f} % of the pixels (fresh weights: the classes lie close together)", flush=True)
    if args.compile:
        print("compiling took the first run " + ", ".join(f"{row['first_run_seconds']:.0f} s" for row in rows if row["name"] == "ours, compiled"))
    return rows


def bench_step(args, device, dtype):
    """The distillation step, transformers with textbook losses against ours. transformers' teacher runs whole, as its users
    call it; ours leaves out the decoder, which none of these losses reads. -> rows"""
    peer_model("b0")
    common = (tuple(args.size), max(args.batch, 2), str(device), dtype)
    losses = [distillation_step(ours, False, False, *common)[0]().item() for ours in (False, True)]      # eval mode: nothing random
    results = compare(training_step, common, args.compile, max(3, args.rounds // 3), device)
    print(f"\n{'step B2->B0, batch ' + str(common[1]):<21}{'seconds':>9}{'ratio':>8}{'images/s':>10}{'peak MiB':>10}{'first loss':>13}")
    rows = []
    for name, timing in results.items():
        rows.append(dict(name=name, seconds=timing.seconds, ratio=results["transformers"].seconds / timing.seconds, batch=common[1], peak_bytes=timing.peak,
                         first_loss=losses[name != "transformers"], first_run_seconds=timing.first))
        print(f"{name:<21}{timing.seconds:>9.2f}{rows[-1]['ratio']:>8.2f}{common[1] / timing.seconds:>10.2f}{mib(timing.peak):>10}{rows[-1]['first_loss']:>13.6f}")
    if args.compile:
        print(f"compiling took the first step {timing.first:.0f} s")
    return rows + [distance(name, training_step(True, False, *common)[0], timing.seconds, *rates(device, dtype))]


def bench_losses(args, device, dtype):
    """Each loss, forward and backward, against its plain version. -> rows"""
    common = (tuple(args.size), max(args.batch, 2), str(device), dtype)
    results = run_in_turns({(name, ours): (True, loss_and_gradient, (name, ours, *common)) for name in LOSSES for ours in (False, True)}, args.rounds)
    print(f"\n{'loss, batch ' + str(common[1]):<16}{'plain ms':>10}{'ours':>9}{'ratio':>8}{'plain MiB':>11}{'ours':>8}{'difference':>12}")
    rows = []
    for name in LOSSES:
        plain, ours = results[name, False], results[name, True]
        values = [loss_and_gradient(name, which, *common)[0]().item() for which in (False, True)]
        rows.append(dict(loss=name, plain_seconds=plain.seconds, seconds=ours.seconds, ratio=plain.seconds / ours.seconds, plain_peak_bytes=plain.peak,
                         peak_bytes=ours.peak, difference=abs(values[0] - values[1])))
        print(f"{name:<16}{1e3 * plain.seconds:>10.1f}{1e3 * ours.seconds:>9.1f}{rows[-1]['ratio']:>8.2f}{mib(plain.peak):>11}{mib(ours.peak):>8}{rows[-1]['difference']:>12.1e}")
    return rows


def bench_data(args, device, dtype):
    """A frame read in one thread: decoded each time, or from the cache. -> rows"""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "drawn"
        spec = args.data or write_frames(folder)
        for i in range(len(dataset := open_dataset(spec, "train", cache=folder / "cache"))):
            dataset[i]                                            # fill it
        frames, (H, W) = min(64, len(dataset)), dataset[0][1].shape
        results = run_in_turns({(cached, augmented): (True, reading, (spec, folder / "cache" if cached else None, augmented, frames))
                                for augmented in (False, True) for cached in (False, True)}, args.rounds)
    print(f"\n{dataset.name}, {W}x{H}, ms a frame in one thread{'decoded':>12}{'cached':>9}{'ratio':>8}{'images/s':>10}")
    rows = []
    for augmented in (False, True):
        decoded, cached = (results[which, augmented].seconds / frames for which in (False, True))
        rows.append(dict(data=dataset.name, augmented=augmented, decoded_seconds=decoded, cached_seconds=cached, ratio=decoded / cached))
        print(f"{'read, augmented' if augmented else 'read':<{len(dataset.name) + len(str(W)) + len(str(H)) + 33}}{1e3 * decoded:>9.2f}{1e3 * cached:>9.2f}{decoded / cached:>8.2f}{1 / cached:>10.0f}")
    return rows


def bench_scaling(args, device, dtype):
    """B0's forward over the image's size; the attention, which grows with the square of it, apart. -> rows"""
    common = args.batch, str(device), dtype
    subjects = {(size, "whole"): (True, inference, ("b0", "ln", True, args.compile, size, *common)) for size in SCALES}
    subjects |= {(size, name): (True, attention, (stages, "b0", size, *common)) for size in SCALES for name, stages in (("first", [0]), ("others", [1, 2, 3]))}
    results = run_in_turns(subjects, args.rounds)
    print(f"\n{'B0 forward':<12}{'ms':>9}{'ns a pixel':>12}{'attention of stage 1':>22}{'of stages 2-4':>15}{'the rest':>10}{'to 512x1024':>13}{'peak MiB':>10}")
    rows = []
    for size in SCALES:
        whole, first, others = (1e9 * results[size, name].seconds / (args.batch * size[0] * size[1]) for name in ("whole", "first", "others"))
        rows.append(dict(size=size, seconds=results[size, "whole"].seconds, ns_a_pixel=whole, attention_1_ns=first, attention_2_to_4_ns=others,
                         rest_ns=whole - first - others, peak_bytes=results[size, "whole"].peak))
    for size, row in zip(SCALES, rows):
        row["rest_to_512x1024"] = row["rest_ns"] / rows[SCALES.index((512, 1024))]["rest_ns"]
        print(f"{'{}x{}'.format(*size):<12}{1e3 * row['seconds']:>9.1f}{row['ns_a_pixel']:>12.0f}{row['attention_1_ns']:>22.0f}{row['attention_2_to_4_ns']:>15.0f}"
              f"{row['rest_ns']:>10.0f}{row['rest_to_512x1024']:>13.2f}{mib(row['peak_bytes']):>10}")
    return rows


SUBJECTS = {"model": bench_model, "peer": bench_peer, "step": bench_step, "losses": bench_losses, "data": bench_data, "scaling": bench_scaling}


def main():
    parser = argparse.ArgumentParser(description="Parameters, MACs, speed and memory on this device.")
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"{', '.join(SUBJECTS)} (default: model)")
    parser.add_argument("--size", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"), help="default 512 1024, the paper's")
    parser.add_argument("--batch", type=int, default=1, help="images a forward (default 1); a step takes two at least")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, the median counts (default 9)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", *HALF), help="fp32, or autocast to 16 bits")
    parser.add_argument("--compile", action="store_true", help="torch.compile ours (CUDA: with CUDA graphs); losses and data stay as they are")
    parser.add_argument("--data", metavar="SPEC", help="what the subject data reads: camvid:DIR, cityscapes:DIR or folder:DIR (default: drawn frames, written as .png)")
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
        dtype = HALF.get(args.dtype, torch.float32)
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
