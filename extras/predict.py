"""Segment photos and videos of your own: files, folders with all that is below them, .txt lists of
paths, numbered pictures.

    python -m extras.predict student.pth photos/ --out segmented
    python -m extras.predict student.pth huge.jpg --out segmented --window 1024 1024
    python -m extras.predict student.pth drive.mp4 cat.gif --out segmented
    python -m extras.predict student.pth shots/frame_%04d.png --fps 10 --out segmented
    python -m extras.predict city.pth leftImg8bit/test --out submission --label-ids

For a photo NAME.jpg, DIR/NAME.png holds the class ids (8 bits), and DIR/NAME_overlay.png is to look
at; with --label-ids there are no overlays, which Cityscapes' evaluation would take for predictions.
A video or numbered pictures become DIR/NAME_overlay.mp4 (needs PyAV), an animation
DIR/NAME_overlay.gif (.webp, .png), each frame shown as long as before; --frames writes the ids of
each frame too, to DIR/NAME/000001.png and on. What lies below a folder keeps its place below DIR.

A photo or a frame that cannot be read is said at the end, the others do not wait for it; the exit
code is 2 then. A full disk ends the command, which says how many are done. Nothing is written
through a link.
"""

import argparse
import collections
import sys
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data import CITYSCAPES, DatasetError, distinct_colours, read_lines, read_picture
from eval import segment
from extras.cli import NotFinite, UsageError, make_folder, number, run_command, show_progress
from extras.machine import keep_freed_memory, pick_device
from extras.outputs import FullDisk, output_below
from extras.pictures import overlay
from extras.provenance import other_classes
from extras.video import VIDEO_SUFFIXES, is_animation, is_pattern, sequence_name
from extras.view_flags import (
    add_view_flags,
    autocast,
    check_view_flags,
    describe_protocol,
    open_model,
    segment_options,
)
from model import SMALLEST

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class Item(NamedTuple):
    """A photo, or a clip: a video, an animation, numbered pictures."""
    path: Path
    name: Path                                                    # below --out, without a suffix
    is_clip: bool

    @property
    def overlay(self):
        """Where the overlay goes, below --out."""
        suffix = ".png"
        if self.is_clip:
            suffix = self.path.suffix.lower() if is_animation(self.path) else ".mp4"
        return f"{self.name}_overlay{suffix}"


# ---------------------------------------------------------------- what to segment

def find_items(inputs):
    """Files, folders, .txt lists and patterns of numbers -> [Item]. Raises UsageError for one
    without any."""
    items = []
    for path in map(Path, inputs):
        if path.is_dir():
            items += items_in_folder(path)
        elif path.suffix.lower() == ".txt":
            items += items_in_list(path)
        elif is_pattern(path) and not path.exists():
            items.append(Item(path, Path(sequence_name(path)), is_clip=True))
        else:
            items.append(item_of(path, Path(path.stem)))
    return items


def item_of(path, name):
    is_clip = path.suffix.lower() in VIDEO_SUFFIXES or is_animation(path)
    return Item(path, name, is_clip)


def items_in_folder(folder):
    """All photos and clips below a folder. Other files are counted and said, not skipped
    silently."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    suffixes = PHOTO_SUFFIXES + VIDEO_SUFFIXES
    found = [path for path in files if path.suffix.lower() in suffixes]
    if not found:
        raise UsageError(f"{folder}: no photo in it (looked for {' '.join(suffixes)})")
    others = [path for path in files if path.suffix.lower() not in suffixes]
    if others:
        print(f"note: {len(others)} files in {folder} are no photos by their names, "
              f"first {others[0]}", file=sys.stderr)
    return [item_of(path, path.relative_to(folder).with_suffix("")) for path in found]


def items_in_list(path):
    """What a text file names, a path a line, from the file's own folder."""
    lines = read_lines(path)
    if not lines:
        raise UsageError(f"{path}: it names no photo")
    return [item_of(path.parent / line, Path(Path(line).stem)) for line in lines]


