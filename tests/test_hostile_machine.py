"""A machine that wishes us ill: full disks, little shared memory, no folder for temporary files, no
/proc, no home, half a package, and more photos than anyone looks at.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import types
from multiprocessing import process

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import SMALL, rows, train_with

import extras.memory
import extras.packages
from conftest import ROOT, command, run_in_nursery, write_folder
from extras import exported_model, stopping
from extras.bench_runtimes import settings_here
from extras.cli import UsageError, report
from extras.int8 import naming_both_places
from extras.memory import check_shared_memory
from extras.outputs import FullDisk, temporary_folder
from extras.packages import ABSENT, fault_of, import_package
from extras.run_folder import read_run
from model import load_checkpoint, save_checkpoint, segformer

pytestmark = pytest.mark.usefixtures("patience")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set, `set`, and a checkpoint for it, `net.pth`, made once."""
    root = tmp_path_factory.mktemp("machine")
    write_folder(root / "set")
    torch.manual_seed(0)
    network = segformer("b0", 3)
    network.classes = [f"class {c}" for c in range(3)]
    network.input_size = (32, 32)
    save_checkpoint(network, root / "net.pth")
    return root


@pytest.fixture
def disk(tmp_path):
    """-> a function from a size to a disk of that size, in memory. Only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def make(size):
        how = f"remount,size={size}" if mounted else f"size={size}"
        words = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("no disk can be mounted here: that takes root")
        mounted.append(size)
        return folder

    yield make
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    """Leave no room on a disk."""
    with open(folder / "filler", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                  if path.is_file())


def refused(output, sentence):
    """Exactly one line is an error, and says `sentence`."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence in errors[0], output
    assert "Traceback" not in output and "Exception ignored" not in output, output


# ---------------------------------------------------------------- full disks

MOMENTS = {
    "12k": ("scores.csv", None),
    "10m": ("last.pth", None),
    "20m": ("best.pth", 0),
    "48m": ("last.pth", 0),
}


@pytest.mark.parametrize("size", MOMENTS)
def test_a_disk_that_gets_full_loses_no_checkpoint(size, place, disk):
    """Wherever it does; with more room the run goes on, or begins again."""
    name, saved = MOMENTS[size]
    run = disk(size) / "run"
    flags = ("--data", f"folder:{place / 'set'}", *SMALL, "--iters", 1, "--eval-every", 1)
    output = command("train.py", *flags, "--out", run, code=2)
    refused(output, f"cannot write {run / name}: ")
    assert not [path for path in files_in(run) if "partial" in path]
    assert (run / "last.pth").exists() == (saved is not None)
    if saved is not None:
        assert read_run(run / "last.pth")["training"]["step"] == saved

    disk("200m")
    begin = ("--resume",) if saved is not None else flags
    command("train.py", *begin, "--out", run)
    assert read_run(run / "last.pth")["training"]["step"] == 1
    assert load_checkpoint(run / "best.pth") and len(rows(run)) == 2


