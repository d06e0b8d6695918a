"""A segmenter that is told what to segment: our SegFormer, a small text encoder, a dot product.

    model = PromptSegmenter("b0", 64, "letters", prompts, classes)
    answer = model(images, ["car", "person"])     # mask (B, 2, H/4, W/4), presence (B, 2): logits
    fixed = fixed_prompts(model, ["car", "road"]) # an ordinary SegFormer with these as its classes
    save_prompt(model, "student.pth");  model = load_prompt("student.pth")

        pixels   = normalize(segformer(images))                  # (B, D, h, w): D "classes"
        words    = normalize(text(prompts))                      # (K, D)
        mask     = exp(scale) <pixels, words> + bias             # (B, K, h, w)
        look     = sum_n softmax_n(mask) pixels_n                # (B, K, D), where the mask looks
        presence = MLP([look * words, words])                    # (B, K)

One mask for each image and prompt; whether the thing is there at all is a question apart, as in
SAM 3, and its gradient does not reach the mask's scale. The image is encoded once for any number of
prompts. The SegFormer's classifier is the embedding of the pixels; model.py does not know.

The text encoder reads letters, so it knows how a word is spelt and nothing of the world: this is
prompting, not an open vocabulary. Vectors of a pretrained encoder can stand in its place: see
`VectorTable`.

References
  Radford et al., CLIP, 2021, arXiv:2103.00020: the learned scale of a cosine
  Carion et al., SAM 3, 2025, arXiv:2511.16719: presence apart from the mask
"""

import copy
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from extras.checkpoint_checks import check_tensors, is_list_of
from extras.cli import UsageError
from extras.packed_layers import make_room, pack, save_packed, set_activation_bits
from extras.prompt_words import (
    MAX_TOKENS,
    TOKENIZERS,
    class_prompts,
    clean_prompt,
    plain,
    tokenise,
)
from model import (
    NORMS,
    CheckpointError,
    layer_norm,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    segformer,
)

DIM = 64                                                          # D, of pixels and words
TEXT_WIDTH = 64
TEXT_DEPTH = 2
TEXT_HEADS = 4
START_SCALE = 10.0                                                # a cosine of 1 is a logit of 10
START_BIAS = -2.0                                                 # most pixels are not meant


# ---------------------------------------------------------------- text

