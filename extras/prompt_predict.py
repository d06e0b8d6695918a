"""What a trained student is used for: photos, files for other runtimes, fewer bits, stored answers.

    python -m extras.prompt predict STUDENT PHOTO... --prompts "car, person, tree" --out DIR
    python -m extras.prompt export STUDENT TARGET --prompts "car, road"     # .onnx, .pt2 or .pth
    python -m extras.prompt quantize STUDENT --bits 8|4|4+8 --out FILE
    python -m extras.prompt write-teacher TEACHER --data SPEC --out DIR

predict writes DIR/NAME_PROMPT.png, the mask (255: there), and DIR/NAME.png to look at. export folds
a fixed list of prompts into an ordinary network: .onnx and .pt2 have the mask logits (--logits) or
the class of each pixel among the prompts; .pth is a plain SegFormer of them, of the same classes.
"""

import argparse
import collections
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import SPLITS, DatasetError, distinct_colours, open_dataset, resize_pair
from extras.cli import UsageError, add_fold_flags, make_folder, show_progress
from extras.exported_model import export as export_file
from extras.machine import pick_device
from extras.outputs import refuse_same_file, save_picture
from extras.packed_layers import count_bits
from extras.pictures import grid
from extras.predict import check_out, find_items, read_photo
from extras.prompt_checkpoint import load_prompt, packed_prompt, save_packed_prompt
from extras.prompt_model import fixed_prompts, plain_segformer
from extras.prompt_pictures import paint
from extras.prompt_scores import probabilities
from extras.prompt_teacher_files import write_teacher_file
from extras.prompt_words import clean_prompt, file_words, plain
from extras.provenance import check_classes
from extras.quantize import MODES, check_keep
from model import SMALLEST, save_checkpoint


def parser_for(command, description):
    parser = argparse.ArgumentParser(prog=f"python -m extras.prompt {command}",
                                     description=description)
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="of python -m extras.prompt train")
    return parser


def split_prompts(text, model):
    """"car, person" -> ["car", "person"]. Raises UsageError for an empty one or one twice.

    Of a word that the student was not trained with it is said that only its spelling is known.
    """
    prompts = [clean_prompt(part, model.text.tokenizer) for part in text.split(",")]
    if len({plain(prompt) for prompt in prompts}) < len(prompts):
        raise UsageError(f"--prompts {text!r}: one of them stands there twice")
    known = {plain(prompt): prompt for prompt in model.prompts}
    for i, prompt in enumerate(prompts):
        if plain(prompt) in known:
            prompts[i] = known[plain(prompt)]                     # "Car" as the "car" of training
        else:
            print(f"note: {prompt!r} is not among the {len(known)} prompts that this student was "
                  f"trained with: it knows how the word is spelt, not what it means",
                  file=sys.stderr)
    return prompts


# ---------------------------------------------------------------- photos

def predict(argv):
    parser = parser_for("predict", "What a student finds in photos, prompt by prompt.")
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="photos, folders of photos or .txt lists of photos")
    parser.add_argument("--prompts", required=True, metavar="\"A, B\"",
                        help="what to look for, with commas between")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write the masks")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"),
                        help="resize photos to this for the network (default: as in training)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    if args.size and min(args.size) < SMALLEST:
        parser.error(f"--size must be at least {SMALLEST} {SMALLEST}")
    model = load_prompt(args.checkpoint).to(pick_device(args.device))
    if args.size:
        model.input_size = tuple(args.size)
    prompts = split_prompts(args.prompts, model)
    photos = find_photos(args.inputs)
    check_written(photos, prompts)
    check_out(args.out, args.inputs, photos)
    out = make_folder(args.out)
    with torch.no_grad():
        words = model.read(prompts)                               # once for all photos
    problems = []
    for photo in photos:
        try:
            predict_photo(model, photo, prompts, words, out)
        except DatasetError as error:
            problems.append(str(error))                           # the other photos go on
    print(f"{len(photos) - len(problems)} of {len(photos)} photos in {out}: "
          f"NAME_PROMPT.png is a mask, NAME.png is to look at")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


def find_photos(inputs):
    """Files, folders and lists -> what to segment. Raises UsageError for a clip."""
    photos = find_items(inputs)
    for photo in photos:
        if photo.is_clip:
            raise UsageError(f"{photo.path}: prompts are for photos, and this has several pictures")
    return photos


def mask_name(photo, prompt):
    """The file of a photo's mask, below --out."""
    return f"{photo.name}_{file_words(prompt)}.png"


def check_written(photos, prompts):
    """Refuse photos or prompts whose results would overwrite each other. Raises UsageError."""
    written = collections.Counter()
    for photo in photos:
        written.update([f"{photo.name}.png"])
        written.update(mask_name(photo, prompt) for prompt in prompts)
    doubles = [name for name, count in written.items() if count > 1]
    if doubles:
        raise UsageError(f"two results would both be written to {doubles[0]}: "
                         f"give the photos different names")


def predict_photo(model, photo, prompts, words, out):
    """Write a photo's masks and its picture, and say what is there."""
    image = read_photo(photo.path)                                # (H, W, 3)
    pixels = torch.from_numpy(image).permute(2, 0, 1)             # (3, H, W)
    mask, presence = probabilities(model, pixels, words, image.shape[:2])
    cells = [image]
    make_folder((out / photo.name).parent)
    for k, prompt in enumerate(prompts):
        found = (mask[k] > 0.5) & (presence[k] > 0.5)             # (H, W)
        white = 255 * found.numpy().astype(np.uint8)
        save_picture(Image.fromarray(white), out / mask_name(photo, prompt))
        cells.append(paint(image, found))
        share = found.float().mean().item()
        there = f"{share:.1%} of the pixels" if presence[k] > 0.5 else "not there"
        print(f"{photo.path}: {prompt}: {there} (presence {presence[k]:.2f})")
    save_picture(grid([cells], ["photo", *prompts]), out / f"{photo.name}.png")


