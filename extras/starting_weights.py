"""What a student starts from: fresh weights, those of --init and what of them fits, or the run that
is resumed.

    student = make_student(args, classes, resumed)
"""

import collections

import torch
from torch import nn

from extras.cli import UsageError
from extras.provenance import other_classes, warn_of_leak
from model import NORMS, load_checkpoint, segformer


def make_student(args, classes, resumed):
    """Fresh weights, or those of --init, or of the run that is resumed.

    The seed decides what is new: the same with a teacher and without.
    """
    torch.manual_seed(args.seed)
    path = resumed or args.init
    if not path:
        return segformer(args.student, len(classes), NORMS[args.norm])

    student = load_checkpoint(path, len(classes))
    check_variant(student, path, args.student)
    if resumed:
        check_norms(student, path, args.norm)
    else:
        warn_of_leak(student, path, args)
        student = with_norms(student, NORMS[args.norm], path)
        renew_head(student, classes, path)
    return student


def check_variant(student, path, variant):
    if student.variant != variant:
        raise UsageError(f"{path} is a SegFormer-{student.variant.upper()}: "
                         f"it cannot start a --student {variant}")


def name_of_norm(norm_fn):
    return next(name for name, function in NORMS.items() if function is norm_fn)


def check_norms(student, path, norm):
    """Refuse a run's checkpoint of other norms than the run's. Raises UsageError."""
    if student.norm_fn is not NORMS[norm]:
        raise UsageError(f"{path} has the norms {name_of_norm(student.norm_fn)!r}, "
                         f"the run has --norm {norm}")


def with_norms(student, norm_fn, path):
    """-> a copy of `student` with the norms of `norm_fn`.

    A norm whose class changes starts fresh; every other weight is taken over. Prints how many of
    each kind are fresh.
    """
    if student.norm_fn is norm_fn:
        return student
    decoder_width = student.decoder.fuse.out_channels
    renewed = segformer(student.variant, student.num_classes, norm_fn, decoder_width)
    before = dict(student.named_modules())
    after = dict(renewed.named_modules())
    fresh = collections.Counter()
    for name, module in after.items():
        if type(module) is not type(before[name]):
            fresh[type(module).__name__] += 1

    kept = {}
    for name, tensor in student.state_dict().items():
        owner = name.rpartition(".")[0]
        if type(after[owner]) is type(before[owner]):
            kept[name] = tensor
    renewed.load_state_dict(kept, strict=False)
    for name, module in after.items():
        if isinstance(module, nn.LayerNorm) and isinstance(before[name], nn.LayerNorm):
            module.eps = before[name].eps
    renewed.classes = student.classes
    renewed.palette = student.palette

    counts = [f"{count} {kind}" for kind, count in fresh.items()]
    print(f"{path}: its norms are {name_of_norm(student.norm_fn)!r}, the student's "
          f"{name_of_norm(norm_fn)!r}: {' and '.join(counts)} start fresh, all else is taken")
    return renewed


def renew_head(student, classes, path):
    """A new classifier where the file's classes have other names than the data's."""
    if student.classes and other_classes(student.classes, classes):
        student.decoder.classifier.reset_parameters()
        print(f"{path}: its classes have other names than the data's, so the head is new")
