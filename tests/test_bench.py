"""The bench: its counts are the published ones, its subjects run, its numbers reach the JSON."""

import json

import pytest
import torch

import bench
from conftest import command


@pytest.mark.parametrize("variant, run, published, attention", [("b0", 5.01, 13.60, 4.16), ("b2", 36.28, 113.59, 15.57)])
def test_macs_at_the_papers_size(variant, run, published, attention):
    assert [round(count / 1e9, 2) for count in bench.count_macs(variant, "ln", (512, 1024))] == [run, published, attention]


def test_the_table_and_its_json(tmp_path):
    output = command("bench.py", "--size", 64, 64, "--rounds", 1, "--device", "cpu", "--json", tmp_path / "bench.json", cwd=tmp_path)
    model = json.loads((tmp_path / "bench.json").read_text())["results"]["model"]
    assert [row["parameters"] for row in model[:2]] == [27_361_235, 3_719_027] and all(row["fps_folded"] > 0 for row in model)
    assert "torch" in output and "threads" in output and "64x64" in output


def test_both_sides_of_the_comparisons_compute_the_same():
    """What peer and step time: transformers' outputs and first loss are ours, so the ratio is one of equals."""
    common = ((64, 96), 2, "cpu", torch.float32)
    theirs, ours = (bench.peer_inference(which, "b0", *common)[0]() for which in (False, True))
    assert (theirs - ours).abs().max() < 1e-5 * theirs.abs().max() + 1e-6
    theirs, ours = (bench.distillation_step(which, False, *common)[0]().item() for which in (False, True))
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert bench.training_step(True, *common)[0]().isfinite()


def test_mistakes_are_a_sentence():
    assert "unknown subject 'speed'" in command("bench.py", "speed", code=2)
    assert "at least 32" in command("bench.py", "--size", 8, 8, code=2)
