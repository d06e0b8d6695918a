"""Scores against plain counting, the evaluation of a model, and eval.py as a user calls it."""

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import command, write_folder
from data import IGNORE, open_dataset
from eval import (
    confusion_matrix,
    evaluate,
    no_nan,
    scores,
    segment,
)
from extras.cli import NotFinite, UsageError
from extras.comparison import draw_comparison, spread_indices
from extras.provenance import warn_of_leak
from extras.score_table import table
from model import load_checkpoint, save_checkpoint, segformer


def test_confusion_and_scores_by_counting():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (3, 20, 30))
    guess = rng.integers(0, 4, (3, 20, 30))
    truth[truth == 2] = IGNORE                                    # class 2 has no truth
    confusion = confusion_matrix(torch.from_numpy(guess), torch.from_numpy(truth), 4)
    result = scores(confusion)
    for t in range(4):
        for p in range(4):
            counted = ((truth == t) & (guess == p) & (truth != IGNORE)).sum()
            assert confusion[t, p] == counted
        both = ((truth == t) & (guess == t)).sum()
        either = (((truth == t) | (guess == t)) & (truth != IGNORE)).sum()
        assert result["iou"][t] == pytest.approx(both / either)
        if t != 2:
            assert result["acc"][t] == pytest.approx(both / (truth == t).sum())
    assert math.isnan(result["acc"][2])
    assert result["iou"][2] == 0                                  # predicted though it is not there
    assert result["miou"] == pytest.approx(np.mean(result["iou"]))
    assert result["macc"] == pytest.approx(np.nanmean(result["acc"]))
    assert result["aacc"] == pytest.approx((truth == guess)[truth != IGNORE].mean())
    assert confusion.dtype == torch.int64


def test_absent_classes_are_nan_and_left_out():
    result = scores(torch.tensor([[8, 2, 0], [0, 10, 0], [0, 0, 0]]))
    assert math.isnan(result["iou"][2])
    assert result["miou"] == pytest.approx((0.8 + 10 / 12) / 2)
    assert no_nan(result)["iou"][2] is None
    void = torch.full((2, 2), IGNORE, dtype=torch.uint8)
    assert confusion_matrix(torch.zeros_like(void), void, 3).sum() == 0


class Oracle(torch.nn.Module):
    """A network that sees the class in the brightness (80 a class); answers at a quarter."""
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
    dataset = open_dataset(folder, "val")
    model = Oracle().train()
    full_size = scores(evaluate(model, dataset))
    smaller = scores(evaluate(model, dataset, (32, 40)))
    quarter = scores(evaluate(model, dataset, None, True))
    assert model.training and set(model.sizes) == {(40, 48), (32, 40)}
    assert full_size["miou"] == quarter["miou"] == 1 and smaller["miou"] > 0.8
    labelled = sum((dataset[i][1] != IGNORE).sum() for i in range(len(dataset)))
    assert evaluate(model, dataset).sum() == labelled
    assert evaluate(model, dataset, quarter=True).sum() <= len(dataset) * 10 * 12


