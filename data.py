"""Road scenes: toy (drawn here, no download), CamVid, Cityscapes, or a folder of your own; augmentation; folds; a check.

    python data.py toy                        # or camvid:DIR, cityscapes:DIR, folder:DIR: reads every file, prints what is
                                              # there and what is wrong, and draws contact_sheet.png to look at
    dataset = open_dataset("camvid:DIR", "train")
    image, label = dataset[0]                 # uint8 RGB (3, H, W), uint8 (H, W) with classes 0..C-1 and IGNORE

Layouts, all images .png or .jpg:
    camvid:DIR      train/ trainannot/ val/ valannot/ test/ testannot/           the SegNet layout, 11 classes, 11 = void
                    train/ train_labels/ val/ val_labels/ test/ test_labels/     Kaggle's: *_L.png in 32 colours, mapped to the 11
                    701_StillsRaw_full/ LabeledApproved_full/                    the original: the same, split as SegNet's
    cityscapes:DIR  leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelIds.png (raw ids, mapped
                    to the 19 classes here) or *_labelTrainIds.png where present
    folder:DIR      images/ labels/ (8-bit ids 0..C-1, 255 = void, same stems) classes.txt (a line a class: name [R G B])
                    and, if you like, train.txt val.txt test.txt (a stem a line); without them the last fifth is val

Video frames are near-duplicates of their neighbours: folds are made of whole drives or of blocks of neighbours.

References
  Brostow et al., Semantic object classes in video, 2009 (CamVid); Badrinarayanan et al., SegNet, 2017 (its split)
  Cordts et al., The Cityscapes dataset, 2016
  Xie et al., SegFormer, 2021: the augmentation (random scale, crop, flip, photometric distortion)
"""

import argparse
import colorsys
import hashlib
import json
import math
import mmap
import os
import random
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

IGNORE = 255
INVALID = 254                                                     # in a lookup table: an id that must not occur
ORIENTATION = 0x0112                                              # EXIF's tag
LUMINANCE = (0.299, 0.587, 0.114)                                 # of R, G, B (ITU-R BT.601)
PAD = (124, 116, 104)                                             # ImageNet's mean colour: zero after normalisation
SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

TOY = {"sky": (70, 130, 180), "building": (70, 70, 70), "road": (128, 64, 128), "pavement": (244, 35, 232),
       "tree": (107, 142, 35), "pole": (220, 220, 0), "car": (0, 0, 142), "person": (220, 20, 60)}
CAMVID = {"Sky": (128, 128, 128), "Building": (128, 0, 0), "Pole": (192, 192, 128), "Road": (128, 64, 128),
          "Pavement": (60, 40, 222), "Tree": (128, 128, 0), "SignSymbol": (192, 128, 128), "Fence": (64, 64, 128),
          "Car": (64, 0, 128), "Pedestrian": (64, 64, 0), "Bicyclist": (0, 128, 192)}
CAMVID_COLOURS = {                                                # the 32 colours of the original labels, as the 11 classes group them
    "Sky": [(128, 128, 128)], "Building": [(128, 0, 0), (192, 0, 128), (0, 128, 64), (64, 0, 64), (64, 192, 0)],        # archway bridge tunnel wall
    "Pole": [(192, 192, 128), (0, 0, 64)],                        # traffic cone
    "Road": [(128, 64, 128), (128, 0, 192), (192, 0, 64)],        # lane marks, driving or not
    "Pavement": [(0, 0, 192), (64, 192, 128), (128, 128, 192)],   # parking block, road shoulder
    "Tree": [(128, 128, 0), (192, 192, 0)], "SignSymbol": [(192, 128, 128), (128, 128, 64), (0, 64, 64)],               # vegetation; text, light
    "Fence": [(64, 64, 128)], "Car": [(64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)],    # pick-up truck train other
    "Pedestrian": [(64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)],       # child, cart or pram, animal
    "Bicyclist": [(0, 128, 192), (192, 0, 192)], "Void": [(0, 0, 0)]}               # motorcycle
