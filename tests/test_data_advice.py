"""What `python data.py` and a run's start say is probably wrong, and that they say it of nothing
else.
"""

import io
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw
from small_runs import SMALL, train_with

import afternoon
from conftest import CAMVID, command, write_folder
from data import DatasetError, open_dataset
from extras import check_data
from extras.crop_advice import describe_large, describe_padding
from extras.data_advice import advise
from extras.smoothed_masks import CLEAR, smoothed_share
from extras.toy_scenes import draw_scene
from small_datasets import save, write_camvid

NEAREST = Image.Resampling.NEAREST


def warnings_of(spec, fold=None):
    """-> what `python data.py` warns of."""
    splits = {}
    for split in ("train", "val"):
        dataset = open_dataset(spec, split, fold)
        splits[split] = (dataset, check_data.check(dataset))
    return advise(spec, splits)


def write_street(root, frames=10, names=None):
    """Toy scenes as a folder, 128x256, in which nothing is wrong but for their size."""
    names = names or [f"class {i}" for i in range(8)]
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(names))
    for i in range(frames):
        image, label = draw_scene(f"street-{i}", (512, 544))
        save(root / "images" / f"frame_{i:02d}.png", image)
        save(root / "labels" / f"frame_{i:02d}.png", label)
    return f"folder:{root}"


def change_labels(root, change):
    for path in (root / "labels").iterdir():
        save(path, change(np.array(Image.open(path))))


# ---------------------------------------------------------------- nothing is wrong

@pytest.mark.parametrize("spec", ["toy", "camvid"])
def test_nothing_is_said_of_data_in_which_nothing_is_wrong(spec):
    if spec == "camvid":
        if not CAMVID.is_dir():
            pytest.skip("CamVid is not here")
        spec = f"camvid:{CAMVID}"
    splits = {}
    for split in ("train", "val"):
        dataset = open_dataset(spec, split)
        some = list(dataset.frames.items())[:60]                  # as many as an afternoon's
        dataset.use_frames(dict(some))
        splits[split] = (dataset, check_data.check(dataset))
    assert advise(spec, splits) == []


def test_nothing_is_said_of_a_folder_in_which_nothing_is_wrong(tmp_path):
    assert warnings_of(write_street(tmp_path / "set")) == []


def test_of_the_afternoon_its_size_alone_is_said(tmp_path):
    scenes = {f"street_{i:03d}": draw_scene(f"afternoon-{i:04d}") for i in range(60)}
    root = tmp_path / "data"
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(afternoon.NAMES))
    for name, (image, label) in scenes.items():
        afternoon.save_photo(image, root / "images" / f"{name}.jpg")
        save(root / "labels" / f"{name}.png", label)
    said, = warnings_of(f"folder:{root}")
    assert "48 of 48 train frames are smaller than --crop 512 512" in said


# ---------------------------------------------------------------- classes

def said_of_classes(root, change):
    """-> what is said once `change` was done to every label of a street, (H, W) -> (H, W)."""
    spec = write_street(root)
    change_labels(root, change)
    return warnings_of(spec)


def test_masks_of_0_and_255(tmp_path):
    def paint(label):
        return np.where(label == 2, 255, 0).astype(np.uint8)

    said, = said_of_classes(tmp_path / "set", paint)
    assert said == ("set: its labels hold the ids 0 and 255 alone, and 255 is void here: if it was "
                    "meant as a class, such as 1 'class 1', write that id in its place")
    (tmp_path / "set" / "classes.txt").write_text("other\nroad\n")
    said, = warnings_of(f"folder:{tmp_path / 'set'}")
    assert said.endswith("if it was meant as class 1 'road', write 1 in its place")
    (tmp_path / "set" / "classes.txt").write_text("road\n")
    said, = warnings_of(f"folder:{tmp_path / 'set'}")
    assert "write 1 in its place, and name both in classes.txt" in said
    change_labels(tmp_path / "set", np.zeros_like)
    said, = warnings_of(f"folder:{tmp_path / 'set'}")
    assert "there is one class, so there is nothing to tell apart" in said


def test_a_class_that_became_void(tmp_path):
    """Class 2 covers much of a street: painted 255, it is missed."""
    said, = said_of_classes(tmp_path / "set", lambda label: np.where(label == 2, 255, label))
    assert said.startswith("set: no label has class 2 'class 2': void is ")
    assert "if it was meant as class 2, write 2 in its place" in said


def test_a_class_that_nobody_painted(tmp_path):
    said, = said_of_classes(tmp_path / "set", lambda label: np.where(label == 7, 1, label))
    assert said == ("set: no label has class 7 'class 7': painted with another id, or left out of "
                    "the export?")


@pytest.mark.parametrize("kept, sentence", [
    ((8, 9), "set: val has class 7 'class 7', and train has not, so it cannot be learned"),
    (range(8), "set: train has class 7 'class 7', and val has not, so it is not scored")])
