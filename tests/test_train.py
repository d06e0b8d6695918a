"""The loop by training: it learns, distils, resumes exactly, splits over processes, and fails with
a sentence.
"""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from conftest import CAMVID, ROOT, command, wait_for_step, write_folder
from extras import machine, run_folder, run_report, stopping
from extras.cli import UsageError
from losses import IGNORE, Projections, weighted_cross_entropy
from model import NORMS, SIZES, load_checkpoint, save_checkpoint, segformer
from nvlabs import Flat

SMALL = ("--crop", 32, 32, "--batch-size", 2, "--workers", 0, "--amp", "off", "--device", "cpu")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def log(folder, name="log.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def column(folder, name):
    """One column of the log, as numbers."""
    return [float(row[name]) for row in log(folder)]


def steps_of(rows):
    return [row["step"] for row in rows]


def training_state(folder):
    """What the newest checkpoint holds besides the network."""
    return torch.load(folder / "last.pth", weights_only=True)["training"]


def same_tensors(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def same_weights(a, b):
    first = torch.load(a / "last.pth", weights_only=True)
    second = torch.load(b / "last.pth", weights_only=True)
    return same_tensors(first["model"], second["model"])


def same_runs(a, b):
    """Weights, log, scores and best checkpoint of two run folders, to the bit."""
    first = torch.load(a / "best.pth", weights_only=True)
    second = torch.load(b / "best.pth", weights_only=True)
    same_best = first["step"] == second["step"] and same_tensors(first["model"], second["model"])

    files = ("log.csv", "scores.csv")
    same_files = all((a / name).read_text() == (b / name).read_text() for name in files)
    return same_weights(a, b) and same_best and same_files


def partial_files(folder):
    return [path for path in folder.iterdir() if "partial" in path.name]


@pytest.fixture
def teacher(tmp_path):
    """A random B1 for the three classes of the test folder: a teacher with other widths than B0."""
    torch.manual_seed(1)
    network = segformer("b1", 3)
    save_checkpoint(network, tmp_path / "b1.pth")
    return tmp_path / "b1.pth"


def test_size_is_what_frames_are_worked_at(folder, tmp_path):
    """The crop is cut from the frame at --size; the checkpoint tells the evaluation to resize to it
    too.
    """
    out = tmp_path / "run"
    flags = ("--data", folder, *SMALL, "--size", 64, 80, "--iters", 1)
    output = command("train.py", *flags, "--out", out)
    assert "mIoU" in output
    assert load_checkpoint(out / "best.pth").input_size == (64, 80)


def test_a_checkpoint_tells_its_data_as_the_command_saw_it(tmp_path, monkeypatch):
    """It is given away; what stands above the folder of the command is nobody's business."""
    write_folder(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    train_with("--data", f"folder:{tmp_path}/set", *SMALL, "--iters", 1, "--out", "run")
    assert load_checkpoint("run/best.pth").trained_on["data"] == "folder:set"
    last = torch.load("run/last.pth", weights_only=True)
    assert last["training"]["args"]["data"] == f"folder:{tmp_path}/set"   # --resume works elsewhere


def test_val_can_be_trained_on_for_a_last_run(tmp_path, folder, capsys):
    out = tmp_path / "run"
    flags = ("--data", folder, *SMALL, "--iters", 2, "--eval-every", 1)
    train_with(*flags, "--with-val", "--out", out)
    said = capsys.readouterr().out
    assert "6 train, 1 val frames" in said             # 5 and 1 without it
    assert "note: val is trained on (--with-val)" in said
    train_with("--resume", "--out", out, "--iters", 3)
    assert load_checkpoint(out / "last.pth").trained_on["with_val"] is True
    assert "warning" in command("eval.py", out / "last.pth", "--data", folder)

    with pytest.raises(UsageError, match="--with-val is for the data's own splits"):
        train_with(*flags, "--with-val", "--fold", 0, "--out", tmp_path / "folds")


# ---------------------------------------------------------------- parts

def test_learning_rate_at_its_corners():
    rates = [train.learning_rate(step, 1000, 6e-4, 0.05) for step in range(1000)]
    assert rates[0] < 2e-5
    assert rates[50] == pytest.approx(6e-4)
    assert max(rates) == rates[50]
    assert rates[525] == pytest.approx(3e-4)
    assert 0 < rates[-1] < 1e-6

    assert train.learning_rate(0, 10, 1.0, 0.0) == 1.0
    assert train.learning_rate(0, 1, 1.0, 1.0) > 0


def arguments(*flags):
    args, given = train.FLAGS.parse([str(flag) for flag in flags])
    train.FLAGS.note_unused(args, given)
    return args


def train_with(*flags):
    """As the command does, in this process."""
    args, given = train.FLAGS.parse([str(flag) for flag in flags])
    return train.run_training(args, given)


def make_run(args, objective, teacher=None):
    """A run of one step: without data, folder and logs."""
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    device = torch.device("cpu")
    return train.Run(
        args, device, objective, teacher, optimizer, scaler, objective, train.SEGMENTATION)


def test_defaults_are_the_papers_and_suit_the_data():
    paper = arguments("--data", "cityscapes:x", "--teacher", "t.pth")
    assert paper.lr == 6e-4
    assert paper.epochs == 200
    assert paper.batch_size == 2
    assert paper.crop == [512, 1024]
    assert paper.warmup == 0.05
    assert paper.augment == "plain"
    assert paper.lambda_fd == 1
    assert paper.lambda_pe == 1
    assert paper.lambda_kl == 0
    assert paper.lambda_m == 1
    assert paper.lambda_s == 0.5
    assert paper.iters is None

    camvid = arguments("--data", "camvid:x")
    assert camvid.iters == 40_000
    assert camvid.batch_size == 4
    assert camvid.crop == [288, 288]
    assert camvid.lambda_fd == 0

    assert arguments("--data", "camvid:x", "--epochs", 3).iters is None
    assert arguments("--iters", 7).iters == 7

    mixed = arguments("--loss", "dice-focal", "--lambda-dice", 0.3)
    assert train.loss_weights(mixed) == {"dice": 0.3, "focal": 0.7}
    assert train.loss_weights(paper) == {"wce": 1, "fd": 1, "pe": 1}


@pytest.mark.parametrize("name", ["data.py", "train.py", "eval.py", "bench.py"])
def test_help_names_every_flag(name):
    text = command(name, "--help")
    assert "usage" in text

    source = (ROOT / name).read_text()
    for flag in re.findall(r'(?:add|add_argument)\("--([a-z-]+)"', source):
        assert f"--{flag}" in text


def test_a_batch_cut_in_parts_has_the_loss_and_gradient_of_the_whole():
    """Half of one part is void: the mean of the parts' means would be another loss."""
    torch.manual_seed(0)
    args = arguments("--loss", "wce", "--grad-clip", 0)
    student = segformer("b0", 4).eval()  # eval: no dropout, and BatchNorm does not see the parts
    weight = torch.tensor([0.5, 1, 2, 4])
    objective = train.Objective(student, None, args, weight)
    images = torch.rand(4, 3, 32, 32)
    labels = torch.randint(0, 4, (4, 32, 32))
    labels[0] = IGNORE

    loss = weighted_cross_entropy(student(images), labels, weight)
    gradient = torch.autograd.grad(loss, student.parameters())
    norms = torch.stack([g.norm() for g in gradient])
    expected = [loss.item(), norms.norm().item()]

    for parts in (1, 2, 4):
        args.accum = parts
        run = make_run(args, objective)
        run.optimizer.zero_grad()
        values = train.train_step(run, images, labels)
        assert values.tolist() == pytest.approx(expected, rel=1e-4)
        for parameter, g in zip(student.parameters(), gradient, strict=True):
            assert torch.allclose(parameter.grad, g, rtol=1e-3, atol=1e-6)


def test_the_optimizer_must_own_the_projections():
    args = arguments("--teacher", "x", "--weight-decay", 0.1)
    student = segformer("b0", 2)
    projections = Projections(SIZES["b0"]["dims"], SIZES["b1"]["dims"])
    objective = train.Objective(student, projections, args, torch.ones(2))

    optimizer = train.make_optimizer(objective, args, torch.device("cpu"))
    train.check_owned(objective, optimizer)
    for group in optimizer.param_groups:
        decays = group["weight_decay"] == 0.1
        assert all((p.ndim > 1) == decays for p in group["params"])

    sentence = "does not own 16 trainable parameters, first projections.stages.0.weight"
    with pytest.raises(RuntimeError, match=sentence):
        train.check_owned(objective, torch.optim.AdamW(objective.student.parameters()))
    with pytest.raises(RuntimeError, match="get no gradient"):
        train.check_gradients(objective)


# ---------------------------------------------------------------- whole runs

def test_a_run_learns_and_writes_what_it_promises(tmp_path, folder):
    out = tmp_path / "run"
    flags = ("--data", folder, "--iters", 60, "--eval-every", 30, "--out", out, *SMALL)
    output = command("train.py", *flags, "--scale-range", 0.8, 1.2)
    assert {path.name for path in out.iterdir()} == {
        "best.pth",
        "last.pth",
        "previous.pth",
        "log.csv",
        "scores.csv",
        "recipe.json",
        "run.lock",
        "pictures.png",
    }

    rows = log(out)
    assert len(rows) == 60
    assert list(rows[0]) == ["step", "lr", "loss", "wce", "grad_norm"]
    losses = column(out, "loss")
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])

    scored = log(out, "scores.csv")
    assert steps_of(scored) == ["30", "60"]
    assert float(scored[-1]["miou"]) > 0.6

    best = load_checkpoint(out / "best.pth")
    assert best.classes == ["class 0", "class 1", "class 2"]

    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["iters"] == 60
    assert recipe["total_batch"] == 2
    assert recipe["torch"] == torch.__version__

    assert "60 steps of 2 images" in output
    assert "mIoU" in output
    assert "images/s" in output
    assert Image.open(out / "pictures.png").width > 900

    best_miou = float(max(row["miou"] for row in scored))
    assert f"{100 * best_miou:.2f}" in output.split("IoU, %")[-1]


def test_the_share_of_waiting_for_data_is_said(tmp_path, folder, monkeypatch, capsys):
    def share():
        out = tmp_path / str(time.time())
        train_with("--data", folder, *SMALL, "--iters", 2, "--out", out)
        said = capsys.readouterr().out
        return int(re.search(r"images/s \((\d+) % waiting for data\)", said)[1])

    fast = share()
    assert fast < 50

    read = data.Stream.__getitem__

    def read_slowly(self, n):
        time.sleep(1)
        return read(self, n)

    monkeypatch.setattr(data.Stream, "__getitem__", read_slowly)
    assert 50 < share() <= 100


def test_distillation_logs_every_term_and_shows_teacher_and_student(tmp_path, folder, teacher):
    out = tmp_path / "kd"
    networks = ("--student", "b0", "--teacher", teacher)
    weights = ("--lambda-fd", 1, "--lambda-pe", 1, "--lambda-kl", 0.5, "--temperature", 4)
    flags = ("--data", folder, "--iters", 25, "--out", out, *SMALL)
    output = command("train.py", *networks, *weights, *flags)
    assert f"teacher {teacher}: mIoU" in output
    assert "teacher b1" in output
    assert "student b0" in output
    assert "diff" in output

    rows = log(out)
    assert list(rows[0]) == ["step", "lr", "loss", "wce", "kl", "fd", "pe", "grad_norm"]
    for row in rows:
        wce = float(row["wce"])
        kl = float(row["kl"])
        fd = float(row["fd"])
        pe = float(row["pe"])
        assert float(row["loss"]) == pytest.approx(wce + 0.5 * kl + fd + pe, rel=1e-5)

    first = rows[0]
    last = rows[-1]
    for term in ("fd", "pe"):
        assert float(last[term]) < float(first[term])

    # the projections are trained, all of them
    state = training_state(out)
    student = sum(1 for _ in segformer("b0", 3).parameters())
    assert len(state["projections"]) == 16
    assert len(state["optimizer"]["state"]) == student + 16


def test_tensorboard_gets_every_step_and_a_picture(tmp_path, folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    flags = ("--data", folder, "--iters", 3, "--eval-every", 2, "--tensorboard", *SMALL)
    command("train.py", *flags, "--out", out)

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/wce")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("val/miou")] == [2, 3]
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx(column(out, "loss"), rel=1e-6)
    assert [event.step for event in events.Images("val")] == [2, 3]

    # without the package
    absent = "raise ModuleNotFoundError(name='tensorboard')"
    (tmp_path / "tensorboard.py").write_text(absent)
    flags = ("--data", folder, "--tensorboard", "--out", tmp_path / "no", *SMALL)
    output = command("train.py", *flags, code=2, env={"PYTHONPATH": str(tmp_path)})
    assert "pip install tensorboard" in output
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("what", ["encoder", "segmenter", "other names", "resumed"])
def test_init_starts_from_the_files_weights(what, tmp_path, folder):
    torch.manual_seed(3)
    flat = Flat("b0", None if what == "encoder" else 3)
    path = tmp_path / "start.pth"
    out = tmp_path / "run"
    torch.save(flat.state_dict(), path)
    if what == "other names":
        network = load_checkpoint(path)
        network.classes = ["x", "y", "z"]
        save_checkpoint(network, path)

    still = ("--lr", 1e-12)  # nothing moves but rounding
    flags = ("--init", path, "--data", folder, *still, "--eval-every", 1, "--out", out, *SMALL)
    output = command("train.py", *flags, "--iters", 1)
    assert f"student SegFormer-B0 from {path}" in output

    if what == "resumed":
        path.unlink()  # its work was done at the start
        command("train.py", "--resume", "--out", out, "--iters", 2)

    given = flat.state_dict()
    trained = torch.load(out / "last.pth", weights_only=True)["model"]
    inner = trained["stages.2.blocks.1.mlp.fc1.weight"]
    assert torch.allclose(inner, given["block3.1.mlp.fc1.weight"], atol=1e-8)

    notes = {"encoder": "new decoder", "other names": "so the head is new"}
    if what in notes:
        assert notes[what] in output

    if what != "encoder":
        head = trained["decoder.classifier.weight"]
        same = torch.allclose(head, given["linear_pred.weight"], atol=1e-8)
        assert same != (what == "other names")
        assert torch.equal(trained["mean"], torch.zeros(1, 3, 1, 1))


def test_any_format_teaches(tmp_path):
    torch.manual_seed(3)
    theirs = tmp_path / "theirs.pth"
    tensors = Flat("b1", 20).state_dict()
    torch.save({f"module.{key}": tensor for key, tensor in tensors.items()}, theirs)

    spec = write_folder(tmp_path / "set", size=(40, 57), classes=19)
    flags = ("--data", spec, "--iters", 1, "--out", tmp_path / "kd", *SMALL)
    output = command("train.py", "--teacher", theirs, *flags)
    kind = "SegFormer-B1, 19 classes, TransKD/EffiSeg without its void output"
    assert f"theirs.pth: {kind}" in output
    assert "no mean/std" in output


@pytest.mark.parametrize("flags, terms", [
    (("--lambda-fd", 0), ["wce", "pe"]),
    (("--lambda-pe", 0, "--loss", "dice-focal"), ["dice", "focal", "fd"]),
    (("--lambda-fd", 0, "--lambda-pe", 0, "--lambda-kl", 1), ["wce", "kl"]),
])
def test_terms_of_weight_zero_are_left_out(flags, terms, tmp_path, folder, teacher):
    out = tmp_path / "kd"
    rest = ("--data", folder, "--iters", 2, "--out", out, *SMALL)
    command("train.py", "--teacher", teacher, *flags, *rest)

    names = list(log(out)[0])
    assert names[3:-1] == terms


def start(*args):
    """Run train.py in the background; its group is its own, so that a Ctrl-C can be sent to all of
    it.
    """
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **ONE_THREAD},
    )


