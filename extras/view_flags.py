"""How an image is shown to the network: flags that every command which segments has.

    add_view_flags(parser)                 --size --window --stride --scales --flip --amp --device
    args = parser.parse_args()
    check_view_flags(parser, args)
    model = open_model(path, args.size, device)
    with autocast(device, args.amp):
        classes = segment(model, image, model.input_size, **segment_options(args))
"""

import torch

from data import IGNORE
from extras.cli import UsageError, number
from extras.machine import AMP_DTYPES
from extras.provenance import refuse_prompts
from model import SMALLEST, load_checkpoint


def add_view_flags(parser):
    """--size, --window, --stride, --scales, --flip, --amp and --device."""
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"),
                        help="resize images to this for the network; 0 0: as they are "
                             "(default: what the checkpoint says)")
    parser.add_argument("--window", type=number(int, SMALLEST), nargs=2, metavar=("H", "W"),
                        help="slide a window over images at their own size: for large ones "
                             "(default: the whole image at once)")
    parser.add_argument("--stride", type=number(int, 1), nargs=2, metavar=("H", "W"),
                        help="steps of the window (default: three quarters of it)")
    parser.add_argument("--scales", type=number(float, 0, 16, open_low=True), nargs="+",
                        default=[1.0], metavar="F",
                        help="average over these scales of the image (default: 1)")
    parser.add_argument("--flip", action="store_true",
                        help="average over the image and its mirror image (default: the image)")
    parser.add_argument("--amp", default="off", choices=("off", *AMP_DTYPES),
                        help="run the network in 16 bits; eval.py then says how many pixels keep "
                             "their class (default: off)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")


def check_view_flags(parser, args):
    """What the flags of `add_view_flags` cannot tell one by one."""
    if args.size and args.size != [0, 0] and min(args.size) < SMALLEST:
        parser.error(f"--size must be at least {SMALLEST} {SMALLEST}, or 0 0")
    if args.window and args.size:
        parser.error("--window takes images at their own size: leave --size out")
    if args.stride and not args.window:
        parser.error("--stride goes with --window")
    if args.stride and (args.stride[0] > args.window[0] or args.stride[1] > args.window[1]):
        parser.error("--stride must be at most the window, or pixels would be left out")


def open_model(path, size, device):
    """-> the folded model of a checkpoint; `size` (--size) replaces the input size it carries.

    Raises UsageError for more classes than labels of 8 bits can hold, and for a student of prompts.
    """
    refuse_prompts(path, f"score it with python -m extras.prompt compare {path}, "
                         f"ask it about photos with python -m extras.prompt predict {path}")
    model = load_checkpoint(path)
    if model.num_classes > IGNORE:
        raise UsageError(f"{path} has {model.num_classes} classes: the labels here have 8 bits, "
                         f"which hold {IGNORE}, and void")
    model = model.fold().to(device)
    if size is not None:
        model.input_size = None if tuple(size) == (0, 0) else tuple(size)
    return model


def autocast(device, amp):
    """The context in which a network runs as --amp says."""
    return torch.autocast(device.type, AMP_DTYPES.get(amp), enabled=amp != "off")


def segment_options(args):
    """The flags that say how an image is segmented, as `segment` takes them."""
    return {"window": args.window, "stride": args.stride, "scales": tuple(args.scales),
            "flip": args.flip}


def describe_protocol(args):
    """`segment_options` and --amp in words that end a sentence; "" for the defaults."""
    words = []
    if args.window:
        height, width = args.window
        words.append(f"windows of {height}x{width}")
    if args.scales != [1.0]:
        scales = [f"{scale:g}" for scale in args.scales]
        words.append("scales " + ", ".join(scales))
    if args.flip:
        words.append("and mirrored")
    if args.amp != "off":
        words.append(f"in {args.amp}")
    return "".join(f", {word}" for word in words)
