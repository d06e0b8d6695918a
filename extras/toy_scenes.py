"""The toy data set: road scenes drawn from their names, so nothing is downloaded.

    from extras.toy_scenes import TOY, draw_scene
    image, label = draw_scene("train-0007")       # uint8 (128, 256, 3), uint8 (128, 256)

`open_dataset("toy", "train")` of data.py serves them. The same name gives the same scene for ever:
every shape takes its random numbers from one generator, so the order in which things are drawn is
part of the data set. New things would have to be drawn after all others.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from data import IGNORE

TOY = {"sky": (70, 130, 180), "building": (70, 70, 70), "road": (128, 64, 128),
       "pavement": (244, 35, 232), "tree": (107, 142, 35), "pole": (220, 220, 0),
       "car": (0, 0, 142), "person": (220, 20, 60)}
TOY_SIZE = (128, 256)                                             # H, W
TOY_COUNTS = {"train": 400, "val": 50, "test": 50}

SKIES = [(135, 180, 225), (190, 195, 200), (110, 140, 190)]
WALLS = [(120, 95, 80), (150, 140, 125), (100, 105, 115), (165, 120, 95), (135, 140, 150)]
PAINTS = [(160, 30, 35), (40, 60, 120), (205, 205, 208), (35, 35, 40), (70, 110, 80)]
CLOTHES = [(150, 40, 60), (40, 80, 140), (60, 60, 60), (190, 160, 60)]
GLASS = (60, 70, 85)
WINDSCREEN = (60, 75, 90)
TYRE = (20, 20, 22)
SKIN = (205, 160, 130)


def draw_scene(stem, size=TOY_SIZE):
    """A road scene from its name -> image uint8 (H, W, 3), label uint8 (H, W): the ids of TOY and
    IGNORE. The same name gives the same scene.

    Imbalanced as a street is: sky, building and road fill it, poles and people are a few pixels
    wide.
    """
    canvas = Canvas(stem, size)
    rng = canvas.rng
    view = View(horizon=canvas.height * rng.uniform(0.36, 0.5),
                vanish=canvas.width * rng.uniform(0.35, 0.65))
    light = rng.uniform(0.6, 1.1)

    draw_sky(canvas, view)
    draw_pavement(canvas, view)
    draw_houses(canvas, view)
    draw_road(canvas, view)
    draw_things(canvas, view)
    draw_bonnet(canvas)
    canvas.mark_border()
    return canvas.photograph(light), np.array(canvas.label)


class Canvas:
    """An image and its label, painted together, and the random numbers of the scene."""

    def __init__(self, stem, size):
        self.height, self.width = size
        self.rng = random.Random(stem)
        self.image = Image.new("RGB", (self.width, self.height))
        self.label = Image.new("L", (self.width, self.height))
        self.brush = ImageDraw.Draw(self.image)
        self.marker = ImageDraw.Draw(self.label)
        self.ids = {name: i for i, name in enumerate(TOY)}

    def rectangle(self, name, box, colour, spread=12):
        fill = self.shaded(colour, spread)
        self.brush.rectangle(box, fill=fill)
        self.marker.rectangle(box, fill=self.ids[name])

    def ellipse(self, name, box, colour, spread=12):
        fill = self.shaded(colour, spread)
        self.brush.ellipse(box, fill=fill)
        self.marker.ellipse(box, fill=self.ids.get(name, IGNORE))

    def polygon(self, name, corners, colour, spread=12):
        fill = self.shaded(colour, spread)
        self.brush.polygon(corners, fill=fill)
        self.marker.polygon(corners, fill=self.ids[name])

    def shaded(self, colour, spread):
        """The colour, lighter or darker by up to `spread`."""
        shade = self.rng.uniform(-spread, spread)
        return tuple(round(min(max(channel + shade, 0), 255)) for channel in colour)

    def mark_border(self):
        """A rim of two pixels is void."""
        self.marker.rectangle((0, 0, self.width - 1, self.height - 1), outline=IGNORE, width=2)

    def photograph(self, light):
        """The image under `light`, which falls from the left, with the camera's noise."""
        noise_rng = np.random.default_rng(self.rng.getrandbits(32))
        noise = noise_rng.normal(0, 9, (self.height, self.width, 1))
        from_left = np.linspace(1.1, 0.9, self.width)[None, :, None]
        pixels = np.asarray(self.image, np.float32) * light * from_left + noise
        return pixels.clip(0, 255).astype(np.uint8)


@dataclass
class View:
    """Where the street lies in the image. A depth is 0 at the horizon and 1 at the lower edge."""

    horizon: float                                                # a row
    vanish: float                                                 # column of the vanishing point
    left: float = 0.0                                             # columns of the road's edges,
    right: float = 0.0                                            # on the lower edge of the image

    def kerbs(self, depth):
        """-> the columns of the road's two edges."""
        left = self.vanish + depth * (self.left - self.vanish)
        right = self.vanish + depth * (self.right - self.vanish)
        return left, right


# ---------------------------------------------------------------- the street

def draw_sky(canvas, view):
    colour = canvas.rng.choice(SKIES)
    canvas.rectangle("sky", (0, 0, canvas.width, view.horizon + 2), colour)


def draw_pavement(canvas, view):
    """All of the ground; the road comes on top."""
    box = (0, view.horizon, canvas.width, canvas.height)
    canvas.rectangle("pavement", box, (150, 140, 135))


