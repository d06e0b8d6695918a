"""What the tests of run folders share: small runs, in this process and as a command."""

import csv
import shutil

import torch

import train
from conftest import write_folder
from model import save_checkpoint, segformer

SMALL = ("--crop", 32, 32, "--batch-size", 2, "--workers", 0, "--amp", "off", "--device", "cpu")


def train_with(*flags):
    """As the command does, in this process."""
    return train.run_training(*train.FLAGS.parse([str(flag) for flag in flags]))


def write_teacher(path, seed=1):
    """A random B1 for the three classes of the test folder."""
    torch.manual_seed(seed)
    save_checkpoint(segformer("b1", 3), path)
    return path


def write_run(root):
    """A run of two steps below a teacher -> its folder, with `set` and `b1.pth` beside it."""
    data = write_folder(root / "set")
    teacher = write_teacher(root / "b1.pth")
    steps = ("--iters", 2, "--eval-every", 1)
    train_with("--data", data, "--teacher", teacher, *steps, *SMALL, "--out", root / "run")
    return root / "run"


def copy_run(run, root):
    """A copy of what `write_run` made, to be changed -> its run folder. Its data is its own."""
    for name in ("set", "b1.pth", "run"):
        source = run.parent / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, root / name)
    edit_run(root / "run", lambda content: move(content, run.parent, root))
    return root / "run"


def move(content, old, new):
    args = content["training"]["args"]
    for name in ("data", "teacher"):
        args[name] = args[name].replace(str(old), str(new))


def edit_run(run, change, name="last.pth"):
    """Load a checkpoint of a run, change(content), and write it again."""
    content = torch.load(run / name, weights_only=True)
    change(content)
    torch.save(content, run / name)


def rows(run, name="log.csv"):
    with open(run / name, newline="") as file:
        return list(csv.reader(file))
