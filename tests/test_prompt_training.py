"""Training by prompts on the loop of train.py: phases, resuming, tokenizers, a stored teacher."""

import csv

import numpy as np
import pytest
import torch

import train
from conftest import command
from data import DatasetError, open_dataset
from extras import prompt_training
from extras.cli import UsageError
from extras.prompt_checkpoint import load_prompt, save_prompt
from extras.prompt_model import PromptSegmenter
from extras.prompt_predict import ask_whole_frame
from extras.prompt_sam3 import ask_sam3
from extras.prompt_teacher_files import (
    SURE,
    StoredTargets,
    WholeFrame,
    WithTeacher,
    confident,
    greedy_match,
    match_with_regions,
    read_teacher_file,
    regions_of,
    write_instances_file,
    write_teacher_file,
)
from extras.prompt_words import choose_prompts, members

SMALL = ("--crop", "32", "32", "--batch-size", "2", "--workers", "0", "--device", "cpu",
         "--dim", "8", "--absent", "2")


def prompt_command(*args, code=0):
    return command("-m", "extras.prompt", *args, code=code)


def train_with(*flags):
    flags = [str(flag) for flag in flags]
    args, given = prompt_training.PROMPT_FLAGS.parse(flags)
    return train.run_training(args, given, prompt_training.PROMPT_TASK)


