"""How good is a checkpoint, on which classes, and what does it look like.

    python eval.py runs/teacher/best.pth runs/student/best.pth --data camvid:DIR --split test
    python eval.py student.pth --data toy --json scores.json --overlay pictures/
    python eval.py student.pth --images photos/ --out segmented/           # your own photos: id maps and overlays

The scores come from one confusion matrix over all labelled pixels of the split, at the labels' own resolution: the logits
are resized to it (bilinear), then comes the argmax. --quarter scores as the EffiSeg paper's code does, at the logits' size
against shrunk labels; it is kinder, mostly to thin things, and no other paper reports it. The output says which was used.

References
  Everingham et al., The PASCAL VOC Challenge, 2010: IoU = TP / (TP + FP + FN) over the whole set, then the mean over classes
"""

import argparse
import ctypes
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import (IGNORE, IMAGE_SUFFIXES, SPLITS, DatasetError, colours, grid, legend, open_dataset, overlay,
                  read_picture)
from model import SMALLEST, CheckpointError, load_checkpoint


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
        return model(image[None].to(next(model.parameters()).device).float() / 255)


def class_map(logits, size):
    """Logits (1, C, h, w) -> the most likely class at `size` (H, W), int64 (H, W): resized first, argmax second."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)[0]


def evaluate(model, dataset, size=None, quarter=False, progress=None):
    """Confusion matrix (C, C) int64 of `model` over `dataset`; the model is put in eval mode and left as it was.

    size: (H, W) that images are resized to for the network, None for their own. quarter: score at the logits' size, against
    labels shrunk to it (nearest). progress(done, all) is called after each frame. Raises NotFinite for NaN logits: their
    argmax is class 0, which would pass for an answer.
    """
    was_training = model.training
    model.eval()
    confusion = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64)
    for i in range(len(dataset)):
        image, label = dataset[i]
        logits = predict(model, image, size).float()                                # (1, C, h/4, w/4)
        if not logits.isfinite().all():
            raise NotFinite(f"the network's output on frame {i} is not finite: its weights are broken")
        if quarter:
            small = Image.fromarray(label.numpy()).resize(tuple(logits.shape[:1:-1]), Image.Resampling.NEAREST)
            label = torch.from_numpy(np.array(small))                               # (h/4, w/4)
        confusion += confusion_matrix(class_map(logits, label.shape).cpu(), label, model.num_classes)
        if progress:
            progress(i + 1, len(dataset))
    model.train(was_training)
    return confusion


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


def draw_comparison(path, models, names, dataset, indices):
    """Save frames, truth and predictions of `models` side by side, with the classes' colours below."""
    rows = []
    for i in indices:
        image, label = dataset[i]
        picture = image.permute(1, 2, 0).numpy()
        maps = [label] + [class_map(predict(model, image, model.input_size), label.shape).cpu() for model in models]
        rows.append([picture] + [overlay(picture, ids, dataset.palette) for ids in maps])
    sheet = grid(rows, ("frame", "truth", *names))
    below = Image.fromarray(legend(dataset.classes, dataset.palette, sheet.width))
    whole = Image.new("RGB", (sheet.width, sheet.height + below.height + 4), "white")
    whole.paste(sheet)
    whole.paste(below, (0, sheet.height + 4))
    whole.save(path)


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
        confusion = evaluate(model, dataset, model.input_size, args.quarter, show_progress(path))
        results.append(scores(confusion) | {"confusion": confusion.tolist()})
    fold = "" if args.fold is None else f", fold {args.fold} of {args.folds}"
    resolution = "a quarter of the input, as the paper's code (not comparable with full resolution)" if args.quarter \
        else "the labels' full resolution"
    print(f"\n{dataset.name} {args.split}{fold}, {len(dataset)} frames, scored at {resolution}")
    for path, model in models.items():
        print(f"  {path}: input {'as it is' if model.input_size is None else '{}x{} (HxW)'.format(*model.input_size)}")
    print(table(list(models), results, dataset.classes))
    if args.json:
        content = dict(data=args.data, split=args.split, fold=args.fold, folds=args.folds, frames=len(dataset), classes=dataset.classes,
                       resolution="quarter" if args.quarter else "full",
                       checkpoints=[dict(path=path, variant=model.variant, input_size=model.input_size, **no_nan(result))
                                    for (path, model), result in zip(models.items(), results)])
        Path(args.json).write_text(json.dumps(content, indent=1))
    if args.overlay:
        folder = make_folder(args.overlay)
        for i, stem in enumerate(dataset.stems):
            draw_comparison(folder / f"{stem}.png", list(models.values()), list(models), dataset, [i])
            show_progress(args.overlay)(i + 1, len(dataset))
        print(f"{len(dataset)} pictures in {folder}")


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


