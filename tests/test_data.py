"""The data sets on small trees written here, real CamVid where it is, augmentation, folds, the stream, and every bad input."""

import shutil
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from conftest import CAMVID, command, write_folder
from data import (CITYSCAPES, IGNORE, TOY, Augment, DatasetError, Stream, choose_crop, colourise, open_dataset, overlay,
                  pixel_counts, read_picture)

real_camvid = pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not in ../shared/camvid")


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_camvid(root, suffix=".png"):
    """Three drives over the splits, SegNet layout."""
    for split, stems in {"train": ["A_001", "A_002", "B_001"], "val": ["A_003"], "test": ["C_001", "C_002"]}.items():
        for stem in stems:
            save(root / split / f"{stem}{suffix}", np.full((36, 48, 3), 90, np.uint8))
            save(root / f"{split}annot" / f"{stem}.png", np.arange(36 * 48, dtype=np.uint8).reshape(36, 48) % 12)
    return f"camvid:{root}"


def write_cityscapes(root, train_ids=False):
    for split, cities in {"train": ["aachen", "bochum"], "val": ["lindau"]}.items():
        for city in cities:
            for i in range(2):
                stem = f"{city}_00000{i}_000019"
                save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", np.full((34, 64, 3), 90, np.uint8))
                raw = np.arange(34, dtype=np.uint8)[:, None].repeat(64, 1)
                save(root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", raw)
                if train_ids:
                    save(root / "gtFine" / split / city / f"{stem}_gtFine_labelTrainIds.png", np.full((34, 64), 18, np.uint8))
    return f"cityscapes:{root}"


# ---------------------------------------------------------------- reading

def test_toy_is_deterministic_imbalanced_and_quick():
    train, again = open_dataset("toy", "train"), open_dataset("toy", "train")
    image, label = train[3]
    assert image.shape == (3, 128, 256) and image.dtype == label.dtype == torch.uint8 and label.shape == (128, 256)
    assert all(torch.equal(a, b) for a, b in zip(train[3], again[3]))
    assert not torch.equal(train[3][0], train[4][0]) and not torch.equal(train[3][0], open_dataset("toy", "val")[3][0])
    start = time.perf_counter()
    counts = pixel_counts(open_dataset("toy", "val"))
    assert time.perf_counter() - start < 5                        # 50 scenes; some 0.2 s on a quiet core
    assert (counts > 0).all() and counts.max() > 20 * counts.min() and (label == IGNORE).any()
    assert torch.equal(label, torch.from_numpy(train.read_label(3)))


def test_camvid_layout(tmp_path):
    for suffix in (".png", ".jpg"):
        spec = write_camvid(tmp_path / suffix[1:], suffix)
        dataset = open_dataset(spec, "train")
        image, label = dataset[0]
        assert dataset.stems == ["A_001", "A_002", "B_001"] and len(dataset.classes) == len(dataset.palette) == 11
        assert image.shape == (3, 36, 48) and set(label.unique().tolist()) == {*range(11), IGNORE}        # 11 -> void


def test_cityscapes_raw_ids_become_the_19_classes(tmp_path):
    dataset = open_dataset(write_cityscapes(tmp_path), "train")
    _, label = dataset[0]
    by_raw = {raw: i for i, (raw, _, _) in enumerate(CITYSCAPES.values())}
    assert label[:, 0].tolist() == [by_raw.get(raw, IGNORE) for raw in range(34)]
    assert dataset.classes[by_raw[26]] == "car" and dataset.classes[by_raw[7]] == "road" and len(dataset.classes) == 19


def test_cityscapes_train_ids_win_where_present(tmp_path):
    dataset = open_dataset(write_cityscapes(tmp_path, train_ids=True), "val")
    assert dataset[0][1].unique().tolist() == [18] and len(dataset) == 2


def test_folder_layout_splits_and_colours(tmp_path):
    spec, root = write_folder(tmp_path, frames=10), tmp_path
    assert open_dataset(spec, "train").stems == [f"frame_{i}" for i in range(8)]
    assert open_dataset(spec, "val").stems == ["frame_8", "frame_9"]
    (root / "train.txt").write_text("frame_1\nframe_5\n")
    (root / "val.txt").write_text("frame_0\n")
    (root / "classes.txt").write_text("a thing 1 2 3\nroad\n\nsky 255 0 9\n")
    dataset = open_dataset(spec, "train")
    assert dataset.stems == ["frame_1", "frame_5"] and dataset.classes == ["a thing", "road", "sky"]
    assert dataset.palette[0] == (1, 2, 3) and dataset.palette[2] == (255, 0, 9)
    with pytest.raises(DatasetError, match="test.txt"):
        open_dataset(spec, "test")


def test_transform_is_applied(folder):
    image, label = open_dataset(folder, "train", transform=lambda image, label: (image[:, :8, :8], label[:8, :8]))[0]
    assert image.shape == (3, 8, 8) and label.shape == (8, 8)


@real_camvid
def test_real_camvid():
    spec = f"camvid:{CAMVID}"
    assert [len(open_dataset(spec, split)) for split in ("train", "val", "test")] == [367, 101, 233]
    counts = sum(pixel_counts(open_dataset(spec, split)) for split in ("train", "val", "test"))
    assert (100 * counts / counts.sum()).round(1).tolist() == pytest.approx([16.4, 25.0, 1.0, 30.4, 6.9, 11.6, 1.1, 1.5, 4.8, 0.7, 0.6], abs=0.051)
    drives = [{stem.split("_")[0] for stem in open_dataset(spec, split, fold=fold).stems} for split, fold in
              (("train", 0), ("val", 0), ("train", 1), ("val", 1))]
    assert not drives[0] & drives[1] and not drives[2] & drives[3] and drives[0] == drives[3]
    assert len(open_dataset(spec, "train", fold=0)) + len(open_dataset(spec, "val", fold=0)) == 701


# ---------------------------------------------------------------- folds

def test_folds_are_whole_drives_where_stems_tell(tmp_path):
    spec = write_camvid(tmp_path)
    held_out = [open_dataset(spec, "val", fold=fold, folds=3).stems for fold in range(3)]
    assert sorted(map(sorted, held_out)) == [["A_001", "A_002", "A_003"], ["B_001"], ["C_001", "C_002"]]
    for fold in range(3):
        train = open_dataset(spec, "train", fold=fold, folds=3).stems
        assert sorted(train + held_out[fold]) == ["A_001", "A_002", "A_003", "B_001", "C_001", "C_002"]
    with pytest.raises(DatasetError, match="3 drives cannot make 4 folds"):
        open_dataset(spec, "val", fold=0, folds=4)
    with pytest.raises(DatasetError, match="tell no drives"):     # or every frame would be a drive, its neighbours elsewhere
        open_dataset("toy", "val", fold=0, fold_by="drive") and data.deal([f"{i:04d}" for i in range(10)], 0, 2, "drive")


def test_folds_are_blocks_elsewhere_and_shuffling_warns(tmp_path):
    spec = write_folder(tmp_path, frames=10)
    assert open_dataset(spec, "val", fold=1, folds=2).stems == [f"frame_{i}" for i in range(5, 10)]
    with pytest.warns(UserWarning, match="leak"):
        shuffled = [set(open_dataset(spec, "val", fold=fold, folds=2, fold_by="shuffle").stems) for fold in (0, 1)]
    assert not shuffled[0] & shuffled[1] and len(shuffled[0] | shuffled[1]) == 10 and shuffled[0] != {f"frame_{i}" for i in range(5)}
    for fold in (-1, 2):
        with pytest.raises(DatasetError, match="does not exist"):
            open_dataset(spec, "val", fold=fold, folds=2)


# ---------------------------------------------------------------- augmentation

def scene():
    """Image and label that tell of each other: every channel is forty times the class."""
    label = torch.from_numpy(np.repeat(np.repeat(np.random.default_rng(0).integers(0, 5, (4, 5)).astype(np.uint8), 16, 0), 16, 1))
    return torch.stack([label * 40, label * 40, label * 40]), label


def misplaced(image, label):
    """Share of the pixels, one pixel or more away from any border of classes, whose image and label do not agree."""
    valid, wide = (label != IGNORE), label.float()[None]
    window = dict(kernel_size=3, stride=1, padding=1)
    inside = (F.max_pool2d(wide, **window) == -F.max_pool2d(-wide, **window))[0] & valid
    return ((image[0].float() - label * 40.0)[inside].abs() > 12).float().mean().item()


@pytest.mark.parametrize("recipe, crop", [("segformer", (32, 48)), ("segformer", (96, 120)), ("plain", (64, 80)), ("plain", (48, 56))])
def test_image_and_label_stay_together(recipe, crop, monkeypatch):
    monkeypatch.setattr(data, "distort", lambda image, rng: image)
    augment = Augment(crop, (64, 80), (0.75, 1.5), recipe)
    together, shifted = [], []
    for seed in range(20):
        image, label = augment(*scene(), np.random.default_rng(seed))
        assert image.shape == (3, *crop) and label.shape == crop
        valid = label != IGNORE
        together.append(misplaced(image, label))
        shifted.append(misplaced(image.roll(2, 2), label))
        if not valid.all():                                       # padded: void below and right, the mean colour in the image
            assert image[:, ~valid].unique(dim=1).flatten().tolist() == list(data.PAD)
    assert max(together) < 0.005 and np.median(shifted) > 0.02    # a shift by two pixels would be seen


def test_scale_range_flip_and_plain_recipe():
    image, label = scene()
    sizes = {int((Augment((200, 200), (64, 80), (0.5, 2.0))(image, label, np.random.default_rng(s))[1] != IGNORE).sum()) for s in range(30)}
    assert min(sizes) < 0.5 * 64 * 80 and max(sizes) > 2 * 64 * 80
    plain = [Augment((64, 80), recipe="plain")(image, label, np.random.default_rng(seed)) for seed in range(12)]
    same = [torch.equal(a, image) and torch.equal(b, label) for a, b in plain]
    flipped = [torch.equal(a, image.flip(2)) and torch.equal(b, label.flip(1)) for a, b in plain]
    assert all(a != b for a, b in zip(same, flipped)) and 0 < sum(flipped) < 12


def test_crop_avoids_one_class_filling_it():
    label = np.zeros((64, 64), np.uint8)
    label[:, 48:] = np.arange(16)                                 # only the right quarter is varied
    shares = []
    for seed in range(40):
        top, left = choose_crop(label, (32, 32), np.random.default_rng(seed))
        assert 0 <= top <= 32 and 0 <= left <= 32
        shares.append((label[top:top + 32, left:left + 32] == 0).mean())
    anywhere = [(label[:32, left:left + 32] == 0).mean() for left in range(33)]
    assert np.mean(np.array(shares) <= 0.75) > 0.95 and np.mean(np.array(anywhere) <= 0.75) < 0.6


def test_photometric_distortion_changes_colours_only_within_bounds():
    flat = torch.tensor([120, 100, 80], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    pixels = np.array([data.distort(flat, np.random.default_rng(s)).numpy()[:, 0, 0] for s in range(300)], int)
    unchanged = (pixels == (120, 100, 80)).all(1).mean()
    assert 0.01 < unchanged < 0.2                                 # four coins: one in sixteen
    assert pixels.min() >= 0 and pixels.max() > 180
    place = (pixels[:, 1] - pixels[:, 2]) / (pixels[:, 0] - pixels[:, 2])          # of green between blue and red: the hue
    assert place.min() < 0.3 and place.max() > 0.7
    luminance = pixels @ data.LUMINANCE
    assert luminance.max() <= 1.5 * (104 + 32) + 12 and luminance.min() >= 0.5 * (104 - 32) - 12       # the hue's turn moves it a little


class Coins:
    """In place of a generator: the coins fall so that only one of the four distortions is done, at `value`."""

    def __init__(self, which, value):
        self.coins, self.value = iter([0.0 if i == which else 1.0 for i in range(4)]), value

    def random(self):
        return next(self.coins)

    def uniform(self, low, high):
        assert low <= self.value <= high
        return self.value


@pytest.mark.parametrize("which, value, expected", [
    (0, 20, lambda r, g, b: (r + 20, g + 20, b + 20)),
    (1, 1.5, lambda r, g, b: (1.5 * r, 1.5 * g, 1.5 * b)),
    (2, 0.5, lambda r, g, b: tuple(0.5 * x + 0.5 * (0.299 * r + 0.587 * g + 0.114 * b) for x in (r, g, b))),
    (3, 18, lambda r, g, b: None)])
def test_each_distortion_is_its_formula(which, value, expected):
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(60, 150, (3, 5, 7)).astype(np.uint8))
    result = data.distort(image, Coins(which, value)).numpy().astype(float)
    for y, x in np.ndindex(5, 7):
        r, g, b = image[:, y, x].tolist()
        if which < 3:
            assert np.abs(result[:, y, x] - expected(r, g, b)).max() <= 1
        else:                                                     # the angle about the grey axis, by its definition
            turned = complex(result[0, y, x] - (result[1, y, x] + result[2, y, x]) / 2, (result[1, y, x] - result[2, y, x]) * 3 ** 0.5 / 2)
            before = complex(r - (g + b) / 2, (g - b) * 3 ** 0.5 / 2)
            if abs(before) > 20:
                angle = np.degrees(np.angle(turned / before))
                assert abs(angle - 18) < 4 and abs(abs(turned) / abs(before) - 1) < 0.1
            assert abs(result[:, y, x].sum() - (r + g + b)) <= 3


# ---------------------------------------------------------------- the stream

def test_stream_is_a_function_of_seed_and_number(folder):
    dataset = open_dataset(folder, "train")
    make = lambda seed=0: Stream(dataset, Augment((32, 32)), seed)
    forward, backward = make(), make()
    samples = [forward[n] for n in range(12)]
    for n in reversed(range(12)):
        assert all(torch.equal(a, b) for a, b in zip(samples[n], backward[n]))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(samples, [make(1)[n] for n in range(12)]))


