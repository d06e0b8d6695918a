"""Weights in 8 and 4 bits: how exact, how small, and that the file is opened as any other."""

import copy
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import command
from extras import packed_layers, quantize
from extras.packed_layers import (
    GROUP,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    pack,
    pack_groups,
    pack_rows,
    round_tokens,
    unpack_groups,
    unpack_rows,
)
from model import CheckpointError, load_checkpoint, save_checkpoint, segformer


def quantize_command(*args, code=0):
    return command("-m", "extras.quantize", *args, code=code)


# ---------------------------------------------------------------- numbers

@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_8_bits_are_within_half_a_step(size):
    matrix = size * torch.randn(40, 77)
    codes, scale = pack_rows(matrix)
    assert codes.dtype == torch.int8 and codes.abs().max() == 127
    error = (unpack_rows(codes, scale) - matrix).abs()
    assert (error <= 0.5001 * scale).all()
    assert error.max() > 0.3 * scale.min()


@pytest.mark.parametrize("size, shift", [(1.0, 0.0), (0.05, 0.0), (1.0, 20.0), (300.0, -1000.0)])
@pytest.mark.parametrize("columns", [32, 33, 147, 9])
def test_4_bits_are_within_half_a_step_of_their_group(size, shift, columns):
    matrix = size * torch.randn(40, columns) + shift
    codes, scale, minimum = pack_groups(matrix)
    groups = math.ceil(columns / GROUP)
    assert codes.shape == (40, groups * GROUP // 2) and scale.shape == minimum.shape == (40, groups)
    again = unpack_groups(codes, scale, minimum, columns)
    steps = scale.float().repeat_interleave(GROUP, 1)[:, :columns]
    # and the rounding of a sum in float32
    assert ((again - matrix).abs() <= 0.5001 * steps + 1e-6 * matrix.abs()).all()


def test_4_bits_use_all_of_their_codes_in_each_group():
    """A scale for a whole row would leave the codes of a small group unused."""
    row = torch.cat([torch.linspace(-1e-3, 1e-3, GROUP), torch.linspace(-1, 1, GROUP)])
    codes, scale, minimum = pack_groups(row[None])
    assert codes[0, :16].unique().numel() > 7
    small = unpack_groups(codes, scale, minimum, 2 * GROUP)[0, :GROUP]
    assert (small - row[:GROUP]).abs().max() < 1e-4


def test_two_codes_share_a_byte():
    codes, _, _ = pack_groups(torch.arange(32.0)[None])
    assert codes.dtype == torch.uint8 and codes.shape == (1, 16)
    assert (codes & 15)[0, 0] == 0 and (codes >> 4)[0, -1] == 15


def test_rows_of_zeros_and_of_one_value_stay():
    for value in (0.0, 0.25, -3.0):
        matrix = torch.full((2, 64), value)
        assert torch.allclose(unpack_rows(*pack_rows(matrix)), matrix, rtol=1e-6)
        assert torch.allclose(unpack_groups(*pack_groups(matrix), 64), matrix, rtol=2e-3)


def test_activations_have_a_scale_a_token():
    x = torch.randn(3, 5, 16) * torch.tensor([1.0, 100.0, 1e-4])[:, None, None]
    rounded = round_tokens(x, -1)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((rounded - x).abs() <= 0.5001 * step).all()
    # The small token is not lost beside the large one.
    assert (rounded[2] != 0).float().mean() > 0.9


# ---------------------------------------------------------------- layers

@pytest.mark.parametrize("bits, error", [(8, 0.01), (4, 0.15)])
def test_packed_layers_do_what_the_layers_do(bits, error):
    torch.manual_seed(0)
    image = torch.randn(2, 64, 12, 12)
    cases = [
        (nn.Linear(64, 40), PackedLinear, torch.randn(3, 7, 64)),
        (nn.Conv2d(64, 32, 3, 2, 1), PackedConv2d, image),
        (nn.Conv2d(64, 64, 3, 1, 1, groups=64), PackedConv2d, image),
        (nn.Conv2d(64, 16, 1, bias=False), PackedConv2d, image),
        (nn.Embedding(10, 64, padding_idx=0), PackedEmbedding, torch.randint(0, 10, (2, 5))),
    ]
    for layer, kind, x in cases:
        packed = kind(layer, bits)
        packed.store(layer.weight)
        difference = (packed(x) - layer(x)).norm() / layer(x).norm()
        assert 0 < difference < error, layer


def test_4_plus_8_rounds_the_input_too():
    layer = nn.Linear(64, 40)
    packed = PackedLinear(layer, 4)
    packed.store(layer.weight)
    x = torch.randn(5, 64)
    plain = packed(x)
    packed.activation_bits = 8
    expected = F.linear(round_tokens(x, -1), packed.weight_in_use(), layer.bias)
    assert torch.equal(packed(x), expected) and not torch.equal(plain, expected)


def test_depthwise_rows_stay_in_8_bits_and_norms_stay_whole():
    model = segformer("b0", 3)
    before = copy.deepcopy(model)
    layer_bits = pack(model, 4, keep=("decoder.classifier",))
    assert layer_bits["stages.0.blocks.0.mlp.dwconv"] == 8
    assert layer_bits["stages.0.blocks.0.mlp.fc1"] == 4
    assert "decoder.classifier" not in layer_bits
    assert type(model.decoder.classifier) is nn.Conv2d
    assert torch.equal(model.decoder.norm.weight, before.decoder.norm.weight)
    assert torch.equal(model.stages[0].norm.weight, before.stages[0].norm.weight)
    assert list(packed_layers.packable_layers(model)) == ["decoder.classifier"]


# ---------------------------------------------------------------- the file

@pytest.mark.parametrize("name, largest, bits", [("8", 3.95e6, 8.5), ("4", 2.65e6, 5.2),
                                                 ("4+8", 2.65e6, 5.2)])
def test_the_file_is_small_and_opens_as_ever(checkpoint, tmp_path, name, largest, bits):
    out = tmp_path / "small.pth"
    output = quantize_command(checkpoint, "--bits", name, "--out", out)
    assert os.path.getsize(out) < largest
    assert f"{os.path.getsize(out) / 1e6:.2f} MB" in output
    whole = load_checkpoint(checkpoint)
    mode = quantize.MODES[name]
    small, _ = quantize.packed_copy(whole, mode)
    held, weights = packed_layers.count_bits(small)
    assert held / weights < bits

    loaded = load_checkpoint(out)
    assert loaded.classes == whole.classes
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded(images), small(images))
        assert torch.equal(loaded.fold()(images), loaded(images))
        difference = (loaded(images) - whole(images)).norm() / whole(images).norm()
    assert 0 < difference < (0.02 if name == "8" else 0.4)