CITYSCAPES = {                                                    # name: (raw labelId, colour, the paper's Table 1 weight)
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


# ---------------------------------------------------------------- files

def read_picture(path, mode=None, upright=False):
    """-> uint8 array of an image file: RGB (H, W, 3), or with mode="ids" the 8-bit ids (H, W), or with mode="ids or colours"
    whichever of the two a label is. upright: as the camera was
    held (EXIF), for photos; the frames of a data set stay as their labels are. Raises DatasetError."""
    try:
        with Image.open(path) as picture:
            mode = refuse(picture, path, mode, upright)
            return np.array(picture if mode == "ids" else (ImageOps.exif_transpose(picture) if upright else picture).convert("RGB"))
    except FileNotFoundError:
        raise DatasetError(f"{path}: there is no such file") from None
    except DatasetError:
        raise
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:       # PIL's, of broken files
        reason = str(error).replace(str(path), "").strip(" '")
        raise DatasetError(f"{path}: not an image that can be read ({reason})") from None


def refuse(picture, path, mode, upright=False):
    """Raise DatasetError for an opened picture that is not what `mode` (of `read_picture`) says. -> None or "ids", as it is read"""
    if mode == "ids or colours":
        mode = None if picture.mode in ("RGB", "RGBA") else "ids"
    if mode == "ids" and picture.mode not in ("L", "P"):
        raise DatasetError(f"{path}: a label must be an 8-bit image of class ids, this one is {picture.mode}")
    if mode == "ids" and picture.format == "JPEG":
        raise DatasetError(f"{path}: a label must be a .png, JPEG changes the ids")
    if not upright and getattr(picture, "n_frames", 1) > 1:
        raise DatasetError(f"{path}: an animation of {picture.n_frames} pictures, not one picture")
    turned = picture.getexif().get(ORIENTATION, 1) if "exif" in picture.info and not upright else 1
    if turned != 1:
        raise DatasetError(f"{path}: marked as turned by the camera (EXIF orientation {turned}), and its label could be of either way up: save both upright")
    if picture.mode.startswith(("I", "F")):
        raise DatasetError(f"{path}: an image must have 8 bits a channel, this one is {picture.mode}")
    return mode


def glance(path, mode=None):
    """-> (H, W) from a picture's head; a file that does not end as it should is read whole. Raises DatasetError."""
    try:
        with Image.open(path) as picture, open(path, "rb") as file:
            file.seek(-min(os.path.getsize(path), 64), os.SEEK_END)
            tail, size = file.read(), (picture.height, picture.width)
            refuse(picture, path, mode)
    except DatasetError:
        raise
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError):
        return read_picture(path, mode).shape[:2]                 # its sentence
    if b"IEND" not in tail and b"\xff\xd9" not in tail:
        read_picture(path, mode)
    return size


def list_images(folder, looking_for):
    """-> {stem: path} of the image files in `folder`. Raises DatasetError where there is none, or two of a stem."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: there is no such folder (looked for {looking_for} there)")
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES):
        if path.stem in found:
            raise DatasetError(f"{path}: there is a second image of the same name, {found[path.stem].name}")
        found[path.stem] = path
    if not found:
        raise DatasetError(f"{folder}: no .png or .jpg in it (looked for {looking_for})")
    return found


def pair(images, labels):
    """Two {stem: path} -> {stem: (image path, label path)}; every image must have its label and the other way round."""
    for what, has, lacks in (("image has no label", images, labels), ("label has no image", labels, images)):
        alone = [path for stem, path in has.items() if stem not in lacks]
        if alone:
            where = next(iter(lacks.values())).parent if lacks else "the labels' folder"
            raise DatasetError(f"{alone[0]}: this {what} of the same stem in {where} ({len(alone)} such files)")
    return {stem: (images[stem], labels[stem]) for stem in images}


# ---------------------------------------------------------------- data sets

class Dataset:
    """dataset[i] -> (image uint8 (3, H, W), label uint8 (H, W)), or what `transform` makes of the two.

    classes: names; palette: an (R, G, B) a class; stems: a name a frame; size: the (H, W) that frames are worked at, or
    None for their own.
    """

    def __init__(self, name, colours, stems, size=None, transform=None):
        self.name, self.classes, self.palette = name, list(colours), [tuple(colour) for colour in colours.values()]
        self.stems, self.size, self.transform = list(stems), size, transform

    def __len__(self):
        return len(self.stems)

    def glance(self):
        """Raise DatasetError for what a quick look shows to be broken; nothing can be where frames are drawn."""

    def __getitem__(self, i):
        return self.finish(i, self.read_image(i), self.read_label(i))

    def finish(self, i, image, label):                            # (H, W, 3), (H, W)
        if image.shape[:2] != label.shape:
            raise DatasetError(f"{self.where(i)}: the image has {image.shape[1]}x{image.shape[0]} pixels, "
                               f"its label {label.shape[1]}x{label.shape[0]}")
        image, label = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)           # (3, H, W), (H, W)
        return self.transform(image, label) if self.transform else (image, label)


class Files(Dataset):
    """Frames in files; `ids` maps the ids in the label files to classes or IGNORE, and any other id is an error."""

    def __init__(self, name, colours, pairs, ids, cache=None, **kwargs):
        super().__init__(name, colours, pairs, **kwargs)
        self.paths = list(pairs.values())
        self.lookup = np.full(256, INVALID, np.uint8)
        self.lookup[list(ids)] = list(ids.values())
        self.cache = Cache(cache, self.paths, self.lookup) if cache else None

    def where(self, i):
        return self.paths[i][0]

    def __getitem__(self, i):
        if not self.cache:
            return super().__getitem__(i)
        return self.finish(i, *self.cache.read(i, lambda: (self.read_image(i), self.read_label(i))))

    def read_image(self, i):
        return read_picture(self.paths[i][0])

    def glance(self):
        """Look at every file's head and tail, in milliseconds each: what is broken is said before an hour of training."""
        for i, paths in enumerate(self.paths):
            sizes = [glance(path, mode) for path, mode in zip(paths, (None, "ids or colours" if self.classes == list(CAMVID) else "ids"))]
            if sizes[0] != sizes[1]:
                self.finish(i, np.empty((*sizes[0], 3), np.uint8), np.empty(sizes[1], np.uint8))         # its error

    def read_label(self, i):
        path = self.paths[i][1]
        raw = read_picture(path, "ids or colours" if self.classes == list(CAMVID) else "ids")
        if raw.ndim == 3:
            return camvid_ids(raw, path)
        lookup = self.lookup if not path.stem.endswith("_labelTrainIds") else identity(len(self.classes))
        label = lookup[raw]
        if (label == INVALID).any():
            raise DatasetError(f"{path}: label id {raw[label == INVALID][0]} is not one of {self.name}'s "
                               f"(0-{len(self.classes) - 1}, or void)")
        return label


