"""The data sets on small trees written here, real CamVid where it is, folds, augmentation, the
stream, and every bad input."""

import hashlib
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from conftest import CAMVID, command, write_folder
from data import (
    CITYSCAPES,
    IGNORE,
    Augment,
    DatasetError,
    Stream,
    choose_crop,
    distinct_colours,
    open_dataset,
    pixel_counts,
    read_picture,
)
from extras.camvid_original import CAMVID_COLOURS, split_of
from extras.toy_scenes import draw_scene
from small_datasets import (
    BROKEN_FOLDERS,
    BROKEN_IMAGES,
    break_folder,
    break_image,
    same,
    save,
    write_camvid,
    write_cityscapes,
    write_cityscapes_frame,
)

real_camvid = pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not in ../shared/camvid")


def sha(*arrays):
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return hashlib.sha256(content).hexdigest()[:16]


# ---------------------------------------------------------------- reading

def test_toy_is_deterministic_imbalanced_and_quick():
    train = open_dataset("toy", "train")
    again = open_dataset("toy", "train")
    image, label = train[3]
    assert image.shape == (3, 128, 256) and label.shape == (128, 256)
    assert image.dtype == label.dtype == torch.uint8
    assert same(train[3], again[3])
    assert not torch.equal(train[3][0], train[4][0])
    assert not torch.equal(train[3][0], open_dataset("toy", "val")[3][0])
    start = time.perf_counter()
    counts = pixel_counts(open_dataset("toy", "val"))
    assert time.perf_counter() - start < 5                        # 50 scenes; 0.2 s on a quiet core
    assert (counts > 0).all() and counts.max() > 20 * counts.min() and (label == IGNORE).any()
    assert torch.equal(label, torch.from_numpy(train.read_label(3)))


@pytest.mark.parametrize("stem, size, expected", [
    ("train-0000", (128, 256), "699fbe0a34f724f8"),
    ("train-0399", (128, 256), "0150a20cce0d1f68"),
    ("val-0007", (128, 256), "8ae74b9368d283da"),
    ("test-0049", (128, 256), "0351c48a5f5cbca1"),
    ("x", (64, 96), "f1d8c12a912123db")])
def test_toy_scenes_are_those_of_the_first_version(stem, size, expected):
    """Pixel for pixel: results on toy, and runs that are resumed, hang on it."""
    image, label = draw_scene(stem, size)
    assert sha(image, label) == expected


def test_camvid_layout(tmp_path):
    for suffix in (".png", ".jpg"):
        spec = write_camvid(tmp_path / suffix[1:], suffix)
        dataset = open_dataset(spec, "train")
        image, label = dataset[0]
        assert dataset.stems == ["A_001", "A_002", "B_001"]
        assert len(dataset.classes) == len(dataset.palette) == 11
        assert image.shape == (3, 36, 48)
        assert set(label.unique().tolist()) == {*range(11), IGNORE}         # 11 -> void


def test_cityscapes_raw_ids_become_the_19_classes(tmp_path):
    dataset = open_dataset(write_cityscapes(tmp_path), "train")
    _, label = dataset[0]
    by_raw = {raw: i for i, (raw, _, _) in enumerate(CITYSCAPES.values())}
    assert label[:, 0].tolist() == [by_raw.get(raw, IGNORE) for raw in range(34)]
    assert dataset.classes[by_raw[26]] == "car" and dataset.classes[by_raw[7]] == "road"
    assert len(dataset.classes) == 19


def test_cityscapes_train_ids_win_where_present(tmp_path):
    dataset = open_dataset(write_cityscapes(tmp_path, train_ids=True), "val")
    assert dataset[0][1].unique().tolist() == [18] and len(dataset) == 2


