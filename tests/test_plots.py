"""The figures, from eval.py and from the runs' logs."""

import pytest
from PIL import Image

from conftest import command
from extras.cli import UsageError
from extras.plots import checkpoint_names, plot_confusion, plot_radar, read_columns, run_names


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


BROKEN_LOGS = {
    "not UTF-8": b"step,loss\n1,\xff\n",
    "a word": b"step,loss\n1,much\n",
    "a short row": b"step,loss\n1\n",
    "a superscript": "step,loss\n\u00b2,1.0\n".encode(),
    "a large field": b"step,loss\n1," + b"9" * 200_000 + b"\n",
    "no columns": b"1,2\n3,4\n",
    "zero bytes": b"\0\n\0\n",
}


@pytest.mark.parametrize("what", BROKEN_LOGS)
def test_a_broken_log_is_a_sentence(what, tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(BROKEN_LOGS[what])
    with pytest.raises(UsageError, match="log.csv: (damaged|it has no column)"):
        read_columns(path, ("step", "loss"))


def test_eval_beside_a_broken_log_is_a_sentence(folder, checkpoint, tmp_path):
    (checkpoint.parent / "log.csv").write_bytes(BROKEN_LOGS["not UTF-8"])
    output = command("eval.py", checkpoint, "--data", folder, "--plot", tmp_path / "f", code=2)
    assert "log.csv: damaged" in output and "mIoU" in output      # the scores are there


def test_names_with_dollars_are_drawn_as_they_are(tmp_path):
    result = {"iou": [0.5, 0.4, 0.3], "miou": 0.4, "confusion": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}
    classes = ["$a", "$b$", "\\frac{"]
    plot_radar(["$x_"], [result], classes, tmp_path / "radar.png")
    plot_confusion("$x_", result, classes, tmp_path / "confusion.png")
    assert (tmp_path / "radar.png").exists() and (tmp_path / "confusion.png").exists()


def test_figures_are_not_written_through_links(tmp_path):
    (tmp_path / "other").write_text("precious")
    (tmp_path / "figures").mkdir()
    for name in ("loss.png", "loss.png.partial"):
        (tmp_path / "figures" / name).symlink_to(tmp_path / "other")
    command("-m", "extras.plots", write_run(tmp_path / "one"), "--out", tmp_path / "figures")
    assert (tmp_path / "other").read_text() == "precious"


def test_absent_matplotlib_is_a_sentence(folder, checkpoint, tmp_path):
    absent = "raise ModuleNotFoundError(name='matplotlib')"
    (tmp_path / "matplotlib.py").write_text(absent)
    output = command("eval.py", checkpoint, "--data", folder, "--plot", tmp_path / "f", code=2,
                     env={"PYTHONPATH": str(tmp_path)})
    assert "pip install matplotlib" in output


def test_names_tell_checkpoints_and_runs_apart():
    assert checkpoint_names(["r/a/best.pth", "r/b/best.pth"]) == ["a", "b"]
    assert checkpoint_names(["r/a/best.pth", "r/a/last.pth"]) == ["a/best", "a/last"]
    assert checkpoint_names(["r/a/x.pth", "s/a/x.pth"]) == ["r/a/x.pth", "s/a/x.pth"]
    assert run_names(["r/a", "r/b"]) == ["a", "b"]
    assert run_names(["x/0", "y/0"]) == ["x/0", "y/0"]