# `python train.py ARGS...`, where the disk gets full before the first row of the log, and the row
# needs a new block of it.
FULL_LOG = """
import os, runpy, sys
sys.path[:0] = [os.path.dirname(sys.argv[1]), {tests!r}]
from test_hostile_machine import fill
from extras import run_logs

add = run_logs.Log.add

def add_to_full_disk(log, rows):
    fill(log.path.parent)
    add(log, rows * 400)

run_logs.Log.add = add_to_full_disk
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_disk_that_is_full_at_a_row_of_the_log(place, disk, tmp_path):
    run = disk("20m") / "run"
    script = tmp_path / "full_log.py"
    script.write_text(FULL_LOG.format(tests=os.path.dirname(__file__)))
    flags = ("--data", f"folder:{place / 'set'}", *SMALL, "--iters", 1, "--out", run)
    output = command(script, ROOT / "train.py", *flags, code=2)
    refused(output, f"cannot write {run / 'log.csv'}: No space left on device; what was saved")
    assert read_run(run / "last.pth")["training"]["step"] == 0

    (run / "filler").unlink()
    disk("200m")
    command("train.py", "--resume", "--out", run)
    assert len(rows(run)) == 2


COMMANDS = {
    "json": ("eval.py", "{net}", "--data", "{set}", "--json", "{disk}/x"),
    "picture": ("eval.py", "{net}", "--data", "{set}", "--picture", "{disk}/x.png"),
    "overlay": ("eval.py", "{net}", "--data", "{set}", "--overlay", "{disk}/new"),
    "sheet": ("data.py", "{set}", "--sheet", "{disk}/x.png"),
    "half": ("-m", "extras.export", "{net}", "{disk}/x.pth", "--half"),
    "folder": ("-m", "extras.export", "{net}", "{disk}/new"),
    "quantize": ("-m", "extras.quantize", "{net}", "--bits", "8", "--out", "{disk}/x.pth"),
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=list(COMMANDS))
def test_a_command_on_a_full_disk_leaves_what_was_there(words, place, disk):
    full = disk("64k")
    for name in ("x", "x.png", "x.pth"):
        (full / name).write_text("before")
    fill(full)
    before = files_in(full)
    places = {"net": place / "net.pth", "set": f"folder:{place / 'set'}", "disk": full}
    output = command(*[word.format(**places) for word in words], code=2)
    refused(output, f"cannot write {full}/")
    assert files_in(full) == before
    assert (full / "x").read_text() == (full / "x.png").read_text() == "before"


def test_an_export_to_a_full_disk(disk, monkeypatch):
    """A layer stands for the network: to trace that takes a minute on a busy machine."""
    layer = torch.nn.Conv2d(3, 100, 9)
    program = torch.export.export(layer, (torch.rand(1, 3, 64, 64),))
    monkeypatch.setattr(exported_model, "trace", lambda deployed, size: program)
    full = disk("64k")
    with pytest.raises(UsageError, match="cannot write .*x.pt2: No space left on device"):
        exported_model.export(segformer("b0", 2), full / "x.pt2")
    assert files_in(full) == []


def test_frames_that_cannot_be_kept_are_a_sentence(place, disk, tmp_path):
    """In a worker. They are written, not mapped, so no signal ends it; those kept stay right."""
    full = disk("20k")
    flags = ("--data", f"folder:{place / 'set'}", *SMALL, "--workers", 1, "--iters", 4)
    output = command("train.py", *flags, "--out", tmp_path / "run", "--cache", full, code=2)
    refused(output, f"{full}: a decoded frame cannot be kept there (No space left on device); make")
    assert files_in(full) and not [name for name in files_in(full) if "partial" in name]


def test_predict_stops_at_a_full_disk(place, disk):
    """It would find each of ten thousand photos in vain."""
    full = disk("8k")
    output = command("-m", "extras.predict", place / "net.pth", place / "set" / "images", "--out",
                     full / "out", code=2)
    refused(output, "frame_1.png: No space left on device; 1 of 6 photos were segmented before, 4")
    assert files_in(full) == ["out/frame_0.png", "out/frame_0_overlay.png"]


# ---------------------------------------------------------------- shared and temporary places

def test_workers_without_shared_memory_are_refused(place, disk, tmp_path, monkeypatch):
    """The system would end them at a validation, hours later."""
    monkeypatch.setattr(extras.memory, "SHARED_MEMORY", str(disk("1m")))
    flags = ("--data", f"folder:{place / 'set'}", *SMALL, "--out", tmp_path / "run")
    more = ("--crop", 128, 128, "--workers", 2, "--batch-size", 4, "--iters", 8)
    with pytest.raises(UsageError, match=r"--workers 2 keep ready need 2.0 MiB of .*1.0 are free"):
        train_with(*flags, *more)
    assert not (tmp_path / "run").exists()
    for enough in ({"workers": 0}, {"workers": 1}, {"iters": 4}):
        needs = {"workers": 2, "iters": 8, "batch_size": 4, "accum": 1, "crop": (128, 128)}
        check_shared_memory(types.SimpleNamespace(**(needs | enough)))


def test_workers_without_a_socket_are_refused(place, tmp_path):
    """They would be waited for, for ever: the path of a socket has some 100 characters."""
    long = tmp_path / ("long" * 30)
    long.mkdir()
    flags = ("--data", f"folder:{place / 'set'}", *SMALL, "--workers", 1, "--iters", 1)
    output = command("train.py", *flags, "--out", tmp_path / "run", code=2,
                     env={"TMPDIR": str(long)})
    refused(output, "--workers need a socket in the folder for temporary files, and none can be")


@pytest.fixture
def temporary_place(monkeypatch):
    """-> a function that makes a folder the one for temporary files of this process."""
    def choose(folder):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.delitem(process.current_process()._config, "tempdir", raising=False)
    return choose


def test_a_disk_for_temporary_files_that_is_full(disk, temporary_place):
    full = disk("8k")
    temporary_place(full)
    sentence = "for temporary files: No space left on device; set TMPDIR"
    with pytest.raises(FullDisk, match=sentence), temporary_folder() as folder:
        (folder / "x").write_bytes(bytes(9000))
    sentence = r"cannot write x.onnx, or the temporary files .*\(TMPDIR\): No space left"
    with pytest.raises(UsageError, match=sentence), naming_both_places("x.onnx"):
        (full / "x").write_bytes(bytes(9000))
    (full / "x").unlink()
    output = command("bench.py", "data", "--rounds", 1, code=2, env={"TMPDIR": str(full)})
    refused(output, f"error: {full}/tmp")
    assert files_in(full) == []


def test_no_folder_for_temporary_files(temporary_place, tmp_path):
    temporary_place(tmp_path / "nowhere")
    sentence = "no folder for temporary files can be made"
    with pytest.raises(UsageError, match=sentence), temporary_folder():
        pass
    with pytest.raises(UsageError, match="add --workers 0"):
        stopping.check_sockets()


# ---------------------------------------------------------------- half a package

HALVES = {
    "raise ImportError('libx.so: cannot open')": "libx.so: cannot open",
    "raise AttributeError('no protobuf')": "no protobuf",
    "import a_part_that_is_gone": "No module named 'a_part_that_is_gone'",
    "raise RuntimeError": "RuntimeError",
    "": "module 'half_a_package' has no attribute 'use'",
    None: "module 'half_a_package' has no attribute 'use'",       # a folder without any code
}


@pytest.mark.parametrize("code", HALVES, ids=str)
def test_half_a_package_is_a_sentence(code, tmp_path, monkeypatch):
    folder = tmp_path / "half_a_package"
    folder.mkdir()
    if code is not None:
        (folder / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "half_a_package", raising=False)
    monkeypatch.setitem(extras.packages.PARTS, "half_a_package", "use")
    assert fault_of("half_a_package") == HALVES[code]
    with pytest.raises(UsageError) as caught:
        import_package("half_a_package", "figures need")
    assert str(caught.value) == ("figures need the package half_a_package, which is there but "
                                 f"broken ({HALVES[code]}): pip install --force-reinstall "
                                 "half_a_package")


def test_an_absent_package_is_a_sentence():
    assert fault_of("no_such_package") == ABSENT
    with pytest.raises(UsageError, match="figures need the package no_such_package: pip install x"):
        import_package("no_such_package", "figures need", "x y")


def test_packages_of_which_nothing_is_left_but_the_name(monkeypatch, tmp_path, capsys):
    """Found out before a network is traced, which takes a minute."""
    names = ("onnx", "onnxruntime", "onnxscript", "openvino")
    for hollow in names:
        for name in names:
            module = types.ModuleType(name)
            if name != hollow:
                setattr(module, extras.packages.PARTS[name], "there")
            monkeypatch.setitem(sys.modules, name, module)
        if hollow != "openvino":
            with pytest.raises(UsageError, match=f"the package {hollow}, which is there but brok"):
                exported_model.kind_of(tmp_path / "x.onnx")
        assert "OpenVINO" not in [setting.runtime for setting in settings_here()]
        assert f"OpenVINO: not measured, {hollow} is there but broken" in capsys.readouterr().out


def test_a_part_of_a_package_that_is_gone_is_a_sentence(capsys):
    """Where a command ends; a file of ours that is gone is a bug."""
    gone = ModuleNotFoundError("No module named 'onnx_ir.passes'", name="onnx_ir.passes")
    assert report(gone) == 2
    assert capsys.readouterr().err == (
        "error: onnx_ir is absent, or only half of it is installed (No module named "
        "'onnx_ir.passes'): pip install --force-reinstall onnx_ir\n")
    for name in ("extras.gone", "model", None):
        with pytest.raises(ImportError):
            report(ImportError("gone", name=name))


# ---------------------------------------------------------------- many photos

@pytest.fixture
def photos(tmp_path):
    """A folder of 120 photos; one in the middle is damaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(120):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    damaged = folder / "060.png"
    damaged.write_bytes(damaged.read_bytes()[:900])
    return folder


