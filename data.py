"""Road scenes: toy (drawn, no download), CamVid, Cityscapes, or a folder of your own; folds; the
augmentation; the training stream.

    python data.py camvid:DIR                 # or toy, cityscapes:DIR, folder:DIR: read every file,
                                              # print what is there and what is wrong, and draw
                                              # contact_sheet.png to look at
    dataset = open_dataset("camvid:DIR", "train")
    image, label = dataset[0]                 # uint8 RGB (3, H, W); uint8 (H, W): 0..C-1 and IGNORE

Layouts, all images .png or .jpg:

    camvid:DIR      train/ trainannot/ val/ valannot/ test/ testannot/
                        the SegNet layout: 11 classes, 11 = void
                    train/ train_labels/ val/ val_labels/ test/ test_labels/
                        Kaggle's: *_L.png in 32 colours, mapped to the 11 classes
                    701_StillsRaw_full/ LabeledApproved_full/
                        the original: the same, split as SegNet's
    cityscapes:DIR  leftImg8bit/SPLIT/CITY/*_leftImg8bit.png
                    gtFine/SPLIT/CITY/*_gtFine_labelIds.png
                        raw ids, mapped to the 19 classes here; *_labelTrainIds.png where present
    folder:DIR      images/ labels/           8-bit ids 0..C-1, 255 = void, same stems
                    classes.txt               a line for each class: name [R G B]
                    train.txt val.txt test.txt    if you like: the stems of each split, a line each;
                                              without them the last fifth is val

Video frames are near-duplicates of their neighbours: folds are made of whole drives, or of blocks
of neighbours.

References
  Brostow et al., Semantic object classes in video, 2009 (CamVid)
  Badrinarayanan et al., SegNet, 2017 (its split)
  Cordts et al., The Cityscapes dataset, 2016
  Xie et al., SegFormer, 2021: the augmentation (random scale, crop, flip, photometric distortion)
"""

if __name__ == "__main__":
    # Before torch, whose import takes seconds in which a Ctrl-C may come.
    from extras import quiet_start
    quiet_start.begin()

import colorsys
import contextlib
import importlib
import io
import math
import os
import random
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

IGNORE = 255                                                      # void: counts nowhere
INVALID = 254                                                     # an id that must not occur
SPLITS = ("train", "val", "test")
PAD = (124, 116, 104)                                             # ImageNet's mean colour
LUMINANCE = (0.299, 0.587, 0.114)                                 # of R, G, B (ITU-R BT.601)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
# What a file is taken for, whatever its name. Pillow knows formats that run a program to be read.
FRAME_FORMATS = ("PNG", "JPEG")
PHOTO_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
ORIENTATION = 0x0112                                              # EXIF's tag
MOST_BYTES = 2 ** 30                                              # of a picture's file
BROKEN_PICTURE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)

CAMVID = {
    "Sky": (128, 128, 128), "Building": (128, 0, 0), "Pole": (192, 192, 128),
    "Road": (128, 64, 128), "Pavement": (60, 40, 222), "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128), "Fence": (64, 64, 128), "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0), "Bicyclist": (0, 128, 192)}
CITYSCAPES = {                                  # name: (raw labelId, colour, weight of Table 1)
    "road": (7, (128, 64, 128), 2.5959737), "sidewalk": (8, (244, 35, 232), 6.741505),
    "building": (11, (70, 70, 70), 3.5353868), "wall": (12, (102, 102, 156), 9.866315),
    "fence": (13, (190, 153, 153), 9.690922), "pole": (17, (153, 153, 153), 9.369371),
    "traffic light": (19, (250, 170, 30), 10.289124), "traffic sign": (20, (220, 220, 0), 9.953209),
    "vegetation": (21, (107, 142, 35), 4.3098087), "terrain": (22, (152, 251, 152), 9.490392),
    "sky": (23, (70, 130, 180), 7.674411), "person": (24, (220, 20, 60), 9.396925),
    "rider": (25, (255, 0, 0), 10.347794), "car": (26, (0, 0, 142), 6.3928986),
    "truck": (27, (0, 0, 70), 10.226673), "bus": (28, (0, 60, 100), 10.241072),
    "train": (31, (0, 80, 100), 10.28059), "motorcycle": (32, (0, 0, 230), 10.396977),
    "bicycle": (33, (119, 11, 32), 10.05567)}


class DatasetError(ValueError):
    """Something is wrong with the data; the message is one sentence that names the file."""


class SecretLabels(DatasetError):
    """The labels of this split are not public."""


# ---------------------------------------------------------------- data sets