def test_cityscapes_secret_test_labels_cannot_be_scored(tmp_path):
    """Defect 7: a table of dashes. Dummies of void stand for them, or nothing at all."""
    spec = write_cityscapes(tmp_path)
    dummy = np.repeat(np.arange(4, dtype=np.uint8), 10)[:, None].repeat(64, 1)
    write_cityscapes_frame(tmp_path, "test", "berlin_000000_000019", dummy)
    for _ in range(2):
        with pytest.raises(DatasetError, match="keeps the labels of its test split to itself: "
                                               "score on val, or predict") as caught:
            open_dataset(spec, "test")
        assert "\n" not in str(caught.value)
        shutil.rmtree(tmp_path / "gtFine" / "test", ignore_errors=True)
    held_out = [open_dataset(spec, "test", fold=fold, folds=3).stems for fold in range(3)]
    assert len(set(sum(held_out, []))) == 6                       # folds never needed them


def test_own_test_labels_in_the_cityscapes_layout_are_read(tmp_path):
    spec = write_cityscapes(tmp_path)
    real = np.full((34, 64), 7, np.uint8)
    write_cityscapes_frame(tmp_path, "test", "berlin_000000_000019", real)
    assert (open_dataset(spec, "test")[0][1] == 0).all()          # raw 7 is road


def test_folder_layout_splits_and_colours(tmp_path):
    spec = write_folder(tmp_path, frames=10)
    assert open_dataset(spec, "train").stems == [f"frame_{i}" for i in range(8)]
    assert open_dataset(spec, "val").stems == ["frame_8", "frame_9"]
    (tmp_path / "train.txt").write_text("frame_1\nframe_5\n")
    (tmp_path / "val.txt").write_text("frame_0\n")
    for colour in ("128 64 256", "128,64,128", "128, 64, 128,"):
        (tmp_path / "classes.txt").write_text(f"car\nroad {colour}\n")
        with pytest.raises(DatasetError, match=f"'road {colour}': a colour is three numbers"):
            data.read_classes(tmp_path)
    (tmp_path / "classes.txt").write_text("a thing 1 2 3\nroad\n\nsky 255 0 9\n")
    dataset = open_dataset(spec, "train")
    assert dataset.stems == ["frame_1", "frame_5"]
    assert dataset.classes == ["a thing", "road", "sky"]
    assert dataset.palette == [(1, 2, 3), distinct_colours(3)[1], (255, 0, 9)]
    with pytest.raises(DatasetError, match="test.txt"):
        open_dataset(spec, "test")


def test_lists_choose_frames_before_they_are_paired(tmp_path):
    """A photo that nobody has labelled yet, in no list, is nobody's business."""
    spec = write_folder(tmp_path, frames=8)
    (tmp_path / "labels" / "frame_6.png").unlink()
    (tmp_path / "images" / "frame_7.png").unlink()
    with pytest.raises(DatasetError, match="images/frame_6.png: this image has no label"):
        open_dataset(spec, "train")
    (tmp_path / "train.txt").write_text("frame_1\nframe_2\nframe_0\n")
    (tmp_path / "val.txt").write_text("frame_5\n")
    assert open_dataset(spec, "train").stems == ["frame_1", "frame_2", "frame_0"]
    assert open_dataset(spec, "val").stems == ["frame_5"]
    stems = open_dataset(spec, "train", fold=0).stems + open_dataset(spec, "val", fold=0).stems
    assert sorted(stems) == [f"frame_{i}" for i in range(6)]      # all that have both


@pytest.mark.parametrize("stem, what", [("frame_6", "label"), ("frame_7", "image"),
                                        ("frame_0.png", "image")])
def test_a_listed_frame_needs_its_image_and_its_label(stem, what, tmp_path):
    spec = write_folder(tmp_path, frames=8)
    (tmp_path / "labels" / "frame_6.png").unlink()
    (tmp_path / "images" / "frame_7.png").unlink()
    (tmp_path / "train.txt").write_text(f"frame_1\n{stem}\n")
    (tmp_path / "val.txt").write_text("frame_5\n")
    sentence = f"train.txt: no {what} has the stem '{stem}', its name without .png .1 such"
    for fold in (None, 0):
        with pytest.raises(DatasetError, match=sentence):
            open_dataset(spec, "train", fold=fold)
    assert open_dataset(spec, "val").stems == ["frame_5"]         # whose own frames are whole


