"""Signals, broken outputs, sizes, encodings and environments: a command ends with a sentence, and
a run with all that it has done.
"""

import itertools
import os
import resource
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from small_runs import SMALL, rows, train_with, write_teacher

import train
from conftest import ROOT, command, wait_for_step, write_folder
from extras import cli, stopping
from extras.cli import ProcessLost, UsageError
from extras.memory import check_memory
from extras.run_data import Batches
from model import load_checkpoint, read_checkpoint, save_checkpoint, segformer

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*args, **options):
    """`python train.py ARGS...` in the background, with a group of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENV} | options
    arguments = [os.fsencode(str(arg)) for arg in args]
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], text=True,
                            start_new_session=True, **options)


def saved_step(out):
    return torch.load(out / "last.pth", weights_only=True)["training"]["step"]


# ---------------------------------------------------------------- outputs that break

@pytest.mark.parametrize("errors", [subprocess.PIPE, subprocess.STDOUT], ids=["head", "2>&1 head"])
def test_a_broken_pipe_saves_and_stops(errors, tmp_path, folder):
    """python train.py ... | head -1"""
    out = tmp_path / "run"
    flags = ("--data", folder, *SMALL, "--iters", 5000, "--eval-every", 5000)
    process = start(*flags, "--out", out, stderr=errors)
    while not process.stdout.readline().startswith("step 20/"):
        assert process.poll() is None
    process.stdout.close()

    said = process.stderr.read() if process.stderr else ""
    assert process.wait(60) == 0
    assert saved_step(out) == len(rows(out)) - 1 >= 40
    assert "Traceback" not in said
    if process.stderr:
        assert "finishing this step, then saving" in said
        assert f"stopped by the loss of its output after step {saved_step(out)}" in said


def test_a_full_disk_behind_the_output_saves_and_stops(tmp_path, folder, monkeypatch):
    class Full:
        def write(self, text):
            if "step 1/" in text:
                raise OSError(28, "No space left on device")

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Full())
    out = tmp_path / "run"
    flags = ("--data", folder, *SMALL, "--iters", 9, "--eval-every", 1)
    with pytest.raises(cli.Stopped, match="stopped by the loss of its output after step 2") as info:
        train_with(*flags, "--out", out)
    assert info.value.code == 0
    assert saved_step(out) == 2


SPEAK = """
import sys
sys.path.insert(0, {root!r})
from extras.cli import UsageError, run_command

def main():
    print("a result")
    print("a note", file=sys.stderr, flush=True)
    if {fails}:
        raise UsageError("a mistake")

run_command(main)
"""


@pytest.mark.parametrize("stream, fails, code", [
    ("1", False, 2), ("1", True, 2), ("2", False, 0), ("2", True, 2)])
def test_an_output_without_room_is_a_sentence(stream, fails, code):
    """Python itself would end with code 120 and half a traceback."""
    script = SPEAK.format(root=str(ROOT), fails=fails)
    line = f'exec "$0" -c "$1" {stream}>/dev/full'
    result = subprocess.run(["bash", "-c", line, sys.executable, script], capture_output=True,
                            text=True, env={**ENV, "PYTHONUNBUFFERED": ""})
    assert result.returncode == code
    if stream == "1":
        problem = "a mistake" if fails else "the output: No space left on device"
        assert result.stderr == f"a note\nerror: {problem}\n"


def test_closed_streams_are_no_error(tmp_path, folder):
    line = f"exec {sys.executable} {ROOT / 'train.py'} --data {folder} --iters 1 --crop 32 32 "
    line += f"--workers 0 --device cpu --out {tmp_path / 'run'} >&- 2>&-"
    assert subprocess.run(["bash", "-c", line], env=ENV).returncode == 0
    assert saved_step(tmp_path / "run") == 1


# ---------------------------------------------------------------- signals

@pytest.fixture
def sighup_as_in_a_terminal():
    """Under nohup this process ignores it, and so would the runs that it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_sighup_saves_and_stops_with_workers(tmp_path, folder, sighup_as_in_a_terminal):
    """A terminal's end reaches the whole group, also the processes that read data."""
    out = tmp_path / "run"
    flags = ("--data", folder, *SMALL, "--workers", 2, "--iters", 5000, "--eval-every", 5000)
    process = start(*flags, "--out", out)
    wait_for_step(process, out, 20)
    os.killpg(process.pid, signal.SIGHUP)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert f"stopped by SIGHUP after step {saved_step(out)}" in said
    assert saved_step(out) == len(rows(out)) - 1 >= 20


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_under_torchrun_saves(name, tmp_path, folder, sighup_as_in_a_terminal):
    """torchrun passes it on; its own end comes with a traceback of its own."""
    out = tmp_path / "run"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    flags = ("--data", folder, *SMALL, "--iters", 5000, "--eval-every", 10, "--out", out)
    words = [*torchrun, ROOT / "train.py", *flags]
    process = subprocess.Popen([sys.executable, *map(str, words)], env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_step(process, out, 20)
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=100)[0]
    assert "finishing this step, then saving" in said
    assert f"stopped by {name} after step {saved_step(out)}" in said, said
    assert saved_step(out) == len(rows(out)) - 1 >= 20


