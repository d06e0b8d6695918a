"""CVAT's annotations as "CVAT for images 1.1" exports them: an XML file for many pictures.

    <annotations>
      <meta>... <label><name>road</name><color>#804080</color></label> ...</meta>
      <image name="a.jpg" width="640" height="480" subset="train">
        <polygon label="road" points="0.0,0.0;9.5,2.0;..." z_order="0"/>
        <box label="car" xtl="1" ytl="2" xbr="30" ybr="20" rotation="0"/>
        <ellipse label="sign" cx="9" cy="9" rx="4" ry="3" rotation="0"/>
        <mask label="pole" rle="3, 2, 5, ..." left="4" top="6" width="5" height="9"/>

Format: docs.cvat.ai, "CVAT for image". The higher z_order lies on top, then the later of the file.
Polylines have no area: they are left out and said, or drawn as wide as --line-width says. Points,
skeletons, cuboids and tags are left out. Masks that CVAT draws itself ("Segmentation mask 1.1") are
read by `voc`.
"""

import math
from functools import partial
from xml.etree import ElementTree

from data import DatasetError
from extras.annotations import (
    Annotations,
    Frame,
    Region,
    clean_label,
    read_text,
    split_of_names,
    undrawable,
)
from extras.mask_shapes import (
    MOST_PIXELS,
    ShapeError,
    as_counts,
    as_points,
    draw_line,
    expand_runs,
    fill_box,
    fill_ellipse,
    fill_polygon,
    paste_bitmap,
)


def read(source, options):
    """All of CVAT's XML files in a folder -> Annotations."""
    frames = []
    labels = {}
    for path in source.with_suffix(".xml"):
        root = read_xml(path, source.notes)
        if root is None:
            continue
        if root.tag != "annotations":
            source.notes.left_out(".xml files that are not CVAT's", path)
            continue
        if root.find("track") is not None:
            source.notes.problem('this is "CVAT for video": export it as "CVAT for images 1.1"',
                                 path)
            continue
        for element in root.iterfind("./meta//label"):
            name = clean_label(element.findtext("name", ""))
            labels.setdefault(name, colour_of(element.findtext("color", "")))
        for image in root.iterfind("image"):
            add_image(image, path, source, options, frames)
    for frame in frames:
        for region in frame.regions:
            labels.setdefault(region.label, None)
    if not frames and not source.notes.broken:
        raise DatasetError(f"{source.folder}: no CVAT annotations (looked for .xml files with "
                           f"<annotations> and <image>)")
    rule = "the higher z_order lies on top, then the later shape"
    return Annotations(frames, labels, overlap_rule=rule)


def read_xml(path, notes):
    """-> the root element; None, and a problem noted, where it is not XML."""
    try:
        text = read_text(path)
        if "<!DOCTYPE" in text:                                   # no tool writes one; entities
            raise DatasetError(f"{path}: it has a DOCTYPE")       # that grow without end need it
        return ElementTree.fromstring(text)
    except (DatasetError, ElementTree.ParseError):
        notes.problem("not XML that can be read", path)
        return None


def colour_of(text):
    """"#804080" -> (128, 64, 128), or None."""
    try:
        channels = bytes.fromhex(text.strip().removeprefix("#"))
    except ValueError:
        return None
    return tuple(channels) if len(channels) == 3 else None


def add_image(image, path, source, options, frames):
    """Add a picture and its shapes to `frames`."""
    picture = source.find_picture(image.get("name", ""), path)
    if picture is None:
        return
    ranked = []
    for shape in image:
        region = region_of(shape, f"{path}, {picture.name}", source.notes, options)
        if region is not None:
            ranked.append((number_or(shape.get("z_order"), 0), region))
    ranked.sort(key=lambda entry: entry[0])                       # stable: the file's order in ties
    regions = [region for _, region in ranked]
    size = (number_or(image.get("height"), 0), number_or(image.get("width"), 0))
    size = tuple(map(int, size)) if min(size) > 0 else None
    names = (image.get("subset", ""), *picture.relative_to(source.folder).parts)
    split = split_of_names(names)
    frames.append(Frame(path, picture, size, regions, split=split))


def number_or(text, default):
    """A finite number, or the default where the text is none."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return default
    return value if math.isfinite(value) else default


def region_of(shape, where, notes, options):
    """-> Region of one of CVAT's shapes; None, and a note, for one that is not drawn."""
    if shape.tag == "polyline" and options.line_width is None:
        notes.left_out("polylines were left out: they have no area (--line-width draws them)",
                       where)
        return None
    if shape.tag not in DRAWINGS:
        notes.left_out(f"<{shape.tag}> were left out: they are no areas", where)
        return None
    label = clean_label(shape.get("label", ""))
    if not label:
        notes.problem("a shape without a label", where)
        return None
    try:
        draw = DRAWINGS[shape.tag](shape, options)
    except ShapeError as error:
        draw = undrawable(f"a shape (<{shape.tag}>) cannot be drawn: {error}")
    return Region(label, draw)


# ---------------------------------------------------------------- the shapes

def points_of(shape, at_least):
    """points="x,y;x,y" -> float (n, 2)"""
    pairs = [pair.split(",") for pair in shape.get("points", "").split(";")]
    return as_points(pairs, at_least)


def numbers_of(shape, *names):
    """The attributes of these names, as numbers."""
    try:
        return [float(shape.get(name)) for name in names]
    except (TypeError, ValueError):
        raise ShapeError(f"it needs the numbers {', '.join(names)}") from None


def polygon(shape, options):
    return partial(fill_polygon, points_of(shape, at_least=3))


def polyline(shape, options):
    return partial(draw_line, points_of(shape, at_least=2), options.line_width)


def box(shape, options):
    x0, y0, x1, y1 = numbers_of(shape, "xtl", "ytl", "xbr", "ybr")
    corners = as_points([(x0, y0), (x1, y1)], at_least=2)
    return partial(fill_box, corners, number_or(shape.get("rotation"), 0))


def ellipse(shape, options):
    cx, cy, rx, ry = numbers_of(shape, "cx", "cy", "rx", "ry")
    draw = partial(fill_ellipse, (cx, cy), (rx, ry), number_or(shape.get("rotation"), 0))
    draw(1, 1)                                                    # wrong numbers are said now
    return draw


def mask(shape, options):
    """rle: lengths of runs along the rows of the box, outside first."""
    left, top, width, height = numbers_of(shape, "left", "top", "width", "height")
    as_points([(left, top), (width, height)], at_least=2)         # no larger than a picture
    try:
        counts = [int(count) for count in shape.get("rle", "").split(",")]
    except ValueError:
        raise ShapeError("its run-length code is damaged") from None
    size = int(height) * int(width)
    if not 0 < size < MOST_PIXELS:
        raise ShapeError("its box is empty")
    bitmap = expand_runs(as_counts(counts), size).reshape(int(height), int(width))
    return partial(paste_bitmap, bitmap, (int(left), int(top)))


DRAWINGS = {"polygon": polygon, "polyline": polyline, "box": box, "ellipse": ellipse, "mask": mask}
