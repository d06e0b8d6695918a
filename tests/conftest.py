"""What the tests share: the repository on the path, running a command as a user would, and small data sets on disk."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CAMVID = ROOT.parent / "shared" / "camvid"


def command(*args, cwd=None, code=0, env=None, traceback=False):
    """Run `python ARGS...` in `cwd` -> its output (both streams). It must end with `code`, and only with `traceback` with one."""
    script, *rest = map(str, args)
    script = [script] if script.startswith("-") else [str(ROOT / script)]
    result = subprocess.run([sys.executable, *script, *rest], cwd=cwd, capture_output=True, text=True, timeout=300,
                            env={**os.environ, "OMP_NUM_THREADS": "2", **(env or {})})
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    assert code == 0 or traceback or "Traceback" not in output, output
    return output


def write_folder(root, frames=6, size=(40, 48), classes=3):
    """A data set in the layout folder:DIR: columns of flat colours, one a class, and a void row."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    (root / "classes.txt").write_text("".join(f"class {c}\n" for c in range(classes)))
    rng = np.random.default_rng(0)
    for i in range(frames):
        label = np.repeat(rng.permutation(classes), size[1] // classes)[None].repeat(size[0], 0).astype(np.uint8)
        image = (label[..., None] * 80 + rng.integers(0, 20, (*label.shape, 3))).astype(np.uint8)
        label[0] = 255
        Image.fromarray(image).save(root / "images" / f"frame_{i}.png")
        Image.fromarray(label).save(root / "labels" / f"frame_{i}.png")
    return f"folder:{root}"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")
