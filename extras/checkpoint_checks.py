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

from extras.printable import is_plain_text, printable
from model import NORMS, SIZES, SMALLEST, CheckpointError, layer_norms

MOST_BYTES = 2 ** 32                                              # of a run of B5: 1.4 * 10^9
LONGEST_NAME = 200                                                # of a class or a tensor
LONGEST_PATH = 4200                                               # Linux takes 4096
MOST_FOLDS = 10 ** 9
MOST_PIXELS = 2 ** 24                                             # of input_size: 4096x4096

# ---------------------------------------------------------------- the file

def check_size(path):
    """Raise ValueError for a file that is larger than any SegFormer's, and perhaps than memory."""
    if os.path.getsize(path) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")


def check_archive(path):
    """Raise ValueError for a torch file (a zip archive) that is damaged or unpacks to too much.

    torch does not read the checksums itself. It writes no compressed records, so a file with some
    is not torch's, and a small one could unpack to more than the memory.
    """
    check_size(path)
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
    if named:
        check_names(tensors, path)
    else:
        raise CheckpointError(f"{path} is not a checkpoint of a SegFormer: "
                              f"it holds other things than named tensors")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > file_size:
        raise CheckpointError(f"{path} is damaged: its tensors claim more bytes than the file has")


def check_names(tensors, path):
    """Names end up in sentences: they are short, and only text."""
    for name in tensors:
        if not is_plain_text(name, LONGEST_NAME):
            raise CheckpointError(f"{path} is not a checkpoint of a SegFormer: "
                                  f"it has a tensor named {printable(name)}")


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
        raise CheckpointError(f"{path} is of a SegFormer {printable(repr(variant))}, "
                              f"which is not in model.SIZES")
    norm = content.get("norm")
    if not isinstance(norm, str) or norm not in NORMS:
        raise CheckpointError(f"{path} was trained with norm {printable(repr(norm))}, "
                              f"which is not in model.NORMS")
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
            and is_list_of(is_class_name, content.get("classes"), file_classes)
            and is_list_of(is_colour, content.get("palette"), file_classes)
            and is_origin(content.get("trained_on")))
    if not fits:
        raise CheckpointError(f"{path} is damaged: its layer_norm_eps, input_size, classes, "
                              f"palette or trained_on do not fit its network")


def is_image_size(value):
    """None, or an (H, W) that the network takes, and a machine too."""
    if value is None:
        return True
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    if not all(type(side) is int and side >= SMALLEST for side in value):
        return False
    height, width = value
    return height * width <= MOST_PIXELS


def is_list_of(is_right, value, count):
    """None, or a list with `count` entries that are right, by is_right(entry)."""
    if value is None:
        return True
    return isinstance(value, list) and len(value) == count and all(map(is_right, value))


def is_class_name(value):
    return isinstance(value, str) and is_plain_text(value, LONGEST_NAME)


def is_colour(value):
    """An (R, G, B) of 8 bits each?"""
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return False
    return all(type(channel) is int and 0 <= channel <= 255 for channel in value)


def is_origin(value):
    """None, or the flags --data, --fold, --folds, --fold-by and --with-val of a training."""
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    texts = [value.get(name) for name in ("data", "fold_by")]
    numbers = [value.get(name) for name in ("fold", "folds")]
    is_switch = type(value.get("with_val", False)) is bool
    return all(map(is_short_text, texts)) and all(map(is_small_number, numbers)) and is_switch


def is_short_text(value):
    """None, or a path or less. It may hold what cannot be printed, as paths may."""
    return value is None or (isinstance(value, str) and len(value) <= LONGEST_PATH)


def is_small_number(value):
    return value is None or (type(value) is int and 0 <= value <= MOST_FOLDS)
