"""A trained network as a file for a device, for transformers, or as a checkpoint to send around.

    python -m extras.export student.pth student.onnx            # onnx, onnxscript and onnxruntime
    python -m extras.export student.pth student.onnx --size 512 1024
    python -m extras.export student.pth student.onnx --int8 --data camvid:DIR
    python -m extras.export student.pth student.pt2 --logits    # torch alone
    python -m extras.export student.pth small.pth --half        # our checkpoint, in 16 bits
    python -m extras.export student.pth my-segformer            # a Hugging Face folder

.onnx and .pt2 run without this project; torch.export.load("student.pt2").module() opens the latter.
They hold the folded network with its normalisation: input `images`, float RGB (B, 3, H, W) in
[0, 1], any batch and any size from 64 pixels, or with --size that size only, which runtimes do
better with; output `classes`, uint8 (B, H, W), or with --logits `logits`, (B, C, ceil(H/4),
ceil(W/4)).

A network is as good as it was scored only at the size that it was trained at. The file does not
resize; that size is in it as `input_size`, beside the names of the classes and their colours (ONNX:
metadata, each value as JSON; .pt2: the extra file effiseg.json).

Each file is run against the model on random images, its classes and its logits, and is not kept if
it disagrees. What is behind it: extras/exported_model.py, onnx_graph.py, int8.py, hugging_face.py.

.pth is this project's own checkpoint, whatever format the given one had, without a run's state.
"""

import argparse
from pathlib import Path

from extras.cli import UsageError, number, run_command
from extras.exported_model import SMALLEST_EXPORTED, export, kind_of, output_of
from extras.hugging_face import write_folder
from extras.outputs import refuse_same_file, temporary_folder
from extras.provenance import refuse_prompts
from model import load_checkpoint, save_checkpoint

MAX_DROP = 1.0                                                    # points of mIoU


def mebibytes(path):
    return f"{Path(path).stat().st_size / 2 ** 20:.1f} MiB"


def describe_input(size):
    """What an exported file takes, in words."""
    if size is not None:
        height, width = size
        return f"images (1, 3, {height}, {width}) in [0, 1]"
    return "images (B, 3, H, W) in [0, 1]"


def describe_resizing(model, size):
    """What the user has to do to his frames, in a line; "" where the checkpoint does not tell."""
    if model.input_size is None:
        return ""
    height, width = model.input_size
    if size is not None and tuple(size) != (height, width):
        return (f"\nbeware: it takes {size[0]}x{size[1]}, and was trained at {height}x{width}: "
                "score it at that size before you use it (eval.py --size)")
    return (f"\nit was trained at {height}x{width}: resize frames to that first (bilinear), "
            "and its output to the frame's size after (input_size in the file)")


def export_program(model, args):
    """TARGET.onnx or .pt2: write it and say how well it agrees."""
    agreement = export(model, args.target, args.logits, args.size)
    output = output_of(args.logits)
    print(f"{args.target}: {mebibytes(args.target)}, {describe_input(args.size)} -> "
          f"{output}; {agreement}{describe_resizing(model, args.size)}")


def export_int8(model, args):
    """TARGET.onnx in 8 bits: write it and say what that costs."""
    from extras.int8 import write_int8

    size = args.size or model.input_size
    if size is None:
        raise UsageError(f"{args.checkpoint} does not say what size it was trained at, and a file "
                         "in int8 is of one size: add --size H W")
    with temporary_folder() as folder:
        exported = folder / "fp32.onnx"
        export(model, exported, args.logits, size)
        report = write_int8(model, exported, args.target, size, args.data, args.max_drop)
    output = output_of(args.logits)
    before = f"{report.bytes_fp32 / 2 ** 20:.1f} MiB"
    print(f"{args.target}: int8, {mebibytes(args.target)} ({before} in fp32), "
          f"{describe_input(size)} -> {output}; mIoU on the {report.frames} val frames "
          f"{100 * report.miou:.2f} %, in fp32 {100 * report.miou_fp32:.2f} %"
          f"{describe_resizing(model, size)}")


def name_of_data(spec):
    """"camvid:/home/me/CamVid" -> "camvid:CamVid": a file to send around tells no one's folders.

    A path that starts in the folder of the command is kept: there such data may lie elsewhere too.
    """
    kind, colon, folder = spec.partition(":")
    if not Path(folder).is_absolute():
        return spec
    return kind + colon + Path(folder).name


