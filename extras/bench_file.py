"""The speed of one network or one file on this device: median and 95th percentile.

    python bench.py student.pth --size 512 1024     # a checkpoint: PyTorch, folded, as --dtype says
    python bench.py student.onnx                    # a file: each runtime that is installed
    python bench.py student.onnx --clock cpu        # on a machine that others use too

Without --size a checkpoint runs at the size that it was trained at, and a file of one size at that.
"""

import contextlib
import io
from functools import partial

import torch

from extras.bench_runtimes import describe_clock, eager_run, open_openvino, settings_here
from extras.cli import UsageError
from extras.measure import Candidate, compile_forward, mib, print_row, run_in_turns
from extras.onnx_graph import open_session, runner_of
from model import load_checkpoint

RUNS_A_ROUND = 10                           # a percentile wants more runs than a median


def bench_file(path, options):
    """The speed of one checkpoint or .onnx file here. -> rows"""
    if path.lower().endswith(".onnx"):
        candidates, size = onnx_candidates(path, options)
    else:
        candidates, size = checkpoint_candidates(path, options)
    runs = RUNS_A_ROUND * options.rounds
    timings = run_in_turns(candidates, runs, options.device)
    height, width = size
    widths = (30, 12, 19, 12, 12)
    print(f"\n{path}, {runs} runs, {describe_clock(options)}")
    print_row((f"{height}x{width}, batch {options.batch}", "median ms", "95th percentile", "FPS",
               "peak MiB"), widths)
    rows = []
    for title, timing in timings.items():
        slow = percentile_95(timing.rounds)
        rows.append({"setting": title, "size": size, **timing.as_row(),
                     "percentile_95_seconds": slow})
        print_row((title,
                   f"{1e3 * timing.seconds:.1f}",
                   f"{1e3 * slow:.1f}",
                   f"{options.batch / timing.seconds:.1f}",
                   mib(timing.peak)), widths)
    return rows


def percentile_95(seconds):
    """The smallest of the values that 95 % of them do not exceed."""
    ordered = sorted(seconds)
    return ordered[-(-95 * len(ordered) // 100) - 1]


def checkpoint_candidates(path, options):
    """-> ({title: Candidate}, (H, W)): the folded network in PyTorch, as --dtype says"""
    model = load_checkpoint(path)
    size = options.size if options.size_given else model.input_size or options.size
    dtype = str(options.dtype).removeprefix("torch.")
    title = f"PyTorch, {dtype}, folded"
    make = partial(make_checkpoint, path, options, tuple(size))
    return {title: Candidate(make, clock=options.clock)}, tuple(size)


def make_checkpoint(path, options, size):
    with contextlib.redirect_stdout(io.StringIO()):               # it was said by the main process
        network = load_checkpoint(path).fold().to(options.device)
    if options.compile:
        network = compile_forward(network, options.device)
    run = eager_run(network, options.device, options.dtype, options.dtype != torch.float32)
    images = torch.rand(options.batch, 3, *size, device=options.device)
    return partial(run, images)


def onnx_candidates(path, options):
    """-> ({title: Candidate}, (H, W)): the file in each runtime that is here"""
    if options.device.type != "cpu" or options.compile or options.dtype != torch.float32:
        raise UsageError(f"{path} is measured on the CPU, in the precisions of each runtime: "
                         "add --device cpu, leave --dtype and --compile out")
    settings = [setting for setting in settings_here()
                if setting.runtime != "PyTorch" and not setting.int8]
    if not settings:
        raise UsageError(f"{path}: no runtime is here to run it; pip install onnxruntime openvino")
    size = size_of_onnx(path, options)
    candidates = {}
    for setting in settings:
        opened = partial(open_onnx_in, path, setting)
        title = setting.title
        if setting.runtime == "ONNX Runtime":                     # runs what the file says
            title = setting.runtime
        make = partial(make_batch, opened, options.batch, size)
        candidates[title] = Candidate(make, clock=options.clock)
    return candidates, size


def open_onnx_in(path, setting):
    if setting.runtime == "OpenVINO":
        return open_openvino(path, setting.dtype)
    return runner_of(open_session(path))


def make_batch(opened, batch, size):
    run = opened()
    return partial(run, torch.rand(batch, 3, *size))


def size_of_onnx(path, options):
    """-> the (H, W) to run a file at. Raises UsageError for a file that takes no such images."""
    try:
        session = open_session(path)
    except Exception as error:                                    # onnxruntime has many
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(f"{path} is not an ONNX file that can be run: {reason}") from None
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
        raise UsageError(f"{path} does not take one batch of float images (B, 3, H, W)")
    batch, _, height, width = inputs[0].shape
    if isinstance(batch, int) and batch != options.batch:
        raise UsageError(f"{path} takes {batch} image at a time: leave --batch out")
    if not isinstance(height, int) or not isinstance(width, int):
        return options.size
    if options.size_given and options.size != (height, width):
        raise UsageError(f"{path} takes images of {height}x{width} only: leave --size out")
    return height, width