def test_under_nohup_sighup_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.asked("cpu", False) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_machine_without_sighup_stops_too(monkeypatch):
    monkeypatch.setattr(stopping, "SIGHUP", None)      # Windows
    before = signal.getsignal(signal.SIGTERM)
    with stopping.Stop() as stop:
        stop.note(signal.SIGTERM, None)
        assert stop.asked("cpu", False) == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_under_torchrun_only_the_first_process_says_that_it_has_saved(monkeypatch):
    loss_log = types.SimpleNamespace(flush=lambda: None)
    run = types.SimpleNamespace(start=0, folder="runs/x", loss_log=loss_log)

    def save(run, step):
        pass

    for number, words in ((0, "what was done is saved in"), (1, "what was saved last is in")):
        monkeypatch.setattr(stopping, "rank", lambda number=number: number)
        reading = stopping.keep_what_was_done(run, 1, stopping.Stop(), save)
        with pytest.raises(ProcessLost, match=f"{words} runs/x"), reading:
            raise EOFError


# `python train.py ARGS...`, where Ctrl-C is pressed twice while step 2 is being saved.
IMPATIENT = """
import os, runpy, signal, sys, torch
save = torch.save

def save_slowly(content, file):
    print("saving step", content["step"], flush=True)
    if content["step"] == 2:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    save(content, file)

torch.save = save_slowly
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_ctrl_c_while_saving_leave_a_whole_file(tmp_path, folder):
    """The second one ends the run, when the file is there."""
    out = tmp_path / "run"
    flags = ("--data", folder, *SMALL, "--iters", 4, "--eval-every", 2, "--out", out)
    words = [ROOT / "train.py", *flags]
    process = subprocess.run([sys.executable, "-c", IMPATIENT, *map(str, words)], env=ENV,
                             capture_output=True, text=True, timeout=120)
    assert process.returncode == 130, process.stderr
    assert process.stderr.endswith("stopped at once; what was saved before is whole\n")
    assert "Traceback" not in process.stderr
    assert process.stdout.count("saving step 2") == 1  # best.pth; it never came to last.pth
    assert read_checkpoint(out / "best.pth")["step"] == 2
    assert load_checkpoint(out / "best.pth")
    assert saved_step(out) == 0
    assert not [path for path in out.iterdir() if "partial" in path.name]
    train_with("--resume", "--out", out)


# Ctrl-C in a process of its own: a worker of pytest-xdist that gets one may be gone.
WAITING = """
import signal
from extras import stopping

signal.signal(signal.SIGINT, signal.default_int_handler)
order = []
try:
    with stopping.until_written():
        signal.raise_signal(signal.SIGINT)
        order.append("written")
except KeyboardInterrupt:
    order.append("interrupted")
assert order == ["written", "interrupted"], order
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


def test_a_ctrl_c_while_a_file_is_written_waits():
    command("-c", WAITING, cwd=ROOT)


@pytest.mark.parametrize("args", [
    ("train.py", "--iters", "9"), ("eval.py", "x.pth"), ("bench.py",), ("data.py", "toy"),
    ("-m", "extras.predict", "x.pth", "y.png", "--out", "z")], ids=str)
