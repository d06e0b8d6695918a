"""Which runs are seeds of one recipe.

    groups = group_runs(["runs/kd/0", "runs/kd/1", "runs/plain/0"])
    [(group.name, group.members, group.seeds) for group in groups]
    # [("kd", [0, 1], [0, 1]), ("plain", [2], [0])]

Runs belong together when their recipe.json, which train.py writes, is the same but for the seed and
for what changes no result: folders, workers, the machine. Teachers are compared by their recipes
too, where these are there. With names given, the runs of one name belong together.
"""

import json
import sys
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path

from extras.cli import UsageError

# Of a recipe: what may differ between the seeds of one row.
FREE = ("seed", "out", "command", "commit", "cache", "workers", "tensorboard", "resume", "device",
        "device_used", "device_name", "threads", "torch", "compile", "eval_every", "fit_log",
        "teacher", "second_teacher", "teacher_cache", "class_weight", "processes", "resumed")


@dataclass
class Group:
    name: str
    members: list = field(default_factory=list)                   # places in the list of runs
    seeds: list = field(default_factory=list)                     # None where it is not known


def read_recipe(folder):
    """-> recipe.json of a run, or None where there is none."""
    path = Path(folder) / "recipe.json"
    try:
        recipe = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UsageError(f"{path}: not a recipe that can be read") from None
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: not a recipe that can be read")
    return recipe


def kernel(recipe, depth=0):
    """What a recipe says but for what is FREE, and of its teacher the same, where its run is there.

    A flag that is off is left out: recipes from before there was such a flag do without it too.
    """
    kept = {}
    for name, value in recipe.items():
        if name not in FREE and not is_off(name, recipe):
            kept[name] = value
    if isinstance(kept.get("class_weights"), list):               # before it was the flag's name
        kept["class_weights"] = "enet"
    for name in ("teacher", "second_teacher"):
        file = recipe.get(name)
        if file is None:
            continue
        known = read_recipe(Path(file).parent) if depth < 4 else None
        if known:
            kept[name] = [Path(file).name, kernel(known, depth + 1)]        # best.pth or last.pth
        else:
            kept[name] = file
    return kept


def is_off(name, recipe):
    """Does this field change nothing: no value, a loss of weight 0, or the temperature of one?"""
    value = recipe[name]
    if value is None or value is False:
        return True
    if name == "unlabelled_frames" or name.startswith("lambda_"):
        return value == 0
    if name.endswith("temperature"):
        term = name.removesuffix("temperature").rstrip("_") or "kl"
        return not recipe.get(f"lambda_{term}")
    return False


def group_runs(folders, names=None):
    """-> [Group], in the order of their first run. names: one for each run, or None.

    Raises UsageError where no recipe says what belongs together, and for two runs of one seed in a
    group: a deviation over these would say nothing.
    """
    recipes = [read_recipe(folder) for folder in folders]
    groups = {}
    for i, folder in enumerate(folders):
        recipe = recipes[i]
        if names:
            key = names[i]
        elif recipe is None:
            raise UsageError(f"{folder}: there is no recipe.json, which says what it is a seed of; "
                             f"give --names, the same name for the seeds of a row")
        else:
            key = json.dumps(kernel(recipe), sort_keys=True)
        group = groups.setdefault(key, Group(names[i] if names else ""))
        group.members.append(i)
        group.seeds.append(recipe.get("seed") if recipe else None)
    found = list(groups.values())
    for group in found:
        check_seeds(group, folders)
        if names:
            warn_of_recipes(group, recipes)
    if not names:
        name_groups(found, folders)
    return found


def check_seeds(group, folders):
    known = [seed for seed in group.seeds if seed is not None]
    if len(set(known)) < len(known):
        doubles = [folders[i] for i in group.members]
        raise UsageError(f"--group: two runs of {', '.join(map(str, doubles))} have one seed, so "
                         f"they are no repetitions of each other")


def warn_of_recipes(group, recipes):
    """Say in what the recipes of one name differ."""
    known = [kernel(recipes[i]) for i in group.members if recipes[i] is not None]
    differing = set()
    for other in known[1:]:
        for name in known[0].keys() | other.keys():
            if known[0].get(name) != other.get(name):
                differing.add(name)
    if differing:
        print(f"warning: the runs called {group.name!r} differ in {', '.join(sorted(differing))}",
              file=sys.stderr)


def name_groups(groups, folders):
    """Call each group by what the folders of its runs begin with, less the seed."""
    for group in groups:
        paths = [str(Path(folders[i]).resolve()) for i in group.members]
        common = commonprefix(paths) if len(paths) > 1 else paths[0]
        if common.endswith("/"):                                  # runs/kd/0 and runs/kd/1
            common = common.rstrip("/")
        name = Path(common).name.rstrip("-_. ")
        group.name = name.removesuffix("seed").rstrip("-_. ") or common
    names = [group.name for group in groups]
    for group in groups:
        if names.count(group.name) > 1:
            group.name = str(folders[group.members[0]])
