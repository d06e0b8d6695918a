"""How good is a checkpoint, on which classes, and what does it look like.

    python eval.py runs/teacher/best.pth runs/student/best.pth --data camvid:DIR --split test
    python eval.py student.pth --data toy --json scores.json --overlay pictures/
    python eval.py student.pth --images photos/ --out segmented/           # your own photos: id maps and overlays
    python eval.py student.pth --images huge.jpg --out segmented/ --window 1024 1024
    python eval.py student.pth --data camvid:DIR --amp bf16                # in 16 bits, and how many pixels keep their class
    python eval.py student.pth --export student.onnx                       # for your device (see export.py); --half small.pth
    python eval.py runs/a/best.pth runs/b/best.pth --plot figures/         # the paper's figures 4-6 (see plot.py)

The scores come from one confusion matrix over all labelled pixels of the split, at the labels' own resolution: the logits
are resized to it (bilinear), then comes the argmax. --quarter scores as the EffiSeg paper's code does, at the logits' size
against shrunk labels; it is kinder, mostly to thin things, and no other paper reports it. The output says which was used.

References
  Everingham et al., The PASCAL VOC Challenge, 2010: IoU = TP / (TP + FP + FN) over the whole set, then the mean over classes
"""

import argparse
import collections
import ctypes
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import (CITYSCAPES, IGNORE, SPLITS, DatasetError, colours, grid, legend, open_dataset, overlay, read_lines,
                  read_picture)
from model import SMALLEST, CheckpointError, load_checkpoint, save_checkpoint

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class UsageError(ValueError):
    """The command cannot do what it was asked; the message is one sentence."""


class NotFinite(ArithmeticError):
    """A loss or an output became NaN or infinite; the message says where."""


MISTAKES = (UsageError, DatasetError, CheckpointError)            # what a user can get wrong: a sentence and exit code 2


# ---------------------------------------------------------------- scores

def confusion_matrix(predictions, labels, num_classes):
    """Integer tensors of one shape, labels with IGNORE -> (C, C) int64; row = truth, column = prediction."""
    valid = labels != IGNORE
    pairs = labels[valid].long() * num_classes + predictions[valid].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def scores(confusion):
    """(C, C) -> {"miou", "macc", "aacc", "iou": [C], "acc": [C]}, fractions.

    A class with neither truth nor prediction is nan and left out of miou; one without truth has no accuracy (nan).
    """
    confusion = torch.as_tensor(confusion).cpu().double()
    hit, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)    # (C,) each
    iou, acc = hit / (truth + predicted - hit), hit / truth                         # 0 / 0 = nan
    return {"miou": iou.nanmean().item(), "macc": acc.nanmean().item(), "aacc": (hit.sum() / truth.sum()).item(),
            "iou": iou.tolist(), "acc": acc.tolist()}


def predict(model, image, size=None):
    """uint8 image (3, H, W) -> logits (1, C, h/4, w/4) of it resized to `size` (h, w), or as it is for None."""
    if size is not None and tuple(image.shape[1:]) != tuple(size):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    if min(image.shape[1:]) < SMALLEST:
        raise UsageError(f"a frame of {image.shape[2]}x{image.shape[1]} pixels: the network needs {SMALLEST}x{SMALLEST} at least")
    with torch.inference_mode():
        logits = model(image[None].to(next(model.parameters()).device).float() / 255).float()
    if not logits.isfinite().all():                               # the argmax of NaN is class 0, which would pass for an answer
        raise NotFinite("the network's output is not finite: its weights are broken")
    return logits


def class_scores(model, image, size=None, scales=(1.0,), flip=False):
    """uint8 image (3, H, W) -> (1, C, H, W): its logits, or with more views of it the mean of their softmax.

    size: (H, W) that the image is resized to for the network, None for its own; scales: factors on that; flip: mirrored too.
    """
    H, W = image.shape[1:]
    views = [(scale, mirrored) for scale in scales for mirrored in (False, True)[:1 + flip]]
    total = 0
    for scale, mirrored in views:
        scaled = size if scale == 1 else [max(SMALLEST, round(n * scale)) for n in size or (H, W)]
        logits = predict(model, image.flip(2) if mirrored else image, scaled)                       # (1, C, h/4, w/4)
        logits = F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False)           # (1, C, H, W)
        logits = logits.flip(3) if mirrored else logits
        total = total + (logits.softmax(1) / len(views) if len(views) > 1 else logits)
    return total


