"""The runtimes' table compares equals and says what is absent; a file's speed; docs/DEPLOY.md's
scripts run as they stand there."""

import importlib.util
import json
import os
import re
import sys
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import bench
from conftest import ROOT, command, write_folder
from extras import (
    bench_file,
    bench_runtimes,
    exported_model,
    hugging_face,
    int8,
    measure,
    onnx_graph,
)
from extras.cli import UsageError
from extras.machine import cpu_has_bf16
from extras.predict import read_photo
from model import SIZES, save_checkpoint, segformer
from test_bench import run_main, run_once
from test_model import randomise

SIZE = (64, 96)
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="openvino is not installed")


@pytest.fixture
def small_b0(monkeypatch):
    """B0 and B2 are one small network: the exporters are slow."""
    small = SIZES["b0"] | {"depths": (1, 1, 1, 1)}
    monkeypatch.setitem(SIZES, "b0", small)
    monkeypatch.setitem(SIZES, "b2", small)
    for module in (bench_runtimes, bench_file):
        monkeypatch.setattr(module, "run_in_turns", run_once)


@pytest.fixture
def network(small_b0):
    model = randomise(segformer("b0", 3)).eval()
    model.classes = [f"class {c}" for c in range(3)]
    return model


# ---------------------------------------------------------------- python bench.py runtimes

@needs_openvino
@pytest.mark.filterwarnings("ignore")
def test_the_table_of_runtimes(network, monkeypatch, tmp_path, capsys):
    spec = write_folder(tmp_path / "set", size=SIZE)
    save_checkpoint(network, tmp_path / "net.pth")
    rows = run_main(monkeypatch, tmp_path, "runtimes", tmp_path / "net.pth", "--size", *SIZE,
                    "--data", spec)["runtimes"]
    output = capsys.readouterr().out
    expected = [setting.title for setting in bench_runtimes.SETTINGS]
    units = {"PyTorch": cpu_has_bf16() is not False,
             "OpenVINO": bench_runtimes.openvino_has_bf16()}
    for runtime, has_units in units.items():
        if not has_units:
            assert f"{runtime}, bf16: not measured, this CPU has no units for it" in output
            expected = [t for t in expected if not (t.startswith(runtime) and "bf16" in t)]
    ours = [row for row in rows if row["side"] == "ours"]
    assert [row["setting"] for row in ours] == expected
    assert len(rows) == 2 * len(ours)
    assert "net.pth, B0, 64x96" in output and "noise" not in output

    reference = next(row for row in ours if row["setting"] == "PyTorch, fp32")
    assert reference["difference"] == 0 and reference["same_class"] == 1
    for row in rows:
        assert row["seconds"] > 0 and row["ratio"] > 0 and 0 <= row["miou"] <= 1
        if row["setting"].endswith(", fp32"):
            assert row["difference"] < 1e-4
            assert row["miou"] == pytest.approx(reference["miou"], abs=1e-3)
        elif "int8" in row["setting"]:
            assert row["difference"] > 0
    sizes = {row["setting"]: row["file_bytes"] for row in ours}
    assert sizes["PyTorch, fp32"] is None
    assert sizes["OpenVINO, int8"] < sizes["OpenVINO, fp32"] / 3


@pytest.mark.filterwarnings("ignore")
def test_fresh_networks_and_an_absent_package(small_b0, monkeypatch, tmp_path, capsys):
    for name in ("openvino", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)              # to import it fails
    monkeypatch.setattr(bench_runtimes, "cpu_has_bf16", lambda: True)
    rows = run_main(monkeypatch, tmp_path, "runtimes", "--size", *SIZE)["runtimes"]
    output = capsys.readouterr().out
    assert "ONNX Runtime: not measured, pip install onnxscript" in output
    assert "OpenVINO: not measured, pip install onnxscript openvino" in output
    assert "calibrated on noise" in output
    assert {row["network"] for row in rows} == {"B0", "B2"}
    assert {row["setting"] for row in rows} == {"PyTorch, fp32", "PyTorch, bf16"}