def test_a_packed_network_computes_with_the_unpacked_weights(checkpoint):
    """The published decoder through packed layers is the network with these weights in place."""
    whole = load_checkpoint(checkpoint)
    small, layer_bits = quantize.packed_copy(whole, quantize.MODES["4"])
    with torch.no_grad():
        for name in layer_bits:
            weight = small.get_submodule(name).weight_in_use()
            whole.get_submodule(name).weight.copy_(weight)
        images = torch.rand(1, 3, 64, 64)
        assert torch.allclose(small(images), whole(images), atol=1e-4)


def test_a_packed_file_is_for_inference(checkpoint, tmp_path):
    out = tmp_path / "small.pth"
    quantize_command(checkpoint, "--bits", 4, "--out", out)
    with pytest.raises(CheckpointError, match="which is for inference"):
        load_checkpoint(out, num_classes=3)
    with pytest.raises(CheckpointError, match="for inference only"):
        save_checkpoint(load_checkpoint(out), tmp_path / "again.pth")
    assert "packed already" in quantize_command(out, "--bits", 8, "--out", tmp_path / "x.pth",
                                                code=2)


def test_a_packed_file_is_no_source_of_other_formats(checkpoint, tmp_path):
    packed = tmp_path / "packed.pth"
    command("-m", "extras.quantize", checkpoint, "--bits", 8, "--out", packed)
    for target in (("folder",), ("int8.onnx", "--int8", "--data", "toy")):
        output = command("-m", "extras.export", packed, tmp_path / target[0], *target[1:], code=2)
        assert "packed.pth is packed: export the one that it was made of" in output


