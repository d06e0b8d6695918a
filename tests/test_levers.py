"""What train.py offers beside the paper: averaged weights, few labels, other losses and weights."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import SMALL, log, same_runs, train_with

import train
from conftest import command, write_folder
from data import IGNORE, find_drives, open_dataset
from extras.cli import UsageError
from extras.few_labels import Unlabelled, first_of_each_drive, labels_for_kl, split_labelled
from extras.starting_weights import make_student
from extras.weight_average import WeightAverage
from losses import dice_loss
from model import load_checkpoint, save_checkpoint, segformer
from small_datasets import write_camvid

SOME = ("--lambda-fd", 0, "--lambda-pe", 0)                       # then only what is named


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(1)
    save_checkpoint(segformer("b1", 3), tmp_path / "b1.pth")
    return tmp_path / "b1.pth"


# ---------------------------------------------------------------- an average of the weights

def test_average_against_a_plain_loop():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = WeightAverage(network, 0.9)
    mean = network[0].weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            network[0].weight.add_(torch.randn(2, 2))
        network(torch.randn(4, 2))
        average.update(network, step)
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * network[0].weight.detach()
    assert torch.allclose(average.model[0].weight, mean, atol=1e-5)
    assert average.model[1].num_batches_tracked == network[1].num_batches_tracked == 200
    assert not average.model[0].weight.requires_grad


def test_the_average_is_scored_kept_and_resumed_exactly(tmp_path, folder, teacher):
    flags = ("--data", folder, "--teacher", teacher, "--ema", 0.5, *SMALL, "--eval-every", 2)
    train_with(*flags, "--iters", 6, "--out", tmp_path / "whole")
    stopped = ("-c", STOPPED, *flags, "--iters", 6, "--out", tmp_path / "parts")
    assert "after step 3, all of it saved" in command(*stopped)
    train_with("--resume", "--out", tmp_path / "parts")
    assert same_runs(tmp_path / "whole", tmp_path / "parts")

    content = torch.load(tmp_path / "whole" / "last.pth", weights_only=True)
    raw = content["training"]["student"]
    moved = [name for name in raw if not torch.equal(raw[name], content["model"][name])]
    assert len(moved) > 200                                       # the file's network is the mean
    first = load_checkpoint(tmp_path / "whole" / "last.pth")
    assert torch.equal(first.state_dict()[moved[0]], content["model"][moved[0]])


STOPPED = """
import signal
import train
step = train.train_step
def third(*args):
    third.calls += 1
    if third.calls == 3:
        signal.raise_signal(signal.SIGTERM)
    return step(*args)
