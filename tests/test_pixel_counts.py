"""extras/pixel_counts.py: counted once, kept, and never believed against reason."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

import data
from conftest import write_folder
from data import IGNORE, open_dataset
from extras.pixel_counts import cache_path, cached_pixel_counts
from small_datasets import save


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


def test_pixel_counts_are_cached_until_a_label_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = write_folder(tmp_path / "set")
    dataset = open_dataset(spec, "train")
    first = cached_pixel_counts(dataset)
    labels = [dataset[i][1] for i in range(len(dataset))]
    assert first.sum() == sum(int((label != IGNORE).sum()) for label in labels)
    with monkeypatch.context() as patch:
        patch.setattr(data.Files, "read_label", None)             # reading again would fail
        assert cached_pixel_counts(dataset).tolist() == first.tolist()
    save(tmp_path / "set" / "labels" / "frame_0.png", np.zeros((40, 48), np.uint8))
    assert cached_pixel_counts(dataset)[0] > first[0]


def test_pixel_counts_of_the_first_version_are_read(folder, tmp_path, monkeypatch):
    """Its key: the classes, the table of ids, and each label's path, size and date."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dataset = open_dataset(folder, "train")
    facts = []
    for _, path in dataset.paths:
        status = path.stat()
        facts.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    table = [0, 1, 2] + [254] * 252 + [255]
    source = json.dumps([["class 0", "class 1", "class 2"], table, facts])
    key = hashlib.sha256(source.encode()).hexdigest()[:24]
    kept = tmp_path / "cache" / "effiseg" / f"{key}.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("[5, 6, 7]")
    assert cached_pixel_counts(dataset).tolist() == [5, 6, 7]
    kept.write_text("[5, 6")                                      # cut off: counted again
    counts = cached_pixel_counts(dataset).tolist()
    assert sum(counts) > 18 and json.loads(kept.read_text()) == counts


def test_pixel_counts_can_be_told_to_keep_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cached_pixel_counts(open_dataset(folder, "train")).sum() > 0
    assert not (tmp_path / "home").exists()


DEEP = "[" * 100_000 + "]" * 100_000
IMPOSSIBLE = {
    "more than there are": "[1, 1, 100000000]",
    "no list": "{}",
    "negative": "[-1, 5, 6]",
    "too few": "[5, 6]",
    "long numbers": f"[{'9' * 20}, 1, 1]",
    "longer than int() takes": f"[{'9' * 5000}, 1, 1]",
    "fractions": "[0.5, 1, 1]",
    "not a number": "[NaN, 1, 1]",
    "deep": DEEP[:90_000],
    "no text": "\udcff",
    "nothing labelled": "[0, 0, 0]",
    "truths": "[true, 1, 1]",
    "a name": '"[1, 1, 1]"',
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_counts_that_cannot_be_are_counted_again(what, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dataset = open_dataset(folder, "train")
    truth = data.pixel_counts(dataset).tolist()
    path = cache_path(dataset)
    path.parent.mkdir(parents=True)
    path.write_bytes(IMPOSSIBLE[what].encode(errors="surrogateescape"))
    assert cached_pixel_counts(dataset).tolist() == truth
    assert json.loads(path.read_text()) == truth


def test_a_pipe_in_the_cache_is_not_waited_for(folder, tmp_path, monkeypatch, patience):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dataset = open_dataset(folder, "train")
    path = cache_path(dataset)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert cached_pixel_counts(dataset).tolist() == data.pixel_counts(dataset).tolist()
    assert path.is_fifo()


def test_a_link_in_the_cache_is_not_written_through(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dataset = open_dataset(folder, "train")
    path = cache_path(dataset)
    path.parent.mkdir(parents=True)
    (tmp_path / "other").write_text("precious")
    path.symlink_to(tmp_path / "other")
    cached_pixel_counts(dataset)
    assert (tmp_path / "other").read_text() == "precious" and not path.is_symlink()


def test_a_user_without_a_home_counts_each_time(folder, monkeypatch):
    """As in a container that runs under a number without a name."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert cached_pixel_counts(open_dataset(folder, "train")).sum() > 0
