"""The tables of a registered study: every number from the files, the rate that was chosen, the
interval of a difference by hand.
"""

import json
import math
import re
import statistics

import pytest
from test_paper_tables import leave

from conftest import ROOT
from extras import registered_tables as tables
from extras.cli import UsageError
from extras.result_rows import interval

STUDY = "camvid-small"


def leave_rate(results, row, rate, val):
    folder = results / f"{STUDY}-rates" / f"{row}-lr{rate}" / "0"
    folder.mkdir(parents=True)
    (folder / "scores.csv").write_text(f"step,miou\n1,0.9\n2,{val}\n")
    (folder / "recipe.json").write_text(json.dumps({"iters": 2}))


def test_the_chosen_rate_is_the_best_on_val(tmp_path):
    leave_rate(tmp_path, "b0-dyt-fd", "6e-4", 0.31)
    leave_rate(tmp_path, "b0-dyt-fd", "2.4e-3", 0.35)
    leave_rate(tmp_path, "b0-dyt", "1.2e-3", 0.32)
    leave_rate(tmp_path, "b0-dyt-as-long", "6e-4", 0.30)
    lines = tables.rate_table(tmp_path, STUDY).splitlines()
    assert lines[0] == "| learning rate | 6e-4 | 1.2e-3 | 2.4e-3 |"
    assert lines[2:] == [
        "| B0 + DyT | - | **32.00** | - |",
        "| B0 + DyT + CSKD | 31.00 | - | **35.00** |",
        "| B0 + DyT, for as long as with CSKD | **30.00** | - | - |",
    ]


def test_rows_and_outcome_are_of_the_seeds_that_are_there(tmp_path):
    runs = tmp_path / f"{STUDY}-registered"
    taught = {0: 0.40, 1: 0.42, 2: 0.43}
    alone = {0: 0.39, 1: 0.40, 2: 0.42}
    for seed in taught:
        leave(runs / "b0-dyt-fd", taught[seed], seed, val=0.5, lr=2.4e-3, iters=1000)
        leave(runs / "b0-dyt-as-long", alone[seed], seed, val=0.4, lr=1.2e-3, iters=1325)
    leave(runs / "b0-dyt", 0.41, 1)
    rows = tables.row_table(tmp_path, STUDY).splitlines()[2:]
    assert rows[0].startswith("| B0 + DyT | 6e-4 | 10 | 1 | 41.00 |")
    sd = statistics.stdev([40, 42, 43])
    assert rows[1].startswith(f"| B0 + DyT + CSKD | 2.4e-3 | 1,000 | 3 | 41.67 +- {sd:.2f} |")
    assert rows[2].startswith("| B0 + DyT, for as long as with CSKD | 1.2e-3 | 1,325 | 3 | ")
    assert len(rows) == 3

    differences = [1.0, 2.0, 1.0]
    mean = statistics.mean(differences)
    half = 4.303 * statistics.stdev(differences) / math.sqrt(3)
    outcome = tables.outcome_table(tmp_path, STUDY).splitlines()[2:]
    assert outcome[0] == (
        "| B0 + DyT + CSKD, against B0 + DyT, for as long as with CSKD | 0, 1, 2 "
        f"| +1.00, +2.00, +1.00 | +1.33 | {mean - half:+.2f} to {mean + half:+.2f} |")
    assert outcome[1] == "| B0 + DyT + CSKD, against B0 + DyT | 1 | +1.00 | +1.00 | - |"
    assert len(outcome) == 2


def test_seeds_of_two_rates_are_no_row(tmp_path):
    runs = tmp_path / f"{STUDY}-registered"
    leave(runs / "b0", 0.40, 0, lr=1.2e-3)
    leave(runs / "b0", 0.41, 1, lr=2.4e-3)
    with pytest.raises(UsageError, match="b0: its seeds have --lr 0.0012 and 0.0024"):
        tables.row_table(tmp_path, STUDY)


def test_the_interval_of_many_seeds_is_an_interval():
    assert interval([0.01]) == "-"
    assert interval([0.01, 0.02, 0.01, 0.02, 0.01, 0.02]) == "+0.93 to +2.07"


