"""The losses of EffiSeg, each a small pure function that reads as its equation.

    eq. 3       weighted_cross_entropy    class weights w_c = 1 / ln(1.10 + p_c): class_weights
    eq. 4       kl_distillation           the teacher's class distribution, a pixel
    eq. 5-7     cskd                      cosine-guided distillation of one stage's features
    eq. 8       pekd                      distillation of the four patch embeddings
    eq. 9       total = WCE + lambda_KL KL + lambda_FD sum_stages CSKD + lambda_PE PEKD        (composed in train.py)
    eq. 10-11   dice_loss
    eq. 12-13   focal_loss
    eq. 14      dice_focal_loss

Every loss is a mean over what was kept: void pixels (IGNORE) teach nothing, a batch of nothing but void gives 0, and twice
the batch gives the same number. Half precision is raised to float32 inside, whatever autocast says outside; float64 stays.
Label losses take logits of any resolution and resize them to the labels' first. `python -m pytest test_losses.py` holds
each against plain loops, and shows what the usual mistakes compute instead.

References
  [1] Kim et al., EffiSeg, 2025                                     the equation numbers above
  [2] Paszke et al., ENet, 2016, arXiv:1606.02147                   section 5.2: the class weights
  [3] Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531       temperature
  [4] Park et al., CSKD: Cosine Similarity-Guided Knowledge Distillation for Robust Object Detectors, 2024
  [5] Liu et al., TransKD, 2022, arXiv:2202.13393                   patch embedding distillation
  [6] Lin et al., Focal Loss, 2017, arXiv:1708.02002
  [7] Milletari et al., V-Net, 2016, arXiv:1606.04797               Dice
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORE = 255                                                      # the label of void pixels, to the very end
BAND = 2 ** 22                                                    # floats of a (B, C, H, W) map that exist at a time: 16 MiB


# ---------------------------------------------------------------- shared by all

def raise_half(value):
    """float16 and bfloat16 tensors -> float32, also inside lists; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [raise_half(item) for item in value]
    is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


def full_precision(loss):
    """Decorator: run `loss` in float32 at least. Squares and sums over an image overflow or round away in 16 bits."""
    @functools.wraps(loss)
    def run(*args, **kwargs):
        first = args[0] if args else next(iter(kwargs.values()))
        device = (first[0] if isinstance(first, (list, tuple)) else first).device.type
        with torch.autocast(device, enabled=False):
            return loss(*raise_half(args), **{name: raise_half(value) for name, value in kwargs.items()})
    return run