class TextBlock(nn.Module):
    """Pre-norm transformer block over the letters of each prompt."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def split_heads(self, x):                                     # (K, L, width)
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)   # (K, heads, L, d)

    def forward(self, x, is_letter):                              # (K, L, width), bool (K, L)
        y = self.norm1(x)
        q = self.split_heads(self.q(y))
        k = self.split_heads(self.k(y))
        v = self.split_heads(self.v(y))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=is_letter[:, None, None])
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        y = F.gelu(self.fc1(self.norm2(x)))
        return x + self.fc2(y)                                    # (K, L, width)


class TextEncoder(nn.Module):
    """Prompts -> (K, D), by their letters. Padding is neither attended to nor averaged over."""

    def __init__(self, tokenizer, dim):
        super().__init__()
        self.tokenizer = tokenizer
        self.embed = nn.Embedding(tokenizer.vocabulary, TEXT_WIDTH, padding_idx=0)
        self.place = nn.Parameter(0.02 * torch.randn(MAX_TOKENS, TEXT_WIDTH))
        self.blocks = nn.ModuleList(TextBlock(TEXT_WIDTH, TEXT_HEADS) for _ in range(TEXT_DEPTH))
        self.norm = nn.LayerNorm(TEXT_WIDTH)
        self.proj = nn.Linear(TEXT_WIDTH, dim)

    def forward(self, prompts):                                   # K strings
        ids = tokenise(prompts, self.tokenizer).to(self.place.device)     # (K, L)
        is_letter = ids > 0                                       # (K, L)
        x = self.embed(ids) + self.place[:ids.shape[1]]           # (K, L, width)
        for block in self.blocks:
            x = block(x, is_letter)
        x = self.norm(x) * is_letter[:, :, None]
        mean = x.sum(1) / is_letter.sum(1, keepdim=True)          # (K, width)
        return self.proj(mean)                                    # (K, D)


class VectorTable(nn.Module):
    """Prompts -> (K, D): vectors from a file, through a trained linear map.

    The file is an .npz with `prompts` (K strings) and `vectors` (K, E): what a pretrained text
    encoder says of them. Such vectors know what words mean, but only the words in the file.
    """

    def __init__(self, names, vectors, dim):
        super().__init__()
        self.tokenizer = TOKENIZERS["bytes"]                      # any text is a key
        self.names = names
        self.register_buffer("vectors", vectors)                  # (K, E)
        self.proj = nn.Linear(vectors.shape[1], dim)

    def forward(self, prompts):                                   # K strings
        places = []
        for prompt in prompts:
            key = plain(clean_prompt(prompt, self.tokenizer))
            if key not in self.names:
                raise UsageError(f"there is no vector for the prompt {prompt!r}: the file of "
                                 f"--text-vectors has {len(self.names)} others")
            places.append(self.names.index(key))
        return self.proj(self.vectors[places])                    # (K, D)


def read_vectors(path):
    """An .npz of `prompts` and `vectors` -> (names, float32 (K, E)). Raises UsageError."""
    try:
        with np.load(path, allow_pickle=False) as content:
            names = [plain(str(name)) for name in content["prompts"]]
            vectors = torch.from_numpy(np.asarray(content["vectors"], np.float32))
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(f"{path}: not an .npz with `prompts` and `vectors` "
                         f"({str(error).splitlines()[0]})") from None
    if vectors.ndim != 2 or len(vectors) != len(names) or not vectors.isfinite().all():
        raise UsageError(f"{path}: `vectors` must be finite, one row for each of `prompts`")
    return names, F.normalize(vectors, dim=1)


# ---------------------------------------------------------------- the network

class Answer(NamedTuple):
    """Logits for K prompts about B images."""
    mask: torch.Tensor                                            # (B, K, h, w)
    presence: torch.Tensor                                        # (B, K)


class PresenceHead(nn.Module):
    """Is the thing there? From where the mask looks, and from the word."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(2 * dim, dim)
        self.fc2 = nn.Linear(dim, 1)

    def forward(self, pixels, words, mask):                       # (B, D, h, w), (K, D), logits
        where = mask.detach().flatten(2).softmax(2)               # (B, K, h*w)
        look = where @ pixels.flatten(2).transpose(1, 2)          # (B, K, D)
        words = words.expand(len(look), -1, -1)                   # (B, K, D)
        seen = torch.cat([look * words, words], 2)                # (B, K, 2D)
        return self.fc2(F.gelu(self.fc1(seen)))[:, :, 0]          # (B, K)


class PromptSegmenter(nn.Module):
    """tokenizer: a name in TOKENIZERS, or a VectorTable's (names, vectors)
    prompts: what it is trained with; classes, palette: of the data that it is trained on
    """

    def __init__(self, variant, dim, tokenizer, prompts, classes, norm_fn=layer_norm):
        super().__init__()
        self.segformer = segformer(variant, dim, norm_fn)
        self.dim = dim
        if isinstance(tokenizer, str):
            self.text = TextEncoder(TOKENIZERS[tokenizer], dim)
        else:
            self.text = VectorTable(*tokenizer, dim)
        self.presence = PresenceHead(dim)
        self.scale = nn.Parameter(torch.tensor([math.log(START_SCALE)]))
        self.bias = nn.Parameter(torch.tensor([START_BIAS]))
        self.prompts = list(prompts)
        self.classes = list(classes)
        self.palette = None

    @property
    def tokenizer(self):
        """What a checkpoint calls the way in which prompts are read."""
        return "vectors" if isinstance(self.text, VectorTable) else self.text.tokenizer.name

    @property
    def variant(self):
        return self.segformer.variant

    @property
    def num_classes(self):
        return len(self.classes)

    @property
    def input_size(self):
        return self.segformer.input_size

    @input_size.setter
    def input_size(self, size):
        self.segformer.input_size = size

    @property
    def trained_on(self):
        return self.segformer.trained_on

    @trained_on.setter
    def trained_on(self, facts):
        self.segformer.trained_on = facts

    def look(self, images):                                       # (B, 3, H, W)
        """-> pixels (B, D, h, w), of length 1. In float32 whatever autocast says."""
        return F.normalize(self.segformer(images).float(), dim=1)

    def read(self, prompts):                                      # K strings
        """-> words (K, D), of length 1"""
        return F.normalize(self.text(prompts).float(), dim=1)

    def compare(self, pixels, words):                             # (B, D, h, w), (K, D)
        """-> Answer"""
        cosine = torch.einsum("bdhw,kd->bkhw", pixels, words)
        mask = self.scale.exp() * cosine + self.bias              # (B, K, h, w)
        return Answer(mask, self.presence(pixels, words, mask))

    def answer(self, images, prompts):
        """Images (B, 3, H, W) in [0, 1], K strings -> Answer"""
        return self.compare(self.look(images), self.read(prompts))

    def forward(self, images, prompts=None):
        """With prompts: -> Answer. Without: the mask logits of its classes, as any segmenter."""
        if prompts is None:
            return self.answer(images, class_prompts(self.classes)).mask
        return self.answer(images, prompts)

    def fold(self):
        """-> the ordinary network that segments its classes, for inference."""
        return fixed_prompts(self, class_prompts(self.classes), self.classes, self.palette)