def test_stream_visits_every_frame_once_an_epoch(folder):
    dataset = open_dataset(folder, "train")
    seen = []
    stream = Stream([(i, i) for i in range(len(dataset))], lambda image, label, rng: image, 3)
    for epoch in range(3):
        seen.append([stream[epoch * len(dataset) + i] for i in range(len(dataset))])
        assert sorted(seen[-1]) == list(range(len(dataset)))
    assert seen[0] != seen[1] or seen[1] != seen[2]


def test_pixel_counts_are_cached_until_a_label_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = write_folder(tmp_path / "set")
    dataset = open_dataset(spec, "train")
    first = pixel_counts(dataset)
    assert first.sum() == sum(int((dataset[i][1] != IGNORE).sum()) for i in range(len(dataset)))
    with monkeypatch.context() as patch:
        patch.setattr(data.Files, "read_label", None)             # reading again would fail
        assert pixel_counts(dataset).tolist() == first.tolist()
    save(tmp_path / "set" / "labels" / "frame_0.png", np.zeros((40, 48), np.uint8))
    assert pixel_counts(dataset)[0] > first[0]


def test_pictures():
    palette = [(255, 0, 0), (0, 255, 0)]
    label = np.array([[0, 1, IGNORE]], np.uint8)
    assert colourise(label, palette).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 0]]]
    image = np.full((1, 3, 3), 100, np.uint8)
    assert overlay(image, label, palette, 0.5).tolist() == [[[178, 50, 50], [50, 178, 50], [100, 100, 100]]]
    sheet = data.grid([[image.repeat(9, 0).repeat(3, 1)] * 2] * 3, ("a", "b"), width=30)
    assert sheet.size == (64, 16 + 3 * 30 + 2 * 4)
    assert data.legend(list(TOY), list(TOY.values()), 400).shape[1] == 400