def rows_of(folder, name="log.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def tensors_of(path):
    content = torch.load(path, weights_only=True)
    return content["model"] | content["prompt"]["tensors"]


def same_tensors(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture
def teacher(tmp_path, folder):
    """A random B1 that reads bytes, for the classes of the test folder."""
    torch.manual_seed(5)
    classes = open_dataset(folder, "train").classes
    network = PromptSegmenter("b1", 8, "bytes", choose_prompts(classes, 21, 2), classes)
    network.palette = [(0, 0, 0)] * 3
    network.presence.fc2.bias.data.fill_(1.0)                     # it finds what it is asked for
    save_prompt(network, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"


# ---------------------------------------------------------------- the loop

def test_a_run_learns_and_writes_what_every_run_writes(folder, tmp_path):
    out = tmp_path / "run"
    output = prompt_command("train", "--data", folder, *SMALL, "--iters", 12, "--lr", "2e-3",
                            "--eval-every", 6, "--out", out)
    assert "loss = 5 mask + 1 presence" in output and "student's best checkpoint" in output
    rows = rows_of(out)
    assert len(rows) == 12 and {"mask", "presence", "lr", "grad_norm"} <= rows[0].keys()
    first = float(rows[0]["loss"])
    last = float(rows[-1]["loss"])
    assert last < first
    total = 5 * float(rows[3]["mask"]) + float(rows[3]["presence"])
    assert float(rows[3]["loss"]) == pytest.approx(total, rel=1e-5)
    for name in ("best.pth", "last.pth", "recipe.json", "scores.csv", "pictures.png"):
        assert (out / name).exists(), name
    model = load_prompt(out / "best.pth")
    assert model.classes == ["class 0", "class 1", "class 2"] and len(model.prompts) == 9


def test_a_resumed_run_is_the_run_that_was_never_stopped(folder, tmp_path, monkeypatch):
    flags = ("--data", folder, *SMALL, "--iters", 6, "--eval-every", 3)
    train_with(*flags, "--out", tmp_path / "whole")

    real = train.learning_rate

    def stops_at_4(step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        return real(step, *rest)

    monkeypatch.setattr(train, "learning_rate", stops_at_4)
    with pytest.raises(KeyboardInterrupt):
        train_with(*flags, "--out", tmp_path / "cut")
    monkeypatch.setattr(train, "learning_rate", real)
    train_with("--resume", "--out", tmp_path / "cut")
    whole = tensors_of(tmp_path / "whole" / "last.pth")
    assert same_tensors(whole, tensors_of(tmp_path / "cut" / "last.pth"))
    assert (tmp_path / "whole" / "log.csv").read_text() == (
        tmp_path / "cut" / "log.csv").read_text()


def test_the_learning_rate_never_rises_after_warm_up_and_resume_past_the_end_is_refused(
        folder, tmp_path):
    """The reports' resumed run had a cosine over progress > 1, which rises again."""
    out = tmp_path / "run"
    train_with("--data", folder, *SMALL, "--iters", 8, "--warmup", 0.25, "--eval-every", 8,
               "--out", out)
    rates = [float(row["lr"]) for row in rows_of(out)]
    peak = rates.index(max(rates))
    assert peak <= 2 and rates[peak:] == sorted(rates[peak:], reverse=True)
    with pytest.raises(UsageError, match="has 8 steps behind it already"):
        train_with("--resume", "--out", out, "--iters", 6)


def test_another_task_does_not_go_on_with_a_run(folder, tmp_path):
    ours = tmp_path / "ours"
    train_with("--data", folder, *SMALL, "--iters", 1, "--out", ours)
    with pytest.raises(UsageError, match="a run of another kind, prompt"):
        train.train(resume=True, out=str(ours))
    plain = tmp_path / "plain"
    train.train(data=folder, crop=(32, 32), batch_size=2, workers=0, iters=1, out=str(plain))
    with pytest.raises(UsageError, match="a run of another kind, segmentation"):
        train_with("--resume", "--out", plain)


# ---------------------------------------------------------------- phases and starts

def test_both_phases_with_a_teacher(folder, tmp_path, teacher):
    one = tmp_path / "one"
    flags = ("--data", folder, *SMALL, "--iters", 10, "--eval-every", 5, "--lr", "2e-3")
    train_with(*flags, "--phase", 1, "--teacher", teacher, "--out", one)
    rows = rows_of(one)
    assert float(rows[-1]["pixels"]) < float(rows[0]["pixels"])
    assert float(rows[-1]["words"]) < float(rows[0]["words"])
    # Phase 1 leaves the head as it came from the teacher.
    said = torch.load(teacher, weights_only=True)["prompt"]["tensors"]
    learned = tensors_of(one / "last.pth")
    for name in ("scale", "bias", "presence.fc1.weight"):
        assert torch.equal(learned[name], said[name]), name

    two = tmp_path / "two"
    train_with(*flags, "--phase", 2, "--teacher", teacher, "--init", one / "last.pth", "--out", two)
    assert {"mask", "presence"} <= rows_of(two)[0].keys()
    assert not torch.equal(tensors_of(two / "last.pth")["scale"], said["scale"])
    assert load_prompt(two / "last.pth").tokenizer == "letters"
    assert load_prompt(teacher).tokenizer == "bytes"


def test_a_checkpoint_with_another_tokenizer_is_refused_unless_its_text_is_reset(folder, tmp_path):
    first = tmp_path / "first"
    flags = ("--data", folder, *SMALL, "--iters", 1)
    train_with(*flags, "--out", first)
    init = ("--init", first / "last.pth", "--tokenizer", "bytes")
    with pytest.raises(UsageError, match="add --reset-text for a new one"):
        train_with(*flags, *init, "--out", tmp_path / "no")
    with pytest.raises(UsageError, match="--tokenizer bytes differs from the resumed run's"):
        train_with("--resume", "--out", first, "--tokenizer", "bytes")
    result = train_with(*flags, *init, "--reset-text", "--lr", "1e-9", "--out", tmp_path / "yes")
    model = load_prompt(result.folder / "last.pth")
    assert model.tokenizer == "bytes"
    before = load_prompt(first / "last.pth")
    name = "stages.0.patch_embed.proj.weight"
    assert torch.allclose(model.segformer.state_dict()[name], before.segformer.state_dict()[name],
                          atol=1e-6)


def test_any_segformer_can_start_a_student(folder, checkpoint, tmp_path, capsys):
    train_with("--data", folder, *SMALL, "--iters", 1, "--lr", "1e-9", "--init", checkpoint,
               "--out", tmp_path / "run")
    assert "new head (the file's has 3 classes)" in capsys.readouterr().out
    name = "stages.0.patch_embed.proj.weight"
    before = torch.load(checkpoint, weights_only=True)["model"][name]
    assert torch.allclose(tensors_of(tmp_path / "run" / "last.pth")[name], before, atol=1e-6)


def test_four_prompts_of_one_target_make_the_words_useless(folder):
    """All four generic prompts have the same truth, so nothing asks a student to read them."""
    classes = open_dataset(folder, "train").classes
    table = members(choose_prompts(classes, 4, 0), classes)
    assert (table == table[0]).all()
    assert not (members(choose_prompts(classes, 21, 0), classes) == table[0]).all()


@pytest.mark.parametrize("flags, sentence", [
    (["--phase", "1"], "--phase 1 aligns features with a --teacher's"),
    (["--phase", "1", "--teacher-files", "x"], "--teacher-files has masks only"),
    (["--teacher", "x", "--teacher-files", "y"], "two teachers"),
    (["--teacher-files", "x", "--augment", "segformer"], "masks of whole frames"),
    (["--reset-text"], "--reset-text goes with --init"),
    (["--text-vectors", "x", "--tokenizer", "bytes"], "stands in place of a --tokenizer"),
    (["--prompts", "7"], "invalid choice: 7"),
    (["--empty", "1.5"], "is not at least 0"),
    (["--loss", "wce"], "unrecognized arguments: --loss"),
    (["--absent", "77"], "--absent 77"),
    (["--teacher", "/no/such.pth"], "/no/such.pth"),
    (["--teacher-files", "/no/such"], "/no/such"),
    (["--init", "/no/such.pth"], "/no/such.pth"),
    (["--text-vectors", "/no/such.npz"], "/no/such.npz"),
])
def test_mistakes_are_a_sentence(flags, sentence, folder, tmp_path):
    with pytest.raises((UsageError, DatasetError, ValueError), match=sentence):
        train_with("--data", folder, *SMALL, "--iters", "1", "--out", tmp_path / "x", *flags)


def test_the_command_ends_with_2_for_a_mistake(folder):
    assert "there is no command 'trian'" in prompt_command("trian", code=2)
    assert "--phase 1 aligns" in prompt_command("train", "--data", folder, "--phase", 1, code=2)
    assert "python -m extras.prompt compare" in prompt_command("--help")


def test_a_teacher_of_other_vectors_cannot_align(folder, tmp_path, teacher):
    with pytest.raises(UsageError, match="so give --dim 8"):
        train_with("--data", folder, *SMALL, "--dim", 16, "--phase", 1, "--teacher", teacher,
                   "--iters", 1, "--out", tmp_path / "x")


# ---------------------------------------------------------------- a teacher's files

def test_greedy_matching_takes_the_cheapest_pairs_first():
    cost = [[0.9, 0.2, 0.5], [0.1, 0.3, 0.8]]
    assert greedy_match(cost) == [(1, 0), (0, 1)]
    assert greedy_match(cost, most=1) == [(1, 0)]
    assert greedy_match([[np.inf, 1.0], [np.inf, np.inf]]) == [(0, 1)]
    assert greedy_match(np.zeros((0, 3))) == []
    many = np.random.default_rng(0).random((100, 100))
    assert len(greedy_match(many)) == 30


def test_greedy_matching_is_not_optimal():
    pairs = greedy_match([[1, 2], [1.5, 100]])
    assert pairs == [(0, 0), (1, 1)]                              # 101, where 3.5 was to be had


def test_uncertain_instances_teach_nothing_but_the_best_always_does():
    assert confident([0.9, 0.04, 0.3]) == [0, 2]
    assert confident([0.01, 0.04]) == [1]
    assert confident([]) == []
    assert confident(np.linspace(0.1, 0.9, 50)) == list(range(49, 19, -1))


def test_regions_are_connected_parts_of_a_class():
    label = np.array([[0, 0, 1], [1, 0, 1], [1, 0, 0]], np.uint8)
    regions = regions_of(label, 2)
    assert [(c, int(region.sum())) for c, region in regions] == [(0, 5), (1, 2), (1, 2)]


def test_masks_without_names_are_named_by_the_regions_that_they_fit():
    label = np.zeros((6, 6), np.uint8)
    label[:3, :3] = 1
    label[4:, 4:] = 1
    close = np.zeros((6, 6), bool)
    close[:3, :2] = True
    rest = label == 0
    nowhere = np.zeros((6, 6), bool)
    pairs = match_with_regions(np.stack([nowhere, close, rest]), label, 2)
    assert pairs == [(2, 0), (1, 1)]


def instances_file(path, with_names=True):
    """Three instances of two prompts, 5x11: two certain ones and one that is not."""
    masks = np.zeros((3, 5, 11), bool)
    masks[0, :2] = True
    masks[1, 3:] = True
    masks[2, :, :4] = True
    scores = np.array([0.9, 0.8, 0.01])
    write_instances_file(path, ["class 0", "class 1"], [3.0, 2.0],
                         [(masks[:1], scores[:1]), (masks[1:], scores[1:])])
    if not with_names:
        content = dict(np.load(path))
        del content["of_prompt"]
        np.savez(path, **content)
    return masks


def test_instances_become_a_mask_for_each_prompt(tmp_path):
    masks = instances_file(tmp_path / "x.npz")
    said = read_teacher_file(tmp_path / "x.npz")
    assert said.prompts == ["class 0", "class 1"] and said.presence.tolist() == [3.0, 2.0]
    assert np.array_equal(said.mask[0] == SURE, masks[0])
    assert np.array_equal(said.mask[1] == SURE, masks[1])         # without the one of score 0.01


def test_instances_without_names_need_the_label(tmp_path):
    masks = instances_file(tmp_path / "x.npz", with_names=False)
    with pytest.raises(DatasetError, match="have no names"):
        read_teacher_file(tmp_path / "x.npz")
    label = np.full((10, 22), 2, np.uint8)
    label[:4] = 1
    label[6:] = 0
    table = np.eye(2, 3, dtype=bool)
    said = read_teacher_file(tmp_path / "x.npz", label, table)
    assert np.array_equal(said.mask[1] == SURE, masks[0])
    assert np.array_equal(said.mask[0] == SURE, masks[1])


def test_live_and_stored_teacher_give_the_same_loss(folder, tmp_path, teacher):
    """The whole way: the teacher's answer written, read, resized, and through the objective."""
    dataset = open_dataset(folder, "train")
    network = load_prompt(teacher)
    network.input_size = (32, 32)
    for i, stem in enumerate(dataset.stems):
        answer = ask_whole_frame(network, dataset[i][0], torch.device("cpu"))
        write_teacher_file(tmp_path / f"{stem}.npz", network.prompts, answer.mask[0].numpy(),
                           answer.presence[0].numpy())
    frames = WithTeacher(dataset, tmp_path, network.prompts)
    image, stored = WholeFrame((32, 32))(*frames[1], NeverFlips())

    torch.manual_seed(0)
    student = PromptSegmenter("b0", 8, "letters", network.prompts, dataset.classes).eval()
    objective = prompt_training.PromptObjective(student, phase=2)
    images = image[None].float() / 255
    batch = StoredTargets(*[part[None] for part in stored])
    from_files = objective(images, batch)
    live = objective(images, batch.label, objective.ask_teacher(network, images))
    for name in ("mask", "presence"):
        assert from_files[name].item() == pytest.approx(live[name].item(), abs=2e-3), name
        assert live[name] > 0


class NeverFlips:
    def random(self):
        return 1.0


def test_a_flipped_frame_has_its_masks_flipped(folder, tmp_path):
    class Flips:
        def random(self):
            return 0.0

    label = torch.zeros(40, 48, dtype=torch.uint8)
    image = torch.zeros(3, 40, 48, dtype=torch.uint8)
    image[:, :, :24] = 200
    mask = torch.full((1, 10, 12), -5.0)
    mask[:, :, :6] = 5.0
    image, stored = WholeFrame((40, 48))(image, StoredTargets(label, mask, torch.zeros(1)), Flips())
    assert (image[:, :, 24:] == 200).all() and (stored.mask[:, :, 6:] == 5).all()


def test_training_from_files_and_what_they_may_lack(folder, tmp_path, teacher):
    stored = tmp_path / "stored"
    prompt_command("write-teacher", teacher, "--data", folder, "--out", stored)
    flags = ("--data", folder, *SMALL, "--iters", 3, "--empty", 0.5, "--teacher-files", stored)
    train_with(*flags, "--out", tmp_path / "run")
    assert len(rows_of(tmp_path / "run")) == 3
    with pytest.raises(DatasetError, match="was not asked for"):
        train_with(*flags, "--absent", 5, "--out", tmp_path / "more")
    next(stored.glob("*.npz")).unlink()
    with pytest.raises(DatasetError, match="every frame needs one"):
        for i in range(5):
            WithTeacher(open_dataset(folder, "train"), stored, load_prompt(teacher).prompts)[i]


@pytest.mark.parametrize("content, sentence", [
    ({"presence": [1.0]}, "it needs `prompts`"),
    ({"prompts": ["a"], "presence": [1.0, 2.0]}, "it needs `prompts`"),
    ({"prompts": ["a"], "presence": [1.0]}, "neither `mask` nor `instances`"),
    ({"prompts": ["a"], "presence": [1.0], "mask": np.zeros((2, 4, 4))}, "a map for each prompt"),
    ({"prompts": ["a"], "presence": [1.0], "mask": np.full((1, 4, 4), np.nan)}, "not finite"),
    ({"prompts": ["a"], "presence": [1.0], "instances": np.zeros((1, 4, 1), np.uint8), "width": 4,
      "scores": [0.5], "of_prompt": [3]}, "names prompt 3"),
    ({"prompts": ["a"], "presence": [1.0], "instances": np.zeros((1, 4, 2), np.uint8), "width": 4,
      "scores": [0.5], "of_prompt": [0]}, "must be uint8"),
])
def test_a_bad_teacher_file_is_a_sentence(tmp_path, content, sentence):
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(DatasetError, match=sentence):
        read_teacher_file(tmp_path / "x.npz")


def test_a_teacher_file_that_is_none(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="not an .npz"):
        read_teacher_file(tmp_path / "x.npz")


def test_what_sam_3_would_say_is_stored_as_a_teacher(tmp_path):
    """With a stand-in that returns what transformers documents; SAM 3 itself was not to be had."""
    class Inputs(dict):
        def to(self, device):
            return self

    class Processor:
        def __call__(self, images, text, return_tensors):
            return Inputs(text=text)

        def post_process_instance_segmentation(self, outputs, threshold, mask_threshold,
                                               target_sizes):
            count = 2 if outputs.text == "car" else 0
            masks = torch.zeros(count, *target_sizes[0])
            masks[:, 1] = 1
            return [{"masks": masks, "scores": torch.linspace(0.3, 0.6, count)}]

    class Outputs:
        def __init__(self, text):
            self.text = text
            self.presence_logits = torch.tensor([[2.5 if text == "car" else -4.0]])

    frame = np.zeros((6, 10, 3), np.uint8)
    presence, found = ask_sam3(Processor(), lambda text: Outputs(text), frame, ["car", "sky"],
                               torch.device("cpu"))
    write_instances_file(tmp_path / "x.npz", ["car", "sky"], presence, found)
    said = read_teacher_file(tmp_path / "x.npz")
    assert said.presence.tolist() == [2.5, -4.0]
    assert (said.mask[0, 1] == SURE).all() and (said.mask[1] == -SURE).all()
