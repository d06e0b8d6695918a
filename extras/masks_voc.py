"""Masks that a tool has drawn itself: pictures of ids, or of colours, beside the photos.

    JPEGImages/a.jpg  SegmentationClass/a.png  labelmap.txt  ImageSets/Segmentation/train.txt

is PASCAL VOC's layout, which CVAT ("Segmentation mask 1.1") and labelme2voc write too. A mask is a
.png in a folder called SegmentationClass, SegmentationClassPNG, masks, labels or annotations, or
one whose name ends with _mask; its photo has the same name.

What the ids or colours in the masks mean is told by the first of these files that is there, or else
by --classes, which beside such a file only chooses among its classes, and orders them:

    labelmap.txt      CVAT's: name:R,G,B:parts:actions
    classes.txt       name [R G B], as this project's own
    class_names.txt   labelme2voc's: a name a line

without any, in a folder SegmentationClass, PASCAL VOC's own 21. Masks in colours are read by the
colours of the classes. Grey ones, and those with a palette where no class has a colour, are read as
ids (255 is void), but where classes have grey colours and the masks hold these, or no ids.
"""

from functools import partial

import numpy as np

from data import DatasetError, read_lines, read_picture
from extras.annotations import (
    UNPAINTED,
    VOID,
    Annotations,
    Frame,
    Unusable,
    clean_label,
    read_class_list,
)

MASK_FOLDERS = ("segmentationclass", "segmentationclasspng", "masks", "labels", "annotations")
OTHER_FOLDERS = ("segmentationobject", "segmentationobjectpng", "segmentationclassvisualization")
ENDING = "_mask"
PASCAL = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat",
          "chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant",
          "sheep", "sofa", "train", "tvmonitor")
BORDER = (224, 224, 192)                                          # VOC's colour of void


def read(source, options):
    """All masks in a folder -> Annotations."""
    photos, masks = find_masks(source)
    if not masks:
        raise DatasetError(f"{source.folder}: no masks (looked for pictures in folders called "
                           f"{', '.join(MASK_FOLDERS)}, and for names that end with {ENDING})")
    labels = find_labels(source, options.classes)
    splits = read_image_sets(source)
    frames = []
    for stem, mask in sorted(masks.items()):
        photo = photos.pop(stem, None)
        if photo is None:
            source.notes.problem("no photo has the name of this mask", mask)
            continue
        split = splits.get(stem[-1]) or source.split_of(photo)
        frames.append(Frame(mask, photo, mask=mask, split=split))
    decode = mask_decoder([frame.mask for frame in frames], labels, options)
    rest = any(has_unpainted(frame.mask, decode) for frame in frames)
    return Annotations(frames, labels, decode_mask=decode, leaves_rest=rest)


# ---------------------------------------------------------------- which files

def find_masks(source):
    """-> ({key: photo}, {key: mask}); a key is the folders less the mask folder's name, and the
    stem, so that train/masks/a.png belongs to train/a.jpg or train/images/a.jpg."""
    photos = {}
    masks = {}
    for path in source.pictures:
        folders = [name.lower() for name in path.relative_to(source.folder).parts[:-1]]
        is_mask = any(name in MASK_FOLDERS for name in folders) or path.stem.endswith(ENDING)
        if any(name in OTHER_FOLDERS for name in folders):
            continue
        kept = [name for name in folders if name not in (*MASK_FOLDERS, "images", "jpegimages")]
        key = (*kept, path.stem.removesuffix(ENDING))
        found = masks if is_mask else photos
        if key in found:
            raise DatasetError(f"{path}: there is a second picture of this name, {found[key]}")
        if is_mask and path.suffix.lower() in (".jpg", ".jpeg"):
            source.notes.problem("a mask must be a .png, JPEG changes its colours", path)
        else:
            found[key] = path
    return photos, masks


def read_image_sets(source):
    """VOC's lists of stems -> {stem: split}."""
    splits = {}
    for path in source.with_suffix(".txt"):
        is_list = path.parent.name == "Segmentation" and path.stem in ("train", "val", "test")
        if is_list:
            splits |= dict.fromkeys(read_lines(path), path.stem)
    return splits


# ---------------------------------------------------------------- which classes

def find_labels(source, chosen):
    """-> {name: colour or None}, in the order of the ids.

    chosen: --classes or None; where the source has a list, it may add colours to that.
    """
    readers = {"labelmap.txt": read_labelmap, "classes.txt": read_class_list,
               "class_names.txt": read_class_list}
    for name, reader in readers.items():
        found = [path for path in source.files if path.name.lower() == name]
        if len(found) > 1:
            raise DatasetError(f"{found[1]}: there is a second one, {found[0]}: "
                               f"leave the one that holds")
        if found:
            labels = reader(found[0])
            for label, colour in (chosen or {}).items():
                if label in labels and labels[label] is None:
                    labels[label] = colour
            return labels
    if chosen:
        return chosen
    if any(path.parent.name == "SegmentationClass" for path in source.pictures):
        print("no labelmap.txt or classes.txt: the 21 classes of PASCAL VOC are taken")
        colours = [voc_colour(i) for i in range(len(PASCAL))]
        return dict(zip(PASCAL, colours, strict=True))
    raise DatasetError(f"{source.folder}: no list of classes (looked for {', '.join(readers)}): "
                       f"give one with --classes, a line for each class, name [R G B]")


