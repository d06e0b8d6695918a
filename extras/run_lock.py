"""One process at a time writes to a run's folder.

    with RunLock() as lock:
        lock.take(folder)                  # UsageError where another process has it
        ...

RUN/run.lock stays when the run ends, and means nothing by itself: what counts is the system's lock
on it (flock), which ends with the process that holds it, however it ends. The file also tells a
folder that was begun by this project from one with somebody's own log.csv in it.
"""

import errno
import os
import sys

from extras.cli import UsageError

try:
    import fcntl
except ImportError:                                    # Windows has none
    fcntl = None

NAME = "run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)         # of some network file systems


class RunLock:
    """Held from `take` to the end of the `with` block, or of the process."""

    held_here = set()                                  # descriptors, closed in a loader's workers

    def __init__(self):
        self.descriptor = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.descriptor is not None:
            self.held_here.discard(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = None

    def take(self, folder):
        """Lock `folder`. Raises UsageError where another process has it."""
        path = folder / NAME
        if path.is_symlink():
            raise UsageError(f"{path} is a link: a run writes to its own folder only; remove it")
        how = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self.descriptor = os.open(path, how, 0o644)
        self.held_here.add(self.descriptor)
        if fcntl is None:
            return
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder} is being written by another run{self.holder()}: "
                             "wait for its end, or choose another --out") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"note: the file system of {folder} has no locks: see to it that no second run "
                  "writes there", file=sys.stderr)
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, str(os.getpid()).encode())

    def holder(self):
        """Who has it, in words; nothing where the file does not say."""
        text = os.pread(self.descriptor, 20, 0)
        return f" (process {int(text)})" if text.isdigit() else ""


def close_in_worker():
    """For a loader's worker: it inherits the lock, and may outlive a process that was killed."""
    for descriptor in RunLock.held_here:
        os.close(descriptor)
    RunLock.held_here.clear()
