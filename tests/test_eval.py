"""Scores against plain counting, the evaluation of a model, and eval.py as a user calls it."""

import json
import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import export
from conftest import command
from data import CITYSCAPES, IGNORE, open_dataset
from eval import confusion_matrix, evaluate, no_nan, scores, segment, table
from model import SIZES, load_checkpoint, save_checkpoint, segformer


@pytest.fixture
def checkpoint(tmp_path):
    """A random B0 for the three classes of the test folder."""
    torch.manual_seed(0)
    network = segformer("b0", 3)
    network.classes = [f"class {c}" for c in range(3)]
    save_checkpoint(network, tmp_path / "net.pth")
    return tmp_path / "net.pth"


def test_confusion_and_scores_by_counting():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 4, (3, 20, 30)), rng.integers(0, 4, (3, 20, 30))
    truth[truth == 2] = IGNORE                                    # class 2 has no truth
    confusion = confusion_matrix(torch.from_numpy(guess), torch.from_numpy(truth), 4)
    result = scores(confusion)
    for t in range(4):
        for p in range(4):
            assert confusion[t, p] == ((truth == t) & (guess == p) & (truth != IGNORE)).sum()
        both = ((truth == t) & (guess == t)).sum()
        either = (((truth == t) | (guess == t)) & (truth != IGNORE)).sum()
        assert result["iou"][t] == pytest.approx(both / either)
        if t != 2:
            assert result["acc"][t] == pytest.approx(both / (truth == t).sum())
    assert math.isnan(result["acc"][2]) and result["iou"][2] == 0                 # predicted, though it is not there: wrong
    assert result["miou"] == pytest.approx(np.mean(result["iou"])) and result["macc"] == pytest.approx(np.nanmean(result["acc"]))
    assert result["aacc"] == pytest.approx((truth == guess)[truth != IGNORE].mean())
    assert confusion.dtype == torch.int64


def test_absent_classes_are_nan_and_left_out():
    result = scores(torch.tensor([[8, 2, 0], [0, 10, 0], [0, 0, 0]]))
    assert math.isnan(result["iou"][2]) and result["miou"] == pytest.approx((0.8 + 10 / 12) / 2)
    assert no_nan(result)["iou"][2] is None
    assert confusion_matrix(torch.zeros(2, 2, dtype=torch.uint8), torch.full((2, 2), IGNORE, dtype=torch.uint8), 3).sum() == 0


class Oracle(torch.nn.Module):
    """A network that sees the class in the brightness (80 a class) and answers at a quarter of the size."""
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[2:]))
        small = torch.nn.functional.avg_pool2d(images[:, :1], 4, ceil_mode=True) * 255 - 10
        return -(small - 80 * torch.arange(3).view(1, 3, 1, 1)).abs()


def test_evaluate_scores_at_the_labels_size_whatever_the_input_size(folder):
    dataset, model = open_dataset(folder, "val"), Oracle().train()
    full, half, quarter = (scores(evaluate(model, dataset, *args)) for args in ((), ((32, 40),), (None, True)))
    assert model.training and set(model.sizes) == {(40, 48), (32, 40)}
    assert full["miou"] == quarter["miou"] == 1 and half["miou"] > 0.8
    assert evaluate(model, dataset).sum() == sum((dataset[i][1] != IGNORE).sum() for i in range(len(dataset)))
    assert evaluate(model, dataset, quarter=True).sum() <= len(dataset) * 10 * 12


def test_logits_are_resized_before_the_argmax():
    model = Oracle()
    model.forward = lambda images: torch.tensor([[[[0.0, 0.0]], [[-1.0, 3.0]]]])    # the border is where the line crosses 0
    assert segment(model, torch.zeros(3, 32, 32, dtype=torch.uint8))[0].tolist() == [0] * 12 + [1] * 20


def network_and_image(H, W, classes=3):
    torch.manual_seed(0)
    return segformer("b0", classes).eval().fold(), torch.randint(0, 256, (3, H, W), dtype=torch.uint8)


