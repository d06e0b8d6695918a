"""SegFormer under NVlabs' tensor names, as plain as it can be written: what files in that format are made with in the tests.

Attributes are called as the format's keys are (FORMATS in model.py); everything else is the paper's text, with (B, N, C)
tokens, explicit softmax attention and the decoder as published, so that it shares no trick with model.py.
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
        attn["sr"], attn["norm"] = nn.Conv2d(dim, dim, ratio, ratio), nn.LayerNorm(dim, eps=1e-5)
    dwconv = part(dwconv=nn.Conv2d(4 * dim, 4 * dim, 3, 1, 1, groups=4 * dim))
    return part(norm1=nn.LayerNorm(dim, eps=1e-6), attn=attn, norm2=nn.LayerNorm(dim, eps=1e-6),
                mlp=part(fc1=nn.Linear(dim, 4 * dim), dwconv=dwconv, fc2=nn.Linear(4 * dim, dim)))


def to_image(x, height):
    return x.transpose(1, 2).unflatten(2, (height, -1))           # (B, N, C) -> (B, C, H, W)


def to_tokens(x):
    return x.flatten(2).transpose(1, 2)                           # (B, C, H, W) -> (B, N, C)


def attend(attn, x, height, heads):
    B, N, C = x.shape
    context = attn["norm"](to_tokens(attn["sr"](to_image(x, height)))) if "sr" in attn else x
    key, value = attn["kv"](context).split(C, dim=2)
    query, key, value = (t.reshape(B, -1, heads, C // heads).transpose(1, 2) for t in (attn["q"](x), key, value))
    weights = (query @ key.transpose(2, 3) / (C // heads) ** 0.5).softmax(3)
    return attn["proj"]((weights @ value).transpose(1, 2).reshape(B, N, C))


class Flat(nn.ModuleDict):
    """Encoder and, with `classes`, the decoder in one module, as TransKD and EffiSeg have them. Takes normalised images."""

    def __init__(self, variant, classes=None):
        super().__init__()
        size = SIZES[variant]
        dims, D = size["dims"], size["width"]
        for i, (dim, depth) in enumerate(zip(dims, size["depths"])):
            kernel, stride = (7, 4) if i == 0 else (3, 2)
            self[f"patch_embed{i + 1}"] = part(proj=nn.Conv2d(3 if i == 0 else dims[i - 1], dim, kernel, stride, kernel // 2),
                                               norm=nn.LayerNorm(dim, eps=1e-5))
            self[f"block{i + 1}"] = nn.ModuleList(make_block(dim, REDUCTIONS[i]) for _ in range(depth))
            self[f"norm{i + 1}"] = nn.LayerNorm(dim, eps=1e-6)
        if classes:
            self.update({f"linear_c{i + 1}": part(proj=nn.Linear(dim, D)) for i, dim in enumerate(dims)})
            self["linear_fuse"] = part(conv=nn.Conv2d(4 * D, D, 1, bias=False), bn=nn.BatchNorm2d(D))
            self["linear_pred"] = nn.Conv2d(D, classes, 1)

    def stages(self, x):
        outputs = []
        for i in range(4):
            x = self[f"patch_embed{i + 1}"]["proj"](x)
            height = x.shape[2]
            x = self[f"patch_embed{i + 1}"]["norm"](to_tokens(x))
            for block in self[f"block{i + 1}"]:
                x = x + attend(block["attn"], block["norm1"](x), height, HEADS[i])
                hidden = block["mlp"]["fc1"](block["norm2"](x))
                hidden = to_tokens(block["mlp"]["dwconv"]["dwconv"](to_image(hidden, height)))
                x = x + block["mlp"]["fc2"](F.gelu(hidden))
            x = to_image(self[f"norm{i + 1}"](x), height)
            outputs.append(x)
        return outputs

    def forward(self, x):
        stages = self.stages(x)
        maps = [to_image(self[f"linear_c{i + 1}"]["proj"](to_tokens(x)), x.shape[2]) for i, x in enumerate(stages)]
        maps = [F.interpolate(m, size=stages[0].shape[2:], mode="bilinear", align_corners=False) for m in maps]
        x = self["linear_fuse"]["conv"](torch.cat(maps[::-1], 1))                   # c4, c3, c2, c1
        return self["linear_pred"](F.relu(self["linear_fuse"]["bn"](x)))


def segmenter(flat):
    """The flat names -> NVlabs' segmenter: backbone. and decode_head., with mmseg's idle conv_seg, inside state_dict."""
    tensors = {("decode_head." if key.startswith("linear_") else "backbone.") + key: value for key, value in flat.items()}
    idle = {"decode_head.conv_seg.weight": torch.zeros(19, 128, 1, 1), "decode_head.conv_seg.bias": torch.zeros(19)}
    return {"meta": {"CLASSES": tuple("abcdefghijklmnopqrs"), "PALETTE": [[i, 0, 0] for i in range(19)]}, "state_dict": tensors | idle}
