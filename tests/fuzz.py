"""Checkpoints from strangers: thousands of damaged files of each format, none of which may crash, hang, run or take memory.

    python tests/fuzz.py                      # 2,000 of each format, seed 0; prints how they ended
    python tests/fuzz.py --count 50           # what the tests run

A file is changed in one of six ways: bits flipped, a stretch overwritten, cut off, a stretch taken out, a stretch doubled,
a number in its header replaced. Half of the changes fall into the first 64 KiB or the last, where the structure is. Allowed
are a load (where the change meets nothing, or only weights that no checksum guards) and a CheckpointError in one sentence.
"""

import argparse
import collections
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from model import CheckpointError, load_checkpoint, save_checkpoint, segformer      # noqa: E402
from nvlabs import Flat, segmenter                                                  # noqa: E402


def write_originals(folder):
    """-> {format: path of a good file}."""
    from safetensors.torch import save_file
    torch.manual_seed(0)
    network, flat = segformer("b0", 3), Flat("b0", 3).state_dict()
    save_checkpoint(network, folder / "ours.pth")
    torch.save(segmenter(flat), folder / "nvlabs.pth")
    torch.save(flat, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(flat, folder / "names.safetensors")
    return {"ours": folder / "ours.pth", "NVlabs, zip": folder / "nvlabs.pth", "NVlabs, before zip": folder / "old.pth",
            "safetensors": folder / "names.safetensors"}


def mutate(content, rng):
    """bytes -> bytes, changed in one of the six ways."""
    data, where = bytearray(content), int(rng.integers(len(content)))
    if rng.random() < 0.5:                                        # the structure: zip directory, pickle, JSON header
        where = int(rng.integers(2 ** 16)) if rng.random() < 0.5 else len(data) - 1 - int(rng.integers(2 ** 16))
    length, way = int(rng.integers(1, 200)), int(rng.integers(6))
    if way == 0:
        for place in where + rng.integers(0, 50, 3):
            data[min(int(place), len(data) - 1)] ^= 1 << int(rng.integers(8))
    elif way == 1:
        data[where:where + length] = rng.bytes(length)
    elif way == 2:
        del data[where:]
    elif way == 3:
        del data[where:where + length]
    elif way == 4:
        data[where:where] = data[where:where + length]
    else:
        number = int(rng.choice([0, 1, 2 ** 31 - 1, 2 ** 32 - 1, 2 ** 40, 2 ** 63 - 1]))
        data[where:where + 8] = number.to_bytes(8, "little")
    return bytes(data)


def peak_mib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def fuzz(path, count, seed):
    """-> how `count` damaged copies of `path` ended, the slowest load in seconds, the largest growth of memory in file sizes."""
    content, rng, ends, slowest, largest = path.read_bytes(), np.random.default_rng(seed), collections.Counter(), 0.0, 0.0
    damaged = path.with_name(f"damaged{path.suffix}")
    for _ in range(count):
        changed = mutate(content, rng)
        damaged.write_bytes(changed)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before, start = peak_mib(), time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                load_checkpoint(damaged)
            ends["unchanged" if changed == content else "loaded"] += 1
        except CheckpointError as error:
            assert "\n" not in str(error), error
            ends["refused"] += 1
        slowest = max(slowest, time.perf_counter() - start)
        largest = max(largest, (peak_mib() - before) * 2 ** 20 / len(content))
    return ends, slowest, largest


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="damaged files of each format (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, path in write_originals(Path(folder)).items():
            load_checkpoint(path)                                 # what a first load loads, it loads now
            ends, slowest, largest = fuzz(path, args.count, args.seed)
            assert largest < 4, f"{name}: {largest:.1f} times the file's size in memory"
            print(f"{name:<20}{args.count} files: {', '.join(f'{n} {end}' for end, n in sorted(ends.items()))}; slowest load {slowest:.2f} s, "
                  f"largest growth of memory {largest:.1f} x the file", flush=True)


if __name__ == "__main__":
    main()
