"""The rows of reproduce.sh as commands, and what the registered study takes from its own runs."""

import json
import os
import re
import subprocess
import sys

import pytest

import train
from conftest import ROOT
from extras import registered
from extras.cli import UsageError

# `python` as reproduce.sh finds it: notes what it would train, and leaves the files of a run.
# Seconds are steps times what a row's name says, so that times can be matched.
NOTING_PYTHON = """#!{python} -S
import json
import os
import sys

args = sys.argv[1:]


def value(flag):
    return args[args.index(flag) + 1] if flag in args else None


if args[0] == "-m":
    os.execv({quick!r}, [{quick!r}, *args])
if args[0] == "eval.py":
    if value("--json"):
        with open(value("--json"), "w") as file:
            file.write("{{}}")
    sys.exit()
out = value("--out")
with open("commands.jsonl", "a") as file:
    file.write(json.dumps(args) + "\\n")
if "--resume" in args:
    sys.exit()
os.makedirs(out)
steps = int(value("--iters"))
cost = 4 if value("--student") == "b2" else 2 if value("--teacher") else 1
miou = {{"6e-4": 0.3, "1.2e-3": 0.5, "2.4e-3": 0.4}}.get(value("--lr"), 0.1)
files = {{
    "last.pth": "",
    "log.csv": f"step,loss\\n{{steps}},1\\n",
    "scores.csv": f"step,miou\\n1,0.9\\n{{steps}},{{miou}}\\n",
    "fit.csv": f"step,seconds\\n{{steps}},{{steps * cost}}\\n",
    "recipe.json": json.dumps({{"iters": steps, "command": " ".join(args)}}),
}}
for name, text in files.items():
    with open(os.path.join(out, name), "w") as file:
        file.write(text)
"""


