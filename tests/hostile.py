"""A tester who wishes us ill: random combinations of flags, environments, data sets, run folders,
checkpoints, signals and broken outputs, none of which may end in a traceback, hang, or write where
it should not.

    python tests/hostile.py                   # 300 of them, seed 0; prints how they ended
    python tests/hostile.py --seed 7 --only 12          # one of them again, with all that it says

Each trial is a command on its own copy of a small data set, a teacher and a run of two steps, with
some of them damaged. Allowed ends:

    0          done, or stopped by a signal or a broken output, after saving
    1          a loss that is not finite, or a lost process: in a sentence
    2          a mistake, in a sentence
    130        Ctrl-C, where one was sent
    a signal   where it was sent before there was anything to save

With code 0 the log of the run must be whole, and its last.pth a run that can go on. With 1 and 2
there must be just one line that begins with "error:". Files outside of what the command was given
must be as they were.
"""

import argparse
import collections
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from fuzz import mutate  # noqa: E402
from small_runs import copy_run, edit_run, write_run  # noqa: E402
from test_run_folder import HOSTILE as HOSTILE_STATES  # noqa: E402

from conftest import ROOT, run_in_nursery  # noqa: E402  (after the path is set)
from extras.run_folder import read_run  # noqa: E402
from extras.run_logs import rows_until  # noqa: E402
from model import save_checkpoint, segformer  # noqa: E402
from small_datasets import BROKEN_FOLDERS, BROKEN_IMAGES, break_folder, break_image  # noqa: E402

BASH = shutil.which("bash")
SECONDS = 120                                          # after that it hangs
SMALL = ("--crop", "32", "32", "--batch-size", "2", "--workers", "0", "--device", "cpu",
         "--iters", "3", "--eval-every", "2")

# ---------------------------------------------------------------- what can be hostile

# {set}, {dir} ...: places in the trial's folder
FLAGS = """
--iters 0|--iters 1000000000000000000|--iters 1|--iters x|--epochs 1|--epochs 99999999999999999999
--lr 1e30|--lr nan|--lr 1e-320|--lr -1|--lr 1e308|--warmup 1|--warmup 0|--warmup 2
--crop 32 100000000|--crop 33 47|--crop 1 1|--crop 64 32|--size 32 32|--size 1 1|--size 48 60
--size 40 50000000|--batch-size 3|--batch-size 0|--batch-size 1000000000000|--accum 3
--accum 1000000000|--weight-decay 1e300|--weight-decay 0.1|--grad-clip 0|--grad-clip 1e-320
--temperature 1e-300|--temperature 0|--lambda-kl 1|--lambda-kl 1e300|--lambda-fd 1e38
--lambda-fd 0|--lambda-m 1e38|--lambda-s 0|--lambda-pe inf|--lambda-dice 0|--lambda-dice 2
--fold 0|--fold 1|--fold 5|--fold -1|--folds 99|--fold 0 --folds 3|--fold 0 --fold-by drive
--fold 0 --fold-by shuffle|--scale-range 0.000001 16|--scale-range 16 16|--scale-range 2 1
--scale-range 1e-320 1e-320|--augment plain|--augment other|--loss dice-focal|--norm dyt
--norm dyt-dyl|--norm none|--amp bf16|--amp auto|--amp maybe|--workers 1|--workers -1
--workers 1000000|--seed 2147483648|--seed 99999999999|--seed 5|--eval-every 1
--eval-every 999999999|--eval-every 0|--device meta|--device cuda|--device mps|--device cpu:9
--device ,|--teacher {none}|--teacher {dir}|--teacher {nan}|--teacher {fifo}|--teacher {set}/x.txt
--teacher {teacher}|--init {nan}|--init {teacher}|--init {fifo}|--init {damaged}|--init {best}
--teacher {damaged}|--student b1|--student b9|--data folder:|--data camvid:{set}|--data toys
--data folder:~nouser/x|--data folder:{file}|--data cityscapes:{dir}|--cache {file}|--cache {dir}
--cache ~nouser/x|--cache {none}/a/b|--out {file}|--out {set}|--out /dev/null|--out /proc/x
--out {dir}|--out {none}/a/b|--out {odd}|--tensorboard|--resume|--help|--frobnicate|--compile x
"""