def start_or_resume(out, flags):
    """The run in `out`, in the background: from its checkpoint where it has one."""
    if (out / "last.pth").exists():
        return start("--resume", "--out", out)
    return start(*flags, "--out", out)


def test_a_run_killed_again_and_again_resumes_exactly(tmp_path, folder, teacher):
    """SIGKILL at three moments, SIGTERM and Ctrl-C at others: the run ends as the one that was
    never stopped.
    """
    whole = tmp_path / "whole"
    networks = ("--data", folder, "--teacher", teacher)
    flags = (*networks, "--eval-every", 8, *SMALL, "--accum", 2, "--iters", 40)
    command("train.py", *flags, "--out", whole)

    out = tmp_path / "cut"
    stops = (
        (signal.SIGKILL, 0),
        (signal.SIGTERM, 8),
        (signal.SIGKILL, 16),
        (signal.SIGINT, 24),
    )
    endings = {signal.SIGTERM: ("SIGTERM", 0), signal.SIGINT: ("Ctrl-C", 130)}
    for how, step in stops:
        process = start_or_resume(out, (*flags, "--workers", 1))
        wait_for_step(process, out, step)
        if step == 0:
            while not (out / "last.pth").exists():
                time.sleep(0.01)

        os.killpg(process.pid, how)
        output = process.communicate()[0]
        if how == signal.SIGKILL:
            continue

        name, code = endings[how]
        assert process.returncode == code, output
        assert f"stopped by {name} after step" in output
        assert "to go on: python train.py --resume --out" in output
        assert "Traceback" not in output
        assert output.count("error") == 0

        # every finished step is in the log and in the checkpoint
        assert len(log(out)) == training_state(out)["step"]

    command("train.py", "--resume", "--out", out)
    assert same_runs(whole, out)
    assert not partial_files(out)


