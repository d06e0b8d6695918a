"""The bench: its counts are the published ones, its subjects run, its numbers reach the JSON."""

import argparse
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


def test_step_and_data_reach_the_json(tmp_path):
    output = command("bench.py", "data", "step", "--size", 64, 64, "--rounds", 1, "--device", "cpu", "--json", tmp_path / "bench.json", cwd=tmp_path)
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert list(results) == ["data", "step"]
    assert [row["augmented"] for row in results["data"]] == [False, True] and all(row["cached_seconds"] > 0 and row["decoded_seconds"] > 0 for row in results["data"])
    assert results["step"][-1]["macs"] > 5e8 and 0 < results["step"][-1]["arithmetic_limit"] < 1
    assert "arithmetic limit" in output and "memory limit" in output and "compil" not in output


def inline(subjects, rounds, warmup=2):
    """In place of `run_in_turns`: each subject once, in this process."""
    return {name: bench.Timing(bench.best_time(make(*args)[0], torch.device("cpu"), 1), 1.0, 1.0) for name, (_, make, args) in subjects.items()}


def test_losses_and_scaling_tables(monkeypatch, capsys):
    monkeypatch.setattr(bench, "run_in_turns", inline)
    monkeypatch.setattr(bench, "SCALES", [(32, 32), (512, 1024)])
    args = argparse.Namespace(size=[64, 64], batch=1, rounds=1, compile=False)
    rows = bench.bench_losses(args, torch.device("cpu"), torch.float32)
    assert [row["loss"] for row in rows] == list(bench.LOSSES) and all(row["difference"] < 1e-4 and row["ratio"] > 0 for row in rows)
    rows = bench.bench_scaling(args, torch.device("cpu"), torch.float32)
    assert rows[1]["rest_to_512x1024"] == 1 and all(row["ns_a_pixel"] > 0 and row["attention_1_ns"] > 0 for row in rows)
    output = capsys.readouterr().out
    assert all(name in output for name in bench.LOSSES) and "512x1024" in output


def test_macs_and_bytes_are_counted():
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    assert bench.macs_of(lambda: a @ b) == (3 * 5 * 7, 0)
    q = torch.rand(1, 2, 11, 4)
    assert bench.macs_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == (0, 2 * 2 * 11 * 11 * 4)
    x, depthwise = torch.rand(1, 6, 9, 9, requires_grad=True), torch.nn.Conv2d(6, 6, 3, padding=1, groups=6)
    assert bench.macs_of(lambda: depthwise(x).sum().backward()) == (3 * 81 * 6 * 9, 0)           # forward, gradient of x, of the weights
    assert bench.count_bytes(lambda: (a @ b).t().flatten(0)[:3]) >= 4 * (15 + 35 + 21) and bench.count_bytes(lambda: a.t()[1:]) == 0


@pytest.mark.parametrize("name", bench.LOSSES)
def test_plain_losses_are_ours(name):
    """The bench's second opinion: both sides of its table compute one number and, as they are timed with it, one gradient."""
    common = ((64, 96), 2, "cpu", torch.float32)
    plain, ours = (bench.loss_and_gradient(name, which, *common)[0]() for which in (False, True))
    assert plain.item() == pytest.approx(ours.item(), rel=1e-4)


def test_both_sides_of_the_comparisons_compute_the_same():
    """What peer and step time: transformers' outputs and first loss are ours, so the ratio is one of equals."""
    common = ((64, 96), 2, "cpu", torch.float32)
    theirs, ours = (bench.peer_inference(which, False, "b0", *common)[0]() for which in (False, True))
    assert (theirs - ours).abs().max() < 1e-5 * theirs.abs().max() + 1e-6
    theirs, ours = (bench.distillation_step(which, False, False, *common)[0]().item() for which in (False, True))
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert bench.training_step(True, False, *common)[0]().isfinite()


def test_16_bits_are_held_against_our_fp32(monkeypatch, capsys):
    monkeypatch.setattr(bench, "run_in_turns", inline)
    monkeypatch.setattr(bench, "rates", lambda device, dtype: (1e9, 1e9))          # a CPU without bf16 takes minutes for its product
    monkeypatch.setitem(bench.SIZES, "b2", bench.SIZES["b0"])
    args = argparse.Namespace(size=[32, 64], batch=1, rounds=1, compile=False)
    *_, half = bench.bench_peer(args, torch.device("cpu"), torch.bfloat16)
    assert half["variant"] == "b2" and half["to_our_fp32"] > 0 and 0.5 < half["same_class"] <= 1          # rounded, but the same network
    assert capsys.readouterr().out.count("x our fp32, the same class on") == 2


def test_mistakes_are_a_sentence():
    assert "unknown subject 'speed'" in command("bench.py", "speed", code=2)
    assert "at least 32" in command("bench.py", "--size", 8, 8, code=2)
