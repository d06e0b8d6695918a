"""The losses of EffiSeg, each a small pure function that reads as its equation.

    eq. 3       weighted_cross_entropy    class weights w_c = 1 / ln(1.10 + p_c): class_weights
    eq. 4       kl_distillation           the teacher's class distribution at every pixel
    eq. 5-7     cskd                      cosine-guided distillation of one stage's features
    eq. 8       pekd                      distillation of the patch embeddings
    eq. 9       total = WCE + lambda_KL KL + lambda_FD sum_stages CSKD + lambda_PE PEKD  (train.py)
    eq. 10-11   dice_loss
    eq. 12-13   focal_loss
    eq. 14      dice_focal_loss

Every loss is a mean: the same batch twice over gives the same number (Dice almost: it is a ratio of
sums over the batch, and its eps weighs less in a larger one). A loss that is given labels leaves
void pixels (IGNORE) out, and is 0 for a batch of nothing but void. CSKD and PEKD are given none:
they compare features everywhere, under void pixels too. Half precision is raised to float32 inside,
whatever autocast says outside; float64 stays. Label losses take logits of any resolution and resize
them to the labels' first. What does not fit together is a ValueError.

`python -m pytest test_losses.py` holds each against plain loops, and shows what the usual mistakes
compute instead. Skip the next section, a decorator for 16 bits, at first: the equations
follow it, and what makes them small in memory stands at the end.

References
  [1] Kim et al., EffiSeg, 2025                                 the equation numbers above
  [2] Paszke et al., ENet, 2016, arXiv:1606.02147               section 5.2: the class weights
  [3] Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531
                                                                the temperature
  [4] Park et al., CSKD: Cosine Similarity-Guided Knowledge Distillation for Robust Object
      Detectors, 2024
  [5] Liu et al., TransKD, 2022, arXiv:2202.13393               patch embedding distillation
  [6] Lin et al., Focal Loss, 2017, arXiv:1708.02002
  [7] Milletari et al., V-Net, 2016, arXiv:1606.04797           Dice (with p^2 and g^2 in the
                                                                denominator, unlike eq. 10-11)
"""

import functools
import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORE = 255                                                      # the label of void pixels


# ---------------------------------------------------------------- the precision of all of them

