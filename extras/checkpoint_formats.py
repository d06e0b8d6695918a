"""The files that other projects keep a SegFormer in, turned into our own checkpoint's dict.

    model = load_checkpoint("model.safetensors")        # model.py comes here for what is not ours

    format              found as                        what its tensors do not tell
    Hugging Face        .bin, .safetensors, a folder    every LayerNorm has eps 1e-5
    transformers 5      its state_dict() in memory      the same
    NVlabs segmenter    .pth of mmseg                   class names and colours are in "meta"
    NVlabs encoder      mit_b0.pth ...                  no decoder
    TransKD, EffiSeg    .pth, teacher or student        images without mean and std; last class void

A format is a table of names, theirs -> ours, each the beginning of a tensor's name:
    {i} {j}    a number, the same on both sides (a stage, a block)
    {n}        a number that counts stages from 1; ours is {i}, from 0
    [text]     there or not
    None       not part of this network: left out
The first row that fits is taken. A table without {n} is read backwards too, with its [text]: see
`their_name`, by which extras/hugging_face.py writes.
"""

import functools
import json
import math
import os
import re
from typing import NamedTuple

import torch

from extras.checkpoint_checks import check_size, check_tensors, is_class_name, is_colour
from extras.printable import printable
from model import MEAN, SIZES, STD, CheckpointError, read_checkpoint

MAX_HEADER = 10_000_000                                           # bytes; B5's has 150,000
MAX_JSON = 10_000_000                                             # bytes; ADE20K's has 10,000
MAX_DIMENSIONS = 8                                                # of a tensor; a conv has 4
CITYSCAPES_AND_VOID = 20                                          # outputs
HEAD = "decoder.classifier."


# ---------------------------------------------------------------- the tables of names