def test_a_background_class_is_grey_unless_it_says_otherwise(tmp_path):
    """Defect 8: the first of the distinct colours is a bright red."""
    spec = write_folder(tmp_path)
    first, second, third = distinct_colours(3)
    for background in ("background", "Other", "_background_", "VOID"):
        (tmp_path / "classes.txt").write_text(f"{background}\nroad\ncar\n")
        dataset = open_dataset(spec, "train")
        assert dataset.palette == [data.NEUTRAL, second, third]
        assert dataset.classes[0] == background
    (tmp_path / "classes.txt").write_text("background 9 8 7\nback\nother car\n")
    assert open_dataset(spec, "train").palette == [(9, 8, 7), second, third]


def test_a_folder_with_camvids_class_names_is_not_read_as_camvid(tmp_path):
    spec = write_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(data.CAMVID))
    assert open_dataset(spec, "train").classes == list(data.CAMVID)
    label = tmp_path / "labels" / "frame_0.png"
    size = np.asarray(Image.open(label)).shape
    save(label, np.full((*size, 3), 128, np.uint8))               # all sky, in CamVid's colours
    dataset = open_dataset(spec, "train")
    for look in (lambda: dataset[0], dataset.quick_check):
        with pytest.raises(DatasetError, match="a label must be an 8-bit image of class ids"):
            look()


def test_transform_is_applied(folder):
    def corner(image, label):
        return image[:, :8, :8], label[:8, :8]

    image, label = open_dataset(folder, "train", transform=corner)[0]
    assert image.shape == (3, 8, 8) and label.shape == (8, 8)


def test_size_replaces_the_data_sets_own(folder, tmp_path):
    camvid = write_camvid(tmp_path / "camvid")
    assert open_dataset(camvid, "train").size == (288, 384)
    assert open_dataset(folder, "train").size is None
    for spec in (camvid, folder, "toy"):
        dataset = open_dataset(spec, "train", size=[96, 128])
        assert dataset.size == (96, 128)
        assert same(dataset[0], open_dataset(spec, "train")[0])   # the frames stay as they are


@real_camvid
def test_real_camvid():
    spec = f"camvid:{CAMVID}"
    splits = [open_dataset(spec, split) for split in data.SPLITS]
    assert [len(dataset) for dataset in splits] == [367, 101, 233]
    counts = sum(pixel_counts(dataset) for dataset in splits)
    shares = (100 * counts / counts.sum()).round(1).tolist()
    expected = [16.4, 25.0, 1.0, 30.4, 6.9, 11.6, 1.1, 1.5, 4.8, 0.7, 0.6]
    assert shares == pytest.approx(expected, abs=0.051)
    drives = []
    for split, fold in (("train", 0), ("val", 0), ("train", 1), ("val", 1)):
        stems = open_dataset(spec, split, fold=fold).stems
        drives.append({stem.split("_")[0] for stem in stems})
    assert not drives[0] & drives[1] and not drives[2] & drives[3] and drives[0] == drives[3]
    folds = [open_dataset(spec, split, fold=0) for split in ("train", "val")]
    assert len(folds[0]) + len(folds[1]) == 701


# ---------------------------------------------------------------- CamVid in colours

def write_camvid_in_colours(root, layout):
    """A frame for each split, every colour a column -> {split: stem}, the classes of the columns,
    the path of the last label."""
    columns = []
    for name, group in CAMVID_COLOURS.items():
        class_id = IGNORE if name == "Void" else list(data.CAMVID).index(name)
        columns += [(colour, class_id) for colour in group]
    assert len(columns) == len(dict(columns)) == 32
    picture = np.array([[colour for colour, _ in columns]] * 40, np.uint8)
    stems = {"train": "0001TP_006690", "val": "0016E5_07959", "test": "Seq05VD_f00000"}
    for split, stem in stems.items():
        if layout == "kaggle":
            images, labels = root / split, root / f"{split}_labels"
        else:
            images, labels = root / "701_StillsRaw_full", root / "LabeledApproved_full"
        save(images / f"{stem}.png", picture)
        save(labels / f"{stem}_L.png", picture)
    return stems, [class_id for _, class_id in columns], labels / f"{stem}_L.png"