def read_photo(path):
    """A photo as a person sees it (the camera's rotation applied) -> uint8 (H, W, 3).

    Raises DatasetError.
    """
    image = read_picture(path, upright=True)
    check_size(image, path)
    return image


def check_size(image, where):
    """Raise DatasetError for an image that is too small for the network."""
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST:
        raise DatasetError(f"{where}: {width}x{height} pixels, "
                           f"the network needs {SMALLEST}x{SMALLEST} at least")


# ---------------------------------------------------------------- what may be written

def outputs_of(item, args):
    """-> what an item is written to, below --out."""
    if args.label_ids:
        return [f"{item.name}.png"]
    if item.is_clip:
        folder = [str(item.name)] if args.frames else []
        return [item.overlay, *folder]
    return [f"{item.name}.png", item.overlay]


def check_names(items, args):
    """Refuse items that would overwrite each other's results."""
    written = collections.Counter()
    for item in items:
        for name in outputs_of(item, args):
            written[str(name)] += 1
    doubles = [name for name, count in written.items() if count > 1]
    # The frames of drive.mp4 go to drive/000001.png, and so does the result of drive/000001.jpg.
    folders = {str(item.name) for item in items if item.is_clip and args.frames}
    for name in map(Path, written):
        if str(name.parent) in folders and name.stem.isdecimal():
            doubles.append(str(name))
    doubles.sort()
    if doubles:
        raise UsageError(f"two photos would both be written to {doubles[0]}: "
                         "give them different names")


def check_out(out, inputs, items):
    """Refuse to write among the photos: one could be overwritten, or a result taken for one."""
    out = Path(out).resolve()
    holds_photos = any(item.path.resolve().is_relative_to(out) for item in items)
    folders = [Path(path).resolve() for path in inputs if Path(path).is_dir()]
    lies_in_input = any(out.is_relative_to(folder) for folder in folders)
    if holds_photos or lies_in_input:
        raise UsageError(f"--out {out} is where the photos are: choose another folder, "
                         "so that none is overwritten or taken for a photo")


def check_label_ids(items, args):
    """With --label-ids: refuse clips, and a folder with other pictures. Cityscapes' evaluation
    takes any CITY_000000_000000*.png below the folder for a prediction, and ends at a second."""
    if not args.label_ids:
        return
    clips = [item.path for item in items if item.is_clip]
    if clips:
        raise UsageError(f"--label-ids is for photos, {clips[0]} has several pictures")
    out = Path(args.out)
    own = {out / name for item in items for name in outputs_of(item, args)}
    others = [path for path in sorted(out.rglob("*.png")) if path not in own]
    if others:
        raise UsageError(f"{others[0]}: the evaluation would take it for a prediction too; "
                         f"choose a new folder for --label-ids")


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


# ---------------------------------------------------------------- segmenting

class Segmenter:
    """A model with all that says how a picture is segmented and written."""

    def __init__(self, model, ids, args):
        self.model = model
        self.ids = ids
        self.palette = model.palette or distinct_colours(model.num_classes)
        self.options = segment_options(args)
        self.args = args
        self.out = make_folder(args.out)

    def classes_of(self, image, where):
        """uint8 (H, W, 3) -> its classes (H, W). Raises UsageError."""
        pixels = torch.from_numpy(image).permute(2, 0, 1)         # (3, H, W)
        try:
            return segment(self.model, pixels, self.model.input_size, **self.options).numpy()
        except NotFinite as error:
            raise UsageError(f"{self.args.checkpoint}: {error} ({where})") from None

    def overlay_of(self, image, classes):
        return overlay(image, classes, self.palette)

    def write_picture(self, name, pixels):
        with output_below(self.out, name) as file:
            Image.fromarray(pixels).save(file, format="PNG")

    def write_ids(self, name, classes):
        self.write_picture(name, self.ids[classes])

    def segment_photo(self, item):
        """Write a photo's ids, and its overlay unless --label-ids. Raises DatasetError and
        UsageError."""
        image = read_photo(item.path)                             # (H, W, 3)
        classes = self.classes_of(image, item.path)
        self.write_ids(f"{item.name}.png", classes)
        if not self.args.label_ids:
            self.write_picture(item.overlay, self.overlay_of(image, classes))


