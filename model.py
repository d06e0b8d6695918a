"""SegFormer, written by hand: the MiT encoder B0-B5, the MLP decoder, the norm hook, and checkpoints.

    model = segformer("b0", num_classes=19)             # or norm_fn=dyt, norm_fn=dyt_dyl, or a function of your own
    logits = model(images)                              # (B, 3, H, W) in [0, 1] -> (B, 19, ceil(H/4), ceil(W/4))
    logits, stages, patch_embeds = model.features(images)
    fast = model.fold()                                 # the same outputs for inference, fewer operations
    model = load_checkpoint("b2.pth")                   # ours, or a Hugging Face .bin / .safetensors

Three things to know while reading:
- Tokens are (B, H, W, C) from the image to the decoder. In memory that *is* a channels-last image, so a LayerNorm or a
  Linear sees its channels last and a convolution sees an image, and nothing is ever copied between the two.
- The decoder is linear up to its ReLU, which is worth a factor of its own: see `Decoder`.
- The model normalises its own input, so a checkpoint carries its preprocessing.

References
  [1] Xie et al., SegFormer, 2021, arXiv:2105.15203          the network: encoder section 3.1, decoder section 3.2
  [2] Zhu et al., Transformers without Normalization, 2025, arXiv:2503.10622          DyT
  [3] Kim et al., EffiSeg, 2025                              DyT after patch embeddings (eq. 1), DyL elsewhere (eq. 2)
  [4] Huang et al., Deep Networks with Stochastic Depth, 2016, arXiv:1603.09382       drop-path
"""

import copy
import json
import math
import os
import re
import zipfile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Widths and depths of the four stages and the decoder's width D ([1] Table 6).
WIDE = (64, 128, 320, 512)
SIZES = {
    "b0": dict(dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), width=256),
    "b1": dict(dims=WIDE, depths=(2, 2, 2, 2), width=256),
    "b2": dict(dims=WIDE, depths=(3, 4, 6, 3), width=768),
    "b3": dict(dims=WIDE, depths=(3, 4, 18, 3), width=768),
    "b4": dict(dims=WIDE, depths=(3, 8, 27, 3), width=768),
    "b5": dict(dims=WIDE, depths=(3, 6, 40, 3), width=768),
}
HEADS, REDUCTIONS = (1, 2, 5, 8), (8, 4, 2, 1)                    # per stage, in every size
MLP_RATIO, DROP_PATH, DROPOUT = 4, 0.1, 0.1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)          # ImageNet's, of RGB in [0, 1]
CACHED = 2 ** 21                                                  # floats of a map that a CPU's caches hold: 8 MiB
SMALLEST = 32                                                     # pixels, stage 4's stride
MAX_HEADER, MAX_WIDTH = 100_000_000, 4096                         # of a file that is not ours: bytes of safetensors' header, D


# ---------------------------------------------------------------- norms: norm_fn(dim, site) -> nn.Module

class DyT(nn.Module):
    """Dynamic Tanh, y = gamma tanh(alpha x) + beta with one scalar alpha ([2]; [3] eq. 1). (..., C) -> (..., C)."""

    def __init__(self, dim, alpha=0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        # [None]: beside a half-precision x a 0-dim alpha would count as half too, and its gradient, one sum over x, overflow
        return torch.addcmul(self.bias, self.weight, torch.tanh_(self.alpha[None] * x))


class FoldedDyT(nn.Module):
    """A DyT for inference behind a map that has its 2 alpha already: tanh(z) = 2 sigmoid(2 z) - 1, and a sigmoid costs a CPU a
    quarter of a tanh. Overwrites x. (..., C) -> (..., C)."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias = nn.Parameter(2 * norm.weight), nn.Parameter(norm.bias - norm.weight)

    def forward(self, x):
        return torch.addcmul(self.bias, self.weight, torch.sigmoid_(x))


class DyL(nn.Module):
    """Dynamic Linear, y = gamma alpha x + beta with an alpha per channel ([3] eq. 2). (..., C) -> (..., C).

    Linear in x, so at inference it disappears into the linear map that follows: see `SegFormer.fold`.
    """

    def __init__(self, dim, alpha=0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((dim,), float(alpha)))
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return torch.addcmul(self.bias, self.weight * self.alpha, x)


def layer_norm(dim, site):
    """LayerNorm everywhere, with the epsilons of the published weights."""
    return nn.LayerNorm(dim, eps=1e-5 if site in ("patch_embed", "sr") else 1e-6)


def dyt(dim, site):
    """EffiSeg's "+Tanh": DyT after the patch embeddings, LayerNorm elsewhere."""
    return DyT(dim) if site == "patch_embed" else layer_norm(dim, site)


def dyt_dyl(dim, site):
    """EffiSeg's "+Tanh+Linear" as its text has it: DyT after the patch embeddings, DyL at every other site."""
    return DyT(dim) if site == "patch_embed" else DyL(dim)


def dyt_dyl_ln(dim, site):
    """EffiSeg's "+Tanh+Linear" as a variant of its code has it: like `dyt_dyl`, but LayerNorm at the end of a stage.

    Its other variant also has DyT at "sr": `lambda dim, site: DyT(dim) if site == "sr" else dyt_dyl_ln(dim, site)`.
    """
    return layer_norm(dim, site) if site == "stage" else dyt_dyl(dim, site)


NORMS = {"ln": layer_norm, "dyt": dyt, "dyt-dyl": dyt_dyl, "dyt-dyl-ln": dyt_dyl_ln}


# ---------------------------------------------------------------- encoder: MiT

def as_image(tokens):
    """(B, H, W, C) tokens -> the (B, C, H, W) image on the same memory, in channels-last order."""
    return tokens.permute(0, 3, 1, 2)


def as_tokens(image):
    """(B, C, H, W) channels-last image -> the (B, H, W, C) tokens on the same memory."""
    return image.permute(0, 2, 3, 1)


def slices(channels, x):
    """Cut `channels` so that a map of one slice, with the pixels of x (B, H, W, C), stays in a CPU's cache. -> [slice]

    Between the large linear maps of this network stand only steps that look at one channel at a time (depthwise
    convolution, GELU, ReLU, resizing), so at inference the widest maps need never exist as a whole: a third of the time
    on a CPU went into fetching memory for them. Everything in one slice for gradients, which keep it all, and elsewhere.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return [slice(0, channels)]
    width = max(64, CACHED // x.shape[:-1].numel())
    return [slice(i, i + width) for i in range(0, channels, width)]


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution, then a norm ([1] section 3.1)."""

    def __init__(self, in_dim, dim, kernel, stride, norm_fn):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2)
        self.norm = norm_fn(dim, "patch_embed")

    def forward(self, image):                                     # (B, C_in, H, W)
        return self.norm(as_tokens(self.proj(image)))             # (B, H/s, W/s, C)


