"""The figures of a comparison, good enough to paste into a paper. Needs matplotlib.

    python eval.py runs/a/best.pth runs/b/best.pth --plot figures/     # all of them
    python -m extras.plots runs/a runs/b --out figures/                # the first two, from logs
    python -m extras.plots runs/kd/* runs/plain/* --group --out figures/      # a band for the seeds

    loss.png        total loss over training, a line a run                      (EffiSeg's figure 4)
    miou.png        mIoU on the validation split over training                  (figure 5)
    radar.png       IoU of each class, a ring a checkpoint                      (figure 6)
    confusion_N.png truth against prediction of checkpoint N, each row in percent of the truth

The first two come from log.csv and scores.csv beside each checkpoint; a run without them is named
and left out.
"""

import argparse
import csv
import math
from pathlib import Path

import numpy as np

from extras.cli import UsageError, make_folder, run_command
from extras.outputs import output_file
from extras.packages import import_package
from extras.seed_groups import group_runs

STYLE = {
    "figure.figsize": (6.4, 4), "figure.dpi": 160, "savefig.bbox": "tight",
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 9, "legend.frameon": False,
    "text.parse_math": False,                                     # a name may hold a $
}


def import_pyplot():
    """-> matplotlib.pyplot, set to draw into files. Raises UsageError where it is not installed."""
    matplotlib = import_package("matplotlib", "figures need")
    matplotlib.use("Agg")                                         # files, no window
    import matplotlib.pyplot as plt
    return plt


# ---------------------------------------------------------------- what the figures are made of

def read_columns(path, names):
    """Columns of a CSV file -> {name: array of floats}; None where there is no file or no row.

    Raises UsageError for a file that is damaged or no run's.
    """
    if not path.is_file():
        return None
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (ValueError, csv.Error):                               # ValueError: not UTF-8
        raise UsageError(f"{path}: damaged, it is no table of numbers") from None
    if not rows:
        return None
    columns = {}
    for name in names:
        if rows[0].get(name) is None:
            raise UsageError(f"{path}: it has no column {name}, so it is not a run's")
        try:
            columns[name] = np.array([float(row[name]) for row in rows])
        except (TypeError, ValueError):                           # a short row, or no number
            raise UsageError(f"{path}: damaged, its column {name} is not all numbers") from None
    return columns


def running_mean(values, width):
    """Mean of the last `width` values at each place: a step's loss is the loss of a few images."""
    sums = np.cumsum(np.insert(values, 0, 0.0))                   # sums[n]: of the first n values
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def checkpoint_names(paths):
    """Checkpoints' paths -> what tells them apart: the run's folder, or more if need be."""
    parents = [Path(path).resolve().parent.name for path in paths]
    longer = [f"{parent}/{Path(path).stem}" for parent, path in zip(parents, paths, strict=True)]
    return first_distinct(parents, longer, [str(path) for path in paths])


def run_names(folders):
    """Runs' folders -> what tells them apart: the folder's name, or more if need be."""
    resolved = [Path(folder).resolve() for folder in folders]
    short = [folder.name for folder in resolved]
    longer = [f"{folder.parent.name}/{folder.name}" for folder in resolved]
    return first_distinct(short, longer, [str(folder) for folder in folders])


def first_distinct(*candidates):
    """-> the first of some lists of names in which no name occurs twice."""
    for names in candidates:
        if len(set(names)) == len(names):
            return names
    return candidates[-1]


# ---------------------------------------------------------------- figures, each -> its files

def plot_loss(runs, out):
    """Total loss over training. runs: {name: [folder]}, the seeds of a recipe each."""
    lines = {}
    for name, seeds in read_runs(runs, "log.csv", "loss", out).items():
        lines[name] = []
        for data in seeds:
            window = max(1, len(data["loss"]) // 50)
            lines[name].append((data["step"], running_mean(data["loss"], window)))
    return plot_lines(lines, "loss (running mean)", out)


def plot_miou(runs, out):
    """mIoU at each validation. runs: {name: [folder]}, the seeds of a recipe each."""
    lines = {}
    for name, seeds in read_runs(runs, "scores.csv", "miou", out).items():
        lines[name] = [(data["step"], 100 * data["miou"]) for data in seeds]
    return plot_lines(lines, "mIoU on the validation split, %", out, marker=".")


def read_runs(runs, file, column, out):
    """-> {name: [columns "step" and `column` of each folder's `file`]}; a run without is named and
    left out."""
    found = {}
    for name, folders in runs.items():
        for folder in folders:
            data = read_columns(Path(folder) / file, ("step", column))
            if data is None:
                print(f"{out.name}: no {file} in {folder}")
            else:
                found.setdefault(name, []).append(data)
    return found


def mean_line(seeds):
    """[(steps, values)] of several seeds -> (steps that all have, mean, standard deviation)."""
    steps = seeds[0][0]
    for other, _ in seeds[1:]:
        steps = np.intersect1d(steps, other)
    rows = []
    for own, values in seeds:
        rows.append(values[np.isin(own, steps)])
    deviation = np.std(rows, axis=0, ddof=1) if len(rows) > 1 else np.zeros(len(steps))
    return steps, np.mean(rows, axis=0), deviation


def plot_lines(lines, label, out, marker=None):
    """{name: [(steps, values)]} -> a figure, or none where there is no line. Of several seeds the
    mean is drawn, in a band one standard deviation high and low."""
    if not lines:
        return []
    plt = import_pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots()
        for name, seeds in lines.items():
            steps, mean, deviation = mean_line(seeds)
            if not len(steps):
                print(f"{out.name}: the seeds of {name} have no step in common")
                continue
            title = f"{name}, {len(seeds)} seeds" if len(seeds) > 1 else name
            line, = axes.plot(steps, mean, label=title, marker=marker)
            if len(seeds) > 1:
                axes.fill_between(steps, mean - deviation, mean + deviation,
                                  color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel="step", ylabel=label)
        axes.legend()
        save_figure(figure, out)
        plt.close(figure)
    return [out]


def save_figure(figure, path):
    with output_file(path) as file:
        figure.savefig(file, format="png")


def plot_radar(names, results, classes, out):
    """IoU of each class on a circle, a ring a checkpoint. results: of `eval.scores`."""
    angles = np.linspace(0, 2 * math.pi, len(classes), endpoint=False)
    plt = import_pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.5, 5.5), subplot_kw={"polar": True})
        for name, result in zip(names, results, strict=True):
            iou = 100 * np.nan_to_num(np.array(result["iou"], float))
            label = f"{name}, mIoU {100 * result['miou']:.2f}"
            axes.plot([*angles, angles[0]], [*iou, iou[0]], label=label)        # a closed ring
            axes.fill(angles, iou, alpha=0.08)
        axes.set_xticks(angles, classes)
        axes.set_ylim(0, 100)
        axes.tick_params(pad=14)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08))
        save_figure(figure, out)
        plt.close(figure)
    return [out]