def test_a_class_of_one_split_alone(kept, sentence, tmp_path):
    spec = write_street(tmp_path / "set")
    for i in range(10):
        path = tmp_path / "set" / "labels" / f"frame_{i:02d}.png"
        label = np.array(Image.open(path))
        label[label == 7] = 1
        if i in kept:
            label[:20, :20] = 7
        save(path, label)
    said, = warnings_of(spec)
    assert said.startswith(sentence) and "train.txt and val.txt name the frames" in said
    (tmp_path / "set" / "images" / "frame_00.png").write_text("not an image")
    assert warnings_of(spec) == []                                # of half a split nothing is known


# ---------------------------------------------------------------- masks with smoothed edges

def draw_ids(seed, classes, sampling):
    """A drawing of ids, antialiased: four times as large, and made small by `sampling`."""
    rng = np.random.default_rng(seed)
    drawing = Image.new("L", (640, 480))
    brush = ImageDraw.Draw(drawing)
    for _ in range(12):
        x, y = rng.integers(0, 640), rng.integers(0, 480)
        radius = rng.integers(40, 120)
        box = (x - radius, y - radius, x + radius, y + radius)
        brush.ellipse(box, fill=int(rng.integers(classes)))
    return np.array(drawing.resize((160, 120), sampling))


@pytest.mark.parametrize("classes", [4, 8, 19])
@pytest.mark.parametrize("sampling", [Image.Resampling.BOX, Image.Resampling.BILINEAR,
                                      Image.Resampling.LANCZOS])
def test_antialiased_drawings_are_told_from_painted_ones(classes, sampling):
    for seed in range(10):
        assert smoothed_share(draw_ids(seed, classes, sampling)) > CLEAR
        assert smoothed_share(draw_ids(seed, classes, NEAREST)) < CLEAR / 2


@pytest.mark.parametrize("size", [(272, 256), (816, 768), (1088, 1024)])
def test_scaled_masks_are_told_from_painted_ones(size):
    for i in range(5):
        label = Image.fromarray(draw_scene(f"street-{i}", (512, 544))[1])
        scaled = label.resize(size, Image.Resampling.BILINEAR)
        assert smoothed_share(np.array(scaled)) > CLEAR
        assert smoothed_share(np.array(label.resize(size, NEAREST))) < CLEAR / 2


def test_masks_with_smoothed_edges_are_said(tmp_path):
    spec = write_street(tmp_path / "set")
    bad = tmp_path / "set" / "labels" / "frame_03.png"
    smooth = draw_ids(0, 8, Image.Resampling.BILINEAR)
    save(bad, np.tile(smooth, (5, 4))[:512, :544])
    said, = warnings_of(spec)
    assert said.startswith(f"{bad}: between its regions lie thin lines of ids in between")


@pytest.mark.parametrize("how", ["antialiased", "JPEG", "counted from 1", "one more", "painted"])
def test_ids_of_no_class_are_explained(how, tmp_path):
    """The error says what is probably wrong with the mask, where its ids tell."""
    spec = write_street(tmp_path / "set")
    bad = tmp_path / "set" / "labels" / "frame_03.png"
    label = np.array(Image.open(bad))
    if how == "antialiased":
        large = Image.fromarray(np.where(label == 2, 255, 0).astype(np.uint8))
        small = large.resize((272, 256), Image.Resampling.LANCZOS)
        save(bad, np.tile(np.array(small), (2, 2)))
    elif how == "JPEG":
        file = io.BytesIO()
        Image.fromarray(label).save(file, "JPEG", quality=90)
        save(bad, np.array(Image.open(file)))
    elif how == "counted from 1":
        save(bad, np.where(label == 255, 255, label + 1).astype(np.uint8))
    elif how == "one more":
        save(bad, np.where(label == 255, 0, label + 1).astype(np.uint8))
    else:
        save(bad, np.where(label == 2, 77, label).astype(np.uint8))
    with pytest.raises(DatasetError) as caught:
        open_dataset(spec, "train").read_label(3)
    said = str(caught.value)
    is_smoothed = how in ("antialiased", "JPEG")
    counts_from_1 = how == "counted from 1"
    lacks_line = how == "one more"
    assert said.startswith(f"{bad}: label id")
    assert ("save masks without smoothed edges" in said) == is_smoothed
    assert ("do its ids count from 1? They must count from 0" in said) == counts_from_1
    assert ("does classes.txt lack a line, of a background with the id 0?" in said) == lacks_line


# ---------------------------------------------------------------- crops and frames

def test_what_is_said_of_crops():
    assert describe_padding({(512, 640): 3}, (512, 512), (0.5, 2)) is None
    assert describe_padding({(64, 64): 3}, (128, 64), (1, 1)) == (
        "3 of 3 train frames are smaller than --crop 128 64 (most of them 64x64 pixels), so 50 % "
        "of what is trained on is padding: --crop 64 64 fits")
    said = describe_padding({(64, 64): 1, (128, 64): 3}, (128, 64), (1, 1))
    assert said.startswith("1 of 4 train frames are") and "12 % of" in said
    assert describe_large({(1080, 1920): 3}, (512, 512)) is None
    said = describe_large({(3000, 4000): 3}, (512, 512))
    assert said.endswith("shows 2 %: --size 480 640 --crop 480 512 is usual")


