"""The same weights in the runtimes of a CPU: PyTorch, ONNX Runtime, OpenVINO; fp32, bf16, int8.

    python bench.py runtimes                                       # B0 and B2, fresh weights
    python bench.py runtimes student.pth --data camvid:DIR --size 360 480      # with mIoU
    OMP_NUM_THREADS=1 python bench.py runtimes --clock cpu         # on a machine that others use
    pip install transformers==5.23.0 onnx onnxscript onnxruntime openvino      # a row needs its own

`runtimes` exports transformers' graph and ours by the same exporter, for one size, and quantises
both by extras/int8.py. The two sides take turns in each runtime and precision. How far each is from
our network in fp32 is told by the largest difference of the logits, by the share of the pixels that
keep their class and, with --data, by the mIoU over the val frames (resized to --size).

transformers' network gets its images normalised; ours does that inside, and it is timed.
"""

import contextlib
import io
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from data import open_dataset
from eval import evaluate, resize_image, scores
from extras.bench_transformers import SIDES, import_transformers
from extras.cli import LONGEST, UsageError, show_progress
from extras.exported_model import export, quiet_exporters
from extras.hugging_face import HUGGING_FACE_EPS, check_network, write_folder
from extras.int8 import calibration_frames, quantize_file
from extras.machine import cpu_has_bf16
from extras.measure import Candidate, compare, print_row, run_in_turns
from extras.onnx_graph import FileModel, open_session, runner_of, write_onnx
from extras.outputs import temporary_folder
from extras.packages import ABSENT, fault_of
from extras.printable import printable
from extras.provenance import check_classes
from model import layer_norms, load_checkpoint, save_checkpoint, segformer

THEIRS, OURS = SIDES
NOISE_FRAMES = 4                            # that int8 is calibrated on without --data


@dataclass(frozen=True)
class Setting:
    """A row of the table: a runtime and its precision."""
    runtime: str
    int8: bool          # the file in 8 bits
    dtype: str          # of all that is not in 8 bits: "fp32" or "bf16"

    @property
    def title(self):
        precision = self.dtype
        if self.int8:
            precision = "int8" if self.dtype == "fp32" else f"int8 + {self.dtype}"
        return f"{self.runtime}, {precision}"


SETTINGS = (
    Setting("PyTorch", False, "fp32"),
    Setting("PyTorch", False, "bf16"),
    Setting("ONNX Runtime", False, "fp32"),
    Setting("ONNX Runtime", True, "fp32"),
    Setting("OpenVINO", False, "fp32"),
    Setting("OpenVINO", False, "bf16"),
    Setting("OpenVINO", True, "fp32"),
    Setting("OpenVINO", True, "bf16"),
)
PACKAGES = {
    "PyTorch": (),
    "ONNX Runtime": ("onnx", "onnxscript", "onnxruntime"),
    "OpenVINO": ("onnx", "onnxscript", "onnxruntime", "openvino"),
}


# ---------------------------------------------------------------- what can run here

def settings_here():
    """-> the SETTINGS that this machine has packages and units for; says which it has not."""
    here = []
    for runtime, packages in PACKAGES.items():
        absent = []
        broken = []
        for name in packages:
            fault = fault_of(name)
            if fault == ABSENT:
                absent.append(name)
            elif fault is not None:
                broken.append(f"{name} is there but broken ({fault})")
        if broken:
            print(f"{runtime}: not measured, {printable('; '.join(broken), LONGEST)}")
            continue
        if absent:
            print(f"{runtime}: not measured, pip install {' '.join(absent)}")
            continue
        here += [setting for setting in SETTINGS if setting.runtime == runtime]

    lacking_bf16 = []
    if cpu_has_bf16() is False:                        # PyTorch would emulate it: ten times as slow
        lacking_bf16.append("PyTorch")
    has_openvino = any(setting.runtime == "OpenVINO" for setting in here)
    if has_openvino and not openvino_has_bf16():
        lacking_bf16.append("OpenVINO")
    for runtime in lacking_bf16:
        print(f"{runtime}, bf16: not measured, this CPU has no units for it")
    return [s for s in here if s.dtype != "bf16" or s.runtime not in lacking_bf16]


def openvino_has_bf16():
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


# ---------------------------------------------------------------- files of both sides

def networks_of(options):
    """-> {title: model}: the checkpoint's, or a B0 and a B2 with fresh weights.

    All LayerNorms get transformers' epsilon, so that both sides are one network.
    """
    if options.checkpoint is not None:
        model = load_checkpoint(options.checkpoint)
        check_network(model, options.checkpoint)
        found = {f"{Path(options.checkpoint).name}, {model.variant.upper()}": model}
    else:
        torch.manual_seed(0)
        found = {}
        for variant in ("b0", "b2"):
            found[variant.upper()] = segformer(variant, options.classes).eval()
    for model in found.values():
        for norm in layer_norms(model):
            norm.eps = HUGGING_FACE_EPS
    return found