HUGGING_FACE_HEAD = {
    "decode_head.linear_fuse.": "decoder.fuse.",
    "decode_head.batch_norm.": "decoder.norm.",
    "decode_head.classifier.": "decoder.classifier.",
    "classifier.": None,                                          # of an ImageNet classifier
}
# On the hub and on the disk.
HUGGING_FACE_EMBED = "[segformer.]encoder.patch_embeddings.{i}."
HUGGING_FACE_BLOCK = "[segformer.]encoder.block.{i}.{j}."
OUR_BLOCK = "stages.{i}.blocks.{j}."
HUGGING_FACE = {
    HUGGING_FACE_EMBED + "proj.": "stages.{i}.patch_embed.proj.",
    HUGGING_FACE_EMBED + "layer_norm.": "stages.{i}.patch_embed.norm.",
    HUGGING_FACE_BLOCK + "layer_norm_1.": OUR_BLOCK + "norm1.",
    HUGGING_FACE_BLOCK + "layer_norm_2.": OUR_BLOCK + "norm2.",
    HUGGING_FACE_BLOCK + "attention.self.query.": OUR_BLOCK + "attn.q.",
    HUGGING_FACE_BLOCK + "attention.self.key.": OUR_BLOCK + "attn.k.",
    HUGGING_FACE_BLOCK + "attention.self.value.": OUR_BLOCK + "attn.v.",
    HUGGING_FACE_BLOCK + "attention.self.sr.": OUR_BLOCK + "attn.reduce.conv.",
    HUGGING_FACE_BLOCK + "attention.self.layer_norm.": OUR_BLOCK + "attn.reduce.norm.",
    HUGGING_FACE_BLOCK + "attention.output.dense.": OUR_BLOCK + "attn.proj.",
    HUGGING_FACE_BLOCK + "mlp.dense1.": OUR_BLOCK + "mlp.fc1.",
    HUGGING_FACE_BLOCK + "mlp.dwconv.dwconv.": OUR_BLOCK + "mlp.dwconv.",
    HUGGING_FACE_BLOCK + "mlp.dense2.": OUR_BLOCK + "mlp.fc2.",
    "[segformer.]encoder.layer_norm.{i}.": "stages.{i}.norm.",
    "decode_head.linear_c.{i}.proj.": "decoder.linear.{i}.",
    **HUGGING_FACE_HEAD,
}
# The names inside transformers 5, before its writer turns them into the ones above.
NEW_EMBED = "[segformer.]stages.{i}.patch_embeddings."
NEW_BLOCK = "[segformer.]stages.{i}.blocks.{j}."
NEW_REDUCTION = NEW_BLOCK + "attention.sequence_reduction."
TRANSFORMERS_5 = {
    NEW_EMBED + "proj.": "stages.{i}.patch_embed.proj.",
    NEW_EMBED + "layer_norm.": "stages.{i}.patch_embed.norm.",
    NEW_BLOCK + "layernorm_before.": OUR_BLOCK + "norm1.",
    NEW_BLOCK + "layernorm_after.": OUR_BLOCK + "norm2.",
    NEW_BLOCK + "attention.q_proj.": OUR_BLOCK + "attn.q.",
    NEW_BLOCK + "attention.k_proj.": OUR_BLOCK + "attn.k.",
    NEW_BLOCK + "attention.v_proj.": OUR_BLOCK + "attn.v.",
    NEW_BLOCK + "attention.o_proj.": OUR_BLOCK + "attn.proj.",
    NEW_REDUCTION + "sequence_reduction.": OUR_BLOCK + "attn.reduce.conv.",
    NEW_REDUCTION + "layer_norm.": OUR_BLOCK + "attn.reduce.norm.",
    NEW_BLOCK + "mlp.fc1.": OUR_BLOCK + "mlp.fc1.",
    NEW_BLOCK + "mlp.dwconv.dwconv.": OUR_BLOCK + "mlp.dwconv.",
    NEW_BLOCK + "mlp.fc2.": OUR_BLOCK + "mlp.fc2.",
    "[segformer.]stages.{i}.layer_norm.": "stages.{i}.norm.",
    "decode_head.linear_projections.{i}.proj.": "decoder.linear.{i}.",
    **HUGGING_FACE_HEAD,
}
# Keys and values are one layer, attn.kv: see `split_keys_and_values`.
NVLABS = {
    "[backbone.]patch_embed{n}.": "stages.{i}.patch_embed.",
    "[backbone.]block{n}.{j}.attn.sr.": OUR_BLOCK + "attn.reduce.conv.",
    "[backbone.]block{n}.{j}.attn.norm.": OUR_BLOCK + "attn.reduce.norm.",
    "[backbone.]block{n}.{j}.mlp.dwconv.dwconv.": OUR_BLOCK + "mlp.dwconv.",
    "[backbone.]block{n}.{j}.": OUR_BLOCK,                        # norm1, attn.q, mlp.fc1: as ours
    "[backbone.]norm{n}.": "stages.{i}.norm.",
    "[decode_head.]linear_c{n}.proj.": "decoder.linear.{i}.",
    "[decode_head.]linear_fuse.conv.": "decoder.fuse.",
    "[decode_head.]linear_fuse.bn.": "decoder.norm.",
    "[decode_head.]linear_fuse.norm.": "decoder.norm.",
    "[decode_head.]linear_pred.": "decoder.classifier.",
    "decode_head.conv_seg.": None,                                # mmseg's base class makes it idle
    "head.": None,                                                # of an ImageNet classifier
}


class Format(NamedTuple):
    """How others write a SegFormer down, and what their code does that no tensor tells."""
    name: str
    sign: str                               # one of its names begins so, and none of later formats
    names: dict                             # theirs -> ours
    eps: float | None = None                # of all LayerNorms; None: as in `model.layer_norm`
    normalises: bool = True                 # images with ImageNet's mean and std
    last_is_void: bool = False


FORMATS = (
    # Its code ignores the layer_norm_eps of its own config.
    Format("Hugging Face", HUGGING_FACE_EMBED, HUGGING_FACE, eps=1e-5),
    Format("transformers 5", NEW_EMBED, TRANSFORMERS_5, eps=1e-5),
    Format("NVlabs segmenter", "backbone.patch_embed1.", NVLABS),
    Format("TransKD/EffiSeg", "linear_pred.", NVLABS, normalises=False, last_is_void=True),
    Format("NVlabs encoder", "patch_embed1.", NVLABS),
)
MMSEG_1 = re.compile(r"(backbone\.)?layers\.\d\.0\.projection\.")


