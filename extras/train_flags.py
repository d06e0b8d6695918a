"""The flags of train.py: argparse, defaults, and what single flags cannot tell.

What the defaults are stands in train.py (DEFAULTS, DATASET_DEFAULTS), and so do the loss terms,
each with its flag. Here they become a command line, the same for a terminal and for train(**flags).
"""

import argparse
import sys

import torch

from extras.cli import FlagParser, UsageError, add_fold_flags, number
from extras.machine import AMP_DTYPES
from extras.same_run import absolute_paths
from extras.training_state import MOST_STEPS
from model import NORMS, SIZES, SMALLEST

POSITIVE_INTEGER = number(int, 1, MOST_STEPS)
POSITIVE = number(float, 0.0, open_low=True)
NOT_NEGATIVE = number(float, 0.0)
SHARE = number(float, 0.0, 1.0)
SIDE = number(int, SMALLEST)                                      # of an image, in pixels


# What every version stored, and no run goes on without.
NEEDED = ("student", "data", "iters", "batch_size", "accum", "crop", "scale_range", "lr",
          "weight_decay", "warmup", "grad_clip", "norm", "loss", "workers", "seed", "eval_every",
          "device")
NEEDED_BESIDE_A_TEACHER = ("lambda_kl", "lambda_fd", "lambda_pe")


