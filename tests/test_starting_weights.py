"""A student from weights with other norms, and a teacher of other classes."""

import pytest
import torch
from test_train import SMALL, log, train_with

from conftest import command, write_folder
from extras.cli import UsageError
from extras.starting_weights import make_student, with_norms
from model import NORMS, DyT, load_checkpoint, save_checkpoint, segformer
from train import FLAGS


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


def test_all_but_the_replaced_norms_is_taken(capsys):
    torch.manual_seed(0)
    student = segformer("b0", 3, width=64)
    for parameter in student.parameters():                        # nothing is as it began
        torch.nn.init.normal_(parameter)
    for module in student.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-3
    result = with_norms(student, NORMS["dyt"], "x.pth")
    assert "its norms are 'ln', the student's 'dyt': 4 DyT start fresh" in capsys.readouterr().out

    theirs = student.state_dict()
    for name, module in result.named_modules():
        if isinstance(module, DyT):
            assert name.endswith("patch_embed.norm")
            assert module.alpha == 0.5 and (module.weight == 1).all() and (module.bias == 0).all()
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-3
    for name, tensor in result.state_dict().items():
        if ".patch_embed.norm." not in name:
            assert torch.equal(tensor, theirs[name])


def test_every_norm_may_become_every_other(tmp_path, capsys):
    for before in NORMS.values():
        for after in NORMS.values():
            result = with_norms(segformer("b0", 3, before), after, "x.pth")
            save_checkpoint(result, tmp_path / "x.pth")
            assert load_checkpoint(tmp_path / "x.pth").norm_fn is after
    with_norms(segformer("b0", 3), NORMS["dyt-dyl"], "x.pth")
    assert "4 DyT and 26 DyL start fresh" in capsys.readouterr().out


def test_init_with_another_norm_trains_and_resumes(tmp_path, folder):
    save_checkpoint(segformer("b0", 3), tmp_path / "ln.pth")
    out = tmp_path / "run"
    flags = ("--data", folder, *SMALL, "--norm", "dyt", "--iters", 2)
    output = command("train.py", *flags, "--init", tmp_path / "ln.pth", "--out", out)
    assert "4 DyT start fresh, all else is taken" in output
    assert load_checkpoint(out / "last.pth").norm_fn is NORMS["dyt"]
    command("train.py", "--resume", "--out", out, "--iters", 3)
    assert len(log(out)) == 3


# ---------------------------------------------------------------- a teacher of other classes

def test_a_start_that_has_seen_the_held_out_frames_is_said(tmp_path, capsys):
    network = segformer("b0", 8)
    network.trained_on = {"data": "toy", "fold": 1, "folds": 2, "fold_by": None}
    save_checkpoint(network, tmp_path / "start.pth")
    for fold, is_said in ((0, True), (1, False)):
        args = FLAGS.parse(["--init", str(tmp_path / "start.pth"), "--fold", str(fold)])[0]
        make_student(args, [f"class {i}" for i in range(8)], None)
        assert ("it has seen frames that it is scored on" in capsys.readouterr().err) == is_said


def test_a_teacher_of_other_classes_teaches_features(tmp_path, folder):
    teacher = tmp_path / "ade.pth"
    network = segformer("b1", 150)
    network.classes = [f"thing {i}" for i in range(150)]
    save_checkpoint(network, teacher)
    out = tmp_path / "run"
    flags = ("--data", folder, *SMALL, "--iters", 1, "--teacher", teacher)
    output = command("train.py", *flags, "--out", out)
    assert "ade.pth: 150 classes of its own; it teaches features, and no score of it" in output
    assert "teacher b1" not in output                             # no column in the table
    assert list(log(out)[0]) == ["step", "lr", "loss", "wce", "fd", "pe", "grad_norm"]
    command("train.py", "--resume", "--out", out, "--iters", 2)
    result = train_with(*flags, "--out", tmp_path / "again")
    assert result.teacher_scores is None


@pytest.mark.parametrize("term", ["kl", "cwd", "dist", "zkl"])
def test_its_logits_cannot_teach(term, tmp_path, folder):
    teacher = tmp_path / "ade.pth"
    save_checkpoint(segformer("b0", 150), teacher)
    with pytest.raises(UsageError, match="ade.pth has 150 classes, the data"):
        train_with("--data", folder, *SMALL, "--teacher", teacher, f"--lambda-{term}", 1)
