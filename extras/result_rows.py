"""The rows that reproduce.sh left in results/, and how far they are apart.

    runs = read_row(Path("results/camvid-short/b0-kd"))           # [Run], one a seed
    difference(runs, read_row(Path("results/camvid-short/b0")))   # "+1.21 +- 0.44"
"""

import csv
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from extras.cli import UsageError
from extras.score_table import markdown, spread

# Student's t for the 95 % interval of the mean of n differences
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass
class Run:
    """One seed of a row. Scores are fractions."""
    folder: Path
    recipe: dict
    full: dict                                                    # on test, full resolution
    quarter: dict | None                                          # on test, by the paper's protocol
    val: float                                                    # mIoU on val, last checkpoint

    @property
    def seed(self):
        return self.recipe["seed"]


def read_json(path):
    return json.loads(path.read_text())


def read_csv(path):
    """-> [{column: text}]"""
    return list(csv.DictReader(path.read_text().splitlines()))


def read_scores(path):
    """The scores of the one checkpoint in a file of eval.py --json."""
    return read_json(path)["checkpoints"][0]


def read_row(folder, has_quarter=True):
    """-> [Run], one a seed, in the order of the seeds; [] for a row that was not run.

    Raises UsageError for seeds of two learning rates or lengths: a mean over them says nothing.
    """
    runs = []
    finished = folder.glob("*/scores.csv")                        # reproduce.sh writes it last
    for seed in sorted(path.parent for path in finished):
        validations = read_csv(seed / "scores.csv")
        runs.append(Run(
            folder=seed,
            recipe=read_json(seed / "recipe.json"),
            full=read_scores(seed / "test.json"),
            quarter=read_scores(seed / "quarter.json") if has_quarter else None,
            val=float(validations[-1]["miou"]),
        ))
    for name in ("lr", "iters"):
        values = {run.recipe[name] for run in runs}
        if len(values) > 1:
            listed = " and ".join(str(value) for value in sorted(values))
            raise UsageError(f"{folder}: its seeds have --{name} {listed}, so they are no "
                             f"repetitions of each other")
    return runs


def differences(runs, base):
    """{seed: runs - base in mIoU}, over the seeds that both have."""
    base_miou = {run.seed: run.full["miou"] for run in base}
    shared = [run for run in runs if run.seed in base_miou]
    return {run.seed: run.full["miou"] - base_miou[run.seed] for run in shared}


def difference(runs, base):
    """Percent of mIoU: runs - base, over the seeds that both have; "" if there is none."""
    pairs = differences(runs, base).values()
    return spread(pairs, "+") if pairs else ""


def interval(values):
    """Percent: the 95 % interval of a mean by Student's t; "-" of one value. At most 10 values."""
    values = [100 * value for value in values]
    if len(values) < 2:
        return "-"
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return f"{mean - half:+.2f} to {mean + half:+.2f}"


def difference_table(folder, pairs, titles):
    """The differences of pairs of rows on test, seed by seed, and the interval of their mean.

    pairs: [(row, what it is held against)]; titles: {row: its name in the table} -> markdown
    """
    rows = []
    for name, base in pairs:
        found = differences(read_row(folder / name), read_row(folder / base))
        if not found:
            continue
        values = found.values()
        rows.append([
            f"{titles[name]}, against {titles[base]}",
            ", ".join(str(seed) for seed in found),
            ", ".join(f"{100 * value:+.2f}" for value in values),
            f"{100 * statistics.mean(values):+.2f}",
            interval(values),
        ])
    return markdown(["", "seeds", "differences", "mean", "95 % interval"], rows)


def steps(runs):
    return runs[0].recipe["iters"]


def shared_seeds(rows):
    """The seeds that all of `rows`, lists of runs, have."""
    seeds = {run.seed for run in rows[0]}
    for runs in rows[1:]:
        seeds &= {run.seed for run in runs}
    return seeds
