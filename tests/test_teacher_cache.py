"""What a teacher says of each image, asked once: train.py --teacher-cache."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
from test_levers import STOPPED
from test_teacher_ensemble import write_teacher
from test_train import SMALL, column, same_runs, train_with

from conftest import command, write_folder
from extras import teacher_cache
from extras.cli import UsageError
from extras.teacher_cache import TeacherCache
from model import Features, segformer
from test_model import randomise

PLAIN = (*SMALL, "--augment", "plain", "--eval-every", 4)
EVERY_PART = {"logits", "stages", "patch_embeds"}


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


@pytest.fixture
def teacher(tmp_path):
    return write_teacher(tmp_path / "b1.pth", "b1", 1)


class Asked:
    """A network that counts the images it is asked about."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.network = randomise(segformer("b0", 3)).eval()
        self.dtype = dtype
        self.count = 0

    @torch.no_grad()
    def __call__(self, images):
        self.count += len(images)
        logits, stages, patch_embeds = self.network.features(images)
        stages = [stage.to(self.dtype) for stage in stages]
        return Features(logits, stages, patch_embeds)


def make_cache(folder, ask, parts=EVERY_PART, identity=("teacher",), images=4):
    return TeacherCache(folder, ask, parts, list(identity), images)


def whole_images(count):
    """(count, 3, 32, 64), as a loader gives them"""
    return torch.randint(0, 256, (count, 3, 32, 64)) / 255


def all_maps(features):
    return [features.logits, *features.stages, *features.patch_embeds]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_is_kept_is_what_the_teacher_said(tmp_path, dtype):
    ask = Asked(dtype)
    images = whole_images(3)
    told = make_cache(tmp_path, ask).ask(images)
    assert ask.count == 3
    kept = make_cache(tmp_path, ask).ask(images)                  # by another run
    assert ask.count == 3
    directly = ask(images)
    for first, again, batch in zip(all_maps(told), all_maps(kept), all_maps(directly), strict=True):
        assert torch.equal(first, again) and first.dtype == again.dtype == batch.dtype
        rounding = 1e-5 if first.dtype == torch.float32 else 1e-2
        assert torch.allclose(first.float(), batch.float(), atol=rounding)
    # As the network lays it out: the losses are as fast as without the cache
    assert kept.stages[0].is_contiguous(memory_format=torch.channels_last)
    assert kept.logits.stride() == told.logits.stride()           # and round as in the first epoch


def test_an_answer_does_not_depend_on_the_other_images(tmp_path):
    images = whole_images(4)
    together = make_cache(tmp_path / "a", Asked()).ask(images)
    cache = make_cache(tmp_path / "b", Asked())
    cache.ask(images[[2, 0]])
    apart = cache.ask(images)
    for first, second in zip(all_maps(together), all_maps(apart), strict=True):
        assert torch.equal(first, second)


def test_only_what_the_losses_read_is_kept_and_each_part_by_itself(tmp_path):
    ask = Asked()
    images = whole_images(2)
    features = make_cache(tmp_path, ask, {"stages"}).ask(images)
    assert features.logits is None and features.patch_embeds is None and ask.count == 2
    make_cache(tmp_path, ask, {"logits"}).ask(images)             # another run, another loss
    make_cache(tmp_path, ask, {"logits", "stages"}).ask(images)
    assert ask.count == 4
    assert len(list(tmp_path.glob("*/*.npz"))) == 4


def test_another_teacher_precision_or_image_is_asked_about(tmp_path):
    ask = Asked()
    images = whole_images(1)
    make_cache(tmp_path, ask, identity=["a", "off"]).ask(images)
    make_cache(tmp_path, ask, identity=["b", "off"]).ask(images)
    make_cache(tmp_path, ask, identity=["a", "bf16"]).ask(images)
    changed = images.clone()
    changed[0, 0, 0, 0] = (changed[0, 0, 0, 0] * 255 + 1) % 256 / 255
    make_cache(tmp_path, ask, identity=["a", "off"]).ask(changed)
    make_cache(tmp_path, ask, identity=["a", "off"]).ask(images.transpose(2, 3).contiguous())
    assert ask.count == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_answers_that_were_read_go_to_the_images_device_cuda(tmp_path):
    ask = Asked()
    ask.network.cuda()
    images = whole_images(3).cuda()
    cache = make_cache(tmp_path, ask)
    cache.ask(images[:1])
    features = cache.ask(images)                                  # one is read, two are asked about
    assert all(each.is_cuda for each in all_maps(features))