def test_scores_before_and_after_and_what_is_sensitive(checkpoint, folder, tmp_path):
    out = tmp_path / "small.pth"
    output = quantize_command(checkpoint, "--bits", 4, "--out", out, "--data", folder, "--layers",
                              "--keep", "stages.0", "decoder.classifier",
                              "--json", tmp_path / "small.json")
    report = json.loads((tmp_path / "small.json").read_text())
    assert report["sizes"]["bytes"] == os.path.getsize(out) and report["mode"] == "4"
    assert 0 <= report["cost"]["miou_after"] <= 1 and len(report["layers"]) > 20
    assert "points" in output and "% of it" in output and "ms a frame before" in output
    assert "stages.1.mlp.dwconv" in output and "decoder.fuse" in output
    assert "left as they are (--keep stages.0 decoder.classifier)" in output
    assert "mIoU" in command("eval.py", out, "--data", folder)


def test_a_sensitive_layer_is_told(folder):
    """A layer with a huge outlier loses its small weights in 8 bits, and stands first."""
    torch.manual_seed(0)
    model = segformer("b0", 3)
    weight = model.stages[1].patch_embed.proj.weight.data
    weight[:, 0, 0, 0] = 40.0
    from data import open_dataset
    rows = quantize.sensitivities(model, quantize.MODES["8"], open_dataset(folder, "val"))
    assert rows[0][2] == "stages.1.patch_embed.proj"


# ---------------------------------------------------------------- mistakes and damage

@pytest.mark.parametrize("args, sentence", [
    (["{net}", "--bits", "4"], "give --out FILE"),
    (["{net}", "--bits", "5", "--out", "x.pth"], "invalid choice: '5'"),
    (["{net}", "--bits", "4", "--out", "{net}"], "is what it would be made of"),
    (["{net}", "--bits", "4", "--out", "x.onnx"], "ends in .pth"),
    (["{net}", "--bits", "4", "--layers"], "--layers needs --data"),
    (["{net}", "--bits", "4", "--out", "x.pth", "--keep", "stage"], "no layer has this name"),
    (["/no/net.pth", "--bits", "4", "--out", "x.pth"], "cannot open checkpoint /no/net.pth"),
    (["{net}", "--bits", "4", "--out", "/no/dir/x.pth"], "/no/dir/x.pth: there is no folder"),
    (["{net}", "--bits", "4", "--out", "x.pth", "--data", "toy"], "3 classes"),
])
def test_mistakes_are_a_sentence(args, sentence, checkpoint):
    args = [arg.format(net=checkpoint) for arg in args]
    assert sentence in quantize_command(*args, code=2)


DAMAGE = {
    "bits": lambda content: content["layer_bits"].update({"decoder.fuse": 3}),
    "name": lambda content: content["layer_bits"].update({"decoder.norm": 4}),
    "no bits": lambda content: content.pop("layer_bits"),
    "classes": lambda content: content.update(num_classes=10 ** 9),
    "width": lambda content: content.update(width="wide"),
    "activations": lambda content: content.update(activation_bits=3),
    "codes": lambda content: content["model"].pop("decoder.fuse.codes"),
    "shape": lambda content: content["model"].update({"decoder.fuse.codes": torch.zeros(2, 2)}),
    "variant": lambda content: content.update(variant="b9"),
    "epsilon": lambda content: content.update(layer_norm_eps=[1.0]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_packed_file_is_a_sentence(checkpoint, tmp_path, damage):
    out = tmp_path / "small.pth"
    small, layer_bits = quantize.packed_copy(load_checkpoint(checkpoint), quantize.MODES["4"])
    packed_layers.save_packed(small, layer_bits, out)
    content = torch.load(out, weights_only=True)
    DAMAGE[damage](content)
    torch.save(content, out)
    with pytest.raises(CheckpointError, match="small.pth"):
        load_checkpoint(out)


def test_weights_beyond_fp16_are_refused(checkpoint):
    model = load_checkpoint(checkpoint)
    model.decoder.fuse.weight.data[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="decoder.fuse cannot be packed"):
        quantize.packed_copy(model, quantize.MODES["4"])
