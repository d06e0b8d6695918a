"""The loop by training: it learns, distils, resumes exactly, splits over processes, and fails with a sentence."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import run
import train
from conftest import CAMVID, ROOT, command, wait_for_step, write_folder
from losses import IGNORE, Projections, weighted_cross_entropy
from model import SIZES, load_checkpoint, save_checkpoint, segformer
from nvlabs import Flat

SMALL = ("--crop", 32, 32, "--batch-size", 2, "--workers", 0, "--amp", "off", "--device", "cpu")


def log(folder, name="log.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def same_weights(a, b):
    first, second = (torch.load(folder / "last.pth", weights_only=True) for folder in (a, b))
    return all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])


@pytest.fixture
def teacher(tmp_path):
    """A random B1 for the three classes of the test folder: a teacher with other widths than B0."""
    torch.manual_seed(1)
    network = segformer("b1", 3)
    save_checkpoint(network, tmp_path / "b1.pth")
    return tmp_path / "b1.pth"


def test_size_is_what_frames_are_worked_at(folder, tmp_path):
    """The crop is cut from the frame at --size; the checkpoint tells the evaluation to resize to it too."""
    out = command("train.py", "--data", folder, *SMALL, "--size", 64, 80, "--iters", 1, "--out", tmp_path / "run")
    assert "mIoU" in out
    assert load_checkpoint(tmp_path / "run" / "best.pth").input_size == (64, 80)


# ---------------------------------------------------------------- parts

def test_learning_rate_at_its_corners():
    rates = [train.learning_rate(step, 1000, 6e-4, 0.05) for step in range(1000)]
    assert rates[0] < 2e-5 and rates[50] == pytest.approx(6e-4) and max(rates) == rates[50]
    assert rates[525] == pytest.approx(3e-4) and 0 < rates[-1] < 1e-6
    assert train.learning_rate(0, 10, 1.0, 0.0) == 1.0 and train.learning_rate(0, 1, 1.0, 1.0) > 0


def arguments(*given):
    return train.settle(train.build_parser().parse_args(list(map(str, given))))


def test_defaults_are_the_papers_and_suit_the_data():
    paper = arguments("--data", "cityscapes:x", "--teacher", "t.pth")
    assert (paper.lr, paper.epochs, paper.batch_size, paper.crop, paper.warmup, paper.augment) == (6e-4, 200, 2, [512, 1024], 0.05, "plain")
    assert (paper.lambda_fd, paper.lambda_pe, paper.lambda_kl, paper.lambda_m, paper.lambda_s) == (1, 1, 0, 1, 0.5) and paper.iters is None
    camvid = arguments("--data", "camvid:x")
    assert (camvid.iters, camvid.batch_size, camvid.crop, camvid.lambda_fd) == (40_000, 4, [288, 288], 0)
    assert arguments("--data", "camvid:x", "--epochs", 3).iters is None and arguments("--iters", 7).iters == 7
    assert train.loss_weights(arguments("--loss", "dice-focal", "--lambda-dice", 0.3)) == {"dice": 0.3, "focal": 0.7}
    assert train.loss_weights(paper) == {"wce": 1, "fd": 1, "pe": 1}


@pytest.mark.parametrize("name", ["data.py", "train.py", "eval.py", "bench.py"])
def test_help_names_every_flag(name):
    text = command(name, "--help")
    assert "usage" in text and all(f"--{flag}" in text for flag in re.findall(r'(?:add|add_argument)\("--([a-z-]+)"', (ROOT / name).read_text()))


def test_a_batch_cut_in_parts_has_the_loss_and_gradient_of_the_whole():
    """Half of one part is void: the mean of the parts' means would be another loss."""
    torch.manual_seed(0)
    args = arguments("--loss", "wce", "--grad-clip", 0)
    student = segformer("b0", 4).eval()                           # eval: no dropout, and BatchNorm does not see the parts
    weight = torch.tensor([0.5, 1, 2, 4])
    objective = train.Objective(student, None, args, weight)
    images, labels = torch.rand(4, 3, 32, 32), torch.randint(0, 4, (4, 32, 32))
    labels[0] = IGNORE
    expected = weighted_cross_entropy(student(images), labels, weight)
    gradient = torch.autograd.grad(expected, student.parameters())
    for args.accum in (1, 2, 4):
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.0)
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        values = train.train_step(objective, None, optimizer, scaler, images, labels, args, lambda: torch.autocast("cpu", enabled=False))
        assert values.tolist() == pytest.approx([expected.item(), torch.stack([g.norm() for g in gradient]).norm().item()], rel=1e-4)
        assert all(torch.allclose(p.grad, g, rtol=1e-3, atol=1e-6) for p, g in zip(student.parameters(), gradient))


