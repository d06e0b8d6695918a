"""Training a student that is told what to segment: its objective, its networks, its task.

The loop, the optimiser, the schedule, the run's folder, resuming and being told to stop are those
of train.py; this is what it is given in their place (train.Task). Validation scores the ordinary
network that the classes' names make of the student, so that its mIoU compares with any other's.

With several processes (torchrun) a mean over pairs is the mean of the processes' means.
"""

import torch
from torch import nn

from data import Augment, Stream
from extras.cli import UsageError
from extras.prompt_checkpoint import load_prompt, save_prompt
from extras.prompt_data import PromptStream
from extras.prompt_flags import PROMPT_FLAGS
from extras.prompt_losses import (
    labelled_share,
    mask_loss,
    pixel_alignment,
    presence_loss,
    targets_of_labels,
    targets_of_teacher,
    word_alignment,
)
from extras.prompt_model import PresenceHead, PromptSegmenter
from extras.prompt_teacher_files import StoredTargets, WholeFrame, WithTeacher
from extras.prompt_text import TextEncoder, VectorTable, read_vectors
from extras.prompt_words import TOKENIZERS, choose_prompts, members
from extras.provenance import check_classes, warn_of_leak
from extras.starting_weights import check_variant, with_norms
from model import NORMS, load_checkpoint, read_checkpoint
from train import Task, note_training

WEIGHTS = {1: {"pixels": 1.0, "words": 1.0}, 2: {"mask": 5.0, "presence": 1.0}}


# ---------------------------------------------------------------- the objective

class PromptObjective(nn.Module):
    """The student and what it is taught; called, it computes the loss terms of its phase.

    It has what the loop reads of train.Objective.
    """

    def __init__(self, student, phase):
        super().__init__()
        self.student = student
        self.phase = phase
        self.weights = WEIGHTS[phase]
        self.projections = None
        self.prompts = list(student.prompts)
        self.register_buffer("table", members(self.prompts, student.classes))     # (K, C)
        self.register_buffer("class_weight", torch.zeros(0))      # classes are not weighted here
        # Phase 1 reads features only: what turns them into masks is not trained.
        trains_masks = phase == 2
        student.presence.requires_grad_(trains_masks)
        student.scale.requires_grad_(trains_masks)
        student.bias.requires_grad_(trains_masks)

    @torch.no_grad()
    def ask_teacher(self, teacher, images):
        """-> the teacher's (pixels, words) in phase 1, its Answer in phase 2; None without one."""
        if teacher is None:
            return None
        if self.phase == 1:
            return teacher.look(images), teacher.read(self.prompts)
        return teacher.answer(images, self.prompts)

    def denominators(self, labels):
        """Parts of a batch count alike."""
        return torch.ones(len(self.weights), device=self.table.device)

    def forward(self, images, targets, teacher=None):
        """Images (B, 3, H, W); targets: labels (B, H, W), or StoredTargets; what ask_teacher gave
        -> {term: scalar}
        """
        pixels = self.student.look(images)                        # (B, D, h, w)
        words = self.student.read(self.prompts)                   # (K, D)
        if self.phase == 1:
            weight = labelled_share(targets, pixels.shape[2:])    # (B, h, w)
            return {"pixels": pixel_alignment(pixels, teacher[0], weight),
                    "words": word_alignment(words, teacher[1])}

        answer = self.student.compare(pixels, words)
        wanted = self.targets(targets, teacher, answer.mask.shape[2:])
        present = wanted.presence > 0.5                           # (B, K)
        return {"mask": mask_loss(answer.mask, wanted.mask, present, wanted.weight),
                "presence": presence_loss(answer.presence, wanted.presence)}

    def targets(self, targets, teacher, size):
        """-> Targets, of the live teacher, of a stored one, or of the labels."""
        if teacher is not None:
            return targets_of_teacher(teacher.mask, teacher.presence, targets)
        if isinstance(targets, StoredTargets):
            return targets_of_teacher(targets.mask, targets.presence, targets.label)
        return targets_of_labels(targets, self.table, size)


# ---------------------------------------------------------------- networks

def make_networks(args, train_set, device, resumed):
    """-> (student, teacher or None, objective on `device`), as train.make_networks."""
    student = make_student(args, train_set.classes, resumed)
    note_training(student, args, train_set)
    teacher = None
    if args.teacher:
        teacher = open_teacher(args, student, train_set)
        if args.phase == 1 and not resumed and not args.init:
            borrow_head(student, teacher)
    objective = PromptObjective(student, args.phase).to(device)
    return student, teacher, objective


