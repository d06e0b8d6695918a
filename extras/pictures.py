"""Labels as pictures: in the classes' colours, laid over the image, in a grid, with a legend.

    from extras.pictures import grid, legend, overlay
    sheet = grid([[image, overlay(image, label, palette)]], captions=("frame", "label"))
    sheet.save("sheet.png")

Arrays are uint8: images RGB (H, W, 3), labels class ids (H, W); a palette is an (R, G, B) for each
class.
"""

import numpy as np
from PIL import Image, ImageDraw

from data import IGNORE, LUMINANCE
from extras.printable import printable

CAPTION_HEIGHT = 16                                               # pixels
LETTER_WIDTH = 7
LONGEST_NAME = 40                                                 # letters of a class in a legend


def colourise(label, palette):
    """Class ids (H, W) -> RGB uint8 (H, W, 3); void is black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(palette)] = palette
    return table[np.asarray(label)]


def overlay(image, label, palette):
    """The classes' colours with the light and dark of `image` under them -> RGB uint8 (H, W, 3).

    A colour is only made lighter or darker, so its hue is the palette's and it can be found in the
    legend; a mixture with the image's colours could not. Void stays as the image is.
    """
    image = np.asarray(image)
    label = np.asarray(label)
    luminance = image @ np.array(LUMINANCE) / 255                 # (H, W), 0 to 1
    colours = colourise(label, palette).astype(float)             # (H, W, 3)
    light = 0.6 + 0.9 * luminance
    brightest = colours.max(-1)
    most = 255 / np.maximum(brightest, 1)                         # beyond it a channel would clip
    light = np.minimum(light, most)
    shaded = np.rint(colours * light[..., None]).astype(np.uint8)
    is_void = (label == IGNORE)[..., None]
    return np.where(is_void, image, shaded)


def grid(rows, captions=(), width=320, gap=4):
    """Rows of RGB arrays of any size -> one PIL picture: every cell `width` pixels wide, `gap`
    pixels between them, a caption over each column."""
    rows = [fit_row(row, width) for row in rows]
    columns = max(len(row) for row in rows)
    heights = [row_height(row) for row in rows]
    top = CAPTION_HEIGHT if captions else 0
    sheet_width = columns * (width + gap) - gap
    sheet_height = top + sum(heights) + gap * (len(rows) - 1)
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")

    brush = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        brush.text((column * (width + gap) + 3, 2), caption, fill="black")
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * (width + gap), top))
        top += height + gap
    return sheet


def fit_row(arrays, width):
    """RGB arrays -> PIL pictures `width` pixels wide, of the same proportions."""
    pictures = []
    for array in arrays:
        picture = Image.fromarray(array)
        height = max(1, round(width * picture.height / picture.width))
        pictures.append(picture.resize((width, height), Image.Resampling.BILINEAR))
    return pictures


def row_height(row):
    return max(picture.height for picture in row)


def legend(classes, palette, width, height=18):
    """Each class's name beside its colour, in lines of `height` pixels -> RGB array
    (lines * height, width, 3), to stand under a grid."""
    classes = [printable(name, LONGEST_NAME) for name in classes]
    longest = max(len(name) for name in classes)
    step = 24 + LETTER_WIDTH * longest
    entries = max(1, width // step)                               # in a line
    lines = -(-len(classes) // entries)
    sheet = Image.new("RGB", (width, height * lines), "white")
    brush = ImageDraw.Draw(sheet)
    for i, (name, colour) in enumerate(zip(classes, palette, strict=True)):
        line, place = divmod(i, entries)
        x = place * step
        y = line * height
        brush.rectangle((x + 2, y + 3, x + 14, y + 15), fill=tuple(colour), outline="black")
        brush.text((x + 19, y + 3), name, fill="black")
    return np.asarray(sheet)
