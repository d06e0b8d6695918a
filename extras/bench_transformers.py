"""The same weights in Hugging Face transformers: a forward, and a step with textbook losses.

    python bench.py peer                      # a forward of B0 and of B2, ours folded
    python bench.py step                      # B2 -> B0 with CE + CSKD + PEKD and AdamW
    pip install transformers==5.23.0          # what both need

Both sides run in every setting, and a ratio is always of the two in the same one: with the C
library's allocator as it comes; with freed memory kept, as train.py and eval.py run (Linux, on a
CPU); and with --compile also compiled. AdamW is the fused one on both sides.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from extras.bench_losses import cskd_of_stages, plain_ce, plain_cskd, plain_pekd
from extras.checkpoint_formats import rename
from extras.measure import (
    Candidate,
    compare,
    compile_forward,
    mib,
    print_compile_times,
    print_row,
    run_in_turns,
)
from extras.packages import import_package
from extras.roofline import measure_rates, roofline
from losses import Projections, class_weights, pekd, weighted_cross_entropy
from model import MEAN, SIZES, STD, segformer

SIDES = ("transformers", "ours")
OURS_FP32 = "ours, fp32"


# ---------------------------------------------------------------- settings, the same for both sides

@dataclass(frozen=True)
class Setting:
    title: str          # in the table
    ending: str         # of the names in the JSON
    keep_memory: bool
    compiled: bool


def settings_of(options):
    """The settings in which both sides run; the last is the one that counts."""
    can_keep = options.device.type == "cpu" and sys.platform == "linux"
    settings = [Setting("default allocator", "", False, False)]
    if can_keep:
        settings.append(Setting("freed memory kept", ", memory kept", True, False))
    if options.compile:
        settings.append(Setting("compiled", ", compiled", can_keep, True))
    return settings


def quoted_name(side, options):
    """-> the name of a side's row in the setting that counts"""
    return side + settings_of(options)[-1].ending


def candidates_of(make, options):
    """make(options, side) in every setting, the two sides of a setting one after the other.

    -> {name: Candidate}
    """
    candidates = {}
    for setting in settings_of(options):
        chosen = replace(options, compile=setting.compiled)
        for side in SIDES:
            name = side + setting.ending
            candidates[name] = Candidate(partial(make, chosen, side), setting.keep_memory)
    return candidates


def rows_of(timings, options):
    """-> a row for each side of each setting, with the ratio of the two in that setting."""
    rows = []
    for setting in settings_of(options):
        theirs = timings["transformers" + setting.ending]
        for side in SIDES:
            timing = timings[side + setting.ending]
            rows.append({
                "name": side + setting.ending,
                "side": side,
                "memory_kept": setting.keep_memory,
                "compiled": setting.compiled,
                **timing.as_row(),
                **compare(theirs, timing).as_row(),
            })
    return rows


WIDTHS = (24, 17, 9, 8, 13, 19, 9)


def print_settings(title, timings, options):
    """A table with a row for each setting."""
    print()
    print_row((title, "transformers ms", "ours", "ratio", "its range",
               "transformers MiB", "ours"), WIDTHS)
    for setting in settings_of(options):
        theirs = timings["transformers" + setting.ending]
        ours = timings["ours" + setting.ending]
        print_row((setting.title,
                   f"{1e3 * theirs.seconds:.1f}",
                   f"{1e3 * ours.seconds:.1f}",
                   *compare(theirs, ours).cells(),
                   mib(theirs.peak),
                   mib(ours.peak)), WIDTHS)
        if setting.compiled:
            print_compile_times([theirs, ours])


# ---------------------------------------------------------------- two models with the same weights

def import_transformers():
    """Raises UsageError where transformers is not installed."""
    return import_package("transformers", "to compare with transformers takes",
                          "transformers==5.23.0")


def peer_model(variant, classes):
    """transformers' SegFormer with fresh weights."""
    transformers = import_transformers()
    size = SIZES[variant]
    config = transformers.SegformerConfig(num_labels=classes,
                                          hidden_sizes=list(size["dims"]),
                                          depths=list(size["depths"]),
                                          decoder_hidden_size=size["width"])
    torch.manual_seed(0)
    return transformers.SegformerForSemanticSegmentation(config)


def peer_norm(dim, site):
    """LayerNorm as transformers builds it."""
    return nn.LayerNorm(dim, eps=1e-5)