@pytest.mark.parametrize("layout", ["kaggle", "original"])
def test_camvid_in_colours_is_read_as_the_eleven_classes(layout, tmp_path):
    stems, truth, last_label = write_camvid_in_colours(tmp_path, layout)
    for split, stem in stems.items():
        dataset = open_dataset(f"camvid:{tmp_path}", split)
        assert dataset.stems == [stem] and dataset[0][1].tolist() == [truth] * 40
        dataset.quick_check()
    picture = np.array(Image.open(last_label))
    picture[3, 3] = 64, 64, 64
    save(last_label, picture)
    with pytest.raises(DatasetError, match=r"colour \(64, 64, 64\) is none of CamVid's 32"):
        dataset[0]


@pytest.mark.parametrize("layout", ["kaggle", "original"])
def test_camvid_in_colours_with_a_palette_is_read_by_them(layout, tmp_path):
    """As a program that makes files smaller saves it: the pixels are places in a palette."""
    stems, truth, _ = write_camvid_in_colours(tmp_path, layout)
    for path in tmp_path.glob("*/*_L.png"):
        picture = Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE)
        assert len(np.unique(picture)) == 32
        picture.save(path, optimize=True)
        assert Image.open(path).mode == "P"
    for split, stem in stems.items():
        dataset = open_dataset(f"camvid:{tmp_path}", split)
        dataset.quick_check()
        assert dataset.stems == [stem] and dataset[0][1].tolist() == [truth] * 40


def save_with_palette(path, ids, palette):
    """palette: [(red, green, blue)]"""
    picture = Image.new("P", ids.shape[::-1])
    picture.putdata(ids.ravel().tolist())
    picture.putpalette(np.array(palette, np.uint8).ravel().tolist())
    picture.save(path)


VOCS = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]


@pytest.mark.parametrize("palette", [
    VOCS, [(i, i, i) for i in range(6)], [(i, i, i) for i in range(6)] + [(0, 0, 0)] * 9])
@pytest.mark.parametrize("kind", ["camvid", "folder"])
def test_ids_with_a_palette_of_other_colours_are_ids(kind, palette, tmp_path):
    spec = write_camvid(tmp_path) if kind == "camvid" else write_folder(tmp_path, classes=6)
    dataset = open_dataset(spec, "train")
    path = dataset.paths[0][1]
    ids = np.asarray(Image.open(path)) % 6
    save_with_palette(path, ids, palette)
    dataset.quick_check()
    assert (dataset[0][1].numpy() == ids).all()


@pytest.mark.parametrize("palette", [[3, 0, 1], [0, 1, 255], [0, 40, 80]])
def test_greys_that_are_not_their_places_are_refused(palette, tmp_path):
    """A grey .png of ids that was made smaller, or ids with greys to look at: which is it?"""
    dataset = open_dataset(write_folder(tmp_path, classes=6), "train")
    ids = np.arange(3).repeat(640).reshape(40, 48).astype(np.uint8)
    path = dataset.paths[0][1]
    save_with_palette(path, ids, [(grey, grey, grey) for grey in palette])
    for look in (dataset.quick_check, lambda: dataset[0]):
        with pytest.raises(DatasetError, match=f"{path}: its palette shows index . as grey"):
            look()


def test_a_split_without_frames_is_a_sentence(tmp_path):
    write_camvid_in_colours(tmp_path, "original")
    for path in tmp_path.glob("*/0016E5_*"):
        path.unlink()
    with pytest.raises(DatasetError, match="none of its frames belongs to val"):
        open_dataset(f"camvid:{tmp_path}", "val")


