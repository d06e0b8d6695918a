"""SegFormer, written by hand: MiT encoder B0-B5, MLP decoder, norm hook, checkpoints.

    model = segformer("b0", num_classes=19)       # norm_fn=dyt, dyt_dyl, a function of your own
    logits = model(images)                        # (B, 3, H, W) in [0, 1] -> (B, 19, H/4, W/4)
    logits, stages, patch_embeds = model.features(images)
    fast = model.fold()                           # the same outputs, for inference
    model = load_checkpoint("b2.pth")             # ours, Hugging Face's, NVlabs', TransKD's

Three things to know while reading:
- Tokens are (B, H, W, C) from the image to the decoder. In memory that *is* a channels-last image,
  so a LayerNorm or a Linear sees its channels last and a convolution sees an image, and nothing is
  ever copied between the two.
- The decoder is linear up to its ReLU, which is worth a factor of its own: see `Decoder`.
- The model normalises its own input, so a checkpoint carries its preprocessing.

The network calls its own modules, so hooks, wrappers (LoRA) and quantised layers in their place do
what they should. Only `fold()` puts other modules in: they stand in a section of their own.

References
  [1] Xie et al., SegFormer, 2021, arXiv:2105.15203
      the network: encoder section 3.1, decoder section 3.2
  [2] Zhu et al., Transformers without Normalization, 2025, arXiv:2503.10622
      DyT
  [3] Kim et al., EffiSeg, 2025
      DyT after patch embeddings (eq. 1), DyL elsewhere (eq. 2)
  [4] Huang et al., Deep Networks with Stochastic Depth, 2016, arXiv:1603.09382
      drop-path
"""

import contextlib
import copy
import errno
import importlib
import math
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Widths and depths of the four stages, and the decoder's width D, as in the published code and
# weights. [1] Table 6 prints other depths for B2 and B3 (3 in stage 2) and other MLP ratios
# (8, 8, 4, 4): neither fits the weights.
WIDE = (64, 128, 320, 512)
SIZES = {
    "b0": {"dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2), "width": 256},
    "b1": {"dims": WIDE, "depths": (2, 2, 2, 2), "width": 256},
    "b2": {"dims": WIDE, "depths": (3, 4, 6, 3), "width": 768},
    "b3": {"dims": WIDE, "depths": (3, 4, 18, 3), "width": 768},
    "b4": {"dims": WIDE, "depths": (3, 8, 27, 3), "width": 768},
    "b5": {"dims": WIDE, "depths": (3, 6, 40, 3), "width": 768},
}
HEADS = (1, 2, 5, 8)                                              # of each stage, in every size
REDUCTIONS = (8, 4, 2, 1)                                         # of each stage, in every size
MLP_RATIO = 4
DROP_PATH = 0.1
DROPOUT = 0.1
MEAN = (0.485, 0.456, 0.406)                                      # ImageNet's, of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
SMALLEST = 32                                                     # pixels: stage 4's stride


# ---------------------------------------------------------------- norms: norm_fn(dim, site)

class DyT(nn.Module):
    """Dynamic Tanh, y = gamma tanh(alpha x) + beta with one scalar alpha ([2]; [3] eq. 1).

    (..., C) -> (..., C)
    """

    def __init__(self, dim, alpha=0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.weight = nn.Parameter(torch.ones(dim))               # gamma
        self.bias = nn.Parameter(torch.zeros(dim))                # beta

    def forward(self, x):
        # [None]: beside a half-precision x a 0-dim alpha would count as half too, and its gradient,
        # one sum over all of x, would overflow.
        return torch.addcmul(self.bias, self.weight, torch.tanh_(self.alpha[None] * x))


class DyL(nn.Module):
    """Dynamic Linear, y = gamma alpha x + beta with an alpha for each channel ([3] eq. 2).

    (..., C) -> (..., C). Linear in x, so `SegFormer.fold` moves it into the map that follows.
    """

    def __init__(self, dim, alpha=0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((dim,), float(alpha)))
        self.weight = nn.Parameter(torch.ones(dim))               # gamma
        self.bias = nn.Parameter(torch.zeros(dim))                # beta

    def forward(self, x):
        return torch.addcmul(self.bias, self.weight * self.alpha, x)


def layer_norm(dim, site):
    """LayerNorm everywhere, with the epsilons of the published weights."""
    return nn.LayerNorm(dim, eps=1e-5 if site in ("patch_embed", "sr") else 1e-6)


def dyt(dim, site):
    """EffiSeg's "+Tanh": DyT after the patch embeddings, LayerNorm elsewhere."""
    return DyT(dim) if site == "patch_embed" else layer_norm(dim, site)


def dyt_dyl(dim, site):
    """EffiSeg's "+Tanh+Linear" in its text: DyT after the patch embeddings, DyL elsewhere."""
    return DyT(dim) if site == "patch_embed" else DyL(dim)


def dyt_dyl_ln(dim, site):
    """EffiSeg's "+Tanh+Linear" in a variant of its code: like `dyt_dyl`, LayerNorm at stage ends.

    Its other variant also has DyT at "sr": a function of your own with that one more `if`.
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


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution, then a norm ([1] section 3.1)."""

    def __init__(self, in_dim, dim, kernel, stride, norm_fn):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2)
        self.norm = norm_fn(dim, "patch_embed")

    def forward(self, image):                                     # (B, C_in, H, W)
        x = as_tokens(self.proj(image))                           # (B, H/s, W/s, C)
        return self.norm(x)


class Reduce(nn.Module):
    """The attention's spatial reduction: every r x r patch becomes one key ([1] eq. 2)."""

    def __init__(self, dim, ratio, norm_fn):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, ratio, ratio)
        self.norm = norm_fn(dim, "sr")

    def forward(self, x):                                         # (B, H, W, C)
        x = as_tokens(self.conv(as_image(x)))                     # (B, H/r, W/r, C)
        return self.norm(x)


