"""A run's folder and its safety: its name, its logs, its checkpoints, going on after a stop, and being told to stop.

    RUN/last.pth       all that resuming needs; written beside, flushed to the disk, then renamed: whole or not there
    RUN/previous.pth   the last.pth before it, for a disk that damages files
    RUN/best.pth       the student with the best mIoU on the validation split
    RUN/log.csv        every step: learning rate, loss, its terms, the gradient's norm before clipping
    RUN/scores.csv     every validation
    RUN/recipe.json    the effective flags, the machine, the versions

SIGTERM (a machine that is taken away) and Ctrl-C finish the step and save; `python train.py --resume` goes on from there.
"""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from eval import UsageError, draw_comparison, make_folder
from model import CheckpointError, read_checkpoint, save_checkpoint


def rank():
    """This process's number under torchrun; 0 alone. Only number 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


# ---------------------------------------------------------------- folder and checkpoints

def choose_folder(args):
    """--out, or runs/DATA-STUDENT[-kd] with a number behind it when that is taken. Raises UsageError for a used --out."""
    if args.out:
        folder = Path(args.out)
        if any((folder / name).exists() for name in ("last.pth", "best.pth")):
            raise UsageError(f"{folder} already holds a run: add --resume to go on with it, or choose another --out")
        return make_folder(folder)
    name = f"runs/{args.data.split(':')[0]}-{args.student}{'-kd' if args.teacher else ''}"
    numbers = (Path(f"{name}-{n}" if n > 1 else name) for n in range(1, 10_000))
    return make_folder(next(folder for folder in numbers if not folder.exists()))


def restarted(args):
    """Did torchrun (--max-restarts) start this again, with a checkpoint in --out to go on from?"""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and bool(args.out) and (Path(args.out) / "last.pth").exists()


def find_run(args):
    """-> (folder, contents of its last.pth) for --resume: --out, else the newest run under runs/."""
    found = [Path(args.out) / "last.pth"] if args.out else sorted(Path("runs").glob("*/last.pth"), key=os.path.getmtime)
    if not found or not found[-1].exists():
        raise UsageError(f"nothing to resume: no last.pth in {args.out or 'any folder under runs/'}")
    folder = found[-1].parent
    try:
        content = read_run(found[-1])
    except (UsageError, CheckpointError) as error:
        raise UsageError(f"{error}{offer_previous(folder)}") from None
    if content["training"]["best_scores"] and not (folder / "best.pth").exists():
        raise UsageError(f"{folder} has a last.pth but no best.pth: the run needs both to go on")
    return folder, content


def read_run(path):
    """-> what a last.pth holds. Raises CheckpointError or UsageError."""
    content = read_checkpoint(path)
    state = content.get("training")
    if not isinstance(state, dict) or not {"step", "args", "optimizer", "scaler", "best_scores"} <= set(state):
        raise UsageError(f"{path} is a checkpoint but not a run: it has no training state")
    return content


def offer_previous(folder):
    """A sentence about previous.pth where it is whole, else nothing."""
    try:
        step = read_run(folder / "previous.pth")["training"]["step"]
    except (UsageError, CheckpointError):
        return ""
    return f"; the checkpoint before it is whole (step {step}): cp {folder / 'previous.pth'} {folder / 'last.pth'} to go on from there"


def save_last(student, folder, training):
    """Write last.pth and keep the one before it as previous.pth; at no moment is there none."""
    last, previous = folder / "last.pth", folder / "previous.pth"
    try:
        if last.exists():
            spare = folder / "previous.partial"
            spare.unlink(missing_ok=True)
            os.link(last, spare)                                  # a second name for the same file: no gap, no copy
            os.replace(spare, previous)
    except OSError:                                               # a file system without links has no previous.pth
        pass
    save_checkpoint(student, last, step=training["step"], training=training)


# ---------------------------------------------------------------- logs

class Log:
    """A CSV file that the first process writes; on resume the rows after `step` are dropped and will be written again."""

    def __init__(self, folder, name, columns, step):
        self.file = None
        if rank():
            return
        rows, path, partial = [], folder / name, folder / f"{name}.partial"
        if step and path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]
        with open(partial, "w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        os.replace(partial, path)                                 # killed while rewriting, the old rows are still there
        self.file = open(path, "a", newline="")

    def add(self, rows):
        if self.file:
            csv.writer(self.file).writerows(rows)
            self.file.flush()


class Board:
    """The same numbers, and pictures, for TensorBoard in RUN/tensorboard; without --tensorboard nothing is written."""

    def __init__(self, folder, wanted, start):
        self.writer = None
        if wanted and not rank():
            self.writer = summary_writer()(folder / "tensorboard", purge_step=start + 1 if start else None)

    def add_rows(self, columns, rows, group):
        for row in rows if self.writer else ():
            for name, value in zip(columns, row[1:]):
                self.writer.add_scalar(f"{group}/{name}", float(value), int(row[0]))

    def add_picture(self, step, student, val_set):
        if self.writer:
            picture = draw_comparison([student.fold()], ["student"], val_set, spread(len(val_set), 2))
            self.writer.add_image("val", np.asarray(picture), step, dataformats="HWC")
            self.writer.flush()


def summary_writer():
    """-> TensorBoard's writer class. Raises UsageError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter


def spread(count, some):
    """At most `some` indices, evenly over range(count)."""
    return np.linspace(0, count - 1, min(some, count)).astype(int).tolist()


def git_commit():
    """The code's commit, "" outside a repository or without git."""
    try:
        result = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        return result.stdout.strip()
    except OSError:
        return ""


# ---------------------------------------------------------------- being told to stop

class Stopped(Exception):
    """The run was told to stop, and has saved; `code` is the exit code: 0 after SIGTERM, 130 after Ctrl-C."""

    def __init__(self, number, step, folder):
        name, self.code = ("SIGTERM", 0) if number == signal.SIGTERM else ("Ctrl-C", 130)
        super().__init__(f"stopped by {name} after step {step}, all of it saved; to go on: python train.py --resume --out {folder}")


class Stop:
    """Inside `with Stop() as stop`, SIGTERM and Ctrl-C only leave a note; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.number, self.before = 0, {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
        print(f"\n{signal.Signals(number).name}: finishing this step, then saving (Ctrl-C again stops at once)", file=sys.stderr, flush=True)

    def asked(self, device, every_process):
        """-> the signal's number or 0. Several processes stop after the same step: they ask each other, when all of them ask."""
        if not dist.is_initialized():
            return self.number
        if not every_process:
            return 0
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


def deaf_worker(worker):
    """What a loader's worker does with signals: a terminal's Ctrl-C reaches it too, and is not its to answer; SIGTERM ends it
    without the noise that would make the loader raise in the middle of the last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