def check_pictures(folder):
    """-> how many pictures are in a folder, all of which must be whole, with nothing else."""
    names = files_in(folder)
    for name in names:
        with Image.open(folder / name) as picture:
            picture.load()
    return len(names)


def test_one_damaged_photo_of_many(place, photos, tmp_path):
    out = tmp_path / "out"
    output = command("-m", "extras.predict", place / "net.pth", photos, "--out", out, code=2)
    assert "119 of 120 photos segmented" in output
    refused(output, "060.png: ")
    assert check_pictures(out) == 2 * 119


# `python -m extras.predict ARGS...` from the project's folder, with Ctrl-C in the middle of writing
# a photo's overlay.
INTERRUPTED = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from extras import predict
from extras.cli import run_command

write = predict.Segmenter.write_picture

def write_picture(self, name, pixels):
    if name == "002_overlay.png":
        with predict.output_below(self.out, name) as file:
            file.write(b"half")
            signal.raise_signal(signal.SIGINT)
    write(self, name, pixels)

predict.Segmenter.write_picture = write_picture
run_command(predict.main)
"""


def test_ctrl_c_among_many_photos(place, photos, tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    out = tmp_path / "out"
    output = command(script, place / "net.pth", photos, "--out", out, cwd=ROOT, code=130)
    assert "2 of 120 photos were segmented, the last one before " in output
    assert output.endswith("stopped at once; what was saved before is whole\n")
    assert check_pictures(out) == 2 * 2 + 1


# ---------------------------------------------------------------- no /proc, no home

# `python WORDS...` on a machine without /proc
WITHOUT_PROC = """
import ctypes, os, runpy, subprocess, sys
CLONE_NEWNS = 0x20000
if ctypes.CDLL(None).unshare(CLONE_NEWNS):
    sys.exit(77)
