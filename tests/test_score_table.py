"""The table in its formats, seeds as one row, and which runs are seeds of one recipe."""

import csv
import io
import json
import math
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, command
from extras.cli import UsageError
from extras.plots import mean_line, merge_results
from extras.score_table import Column, shorten, write_table
from extras.seed_groups import group_runs
from model import save_checkpoint, segformer

CLASSES = ["road", "sky_&"]


def result(road, sky):
    mean = (road + sky) / 2
    return {"miou": mean, "macc": mean, "aacc": road, "iou": [road, sky], "acc": [road, sky]}


ONE = Column("one", [result(0.5, 0.25)], [0])
TWO = Column("two|x", [result(0.75, math.nan)], [0])
PLAIN = Column("plain", [result(0.40, 0.20), result(0.50, 0.30)], [0, 1])
BETTER = Column("better", [result(0.45, 0.25), result(0.57, 0.37), result(0.9, 0.9)], [0, 1, 2])


def test_text_is_as_it_was():
    assert write_table([ONE, Column("b", [result(1, 0)])], CLASSES) == "\n".join([
        "IoU, %                 one         b    diff",
        "-" * 44,
        "road                 50.00    100.00  +50.00",
        "sky_&                25.00      0.00  -25.00",
        "-" * 44,
        "mIoU                 37.50     50.00  +12.50",
        "mAcc                 37.50     50.00  +12.50",
        "aAcc                 50.00    100.00  +50.00",
    ])


def test_markdown_and_latex_escape_names():
    text = write_table([ONE, TWO], CLASSES, "md")
    lines = text.splitlines()
    assert lines[0] == "| IoU, % | one | two\\|x | diff |"
    assert lines[1] == "| --- | --- | --- | --- |"
    assert lines[2] == "| road | 50.00 | 75.00 | +25.00 |"
    assert lines[3] == "| sky_& | 25.00 | - | - |"
    text = write_table([PLAIN, TWO], CLASSES, "tex")
    assert r"IoU, \% & plain & two|x & diff \\" in text and r"sky\_\& & $25.00 \pm 7.07$" in text
    assert text.startswith(r"\begin{tabular}{lrrr}") and text.endswith(r"\end{tabular}")


def test_seeds_are_mean_and_deviation_and_differences_are_paired():
    text = write_table([PLAIN, BETTER], CLASSES, grouped=True)
    rows = {line.split()[0]: line for line in text.splitlines() if line.split()}
    plain_miou = [30, 40]
    better_miou = [35, 47, 90]
    deviation = statistics.stdev(better_miou)
    assert f"{statistics.mean(better_miou):.2f} +- {deviation:.2f}" in rows["better"]
    assert f"35.00 +- {statistics.stdev(plain_miou):.2f}" in rows["plain"]
    assert "+6.00 +- 1.41" in rows["better"]                      # of 5 and 7, seeds 0 and 1
    assert rows["plain"].split()[1] == "2" and rows["better"].split()[1] == "3"
    assert "45.00 +- 7.07" in rows["road"] and "+6.00 +- 1.41" in rows["road"]
    partly = Column("partly", BETTER.results, seeds=[None, 1, 0])
    text = write_table([PLAIN, partly], CLASSES, grouped=True)
    assert "+33.50 +- 37.48" in text                              # 47 - 40 and 90 - 30
    unknown = Column("unknown", BETTER.results)                   # of no known seed: the means
    text = write_table([PLAIN, unknown], CLASSES, grouped=True)
    assert "+22.33" in text.splitlines()[3] and "+22.33 +-" not in text


def test_csv_is_for_machines():
    rows = list(csv.DictReader(io.StringIO(write_table([PLAIN, BETTER], CLASSES, "csv", True))))
    assert [row["name"] for row in rows] == ["plain", "better"]
    assert rows[0]["seeds"] == "2" and float(rows[0]["IoU sky_&"]) == 25
    assert float(rows[0]["mIoU deviation"]) == pytest.approx(statistics.stdev([30, 40]), abs=1e-4)
    rows = list(csv.DictReader(io.StringIO(write_table([TWO], CLASSES, "csv"))))
    assert rows[0]["IoU sky_&"] == "" and "seeds" not in rows[0]


def test_long_names_keep_their_ends():
    assert shorten("runs/" + "x" * 30 + "/best.pth").endswith("x/best.pth")


# ---------------------------------------------------------------- which runs are seeds

def write_recipe(folder, **recipe):
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps({"lr": 1e-3, "teacher": None, **recipe}))
    return folder


def test_runs_of_one_recipe_are_found(tmp_path):
    runs = [write_recipe(tmp_path / "kd" / str(i), seed=i, out=f"kd/{i}",
                         teacher=str(tmp_path / "b2" / str(i) / "best.pth")) for i in range(3)]
    for i in range(3):
        write_recipe(tmp_path / "b2" / str(i), seed=i)
    runs += [write_recipe(tmp_path / f"plain-lr2-seed{i}", seed=i, lr=2e-3) for i in range(2)]
    runs += [write_recipe(tmp_path / "plain-lr3-seed0", seed=0, lr=3e-3)]
    groups = group_runs(runs)
    found = [(group.name, group.members, group.seeds) for group in groups]
    assert found == [("kd", [0, 1, 2], [0, 1, 2]), ("plain-lr2", [3, 4], [0, 1]),
                     ("plain-lr3-seed0", [5], [0])]


