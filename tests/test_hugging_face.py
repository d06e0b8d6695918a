"""A Hugging Face folder does in transformers what our checkpoint does here.

transformers 5 is what the tests install. For 4, put one into a folder and name it:

    pip install --target /tmp/t4 --no-deps transformers==4.57.1 "huggingface_hub<1" \\
        "tokenizers<0.23" requests urllib3 certifi charset-normalizer
    TRANSFORMERS_4=/tmp/t4 python -m pytest tests/test_hugging_face.py
"""

import json
import os

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import command
from extras import checkpoint_formats, hugging_face
from extras.cli import UsageError
from model import NORMS, SIZES, load_checkpoint, save_checkpoint, segformer
from test_model import peer, randomise

SIZE = (64, 96)
CLASSES = ["road", "sky", "straße"]

OPEN_IN_TRANSFORMERS = """
import sys, numpy, torch, transformers
from PIL import Image
folder, images, photo, out = sys.argv[1:]
model = transformers.SegformerForSemanticSegmentation.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.from_numpy(numpy.load(images))).logits
numpy.save(out, logits.numpy())
segments = transformers.pipeline("image-segmentation", model=folder)(photo)
print("opened by", transformers.__version__, [segment["label"] for segment in segments],
      {segment["mask"].size for segment in segments})
"""


@pytest.fixture
def network():
    """A B0 with random weights and statistics, another normalisation, names, and a size."""
    model = randomise(segformer("b0", len(CLASSES))).eval()
    model.mean += 0.1
    model.classes = list(CLASSES)
    model.palette = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    model.input_size = SIZE
    return model


def logits_of(model, images):
    with torch.no_grad():
        return model(images)


def check_in_transformers(model, folder, tmp_path, env):
    """Open `folder` in a new interpreter: the logits are the model's, and a photo is segmented."""
    images = torch.rand(2, 3, *SIZE)
    normalised = (images - model.mean) / model.std
    np.save(tmp_path / "images.npy", normalised.numpy())
    Image.effect_noise((120, 90), 90).convert("RGB").save(tmp_path / "photo.jpg")
    printed = command("-c", OPEN_IN_TRANSFORMERS, folder, tmp_path / "images.npy",
                      tmp_path / "photo.jpg", tmp_path / "logits.npy", env=env)
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    assert (found - logits_of(model, images)).abs().max() < 1e-3
    assert "(120, 90)" in printed                                 # the masks are the photo's size
    assert any(name in printed for name in CLASSES)
    return printed


def test_transformers_5_opens_the_folder(network, tmp_path):
    save_checkpoint(network, tmp_path / "net.pth")
    said = command("-m", "extras.export", tmp_path / "net.pth", tmp_path / "folder")
    assert "a Hugging Face folder, 14.2 MiB" in said
    printed = check_in_transformers(network, tmp_path / "folder", tmp_path, {"HF_HUB_OFFLINE": "1"})
    assert f"opened by {transformers.__version__}" in printed
    assert sorted(os.listdir(tmp_path / "folder")) == [
        "config.json", "model.safetensors", "preprocessor_config.json"]


def test_transformers_4_opens_the_folder(network, tmp_path):
    packages = os.environ.get("TRANSFORMERS_4")
    if not packages:
        pytest.skip("TRANSFORMERS_4 names no folder with transformers 4: see the head of this file")
    hugging_face.write_folder(network, tmp_path / "folder")
    env = {"PYTHONPATH": packages, "HF_HUB_OFFLINE": "1"}
    printed = check_in_transformers(network, tmp_path / "folder", tmp_path, env)
    assert "opened by 4." in printed


@pytest.mark.parametrize("variant", SIZES)
def test_names_are_what_transformers_writes(variant, tmp_path, monkeypatch):
    """Of each size: transformers' own file has these names and shapes, and no other."""
    few = SIZES[variant] | {"depths": (1, 1, 1, 2)}
    monkeypatch.setitem(SIZES, variant, few)
    theirs = peer(variant)
    theirs.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    expected = {name: tensor.shape for name, tensor in written.items()}
    found = hugging_face.their_tensors(segformer(variant, theirs.config.num_labels))
    assert {name: tensor.shape for name, tensor in found.items()} == expected


def test_the_table_of_names_read_forth_and_back_is_the_same():
    for name in segformer("b0", 3).state_dict():
        if name in ("mean", "std"):
            continue
        theirs = checkpoint_formats.their_name(name, checkpoint_formats.HUGGING_FACE)
        assert checkpoint_formats.our_name(theirs, checkpoint_formats.HUGGING_FACE) == name
    with pytest.raises(KeyError):
        checkpoint_formats.their_name("stages.0.lora.weight", checkpoint_formats.HUGGING_FACE)


def test_the_folder_comes_back_as_the_checkpoint(network, tmp_path):
    report = hugging_face.write_folder(network, tmp_path / "folder")
    again = load_checkpoint(tmp_path / "folder")
    assert again.classes == network.classes and again.palette == network.palette
    assert tuple(again.input_size) == SIZE
    for name, tensor in network.state_dict().items():
        assert torch.allclose(tensor, again.state_dict()[name], rtol=0, atol=1e-7), name
    images = torch.rand(1, 3, 64, 64)
    difference = (logits_of(again, images) - logits_of(network, images)).abs().max()
    assert 0 < difference < 1e-3 and 0 < report["difference"] < 1e-3


def test_what_stands_in_a_folder_stays(network, tmp_path):
    folder = tmp_path / "folder.v2"                               # a folder, whatever its name
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    hugging_face.write_folder(network, folder)
    hugging_face.write_folder(network, folder)
    assert (folder / "README.md").read_text() == "mine"
    assert len(list(folder.iterdir())) == 4 and len(list(tmp_path.iterdir())) == 1


def test_without_names_and_size_transformers_own_are_taken(tmp_path):
    hugging_face.write_folder(segformer("b0", 2), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    settings = json.loads((tmp_path / "folder" / "preprocessor_config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert settings["do_resize"] is False and "size" not in settings
    assert load_checkpoint(tmp_path / "folder").classes is None


def test_safetensors_are_the_packages(tmp_path):
    tensors = {"a": torch.randn(3, 4), "i": torch.tensor(7), "b": torch.randn(5)}
    hugging_face.write_safetensors(tensors, tmp_path / "ours")
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours = load_file(tmp_path / "ours")
    theirs = load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("norm", [name for name in NORMS if name != "ln"])
def test_other_norms_are_a_sentence(norm, tmp_path):
    save_checkpoint(segformer("b0", 3, NORMS[norm]), tmp_path / "net.pth")
    said = command("-m", "extras.export", tmp_path / "net.pth", tmp_path / "folder", code=2)
    assert "transformers' SegFormer has LayerNorm only" in said
    assert not (tmp_path / "folder").exists()


def test_logits_that_another_epsilon_changes_are_a_sentence(network, tmp_path):
    for norm in hugging_face.layer_norms(network):
        norm.eps = 0.1
    with pytest.raises(UsageError, match="would change the logits by"):
        hugging_face.write_folder(network, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_a_sentence(network, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        hugging_face.write_folder(network, tmp_path / "file")
    with pytest.raises(UsageError, match="there is no folder"):
        hugging_face.write_folder(network, tmp_path / "no" / "folder")


@pytest.mark.parametrize("ours", [{"palette": 5}, {"palette": [[1, 2, 3]]}, {"input_size": "x"}, 5])
def test_a_lying_config_is_a_sentence(ours, network, tmp_path):
    hugging_face.write_folder(network, tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"effiseg": ours}))
    with pytest.raises(checkpoint_formats.CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "folder")
