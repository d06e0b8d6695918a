"""What prompts learn from, against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from extras.prompt_data import NOTHING, PromptStream, draw_nothing, empty_images
from extras.prompt_losses import (
    labelled_share,
    mask_loss,
    pixel_alignment,
    presence_loss,
    targets_of_labels,
    targets_of_teacher,
    word_alignment,
)
from losses import IGNORE


def slow_mask_loss(logits, target, present, weight):
    total = 0.0
    count = 0
    B, K = present.shape
    for b in range(B):
        for k in range(K):
            if not present[b, k]:
                continue
            bce = overlap = sizes = pixels = 0.0
            for z, t, w in zip(logits[b, k].flatten().tolist(), target[b, k].flatten().tolist(),
                               weight[b].flatten().tolist(), strict=True):
                p = 1 / (1 + math.exp(-z))
                bce -= w * (t * math.log(p) + (1 - t) * math.log(1 - p))
                overlap += w * p * t
                sizes += w * (p + t)
                pixels += w
            total += bce / pixels + 1 - (2 * overlap + 1) / (sizes + 1)
            count += 1
    return total / max(count, 1)


def test_mask_loss_against_plain_loops():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5)
    target = torch.rand(2, 3, 4, 5)
    weight = torch.rand(2, 4, 5)
    present = torch.tensor([[True, False, True], [False, True, True]])
    loss = mask_loss(logits, target, present, weight)
    assert loss.item() == pytest.approx(slow_mask_loss(logits, target, present, weight), abs=1e-4)


def test_absent_pairs_give_no_mask_loss_and_no_gradient():
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    present = torch.zeros(2, 3, dtype=torch.bool)
    weight = torch.ones(2, 4, 5)
    loss = mask_loss(logits, torch.rand(2, 3, 4, 5), present, weight)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
    present[1, 2] = True
    logits.grad = None
    mask_loss(logits, torch.rand(2, 3, 4, 5), present, weight).backward()
    moved = logits.grad.abs().sum((2, 3)) > 0
    assert torch.equal(moved, present)


def test_mask_and_presence_losses_are_smallest_at_the_target():
    target = (torch.rand(1, 2, 8, 8) > 0.5).float()
    sure = 20 * (2 * target - 1)
    present = torch.ones(1, 2, dtype=torch.bool)
    weight = torch.ones(1, 8, 8)
    assert mask_loss(sure, target, present, weight) < 1e-3
    assert mask_loss(-sure, target, present, weight) > 10
    assert presence_loss(torch.tensor([[20.0, -20.0]]), torch.tensor([[1.0, 0.0]])) < 1e-3


def test_alignment_is_a_mean_of_cosines():
    torch.manual_seed(0)
    student = torch.randn(2, 6, 3, 4)
    teacher = torch.randn(2, 6, 3, 4)
    weight = torch.ones(2, 3, 4)
    weight[1] = 0
    cosines = []
    for y in range(3):
        for x in range(4):
            a, b = student[0, :, y, x], teacher[0, :, y, x]
            cosines.append((a @ b / a.norm() / b.norm()).item())
    expected = 1 - sum(cosines) / len(cosines)
    assert pixel_alignment(student, teacher, weight).item() == pytest.approx(expected, abs=1e-5)
    assert word_alignment(teacher[:, :, 0, 0], 3 * teacher[:, :, 0, 0]).abs() < 1e-6
    with pytest.raises(ValueError, match="cannot be aligned"):
        word_alignment(torch.ones(2, 3), torch.ones(2, 4))


def test_targets_of_labels_are_shares_of_the_labelled_part():
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[0, :4, :4] = 1
    labels[0, 0, :] = IGNORE
    labels[0, 7, 0] = 2
    table = torch.tensor([[True, False, False], [False, True, True], [False, False, False]])
    targets = targets_of_labels(labels, table, (2, 2))
    assert torch.allclose(targets.weight, torch.tensor([[[0.75, 0.75], [1.0, 1.0]]]))
    assert torch.allclose(targets.mask[0, 0], torch.tensor([[0.0, 1.0], [15 / 16, 1.0]]))
    assert torch.allclose(targets.mask[0, 1], torch.tensor([[1.0, 0.0], [1 / 16, 0.0]]))
    assert (targets.mask[0, 2] == 0).all()
    assert targets.presence.tolist() == [[1, 1, 0]]


def test_the_truth_is_0_or_1_and_not_its_sigmoid():
    """The reports matched masks against sigmoid(0/1), so that their truth was 0.5 or 0.73."""
    labels = torch.tensor([[[0, 1], [1, 1]]], dtype=torch.uint8)
    targets = targets_of_labels(labels, torch.eye(2, dtype=torch.bool), (2, 2))
    assert set(targets.mask.flatten().tolist()) == {0.0, 1.0}
    logits = 20 * (2 * targets.mask - 1)
    present = torch.ones(1, 2, dtype=torch.bool)
    right = mask_loss(logits, targets.mask, present, targets.weight)
    wrong = mask_loss(logits, targets.mask.sigmoid(), present, targets.weight)
    assert right < 1e-3 and wrong > 1                             # the best mask would be punished


def test_an_empty_image_says_no_to_everything_and_is_not_void():
    labels = torch.full((1, 8, 8), NOTHING, dtype=torch.uint8)
    targets = targets_of_labels(labels, torch.ones(4, 3, dtype=torch.bool), (2, 2))
    assert (targets.presence == 0).all() and (targets.mask == 0).all()
    assert (targets.weight == 1).all()


def test_targets_of_a_teacher_leave_void_out():
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[0, :, :4] = IGNORE
    mask = torch.randn(1, 3, 2, 2)
    targets = targets_of_teacher(mask, torch.randn(1, 3), labels)
    assert torch.equal(targets.mask, mask.sigmoid())
    assert torch.equal(targets.weight, torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))
    assert torch.equal(labelled_share(labels, (2, 2)), targets.weight)


def test_presence_loss_is_a_mean_over_all_pairs():
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.0]])
    target = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    expected = F.binary_cross_entropy(logits.sigmoid(), target)
    assert presence_loss(logits, target).item() == pytest.approx(expected.item(), abs=1e-6)


# ---------------------------------------------------------------- images of nothing

class Frames(torch.utils.data.Dataset):
    def __getitem__(self, n):
        return torch.zeros(3, 32, 48, dtype=torch.uint8), torch.zeros(32, 48, dtype=torch.uint8)


def test_the_share_of_empty_images_is_what_was_asked_and_the_same_each_time():
    stream = PromptStream(Frames(), 0.25, seed=3)
    empty = [n for n in range(400) if stream[n][1][0, 0] == NOTHING]
    assert 70 < len(empty) < 130
    first, again = stream[empty[0]], stream[empty[0]]
    assert torch.equal(first[0], again[0])
    assert not any(PromptStream(Frames(), 0.0, 0)[n][1].any() for n in range(50))
    other = [n for n in range(400) if PromptStream(Frames(), 0.25, 4)[n][1][0, 0] == NOTHING]
    assert other != empty


def test_images_of_nothing_are_images(monkeypatch):
    images = empty_images(20, (40, 60))
    assert all(image.shape == (3, 40, 60) and image.dtype == torch.uint8 for image in images)
    again = empty_images(20, (40, 60))
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
    spreads = [image.float().std().item() for image in images]
    assert min(spreads) < 60 < max(spreads)                       # plain ones, and noise
    import numpy as np
    assert draw_nothing((33, 47), np.random.default_rng(0)).shape == (3, 33, 47)