# ---------------------------------------------------------------- a file's content -> ours

def convert(content, num_classes, path):
    """What a file of another project holds -> (our own checkpoint's dict, words for its format).

    num_classes: what the user asked for, or None
    Raises CheckpointError.
    """
    tensors = content.get("state_dict", content.get("tensors", content))
    check_tensors(tensors, size_on_disk(path), path)
    layout, tensors, left_out = rename(tensors, path)
    words = layout.name
    outputs = count_outputs(tensors)
    names, palette = read_mmseg_meta(content.get("meta"), outputs)

    has_void = outputs == (CITYSCAPES_AND_VOID if num_classes is None else num_classes + 1)
    if layout.last_is_void and has_void:
        tensors = drop_void_class(tensors)
        words += " without its void output"
    if left_out:
        words += f" ({left_out} tensors of its distillation left out)"
    if not layout.normalises:
        tensors["mean"] = torch.zeros(1, 3, 1, 1)
        tensors["std"] = torch.ones(1, 3, 1, 1)
    if os.path.isdir(path):                                       # what `read_folder` found
        tensors["mean"] = content["mean"]
        tensors["std"] = content["std"]
        names = content["classes"]
        palette = content["palette"]
    ours = {
        "model": tensors,
        "variant": find_variant(tensors, path),
        "norm": "ln",
        "layer_norm_eps": layout.eps,
        "classes": names,
        "palette": palette,
        "input_size": content.get("input_size"),                  # in a folder that we wrote
    }
    return ours, words


def size_on_disk(path):
    """Bytes of a file, or of the largest file in a folder."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return max(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())


def count_outputs(tensors):
    """-> outputs of the head in {our name: tensor}; 0 without one."""
    head = tensors.get(f"{HEAD}weight")
    return len(head) if head is not None and head.ndim else 0


def drop_void_class(tensors):
    """-> the same tensors, the head's without their last row."""
    tensors = dict(tensors)
    for name in (f"{HEAD}weight", f"{HEAD}bias"):
        if name in tensors and tensors[name].ndim:
            tensors[name] = tensors[name][:-1]
    return tensors


def read_mmseg_meta(meta, outputs):
    """-> (names, palette) of the classes that mmseg wrote beside the weights, or (None, None)."""
    if not isinstance(meta, dict):
        return None, None
    names = meta.get("CLASSES")
    palette = meta.get("PALETTE")
    for values in (names, palette):
        if not isinstance(values, (list, tuple)) or len(values) != outputs:
            return None, None
    if not all(is_class_name(name) for name in names):
        return None, None
    if not all(is_colour(colour) for colour in palette):
        return None, None
    return list(names), [tuple(colour) for colour in palette]


def find_variant(tensors, path):
    """-> "b0" .. "b5" by the widths and depths in {our name: tensor}.

    A bare encoder of B1 is told from B2's by its depths.
    """
    dims = []
    depths = []
    for i in range(4):
        embed = tensors.get(f"stages.{i}.patch_embed.proj.weight")
        if embed is not None and embed.ndim:
            dims.append(len(embed))
        blocks = [j for j in range(64) if f"stages.{i}.blocks.{j}.norm1.weight" in tensors]
        depths.append(len(blocks))
    dims = tuple(dims)
    depths = tuple(depths)
    for variant, size in SIZES.items():
        if size["dims"] == dims and size["depths"] == depths:
            return variant
    raise CheckpointError(f"{path} is no SegFormer B0-B5, or not all of one: "
                          f"its stage widths are {dims} and its depths {depths}")


# ---------------------------------------------------------------- renaming

def rename(tensors, path):
    """Another format's names -> ours. Raises CheckpointError for names of no known format.

    -> (its Format, {our name: tensor}, how many tensors beside the network were left out)
    """
    tensors, left_out = take_the_network(tensors)
    layout = find_format(tensors, path)
    renamed = {}
    for key, tensor in tensors.items():
        name = our_name(key, layout.names)
        if name is None:
            continue
        for part, values in split_keys_and_values(name, tensor).items():
            if part in renamed:
                raise CheckpointError(f"{path} holds two tensors for {part}, the second is {key}")
            renamed[part] = values
    return layout, renamed, left_out