def camvid_ids(colours, path):
    """A label in CamVid's 32 colours (H, W, 3) -> classes and IGNORE (H, W). Their channels are all 0, 64, 128 or 192."""
    def place(colour):
        return colour[..., 0] // 64 * 16 + colour[..., 1] // 64 * 4 + colour[..., 2] // 64          # 0..63
    table = np.full(64, INVALID, np.uint8)
    for i, group in enumerate(CAMVID_COLOURS.values()):
        table[[place(np.array(colour)) for colour in group]] = IGNORE if i == len(CAMVID) else i
    ids = table[place(colours)]
    ids[(colours % 64 != 0).any(2)] = INVALID
    if (ids == INVALID).any():
        raise DatasetError(f"{path}: colour {tuple(colours[ids == INVALID][0].tolist())} is none of CamVid's 32")
    return ids


def identity(classes):
    """Lookup table of labels that hold the classes themselves: 0..C-1 and IGNORE."""
    lookup = np.full(256, INVALID, np.uint8)
    lookup[:classes], lookup[IGNORE] = np.arange(classes), IGNORE
    return lookup


class Cache:
    """Decoded frames in a folder, one file a frame, mapped into memory when read: all workers and runs share the system's copy.

    A file is a head of 8 int64 (KIND, H, W, and size and date of the image and of the label that it was made from), the RGB
    pixels and the label. One that does not fit its sources is written anew: beside, flushed, then renamed, so whole or not there.
    """

    KIND, HEAD = 0x45464653_00000001, 64                          # of this layout; bytes

    def __init__(self, folder, paths, lookup):
        self.paths, folder = paths, Path(folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatasetError(f"{folder}: no folder for decoded frames can be made there ({error.strerror})") from None
        names = (json.dumps([*map(os.path.abspath, pair), lookup.tolist()]) for pair in paths)
        self.files = [folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.frame" for name in names]

    def read(self, i, decode):
        """-> (RGB (H, W, 3), label (H, W)) of frame i, from its file or by decode(), which is then kept. What is read may be
        written to: the change stays in memory."""
        try:
            stats = [os.stat(path) for path in self.paths[i]]
        except OSError as error:
            raise DatasetError(f"{error.filename}: there is no such file") from None
        facts = [fact for stat in stats for fact in (stat.st_size, stat.st_mtime_ns)]
        return self.map(self.files[i], facts) or self.keep(self.files[i], facts, *decode())

    def map(self, file, facts):
        """-> the two arrays of a whole and current file, else None."""
        try:
            with open(file, "rb") as opened:
                kind, H, W, *made_from, _ = np.frombuffer(opened.read(self.HEAD), np.int64).tolist()
                if (kind, made_from) != (self.KIND, facts) or os.fstat(opened.fileno()).st_size != self.HEAD + 4 * H * W:
                    return None
                pixels = np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8, offset=self.HEAD)
        except (OSError, ValueError):
            return None
        return pixels[:3 * H * W].reshape(H, W, 3), pixels[3 * H * W:].reshape(H, W)

    def keep(self, file, facts, image, label):
        """Write a frame's file; `facts` are from before the decoding, so a source that changes meanwhile is read again. -> the two"""
        if image.shape[:2] != label.shape:
            return image, label                                   # not a frame: `Dataset.finish` says so
        partial = file.with_suffix(f".{os.getpid()}")
        try:
            with open(partial, "wb") as out:
                for part in (np.array([self.KIND, *label.shape, *facts, 0], np.int64), image, label):
                    out.write(part.tobytes())
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial, file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise DatasetError(f"{file.parent}: a decoded frame cannot be kept there ({error.strerror or error}); make room, or leave the cache out") from None
        return image, label


class Toy(Dataset):
    """Drawn road scenes; scene i of a split is always the same."""

    def __init__(self, stems, **kwargs):
        super().__init__("toy", TOY, stems, **kwargs)

    def where(self, i):
        return self.stems[i]

    def read_image(self, i):
        return draw_scene(self.stems[i])[0]

    def read_label(self, i):
        return draw_scene(self.stems[i])[1]

    def __getitem__(self, i):
        return self.finish(i, *draw_scene(self.stems[i]))         # both from one drawing


TOY_SIZE = (128, 256)                                             # H, W
TOY_COUNTS = {"train": 400, "val": 50, "test": 50}


def draw_scene(stem, size=TOY_SIZE):
    """A road scene from its name: image uint8 (H, W, 3), label uint8 (H, W). The same name gives the same scene.

    Imbalanced as a street is: sky, building and road fill it, poles and people are a few pixels wide.
    """
    H, W = size
    rng = random.Random(stem)
    image, label = Image.new("RGB", (W, H)), Image.new("L", (W, H))
    brush, marker = ImageDraw.Draw(image), ImageDraw.Draw(label)
    ids = {name: i for i, name in enumerate(TOY)}

    def paint(name, shape, points, colour, spread=12):
        shade = rng.uniform(-spread, spread)
        getattr(brush, shape)(points, fill=tuple(round(min(max(c + shade, 0), 255)) for c in colour))
        getattr(marker, shape)(points, fill=ids.get(name, IGNORE))

    horizon, vanish = H * rng.uniform(0.36, 0.5), W * rng.uniform(0.35, 0.65)
    light = rng.uniform(0.6, 1.1)
    paint("sky", "rectangle", (0, 0, W, horizon + 2), rng.choice([(135, 180, 225), (190, 195, 200), (110, 140, 190)]))
    paint("pavement", "rectangle", (0, horizon, W, H), (150, 140, 135))
    x = -rng.uniform(0, 20)
    while x < W:                                                  # a row of houses, lower towards the vanishing point
        width, away = rng.uniform(14, 48), min(1, abs(x - vanish) / (0.5 * W))
        if rng.random() < 0.25 + 0.7 * away:
            top = horizon - (0.2 + 0.8 * away) * rng.uniform(0.3, 1.0) * horizon
            colour = rng.choice([(120, 95, 80), (150, 140, 125), (100, 105, 115), (165, 120, 95), (135, 140, 150)])
            paint("building", "rectangle", (x, top, x + width, horizon + 4 * away), colour)
            for wx in range(int(x) + 3, int(x + width) - 3, 7):   # windows, part of the building
                for wy in range(int(top) + 4, int(horizon) - 3, 9):
                    paint("building", "rectangle", (wx, wy, wx + 2, wy + 4), (60, 70, 85))
        x += width
    left, right = W * rng.uniform(-0.25, 0.2), W * rng.uniform(0.8, 1.25)
    paint("road", "polygon", [(vanish - 4, horizon), (vanish + 4, horizon), (right, H), (left, H)], (90, 88, 92), 18)
    for t in (0.08, 0.2, 0.4, 0.7):                               # lane marks, part of the road
        y, middle = horizon + t * (H - horizon), vanish + t * ((left + right) / 2 - vanish)
        paint("road", "rectangle", (middle - 2 * t, y, middle + 2 * t, y + 12 * t), (215, 215, 205))

    for depth in sorted(rng.uniform(0.06, 0.8) for _ in range(rng.randint(6, 13))):        # things, far to near
        ground = horizon + depth * (H - horizon)
        kerb_left, kerb_right = vanish + depth * (left - vanish), vanish + depth * (right - vanish)
        kind = rng.choices(["tree", "pole", "car", "person"], [3, 3, 4, 3])[0]
        if kind == "car":
            w, x = 52 * depth, rng.uniform(kerb_left, kerb_right)
            colour = rng.choice([(160, 30, 35), (40, 60, 120), (205, 205, 208), (35, 35, 40), (70, 110, 80)])
            paint("car", "rectangle", (x - w / 2, ground - 0.4 * w, x + w / 2, ground), colour)
            paint("car", "polygon", [(x - 0.38 * w, ground - 0.38 * w), (x - 0.22 * w, ground - 0.7 * w),
                                     (x + 0.22 * w, ground - 0.7 * w), (x + 0.38 * w, ground - 0.38 * w)], (60, 75, 90))
            for side in (-0.33, 0.33):
                paint("car", "ellipse", (x + (side - 0.1) * w, ground - 0.12 * w, x + (side + 0.1) * w, ground + 0.06 * w), (20, 20, 22))
            continue
        x = rng.uniform(kerb_right, kerb_right + 70 * depth + 6) if rng.random() < 0.5 else \
            rng.uniform(kerb_left - 70 * depth - 6, kerb_left)
        if kind == "tree":
            h, crown = 95 * depth, 34 * depth
            paint("tree", "rectangle", (x - 3 * depth, ground - 0.5 * h, x + 3 * depth, ground), (85, 65, 45))
            for _ in range(5):
                dx, dy = rng.uniform(-0.6, 0.6) * crown, rng.uniform(-0.5, 0.5) * crown
                paint("tree", "ellipse", (x + dx - crown / 2, ground - h + dy, x + dx + crown / 2, ground - h + dy + crown), (70, 105, 45), 25)
        elif kind == "pole":
            h = 120 * depth
            paint("pole", "rectangle", (x - 1.6 * depth - 0.3, ground - h, x + 1.6 * depth + 0.3, ground), (125, 125, 120))
        else:
            h = 42 * depth + 2
            colour = rng.choice([(150, 40, 60), (40, 80, 140), (60, 60, 60), (190, 160, 60)])
            paint("person", "rectangle", (x - 0.14 * h, ground - 0.82 * h, x + 0.14 * h, ground), colour, 25)
            paint("person", "ellipse", (x - 0.11 * h, ground - h, x + 0.11 * h, ground - 0.78 * h), (205, 160, 130))
    if rng.random() < 0.5:                                        # our own bonnet is void, as in Cityscapes
        paint("void", "ellipse", (W * 0.15, H * 0.94, W * 0.85, H * 1.15), (25, 25, 30))
    marker.rectangle((0, 0, W - 1, H - 1), outline=IGNORE, width=2)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 9, (H, W, 1))
    shaded = np.asarray(image, np.float32) * light * np.linspace(1.1, 0.9, W)[None, :, None] + noise
    return shaded.clip(0, 255).astype(np.uint8), np.array(label)


