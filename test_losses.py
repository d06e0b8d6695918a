"""The losses against their equations, in plain loops; then the mistakes that published code makes.

    python -m pytest test_losses.py

Read it beside the paper: each `loop_*` below is the equation and nothing else, slow and plain, over
Python floats. A test then asks two things of the real loss: the same value, and the same gradient
as finite differences of that value (gradcheck). Then comes what must hold of all losses, and what
they refuse. The last section computes what well-known wrong versions compute, and shows by an
example why they are wrong.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import losses
from losses import (
    IGNORE,
    Projections,
    class_weights,
    cskd,
    dice_focal_loss,
    dice_loss,
    focal_loss,
    kl_distillation,
    pekd,
    weighted_cross_entropy,
)

B, C, H, W = 2, 4, 3, 5


@pytest.fixture
def batch():
    """Float64 logits (B, C, H, W), labels (B, H, W) with a void border, class weights (C,)."""
    torch.manual_seed(0)
    labels = torch.randint(0, C, (B, H, W))
    labels[:, 0] = IGNORE
    logits = torch.randn(B, C, H, W, dtype=torch.float64)
    return logits, labels, torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)


@pytest.fixture
def maps():
    """A student's and a teacher's feature map, float64 (B, C, H, W)."""
    torch.manual_seed(1)
    student = torch.randn(B, C, H, W, dtype=torch.float64)
    teacher = torch.randn(B, C, H, W, dtype=torch.float64)
    return student, teacher


def pixels(labels):
    """Indices (b, h, w) of the labelled pixels."""
    return [tuple(index) for index in (labels != IGNORE).nonzero().tolist()]


def softmax(logits, b, h, w, temperature=1.0):
    """Class probabilities of one pixel, a list of floats."""
    powers = [math.exp(logits[b, c, h, w].item() / temperature) for c in range(logits.shape[1])]
    return [power / sum(powers) for power in powers]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- the equations

def loop_weighted_cross_entropy(logits, labels, weight):
    loss = total = 0.0
    for b, h, w in pixels(labels):
        y = labels[b, h, w].item()
        loss -= weight[y].item() * math.log(softmax(logits, b, h, w)[y])      # eq. 3
        total += weight[y].item()
    return loss / total


def loop_kl(student, teacher, temperature, places):
    total = 0.0
    for b, h, w in places:
        p_s = softmax(student, b, h, w, temperature)
        p_t = softmax(teacher, b, h, w, temperature)
        total += sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))      # eq. 4
    return temperature ** 2 * total / len(places)


def loop_cosine(a, b):
    return dot(a, b) / (math.sqrt(dot(a, a)) * math.sqrt(dot(b, b)))          # eq. 5


def loop_cskd(student, teacher, lambda_m=1.0, lambda_s=0.5):
    B, C, H, W = student.shape
    loss = 0.0
    for b in range(B):
        S = student[b].tolist()
        T = teacher[b].tolist()
        S_C = {}                                                  # one number for each pixel
        for h in range(H):
            for w in range(W):
                S_pixel = [S[c][h][w] for c in range(C)]
                T_pixel = [T[c][h][w] for c in range(C)]
                S_C[h, w] = loop_cosine(S_pixel, T_pixel)
        S_S = []                                                  # one number for each channel
        for c in range(C):
            S_channel = [S[c][h][w] for h in range(H) for w in range(W)]
            T_channel = [T[c][h][w] for h in range(H) for w in range(W)]
            S_S.append(loop_cosine(S_channel, T_channel))

        for c in range(C):
            for h, w in S_C:
                G = abs((1 - S_C[h, w]) * (1 - S_S[c]))           # eq. 6
                loss += lambda_m / (C * H * W) * G * (T[c][h][w] - S[c][h][w]) ** 2
        loss += lambda_s / (H * W) * sum(1 - cosine for cosine in S_C.values())       # eq. 7
        loss += lambda_s / C * sum(1 - cosine for cosine in S_S)
    return loss / B


def loop_pekd(student, teacher, betas):
    loss = 0.0
    for s, t, beta in zip(student, teacher, betas, strict=True):
        pairs = zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)
        squares = [(x - y) ** 2 for x, y in pairs]
        loss += beta * sum(squares) / len(squares)                # eq. 8, as a mean
    return loss


def loop_dice(logits, labels, eps=1.0):
    loss = 0.0
    for c in range(logits.shape[1]):
        overlap = total = 0.0
        for b, h, w in pixels(labels):
            p = softmax(logits, b, h, w)[c]
            g = float(labels[b, h, w] == c)
            overlap += p * g
            total += p + g
        loss += 1 - (2 * overlap + eps) / (total + eps)           # eq. 11
    return loss / logits.shape[1]


def loop_focal(logits, labels, alpha, gamma=2.0):
    loss = 0.0
    for b, h, w in pixels(labels):
        y = labels[b, h, w].item()
        p = softmax(logits, b, h, w)[y]
        loss -= alpha[y].item() * (1 - p) ** gamma * math.log(p)              # eq. 13
    return loss / len(pixels(labels))


# ---------------------------------------------------------------- values and gradients

def check(loss, expected, *inputs):
    """loss(*inputs) equals `expected`, and its gradient equals finite differences."""
    assert loss(*inputs).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert gradcheck(loss, [x.clone().requires_grad_() for x in inputs])


def test_weighted_cross_entropy(batch):
    logits, labels, weight = batch
    expected = loop_weighted_cross_entropy(logits, labels, weight)
    check(lambda x: weighted_cross_entropy(x, labels, weight), expected, logits)
    expected = loop_weighted_cross_entropy(logits, labels, torch.ones(C))
    check(lambda x: weighted_cross_entropy(x, labels), expected, logits)


def test_class_weights_are_those_of_the_papers_table_1():
    """Shares of road, sidewalk, building, vegetation, sky, car on Cityscapes; the rest in one."""
    shares = torch.tensor([36.99, 5.99, 22.69, 16.12, 3.92, 6.93, 7.36])
    printed = torch.tensor([2.5959737, 6.741505, 3.5353868, 4.3098087, 7.674411, 6.3928986])
    assert torch.allclose(class_weights(shares)[:6], printed, rtol=2e-3)
    assert class_weights([0, 10])[0].item() == pytest.approx(1 / math.log(1.10))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl(batch, maps, temperature):
    student, teacher = maps
    _, labels, _ = batch
    everywhere = [(b, h, w) for b in range(B) for h in range(H) for w in range(W)]
    expected = loop_kl(student, teacher, temperature, everywhere)
    check(lambda x: kl_distillation(x, teacher, temperature), expected, student)
    expected = loop_kl(student, teacher, temperature, pixels(labels))
    check(lambda x: kl_distillation(x, teacher, temperature, labels), expected, student)


@pytest.mark.parametrize("lambdas", [(1.0, 0.5), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_cskd(maps, lambdas):
    student, teacher = maps
    expected = loop_cskd(student, teacher, *lambdas)
    check(lambda x: cskd(x, teacher, *lambdas), expected, student)


def test_pekd():
    torch.manual_seed(2)
    shapes = [(B, C * 2 ** i, 5 - i, 4) for i in range(4)]
    student = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    teacher = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    betas = (0.1, 0.1, 0.5, 1.0)
    check(lambda *x: pekd(list(x), teacher), loop_pekd(student, teacher, betas), *student)
    with pytest.raises(ValueError):
        pekd(student[:3], teacher)


def test_dice(batch):
    logits, labels, _ = batch
    check(lambda x: dice_loss(x, labels), loop_dice(logits, labels), logits)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal(batch, gamma):
    logits, labels, alpha = batch
    expected = loop_focal(logits, labels, alpha, gamma)
    check(lambda x: focal_loss(x, labels, alpha, gamma), expected, logits)
    expected = loop_focal(logits, labels, torch.ones(C), gamma)
    check(lambda x: focal_loss(x, labels, None, gamma), expected, logits)


def test_dice_focal(batch):
    logits, labels, alpha = batch
    expected = 0.3 * loop_dice(logits, labels) + 0.7 * loop_focal(logits, labels, alpha)
    check(lambda x: dice_focal_loss(x, labels, alpha, lambda_dice=0.3), expected, logits)


def kl_to_other_classes(logits, labels):
    """KL as a label loss: the teacher is the student with its classes in reverse."""
    return kl_distillation(logits, logits.detach().flip(1), 2.0, labels)


def pekd_of_four(student, teacher):
    """PEKD with the same patch embeddings at every stage."""
    return pekd([student] * 4, [teacher] * 4)


LABEL_LOSSES = [
    weighted_cross_entropy,
    dice_loss,
    focal_loss,
    dice_focal_loss,
    kl_to_other_classes,
]


@pytest.mark.parametrize("loss", LABEL_LOSSES)
def test_quarter_size_logits_are_resized_bilinearly_first(batch, loss):
    logits, labels, _ = batch
    large = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)        # (B, 4H, 4W)
    resized = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    assert loss(logits, large).item() == pytest.approx(loss(resized, large).item())


@pytest.mark.parametrize("loss", LABEL_LOSSES)
@pytest.mark.parametrize("size", [(28, 20), (28, 19), (7, 5)])
def test_bands_of_rows_add_up_to_the_whole(loss, size, monkeypatch):
    """Value and gradient, for bands of one row, of three, and of all.

    With logits at a quarter of the labels, and as large.
    """
    torch.manual_seed(0)
    logits = torch.randn(B, C, 7, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, C, (B, *size))
    labels[:, :2] = IGNORE
    results = []
    for rows in (1, 3, 7):
        # the BAND that makes rows_of_a_band() give `rows` of the 7 rows of logits
        monkeypatch.setattr(losses, "BAND", rows * B * C * size[0] * size[1] // 7)
        value = loss(logits, labels)
        results.append((value, *torch.autograd.grad(value, logits)))
    for value, gradient in results[:2]:
        torch.testing.assert_close(value, results[2][0])
        torch.testing.assert_close(gradient, results[2][1])


def test_bands_take_a_row_more_on_each_side_but_at_the_edges():
    """Seven rows of logits at a quarter of the labels, in bands of three."""
    bands = losses.band_slices(height=7, scale=4, rows=3)
    assert [band.labels for band in bands] == [slice(0, 12), slice(12, 24), slice(24, 28)]
    assert [band.logits for band in bands] == [slice(0, 4), slice(2, 7), slice(5, 7)]
    assert [band.inside for band in bands] == [slice(0, 12), slice(4, 16), slice(4, 8)]


def test_kl_of_a_teacher_with_logits_of_another_size(monkeypatch):
    torch.manual_seed(0)
    student = torch.randn(B, C, 4, 4)
    teacher = torch.randn(B, C, 8, 8)
    labels = torch.randint(0, C, (B, 16, 16))
    whole = kl_distillation(student, teacher, 2.0, labels)
    monkeypatch.setattr(losses, "BAND", 1)
    torch.testing.assert_close(kl_distillation(student, teacher, 2.0, labels), whole)
    large = [F.interpolate(x, size=(16, 16), mode="bilinear") for x in (student, teacher)]
    torch.testing.assert_close(kl_distillation(*large, 2.0, labels), whole)


# ---------------------------------------------------------------- what must hold of all of them

@pytest.mark.parametrize("loss", LABEL_LOSSES)
def test_all_void_batch_is_zero_with_zero_gradient(batch, loss):
    logits, labels, _ = batch
    logits.requires_grad_()
    value = loss(logits, torch.full_like(labels, IGNORE))
    value.backward()
    assert value.item() == 0 and logits.grad.abs().max().item() == 0


@pytest.mark.parametrize("loss", LABEL_LOSSES)
def test_void_pixels_teach_nothing(batch, loss):
    """Whatever the network says on a void pixel, the loss is the same."""
    logits, labels, _ = batch
    other = logits + 100 * torch.randn_like(logits) * (labels == IGNORE)[:, None]
    assert loss(logits, labels).item() == pytest.approx(loss(other, labels).item(), rel=1e-12)


@pytest.mark.parametrize("loss", LABEL_LOSSES)
def test_label_losses_do_not_grow_with_the_batch(batch, loss):
    logits, labels, _ = batch
    one = loss(logits, labels)
    two = loss(logits.repeat(2, 1, 1, 1), labels.repeat(2, 1, 1))
    # Dice is a ratio over the batch: in a larger one, eps = 1 is shared by more pixels
    tolerance = 0.1 if loss in (dice_loss, dice_focal_loss) else 1e-12
    assert two.item() == pytest.approx(one.item(), rel=tolerance)


def test_feature_losses_do_not_grow_with_the_batch_and_spare_the_teacher(maps):
    student, teacher = maps
    student.requires_grad_()
    teacher.requires_grad_()
    for loss in (cskd, pekd_of_four, kl_distillation):
        twice = loss(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1))
        assert twice.item() == pytest.approx(loss(student, teacher).item(), rel=1e-12)
        twice.backward()
        assert teacher.grad is None
    assert cskd(teacher, teacher).item() == pytest.approx(0, abs=1e-12)


def test_zero_features_have_finite_gradients():
    """A dead channel or pixel has no direction: its cosine must not make the gradient NaN."""
    student = torch.randn(B, C, H, W)
    teacher = torch.randn(B, C, H, W)
    student[0, :, 1, 2] = 0                                       # a dead pixel
    student[1, 3] = 0                                             # a dead channel
    for x in (student, torch.zeros(B, C, H, W)):
        x.requires_grad_()
        cskd(x, teacher).backward()
        assert x.grad.isfinite().all() and x.grad.abs().max() < 10


def test_focal_of_a_certain_pixel_has_a_finite_gradient():
    certain = torch.tensor([60.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    focal_loss(certain, torch.zeros(1, 1, 1, dtype=torch.long), gamma=0.5).backward()
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_inside(batch, maps, dtype):
    """Large half-precision features, whose squares overflow float16, give the float32 value.

    Inside autocast or not.
    """
    logits, labels, weight = batch
    student, teacher = ((300 * x).to(dtype) for x in maps)
    logits = logits.to(dtype)
    other = logits.flip(0)
    cases = [
        (cskd, student, teacher),
        (pekd_of_four, student, teacher),
        (kl_distillation, logits, other),
        (lambda x, y: weighted_cross_entropy(x, y, weight), logits, labels),
        (lambda x, y: dice_focal_loss(x, y, weight), logits, labels),
    ]
    for loss, first, second in cases:
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(first, second)
        if second.is_floating_point():
            expected = loss(first.float(), second.float())
        else:
            expected = loss(first.float(), second)                # labels
        assert inside.dtype == torch.float32 and inside.item() == expected.item()
        assert loss(first, second).item() == expected.item()


def test_projections_reach_the_teacher_when_trained():
    """Both projections learn an affine teacher exactly, negative values included.

    A ReLU behind them could not.
    """
    torch.manual_seed(3)
    dims = (2, 3, 4, 5)
    student = [torch.randn(2, dim, 6, 6) for dim in dims]
    teacher = []
    for dim, x in zip(dims, student, strict=True):
        teacher.append(torch.einsum("oc,bchw->bohw", torch.randn(dim * 2, dim), x) + 1)
    projections = Projections(dims, (4, 6, 8, 10))
    optimizer = torch.optim.LBFGS(projections.parameters(), max_iter=200)

    def closure():
        optimizer.zero_grad()
        stages, patch_embeds = projections(student, student)
        loss = pekd(stages, teacher, (1, 1, 1, 1)) + pekd(patch_embeds, teacher, (1, 1, 1, 1))
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert closure().item() < 1e-4
    assert all(p.grad is not None for p in projections.parameters())
    assert len(list(projections.parameters())) == 16              # 4 stages, 2 maps, weight, bias


# ---------------------------------------------------------------- other networks; what is refused

def test_feature_losses_take_any_number_of_stages():
    torch.manual_seed(5)
    for stages in (1, 3, 5):
        dims = [2 + i for i in range(stages)]
        student = [torch.randn(B, dim, 4, 6) for dim in dims]
        teacher = [torch.randn(B, 2 * dim, 4, 6) for dim in dims]
        projected, embeds = Projections(dims, [2 * dim for dim in dims])(student, student)
        betas = [0.5] * stages
        expected = loop_pekd(embeds, teacher, betas)
        assert pekd(embeds, teacher, betas).item() == pytest.approx(expected, rel=1e-5)
        assert all(cskd(s, t).isfinite() for s, t in zip(projected, teacher, strict=True))


@pytest.mark.parametrize("loss", LABEL_LOSSES)
def test_labels_that_do_not_fit_the_logits_are_one_sentence(batch, loss):
    logits, labels, _ = batch
    pairs = [
        (logits, labels[:1]),                                     # another batch, which broadcasts
        (logits[:1], labels),
        (logits, labels[0]),                                      # no batch
        (logits[0], labels),
        (logits, labels[:, None]),                                # (B, 1, H, W)
    ]
    for x, y in pairs:
        shape = re.escape(str(tuple(x.shape)))
        with pytest.raises(ValueError, match=rf"^logits .*{shape}.*: expected \(B, C, h, w\).*"):
            loss(x, y)


@pytest.mark.parametrize("loss", LABEL_LOSSES)
@pytest.mark.parametrize("wrong", [-1, C, 254, 256])
def test_label_out_of_range_is_one_sentence(batch, loss, wrong):
    logits, labels, _ = batch
    labels[1, 2, 3] = wrong
    message = f"labels from {min(wrong, 0)} to {max(wrong, C - 1)}: expected 0 to 3 for 4 classes"
    with pytest.raises(ValueError, match=message):
        loss(logits, labels)
    labels[1, 2, 3] = IGNORE
    assert loss(logits, labels.to(torch.uint8)).item() == loss(logits, labels).item()


@pytest.mark.parametrize("loss", [weighted_cross_entropy, focal_loss, dice_focal_loss])
def test_class_weights_of_another_length_are_one_sentence(batch, loss):
    logits, labels, weight = batch
    for wrong in (weight[:3], weight.repeat(2), weight[:1], weight[None]):
        shape = re.escape(str(tuple(wrong.shape)))
        with pytest.raises(ValueError, match=rf"class weights {shape}: expected \(4,\)"):
            loss(logits, labels, wrong)


def test_kl_of_other_classes_is_one_sentence(batch, maps):
    student, teacher = maps
    _, labels, _ = batch
    for wrong in (teacher[:, :3], teacher[:, :1], teacher[:1], teacher[0]):
        shape = re.escape(str(tuple(wrong.shape)))
        for args in ((student, wrong), (student, wrong, 1.0, labels)):
            with pytest.raises(ValueError, match=rf"logits .*{shape}: expected .* same classes"):
                kl_distillation(*args)


@pytest.mark.parametrize("loss", [cskd, pekd_of_four])
def test_features_of_another_shape_are_one_sentence_that_names_the_projections(maps, loss):
    student, teacher = maps
    wider = teacher.repeat(1, 2, 1, 1)
    for wrong in (wider, teacher[:, :1], teacher[:1], teacher[..., :1]):
        shape = re.escape(str(tuple(wrong.shape)))
        with pytest.raises(ValueError, match=rf"student and teacher .*{shape}.*Projections"):
            loss(student, wrong)
    assert loss(student.repeat(1, 2, 1, 1), wider).isfinite()


def test_cskd_of_tokens_is_one_sentence():
    tokens = torch.randn(B, H * W, C)
    with pytest.raises(ValueError, match=r"features \(2, 15, 4\): expected \(B, C, H, W\)"):
        cskd(tokens, tokens)


def test_stages_and_betas_of_unequal_number_are_one_sentence(maps):
    student, teacher = maps
    cases = [(3, 4, 4), (3, 3, 4), (5, 5, 4), (0, 4, 4), (4, 4, 3)]
    for ours, theirs, betas in cases:
        message = f"{ours} stages of the student, {theirs} of the teacher and {betas} betas"
        with pytest.raises(ValueError, match=message):
            pekd([student] * ours, [teacher] * theirs, (0.1, 0.1, 0.5, 1.0)[:betas])


def test_pekd_of_one_stage_is_one_sentence():
    """Four images of one stage are no four stages."""
    maps = torch.randn(4, C, H, W)
    for student, teacher in ((maps, maps), ([maps] * 4, maps), (maps, [maps] * 4)):
        with pytest.raises(ValueError, match="one tensor .*: pekd compares two lists"):
            pekd(student, teacher)


def test_projections_of_unequal_stages_are_one_sentence():
    with pytest.raises(ValueError, match=r"\(2, 3\), teacher_dims \(4, 6, 8\): Projections"):
        Projections((2, 3), (4, 6, 8))
    projections = Projections((2, 3), (4, 6))
    maps = [torch.randn(1, dim, 4, 4) for dim in (2, 3)]
    for wrong in (maps[:1], maps[::-1], [*maps, maps[0]]):
        for args in ((wrong, maps), (maps, wrong)):
            with pytest.raises(ValueError, match=r"made for a student with \[2, 3\]"):
                projections(*args)
    stages, patch_embeds = projections(maps, [])
    assert len(stages) == 2 and patch_embeds == []


def test_checks_do_not_break_a_compiled_graph(batch):
    """The values of the labels are looked at outside of torch.compile only."""
    logits, labels, weight = batch
    compiled = torch.compile(weighted_cross_entropy, backend="eager", fullgraph=True)
    expected = weighted_cross_entropy(logits, labels, weight)
    assert torch.equal(compiled(logits, labels, weight), expected)


def test_losses_take_keywords_in_any_order(batch, maps):
    logits, labels, weight = batch
    student, teacher = maps
    assert cskd(teacher=logits, student=logits).item() == pytest.approx(0, abs=1e-12)
    focal = focal_loss(gamma=1.0, alpha=weight, labels=labels, logits=logits)
    assert torch.equal(focal, focal_loss(logits, labels, weight, 1.0))
    kl = kl_distillation(temperature=2.0, teacher_logits=teacher, student_logits=student)
    assert torch.equal(kl, kl_distillation(student, teacher, 2.0))
    distance = pekd(betas=(1.0,), teacher=[teacher], student=[student])
    assert torch.equal(distance, pekd([student], [teacher], (1.0,)))


# ---------------------------------------------------------------- mistakes, and what they compute

def test_mistake_channel_cosine_by_a_view_compares_neighbouring_pixels():
    """(B, C, H, W).view(B, H*W, C) does not gather the channels of a pixel.

    It cuts one channel's row into pieces of C. A student that points exactly in the teacher's
    direction at every pixel has cosine 1 there, whatever its length; the view sees a mixture of
    lengths and scores it well below.
    """
    torch.manual_seed(4)
    teacher = torch.randn(1, 8, 16, 16)
    student = teacher * (0.1 + 3 * torch.rand(1, 1, 16, 16))      # same direction, other length
    right = F.cosine_similarity(student, teacher, dim=1).mean()
    wrong = F.cosine_similarity(student.view(1, 256, 8), teacher.view(1, 256, 8), dim=2).mean()
    assert right.item() == pytest.approx(1.0, abs=1e-5) and wrong.item() < 0.95
    channel = F.cosine_similarity(student.flatten(2), teacher.flatten(2), dim=2)
    expected = (1 - channel).mean().item()
    loss = cskd(student, teacher, lambda_m=0, lambda_s=1)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_mistake_focal_on_weighted_cross_entropy_raises_p_to_the_power_of_the_weight():
    """exp(-w CE) = p^w.

    A pixel of a rare class (w = 10) predicted at p = 0.9 then counts as p = 0.35, a hard one.
    """
    p, w = 0.9, 10.0
    logits = torch.tensor([math.log(p), math.log(1 - p)]).view(1, 2, 1, 1)
    label = torch.zeros(1, 1, 1, dtype=torch.long)
    weighted = F.cross_entropy(logits, label, torch.tensor([w, 1.0]), reduction="none")
    wrong = ((1 - torch.exp(-weighted)) ** 2 * weighted).item()
    right = focal_loss(logits, label, torch.tensor([w, 1.0])).item()
    assert torch.exp(-weighted).item() == pytest.approx(p ** w, rel=1e-5)
    assert right == pytest.approx(-w * (1 - p) ** 2 * math.log(p), rel=1e-4)
    assert wrong > 40 * right


def test_mistake_mean_over_void_pixels_weakens_the_loss(batch):
    """ignore_index makes void pixels 0, but .mean() still counts them.

    With a third void, a third of the loss is gone.
    """
    logits, labels, _ = batch
    wrong = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none").mean()
    share = (labels != IGNORE).double().mean()
    assert wrong.item() == pytest.approx((share * weighted_cross_entropy(logits, labels)).item())
    assert share < 0.7


def test_mistake_sum_over_the_batch_makes_lambda_depend_on_it(maps):
    """Summed over the batch, lambda_FD = 1 at batch 2 acts like 2.

    The number changes with the batch and nothing else.
    """
    student, teacher = maps
    wrong = sum(cskd(s[None], t[None]) for s, t in zip(student, teacher, strict=True))
    assert wrong.item() == pytest.approx(B * cskd(student, teacher).item())


def test_mistake_relu_behind_the_projection_cannot_match_signed_features(maps):
    """The best non-negative student still misses every negative value of the teacher.

    Half of the features are negative.
    """
    _, teacher = maps
    best = teacher.clamp(min=0)
    missed = (teacher.clamp(max=0) ** 2).mean()
    loss = pekd([best] * 4, [teacher] * 4, (1, 0, 0, 0))
    assert loss.item() == pytest.approx(missed.item()) and missed > 0.3


def test_mistake_projections_outside_the_optimizer_never_move():
    """An optimizer made from the student alone leaves the projections random.

    The distance is learned by nobody.
    """
    student = torch.nn.Conv2d(3, 4, 1)
    projections = Projections((4,), (8,))
    before = [p.clone() for p in projections.parameters()]
    forgotten = torch.optim.SGD(student.parameters(), lr=0.1)
    x = torch.randn(1, 3, 4, 4)
    teacher = torch.randn(1, 8, 4, 4)
    stages, _ = projections([student(x)], [student(x)])
    cskd(stages[0], teacher).backward()
    forgotten.step()
    after = list(projections.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert projections.stages[0].weight.grad.abs().max() > 0      # there was something to learn


def test_mistake_kl_reductions_differ_by_the_number_of_pixels_or_classes(batch, maps):
    """F.kl_div's reductions: "batchmean" divides by B only, "mean" by B C H W.

    The mean over pixels is neither.
    """
    student, teacher = maps
    args = (student.log_softmax(1), teacher.softmax(1))
    right = kl_distillation(student, teacher).item()
    assert F.kl_div(*args, reduction="batchmean").item() == pytest.approx(H * W * right)
    assert F.kl_div(*args, reduction="mean").item() == pytest.approx(right / C)
