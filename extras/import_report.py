"""The report of an import: what was written, which classes overlap, and what was left out.

    python -m extras.import_masks ...      prints it, and keeps it in DIR/import_report.txt
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from extras.annotations import VOID, Notes

REST = ", and all that nothing was drawn on"
MOST_OVERLAPS = 10                                                # that are listed


@dataclass
class Report:
    """What was written, in numbers."""
    pixels: np.ndarray                                            # of each id (256,)
    written: list = field(default_factory=list)                   # (stem, split)
    empty: list = field(default_factory=list)                     # pictures without a drawing
    turned: list = field(default_factory=list)                    # pictures that were upright not
    regions: Counter = field(default_factory=Counter)             # {label: how many}
    overlaps: Counter = field(default_factory=Counter)            # {(upper, lower): pixels}
    left_labels: Counter = field(default_factory=Counter)         # {label not in --classes: ...}


def describe(report, annotations, classes, source, out):
    """-> the lines of the report."""
    lines = [f"{len(report.written)} frames in {out}, {len(classes.colours)} classes"]
    lines += describe_classes(report, classes)
    lines += describe_splits(report.written)
    if report.overlaps:
        lines.append(f"overlaps ({annotations.overlap_rule}):")
        for (upper, lower), pixels in report.overlaps.most_common(MOST_OVERLAPS):
            lines.append(f"  {upper} over {lower}: {pixels:,} pixels")
    if report.turned:
        lines.append(f"{len(report.turned)} pictures were turned upright or saved anew as .png or "
                     f".jpg, first {report.turned[0]}")
    left = Notes.lines(source.notes.left)
    if report.empty:
        left.append(f"{len(report.empty)} pictures on which nothing was drawn, first "
                    f"{report.empty[0]} (--keep-empty takes them as all rest)")
    used = {frame.picture for frame in annotations.frames}
    used |= {frame.mask for frame in annotations.frames}
    unnamed = [path for path in source.pictures if path not in used]
    if unnamed:
        left.append(f"{len(unnamed)} pictures that no annotation names, first {unnamed[0]}")
    for label, count in report.left_labels.most_common():
        left.append(f"{count} regions of {label!r}, which --classes does not name")
    if left:
        lines.append("left out:")
        lines += [f"  {line}" for line in left]
    return lines


def describe_classes(report, classes):
    """A line a class: its id, share of all pixels, and number of regions."""
    total = max(report.pixels.sum(), 1)
    lines = []
    for i, name in enumerate(classes.colours):
        share = 100 * report.pixels[i] / total
        line = f"  {i:>3}  {name:<20}{share:8.3f} % of the pixels"
        if report.regions:
            line += f", {report.regions[name]} regions"
        if i == classes.rest:
            line += REST
        lines.append(line)
    void = 100 * report.pixels[VOID] / total
    line = f"  {VOID:>3}  {'void':<20}{void:8.3f} % of the pixels"
    if classes.rest == VOID:
        line += REST
    lines.append(line)
    return lines


def describe_splits(written):
    counts = Counter(split for _, split in written)
    if None in counts or not counts:
        return ["no lists of splits: the last fifth will be val, unless you write val.txt and "
                "train.txt"]
    named = [f"{split} {count}" for split, count in counts.items()]
    return ["splits, by the names of files and folders: " + ", ".join(named)]
