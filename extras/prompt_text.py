"""Prompts as vectors: a small encoder that reads letters, or vectors of another one from a file.

    text = TextEncoder(TOKENIZERS["letters"], dim=64)
    vectors = text(["car", "person"])             # (2, 64)

The encoder knows how a word is spelt and nothing of the world: this is prompting, not an open
vocabulary. Vectors of a pretrained encoder know what words mean: `VectorTable`.

References
  Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from extras.cli import UsageError
from extras.prompt_words import MAX_TOKENS, TOKENIZERS, clean_prompt, plain, tokenise

TEXT_WIDTH = 64
TEXT_DEPTH = 2
TEXT_HEADS = 4


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
