"""Checkpoints from strangers: thousands of damaged files of each format, none of which may crash,
hang, run or take memory.

    python tests/fuzz.py                      # 2,000 of each format, seed 0; prints how they ended
    python tests/fuzz.py --count 50           # what the tests run

A file is changed in one of six ways: bits flipped, a stretch overwritten, cut off, a stretch taken
out, a stretch doubled, a number in its header replaced. Half of the changes fall into the first
64 KiB or the last, where the structure is. Allowed are a load (where the change meets nothing, or
only weights that no checksum guards) and a CheckpointError in one sentence.
"""

import argparse
import collections
import contextlib
import io
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from model import (  # noqa: E402  (after the path is set)
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    segformer,
)
from nvlabs import Flat, segmenter  # noqa: E402


def write_originals(folder):
    """-> {format: path of a good file}."""
    from safetensors.torch import save_file
    originals = {
        "ours": folder / "ours.pth",
        "NVlabs, zip": folder / "nvlabs.pth",
        "NVlabs, before zip": folder / "old.pth",
        "safetensors": folder / "names.safetensors",
    }
    torch.manual_seed(0)
    network = segformer("b0", 3)
    flat = Flat("b0", 3).state_dict()
    save_checkpoint(network, originals["ours"])
    torch.save(segmenter(flat), originals["NVlabs, zip"])
    torch.save(flat, originals["NVlabs, before zip"], _use_new_zipfile_serialization=False)
    save_file(flat, originals["safetensors"])
    return originals


def mutate(content, rng):
    """bytes -> bytes, changed in one of the six ways."""
    data = bytearray(content)
    where = int(rng.integers(len(content)))
    if rng.random() < 0.5:                  # the structure: zip directory, pickle, JSON header
        at_start = rng.random() < 0.5
        offset = int(rng.integers(2 ** 16))
        where = offset if at_start else max(0, len(data) - 1 - offset)
    length = int(rng.integers(1, 200))
    way = int(rng.integers(6))
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


def reset_peak_memory():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory():
    """The most memory this process has held since the last reset, in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status tells no VmHWM")


@dataclass
class Outcome:
    """How the damaged copies of one file ended."""
    ends: collections.Counter = field(default_factory=collections.Counter)
    slowest: float = 0.0                    # load, in seconds
    growth: float = 0.0                     # of memory, in sizes of the file


def try_to_load(path):
    """-> "loaded" or "refused"; any other error than a CheckpointError in one sentence goes on."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            load_checkpoint(path)
    except CheckpointError as error:
        assert "\n" not in str(error), error
        return "refused"
    return "loaded"


def fuzz(path, count, seed):
    """Damage `path` in `count` ways and load each. -> Outcome"""
    content = path.read_bytes()
    rng = np.random.default_rng(seed)
    damaged = path.with_name(f"damaged{path.suffix}")
    outcome = Outcome()
    for _ in range(count):
        changed = mutate(content, rng)
        damaged.write_bytes(changed)
        reset_peak_memory()
        before = peak_memory()
        start = time.perf_counter()
        end = try_to_load(damaged)
        seconds = time.perf_counter() - start
        if end == "loaded" and changed == content:
            end = "unchanged"
        outcome.ends[end] += 1
        outcome.slowest = max(outcome.slowest, seconds)
        outcome.growth = max(outcome.growth, (peak_memory() - before) / len(content))
    return outcome


def parse_args(description):
    """-> what the command line says: .count and .seed"""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=2000,
                        help="damaged files of each format (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = parse_args(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory() as folder:
        for name, path in write_originals(Path(folder)).items():
            load_checkpoint(path)           # what a first load loads, it loads now
            outcome = fuzz(path, args.count, args.seed)
            assert outcome.growth < 4, f"{name}: {outcome.growth:.1f} times the file in memory"
            ends = ", ".join(f"{number} {end}" for end, number in sorted(outcome.ends.items()))
            print(f"{name:<20}{args.count} files: {ends}; slowest load {outcome.slowest:.2f} s, "
                  f"largest growth of memory {outcome.growth:.1f} x the file", flush=True)


if __name__ == "__main__":
    main()