def test_a_second_ctrl_c_stops_at_once():
    with stopping.Stop() as stop:
        stop.note(signal.SIGTERM, None)  # any number of these wait
        assert stop.asked("cpu", False) == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            stop.note(signal.SIGINT, None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_damaged_checkpoint_is_known_and_the_one_before_it_offered(tmp_path, folder):
    out = tmp_path / "run"
    last = out / "last.pth"
    flags = ("--data", folder, "--iters", 4, "--eval-every", 2, *SMALL)
    command("train.py", *flags, "--out", out)

    whole = last.read_bytes()
    truncated = whole[:-1000]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # one bit
    empty = b""
    sentence = r"it is damaged.*the checkpoint before it is whole \(step 2\): cp"
    for content in (truncated, flipped, empty):
        last.write_bytes(content)
        with pytest.raises(run_folder.UsageError, match=sentence):
            run_folder.find_run(out, train.SEGMENTATION)

    last.write_bytes((out / "previous.pth").read_bytes())
    command("train.py", "--resume", "--out", out)
    assert steps_of(log(out)) == ["1", "2", "3", "4"]


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path, folder):
    out = tmp_path / "run"
    command("train.py", "--data", folder, "--iters", 2, "--out", out, *SMALL)
    before = (out / "last.pth").read_bytes()

    small_disk = "trap '' XFSZ; ulimit -f 20000"  # in KiB
    resume = f"exec {sys.executable} {ROOT / 'train.py'} --resume --out {out} --iters 4"
    result = subprocess.run(
        ["bash", "-c", f"{small_disk}; {resume}"],
        capture_output=True,
        text=True,
        env={**os.environ, **ONE_THREAD},
    )
    assert result.returncode == 2
    assert "cannot write" in result.stderr
    assert "untouched" in result.stderr
    assert "Traceback" not in result.stderr
    assert (out / "last.pth").read_bytes() == before
    assert not partial_files(out)


