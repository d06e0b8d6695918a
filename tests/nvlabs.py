"""SegFormer under NVlabs' tensor names, as plain as it can be written: what files in that format
are made with in the tests.

Attributes are called as the format's keys are (NVLABS in extras/checkpoint_formats.py); everything
else is the paper's text, with (B, N, C) tokens, explicit softmax attention and the decoder as
published, so that it shares no trick with model.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import HEADS, REDUCTIONS, SIZES


def part(**children):
    """A module with these children: only their names matter."""
    return nn.ModuleDict(children)


def make_block(dim, ratio):
    attn = part(q=nn.Linear(dim, dim), kv=nn.Linear(dim, 2 * dim), proj=nn.Linear(dim, dim))
    if ratio > 1:
        attn["sr"] = nn.Conv2d(dim, dim, ratio, ratio)
        attn["norm"] = nn.LayerNorm(dim, eps=1e-5)
    dwconv = part(dwconv=nn.Conv2d(4 * dim, 4 * dim, 3, 1, 1, groups=4 * dim))
    mlp = part(fc1=nn.Linear(dim, 4 * dim), dwconv=dwconv, fc2=nn.Linear(4 * dim, dim))
    norm1 = nn.LayerNorm(dim, eps=1e-6)
    norm2 = nn.LayerNorm(dim, eps=1e-6)
    return part(norm1=norm1, attn=attn, norm2=norm2, mlp=mlp)


def to_image(x, height):
    """(B, N, C) -> (B, C, H, W)"""
    return x.transpose(1, 2).unflatten(2, (height, -1))


def to_tokens(x):
    """(B, C, H, W) -> (B, N, C)"""
    return x.flatten(2).transpose(1, 2)


def attend(attn, x, height, heads):
    B, N, C = x.shape

    def split_heads(tokens):
        tokens = tokens.reshape(B, -1, heads, C // heads)         # (B, M, heads, d)
        return tokens.transpose(1, 2)                             # (B, heads, M, d)

    context = x
    if "sr" in attn:
        reduced = attn["sr"](to_image(x, height))
        context = attn["norm"](to_tokens(reduced))
    key, value = attn["kv"](context).split(C, dim=2)
    query = split_heads(attn["q"](x))
    key = split_heads(key)
    value = split_heads(value)
    scores = query @ key.transpose(2, 3) / (C // heads) ** 0.5
    out = scores.softmax(3) @ value
    return attn["proj"](out.transpose(1, 2).reshape(B, N, C))


class Flat(nn.ModuleDict):
    """Encoder and, with `classes`, the decoder in one module, as TransKD and EffiSeg have them.
    Takes normalised images."""

    def __init__(self, variant, classes=None):
        super().__init__()
        size = SIZES[variant]
        dims = size["dims"]
        D = size["width"]
        in_dim = 3
        for i, (dim, depth) in enumerate(zip(dims, size["depths"], strict=True)):
            kernel, stride = (7, 4) if i == 0 else (3, 2)
            proj = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2)
            self[f"patch_embed{i + 1}"] = part(proj=proj, norm=nn.LayerNorm(dim, eps=1e-5))
            blocks = [make_block(dim, REDUCTIONS[i]) for _ in range(depth)]
            self[f"block{i + 1}"] = nn.ModuleList(blocks)
            self[f"norm{i + 1}"] = nn.LayerNorm(dim, eps=1e-6)
            in_dim = dim
        if classes:
            for i, dim in enumerate(dims):
                self[f"linear_c{i + 1}"] = part(proj=nn.Linear(dim, D))
            conv = nn.Conv2d(4 * D, D, 1, bias=False)
            self["linear_fuse"] = part(conv=conv, bn=nn.BatchNorm2d(D))
            self["linear_pred"] = nn.Conv2d(D, classes, 1)

    def stages(self, x):
        outputs = []
        for i in range(4):
            embed = self[f"patch_embed{i + 1}"]
            x = embed["proj"](x)
            height = x.shape[2]
            x = embed["norm"](to_tokens(x))
            for block in self[f"block{i + 1}"]:
                x = x + attend(block["attn"], block["norm1"](x), height, HEADS[i])
                mlp = block["mlp"]
                hidden = mlp["fc1"](block["norm2"](x))
                hidden = to_tokens(mlp["dwconv"]["dwconv"](to_image(hidden, height)))
                x = x + mlp["fc2"](F.gelu(hidden))
            x = to_image(self[f"norm{i + 1}"](x), height)
            outputs.append(x)
        return outputs

    def forward(self, x):
        stages = self.stages(x)
        size = stages[0].shape[2:]
        maps = []
        for i, stage in enumerate(stages):
            narrow = self[f"linear_c{i + 1}"]["proj"](to_tokens(stage))
            narrow = to_image(narrow, stage.shape[2])
            maps.append(F.interpolate(narrow, size=size, mode="bilinear", align_corners=False))
        x = self["linear_fuse"]["conv"](torch.cat(maps[::-1], 1))                   # c4, c3, c2, c1
        return self["linear_pred"](F.relu(self["linear_fuse"]["bn"](x)))


def segmenter(flat):
    """The flat names -> NVlabs' segmenter: backbone. and decode_head., with mmseg's idle conv_seg,
    inside state_dict."""
    tensors = {}
    for key, value in flat.items():
        prefix = "decode_head." if key.startswith("linear_") else "backbone."
        tensors[prefix + key] = value
    tensors["decode_head.conv_seg.weight"] = torch.zeros(19, 128, 1, 1)
    tensors["decode_head.conv_seg.bias"] = torch.zeros(19)
    meta = {
        "CLASSES": tuple("abcdefghijklmnopqrs"),
        "PALETTE": [[i, 0, 0] for i in range(19)],
    }
    return {"meta": meta, "state_dict": tensors}
