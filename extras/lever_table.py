"""The table of what the baseline gains by, from results/camvid-levers/: on val alone.

Made by `python -m extras.paper_tables`, as all tables of docs/RESULTS.md.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from extras.result_rows import read_csv, read_json

AUGMENTATIONS = {
    ("plain", 0.5, 2.0): "resize and flip",
    ("segformer", 0.75, 1.5): "gentle (scale 0.75-1.5)",
    ("segformer", 0.5, 2.0): "SegFormer's (scale 0.5-2)",
}
# What a run has beside the plain loss, by its flags: (flag, its value in a plain run, words).
CHANGES = (
    ("loss", "wce", "{}"),
    ("class_weights", "enet", "class weights {}"),
    ("weight_decay", 0.0, "weight decay {}"),
    ("ema", None, "average of the weights, {}"),
    ("norm", "ln", "norm {}"),
)


@dataclass
class Lever:
    """One run of the table. Scores are fractions."""
    recipe: dict
    val: float                                                    # mIoU of the last checkpoint


def read_levers(folder):
    """-> {name of the row: [Lever], one a seed}, of the runs that ended."""
    found = {}
    for path in sorted(Path(folder).glob("*/*/scores.csv")):
        recipe = read_json(path.parent / "recipe.json")
        last = read_csv(path)[-1]
        if int(last["step"]) == recipe["iters"]:
            lever = Lever(recipe, float(last["miou"]))
            found.setdefault(path.parent.parent.name, []).append(lever)
    return found


def frames_of(recipe):
    """"360x480": the size that a whole frame is worked at."""
    height, width = recipe["input_size"]
    return f"{height}x{width}"


def augmentation_of(recipe):
    low, high = recipe["scale_range"]
    return AUGMENTATIONS.get((recipe["augment"], low, high), f"scale {low:g}-{high:g}")


def format_rate(rate):
    """0.0012 -> "1.2e-3"."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def changes_of(recipe):
    """What stands beside the plain loss: "class weights sqrt, weight decay 0.05"."""
    words = []
    for flag, usual, text in CHANGES:
        value = recipe.get(flag, usual)
        if isinstance(value, list):                               # recipes before --class-weights
            value = usual
        if value != usual:
            words.append(text.format(value))
    return ", ".join(words) or "-"


def is_plain(recipe):
    """Nothing but a resize and a flip, and the plain loss: what a lever is held against."""
    return recipe["augment"] == "plain" and changes_of(recipe) == "-"


def format_mious(vals):
    """[0.6, 0.61] -> "60.50 (60.00, 61.00)": the mean, and of several runs each."""
    mean = f"{100 * statistics.mean(vals):.2f}"
    if len(vals) == 1:
        return mean
    each = ", ".join(f"{100 * val:.2f}" for val in vals)
    return f"{mean} ({each})"


def format_gain(levers, plain):
    """-> "+1.20": how far the row's mean is above that of the plain one."""
    if plain is None or plain is levers:
        return ""
    return f"{100 * (mean_val(levers) - mean_val(plain)):+.2f}"


def mean_val(levers):
    return statistics.mean(lever.val for lever in levers)


def lever_rows(folder):
    """-> the cells of each row: by the frames, the large first, and there the best first.

    Each is held against the best plain row of its frames.
    """
    by_frames = {}
    for levers in read_levers(folder).values():
        height, width = levers[0].recipe["input_size"]
        by_frames.setdefault((height, width), []).append(levers)

    cells = []
    for frames in sorted(by_frames, reverse=True):
        rows = sorted(by_frames[frames], key=mean_val, reverse=True)
        plain_rows = [levers for levers in rows if is_plain(levers[0].recipe)]
        plain = plain_rows[0] if plain_rows else None
        for levers in rows:
            recipe = levers[0].recipe
            cells.append([
                frames_of(recipe),
                augmentation_of(recipe),
                format_rate(recipe["lr"]),
                changes_of(recipe),
                f"{recipe['iters']:,}",
                str(len(levers)),
                format_mious([lever.val for lever in levers]),
                format_gain(levers, plain),
            ])
    return cells