class Dataset:
    """dataset[i] -> (image uint8 (3, H, W), label uint8 (H, W)), or what `transform` makes of them.

    classes    names, in the order of the ids
    palette    an (R, G, B) for each class
    stems      a name for each frame
    size       the (H, W) that training and scoring resize frames to (dataset[i] does not), or None

    A subclass finds its frames, {stem: where its files are}, and reads them. It defines
    find_frames(split); read_image(i) -> uint8 (H, W, 3); read_label(i) -> uint8 (H, W); and
    where(i) -> its path or name, for error messages.
    """

    fold_by = "block"                                             # how folds are made by default

    def __init__(self, name, colours, size=None):
        self.name = name
        self.classes = list(colours)
        self.palette = [tuple(colour) for colour in colours.values()]
        self.size = size
        self.frames = {}
        self.stems = []
        self.transform = None

    def find_frames(self, split):
        """-> {stem: where its files are} of one split."""
        raise NotImplementedError

    def find_all_frames(self):
        """-> the same of all frames that have labels, to be dealt into folds."""
        return self.join_splits(SPLITS)

    def join_splits(self, splits):
        """-> the frames of several splits. Raises DatasetError for two of one name."""
        frames = {}
        for split in splits:
            for stem, files in self.find_frames(split).items():
                if stem in frames:
                    raise DatasetError(f"{self.name}: two of its splits have a frame {stem!r}, of "
                                       f"which one would be left out: rename one")
                frames[stem] = files
        return frames

    def use_frames(self, frames):
        self.frames = frames
        self.stems = list(frames)

    def use_cache(self, folder):
        """Keep decoded frames in `folder`; drawn scenes need none."""

    def quick_check(self, smallest=1):
        """Raise DatasetError for what a quick look at every frame shows to be broken.

        smallest: pixels that each side of an image must have
        """

    def __len__(self):
        return len(self.stems)

    def __getitem__(self, i):
        image, label = self.read_frame(i)                         # (H, W, 3), (H, W)
        self.check_sizes(i, image.shape[:2], label.shape)
        image = torch.from_numpy(image).permute(2, 0, 1)          # (3, H, W)
        label = torch.from_numpy(label)                           # (H, W)
        if self.transform:
            return self.transform(image, label)
        return image, label

    def read_frame(self, i):
        return self.read_image(i), self.read_label(i)

    def check_sizes(self, i, image_size, label_size):
        if tuple(image_size) != tuple(label_size):
            raise DatasetError(f"{self.where(i)}: "
                               f"the image has {image_size[1]}x{image_size[0]} pixels, "
                               f"its label {label_size[1]}x{label_size[0]}")


class Toy(Dataset):
    """Drawn road scenes; scene i of a split is always the same."""

    def __init__(self):
        toy_scenes = import_extra("toy_scenes", "the toy data set")
        super().__init__("toy", toy_scenes.TOY)
        self.counts = toy_scenes.TOY_COUNTS
        self.draw_scene = toy_scenes.draw_scene

    def find_frames(self, split):
        return {f"{split}-{i:04d}": None for i in range(self.counts[split])}

    def where(self, i):
        return self.stems[i]

    def read_frame(self, i):
        return self.draw_scene(self.stems[i])

    def read_image(self, i):
        return self.read_frame(i)[0]

    def read_label(self, i):
        return self.read_frame(i)[1]


class Files(Dataset):
    """Frames in files below `root`. `ids` maps the ids in label files to classes or IGNORE; any
    other id is an error. Its frames are {stem: (image path, label path)}."""

    label_mode = "ids"                                            # of `read_picture`

    def __init__(self, name, colours, root, ids, size=None):
        super().__init__(name, colours, size)
        self.root = root
        self.lookup = lookup_table(ids)
        self.paths = []
        self.cache = None

    def use_frames(self, frames):
        super().use_frames(frames)
        self.paths = list(frames.values())
        if self.cache:
            self.use_cache(self.cache.folder)

    def use_cache(self, folder):
        frame_cache = import_extra("frame_cache", "a cache of decoded frames")
        self.cache = frame_cache.FrameCache(folder, self.paths, self.lookup)

    def where(self, i):
        return self.paths[i][0]

    def quick_check(self, smallest=1):
        """Look at every file's head and tail, so that what is broken is said before an hour of
        training, not after it."""
        checks = find_checks()
        for i, (image_path, label_path) in enumerate(self.paths):
            image_size = measure_picture(image_path)
            label_size = measure_picture(label_path, self.label_mode)
            self.check_sizes(i, image_size, label_size)
            if min(image_size) < smallest:
                raise DatasetError(f"{image_path}: {image_size[1]}x{image_size[0]} pixels, "
                                   f"the network needs {smallest}x{smallest} at least")
            if checks:
                checks.check_end(image_path)
        if checks:
            checks.check_labelled(self)

    def read_frame(self, i):
        if self.cache:
            return self.cache.read(i, super().read_frame)
        return super().read_frame(i)

    def read_image(self, i):
        return read_picture(self.paths[i][0])

    def read_label(self, i):
        return self.read_label_file(self.paths[i][1])

    def read_label_file(self, path):
        """-> classes and IGNORE, uint8 (H, W)."""
        return self.map_ids(read_picture(path, self.label_mode), self.lookup, path)

    def map_ids(self, raw, lookup, path):
        label = lookup[raw]
        wrong = label == INVALID
        if wrong.any():
            checks = find_checks()
            hint = checks.explain_ids(raw, len(self.classes)) if checks else ""
            raise DatasetError(f"{path}: label id {raw[wrong][0]} is not one of {self.name}'s "
                               f"(0-{len(self.classes) - 1}, or void){hint}")
        return label