def sum_over_pixels(expression, labels, *logits):
    """The sum over the pixels of expression(labels, *logits), which returns a tensor of sums.

    labels (B, H, W), each of logits (B, C, h, w), resized to H x W, bilinear. The network's logits are small, and it is the
    maps (B, C, H, W) made of them that fill a memory: they exist for a band of rows at a time, in the backward pass too,
    where `checkpoint` computes a band again.
    """
    (B, H, W), (C, h) = labels.shape, logits[0].shape[1:3]
    rows = max(1, BAND * h // (B * C * H * W))                    # of the logits in a band
    if rows >= h or H % h or any(x.shape[2] != h for x in logits) or torch.compiler.is_compiling():     # small, or rows do not match, or fused
        return expression(labels, *(resize(x, (H, W)) for x in logits))
    times, total = H // h, 0

    def band(labels, above, *logits):
        wide = (resize(x, (x.shape[2] * times, W))[:, :, above * times:] for x in logits)
        return expression(labels, *(x[:, :, :labels.shape[1]] for x in wide))

    for top in range(0, h, rows):
        above, bottom = min(top, 1), min(top + rows, h)           # one row more on each side, for the interpolation
        parts = (x[:, :, top - above:bottom + 1] for x in logits)
        total = total + checkpoint(band, labels[:, top * times:bottom * times], above, *parts, use_reentrant=False, preserve_rng_state=False)
    return total


def resize(logits, size):
    """Logits (B, C, h, w) at `size` (H, W), bilinear -> (B, C, H, W)."""
    return logits if logits.shape[2:] == tuple(size) else F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


# ---------------------------------------------------------------- supervision (eq. 3)

def class_weights(pixel_counts, c=1.10):
    """w_k = 1 / ln(c + p_k) with p_k the class's share of the labelled pixels ([2]). Counts (C,) -> float32 (C,).

    This is what gave the weights of the paper's Table 1. A class that never occurs gets the largest weight, 1 / ln(c).
    """
    counts = torch.as_tensor(pixel_counts, dtype=torch.float64)
    return (1 / torch.log(c + counts / counts.sum().clamp(min=1))).float()


@full_precision
def weighted_cross_entropy(logits, labels, weight=None):
    """Eq. 3: -sum_i w[y_i] log p_i[y_i] / sum_i w[y_i] over the labelled pixels i.

    logits (B, C, h, w), labels int (B, H, W), weight (C,) or None for ones -> scalar.
    """
    labels, valid = labels.long(), labels != IGNORE
    weight = logits.new_ones(logits.shape[1]) if weight is None else weight.to(logits)
    loss = sum_over_pixels(lambda labels, logits: F.cross_entropy(logits, labels, weight, ignore_index=IGNORE, reduction="sum"), labels, logits)
    return loss / (weight[labels.where(valid, 0)] * valid).sum().clamp(min=torch.finfo(logits.dtype).tiny)


# ---------------------------------------------------------------- distillation (eq. 4-8)

@full_precision
def kl_distillation(student_logits, teacher_logits, temperature=1.0, labels=None):
    """Eq. 4 with the temperature of [3]: T^2 mean_i KL(softmax(teacher_i / T) || softmax(student_i / T)).

    Logits (B, C, h, w) each; the mean is over the pixels. With labels (B, H, W) it is taken at their size and without the
    void pixels. T^2 keeps the size of the gradient when T changes. -> scalar
    """
    def divergence(labels, student, teacher):                                     # (B, H, W), (B, C, H, W) twice
        log_student, log_teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
        return ((log_teacher.exp() * (log_teacher - log_student)).sum(1) * (labels != IGNORE)).sum()

    if labels is None:
        labels = student_logits.new_zeros((len(student_logits), *student_logits.shape[2:]), dtype=torch.uint8)       # no void
    total = sum_over_pixels(divergence, labels, student_logits, teacher_logits.detach())
    return temperature ** 2 * total / (labels != IGNORE).sum().clamp(min=1)


def cosine(a, b, dim, eps=1e-8):
    """Eq. 5: cosine of a and b over `dim`. A zero vector has no direction: cosine 0 and no gradient, not NaN or 1 / eps."""
    squares = a.square().sum(dim) * b.square().sum(dim)
    return (a * b).sum(dim) * (squares > eps ** 2) / squares.clamp(min=eps ** 2).sqrt()


@full_precision
def cskd(student, teacher, lambda_m=1.0, lambda_s=0.5):
    """Eq. 5-7, one stage: lambda_m mean(G (T - S)^2) + lambda_s (mean(1 - S^C) + mean(1 - S^S)).

    student (after its projection) and teacher (B, C, H, W) -> scalar. S^C[b,h,w] is the cosine over the channels of a
    pixel, S^S[b,c] the cosine over the pixels of a channel, G = |(1 - S^C)(1 - S^S)| is large where the two disagree;
    the gradient flows through G as well.
    """
    teacher = teacher.detach()
    pixel = 1 - cosine(student, teacher, dim=1)                                   # (B, H, W)   1 - S^C
    channel = 1 - cosine(student, teacher, dim=(2, 3))                            # (B, C)      1 - S^S
    squared = (teacher - student).square()                                        # (B, C, H, W)
    # |ab| = |a||b|, so the sum over G (T - S)^2 is taken factor by factor and G is never built
    guided = torch.einsum("bhw,bchw,bc->", pixel.abs(), squared, channel.abs()) / squared.numel()
    return lambda_m * guided + lambda_s * (pixel.mean() + channel.mean())


@full_precision
def pekd(student, teacher, betas=(0.1, 0.1, 0.5, 1.0)):
    """Eq. 8: sum_l beta_l mean((P_s - P_t)^2) over the patch embeddings, lists of (B, C_l, H_l, W_l) each -> scalar.

    The paper writes a sum of squares; its code and [5] take the mean, and so do we.
    """
    return sum(beta * F.mse_loss(s, t.detach()) for beta, s, t in zip(betas, student, teacher, strict=True))


class Projections(nn.Module):
    """Trained maps from the student's widths to the teacher's: a 1x1 convolution a stage, a linear layer a patch embedding.

    Both with a bias and nothing behind them: a ReLU could never reach the negative half of the teacher's features.
    Its parameters must be in the optimizer (the published code forgot): train.py checks it.
    """

    def __init__(self, student_dims, teacher_dims):
        super().__init__()
        pairs = list(zip(student_dims, teacher_dims, strict=True))
        self.stages = nn.ModuleList(nn.Conv2d(s, t, 1) for s, t in pairs)
        self.patch_embeds = nn.ModuleList(nn.Linear(s, t) for s, t in pairs)

    def forward(self, stages, patch_embeds):                                      # lists of (B, C_s, H, W)
        stages = [project(x) for project, x in zip(self.stages, stages)]          # (B, C_t, H, W)
        patch_embeds = [project(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)        # (B, C_t, H, W)
                        for project, x in zip(self.patch_embeds, patch_embeds)]
        return stages, patch_embeds


# ---------------------------------------------------------------- loss refinement (eq. 10-14)

@full_precision
def dice_loss(logits, labels, eps=1.0):
    """Eq. 11: mean_c 1 - (2 sum_i p_ic g_ic + eps) / (sum_i p_ic + sum_i g_ic + eps), i over the batch's labelled pixels.

    logits (B, C, h, w), labels (B, H, W) -> scalar.
    """
    def sums(labels, logits):                                                     # (B, H, W), (B, C, H, W)
        classes, valid = logits.shape[1], labels != IGNORE
        g = F.one_hot(labels.where(valid, 0), classes).movedim(-1, 1) * valid[:, None]              # (B, C, H, W)
        p = logits.softmax(1) * valid[:, None]                                    # (B, C, H, W)
        return torch.stack([(p * g).sum((0, 2, 3)), p.sum((0, 2, 3)) + g.sum((0, 2, 3))])           # (2, C)

    overlap, total = sum_over_pixels(sums, labels.long(), logits)                 # (C,) each
    return (1 - (2 * overlap + eps) / (total + eps)).mean()


@full_precision
def focal_loss(logits, labels, alpha=None, gamma=2.0):
    """Eq. 13: mean over the labelled pixels of -alpha[y] (1 - p[y])^gamma log p[y]; alpha (C,), the class weights, or None.

    p is the plain softmax. Weighting the cross-entropy first and taking p = exp(-CE) from it would give p^alpha.
    logits (B, C, h, w), labels (B, H, W) -> scalar.
    """
    alpha = logits.new_ones(logits.shape[1]) if alpha is None else alpha.to(logits)

    def loss(labels, logits):                                                     # (B, H, W), (B, C, H, W)
        valid = labels != IGNORE
        target = labels.where(valid, 0)                                           # any class: masked out below
        log_p = F.log_softmax(logits, 1).gather(1, target[:, None]).squeeze(1)    # (B, H, W)
        miss = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)     # 1 - p, exact near p = 1; never 0 ** gamma
        return (-alpha[target] * miss ** gamma * log_p * valid).sum()

    return sum_over_pixels(loss, labels.long(), logits) / (labels != IGNORE).sum().clamp(min=1)


def dice_focal_loss(logits, labels, alpha=None, gamma=2.0, lambda_dice=0.5):
    """Eq. 14: lambda_dice Dice + (1 - lambda_dice) Focal. logits (B, C, h, w), labels (B, H, W) -> scalar."""
    return lambda_dice * dice_loss(logits, labels) + (1 - lambda_dice) * focal_loss(logits, labels, alpha, gamma)
