"""Weights in 8 or 4 bits: the layers that keep them so, and the checkpoint that holds such layers.

    layer_bits = pack(model, bits=4)              # in place: {"stages.0.patch_embed.proj": 4, ...}
    save_packed(model, layer_bits, "small.pth")
    model = load_checkpoint("small.pth")          # of model.py, as ever

A weight matrix has a row for each output; all other dimensions are its columns.

    8 bits   one scale a row, symmetric:  w = scale * code, code in -127..127
    4 bits   groups of 32 columns, each with a scale and a minimum in fp16:
             w = minimum + scale * code, code in 0..15, two of them in a byte: 4 + 32 / 32 = 5 bits
             a weight. Rows shorter than a group (depthwise convolutions) get 8 bits.

Linear, Conv2d and Embedding are packed; norms, biases and what is named in `keep` stay as they are.
A packed layer unpacks its weights each time it is used: that saves bytes, on the disk and in
memory, and costs time. What saves time is a runtime that computes in integers: extras/export.py.

`activation_bits=8` also rounds what goes into Linear layers and 1x1 convolutions to 8 bits, with a
scale for each token, as a runtime would; larger convolutions take their input as it is.

References
  Dettmers et al., LLM.int8(), 2022, arXiv:2208.07339: a scale a row, and a scale a token
  Dettmers and Zettlemoyer, The case for 4-bit precision, 2023, arXiv:2212.09720: small groups
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from extras.checkpoint_checks import check_extras, check_own
from model import (
    MAX_WIDTH,
    NORMS,
    CheckpointError,
    describe_normalisation,
    layer_norms,
    load_tensors,
    segformer,
    set_extras,
    write_atomically,
)

FORMAT = "effiseg-packed"
GROUP = 32                                                        # columns that share a scale
LARGEST_INT8 = 127
LARGEST_INT4 = 15
SMALLEST_SCALE = 2.0 ** -14                                       # fp16's smallest normal number
ROUND_UP = 1 + 2.0 ** -10                                         # more than fp16 rounds away


# ---------------------------------------------------------------- a matrix in 8 and in 4 bits

def pack_rows(matrix):
    """(rows, columns) -> codes int8 (rows, columns), scale float32 (rows, 1).

    codes * scale is within half a scale of `matrix`.
    """
    scale = matrix.abs().amax(1, keepdim=True) / LARGEST_INT8     # (rows, 1)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)      # not 0 / 0 in a row of zeros
    codes = (matrix / scale).round().to(torch.int8)
    return codes, scale


def unpack_rows(codes, scale):
    return codes * scale


def pack_groups(matrix):
    """(rows, columns) -> codes uint8 (rows, G * 16), scale and minimum float16 (rows, G).

    G = ceil(columns / 32). What `unpack_groups` makes of them is within half a scale of `matrix`.
    """
    rows, columns = matrix.shape
    missing = -columns % GROUP
    last = matrix[:, -1:].expand(rows, missing)                   # stretches no group's range
    groups = torch.cat([matrix, last], 1).unflatten(1, (-1, GROUP))     # (rows, G, 32)

    # fp16 rounds the two numbers of a group. Rounded outwards, the group stays inside its codes.
    lowest = groups.amin(2)                                       # (rows, G)
    minimum = (lowest - lowest.abs() * (ROUND_UP - 1)).half()     # (rows, G)
    reach = groups.amax(2) - minimum.float()                      # (rows, G)
    scale = (reach / LARGEST_INT4 * ROUND_UP).clamp(min=SMALLEST_SCALE).half()

    above = groups - minimum.float()[:, :, None]                  # (rows, G, 32), at least 0
    codes = (above / scale.float()[:, :, None]).round()
    codes = codes.clamp(0, LARGEST_INT4).to(torch.uint8).flatten(1)     # (rows, G * 32)
    low = codes[:, 0::2]
    high = codes[:, 1::2]
    return low | (high << 4), scale, minimum


def unpack_groups(codes, scale, minimum, columns):
    """What `pack_groups` made -> float32 (rows, columns)."""
    codes = codes.int()                                           # what ONNX has shifts for
    low = codes & 15
    high = codes >> 4
    both = torch.stack([low, high], 2).flatten(1)                 # (rows, G * 32)
    groups = both.unflatten(1, (-1, GROUP)).float()               # (rows, G, 32)
    values = minimum.float()[:, :, None] + scale.float()[:, :, None] * groups
    return values.flatten(1)[:, :columns]


def round_tokens(x, dim):
    """x rounded to 8 bits, with a scale for each token: `dim` are its channels. Same shape."""
    scale = x.abs().amax(dim, keepdim=True) / LARGEST_INT8
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).round() * scale


# ---------------------------------------------------------------- layers

class PackedLayer(nn.Module):
    """A layer whose weight, of `shape`, is held in `bits` bits. A subclass says what it does."""

    def __init__(self, shape, bits):
        super().__init__()
        self.shape = tuple(shape)
        self.bits = bits
        self.activation_bits = None
        rows = self.shape[0]
        self.columns = math.prod(self.shape[1:])
        if bits == 8:
            self.register_buffer("codes", torch.zeros(rows, self.columns, dtype=torch.int8))
            self.register_buffer("scale", torch.zeros(rows, 1))
        else:
            groups = math.ceil(self.columns / GROUP)
            bytes_of_row = groups * GROUP // 2
            self.register_buffer("codes", torch.zeros(rows, bytes_of_row, dtype=torch.uint8))
            self.register_buffer("scale", torch.zeros(rows, groups, dtype=torch.float16))
            self.register_buffer("minimum", torch.zeros(rows, groups, dtype=torch.float16))

    def store(self, weight):
        """Take the values of `weight`, of this layer's shape."""
        matrix = weight.detach().float().reshape(self.shape[0], self.columns)
        if self.bits == 8:
            self.codes, self.scale = pack_rows(matrix)
        else:
            self.codes, self.scale, self.minimum = pack_groups(matrix)

    def weight_in_use(self):
        """-> float32 of this layer's shape."""
        if self.bits == 8:
            matrix = unpack_rows(self.codes, self.scale)
        else:
            matrix = unpack_groups(self.codes, self.scale, self.minimum, self.columns)
        return matrix.reshape(self.shape)

    def extra_repr(self):
        return f"{self.shape}, {self.bits} bits"


