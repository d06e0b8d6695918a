"""Checkpoints that wish us ill: each is refused in a short sentence that names the file; none is
waited for, none takes the memory, and what they say of themselves is not believed.

Thousands of damaged files: tests/fuzz.py.
"""

import json
import os
import struct

import pytest
import torch

from conftest import ROOT, command, write_folder
from extras.view_flags import open_model
from model import CheckpointError, load_checkpoint, save_checkpoint, segformer
from nvlabs import Flat

pytestmark = pytest.mark.usefixtures("patience")
ESCAPE = "\x1b[2J\nerror: all is lost"


def refuse(path, sentence):
    """Loading must raise CheckpointError in one short sentence that can be printed."""
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_checkpoint(path)
    assert os.path.basename(path) in str(caught.value)
    assert len(str(caught.value)) < 1200 and str(caught.value).isprintable()


@pytest.fixture
def change(checkpoint):
    """change(name=value) writes the checkpoint anew with some of its entries replaced."""
    def write(**entries):
        content = torch.load(checkpoint, weights_only=True)
        torch.save(content | entries, checkpoint)
        return checkpoint
    return write


# ---------------------------------------------------------------- what ours says of itself

WRONG = {
    "classes that are numbers": {"classes": [1, 2, 3]},
    "a class of 1 MB": {"classes": ["a", "b", "c" * 1_000_000]},
    "a class with an escape sequence": {"classes": ["a", "b", ESCAPE]},
    "too few classes": {"classes": ["a", "b"]},
    "colours that are strings": {"palette": ["red", "green", "blue"]},
    "colours that are pairs": {"palette": [(1, 2), (3, 4), (5, 6)]},
    "300 colours": {"palette": [(1, 2, 3)] * 300},
    "a bright colour": {"palette": [(1, 2, 3), (4, 5, 6), (7, 8, 10 ** 9)]},
    "a negative colour": {"palette": [(1, 2, 3), (4, 5, 6), (7, 8, -1)]},
    "half a colour": {"palette": [(1, 2, 3), (4, 5, 6), (7, 8, 0.5)]},
    "a size of 10^9": {"input_size": (10 ** 9, 10 ** 9)},
    "a size of 20000": {"input_size": [20000, 20000]},
    "a long and thin size": {"input_size": (32, 10 ** 9)},
    "a size of truths": {"input_size": (True, True)},
    "a size of halves": {"input_size": (40.5, 48)},
    "an origin that is no dict": {"trained_on": "toy"},
    "a fold of 5 MB": {"trained_on": {"data": "toy", "fold": "x" * 5_000_000}},
    "a negative fold": {"trained_on": {"data": "toy", "fold": -1}},
    "data of 5 MB": {"trained_on": {"data": "x" * 5_000_000}},
    "data that is a number": {"trained_on": {"data": 7}},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_checkpoint_carries_is_checked(what, change):
    refuse(change(**WRONG[what]), "is damaged: its layer_norm_eps, input_size, classes, palette")


@pytest.mark.parametrize("name, sentence", [
    ("variant", "is of a SegFormer"), ("norm", "was trained with norm")])
def test_names_of_5_mb_are_shortened(name, sentence, change):
    refuse(change(**{name: "y" * 5_000_000}), sentence)
    refuse(change(**{name: ESCAPE}), sentence)


def test_tensors_names_are_only_text(change, checkpoint, tmp_path):
    tensors = torch.load(checkpoint, weights_only=True)["model"]
    for name in (ESCAPE, "z" * 5_000_000):
        refuse(change(model=tensors | {name: torch.zeros(1)}), "it has a tensor named")
        torch.save(Flat("b0", 3).state_dict() | {name: torch.zeros(1)}, tmp_path / "x.pth")
        refuse(tmp_path / "x.pth", "it has a tensor named")


def test_where_it_was_trained_is_printed_as_codes(change, tmp_path):
    """A path may hold anything; what is printed of it does nothing to the terminal."""
    spec = write_folder(tmp_path / "set")
    trained_on = {"data": f"folder:{ESCAPE}/set", "fold": 0, "folds": 2, "fold_by": ESCAPE}
    path = change(trained_on=trained_on)
    output = command("eval.py", path, "--data", spec)
    assert "warning: " in output and r"\x1b[2J\nerror" in output
    output += command("eval.py", path, code=2)                    # without --data: theirs
    assert "\x1b" not in output and "\nerror: all" not in output
    for odd in ("folder:~nouser/x", "folder:a\0b"):
        output = command("eval.py", change(trained_on={"data": odd}), code=2)
        assert "which is not there" in output


def test_more_classes_than_a_label_holds(tmp_path):
    """300 classes: a label of 8 bits would wrap around. Such a network can still start another."""
    save_checkpoint(segformer("b0", 300), tmp_path / "x.pth")
    spec = write_folder(tmp_path / "set")
    for args in (("eval.py", tmp_path / "x.pth", "--data", spec),
                 ("-m", "extras.predict", tmp_path / "x.pth", tmp_path / "set" / "images",
                  "--out", tmp_path / "out")):
        output = command(*args, code=2, cwd=ROOT)
        assert "x.pth has 300 classes: the labels here have 8 bits" in output
    assert load_checkpoint(tmp_path / "x.pth", 3).num_classes == 3
    save_checkpoint(segformer("b0", 255), tmp_path / "y.pth")
    assert open_model(tmp_path / "y.pth", None, "cpu").num_classes == 255


# ---------------------------------------------------------------- files of others

def write_safetensors(path, header, data=b""):
    """header: a dict, or bytes of JSON"""
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LARGE = 9_000_000_000_000_000_000
HEADERS = {
    "200,000 factors": {"a": entry([LARGE] * 200_000, 0, 4)},
    "200,000 ones": {"a": entry([1] * 200_000, 0, 4)},
    "a name twice": b'{"a": %b, "a": %b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2),
    "a key twice": b'{"a": {"dtype": "F32", "shape": [9], "shape": [1], "data_offsets": [0, 4]}}',
    "long numbers": b'{"a": {"dtype": "F32", "data_offsets": [0, %b]}}' % (b"9" * 5000),
    "deep": b"[" * 200_000,
    "no names": b"[1, 2]",
    "not UTF-8": b'{"\xff": 1}',
}


@pytest.mark.parametrize("what", HEADERS)
def test_hostile_headers_of_safetensors_are_refused(what, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", HEADERS[what], b"\0" * 4)
    refuse(tmp_path / "x.safetensors", "not a checkpoint that can be read")


@pytest.mark.parametrize("name", [ESCAPE, "n" * 5_000_000])
def test_names_in_a_header_are_shortened(name, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {name: entry([1], 0, 4)}, b"\0" * 4)
    refuse(tmp_path / "x.safetensors", "it has a tensor named")


def write_hub_folder(root, config=None):
    root.mkdir()
    torch.save(Flat("b0", 3).state_dict(), root / "pytorch_model.bin")
    (root / "config.json").write_text(config or json.dumps({"model_type": "segformer"}))


@pytest.mark.parametrize("config", [
    '{"model_type": "segformer", "model_type": "bert"}', '{"a":' * 100_000, "[]", "\x1b"])
def test_a_hostile_config_is_a_sentence(config, tmp_path):
    write_hub_folder(tmp_path / "hub", config)
    refuse(tmp_path / "hub", "its config.json")


def test_a_config_of_1_gb_is_not_read(tmp_path):
    write_hub_folder(tmp_path / "hub")
    with open(tmp_path / "hub" / "config.json", "r+b") as file:
        file.truncate(2 ** 30)                                    # sparse: it takes no room
    refuse(tmp_path / "hub", "its config.json")


def test_a_file_beyond_all_memory_is_not_read(tmp_path, checkpoint):
    """A sparse one takes no room on the disk."""
    header = {"a": entry([2 ** 38], 0, 2 ** 40)}
    write_safetensors(tmp_path / "x.safetensors", header)
    for path in (tmp_path / "x.safetensors", checkpoint):
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) + 2 ** 40)
        refuse(path, "not a checkpoint that can be read")


