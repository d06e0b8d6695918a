"""`python data.py SPEC`: all that is wrong is found in one pass, and what is there is shown."""

import shutil

import numpy as np
import pytest
from PIL import Image

from conftest import command, write_folder
from data import DatasetError, open_dataset
from extras import check_data
from small_datasets import (
    BROKEN_FOLDERS,
    BROKEN_IMAGES,
    break_folder,
    break_image,
    save,
    write_camvid,
    write_cityscapes,
    write_cityscapes_frame,
)


def test_check_command_sees_half_a_split_and_odd_names(tmp_path):
    sheet = tmp_path / "sheet.png"
    spec = write_camvid(tmp_path / "camvid")
    shutil.rmtree(tmp_path / "camvid" / "valannot")
    output = command("data.py", spec, "--sheet", sheet, code=2)
    assert "valannot: there is no such folder" in output
    output = command("data.py", "toy", "--split", "val", "--sheet", tmp_path / "sheet", code=2)
    assert "sheet: its suffix is no picture's" in output
    spec = write_folder(tmp_path / "set")
    classes = tmp_path / "set" / "classes.txt"
    classes.write_text("road\nsky\ncar\n", encoding="utf-8-sig")
    assert open_dataset(spec, "train").classes[0] == "road"
    assert "no test split" in command("data.py", spec, "--sheet", sheet)


def test_check_command_finds_everything_in_one_pass(tmp_path):
    spec = write_folder(tmp_path / "set")
    for what in ("label id", "truncated"):
        break_folder(tmp_path / "set", what)
    save(tmp_path / "set" / "labels" / "frame_0.png", np.full((40, 48), 9, np.uint8))
    output = command("data.py", spec, "--sheet", tmp_path / "sheet.png", "--all", code=2)
    assert "label id 77" in output and "label id 9" in output
    assert "images/frame_2.png: not an image" in output           # its label is wrong too
    assert (tmp_path / "sheet.png").exists()
    output = command("data.py", "toy", "--split", "val", "--sheet", tmp_path / "toy.png")
    assert "toy val: 50 frames of 256x128 (50); 8 of 8 classes met" in output
    assert Image.open(tmp_path / "toy.png").width > 900


@pytest.mark.parametrize("what", ["label id", "no classes"])
def test_check_command_says_what_opening_says(what, tmp_path):
    spec = write_folder(tmp_path / "set")
    break_folder(tmp_path / "set", what)
    with pytest.raises(DatasetError, match=BROKEN_FOLDERS[what]) as caught:
        dataset = open_dataset(spec, "train")
        [dataset[i] for i in range(len(dataset))]
    output = command("data.py", spec, "--sheet", tmp_path / "sheet.png", code=2)
    assert str(caught.value) in output


def test_what_is_wrong_with_many_files_is_said_once(tmp_path):
    spec = write_folder(tmp_path / "set", frames=12)
    images, labels = tmp_path / "set" / "images", tmp_path / "set" / "labels"
    for i in range(12):
        save(labels / f"frame_{i}.png", np.full((40, 48), 70 + i, np.uint8))
    (images / "frame_3.png").write_text("not an image")
    output = command("data.py", spec, "--sheet", tmp_path / "sheet.png", code=2)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert f"{labels}/frame_0.png: label id 70 is not one of set's" in errors[0]
    others = " (and 11 more: frame_1.png, frame_10.png, frame_11.png, ...; --all says each)"
    assert errors[0].endswith(others)
    assert f"{images}/frame_3.png: not an image" in errors[1] and "more" not in errors[1]
    output = command("data.py", spec, "--sheet", tmp_path / "sheet.png", "--all", code=2)
    for i in range(12):
        assert f"error: {labels}/frame_{i}.png: label id {70 + i} is" in output
    assert "more" not in output


def test_what_stops_every_split_is_said_once(folder, tmp_path):
    (tmp_path / "set" / "labels" / "frame_2.png").unlink()
    output = command("data.py", folder, "--sheet", tmp_path / "sheet.png", code=2)
    assert output.count("error: ") == 1 and output.count("this image has no label") == 1


@pytest.mark.parametrize("kind", BROKEN_IMAGES)
def test_the_check_goes_on_after_a_broken_image(kind, folder, tmp_path):
    break_image(kind, tmp_path / "set" / "images" / "frame_3.png")
    found = check_data.check(open_dataset(folder, "train"))
    assert len(found.problems) == 1 and found.sizes == {(40, 48): 4}


def test_check_command_takes_folds(folder, tmp_path):
    output = command("data.py", folder, "--fold", 0, "--folds", 3, "--sheet", tmp_path / "s.png")
    assert "set train: 4 frames" in output and "set val: 2 frames" in output
    assert "set test" not in output and "no test" not in output


def test_what_is_in_no_list_is_counted(folder, tmp_path):
    root = tmp_path / "set"
    args = ("data.py", folder, "--sheet", tmp_path / "sheet.png")
    (root / "train.txt").write_text("frame_0\nframe_2\n")
    (root / "val.txt").write_text("frame_1\nframe_3\n")
    (root / "labels" / "frame_4.png").unlink()                    # not labelled yet
    assert "in no list, so not used: 2 of 6 images, the first frame_4.png" in command(*args)
    (root / "val.txt").write_text("frame_1\nframe_3\nframe_4\n")
    output = command(*args, code=2)
    assert "val.txt: no label has the stem 'frame_4'" in output and output.count("error: ") == 1


def test_cityscapes_secret_test_labels_are_a_note(tmp_path):
    """Defect 7: they used to be checked as if they were labels, and scored as dashes."""
    spec = write_cityscapes(tmp_path / "set")
    dummy = np.full((34, 64), 3, np.uint8)
    write_cityscapes_frame(tmp_path / "set", "test", "berlin_000000_000019", dummy)
    output = command("data.py", spec, "--sheet", tmp_path / "sheet.png")
    assert "no test split" in output and "keeps the labels of its test split to itself" in output
    assert "Cityscapes train: 4 frames" in output and "error" not in output
    output = command("data.py", spec, "--split", "test", "--sheet", tmp_path / "s.png", code=2)
    assert "error" in output and "keeps the labels of its test split to itself" in output
