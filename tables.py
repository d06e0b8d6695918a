"""The README's CamVid tables and the paper's figures 4-6, made from what reproduce.sh left in results/.

    python tables.py                          # writes them into README.md, between its marks
    python tables.py --schedule full          # of the other schedule
    python tables.py --figures                # also results/camvid-SCHEDULE/{loss,miou,radar}.png; needs matplotlib

A number in these tables was never typed. A row that was not run is named below its table; a cell over several seeds is
mean +- standard deviation (n - 1), and the difference to B0 (of the same steps; of tuned rows to the tuned B0) is taken seed by seed.
"""

import argparse
import csv
import json
import re
import statistics
import sys
from pathlib import Path

ROWS = {                                                          # row of reproduce.sh: (what it is called, its network in bench.py if that is timed)
    "b2": ("B2, the teacher", "SegFormer-B2"), "b0": ("B0", "SegFormer-B0"), "b0-dyt": ("+ Tanh", "+ Tanh"),
    "b0-dyt-dyl": ("+ Tanh + Linear", "+ Tanh + Linear"), "b0-kd": ("+ KD (CSKD + PEKD)", "SegFormer-B0"),
    "b0-df": ("+ Dice-Focal", "SegFormer-B0"), "b0-fd": ("CSKD alone", "SegFormer-B0"), "b0-pe": ("PEKD alone", "SegFormer-B0"),
    "b0-dyt-fd": ("+ Tanh, CSKD alone", "+ Tanh"), "b0-kl-1": ("KL alone, T = 1", "SegFormer-B0"), "b0-kl-4": ("KL alone, T = 4", "SegFormer-B0"),
    "b0-all": ("all: KD + KL (T = 4) + Dice-Focal + Tanh + Linear", "+ Tanh + Linear"),
    "b0-long": ("B0, longer", "SegFormer-B0"), "b0-kd-long": ("+ KD, longer", "SegFormer-B0"), "b0-dyt-long": ("+ Tanh, longer", "+ Tanh"),
    "b0-dyt-fd-long": ("+ Tanh, CSKD alone, longer", "+ Tanh"), "b0-tuned": ("B0, longer, tuned", "SegFormer-B0"),
    "b0-kd-tuned": ("+ KD, longer, tuned", "SegFormer-B0"), "b0-dyt-tuned": ("+ Tanh, longer, tuned", "+ Tanh"),
    "b0-dyt-fd-tuned": ("+ Tanh, CSKD alone, longer, tuned", "+ Tanh"), "b2-tuned": ("B2 + Tanh, tuned, another teacher", None),
    "b0-dyt-fd-b2-tuned": ("+ Tanh, CSKD alone from it, longer, tuned", "+ Tanh")}
RATES = {"3e-4": "-lr-3e-4", "6e-4": "", "1.2e-3": "-lr-1.2e-3", "2.4e-3": "-lr-2.4e-3", "4.8e-3": "-lr-4.8e-3"}          # learning rate: what its rows' names end with
STUDY = {"b0": "B0", "kl-1.0": "KL, w = 1.0", "kl-0.5": "KL, w = 0.5", "b2": "B2, the teacher"}
FIGURES = ("b0", "b0-kd", "b0-df", "b0-dyt")                      # the paper's four
BENCH = Path("results/bench/cpu-2-threads.json")


def read_row(folder, files=("test", "quarter")):
    """-> [{"full", "quarter": scores, "recipe"}], one a seed; [] for a row that was not run. The study has no quarter."""
    found = []
    for seed in sorted(path.parent for path in folder.glob("*/scores.csv")):          # the last file that reproduce.sh writes
        full, *quarter = (json.loads((seed / f"{name}.json").read_text())["checkpoints"][0] for name in files)
        found.append(dict(full=full, quarter=quarter and quarter[0], recipe=json.loads((seed / "recipe.json").read_text()), folder=seed))
    return found


def spread(values, sign=""):
    """Percent: mean, and +- standard deviation where there are several; sign "+": with its sign."""
    values = [100 * value for value in values]
    return f"{statistics.mean(values):{sign}.2f}" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def difference(runs, base):
    """Percent: run - base, over the seeds that both have."""
    seeds = {run["recipe"]["seed"]: run["full"]["miou"] for run in base}
    pairs = [run["full"]["miou"] - seeds[run["recipe"]["seed"]] for run in runs if run["recipe"]["seed"] in seeds]
    return spread(pairs, "+") if pairs else ""


def baseline(found, name):
    """-> the runs of the plain B0 that row `name` is held against: of as many steps, and a tuned row against a tuned one; [] where there is none."""
    def steps(runs):
        return [run["recipe"]["iters"] for run in runs[:1]]
    plain = ["b0-tuned"] if name.endswith("-tuned") else ["b0", "b0-long"]
    return next((found[base] for base in plain if steps(found[base]) == steps(found[name])), [])


def markdown(head, rows):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def odd_ones(found, what, usual, title):
    """-> the sentence that names the rows and seeds whose what(recipe) is not `usual`; "" where there are none."""
    groups = {}
    for name, runs in found.items():
        for recipe in (run["recipe"] for run in runs):
            if (value := what(recipe)) not in (None, usual):
                groups.setdefault(value, {}).setdefault(ROWS[name][0], []).append(str(recipe["seed"]))
    named = {value: (f"{row} (seed {' and '.join(seeds)})" for row, seeds in rows.items()) for value, rows in sorted(groups.items())}
    return "".join(f"\n\n{title.format(value)}: {'; '.join(rows)}." for value, rows in named.items())


def teacher_seed(recipe):
    """-> the seed of the run that taught this one, from the folder that reproduce.sh gave it; None without a teacher"""
    return recipe["teacher"] and Path(recipe["teacher"]).parent.name.rsplit("-", 1)[1]


