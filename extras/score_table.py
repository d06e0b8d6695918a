"""The scores of networks side by side: as text, Markdown, CSV or LaTeX.

    columns = [Column("teacher", [result]), Column("student", [result, result], seeds=[0, 1])]
    print(write_table(columns, classes, "text"))                  # or md, csv, tex

A result is what `eval.scores` gives, a seed each. A column of several seeds is mean +- standard
deviation (n - 1); its difference to the first column is taken seed by seed, over the seeds that
both have, or between the means where they share none.
"""

import csv
import io
import math
import statistics
from dataclasses import dataclass, field

FORMATS = ("text", "md", "csv", "tex")
MEANS = (("mIoU", "miou"), ("mAcc", "macc"), ("aAcc", "aacc"))
LONGEST_NAME = 24


@dataclass
class Column:
    """A network, or the seeds of one recipe."""
    name: str
    results: list
    seeds: list = field(default_factory=list)                     # one each, None: not known; or []

    def values(self, key, c=None):
        """One score of each seed: `key` of its result, for class c of a list."""
        if c is None:
            return [result[key] for result in self.results]
        return [result[key][c] for result in self.results]


@dataclass
class Table:
    """head and rows are lists of cells; sections are groups of rows, ruled off from each other."""
    head: list
    sections: list

    @property
    def rows(self):
        return [row for section in self.sections for row in section]


# ---------------------------------------------------------------- numbers

def percent(value, sign=""):
    return "-" if math.isnan(value) else f"{100 * value:{sign}.2f}"


def spread(values, sign=""):
    """Percent: mean, and +- standard deviation where there are several; sign "+": with its sign."""
    values = [100 * value for value in values]
    if any(math.isnan(value) for value in values):
        return "-"
    text = f"{statistics.mean(values):{sign}.2f}"
    if len(values) > 1:
        text += f" +- {statistics.stdev(values):.2f}"
    return text


def difference(values, seeds, base_values, base_seeds):
    """Percent: a column's values less the first column's, seed by seed where they share any.

    seeds: as many as values, None for one that is not known; or [] where none is
    """
    pairs = []
    if seeds and base_seeds:
        of_base = dict(zip(base_seeds, base_values, strict=True))
        for seed, value in zip(seeds, values, strict=True):
            if seed is not None and seed in of_base:
                pairs.append(value - of_base[seed])
    if pairs:
        return spread(pairs, "+")
    return percent(statistics.mean(values) - statistics.mean(base_values), "+")


# ---------------------------------------------------------------- tables

def class_table(columns, classes):
    """One row per class and the three means; one column per network, and its difference to the
    first."""
    head = ["IoU, %"]
    for i, column in enumerate(columns):
        head.append(shorten(column.name))
        if i > 0:
            head.append("diff")
    of_classes = [row_of(columns, label, "iou", c) for c, label in enumerate(classes)]
    of_means = [row_of(columns, label, key) for label, key in MEANS]
    return Table(head, [of_classes, of_means])


def row_of(columns, label, key, c=None):
    """-> the cells of a row of `class_table`."""
    cells = [label]
    first = columns[0]
    for i, column in enumerate(columns):
        values = column.values(key, c)
        cells.append(spread(values))
        if i > 0:
            cells.append(difference(values, column.seeds, first.values(key, c), first.seeds))
    return cells


def group_table(columns):
    """A row for each recipe: its seeds, the three means, and mIoU's difference to the first."""
    rows = []
    first = columns[0]
    for i, column in enumerate(columns):
        row = [column.name, str(len(column.results))]
        row += [spread(column.values(key)) for _, key in MEANS]
        to_first = ""
        if i > 0:
            to_first = difference(column.values("miou"), column.seeds, first.values("miou"),
                                  first.seeds)
        rows.append([*row, to_first])
    return Table(["%", "seeds", "mIoU", "mAcc", "aAcc", "mIoU to the first"], [rows])


