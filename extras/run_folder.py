"""A run's folder: its name, its checkpoints, going on after a stop.

    RUN/last.pth       all that resuming needs; written beside, flushed to the disk, then renamed:
                       whole or not there
    RUN/previous.pth   the last.pth before it, for a disk that damages files
    RUN/best.pth       the network with the best mIoU on the validation split: the student, or with
                       --ema the average of its weights
    RUN/log.csv        every step: learning rate, loss, its terms, the gradient's norm unclipped
    RUN/scores.csv     every validation
    RUN/fit.csv        with --fit-log: loss and mIoU of train and val frames at every validation
    RUN/recipe.json    the effective flags, the machine, the versions
    RUN/pictures.png   frames, truth, and what teacher and student say
    RUN/run.lock       one process at a time writes here: see run_lock.py

SIGTERM (a machine that is taken away), SIGHUP, Ctrl-C and an output that broke finish the step and
save; `python train.py --resume` goes on from there: see stopping.py.
"""

import contextlib
import io
import os
import subprocess
from pathlib import Path

from extras import run_lock
from extras.cli import UsageError, make_folder
from extras.distributed import is_first_process, rank, was_restarted
from extras.stopping import until_written
from extras.training_state import check_training_state
from model import CheckpointError, read_checkpoint

RUN_FILES = ("last.pth", "previous.pth", "best.pth", "log.csv", "scores.csv", "fit.csv",
             "recipe.json", "pictures.png", "tensorboard")


# ------------------------------ the folder

def choose_folder(args, lock):
    """-> --out, or runs/DATA-STUDENT[-kd], numbered when that is taken; it is this run's from now
    on. Raises UsageError for a used --out.
    """
    if args.out:
        folder = make_folder(args.out)
        refuse_others_files(folder)
        lock.take(folder)
        # While it waited for the lock, another run may have begun, and ended.
        refuse_run(folder)
        return folder

    kind = args.data.split(":")[0]
    name = f"runs/{kind}-{args.student}"
    if args.teacher:
        name += "-kd"
    folder = make_numbered_folder(name)
    lock.take(folder)
    return folder


def make_numbered_folder(name):
    """-> NAME, NAME-2, NAME-3 ...: the first that was not there, made."""
    folder = Path(name)
    make_folder(folder.parent)
    number = 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = Path(f"{name}-{number}")


def refuse_run(folder):
    """Raise UsageError for a folder with a run that can go on, or has ended."""
    if (folder / "last.pth").exists() or (folder / "best.pth").exists():
        raise UsageError(f"{folder} already holds a run: add --resume to go on with it, "
                         "or choose another --out")


def refuse_others_files(folder):
    """Raise UsageError where a new run would overwrite something.

    A folder with a run.lock and no last.pth is of a run that was killed before its first
    checkpoint: there is nothing to go on with, and it may begin again.
    """
    refuse_run(folder)
    if os.path.lexists(folder / run_lock.NAME):
        return
    for name in RUN_FILES:
        if os.path.lexists(folder / name):
            raise UsageError(f"{folder / name} is there already, and a run would overwrite it: "
                             "choose another --out, or move it away")


def find_run(out, task, lock=None):
    """-> (folder, contents of its last.pth) for --resume: `out`, or for None the newest run under
    runs/, at any depth.

    task: train.py's Task; the run of another one is refused
    lock: a RunLock for the folder, to be taken before anything is read
    Raises UsageError.
    """
    if out:
        last = Path(out) / "last.pth"
    else:
        found = sorted(Path("runs").glob("**/last.pth"), key=os.path.getmtime)
        last = found[-1] if found else None
    if last is None or not last.exists():
        where = out or "any folder under runs/"
        raise UsageError(f"nothing to resume: no last.pth in {where}")

    folder = last.parent
    if lock and is_first_process():
        lock.take(folder)
    try:
        content = read_run(last)
    except (UsageError, CheckpointError) as error:
        raise UsageError(f"{error}{offer_previous(folder)}") from None
    trained = content["training"].get("task", "segmentation")   # what older files do not say
    if trained != task.name:
        raise UsageError(f"{folder} is a run of another kind, {trained}: {task.command} trains "
                         f"{task.name} and cannot go on with it")
    best_scores = content["training"]["best_scores"]
    if best_scores:
        check_best(folder / "best.pth", best_scores, task)
    return folder, content


def check_best(path, best_scores, task):
    """Raise UsageError where best.pth is not the student that has these scores.

    It may be a later one: where the run was killed between writing best.pth and last.pth, it will
    come to the same student again.
    """
    if not path.exists():
        raise UsageError(f"{path.parent} has a last.pth but no best.pth: the run needs both to "
                         "go on")
    try:
        its_step = read_checkpoint(path).get("step", best_scores["step"])
        student = load_quietly(path, task)
    except CheckpointError as error:
        raise UsageError(f"{error}; the run needs its best.pth to go on: put back a copy of it, "
                         "or start a new run") from None
    is_later = type(its_step) is int and its_step >= best_scores["step"]
    if not is_later or student.num_classes != len(best_scores["iou"]):
        raise UsageError(f"{path} is not the run's best student, that of step "
                         f"{best_scores['step']}: put back the right one, or start a new run")


def is_restart_of(out):
    """Did torchrun (--max-restarts) start this again, with a checkpoint in `out` to go on from?"""
    return was_restarted() and bool(out) and (Path(out) / "last.pth").exists()


# ------------------------------ checkpoints

def read_run(path):
    """-> what a last.pth holds, checked. Raises CheckpointError or UsageError."""
    content = read_checkpoint(path)
    check_training_state(content.get("training"), path)
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


def save(run, step):
    """last.pth: the network that is scored, and all that a resumed run needs."""
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
    with until_written():
        keep_as_previous(last, run.folder / "previous.pth")
        run.task.save(run.network, last, step=training["step"], training=training)


def save_best(run, result, step):
    """best.pth: the network with these scores."""
    if rank() == 0:
        with until_written():
            run.task.save(run.network, run.folder / "best.pth", scores=result, step=step)


def keep_as_previous(last, previous):
    """Make `previous` a hard link to `last`: no copy, and no moment without both files."""
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
        load_quietly(path, task)
    except CheckpointError as error:
        raise UsageError(f"what this run would save cannot be loaded again: {error}") from None


def load_quietly(path, task):
    """The task's network in a checkpoint, without the line that loading prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return task.load(path)


def git_commit():
    """The code's commit, "" outside a repository or without git."""
    project = Path(__file__).parent.parent
    try:
        result = subprocess.run(["git", "-C", str(project), "rev-parse", "--short", "HEAD"],
                                capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip()
