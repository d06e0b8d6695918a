"""A run's folder and its safety: its name, its logs, its checkpoints, going on after a stop, and
being told to stop.

    RUN/last.pth       all that resuming needs; written beside, flushed to the disk, then renamed:
                       whole or not there
    RUN/previous.pth   the last.pth before it, for a disk that damages files
    RUN/best.pth       the student with the best mIoU on the validation split
    RUN/log.csv        every step: learning rate, loss, its terms, the gradient's norm unclipped
    RUN/scores.csv     every validation
    RUN/fit.csv        with --fit-log: loss and mIoU of train and val frames at every validation
    RUN/recipe.json    the effective flags, the machine, the versions
 SIGTERM (a machine that is taken away) and Ctrl-C finish the step and save; `python train.py
--resume` goes on from there.
"""

import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from extras.cli import Stopped, UsageError, make_folder
from extras.distributed import all_reduce, rank, was_restarted
from model import CheckpointError, read_checkpoint

# On --resume; every other flag is the experiment.
MAY_CHANGE = ("out", "resume", "iters", "workers", "device", "eval_every", "tensorboard", "cache",
              "compile")
TRAINING_STATE = {"step", "args", "optimizer", "scaler", "best_scores"}


# ------------------------------ the folder

def choose_folder(args):
    """--out, or runs/DATA-STUDENT[-kd], numbered when that is taken. Raises UsageError for a used
    --out.
    """
    if args.out:
        folder = Path(args.out)
        if (folder / "last.pth").exists() or (folder / "best.pth").exists():
            raise UsageError(f"{folder} already holds a run: add --resume to go on with it, "
                             "or choose another --out")
        return make_folder(folder)

    kind = args.data.split(":")[0]
    name = f"runs/{kind}-{args.student}"
    if args.teacher:
        name += "-kd"
    folder = Path(name)
    number = 1
    while folder.exists():
        number += 1
        folder = Path(f"{name}-{number}")
    return make_folder(folder)


def find_run(out, task):
    """-> (folder, contents of its last.pth) for --resume: `out`, or for None the newest run under
    runs/.

    Raises UsageError, also for the run of another task than train.py's `task`.
    """
    if out:
        last = Path(out) / "last.pth"
    else:
        found = sorted(Path("runs").glob("*/last.pth"), key=os.path.getmtime)
        last = found[-1] if found else None
    if last is None or not last.exists():
        where = out or "any folder under runs/"
        raise UsageError(f"nothing to resume: no last.pth in {where}")

    folder = last.parent
    try:
        content = read_run(last)
    except (UsageError, CheckpointError) as error:
        raise UsageError(f"{error}{offer_previous(folder)}") from None
    trained = content["training"].get("task", "segmentation")   # what older files do not say
    if trained != task.name:
        raise UsageError(f"{folder} is a run of another kind, {trained}: {task.command} trains "
                         f"{task.name} and cannot go on with it")
    if content["training"]["best_scores"] and not (folder / "best.pth").exists():
        raise UsageError(f"{folder} has a last.pth but no best.pth: the run needs both to go on")
    return folder, content


def is_restart_of(out):
    """Did torchrun (--max-restarts) start this again, with a checkpoint in `out` to go on from?"""
    return was_restarted() and bool(out) and (Path(out) / "last.pth").exists()


def merge_resumed_flags(no_flags, stored, given):
    """The flags of a run that goes on, each a dict {name: value}.

    no_flags: every flag, None (an older run lacks newer ones); stored: the run's own; given: those
    given now, of which only MAY_CHANGE may differ. Raises UsageError.
    """
    for name, value in given.items():
        if name in MAY_CHANGE or (name == "amp" and value == "auto"):
            continue
        if value != stored.get(name):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {value} differs from the resumed run's {stored.get(name)}: "
                             "that would be another experiment; leave it out, or start a new run")
    merged = no_flags | stored
    for name in MAY_CHANGE:
        if name in given:
            merged[name] = given[name]
    return merged


def check_schedule(args, state, total_batch, folder):
    """Raise UsageError if a run cannot go on from its training state with these flags."""
    if state["total_batch"] != total_batch:
        raise UsageError(f"{folder} was trained with {state['total_batch']} images a step, "
                         f"this would be {total_batch}")
    if state["step"] > args.iters:
        raise UsageError(f"{folder} has {state['step']} steps behind it already: "
                         "--iters can only grow")


# ------------------------------ checkpoints

def read_run(path):
    """-> what a last.pth holds. Raises CheckpointError or UsageError."""
    content = read_checkpoint(path)
    state = content.get("training")
    if not isinstance(state, dict) or not set(state) >= TRAINING_STATE:
        raise UsageError(f"{path} is a checkpoint but not a run: it has no training state")
    return content


def offer_previous(folder):
    """A sentence about previous.pth where it is whole, else nothing."""
    previous = folder / "previous.pth"
    try:
        step = read_run(previous)["training"]["step"]
    except (UsageError, CheckpointError):
        return ""
    return (f"; the checkpoint before it is whole (step {step}): "
            f"cp {previous} {folder / 'last.pth'} to go on from there")


def new_progress():
    """What a run has come to: kept in last.pth beside the weights."""
    return {
        "step": 0,
        "seconds": 0.0,  # of training
        "best_scores": None,
        "teacher_scores": None,
        "skipped": 0,  # steps that fp16's scaler left out
        "skipped_in_a_row": 0,
    }


