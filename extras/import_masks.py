"""What a labelling tool wrote, as a data set of this project: images, 8-bit masks, classes.txt.

    python -m extras.import_masks coco SOURCE DIR        # COCO's instances: polygons, run lengths
    python -m extras.import_masks labelme SOURCE DIR     # LabelMe: a .json for each picture
    python -m extras.import_masks cvat SOURCE DIR        # CVAT for images 1.1: .xml
    python -m extras.import_masks voc SOURCE DIR         # masks in colours or ids, PASCAL VOC's way
    python data.py folder:DIR                            # then: look at what came out

SOURCE is a folder with the pictures and what the tool wrote, at any depth; DIR is new or empty. A
pixel that nothing was drawn on gets the class `background`, id 0, or what --rest says.

    DIR/images/NAME.jpg  DIR/labels/NAME.png  DIR/classes.txt  DIR/import_report.txt
    DIR/train.txt val.txt test.txt               where the names of files or folders say the split

The report says what was drawn, which classes overlap and which of them won, and what was left out.
A picture that cannot be used is said, the others go on, and the exit code is 2 then.
"""

import argparse
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data import (
    IMAGE_SUFFIXES,
    INVALID,
    NEUTRAL,
    SPLITS,
    DatasetError,
    distinct_colours,
    measure_picture,
    read_picture,
)
from extras import masks_coco, masks_cvat, masks_labelme, masks_voc
from extras.annotations import (
    UNPAINTED,
    VOID,
    Notes,
    Options,
    Source,
    Unusable,
    clean_label,
    read_class_list,
)
from extras.cli import UsageError, make_folder, number, run_command, show_progress
from extras.import_report import Report, describe
from extras.mask_shapes import ShapeError
from extras.outputs import save_picture, write_text

READERS = {"coco": masks_coco, "labelme": masks_labelme, "cvat": masks_cvat, "voc": masks_voc}
BACKGROUND = "background"
VOID_LABELS = ("void", "ignore", "__ignore__")                    # drawn with these, it is void
MOST_LISTED = 20                                                  # classes, in an error
JPEG_QUALITY = 95                                                 # of photos that must be turned


@dataclass
class Classes:
    """The classes of the data set that is written."""
    colours: dict                                                 # {name: (R, G, B)}
    ids: dict                                                     # {label of the tool: id}
    rest: int                                                     # the id of unpainted pixels


# ---------------------------------------------------------------- classes

def choose_classes(annotations, options, rest):
    """The labels of a tool, --classes and --rest -> Classes."""
    labels = annotations.labels
    names = dict(options.classes or labels)
    void = [name for name in names if name.lower() in VOID_LABELS]
    for name in void:
        del names[name]
    rest_name = find_rest(names, rest)
    if rest_name is None and rest == BACKGROUND and not annotations.leaves_rest:
        rest = "void"                                             # no pixel would be in that class
    if rest_name is None and rest == BACKGROUND and not options.classes:
        names = {BACKGROUND: NEUTRAL, **names}
        rest_name = BACKGROUND
    if rest_name is None and rest != "void":
        listed = ", ".join(list(names)[:MOST_LISTED])
        if len(names) > MOST_LISTED:
            listed += ", ..."
        raise UsageError(f"--rest {rest}: it is none of the classes ({listed}); name one of them, "
                         f"or void")
    if len(names) >= INVALID:
        raise UsageError(f"{len(names)} classes, and a mask of 8 bits has room for "
                         f"{INVALID - 1}: choose some with --classes")

    colours = {}
    for (name, colour), distinct in zip(names.items(), distinct_colours(len(names)), strict=True):
        if colour is None:
            colour = NEUTRAL if name == rest_name else distinct
        colours[name] = colour
    order = list(names)
    ids = {name: i for i, name in enumerate(order)}
    ids |= dict.fromkeys(void, VOID)
    ids |= {label: VOID for label in labels if label.lower() in VOID_LABELS}
    return Classes(colours, ids, ids[rest_name] if rest_name else VOID)


def find_rest(names, rest):
    """The class that --rest means: of this name, or for `background` as tools write it,
    `_background_`; None where there is none."""
    for name in names:
        if name == rest or name.lower().strip("_ ") == rest == BACKGROUND:
            return name
    return None


# ---------------------------------------------------------------- a picture's mask

