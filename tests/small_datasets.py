"""What the tests of the data sets share: small trees in each layout, and ways to break them."""

import shutil
import struct
import zlib

import numpy as np
from PIL import Image

import data


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def same(a, b):
    """Are the two pairs (image, label) equal?"""
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def write_camvid(root, suffix=".png"):
    """Three drives over the splits, SegNet layout."""
    splits = {"train": ["A_001", "A_002", "B_001"], "val": ["A_003"], "test": ["C_001", "C_002"]}
    label = np.arange(36 * 48, dtype=np.uint8).reshape(36, 48) % 12
    for split, stems in splits.items():
        for stem in stems:
            save(root / split / f"{stem}{suffix}", np.full((36, 48, 3), 90, np.uint8))
            save(root / f"{split}annot" / f"{stem}.png", label)
    return f"camvid:{root}"


def write_cityscapes(root, train_ids=False):
    """Two cities in train, one in val; every raw id has a row."""
    for split, cities in {"train": ["aachen", "bochum"], "val": ["lindau"]}.items():
        for city in cities:
            for i in range(2):
                raw = np.arange(34, dtype=np.uint8)[:, None].repeat(64, 1)
                write_cityscapes_frame(root, split, f"{city}_00000{i}_000019", raw, train_ids)
    return f"cityscapes:{root}"


def write_cityscapes_frame(root, split, stem, raw, train_ids=False):
    city = stem.split("_")[0]
    frames = root / "leftImg8bit" / split / city
    masks = root / "gtFine" / split / city
    save(frames / f"{stem}_leftImg8bit.png", np.full((*raw.shape, 3), 90, np.uint8))
    save(masks / f"{stem}_gtFine_labelIds.png", raw)
    if train_ids:
        save(masks / f"{stem}_gtFine_labelTrainIds.png", np.full(raw.shape, 18, np.uint8))


def break_folder(root, what):  # noqa: C901 - one case for each way to break it
    """Do to a data set in the layout folder:DIR what the key of BROKEN_FOLDERS says."""
    image = root / "images" / "frame_2.png"
    label = root / "labels" / "frame_2.png"
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


BROKEN_FOLDERS = {                                                # {what: pattern of its sentence}
    "no label": r"images/frame_2.png: this image has no label",
    "no image": r"labels/frame_2.png: this label has no image",
    "sizes": r"frame_2.png: the image has 48x40 pixels, its label 50x40",
    "label id": r"labels/frame_2.png: label id 77",
    "truncated": r"images/frame_2.png: not an image that can be read",
    "text": r"images/frame_2.png: not an image",
    "empty file": r"labels/frame_2.png: not an image",
    "colour label": r"labels/frame_2.png: a label must be an 8-bit",
    "jpeg label": "JPEG changes the ids",
    "damaged header": "not an image",
    "latin-1 classes": "not UTF-8 text",
    "16 bit": r"labels/frame_2.png: a label must be an 8-bit",
    "no images folder": r"images: there is no such folder",
    "empty folder": r"images: no .png or .jpg",
    "no classes": r"classes.txt: there is no such file",
    "double": "second image of the same name"}


def break_image(kind, path):
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
        more = [Image.new("RGB", good.size, (i, 0, 0)) for i in (1, 2)]
        good.save(path, save_all=True, append_images=more)
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "link in a circle":
        path.unlink()
        path.symlink_to(path.name)
    elif kind == "folder":
        path.unlink()
        path.mkdir()


BROKEN_IMAGES = {                                                 # {kind: pattern of its sentence}
    "truncated": "not an image",
    "empty": "not an image",
    "16 bit": "8 bits a channel",
    "turned": "EXIF orientation 6",
    "gigapixel": "over 178 megapixels",
    "animated": "an animation of 3 pictures",
    "text": "not an image",
    "link in a circle": "frame_3.png",
    "folder": "not an image"}