ENVIRONMENTS = (
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONOPTIMIZE": "2"},
    {"PYTHONUNBUFFERED": "1"},
    {"RANK": "0"},
    {"RANK": "nonsense"},
    {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "x", "MASTER_ADDR": "?", "MASTER_PORT": "1"},
    {"TORCHELASTIC_RESTART_COUNT": "nonsense"},
    {"HOME": "/proc/nowhere"},                         # where no folder can be made
    {"HOME": ""},
    {"XDG_CACHE_HOME": "/dev/null"},
    {"XDG_CACHE_HOME": "/proc"},
    {"XDG_CACHE_HOME": "relative"},
    {"TMPDIR": "/nowhere"},
    {"COLUMNS": "nonsense"},
    {"OMP_NUM_THREADS": "nonsense"},
    {"CUDA_VISIBLE_DEVICES": "nonsense"},
    {"PATH": ""},
)

EVENTS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGINT twice", "head", "2>&1 head", "full output",
          "closed output", "full errors")


def void_labels(trial):
    for path in (trial.data / "labels").iterdir():
        Image.fromarray(np.full((40, 48), 255, np.uint8)).save(path)


def one_pixel(trial):
    for kind in ("images", "labels"):
        name = trial.data / kind / "frame_5.png"
        Image.open(name).resize((1, 1)).save(name)


def odd_classes(trial):
    lines = "\x1b[2Jclass\nB\u00e4ume 1 2 \u00b2\nerror: forged\n"
    (trial.data / "classes.txt").write_text(lines, encoding="utf-8")


def many_classes(trial):
    (trial.data / "classes.txt").write_text("".join(f"class {i}\n" for i in range(300)))


def long_class(trial):
    (trial.data / "classes.txt").write_text("a\nb\n" + "c" * 100_000 + "\n")


def odd_lists(trial):
    (trial.data / "train.txt").write_bytes(b"frame_0\nframe_0\n\0\n\xff\n")


def empty_list(trial):
    (trial.data / "val.txt").write_text("")


def one_frame(trial):
    for kind in ("images", "labels"):
        for path in sorted((trial.data / kind).iterdir())[1:]:
            path.unlink()


def data_damages():
    damages = {f.__name__: f for f in (void_labels, one_pixel, odd_classes, many_classes,
                                       long_class, odd_lists, empty_list, one_frame)}
    for what in BROKEN_FOLDERS:
        damages[f"folder: {what}"] = lambda trial, what=what: break_folder(trial.data, what)
    for kind in BROKEN_IMAGES:
        damages[f"image: {kind}"] = lambda trial, kind=kind: break_image(
            kind, trial.data / "images" / "frame_3.png")
    damages["image: pipe"] = lambda trial: replace_by_pipe(trial.data / "images" / "frame_3.png")
    damages["label: pipe"] = lambda trial: replace_by_pipe(trial.data / "labels" / "frame_3.png")
    return damages


RUN_NAMES = ("last.pth", "best.pth", "previous.pth", "log.csv", "scores.csv", "recipe.json",
             "pictures.png", "run.lock", "last.pth.partial", "log.csv.partial", "best.pth.partial")


def replace_by_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def replace_by_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def replace_by_link(path):
    """To a file outside of the run, which must stay as it is."""
    victim = path.parent.parent / "outside" / path.name
    if path.exists():
        shutil.copy(path, victim)
        path.unlink()
    else:
        victim.write_text("mine")
    path.symlink_to(victim)


def cut_off(path):
    if path.exists():
        path.write_bytes(path.read_bytes()[:-700])


def fill_with_bytes(path):
    path.write_bytes(bytes(range(256)) * 10)


def remove(path):
    path.unlink(missing_ok=True)


def run_damages():
    damages = {}
    for change in (replace_by_pipe, replace_by_folder, replace_by_link, cut_off, fill_with_bytes,
                   remove):
        for name in RUN_NAMES:
            damages[f"{name}: {change.__name__}"] = (
                lambda trial, name=name, change=change: change(trial.run / name))
    for what, change in HOSTILE_STATES.items():
        damages[f"state: {what}"] = lambda trial, change=change: edit_whole(trial, change)
    damages["last.pth: fuzzed"] = lambda trial: fuzz_file(trial, trial.run / "last.pth")
    damages["best.pth: fuzzed"] = lambda trial: fuzz_file(trial, trial.run / "best.pth")
    return damages


def edit_whole(trial, change):
    require_file(trial.run / "last.pth")
    edit_run(trial.run, change)


def require_file(path):
    """Damaged before, it may be a pipe by now, which nobody writes to."""
    if not path.is_file():
        raise FileNotFoundError(path)


