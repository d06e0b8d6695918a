"""What last.pth holds beside the student, and the checks before any of it is used.

    check_training_state(state, path)                             # by itself
    check_fits(state, run, path)                                  # to the networks of this run
    progress = restore(state, run)

The file may be a stranger's, or be damaged where no checksum looks. A moment of AdamW of another
shape than its weight makes the fused kernel read beyond it: the process would be killed. So
everything is looked at before anything is loaded, and what is wrong is a UsageError in a sentence.
"""

import math

import torch

from extras.checkpoint_checks import is_plain
from extras.cli import UsageError

NEEDED = {"step", "args", "optimizer", "scaler", "best_scores", "total_batch"}
MOMENTS = {"exp_avg", "exp_avg_sq"}                    # of AdamW, shaped as their parameter
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
MOST_STEPS = 10**15                                    # so that a step's seed fits 64 bits


def new_progress():
    """What a run has come to: kept in last.pth beside the weights."""
    return {
        "step": 0,
        "seconds": 0.0,  # of training
        "best_scores": None,
        "teacher_scores": None,
        "skipped": 0,  # steps that fp16's scaler left out
        "skipped_in_a_row": 0,
        "origin": None,  # see same_run.describe_origin
    }


def restore(state, run):
    """Put the checked training state of a last.pth beside the student's weights. -> its progress"""
    objective = run.objective
    if objective.projections is not None:
        objective.projections.load_state_dict(state["projections"])
    if "student" in state:  # beside its average, with --ema
        objective.student.load_state_dict(state["student"])
    # The groups are made of the run's flags, so the file's own add nothing. The clones are
    # dense, and no two of them share their memory, whatever the file says.
    moments = {}
    for number, entry in state["optimizer"]["state"].items():
        moments[number] = {name: torch.as_tensor(value).clone() for name, value in entry.items()}
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    progress = new_progress()
    for name, value in progress.items():
        progress[name] = state.get(name, value)  # an older version's file lacks what came later
    return progress


# ------------------------------ by itself

def check_training_state(state, path):
    """Raise UsageError where `state` is no training state, whatever its networks are."""
    if not isinstance(state, dict) or not set(state) >= NEEDED:
        raise UsageError(f"{path} is a checkpoint but not a run: it has no training state")
    is_right = {
        "step": is_count(state["step"], MOST_STEPS),
        "seconds": is_duration(state.get("seconds", 0.0)),
        "total_batch": is_count(state["total_batch"]) and state["total_batch"] > 0,
        "args": is_dict_of_names(state["args"]),
        "optimizer": isinstance(state["optimizer"], dict),
        "scaler": isinstance(state["scaler"], dict),
        "best_scores": is_scores(state["best_scores"], "step"),
        "teacher_scores": is_scores(state.get("teacher_scores")),
        "skipped": is_count(state.get("skipped", 0)),
        "skipped_in_a_row": is_count(state.get("skipped_in_a_row", 0)),
        "origin": is_origin(state.get("origin")),
    }
    require(is_right, path)


def require(is_right, path):
    """{name: does it hold?} -> UsageError for the first that does not."""
    for name, holds in is_right.items():
        if not holds:
            raise UsageError(f"{path} is damaged: the {name!r} of its training state is not what "
                             "this project writes")


def is_count(value, most=2**63):
    """A whole number from 0; True is none."""
    return type(value) is int and 0 <= value <= most


def is_number(value):
    return type(value) in (int, float)


def is_duration(value):
    return is_number(value) and 0 <= value < math.inf


def is_dict_of_names(value):
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def is_scores(value, *more):
    """None, or what eval.scores gives; `more`: names of counts that stand beside."""
    if value is None:
        return True
    if not is_dict_of_names(value) or not isinstance(value.get("iou"), list):
        return False
    means = [value.get(name) for name in ("miou", "macc", "aacc")]
    counts = [value.get(name) for name in more]
    return all(map(is_number, means + value["iou"])) and all(map(is_count, counts))


def is_origin(value):
    """None, as in an older version's file, or what same_run.describe_origin gives."""
    if value is None:
        return True
    if not is_dict_of_names(value):
        return False
    for name in ("train", "unlabelled", "val"):
        frames = value.get(name)
        if not is_dict_of_names(frames) or not is_count(frames.get("count")):
            return False
        if not isinstance(frames.get("hash"), str):
            return False
    weights = value.get("class_weights")
    if not isinstance(weights, list) or not all(map(is_number, weights)):
        return False
    return isinstance(value.get("teacher"), (str, type(None)))


# ------------------------------ to the networks

def check_fits(state, run, path):
    """Raise UsageError where a checked training state is not one of this run's networks."""
    # With --ema the file's network is the average, and the student stands in the state.
    beside_average = run.student if run.average is not None else None
    is_right = {
        "student": fits_module(state.get("student"), beside_average),
        "projections": fits_module(state.get("projections"), run.objective.projections),
        "optimizer": fits_optimizer(state["optimizer"], run.optimizer),
        "scaler": not run.scaler.is_enabled() or is_scaler(state["scaler"]),
    }
    for name in ("best_scores", "teacher_scores"):
        scores = state.get(name)
        is_right[name] = scores is None or len(scores["iou"]) == run.student.num_classes
    require(is_right, path)


def fits_module(tensors, module):
    """Are these the tensors of `module`? None where there is no module."""
    if module is None:
        return tensors is None
    own = module.state_dict()
    if not is_dict_of_names(tensors) or set(tensors) != set(own):
        return False
    return all(has_shape(tensors[name], own[name]) for name in own)


def has_shape(tensor, like):
    return is_plain(tensor) and tensor.shape == like.shape and tensor.dtype == like.dtype


def fits_optimizer(saved, optimizer):
    """Are these the moments of all the optimizer's parameters, or of none, in the same order?"""
    own = optimizer.state_dict()["param_groups"]
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not all(map(is_dict_of_names, groups)):
        return False
    if [group.get("params") for group in groups] != [group["params"] for group in own]:
        return False

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = saved.get("state")
    if not isinstance(moments, dict):
        return False
    if not moments:                                    # before the first step
        return True
    if set(moments) != set(range(len(parameters))):
        return False
    return all(fits_parameter(moments[i], p) for i, p in enumerate(parameters))


def fits_parameter(entry, parameter):
    if not is_dict_of_names(entry) or set(entry) != MOMENTS | {"step"}:
        return False
    step = entry["step"]
    if isinstance(step, torch.Tensor):
        if not is_plain(step) or step.ndim > 0:
            return False
        step = step.item()
    if type(step) not in (int, float) or not 0 < step < math.inf:
        return False
    return all(has_shape(entry[name], parameter) for name in MOMENTS)


def is_scaler(saved):
    """Of fp16's GradScaler; empty where the run had none, as on Apple's MPS."""
    if not saved:
        return True
    if set(saved) != SCALER or not all(map(is_number, saved.values())):
        return False
    return all(math.isfinite(value) and value >= 0 for value in saved.values())
