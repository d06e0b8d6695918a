"""The tables of a registered study (docs/RESULTS.md), from what reproduce.sh left of it:
results/camvid-small-rates and results/camvid-small-registered, or those of camvid-small-bf16 and of
camvid-small-losses.

    rate_table(Path("results"), "camvid-small")       # each row's rates on val: the best is chosen
    row_table(Path("results"), "camvid-small")        # every row at its rate, on test
    outcome_table(Path("results"), "camvid-small")    # differences, the primary outcome first
    summary_table(Path("results"), "camvid-small")    # the README's six rows
    few_labels_table(Path("results"), "camvid-small") # a quarter and a half of the labels, on test
    few_labels_outcome(Path("results"), "camvid-small")  # and their differences
    losses_outcome(Path("results"), "camvid-small")   # losses to no teacher, each for as long

Made by `python -m extras.paper_tables`, as all tables of docs/RESULTS.md. What was not run is no
row of a table.
"""

from extras.cli import UsageError
from extras.lever_table import format_rate
from extras.registered import read_rates
from extras.result_rows import difference, difference_table, read_row, steps
from extras.score_table import markdown, spread

ROWS = {
    "teacher": "B2 + DyT, the teacher",
    "b0": "B0",
    "b0-dyt": "B0 + DyT",
    "b0-fd": "B0 + CSKD",
    "b0-dyt-fd": "B0 + DyT + CSKD",
    "b0-dyt-as-long": "B0 + DyT, for as long as with CSKD",
    "b0-dyt-as-long-as-both": "B0 + DyT, for as long as with CSKD and its teacher",
    "b0-dyt-kd": "B0 + DyT + CSKD + PEKD",
    "b0-dyt-cosine": "B0 + DyT + cosine of pixels",
    "b0-dyt-gcos": "B0 + DyT + one cosine a stage",
    "b0-dyt-cwd": "B0 + DyT + CWD",
    "b0-dyt-dist": "B0 + DyT + DIST",
    "b0-dyt-kl": "B0 + DyT + KL, T = 4",
    "b0-dyt-zkl": "B0 + DyT + KL of z-scores",
    "b0-dyt-kl-two": "B0 + DyT + KL, two teachers and flip",
    "b0-dyt-features-first": "B0 + DyT, features first",
}

# With a share of the labels
FEW_LABELS = {
    "few-0.25-teacher": "a quarter of the labels: B2 + DyT, the teacher",
    "few-0.25-alone": "a quarter of the labels: B0 + DyT",
    "few-0.25-taught": "a quarter of the labels: B0 + DyT, taught on all frames",
    "few-0.5-teacher": "half of the labels: B2 + DyT, the teacher",
    "few-0.5-alone": "half of the labels: B0 + DyT",
    "few-0.5-taught": "half of the labels: B0 + DyT, taught on all frames",
}

# The README's: the method, its parts, and what the same time buys without a teacher
SUMMARY = ("teacher", "b0", "b0-fd", "b0-dyt", "b0-dyt-fd", "b0-dyt-as-long")

# (row, what it is held against); the first is the primary outcome.
PAIRS = (
    ("b0-dyt-fd", "b0-dyt-as-long"),
    ("b0-dyt-fd", "b0-dyt-as-long-as-both"),
    ("b0-dyt-fd", "b0-dyt"),
    ("b0-fd", "b0"),
    ("b0-dyt", "b0"),
    ("b0-dyt-fd", "b0-fd"),
    ("b0-dyt-cosine", "b0-dyt-fd"),
    ("b0-dyt-gcos", "b0-dyt-fd"),
    ("b0-dyt-cwd", "b0-dyt-fd"),
    ("b0-dyt-dist", "b0-dyt-fd"),
    ("b0-dyt-kl", "b0-dyt-fd"),
    ("b0-dyt-zkl", "b0-dyt-fd"),
    ("b0-dyt-kl-two", "b0-dyt-fd"),
    ("b0-dyt-features-first", "b0-dyt-fd"),
)