def colours(count):
    """`count` colours that are easy to tell apart: hues a golden angle from each other."""
    return [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i * 0.618 % 1, 0.75, 0.95 - 0.35 * (i % 2))) for i in range(count)]


def camvid_pairs(root, split):
    """{stem: (image, label)} of CamVid as SegNet, as Kaggle or as Cambridge give it away."""
    cut = lambda labels: {stem.removesuffix("_L"): path for stem, path in labels.items()}
    if (root / "LabeledApproved_full").is_dir():
        images, labels = list_images(root / "701_StillsRaw_full", "CamVid's frames"), list_images(root / "LabeledApproved_full", "CamVid's labels")
        return {stem: paths for stem, paths in pair(images, cut(labels)).items() if camvid_split(stem) == split}
    if (root / f"{split}_labels").is_dir():
        return pair(list_images(root / split, "CamVid's images"), cut(list_images(root / f"{split}_labels", "CamVid's labels, Kaggle's layout")))
    return pair(list_images(root / split, "CamVid's images, the SegNet layout"),
                list_images(root / f"{split}annot", "CamVid's labels: trainannot/ as SegNet's, train_labels/ as Kaggle's or LabeledApproved_full/"))


def camvid_split(stem):
    """SegNet's split of the 701 frames, by drive and frame number: 367 train, 101 val, 233 test."""
    drive, _, frame = stem.partition("_")
    if drive == "Seq05VD" or drive == "0001TP" and frame >= "008550":
        return "test"
    return "val" if drive == "0016E5" and "07959" <= frame <= "08159" else "train"