def test_the_optimizer_must_own_the_projections():
    args = arguments("--teacher", "x", "--weight-decay", 0.1)
    objective = train.Objective(segformer("b0", 2), Projections(SIZES["b0"]["dims"], SIZES["b1"]["dims"]), args, torch.ones(2))
    optimizer = train.make_optimizer(objective, args, torch.device("cpu"))
    train.check_owned(objective, optimizer)
    assert all((p.ndim > 1) == (group["weight_decay"] == 0.1) for group in optimizer.param_groups for p in group["params"])
    with pytest.raises(RuntimeError, match="does not own 16 trainable parameters, first projections.stages.0.weight"):
        train.check_owned(objective, torch.optim.AdamW(objective.student.parameters()))
    with pytest.raises(RuntimeError, match="get no gradient"):
        train.check_gradients(objective)


# ---------------------------------------------------------------- whole runs

def test_a_run_learns_and_writes_what_it_promises(tmp_path, folder):
    out = tmp_path / "run"
    output = command("train.py", "--data", folder, "--iters", 60, "--eval-every", 30, "--out", out, *SMALL, "--scale-range", 0.8, 1.2)
    assert {p.name for p in out.iterdir()} == {"best.pth", "last.pth", "previous.pth", "log.csv", "scores.csv", "recipe.json", "pictures.png"}
    rows = log(out)
    assert len(rows) == 60 and list(rows[0]) == ["step", "lr", "loss", "wce", "grad_norm"]
    losses = [float(row["loss"]) for row in rows]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    scored = log(out, "scores.csv")
    assert [row["step"] for row in scored] == ["30", "60"] and float(scored[-1]["miou"]) > 0.6
    best = load_checkpoint(out / "best.pth")
    assert best.classes == ["class 0", "class 1", "class 2"]
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["iters"] == 60 and recipe["total_batch"] == 2 and recipe["torch"] == torch.__version__
    assert "60 steps of 2 images" in output and "mIoU" in output and "images/s" in output
    assert Image.open(out / "pictures.png").width > 900
    assert f"{100 * float(max(row['miou'] for row in scored)):.2f}" in output.split("IoU, %")[-1]


def test_the_share_of_waiting_for_data_is_said(tmp_path, folder, monkeypatch, capsys):
    def share():
        train.train(train.build_parser().parse_args(list(map(str, ("--data", folder, *SMALL, "--iters", 2, "--out", tmp_path / str(time.time()))))))
        return int(re.search(r"images/s \((\d+) % waiting for data\)", capsys.readouterr().out)[1])
    fast, read = share(), data.Stream.__getitem__
    monkeypatch.setattr(data.Stream, "__getitem__", lambda self, n: (time.sleep(1), read(self, n))[1])
    assert fast < 50 < share() <= 100


