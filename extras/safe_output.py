"""Writing below a folder that may hold what a stranger put there.

    with open_output(out, "aachen/x.png") as file:                # a binary file
        file.write(...)

The file appears whole or not at all. A link that stands at its path, or at one of the folders on
the way from `out` to it, is not followed: an archive of photos may bring such links along, and
results written through them would overwrite other files.
"""

import contextlib
import os
from pathlib import Path

from extras.cli import UsageError, make_folder


@contextlib.contextmanager
def open_output(out, name):
    """Yield a binary file that becomes `out`/`name` at the end. Raises UsageError where a link, a
    folder or a device stands in the way."""
    path = Path(out) / name
    check_way(Path(out), Path(name))
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.partial")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)                                        # of a run that was interrupted
    # O_EXCL: nothing, and no link, stands there.
    number = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(number, "w+b") as file:
            yield file
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def check_way(out, name):
    """Raise UsageError unless the folders from `out` to `name` are real, and `name` is a regular
    file or nothing yet."""
    for parent in list(name.parents)[:-1]:                        # the last one is "."
        folder = out / parent
        if folder.is_symlink():
            raise UsageError(f"{folder}: a link, which results are not written through")
    path = out / name
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path}: no regular file (a link, a folder or a device), which is not "
                         f"written over: remove it, or choose another --out")
