"""Is the run that goes on the one that was stopped? Its flags, its data, its teacher.

    args = merge_resumed_flags(no_flags, state, given)
    check_schedule(args, state, total_batch, folder)
    origin = describe_origin(train_set, unlabelled_set, val_set, teacher, class_weight)
    check_origin(state["origin"], origin, args, folder)

Each raises UsageError, in a sentence, for what would be another experiment. A run of an older
version has no "origin": it goes on unchecked, and has one from then on.
"""

import hashlib
import json
import math
import os

import torch

from extras.cli import UsageError
from extras.provenance import effective_fold_by, other_classes
from model import layer_norms

# On --resume; every other flag is the experiment.
MAY_CHANGE = ("out", "resume", "iters", "workers", "device", "eval_every", "tensorboard", "cache",
              "compile")
TEACHERS = ("teacher", "second_teacher")
PATHS = ("init", *TEACHERS, "teacher_cache", "cache")                   # and --data's folder
SPLITS = ("train", "unlabelled", "val")
HASHED = 24                                            # hexadecimal digits that are kept


# ------------------------------ flags

def absolute_paths(flags):
    """{flag: value} with its paths absolute, so that a run goes on from another folder too."""
    absolute = dict(flags)
    for name in PATHS:
        if absolute.get(name):
            absolute[name] = absolute_path(absolute[name])
    if absolute.get("data"):
        kind, colon, folder = absolute["data"].partition(":")
        if folder:
            absolute["data"] = kind + colon + absolute_path(folder)
    return absolute


def relative_paths(flags):
    """The paths among the flags, {flag: value}, as they are seen from the folder of the command."""
    relative = {}
    for name in PATHS:
        if flags.get(name):
            relative[name] = relative_path(flags[name])
    relative["data"] = relative_data(flags["data"])
    return relative


def relative_data(spec):
    """"folder:DIR", with DIR as it is seen from the folder of the command."""
    kind, colon, folder = spec.partition(":")
    return kind + colon + relative_path(folder) if folder else spec


def relative_path(path):
    """A path below this folder without what is above; any other as it is."""
    below = os.path.relpath(path)
    return path if below.startswith("..") else below


def absolute_path(text):
    return os.path.abspath(os.path.expanduser(text))


def merge_resumed_flags(no_flags, state, given):
    """The flags of a run that goes on, each a dict {name: value}.

    no_flags: every flag, None (an older run lacks newer ones); state: of the run's last.pth; given:
    those given now, of which only MAY_CHANGE may differ, the teacher's path where its content is
    known, and so the data's folder, and the folder of a teacher's answers where there is one.
    Raises UsageError.
    """
    stored = absolute_paths(state["args"])
    origin = state.get("origin") or {}
    knows_teacher = bool(origin.get("teacher"))
    knows_data = bool(origin.get("train"))
    merged = no_flags | stored
    for name, value in absolute_paths(given).items():
        is_moved_teacher = name in TEACHERS and stored.get(name) and knows_teacher
        is_moved_cache = name == "teacher_cache" and stored.get(name)
        is_moved_data = name == "data" and knows_data and is_same_kind(value, stored[name])
        if name in MAY_CHANGE or is_moved_teacher or is_moved_cache or is_moved_data:
            merged[name] = value
        elif name == "amp" and value == "auto":
            continue
        elif name == "fold_by" and value == effective_fold_by(stored["data"], stored.get(name)):
            continue                                              # the default, now spelt out
        elif value != stored.get(name):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {value} differs from the resumed run's {stored.get(name)}: "
                             "that would be another experiment; leave it out, or start a new run")
    for name in TEACHERS:
        if stored.get(name) and knows_teacher and not os.path.exists(merged[name]):
            words = name.replace("_", " ")
            flag = name.replace("_", "-")
            raise UsageError(f"the run's {words} is not at {merged[name]} any more: "
                             f"add --{flag} FILE to say where it is now")
    kind, _, folder = merged["data"].partition(":")
    if folder and knows_data and not os.path.exists(folder):
        raise UsageError(f"the run's data is not at {folder} any more: "
                         f"add --data {kind}:DIR to say where it is now")
    return merged


