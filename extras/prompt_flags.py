"""The flags of `python -m extras.prompt train`: those of train.py about data, schedule and machine,
and what only a student that is told what to segment has.
"""

import sys

import train
from extras.cli import UsageError, number
from extras.prompt_model import DIM
from extras.prompt_words import TOKENIZERS
from extras.train_flags import NEEDED, SHARE, TrainFlags

# Those of train.py, but for what only classes have; then our own.
DEFAULTS = dict(train.DEFAULTS)
for flag in ("accum", "loss", "class_weights", "lambda_dice"):
    del DEFAULTS[flag]
DEFAULTS.update(phase=2, prompts=21, absent=8, empty=0.05, tokenizer="letters", dim=DIM)

DATASET_DEFAULTS = dict(train.DATASET_DEFAULTS)
DATASET_DEFAULTS["toy"] = DATASET_DEFAULTS["toy"] | {"lr": 2.4e-3}


# What the loop reads of train.py's flags and cannot be chosen here.
FIXED = {"accum": 1, "compile": False, "fit_log": False, "labelled": None, "with_val": False,
         "second_teacher": None, "flip_teacher": False, "teacher_cache": None}


class PromptFlags(TrainFlags):
    prog = "python -m extras.prompt train"
    description = "Train a segmenter that is told what to segment, with or without a teacher."

    def parse(self, argv):
        args, given = super().parse(argv)
        if args.teacher_files and "augment" not in given:
            args.augment = "plain"
        return args, given

    def all_flags(self):
        return super().all_flags() | FIXED

    def add_own_flags(self, add, add_switch):
        add("--phase", "1: the teacher's features, without labels; 2: its masks and presence, or "
            "without a teacher those of the labels", type=int, choices=(1, 2))
        add("--teacher", "a checkpoint of this command: the network to learn from",
            metavar="FILE")
        add("--teacher-files", "learn from what another teacher said, an .npz for each frame; "
            "whole frames, resized to --crop", metavar="DIR")
        add("--prompts", "4 generic ones, or 21 with the classes' names and synonyms",
            type=int, choices=(4, 21))
        add("--absent", "words for things that the data do not have, to learn to say no",
            type=number(int, 0))
        add("--empty", "share of the training images that show nothing", type=SHARE)
        add("--tokenizer", "how the student reads prompts: letters and digits, or UTF-8 bytes",
            choices=TOKENIZERS)
        add("--text-vectors", "vectors of a pretrained text encoder in place of the student's own: "
            "an .npz with `prompts` and `vectors`", metavar="FILE")
        add("--dim", "length of the vectors that pixels and words are compared by",
            type=number(int, 4, 4096))
        add("--init", "start from these weights: a checkpoint of this command, or any SegFormer's, "
            "which lends what it has (default: from scratch)", metavar="FILE")
        add_switch("--reset-text", "with --init: a new text encoder in place of the file's, which "
                   "a change of the tokenizer needs")

    def check(self, args, given):
        super().check(args, given)
        if args.resume:
            return
        if args.teacher and args.teacher_files:
            raise UsageError("--teacher and --teacher-files are two teachers: give one")
        if args.phase == 1 and not args.teacher:
            raise UsageError("--phase 1 aligns features with a --teacher's: give one"
                             + (", --teacher-files has masks only" if args.teacher_files else ""))
        if args.teacher_files and given.get("augment") == "segformer":
            raise UsageError("--teacher-files has masks of whole frames: leave --augment "
                             "segformer, which crops them, out")
        if args.reset_text and not args.init:
            raise UsageError("--reset-text goes with --init: from scratch all of it is new")
        if args.text_vectors and "tokenizer" in given:
            raise UsageError("--text-vectors stands in place of a --tokenizer: give one")

    def needed_flags(self, stored):
        """-> the flags without which a run with the others cannot go on."""
        needed = [name for name in NEEDED if name != "loss"]
        if stored.get("fold") is not None:
            needed.append("folds")
        return [*needed, "phase", "prompts", "absent", "empty", "dim"]

    def check_settled(self, args):
        """Nothing of the losses can be chosen here."""

    def note_unused(self, args, given):
        plain = args.augment == "plain"
        unused = {
            "size": plain,
            "scale_range": plain,
            "folds": args.fold is None,
            "fold_by": args.fold is None,
            "cache": args.data == "toy",
        }
        for name, is_unused in unused.items():
            if name in given and is_unused:
                flag = name.replace("_", "-")
                print(f"note: --{flag} changes nothing in this run", file=sys.stderr)


PROMPT_FLAGS = PromptFlags(DEFAULTS, DATASET_DEFAULTS, distillation_terms=())
