"""The tables of docs/PROMPTS.md, from the files in results/prompt/.

    results/prompt/runs.sh                        # every run, and its scores as .json
    python -m extras.prompt_tables                # between the marks of docs/PROMPTS.md

A mark is a line `<!-- NAME: ... -->`, and its table ends at the next `<!-- end -->`. No number in
these tables is ever typed. What was not run is named below its table. A cell over two seeds is
their mean, with both values behind it where there is room.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from extras.cli import UsageError, run_command
from extras.outputs import write_text
from extras.paper_tables import insert, markdown

RESULTS = Path("results/prompt")
PAGE = Path("docs/PROMPTS.md")
SEEDS = (0, 1)
SENSITIVE_SHOWN = 8


def read(name):
    """-> the content of results/prompt/NAME.json, None where it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def scores_of(name, row="fp32"):
    """-> the scores of a row for each seed that was run, [{...}]"""
    found = []
    for seed in SEEDS:
        content = read(f"{name}-{seed}")
        if content and row in content["rows"]:
            found.append(content["rows"][row])
    return found


def cell(found, key, form="{:.3f}", scale=1):
    """The mean over the seeds; "-" where a number is not to be had."""
    values = [scores[key] for scores in found if scores.get(key) is not None]
    if not values or any(math.isnan(value) for value in values):
        return "-"
    return form.format(scale * sum(values) / len(values))


def both(found, key, scale=100):
    """The mean in percent, and each seed's where there are two."""
    mean = cell(found, key, "{:.1f}", scale)
    if len(found) < 2 or mean == "-":
        return mean
    each = [f"{scale * scores[key]:.1f}" for scores in found]
    return f"{mean} ({', '.join(each)})"


def each(found, key, form="{:.0f}", scale=1):
    """A number of every seed, with commas between."""
    cells = []
    for scores in found:
        value = scores.get(key)
        cells.append("-" if value is None else form.format(scale * value))
    return ", ".join(cells)


def missing(titles):
    return f"\nNot run: {', '.join(titles)}." if titles else ""


def make_table(head, rows, columns):
    """rows: {title: [scores]}; columns: functions of [scores]. -> Markdown"""
    lines = []
    absent = []
    for title, found in rows.items():
        if not found:
            absent.append(title)
            continue
        lines.append([title, *[column(found) for column in columns]])
    if not lines:
        return missing(absent).strip()
    return markdown(head, lines) + missing(absent)


# ---------------------------------------------------------------- the tables

def teacher_scores(name="supervised"):
    """The teacher stands in every student's file; one is enough."""
    return scores_of(name, "teacher")[:1]


def first_400():
    """The student of the table of bits, in fp32."""
    content = read("bits-first-400-0")
    return [content["rows"]["fp32"]] if content else []


def closed_set(name="closed-set"):
    found = []
    for seed in SEEDS:
        content = read(f"{name}-{seed}")
        if content:
            found.append({"argmax": content["checkpoints"][0]["miou"]})
    return found


def student_table(rows):
    """{title: [scores]} -> the table of masks and presence in one line each."""
    head = ["", "seeds", "mIoU, gated", "ungated", "argmax", "F1", "MCC", "sensitivity",
            "the truth's", "selectivity", "cgF1", "agreement"]
    columns = [
        lambda found: str(len(found)),
        lambda found: both(found, "miou"),
        lambda found: both(found, "miou_ungated"),
        lambda found: both(found, "argmax"),
        lambda found: cell(found, "f1"),
        lambda found: cell(found, "mcc"),
        lambda found: cell(found, "sensitivity"),
        lambda found: cell(found, "sensitivity_truth"),
        lambda found: cell(found, "selectivity"),
        lambda found: cell(found, "cgf1", "{:.1f}"),
        lambda found: cell(found, "agreement"),
    ]
    return make_table(head, rows, columns)


def students():
    return student_table({
        "B2, the teacher (300 steps)": teacher_scores(),
        "B0, closed set": closed_set(),
        "B0, supervised": scores_of("supervised"),
        "B0, phase 2 only": scores_of("phase-2"),
        "B0, phase 1, then 2": scores_of("phase-1-2"),
        "B0, supervised, 400 steps, lr 1.2e-3": first_400(),
    })


def camvid():
    return student_table({
        "B2, the teacher (300 steps)": teacher_scores("camvid-supervised"),
        "B0, closed set": closed_set("camvid-closed-set"),
        "B0, supervised": scores_of("camvid-supervised"),
        "B0, phase 2 only": scores_of("camvid-phase-2"),
        "B0, phase 1, then 2": scores_of("camvid-phase-1-2"),
    })


def words():
    head = ["trained with", "sensitivity", "the truth's", "between classes",
            "between words of one meaning", "selectivity", "mIoU, gated"]
    rows = {"4 prompts": scores_of("four-prompts"), "21 prompts": scores_of("supervised")}
    columns = [
        lambda found: each(found, "sensitivity", "{:.3f}"),
        lambda found: each(found, "sensitivity_truth", "{:.3f}"),
        lambda found: each(found, "between_classes", "{:.3f}"),
        lambda found: each(found, "between_synonyms", "{:.3f}"),
        lambda found: each(found, "selectivity", "{:.3f}"),
        lambda found: both(found, "miou"),
    ]
    return make_table(head, rows, columns)


def presence_table(first, rows):
    """{title: [scores]} -> the table of presence in numbers; `first`: the head of the titles."""
    head = [first, "TP", "FP", "FN", "TN", "MCC", "yes to classes not in the image, %",
            "yes to words never trained, %", "yes about images of nothing, %"]
    columns = [
        lambda found: each(found, "tp"),
        lambda found: each(found, "fp"),
        lambda found: each(found, "fn"),
        lambda found: each(found, "tn"),
        lambda found: each(found, "mcc", "{:.3f}"),
        lambda found: each(found, "missing", scale=100),
        lambda found: each(found, "never_trained", scale=100),
        lambda found: each(found, "empty", scale=100),
    ]
    return make_table(head, rows, columns)


