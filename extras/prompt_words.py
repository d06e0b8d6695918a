"""The words of prompts: what they mean in a data set, and how they become numbers.

    tokenizer = TOKENIZERS["letters"]
    ids = tokenise(["car", "traffic sign"], tokenizer)            # int64 (2, 12), 0 is padding
    concept_of("automobile", classes)                             # (6,): the ids of its classes
    choose_prompts(classes, count=21, absent=8)                   # what a student is trained with

A prompt travels as a string, and teacher and student each tokenise it for themselves. What a prompt
means is the set of classes that it names: one for a noun, all of them for "segment everything",
none for a thing that the data do not have.
"""

import re
import string
import unicodedata
from dataclasses import dataclass

import torch

from extras.cli import UsageError

MAX_TOKENS = 48

GENERIC = ("objects in the image", "segment everything", "all objects", "things and stuff")
NOUNS = 17                                                        # of the 21 prompts

# Words of one meaning. A class of any data set whose name is among them answers to all of them.
SYNONYMS = (
    ("sky", "heaven"),
    ("building", "house", "architecture"),
    ("pole", "post", "column"),
    ("road", "street", "asphalt"),
    ("pavement", "sidewalk", "footpath"),
    ("tree", "vegetation", "foliage"),
    ("traffic sign", "sign", "signsymbol", "sign symbol"),
    ("fence", "railing"),
    ("car", "automobile", "vehicle"),
    ("person", "pedestrian", "human"),
    ("cyclist", "bicyclist"),
    ("bicycle", "bike"),
    ("motorcycle", "motorbike"),
    ("truck", "lorry"),
    ("terrain", "grass"),
    ("traffic light", "stoplight"),
)
# Things that street scenes do not have. The first are trained with --absent N, the others never.
ABSENT = ("boat", "airplane", "elephant", "piano", "zebra", "sofa", "guitar", "banana", "penguin",
          "keyboard", "whale", "snowman", "camel", "candle", "kettle", "cactus")
NEVER_TRAINED = ("giraffe", "toaster", "violin", "submarine", "parrot", "mattress", "teapot",
                 "dolphin")


# ---------------------------------------------------------------- tokenizers

@dataclass(frozen=True)
class Tokenizer:
    """name: what a checkpoint calls it; vocabulary: how many ids there are, 0 is padding."""
    name: str
    vocabulary: int
    letters: str | None                                           # None: UTF-8 bytes

    def encode(self, text):
        """-> list of ids from 1 on; empty where the text has nothing that it knows."""
        if self.letters is None:
            return [byte + 1 for byte in text.encode("utf-8")]
        ids = []
        for letter in plain(text):
            place = self.letters.find(letter)
            if place >= 0:
                ids.append(place + 1)
        return ids


LETTERS = string.ascii_lowercase + string.digits + " "
TOKENIZERS = {
    "bytes": Tokenizer("bytes", 257, None),
    "letters": Tokenizer("letters", len(LETTERS) + 1, LETTERS),
}


def plain(text):
    """Lower case without accents; hyphens and underscores are spaces, runs of spaces are one."""
    text = unicodedata.normalize("NFKD", text).lower()
    text = text.replace("-", " ").replace("_", " ")
    return " ".join(text.split())


def file_words(prompt):
    """A prompt as a part of a file's name: "a/../b c" -> "a_b_c". Strangers name their classes."""
    letters = re.sub(r"\W+", "_", plain(prompt)).strip("_")
    return letters[:60]


def clean_prompt(text, tokenizer):
    """-> the prompt without spaces around it. Raises UsageError, in a sentence, for one that says
    nothing.
    """
    words = text.strip()
    if not words:
        raise UsageError("an empty prompt asks for nothing: write what to segment, "
                         "as in --prompts \"car, person\"")
    ids = tokenizer.encode(words)
    if not [i for i in ids if tokenizer.letters is None or tokenizer.letters[i - 1] != " "]:
        raise UsageError(f"the prompt {words!r} has no letter or digit that this student's "
                         f"tokenizer ({tokenizer.name}) knows: it reads a-z and 0-9")
    if len(ids) > MAX_TOKENS:
        raise UsageError(f"the prompt {words[:20]!r}... has {len(ids)} tokens, "
                         f"at most {MAX_TOKENS} are read: make it shorter")
    return words


def tokenise(prompts, tokenizer):
    """-> ids int64 (K, L), filled up with 0. Raises UsageError for a prompt that says nothing."""
    encoded = [tokenizer.encode(clean_prompt(prompt, tokenizer)) for prompt in prompts]
    longest = max(len(ids) for ids in encoded)
    padded = [ids + [0] * (longest - len(ids)) for ids in encoded]
    return torch.tensor(padded)


# ---------------------------------------------------------------- meanings

def words_of(name, classes):
    """The words for a class, its own name first; none of them is another class's name."""
    own = plain(name)
    others = {plain(other) for other in classes} - {own}
    words = [own]
    for group in SYNONYMS:
        if own in group:
            words += [word for word in group if word != own and word not in others]
    return words


def concept_of(prompt, classes):
    """-> the ids of the classes that a prompt names: all for a generic one, () for what the data
    do not have.
    """
    words = plain(prompt)
    if words in GENERIC:
        return tuple(range(len(classes)))
    return tuple(i for i, name in enumerate(classes) if words in words_of(name, classes))


def members(prompts, classes):
    """-> bool (K, C): does prompt k name class c?"""
    table = torch.zeros(len(prompts), len(classes), dtype=torch.bool)
    for k, prompt in enumerate(prompts):
        for c in concept_of(prompt, classes):
            table[k, c] = True
    return table


def class_prompts(classes):
    """One prompt for each class: its name as people write it."""
    return [plain(name) for name in classes]


def nouns(classes, count):
    """The classes' names, then their synonyms in turn, up to `count`; never fewer than classes."""
    words = [words_of(name, classes) for name in classes]
    chosen = []
    for turn in range(max(len(group) for group in words)):
        for group in words:
            is_wanted = len(chosen) < count or turn == 0
            if turn < len(group) and is_wanted:
                chosen.append(group[turn])
    return chosen


def absent_words(classes, count, source=ABSENT):
    """The first `count` words of `source` that name no class here. Raises UsageError."""
    words = [word for word in source if not concept_of(word, classes)]
    if count > len(words):
        raise UsageError(f"--absent {count}: there are {len(words)} words that name nothing in "
                         f"these data")
    return words[:count]


def choose_prompts(classes, count, absent):
    """What a student is trained with: 4 generic prompts, or 21 with nouns, then absent words."""
    prompts = list(GENERIC)
    if count > len(GENERIC):
        prompts += nouns(classes, NOUNS)
    return prompts + absent_words(classes, absent)
