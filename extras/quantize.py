"""A network's weights in 8 or 4 bits: a smaller file, that loads as any other checkpoint.

    python -m extras.quantize student.pth --bits 8 --out small.pth
    python -m extras.quantize student.pth --bits 4+8 --out small.pth                # see below
    python -m extras.quantize student.pth --bits 4 --out small.pth --data camvid:DIR
                                                                    # and what it costs
    python -m extras.quantize student.pth --bits 4 --layers --data camvid:DIR
                                                                    # which layers are sensitive

8 and 4 are the bits of the weights; 4+8 has weights in 4 bits, and rounds what goes into the linear
layers to 8 bits as well. How, and which layers: extras/packed_layers.py. The file is opened by
everything that opens a checkpoint here; it is for inference, and cannot be trained.

It saves bytes, not time: weights are unpacked whenever they are used, and the decoder cannot take
its short cut (Decoder in model.py), so a forward takes longer. For time see extras/export.py.

With --data the network is scored before and after, and timed. --layers packs one kind of layer at
a time, and prints how far that alone moves the logits: what is sensitive can be left alone with
--keep.
"""

import argparse
import copy
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data import SPLITS, open_dataset
from eval import evaluate, network_logits, scores
from extras.cli import UsageError, add_fold_flags, run_command, show_progress
from extras.comparison import spread_indices
from extras.machine import keep_freed_memory, pick_device
from extras.outputs import output_path, refuse_same_file, temporary_folder, write_text
from extras.packed_layers import FORMAT, count_bits, pack, packable_layers, save_packed
from extras.provenance import check_classes, refuse_prompts, warn_of_leak
from extras.score_table import percent
from model import load_checkpoint, read_checkpoint, save_checkpoint

TIMED_FRAMES = 10
COMPARED_FRAMES = 8


@dataclass(frozen=True)
class Mode:
    """A way to pack a network: the bits of its weights, and of what goes into its layers."""
    name: str
    weight_bits: int
    activation_bits: int | None


MODES = {mode.name: mode for mode in (Mode("8", 8, None), Mode("4", 4, None), Mode("4+8", 4, 8))}


def packed_copy(model, mode, keep=()):
    """-> (a copy of an unfolded SegFormer with packed layers, for inference; its layers' bits)."""
    small = copy.deepcopy(model).eval()
    layer_bits = pack(small, mode.weight_bits, keep, mode.activation_bits)
    small.folded = True
    return small.requires_grad_(False), layer_bits


# ---------------------------------------------------------------- sizes

def bytes_of_checkpoint(model, half):
    """Bytes on the disk of a model's checkpoint, in fp32 or fp16."""
    with temporary_folder() as folder:
        path = os.path.join(folder, "model.pth")
        save_checkpoint(model, path, half=half)
        return os.path.getsize(path)


def measure_size(model, small, path):
    """-> {"fp32", "fp16", "bytes": of the files on the disk; "bits": a packed weight; "weights"}"""
    bits, weights = count_bits(small)
    return {
        "fp32": bytes_of_checkpoint(model, half=False),
        "fp16": bytes_of_checkpoint(model, half=True),
        "bytes": os.path.getsize(path),
        "bits": bits / max(weights, 1),
        "weights": weights,
    }


def describe_size(sizes, path):
    """How large the packed file is, beside those in fp32 and fp16."""
    return (f"{path}: {sizes['bytes'] / 1e6:.2f} MB on the disk; in fp32 it is "
            f"{sizes['fp32'] / 1e6:.2f}, in fp16 {sizes['fp16'] / 1e6:.2f} MB: "
            f"{sizes['fp16'] / sizes['bytes']:.2f} times smaller than that; "
            f"{sizes['bits']:.2f} bits for each of {sizes['weights']:,} packed weights")


def describe_layers(model, layer_bits, keep):
    """How many layers got how many bits, and which were left."""
    counts = {8: 0, 4: 0}
    for bits in layer_bits.values():
        counts[bits] += 1
    words = f"{counts[4]} layers in 4 bits, {counts[8]} in 8"
    kept = [name for name in packable_layers(model) if name not in layer_bits]
    if kept:
        words += f", {len(kept)} left as they are (--keep {' '.join(keep)})"
    return words


# ---------------------------------------------------------------- what it costs

def score(model, dataset, name):
    """-> mIoU, a fraction."""
    confusion = evaluate(model, dataset, model.input_size, progress=show_progress(name))
    return scores(confusion)["miou"]


def milliseconds(model, dataset):
    """The median time of a forward of one frame, the first not counted."""
    taken = []
    for i in spread_indices(len(dataset), TIMED_FRAMES + 1):
        image, _ = dataset[i]
        began = time.perf_counter()
        network_logits(model, image, model.input_size)
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken[1:] or taken)


def describe_drop(before, after):
    """Two mIoUs -> both, and the drop in points and as a share of the first."""
    share = f"{100 * (before - after) / before:.2f} % of it" if before > 0 else "no share: it was 0"
    return (f"mIoU {percent(before)} before, {percent(after)} after: "
            f"a drop of {percent(before - after)} points, {share}")


def report_cost(model, small, dataset, device):
    """--data: print the scores before and after, and the times. -> them, by name"""
    fast = model.fold().to(device)
    small = small.to(device)
    before = score(fast, dataset, "before")
    after = score(small, dataset, "after")
    print(f"{dataset.name}, {len(dataset)} frames: {describe_drop(before, after)}")
    ms_before = milliseconds(fast, dataset)
    ms_after = milliseconds(small, dataset)
    threads = torch.get_num_threads()
    print(f"{ms_before:.0f} ms a frame before (folded), {ms_after:.0f} after; medians of "
          f"{TIMED_FRAMES} on {device}, {threads} threads, batch 1: for an idea, whatever else "
          f"ran beside it")
    return {"data": dataset.name, "frames": len(dataset), "miou_before": before,
            "miou_after": after, "ms_before": ms_before, "ms_after": ms_after,
            "device": str(device), "threads": threads}


