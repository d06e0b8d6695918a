"""What every command shares: how it ends, what it says meanwhile, and flags that several have.

    def main():
        args = build_parser().parse_args()
        ...

    if __name__ == "__main__":
        run_command(main)

A command ends with one of these exit codes, and with a sentence on stderr for each but 0:

    0     done; or told to stop, by SIGTERM, SIGHUP or the loss of its output, after saving
    1     the computation broke: a loss that is not finite, another process of the run that failed
    2     a user's mistake: a wrong flag, path, file or data set
    130   Ctrl-C
"""

import argparse
import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

from data import DatasetError
from extras.printable import printable
from extras.quiet_start import leave_at_once
from model import CheckpointError

# ------------------------------ how a command ends

class UsageError(ValueError):
    """The command cannot do what it was asked; the message is one sentence."""


class NotFinite(ArithmeticError):
    """A loss or an output became NaN or infinite; the message says where."""


class ProcessLost(RuntimeError):
    """Another process of a run under torchrun failed, and this one cannot go on alone."""


class Stopped(Exception):
    """The run was told to stop, and has saved; `code` is the exit code: 130 after Ctrl-C, or 0."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


USER_ERRORS = (UsageError, DatasetError, CheckpointError)
LONGEST = 2000                                         # characters of a sentence about an error
OUT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory", "out of shared memory")


def run_command(main, end=sys.exit):
    """Run main(), which may return an exit code, and end the process with it: end(code).

    No traceback for what a user can get wrong.
    """
    prepare_streams()
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, leave_at_once):
        signal.signal(signal.SIGINT, interrupt)
    try:
        code = main()
    except SystemExit as error:                        # of --help
        code = error.code
    except (Exception, KeyboardInterrupt) as error:
        code = report(error)
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # nothing is left to be interrupted
    end(drop_output(code))


def report(error):
    """Say what ended a command, in one sentence. -> its exit code. Raises `error` again when it is
    a bug of ours.
    """
    if isinstance(error, Stopped):
        print(printable(error, LONGEST), flush=True)
        return error.code
    if isinstance(error, KeyboardInterrupt) or Interrupted.came:
        signal.signal(signal.SIGINT, signal.SIG_IGN)   # a third one has nothing left to stop
        print("stopped at once; what was saved before is whole", file=sys.stderr)
        return 130
    if isinstance(error, USER_ERRORS):
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 2
    if isinstance(error, (NotFinite, ProcessLost)):
        print(f"error: {printable(error, LONGEST)}", file=sys.stderr)
        return 1
    if isinstance(error, OSError):
        where = error.filename or "cannot write"
        if isinstance(error, BrokenPipeError):
            where = "the output"
        print(f"error: {printable(where, LONGEST)}: {error.strerror or error}", file=sys.stderr)
        return 2
    if is_out_of_memory(error):
        print(f"error: the memory is too small ({first_line_of_allocator(error)}): a smaller "
              "--batch-size, --crop or --size needs less", file=sys.stderr)
        return 2
    # torch's kernels for 16 bits ask what the CPU has, and find out only then that /proc is absent.
    if isinstance(error, RuntimeError) and "cpuinfo" in str(error):
        print(f"error: torch cannot tell what this CPU has ({sentence_of(error)}): see to it that "
              "/proc is mounted", file=sys.stderr)
        return 2
    if isinstance(error, ImportError) and is_of_others(error):
        package = error.name.partition(".")[0]
        print(f"error: {package} is absent, or only half of it is installed ({sentence_of(error)}"
              f"): pip install --force-reinstall {package}", file=sys.stderr)
        return 2
    raise error


def is_of_others(error):
    """Is what could not be imported a package, and no file of ours?"""
    name = (error.name or "").partition(".")[0]
    project = Path(__file__).parent.parent
    is_ours = (project / name).exists() or (project / f"{name}.py").exists()
    return bool(name) and not is_ours


def sentence_of(error):
    """The message of an error, in one line whatever names are in it. One from a loader's worker
    comes behind that worker's traceback.
    """
    message = str(error).strip()
    if message.startswith("Caught "):
        message = message.rpartition("data.DatasetError: ")[2]
    return printable(message, LONGEST)


def is_out_of_memory(error):
    """Did an allocator, of torch, numpy or Python, find no memory?"""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and names_lack_of_memory(str(error))


def names_lack_of_memory(text):
    return any(sign in text for sign in OUT_OF_MEMORY)


def first_line_of_allocator(error):
    """The line of an allocator's message that says how much was asked for."""
    lines = str(error).strip().splitlines() or ["nothing more is known"]
    telling = [line for line in lines if names_lack_of_memory(line)]
    return printable((telling or lines)[0], LONGEST)


