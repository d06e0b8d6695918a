"""Few labels, many frames: train.py --labelled SHARE.

Only the first SHARE of every drive's frames keep their labels. Without a teacher they are all that
is trained on. With one, half of each batch are labelled frames and half are the others, which the
teacher alone teaches: their labels are not looked at, by the losses or by the crop.

    labelled, others = split_labelled(dataset, 0.25)
    stream = MixedStream(Stream(labelled, augment, seed), Stream(Unlabelled(others), augment, seed))
"""

import copy
import math

import torch

from data import IGNORE, find_drives
from extras.cli import UsageError
from extras.distributed import rank


def split_labelled(dataset, share):
    """-> (the frames that keep their labels, all others): two data sets of the same kind.

    Raises UsageError where one of them would be empty.
    """
    kept = set(first_of_each_drive(dataset.stems, share))
    frames = dataset.frames
    labelled = copy.copy(dataset)
    labelled.use_frames({stem: frames[stem] for stem in dataset.stems if stem in kept})
    others = copy.copy(dataset)
    others.use_frames({stem: frames[stem] for stem in dataset.stems if stem not in kept})
    if not len(labelled) or not len(others):
        raise UsageError(f"--labelled {share:g} of {len(dataset)} frames leaves {len(labelled)} "
                         f"with labels and {len(others)} without: both are needed")
    kept_share = len(labelled) / len(dataset)
    is_far_more = kept_share > 1.1 * share                        # with many short drives
    if is_far_more and rank() == 0:
        print(f"note: --labelled {share:g} keeps the labels of {len(labelled)} of {len(dataset)} "
              f"frames, {100 * kept_share:.0f} %: every drive's share is rounded up", flush=True)
    return labelled, others


def first_of_each_drive(stems, share):
    """The first `share` of the frames of each drive, or of all where their names tell no drives.
    -> stems"""
    stems = sorted(stems)
    drives = find_drives(stems) or {"all": stems}
    kept = []
    for frames in drives.values():
        kept += frames[:math.ceil(share * len(frames))]
    return kept


class Unlabelled(torch.utils.data.Dataset):
    """A data set's images; every label is void."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        image, label = self.dataset[i]                            # (3, H, W), (H, W)
        return image, torch.full_like(label, IGNORE)


class MixedStream(torch.utils.data.Dataset):
    """Samples of two endless streams in turn: of the first for even n, of the second for odd n."""

    def __init__(self, first, second):
        self.streams = (first, second)

    def __getitem__(self, n):
        # n = 0, 1, 2, 3 -> first[0], second[0], first[1], second[1]
        place, which = divmod(n, 2)
        return self.streams[which][place]


def labels_for_kl(labels):
    """The labels that KL is masked with, (B, H, W).

    In a frame that is void all over (one without labels) every pixel counts: class 0 stands there,
    and is not looked at. So does what a crop that is larger than its frame was padded with; with
    --augment plain nothing is padded.
    """
    is_void = (labels == IGNORE).flatten(1).all(1)                # (B,)
    return labels.masked_fill(is_void[:, None, None], 0)
