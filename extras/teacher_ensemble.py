"""Several teachers as one, for losses on class probabilities.

train.py --second-teacher FILE, --flip-teacher, or from Python

    teacher = TeacherEnsemble([first, second], flip=True).fold()
    logits = teacher(images)                                      # (B, C, H/4, W/4)

Its class probabilities are the mean of its teachers' and, with flip, of what they say of the mirror
image; its logits are the logarithm of that mean. Features have no such mean: each teacher has axes
of its own. And CWD, whose softmax is over the pixels of a class, is refused: a logarithm of a
probability differs from a network's logit by a number for each pixel, which moves that softmax.

References
  Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531: a student of
  an ensemble
"""

import torch
from torch import nn

from model import Features


class TeacherEnsemble(nn.Module):
    """teachers: networks of the same classes; flip: ask each about the mirror image too."""

    def __init__(self, teachers, flip=False):
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.flip = flip
        first = teachers[0]
        self.variant = first.variant
        self.num_classes = first.num_classes
        self.classes = first.classes
        self.palette = first.palette
        self.input_size = first.input_size

    def fold(self):
        """-> the same of folded teachers, for inference."""
        folded = TeacherEnsemble([teacher.fold() for teacher in self.teachers], self.flip)
        folded.input_size = self.input_size
        return folded

    def forward(self, images):
        """(B, 3, H, W) -> (B, C, h, w): the logarithm of the mean class probabilities."""
        views = []
        for teacher in self.teachers:
            views.append(teacher(images).float().softmax(1))
            if self.flip:
                mirrored = teacher(images.flip(3)).float().softmax(1)
                views.append(mirrored.flip(3))
        mean = torch.stack(views).mean(0)
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()

    def features(self, images):
        """As a SegFormer's, with logits alone."""
        return Features(self(images), None, None)

    def encode(self, images):
        raise NotImplementedError("an ensemble has logits, and no features")
