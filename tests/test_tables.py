"""The README's tables: every number from the files, a hole said, nothing typed."""

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

import tables
from conftest import ROOT, command, wait_for_step


def leave(folder, miou, seed=0, iters=10, classes=("a", "b"), amp="off", teacher=None):
    """What reproduce.sh leaves of one run."""
    folder = folder / str(seed)
    folder.mkdir(parents=True)
    for name, value in (("test.json", miou), ("quarter.json", miou + 0.1)):
        result = dict(miou=value, macc=value + 0.01, aacc=value + 0.02, iou=[value, value], acc=[value, value])
        (folder / name).write_text(json.dumps(dict(classes=classes, checkpoints=[result])))
    (folder / "recipe.json").write_text(json.dumps(dict(seed=seed, iters=iters, parameters=123, amp=amp, teacher=teacher)))
    (folder / "log.csv").write_text("step,lr,loss\n1,0.1,2\n2,0.1,1\n")
    (folder / "scores.csv").write_text("step,miou\n1,0.1\n2,0.2\n")


@pytest.fixture
def project(tmp_path):
    """A copy of what tables.py reads, with two seeds of B0, one of KD, and one fold of the study."""
    (tmp_path / "results/bench").mkdir(parents=True)
    shutil.copy(ROOT / tables.BENCH, tmp_path / tables.BENCH)
    runs = tmp_path / "results/camvid-short"
    leave(runs / "b0", 0.30, 0), leave(runs / "b0", 0.34, 1), leave(runs / "b0-kd", 0.35, 1, teacher="runs/camvid-short/b2-0/last.pth")
    leave(runs / "b0-fd", 0.31, 0), leave(runs / "b0-fd", 0.33, 1, amp="bf16", teacher="runs/camvid-short/b2-2/last.pth")
    leave(runs / "b0-long", 0.50, iters=99), leave(runs / "b0-kd-long", 0.48, iters=99), leave(runs / "b2", 0.60, iters=99), leave(runs / "b2-tuned", 0.7, iters=99)
    for fold, miou in ((0, 0.2), (1, 0.4)):
        leave(runs / f"study-drive-{fold}-b0", miou)
        (runs / f"study-drive-{fold}-b0/0/quarter.json").unlink()                    # the study has none
    leave(runs / "study-drive-0-b2", 0.9)
    leave(runs / "b0-kd-lr-1.2e-3", 0.45, 1)
    (tmp_path / "README.md").write_text("before\n<!-- table 2: made -->\nstale\n<!-- end -->\nbetween\n<!-- rates: made -->\n<!-- end -->\n<!-- study: made -->\n<!-- end -->\nafter\n")
    return tmp_path


def test_tables_are_means_of_the_files(project):
    command(ROOT / "tables.py", "--figures", cwd=project)
    text = (project / "README.md").read_text()
    assert text.startswith("before\n<!-- table 2: made -->\n| ") and text.endswith("after\n") and "stale" not in text and "between" in text
    assert "| B0 | 123 | 13.60 |" in text and "| 10 | 2 | 32.00 +- 2.83 | 33.00 +- 2.83 | 34.00 +- 2.83 | 42.00 +- 2.83 |  |" in text
    assert "| 10 | 1 | 35.00 | 36.00 | 37.00 | 45.00 | +1.00 |" in text         # to B0 of the same seed, not to the mean
    assert "| 10 | 2 | 32.00 +- 1.41 | 33.00 +- 1.41 | 34.00 +- 1.41 | 42.00 +- 1.41 | +0.00 +- 1.41 |" in text
    assert "| 99 | 1 | 50.00 | 51.00 | 52.00 | 60.00 |  |" in text and "| 99 | 1 | 48.00 | 49.00 | 50.00 | 58.00 | -2.00 |" in text       # of the same steps
    assert "| 99 | 1 | 60.00 | 61.00 | 62.00 | 70.00 | +10.00 |" in text         # the teacher's too
    assert "another teacher | 123 | - | - | 99 | 1 | 70.00 | 71.00 | 72.00 | 80.00 |  |" in text         # not timed, and no tuned B0 yet
    assert "Not run yet: + Tanh; + Tanh + Linear;" in text
    assert "\nFrom the teacher of seed 2: CSKD alone (seed 1).\n" in text and "\nWith --amp bf16: CSKD alone (seed 1).\n" in text and "seed 0:" not in text
    assert "| B0 | 30.0 | 30.0 | 30.00 | 31.00 | 32.00 | 10 |" in text and "90.0" not in text      # one fold is no mean of two
    assert "| learning rate, seed 1 |" in text and "| B0 | - | 34.00 (20.00) | - | - | - |" in text and "| + KD (CSKD + PEKD) | - | 35.00 (20.00) | 45.00 (20.00) | - | - |" in text
    assert "B2, the teacher, folds of whole drives; B0, folds of shuffled frames" in text
    assert {path.name for path in (project / "results/camvid-short").glob("*.png")} == {"loss.png", "miou.png", "radar.png"}
    command(ROOT / "tables.py", cwd=project)
    assert (project / "README.md").read_text() == text             # made again, the same