third.calls = 0
train.train_step = third
train.run_command(train.main)
"""


# ---------------------------------------------------------------- few labels

def test_the_first_frames_of_each_drive_keep_their_labels():
    stems = ["a_1", "a_2", "a_3", "a_4", "b_1", "b_2"]
    assert first_of_each_drive(stems, 0.5) == ["a_1", "a_2", "b_1"]
    assert first_of_each_drive(["one-2", "one-1", "one-3"], 0.5) == ["one-1", "one-2"]


def test_split_labelled_keeps_every_frame_once(folder, tmp_path):
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")
    labelled, others = split_labelled(dataset, 0.5)
    assert sorted(labelled.stems + others.stems) == sorted(dataset.stems)
    for part in (labelled, others):
        for i, stem in enumerate(part.stems):
            whole = dataset[dataset.stems.index(stem)]
            assert all(torch.equal(a, b) for a, b in zip(part[i], whole, strict=True))
    image, label = Unlabelled(others)[0]
    assert torch.equal(image, others[0][0]) and (label == IGNORE).all()
    with pytest.raises(UsageError, match="leaves 5 with labels and 0 without"):
        split_labelled(dataset, 1.0)


def test_a_share_that_drives_round_up_is_said(capsys, tmp_path):
    dataset = open_dataset(write_camvid(tmp_path), "train")
    drives = len(find_drives(dataset.stems))
    labelled, _ = split_labelled(dataset, 0.01)
    assert len(labelled) == drives
    said = capsys.readouterr().out
    assert f"keeps the labels of {drives} of {len(dataset)} frames" in said


def test_without_labels_every_pixel_is_taught():
    labels = torch.full((2, 3, 3), IGNORE)
    labels[0, 0, 0] = 2
    taught = labels_for_kl(labels)
    assert torch.equal(taught[0], labels[0]) and (taught[1] == 0).all()


def watch_batches(monkeypatch):
    """-> the labels of every step that is trained, in a list that fills"""
    seen = []
    step = train.train_step

    def watched(run, images, labels):
        seen.append(labels)
        return step(run, images, labels)

    monkeypatch.setattr(train, "train_step", watched)
    return seen


def test_with_a_teacher_half_of_each_batch_has_labels(tmp_path, folder, teacher, monkeypatch):
    seen = watch_batches(monkeypatch)
    out = tmp_path / "run"
    flags = ("--data", folder, *SMALL, "--iters", 2, "--labelled", 0.5)
    kl = (*SOME, "--lambda-kl", 1, "--temperature", 1)
    train_with(*flags, "--teacher", teacher, *kl, "--out", out)
    for labels in seen:
        assert (labels[0] != IGNORE).any() and (labels[1] == IGNORE).all()

    # the KL column is the mean over labelled pixels and all of the unlabelled frame's
    args, given = train.FLAGS.parse([str(f) for f in (
        *flags, "--teacher", teacher, *kl, "--out", tmp_path / "again")])
    run = train.prepare(args, given, train.RunLock())
    run.objective.train()
    train.seed_step(0, 0)
    images, labels = next(run.batches)
    images = images.float() / 255
    with torch.no_grad():
        student = F.interpolate(run.student(images), scale_factor=4, mode="bilinear")
        target = F.interpolate(run.teacher(images), scale_factor=4, mode="bilinear")
    p = target.softmax(1)
    pixel = (p * (target.log_softmax(1) - student.log_softmax(1))).sum(1)
    counted = labels != IGNORE
    counted[1] = True
    assert float(log(out)[0]["kl"]) == pytest.approx(pixel[counted].mean().item(), rel=1e-4)


def test_epochs_are_passes_over_labelled_and_unlabelled_frames(tmp_path, folder, teacher, capsys):
    result = train_with("--data", folder, *SMALL, "--epochs", 2, "--labelled", 0.5,
                        "--teacher", teacher, "--out", tmp_path / "run")
    recipe = json.loads((result.folder / "recipe.json").read_text())
    assert recipe["train_frames"] + recipe["unlabelled_frames"] == 5
    assert recipe["iters"] == 5                                   # 2 * 5 frames, 2 a step
    assert "5 steps of 2 images" in capsys.readouterr().out


def test_dice_of_a_part_without_labels_has_no_weight(tmp_path, folder, teacher):
    """--accum 2 of single images: of each pair one has labels."""
    flags = ("--data", folder, *SMALL, "--batch-size", 1, "--accum", 2, "--labelled", 0.5,
             "--teacher", teacher, *SOME, "--lambda-kl", 1, "--loss", "wce-dice")
    args, given = train.FLAGS.parse([str(f) for f in (*flags, "--out", tmp_path / "run")])
    run = train.prepare(args, given, train.RunLock())
    images, labels = next(run.batches)
    has_labels = (labels != IGNORE).flatten(1).any(1)
    assert has_labels.tolist() == [True, False]
    run.objective.eval()                                          # no drop-path: the same twice
    images = images.float() / 255
    with torch.no_grad():
        alone = dice_loss(run.student(images[:1]), labels[:1]).item()
    values = train.train_step(run, images, labels)
    place = list(run.objective.weights).index("dice")
    assert values[place].item() == pytest.approx(alone, rel=1e-5)


def test_without_a_teacher_only_labelled_frames_are_trained_on(tmp_path, folder, monkeypatch):
    seen = watch_batches(monkeypatch)
    result = train_with("--data", folder, *SMALL, "--iters", 2, "--labelled", 0.5,
                        "--out", tmp_path / "run")
    assert all((label != IGNORE).any() for labels in seen for label in labels)
    recipe = (result.folder / "recipe.json").read_text()
    assert '"train_frames": 3' in recipe and '"unlabelled_frames": 0' in recipe


# ---------------------------------------------------------------- other supervision

def test_cross_entropy_and_dice(tmp_path, folder):
    out = tmp_path / "run"
    train_with("--data", folder, *SMALL, "--iters", 1, "--loss", "wce-dice", "--lambda-dice", 0.25,
               "--out", out)
    row = log(out)[0]
    total = float(row["wce"]) + 0.25 * float(row["dice"])
    assert float(row["loss"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", ["enet", "sqrt", "none"])
def test_class_weights_reach_the_loss(tmp_path, folder, name):
    dataset = open_dataset(folder, "train")
    counts = np.zeros(3)
    for _, label in dataset:
        counts += np.bincount(label[label != IGNORE], minlength=3)
    shares = counts / counts.sum()
    expected = {"enet": 1 / np.log(1.10 + shares), "none": np.ones(3)}
    expected["sqrt"] = shares ** -0.5 / (shares ** -0.5).mean()
    args, given = train.FLAGS.parse([str(f) for f in (
        "--data", folder, *SMALL, "--iters", 1, "--class-weights", name, "--out", tmp_path / "r")])
    weights = train.prepare(args, given, train.RunLock()).objective.class_weight
    assert np.allclose(weights.numpy(), expected[name], rtol=1e-5)


def test_features_first_then_labels(tmp_path, folder, teacher):
    """Two runs: the teacher's features alone, then labels, from where the first one ended."""
    first = tmp_path / "first"
    flags = ("--data", folder, *SMALL, "--iters", 2)
    train_with(*flags, "--teacher", teacher, "--loss", "none", *SOME, "--lambda-fd", 1,
               "--out", first)
    assert list(log(first)[0]) == ["step", "lr", "loss", "fd", "grad_norm"]
    fresh = make_student(train.FLAGS.parse(["--seed", "0"])[0], ["a", "b", "c"], None)
    after = load_checkpoint(first / "last.pth")
    assert torch.equal(after.decoder.fuse.weight, fresh.decoder.fuse.weight)
    assert not torch.equal(after.stages[0].patch_embed.proj.weight,
                           fresh.stages[0].patch_embed.proj.weight)

    second = tmp_path / "second"
    train_with(*flags, "--init", first / "last.pth", "--out", second)
    assert list(log(second)[0]) == ["step", "lr", "loss", "wce", "grad_norm"]


