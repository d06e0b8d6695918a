"""Frames, truth and what several networks say of them, side by side.

    python eval.py A B --picture FILE | --overlay DIR | --strip FILE | --plot DIR
    sheet = draw_comparison([model], ["student"], dataset, [0, 7])
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eval import evaluate, scores, segment
from extras.cli import UsageError, make_folder, show_progress
from extras.outputs import save_picture
from extras.pictures import grid, legend, overlay
from extras.printable import printable
from extras.seed_groups import Group, group_runs
from extras.view_flags import segment_options

GAP = 4                                                           # pixels above the legend
FRAMES = 4                                                        # of --picture


def draw_comparison(models, names, dataset, indices, **options):
    """-> PIL picture: frames, truth and predictions of `models` side by side, a legend below.

    options: window, stride, scales, flip of `segment`.
    """
    rows = []
    for i in indices:
        image, label = dataset[i]
        frame = image.permute(1, 2, 0).numpy()                    # (H, W, 3)
        row = [frame, overlay(frame, label, dataset.palette)]
        for model in models:
            classes = segment(model, image, model.input_size, **options)
            row.append(overlay(frame, classes, dataset.palette))
        rows.append(row)
    sheet = grid(rows, ("frame", "truth", *names))
    below = Image.fromarray(legend(dataset.classes, dataset.palette, sheet.width))
    whole = Image.new("RGB", (sheet.width, sheet.height + GAP + below.height), "white")
    whole.paste(sheet)
    whole.paste(below, (0, sheet.height + GAP))
    return whole


def spread_indices(count, some):
    """At most `some` indices, evenly over range(count)."""
    return np.linspace(0, count - 1, min(some, count)).astype(int).tolist()


def order_by_score(model, dataset, **options):
    """-> the labelled frames' indices, from the lowest mIoU of a frame by itself to the highest."""
    found = []
    for i in range(len(dataset)):
        frame = torch.utils.data.Subset(dataset, [i])
        miou = scores(evaluate(model, frame, model.input_size, **options))["miou"]
        if not math.isnan(miou):
            found.append((miou, i))
    return [i for _, i in sorted(found)]


# ---------------------------------------------------------------- eval.py's flags

def draw_what_is_asked(networks, dataset, args):
    """--picture, --overlay, --strip and --plot."""
    if args.picture:
        draw_some(networks, dataset, args)
    if args.overlay:
        draw_all(networks, dataset, args)
    if args.strip:
        draw_strip(networks, dataset, args)
    if args.plot:
        plot(networks, dataset, args)


def draw_frames(networks, dataset, indices, args):
    """-> PIL picture of these frames, as `draw_comparison`."""
    models = [network.model for network in networks]
    names = [network.name for network in networks]
    return draw_comparison(models, names, dataset, indices, **segment_options(args))


def draw_some(networks, dataset, args):
    indices = spread_indices(len(dataset), FRAMES)
    save_picture(draw_frames(networks, dataset, indices, args), args.picture)
    print(f"picture: {args.picture}")


def draw_all(networks, dataset, args):
    folder = make_folder(args.overlay)
    own = set()                                                   # images and labels
    for files in dataset.frames.values():
        if files is not None:                                     # a drawn scene has none
            own.update(path.resolve() for path in files)
    for stem in dataset.stems:
        if (folder / f"{stem}.png").resolve() in own:
            raise UsageError(f"--overlay {folder}: the data set itself is there, and would be "
                             f"overwritten; choose another folder")
    progress = show_progress(args.overlay)
    for i, stem in enumerate(dataset.stems):
        save_picture(draw_frames(networks, dataset, [i], args), folder / f"{stem}.png")
        progress(i + 1, len(dataset))
    print(f"{len(dataset)} pictures in {folder}")


def draw_strip(networks, dataset, args):
    order = order_by_score(networks[-1].model, dataset, **segment_options(args))
    if not order:
        raise UsageError(f"--strip: no frame of {args.data} {args.split} has a labelled pixel "
                         "to be scored by")
    chosen = {
        "worst": order[0],
        "lower quartile": order[len(order) // 4],
        "median": order[len(order) // 2],
        "best": order[-1],
    }
    save_picture(draw_frames(networks, dataset, chosen.values(), args), args.strip)
    described = [f"the {rank} ({printable(dataset.stems[i])})" for rank, i in chosen.items()]
    print(f"{args.strip}: by the last network's mIoU of a frame, " + ", ".join(described))


def plot(networks, dataset, args):
    from extras.plots import checkpoint_names, merge_results, plot_all  # needs matplotlib

    paths = [network.path for network in networks]
    folders = [Path(path).parent for path in paths]
    if args.group:
        groups = group_runs(folders, args.names)
    else:
        names = args.names or checkpoint_names(paths)
        groups = [Group(name, [i]) for i, name in enumerate(names)]
    runs = {}
    results = []
    for group in groups:
        runs[group.name] = [folders[i] for i in group.members]
        results.append(merge_results([networks[i].result for i in group.members]))
    for path in plot_all(runs, results, dataset.classes, make_folder(args.plot)):
        print(path)