@real_camvid
def test_camvids_split_by_name_is_the_official_one():
    for split in data.SPLITS:
        stems = open_dataset(f"camvid:{CAMVID}", split).stems
        assert {split_of(stem) for stem in stems} == {split}


# ---------------------------------------------------------------- folds

def test_folds_are_whole_drives_where_stems_tell(tmp_path):
    spec = write_camvid(tmp_path)
    held_out = [open_dataset(spec, "val", fold=fold, folds=3).stems for fold in range(3)]
    drives = [["A_001", "A_002", "A_003"], ["B_001"], ["C_001", "C_002"]]
    assert sorted(map(sorted, held_out)) == drives
    for fold in range(3):
        train = open_dataset(spec, "train", fold=fold, folds=3).stems
        assert sorted(train + held_out[fold]) == sum(drives, [])
    with pytest.raises(DatasetError, match="3 drives cannot make 4 folds"):
        open_dataset(spec, "val", fold=0, folds=4)


def test_train_and_val_together_are_of_the_datas_own_splits():
    assert len(open_dataset("toy", "train+val")) > len(open_dataset("toy", "train"))
    with pytest.raises(DatasetError, match="a fold has train, val and test"):
        open_dataset("toy", "train+val", fold=0)


def test_frames_without_drives_make_no_folds_of_drives():
    """Or every frame would be a drive, its neighbours elsewhere."""
    open_dataset("toy", "val", fold=0)
    with pytest.raises(DatasetError, match="tell no drives"):
        open_dataset("toy", "val", fold=0, fold_by="drive")
    with pytest.raises(DatasetError, match="tell no drives"):
        data.held_out_stems([f"{i:04d}" for i in range(10)], 0, 2, "drive")


def test_folds_are_blocks_elsewhere_and_shuffling_warns(tmp_path):
    spec = write_folder(tmp_path, frames=10)
    held_out = open_dataset(spec, "val", fold=1, folds=2).stems
    assert held_out == [f"frame_{i}" for i in range(5, 10)]
    with pytest.warns(UserWarning, match="leak"):
        first = set(open_dataset(spec, "val", fold=0, folds=2, fold_by="shuffle").stems)
        second = set(open_dataset(spec, "val", fold=1, folds=2, fold_by="shuffle").stems)
    assert not first & second and len(first | second) == 10
    assert first != {f"frame_{i}" for i in range(5)}
    for fold in (-1, 2):
        with pytest.raises(DatasetError, match="does not exist"):
            open_dataset(spec, "val", fold=fold, folds=2)


# ---------------------------------------------------------------- augmentation

def scene():
    """Image and label that tell of each other: every channel is forty times the class."""
    classes = np.random.default_rng(0).integers(0, 5, (4, 5)).astype(np.uint8)
    label = torch.from_numpy(classes.repeat(16, 0).repeat(16, 1))
    return torch.stack([label * 40, label * 40, label * 40]), label


def misplaced(image, label):
    """Share of the pixels, one pixel or more away from any border of classes, whose image and label
    do not agree."""
    wide = label.float()[None]
    highest = F.max_pool2d(wide, 3, stride=1, padding=1)
    lowest = -F.max_pool2d(-wide, 3, stride=1, padding=1)
    inside = (highest == lowest)[0] & (label != IGNORE)
    return ((image[0].float() - label * 40.0)[inside].abs() > 12).float().mean().item()


@pytest.mark.parametrize("recipe, crop", [("segformer", (32, 48)), ("segformer", (96, 120)),
                                          ("plain", (64, 80)), ("plain", (48, 56))])
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
        if not valid.all():                                       # padded, below and to the right
            assert image[:, ~valid].unique(dim=1).flatten().tolist() == list(data.PAD)
    assert max(together) < 0.005 and np.median(shifted) > 0.02    # two pixels would be seen