# Losses in CSKD's place, each trained for as long as CSKD
LOSSES_PAIRS = (
    ("b0-dyt-fd", "b0-dyt-as-long"),
    ("b0-dyt-kd", "b0-dyt-as-long"),
    ("b0-dyt-cosine", "b0-dyt-as-long"),
    ("b0-dyt-gcos", "b0-dyt-as-long"),
    ("b0-dyt-cwd", "b0-dyt-as-long"),
    ("b0-dyt-dist", "b0-dyt-as-long"),
    ("b0-dyt-kl", "b0-dyt-as-long"),
    ("b0-dyt-zkl", "b0-dyt-as-long"),
    ("b0-dyt-kl-two", "b0-dyt-as-long"),
    ("b0-dyt-kl-two", "b0-dyt-kl"),
    ("b0-dyt-features-first", "b0-dyt-as-long"),
)

FEW_LABELS_PAIRS = (
    ("few-0.25-taught", "few-0.25-alone"),
    ("few-0.5-taught", "few-0.5-alone"),
)


def rates_of(folder, row):
    """-> {learning rate: mIoU on val}; {} for a row that was tried at none."""
    try:
        found = read_rates(folder, row)
    except UsageError:
        return {}
    return {format_rate(float(rate.rate)): rate.val for rate in found}


def rate_table(results, study):
    """mIoU on val of seed 0, the best of a row in bold -> markdown"""
    tried = {}
    all_rates = set()
    for name in ROWS:
        rates = rates_of(results / f"{study}-rates", name)
        if rates:
            tried[name] = rates
            all_rates.update(rates)
    columns = sorted(all_rates, key=float)
    rows = []
    for name, rates in tried.items():
        best = max(rates.values())
        cells = [ROWS[name]]
        for rate in columns:
            value = rates.get(rate)
            text = "-" if value is None else f"{100 * value:.2f}"
            cells.append(f"**{text}**" if value == best else text)
        rows.append(cells)
    return markdown(["learning rate", *columns], rows)


def row_table(results, study, titles=ROWS):
    """Every row at the rate that was chosen: mean +- standard deviation over seeds -> markdown"""
    head = ["", "learning rate", "steps", "seeds", "mIoU", "mAcc", "aAcc", "val mIoU"]
    rows = []
    for name, title in titles.items():
        runs = read_row(results / f"{study}-registered" / name)
        if not runs:
            continue
        rows.append([
            title,
            format_rate(runs[0].recipe["lr"]),
            f"{steps(runs):,}",
            str(len(runs)),
            spread(run.full["miou"] for run in runs),
            spread(run.full["macc"] for run in runs),
            spread(run.full["aacc"] for run in runs),
            spread(run.val for run in runs),
        ])
    return markdown(head, rows)


def outcome_table(results, study):
    """The differences in mIoU on test, seed by seed, with the 95 % interval of their mean."""
    return difference_table(results / f"{study}-registered", PAIRS, ROWS)


def losses_outcome(results, study):
    """What each loss is worth in the same time, as outcome_table."""
    return difference_table(results / f"{study}-registered", LOSSES_PAIRS, ROWS)


def few_labels_table(results, study):
    """The rows with a share of the labels, as row_table."""
    return row_table(results, study, FEW_LABELS)


def few_labels_outcome(results, study):
    """What a teacher of the same few labels is worth, as outcome_table."""
    return difference_table(results / f"{study}-registered", FEW_LABELS_PAIRS, FEW_LABELS)


def summary_table(results, study):
    """The README's rows on test: what they score, and how far the students are from the plain B0.
    """
    base = read_row(results / f"{study}-registered" / "b0")
    rows = []
    for name in SUMMARY:
        runs = read_row(results / f"{study}-registered" / name)
        if not runs:
            continue
        rows.append([
            ROWS[name],
            format_rate(runs[0].recipe["lr"]),
            f"{steps(runs):,}",
            str(len(runs)),
            spread(run.full["miou"] for run in runs),
            "" if name in ("b0", "teacher") else difference(runs, base),
        ])
    return markdown(["", "learning rate", "steps", "seeds", "mIoU", "to B0"], rows)