def checkpoint_file(folder):
    return folder / "net.pth"


def onnx_file(folder, side, int8):
    return folder / f"{side}-int8.onnx" if int8 else folder / f"{side}.onnx"


def write_files(model, folder, options, settings):
    """Write what the settings run: checkpoints of both sides, and ONNX graphs of one size."""
    save_checkpoint(model, checkpoint_file(folder))
    write_folder(model, folder / THEIRS)
    if any(setting.runtime != "PyTorch" for setting in settings):
        export(model, onnx_file(folder, OURS, False), logits=True, size=options.size)
        write_their_onnx(folder, options.size)
        for side in SIDES:
            frames = frames_for(model, side, options)
            quantize_file(str(onnx_file(folder, side, False)), str(onnx_file(folder, side, True)),
                          frames)


class OnlyLogits(torch.nn.Module):
    """transformers' model without the class around its output."""

    def __init__(self, peer):
        super().__init__()
        self.peer = peer

    def forward(self, images):
        return self.peer(images).logits


@torch.no_grad()
def write_their_onnx(folder, size):
    """transformers' graph, by the exporter that ours comes from."""
    network = OnlyLogits(open_transformers(folder)).eval()
    with quiet_exporters():
        program = torch.export.export(network, (torch.rand(1, 3, *size),))
        write_onnx(program, str(onnx_file(folder, THEIRS, False)), {"output": "logits"})


def frames_for(model, side, options):
    """Yield calibration images (1, 3, H, W), as a side takes them: of --data, else noise."""
    if options.data is None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(NOISE_FRAMES, 1, 3, *options.size, generator=generator)
        frames = list(noise)
    else:
        frames = calibration_frames(open_dataset(options.data, "train"), options.size)
    for frame in frames:
        yield input_of(model, side, frame)


def input_of(model, side, images):
    """Images (B, 3, H, W) in [0, 1] -> what a side takes."""
    if side == OURS:
        return images
    return (images - model.mean) / model.std


# ---------------------------------------------------------------- running them

def open_transformers(folder):
    """-> transformers' network of a folder that `write_files` made."""
    transformers = import_transformers()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.SegformerForSemanticSegmentation
    return model.from_pretrained(folder / THEIRS).eval()


def open_eager(folder, side, dtype):
    """-> a function from images to logits: a side in PyTorch, ours folded."""
    if side == OURS:
        with contextlib.redirect_stdout(io.StringIO()):           # what was found is known
            network = load_checkpoint(checkpoint_file(folder)).fold()
    else:
        network = OnlyLogits(open_transformers(folder))
    return eager_run(network, torch.device("cpu"), torch.bfloat16, dtype == "bf16")


def eager_run(network, device, dtype, in_16_bits):
    """-> a function from images to logits, in fp32 or under autocast to `dtype`."""
    @torch.inference_mode()
    def run(images):
        with torch.autocast(device.type, dtype, enabled=in_16_bits):
            return network(images)

    return run


def open_openvino(path, dtype):
    """-> a function from images to the first output of an ONNX file in OpenVINO on the CPU."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
    }
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()

    def run(images):
        outputs = request.infer([images.numpy()])
        return torch.from_numpy(outputs[0])

    return run


def open_setting(folder, side, setting):
    """-> a function from what a side takes to its logits"""
    if setting.runtime == "PyTorch":
        return open_eager(folder, side, setting.dtype)
    path = onnx_file(folder, side, setting.int8)
    if setting.runtime == "OpenVINO":
        return open_openvino(path, setting.dtype)
    return runner_of(open_session(str(path)))


def make_timed(opened, size):
    """opened() -> run(images); -> a function that runs it on random images of one size"""
    run = opened()
    images = torch.rand(1, 3, *size)
    return partial(run, images)


# ---------------------------------------------------------------- how far each is from fp32

def difference_of(model, side, run, images, expected):
    """-> {"difference", "same_class"} of a side's logits against those of our network in fp32"""
    found = run(input_of(model, side, images)).float()
    same = (found.argmax(1) == expected.argmax(1)).double().mean().item()
    return {"difference": (found - expected).abs().max().item(), "same_class": same}


def miou_of(model, side, run, options, title):
    """-> mIoU over the val frames, each resized to options.size"""
    def run_normalised(images):
        return run(input_of(model, side, images)).float()

    network = FileModel(run_normalised, model.num_classes)
    val = open_dataset(options.data, "val")
    confusion = evaluate(network, val, options.size, progress=show_progress(title))
    return scores(confusion)["miou"]


def sample_of(options):
    """-> the image (1, 3, H, W) that differences are measured on: the first val frame, or noise"""
    if options.data is None:
        return torch.rand(1, 3, *options.size, generator=torch.Generator().manual_seed(0))
    image, _ = open_dataset(options.data, "val")[0]
    return resize_image(image, options.size)[None].float() / 255