# ------------------------------ the streams, and Ctrl-C

class Patient:
    """A stream for errors that nobody may be reading: what cannot be written is left out."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


def prepare_streams():
    """Let nothing that is printed end a command: a character that the terminal's encoding lacks is
    escaped, and a stream that was closed is replaced.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
            setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = Patient(sys.stderr)


def drop_output(code):
    """Flush the output while an error can still be said, which at Python's end it cannot.

    -> the exit code: `code`, or 2 where all went well but for the output
    """
    try:
        sys.stdout.flush()
        return code
    except OSError as error:
        if not code:
            print(f"error: the output: {error.strerror}", file=sys.stderr)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        return code or 2


class Interrupted:
    """Was Ctrl-C pressed? Raised inside an import or a library, a KeyboardInterrupt can come out as
    any other error.
    """
    came = False


def interrupt(number, frame):
    """What Ctrl-C does to a command, but for the steps of a training run (extras/stopping.py)."""
    Interrupted.came = True
    raise KeyboardInterrupt


# ------------------------------ what is written and said meanwhile

def make_folder(path):
    """-> Path of the folder, made if it is not there. Raises UsageError."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path}: {error.strerror}") from None
    return folder


def show_progress(what):
    """-> progress(done, total) that rewrites one line on a terminal, and is silent elsewhere; with
    the time left, after some seconds. total: None where it is not known.
    """
    began = time.monotonic()

    def progress(done, total):
        if not sys.stderr.isatty():
            return
        line = f"{what} {done}/{total or '?'}"
        passed = time.monotonic() - began
        if total and passed > 3:
            left = passed / done * max(0, total - done)
            line += f", {describe_seconds(left)} left"
        end = "\n" if done == total else ""
        print(f"\r{line:<60}", end=end, file=sys.stderr, flush=True)
    return progress


def describe_seconds(seconds):
    """75 -> "1:15"; 3675 -> "1:01:15"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


# ------------------------------ flags that several commands have

def number(kind, low, high=math.inf, open_low=False):
    """An argparse type: a number of `kind` (int or float) in [low, high], or in (low, high] with
    open_low.
    """
    def parse(text):
        value = kind(text)
        is_above = value > low if open_low else value >= low
        if is_above and value <= high and math.isfinite(value):
            return value
        bounds = f"above {low}" if open_low else f"at least {low}"
        if high < math.inf:
            bounds += f" and at most {high}"
        raise argparse.ArgumentTypeError(f"{text} is not {bounds}")

    parse.__name__ = kind.__name__  # what argparse calls it: "invalid int value"
    return parse


class FlagParser(argparse.ArgumentParser):
    """An argparse parser whose errors are UsageErrors: one sentence, in a terminal as in a
    notebook.
    """

    def error(self, message):
        command = self.prog if self.prog.startswith("python") else f"python {self.prog}"
        raise UsageError(f"{message}; {command} --help lists the flags")


def add_fold_flags(parser, default_folds=2):
    """--fold, --folds and --fold-by, for commands that train, score or check a data set."""
    parser.add_argument("--fold", type=number(int, 0), metavar="N",
                        help="hold out this fold in place of the data's own splits; counts from 0")
    parser.add_argument("--folds", type=number(int, 2), default=default_folds, metavar="N",
                        help="how many folds (default 2)")
    parser.add_argument("--fold-by", choices=("drive", "block", "shuffle"),
                        help="whole drives, blocks of neighbours, or shuffled frames, which leak")