# ---------------------------------------------------------------- files

def export(argv):
    parser = parser_for("export", "Fold a fixed list of prompts into an ordinary network.")
    parser.add_argument("target", metavar="TARGET", help="what to write: .onnx, .pt2 or .pth")
    parser.add_argument("--prompts", required=True, metavar="\"A, B\"",
                        help="its classes, with commas between")
    parser.add_argument("--logits", action="store_true",
                        help=".onnx and .pt2: the mask logits at a quarter of the input "
                             "(default: the class of each pixel)")
    args = parser.parse_args(argv)
    refuse_same_file(args.checkpoint, args.target)
    model = load_prompt(args.checkpoint)
    prompts = split_prompts(args.prompts, model)
    if len(prompts) < 2 and not args.logits:
        raise UsageError("--prompts: of one class every pixel is of that class: name two, or give "
                         "--logits, which tell how sure each pixel is")
    palette = distinct_colours(len(prompts))
    if Path(args.target).suffix.lower() == ".pth":
        if args.logits:
            parser.error("--logits is for .onnx and .pt2: a checkpoint has no output")
        if model.segformer.folded:
            raise UsageError(f"{args.checkpoint} is packed: export the one that it was made of")
        save_checkpoint(plain_segformer(model, prompts, palette), args.target)
        print(f"{args.target}: a SegFormer of {len(prompts)} classes; each pixel has the class "
              f"whose mask logit is the largest")
        return 0
    network = fixed_prompts(model, prompts, palette=palette)
    agreement = export_file(network, args.target, args.logits)
    megabytes = Path(args.target).stat().st_size / 1e6
    output = "mask logits" if args.logits else "classes"
    named = ", ".join(prompts)
    print(f"{args.target}: {megabytes:.2f} MB, images (B, 3, H, W) in [0, 1] -> "
          f"{output} of {named}; {agreement}")
    return 0


def quantize(argv):
    parser = parser_for("quantize", "A student with its weights in 8 or 4 bits.")
    parser.add_argument("--bits", required=True, choices=MODES,
                        help="of the weights; 4+8: and 8 for what goes into linear layers")
    parser.add_argument("--out", required=True, metavar="FILE", help="the checkpoint to write")
    parser.add_argument("--keep", nargs="+", default=[], metavar="NAME",
                        help="leave these layers, and all below these names, as they are "
                             "(the presence head always is)")
    args = parser.parse_args(argv)
    refuse_same_file(args.checkpoint, args.out)
    mode = MODES[args.bits]
    model = load_prompt(args.checkpoint)
    if model.segformer.folded:
        raise UsageError(f"{args.checkpoint} is packed already: "
                         f"give the checkpoint that it was made of")
    keep = full_names(model, args.keep)
    check_keep(model, keep)
    small, layer_bits = packed_prompt(model, mode, keep)
    save_packed_prompt(small, layer_bits, args.out, mode.activation_bits)
    bits, weights = count_bits(small)
    print(f"{args.out}: {os.path.getsize(args.out) / 1e6:.2f} MB, {bits / weights:.2f} bits for "
          f"each of {weights:,} weights; what it costs: python -m extras.prompt compare")
    return 0


def full_names(model, keep):
    """The layers of the SegFormer may be called as they are in a plain one."""
    of_segformer = dict(model.segformer.named_modules())
    names = []
    for name in keep:
        if name in of_segformer:
            name = f"segformer.{name}"
        names.append(name)
    return names


def write_teacher(argv):
    parser = parser_for("write-teacher", "Store what a teacher says about each frame.")
    parser.add_argument("--data", required=True, metavar="SPEC",
                        help="toy, camvid:DIR, cityscapes:DIR or folder:DIR")
    parser.add_argument("--split", default="train", choices=SPLITS, help="(default: train)")
    add_fold_flags(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where DIR/STEM.npz go")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    dataset = open_dataset(args.data, args.split, args.fold, args.folds, fold_by=args.fold_by)
    device = pick_device(args.device)
    teacher = load_prompt(args.checkpoint).to(device)
    check_classes(teacher, args.checkpoint, dataset)
    teacher.segformer = teacher.segformer.fold()
    folder = make_folder(args.out)
    progress = show_progress("stored")
    for i, stem in enumerate(dataset.stems):
        image, _ = dataset[i]
        answer = ask_whole_frame(teacher, image, device)
        write_teacher_file(folder / f"{stem}.npz", teacher.prompts,
                           answer.mask[0].cpu().numpy(), answer.presence[0].cpu().numpy())
        progress(i + 1, len(dataset))
    print(f"{len(dataset)} files in {folder}, {len(teacher.prompts)} prompts each: "
          f"python -m extras.prompt train --teacher-files {folder} --data {args.data}")
    return 0


@torch.no_grad()
def ask_whole_frame(teacher, image, device):
    """uint8 image (3, H, W) -> Answer about all of the teacher's prompts."""
    size = tuple(teacher.input_size or image.shape[1:])
    blank = torch.zeros(image.shape[1:], dtype=torch.uint8)
    image, _ = resize_pair(image, blank, size)
    return teacher.answer(image[None].to(device).float() / 255, teacher.prompts)