def write_table(columns, classes, layout="text", grouped=False):
    """-> the tables of `columns` in one of FORMATS; grouped: a row for each recipe before them."""
    if layout == "csv":
        return as_csv(columns, classes, grouped)
    tables = [class_table(columns, classes)]
    if grouped:
        tables = [group_table(columns), *tables]
    writers = {"text": as_text, "md": as_markdown, "tex": as_latex}
    return "\n\n".join(writers[layout](table) for table in tables)


def table(names, results, classes):
    """Text: one row per class and the three means; one column per network, and its difference to
    the first.

    results: what `eval.scores` gives, one per network, in the order of `names`.
    """
    columns = [Column(name, [result]) for name, result in zip(names, results, strict=True)]
    return write_table(columns, classes)


def shorten(name, longest=LONGEST_NAME):
    """The end of a long name, which tells paths apart."""
    return name if len(name) <= longest else "..." + name[3 - longest:]


# ---------------------------------------------------------------- formats

def as_text(table):
    """In columns of a terminal: the first to the left, all others to the right."""
    widths = []
    for i, cells in enumerate(zip(table.head, *table.rows, strict=True)):
        longest = max(len(cell) for cell in cells)
        smallest = 8 if cells[0] == "diff" else 10
        width = max(16, longest) if i == 0 else max(smallest, longest + 2)
        widths.append(width)
    head = align(table.head, widths)
    rule = "-" * len(head)
    lines = [head]
    for section in table.sections:
        lines.append(rule)
        lines += [align(row, widths) for row in section]
    return "\n".join(lines)


def align(cells, widths):
    padded = [cells[0].ljust(widths[0])]
    for cell, width in zip(cells[1:], widths[1:], strict=True):
        padded.append(cell.rjust(width))
    return "".join(padded)


def as_markdown(table):
    return markdown(table.head, table.rows)


def markdown(head, rows):
    lines = []
    for cells in [head, ["---"] * len(head), *rows]:
        escaped = [cell.replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)


def as_latex(table):
    """A tabular, without other packages."""
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", "\\hline",
             latex_row(table.head)]
    for section in table.sections:
        lines.append("\\hline")
        lines += [latex_row(row) for row in section]
    lines += ["\\hline", "\\end{tabular}"]
    return "\n".join(lines)


LATEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$",
         "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def latex_row(cells):
    written = []
    for i, cell in enumerate(cells):
        text = "".join(LATEX.get(letter, letter) for letter in cell)
        is_number = i > 0 and any(letter.isdigit() for letter in cell)
        if is_number and cell[0] in "+-0123456789":
            text = f"${text.replace('+-', chr(92) + 'pm')}$"
        written.append(text)
    return " & ".join(written) + r" \\"


def as_csv(columns, classes, grouped):
    """For machines: a row for each network or recipe, percent; grouped: with deviations."""
    scored = [(label, key, None) for label, key in MEANS]
    scored += [(f"IoU {label}", "iou", c) for c, label in enumerate(classes)]
    head = ["name"]
    if grouped:
        head.append("seeds")
    for label, _, _ in scored:
        head.append(label)
        if grouped:
            head.append(f"{label} deviation")
    rows = []
    for column in columns:
        row = [column.name]
        if grouped:
            row.append(len(column.results))
        for _, key, c in scored:
            row += csv_cells(column.values(key, c), grouped)
        rows.append(row)
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows([head, *rows])
    return sheet.getvalue().rstrip("\n")


def csv_cells(values, grouped):
    """-> [mean], or with `grouped` [mean, standard deviation]; "" for what is not defined."""
    percents = [100 * value for value in values]
    if any(math.isnan(value) for value in percents):
        return ["", ""] if grouped else [""]
    cells = [f"{statistics.mean(percents):.4f}"]
    if grouped:
        deviation = f"{statistics.stdev(percents):.4f}" if len(percents) > 1 else ""
        cells.append(deviation)
    return cells
