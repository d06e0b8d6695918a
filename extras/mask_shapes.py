"""What labelling tools draw, as masks: polygons, boxes, ellipses, lines and run-length codes.

    mask = fill_polygon([(0, 0), (4, 0), (0, 4)], 8, 8)           # bool (8, 8)

Points are (x, y) in pixels, x to the right and y down, with (0, 0) the upper left corner of the
picture. A pixel belongs to an area when its centre, (column + 0.5, row + 0.5), lies in it.

COCO's run-length codes run down the columns, begin with the outside, and come as a list of numbers
or as text of 6 bits a letter (the format of the COCO mask API). CVAT's run along the rows of a box.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

DAMAGED_RUNS = "its run-length code is damaged"
MOST_PIXELS = 1 << 28                                             # of a picture
FARTHEST = 1e6                                                    # pixels from the corner


class ShapeError(ValueError):
    """What a tool wrote is no shape; the message is the end of a sentence."""


def as_points(points, at_least):
    """-> float (n, 2). Raises ShapeError for other than pairs of finite numbers, or too few."""
    try:
        array = np.array(points, float)
    except (TypeError, ValueError):
        raise ShapeError("its points are not pairs of numbers") from None
    if array.ndim != 2 or array.shape[1] != 2 or not np.isfinite(array).all():
        raise ShapeError("its points are not pairs of numbers")
    if len(array) < at_least:
        raise ShapeError(f"{len(array)} points, it needs {at_least} at least")
    if np.abs(array).max() > FARTHEST:
        raise ShapeError("its points are far outside of the picture")
    return array


# ---------------------------------------------------------------- areas

def fill_polygon(points, height, width):
    """The area inside a closed line, by the even-odd rule -> bool (height, width).

    In each row the line is crossed at some x; a pixel is inside when the number of crossings to the
    left of its centre is odd.
    """
    points = as_points(points, at_least=3)
    crossings = np.zeros((height, width + 1), np.int64)           # at [row, first pixel after it]
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
        top, bottom = sorted((y0, y1))
        first = max(0, math.ceil(top - 0.5))                      # rows whose centres it passes
        last = min(height, math.ceil(bottom - 0.5))
        if first >= last:
            continue
        rows = np.arange(first, last)
        x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)        # where the edge is at each centre
        columns = np.ceil(x - 0.5).clip(0, width).astype(int)
        np.add.at(crossings, (rows, columns), 1)
    return crossings[:, :width].cumsum(1) % 2 == 1


def fill_polygons(parts, height, width):
    """Several closed lines: what is inside any of them -> bool (height, width)."""
    mask = np.zeros((height, width), bool)
    for points in parts:
        mask |= fill_polygon(points, height, width)
    return mask


def turn(points, centre, degrees):
    """Points (n, 2) turned about `centre`, clockwise as seen on the screen."""
    angle = math.radians(degrees)
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return (points - centre) @ matrix + centre


def fill_box(corners, degrees, height, width):
    """The box between two opposite corners, turned about its centre -> bool (height, width)."""
    (x0, y0), (x1, y1) = as_points(corners, at_least=2)
    points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    return fill_polygon(turn(points, points.mean(0), degrees), height, width)


def fill_ellipse(centre, radii, degrees, height, width):
    """The inside of an ellipse, turned about its centre -> bool (height, width)."""
    centre, radii = as_points([centre, radii], at_least=2)
    if min(radii) <= 0:
        raise ShapeError("its radii are not above 0")
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    pixels = np.stack([x.ravel(), y.ravel()], 1)                  # (H*W, 2)
    straight = turn(pixels, centre, -degrees) - centre            # as if it were not turned
    inside = ((straight / radii) ** 2).sum(1) <= 1
    return inside.reshape(height, width)


# ---------------------------------------------------------------- as LabelMe draws

def draw_labelme(kind, points, line_width, height, width):
    """LabelMe's shapes, as its own renderer draws them -> bool (height, width).

    It counts the pixels on the line as inside, so its areas are up to a pixel larger than
    `fill_polygon`'s. kind: polygon, oriented_rectangle, rectangle, circle, line or linestrip.
    """
    needed = {"polygon": 3, "oriented_rectangle": 4}
    points = as_points(points, needed.get(kind, 2))
    picture = Image.new("L", (width, height))
    brush = ImageDraw.Draw(picture)
    corners = [tuple(point) for point in points]
    if kind in ("polygon", "oriented_rectangle"):
        brush.polygon(corners, fill=1, outline=1)
    elif kind == "rectangle":
        low = tuple(points[:2].min(0))
        high = tuple(points[:2].max(0))
        brush.rectangle([low, high], fill=1, outline=1)
    elif kind == "circle":                                        # the centre, a point on the line
        radius = np.linalg.norm(points[1] - points[0])
        low = tuple(points[0] - radius)
        high = tuple(points[0] + radius)
        brush.ellipse([low, high], fill=1, outline=1)
    elif kind in ("line", "linestrip"):
        brush.line(corners, fill=1, width=line_width)
    else:
        raise ShapeError(f"{kind!r} is no shape of LabelMe's")
    return np.array(picture, bool)


def draw_line(points, line_width, height, width):
    """A line through points, `line_width` pixels wide -> bool (height, width)."""
    return draw_labelme("linestrip", points, line_width, height, width)


def paste_bitmap(bitmap, corner, height, width):
    """A small mask with its upper left pixel at `corner` (x, y); what hangs over the picture's
    edges is cut off -> bool (height, width)."""
    x, y = corner
    rows, columns = bitmap.shape
    top = max(0, y)
    left = max(0, x)
    bottom = min(height, y + rows)
    right = min(width, x + columns)
    mask = np.zeros((height, width), bool)
    if top < bottom and left < right:
        mask[top:bottom, left:right] = bitmap[top - y:bottom - y, left - x:right - x]
    return mask


# ---------------------------------------------------------------- run-length codes

def as_counts(counts):
    """-> int64 (n,): lengths of runs, outside and inside in turn. Raises ShapeError."""
    try:
        counts = np.array(counts)
    except ValueError:                                            # lists of several lengths
        raise ShapeError(DAMAGED_RUNS) from None
    is_whole = counts.ndim == 1 and counts.dtype.kind in "iu"
    if not is_whole or counts.min() < 0 or counts.max() > MOST_PIXELS:
        raise ShapeError(DAMAGED_RUNS)
    return counts.astype(np.int64)


def expand_runs(counts, size):
    """Lengths of runs -> bool (size,). Raises ShapeError where they are not so long together."""
    if counts.sum() != size:
        raise ShapeError(f"its run-length code has {counts.sum()} pixels, not {size}")
    is_inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(is_inside, counts)


def coco_counts(code):
    """The lengths of runs of COCO's {"counts": a list or text} -> int64 (n,)."""
    counts = code.get("counts")
    if isinstance(counts, str):
        counts = unpack_counts(counts)
    return as_counts(counts)


def decode_coco_runs(code, height, width):
    """COCO's {"size": [height, width], "counts": a list or text} -> bool (height, width)."""
    if code.get("size") != [height, width]:
        raise ShapeError(f"its run-length code is not of a picture of {width}x{height} pixels")
    columns = expand_runs(coco_counts(code), height * width)
    return columns.reshape(width, height).T


def unpack_counts(text):
    """COCO's text of run lengths -> [int].

    A letter less 48 holds 6 bits: the highest says that the number goes on, the other five belong
    to it, the lowest first; bit 5 of its last letter is the sign. From the fourth number on, it is
    the difference to the number two places before.
    """
    counts = []
    value = 0
    shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ShapeError(DAMAGED_RUNS)
        value |= (bits & 0x1f) << shift
        shift += 5
        if bits & 0x20:                                           # it goes on
            continue
        if bits & 0x10:                                           # below 0
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = 0
        shift = 0
    if shift:
        raise ShapeError(DAMAGED_RUNS)
    return counts