def full(model, image, size):
    """Logits of an image, (C, H, W) at `size`, in the plainest way."""
    with torch.no_grad():
        return F.interpolate(model(image[None].float() / 255), size=size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("window, stride", [((64, 48), (32, 16)), ((64, 64), None), ((130, 40), (7, 40)), ((500, 500), None)])
def test_windows_add_up_where_they_overlap(window, stride):
    model, image = network_and_image(130, 97)
    h, w = min(window[0], 130), min(window[1], 97)
    dy, dx = stride or (48, 48)
    total = torch.zeros(3, 130, 97)
    for top in sorted({min(y, 130 - h) for y in range(0, 130, dy)}):
        for left in sorted({min(x, 97 - w) for x in range(0, 97, dx)}):
            total[:, top:top + h, left:left + w] += full(model, image[:, top:top + h, left:left + w], (h, w))
    assert torch.equal(segment(model, image, (32, 32), window=window, stride=stride).long(), total.argmax(0))


def test_scales_and_mirror_images_are_averaged():
    model, image = network_and_image(64, 96)
    total = torch.zeros(3, 64, 96)
    for size in ((48, 72), (64, 96)):
        resized = torch.from_numpy(np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BILINEAR))).permute(2, 0, 1)
        total += full(model, resized, (64, 96)).softmax(0) + full(model, resized.flip(2), (64, 96)).softmax(0).flip(2)
    found = segment(model, image, scales=(0.75, 1.0), flip=True)
    assert (found == total.argmax(0)).float().mean() > 0.999      # sums in another order: ties may fall otherwise
    assert (found != segment(model, image)).any()


def test_table_has_differences_and_dashes():
    a, b = scores(torch.tensor([[5, 5], [0, 10]])), scores(torch.tensor([[10, 0], [0, 0]]))
    text = table(["one", "two"], [a, b], ["road", "sky"])
    assert "+50.00" in text and "-" in text.splitlines()[3] and text.count("\n") == 7


def test_command_scores_several_checkpoints(folder, checkpoint, tmp_path):
    other = checkpoint.with_name("other.pth")
    other.write_bytes(checkpoint.read_bytes())
    output = command("eval.py", checkpoint, other, "--data", folder, "--json", tmp_path / "s.json", "--overlay", tmp_path / "pictures")
    assert "scored at the labels' full resolution" in output and "+0.00" in output and "mIoU" in output
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["resolution"] == "full" and len(content["checkpoints"]) == 2 and content["frames"] == 1
    assert np.array(content["checkpoints"][0]["confusion"]).shape == (3, 3)
    assert Image.open(tmp_path / "pictures" / "frame_5.png").width > 600
    output = command("eval.py", checkpoint, "--data", folder, "--quarter", "--size", 64, 64)
    assert "a quarter of the input" in output and "input 64x64" in output


def test_command_scores_with_windows_scales_and_flips(folder, checkpoint, tmp_path):
    output = command("eval.py", checkpoint, "--data", folder, "--window", 32, 32, "--stride", 8, 16, "--scales", 1, 1.5, "--flip", "--json", tmp_path / "s.json")
    assert "windows of 32x32, scales 1, 1.5, and mirrored" in output
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["window"] == [32, 32] and content["stride"] == [8, 16] and content["scales"] == [1, 1.5] and content["flip"]
    network = load_checkpoint(checkpoint).fold()
    expected = scores(evaluate(network, open_dataset(folder, "val"), window=(32, 32), stride=(8, 16), scales=(1, 1.5), flip=True))
    assert content["checkpoints"][0]["miou"] == pytest.approx(expected["miou"])