class Reduce(nn.Module):
    """The attention's spatial reduction: every r x r patch becomes one key ([1] eq. 2)."""

    def __init__(self, dim, ratio, norm_fn):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, ratio, ratio)
        self.norm = norm_fn(dim, "sr")

    def forward(self, x):                                         # (B, H, W, C)
        return self.norm(as_tokens(self.conv(as_image(x))))       # (B, H/r, W/r, C)


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v of each head ([1] eq. 1). (B, heads, N, d) and twice (B, heads, M, d) -> (B, heads, N, d).

    PyTorch's fused kernel computes bf16 on a CPU no faster than fp32. Step by step, over as many queries as have their
    scores in the cache, it takes half the time. In fp32 the fused one is the faster, and for gradients it keeps no scores.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    N, d = q.shape[2:]
    keys = (k * d ** -0.5).transpose(2, 3)                        # (B, heads, d, M)
    return torch.cat([(q[:, :, part] @ keys).softmax(3) @ v for part in slices(N, k)], 2)          # n of the N queries, (B, heads, n, M) scores


class Attention(nn.Module):
    """Multi-head attention of all tokens to the reduced ones ([1] eq. 1-2)."""

    def __init__(self, dim, heads, ratio, norm_fn):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.reduce = Reduce(dim, ratio, norm_fn) if ratio > 1 else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def split(self, x):                                           # (B, H, W, C)
        return x.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)       # (B, heads, H*W, d)

    def forward(self, x):                                         # (B, H, W, C)
        B, H, W, C = x.shape
        q = self.split(self.q(x))                                 # (B, heads, H*W, d)
        context = self.reduce(x)                                  # (B, H/r, W/r, C)
        k, v = self.split(self.k(context)), self.split(self.v(context))       # (B, heads, H*W/r^2, d)
        out = attend(q, k, v)                                     # (B, heads, H*W, d)
        return self.proj(out.transpose(1, 2).reshape(B, H, W, C))             # (B, H, W, C)


class MixFFN(nn.Module):
    """MLP with a 3x3 depthwise convolution inside, which also tells tokens where they are ([1] eq. 3)."""

    def __init__(self, dim):
        super().__init__()
        hidden = dim * MLP_RATIO
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def plain(self, x):                                           # (B, H, W, C)
        return self.fc2(F.gelu(as_tokens(self.dwconv(as_image(self.fc1(x))))))      # (B, H, W, C)

    def forward(self, x):                                         # (B, H, W, C)
        if torch.is_grad_enabled():                               # keep none of the three wide maps for the gradients, but compute them
            return checkpoint(self.plain, x, use_reentrant=False, preserve_rng_state=False)       # again: 0.4 to 3 % of a step's time
        fc1, dwconv, fc2 = self.fc1, self.dwconv, self.fc2
        out = None
        for part in slices(fc1.out_features, x):                  # n of the 4C hidden channels
            hidden = F.linear(x, fc1.weight[part], fc1.bias[part])                  # (B, H, W, n)
            hidden = as_tokens(F.conv2d(as_image(hidden), dwconv.weight[part], dwconv.bias[part], padding=1, groups=hidden.shape[3]))
            share = F.linear(F.gelu(hidden), fc2.weight[:, part], fc2.bias if out is None else None)          # (B, H, W, C)
            out = share if out is None else out + share
        return out


class Block(nn.Module):
    """Pre-norm transformer block; a residual branch is dropped per image with probability `drop` while training [4]."""

    def __init__(self, dim, heads, ratio, drop, norm_fn):
        super().__init__()
        self.drop = drop
        self.norm1, self.attn = norm_fn(dim, "block"), Attention(dim, heads, ratio, norm_fn)
        self.norm2, self.mlp = norm_fn(dim, "block"), MixFFN(dim)

    def drop_path(self, x):
        if not self.training or self.drop == 0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.drop
        return x * (keep / (1 - self.drop)).to(x.dtype)           # scaled so that the expectation stays

    def forward(self, x):                                         # (B, H, W, C)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))        # (B, H, W, C)