class Attention(nn.Module):
    """Multi-head attention of all tokens to the reduced ones ([1] eq. 1-2)."""

    def __init__(self, dim, heads, ratio, norm_fn):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.reduce = Reduce(dim, ratio, norm_fn) if ratio > 1 else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x):                                     # (B, H, W, C)
        x = x.flatten(1, 2).unflatten(2, (self.heads, -1))        # (B, H*W, heads, d)
        return x.transpose(1, 2)                                  # (B, heads, H*W, d)

    def forward(self, x):                                         # (B, H, W, C)
        B, H, W, C = x.shape
        q = self.split_heads(self.q(x))                           # (B, heads, H*W, d)
        context = self.reduce(x)                                  # (B, H/r, W/r, C)
        k = self.split_heads(self.k(context))                     # (B, heads, H*W/r^2, d)
        v = self.split_heads(self.v(context))                     # (B, heads, H*W/r^2, d)
        out = attend(q, k, v)                                     # (B, heads, H*W, d)
        out = out.transpose(1, 2).reshape(B, H, W, C)
        return self.proj(out)                                     # (B, H, W, C)


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v of each head ([1] eq. 1).

    (B, heads, N, d) and twice (B, heads, M, d) -> (B, heads, N, d)
    """
    bf16_on_cpu = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    if bf16_on_cpu and not torch.is_grad_enabled():
        return attend_in_bf16_on_cpu(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class MixFFN(nn.Module):
    """MLP with a 3x3 depthwise convolution inside, which tells where a token is ([1] eq. 3)."""

    def __init__(self, dim):
        super().__init__()
        hidden = dim * MLP_RATIO
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):                                         # (B, H, W, C)
        x = self.fc1(x)                                           # (B, H, W, 4C)
        x = as_tokens(self.dwconv(as_image(x)))
        x = F.gelu(x)
        return self.fc2(x)                                        # (B, H, W, C)


class Block(nn.Module):
    """Pre-norm transformer block; while training, a residual branch is dropped with probability
    `drop`, for each image by itself [4]."""

    def __init__(self, dim, heads, ratio, drop, norm_fn):
        super().__init__()
        self.drop = drop
        self.norm1 = norm_fn(dim, "block")
        self.attn = Attention(dim, heads, ratio, norm_fn)
        self.norm2 = norm_fn(dim, "block")
        self.mlp = MixFFN(dim)

    def drop_path(self, x):
        if not self.training or self.drop == 0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.drop
        return x * (keep / (1 - self.drop)).to(x.dtype)           # scaled: the expectation stays

    def forward(self, x):                                         # (B, H, W, C)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(recompute(self.mlp, self.norm2(x)))


def recompute(module, x):
    """module(x) with activation checkpointing: only x is kept, the backward pass computes the rest
    again. (torch.utils.checkpoint: nothing to do with the files that are called checkpoints below.)

    The MLP's three maps of four times the width are most of what a training step would hold, and
    cheap to compute. Hooks inside `module` fire again then. Without gradients it is module(x).
    """
    if not torch.is_grad_enabled():
        return module(x)
    return checkpoint(module, x, use_reentrant=False)


class Stage(nn.Module):
    """Patch embedding, blocks, norm. Returns the stage's output and its normed patch embedding."""

    def __init__(self, index, in_dim, dim, drops, norm_fn):
        super().__init__()
        kernel, stride = (7, 4) if index == 0 else (3, 2)
        self.patch_embed = PatchEmbed(in_dim, dim, kernel, stride, norm_fn)
        self.blocks = nn.Sequential()
        for drop in drops:
            self.blocks.append(Block(dim, HEADS[index], REDUCTIONS[index], drop, norm_fn))
        self.norm = norm_fn(dim, "stage")

    def forward(self, image):                                     # (B, C_in, H, W)
        embedded = self.patch_embed(image)                        # (B, H/s, W/s, C)
        x = self.blocks(embedded)
        x = self.norm(x)
        return as_image(x), as_image(embedded)                    # (B, C, H/s, W/s) both