def segment_photos(segmenter, photos):
    """-> a sentence for each photo that cannot be read; the others go on. A full disk ends it."""
    progress = show_progress("photos")
    problems = []
    for done, photo in enumerate(photos, 1):
        try:
            segmenter.segment_photo(photo)
        except FullDisk as error:
            say_problems(problems)
            before = done - 1 - len(problems)
            raise FullDisk(f"{error}; {before} of {len(photos)} photos were segmented before, "
                           f"{len(photos) - done} come after it") from None
        except (DatasetError, UsageError) as error:
            problems.append(str(error))
        except KeyboardInterrupt:
            say_problems(problems)
            before = done - 1 - len(problems)
            print(f"{before} of {len(photos)} photos were segmented, the last one before "
                  f"{photo.path}", file=sys.stderr)
            raise
        progress(done, len(photos))
    return problems


def say_problems(problems):
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)


def segment_clips(segmenter, clips):
    """Print a line for each clip. -> a sentence for each that is broken, or has broken frames."""
    from extras.predict_clip import segment_clip
    problems = []
    for item in clips:
        try:
            problems += segment_clip(segmenter, item)
        except FullDisk:
            say_problems(problems)
            raise
        except (DatasetError, UsageError) as error:
            problems.append(str(error))
    return problems


# ---------------------------------------------------------------- the command

def build_parser():
    parser = argparse.ArgumentParser(prog="python -m extras.predict",
                                     description="Segment photos and videos: class ids and "
                                     "overlays.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="ours, Hugging Face's (file or folder), NVlabs' or TransKD's")
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="photos, animations, videos, folders of them, .txt lists of paths, a "
                             "path a line, and numbered pictures, frame_%%04d.png")
    parser.add_argument("--out", metavar="DIR", required=True,
                        help="where to write NAME.png and NAME_overlay.png; not among the photos")
    parser.add_argument("--label-ids", action="store_true",
                        help="write Cityscapes' raw label ids, as its test server wants them, and "
                             "nothing else (default: class ids 0..C-1, and overlays)")
    parser.add_argument("--frames", action="store_true",
                        help="write the ids of each frame of a video or an animation too "
                             "(default: its overlay)")
    parser.add_argument("--fps", type=number(Fraction, 0, 1000, open_low=True), metavar="N",
                        help="frames a second of numbered pictures (default: 25)")
    add_view_flags(parser)
    return parser


def check_flags(parser, args):
    """What single flags cannot tell."""
    check_view_flags(parser, args)
    if args.label_ids and args.frames:
        parser.error("--label-ids is for photos: leave --frames out")


def describe(photos, problems, args):
    """The line on the photos."""
    what = f"class ids in {args.out}/NAME.png, overlays in {args.out}/NAME_overlay.png"
    if args.label_ids:
        what = f"Cityscapes label ids in {args.out}/NAME.png"
    done = len(photos) - len(problems)
    return f"{done} of {len(photos)} photos segmented{describe_protocol(args)}: {what}"


def main():
    parser = build_parser()
    args = parser.parse_args()
    check_flags(parser, args)
    keep_freed_memory()
    device = pick_device(args.device)
    model = open_model(args.checkpoint, args.size, device)

    items = find_items(args.inputs)
    check_names(items, args)
    check_out(args.out, args.inputs, items)
    check_label_ids(items, args)
    photos = [item for item in items if not item.is_clip]
    clips = [item for item in items if item.is_clip]
    if args.fps and not any(is_pattern(clip.path) for clip in clips):
        parser.error("--fps goes with numbered pictures, frame_%04d.png: videos have their own")
    segmenter = Segmenter(model, written_ids(model, args.checkpoint, args.label_ids), args)
    with autocast(device, args.amp):
        problems = segment_photos(segmenter, photos)
        if photos:
            print(describe(photos, problems, args))
        problems += segment_clips(segmenter, clips)
    say_problems(problems)
    return 2 if problems else 0


if __name__ == "__main__":
    run_command(main)
