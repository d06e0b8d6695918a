"""The network against Hugging Face transformers with the same weights, its modules, its fold, its
sizes, and its own checkpoints. The files of others: test_checkpoint_formats.py."""

import pickle
import zipfile

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import model as model_file
from model import (
    MEAN,
    NORMS,
    SIZES,
    STD,
    Block,
    CheckpointError,
    Decoder,
    DyL,
    DyT,
    FoldedDecoder,
    FoldedMixFFN,
    MixFFN,
    Reduce,
    dyt,
    dyt_dyl,
    dyt_dyl_ln,
    load_checkpoint,
    save_checkpoint,
    segformer,
    write_atomically,
)

CLASSES = 19


def randomise(module, seed=0):
    """Weights and BatchNorm statistics that all matter: fresh biases are zero."""
    torch.manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith("running_mean") or tensor.ndim == 1:
            tensor.add_(0.3 * torch.randn_like(tensor))
        elif tensor.ndim == 2:
            tensor.mul_(3)                  # fresh ones are so small that attention is uniform
    return module.eval()


def peer(variant, kind="SegformerForSemanticSegmentation"):
    size = SIZES[variant]
    config = transformers.SegformerConfig(
        num_labels=CLASSES, hidden_sizes=list(size["dims"]), depths=list(size["depths"]),
        decoder_hidden_size=size["width"])
    return randomise(getattr(transformers, kind)(config))


def close(a, b, tolerance=1e-5):
    """Equal within rounding: the largest difference against the largest value."""
    return (a - b).abs().max().item() <= tolerance * b.abs().max().item()


# ---------------------------------------------------------------- the network

@pytest.mark.parametrize("variant, count", [("b0", 3_719_027), ("b2", 27_361_235)])
def test_parameter_counts_are_the_published_ones(variant, count):
    assert sum(p.numel() for p in segformer(variant, 19).parameters()) == count


@pytest.mark.parametrize("variant", ["b0", "b1", "b2"])
def test_logits_and_features_equal_transformers(variant, tmp_path):
    theirs = peer(variant)
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path / "model.safetensors")
    assert all(m.eps == 1e-5 for m in ours.modules() if isinstance(m, nn.LayerNorm))
    images = torch.rand(2, 3, 75, 130)
    embeds = []

    def keep(module, inputs, output):
        embeds.append(output[0])                                  # (B, H*W, C)

    for module in theirs.modules():
        if type(module).__name__ == "SegformerOverlapPatchEmbeddings":
            module.register_forward_hook(keep)
    with torch.no_grad():
        expected = theirs((images - ours.mean) / ours.std, output_hidden_states=True)
        found = ours.features(images)
        folded = ours.fold().features(images)
    with_gradients = ours.features(images)                        # recomputes in the blocks
    for features in (found, folded, with_gradients):
        assert close(features.logits, expected.logits)
        for a, b in zip(features.stages, expected.hidden_states[-4:], strict=True):
            assert close(a, b)
        for a, b in zip(features.patch_embeds, embeds, strict=True):
            assert close(a.flatten(2).transpose(1, 2), b)
    save_checkpoint(ours, tmp_path / "ours.pth")
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path / "ours.pth")(images), found.logits)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 32), (101, 203), (224, 224)])
@pytest.mark.parametrize("norm", NORMS)
def test_any_size_trains_and_folds_to_the_same_outputs(size, norm):
    network = randomise(segformer("b0", 5, NORMS[norm]))
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        logits = network(images)
        folded = network.fold()(images)
    assert logits.shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))
    assert close(folded, logits) and close(network(images).detach(), logits)
    network.train()(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_attention_in_bf16_on_a_cpu_is_the_attention(monkeypatch):
    """Its own path, cut by queries: against softmax(q k^T / sqrt(d)) v in fp64."""
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(2, 5, tokens, 32).bfloat16() for tokens in (300, 70, 70))
    exact = (q.double() @ k.double().transpose(2, 3) / 32 ** 0.5).softmax(3) @ v.double()
    monkeypatch.setattr(model_file, "CACHED", 2 * 5 * 70 * 128)   # 128 queries: two cuts and a rest
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)
    with torch.no_grad():
        ours = model_file.attend(q, k, v)
    monkeypatch.undo()
    error = (ours - exact).square().mean().sqrt()
    assert ours.dtype == torch.bfloat16 and error < 0.02 * exact.std()              # +-30 in 8 bits
    with torch.no_grad():                                         # elsewhere PyTorch's kernel
        single = [t[:1].float() for t in (q, k, v)]
        kernel = F.scaled_dot_product_attention(*single)
        assert torch.equal(model_file.attend(*single), kernel)
    assert model_file.attend(q.requires_grad_(), k, v).requires_grad


def test_maps_larger_than_the_cache_are_computed_in_slices(monkeypatch):
    network = randomise(segformer("b0", 5))
    images = torch.rand(1, 3, 96, 160)
    with torch.no_grad():
        whole = network(images)
        monkeypatch.setattr(model_file, "CACHED", 1)              # slices of 64 channels everywhere
        assert len(model_file.slices(256, 24 * 40, images.device)) == 4
        assert close(network.fold()(images), whole)
    assert len(model_file.slices(256, 24 * 40, images.device)) == 1                 # with gradients


def test_decoder_equals_the_published_one():
    """Project, upsample, concatenate c4..c1, 1x1 convolution, BatchNorm, ReLU, classify; values and
    gradients."""
    torch.manual_seed(0)
    dims = (8, 16, 24, 32)
    decoder = Decoder(dims, 12, 3).double().train()
    decoder.dropout.p = 0.0
    stages = []
    for i, dim in enumerate(dims):
        stages.append(torch.randn(2, dim, 16 // 2 ** i, 24 // 2 ** i, dtype=torch.float64))

    def published():
        maps = []
        for x, linear in zip(stages, decoder.linear, strict=True):
            x = F.linear(x.permute(0, 2, 3, 1), linear.weight, linear.bias).permute(0, 3, 1, 2)
            x = F.interpolate(x, size=(16, 24), mode="bilinear", align_corners=False)
            maps.append(x)
        x = decoder.fuse(torch.cat(maps[::-1], 1))
        return decoder.classifier(F.relu(decoder.norm(x)))

    expected = published()
    found = decoder(stages)
    assert torch.allclose(found, expected, rtol=1e-10)
    parameters = list(decoder.parameters())
    ours = torch.autograd.grad(found.square().sum(), parameters)
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


def test_dropout_in_the_matrix_is_the_dropout_of_the_map():
    """The same random numbers drop the same channels, with and without the short way."""
    torch.manual_seed(0)
    decoder = Decoder((8, 16), 12, 3).double().train()
    decoder.dropout.p = 0.5
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    expected = decoder.classifier(decoder.dropout(x))
    torch.manual_seed(1)
    assert torch.allclose(decoder.classify_with_dropout(x), expected, rtol=1e-10)


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    network = segformer("b2", 2)
    decoder = network.decoder
    block = network.stages[2].blocks[0]
    embed = network.stages[0].patch_embed.proj
    assert block.attn.q.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not block.attn.q.bias.any()
    assert block.mlp.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert embed.weight.std().item() == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.05)
    assert decoder.fuse.weight.std().item() == pytest.approx((2 / 768) ** 0.5, rel=0.01)
    assert isinstance(decoder.dropout, nn.Dropout2d) and decoder.dropout.p == 0.1
    drops = [block.drop for stage in network.stages for block in stage.blocks]
    assert drops == pytest.approx(torch.linspace(0, 0.1, 16).tolist())


def test_norm_sites():
    """The hook is asked at every site: 4 patch embeddings, 16 in blocks, 6 reductions, 4 stage
    ends in B0."""
    sites = []

    def note(dim, site):
        sites.append(site)
        return nn.LayerNorm(dim)

    segformer("b0", 2, note)
    counts = [sites.count(site) for site in ("patch_embed", "block", "sr", "stage")]
    assert counts == [4, 16, 6, 4]
    for norm_fn, dyts, dyls in ((dyt, 4, 0), (dyt_dyl, 4, 26), (dyt_dyl_ln, 4, 22)):
        modules = list(segformer("b0", 2, norm_fn).modules())
        assert sum(isinstance(m, DyT) for m in modules) == dyts
        assert sum(isinstance(m, DyL) for m in modules) == dyls
    network = segformer("b0", 2)
    assert {m.norm.eps for m in network.modules() if isinstance(m, Reduce)} == {1e-5}
    assert network.stages[0].blocks[0].norm1.eps == 1e-6


def test_dyt_and_dyl_follow_their_equations():
    x = torch.randn(2, 3, 4, 5)
    for layer in (DyT(5), DyL(5)):
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        inner = layer.alpha * x
        if isinstance(layer, DyT):
            inner = inner.tanh()
        assert torch.allclose(layer(x), layer.weight * inner + layer.bias, atol=1e-6)
    assert DyT(5).alpha.shape == () and DyL(5).alpha.shape == (5,)


def test_fold_removes_every_dyl_but_those_at_stage_ends():
    folded = segformer("b0", 2, dyt_dyl).fold()
    assert sum(isinstance(m, DyL) for m in folded.modules()) == 4
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())


def test_dyt_under_autocast_has_finite_gradients():
    """Its scalar alpha sums the gradient of a whole map; in float16 that overflows."""
    layer = DyT(8)
    x = torch.randn(4, 64, 64, 8).half()
    with torch.autocast("cpu", torch.float16):
        y = layer(x)
    (y.float() * x.float()).sum().mul(1024).backward()
    assert layer.alpha.grad.isfinite() and layer.alpha.grad.abs() > 65504


def test_drop_path_keeps_the_expectation_and_is_off_in_eval():
    block = segformer("b0", 2).stages[3].blocks[1]
    assert block.drop == pytest.approx(0.1)
    x = torch.ones(20_000, 1, 1, 1)
    assert block.train().drop_path(x).mean().item() == pytest.approx(1, abs=0.02)
    assert block.drop_path(x).unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert torch.equal(block.eval().drop_path(x), x)


def test_training_keeps_no_wide_map_of_the_mlp():
    """What autograd keeps of MixFFN is its input, not three maps of four times the width."""
    block = Block(8, heads=1, ratio=1, drop=0, norm_fn=NORMS["ln"]).train()
    x = torch.rand(2, 16, 16, 8, requires_grad=True)
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = block(x)
    assert 0 < max(kept) < 4 * x.numel()
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        middle = x + block.attn(block.norm1(x))
        plain = middle + block.mlp(block.norm2(middle))
    assert max(kept) == 4 * x.numel()                             # the plain MLP keeps them
    gradient, = torch.autograd.grad(out.sum(), x)
    expected, = torch.autograd.grad(plain.sum(), x)
    assert torch.allclose(gradient, expected, atol=1e-6)


BAD_IMAGES = [
    torch.rand(1, 3, 31, 64),
    torch.rand(3, 64, 64),
    torch.rand(1, 1, 64, 64),
    torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
]


@pytest.mark.parametrize("bad", BAD_IMAGES)
def test_bad_images_are_a_sentence(bad):
    with pytest.raises(ValueError, match="SegFormer takes float images"):
        segformer("b0", 2)(bad)


@pytest.mark.parametrize("folded", [False, True])
def test_images_in_0_to_255_are_a_sentence(folded):
    network = segformer("b0", 2).eval()
    network = network.fold() if folded else network
    images = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="divide images in 0-255 by 255"):
        network(images * 255)
    with pytest.raises(ValueError, match="leave out the normalisation before it"):
        network((0.8 * images - 0.45) / 0.225)                    # at most 1.6: not beyond 2
    for fine in (images * 1.1 - 0.05, images.bfloat16().float(), images * torch.nan):
        network(fine)                                             # resampling overshoots a little
    exported = torch.export.export(network, (images,)).module()
    assert close(exported(images), network(images))               # not looked at in a traced graph
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert close(compiled(images), network(images))


# ---------------------------------------------------------------- it calls its own modules

class LoRA(nn.Module):
    """A frozen layer and a low-rank update beside it."""

    def __init__(self, layer, in_dim, out_dim, rank=2):
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, in_dim))
        self.up = nn.Parameter(torch.randn(out_dim, rank))

    def merged(self):
        """-> the plain layer, with the update inside."""
        update = (self.up @ self.down).view(self.layer.weight.shape)
        self.layer.weight.data += update.detach()
        return self.layer

    def forward(self, x):
        if isinstance(self.layer, nn.Linear):
            return self.layer(x) + x @ self.down.T @ self.up.T
        update = torch.einsum("or,ri,bihw->bohw", self.up, self.down, x)
        return self.layer(x) + update


PLACES = ("stages.0.blocks.0.mlp.fc1", "stages.0.blocks.0.mlp.fc2", "stages.1.blocks.0.attn.q",
          "decoder.linear.0", "decoder.linear.3", "decoder.fuse", "decoder.classifier")


@pytest.mark.parametrize("place", PLACES)
def test_a_wrapper_is_never_gone_around(place):
    """A LoRA layer in any place does what the layer with its update merged does."""
    images = torch.rand(2, 3, 64, 96)
    outputs = []
    for merge in (False, True):
        torch.manual_seed(0)
        network = randomise(segformer("b0", 5))
        plain = network(images)
        for module in network.modules():
            if isinstance(module, Block):
                module.drop = 0
        parent = network.get_submodule(place.rpartition(".")[0])
        layer = network.get_submodule(place)
        torch.manual_seed(1)
        lora = LoRA(layer, layer.weight.shape[1], layer.weight.shape[0])
        setattr(parent, place.rpartition(".")[2], lora.merged() if merge else lora)
        with torch.no_grad():
            without_gradients = network(images)
            folded = network.fold()(images)
        in_eval = network(images)
        torch.manual_seed(2)
        in_training = network.train()(images)
        in_training.square().mean().backward()
        if not merge:
            assert lora.up.grad.any() and lora.down.grad.any()
        outputs.append((without_gradients, folded, in_eval, in_training))
    for found, expected in zip(*outputs, strict=True):
        assert close(found, expected, 1e-4)
    assert not close(outputs[0][0], plain, 1e-2)


@pytest.mark.parametrize("mode", ["no_grad", "eval", "training", "folded"])
def test_hooks_fire(mode):
    network = randomise(segformer("b0", 5))
    plain = network.fold()
    images = torch.rand(1, 3, 64, 64)
    mlp = network.stages[0].blocks[0].mlp
    decoder = network.decoder
    hooked = {"fc1": mlp.fc1, "dwconv": mlp.dwconv, "fc2": mlp.fc2, "fuse": decoder.fuse,
              "linear": decoder.linear[1], "classifier": decoder.classifier}
    fired = []
    for name, module in hooked.items():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
    if mode == "training":
        network.train()
    if mode == "folded":
        network = network.fold()
    with torch.set_grad_enabled(mode != "no_grad"):
        logits = network(images)
    assert sorted(fired) == sorted(hooked)
    if mode != "training":
        assert close(logits, plain(images))


def test_fold_leaves_alone_what_was_replaced():
    folded = segformer("b0", 2).fold()
    assert isinstance(folded.decoder, FoldedDecoder)
    assert isinstance(folded.stages[0].blocks[0].mlp, FoldedMixFFN)
    network = segformer("b0", 2, dyt_dyl)
    block = network.stages[0].blocks[0]
    block.mlp.fc1 = LoRA(block.mlp.fc1, 32, 128)
    block.attn.q.register_forward_hook(lambda *_: None)
    folded = network.fold().stages[0].blocks[0]
    assert isinstance(folded.mlp, MixFFN) and isinstance(folded.norm2, DyL)
    assert isinstance(folded.norm1, DyL)


CONTAINERS = ("decoder", "decoder.dropout", "stages.0.patch_embed", "stages.0.blocks.0",
              "stages.0.blocks.0.attn", "stages.0.blocks.0.attn.reduce", "stages.0.blocks.0.mlp",
              "stages.3.blocks.0.attn.reduce")


def double_and_shift(module, inputs, output):
    """A forward hook whose result depends on the module's input and on its output."""
    first = inputs[0]
    if isinstance(first, list):                                   # the decoder's
        first = first[0]
    return 2 * output + first.mean()


@pytest.mark.parametrize("place", CONTAINERS)
@pytest.mark.parametrize("change", ["hook", "subclass", "wrapper"])
def test_fold_leaves_alone_what_holds_layers_too(place, change):
    """Each module of the network, not its layers only, does in the folded copy what it did."""
    torch.manual_seed(0)
    network = randomise(segformer("b0", 5, dyt_dyl)).eval()
    images = torch.rand(1, 3, 64, 96)
    plain = network(images)
    module = network.get_submodule(place)
    if change == "hook":
        module.register_forward_hook(double_and_shift)
    elif change == "subclass":
        class Changed(type(module)):
            def forward(self, x):
                return 2 * super().forward(x)
        module.__class__ = Changed
    else:
        wrapped = nn.Sequential(module, nn.Softplus())
        parent, _, name = place.rpartition(".")
        setattr(network.get_submodule(parent), name, wrapped)
    expected = network(images)
    assert not close(expected, plain, 1e-3)
    assert close(network.fold()(images), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_works():
    network = segformer("b0", 5).eval()
    images = torch.rand(1, 3, 64, 96)
    quantised = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})
    with torch.no_grad():
        expected = network(images)
        found = quantised(images)
        assert close(found, expected, 0.05) and not torch.equal(found, expected)
        assert torch.equal(quantised.fold()(images), found)


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("norm", NORMS)
def test_a_checkpoint_rebuilds_the_model(norm, tmp_path):
    network = randomise(segformer("b0", 3, NORMS[norm]))
    network.classes = ["a", "b", "c"]
    network.palette = [(1, 2, 3)] * 3
    network.input_size = (64, 96)
    network.mean += 0.1
    path = tmp_path / "x.pth"
    save_checkpoint(network, path, step=7)
    again = load_checkpoint(path)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(images), again(images))
    assert again.classes == network.classes
    assert again.palette == network.palette
    assert again.input_size == network.input_size
    assert torch.load(path, weights_only=True)["step"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


class Gain(nn.Module):
    """A norm whose parameter is not called `weight`."""

    def __init__(self, dim):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        return self.gain * x


@pytest.mark.parametrize("norm", [Gain, nn.Identity])
def test_any_norm_in_norms_is_saved_and_loaded(norm, tmp_path, monkeypatch):
    monkeypatch.setitem(NORMS, "own", lambda dim, site: norm(dim))
    network = segformer("b0", 3, NORMS["own"]).eval()
    save_checkpoint(network, tmp_path / "x.pth")
    again = load_checkpoint(tmp_path / "x.pth")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(images), again(images))


def test_a_head_for_other_classes_is_new_and_said(tmp_path, capsys):
    network = randomise(segformer("b0", 3))
    save_checkpoint(network, tmp_path / "x.pth")
    again = load_checkpoint(tmp_path / "x.pth", num_classes=7)
    assert again.num_classes == 7
    assert torch.equal(again.decoder.fuse.weight, network.decoder.fuse.weight)
    said = "205/207 tensors, ImageNet mean/std, new head (the file's has 3 classes)"
    assert said in capsys.readouterr().out


def test_another_decoder_width_is_found_and_kept(tmp_path):
    network = segformer("b0", 3, width=64)
    save_checkpoint(network, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").decoder.fuse.weight.shape == (64, 256, 1, 1)


@pytest.mark.parametrize("mean,std,words", [
    (MEAN, STD, "ImageNet mean/std"),
    ((0, 0, 0), (1, 1, 1), "no mean/std"),
    ((0.5, 0.5, 0.5), (0.25, 0.2, 0.1), "mean [0.5, 0.5, 0.5], std [0.25, 0.2, 0.1]"),
])
def test_the_normalisation_is_said(mean, std, words):
    network = segformer("b0", 2)
    network.mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
    network.std.copy_(torch.tensor(std).view(1, 3, 1, 1))
    assert model_file.describe_normalisation(network) == words


class Code:
    """A pickle that runs a command when it is opened."""

    def __reduce__(self):
        return (open, ("hacked", "w"))


FILES = {"code": pickle.dumps(Code()), "text": b"not a checkpoint", "empty": b""}
CONTENTS = {"code inside": {"state_dict": Code()}, "list": [1, 2]}
CHANGES = {                                 # entries of a good checkpoint that do not fit it
    "norm": {"norm": ["ln"]},
    "eps": {"layer_norm_eps": ["x"] * 30},
    "eps count": {"layer_norm_eps": [1e-6]},
    "no eps": {"layer_norm_eps": None},
    "size": {"input_size": 5},
    "classes": {"classes": ["a"]},
    "variant": {"variant": "b7"},
    "variants": {"variant": ["b0"]},
    "other variant": {"variant": "b2"},
    "no tensors": {"model": 5},
}
WEIGHTS = {                                 # tensors that do not belong in one
    "unknown": {"extra.weight": torch.zeros(1)},
    "shape": {"decoder.fuse.weight": torch.zeros(256, 512, 1, 1)},
    "key": {7: torch.zeros(1)},
    "no head": {"decoder.classifier.weight": torch.zeros(0, 256, 1, 1)},
    "flat head": {"decoder.classifier.weight": torch.tensor(1.0)},
    "sparse": {"decoder.fuse.weight": torch.zeros(256, 1024).to_sparse()},
    "huge": {"decoder.classifier.weight": torch.zeros(1).expand(10 ** 9, 256, 1, 1)},
}


def write_bad(path, what):
    """Write one kind of bad checkpoint to `path`."""
    good = segformer("b0", 3)
    save_checkpoint(good, path)
    content = torch.load(path, weights_only=True)
    if what in FILES:
        path.write_bytes(FILES[what])
    elif what in CONTENTS:
        torch.save(CONTENTS[what], path)
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    elif what == "missing":
        del content["model"]["stages.1.norm.bias"]
        torch.save(content, path)
    elif what == "bomb":
        pack(path)
    elif what in CHANGES:
        torch.save(content | CHANGES[what], path)
    elif what in WEIGHTS:
        content["model"] |= WEIGHTS[what]
        torch.save(content, path)


def pack(path):
    """Write a torch file's records again, compressed."""
    packed_path = path.with_name("packed.pth")
    packed = zipfile.ZipFile(packed_path, "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive, packed:
        for entry in archive.infolist():
            packed.writestr(entry, archive.read(entry), zipfile.ZIP_DEFLATED)
    packed_path.replace(path)


BAD = {
    "code": "nothing in it was run",
    "code inside": "not run",
    "truncated": "it is damaged",
    "text": "it is damaged",
    "list": "list",
    "empty": "it is damaged",
    "norm": "norm",
    "eps": "is damaged",
    "eps count": "is damaged",
    "no eps": "it has no layer_norm_eps",
    "size": "is damaged",
    "classes": "is damaged",
    "variant": "is of a SegFormer 'b7', which is not in model.SIZES",
    "variants": "which is not in model.SIZES",
    "other variant": "is not this network",
    "no tensors": "named tensors",
    "key": "named tensors",
    "no head": "without classes",
    "flat head": "without classes",
    "missing": "lacks 1 tensors, first stages.1.norm.bias",
    "unknown": "unknown 1 tensors, first extra.weight",
    "shape": "wrong shapes for 1 tensors, first decoder.fuse.weight",
    "bomb": "it is damaged",
    "sparse": "named tensors",
    "huge": "more bytes than the file",
}


@pytest.mark.parametrize("what", BAD)
def test_bad_checkpoints_are_a_sentence_and_run_nothing(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bad(tmp_path / "bad.pth", what)
    with pytest.raises(CheckpointError, match=BAD[what]) as caught:
        load_checkpoint(tmp_path / "bad.pth")
    assert "bad.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


def test_what_cannot_be_rebuilt_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="folded"):
        save_checkpoint(segformer("b0", 2).fold(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="NORMS"):
        save_checkpoint(segformer("b0", 2, lambda dim, site: nn.Identity()), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="b7"):
        segformer("b7", 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_written_whole_or_not_at_all(shared, tmp_path):
    path = tmp_path / "x.bin"
    with write_atomically(path, shared) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    with pytest.raises(KeyboardInterrupt), write_atomically(path, shared) as file:
        file.write(b"second")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"first" and [p.name for p in tmp_path.iterdir()] == ["x.bin"]
    nowhere = tmp_path / "none" / "x.bin"
    with pytest.raises(FileNotFoundError), write_atomically(nowhere, shared):
        pass


def test_a_checkpoint_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write .*untouched"):
        save_checkpoint(segformer("b0", 2), tmp_path / "none" / "x.pth")