def test_distillation_logs_every_term_and_shows_teacher_and_student(tmp_path, folder, teacher):
    out = tmp_path / "kd"
    output = command("train.py", "--student", "b0", "--teacher", teacher, "--lambda-fd", 1, "--lambda-pe", 1, "--lambda-kl", 0.5, "--temperature", 4,
                     "--data", folder, "--iters", 25, "--out", out, *SMALL)
    assert "teacher " + str(teacher) + ": mIoU" in output and "teacher b1" in output and "student b0" in output and "diff" in output
    rows = log(out)
    assert list(rows[0]) == ["step", "lr", "loss", "wce", "kl", "fd", "pe", "grad_norm"]
    for row in rows:
        total = float(row["wce"]) + 0.5 * float(row["kl"]) + float(row["fd"]) + float(row["pe"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
    first, last = rows[0], rows[-1]
    assert all(float(last[term]) < float(first[term]) for term in ("fd", "pe"))
    state = torch.load(out / "last.pth", weights_only=True)["training"]
    student = sum(1 for _ in segformer("b0", 3).parameters())
    assert len(state["projections"]) == 16 and len(state["optimizer"]["state"]) == student + 16        # trained, all of them


def test_tensorboard_gets_every_step_and_a_picture(tmp_path, folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    out = tmp_path / "run"
    command("train.py", "--data", folder, "--iters", 3, "--eval-every", 2, "--tensorboard", "--out", out, *SMALL)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/wce")] == [1, 2, 3] and [e.step for e in events.Scalars("val/miou")] == [2, 3]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([float(row["loss"]) for row in log(out)], rel=1e-6)
    assert [e.step for e in events.Images("val")] == [2, 3]
    (tmp_path / "tensorboard.py").write_text("raise ImportError")
    output = command("train.py", "--data", folder, "--tensorboard", "--out", tmp_path / "no", *SMALL, code=2, env={"PYTHONPATH": str(tmp_path)})
    assert "pip install tensorboard" in output and not (tmp_path / "no").exists()


@pytest.mark.parametrize("what", ["encoder", "segmenter", "other names", "resumed"])
def test_init_starts_from_the_files_weights(what, tmp_path, folder):
    torch.manual_seed(3)
    flat, path, out = Flat("b0", None if what == "encoder" else 3), tmp_path / "start.pth", tmp_path / "run"
    torch.save(flat.state_dict(), path)
    if what == "other names":
        network = load_checkpoint(path)
        network.classes = ["x", "y", "z"]
        save_checkpoint(network, path)
    flags = ("--init", path, "--data", folder, "--lr", 1e-12, "--eval-every", 1, "--out", out, *SMALL)       # nothing moves but rounding
    output = command("train.py", *flags, "--iters", 1)
    assert f"student SegFormer-B0 from {path}" in output
    if what == "resumed":
        path.unlink()                                             # its work was done at the start
        command("train.py", "--resume", "--out", out, "--iters", 2)
    trained = torch.load(out / "last.pth", weights_only=True)["model"]
    assert torch.allclose(trained["stages.2.blocks.1.mlp.fc1.weight"], flat.state_dict()["block3.1.mlp.fc1.weight"], atol=1e-8)
    new = {"encoder": "new decoder", "other names": "so the head is new"}.get(what)
    assert new is None or new in output
    if what != "encoder":
        same = torch.allclose(trained["decoder.classifier.weight"], flat.state_dict()["linear_pred.weight"], atol=1e-8)
        assert same != (what == "other names") and torch.equal(trained["mean"], torch.zeros(1, 3, 1, 1))


def test_any_format_teaches(tmp_path):
    torch.manual_seed(3)
    torch.save({f"module.{key}": t for key, t in Flat("b1", 20).state_dict().items()}, tmp_path / "theirs.pth")
    data = write_folder(tmp_path / "set", size=(40, 57), classes=19)
    output = command("train.py", "--teacher", tmp_path / "theirs.pth", "--data", data, "--iters", 1, "--out", tmp_path / "kd", *SMALL)
    assert "theirs.pth: SegFormer-B1, 19 classes, TransKD/EffiSeg without its void output" in output and "no mean/std" in output


@pytest.mark.parametrize("flags, terms", [(("--lambda-fd", 0), ["wce", "pe"]), (("--lambda-pe", 0, "--loss", "dice-focal"), ["dice", "focal", "fd"]),
                                          (("--lambda-fd", 0, "--lambda-pe", 0, "--lambda-kl", 1), ["wce", "kl"])])
def test_terms_of_weight_zero_are_left_out(flags, terms, tmp_path, folder, teacher):
    command("train.py", "--teacher", teacher, *flags, "--data", folder, "--iters", 2, "--out", tmp_path / "kd", *SMALL)
    assert list(log(tmp_path / "kd")[0])[3:-1] == terms


def start(*args):
    """Run train.py in the background; its group is its own, so that a Ctrl-C can be sent to all of it."""
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def same_runs(a, b):
    """Weights, log, scores and best checkpoint of two run folders, to the bit."""
    best = [torch.load(folder / "best.pth", weights_only=True) for folder in (a, b)]
    return same_weights(a, b) and best[0]["step"] == best[1]["step"] and \
        all(torch.equal(best[0]["model"][name], best[1]["model"][name]) for name in best[0]["model"]) and \
        all((a / name).read_text() == (b / name).read_text() for name in ("log.csv", "scores.csv"))


def test_a_run_killed_again_and_again_resumes_exactly(tmp_path, folder, teacher):
    """SIGKILL at three moments, SIGTERM and Ctrl-C at others: the run ends as the one that was never stopped."""
    flags = ("--data", folder, "--teacher", teacher, "--eval-every", 8, *SMALL, "--accum", 2, "--iters", 40)
    command("train.py", *flags, "--out", tmp_path / "whole")
    out, flags = tmp_path / "cut", (*flags, "--out", tmp_path / "cut", "--workers", 1)
    for how, step in ((signal.SIGKILL, 0), (signal.SIGTERM, 8), (signal.SIGKILL, 16), (signal.SIGINT, 24)):
        process = start(*(("--resume", "--out", out) if (out / "last.pth").exists() else flags))
        wait_for_step(process, out, step)
        if step == 0:
            while not (out / "last.pth").exists():
                time.sleep(0.01)
        os.killpg(process.pid, how)
        output = process.communicate()[0]
        if how == signal.SIGKILL:
            continue
        assert process.returncode == {signal.SIGTERM: 0, signal.SIGINT: 130}[how], output
        assert f"stopped by {'SIGTERM' if how == signal.SIGTERM else 'Ctrl-C'} after step" in output and "to go on: python train.py --resume --out" in output
        assert "Traceback" not in output and output.count("error") == 0
        done = torch.load(out / "last.pth", weights_only=True)["training"]["step"]
        assert len(log(out)) == done                              # every finished step is in the log and in the checkpoint
    command("train.py", "--resume", "--out", out)
    assert same_runs(tmp_path / "whole", out)
    assert not [path for path in out.iterdir() if "partial" in path.name]


def test_a_second_ctrl_c_stops_at_once():
    with run.Stop() as stop:
        stop.note(signal.SIGTERM, None)                           # any number of these wait
        assert stop.asked("cpu", False) == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            stop.note(signal.SIGINT, None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_damaged_checkpoint_is_known_and_the_one_before_it_offered(tmp_path, folder):
    out = tmp_path / "run"
    command("train.py", "--data", folder, "--iters", 4, "--eval-every", 2, "--out", out, *SMALL)
    whole = (out / "last.pth").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[:-1000], flipped, b""):                 # truncated, one bit, empty
        (out / "last.pth").write_bytes(content)
        with pytest.raises(run.UsageError, match=r"it is damaged.*the checkpoint before it is whole \(step 2\): cp"):
            run.find_run(arguments("--resume", "--out", out))
    (out / "last.pth").write_bytes((out / "previous.pth").read_bytes())
    command("train.py", "--resume", "--out", out)
    assert [row["step"] for row in log(out)] == ["1", "2", "3", "4"]


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path, folder):
    out = tmp_path / "run"
    command("train.py", "--data", folder, "--iters", 2, "--out", out, *SMALL)
    before = (out / "last.pth").read_bytes()
    limited = f"ulimit -f 20000; exec {sys.executable} {ROOT / 'train.py'} --resume --out {out} --iters 4"             # in KiB: a small disk
    result = subprocess.run(["bash", "-c", "trap '' XFSZ; " + limited], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 2 and "cannot write" in result.stderr and "untouched" in result.stderr and "Traceback" not in result.stderr
    assert (out / "last.pth").read_bytes() == before and not [path for path in out.iterdir() if "partial" in path.name]


def test_a_frame_that_breaks_while_training_saves_first(tmp_path, folder, monkeypatch):
    out, reads = tmp_path / "run", []
    read = data.Files.read_image

    def breaks(self, i):
        reads.append(i)
        if len(reads) > 9:
            raise data.DatasetError(f"{self.paths[i][0]}: not an image that can be read (the disk went)")
        return read(self, i)

    monkeypatch.setattr(data.Files, "read_image", breaks)
    with pytest.raises(data.DatasetError, match="the disk went"):
        train.train(train.build_parser().parse_args(["--data", folder, "--iters", "20", "--eval-every", "10", "--out", str(out), *map(str, SMALL)]))
    assert torch.load(out / "last.pth", weights_only=True)["training"]["step"] == 4 == len(log(out))       # 4 x 2 frames, the 5th step broke


@pytest.mark.parametrize("where, sentence", [("loss", "step 3: pe is inf"), ("gradient", "step 3: the gradient of pe is not finite")])
def test_a_term_that_breaks_is_named_with_its_step(where, sentence, tmp_path, folder, teacher, monkeypatch):
    calls, pekd = [], train.pekd

    class Bad(torch.autograd.Function):
        forward = staticmethod(lambda context, x: x.clone())
        backward = staticmethod(lambda context, gradient: gradient * math.inf)

    def broken(student, target):
        calls.append(1)
        value = pekd(student, target)
        return value if len(calls) < 3 else value * math.inf if where == "loss" else Bad.apply(value)

    monkeypatch.setattr(train, "pekd", broken)
    flags = ["--data", folder, "--teacher", str(teacher), "--iters", "9", "--out", str(tmp_path / "run"), *map(str, SMALL)]
    with pytest.raises(train.NotFinite, match=sentence):
        train.train(train.build_parser().parse_args(flags))
    assert len(log(tmp_path / "run")) == 2


def test_skipped_fp16_steps_are_counted_and_twenty_in_a_row_stop():
    skips, row = dict(skipped=0, skipped_in_a_row=0), lambda step, norm: (step, 0.1, torch.tensor([1.0, norm]))
    rows = train.read_losses([row(1, math.inf), row(2, 1.0), row(3, math.nan)], {"wce": 1.0}, "run", skips)
    assert skips == dict(skipped=2, skipped_in_a_row=1) and [float(r[-1]) for r in rows][:2] == [math.inf, 1]
    with pytest.raises(train.NotFinite, match="step 22: the gradient overflowed fp16 in 20 steps in a row"):
        train.read_losses([row(step, math.inf) for step in range(4, 30)], {"wce": 1.0}, "run", skips)
    with pytest.raises(train.NotFinite, match="step 5: the gradient is not finite"):
        train.read_losses([row(5, math.inf)], {"wce": 1.0}, "run", None)


def test_resume_finds_the_newest_run_refuses_another_experiment_and_may_grow(tmp_path, folder):
    command("train.py", "--data", folder, "--iters", 4, "--out", "runs/one", *SMALL, cwd=tmp_path)
    assert "--lr 0.1 differs from the resumed run's 0.0006" in command("train.py", "--resume", "--lr", 0.1, cwd=tmp_path, code=2)
    command("train.py", "--resume", "--iters", 6, cwd=tmp_path)
    assert [row["step"] for row in log(tmp_path / "runs" / "one")] == ["1", "2", "3", "4", "5", "6"]
    assert "already holds a run" in command("train.py", "--data", folder, "--out", "runs/one", *SMALL, cwd=tmp_path, code=2)
    assert "nothing to resume" in command("train.py", "--resume", "--out", "runs/two", cwd=tmp_path, code=2)


SHARED_STEP = """
import sys, torch
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
    """One step on this process's share of four images, in two pieces, with every distillation term -> (values, gradients)."""
    args = arguments("--teacher", "x", "--lambda-kl", 1, "--grad-clip", 0, "--accum", 2 if world > 1 else 1)
    torch.manual_seed(0)
    objective = train.Objective(segformer("b0", 4), Projections(SIZES["b0"]["dims"], SIZES["b1"]["dims"]), args, torch.tensor([0.5, 1, 2, 4])).eval()
    teacher, images, labels = segformer("b1", 4).eval(), torch.rand(4, 3, 32, 32), torch.randint(0, 4, (4, 32, 32))
    labels[0], labels[1, 8:] = IGNORE, IGNORE                     # the first process has few labelled pixels, the second all
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    parallel = train.DistributedDataParallel(objective) if world > 1 else objective
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.0)
    values = train.train_step(parallel, teacher, optimizer, torch.amp.GradScaler("cpu", enabled=False), images[mine], labels[mine], args,
                              lambda: torch.autocast("cpu", enabled=False))
    return values, [p.grad for p in objective.parameters()]


def test_two_processes_make_the_step_of_one(tmp_path):
    """Unequal void, --accum, every term: the same values and the same gradient as one process with the whole batch."""
    script = tmp_path / "step.py"
    script.write_text(SHARED_STEP.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(tmp_path / "two.pt")))
    command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script, env={"OMP_NUM_THREADS": "1"})
    values, gradient = torch.load(tmp_path / "two.pt")
    expected, whole = shared_step(0, 1)
    assert torch.allclose(values, expected, rtol=1e-4)
    total = torch.stack([b.norm() for b in whole]).norm()
    assert all((a - b).norm() <= 1e-3 * b.norm() + 1e-5 * total for a, b in zip(gradient, whole, strict=True))


