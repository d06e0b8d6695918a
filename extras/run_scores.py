"""Scores of a run on its validation split, over all of its processes."""

import torch

from eval import evaluate, scores
from extras.cli import NotFinite, UsageError, show_progress
from extras.distributed import all_reduce, broadcast_buffers, rank, world_size
from extras.provenance import has_classes_of, validation_name
from extras.same_run import teacher_words


def evaluate_together(model, dataset, progress=None):
    """`evaluate` with the frames dealt to the processes -> scores of the whole data set."""
    broadcast_buffers(model)
    mine = torch.utils.data.Subset(dataset, range(rank(), len(dataset), world_size()))
    confusion = evaluate(model.fold(), mine, model.input_size, progress=progress)
    device = next(model.parameters()).device
    return scores(all_reduce(confusion.to(device)))


def score_teacher(run):
    """The teacher's scores, once: a teacher that was loaded wrongly shows here."""
    if run.teacher is None:
        return
    name = teacher_words(run.args)
    if not has_classes_of(run.teacher, run.val_set):
        print(f"teacher {name}: {run.teacher.num_classes} classes of its own; it "
              f"teaches features, and no score of it would mean anything", flush=True)
        return
    result = run.progress["teacher_scores"]
    if not result:
        try:
            result = evaluate_together(run.teacher, run.val_set, show_progress("teacher"))
        except NotFinite as error:
            raise UsageError(f"{name}: {error}") from None
        run.progress["teacher_scores"] = result
    print(f"teacher {name}: mIoU {100 * result['miou']:.2f} % "
          f"on {run.val_set.name} {validation_name(run.args)}, full resolution", flush=True)