# ---------------------------------------------------------------- which layers matter

def kind_of(name):
    """"stages.2.blocks.1.mlp.fc1" -> "stages.2.mlp.fc1": the same layer of all blocks is a kind."""
    parts = name.split(".")
    if "blocks" in parts:
        at = parts.index("blocks")
        parts = parts[:at] + parts[at + 2:]
    return ".".join(parts)


def kinds_of_layers(model):
    """-> {kind: [names of its layers]}"""
    kinds = {}
    for name in packable_layers(model):
        kinds.setdefault(kind_of(name), []).append(name)
    return kinds


def logits_of(model, dataset, indices):
    maps = [network_logits(model, dataset[i][0], model.input_size) for i in indices]
    return torch.cat([logits.flatten() for logits in maps])


def sensitivities(model, mode, dataset):
    """Each kind of layer packed alone -> [(change, weights, kind)], the largest change first.

    change: |logits after - before| / |before|, root mean square over some frames.
    """
    model = model.eval()
    indices = spread_indices(len(dataset), COMPARED_FRAMES)
    before = logits_of(model, dataset, indices)
    every_layer = packable_layers(model)
    rows = []
    for kind, names in kinds_of_layers(model).items():
        others = [name for name in every_layer if name not in names]
        small, _ = packed_copy(model, mode, keep=others)
        after = logits_of(small, dataset, indices)
        change = (after - before).norm() / before.norm()
        weights = sum(every_layer[name].weight.numel() for name in names)
        rows.append((change.item(), weights, kind))
    return sorted(rows, reverse=True)


def print_sensitivities(rows, mode):
    print(f"change of the logits when one kind of layer alone is packed, --bits {mode.name}, "
          f"{COMPARED_FRAMES} frames:")
    for change, weights, kind in rows:
        print(f"  {100 * change:7.2f} %  {weights:9,} weights  {kind}")


# ---------------------------------------------------------------- the command

def open_whole(path):
    """-> the SegFormer of a checkpoint that is not packed yet. Raises UsageError."""
    if Path(path).is_file() and read_checkpoint(path).get("format") == FORMAT:
        raise UsageError(f"{path} is packed already: give the checkpoint that it was made of")
    refuse_prompts(path, "python -m extras.prompt quantize packs the whole of it")
    return load_checkpoint(path)


def check_keep(model, keep):
    """Each name in --keep must be a layer's, or begin the names of some."""
    names = list(packable_layers(model))
    for kept in keep:
        if not any(name == kept or name.startswith(f"{kept}.") for name in names):
            raise UsageError(f"--keep {kept}: no layer has this name or begins with it; "
                             f"the first are {', '.join(names[:3])}")


def build_parser():
    parser = argparse.ArgumentParser(
        prog="python -m extras.quantize",
        description="Write a network with its weights in 8 or 4 bits.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="ours, Hugging Face's (file or folder), NVlabs' or TransKD's")
    parser.add_argument("--bits", required=True, choices=MODES,
                        help="of the weights; 4+8: and 8 for what goes into linear layers")
    parser.add_argument("--out", metavar="FILE", type=output_path,
                        help="the checkpoint to write, FILE.pth")
    parser.add_argument("--keep", nargs="+", default=[], metavar="NAME",
                        help="leave these layers, and all below these names, as they are")
    parser.add_argument("--layers", action="store_true",
                        help="print how far each kind of layer moves the logits (needs --data)")
    parser.add_argument("--data", metavar="SPEC",
                        help="score and time before and after on this: toy, camvid:DIR, "
                             "cityscapes:DIR or folder:DIR (default: neither)")
    parser.add_argument("--split", default="val", choices=SPLITS,
                        help="which frames of --data (default: val)")
    add_fold_flags(parser)
    parser.add_argument("--json", metavar="FILE", type=output_path,
                        help="write sizes and scores for machines")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    return parser


def check_flags(parser, args):
    if args.out is None and not args.layers:
        parser.error("give --out FILE to write the network, or --layers to look at it")
    if args.layers and args.data is None:
        parser.error("--layers needs --data: it compares what the network says about frames")
    if args.out and Path(args.out).suffix.lower() != ".pth":
        parser.error(f"--out {args.out}: a checkpoint's name ends in .pth")
    if args.out:
        refuse_same_file(args.checkpoint, args.out)


def main():
    parser = build_parser()
    args = parser.parse_args()
    check_flags(parser, args)
    keep_freed_memory()
    device = pick_device(args.device)
    mode = MODES[args.bits]
    model = open_whole(args.checkpoint)
    check_keep(model, args.keep)
    dataset = None
    if args.data:
        dataset = open_dataset(args.data, args.split, args.fold, args.folds, fold_by=args.fold_by)
        check_classes(model, args.checkpoint, dataset)
        warn_of_leak(model, args.checkpoint, args)

    report = {"variant": model.variant, "mode": mode.name}
    if args.layers:
        report["layers"] = sensitivities(model.to(device), mode, dataset)
        print_sensitivities(report["layers"], mode)
    if args.out:
        small, layer_bits = packed_copy(model.cpu(), mode, args.keep)
        save_packed(small, layer_bits, args.out, mode.activation_bits)
        report["sizes"] = measure_size(model, small, args.out)
        print(describe_size(report["sizes"], args.out))
        print(describe_layers(model, layer_bits, args.keep))
        if dataset is not None:
            small = load_checkpoint(args.out)                     # what is scored is the file
            report["cost"] = report_cost(model, small, dataset, device)
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
