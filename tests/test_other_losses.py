"""extras/other_losses.py against plain loops, and the terms in a run."""

import math

import pytest
import torch

from extras import other_losses
from extras.other_losses import (
    channel_distillation,
    cosine_distillation,
    global_cosine,
    relation_distillation,
    square_root_weights,
    standardise,
    standardised_kl,
)

B, C, H, W = 2, 3, 4, 5


def maps(seed):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(B, C, H, W, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(B, C, H, W, generator=generator, dtype=torch.float64, requires_grad=True)
    return student, teacher


def cosine_of(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    length_a = math.sqrt(sum(x * x for x in a))
    length_b = math.sqrt(sum(y * y for y in b))
    return dot / (length_a * length_b)


def correlation_of(a, b):
    mean_a = sum(a) / len(a)
    mean_b = sum(b) / len(b)
    return cosine_of([x - mean_a for x in a], [y - mean_b for y in b])


def softmax_of(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def divergence_of(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))


def pixels():
    for b in range(B):
        for h in range(H):
            for w in range(W):
                yield b, h, w


def test_cosine_of_every_pixel():
    student, teacher = maps(0)
    total = 0
    for b, h, w in pixels():
        total += 1 - cosine_of(student[b, :, h, w].tolist(), teacher[b, :, h, w].tolist())
    assert cosine_distillation(student, teacher).item() == pytest.approx(total / (B * H * W))


def test_one_cosine_of_an_image():
    student, teacher = maps(1)
    total = 0
    for b in range(B):
        total += 1 - cosine_of(student[b].flatten().tolist(), teacher[b].flatten().tolist())
    assert global_cosine(student, teacher).item() == pytest.approx(total / B)


def test_cwd_of_every_class_map():
    student, teacher = maps(2)
    T = 4
    total = 0
    for b in range(B):
        for c in range(C):
            p = softmax_of((teacher[b, c] / T).flatten().tolist())
            q = softmax_of((student[b, c] / T).flatten().tolist())
            total += T ** 2 * divergence_of(p, q)
    assert channel_distillation(student, teacher, T).item() == pytest.approx(total / (B * C))


def test_dist_of_every_pixel_and_class():
    student, teacher = maps(3)
    p, q = [], []                                                 # probabilities of each pixel
    for b, h, w in pixels():
        p.append(softmax_of(student[b, :, h, w].tolist()))
        q.append(softmax_of(teacher[b, :, h, w].tolist()))
    of_pixels = sum(correlation_of(x, y) for x, y in zip(p, q, strict=True)) / len(p)
    of_classes = 0
    for c in range(C):
        of_classes += correlation_of([x[c] for x in p], [y[c] for y in q]) / C
    expected = 1 - of_pixels + 1 - of_classes
    assert relation_distillation(student, teacher).item() == pytest.approx(expected)


def test_kl_of_standardised_logits():
    student, teacher = maps(4)
    T = 2
    labels = torch.zeros(B, H, W, dtype=torch.long)
    labels[0, 0, 0] = 255                                         # void: left out
    total = 0
    for b, h, w in list(pixels())[1:]:
        both = []
        for logits in (teacher, student):
            x = logits[b, :, h, w].tolist()
            mean = sum(x) / C
            deviation = math.sqrt(sum((value - mean) ** 2 for value in x) / C)
            both.append(softmax_of([(value - mean) / deviation / T for value in x]))
        total += T ** 2 * divergence_of(*both)
    expected = total / (B * H * W - 1)
    assert standardised_kl(student, teacher, T, labels).item() == pytest.approx(expected, rel=1e-5)
    # the size of the logits says nothing
    assert torch.allclose(standardise(3 * student + 7), standardise(student), atol=1e-5)


ALL = (cosine_distillation, global_cosine, channel_distillation, relation_distillation,
       standardised_kl)


@pytest.mark.parametrize("loss", ALL)
def test_a_perfect_student_has_no_loss_and_the_teacher_no_gradient(loss):
    student, teacher = maps(5)
    assert loss(teacher.detach(), teacher).item() == pytest.approx(0, abs=1e-12)
    loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("loss", ALL)
def test_what_does_not_fit_is_a_sentence(loss):
    student, _ = maps(6)
    with pytest.raises(ValueError, match="student and teacher"):
        loss(student, student[:, :2])


def test_square_root_weights():
    weights = square_root_weights([900, 100, 0])
    assert weights[1] / weights[0] == pytest.approx(3)
    assert weights[2] == weights[1] and weights.mean().item() == pytest.approx(1)
    assert square_root_weights([0, 0]).tolist() == [1, 1]


def test_every_loss_has_its_flag():
    import train

    functions = {term.compute for term in train.DISTILLATION}
    terms = [value for name, value in vars(other_losses).items() if name.endswith("_term")]
    assert len(terms) == 5 and functions.issuperset(terms)
