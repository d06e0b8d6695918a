"""The cache of decoded frames: equal to decoding, current, whole, shared, of one layout."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DatasetError, open_dataset
from extras.frame_cache import FrameCache
from small_datasets import same, save


def test_cached_frames_equal_decoded_ones_and_are_decoded_once(folder, tmp_path, monkeypatch):
    plain = open_dataset(folder, "train")
    cached = open_dataset(folder, "train", cache=tmp_path / "cache")
    assert all(same(plain[i], cached[i]) for i in range(len(plain)))       # the first time: written

    def decode(*args, **kwargs):
        pytest.fail("decoded again")

    monkeypatch.setattr(data, "read_picture", decode)
    again = open_dataset(folder, "train", cache=tmp_path / "cache")
    image, label = again[0]
    image += 1                                                    # what is read is the reader's own
    monkeypatch.undo()
    assert all(same(plain[i], again[i]) for i in range(len(plain)))
    suffixes = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert suffixes == [".frame"] * len(plain)


@pytest.mark.parametrize("which", [0, 1])
def test_a_changed_file_is_decoded_again(folder, tmp_path, which):
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")
    before = [part.clone() for part in dataset[0]]
    path = dataset.paths[0][which]
    Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    after = dataset[0]
    assert (after[which] == 0).all() and not torch.equal(before[which], after[which])
    assert torch.equal(before[1 - which], after[1 - which])
    assert len(list((tmp_path / "cache").iterdir())) == 1         # the old one is replaced


@pytest.mark.parametrize("damage", ["empty", "truncated", "longer", "foreign"])
def test_a_damaged_cache_file_is_written_anew(folder, tmp_path, damage):
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")
    expected = [part.clone() for part in dataset[0]]
    file = dataset.cache.files[0]
    content = file.read_bytes()
    damaged = {"empty": b"", "truncated": content[:-1], "longer": content + b"0",
               "foreign": b"x" * len(content)}
    file.write_bytes(damaged[damage])
    assert same(expected, dataset[0]) and file.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_a_sentence(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="file: no folder for decoded frames can be made there"):
        open_dataset(folder, "train", cache=tmp_path / "file")
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DatasetError, match=r"cache: a decoded frame cannot be kept there "
                                           r"\(No space left on device\); make room"):
        dataset[0]
    assert not list((tmp_path / "cache").iterdir())


def test_a_broken_frame_is_refused_with_a_cache_too(folder, tmp_path):
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")
    image = dataset.paths[0][0]
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(image)
    for _ in range(2):
        with pytest.raises(DatasetError, match=f"{image.name}: the image has 3x3 pixels"):
            dataset[0]
    image.unlink()
    with pytest.raises(DatasetError, match=f"{image.name}: there is no such file"):
        dataset[0]


def test_processes_share_a_cache(folder, tmp_path):
    """Four of them begin at once, each frame is whole for each of them."""
    plain = open_dataset(folder, "train")
    cached = open_dataset(folder, "train", cache=tmp_path / "cache")
    order = sorted(list(range(len(plain))) * 4)
    loader = torch.utils.data.DataLoader(cached, batch_sampler=[[i] for i in order], num_workers=4,
                                         collate_fn=lambda batch: batch[0])
    assert all(same(plain[i], item) for i, item in zip(order, loader, strict=True))
    assert len(list((tmp_path / "cache").iterdir())) == len(plain)


def test_each_process_writes_beside_the_file_by_itself(folder, tmp_path, monkeypatch):
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")
    written = []
    flush = os.fsync

    def look(descriptor):
        written.extend(path.name for path in (tmp_path / "cache").iterdir())
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    dataset[0]
    assert len(written) == 1 and f".{os.getpid()}" in written[0]


# ---------------------------------------------------------------- the layout of 8e9e96b

def test_a_files_name_is_that_of_the_first_version(tmp_path):
    paths = [(Path("/data/images/a.png"), Path("/data/labels/a.png"))]
    cache = FrameCache(tmp_path, paths, np.arange(256, dtype=np.uint8))
    assert cache.files == [tmp_path / "cb9b323c7aad04d0d9739723.frame"]


def tiny_frame(tmp_path):
    """-> a cache of one frame, its image and label, and the bytes that the first version wrote."""
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    label = np.array([[0, 1], [2, 255]], np.uint8)
    paths = (tmp_path / "image.png", tmp_path / "label.png")
    facts = []
    for path, array, date in zip(paths, (image, label), (111_000_000_007, 222), strict=True):
        save(path, array)
        os.utime(path, ns=(date, date))
        facts += [path.stat().st_size, date]
    head = struct.pack("<8q", 0x4546465300000001, 2, 2, *facts, 0)
    content = head + bytes(range(12)) + bytes([0, 1, 2, 255])
    cache = FrameCache(tmp_path / "cache", [paths], np.arange(256, dtype=np.uint8))
    return cache, image, label, content


def test_a_file_is_written_as_by_the_first_version(tmp_path):
    cache, image, label, content = tiny_frame(tmp_path)
    cache.read(0, lambda i: (image, label))
    assert cache.files[0].read_bytes() == content


def test_a_file_of_the_first_version_is_read(tmp_path):
    cache, image, label, content = tiny_frame(tmp_path)
    cache.files[0].write_bytes(content)
    read = cache.read(0, lambda i: pytest.fail("decoded again"))
    assert same(read, (image, label))


def craft(file, head=None, label=None):
    """Change a file of the cache: {place of a number in its head: the number}, or its label."""
    content = bytearray(file.read_bytes())
    for place, number in (head or {}).items():
        content[8 * place:8 * place + 8] = struct.pack("<q", number)
    if label is not None:
        content[-len(label):] = label
    file.write_bytes(content)


CRAFTED = {
    "a label that is no class": {"label": b"\xc8"},
    "negative sizes": {"head": {1: -40, 2: -48}},
    "one negative size": {"head": {1: -40}},
    "no pixels": {"head": {1: 0, 2: 0}},
    "sizes beyond all memory": {"head": {1: 2 ** 62, 2: 2 ** 62}},
    "sizes that only multiply to the right number": {"head": {1: 1, 2: 40 * 48}},
}


@pytest.mark.parametrize("what", CRAFTED)
def test_a_crafted_frame_is_decoded_anew(what, folder, tmp_path):
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")
    expected = [part.clone() for part in dataset[0]]
    file = dataset.cache.files[0]
    content = file.read_bytes()
    craft(file, **CRAFTED[what])
    again = open_dataset(folder, "train", cache=tmp_path / "cache")
    assert same(expected, again[0]) and file.read_bytes() == content


def test_a_pipe_in_the_cache_is_not_waited_for(folder, tmp_path, patience):
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")
    os.mkfifo(dataset.cache.files[0])
    with pytest.raises(DatasetError, match="a decoded frame cannot be kept there .not a regular"):
        dataset[0]


def test_a_link_in_the_cache_is_not_written_through(folder, tmp_path):
    dataset = open_dataset(folder, "train", cache=tmp_path / "cache")
    (tmp_path / "other").write_text("precious")
    file = dataset.cache.files[0]
    file.symlink_to(tmp_path / "other")
    file.with_name(f"{file.name}.{os.getpid()}.partial").symlink_to(tmp_path / "other")
    assert len(dataset[0]) == 2 and not file.is_symlink()
    assert (tmp_path / "other").read_text() == "precious"
