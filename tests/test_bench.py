"""The bench: its counts are the published ones, equals are compared, its numbers reach the JSON."""

import json
import pickle
import re
from dataclasses import replace
from functools import partial

import pytest
import torch

import bench
import train
from conftest import ROOT, command
from extras import (
    bench_data,
    bench_losses,
    bench_teacher,
    bench_transformers,
    measure,
    roofline,
)
from extras.cli import UsageError
from extras.measure import Candidate, Options, Timing
from model import segformer

CPU = torch.device("cpu")
SMALL = Options(size=(64, 96), batch=2, rounds=1, device=CPU, dtype=torch.float32, classes=19)


def run_once(candidates, rounds, device):
    """In place of `run_in_turns`: each candidate once in this process, sent as to another one."""
    timings = {}
    for name, candidate in candidates.items():
        threads = torch.get_num_threads()
        run = pickle.loads(pickle.dumps(candidate)).make()
        timings[name] = Timing([measure.seconds_of(run, device)], first=1.0, peak=2 ** 20)
        torch.set_num_threads(threads)
    return timings


@pytest.fixture
def quick(monkeypatch):
    """No processes, no compiler, no large matrix product, few frames, and a B0 in B2's place."""
    for module in (bench, bench_transformers, bench_teacher, bench_losses, bench_data):
        monkeypatch.setattr(module, "run_in_turns", run_once)
    rates = roofline.Rates(1e9, 1e9)
    monkeypatch.setattr(bench_transformers, "measure_rates", lambda device, dtype: rates)
    few_frames = partial(bench_data.write_frames, frames=2, size=(64, 128))
    monkeypatch.setattr(bench_data, "write_frames", few_frames)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setitem(bench.SIZES, "b2", bench.SIZES["b0"])


def run_main(monkeypatch, tmp_path, *flags):
    """bench.main() with these flags -> the results in its JSON"""
    path = tmp_path / "bench.json"
    words = ["bench.py", *map(str, flags), "--device", "cpu", "--rounds", "1", "--json", str(path)]
    monkeypatch.setattr("sys.argv", words)
    bench.main()
    return json.loads(path.read_text())["results"]


# ---------------------------------------------------------------- the command