def table_2(folder):
    """The paper's Table 2 on CamVid's official split -> markdown."""
    speed = {row["network"]: row for row in json.loads(BENCH.read_text())["results"]["model"] if "network" in row}
    found = {name: read_row(folder / name) for name in ROWS}
    rows = []
    for name, (title, network) in ROWS.items():
        if runs := found[name]:
            base = baseline(found, name)
            cells = [spread(run[where][key] for run in runs) for where, key in (("full", "miou"), ("full", "macc"), ("full", "aacc"), ("quarter", "miou"))]
            timed = [f"{speed[network]['macs_published'] / 1e9:.2f}", f"{speed[network]['fps_folded']:.2f}"] if network else ["-", "-"]
            rows.append([title, f"{runs[0]['recipe']['parameters']:,}", *timed,
                         str(runs[0]["recipe"]["iters"]), str(len(runs)), *cells, "" if runs is base else difference(runs, base)])
    missing = [title for name, (title, _) in ROWS.items() if not found[name]]
    first = found["b0"][0]["recipe"]["amp"]
    return markdown(["", "parameters", "G MACs", "FPS", "steps", "seeds", "mIoU", "mAcc", "aAcc", "mIoU at a quarter", "to B0"], rows) \
        + odd_ones(found, teacher_seed, "0", "From the teacher of seed {}") + odd_ones(found, lambda recipe: recipe["amp"], first, "With --amp {}") \
        + (f"\n\nNot run yet: {'; '.join(missing)}." if missing else "")


def rates(folder):
    """The baseline and what paid at other learning rates, over the seeds that all of them have: mIoU on test, and on val, by
    which a rate may be chosen -> markdown."""
    names = ("b0", "b0-dyt", "b0-kd", "b0-dyt-fd")
    found = {name + end: {run["recipe"]["seed"]: run for run in read_row(folder / (name + end))} for name in names for end in RATES.values()}
    seeds = set.intersection(*(set(runs) for runs in found.values() if runs))

    def cell(runs):
        runs = [runs[seed] for seed in sorted(seeds) if seed in runs]
        val = (list(csv.DictReader((run["folder"] / "scores.csv").read_text().splitlines()))[-1]["miou"] for run in runs)          # of the last checkpoint too
        return f"{spread(run['full']['miou'] for run in runs)} ({spread(map(float, val))})" if runs else "-"
    return markdown([f"learning rate, seed {', '.join(map(str, sorted(seeds)))}", *RATES],
                    [[ROWS[name][0], *(cell(found[name + end]) for end in RATES.values())] for name in names])


def study(folder):
    """The KL study: per-class IoU, mean over the two folds, by whole drives and by shuffled frames -> markdown."""
    text, missing = [], []
    for by, title in (("drive", "folds of whole drives"), ("shuffle", "folds of shuffled frames, which leak")):
        folds = {name: [run for fold in (0, 1) for run in read_row(folder / f"study-{by}-{fold}-{name}", ("test",))] for name in STUDY}
        missing += [f"{STUDY[name]}, {title}" for name, runs in folds.items() if len(runs) < 2]
        whole = {name: runs for name, runs in folds.items() if len(runs) == 2}
        if whole:
            classes = json.loads((next(iter(whole.values()))[0]["folder"] / "test.json").read_text())["classes"]
            rows = [[STUDY[name], *(f"{50 * sum(run['full']['iou'][c] for run in runs):.1f}" for c in range(len(classes))),
                     *(f"{50 * sum(run['full'][key] for run in runs):.2f}" for key in ("miou", "macc", "aacc")), str(runs[0]["recipe"]["iters"])] for name, runs in whole.items()]
            text.append(f"{title[0].upper()}{title[1:]}:\n\n" + markdown(["", *classes, "mIoU", "mAcc", "aAcc", "steps"], rows))
    return "\n\n".join(text + ([f"Not run yet: {'; '.join(missing)}."] if missing else []))


def insert(readme, name, content):
    """Put `content` between the marks of `name`. Raises ValueError where README has none."""
    pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(readme):
        raise ValueError(f"README.md has no mark <!-- {name}: ... -->")
    return pattern.sub(lambda match: match[1] + content + "\n" + match[2], readme)


def draw(folder):
    """-> the figures' files"""
    from plot import plot_runs
    runs = {name: read_row(folder / name)[0] for name in FIGURES if read_row(folder / name)}
    classes = json.loads((next(iter(runs.values()))["folder"] / "test.json").read_text())["classes"]
    return plot_runs({ROWS[name][0]: run["folder"] for name, run in runs.items()}, [run["full"] for run in runs.values()], classes, folder)


def main():
    parser = argparse.ArgumentParser(description="Make the README's CamVid tables and figures from results/.")
    parser.add_argument("--schedule", default="short", choices=("short", "full"))
    parser.add_argument("--figures", action="store_true", help="also draw loss, mIoU and per-class IoU (matplotlib)")
    args = parser.parse_args()
    folder, readme = Path(f"results/camvid-{args.schedule}"), Path("README.md")
    try:
        if not read_row(folder / "b0"):
            raise ValueError(f"{folder} holds no row b0 yet: DATA=camvid:DIR ./reproduce.sh {args.schedule} b0")
        text = readme.read_text()
        for name, make in (("table 2", table_2), ("rates", rates), ("study", study)):
            text = insert(text, name, make(folder))
        readme.write_text(text)
        print(f"README.md: tables of {folder}")
        for path in draw(folder) if args.figures else []:
            print(path)
    except ImportError:
        print("error: --figures needs matplotlib: pip install matplotlib", file=sys.stderr)
        sys.exit(2)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