def test_scale_range_flip_and_plain_recipe():
    image, label = scene()
    augment = Augment((200, 200), (64, 80), (0.5, 2.0))
    sizes = set()
    for seed in range(30):
        _, scaled = augment(image, label, np.random.default_rng(seed))
        sizes.add(int((scaled != IGNORE).sum()))
    assert min(sizes) < 0.5 * 64 * 80 and max(sizes) > 2 * 64 * 80

    augment = Augment((64, 80), recipe="plain")
    flips = 0
    for seed in range(12):
        result = augment(image, label, np.random.default_rng(seed))
        is_same = same(result, (image, label))
        is_flipped = same(result, (image.flip(2), label.flip(1)))
        assert is_same != is_flipped
        flips += is_flipped
    assert 0 < flips < 12


def test_crop_avoids_one_class_filling_it():
    label = np.zeros((64, 64), np.uint8)
    label[:, 48:] = np.arange(16)                                 # only the right quarter is varied
    shares = []
    for seed in range(40):
        top, left = choose_crop(label, (32, 32), np.random.default_rng(seed))
        assert 0 <= top <= 32 and 0 <= left <= 32
        shares.append((label[top:top + 32, left:left + 32] == 0).mean())
    anywhere = [(label[:32, left:left + 32] == 0).mean() for left in range(33)]
    assert np.mean(np.array(shares) <= 0.75) > 0.95
    assert np.mean(np.array(anywhere) <= 0.75) < 0.6


def test_photometric_distortion_changes_colours_only_within_bounds():
    colour = (120, 100, 80)
    flat = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    results = [data.distort(flat, np.random.default_rng(seed)) for seed in range(300)]
    pixels = np.array([result[:, 0, 0].tolist() for result in results])
    unchanged = (pixels == colour).all(1).mean()
    assert 0.01 < unchanged < 0.2                                 # four coins: one in sixteen
    assert pixels.min() >= 0 and pixels.max() > 180
    red, green, blue = pixels.T
    place = (green - blue) / (red - blue)                         # the hue
    assert place.min() < 0.3 and place.max() > 0.7
    luminance = pixels @ data.LUMINANCE                           # the hue's turn moves it a little
    assert luminance.max() <= 1.5 * (104 + 32) + 12 and luminance.min() >= 0.5 * (104 - 32) - 12


class Coins:
    """In place of a generator: only one of the four distortions is done, at `value`."""

    def __init__(self, which, value):
        self.coins = iter([0.0 if i == which else 1.0 for i in range(4)])
        self.value = value

    def random(self):
        return next(self.coins)

    def uniform(self, low, high):
        assert low <= self.value <= high
        return self.value


def half_as_saturated(pixel):
    luminance = pixel @ np.array([0.299, 0.587, 0.114])
    return 0.5 * pixel + 0.5 * luminance


@pytest.mark.parametrize("which, value, expected", [
    (0, 20, lambda pixel: pixel + 20),
    (1, 1.5, lambda pixel: 1.5 * pixel),
    (2, 0.5, half_as_saturated)])
def test_each_distortion_is_its_formula(which, value, expected):
    image = torch.from_numpy(np.random.default_rng(0).integers(60, 150, (3, 5, 7)).astype(np.uint8))
    result = data.distort(image, Coins(which, value)).numpy().astype(float)
    for y, x in np.ndindex(5, 7):
        pixel = image[:, y, x].numpy().astype(float)
        assert np.abs(result[:, y, x] - expected(pixel)).max() <= 1


def test_the_hue_turns_about_the_grey_axis():
    image = torch.from_numpy(np.random.default_rng(0).integers(60, 150, (3, 5, 7)).astype(np.uint8))
    result = data.distort(image, Coins(3, 18)).numpy().astype(float)

    def in_the_plane(red, green, blue):                           # by the hue's definition
        return complex(red - (green + blue) / 2, (green - blue) * 3 ** 0.5 / 2)

    for y, x in np.ndindex(5, 7):
        before = in_the_plane(*image[:, y, x].tolist())
        turned = in_the_plane(*result[:, y, x])
        if abs(before) > 20:
            assert abs(np.degrees(np.angle(turned / before)) - 18) < 4
            assert abs(abs(turned) / abs(before) - 1) < 0.1
        assert abs(result[:, y, x].sum() - image[:, y, x].sum().item()) <= 3


