"""The same three photos, labelled as four tools would write it: small trees for the tests.

Each photo is 64x48 (width x height): a road over the lower half, a car on it, and nothing drawn on
the upper half. In all of them the car is the smaller area, drawn later.
"""

import json

import numpy as np
import pytest
from PIL import Image

SIZE = (48, 64)                                                   # (H, W)
ROAD = (0, 24, 64, 48)                                            # x0, y0, x1, y1
CAR = (10, 20, 30, 40)
COLOURS = {"background": (0, 0, 0), "car": (64, 0, 128), "road": (128, 64, 128)}


def expected_label(ids, shift=0):
    """The mask of a photo; ids: {"background", "road", "car"} -> id."""
    label = np.full(SIZE, ids["background"], np.uint8)
    label[24:48] = ids["road"]
    label[20:40, 10 + shift:30 + shift] = ids["car"]
    return label


def corners(box, shift=0):
    x0, y0, x1, y1 = box
    return [[x0 + shift, y0], [x1 + shift, y0], [x1 + shift, y1], [x0 + shift, y1]]


def write_photos(folder, names=("a.jpg", "b.jpg", "c.jpg")):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        label = expected_label({"background": 0, "road": 1, "car": 2}, shift=i)
        noise = np.random.default_rng(i).integers(0, 30, (*SIZE, 3))
        pixels = (label[..., None] * 90 + noise).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return names


def write_coco(root):
    """Photos below train/ and valid/, as Roboflow exports them, and a file for each."""
    for split, names in {"train": ("a.jpg", "b.jpg"), "valid": ("c.jpg",)}.items():
        write_photos(root / split, names)
        images = []
        annotations = []
        for i, name in enumerate(names):
            images.append({"id": i, "file_name": name, "height": 48, "width": 64})
            for category, box in ((3, CAR), (7, ROAD)):           # the car first, and yet on top
                flat = [value for corner in corners(box, i) for value in corner]
                if category == 7:
                    flat = [value for corner in corners(box) for value in corner]
                annotations.append({"id": len(annotations), "image_id": i, "iscrowd": 0,
                                    "category_id": category, "segmentation": [flat]})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 7, "name": "road"}, {"id": 3, "name": "car"}],
        }
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))


def write_labelme(root):
    """A .json beside each photo. LabelMe counts the pixels on a line: corners are half in."""
    for i, name in enumerate(write_photos(root)):
        shapes = []
        for label, box, shift in (("road", ROAD, 0), ("car", CAR, i)):
            x0, y0, x1, y1 = box
            inside = [[x0 + shift, y0], [x1 - 1 + shift, y1 - 1]]
            shapes.append({"label": label, "shape_type": "rectangle", "points": inside})
        content = {"version": "5.5.0", "imagePath": name, "imageHeight": 48, "imageWidth": 64,
                   "shapes": shapes, "imageData": None}
        (root / f"{name[:-4]}.json").write_text(json.dumps(content))


def write_cvat(root):
    """annotations.xml and images/, as "CVAT for images 1.1" comes out of its archive."""
    lines = ["<?xml version='1.0' encoding='utf-8'?>", "<annotations><version>1.1</version><meta>",
             "<job><labels><label><name>road</name><color>#804080</color></label>",
             "<label><name>car</name><color>#400080</color></label></labels></job></meta>"]
    for i, name in enumerate(write_photos(root / "images")):
        lines.append(f'<image id="{i}" name="{name}" width="64" height="48">')
        x0, y0, x1, y1 = CAR
        lines.append(f'<box label="car" xtl="{x0 + i}" ytl="{y0}" xbr="{x1 + i}" ybr="{y1}" '
                     f'z_order="1"/>')
        pairs = [f"{x}.00,{y}.00" for x, y in corners(ROAD)]
        lines.append(f'<polygon label="road" points="{";".join(pairs)}" z_order="0"/>')
        lines.append("</image>")
    lines.append("</annotations>")
    (root / "annotations.xml").write_text("\n".join(lines))


def write_voc(root, palette=False):
    """JPEGImages/, SegmentationClass/ in colours (or a palette of them), labelmap.txt and lists."""
    masks = root / "SegmentationClass"
    masks.mkdir(parents=True)
    order = {name: i for i, name in enumerate(COLOURS)}
    for i, name in enumerate(write_photos(root / "JPEGImages")):
        label = expected_label(order, shift=i)
        table = np.array(list(COLOURS.values()), np.uint8)
        if palette:
            picture = Image.fromarray(label, mode="P")
            picture.putpalette(table.ravel().tolist())
        else:
            picture = Image.fromarray(table[label])
        picture.save(masks / f"{name[:-4]}.png")
    lines = ["# label:color_rgb:parts:actions"]
    for name, (red, green, blue) in COLOURS.items():
        lines.append(f"{name}:{red},{green},{blue}::")
    (root / "labelmap.txt").write_text("\n".join(lines))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")


def import_labelme():
    """-> LabelMe's own renderer; skips the test where it is not installed."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        return pytest.importorskip("labelme.utils.shape", reason="labelme is not installed",
                                   exc_type=ImportError)
    finally:
        Image.MAX_IMAGE_PIXELS = limit                            # which it takes away from Pillow


WRITERS = {"coco": write_coco, "labelme": write_labelme, "cvat": write_cvat, "voc": write_voc}