def open_exactly(path):
    """An int8 file whose sums do not overflow on an x86 CPU without VNNI either."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx_graph.runner_of(session)


@needs_openvino
@pytest.mark.filterwarnings("ignore")
def test_an_int8_file_is_near_fp32_in_both_runtimes(network, tmp_path):
    """What 8 bits round away is 1 to 2 % of these logits; a CPU that overflows adds to it."""
    exported_model.export(network, tmp_path / "fp32.onnx", logits=True, size=SIZE)
    images = torch.rand(4, 1, 3, *SIZE)
    int8.quantize_file(str(tmp_path / "fp32.onnx"), str(tmp_path / "int8.onnx"), images)
    expected = onnx_graph.open_onnx(tmp_path / "fp32.onnx")(images[0])

    def change(found):
        return ((found - expected).abs().mean() / expected.abs().mean()).item()

    exact = open_exactly(tmp_path / "int8.onnx")
    onnx_runtime = onnx_graph.open_onnx(tmp_path / "int8.onnx")
    openvino = bench_runtimes.open_openvino(tmp_path / "int8.onnx", "fp32")
    assert 0 < change(exact(images[0])) < 0.04
    assert 0 < change(onnx_runtime(images[0])) < 0.1
    assert 0 < change(openvino(images[0])) < 0.1


@pytest.mark.parametrize("flags, sentence", [
    (["--batch", 2], "one image at a time"),
    (["--dtype", "bf16"], "leave --dtype and --compile out"),
    (["--compile"], "leave --dtype and --compile out"),
])
def test_what_runtimes_does_not_take(flags, sentence, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match=sentence):
        run_main(monkeypatch, tmp_path, "runtimes", *flags)


def test_other_norms_are_a_sentence(small_b0, monkeypatch, tmp_path):
    save_checkpoint(segformer("b0", 3, bench.NORMS["dyt"]), tmp_path / "net.pth")
    with pytest.raises(UsageError, match="LayerNorm only"):
        run_main(monkeypatch, tmp_path, "runtimes", tmp_path / "net.pth")


def test_other_classes_than_the_datas_are_a_sentence(network, monkeypatch, tmp_path):
    spec = write_folder(tmp_path / "set", classes=2)
    save_checkpoint(network, tmp_path / "net.pth")
    with pytest.raises(UsageError, match="has 3 classes, the data"):
        run_main(monkeypatch, tmp_path, "runtimes", tmp_path / "net.pth", "--data", spec)


# ---------------------------------------------------------------- python bench.py FILE

def test_the_speed_of_a_checkpoint(checkpoint, tmp_path):
    path = tmp_path / "bench.json"
    output = command("bench.py", checkpoint, "--size", 64, 96, "--rounds", 1, "--device", "cpu",
                     "--dtype", "bf16", "--clock", "cpu", "--json", path)
    row, = json.loads(path.read_text())["results"][str(checkpoint)]
    assert row["setting"] == "PyTorch, bfloat16, folded" and row["size"] == [64, 96]
    assert len(row["round_seconds"]) == 10
    assert row["percentile_95_seconds"] >= row["seconds"] > 0
    assert "64x96, batch 1" in output and "95th percentile" in output and "19 classes" not in output
    assert "times are the CPU's" in output


def write_tiny_onnx(path, shape):
    """The smallest ONNX file that takes input of `shape`; a name in it is a free dimension."""
    node = onnx.helper.make_node("Relu", ["images"], ["logits"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name in ("images", "logits")]
    graph = onnx.helper.make_graph([node], "tiny", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def test_the_speed_of_an_onnx_file(network, monkeypatch, tmp_path, capsys):
    """Of one size, its own, and of any size, --size."""
    network.input_size = (80, 80)
    save_checkpoint(network, tmp_path / "net.pth")
    one = str(tmp_path / "one.onnx")
    write_tiny_onnx(one, [1, 3, *SIZE])
    write_tiny_onnx(tmp_path / "any.onnx", ["batch", 3, "height", "width"])
    rows = run_main(monkeypatch, tmp_path, one)[one]
    assert rows[0]["setting"] == "ONNX Runtime" and rows[0]["size"] == [64, 96]
    assert ("OpenVINO, fp32" in [row["setting"] for row in rows]) == HAS_OPENVINO
    several = run_main(monkeypatch, tmp_path, tmp_path / "any.onnx", tmp_path / "net.pth",
                       "--size", 96, 64, "--batch", 2)
    assert [rows[0]["size"] for rows in several.values()] == [[96, 64]] * 2
    own = run_main(monkeypatch, tmp_path, tmp_path / "net.pth")
    assert own[str(tmp_path / "net.pth")][0]["size"] == [80, 80]
    assert "96x64, batch 2" in capsys.readouterr().out

    for flags, sentence in [
        (["--size", 64, 64], "takes images of 64x96 only"),
        (["--batch", 2], "takes 1 image at a time"),
        (["--dtype", "bf16"], "leave --dtype and --compile out"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            run_main(monkeypatch, tmp_path, one, *flags)


@pytest.mark.parametrize("words, sentence", [
    (["speed"], "unknown subject 'speed'"),
    (["no.pth"], "or name a file that is there"),
    (["text.onnx"], "is not an ONNX file that can be run"),
    (["vector.onnx"], "does not take one batch of float images"),
    (["runtimes", "net.pth", "net.pth"], "runtimes takes one checkpoint"),
    (["runtimes", "text.onnx"], "runtimes takes one checkpoint"),
    (["model", "--clock", "cpu"], "--clock cpu is for runtimes and files, not for model"),
])
def test_files_that_are_none_are_a_sentence(words, sentence, checkpoint, tmp_path):
    (tmp_path / "text.onnx").write_text("no")
    write_tiny_onnx(tmp_path / "vector.onnx", [2])
    assert sentence in command("bench.py", *words, "--device", "cpu", code=2, cwd=tmp_path)


def test_the_cpus_clock_does_not_count_waiting():
    device = torch.device("cpu")

    def wait():
        time.sleep(0.2)

    assert measure.seconds_of(wait, device) >= 0.2
    assert measure.seconds_of(wait, device, "cpu") < 0.1


def test_percentile():
    assert bench_file.percentile_95([3.0]) == 3
    assert bench_file.percentile_95(list(range(1, 101))) == 95
    assert bench_file.percentile_95(list(range(20, 0, -1))) == 19


# ---------------------------------------------------------------- the scripts of docs/DEPLOY.md

def script_with(sign):
    """-> the Python block of docs/DEPLOY.md that has `sign` in it"""
    text = (ROOT / "docs" / "DEPLOY.md").read_text()
    found = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if sign in block]
    assert len(found) == 1, sign
    return found[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with what the scripts open: student.onnx, my-segformer, a photo. -> (it, the model)
    """
    folder = tmp_path_factory.mktemp("deployed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "b0", SIZES["b0"] | {"depths": (1, 1, 1, 1)})
        model = randomise(segformer("b0", 3)).eval()
        model.classes = ["road", "sky", "car"]
        model.input_size = SIZE
        exported_model.export(model, folder / "student.onnx", size=SIZE)
        hugging_face.write_folder(model, folder / "my-segformer")
    Image.effect_noise((120, 90), 90).convert("RGB").save(folder / "photo.jpg")
    return folder, model


@pytest.fixture
def deployed(written, monkeypatch):
    """To be in that folder. -> the model"""
    folder, model = written
    monkeypatch.chdir(folder)
    return model


def expected_classes(model):
    """The photo's classes, as the scripts make them: at the network's size, then enlarged."""
    photo = torch.from_numpy(read_photo("photo.jpg")).permute(2, 0, 1)
    images = bench_runtimes.resize_image(photo, SIZE)[None].float() / 255
    with torch.no_grad():
        logits = exported_model.enlarge(model(images), images)
    small = Image.fromarray(logits.argmax(1)[0].byte().numpy())
    return np.asarray(small.resize((120, 90), Image.Resampling.NEAREST))


@pytest.mark.parametrize("package", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_the_scripts_segment_a_photo(package, deployed):
    exec(script_with(f"import {package}\n"), {})
    found = np.asarray(Image.open("classes.png"))
    # OpenVINO takes bf16 by itself on a CPU that has it
    least = 0.9 if package == "openvino" else 0.999
    assert found.shape == (90, 120)
    assert (found == expected_classes(deployed)).mean() > least


def test_the_transformers_script(deployed):
    scope = {}
    exec(script_with("from transformers import pipeline"), scope)
    labels = {segment["label"] for segment in scope["segments"]}
    assert labels and labels <= set(deployed.classes)


def test_a_phones_format(deployed):
    """The command that DEPLOY.md names for reduced builds makes a file that does the same."""
    command("-m", "onnxruntime.tools.convert_onnx_models_to_ort", "student.onnx",
            "--optimization_style", "Fixed", cwd=os.getcwd())
    images = {"images": np.random.default_rng(0).random((1, 3, *SIZE), dtype=np.float32)}
    outputs = []
    for name in ("student.onnx", "student.ort"):
        session = onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, images)[0])
    assert (outputs[0] == outputs[1]).mean() > 0.999
