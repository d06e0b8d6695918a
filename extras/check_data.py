"""The check of a data set: read every file, say what is there and what is wrong, draw a few frames.

    python data.py folder:DIR [--split val] [--fold 0 --folds 5] [--sheet contact_sheet.png]

All that is wrong is found in one pass, and the exit code is then 2. What is wrong with many files
is said once; --all says it of each. What is probably wrong is a warning, and no error.
"""

import argparse
import sys
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from data import (
    IGNORE,
    SPLITS,
    DatasetError,
    Files,
    Folder,
    SecretLabels,
    expand_user,
    open_dataset,
)
from extras.cli import UsageError, add_fold_flags, run_command, show_progress
from extras.data_advice import advise
from extras.data_checks import check_end
from extras.outputs import picture_path, save_picture
from extras.pictures import colourise, grid, overlay
from extras.printable import printable
from extras.said_once import said_once
from extras.shared_pictures import miniature
from extras.smoothed_masks import CLEAR, smoothed_share

SHEET_FRAMES = 4                                                  # of each split


@dataclass
class Findings:
    """What reading every frame of a split found."""

    counts: np.ndarray                                            # pixels of each id (256,)
    sizes: dict = field(default_factory=dict)                     # {(H, W): frames}
    problems: list = field(default_factory=list)                  # sentences
    miniatures: dict = field(default_factory=dict)                # {frame: its picture, small}
    smoothed: list = field(default_factory=list)                  # frames: their labels' edges are


def check(dataset):
    """Read every frame -> Findings."""
    found = Findings(counts=np.zeros(256, np.int64))
    progress = show_progress("reading")
    for i in range(len(dataset)):
        check_frame(dataset, i, found)
        progress(i + 1, len(dataset))
    return found


def check_frame(dataset, i, found):
    """Add frame i to `found`. The label is read even when the image is broken."""
    image = read_or_note(partial(read_whole_image, dataset), i, found.problems)
    label = read_or_note(dataset.read_label, i, found.problems)
    if image is None or label is None:
        return
    try:
        dataset.check_sizes(i, image.shape[:2], label.shape)
    except DatasetError as error:
        found.problems.append(str(error))
        return
    found.counts += np.bincount(label.ravel(), minlength=256)
    found.sizes[label.shape] = found.sizes.get(label.shape, 0) + 1
    found.miniatures[i] = miniature(image)
    if smoothed_share(label) >= CLEAR:
        found.smoothed.append(i)


def read_whole_image(dataset, i):
    """-> RGB (H, W, 3). Raises DatasetError also for a JPEG of which only a little is missing."""
    image = dataset.read_image(i)
    if isinstance(dataset, Files):
        check_end(dataset.paths[i][0], thorough=True)
    return image


def read_or_note(read, i, problems):
    """-> read(i), or None and its error among the problems."""
    try:
        return read(i)
    except DatasetError as error:
        problems.append(str(error))
        return None


# ---------------------------------------------------------------- the splits of a data set

def existing_splits(args, problems):
    """-> [(split, its dataset)] of those that can be opened; why others cannot is printed where
    that is nothing wrong, else added to `problems`."""
    if args.split:
        names = [args.split]
    elif args.fold is not None:
        names = ["train", "val"]
    else:
        names = SPLITS
    datasets = []
    for split in names:
        try:
            dataset = open_dataset(args.spec, split, args.fold, args.folds, fold_by=args.fold_by)
            datasets.append((split, dataset))
        except DatasetError as error:
            if args.split or is_a_problem(error, args.spec, split):
                problems.append(str(error))
            elif str(error) not in problems:
                print(f"no {split} split: {printable(error, 2000)}")
    return datasets


def is_a_problem(error, spec, split):
    """val and test need not be there, but half a split is wrong; secret labels are not."""
    if isinstance(error, SecretLabels):
        return False
    return split == "train" or parts_exist(spec, split)


def parts_exist(spec, split):
    """Is there anything of this split, in any of the layouts?"""
    folder = expand_user(spec.partition(":")[2])
    parts = (split, f"{split}annot", f"{split}_labels", f"{split}.txt",
             f"leftImg8bit/{split}", f"gtFine/{split}")
    return any((folder / part).exists() for part in parts)


