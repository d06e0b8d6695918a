"""The files of other projects: read as their own code reads them, and refused when they lie."""

import json
import re
import struct

import pytest
import torch
import transformers

from conftest import ROOT, command
from extras import checkpoint_formats
from model import MEAN, SIZES, STD, CheckpointError, load_checkpoint, segformer
from nvlabs import Flat, segmenter
from test_model import CLASSES, close, peer, randomise

# ---------------------------------------------------------------- Hugging Face

@pytest.mark.parametrize("variant", SIZES)
def test_every_size_has_transformers_tensors(variant):
    """Same shapes as transformers' model, tensor by tensor (on the meta device: no computing)."""
    size = SIZES[variant]
    with torch.device("meta"):
        ours = segformer(variant, CLASSES).state_dict()
        theirs = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(
            num_labels=CLASSES, hidden_sizes=list(size["dims"]), depths=list(size["depths"]),
            decoder_hidden_size=size["width"]))
    _, renamed, _ = checkpoint_formats.rename(theirs.state_dict(), "peer")
    expected = {name: t.shape for name, t in ours.items() if name not in ("mean", "std")}
    assert {name: t.shape for name, t in renamed.items()} == expected


@pytest.mark.parametrize("form", ["safetensors", "bin", "state_dict", "encoder", "classifier"])
def test_reads_what_transformers_writes(form, tmp_path, capsys):
    kinds = {"encoder": "SegformerModel", "classifier": "SegformerForImageClassification"}
    theirs = peer("b0", kinds.get(form, "SegformerForSemanticSegmentation"))
    path = tmp_path / "model.safetensors"
    theirs.save_pretrained(tmp_path)
    if form == "bin":                       # the hub's older files: the same names in a torch file
        path = tmp_path / "pytorch_model.bin"
        tensors = checkpoint_formats.read_safetensors(tmp_path / "model.safetensors")
        torch.save(tensors, path)
    elif form == "state_dict":
        path = tmp_path / "weights.bin"
        torch.save(theirs.state_dict(), path)
    bare = form in kinds
    if bare:
        with pytest.raises(CheckpointError, match="encoder without a decoder"):
            load_checkpoint(path)
    ours = load_checkpoint(path, CLASSES if bare else None)
    loaded = "207/207 tensors, ImageNet mean/std"
    if bare:
        loaded = "192/207 tensors, ImageNet mean/std, new decoder"
    said = rf"SegFormer-B0, 19 classes, (Hugging Face|transformers 5), {loaded}\n"
    assert re.search(said, capsys.readouterr().out)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        normalised = (images - ours.mean) / ours.std
        expected = theirs(normalised, output_hidden_states=True).hidden_states[-1]
        assert close(ours.features(images).stages[-1], expected)


def test_a_hugging_face_folder_tells_names_and_normalisation(tmp_path, capsys):
    theirs = peer("b0")
    theirs.config.id2label = {i: f"class {i}" for i in range(CLASSES)}
    theirs.save_pretrained(tmp_path)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    ours = load_checkpoint(tmp_path)
    said = "Hugging Face, 207/207 tensors, mean [0.5, 0.4, 0.3], std [0.2, 0.2, 0.1]"
    assert said in capsys.readouterr().out
    assert ours.classes == [f"class {i}" for i in range(CLASSES)]
    images = torch.rand(1, 3, 64, 64)
    mean = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    std = torch.tensor([0.2, 0.2, 0.1]).view(3, 1, 1)
    with torch.no_grad():
        assert close(ours(images), theirs((images - mean) / std).logits)


@pytest.mark.parametrize("folder,message", [
    ({}, "cannot open"),
    ({"config.json": "{"}, "damaged"),
    ({"config.json": "[]"}, "damaged"),
    ({"config.json": '{"model_type": "bert"}', "pytorch_model.bin": ""}, "of a 'bert'"),
    ({"config.json": '{"model_type": "segformer"}'}, "no model.safetensors"),
])
def test_a_folder_that_is_none_is_a_sentence(folder, message, tmp_path):
    for name, text in folder.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [{"tensors": 5}, {"tensors": {}, "mean": 5}, {"state_dict": 5}])
def test_a_folder_with_a_strange_file_is_a_sentence(content, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "segformer"}')
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