# ---------------------------------------------------------------- an ordinary network of it

class FixedPrompts(nn.Module):
    """A decoder of pixel embeddings, and words that do not change: a classifier."""

    def __init__(self, decoder, matrix, bias):
        super().__init__()
        self.decoder = decoder
        self.matrix = nn.Parameter(matrix, requires_grad=False)   # (K, D), the scale in it
        self.bias = nn.Parameter(bias, requires_grad=False)       # (K,)

    def forward(self, stages):
        pixels = F.normalize(self.decoder(stages).float(), dim=1)             # (B, D, h, w)
        return F.conv2d(pixels, self.matrix[:, :, None, None], self.bias)     # (B, K, h, w)


@torch.no_grad()
def fixed_prompts(model, prompts, names=None, palette=None):
    """-> a folded SegFormer whose classes are `prompts`: its logits are the mask logits.

    It goes wherever a folded SegFormer goes: eval.evaluate, extras.export.
    """
    words = model.read(prompts)                                   # (K, D)
    network = model.segformer.fold()
    bias = model.bias.expand(len(prompts)).clone()
    network.decoder = FixedPrompts(network.decoder, model.scale.exp() * words, bias)
    network.num_classes = len(prompts)
    network.classes = list(names or prompts)
    network.palette = palette
    return network


@torch.no_grad()
def plain_segformer(model, prompts, palette=None):
    """-> an unfolded SegFormer whose classes are `prompts`, that save_checkpoint can write.

    A plain classifier has no way to divide by a pixel's length, so its logits are the mask's times
    a positive number for each pixel (and without the bias): the class of each pixel is the same.
    """
    old = model.segformer.decoder.classifier
    words = model.scale.exp() * model.read(prompts)               # (K, D)
    network = copy.deepcopy(model.segformer)
    classifier = nn.Conv2d(old.in_channels, len(prompts), 1)
    classifier.weight.copy_((words @ old.weight.flatten(1))[:, :, None, None])
    classifier.bias.copy_(words @ old.bias)
    network.decoder.classifier = classifier
    network.num_classes = len(prompts)
    network.classes = list(prompts)
    network.palette = palette
    return network.eval()


# ---------------------------------------------------------------- checkpoints

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
    size = Path(path).stat().st_size
    check_tensors(facts.get("tensors"), size, path)
    prompts = facts.get("prompts")
    classes = facts.get("classes")
    lists_are_words = (isinstance(prompts, list) and isinstance(classes, list) and classes
                       and all(isinstance(word, str) for word in [*prompts, *classes]))
    if not lists_are_words or not is_list_of(facts.get("palette"), len(classes)):
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
    elif tokenizer not in TOKENIZERS:
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


def norm_name(norm_fn):
    return next(name for name, known in NORMS.items() if known is norm_fn)