def segment(model, image, size=None, window=None, stride=None, **views):
    """uint8 image (3, H, W) -> its classes (H, W). `views`: scales and flip, as class_scores has them.

    window (h, w): the network sees windows of the image at its own size, `stride` (dy, dx) apart (default: three quarters of
    the window), and scores are added where they overlap. Only one row of windows is in memory at a time.
    """
    if window is None:
        return class_scores(model, image, size, **views).argmax(1)[0].cpu()
    H, W = image.shape[1:]
    h, w = min(window[0], H), min(window[1], W)
    dy, dx = stride or (max(1, 3 * h // 4), max(1, 3 * w // 4))
    tops, lefts = ([*range(0, whole - part, step), whole - part] for whole, part, step in ((H, h, dy), (W, w, dx)))
    classes, band = torch.empty(H, W, dtype=torch.uint8), torch.zeros(model.num_classes, h, W)
    for top, following in zip(tops, [*tops[1:], H]):
        for left in lefts:
            band[:, :, left:left + w] += class_scores(model, image[:, top:top + h, left:left + w], None, **views)[0].cpu()
        done = following - top                                    # no later window reaches these rows
        classes[top:following] = band[:, :done].argmax(0)
        band = torch.cat([band[:, done:], torch.zeros(model.num_classes, done, W)], 1)
    return classes


def evaluate(model, dataset, size=None, quarter=False, progress=None, **how):
    """Confusion matrix (C, C) int64 of `model` over `dataset`; the model is put in eval mode and left as it was.

    size: (H, W) that images are resized to for the network, None for their own. quarter: score at the logits' size, against
    labels shrunk to it (nearest). progress(done, all) is called after each frame. how: window, stride, scales, flip of
    `segment`. Raises NotFinite for NaN logits.
    """
    was_training = model.training
    model.eval()
    confusion = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64)
    for i in range(len(dataset)):
        image, label = dataset[i]
        if quarter:
            logits = predict(model, image, size)                                    # (1, C, h/4, w/4)
            small = Image.fromarray(label.numpy()).resize(tuple(logits.shape[:1:-1]), Image.Resampling.NEAREST)
            label, classes = torch.from_numpy(np.array(small)), logits.argmax(1)[0].cpu()           # (h/4, w/4) both
        else:
            classes = segment(model, image, size, **how)                            # (H, W)
        confusion += confusion_matrix(classes, label, model.num_classes)
        if progress:
            progress(i + 1, len(dataset))
    model.train(was_training)
    return confusion


def same_class(model, dataset, size=None, **how):
    """Share of the dataset's pixels, void ones too, that have one class in fp32 and under the autocast that this runs in."""
    same, pixels, device = 0, 0, next(model.parameters()).device
    for i in range(len(dataset)):
        image, label = dataset[i]
        half = segment(model, image, size, **how)                                   # (H, W)
        with torch.autocast(device.type, enabled=False):
            same += (half == segment(model, image, size, **how)).sum().item()
        pixels += label.numel()
    return same / pixels


# ---------------------------------------------------------------- what is shown

def percent(value, width=8, sign=""):
    return f"{'-':>{width}}" if math.isnan(value) else f"{100 * value:{sign}{width}.2f}"


def table(names, results, classes):
    """Text: a row a class and the three means, a column a network, and the difference to the first."""
    names = [name if len(name) <= 24 else "..." + name[-21:] for name in names]
    widths = [max(8, len(name)) for name in names]
    rows = [(name, [result["iou"][c] for result in results]) for c, name in enumerate(classes)]
    rows += [(label, [result[key] for result in results]) for label, key in (("mIoU", "miou"), ("mAcc", "macc"), ("aAcc", "aacc"))]
    head = f"{'IoU, %':<16}" + "".join(f"  {name:>{width}}" + (f"{'diff':>8}" if i else "")
                                       for i, (name, width) in enumerate(zip(names, widths)))
    lines = [head, "-" * len(head)]
    for label, values in rows:
        if label == "mIoU":
            lines.append("-" * len(head))
        lines.append(f"{label:<16}" + "".join(f"  {percent(value, width)}" + (percent(value - values[0], 8, "+") if i else "")
                                              for i, (value, width) in enumerate(zip(values, widths))))
    return "\n".join(lines)


def draw_comparison(models, names, dataset, indices, **how):
    """-> PIL picture: frames, truth and predictions of `models` side by side, the classes' colours below. how: see `segment`."""
    rows = []
    for i in indices:
        image, label = dataset[i]
        picture = image.permute(1, 2, 0).numpy()
        maps = [label] + [segment(model, image, model.input_size, **how) for model in models]
        rows.append([picture] + [overlay(picture, ids, dataset.palette) for ids in maps])
    sheet = grid(rows, ("frame", "truth", *names))
    below = Image.fromarray(legend(dataset.classes, dataset.palette, sheet.width))
    whole = Image.new("RGB", (sheet.width, sheet.height + below.height + 4), "white")
    whole.paste(sheet)
    whole.paste(below, (0, sheet.height + 4))
    return whole


def by_score(model, dataset, **how):
    """-> the numbers of the frames with a labelled pixel, from the lowest mIoU of a frame by itself to the highest."""
    alone = [scores(evaluate(model, torch.utils.data.Subset(dataset, [i]), model.input_size, **how))["miou"] for i in range(len(dataset))]
    return sorted((i for i, miou in enumerate(alone) if not math.isnan(miou)), key=alone.__getitem__)


def show_progress(what):
    """-> progress(done, all) that rewrites one line on a terminal, and is silent elsewhere."""
    def progress(done, all):
        if sys.stderr.isatty():
            print(f"\r{what} {done}/{all}", end="\n" if done == all else "", file=sys.stderr, flush=True)
    return progress


def pick_device(name):
    """"auto" -> CUDA, else Apple's MPS, else the CPU; any other name must be there. Raises UsageError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from None


def keep_freed_memory():
    """Tell glibc to keep large freed blocks: by default they go back to the kernel, and every step pays again for fetching
    zeroed pages, which is 40 % of a training step on a CPU. Changes no result; other C libraries are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)                                            # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)                                           # M_TRIM_THRESHOLD: never give the top of the heap back