def lookup_table(ids):
    """{id in a label file: class or IGNORE} -> uint8 (256,), INVALID for all other ids."""
    table = np.full(256, INVALID, np.uint8)
    for raw, class_id in ids.items():
        table[raw] = class_id
    return table


def own_ids(num_classes):
    """The ids of labels that hold the classes themselves."""
    ids = {i: i for i in range(num_classes)}
    ids[IGNORE] = IGNORE
    return ids


# ---------------------------------------------------------------- CamVid

class CamVid(Files):
    """CamVid as SegNet, as Kaggle or as Cambridge give it away: ids, or the 32 colours."""

    label_mode = "ids or colours"
    fold_by = "drive"

    def __init__(self, root):
        ids = own_ids(len(CAMVID))
        ids[len(CAMVID)] = IGNORE
        super().__init__("CamVid", CAMVID, root, ids, size=(288, 384))

    def find_frames(self, split):
        if (self.root / "LabeledApproved_full").is_dir():
            original = import_extra("camvid_original", "CamVid's original layout")
            return original.find_frames(self.root, split)
        if (self.root / f"{split}_labels").is_dir():
            images = list_images(self.root / split, "CamVid's images")
            labels = list_images(self.root / f"{split}_labels", "CamVid's labels, Kaggle's layout")
            return pair(images, without_suffix(labels))
        images = list_images(self.root / split, "CamVid's images, the SegNet layout")
        labels = list_images(self.root / f"{split}annot",
                             "CamVid's labels: trainannot/ as SegNet's, train_labels/ as Kaggle's "
                             "or LabeledApproved_full/")
        return pair(images, labels)

    def read_label_file(self, path):
        raw = read_picture(path, self.label_mode)
        if raw.ndim == 3:
            colours = import_extra("camvid_original", "CamVid's labels in 32 colours")
            return colours.classes_of(raw, path)
        return self.map_ids(raw, self.lookup, path)


def without_suffix(labels):
    """{"0001TP_006690_L": path} -> {"0001TP_006690": path}"""
    return {stem.removesuffix("_L"): path for stem, path in labels.items()}


# ---------------------------------------------------------------- Cityscapes

class Cityscapes(Files):
    """Cityscapes as it comes: raw ids 0..33, of which 19 are classes, or its labelTrainIds."""

    fold_by = "drive"                                             # the part before _ is the city

    def __init__(self, root):
        palette = {name: colour for name, (_, colour, _) in CITYSCAPES.items()}
        ids = dict.fromkeys((*range(34), IGNORE), IGNORE)         # the raw ids are 0..33
        for class_id, (raw, _, _) in enumerate(CITYSCAPES.values()):
            ids[raw] = class_id
        super().__init__("Cityscapes", palette, root, ids, size=(512, 1024))
        self.train_ids = lookup_table(own_ids(len(CITYSCAPES)))

    def find_frames(self, split):
        frames = self.root / "leftImg8bit" / split
        masks = self.root / "gtFine" / split
        if split == "test" and frames.is_dir() and not masks.is_dir():
            raise secret_labels(masks)
        for folder in (frames, masks):
            if not folder.is_dir():
                raise DatasetError(f"{folder}: there is no such folder (looked for Cityscapes, "
                                   f"which comes as leftImg8bit/ and gtFine/)")
        images = files_by_stem(frames, "_leftImg8bit.png")
        labels = files_by_stem(masks, "_gtFine_labelIds.png")
        labels |= files_by_stem(masks, "_gtFine_labelTrainIds.png")
        if not images or not labels:
            raise DatasetError(f"{masks if images else frames}: empty (looked for "
                               f"CITY/*_leftImg8bit.png and CITY/*_gtFine_labelIds.png)")
        pairs = pair(images, labels)
        if split == "test" and self.is_all_void(next(iter(labels.values()))):
            raise secret_labels(masks)
        return pairs

    def find_all_frames(self):
        return self.join_splits(("train", "val"))

    def is_all_void(self, path):
        """True for the dummies that stand in gtFine/test for labels that are kept secret."""
        try:
            return bool((self.read_label_file(path) == IGNORE).all())
        except DatasetError:                                      # broken: said when it is read
            return False

    def read_label_file(self, path):
        lookup = self.train_ids if path.stem.endswith("_labelTrainIds") else self.lookup
        return self.map_ids(read_picture(path, self.label_mode), lookup, path)


def files_by_stem(folder, ending):
    """-> {stem: path} of the files CITY/STEM+ending in a folder of Cityscapes."""
    return {path.name.removesuffix(ending): path for path in sorted(folder.glob(f"*/*{ending}"))}


def secret_labels(folder):
    return SecretLabels(f"{folder}: Cityscapes keeps the labels of its test split to itself: "
                        f"score on val, or predict the test images and send the label ids to its "
                        f"server")


# ---------------------------------------------------------------- a folder of one's own

NEUTRAL = (128, 128, 128)
NEUTRAL_NAMES = ("background", "other", "others", "rest", "none", "void", "unlabeled", "unlabelled")


