"""What the tests share: the repository on the path, running a command as a user would, and small data sets on disk."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CAMVID = ROOT.parent / "shared" / "camvid"
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)                                      # -n 2 on two cores: a core each

NURSERY = multiprocessing.get_context("forkserver")               # a process that has torch imported and has computed nothing:
NURSERY.set_forkserver_preload(["PIL.Image", "pytest", "torch"])  # its children need not import it, which takes 3 s


def run_script(script, args, cwd, env, outputs):
    """In a child of the nursery: be `python SCRIPT ARGS...` in `cwd`, with `outputs` as both streams."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv, sys.path[0] = [script, *args], os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def command(*args, cwd=None, code=0, env=None, traceback=False):
    """Run `python ARGS...` in `cwd` -> its output (both streams). It must end with `code`, and only with `traceback` with one.

    Options of python itself, and `env`, which it may read while starting, get a new interpreter.
    """
    script, *rest = map(str, args)
    fresh, env = script.startswith("-") or env, {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    script = script if script.startswith("-") else str(ROOT / script)
    if fresh:
        result = subprocess.run([sys.executable, script, *rest], cwd=cwd, capture_output=True, text=True, timeout=300, env=env)
        ended, output = result.returncode, result.stdout + result.stderr
    else:
        with tempfile.TemporaryDirectory() as folder:
            outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
            child = NURSERY.Process(target=run_script, args=(script, rest, cwd or os.getcwd(), env, outputs))
            child.start()
            child.join(300)
            child.kill()
            child.join()
            ended, output = child.exitcode, "".join(Path(path).read_text() for path in outputs)
    assert ended == code, output
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


def wait_for_step(process, out, step):
    """Until the log has `step`, or the process has ended."""
    until = time.time() + 120
    while process.poll() is None and time.time() < until:
        if (out / "log.csv").exists() and len((out / "log.csv").read_text().splitlines()) > step:
            return
        time.sleep(0.01)