def take_the_network(tensors):
    """-> (the tensors without the names of what was around the network, how many were not its own).

    DataParallel puts "module." before every name. A distillation's file has the student's under
    "student.", beside projections and perhaps the teacher.
    """
    tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    student = {}
    for key, tensor in tensors.items():
        if key.startswith("student."):
            student[key.removeprefix("student.")] = tensor
    if student:
        return student, len(tensors) - len(student)
    return tensors, 0


def find_format(tensors, path):
    for layout in FORMATS:
        sign = name_pattern(layout.sign)
        if any(sign.match(key) for key in tensors):
            return layout
    if any(MMSEG_1.match(key) for key in tensors):
        raise CheckpointError(f"{path} is written by mmseg 1.x, whose decoder is another network: "
                              f"use NVlabs' or Hugging Face's file of the same model")
    known = ", ".join(["EffiSeg", *(layout.name for layout in FORMATS)])
    first = ", ".join(list(tensors)[:3]) or "nothing"
    raise CheckpointError(f"{path} is no SegFormer in a known format ({known}); "
                          f"it begins with {first}")


def our_name(key, names):
    """The name of one tensor. -> ours; None: left out; the same: not in the table."""
    for theirs, ours in names.items():
        found = name_pattern(theirs).match(key)
        if found and ours is None:
            return None
        if found:
            numbers = found.groupdict()
            if "n" in numbers:
                numbers["i"] = int(numbers["n"]) - 1
            return ours.format(**numbers) + key[found.end():]
    return key


@functools.cache
def name_pattern(template):
    """The regular expression of a row in a table: see the head of this file."""
    pattern = re.escape(template)
    pattern = pattern.replace(r"\[", "(?:").replace(r"\]", ")?")
    pattern = pattern.replace(r"\{n\}", r"(?P<n>\d)")             # one digit, as {i}: a stage
    pattern = pattern.replace(r"\{i\}", r"(?P<i>\d)")
    pattern = pattern.replace(r"\{j\}", r"(?P<j>\d+)")
    return re.compile(pattern, re.ASCII)


def their_name(name, names):
    """`our_name` backwards, for a table without {n}. Raises KeyError for a name not in the table.

    A number {n} counts from 1, so a table with it would need more than this.
    """
    for theirs, ours in names.items():
        if ours is None:
            continue
        found = name_pattern(ours).match(name)
        if found:
            whole = theirs.replace("[", "").replace("]", "")      # with its optional text
            return whole.format(**found.groupdict()) + name[found.end():]
    raise KeyError(name)


def split_keys_and_values(name, tensor):
    """NVlabs has k and v in one layer, the rows of k first. -> {name: tensor}"""
    if ".kv." not in name or tensor.ndim == 0 or len(tensor) < 2:
        return {name: tensor}
    key, value = tensor.chunk(2)
    return {name.replace(".kv.", ".k."): key, name.replace(".kv.", ".v."): value}


# ---------------------------------------------------------------- Hugging Face's files

