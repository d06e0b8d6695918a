"""Files that commands write: whole or not at all, in place of nothing but a file, never through a
link; and what is printed of a stranger's text.
"""

import argparse
import os
import resource

import pytest
from PIL import Image

from conftest import ROOT, command
from extras.cli import UsageError, report, sentence_of
from extras.exported_model import export
from extras.hugging_face import write_folder
from extras.outputs import output_file, output_path, picture_path, save_picture, write_text
from extras.printable import is_plain_text, printable
from model import CheckpointError, save_checkpoint, segformer, write_atomically

# ---------------------------------------------------------------- what may be replaced


@pytest.fixture
def device(tmp_path):
    """A device that takes what is written: where one cannot be made (no root), a pipe."""
    path = tmp_path / "device"
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 3))        # as /dev/null
    except PermissionError:
        os.mkfifo(path)
    return path


def test_devices_pipes_and_folders_are_not_replaced(device, tmp_path):
    kind = os.stat(device).st_mode
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("device", "pipe", "folder"):
        path = tmp_path / name
        with pytest.raises(OSError, match="not a regular file"), write_atomically(path):
            pass
        with pytest.raises(UsageError, match=f"cannot write .*{name}: not a regular file"):
            write_text(path, "x")
        with pytest.raises(CheckpointError, match=f"cannot write .*{name}: not a regular file"):
            save_checkpoint(segformer("b0", 2), path)
    assert os.stat(device).st_mode == kind and len(list(tmp_path.iterdir())) == 3


def test_links_are_replaced_not_followed(tmp_path):
    """At the path, and at the name that it has while it is written."""
    other = tmp_path / "other"
    other.write_text("precious")
    for name in ("x.txt", "x.txt.partial"):
        (tmp_path / name).symlink_to(other)
    write_text(tmp_path / "x.txt", "mine")
    assert other.read_text() == "precious" and (tmp_path / "x.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "x.txt"]
    (tmp_path / "y.txt").symlink_to(tmp_path / "nowhere")         # one that leads nowhere
    write_text(tmp_path / "y.txt", "mine")
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "y.txt").is_symlink()