def test_safetensors_are_read_as_the_package_reads_them(tmp_path):
    from safetensors.torch import load_file, save_file
    tensors = {
        "a": torch.randn(3, 4),
        "h": torch.randn(5).half(),
        "b": torch.randn(2, 2).bfloat16(),
        "i": torch.tensor(7),
        "e": torch.zeros(0, 3),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    ours = checkpoint_formats.read_safetensors(path)
    theirs = load_file(path)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype


@pytest.mark.parametrize("header", [
    {"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 16]}},
    {"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}},
    {"a": {"dtype": "X", "shape": [4], "data_offsets": [0, 16]}},
    {"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}},
    {"a": {}},
    [1],
])
def test_lying_safetensors_are_a_sentence(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 10 ** 15) + text)
    for name in ("x", "long"):
        with pytest.raises(CheckpointError, match="not a checkpoint that can be read"):
            load_checkpoint(tmp_path / f"{name}.safetensors")


# ---------------------------------------------------------------- NVlabs' names

def nvlabs_file(form, path):
    """Write random weights in one of the formats with NVlabs' names.

    -> (the network that wrote it, its input's mean and std)
    """
    torch.manual_seed(0)
    classes = {"segmenter": 19, "encoder": None}.get(form, 20)
    theirs = randomise(Flat("b1" if form == "encoder" else "b0", classes))
    tensors = theirs.state_dict()
    if form == "segmenter":
        content = segmenter(tensors)
    elif form == "encoder":
        imagenet = {"head.weight": torch.zeros(1000, 512), "head.bias": torch.zeros(1000)}
        content = tensors | imagenet
    elif form == "teacher":
        content = {f"module.{key}": t for key, t in tensors.items()}
    elif form == "norm":
        content = {key.replace("fuse.bn", "fuse.norm"): t for key, t in tensors.items()}
    elif form == "student":
        student = {f"student.{key}": t for key, t in tensors.items()}
        projections = {f"embed{i}_linearproject.weight": torch.zeros(2, 2) for i in range(1, 5)}
        content = {"state_dict": student | projections}
    is_zip = form != "encoder"              # the oldest files are not archives yet
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    normalises = form in ("segmenter", "encoder")
    return theirs, (MEAN, STD) if normalises else ((0, 0, 0), (1, 1, 1))


WITHOUT_VOID = "TransKD/EffiSeg without its void output"


@pytest.mark.parametrize("form,said", [
    ("segmenter", "B0, 19 classes, NVlabs segmenter, 207/207 tensors, ImageNet mean/std"),
    ("encoder", "B1, 5 classes, NVlabs encoder, 192/207 tensors, ImageNet mean/std, new decoder"),
    ("teacher", f"B0, 19 classes, {WITHOUT_VOID}, 207/207 tensors, no mean/std"),
    ("norm", f"B0, 19 classes, {WITHOUT_VOID}, 207/207 tensors, no mean/std"),
    ("student", "without its void output (4 tensors of its distillation left out), "
                "207/207 tensors, no mean/std"),
])
def test_reads_the_files_with_nvlabs_names(form, said, tmp_path, capsys):
    theirs, (mean, std) = nvlabs_file(form, tmp_path / "x.pth")
    ours = load_checkpoint(tmp_path / "x.pth", 5 if form == "encoder" else None)
    said = said if form == "student" else f"SegFormer-{said}"
    assert said in capsys.readouterr().out
    images = torch.rand(2, 3, 75, 130)
    mean = torch.tensor(mean).view(1, 3, 1, 1)
    std = torch.tensor(std).view(1, 3, 1, 1)
    normalised = (images - mean) / std
    with torch.no_grad():
        features = ours.features(images)
        for found, expected in zip(features.stages, theirs.stages(normalised), strict=True):
            assert close(found, expected)
        if form != "encoder":
            assert close(features.logits, theirs(normalised)[:, :19])
            assert close(ours.fold()(images), features.logits)
    if form == "segmenter":
        assert ours.classes == list("abcdefghijklmnopqrs")
        assert ours.palette == [(i, 0, 0) for i in range(19)]
    else:
        assert ours.classes is None and ours.palette is None


def test_a_head_without_void_is_kept_whole(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "x.pth"
    torch.save(Flat("b0", 11).state_dict(), path)
    assert load_checkpoint(path).num_classes == 11
    with_void = load_checkpoint(path, 10)                         # the 11th is void
    assert with_void.decoder.classifier.weight.shape[0] == 10


# ---------------------------------------------------------------- files that are not whole

def write_bad(path, what):
    """Write one kind of bad checkpoint, in a stranger's format, to `path`."""
    flat = Flat("b0", 3).state_dict()
    if what == "mmseg":
        name = "backbone.layers.0.0.projection.weight"
        content = {"state_dict": {name: torch.zeros(32, 3, 7, 7)}}
    elif what == "expanded":
        content = {}
        for name, tensor in flat.items():
            content[name] = torch.zeros(1).expand(tensor.shape) if tensor.ndim else tensor
    elif what == "double":
        content = flat | {"linear_fuse.norm.weight": flat["linear_fuse.bn.weight"].clone()}
    elif what == "half a file":
        tensors = segmenter(flat)["state_dict"]
        content = {"state_dict": dict(list(tensors.items())[:len(tensors) // 2])}
    elif what == "half a decoder":
        content = {name: t for name, t in flat.items() if not name.startswith("linear_pred")}
    elif what == "no width":
        content = flat | {"block1.0.attn.kv.weight": torch.tensor(1.0)}
    elif what == "other network":
        content = {"layer1.0.conv1.weight": torch.zeros(3)}
    torch.save(content, path)


BAD = {
    "mmseg": "written by mmseg 1.x",
    "expanded": "more bytes than the file",
    "double": "two tensors for decoder.norm.weight",
    "half a file": "no SegFormer B0-B5, or not all of one",
    "half a decoder": "no classifier",
    "no width": "lacks 2 tensors, first stages.0.blocks.0.attn.k.weight",
    "other network": "no SegFormer in a known format",
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_of_strangers_are_a_sentence(what, tmp_path):
    write_bad(tmp_path / "bad.pth", what)
    with pytest.raises(CheckpointError, match=BAD[what]) as caught:
        load_checkpoint(tmp_path / "bad.pth")
    assert "bad.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_checkpoints_are_refused_or_loaded():
    """A few of the thousands that `python tests/fuzz.py` tries."""
    output = command(ROOT / "tests" / "fuzz.py", "--count", 25)
    assert output.count("25 files") == 4 and output.count("refused") == 4


def test_model_alone_reads_its_own_files_and_says_what_it_lacks(tmp_path):
    """model.py copied out: ours is read, for another format it names the file to copy too."""
    (tmp_path / "model.py").write_text((ROOT / "model.py").read_text())
    torch.save(Flat("b0", 3).state_dict(), tmp_path / "nvlabs.pth")
    script = (
        "from model import CheckpointError, load_checkpoint, save_checkpoint, segformer\n"
        "save_checkpoint(segformer('b0', 3), 'ours.pth')\n"
        "load_checkpoint('ours.pth')\n"
        "for other in ('nvlabs.pth', 'x.safetensors', '.'):\n"
        "    try:\n"
        "        load_checkpoint(other)\n"
        "    except CheckpointError as error:\n"
        "        print(error)\n")
    output = command("-c", script, cwd=tmp_path)
    assert "ours.pth: SegFormer-B0, 3 classes, EffiSeg, 207/207 tensors" in output
    assert output.count("copy extras/checkpoint_formats.py beside model.py too") == 3


def test_checks_without_what_they_need_are_not_left_out_in_silence(tmp_path):
    """model.py and data.py copied out with their checks, but without extras/printable.py."""
    (tmp_path / "extras").mkdir()
    for name in ("model.py", "data.py", "extras/checkpoint_checks.py", "extras/data_checks.py",
                 "extras/checkpoint_formats.py", "extras/jpeg_ends.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    script = (
        "import data, model\n"
        "for what in (model.find_checks, data.find_checks, lambda: model.other_formats('x.pth')):\n"
        "    try:\n"
        "        what()\n"
        "    except (model.CheckpointError, data.DatasetError) as error:\n"
        "        print('said:', error)\n")
    output = command("-c", script, cwd=tmp_path, env={"PYTHONPATH": ""})
    assert output.count("said: ") == 3
    assert output.count("(No module named 'extras.printable')") == 3
