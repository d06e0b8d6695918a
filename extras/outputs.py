"""Files that a command was asked to write: the one way to write them.

    with output_file("scores.json") as file:                      # binary
        file.write(...)
    write_text("scores.json", text)
    save_picture(picture, "picture.png")                          # PIL's
    with output_below(folder, "aachen/x.png") as file:            # where a stranger may have been

    parser.add_argument("--json", type=output_path)               # refused before the work is done
    parser.add_argument("--picture", type=picture_path)

    with temporary_folder() as folder:                            # gone after the block

A file appears whole or not at all (model.write_atomically). What stands at its path is replaced,
never written through: a link there may lead out of the folder, and a device or a pipe is no place
for a file. Raises UsageError, in a sentence that names the file.
"""

import argparse
import contextlib
import errno
import os
import tempfile
from pathlib import Path

from PIL import Image

from extras.cli import UsageError, make_folder
from model import write_atomically

NO_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # a full disk; a used-up quota


class FullDisk(UsageError):
    """There is no room for a file, nor will there be for the next one."""


@contextlib.contextmanager
def output_file(path):
    """Yield a binary file that appears at `path` whole or not at all. Raises UsageError."""
    try:
        with write_atomically(path) as file:
            yield file
    except OSError as error:
        kind = FullDisk if error.errno in NO_ROOM else UsageError
        raise kind(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def temporary_folder():
    """Yield the Path of a folder that is removed after the block. Raises UsageError where none can
    be made, and where the disk that it is on gets full.
    """
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise UsageError(f"no folder for temporary files can be made ({error.strerror or error}): "
                         "set TMPDIR to a place for them") from None
    with folder as name:
        try:
            yield Path(name)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise FullDisk(f"{name}, for temporary files: {error.strerror}; set TMPDIR to a place "
                           "with more room") from None


@contextlib.contextmanager
def output_below(folder, name):
    """`output_file` for `folder`/`name`, in a folder that may hold what a stranger put there.

    An archive of photos may bring links along, and results written through them would overwrite
    other files: a link at the path, or at a folder on the way to it, is a UsageError.
    """
    folder, name = Path(folder), Path(name)
    check_way(folder, name)
    make_folder((folder / name).parent)
    with output_file(folder / name) as file:
        yield file


def check_way(folder, name):
    """Raise UsageError unless the folders from `folder` to `name` are real, and `name` is a regular
    file or nothing yet.
    """
    for parent in list(name.parents)[:-1]:                        # the last one is "."
        if (folder / parent).is_symlink():
            raise UsageError(f"{folder / parent}: a link, which results are not written through")
    path = folder / name
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path}: no regular file (a link, a folder or a device), which is not "
                         f"written over: remove it, or choose another --out")


def refuse_same_file(source, target):
    """Raise UsageError where what is written would take the place of what it is made of."""
    if Path(source).resolve() == Path(target).resolve():
        raise UsageError(f"{target} is what it would be made of: choose another name, or it would "
                         f"be lost")


def write_text(path, text):
    """Write `text`, in UTF-8. Raises UsageError."""
    with output_file(path) as file:
        file.write(text.encode())


def save_picture(picture, path, **options):
    """Write a PIL picture in the format that the path's suffix says. Raises UsageError.

    options: Pillow's for that format, quality=90
    """
    kind = picture_format(path)
    if kind is None:
        raise UsageError(f"cannot write {path}: {UNKNOWN_SUFFIX}")
    with output_file(path) as file:
        try:
            picture.save(file, kind, **options)
        except ValueError as error:                               # too large for its format
            raise UsageError(f"cannot write {path}: {error}") from None


UNKNOWN_SUFFIX = "its suffix is no picture's that can be written (.png or .jpg)"


def picture_format(path):
    """-> Pillow's name of the format for a path, "PNG"; None where it cannot write such a file."""
    suffix = Path(path).suffix.lower()
    kind = Image.registered_extensions().get(suffix)
    return kind if kind in Image.SAVE else None


# ---------------------------------------------------------------- flags

def output_path(text):
    """An argparse type: where a file can be written, as far as can be told beforehand."""
    folder = os.path.dirname(text) or "."
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {folder}")
    if os.path.exists(text) and not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text}: not a regular file, so nothing is written there")
    return text


def picture_path(text):
    """An argparse type: where a picture can be written."""
    if picture_format(text) is None:
        raise argparse.ArgumentTypeError(f"{text}: {UNKNOWN_SUFFIX}")
    return output_path(text)