@pytest.mark.parametrize("flags", [(), ("--lambda-fd", 0), ("--lambda-fd", 0, "--lambda-pe", 1)])
def test_the_teacher_alone_must_teach(flags, folder, teacher):
    given = ("--teacher", teacher, *flags) if flags else ()
    with pytest.raises(UsageError, match="--loss none leaves too little to learn from"):
        train_with("--data", folder, "--loss", "none", *given)


def test_frames_without_labels_need_a_loss_that_teaches_them(folder, teacher):
    off = ("--lambda-fd", 0, "--lambda-pe", 0)
    with pytest.raises(UsageError, match="--labelled with a --teacher needs a loss"):
        train_with("--data", folder, "--labelled", 0.5, "--teacher", teacher, *off)


def test_losses_that_stay_on_are_said(capsys):
    flags = ["--teacher", "b2.pth", "--lambda-cwd", "1"]
    train.FLAGS.note_unused(*train.FLAGS.parse(flags))
    assert ("note: beside cwd the default losses stay on, fd and pe: --lambda-fd 0 --lambda-pe 0 "
            "would leave them out") in capsys.readouterr().err
    for weight in ("0", "1"):
        more = ["--lambda-fd", weight, "--lambda-pe", weight]
        train.FLAGS.note_unused(*train.FLAGS.parse(flags + more))
    train.FLAGS.note_unused(*train.FLAGS.parse(["--teacher", "b2.pth", "--lambda-fd", "2"]))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["cosine", "gcos", "cwd", "dist", "zkl"])
def test_each_other_loss_trains(tmp_path, folder, teacher, name):
    out = tmp_path / "run"
    train_with("--data", folder, *SMALL, "--iters", 1, "--accum", 2, "--teacher", teacher, *SOME,
               f"--lambda-{name}", 1, "--out", out)
    row = log(out)[0]
    total = float(row["wce"]) + float(row[name])
    assert float(row[name]) > 0 and float(row["loss"]) == pytest.approx(total, rel=1e-5)
