"""A trained network as one file: for another runtime, or as a checkpoint to send around.

    python -m extras.export student.pth student.onnx            # onnx, onnxscript and onnxruntime
    python -m extras.export student.pth student.pt2 --logits    # torch alone
    python -m extras.export student.pth small.pth --half        # our checkpoint, in 16 bits

.onnx and .pt2 run without this project; torch.export.load("student.pt2").module() opens the latter.
They hold the folded network with its normalisation: input `images`, float RGB (B, 3, H, W) in
[0, 1], any batch and any size from 64 pixels; output `classes`, uint8 (B, H, W), or with --logits
`logits`, (B, C, ceil(H/4), ceil(W/4)). The names of the classes and their colours travel in it too
(ONNX: metadata; .pt2: the extra file effiseg.json). Each file is run against the model on random
images, and is not kept if it disagrees.

.pth is this project's own checkpoint, whatever format the given one had, without a run's state.
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from extras.cli import UsageError, run_command
from model import load_checkpoint, save_checkpoint

SMALLEST_EXPORTED = 64                                            # pixels: no map is one pixel wide
CHECKED_SIZES = ((1, 64, 96), (2, 150, 203))                      # (B, H, W) of the random images
LOGITS_TOLERANCE = 1e-4                                           # largest absolute difference
CLASSES_TOLERANCE = 1e-3                                          # largest share of other pixels


class ExportError(UsageError):
    """The file cannot be made, or does not do what the model does; the message is one sentence."""


class Deployed(nn.Module):
    """What runs on the device: images -> classes, or logits."""

    def __init__(self, model, logits):
        super().__init__()
        self.model = model
        self.logits = logits

    def forward(self, images):                                    # (B, 3, H, W)
        logits = self.model(images)                               # (B, C, ceil(H/4), ceil(W/4))
        if self.logits:
            return logits
        size = images.shape[2:]
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits.argmax(1).to(torch.uint8)                   # (B, H, W)


def trace(deployed):
    """-> the ExportedProgram, with free batch, height and width."""
    sizes = {
        0: torch.export.Dim("batch", min=1),
        2: torch.export.Dim("height", min=SMALLEST_EXPORTED),
        3: torch.export.Dim("width", min=SMALLEST_EXPORTED),
    }
    example = torch.rand(2, 3, 96, 160)
    return torch.export.export(deployed, (example,), dynamic_shapes={"images": sizes})


# ---------------------------------------------------------------- kinds of files

def write_pt2(program, path, facts):
    torch.export.save(program, path, extra_files={"effiseg.json": json.dumps(facts)})


def open_pt2(path):
    """-> a function from images to what the file makes of them."""
    return torch.export.load(path).module()


def write_onnx(program, path, facts):
    onnx = torch.onnx.export(program, dynamo=True, input_names=["images"],
                             output_names=[facts["output"]], verbose=False)
    for name, value in facts.items():
        onnx.model.metadata_props[name] = json.dumps(value)
    onnx.save(path, external_data=False)


def open_onnx(path):
    """-> a function from images to what the file makes of them."""
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images):
        outputs = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(outputs[0])

    return run


class Kind(NamedTuple):
    write: Callable                                               # (program, path, facts)
    open: Callable                                                # path -> function of images
    packages: tuple                                               # that it needs beside torch


KINDS = {
    ".pt2": Kind(write_pt2, open_pt2, ()),
    ".onnx": Kind(write_onnx, open_onnx, ("onnx", "onnxscript", "onnxruntime")),
}


def kind_of(path):
    """-> the Kind of a file, by its suffix; packages and folder are there. Raises ExportError."""
    suffix = Path(path).suffix.lower()
    if suffix not in KINDS:
        raise ExportError(f"{path}: the file to export must end in .pt2 or .onnx, "
                          "or in .pth for a checkpoint")
    kind = KINDS[suffix]
    for package in kind.packages:
        try:
            importlib.import_module(package)
        except ImportError:
            wanted = " ".join(kind.packages)
            raise ExportError(f"ONNX needs the package {package}: pip install {wanted}") from None
    if not Path(path).parent.is_dir():
        raise ExportError(f"{path}: there is no folder {Path(path).parent}")
    return kind


# ---------------------------------------------------------------- export

@torch.inference_mode(False)
@torch.no_grad()
def export(model, path, logits=False):
    """Write `model` to `path` (.onnx or .pt2), run the file, and compare.

    -> {"difference", "bytes", "checked"}; difference: of logits the largest absolute one, of
    classes the largest share of pixels. Nothing stands at `path` unless the file agrees.
    Raises ExportError for another suffix, absent packages or folder, and a file that disagrees.
    """
    kind = kind_of(path)
    deployed = Deployed(model.fold().cpu(), logits).eval()
    output = "logits" if logits else "classes"
    facts = {"variant": model.variant, "classes": model.classes, "palette": model.palette,
             "input_size": model.input_size, "output": output}
    # The writers and readers go by the suffix, so the unfinished file has it too.
    path = Path(path)
    partial = path.with_name(f"partial-{os.getpid()}{path.suffix.lower()}")
    try:
        with quiet_exporters():
            kind.write(trace(deployed), str(partial), facts)
            difference = largest_difference(deployed, kind.open(str(partial)))
        tolerance = LOGITS_TOLERANCE if logits else CLASSES_TOLERANCE
        if not difference <= tolerance:                           # NaN is none either
            raise ExportError(f"{path} was not written: "
                              f"its {output} differ from the model's by {difference:.1e}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return {"difference": difference, "bytes": path.stat().st_size, "checked": CHECKED_SIZES}


@contextlib.contextmanager
def quiet_exporters():
    """Inside, the exporters' words to their own developers are left out."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def largest_difference(deployed, run):
    """-> how far the file's output is from the model's, over random images of CHECKED_SIZES."""
    return max(difference_at(deployed, run, size) for size in CHECKED_SIZES)