class TrainFlags:
    """defaults: {flag: value}; dataset_defaults: {kind of data: the same}, which override those;
    distillation_terms: the Terms of train.py that have a flag.

    Another task's flags (extras/prompt_flags.py) are a subclass.
    """

    prog = "train.py"
    description = "Train a SegFormer, with or without a teacher."

    def __init__(self, defaults, dataset_defaults, distillation_terms):
        self.defaults = defaults
        self.dataset_defaults = dataset_defaults
        self.distillation_terms = distillation_terms

    def parse(self, argv):
        """-> (args: every flag, {name: value} of those that were given). Raises UsageError."""
        kind = self.data_kind(argv)
        given = vars(self.build_parser(kind).parse_args(argv))
        flags = self.all_flags() | self.defaults_for(kind) | given      # the later ones win
        self.check(argparse.Namespace(**flags), given)                  # paths as they were typed
        given = absolute_paths(given)
        args = argparse.Namespace(**(flags | given))

        if "epochs" in given:
            args.iters = None                                     # the data set's would overrule it
        for term in self.distillation_terms:
            if getattr(args, term.weight_name) is None:
                weight = term.default if args.teacher else 0.0
                setattr(args, term.weight_name, weight)
        if not args.resume:
            self.check_settled(args)
        if args.amp == "auto" and not args.resume:
            on_cuda = torch.cuda.is_available() and args.device.startswith(("auto", "cuda"))
            args.amp = "fp16" if on_cuda else "off"
        return args, given

    def check_stored(self, stored, path):
        """Raise UsageError where the flags in a last.pth are none that this command could have
        stored; what an older version lacks is no fault.
        """
        parser = self.build_parser(self.defaults["data"], argument_default=None)
        for action in parser._actions:
            value = stored.get(action.dest)
            if value is not None and not is_value_of(action, value):
                self.refuse_stored(action.dest, path)
        for name in self.needed_flags(stored):
            if stored.get(name) is None:
                self.refuse_stored(name, path)
        if stored["scale_range"][0] > stored["scale_range"][1]:
            self.refuse_stored("scale_range", path)

    def needed_flags(self, stored):
        """-> the flags without which a run with the others cannot go on."""
        needed = list(NEEDED)
        if stored.get("fold") is not None:
            needed.append("folds")
        if stored.get("loss") in ("dice-focal", "wce-dice"):
            needed.append("lambda_dice")
        if stored.get("teacher"):
            needed += NEEDED_BESIDE_A_TEACHER
            for term in self.distillation_terms:
                if stored.get(term.weight_name):
                    needed += [option.name for option in term.options]
        return needed

    @staticmethod
    def refuse_stored(name, path):
        flag = name.replace("_", "-")
        raise UsageError(f"{path} is damaged: its run's --{flag} is not one that can be")

    def data_kind(self, argv):
        """What --data says, looked at before the rest: "toy", "camvid", "cityscapes", "folder"."""
        parser = FlagParser(prog=self.prog, add_help=False)
        parser.add_argument("--data", default=self.defaults["data"])
        known, _ = parser.parse_known_args(argv)
        return known.data.split(":")[0]

    def defaults_for(self, kind):
        """The paper's defaults, and over them what suits this kind of data."""
        defaults = dict(self.defaults)
        for term in self.distillation_terms:
            for option in term.options:
                defaults[option.name] = option.default
        defaults.update(self.dataset_defaults.get(kind, {}))
        return defaults

    def all_flags(self):
        """{every flag's name: None}"""
        parser = self.build_parser(self.defaults["data"], argument_default=None)
        return vars(parser.parse_args([]))

    def switches(self):
        """-> the names of the flags that take no value"""
        parser = self.build_parser(self.defaults["data"])
        return {action.dest for action in parser._actions if action.nargs == 0}

    def check(self, args, given):
        """What single flags cannot tell. Raises UsageError."""
        for term in self.distillation_terms:
            if given.get(term.weight_name) and not args.teacher and not args.resume:
                raise UsageError(f"--lambda-{term.name} needs a --teacher")
        for name, value in given.items():
            if isinstance(value, str) and "\0" in value:
                raise UsageError(f"--{name} holds a zero byte, which no path can")
        if args.scale_range[0] > args.scale_range[1]:
            raise UsageError("--scale-range: LO is larger than HI")
        if given.get("iters") and given.get("epochs"):
            raise UsageError("--iters and --epochs say the same thing: give one")
        if given.get("with_val") and args.fold is not None:
            raise UsageError("--with-val is for the data's own splits, and --fold deals others")

    def check_settled(self, args):
        """What only the settled flags of a new run tell. Raises UsageError.

        Several teachers have no common features; with --loss none, what is left must reach every
        stage.
        """
        distils = any(getattr(args, term.weight_name) for term in self.distillation_terms)
        if args.labelled and args.teacher and not distils:
            raise UsageError("--labelled with a --teacher needs a loss by which that teaches, such "
                             "as --lambda-fd 1: else leave the teacher out")
        if args.second_teacher or args.flip_teacher:
            self.check_ensemble(args)
        if args.teacher_cache and not args.teacher:
            raise UsageError("--teacher-cache needs a --teacher")
        if args.teacher_cache and args.augment != "plain":
            raise UsageError("--teacher-cache keeps what the teacher says of each image, and with "
                             f"--augment {args.augment} none comes twice: add --augment plain, or "
                             "leave it out")
        if args.loss != "none":
            return
        for term in self.distillation_terms:
            reaches_all = term.teacher_reads in ("stages", "logits")
            if reaches_all and getattr(args, term.weight_name):
                return
        raise UsageError("--loss none leaves too little to learn from: it needs a --teacher, and a "
                         "loss on its stages or its logits, such as --lambda-fd 1")

    def check_ensemble(self, args):
        """Raise UsageError where --second-teacher or --flip-teacher has no logits to add to."""
        flag = "--second-teacher" if args.second_teacher else "--flip-teacher"
        if not args.teacher:
            raise UsageError(f"{flag} needs a --teacher")
        reads_logits = False
        for term in self.distillation_terms:
            weight = getattr(args, term.weight_name)
            if weight and term.teacher_reads != "logits":
                raise UsageError(f"{flag} has no features, which --lambda-{term.name} compares: "
                                 f"add --lambda-{term.name} 0")
            if weight and not term.takes_log_probabilities:
                raise UsageError(f"{flag} has the logarithms of probabilities for logits, of which "
                                 f"--lambda-{term.name} would be another loss: leave one out")
            reads_logits = reads_logits or bool(weight)
        if not reads_logits:
            raise UsageError(f"{flag} needs a loss on logits, such as --lambda-kl 1")

    def note_unused(self, args, given):
        """Say which of the given flags change nothing beside the others."""
        distils = any(getattr(args, term.weight_name) for term in self.distillation_terms)
        unused = {
            "size": args.augment == "plain",
            "scale_range": args.augment == "plain",
            "folds": args.fold is None,
            "fold_by": args.fold is None,
            "lambda_dice": args.loss in ("wce", "none"),
            "class_weights": args.loss == "none",
            "cache": args.data == "toy",
            "teacher": not distils,
            "teacher_cache": not distils,
        }
        for term in self.distillation_terms:
            for option in term.options:
                unused[option.name] = not getattr(args, term.weight_name)
        for name, is_unused in unused.items():
            if name in given and is_unused:
                flag = name.replace("_", "-")
                print(f"note: --{flag} changes nothing in this run", file=sys.stderr)
        self.note_defaults(args, given)

    def note_defaults(self, args, given):
        """Say which losses are on by default beside one that was asked for."""
        asked = []
        by_default = []
        for term in self.distillation_terms:
            if not getattr(args, term.weight_name):
                continue
            if term.weight_name not in given:
                by_default.append(term.name)
            elif not term.default:
                asked.append(term.name)
        if asked and by_default:
            off = " ".join(f"--lambda-{name} 0" for name in by_default)
            print(f"note: beside {' and '.join(asked)} the default losses stay on, "
                  f"{' and '.join(by_default)}: {off} would leave them out", file=sys.stderr)

    def build_parser(self, kind, argument_default=argparse.SUPPRESS):
        """The flags, with the defaults of this kind of data in their help.

        The defaults are not the parser's own: what was given must be told from what was not.
        """
        parser = FlagParser(
            prog=self.prog,
            description=self.description,
            epilog="Defaults are the paper's, or what suits the data: "
                   "--data camvid:DIR --help shows those of CamVid.",
            argument_default=argument_default)
        defaults = self.defaults_for(kind)
        if "iters" in defaults:                                   # they say the same thing
            del defaults["epochs"]
        defaults.setdefault("eval_every", "a fortieth of the run")

        def add(flag, help, **options):
            default = defaults.get(flag.strip("-").replace("-", "_"))
            if isinstance(default, list):
                default = " ".join(str(item) for item in default)
            if default is not None:
                help = f"{help} (default: {default})"
            parser.add_argument(flag, help=help, **options)

        def add_switch(flag, help):
            parser.add_argument(flag, help=help, action="store_true", default=argument_default)

        add_experiment_flags(add)
        self.add_own_flags(add, add_switch)
        add_fold_flags(parser, argument_default)
        add_machine_flags(add, add_switch)
        return parser

    def add_own_flags(self, add, add_switch):
        """What only this task has: where a network starts, and its losses."""
        add("--init", "start the student from these weights: an ImageNet encoder, or a segmenter, "
            "whose head is new if the classes differ (default: from scratch)", metavar="FILE")
        add("--teacher", "checkpoint of the teacher to distil; like --init ours, Hugging Face's, "
            "NVlabs' or TransKD's", metavar="FILE")
        add("--second-teacher", "another one: losses on logits then learn from the mean of both",
            metavar="FILE")
        add_switch("--flip-teacher", "and from what a teacher says of the mirror image")
        add("--teacher-cache", "keep what the teacher says of each frame and its mirror image "
            "there, and ask it once; for --augment plain (default: ask in every step)",
            metavar="DIR")
        add("--accum", "forward passes of a step; its batch is batch-size x accum x processes",
            type=POSITIVE_INTEGER)
        add("--loss", "supervision: wce is eq. 3, dice-focal eq. 14, wce-dice eq. 3 plus Dice, "
            "none the teacher alone",
            choices=("wce", "dice-focal", "wce-dice", "none"))
        add("--lambda-dice", "weight of Dice: in dice-focal focal has the rest, in wce-dice eq. 3 "
            "stays whole", type=SHARE)
        add("--class-weights", "enet: 1 / ln(1.10 + share), the paper's; sqrt: 1 / sqrt(share); "
            "none", choices=("enet", "sqrt", "none"))
        add("--labelled", "use the labels of this share of the train frames, the first of each "
            "drive; the others are left out, or with a teacher taught by it alone, half of each "
            "batch (default: all)", type=number(float, 0.0, 1.0, open_low=True))
        add_switch("--with-val", "train on the frames of val too, for a last run that is scored on "
                   "test: what it scores on val says nothing then, and last.pth is its result")
        for term in self.distillation_terms:
            add(f"--lambda-{term.name}", term.help, type=NOT_NEGATIVE)
            for option in term.options:
                flag = "--" + option.name.replace("_", "-")
                add(flag, option.help, type=option.type)
        add_switch("--compile", "torch.compile student, losses and teacher: minutes at the first "
                   "step; meant for a GPU, on a CPU it was slower than without")
        add_switch("--fit-log", "at each validation also write loss and mIoU of 100 train frames "
                   "and of val, and the seconds of training, to fit.csv")