@pytest.fixture
def dry(tmp_path, quick_python):
    """-> reproduce(schedule, *rows, **environment): the commands of train.py that it would run."""
    for name in ("reproduce.sh", "extras", "data.py", "model.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    quick = str(quick_python / "python")
    python.write_text(NOTING_PYTHON.format(python=sys.executable, quick=quick))
    python.chmod(0o755)
    ours = {"DATA": "camvid:set", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def reproduce(*args, code=0, **variables):
        noted = tmp_path / "commands.jsonl"
        noted.unlink(missing_ok=True)
        ended = subprocess.run(["bash", "reproduce.sh", *args], cwd=tmp_path, text=True,
                               env=os.environ | ours | variables, capture_output=True, timeout=120)
        assert ended.returncode == code, ended.stderr
        lines = noted.read_text().splitlines() if noted.exists() else []
        return [json.loads(line) for line in lines]

    return reproduce


def out_of(command):
    """runs/camvid-short/b0-0 -> "b0-0" """
    return os.path.basename(command[command.index("--out") + 1])


def test_every_line_of_reproduce_is_a_command_of_train(dry):
    three = {"RATES": "6e-4 1.2e-3 2.4e-3"}
    commands = dry("short") + dry("levers") + dry("weights") + dry("record")
    commands += dry("rates", "b2", "b2-dyt", **three)
    commands += dry("registered", "teacher", "second-teacher")
    commands += dry("rates", **three) + dry("registered")
    for command in commands:
        assert command[0] == "train.py"
        args, _ = train.FLAGS.parse(command[1:])
        assert args.resume or args.data == "camvid:" + os.path.abspath("set")
    assert len(commands) > 100


def test_the_registered_rows_have_the_rates_that_are_best_on_val(dry):
    dry("rates", "b2", "b2-dyt")
    assert [out_of(c) for c in dry("registered", "teacher")] == ["teacher-0"]
    dry("rates", "b0", "b0-dyt", "b0-dyt-fd", LONG="100")

    # seed 0 was trained to find the rate, and is not trained again
    commands = dry("registered", "b0-dyt", LONG="100")
    assert [out_of(c) for c in commands] == ["b0-dyt-0", "b0-dyt-1", "b0-dyt-2"]
    assert "--resume" in commands[0]
    for command in commands[1:]:
        assert command[command.index("--lr") + 1] == "1.2e-3"
        assert command[command.index("--iters") + 1] == "100"
        assert command[command.index("--amp") + 1] == "bf16"


def test_the_baseline_is_trained_for_as_long_as_the_distilled_run(dry):
    dry("rates", "b2", "b2-dyt", LONG="100")
    dry("registered", "teacher", LONG="100")
    dry("rates", "b0-dyt", "b0-dyt-fd", LONG="100")
    for row, steps in (("b0-dyt-as-long", "200"), ("b0-dyt-as-long-as-both", "600")):
        commands = dry("rates", row, LONG="100")
        assert len(commands) == 4
        assert {c[c.index("--iters") + 1] for c in commands} == {steps}


def test_the_small_study_is_in_fp32_with_kept_answers_and_in_folders_of_its_own(dry, tmp_path):
    small = {"STUDY": "small"}
    assert [out_of(c) for c in dry("registered", "teacher", **small)] == ["teacher-0"]
    rates = dry("rates", "b0-dyt-fd", "b0-dyt-as-long", **small)
    rows = dry("registered", "b0-dyt-fd", "b0-dyt-as-long", **small)
    assert len(rates) == 8 and len(rows) == 6
    for command in rates + [command for command in rows if "--resume" not in command]:
        args, _ = train.FLAGS.parse(command[1:])
        assert args.amp == "off" and args.crop == [192, 256] and args.augment == "plain"
        assert "runs/camvid-small-" in args.out
        assert args.iters == (1325 if "as-long" in args.out else 1000)
        assert bool(args.teacher_cache) == bool(args.teacher) == ("dyt-fd" in args.out)
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "camvid-small-rates", "camvid-small-registered"]
    assert dry("rates", "b2", "b2-dyt", **small) == []      # its teacher's rate is not searched
    both = dry("rates", "b0-dyt-as-long-as-both", **small)
    assert {command[command.index("--iters") + 1] for command in both} == {"5918"}
    dry("levers", code=2, **small)
    dry("rates", code=2, STUDY="large")


def test_the_small_study_in_bf16_has_a_longer_teacher_and_folders_of_its_own(dry, tmp_path):
    small = {"STUDY": "small-bf16"}
    teacher, _ = train.FLAGS.parse(dry("registered", "teacher", **small)[0][1:])
    assert teacher.iters == 3000 and teacher.amp == "bf16" and teacher.crop == [192, 256]
    rates = dry("rates", "b0-dyt-fd", **small)
    rows = dry("registered", "b0-dyt-fd", **small)
    assert len(rates) == 4 and len(rows) == 3
    for command in rates + [command for command in rows if "--resume" not in command]:
        args, _ = train.FLAGS.parse(command[1:])
        assert args.amp == "bf16" and args.iters == 1000
        assert args.teacher.endswith("runs/camvid-small-bf16-registered/teacher-0/last.pth")
        assert args.teacher_cache.endswith("runs/camvid-small-bf16-answers")
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "camvid-small-bf16-rates", "camvid-small-bf16-registered"]