# ---------------------------------------------------------------- bad input

def break_images(root, what):
    image, label = root / "images" / "frame_2.png", root / "labels" / "frame_2.png"
    if what == "no label":
        label.unlink()
    elif what == "no image":
        image.unlink()
    elif what == "sizes":
        save(label, np.zeros((40, 50), np.uint8))
    elif what == "label id":
        save(label, np.full((40, 48), 77, np.uint8))
    elif what == "truncated":
        image.write_bytes(image.read_bytes()[:-400])
    elif what == "text":
        image.write_text("not an image")
    elif what == "empty file":
        label.write_bytes(b"")
    elif what == "colour label":
        save(label, np.zeros((40, 48, 3), np.uint8))
    elif what == "jpeg label":
        label.unlink()
        save(label.with_suffix(".jpg"), np.zeros((40, 48), np.uint8))
    elif what == "damaged header":
        image.write_bytes(image.read_bytes()[:11] + b"\x05" + image.read_bytes()[12:])
    elif what == "latin-1 classes":
        (root / "classes.txt").write_bytes("Straße\n".encode("latin-1"))
    elif what == "16 bit":
        Image.fromarray(np.zeros((40, 48), np.uint16)).save(label)
    elif what == "no images folder":
        shutil.rmtree(root / "images")
    elif what == "empty folder":
        shutil.rmtree(root / "images")
        (root / "images").mkdir()
    elif what == "no classes":
        (root / "classes.txt").unlink()
    elif what == "double":
        save(image.with_suffix(".jpg"), np.zeros((40, 48, 3), np.uint8))


