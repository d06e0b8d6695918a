"""All that docs/YOUR_DATA.md begins with, made here: photos labelled with four tools, new photos, a
video, a teacher of 150 classes and an ImageNet encoder (both with random weights).

    python tests/afternoon.py afternoon --photos 60       # to do the afternoon by hand

The photos are toy scenes, 256x128. What is labelled is all but a border: a region a class.
"""

import argparse
import base64
import io
import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import IGNORE  # noqa: E402
from extras.toy_scenes import TOY, TOY_SIZE, draw_scene  # noqa: E402
from model import save_checkpoint, segformer  # noqa: E402
from nvlabs import Flat  # noqa: E402

HEIGHT, WIDTH = TOY_SIZE
NAMES = list(TOY)


def regions(label):
    """-> [(name, mask (H, W))] of the classes in a label."""
    return [(NAMES[c], label == c) for c in np.unique(label) if c != IGNORE]


def run_lengths(values):
    """A flat mask -> the lengths of its runs, outside first."""
    changes = np.flatnonzero(np.diff(values)) + 1
    lengths = np.diff([0, *changes, len(values)]).tolist()
    return [0, *lengths] if values[0] else lengths


def save_photo(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


# ---------------------------------------------------------------- four tools

def write_labelme(folder, scenes):
    for name, (image, label) in scenes.items():
        save_photo(image, folder / f"{name}.jpg")
        shapes = []
        for title, mask in regions(label):
            buffer = io.BytesIO()
            Image.fromarray(mask.astype(np.uint8)).save(buffer, format="PNG")
            text = base64.b64encode(buffer.getvalue()).decode()
            shapes.append({"label": title, "shape_type": "mask", "mask": text,
                           "points": [[0, 0], [WIDTH - 1, HEIGHT - 1]]})
        content = {"imagePath": f"{name}.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH,
                   "shapes": shapes}
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_coco(folder, scenes):
    images = []
    annotations = []
    for i, (name, (image, label)) in enumerate(scenes.items()):
        save_photo(image, folder / f"{name}.jpg")
        images.append({"id": i, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH})
        for title, mask in regions(label):
            code = {"size": [HEIGHT, WIDTH], "counts": run_lengths(mask.T.ravel())}
            annotations.append({"id": len(annotations), "image_id": i, "iscrowd": 0,
                                "category_id": NAMES.index(title), "segmentation": code})
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


def write_cvat(folder, scenes):
    lines = ["<annotations><meta><job><labels>"]
    for name, colour in TOY.items():
        code = "#" + bytes(colour).hex()
        lines.append(f"<label><name>{name}</name><color>{code}</color></label>")
    lines.append("</labels></job></meta>")
    for i, (name, (image, label)) in enumerate(scenes.items()):
        save_photo(image, folder / f"{name}.jpg")
        lines.append(f'<image id="{i}" name="{name}.jpg" width="{WIDTH}" height="{HEIGHT}">')
        for title, mask in regions(label):
            lengths = ", ".join(map(str, run_lengths(mask.ravel())))
            lines.append(f'<mask label="{title}" rle="{lengths}" left="0" top="0" '
                         f'width="{WIDTH}" height="{HEIGHT}"/>')
        lines.append("</image>")
    lines.append("</annotations>")
    (folder / "annotations.xml").write_text("\n".join(lines))


def write_voc(folder, scenes):
    table = np.zeros((256, 3), np.uint8)
    table[:len(TOY)] = list(TOY.values())
    table[IGNORE] = (224, 224, 192)
    masks = folder / "SegmentationClass"
    masks.mkdir(parents=True)
    for name, (image, label) in scenes.items():
        save_photo(image, folder / "JPEGImages" / f"{name}.jpg")
        Image.fromarray(table[label]).save(masks / f"{name}.png")
    lines = []
    for name, (red, green, blue) in TOY.items():
        lines.append(f"{name}:{red},{green},{blue}::\n")
    (folder / "labelmap.txt").write_text("".join(lines))


# ---------------------------------------------------------------- all of it

def make(folder, photos):
    """The folder of the afternoon."""
    scenes = {f"street_{i:03d}": draw_scene(f"afternoon-{i:04d}") for i in range(photos)}
    write_labelme(folder / "labelme", scenes)
    write_coco(folder / "coco", scenes)
    write_cvat(folder / "cvat", scenes)
    write_voc(folder / "voc", scenes)
    for i in range(3):
        save_photo(draw_scene(f"new-{i}")[0], folder / "new" / f"photo_{i}.jpg")
    write_video(folder / "drive.mp4")

    torch.manual_seed(0)
    teacher = segformer("b1", 150, width=64)
    teacher.classes = [f"ADE20K's {i}" for i in range(150)]
    save_checkpoint(teacher, folder / "ade.pth")
    torch.save(Flat("b0").state_dict(), folder / "mit_b0.pth")


def write_video(path):
    """A camera that pans over a wide scene; none where PyAV is absent."""
    try:
        from extras.video import VideoWriter, import_av
        import_av()
    except ValueError:
        return
    wide, _ = draw_scene("drive", (HEIGHT, 2 * WIDTH))
    with open(path, "w+b") as file, VideoWriter(file, Fraction(10)) as writer:
        for i in range(10):
            left = i * WIDTH // 10
            writer.add(wide[:, left:left + WIDTH], Fraction(i, 10))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make what docs/YOUR_DATA.md begins with.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=60)
    args = parser.parse_args()
    make(args.folder, args.photos)