for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "tmpfs", "/proc"]):
    if subprocess.run(["mount", *words]).returncode:
        sys.exit(77)
assert not os.listdir("/proc")
"""

# `python WORDS...` of a user without a home or a name, as a container's --user 1234 has none
NOBODY = """
import os, pwd, runpy, sys
def nobody(*_):
    raise KeyError("getpwuid(): uid not found: 1234")
pwd.getpwuid = pwd.getpwnam = nobody
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
"""

RUN_WORDS = """
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_lacking(lack, tmp_path, *words):
    """Run `python WORDS...` on a machine that lacks something -> (exit code, both streams)."""
    script = tmp_path / "lacking.py"
    script.write_text(lack + RUN_WORDS)
    code, output = run_in_nursery(str(script), [str(word) for word in words], ROOT, ENV)
    if code == 77:
        pytest.skip("no /proc can be hidden here: that takes root")
    assert "Traceback" not in output, output
    return code, output


@pytest.mark.parametrize("lack", [WITHOUT_PROC, NOBODY], ids=["no proc", "nobody"])
def test_a_run_where_the_system_lacks_something(lack, place, tmp_path):
    run = tmp_path / "run"
    flags = ("--data", f"folder:{place / 'set'}", *SMALL, "--iters", 1)
    code, output = run_lacking(lack, tmp_path, "train.py", *flags, "--out", run)
    assert code == 0, output
    code, output = run_lacking(lack, tmp_path, "train.py", "--resume", "--iters", 2, "--out", run)
    assert code == 0, output
    assert len(rows(run)) == 3


def test_other_commands_without_proc(place, tmp_path):
    net = place / "net.pth"
    words = ("-m", "extras.predict", net, place / "set" / "images", "--out", tmp_path / "out")
    code, output = run_lacking(WITHOUT_PROC, tmp_path, *words)
    assert code == 0, output
    assert check_pictures(tmp_path / "out") == 12

    # torch has no 16 bits on a CPU of which it can learn nothing
    half = tmp_path / "x.pth"
    code, output = run_lacking(WITHOUT_PROC, tmp_path, "-m", "extras.export", net, half, "--half")
    if code:
        assert code == 2
        refused(output, "error: torch cannot tell what this CPU has (Failed to initialize cpuinfo")
    assert half.exists() == (code == 0)
