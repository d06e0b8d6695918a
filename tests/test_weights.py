"""The weights that this repository gives away, and the card beside them."""

import json
from pathlib import Path

import pytest
import torch

from conftest import CAMVID, ROOT, command, write_folder
from data import open_dataset
from extras.view_flags import open_model
from extras.weight_card import file_hash, frame_scores, read_tables, scene_shares
from model import load_checkpoint, save_checkpoint, segformer
from test_model import randomise

WEIGHTS = sorted((ROOT / "weights").glob("*.pth"))
POINTS = 0.5                                                      # another CPU rounds otherwise


@pytest.fixture(params=WEIGHTS, ids=lambda path: path.name)
def given(request):
    """-> (a file of weights/, its folded network, the tables of its card)"""
    path = request.param
    return path, open_model(path, None, torch.device("cpu")), read_tables(path.with_suffix(".md"))


def assert_near(found, table):
    """found: [(name, fraction or [fraction])]; table: {name: [percent]} of a card"""
    assert [name for name, _ in found] == list(table)
    for name, values in found:
        values = values if isinstance(values, list) else [values]
        assert [100 * value for value in values] == pytest.approx(table[name], abs=POINTS)


def test_the_weights_are_the_cards_and_small(given):
    path, network, tables = given
    assert file_hash(path) in path.with_suffix(".md").read_text()
    assert path.stat().st_size < 8 * 2 ** 20
    assert network.classes and network.palette and not list(path.parent.glob("*.partial"))
    assert set(tables) == {"split", "frame", "scene"}
    folder = load_checkpoint(path).trained_on["data"].partition(":")[2]
    assert not Path(folder).is_absolute()                         # of the machine that trained them


def test_what_they_say_is_what_their_card_says(given):
    _, network, tables = given
    assert_near(scene_shares(network), tables["scene"])


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not here")
def test_they_score_what_their_card_says(given):
    _, network, tables = given
    assert_near(frame_scores(network, open_dataset(f"camvid:{CAMVID}", "val")), tables["frame"])


def test_a_card_is_made_of_what_is_measured(tmp_path):
    spec = write_folder(tmp_path / "set")
    for split, frames in (("train", (0, 1)), ("val", (2, 3)), ("test", (4, 5))):
        stems = "".join(f"frame_{i}\n" for i in frames)
        (tmp_path / "set" / f"{split}.txt").write_text(stems)
    dataset = open_dataset(spec, "val")
    torch.manual_seed(0)
    network = randomise(segformer("b0", 3))
    network.classes = dataset.classes
    weights = tmp_path / "b0.pth"
    save_checkpoint(network, weights, half=True)
    recipe = {"command": "train.py --student b0", "commit": "abc1234", "threads": 2, "resumed": [
        {"from_step": 7, "command": "train.py --resume", "commit": "def5678", "threads": 1}]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.json").write_text(json.dumps(recipe))
    make = ("-m", "extras.weight_card", weights, "--data", spec, "--runs", tmp_path / "run")
    assert "b0.md" in command(*make)

    text = (tmp_path / "b0.md").read_text()
    assert ("    python train.py --student b0    # commit abc1234, threads 2; "
            "from step 7 on commit def5678, threads 1\n") in text
    assert file_hash(weights) in text
    tables = read_tables(tmp_path / "b0.md")
    network = open_model(weights, None, torch.device("cpu"))
    assert_near(frame_scores(network, dataset), tables["frame"])
    assert_near(scene_shares(network), tables["scene"])
    said = command("eval.py", weights, "--data", spec, "--split", "test")
    assert f"{tables['split']['test'][0]:.2f}" in said
    assert sum(tables["scene"]["val-0000"]) == pytest.approx(100, abs=0.1)

    (tmp_path / "run/recipe.json").unlink()
    assert "run has no recipe.json: it is no run of train.py" in command(*make, code=2)