# ---------------------------------------------------------------- the stream

def test_stream_is_a_function_of_seed_and_number(folder):
    dataset = open_dataset(folder, "train")
    forward = Stream(dataset, Augment((32, 32)))
    backward = Stream(dataset, Augment((32, 32)))
    other = Stream(dataset, Augment((32, 32)), seed=1)
    samples = [forward[n] for n in range(12)]
    for n in reversed(range(12)):
        assert same(samples[n], backward[n])
    assert not all(torch.equal(samples[n][0], other[n][0]) for n in range(12))


def test_stream_visits_every_frame_once_an_epoch():
    frames = [(i, i) for i in range(6)]
    stream = Stream(frames, lambda image, label, rng: image, 3)
    seen = []
    for epoch in range(3):
        seen.append([stream[6 * epoch + i] for i in range(6)])
        assert sorted(seen[-1]) == list(range(6))
    assert seen[0] != seen[1] or seen[1] != seen[2]


@pytest.mark.parametrize("split, augment, expected", [
    ("train", Augment((96, 128), (128, 256)),
     ["ebe42a5c8362f1b3", "ff50b05374a35c10", "9a0ff3cc199485d6"]),
    ("val", Augment((160, 200)),
     ["e4bb32410d040867", "05d9e44a5ef76cce", "f0bfcdbc7bb8bc19"]),
    ("train", Augment((64, 100), recipe="plain"),
     ["34bb77fe4634a605", "903341bb4ab8629f", "c3deb6bb8a544175"])])
def test_stream_is_that_of_the_first_version(split, augment, expected):
    """A run that was begun with it resumes to the bit. The labels tell which frame, window, scale
    and flip were drawn; images are left to the same numbers, as other CPUs round them otherwise."""
    stream = Stream(open_dataset("toy", split), augment, seed=3)
    assert [sha(stream[n][1].numpy()) for n in (0, 1, 777)] == expected


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("what", BROKEN_FOLDERS)
def test_broken_data_is_a_sentence(what, tmp_path):
    spec = write_folder(tmp_path / "set")
    break_folder(tmp_path / "set", what)
    with pytest.raises(DatasetError, match=BROKEN_FOLDERS[what]) as caught:
        dataset = open_dataset(spec, "train")
        [dataset[i] for i in range(len(dataset))]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["camvid:/nowhere/at/all", "camvid", "toy:x", "pascal:x",
                                  "folder:"])
def test_wrong_specs_are_a_sentence(spec):
    with pytest.raises(DatasetError, match="no such folder|unknown data"):
        open_dataset(spec, "train")
    with pytest.raises(DatasetError, match="unknown split"):
        open_dataset("toy", "training")


def test_missing_parts_say_what_was_looked_for(tmp_path):
    for kind, missing in (("camvid", "train"), ("cityscapes", "leftImg8bit/train")):
        with pytest.raises(DatasetError, match=f"{missing}: there is no such folder .looked for"):
            open_dataset(f"{kind}:{tmp_path}", "train")


@pytest.mark.parametrize("kind", BROKEN_IMAGES)
def test_broken_images_are_known_at_the_start(kind, folder):
    """By a read, and by the quick check at a run's start where head or tail tell."""
    break_image(kind, Path(folder.partition(":")[2]) / "images" / "frame_3.png")
    with pytest.raises(DatasetError, match=BROKEN_IMAGES[kind]) as caught:
        open_dataset(folder, "train")[3]
    assert "frame_3.png" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DatasetError, match=BROKEN_IMAGES[kind]):
        open_dataset(folder, "train").quick_check()


