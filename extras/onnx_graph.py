"""A traced network as an ONNX file, in the form that runtimes do best with.

    write_onnx(program, "net.onnx", facts)          # program: of torch.export
    run = open_onnx("net.onnx")                     # run(images) -> what the file makes of them
    facts = read_facts("net.onnx")                  # {"classes": [...], "input_size": ...}

`facts` are plain values that travel in the file's metadata, each as JSON.
"""

import json

import torch
from torch import nn

INPUT = "images"


def write_onnx(program, path, facts):
    """An ExportedProgram -> an ONNX file whose output is named facts["output"]."""
    import onnx

    exported = torch.onnx.export(program, dynamo=True, input_names=[INPUT],
                                 output_names=[facts["output"]], verbose=False)
    model = exported.model_proto
    fold_transposes(model.graph)
    onnx.save(model, path)
    write_facts(path, facts)


def fold_transposes(graph):
    """Transpose the weights in the file, in place of a node that does it in every run.

    A Linear of PyTorch keeps its matrix as (out, in), and ONNX multiplies by (in, out). The
    exporter leaves a Transpose between the two where the matrix is large, and the quantisers of
    runtimes pass over a weight that is not read directly: it stays float.
    """
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type != "Transpose" or node.input[0] not in weights:
            continue
        axes = list(node.attribute[0].ints)
        array = numpy_helper.to_array(weights[node.input[0]]).transpose(axes)
        tensor = numpy_helper.from_array(array.copy(order="C"), node.output[0])
        graph.initializer.append(tensor)
        graph.node.remove(node)
    remove_unread(graph)


def remove_unread(graph):
    """Leave out the weights that no node reads any more."""
    read = set()
    for node in graph.node:
        read.update(node.input)
    for tensor in list(graph.initializer):
        if tensor.name not in read:
            graph.initializer.remove(tensor)


def show_logits(model):
    """Make the logits the output of an ONNX model, where it is the classes.

    The last steps of such a file are: logits, Resize, ArgMax, Cast.
    """
    import onnx

    graph = model.graph
    if graph.output[0].name == "logits":
        return
    makers = {output: node for node in graph.node for output in node.output}
    node = makers[graph.output[0].name]
    while node.op_type != "Resize":
        node = makers[node.input[0]]
    logits = onnx.helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, None)
    del graph.output[:]
    graph.output.append(logits)


# ---------------------------------------------------------------- reading it

def open_session(content, threads=None):
    """-> an onnxruntime session on the CPU. content: a path, or the bytes of a file

    threads: None, for as many as torch has
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Between two runs its threads would wait in a loop, and take the time of others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def open_onnx(path):
    """-> a function from images (B, 3, H, W) to what the file makes of them."""
    return runner_of(open_session(path))


def runner_of(session):
    """-> a function from images (B, 3, H, W) to the session's first output, as tensors."""
    name = session.get_inputs()[0].name

    def run(images):
        outputs = session.run(None, {name: images.numpy()})
        return torch.from_numpy(outputs[0])

    return run


class FileModel(nn.Module):
    """A function from images (B, 3, H, W) to logits in the place of a network, for `evaluate`."""

    def __init__(self, run, num_classes):
        super().__init__()
        self.run = run
        self.num_classes = num_classes
        self.place = nn.Parameter(torch.zeros(0))                 # `evaluate` asks for a device

    def forward(self, images):
        return self.run(images)


def write_facts(path, facts):
    """Put facts into a file, in place of all metadata that it has."""
    import onnx

    model = onnx.load(path)
    texts = {key: json.dumps(value) for key, value in facts.items()}
    onnx.helper.set_model_props(model, texts)
    onnx.save(model, path)


def read_facts(path):
    """-> the facts that `write_onnx` put into a file."""
    import onnx

    entries = onnx.load(path, load_external_data=False).metadata_props
    return {entry.key: json.loads(entry.value) for entry in entries}