def restore(state, objective, optimizer, scaler):
    """Put the training state of a last.pth beside the student's weights. -> its progress"""
    if objective.projections is not None:
        objective.projections.load_state_dict(state["projections"])
    if "student" in state:                             # beside its average, with --ema
        objective.student.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    progress = new_progress()
    for name, value in progress.items():
        progress[name] = state.get(name, value)  # an older version's file lacks what came later
    return progress


def save(run, step):
    """last.pth: the student, and all that a resumed run needs."""
    run.progress["step"] = step
    if rank() > 0:
        return
    projections = run.objective.projections
    training = dict(
        run.progress,
        args=vars(run.args),
        task=run.task.name,
        total_batch=run.total_batch,
        optimizer=run.optimizer.state_dict(),
        scaler=run.scaler.state_dict(),
        projections=projections.state_dict() if projections is not None else None,
    )
    if run.average is not None:                        # the file's network is the average
        training["student"] = run.student.state_dict()
    save_last(run, training)


def save_last(run, training):
    """Write last.pth and keep the one before it as previous.pth; at no moment is there none."""
    last = run.folder / "last.pth"
    keep_as_previous(last, run.folder / "previous.pth")
    run.task.save(run.network, last, step=training["step"], training=training)


def keep_as_previous(last, previous):
    """Give the file `last` a second name, in place of the file that had it: no gap, and no copy."""
    if not last.exists():
        return
    spare = previous.with_suffix(".partial")
    try:
        spare.unlink(missing_ok=True)
        os.link(last, spare)
        os.replace(spare, previous)
    except OSError:
        pass  # a file system without links has no previous.pth


def check_reads_back(path, task):
    """Load the checkpoint that was just written: one that cannot be read is known before hours of
    training, not after.

    Raises UsageError.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            task.load(path)
    except CheckpointError as error:
        raise UsageError(f"what this run would save cannot be loaded again: {error}") from None


# ------------------------------ logs

class Log:
    """A CSV file that the first process writes; on resume the rows after `step` are dropped and
    will be written again.
    """

    def __init__(self, folder, name, columns, step):
        self.file = None
        if rank() > 0:
            return
        path = folder / name
        partial = folder / f"{name}.partial"
        with open(partial, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows_until(path, step))
        os.replace(partial, path)  # killed while rewriting, the old rows are still there
        self.file = open(path, "a", newline="")  # noqa: SIM115  open as long as the run

    def add(self, rows):
        if self.file:
            csv.writer(self.file).writerows(rows)
            self.file.flush()


def rows_until(path, step):
    """-> the rows of a log up to `step`, without its header; none where there is no such file."""
    if step == 0 or not path.exists():
        return []
    rows = []
    with open(path, newline="") as file:
        for row in csv.reader(file):
            if row and row[0].isdigit() and int(row[0]) <= step:
                rows.append(row)
    return rows


class Board:
    """The same numbers, and pictures, for TensorBoard in RUN/tensorboard; without --tensorboard
    nothing is written.
    """

    def __init__(self, folder, wanted, start):
        self.writer = None
        if wanted and rank() == 0:
            purge_step = start + 1 if start else None
            self.writer = summary_writer()(folder / "tensorboard", purge_step=purge_step)

    def add_rows(self, group, columns, rows):
        """rows: of a log, each begins with its step; columns: the names of what follows it."""
        if self.writer is None:
            return
        for step, *values in rows:
            for name, value in zip(columns, values, strict=True):
                self.writer.add_scalar(f"{group}/{name}", float(value), int(step))

    def add_picture(self, step, picture):
        """picture: RGB (H, W, 3)."""
        if self.writer:
            self.writer.add_image("val", picture, step, dataformats="HWC")
            self.writer.flush()

    def close(self):
        if self.writer:
            self.writer.close()


def summary_writer():
    """-> TensorBoard's writer class. Raises UsageError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter


def git_commit():
    """The code's commit, "" outside a repository or without git."""
    project = Path(__file__).parent.parent
    try:
        result = subprocess.run(["git", "-C", str(project), "rev-parse", "--short", "HEAD"],
                                capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip()


# ------------------------------ being told to stop

class Stop:
    """Inside `with Stop() as stop`, SIGTERM and Ctrl-C only leave a note; a second Ctrl-C stops at
    once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.number = 0
        self.handlers_before = {}

    def __enter__(self):
        # no other thread may set handlers
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self.handlers_before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
        name = signal.Signals(number).name
        print(f"\n{name}: finishing this step, then saving (Ctrl-C again stops at once)",
              file=sys.stderr, flush=True)

    def asked(self, device, every_process):
        """-> the signal's number or 0. Several processes stop after the same step: they ask each
        other, when all of them ask.
        """
        if not dist.is_initialized():
            return self.number
        if not every_process:
            return 0
        number = torch.tensor(self.number, device=device)
        return int(all_reduce(number, dist.ReduceOp.MAX))


def stopped(number, step, run):
    """-> the exception for a run that was told to stop by signal `number`, and has saved."""
    name, code = ("SIGTERM", 0) if number == signal.SIGTERM else ("Ctrl-C", 130)
    return Stopped(f"stopped by {name} after step {step}, all of it saved; "
                   f"to go on: {run.task.command} --resume --out {run.folder}", code)


def ignore_signals(worker):
    """For a loader's worker. A terminal's Ctrl-C reaches it too, and is not its to answer.

    SIGTERM ends it without the noise that would make the loader raise in the middle of the last
    step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
