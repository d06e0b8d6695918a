"""What a run trains and validates on: its data sets, its schedule, its batches."""

import math

import torch

from data import open_dataset
from extras.distributed import rank
from extras.few_labels import split_labelled
from extras.memory import BATCHES_AHEAD
from extras.stopping import prepare_worker
from model import SMALLEST


def open_splits(args):
    """-> the data sets to train on; of frames that the teacher alone labels, or None; to validate
    on. A quick look at every file is taken."""
    splits = []
    train_split = "train+val" if args.with_val else "train"
    for split in (train_split, "val"):
        dataset = open_dataset(args.data, split, args.fold, args.folds, fold_by=args.fold_by,
                               cache=args.cache, size=args.size)
        sees_frames_as_they_are = split == "val" and args.augment != "plain" and not dataset.size
        dataset.quick_check(smallest=SMALLEST if sees_frames_as_they_are else 1)
        splits.append(dataset)
    train_set, val_set = splits
    unlabelled_set = None
    if args.labelled:
        train_set, others = split_labelled(train_set, args.labelled)
        unlabelled_set = others if args.teacher else None
    return train_set, unlabelled_set, val_set


def count_frames(train_set, unlabelled_set):
    """How many frames a pass over the data has, with those that the teacher alone labels."""
    if unlabelled_set is None:
        return len(train_set)
    return len(train_set) + len(unlabelled_set)


def resolve_schedule(args, train_frames, total_batch):
    """Fill in what depends on the data: --iters from --epochs, and --eval-every."""
    if not args.iters:
        args.iters = math.ceil(args.epochs * train_frames / total_batch)
    if not args.eval_every:
        args.eval_every = max(min(args.iters, 20), args.iters // 40)


# ------------------------------ batches

def make_loader(run):
    """The batches of this process, from step `start` to the end.

    A batch is a range of sample numbers of the stream, so resuming is starting there.
    """
    args = run.args
    stream = run.task.make_stream(run)
    local_batch = args.batch_size * args.accum
    return torch.utils.data.DataLoader(
        stream,
        batch_sampler=Batches(run.start, args.iters, run.total_batch, local_batch),
        num_workers=args.workers,
        pin_memory=run.device.type == "cuda",
        prefetch_factor=BATCHES_AHEAD if args.workers else None,
        worker_init_fn=prepare_worker,
    )


class Batches:
    """The sample numbers of this process's part of each step. They are made one step at a time: a
    list of them would take as long as the run is.
    """

    def __init__(self, start, iters, total_batch, local_batch):
        self.steps = range(start, iters)
        self.total_batch = total_batch
        self.local_batch = local_batch

    def __iter__(self):
        for step in self.steps:
            first = step * self.total_batch + rank() * self.local_batch
            yield range(first, first + self.local_batch)
