"""How good is a checkpoint, on which classes, and what does it look like.

    python eval.py runs/student/best.pth                           # on the data of its training
    python eval.py runs/teacher/best.pth runs/student/best.pth --data camvid:DIR --split test
    python eval.py teacher.pth plain.pth kd.pth --names teacher B0 B0+KD --picture picture.png
    python eval.py student.pth --json scores.json --overlay pictures/
    python eval.py runs/kd/*/best.pth runs/plain/*/best.pth --group --format md
    python eval.py student.pth --amp bf16                          # what 16 bits change
    python eval.py runs/a/best.pth runs/b/best.pth --plot figures/ # the paper's figures 4-6

Photos without labels: python -m extras.predict. Files for other runtimes: python -m extras.export.

The scores come from one confusion matrix over all labelled pixels of the split, at the labels' own
resolution: the logits are resized to it (bilinear), then comes the argmax. --quarter scores as the
EffiSeg paper's code does, at the logits' size against shrunk labels; that comes out a little higher
for some networks and a little lower for others, and no other paper reports it. The output says
which was used.

References
  Everingham et al., The PASCAL VOC Challenge, 2010: IoU = TP / (TP + FP + FN) over the whole set,
  then the mean over classes
"""

if __name__ == "__main__":
    # Before torch, whose import takes seconds in which a Ctrl-C may come.
    from extras import quiet_start
    quiet_start.begin()

import argparse
import contextlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import IGNORE, SPLITS, open_dataset
from extras.cli import NotFinite, UsageError, add_fold_flags, run_command, show_progress
from extras.machine import keep_freed_memory, pick_device
from extras.outputs import output_path, picture_path, write_text
from extras.provenance import (
    check_classes,
    choose_data,
    describe_fold,
    warn_of_leak,
)
from extras.score_table import FORMATS, Column, write_table
from extras.seed_groups import group_runs
from extras.view_flags import (
    add_view_flags,
    autocast,
    check_view_flags,
    describe_protocol,
    open_model,
    segment_options,
)
from model import SMALLEST, SegFormer

# ---------------------------------------------------------------- scores

def confusion_matrix(predictions, labels, num_classes):
    """Integer tensors of one shape, labels with IGNORE -> (C, C) int64.

    Row = truth, column = prediction.
    """
    valid = labels != IGNORE
    pairs = labels[valid].long() * num_classes + predictions[valid].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def scores(confusion):
    """(C, C) -> {"miou", "macc", "aacc", "iou": [C], "acc": [C]}, fractions.

    iou is TP / (TP + FP + FN) of a class, acc its recall TP / (TP + FN); miou and macc are their
    means over the classes, aacc the share of all labelled pixels that are right.
    A class with neither truth nor prediction is nan and left out of miou; one without truth has no
    accuracy (nan).
    """
    confusion = torch.as_tensor(confusion).cpu().double()
    hit = confusion.diag()                                        # (C,)
    truth = confusion.sum(1)                                      # (C,)
    predicted = confusion.sum(0)                                  # (C,)
    iou = hit / (truth + predicted - hit)                         # 0 / 0 = nan
    acc = hit / truth
    return {
        "miou": iou.nanmean().item(),
        "macc": acc.nanmean().item(),
        "aacc": (hit.sum() / truth.sum()).item(),
        "iou": iou.tolist(),
        "acc": acc.tolist(),
    }


# ---------------------------------------------------------------- from an image to its classes

def segment(model, image, size=None, window=None, stride=None, scales=(1.0,), flip=False):
    """uint8 image (3, H, W) -> its classes (H, W), int64.

    size: (H, W) that the image is resized to for the network, None for its own.
    scales, flip: average over these scales of the image, and over its mirror image too.
    window (h, w): the network sees windows of the image at its own size instead, whatever `size`
    is, and `stride` (dy, dx) apart (None: three quarters of the window); their scores are added
    where they overlap. The classes are int16 then, since the image may be huge.
    Raises UsageError for an image that is too small and for a stride beyond the window, NotFinite
    for NaN logits.
    """
    if window is not None:
        return segment_windows(model, image, window, stride, scales, flip)
    return class_scores(model, image, size, scales, flip).argmax(1)[0].cpu()


