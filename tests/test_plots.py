"""The figures, from eval.py and from the runs' logs."""

from PIL import Image

from conftest import command
from extras.plots import checkpoint_names, run_names


def write_run(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.csv").write_text("step,lr,loss,wce\n1,0.1,2.0,2.0\n2,0.1,1.0,1.0\n")
    return folder


def test_eval_draws_the_figures(folder, checkpoint, tmp_path):
    write_run(checkpoint.parent)
    output = command("eval.py", checkpoint, "--data", folder, "--plot", tmp_path / "figures")
    assert "miou.png: no scores.csv in" in output
    written = sorted(p.name for p in (tmp_path / "figures").iterdir())
    assert written == ["confusion_1.png", "loss.png", "radar.png"]
    assert all(Image.open(p).width > 500 for p in (tmp_path / "figures").iterdir())


def test_runs_are_drawn_from_their_logs(tmp_path):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two")
    (two / "scores.csv").write_text("step,miou\n1,0.25\n2,0.5\n")
    out = tmp_path / "figures"
    output = command("-m", "extras.plots", one, two, "--out", out)
    assert f"miou.png: no scores.csv in {one}" in output and str(out / "loss.png") in output
    assert sorted(p.name for p in out.iterdir()) == ["loss.png", "miou.png"]
    assert all(Image.open(p).width > 500 for p in out.iterdir())


def test_a_plot_of_nothing_is_a_sentence(tmp_path):
    out = tmp_path / "figures"
    (tmp_path / "empty").mkdir()
    assert "usage: python -m extras.plots" in command("-m", "extras.plots", code=2)
    output = command("-m", "extras.plots", tmp_path / "empty", "--out", out, code=2)
    assert "none of these folders holds" in output
    output = command("-m", "extras.plots", tmp_path / "no", "--out", out, code=2)
    assert "there is no such folder" in output


def test_absent_matplotlib_is_a_sentence(folder, checkpoint, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    output = command("eval.py", checkpoint, "--data", folder, "--plot", tmp_path / "f", code=2,
                     env={"PYTHONPATH": str(tmp_path)})
    assert "pip install matplotlib" in output


def test_names_tell_checkpoints_and_runs_apart():
    assert checkpoint_names(["r/a/best.pth", "r/b/best.pth"]) == ["a", "b"]
    assert checkpoint_names(["r/a/best.pth", "r/a/last.pth"]) == ["a/best", "a/last"]
    assert checkpoint_names(["r/a/x.pth", "s/a/x.pth"]) == ["r/a/x.pth", "s/a/x.pth"]
    assert run_names(["r/a", "r/b"]) == ["a", "b"]
    assert run_names(["x/0", "y/0"]) == ["x/0", "y/0"]
