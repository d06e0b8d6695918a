"""The table, the gate, the pictures, and the commands that use a trained student."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import command
from data import open_dataset
from extras import export, prompt_compare, prompt_predict, prompt_scores, prompt_tables
from extras.cli import UsageError
from extras.prompt_checkpoint import load_prompt, save_prompt
from extras.prompt_compare import Row, details, gate, table
from extras.prompt_metrics import ask
from extras.prompt_model import PromptSegmenter
from extras.prompt_words import choose_prompts, file_words
from extras.view_flags import open_model
from model import SIZES, load_checkpoint


def prompt_command(*args, code=0):
    return command("-m", "extras.prompt", *args, code=code)


@pytest.fixture
def student(tmp_path, folder):
    torch.manual_seed(0)
    classes = open_dataset(folder, "train").classes
    network = PromptSegmenter("b0", 8, "letters", choose_prompts(classes, 21, 2), classes)
    network.trained_on = {"data": folder, "fold": None, "folds": 2, "fold_by": None}
    network.input_size = (40, 48)
    network.presence.fc2.bias.data.fill_(1.0)                     # it finds what it is asked for
    save_prompt(network, tmp_path / "student.pth")
    return tmp_path / "student.pth"


def made_up(**changes):
    scores = {
        "miou": 0.6, "miou_ungated": 0.62, "f1": 0.9, "sensitivity": 0.5, "sensitivity_truth": 0.52,
        "ms": 12.0, "mcc": 0.8, "tp": 9, "fp": 1, "fn": 1, "tn": 9, "never_trained": 0.5,
        "empty": 0.1, "argmax": 0.63, "selectivity": 0.4, "cgf1": 41.0, "between_classes": 0.3,
        "between_synonyms": 0.01}
    return scores | changes


# ---------------------------------------------------------------- the table and the gate

def test_the_drop_is_printed_absolute_and_relative():
    rows = [Row("fp16", 8_000_000, made_up()), Row("int4", 2_500_000, made_up(miou=0.54))]
    line = table(rows).splitlines()[-1].split()
    assert line[:3] == ["int4", "2.50", "3.20x"]
    assert line[3:7] == ["0.5400", "0.6200", "+0.0600", "+10.0%"]


def test_details_say_when_there_are_no_negatives():
    scores = made_up(fp=0, tn=0, mcc=math.nan)
    assert "MCC - (no negatives: F1 = 2R/(1+R))" in details(Row("fp16", 1, scores))
    assert "no negatives" not in details(Row("fp16", 1, made_up()))


def test_the_gate_goes_stops_and_holds():
    teacher = made_up()
    assert gate(made_up(), teacher)[0] == "GO"
    assert gate(made_up(miou=0.79 * 0.6 - 0.001), teacher)[0] == "NO-GO"
    assert gate(made_up(sensitivity=0.3), teacher)[0] == "NO-GO"
    assert gate(made_up(selectivity=math.nan), teacher)[0] == "HOLD"
    # What fails, fails, whatever else is not known.
    assert gate(made_up(miou=0.1, selectivity=math.nan), teacher)[0] == "NO-GO"


def test_the_reports_final_model_is_no_go_by_its_own_gate():
    """Teacher and student of the second report; a selectivity nobody measured is granted."""
    teacher = made_up(miou=0.1522, sensitivity=0.3699)
    verdict, reasons = gate(made_up(miou=0.0898, sensitivity=0.1343), teacher)
    assert verdict == "NO-GO"
    assert "miou 0.0898 < 0.1202" in reasons[0] and "sensitivity 0.1343 < 0.2478" in reasons[1]


def test_our_gate_stops_noise():
    teacher = made_up(miou=0.1522, sensitivity=0.3699)
    noise = made_up(miou=0.13, sensitivity=1 / 3, selectivity=0.0)
    verdict, reasons = gate(noise, teacher)
    assert verdict == "NO-GO"
    assert [">=" in reason for reason in reasons] == [True, True, False]


# ---------------------------------------------------------------- the command

def test_compare_prints_the_table_and_writes_it(student, folder, tmp_path):
    pages = tmp_path / "pages"
    output = prompt_command("compare", student, "--teacher", student, "--pictures", pages,
                            "--json", tmp_path / "x.json", "--gate", code=1)
    for word in ("compress", "fp16", "teacher", "int8", "int8+int4", "TP", "cgF1", "agreement"):
        assert word in output, word
    # A network beside itself, but a random one: it does not tell the classes apart.
    assert "NO-GO: " in output and "selectivity" in output.splitlines()[-1]
    content = json.loads((tmp_path / "x.json").read_text())
    rows = content["rows"]
    assert rows["fp16"]["bytes"] > 1.7 * rows["int8"]["bytes"] > 2.5 * rows["int4"]["bytes"]
    assert rows["fp16"]["agreement"] > 0.9
    page = (pages / "index.html").read_text()
    names = sorted(path.name for path in pages.glob("*.png"))
    assert names == ["airplane.png", "boat.png", "class_0.png", "class_1.png", "class_2.png",
                     "segment_everything.png"]
    assert all(name in page for name in names)
    assert Image.open(pages / names[0]).width == 4 * 240 + 3 * 4


def test_a_prompt_is_no_path():
    assert file_words("Segment everything") == "segment_everything"
    assert file_words("../../etc/x y") == "etc_x_y"
    assert file_words("차 / Straße") != file_words("차")
    assert len(file_words("a" * 500)) == 60


def test_a_mode_that_fails_is_a_row_with_its_reason(student, folder, monkeypatch):
    def broken(model, mode, keep=()):
        raise ImportError("Requires mslk >= 1.0.0")

    monkeypatch.setattr(prompt_compare, "packed_prompt", broken)
    dataset = open_dataset(folder, "val")
    model = load_prompt(student)
    questions = ask(dataset.classes)
    rows = [prompt_compare.make_row(model, name, dataset, questions, None)
            for name in ("fp16", "int4")]
    assert rows[0].scores and not rows[0].reason
    assert "int4      failed: Requires mslk >= 1.0.0" in table(rows)


def test_a_network_that_is_broken_is_a_row_with_its_reason(student, folder):
    dataset = open_dataset(folder, "val")
    model = load_prompt(student)
    model.bias.data.fill_(math.nan)
    row = prompt_compare.make_row(model, "fp32", dataset, ask(dataset.classes), None)
    assert "not finite" in row.reason


def test_scores_of_a_network_are_those_of_its_answers(student, folder):
    """What `score` counts for an image is what the network says about it."""
    dataset = open_dataset(folder, "val")
    model = load_prompt(student)
    image, label = dataset[0]
    with torch.no_grad():
        words = model.read(["class 1"])
        mask, presence = prompt_scores.probabilities(model, image, words, label.shape)
        answer = model(image[None].float() / 255, ["class 1"])
    size = tuple(label.shape)
    expected = torch.nn.functional.interpolate(answer.mask, size=size, mode="bilinear")
    assert torch.allclose(mask, expected[0].sigmoid(), atol=1e-5)
    assert torch.allclose(presence, answer.presence[0].sigmoid(), atol=1e-5)


# ---------------------------------------------------------------- photos and files

@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(path)
    return path


def test_predict_writes_a_mask_for_each_prompt(student, photo, tmp_path):
    out = tmp_path / "out"
    output = prompt_command("predict", student, photo, "--prompts", "class 1, zebra", "--out", out)
    assert "'zebra' is not among the 9 prompts" in output and "presence" in output
    assert sorted(path.name for path in out.iterdir()) == [
        "photo.png", "photo_class_1.png", "photo_zebra.png"]
    mask = np.array(Image.open(out / "photo_class_1.png"))
    assert mask.shape == (50, 70) and set(np.unique(mask)) <= {0, 255}


def test_results_that_would_overwrite_each_other_are_refused(student, photo, tmp_path):
    other = tmp_path / "photo_class_1.jpg"
    other.write_bytes(photo.read_bytes())
    output = prompt_command("predict", student, photo, other, "--prompts", "class 1", "--out",
                            tmp_path / "out", code=2)
    assert "both be written to photo_class_1.png" in output
    output = prompt_command("predict", student, photo, "--prompts", "class 1", "--out", tmp_path,
                            code=2)
    assert "is where the photos are" in output


@pytest.mark.parametrize("prompts, sentence", [
    ("car, , tree", "an empty prompt asks for nothing"),
    ("", "an empty prompt asks for nothing"),
    ("자동차", "no letter or digit"),
    ("car, Car", "stands there twice"),
])
def test_prompts_that_cannot_be_asked_are_a_sentence(student, photo, tmp_path, prompts, sentence):
    assert sentence in prompt_command("predict", student, photo, "--prompts", prompts, "--out",
                                      tmp_path / "out", code=2)


@pytest.mark.parametrize("args, sentence", [
    (["predict", "{net}", "/no/photo.jpg", "--prompts", "a", "--out", "{dir}"], "/no/photo.jpg"),
    (["predict", "{plain}", "x.jpg", "--prompts", "a", "--out", "{dir}"], "has no text encoder"),
    (["compare", "{net}", "--gate"], "--gate compares with the teacher"),
    (["compare", "{net}", "--modes", "int2"], "invalid choice: 'int2'"),
    (["compare", "{net}", "--data", "toy"], "3 classes"),
    (["export", "{net}", "x.tflite", "--prompts", "class 1, class 2"], "must end in .pt2 or .onnx"),
    (["export", "{net}", "x.pth", "--prompts", "class 1", "--logits"], "--logits is for"),
    (["quantize", "{net}", "--bits", "3", "--out", "x.pth"], "invalid choice: '3'"),
])
def test_mistakes_are_a_sentence(args, sentence, student, checkpoint, tmp_path):
    args = [arg.format(net=student, plain=checkpoint, dir=tmp_path / "out") for arg in args]
    assert sentence in prompt_command(*args, code=2)


def test_a_fixed_list_becomes_onnx_with_equal_logits(tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    small = SIZES["b0"] | {"depths": (1, 1, 1, 1)}                # the exporter is slow
    monkeypatch.setitem(SIZES, "b0", small)
    torch.manual_seed(0)
    network = PromptSegmenter("b0", 8, "letters", ["class 1", "boat"], ["class 1"])
    student = tmp_path / "student.pth"
    save_prompt(network, student)
    target = tmp_path / "x.onnx"
    prompt_predict.export([str(student), str(target), "--prompts", "class 1, boat", "--logits"])
    assert "mask logits of class 1, boat" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    images = torch.rand(1, 3, 64, 96)
    found = session.run(None, {"images": images.numpy()})[0]
    with torch.no_grad():
        expected = load_prompt(student)(images, ["class 1", "boat"]).mask
    assert np.abs(found - expected.numpy()).max() < 1e-3


def test_a_fixed_list_becomes_a_checkpoint_that_eval_scores(student, folder, tmp_path):
    target = tmp_path / "plain.pth"
    prompt_command("export", student, target, "--prompts", "class 0, class 1, class 2")
    assert load_checkpoint(target).classes == ["class 0", "class 1", "class 2"]
    assert "mIoU" in command("eval.py", target, "--data", folder)


def test_a_trained_word_is_itself_however_it_is_typed(student, capsys):
    model = load_prompt(student)
    trained = list(model.prompts)[0]
    assert prompt_predict.split_prompts(trained.upper(), model) == [trained]
    assert capsys.readouterr().err == ""


def test_quantize_refuses_a_layer_that_is_not_there_and_its_own_input(student, tmp_path):
    small = ("quantize", student, "--bits", 8, "--out", tmp_path / "small.pth", "--keep")
    output = prompt_command(*small, "nonsense", code=2)
    assert "--keep nonsense: no layer has this name" in output
    prompt_command(*small, "decoder.classifier")             # as a SegFormer calls it
    output = prompt_command("quantize", student, "--bits", 8, "--out", student, code=2)
    assert "is what it would be made of" in output
    output = prompt_command("export", student, tmp_path / "one.pt2", "--prompts", "car", code=2)
    assert "--prompts: of one class every pixel is of that class" in output
    output = prompt_command("export", student, student, "--prompts", "car, road", code=2)
    assert "is what it would be made of" in output


def test_quantize_writes_a_student_that_predicts(student, photo, tmp_path):
    small = tmp_path / "small.pth"
    output = prompt_command("quantize", student, "--bits", "4+8", "--out", small)
    assert "bits for each of" in output
    prompt_command("predict", small, photo, "--prompts", "class 1", "--out", tmp_path / "out")
    assert "packed already" in prompt_command("quantize", small, "--bits", 8, "--out",
                                              tmp_path / "x.pth", code=2)
    assert "the whole of it" in command("-m", "extras.quantize", student, "--bits", 4, "--out",
                                        tmp_path / "x.pth", code=2)


# ---------------------------------------------------------------- the page

def test_the_pages_tables_are_made_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_tables, "RESULTS", tmp_path)
    rows = {"fp32": made_up(agreement=0.7, miou=0.5), "teacher": made_up(miou=0.7)}
    for seed, miou in ((0, 0.5), (1, 0.6)):
        rows["fp32"]["miou"] = miou
        content = {"rows": rows}
        (tmp_path / f"supervised-{seed}.json").write_text(json.dumps(content))
    lines = prompt_tables.students().splitlines()
    assert "| B2, the teacher (300 steps) | 1 | 70.0 |" in lines[2]
    assert "| B0, supervised | 2 | 55.0 (50.0, 60.0) |" in lines[3]
    assert lines[-1].startswith("Not run: B0, closed set")
    for make in prompt_tables.TABLES.values():
        assert isinstance(make(), str)


def test_the_page_has_a_mark_for_each_table(tmp_path, monkeypatch):
    page = Path(prompt_tables.PAGE).resolve().read_text()
    for name in prompt_tables.TABLES:
        assert prompt_tables.insert(page, name, "x") is not None
    monkeypatch.setattr(prompt_tables, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("no marks\n")
    monkeypatch.setattr("sys.argv", ["prompt_tables"])
    with pytest.raises(UsageError, match="has no mark"):
        prompt_tables.main()


def test_the_ordinary_commands_name_the_right_one(student, tmp_path, monkeypatch):
    """As a SegFormer its classes would be the entries of a vector."""
    with pytest.raises(UsageError, match=f"python -m extras.prompt compare {student}"):
        open_model(student, None, "cpu")                          # eval.py, predict, demo
    target = tmp_path / "x.onnx"
    monkeypatch.setattr("sys.argv", ["export", str(student), str(target)])
    with pytest.raises(UsageError, match=f"extras.prompt export {student} {target} --prompts"):
        export.main()
    assert not target.exists()