def draw_label(frame, size, annotations, classes, report):
    """-> uint8 (H, W), the ids of a frame; overlaps and regions go to the report. Raises Unusable
    and DatasetError."""
    if annotations.decode_mask:
        label = annotations.decode_mask(frame.mask)
        if label.shape != size:
            raise Unusable("mask and photo are not of one size",
                           f"{label.shape[1]}x{label.shape[0]}, {size[1]}x{size[0]}")
        label = rename_ids(label, list(annotations.labels), classes)
    else:
        label = draw_regions(frame, size, classes, report)
    label[label == UNPAINTED] = classes.rest
    return label


def rename_ids(label, labels, classes):
    """Ids in the tool's order -> ids of the data set."""
    table = np.full(256, VOID, np.uint8)
    table[UNPAINTED] = UNPAINTED
    for i, name in enumerate(labels):
        table[i] = classes.ids.get(name, UNPAINTED)
    return table[label]


def draw_regions(frame, size, classes, report):
    """The regions of a frame over each other -> ids and UNPAINTED, uint8 (H, W)."""
    height, width = size
    label = np.full(size, UNPAINTED, np.uint8)
    names = {i: name for name, i in classes.ids.items()}
    for region in frame.regions:
        if region.label not in classes.ids:
            report.left_labels[region.label] += 1
            continue
        try:
            mask = region.draw(height, width)
        except ShapeError as error:
            raise Unusable(f"a region cannot be drawn: {error}", region.label) from None
        below = np.bincount(label[mask], minlength=256)           # what it is drawn over
        own = classes.ids[region.label]
        for i in np.flatnonzero(below):
            if i not in (own, UNPAINTED):
                report.overlaps[region.label, names[i]] += int(below[i])
        label[mask] = own
        report.regions[region.label] += 1
    return label


# ---------------------------------------------------------------- what is written

def check_folders(source, out):
    """Raise UsageError unless `out` is new or empty, and not inside what is read."""
    if os.path.lexists(out):
        if not out.is_dir():
            raise UsageError(f"{out}: it is no folder")
        if any(out.iterdir()):
            raise UsageError(f"{out}: the folder is not empty; choose a new one")
    if out.resolve().is_relative_to(Path(source).resolve()):
        raise UsageError(f"{out} lies in {source}: choose a folder outside of what is read")


def name_frames(frames, source):
    """-> {stem: frame}: the name of the picture's file, with its folders before it where two have
    one name. A picture that two files name is taken once, and that is said."""
    once = {}
    for frame in frames:
        if frame.picture in once:
            source.notes.left_out("a second annotation of a picture, left out", frame.file)
        else:
            once[frame.picture] = frame
    counts = Counter(picture.stem.lower() for picture in once)
    named = {}
    for picture, frame in once.items():
        stem = clean_label(picture.stem)                          # a line in a split's list
        if counts[stem.lower()] > 1:
            parts = picture.relative_to(source.folder).with_suffix("").parts
            stem = clean_label("_".join(parts))
        if stem in named:                                         # a.jpg and a.png
            stem = f"{stem}_{picture.suffix[1:]}"
        named[stem] = frame
    return named


