"""extras/bootstrap.py: intervals of a difference, over blocks of frames."""

import numpy as np
import pytest
import torch

from conftest import command, write_folder
from extras import bootstrap
from model import save_checkpoint, segformer


def confusions(frames, right, seed):
    """Frames of 100 pixels and two classes, of which about the share `right` is predicted right."""
    rng = np.random.default_rng(seed)
    hits = rng.binomial(50, right, (frames, 2))
    found = np.zeros((frames, 2, 2), np.int64)
    for c in range(2):
        found[:, c, c] = hits[:, c]
        found[:, c, 1 - c] = 50 - hits[:, c]
    return found


def test_blocks_are_neighbours_of_one_drive():
    stems = ["b_2", "a_3", "a_1", "b_1", "a_2"]
    assert bootstrap.blocks_of(stems, 2) == [[2, 4], [1], [3, 0]]
    assert bootstrap.blocks_of(["x-2", "x-1", "x-3"], 2) == [[1, 0], [2]]


def test_equal_networks_do_not_differ_and_a_better_one_does():
    first = confusions(60, 0.7, 0)
    blocks = bootstrap.blocks_of([f"a_{i:02d}" for i in range(60)], 5)
    assert (bootstrap.bootstrap(first, first, blocks, 200) == 0).all()
    draws = bootstrap.bootstrap(first, confusions(60, 0.9, 1), blocks, 500)
    assert np.percentile(draws, 2.5) > 0.15
    same = bootstrap.bootstrap(first, confusions(60, 0.7, 2), blocks, 500)
    assert np.percentile(same, 2.5) < 0 < np.percentile(same, 97.5)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Two equal networks, 200 test sets: the 95 % interval leaves zero out in about 5 % of them."""
    blocks = bootstrap.blocks_of([f"a_{i:02d}" for i in range(40)], 1)
    left_out = 0
    for trial in range(200):
        first = confusions(40, 0.7, 2 * trial)
        second = confusions(40, 0.7, 2 * trial + 1)
        low, high = np.percentile(bootstrap.bootstrap(first, second, blocks, 100), (2.5, 97.5))
        left_out += not low <= 0 <= high
    assert 2 <= left_out <= 26


def test_command_prints_drives_and_keeps_frames(tmp_path):
    folder = write_folder(tmp_path / "set")
    for seed, name in enumerate(("a.pth", "b.pth")):
        torch.manual_seed(seed)
        save_checkpoint(segformer("b0", 3), tmp_path / name)
    a, b = tmp_path / "a.pth", tmp_path / "b.pth"
    kept = tmp_path / "frames.npz"
    flags = ("--data", folder, "--split", "train", "--block", 2, "--draws", 100)
    output = command("-m", "extras.bootstrap", a, b, *flags, "--keep", kept)
    assert "5 frames, full resolution" in output and "95 % interval" in output
    with np.load(kept) as file:
        assert len(file["frames"]) == 5 and file[str(a)].shape == (5, 3, 3)
    assert "give two at least" in command("-m", "extras.bootstrap", a, code=2)

    output = command("-m", "extras.bootstrap", a, b, *flags, "--keep", tmp_path / "no/x", code=2)
    assert f"there is no folder {tmp_path / 'no'}" in output
    broken = segformer("b0", 3)
    torch.nn.init.constant_(broken.decoder.classifier.bias, torch.nan)
    save_checkpoint(broken, tmp_path / "nan.pth")
    output = command("-m", "extras.bootstrap", a, tmp_path / "nan.pth", *flags, code=2)
    assert f"{tmp_path / 'nan.pth'}: the network's output is not finite" in output


@pytest.mark.parametrize("stems, drives", [(["d1_1", "d1_2", "d2_1"], ["d1", "d2"])])
def test_drives_are_scored_apart(stems, drives, capsys):
    found = confusions(3, 0.8, 0)
    bootstrap.print_drives(["net"], {"net": found}, stems)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == drives
