"""Training samples of a student that is told what to segment: the usual stream, with images among
them that show nothing.

    stream = PromptStream(Stream(dataset, augment, seed), share=0.05, size=(96, 192), seed=0)
    image, label = stream[n]                      # a function of (seed, n) alone, as ever

The label of such an image is NOTHING everywhere: no class, and not void either, so that every
prompt about it has the answer no.
"""

import numpy as np
import torch
from PIL import Image

NOTHING = 254                                                     # a pixel of no class
EMPTY_KINDS = ("flat", "slope", "noise", "clouds")


def draw_nothing(size, rng):
    """-> uint8 (3, H, W): one colour, a slope between two, noise, or soft noise."""
    height, width = size
    kind = EMPTY_KINDS[rng.integers(len(EMPTY_KINDS))]
    first = rng.uniform(0, 255, 3)
    second = rng.uniform(0, 255, 3)
    if kind == "flat":
        pixels = np.broadcast_to(first, (height, width, 3))
    elif kind == "slope":
        down = np.linspace(0, 1, height)[:, None, None]
        pixels = first + down * (second - first) + np.zeros((1, width, 1))
    elif kind == "noise":
        pixels = rng.uniform(0, 255, (height, width, 3))
    else:
        small = Image.fromarray(rng.integers(0, 256, (6, 10, 3), np.uint8))
        pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    noisy = pixels + rng.normal(0, 4, (height, width, 1))
    image = noisy.clip(0, 255).astype(np.uint8)
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


def empty_images(count, size):
    """The images that false presence is counted on -> list of uint8 (3, H, W), always the same."""
    return [draw_nothing(size, np.random.default_rng((77, i))) for i in range(count)]


class PromptStream(torch.utils.data.Dataset):
    """stream[n], or with probability `share` an image of nothing in its place.

    stream: of (image, target); a target that is no label has a method `nothing()` for this
    """

    def __init__(self, stream, share, seed):
        self.stream = stream
        self.share = share
        self.seed = seed

    def __getitem__(self, n):
        image, target = self.stream[n]
        rng = np.random.default_rng((self.seed, 2, n))
        if rng.random() >= self.share:
            return image, target
        image = draw_nothing(image.shape[1:], rng)
        if isinstance(target, torch.Tensor):
            return image, torch.full_like(target, NOTHING)
        return image, target.nothing()