def fuzz_file(trial, path):
    require_file(path)
    path.write_bytes(mutate(path.read_bytes(), trial.rng))


# ---------------------------------------------------------------- a trial

@dataclass
class Trial:
    """One combination; `words` tells it."""
    root: Path
    rng: np.random.Generator
    command: list = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    event: str = ""
    words: list = field(default_factory=list)

    @property
    def data(self):
        return self.root / "set"

    @property
    def run(self):
        return self.root / "run"

    @property
    def out(self):
        """The folder that the command's own --out says; None where a hostile flag says another."""
        places = [self.command[i + 1] for i, word in enumerate(self.command) if word == "--out"]
        return Path(places[-1]) if places else None


def pick(rng, choices):
    choices = list(choices)
    return choices[int(rng.integers(len(choices)))]


def apply_some(trial, damages, most):
    for _ in range(int(trial.rng.integers(most + 1))):
        name = pick(trial.rng, damages)
        trial.words.append(name)
        try:
            damages[name](trial)
        except Exception as error:                     # what it should damage is damaged already
            trial.words[-1] += f" (not done: {type(error).__name__})"


def prepare(trial, original):
    """Copy the original, draw the command, and damage what it meets."""
    copy_run(original, trial.root)
    (trial.root / "outside").mkdir()
    (trial.root / "outside" / "kept.txt").write_text("mine")
    (trial.root / "file").write_text("a file")
    (trial.root / "dir").mkdir()
    os.mkfifo(trial.root / "fifo")
    shutil.copy(original.parent / "nan.pth", trial.root / "nan.pth")
    teacher = trial.root / "b1.pth"
    (trial.root / "damaged.pth").write_bytes(mutate(teacher.read_bytes(), trial.rng))

    resumes = trial.rng.random() < 0.5
    if resumes:
        trial.command = ["--resume", "--iters", "4", "--out", str(trial.run)]
        apply_some(trial, run_damages(), most=2)
    else:
        trial.command = ["--data", f"folder:{trial.data}", *SMALL, "--out", str(trial.root / "new")]
    if trial.rng.random() < 0.4:
        apply_some(trial, data_damages(), most=2)
    for _ in range(int(trial.rng.integers(3))):
        flags = pick(trial.rng, FLAGS.strip().replace("\n", "|").split("|"))
        trial.words.append(flags)
        trial.command += [fill_in(word, trial.root) for word in flags.split()]
    if trial.rng.random() < 0.3:
        trial.environment = pick(trial.rng, ENVIRONMENTS)
        trial.words.append(str(trial.environment))
    if trial.rng.random() < 0.3:
        trial.event = pick(trial.rng, EVENTS)
        trial.words.append(trial.event)
    trial.words.insert(0, "resume" if resumes else "new")


def fill_in(word, root):
    places = {
        "set": root / "set", "dir": root / "dir", "file": root / "file", "none": root / "none",
        "fifo": root / "fifo", "nan": root / "nan.pth", "teacher": root / "b1.pth",
        "damaged": root / "damaged.pth", "best": root / "run" / "best.pth",
        "odd": f"{root}/\udcff\u00fc\x1b[2J",
    }
    return word.format(**places)


