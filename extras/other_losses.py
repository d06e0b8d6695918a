"""What others use in place of the paper's losses, to compare with: each a pure function, as in
losses.py, and a term for train.py's table (--lambda-NAME).

    cosine_distillation      one cosine per pixel of the projected features
    global_cosine            one cosine per image of them: AttnFD [1] without its attention
    channel_distillation     CWD [2]: each class's map as a distribution over the pixels
    relation_distillation    DIST [3]: correlation in place of equality
    standardised_kl          KL on z-scored logits [4]
    square_root_weights      class weights 1 / sqrt(share)

Logits are (B, C, h, w), features (B, C, H, W); the teacher gets no gradient; 16 bits are raised to
float32. CWD and DIST take no labels: void pixels count.

References
  [1] Mansourian et al., Attention-guided Feature Distillation for Semantic Segmentation, 2024,
      arXiv:2403.05451
  [2] Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, 2021, arXiv:2011.13256
  [3] Huang et al., Knowledge Distillation from A Stronger Teacher, 2022, arXiv:2205.10536
  [4] Sun et al., Logit Standardization in Knowledge Distillation, 2024, arXiv:2403.01427
"""

import torch

from losses import (
    check_feature_map,
    check_same_classes,
    check_same_shape,
    cosine,
    full_precision,
    kl_distillation,
    resize,
)

# ---------------------------------------------------------------- of features

@full_precision
def cosine_distillation(student, teacher):
    """mean over the pixels of 1 - cos(student, teacher), the cosine over the channels.

    Two feature maps (B, C, H, W), the student's projected to the teacher's width -> scalar.
    ValueError: feature maps of two shapes, or not of four dimensions.
    """
    check_feature_map(student)
    check_same_shape(student, teacher)
    return (1 - cosine(student, teacher.detach(), dim=1)).mean()


@full_precision
def global_cosine(student, teacher):
    """mean over the images of 1 - cos(student, teacher), the cosine over all of a feature map.

    The squared distance of the two maps, each divided by its length, is twice this. Two feature
    maps (B, C, H, W), the student's projected to the teacher's width -> scalar.
    ValueError: feature maps of two shapes, or not of four dimensions.
    """
    check_feature_map(student)
    check_same_shape(student, teacher)
    return (1 - cosine(student.flatten(1), teacher.detach().flatten(1), dim=1)).mean()


# ---------------------------------------------------------------- of logits

@full_precision
def channel_distillation(student_logits, teacher_logits, temperature=4.0):
    """[2] eq. 4: T^2 / C sum_c KL(softmax_i(teacher_c / T) || softmax_i(student_c / T)).

    The softmax is over the pixels i of an image; the mean over the batch. Logits (B, C, h, w) each,
    the teacher's are resized to the student's size -> scalar.
    ValueError: other classes or another batch.
    """
    check_same_classes(student_logits, teacher_logits)
    teacher_logits = resize(teacher_logits.detach(), student_logits.shape[2:])
    log_student = torch.log_softmax(student_logits.flatten(2) / temperature, dim=2)     # (B, C, hw)
    log_teacher = torch.log_softmax(teacher_logits.flatten(2) / temperature, dim=2)     # (B, C, hw)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(2)               # (B, C)
    return temperature ** 2 * divergence.mean()


def correlation(a, b, dim, eps=1e-8):
    """Pearson's correlation of a and b over `dim`."""
    return cosine(a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True), dim, eps)


@full_precision
def relation_distillation(student_logits, teacher_logits):
    """[3] eq. 8 + eq. 9: of the class probabilities, 1 - the mean correlation over the classes of a
    pixel, plus 1 - the mean correlation over the pixels of a class (weights 1, temperature 1).

    The pixels of a class are those of the whole batch, so this is no mean over images. Logits
    (B, C, h, w) each, the teacher's are resized to the student's size -> scalar.
    ValueError: other classes or another batch.
    """
    check_same_classes(student_logits, teacher_logits)
    teacher_logits = resize(teacher_logits.detach(), student_logits.shape[2:])
    student = student_logits.softmax(1).transpose(0, 1).flatten(1)                      # (C, B h w)
    teacher = teacher_logits.softmax(1).transpose(0, 1).flatten(1)                      # (C, B h w)
    of_a_pixel = 1 - correlation(student, teacher, dim=0).mean()
    of_a_class = 1 - correlation(student, teacher, dim=1).mean()
    return of_a_pixel + of_a_class


def standardised_kl(student_logits, teacher_logits, temperature=2.0, labels=None):
    """[4]: `kl_distillation` of logits that have mean 0 and deviation 1 over the classes of each
    pixel, so that the student need not copy their size. -> scalar
    """
    return kl_distillation(
        standardise(student_logits), standardise(teacher_logits), temperature, labels)


@full_precision
def standardise(logits, eps=1e-7):
    """(B, C, h, w) -> the same, mean 0 and deviation 1 over C."""
    mean = logits.mean(1, keepdim=True)
    deviation = logits.std(1, keepdim=True, correction=0)
    return (logits - mean) / (deviation + eps)


# ---------------------------------------------------------------- class weights

def square_root_weights(pixel_counts):
    """w_k = 1 / sqrt(p_k) over its mean, with p_k the class's share of the labelled pixels.

    Counts (C,) -> float32 (C,). A class that never occurs gets the largest weight.
    """
    counts = torch.as_tensor(pixel_counts, dtype=torch.float64)
    shares = counts / counts.sum().clamp(min=1)
    is_met = shares > 0
    weights = shares.clamp(min=torch.finfo(shares.dtype).tiny).rsqrt()
    if not is_met.any():
        return torch.ones_like(weights).float()
    weights = weights.where(is_met, weights[is_met].max())
    return (weights / weights.mean()).float()


# ---------------------------------------------------------------- train.py's terms

def sum_over_stages(loss, outputs):
    total = 0
    for student, teacher in zip(outputs.stages, outputs.teacher.stages, strict=True):
        total = total + loss(student, teacher)
    return total


def cosine_term(outputs):
    return sum_over_stages(cosine_distillation, outputs)


def global_cosine_term(outputs):
    return sum_over_stages(global_cosine, outputs)


def channel_term(outputs):
    temperature = outputs.args.cwd_temperature
    return channel_distillation(outputs.student.logits, outputs.teacher.logits, temperature)


def relation_term(outputs):
    return relation_distillation(outputs.student.logits, outputs.teacher.logits)


def standardised_kl_term(outputs):
    student, teacher = outputs.student.logits, outputs.teacher.logits
    return standardised_kl(student, teacher, outputs.args.zkl_temperature, outputs.kl_labels)