def test_what_a_killed_process_left_is_written_over(tmp_path):
    (tmp_path / "x.txt.partial").write_text("half")
    write_text(tmp_path / "x.txt", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


@pytest.fixture
def little_room():
    """No file may grow beyond 1000 bytes: a disk that is full, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_sentence_and_leaves_what_was_there(little_room, tmp_path):
    text = tmp_path / "x.json"
    text.write_text("before")
    picture = tmp_path / "x.png"
    with pytest.raises(UsageError, match="cannot write .*x.json: File too large"):
        write_text(text, "x" * 5000)
    with pytest.raises(UsageError, match="cannot write .*x.png: File too large"):
        save_picture(Image.effect_noise((200, 200), 90), picture)
    with pytest.raises(CheckpointError, match="cannot write .*x.pth: .*untouched"):
        save_checkpoint(segformer("b0", 2), tmp_path / "x.pth")
    assert text.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_error_of_the_caller_goes_on(tmp_path):
    with pytest.raises(KeyError), output_file(tmp_path / "x"):
        raise KeyError("x")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- pictures

@pytest.mark.parametrize("name, kind", [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP")])
def test_pictures_get_the_format_of_their_suffix(name, kind, tmp_path):
    save_picture(Image.new("RGB", (20, 10)), tmp_path / name)
    assert Image.open(tmp_path / name).format == kind


def test_pictures_that_cannot_be_written(tmp_path):
    for name in ("x", "x.xyz", "x.txt"):
        with pytest.raises(UsageError, match=f"{name}: its suffix is no picture's"):
            save_picture(Image.new("RGB", (20, 10)), tmp_path / name)
        with pytest.raises(argparse.ArgumentTypeError, match=f"{name}: its suffix is no picture's"):
            picture_path(str(tmp_path / name))
    with pytest.raises(UsageError, match="cannot write .*tall.jpg"):
        save_picture(Image.new("L", (1, 70_000)), tmp_path / "tall.jpg")      # JPEG: 65,535
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_is_known_from_the_flag(device, tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="there is no folder /no/such"):
        output_path("/no/such/x.json")
    with pytest.raises(argparse.ArgumentTypeError, match="not a regular file"):
        output_path(str(device))
    assert output_path("x.json") == "x.json"
    assert output_path(str(tmp_path / "x.json")) == str(tmp_path / "x.json")


# ---------------------------------------------------------------- the commands' flags

FLAGS = [
    ("eval.py", "{net}", "--json", "{device}"),
    ("eval.py", "{net}", "--picture", "{device}"),
    ("eval.py", "{net}", "--picture", "{device}.png"),
    ("eval.py", "{net}", "--strip", "x"),
    ("eval.py", "{net}", "--strip", "x.xyz"),
    ("eval.py", "{net}", "--overlay", "{device}"),
    ("eval.py", "{net}", "--plot", "{device}"),
    ("bench.py", "--json", "{device}"),
    ("data.py", "--sheet", "{device}"),
    ("-m", "examples.distill", "--out", "{device}"),
]


@pytest.mark.parametrize("words", FLAGS, ids=" ".join)
def test_no_command_writes_to_a_device(words, device, checkpoint, folder, tmp_path):
    kind = os.stat(device).st_mode
    named_as_picture = tmp_path / "device.png"
    os.mkfifo(named_as_picture)
    args = [word.format(net=checkpoint, device=device) for word in words]
    if words[0] == "eval.py":
        args += ["--data", folder]
    output = command(*args, code=2)
    assert "error: " in output and args[args.index(words[-1].format(device=device))] in output
    assert os.stat(device).st_mode == kind and os.path.exists(named_as_picture)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx", ".pth"])
def test_exports_do_not_replace_a_pipe(suffix, checkpoint, tmp_path):
    path = tmp_path / f"x{suffix}"
    os.mkfifo(path)
    output = command("-m", "extras.export", checkpoint, path, code=2)
    assert f"x{suffix}: not a regular file" in output and path.is_fifo()


@pytest.mark.parametrize("name", ["x.pt2", "x.onnx", "folder"])
def test_exports_to_a_full_disk_are_a_sentence(name, little_room, tmp_path):
    """`little_room` is a disk that is full, without one."""
    target = tmp_path / name
    write = write_folder if name == "folder" else export
    with pytest.raises(UsageError, match=f"cannot write .*{name}: "):
        write(segformer("b0", 2), target)
    assert not list(tmp_path.iterdir())


def test_half_an_installation_of_onnx_is_a_sentence(checkpoint, tmp_path):
    (tmp_path / "onnx.py").write_text("raise AttributeError('no protobuf')")
    output = command("-m", "extras.export", checkpoint, tmp_path / "x.onnx", code=2,
                     cwd=ROOT, env={"PYTHONPATH": str(tmp_path)})
    assert "the package onnx, which is there but broken (no protobuf)" in output


def test_pictures_of_eval_are_not_written_through_links(checkpoint, folder, tmp_path):
    other = tmp_path / "other"
    other.write_text("precious")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("frame_5.png", "frame_5.png.partial"):           # val has this frame
        (pictures / name).symlink_to(other)
    for name in ("x.json", "x.png", "x.png.partial", "strip.png"):
        (tmp_path / name).symlink_to(other)
    flags = ("--overlay", pictures, "--json", tmp_path / "x.json", "--picture", tmp_path / "x.png",
             "--strip", tmp_path / "strip.png")
    command("eval.py", checkpoint, "--data", folder, *flags)
    assert other.read_text() == "precious"
    for path in (pictures / "frame_5.png", tmp_path / "x.json", tmp_path / "x.png"):
        assert path.is_file() and not path.is_symlink()


# ---------------------------------------------------------------- what is printed

def test_a_strangers_text_is_one_short_line():
    assert printable("Straße 道路 a\u00a0b\u200cc") == "Straße 道路 a\u00a0b\u200cc"
    assert printable("a\x1b[31m\r\n\x9b\u2028\u202e\udcff\0") == (
        r"a\x1b[31m\r\n\x9b\u2028\u202e\udcff\x00")
    long = printable("start" + "x" * 5_000_000 + "end")
    assert len(long) < 110 and long.startswith("start") and long.endswith("xend")
    assert printable(None) == "None" and printable(7) == "7"
    assert is_plain_text("Straße", 6) and not is_plain_text("Straße", 5)
    assert not is_plain_text("a\nb", 9)


def test_an_error_cannot_forge_a_second_one(capsys):
    for error in (UsageError("x\nerror: y \x1b[2J"), OSError(2, "no file", "x\nerror: y"),
                  CheckpointError("z" * 5_000_000)):
        assert report(error) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and "\x1b" not in printed and len(printed) < 2100


def test_a_workers_error_is_its_last_message():
    """As torch's loader raises it, with a name that has a line break."""
    text = ("Caught DatasetError in DataLoader worker process 0.\nOriginal Traceback (most recent "
            "call last):\n  File ...\ndata.DatasetError: a\nb.png: not an image\n")
    assert sentence_of(UsageError(text)) == r"a\nb.png: not an image"