def test_the_quick_check_sees_sizes_that_differ(folder):
    break_folder(Path(folder.partition(":")[2]), "sizes")
    with pytest.raises(DatasetError, match=BROKEN_FOLDERS["sizes"]):
        open_dataset(folder, "train").quick_check()


# ---------------------------------------------------------------- pictures

def test_photos_are_turned_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                              # turn by 90 degrees to look at it
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg", upright=True).shape == (40, 20, 3)
    with pytest.raises(DatasetError, match="EXIF orientation 6"):          # which way is its label?
        read_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("mode, suffix", [("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"),
                                          ("L", "png"), ("1", "png"), ("RGB", "jpg")])
def test_unusual_images_are_read_as_rgb(mode, suffix, tmp_path):
    path = tmp_path / f"ü b.{suffix}"
    Image.new("RGB", (48, 40), (204, 51, 0)).convert(mode).save(path)
    image = read_picture(path)
    assert image.shape == (40, 48, 3) and image.dtype == np.uint8
    if mode in ("P", "RGBA", "CMYK", "RGB"):
        assert np.abs(image.astype(int) - [204, 51, 0]).max() < 30


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    picture = Image.new("RGB", (48, 40), (204, 51, 0)).convert("P")
    picture.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert (read_picture(tmp_path / "a.png", upright=True) == [204, 51, 0]).all()


def test_an_image_that_is_too_large_is_a_sentence(monkeypatch, tmp_path):
    Image.new("RGB", (2000, 1500)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(DatasetError, match="a.jpg: over 2 megapixels, .*: cut it into parts"):
        read_picture(tmp_path / "a.jpg", upright=True)


def test_the_suffix_may_lie_about_an_image_but_not_about_a_label(tmp_path):
    Image.new("RGB", (48, 40), (200, 30, 60)).save(tmp_path / "x.png", format="JPEG")
    assert read_picture(tmp_path / "x.png").shape == (40, 48, 3)
    Image.new("L", (48, 40)).save(tmp_path / "y.png", format="JPEG")
    with pytest.raises(DatasetError, match="JPEG changes the ids"):
        read_picture(tmp_path / "y.png", "ids")


# ---------------------------------------------------------------- copied out alone

@pytest.mark.parametrize("name", ["model", "losses", "data"])
def test_files_made_to_be_copied_import_alone(name, tmp_path):
    shutil.copy(data.__file__.replace("data.py", f"{name}.py"), tmp_path)
    command("-c", f"import {name}", cwd=tmp_path, env={"PYTHONPATH": ""})
    assert sys.version_info >= (3, 11)


ALONE = """
import sys
from data import Augment, DatasetError, Stream, open_dataset, pixel_counts

folder, camvid, cityscapes = sys.argv[1:]
for spec in (folder, camvid, cityscapes):
    dataset = open_dataset(spec, "train")
    dataset.quick_check()
    assert pixel_counts(dataset).sum() > 0
    image, label = Stream(dataset, Augment((32, 32)))[7]
    assert image.shape == (3, 32, 32)
for spec, cache in (("toy", None), (folder, "frames")):
    try:
        open_dataset(spec, "train", cache=cache)
    except DatasetError as error:
        print("said:", error)
"""


def test_data_copied_out_alone_says_what_else_to_copy(tmp_path):
    shutil.copy(data.__file__, tmp_path)
    specs = [write_folder(tmp_path / "set"), write_camvid(tmp_path / "camvid"),
             write_cityscapes(tmp_path / "cityscapes")]
    environment = {"PYTHONPATH": "", "XDG_CACHE_HOME": "/dev/null"}
    output = command("-c", ALONE, *specs, cwd=tmp_path, env=environment)
    said = [line for line in output.splitlines() if line.startswith("said:")]
    assert len(said) == 2
    assert "the toy data set needs extras/toy_scenes.py: copy it too" in said[0]
    assert "a cache of decoded frames needs extras/frame_cache.py: copy it too" in said[1]