@pytest.mark.parametrize("damage", ("empty", "truncated", "flipped", "foreign"))
def test_a_damaged_answer_is_asked_for_again(tmp_path, damage):
    ask = Asked()
    images = whole_images(1)
    told = make_cache(tmp_path, ask, {"stages"}).ask(images)
    file, = tmp_path.glob("*/*.npz")
    content = bytearray(file.read_bytes())
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 1
    damaged = {"empty": b"", "truncated": content[:-1], "flipped": flipped, "foreign": b"x" * 999}
    file.write_bytes(damaged[damage])
    again = make_cache(tmp_path, ask, {"stages"}).ask(images)
    assert ask.count == 2 and file.read_bytes() == content
    assert all(torch.equal(*pair) for pair in zip(told.stages, again.stages, strict=True))


def test_pickles_and_pipes_are_not_read(tmp_path):
    ask = Asked()
    images = whole_images(1)
    cache = make_cache(tmp_path, ask, {"logits"})
    cache.ask(images)
    file, = tmp_path.glob("*/*.npz")
    np.savez(file, **{"0": np.array([{}], dtype=object)})         # which numpy keeps as a pickle
    cache.ask(images)
    assert ask.count == 2
    file.unlink()
    os.mkfifo(file)
    began = time.time()
    with pytest.raises(UsageError, match="a teacher's answer cannot be kept there .*not a regular"):
        cache.ask(images)
    assert time.time() - began < 5


def test_no_room_is_known_at_the_first_image(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"what the teacher says of 1000000000 images takes 0.\d "
                                         r"MiB each, \d+ MiB; .* has room for \d+ MiB"):
        make_cache(tmp_path, Asked(), images=1_000_000_000).ask(whole_images(1))

    # The answers of another part are no room for this one.
    other = make_cache(tmp_path, Asked())
    (other.folder / "x.stages.npz").write_bytes(bytes(10 ** 6))
    disk = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    with pytest.raises(UsageError, match="has room for 0 MiB"):
        make_cache(tmp_path, Asked(), parts={"logits"}).ask(whole_images(1))
    make_cache(tmp_path, Asked(), parts={"stages"}).check_room({"stages": [torch.zeros(1000)]})
    (other.folder / "x.stages.npz").unlink()
    monkeypatch.undo()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"\(No space left on device\); make room, or leave "
                                         "--teacher-cache out"):
        make_cache(tmp_path, Asked()).ask(whole_images(1))
    assert not list(tmp_path.glob("*/*"))

    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file: no folder can be made there"):
        make_cache(tmp_path / "file", Asked())


def test_a_run_with_it_is_the_run_without_and_resumes(tmp_path, folder, teacher, monkeypatch):
    flags = ("--data", folder, *PLAIN, "--iters", 8, "--teacher", teacher, "--lambda-kl", 0.5)
    cached = (*flags, "--teacher-cache", tmp_path / "answers")
    train_with(*flags, "--out", tmp_path / "without")
    train_with(*cached, "--out", tmp_path / "with")
    for term in ("loss", "kl", "fd", "pe"):
        values = column(tmp_path / "with", term)
        assert values == pytest.approx(column(tmp_path / "without", term), rel=1e-3)

    # Again, when all is known: the teacher is not asked, and the run is the same to the bit
    def ask(self, image, name):
        pytest.fail("asked again")

    monkeypatch.setattr(teacher_cache.TeacherCache, "ask_and_keep", ask)
    train_with(*cached, "--out", tmp_path / "again")
    monkeypatch.undo()
    assert same_runs(tmp_path / "with", tmp_path / "again")

    # Stopped in the middle, its answers lost or moved
    parts = tmp_path / "parts"
    assert "after step 3, all of it saved" in command("-c", STOPPED, *cached, "--out", parts)
    shutil.rmtree(tmp_path / "answers")
    train_with("--resume", "--out", parts, "--teacher-cache", tmp_path / "elsewhere")
    assert same_runs(tmp_path / "with", parts)
    assert list((tmp_path / "elsewhere").glob("*/*.npz"))
    with pytest.raises(UsageError, match="--teacher-cache .* differs from the resumed run's None"):
        train_with("--resume", "--out", tmp_path / "without", "--teacher-cache", tmp_path / "new")


@pytest.mark.parametrize("flags, said", [
    (("--teacher-cache", "DIR", "--augment", "plain"), "--teacher-cache needs a --teacher"),
    (("--teacher-cache", "DIR", "--teacher", "TEACHER"),
     "with --augment segformer none comes twice: add --augment plain, or leave it out"),
])
def test_what_does_not_go_together_is_a_sentence(flags, said, tmp_path, folder, teacher):
    places = {"DIR": tmp_path / "answers", "TEACHER": teacher}
    flags = [places.get(flag, flag) for flag in flags]
    with pytest.raises(UsageError, match=said):
        train_with("--data", folder, *SMALL, "--iters", 1, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "answers").exists()