class Stage(nn.Module):
    """Patch embedding, blocks, norm. Returns the stage's output and its normed patch embedding."""

    def __init__(self, index, in_dim, dim, drops, norm_fn):
        super().__init__()
        kernel, stride = (7, 4) if index == 0 else (3, 2)
        self.patch_embed = PatchEmbed(in_dim, dim, kernel, stride, norm_fn)
        self.blocks = nn.Sequential(*(Block(dim, HEADS[index], REDUCTIONS[index], drop, norm_fn) for drop in drops))
        self.norm = norm_fn(dim, "stage")

    def forward(self, image):                                     # (B, C_in, H, W)
        embedded = self.patch_embed(image)                        # (B, H/s, W/s, C)
        return as_image(self.norm(self.blocks(embedded))), as_image(embedded)       # (B, C, H/s, W/s) both


# ---------------------------------------------------------------- decoder

def fuse_stages(stages, weights, bias):
    """sum_i up(weights_i stage_i) + bias at the first stage's size. (B, C_i, H_i, W_i), (D, C_i), (D,) -> (B, D, H_1, W_1)."""
    fused = as_image(F.linear(as_tokens(stages[0]), weights[0], bias))              # (B, D, H_1, W_1)
    for stage, weight in zip(stages[1:], weights[1:]):
        narrow = as_image(F.linear(as_tokens(stage), weight))     # (B, D, H_i, W_i)
        wide = F.interpolate(narrow, size=fused.shape[2:], mode="bilinear", align_corners=False)
        fused = wide.add_(fused)                                  # into `wide`, nobody's view: autograd copies what a view shares
    return fused


def classify(stages, weights, bias, classifier):
    """classifier(relu(fuse_stages(stages, weights, bias))), a slice of the D channels at a time. -> (B, num_classes, H_1, W_1)"""
    logits, matrix = classifier.bias, classifier.weight.flatten(1)                              # (num_classes, D)
    for part in slices(len(bias), as_tokens(stages[0])):
        x = F.relu(fuse_stages(stages, [weight[part] for weight in weights], bias[part]))       # (B, n, H_1, W_1)
        logits = logits + F.linear(as_tokens(x), matrix[:, part])                               # (B, H_1, W_1, num_classes)
    return as_image(logits).contiguous()


class Decoder(nn.Module):
    """The all-MLP decoder ([1] eq. 4), with the published parameters and a fraction of the published operations.

    Published: project every stage i to D channels (L_i, b_i), upsample to 1/4, concatenate the 4D channels, and mix them
    with a 1x1 convolution 4D -> D; two thirds of B0's operations are that one convolution at quarter resolution. But
    everything before the ReLU is linear. Cut the convolution's matrix into a D x D slice F_i a stage, and

        conv(cat_i(up(L_i x_i + b_i)))  =  sum_i F_i up(L_i x_i + b_i)               a product of block matrices
                                        =  sum_i up((F_i L_i) x_i)  +  sum_i F_i b_i     F_i acts on channels, up on space:
                                                                                         they commute; up keeps a constant
    so each stage needs one D x C_i matrix, F_i L_i, at its own resolution, and nothing is ever concatenated. The products
    F_i L_i are tiny and made anew in each forward, so F and L train as ever. Exact up to rounding.
    """

    def __init__(self, dims, width, num_classes):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(dim, width) for dim in dims)          # L_i
        self.fuse = nn.Conv2d(width * len(dims), width, 1, bias=False)              # [F_4 F_3 F_2 F_1], the published order
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def products(self):
        """-> (F_i L_i for the four stages, each (D, C_i); sum_i F_i b_i, (D,))."""
        slices = self.fuse.weight.flatten(1).chunk(len(self.linear), dim=1)[::-1]   # F_1..F_4, (D, D) each
        weights = [F_i @ linear.weight for F_i, linear in zip(slices, self.linear)]
        return weights, sum(F_i @ linear.bias for F_i, linear in zip(slices, self.linear))

    def folded(self):
        """-> the products with the BatchNorm's scale and shift inside, as it is in eval mode."""
        weights, bias = self.products()
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()   # (D,)
        return [scale[:, None] * weight for weight in weights], scale * (bias - self.norm.running_mean) + self.norm.bias

    def forward(self, stages):                                    # four of (B, C_i, H_i, W_i)
        if not self.training and not torch.is_grad_enabled():
            return classify(stages, *self.folded(), self.classifier)
        x = F.relu(self.norm(fuse_stages(stages, *self.products())), inplace=True)                  # (B, D, H/4, W/4)
        kept = self.dropout(x.new_ones(*x.shape[:2], 1, 1))       # (B, D, 1, 1): it scales whole channels, so in place of the
        matrix = self.classifier.weight.flatten(1) * kept.flatten(1)[:, None]       # (B, num_classes, D)      map: the matrix
        logits = as_tokens(x).flatten(1, 2) @ matrix.transpose(1, 2) + self.classifier.bias         # (B, H/4*W/4, num_classes)
        return as_image(logits.unflatten(1, x.shape[2:])).contiguous()              # (B, num_classes, H/4, W/4)


class FoldedDecoder(nn.Module):
    """`Decoder` for inference, with its four matrices and one bias made once."""

    def __init__(self, decoder):
        super().__init__()
        weights, bias = decoder.folded()
        self.weights, self.bias = nn.ParameterList(weights), nn.Parameter(bias)
        self.classifier = decoder.classifier

    def forward(self, stages):                                    # four of (B, C_i, H_i, W_i)
        return classify(stages, list(self.weights), self.bias, self.classifier)