class Folder(Files):
    """Your own: images/, labels/, classes.txt, and lists of the splits if you like."""

    def __init__(self, root):
        colours = read_classes(root)
        super().__init__(root.name, colours, root, own_ids(len(colours)))

    def find_frames(self, split):
        images, labels = self.list_files()
        lists = self.read_lists()
        if not lists:
            return self.cut_by_order(pair(images, labels), split)
        if split not in lists:
            raise DatasetError(f"{self.root / split}.txt: there is no such list of stems (found "
                               f"{', '.join(lists)})")
        self.check_listed(split, lists[split], images, labels)
        return {stem: (images[stem], labels[stem]) for stem in lists[split]}

    def find_all_frames(self):
        """With lists, an image or a label that none of them names may be without its partner."""
        images, labels = self.list_files()
        lists = self.read_lists()
        if not lists:
            return pair(images, labels)
        for split, stems in lists.items():
            self.check_listed(split, stems, images, labels)
        return {stem: (images[stem], labels[stem]) for stem in images if stem in labels}

    def list_files(self):
        """-> {stem: path} of all images, and of all labels."""
        images = list_images(self.root / "images", "images")
        return images, list_images(self.root / "labels", "labels")

    def read_lists(self):
        """-> {split: its stems} of the lists that there are. Raises DatasetError for a frame that
        is trained and scored on; val and test may share."""
        found = [name for name in SPLITS if os.path.lexists(self.root / f"{name}.txt")]
        lists = {name: read_lines(self.root / f"{name}.txt") for name in found}
        trained = set(lists.get("train", ()))
        for name in ("val", "test"):
            shared = [stem for stem in lists.get(name, ()) if stem in trained]
            if shared:
                raise DatasetError(f"{self.root / name}.txt: it names {shared[0]!r}, and so does "
                                   f"train.txt: a network would be scored on what it learned")
        return lists

    def check_listed(self, split, stems, images, labels):
        """Raise DatasetError unless a list names frames, each with its image and its label."""
        path = self.root / f"{split}.txt"
        if not stems:
            raise DatasetError(f"{path}: it names no frame")
        for what, files in (("image", images), ("label", labels)):
            missing = [stem for stem in stems if stem not in files]
            if missing:
                raise DatasetError(f"{path}: no {what} has the stem {missing[0]!r}, its name "
                                   f"without .png ({len(missing)} such lines)")

    def cut_by_order(self, pairs, split):
        """-> the frames of a split without lists. The last fifth is val: frames are often video, so
        neighbours stay together."""
        frames = list(pairs.items())
        cut = len(frames) - max(1, len(frames) // 5)
        parts = {"train": frames[:cut], "val": frames[cut:]}
        if not parts.get(split):
            raise DatasetError(f"{self.root}: no {split} frames; write their stems to {split}.txt, "
                               f"one a line")
        return dict(parts[split])


def read_classes(root):
    """classes.txt -> {name: colour}."""
    path = root / "classes.txt"
    if not path.is_file():
        raise DatasetError(f"{path}: there is no such file (looked for images/, labels/ and "
                           f"classes.txt in {root})")
    lines = [read_class(line, path) for line in read_lines(path)]
    colours = {}
    for (name, colour), distinct in zip(lines, distinct_colours(len(lines)), strict=True):
        if colour is None:
            is_neutral = name.strip("_ ").lower() in NEUTRAL_NAMES
            colour = NEUTRAL if is_neutral else distinct
        colours[name] = colour
    if not 0 < len(colours) == len(lines) < INVALID:
        raise DatasetError(f"{path}: it must name 1 to {INVALID - 1} classes, a line each, "
                           f"no name twice")
    checks = find_checks()
    if checks:
        checks.check_class_names(colours, path)
    return colours


def read_class(line, path):
    """"name" or "name R G B" -> (name, colour or None); the name may hold spaces.

    Raises DatasetError, naming `path`, for what was meant as a colour and is none.
    """
    words = line.split()
    if len(words) > 3 and all(word.isdecimal() for word in words[-3:]):
        colour = tuple(int(word) for word in words[-3:])
        if max(colour) > 255:
            raise bad_colour(line, path)
        return " ".join(words[:-3]), colour
    if "," in words[-1] and words[-1].replace(",", "").isdecimal():
        raise bad_colour(line, path)
    return " ".join(words), None


def bad_colour(line, path):
    """-> the error for a line of classes.txt that ends with what is no R G B"""
    return DatasetError(f"{path}: {line[:100]!r}: a colour is three numbers from 0 to 255, R G B, "
                        f"with spaces between them")


def distinct_colours(count):
    """`count` colours that are easy to tell apart: hues a golden angle from each other."""
    colours = []
    for i in range(count):
        hue = i * 0.618 % 1
        value = 0.95 - 0.35 * (i % 2)
        channels = colorsys.hsv_to_rgb(hue, 0.75, value)
        colours.append(tuple(round(255 * channel) for channel in channels))
    return colours


# ---------------------------------------------------------------- opening

READERS = {"toy": Toy, "camvid": CamVid, "cityscapes": Cityscapes, "folder": Folder}


def open_dataset(spec, split, fold=None, folds=2, transform=None, fold_by=None, cache=None,
                 size=None):
    """The frames of `split` ("train", "val", "test" or "train+val") of a data set -> Dataset.

    spec       "toy", "camvid:DIR", "cityscapes:DIR" or "folder:DIR", see the head of this file
    fold       0..folds-1: all labelled frames are dealt into folds instead of the data's own
               splits; "val" and "test" are that fold, "train" is all others
    fold_by    "drive" (whole drives, told by the stems), "block" (neighbours) or "shuffle" (leaks;
               warns); None: "drive" for CamVid and Cityscapes, "block" for the others
    transform  what a frame goes through: (image, label) -> (image, label)
    cache      a folder that keeps the decoded frames, 4 bytes per pixel, so that each file is
               decoded once; drawn scenes need none
    size       that (H, W), in place of the data set's own

    Raises DatasetError, naming what was looked for where.
    """
    if split not in (*SPLITS, "train+val"):
        raise DatasetError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}, train+val")
    if split == "train+val" and fold is not None:
        raise DatasetError("train+val is of the data's own splits: a fold has train, val and test")
    dataset = find_dataset(spec)
    if fold is None:
        frames = dataset.join_splits(split.split("+"))
        if not frames:
            raise DatasetError(f"{spec}: none of its frames belongs to {split}")
    else:
        frames = dataset.find_all_frames()
        held_out = held_out_stems(list(frames), fold, folds, fold_by or dataset.fold_by)
        if split == "train":
            wanted = set(frames) - held_out
        else:
            wanted = held_out
        frames = {stem: paths for stem, paths in frames.items() if stem in wanted}
    dataset.use_frames(frames)
    dataset.transform = transform
    if cache:
        dataset.use_cache(cache)
    if size is not None:
        dataset.size = tuple(size)
    return dataset