def make_student(args, classes, resumed):
    """Fresh weights, or those of --init, or of the run that is resumed."""
    torch.manual_seed(args.seed)
    prompts = choose_prompts(classes, args.prompts, args.absent)
    if resumed:
        student = load_prompt(resumed)
        student.prompts = prompts
        return student
    if args.init and "prompt" in read_checkpoint(args.init):
        return student_of_file(args, classes, prompts)

    tokenizer = read_vectors(args.text_vectors) if args.text_vectors else args.tokenizer
    student = PromptSegmenter(args.student, args.dim, tokenizer, prompts, classes,
                              NORMS[args.norm])
    if args.init:
        student.segformer = fit_network(args, load_checkpoint(args.init, args.dim))
    return student


def student_of_file(args, classes, prompts):
    """--init with a checkpoint of this command. Raises UsageError where it cannot start this run.
    """
    student = load_prompt(args.init)
    if student.segformer.folded:
        raise UsageError(f"{args.init} has its weights in 8 or 4 bits, which is for inference: "
                         f"start from the checkpoint that it was made of")
    student.segformer = fit_network(args, student.segformer)
    if student.dim != args.dim:
        raise UsageError(f"{args.init} compares vectors of length {student.dim}: "
                         f"it cannot start a student with --dim {args.dim}")
    wanted = "vectors" if args.text_vectors else args.tokenizer
    if args.reset_text:
        student.text = new_text(args, student.dim)
    elif student.tokenizer != wanted:
        raise UsageError(f"{args.init} reads its prompts as {student.tokenizer}, this run as "
                         f"{wanted}: its text encoder would see other numbers for the same words; "
                         f"add --reset-text for a new one, or --tokenizer {student.tokenizer}")
    student.prompts = prompts
    student.classes = list(classes)
    return student


def new_text(args, dim):
    if args.text_vectors:
        return VectorTable(*read_vectors(args.text_vectors), dim)
    return TextEncoder(TOKENIZERS[args.tokenizer], dim)


def fit_network(args, network):
    """-> the SegFormer of --init with --norm's norms. Raises UsageError for another variant."""
    check_variant(network, args.init, args.student)
    return with_norms(network, NORMS[args.norm], args.init)


def open_teacher(args, student, train_set):
    """-> the PromptSegmenter to learn from, frozen. Raises UsageError for one that cannot teach."""
    teacher = load_prompt(args.teacher)
    check_classes(teacher, args.teacher, train_set)
    warn_of_leak(teacher, args.teacher, args)
    if args.phase == 1 and teacher.dim != student.dim:
        raise UsageError(f"{args.teacher} has vectors of length {teacher.dim}, the student of "
                         f"{student.dim}: --phase 1 aligns them, so give --dim {teacher.dim}")
    teacher.input_size = student.input_size            # it is judged at the size it teaches at
    teacher.segformer = teacher.segformer.fold()
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def borrow_head(student, teacher):
    """Phase 1 puts the student's vectors where the teacher's are: what reads those, scale, bias
    and presence head, fits from the start, and phase 2 goes on from there.
    """
    student.scale.copy_(teacher.scale)
    student.bias.copy_(teacher.bias)
    student.presence = PresenceHead(student.dim)
    student.presence.load_state_dict(teacher.presence.state_dict())


# ---------------------------------------------------------------- samples

def make_stream(run):
    """-> the endless data set of training samples, by their numbers."""
    args = run.args
    if args.teacher_files:
        frames = WithTeacher(run.train_set, args.teacher_files, run.student.prompts)
        stream = Stream(frames, WholeFrame(args.crop), args.seed)
    else:
        augment = Augment(args.crop, run.train_set.size, args.scale_range, args.augment)
        stream = Stream(run.train_set, augment, args.seed)
    return PromptStream(stream, args.empty, args.seed)


def ready_teacher(teacher, student):
    """-> the teacher as it teaches: open_teacher has frozen it."""
    return teacher


PROMPT_TASK = Task("prompt", "python -m extras.prompt train", PROMPT_FLAGS, make_networks,
                   ready_teacher, make_stream, save_prompt, load_prompt)
