"""Checkpoints of a student that is told what to segment.

    save_prompt(model, "student.pth", half=False)
    model = load_prompt("student.pth")
    small, layer_bits = packed_prompt(model, MODES["4"])          # of extras/quantize.py
    save_packed_prompt(small, layer_bits, "small.pth")            # load_prompt opens it too

There is no second format: such a file is the SegFormer's own checkpoint with one entry more,
"prompt": the tokenizer's name, the prompts, the classes, and the tensors of text encoder and
presence head. `load_checkpoint` opens it as a SegFormer whose outputs are the pixels' vectors.
"""

import copy
import os

import torch

from extras.checkpoint_checks import check_tensors, is_colour, is_list_of
from extras.packed_layers import make_room, pack, save_packed, set_activation_bits
from extras.prompt_model import PromptSegmenter
from extras.prompt_text import VectorTable
from extras.prompt_words import TOKENIZERS
from model import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint


def own_tensors(model, half=False):
    """All that is not the SegFormer's, {name: tensor}."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("segformer."):
            is_small = half and tensor.dtype == torch.float32
            tensors[name] = tensor.half() if is_small else tensor.contiguous()
    return tensors


def facts_of(model, half=False, layer_bits=None):
    """What a checkpoint has under "prompt"."""
    names = model.text.names if isinstance(model.text, VectorTable) else None
    return {
        "tokenizer": model.tokenizer,
        "prompts": model.prompts,
        "classes": model.classes,
        "palette": model.palette,
        "vector_names": names,
        "layer_bits": layer_bits or {},
        "tensors": own_tensors(model, half),
    }


def save_prompt(model, path, half=False, **extra):
    """Write `model`, and `extra` beside it: the SegFormer's own checkpoint with one entry more.

    Raises CheckpointError as save_checkpoint does.
    """
    save_checkpoint(model.segformer, path, half=half, prompt=facts_of(model, half), **extra)


def load_prompt(path, num_classes=None):
    """-> the PromptSegmenter in `path`, on the CPU, in eval mode. Raises CheckpointError.

    num_classes: of no use here; the loop gives it to whatever loads a checkpoint
    """
    content = read_checkpoint(path)
    facts = content.get("prompt")
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path} is not a student that is told what to segment: "
                              f"it has no text encoder")
    check_facts(facts, path)
    network = load_checkpoint(path)
    how = facts["tokenizer"]
    if how == "vectors":
        how = (facts["vector_names"], facts["tensors"]["text.vectors"].float())
    model = PromptSegmenter(network.variant, network.num_classes, how, facts["prompts"],
                            facts["classes"], network.norm_fn)
    load_own_tensors(model, facts, path)
    model.segformer = network
    model.palette = facts["palette"]
    set_activation_bits(model.text, content.get("activation_bits"))
    print(f"{path}: reads {model.tokenizer}, trained with {len(model.prompts)} prompts "
          f"for {len(model.classes)} classes")
    return model.eval()


def check_facts(facts, path):
    """Raise CheckpointError where a file's "prompt" is not what save_prompt writes."""
    damaged = CheckpointError(f"{path} is damaged: what it says about its prompts does not fit")
    size = os.path.getsize(path)
    check_tensors(facts.get("tensors"), size, path)
    prompts = facts.get("prompts")
    classes = facts.get("classes")
    lists_are_words = (isinstance(prompts, list) and isinstance(classes, list) and classes
                       and all(isinstance(word, str) for word in [*prompts, *classes]))
    if not lists_are_words or not is_list_of(is_colour, facts.get("palette"), len(classes)):
        raise damaged
    if not isinstance(facts.get("layer_bits"), dict):
        raise damaged
    tokenizer = facts.get("tokenizer")
    if tokenizer == "vectors":
        vectors = facts["tensors"].get("text.vectors")
        names = facts.get("vector_names")
        if vectors is None or vectors.ndim != 2 or not isinstance(names, list):
            raise damaged
        if len(names) != len(vectors):
            raise damaged
    elif not isinstance(tokenizer, str) or tokenizer not in TOKENIZERS:
        raise CheckpointError(f"{path} reads its prompts with {tokenizer!r}, which is not one of "
                              f"{', '.join(TOKENIZERS)}")


def load_own_tensors(model, facts, path):
    """Copy the text encoder, presence head, scale and bias of a file into `model`."""
    make_room(model, facts["layer_bits"], path)
    expected = own_tensors(model)
    tensors = facts["tensors"]
    same_names = expected.keys() == tensors.keys()
    if not same_names or any(expected[name].shape != tensors[name].shape for name in expected):
        raise CheckpointError(f"{path} is not this network: its text encoder or presence head has "
                              f"other tensors than {model.tokenizer} needs")
    model.load_state_dict(tensors, strict=False)


def packed_prompt(model, mode, keep=()):
    """-> (a copy with packed layers, for inference; {layer: bits}).

    mode: of extras.quantize. The presence head stays: one logit decides about a whole mask.
    """
    small = copy.deepcopy(model).eval()
    kept = ("presence", *keep)
    layer_bits = pack(small, mode.weight_bits, kept, mode.activation_bits)
    small.segformer.folded = True
    return small.requires_grad_(False), layer_bits


def save_packed_prompt(model, layer_bits, path, activation_bits=None):
    """Write what packed_prompt made; load_prompt opens it."""
    text_bits = {}
    network_bits = {}
    for name, bits in layer_bits.items():
        if name.startswith("segformer."):
            network_bits[name.removeprefix("segformer.")] = bits
        else:
            text_bits[name] = bits
    save_packed(model.segformer, network_bits, path, activation_bits,
                prompt=facts_of(model, layer_bits=text_bits))
