"""What a checkpoint was trained on, and whether it may be scored, or teach, on the data at hand.

A checkpoint carries the names of its classes and `trained_on`: the flags --data, --fold, --folds,
--fold-by and --with-val of its training. They answer three questions:

    check_classes(model, path, dataset)    are its classes the data's? else an error
    warn_of_leak(model, path, args)        has it seen frames that are held out now? then a warning
    choose_data(args, models)              what to score it on when no --data is given

And refuse_prompts(path, advice): is it a student of extras/prompt.py, whose outputs are no classes?
"""

import sys
from pathlib import Path

from data import READERS
from extras.cli import UsageError
from extras.printable import printable
from model import read_checkpoint

# ---------------------------------------------------------------- classes

def other_classes(names, others):
    """-> the pairs of names that stand at one place and differ in more than case."""
    pairs = zip(names, others, strict=False)
    return [(name, other) for name, other in pairs if name.lower() != other.lower()]


def has_classes_of(model, dataset):
    """Are the model's classes the data's? A model that has no names for them may be trusted."""
    same_count = model.num_classes == len(dataset.classes)
    return same_count and not other_classes(model.classes or (), dataset.classes)


def check_classes(model, path, dataset):
    """Refuse a model of other classes than the data's: its scores or lessons would be nonsense."""
    if model.num_classes != len(dataset.classes):
        raise UsageError(f"{path} has {model.num_classes} classes, "
                         f"the data ({dataset.name}) has {len(dataset.classes)}")
    differ = other_classes(model.classes or (), dataset.classes)
    if differ:
        own, other = differ[0]
        raise UsageError(f"{path} was trained on other classes than {dataset.name}'s: "
                         f"its {own!r} stands where the data has {other!r}")


def refuse_prompts(path, advice):
    """Refuse a student that is told what to segment: as a SegFormer it gives vectors, not classes.

    advice: which command is the right one. Raises UsageError, CheckpointError for a broken file.
    """
    if Path(path).is_file() and "prompt" in read_checkpoint(path):
        raise UsageError(f"{path} is a student that is told what to segment: {advice}")


def check_finite(model, path):
    """Refuse a network with a weight that is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UsageError(f"{path}: its weights are not finite, first {name}")


# ---------------------------------------------------------------- data and folds

def training_data(model):
    """-> {"data", "fold", "folds", "fold_by"} of a model's training; None where it does not say."""
    trained = model.trained_on
    if not isinstance(trained, dict) or not isinstance(trained.get("data"), str):
        return None
    if trained.get("fold") is None:                               # then the other two say nothing
        return {"data": trained["data"], "fold": None, "folds": None, "fold_by": None}
    return {
        "data": trained["data"],
        "fold": trained["fold"],
        "folds": trained.get("folds"),
        "fold_by": effective_fold_by(trained["data"], trained.get("fold_by")),
    }


def effective_fold_by(spec, fold_by):
    """What folds of the data `spec` are made by with this --fold-by: None is the data's own way."""
    kind = spec.partition(":")[0]
    if fold_by is None and kind in READERS:
        return READERS[kind].fold_by
    return fold_by


def warn_of_leak(model, path, args):
    """Warn when the folds that a model was trained on are not those of `args`, or val was trained
    on too: it has seen frames.

    args: data, fold, folds and fold_by, as the flags of train.py and eval.py; of eval.py also split
    """
    trained = training_data(model)
    now = {name: getattr(args, name) for name in ("data", "fold", "folds", "fold_by")}
    if trained is None or not is_same_data(trained["data"], now["data"]):
        return
    # The official split, in training and now: it keeps the frames apart.
    if trained["fold"] is None and now["fold"] is None:
        is_scored_on_val = getattr(args, "split", "val") == "val"
        if model.trained_on.get("with_val") and is_scored_on_val:
            print(f"warning: {path} was trained on the frames of val too (--with-val), and is "
                  f"scored on them now", file=sys.stderr)
        return
    now["fold_by"] = effective_fold_by(now["data"], now["fold_by"])
    before = describe_fold(trained)
    after = describe_fold(now)
    if before == after:
        return
    moved = ""
    if trained["data"] != now["data"]:
        moved = f", if {printable(trained['data'])} was the same data"
    print(f"warning: {path} was trained with {before} held out, and now it is {after}: "
          f"it has seen frames that it is scored on{moved}", file=sys.stderr)


def is_same_data(spec, other):
    """Do two --data mean one data set, even if its folder was moved?"""
    kind, _, folder = spec.partition(":")
    other_kind, _, other_folder = other.partition(":")
    if kind != other_kind:
        return False
    # There is one CamVid, wherever it lies; folders of one's own are told by their names.
    if kind != "folder":
        return True
    return full_path(folder).name == full_path(other_folder).name


def full_path(text):
    """A path as it was meant; one of nobody's home, or that is none, as it is written."""
    try:
        return Path(text).expanduser().resolve()
    except (RuntimeError, ValueError, OSError):
        return Path(text)


def validation_name(args):
    """What the frames that a run is scored on are called: "val", or "fold 0 of 2"."""
    if args.fold is None:
        return "val"
    return describe_fold(vars(args))


def describe_fold(choice):
    """{"fold", "folds", "fold_by"} in words."""
    if choice["fold"] is None:
        return "the official split"
    words = f"fold {choice['fold']} of {choice['folds']}"
    if choice["fold_by"]:
        words += f" by {printable(choice['fold_by'])}"
    return words


def choose_data(args, models):
    """Without --data: set it, and the fold flags that were not given, to the models' training.

    models: {path: model}. Raises UsageError where they do not say, or do not agree.
    """
    adopted = args.data is None
    if adopted:
        trained = common_training_data(models)
        args.data = trained["data"]
        for name in ("fold", "folds", "fold_by"):
            if getattr(args, name) is None:
                setattr(args, name, trained[name])
    if args.folds is None:
        args.folds = 2
    if adopted:
        first = next(iter(models))
        print(f"data: {printable(args.data)}, {describe_fold(vars(args))}, "
              f"as {first} was trained (no --data)")


def common_training_data(models):
    """{path: model} -> what the first was trained on, see `training_data`. Raises UsageError."""
    first, *others = models
    trained = training_data(models[first])
    if trained is None:
        raise UsageError(f"{first} does not say what it was trained on: "
                         "add --data (toy, camvid:DIR, cityscapes:DIR or folder:DIR)")
    for path in others:
        other = training_data(models[path])
        if other is not None and not agree(trained, other):
            raise UsageError(f"{first} and {path} were not trained on the same data and fold: "
                             "add --data to say what to score them on")
    kind, _, folder = trained["data"].partition(":")
    if kind != "toy" and not full_path(folder).is_dir():
        raise UsageError(f"{first} was trained on {trained['data']}, which is not there: "
                         f"add --data {kind}:DIR to say where it is now")
    return trained


def agree(trained, other):
    """Are two `training_data` of one data set and fold?"""
    if describe_fold(trained) != describe_fold(other):
        return False
    if not is_same_data(trained["data"], other["data"]):
        return False
    return not are_two_folders(trained["data"], other["data"])


def are_two_folders(spec, other):
    """Are two "folder:DIR" of one name both there, and two? Then none is the other, moved."""
    kind, _, folder = spec.partition(":")
    other_folder = other.partition(":")[2]
    if kind != "folder":
        return False
    folder = full_path(folder)
    other_folder = full_path(other_folder)
    return folder != other_folder and folder.is_dir() and other_folder.is_dir()