BROKEN = {"no label": r"images/frame_2.png: this image has no label", "no image": r"labels/frame_2.png: this label has no image",
          "sizes": r"frame_2.png: the image has 48x40 pixels, its label 50x40", "label id": r"labels/frame_2.png: label id 77",
          "truncated": r"images/frame_2.png: not an image that can be read", "text": r"images/frame_2.png: not an image",
          "empty file": r"labels/frame_2.png: not an image", "colour label": r"labels/frame_2.png: a label must be an 8-bit",
          "jpeg label": "JPEG changes the ids", "damaged header": "not an image", "latin-1 classes": "not UTF-8 text", "16 bit": r"labels/frame_2.png: a label must be an 8-bit", "no images folder": r"images: there is no such folder",
          "empty folder": r"images: no .png or .jpg", "no classes": r"classes.txt: there is no such file", "double": "second image of the same name"}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_data_is_a_sentence_and_exit_code_2(what, tmp_path):
    spec = write_folder(tmp_path / "set")
    break_images(tmp_path / "set", what)
    with pytest.raises(DatasetError, match=BROKEN[what]) as caught:
        dataset = open_dataset(spec, "train")
        [dataset[i] for i in range(len(dataset))]
    assert "\n" not in str(caught.value)
    if what in ("label id", "no classes"):
        output = command("data.py", spec, "--sheet", tmp_path / "sheet.png", code=2)
        assert str(caught.value) in output


