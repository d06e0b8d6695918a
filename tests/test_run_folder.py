"""A run's folder: what goes on must be the run that stopped, one process at a time, and nothing but
its own files is written.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import SMALL, copy_run, edit_run, rows, train_with, write_run, write_teacher

import train
from conftest import ROOT, command, write_folder
from extras import run_lock
from extras.cli import UsageError
from extras.run_folder import RUN_FILES, choose_folder, find_run
from extras.run_lock import RunLock
from extras.run_logs import rows_until
from extras.same_run import hash_network, merge_resumed_flags
from model import CheckpointError, load_checkpoint, save_checkpoint, segformer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    yield write_run(folder)
    shutil.rmtree(folder)


@pytest.fixture
def run(original, tmp_path):
    """A copy of 160 MB: pytest would keep a hundred of them, three times."""
    yield copy_run(original, tmp_path)
    shutil.rmtree(tmp_path)


def resume(run, *flags):
    return train_with("--resume", "--out", run, "--iters", 3, *flags)


# ---------------------------------------------------------------- the same teacher

def test_another_teacher_at_the_same_path_is_refused(run):
    write_teacher(run.parent / "b1.pth", seed=2)
    with pytest.raises(UsageError, match=r"b1.pth is not the teacher that .*run was begun with"):
        resume(run)


def test_a_teacher_that_was_moved_goes_on_to_the_bit(run, original):
    moved = run.parent / "elsewhere.pth"
    shutil.move(run.parent / "b1.pth", moved)
    with pytest.raises(UsageError, match="the run's teacher is not at .*b1.pth any more"):
        resume(run)

    resume(run, "--teacher", moved)
    again = original.parent / "again"
    shutil.copytree(original, again)
    resume(again)
    assert rows(run) == rows(again)
    with pytest.raises(UsageError, match="is not the teacher"):
        resume(run, "--teacher", write_teacher(run.parent / "b1.pth", seed=2))


def test_a_teachers_hash_is_of_what_it_computes(tmp_path):
    """Not of its file: another format, place, or what is stored beside the weights."""
    network = load_checkpoint(write_teacher(tmp_path / "b1.pth"))
    before = hash_network(network)
    network.classes = ["a", "b", "c"]
    save_checkpoint(network, tmp_path / "named.pth", note="x")
    assert hash_network(load_checkpoint(tmp_path / "named.pth")) == before

    with torch.no_grad():
        network.decoder.classifier.bias[1] += 1e-6
    assert hash_network(network) != before


def test_a_default_that_is_said_is_no_other_experiment():
    state = {"args": {"data": "folder:set", "fold": 0, "fold_by": None}}
    merged = merge_resumed_flags({"fold_by": None}, state, {"fold_by": "block"})
    assert merged["fold_by"] is None
    with pytest.raises(UsageError, match="--fold-by shuffle differs from the resumed run's None"):
        merge_resumed_flags({"fold_by": None}, state, {"fold_by": "shuffle"})


def test_a_run_without_a_teachers_hash_goes_on_but_does_not_move_it(run):
    """A run of an older version."""
    def make_older(content):
        del content["training"]["origin"]

    edit_run(run, make_older)
    moved = run.parent / "elsewhere.pth"
    shutil.copy(run.parent / "b1.pth", moved)
    with pytest.raises(UsageError, match="differs from the resumed run's"):
        resume(run, "--teacher", moved)
    resume(run)
    assert torch.load(run / "last.pth", weights_only=True)["training"]["origin"]["teacher"]


# ---------------------------------------------------------------- the same data

def remove_frame(data):
    for folder in ("images", "labels"):
        (data / folder / "frame_0.png").unlink()


def add_frame(data):
    for folder in ("images", "labels"):
        shutil.copy(data / folder / "frame_0.png", data / folder / "a_frame.png")


def rename_frame(data):
    for folder in ("images", "labels"):
        (data / folder / "frame_0.png").rename(data / folder / "frame_00.png")


def change_label(data):
    path = data / "labels" / "frame_0.png"
    label = np.array(Image.open(path))
    label[3] = 0
    Image.fromarray(label).save(path)


def rename_class(data):
    (data / "classes.txt").write_text("class 0\nclass 1\nanother\n")


def add_class(data):
    (data / "classes.txt").write_text("class 0\nclass 1\nclass 2\nclass 3\n")


@pytest.mark.parametrize("change, sentence", [
    (remove_frame, "train frames of .* are 4 now, and were 5"),
    (add_frame, "train frames of .* are 6 now, and were 5"),
    (rename_frame, "train frames of .* have other names"),
    (change_label, "labels of .* were changed"),
    (rename_class, "class 'class 2' is 'another' now"),
    (add_class, "has 4 classes now, and had 3"),
])
def test_data_that_changed_is_refused_by_name(run, change, sentence):
    before = (run / "last.pth").read_bytes()
    change(run.parent / "set")
    with pytest.raises(UsageError, match=sentence):
        resume(run)
    assert (run / "last.pth").read_bytes() == before


def test_a_relative_path_is_the_same_data_from_every_folder(tmp_path, monkeypatch):
    """Another `set` in the folder that it is resumed from is not taken for it."""
    home = tmp_path / "home"
    other = tmp_path / "other"
    write_folder(home / "set")
    write_folder(other / "set", frames=4)
    monkeypatch.chdir(home)
    train_with("--data", "folder:set", "--iters", 1, *SMALL, "--out", "run")

    monkeypatch.chdir(other)
    train_with("--resume", "--out", home / "run", "--iters", 2)
    args = torch.load(home / "run" / "last.pth", weights_only=True)["training"]["args"]
    assert args["data"] == f"folder:{home / 'set'}"
    with pytest.raises(UsageError, match="train frames of folder:.*other/set are 3 now"):
        train_with("--resume", "--out", home / "run", "--data", "folder:set")

    monkeypatch.chdir(home)
    train_with("--resume", "--out", "run", "--data", "folder:set", "--iters", 3)


def test_data_that_was_moved_goes_on_to_the_bit(run, original):
    moved = run.parent / "elsewhere"
    shutil.move(run.parent / "set", moved)
    with pytest.raises(UsageError, match="the run's data is not at .*set any more: add --data"):
        resume(run)
    with pytest.raises(UsageError, match="--data toy differs"):
        resume(run, "--data", "toy")

    resume(run, "--data", f"folder:{moved}")
    again = original.parent / "beside"
    shutil.copytree(original, again)
    resume(again)
    assert rows(run) == rows(again)
    args = torch.load(run / "last.pth", weights_only=True)["training"]["args"]
    assert args["data"] == f"folder:{moved}"


# ---------------------------------------------------------------- its recipe

def test_a_recipe_keeps_the_command_that_began_the_run(run, monkeypatch):
    path = run / "recipe.json"
    begun = json.loads(path.read_text()) | {"command": "train.py --seed 0", "commit": "abc1234"}
    path.write_text(json.dumps(begun))
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", "a folder"])
    resume(run)
    recipe = json.loads(path.read_text())
    assert (recipe["command"], recipe["commit"]) == ("train.py --seed 0", "abc1234")
    assert recipe["iters"] == 3
    (part,) = recipe["resumed"]
    assert part["from_step"] == 2 and part["command"] == "train.py --resume --out 'a folder'"

    resume(run)                                        # it has ended: nothing more is trained
    assert json.loads(path.read_text())["resumed"] == [part]


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", '{"command": "x", "resumed": 5}'])
def test_a_run_whose_recipe_was_damaged_goes_on_with_a_new_one(run, content):
    (run / "recipe.json").write_text(content)
    resume(run)
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["iters"] == 3 and recipe["torch"] == torch.__version__


# ---------------------------------------------------------------- best.pth

def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1000])


def another_network(path):
    torch.manual_seed(0)
    save_checkpoint(segformer("b0", 5), path, step=2)


def of_an_earlier_step(path):
    network = load_checkpoint(path)
    save_checkpoint(network, path, step=0)


@pytest.mark.parametrize("change, sentence", [
    (cut_off, "best.pth is not a checkpoint that can be read.*the run needs its best.pth"),
    (another_network, "best.pth is not the run's best student"),
    (of_an_earlier_step, "best.pth is not the run's best student"),
    (os.unlink, "no best.pth"),
])
def test_a_damaged_best_student_is_known_before_the_run_goes_on(run, change, sentence):
    change(run / "best.pth")
    with pytest.raises(UsageError, match=sentence):
        find_run(run, train.SEGMENTATION)


# ---------------------------------------------------------------- other people's files

@pytest.mark.parametrize("name", RUN_FILES)
def test_a_new_run_overwrites_nothing(name, tmp_path, folder):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(UsageError, match="already|there already"):
        train_with("--data", folder, "--iters", 1, *SMALL, "--out", out)
    assert (out / name).read_text() == "mine"
    assert os.listdir(out) == [name]


def test_a_run_that_died_before_its_first_checkpoint_begins_again(tmp_path, folder):
    out = tmp_path / "out"
    out.mkdir()
    (out / run_lock.NAME).write_text("4711")
    (out / "recipe.json").write_text("{}")
    (out / "log.csv").write_text("step\n")
    train_with("--data", folder, "--iters", 1, *SMALL, "--out", out)
    assert len(rows(out)) == 2


# every file that a run writes, and what it writes first
WRITTEN = ("log.csv", "log.csv.partial", "scores.csv", "scores.csv.partial", "recipe.json",
           "recipe.json.partial", "pictures.png", "pictures.png.partial", "last.pth.partial",
           "best.pth.partial", "previous.pth", "previous.partial", "best.pth")


def test_no_file_is_written_through_a_planted_link(run):
    """Into a folder of a run that goes on: the links are replaced, and what they lead to stays."""
    outside = run.parent / "outside"
    outside.mkdir()
    for name in WRITTEN:
        victim = outside / name
        path = run / name
        if path.exists():
            shutil.copy(path, victim)
            path.unlink()
        else:
            victim.write_text("mine")
        path.symlink_to(victim)
    before = {name: (outside / name).read_bytes() for name in WRITTEN}

    resume(run)
    for name in WRITTEN:
        assert (outside / name).read_bytes() == before[name], name
    links = [path.name for path in run.iterdir() if path.is_symlink()]
    assert links in ([], ["best.pth"])                 # no better student, no other best.pth


def test_the_lock_is_no_link(run):
    (run / run_lock.NAME).unlink()
    victim = run.parent / "victim"
    victim.write_text("mine")
    (run / run_lock.NAME).symlink_to(victim)
    with pytest.raises(UsageError, match="is a link"):
        resume(run)
    assert victim.read_text() == "mine"


# ---------------------------------------------------------------- one process at a time

HOLD = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from extras.run_lock import RunLock
with RunLock() as lock:
    lock.take(Path({folder!r}))
    {then}
    print("taken", flush=True)
    time.sleep(60)
"""