def find_dataset(spec):
    """"KIND:DIR" -> its Dataset, without frames yet."""
    kind, _, folder = str(spec).partition(":")
    is_known = kind in READERS and (kind == "toy") == (folder == "")
    if not is_known:
        raise DatasetError(f"unknown data {spec!r}: use toy, camvid:DIR, cityscapes:DIR or "
                           f"folder:DIR")
    if kind == "toy":
        return Toy()
    root = expand_user(folder)
    if not root.is_dir():
        raise DatasetError(f"{root}: there is no such folder")
    return READERS[kind](root)


def expand_user(folder):
    """-> Path, with the home folder for ~. Raises DatasetError for a user who is not there."""
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise DatasetError(f"{folder}: there is no such user's home folder") from None


# ---------------------------------------------------------------- folds

def held_out_stems(stems, fold, folds, fold_by):
    """-> the set of stems in fold number `fold` of `folds`."""
    if not (2 <= folds <= len(stems) and 0 <= fold < folds):
        raise DatasetError(f"fold {fold} of {folds} does not exist: folds count from 0, and need "
                           f"two folds and a frame each at least")
    if fold_by == "drive":
        return set(folds_of_drives(stems, folds)[fold])
    if fold_by == "block":
        blocks = np.array_split(np.array(sorted(stems)), folds)
        return set(blocks[fold].tolist())
    if fold_by == "shuffle":
        warnings.warn("folds of shuffled frames leak: neighbouring video frames are "
                      "near-duplicates, so scores come out too high", stacklevel=3)
        shuffled = random.Random(0).sample(sorted(stems), len(stems))
        return set(shuffled[fold::folds])
    raise DatasetError(f"unknown way to make folds {fold_by!r}: use drive, block or shuffle")


def find_drives(stems):
    """-> {drive: its stems, in their order}; {} where the names tell no drives.

    A frame's drive is the part of its name before the first _.
    """
    drives = {}
    for stem in stems:
        drive = stem.split("_")[0]
        drives.setdefault(drive, []).append(stem)
    return drives if len(drives) < len(stems) else {}


def folds_of_drives(stems, folds):
    """-> a list of stems for each fold, whole drives in each, of about the same length."""
    drives = find_drives(stems)
    if not drives:
        raise DatasetError("the frames' names tell no drives (the part before the first _): "
                           "use --fold-by block")
    if len(drives) < folds:
        raise DatasetError(f"{len(drives)} drives cannot make {folds} folds; use --fold-by block")

    def longest_first(name):
        return -len(drives[name]), name

    buckets = [[] for _ in range(folds)]
    for name in sorted(drives, key=longest_first):
        smallest = min(buckets, key=len)
        smallest.extend(drives[name])
    return buckets


# ---------------------------------------------------------------- augmentation

