"""A segmenter that is told what to segment: our SegFormer, a small text encoder, a dot product.

    model = PromptSegmenter("b0", 64, "letters", prompts, classes)
    answer = model(images, ["car", "person"])     # mask (B, 2, H/4, W/4), presence (B, 2): logits
    fixed = fixed_prompts(model, ["car", "road"]) # an ordinary SegFormer with these as its classes

        pixels   = normalize(segformer(images))                  # (B, D, h, w): D "classes"
        words    = normalize(text(prompts))                      # (K, D)
        mask     = exp(scale) <pixels, words> + bias             # (B, K, h, w)
        look     = sum_n softmax_n(mask) pixels_n                # (B, K, D), where the mask looks
        whole    = mean_n pixels_n                               # (B, D), all of the image
        presence = MLP([D look * words, sqrt(D) words, sqrt(D) whole])        # (B, K)

One mask for each image and prompt; whether the thing is there at all is a question apart, as in
SAM 3, and its gradient does not reach the mask's scale. The image is encoded once for any number of
prompts. The SegFormer's classifier is the embedding of the pixels; model.py does not know. Text:
extras/prompt_text.py; files: extras/prompt_checkpoint.py.

References
  Radford et al., CLIP, 2021, arXiv:2103.00020: the learned scale of a cosine
  Carion et al., SAM 3, 2025, arXiv:2511.16719: presence apart from the mask
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from extras.prompt_text import TextEncoder, VectorTable
from extras.prompt_words import TOKENIZERS, class_prompts
from model import layer_norm, segformer

DIM = 64                                                          # D, of pixels and words
START_SCALE = 10.0                                                # a cosine of 1 is a logit of 10
START_BIAS = -2.0                                                 # most pixels are not meant


# ---------------------------------------------------------------- the network

class Answer(NamedTuple):
    """Logits for K prompts about B images."""
    mask: torch.Tensor                                            # (B, K, h, w)
    presence: torch.Tensor                                        # (B, K)


class PresenceHead(nn.Module):
    """Is the thing there? From where the mask looks, from the word, and from the whole image.

    An entry of a vector of length 1 is of the size 1 / sqrt(D), and one of look * words 1 / D: as
    they are, the word drowns the image, and the head learns the word only. So they are scaled to
    entries of the size 1. A softmax always looks somewhere; that an image shows nothing at all is
    seen in the mean of its pixels.
    """

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.fc1 = nn.Linear(3 * dim, dim)
        self.fc2 = nn.Linear(dim, 1)

    def forward(self, pixels, words, mask):                       # (B, D, h, w), (K, D), logits
        where = mask.detach().flatten(2).softmax(2)               # (B, K, h*w)
        look = where @ pixels.flatten(2).transpose(1, 2)          # (B, K, D)
        match = self.dim * look * words                           # (B, K, D), its mean: the cosine
        word = math.sqrt(self.dim) * words.expand_as(look)        # (B, K, D)
        whole = math.sqrt(self.dim) * pixels.mean((2, 3))         # (B, D)
        seen = torch.cat([match, word, whole[:, None].expand_as(look)], 2)    # (B, K, 3D)
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
