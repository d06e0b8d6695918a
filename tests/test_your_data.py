"""docs/YOUR_DATA.md: every command in it runs, prints what the document says, and what it says of
mistakes is what the code says. The folder is made by afternoon.py; training is cut short."""

import glob
import io
import re
import shlex
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from PIL import Image

import afternoon
from conftest import ROOT, command
from data import open_dataset

DOCUMENT = (ROOT / "docs" / "YOUR_DATA.md").read_text()
BLOCK = re.compile(r"```(sh|text)\n(.*?)```", re.DOTALL)
PHOTOS = 60


def commands_of(block, folder):
    """The command lines of a block, less `python`, for the afternoon in `folder`."""
    for line in block.replace("\\\n", " ").splitlines():
        words = []
        for word in shlex.split(line):
            word = word.replace("afternoon/", f"{folder}/")
            found = sorted(glob.glob(word)) if "*" in word else [word]
            assert found, word
            words += found
        assert words[0] == "python", line
        if "--iters" in words:
            words[words.index("--iters") + 1] = "2"
        yield words[1:]


def look_at_the_page(words, folder):
    """Start the demo on a free port, ask it for a photo, end it -> what it printed."""
    process = subprocess.Popen([sys.executable, *words, "--port", "0"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE)
    try:
        lines = iter(process.stdout.readline, "")
        line = next(line for line in lines if line.startswith("http://"))
        body = (folder / "new" / "photo_0.jpg").read_bytes()
        for i in range(2):
            request = urllib.request.Request(f"{line.split()[0]}segment?{i}", body)
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert len(answer.read()) == 4 + 5 * 128 * 256
        return re.sub(r":\d+/", ":8000/", line)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_afternoon(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="PyAV (av) is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "afternoon"
    afternoon.make(folder, PHOTOS)
    output = ""
    checked = 0
    for kind, block in BLOCK.findall(DOCUMENT):
        if kind == "sh":
            output = ""
            for words in commands_of(block, folder):
                if "extras.demo" in words:
                    output += look_at_the_page(words, folder)
                else:
                    output += command(*words)
            continue
        printed = output.replace(f"{folder}/", "afternoon/")
        for line in block.splitlines():
            assert line in printed, f"{line!r} is not in\n{printed}"
            checked += 1
    assert checked > 10
    check_what_is_left(folder)


def check_what_is_left(folder):
    """The four imports are one data set, and the results are there."""
    datasets = [open_dataset(f"folder:{folder / name}", "val")
                for name in ("data", "data-coco", "data-cvat", "data-voc")]
    first = datasets[0]
    for other in datasets[1:]:
        assert other.stems == first.stems and set(other.classes) == set(first.classes)
        table = np.full(256, 255)
        table[:8] = [first.classes.index(name) for name in other.classes]
        for i in range(len(first)):
            assert (table[other[i][1]] == first[i][1].numpy()).all()
    written = sorted(path.name for path in (folder / "segmented").iterdir())
    assert written == ["drive_overlay.mp4", "photo_0.png", "photo_0_overlay.png", "photo_1.png",
                       "photo_1_overlay.png", "photo_2.png", "photo_2_overlay.png"]
    for name in ("sheet.png", "figures/miou.png", "figures/radar.png"):
        content = (folder / name).read_bytes()
        assert Image.open(io.BytesIO(content)).width > 500


def test_the_sentences_of_mistakes_are_the_code_s():
    """A row's sentence stands in a source file, as one string or as several that follow."""
    source = ""
    for path in [ROOT / "data.py", *sorted((ROOT / "extras").glob("*.py"))]:
        source += path.read_text()
    source = re.sub(r'"\s*\n\s*f?"', "", source)                  # strings that follow each other
    source = source.replace(r'\"', '"')
    warnings = DOCUMENT.split("\n## 2.")[1].split("\n## 3.")[0]
    mistakes = DOCUMENT.split("\n## What a mistake says")[1]
    sentences = re.findall(r"\| `(.+?)` \|\n", warnings + mistakes)
    assert len(sentences) > 20
    for sentence in sentences:
        assert sentence in source, sentence