def test_ctrl_c_while_importing_is_a_sentence(args, tmp_path):
    for seconds in (0.3, 0.7, 1.2, 2.0, 3.5):
        first = str(ROOT / args[0]) if args[0].endswith(".py") else args[0]
        process = subprocess.Popen([sys.executable, first, *args[1:]], cwd=tmp_path, env={
            **ENV, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
        assert "Traceback" not in output, output
        assert process.returncode in (130, 2, 0), output
        if process.returncode == 130:
            assert "stopped" in output


DISGUISED = """
import signal
from extras.cli import run_command

def main():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise AttributeError("torch._dynamo has no attribute 'exc'") from None

signal.signal(signal.SIGINT, signal.default_int_handler)
run_command(main)
"""


def test_a_ctrl_c_that_comes_out_as_another_error_is_one():
    output = command("-c", DISGUISED, cwd=ROOT, code=130)
    assert output == "stopped at once; what was saved before is whole\n"


# ---------------------------------------------------------------- workers

def test_a_worker_that_dies_loses_no_step(tmp_path, folder, monkeypatch):
    """The kernel ends one where the memory is short."""
    step = train.train_step
    steps = itertools.count(1)

    def killing(run, images, labels):
        if next(steps) == 5:
            for worker in run.batches._workers:
                os.kill(worker.pid, signal.SIGKILL)
        return step(run, images, labels)

    monkeypatch.setattr(train, "train_step", killing)
    out = tmp_path / "run"
    flags = ("--data", folder, *SMALL, "--workers", 1, "--iters", 50, "--eval-every", 50)
    with pytest.raises(ProcessLost, match="a process that reads data ended by itself"):
        train_with(*flags, "--out", out)
    assert saved_step(out) == len(rows(out)) - 1 >= 5


@pytest.mark.parametrize("error", [
    ConnectionResetError(104, "Connection reset by peer"),
    EOFError(),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
])
def test_a_batch_that_broke_off_is_a_worker_that_died(error, tmp_path, folder, monkeypatch):
    """Killed while it hands a batch over, it is not gone yet when the loader looks for it."""
    read = train.next_batch
    steps = itertools.count(1)

    def breaking(run):
        if next(steps) == 5:
            raise error
        return read(run)

    monkeypatch.setattr(train, "next_batch", breaking)
    out = tmp_path / "run"
    flags = ("--data", folder, *SMALL, "--workers", 0, "--iters", 9, "--eval-every", 9)
    with pytest.raises(ProcessLost, match="a process that reads data ended by itself"):
        train_with(*flags, "--out", out)
    assert saved_step(out) == 4


# ---------------------------------------------------------------- sizes

def test_batches_are_made_one_at_a_time_and_are_the_same():
    lazy = Batches(3, 50, 8, 4)
    listed = [range(step * 8, step * 8 + 4) for step in range(3, 50)]
    assert list(lazy) == listed
    first = next(iter(Batches(10**14, 10**15, 8, 4)))
    assert first == range(8 * 10**14, 8 * 10**14 + 4)


def test_a_run_of_a_million_million_steps_begins_at_once(tmp_path, folder):
    out = tmp_path / "run"
    process = start("--data", folder, *SMALL, "--iters", 10**12, "--eval-every", 5, "--out", out)
    wait_for_step(process, out, 5)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped by SIGTERM" in said


@pytest.mark.parametrize("flags, sentence", [
    (("--iters", 10**18), "at most 1000000000000000"),
    (("--epochs", 10**400), "at most 1000000000000000"),
    (("--batch-size", 10**12), r"the 1,000,000,000,000 images of a step.* GiB and more"),
    (("--accum", 10**12), r"images of a step.* GiB and more"),
    (("--crop", 1000000, 1000000), r"1000000x1000000 pixels each, need .* GiB and more"),
    (("--size", 1000000, 1000000), r"a frame of 1000000x1000000 pixels"),
    (("--workers", 10**6), "at most 1024"),
    (("--scale-range", "1e-320", "1e-320"), "is not at least 1e-06"),
    (("--device", "meta"), "device 'meta' is not to be had here"),
    (("--device", "nonsense"), "device 'nonsense' is not to be had here"),
])
def test_absurd_flags_are_refused_before_anything_is_done(flags, sentence, tmp_path, folder):
    sizes = ("--crop", 32, 32, "--batch-size", 1, "--workers", 0)
    with pytest.raises(UsageError, match=sentence):
        train_with("--data", folder, *sizes, *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_zero_byte_in_a_path_is_a_sentence(folder):
    for flag in ("data", "out", "teacher", "init", "cache"):
        with pytest.raises(UsageError, match=f"--{flag} holds a zero byte"):
            train.train(**({"data": folder} | {flag: "toy\0"}))


def test_memory_is_asked_of_the_machine():
    args, _ = train.FLAGS.parse(["--crop", "512", "1024", "--batch-size", "8"])
    check_memory(args, torch.device("cpu"))


def limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))


def test_a_failing_allocator_is_a_sentence(tmp_path, folder):
    flags = ("--data", folder, "--workers", 0, "--device", "cpu", "--out", tmp_path / "run")
    large = ("--crop", 2048, 2048, "--batch-size", 16, "--iters", 1)
    process = start(*flags, *large, preexec_fn=limit_memory)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert errors.startswith("error: the memory is too small (")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("error, sentence", [
    (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate 9 GiB"),
    (MemoryError(), "nothing more is known"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"), "CUDA out of memory. Tried"),
    (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: 9"), "DefaultCPU"),
])
def test_each_allocators_failure_is_known(error, sentence, capsys):
    assert cli.report(error) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    with pytest.raises(RuntimeError, match="a bug"):
        cli.report(RuntimeError("a bug"))


# ---------------------------------------------------------------- encodings

LATIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, LATIN], ids=["ascii", "LC_ALL=C"])
def test_umlauts_where_the_terminal_has_none(env, tmp_path):
    root = tmp_path / "stra\u00dfe"
    spec = write_folder(root)
    (root / "classes.txt").write_text("B\u00e4ume\nStra\u00dfe\nHimmel\n", encoding="utf-8")
    out = tmp_path / "\u00fcbung"
    process = start("--data", spec, *SMALL, "--iters", 1, "--out", out, env=ENV | env)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "\\xe4ume" in said
    assert rows(out, "scores.csv")[0][4] == "B\u00e4ume"
    assert load_checkpoint(out / "best.pth").classes[0] == "B\u00e4ume"


def test_a_folder_whose_name_is_no_text(tmp_path, folder):
    out = os.fsencode(tmp_path / "run") + b"\xff"
    command_line = [sys.executable, str(ROOT / "train.py"), "--data", folder, "--iters", "2",
                    "--crop", "32", "32", "--workers", "0", "--device", "cpu", "--out", out]
    result = subprocess.run(command_line, capture_output=True, text=True, env=ENV)
    assert result.returncode == 0, result.stderr
    assert os.path.exists(out + b"/last.pth")
    resume = [*command_line[:2], "--resume", "--iters", "3", "--out", out]
    result = subprocess.run(resume, capture_output=True, text=True, env=ENV)
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------- environments

@pytest.mark.parametrize("env, sentence", [
    ({"RANK": "0"}, "RANK is set, as torchrun does, but LOCAL_RANK is no number"),
    ({"RANK": "x"}, "but RANK is no number"),
    ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1"}, "MASTER_ADDR"),
])
def test_half_of_torchruns_environment_is_a_sentence(env, sentence, monkeypatch, folder):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=sentence):
        train_with("--data", folder, *SMALL, "--iters", 1)


# ---------------------------------------------------------------- weights that are not finite

def test_weights_that_are_not_finite_name_their_file_in_train_as_in_eval(tmp_path, folder):
    network = segformer("b0", 3)
    with torch.no_grad():
        network.decoder.classifier.bias[0] = float("nan")
    path = tmp_path / "nan.pth"
    save_checkpoint(network, path)
    out = ("--out", tmp_path / "run")
    for flag in ("--init", "--teacher"):
        with pytest.raises(UsageError, match=r"nan.pth: its weights are not finite, first decoder"):
            train_with("--data", folder, *SMALL, "--iters", 1, flag, path, *out)
    output = command("eval.py", path, "--data", folder, code=2)
    assert f"error: {path}" in output


def test_a_teacher_whose_outputs_overflow_is_named(tmp_path, folder):
    path = write_teacher(tmp_path / "b1.pth")
    network = load_checkpoint(path)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.mul_(1e30)
    save_checkpoint(network, path)
    with pytest.raises(UsageError, match=r"b1.pth: .*not finite|b1.pth: .*NaN"):
        train_with("--data", folder, *SMALL, "--iters", 1, "--teacher", path,
                   "--out", tmp_path / "run")


# ---------------------------------------------------------------- sentences

def test_an_error_is_one_line_that_moves_no_cursor(capsys):
    assert cli.report(UsageError("a\x1b[2J\nerror: forged")) == 2
    assert capsys.readouterr().err == "error: a\\x1b[2J\\nerror: forged\n"
    cli.report(FileNotFoundError(2, "No such file", "a\nb"))
    assert capsys.readouterr().err == "error: a\\nb: No such file\n"
    cli.report(UsageError("x" * 10**6))
    assert len(capsys.readouterr().err) < 3000