def test_the_table_and_its_json(tmp_path):
    path = tmp_path / "bench.json"
    output = command("bench.py", "--size", 64, 64, "--rounds", 1, "--device", "cpu", "--json", path,
                     cwd=tmp_path)
    rows = json.loads(path.read_text())["results"]["model"]
    assert [row["parameters"] for row in rows[:2]] == [27_361_235, 3_719_027]
    assert all(row["fps_folded"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert "torch" in output and "threads" in output and "64x64" in output


def check_limits(rows, size):
    """The last row of `step`: three passes of the student, its MLPs once more, and the encoder of
    the teacher, a B0 here too: some four forward passes."""
    *timed, limits = rows
    network = segformer("b0", 19)
    one_forward = sum(roofline.count_macs(lambda: network(torch.rand(2, 3, size, size))))
    assert 3.5 < limits["macs"] / one_forward < 4.5
    shortest = limits["macs"] / 1e9                               # seconds, at the rate of `quick`
    shares = [shortest / row["round_seconds"][0] for row in timed]
    assert any(limits["arithmetic_limit"] == pytest.approx(share) for share in shares)


def test_step_and_data_reach_the_json(quick, monkeypatch, tmp_path, capsys):
    results = run_main(monkeypatch, tmp_path, "data", "step", "--size", 64, 64)
    assert list(results) == ["data", "step"]
    assert [row["augmented"] for row in results["data"]] == [False, True]
    for row in results["data"]:
        assert row["cached_seconds"] > 0 and row["decoded_seconds"] > 0
    check_limits(results["step"], size=64)
    output = capsys.readouterr().out
    assert "step: batch 2, median of 1 rounds" in output
    assert "arithmetic limit" in output and "memory limit" in output and "compil" not in output


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_compiled_reach_the_json(quick, monkeypatch, tmp_path, capsys, dtype):
    """Ended in KeyError: 'name', with nothing written."""
    results = run_main(monkeypatch, tmp_path, "model", "peer", "step", "--size", 32, 64,
                       "--dtype", dtype, "--compile")
    assert list(results) == ["model", "peer", "step"]
    names = [row["name"] for row in results["peer"] if row["variant"] == "b2" and "seconds" in row]
    assert {"transformers, compiled", "ours, compiled", "ours, fp32"} <= set(names)
    half = results["peer"][-1]
    assert half["variant"] == "b2" and half["to_our_fp32"] > 0
    assert 0.5 < half["same_class"] <= 1                          # rounded, but the same network
    output = capsys.readouterr().out
    assert output.count("x our fp32, the same class on") == 2
    assert output.count("compiling took the first run") == 4      # model, B0, B2, the step


def test_what_was_measured_before_a_failure_is_written(quick, monkeypatch, tmp_path):
    def fail(options):
        raise UsageError("no")

    monkeypatch.setattr(bench_data, "bench_data", fail)
    with pytest.raises(UsageError):
        run_main(monkeypatch, tmp_path, "model", "data", "--size", 32, 32)
    assert list(json.loads((tmp_path / "bench.json").read_text())["results"]) == ["model"]


def test_other_subjects_are_imported_when_asked_for():
    code = "import sys, bench; print([name for name in sys.modules if 'extras.bench_' in name])"
    assert command("-c", code, cwd=ROOT).strip() == "[]"


def test_mistakes_are_a_sentence(tmp_path):
    assert "unknown subject 'speed'" in command("bench.py", "speed", code=2)
    assert "at least 32" in command("bench.py", "--size", 8, 8, code=2)
    assert "there is no folder" in command("bench.py", "--json", tmp_path / "no" / "x.json", code=2)


# ---------------------------------------------------------------- counting

@pytest.mark.parametrize("variant, run, published, attention",
                         [("b0", 5.01, 13.60, 4.16), ("b2", 36.28, 113.59, 15.57)])
def test_macs_at_the_papers_size(variant, run, published, attention):
    options = replace(SMALL, size=(512, 1024))
    macs = bench.network_macs(options, variant, "ln")
    assert [round(count / 1e9, 2) for count in macs] == [run, published, attention]


def test_table_says_what_its_macs_leave_out(quick, monkeypatch, tmp_path, capsys):
    eleven = run_main(monkeypatch, tmp_path, "--size", 64, 64, "--classes", 11)["model"]
    output = capsys.readouterr().out
    assert "11 classes, without attention products" in output
    assert re.search(r"as run +\+ attention", output)
    nineteen = run_main(monkeypatch, tmp_path, "--size", 64, 64)["model"]
    assert "19 classes, without attention products" in capsys.readouterr().out
    for few, many in zip(eleven, nineteen, strict=True):
        width = bench.SIZES["b0"]["width"]
        assert (few["classes"], many["classes"]) == (11, 19)
        assert many["parameters"] - few["parameters"] == 8 * (width + 1)
        assert many["macs_run"] - few["macs_run"] == 16 * 16 * 8 * width
        assert many["macs_attention"] == few["macs_attention"]


def test_macs_and_bytes_are_counted():
    a = torch.rand(3, 5)
    b = torch.rand(5, 7)
    assert roofline.count_macs(lambda: a @ b) == (3 * 5 * 7, 0)
    q = torch.rand(1, 2, 11, 4)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert roofline.count_macs(lambda: attend(q, q, q)) == (0, 2 * 2 * 11 * 11 * 4)
    x = torch.rand(1, 6, 9, 9, requires_grad=True)
    depthwise = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6)
    one_pass = 81 * 6 * 9
    # three passes: forward, gradient of x, gradient of the weights
    assert roofline.count_macs(lambda: depthwise(x).sum().backward()) == (3 * one_pass, 0)
    assert roofline.count_bytes(lambda: (a @ b).t().flatten(0)[:3]) >= 4 * (15 + 35 + 21)
    assert roofline.count_bytes(lambda: a.t()[1:]) == 0


# ---------------------------------------------------------------- taking turns

def make_failure():
    raise RuntimeError("broken while it was built")


def test_a_candidate_that_fails_is_a_sentence():
    with pytest.raises(UsageError, match="the broken one failed in its process"):
        measure.run_in_turns({"the broken one": Candidate(make_failure)}, 1, CPU)


def test_ratio_and_its_range_over_the_rounds():
    theirs = Timing([6.0, 8.0, 9.0], 1.0, None)
    ours = Timing([2.0, 4.0, 3.0], 1.0, None)
    ratio = measure.compare(theirs, ours)
    assert ratio.as_row() == {"ratio": 8 / 3, "ratio_min": 2, "ratio_max": 3}
    assert ratio.cells() == ("2.67", "2.00-3.00")


# ---------------------------------------------------------------- equals are compared

def test_both_sides_run_in_the_same_settings():
    """The allocator's setting and the compiler were ours alone, and so were the headlines."""
    options = replace(SMALL, compile=True)
    candidates = bench_transformers.candidates_of(bench_transformers.make_step, options)
    settings = {"transformers": [], "ours": []}
    for name, candidate in candidates.items():
        chosen, side = candidate.make.args
        assert name.split(",")[0] == side
        settings[side].append((candidate.keep_memory, chosen.compile))
    assert settings["ours"] == settings["transformers"]
    if measure.sys.platform == "linux":
        assert settings["ours"] == [(False, False), (True, False), (True, True)]


def test_ratios_are_of_one_setting():
    timings = {"transformers": Timing([8.0, 9.0], 1.0, 1), "ours": Timing([4.0, 3.0], 1.0, 1),
               "transformers, memory kept": Timing([3.0, 3.0], 1.0, 1),
               "ours, memory kept": Timing([2.0, 2.0], 1.0, 1)}
    if measure.sys.platform != "linux":
        pytest.skip("freed memory is kept under Linux only")
    rows = {row["name"]: row for row in bench_transformers.rows_of(timings, SMALL)}
    assert rows["ours"]["ratio"] == 8.5 / 3.5 and rows["ours, memory kept"]["ratio"] == 1.5
    assert rows["transformers, memory kept"]["ratio"] == rows["transformers"]["ratio"] == 1
    assert (rows["ours"]["ratio_min"], rows["ours"]["ratio_max"]) == (2, 3)
    assert rows["transformers"]["round_seconds"] == [8, 9]


def test_both_sides_have_the_fused_adamw(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "b2", bench.SIZES["b0"])
    optimizers = []
    adamw = torch.optim.AdamW

    def remember(*args, **kwargs):
        optimizers.append(adamw(*args, **kwargs))
        return optimizers[-1]

    monkeypatch.setattr(torch.optim, "AdamW", remember)
    for side in bench_transformers.SIDES:
        bench_transformers.make_step(SMALL, side)
    theirs, ours = optimizers
    assert theirs.defaults == ours.defaults and ours.defaults["fused"]


@pytest.mark.parametrize("name", bench_losses.LOSSES)
def test_plain_losses_are_ours(name):
    """The bench's second opinion: both sides of its table compute one number, with its gradient."""
    plain = bench_losses.make_loss(SMALL, name, "plain")()
    ours = bench_losses.make_loss(SMALL, name, "ours")()
    assert plain.item() == pytest.approx(ours.item(), rel=1e-4)


def test_both_sides_of_the_comparisons_compute_the_same():
    """What peer and step time: transformers' outputs and first loss are ours."""
    theirs = bench_transformers.make_peer_forward("b0", SMALL, "transformers")()
    ours = bench_transformers.make_peer_forward("b0", SMALL, "ours")()
    assert (theirs - ours).abs().max() < 1e-5 * theirs.abs().max() + 1e-6
    theirs = bench_transformers.make_step(SMALL, "transformers", training=False)().item()
    ours = bench_transformers.make_step(SMALL, "ours", training=False)().item()
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert bench_transformers.make_step(SMALL, "ours")().isfinite()


# ---------------------------------------------------------------- the other tables

def test_what_a_teacher_costs(quick, monkeypatch, tmp_path, capsys):
    """Asked or kept, the first step is the same."""
    first = {}
    for side in (bench_teacher.ASKED, bench_teacher.KEPT):
        step = bench_teacher.make_step(SMALL, side, tmp_path)
        torch.manual_seed(0)
        first[side] = step().tolist()
    assert first[bench_teacher.KEPT] == pytest.approx(first[bench_teacher.ASKED], rel=1e-3)

    monkeypatch.setattr(bench_teacher, "OTHER_LOSSES", {"CWD": ["--lambda-cwd", "1"]})
    rows = run_main(monkeypatch, tmp_path, "teacher", "--size", 64, 64)["teacher"]
    assert [row["name"] for row in rows] == [
        bench_teacher.ALONE, bench_teacher.ASKED, bench_teacher.KEPT, bench_teacher.ANSWER, "CWD"]
    assert rows[0]["ratio"] == 1 and rows[0]["batch"] == 2
    assert "answers kept" in capsys.readouterr().out


def test_what_each_loss_costs_is_a_step_with_that_loss_alone():
    """Every term of distillation that train.py has is there, once."""
    terms = [bench_teacher.make_run(SMALL, side).objective.weights
             for side in (bench_teacher.KEPT, *bench_teacher.OTHER_LOSSES)]
    assert all(len(weights) == 2 and weights["wce"] == 1 for weights in terms)
    found = {name for weights in terms for name in weights} - {"wce"}
    assert found == {term.name for term in train.DISTILLATION}


def test_losses_and_scaling_tables(quick, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SCALES", ((32, 32), (512, 1024)))
    options = replace(SMALL, size=(64, 64), batch=1)
    rows = bench_losses.bench_losses(options)
    assert [row["loss"] for row in rows] == list(bench_losses.LOSSES)
    assert all(row["difference"] < 1e-4 and row["ratio"] > 0 for row in rows)
    rows = bench.bench_scaling(options)
    assert rows[1]["rest_to_512x1024"] == 1
    assert all(row["ns_a_pixel"] > 0 and row["attention_1_ns"] > 0 for row in rows)
    output = capsys.readouterr().out
    assert all(name in output for name in bench_losses.LOSSES) and "512x1024" in output
