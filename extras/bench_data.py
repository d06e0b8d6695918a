"""Reading frames in one thread, as a loader's worker does: decoded each time, or from the cache.

    python bench.py data [--data camvid:DIR]        # without --data: drawn frames, written as .png
"""

from functools import partial

import numpy as np
import torch
from PIL import Image

from data import Augment, open_dataset
from extras.measure import Candidate, compare, print_row, run_in_turns
from extras.outputs import temporary_folder
from extras.toy_scenes import TOY, draw_scene

FRAMES = 64                                                       # read in a run, at most


def make_reading(spec, cache, augmented, frames):
    """-> a function that reads `frames` frames; cache: the folder of decoded ones, or None"""
    torch.set_num_threads(1)
    dataset = open_dataset(spec, "train", cache=cache)
    crop = (288, 288) if dataset.name == "CamVid" else (512, 512)
    augment = Augment(crop, dataset.size)
    rng = np.random.default_rng(0)

    def run():
        total = 0
        for i in range(frames):
            image, label = dataset[i % len(dataset)]
            if augmented:
                augment(image, label, rng)
            else:
                # a mapped file is read only when its bytes are used
                total += int(image.sum(dtype=torch.int64)) + int(label.sum(dtype=torch.int64))
        return total
    return run


def write_frames(folder, frames=16, size=(512, 1024)):
    """Toy scenes as a data set in files, for a bench without one. -> its spec"""
    H, W = size
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    classes = [f"class {c}\n" for c in range(len(TOY))]
    (folder / "classes.txt").write_text("".join(classes))
    for i in range(frames):
        scene = draw_scene(f"train-{i:04d}")
        for name, pixels in zip(("images", "labels"), scene, strict=True):
            picture = Image.fromarray(pixels).resize((W, H), Image.Resampling.NEAREST)
            picture.save(folder / name / f"{i}.png")
    return f"folder:{folder}"


def fill_cache(dataset):
    for i in range(len(dataset)):
        dataset[i]


def bench_data(options):
    """A frame read in one thread. -> rows"""
    with temporary_folder() as folder:
        spec = options.data or write_frames(folder / "drawn")
        cache = folder / "cache"
        dataset = open_dataset(spec, "train", cache=cache)
        fill_cache(dataset)
        frames = min(FRAMES, len(dataset))
        H, W = dataset[0][1].shape
        candidates = {}
        for augmented in (False, True):
            for name, where in (("decoded", None), ("cached", cache)):
                make = partial(make_reading, spec, where, augmented, frames)
                candidates[name, augmented] = Candidate(make)
        timings = run_in_turns(candidates, options.rounds, torch.device("cpu"))

    print(f"\n{dataset.name}, {W}x{H}: ms per frame in one thread")
    widths = (17, 10, 9, 8, 13, 11)
    print_row(("", "decoded", "cached", "ratio", "its range", "images/s"), widths)
    rows = []
    for augmented in (False, True):
        decoded = timings["decoded", augmented]
        cached = timings["cached", augmented]
        ratio = compare(decoded, cached)
        row = {
            "data": dataset.name,
            "augmented": augmented,
            "frames": frames,
            "decoded_seconds": decoded.seconds / frames,
            "cached_seconds": cached.seconds / frames,
            **ratio.as_row(),
            "decoded_round_seconds": decoded.rounds,
            "cached_round_seconds": cached.rounds,
        }
        rows.append(row)
        print_row(("read, augmented" if augmented else "read",
                   f"{1e3 * row['decoded_seconds']:.2f}",
                   f"{1e3 * row['cached_seconds']:.2f}",
                   *ratio.cells(),
                   f"{1 / row['cached_seconds']:.0f}"), widths)
    return rows
