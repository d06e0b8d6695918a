"""The tables of docs/RESULTS.md and README.md: every number from the files, a hole said."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, command, wait_for_step
from extras import lever_table
from extras import paper_tables as tables

MARKS = """before
<!-- table 2: made -->
stale
<!-- end -->
between
<!-- intervals: made -->
<!-- end -->
<!-- rates: made -->
<!-- end -->
<!-- study: made -->
<!-- end -->
<!-- losses rates: made -->
<!-- end -->
<!-- losses rows: made -->
<!-- end -->
<!-- losses outcome: made -->
<!-- end -->
<!-- few labels rows: made -->
<!-- end -->
<!-- few labels outcome: made -->
<!-- end -->
<!-- record: made -->
<!-- end -->
<!-- levers: made -->
<!-- end -->
<!-- small rates: made -->
<!-- end -->
<!-- small rows: made -->
<!-- end -->
<!-- small outcome: made -->
<!-- end -->
<!-- bf16 rates: made -->
<!-- end -->
<!-- bf16 rows: made -->
<!-- end -->
<!-- bf16 outcome: made -->
<!-- end -->
after
"""


def make_tables(project, *flags, code=0):
    return command("-m", "extras.paper_tables", *flags, cwd=project, code=code)


def leave(folder, miou, seed=0, val=0.2, **recipe):
    """What reproduce.sh leaves of one run."""
    folder = folder / str(seed)
    folder.mkdir(parents=True)
    for name, value in (("test.json", miou), ("quarter.json", miou + 0.1)):
        result = {"miou": value, "macc": value + 0.01, "aacc": value + 0.02}
        result |= {"iou": [value, value], "acc": [value, value]}
        content = {"classes": ["a", "b"], "checkpoints": [result]}
        (folder / name).write_text(json.dumps(content))
    usual = {"iters": 10, "parameters": 123, "amp": "off", "teacher": None, "lr": 6e-4}
    (folder / "recipe.json").write_text(json.dumps(usual | recipe | {"seed": seed}))
    (folder / "log.csv").write_text("step,lr,loss\n1,0.1,2\n2,0.1,1\n")
    (folder / "scores.csv").write_text(f"step,miou\n1,0.1\n2,{val}\n")


@pytest.fixture
def project(tmp_path):
    """What the tables are made of: two seeds of B0, one of KD, one fold of the study."""
    (tmp_path / "results/bench").mkdir(parents=True)
    shutil.copy(ROOT / tables.BENCH, tmp_path / tables.BENCH)
    runs = tmp_path / "results/camvid-short"
    leave(runs / "b0", 0.30, 0)
    leave(runs / "b0", 0.34, 1)
    leave(runs / "b0-kd", 0.35, 1, teacher="runs/camvid-short/b2-0/last.pth")
    leave(runs / "b0-fd", 0.31, 0)
    leave(runs / "b0-fd", 0.33, 1, amp="bf16", teacher="runs/camvid-short/b2-2/last.pth")
    leave(runs / "b0-long", 0.50, iters=99)
    leave(runs / "b0-kd-long", 0.48, iters=99)
    leave(runs / "b2", 0.60, iters=99)
    leave(runs / "b2-tuned", 0.7, iters=98)
    for fold, miou in ((0, 0.2), (1, 0.4)):
        leave(runs / f"study-drive-{fold}-b0", miou)
        (runs / f"study-drive-{fold}-b0/0/quarter.json").unlink()  # the study has none
    leave(runs / "study-drive-0-b2", 0.9)
    leave(runs / "b0-kd-lr-1.2e-3", 0.45, 1)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/RESULTS.md").write_text(MARKS)
    summary = "before\n<!-- summary: made -->\n<!-- end -->\nafter\n"
    (tmp_path / "README.md").write_text(summary)
    return tmp_path


def test_tables_are_means_of_the_files(project):
    make_tables(project, "--figures")
    text = (project / "docs/RESULTS.md").read_text()
    assert text.startswith("before\n<!-- table 2: made -->\n| ") and text.endswith("after\n")
    assert "stale" not in text and "between" in text
    # MACs without attention, and its own
    assert "| B0 | 123 | 13.60 | 4.16 |" in text
    b0 = "| 10 | 2 | 32.00 +- 2.83 | 33.00 +- 2.83 | 34.00 +- 2.83 | 42.00 +- 2.83 |  |"
    assert b0 in text
    # to B0 of the same seed, not to the mean
    assert "| 10 | 1 | 35.00 | 36.00 | 37.00 | 45.00 | +1.00 |" in text
    cskd = "| 10 | 2 | 32.00 +- 1.41 | 33.00 +- 1.41 | 34.00 +- 1.41 | 42.00 +- 1.41 |"
    assert f"{cskd} +0.00 +- 1.41 |" in text
    # to B0 of the same steps; val comes last
    assert "| 99 | 1 | 50.00 | 51.00 | 52.00 | 60.00 |  | 20.00 |" in text
    assert "| 99 | 1 | 48.00 | 49.00 | 50.00 | 58.00 | -2.00 |" in text
    # the teacher's too
    assert "| 99 | 1 | 60.00 | 61.00 | 62.00 | 70.00 | +10.00 |" in text
    # not timed, and no plain B0 of as many steps
    no_b0 = "another teacher | 123 | - | - | - | 98 | 1 | 70.00 | 71.00 | 72.00 | 80.00 |  |"
    assert no_b0 in text
    assert "Not run yet: + Tanh; + Tanh + Linear;" in text
    assert "\nFrom the teacher of seed 2: CSKD alone (seed 1).\n" in text
    assert "\nWith --amp bf16: CSKD alone (seed 1).\n" in text
    assert "seed 0:" not in text
    assert "The plain B0s are all in fp32: to B0, these runs differ in precision too." in text
    # 0 +- t 1.414 / sqrt(2); one pair has no interval
    assert "| CSKD alone, against B0 | 0, 1 | +1.00, -1.00 | +0.00 | -12.71 to +12.71 |" in text
    assert "| + KD (CSKD + PEKD), against B0 | 1 | +1.00 | +1.00 | - |" in text
    # one fold is no mean of two
    assert "| B0 | 30.0 | 30.0 | 30.00 | 31.00 | 32.00 | 10 |" in text
    assert "90.0" not in text
    assert "| learning rate, seed 1 |" in text
    assert "| B0 | - | 34.00 (20.00) | - | - | - |" in text
    assert "| + KD (CSKD + PEKD) | - | 35.00 (20.00) | 45.00 (20.00) | - | - |" in text
    assert "B2, the teacher, folds of whole drives; B0, folds of shuffled frames" in text
    figures = {path.name for path in (project / "results/camvid-short").glob("*.png")}
    assert figures == {"loss.png", "miou.png", "radar.png"}
    make_tables(project)
    assert (project / "docs/RESULTS.md").read_text() == text      # made again, the same


def test_tuned_rows_are_held_against_the_plain_b0_that_is_best_on_val(project):
    """Not against one whose rate was chosen at another schedule: +6.64 was +6.44."""
    runs = project / "results/camvid-short"
    shutil.rmtree(runs / "b0-long")
    leave(runs / "b0-long", 0.50, 0, iters=99, val=0.56)
    leave(runs / "b0-long", 0.40, 1, iters=99, val=0.10)  # the other has no such seed: left out
    leave(runs / "b0-tuned", 0.45, 0, iters=99, val=0.55, lr=1.2e-3)
    leave(runs / "b0-kd-tuned", 0.58, 0, iters=99, lr=2.4e-3, amp="bf16")
    make_tables(project)
    text = (project / "docs/RESULTS.md").read_text()
    assert "| 99 | 1 | 58.00 | 59.00 | 60.00 | 68.00 | +8.00 |" in text
    # the tuned B0 itself is not the best
    assert "| 99 | 1 | 45.00 | 46.00 | 47.00 | 55.00 | -5.00 |" in text
    # at the paper's rate: the B0 of that rate
    assert "| 99 | 1 | 48.00 | 49.00 | 50.00 | 58.00 | -2.00 |" in text
    assert 'held against "B0, longer"' in text
    assert "(B0, longer 56.00; B0, longer, tuned 55.00)" in text
    (runs / "b0-tuned/0/scores.csv").write_text("step,miou\n1,0.7\n")
    make_tables(project)
    text = (project / "docs/RESULTS.md").read_text()
    assert "| 99 | 1 | 58.00 | 59.00 | 60.00 | 68.00 | +13.00 |" in text
    assert 'held against "B0, longer, tuned"' in text


def test_the_tables_in_the_files_are_those_of_the_results():
    """Nobody typed into them, and none was forgotten after a run."""
    for path, name, make in tables.TABLES:
        text = (ROOT / path).read_text()
        made = tables.insert(text, name, make(ROOT / "results/camvid-short"))
        assert made == text, f"{path}: {name}: run python -m extras.paper_tables"


def test_every_row_that_is_run_is_shown():
    script = (ROOT / "reproduce.sh").read_text()
    assert re.findall(r"^(?:teacher_)?row (\S+)", script, re.MULTILINE) == list(tables.ROWS)
    study = r'^ +(?:seeds=0 |teacher_)row "study-\$by-\$fold-(\S+)"'
    assert re.findall(study, script, re.MULTILINE) == ["b2", "b0", "kl-1.0", "kl-0.5"]
    rows = re.findall(r'^  row "(\S+)-lr-\$lr"', script, re.MULTILINE)
    rates = re.search(r"for lr in (3e-4.*);", script)[1].split()
    assert rows == ["b0", "b0-dyt", "b0-kd", "b0-dyt-fd"] == list(tables.RATE_ROWS)
    assert {f"-lr-{rate}" for rate in rates} | {""} == set(tables.RATES.values())
    assert set(tables.STUDY) == {"b2", "b0", "kl-1.0", "kl-0.5"}


def test_mistakes_are_a_sentence(project):
    quarter = project / "results/camvid-short/b0/1/quarter.json"
    quarter.rename(project / "elsewhere.json")
    assert "b0/1/quarter.json" in make_tables(project, code=2)
    (project / "elsewhere.json").rename(quarter)
    said = make_tables(project, "--schedule", "full", code=2)
    assert "holds no row b0 yet: DATA=camvid:DIR ./reproduce.sh full b0" in said
    readme = (project / "README.md").read_text()
    (project / "README.md").write_text("no marks")
    assert "README.md has no mark <!-- summary" in make_tables(project, code=2)
    assert (project / "docs/RESULTS.md").read_text() == MARKS     # all tables are written, or none
    (project / "README.md").write_text(readme)
    (project / "docs/RESULTS.md").write_text("no marks")
    assert "docs/RESULTS.md has no mark <!-- table 2" in make_tables(project, code=2)


def test_levers_are_told_from_their_recipes(tmp_path):
    """A row a run, by the size of the frames and its mIoU; one that did not end is left out. The
    gain is over the best plain row of these frames, mean over mean."""
    plain = {"iters": 5000, "lr": 6e-4, "augment": "plain", "scale_range": [0.5, 2.0],
             "input_size": [360, 480], "loss": "wce", "class_weights": [1.5, 2.5],
             "weight_decay": 0.0, "norm": "ln"}
    gentle = plain | {"augment": "segformer", "scale_range": [0.75, 1.5], "lr": 1.2e-3}
    many = plain | {"class_weights": "sqrt", "ema": 0.999, "weight_decay": 0.05,
                    "loss": "wce-dice"}
    faster = plain | {"lr": 1.2e-3}
    small = gentle | {"input_size": [288, 384]}
    rows = {
        "a/0": (plain, 5000, 0.5),
        "a/1": (plain, 5000, 0.51),
        "b/0": (gentle, 5000, 0.6),
        "c/1": (many, 5000, 0.4),
        "d/0": (many, 4000, 0.9),
        "e/0": (faster, 5000, 0.45),
        "f/0": (small, 5000, 0.7),
    }
    for name, (recipe, step, miou) in rows.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "recipe.json").write_text(json.dumps(recipe | {"seed": int(folder.name)}))
        (folder / "scores.csv").write_text(f"step,miou\n1,0.1\n{step},{miou}\n")
    assert lever_table.lever_rows(tmp_path) == [
        ["360x480", "gentle (scale 0.75-1.5)", "1.2e-3", "-", "5,000", "1", "60.00", "+9.50"],
        ["360x480", "resize and flip", "6e-4", "-", "5,000", "2", "50.50 (50.00, 51.00)", ""],
        ["360x480", "resize and flip", "1.2e-3", "-", "5,000", "1", "45.00", "-5.50"],
        ["360x480", "resize and flip", "6e-4",
         "wce-dice, class weights sqrt, weight decay 0.05, average of the weights, 0.999",
         "5,000", "1", "40.00", "-10.50"],
        ["288x384", "gentle (scale 0.75-1.5)", "1.2e-3", "-", "5,000", "1", "70.00", ""],
    ]


def test_the_record_has_a_row_a_run_and_no_val_score_of_frames_it_was_trained_on(tmp_path):
    recipe = {"iters": 6000, "class_weights": "sqrt", "lr": 2.4e-3, "with_val": False,
              "train_frames": 367}
    leave(tmp_path / "camvid-record/b0-dyt-fd", 0.5, val=0.6, **recipe)
    leave(tmp_path / "camvid-record/b0-dyt-fd-with-val", 0.55, val=0.9,
          **recipe | {"with_val": True, "train_frames": 468})
    same = ["sqrt", "2.4e-3", "6,000"]
    assert tables.record(tmp_path / "camvid-short").splitlines()[2:] == [
        "| " + " | ".join(cells) + " |" for cells in (
            ["B0 + DyT + CSKD", "train, 367", *same, "50.00", "51.00", "52.00", "60.00", "60.00"],
            ["B0 + DyT + CSKD", "train and val, 468", *same, "55.00", "56.00", "57.00", "65.00",
             "-"])]


# ---------------------------------------------------------------- reproduce.sh

SMALL = "--crop 32 32 --size 48 64 --workers 0 --batch-size 2"    # a step of it takes no time


@pytest.fixture
def clone(tmp_path):
    """A folder with the project's code and six frames like CamVid's -> (folder, environment)."""
    for path in (*ROOT.glob("*.py"), ROOT / "reproduce.sh"):
        (tmp_path / path.name).symlink_to(path)
    for split in ("train", "val", "test"):
        for folder in (split, f"{split}annot"):
            (tmp_path / "set" / folder).mkdir(parents=True)
        for drive in ("0001TP", "0006R0"):
            label = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64) % 12
            image = np.stack([label * 20] * 3, 2)
            name = f"{drive}_{split}.png"
            Image.fromarray(image).save(tmp_path / "set" / split / name)
            Image.fromarray(label).save(tmp_path / "set" / f"{split}annot" / name)
    ours = {
        "DATA": f"camvid:{tmp_path / 'set'}",
        "STEPS": "1",
        "FLAGS": SMALL,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return tmp_path, os.environ | ours


def reproduce(clone, *args, **variables):
    """Run reproduce.sh in the clone, with more environment variables -> the ended process."""
    project, env = clone
    return subprocess.run(["bash", "reproduce.sh", *args], cwd=project, env=env | variables,
                          capture_output=True, text=True, timeout=300)


def test_reproduce_runs_rows_scores_them_and_skips_what_is_done(clone, quick_python):
    """Rows of a step on six small frames, one with a fold; what lacks scores is scored again."""
    project, env = clone
    clone = (project, env | {"PATH": f"{quick_python}:{env['PATH']}"})
    made = project / "results/camvid-short"

    rows = ("short", "b0", "study-drive-1-b0")
    result = reproduce(clone, *rows)
    assert result.returncode == 0, result.stderr
    expected = {"b0/0/quarter.json"}
    for row in rows[1:]:
        files = ("log.csv", "recipe.json", "scores.csv", "test.json")
        expected |= {f"{row}/0/{name}" for name in files}
    found = {str(path.relative_to(made)) for path in made.glob("*/*/*")}
    assert {path for path in found if "b0/0" in path} == expected
    study = json.loads((made / "study-drive-1-b0/0/test.json").read_text())
    test = json.loads((made / "b0/0/test.json").read_text())
    quarter = json.loads((made / "b0/0/quarter.json").read_text())
    assert (test["split"], test["frames"], test["fold"]) == ("test", 2, None)
    assert (study["frames"], study["fold"]) == (3, 1)
    assert test["checkpoints"][0]["path"].endswith("b0-0/last.pth")
    assert quarter["resolution"] == "quarter"

    # all there: nothing to do
    assert reproduce(clone, *rows).stdout == ""

    # stopped while it scored
    (made / "b0/0/scores.csv").unlink()
    again = reproduce(clone, *rows)
    assert "resuming after step 1" in again.stdout
    assert (made / "b0/0/scores.csv").exists()

    # a clone: results of ours, no weights
    shutil.rmtree(project / "runs/camvid-short/b0-0")
    assert "student SegFormer-B0" in reproduce(clone, "short", "b0").stdout
    assert reproduce(clone, "short", "b0").stdout == ""

    # a teacher first, which nobody named
    taught = reproduce(clone, "short", "b0-kl-1", TEACHER="3", AMP="bf16").stdout
    teacher = json.loads((made / "b2/3/recipe.json").read_text())
    student = json.loads((made / "b0-kl-1/0/recipe.json").read_text())
    assert taught.index("student SegFormer-B2") < taught.index("student SegFormer-B0")
    assert (teacher["amp"], teacher["seed"], student["amp"]) == ("bf16", 3, "bf16")
    assert student["teacher"] == "runs/camvid-short/b2-3/last.pth"
    # FLAGS reach every row
    assert teacher["crop"] == student["crop"] == [32, 32]
    assert {path.name for path in made.iterdir()} == {"b0", "b0-kl-1", "b2", "study-drive-1-b0"}


def test_reproduce_does_not_score_half_a_run(clone):
    """train.py saves and exits with 0 when it is told to stop, and bash goes on."""
    project, env = clone
    command_line = ["bash", "-c", "trap '' TERM; exec bash reproduce.sh short b0"]
    cut = subprocess.Popen(command_line, cwd=project, env=env | {"STEPS": "9999"},
                           stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_step(cut, project / "runs/camvid-short/b0-0", 1)
    os.killpg(cut.pid, signal.SIGTERM)
    said = cut.communicate(timeout=60)[1]
    assert "b0-0 was stopped before step 9999" in said
    assert cut.returncode == 3
    assert not list((project / "results/camvid-short").glob("b0/0/*"))


def test_reproduce_says_what_it_needs(clone):
    assert "say where CamVid is" in reproduce(clone, "short", DATA="").stderr
    assert "reproduce.sh full" in reproduce(clone).stdout
