"""The tables of docs/RESULTS.md and README.md, made from what reproduce.sh left in results/.

    python -m extras.paper_tables                     # writes them between the files' marks
    python -m extras.paper_tables --schedule full     # of the other schedule
    python -m extras.paper_tables --figures           # also the paper's figures 4-6 (matplotlib),
                                                      # loss.png miou.png radar.png beside the rows

A mark is a line `<!-- NAME: ... -->`, and its table ends at the next `<!-- end -->`.

No number in these tables is ever typed. A row of Table 2 or of the KL study that was not run is
named below its table. A cell over several seeds is mean +- standard deviation (n - 1), and a
difference to B0 is taken seed by seed; which plain B0 a row is held against is said at `baseline`,
and below the table.
"""

import argparse
import re
import statistics
from pathlib import Path

from extras.cli import UsageError, run_command
from extras.lever_table import format_rate, lever_rows
from extras.outputs import write_text
from extras.registered_tables import (
    few_labels_outcome,
    few_labels_table,
    losses_outcome,
    outcome_table,
    rate_table,
    row_table,
    summary_table,
)
from extras.result_rows import (
    difference,
    difference_table,
    read_json,
    read_row,
    shared_seeds,
    steps,
)
from extras.score_table import markdown, spread

RESULTS = Path("docs/RESULTS.md")
README = Path("README.md")
BENCH = Path("results/bench/cpu-2-threads.json")
SMALL = "camvid-small"                                            # the small registered study
SMALL_BF16 = "camvid-small-bf16"                                  # and once more, in bf16
LOSSES = "camvid-small-losses"                                    # losses at equal compute

# Row of reproduce.sh: (its title, its network in bench.py, None if that one was not timed).
ROWS = {
    "b2": ("B2, the teacher", "SegFormer-B2"),
    "b0": ("B0", "SegFormer-B0"),
    "b0-dyt": ("+ Tanh", "+ Tanh"),
    "b0-dyt-dyl": ("+ Tanh + Linear", "+ Tanh + Linear"),
    "b0-kd": ("+ KD (CSKD + PEKD)", "SegFormer-B0"),
    "b0-df": ("+ Dice-Focal", "SegFormer-B0"),
    "b0-fd": ("CSKD alone", "SegFormer-B0"),
    "b0-pe": ("PEKD alone", "SegFormer-B0"),
    "b0-dyt-fd": ("+ Tanh, CSKD alone", "+ Tanh"),
    "b0-kl-1": ("KL alone, T = 1", "SegFormer-B0"),
    "b0-kl-4": ("KL alone, T = 4", "SegFormer-B0"),
    "b0-all": ("all: KD + KL (T = 4) + Dice-Focal + Tanh + Linear", "+ Tanh + Linear"),
    "b0-long": ("B0, longer", "SegFormer-B0"),
    "b0-kd-long": ("+ KD, longer", "SegFormer-B0"),
    "b0-dyt-long": ("+ Tanh, longer", "+ Tanh"),
    "b0-dyt-fd-long": ("+ Tanh, CSKD alone, longer", "+ Tanh"),
    "b0-tuned": ("B0, longer, tuned", "SegFormer-B0"),
    "b0-kd-tuned": ("+ KD, longer, tuned", "SegFormer-B0"),
    "b0-dyt-tuned": ("+ Tanh, longer, tuned", "+ Tanh"),
    "b0-dyt-fd-tuned": ("+ Tanh, CSKD alone, longer, tuned", "+ Tanh"),
    "b2-tuned": ("B2 + Tanh at 1.2e-3, another teacher", None),
    "b0-dyt-fd-b2-tuned": ("+ Tanh, CSKD alone from it, longer, tuned", "+ Tanh"),
}
PLAIN = ("b0", "b0-long", "b0-tuned")                             # B0 with nothing added
TUNED = "-tuned"                                                  # ends the rows of a searched rate

# Learning rate: what the names of its rows end with.
RATES = {
    "3e-4": "-lr-3e-4",
    "6e-4": "",
    "1.2e-3": "-lr-1.2e-3",
    "2.4e-3": "-lr-2.4e-3",
    "4.8e-3": "-lr-4.8e-3",
}
RATE_ROWS = ("b0", "b0-dyt", "b0-kd", "b0-dyt-fd")

# The differences with an interval: (row, what it is held against).
PAIRS = (
    ("b0-dyt", "b0"),
    ("b0-fd", "b0"),
    ("b0-kd", "b0"),
    ("b0-pe", "b0"),
    ("b0-df", "b0"),
    ("b0-kl-1", "b0"),
    ("b0-kl-4", "b0"),
    ("b0-dyt-dyl", "b0"),
    ("b0-all", "b0"),
    ("b0-kd", "b0-fd"),
    ("b0-all", "b0-dyt-dyl"),
    ("b0-dyt-fd-long", "b0-dyt-long"),
    ("b0-dyt-fd-tuned", "b0-dyt-tuned"),
)