@pytest.mark.parametrize("spec", ["camvid:/nowhere/at/all", "camvid", "toy:x", "pascal:x", "folder:"])
def test_wrong_specs_are_a_sentence(spec):
    with pytest.raises(DatasetError, match="no such folder|unknown data"):
        open_dataset(spec, "train")
    with pytest.raises(DatasetError, match="unknown split"):
        open_dataset("toy", "training")


def test_missing_parts_say_what_was_looked_for(tmp_path):
    for kind, missing in (("camvid", "train"), ("cityscapes", "leftImg8bit/train")):
        with pytest.raises(DatasetError, match=f"{missing}: there is no such folder .looked for"):
            open_dataset(f"{kind}:{tmp_path}", "train")


def test_check_command_sees_half_a_split_and_odd_names(tmp_path):
    spec = write_camvid(tmp_path / "camvid")
    shutil.rmtree(tmp_path / "camvid" / "valannot")
    assert "valannot: there is no such folder" in command("data.py", spec, "--sheet", tmp_path / "sheet.png", code=2)
    assert "unknown file extension" in command("data.py", "toy", "--split", "val", "--sheet", tmp_path / "sheet", code=2)
    spec = write_folder(tmp_path / "set")
    (tmp_path / "set" / "classes.txt").write_text("road\nsky\ncar\n", encoding="utf-8-sig")
    assert open_dataset(spec, "train").classes[0] == "road" and "no test split" in command("data.py", spec, "--sheet", tmp_path / "sheet.png")


def test_check_command_finds_everything_in_one_pass(tmp_path):
    spec = write_folder(tmp_path / "set")
    for what in ("label id", "truncated"):
        break_images(tmp_path / "set", what)
    save(tmp_path / "set" / "labels" / "frame_0.png", np.full((40, 48), 9, np.uint8))
    output = command("data.py", spec, "--sheet", tmp_path / "sheet.png", code=2)
    assert "label id 77" in output and "label id 9" in output and (tmp_path / "sheet.png").exists()
    output = command("data.py", "toy", "--split", "val", "--sheet", tmp_path / "toy.png")
    assert "toy val: 50 frames of 256x128 (50); 8 of 8 classes met" in output and Image.open(tmp_path / "toy.png").width > 900