def negatives():
    return presence_table("trained with", {
        "8 absent words, 5 % empty images": scores_of("supervised"),
        "no absent words": scores_of("no-absent"),
        "no empty images": scores_of("no-empty"),
        "20 % empty images": scores_of("many-empty"),
    })


def camvid_presence():
    return presence_table("split, network", {
        "val, teacher": teacher_scores("camvid-supervised"),
        "val, supervised": scores_of("camvid-supervised"),
        "val, phase 2 only": scores_of("camvid-phase-2"),
        "val, phase 1, then 2": scores_of("camvid-phase-1-2"),
        "test, supervised": scores_of("camvid-test-supervised"),
        "test, phase 2 only": scores_of("camvid-test-phase-2"),
        "test, phase 1, then 2": scores_of("camvid-test-phase-1-2"),
    })


def tokenizer():
    head = ["100 steps after the tokenizer changed", "mIoU, gated", "argmax", "sensitivity"]
    rows = {
        "`--init --reset-text`: the text encoder new, the rest kept": scores_of("swap-init"),
        "from scratch": scores_of("swap-scratch"),
    }
    columns = [
        lambda found: both(found, "miou"),
        lambda found: both(found, "argmax"),
        lambda found: each(found, "sensitivity", "{:.3f}"),
    ]
    return make_table(head, rows, columns)


@dataclass
class Packed:
    """A network in one way to keep its weights."""
    title: str
    mode: str
    size: int                                                     # bytes on the disk
    fp16: int                                                     # bytes of its fp16 file
    miou: float
    before: float                                                 # mIoU in fp32
    ungated: float | None = None
    ms: float | None = None
    ms_before: float | None = None                                # fp32's in the same run

    def cells(self):
        drop = 100 * (self.before - self.miou)
        share = 100 * (self.before - self.miou) / self.before
        ungated = "-" if self.ungated is None else f"{100 * self.ungated:.2f}"
        ms = "-" if self.ms is None else f"{self.ms:.0f} ({self.ms_before:.0f})"
        return [
            self.title,
            self.mode,
            f"{self.size / 1e6:.2f}",
            f"{self.fp16 / self.size:.2f}",
            f"{100 * self.miou:.2f}",
            f"{drop:+.2f}",
            f"{share:+.2f} %",
            ungated,
            ms,
        ]


def bits_rows(name, title):
    """The rows of `extras.prompt compare` with all modes."""
    content = read(f"bits-{name}")
    if content is None:
        return []
    rows = content["rows"]
    lines = []
    for mode, row in rows.items():
        if row.get("reason"):
            lines.append([title, mode, f"failed: {row['reason']}", *["-"] * 6])
            continue
        packed = Packed(title, mode, row["bytes"], rows["fp16"]["bytes"], row["miou"],
                        rows["fp32"]["miou"], row["miou_ungated"], row["ms"],
                        rows["fp32"]["ms"])
        lines.append(packed.cells())
    return lines


def camvid_rows():
    """The rows of extras/quantize.py: the B0 of CamVid."""
    lines = []
    for mode in ("8", "4", "4+8"):
        report = read(f"camvid-b0-{mode}")
        if report is None:
            continue
        sizes = report["sizes"]
        cost = report["cost"]
        title = f"B0, closed set, CamVid val ({cost['frames']} frames)"
        before = cost["miou_before"]
        fp16 = sizes["fp16"]
        if not lines:
            lines.append(Packed(title, "fp32", sizes["fp32"], fp16, before, before).cells())
            half = read("camvid-b0-fp16")
            if half:
                miou = half["checkpoints"][0]["miou"]
                lines.append(Packed(title, "fp16", fp16, fp16, miou, before).cells())
        packed = Packed(title, f"int{mode}", sizes["bytes"], fp16, cost["miou_after"], before,
                        ms=cost["ms_after"], ms_before=cost["ms_before"])
        lines.append(packed.cells())
    return lines


def bits():
    head = ["network", "weights", "MB", "times smaller than fp16", "mIoU", "drop", "relative",
            "ungated", "ms (fp32's in the same run)"]
    lines = [*camvid_rows(), *bits_rows("first-400-0", "prompt student B0, toy val"),
             *bits_rows("teacher", "prompt teacher B2, toy val")]
    return markdown(head, lines)


def layers():
    report = read("camvid-b0-4")
    if report is None or "layers" not in report:
        return missing(["the layers"])
    lines = []
    most_sensitive = report["layers"][:SENSITIVE_SHOWN]
    for change, weights, kind in most_sensitive:
        lines.append([f"`{kind}`", f"{weights:,}", f"{100 * change:.2f}"])
    return markdown(["layers", "weights", "change of the logits, %"], lines)


TABLES = {"students": students, "words": words, "negatives": negatives, "tokenizer": tokenizer,
          "camvid": camvid, "camvid-presence": camvid_presence, "bits": bits, "layers": layers}


def main():
    argparse.ArgumentParser(prog="python -m extras.prompt_tables",
                            description="Write the tables of docs/PROMPTS.md.").parse_args()
    text = PAGE.read_text()
    for name, make in TABLES.items():
        changed = insert(text, name, make())
        if changed is None:
            raise UsageError(f"{PAGE} has no mark <!-- {name}: ... -->")
        text = changed
    write_text(PAGE, text)
    print(PAGE)


if __name__ == "__main__":
    run_command(main)