class Augment:
    """Image (3, H, W) and label (H, W), uint8 -> the same two at exactly `crop` (height, width).

    recipe "segformer": resize to `size` (None: the image's own) times a random factor in
    `scale_range`; crop at a place where no class has over 75 % of the labelled pixels; photometric
    distortion; flip; pad with void.
    recipe "plain", the paper's: resize to `crop`; flip.
    """

    def __init__(self, crop, size=None, scale_range=(0.5, 2.0), recipe="segformer"):
        self.crop = tuple(crop)
        self.size = size
        self.scale_range = scale_range
        self.recipe = recipe

    def __call__(self, image, label, rng=None):
        """rng: numpy's Generator, which all random numbers come from."""
        if rng is None:
            rng = np.random.default_rng()
        if self.recipe == "plain":
            image, label = resize_pair(image, label, self.crop)
        else:
            image, label = self.scale_and_crop(image, label, rng)
            image = distort(image, rng)
        if rng.random() < 0.5:
            image = image.flip(2)
            label = label.flip(1)
        return pad_pair(image, label, self.crop)

    def scale_and_crop(self, image, label, rng):
        """The crop of the scaled image, made the other way round: the window that it comes from is
        cut out first, so that only its pixels are resized."""
        factor = rng.uniform(*self.scale_range)
        full_height, full_width = label.shape
        work_height, work_width = self.size or label.shape
        scale_y = factor * work_height / full_height
        scale_x = factor * work_width / full_width
        crop_height, window_height = crop_sides(full_height, scale_y, self.crop[0])
        crop_width, window_width = crop_sides(full_width, scale_x, self.crop[1])

        top, left = choose_crop(label.numpy(), (window_height, window_width), rng)
        bottom = top + window_height
        right = left + window_width
        image = image[:, top:bottom, left:right]
        label = label[top:bottom, left:right]
        return resize_pair(image, label, (crop_height, crop_width))


def crop_sides(full, scale, crop):
    """One side of a crop of an image that is scaled, in pixels -> (crop_side, window_side)

    full         the side of the image as it is, which is multiplied by `scale`
    crop_side    of the result: `crop`, or the whole scaled side where that is shorter
    window_side  of the part of the image that is resized to crop_side
    """
    scaled = max(1, round(full * scale))
    crop_side = min(crop, scaled)
    window_side = min(full, max(1, round(crop_side / scale)))
    return crop_side, window_side


def choose_crop(ids, crop, rng, cap=0.75, tries=10):
    """(top, left) of a random window of `crop` (h, w) pixels of `ids` (H, W) in which no class has
    over `cap` of the labelled pixels; after `tries` windows the last one."""
    H, W = ids.shape
    h, w = crop
    for _ in range(tries):
        top = int(rng.integers(H - h + 1))
        left = int(rng.integers(W - w + 1))
        window = ids[top:top + h, left:left + w]
        counts = np.bincount(window.ravel(), minlength=256)[:IGNORE]
        if counts.max() < cap * counts.sum():
            break
    return top, left


def resize_pair(image, label, size):
    """Image (3, h, w) and label (h, w) at `size` (H, W). The image bilinear, antialiased where it
    shrinks; the label nearest, so that no new ids appear."""
    if label.shape == tuple(size):
        return image, label
    # the same values, known to torch as channels-last, which is faster
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)      # (1, 3, h, w)
    image = F.interpolate(batch, size=size, mode="bilinear", antialias=True)[0]
    label = F.interpolate(label[None, None], size=size, mode="nearest-exact")[0, 0]
    return image, label


def pad_pair(image, label, size):
    """Below and to the right: the mean colour, and void."""
    height, width = label.shape
    if (height, width) == size:
        return image, label
    colour = torch.tensor(PAD, dtype=torch.uint8)
    padded = colour.expand(*size, 3).contiguous().permute(2, 0, 1)          # (3, H, W)
    padded[:, :height, :width] = image
    label = F.pad(label, (0, size[1] - width, 0, size[0] - height), value=IGNORE)
    return padded, label


def distort(image, rng):
    """Photometric distortion of an image (3, H, W), each with probability 1/2: brightness +-32,
    contrast x0.5-1.5, saturation x0.5-1.5 (about the luminance), hue +-18 degrees (about the grey
    axis; mmseg's hue_delta = 18 is 36 degrees, since OpenCV counts hue in steps of 2). All four are
    one affine map of RGB, much cheaper than going through HSV, and clipped once, at its end."""
    def maybe(low, high, neutral):
        return rng.uniform(low, high) if rng.random() < 0.5 else neutral

    brightness = maybe(-32, 32, 0)
    contrast = maybe(0.5, 1.5, 1)
    saturation = maybe(0.5, 1.5, 1)
    hue = math.radians(maybe(-18, 18, 0))

    # Rodrigues' formula for the turn about the grey axis (1, 1, 1) / sqrt(3)
    along = np.full((3, 3), 1 / 3)                                # projection on the axis
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = math.cos(hue) * np.eye(3) + (1 - math.cos(hue)) * along + math.sin(hue) * across

    to_grey = np.tile(LUMINANCE, (3, 1))                          # (3, 3): its luminance, thrice
    saturate = saturation * np.eye(3) + (1 - saturation) * to_grey
    linear = contrast * turn @ saturate                           # (3, 3)
    # Brightness comes first, and is a grey: saturation and hue leave it as it is.
    offset = np.full(3, contrast * brightness)                    # (3,)
    matrix = np.column_stack([linear, offset])                    # (3, 4)
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture = picture.convert("RGB", tuple(matrix.ravel()))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


