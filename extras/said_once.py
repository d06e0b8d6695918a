"""Many sentences about many files, each kind of them once.

    for line in said_once(sentences):          # "labels/a.png: ... (and 59 more: b.png, ...)"
        print(f"error: {line}")

A sentence begins with the file that it is about, as those of DatasetError do.
"""

import re
from pathlib import Path

from extras.printable import printable

LONGEST = 2000                                                    # characters of a sentence
NAMED = 3                                                         # of the files that follow


def said_once(sentences, say_all=False):
    """-> lines: the first sentence of each kind, with how many more there are; or each sentence."""
    kinds = {}
    for sentence in dict.fromkeys(sentences):                     # each one once, in their order
        kind = sentence if say_all else kind_of(sentence)
        kinds.setdefault(kind, []).append(sentence)
    lines = []
    for first, *others in kinds.values():
        lines.append(printable(first, LONGEST) + describe_others(others))
    return lines


def kind_of(sentence):
    """Two sentences are of one kind when they differ in the file, in 'names' and numbers alone."""
    what = sentence.partition(": ")[2] or sentence
    return re.sub(r"'[^']*'|\d+", "0", what)


def describe_others(others):
    """What is said behind the first sentence of a kind about the others."""
    if not others:
        return ""
    names = []
    for sentence in others[:NAMED]:
        path = sentence.partition(": ")[0]
        names.append(printable(Path(path).name))
    if len(others) > NAMED:
        names.append("...; --all says each")
    return f" (and {len(others)} more: {', '.join(names)})"
