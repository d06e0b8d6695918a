"""What the registered study (docs/RESULTS.md) takes from its own runs on val: which learning rate a
row gets, and for how many steps a row is trained in the time that another takes.

    python -m extras.registered best results/camvid-rates b0-dyt           # b0-dyt-lr1.2e-3
    python -m extras.registered best results/camvid-rates b2 b2-dyt        # the best of both
    python -m extras.registered steps results/camvid-rates b0-dyt b0-dyt-fd

reproduce.sh calls it. It reads what that left: FOLDER/ROW-lrRATE/SEED/ with scores.csv, by which
the last checkpoint's mIoU on val is known, recipe.json, and fit.csv, which has the seconds of
training.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from extras.cli import UsageError, run_command
from extras.result_rows import read_csv, read_json


@dataclass(frozen=True)
class Rate:
    """A row at one learning rate, seed 0: more seeds of some rates must not decide."""
    row: str
    rate: str                                                     # as in the folder's name
    folder: Path
    val: float                                                    # mIoU of the last checkpoint

    @property
    def name(self):
        return f"{self.row}-lr{self.rate}"


def read_table(path):
    """-> [{column: text}] of a CSV file. Raises UsageError."""
    try:
        return read_csv(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def read_rates(folder, row):
    """-> [Rate] of a row, the lowest rate first. Raises UsageError where none was run."""
    found = []
    for path in Path(folder).glob(f"{row}-lr*"):
        scores = path / "0/scores.csv"
        if scores.exists():
            rate = path.name.removeprefix(f"{row}-lr")
            val = float(read_table(scores)[-1]["miou"])
            found.append(Rate(row, rate, path, val))
    if not found:
        raise UsageError(f"{folder} has no rate of {row} yet: ./reproduce.sh rates {row}")
    return sorted(found, key=lambda rate: float(rate.rate))


def best_rate(folder, rows):
    """-> the Rate that is best on val, of one or several rows.

    Where it is the lowest or highest that was tried, the grid should go on there: that is said.
    """
    best = None
    for row in rows:
        rates = read_rates(folder, row)
        best_of_row = max(rates, key=lambda rate: rate.val)
        if best_of_row in (rates[0], rates[-1]):
            print(f"note: {best_of_row.name} is at the edge of the rates that were tried: the grid "
                  f"goes on there, RATES=... ./reproduce.sh rates {row}", file=sys.stderr)
        if best is None or best_of_row.val > best.val:
            best = best_of_row
    return best


def seconds_of(folder):
    """-> the seconds that a run was trained for, without its validations."""
    return float(read_table(Path(folder) / "fit.csv")[-1]["seconds"])


def matched_steps(folder, row, other, more=()):
    """-> for how many steps `row` is trained in the time of `other`, and of the runs in `more`.

    Both at their best rate, seed 0, as they were timed.
    """
    run = best_rate(folder, [row]).folder / "0"
    steps = read_json(run / "recipe.json")["iters"]
    seconds = seconds_of(best_rate(folder, [other]).folder / "0")
    for each in more:
        seconds += seconds_of(each)
    return round(steps * seconds / seconds_of(run))


def build_parser():
    parser = argparse.ArgumentParser(
        prog="python -m extras.registered",
        description="What the registered study takes from its own runs on val.")
    commands = parser.add_subparsers(dest="command", required=True)

    best = commands.add_parser("best", help="print the row and rate that is best on val")
    best.add_argument("folder", help="results/camvid-rates")
    best.add_argument("rows", nargs="+", metavar="ROW")

    steps = commands.add_parser("steps", help="print for how many steps ROW takes as long as OTHER")
    steps.add_argument("folder", help="results/camvid-rates")
    steps.add_argument("row", metavar="ROW")
    steps.add_argument("other", metavar="OTHER")
    steps.add_argument("--and", dest="more", nargs="+", default=[], metavar="RUN",
                       help="and as these runs' folders: a teacher's")
    return parser


def main():
    args = build_parser().parse_args()
    if args.command == "best":
        print(best_rate(args.folder, args.rows).name)
    else:
        print(matched_steps(args.folder, args.row, args.other, args.more))


if __name__ == "__main__":
    run_command(main)
