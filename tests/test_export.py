"""Files for other runtimes do what the model does, and half checkpoints are half."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from conftest import command, write_folder
from data import open_dataset
from extras import export, exported_model, int8, onnx_graph
from extras.cli import UsageError
from model import SIZES, load_checkpoint, save_checkpoint, segformer


def export_command(*args, code=0):
    return command("-m", "extras.export", *args, code=code)


def export_here(monkeypatch, *words):
    """The command in this process, whose networks are smaller than a new process would build."""
    monkeypatch.setattr("sys.argv", ["export", *map(str, words)])
    export.main()


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


@pytest.mark.parametrize("data, told", [
    ("camvid:/home/me/CamVid", "camvid:CamVid"),
    ("camvid:sets/CamVid", "camvid:sets/CamVid"),
    ("toy", "toy"),
])
def test_what_is_sent_around_tells_no_ones_folders(data, told, checkpoint, tmp_path):
    network = load_checkpoint(checkpoint)
    network.trained_on = {"data": data, "fold": 1, "folds": 2, "fold_by": "drive"}
    save_checkpoint(network, tmp_path / "mine.pth")
    export_command(tmp_path / "mine.pth", tmp_path / "given.pth", "--half")
    given = load_checkpoint(tmp_path / "given.pth").trained_on
    assert given == {"data": told, "fold": 1, "folds": 2, "fold_by": "drive"}


def test_a_checkpoint_is_not_written_over_itself(checkpoint):
    before = Path(checkpoint).read_bytes()
    output = command("-m", "extras.export", checkpoint, checkpoint, "--half", code=2)
    assert "is what it would be made of: choose another name" in output
    assert Path(checkpoint).read_bytes() == before


def test_a_checkpoint_without_half_keeps_every_bit(checkpoint, tmp_path):
    output = export_command(checkpoint, tmp_path / "copy.pth")
    assert "weights in fp32, 14.2 MiB (14.2 MiB as given)" in output
    before = load_checkpoint(checkpoint).state_dict()
    after = load_checkpoint(tmp_path / "copy.pth").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------- .pt2 and .onnx

@pytest.fixture
def small_b0(monkeypatch):
    """B0 with a block in each stage: the exporter is slow."""
    small = SIZES["b0"] | {"depths": (1, 1, 1, 1)}
    monkeypatch.setitem(SIZES, "b0", small)


def test_an_exported_pt2_does_what_the_model_does(checkpoint, tmp_path):
    output = export_command(checkpoint, tmp_path / "net.pt2")
    assert "MiB, images (B, 3, H, W) in [0, 1] -> classes" in output
    assert "1x64x96, 2x150x203" in output and "% of the pixels differ, to classes" in output
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


def test_an_exported_onnx_does_what_the_model_does(small_b0, tmp_path):
    model = segformer("b0", 3).eval()
    images = torch.rand(3, 3, 97, 110)
    agreement = exported_model.export(model, str(tmp_path / "net.onnx"), logits=True)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx",
                                           providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(images).numpy()
    assert np.abs(session.run(None, {"images": images.numpy()})[0] - expected).max() < 1e-4
    assert agreement.logits < 1e-4 and agreement.pixels < 1e-3
    assert onnx_graph.read_facts(tmp_path / "net.onnx")["variant"] == "b0"
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_a_file_of_one_size(small_b0, tmp_path, monkeypatch, capsys):
    """Its shapes are numbers, its facts tell the size of training, all its weights lie as read."""
    model = segformer("b0", 3).eval()
    model.input_size = (80, 112)
    model.classes = ["a", "b", "ü"]
    save_checkpoint(model, tmp_path / "net.pth")
    target = tmp_path / "net.onnx"
    export_here(monkeypatch, tmp_path / "net.pth", target, "--size", 64, 96)
    output = capsys.readouterr().out
    assert "images (1, 3, 64, 96) in [0, 1] -> classes" in output
    assert "beware: it takes 64x96, and was trained at 80x112" in output
    facts = onnx_graph.read_facts(target)
    assert facts["size"] == [64, 96] and facts["input_size"] == [80, 112]
    assert facts["classes"] == model.classes

    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, 64, 96]
    assert session.get_outputs()[0].shape == [1, 64, 96]
    pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    classes = session.run(None, {"images": pixels[None].numpy() / np.float32(255)})[0]
    expected = classes_of(model, pixels).numpy()
    assert (classes[0] == expected).mean() > 0.999
    graph = onnx.load(target).graph
    weights = {tensor.name for tensor in graph.initializer}
    transposed = [node.name for node in graph.node
                  if node.op_type == "Transpose" and node.input[0] in weights]
    assert not transposed


def test_weights_are_transposed_in_the_file_of_any_size(small_b0, tmp_path):
    """The exporter leaves a node for each large matrix: quantisers passed over those."""
    program = exported_model.trace(exported_model.Deployed(segformer("b0", 3).fold(), True))
    with exported_model.quiet_exporters():
        before = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    after = onnx.ModelProto()
    after.CopyFrom(before)
    onnx_graph.fold_transposes(after.graph)

    def transposed_weights(graph):
        weights = {tensor.name for tensor in graph.initializer}
        return [node for node in graph.node
                if node.op_type == "Transpose" and node.input[0] in weights]

    assert transposed_weights(before.graph) and not transposed_weights(after.graph)
    images = np.random.default_rng(0).random((1, 3, 64, 96), dtype=np.float32)
    outputs = []
    for model in (before, after):
        session = onnx_graph.open_session(model.SerializeToString())
        outputs.append(session.run(None, {session.get_inputs()[0].name: images})[0])
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-5


def test_the_logits_of_a_file_of_classes(small_b0, tmp_path):
    model = segformer("b0", 3).eval()
    exported_model.export(model, tmp_path / "net.onnx", size=(64, 96))
    graph = onnx.load(tmp_path / "net.onnx")
    onnx_graph.show_logits(graph)
    images = torch.rand(1, 3, 64, 96)
    found = onnx_graph.runner_of(onnx_graph.open_session(graph.SerializeToString()))(images)
    with torch.no_grad():
        assert (found - model(images)).abs().max() < 1e-4


@pytest.mark.parametrize("logits", [True, False])
def test_a_file_that_disagrees_is_not_kept(logits, checkpoint, tmp_path, monkeypatch):
    model = load_checkpoint(checkpoint)

    def write(program, path, facts):
        Path(path).write_bytes(program)

    def open_wrong(path):
        if logits:
            return lambda images: model(images) + 1e-3
        return lambda images: torch.zeros(*images.shape[::2], images.shape[3], dtype=torch.uint8)

    monkeypatch.setattr(exported_model, "trace", lambda deployed, size: b"a program")
    kind = exported_model.Kind(write, open_wrong, ())
    monkeypatch.setitem(exported_model.KINDS, ".pt2", kind)
    with pytest.raises(exported_model.ExportError, match="differ from the model's: run on random"):
        exported_model.export(model, str(tmp_path / "x.pt2"), logits=logits)
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".pt2"]


def test_a_file_of_nan_does_not_agree():
    deployed = exported_model.Deployed(segformer("b0", 3).fold(), True)

    def run(images):
        return deployed(images) * (1 if images.shape[0] == 1 else float("nan"))

    assert not exported_model.compare(deployed, run).is_good()


# ---------------------------------------------------------------- int8

@pytest.fixture
def trained(small_b0, tmp_path):
    """A B0 that has learnt three flat colours, and their data set."""
    spec = write_folder(tmp_path / "set", size=(64, 96))
    dataset = open_dataset(spec, "train")
    torch.manual_seed(0)
    model = segformer("b0", 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images = torch.stack([dataset[i][0] for i in range(len(dataset))]).float() / 255
    labels = torch.stack([dataset[i][1] for i in range(len(dataset))]).long()
    for _ in range(25):
        logits = F.interpolate(model(images), size=(64, 96), mode="bilinear")
        optimizer.zero_grad()
        F.cross_entropy(logits, labels, ignore_index=255).backward()
        optimizer.step()
    model.eval()
    model.classes = dataset.classes
    model.input_size = (64, 96)
    return model, spec


@pytest.mark.filterwarnings("ignore")
def test_int8_keeps_its_accuracy(trained, tmp_path):
    model, spec = trained
    exported = tmp_path / "fp32.onnx"
    exported_model.export(model, exported, size=(64, 96))
    report = int8.write_int8(model, exported, tmp_path / "int8.onnx", (64, 96), spec, 1.0)
    assert report.miou_fp32 > 0.9 and abs(report.drop()) < 1
    assert report.bytes < report.bytes_fp32 / 3
    assert report.bytes == (tmp_path / "int8.onnx").stat().st_size

    graph = onnx.load(tmp_path / "int8.onnx").graph
    float_matrices = [tensor.name for tensor in graph.initializer
                      if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1]
    depthwise = [name for name in float_matrices if name not in ("model.mean", "model.std")]
    assert len(depthwise) == 4                                    # one in each block, no others

    # a calibration that has seen black frames only: everything else is clipped
    with pytest.MonkeyPatch.context() as patch:
        black = [torch.zeros(1, 3, 64, 96)]
        patch.setattr(int8, "calibration_frames", lambda dataset, size: black)
        sentence = r"broken.onnx was not written: in int8 it has .* less than in fp32"
        with pytest.raises(exported_model.ExportError, match=sentence):
            int8.write_int8(model, exported, tmp_path / "broken.onnx", (64, 96), spec, 1.0)
    assert sorted(p.name for p in tmp_path.glob("*.onnx")) == ["fp32.onnx", "int8.onnx"]


def test_gemms_in_place_of_products_change_nothing(small_b0, tmp_path):
    exported_model.export(segformer("b0", 3), tmp_path / "net.onnx", logits=True, size=(64, 96))
    before = onnx.load(tmp_path / "net.onnx")
    after = int8.linear_maps_as_gemm(before)
    onnx.checker.check_model(after)
    weights = {tensor.name for tensor in after.graph.initializer}
    assert not [node for node in after.graph.node
                if node.op_type == "MatMul" and node.input[1] in weights]
    images = torch.rand(1, 3, 64, 96)
    outputs = []
    for model in (before, after):
        run = onnx_graph.runner_of(onnx_graph.open_session(model.SerializeToString()))
        outputs.append(run(images))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_int8_from_the_command(trained, tmp_path, monkeypatch, capsys):
    model, spec = trained
    save_checkpoint(model, tmp_path / "net.pth")
    words = [tmp_path / "net.pth", tmp_path / "net.onnx", "--int8", "--data", spec, "--logits"]
    export_here(monkeypatch, *words)
    output = capsys.readouterr().out
    assert "int8, " in output and "images (1, 3, 64, 96) in [0, 1] -> logits" in output
    frames = len(open_dataset(spec, "val"))
    assert f"mIoU on the {frames} val frames" in output and "in fp32" in output
    assert onnx_graph.read_facts(tmp_path / "net.onnx")["size"] == [64, 96]
    assert [p.name for p in tmp_path.glob("*.onnx")] == ["net.onnx"]

    model.input_size = None
    save_checkpoint(model, tmp_path / "net.pth")
    with pytest.raises(UsageError, match="add --size H W"):
        export_here(monkeypatch, *words)


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize("args, sentence", [
    (["{net}", "x.tflite"], "must end in .pt2 or .onnx, in .pth for a checkpoint, or have no"),
    (["{net}", "{net}", "x.pt2"], "unrecognized arguments"),
    (["{net}"], "TARGET"),
    (["{net}", "x.pt2", "--half"], "--half is for a checkpoint"),
    (["{net}", "x.pth", "--logits"], "--logits is for .onnx and .pt2"),
    (["{net}", "x.onnx", "--size", "32", "64"], "32 is not at least 64"),
    (["{net}", "x.pth", "--size", "64", "64"], "--size is for .onnx and .pt2"),
    (["{net}", "folder", "--size", "64", "64"], "--size is for .onnx and .pt2"),
    (["{net}", "folder", "--logits"], "--logits is for .onnx and .pt2"),
    (["{net}", "folder", "--half"], "--half is for a checkpoint"),
    (["{net}", "x.pt2", "--int8", "--data", "toy"], "--int8 is for .onnx"),
    (["{net}", "x.onnx", "--int8"], "add --data SPEC"),
    (["{net}", "x.onnx", "--data", "toy"], "--data goes with --int8"),
    (["{net}", "x.onnx", "--max-drop", "1"], "--max-drop goes with --int8"),
    (["{net}", "x.onnx", "--int8", "--data", "toy"], "add --size H W"),
    (["{net}", "x.onnx", "--int8", "--data", "toy", "--max-drop", "-1"], "-1 is not at least 0"),
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
