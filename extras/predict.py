"""Segment photos of your own: files, folders with all that is below them, and .txt lists of paths.

    python -m extras.predict student.pth photos/ --out segmented
    python -m extras.predict student.pth huge.jpg --out segmented --window 1024 1024
    python -m extras.predict city.pth leftImg8bit/test --out submission --label-ids

For a photo NAME.jpg, DIR/NAME.png holds the class ids (8 bits), and DIR/NAME_overlay.png is to look
at. What lies below a folder keeps its place below DIR. A photo that cannot be read is said at the
end, the others do not wait for it; the exit code is 2 then.
"""

import argparse
import collections
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data import CITYSCAPES, DatasetError, distinct_colours, read_lines, read_picture
from eval import segment
from extras.cli import (
    NotFinite,
    UsageError,
    keep_freed_memory,
    make_folder,
    pick_device,
    run_command,
    show_progress,
)
from extras.pictures import overlay
from extras.provenance import other_classes
from extras.view_flags import (
    add_view_flags,
    autocast,
    check_view_flags,
    describe_protocol,
    open_model,
    segment_options,
)
from model import SMALLEST

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Photo(NamedTuple):
    path: Path
    name: Path                                                    # below --out, without a suffix


# ---------------------------------------------------------------- what to segment

def find_photos(inputs):
    """Files, folders and .txt lists -> [Photo]. Raises UsageError for one without photos."""
    photos = []
    for path in map(Path, inputs):
        if path.is_dir():
            photos += photos_in_folder(path)
        elif path.suffix.lower() == ".txt":
            photos += photos_in_list(path)
        else:
            photos.append(Photo(path, Path(path.stem)))
    return photos


def photos_in_folder(folder):
    """All photos below a folder. Other files are counted and said, not skipped silently."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [path for path in files if path.suffix.lower() in PHOTO_SUFFIXES]
    if not found:
        suffixes = " ".join(PHOTO_SUFFIXES)
        raise UsageError(f"{folder}: no photo in it (looked for {suffixes})")
    others = [path for path in files if path.suffix.lower() not in PHOTO_SUFFIXES]
    if others:
        print(f"note: {len(others)} files in {folder} are no photos by their names, "
              f"first {others[0]}", file=sys.stderr)
    return [Photo(path, path.relative_to(folder).with_suffix("")) for path in found]


def photos_in_list(path):
    """The photos that a text file names, a path a line, from the file's own folder."""
    lines = read_lines(path)
    if not lines:
        raise UsageError(f"{path}: it names no photo")
    return [Photo(path.parent / line, Path(Path(line).stem)) for line in lines]


def read_photo(path):
    """A photo as a person sees it (the camera's rotation applied) -> uint8 (H, W, 3).

    Raises DatasetError.
    """
    image = read_picture(path, upright=True)
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST:
        raise DatasetError(f"{path}: {width}x{height} pixels, "
                           f"the network needs {SMALLEST}x{SMALLEST} at least")
    return image


# ---------------------------------------------------------------- what is written

def check_names(photos):
    """Refuse photos that would overwrite each other's results."""
    written = collections.Counter()
    for photo in photos:
        written.update([f"{photo.name}.png", f"{photo.name}_overlay.png"])
    doubles = sorted(name for name, count in written.items() if count > 1)
    if doubles:
        raise UsageError(f"two photos would both be written to {doubles[0]}: "
                         "give them different names")


def check_out(out, inputs, photos):
    """Refuse to write among the photos: one could be overwritten, or a result taken for one."""
    out = Path(out).resolve()
    holds_photos = any(photo.path.resolve().is_relative_to(out) for photo in photos)
    folders = [Path(path).resolve() for path in inputs if Path(path).is_dir()]
    lies_in_input = any(out.is_relative_to(folder) for folder in folders)
    if holds_photos or lies_in_input:
        raise UsageError(f"--out {out} is where the photos are: choose another folder, "
                         "so that none is overwritten or taken for a photo")


def written_ids(model, checkpoint, label_ids):
    """-> uint8 (256,), the id to write for each class: itself, or Cityscapes' raw id for it."""
    ids = np.arange(256).astype(np.uint8)
    if not label_ids:
        return ids
    differ = model.num_classes != len(CITYSCAPES)
    if model.classes and other_classes(model.classes, list(CITYSCAPES)):
        differ = True
    if differ:
        raise UsageError(f"--label-ids is for Cityscapes' {len(CITYSCAPES)} classes: "
                         f"{checkpoint} has others")
    ids[:len(CITYSCAPES)] = [raw_id for raw_id, _, _ in CITYSCAPES.values()]
    return ids


def segment_photos(model, photos, ids, args):
    """Segment each photo, write its ids and overlay. -> a sentence for each that cannot be read."""
    out = make_folder(args.out)
    palette = model.palette or distinct_colours(model.num_classes)
    options = segment_options(args)
    progress = show_progress("photos")
    problems = []
    for i, photo in enumerate(photos):
        try:
            image = read_photo(photo.path)                        # (H, W, 3)
            pixels = torch.from_numpy(image).permute(2, 0, 1)     # (3, H, W)
            classes = segment(model, pixels, model.input_size, **options).numpy()     # (H, W)
            folder = make_folder((out / photo.name).parent)
            target = folder / photo.name.name
            Image.fromarray(ids[classes]).save(f"{target}.png")
            Image.fromarray(overlay(image, classes, palette)).save(f"{target}_overlay.png")
        except (DatasetError, UsageError) as error:
            problems.append(str(error))                           # the other photos go on
        except NotFinite as error:
            raise UsageError(f"{args.checkpoint}: {error} ({photo.path})") from None
        progress(i + 1, len(photos))
    return problems


# ---------------------------------------------------------------- the command

def build_parser():
    parser = argparse.ArgumentParser(prog="python -m extras.predict",
                                     description="Segment photos: class ids and overlays.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="ours, Hugging Face's (file or folder), NVlabs' or TransKD's")
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="photos, folders of photos or .txt lists of photos, a path a line")
    parser.add_argument("--out", metavar="DIR", required=True,
                        help="where to write NAME.png and NAME_overlay.png; not among the photos")
    parser.add_argument("--label-ids", action="store_true",
                        help="write Cityscapes' raw label ids, as its test server wants them "
                             "(default: class ids 0..C-1)")
    add_view_flags(parser)
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    check_view_flags(parser, args)
    keep_freed_memory()
    device = pick_device(args.device)
    model = open_model(args.checkpoint, args.size, device)

    photos = find_photos(args.inputs)
    check_names(photos)
    check_out(args.out, args.inputs, photos)
    ids = written_ids(model, args.checkpoint, args.label_ids)
    with autocast(device, args.amp):
        problems = segment_photos(model, photos, ids, args)

    what = "Cityscapes label ids" if args.label_ids else "class ids"
    print(f"{len(photos) - len(problems)} of {len(photos)} photos segmented"
          f"{describe_protocol(args)}: {what} in {args.out}/NAME.png, "
          f"overlays in {args.out}/NAME_overlay.png")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    run_command(main)