def is_value_of(action, value):
    """Is this what argparse's `action` makes of some words?"""
    if action.nargs == 0:                                         # a switch
        return isinstance(value, bool)
    if action.nargs is None:
        values = [value]
    elif isinstance(value, (list, tuple)) and len(value) == action.nargs:
        values = value
    else:
        return False
    return all(is_word_of(action, word) for word in values)


def is_word_of(action, word):
    if action.choices is not None:
        return type(word) in (str, int) and word in action.choices
    if action.type is None:
        return isinstance(word, str) and "\0" not in word
    if type(word) not in (int, float):
        return False
    try:
        return action.type(str(word)) == word
    except (ValueError, argparse.ArgumentTypeError):
        return False


def add_experiment_flags(add):
    """What makes it this experiment and no other."""
    add("--student", "the network to train", choices=SIZES)
    add("--data", "toy, camvid:DIR, cityscapes:DIR or folder:DIR")
    add("--out", "the run's folder (default: runs/DATA-STUDENT, numbered)", metavar="DIR")
    add("--iters", "optimizer steps", type=POSITIVE_INTEGER)
    add("--epochs", "passes over the data, in place of --iters", type=POSITIVE_INTEGER)
    add("--batch-size", "images per process and forward pass", type=POSITIVE_INTEGER)
    add("--size", "resize frames to this before the augmentation, and for scoring (default: CamVid "
        "288 384, Cityscapes 512 1024, else as they are)", type=SIDE, nargs=2, metavar=("H", "W"))
    add("--crop", "size of a training image", type=SIDE, nargs=2, metavar=("H", "W"))
    add("--scale-range", "random scale before the crop",
        type=number(float, 1e-6, 16), nargs=2, metavar=("LO", "HI"))
    add("--augment", "segformer: scale, crop, flip, colours; plain: the paper's resize to --crop "
        "and flip", choices=("segformer", "plain"))
    add("--lr", "peak learning rate", type=POSITIVE)
    add("--weight-decay", "of matrices; norms and biases have none", type=NOT_NEGATIVE)
    add("--warmup", "share of the steps with rising learning rate", type=SHARE)
    add("--grad-clip", "largest norm of the gradient, 0 for no clipping", type=NOT_NEGATIVE)
    add("--norm", "ln: LayerNorm; dyt: DyT after patch embeddings; dyt-dyl: DyL everywhere else "
        "too; dyt-dyl-ln: the same, with LayerNorm at stage ends", choices=NORMS)
    add("--ema", "score and keep an average of the weights that decays by this a step, for example "
        "0.999 (default: the weights themselves)", type=number(float, 0.0, 0.99999, open_low=True))


def add_machine_flags(add, add_switch):
    """How and where it runs and what it writes; and --amp and --seed, which change the result."""
    add("--amp", "mixed precision; auto: fp16 on CUDA (untested: no GPU was to be had), else off",
        choices=("auto", *AMP_DTYPES, "off"))
    add("--workers", "processes that read data", type=number(int, 0, 1024))
    add("--cache", "keep decoded frames there, 4 bytes per pixel, shared by all workers and runs "
        "(default: decode each time)", metavar="DIR")
    add("--seed", "of weights, order, augmentation and dropout", type=number(int, 0, 2 ** 31))
    add("--eval-every", "steps between validations and checkpoints", type=POSITIVE_INTEGER)
    add_switch("--tensorboard", "also write scalars and pictures for TensorBoard to the run's "
               "folder")
    add_switch("--resume", "go on with the run in --out, or the newest below runs/")
    add("--device", "auto (CUDA, then MPS, then CPU), or one of them by name")