def cityscapes_pairs(root, split):
    frames, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    for folder in (frames, masks):
        if not folder.is_dir():
            raise DatasetError(f"{folder}: there is no such folder (looked for Cityscapes, which comes as leftImg8bit/ and gtFine/)")
    images = {path.name[:-len("_leftImg8bit.png")]: path for path in sorted(frames.glob("*/*_leftImg8bit.png"))}
    labels = {path.name[:-len("_gtFine_labelIds.png")]: path for path in sorted(masks.glob("*/*_gtFine_labelIds.png"))}
    labels |= {path.name[:-len("_gtFine_labelTrainIds.png")]: path for path in sorted(masks.glob("*/*_gtFine_labelTrainIds.png"))}
    if not images or not labels:
        raise DatasetError(f"{masks if images else frames}: empty (looked for CITY/*_leftImg8bit.png and CITY/*_gtFine_labelIds.png)")
    return pair(images, labels)


def read_lines(path):
    """The lines of a text file that are not empty, stripped."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DatasetError(f"{path}: not UTF-8 text") from None


def folder_classes(root):
    """classes.txt -> {name: colour}."""
    path = root / "classes.txt"
    if not path.is_file():
        raise DatasetError(f"{path}: there is no such file (looked for images/, labels/ and classes.txt in {root})")
    lines = [line.split() for line in read_lines(path)]
    own = [len(words) > 3 and all(word.isdigit() and int(word) < 256 for word in words[-3:]) for words in lines]
    names = [" ".join(words[:-3] if has else words) for words, has in zip(lines, own)]
    if not 0 < len(set(names)) == len(names) < INVALID:
        raise DatasetError(f"{path}: it must name 1 to {INVALID - 1} classes, a line each, no name twice")
    return {name: tuple(map(int, words[-3:])) if has else colour
            for name, words, has, colour in zip(names, lines, own, colours(len(names)))}


def folder_pairs(root, split):
    pairs = pair(list_images(root / "images", "images"), list_images(root / "labels", "labels"))
    lists = [name for name in SPLITS if (root / f"{name}.txt").is_file()]
    if not lists:                                                 # neighbours stay together: frames are often video
        cut = len(pairs) - max(1, len(pairs) // 5)
        halves = {"train": dict(list(pairs.items())[:cut]), "val": dict(list(pairs.items())[cut:])}
        if not halves.get(split):
            raise DatasetError(f"{root}: no {split} frames; write their stems to {split}.txt, one a line")
        return halves[split]
    if split not in lists:
        raise DatasetError(f"{root / split}.txt: there is no such list of stems (found {', '.join(lists)})")
    stems = read_lines(root / f"{split}.txt")
    unknown = [stem for stem in stems if stem not in pairs]
    if unknown or not stems:
        raise DatasetError(f"{root / split}.txt: " + (f"no image has the stem {unknown[0]!r}" if unknown else "it names no frame"))
    return {stem: pairs[stem] for stem in stems}


def folder_all(root):
    return pair(list_images(root / "images", "images"), list_images(root / "labels", "labels"))


def open_dataset(spec, split, fold=None, folds=2, transform=None, fold_by=None, cache=None):
    """The frames of `split` ("train", "val", "test") of a data set, see the head of this file for `spec`.

    cache: a folder that keeps the decoded frames, 4 bytes a pixel, so that each file is decoded once; drawn scenes need none.

    With `fold` (0..folds-1) all labelled frames are dealt into folds instead: "val" and "test" are that fold, "train" is
    all others. fold_by: "drive" (whole drives, told by the stems), "block" (neighbours), "shuffle" (leaks; warns), or None
    for the first that the data set can. Raises DatasetError, naming what was looked for where.
    """
    kind, _, folder = str(spec).partition(":")
    root = Path(folder).expanduser()
    if kind not in ("toy", "camvid", "cityscapes", "folder") or (kind == "toy") != (not folder):
        raise DatasetError(f"unknown data {spec!r}: use toy, camvid:DIR, cityscapes:DIR or folder:DIR")
    if split not in SPLITS:
        raise DatasetError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if kind != "toy" and not root.is_dir():
        raise DatasetError(f"{root}: there is no such folder")
    options = dict(transform=transform, cache=cache)
    if kind == "toy":
        pairs_of = {name: {f"{name}-{i:04d}": None for i in range(count)} for name, count in TOY_COUNTS.items()}.get
        make = lambda pairs: Toy(pairs, transform=transform)
    elif kind == "camvid":
        pairs_of = lambda name: camvid_pairs(root, name)
        ids = {i: i for i in range(len(CAMVID))} | {len(CAMVID): IGNORE, IGNORE: IGNORE}
        make = lambda pairs: Files("CamVid", CAMVID, pairs, ids, size=(288, 384), **options)
    elif kind == "cityscapes":
        pairs_of = lambda name: cityscapes_pairs(root, name)
        ids = {i: IGNORE for i in (*range(34), IGNORE)} | {raw: i for i, (raw, _, _) in enumerate(CITYSCAPES.values())}
        palette = {name: colour for name, (_, colour, _) in CITYSCAPES.items()}
        make = lambda pairs: Files("Cityscapes", palette, pairs, ids, size=(512, 1024), **options)
    else:
        names = folder_classes(root)
        pairs_of = lambda name: folder_pairs(root, name)
        make = lambda pairs: Files(root.name, names, pairs, {i: i for i in range(len(names))} | {IGNORE: IGNORE}, **options)
    if fold is None:
        return make(pairs_of(split))
    pool = folder_all(root) if kind == "folder" else {}
    for name in () if kind == "folder" else SPLITS[:2] if kind == "cityscapes" else SPLITS:         # its test labels are secret
        pool |= pairs_of(name)
    held_out = deal(list(pool), fold, folds, fold_by or ("drive" if kind in ("camvid", "cityscapes") else "block"))
    return make({stem: paths for stem, paths in pool.items() if (stem in held_out) != (split == "train")})


def deal(stems, fold, folds, fold_by):
    """-> the set of stems in fold number `fold` of `folds`."""
    if not (2 <= folds <= len(stems) and 0 <= fold < folds):
        raise DatasetError(f"fold {fold} of {folds} does not exist: folds count from 0, and need two folds and a frame each at least")
    if fold_by == "shuffle":
        warnings.warn("folds of shuffled frames leak: neighbouring video frames are near-duplicates, so scores come out too high")
        return set(random.Random(0).sample(sorted(stems), len(stems))[fold::folds])
    if fold_by == "block":
        return set(np.array_split(np.array(sorted(stems)), folds)[fold].tolist())
    if fold_by != "drive":
        raise DatasetError(f"unknown way to make folds {fold_by!r}: use drive, block or shuffle")
    drives = {}
    for stem in stems:
        drives.setdefault(stem.split("_")[0], []).append(stem)
    if len(drives) == len(stems):
        raise DatasetError("the frames' names tell no drives (the part before the first _): use --fold-by block")
    if len(drives) < folds:
        raise DatasetError(f"{len(drives)} drives cannot make {folds} folds; use --fold-by block")
    hands = [[] for _ in range(folds)]
    for drive in sorted(drives, key=lambda name: (-len(drives[name]), name)):       # the longest to the smallest hand
        min(hands, key=len).extend(drives[drive])
    return set(hands[fold])


def pixel_counts(dataset):
    """Labelled pixels a class over the data set -> int64 (C,). Files are counted once: the result is kept in the user's
    cache folder under a key of their names, sizes and dates."""
    cache = None
    if isinstance(dataset, Files):
        facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for _, path in dataset.paths]
        key = hashlib.sha256(json.dumps([dataset.classes, dataset.lookup.tolist(), facts]).encode()).hexdigest()[:24]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effiseg" / f"{key}.json"
        try:
            return np.array(json.loads(cache.read_text()), np.int64).reshape(len(dataset.classes))
        except (OSError, ValueError):
            pass
    counts = sum(np.bincount(dataset.read_label(i).ravel(), minlength=256) for i in range(len(dataset)))[:len(dataset.classes)]
    try:
        if cache:
            cache.parent.mkdir(parents=True, exist_ok=True)
            cache.write_text(json.dumps(counts.tolist()))
    except OSError:                                               # a cache that cannot be written costs time, not the run
        pass
    return counts


# ---------------------------------------------------------------- augmentation, on image and label together

class Augment:
    """Image (3, H, W) and label (H, W), uint8 -> the same two at exactly `crop`; draws from `rng` (numpy Generator).

    "segformer": cut out what a resize to `size` times a random factor and a crop would keep, where no class has over 75 % of the
    labelled pixels; resize that; flip, photometric distortion, pad with void. "plain", the paper's recipe: resize to `crop`, flip.
    """

    def __init__(self, crop, size=None, scale_range=(0.5, 2.0), recipe="segformer"):
        self.crop, self.size, self.scale_range, self.recipe = tuple(crop), size, scale_range, recipe

    def __call__(self, image, label, rng=None):
        rng = rng or np.random.default_rng()
        if self.recipe == "plain":
            image, label = resize_pair(image, label, self.crop)
        else:
            factor, frame = rng.uniform(*self.scale_range), label.shape
            scale = [factor * size / own for size, own in zip(self.size or frame, frame)]             # a side
            size = [min(crop, max(1, round(own * s))) for crop, own, s in zip(self.crop, frame, scale)]
            h, w = (min(own, max(1, round(side / s))) for own, side, s in zip(frame, size, scale))
            top, left = choose_crop(label.numpy(), (h, w), rng)
            image, label = resize_pair(image[:, top:top + h, left:left + w], label[top:top + h, left:left + w], size)
            image = distort(image, rng)
        if rng.random() < 0.5:
            image, label = image.flip(2), label.flip(1)
        right, below = self.crop[1] - label.shape[1], self.crop[0] - label.shape[0]
        if right or below:
            whole = torch.tensor(PAD, dtype=torch.uint8).expand(*self.crop, 3).contiguous().permute(2, 0, 1)
            whole[:, :label.shape[0], :label.shape[1]] = image
            image, label = whole, F.pad(label, (0, right, 0, below), value=IGNORE)
        return image, label


def resize_pair(image, label, size):
    """Image (3, h, w) and label (h, w) at `size` (H, W): bilinear (antialiased where it shrinks), and nearest: no new ids appear."""
    if label.shape == tuple(size):
        return image, label
    image = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)      # (1, 3, h, w), known as channels-last: a third of the time
    return (F.interpolate(image, size=size, mode="bilinear", antialias=True)[0],
            F.interpolate(label[None, None], size=size, mode="nearest-exact")[0, 0])


def choose_crop(ids, crop, rng, cap=0.75, tries=10):
    """(top, left) of a random window of `crop` (h, w) pixels of `ids` (H, W) in which no class has over `cap` of the labelled
    pixels; after `tries` windows the last one."""
    (H, W), (h, w) = ids.shape, crop
    for _ in range(tries):
        top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
        counts = np.bincount(ids[top:top + h, left:left + w].ravel(), minlength=256)[:IGNORE]
        if counts.max() < cap * counts.sum():
            break
    return top, left


def distort(image, rng):
    """Photometric distortion of an image (3, H, W), each with probability 1/2: brightness +-32, contrast x0.5-1.5, saturation x0.5-1.5
    (about the luminance), hue +-18 degrees (about the grey axis). One affine map of RGB: a tenth of the time of going through HSV."""
    def maybe(low, high, neutral):
        return rng.uniform(low, high) if rng.random() < 0.5 else neutral

    brightness, contrast, saturation, hue = maybe(-32, 32, 0), maybe(0.5, 1.5, 1), maybe(0.5, 1.5, 1), math.radians(maybe(-18, 18, 0))
    grey = np.full((3, 3), 1 / 3)                                 # projection on the axis that the hue turns about
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = math.cos(hue) * np.eye(3) + (1 - math.cos(hue)) * grey + math.sin(hue) * across      # Rodrigues' formula
    saturate = saturation * np.eye(3) + (1 - saturation) * np.array(LUMINANCE)
    matrix = np.column_stack([contrast * turn @ saturate, np.full(3, contrast * brightness)])                   # (3, 4)
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).convert("RGB", tuple(matrix.ravel()))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


class Stream(torch.utils.data.Dataset):
    """The endless training stream: stream[n] is the n-th augmented sample, a function of (seed, n) and nothing else.

    Each pass over the data has its own shuffle, and each sample its own random numbers, so the stream is the same for any
    number of workers and processes, and training resumes at sample n by starting at n.
    """

    def __init__(self, dataset, augment, seed=0):
        self.dataset, self.augment, self.seed = dataset, augment, seed
        self.epoch, self.order = None, None

    def __getitem__(self, n):
        epoch, place = divmod(n, len(self.dataset))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.dataset))
        return self.augment(*self.dataset[int(self.order[place])], np.random.default_rng((self.seed, 1, n)))


# ---------------------------------------------------------------- pictures

def colourise(label, palette):
    """Class ids (H, W) -> RGB uint8 (H, W, 3); void is black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(palette)] = palette
    return table[np.asarray(label)]


