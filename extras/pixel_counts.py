"""How often each class occurs in a data set's labels, counted once and kept.

    counts = cached_pixel_counts(dataset)      # int64 (C,), as data.pixel_counts

The labels of a data set are read once, which takes a minute or more; the result, some hundred
bytes, is kept in ~/.cache/effiseg (or $XDG_CACHE_HOME/effiseg) under a key of the files' names,
sizes and dates. XDG_CACHE_HOME=/dev/null keeps nothing.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from data import Files, measure_picture, pixel_counts
from model import write_atomically

MAX_BYTES = 100_000                                               # of a file of counts


def cached_pixel_counts(dataset):
    """Labelled pixels of each class over the data set -> int64 (C,).

    What is kept and cannot be right is counted again. Raises DatasetError for a broken label.
    """
    if not isinstance(dataset, Files):                            # drawn: nothing to read
        return pixel_counts(dataset)
    path = cache_path(dataset)
    kept = read_kept(path)
    if is_possible(kept, dataset):
        return np.array(kept, np.int64)

    counts = pixel_counts(dataset)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path, shared=True) as file:
            file.write(json.dumps(counts.tolist()).encode())
    except OSError:                                               # costs time, not the run
        pass
    return counts


def cache_path(dataset):
    """-> where the counts of just these label files, read just so, are kept."""
    facts = []
    for _, label_path in dataset.paths:
        status = label_path.stat()
        facts.append((str(label_path.resolve()), status.st_size, status.st_mtime_ns))
    source = json.dumps([dataset.classes, dataset.lookup.tolist(), facts])
    key = hashlib.sha256(source.encode()).hexdigest()[:24]
    return cache_folder() / "effiseg" / f"{key}.json"


def cache_folder():
    """The user's. Where there is no home: a place that keeps nothing."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(os.devnull)


def read_kept(path):
    """-> what the file holds; None where there is none that can be read."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return None
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):                 # cut off, or something else
        return None


def is_possible(counts, dataset):
    """Can these be the labelled pixels of each class of `dataset`?"""
    if not isinstance(counts, list) or len(counts) != len(dataset.classes):
        return False
    if not all(type(count) is int and count >= 0 for count in counts):
        return False
    pixels = 0
    for _, label_path in dataset.paths:
        height, width = measure_picture(label_path, dataset.label_mode)
        pixels += height * width
    return 0 < sum(counts) <= pixels