STUDY = {"b0": "B0", "kl-1.0": "KL, w = 1.0", "kl-0.5": "KL, w = 0.5", "b2": "B2, the teacher"}
STUDY_FOLDS = {"drive": "folds of whole drives", "shuffle": "folds of shuffled frames, which leak"}

# The best that we can: {folder of the row: its title}
RECORD = {
    "camvid-weights/b0-dyt": "B0 + DyT, no teacher",
    "camvid-record/teacher": "B2 + DyT, the teacher",
    "camvid-record/b0-dyt-fd": "B0 + DyT + CSKD",
    "camvid-record/b0-dyt-fd-with-val": "B0 + DyT + CSKD",
}

FIGURES = ("b0", "b0-kd", "b0-df", "b0-dyt")                      # the paper's four


# ---------------------------------------------------------------- numbers

def val_miou(found, names):
    """-> {name: [mIoU on val]} over the seeds that all of `names` have, or over all if none is."""
    seeds = shared_seeds([found[name] for name in names])
    values = {}
    for name in names:
        values[name] = [run.val for run in found[name] if run.seed in seeds or not seeds]
    return values


def plain_rows(found, iters):
    """The names of the plain B0s that were trained for `iters` steps."""
    return [name for name in PLAIN if found[name] and steps(found[name]) == iters]


def baseline(found, name):
    """-> the name of the plain B0 that row `name` is held against, None where there is none.

    It has as many steps. A row at the paper's learning rate has the plain B0 at that rate. A tuned
    row, whose rate was chosen, has the plain B0 whose rate is best: of all with as many steps, the
    one that is highest on val.
    """
    candidates = plain_rows(found, steps(found[name]))
    if not name.endswith(TUNED):
        candidates = [plain for plain in candidates if not plain.endswith(TUNED)]
    if not candidates:
        return None
    on_val = val_miou(found, candidates)
    return max(candidates, key=lambda plain: statistics.mean(on_val[plain]))


# ---------------------------------------------------------------- text

def capitalise(text):
    """The first letter large, the others as they are."""
    return text[0].upper() + text[1:]


def not_run(titles):
    return [f"Not run yet: {'; '.join(titles)}."] if titles else []


def footnotes(found, fact, usual, sentence):
    """Name the runs that are unlike the others -> [a sentence for each unusual value].

    fact: a function from a Run to the value; None counts as usual. sentence: {} stands for it.
    """
    seeds = {}                                                    # {value: {title: [seed]}}
    for name, runs in found.items():
        title = ROWS[name][0]
        for run in runs:
            value = fact(run)
            if value is None or value == usual:
                continue
            rows = seeds.setdefault(value, {})
            rows.setdefault(title, []).append(str(run.seed))
    notes = []
    for value, rows in sorted(seeds.items()):
        named = "; ".join(with_seeds(title, row_seeds) for title, row_seeds in rows.items())
        notes.append(f"{sentence.format(value)}: {named}.")
    return notes


def with_seeds(title, seeds):
    return f"{title} (seed {' and '.join(seeds)})"


def teacher_seed(run):
    """The seed of the run that taught this one, by its folder in reproduce.sh; None without one."""
    teacher = run.recipe["teacher"]
    if teacher is None:
        return None
    return Path(teacher).parent.name.rsplit("-", 1)[1]


def amp(run):
    return run.recipe["amp"]


def precision(run):
    """bf16, fp16 or fp32."""
    return "fp32" if amp(run) == "off" else amp(run)


def baseline_notes(found):
    """What the tuned rows are held against -> [sentence]."""
    tuned = [name for name in ROWS if name.endswith(TUNED) and found[name]]
    base = baseline(found, tuned[0]) if tuned else None
    if base is None:
        return []
    on_val = val_miou(found, plain_rows(found, steps(found[base])))
    values = [f"{ROWS[name][0]} {spread(miou)}" for name, miou in on_val.items()]
    listed = "; ".join(values)
    return [f'Tuned rows are held against "{ROWS[base][0]}": of the plain B0s with as many steps '
            f"it is the best on val ({listed})."]


def precision_notes(found):
    """The runs in another precision than B0's, and what follows -> [sentence]."""
    usual = amp(found["b0"][0])
    notes = footnotes(found, amp, usual, "With --amp {}")
    plain_runs = [run for name in PLAIN for run in found[name]]
    if notes and all(amp(run) == usual for run in plain_runs):
        notes.append(f"The plain B0s are all in {precision(plain_runs[0])}: "
                     "to B0, these runs differ in precision too.")
    return notes