def to_float32(value):
    """float16 and bfloat16 tensors -> float32, also inside lists; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [to_float32(item) for item in value]
    is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


def device_type(value):
    """"cpu", "cuda", ...: where a tensor, or the first of a list of tensors, lives."""
    if isinstance(value, (list, tuple)) and value:
        return device_type(value[0])
    return value.device.type if isinstance(value, torch.Tensor) else "cpu"


def full_precision(loss):
    """Decorator: run `loss` in float32 at least.

    Squares and sums over an image overflow or round away in 16 bits.
    """
    first_name = next(iter(inspect.signature(loss).parameters))

    @functools.wraps(loss)
    def run(*args, **kwargs):
        first = args[0] if args else kwargs.get(first_name)
        args = to_float32(args)
        kwargs = {name: to_float32(value) for name, value in kwargs.items()}
        with torch.autocast(device_type(first), enabled=False):
            return loss(*args, **kwargs)

    return run


# ---------------------------------------------------------------- supervision (eq. 3)

def class_weights(pixel_counts, c=1.10):
    """w_k = 1 / ln(c + p_k) with p_k the class's share of the labelled pixels: ENet's form ([2],
    where c = 1.02).

    Counts (C,) -> float32 (C,). c = 1.10 is what gave the weights of the paper's Table 1. A class
    that never occurs gets the largest weight, 1 / ln(c).
    """
    counts = torch.as_tensor(pixel_counts, dtype=torch.float64)
    shares = counts / counts.sum().clamp(min=1)                   # no labelled pixel: 0, not NaN
    return (1 / torch.log(c + shares)).float()


def resize(logits, size):
    """Logits (B, C, h, w) at `size` (H, W), bilinear -> (B, C, H, W)."""
    size = tuple(size)
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


@full_precision
def weighted_cross_entropy(logits, labels, weight=None):
    """Eq. 3: -sum_i w[y_i] log p_i[y_i] / sum_i w[y_i] over the labelled pixels i.

    logits (B, C, h, w), labels int (B, H, W), weight (C,) or None for ones -> scalar.
    ValueError: see check_labels and weight_of_classes.
    """
    check_labels(logits, labels)
    weight = weight_of_classes(weight, logits)                    # (C,)
    valid = labels != IGNORE                                      # (B, H, W)
    labels = labels.long()

    # Every label loss below has this form: an inner function, whose logits already are at the
    # labels' size, returns sums over pixels. sum_over_pixels(f, labels, logits) is
    # f(labels, resize(logits, (H, W))), computed in less memory: see the end of the file.
    def weighted_sum(labels, logits):                             # (B, H, W), (B, C, H, W)
        return F.cross_entropy(logits, labels, weight, ignore_index=IGNORE, reduction="sum")

    loss = sum_over_pixels(weighted_sum, labels, logits)
    total_weight = (weight[labels.where(valid, 0)] * valid).sum()
    # All void: 0 / tiny is 0, not NaN.
    return loss / total_weight.clamp(min=torch.finfo(logits.dtype).tiny)


# ---------------------------------------------------------------- distillation (eq. 4-8)

@full_precision
def kl_distillation(student_logits, teacher_logits, temperature=1.0, labels=None):
    """Eq. 4: T^2 mean_i KL(softmax(teacher_i / T) || softmax(student_i / T)), with T of [3].

    Logits (B, C, h, w) each, of any two resolutions; the mean is over the pixels of the student's.
    With labels (B, H, W) it is taken at their size and without the void pixels. The paper writes a
    sum over the pixels and no temperature. T^2 keeps the size of the gradient when T changes.
    -> scalar
    ValueError: other classes or another batch; for the labels see check_labels.
    """
    check_same_classes(student_logits, teacher_logits)
    if labels is None:                                            # no void
        B, _, H, W = student_logits.shape
        labels = student_logits.new_zeros((B, H, W), dtype=torch.uint8)
    else:
        check_labels(student_logits, labels)

    def divergence(labels, student, teacher):                     # (B, H, W), twice (B, C, H, W)
        log_student = F.log_softmax(student / temperature, dim=1)
        log_teacher = F.log_softmax(teacher / temperature, dim=1)
        pixel = (log_teacher.exp() * (log_teacher - log_student)).sum(1)      # (B, H, W)
        return (pixel * (labels != IGNORE)).sum()

    total = sum_over_pixels(divergence, labels, student_logits, teacher_logits.detach())
    # All void: 0 / 1 is 0, not NaN.
    return temperature ** 2 * total / (labels != IGNORE).sum().clamp(min=1)


def cosine(a, b, dim, eps=1e-8):
    """Eq. 5: cosine of a and b, of one shape, over `dim`.

    Of (B, C, H, W) dim 1 gives the cosine of each pixel, (B, H, W), and dim (2, 3) that of each
    channel, (B, C).

    A zero vector has no direction. Its cosine is 0, without a gradient, where the plain formula
    would give NaN, and one with eps added to the length a gradient of 1 / eps.
    """
    squared_lengths = a.square().sum(dim) * b.square().sum(dim)   # |a|^2 |b|^2
    has_direction = squared_lengths > eps ** 2
    lengths = squared_lengths.clamp(min=eps ** 2).sqrt()          # |a| |b|
    return (a * b).sum(dim) * has_direction / lengths


@full_precision
def cskd(student, teacher, lambda_m=1.0, lambda_s=0.5):
    """Eq. 5-7, one stage: lambda_m mean(G (T - S)^2) + lambda_s (mean(1 - S^C) + mean(1 - S^S)).

    student (after its projection) and teacher (B, C, H, W) -> scalar. S^C[b,h,w] is the cosine over
    the channels of a pixel, S^S[b,c] the cosine over the pixels of a channel,
    G = |(1 - S^C)(1 - S^S)| is large where the two disagree; the gradient flows through G as well.
    ValueError: feature maps of two shapes, or not of four dimensions.
    """
    check_feature_map(student)
    check_same_shape(student, teacher)
    teacher = teacher.detach()
    pixel_distance = 1 - cosine(student, teacher, dim=1)          # (B, H, W)       1 - S^C
    channel_distance = 1 - cosine(student, teacher, dim=(2, 3))   # (B, C)          1 - S^S
    squared = (teacher - student).square()                        # (B, C, H, W)
    # G (B, C, H, W) is never built: |ab| = |a||b|, so its two factors are applied one by one.
    of_channels = torch.einsum("bhw,bchw->bc", pixel_distance.abs(), squared)               # (B, C)
    guided = (channel_distance.abs() * of_channels).sum() / squared.numel()
    return lambda_m * guided + lambda_s * (pixel_distance.mean() + channel_distance.mean())


@full_precision
def pekd(student, teacher, betas=(0.1, 0.1, 0.5, 1.0)):
    """Eq. 8: sum_l beta_l mean((P_s - P_t)^2) over the patch embeddings P of the stages l.

    student (after its projection) and teacher: lists of (B, C_l, H_l, W_l), one for each stage ->
    scalar. The betas are the paper's for its four stages; any other number of stages needs its own.
    The paper writes a sum of squares; its code and [5] take the mean, and so do we.
    ValueError: lists of different lengths, or embeddings of two shapes.
    """
    check_stages(student, teacher, betas)
    total = 0
    for beta, P_s, P_t in zip(betas, student, teacher, strict=True):
        check_same_shape(P_s, P_t)
        total = total + beta * F.mse_loss(P_s, P_t.detach())
    return total


class Projections(nn.Module):
    """Trained maps from the student's widths to the teacher's, for any number of stages.

    For each stage a 1x1 convolution of its features and a linear layer of its patch embedding. Both
    with a bias and nothing behind them: a ReLU could never reach the negative half of the teacher's
    features. The parameters must be in the optimizer (the published code forgot): train.py checks.

    student_dims, teacher_dims: the widths, one for each stage. ValueError if not equally many.
    """

    def __init__(self, student_dims, teacher_dims):
        super().__init__()
        if len(student_dims) != len(teacher_dims):
            raise ValueError(f"student_dims {tuple(student_dims)}, teacher_dims "
                             f"{tuple(teacher_dims)}: Projections needs one of each for a stage")
        self.student_dims = list(student_dims)
        pairs = list(zip(student_dims, teacher_dims, strict=True))
        self.stages = nn.ModuleList(nn.Conv2d(s, t, 1) for s, t in pairs)
        self.patch_embeds = nn.ModuleList(nn.Linear(s, t) for s, t in pairs)

    def forward(self, stages, patch_embeds):                      # lists of (B, C_s, H, W)
        """-> both lists at the teacher's widths. A list that no loss reads may be empty.

        ValueError if another number of stages comes in, or other widths.
        """
        self.check_widths(stages)
        self.check_widths(patch_embeds)
        stages = [project(x) for project, x in zip(self.stages, stages, strict=False)]
        patch_embeds = [project(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                        for project, x in zip(self.patch_embeds, patch_embeds, strict=False)]
        return stages, patch_embeds                               # lists of (B, C_t, H, W)

    def check_widths(self, maps):
        widths = [x.shape[1] for x in maps]
        if widths and widths != self.student_dims:
            raise ValueError(f"feature maps (B, C, H, W) with C = {widths}: these Projections were "
                             f"made for a student with {self.student_dims}")


# ---------------------------------------------------------------- loss refinement (eq. 10-14)

@full_precision
def dice_loss(logits, labels, eps=1.0):
    """Eq. 11: mean_c 1 - (2 sum_i p_ic g_ic + eps) / (sum_i p_ic + sum_i g_ic + eps).

    i runs over the batch's labelled pixels, p are the softmax's probabilities, g is one-hot.
    logits (B, C, h, w), labels (B, H, W) -> scalar. ValueError: see check_labels.
    """
    check_labels(logits, labels)

    def sums(labels, logits):                                     # (B, H, W), (B, C, H, W)
        valid = labels != IGNORE                                  # (B, H, W)
        target = labels.where(valid, 0)                           # any class: masked out below
        one_hot = F.one_hot(target, logits.shape[1])              # (B, H, W, C)
        g = one_hot.movedim(-1, 1) * valid[:, None]               # (B, C, H, W)
        p = logits.softmax(1) * valid[:, None]                    # (B, C, H, W)
        overlap = (p * g).sum((0, 2, 3))                          # (C,)
        total = p.sum((0, 2, 3)) + g.sum((0, 2, 3))               # (C,)
        return torch.stack([overlap, total])

    overlap, total = sum_over_pixels(sums, labels.long(), logits)             # (C,) each
    return (1 - (2 * overlap + eps) / (total + eps)).mean()


@full_precision
def focal_loss(logits, labels, alpha=None, gamma=2.0):
    """Eq. 13: mean over the labelled pixels of -alpha[y] (1 - p[y])^gamma log p[y].

    p is the plain softmax. Weighting the cross-entropy first and taking p = exp(-CE) from it would
    give p^alpha. logits (B, C, h, w), labels (B, H, W), alpha (C,): the class weights, or None for
    ones -> scalar. ValueError: see check_labels and weight_of_classes.
    """
    check_labels(logits, labels)
    alpha = weight_of_classes(alpha, logits)                      # (C,)

    def loss(labels, logits):                                     # (B, H, W), (B, C, H, W)
        valid = labels != IGNORE
        target = labels.where(valid, 0)                           # any class: masked out below
        log_p = F.log_softmax(logits, 1).gather(1, target[:, None]).squeeze(1)    # (B, H, W)
        # 1 - p, exact near p = 1, and never 0 ** gamma
        miss = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)     # (B, H, W)
        return (-alpha[target] * miss ** gamma * log_p * valid).sum()

    total = sum_over_pixels(loss, labels.long(), logits)
    # All void: 0 / 1 is 0, not NaN.
    return total / (labels != IGNORE).sum().clamp(min=1)


def dice_focal_loss(logits, labels, alpha=None, gamma=2.0, lambda_dice=0.5):
    """Eq. 14: lambda_dice Dice + (1 - lambda_dice) Focal.

    logits (B, C, h, w), labels (B, H, W), alpha (C,) or None -> scalar. ValueError: see focal_loss.
    """
    dice = dice_loss(logits, labels)
    focal = focal_loss(logits, labels, alpha, gamma)
    return lambda_dice * dice + (1 - lambda_dice) * focal


# ---------------------------------------------------------------- what makes them small in memory
#
# The network's logits are small, a quarter of the labels' height and width. What fills a memory are
# the maps (B, C, H, W) made of them: the resized logits, their softmax, the gradients of both. A
# sum over pixels need not have all of them at once. So the label losses are computed in bands of
# rows, and of a band `checkpoint` keeps only the small logits: the backward pass computes the rest
# again.

BAND = 2 ** 22          # numbers of a (B, C, H, W) map that exist at a time: 16 MiB in float32


def sum_over_pixels(expression, labels, *logits):
    """expression(labels, *logits), which returns sums over pixels, with the logits resized first.

    labels (B, H, W), each of logits (B, C, h, w) -> what expression returns. In bands of rows where
    that saves memory, else at once.
    """
    H, W = labels.shape[1:]
    rows = rows_of_a_band(labels, logits)
    if rows is None:
        return expression(labels, *[resize(x, (H, W)) for x in logits])

    h = logits[0].shape[2]
    total = 0
    for band in band_slices(h, H // h, rows):
        parts = [x[:, :, band.logits] for x in logits]
        total = total + checkpoint(
            sum_over_band, expression, band, labels[:, band.labels], *parts,
            use_reentrant=False, preserve_rng_state=False)
    return total


def rows_of_a_band(labels, logits):
    """How many rows of the logits make BAND numbers at the labels' size. None: no bands.

    No bands where all of it is small, where the rows of logits and labels do not match, and under
    torch.compile, which fuses most of the maps away.
    """
    if torch.compiler.is_compiling():
        return None
    B, H, W = labels.shape
    C, h = logits[0].shape[1:3]
    rows_match = H % h == 0 and all(x.shape[2] == h for x in logits)
    if not rows_match:
        return None
    numbers_of_a_row = B * C * (H // h) * W                       # one row of logits, resized
    rows = max(1, BAND // numbers_of_a_row)
    is_small = rows >= h
    return None if is_small else rows


class Band(NamedTuple):
    """A band of rows, as slices. Its logits have a halo, a row more on each side:

        rows of the logits          the same, resized (here to twice the size)

        top - 1     - - - -  halo       - - - -  - - - -   dropped
        top         =======             =======  =======   \\
        top + 1     =======             =======  =======    inside = the band's labels
        top + 2     =======             =======  =======   /
        bottom      - - - -  halo       - - - -  - - - -   dropped

    Bilinear interpolation mixes a row at the band's edge from the rows of logits on both sides of
    the edge, and never from further away than one. At the image's own edges there is no halo.
    """
    labels: slice       # the band's rows of the labels
    logits: slice       # the rows of the logits that it is made from, with the halo
    inside: slice       # the band's rows in these logits, once resized
    scale: int          # rows of labels in a row of logits


def band_slices(height, scale, rows):
    """-> Bands of `rows` rows of logits, where logits have `height` rows, labels height * scale."""
    bands = []
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        halo_top = max(top - 1, 0)
        halo_bottom = min(bottom + 1, height)
        bands.append(Band(
            labels=slice(top * scale, bottom * scale),
            logits=slice(halo_top, halo_bottom),
            inside=slice((top - halo_top) * scale, (bottom - halo_top) * scale),
            scale=scale))
    return bands


def sum_over_band(expression, band, labels, *logits):
    """The expression of one band: its labels (B, rows, W), its logits with the halo."""
    W = labels.shape[2]
    inside = []
    for x in logits:                                              # (B, C, rows with halo, w)
        large = resize(x, (x.shape[2] * band.scale, W))
        inside.append(large[:, :, band.inside])                   # (B, C, rows of the labels, W)
    return expression(labels, *inside)


# ---------------------------------------------------------------- what they refuse, in one sentence

def shapes(*tensors):
    """"(2, 19, 64, 128) and (2, 256, 512)" of two tensors."""
    return " and ".join(str(tuple(x.shape)) for x in tensors)


def check_labels(logits, labels):
    """ValueError unless logits are (B, C, h, w) and labels (B, H, W) of 0..C-1 or IGNORE.

    The values are looked at on a CPU only: on a GPU the program would have to wait for them, and
    inside torch.compile there are none yet. There a label out of range fails inside of a kernel.
    """
    if logits.ndim != 4 or labels.ndim != 3 or len(logits) != len(labels):
        raise ValueError(f"logits and labels {shapes(logits, labels)}: expected (B, C, h, w) and "
                         "(B, H, W) with one B")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    labels = labels.long()
    lowest, highest = labels.where(labels != IGNORE, 0).aminmax()
    classes = logits.shape[1]
    if lowest < 0 or highest >= classes:
        raise ValueError(f"labels from {lowest} to {highest}: expected 0 to {classes - 1} for "
                         f"{classes} classes, or {IGNORE} for void")


def weight_of_classes(weight, logits):
    """weight (C,), moved to the logits' device and type; ones for None. ValueError if not (C,)."""
    classes = logits.shape[1]
    if weight is None:
        return logits.new_ones(classes)
    if weight.shape != (classes,):
        raise ValueError(f"class weights {shapes(weight)}: expected ({classes},) for logits "
                         f"{shapes(logits)}")
    return weight.to(logits)


def check_same_classes(student, teacher):
    """ValueError unless both are logits (B, C, h, w) of one batch and the same classes."""
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"logits of student and teacher {shapes(student, teacher)}: expected "
                         "(B, C, h, w) with one B and the same classes C")


def check_feature_map(features):
    if features.ndim != 4:
        raise ValueError(f"features {shapes(features)}: expected (B, C, H, W)")


def check_same_shape(student, teacher):
    """ValueError unless the student's features have the teacher's shape."""
    if student.shape != teacher.shape:
        raise ValueError(f"features of student and teacher {shapes(student, teacher)}: expected "
                         "one shape, so project the student's to the teacher's width (Projections)")


def check_stages(student, teacher, betas):
    """ValueError unless these are lists, with equally many of each."""
    for maps in (student, teacher):
        if isinstance(maps, torch.Tensor):
            raise ValueError(f"one tensor {tuple(maps.shape)}: pekd compares two lists, with a "
                             f"patch embedding (B, C, H, W) for every stage")
    if not len(student) == len(teacher) == len(betas):
        raise ValueError(f"{len(student)} stages of the student, {len(teacher)} of the teacher and "
                         f"{len(betas)} betas: pekd needs one of each for every stage")