def test_a_frame_that_breaks_while_training_saves_first(tmp_path, folder, monkeypatch):
    out = tmp_path / "run"
    reads = []
    read = data.Files.read_image

    def breaks(self, i):
        reads.append(i)
        if len(reads) > 9:
            path = self.paths[i][0]
            raise data.DatasetError(f"{path}: not an image that can be read (the disk went)")
        return read(self, i)

    monkeypatch.setattr(data.Files, "read_image", breaks)
    with pytest.raises(data.DatasetError, match="the disk went"):
        train_with("--data", folder, "--iters", 20, "--eval-every", 10, "--out", out, *SMALL)

    # 4 x 2 frames, the 5th step broke
    assert training_state(out)["step"] == 4
    assert len(log(out)) == 4


@pytest.mark.parametrize("where, sentence", [
    ("loss", "step 3: pe is inf"),
    ("gradient", "step 3: the gradient of pe is not finite"),
    ("draw", "step 3: pe is inf"),
])
def test_a_term_that_breaks_is_named_with_its_step(
    where, sentence, tmp_path, folder, teacher, monkeypatch
):
    calls = []
    draws = []
    pekd = train.pekd

    class Bad(torch.autograd.Function):
        forward = staticmethod(lambda context, x: x.clone())
        backward = staticmethod(lambda context, gradient: gradient * math.inf)

    def broken(student, target):
        calls.append(1)
        value = pekd(student, target)
        draws.append(torch.rand(()).item())
        if len(calls) < 3:
            return value
        if where == "draw" and draws[-1] != draws[2]:             # this step's random numbers only
            return value
        if where in ("loss", "draw"):
            return value * math.inf
        return Bad.apply(value)

    monkeypatch.setattr(train, "pekd", broken)
    out = tmp_path / "run"
    with pytest.raises(train.NotFinite, match=sentence):
        train_with("--data", folder, "--teacher", teacher, "--iters", 9, "--out", out, *SMALL)
    assert len(log(out)) == 2


def test_skipped_fp16_steps_are_counted_and_twenty_in_a_row_stop():
    def row(step, norm):
        return step, 0.1, torch.tensor([1.0, norm])

    skips = {"skipped": 0, "skipped_in_a_row": 0}
    steps = [row(1, math.inf), row(2, 1.0), row(3, math.nan)]
    rows = run_report.read_losses(steps, {"wce": 1.0}, "run", skips)
    assert skips == {"skipped": 2, "skipped_in_a_row": 1}
    norms = [float(r[-1]) for r in rows]
    assert norms[:2] == [math.inf, 1]

    steps = [row(step, math.inf) for step in range(4, 30)]
    sentence = "step 22: the gradient overflowed fp16 in 20 steps in a row"
    with pytest.raises(train.NotFinite, match=sentence):
        run_report.read_losses(steps, {"wce": 1.0}, "run", skips)

    with pytest.raises(train.NotFinite, match="step 5: the gradient is not finite"):
        run_report.read_losses([row(5, math.inf)], {"wce": 1.0}, "run", None)


def test_resume_finds_the_newest_run_refuses_another_experiment_and_may_grow(tmp_path, folder):
    command("train.py", "--data", folder, "--iters", 4, "--out", "runs/one", *SMALL, cwd=tmp_path)

    output = command("train.py", "--resume", "--lr", 0.1, cwd=tmp_path, code=2)
    assert "--lr 0.1 differs from the resumed run's 0.0006" in output

    command("train.py", "--resume", "--iters", 6, cwd=tmp_path)
    assert steps_of(log(tmp_path / "runs" / "one")) == ["1", "2", "3", "4", "5", "6"]

    again = ("--data", folder, "--out", "runs/one", *SMALL)
    output = command("train.py", *again, cwd=tmp_path, code=2)
    assert "already holds a run" in output

    output = command("train.py", "--resume", "--out", "runs/two", cwd=tmp_path, code=2)
    assert "nothing to resume" in output

    deeper = tmp_path / "runs/table/kd-0"                         # as reproduce.sh has them
    shutil.copytree(tmp_path / "runs/one", deeper)
    os.utime(deeper / "last.pth")
    assert "writing to runs/table/kd-0" in command("train.py", "--resume", cwd=tmp_path)