def segment_windows(model, image, window, stride, scales, flip):
    """`segment` through windows. Only one row of them is in memory, so an image may be huge."""
    H, W = image.shape[1:]
    h = min(window[0], H)
    w = min(window[1], W)
    if stride is None:
        stride = [max(1, 3 * h // 4), max(1, 3 * w // 4)]
    if stride[0] > window[0] or stride[1] > window[1]:
        raise UsageError(f"a stride of {stride[0]}x{stride[1]} is larger than the window, "
                         f"{window[0]}x{window[1]}: pixels would be left out")
    tops = window_starts(H, h, stride[0])
    lefts = window_starts(W, w, stride[1])
    next_tops = [*tops[1:], H]
    classes = torch.empty(H, W, dtype=torch.int16)
    band = torch.zeros(model.num_classes, h, W)                   # the scores from row `top` on
    for top, next_top in zip(tops, next_tops, strict=True):
        for left in lefts:
            part = image[:, top:top + h, left:left + w]           # (3, h, w)
            part_scores = class_scores(model, part, None, scales, flip)     # (1, C, h, w)
            band[:, :, left:left + w] += part_scores[0].cpu()
        # No later window reaches the rows above the next one: their classes are final.
        done = next_top - top
        classes[top:next_top] = band[:, :done].argmax(0)
        fresh = torch.zeros(model.num_classes, done, W)
        band = torch.cat([band[:, done:], fresh], 1)
    return classes


def window_starts(length, window, step):
    """Where windows begin along a side of `length` pixels; the last one ends with the image."""
    return [*range(0, length - window, step), length - window]


def class_scores(model, image, size=None, scales=(1.0,), flip=False):
    """uint8 image (3, H, W) -> (1, C, H, W): its logits, or the mean softmax of several views."""
    mirrorings = (False, True) if flip else (False,)
    views = [(scale, mirrored) for scale in scales for mirrored in mirrorings]
    if len(views) == 1:
        return view_logits(model, image, size, *views[0])
    total = 0
    for scale, mirrored in views:
        logits = view_logits(model, image, size, scale, mirrored)
        total = total + logits.softmax(1) / len(views)
    return total


def view_logits(model, image, size, scale, mirrored):
    """uint8 image (3, H, W) -> logits (1, C, H, W) of one view of it, flipped back."""
    H, W = image.shape[1:]
    if scale != 1:
        size = [max(SMALLEST, round(side * scale)) for side in size or (H, W)]
    view = image.flip(2) if mirrored else image
    logits = network_logits(model, view, size)                    # (1, C, h/4, w/4)
    logits = F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False)
    return logits.flip(3) if mirrored else logits                 # (1, C, H, W)


def network_logits(model, image, size=None):
    """uint8 image (3, H, W) -> logits (1, C, h/4, w/4) of it at `size` (h, w), None for its own.

    Raises UsageError for an image that is too small, NotFinite for NaN logits.
    """
    if size is not None:
        image = resize_image(image, size)
    height, width = image.shape[1:]
    if min(height, width) < SMALLEST:
        raise UsageError(f"a frame of {width}x{height} pixels: "
                         f"the network needs {SMALLEST}x{SMALLEST} at least")
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = model(image[None].to(device).float() / 255).float()
    # The argmax of NaN is class 0, which would pass for an answer.
    if not logits.isfinite().all():
        raise NotFinite("the network's output is not finite: its weights are broken")
    return logits


def resize_image(image, size):
    """uint8 image (3, H, W) -> (3, h, w), bilinear, antialiased where it shrinks.

    As in training, where data.resize_pair rounds otherwise: they are one grey level apart at most.
    """
    height, width = size
    if tuple(image.shape[1:]) == (height, width):
        return image
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


# ---------------------------------------------------------------- a model over a data set

def evaluate(model, dataset, size=None, quarter=False, progress=None, **options):
    """Confusion matrix (C, C) int64 of `model` over `dataset`; the model stays in its mode.

    size: (H, W) that images are resized to for the network, None for their own.
    quarter: score at the logits' size, against labels shrunk to it (nearest).
    progress(done, total) is called after each frame.
    options: window, stride, scales, flip of `segment`.
    Raises NotFinite for NaN logits.
    """
    confusion = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64)
    was_training = model.training
    model.eval()
    try:
        for i in range(len(dataset)):
            image, label = dataset[i]                             # (3, H, W), (H, W)
            if quarter:
                logits = network_logits(model, image, size)       # (1, C, h/4, w/4)
                classes = logits.argmax(1)[0].cpu()               # (h/4, w/4)
                label = shrink_label(label, classes.shape)        # (h/4, w/4)
            else:
                classes = segment(model, image, size, **options)  # (H, W)
            confusion += confusion_matrix(classes, label, model.num_classes)
            if progress:
                progress(i + 1, len(dataset))
    finally:
        model.train(was_training)
    return confusion