def same_model(peer, variant, classes):
    """Our model with the weights of transformers' `peer`."""
    model = segformer(variant, classes, peer_norm)
    _, tensors, _ = rename(peer.state_dict(), "transformers")
    model.load_state_dict(tensors, strict=False)                  # theirs has no mean and std
    return model


def normalise(images):                                            # (B, 3, H, W) in [0, 1]
    """What transformers' users do before the model; ours does it inside."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1)
    return (images - mean) / std


# ---------------------------------------------------------------- peer: the forward

def make_peer_forward(variant, options, side):
    """-> a function that runs a forward of transformers' model, or of ours, folded"""
    peer = peer_model(variant, options.classes).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.batch, 3, *options.size, generator=generator)
    images = images.to(options.device)
    if side == "ours":
        model = same_model(peer, variant, options.classes).fold().to(options.device)
        inputs = images
    else:
        model = peer.to(options.device)
        inputs = normalise(images)
    forward = compile_forward(model, options.device) if options.compile else model

    @torch.inference_mode()
    def run():
        with options.autocast():
            output = forward(inputs)
        return output if side == "ours" else output.logits
    return run


def bench_peer(options):
    """Forward, transformers against ours folded, same weights. -> rows"""
    import_transformers()                                         # a sentence now if absent
    rates = measure_rates(options.device, options.dtype)
    rows = []
    for variant in ("b0", "b2"):
        for row in compare_forwards(variant, options, rates):
            rows.append({"variant": variant, **row})
    return rows


def compare_forwards(variant, options, rates):
    """-> rows: both sides in each setting; the device's limits; in 16 bits ours beside our fp32"""
    title = f"B{variant[1:]}"
    quoted = quoted_name("ours", options)
    candidates = candidates_of(partial(make_peer_forward, variant), options)
    if options.dtype != torch.float32:
        in_fp32 = replace(options, dtype=torch.float32)
        make = partial(make_peer_forward, variant, in_fp32, "ours")
        candidates[OURS_FP32] = Candidate(make, candidates[quoted].keep_memory)
    timings = run_in_turns(candidates, options.rounds, options.device)

    eager = replace(options, compile=False)
    run_ours = make_peer_forward(variant, eager, "ours")
    ours = run_ours().float()
    theirs = make_peer_forward(variant, eager, "transformers")().float()
    difference = (theirs - ours).abs().max().item()
    rows = rows_of(timings, options)
    for row in rows:
        row["difference"] = difference if row["side"] == "ours" else 0.0
    print_settings(f"forward {title}", timings, options)
    print(f"{title}: the outputs differ by {difference:.1e} at most")
    limits = roofline(f"{title} {quoted}", run_ours, timings[quoted].seconds, rates)
    if options.dtype == torch.float32:
        return [*rows, limits]

    exact = make_peer_forward(variant, replace(eager, dtype=torch.float32), "ours")()
    rows.append({"name": OURS_FP32, **timings[OURS_FP32].as_row(),
                 "difference": (theirs - exact).abs().max().item()})
    gain = compare(timings[OURS_FP32], timings[quoted]).median
    same_class = (ours.argmax(1) == exact.argmax(1)).float().mean().item()
    print(f"{title} {quoted}: {gain:.2f}x our fp32, the same class on {same_class:.2%} of the "
          "pixels (fresh weights: the classes lie close together)", flush=True)
    return [*rows, limits, {"to_our_fp32": gain, "same_class": same_class}]


# ---------------------------------------------------------------- step: B2 teaches B0

@dataclass
class Distillation:
    """One side of the step. Features are (logits, stages, patch_embeds)."""
    student: nn.Module
    teacher: nn.Module
    inputs_of: Callable             # images -> what both networks take
    student_features: Callable      # inputs -> features
    teacher_features: Callable      # inputs -> features
    losses: Callable                # features of both, labels, weight -> scalar


def hook_features(peer):
    """-> a function from inputs to the features of transformers' model, as its users get them"""
    embeds = []

    def keep(module, inputs, output):
        tokens, height, width = output                            # (B, H*W, C)
        embeds.append(tokens.transpose(1, 2).unflatten(2, (height, width)))           # (B, C, H, W)

    for module in peer.modules():
        if type(module).__name__ == "SegformerOverlapPatchEmbeddings":
            module.register_forward_hook(keep)

    def features(inputs):
        output = peer(inputs, output_hidden_states=True)
        patch_embeds = list(embeds)
        embeds.clear()                                            # the caller's from now on
        return output.logits, list(output.hidden_states[-4:]), patch_embeds
    return features


