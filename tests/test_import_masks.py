"""What labelling tools write, imported: the same three photos by four tools, and what is wrong."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from conftest import command
from data import open_dataset
from labelled_photos import WRITERS, expected_label, import_labelme, write_photos, write_voc


def import_masks(*args, code=0):
    return command("-m", "extras.import_masks", *args, code=code)


def frames_of(out, *splits):
    """{stem: label} of a data set."""
    frames = {}
    for split in splits:
        dataset = open_dataset(f"folder:{out}", split)
        for i, stem in enumerate(dataset.stems):
            frames[stem] = dataset[i][1].numpy()
    return frames


# ---------------------------------------------------------------- four tools, one result

@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_photos_come_out_of_every_tool(kind, tmp_path):
    source = tmp_path / "source"
    out = tmp_path / "out"
    WRITERS[kind](source)
    output = import_masks(kind, source, out)
    assert f"3 frames in {out}, 3 classes" in output
    assert (out / "import_report.txt").read_text().strip() == output.strip()

    classes = open_dataset(f"folder:{out}", "train").classes
    assert set(classes) == {"background", "road", "car"} and classes[0] == "background"
    ids = {name: i for i, name in enumerate(classes)}
    frames = frames_of(out, "train", "val")
    for i, stem in enumerate("abc"):
        shift = 0 if (kind, stem) == ("coco", "c") else i         # it counts from 0 in its own file
        assert (frames[stem] == expected_label(ids, shift)).all(), stem
    if kind != "voc":
        assert "car over road: " in output
    if kind in ("coco", "voc"):
        assert (out / "val.txt").read_text() == "c\n"
        assert "splits, by the names of files and folders: train 2, val 1" in output
    else:
        assert not (out / "val.txt").exists() and "no lists of splits" in output
    if kind in ("cvat", "voc"):
        assert "car 64 0 128\n" in (out / "classes.txt").read_text()
    checked = command("data.py", f"folder:{out}", "--sheet", tmp_path / "sheet.png")
    assert "3 of 3 classes met" in checked


def test_a_class_for_the_rest_is_only_added_where_there_is_a_rest(tmp_path):
    source = tmp_path / "source"
    write_voc(source)
    labels = (source / "labelmap.txt").read_text()
    (source / "labelmap.txt").write_text(labels.replace("background:0,0,0::\n", ""))
    import_masks("voc", source, tmp_path / "black")               # black is no class: the rest
    frames = frames_of(tmp_path / "black", "train")
    assert (frames["a"] == expected_label({"background": 0, "car": 1, "road": 2})).all()
    (source / "labelmap.txt").write_text(labels.replace("background", "sky"))
    import_masks("voc", source, tmp_path / "all")
    frames = frames_of(tmp_path / "all", "train")
    assert (frames["a"] == expected_label({"background": 0, "car": 1, "road": 2})).all()
    assert (tmp_path / "all" / "classes.txt").read_text().startswith("sky 0 0 0\ncar ")


def test_masks_with_a_palette_are_read_by_its_colours(tmp_path):
    write_voc(tmp_path / "source", palette=True)
    import_masks("voc", tmp_path / "source", tmp_path / "out")
    frames = frames_of(tmp_path / "out", "train")
    assert (frames["a"] == expected_label({"background": 0, "car": 1, "road": 2})).all()


def write_one_mask(source, values, classes, palette=None):
    """A photo, and a mask of three stripes with these values (or colours)."""
    write_photos(source, ("a.jpg",))
    (source / "masks").mkdir()
    mask = np.zeros((48, 64, *np.shape(values)[1:]), np.uint8)
    for i, value in enumerate(values):
        mask[16 * i:16 * i + 16] = value
    picture = Image.fromarray(mask)
    if palette:
        picture.putpalette(palette)
    picture.save(source / "masks" / "a.png")
    (source / "classes.txt").write_text(classes)


def stripes(out):
    label = np.asarray(Image.open(out / "labels" / "a.png"))
    return [int(label[16 * i, 0]) for i in range(3)]


def test_classes_beside_a_list_choose_and_order_and_never_rename(tmp_path):
    source = tmp_path / "source"
    write_one_mask(source, (0, 1, 2), "bg\nroad\ncar\n")
    (tmp_path / "chosen.txt").write_text("car\nroad\nbg\n")
    import_masks("voc", source, tmp_path / "out", "--classes", tmp_path / "chosen.txt",
                 "--rest", "void")
    assert stripes(tmp_path / "out") == [2, 1, 0]


def test_a_mask_with_a_palette_of_classes_without_colours_holds_ids(tmp_path):
    """As labelme2voc writes them."""
    source = tmp_path / "source"
    palette = [0, 0, 0, 128, 0, 0, 0, 128, 0]
    write_one_mask(source, (0, 1, 2), "_background_\nroad\ncar\n", palette)
    import_masks("voc", source, tmp_path / "out")
    assert stripes(tmp_path / "out") == [0, 1, 2]


def test_ids_are_ids_beside_a_grey_colour_as_our_own_data_has(tmp_path):
    source = tmp_path / "source"
    write_one_mask(source, (0, 1, 255), "background 128 128 128\nroad 128 64 128\n")
    import_masks("voc", source, tmp_path / "out")
    assert stripes(tmp_path / "out") == [0, 1, 255]


def test_two_classes_of_one_colour_are_said(tmp_path):
    source = tmp_path / "source"
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 0)]
    write_one_mask(source, colours, "car 255 0 0\nroad 0 255 0\ntruck 255 0 0\n")
    output = import_masks("voc", source, tmp_path / "out", code=2)
    assert "the classes 'car' and 'truck' have one colour" in output


def test_rest_and_classes_choose_what_the_ids_mean(tmp_path):
    source = tmp_path / "source"
    WRITERS["labelme"](source)
    import_masks("labelme", source, tmp_path / "void", "--rest", "void")
    frames = frames_of(tmp_path / "void", "train")
    assert (frames["a"] == expected_label({"background": 255, "car": 0, "road": 1})).all()

    import_masks("labelme", source, tmp_path / "road", "--rest", "road")
    frames = frames_of(tmp_path / "road", "train")
    assert (frames["a"] == expected_label({"background": 1, "car": 0, "road": 1})).all()

    (tmp_path / "names.txt").write_text("road\nother\n")
    output = import_masks("labelme", source, tmp_path / "two", "--classes", tmp_path / "names.txt",
                          "--rest", "other")
    assert "3 regions of 'car', which --classes does not name" in output
    frames = frames_of(tmp_path / "two", "train")
    expected = np.ones((48, 64))
    expected[24:] = 0
    assert (frames["a"] == expected).all()


# ---------------------------------------------------------------- what each tool can hold

def labelme_file(folder, shapes, name="a.jpg", size=(48, 64)):
    write_photos(folder, (name,))
    content = {"imagePath": name, "imageHeight": size[0], "imageWidth": size[1], "shapes": shapes}
    (folder / f"{name[:-4]}.json").write_text(json.dumps(content))


def png_in_base64(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_labelme_masks_lines_points_and_void(tmp_path):
    bitmap = np.zeros((4, 6), np.uint8)
    bitmap[1:3] = 255
    shapes = [
        {"label": "sign", "shape_type": "mask", "points": [[5, 7], [10, 10]],
         "mask": png_in_base64(bitmap)},
        {"label": "lane", "shape_type": "line", "points": [[0, 30], [63, 30]]},
        {"label": "spot", "shape_type": "point", "points": [[3, 3]]},
        {"label": "void", "shape_type": "rectangle", "points": [[50, 0], [59, 9]]},
    ]
    labelme_file(tmp_path / "source", shapes)
    output = import_masks("labelme", tmp_path / "source", tmp_path / "out", "--rest", "background")
    assert "lines were left out" in output and "kind 'point' were left out" in output
    label = np.asarray(Image.open(tmp_path / "out" / "labels" / "a.png"))
    assert (label[8:10, 5:11] == 1).all() and (label == 1).sum() == 12
    assert (label[:10, 50:60] == 255).all() and (label == 255).sum() == 100
    classes = (tmp_path / "out" / "classes.txt").read_text().split()
    assert classes[::4] == ["background", "sign"]

    import_masks("labelme", tmp_path / "source", tmp_path / "lines", "--line-width", 4)
    label = np.asarray(Image.open(tmp_path / "lines" / "labels" / "a.png"))
    assert (label == 1).sum() in range(60 * 4, 66 * 5)            # lane, before sign


def test_a_file_of_overlapping_shapes_is_what_labelme_renders(tmp_path):
    shape = import_labelme()
    rng = np.random.default_rng(0)
    shapes = []
    counts = {"polygon": 6, "rectangle": 2, "circle": 2, "linestrip": 3}
    for i, (kind, count) in enumerate(list(counts.items()) * 3):
        points = rng.uniform([0, 0], [64, 48], (count, 2)).tolist()
        shapes.append({"label": "abc"[i % 3], "shape_type": kind, "points": points})
    labelme_file(tmp_path / "source", shapes)
    import_masks("labelme", tmp_path / "source", tmp_path / "out", "--line-width", 10)
    ours = np.asarray(Image.open(tmp_path / "out" / "labels" / "a.png"))
    theirs, _ = shape.shapes_to_label((48, 64), shapes, {"a": 1, "b": 2, "c": 3})
    assert (ours == theirs).all() and len(np.unique(ours)) == 4


def test_a_coco_file_is_what_pycocotools_draws(tmp_path):
    """Up to the pixels whose centres lie on a line; the areas are given to no other class."""
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    rng = np.random.default_rng(1)
    annotations = []
    for i in range(2):
        points = rng.uniform([0, 0], [64, 48], (7, 2)).round(2)
        away = points - points.mean(0)
        points = points[np.argsort(np.arctan2(away[:, 1], away[:, 0]))]  # no side crosses another
        annotations.append({"id": i + 1, "image_id": 1, "category_id": i + 1, "iscrowd": 0,
                            "segmentation": [points.ravel().tolist()]})
    coco_file(tmp_path / "source", annotations)
    import_masks("coco", tmp_path / "source", tmp_path / "out")
    ours = np.asarray(Image.open(tmp_path / "out" / "labels" / "a.png"))
    read = coco.COCO(str(tmp_path / "source" / "instances.json"))
    masks = [read.annToMask(annotation) for annotation in annotations]
    theirs = np.zeros((48, 64), np.uint8)
    for i in sorted(range(2), key=lambda i: masks[i].sum(), reverse=True):  # the smaller on top
        theirs[masks[i] > 0] = i + 1
    assert (ours != theirs).mean() < 0.01 and len(np.unique(ours)) == 3


def coco_file(folder, annotations, images=None, categories=None):
    write_photos(folder, ("a.jpg",))
    content = {
        "images": images or [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}],
        "annotations": annotations,
        "categories": categories or [{"id": 1, "name": "person"}, {"id": 2, "name": "bus"}],
    }
    (folder / "instances.json").write_text(json.dumps(content))


def test_coco_crowds_lie_below_and_boxes_are_said(tmp_path):
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    crowd = np.zeros((48, 64), np.uint8)
    crowd[10:40, 10:50] = 1
    runs = coco.encode(np.asfortranarray(crowd))
    whole = [0, 0, 64, 0, 64, 48, 0, 48]
    annotations = [
        {"image_id": 1, "category_id": 1, "iscrowd": 1,
         "segmentation": {"size": [48, 64], "counts": runs["counts"].decode()}},
        {"image_id": 1, "category_id": 2, "segmentation": [whole]},
        {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "segmentation": []},
    ]
    coco_file(tmp_path / "source", annotations)
    output = import_masks("coco", tmp_path / "source", tmp_path / "out")
    label = np.asarray(Image.open(tmp_path / "out" / "labels" / "a.png"))
    assert (label == 2).all()                                     # though the crowd is smaller
    assert "without a segmentation (a box or keypoints alone) were left out" in output
    assert "bus over person: 1,200 pixels" in output

    coco_file(tmp_path / "crowd", annotations[:1])
    import_masks("coco", tmp_path / "crowd", tmp_path / "alone")
    label = np.asarray(Image.open(tmp_path / "alone" / "labels" / "a.png"))
    assert (label == crowd).all()


def cvat_file(folder, shapes, image='name="a.jpg" width="64" height="48"'):
    write_photos(folder, ("a.jpg",))
    text = f"<annotations><image {image}>{shapes}</image></annotations>"
    (folder / "annotations.xml").write_text(text)


def test_cvat_masks_ellipses_and_lines(tmp_path):
    shapes = ('<mask label="sign" rle="2, 3, 1" left="60" top="4" width="3" height="2"/>'
              '<ellipse label="wheel" cx="20" cy="30" rx="6" ry="6"/>'
              '<polyline label="lane" points="0,45;63,45"/><points label="spot" points="1,1"/>')
    cvat_file(tmp_path / "source", shapes)
    output = import_masks("cvat", tmp_path / "source", tmp_path / "out")
    label = np.asarray(Image.open(tmp_path / "out" / "labels" / "a.png"))
    sign = np.argwhere(label == 1).tolist()
    assert sign == [[4, 62], [5, 60], [5, 61]]
    assert abs((label == 2).sum() - np.pi * 36) < 6
    assert "polylines were left out" in output and "<points> were left out" in output


def test_turned_photos_are_written_upright(tmp_path):
    folder = tmp_path / "source"
    labelme_file(folder, [{"label": "x", "points": [[0, 0], [20, 0], [0, 20]]}], size=(64, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = Image.open(folder / "a.jpg").copy()
    pixels.save(folder / "a.jpg", exif=exif)                      # 64x48, shown as 48x64
    output = import_masks("labelme", folder, tmp_path / "out")
    assert "1 pictures were turned upright" in output
    written = Image.open(tmp_path / "out" / "images" / "a.jpg")
    assert written.size == (48, 64) and not written.getexif()

    labelme_file(tmp_path / "other", [], size=(48, 64))
    shutil.copyfile(folder / "a.jpg", tmp_path / "other" / "a.jpg")
    output = import_masks("labelme", tmp_path / "other", tmp_path / "o2", "--keep-empty", code=2)
    assert "has another size than its annotation says" in output and "48x64, 64x48" in output


def test_photos_of_one_name_keep_their_folders_apart(tmp_path):
    for city in ("aachen", "bonn"):
        labelme_file(tmp_path / "source" / city, [{"label": city, "points": [[0, 0], [9, 0],
                                                                              [0, 9]]}])
    import_masks("labelme", tmp_path / "source", tmp_path / "out")
    assert sorted(frames_of(tmp_path / "out", "train", "val")) == ["aachen_a", "bonn_a"]
    classes = (tmp_path / "out" / "classes.txt").read_text().split()[::4]
    label = np.asarray(Image.open(tmp_path / "out" / "labels" / "bonn_a.png"))
    assert label[0, 0] == classes.index("bonn")


def test_hidden_files_are_not_looked_at_and_two_suffixes_are_two_names(tmp_path):
    source = tmp_path / "source"
    write_voc(source)
    (source / "SegmentationClass" / "._a.png").write_bytes(b"no picture")
    (source / "__MACOSX").mkdir()
    (source / "__MACOSX" / "labelmap.txt").write_bytes(b"\xff")
    assert "3 frames in" in import_masks("voc", source, tmp_path / "out")

    triangle = [{"label": "x", "points": [[0, 0], [20, 0], [0, 20]]}]
    labelme_file(tmp_path / "two", triangle, name="a.jpg")
    (tmp_path / "two" / "a.json").rename(tmp_path / "two" / "first.json")
    labelme_file(tmp_path / "two", triangle, name="a.png")
    import_masks("labelme", tmp_path / "two", tmp_path / "two-out")
    assert sorted(frames_of(tmp_path / "two-out", "train", "val")) == ["a", "a_jpg"]


def test_pictures_without_a_drawing_are_left_out_and_said(tmp_path):
    labelme_file(tmp_path / "source", [{"label": "x", "points": [[0, 0], [20, 0], [0, 20]]}])
    labelme_file(tmp_path / "source", [], name="empty.jpg")
    write_photos(tmp_path / "source", ("alone.jpg",))
    output = import_masks("labelme", tmp_path / "source", tmp_path / "out")
    assert "1 frames in" in output
    assert "1 pictures on which nothing was drawn" in output and "empty.jpg" in output
    assert "1 pictures that no annotation names" in output and "alone.jpg" in output
    output = import_masks("labelme", tmp_path / "source", tmp_path / "all", "--keep-empty")
    assert "2 frames in" in output


# ---------------------------------------------------------------- what is wrong

def test_sixty_broken_files_are_one_sentence(tmp_path):
    source = tmp_path / "source"
    labelme_file(source, [{"label": "x", "points": [[0, 0], [20, 0], [0, 20]]}])
    for i in range(60):
        (source / f"broken{i:02d}.json").write_text("{")
    output = import_masks("labelme", source, tmp_path / "out", code=2)
    assert "broken00.json: not JSON that can be read (and 59 more)" in output
    assert output.count("not JSON") == 1 and "1 frames in" in output


def test_a_file_cannot_name_a_picture_outside_of_the_folder(tmp_path):
    write_photos(tmp_path, ("secret.jpg",))
    images = [{"id": 1, "file_name": "../secret.jpg", "height": 48, "width": 64}]
    polygon = {"image_id": 1, "category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9]]}
    coco_file(tmp_path / "source", [polygon], images)
    output = import_masks("coco", tmp_path / "source", tmp_path / "out", code=2)
    assert "../secret.jpg: its picture is not in the folder" in output


def test_masks_that_cannot_be_meant_are_a_sentence(tmp_path):
    source = tmp_path / "source"
    write_photos(source, ("a.jpg",))
    (source / "masks").mkdir()
    mask = source / "masks" / "a.png"
    Image.fromarray(expected_label({"background": 0, "road": 255, "car": 255})).save(mask)
    assert "no list of classes" in import_masks("voc", source, tmp_path / "o1", code=2)
    (source / "classes.txt").write_text("background\nroad\n")
    output = import_masks("voc", source, tmp_path / "o2", code=2)
    assert "hold 0 and 255 alone, and as an id 255 is void" in output
    (source / "classes.txt").write_text("background 0 0 0\nroad 255 255 255\n")
    import_masks("voc", source, tmp_path / "o3")
    label = np.asarray(Image.open(tmp_path / "o3" / "labels" / "a.png"))
    assert (label == expected_label({"background": 0, "road": 1, "car": 1})).all()

    smooth = Image.open(mask).convert("RGB").resize((32, 24)).resize((64, 48))
    smooth.save(mask)
    output = import_masks("voc", source, tmp_path / "o4", code=2)
    assert "it has colours of no class: save masks without smoothed edges" in output
    output = import_masks("voc", source, tmp_path / "o5", "--unknown-void")
    label = np.asarray(Image.open(tmp_path / "o5" / "labels" / "a.png"))
    assert set(np.unique(label)) == {0, 1, 255}

    mask.unlink()
    Image.new("RGB", (64, 48)).save(mask.with_suffix(".jpg"))
    output = import_masks("voc", source, tmp_path / "o6", code=2)
    assert "no masks" in output or "JPEG changes its colours" in output


BAD_COCO = [
    ({"image_id": 1, "category_id": 9, "segmentation": [[0, 0, 9, 0, 9, 9]]},
     "a category that it does not list"),
    ({"image_id": 5, "category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9]]},
     "an image that it does not list"),
    ({"image_id": 1, "category_id": 1, "segmentation": [[0, 0, 9]]}, "not pairs of numbers"),
    ({"image_id": 1, "category_id": 1, "segmentation": [["a", "b", 1, 2, 3, 4]]},
     "not pairs of numbers"),
    ({"image_id": 1, "category_id": 1, "segmentation": {"size": [9, 9], "counts": [81]}},
     "not of a picture of 64x48"),
    ({"image_id": 1, "category_id": 1, "segmentation": {"size": [48, 64], "counts": "~~"}},
     "damaged"),
    ({"image_id": 1, "category_id": [1], "segmentation": "x"}, "a category that it does not list"),
]


@pytest.mark.parametrize("annotation, sentence", BAD_COCO)
def test_broken_coco_annotations_are_said(annotation, sentence, tmp_path):
    coco_file(tmp_path / "source", [annotation])
    output = import_masks("coco", tmp_path / "source", tmp_path / "out", code=2)
    assert sentence in output


def test_a_polygon_of_two_points_has_no_area_and_a_lost_region_no_picture(tmp_path):
    square = [0, 0, 20, 0, 20, 20, 0, 20]
    whole = {"image_id": 1, "category_id": 1, "segmentation": [square, [30, 30, 40, 40], []]}
    coco_file(tmp_path / "good", [whole])
    import_masks("coco", tmp_path / "good", tmp_path / "out")
    labels = list((tmp_path / "out/labels").iterdir())
    assert len(labels) == 1 and (np.asarray(Image.open(labels[0])) == 1).sum() >= 400

    lost = {"image_id": 1, "category_id": 1, "segmentation": [[30, 30, 40, 40]]}
    coco_file(tmp_path / "bad", [whole, lost])
    output = import_masks("coco", tmp_path / "bad", tmp_path / "none", code=2)
    assert "none of its polygons has the 3 points" in output and "no frame could be taken" in output


@pytest.mark.parametrize("shapes, sentence", [
    ("<box label='x' xtl='1'/>", "it needs the numbers xtl, ytl, xbr, ybr"),
    ("<polygon label='x' points='1,2;3'/>", "not pairs of numbers"),
    ("<polygon points='1,2;3,4;5,6'/>", "a shape without a label"),
    ("<mask label='x' rle='9' left='0' top='0' width='9e5' height='9e5'/>", "its box is empty"),
    ("<", "not XML that can be read"),
    ("</image><track/><image name='a.jpg'>", "CVAT for video"),
])
def test_broken_cvat_files_are_said(shapes, sentence, tmp_path):
    cvat_file(tmp_path / "source", shapes)
    output = import_masks("cvat", tmp_path / "source", tmp_path / "out", code=2)
    assert sentence in output


def test_entities_of_xml_are_not_expanded(tmp_path):
    write_photos(tmp_path / "source", ("a.jpg",))
    (tmp_path / "source" / "a.xml").write_text(
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotations>&x;</annotations>')
    output = import_masks("cvat", tmp_path / "source", tmp_path / "out", code=2)
    assert "not XML that can be read" in output


@pytest.mark.parametrize("args, sentence", [
    (["coco", "{tmp}/no", "{tmp}/o"], "there is no such folder"),
    (["coco", "{source}", "{tmp}/o"], "no COCO annotations"),
    (["cvat", "{source}", "{tmp}/o"], "no CVAT annotations"),
    (["voc", "{source}", "{tmp}/o"], "no masks"),
    (["labelme", "{source}", "{source}/deep"], "choose a folder outside"),
    (["labelme", "{source}", "{tmp}"], "is not empty"),
    (["labelme", "{source}", "{source}/a.json"], "it is no folder"),
    (["labelme", "{source}", "{tmp}/o", "--rest", "sky"], "--rest sky: it is none of the classes"),
    (["labelme", "{source}", "{tmp}/o", "--unknown-void"], "--unknown-void goes with voc"),
    (["coco", "{source}", "{tmp}/o", "--line-width", "3"], "--line-width goes with"),
    (["voc", "{source}", "{tmp}/o", "--keep-empty"], "--keep-empty goes with"),
    (["labelme", "{source}", "{tmp}/o", "--classes", "/no/file"], "/no/file"),
    (["labelme", "{source}", "{tmp}/o", "--classes", "{source}/a.json"], "it must name classes"),
    (["labelme", "{source}"], "required: DIR"),
    (["paint", "{source}", "{tmp}/o"], "invalid choice"),
])
def test_mistakes_are_a_sentence_and_exit_code_2(args, sentence, tmp_path):
    WRITERS["labelme"](tmp_path / "source")
    args = [arg.format(tmp=tmp_path, source=tmp_path / "source") for arg in args]
    assert sentence in import_masks(*args, code=2)
