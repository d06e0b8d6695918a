"""Each loss against the way a textbook writes it: time and memory of forward and backward.

    python bench.py losses [--size H W] [--batch B]

The plain versions are also a second opinion: both sides compute one number, and the table says how
far these are apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from extras.measure import Candidate, compare, mib, print_row, run_in_turns
from losses import (
    IGNORE,
    class_weights,
    cskd,
    dice_loss,
    focal_loss,
    kl_distillation,
    pekd,
    weighted_cross_entropy,
)
from model import SIZES

# ---------------------------------------------------------------- as a textbook writes them

def upsample(logits, labels):                                     # (B, C, h, w), (B, H, W)
    size = labels.shape[1:]
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)     # (B, C, H, W)


def plain_ce(logits, labels, weight):
    return F.cross_entropy(upsample(logits, labels), labels, weight, ignore_index=IGNORE)


def plain_kl(student, teacher, temperature, labels):
    p = (upsample(teacher, labels) / temperature).softmax(1)      # (B, C, H, W)
    q = (upsample(student, labels) / temperature).softmax(1)      # (B, C, H, W)
    divergence = (p * (p.log() - q.log())).sum(1)                 # (B, H, W)
    return temperature ** 2 * divergence[labels != IGNORE].mean()


def plain_dice(logits, labels, eps=1.0):
    valid = (labels != IGNORE)[:, None]                           # (B, 1, H, W)
    p = upsample(logits, labels).softmax(1) * valid               # (B, C, H, W)
    target = labels.where(labels != IGNORE, 0)
    g = F.one_hot(target, p.shape[1]).movedim(3, 1) * valid       # (B, C, H, W)
    overlap = (p * g).sum((0, 2, 3))                              # (C,)
    total = p.sum((0, 2, 3)) + g.sum((0, 2, 3))                   # (C,)
    return (1 - (2 * overlap + eps) / (total + eps)).mean()


def plain_focal(logits, labels, alpha, gamma=2.0):
    valid = labels != IGNORE
    target = labels[valid]                                        # (N,) the labelled pixels
    log_p = upsample(logits, labels).log_softmax(1)               # (B, C, H, W)
    log_p = log_p.movedim(1, 3)[valid]                            # (N, C)
    log_p = log_p.gather(1, target[:, None])[:, 0]                # (N,)
    return (-alpha[target] * (1 - log_p.exp()) ** gamma * log_p).mean()


def plain_cskd(student, teacher):
    """Summed over the stages, every intermediate map in memory."""
    loss = 0
    for s, t in zip(student, teacher, strict=True):               # (B, C, H, W) each
        pixel = 1 - F.cosine_similarity(s, t, dim=1)              # (B, H, W)
        channel = 1 - F.cosine_similarity(s.flatten(2), t.flatten(2), dim=2)          # (B, C)
        guide = (pixel[:, None] * channel[:, :, None, None]).abs()                    # (B, C, H, W)
        loss = loss + (guide * (t - s) ** 2).mean() + 0.5 * (pixel.mean() + channel.mean())
    return loss


def plain_pekd(student, teacher):
    loss = 0
    for beta, s, t in zip((0.1, 0.1, 0.5, 1.0), student, teacher, strict=True):
        loss = loss + beta * F.mse_loss(s, t)
    return loss


def cskd_of_stages(student, teacher):
    """Ours, summed over the stages."""
    return sum(cskd(s, t) for s, t in zip(student, teacher, strict=True))


# ---------------------------------------------------------------- both sides

@dataclass
class Sample:
    """Random maps of B2's widths, quarter-size logits, and labels, some of them void."""
    student_logits: torch.Tensor        # (B, C, ceil(H/4), ceil(W/4))
    teacher_logits: torch.Tensor
    student_maps: list                  # four of (B, C_i, H_i, W_i)
    teacher_maps: list
    labels: torch.Tensor                # (B, H, W)
    weight: torch.Tensor                # (C,)
    temperature: float = 4.0


class Loss(NamedTuple):
    plain: Callable
    ours: Callable
    reads: tuple        # the fields of Sample that are its arguments, in order