# ---------------------------------------------------------------- the training stream

class Stream(torch.utils.data.Dataset):
    """The endless training stream: stream[n] is the n-th augmented sample, a function of (seed, n)
    and nothing else.

    Each pass over the data has its own shuffle, and each sample its own random numbers, so the
    stream is the same for any number of workers and processes, and training resumes at sample n by
    starting at n.
    """

    def __init__(self, dataset, augment, seed=0):
        self.dataset = dataset
        self.augment = augment
        self.seed = seed
        self.epoch = None
        self.order = None

    def __getitem__(self, n):
        epoch, place = divmod(n, len(self.dataset))
        if epoch != self.epoch:
            shuffle = np.random.default_rng((self.seed, 0, epoch))
            self.order = shuffle.permutation(len(self.dataset))
            self.epoch = epoch
        image, label = self.dataset[int(self.order[place])]
        return self.augment(image, label, np.random.default_rng((self.seed, 1, n)))


# ---------------------------------------------------------------- how often each class occurs

def pixel_counts(dataset):
    """Labelled pixels of each class over the data set -> int64 (C,)."""
    counts = np.zeros(256, np.int64)
    for i in range(len(dataset)):
        counts += np.bincount(dataset.read_label(i).ravel(), minlength=256)
    return counts[:len(dataset.classes)]


# ---------------------------------------------------------------- pictures and lists

def read_picture(path, mode=None, upright=False):
    """-> uint8 array of an image file: RGB (H, W, 3), or 8-bit ids (H, W).

    path: or an io.BytesIO of its content
    mode: None for RGB; "ids" for a label of class ids; "ids or colours" for a label that is either
    upright: turn it as the camera was held (EXIF), for photos; the frames of a data set stay as
             their labels are
    Raises DatasetError.
    """
    try:
        with open_picture(path, PHOTO_FORMATS if upright else FRAME_FORMATS) as picture:
            is_label = holds_ids(picture, mode)
            check_picture_mode(picture, path, is_label, upright)
            if is_label:
                return np.array(picture)
            turned = ImageOps.exif_transpose(picture) if upright else picture
            if "transparency" in turned.info:
                turned = turned.convert("RGBA")                   # else Pillow warns of a palette's
            image = np.array(turned.convert("RGB"))
            checks = find_checks()
            if checks:
                checks.check_whole(picture, path)
            return image
    except FileNotFoundError:
        raise DatasetError(f"{path}: there is no such file") from None
    except DatasetError:
        raise
    except Image.DecompressionBombError:
        raise DatasetError(f"{path}: over {2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels, which "
                           f"is more than is read: cut it into parts") from None
    except BROKEN_PICTURE as error:
        reason = str(error).replace(str(path), "").strip(" '")
        raise DatasetError(f"{path}: not an image that can be read ({reason})") from None


@contextlib.contextmanager
def open_picture(path, formats=FRAME_FORMATS):
    """The one place where a picture is opened -> PIL's, its pixels not read yet."""
    if not isinstance(path, io.BytesIO):
        check_file(path)
    with Image.open(path, formats=formats) as picture:
        yield picture


