"""An exported network in 8 bits: calibrated on frames, and scored before it is kept.

    python -m extras.export student.pth student.onnx --int8 --data camvid:DIR

The file is an ONNX graph with QuantizeLinear and DequantizeLinear nodes, which ONNX Runtime and
OpenVINO both turn into 8-bit kernels. The tool is onnxruntime's own static quantiser (symmetric
weights, a scale for each output channel; activations uint8, their range over the calibration
frames).

What is quantised, and what is not: the dense convolutions and the linear maps, which hold nearly
all weights and most operations. Depthwise convolutions, GELU, softmax, the products of the
attention, norms, residual sums and resizing stay float: they gain nothing in 8 bits and lose
accuracy. What that is worth on a device: docs/DEPLOY.md.
"""

import contextlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import open_dataset
from eval import evaluate, resize_image, scores
from extras.cli import show_progress
from extras.comparison import spread_indices
from extras.exported_model import ExportError
from extras.onnx_graph import (
    INPUT,
    FileModel,
    open_session,
    read_facts,
    runner_of,
    show_logits,
    write_facts,
)
from extras.provenance import check_classes

CALIBRATION_FRAMES = 24


@dataclass(frozen=True)
class Int8Report:
    """What 8 bits cost, over the val frames; scores are fractions."""
    miou_fp32: float
    miou: float
    frames: int         # of val
    bytes_fp32: int     # of the files
    bytes: int

    def drop(self):
        """Points of mIoU that are lost."""
        return 100 * (self.miou_fp32 - self.miou)


def quantize_file(source, target, frames):
    """An ONNX file of fixed size -> one in 8 bits.

    frames: an iterable of images (1, 3, H, W) as the file takes them, to calibrate on
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Frames(CalibrationDataReader):
        def __init__(self):
            self.frames = iter(frames)

        def get_next(self):
            frame = next(self.frames, None)
            if frame is None:
                return None
            return {INPUT: frame.numpy()}

    model = linear_maps_as_gemm(onnx.load(source))
    with quiet_quantiser():
        quantize_static(
            model,
            target,
            Frames(),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=dense_nodes(model.graph),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # What a linear map makes is read in float: to round it too would cost a pass over it.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )
    write_facts(target, read_facts(source))                       # the tool adds a line of its own


def linear_maps_as_gemm(model):
    """-> the ONNX model with each MatMul by a weight, and the Add of its bias, as one Gemm.

    A Gemm takes matrices, so the tokens (B, H, W, C) are flattened before it and unflattened after;
    neither moves memory. ONNX Runtime has an 8-bit kernel for it that ends in float. A MatMul has
    none: there 8 bits were slower than 32.
    """
    from onnx import shape_inference

    model = shape_inference.infer_shapes(model)
    graph = model.graph
    shapes = {value.name: dimensions(value) for value in graph.value_info}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    readers = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    nodes = []
    absorbed = set()                                              # outputs of the Adds of biases
    for node in graph.node:
        if node.output[0] in absorbed:
            continue
        if node.op_type != "MatMul" or node.input[1] not in weights:
            nodes.append(node)
            continue
        bias, output = bias_after(node, readers, weights)
        absorbed.add(output)
        rows, columns = weights[node.input[1]].dims
        nodes += gemm_nodes(node, bias, output)
        add_shape(graph, f"{node.name}/flat", [-1, rows])
        add_shape(graph, f"{node.name}/whole", [*shapes[node.output[0]][:-1], columns])
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def dimensions(value):
    return [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]


def bias_after(node, readers, weights):
    """-> (the bias that an Add puts onto a MatMul, None without one; the name of the result)"""
    following = readers.get(node.output[0], [])
    if len(following) == 1 and following[0].op_type == "Add":
        for name in following[0].input:
            if name in weights and len(weights[name].dims) == 1:
                return name, following[0].output[0]
    return None, node.output[0]


def gemm_nodes(node, bias, output):
    """-> Reshape, Gemm, Reshape in place of a MatMul; the shapes' names begin with the node's."""
    from onnx import helper

    flat = f"{node.name}/flat"
    whole = f"{node.name}/whole"
    inputs = [f"{flat}/in", node.input[1]]
    if bias is not None:
        inputs.append(bias)
    return [
        helper.make_node("Reshape", [node.input[0], flat], [f"{flat}/in"], name=flat),
        helper.make_node("Gemm", inputs, [f"{flat}/out"], name=node.name),
        helper.make_node("Reshape", [f"{flat}/out", whole], [output], name=whole),
    ]


def add_shape(graph, name, shape):
    """Put a shape, for a Reshape, among the constants of a graph."""
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.array(shape, dtype=np.int64), name))


def dense_nodes(graph):
    """-> the names of the nodes to quantise: linear maps, and convolutions over all channels."""
    names = []
    for node in graph.node:
        is_dense_convolution = node.op_type == "Conv" and groups_of(node) == 1
        if node.op_type == "Gemm" or is_dense_convolution:
            names.append(node.name)
    return names


def groups_of(node):
    """-> the groups of a Conv node, 1 where it does not say."""
    for attribute in node.attribute:
        if attribute.name == "group":
            return attribute.i
    return 1


@contextlib.contextmanager
def quiet_quantiser():
    """Inside, the quantiser's advice on preparing a graph is left out: ours is prepared."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------- frames and scores