def test_command_scores_in_16_bits_and_says_what_that_moves(folder, checkpoint, tmp_path):
    output = command("eval.py", checkpoint, "--data", folder, "--split", "train", "--amp", "bf16", "--flip", "--json", tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    result, network, dataset = content["checkpoints"][0], load_checkpoint(checkpoint).fold(), open_dataset(folder, "train")
    exact = [segment(network, dataset[i][0], flip=True) for i in range(len(dataset))]
    with torch.autocast("cpu", torch.bfloat16):
        half = [segment(network, dataset[i][0], flip=True) for i in range(len(dataset))]
        expected = evaluate(network, dataset, flip=True)
    assert content["amp"] == "bf16" and result["confusion"] == expected.tolist()
    assert result["same_class"] == pytest.approx((torch.stack(exact) == torch.stack(half)).float().mean().item())
    assert 0.9 < result["same_class"] < 1                                           # 1 would be fp32 against itself
    assert "and mirrored, in bf16" in output and f"{100 * result['same_class']:.3f} % of the pixels have their class in fp32" in output


def test_command_draws_frames_chosen_by_their_score(folder, checkpoint, tmp_path):
    output = command("eval.py", checkpoint, "--data", folder, "--split", "train", "--strip", tmp_path / "strip.png")
    network, dataset = load_checkpoint(checkpoint).fold(), open_dataset(folder, "train")
    alone = [scores(evaluate(network, [dataset[i]], network.input_size))["miou"] for i in range(len(dataset))]
    assert f"the worst ({dataset.stems[int(np.argmin(alone))]})" in output and f"the best ({dataset.stems[int(np.argmax(alone))]})" in output
    assert Image.open(tmp_path / "strip.png").height > 4 * 200


def test_command_draws_the_figures(folder, checkpoint, tmp_path):
    (checkpoint.parent / "log.csv").write_text("step,lr,loss,wce\n1,0.1,2.0,2.0\n2,0.1,1.0,1.0\n")
    output = command("eval.py", checkpoint, "--data", folder, "--plot", tmp_path / "figures")
    assert "miou.png: no scores.csv in" in output
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["confusion_1.png", "loss.png", "radar.png"]
    assert all(Image.open(p).width > 500 for p in (tmp_path / "figures").iterdir())
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    assert "pip install matplotlib" in command("eval.py", checkpoint, "--data", folder, "--plot", tmp_path / "f", code=2, env={"PYTHONPATH": str(tmp_path)})


def test_half_checkpoints_are_half_and_load_on_the_cpu(checkpoint, tmp_path):
    output = command("eval.py", checkpoint, "--half", tmp_path / "half.pth")
    whole, half = load_checkpoint(checkpoint), load_checkpoint(tmp_path / "half.pth")
    assert "weights in fp16, 7.1 MiB (14.2 MiB as given)" in output
    assert next(half.parameters()).dtype == torch.float32 and torch.equal(half.mean, whole.mean)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(half(images), whole(images), atol=5e-3) and not torch.equal(half(images), whole(images))
    whole.decoder.fuse.weight.data[0] = 1e6
    save_checkpoint(whole, tmp_path / "big.pth")
    assert "beyond its range" in command("eval.py", tmp_path / "big.pth", "--half", tmp_path / "h.pth", code=2)


def test_an_exported_pt2_does_what_the_model_does(checkpoint, tmp_path):
    output = command("eval.py", checkpoint, "--export", tmp_path / "net.pt2")
    assert "MiB, images (B, 3, H, W) in [0, 1] -> classes" in output and "1x64x96, 2x150x203" in output and "% of the pixels differ" in output
    model, images, extra = load_checkpoint(checkpoint), torch.rand(3, 3, 97, 110), {"effiseg.json": ""}
    classes = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()(images)
    expected = torch.stack([full(model, (image * 255).byte(), (97, 110)).argmax(0) for image in images])
    again = torch.export.load(tmp_path / "net.pt2").module()((images * 255).byte().float() / 255)
    assert classes.dtype == torch.uint8 and classes.shape == (3, 97, 110) and (again == expected).float().mean() > 0.999
    assert json.loads(extra["effiseg.json"])["output"] == "classes"
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".pt2"] == ["net.pt2"]


def test_an_exported_onnx_does_what_the_model_does(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "b0", SIZES["b0"] | dict(depths=(1, 1, 1, 1)))       # a block a stage: the exporter is slow
    model, images = segformer("b0", 3).eval(), torch.rand(3, 3, 97, 110)
    report = export.export(model, str(tmp_path / "net.onnx"), logits=True)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert np.abs(session.run(None, {"images": images.numpy()})[0] - model(images).numpy()).max() < 1e-4
    assert report["difference"] < 1e-4 and json.loads(session.get_modelmeta().custom_metadata_map["variant"]) == "b0"
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_a_file_that_disagrees_is_not_kept(checkpoint, tmp_path, monkeypatch):
    model = load_checkpoint(checkpoint)
    monkeypatch.setattr(export, "trace", lambda deployed: b"a program")
    monkeypatch.setitem(export.KINDS, ".pt2", (lambda program, path, *rest: Path(path).write_bytes(program), lambda path: lambda images: model(images) + 1e-3, ()))
    with pytest.raises(export.ExportError, match="differ from the model's by 1.0e-03"):
        export.export(model, str(tmp_path / "x.pt2"), logits=True)
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".pt2"]


def test_photos_come_from_folders_below_lists_and_files(checkpoint, tmp_path):
    photos = tmp_path / "photos"
    for name in ("aachen/x.png", "bonn/x.png", "top.webp"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (9, 9, 9)).save(photos / name)
    (photos / "notes.md").write_text("-")
    output = command("eval.py", checkpoint, "--images", photos, "--out", tmp_path / "out", "--flip", "--window", 32, 32)
    assert "3 of 3 photos segmented, windows of 32x32, and mirrored" in output and "1 files in" in output and "notes.md" in output
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png") if "overlay" not in p.name} == {"aachen/x.png", "bonn/x.png", "top.png"}
    (photos / "list.txt").write_text("aachen/x.png\n\ntop.webp\n")
    assert "2 of 2 photos" in command("eval.py", checkpoint, "--images", photos / "list.txt", "--out", tmp_path / "two")
    assert "choose another folder" in command("eval.py", checkpoint, "--images", photos, "--out", photos / "deep" / "out", code=2)


