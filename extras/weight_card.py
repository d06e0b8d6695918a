"""The card of published weights: what they are, what they score, and numbers to check them by.

    python -m extras.weight_card weights/camvid-b0-dyt.pth --data camvid:DIR \\
        --runs results/camvid-record/teacher/0 results/camvid-record/b0-dyt-fd/0

writes weights/camvid-b0-dyt.md. --runs: what the trainings left (recipe.json), the first one first.

Two tables of the card are read again by tests/test_weights.py, on every machine: the mIoU of some
frames of val, where the data is there, and what the network says of toy scenes, which need no data.
"""

import argparse
import hashlib
from pathlib import Path

import torch

from data import open_dataset
from eval import confusion_matrix, evaluate, scores, segment
from extras.cli import UsageError, run_command, show_progress
from extras.comparison import spread_indices
from extras.outputs import write_text
from extras.provenance import check_classes
from extras.score_table import markdown
from extras.seed_groups import read_recipe
from extras.toy_scenes import draw_scene
from extras.view_flags import open_model

FRAMES = 6                                                        # of val, spread over it
SCENES = ("val-0000", "val-0001", "val-0002")
SCORED = ("val", "test")
LICENCES = {
    "CamVid": "CamVid, Brostow, Fauqueur and Cipolla, University of Cambridge; its frames are for "
              "non-commercial use, and what follows from that for weights is for you to judge. The "
              "code is MIT.",
}


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def frame_scores(model, dataset):
    """-> [(name of a frame, its mIoU)], of FRAMES frames spread over the data set."""
    found = []
    for i in spread_indices(len(dataset), FRAMES):
        image, label = dataset[i]                                 # (3, H, W), (H, W)
        classes = segment(model, image, model.input_size)         # (H, W)
        confusion = confusion_matrix(classes, label, model.num_classes)
        found.append((dataset.stems[i], scores(confusion)["miou"]))
    return found


def scene_shares(model):
    """-> [(name of a toy scene, [share of its pixels that get each class])]

    What a network of real streets says of drawn ones means nothing, but it is always the same.
    """
    found = []
    for stem in SCENES:
        image, _ = draw_scene(stem)                               # (H, W, 3)
        image = torch.from_numpy(image).permute(2, 0, 1)          # (3, H, W)
        classes = segment(model, image, model.input_size)         # (H, W)
        counts = torch.bincount(classes.flatten().long(), minlength=model.num_classes)
        found.append((stem, (counts / counts.sum()).tolist()))
    return found


# ---------------------------------------------------------------- the card

def write_card(path, data, runs):
    """Score the weights at `path`, and write their card beside them -> its path."""
    model = open_model(path, None, torch.device("cpu"))
    results = []
    for split in SCORED:
        dataset = open_dataset(data, split)
        check_classes(model, path, dataset)
        confusion = evaluate(model, dataset, model.input_size, progress=show_progress(split))
        result = scores(confusion)
        results.append((split, [result["miou"], result["macc"], result["aacc"], *result["iou"]]))
    val = open_dataset(data, "val")
    paragraphs = [
        f"# {Path(path).name}",
        describe_file(path, model),
        describe_training(runs),
        f"Data and licence: {LICENCES.get(val.name, val.name)}",
        "## Scores",
        "Percent, at the labels' full resolution.",
        markdown(["split", "mIoU", "mAcc", "aAcc", *model.classes], percent_rows(results)),
        "## To check a copy by",
        f"sha256 {file_hash(path)}",
        "mIoU of single frames of val, percent:",
        markdown(["frame", "mIoU"], percent_rows(frame_scores(model, val))),
        "Share of the pixels of toy scenes (`extras/toy_scenes.py`) that get each class, percent; "
        "it means nothing, and needs no data:",
        markdown(["scene", *model.classes], percent_rows(scene_shares(model))),
    ]
    card = Path(path).with_suffix(".md")
    write_text(card, "\n\n".join(paragraphs) + "\n")
    return card


def percent_rows(found):
    """[(name, fraction or [fraction])] -> rows of cells"""
    rows = []
    for name, values in found:
        values = values if isinstance(values, list) else [values]
        rows.append([name] + [f"{100 * value:.2f}" for value in values])
    return rows


def describe_file(path, model):
    parameters = sum(parameter.numel() for parameter in model.parameters())
    mib = Path(path).stat().st_size / 2 ** 20
    words = (f"SegFormer-{model.variant.upper()}, {len(model.classes)} classes "
             f"({', '.join(model.classes)}), {mib:.1f} MiB, {parameters:,} parameters when folded.")
    if model.input_size is not None:
        height, width = model.input_size
        words += f" Frames are resized to {height}x{width} (HxW) for it, as its file says."
    return words


def describe_training(runs):
    """The commands of the trainings, in their order, with their commits and threads: a CPU's sums,
    and so the weights, depend on how many there are.
    """
    lines = ["Trained by"]
    for folder in runs:
        recipe = read_recipe(folder)
        if recipe is None:
            raise UsageError(f"{folder} has no recipe.json: it is no run of train.py")
        line = f"    python {recipe['command']}    # {describe_machine(recipe)}"
        for later in recipe.get("resumed", []):
            line += f"; from step {later['from_step']} on {describe_machine(later)}"
        lines.append(line)
    return "\n\n".join([lines[0], "\n".join(lines[1:])])


def describe_machine(recipe):
    words = f"commit {recipe['commit']}"
    if "threads" in recipe:                                       # an old recipe does not tell
        words += f", threads {recipe['threads']}"
    return words


def read_tables(path):
    """A card -> {first cell of a table's head: {first cell of a row: [number]}}"""
    tables = {}
    rows = None
    for line in Path(path).read_text().splitlines():
        if not line.startswith("|"):
            rows = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if rows is None:                                          # the head
            rows = tables.setdefault(cells[0], {})
        elif not cells[0].startswith("---"):
            rows[cells[0]] = [float(cell) for cell in cells[1:]]
    return tables


def build_parser():
    parser = argparse.ArgumentParser(
        prog="python -m extras.weight_card",
        description="Score weights that are to be given away, and write their card beside them.")
    parser.add_argument("weights", metavar="FILE.pth")
    parser.add_argument("--data", required=True, metavar="DATA", help="camvid:DIR, ...")
    parser.add_argument("--runs", required=True, nargs="+", metavar="RUN",
                        help="folders with the recipe.json of each training, the first one first")
    return parser


def main():
    args = build_parser().parse_args()
    print(write_card(args.weights, args.data, args.runs))


if __name__ == "__main__":
    run_command(main)