def test_photos_are_turned_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                              # turn by 90 degrees to look at it
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg", upright=True).shape == (40, 20, 3)
    with pytest.raises(DatasetError, match="EXIF orientation 6"):                   # of a data set: which way up is its label?
        read_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("name", ["model", "losses", "data"])
def test_files_made_to_be_copied_import_alone(name, tmp_path):
    shutil.copy(data.__file__.replace("data.py", f"{name}.py"), tmp_path)
    command("-c", f"import {name}", cwd=tmp_path, env={"PYTHONPATH": ""})
    assert sys.version_info >= (3, 11)


@pytest.mark.parametrize("layout", ["kaggle", "original"])
def test_camvid_in_colours_is_read_as_the_eleven_classes(layout, tmp_path):
    colours = [(colour, IGNORE if name == "Void" else list(data.CAMVID).index(name)) for name, group in data.CAMVID_COLOURS.items() for colour in group]
    assert len(colours) == len(dict(colours)) == 32
    picture, truth = np.array([[c for c, _ in colours]] * 40, np.uint8), [i for _, i in colours]
    stems = {"train": "0001TP_006690", "val": "0016E5_07959", "test": "Seq05VD_f00000"}
    for split, stem in stems.items():
        images, labels = (f"{split}", f"{split}_labels") if layout == "kaggle" else ("701_StillsRaw_full", "LabeledApproved_full")
        for name, path in ((images, f"{stem}.png"), (labels, f"{stem}_L.png")):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(picture).save(tmp_path / name / path)
    for split, stem in stems.items():
        dataset = open_dataset(f"camvid:{tmp_path}", split)
        assert dataset.stems == [stem] and dataset[0][1].tolist() == [truth] * 40
    picture[3, 3] = 64, 64, 64
    Image.fromarray(picture).save(tmp_path / labels / path)
    with pytest.raises(DatasetError, match=r"colour \(64, 64, 64\) is none of CamVid's 32"):
        dataset[0]


@pytest.mark.skipif(not CAMVID.is_dir(), reason="no CamVid here")
def test_camvids_split_by_name_is_the_official_one():
    for split in data.SPLITS:
        assert {data.camvid_split(stem) for stem in open_dataset(f"camvid:{CAMVID}", split).stems} == {split}


def broken_image(kind, path):
    """Overwrite the image at `path` (48x40) with one of its kind."""
    good = Image.open(path).convert("RGB")
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "16 bit":
        Image.fromarray(np.zeros((40, 48), np.uint16)).save(path)
    elif kind == "turned":
        exif = Image.Exif()
        exif[data.ORIENTATION] = 6
        good.save(path, exif=exif)
    elif kind == "gigapixel":
        head = bytearray(path.read_bytes())
        head[16:24] = struct.pack(">II", 60_000, 60_000)
        head[29:33] = struct.pack(">I", zlib.crc32(bytes(head[12:29])))
        path.write_bytes(head)
    elif kind == "animated":
        good.save(path, save_all=True, append_images=[Image.new("RGB", good.size, (i, 0, 0)) for i in (1, 2)])
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "link in a circle":
        path.unlink()
        path.symlink_to(path.name)
    elif kind == "folder":
        path.unlink()
        path.mkdir()


BROKEN_IMAGES = {"truncated": "not an image", "empty": "not an image", "16 bit": "8 bits a channel", "turned": "EXIF orientation 6", "gigapixel": "not an image",
                 "animated": "an animation of 3 pictures", "text": "not an image", "link in a circle": "frame_3.png", "folder": "not an image"}


@pytest.mark.parametrize("kind", BROKEN_IMAGES)
def test_broken_images_are_known_at_the_start(kind, folder):
    """By a read, by the glance at a run's start where head or tail tell, and by the check, which goes on to the next file."""
    path = Path(folder.partition(":")[2]) / "images" / "frame_3.png"
    broken_image(kind, path)
    with pytest.raises(DatasetError, match=BROKEN_IMAGES[kind]) as caught:
        open_dataset(folder, "train")[3]
    assert "frame_3.png" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DatasetError, match=BROKEN_IMAGES[kind]):
        open_dataset(folder, "train").glance()
    assert len(data.check(open_dataset(folder, "train"))[2]) == 1