def test_the_readme_has_six_rows_and_holds_them_against_plain_b0(tmp_path):
    runs = tmp_path / f"{STUDY}-registered"
    leave(runs / "teacher", 0.50, 0, lr=1.2e-3, iters=3000)
    for seed, (plain, taught) in enumerate(((0.40, 0.42), (0.41, 0.44))):
        leave(runs / "b0", plain, seed, lr=1.2e-3, iters=1000)
        leave(runs / "b0-dyt-fd", taught, seed, lr=2.4e-3, iters=1000)
    leave(runs / "b0-dyt-cwd", 0.45, 0)                           # no row of the README's
    assert tables.summary_table(tmp_path, STUDY).splitlines()[2:] == [
        "| B2 + DyT, the teacher | 1.2e-3 | 3,000 | 1 | 50.00 |  |",
        "| B0 | 1.2e-3 | 1,000 | 2 | 40.50 +- 0.71 |  |",
        "| B0 + DyT + CSKD | 2.4e-3 | 1,000 | 2 | 43.00 +- 1.41 | +2.50 +- 0.71 |",
    ]


def test_losses_are_held_against_no_teacher_for_as_long(tmp_path):
    runs = tmp_path / f"{STUDY}-registered"
    leave(runs / "b0-dyt-as-long", 0.40, 0, lr=2.4e-3, iters=1403)
    leave(runs / "b0-dyt-kd", 0.43, 0, lr=4.8e-3, iters=912)
    leave(runs / "b0-dyt-cwd", 0.39, 0, lr=2.4e-3, iters=1169)
    assert tables.losses_outcome(tmp_path, STUDY).splitlines()[2:] == [
        "| B0 + DyT + CSKD + PEKD, against B0 + DyT, for as long as with CSKD "
        "| 0 | +3.00 | +3.00 | - |",
        "| B0 + DyT + CWD, against B0 + DyT, for as long as with CSKD | 0 | -1.00 | -1.00 | - |",
    ]


def test_few_labels_have_tables_of_their_own(tmp_path):
    runs = tmp_path / f"{STUDY}-registered"
    leave(runs / "few-0.25-teacher", 0.35, 0, lr=1.2e-3, iters=2000)
    for seed, (alone, taught) in enumerate(((0.30, 0.33), (0.31, 0.35))):
        leave(runs / "few-0.25-alone", alone, seed, lr=2.4e-3, iters=1576)
        leave(runs / "few-0.25-taught", taught, seed, lr=4.8e-3, iters=1000)
    rows = tables.few_labels_table(tmp_path, STUDY).splitlines()[2:]
    assert [row.split(" | ")[:4] for row in rows] == [
        ["| a quarter of the labels: B2 + DyT, the teacher", "1.2e-3", "2,000", "1"],
        ["| a quarter of the labels: B0 + DyT", "2.4e-3", "1,576", "2"],
        ["| a quarter of the labels: B0 + DyT, taught on all frames", "4.8e-3", "1,000", "2"],
    ]
    (outcome,) = tables.few_labels_outcome(tmp_path, STUDY).splitlines()[2:]
    assert " | 0, 1 | +3.00, +4.00 | +3.50 | " in outcome
    assert len(tables.row_table(tmp_path, STUDY).splitlines()) == 2
    assert len(tables.outcome_table(tmp_path, STUDY).splitlines()) == 2


def test_nothing_that_was_not_run_is_in_a_table(tmp_path):
    for make in (tables.rate_table, tables.row_table, tables.outcome_table, tables.summary_table,
                 tables.few_labels_table, tables.few_labels_outcome):
        assert len(make(tmp_path, STUDY).splitlines()) == 2       # the head alone


def test_every_row_of_the_study_has_its_title():
    script = (ROOT / "reproduce.sh").read_text()
    rows = re.search(r"^  ROWS=\((.*)\)", script, re.MULTILINE)[1].split()
    secondary = re.search(r"^  SECONDARY=\((.*)\)", script, re.MULTILINE)[1].split()
    assert set(rows + secondary) <= set(tables.ROWS) and set(tables.SUMMARY) <= set(tables.ROWS)
    for name, base in tables.PAIRS:
        assert {name, base} <= set(tables.ROWS)
    for name, base in tables.FEW_LABELS_PAIRS:
        assert {name, base} <= set(tables.FEW_LABELS)