# ---------------------------------------------------------------- the network

def init_encoder(module):
    """Initialisation as published: truncated normal for Linear, fan-out normal for convolutions, no biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


def fold_dyl(norm, followers):
    """Move a DyL y = s x + t into the maps that read it, W y + b = (W s) x + (W t + b). -> what is left of the norm."""
    if not isinstance(norm, DyL):
        return norm
    scale = norm.weight * norm.alpha                              # (C,)
    for layer in followers:                                       # Linear (out, C) or unpadded Conv2d (out, C, r, r)
        per_channel = layer.weight.flatten(2).sum(2) if layer.weight.ndim == 4 else layer.weight
        layer.bias += per_channel @ norm.bias
        layer.weight *= scale.view(1, -1, *[1] * (layer.weight.ndim - 2))
    return nn.Identity()


def fold_dyt(layer, norm):
    """Move a DyT's alpha into the convolution before it. -> what is left of the norm."""
    if not isinstance(norm, DyT):
        return norm
    layer.weight *= 2 * norm.alpha
    layer.bias *= 2 * norm.alpha
    return FoldedDyT(norm).requires_grad_(False)


class Features(NamedTuple):
    logits: torch.Tensor                                          # (B, num_classes, ceil(H/4), ceil(W/4))
    stages: list                                                  # four of (B, C_i, H_i, W_i), after the stage's norm
    patch_embeds: list                                            # four of (B, C_i, H_i, W_i), after the embedding's norm


class SegFormer(nn.Module):
    """Images (B, 3, H, W), float RGB in [0, 1], H and W at least 32 -> logits (B, num_classes, ceil(H/4), ceil(W/4)).

    A checkpoint carries, as plain values or None: `classes` (names), `palette` ((R, G, B) a class), `input_size` ((H, W) that
    images were resized to in training), `trained_on` (the data and fold).
    """

    def __init__(self, variant, num_classes, norm_fn=layer_norm, width=None):
        super().__init__()
        dims, depths, published = SIZES[variant].values()
        self.variant, self.num_classes, self.norm_fn = variant, num_classes, norm_fn
        self.classes = self.palette = self.input_size = self.trained_on = None
        self.folded = False
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        drops = [DROP_PATH * i / (sum(depths) - 1) for i in range(sum(depths))]     # linear over depth
        drops = [drops[sum(depths[:i]):sum(depths[:i + 1])] for i in range(len(depths))]
        in_dims = (3, *dims[:-1])
        self.stages = nn.ModuleList(Stage(i, in_dims[i], dims[i], drops[i], norm_fn) for i in range(len(dims)))
        self.decoder = Decoder(dims, width or published, num_classes)
        self.stages.apply(init_encoder)
        nn.init.kaiming_normal_(self.decoder.fuse.weight, mode="fan_out", nonlinearity="relu")     # the rest: torch's own

    def forward(self, images):
        return self.features(images).logits

    def features(self, images):                                   # (B, 3, H, W)
        """-> Features(logits, stages, patch_embeds), what the distillation losses compare."""
        stages, patch_embeds = self.encode(images)
        return Features(self.decoder(stages), stages, patch_embeds)

    def encode(self, images):                                     # (B, 3, H, W)
        """-> (stages, patch_embeds) without the decoder, which a teacher of features alone need not run."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < SMALLEST or not images.is_floating_point():
            raise ValueError(f"SegFormer takes float images (B, 3, H, W) in [0, 1] of at least {SMALLEST} x {SMALLEST} "
                             f"pixels, not {images.dtype} {tuple(images.shape)}")
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        stages, patch_embeds = [], []
        for stage in self.stages:
            x, embedded = stage(x)                                # (B, C_i, H_i, W_i)   strides 4, 8, 16, 32
            stages.append(x)
            patch_embeds.append(embedded)
        return stages, patch_embeds

    @torch.no_grad()
    def fold(self):
        """-> an inference copy with the same outputs: decoder and BatchNorm in four matrices, DyL in the next linear map,
        DyT's alpha in the convolution before it.

        The DyL at the end of a stage stays: the next patch embedding pads it with zeros, and a shift does not commute with
        zero padding; so `features` of a folded model are unchanged too.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        if self.folded:
            return model
        model.folded = True
        model.decoder = FoldedDecoder(model.decoder).requires_grad_(False)
        for block in (block for stage in model.stages for block in stage.blocks):
            attn = block.attn
            reduces = isinstance(attn.reduce, Reduce)
            block.norm1 = fold_dyl(block.norm1, [attn.q, attn.reduce.conv] if reduces else [attn.q, attn.k, attn.v])
            block.norm2 = fold_dyl(block.norm2, [block.mlp.fc1])
            if reduces:
                attn.reduce.norm = fold_dyl(fold_dyt(attn.reduce.conv, attn.reduce.norm), [attn.k, attn.v])
        for embed in (stage.patch_embed for stage in model.stages):
            embed.norm = fold_dyt(embed.proj, embed.norm)
        return model


def segformer(variant, num_classes, norm_fn=layer_norm, width=None):
    """A SegFormer with fresh weights. variant "b0".."b5"; norm_fn(dim, site) -> nn.Module over (..., dim), where site is
    "patch_embed" | "block" | "sr" | "stage"; width: the decoder's D, None for the published one. Raises ValueError for an
    unknown variant or no classes."""
    if variant not in SIZES:
        raise ValueError(f"there is no SegFormer {variant!r}: choose one of {', '.join(SIZES)}")
    if num_classes < 1:
        raise ValueError(f"a segmenter needs at least one class, not {num_classes}")
    return SegFormer(variant, num_classes, norm_fn, width)