# ---------------------------------------------------------------- decoder

class Decoder(nn.Module):
    """The all-MLP decoder ([1] eq. 4): published parameters, a fraction of the operations.

    BatchNorm and ReLU after the fusion are the published code's; eq. 4 does not show them.

    Published: project every stage i to D channels (L_i, b_i), upsample to 1/4, concatenate the 4D
    channels, and mix them with a 1x1 convolution 4D -> D; two thirds of B0's operations are that
    one convolution at quarter resolution. But everything before the ReLU is linear. Cut the
    convolution's matrix into D x D slices F_i, one for each stage, and

        conv(cat_i(up(L_i x_i + b_i)))
            = sum_i F_i up(L_i x_i + b_i)                  a product of block matrices
            = sum_i up((F_i L_i) x_i)  +  sum_i F_i b_i    F_i acts on channels, up on space:
                                                           they commute; up keeps a constant

    so each stage needs one D x C_i matrix, F_i L_i, at its own resolution, and nothing is ever
    concatenated. The products F_i L_i are tiny and made anew in each forward, so F and L train as
    ever. Exact up to rounding.

    The products read F and L themselves. A wrapper or a hook there would be gone around, so with
    one of those the decoder does what is published, through its modules.
    """

    def __init__(self, dims, width, num_classes):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(dim, width) for dim in dims)          # L_i, b_i
        self.fuse = nn.Conv2d(width * len(dims), width, 1, bias=False)              # [F_4 .. F_1]
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, stages):                                    # four of (B, C_i, H_i, W_i)
        if is_untouched(*self.linear, self.fuse):
            weights, bias = self.products()
            x = sum_upsampled(stages, weights, bias)              # (B, D, H_1, W_1)
        else:
            x = self.fuse_as_published(stages)                    # (B, D, H_1, W_1)
        x = F.relu(self.norm(x), inplace=True)
        if self.training and is_untouched(self.dropout, self.classifier):
            logits = self.classify_with_dropout(x)                # (B, num_classes, H_1, W_1)
        else:
            logits = self.classifier(self.dropout(x))             # (B, num_classes, H_1, W_1)
        return logits.contiguous()

    def fuse_as_published(self, stages):
        """conv(cat_i(up(L_i x_i + b_i))), module by module. -> (B, D, H_1, W_1)"""
        size = stages[0].shape[2:]
        maps = []
        for linear, stage in zip(self.linear, stages, strict=True):
            narrow = as_image(linear(as_tokens(stage)))           # (B, D, H_i, W_i)
            wide = F.interpolate(narrow, size=size, mode="bilinear", align_corners=False)
            maps.append(wide)                                     # (B, D, H_1, W_1)
        return self.fuse(torch.cat(maps[::-1], dim=1))            # stage 4 first: published order

    def products(self):
        """-> (F_i L_i of the four stages, each (D, C_i); sum_i F_i b_i, (D,))."""
        matrix = self.fuse.weight.flatten(1)                      # (D, 4D): F_4 .. F_1
        mixers = matrix.chunk(len(self.linear), dim=1)[::-1]      # F_1 .. F_4, (D, D) each
        pairs = list(zip(mixers, self.linear, strict=True))
        weights = [F_i @ linear.weight for F_i, linear in pairs]
        bias = sum(F_i @ linear.bias for F_i, linear in pairs)
        return weights, bias

    def classify_with_dropout(self, x):                           # (B, D, H, W)
        """classifier(dropout(x)) in training, with the dropout in the classifier's matrix.

        Dropout2d multiplies each channel d of image b as a whole by k[b, d], 0 or 1 / (1 - p), and
        sum_d W[c, d] (k[b, d] x[b, d]) = sum_d (W[c, d] k[b, d]) x[b, d]. Scaling the small matrix
        W in place of the map x saves writing the map a second time, and keeping it for gradients.
        """
        B, D, H, W = x.shape
        k = self.dropout(x.new_ones(B, D, 1, 1)).flatten(1)       # (B, D)
        matrix = self.classifier.weight.flatten(1) * k[:, None]   # (B, num_classes, D)
        tokens = as_tokens(x).flatten(1, 2)                       # (B, H*W, D)
        logits = tokens @ matrix.transpose(1, 2) + self.classifier.bias
        return as_image(logits.unflatten(1, (H, W)))              # (B, num_classes, H, W)


def sum_upsampled(stages, weights, bias):
    """sum_i up(weights_i stages_i) + bias, at the first stage's size.

    stages (B, C_i, H_i, W_i), weights (D, C_i), bias (D,) -> (B, D, H_1, W_1)
    """
    total = F.linear(as_tokens(stages[0]), weights[0], bias)      # (B, H_1, W_1, D)
    total = as_image(total)                                       # (B, D, H_1, W_1)
    size = total.shape[2:]
    for stage, weight in zip(stages[1:], weights[1:], strict=True):
        narrow = as_image(F.linear(as_tokens(stage), weight))     # (B, D, H_i, W_i)
        wide = F.interpolate(narrow, size=size, mode="bilinear", align_corners=False)
        # In place into `wide`, which owns its memory. `total` starts as a permuted view, and
        # writing into a view costs autograd a copy.
        total = wide.add_(total)
    return total