def test_losses_in_cskds_place_have_its_time_and_a_teacher_of_their_own(dry):
    losses = {"STUDY": "small-losses", "RATES": "6e-4 1.2e-3 2.4e-3"}
    rates = dry("rates", **losses)
    assert len(rates) == 3 * 10
    rows = dry("registered", **losses)
    assert [out_of(command) for command in rows] == [
        "teacher-0", "teacher-1",
        "b0-dyt-as-long-0", "b0-dyt-as-long-1", "b0-dyt-fd-0", "b0-dyt-fd-1",
        "b0-dyt-kd-0", "b0-dyt-kd-1", "b0-dyt-cosine-0", "b0-dyt-cosine-1",
        "b0-dyt-gcos-0", "b0-dyt-gcos-1", "b0-dyt-cwd-0", "b0-dyt-cwd-1",
        "b0-dyt-dist-0", "b0-dyt-dist-1", "b0-dyt-kl-0", "b0-dyt-kl-1",
        "b0-dyt-zkl-0", "b0-dyt-zkl-1", "b0-dyt-kl-two-0", "b0-dyt-kl-two-1",
        "features-only-0", "b0-dyt-features-first-0",
        "features-only-1", "b0-dyt-features-first-1"]

    # {row: (steps, the losses of a teacher that it has)}
    found = {}
    for command in rates + rows[2:]:
        if "--resume" in command:
            continue
        args, _ = train.FLAGS.parse(command[1:])
        assert (args.amp, args.crop, args.norm) == ("bf16", [192, 256], "dyt")
        row = re.sub(r"(-lr.*)?-[01]$", "", out_of(command))      # without its rate and seed
        taught_by = set()
        if args.teacher:
            assert args.teacher.endswith("camvid-small-losses-registered/teacher-0/last.pth")
            taught_by = set(train.loss_weights(args)) & {term.name for term in train.DISTILLATION}
            asks_two = row == "b0-dyt-kl-two"
            assert bool(args.second_teacher) == bool(args.flip_teacher) == asks_two
        found[row] = (args.iters, taught_by)
    assert found == {
        "b0-dyt-as-long": (1403, set()),
        "b0-dyt-fd": (1000, {"fd"}),
        "b0-dyt-kd": (912, {"fd", "pe"}),
        "b0-dyt-cosine": (1088, {"cosine"}),
        "b0-dyt-gcos": (1056, {"gcos"}),
        "b0-dyt-cwd": (1169, {"cwd"}),
        "b0-dyt-dist": (1165, {"dist"}),
        "b0-dyt-kl": (1018, {"kl"}),
        "b0-dyt-zkl": (997, {"zkl"}),
        "b0-dyt-kl-two": (1018, {"kl"}),
        "features-only": (500, {"fd"}),
        "b0-dyt-features-first": (597, set()),
    }


def test_the_weights_are_of_one_run_on_whole_frames(dry):
    (command,) = dry("weights")
    args, _ = train.FLAGS.parse(command[1:])
    assert (args.iters, args.amp, args.crop, args.norm) == (6000, "bf16", [360, 480], "dyt")
    assert args.teacher is None and not args.with_val


def test_the_record_is_of_a_teacher_and_of_two_students_that_it_teaches(dry):
    commands = dry("record")
    assert [out_of(command) for command in commands] == [
        "teacher-0", "b0-dyt-fd-0", "b0-dyt-fd-with-val-0"]
    teacher, student, with_val = (train.FLAGS.parse(command[1:])[0] for command in commands)
    for args in (teacher, student, with_val):
        assert (args.amp, args.crop, args.norm) == ("bf16", [360, 480], "dyt")
        assert args.class_weights == "sqrt"
    assert (teacher.student, teacher.iters, teacher.teacher) == ("b2", 3000, None)
    for args in (student, with_val):
        assert (args.student, args.iters) == ("b0", 6000)
        assert args.teacher.endswith("runs/camvid-record/teacher-0/last.pth")
        assert (args.lambda_fd, args.lambda_pe) == (1, 0)
    assert with_val.with_val and not student.with_val


def test_a_row_of_the_record_brings_its_teacher(dry):
    assert [out_of(command) for command in dry("record", "b0-dyt-fd")] == [
        "teacher-0", "b0-dyt-fd-0"]


