"""A run's logs: CSV files, and the same numbers for TensorBoard.

    log = Log(folder, "log.csv", ["step", "loss"], step)     # goes on after `step`
    log.add([[1, "0.5"]])
"""

import csv
import io

from extras.cli import UsageError
from extras.distributed import rank
from extras.outputs import write_text
from extras.packages import import_package


class Log:
    """A CSV file that the first process writes; on resume the rows after `step` are dropped and
    will be written again.
    """

    def __init__(self, folder, name, columns, step):
        self.file = None
        if rank() > 0:
            return
        self.path = folder / name
        rows = rows_until(self.path, step, columns)
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(rows)
        # Killed while rewriting, the old rows are still there.
        write_text(self.path, text.getvalue())
        # Open as long as the run.
        self.file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115

    def add(self, rows):
        if self.file is None:
            return
        try:
            csv.writer(self.file).writerows(rows)
            self.file.flush()
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}; what was saved before "
                             "is whole") from None


def rows_until(path, step, columns):
    """-> the rows of a log up to `step`, without its header; none where there is no such file.

    In the order of `columns`; one that the log of an older version lacks is empty. Raises
    UsageError for a file that is no log.
    """
    if step == 0 or not path.exists():
        return []
    if not path.is_file():
        raise UsageError(f"{path} is no file that can be read: move it away")
    rows = []
    last = 0
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            for row in reader:
                number = step_of(row)
                # A row that a full disk cut off has fewer cells, or another step.
                if len(row) == len(header) and last < number <= step:
                    cells = dict(zip(header, row, strict=True))
                    rows.append([cells.get(column, "") for column in columns])
                    last = number
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is not a log that can be read ({error}): move it away to go on "
                         "without its rows") from None
    return rows


def step_of(row):
    """The step that a row of a log is of; 0 for what is no row of one."""
    first = row[0] if row else ""
    is_step = first.isascii() and first.isdecimal() and len(first) < 20
    return int(first) if is_step else 0


class Board:
    """The same numbers, and pictures, for TensorBoard in RUN/tensorboard; without --tensorboard
    nothing is written.
    """

    def __init__(self, folder, wanted, start):
        self.writer = None
        if wanted and rank() == 0:
            purge_step = start + 1 if start else None
            self.writer = summary_writer()(folder / "tensorboard", purge_step=purge_step)

    def add_rows(self, group, columns, rows):
        """rows: of a log, each begins with its step; columns: the names of what follows it."""
        if self.writer is None:
            return
        for step, *values in rows:
            for name, value in zip(columns, values, strict=True):
                self.writer.add_scalar(f"{group}/{name}", float(value), int(step))

    def add_picture(self, step, picture):
        """picture: RGB (H, W, 3)."""
        if self.writer:
            self.writer.add_image("val", picture, step, dataformats="HWC")
            self.writer.flush()

    def close(self):
        if self.writer:
            self.writer.close()


def summary_writer():
    """-> TensorBoard's writer class. Raises UsageError where the package is not installed."""
    import_package("tensorboard", "--tensorboard needs")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter
