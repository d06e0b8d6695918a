"""The network against Hugging Face transformers with the same weights, its fold, its sizes, and its checkpoints."""

import json
import pickle
import re
import struct
import zipfile

import pytest
import torch
import transformers
from torch import nn

import model as model_file
from conftest import ROOT, command
from model import (MEAN, NORMS, MixFFN, SIZES, STD, CheckpointError, Decoder, DyL, DyT, Reduce, dyt, dyt_dyl, dyt_dyl_ln, load_checkpoint,
                   save_checkpoint, segformer)
from nvlabs import Flat, segmenter

CLASSES = 19


def randomise(module, seed=0):
    """Weights and BatchNorm statistics such that every parameter matters (fresh biases are zero, fresh norms one)."""
    torch.manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith("running_mean") or tensor.ndim == 1:
            tensor.add_(0.3 * torch.randn_like(tensor))
        elif tensor.ndim == 2:
            tensor.mul_(3)                                        # fresh ones are so small that attention is nearly uniform
    return module.eval()


def peer(variant, kind="SegformerForSemanticSegmentation"):
    size = SIZES[variant]
    config = transformers.SegformerConfig(num_labels=CLASSES, hidden_sizes=list(size["dims"]), depths=list(size["depths"]),
                                          decoder_hidden_size=size["width"])
    return randomise(getattr(transformers, kind)(config))


def close(a, b, tolerance=1e-5):
    """Equal within rounding: the largest difference against the largest value."""
    return (a - b).abs().max().item() <= tolerance * b.abs().max().item()


@pytest.mark.parametrize("variant, count", [("b0", 3_719_027), ("b2", 27_361_235)])
def test_parameter_counts_are_the_published_ones(variant, count):
    assert sum(p.numel() for p in segformer(variant, 19).parameters()) == count


@pytest.mark.parametrize("variant", SIZES)
def test_every_size_has_transformers_tensors(variant):
    """Same shapes as transformers' model of that size, tensor by tensor (on the meta device: nothing is computed)."""
    with torch.device("meta"):
        ours = segformer(variant, CLASSES).state_dict()
        size = SIZES[variant]
        theirs = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(
            num_labels=CLASSES, hidden_sizes=list(size["dims"]), depths=list(size["depths"]), decoder_hidden_size=size["width"]))
    _, renamed, _ = model_file.rename(theirs.state_dict(), "peer")
    assert {name: t.shape for name, t in renamed.items()} == {name: t.shape for name, t in ours.items() if name not in ("mean", "std")}


@pytest.mark.parametrize("variant", ["b0", "b1", "b2"])
def test_logits_and_features_equal_transformers(variant, tmp_path):
    theirs = peer(variant)
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path / "model.safetensors")
    assert all(m.eps == 1e-5 for m in ours.modules() if isinstance(m, nn.LayerNorm))
    images, embeds = torch.rand(2, 3, 75, 130), []
    for module in theirs.modules():
        if type(module).__name__ == "SegformerOverlapPatchEmbeddings":
            module.register_forward_hook(lambda module, inputs, output: embeds.append(output[0]))       # (B, H*W, C)
    with torch.no_grad():
        expected = theirs((images - ours.mean) / ours.std, output_hidden_states=True)
        found = ours.features(images)
        folded = ours.fold().features(images)
    with_gradients = ours.features(images)                        # another path: no slices, no fold
    for features in (found, folded, with_gradients):
        assert close(features.logits, expected.logits)
        assert all(close(a, b) for a, b in zip(features.stages, expected.hidden_states[-4:], strict=True))
        assert all(close(a.flatten(2).transpose(1, 2), b) for a, b in zip(features.patch_embeds, embeds, strict=True))
    save_checkpoint(ours, tmp_path / "ours.pth")
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path / "ours.pth")(images), found.logits)


@pytest.mark.parametrize("form", ["safetensors", "bin", "state_dict", "encoder", "classifier"])
def test_reads_what_transformers_writes(form, tmp_path, capsys):
    kind = {"encoder": "SegformerModel", "classifier": "SegformerForImageClassification"}.get(form, "SegformerForSemanticSegmentation")
    theirs, path = peer("b0", kind), tmp_path / "model.safetensors"
    theirs.save_pretrained(tmp_path)
    if form == "bin":                                             # the hub's older files: the same names in a torch file
        path = tmp_path / "pytorch_model.bin"
        torch.save(model_file.read_safetensors(tmp_path / "model.safetensors"), path)
    elif form == "state_dict":
        path = tmp_path / "weights.bin"
        torch.save(theirs.state_dict(), path)
    bare = form in ("encoder", "classifier")
    if bare:
        with pytest.raises(CheckpointError, match="encoder without a decoder"):
            load_checkpoint(path)
    ours = load_checkpoint(path, CLASSES if bare else None)
    loaded = "192/207 tensors, ImageNet mean/std, new decoder" if bare else "207/207 tensors, ImageNet mean/std"
    assert re.search(rf"SegFormer-B0, 19 classes, (Hugging Face|transformers 5), {loaded}\n", capsys.readouterr().out)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs((images - ours.mean) / ours.std, output_hidden_states=True).hidden_states[-1]
        assert close(ours.features(images).stages[-1], expected)


def nvlabs_file(form, path):
    """Write random weights in one of the formats with NVlabs' names. -> (the network that wrote it, its input's mean and std)"""
    torch.manual_seed(0)
    theirs = randomise(Flat("b1" if form == "encoder" else "b0", {"segmenter": 19, "encoder": None}.get(form, 20))).eval()
    tensors = theirs.state_dict()
    content = {"segmenter": lambda: segmenter(tensors), "teacher": lambda: {f"module.{key}": t for key, t in tensors.items()},
               "encoder": lambda: tensors | {"head.weight": torch.zeros(1000, 512), "head.bias": torch.zeros(1000)},
               "norm": lambda: {key.replace("fuse.bn", "fuse.norm"): t for key, t in tensors.items()},
               "student": lambda: {"state_dict": {f"student.{key}": t for key, t in tensors.items()}
                                   | {f"embed{i}_linearproject.weight": torch.zeros(2, 2) for i in range(1, 5)}}}[form]()
    torch.save(content, path, _use_new_zipfile_serialization=form != "encoder")     # the oldest files are not archives yet
    return theirs, (MEAN, STD) if form in ("segmenter", "encoder") else ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("form,said", [
    ("segmenter", "SegFormer-B0, 19 classes, NVlabs segmenter, 207/207 tensors, ImageNet mean/std"),
    ("encoder", "SegFormer-B1, 5 classes, NVlabs encoder, 192/207 tensors, ImageNet mean/std, new decoder"),
    ("teacher", "SegFormer-B0, 19 classes, TransKD/EffiSeg without its void output, 207/207 tensors, no mean/std"),
    ("norm", "SegFormer-B0, 19 classes, TransKD/EffiSeg without its void output, 207/207 tensors, no mean/std"),
    ("student", "without its void output (4 tensors of its distillation left out), 207/207 tensors, no mean/std")])
def test_reads_the_files_with_nvlabs_names(form, said, tmp_path, capsys):
    theirs, (mean, std) = nvlabs_file(form, tmp_path / "x.pth")
    ours = load_checkpoint(tmp_path / "x.pth", 5 if form == "encoder" else None)
    assert said in capsys.readouterr().out
    images = torch.rand(2, 3, 75, 130)
    normalised = (images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        features = ours.features(images)
        assert all(close(a, b) for a, b in zip(features.stages, theirs.stages(normalised), strict=True))
        if form != "encoder":
            assert close(features.logits, theirs(normalised)[:, :19])
            assert close(ours.fold()(images), features.logits)
    assert ours.classes == (list("abcdefghijklmnopqrs") if form == "segmenter" else None)


def test_a_head_without_void_is_kept_whole(tmp_path):
    torch.manual_seed(0)
    torch.save(Flat("b0", 11).state_dict(), tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").num_classes == 11
    assert load_checkpoint(tmp_path / "x.pth", 10).decoder.classifier.weight.shape[0] == 10       # the 11th is void


def test_a_hugging_face_folder_tells_names_and_normalisation(tmp_path, capsys):
    theirs = peer("b0")
    theirs.config.id2label = {i: f"class {i}" for i in range(CLASSES)}
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}))
    ours, images = load_checkpoint(tmp_path), torch.rand(1, 3, 64, 64)
    assert "Hugging Face, 207/207 tensors, mean [0.5, 0.4, 0.3], std [0.2, 0.2, 0.1]" in capsys.readouterr().out
    assert ours.classes == [f"class {i}" for i in range(CLASSES)]
    with torch.no_grad():
        assert close(ours(images), theirs((images - torch.tensor([.5, .4, .3]).view(3, 1, 1)) / torch.tensor([.2, .2, .1]).view(3, 1, 1)).logits)


def test_another_decoder_width_is_found_and_kept(tmp_path):
    network = segformer("b0", 3, width=64)
    save_checkpoint(network, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").decoder.fuse.weight.shape == (64, 256, 1, 1)


@pytest.mark.parametrize("folder,message", [({}, "cannot open"), ({"config.json": "{"}, "damaged"), ({"config.json": "[]"}, "damaged"),
                                            ({"config.json": '{"model_type": "bert"}', "pytorch_model.bin": ""}, "of a 'bert'"),
                                            ({"config.json": '{"model_type": "segformer"}'}, "no model.safetensors")])
def test_a_folder_that_is_none_is_a_sentence(folder, message, tmp_path):
    for name, text in folder.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_safetensors_are_read_as_the_package_reads_them(tmp_path):
    from safetensors.torch import load_file, save_file
    tensors = {"a": torch.randn(3, 4), "h": torch.randn(5).half(), "b": torch.randn(2, 2).bfloat16(), "i": torch.tensor(7), "e": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    ours, theirs = model_file.read_safetensors(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 32), (101, 203), (224, 224)])
@pytest.mark.parametrize("norm", NORMS)
def test_any_size_trains_and_folds_to_the_same_outputs(size, norm):
    network = randomise(segformer("b0", 5, NORMS[norm]))
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        logits, folded = network(images), network.fold()(images)
    assert logits.shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))
    assert close(folded, logits) and close(network(images).detach(), logits)
    network.train()(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_attention_in_bf16_on_a_cpu_is_the_attention(monkeypatch):
    """Its own path, cut by queries: against softmax(q k^T / sqrt(d)) v in fp64; elsewhere PyTorch's kernel."""
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(2, 5, tokens, 32).bfloat16() for tokens in (300, 70, 70))
    exact = (q.double() @ k.double().transpose(2, 3) / 32 ** 0.5).softmax(3) @ v.double()
    monkeypatch.setattr(model_file, "CACHED", 2 * 5 * 70 * 128)   # 128 queries at once: two whole cuts and a rest
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)
    with torch.no_grad():
        ours = model_file.attend(q, k, v)
    monkeypatch.undo()
    with torch.no_grad():
        error = (ours - exact).square().mean().sqrt()
        assert ours.dtype == torch.bfloat16 and error < 0.02 * exact.std()           # scores of +-30 in 8 bits
        assert torch.equal(model_file.attend(q[:1].float(), k[:1].float(), v[:1].float()), nn.functional.scaled_dot_product_attention(q[:1].float(), k[:1].float(), v[:1].float()))
    assert model_file.attend(q.requires_grad_(), k, v).requires_grad


def test_maps_larger_than_the_cache_are_computed_in_slices(monkeypatch):
    network, images = randomise(segformer("b0", 5)), torch.rand(1, 3, 96, 160)
    with torch.no_grad():
        whole = network(images)
        monkeypatch.setattr(model_file, "CACHED", 1)              # slices of 64 channels everywhere
        assert len(model_file.slices(256, torch.zeros(1, 24, 40, 32))) == 4
        assert close(network(images), whole)


def test_decoder_equals_the_published_one():
    """Project, upsample, concatenate c4..c1, 1x1 convolution, BatchNorm, ReLU, classify; values and gradients."""
    torch.manual_seed(0)
    decoder, F = Decoder((8, 16, 24, 32), 12, 3).double().train(), nn.functional
    decoder.dropout.p = 0.0
    stages = [torch.randn(2, dim, 16 // 2 ** i, 24 // 2 ** i, dtype=torch.float64) for i, dim in enumerate((8, 16, 24, 32))]

    def published():
        maps = [F.linear(x.permute(0, 2, 3, 1), linear.weight, linear.bias).permute(0, 3, 1, 2) for x, linear in zip(stages, decoder.linear)]
        maps = [F.interpolate(x, size=(16, 24), mode="bilinear", align_corners=False) for x in maps]
        return decoder.classifier(F.relu(decoder.norm(decoder.fuse(torch.cat(maps[::-1], 1)))))

    expected, found = published(), decoder(stages)
    assert torch.allclose(found, expected, rtol=1e-10)
    parameters = list(decoder.parameters())
    for a, b in zip(torch.autograd.grad(found.square().sum(), parameters), torch.autograd.grad(expected.square().sum(), parameters)):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    network = segformer("b2", 2)
    block, decoder = network.stages[2].blocks[0], network.decoder
    assert block.attn.q.weight.std().item() == pytest.approx(0.02, rel=0.03) and not block.attn.q.bias.any()
    assert block.mlp.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert network.stages[0].patch_embed.proj.weight.std().item() == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.05)
    assert decoder.fuse.weight.std().item() == pytest.approx((2 / 768) ** 0.5, rel=0.01)
    assert isinstance(decoder.dropout, nn.Dropout2d) and decoder.dropout.p == 0.1
    assert [block.drop for stage in network.stages for block in stage.blocks] == pytest.approx(torch.linspace(0, 0.1, 16).tolist())


def test_norm_sites():
    """The hook is asked at every site: 4 patch embeddings, 16 in blocks, 6 reductions, 4 stage ends in B0."""
    sites = []
    segformer("b0", 2, lambda dim, site: sites.append(site) or nn.LayerNorm(dim))
    assert [sites.count(site) for site in ("patch_embed", "block", "sr", "stage")] == [4, 16, 6, 4]
    for norm_fn, dyts, dyls in ((dyt, 4, 0), (dyt_dyl, 4, 26), (dyt_dyl_ln, 4, 22)):
        modules = list(segformer("b0", 2, norm_fn).modules())
        assert sum(isinstance(m, DyT) for m in modules) == dyts and sum(isinstance(m, DyL) for m in modules) == dyls
    eps = {type(m).__name__: m.norm.eps for m in segformer("b0", 2).modules() if isinstance(m, Reduce)}
    assert eps == {"Reduce": 1e-5} and segformer("b0", 2).stages[0].blocks[0].norm1.eps == 1e-6


def test_dyt_and_dyl_follow_their_equations():
    x = torch.randn(2, 3, 4, 5)
    for layer in (DyT(5), DyL(5)):
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias), nn.init.normal_(layer.alpha)
        inner = layer.alpha * x
        assert torch.allclose(layer(x), layer.weight * (inner.tanh() if isinstance(layer, DyT) else inner) + layer.bias, atol=1e-6)
    assert DyT(5).alpha.shape == () and DyL(5).alpha.shape == (5,)


def test_fold_removes_every_dyl_but_those_at_stage_ends():
    folded = segformer("b0", 2, dyt_dyl).fold()
    assert sum(isinstance(m, DyL) for m in folded.modules()) == 4
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) and not any(p.requires_grad for p in folded.parameters())


def test_dyt_under_autocast_has_finite_gradients():
    """Its scalar alpha sums the gradient of a whole map; in float16 that overflows."""
    layer, x = DyT(8), torch.randn(4, 64, 64, 8).half()
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


@pytest.mark.parametrize("bad", [torch.rand(1, 3, 31, 64), torch.rand(3, 64, 64), torch.rand(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])
def test_bad_images_are_a_sentence(bad):
    with pytest.raises(ValueError, match="SegFormer takes float images"):
        segformer("b0", 2)(bad)


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("norm", NORMS)
def test_a_checkpoint_rebuilds_the_model(norm, tmp_path):
    network = randomise(segformer("b0", 3, NORMS[norm]))
    network.classes, network.palette, network.input_size = ["a", "b", "c"], [(1, 2, 3)] * 3, (64, 96)
    network.mean += 0.1
    save_checkpoint(network, tmp_path / "x.pth", step=7)
    again = load_checkpoint(tmp_path / "x.pth")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(images), again(images))
    assert (again.classes, again.palette, again.input_size) == (network.classes, network.palette, network.input_size)
    assert torch.load(tmp_path / "x.pth", weights_only=True)["step"] == 7 and [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_a_head_for_other_classes_is_new_and_said(tmp_path, capsys):
    network = randomise(segformer("b0", 3))
    save_checkpoint(network, tmp_path / "x.pth")
    again = load_checkpoint(tmp_path / "x.pth", num_classes=7)
    assert again.num_classes == 7 and torch.equal(again.decoder.fuse.weight, network.decoder.fuse.weight)
    assert "205/207 tensors, ImageNet mean/std, new head (the file's has 3 classes)" in capsys.readouterr().out


class Code:
    """A pickle that runs a command when it is opened."""

    def __reduce__(self):
        return (open, ("hacked", "w"))


def write_bad(path, what):
    """Write one kind of bad checkpoint to `path`."""
    good = segformer("b0", 3)
    save_checkpoint(good, path)
    content = torch.load(path, weights_only=True)
    if what == "code":
        path.write_bytes(pickle.dumps(Code()))
    elif what == "code inside":
        torch.save({"state_dict": Code()}, path)
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    elif what == "text":
        path.write_text("not a checkpoint")
    elif what == "list":
        torch.save([1, 2], path)
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "missing":
        del content["model"]["stages.1.norm.bias"]
        torch.save(content, path)
    elif what == "unknown":
        content["model"]["extra.weight"] = torch.zeros(1)
        torch.save(content, path)
    elif what == "shape":
        content["model"]["decoder.fuse.weight"] = torch.zeros(256, 512, 1, 1)
        torch.save(content, path)
    elif what in ("norm", "eps", "eps count", "size", "classes"):
        content |= {"norm": dict(norm=["ln"]), "eps": dict(layer_norm_eps=["x"] * 30), "eps count": dict(layer_norm_eps=[1e-6]),
                    "size": dict(input_size=5), "classes": dict(classes=["a"])}[what]
        torch.save(content, path)
    elif what == "key":
        content["model"][7] = torch.zeros(1)
        torch.save(content, path)
    elif what in ("no head", "flat head"):
        content["model"]["decoder.classifier.weight"] = torch.zeros(0, 256, 1, 1) if what == "no head" else torch.tensor(1.0)
        torch.save(content, path)
    elif what == "mmseg":
        torch.save({"state_dict": {"backbone.layers.0.0.projection.weight": torch.zeros(32, 3, 7, 7)}}, path)
    elif what == "bomb":
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(path.with_name("packed.pth"), "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in archive.infolist():
                packed.writestr(entry, archive.read(entry), zipfile.ZIP_DEFLATED)
        path.with_name("packed.pth").replace(path)
    elif what == "expanded":
        torch.save({name: torch.zeros(1).expand(tensor.shape) if tensor.ndim else tensor for name, tensor in
                    Flat("b0", 3).state_dict().items()}, path)
    elif what == "sparse":
        content["model"]["decoder.fuse.weight"] = torch.zeros(256, 1024).to_sparse()
        torch.save(content, path)
    elif what == "double":
        tensors = Flat("b0", 3).state_dict()
        torch.save(tensors | {"linear_fuse.norm.weight": tensors["linear_fuse.bn.weight"].clone()}, path)
    elif what == "half a file":
        tensors = segmenter(Flat("b0", 3).state_dict())["state_dict"]
        torch.save({"state_dict": dict(list(tensors.items())[:len(tensors) // 2])}, path)
    elif what == "half a decoder":
        torch.save({name: t for name, t in Flat("b0", 3).state_dict().items() if not name.startswith("linear_pred")}, path)
    elif what == "other network":
        torch.save({"layer1.0.conv1.weight": torch.zeros(3)}, path)


BAD = {"code": "nothing in it was run", "code inside": "not run", "truncated": "it is damaged", "text": "it is damaged", "list": "list",
       "empty": "it is damaged", "norm": "norm", "eps": "is damaged", "eps count": "is damaged", "size": "is damaged", "classes": "is damaged",
       "key": "named tensors", "no head": "without classes", "flat head": "without classes", "missing": "lacks 1 tensors, first stages.1.norm.bias", "unknown": "unknown 1 tensors, first extra.weight",
       "shape": "wrong shapes for 1 tensors, first decoder.fuse.weight", "other network": "no SegFormer in a known format", "mmseg": "written by mmseg 1.x",
       "bomb": "it is damaged", "expanded": "more bytes than the file", "sparse": "named tensors", "double": "two tensors for decoder.norm.weight",
       "half a file": "no SegFormer B0-B5, or not all of one", "half a decoder": "no classifier"}


@pytest.mark.parametrize("what", BAD)
def test_bad_checkpoints_are_a_sentence_and_run_nothing(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bad(tmp_path / "bad.pth", what)
    with pytest.raises(CheckpointError, match=BAD[what]) as caught:
        load_checkpoint(tmp_path / "bad.pth")
    assert "bad.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("header", [{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 16]}}, {"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}},
                                    {"a": {"dtype": "X", "shape": [4], "data_offsets": [0, 16]}}, {"a": {}}, [1]])
def test_lying_safetensors_are_a_sentence(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 10 ** 15) + text)
    for name in ("x", "long"):
        with pytest.raises(CheckpointError, match="not a checkpoint that can be read"):
            load_checkpoint(tmp_path / f"{name}.safetensors")


def test_what_cannot_be_rebuilt_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="folded"):
        save_checkpoint(segformer("b0", 2).fold(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="NORMS"):
        save_checkpoint(segformer("b0", 2, lambda dim, site: nn.Identity()), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="b7"):
        segformer("b7", 2)
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_are_refused_or_loaded():
    """A few of the thousands that `python tests/fuzz.py` tries."""
    output = command(ROOT / "tests" / "fuzz.py", "--count", 25)
    assert output.count("25 files") == 4 and output.count("refused") == 4


def test_training_keeps_no_wide_map_of_the_mlp():
    """What autograd keeps of MixFFN is its input, not three maps of four times the width."""
    mlp, x, kept = MixFFN(8).train(), torch.rand(2, 16, 16, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = mlp(x)
    assert max(kept, default=0) < 4 * x.numel()
    gradient, = torch.autograd.grad(out.sum(), x)
    expected, = torch.autograd.grad(mlp.plain(x).sum(), x)
    assert torch.allclose(gradient, expected, atol=1e-6)