def export_checkpoint(model, args):
    """TARGET.pth: write it and say how large it is, beside the file it came from."""
    data = (model.trained_on or {}).get("data")
    if data is not None:
        model.trained_on = model.trained_on | {"data": name_of_data(data)}
    save_checkpoint(model, args.target, half=args.half)
    before = ""
    if Path(args.checkpoint).is_file():                           # Hugging Face's is a folder
        before = f" ({mebibytes(args.checkpoint)} as given)"
    precision = "fp16" if args.half else "fp32"
    print(f"{args.target}: weights in {precision}, {mebibytes(args.target)}{before}")


def export_folder(model, args):
    """A Hugging Face folder: write it and say how well it agrees."""
    report = write_folder(model, args.target)
    size = report["bytes"] / 2 ** 20
    print(f"{args.target}: a Hugging Face folder, {size:.1f} MiB, for transformers' "
          f"SegformerForSemanticSegmentation; read again, the logits of random images differ by "
          f"{report['difference']:.1e} (its LayerNorms have eps 1e-5)")


# ---------------------------------------------------------------- the command

def build_parser():
    parser = argparse.ArgumentParser(
        prog="python -m extras.export",
        description="Write a network for another runtime or transformers, or as a checkpoint.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="ours, Hugging Face's (file or folder), NVlabs' or TransKD's")
    parser.add_argument("target", metavar="TARGET",
                        help="what to write, by its suffix: .onnx, .pt2 or .pth (our checkpoint); "
                             "without a suffix a Hugging Face folder")
    parser.add_argument("--size", type=number(int, SMALLEST_EXPORTED), nargs=2, metavar=("H", "W"),
                        help=".onnx and .pt2: this size only, one image at a time, which runtimes "
                             "do better with (default: any size and batch)")
    parser.add_argument("--logits", action="store_true",
                        help=".onnx and .pt2: the output is the logits at a quarter of the input "
                             "(default: classes at the input's size)")
    parser.add_argument("--half", action="store_true",
                        help=".pth: weights in fp16, half the size, to send around (default: fp32)")
    parser.add_argument("--int8", action="store_true",
                        help=".onnx: in 8 bits, of the size --size (default: that of training)")
    parser.add_argument("--data", metavar="SPEC",
                        help="--int8: calibrate on its train frames, score on its val frames: "
                             "toy, camvid:DIR, cityscapes:DIR or folder:DIR")
    parser.add_argument("--max-drop", type=number(float, 0), metavar="POINTS",
                        help="--int8: write no file that loses more mIoU than this "
                             f"(default {MAX_DROP:g})")
    return parser


def kind_of_target(target):
    """-> "checkpoint", "folder" or "program" """
    path = Path(target)
    if path.suffix.lower() == ".pth":
        return "checkpoint"
    if path.is_dir() or not path.suffix or target.endswith("/"):
        return "folder"
    return "program"


def check_flags(parser, args, kind):
    """What the flags cannot tell one by one."""
    if args.half and kind != "checkpoint":
        parser.error(f"--half is for a checkpoint: {args.target} does not end in .pth")
    if args.logits and kind != "program":
        parser.error("--logits is for .onnx and .pt2")
    if args.size and kind != "program":
        parser.error("--size is for .onnx and .pt2: a checkpoint takes any size")
    if args.int8 and not args.target.lower().endswith(".onnx"):
        parser.error(f"--int8 is for .onnx: {args.target} does not end so")
    if args.int8 and not args.data:
        parser.error("--int8 needs frames to calibrate and score on: add --data SPEC")
    if args.data and not args.int8:
        parser.error("--data goes with --int8")
    if args.max_drop is not None and not args.int8:
        parser.error("--max-drop goes with --int8")


def main():
    parser = build_parser()
    args = parser.parse_args()
    kind = kind_of_target(args.target)
    check_flags(parser, args, kind)
    if args.max_drop is None:
        args.max_drop = MAX_DROP
    if args.size is not None:
        args.size = tuple(args.size)
    if kind == "program":
        kind_of(args.target)                                      # its error comes before loading
    refuse_prompts(args.checkpoint, f"give the prompts that are to be its classes, python -m "
                                    f"extras.prompt export {args.checkpoint} {args.target} "
                                    f"--prompts \"car, person\"")
    refuse_same_file(args.checkpoint, args.target)
    model = load_checkpoint(args.checkpoint)
    if model.folded and (kind == "folder" or args.int8):
        raise UsageError(f"{args.checkpoint} is packed: export the one that it was made of")
    if kind == "checkpoint":
        export_checkpoint(model, args)
    elif kind == "folder":
        export_folder(model, args)
    elif args.int8:
        export_int8(model, args)
    else:
        export_program(model, args)


if __name__ == "__main__":
    run_command(main)
