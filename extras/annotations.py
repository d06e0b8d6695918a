"""What the readers of labelling tools' files share: what they return, and how they find pictures.

A reader (masks_coco, masks_labelme, masks_cvat, masks_voc) has

    read(source, options) -> Annotations

with source a `Source`, and options an `Options`. What it cannot use goes to source.notes, and the
others go on: `left_out` for what was not meant to be a mask, `problem` for what is broken.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from data import DatasetError, read_class, read_lines
from extras.predict import PHOTO_SUFFIXES


@dataclass
class Options:
    line_width: int | None = None                                 # None: lines are left out
    classes: dict | None = None                                   # --classes: {name: colour}
    unknown_void: bool = False                                    # colours of no class are void


@dataclass
class Region:
    """A part of a picture that has a label. draw(height, width) -> bool (height, width)."""
    label: str
    draw: Callable


@dataclass
class Frame:
    """A picture and what was drawn on it, the lowest first."""
    file: Path                                                    # what the tool wrote
    picture: Path
    size: tuple | None = None                                     # (H, W), as the tool says
    regions: list = field(default_factory=list)
    mask: Path | None = None                                      # of a tool that writes masks
    split: str | None = None


@dataclass
class Annotations:
    """frames, and {label: (R, G, B) or None} of all labels, in the order of their ids.

    decode_mask(path) -> label, uint8 (H, W) with ids in that order, of tools that write masks.
    """
    frames: list
    labels: dict
    decode_mask: Callable | None = None
    overlap_rule: str = ""
    leaves_rest: bool = True                                      # pixels that nothing is drawn on


LONGEST_NAME = 100                                                # of a class
VOID = 255                                                        # in a decoded mask
UNPAINTED = 254                                                   # no label was drawn there


class Unusable(ValueError):
    """A picture or its mask cannot be used. `sentence` is the same for all of its kind, `detail`
    is what is this one's own."""

    def __init__(self, sentence, detail=""):
        super().__init__(f"{sentence} {detail}")
        self.sentence = sentence
        self.detail = detail


def undrawable(sentence):
    """-> the draw of a Region that cannot be drawn. Its picture is left out then: without it the
    label would be wrong."""
    def draw(height, width):
        raise Unusable(sentence)
    return draw


class Notes:
    """What was left out and what is broken, each kind once with how often, and where first."""

    def __init__(self):
        self.left = {}                                            # {sentence: [where]}
        self.broken = {}

    def left_out(self, sentence, where):
        self.left.setdefault(sentence, []).append(where)

    def problem(self, sentence, where):
        self.broken.setdefault(sentence, []).append(where)

    @staticmethod
    def lines(kinds):
        """-> ["first place: sentence (and 59 more)"]"""
        lines = []
        for sentence, places in kinds.items():
            more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
            lines.append(f"{places[0]}: {sentence}{more}")
        return lines


# ---------------------------------------------------------------- the folder that is read

class Source:
    """All files below a folder. Paths in annotations are only ever looked up among these, so that
    a file of a stranger cannot name another file of this machine."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DatasetError(f"{folder}: there is no such folder")
        self.files = sorted(path for path in self.folder.rglob("*") if self.is_wanted(path))
        self.pictures = [path for path in self.files if path.suffix.lower() in PHOTO_SUFFIXES]
        self.by_name = {}
        for path in self.pictures:
            self.by_name.setdefault(path.name.lower(), []).append(path)
        self.notes = Notes()

    def is_wanted(self, path):
        """Is it a file that a person sees? macOS packs hidden ones beside each, ._a.png."""
        names = path.relative_to(self.folder).parts
        hidden = any(name.startswith(".") or name == "__MACOSX" for name in names)
        return not hidden and path.is_file()

    def with_suffix(self, suffix):
        return [path for path in self.files if path.suffix.lower() == suffix]

    def find_picture(self, name, file):
        """The picture that `file` calls `name`; None and a problem noted where there is none, or
        where several fit.

        Tools write the name alone, a path below some folder of theirs, or a path of another
        machine: the picture whose path agrees with most of its end is meant; of several, the one
        beside `file`, or in a folder of the same split.
        """
        parts = PureWindowsPath(str(name)).parts                  # both / and \\ are separators
        candidates = self.by_name.get(parts[-1].lower(), []) if parts else []
        if not candidates:
            self.notes.problem("its picture is not in the folder", f"{file}, {name}")
            return None

        def fit(path):
            is_beside = path.parent == file.parent
            same_split = self.split_of(path) == self.split_of(file)
            return common_end(path.parts, parts), is_beside, same_split

        best = max(map(fit, candidates))
        fitting = [path for path in candidates if fit(path) == best]
        if len(fitting) > 1:
            others = f"{fitting[0]} and {fitting[1]}"
            self.notes.problem("several pictures have this name", f"{file}, {name}: {others}")
            return None
        return fitting[0]

    def split_of(self, path):
        """The split that the names of a file and of the folders above it say, or None."""
        return split_of_names(path.relative_to(self.folder).parts)

    def read_json(self, path):
        """The object in a JSON file; None, and a problem noted, where it is not one."""
        try:
            content = json.loads(read_text(path))
        except (ValueError, RecursionError):                      # a DatasetError is a ValueError
            self.notes.problem("not JSON that can be read", path)
            return None
        return content


def common_end(parts, others):
    """How many of the last parts are the same."""
    count = 0
    for part, other in zip(reversed(parts), reversed(others), strict=False):
        if part.lower() != other.lower():
            break
        count += 1
    return count


def read_text(path):
    """The text of a file. Raises DatasetError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DatasetError(f"{path}: not UTF-8 text") from None


def read_class_list(path):
    """A file of classes, a line each: name [R G B] -> {name: (R, G, B) or None}."""
    lines = [read_class(line, path) for line in read_lines(path)]
    classes = dict(lines)
    longest = max((len(name) for name in classes), default=0)
    if not classes or len(classes) < len(lines) or longest > LONGEST_NAME:
        raise DatasetError(f"{path}: it must name classes, a line each, no name twice")
    return classes


def clean_label(text):
    """A label as a line of classes.txt can hold it: no line breaks, single spaces."""
    return " ".join(str(text).split())


def split_of_names(names):
    """"train", "val" or "test" where one of `names`, of files or folders, says it, else None."""
    words = {"train": "train", "training": "train", "val": "val", "valid": "val",
             "validation": "val", "test": "test", "testing": "test"}
    for name in names:
        for word in re.split("[^a-z]+", str(name).lower()):
            if word in words:
                return words[word]
    return None
