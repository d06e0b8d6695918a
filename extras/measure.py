"""Time and memory of several candidates, which take turns, each in a process of its own.

    candidates = {"plain": Candidate(make_plain), "ours": Candidate(make_ours)}
    timings = run_in_turns(candidates, rounds=9, device=torch.device("cpu"))
    ratio = compare(timings["plain"], timings["ours"])

As they take turns, a machine that slows down slows all of them: trust the ratios, and how far these
spread over the rounds. Memory is what a process takes at its peak beyond what it held before its
first run (on CUDA: the allocator's peak).
"""

import ctypes
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from extras.cli import UsageError
from extras.machine import keep_freed_memory

WARMUP = 2                                                        # rounds that do not count


@dataclass(frozen=True)
class Options:
    """What the flags of bench.py say; every subject reads them here."""
    size: tuple                                                   # H, W
    batch: int
    rounds: int
    device: torch.device
    dtype: torch.dtype
    classes: int
    compile: bool = False
    data: str | None = None                                       # for `data` and `runtimes`
    checkpoint: str | None = None                                 # whose weights `runtimes` takes
    size_given: bool = True                                       # else a file's own size counts
    clock: str = "wall"                                           # for `runtimes` and files

    def with_two_images(self):
        """For what trains: a batch of two at least."""
        return replace(self, batch=max(self.batch, 2))

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class Candidate:
    """What is measured, in the setting in which it is measured."""
    make: Callable              # make() -> run, and run() is timed
    keep_memory: bool = True    # extras.machine.keep_freed_memory, as train.py and eval.py do
    clock: str = "wall"         # one of CLOCKS


@dataclass
class Timing:
    rounds: list        # seconds of each timed round
    first: float        # seconds of the very first run, which compiles
    peak: int | None    # bytes; None where the system does not tell

    @property
    def seconds(self):
        return statistics.median(self.rounds)

    def as_row(self):
        return {"seconds": self.seconds, "round_seconds": self.rounds,
                "peak_bytes": self.peak, "first_run_seconds": self.first}


# ---------------------------------------------------------------- one process

def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


CLOCKS = {
    "wall": time.perf_counter,
    "cpu": time.process_time,               # of all threads of the process, and of it alone
}


def seconds_of(run, device, clock="wall"):
    now = CLOCKS[clock]
    synchronise(device)
    start = now()
    run()
    synchronise(device)
    return now() - start


def return_freed_memory():
    """Give what building the models freed back to the system: it is not memory to run in."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)


def process_memory(field):
    """A line of /proc/self/status in bytes; None where there is none (not Linux)."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(field):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def forget_peak(device):
    """Let the peak count from now on. -> bytes held now, None where the system does not tell"""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    return process_memory("VmRSS")


def peak_memory(device):
    """-> bytes, None where the system does not tell"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_memory("VmHWM")


def serve(pipe, candidate, device):
    """The body of a candidate's process: for each True run once and send the seconds.

    At the first False send the peak in bytes, and end.
    """
    run = candidate.make()
    return_freed_memory()
    if candidate.keep_memory:
        keep_freed_memory()
    before = forget_peak(device)
    while pipe.recv():
        pipe.send(seconds_of(run, device, candidate.clock))
    peak = peak_memory(device)
    pipe.send(None if peak is None else peak - before)


# ---------------------------------------------------------------- taking turns

class Worker:
    """A candidate's process, seen from ours."""

    def __init__(self, name, candidate, device):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, candidate, device)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        # our copy of its end is closed, so that a dead process is an EOFError in ask(), not a wait
        theirs.close()

    def ask(self, message):
        """Send True for a run, False for the end. -> seconds of the run, or the peak in bytes.

        Raises UsageError if the process is no more.
        """
        try:
            self.pipe.send(message)
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            raise UsageError(f"{self.name} failed in its process; "
                             "its own message stands above") from None


def run_in_turns(candidates, rounds, device):
    """{name: Candidate} -> {name: Timing}. Each round runs every candidate once, in their order.

    Raises UsageError if one fails.
    """
    workers = {name: Worker(name, candidate, device) for name, candidate in candidates.items()}
    seconds = {name: [] for name in candidates}
    for _ in range(WARMUP + rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.ask(True))
    timings = {}
    for name, worker in workers.items():
        timed = seconds[name][WARMUP:]
        first = seconds[name][0]
        timings[name] = Timing(timed, first, peak=worker.ask(False))
    for worker in workers.values():
        worker.process.join()
    return timings


@dataclass
class Ratio:
    """How many times faster ours is."""
    median: float       # of the two medians
    low: float          # the smallest of the rounds, pair by pair
    high: float         # the largest

    def as_row(self):
        return {"ratio": self.median, "ratio_min": self.low, "ratio_max": self.high}

    def cells(self):
        """For a table: the ratio, and its range over the rounds."""
        interval = f"{self.low:.2f}-{self.high:.2f}"
        return f"{self.median:.2f}", interval


def compare(theirs, ours):
    """Two Timings of the same rounds and the same setting -> Ratio."""
    pairs = [a / b for a, b in zip(theirs.rounds, ours.rounds, strict=True)]
    return Ratio(theirs.seconds / ours.seconds, min(pairs), max(pairs))


# ---------------------------------------------------------------- compiling and tables

def compile_forward(model, device):
    """torch.compile for the one size that is measured; on CUDA with CUDA graphs."""
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(model, dynamic=False, mode=mode)


def print_compile_times(timings):
    fastest = min(timing.first for timing in timings)
    slowest = max(timing.first for timing in timings)
    print(f"compiling took the first run {fastest:.0f} to {slowest:.0f} s", flush=True)


def print_row(cells, widths):
    """A row of a table: the first cell at the left of its column, the others at the right."""
    line = f"{cells[0]:<{widths[0]}}"
    for cell, width in zip(cells[1:], widths[1:], strict=True):
        line += f"{cell:>{width}}"
    print(line, flush=True)


def mib(count):
    return "-" if count is None else f"{count / 2 ** 20:,.0f}"