def other_classes(names, others):
    """-> the pairs of names that stand at one place and differ in more than case."""
    return [(a, b) for a, b in zip(names, others) if a.lower() != b.lower()]


def check_classes(model, path, dataset):
    """Refuse a model whose classes are not the data's: its scores would be nonsense, or its lessons as a teacher."""
    if model.num_classes != len(dataset.classes):
        raise UsageError(f"{path} has {model.num_classes} classes, the data ({dataset.name}) has {len(dataset.classes)}")
    differ = other_classes(model.classes or (), dataset.classes)
    if differ:
        first = differ[0]
        raise UsageError(f"{path} was trained on other classes than {dataset.name}'s: its {first[0]!r} stands where the data has {first[1]!r}")


def warn_of_leak(model, path, args):
    """Say so when the folds that a model was trained on are not those it is scored or teaches on: it may have seen the frames."""
    trained, now = model.trained_on, {name: getattr(args, name) for name in ("data", "fold", "folds", "fold_by")}
    if not isinstance(trained, dict) or trained.get("data") != now["data"] or trained.get("fold") is None and now["fold"] is None:
        return
    if trained != now:
        print(f"warning: {path} was trained with fold {trained.get('fold')} of {trained.get('folds')} held out, and now it is fold {now['fold']} "
              f"of {now['folds']} (None: the official split): it has seen frames that it is scored on", file=sys.stderr)


# ---------------------------------------------------------------- commands

