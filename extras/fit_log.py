"""How well a run fits what it trains on, beside what is held out: train.py --fit-log.

    RUN/fit.csv    step, seconds, train_loss, train_miou, val_loss, val_miou

A row at each validation. Both losses are the class-weighted cross-entropy (eq. 3) at the labels'
full resolution of frames as they are, without augmentation; the train scores are of at most 100
frames spread over the train split. Seconds are those of training alone, also after a resume.
"""

import torch

from eval import confusion_matrix, network_logits, scores
from extras.comparison import spread_indices
from extras.distributed import rank
from extras.run_logs import Log
from losses import IGNORE, resize, weighted_cross_entropy

TRAIN_FRAMES = 100
COLUMNS = ("step", "seconds", "train_loss", "train_miou", "val_loss", "val_miou")


class FitLog:
    """fit.csv of a run (train.py's Run)."""

    def __init__(self, run):
        self.run = run
        self.log = Log(run.folder, "fit.csv", COLUMNS, run.start)
        self.train_indices = spread_indices(len(run.train_set), TRAIN_FRAMES)

    def add(self, step):
        run = self.run
        if rank() > 0:
            return
        network = run.network.fold()
        weight = run.objective.class_weight
        size = run.student.input_size
        train = measure_fit(network, run.train_set, self.train_indices, weight, size)
        val = measure_fit(network, run.val_set, range(len(run.val_set)), weight, size)
        numbers = [run.progress["seconds"], *train, *val]
        self.log.add([[step] + [f"{number:.6g}" for number in numbers]])


def measure_fit(network, dataset, indices, class_weight, size):
    """-> (class-weighted cross-entropy, mIoU) of a network on some frames.

    class_weight (C,); size: (H, W) that frames are resized to for the network, None for their own.
    """
    device = class_weight.device
    loss_sum = 0.0
    weight_sum = 0.0
    confusion = torch.zeros(network.num_classes, network.num_classes, dtype=torch.int64)
    for i in indices:
        image, label = dataset[i]                                 # (3, H, W), (H, W)
        logits = network_logits(network, image, size)             # (1, C, h, w)
        target = label[None].to(device)                           # (1, H, W)
        valid = target[target != IGNORE].long()
        frame_weight = class_weight[valid].sum().item()
        loss_sum += weighted_cross_entropy(logits, target, class_weight).item() * frame_weight
        weight_sum += frame_weight
        classes = resize(logits, label.shape).argmax(1)[0].cpu()  # (H, W)
        confusion += confusion_matrix(classes, label, network.num_classes)
    return loss_sum / max(weight_sum, 1e-12), scores(confusion)["miou"]