def hold(folder, then="pass"):
    """Another process that holds the lock of `folder`."""
    script = HOLD.format(root=str(ROOT), folder=str(folder), then=then)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"
    return process


def test_two_runs_in_one_folder_and_a_dead_process_holds_nothing(run):
    holder = hold(run)
    try:
        with pytest.raises(UsageError, match=rf"another run \(process {holder.pid}\)"):
            resume(run)
    finally:
        holder.kill()
        holder.wait()
    resume(run)
    resume(run, "--iters", 4)                          # and this process has left it again


def test_a_worker_that_outlives_its_run_does_not_hold_the_lock(tmp_path):
    """It inherits the lock with all that was open, and ends some seconds after a kill."""
    fork = "from extras.stopping import prepare_worker; child = os.fork()"
    fork += "\n    if child == 0: prepare_worker(0); time.sleep(60)"
    holder = hold(tmp_path, fork)
    try:
        with pytest.raises(UsageError, match="another run"), RunLock() as lock:
            lock.take(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    with RunLock() as lock:
        lock.take(tmp_path)


def test_two_new_runs_begin_in_two_folders(tmp_path, monkeypatch):
    """Where no --out is given; with one, the second is refused."""
    monkeypatch.chdir(tmp_path)

    class Args:
        out = None
        data = "toy"
        student = "b0"
        teacher = None

    with RunLock() as one, RunLock() as two:
        assert str(choose_folder(Args, one)) == "runs/toy-b0"
        assert str(choose_folder(Args, two)) == "runs/toy-b0-2"
        Args.out = "runs/toy-b0"
        with pytest.raises(UsageError, match="another run"), RunLock() as three:
            choose_folder(Args, three)


def test_a_second_command_is_refused_and_the_first_ends_well(run):
    """Both with --resume, at once: whoever is the second says so, and the log is whole."""
    first = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(run),
         "--iters", "60", "--eval-every", "10"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    while "resuming after" not in first.stdout.readline():
        assert first.poll() is None
    output = command("train.py", "--resume", "--out", run, "--iters", 60, code=2)
    assert f"is being written by another run (process {first.pid})" in output
    first.communicate()
    assert first.returncode == 0
    steps = [int(row[0]) for row in rows(run)[1:]]
    assert steps == list(range(1, 61))


# ---------------------------------------------------------------- a training state from a stranger

def in_state(name, value):
    def change(content):
        content["training"][name] = value
    return change


def in_args(name, value):
    def change(content):
        content["training"]["args"][name] = value
    return change


def in_moment(name, value):
    def change(content):
        content["training"]["optimizer"]["state"][0][name] = value
    return change


def without_a_moment(content):
    del content["training"]["optimizer"]["state"][5]


def swap_groups(content):
    content["training"]["optimizer"]["param_groups"].reverse()


def in_projections(content):
    tensors = content["training"]["projections"]
    name = next(iter(tensors))
    tensors[name] = tensors[name][:1]


HOSTILE = {
    "exp_avg of one number": in_moment("exp_avg", torch.zeros(1)),
    "exp_avg_sq of another type": in_moment("exp_avg_sq", torch.zeros(32, 3, 7, 7).double()),
    "exp_avg no tensor": in_moment("exp_avg", 0.5),
    "exp_avg sparse": in_moment("exp_avg", torch.zeros(32, 3, 7, 7).to_sparse()),
    "moment's step a vector": in_moment("step", torch.zeros(3)),
    "moment's step 0": in_moment("step", torch.tensor(0.0)),
    "moment's step nan": in_moment("step", torch.tensor(float("nan"))),
    "a moment more": in_moment("max_exp_avg_sq", torch.zeros(32, 3, 7, 7)),
    "a moment less": without_a_moment,
    "groups swapped": swap_groups,
    "optimizer a list": in_state("optimizer", []),
    "optimizer empty": in_state("optimizer", {}),
    "optimizer of lists": in_state("optimizer", {"state": [], "param_groups": [1]}),
    "scaler a number": in_state("scaler", 3),
    "step a string": in_state("step", "2"),
    "step a tensor": in_state("step", torch.tensor(2)),
    "step negative": in_state("step", -1),
    "step huge": in_state("step", 10**18),
    "step true": in_state("step", True),
    "total_batch a string": in_state("total_batch", "2"),
    "total_batch 0": in_state("total_batch", 0),
    "projections none": in_state("projections", None),
    "projections a list": in_state("projections", [1]),
    "projections misshapen": in_projections,
    "best_scores a list": in_state("best_scores", [1]),
    "best_scores empty names": in_state("best_scores", {"miou": 0.5}),
    "best_scores of two classes": in_state(
        "best_scores", {"miou": 0.5, "macc": 0.5, "aacc": 0.5, "iou": [0.5, 0.5], "step": 1}),
    "teacher_scores a string": in_state("teacher_scores", "good"),
    "skipped a string": in_state("skipped", "none"),
    "seconds a string": in_state("seconds", "9"),
    "seconds nan": in_state("seconds", float("nan")),
    "a student beside no average": in_state("student", {}),
    "an average without its student": in_args("ema", 0.9),
    "origin a list": in_state("origin", [1]),
    "origin half": in_state("origin", {"train": {"count": 5}}),
    "args a list": in_state("args", ["--student"]),
    "args empty": in_state("args", {}),
    "args of numbers": in_state("args", {1: 2}),
    "student unknown": in_args("student", "b9"),
    "student a list": in_args("student", ["b0"]),
    "data a number": in_args("data", 5),
    "data with a zero byte": in_args("data", "folder:\0"),
    "teacher a number": in_args("teacher", 5),
    "iters a string": in_args("iters", "3"),
    "iters none": in_args("iters", None),
    "eval_every 0": in_args("eval_every", 0),
    "crop one number": in_args("crop", 32),
    "crop three": in_args("crop", [32, 32, 32]),
    "crop tiny": in_args("crop", [1, 1]),
    "lr nan": in_args("lr", float("nan")),
    "lr a string": in_args("lr", "0.1"),
    "lambda_fd none": in_args("lambda_fd", None),
    "scale_range turned": in_args("scale_range", [2.0, 1.0]),
    "workers negative": in_args("workers", -1),
    "seed a float": in_args("seed", 0.5),
    "seed huge": in_args("seed", 10**5000),
    "compile a string": in_args("compile", "yes"),
    "fold without folds": lambda content: content["training"]["args"].update(fold=0, folds=None),
    "norm a dict": in_args("norm", {}),
    "training a list": lambda content: content.update(training=[1]),
    "no training": lambda content: content.pop("training"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_training_state_of_a_stranger_is_a_sentence(what, run):
    edit_run(run, HOSTILE[what])
    with pytest.raises((UsageError, CheckpointError)) as caught:
        resume(run)
    assert ".pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_moments_that_share_their_memory_are_taken_apart(run, original):
    """A view with stride 0, and one storage for two tensors: AdamW writes to them in place."""
    def share(content):
        moment = content["training"]["optimizer"]["state"][0]
        zero = torch.zeros(1, 1, 1, 1).expand(moment["exp_avg"].shape)
        moment["exp_avg"] = zero
        moment["exp_avg_sq"] = zero

    def zero(content):
        moment = content["training"]["optimizer"]["state"][0]
        moment["exp_avg"] = torch.zeros(moment["exp_avg"].shape)
        moment["exp_avg_sq"] = torch.zeros(moment["exp_avg"].shape)

    dense = run.parent / "dense"
    shutil.copytree(run, dense)
    edit_run(run, share)
    edit_run(dense, zero)
    resume(run)
    resume(dense)
    assert rows(run) == rows(dense)
    one = torch.load(run / "last.pth", weights_only=True)["model"]
    other = torch.load(dense / "last.pth", weights_only=True)["model"]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_of_another_optimizers_hyperparameters_keeps_its_flags(run, original):
    """What the file says of AdamW is not used: the flags say it."""
    def change(content):
        for group in content["training"]["optimizer"]["param_groups"]:
            group.update(betas=(0.1, 0.1), weight_decay=5.0, eps=1.0, maximize=True)

    again = run.parent / "again"
    shutil.copytree(run, again)
    edit_run(run, change)
    resume(run)
    resume(again)
    assert rows(run) == rows(again)


# ---------------------------------------------------------------- logs

def test_a_row_that_was_cut_off_is_left_out(tmp_path):
    """Also one whose step looks like an earlier one's, "1" of "13"."""
    path = tmp_path / "log.csv"
    columns = ["step", "lr", "loss"]
    path.write_text("step,lr,loss\n1,0.1,2\n2,0.1,2\n3,0.1,2\n1")
    assert [row[0] for row in rows_until(path, 9, columns)] == ["1", "2", "3"]
    path.write_text("step,lr,loss\n1,0.1,2\n\u00b2,0.1,2\n-3,0.1,2\n2,0.1,2\n2,0.1,2\n3,0.1\n")
    assert [row[0] for row in rows_until(path, 9, columns)] == ["1", "2"]
    assert [row[0] for row in rows_until(path, 1, columns)] == ["1"]


def test_the_log_of_an_older_version_goes_on_under_its_own_columns(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,lr,loss\n1,0.1,2\n")
    assert rows_until(path, 9, ["step", "lr", "norm", "loss"]) == [["1", "0.1", "", "2"]]


@pytest.mark.parametrize("content", [
    b"step,lr\n1,\xff\n", b"step,lr\n1," + b"9" * 200_000 + b"\n"], ids=["latin-1", "huge field"])
def test_a_log_that_is_none_is_a_sentence(content, run):
    (run / "log.csv").write_bytes(content)
    with pytest.raises(UsageError, match="log.csv is not a log that can be read"):
        resume(run)
    assert (run / "log.csv").read_bytes() == content


def test_a_pipe_in_place_of_a_file_is_not_waited_for(run):
    for name in ("log.csv", "best.pth", "last.pth"):
        (run / name).rename(run / "kept")
        os.mkfifo(run / name)
        with pytest.raises((UsageError, CheckpointError), match=name):
            resume(run)
        (run / name).unlink()
        (run / "kept").rename(run / name)