def run_scores(args, models):
    """The table of all checkpoints on one split; --json and --overlay."""
    dataset = open_dataset(args.data, args.split, args.fold, args.folds, fold_by=args.fold_by)
    for path, model in models.items():
        check_classes(model, path, dataset)
        warn_of_leak(model, path, args)
    results = []
    for path, model in models.items():
        confusion = evaluate(model, dataset, model.input_size, args.quarter, show_progress(path), **how(args))
        results.append(scores(confusion) | {"confusion": confusion.tolist()})
        if args.amp != "off":
            results[-1]["same_class"] = same_class(model, dataset, model.input_size, **how(args))
    fold = "" if args.fold is None else f", fold {args.fold} of {args.folds}"
    resolution = "a quarter of the input, as the paper's code (not comparable with full resolution)" if args.quarter \
        else "the labels' full resolution"
    print(f"\n{dataset.name} {args.split}{fold}, {len(dataset)} frames, scored at {resolution}{in_words(args)}")
    for (path, model), result in zip(models.items(), results):
        kept = f"; {100 * result['same_class']:.3f} % of the pixels have their class in fp32" if args.amp != "off" else ""
        print(f"  {path}: input {'as it is' if model.input_size is None or args.window else '{}x{} (HxW)'.format(*model.input_size)}{kept}")
    print(table(list(models), results, dataset.classes))
    if args.json:
        content = dict(data=args.data, split=args.split, fold=args.fold, folds=args.folds, frames=len(dataset), classes=dataset.classes,
                       resolution="quarter" if args.quarter else "full", amp=args.amp, **how(args),
                       checkpoints=[dict(path=path, variant=model.variant, input_size=model.input_size, **no_nan(result))
                                    for (path, model), result in zip(models.items(), results)])
        Path(args.json).write_text(json.dumps(content, indent=1))
    if args.overlay:
        folder = make_folder(args.overlay)
        for i, stem in enumerate(dataset.stems):
            draw_comparison(list(models.values()), list(models), dataset, [i], **how(args)).save(folder / f"{stem}.png")
            show_progress(args.overlay)(i + 1, len(dataset))
        print(f"{len(dataset)} pictures in {folder}")
    if args.strip:
        order = by_score(list(models.values())[-1], dataset, **how(args))
        if not order:
            raise UsageError(f"--strip: no frame of {args.data} {args.split} has a labelled pixel to be scored by")
        chosen = {"worst": order[0], "lower quartile": order[len(order) // 4], "median": order[len(order) // 2], "best": order[-1]}
        draw_comparison(list(models.values()), list(models), dataset, chosen.values(), **how(args)).save(args.strip)
        print(f"{args.strip}: by the last network's mIoU of a frame, " + ", ".join(f"the {name} ({dataset.stems[i]})" for name, i in chosen.items()))
    if args.plot:
        try:
            from plot import plot_all
        except ImportError:
            raise UsageError("--plot needs matplotlib: pip install matplotlib") from None
        for path in plot_all(list(models), results, dataset.classes, make_folder(args.plot)):
            print(path)


def how(args):
    """The flags that say how a frame is segmented, as `segment` takes them."""
    return dict(window=args.window, stride=args.stride, scales=tuple(args.scales), flip=args.flip)


def in_words(args):
    words = [f"windows of {args.window[0]}x{args.window[1]}"] if args.window else []
    words += [f"scales {', '.join(f'{scale:g}' for scale in args.scales)}"] if args.scales != [1.0] else []
    words += ["and mirrored"] * args.flip + [f"in {args.amp}"] * (args.amp != "off")
    return "".join(f", {word}" for word in words)


def no_nan(value):
    """nan -> None, also inside lists and dicts: JSON has no nan."""
    if isinstance(value, dict):
        return {key: no_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [no_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def make_folder(path):
    """-> Path of the folder, made if it is not there. Raises UsageError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path}: {error.strerror}") from None
    return Path(path)


def find_photos(given):
    """Files, folders (with all that is below them) and .txt lists -> [(path, name below --out without suffix)].

    A line of a list is a path, from the list's own folder. Other files in a folder are counted and said, not skipped silently.
    """
    photos = []
    for path in map(Path, given):
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
            found = [p for p in files if p.suffix.lower() in PHOTO_SUFFIXES]
            if not found:
                raise UsageError(f"{path}: no photo in it (looked for {' '.join(PHOTO_SUFFIXES)})")
            if len(found) < len(files):
                other = next(p for p in files if p not in found)
                print(f"note: {len(files) - len(found)} files in {path} are no photos by their names, first {other}", file=sys.stderr)
            photos += [(p, p.relative_to(path).with_suffix("")) for p in found]
        elif path.suffix.lower() == ".txt":
            lines = [path.parent / line for line in read_lines(path)]
            if not lines:
                raise UsageError(f"{path}: it names no photo")
            photos += [(p, Path(p.stem)) for p in lines]
        else:
            photos.append((path, Path(path.stem)))
    return photos


def run_images(args, model):
    """Segment photos: OUT/NAME.png holds the class ids, OUT/NAME_overlay.png is to look at. Returns what went wrong."""
    photos = find_photos(args.images)
    written = [str(name) + ending for _, name in photos for ending in ("", "_overlay")]
    doubles = sorted(name for name, count in collections.Counter(written).items() if count > 1)
    if doubles:
        raise UsageError(f"two photos would both be written to {doubles[0]}.png: give them different names")
    folder = make_folder(args.out)
    if any(path.resolve().is_relative_to(folder.resolve()) for path, _ in photos) or \
            any(Path(given).is_dir() and folder.resolve().is_relative_to(Path(given).resolve()) for given in args.images):
        raise UsageError(f"--out {args.out} is where the photos are: choose another folder, so that none is overwritten or taken for a photo")
    palette, ids, problems = model.palette or colours(model.num_classes), label_ids(model, args), []
    for i, (path, name) in enumerate(photos):
        try:
            image = read_photo(path)
            classes = segment(model, torch.from_numpy(image).permute(2, 0, 1), model.input_size, **how(args)).numpy()
            target = make_folder((folder / name).parent) / name.name
            Image.fromarray(ids[classes]).save(f"{target}.png")
            Image.fromarray(overlay(image, classes, palette)).save(f"{target}_overlay.png")
        except (DatasetError, UsageError) as error:
            problems.append(str(error))                           # the other photos do not wait for this one
        show_progress("photos")(i + 1, len(photos))
    print(f"{len(photos) - len(problems)} of {len(photos)} photos segmented{in_words(args)}: "
          f"{'Cityscapes label ids' if args.label_ids else 'class ids'} in {folder}/NAME.png, overlays in {folder}/NAME_overlay.png")
    return problems


def label_ids(model, args):
    """The table from classes to what is written: the classes, or with --label-ids Cityscapes' raw ids for its test server."""
    table = np.arange(256).astype(np.uint8)
    if args.label_ids:
        if model.num_classes != len(CITYSCAPES) or model.classes and other_classes(model.classes, list(CITYSCAPES)):
            raise UsageError(f"--label-ids is for Cityscapes' {len(CITYSCAPES)} classes: {args.checkpoints[0]} has others")
        table[:len(CITYSCAPES)] = [raw for raw, _, _ in CITYSCAPES.values()]
    return table


def run_export(args, model):
    """--export: one file for another runtime."""
    from export import ExportError, export
    try:
        report = export(model, args.export, args.logits)
    except ExportError as error:
        raise UsageError(str(error)) from None
    difference = f"largest difference {report['difference']:.1e}" if args.logits else f"{100 * report['difference']:.4f} % of the pixels differ"
    sizes = ", ".join("x".join(map(str, size)) for size in report["checked"])
    print(f"{args.export}: {report['bytes'] / 2 ** 20:.1f} MiB, images (B, 3, H, W) in [0, 1] -> {'logits' if args.logits else 'classes'}; run on random "
          f"images of {sizes} (BxHxW) against the model: {difference}")


def run_half(args, model):
    """--half: the checkpoint with weights of 16 bits, for distribution."""
    save_checkpoint(model, args.half, half=True)
    before, after = Path(args.checkpoints[0]), Path(args.half)
    size = f" ({before.stat().st_size / 2 ** 20:.1f} MiB as given)" if before.is_file() else ""
    print(f"{after}: weights in fp16, {after.stat().st_size / 2 ** 20:.1f} MiB{size}")


def read_photo(path):
    """A photo as a person sees it (the camera's rotation applied), uint8 (H, W, 3). Raises DatasetError."""
    image = read_picture(path, upright=True)
    if min(image.shape[:2]) < SMALLEST:
        raise DatasetError(f"{path}: {image.shape[1]}x{image.shape[0]} pixels, the network needs {SMALLEST}x{SMALLEST} at least")
    return image


def build_parser():
    parser = argparse.ArgumentParser(description="Score checkpoints side by side, or segment photos.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="ours, Hugging Face's (file or folder), NVlabs' or TransKD's")
    parser.add_argument("--data", default="toy", help="toy, camvid:DIR, cityscapes:DIR or folder:DIR (default: toy)")
    parser.add_argument("--split", default="val", choices=SPLITS)
    parser.add_argument("--fold", type=int, help="score this fold of --folds in place of the split; counts from 0")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--fold-by", choices=("drive", "block", "shuffle"), help="how folds are made; shuffle leaks (default: the data's own)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"),
                        help="resize images to this for the network; 0 0: as they are (default: what the checkpoint says)")
    parser.add_argument("--quarter", action="store_true", help="score at a quarter of the input, as the paper's code does")
    parser.add_argument("--json", metavar="FILE", help="write the scores and confusion matrices for machines")
    parser.add_argument("--overlay", metavar="DIR", help="draw frame, truth and predictions of every frame")
    parser.add_argument("--strip", metavar="FILE", help="draw the worst, the lower quartile's, the median and the best frame by the last checkpoint's mIoU")
    parser.add_argument("--plot", metavar="DIR", help="draw radar and confusion matrices, and the runs' losses and mIoU where their logs are")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="segment these photos, folders of photos or .txt lists of photos instead")
    parser.add_argument("--out", metavar="DIR", help="where --images writes")
    parser.add_argument("--label-ids", action="store_true", help="--images writes Cityscapes' raw label ids, as its test server wants them")
    parser.add_argument("--window", type=int, nargs=2, metavar=("H", "W"), help="slide a window over images at their own size: for large ones")
    parser.add_argument("--stride", type=int, nargs=2, metavar=("H", "W"), help="steps of the window (default: three quarters of it)")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="F", help="average over these scales of the image (default 1)")
    parser.add_argument("--flip", action="store_true", help="average over the image and its mirror image")
    parser.add_argument("--export", metavar="FILE", help="write the network for another runtime: .onnx or .pt2")
    parser.add_argument("--logits", action="store_true", help="--export makes the logits at a quarter the output, not the classes")
    parser.add_argument("--half", metavar="FILE", help="write the checkpoint with fp16 weights, half the size, for distribution")
    parser.add_argument("--amp", default="off", choices=("off", *HALF), help="run the network in 16 bits; scores then say how many pixels keep their class")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


def check_flags(parser, args):
    """What single flags cannot tell."""
    tasks = [name for name in ("images", "export", "half") if getattr(args, name)]
    if len(tasks) > 1:
        parser.error(f"--{tasks[0]} and --{tasks[1]} are two tasks: give one")
    if tasks and len(args.checkpoints) > 1:
        parser.error(f"--{tasks[0]} takes one checkpoint")
    if bool(args.images) != bool(args.out):
        parser.error("--images and --out go together")
    for flag, needs in (("label_ids", "images"), ("logits", "export"), ("stride", "window")):
        if getattr(args, flag) and not getattr(args, needs):
            parser.error(f"--{flag.replace('_', '-')} goes with --{needs}")
    unused = next((flag for flag in ("json", "overlay", "strip", "plot", "quarter", "fold") if tasks and getattr(args, flag) is not None and getattr(args, flag) is not False), None)
    if unused:
        parser.error(f"--{unused} is of the scores, and --{tasks[0]} makes none")
    if args.amp != "off" and (args.export or args.half):
        parser.error("--amp is of running the network, and --export and --half write it")
    if args.size and args.size != [0, 0] and min(args.size) < SMALLEST:
        parser.error(f"--size must be at least {SMALLEST} {SMALLEST}, or 0 0")
    if args.window and min(args.window) < SMALLEST:
        parser.error(f"--window must be at least {SMALLEST} {SMALLEST}")
    if args.stride and not all(1 <= step <= part for step, part in zip(args.stride, args.window)):
        parser.error("--stride must be at least 1 1 and at most the window, or pixels would be left out")
    if not all(0 < scale <= 16 for scale in args.scales):
        parser.error("--scales must be above 0 and at most 16")
    if args.window and args.size:
        parser.error("--window takes images at their own size: leave --size out")
    if args.quarter and (args.window or args.flip or args.scales != [1.0]):
        parser.error("--quarter is the paper's protocol, which has no windows, scales or flips")


def main():
    parser = build_parser()
    args = parser.parse_args()
    check_flags(parser, args)
    keep_freed_memory()
    problems = []
    try:
        device, first = pick_device(args.device), args.checkpoints[0]
        models = {path: load_checkpoint(path) for path in args.checkpoints}
        if args.half:
            run_half(args, models[first])
        elif args.export:
            run_export(args, models[first])
        else:
            models = {path: model.fold().to(device) for path, model in models.items()}
            for model in models.values():
                if args.size:
                    model.input_size = None if args.size == [0, 0] else tuple(args.size)
            with torch.autocast(device.type, HALF.get(args.amp), enabled=args.amp != "off"):
                problems = run_images(args, models[first]) if args.images else run_scores(args, models) or []
    except (*MISTAKES, NotFinite) as error:
        problems = [str(error)]
    except OSError as error:
        problems = [f"{error.filename or 'cannot write'}: {error.strerror or error}"]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(2 if problems else 0)


if __name__ == "__main__":
    main()