# ---------------------------------------------------------------- several processes

SHARED_STEP = """
import sys
import torch
sys.path[:0] = [{root!r}, {tests!r}]
import train
from test_train import shared_step

train.join_processes("cpu")
values, gradient = shared_step(train.rank(), train.world_size())
if train.rank() == 0:
    torch.save([values, gradient], {out!r})
train.dist.destroy_process_group()
"""


def shared_step(rank, world):
    """One step on this process's share of four images, in two pieces, with every distillation term
    -> (values, gradients).
    """
    pieces = 2 if world > 1 else 1
    args = arguments("--teacher", "x", "--lambda-kl", 1, "--grad-clip", 0, "--accum", pieces)

    torch.manual_seed(0)
    student = segformer("b0", 4)
    projections = Projections(SIZES["b0"]["dims"], SIZES["b1"]["dims"])
    weight = torch.tensor([0.5, 1, 2, 4])
    objective = train.Objective(student, projections, args, weight).eval()
    teacher = segformer("b1", 4).eval()

    images = torch.rand(4, 3, 32, 32)
    labels = torch.randint(0, 4, (4, 32, 32))
    # the first process has few labelled pixels, the second all
    labels[0] = IGNORE
    labels[1, 8:] = IGNORE
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)

    run = make_run(args, objective, teacher)
    if world > 1:
        run.parallel = train.DistributedDataParallel(objective)
    values = train.train_step(run, images[mine], labels[mine])
    return values, [p.grad for p in objective.parameters()]


