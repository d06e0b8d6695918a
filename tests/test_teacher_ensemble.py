"""Several teachers as one: train.py --second-teacher, --flip-teacher."""

import shutil

import pytest
import torch
from test_levers import STOPPED
from test_train import SMALL, column, same_runs, train_with

import train
from conftest import command, write_folder
from extras.cli import UsageError
from extras.teacher_ensemble import TeacherEnsemble
from losses import kl_distillation
from model import save_checkpoint, segformer
from test_model import randomise

KL = ("--lambda-fd", 0, "--lambda-pe", 0, "--lambda-kl", 1)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


def write_teacher(path, variant, seed, classes=3):
    torch.manual_seed(seed)
    save_checkpoint(randomise(segformer(variant, classes)), path)
    return path


@pytest.fixture
def teachers(tmp_path):
    return write_teacher(tmp_path / "b1.pth", "b1", 1), write_teacher(tmp_path / "b0.pth", "b0", 2)


@pytest.mark.parametrize("flip", (False, True))
@torch.no_grad()
def test_the_mean_of_probabilities_against_a_plain_loop(flip):
    torch.manual_seed(0)
    networks = [randomise(segformer("b0", 3)).eval() for _ in range(2)]
    images = torch.rand(2, 3, 32, 64)
    logits = TeacherEnsemble(networks, flip).fold()(images)
    expected = torch.zeros(2, 3, 8, 16)
    views = 0
    for network in networks:
        expected += network(images).softmax(1)
        views += 1
        if flip:
            said_of_mirrored = network(images.flip(3)).softmax(1)
            for column_of_pixels in range(16):
                expected[..., column_of_pixels] += said_of_mirrored[..., 15 - column_of_pixels]
            views += 1
    assert torch.allclose(logits.softmax(1), expected / views, atol=1e-5)
    assert torch.allclose(logits.exp().sum(1), torch.ones(2, 8, 16), atol=1e-5)


@torch.no_grad()
def test_one_teacher_alone_teaches_as_without_an_ensemble():
    torch.manual_seed(0)
    network = randomise(segformer("b0", 3)).eval()
    images = torch.rand(1, 3, 32, 32)
    student = torch.randn(1, 3, 8, 8)
    alone = kl_distillation(student, network(images), 2.0)
    as_ensemble = kl_distillation(student, TeacherEnsemble([network])(images), 2.0)
    assert as_ensemble.item() == pytest.approx(alone.item(), rel=1e-4)


def test_a_class_that_is_sure_never_makes_the_loss_infinite():
    network = torch.nn.Module()
    network.forward = lambda images: torch.tensor([[[[300.0]], [[-300.0]]]])
    for name in ("variant", "num_classes", "classes", "palette", "input_size"):
        setattr(network, name, None)
    logits = TeacherEnsemble([network])(torch.rand(1, 3, 4, 4))
    student = torch.zeros(1, 2, 1, 1, requires_grad=True)
    loss = kl_distillation(student, logits, 4.0)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_two_teachers_and_their_mirror_images_teach_and_the_run_resumes(tmp_path, folder, teachers,
                                                                        capsys):
    first, second = teachers
    flags = ("--data", folder, *SMALL, "--iters", 4, "--eval-every", 2, *KL, "--teacher", first,
             "--second-teacher", second, "--flip-teacher")
    train_with(*flags, "--out", tmp_path / "whole")
    assert f"{first} and {second}, with mirror images: mIoU" in capsys.readouterr().out

    # What the first step was taught, once more
    args, given = train.FLAGS.parse([str(flag) for flag in (*flags, "--out", tmp_path / "again")])
    run = train.prepare(args, given, train.RunLock())
    assert [teacher.variant for teacher in run.teacher.teachers] == ["b1", "b0"]
    run.objective.train()
    train.seed_step(0, 0)
    images, labels = train.next_batch(run)
    target = run.objective.ask_teacher(run.teacher, images)
    student = run.student.features(images).logits
    expected = kl_distillation(student, run.teacher(images), 1.0, labels).item()
    assert target.stages is None
    assert column(tmp_path / "whole", "kl")[0] == pytest.approx(expected, rel=1e-4)

    # Stopped in the middle, with the second teacher moved meanwhile
    parts = tmp_path / "parts"
    assert "after step 3, all of it saved" in command("-c", STOPPED, *flags, "--out", parts)
    moved = tmp_path / "moved.pth"
    shutil.move(second, moved)
    resume = ("--resume", "--out", parts)
    with pytest.raises(UsageError, match="second teacher is not at .*add --second-teacher FILE"):
        train_with(*resume)
    write_teacher(second, "b0", 3)
    with pytest.raises(UsageError, match="is not the teacher that .* was begun with"):
        train_with(*resume)
    train_with(*resume, "--second-teacher", moved)
    assert same_runs(tmp_path / "whole", parts)


@pytest.mark.parametrize("flags, said", [
    (("--flip-teacher",), "--flip-teacher needs a --teacher"),
    (("--second-teacher", "SECOND", "--teacher", "FIRST"),
     "--second-teacher has no features, which --lambda-fd compares: add --lambda-fd 0"),
    (("--flip-teacher", "--teacher", "FIRST", "--lambda-fd", 0, "--lambda-pe", 0),
     "--flip-teacher needs a loss on logits, such as --lambda-kl 1"),
    (("--second-teacher", "OTHER", "--teacher", "FIRST", *KL), "other.pth has 5 classes"),
    (("--flip-teacher", "--teacher", "FIRST", *KL, "--lambda-cwd", 1),
     "--flip-teacher has the logarithms of probabilities for logits"),
])
def test_what_does_not_go_together_is_a_sentence(flags, said, tmp_path, folder, teachers):
    paths = dict(zip(("FIRST", "SECOND"), teachers, strict=True))
    paths["OTHER"] = write_teacher(tmp_path / "other.pth", "b0", 4, classes=5)
    flags = [paths.get(flag, flag) for flag in flags]
    with pytest.raises(UsageError, match=said):
        train_with("--data", folder, *SMALL, "--iters", 1, "--out", tmp_path / "run", *flags)
