"""Data sets that wish us ill: each is refused in a sentence that names the file, or read rightly;
none is waited for, run, or taken for something else.
"""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import data
from conftest import ROOT, command, write_folder
from data import DatasetError, open_dataset, read_picture
from extras.jpeg_ends import lacks_its_end
from small_datasets import save, write_camvid

pytestmark = pytest.mark.usefixtures("patience")
GREY = (128, 128, 128)                                            # what libjpeg paints for nothing


def refuse(spec, sentence, split="train", **options):
    """Opening the data set, or its quick check, must raise DatasetError with `sentence`."""
    with pytest.raises(DatasetError, match=sentence) as caught:
        open_dataset(spec, split).quick_check(**options)
    return str(caught.value)


# ---------------------------------------------------------------- formats

EPS = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 48 40
%%EndComments
(ran) (w) file closefile
showpage
"""


def test_no_program_is_run_to_read_a_picture(folder, tmp_path, monkeypatch):
    """Pillow starts Ghostscript, `gs`, on an EPS file, whatever its name is."""
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    photo = tmp_path / "set" / "images" / "frame_0.png"
    photo.write_text(EPS)
    refuse(folder, "frame_0.png: not an image")
    for upright in (False, True):
        with pytest.raises(DatasetError, match="frame_0.png: not an image"):
            read_picture(photo, upright=upright)
    assert not (tmp_path / "ran").exists()


def test_few_places_open_pictures_and_each_says_what_as():
    """data.open_picture; what it has let pass, and what comes as bytes or as an animation."""
    found = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py"), *ROOT.glob("examples/*.py")]:
        for line in path.read_text().splitlines():
            if "Image.open(" in line:
                assert "formats=" in line, (path, line)
                found.add(path.name)
    assert found == {"data.py", "jpeg_ends.py", "demo.py", "video.py"}


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tiff"])
def test_photos_come_in_more_formats_than_frames(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (48, 40), (200, 30, 60)).save(path)
    assert read_picture(path, upright=True).shape == (40, 48, 3)
    with pytest.raises(DatasetError, match="not an image"):
        read_picture(path)


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_pipe_is_not_waited_for(kind, folder, tmp_path):
    path = tmp_path / "set" / f"{kind}s" / "frame_0.png"
    path.unlink()
    os.mkfifo(path)
    refuse(folder, "frame_0.png: not an image that can be read .a folder, a pipe or a device")
    with pytest.raises(DatasetError, match="a pipe"):
        open_dataset(folder, "train")[0]


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing"])
def test_a_list_that_is_no_file_is_not_passed_over(kind, name, folder, tmp_path):
    """It was taken for not there, and the frames were split by their order."""
    path = tmp_path / "set" / f"{name}.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    refuse(folder, f"{name}.txt: there is no such file, or it is not one", name)


def test_a_picture_beyond_all_memory_is_not_read(tmp_path):
    """Behind a JPEG whose end is missing lies a terabyte of nothing: sparse, it takes no room."""
    spec = write_camvid(tmp_path / "set", suffix=".jpg")
    path = tmp_path / "set" / "train" / "A_002.jpg"
    path.write_bytes(as_jpeg(scene((48, 36)), progressive=True)[:-2])
    with open(path, "r+b") as file:
        file.truncate(2 ** 40)
    refuse(spec, "A_002.jpg: not an image")


# ---------------------------------------------------------------- labels

def write_grey_png(path, ids, bits):
    """A grey PNG of `bits` a pixel, which Pillow does not write: by hand. ids: (H, W)"""
    import struct
    import zlib

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    rows = b""
    for row in ids:
        all_bits = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits:]
        rows += b"\0" + np.packbits(all_bits.ravel()).tobytes()
    head = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits", [2, 4])
def test_labels_of_fewer_than_8_bits_are_not_stretched(bits, tmp_path):
    """2 bits: the ids 0 and 3 were read as 0 and 255, so that class 3 was void."""
    spec = write_folder(tmp_path / "set", classes=4)
    ids = np.zeros((40, 48), np.uint8)
    ids[:, 24:] = 3
    write_grey_png(tmp_path / "set" / "labels" / "frame_1.png", ids, bits)
    refuse(spec, "frame_1.png: a label must have 8 bits per pixel")
    with pytest.raises(DatasetError, match="8 bits per pixel"):
        open_dataset(spec, "train")[1]
    write_grey_png(tmp_path / "set" / "labels" / "frame_1.png", ids, 8)
    assert (open_dataset(spec, "train")[1][1].numpy() == ids).all()


def test_a_palette_of_few_colours_keeps_its_ids(tmp_path):
    """Pillow packs these into 2 bits too, and there an id is an id."""
    spec = write_folder(tmp_path / "set", classes=4)
    ids = np.zeros((40, 48), np.uint8)
    ids[:, 24:] = 3
    label = Image.fromarray(ids).convert("P")
    label.putpalette(list(range(12)))
    path = tmp_path / "set" / "labels" / "frame_1.png"
    label.save(path, bits=2)
    assert path.read_bytes()[24] == 2                             # the depth in its head
    assert (open_dataset(spec, "train")[1][1].numpy() == ids).all()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_label_is_known_before_training(split, folder, tmp_path):
    for path in open_dataset(folder, split).paths:
        save(path[1], np.full((40, 48), 255, np.uint8))
    refuse(folder, "no pixel of its label.*all are void", split)
    output = command("train.py", "--data", folder, "--iters", 2, "--crop", 32, 32, "--out",
                     tmp_path / "out", code=2)
    assert "all are void" in output and not (tmp_path / "out").exists()
    output = command("data.py", folder, "--sheet", tmp_path / "sheet.png", code=2)
    assert f"no label of the {split} split has a class" in output


# ---------------------------------------------------------------- JPEG files that were cut

def as_jpeg(picture, **options):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def scene(size=(200, 152)):
    """A picture with something in every block."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3))
    return Image.fromarray(noise.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


KINDS = {"plain": {}, "full colour": {"subsampling": 0}, "restarts": {"restart_marker_blocks": 5},
         "progressive": {"progressive": True}, "optimised": {"optimize": True}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_was_cut_is_told_from_a_whole_one(kind, mode, tmp_path):
    path = tmp_path / "x.jpg"
    content = as_jpeg(scene().convert(mode), **KINDS[kind])
    filled = content[:-2] + b"\xff\xff\xff\xd9"                    # allowed before a marker
    for whole in (content, filled, content + b"more behind its end"):
        path.write_bytes(whole)
        assert not lacks_its_end(path) and not lacks_its_end(path, thorough=True)
    for share in (0.4, 0.6, 0.8, 0.9, 0.97):
        path.write_bytes(content[:int(share * len(content))] + b"\xff\xd9")
        assert lacks_its_end(path, thorough=True)
        # A progressive one that lacks a part of its last scan is left to the thorough look.
        assert lacks_its_end(path) or (kind == "progressive" and share > 0.4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_jpeg_may_end_grey(kind, tmp_path):
    """A frame that was padded with the very grey that libjpeg paints for what is missing."""
    padded = Image.new("RGB", (256, 256), GREY)
    padded.paste(scene())
    path = tmp_path / "x.jpg"
    path.write_bytes(as_jpeg(padded, **KINDS[kind]))
    assert not lacks_its_end(path) and not lacks_its_end(path, thorough=True)
    assert (read_picture(path)[-1, -1] == GREY).all()


def test_a_jpeg_frame_without_its_middle_is_refused(tmp_path):
    spec = write_camvid(tmp_path / "set", suffix=".jpg")
    path = tmp_path / "set" / "train" / "A_002.jpg"
    content = as_jpeg(scene((48, 36)))
    for damaged in (content[:len(content) // 2] + b"\xff\xd9",
                    content[:len(content) // 2] + content[len(content) * 2 // 3:]):
        path.write_bytes(damaged)
        refuse(spec, "A_002.jpg: not an image that can be read")
        with pytest.raises(DatasetError, match="A_002.jpg: not an image"):
            open_dataset(spec, "train")[1]
    output = command("data.py", spec, "--sheet", tmp_path / "sheet.png", code=2)
    assert output.count("A_002.jpg: not an image that can be read") == 1
    path.write_bytes(content)
    open_dataset(spec, "train").quick_check()


def test_a_photo_in_memory_is_looked_at_too():
    """As the demo's page sends it."""
    content = as_jpeg(scene())
    assert read_picture(io.BytesIO(content), upright=True).shape == (152, 200, 3)
    with pytest.raises(DatasetError, match="a part of it is missing"):
        read_picture(io.BytesIO(content[:len(content) // 2] + b"\xff\xd9"), upright=True)


def test_the_check_of_a_data_set_looks_thoroughly(tmp_path):
    spec = write_camvid(tmp_path / "set", suffix=".jpg")
    content = as_jpeg(scene((48, 36)), progressive=True)
    (tmp_path / "set" / "train" / "A_002.jpg").write_bytes(content[:-20] + b"\xff\xd9")
    output = command("data.py", spec, "--sheet", tmp_path / "sheet.png", code=2)
    assert "A_002.jpg: not an image that can be read (a part of it is missing" in output


def test_damaged_pictures_are_read_or_refused():
    """A few of the thousands that `python tests/fuzz_pictures.py` tries."""
    output = command(ROOT / "tests" / "fuzz_pictures.py", "--count", 20)
    assert output.count("20 files") == 10 and output.count("refused") >= 10


# ---------------------------------------------------------------- sizes

def test_a_frame_too_small_for_the_network_is_named_before_training(folder, tmp_path):
    """The last of val: it was found at the first validation, without its name."""
    image, label = open_dataset(folder, "val").paths[-1]
    save(image, np.zeros((20, 48, 3), np.uint8))
    save(label, np.zeros((20, 48), np.uint8))
    sentence = f"{image}: 48x20 pixels, the network needs 32x32 at least"
    assert refuse(folder, "48x20", "val", smallest=32) == sentence
    flags = ("--data", folder, "--iters", 2, "--crop", 32, 32, "--batch-size", 1, "--workers", 0)
    output = command("train.py", *flags, "--out", tmp_path / "out", code=2)
    assert sentence in output and not (tmp_path / "out").exists()
    # The network sees it at the crop's size here:
    command("train.py", *flags, "--out", tmp_path / "out", "--augment", "plain")


def test_a_frame_too_small_is_named_before_scoring(folder, checkpoint):
    image, label = open_dataset(folder, "val").paths[-1]
    save(image, np.zeros((20, 48, 3), np.uint8))
    save(label, np.zeros((20, 48), np.uint8))
    output = command("eval.py", checkpoint, "--data", folder, code=2)
    assert f"{image}: 48x20 pixels" in output
    command("eval.py", checkpoint, "--data", folder, "--size", 40, 48)


# ---------------------------------------------------------------- lists and names

def write_lists(root, **lists):
    for name, stems in lists.items():
        (root / f"{name}.txt").write_text("\n".join(stems))


def test_no_frame_is_trained_and_scored_on(folder, tmp_path):
    root = tmp_path / "set"
    write_lists(root, train=["frame_0", "frame_1"], val=["frame_2", "frame_1"])
    for split in ("train", "val"):
        refuse(folder, "val.txt: it names 'frame_1', and so does train.txt", split)
    write_lists(root, val=["frame_2"], test=["frame_2"])          # val may be the test split too
    for split in ("train", "val", "test"):
        open_dataset(folder, split).quick_check()
    write_lists(root, test=["frame_0"])
    refuse(folder, "test.txt: it names 'frame_0', and so does train.txt")


def test_names_with_effects_are_refused_or_printed_as_codes(folder, tmp_path):
    root = tmp_path / "set"
    for name in ("red \x1b[31m", "a\x9bJ", "abc" * 100, "x" * 1_000_000, "a\u202eb"):
        (root / "classes.txt").write_text(f"{name}\nclass 1\nclass 2\n", encoding="utf-8")
        sentence = refuse(folder, "classes.txt: a class's name must be text of at most 200")
        assert len(sentence) < 600 and sentence.isprintable()
    (root / "classes.txt").write_text("Straße\n道路\u3000橋\nمی\u200cشود\n", encoding="utf-8")
    assert open_dataset(folder, "train").classes == ["Straße", "道路 橋", "می\u200cشود"]
    forged = "frame_9\x1b[2J\nerror: all is lost"
    (root / "images" / f"{forged}.png").write_bytes(b"")
    commands = [("data.py", folder, "--sheet", tmp_path / "s.png"), ("train.py", "--data", folder)]
    for args in commands:
        output = command(*args, code=2)
        assert "\x1b" not in output and "\nerror: all is lost" not in output
        assert r"frame_9\x1b[2J\nerror: all is lost.png: this image has no label" in output


def test_superscript_digits_are_no_colour(folder, tmp_path):
    (tmp_path / "set" / "classes.txt").write_text("a 1 2 ²\nb 1 2 3\nc\n", encoding="utf-8")
    dataset = open_dataset(folder, "train")
    assert dataset.classes == ["a 1 2 ²", "b", "c"] and dataset.palette[1] == (1, 2, 3)


def test_nobodys_home_is_a_sentence(folder):
    with pytest.raises(DatasetError, match="~nouser/x: there is no such user's home folder"):
        open_dataset("folder:~nouser/x", "train")
    with pytest.raises(DatasetError, match="~nouser/x: there is no such user's home folder"):
        open_dataset(folder, "train", cache="~nouser/x")
    output = command("data.py", "folder:~nouser/x", code=2)
    assert "there is no such user's home folder" in output


def test_a_list_with_a_zero_byte_is_a_sentence(folder, checkpoint, tmp_path):
    path = tmp_path / "set" / "train.txt"
    path.write_bytes(b"frame_0\nframe\x001\n")
    refuse(folder, "train.txt: not text, it holds zero bytes")
    output = command("-m", "extras.predict", checkpoint, path, "--out", tmp_path / "out", code=2)
    assert "train.txt: not text, it holds zero bytes" in output


# ---------------------------------------------------------------- the environment

@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"},
                                 {"LC_ALL": "C", "PYTHONUTF8": "0"}], ids=str)
def test_umlauts_are_printed_on_any_terminal(env, tmp_path):
    spec = write_folder(tmp_path / "Straße")
    classes = tmp_path / "Straße" / "classes.txt"
    classes.write_text("Bürgersteig\nŠtěrk\n道路\n", encoding="utf-8")
    output = command("data.py", spec, "--sheet", tmp_path / "ü.png", env=env)
    assert "train: 5 frames" in output and "rk" in output and (tmp_path / "ü.png").exists()
    (tmp_path / "Straße" / "images" / "frame_0.png").write_bytes(b"")
    output = command("data.py", spec, "--sheet", tmp_path / "ü.png", env=env, code=2)
    assert "error: " in output and "not an image" in output


def test_a_path_that_is_no_utf_8_is_printed(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    result = subprocess.run([sys.executable, ROOT / "data.py", b"folder:" + folder],
                            capture_output=True, cwd=tmp_path)
    assert result.returncode == 2 and b"classes.txt: there is no such file" in result.stderr
    assert b"Traceback" not in result.stderr and rb"\udcff" in result.stderr


def test_no_check_lives_in_an_assert(folder, tmp_path):
    """`python -O` leaves assertions out."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py"), *ROOT.glob("examples/*.py")]:
        if not path.name.startswith("test_"):
            lines = [line.strip() for line in path.read_text().splitlines()]
            assert not [line for line in lines if line.startswith("assert ")], path
    (tmp_path / "set" / "images" / "frame_0.png").write_text("not an image")
    env = {"PYTHONOPTIMIZE": "2"}
    output = command("data.py", folder, "--sheet", tmp_path / "s.png", env=env, code=2)
    assert "frame_0.png: not an image" in output


def test_the_quick_check_is_quick(tmp_path):
    """Of 400 PNG frames nothing is decoded but one label."""
    spec = write_folder(tmp_path / "set", frames=400)
    reads = []
    dataset = open_dataset(spec, "train")
    read_label = dataset.read_label
    dataset.read_label = lambda i: reads.append(i) or read_label(i)
    dataset.read_image = lambda i: pytest.fail("decoded")
    dataset.quick_check()
    assert reads == [0]                                           # to see that it has a class


def test_data_alone_refuses_what_its_own_reader_can_see(folder, tmp_path, monkeypatch):
    """Copied out without extras/: no closer look, and no error for want of it."""
    monkeypatch.setattr(data, "find_checks", lambda: None)
    open_dataset(folder, "train").quick_check()
    path = tmp_path / "set" / "images" / "frame_0.png"
    path.write_text(EPS)
    refuse(folder, "frame_0.png: not an image")
