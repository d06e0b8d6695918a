"""Labels as pictures: colours that can be found in the legend."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from data import CAMVID, CITYSCAPES, IGNORE
from extras import pictures
from extras.pictures import colourise, legend, overlay
from extras.toy_scenes import TOY

CITYSCAPES_COLOURS = {name: colour for name, (_, colour, _) in CITYSCAPES.items()}


def test_pictures():
    palette = [(255, 0, 0), (0, 255, 0)]
    label = np.array([[0, 1, IGNORE]], np.uint8)
    assert colourise(label, palette).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 0]]]
    image = np.full((1, 3, 3), 100, np.uint8)
    light = round(255 * (0.6 + 0.9 * 100 / 255))
    shown = overlay(image, label, palette)
    assert shown.dtype == np.uint8
    assert shown.tolist() == [[[light, 0, 0], [0, light, 0], [100, 100, 100]]]
    sheet = pictures.grid([[image.repeat(9, 0).repeat(3, 1)] * 2] * 3, ("a", "b"), width=30)
    assert isinstance(sheet, Image.Image) and sheet.size == (64, 16 + 3 * 30 + 2 * 4)
    assert pictures.legend(list(TOY), list(TOY.values()), 400).shape[1] == 400


def test_grid_cells_of_other_heights_do_not_overlap():
    low = np.zeros((10, 20, 3), np.uint8)
    high = np.full((40, 20, 3), 128, np.uint8)
    sheet = np.asarray(pictures.grid([[low, high], [high, low]], width=20, gap=4))
    assert sheet.shape == (40 + 4 + 40, 20 + 4 + 20, 3)
    assert (sheet[:10, :20] == 0).all() and (sheet[10:44, :20] == 255).all()
    assert (sheet[:40, 24:] == 128).all() and (sheet[44:, :20] == 128).all()


@pytest.mark.parametrize("colours", [CAMVID, CITYSCAPES_COLOURS, TOY],
                         ids=["camvid", "cityscapes", "toy"])
def test_overlay_has_each_class_in_the_hue_of_its_legend(colours):
    """On any image: only light and dark come from it (defect 8: purple over green was brown)."""
    palette = list(colours.values())
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (len(palette), 200, 3)).astype(np.uint8)
    label = np.arange(len(palette), dtype=np.uint8)[:, None].repeat(200, 1)
    shown = overlay(image, label, palette)
    for class_id, colour in enumerate(palette):
        hue, saturation, _ = colorsys.rgb_to_hsv(*colour)
        for pixel in shown[class_id].tolist():
            shown_hue, shown_saturation, value = colorsys.rgb_to_hsv(*pixel)
            turn = abs((shown_hue - hue + 0.5) % 1 - 0.5)         # of a full turn, either way round
            assert turn * saturation < 1 / 180, (colour, pixel)
            assert abs(shown_saturation - saturation) < 0.02, (colour, pixel)
            assert value >= 0.59 * max(colour), (colour, pixel)   # dark, but never black


def test_overlay_keeps_the_light_and_dark_of_the_image():
    grey = np.linspace(0, 255, 30).astype(np.uint8)
    image = grey[None, :, None].repeat(3, 2)                      # (1, 30, 3), dark to light
    shown = overlay(image, np.zeros((1, 30), np.uint8), [(90, 150, 60)]).astype(int)
    steps = np.diff(shown[0].sum(-1))
    assert (steps > 0).all()


def test_a_legend_of_long_names_ends(patience):
    """A class of 1 MB: the text alone took for ever."""
    names = ["x" * 1_000_000, "two\nlines \x1b[2J", "Straße"]
    drawn = legend(names, [(1, 2, 3), (4, 5, 6), (7, 8, 9)], 320)
    assert drawn.shape == (3 * 18, 320, 3)