def test_logits_are_resized_before_the_argmax():
    model = Oracle()
    logits = torch.tensor([[[[0.0, 0.0]], [[-1.0, 3.0]]]])        # the border is where they cross
    model.forward = lambda images: logits
    classes = segment(model, torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert classes[0].tolist() == [0] * 12 + [1] * 20


def network_and_image(H, W, classes=3):
    torch.manual_seed(0)
    model = segformer("b0", classes).eval().fold()
    return model, torch.randint(0, 256, (3, H, W), dtype=torch.uint8)


def full(model, image, size):
    """Logits of an image, (C, H, W) at `size`, in the plainest way."""
    with torch.no_grad():
        logits = model(image[None].float() / 255)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("window, stride", [
    ((64, 48), (32, 16)), ((64, 64), None), ((130, 40), (7, 40)), ((500, 500), None)])
def test_windows_add_up_where_they_overlap(window, stride):
    model, image = network_and_image(130, 97)
    h, w = min(window[0], 130), min(window[1], 97)
    dy, dx = stride or (48, 48)
    total = torch.zeros(3, 130, 97)
    for top in sorted({min(y, 130 - h) for y in range(0, 130, dy)}):
        for left in sorted({min(x, 97 - w) for x in range(0, 97, dx)}):
            part = image[:, top:top + h, left:left + w]
            total[:, top:top + h, left:left + w] += full(model, part, (h, w))
    found = segment(model, image, (32, 32), window=window, stride=stride)
    assert torch.equal(found.long(), total.argmax(0))
    beyond = (window[0], window[1] + 1)
    with pytest.raises(UsageError, match="is larger than the window"):
        segment(model, image, window=window, stride=beyond)


def test_scales_and_mirror_images_are_averaged():
    model, image = network_and_image(64, 96)
    total = torch.zeros(3, 64, 96)
    for size in ((48, 72), (64, 96)):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
        resized = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        total += full(model, resized, (64, 96)).softmax(0)
        total += full(model, resized.flip(2), (64, 96)).softmax(0).flip(2)
    found = segment(model, image, scales=(0.75, 1.0), flip=True)
    # Sums in another order: ties may fall otherwise.
    assert (found == total.argmax(0)).float().mean() > 0.999
    assert (found != segment(model, image)).any()


def test_table_has_differences_and_dashes():
    a = scores(torch.tensor([[5, 5], [0, 10]]))
    b = scores(torch.tensor([[10, 0], [0, 0]]))
    text = table(["one", "two"], [a, b], ["road", "sky"])
    assert "+50.00" in text and "-" in text.splitlines()[3] and text.count("\n") == 7


def test_command_scores_several_checkpoints(folder, checkpoint, tmp_path):
    other = checkpoint.with_name("other.pth")
    other.write_bytes(checkpoint.read_bytes())
    output = command("eval.py", checkpoint, other, "--data", folder, "--json", tmp_path / "s.json",
                     "--overlay", tmp_path / "pictures")
    assert "scored at the labels' full resolution" in output
    assert "+0.00" in output and "mIoU" in output
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["resolution"] == "full" and content["frames"] == 1
    assert len(content["checkpoints"]) == 2
    assert np.array(content["checkpoints"][0]["confusion"]).shape == (3, 3)
    assert Image.open(tmp_path / "pictures" / "frame_5.png").width > 600
    output = command("eval.py", checkpoint, "--data", folder, "--quarter", "--size", 64, 64)
    assert "a quarter of the input" in output and "input 64x64" in output


def test_command_scores_with_windows_scales_and_flips(folder, checkpoint, tmp_path):
    output = command("eval.py", checkpoint, "--data", folder, "--window", 32, 32, "--stride", 8, 16,
                     "--scales", 1, 1.5, "--flip", "--json", tmp_path / "s.json")
    assert "windows of 32x32, scales 1, 1.5, and mirrored" in output
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["window"] == [32, 32] and content["stride"] == [8, 16]
    assert content["scales"] == [1, 1.5] and content["flip"]
    network = load_checkpoint(checkpoint).fold()
    dataset = open_dataset(folder, "val")
    options = {"window": (32, 32), "stride": (8, 16), "scales": (1, 1.5), "flip": True}
    expected = scores(evaluate(network, dataset, **options))
    assert content["checkpoints"][0]["miou"] == pytest.approx(expected["miou"])


def test_command_scores_in_16_bits_and_says_what_that_moves(folder, checkpoint, tmp_path):
    output = command("eval.py", checkpoint, "--data", folder, "--split", "train", "--amp", "bf16",
                     "--flip", "--json", tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    result = content["checkpoints"][0]
    network = load_checkpoint(checkpoint).fold()
    dataset = open_dataset(folder, "train")
    exact = [segment(network, dataset[i][0], flip=True) for i in range(len(dataset))]
    with torch.autocast("cpu", torch.bfloat16):
        half = [segment(network, dataset[i][0], flip=True) for i in range(len(dataset))]
        expected = evaluate(network, dataset, flip=True)
    assert content["amp"] == "bf16" and result["confusion"] == expected.tolist()
    same = (torch.stack(exact) == torch.stack(half)).float().mean().item()
    assert result["same_class"] == pytest.approx(same)
    assert 0.9 < result["same_class"] < 1                         # 1 would be fp32 against itself
    assert "and mirrored, in bf16" in output
    percent = f"{100 * result['same_class']:.3f} %"
    assert f"{percent} of the pixels have their class in fp32" in output


def test_command_draws_frames_chosen_by_their_score(folder, checkpoint, tmp_path):
    output = command("eval.py", checkpoint, "--data", folder, "--split", "train",
                     "--strip", tmp_path / "strip.png")
    network = load_checkpoint(checkpoint).fold()
    dataset = open_dataset(folder, "train")
    alone = []
    for i in range(len(dataset)):
        confusion = evaluate(network, [dataset[i]], network.input_size)
        alone.append(scores(confusion)["miou"])
    assert f"the worst ({dataset.stems[int(np.argmin(alone))]})" in output
    assert f"the best ({dataset.stems[int(np.argmax(alone))]})" in output
    assert Image.open(tmp_path / "strip.png").height > 4 * 200


def test_command_draws_frames_spread_over_the_split(folder, checkpoint, tmp_path):
    picture = tmp_path / "picture.png"
    output = command("eval.py", checkpoint, "--data", folder, "--split", "train",
                     "--picture", picture)
    assert f"picture: {picture}" in output
    model = load_checkpoint(checkpoint).fold()
    dataset = open_dataset(folder, "train")
    indices = spread_indices(len(dataset), 4)
    expected = draw_comparison([model], [str(checkpoint)], dataset, indices)
    assert indices == [0, 1, 2, 4]
    assert (np.asarray(Image.open(picture)) == np.asarray(expected)).all()


def test_overlays_do_not_overwrite_the_data(folder, checkpoint):
    labels = Path(folder.partition(":")[2]) / "labels"
    before = {path: path.read_bytes() for path in labels.iterdir()}
    output = command("eval.py", checkpoint, "--data", folder, "--overlay", labels, code=2)
    assert "the data set itself is there" in output
    assert {path: path.read_bytes() for path in labels.iterdir()} == before


def test_command_calls_checkpoints_by_the_names_it_is_given(folder, checkpoint, tmp_path):
    other = checkpoint.with_name("other.pth")
    other.write_bytes(checkpoint.read_bytes())
    picture = tmp_path / "picture.png"
    output = command("eval.py", checkpoint, other, "--data", folder, "--names", "teacher", "B0",
                     "--picture", picture)
    head = next(line for line in output.splitlines() if line.startswith("IoU"))
    assert head.split() == ["IoU,", "%", "teacher", "B0", "diff"]
    assert f"teacher: {checkpoint}: input as it is" in output
    model = load_checkpoint(checkpoint).fold()
    expected = draw_comparison([model, model], ["teacher", "B0"], open_dataset(folder, "val"), [0])
    assert (np.asarray(Image.open(picture)) == np.asarray(expected)).all()


@pytest.mark.parametrize("args, sentence", [
    (["{net}", "--data", "camvid:/nowhere"], "no such folder"),
    (["/no/net.pth"], "cannot open checkpoint /no/net.pth"),
    (["{net}", "--data", "toy"], "net.pth has 3 classes, the data (toy) has 8"),
    (["{net}"], "does not say what it was trained on: add --data"),
    (["{net}", "--window", "64", "64", "--stride", "65", "9"], "pixels would be left out"),
    (["{net}", "--window", "64", "64", "--stride", "0", "9"], "at least 1"),
    (["{net}", "--window", "8", "64"], "at least 32"),
    (["{net}", "--window", "64", "64", "--size", "64", "64"], "leave --size out"),
    (["{net}", "--stride", "9", "9"], "goes with --window"),
    (["{net}", "--quarter", "--flip"], "paper's protocol"),
    (["{net}", "--scales", "0"], "above 0"),
    (["{net}", "--size", "8", "8"], "at least 32"),
    (["{net}", "--device", "tpu9"], "device 'tpu9'"),
    (["{net}", "--split", "training"], "invalid choice"),
    (["{net}", "--names", "a", "b"], "2 names for 1 checkpoints"),
    (["{net}", "other.pth", "--names", "a", "a"], "two of them are the same"),
    (["{net}", "--data", "{folder}", "--json", "/no/such/dir/x.json"], "there is no folder"),
])
def test_mistakes_are_a_sentence_and_exit_code_2(args, sentence, folder, checkpoint):
    args = [arg.format(net=checkpoint, folder=folder) for arg in args]
    output = command("eval.py", *args, code=2)
    assert sentence in output


def save_trained(path, **trained_on):
    """A random B0 that says it was trained on `trained_on`."""
    network = segformer("b0", 3)
    network.trained_on = {"fold": None, "folds": 2, "fold_by": None} | trained_on
    save_checkpoint(network, path)
    return path


def test_broken_weights_and_seen_folds_are_said(folder, tmp_path):
    path = save_trained(tmp_path / "net.pth", data=folder, fold=0)
    assert "it has seen frames" in command("eval.py", path, "--data", folder)
    assert "it has seen" not in command("eval.py", path, "--data", folder, "--fold", 0)
    network = load_checkpoint(path)
    network.decoder.fuse.weight.data[0] = float("nan")
    save_checkpoint(network, tmp_path / "nan.pth")
    network.train()
    with pytest.raises(NotFinite):
        evaluate(network, open_dataset(folder, "val"))
    assert network.training                                       # it stays in its mode
    output = command("eval.py", tmp_path / "nan.pth", "--data", folder, "--fold", 0, code=2)
    assert f"{tmp_path / 'nan.pth'}: the network's output is not finite" in output


def test_without_data_a_checkpoint_is_scored_on_what_it_was_trained_on(folder, tmp_path):
    trained = {"data": folder, "fold": 1, "folds": 3, "fold_by": "block"}
    path = save_trained(tmp_path / "net.pth", **trained)
    output = command("eval.py", path, "--json", tmp_path / "s.json")
    assert f"data: {folder}, fold 1 of 3 by block, as {path} was trained" in output
    assert "warning" not in output
    content = json.loads((tmp_path / "s.json").read_text())
    assert (content["data"], content["fold"], content["folds"]) == (folder, 1, 3)
    assert content["fold_by"] == "block"
    dataset = open_dataset(folder, "val", 1, 3, fold_by="block")
    expected = evaluate(load_checkpoint(path).fold(), dataset)
    assert content["checkpoints"][0]["confusion"] == expected.tolist()
    # What is given wins, and what is left out is still the checkpoint's.
    output = command("eval.py", path, "--fold", 0)
    assert "fold 0 of 3 by block" in output and "it has seen frames" in output


def test_without_data_checkpoints_must_agree_and_the_data_be_there(folder, tmp_path):
    path = save_trained(tmp_path / "a.pth", data=folder)
    other = save_trained(tmp_path / "b.pth", data=folder, fold=0)
    gone = save_trained(tmp_path / "gone.pth", data="folder:/no/such/set")
    assert "not trained on the same data and fold" in command("eval.py", path, other, code=2)
    for site in ("a", "b"):
        write_folder(tmp_path / site / "street")
    here = save_trained(tmp_path / "here.pth", data=f"folder:{tmp_path}/a/street")
    there = save_trained(tmp_path / "there.pth", data=f"folder:{tmp_path}/b/street")
    assert "not trained on the same data and fold" in command("eval.py", here, there, code=2)
    shutil.move(tmp_path / "b", tmp_path / "c")                   # then it may have been moved to a
    assert "mIoU" in command("eval.py", here, there)

    by_default = save_trained(tmp_path / "default.pth", data=folder, fold=0)
    by_block = save_trained(tmp_path / "block.pth", data=folder, fold=0, fold_by="block")
    assert "mIoU" in command("eval.py", by_default, by_block)

    output = command("eval.py", gone, code=2)
    assert "trained on folder:/no/such/set, which is not there: add --data folder:DIR" in output


def warning_for(trained_on, capsys, **flags):
    """What `warn_of_leak` says of a model with `trained_on` that is scored with `flags`."""
    args = argparse.Namespace(**{"fold": None, "folds": 2, "fold_by": None} | flags)
    warn_of_leak(argparse.Namespace(trained_on=trained_on), "net.pth", args)
    return capsys.readouterr().err


def test_a_data_set_that_has_moved_still_warns(capsys):
    trained = {"data": "folder:/old/street", "fold": 0, "folds": 2, "fold_by": None}
    said = warning_for(trained, capsys, data="folder:/new/street")
    assert ("trained with fold 0 of 2 by block held out, and now it is the official split"
            in said)
    assert "it has seen frames that it is scored on, if folder:/old/street was the same" in said
    assert warning_for(trained, capsys, data="folder:/new/street", fold=1)
    assert not warning_for(trained, capsys, data="folder:/new/street", fold=0)
    assert not warning_for(trained, capsys, data="folder:/new/street", fold=0, fold_by="block")
    assert warning_for(trained, capsys, data="folder:/new/street", fold=0, fold_by="shuffle")
    assert not warning_for(trained, capsys, data="folder:/new/fields")
    assert not warning_for(trained, capsys, data="camvid:/old/street")

    camvid = trained | {"data": "camvid:/old/CamVid"}
    assert "it has seen frames" in warning_for(camvid, capsys, data="camvid:/other/name", fold=1)
    official = camvid | {"fold": None}
    assert not warning_for(official, capsys, data="camvid:/old/CamVid")
    with_val = official | {"with_val": True}
    said = warning_for(with_val, capsys, data="camvid:/old/CamVid", split="val")
    assert "net.pth was trained on the frames of val too" in said
    assert not warning_for(with_val, capsys, data="camvid:/old/CamVid", split="test")
    for nonsense in (None, 7, {"data": 7}, {}):
        assert not warning_for(nonsense, capsys, data="camvid:/old/CamVid", fold=1)


def test_classes_in_another_order_are_refused(folder, tmp_path):
    network = segformer("b0", 3)
    network.classes = ["class 1", "class 0", "class 2"]
    save_checkpoint(network, tmp_path / "net.pth")
    output = command("eval.py", tmp_path / "net.pth", "--data", folder, code=2)
    assert "trained on other classes" in output