LOSSES = {
    "weighted CE": Loss(plain_ce, weighted_cross_entropy, ("student_logits", "labels", "weight")),
    "KL, T = 4": Loss(plain_kl, kl_distillation,
                      ("student_logits", "teacher_logits", "temperature", "labels")),
    "Dice": Loss(plain_dice, dice_loss, ("student_logits", "labels")),
    "Focal": Loss(plain_focal, focal_loss, ("student_logits", "labels", "weight")),
    "CSKD, 4 stages": Loss(plain_cskd, cskd_of_stages, ("student_maps", "teacher_maps")),
    "PEKD": Loss(plain_pekd, pekd, ("student_maps", "teacher_maps")),
}


def draw_maps(options, generator):
    """-> (logits, four maps) of one network"""
    H, W = options.size
    maps = []
    for dim, stride in zip(SIZES["b2"]["dims"], (4, 8, 16, 32), strict=True):
        shape = (options.batch, dim, -(-H // stride), -(-W // stride))
        x = torch.randn(shape, generator=generator).to(options.device)
        maps.append(x.contiguous(memory_format=torch.channels_last))
    shape = (options.batch, options.classes, -(-H // 4), -(-W // 4))
    logits = torch.randn(shape, generator=generator)
    return logits.to(options.device), maps


def draw_sample(options):
    generator = torch.Generator().manual_seed(0)
    student_logits, student_maps = draw_maps(options, generator)
    teacher_logits, teacher_maps = draw_maps(options, generator)
    H, W = options.size
    labels = torch.randint(0, options.classes, (options.batch, H, W), generator=generator)
    labels[:, :H // 16] = IGNORE
    weight = class_weights(torch.arange(1, options.classes + 1))
    return Sample(student_logits, teacher_logits, student_maps, teacher_maps,
                  labels.to(options.device), weight.to(options.device))


def make_loss(options, name, side):
    """-> a function that runs one loss forward and backward; side: "plain" or "ours" """
    loss_of = getattr(LOSSES[name], side)
    sample = draw_sample(options)
    arguments = [getattr(sample, field) for field in LOSSES[name].reads]
    leaves = [sample.student_logits, *sample.student_maps]
    for leaf in leaves:
        leaf.requires_grad_()

    def run():
        for leaf in leaves:
            leaf.grad = None
        loss = loss_of(*arguments)
        loss.backward()
        return loss.detach()
    return run


def bench_losses(options):
    """Each loss, forward and backward, against its plain version. -> rows"""
    options = options.with_two_images()
    candidates = {}
    for name in LOSSES:
        for side in ("plain", "ours"):
            candidates[name, side] = Candidate(partial(make_loss, options, name, side))
    timings = run_in_turns(candidates, options.rounds, options.device)

    print(f"\nloss, forward and backward, batch {options.batch}, {options.classes} classes")
    widths = (16, 10, 9, 8, 13, 11, 8, 12)
    print_row(("", "plain ms", "ours", "ratio", "its range",
               "plain MiB", "ours", "difference"), widths)
    rows = []
    for name in LOSSES:
        plain = timings[name, "plain"]
        ours = timings[name, "ours"]
        ratio = compare(plain, ours)
        plain_value = make_loss(options, name, "plain")().item()
        our_value = make_loss(options, name, "ours")().item()
        difference = abs(plain_value - our_value)
        rows.append({
            "loss": name,
            "plain_seconds": plain.seconds,
            "seconds": ours.seconds,
            **ratio.as_row(),
            "plain_peak_bytes": plain.peak,
            "peak_bytes": ours.peak,
            "difference": difference,
            "plain_round_seconds": plain.rounds,
            "round_seconds": ours.rounds,
        })
        print_row((name,
                   f"{1e3 * plain.seconds:.1f}",
                   f"{1e3 * ours.seconds:.1f}",
                   *ratio.cells(),
                   mib(plain.peak),
                   mib(ours.peak),
                   f"{difference:.1e}"), widths)
    return rows
