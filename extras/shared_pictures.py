"""Pictures that are trained on and scored on: the same file, one that was scaled or saved again, or
the next frame of a video whose camera stands still.

    small = miniature(image)                                      # of each picture that is read
    for i, j in find_alike(smalls_of_train, smalls_of_val):
        kind = compare(read_train(i), read_val(j))                # SAME, ALIKE or None

In CamVid, whose splits are drives, the closest two miniatures of train and val are 18 grey levels
apart, of train and test 9; the same frame as a JPEG of quality 40 is at 0.6, at half the size 1.2.
Miniatures of fine textures are all alike, so what they suggest is looked at in full: there the
details of such copies correlate by 0.75 or more, those of CamVid's closest pairs by at most 0.17.
"""

import numpy as np
from PIL import Image

MINIATURE = (32, 24)                                              # W, H
MEAN_DISTANCE = 2                                                 # grey levels of 255
LARGEST_DISTANCE = 20                                             # a thing that was moved is more
LEAST_CORRELATION = 0.6                                           # of details
SAME = "the same picture as"
ALIKE = "nearly the same picture as"


def miniature(image):
    """uint8 (H, W, 3) -> uint8 (768,): a small copy of its green, which is most of its grey."""
    green = Image.fromarray(image[..., 1])
    small = green.resize(MINIATURE, Image.Resampling.BOX)
    return np.asarray(small).ravel()


def find_alike(known, others):
    """Two {i: miniature} -> [(i of known, j of others)]: for each of the others the nearest that is
    known, where that is near."""
    if not known:
        return []
    names = list(known)
    table = np.stack(list(known.values())).astype(np.int16)       # (N, 768)
    means = table.mean(1)
    pairs = []
    for j, small in others.items():
        close = np.flatnonzero(np.abs(means - small.mean()) <= MEAN_DISTANCE)
        distances = np.abs(table[close] - small)                  # (M, 768)
        is_near = distances.max(1, initial=0) <= LARGEST_DISTANCE
        close, distances = close[is_near], distances[is_near].mean(1)
        if len(close) and distances.min() <= MEAN_DISTANCE:
            pairs.append((names[close[distances.argmin()]], j))
    return pairs


def compare(first, second):
    """Two pictures, uint8 (H, W, 3) -> SAME: the same pixels; ALIKE: the same but for scale and
    noise; or None."""
    if first.shape == second.shape and (first == second).all():
        return SAME
    size = (min(first.shape[1], second.shape[1]), min(first.shape[0], second.shape[0]))
    correlation = correlate(details(first, size), details(second, size))
    return ALIKE if correlation >= LEAST_CORRELATION else None


def details(image, size):
    """What a miniature leaves out, at `size` (W, H) -> float (H, W). Two photos of one table have
    the light in common, and not what lies on it."""
    grey = Image.fromarray(image).convert("L").resize(size, Image.Resampling.BOX)
    rough = grey.resize(MINIATURE, Image.Resampling.BOX).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(grey, np.float32) - np.asarray(rough, np.float32)


def correlate(first, second):
    """Of two arrays, about 0 both; 0 where one has no details."""
    spread = np.sqrt((first ** 2).mean() * (second ** 2).mean())
    return (first * second).mean() / spread if spread else 0.0
