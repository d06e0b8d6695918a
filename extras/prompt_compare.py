"""A student beside its teacher and beside itself in fewer bits: a table, a gate, pictures.

    python -m extras.prompt compare STUDENT [--teacher TEACHER] [--data SPEC] [--split val]
                                    [--modes fp32 fp16 int8 int4 int8+int4]
                                    [--gate] [--pictures DIR] [--json FILE]

A row is a way to keep the student's weights; its size is that of the file on the disk. A row that
cannot be made stands in the table with its reason. Below the table is what the table cannot tell:
masks without the presence, presence in numbers, selectivity, cgF1 (extras/prompt_metrics.py).

--gate decides about the first row, and is the exit code: GO 0, NO-GO 1, HOLD 2. GO needs 79 % of
the teacher's mIoU and 67 % of its sensitivity, as the reports wanted them, and also a selectivity
that noise has not. HOLD: something of it cannot be computed.
"""

import argparse
import contextlib
import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data import SPLITS, open_dataset
from eval import no_nan
from extras.cli import NotFinite, UsageError, add_fold_flags, make_folder, show_progress
from extras.machine import pick_device
from extras.outputs import output_path, temporary_folder, write_text
from extras.prompt_checkpoint import load_prompt, packed_prompt, save_packed_prompt, save_prompt
from extras.prompt_metrics import ask
from extras.prompt_scores import score
from extras.provenance import check_classes, choose_data, warn_of_leak
from extras.quantize import MODES
from extras.score_table import align
from model import CheckpointError

ROWS = {"fp32": None, "fp16": None, "int8": "8", "int4": "4", "int8+int4": "4+8"}
MIOU_SHARE = 0.79                                                 # of the teacher's: the reports'
SENSITIVITY_SHARE = 0.67
LEAST_SELECTIVITY = 0.1                                           # noise has 0 +- 0.03
DETAILS = ("mcc", "missing", "never_trained", "empty", "argmax", "selectivity", "cgf1",
           "sensitivity", "sensitivity_truth", "between_classes", "between_synonyms", "agreement")
EXIT_CODES = {"GO": 0, "NO-GO": 1, "HOLD": 2}


# ---------------------------------------------------------------- rows

@dataclass
class Row:
    """A network of the table: its bytes on the disk and its scores, or why there are none."""
    name: str
    size: int | None = None
    scores: dict = field(default_factory=dict)
    reason: str | None = None


def stored_as(model, name, folder):
    """-> (the student as a file in this mode gives it back, the file's bytes)."""
    path = os.path.join(folder, f"{name}.pth")
    if ROWS[name] is None:
        save_prompt(model, path, half=name == "fp16")
    else:
        mode = MODES[ROWS[name]]
        small, layer_bits = packed_prompt(model, mode)
        save_packed_prompt(small, layer_bits, path, mode.activation_bits)
    with contextlib.redirect_stdout(io.StringIO()):               # a temporary file's name
        return load_prompt(path), os.path.getsize(path)


def make_row(model, name, dataset, questions, teacher):
    """A mode that fails is a row with its reason, and the others go on."""
    row = Row(name)
    try:
        with temporary_folder() as folder:
            network, row.size = stored_as(model, name, folder)
        device = next(model.parameters()).device
        network = network.to(device)
        if ROWS[name] is None:
            network.segformer = network.segformer.fold()
        row.scores = score(network, dataset, questions, teacher, show_progress(name))
    except (CheckpointError, NotFinite, UsageError, RuntimeError, ImportError) as error:
        row.reason = str(error).splitlines()[0]
    return row


def teacher_row(teacher, size, dataset, questions):
    """The teacher in fp16 on the disk, as the reports' first row."""
    row = Row("teacher", size)
    row.scores = score(teacher, dataset, questions, progress=show_progress("teacher"))
    return row


def bytes_in_fp16(model):
    with temporary_folder() as folder:
        return stored_as(model, "fp16", folder)[1]


# ---------------------------------------------------------------- text

def number_or_dash(value, form):
    return "-" if value is None or math.isnan(value) else form.format(value)


