"""How sure is a difference between two networks, seen from the frames that they were scored on?

    python -m extras.bootstrap A.pth B.pth --data camvid:DIR --split test [--keep frames.npz]

Prints each network's mIoU of every drive, and the difference of the others to the first with a 95 %
interval: the test set is drawn again, with replacement, and both networks are scored on the same
draw, 2,000 times. Frames of a video are near-duplicates of their neighbours, so what is drawn is
not a frame but a block of consecutive ones of one drive.

The interval says how much the difference depends on the frames. It does not say how much it depends
on the seed of the training: that is what several seeds are for.

--keep writes every frame's confusion matrix: frames (N,), and for each network (N, C, C).

References
  Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 (blocks) and 13
"""

import argparse

import numpy as np
import torch

from data import SPLITS, find_drives, open_dataset
from eval import confusion_matrix, scores, segment
from extras.cli import NotFinite, UsageError, add_fold_flags, number, run_command, show_progress
from extras.machine import keep_freed_memory, pick_device
from extras.outputs import output_file, output_path
from extras.provenance import check_classes, choose_data, warn_of_leak
from extras.view_flags import open_model
from model import SMALLEST


def frame_confusions(model, dataset, progress=None):
    """-> the confusion matrix of every frame, int64 (N, C, C)."""
    confusions = []
    for i in range(len(dataset)):
        image, label = dataset[i]
        classes = segment(model, image, model.input_size)
        confusions.append(confusion_matrix(classes, label, model.num_classes))
        if progress:
            progress(i + 1, len(dataset))
    return torch.stack(confusions).numpy()


def blocks_of(stems, length):
    """-> [indices of at most `length` consecutive frames of one drive]"""
    index_of = {stem: i for i, stem in enumerate(stems)}
    in_order = sorted(stems)
    drives = find_drives(in_order) or {"all": in_order}
    blocks = []
    for names in drives.values():
        frames = [index_of[name] for name in names]
        for start in range(0, len(frames), length):
            blocks.append(frames[start:start + length])
    return blocks


def bootstrap(confusions, others, blocks, draws, seed=0):
    """Differences in mIoU, others - confusions, on `draws` test sets of blocks drawn again.

    Two (N, C, C), [indices] -> (draws,)
    """
    def sum_of_blocks(frames):
        return torch.from_numpy(np.stack([frames[block].sum(0) for block in blocks]))

    first = sum_of_blocks(confusions)                             # (blocks, C, C)
    second = sum_of_blocks(others)                                # (blocks, C, C)
    rng = np.random.default_rng(seed)
    differences = np.empty(draws)
    for draw in range(draws):
        chosen = torch.from_numpy(rng.integers(len(blocks), size=len(blocks)))
        before = scores(first[chosen].sum(0))["miou"]
        after = scores(second[chosen].sum(0))["miou"]
        differences[draw] = after - before
    return differences


# ---------------------------------------------------------------- the command

def print_drives(names, confusions, stems):
    """Each network's mIoU of every drive, in percent."""
    drives = find_drives(sorted(stems))
    if not drives:
        print("the frames' names tell no drives")
        return
    heads = [f"{name[-20:]:>22}" for name in names]
    print(f"{'drive':<16}{'frames':>8}", *heads, sep="")
    for drive, its_stems in drives.items():
        frames = [stems.index(stem) for stem in its_stems]
        line = f"{drive:<16}{len(frames):>8}"
        for name in names:
            confusion = confusions[name][frames].sum(0)           # (C, C)
            miou = scores(torch.from_numpy(confusion))["miou"]
            line += f"{100 * miou:>22.2f}"
        print(line)


def print_differences(names, confusions, stems, args):
    blocks = blocks_of(stems, args.block)
    print(f"{args.draws} draws of {len(blocks)} blocks of at most {args.block} frames")
    first, *others = names
    whole = {name: scores(torch.from_numpy(confusions[name].sum(0)))["miou"] for name in names}
    print(f"{first}: mIoU {100 * whole[first]:.2f}")
    for name in others:
        draws = bootstrap(confusions[first], confusions[name], blocks, args.draws)
        low, high = np.percentile(draws, (2.5, 97.5))
        difference = whole[name] - whole[first]
        print(f"{name}: mIoU {100 * whole[name]:.2f}, {100 * difference:+.2f} to the first, "
              f"95 % interval {100 * low:+.2f} to {100 * high:+.2f}")


def build_parser():
    parser = argparse.ArgumentParser(
        prog="python -m extras.bootstrap",
        description="How sure is a difference between networks, seen from the test frames.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--data", metavar="SPEC", help="toy, camvid:DIR, cityscapes:DIR or "
                        "folder:DIR (default: what the checkpoints were trained on)")
    parser.add_argument("--split", default="val", choices=SPLITS)
    add_fold_flags(parser, default_folds=None)
    parser.add_argument("--block", type=number(int, 1), default=15, metavar="N",
                        help="consecutive frames that are drawn together (default: 15)")
    parser.add_argument("--draws", type=number(int, 100), default=2000, metavar="N",
                        help="test sets that are drawn (default: 2000)")
    parser.add_argument("--keep", metavar="FILE", type=output_path,
                        help="write every frame's confusion matrices")
    parser.add_argument("--device", default="auto")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    names = list(dict.fromkeys(args.checkpoints))
    if len(names) < 2:
        raise UsageError("bootstrap compares checkpoints: give two at least")
    keep_freed_memory()
    device = pick_device(args.device)
    models = {name: open_model(name, None, device) for name in names}
    choose_data(args, models)
    dataset = open_dataset(args.data, args.split, args.fold, args.folds, fold_by=args.fold_by)
    sizes = [model.input_size for model in models.values()]
    dataset.quick_check(smallest=SMALLEST if None in sizes else 1)
    confusions = {}
    for name, model in models.items():
        check_classes(model, name, dataset)
        warn_of_leak(model, name, args)
        try:
            confusions[name] = frame_confusions(model, dataset, show_progress(name))
        except NotFinite as error:
            raise UsageError(f"{name}: {error}") from None

    print(f"{dataset.name} {args.split}, {len(dataset)} frames, full resolution")
    print_drives(names, confusions, dataset.stems)
    print_differences(names, confusions, dataset.stems, args)
    if args.keep:
        with output_file(args.keep) as file:
            np.savez_compressed(file, frames=np.array(dataset.stems), **confusions)
        print(f"every frame's confusion matrices: {args.keep}")


if __name__ == "__main__":
    run_command(main)