# ---------------------------------------------------------------- the tables

def table_2(folder):
    """The paper's Table 2 on CamVid's official split -> markdown."""
    timed = {}
    for row in read_json(BENCH)["results"]["model"]:
        if "network" in row:                                      # not the line on compiling
            timed[row["network"]] = row
    found = {name: read_row(folder / name) for name in ROWS}
    head = ["", "parameters", "G MACs", "of attention", "FPS", "steps", "seeds",
            "mIoU", "mAcc", "aAcc", "mIoU at a quarter", "to B0", "val mIoU"]
    rows = []
    missing = []
    for name, (title, network) in ROWS.items():
        runs = found[name]
        if not runs:
            missing.append(title)
            continue
        base = baseline(found, name)
        has_other_base = base not in (None, name)
        rows.append([
            title,
            f"{runs[0].recipe['parameters']:,}",
            *speed_cells(timed[network] if network else None),
            str(steps(runs)),
            str(len(runs)),
            spread(run.full["miou"] for run in runs),
            spread(run.full["macc"] for run in runs),
            spread(run.full["aacc"] for run in runs),
            spread(run.quarter["miou"] for run in runs),
            difference(runs, found[base]) if has_other_base else "",
            spread(run.val for run in runs),
        ])
    paragraphs = [
        markdown(head, rows),
        *baseline_notes(found),
        *footnotes(found, teacher_seed, "0", "From the teacher of seed {}"),
        *precision_notes(found),
        *not_run(missing),
    ]
    return "\n\n".join(paragraphs)


def speed_cells(timed):
    """MACs without and of attention's products, frames a second; dashes for what was not timed."""
    if timed is None:
        return ["-", "-", "-"]
    return [
        f"{timed['macs_published'] / 1e9:.2f}",
        f"{timed['macs_attention'] / 1e9:.2f}",
        f"{timed['fps_folded']:.2f}",
    ]


def intervals(folder):
    """The differences of PAIRS, seed by seed, with their interval -> markdown."""
    titles = {name: title for name, (title, _) in ROWS.items()}
    return difference_table(folder, PAIRS, titles)


def rates(folder):
    """The baseline and what paid at several learning rates -> markdown.

    mIoU on test and, by which a rate may be chosen, on val; over the seeds that all of them have.
    """
    found = {}
    for name in RATE_ROWS:
        for ending in RATES.values():
            found[name + ending] = read_row(folder / (name + ending))
    seeds = shared_seeds([runs for runs in found.values() if runs])
    rows = []
    for name in RATE_ROWS:
        cells = [ROWS[name][0]]
        for ending in RATES.values():
            runs = [run for run in found[name + ending] if run.seed in seeds]
            if runs:
                on_test = spread(run.full["miou"] for run in runs)
                on_val = spread(run.val for run in runs)
                cells.append(f"{on_test} ({on_val})")
            else:
                cells.append("-")
        rows.append(cells)
    named_seeds = ", ".join(str(seed) for seed in sorted(seeds))
    return markdown([f"learning rate, seed {named_seeds}", *RATES], rows)


def study(folder):
    """The KL study -> markdown: IoU per class, mean of two folds; by drives, then by frames."""
    paragraphs = []
    missing = []
    for by, title in STUDY_FOLDS.items():
        rows = []
        for name, row_title in STUDY.items():
            folds = []
            for fold in (0, 1):
                folds += read_row(folder / f"study-{by}-{fold}-{name}", has_quarter=False)
            if len(folds) < 2:                                    # one fold is no mean of two
                missing.append(f"{row_title}, {title}")
                continue
            classes = read_json(folds[0].folder / "test.json")["classes"]
            rows.append([row_title, *study_cells(folds, len(classes)), str(steps(folds))])
        if rows:
            head = ["", *classes, "mIoU", "mAcc", "aAcc", "steps"]
            paragraphs += [f"{capitalise(title)}:", markdown(head, rows)]
    return "\n\n".join(paragraphs + not_run(missing))


def study_cells(folds, num_classes):
    """Percent: the folds' mean of every class's IoU, then of mIoU, mAcc and aAcc."""
    cells = []
    for c in range(num_classes):
        mean = statistics.mean(run.full["iou"][c] for run in folds)
        cells.append(f"{100 * mean:.1f}")
    for key in ("miou", "macc", "aacc"):
        mean = statistics.mean(run.full[key] for run in folds)
        cells.append(f"{100 * mean:.2f}")
    return cells


