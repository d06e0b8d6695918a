"""Photos: found, segmented, written, and what is refused."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import command
from data import CITYSCAPES
from model import load_checkpoint, save_checkpoint, segformer
from small_datasets import save, write_cityscapes


def predict_command(*args, code=0):
    return command("-m", "extras.predict", *args, code=code)


def test_photos_come_from_folders_below_lists_and_files(checkpoint, tmp_path):
    photos = tmp_path / "photos"
    out = tmp_path / "out"
    for name in ("aachen/x.png", "bonn/x.png", "top.webp"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (9, 9, 9)).save(photos / name)
    (photos / "notes.md").write_text("-")
    output = predict_command(checkpoint, photos, "--out", out, "--flip", "--window", 32, 32)
    assert "3 of 3 photos segmented, windows of 32x32, and mirrored" in output
    assert "1 files in" in output and "notes.md" in output
    written = {str(p.relative_to(out)) for p in out.rglob("*.png") if "overlay" not in p.name}
    assert written == {"aachen/x.png", "bonn/x.png", "top.png"}

    (photos / "list.txt").write_text("aachen/x.png\n\ntop.webp\n")
    output = predict_command(checkpoint, photos / "list.txt", "--out", tmp_path / "two")
    assert "2 of 2 photos" in output
    output = predict_command(checkpoint, photos, "--out", photos / "deep" / "out", code=2)
    assert "choose another folder" in output


def test_photos_of_one_name_are_refused(checkpoint, tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    output = predict_command(checkpoint, tmp_path / "a.png", tmp_path / "a.jpg",
                             "--out", tmp_path / "out", code=2)
    assert "two photos would both be written to a.png" in output
    assert not (tmp_path / "out").exists()


def test_label_ids_are_cityscapes_own(checkpoint, tmp_path):
    torch.manual_seed(0)
    save_checkpoint(segformer("b0", 19), tmp_path / "city.pth")
    photo = tmp_path / "x.png"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(photo)
    predict_command(tmp_path / "city.pth", photo, "--out", tmp_path / "classes")
    predict_command(tmp_path / "city.pth", photo, "--out", tmp_path / "raw", "--label-ids")
    classes = np.asarray(Image.open(tmp_path / "classes" / "x.png"))
    raw = np.asarray(Image.open(tmp_path / "raw" / "x.png"))
    raw_ids = np.array([raw_id for raw_id, _, _ in CITYSCAPES.values()])
    assert (raw_ids[classes] == raw).all()
    assert [p.name for p in (tmp_path / "raw").iterdir()] == ["x.png"]
    output = predict_command(checkpoint, photo, "--out", tmp_path / "o", "--label-ids", code=2)
    assert "for Cityscapes' 19 classes" in output
    output = predict_command(tmp_path / "city.pth", photo, "--out", tmp_path / "classes",
                             "--label-ids", code=2)
    assert "x_overlay.png: the evaluation would take it for a prediction too" in output


def test_cityscapes_own_script_scores_the_label_ids_as_eval_does(tmp_path):
    """The official evaluation runs on what --label-ids writes, and its mean is ours."""
    pytest.importorskip("cityscapesscripts", reason="cityscapesscripts is not installed")
    torch.manual_seed(0)
    save_checkpoint(segformer("b0", 19), tmp_path / "city.pth")
    spec = write_cityscapes(tmp_path / "data")
    for path in (tmp_path / "data" / "gtFine").rglob("*_labelIds.png"):
        instances = np.asarray(Image.open(path)).astype(np.uint16)           # no single things
        Image.fromarray(instances).save(str(path).replace("labelIds", "instanceIds"))
    for path in (tmp_path / "data" / "leftImg8bit").rglob("*.png"):
        save(path, np.random.default_rng(0).integers(0, 256, (34, 64, 3), np.uint8))

    frames = tmp_path / "data" / "leftImg8bit" / "val"
    predict_command(tmp_path / "city.pth", frames, "--out", tmp_path / "results", "--label-ids")
    env = {**os.environ, "CITYSCAPES_DATASET": str(tmp_path / "data"),
           "CITYSCAPES_RESULTS": str(tmp_path / "results")}
    script = "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"
    start = ("import numpy, runpy\n"
             "numpy.in1d = numpy.isin\n"                          # gone from numpy 2.4
             f"runpy.run_module({script!r}, run_name='__main__')")
    official = subprocess.run([sys.executable, "-c", start], env=env, capture_output=True,
                              text=True, timeout=120)
    assert official.returncode == 0, official.stdout + official.stderr
    theirs = float(re.search(r"Score Average *: *(\S+)", official.stdout)[1])
    ours = command("eval.py", tmp_path / "city.pth", "--data", spec)
    ours = float(re.search(r"mIoU +(\S+)", ours)[1]) / 100
    assert ours > 0 and abs(ours - theirs) < 1e-3


def test_nothing_is_written_through_a_link(checkpoint, tmp_path):
    photo = tmp_path / "x.png"
    Image.new("RGB", (40, 40)).save(photo)
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("x.png", "x_overlay.png"):
        (out / name).symlink_to(precious)
        output = predict_command(checkpoint, photo, "--out", out, code=2)
        assert f"{name}: no regular file" in output
        (out / name).unlink()
    (out / "x.png").unlink()
    (out / "x.png.partial").symlink_to(precious)
    predict_command(checkpoint, photo, "--out", out)
    assert Image.open(out / "x.png").size == (40, 40)
    assert precious.read_text() == "precious"

    photos = tmp_path / "photos"
    save(photos / "deep" / "y.png", np.zeros((40, 40, 3), np.uint8))
    (tmp_path / "elsewhere").mkdir()
    (out / "deep").symlink_to(tmp_path / "elsewhere")
    output = predict_command(checkpoint, photos, "--out", out, code=2)
    assert "deep: a link, which results are not written through" in output
    assert not list((tmp_path / "elsewhere").iterdir())
    (out / "y.png").mkdir()
    output = predict_command(checkpoint, photos / "deep" / "y.png", "--out", out, code=2)
    assert "y.png: no regular file" in output


def test_only_picture_formats_are_opened(checkpoint, tmp_path):
    """Pillow would hand PostScript to another program."""
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EOF\n")
    output = predict_command(checkpoint, tmp_path / "x.png", "--out", tmp_path / "o", code=2)
    assert "not an image that can be read" in output


def test_command_segments_photos_and_goes_on_after_a_broken_one(checkpoint, tmp_path):
    photos = tmp_path / "my photos"
    out = tmp_path / "out"
    photos.mkdir()
    for name, size in (("a b.jpg", (101, 67)), ("ü.png", (64, 200))):
        Image.new("RGB", size, (90, 120, 60)).save(photos / name)
    (photos / "broken.jpg").write_bytes(b"no")
    Image.new("RGB", (20, 20)).save(photos / "tiny.png")
    output = predict_command(checkpoint, photos, "--out", out, code=2)
    assert "2 of 4 photos" in output
    assert "broken.jpg: not an image" in output and "tiny.png: 20x20 pixels" in output
    ids = Image.open(out / "a b.png")
    assert ids.size == (101, 67) and ids.mode == "L" and np.asarray(ids).max() < 3
    written = sorted(p.name for p in out.iterdir())
    assert written == ["a b.png", "a b_overlay.png", "ü.png", "ü_overlay.png"]

    before = (photos / "ü.png").read_bytes()
    output = predict_command(checkpoint, photos / "ü.png", "--out", photos, code=2)
    assert "choose another folder" in output
    assert (photos / "ü.png").read_bytes() == before


def test_broken_weights_are_a_sentence(checkpoint, tmp_path):
    network = load_checkpoint(checkpoint)
    network.decoder.fuse.weight.data[0] = float("nan")
    save_checkpoint(network, tmp_path / "nan.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    output = predict_command(tmp_path / "nan.pth", tmp_path / "x.png",
                             "--out", tmp_path / "out", code=2)
    assert f"{tmp_path / 'nan.pth'}: the network's output is not finite" in output


@pytest.mark.parametrize("args, sentence", [
    (["{net}", "/no.png", "--out", "{tmp}/o"], "/no.png: there is no such file"),
    (["{net}", "x.png"], "required: --out"),
    (["{net}", "--out", "{tmp}/o"], "required: INPUT"),
    (["/no/net.pth", "x.png", "--out", "{tmp}/o"], "cannot open checkpoint /no/net.pth"),
    (["{net}", "x.png", "--out", "{tmp}/o", "--stride", "9", "9"], "goes with --window"),
    (["{net}", "x.png", "--out", "{tmp}/o", "--size", "8", "8"], "at least 32"),
    (["{net}", "{tmp}", "--out", "/dev/null/o"], "no photo in it"),
])
def test_mistakes_are_a_sentence_and_exit_code_2(args, sentence, checkpoint, tmp_path):
    args = [arg.format(net=checkpoint, tmp=tmp_path) for arg in args]
    assert sentence in predict_command(*args, code=2)
