"""Decoded frames kept in a folder, so that each file of a data set is decoded once.

    dataset = open_dataset("camvid:DIR", "train", cache="frames/")       # train.py --cache frames/

One file for each frame, mapped into memory when it is read: all workers and all runs share the
system's copy. A file is a head of 8 int64, then the RGB pixels, then the label:

    KIND, H, W, image's size, image's date, label's size, label's date, 0

A file that does not fit its sources (changed, cut off, of another kind) is written anew.
"""

import hashlib
import json
import mmap
import os

import numpy as np

from data import INVALID, DatasetError, expand_user, open_picture
from model import write_atomically

KIND = 0x45464653_00000001                                        # "EFFS", layout 1
HEAD_BYTES = 64


class FrameCache:
    """folder: where the files are; paths: [(image path, label path)]; lookup: how the data set maps
    its labels' ids (256,), part of a file's name. Raises DatasetError."""

    def __init__(self, folder, paths, lookup):
        folder = expand_user(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatasetError(f"{folder}: no folder for decoded frames can be made there "
                               f"({error.strerror})") from None
        self.folder = folder
        self.paths = paths
        self.is_class = np.zeros(256, bool)                       # or void: what a label may hold
        self.is_class[lookup[lookup != INVALID]] = True
        self.checked = set()                                      # frames that were looked at
        self.files = [folder / file_name(*pair, lookup) for pair in paths]

    def read(self, i, decode):
        """-> (RGB (H, W, 3), label (H, W)) of frame i, uint8, from its file; or by decode(i), which
        is then kept. What is read may be written to: the change stays in memory."""
        sources = source_facts(self.paths[i])
        frame = map_file(self.files[i], sources)
        if frame is None or not self.is_right(i, frame):
            image, label = frame = decode(i)
            if image.shape[:2] == label.shape:                    # else `Dataset` refuses it
                write_file(self.files[i], sources, image, label)
        return frame

    def is_right(self, i, frame):
        """Has frame i its source's size, and its label the data set's classes? Looked at once: it
        takes time."""
        if i not in self.checked:
            _, label = frame
            with open_picture(self.paths[i][1]) as source:
                size = (source.height, source.width)
            if label.shape != size or not self.is_class[label].all():
                return False
            self.checked.add(i)
        return True


def file_name(image_path, label_path, lookup):
    source = [os.path.abspath(image_path), os.path.abspath(label_path), lookup.tolist()]
    return hashlib.sha256(json.dumps(source).encode()).hexdigest()[:24] + ".frame"


def source_facts(paths):
    """-> [size, date, size, date] of an image and its label. Taken before they are decoded, so that
    a source which changes meanwhile is decoded again."""
    facts = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            raise DatasetError(f"{path}: there is no such file") from None
        facts += [status.st_size, status.st_mtime_ns]
    return facts


def map_file(file, sources):
    """-> the image and the label of a whole and current file, else None."""
    if not os.path.isfile(file):                                  # not there; opening a pipe waits
        return None
    try:
        with open(file, "rb") as opened:
            head = np.frombuffer(opened.read(HEAD_BYTES), np.int64).tolist()
            kind, height, width, *made_from, _ = head
            pixels = height * width
            if kind != KIND or made_from != sources or height < 1 or width < 1:
                return None
            if os.fstat(opened.fileno()).st_size != HEAD_BYTES + 4 * pixels:
                return None
            memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):                                 # not there, or no such head
        return None
    content = np.frombuffer(memory, np.uint8, offset=HEAD_BYTES)
    image = content[:3 * pixels].reshape(height, width, 3)
    label = content[3 * pixels:].reshape(height, width)
    return image, label


def write_file(file, sources, image, label):
    head = np.array([KIND, *label.shape, *sources, 0], np.int64)
    try:
        with write_atomically(file, shared=True) as out:          # other processes may write it too
            out.write(head.tobytes())
            out.write(image.tobytes())
            out.write(label.tobytes())
    except OSError as error:
        raise DatasetError(f"{file.parent}: a decoded frame cannot be kept there "
                           f"({error.strerror or error}); make room, or leave the cache out"
                           ) from None