def check_split(split, dataset, problems):
    """Read a split and print what is there. -> Findings"""
    found = check(dataset)
    report(dataset, split, found)
    problems += found.problems
    if found.sizes and not found.counts[:len(dataset.classes)].any():
        problems.append(f"{dataset.where(0)}: no label of the {split} split has a class: "
                        f"all pixels are void")
    return found


def report(dataset, split, found):
    """Print the sizes, the share of void, and each class with its share and weight."""
    C = len(dataset.classes)
    class_counts = found.counts[:C]
    labelled = max(class_counts.sum(), 1)
    void = 100 * found.counts[IGNORE] / max(found.counts.sum(), 1)
    sizes = [f"{width}x{height} ({n})" for (height, width), n in found.sizes.items()]
    met = np.count_nonzero(class_counts)
    print(f"\n{dataset.name} {split}: {len(dataset)} frames of {', '.join(sizes) or 'no size'}; "
          f"{met} of {C} classes met; void {void:.2f} % of all pixels")
    print(f"{'id':>4}  {'class':<16}{'% of labelled':>14}{'weight':>9}"
          f"      weight = 1 / ln(1.10 + share)")
    for i, name in enumerate(dataset.classes):
        share = class_counts[i] / labelled
        percent = 100 * share
        weight = 1 / np.log(1.10 + share)
        note = "" if class_counts[i] else "      not met"
        print(f"{i:>4}  {name:<16}{percent:>14.3f}{weight:>9.4f}{note}")


def report_unlisted(dataset):
    """Print how many images of a folder are in none of its lists, and so are not used."""
    if not isinstance(dataset, Folder):
        return
    images, _ = dataset.list_files()
    lists = dataset.read_lists()
    listed = set().union(*lists.values())
    unlisted = [path for stem, path in images.items() if stem not in listed]
    if lists and unlisted:
        print(f"\nin no list, so not used: {len(unlisted)} of {len(images)} images, the first "
              f"{printable(unlisted[0].name)}")


# ---------------------------------------------------------------- the sheet

def sheet_rows(dataset):
    """-> rows of frame, label and both, of frames spread over the data set."""
    rows = []
    for i in np.linspace(0, len(dataset) - 1, SHEET_FRAMES).astype(int).tolist():
        try:
            image, label = dataset[i]
        except DatasetError:                                      # among the problems already
            continue
        image = image.permute(1, 2, 0).numpy()                    # (H, W, 3)
        both = overlay(image, label, dataset.palette)
        rows.append([image, colourise(label, dataset.palette), both])
    return rows


def draw_sheet(rows, path, problems):
    try:
        save_picture(grid(rows, ("frame", "label", "both")), path)
    except UsageError as error:
        problems.append(str(error))
    else:
        print(f"\nframe, label and both: {path}")


# ---------------------------------------------------------------- the command

def build_parser():
    parser = argparse.ArgumentParser(prog="data.py", description="Check a data set: read every "
                                     "file, print what is there and what is wrong.")
    parser.add_argument("spec", nargs="?", default="toy",
                        help="toy, camvid:DIR, cityscapes:DIR or folder:DIR")
    parser.add_argument("--split", choices=SPLITS, help="one split; default: all that are there")
    add_fold_flags(parser)
    parser.add_argument("--sheet", default="contact_sheet.png", type=picture_path,
                        help="where to draw frames and labels to look at")
    parser.add_argument("--all", action="store_true",
                        help="say of every file what is wrong with it (default: each kind once)")
    return parser


def main():
    args = build_parser().parse_args()
    problems = []
    rows = []
    splits = {}
    for split, dataset in existing_splits(args, problems):
        found = check_split(split, dataset, problems)
        splits[split] = (dataset, found)
        rows += sheet_rows(dataset)
    if splits and args.fold is None:
        report_unlisted(dataset)
    if rows:
        draw_sheet(rows, args.sheet, problems)
    for line in said_once(problems, args.all):
        print(f"error: {line}", file=sys.stderr)
    for line in said_once(advise(args.spec, splits), args.all):
        print(f"warning: {line}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    run_command(main)