def test_every_row_that_is_run_is_shown():
    script = (ROOT / "reproduce.sh").read_text()
    assert re.findall(r"^(?:teacher_)?row (\S+)", script, re.MULTILINE) == list(tables.ROWS)
    assert re.findall(r'^ +(?:seeds=0 |teacher_)row "study-\$by-\$fold-(\S+)"', script, re.MULTILINE) == ["b2", "b0", "kl-1.0", "kl-0.5"]
    rows, rates = re.findall(r'^  row "(\S+)-lr-\$lr"', script, re.MULTILINE), re.search(r"for lr in (.*);", script)[1].split()
    assert rows == ["b0", "b0-dyt", "b0-kd", "b0-dyt-fd"] and {f"-lr-{rate}" for rate in rates} | {""} == set(tables.RATES.values())
    assert set(tables.STUDY) == {"b2", "b0", "kl-1.0", "kl-0.5"}


def test_mistakes_are_a_sentence(project):
    (project / "results/camvid-short/b0/1/quarter.json").rename(project / "elsewhere.json")
    assert "b0/1/quarter.json" in command(ROOT / "tables.py", cwd=project, code=2)
    (project / "elsewhere.json").rename(project / "results/camvid-short/b0/1/quarter.json")
    assert "holds no row b0 yet: DATA=camvid:DIR ./reproduce.sh full b0" in command(ROOT / "tables.py", "--schedule", "full", cwd=project, code=2)
    (project / "README.md").write_text("no marks")
    assert "README.md has no mark <!-- table 2" in command(ROOT / "tables.py", cwd=project, code=2)


def test_reproduce_runs_rows_scores_them_and_skips_what_is_done(tmp_path):
    """Two rows of one step on six small frames, one of them with a fold; a row whose last scores are gone is scored again."""
    for path in (*ROOT.glob("*.py"), ROOT / "reproduce.sh"):
        (tmp_path / path.name).symlink_to(path)
    for split in ("train", "val", "test"):
        for folder in (split, f"{split}annot"):
            (tmp_path / "set" / folder).mkdir(parents=True)
        for drive in ("0001TP", "0006R0"):
            label = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64) % 12
            Image.fromarray(np.stack([label * 20] * 3, 2)).save(tmp_path / "set" / split / f"{drive}_{split}.png")
            Image.fromarray(label).save(tmp_path / "set" / f"{split}annot" / f"{drive}_{split}.png")
    env = {**os.environ, "DATA": f"camvid:{tmp_path / 'set'}", "STEPS": "1", "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def reproduce(*args, **more):
        return subprocess.run(["bash", "reproduce.sh", *args], cwd=tmp_path, env=env | more, capture_output=True, text=True, timeout=300)

    rows = ("short", "b0", "study-drive-1-b0")
    result = reproduce(*rows)
    assert result.returncode == 0, result.stderr
    made = tmp_path / "results/camvid-short"
    assert sorted(str(path.relative_to(made)) for path in made.glob("*/*/*") if "b0/0" in str(path)) == sorted(["b0/0/quarter.json",
        *(f"{row}/0/{name}" for row in rows[1:] for name in ("log.csv", "recipe.json", "scores.csv", "test.json"))])
    study, test = (json.loads((made / row / "0/test.json").read_text()) for row in ("study-drive-1-b0", "b0"))
    assert (test["split"], test["frames"], test["fold"]) == ("test", 2, None) and (study["frames"], study["fold"]) == (3, 1)
    assert test["checkpoints"][0]["path"].endswith("b0-0/last.pth") and json.loads((made / "b0/0/quarter.json").read_text())["resolution"] == "quarter"
    assert reproduce(*rows).stdout == ""                          # all there: nothing to do
    (made / "b0/0/scores.csv").unlink()                           # stopped while it scored
    again = reproduce(*rows)
    assert "resuming after step 1" in again.stdout and (made / "b0/0/scores.csv").exists()
    shutil.rmtree(tmp_path / "runs/camvid-short/b0-0")            # a clone: results of ours, no weights
    assert "student SegFormer-B0" in reproduce("short", "b0").stdout and reproduce("short", "b0").stdout == ""
    taught = reproduce("short", "b0-kl-1", TEACHER="3", AMP="bf16").stdout       # its teacher first, which nobody named
    teacher, student = (json.loads((made / path / "recipe.json").read_text()) for path in ("b2/3", "b0-kl-1/0"))
    assert taught.index("student SegFormer-B2") < taught.index("student SegFormer-B0") and (teacher["amp"], teacher["seed"], student["amp"]) == ("bf16", 3, "bf16")
    assert student["teacher"] == "runs/camvid-short/b2-3/last.pth" and sorted(path.name for path in made.iterdir()) == ["b0", "b0-kl-1", "b2", "study-drive-1-b0"]
    shutil.rmtree(made / "b0"), shutil.rmtree(tmp_path / "runs/camvid-short/b0-0")
    cut = subprocess.Popen(["bash", "-c", "trap '' TERM; exec bash reproduce.sh short b0"], cwd=tmp_path, env=env | {"STEPS": "9999"},
                           stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_step(cut, tmp_path / "runs/camvid-short/b0-0", 1)
    os.killpg(cut.pid, signal.SIGTERM)                            # train.py saves and exits with 0, and bash goes on: half a run is not scored
    assert "b0-0 was stopped before step 9999" in cut.communicate(timeout=60)[1] and cut.returncode == 3 and not list(made.glob("b0/0/*"))
    assert "say where CamVid is" in reproduce("short", DATA="").stderr and "reproduce.sh full" in reproduce().stdout
