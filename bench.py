"""Speed and memory on your device: the paper's Table 2, and our speed beside transformers'.

    python bench.py                           # model: Table 2's columns, as trained and folded
    python bench.py scaling                   # the cost of a pixel from 256x256 to 1024x2048
    python bench.py peer                      # the same weights in Hugging Face transformers
    python bench.py step                      # a distillation step B2 -> B0, against transformers
    python bench.py losses                    # each loss against its plain version
    python bench.py teacher                   # what a teacher costs a step, asked or kept
    python bench.py data [--data camvid:DIR]  # reading frames, decoded each time or from the cache
    python bench.py runtimes                  # PyTorch, ONNX Runtime, OpenVINO; fp32, bf16, int8
    python bench.py student.pth --size 512 1024         # one network, or one .onnx file, here
    python bench.py model peer step --compile --json bench.json

The first two stand here, the others in extras/bench_transformers.py, bench_teacher.py,
bench_losses.py, bench_data.py, bench_runtimes.py and bench_file.py. What is compared takes turns,
each in a process of its own and in the same setting on both sides: look at the ratios, and at how
far they spread over the rounds (extras/measure.py).
"""

if __name__ == "__main__":
    # Before torch, whose import takes seconds in which a Ctrl-C may come.
    from extras import quiet_start
    quiet_start.begin()

import argparse
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from extras.cli import number, run_command
from extras.machine import AMP_DTYPES, device_name, pick_device
from extras.measure import (
    CLOCKS,
    Candidate,
    Options,
    compile_forward,
    mib,
    print_compile_times,
    print_row,
    run_in_turns,
)
from extras.outputs import output_path, write_text
from extras.roofline import count_macs
from model import NORMS, SIZES, SMALLEST, segformer

TABLE_2 = (                                                       # network, variant, norm
    ("SegFormer-B2", "b2", "ln"),
    ("SegFormer-B0", "b0", "ln"),
    ("+ Tanh", "b0", "dyt"),
    ("+ Tanh + Linear", "b0", "dyt-dyl"),
)
SCALES = ((256, 256), (256, 512), (512, 512), (512, 1024), (1024, 1024), (1024, 2048))
PAPER_SIZE = (512, 1024)


# ---------------------------------------------------------------- model: the paper's Table 2

def make_forward(options, variant, norm, folded):
    """-> a function that runs one forward of a network with fresh weights"""
    torch.manual_seed(0)
    model = segformer(variant, options.classes, NORMS[norm]).eval()
    if folded:
        model = model.fold()
    model = model.to(options.device)
    forward = compile_forward(model, options.device) if options.compile else model
    images = torch.rand(options.batch, 3, *options.size, device=options.device)

    @torch.inference_mode()
    def run():
        with options.autocast():
            return forward(images)
    return run


class NetworkMacs(NamedTuple):
    """Of one image, as the paper counts: without the attention products, which come on top."""
    run: int            # of our folded network
    published: int      # with the published decoder, for the same outputs
    attention: int      # the products Q K^T and A V, in both


def network_macs(options, variant, norm):
    """-> NetworkMacs of one image of options.size"""
    cpu = torch.device("cpu")
    alone = replace(options, batch=1, device=cpu, dtype=torch.float32, compile=False)
    # Folded, stage i's matrix F_i L_i (D x C_i) costs what the published L_i does; the published
    # decoder has the 1x1 convolution over 4D channels on top.
    macs = count_macs(make_forward(alone, variant, norm, folded=True))
    H, W = options.size
    quarter = math.ceil(H / 4) * math.ceil(W / 4)                 # pixels of the logits
    width = SIZES[variant]["width"]
    convolution = quarter * 4 * width * width                     # 1x1, 4D -> D
    return NetworkMacs(macs.dense, macs.dense + convolution, macs.attention)


def bench_model(options):
    """The paper's Table 2 columns. -> rows"""
    candidates = {}
    for network, variant, norm in TABLE_2:
        for folded in (False, True):
            make = partial(make_forward, options, variant, norm, folded)
            candidates[network, folded] = Candidate(make)
    timings = run_in_turns(candidates, options.rounds, options.device)

    print(f"\nG MACs of one image and {options.classes} classes, without attention products (Q K^T "
          "and A V): these come on top,\nin a column of their own")
    widths = (17, 12, 18, 8, 13, 9, 9, 10, 8)
    print_row(("network", "parameters", "G MACs published", "as run", "+ attention",
               "FPS", "folded", "peak MiB", "folded"), widths)
    rows = []
    for network, variant, norm in TABLE_2:
        row = network_row(options, variant, norm, timings[network, False], timings[network, True])
        rows.append({"network": network, **row})
        print_row((network,
                   f"{row['parameters']:,}",
                   f"{row['macs_published'] / 1e9:.2f}",
                   f"{row['macs_run'] / 1e9:.2f}",
                   f"+{row['macs_attention'] / 1e9:.2f}",
                   f"{row['fps']:.2f}",
                   f"{row['fps_folded']:.2f}",
                   mib(row["peak_bytes"]),
                   mib(row["peak_bytes_folded"])), widths)
    if options.compile:
        print_compile_times(timings.values())
    return rows