COLUMNS = {"mode": 10, "MB": 8, "compress": 10, "mIoU": 8, "ungated": 9, "drop": 8, "rel.": 8,
           "F1": 8, "sens.": 8, "ms": 8}                          # and their widths


def table(rows):
    """The reports' table: size, compression to the first row, mIoU, drop, F1, sensitivity, time."""
    widths = list(COLUMNS.values())
    head = align(list(COLUMNS), widths)
    lines = [head, "-" * len(head)]
    for row in rows:
        if row.reason:
            lines.append(f"{row.name:10}failed: {row.reason}")
        else:
            lines.append(align(cells_of(row, rows[0]), widths))
    return "\n".join(lines)


def cells_of(row, first):
    """-> the texts of a row; drop and compression are against the first one."""
    scores = row.scores
    drop = math.nan
    share = math.nan
    compression = math.nan
    if row is not first and row.name != "teacher" and first.scores:
        before = first.scores["miou"]
        drop = before - scores["miou"]
        if before > 0:
            share = drop / before
    if first.size and row.size:
        compression = first.size / row.size
    return [
        row.name,
        number_or_dash(row.size / 1e6, "{:.2f}"),
        number_or_dash(compression, "{:.2f}x"),
        number_or_dash(scores["miou"], "{:.4f}"),
        number_or_dash(scores["miou_ungated"], "{:.4f}"),
        number_or_dash(drop, "{:+.4f}"),
        number_or_dash(share, "{:+.1%}"),
        number_or_dash(scores["f1"], "{:.4f}"),
        number_or_dash(scores["sensitivity"], "{:.4f}"),
        number_or_dash(scores["ms"], "{:.0f}"),
    ]