class PackedLinear(PackedLayer):
    def __init__(self, layer, bits):
        super().__init__(layer.weight.shape, bits)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = layer.bias

    def forward(self, x):                                         # (..., in_features)
        if self.activation_bits == 8:
            x = round_tokens(x, -1)
        return F.linear(x, self.weight_in_use(), self.bias)       # (..., out_features)


class PackedConv2d(PackedLayer):
    def __init__(self, layer, bits):
        super().__init__(layer.weight.shape, bits)
        self.in_channels = layer.in_channels
        self.out_channels = layer.out_channels
        self.bias = layer.bias
        self.kernel_size = layer.kernel_size
        self.stride = layer.stride
        self.padding = layer.padding
        self.groups = layer.groups

    def forward(self, x):                                         # (B, C_in, H, W)
        if self.activation_bits == 8 and self.kernel_size == (1, 1):
            x = round_tokens(x, 1)
        weight = self.weight_in_use()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class PackedEmbedding(PackedLayer):
    def __init__(self, layer, bits):
        super().__init__(layer.weight.shape, bits)
        self.padding_idx = layer.padding_idx

    def forward(self, ids):                                       # (...)
        return F.embedding(ids, self.weight_in_use(), self.padding_idx)     # (..., C)


PACKED = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d, nn.Embedding: PackedEmbedding}


# ---------------------------------------------------------------- a network

def packable_layers(model, keep=()):
    """-> {name: layer} of all that can be packed and is not in, or below, one named in `keep`."""
    found = {}
    for name, layer in model.named_modules():
        if type(layer) in PACKED and not is_kept(name, keep):
            found[name] = layer
    return found


def is_kept(name, keep):
    return any(name == kept or name.startswith(f"{kept}.") for kept in keep)


def bits_of_layer(layer, bits):
    """8 in place of 4 for a layer whose rows are shorter than a group."""
    columns = math.prod(layer.weight.shape[1:])
    return 8 if columns < GROUP else bits


@torch.no_grad()
def pack(model, bits, keep=(), activation_bits=None):
    """Put packed layers in place of the model's. -> {name of the layer: its bits}

    Raises CheckpointError for weights that are not finite, or that fp16 cannot hold the range of.
    """
    layer_bits = {}
    for name, layer in packable_layers(model, keep).items():
        layer_bits[name] = bits_of_layer(layer, bits)
        packed = PACKED[type(layer)](layer, layer_bits[name])
        packed.store(layer.weight)
        if not packed.weight_in_use().isfinite().all():
            raise CheckpointError(f"{name} cannot be packed: it has weights that are not finite, "
                                  f"or beyond fp16's range")
        put_layer(model, name, packed)
    set_activation_bits(model, activation_bits)
    return layer_bits


