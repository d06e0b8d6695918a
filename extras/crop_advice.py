"""Does the crop of a training run fit its frames? What of it lies outside of a frame is padding.

    describe_padding({(128, 256): 48}, crop=(512, 512), scale_range=(0.5, 2))     # a sentence
    describe_large({(3000, 4000): 48}, crop=(512, 512))
"""

import numpy as np

from data import Files, measure_picture

LONG_SIDE = 640                                                   # of frames that are worked at
SMALLEST_SHARE = 0.1                                              # of a frame that a crop shows


def worked_sizes(dataset):
    """{(H, W): frames}: the sizes that frames have when they are scaled and cropped."""
    if dataset.size:
        return {tuple(dataset.size): len(dataset)}
    if not isinstance(dataset, Files):                            # drawn, all of one size
        return {dataset.read_label(0).shape: len(dataset)}
    sizes = {}
    for image_path, _ in dataset.paths:
        size = measure_picture(image_path)
        sizes[size] = sizes.get(size, 0) + 1
    return sizes


def describe_padding(sizes, crop, scale_range):
    """-> a sentence about frames that are smaller than the crop; None where there are none.

    sizes: {(H, W): frames}
    """
    height, width = crop
    smaller = {size: n for size, n in sizes.items() if size[0] < height or size[1] < width}
    if not smaller:
        return None
    frames = sum(sizes.values())
    padding = 0
    for size, number in sizes.items():
        padding += number / frames * padded_share(size, crop, scale_range)
    common = most_common(smaller)
    return (f"{sum(smaller.values())} of {frames} train frames are smaller than --crop {height} "
            f"{width} (most of them {common[1]}x{common[0]} pixels), so {100 * padding:.0f} % of "
            f"what is trained on is padding: --crop {min(common[0], height)} "
            f"{min(common[1], width)} fits")


def padded_share(size, crop, scale_range):
    """The part of a crop that is padding, over all scales."""
    scales = np.linspace(*scale_range, 101)
    covered = np.ones(101)
    for full, side in zip(size, crop, strict=True):
        covered *= np.minimum(1, full * scales / side)
    return 1 - covered.mean()


def describe_large(sizes, crop):
    """-> a sentence about frames of which a crop shows next to nothing; None where there are
    none."""
    height, width = most_common(sizes)
    share = crop[0] * crop[1] / (height * width)
    if share >= SMALLEST_SHARE:
        return None
    scale = LONG_SIDE / max(height, width)
    rows = round(height * scale / 32) * 32
    columns = round(width * scale / 32) * 32
    return (f"most train frames have {width}x{height} pixels, of which --crop {crop[0]} {crop[1]} "
            f"shows {100 * share:.0f} %: --size {rows} {columns} --crop {min(crop[0], rows)} "
            f"{min(crop[1], columns)} is usual")


def most_common(sizes):
    return max(sizes, key=sizes.get)