def run_trial(trial):
    """-> (exit code, what it printed, on both streams); the code is None where it hangs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **trial.environment}
    if not trial.environment and not trial.event:
        script = str(ROOT / "train.py")
        code, output = run_in_nursery(script, trial.command, trial.root, environment)
        return (None if code == -signal.SIGKILL else code), output
    return run_fresh(trial, environment)


def run_fresh(trial, environment):
    """In an interpreter of its own, with signals or a broken output."""
    redirections = {"2>&1 head": "2>&1", "full output": ">/dev/full", "closed output": ">&-",
                    "full errors": "2>/dev/full"}
    line = f'exec "$0" "$@" {redirections.get(trial.event, "")}'
    words = [os.fsencode(word) for word in (str(ROOT / "train.py"), *trial.command)]
    process = subprocess.Popen(
        [BASH, "-c", line, sys.executable, *words], cwd=trial.root, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    output = b""
    if "head" in trial.event:
        output = process.stdout.readline()
        process.stdout.close()
        process.stdout = None
    if trial.event.startswith("SIG"):
        name, *twice = trial.event.split()
        time.sleep(trial.rng.uniform(0.5, 12))
        for _ in range(1 + len(twice)):
            if process.poll() is None:
                os.killpg(process.pid, getattr(signal, name))
            time.sleep(0.05)
    try:
        said, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, errors = process.communicate()
        return None, (output + (said or b"") + errors).decode(errors="replace")
    return process.returncode, (output + (said or b"") + errors).decode(errors="replace")


# ---------------------------------------------------------------- is that an allowed end?

def complaint_about(trial, before, code, output):
    """What is wrong with how a trial ended, in words; "" where nothing is."""
    if code is None:
        return "it hangs"
    if "Traceback" in output or "Exception ignored" in output or "core dumped" in output:
        return "a traceback"
    is_own = any("\x1b" in word for word in trial.command)         # a path of the user's
    if "\x1b" in output and not is_own:
        return "an escape sequence is printed"
    allowed = {0, 1, 2}
    if trial.event.startswith("SIGINT"):
        allowed |= {130, -signal.SIGINT}
    elif trial.event.startswith("SIG"):
        allowed.add(-getattr(signal, trial.event))
    if code not in allowed:
        return f"exit code {code}"
    unread = trial.event in ("2>&1 head", "full errors")
    sentences = re.findall(r"^error: ", output, re.MULTILINE)
    if code in (1, 2) and len(sentences) != 1 and not unread:
        return f"{len(sentences)} sentences with exit code {code}"
    reason = re.search("not finite|is (nan|inf|-inf)|ended by itself|NaN", output)
    if code == 1 and not reason and not unread:
        return "exit code 1 for something else than a loss"
    changed = changed_files(trial, before)
    if changed:
        return f"changed files outside: {changed}"
    return complaint_about_run(trial) if code == 0 else ""


def complaint_about_run(trial):
    """The log and the checkpoint of a run that went well, or was stopped."""
    if trial.out is None or "--help" in trial.command or not (trial.out / "last.pth").exists():
        return ""
    step = read_run(trial.out / "last.pth")["training"]["step"]
    steps = [int(row[0]) for row in rows_until(trial.out / "log.csv", step, ["step"])]
    begun_before = any(word.startswith("log.csv") for word in trial.words)
    if steps != list(range(1, step + 1)) and not begun_before:
        return f"its log has the steps {steps}, its checkpoint is of step {step}"
    return ""


def outside_files(trial):
    """{path: content} of what no command is told to write."""
    files = [trial.root / "file", trial.root / "b1.pth", trial.root / "nan.pth"]
    files += [path for path in (trial.root / "outside").iterdir() if path.is_file()]
    files += [path for path in trial.data.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files}


def changed_files(trial, before):
    changed = []
    for path, content in before.items():
        if not path.is_file() or path.read_bytes() != content:
            changed.append(path.name)
    return changed


# ---------------------------------------------------------------- the command

def write_original(folder):
    """-> the folder of a run of two steps, with its data and its teacher beside it."""
    run = write_run(folder)
    network = segformer("b0", 3)
    with torch.no_grad():
        network.decoder.classifier.bias[0] = float("nan")
    save_checkpoint(network, folder / "nan.pth")
    return run


def attack(number, seed, original, folder):
    """Trial `number` of `seed` -> (the trial, its exit code, its output, what is wrong with it)."""
    trial = Trial(Path(folder), np.random.default_rng((seed, number)))
    prepare(trial, original)
    before = outside_files(trial)
    code, output = run_trial(trial)
    return trial, code, output, complaint_about(trial, before, code, output)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="trials (default 300)")
    parser.add_argument("--first", type=int, default=0, help="the first one's number (default 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this trial alone, and print what it says")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after that")
    args = parser.parse_args()
    numbers = range(args.first, args.first + args.count) if args.only is None else [args.only]
    ends = collections.Counter()
    failures = 0
    began = time.time()
    with tempfile.TemporaryDirectory() as root:
        original = write_original(Path(root))
        for number in numbers:
            if time.time() - began > args.seconds:
                break
            with tempfile.TemporaryDirectory() as folder:
                trial, code, output, complaint = attack(number, args.seed, original, folder)
            ends[code] += 1
            if complaint or args.only is not None:
                failures += bool(complaint)
                print(f"trial {number}: {complaint or code}\n  {'; '.join(trial.words)}\n"
                      f"  {' '.join(trial.command)!a}\n{output[-1500:]}", flush=True)
    counts = ", ".join(f"{number} with exit code {code}" for code, number in ends.most_common())
    print(f"{ends.total()} trials of seed {args.seed}: {counts}; {failures} with something wrong")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
