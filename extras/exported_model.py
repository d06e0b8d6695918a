"""A network as a file that runs without this project: tracing it, writing it, holding it against
the model.

    agreement = export(model, "net.onnx")                       # any size
    agreement = export(model, "net.onnx", size=(360, 480))      # this size only, batch 1
    agreement = export(model, "net.pt2", logits=True)

extras/export.py is the command, and says what such a file holds.
"""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from extras.cli import UsageError
from extras.onnx_graph import open_onnx, write_onnx
from extras.packages import import_package

SMALLEST_EXPORTED = 64                                            # pixels: no map is one pixel wide
CHECKED_SIZES = ((1, 64, 96), (2, 150, 203))                      # (B, H, W) of the random images
LOGITS_TOLERANCE = 1e-4                     # largest difference, in parts of the largest logit
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
        logits = enlarge(logits, images)                          # (B, C, H, W)
        return logits.argmax(1).to(torch.uint8)                   # (B, H, W)


def enlarge(logits, images):
    """Logits at the images' size."""
    return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)


def trace(deployed, size=None):
    """-> the ExportedProgram: one image of `size` (H, W), or free batch, height and width."""
    if size is not None:
        return torch.export.export(deployed, (torch.rand(1, 3, *size),))
    free = {
        0: torch.export.Dim("batch", min=1),
        2: torch.export.Dim("height", min=SMALLEST_EXPORTED),
        3: torch.export.Dim("width", min=SMALLEST_EXPORTED),
    }
    example = torch.rand(2, 3, 96, 160)
    return torch.export.export(deployed, (example,), dynamic_shapes={"images": free})


@contextlib.contextmanager
def quiet_exporters():
    """Inside, the exporters' words to their own developers are left out."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---------------------------------------------------------------- kinds of files

def write_pt2(program, path, facts):
    content = io.BytesIO()             # torch's own writer ends the process when a disk gets full
    torch.export.save(program, content, extra_files={"effiseg.json": json.dumps(facts)})
    Path(path).write_bytes(content.getbuffer())


def open_pt2(path):
    """-> a function from images to what the file makes of them."""
    return torch.export.load(path).module()


class Kind(NamedTuple):
    write: Callable                                               # (program, path, facts)
    open: Callable                                                # path -> function of images
    packages: tuple                                               # that it needs beside torch


KINDS = {
    ".pt2": Kind(write_pt2, open_pt2, ()),
    ".onnx": Kind(write_onnx, open_onnx, ("onnx", "onnxscript", "onnxruntime")),
}


def kind_of(path):
    """-> the Kind of a file, by its suffix; packages and folder are there, and what stands at
    `path` may be replaced. Raises UsageError."""
    suffix = Path(path).suffix.lower()
    if suffix not in KINDS:
        raise ExportError(f"{path}: the file to export must end in .pt2 or .onnx, in .pth for a "
                          "checkpoint, or have no suffix for a Hugging Face folder")
    kind = KINDS[suffix]
    for package in kind.packages:
        import_package(package, "ONNX needs", " ".join(kind.packages))
    if not Path(path).parent.is_dir():
        raise ExportError(f"{path}: there is no folder {Path(path).parent}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ExportError(f"{path}: not a regular file, so nothing is written there")
    return kind


# ---------------------------------------------------------------- writing one

@dataclass(frozen=True)
class Agreement:
    """How far a file is from the model, over random images."""
    output: str         # "logits" or "classes"
    pixels: float       # largest share of the pixels with another class
    logits: float       # largest difference of logits. A file of classes does not tell its logits:
                        # there, how much lower the model holds the class that the file chose
    largest: float      # the largest logit, to hold the difference against
    sizes: tuple        # (B, H, W) of the images

    def is_good(self):
        return (self.pixels <= CLASSES_TOLERANCE                  # NaN is not
                and self.logits <= LOGITS_TOLERANCE * max(1, self.largest))

    def __str__(self):
        sizes = ", ".join("x".join(map(str, size)) for size in self.sizes)
        difference = f"logits by {self.logits:.1e}"
        if self.output == "classes":
            difference = f"to classes whose logits are {self.logits:.1e} lower at most"
        return (f"run on random images of {sizes} (BxHxW) against the model: "
                f"{100 * self.pixels:.4f} % of the pixels differ, {difference}")


@torch.inference_mode(False)
@torch.no_grad()
def export(model, path, logits=False, size=None):
    """Write `model` to `path` (.onnx or .pt2), run the file, and compare. -> Agreement

    logits: the output is the logits at a quarter of the input; else the classes
    size: (H, W) that is written into the file, with a batch of 1; None: any
    Nothing stands at `path` unless the file agrees. Raises ExportError for another suffix, an
    absent folder, and a file that disagrees, and UsageError for absent packages.
    """
    kind = kind_of(path)
    deployed = Deployed(model.fold().cpu(), logits).eval()
    # The writers and readers go by the suffix, so the unfinished file has it too.
    path = Path(path)
    partial = path.with_name(f"partial-{os.getpid()}{path.suffix.lower()}")
    try:
        with quiet_exporters():
            program = trace(deployed, size)
            with naming_what_cannot_be_written(path):
                kind.write(program, str(partial), facts_of(model, logits, size))
            agreement = compare(deployed, kind.open(str(partial)), size)
        if not agreement.is_good():
            raise ExportError(f"{path} was not written, its {agreement.output} differ from the "
                              f"model's: {agreement}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return agreement


@contextlib.contextmanager
def naming_what_cannot_be_written(path):
    """Turn the error of a full disk into an ExportError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from None


def facts_of(model, logits, size):
    """What travels in the file beside the network."""
    return {
        "variant": model.variant,
        "classes": model.classes,
        "palette": model.palette,
        "input": "RGB / 255, resized to input_size (bilinear) where there is one",
        "input_size": model.input_size,                           # (H, W), of training
        "size": size,                                             # (H, W), the only one it takes
        "output": output_of(logits),
    }


def output_of(logits):
    return "logits" if logits else "classes"


def compare(deployed, run, size=None):
    """-> the Agreement of a file's `run` with the model, over random images."""
    sizes = CHECKED_SIZES if size is None else ((1, *size),)
    results = [compare_at(deployed, run, checked) for checked in sizes]
    worst = torch.tensor(results, dtype=torch.float64).amax(0)    # NaN stays NaN
    pixels, logits, largest = worst.tolist()
    return Agreement(output_of(deployed.logits), pixels, logits, largest, sizes)


def compare_at(deployed, run, size):
    """-> (share of pixels that differ, difference of logits, largest logit) at one (B, H, W)."""
    batch, height, width = size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=generator)
    expected = deployed.model(images)                             # (B, C, H/4, W/4)
    if not deployed.logits:
        expected = enlarge(expected, images)                      # (B, C, H, W)
    wanted = expected if deployed.logits else expected[:, 0]
    found = run(images)
    if found.shape != wanted.shape:
        raise ExportError(f"the exported file makes {tuple(found.shape)} of images "
                          f"{tuple(images.shape)}, not {tuple(wanted.shape)}")
    if deployed.logits:
        classes = found.argmax(1)
        difference = (found - expected).abs().max().item()
    else:
        classes = found.long()
        chosen = expected.gather(1, classes[:, None])             # (B, 1, H, W)
        difference = (expected.amax(1, keepdim=True) - chosen).max().item()
    pixels = (classes != expected.argmax(1)).double().mean().item()
    return pixels, difference, expected.abs().max().item()
