"""CamVid as Cambridge gives it away: all frames in one folder, and labels in 32 colours, of which
SegNet made 11 classes and three splits.

    frames = find_frames(root, split)          # {stem: (image path, label path)}
    label = classes_of(colours, path)          # RGB (H, W, 3) -> classes and IGNORE (H, W)

data.py comes here for that layout, and for the colours, which Kaggle's has too: as RGB, or in a
palette (`are_label_colours`).

References
  Brostow et al., Semantic object classes in video, 2009 (the 32)
  Badrinarayanan et al., SegNet, 2017 (the 11, and the splits)
"""

import numpy as np

from data import CAMVID, IGNORE, INVALID, DatasetError, list_images, pair, without_suffix

CAMVID_COLOURS = {                                                # the original 32, in the 11
    "Sky": [(128, 128, 128)],
    # and archway, bridge, tunnel, wall
    "Building": [(128, 0, 0), (192, 0, 128), (0, 128, 64), (64, 0, 64), (64, 192, 0)],
    # and traffic cone
    "Pole": [(192, 192, 128), (0, 0, 64)],
    # and lane marks, for driving or not
    "Road": [(128, 64, 128), (128, 0, 192), (192, 0, 64)],
    # and parking block, road shoulder
    "Pavement": [(0, 0, 192), (64, 192, 128), (128, 128, 192)],
    # and other vegetation
    "Tree": [(128, 128, 0), (192, 192, 0)],
    # and other text, traffic light
    "SignSymbol": [(192, 128, 128), (128, 128, 64), (0, 64, 64)],
    "Fence": [(64, 64, 128)],
    # and pick-up, truck or bus, train, other that moves
    "Car": [(64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)],
    # and child, cart or pram, animal
    "Pedestrian": [(64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)],
    # and motorcycle or scooter
    "Bicyclist": [(0, 128, 192), (192, 0, 192)],
    "Void": [(0, 0, 0)]}


def classes_of(colours, path):
    """A label in CamVid's 32 colours, uint8 (H, W, 3) -> classes and IGNORE, uint8 (H, W).

    Raises DatasetError for another colour.
    """
    def place(colour):                                            # 0..63: a channel is 0 64 128 192
        return colour[..., 0] // 64 * 16 + colour[..., 1] // 64 * 4 + colour[..., 2] // 64

    table = np.full(64, INVALID, np.uint8)
    for class_id, group in enumerate(CAMVID_COLOURS.values()):
        for colour in group:
            table[place(np.array(colour))] = class_id
    table[table == len(CAMVID)] = IGNORE                          # the last group, Void

    label = table[place(colours)]
    label[(colours % 64 != 0).any(2)] = INVALID
    wrong = label == INVALID
    if wrong.any():
        colour = tuple(colours[wrong][0].tolist())
        raise DatasetError(f"{path}: colour {colour} is none of CamVid's 32")
    return label


def are_label_colours(colours):
    """Are all of these colours, uint8 (n, 3), among the 32?"""
    known = set()
    for group in CAMVID_COLOURS.values():
        known.update(group)
    return all(tuple(colour) in known for colour in colours.tolist())


def find_frames(root, split):
    """-> {stem: (image path, label path)}. Raises DatasetError."""
    images = list_images(root / "701_StillsRaw_full", "CamVid's frames")
    labels = list_images(root / "LabeledApproved_full", "CamVid's labels")
    pairs = pair(images, without_suffix(labels))
    return {stem: paths for stem, paths in pairs.items() if split_of(stem) == split}


def split_of(stem):
    """SegNet's split of the 701 frames, by drive and frame number: 367 train, 101 val, 233 test."""
    drive, _, frame = stem.partition("_")
    if drive == "Seq05VD" or (drive == "0001TP" and frame >= "008550"):
        return "test"
    if drive == "0016E5" and "07959" <= frame <= "08159":
        return "val"
    return "train"