def calibration_frames(dataset, size):
    """Yield images (1, 3, H, W) in [0, 1] of a data set, spread over it, at `size` (H, W)."""
    chosen = spread_indices(len(dataset), CALIBRATION_FRAMES)
    progress = show_progress("calibration frames")
    for done, i in enumerate(chosen, 1):
        image, _ = dataset[i]
        progress(done, len(chosen))
        yield resize_image(image, size)[None].float() / 255


def open_logits(path):
    """-> a function from images to the logits of an ONNX file, also of one whose output is classes.
    """
    import onnx

    model = onnx.load(path)
    show_logits(model)
    return runner_of(open_session(model.SerializeToString()))


def score_of(model, dataset, size, name):
    """-> mIoU of a network, or of a FileModel, over a data set, at the labels' size."""
    confusion = evaluate(model, dataset, size, progress=show_progress(name))
    return scores(confusion)["miou"]


@contextlib.contextmanager
def naming_both_places(target):
    """The quantiser writes beside `target` and into the folder for temporary files, and its error
    of a full disk names neither.
    """
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {target}, or the temporary files that it takes, in "
                          f"{tempfile.gettempdir()} (TMPDIR): {error.strerror or error}") from None


def write_int8(model, exported, target, size, spec, max_drop):
    """The exported fp32 file of `model` -> an int8 file at `target`. -> Int8Report

    exported: an .onnx of fixed `size` (H, W), classes or logits
    spec: the data; its train frames calibrate, its val frames decide
    max_drop: points of mIoU that may be lost
    Nothing stands at `target` unless it loses less. Raises ExportError.
    """
    train = open_dataset(spec, "train")
    val = open_dataset(spec, "val")
    check_classes(model, str(target), val)
    target = Path(target)
    partial = target.with_name(f"partial-{os.getpid()}-int8.onnx")
    try:
        with naming_both_places(target):
            quantize_file(str(exported), str(partial), calibration_frames(train, size))
        small = FileModel(open_logits(str(partial)), model.num_classes)
        report = Int8Report(
            miou_fp32=score_of(model.fold(), val, size, "fp32"),
            miou=score_of(small, val, size, "int8"),
            frames=len(val),
            bytes_fp32=Path(exported).stat().st_size,
            bytes=partial.stat().st_size,
        )
        if not report.drop() <= max_drop:                         # NaN is none either
            raise ExportError(
                f"{target} was not written: in int8 it has {100 * report.miou:.2f} % mIoU on the "
                f"{len(val)} val frames, {report.drop():.2f} less than in fp32, and --max-drop "
                f"allows {max_drop:g}")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return report