def textbook_losses(student, teacher, labels, weight):
    """Eq. 3, 5-8 as a textbook writes them. -> scalar"""
    return (plain_ce(student[0], labels, weight)
            + plain_cskd(student[1], teacher[1])
            + plain_pekd(student[2], teacher[2]))


def our_losses(student, teacher, labels, weight):
    """The same with losses.py."""
    return (weighted_cross_entropy(student[0], labels, weight)
            + cskd_of_stages(student[1], teacher[1])
            + pekd(student[2], teacher[2]))


def same_images(images):
    return images


def their_distillation(options):
    """transformers' models, its teacher whole, as its users call it."""
    student = peer_model("b0", options.classes)
    teacher = peer_model("b2", options.classes).eval().requires_grad_(False)
    return Distillation(student, teacher, normalise,
                        hook_features(student), hook_features(teacher), textbook_losses)


def our_distillation(options):
    """Ours with the same weights; the teacher without its decoder, which no loss here reads."""
    student = same_model(peer_model("b0", options.classes), "b0", options.classes)
    teacher = same_model(peer_model("b2", options.classes), "b2", options.classes).fold()

    def teacher_features(inputs):
        return None, *teacher.encode(inputs)

    return Distillation(student, teacher, same_images,
                        student.features, teacher_features, our_losses)


def make_adamw(parameters, device):
    """AdamW as train.py has it."""
    return torch.optim.AdamW(parameters, lr=1e-5, fused=device.type != "mps")


def make_step(options, side, training=True):
    """-> a function that does one step B2 -> B0 and returns its loss.

    training: with drop-path, dropout and the batch's statistics; without, nothing is random.
    """
    sides = {"transformers": their_distillation, "ours": our_distillation}
    parts = sides[side](options)
    device = options.device
    torch.manual_seed(1)
    projections = Projections(SIZES["b0"]["dims"], SIZES["b2"]["dims"]).to(device)
    parts.student.train(training).to(device)
    parts.teacher.to(device)
    optimizer = make_adamw([*parts.student.parameters(), *projections.parameters()], device)

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.batch, 3, *options.size, generator=generator).to(device)
    labels = torch.randint(0, options.classes, (options.batch, *options.size), generator=generator)
    labels = labels.to(device)
    weight = class_weights(torch.arange(1, options.classes + 1)).to(device)

    def objective(inputs, teacher):
        logits, stages, patch_embeds = parts.student_features(inputs)
        stages, patch_embeds = projections(stages, patch_embeds)
        student = (logits.float(), stages, patch_embeds)
        return parts.losses(student, teacher, labels, weight)

    teacher_features = parts.teacher_features
    if options.compile:
        objective = torch.compile(objective, dynamic=False)
        teacher_features = torch.compile(teacher_features, dynamic=False)

    def run():
        inputs = parts.inputs_of(images)
        optimizer.zero_grad()
        with options.autocast():
            with torch.no_grad():
                teacher = teacher_features(inputs)
            loss = objective(inputs, teacher)
        loss.backward()
        optimizer.step()
        return loss.detach()
    return run


def bench_step(options):
    """The distillation step, transformers with textbook losses against ours. -> rows"""
    import_transformers()
    options = options.with_two_images()
    rounds = max(options.rounds // 3, min(options.rounds, 3))     # a step is long
    print(f"step: batch {options.batch}, median of {rounds} rounds")
    eager = replace(options, compile=False)
    first_losses = {}
    for side in SIDES:
        run = make_step(eager, side, training=False)
        first_losses[side] = run().item()
    timings = run_in_turns(candidates_of(make_step, options), rounds, options.device)

    print_settings(f"step B2->B0, batch {options.batch}", timings, options)
    for side in SIDES:
        name = quoted_name(side, options)
        images_per_second = options.batch / timings[name].seconds
        print(f"{name}: {images_per_second:.2f} images/s, first loss {first_losses[side]:.6f}")
    rows = rows_of(timings, options)
    for row in rows:
        row["batch"] = options.batch
        row["first_loss"] = first_losses[row["side"]]
    quoted = quoted_name("ours", options)
    rates = measure_rates(options.device, options.dtype)
    run_ours = make_step(eager, "ours")
    limits = roofline(quoted, run_ours, timings[quoted].seconds, rates)
    return [*rows, limits]