def is_same_kind(spec, other):
    """Are two --data of one kind, such as "camvid:DIR"?"""
    return spec.partition(":")[0] == other.partition(":")[0]


def check_schedule(args, state, total_batch, folder):
    """Raise UsageError if a run cannot go on from its training state with these flags."""
    if state["total_batch"] != total_batch:
        raise UsageError(f"{folder} was trained with {state['total_batch']} images a step, "
                         f"this would be {total_batch}")
    if state["step"] > args.iters:
        raise UsageError(f"{folder} has {state['step']} steps behind it already: "
                         "--iters can only grow")


# ------------------------------ data and teacher

def describe_origin(train_set, unlabelled_set, val_set, teacher, class_weight):
    """What a run is made from: kept in last.pth, to be found unchanged when it goes on.

    unlabelled_set: frames that only the teacher labels, or None
    teacher: as it was loaded, not folded; or None
    """
    return {
        "train": describe_frames(train_set),
        "unlabelled": describe_frames(unlabelled_set),
        "val": describe_frames(val_set),
        "class_weights": class_weight.tolist(),        # they tell a label that was changed
        "teacher": hash_network(teacher) if teacher is not None else None,
    }


def describe_frames(dataset):
    if dataset is None:
        return {"count": 0, "hash": ""}
    names = json.dumps(dataset.stems).encode()
    return {"count": len(dataset), "hash": hashlib.sha256(names).hexdigest()[:HASHED]}


def hash_network(model):
    """A hash of all that decides a network's output, in whatever format and place its file is."""
    epsilons = [norm.eps for norm in layer_norms(model)]
    facts = [type(model).__name__, epsilons]           # the tensors' names and shapes tell the rest
    content = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith("num_batches_tracked"):   # it counts, and changes nothing
            content.update(f"{name} {list(tensor.shape)}".encode())
            content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()[:HASHED]


def check_origin(before, now, args, folder):
    """Raise UsageError where a run's data or teacher is not what it was begun with."""
    if before is None:
        return
    for split in SPLITS:
        check_frames(before[split], now[split], f"{split} frames of {args.data}", folder)
    weights = zip(before["class_weights"], now["class_weights"], strict=False)
    if not all(math.isclose(old, new, rel_tol=1e-4) for old, new in weights):
        raise UsageError(f"the labels of {args.data} were changed since {folder} was begun: "
                         "put them back, or start a new run")
    if before["teacher"] != now["teacher"]:
        raise UsageError(f"{teacher_words(args)} is not the teacher that {folder} was begun with: "
                         "its content is another; add --teacher with that one, or start a new run")


def teacher_words(args):
    """"b2.pth", or "b2.pth and other.pth, with mirror images"."""
    words = args.teacher
    if args.second_teacher:
        words += f" and {args.second_teacher}"
    if args.flip_teacher:
        words += ", with mirror images"
    return words


def check_frames(before, now, what, folder):
    if before == now:
        return
    change = "have other names or another order"
    if before["count"] != now["count"]:
        change = f"are {now['count']} now, and were {before['count']}"
    raise UsageError(f"the {what} {change} since {folder} was begun: "
                     "put them back as they were, or start a new run")


def check_same_classes(before, classes, folder):
    """Raise UsageError where the student of a run has other classes than the data has now.

    before: what last.pth says, which is names, or None
    """
    if not isinstance(before, list) or not all(isinstance(name, str) for name in before):
        return                                         # load_checkpoint refuses what is neither
    if len(before) != len(classes):
        raise UsageError(f"the data has {len(classes)} classes now, and had {len(before)} when "
                         f"{folder} was begun: put classes.txt back, or start a new run")
    differ = other_classes(before, classes)
    if differ:
        old, new = differ[0]
        raise UsageError(f"the data's class {old!r} is {new!r} now, which {folder} was not begun "
                         "with: put classes.txt back, or start a new run")