def shrink_label(label, size):
    """A label (H, W) at `size` (h, w), nearest neighbours."""
    height, width = size
    small = Image.fromarray(label.numpy()).resize((width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(small))


def agreement_with_fp32(model, dataset, size=None, **options):
    """Share of the pixels, void ones too, whose class is the same in fp32 as under autocast.

    To be called under the autocast in question.
    """
    device = next(model.parameters()).device
    same = 0
    pixels = 0
    for i in range(len(dataset)):
        image, label = dataset[i]
        half = segment(model, image, size, **options)             # (H, W)
        with torch.autocast(device.type, enabled=False):
            exact = segment(model, image, size, **options)        # (H, W)
        same += (half == exact).sum().item()
        pixels += label.numel()
    return same / pixels


# ---------------------------------------------------------------- the command

@dataclass
class Network:
    """A checkpoint on the command line, and how well it did."""
    path: str
    name: str                                                     # its column
    model: SegFormer
    result: dict = field(default_factory=dict)                    # see `score_network`


def score_network(network, dataset, args):
    """-> `scores` of a network and its "confusion"; with --amp also "same_class"."""
    model = network.model
    options = segment_options(args)
    progress = show_progress(network.name)
    result = {}
    try:
        confusion = evaluate(model, dataset, model.input_size, args.quarter, progress, **options)
        if args.amp != "off":
            agreement = agreement_with_fp32(model, dataset, model.input_size, **options)
            result["same_class"] = agreement
    except NotFinite as error:
        raise UsageError(f"{network.path}: {error}") from None
    return scores(confusion) | {"confusion": confusion.tolist()} | result


def print_scores(networks, dataset, args, stream):
    """What was scored and how, and on `stream` the table."""
    fold = "" if args.fold is None else f", {describe_fold(vars(args))}"
    resolution = "the labels' full resolution"
    if args.quarter:
        resolution = ("a quarter of the input, as the paper's code "
                      "(not comparable with full resolution)")
    print(f"\n{dataset.name} {args.split}{fold}, {len(dataset)} frames, "
          f"scored at {resolution}{describe_protocol(args)}")
    for network in networks:
        print(f"  {describe_network(network, args)}")
    columns = columns_of(networks, args)
    print(write_table(columns, dataset.classes, args.format, args.group), file=stream)


def columns_of(networks, args):
    """-> [Column] of the table: a network each, or with --group the seeds of a recipe each."""
    if not args.group:
        return [Column(network.name, [network.result]) for network in networks]
    folders = [Path(network.path).parent for network in networks]
    columns = []
    for group in group_runs(folders, args.names):
        results = [networks[i].result for i in group.members]
        columns.append(Column(group.name, results, group.seeds))
    return columns


def describe_network(network, args):
    """What a network saw: "student.pth: input 288x384 (HxW)"."""
    words = network.path if network.name == network.path else f"{network.name}: {network.path}"
    if network.model.input_size is None or args.window:
        words += ": input as it is"
    else:
        height, width = network.model.input_size
        words += f": input {height}x{width} (HxW)"
    if args.amp != "off":
        same = 100 * network.result["same_class"]
        words += f"; {same:.3f} % of the pixels have their class in fp32"
    return words


def write_json(networks, dataset, args):
    """--json: the scores and confusion matrices for machines."""
    checkpoints = []
    for network in networks:
        checkpoints.append({
            "path": network.path,
            "variant": network.model.variant,
            "input_size": network.model.input_size,
            **no_nan(network.result),
        })
    content = {
        "data": args.data, "split": args.split, "fold": args.fold, "folds": args.folds,
        "fold_by": args.fold_by,
        "frames": len(dataset), "classes": dataset.classes,
        "resolution": "quarter" if args.quarter else "full", "amp": args.amp,
        **segment_options(args),
        "checkpoints": checkpoints,
    }
    write_text(args.json, json.dumps(content, indent=1))


def no_nan(value):
    """nan -> None, also inside lists and dicts: JSON has no nan."""
    if isinstance(value, dict):
        return {key: no_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [no_nan(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def build_parser():
    parser = argparse.ArgumentParser(
        description="Score checkpoints side by side on a labelled data set.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT",
                        help="ours, Hugging Face's (file or folder), NVlabs' or TransKD's")
    parser.add_argument("--data", metavar="SPEC",
                        help="toy, camvid:DIR, cityscapes:DIR or folder:DIR "
                             "(default: what the checkpoints were trained on, and its folds)")
    parser.add_argument("--split", default="val", choices=SPLITS,
                        help="which frames to score (default: val)")
    add_fold_flags(parser, default_folds=None)
    parser.add_argument("--quarter", action="store_true",
                        help="score at a quarter of the input, as the paper's code does "
                             "(default: at the labels' resolution)")
    parser.add_argument("--names", nargs="+", metavar="NAME",
                        help="what table and pictures call the checkpoints (default: their paths)")
    parser.add_argument("--group", action="store_true",
                        help="seeds of one recipe are one column, mean +- standard deviation: told "
                             "by the runs' recipe.json, or by --names, one name for all seeds of a "
                             "recipe (default: a column for each checkpoint)")
    parser.add_argument("--format", choices=FORMATS, default="text",
                        help="how the table is written; the other lines go to stderr where it is "
                             "not text (default: text)")
    parser.add_argument("--json", metavar="FILE", type=output_path,
                        help="write the scores and confusion matrices for machines")
    parser.add_argument("--picture", metavar="FILE", type=picture_path,
                        help="draw four frames spread over the split: truth and predictions")
    parser.add_argument("--overlay", metavar="DIR",
                        help="draw frame, truth and predictions of every frame")
    parser.add_argument("--strip", metavar="FILE", type=picture_path,
                        help="draw the worst, the lower quartile's, the median and the best frame "
                             "by the last checkpoint's mIoU")
    parser.add_argument("--plot", metavar="DIR",
                        help="draw radar and confusion matrices, and the runs' losses and mIoU "
                             "where their logs are (needs matplotlib)")
    add_view_flags(parser)
    return parser


def check_flags(parser, args):
    """Refuse flags that contradict each other."""
    check_view_flags(parser, args)
    if args.quarter and (args.window or args.flip or args.scales != [1.0]):
        parser.error("--quarter is the paper's protocol, which has no windows, scales or flips")
    if args.names and len(args.names) != len(args.checkpoints):
        parser.error(f"--names: {len(args.names)} names for {len(args.checkpoints)} checkpoints")
    if args.names and len(set(args.names)) < len(args.names) and not args.group:
        parser.error("--names: two of them are the same (with --group they are one column)")


def smallest_frame(networks, args):
    """Pixels that the sides of a frame must have: the network's, where it sees frames as they
    are."""
    sizes = [network.model.input_size for network in networks]
    return SMALLEST if args.window or None in sizes else 1


def main():
    parser = build_parser()
    args = parser.parse_args()
    table_stream = sys.stdout
    everything_else = sys.stdout if args.format == "text" else sys.stderr
    with contextlib.redirect_stdout(everything_else):
        run(parser, args, table_stream)


def run(parser, args, table_stream):
    args.checkpoints = list(dict.fromkeys(args.checkpoints))      # given twice, it is one column
    check_flags(parser, args)
    keep_freed_memory()
    device = pick_device(args.device)
    networks = []
    for path, name in zip(args.checkpoints, args.names or args.checkpoints, strict=True):
        networks.append(Network(path, name, open_model(path, args.size, device)))
    choose_data(args, {network.path: network.model for network in networks})
    dataset = open_dataset(args.data, args.split, args.fold, args.folds, fold_by=args.fold_by)
    dataset.quick_check(smallest=smallest_frame(networks, args))
    if args.group:
        columns_of(networks, args)                                # what is wrong is said now
    for network in networks:
        check_classes(network.model, network.path, dataset)
        warn_of_leak(network.model, network.path, args)

    with autocast(device, args.amp):
        for network in networks:
            network.result = score_network(network, dataset, args)
        print_scores(networks, dataset, args, table_stream)
        if args.json:
            write_json(networks, dataset, args)
        if args.picture or args.overlay or args.strip or args.plot:
            # Here, since it imports this file.
            from extras.comparison import draw_what_is_asked

            draw_what_is_asked(networks, dataset, args)


if __name__ == "__main__":
    run_command(main)