def read_labelmap(path):
    """CVAT's labelmap.txt -> {name: colour}."""
    labels = {}
    for line in read_lines(path):
        if line.startswith("#"):
            continue
        words = line.rsplit(":", 3)
        channels = words[1].split(",") if len(words) == 4 else []
        values = [int(word) for word in channels if word.strip().isdecimal()]
        if len(values) != 3 or max(values) > 255:
            raise DatasetError(f"{path}: {line!r} is not name:R,G,B:parts:actions")
        labels[clean_label(words[0])] = tuple(values)
    return labels


def voc_colour(index):
    """PASCAL VOC's colour of a class: bits 0, 3, 6 of the index are red's highest, second and third
    bit, bits 1, 4, 7 green's, bits 2, 5 blue's."""
    channels = [0, 0, 0]
    for bit in range(8):
        if index >> bit & 1:
            channels[bit % 3] |= 1 << (7 - bit // 3)
    return tuple(channels)


# ---------------------------------------------------------------- from pixels to ids

def mask_decoder(paths, labels, options):
    """-> decode(path) -> ids in the order of `labels`, VOID and UNPAINTED, uint8 (H, W).

    Raises DatasetError for classes that a mask cannot tell apart.
    """
    colours = [colour for colour in labels.values() if colour is not None]
    greys = {colour[0] for colour in colours if is_grey(colour)}
    values = grey_values(paths)
    is_in_colours = values is None and bool(colours)
    if values is not None and greys:
        are_colours = values != {0} and values <= greys | {0}     # black: of no class, or one's
        are_ids = all(value < len(labels) or value == VOID for value in values)
        is_in_colours = are_colours or not are_ids
    if is_in_colours:
        check_distinct(labels)
        return partial(decode_colours, labels=labels, unknown_void=options.unknown_void)
    if values is None:
        return partial(decode_palette, labels=labels)
    if values == {0, 255} and len(labels) > 1:
        raise DatasetError(f"{paths[0].parent}: its masks hold 0 and 255 alone, and as an id 255 "
                           f"is void: name the colours of the classes, 'road 255 255 255', in a "
                           f"file for --classes")
    return partial(decode_ids, labels=labels)


def is_grey(colour):
    """Is it a grey that is not black, which most have for the background?"""
    return len(set(colour)) == 1 and max(colour) > 0


def check_distinct(labels):
    """Raise DatasetError for two classes of one colour."""
    owners = {}
    for name, colour in labels.items():
        if colour is not None and colour in owners:
            raise DatasetError(f"the classes {owners[colour]!r} and {name!r} have one colour, "
                               f"{colour}: a mask cannot tell them apart")
        owners[colour] = name


def grey_values(paths):
    """-> the set of values in grey masks, or None where one is in colours."""
    values = set()
    for path in paths:
        try:
            pixels = read_picture(path)                           # (H, W, 3)
        except DatasetError:                                      # said when it is decoded
            continue
        if (pixels != pixels[..., :1]).any():
            return None
        values.update(np.unique(pixels[..., 0]).tolist())
    return values


def has_unpainted(path, decode):
    """Is a pixel of a mask of no class and not void? False for one that cannot be read."""
    try:
        return bool((decode(path) == UNPAINTED).any())
    except (DatasetError, Unusable):                              # said when it is written
        return False


def decode_ids(path, labels):
    """A grey mask: its values are the ids, 255 is void. Raises Unusable and DatasetError."""
    ids = read_picture(path)[..., 0]                              # (H, W), red = green = blue
    return check_ids(ids, labels)


def decode_palette(path, labels):
    """A mask with a palette: its numbers are the ids, whatever the colours. Raises Unusable and
    DatasetError."""
    read_picture(path)                                            # raises for a broken one
    try:
        ids = read_picture(path, "ids")                           # (H, W)
    except DatasetError:
        raise Unusable("the mask is in colours, and the list of classes names none: write lines "
                       "like 'road 128 64 128'") from None
    return check_ids(ids, labels)


def check_ids(ids, labels):
    """-> ids. Raises Unusable for one that no class has."""
    wrong = (ids >= len(labels)) & (ids != VOID)
    if wrong.any():
        raise Unusable(f"its ids are not those of the {len(labels)} classes",
                       f"id {ids[wrong][0]}")
    return ids


def decode_colours(path, labels, unknown_void):
    """A mask in the colours of its classes; black, where no class has it, is UNPAINTED. Raises
    Unusable and DatasetError."""
    table = {(0, 0, 0): UNPAINTED, BORDER: VOID}
    for i, colour in enumerate(labels.values()):
        if colour is None:
            raise Unusable("the mask is in colours, and the list of classes names none: write "
                           "lines like 'road 128 64 128'")
        table[colour] = i
    codes = {red << 16 | green << 8 | blue: i for (red, green, blue), i in table.items()}
    known = np.array(sorted(codes))
    ids = np.array([codes[code] for code in sorted(codes)], np.uint8)

    pixels = read_picture(path).astype(np.int64)                  # (H, W, 3)
    packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]    # (H, W)
    places = np.searchsorted(known, packed).clip(max=len(known) - 1)
    unknown = known[places] != packed
    if unknown.any() and not unknown_void:
        colour = tuple(pixels[unknown][0].tolist())
        raise Unusable("it has colours of no class: save masks without smoothed edges, name the "
                       "colour, or take such pixels as void with --unknown-void",
                       f"{unknown.sum()} pixels, first {colour}")
    label = ids[places]
    label[unknown] = VOID
    return label
