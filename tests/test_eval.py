"""Scores against plain counting, the evaluation of a model, and eval.py as a user calls it."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import command
from data import IGNORE, open_dataset
from eval import class_map, confusion_matrix, evaluate, no_nan, scores, table
from model import save_checkpoint, segformer


@pytest.fixture
def checkpoint(tmp_path):
    """A random B0 for the three classes of the test folder."""
    torch.manual_seed(0)
    network = segformer("b0", 3)
    network.classes = [f"class {c}" for c in range(3)]
    save_checkpoint(network, tmp_path / "net.pth")
    return tmp_path / "net.pth"


def test_confusion_and_scores_by_counting():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 4, (3, 20, 30)), rng.integers(0, 4, (3, 20, 30))
    truth[truth == 2] = IGNORE                                    # class 2 has no truth
    confusion = confusion_matrix(torch.from_numpy(guess), torch.from_numpy(truth), 4)
    result = scores(confusion)
    for t in range(4):
        for p in range(4):
            assert confusion[t, p] == ((truth == t) & (guess == p) & (truth != IGNORE)).sum()
        both = ((truth == t) & (guess == t)).sum()
        either = (((truth == t) | (guess == t)) & (truth != IGNORE)).sum()
        assert result["iou"][t] == pytest.approx(both / either)
        if t != 2:
            assert result["acc"][t] == pytest.approx(both / (truth == t).sum())
    assert math.isnan(result["acc"][2]) and result["iou"][2] == 0                 # predicted, though it is not there: wrong
    assert result["miou"] == pytest.approx(np.mean(result["iou"])) and result["macc"] == pytest.approx(np.nanmean(result["acc"]))
    assert result["aacc"] == pytest.approx((truth == guess)[truth != IGNORE].mean())
    assert confusion.dtype == torch.int64


def test_absent_classes_are_nan_and_left_out():
    result = scores(torch.tensor([[8, 2, 0], [0, 10, 0], [0, 0, 0]]))
    assert math.isnan(result["iou"][2]) and result["miou"] == pytest.approx((0.8 + 10 / 12) / 2)
    assert no_nan(result)["iou"][2] is None
    assert confusion_matrix(torch.zeros(2, 2, dtype=torch.uint8), torch.full((2, 2), IGNORE, dtype=torch.uint8), 3).sum() == 0


class Oracle(torch.nn.Module):
    """A network that sees the class in the brightness (80 a class) and answers at a quarter of the size."""
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[2:]))
        small = torch.nn.functional.avg_pool2d(images[:, :1], 4, ceil_mode=True) * 255 - 10
        return -(small - 80 * torch.arange(3).view(1, 3, 1, 1)).abs()


def test_evaluate_scores_at_the_labels_size_whatever_the_input_size(folder):
    dataset, model = open_dataset(folder, "val"), Oracle().train()
    full, half, quarter = (scores(evaluate(model, dataset, *args)) for args in ((), ((32, 40),), (None, True)))
    assert model.training and set(model.sizes) == {(40, 48), (32, 40)}
    assert full["miou"] == quarter["miou"] == 1 and half["miou"] > 0.8
    assert evaluate(model, dataset).sum() == sum((dataset[i][1] != IGNORE).sum() for i in range(len(dataset)))
    assert evaluate(model, dataset, quarter=True).sum() <= len(dataset) * 10 * 12


def test_logits_are_resized_before_the_argmax():
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 1] = torch.tensor([[-1.0, 3.0]])                    # the border is where the line crosses 0, not in the middle
    assert class_map(logits, (1, 8))[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_table_has_differences_and_dashes():
    a, b = scores(torch.tensor([[5, 5], [0, 10]])), scores(torch.tensor([[10, 0], [0, 0]]))
    text = table(["one", "two"], [a, b], ["road", "sky"])
    assert "+50.00" in text and "-" in text.splitlines()[3] and text.count("\n") == 7


def test_command_scores_several_checkpoints(folder, checkpoint, tmp_path):
    other = checkpoint.with_name("other.pth")
    other.write_bytes(checkpoint.read_bytes())
    output = command("eval.py", checkpoint, other, "--data", folder, "--json", tmp_path / "s.json", "--overlay", tmp_path / "pictures")
    assert "scored at the labels' full resolution" in output and "+0.00" in output and "mIoU" in output
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["resolution"] == "full" and len(content["checkpoints"]) == 2 and content["frames"] == 1
    assert np.array(content["checkpoints"][0]["confusion"]).shape == (3, 3)
    assert Image.open(tmp_path / "pictures" / "frame_5.png").width > 600
    output = command("eval.py", checkpoint, "--data", folder, "--quarter", "--size", 64, 64)
    assert "a quarter of the input" in output and "input 64x64" in output


def test_command_segments_photos_and_goes_on_after_a_broken_one(checkpoint, tmp_path):
    photos, out = tmp_path / "my photos", tmp_path / "out"
    photos.mkdir()
    for name, size in (("a b.jpg", (101, 67)), ("ü.png", (64, 200))):
        Image.new("RGB", size, (90, 120, 60)).save(photos / name)
    (photos / "broken.jpg").write_bytes(b"no")
    Image.new("RGB", (20, 20)).save(photos / "tiny.png")
    output = command("eval.py", checkpoint, "--images", photos, "--out", out, code=2)
    assert "2 of 4 photos" in output and "broken.jpg: not an image" in output and "tiny.png: 20x20 pixels" in output
    ids = Image.open(out / "a b.png")
    assert ids.size == (101, 67) and ids.mode == "L" and np.asarray(ids).max() < 3
    assert sorted(p.name for p in out.iterdir()) == ["a b.png", "a b_overlay.png", "ü.png", "ü_overlay.png"]
    before = (photos / "ü.png").read_bytes()
    assert "choose another folder" in command("eval.py", checkpoint, "--images", photos / "ü.png", "--out", photos, code=2)
    assert (photos / "ü.png").read_bytes() == before


@pytest.mark.parametrize("args, sentence", [
    (["{net}", "--data", "camvid:/nowhere"], "no such folder"), (["/no/net.pth"], "cannot open checkpoint /no/net.pth"),
    (["{net}", "--data", "toy"], "net.pth has 3 classes, the data (toy) has 8"), (["{net}", "--images", "/no.png", "--out", "{tmp}/o"], "/no.png: there is no such file"),
    (["{net}", "--images", "x.png"], "go together"), (["{net}", "--size", "8", "8"], "at least 32"), (["{net}", "--device", "tpu9"], "device 'tpu9'"),
    (["{net}", "--split", "training"], "invalid choice"), (["{net}", "--data", "{folder}", "--json", "/no/such/dir/x.json"], "No such file or directory")])
def test_mistakes_are_a_sentence_and_exit_code_2(args, sentence, folder, checkpoint, tmp_path):
    args = [arg.format(net=checkpoint, tmp=tmp_path, folder=folder) for arg in args]
    output = command("eval.py", *args, code=2)
    assert sentence in output


def test_broken_weights_and_seen_folds_are_said(folder, tmp_path):
    network = segformer("b0", 3)
    network.trained_on = dict(data=folder, fold=0, folds=2, fold_by=None)
    save_checkpoint(network, tmp_path / "net.pth")
    assert "it has seen frames" in command("eval.py", tmp_path / "net.pth", "--data", folder)
    assert "it has seen" not in command("eval.py", tmp_path / "net.pth", "--data", folder, "--fold", 0)
    network.decoder.fuse.weight.data[0] = float("nan")
    save_checkpoint(network, tmp_path / "nan.pth")
    assert "not finite" in command("eval.py", tmp_path / "nan.pth", "--data", folder, code=2)


def test_classes_in_another_order_are_refused(folder, tmp_path):
    network = segformer("b0", 3)
    network.classes = ["class 1", "class 0", "class 2"]
    save_checkpoint(network, tmp_path / "net.pth")
    assert "trained on other classes" in command("eval.py", tmp_path / "net.pth", "--data", folder, code=2)