def measure_upright(path):
    """-> (H, W) of a photo, and its pixels where the file cannot be copied as it is: not .png or
    .jpg, or turned by the camera. Raises DatasetError."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        try:
            return measure_picture(path), None
        except DatasetError:                                      # turned, or broken
            pass
    pixels = read_picture(path, upright=True)
    return pixels.shape[:2], pixels


def write_frame(stem, frame, annotations, classes, out, report):
    """Write the image and the mask of a frame. Raises Unusable and DatasetError."""
    size, pixels = measure_upright(frame.picture)
    if frame.size not in (None, size):
        height, width = frame.size
        raise Unusable("the photo has another size than its annotation says (is it another file, "
                       "or one that the camera marked as turned?)",
                       f"{size[1]}x{size[0]}, {width}x{height}")
    label = draw_label(frame, size, annotations, classes, report)
    image = out / "images" / f"{stem}{frame.picture.suffix.lower()}"
    if pixels is None:
        shutil.copyfile(frame.picture, image)
    else:
        report.turned.append(frame.picture)
        suffix = ".jpg" if frame.picture.suffix.lower() in (".jpg", ".jpeg") else ".png"
        path = image.with_name(stem + suffix)
        save_picture(Image.fromarray(pixels), path, quality=JPEG_QUALITY)
    save_picture(Image.fromarray(label), out / "labels" / f"{stem}.png")
    report.pixels += np.bincount(label.ravel(), minlength=256)
    report.written.append((stem, frame.split))


def write_all(named, annotations, classes, out, args, notes):
    """Write all frames -> Report. One that cannot be used goes to the notes."""
    report = Report(pixels=np.zeros(256, np.int64))
    for folder in ("images", "labels"):
        make_folder(out / folder)
    progress = show_progress("pictures")
    for done, (stem, frame) in enumerate(named.items(), 1):
        progress(done, len(named))
        if not frame.regions and not frame.mask and not args.keep_empty:
            report.empty.append(frame.picture)
            continue
        try:
            write_frame(stem, frame, annotations, classes, out, report)
        except Unusable as error:
            detail = f" ({error.detail})" if error.detail else ""
            notes.problem(error.sentence, f"{frame.mask or frame.picture}{detail}")
        except DatasetError as error:
            path, _, sentence = str(error).partition(": ")
            notes.problem(sentence, path)
    write_lists(report.written, classes, out)
    return report


def write_lists(written, classes, out):
    """classes.txt, and the lists of the splits where every frame has one."""
    lines = []
    for name, (red, green, blue) in classes.colours.items():
        lines.append(f"{name} {red} {green} {blue}\n")
    write_text(out / "classes.txt", "".join(lines))
    if any(split is None for _, split in written):
        return
    for split in SPLITS:
        stems = [f"{stem}\n" for stem, own in written if own == split]
        if stems:
            write_text(out / f"{split}.txt", "".join(stems))


# ---------------------------------------------------------------- the command

def build_parser():
    parser = argparse.ArgumentParser(prog="python -m extras.import_masks",
                                     description="Turn what a labelling tool wrote into a data "
                                     "set: images, 8-bit masks and classes.txt.")
    parser.add_argument("kind", choices=READERS, help="which tool's files")
    parser.add_argument("source", metavar="SOURCE",
                        help="the folder with the pictures and the tool's files, at any depth")
    parser.add_argument("out", metavar="DIR", type=Path, help="where to write; new or empty")
    parser.add_argument("--rest", default=BACKGROUND, metavar="CLASS",
                        help="the class of pixels that nothing was drawn on, or void "
                             "(default: background, a class of its own)")
    parser.add_argument("--classes", metavar="FILE", type=Path,
                        help="take these classes in this order, a line each: name [R G B]; other "
                             "labels are left out (default: all that the tool's files name)")
    parser.add_argument("--line-width", type=number(int, 1, 1000), metavar="N",
                        help="draw lines N pixels wide (labelme, cvat; default: leave them out)")
    parser.add_argument("--keep-empty", action="store_true",
                        help="keep pictures on which nothing was drawn, as all rest (coco, "
                             "labelme, cvat; default: leave them out)")
    parser.add_argument("--unknown-void", action="store_true",
                        help="take colours of no class as void (voc; default: an error)")
    return parser


def check_flags(parser, args):
    """What single flags cannot tell."""
    if args.unknown_void and args.kind != "voc":
        parser.error("--unknown-void goes with voc")
    if args.keep_empty and args.kind == "voc":
        parser.error("--keep-empty goes with coco, labelme and cvat")
    if args.line_width and args.kind not in ("labelme", "cvat"):
        parser.error("--line-width goes with labelme and cvat")


def main():
    parser = build_parser()
    args = parser.parse_args()
    check_flags(parser, args)
    check_folders(args.source, args.out)
    chosen = read_class_list(args.classes) if args.classes else None
    options = Options(args.line_width, chosen, args.unknown_void)
    source = Source(args.source)

    annotations = READERS[args.kind].read(source, options)
    classes = choose_classes(annotations, options, args.rest)
    named = name_frames(annotations.frames, source)
    report = write_all(named, annotations, classes, args.out, args, source.notes)

    lines = describe(report, annotations, classes, source, args.out)
    problems = [f"error: {line}" for line in Notes.lines(source.notes.broken)]
    whole = "\n".join([*lines, *problems, ""])
    write_text(args.out / "import_report.txt", whole)
    print("\n".join(lines))
    for line in problems:
        print(line, file=sys.stderr)
    if not report.written:
        raise UsageError(f"{args.source}: no frame could be taken from it")
    return 2 if problems else 0


if __name__ == "__main__":
    run_command(main)