def levers(folder):
    """What the baseline gains by, on val."""
    head = ["frames", "augmentation", "learning rate", "changed", "steps", "seeds", "val mIoU",
            "to the plain row"]
    return markdown(head, lever_rows(folder.parent / "camvid-levers"))


def record(folder):
    """The best that we can, of one seed each: no comparison -> markdown"""
    head = ["", "labelled frames", "class weights", "learning rate", "steps",
            "mIoU", "mAcc", "aAcc", "mIoU at a quarter", "val mIoU"]
    rows = []
    for name, title in RECORD.items():
        for run in read_row(folder.parent / name):
            trained_on_val = run.recipe["with_val"]
            splits = "train and val" if trained_on_val else "train"
            rows.append([
                title,
                f"{splits}, {run.recipe['train_frames']}",
                run.recipe["class_weights"],
                format_rate(run.recipe["lr"]),
                f"{steps([run]):,}",
                f"{100 * run.full['miou']:.2f}",
                f"{100 * run.full['macc']:.2f}",
                f"{100 * run.full['aacc']:.2f}",
                f"{100 * run.quarter['miou']:.2f}",
                "-" if trained_on_val else f"{100 * run.val:.2f}",
            ])
    return markdown(head, rows)


def of_study(make_table, study):
    """-> a table of a registered study as TABLES has them: a function of the other rows' folder"""
    def make(folder):
        return make_table(folder.parent, study)
    return make


# ---------------------------------------------------------------- into the files

TABLES = (
    (RESULTS, "table 2", table_2),
    (RESULTS, "intervals", intervals),
    (RESULTS, "rates", rates),
    (RESULTS, "study", study),
    (RESULTS, "levers", levers),
    (RESULTS, "record", record),
    (RESULTS, "small rates", of_study(rate_table, SMALL)),
    (RESULTS, "small rows", of_study(row_table, SMALL)),
    (RESULTS, "small outcome", of_study(outcome_table, SMALL)),
    (RESULTS, "bf16 rates", of_study(rate_table, SMALL_BF16)),
    (RESULTS, "bf16 rows", of_study(row_table, SMALL_BF16)),
    (RESULTS, "bf16 outcome", of_study(outcome_table, SMALL_BF16)),
    (RESULTS, "losses rates", of_study(rate_table, LOSSES)),
    (RESULTS, "losses rows", of_study(row_table, LOSSES)),
    (RESULTS, "losses outcome", of_study(losses_outcome, LOSSES)),
    (RESULTS, "few labels rows", of_study(few_labels_table, SMALL_BF16)),
    (RESULTS, "few labels outcome", of_study(few_labels_outcome, SMALL_BF16)),
    (README, "summary", of_study(summary_table, SMALL_BF16)),
)


def insert(text, name, content):
    """-> `text` with `content` between the marks of `name`; None where it has no such marks."""
    pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        return None
    return pattern.sub(lambda match: match[1] + content + "\n" + match[2], text)


def write_tables(folder):
    """Every table into its file, once all of them are made -> the files. Raises UsageError."""
    if not read_row(folder / "b0"):
        schedule = folder.name.removeprefix("camvid-")
        command = f"DATA=camvid:DIR ./reproduce.sh {schedule} b0"
        raise UsageError(f"{folder} holds no row b0 yet: {command}")
    texts = {}
    for path, name, make in TABLES:
        text = texts.get(path) or path.read_text()
        texts[path] = insert(text, name, make(folder))
        if texts[path] is None:
            raise UsageError(f"{path} has no mark <!-- {name}: ... -->")
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def draw(folder):
    """The paper's figures 4-6, of the rows that are there -> the files. Raises UsageError."""
    from extras.plots import plot_runs
    runs = {}
    for name in FIGURES:
        row = read_row(folder / name)
        if row:
            runs[ROWS[name][0]] = row[0]
    folders = {title: [run.folder] for title, run in runs.items()}
    results = [run.full for run in runs.values()]
    first = next(iter(runs.values()))
    classes = read_json(first.folder / "test.json")["classes"]
    return plot_runs(folders, results, classes, folder)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="python -m extras.paper_tables",
        description="Make the tables of docs/RESULTS.md and README.md, and figures, from results/.")
    parser.add_argument("--schedule", default="short", choices=("short", "full"),
                        help="of reproduce.sh (default short)")
    parser.add_argument("--figures", action="store_true",
                        help="also draw loss, mIoU and per-class IoU (matplotlib)")
    return parser


def main():
    args = build_parser().parse_args()
    folder = Path(f"results/camvid-{args.schedule}")
    for path in write_tables(folder):
        print(f"{path}: tables of {folder}")
    if args.figures:
        for path in draw(folder):
            print(path)


if __name__ == "__main__":
    run_command(main)