def test_label_ids_are_cityscapes_own(checkpoint, tmp_path):
    torch.manual_seed(0)
    save_checkpoint(segformer("b0", 19), tmp_path / "city.pth")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "x.png")
    for flags in ((), ("--label-ids",)):
        command("eval.py", tmp_path / "city.pth", "--images", tmp_path / "x.png", "--out", tmp_path / f"out{len(flags)}", *flags)
    classes, raw = (np.asarray(Image.open(tmp_path / f"out{i}" / "x.png")) for i in (0, 1))
    assert (np.array([raw_id for raw_id, _, _ in CITYSCAPES.values()])[classes] == raw).all()
    assert "for Cityscapes' 19 classes" in command("eval.py", checkpoint, "--images", tmp_path / "x.png", "--out", tmp_path / "o", "--label-ids", code=2)


def test_command_segments_photos_and_goes_on_after_a_broken_one(checkpoint, tmp_path):
    photos, out = tmp_path / "my photos", tmp_path / "out"
    photos.mkdir()
    for name, size in (("a b.jpg", (101, 67)), ("ü.png", (64, 200))):
        Image.new("RGB", size, (90, 120, 60)).save(photos / name)
    (photos / "broken.jpg").write_bytes(b"no")
    Image.new("RGB", (20, 20)).save(photos / "tiny.png")
    output = command("eval.py", checkpoint, "--images", photos, "--out", out, code=2)
    assert "2 of 4 photos" in output and "broken.jpg: not an image" in output and "tiny.png: 20x20 pixels" in output
    ids = Image.open(out / "a b.png")
    assert ids.size == (101, 67) and ids.mode == "L" and np.asarray(ids).max() < 3
    assert sorted(p.name for p in out.iterdir()) == ["a b.png", "a b_overlay.png", "ü.png", "ü_overlay.png"]
    before = (photos / "ü.png").read_bytes()
    assert "choose another folder" in command("eval.py", checkpoint, "--images", photos / "ü.png", "--out", photos, code=2)
    assert (photos / "ü.png").read_bytes() == before


@pytest.mark.parametrize("args, sentence", [
    (["{net}", "--data", "camvid:/nowhere"], "no such folder"), (["/no/net.pth"], "cannot open checkpoint /no/net.pth"),
    (["{net}", "--data", "toy"], "net.pth has 3 classes, the data (toy) has 8"), (["{net}", "--images", "/no.png", "--out", "{tmp}/o"], "/no.png: there is no such file"),
    (["{net}", "--images", "x.png"], "go together"), (["{net}", "--window", "64", "64", "--stride", "65", "9"], "pixels would be left out"),
    (["{net}", "--stride", "9", "9"], "goes with --window"), (["{net}", "--quarter", "--flip"], "paper's protocol"), (["{net}", "--scales", "0"], "above 0"),
    (["{net}", "--export", "x.tflite"], "must end in .pt2 or .onnx"), (["{net}", "--half", "x", "--export", "y"], "two tasks"),
    (["{net}", "{net}", "--export", "x.pt2"], "takes one checkpoint"), (["{net}", "--logits"], "goes with --export"), (["{net}", "--half", "x", "--json", "y"], "makes none"), (["{net}", "--half", "x", "--amp", "bf16"], "of running the network"), (["{net}", "--size", "8", "8"], "at least 32"), (["{net}", "--device", "tpu9"], "device 'tpu9'"),
    (["{net}", "--split", "training"], "invalid choice"), (["{net}", "--data", "{folder}", "--json", "/no/such/dir/x.json"], "No such file or directory")])
def test_mistakes_are_a_sentence_and_exit_code_2(args, sentence, folder, checkpoint, tmp_path):
    args = [arg.format(net=checkpoint, tmp=tmp_path, folder=folder) for arg in args]
    output = command("eval.py", *args, code=2)
    assert sentence in output


def test_broken_weights_and_seen_folds_are_said(folder, tmp_path):
    network = segformer("b0", 3)
    network.trained_on = dict(data=folder, fold=0, folds=2, fold_by=None)
    save_checkpoint(network, tmp_path / "net.pth")
    assert "it has seen frames" in command("eval.py", tmp_path / "net.pth", "--data", folder)
    assert "it has seen" not in command("eval.py", tmp_path / "net.pth", "--data", folder, "--fold", 0)
    network.decoder.fuse.weight.data[0] = float("nan")
    save_checkpoint(network, tmp_path / "nan.pth")
    assert "not finite" in command("eval.py", tmp_path / "nan.pth", "--data", folder, code=2)


def test_classes_in_another_order_are_refused(folder, tmp_path):
    network = segformer("b0", 3)
    network.classes = ["class 1", "class 0", "class 2"]
    save_checkpoint(network, tmp_path / "net.pth")
    assert "trained on other classes" in command("eval.py", tmp_path / "net.pth", "--data", folder, code=2)