# Modules whose output is a known formula of their parameters: layers, and what is made of them.
STOCK = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Dropout2d, nn.Identity,
         DyT, DyL, PatchEmbed, Reduce, Attention, MixFFN, Block, Decoder)


def is_untouched(*modules):
    """Is each of these of a known class, so that reading its parameters does what calling it does?

    Not so for another class in its place (a LoRA wrapper, a quantised layer, a subclass), and for a
    module with hooks (pruning and weight norm are hooks too) or a forward of its own. What is
    inside of a module is not looked at: name it too.
    """
    for module in modules:
        if type(module) not in STOCK or "forward" in module.__dict__:
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if module._backward_hooks or module._backward_pre_hooks:
            return False
    return True


# ---------------------------------------------------------------- the network

class Features(NamedTuple):
    """What the distillation losses compare."""
    logits: torch.Tensor                    # (B, num_classes, ceil(H/4), ceil(W/4))
    stages: list                            # four of (B, C_i, H_i, W_i), after the stage's norm
    patch_embeds: list                      # four of (B, C_i, H_i, W_i), after the embedding's norm


class SegFormer(nn.Module):
    """Images (B, 3, H, W), float RGB in [0, 1], H and W at least 32
    -> logits (B, num_classes, ceil(H/4), ceil(W/4)).

    Plain values, or None, that a checkpoint carries beside the weights:
        classes       names, one for each class
        palette       (R, G, B), one for each class
        input_size    (H, W) that images were resized to in training
        trained_on    {"data", "fold", "folds", "fold_by"} of the training, and "with_val"
    """

    def __init__(self, variant, num_classes, norm_fn=layer_norm, width=None):
        super().__init__()
        self.variant = variant
        self.num_classes = num_classes
        self.norm_fn = norm_fn
        self.classes = None
        self.palette = None
        self.input_size = None
        self.trained_on = None
        self.folded = False
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

        dims = SIZES[variant]["dims"]
        depths = SIZES[variant]["depths"]
        last_block = sum(depths) - 1
        drops = [DROP_PATH * i / last_block for i in range(sum(depths))]
        self.stages = nn.ModuleList()
        in_dim = 3
        for index, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            self.stages.append(Stage(index, in_dim, dim, drops[:depth], norm_fn))
            in_dim = dim
            drops = drops[depth:]
        self.decoder = Decoder(dims, width or SIZES[variant]["width"], num_classes)
        self.init_weights()

    def init_weights(self):
        """As published. What is not named here has PyTorch's own initialisation."""
        self.stages.apply(init_encoder)
        nn.init.kaiming_normal_(self.decoder.fuse.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):                                    # (B, 3, H, W)
        return self.features(images).logits                       # (B, num_classes, H/4, W/4)

    def features(self, images):                                   # (B, 3, H, W)
        """-> Features(logits, stages, patch_embeds)"""
        stages, patch_embeds = self.encode(images)
        logits = self.decoder(stages)
        return Features(logits, stages, patch_embeds)

    def encode(self, images):                                     # (B, 3, H, W)
        """-> (stages, patch_embeds) without the decoder, which a teacher of features need not run.

        Raises ValueError for images that are not float RGB in [0, 1].
        """
        check_images(images)
        x = (images - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        stages = []
        patch_embeds = []
        # Stage i has stride 4, 8, 16, 32: H_i = H / 4, H / 8, H / 16, H / 32.
        for stage in self.stages:
            x, embedded = stage(x)                                # (B, C_i, H_i, W_i) both
            stages.append(x)
            patch_embeds.append(embedded)
        return stages, patch_embeds

    @torch.no_grad()
    def fold(self):
        """-> an inference copy with the same outputs and fewer operations.

        The decoder and its BatchNorm become four matrices; a DyL goes into the linear maps that
        read it, a DyT's alpha into the convolution before it; on a CPU the widest maps are
        computed in slices. A module with a hook, a wrapper or another class stays as it is, and
        so does what is folded into or out of it.

        The DyL at the end of a stage stays: the next patch embedding pads it with zeros, and a
        shift does not commute with zero padding; so `features` of a folded model are unchanged too.
        """
        model = copy.deepcopy(self).eval()
        if not model.folded:
            for stage in model.stages:
                embed = stage.patch_embed
                if is_untouched(embed):
                    embed.norm = fold_dyt(embed.proj, embed.norm)
                for block in stage.blocks:
                    fold_block(block)
            model.decoder = fold_decoder(model.decoder)
            model.folded = True
        return model.requires_grad_(False)


def segformer(variant, num_classes, norm_fn=layer_norm, width=None):
    """A SegFormer with fresh weights.

    variant: "b0" .. "b5"
    norm_fn: norm_fn(dim, site) -> nn.Module over (..., dim); site is "patch_embed", "block", "sr"
             (the attention's spatial reduction) or "stage" (its end)
    width: the decoder's D; None: the published one
    Raises ValueError for an unknown variant or no classes.
    """
    if variant not in SIZES:
        raise ValueError(f"there is no SegFormer {variant!r}: choose one of {', '.join(SIZES)}")
    if num_classes < 1:
        raise ValueError(f"a segmenter needs at least one class, not {num_classes}")
    return SegFormer(variant, num_classes, norm_fn, width)


def init_encoder(module):
    """Truncated normal for Linear, fan-out normal for convolutions, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


def check_images(images):
    """Raise ValueError, in a sentence, for images that are not float (B, 3, H, W) in [0, 1].

    The values are looked at on a CPU only: a GPU would have to be waited for, and a graph that is
    being traced has none yet. Resampling may overshoot 0 and 1 a little; 0-255 and images that
    were normalised before are far beyond them.
    """
    fits = images.is_floating_point() and images.ndim == 4 and images.shape[1] == 3
    if not fits or min(images.shape[2:]) < SMALLEST:
        raise ValueError(
            f"SegFormer takes float images (B, 3, H, W) in [0, 1] of at least {SMALLEST} x "
            f"{SMALLEST} pixels, not {images.dtype} {tuple(images.shape)}")
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or images.device.type != "cpu" or images.numel() == 0:
        return
    lowest, largest = (value.item() for value in images.detach().aminmax())
    if largest > 2:
        raise ValueError(
            f"SegFormer takes float images in [0, 1] and normalises them itself, but the largest "
            f"value here is {largest:g}: divide images in 0-255 by 255")
    if lowest < -1:
        raise ValueError(
            f"SegFormer takes float images in [0, 1] and normalises them itself, but the lowest "
            f"value here is {lowest:g}: leave out the normalisation before it")


# ---------------------------------------------------------------- inference: what fold() puts in

CACHED = 2 ** 21                            # floats of a map that a CPU's caches hold: 8 MiB
SMALLEST_SLICE = 64                         # products of fewer channels are slow


def slices(count, floats_of_one, device):
    """Cut range(count) so that the map of one slice stays in a CPU's cache. -> [slice]

    floats_of_one: the numbers in the map that each of the `count` stands for

    Between the large linear maps of this network stand only steps that look at one channel at a
    time (depthwise convolution, GELU, ReLU, resizing), so at inference the widest maps need never
    exist as a whole, and no memory is fetched for them. One slice for gradients, which keep the
    whole map, on other devices, and for a compiler, which has ways of its own.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or device.type != "cpu":
        return [slice(0, count)]
    width = CACHED // floats_of_one
    width = max(width, SMALLEST_SLICE)
    return [slice(start, start + width) for start in range(0, count, width)]


class FoldedMixFFN(nn.Module):
    """`MixFFN` for inference, a slice of the 4C hidden channels at a time."""

    def __init__(self, mlp):
        super().__init__()
        self.fc1 = mlp.fc1
        self.dwconv = mlp.dwconv
        self.fc2 = mlp.fc2

    def forward(self, x):                                         # (B, H, W, C)
        B, H, W, _ = x.shape
        first, *others = slices(self.fc1.out_features, B * H * W, x.device)
        out = F.linear(self.hidden(x, first), self.fc2.weight[:, first], self.fc2.bias)
        for part in others:
            out += F.linear(self.hidden(x, part), self.fc2.weight[:, part])
        return out                                                # (B, H, W, C)

    def hidden(self, x, part):
        """The hidden channels in the slice `part`, n of them. (B, H, W, C) -> (B, H, W, n)"""
        x = F.linear(x, self.fc1.weight[part], self.fc1.bias[part])                 # (B, H, W, n)
        kernels = self.dwconv.weight[part]                        # (n, 1, 3, 3)
        bias = self.dwconv.bias[part]
        x = F.conv2d(as_image(x), kernels, bias, padding=1, groups=len(kernels))    # (B, n, H, W)
        return F.gelu(as_tokens(x))


class FoldedDecoder(nn.Module):
    """`Decoder` for inference: four matrices and one bias, made once with the BatchNorm inside,
    applied to a slice of the D channels at a time."""

    def __init__(self, decoder):
        super().__init__()
        norm = decoder.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()                  # (D,)
        weights, bias = decoder.products()
        self.weights = nn.ParameterList(scale[:, None] * weight for weight in weights)
        self.bias = nn.Parameter(scale * (bias - norm.running_mean) + norm.bias)
        self.classifier = decoder.classifier

    def forward(self, stages):                                    # four of (B, C_i, H_i, W_i)
        B, _, H, W = stages[0].shape
        matrix = self.classifier.weight.flatten(1)                # (num_classes, D)
        logits = self.classifier.bias
        for part in slices(len(self.bias), B * H * W, stages[0].device):
            weights = [weight[part] for weight in self.weights]
            x = sum_upsampled(stages, weights, self.bias[part])   # (B, n, H_1, W_1)
            x = as_tokens(F.relu(x, inplace=True))                # (B, H_1, W_1, n)
            logits = logits + F.linear(x, matrix[:, part])        # (B, H_1, W_1, num_classes)
        return as_image(logits).contiguous()                      # (B, num_classes, H_1, W_1)


class FoldedDyT(nn.Module):
    """A DyT for inference behind a map that has its 2 alpha already. Overwrites x.

    (..., C) -> (..., C). tanh(z) = 2 sigmoid(2 z) - 1, and a sigmoid costs a CPU less than a tanh.
    """

    def __init__(self, norm):
        super().__init__()
        self.weight = nn.Parameter(2 * norm.weight)
        self.bias = nn.Parameter(norm.bias - norm.weight)

    def forward(self, x):
        return torch.addcmul(self.bias, self.weight, torch.sigmoid_(x))


def fold_dyt(layer, norm):
    """Move a DyT's alpha into the convolution before it. -> what is left of the norm"""
    if type(norm) is not DyT or not is_untouched(layer, norm):
        return norm
    layer.weight *= 2 * norm.alpha
    layer.bias *= 2 * norm.alpha
    return FoldedDyT(norm)


def fold_dyl(norm, readers):
    """Move a DyL y = s x + t into the maps that read it. -> what is left of the norm

    W y + b = (W s) x + (W t + b), for Linear (out, C) and for unpadded Conv2d (out, C, r, r).
    """
    if type(norm) is not DyL or not is_untouched(norm, *readers):
        return norm
    scale = norm.weight * norm.alpha                              # (C,)
    for layer in readers:
        if isinstance(layer, nn.Linear):
            layer.bias += layer.weight @ norm.bias
            layer.weight *= scale
        else:
            layer.bias += layer.weight.flatten(2).sum(2) @ norm.bias
            layer.weight *= scale[:, None, None]
    return nn.Identity()


def fold_block(block):
    """Fold the norms of a block into the maps around them, in place; put FoldedMixFFN in."""
    if not is_untouched(block):
        return
    attn = block.attn
    if is_untouched(attn) and is_untouched(attn.reduce):
        block.norm1 = fold_attention(block.norm1, attn)
    mlp = block.mlp
    if is_untouched(mlp) and is_untouched(mlp.fc1, mlp.dwconv, mlp.fc2):
        block.norm2 = fold_dyl(block.norm2, [mlp.fc1])
        block.mlp = FoldedMixFFN(mlp)


def fold_attention(norm, attn):
    """Fold the norm before an attention, and the one inside, into its maps, in place.
    -> what is left of the norm before it"""
    reduce = attn.reduce
    if isinstance(reduce, nn.Identity):
        return fold_dyl(norm, [attn.q, attn.k, attn.v])
    norm = fold_dyl(norm, [attn.q, reduce.conv])
    # At most one of these two does something: a DyT folds backwards, a DyL forwards.
    reduce.norm = fold_dyt(reduce.conv, reduce.norm)
    reduce.norm = fold_dyl(reduce.norm, [attn.k, attn.v])
    return norm


def fold_decoder(decoder):
    """-> a FoldedDecoder; the decoder itself where it, or a layer of it, is not what it was."""
    if not is_untouched(decoder):
        return decoder
    layers = (*decoder.linear, decoder.fuse, decoder.norm, decoder.dropout, decoder.classifier)
    return FoldedDecoder(decoder) if is_untouched(*layers) else decoder


def attend_in_bf16_on_cpu(q, k, v):
    """`attend` step by step, over as many queries at once as have their scores in the cache.

    PyTorch's fused kernel computes bf16 on a CPU no faster than fp32; this is faster
    (docs/SPEED.md). In fp32 the fused one is the faster, and with gradients it keeps no scores.
    """
    B, heads, N, d = q.shape
    M = k.shape[2]
    keys = (k * d ** -0.5).transpose(2, 3)                        # (B, heads, d, M)
    outputs = []
    for part in slices(N, B * heads * M, q.device):
        scores = q[:, :, part] @ keys                             # (B, heads, n, M)
        outputs.append(scores.softmax(3) @ v)                     # (B, heads, n, d)
    return torch.cat(outputs, dim=2)                              # (B, heads, N, d)


# ---------------------------------------------------------------- checkpoints

MAX_WIDTH = 4096                            # D that a file may ask for


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence for the user."""


@contextlib.contextmanager
def write_atomically(path, shared=False):
    """Yield a binary file that appears at `path` whole or not at all.

        with write_atomically("x.pth") as file:
            torch.save(content, file)

    It is written beside `path`, flushed to the disk, then renamed. After an error nothing is left
    of it, and what stood at `path` before is untouched; the error goes on to the caller. A link is
    replaced, not followed.
    shared: other processes may be writing the same `path`, so each writes beside it by itself
    Raises OSError, for a device, a pipe or a folder at `path` too.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        reason = "not a regular file, so nothing is written there"
        raise FileExistsError(errno.EEXIST, reason, str(path))
    partial = f"{path}.{os.getpid()}.partial" if shared else f"{path}.partial"
    with contextlib.suppress(FileNotFoundError):
        os.remove(partial)                                        # of a process that was killed
    try:
        with open(partial, "x+b") as file:                        # "x": new, not through a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def save_checkpoint(model, path, half=False, **extra):
    """Write `model`, and `extra` plain values or tensors beside it, so that load_checkpoint(path)
    rebuilds it alone. The file appears whole or not at all.

    half: weights in fp16, half the size, for distribution (BatchNorm's statistics and the
          preprocessing stay fp32)
    Raises CheckpointError for a folded model, a norm_fn that is not in NORMS, weights that fp16
    cannot hold, and a file that cannot be written.
    """
    if model.folded:
        raise CheckpointError(f"cannot save {path}: a folded model is for inference only, "
                              f"save the one it came from")
    norms = [name for name, norm_fn in NORMS.items() if norm_fn is model.norm_fn]
    if not norms:
        raise CheckpointError(f"cannot save {path}: add the norm function to model.NORMS "
                              f"so that loading finds it")
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    if half:
        tensors |= half_parameters(model, path)
    content = {
        "format": "effiseg",
        "variant": model.variant,
        "norm": norms[0],
        "num_classes": model.num_classes,
        "classes": model.classes,
        "palette": model.palette,
        "input_size": model.input_size,
        "trained_on": model.trained_on,
        "layer_norm_eps": [norm.eps for norm in layer_norms(model)],
        "model": tensors,
        **extra,
    }
    try:
        with write_atomically(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:                      # a full disk can be either
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise CheckpointError(f"cannot write {path}: {reason}; "
                              f"what stood there before is untouched") from None


def half_parameters(model, path):
    """-> {name: the parameter in fp16}. Raises CheckpointError where one does not fit."""
    small = {}
    for name, parameter in model.named_parameters():
        small[name] = parameter.detach().half()
        if not small[name].isfinite().all():
            raise CheckpointError(f"cannot save {path} in fp16: {name} has values beyond its range")
    return small


def layer_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.LayerNorm)]


def load_checkpoint(path, num_classes=None):
    """-> the SegFormer in `path`, on the CPU, in eval mode; what was found is printed.

    Reads this project's checkpoints, with extras/packed_layers.py also those in 8 and 4 bits
    (extras/quantize.py) and, with extras/checkpoint_formats.py, Hugging Face's (.bin,
    .safetensors, or a folder with its config.json), NVlabs' ImageNet encoders and segmenters, and
    TransKD's and EffiSeg's. With a `num_classes` that differs from the file's, or a file without a
    decoder, that part is new and it is said. No code in the file is run.

    Raises CheckpointError, in a sentence, for anything that is not exactly this network.
    """
    checks = find_checks()
    content = read_checkpoint(path)
    if content.get("format") == "effiseg-packed":
        return packed_layers(path).load_packed(content, num_classes, path)
    if content.get("format") == "effiseg":
        kind = "EffiSeg"
        if checks:
            checks.check_own(content, path)
    else:
        content, kind = other_formats(path).convert(content, num_classes, path)
    tensors = content["model"]
    if checks:
        checks.check_head(tensors, path)
    file_classes = count_classes(tensors)
    if file_classes is None and num_classes is None:
        raise CheckpointError(f"{path} is an encoder without a decoder: "
                              f"it can start a network (train.py --init), not be one")

    norm_fn = NORMS[content["norm"]]
    width = decoder_width(tensors)
    model = segformer(content["variant"], num_classes or file_classes, norm_fn, width)
    if file_classes is None:
        new_part = "decoder."
        note = ", new decoder"
    elif file_classes != model.num_classes:
        new_part = "decoder.classifier."
        note = f", new head (the file's has {file_classes} classes)"
    else:
        new_part = None
        note = ""
    loaded_of_all = load_tensors(model, tensors, new_part, path)
    if checks:
        checks.check_extras(content, model, file_classes, path)
    set_extras(model, content, file_classes)
    print(f"{path}: SegFormer-{model.variant.upper()}, {model.num_classes} classes, {kind}, "
          f"{loaded_of_all} tensors, {describe_normalisation(model)}{note}")
    return model.eval()