# ---------------------------------------------------------------- the subject `runtimes`

def bench_runtimes(options):
    """Both sides in each runtime and precision that is here. -> rows"""
    import_transformers()                                         # a sentence now if absent
    if options.device.type != "cpu" or options.batch != 1:
        raise UsageError("the subject runtimes measures one image at a time on a CPU: "
                         "add --device cpu, leave --batch out")
    if options.compile or options.dtype != torch.float32:
        raise UsageError("the subject runtimes has its own precisions: "
                         "leave --dtype and --compile out")
    settings = settings_here()
    print(describe_clock(options))
    if options.data is None:
        print("int8 is calibrated on noise: without --data its differences say little")
    rows = []
    for title, model in networks_of(options).items():
        if options.checkpoint is not None and not options.size_given and model.input_size:
            options = replace(options, size=tuple(model.input_size))        # as it was trained
        if options.data is not None:
            check_classes(model, title, open_dataset(options.data, "val"))
        with temporary_folder() as folder:
            with torch.inference_mode(False):
                write_files(model, folder, options, settings)
            found = rows_of(title, model, folder, options, settings)
        height, width = options.size
        print_speed(f"{title}, {height}x{width}", found)
        print_accuracy(title, found)
        rows += found
    return rows


def describe_clock(options):
    if options.clock == "wall":
        return "times by the wall clock"
    threads = torch.get_num_threads()
    return (f"times are the CPU's, summed over {threads} threads: what other processes do at the "
            "same time hardly counts")


def rows_of(title, model, folder, options, settings):
    """-> a row for each setting and side"""
    images = sample_of(options)
    expected = open_eager(folder, OURS, "fp32")(images)
    rows = []
    for runtime in PACKAGES:
        of_runtime = [setting for setting in settings if setting.runtime == runtime]
        if not of_runtime:
            continue
        candidates = {}
        for setting in of_runtime:
            for side in SIDES:
                opened = partial(open_setting, folder, side, setting)
                make = partial(make_timed, opened, options.size)
                candidates[setting, side] = Candidate(make, clock=options.clock)
        timings = run_in_turns(candidates, options.rounds, options.device)
        for (setting, side), timing in timings.items():
            run = open_setting(folder, side, setting)
            row = {
                "network": title,
                "setting": setting.title,
                "side": side,
                "size": options.size,
                **timing.as_row(),
                **compare(timings[setting, THEIRS], timing).as_row(),
                **difference_of(model, side, run, images, expected),
                "file_bytes": size_of_file(folder, side, setting),
            }
            if options.data is not None:
                row["miou"] = miou_of(model, side, run, options, f"{setting.title}, {side}")
            rows.append(row)
    return rows


def size_of_file(folder, side, setting):
    """-> bytes of the file that a setting runs; None for PyTorch, which runs the checkpoint"""
    if setting.runtime == "PyTorch":
        return None
    return onnx_file(folder, side, setting.int8).stat().st_size


def pairs_of(rows):
    """-> (their row, our row) of each setting"""
    theirs = [row for row in rows if row["side"] == THEIRS]
    ours = [row for row in rows if row["side"] == OURS]
    return list(zip(theirs, ours, strict=True))


def print_speed(title, rows):
    widths = (30, 17, 9, 8, 13, 20, 13, 9)
    print()
    print_row((title, "transformers ms", "ours", "ratio", "its range", "to PyTorch, fp32",
               "file MiB", "ours"), widths)
    slowest = rows[0]["seconds"]                                  # transformers in PyTorch, fp32
    for theirs, ours in pairs_of(rows):
        interval = f"{ours['ratio_min']:.2f}-{ours['ratio_max']:.2f}"
        print_row((ours["setting"],
                   f"{1e3 * theirs['seconds']:.1f}",
                   f"{1e3 * ours['seconds']:.1f}",
                   f"{ours['ratio']:.2f}",
                   interval,
                   f"{slowest / ours['seconds']:.2f}",
                   file_size(theirs),
                   file_size(ours)), widths)


def file_size(row):
    if row["file_bytes"] is None:
        return "-"
    return f"{row['file_bytes'] / 2 ** 20:.2f}"


def print_accuracy(title, rows):
    """How far each is from our network in fp32, in PyTorch."""
    widths = (30, 16, 12, 8, 16, 12, 8)
    print()
    print_row((title, "transformers'", "same", "mIoU", "ours:", "same", "mIoU"), widths)
    print_row(("", "logits differ", "class %", "%", "logits differ", "class %", "%"), widths)
    for theirs, ours in pairs_of(rows):
        print_row((ours["setting"], *accuracy_cells(theirs), *accuracy_cells(ours)), widths)


def accuracy_cells(row):
    miou = "-"
    if "miou" in row:
        miou = f"{100 * row['miou']:.2f}"
    difference = f"{row['difference']:.1e}"
    same_class = f"{100 * row['same_class']:.3f}"
    return difference, same_class, miou
