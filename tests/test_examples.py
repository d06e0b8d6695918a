"""The example that is read first: it runs as its docstring says, and says what it lacks."""

import pytest
import torch
from PIL import Image

from conftest import ROOT, command
from model import save_checkpoint, segformer


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "teacher.pth"
    save_checkpoint(segformer("b1", 8, width=32), path)
    return path


def test_distill_trains_and_draws(teacher, tmp_path):
    picture = tmp_path / "features.png"
    output = command("-m", "examples.distill", teacher, "--steps", 2, "--out", picture, cwd=ROOT)
    assert "step 2/2  loss" in output
    assert "teacher: mIoU" in output
    assert "student: mIoU" in output
    with Image.open(picture) as drawn:
        assert drawn.width > 6 * 300                              # six columns
        assert drawn.height > 8 * 150                             # two frames of four stages


def test_distill_takes_the_features_of_a_teacher_of_other_classes(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(segformer("b1", 2, width=32), tmp_path / "other.pth")
    output = command("-m", "examples.distill", tmp_path / "other.pth", "--steps", 1,
                     "--out", tmp_path / "features.png", cwd=ROOT)
    assert "teacher: not scored, its classes are others than the toy scenes'" in output
    assert "student: mIoU" in output
    output = command("-m", "examples.distill", "--steps", 0, cwd=ROOT, code=2)
    assert "argument --steps" in output


def test_distill_says_that_there_is_no_teacher(tmp_path):
    output = command("-m", "examples.distill", tmp_path / "none.pth", cwd=ROOT, code=2)
    assert "there is no teacher" in output
    assert "train.py --student b2" in output