def find_checks():
    """-> the module that checks a stranger's file; None where model.py was copied out alone.

    Then a file is trusted as far as torch trusts it: no code in it is run. Raises CheckpointError
    where the checks were copied too, but not what they need: they are never left out in silence.
    """
    try:
        return importlib.import_module("extras.checkpoint_checks")
    except ModuleNotFoundError as error:
        if error.name in ("extras", "extras.checkpoint_checks"):
            return None
        raise CheckpointError(f"extras/checkpoint_checks.py cannot do without a file that is not "
                              f"here: copy it too ({error})") from None


def other_formats(path):
    """-> the module that reads the files of others"""
    return import_extra("checkpoint_formats", f"{path} is not in this project's own format: to "
                                              f"read those of others")


def packed_layers(path):
    """-> the module that reads weights in 8 and 4 bits"""
    return import_extra("packed_layers", f"{path} has its weights in 8 or 4 bits: to read it")


def import_extra(name, reason):
    """-> the module extras.NAME. Raises CheckpointError where model.py was copied out without it,
    or without a file that it needs itself."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{reason}, copy extras/{name}.py beside model.py too, and what it "
                              f"needs ({error})") from None


def read_checkpoint(path):
    """-> the dict in a torch file; with extras/checkpoint_formats.py also in a .safetensors file or
    a Hugging Face folder. Tensors and plain values only; nothing is run. Raises CheckpointError."""
    if os.path.isdir(path):
        return other_formats(path).read_folder(path)
    if os.path.exists(path) and not os.path.isfile(path):         # to open a pipe would wait
        raise CheckpointError(f"cannot open checkpoint {path}: not a regular file")
    is_safetensors = str(path).endswith(".safetensors")
    read = other_formats(path).read_safetensors if is_safetensors else read_torch_file
    try:
        content = read(path)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise CheckpointError(f"cannot open checkpoint {path}: {error.strerror}") from None
    except Exception as error:              # a stranger's file can be broken in any way there is
        reason = describe_damage(error)
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {reason}") from None
    if is_safetensors:
        return {"tensors": content}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {kind}, not named tensors")
    return content


def read_torch_file(path):
    checks = find_checks()
    if checks:
        checks.check_archive(path)
    return torch.load(path, "cpu", weights_only=True)


def describe_damage(error):
    """What an exception of the reader says about the file, in words."""
    for sign in ("Unsupported global", "Unsupported class", "GLOBAL"):
        if sign in str(error):
            return "it holds more than tensors and plain values, perhaps code, and is not run"
    return "it is damaged or of another kind; nothing in it was run"


def count_classes(tensors):
    """-> the outputs of the checkpoint's head; None for an encoder without a decoder."""
    head = tensors.get("decoder.classifier.weight")
    return None if head is None else len(head)