def difference_at(deployed, run, size):
    batch, height, width = size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=generator)
    expected = deployed(images)
    found = run(images)
    if found.shape != expected.shape:
        raise ExportError(f"the exported file makes {tuple(found.shape)} of images "
                          f"{tuple(images.shape)}, not {tuple(expected.shape)}")
    if deployed.logits:
        return (found - expected).abs().max().item()
    return (found != expected).double().mean().item()


# ---------------------------------------------------------------- the command

def export_program(model, target, logits):
    """TARGET.onnx or .pt2: write it and say how well it agrees."""
    report = export(model, target, logits)
    output = "logits" if logits else "classes"
    agreement = f"{100 * report['difference']:.4f} % of the pixels differ"
    if logits:
        agreement = f"largest difference {report['difference']:.1e}"
    sizes = ["x".join(map(str, size)) for size in report["checked"]]
    mebibytes = report["bytes"] / 2 ** 20
    print(f"{target}: {mebibytes:.1f} MiB, images (B, 3, H, W) in [0, 1] -> {output}; "
          f"run on random images of {', '.join(sizes)} (BxHxW) against the model: {agreement}")


def export_checkpoint(model, source, target, half):
    """TARGET.pth: write it and say how large it is, beside the file it came from."""
    save_checkpoint(model, target, half=half)
    before = ""
    if Path(source).is_file():                                    # Hugging Face's is a folder
        before = f" ({Path(source).stat().st_size / 2 ** 20:.1f} MiB as given)"
    precision = "fp16" if half else "fp32"
    mebibytes = Path(target).stat().st_size / 2 ** 20
    print(f"{target}: weights in {precision}, {mebibytes:.1f} MiB{before}")


def build_parser():
    parser = argparse.ArgumentParser(
        prog="python -m extras.export",
        description="Write a network as one file for another runtime, or as a checkpoint.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="ours, Hugging Face's (file or folder), NVlabs' or TransKD's")
    parser.add_argument("target", metavar="TARGET",
                        help="what to write, by its suffix: .onnx, .pt2 or .pth (our checkpoint)")
    parser.add_argument("--logits", action="store_true",
                        help=".onnx and .pt2: the output is the logits at a quarter of the input "
                             "(default: classes at the input's size)")
    parser.add_argument("--half", action="store_true",
                        help=".pth: weights in fp16, half the size, to send around (default: fp32)")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    is_checkpoint = Path(args.target).suffix.lower() == ".pth"
    if args.half and not is_checkpoint:
        parser.error(f"--half is for a checkpoint: {args.target} does not end in .pth")
    if args.logits and is_checkpoint:
        parser.error("--logits is for .onnx and .pt2: a checkpoint has no output")
    if is_checkpoint:
        model = load_checkpoint(args.checkpoint)
        export_checkpoint(model, args.checkpoint, args.target, args.half)
    else:
        kind_of(args.target)                                      # its error comes before loading
        export_program(load_checkpoint(args.checkpoint), args.target, args.logits)


if __name__ == "__main__":
    run_command(main)