def put_layer(model, name, layer):
    """Put `layer` in the place of the module of this name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def set_activation_bits(model, activation_bits):
    for module in model.modules():
        if isinstance(module, PackedLayer):
            module.activation_bits = activation_bits


def make_room(model, layer_bits, path):
    """Put empty packed layers in place of those that `layer_bits` names.

    Raises CheckpointError for names that are no such layers, and for other bits than 8 and 4.
    """
    layers = packable_layers(model)
    for name, bits in layer_bits.items():
        if name not in layers or bits not in (8, 4):
            raise CheckpointError(f"{path} is damaged: it has {bits!r} bits for {name!r}, "
                                  f"which its network cannot have")
        layer = layers[name]
        put_layer(model, name, PACKED[type(layer)](layer, bits))


def count_bits(model):
    """-> (bits that the packed weights take with their scales, how many weights these are)."""
    bits = 0
    weights = 0
    for module in model.modules():
        if isinstance(module, PackedLayer):
            weights += math.prod(module.shape)
            for buffer in module.buffers(recurse=False):
                bits += 8 * buffer.numel() * buffer.element_size()
    return bits, weights


# ---------------------------------------------------------------- its checkpoint

def save_packed(model, layer_bits, path, activation_bits=None, **extra):
    """Write a SegFormer that `pack` was applied to, and `extra` plain values or tensors beside it.

    Raises CheckpointError for a file that cannot be written.
    """
    norms = [name for name, norm_fn in NORMS.items() if norm_fn is model.norm_fn]
    content = {
        "format": FORMAT,
        "variant": model.variant,
        "norm": norms[0],
        "num_classes": model.num_classes,
        "width": model.decoder.norm.num_features,
        "classes": model.classes,
        "palette": model.palette,
        "input_size": model.input_size,
        "trained_on": model.trained_on,
        "layer_norm_eps": [norm.eps for norm in layer_norms(model)],
        "layer_bits": layer_bits,
        "activation_bits": activation_bits,
        "model": {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        **extra,
    }
    try:
        with write_atomically(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:                      # a full disk can be either
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise CheckpointError(f"cannot write {path}: {reason}") from None


def load_packed(content, num_classes, path):
    """What save_packed wrote -> the SegFormer, for inference. `load_checkpoint` comes here.

    Raises CheckpointError for anything that is not exactly such a network, and where `num_classes`
    is given: that is somebody who wants to train it.
    """
    check_own(content, path)
    if num_classes is not None:
        raise CheckpointError(f"{path} has its weights in 8 or 4 bits, which is for inference: "
                              f"to train, start from the checkpoint that it was made of")
    check_packed(content, path)
    model = segformer(content["variant"], content["num_classes"], NORMS[content["norm"]],
                      content["width"])
    make_room(model, content["layer_bits"], path)
    loaded = load_tensors(model, content["model"], None, path)
    check_extras(content, model, model.num_classes, path)
    set_extras(model, content, model.num_classes)
    set_activation_bits(model, content["activation_bits"])
    model.folded = True                                           # for inference only
    bits, weights = count_bits(model)
    print(f"{path}: SegFormer-{model.variant.upper()}, {model.num_classes} classes, EffiSeg, "
          f"{bits / max(weights, 1):.2f} bits a weight, {loaded} tensors, "
          f"{describe_normalisation(model)}")
    return model.eval().requires_grad_(False)


def check_packed(content, path):
    """Raise CheckpointError where the head of a packed file is not what its tensors say.

    The sizes must be those of tensors in the file, so that a small file claims no large network.
    """
    tensors = content["model"]
    heads = (("num_classes", "decoder.classifier.bias"), ("width", "decoder.norm.weight"))
    for name, tensor_name in heads:
        size = content.get(name)
        tensor = tensors.get(tensor_name)
        fits = (isinstance(size, int) and tensor is not None and tensor.ndim == 1
                and 0 < size <= MAX_WIDTH and size == len(tensor))
        if not fits:
            raise CheckpointError(f"{path} is damaged: its {name} does not fit its tensors")
    if not isinstance(content.get("layer_bits"), dict):
        raise CheckpointError(f"{path} is damaged: it does not say which layers are packed")
    if content.get("activation_bits") not in (None, 8):
        raise CheckpointError(f"{path} is damaged: its activations cannot have "
                              f"{content.get('activation_bits')!r} bits")
