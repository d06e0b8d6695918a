"""What the tests share: the repository on the path, running a command as a user would, and small
data sets on disk.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Client, Listener
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import save_checkpoint, segformer  # noqa: E402

CAMVID = ROOT.parent / "shared" / "camvid"

# -n 2 on two cores: a core each
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# a process that has torch imported and has computed nothing:
NURSERY = multiprocessing.get_context("forkserver")
# its children need not import it, which takes 3 s
NURSERY.set_forkserver_preload(["PIL.Image", "pytest", "torch", "torch._dynamo"])


def run_script(script, args, cwd, env, outputs):
    """In a child of the nursery: be `python SCRIPT ARGS...` in `cwd`, with `outputs` as both
    streams.
    """
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)

    for number, path in enumerate(outputs, 1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
    sys.stdout = open(1, "w")  # noqa: SIM115  (open until the process ends)
    sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115  (open until the process ends)

    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    if script == "-m":  # python -m MODULE, from the project's folder
        module, *args = args
        sys.argv = [module, *args]
        sys.path[0] = str(ROOT)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [script, *args]
        sys.path[0] = os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")


def run_in_nursery(script, args, cwd, env):
    """Run `python SCRIPT ARGS...` in a child of the nursery -> (exit code, both streams)."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        child = NURSERY.Process(target=run_script, args=(script, args, cwd, env, outputs))
        child.start()
        child.join(300)
        child.kill()
        child.join()

        output = "".join(Path(path).read_text() for path in outputs)
        return child.exitcode, output


def command(*args, cwd=None, code=0, env=None, traceback=False):
    """Run `python ARGS...` in `cwd` -> its output (both streams). It must end with `code`, and only
    with `traceback` with one.

    Options of python itself, and `env`, which it may read while starting, get a new interpreter.
    """
    script, *rest = map(str, args)
    fresh = script == "-c" or env
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if not script.startswith("-"):
        script = str(ROOT / script)

    if fresh:
        result = subprocess.run(
            [sys.executable, script, *rest],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        ended = result.returncode
        output = result.stdout + result.stderr
    else:
        ended, output = run_in_nursery(script, rest, cwd or os.getcwd(), env)

    assert ended == code, output
    assert code == 0 or traceback or "Traceback" not in output, output
    return output


def write_folder(root, frames=6, size=(40, 48), classes=3):
    """A data set in the layout folder:DIR: columns of flat colours, one a class, and a void row."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    names = [f"class {c}\n" for c in range(classes)]
    (root / "classes.txt").write_text("".join(names))

    height, width = size
    rng = np.random.default_rng(0)
    for i in range(frames):
        row = np.repeat(rng.permutation(classes), width // classes)
        label = row[None].repeat(height, 0).astype(np.uint8)
        noise = rng.integers(0, 20, (*label.shape, 3))
        image = (label[..., None] * 80 + noise).astype(np.uint8)
        label[0] = 255

        Image.fromarray(image).save(root / "images" / f"frame_{i}.png")
        Image.fromarray(label).save(root / "labels" / f"frame_{i}.png")
    return f"folder:{root}"


@pytest.fixture(autouse=True)
def pythons_own_ctrl_c():
    """Every test begins with Python's handler of Ctrl-C, whatever one before it has left: some send
    the signal to this very process.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


@pytest.fixture
def checkpoint(tmp_path):
    """A random B0 for the three classes of the test folder."""
    torch.manual_seed(0)
    network = segformer("b0", 3)
    network.classes = [f"class {c}" for c in range(3)]
    save_checkpoint(network, tmp_path / "net.pth")
    return tmp_path / "net.pth"


def wait_for_step(process, out, step):
    """Until the log has `step`, or the process has ended."""
    log = out / "log.csv"
    until = time.time() + 120
    while process.poll() is None and time.time() < until:
        if log.exists() and len(log.read_text().splitlines()) > step:
            return
        time.sleep(0.01)


@pytest.fixture
def patience():
    """Ends a test that waits for ever, as opening a pipe does."""
    def give_up(*_):
        pytest.fail("no end within 120 s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)                                  # a busy machine is no hang
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# `python` as reproduce.sh finds it: asks the tests' process to run the command, in a child that has
# torch imported.
ASKING_PYTHON = """#!{python} -S
import os
import sys
from multiprocessing.connection import Client

with Client({address!r}) as tests:
    tests.send((sys.argv[1:], os.getcwd()))
    code, output = tests.recv()
sys.stdout.write(output)
sys.exit(code)
"""


@pytest.fixture
def quick_python(tmp_path_factory):
    """-> a folder for PATH whose `python` need not import torch, which takes most of the time."""
    folder = tmp_path_factory.mktemp("bin")
    address = str(folder / "socket")
    listener = Listener(address)

    def serve():
        while True:
            with listener.accept() as connection:
                request = connection.recv()
                if request is None:
                    return
                args, cwd = request
                try:
                    answer = (0, command(*args, cwd=cwd))
                except AssertionError as error:  # it did not end with 0
                    answer = (1, str(error))
                connection.send(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    script = folder / "python"
    script.write_text(ASKING_PYTHON.format(python=sys.executable, address=address))
    script.chmod(0o755)
    yield folder
    with Client(address) as connection:
        connection.send(None)
    thread.join()
    listener.close()