def plot_confusion(name, result, classes, out):
    """Row = truth, column = prediction, in percent of the row."""
    counts = np.array(result["confusion"], float)                 # (C, C)
    truth = np.maximum(counts.sum(1, keepdims=True), 1)           # (C, 1)
    shares = 100 * counts / truth
    side = 0.42 * len(classes)                                    # inches
    plt = import_pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(1.5 + side, 1.2 + side))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for row, column in np.argwhere(shares >= 0.5):
            share = shares[row, column]
            colour = "white" if share > 55 else "black"
            text = f"{share:.0f}"
            axes.text(column, row, text, color=colour, fontsize=6, ha="center", va="center")
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="predicted", ylabel="truth", title=f"{name}, % of the truth")
        axes.grid(False)
        save_figure(figure, out)
        plt.close(figure)
    return [out]


# ---------------------------------------------------------------- all of them

def plot_curves(runs, folder):
    """The paper's figures 4 and 5. runs: {name: [its folders]} -> the files written."""
    return plot_loss(runs, folder / "loss.png") + plot_miou(runs, folder / "miou.png")


def plot_runs(runs, results, classes, folder):
    """The paper's figures 4, 5 and 6 -> the files written.

    runs: {name: [its folders]}; results: their scores, in the same order.
    """
    written = plot_curves(runs, folder)
    return written + plot_radar(list(runs), results, classes, folder / "radar.png")


def plot_all(runs, results, classes, folder):
    """All figures -> the files written.

    runs: {name: [its folders]}; results: of each its scores and "confusion", see `merge_results`.
    """
    written = plot_runs(runs, results, classes, folder)
    for i, (name, result) in enumerate(zip(runs, results, strict=True), 1):
        written += plot_confusion(name, result, classes, folder / f"confusion_{i}.png")
    return written


def merge_results(results):
    """The scores and "confusion" of several seeds -> those of their recipe: mean scores, and all
    pixels in one confusion matrix."""
    iou = np.array([result["iou"] for result in results], float)  # (seeds, C)
    return {
        "miou": float(np.mean([result["miou"] for result in results])),
        "iou": iou.mean(0).tolist(),
        "confusion": np.sum([result["confusion"] for result in results], axis=0).tolist(),
    }


def main():
    parser = argparse.ArgumentParser(
        prog="python -m extras.plots",
        description="Draw loss and mIoU over training from the logs of runs. "
                    "Radar and confusion matrices: python eval.py CHECKPOINT... --plot DIR")
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="folders of runs, with log.csv and scores.csv")
    parser.add_argument("--group", action="store_true",
                        help="seeds of one recipe are one line, their mean, in a band of their "
                             "standard deviation (default: a line for each run)")
    parser.add_argument("--out", metavar="DIR", required=True,
                        help="where to write loss.png and miou.png")
    args = parser.parse_args()
    import_pyplot()                                               # its error comes first
    folders = list(dict.fromkeys(args.runs))                      # given twice, it is one line
    for run in folders:
        if not Path(run).is_dir():
            raise UsageError(f"{run}: there is no such folder of a run")
    if args.group:
        runs = {}
        for group in group_runs(folders):
            runs[group.name] = [folders[i] for i in group.members]
    else:
        runs = {name: [run] for name, run in zip(run_names(folders), folders, strict=True)}
    written = plot_curves(runs, make_folder(args.out))
    if not written:
        raise UsageError("none of these folders holds a run's log.csv or scores.csv")
    for path in written:
        print(path)


if __name__ == "__main__":
    run_command(main)
