"""A run goes on: its flags, and what its last.pth puts into it."""

import argparse

from extras.same_run import check_origin, merge_resumed_flags
from extras.training_state import check_fits, restore


def resumed_flags(state, given, folder, task):
    """-> the flags of the run in `folder`, with those given now that may change."""
    task.flags.check_stored(state["args"], folder / "last.pth")
    return argparse.Namespace(**merge_resumed_flags(task.flags.all_flags(), state, given))


def go_on_from(state, run):
    """Put the training state of its last.pth into a run that was just made."""
    check_origin(state.get("origin"), run.progress["origin"], run.args, run.folder)
    check_fits(state, run, run.folder / "last.pth")
    origin = run.progress["origin"]
    run.progress = restore(state, run) | {"origin": origin}
    run.start = run.progress["step"]
