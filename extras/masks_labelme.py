"""LabelMe's annotations: a JSON file for each picture.

    {"imagePath", "imageHeight", "imageWidth",
     "shapes": [{"label", "shape_type", "points": [[x, y], ...], "mask": base64 of a PNG}]}

Areas (polygon, rectangle, oriented_rectangle, circle, mask) are drawn as LabelMe's own renderer
draws them, pixel for pixel, in the order of the file: the later shape lies on top. Lines have no
area: they are left out and said, or drawn as wide as --line-width says. Points are left out.
"""

import base64
import binascii
import io
from functools import partial

import numpy as np

from data import DatasetError, read_picture
from extras.annotations import Annotations, Frame, Region, clean_label, undrawable
from extras.mask_shapes import ShapeError, as_points, draw_labelme, paste_bitmap

AREAS = ("polygon", "rectangle", "oriented_rectangle", "circle")
LINES = ("line", "linestrip")


def read(source, options):
    """All of LabelMe's files in a folder -> Annotations. Labels are in the order of the alphabet:
    LabelMe's files have no other."""
    frames = []
    for path in source.with_suffix(".json"):
        content = source.read_json(path)
        if content is None:
            continue
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            source.notes.left_out(".json files that are not LabelMe's", path)
            continue
        picture = source.find_picture(content.get("imagePath") or path.stem, path)
        if picture is None:
            continue
        regions = [region_of(shape, path, source.notes, options) for shape in content["shapes"]]
        regions = [region for region in regions if region is not None]
        split = source.split_of(path) or source.split_of(picture)
        frames.append(Frame(path, picture, size_of(content), regions, split=split))
    if not frames and not source.notes.broken:
        raise DatasetError(f'{source.folder}: no LabelMe annotations (looked for .json files with '
                           f'"shapes")')
    names = {region.label for frame in frames for region in frame.regions}
    rule = "the later shape of a file lies on top, as in LabelMe"
    return Annotations(frames, dict.fromkeys(sorted(names)), overlap_rule=rule)


def size_of(content):
    size = (content.get("imageHeight"), content.get("imageWidth"))
    is_given = all(isinstance(side, int) and side > 0 for side in size)
    return size if is_given else None


def region_of(shape, path, notes, options):
    """-> Region of one of LabelMe's shapes; None, and a note, for one that is not drawn."""
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        notes.problem("a shape without a label", path)
        return None
    label = clean_label(shape["label"])
    kind = shape.get("shape_type") or "polygon"                   # old files do not say
    if kind in LINES and options.line_width is None:
        notes.left_out("lines were left out: they have no area (--line-width draws them)", path)
        return None
    if kind not in (*AREAS, *LINES, "mask"):
        notes.left_out(f"shapes of the kind {kind!r} were left out: they have no area", path)
        return None
    try:
        draw = drawing_of(kind, shape, options.line_width)
    except ShapeError as error:
        draw = undrawable(f"a shape ({kind}) cannot be drawn: {error}")
    return Region(label, draw)


def drawing_of(kind, shape, line_width):
    """-> draw(height, width) -> mask. Raises ShapeError."""
    if kind == "mask":
        corner = as_points(shape.get("points"), at_least=2)[0].astype(int)
        return partial(paste_bitmap, read_bitmap(shape.get("mask")), corner)
    draw = partial(draw_labelme, kind, shape.get("points"), line_width)
    draw(1, 1)                                                    # wrong points are said now
    return draw


def read_bitmap(text):
    """A PNG in base64 -> bool (h, w): where it is not 0. Raises ShapeError."""
    try:
        content = base64.b64decode(text, validate=True)
        pixels = read_picture(io.BytesIO(content))
    except (TypeError, binascii.Error, DatasetError):
        raise ShapeError("its mask is not a picture in base64") from None
    return np.asarray(pixels).any(2)
