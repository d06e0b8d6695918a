"""train.py --fit-log: what a run fits, against the plain loss and scores of its last checkpoint."""

import csv

import numpy as np
import pytest
import torch
from test_train import SMALL, train_with

from conftest import write_folder
from data import open_dataset
from eval import evaluate, scores
from extras.fit_log import COLUMNS, measure_fit
from losses import class_weights, weighted_cross_entropy
from model import load_checkpoint


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_fit_is_what_the_checkpoint_does_on_whole_frames(tmp_path, folder):
    out = tmp_path / "run"
    train_with("--data", folder, *SMALL, "--iters", 4, "--eval-every", 2, "--fit-log", "--out", out)
    rows = read(out / "fit.csv")
    assert list(rows[0]) == list(COLUMNS) and [row["step"] for row in rows] == ["2", "4"]
    assert 0 < float(rows[0]["seconds"]) < float(rows[1]["seconds"])

    model = load_checkpoint(out / "last.pth")
    for split in ("train", "val"):
        dataset = open_dataset(folder, split)
        miou = scores(evaluate(model, dataset))["miou"]
        assert float(rows[1][f"{split}_miou"]) == pytest.approx(miou, abs=1e-5)

    # the loss is one mean over all frames' pixels
    dataset = open_dataset(folder, "train")
    counts = np.zeros(256)
    for _, label in dataset:
        counts += np.bincount(label.flatten(), minlength=256)
    weight = class_weights(counts[:3])
    images = torch.stack([image for image, _ in dataset])
    labels = torch.stack([label for _, label in dataset])
    with torch.no_grad():
        loss = weighted_cross_entropy(model(images.float() / 255), labels, weight).item()
    assert float(rows[1]["train_loss"]) == pytest.approx(loss, rel=1e-4)
    assert measure_fit(model, dataset, [0], weight, None)[0] != pytest.approx(loss, rel=1e-4)


def test_seconds_go_on_after_a_resume(tmp_path, folder):
    out = tmp_path / "run"
    train_with("--data", folder, *SMALL, "--iters", 2, "--eval-every", 2, "--fit-log", "--out", out)
    train_with("--resume", "--iters", 4, "--out", out)
    rows = read(out / "fit.csv")
    assert [row["step"] for row in rows] == ["2", "4"]
    assert float(rows[1]["seconds"]) > float(rows[0]["seconds"])