def overlay(image, label, palette, strength=0.55):
    """RGB uint8 (H, W, 3) with the classes' colours laid over it; void stays as it is. -> uint8 (H, W, 3)"""
    image, label = np.asarray(image), np.asarray(label)
    alpha = np.where(label == IGNORE, 0, strength)[..., None]
    return np.rint(image * (1 - alpha) + colourise(label, palette) * alpha).astype(np.uint8)


def grid(rows, captions=(), width=320, gap=4):
    """Rows of RGB arrays of any size -> one PIL picture, every cell `width` pixels wide, with a caption over each column."""
    def fit(array):
        cell = Image.fromarray(array)
        return cell.resize((width, max(1, round(width * cell.height / cell.width))), Image.Resampling.BILINEAR)
    rows = [[fit(cell) for cell in row] for row in rows]
    columns, top = max(map(len, rows)), 16 if captions else 0
    sheet = Image.new("RGB", (columns * (width + gap) - gap, top + sum(max(c.height for c in row) + gap for row in rows) - gap), "white")
    for column, caption in enumerate(captions):
        ImageDraw.Draw(sheet).text((column * (width + gap) + 3, 2), caption, fill="black")
    for row in rows:
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * (width + gap), top))
        top += max(cell.height for cell in row) + gap
    return sheet