def check_file(path):
    """Raise DatasetError for what no picture is: a pipe would be waited for, a huge file read."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise DatasetError(f"{path}: not an image that can be read (a folder, a pipe or a device)")
    if os.path.getsize(path) > MOST_BYTES:
        raise DatasetError(f"{path}: not an image that can be read (over {MOST_BYTES} bytes)")


def holds_ids(picture, mode):
    """Is this opened picture read as class ids (`mode` as in `read_picture`)? Its pixels must not
    have been read yet: then Pillow has changed its palette."""
    if mode != "ids or colours":
        return mode == "ids"
    if picture.mode == "P":
        return not has_camvids_colours(picture)
    return picture.mode not in ("RGB", "RGBA")


def has_camvids_colours(picture):
    """Are all colours in this picture's palette CamVid's?

    Programs that make files smaller store a label in colours with a palette. Its pixels are then
    indices into that palette, in any order, and not class ids.
    """
    palette = read_palette(picture)
    if palette is None:
        return False
    original = import_extra("camvid_original", "a label of CamVid with a palette")
    return original.are_label_colours(palette)


def read_palette(picture):
    """-> the RGB colours (n, 3) of a .png, uint8, as they stand in the file; None for no palette"""
    if picture.mode != "P" or picture.format != "PNG" or picture.palette is None:
        return None
    return np.frombuffer(picture.palette.palette, np.uint8).reshape(-1, 3)


def check_palette(picture, path):
    """Raise DatasetError for a label whose palette is grey, and has a grey that is not its index.

    With a palette of colours, the index of a pixel is its class id. In a grey label that a program
    made smaller, the grey is. Here it could be either.
    """
    palette = read_palette(picture)
    if palette is None:
        return
    is_grey = (palette == palette[:, :1]).all()                   # red = green = blue
    if not is_grey:
        return
    greys = np.trim_zeros(palette[:, 0], "b")                     # black at the end fills up
    indices = np.arange(len(greys))
    differing = indices[greys != indices]
    if len(differing):
        index = differing[0]
        raise DatasetError(f"{path}: its palette shows index {index} as grey {greys[index]}, and "
                           f"either could be the class id: save it without a palette, as an 8-bit "
                           f"grey .png of class ids")


def check_picture_mode(picture, path, is_label, upright=False):
    """Raise DatasetError for an opened picture that cannot be a label of ids (`is_label`), or an
    image."""
    if is_label:
        if picture.mode not in ("L", "P"):
            raise DatasetError(f"{path}: a label must be an 8-bit image of class ids, "
                               f"this one is {picture.mode}")
        if picture.format != "PNG":
            raise DatasetError(f"{path}: a label must be a .png, JPEG changes the ids")
        packing = picture.tile[0][3] if picture.tile else None    # how the file keeps its pixels
        if packing in ("L;2", "L;4"):
            raise DatasetError(f"{path}: a label must have 8 bits per pixel; this one has fewer, "
                               f"where 255 cannot be told from the largest id: save it anew")
        check_palette(picture, path)
    if picture.mode.startswith(("I", "F")):
        raise DatasetError(f"{path}: an image must have 8 bits a channel, "
                           f"this one is {picture.mode}")
    if upright:                                                   # a photo: the rest is no harm
        return
    frames = getattr(picture, "n_frames", 1)
    if frames > 1:
        raise DatasetError(f"{path}: an animation of {frames} pictures, not one picture")
    orientation = picture.getexif().get(ORIENTATION, 1) if "exif" in picture.info else 1
    if orientation != 1:
        raise DatasetError(f"{path}: marked as turned by the camera (EXIF orientation "
                           f"{orientation}), and its label could be of either way up: "
                           f"save both upright")


def measure_picture(path, mode=None):
    """-> (H, W), from the head of an image file; one whose end is missing is read whole, which says
    what is wrong with it. Raises DatasetError."""
    try:
        with open_picture(path) as picture, open(path, "rb") as file:
            check_picture_mode(picture, path, holds_ids(picture, mode))
            size = (picture.height, picture.width)
            file.seek(-min(os.path.getsize(path), 64), os.SEEK_END)
            tail = file.read()
    except DatasetError:
        raise
    except BROKEN_PICTURE:
        return read_picture(path, mode).shape[:2]                 # raises, in a sentence
    ends_well = b"IEND" in tail or b"\xff\xd9" in tail            # of a PNG, of a JPEG
    if not ends_well:
        read_picture(path, mode)
    return size


def list_images(folder, looking_for):
    """-> {stem: path} of the image files in `folder`. Raises DatasetError where there is none, or
    two of one stem."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: there is no such folder (looked for {looking_for} there)")
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if path.stem in found:
            raise DatasetError(f"{path}: there is a second image of the same name, "
                               f"{found[path.stem].name}")
        found[path.stem] = path
    if not found:
        raise DatasetError(f"{folder}: no .png or .jpg in it (looked for {looking_for})")
    return found


def pair(images, labels):
    """Two {stem: path} -> {stem: (image path, label path)}. Raises DatasetError for an image
    without its label, or a label without its image."""
    check_partners(images, labels, "image has no label")
    check_partners(labels, images, "label has no image")
    return {stem: (images[stem], labels[stem]) for stem in images}


def check_partners(files, partners, complaint):
    alone = [path for stem, path in files.items() if stem not in partners]
    if alone:
        any_partner = next(iter(partners.values()))
        folder = any_partner.parent
        raise DatasetError(f"{alone[0]}: this {complaint} of the same stem in {folder} "
                           f"({len(alone)} such files)")


def read_lines(path):
    """The lines of a text file that are not empty, stripped."""
    if not path.is_file():                                        # to open a pipe would wait
        raise DatasetError(f"{path}: there is no such file, or it is not one that can be read")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DatasetError(f"{path}: not UTF-8 text") from None
    if "\0" in text:                                              # no path may hold one
        raise DatasetError(f"{path}: not text, it holds zero bytes")
    return [line.strip() for line in text.splitlines() if line.strip()]


def find_checks():
    """-> the module that looks closer at a stranger's files; None where data.py was copied out
    alone.

    Raises DatasetError where it was copied too, but not what it needs: a check is never left out in
    silence.
    """
    try:
        return importlib.import_module("extras.data_checks")
    except ModuleNotFoundError as error:
        if error.name in ("extras", "extras.data_checks"):
            return None
        raise DatasetError(f"extras/data_checks.py cannot do without a file that is not here: copy "
                           f"it too ({error})") from None


def import_extra(name, what):
    """-> the module extras.NAME. Raises DatasetError where this file was copied out without it."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as error:
        raise DatasetError(f"{what} needs extras/{name}.py: copy it too, "
                           f"beside data.py ({error})") from None


if __name__ == "__main__":
    from extras.check_data import main
    from extras.cli import run_command

    run_command(main)
