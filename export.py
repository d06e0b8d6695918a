"""A trained network as one file that runs without this project: ONNX, or torch's .pt2. Checked by running it.

    python eval.py student.pth --export student.onnx              # needs onnx, onnxscript and onnxruntime
    python eval.py student.pth --export student.pt2 --logits      # torch alone: torch.export.load("student.pt2").module()

The file holds the folded network with its normalisation: input `images`, float RGB (B, 3, H, W) in [0, 1], any batch and any
size from 64 pixels; output `classes`, uint8 (B, H, W), or with --logits `logits`, (B, C, ceil(H/4), ceil(W/4)). The names of
the classes and their colours travel in it too (ONNX: metadata; .pt2: the extra file effiseg.json).
"""

import json
import logging
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn

SMALLEST = 64                                                     # pixels: from here on no map of the network is one pixel wide
CHECKED = ((1, 64, 96), (2, 150, 203))                            # (B, H, W) of the random images that a file is checked with
TOLERANCE = {True: 1e-4, False: 1e-3}                             # logits: largest difference; classes: largest share of other pixels


class ExportError(ValueError):
    """The file cannot be made, or does not do what the model does; the message is one sentence."""


class Deployed(nn.Module):
    """What runs on the device: images -> classes, or logits."""

    def __init__(self, model, logits):
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, images):                                    # (B, 3, H, W)
        logits = self.model(images)                               # (B, C, ceil(H/4), ceil(W/4))
        if self.logits:
            return logits
        logits = F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)
        return logits.argmax(1).to(torch.uint8)                   # (B, H, W)


def trace(deployed):
    """-> the ExportedProgram, with free batch, height and width."""
    sizes = {0: torch.export.Dim("batch", min=1), 2: torch.export.Dim("height", min=SMALLEST), 3: torch.export.Dim("width", min=SMALLEST)}
    return torch.export.export(deployed, (torch.rand(2, 3, 96, 160),), dynamic_shapes={"images": sizes})


def write_pt2(program, path, facts, output):
    torch.export.save(program, path, extra_files={"effiseg.json": json.dumps(facts)})


def write_onnx(program, path, facts, output):
    onnx = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=[output], verbose=False)
    onnx.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    onnx.save(path, external_data=False)


def open_pt2(path):
    """-> a function from images to what the file makes of them."""
    return torch.export.load(path).module()


def open_onnx(path):
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


KINDS = {".pt2": (write_pt2, open_pt2, ()), ".onnx": (write_onnx, open_onnx, ("onnx", "onnxscript", "onnxruntime"))}


@torch.inference_mode(False)
@torch.no_grad()
def export(model, path, logits=False):
    """Write `model` to `path` (.onnx or .pt2), run the file, and compare -> {"difference", "bytes", "checked"}.

    difference: for logits the largest absolute one, for classes the largest share of pixels. Nothing stands at `path` unless
    the file agrees with the model. Raises ExportError for another suffix, absent packages and a file that disagrees.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in KINDS:
        raise ExportError(f"{path}: the file to export must end in {' or '.join(KINDS)}")
    write, open_file, packages = KINDS[suffix]
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            raise ExportError(f"ONNX needs the package {package}: pip install {' '.join(packages)}") from None
    deployed, output = Deployed(model.fold().cpu(), logits).eval(), "logits" if logits else "classes"
    facts = dict(variant=model.variant, classes=model.classes, palette=model.palette, input_size=model.input_size, output=output)
    partial = os.path.join(os.path.dirname(path), f"partial-{os.getpid()}{suffix}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                       # the exporters' words to their own developers
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            write(trace(deployed), partial, facts, output)
            difference = max(compare(deployed, open_file(partial), size) for size in CHECKED)
        if not difference <= TOLERANCE[logits]:
            raise ExportError(f"{path} was not written: its {output} differ from the model's by {difference:.1e}")
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return dict(difference=difference, bytes=os.path.getsize(path), checked=CHECKED)


def compare(deployed, run, size):
    """-> how far the file's output is from the model's on random images of `size` (B, H, W)."""
    batch, height, width = size
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    expected, found = deployed(images), run(images)
    if found.shape != expected.shape:
        raise ExportError(f"the exported file makes {tuple(found.shape)} of images {tuple(images.shape)}, not {tuple(expected.shape)}")
    return (found - expected).abs().max().item() if deployed.logits else (found != expected).double().mean().item()