def test_two_processes_train(tmp_path, folder):
    """The same samples and the same total batch; only dropout's draws and BatchNorm's batch differ."""
    flags = ["--data", folder, "--iters", "12", "--lr", "1e-4", "--crop", "32", "32", "--workers", "0", "--device", "cpu"]
    command("train.py", *flags, "--batch-size", 4, "--out", tmp_path / "one")
    command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / "train.py", *flags, "--batch-size", 2, "--out", tmp_path / "two",
            env={"OMP_NUM_THREADS": "1"})
    one, two = ([float(row["wce"]) for row in log(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == len(two) == 12 and one[0] == pytest.approx(two[0], rel=0.1) and np.mean(one) == pytest.approx(np.mean(two), rel=0.1)
    assert json.loads((tmp_path / "two" / "recipe.json").read_text())["total_batch"] == 4
    assert len(log(tmp_path / "two", "scores.csv")) == len(log(tmp_path / "one", "scores.csv"))


FAULT = """
import os, sys
sys.path.insert(0, {root!r})
import train
step = train.train_step

def faulty(*args):
    faulty.steps += 1
    if faulty.steps == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise train.UsageError("this machine is broken")
    return step(*args)

faulty.steps = 0
train.train_step = faulty
train.main()
"""


def test_a_fault_in_one_process_ends_all_and_a_restart_resumes(tmp_path, folder):
    script, env = tmp_path / "fault.py", {"OMP_NUM_THREADS": "1"}
    script.write_text(FAULT.format(root=str(ROOT)))
    flags = ["--data", folder, "--iters", "6", "--eval-every", "2", *map(str, SMALL)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    output = command(*torchrun, script, *flags, "--out", tmp_path / "ended", code=1, traceback=True, env=env)      # torchrun's own traceback
    assert "error: this machine is broken" in output              # and the other process ended too, long before gloo's half hour
    output = command(*torchrun, "--max-restarts", 1, script, *flags, "--out", tmp_path / "restarted", env=env)
    assert "resuming after step 2" in output
    command(*torchrun, ROOT / "train.py", *flags, "--out", tmp_path / "whole", env=env)
    assert same_runs(tmp_path / "whole", tmp_path / "restarted")


def test_bf16_and_fp16_train(tmp_path, folder):
    """Along the curve of full precision, within what 16 bits round away."""
    curves = {}
    for amp in ("off", "bf16", "fp16"):
        flags = [flag if flag != "off" else amp for flag in SMALL]
        command("train.py", "--data", folder, "--iters", 12, "--lr", 1e-4, "--out", tmp_path / amp, *flags)
        curves[amp] = [float(row["loss"]) for row in log(tmp_path / amp)]
    assert curves["bf16"] == pytest.approx(curves["off"], rel=0.1) and curves["fp16"] == pytest.approx(curves["off"], rel=0.03)
    assert len(set(map(tuple, curves.values()))) == 3             # and not simply full precision


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_trains_with_fp16_by_default(tmp_path, folder, teacher):
    command("train.py", "--data", folder, "--teacher", teacher, "--iters", 30, "--out", tmp_path / "gpu", "--crop", 64, 64, "--workers", 0)
    assert json.loads((tmp_path / "gpu" / "recipe.json").read_text())["amp"] == "fp16"
    assert float(log(tmp_path / "gpu")[-1]["loss"]) < float(log(tmp_path / "gpu")[0]["loss"])


def test_same_seed_same_run_other_seed_another(tmp_path, folder):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        command("train.py", "--data", folder, "--iters", 3, "--seed", seed, "--out", tmp_path / name, *SMALL)
    assert same_weights(tmp_path / "a", tmp_path / "b") and not same_weights(tmp_path / "a", tmp_path / "c")


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not in ../shared/camvid")
def test_real_camvid_trains(tmp_path):
    command("train.py", "--data", f"camvid:{CAMVID}", "--iters", 2, "--crop", 64, 64, "--batch-size", 1, "--eval-every", 5,
            "--workers", 2, "--out", tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "best.pth").input_size == (288, 384)


# ---------------------------------------------------------------- failing

def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_term(tmp_path, folder):
    output = command("train.py", "--data", folder, "--iters", 20, "--eval-every", 20, "--lr", 1e25, "--grad-clip", 0, "--warmup", 0,
                     "--out", tmp_path / "run", *SMALL, code=1)
    assert "wce is nan" in output and "step " in output


def test_destroyed_weights_do_not_replace_the_last_good_checkpoint(tmp_path, folder, monkeypatch):
    """The loss before a fatal step is finite: the run must notice on the network's output, before it saves."""
    out = tmp_path / "run"
    flags = ["--data", folder, "--iters", "4", "--eval-every", "2", "--out", str(out), *map(str, SMALL)]
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, *rest: 1e30 if step == 3 else rate(step, *rest))
    with pytest.raises(train.NotFinite, match="not finite"):
        train.train(train.build_parser().parse_args(flags))
    saved = torch.load(out / "last.pth", weights_only=True)
    assert saved["step"] == 2 and all(tensor.isfinite().all() for tensor in saved["model"].values())
    load_checkpoint(out / "best.pth")


def test_flags_that_change_nothing_are_said(capsys):
    arguments("--temperature", 4, "--lambda-dice", 0.3, "--folds", 5, "--augment", "plain", "--scale-range", 1, 2)
    said = capsys.readouterr().err
    assert all(f"note: --{flag} changes nothing" in said for flag in ("temperature", "lambda-dice", "folds", "scale-range"))
    arguments("--teacher", "x", "--lambda-kl", 1, "--temperature", 4, "--fold", 0, "--folds", 5)
    assert not capsys.readouterr().err


def test_broken_data_in_a_worker_is_a_sentence_and_leaves_the_checkpoint(tmp_path):
    spec, out = write_folder(tmp_path / "set", frames=4), tmp_path / "run"
    command("train.py", "--data", spec, "--iters", 2, "--out", out, *SMALL)
    before = (out / "last.pth").read_bytes()
    (tmp_path / "set" / "images" / "frame_1.png").write_bytes(b"no image")
    output = command("train.py", "--resume", "--out", out, "--iters", 30, "--workers", 1, code=2)
    assert "error: " + str(tmp_path / "set" / "images" / "frame_1.png") + ": not an image that can be read" in output
    assert (out / "last.pth").read_bytes() == before


@pytest.mark.parametrize("args, sentence", [
    (["--crop", "16", "64"], "16 is not at least 32"), (["--student", "b9"], "invalid choice"), (["--lambda-fd", "1"], "--lambda-fd needs a --teacher"),
    (["--lr", "-1"], "-1 is not above 0"), (["--lr", "nan"], "nan is not"), (["--warmup", "2"], "at most 1"), (["--frobnicate"], "unrecognized"),
    (["--scale-range", "2", "1"], "LO is larger"), (["--iters", "5", "--epochs", "2"], "give one"), (["--data", "camvid:/nowhere"], "no such folder"),
    (["--init", "{teacher}"], "is a SegFormer-B1: it cannot start a --student b0"),
    (["--init", "{teacher}", "--student", "b1", "--norm", "dyt"], "has the norms 'ln'"), (["--init", "/no/b0.pth"], "cannot open"),
    (["--teacher", "/no/b2.pth"], "cannot open checkpoint /no/b2.pth"), (["--teacher", "{teacher}"], "b1.pth has 3 classes, the data (toy) has 8"),
    (["--teacher", "{text}", "--data", "{folder}"], "classes.txt is not a checkpoint"), (["--device", "cuda:77"], "not to be had here"),
    (["--data", "{folder}", "--fold", "9"], "fold 9 of 2 does not exist"), (["--batch-size", "0"], "0 is not at least 1"), (["--amp", "maybe"], "invalid choice"),
    (["--data", "{folder}", "--out", "{text}"], "cannot make the folder")])
def test_mistakes_are_a_sentence_and_exit_code_2(args, sentence, tmp_path, folder, teacher):
    args = [arg.format(teacher=teacher, folder=folder, text=folder.split(":")[1] + "/classes.txt") for arg in args]
    output = command("train.py", *args, cwd=tmp_path, code=2)
    assert sentence in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_fifty_kills_at_random_moments(tmp_path, folder):
    """python -m pytest -m slow: SIGKILL 50 times, anywhere, while it starts, trains, evaluates or writes."""
    flags, rng, out, kills = ("--data", folder, *SMALL, "--iters", 400, "--eval-every", 3), np.random.default_rng(0), tmp_path / "cut", 0
    command("train.py", *flags, "--out", tmp_path / "whole")
    while kills < 50:
        process = start(*(("--resume", "--out", out) if (out / "last.pth").exists() else (*flags, "--out", out)))
        time.sleep(rng.uniform(2, 9))
        assert process.poll() in (None, 0), process.communicate()[0]
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        output = process.communicate()[0]
        assert "Traceback" not in output, output
        if process.returncode == 0:
            break
    command("train.py", "--resume", "--out", out)
    print(f"{kills} kills")
    assert same_runs(tmp_path / "whole", out)


@pytest.mark.slow
def test_memory_does_not_grow_over_2000_steps(tmp_path, folder):
    process = start("--data", folder, *SMALL, "--iters", 2000, "--eval-every", 100, "--out", tmp_path / "long")
    memory = []
    for step in range(200, 2000, 200):
        wait_for_step(process, tmp_path / "long", step)
        with open(f"/proc/{process.pid}/status") as file:
            memory.append(next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024)
    assert process.wait() == 0
    print("MiB after 200, 400 ... steps:", [round(m) for m in memory])
    assert memory[-1] < memory[1] + 20


# ---------------------------------------------------------------- --cache and --compile

def test_a_cache_changes_no_step_and_serves_the_next_run(tmp_path, folder, capsys):
    plain, first, second = (tmp_path / name for name in ("plain", "first", "second"))
    flags = ("--data", folder, "--iters", 3, *SMALL)
    command("train.py", *flags, "--out", plain)
    command("train.py", *flags, "--out", first, "--cache", tmp_path / "cache")
    command("train.py", *flags, "--out", second, "--cache", tmp_path / "cache", "--workers", 2)
    assert same_weights(plain, first) and same_weights(plain, second)
    assert len(list((tmp_path / "cache").glob("*.frame"))) == 6                   # train and val
    arguments("--cache", tmp_path / "cache")                      # toy scenes are drawn
    assert "note: --cache changes nothing" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert "no folder for decoded frames can be made there" in command("train.py", *flags, "--cache", tmp_path / "file", code=2, cwd=tmp_path)


TRACED = """
import functools, sys, torch, train
real = torch.compile
torch.compile = functools.partial(real, backend="eager")          # traced as ever, but without the C++ compiler's minutes
torch.nn.Module.compile = lambda self, **how: setattr(self, "_compiled_call_impl", torch.compile(self._call_impl, **how))
sys.argv = ["train.py", *sys.argv[1:]]
train.main()
"""


@pytest.mark.parametrize("how", ["traced", pytest.param("compiled", marks=pytest.mark.slow)])
def test_compile_has_the_same_loss_curve(tmp_path, folder, teacher, how):
    flags = ("--data", folder, "--teacher", teacher, "--lambda-kl", 1, "--iters", 4, *SMALL)
    command("train.py", *flags, "--out", tmp_path / "eager")
    start = ("-c", TRACED) if how == "traced" else ("train.py",)
    output = command(*start, *flags, "--compile", "--out", tmp_path / "compiled", env={"PYTHONPATH": str(ROOT)})
    assert "compiled, with the first step in" in output
    for eager, compiled in zip(log(tmp_path / "eager"), log(tmp_path / "compiled"), strict=True):
        assert [float(compiled[name]) for name in eager] == pytest.approx([float(value) for value in eager.values()], rel=1e-3)


def test_compile_without_a_compiler_is_a_sentence(tmp_path, folder):
    env = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    output = command("train.py", "--data", folder, "--iters", 1, *SMALL, "--compile", "--out", tmp_path / "run", code=2, env=env)
    assert "error: --compile failed" in output and "leave --compile out" in output


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