def test_with_few_labels_the_student_alone_has_the_time_of_the_one_that_is_taught(dry):
    small = {"STUDY": "small-bf16"}
    dry("rates", "b0-dyt", "b0-dyt-fd", **small)
    commands = dry("registered", "few-0.25", SEEDS="0 1", **small)
    assert [out_of(command) for command in commands] == [
        "few-0.25-teacher-0", "few-0.25-alone-0", "few-0.25-alone-1",
        "few-0.25-taught-0", "few-0.25-taught-1"]
    parsed = [train.FLAGS.parse(command[1:])[0] for command in commands]
    assert {args.labelled for args in parsed} == {0.25}
    assert [args.iters for args in parsed] == [2000, 1576, 1576, 1000, 1000]
    for args in parsed[3:]:
        assert args.teacher.endswith("registered/few-0.25-teacher-0/last.pth")
        assert (args.lambda_kl, args.temperature, args.lambda_fd) == (1, 1, 1)


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("changed", [{"STEPS": "3"}, {"AMP": "off"}])
def test_a_run_of_other_flags_is_neither_skipped_nor_gone_on_with(dry, tmp_path, done, changed):
    first = {"STEPS": "2", "AMP": "bf16"}
    assert len(dry("short", "b0", **first)) == 1
    if not done:
        (tmp_path / "results/camvid-short/b0/0/scores.csv").unlink()
    assert dry("short", "b0", code=3, **(first | changed)) == []
    again = dry("short", "b0", **first, FLAGS="--workers 0")
    assert len(again) == (0 if done else 1)                       # skipped, or resumed


def test_a_row_whose_best_rate_has_changed_is_not_mixed(dry):
    """The grid went on after seed 0 was trained: another rate is the best now."""
    dry("rates", "b0", RATES="6e-4 2.4e-3", LONG="100")
    dry("registered", "b0", SEEDS="0", LONG="100")
    dry("rates", "b0", RATES="1.2e-3", LONG="100")
    assert dry("registered", "b0", SEEDS="0 1", LONG="100", code=3) == []


def test_a_row_without_its_rates_is_not_trained(dry):
    assert dry("registered", "b0", code=1) == []       # of the tests' python, which knows 0 and 1


# ---------------------------------------------------------------- python -m extras.registered

def leave(folder, row, rate, miou, seconds=10.0, iters=100):
    run = folder / f"{row}-lr{rate}" / "0"
    run.mkdir(parents=True)
    (run / "scores.csv").write_text(f"step,miou\n50,0.99\n{iters},{miou}\n")
    (run / "fit.csv").write_text(f"step,seconds\n{iters},{seconds}\n")
    (run / "recipe.json").write_text(json.dumps({"iters": iters}))
    return run


def test_the_best_rate_is_that_of_the_last_checkpoint_on_val(tmp_path, capsys):
    for rate, miou in (("6e-4", 0.4), ("1.2e-3", 0.6), ("2.4e-3", 0.5)):
        leave(tmp_path, "b0", rate, miou)
    leave(tmp_path, "b0-dyt", "1.2e-3", 0.7)
    assert registered.best_rate(tmp_path, ["b0"]).name == "b0-lr1.2e-3"
    assert capsys.readouterr().err == ""
    assert registered.best_rate(tmp_path, ["b0", "b0-dyt"]).name == "b0-dyt-lr1.2e-3"
    assert "b0-dyt-lr1.2e-3 is at the edge of the rates" in capsys.readouterr().err
    second = tmp_path / "b0-lr2.4e-3/1"                           # more seeds of one rate
    second.mkdir()
    (second / "scores.csv").write_text("step,miou\n100,0.9\n")
    assert registered.best_rate(tmp_path, ["b0"]).name == "b0-lr1.2e-3"
    with pytest.raises(UsageError, match="no rate of b2 yet: ./reproduce.sh rates b2"):
        registered.best_rate(tmp_path, ["b2"])


def test_steps_are_matched_by_seconds(tmp_path):
    leave(tmp_path, "b0-dyt", "1.2e-3", 0.5, seconds=50.0)
    leave(tmp_path, "b0-dyt-fd", "2.4e-3", 0.6, seconds=80.0)
    teacher = leave(tmp_path, "b2", "6e-4", 0.6, seconds=400.0)
    assert registered.matched_steps(tmp_path, "b0-dyt", "b0-dyt-fd") == 160
    assert registered.matched_steps(tmp_path, "b0-dyt", "b0-dyt-fd", [teacher]) == 960
    (teacher / "fit.csv").unlink()
    with pytest.raises(UsageError, match="cannot read .*fit.csv"):
        registered.matched_steps(tmp_path, "b0-dyt", "b0-dyt-fd", [teacher])
