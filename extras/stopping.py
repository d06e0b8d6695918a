"""A run that is told to stop, or has to: what it has done is saved first.

    with Stop() as stop:
        for step in ...:
            with keep_what_was_done(run, step, stop, save):
                ...                                    # read the next batch
            if stop.asked(...): save, then raise stopped(...)

    SIGTERM            a machine that is taken away
    SIGHUP             a terminal that was closed; ignored under nohup
    Ctrl-C             a second one stops at once
    a broken output    `python train.py | head -1`, or a full disk behind `> log.txt`
"""

import contextlib
import os
import signal
import sys
import threading
from multiprocessing.connection import Listener

import torch
import torch.distributed as dist

from data import DatasetError
from extras.cli import ProcessLost, Stopped, UsageError, interrupt, is_out_of_memory
from extras.distributed import all_reduce, rank
from extras.run_lock import close_in_worker

SIGHUP = getattr(signal, "SIGHUP", None)               # Windows has none
OUTPUT_LOST = 1000                                     # no signal has this number
ENDINGS = {                                            # {signal: (its name, the exit code)}
    signal.SIGTERM: ("SIGTERM", 0),
    SIGHUP: ("SIGHUP", 0),
    OUTPUT_LOST: ("the loss of its output", 0),
    signal.SIGINT: ("Ctrl-C", 130),
}


# ------------------------------ being told to stop

class Stop:
    """Inside `with Stop() as stop`, a signal, or an output that nobody takes any more, only leaves
    a note; a second Ctrl-C stops at once.
    """

    def __init__(self):
        self.signal_number = 0                         # of the signal that came, 0 before
        self.handlers_before = {}
        self.output = None

    def __enter__(self):
        self.output = Output(sys.stdout, self)
        sys.stdout = self.output
        if not in_main_thread():
            return self
        numbers = [signal.SIGTERM, signal.SIGINT]
        if SIGHUP is not None and signal.getsignal(SIGHUP) != signal.SIG_IGN:
            numbers.append(SIGHUP)
        for number in numbers:
            self.handlers_before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        # What is still to be said goes where it can be read.
        sys.stdout = sys.stderr if self.output.is_lost else self.output.stream

    def note(self, number, frame):
        if self.signal_number and number == signal.SIGINT:
            interrupt(number, frame)
        self.signal_number = self.signal_number or number
        name, _ = ENDINGS[number]
        # A signal may come in the middle of another print, and SIGHUP's terminal is gone.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            print(f"\n{name}: finishing this step, then saving (Ctrl-C again stops at once)",
                  file=sys.stderr, flush=True)

    def asked(self, device, may_exchange):
        """-> the number of the signal that came, or 0.

        Under torchrun a signal reaches one process first, and all must stop after the same step:
        there they tell each other, which they can only do at a step where every process asks.
        may_exchange: this is such a step; at any other one the answer is 0
        """
        if not dist.is_initialized():
            return self.signal_number
        if not may_exchange:
            return 0
        number = torch.tensor(self.signal_number, device=device)
        return int(all_reduce(number, dist.ReduceOp.MAX))


def in_main_thread():
    """No other thread may set a signal's handler."""
    return threading.current_thread() is threading.main_thread()


def stopped(signal_number, step, run):
    """-> the exception for a run that was told to stop by this signal, and has saved."""
    name, code = ENDINGS[signal_number]
    return Stopped(f"stopped by {name} after step {step}, all of it saved; "
                   f"to go on: {run.task.command} --resume --out {run.folder}", code)


class Output:
    """A stream that tells a Stop when it can no longer be written, and is silent from then on."""

    def __init__(self, stream, stop):
        self.stream = stream
        self.stop = stop
        self.is_lost = False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.try_to(self.stream.write, text)
        return len(text)

    def flush(self):
        self.try_to(self.stream.flush)

    def try_to(self, do, *arguments):
        if self.is_lost:
            return
        try:
            do(*arguments)
        except OSError:
            self.is_lost = True
            self.stop.note(OUTPUT_LOST, None)


# ------------------------------ having to stop

@contextlib.contextmanager
def keep_what_was_done(run, step, stop, save):
    """Around reading a batch: where that fails, the steps before it are saved.

    A step that fails is another matter: its forward pass has moved BatchNorm's statistics already.
    save(run, step): run_folder's
    """
    def keep():
        if step > run.start:                           # before that there is nothing new
            run.loss_log.flush()
            save(run, step)

    try:
        yield
    except DatasetError:                               # a frame broke since the run began
        keep()
        raise
    except (RuntimeError, MemoryError, ConnectionError, EOFError) as error:
        if is_out_of_memory(error):
            keep()
            raise
        if not is_lost_worker(error):
            raise
        keep()
        if stop.signal_number:                         # the signal reached the worker first
            raise stopped(stop.signal_number, step, run) from None
        # Under torchrun only the first process writes, and it hears of this in the middle of a
        # step: what stands in the folder then is of the last validation.
        kept = "what was done is saved" if rank() == 0 else "what was saved last is"
        raise ProcessLost("a process that reads data ended by itself, perhaps for lack of memory: "
                          f"fewer --workers may help; {kept} in {run.folder}") from None


def is_lost_worker(error):
    """The loader says so; or a batch on its way broke off before the loader could tell."""
    if isinstance(error, (ConnectionError, EOFError)):
        return True
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


# ------------------------------ files and workers

@contextlib.contextmanager
def until_written():
    """Around the writing of a file: a Ctrl-C waits until it is whole.

    Raised inside torch.save it would come out as another error, of a disk that may be full.
    """
    if not in_main_thread():
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        for number in came:
            signal.raise_signal(number)


def start_workers(loader):
    """-> the iterator over `loader`, whose lost workers are told by its `next` only. Raises
    UsageError.

    torch's handler of SIGCHLD would raise the error wherever this process is: in the middle of a
    step, or of a file.
    """
    if loader.num_workers:
        check_sockets()
    if not in_main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    if str(getattr(before, "__module__", "")).startswith("torch."):
        before = signal.SIG_DFL                        # torch's, of an earlier loader
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, before)
    return batches


def check_sockets():
    """Raise UsageError where the folder for temporary files cannot hold a socket.

    A worker sends its batches through one. It makes it in a thread of its own: where that fails,
    the batch would be waited for without end.
    """
    try:
        Listener().close()
    except OSError as error:
        raise UsageError(f"--workers need a socket in the folder for temporary files, and none can "
                         f"be made there ({error.strerror or error}): set TMPDIR to another "
                         "folder, or add --workers 0") from None


def prepare_worker(worker):
    """For a loader's worker. A terminal's Ctrl-C or end reaches it too, and is not its to answer.

    SIGTERM ends it without the noise that would make the loader raise in the middle of the last
    step.
    """
    close_in_worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if SIGHUP is not None:
        signal.signal(SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