def details(row):
    """What the table has no room for, in words."""
    scores = row.scores
    said = {name: number_or_dash(scores.get(name), "{:.3f}") for name in DETAILS}
    no_negatives = ""
    if not scores["fp"] + scores["tn"]:
        no_negatives = " (no negatives: F1 = 2R/(1+R))"
    lines = [
        f"{row.name}: presence TP {scores['tp']} FP {scores['fp']} FN {scores['fn']} "
        f"TN {scores['tn']}, MCC {said['mcc']}{no_negatives}",
        f"  said to be there: classes that the image does not show {said['missing']}, "
        f"words never trained with {said['never_trained']}, "
        f"words about images of nothing {said['empty']}",
        f"  mIoU of the classes against each other (argmax) {said['argmax']}; "
        f"selectivity {said['selectivity']}; cgF1 {said['cgf1']}",
        f"  sensitivity {said['sensitivity']} where the truth has {said['sensitivity_truth']}; "
        f"between classes {said['between_classes']}, "
        f"between words of one meaning {said['between_synonyms']}",
    ]
    if "agreement" in scores:
        lines.append(f"  agreement with the teacher {said['agreement']}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the gate

def gate(student, teacher):
    """Scores of a student and of its teacher -> ("GO", "NO-GO" or "HOLD", the reasons).

    Sensitivity alone would let noise pass (1/3 > 0.25), so selectivity is asked too.
    """
    wanted = (
        ("miou", MIOU_SHARE * teacher["miou"], f"{MIOU_SHARE:.0%} of the teacher's"),
        ("sensitivity", SENSITIVITY_SHARE * teacher["sensitivity"],
         f"{SENSITIVITY_SHARE:.0%} of the teacher's"),
        ("selectivity", LEAST_SELECTIVITY, "noise has 0"),
    )
    verdict = "GO"
    reasons = []
    for name, least, why in wanted:
        value = student[name]
        if math.isnan(value) or math.isnan(least):
            reasons.append(f"{name} cannot be computed")
            verdict = "HOLD" if verdict == "GO" else verdict
            continue
        sign = ">=" if value >= least else "<"
        reasons.append(f"{name} {value:.4f} {sign} {least:.4f} ({why})")
        if value < least:
            verdict = "NO-GO"
    return verdict, reasons


# ---------------------------------------------------------------- the command

def build_parser():
    parser = argparse.ArgumentParser(
        prog="python -m extras.prompt compare",
        description="A student beside its teacher, and beside itself in fewer bits.")
    parser.add_argument("checkpoint", metavar="STUDENT", help="of python -m extras.prompt train")
    parser.add_argument("--teacher", metavar="FILE",
                        help="its teacher, another such checkpoint: a row, and the agreement")
    parser.add_argument("--data", metavar="SPEC",
                        help="toy, camvid:DIR, cityscapes:DIR or folder:DIR (default: what the "
                             "student was trained on)")
    parser.add_argument("--split", default="val", choices=SPLITS, help="(default: val)")
    add_fold_flags(parser, default_folds=None)
    parser.add_argument("--frames", type=int, metavar="N",
                        help="the first N frames only (default: all)")
    parser.add_argument("--modes", nargs="+", default=["fp16", "int8", "int4", "int8+int4"],
                        choices=ROWS, metavar="MODE",
                        help=f"the rows, of {', '.join(ROWS)} (default: all but fp32)")
    parser.add_argument("--gate", action="store_true",
                        help="end with GO (exit code 0), NO-GO (1) or HOLD (2); needs --teacher")
    parser.add_argument("--pictures", metavar="DIR",
                        help="draw what each prompt gives, with a page index.html")
    parser.add_argument("--json", metavar="FILE", type=output_path,
                        help="write the rows for machines")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    return parser


def open_frames(args, model):
    """-> the data set to be asked about, the student's own without --data."""
    choose_data(args, {args.checkpoint: model})
    dataset = open_dataset(args.data, args.split, args.fold, args.folds, fold_by=args.fold_by)
    check_classes(model, args.checkpoint, dataset)
    warn_of_leak(model, args.checkpoint, args)
    if args.frames is not None:
        if args.frames < 1:
            raise UsageError("--frames must be at least 1")
        stems = dataset.stems[:args.frames]
        frames = dataset.find_frames(args.split) if args.fold is None else dataset.find_all_frames()
        dataset.use_frames({stem: frames[stem] for stem in stems})
    return dataset


def main(argv):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.gate and not args.teacher:
        parser.error("--gate compares with the teacher: give --teacher FILE")
    device = pick_device(args.device)
    model = load_prompt(args.checkpoint).to(device)
    dataset = open_frames(args, model)
    questions = ask(dataset.classes)
    teacher = None
    if args.teacher:
        teacher = load_prompt(args.teacher).to(device)
        check_classes(teacher, args.teacher, dataset)
        teacher_bytes = bytes_in_fp16(teacher)
        teacher.segformer = teacher.segformer.fold()

    rows = [make_row(model, name, dataset, questions, teacher) for name in args.modes]
    if teacher is not None:
        rows.insert(1, teacher_row(teacher, teacher_bytes, dataset, questions))
    print(f"\n{dataset.name} {args.split}, {len(dataset)} frames, {len(questions.prompts)} "
          f"prompts, {device}, {torch.get_num_threads()} threads; MB: file bytes / 10^6; ms: "
          f"for one image with all prompts, on a machine that may have had other work")
    print(table(rows))
    for row in rows:
        if row.scores:
            print(details(row))
    if args.json:
        write_json(rows, dataset, args)
    if args.pictures:
        from extras.prompt_pictures import draw_pictures
        draw_pictures(model, teacher, dataset, make_folder(args.pictures))
    return end(rows, args)


def end(rows, args):
    """-> the exit code: the gate's, or 0."""
    if not args.gate:
        return 0
    student = rows[0]
    teacher = rows[1]
    if student.reason:
        print(f"HOLD: {student.name} failed: {student.reason}")
        return EXIT_CODES["HOLD"]
    verdict, reasons = gate(student.scores, teacher.scores)
    print(f"{verdict}: " + "; ".join(reasons))
    return EXIT_CODES[verdict]


def write_json(rows, dataset, args):
    content = {"checkpoint": Path(args.checkpoint).parent.name, "data": dataset.name,
               "split": args.split, "frames": len(dataset), "threads": torch.get_num_threads(),
               "rows": {}}
    for row in rows:
        content["rows"][row.name] = {"bytes": row.size, "reason": row.reason, **row.scores}
    write_text(args.json, json.dumps(no_nan(rounded(content)), indent=1) + "\n")


def rounded(value):
    """Floats to six digits, also inside dicts and lists."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value