def network_row(options, variant, norm, plain, folded):
    """The numbers of one network, from its Timings as trained and folded."""
    model = segformer(variant, options.classes, NORMS[norm])
    macs = network_macs(options, variant, norm)
    return {
        "classes": options.classes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs_published": macs.published,
        "macs_run": macs.run,
        "macs_attention": macs.attention,
        "fps": options.batch / plain.seconds,
        "fps_folded": options.batch / folded.seconds,
        "peak_bytes": plain.peak,
        "peak_bytes_folded": folded.peak,
        "first_run_seconds": plain.first,
        "first_run_seconds_folded": folded.first,
        "round_seconds": plain.rounds,
        "round_seconds_folded": folded.rounds,
    }


# ---------------------------------------------------------------- scaling: the cost of a pixel

def make_attention(options, variant, stages):
    """The attention of some stages' blocks alone, on random tokens -> the function that runs it"""
    torch.manual_seed(0)
    model = segformer(variant, options.classes).fold().to(options.device)
    H, W = options.size
    work = []
    for i in stages:
        stride = 4 * 2 ** i
        rows = math.ceil(H / stride)
        columns = math.ceil(W / stride)
        shape = (options.batch, rows, columns, SIZES[variant]["dims"][i])
        for block in model.stages[i].blocks:
            work.append((block.attn, torch.rand(shape, device=options.device)))

    @torch.inference_mode()
    def run():
        with options.autocast():
            for attention, tokens in work:
                attention(tokens)
    return run


def bench_scaling(options):
    """B0's forward by image size, its attention apart, which grows with the square. -> rows"""
    candidates = {}
    for size in SCALES:
        scaled = replace(options, size=size)
        candidates[size, "whole"] = Candidate(partial(make_forward, scaled, "b0", "ln", True))
        candidates[size, "first"] = Candidate(partial(make_attention, scaled, "b0", [0]))
        candidates[size, "others"] = Candidate(partial(make_attention, scaled, "b0", [1, 2, 3]))
    timings = run_in_turns(candidates, options.rounds, options.device)

    rows = []
    for size in SCALES:
        pixels = options.batch * size[0] * size[1]
        whole = timings[size, "whole"]
        first = 1e9 * timings[size, "first"].seconds / pixels
        others = 1e9 * timings[size, "others"].seconds / pixels
        ns_per_pixel = 1e9 * whole.seconds / pixels
        rows.append({"size": size, "seconds": whole.seconds, "ns_a_pixel": ns_per_pixel,
                     "attention_1_ns": first, "attention_2_to_4_ns": others,
                     "rest_ns": ns_per_pixel - first - others,
                     "peak_bytes": whole.peak, "round_seconds": whole.rounds})
    reference = rows[SCALES.index(PAPER_SIZE)]["rest_ns"]
    for row in rows:
        row["rest_to_512x1024"] = row["rest_ns"] / reference
    print_scaling(rows)
    return rows


def print_scaling(rows):
    print("\nB0 forward: milliseconds, and nanoseconds per pixel, whole and in its parts")
    widths = (12, 9, 14, 22, 15, 10, 13, 10)
    print_row(("size", "ms", "ns per pixel", "attention of stage 1", "of stages 2-4", "the rest",
               "to 512x1024", "peak MiB"), widths)
    for row in rows:
        H, W = row["size"]
        print_row((f"{H}x{W}",
                   f"{1e3 * row['seconds']:.1f}",
                   f"{row['ns_a_pixel']:.0f}",
                   f"{row['attention_1_ns']:.0f}",
                   f"{row['attention_2_to_4_ns']:.0f}",
                   f"{row['rest_ns']:.0f}",
                   f"{row['rest_to_512x1024']:.2f}",
                   mib(row["peak_bytes"])), widths)


# ---------------------------------------------------------------- the command

SUBJECTS = ("model", "scaling", "peer", "step", "teacher", "losses", "data", "runtimes")