def test_two_processes_make_the_step_of_one(tmp_path):
    """Unequal void, --accum, every term: the same values and the same gradient as one process with
    the whole batch.
    """
    saved = tmp_path / "two.pt"
    script = tmp_path / "step.py"
    script.write_text(
        SHARED_STEP.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(saved))
    )
    command(*TORCHRUN, script, env=ONE_THREAD)

    values, gradient = torch.load(saved)
    expected, whole = shared_step(0, 1)
    assert torch.allclose(values, expected, rtol=1e-4)

    norms = torch.stack([g.norm() for g in whole])
    total = norms.norm()
    for a, b in zip(gradient, whole, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-5 * total


def test_two_processes_train(tmp_path, folder):
    """The same samples and the same total batch; only dropout's draws and BatchNorm's batch differ.
    """
    sizes = ("--crop", 32, 32, "--workers", 0, "--device", "cpu")
    flags = ("--data", folder, "--iters", 12, "--lr", "1e-4", *sizes)
    alone = tmp_path / "one"
    both = tmp_path / "two"
    command("train.py", *flags, "--batch-size", 4, "--out", alone)
    shared = (ROOT / "train.py", *flags, "--batch-size", 2, "--out", both)
    command(*TORCHRUN, *shared, env=ONE_THREAD)

    one = column(alone, "wce")
    two = column(both, "wce")
    assert len(one) == 12
    assert len(two) == 12
    assert one[0] == pytest.approx(two[0], rel=0.1)
    assert np.mean(one) == pytest.approx(np.mean(two), rel=0.1)

    recipe = json.loads((both / "recipe.json").read_text())
    assert recipe["total_batch"] == 4
    assert len(log(both, "scores.csv")) == len(log(alone, "scores.csv"))


FAULT = """
import os
import sys
sys.path.insert(0, {root!r})
import train
from extras.cli import UsageError

step = train.train_step
second_process = os.environ["RANK"] == "1"
first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

def faulty(*args):
    faulty.steps += 1
    if faulty.steps == 4 and second_process and first_start:
        raise UsageError("this machine is broken")
    return step(*args)

faulty.steps = 0
train.train_step = faulty
train.run_command(train.main, end=train.leave)
"""


def test_a_fault_in_one_process_ends_all_and_a_restart_resumes(tmp_path, folder):
    script = tmp_path / "fault.py"
    script.write_text(FAULT.format(root=str(ROOT)))
    flags = ("--data", folder, "--iters", 6, "--eval-every", 2, *SMALL)

    # the traceback is torchrun's own
    faulty = (script, *flags, "--out", tmp_path / "ended")
    output = command(*TORCHRUN, *faulty, code=1, traceback=True, env=ONE_THREAD)
    # and the other process ended too, long before gloo's half hour
    assert "error: this machine is broken" in output

    faulty = (script, *flags, "--out", tmp_path / "restarted")
    output = command(*TORCHRUN, "--max-restarts", 1, *faulty, env=ONE_THREAD)
    assert "resuming after step 2" in output

    command(*TORCHRUN, ROOT / "train.py", *flags, "--out", tmp_path / "whole", env=ONE_THREAD)
    assert same_runs(tmp_path / "whole", tmp_path / "restarted")


# ---------------------------------------------------------------- precision, devices, seeds

@pytest.mark.parametrize("cpuinfo, has_units", [
    ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
    ("Features\t: fp asimd bf16\n", True),
    ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n", False),
    ("machine\t: one that tells nothing\n", None),
])
def test_bf16_units_are_known_and_what_is_faster_is_said(cpuinfo, has_units, monkeypatch, capsys):
    monkeypatch.setattr(machine.Path, "read_text", lambda path: cpuinfo)
    assert machine.cpu_has_bf16() is has_units
    said = {}
    for amp in ("off", "bf16"):
        run_report.advise_precision(amp, torch.device("cpu"))
        said[amp] = capsys.readouterr().out
    assert ("--amp bf16 takes less time" in said["off"]) == (has_units is True)
    assert ("--amp off takes about a tenth" in said["bf16"]) == (has_units is False)
    run_report.advise_precision("bf16", torch.device("cuda"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("cpuinfo, name", [
    ("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx512_bf16\n\n"
     "processor\t: 1\nmodel name\t: another\nflags\t\t: fpu amx_bf16\n",
     "AMD EPYC ({}, avx512_bf16), 2 threads"),
    ("Features\t: fp asimd bf16\n", "aarch64 CPU ({}, bf16), 2 threads"),
    ("", "aarch64 CPU ({}), 2 threads"),
])
def test_recipe_tells_the_processor(cpuinfo, name, monkeypatch):
    """Two kinds round differently: a table of runs can say on which it was made."""
    monkeypatch.setattr(machine.Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    kernels = torch.backends.cpu.get_cpu_capability()
    assert machine.device_name(torch.device("cpu")) == name.format(kernels)


def test_bf16_and_fp16_train(tmp_path, folder):
    """Along the curve of full precision, within what 16 bits round away."""
    curves = {}
    for amp in ("off", "bf16", "fp16"):
        out = tmp_path / amp
        flags = ("--data", folder, "--iters", 12, "--lr", 1e-4, "--out", out, *SMALL)
        command("train.py", *flags, "--amp", amp)
        curves[amp] = column(out, "loss")

    assert curves["bf16"] == pytest.approx(curves["off"], rel=0.1)
    assert curves["fp16"] == pytest.approx(curves["off"], rel=0.03)

    # and not simply full precision
    different = {tuple(curve) for curve in curves.values()}
    assert len(different) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_trains_with_fp16_by_default(tmp_path, folder, teacher):
    out = tmp_path / "gpu"
    flags = ("--data", folder, "--teacher", teacher, "--iters", 30, "--out", out)
    command("train.py", *flags, "--crop", 64, 64, "--workers", 0)

    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["amp"] == "fp16"
    losses = column(out, "loss")
    assert losses[-1] < losses[0]


def test_same_seed_same_run_other_seed_another(tmp_path, folder):
    flags = ("--data", folder, "--iters", 3, *SMALL)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        command("train.py", *flags, "--seed", seed, "--out", tmp_path / name)

    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "c")


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not in ../shared/camvid")
def test_real_camvid_trains(tmp_path):
    out = tmp_path / "run"
    sizes = ("--iters", 2, "--crop", 64, 64, "--batch-size", 1)
    flags = ("--data", f"camvid:{CAMVID}", *sizes, "--eval-every", 5, "--workers", 2)
    command("train.py", *flags, "--out", out)
    assert load_checkpoint(out / "best.pth").input_size == (288, 384)


# ---------------------------------------------------------------- failing

def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_term(tmp_path, folder):
    out = tmp_path / "run"
    wild = ("--lr", 1e25, "--grad-clip", 0, "--warmup", 0)
    flags = ("--data", folder, "--iters", 20, "--eval-every", 20, "--out", out, *SMALL)
    output = command("train.py", *wild, *flags, code=1)
    assert "wce is nan" in output
    assert "step " in output


def test_destroyed_weights_do_not_replace_the_last_good_checkpoint(tmp_path, folder, monkeypatch):
    """The loss before a fatal step is finite: the run must notice on the network's output, before
    it saves.
    """
    out = tmp_path / "run"
    rate = train.learning_rate

    def fatal_at_3(step, *rest):
        return 1e30 if step == 3 else rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", fatal_at_3)
    with pytest.raises(train.NotFinite, match="not finite"):
        train_with("--data", folder, "--iters", 4, "--eval-every", 2, "--out", out, *SMALL)

    saved = torch.load(out / "last.pth", weights_only=True)
    assert saved["step"] == 2
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    load_checkpoint(out / "best.pth")


def test_flags_that_change_nothing_are_said(capsys):
    losses = ("--temperature", 4, "--lambda-dice", 0.3)
    arguments(*losses, "--folds", 5, "--augment", "plain", "--scale-range", 1, 2)
    said = capsys.readouterr().err
    for flag in ("temperature", "lambda-dice", "folds", "scale-range"):
        assert f"note: --{flag} changes nothing" in said

    distilling = ("--teacher", "x", "--lambda-kl", 1, "--temperature", 4)
    arguments(*distilling, "--fold", 0, "--folds", 5)
    assert "changes nothing" not in capsys.readouterr().err


def test_broken_data_in_a_worker_is_a_sentence_and_leaves_the_checkpoint(tmp_path):
    spec = write_folder(tmp_path / "set", frames=4)
    out = tmp_path / "run"
    command("train.py", "--data", spec, "--iters", 2, "--out", out, *SMALL)
    before = (out / "last.pth").read_bytes()

    frame = tmp_path / "set" / "images" / "frame_1.png"
    frame.write_bytes(b"no image")
    more = ("--iters", 30, "--workers", 1)
    output = command("train.py", "--resume", "--out", out, *more, code=2)
    assert f"error: {frame}: not an image that can be read" in output
    assert (out / "last.pth").read_bytes() == before


@pytest.mark.parametrize("args, sentence", [
    (["--crop", "16", "64"], "16 is not at least 32"),
    (["--student", "b9"], "invalid choice"),
    (["--lambda-fd", "1"], "--lambda-fd needs a --teacher"),
    (["--lr", "-1"], "-1 is not above 0"),
    (["--lr", "nan"], "nan is not"),
    (["--warmup", "2"], "at most 1"),
    (["--frobnicate"], "unrecognized"),
    (["--scale-range", "2", "1"], "LO is larger"),
    (["--iters", "5", "--epochs", "2"], "give one"),
    (["--data", "camvid:/nowhere"], "no such folder"),
    (["--init", "{teacher}"], "is a SegFormer-B1: it cannot start a --student b0"),
    (["--init", "/no/b0.pth"], "cannot open"),
    (["--teacher", "/no/b2.pth"], "cannot open checkpoint /no/b2.pth"),
    (["--teacher", "{teacher}", "--lambda-kl", "1"], "b1.pth has 3 classes, the data (toy) has 8"),
    (["--teacher", "{text}", "--data", "{folder}"], "classes.txt is not a checkpoint"),
    (["--device", "cuda:77"], "not to be had here"),
    (["--data", "{folder}", "--fold", "9"], "fold 9 of 2 does not exist"),
    (["--batch-size", "0"], "0 is not at least 1"),
    (["--amp", "maybe"], "invalid choice"),
    (["--data", "{folder}", "--out", "{text}"], "cannot make the folder"),
])
def test_mistakes_are_a_sentence_and_exit_code_2(args, sentence, tmp_path, folder, teacher):
    text = folder.split(":")[1] + "/classes.txt"
    args = [arg.format(teacher=teacher, folder=folder, text=text) for arg in args]
    output = command("train.py", *args, cwd=tmp_path, code=2)
    assert sentence in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments(tmp_path, folder):
    """python -m pytest -m slow: SIGKILL 100 times, anywhere, while it starts, trains, evaluates or
    writes.
    """
    whole = tmp_path / "whole"
    flags = ("--data", folder, *SMALL, "--iters", 1200, "--eval-every", 3)
    process = start(*flags, "--out", whole)
    output = process.communicate()[0]
    assert process.returncode == 0, output

    out = tmp_path / "cut"
    rng = np.random.default_rng(0)
    for kill in range(100):
        process = start_or_resume(out, flags)
        if kill % 5 == 0:                              # perhaps while it starts
            time.sleep(rng.uniform(0, 9))
        else:
            steps = len(log(out)) if (out / "log.csv").exists() else 0
            wait_for_step(process, out, steps + rng.integers(4, 9))
            time.sleep(rng.uniform(0, 0.5))
        assert process.poll() is None, process.communicate()[0]
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
        assert "Traceback" not in output, output

    command("train.py", "--resume", "--out", out)
    assert same_runs(whole, out)


def resident_memory(process):
    """In MiB."""
    with open(f"/proc/{process.pid}/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.slow
def test_memory_does_not_grow_over_2000_steps(tmp_path, folder):
    out = tmp_path / "long"
    flags = ("--data", folder, *SMALL, "--iters", 2000, "--eval-every", 100)
    process = start(*flags, "--out", out)

    memory = []
    for step in range(200, 2000, 200):
        wait_for_step(process, out, step)
        memory.append(resident_memory(process))

    assert process.wait() == 0
    print("MiB after 200, 400 ... steps:", [round(m) for m in memory])
    assert memory[-1] < memory[1] + 20


# ---------------------------------------------------------------- --cache and --compile

def test_a_cache_changes_no_step_and_serves_the_next_run(tmp_path, folder, capsys):
    plain = tmp_path / "plain"
    first = tmp_path / "first"
    second = tmp_path / "second"
    cache = tmp_path / "cache"
    flags = ("--data", folder, "--iters", 3, *SMALL)
    command("train.py", *flags, "--out", plain)
    command("train.py", *flags, "--out", first, "--cache", cache)
    command("train.py", *flags, "--out", second, "--cache", cache, "--workers", 2)
    assert same_weights(plain, first)
    assert same_weights(plain, second)

    frames = list(cache.glob("*.frame"))
    assert len(frames) == 6  # train and val

    # toy scenes are drawn
    arguments("--cache", cache)
    assert "note: --cache changes nothing" in capsys.readouterr().err

    file = tmp_path / "file"
    file.write_text("")
    output = command("train.py", *flags, "--cache", file, code=2, cwd=tmp_path)
    assert "no folder for decoded frames can be made there" in output


TRACED = """
import functools
import sys
import torch
import train

# traced as ever, but without the C++ compiler's minutes
torch.compile = functools.partial(torch.compile, backend="eager")

def compile_module(self, **how):
    self._compiled_call_impl = torch.compile(self._call_impl, **how)

torch.nn.Module.compile = compile_module
sys.argv = ["train.py", *sys.argv[1:]]
train.run_command(train.main)
"""


@pytest.mark.parametrize("how", ["traced", pytest.param("compiled", marks=pytest.mark.slow)])
def test_compile_has_the_same_loss_curve(tmp_path, folder, teacher, how):
    flags = ("--data", folder, "--teacher", teacher, "--lambda-kl", 1, "--iters", 4, *SMALL)
    command("train.py", *flags, "--out", tmp_path / "eager")

    program = ("-c", TRACED) if how == "traced" else ("train.py",)
    compiling = ("--compile", "--out", tmp_path / "compiled")
    output = command(*program, *flags, *compiling, env={"PYTHONPATH": str(ROOT)})
    assert "compiled, with the first step in" in output

    for eager, compiled in zip(log(tmp_path / "eager"), log(tmp_path / "compiled"), strict=True):
        expected = [float(value) for value in eager.values()]
        values = [float(compiled[name]) for name in eager]
        assert values == pytest.approx(expected, rel=1e-3)


def test_compile_without_a_compiler_is_a_sentence(tmp_path, folder):
    env = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    flags = ("--data", folder, "--iters", 1, *SMALL, "--compile", "--out", tmp_path / "run")
    output = command("train.py", *flags, code=2, env=env)
    assert "error: --compile failed" in output
    assert "leave --compile out" in output


def test_a_run_of_an_older_version_resumes(tmp_path, folder):
    """Its last.pth lacks the flags that came later."""
    out = tmp_path / "run"
    command("train.py", "--data", folder, "--iters", 2, *SMALL, "--out", out)

    content = torch.load(out / "last.pth", weights_only=True)
    for flag in ("tensorboard", "cache", "compile"):
        del content["training"]["args"][flag]
    torch.save(content, out / "last.pth")

    command("train.py", "--resume", "--out", out, "--iters", 3)
    assert len(log(out)) == 3


# ---------------------------------------------------------------- from Python, and one's own parts

def test_train_from_python_is_the_command(tmp_path, folder):
    flags = {
        "data": folder,
        "iters": 3,
        "crop": (32, 32),
        "batch_size": 2,
        "workers": 0,
        "device": "cpu",
        "compile": False,
        "grad_clip": None,
    }
    result = train.train(**flags, out=tmp_path / "python")
    command("train.py", "--data", folder, "--iters", 3, *SMALL, "--out", tmp_path / "command")
    assert same_runs(tmp_path / "python", tmp_path / "command")

    assert result.folder == tmp_path / "python"
    assert result.teacher_scores is None
    scored = log(result.folder, "scores.csv")
    assert result.scores["miou"] == pytest.approx(float(scored[-1]["miou"]))

    longer = train.train(resume=True, out=tmp_path / "python", iters=4)
    assert len(log(longer.folder)) == 4

    mistakes = (
        ({"crop": 16}, "expected 2 arguments"),
        ({"lambda_kl": 1}, "needs a --teacher"),
        ({"frobnicate": True}, "unrecognized"),
        ({"frobnicate": False}, "unrecognized"),
        ({"warmup": False}, "--warmup"),
        ({"grad_clip": True}, "--grad-clip"),
    )
    for mistake, sentence in mistakes:
        with pytest.raises(UsageError, match=sentence):
            train.train(**mistake)


class Gain(torch.nn.Module):
    """A norm whose parameter has a name of its own."""

    def __init__(self, dim):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.gain * torch.tanh(x)


def identity(dim, site):
    return torch.nn.Identity()


def gain(dim, site):
    return Gain(dim)


@pytest.mark.parametrize("norm", [identity, gain], ids=["identity", "gain"])
def test_a_norm_of_ones_own_trains_resumes_and_loads(norm, tmp_path, folder, monkeypatch):
    monkeypatch.setitem(NORMS, "own", norm)
    out = tmp_path / "run"
    flags = {
        "data": folder,
        "norm": "own",
        "crop": (32, 32),
        "batch_size": 2,
        "workers": 0,
        "device": "cpu",
        "out": out,
    }
    train.train(**flags, iters=2)
    train.train(resume=True, out=out, iters=3)
    assert len(log(out)) == 3
    assert load_checkpoint(out / "best.pth").norm_fn is norm


def test_what_could_not_be_loaded_again_is_not_trained(tmp_path, folder, monkeypatch):
    """The step-0 checkpoint is read back before the first step."""

    def broken(path, num_classes=None):
        if num_classes:
            raise UsageError("unreachable")
        raise run_folder.CheckpointError(f"{path} is damaged")

    broken_task = dataclasses.replace(train.SEGMENTATION, load=broken)
    monkeypatch.setattr(train, "SEGMENTATION", broken_task)
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="what this run would save cannot be loaded again"):
        train_with("--data", folder, "--iters", 5, *SMALL, "--out", out)
    assert log(out) == []


def test_a_loss_term_is_added_in_one_place(tmp_path, folder, teacher, monkeypatch):
    """An entry of the table makes the flag, its check, the log's column, and what the teacher
    computes.
    """
    seen = []

    def gap(outputs):
        seen.append(outputs.teacher.logits is None)
        stages = zip(outputs.stages, outputs.teacher.stages, strict=True)
        gaps = [(mine - theirs).abs().mean() for mine, theirs in stages]
        return sum(gaps) * outputs.args.gap_power

    option = train.Option("gap_power", train.POSITIVE, 1.0, "of the gap")
    term = train.Term(
        "gap",
        gap,
        mean_over="images",
        teacher_reads="stages",
        help="weight of the gap",
        options=(option,),
    )
    monkeypatch.setattr(train, "DISTILLATION", (*train.DISTILLATION, term))
    monkeypatch.setitem(train.TERMS, "gap", term)
    with_gap = train.TrainFlags(train.DEFAULTS, train.DATASET_DEFAULTS, train.DISTILLATION)
    monkeypatch.setattr(train, "FLAGS", with_gap)

    out = tmp_path / "run"
    flags = ("--data", folder, "--iters", 2, *SMALL, "--lambda-gap", 0.5, "--gap-power", 2)
    alone = ("--lambda-fd", 0, "--lambda-pe", 0)
    train_with(*flags, "--teacher", teacher, *alone, "--out", out)
    assert list(log(out)[0]) == ["step", "lr", "loss", "wce", "gap", "grad_norm"]
    assert all(seen)  # the teacher's decoder did not run

    with pytest.raises(UsageError, match="--lambda-gap needs a --teacher"):
        train_with(*flags)


def test_a_stretched_schedule_is_said(tmp_path, folder, capsys):
    out = tmp_path / "run"
    train_with("--data", folder, "--iters", 4, *SMALL, "--out", out)
    train_with("--resume", "--out", out, "--iters", 8)
    said = capsys.readouterr().err
    assert "was begun with --iters 4" in said
    assert "learning rate 3.16e-04 in place of 0.00e+00" in said


MANY_REDUCTIONS = """
import sys
sys.path.insert(0, {root!r})
sys.setswitchinterval(1000)
import torch
from extras.cli import run_command
from extras.distributed import all_reduce, join_processes, leave

def main():
    join_processes("cpu")
    for _ in range(50):
        all_reduce(torch.ones(1000))
    print("all work is done", flush=True)
    return int(sys.argv[1])

run_command(main, end=leave)
"""


def test_torchruns_processes_leave_without_pythons_end(tmp_path):
    """gloo's thread may hold the last tensor: with Python's own end some of these processes die
    with SIGABRT.
    """
    script = tmp_path / "end.py"
    script.write_text(MANY_REDUCTIONS.format(root=str(ROOT)))
    for code in (0, 0, 3):
        failed = code != 0
        output = command(
            *TORCHRUN,
            script,
            code,
            code=int(failed),
            traceback=failed,
            env=ONE_THREAD,
        )
        assert "all work is done" in output
        assert "SIGABRT" not in output
        assert ("exitcode  : 3" in output) == failed
