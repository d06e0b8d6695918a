"""A closer look at a stranger's data set. data.py comes here for what its own reader cannot see.

    check_class_names(names, path)       # what classes.txt calls the classes
    check_whole(picture, path)           # a picture that was just decoded
    check_end(path)                      # the same, for one that was not
    check_labelled(dataset)              # is there anything to learn, or to score?
    explain_ids(ids, num_classes)        # why might a label hold ids of no class?

Each check raises DatasetError, in a sentence that names the file.
"""

import numpy as np

from data import BROKEN_PICTURE, IGNORE, DatasetError
from extras.jpeg_ends import ends_grey, lacks_its_end
from extras.printable import is_plain_text, printable
from extras.smoothed_masks import LIKELY, smoothed_share

LONGEST_NAME = 200                                                # of a class
JPEG = ("JPEG", "MPO")                                            # MPO: a JPEG with more behind it
CUT = "not an image that can be read (a part of it is missing: it was cut off)"


def check_class_names(names, path):
    """Names are printed in tables and drawn in legends: they are short, and only text."""
    for name in names:
        if not is_plain_text(name, LONGEST_NAME):
            raise DatasetError(f"{path}: a class's name must be text of at most {LONGEST_NAME} "
                               f"characters, without control characters: {printable(name)}")


# ---------------------------------------------------------------- JPEG files that were cut

def check_whole(picture, path):
    """picture: PIL's, decoded from `path`. Costs next to nothing unless it looks cut."""
    if picture.format not in JPEG:
        return
    looks_cut = picture.info.get("progressive") or ends_grey(picture)
    if looks_cut:
        refuse_cut(path)


def check_end(path, thorough=False):
    """For a file that was not decoded: a JPEG is, at an eighth of its size."""
    with open(path, "rb") as file:
        is_jpeg = file.read(2) == b"\xff\xd8"
    if is_jpeg:
        refuse_cut(path, thorough)


def refuse_cut(path, thorough=False):
    try:
        is_cut = lacks_its_end(path, thorough)
    except (*BROKEN_PICTURE, IndexError) as error:                # IndexError: a header that is cut
        raise DatasetError(f"{path}: not an image that can be read ({error})") from None
    if is_cut:
        raise DatasetError(f"{path}: {CUT}")


# ---------------------------------------------------------------- labels

def check_labelled(dataset):
    """Looks for one labelled pixel: mostly the first label has some."""
    for i in range(len(dataset)):
        if (dataset.read_label(i) != IGNORE).any():
            return
    raise DatasetError(f"{dataset.where(0)}: no pixel of its label, nor of the other "
                       f"{len(dataset) - 1} labels of this split, has a class: all are void")


def explain_ids(ids, num_classes):
    """The ids of a label, uint8 (H, W), one of which is none of the classes -> what is probably
    wrong, to be said behind that; "" where nothing tells."""
    if smoothed_share(ids) >= LIKELY:
        return ("; its regions have edges of ids in between, as smoothing, scaling or JPEG leave: "
                "save masks without smoothed edges, scale them with NEAREST")
    met = set(np.unique(ids).tolist()) - {IGNORE}
    if max(met) != num_classes:
        return ""
    if 0 in met:
        return "; does classes.txt lack a line, of a background with the id 0?"
    return "; do its ids count from 1? They must count from 0"