def run_subject(name, options):
    """Measure one of SUBJECTS, or a file; what it needs is imported only now. -> rows"""
    if name == "model":
        return bench_model(options)
    if name == "scaling":
        return bench_scaling(options)
    if name == "peer":
        from extras.bench_transformers import bench_peer
        return bench_peer(options)
    if name == "step":
        from extras.bench_transformers import bench_step
        return bench_step(options)
    if name == "teacher":
        from extras.bench_teacher import bench_teacher
        return bench_teacher(options)
    if name == "losses":
        from extras.bench_losses import bench_losses
        return bench_losses(options)
    if name == "data":
        from extras.bench_data import bench_data
        return bench_data(options)
    if name == "runtimes":
        from extras.bench_runtimes import bench_runtimes
        return bench_runtimes(options)
    from extras.bench_file import bench_file
    return bench_file(name, options)


def build_parser():
    parser = argparse.ArgumentParser(description="Parameters, MACs, speed, memory on this device.")
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT",
                        help=f"{', '.join(SUBJECTS)} (default: model); or a checkpoint or .onnx "
                             "file: its own speed, or with runtimes the weights for that")
    parser.add_argument("--size", type=number(int, SMALLEST), nargs=2, metavar=("H", "W"),
                        help="default 512 1024, the paper's; of a file, what it was made for")
    parser.add_argument("--classes", type=number(int, 1), default=19,
                        help="outputs of the networks (default 19, Cityscapes'; CamVid has 11)")
    parser.add_argument("--batch", type=number(int, 1), default=1,
                        help="images per forward (default 1); step, teacher and losses take two at "
                             "least")
    parser.add_argument("--rounds", type=number(int, 1), default=9,
                        help="timed rounds (default 9); for step and teacher a third of them")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", *AMP_DTYPES),
                        help="fp32, or autocast to 16 bits")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile, on CUDA with CUDA graphs: in place of eager for model "
                             "and scaling, beside it for peer and step; not for teacher, losses "
                             "and data")
    parser.add_argument("--data", metavar="SPEC",
                        help="what the subject data reads: camvid:DIR, cityscapes:DIR or "
                             "folder:DIR (default: drawn frames, written as .png); what runtimes "
                             "calibrates on (train) and scores (val)")
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS),
                        help="runtimes and files: the time of the wall, or of the CPU, which a "
                             "machine that others use too disturbs less (default: wall)")
    parser.add_argument("--json", metavar="FILE", type=output_path,
                        help="write the numbers for machines")
    return parser


def split_subjects(parser, words):
    """The words of the command -> (what to measure, the checkpoint for `runtimes` or None)."""
    files = [word for word in words if word not in SUBJECTS]
    for path in files:
        if not Path(path).exists():
            parser.error(f"unknown subject {path!r}: choose from {', '.join(SUBJECTS)}, "
                         "or name a file that is there")
    if "runtimes" not in words or not files:
        return words or ["model"], None
    if len(files) > 1 or files[0].lower().endswith(".onnx"):
        parser.error("runtimes takes one checkpoint: it exports both sides itself")
    return [word for word in words if word in SUBJECTS], files[0]


def main():
    parser = build_parser()
    args = parser.parse_args()
    names, checkpoint = split_subjects(parser, args.subjects)
    subjects = [name for name in names if name in SUBJECTS]       # the others are files
    by_wall_clock = [name for name in subjects if name != "runtimes"]
    if args.clock != "wall" and by_wall_clock:
        parser.error(f"--clock cpu is for runtimes and files, not for "
                     f"{', '.join(sorted(by_wall_clock))}")
    options = Options(
        size=tuple(args.size or PAPER_SIZE),
        batch=args.batch,
        rounds=args.rounds,
        device=pick_device(args.device),
        dtype=AMP_DTYPES.get(args.dtype, torch.float32),
        classes=args.classes,
        compile=args.compile,
        data=args.data,
        checkpoint=checkpoint,
        size_given=args.size is not None,
        clock=args.clock,
    )
    device = options.device
    has_own_size = checkpoint is not None or not subjects         # what is measured is a file
    if has_own_size:
        shape = ""
    else:
        args.size = list(options.size)                            # for --json
        H, W = options.size
        shape = f"{H}x{W}, {args.classes} classes, logits at a quarter, "
    print(f"{device_name(device)}, torch {torch.__version__}, {args.dtype}, batch {args.batch}, "
          f"{shape}median of {args.rounds} rounds", flush=True)

    results = {}
    for name in names:
        results[name] = run_subject(name, options)
        if args.json:
            # after each: what is measured is not lost if the next one fails
            content = {**vars(args), "device": device_name(device), "torch": torch.__version__,
                       "results": results}
            write_text(args.json, json.dumps(content, indent=1))


if __name__ == "__main__":
    run_command(main)