def decoder_width(tensors):
    """-> the decoder's D; None, for the published one, where the file does not tell it."""
    fuse = tensors.get("decoder.fuse.weight")
    if fuse is None or fuse.ndim != 4 or not 0 < len(fuse) <= MAX_WIDTH:
        return None
    return len(fuse)


def load_tensors(model, tensors, new_part, path):
    """Copy `tensors` into `model`. -> "loaded/all"

    new_part: the names that begin with it stay fresh in the model, and are left out of the file
    Raises CheckpointError where the names or shapes are not the model's.
    """
    def is_new(name):
        return new_part is not None and name.startswith(new_part)

    def is_optional(name):
        return name in ("mean", "std") or name.endswith("num_batches_tracked")

    own = model.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if not is_new(name)}
    weights = [name for name in own if not is_optional(name)]
    lacking = [name for name in weights if name not in tensors and not is_new(name)]
    unknown = [name for name in tensors if name not in own]
    known = [name for name in tensors if name in own]
    misshapen = [name for name in known if own[name].shape != tensors[name].shape]
    complaints = {"lacks": lacking, "has unknown": unknown, "has wrong shapes for": misshapen}
    for complaint, names in complaints.items():
        if names:
            first = ", ".join(names[:5])
            raise CheckpointError(f"{path} is not this network: "
                                  f"it {complaint} {len(names)} tensors, first {first}")
    model.load_state_dict(tensors, strict=False)
    loaded = [name for name in weights if name in tensors]
    return f"{len(loaded)}/{len(weights)}"


def set_extras(model, content, file_classes):
    """Set what a checkpoint carries beside the weights."""
    epsilons = content.get("layer_norm_eps")
    norms = layer_norms(model)
    if isinstance(epsilons, float):                               # one for all LayerNorms
        epsilons = [epsilons] * len(norms)
    if epsilons is not None:
        for norm, eps in zip(norms, epsilons, strict=True):
            norm.eps = eps
    model.input_size = content.get("input_size")
    model.trained_on = content.get("trained_on")
    if file_classes == model.num_classes:
        model.classes = content.get("classes")
        model.palette = content.get("palette")


def describe_normalisation(model):
    """What the model does to images in [0, 1], in words."""
    mean = model.mean.flatten()
    std = model.std.flatten()

    def are(means, stds):
        expected = torch.tensor([*means, *stds])
        return torch.allclose(torch.cat([mean, std]), expected, rtol=0, atol=1e-4)

    if are(MEAN, STD):
        return "ImageNet mean/std"
    if are((0., 0., 0.), (1., 1., 1.)):
        return "no mean/std"
    rounded_mean = [round(value, 3) for value in mean.tolist()]
    rounded_std = [round(value, 3) for value in std.tolist()]
    return f"mean {rounded_mean}, std {rounded_std}"
