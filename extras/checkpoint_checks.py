"""What a checkpoint must be before anything in it is used. model.py's reader comes here.

    check_archive(path)                    # the file, before torch opens it
    check_own(content, path)               # what it says of its network
    check_extras(content, model, path)     # what it carries beside the weights

A checkpoint may be a stranger's, or half of a file that a full disk cut off. No code in it is run
(torch.load's `weights_only`). What else can be wrong becomes one sentence here, a CheckpointError.
"""

import os
import zipfile

import torch

from model import NORMS, SIZES, SMALLEST, CheckpointError, layer_norms

# ---------------------------------------------------------------- the file

def check_archive(path):
    """Raise ValueError for a torch file (a zip archive) that is damaged or unpacks to too much.

    torch does not read the checksums itself. It writes no compressed records, so a file with some
    is not torch's, and a small one could unpack to more than the memory.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        unpacked_size = sum(entry.file_size for entry in entries)
        if packed or unpacked_size > os.path.getsize(path):
            raise ValueError("its records are compressed or overlap")
        if archive.testzip() is not None:
            raise ValueError("a checksum in it does not fit")


# ---------------------------------------------------------------- the tensors

def check_tensors(tensors, file_size, path):
    """Raise CheckpointError where `tensors` is not {name: plain tensor}, or is larger than its file
    (a view can claim any size)."""
    if not isinstance(tensors, dict):
        named = False
    else:
        named = all(isinstance(name, str) and is_plain(t) for name, t in tensors.items())
    if not named:
        raise CheckpointError(f"{path} is not a checkpoint of a SegFormer: "
                              f"it holds other things than named tensors")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > file_size:
        raise CheckpointError(f"{path} is damaged: its tensors claim more bytes than the file has")


def is_plain(tensor):
    """A dense tensor in memory that is what it says: strided, real, not quantised, on the CPU."""
    if not isinstance(tensor, torch.Tensor):
        return False
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return not tensor.is_quantized and not tensor.is_complex()


def check_head(tensors, path):
    """Raise CheckpointError for half a decoder, or a head without classes."""
    head = tensors.get("decoder.classifier.weight")
    if head is None:
        if any(name.startswith("decoder.") for name in tensors):
            raise CheckpointError(
                f"{path} is not whole: it has parts of a decoder, but no classifier")
    elif head.ndim == 0 or len(head) == 0:
        raise CheckpointError(f"{path} has a head without classes")


# ---------------------------------------------------------------- what it says of itself

def check_own(content, path):
    """Raise CheckpointError for a checkpoint of this project that does not say what it is."""
    check_tensors(content.get("model"), os.path.getsize(path), path)
    variant = content.get("variant")
    if not isinstance(variant, str) or variant not in SIZES:
        raise CheckpointError(f"{path} is of a SegFormer {variant!r}, which is not in model.SIZES")
    norm = content.get("norm")
    if not isinstance(norm, str) or norm not in NORMS:
        raise CheckpointError(
            f"{path} was trained with norm {norm!r}, which is not in model.NORMS")
    if not isinstance(content.get("layer_norm_eps"), list):
        raise CheckpointError(f"{path} is damaged: it has no layer_norm_eps")


def check_extras(content, model, file_classes, path):
    """Raise CheckpointError where what stands beside the weights does not fit their network.

    `layer_norm_eps` is a list, or a number for all LayerNorms, or None. file_classes: the outputs
    of the file's head.
    """
    epsilons = content.get("layer_norm_eps")
    if not isinstance(epsilons, list):
        epsilons = [] if epsilons is None else [epsilons]
    elif len(epsilons) != len(layer_norms(model)):
        raise CheckpointError(f"{path} is damaged: it has {len(epsilons)} layer_norm_eps, "
                              f"its network {len(layer_norms(model))} LayerNorms")
    fits = (all(isinstance(eps, float) and eps > 0 for eps in epsilons)
            and is_image_size(content.get("input_size"))
            and is_list_of(content.get("classes"), file_classes)
            and is_list_of(content.get("palette"), file_classes))
    if not fits:
        raise CheckpointError(f"{path} is damaged: its layer_norm_eps, input_size, classes or "
                              f"palette do not fit its network")


def is_image_size(value):
    """None, or an (H, W) that the network takes."""
    if value is None:
        return True
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(isinstance(n, int) and n >= SMALLEST for n in value)


def is_list_of(value, count):
    """None, or a list with `count` entries."""
    return value is None or (isinstance(value, list) and len(value) == count)
