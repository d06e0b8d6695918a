"""COCO's instance annotations: polygons and run-length codes in one JSON file for many pictures.

    {"images": [{"id", "file_name", "height", "width"}],
     "categories": [{"id", "name"}],
     "annotations": [{"image_id", "category_id", "segmentation", "iscrowd"}]}

Format: cocodataset.org, "Data format". A segmentation is a list of polygons [x, y, x, y, ...], or a
run-length code {"counts", "size"}. The largest area lies lowest, so that a small thing on a large
one stays; regions of a crowd, which are drawn roughly around many, lie below all others, and have
the class of what they are a crowd of.
"""

from functools import partial

import numpy as np

from data import DatasetError
from extras.annotations import Annotations, Frame, Region, clean_label, undrawable
from extras.mask_shapes import ShapeError, as_points, coco_counts, decode_coco_runs, fill_polygons

NO_AREA = "annotations without a segmentation (a box or keypoints alone) were left out"


def read(source, options):
    """All COCO files in a folder, one a split perhaps -> Annotations."""
    frames = []
    labels = {}
    for path in source.with_suffix(".json"):
        content = source.read_json(path)
        if is_coco(content):
            add_file(path, content, source, frames, labels)
        elif content is not None:
            source.notes.left_out(".json files that are not COCO's instances", path)
    if not labels:
        raise DatasetError(f"{source.folder}: no COCO annotations (looked for .json files with "
                           f'"images", "annotations" and "categories")')
    rule = "the smaller area lies on top, a crowd's below all"
    return Annotations(frames, labels, overlap_rule=rule)


def is_coco(content):
    names = ("images", "annotations", "categories")
    return isinstance(content, dict) and all(isinstance(content.get(n), list) for n in names)


def add_file(path, content, source, frames, labels):
    """Add what one COCO file holds to `frames` and `labels`."""
    notes = source.notes
    names = {}                                                    # {category id as text: label}
    for category in by_id(content["categories"], path, notes).values():
        label = clean_label(category.get("name", ""))
        names[str(category["id"])] = label
        colour = category.get("color")
        labels.setdefault(label, tuple(colour) if is_colour(colour) else None)

    drawn = {}                                                    # {image id as text: [...]}
    for annotation in content["annotations"]:
        if isinstance(annotation, dict):
            drawn.setdefault(str(annotation.get("image_id")), []).append(annotation)

    images = by_id(content["images"], path, notes)
    for image in images.values():
        picture = source.find_picture(image.get("file_name", ""), path)
        if picture is None:
            continue
        regions = regions_of(drawn.pop(str(image["id"]), []), names, f"{path}, {picture.name}",
                             notes)
        split = source.split_of(path) or source.split_of(picture)
        frames.append(Frame(path, picture, size_of(image), regions, split=split))
    known = {str(key) for key in images}
    for image_id in drawn:
        if image_id not in known:
            notes.problem("annotations of an image that it does not list", f"{path}, {image_id}")


def by_id(items, path, notes):
    """A list of objects with an "id" -> {id: object}, in the order of the ids where these are
    numbers."""
    found = {}
    for item in items:
        identity = item.get("id") if isinstance(item, dict) else None
        if not isinstance(identity, (int, str)):
            notes.problem("an image or category without an id", path)
        elif identity in found:
            notes.problem("two images or categories of one id", f"{path}, id {identity}")
        else:
            found[identity] = item
    if all(isinstance(identity, int) for identity in found):
        return dict(sorted(found.items()))
    return found


def is_colour(value):
    """Is it a list of three numbers 0..255?"""
    if not isinstance(value, list) or len(value) != 3:
        return False
    return all(isinstance(channel, int) and 0 <= channel < 256 for channel in value)


def size_of(image):
    size = (image.get("height"), image.get("width"))
    is_given = all(isinstance(side, int) and side > 0 for side in size)
    return size if is_given else None


def regions_of(annotations, names, where, notes):
    """-> [Region] of one picture, the lowest first."""
    ranked = []
    for annotation in annotations:
        label = names.get(str(annotation.get("category_id")))
        segmentation = annotation.get("segmentation")
        if label is None:
            notes.problem("annotations of a category that it does not list", where)
            continue
        if not segmentation:
            notes.left_out(NO_AREA, where)
            continue
        try:
            draw, area = drawing_of(segmentation)
        except ShapeError as error:
            draw = undrawable(f"a region cannot be drawn: {error}")
            area = 0
        is_crowd = bool(annotation.get("iscrowd"))
        ranked.append((not is_crowd, -area, Region(label, draw)))
    ranked.sort(key=lambda entry: entry[:2])                      # stable: the file's order in ties
    return [region for _, _, region in ranked]


def drawing_of(segmentation):
    """-> (draw(height, width) -> mask, its area in pixels). Raises ShapeError."""
    if isinstance(segmentation, dict):
        inside = coco_counts(segmentation)[1::2]
        return partial(decode_coco_runs, segmentation), int(inside.sum())
    if not isinstance(segmentation, list):
        raise ShapeError("its segmentation is neither polygons nor a run-length code")
    parts = [as_points(pairs(part), at_least=1) for part in segmentation if part != []]
    parts = [points for points in parts if len(points) > 2]       # the others have no area
    if not parts:
        raise ShapeError("none of its polygons has the 3 points that one needs")
    area = sum(polygon_area(points) for points in parts)
    return partial(fill_polygons, parts), area


def pairs(numbers):
    """[x, y, x, y, ...] -> [(x, y), ...]. Raises ShapeError."""
    if not isinstance(numbers, list) or len(numbers) % 2:
        raise ShapeError("its points are not pairs of numbers")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def polygon_area(points):
    """Of points (n, 2), by the shoelace formula."""
    x, y = points.T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
