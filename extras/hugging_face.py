"""A network as a Hugging Face folder, which transformers 4 and 5 open.

    python -m extras.export student.pth my-segformer            # a target without a suffix

    from transformers import pipeline
    pipeline("image-segmentation", model="my-segformer")("photo.jpg")

Three files are written: `model.safetensors`, `config.json` and `preprocessor_config.json`. The
names of the tensors come from the table that reading uses (extras/checkpoint_formats.py), read
backwards. `load_checkpoint("my-segformer")` opens the folder too.

transformers builds every LayerNorm with eps 1e-5, whatever its config says, where NVlabs' code and
ours has 1e-6 in the blocks. So the logits change a little; how much is measured before the folder
is kept.
"""

import copy
import json
import os
import shutil
from pathlib import Path

import torch

from extras.checkpoint_formats import HUGGING_FACE, convert, read_folder, their_name
from extras.cli import UsageError
from model import (
    DROP_PATH,
    DROPOUT,
    HEADS,
    MLP_RATIO,
    REDUCTIONS,
    SIZES,
    layer_norm,
    layer_norms,
    write_atomically,
)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
HUGGING_FACE_EPS = 1e-5                     # of every LayerNorm in transformers
TOLERANCE = 1e-3                            # largest change of logits by the other eps
BILINEAR = 2                                # PIL's number, as eval.py resizes
CHECKED_SIZE = (2, 3, 96, 128)              # of the random images


def write_folder(model, target):
    """Write `model` as a Hugging Face folder. -> {"difference", "bytes"}

    difference: the largest one between the model's logits and those of the folder read again, on
                random images
    A folder that is there already keeps its other files. Nothing in it changes unless all agrees.
    Raises UsageError for a network that transformers cannot build, for logits that differ, and for
    a target that is no folder.
    """
    check_network(model, target)
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file: name another folder")
    if not target.parent.is_dir():
        raise UsageError(f"{target}: there is no folder {target.parent}")
    partial = target.with_name(f"partial-{os.getpid()}-{target.name}")
    try:
        partial.mkdir()
        write_safetensors(their_tensors(model), partial / WEIGHTS)
        write_json(config_of(model), partial / CONFIG)
        write_json(preprocessor_of(model), partial / PREPROCESSOR)
        difference = difference_of(model, partial)
        if not difference <= TOLERANCE:                           # NaN is none either
            raise UsageError(f"{target} was not written: transformers' epsilon in every LayerNorm "
                             f"would change the logits by {difference:.1e}")
        target.mkdir(exist_ok=True)
        for name in (CONFIG, PREPROCESSOR, WEIGHTS):
            os.replace(partial / name, target / name)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"difference": difference, "bytes": (target / WEIGHTS).stat().st_size}


def check_network(model, target):
    """Raise UsageError for a network that transformers has no code for."""
    if model.norm_fn is not layer_norm:
        raise UsageError(f"{target} was not written: transformers' SegFormer has LayerNorm only, "
                         "and this network has other norms; export it to .onnx or .pt2")


def difference_of(model, folder):
    """-> the largest difference between the logits of `model` and of the folder that it became."""
    content, _ = convert(read_folder(folder), None, folder)
    again = copy.deepcopy(model).eval()
    again.load_state_dict(content["model"])
    for norm in layer_norms(again):
        norm.eps = content["layer_norm_eps"]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(CHECKED_SIZE, generator=generator)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(images)
        found = again(images)
    return (found - expected).abs().max().item()


# ---------------------------------------------------------------- what the files hold

def their_tensors(model):
    """-> {Hugging Face's name: tensor}; mean and std stand in preprocessor_config.json."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in ("mean", "std"):
            continue
        tensors[their_name(name, HUGGING_FACE)] = tensor.detach().cpu().contiguous()
    return tensors


def config_of(model):
    """-> config.json. Under "effiseg" stands what only this project reads."""
    size = SIZES[model.variant]
    names = model.classes or [f"LABEL_{i}" for i in range(model.num_classes)]
    return {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": "segformer",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "num_channels": 3,
        "num_encoder_blocks": len(size["dims"]),
        "hidden_sizes": list(size["dims"]),
        "depths": list(size["depths"]),
        "num_attention_heads": list(HEADS),
        "sr_ratios": list(REDUCTIONS),
        "mlp_ratios": [MLP_RATIO] * len(size["dims"]),
        "patch_sizes": [stage.patch_embed.proj.kernel_size[0] for stage in model.stages],
        "strides": [stage.patch_embed.proj.stride[0] for stage in model.stages],
        "decoder_hidden_size": len(model.decoder.fuse.weight),
        "hidden_act": "gelu",
        "layer_norm_eps": HUGGING_FACE_EPS,
        "drop_path_rate": DROP_PATH,
        "classifier_dropout_prob": DROPOUT,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "reshape_last_stage": True,
        "semantic_loss_ignore_index": 255,
        "torch_dtype": "float32",
        "effiseg": {"palette": model.palette, "input_size": model.input_size},
    }


def preprocessor_of(model):
    """-> preprocessor_config.json: resize as in training, divide by 255, normalise."""
    settings = {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": model.input_size is not None,
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": model.mean.flatten().tolist(),
        "image_std": model.std.flatten().tolist(),
        "do_reduce_labels": False,
    }
    if model.input_size is not None:
        height, width = model.input_size
        settings["size"] = {"height": height, "width": width}
    return settings


def write_json(content, path):
    with write_atomically(path) as file:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        file.write(text.encode())


# ---------------------------------------------------------------- safetensors

NAMES_OF_DTYPES = {torch.float32: "F32", torch.int64: "I64"}


def write_safetensors(tensors, path):
    """{name: tensor} -> a .safetensors file: 8 bytes header length, JSON header, raw tensors."""
    header = {"__metadata__": {"format": "pt"}}                   # transformers asks for it
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES_OF_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                               # the tensors begin aligned
    with write_atomically(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(tensor.numpy().tobytes())