def test_photos_of_a_phone_need_a_size(tmp_path):
    spec = write_folder(tmp_path / "set", frames=2, size=(1500, 1998))
    said, = warnings_of(spec)
    assert "most train frames have 1998x1500 pixels" in said and "--size 480 640" in said


def test_a_run_says_that_its_crop_is_larger_than_its_frames(folder, tmp_path, capsys):
    flags = ("--data", folder, *SMALL, "--iters", 1)
    train_with(*flags, "--out", tmp_path / "fits")
    assert "padding" not in capsys.readouterr().out
    train_with(*flags, "--crop", 64, 64, "--out", tmp_path / "large")
    output = capsys.readouterr().out
    assert output.count("note: 5 of 5 train frames are smaller than --crop 64 64 (most of them "
                        "48x40 pixels)") == 1
    train_with(*flags, "--crop", 64, 64, "--size", 80, 96, "--out", tmp_path / "size")
    train_with(*flags, "--crop", 64, 64, "--augment", "plain", "--out", tmp_path / "plain")
    assert "padding" not in capsys.readouterr().out


# ---------------------------------------------------------------- pictures in two splits

def test_a_picture_that_is_trained_and_scored_on(tmp_path):
    spec = write_street(tmp_path / "set")
    images = tmp_path / "set" / "images"
    shutil.copy(images / "frame_02.png", images / "frame_09.png")
    said, = warnings_of(spec)
    assert said.startswith(f"{images}/frame_09.png: the same picture as 'frame_02' of train: ")
    again = Image.open(images / "frame_02.png")
    (images / "frame_09.png").unlink()
    again.save(images / "frame_09.jpg", quality=40)
    said, = warnings_of(spec)
    assert said.startswith(f"{images}/frame_09.jpg: nearly the same picture as 'frame_02' of train")
    again.resize((272, 256)).save(images / "frame_09.jpg")
    label = tmp_path / "set" / "labels" / "frame_09.png"
    save(label, np.array(Image.open(label).resize((272, 256), NEAREST)))
    said, = [said for said in warnings_of(spec) if "picture" in said]
    assert said.startswith(f"{images}/frame_09.jpg: nearly the same picture as 'frame_02' of train")


def test_pictures_that_only_look_alike_from_afar_are_not_the_same(tmp_path):
    """Noise, and a table on which one thing lies elsewhere."""
    spec = write_street(tmp_path / "set", frames=4)
    images = tmp_path / "set" / "images"
    rng = np.random.default_rng(0)
    for i in range(2):
        noise = rng.normal(128, 20, (512, 544, 3))
        save(images / f"frame_0{1 + 2 * i}.png", noise.astype(np.uint8))
        light = np.linspace(90, 170, 544)[None, :, None]
        table = np.repeat(light + rng.normal(0, 3, (512, 544, 1)), 3, 2).astype(np.uint8)
        table[100 + 200 * i:107 + 200 * i, 100:107] = 250         # smaller than a cell
        save(images / f"frame_0{2 * i}.png", table)
    (tmp_path / "set" / "train.txt").write_text("frame_00\nframe_01\n")
    (tmp_path / "set" / "val.txt").write_text("frame_02\nframe_03\n")
    assert [said for said in warnings_of(spec) if "picture" in said] == []


def test_camvids_layout_with_one_name_in_two_splits(tmp_path):
    spec = write_camvid(tmp_path / "set")
    root = tmp_path / "set"
    for folder in ("val", "valannot"):
        shutil.move(root / folder / "A_003.png", root / folder / "A_001.png")
    assert any(said.startswith(f"{root}/val/A_001.png: the same picture as 'A_001' of train")
               for said in warnings_of(spec))
    noise = np.random.default_rng(0).integers(0, 256, (36, 48, 3), np.uint8)
    save(root / "val" / "A_001.png", noise)
    said, = [said for said in warnings_of(spec) if "frame of this name" in said]
    assert said.startswith(f"{root}/val/A_001.png: train has another frame of this name")
    with pytest.raises(DatasetError, match="two of its splits have a frame 'A_001'"):
        open_dataset(spec, "train", fold=0)


# ---------------------------------------------------------------- the command

def test_warnings_alone_are_no_error(tmp_path):
    spec = write_street(tmp_path / "set")
    images = tmp_path / "set" / "images"
    for i in (8, 9):
        shutil.copy(images / f"frame_0{i - 5}.png", images / f"frame_0{i}.png")
    output = command("data.py", spec, "--sheet", tmp_path / "sheet.png")
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "error" not in output
    assert warnings[0].endswith("take one of the two out (and 1 more: frame_09.png)")
    output = command("data.py", spec, "--sheet", tmp_path / "sheet.png", "--all")
    assert output.count("warning: ") == 2