def test_a_config_of_another_network_is_named_shortly(tmp_path):
    write_hub_folder(tmp_path / "hub", json.dumps({"model_type": ESCAPE + "m" * 5_000_000}))
    refuse(tmp_path / "hub", "not of a segformer")


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    for suffix in ("pth", "safetensors"):
        os.mkfifo(tmp_path / f"x.{suffix}")
        refuse(tmp_path / f"x.{suffix}", "not a regular file")
    refuse("/dev/zero", "not a regular file")
    for name in ("config.json", "preprocessor_config.json"):
        root = tmp_path / f"hub of {name}"
        write_hub_folder(root)
        (root / name).unlink(missing_ok=True)
        os.mkfifo(root / name)
        refuse(root, "its config.json or preprocessor_config.json is damaged")
    root = tmp_path / "hub"
    write_hub_folder(root)
    os.mkfifo(root / "model.safetensors")                         # the other one is read
    assert load_checkpoint(root).num_classes == 3


def test_colours_that_mmseg_wrote_wrongly_are_left_out(tmp_path):
    """They were never an error: the classes have no names then."""
    tensors = Flat("b0", 3).state_dict()
    backbone = {}
    for name, tensor in tensors.items():
        prefix = "decode_head." if name.startswith("linear_") else "backbone."
        backbone[prefix + name] = tensor
    for palette in ([["red"]] * 3, [[1, 2]] * 3, [[1, 2, 999]] * 3):
        meta = {"CLASSES": ["a", "b", "c"], "PALETTE": palette}
        torch.save({"state_dict": backbone, "meta": meta}, tmp_path / "x.pth")
        assert load_checkpoint(tmp_path / "x.pth").palette is None
    meta = {"CLASSES": ["a", "b", "c"], "PALETTE": [[1, 2, 3]] * 3}
    torch.save({"state_dict": backbone, "meta": meta}, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").palette == [(1, 2, 3)] * 3