@pytest.mark.parametrize("mode, suffix", [("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("L", "png"), ("1", "png"), ("RGB", "jpg")])
def test_unusual_images_are_read_as_rgb(mode, suffix, tmp_path):
    Image.new("RGB", (48, 40), (204, 51, 0)).convert(mode).save(tmp_path / f"ü b.{suffix}")
    image = data.read_picture(tmp_path / f"ü b.{suffix}")
    assert image.shape == (40, 48, 3) and image.dtype == np.uint8
    if mode in ("P", "RGBA", "CMYK", "RGB"):
        assert np.abs(image.astype(int) - [204, 51, 0]).max() < 30


def test_the_suffix_may_lie_about_an_image_but_not_about_a_label(tmp_path):
    Image.new("RGB", (48, 40), (200, 30, 60)).save(tmp_path / "x.png", format="JPEG")
    assert data.read_picture(tmp_path / "x.png").shape == (40, 48, 3)
    Image.new("L", (48, 40)).save(tmp_path / "y.png", format="JPEG")
    with pytest.raises(DatasetError, match="JPEG changes the ids"):
        data.read_picture(tmp_path / "y.png", "ids")


# ---------------------------------------------------------------- the cache

def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_cached_frames_equal_decoded_ones_and_are_decoded_once(folder, tmp_path, monkeypatch):
    plain, cached = open_dataset(folder, "train"), open_dataset(folder, "train", cache=tmp_path / "cache")
    assert all(same(plain[i], cached[i]) for i in range(len(plain)))              # the first time: written
    monkeypatch.setattr(data, "read_picture", lambda *args, **kwargs: pytest.fail("decoded again"))
    again = open_dataset(folder, "train", cache=tmp_path / "cache")
    image, label = again[0]
    image += 1                                                    # what is read is the reader's own
    monkeypatch.undo()
    assert all(same(plain[i], again[i]) for i in range(len(plain)))
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".frame"] * len(plain)


@pytest.mark.parametrize("which", [0, 1])
def test_a_changed_file_is_decoded_again(folder, tmp_path, which):
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")
    before, path = [part.clone() for part in dataset[0]], dataset.paths[0][which]
    Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    after = dataset[0]
    assert (after[which] == 0).all() and not torch.equal(before[which], after[which]) and torch.equal(before[1 - which], after[1 - which])
    assert len(list((tmp_path / "cache").iterdir())) == 1         # the old one is replaced, not left


@pytest.mark.parametrize("damage", ["empty", "truncated", "longer", "foreign"])
def test_a_damaged_cache_file_is_written_anew(folder, tmp_path, damage):
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")
    expected, file = [part.clone() for part in dataset[0]], dataset.cache.files[0]
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "truncated": content[:-1], "longer": content + b"0", "foreign": b"x" * len(content)}[damage])
    assert same(expected, dataset[0]) and file.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_a_sentence(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="file: no folder for decoded frames can be made there"):
        open_dataset(folder, "train", cache=tmp_path / "file")
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data.os, "fsync", full)
    with pytest.raises(DatasetError, match=r"cache: a decoded frame cannot be kept there \(No space left on device\); make room"):
        dataset[0]
    assert not list((tmp_path / "cache").iterdir())


def test_a_broken_frame_is_refused_with_a_cache_too(folder, tmp_path):
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")
    image = dataset.paths[0][0]
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(image)
    for _ in range(2):
        with pytest.raises(DatasetError, match=f"{image.name}: the image has 3x3 pixels"):
            dataset[0]
    image.unlink()
    with pytest.raises(DatasetError, match=f"{image.name}: there is no such file"):
        dataset[0]


def test_processes_share_a_cache(folder, tmp_path):
    """Four of them begin at once, each frame is whole for each of them."""
    plain, cached = open_dataset(folder, "train"), open_dataset(folder, "train", cache=tmp_path / "cache")
    order = list(range(len(plain))) * 4
    loader = torch.utils.data.DataLoader(cached, batch_sampler=[[i] for i in sorted(order)], num_workers=4, collate_fn=lambda batch: batch[0])
    assert all(same(plain[i], item) for i, item in zip(sorted(order), loader))
    assert len(list((tmp_path / "cache").iterdir())) == len(plain)