def run_images(args, model):
    """Segment photos: OUT/NAME.png holds the class ids, OUT/NAME_overlay.png is to look at. Returns what went wrong."""
    paths = []
    for given in map(Path, args.images):
        found = sorted(p for p in given.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if given.is_dir() else [given]
        if not found:
            raise UsageError(f"{given}: no .png or .jpg in it")
        paths += found
    names = [name for path in paths for name in (path.stem, f"{path.stem}_overlay")]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise UsageError(f"two photos would both be written to {doubles[0]}.png: give them different names")
    folder = make_folder(args.out)
    if any(path.resolve().parent == folder.resolve() for path in paths):
        raise UsageError(f"--out {args.out} is where the photos are: choose another folder, so that none is overwritten")
    palette, problems = model.palette or colours(model.num_classes), []
    for i, path in enumerate(paths):
        try:
            image = read_photo(path)
            ids = class_map(predict(model, torch.from_numpy(image).permute(2, 0, 1), model.input_size), image.shape[:2]).cpu()
            Image.fromarray(ids.numpy().astype(np.uint8)).save(folder / f"{path.stem}.png")
            Image.fromarray(overlay(image, ids, palette)).save(folder / f"{path.stem}_overlay.png")
        except DatasetError as error:
            problems.append(str(error))                           # the other photos do not wait for this one
        show_progress("photos")(i + 1, len(paths))
    print(f"{len(paths) - len(problems)} of {len(paths)} photos segmented: class ids in {folder}/NAME.png, overlays in {folder}/NAME_overlay.png")
    return problems


def read_photo(path):
    """A photo as a person sees it (the camera's rotation applied), uint8 (H, W, 3). Raises DatasetError."""
    image = read_picture(path, upright=True)
    if min(image.shape[:2]) < SMALLEST:
        raise DatasetError(f"{path}: {image.shape[1]}x{image.shape[0]} pixels, the network needs {SMALLEST}x{SMALLEST} at least")
    return image


def build_parser():
    parser = argparse.ArgumentParser(description="Score checkpoints side by side, or segment photos.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="ours, or a Hugging Face .bin / .safetensors")
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
    parser.add_argument("--images", nargs="+", metavar="PATH", help="segment these photos or folders of photos instead")
    parser.add_argument("--out", metavar="DIR", help="where --images writes")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    if bool(args.images) != bool(args.out):
        parser.error("--images and --out go together")
    if args.images and len(args.checkpoints) > 1:
        parser.error("--images takes one checkpoint")
    if args.size and args.size != [0, 0] and min(args.size) < SMALLEST:
        parser.error(f"--size must be at least {SMALLEST} {SMALLEST}, or 0 0")
    keep_freed_memory()
    try:
        device = pick_device(args.device)
        models = {path: load_checkpoint(path).fold().to(device) for path in args.checkpoints}
        for model in models.values():
            if args.size:
                model.input_size = None if args.size == [0, 0] else tuple(args.size)
        problems = run_images(args, models[args.checkpoints[0]]) if args.images else run_scores(args, models) or []
    except (*MISTAKES, NotFinite) as error:
        problems = [str(error)]
    except OSError as error:
        problems = [f"{error.filename or 'cannot write'}: {error.strerror or error}"]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(2 if problems else 0)


if __name__ == "__main__":
    main()