def legend(classes, palette, width, height=18):
    """RGB array (lines * height, width, 3) that names each class in its colour, to stand under a grid."""
    step = 24 + 7 * max(map(len, classes))
    across = max(1, width // step)
    sheet = Image.new("RGB", (width, height * -(-len(classes) // across)), "white")
    brush = ImageDraw.Draw(sheet)
    for i, (name, colour) in enumerate(zip(classes, palette)):
        x, y = i % across * step, i // across * height
        brush.rectangle((x + 2, y + 3, x + 14, y + 15), fill=tuple(colour), outline="black")
        brush.text((x + 19, y + 3), name, fill="black")
    return np.asarray(sheet)


# ---------------------------------------------------------------- python data.py SPEC

def check(dataset):
    """Read every frame -> (pixel counts (256,), {"WxH": frames}, [what is wrong])."""
    counts, sizes, problems = np.zeros(256, np.int64), {}, []
    for i in range(len(dataset)):
        parts = []
        try:
            for read in (dataset.read_image, dataset.read_label):
                try:
                    parts.append(read(i))
                except DatasetError as error:                     # the label is read even when the image is broken
                    problems.append(str(error))
            if len(parts) < 2:
                continue
            _, label = dataset.finish(i, *parts)
        except DatasetError as error:
            problems.append(str(error))
            continue
        counts += np.bincount(label.numpy().ravel(), minlength=256)
        size = f"{label.shape[1]}x{label.shape[0]}"
        sizes[size] = sizes.get(size, 0) + 1
        if sys.stderr.isatty():
            print(f"\r{i + 1}/{len(dataset)}", end="\r", file=sys.stderr)
    return counts, sizes, problems


def report(dataset, split, counts, sizes):
    """Print what `check` counted: sizes, void share, and per class its share and weight."""
    labelled, C = counts[:len(dataset.classes)].sum(), len(dataset.classes)
    ids = [i for i in range(C) if counts[i]]
    print(f"\n{dataset.name} {split}: {len(dataset)} frames of {', '.join(f'{size} ({n})' for size, n in sizes.items())}; "
          f"{len(ids)} of {C} classes met; void {100 * counts[IGNORE] / max(counts.sum(), 1):.2f} % of all pixels")
    print(f"{'id':>4}  {'class':<16}{'% of labelled':>14}{'weight':>9}      weight = 1 / ln(1.10 + share)")
    for i, name in enumerate(dataset.classes):
        share = counts[i] / max(labelled, 1)
        print(f"{i:>4}  {name:<16}{100 * share:>14.3f}{1 / np.log(1.10 + share):>9.4f}{'' if counts[i] else '      not met'}")


def main():
    parser = argparse.ArgumentParser(description="Check a data set: read every file, print what is there and what is wrong.")
    parser.add_argument("spec", nargs="?", default="toy", help="toy, camvid:DIR, cityscapes:DIR or folder:DIR")
    parser.add_argument("--split", choices=SPLITS, help="one split only; default: all that are there")
    parser.add_argument("--fold", type=int, help="check the folds' train and val in place of the splits; counts from 0")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--fold-by", choices=("drive", "block", "shuffle"))
    parser.add_argument("--sheet", default="contact_sheet.png", help="where to draw frames and labels to look at")
    args = parser.parse_args()
    problems, rows = [], []
    splits = [args.split] if args.split else SPLITS[:2] if args.fold is not None else SPLITS
    try:
        datasets = []
        for split in splits:
            try:
                datasets.append((split, open_dataset(args.spec, split, args.fold, args.folds, fold_by=args.fold_by)))
            except DatasetError as error:
                root = Path(args.spec.partition(":")[2])
                parts = (split, f"{split}annot", f"{split}_labels", f"{split}.txt", f"leftImg8bit/{split}", f"gtFine/{split}")
                if split == "train" or args.split or any((root / part).exists() for part in parts):
                    problems.append(str(error))
                else:                                             # val and test need not be there
                    print(f"no {split} split: {error}")
        for split, dataset in datasets:
            counts, sizes, wrong = check(dataset)
            report(dataset, split, counts, sizes)
            problems += wrong
            for i in np.linspace(0, len(dataset) - 1, 4).astype(int):
                try:
                    image, label = dataset[int(i)]
                    image = image.permute(1, 2, 0).numpy()
                    rows.append([image, colourise(label, dataset.palette), overlay(image, label, dataset.palette)])
                except DatasetError:
                    pass                                          # among the problems already
        if rows:
            grid(rows, ("frame", "label", "both")).save(args.sheet)
            print(f"\nframe, label and both: {args.sheet}")
    except (OSError, ValueError) as error:
        problems.append(f"cannot write {args.sheet}: {getattr(error, 'strerror', None) or error}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(2 if problems else 0)


if __name__ == "__main__":
    main()
