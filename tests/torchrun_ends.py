"""The last moment of runs under torchrun: none may end with a core dump, or lose a step.

    python tests/torchrun_ends.py                 # 100 ends, seed 0; prints how they ended
    python tests/torchrun_ends.py --count 8       # each kind of end once

gloo's thread may still hold the last reduced tensor when Python is being finalised, which ended
processes with SIGABRT after all work was done (`leave` in extras/distributed.py). Each trial is a
run of two processes on a small data set, ended in one of the ways of KINDS in turn.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from small_runs import SMALL, rows  # noqa: E402  (after the path is set)
from test_train import FAULT, TORCHRUN  # noqa: E402

from conftest import ROOT, wait_for_step, write_folder  # noqa: E402
from extras.run_folder import read_run  # noqa: E402

KINDS = ("plain", "workers", "tensorboard", "resumed", "SIGTERM", "SIGHUP", "broken pipe",
         "restarted")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
STEPS = 6                                              # of a run that is left alone
SECONDS = 180                                          # after that it hangs


class Failed(Exception):
    """What is wrong with an end; the message says what was found."""


def start(*words):
    """torchrun WORDS... in the background, both streams in one, in a group of its own."""
    words = [sys.executable, *TORCHRUN, *words]
    return subprocess.Popen([str(word) for word in words], env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)


def wait(process):
    """Until it ends -> what it said. One that does not is killed, with all of its processes."""
    try:
        return process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise Failed(f"no end within {SECONDS} s\n{process.communicate()[0]}") from None


def run_to_its_end(kind, folder, flags):
    """A run that nobody interrupts -> what it said."""
    script = ROOT / "train.py"
    flags = [*flags, "--iters", STEPS, "--eval-every", 2]
    torchruns_own = []
    if kind == "workers":
        flags += ["--workers", 2]
    if kind == "tensorboard":
        flags += ["--tensorboard"]
    if kind == "resumed":
        shutil.copytree(folder / "stopped", folder / "run")
        flags = ["--resume", "--out", folder / "run", "--iters", 2 * STEPS]
    if kind == "restarted":
        script = folder / "fault.py"
        torchruns_own = ["--max-restarts", 1]
    process = start(*torchruns_own, script, *flags)
    said = wait(process)
    if process.returncode != 0:
        raise Failed(f"exit code {process.returncode}\n{said}")
    return said


def run_and_stop(kind, folder, flags, chance):
    """A run that is told to stop -> what it said after that."""
    process = start(ROOT / "train.py", *flags, "--iters", 5000, "--eval-every", 10)
    if kind == "broken pipe":
        for line in process.stdout:
            if line.startswith("step 20/"):
                break
        process.stdout.close()                         # nobody can read what it says from now on
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise Failed(f"no end within {SECONDS} s") from None
        return ""
    wait_for_step(process, folder / "run", 10)
    time.sleep(chance.uniform(0, 0.5))
    process.send_signal(getattr(signal, kind))
    said = wait(process)
    if f"stopped by {kind} after step" not in said:
        raise Failed(f"it did not say that it was stopped\n{said}")
    return said


def check_end(kind, run, said):
    """Raise Failed for a core dump, or a log and a checkpoint that do not agree."""
    for sign in ("SIGABRT", "Signal 6", "core dumped", "terminate called"):
        if sign in said:
            raise Failed(f"{sign}\n{said}")
    saved = read_run(run / "last.pth")["training"]["step"]
    logged = len(rows(run)) - 1
    if saved != logged:
        raise Failed(f"{logged} steps in the log, {saved} in last.pth\n{said}")
    wanted = {"resumed": 2 * STEPS, "SIGTERM": 10, "SIGHUP": 10, "broken pipe": 20}
    if saved < wanted.get(kind, STEPS):
        raise Failed(f"ended at step {saved}\n{said}")


def try_one(kind, folder, chance):
    """One trial -> "" or what is wrong."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    flags = ["--data", f"folder:{folder / 'set'}", *SMALL, "--out", run]
    try:
        if kind in ("SIGTERM", "SIGHUP", "broken pipe"):
            said = run_and_stop(kind, folder, flags, chance)
        else:
            said = run_to_its_end(kind, folder, flags)
        check_end(kind, run, said)
    except Failed as error:
        return str(error)
    return ""


def main():
    parser = argparse.ArgumentParser(description="Ends of runs under torchrun, by the hundred.")
    parser.add_argument("--count", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of signals (default 0)")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    bad = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder / "set")
        (folder / "fault.py").write_text(FAULT.format(root=str(ROOT)))
        problem = try_one("plain", folder, chance)
        if problem:
            raise SystemExit(problem)
        (folder / "run").rename(folder / "stopped")
        for number in range(args.count):
            kind = KINDS[number % len(KINDS)]
            problem = try_one(kind, folder, chance)
            print(f"{number + 1} {kind}: {problem or 'ended well'}", flush=True)
            bad[kind] += bool(problem)
    print(f"{args.count} ends, {sum(bad.values())} bad: {dict(bad)}")
    return 1 if sum(bad.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