# ---------------------------------------------------------------- checkpoints

class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence for the user."""


class Format(NamedTuple):
    """How others write a SegFormer down, and what their code does that their tensors do not tell."""
    name: str
    sign: str                                                     # what one of its keys begins with, and none of the next formats'
    rules: list                                                   # (beginning of a key: a pattern, ours); "-": not this network's
    eps: float | None = None                                      # of all its LayerNorms; None: as `layer_norm` has them
    plain: bool = False                                           # images in [0, 1] without ImageNet's mean and std
    void: bool = False                                            # its last class is void


_EMBED = r"(?:segformer\.)?encoder\.patch_embeddings\.(\d)\."
_BLOCK = r"(?:segformer\.)?encoder\.block\.(\d)\.(\d+)\."
HUGGING_FACE = [                                                  # on the hub and on the disk
    (_EMBED + r"proj\.", r"stages.\1.patch_embed.proj."),
    (_EMBED + r"layer_norm\.", r"stages.\1.patch_embed.norm."),
    (_BLOCK + r"layer_norm_(\d)\.", r"stages.\1.blocks.\2.norm\3."),
    (_BLOCK + r"attention\.self\.query\.", r"stages.\1.blocks.\2.attn.q."),
    (_BLOCK + r"attention\.self\.key\.", r"stages.\1.blocks.\2.attn.k."),
    (_BLOCK + r"attention\.self\.value\.", r"stages.\1.blocks.\2.attn.v."),
    (_BLOCK + r"attention\.self\.sr\.", r"stages.\1.blocks.\2.attn.reduce.conv."),
    (_BLOCK + r"attention\.self\.layer_norm\.", r"stages.\1.blocks.\2.attn.reduce.norm."),
    (_BLOCK + r"attention\.output\.dense\.", r"stages.\1.blocks.\2.attn.proj."),
    (_BLOCK + r"mlp\.dense(\d)\.", r"stages.\1.blocks.\2.mlp.fc\3."),
    (_BLOCK + r"mlp\.dwconv\.dwconv\.", r"stages.\1.blocks.\2.mlp.dwconv."),
    (r"(?:segformer\.)?encoder\.layer_norm\.(\d)\.", r"stages.\1.norm."),
    (r"decode_head\.linear_c\.(\d)\.proj\.", r"decoder.linear.\1."),
    (r"decode_head\.linear_fuse\.", r"decoder.fuse."),
    (r"decode_head\.batch_norm\.", r"decoder.norm."),
    (r"decode_head\.classifier\.", r"decoder.classifier."),
    (r"classifier\.", "-"),                                       # of an ImageNet classifier
]
_STAGE = r"(?:segformer\.)?stages\.(\d)\."
TRANSFORMERS_5 = [                                                # its state_dict(), before its writer renames it
    (_STAGE + r"patch_embeddings\.proj\.", r"stages.\1.patch_embed.proj."),
    (_STAGE + r"patch_embeddings\.layer_norm\.", r"stages.\1.patch_embed.norm."),
    (_STAGE + r"blocks\.(\d+)\.layernorm_before\.", r"stages.\1.blocks.\2.norm1."),
    (_STAGE + r"blocks\.(\d+)\.layernorm_after\.", r"stages.\1.blocks.\2.norm2."),
    (_STAGE + r"blocks\.(\d+)\.attention\.([qkv])_proj\.", r"stages.\1.blocks.\2.attn.\3."),
    (_STAGE + r"blocks\.(\d+)\.attention\.o_proj\.", r"stages.\1.blocks.\2.attn.proj."),
    (_STAGE + r"blocks\.(\d+)\.attention\.sequence_reduction\.sequence_reduction\.", r"stages.\1.blocks.\2.attn.reduce.conv."),
    (_STAGE + r"blocks\.(\d+)\.attention\.sequence_reduction\.layer_norm\.", r"stages.\1.blocks.\2.attn.reduce.norm."),
    (_STAGE + r"blocks\.(\d+)\.mlp\.dwconv\.dwconv\.", r"stages.\1.blocks.\2.mlp.dwconv."),
    (_STAGE + r"blocks\.(\d+)\.mlp\.fc(\d)\.", r"stages.\1.blocks.\2.mlp.fc\3."),
    (_STAGE + r"layer_norm\.", r"stages.\1.norm."),
    (r"decode_head\.linear_projections\.(\d)\.proj\.", r"decoder.linear.\1."),
    *HUGGING_FACE[-4:],
]
NVLABS = [rule for i in range(4) for rule in (                    # it counts stages from 1, and has k and v in one: see `rename`
    (rf"(?:backbone\.)?patch_embed{i + 1}\.", rf"stages.{i}.patch_embed."),
    (rf"(?:backbone\.)?block{i + 1}\.(\d+)\.attn\.sr\.", rf"stages.{i}.blocks.\1.attn.reduce.conv."),
    (rf"(?:backbone\.)?block{i + 1}\.(\d+)\.attn\.norm\.", rf"stages.{i}.blocks.\1.attn.reduce.norm."),
    (rf"(?:backbone\.)?block{i + 1}\.(\d+)\.mlp\.dwconv\.dwconv\.", rf"stages.{i}.blocks.\1.mlp.dwconv."),
    (rf"(?:backbone\.)?block{i + 1}\.(\d+)\.", rf"stages.{i}.blocks.\1."),
    (rf"(?:backbone\.)?norm{i + 1}\.", rf"stages.{i}.norm."),
    (rf"(?:decode_head\.)?linear_c{i + 1}\.proj\.", rf"decoder.linear.{i}."),
)] + [
    (r"(?:decode_head\.)?linear_fuse\.conv\.", "decoder.fuse."),
    (r"(?:decode_head\.)?linear_fuse\.(?:bn|norm)\.", "decoder.norm."),
    (r"(?:decode_head\.)?linear_pred\.", "decoder.classifier."),
    (r"decode_head\.conv_seg\.", "-"),                            # mmseg's base class makes it, nothing calls it
    (r"head\.", "-"),                                             # of an ImageNet classifier
]
FORMATS = (
    Format("Hugging Face", _EMBED, HUGGING_FACE, eps=1e-5),       # its code ignores layer_norm_eps of its own config
    Format("transformers 5", _STAGE + "patch_embeddings", TRANSFORMERS_5, eps=1e-5),
    Format("NVlabs segmenter", r"backbone\.patch_embed1\.", NVLABS),
    Format("TransKD/EffiSeg", r"linear_pred\.", NVLABS, plain=True, void=True),
    Format("NVlabs encoder", r"patch_embed1\.", NVLABS),
)


def save_checkpoint(model, path, half=False, **extra):
    """Write `model`, and `extra` plain values or tensors beside it, so that load_checkpoint(path) rebuilds it alone.

    half: weights in fp16, half the size, for distribution (BatchNorm's statistics and the preprocessing stay fp32).

    The file appears whole or not at all: it is written beside `path`, flushed to the disk, then renamed.
    Raises CheckpointError for a folded model or a norm_fn that is not in NORMS.
    """
    norm = next((name for name, norm_fn in NORMS.items() if norm_fn is model.norm_fn), None)
    if norm is None or model.folded:
        raise CheckpointError(f"cannot save {path}: " + ("a folded model is for inference only, save the one it came from"
                              if model.folded else "add the norm function to model.NORMS so that loading finds it"))
    content = dict(format="effiseg", variant=model.variant, norm=norm, num_classes=model.num_classes, classes=model.classes,
                   palette=model.palette, input_size=model.input_size, trained_on=model.trained_on,
                   layer_norm_eps=[m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)],
                   model={name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, **extra)
    if half:
        small = {name: parameter.detach().half() for name, parameter in model.named_parameters()}
        lost = [name for name, tensor in small.items() if not tensor.isfinite().all()]
        if lost:
            raise CheckpointError(f"cannot save {path} in fp16: {lost[0]} has values beyond its range")
        content["model"] |= small
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:                      # a full disk is either, by where torch meets it
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "the disk may be full"
        raise CheckpointError(f"cannot write {path}: {reason}; what stood there before is untouched") from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load_checkpoint(path, num_classes=None):
    """-> the SegFormer in `path`, on the CPU, in eval mode; what was found is printed.

    Reads this project's checkpoints, Hugging Face's (.bin, .safetensors, or a folder with its config.json), NVlabs' ImageNet
    encoders and segmenters, and TransKD's and EffiSeg's. With a `num_classes` that differs from the file's, or a file
    without a decoder, that part is new and it is said. Raises CheckpointError, in a sentence, for anything that is not
    exactly this network. No code in the file is run.
    """
    content, kind = convert(read_checkpoint(path), num_classes, path)
    tensors = content["model"]
    variant = find_variant(tensors, path)
    head, fuse = tensors.get("decoder.classifier.weight"), tensors.get("decoder.fuse.weight")
    found = None if head is None else head.shape[:1].numel() if head.ndim else 0
    if found == 0:
        raise CheckpointError(f"{path} has a head without classes")
    if found is None and any(name.startswith("decoder.") for name in tensors):
        raise CheckpointError(f"{path} is not whole: it has parts of a decoder, but no classifier")
    if found is None and num_classes is None:
        raise CheckpointError(f"{path} is an encoder without a decoder: it can start a network (train.py --init), not be one")
    norm = content.get("norm")
    if not isinstance(norm, str) or norm not in NORMS:
        raise CheckpointError(f"{path} was trained with norm {norm!r}, which is not in model.NORMS")
    width = fuse.shape[0] if fuse is not None and fuse.ndim == 4 and 0 < fuse.shape[0] <= MAX_WIDTH else None
    model = segformer(variant, num_classes or found, NORMS[norm], width)
    expected = () if found == model.num_classes else ("decoder.",) if found is None else ("decoder.classifier.",)
    loaded = load_tensors(model, tensors, expected, path)
    read_extras(model, content, found, path)
    new = "" if not expected else ", new decoder" if found is None else f", new head (the file's has {found} classes)"
    print(f"{path}: SegFormer-{model.variant.upper()}, {model.num_classes} classes, {kind}, {loaded} tensors, {normalisation(model)}{new}")
    return model.eval()


def normalisation(model):
    """What the model does to images in [0, 1], in words."""
    mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
    known = {(MEAN, STD): "ImageNet mean/std", ((0, 0, 0), (1, 1, 1)): "no mean/std"}
    fits = (words for pair, words in known.items() if all(abs(a - b) < 1e-4 for a, b in zip(mean + std, (*pair[0], *pair[1]))))
    return next(fits, f"mean {[round(m, 3) for m in mean]}, std {[round(s, 3) for s in std]}")


def convert(content, num_classes, path):
    """What a file holds -> (our own checkpoint's dict, the words for its format)."""
    ours = content.get("format") == "effiseg"
    tensors = content.get("model") if ours else content.get("state_dict", content.get("tensors", content))
    if not isinstance(tensors, dict) or not all(isinstance(k, str) and is_plain(t) for k, t in tensors.items()):
        raise CheckpointError(f"{path} is not a checkpoint of a SegFormer: it holds other things than named tensors")
    files = [entry.path for entry in os.scandir(path)] if os.path.isdir(path) else [path]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > max(map(os.path.getsize, files)):
        raise CheckpointError(f"{path} is damaged: its tensors claim more bytes than the file has")
    if ours:
        if not isinstance(content.get("layer_norm_eps"), list):
            raise CheckpointError(f"{path} is damaged: it has no layer_norm_eps")
        return content, "EffiSeg"
    layout, tensors, dropped = rename(tensors, path)
    words, head = layout.name, "decoder.classifier."
    outputs = tensors[f"{head}weight"].shape[:1].numel() if f"{head}weight" in tensors else 0
    if layout.void and outputs == (20 if num_classes is None else num_classes + 1):               # Cityscapes' 19 and void
        tensors |= {name: tensors[name][:-1] for name in (f"{head}weight", f"{head}bias") if name in tensors}
        words += " without its void output"
    if dropped:
        words += f" ({dropped} tensors of its distillation left out)"
    if layout.plain:
        tensors |= {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}
    meta = content.get("meta")                                    # mmseg's: names and colours, where it wrote them
    names, palette = (meta.get("CLASSES"), meta.get("PALETTE")) if isinstance(meta, dict) else (None, None)
    fits = all(isinstance(value, (list, tuple)) and len(value) == outputs for value in (names, palette)) and all(isinstance(n, str) for n in names)
    own = dict(model=tensors, norm="ln", layer_norm_eps=layout.eps, classes=list(names) if fits else None,
               palette=[tuple(colour) for colour in palette] if fits else None)
    return own | content.get("facts", {}) | {"model": tensors | content.get("buffers", {})}, words


def is_plain(tensor):
    """A dense tensor in memory that is what it says: strided, not quantised, not a shape without data."""
    return isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized \
        and not tensor.is_complex()


def read_extras(model, content, classes, path):
    """Set what a checkpoint carries beside the weights; CheckpointError where it does not fit the network."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    eps, size = content["layer_norm_eps"], content.get("input_size")
    eps = [norm.eps if eps is None else eps for norm in norms] if not isinstance(eps, list) else eps
    fits = len(eps) == len(norms) and all(isinstance(value, float) and value > 0 for value in eps)
    fits &= size is None or isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(n, int) and n >= SMALLEST for n in size)
    names, palette = content.get("classes"), content.get("palette")
    fits &= all(value is None or isinstance(value, list) and len(value) == classes for value in (names, palette))
    if not fits:
        raise CheckpointError(f"{path} is damaged: its layer_norm_eps, input_size, classes or palette do not fit its network")
    for norm, value in zip(norms, eps):
        norm.eps = value
    model.input_size, model.trained_on = size, content.get("trained_on")
    if classes == model.num_classes:
        model.classes, model.palette = names, palette


def read_checkpoint(path):
    """-> the dict in a .safetensors or torch file, or in a Hugging Face folder; tensors and plain values only, nothing is run."""
    if os.path.isdir(path):
        return read_folder(path)
    try:
        if str(path).endswith(".safetensors"):
            return {"tensors": read_safetensors(path)}
        check_archive(path)
        content = torch.load(path, "cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise CheckpointError(f"cannot open checkpoint {path}: {error.strerror}") from None
    except Exception as error:                                    # a stranger's file can be broken in any way there is
        unsafe = any(word in str(error) for word in ("Unsupported global", "Unsupported class", "GLOBAL"))
        reason = "it holds more than tensors and plain values, perhaps code, and is not run" if unsafe else "it is damaged or of another kind; nothing in it was run"
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {reason}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not named tensors")
    return content


def check_archive(path):
    """Hold a torch file (a zip archive) against its checksums, which torch itself does not read, and refuse compressed records:
    torch writes none, and a small one could unpack to more than the memory. Raises ValueError."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if not packed and archive.testzip() is not None:
                raise ValueError("a checksum in it does not fit")
        if packed or sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise ValueError("its records are compressed or overlap")


def read_folder(path):
    """-> the weights of a Hugging Face folder and what its config.json and preprocessor_config.json say beside them."""
    files = [name for name in ("model.safetensors", "pytorch_model.bin") if os.path.isfile(os.path.join(path, name))]
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        preprocessor = os.path.join(path, "preprocessor_config.json")
        with open(preprocessor if os.path.isfile(preprocessor) else os.devnull, encoding="utf-8") as file:
            images = json.loads(file.read() or "{}")
        labels = config.get("id2label") or {}
        names = [str(labels[str(i)]) for i in range(len(labels))]
        mean, std = (images.get(name, default) for name, default in (("image_mean", MEAN), ("image_std", STD)))
        mean, std = ((0, 0, 0), (1, 1, 1)) if images.get("do_normalize") is False else (mean, std)
        buffers = {name: torch.tensor(value, dtype=torch.float32).reshape(1, 3, 1, 1) for name, value in (("mean", mean), ("std", std))}
    except OSError as error:
        raise CheckpointError(f"{path} is no Hugging Face folder: cannot open {error.filename} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise CheckpointError(f"{path} is no Hugging Face folder of a SegFormer: its config.json or preprocessor_config.json is damaged") from None
    if config.get("model_type") != "segformer" or not files:
        raise CheckpointError(f"{path}: " + (f"its config.json is of a {config.get('model_type')!r}, not of a segformer" if files
                                             else "no model.safetensors or pytorch_model.bin in it"))
    content = read_checkpoint(os.path.join(path, files[0]))
    tensors = content.get("tensors", content)
    head = tensors.get("decode_head.classifier.weight")
    named = isinstance(head, torch.Tensor) and len(names) == head.shape[:1].numel() and names != [f"LABEL_{i}" for i in range(len(names))]
    return dict(tensors=tensors, buffers=buffers, facts=dict(classes=names) if named else {})


def read_safetensors(path):
    """-> {name: tensor}. The format: 8 bytes header length, JSON header of (dtype, shape, offsets), raw tensors.

    Read here and not with its package, which is a dependency for thirty lines: nothing is allocated before the header has
    been held against the size of the file, and the tensors must fill the rest of it without gaps or overlaps.
    """
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    with open(path, "rb") as file:
        length, rest = int.from_bytes(file.read(8), "little"), os.path.getsize(path) - 8
        if length > min(rest, MAX_HEADER):
            raise ValueError("its header is longer than the file, or than the format allows")
        header = json.loads(file.read(length))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    tensors, filled = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, end) = dtypes[entry["dtype"]], entry["shape"], entry["data_offsets"]
        fits = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        if not fits or start != filled or end > len(data) or math.prod(shape) * dtype.itemsize != end - start:
            raise ValueError(f"the place or size of {name} does not fit the file")
        count, filled = math.prod(shape), end
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=start).reshape(shape) if count \
            else torch.empty(shape, dtype=dtype)
    if filled != len(data):
        raise ValueError("it holds more than its header tells")
    return tensors


def rename(tensors, path):
    """Another format's names -> ours. -> (its Format, {our name: tensor}, how many tensors beside the network were left out)."""
    tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}            # DataParallel's
    own = {key.removeprefix("student."): tensor for key, tensor in tensors.items() if key.startswith("student.")}
    dropped, tensors = (len(tensors) - len(own), own) if own else (0, tensors)                    # projections, the teacher
    layout = next((layout for layout in FORMATS if any(re.match(layout.sign, key) for key in tensors)), None)
    if layout is None:
        mmseg = any(re.match(r"(backbone\.)?layers\.\d\.0\.projection\.", key) for key in tensors)
        reason = "written by mmseg 1.x, whose decoder is another network: use NVlabs' or Hugging Face's file of the same model" if mmseg \
            else f"no SegFormer in a known format ({', '.join(['EffiSeg', *(layout.name for layout in FORMATS)])}); it begins with " \
            f"{', '.join(list(tensors)[:3]) or 'nothing'}"
        raise CheckpointError(f"{path} is {reason}")
    renamed = {}
    for key, tensor in tensors.items():
        name = next((re.sub(f"^{pattern}", ours, key) for pattern, ours in layout.rules if re.match(pattern, key)), key)
        if ".attn.kv." in name:
            pieces = {name.replace(".kv.", ".k."): tensor[:len(tensor) // 2], name.replace(".kv.", ".v."): tensor[len(tensor) // 2:]} if tensor.ndim else {}
        else:
            pieces = {} if name.startswith("-") else {name: tensor}
        doubles = [name for name in pieces if name in renamed]
        if doubles:
            raise CheckpointError(f"{path} holds two tensors for {doubles[0]}, the second is {key}")
        renamed |= pieces
    return layout, renamed, dropped


def find_variant(tensors, path):
    """-> "b0".."b5" by the widths and depths of the tensors' shapes (a bare B1 encoder is told from B2 by its depths)."""
    dims = tuple(tensors[key].shape[:1].numel() for i in range(4) if (key := f"stages.{i}.patch_embed.proj.weight") in tensors)
    depths = tuple(sum(f"stages.{i}.blocks.{j}.norm1.weight" in tensors for j in range(64)) for i in range(4))
    for variant, size in SIZES.items():
        if (size["dims"], size["depths"]) == (dims, depths):
            return variant
    raise CheckpointError(f"{path} is no SegFormer B0-B5, or not all of one: its stage widths are {dims} and its depths {depths}")


def load_tensors(model, tensors, expected, path):
    """Copy `tensors` into `model`; only names under the prefixes `expected` may be new. -> "loaded/all"."""
    own = model.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(expected)}
    optional = [name for name in own if name in ("mean", "std") or name.endswith("num_batches_tracked")]
    missing = [name for name in own if name not in tensors and name not in optional and not name.startswith(expected)]
    unknown = [name for name in tensors if name not in own]
    shapes = [name for name in tensors if name in own and own[name].shape != tensors[name].shape]
    for what, names in (("lacks", missing), ("has unknown", unknown), ("has wrong shapes for", shapes)):
        if names:
            raise CheckpointError(f"{path} is not this network: it {what} {len(names)} tensors, first {', '.join(names[:5])}")
    model.load_state_dict(tensors, strict=False)
    weights = [name for name in own if name not in optional]
    return f"{sum(name in tensors for name in weights)}/{len(weights)}"
