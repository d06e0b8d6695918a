"""Shapes as masks, against pycocotools and LabelMe's own renderer."""

import numpy as np
import pytest

from extras.mask_shapes import (
    ShapeError,
    decode_coco_runs,
    draw_labelme,
    fill_box,
    fill_ellipse,
    fill_polygon,
    fill_polygons,
)
from labelled_photos import import_labelme


def distance_to_line(points, height, width):
    """Of each pixel's centre to the closed line through the points -> (height, width)."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    centres = np.stack([x, y], -1)[:, :, None]                    # (H, W, 1, 2)
    start = np.array(points, float)                               # (n, 2)
    edge = np.roll(start, -1, 0) - start
    length = np.maximum((edge ** 2).sum(-1), 1e-12)
    along = ((centres - start) * edge).sum(-1) / length           # (H, W, n)
    nearest = start + along.clip(0, 1)[..., None] * edge
    return np.linalg.norm(centres - nearest, axis=-1).min(-1)


def random_polygon(rng):
    count = int(rng.integers(3, 9))
    return np.round(rng.uniform(-6, 46, (count, 2)), 2)


def test_a_square_of_whole_pixels_is_exact():
    mask = fill_polygon([(2, 1), (6, 1), (6, 4), (2, 4)], 6, 8)
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:6] = True
    assert (mask == expected).all()
    assert (fill_box([(6, 4), (2, 1)], 0, 6, 8) == expected).all()
    turned = fill_box([(2, 1), (6, 5)], 90, 6, 8)
    assert turned.sum() == 16 and turned[1:5, 2:6].all()


def test_polygons_are_those_of_pycocotools():
    """It rounds to fifths of a pixel: the two may differ where a centre is so near to the line."""
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    rng = np.random.default_rng(0)
    differ = 0
    for _ in range(60):
        points = random_polygon(rng).clip(0, 40)
        ours = fill_polygon(points, 40, 40)
        runs = coco.frPyObjects([points.ravel().tolist()], 40, 40)
        theirs = coco.decode(runs)[..., 0].astype(bool)
        away = distance_to_line(points, 40, 40) > 0.3
        assert (ours == theirs)[away].all()
        differ += (ours != theirs).sum()
    assert differ < 60 * 40 * 40 * 0.01


def test_run_length_codes_are_those_of_pycocotools():
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    rng = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 1.0):
        mask = rng.random((37, 53)) < density
        packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = {"size": packed["size"], "counts": packed["counts"].decode()}
        assert (decode_coco_runs(text, 37, 53) == mask).all()
        changes = np.flatnonzero(np.diff(mask.T.ravel())) + 1
        counts = np.diff([0, *changes, mask.size]).tolist()
        if mask[0, 0]:
            counts = [0, *counts]
        listed = {"size": [37, 53], "counts": counts}
        assert (decode_coco_runs(listed, 37, 53) == mask).all()


def test_several_parts_are_what_is_inside_any():
    square = [(0, 0), (4, 0), (4, 4), (0, 4)]
    assert fill_polygons([square, square], 8, 8).sum() == 16
    crossed = [(0, 0), (8, 8), (8, 0), (0, 8)]                    # a bow tie
    assert fill_polygon(crossed, 8, 8)[4, 0] and not fill_polygon(crossed, 8, 8)[0, 4]


@pytest.mark.parametrize("kind, count", [("polygon", 5), ("rectangle", 2), ("circle", 2),
                                         ("line", 2), ("linestrip", 4), ("oriented_rectangle", 4)])
def test_labelme_shapes_are_those_of_labelme(kind, count):
    shape = import_labelme()
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = rng.uniform(-5, 45, (count, 2))
        theirs = shape.shape_to_mask((40, 50), points.tolist(), kind)
        assert (draw_labelme(kind, points, 10, 40, 50) == theirs).all()


def test_an_ellipse_has_its_area_and_turns():
    upright = fill_ellipse((50, 40), (30, 10), 0, 80, 100)
    assert abs(upright.sum() - np.pi * 300) < 20
    assert upright[40, 25] and not upright[25, 50]
    turned = fill_ellipse((50, 40), (30, 10), 90, 80, 100)
    assert turned[15, 50] and not turned[40, 25]
    down_right = fill_ellipse((50, 40), (30, 10), 45, 80, 100)    # clockwise on the screen
    assert down_right[55, 65] and not down_right[25, 65]


@pytest.mark.parametrize("draw", [
    lambda: fill_polygon([(0, 0), (1, 1)], 4, 4),
    lambda: fill_polygon([(0, 0), (1, 1), (float("nan"), 2)], 4, 4),
    lambda: fill_polygon([(0, 0), (1, 1), (1e300, 2)], 4, 4),
    lambda: fill_polygon("no points", 4, 4),
    lambda: fill_polygon(None, 4, 4),
    lambda: fill_ellipse((1, 1), (0, 2), 0, 4, 4),
    lambda: draw_labelme("heart", [(0, 0), (1, 1)], 1, 4, 4),
    lambda: decode_coco_runs({"size": [4, 4], "counts": [3, 4]}, 4, 4),
    lambda: decode_coco_runs({"size": [4, 4], "counts": [-3, 19]}, 4, 4),
    lambda: decode_coco_runs({"size": [4, 4], "counts": [[1], 2]}, 4, 4),
    lambda: decode_coco_runs({"size": [4, 4], "counts": None}, 4, 4),
    lambda: decode_coco_runs({"size": [4, 5], "counts": [16]}, 4, 4),
    lambda: decode_coco_runs({"size": [4, 4], "counts": "\x00"}, 4, 4),
    lambda: decode_coco_runs({"size": [4, 4], "counts": "oooooooooooooooo"}, 4, 4),
    lambda: decode_coco_runs({"size": [4, 4], "counts": [10 ** 30, 1]}, 4, 4),
    lambda: decode_coco_runs({"size": [4, 4], "counts": []}, 4, 4),
])
def test_what_is_no_shape_is_said(draw):
    with pytest.raises(ShapeError):
        draw()
