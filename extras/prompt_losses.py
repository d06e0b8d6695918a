"""What a student that is told what to segment learns from: a teacher's answers, or the labels.

    phase 1 = mean(1 - cos(pixels_s, pixels_t)) + mean(1 - cos(words_s, words_t))
    phase 2 = 5 mean over present pairs of (BCE + Dice)(mask_s, target)
              + mean over all pairs of BCE(presence_s, target)

A pair is an image and a prompt. The targets of phase 2 are the teacher's, sigmoid of its logits, or
the labels': what share of each pixel at the logits' size is of the prompted classes. Void pixels
teach nothing; a pair whose thing is absent gives no mask loss, since "nowhere" is what presence
says.

Every loss is computed in float32, whatever autocast says outside.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from losses import IGNORE, full_precision

DICE_EPS = 1.0                                                    # as in losses.dice_loss


class Targets(NamedTuple):
    """What the masks and the presence of B images and K prompts should be."""
    mask: torch.Tensor                                            # (B, K, h, w), in [0, 1]
    presence: torch.Tensor                                        # (B, K), in [0, 1]
    weight: torch.Tensor                                          # (B, h, w): the labelled share


# ---------------------------------------------------------------- phase 1

@full_precision
def pixel_alignment(student, teacher, weight):
    """mean over pixels of 1 - cos. Pixels (B, D, h, w) each, weight (B, h, w) -> scalar.

    ValueError where the two are not of one shape.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"pixels of the shapes {tuple(student.shape)} and "
                         f"{tuple(teacher.shape)} cannot be aligned")
    distance = 1 - F.cosine_similarity(student, teacher, dim=1)   # (B, h, w)
    return (distance * weight).sum() / weight.sum().clamp(min=1)


@full_precision
def word_alignment(student, teacher):
    """mean over prompts of 1 - cos. Words (K, D) each -> scalar. ValueError as above."""
    if student.shape != teacher.shape:
        raise ValueError(f"words of the shapes {tuple(student.shape)} and "
                         f"{tuple(teacher.shape)} cannot be aligned")
    return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()


# ---------------------------------------------------------------- phase 2

@full_precision
def mask_loss(logits, target, present, weight):
    """Mean over the present pairs of BCE + Dice; 0 where no pair is present.

    logits and target (B, K, h, w), present bool (B, K), weight (B, h, w) -> scalar
    """
    weight = weight[:, None]                                      # (B, 1, h, w)
    pixels = weight.sum((2, 3)).clamp(min=1)                      # (B, 1)
    per_pixel = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    bce = (per_pixel * weight).sum((2, 3)) / pixels               # (B, K)

    p = logits.sigmoid() * weight
    g = target * weight
    overlap = (logits.sigmoid() * g).sum((2, 3))                  # (B, K)
    total = p.sum((2, 3)) + g.sum((2, 3))                         # (B, K)
    dice = 1 - (2 * overlap + DICE_EPS) / (total + DICE_EPS)
    return ((bce + dice) * present).sum() / present.sum().clamp(min=1)


@full_precision
def presence_loss(logits, target):
    """Mean over all pairs of BCE. Both (B, K), target in [0, 1] -> scalar"""
    return F.binary_cross_entropy_with_logits(logits, target)


# ---------------------------------------------------------------- targets

def labelled_share(labels, size):
    """Labels (B, H, W) -> the share of each pixel at `size` (h, w) that is not void, (B, h, w)."""
    valid = (labels != IGNORE).float()
    return F.interpolate(valid[:, None], size=tuple(size), mode="area")[:, 0]


def targets_of_labels(labels, table, size):
    """Labels (B, H, W), table bool (K, C) of which prompt names which class -> Targets at `size`.

    A label that is neither a class nor void (an empty image's) belongs to no prompt.
    """
    K, C = table.shape
    is_class = labels < C                                         # (B, H, W)
    one_hot = F.one_hot(labels.long().where(is_class, C), C + 1)  # (B, H, W, C + 1)
    shares = F.interpolate(one_hot[..., :C].movedim(-1, 1).float(), size=tuple(size), mode="area")
    weight = labelled_share(labels, size)                         # (B, h, w)
    mask = torch.einsum("bchw,kc->bkhw", shares, table.float())   # (B, K, h, w)
    mask = mask / weight[:, None].clamp(min=1e-6)                 # of the labelled part
    occurs = one_hot[..., :C].flatten(1, 2).amax(1).float()       # (B, C)
    presence = (occurs @ table.float().T).clamp(max=1)            # (B, K)
    return Targets(mask.clamp(0, 1), presence, weight)


def targets_of_teacher(mask, presence, labels):
    """A teacher's logits (B, K, h, w) and (B, K) -> Targets, in which void counts for nothing."""
    weight = labelled_share(labels, mask.shape[2:])
    return Targets(mask.float().sigmoid(), presence.float().sigmoid(), weight)
