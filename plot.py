"""The figures of a comparison, good enough to paste into a paper: `python eval.py RUN/best.pth ... --plot DIR`. Needs matplotlib.

    loss.png        total loss over training, a line a run                                  (EffiSeg's figure 4)
    miou.png        mIoU on the validation split over training                              (figure 5)
    radar.png       IoU per class, a ring a checkpoint                                      (figure 6)
    confusion_N.png truth against prediction of checkpoint N, each row in percent of the truth

The first two come from log.csv and scores.csv beside each checkpoint, and are left out, in words, where there are none.
"""

import csv
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")                                             # files, no window
import matplotlib.pyplot as plt                                   # noqa: E402
import numpy as np                                                # noqa: E402

STYLE = {"figure.figsize": (6.4, 4), "figure.dpi": 160, "savefig.bbox": "tight", "axes.grid": True, "grid.alpha": 0.3,
         "axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "legend.frameon": False}


def read_columns(path, names):
    """Columns of a CSV file -> {name: array of floats}; None where there is no such file or no row."""
    if not path.is_file():
        return None
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in names} if rows else None


def running_mean(values, width):
    """Mean of the last `width` values at each place: a step's loss is the loss of a few images."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    first = np.maximum(np.arange(1, len(values) + 1) - width, 0)
    return (sums[1:] - sums[first]) / (np.arange(1, len(values) + 1) - first)


def short_names(paths):
    """Checkpoints' paths -> what tells them apart: the run's folder, and the file's name where that is not enough."""
    folders = [Path(path).resolve().parent.name for path in paths]
    return [folder if folders.count(folder) == 1 else f"{folder}/{Path(path).stem}" for folder, path in zip(folders, paths)]


def curves(runs, file, column, label, out, smooth=False):
    """A line a run of one column of its `file` over the steps. runs: {name: folder} -> [path of the figure], or [] without any such file."""
    figure, axes = plt.subplots()
    for name, folder in runs.items():
        data = read_columns(Path(folder) / file, ("step", column))
        if data is None:
            print(f"{out.name}: no {file} in {folder}")
            continue
        values = running_mean(data[column], max(1, len(data[column]) // 50)) if smooth else 100 * data[column]
        axes.plot(data["step"], values, label=name, marker=None if smooth else ".")
    axes.set(xlabel="step", ylabel=label)
    if axes.lines:
        axes.legend()
        figure.savefig(out)
    plt.close(figure)
    return [out] if axes.lines else []


def radar(names, results, classes, out):
    """IoU per class on a circle, a ring a checkpoint."""
    angles = np.linspace(0, 2 * math.pi, len(classes), endpoint=False)
    figure, axes = plt.subplots(figsize=(5.5, 5.5), subplot_kw={"polar": True})
    for name, result in zip(names, results):
        iou = 100 * np.nan_to_num(np.array(result["iou"], float))
        axes.plot([*angles, angles[0]], [*iou, iou[0]], label=f"{name}, mIoU {100 * result['miou']:.2f}")
        axes.fill(angles, iou, alpha=0.08)
    axes.set_xticks(angles, classes)
    axes.set_ylim(0, 100)
    axes.tick_params(pad=14)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08))
    figure.savefig(out)
    plt.close(figure)
    return [out]


def confusion(name, result, classes, out):
    """Row = truth, column = prediction, in percent of the row."""
    counts = np.array(result["confusion"], float)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(1.5 + 0.42 * len(classes), 1.2 + 0.42 * len(classes)))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for row, column in zip(*np.nonzero(shares >= 0.5)):
        axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", fontsize=6, color="white" if shares[row, column] > 55 else "black")
    axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="truth", title=f"{name}, % of the truth")
    axes.grid(False)
    figure.savefig(out)
    plt.close(figure)
    return [out]


def plot_runs(runs, results, classes, folder):
    """The paper's figures 4, 5 and 6. runs: {name: its folder}, results: their scores in the same order -> the files written."""
    with plt.rc_context(STYLE):
        written = curves(runs, "log.csv", "loss", "loss (running mean)", folder / "loss.png", smooth=True)
        written += curves(runs, "scores.csv", "miou", "mIoU on the validation split, %", folder / "miou.png")
        return written + radar(runs, results, classes, folder / "radar.png")


def plot_all(paths, results, classes, folder):
    """All figures of the checkpoints at `paths` with their `results` (scores and confusion matrices) -> the files written."""
    names = short_names(paths)
    written = plot_runs({name: Path(path).parent for name, path in zip(names, paths)}, results, classes, folder)
    with plt.rc_context(STYLE):
        for i, (name, result) in enumerate(zip(names, results), 1):
            written += confusion(name, result, classes, folder / f"confusion_{i}.png")
    return written