def read_folder(path):
    """-> what a Hugging Face folder holds: "tensors", "mean", "std"; and "classes" (names),
    "palette" and "input_size", or None.

    Reads model.safetensors or pytorch_model.bin, config.json and, where there is one,
    preprocessor_config.json.
    Raises CheckpointError.
    """
    weights = None
    for name in ("pytorch_model.bin", "model.safetensors"):       # the second, if both are there
        if os.path.isfile(os.path.join(path, name)):
            weights = os.path.join(path, name)
    try:
        config = read_json(os.path.join(path, "config.json"))
        names = class_names(config)
        palette, input_size = read_our_settings(config)
        mean, std = read_normalisation(os.path.join(path, "preprocessor_config.json"))
    except OSError as error:
        raise CheckpointError(f"{path} is no Hugging Face folder: "
                              f"cannot open {error.filename} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError):
        raise CheckpointError(f"{path} is no Hugging Face folder of a SegFormer: its config.json "
                              f"or preprocessor_config.json is damaged") from None
    if weights is None:
        raise CheckpointError(f"{path}: no model.safetensors or pytorch_model.bin in it")
    kind = config.get("model_type")
    if kind != "segformer":
        raise CheckpointError(f"{path}: its config.json is of a {printable(repr(kind))}, "
                              f"not of a segformer")

    content = read_checkpoint(weights)
    tensors = content.get("tensors", content)
    head = tensors.get("decode_head.classifier.weight") if isinstance(tensors, dict) else None
    fits = isinstance(head, torch.Tensor) and head.ndim > 0 and len(head) == len(names)
    placeholders = [f"LABEL_{i}" for i in range(len(names))]      # transformers' own, for no names
    if not fits or names == placeholders:
        names = None
    return {
        "tensors": tensors,
        "mean": mean,
        "std": std,
        "classes": names,
        "palette": palette,
        "input_size": input_size,
    }


def read_json(path):
    """-> the dict in a JSON file. Raises OSError or ValueError."""
    if os.path.exists(path) and not os.path.isfile(path):         # to open a pipe would wait
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise ValueError(f"{path} is too long")
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object")
    return content


def parse_json(text):
    """-> what UTF-8 JSON holds. Raises ValueError, also for a name that an object has twice: which
    one counts would be the reader's choice."""
    return json.loads(text, object_pairs_hook=unique_names)


def unique_names(pairs):
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def class_names(config):
    """-> the names in config.json, in the order of the outputs."""
    labels = config.get("id2label") or {}
    return [str(labels[str(i)]) for i in range(len(labels))]


def read_our_settings(config):
    """-> (palette, input_size) that extras/hugging_face.py wrote into config.json, or Nones."""
    ours = config.get("effiseg") or {}
    palette = ours.get("palette")
    if palette is not None:
        palette = [tuple(colour) for colour in palette]
    return palette, ours.get("input_size")


def read_normalisation(path):
    """-> (mean, std), each (1, 3, 1, 1), of a preprocessor_config.json; ImageNet's without one."""
    settings = read_json(path) if os.path.exists(path) else {}
    mean = settings.get("image_mean", MEAN)
    std = settings.get("image_std", STD)
    if settings.get("do_normalize") is False:
        mean = (0, 0, 0)
        std = (1, 1, 1)
    mean = torch.tensor(mean, dtype=torch.float32).reshape(1, 3, 1, 1)
    std = torch.tensor(std, dtype=torch.float32).reshape(1, 3, 1, 1)
    return mean, std


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def read_safetensors(path):
    """-> {name: tensor}. The format: 8 bytes header length, JSON header, raw tensors.

    Read here and not with its package, a dependency for thirty lines: nothing is allocated before
    the header has been held against the size of the file, and the tensors must fill the rest of it
    without gaps or overlaps. Raises ValueError, or KeyError and the like for a lying header.
    """
    check_size(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        rest = os.path.getsize(path) - 8
        if length > min(rest, MAX_HEADER):
            raise ValueError("its header is longer than the file, or than the format allows")
        header = parse_json(file.read(length))
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=place_of)
        check_places(entries, rest - length)
        data = bytearray(file.read())
    return {name: read_tensor(name, entry, data) for name, entry in entries}


def check_places(entries, size):
    """Raise ValueError unless the tensors fill `size` bytes, one behind the other."""
    filled = 0
    for name, entry in entries:
        start, end = entry["data_offsets"]
        if start != filled:
            raise ValueError(f"there is a gap or an overlap before {name}")
        filled = end
    if filled != size:
        raise ValueError("it holds more or less than its header tells")


def place_of(item):
    _, entry = item
    return entry["data_offsets"]


def read_tensor(name, entry, data):
    """The tensor that an entry {"dtype", "shape", "data_offsets"} of the header tells of."""
    dtype = SAFETENSORS_DTYPES[entry["dtype"]]
    shape = entry["shape"]
    start, end = entry["data_offsets"]
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape)} dimensions")
    for number in (*shape, start, end):
        if type(number) is not int or number < 0:
            raise ValueError(f"{name} has a size or place that is no number")
    count = math.prod(shape)
    if end > len(data) or count * dtype.itemsize != end - start:
        raise ValueError(f"the place or size of {name} does not fit the file")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start).reshape(shape)