def test_teachers_tell_recipes_apart(tmp_path):
    """The second one too, and whether it is the best or the last checkpoint of a run."""
    write_recipe(tmp_path / "t", seed=0)
    best = str(tmp_path / "t/best.pth")
    last = str(tmp_path / "t/last.pth")
    teachers = [{"teacher": best}, {"teacher": last}, {"teacher": best, "second_teacher": last}]
    runs = []
    for i, flags in enumerate(teachers):
        runs.append(write_recipe(tmp_path / "r" / str(i), seed=i, **flags))
    assert [group.members for group in group_runs(runs)] == [[0], [1], [2]]


def test_recipes_from_before_a_flag_go_with_those_where_it_is_off(tmp_path):
    old = {"lambda_kl": 0.0, "temperature": 1.0, "class_weights": [3.1, 4.2], "fold": None}
    new = {"lambda_kl": 0.0, "temperature": 4.0, "class_weights": "enet",
           "class_weight": [3.1, 4.2], "fold": None, "ema": None,
           "lambda_cwd": 0.0, "cwd_temperature": 4.0, "fit_log": True}
    runs = [write_recipe(tmp_path / "r" / "0", seed=0, **old),
            write_recipe(tmp_path / "r" / "1", seed=1, **new)]
    others = [{"ema": 0.999}, {"fold": 0}, {"lambda_cwd": 1.0}, {"class_weights": "sqrt"},
              {"lambda_kl": 1.0}, {"lambda_kl": 1.0, "temperature": 1.0}]
    for i, other in enumerate(others, 2):
        runs.append(write_recipe(tmp_path / "r" / str(i), seed=i, **(new | other)))
    members = [group.members for group in group_runs(runs)]
    assert members == [[0, 1], [2], [3], [4], [5], [6], [7]]


def test_names_group_too_and_differences_are_said(tmp_path, capsys):
    runs = [write_recipe(tmp_path / "a", seed=0), write_recipe(tmp_path / "b", seed=1, lr=9)]
    runs.append(tmp_path / "nothing")
    groups = group_runs(runs, ["x", "x", "x"])
    assert len(groups) == 1 and groups[0].seeds == [0, 1, None]
    assert "'x' differ in lr" in capsys.readouterr().err


def test_what_cannot_be_grouped_is_said(tmp_path):
    one = write_recipe(tmp_path / "a", seed=0)
    other = write_recipe(tmp_path / "b", seed=0)
    with pytest.raises(UsageError, match="have one seed"):
        group_runs([one, other])
    with pytest.raises(UsageError, match=r"there is no recipe.json.*--names"):
        group_runs([one, tmp_path])
    (one / "recipe.json").write_text("[")
    with pytest.raises(UsageError, match="not a recipe that can be read"):
        group_runs([one])


# ---------------------------------------------------------------- figures and the command

def test_a_band_is_over_the_steps_that_all_seeds_have():
    one = (np.array([1, 2, 3]), np.array([1.0, 2.0, 3.0]))
    other = (np.array([2, 3, 4]), np.array([4.0, 7.0, 9.0]))
    steps, mean, deviation = mean_line([one, other])
    assert steps.tolist() == [2, 3] and mean.tolist() == [3, 5]
    assert deviation == pytest.approx([math.sqrt(2), math.sqrt(8)])
    merged = merge_results([{**result(0.2, 0.4), "confusion": [[1, 2], [3, 4]]},
                            {**result(0.4, 0.8), "confusion": [[1, 0], [0, 1]]}])
    assert merged["iou"] == pytest.approx([0.3, 0.6]) and merged["confusion"] == [[2, 2], [3, 5]]


@pytest.fixture
def seeds(tmp_path):
    """Two seeds of one recipe and a run of another, with logs."""
    paths = []
    for name, seed, lr in (("kd/0", 0, 1), ("kd/1", 1, 1), ("plain/0", 0, 2)):
        folder = write_recipe(tmp_path / name, seed=seed, lr=lr)
        torch.manual_seed(len(paths))
        save_checkpoint(segformer("b0", 3), folder / "best.pth")
        (folder / "log.csv").write_text("step,loss\n1,2.0\n2,1.0\n")
        (folder / "scores.csv").write_text(f"step,miou\n1,0.{seed + 1}\n2,0.5\n")
        paths.append(folder / "best.pth")
    return paths


def test_the_command_groups_and_draws(seeds, folder, tmp_path):
    output = command("eval.py", *seeds, "--data", folder, "--group", "--plot", tmp_path / "figures")
    assert " +- " in output and "mIoU to the first" in output
    row, = (line for line in output.splitlines() if line.startswith("kd "))
    assert row.split()[1] == "2"
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert written == ["confusion_1.png", "confusion_2.png", "loss.png", "miou.png", "radar.png"]
    runs = [path.parent for path in seeds]
    output = command("-m", "extras.plots", *runs, "--group", "--out", tmp_path / "two")
    assert str(tmp_path / "two" / "miou.png") in output

    other = seeds[0].with_name("last.pth")
    shutil.copyfile(seeds[0], other)
    output = command("eval.py", seeds[0], other, "--data", folder, "--group", code=2)
    assert "have one seed" in output
    output = command("eval.py", *seeds[:2], "--data", folder, "--names", "a", "a", code=2)
    assert "with --group they are one column" in output


def test_only_the_table_is_on_stdout_where_it_is_not_text(seeds, folder):
    args = [sys.executable, str(ROOT / "eval.py"), *map(str, seeds), "--data", folder, "--group",
            "--names", "kd", "kd", "plain", "--format", "csv"]
    ended = subprocess.run(args, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    rows = list(csv.DictReader(io.StringIO(ended.stdout)))
    assert [row["name"] for row in rows] == ["kd", "plain"] and rows[0]["mIoU deviation"]
    assert "scored at the labels' full resolution" in ended.stderr