def draw_houses(canvas, view):
    """A row of houses with gaps, lower and rarer towards the vanishing point."""
    rng = canvas.rng
    x = -rng.uniform(0, 20)
    while x < canvas.width:
        width = rng.uniform(14, 48)
        away = min(1, abs(x - view.vanish) / (0.5 * canvas.width))
        if rng.random() < 0.25 + 0.7 * away:
            draw_house(canvas, view, x, width, away)
        x += width


def draw_house(canvas, view, x, width, away):
    """away: how far from the vanishing point, 0 to 1."""
    horizon = view.horizon
    top = horizon - (0.2 + 0.8 * away) * canvas.rng.uniform(0.3, 1.0) * horizon
    colour = canvas.rng.choice(WALLS)
    canvas.rectangle("building", (x, top, x + width, horizon + 4 * away), colour)
    for window_x in range(int(x) + 3, int(x + width) - 3, 7):
        for window_y in range(int(top) + 4, int(horizon) - 3, 9):
            box = (window_x, window_y, window_x + 2, window_y + 4)
            canvas.rectangle("building", box, GLASS)


def draw_road(canvas, view):
    """The road and its lane marks."""
    horizon = view.horizon
    vanish = view.vanish
    view.left = canvas.width * canvas.rng.uniform(-0.25, 0.2)
    view.right = canvas.width * canvas.rng.uniform(0.8, 1.25)
    corners = [(vanish - 4, horizon), (vanish + 4, horizon),
               (view.right, canvas.height), (view.left, canvas.height)]
    canvas.polygon("road", corners, (90, 88, 92), spread=18)
    for depth in (0.08, 0.2, 0.4, 0.7):
        y = horizon + depth * (canvas.height - horizon)
        middle = vanish + depth * ((view.left + view.right) / 2 - vanish)
        box = (middle - 2 * depth, y, middle + 2 * depth, y + 12 * depth)
        canvas.rectangle("road", box, (215, 215, 205))


# ---------------------------------------------------------------- things on the street

def draw_things(canvas, view):
    """Cars on the road; trees, poles and people beside it; far ones first."""
    rng = canvas.rng
    count = rng.randint(6, 13)
    depths = [rng.uniform(0.06, 0.8) for _ in range(count)]
    for depth in sorted(depths):
        ground = view.horizon + depth * (canvas.height - view.horizon)
        kind = rng.choices(["tree", "pole", "car", "person"], [3, 3, 4, 3])[0]
        x = choose_column(rng, kind, view, depth)
        DRAW[kind](canvas, x, ground, depth)


def choose_column(rng, kind, view, depth):
    """-> a column on the road for a car, on the pavement to its left or right for all else."""
    left, right = view.kerbs(depth)
    if kind == "car":
        return rng.uniform(left, right)
    if rng.random() < 0.5:
        return rng.uniform(right, right + 70 * depth + 6)
    return rng.uniform(left - 70 * depth - 6, left)


def draw_car(canvas, x, ground, depth):
    w = 52 * depth
    colour = canvas.rng.choice(PAINTS)
    canvas.rectangle("car", (x - w / 2, ground - 0.4 * w, x + w / 2, ground), colour)
    cabin = [(x - 0.38 * w, ground - 0.38 * w), (x - 0.22 * w, ground - 0.7 * w),
             (x + 0.22 * w, ground - 0.7 * w), (x + 0.38 * w, ground - 0.38 * w)]
    canvas.polygon("car", cabin, WINDSCREEN)
    for side in (-0.33, 0.33):
        wheel = (x + (side - 0.1) * w, ground - 0.12 * w, x + (side + 0.1) * w, ground + 0.06 * w)
        canvas.ellipse("car", wheel, TYRE)


def draw_tree(canvas, x, ground, depth):
    h = 95 * depth
    crown = 34 * depth
    trunk = (x - 3 * depth, ground - 0.5 * h, x + 3 * depth, ground)
    canvas.rectangle("tree", trunk, (85, 65, 45))
    for _ in range(5):
        dx = canvas.rng.uniform(-0.6, 0.6) * crown
        dy = canvas.rng.uniform(-0.5, 0.5) * crown
        leaves = (x + dx - crown / 2, ground - h + dy, x + dx + crown / 2, ground - h + dy + crown)
        canvas.ellipse("tree", leaves, (70, 105, 45), spread=25)


def draw_pole(canvas, x, ground, depth):
    h = 120 * depth
    box = (x - 1.6 * depth - 0.3, ground - h, x + 1.6 * depth + 0.3, ground)
    canvas.rectangle("pole", box, (125, 125, 120))


def draw_person(canvas, x, ground, depth):
    h = 42 * depth + 2
    colour = canvas.rng.choice(CLOTHES)
    body = (x - 0.14 * h, ground - 0.82 * h, x + 0.14 * h, ground)
    canvas.rectangle("person", body, colour, spread=25)
    head = (x - 0.11 * h, ground - h, x + 0.11 * h, ground - 0.78 * h)
    canvas.ellipse("person", head, SKIN)


DRAW = {"tree": draw_tree, "pole": draw_pole, "car": draw_car, "person": draw_person}


def draw_bonnet(canvas):
    """In every other scene our own bonnet, which is void as in Cityscapes."""
    W = canvas.width
    H = canvas.height
    if canvas.rng.random() < 0.5:
        canvas.ellipse("void", (W * 0.15, H * 0.94, W * 0.85, H * 1.15), (25, 25, 30))
