"""Files for other runtimes do what the model does, and half checkpoints are half."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from conftest import command
from extras import export
from model import SIZES, load_checkpoint, save_checkpoint, segformer


def export_command(*args, code=0):
    return command("-m", "extras.export", *args, code=code)


def classes_of(model, image):
    """uint8 image (3, H, W) -> its classes (H, W), in the plainest way."""
    with torch.no_grad():
        logits = model(image[None].float() / 255)
    logits = F.interpolate(logits, size=image.shape[1:], mode="bilinear", align_corners=False)
    return logits[0].argmax(0)


def test_half_checkpoints_are_half_and_load_on_the_cpu(checkpoint, tmp_path):
    output = export_command(checkpoint, tmp_path / "half.pth", "--half")
    whole = load_checkpoint(checkpoint)
    half = load_checkpoint(tmp_path / "half.pth")
    assert "weights in fp16, 7.1 MiB (14.2 MiB as given)" in output
    assert next(half.parameters()).dtype == torch.float32 and torch.equal(half.mean, whole.mean)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(half(images), whole(images), atol=5e-3)
        assert not torch.equal(half(images), whole(images))
    whole.decoder.fuse.weight.data[0] = 1e6
    save_checkpoint(whole, tmp_path / "big.pth")
    output = export_command(tmp_path / "big.pth", tmp_path / "h.pth", "--half", code=2)
    assert "beyond its range" in output


def test_a_checkpoint_without_half_keeps_every_bit(checkpoint, tmp_path):
    output = export_command(checkpoint, tmp_path / "copy.pth")
    assert "weights in fp32, 14.2 MiB (14.2 MiB as given)" in output
    before = load_checkpoint(checkpoint).state_dict()
    after = load_checkpoint(tmp_path / "copy.pth").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_exported_pt2_does_what_the_model_does(checkpoint, tmp_path):
    output = export_command(checkpoint, tmp_path / "net.pt2")
    assert "MiB, images (B, 3, H, W) in [0, 1] -> classes" in output
    assert "1x64x96, 2x150x203" in output and "% of the pixels differ" in output
    model = load_checkpoint(checkpoint)
    images = torch.rand(3, 3, 97, 110)
    extra = {"effiseg.json": ""}
    classes = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()(images)
    assert classes.dtype == torch.uint8 and classes.shape == (3, 97, 110)
    assert json.loads(extra["effiseg.json"])["output"] == "classes"

    pixels = (images * 255).byte()
    again = torch.export.load(tmp_path / "net.pt2").module()(pixels.float() / 255)
    expected = torch.stack([classes_of(model, image) for image in pixels])
    assert (again == expected).float().mean() > 0.999
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".pt2"] == ["net.pt2"]


def test_an_exported_onnx_does_what_the_model_does(tmp_path, monkeypatch):
    small = SIZES["b0"] | {"depths": (1, 1, 1, 1)}                # the exporter is slow
    monkeypatch.setitem(SIZES, "b0", small)
    model = segformer("b0", 3).eval()
    images = torch.rand(3, 3, 97, 110)
    report = export.export(model, str(tmp_path / "net.onnx"), logits=True)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx",
                                           providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(images).numpy()
    assert np.abs(session.run(None, {"images": images.numpy()})[0] - expected).max() < 1e-4
    assert report["difference"] < 1e-4
    assert json.loads(session.get_modelmeta().custom_metadata_map["variant"]) == "b0"
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_a_file_that_disagrees_is_not_kept(checkpoint, tmp_path, monkeypatch):
    model = load_checkpoint(checkpoint)

    def write(program, path, facts):
        Path(path).write_bytes(program)

    def open_wrong(path):
        return lambda images: model(images) + 1e-3

    monkeypatch.setattr(export, "trace", lambda deployed: b"a program")
    monkeypatch.setitem(export.KINDS, ".pt2", export.Kind(write, open_wrong, ()))
    with pytest.raises(export.ExportError, match="differ from the model's by 1.0e-03"):
        export.export(model, str(tmp_path / "x.pt2"), logits=True)
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".pt2"]


@pytest.mark.parametrize("args, sentence", [
    (["{net}", "x.tflite"], "must end in .pt2 or .onnx"),
    (["{net}", "{net}", "x.pt2"], "unrecognized arguments"),
    (["{net}"], "TARGET"),
    (["{net}", "x.pt2", "--half"], "--half is for a checkpoint"),
    (["{net}", "x.pth", "--logits"], "--logits is for .onnx and .pt2"),
    (["{net}", "x.onnx", "--size", "64", "64"], "unrecognized arguments"),
    (["{net}", "x.onnx", "--flip"], "unrecognized arguments"),
    (["{net}", "x.onnx", "--scales", "2"], "unrecognized arguments"),
    (["{net}", "x.pth", "--half", "--json", "y"], "unrecognized arguments"),
    (["{net}", "x.pth", "--half", "--amp", "bf16"], "unrecognized arguments"),
    (["{net}", "/no/such/dir/x.pt2"], "there is no folder /no/such/dir"),
    (["/no/net.pth", "x.pt2"], "cannot open checkpoint /no/net.pth"),
])
def test_mistakes_are_a_sentence_and_exit_code_2(args, sentence, checkpoint):
    args = [arg.format(net=checkpoint) for arg in args]
    assert sentence in export_command(*args, code=2)
