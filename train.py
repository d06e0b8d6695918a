"""Train a SegFormer, with or without a teacher.

    python train.py --student b2 --lr 1.2e-3 --out runs/teacher        # 1. a teacher: a plain run
    python train.py --student b0 --teacher runs/teacher/best.pth \\
                    --lambda-fd 1 --lambda-pe 1                        # 2. distil it: CSKD, PEKD
    python train.py --student b0 --loss dice-focal                     # EffiSeg's refined loss
    python train.py --student b0 --norm dyt-dyl                        # EffiSeg's norms
    python train.py --student b0 --init mit_b0.pth                     # from an ImageNet encoder
    python train.py --student b0 --teacher b2.pth --data camvid:DIR \\
                    --lambda-fd 0 --lambda-pe 0 --lambda-kl 1 --temperature 4
    torchrun --nproc-per-node 2 train.py ...                           # several GPUs
    python train.py --resume                                           # go on where it stopped

or from Python, with the same flags:

    from train import train
    result = train(student="b0", teacher="b2.pth", data="camvid:DIR", iters=300)
    print(result.scores["miou"], result.folder)

Without --data it trains on toy scenes that are drawn on the fly. The loss is eq. 9 of the paper,

    total = supervision + lambda_KL KL + lambda_FD sum_stages CSKD + lambda_PE PEKD,

with the supervision WCE (eq. 3), or Dice-Focal (eq. 14) with --loss dice-focal; beyond the paper
WCE + Dice with --loss wce-dice, or none with --loss none (see `loss_weights`).

A run writes to --out: best.pth (by mIoU on the validation split), last.pth (with all that --resume
needs), log.csv (every loss term of every step), scores.csv, recipe.json, pictures.png: see
extras/run_folder.py. Every random number of step n is a function of (seed, n), so a resumed run is
the run that was never stopped.

Reading order: TERMS (what the loss is made of), Objective, train_step, run_training (the loop).
What they need is prepared in `prepare`; what they write and print is in extras/.

References
  Kim et al., EffiSeg, 2025: the losses (section 3.2-3.3) and the defaults (section 4.3)
  Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, arXiv:1711.05101: AdamW
"""

if __name__ == "__main__":
    # Before torch, whose import takes seconds in which a Ctrl-C may come.
    from extras import quiet_start
    quiet_start.begin()

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import CITYSCAPES, IGNORE, Augment, Stream
from extras import other_losses
from extras.cli import NotFinite, run_command, show_progress
from extras.compilation import compile_networks, explain_failed_compilation, no_compiling
from extras.distributed import (
    all_reduce,
    explain_lost_process,
    join_processes,
    leave,
    rank,
    world_size,
)
from extras.few_labels import MixedStream, Unlabelled, labels_for_kl
from extras.machine import AMP_DTYPES, keep_freed_memory
from extras.memory import check_memory, check_shared_memory
from extras.pixel_counts import cached_pixel_counts
from extras.provenance import check_classes, check_finite, warn_of_leak
from extras.resuming import go_on_from, resumed_flags
from extras.run_data import count_frames, make_loader, open_splits, resolve_schedule
from extras.run_folder import (
    find_run,
    is_restart_of,
    save,
    save_best,
)
from extras.run_lock import RunLock
from extras.run_logs import Board, summary_writer
from extras.run_report import (
    LossLog,
    ScoreLog,
    advice,
    finish,
    note_stretched_schedule,
    open_logs,
    open_run_folder,
)
from extras.run_scores import evaluate_together, score_teacher
from extras.same_run import (
    check_same_classes,
    check_schedule,
    describe_origin,
    relative_data,
)
from extras.starting_weights import make_student
from extras.stopping import (
    Stop,
    keep_what_was_done,
    start_workers,
    stopped,
)
from extras.teacher_cache import TeacherCache
from extras.teacher_ensemble import TeacherEnsemble
from extras.train_flags import NOT_NEGATIVE, POSITIVE, TrainFlags
from extras.trained_parameters import check_gradients, check_owned
from extras.training_state import new_progress
from extras.weight_average import WeightAverage
from losses import (
    Projections,
    class_weights,
    cskd,
    dice_loss,
    focal_loss,
    kl_distillation,
    pekd,
    weighted_cross_entropy,
)
from model import SIZES, Features, load_checkpoint, save_checkpoint

# paper: section 4.3. code: not in the paper, but in its published code. The others are our choice.
DEFAULTS = {
    "student": "b0",                                   # paper
    "data": "toy",
    "epochs": 200,                                     # paper
    "batch_size": 2,                                   # paper
    "accum": 1,
    "crop": [512, 1024],                               # paper: whole frames of this size
    "scale_range": [0.5, 2.0],                         # SegFormer's
    "augment": "segformer",                            # the paper's is "plain": resize and flip
    "lr": 6e-4,                                        # paper
    "weight_decay": 0.0,                               # code
    "warmup": 0.05,                                    # paper
    "grad_clip": 1.0,                                  # code
    "norm": "ln",                                      # paper: its baseline
    "loss": "wce",                                     # paper, eq. 3
    "class_weights": "enet",                           # code
    "lambda_dice": 0.5,                                # paper
    "folds": 2,
    "amp": "auto",
    "workers": min(4, os.cpu_count() or 1),
    "seed": 0,
    "device": "auto",
}
# What suits each kind of data better. Cityscapes is the paper's data, and has its augmentation.
DATASET_DEFAULTS = {
    "toy": {
        "iters": 300,
        "batch_size": 4,
        "crop": [96, 192],
        "scale_range": [0.75, 1.5],
        "lr": 4.8e-3,
        "eval_every": 100,
    },
    "camvid": {
        "iters": 40_000,
        "batch_size": 4,
        "crop": [288, 288],
        "eval_every": 1000,
    },
    "cityscapes": {"augment": "plain"},
    "folder": {"crop": [512, 512]},
}


# ------------------------------ the loss terms: a new one is added here, and only here

class Outputs(NamedTuple):
    """What the loss terms of one forward pass are computed from."""
    student: Features
    teacher: Features | None                           # None without one; logits None if not read
    stages: list | None                                # the student's, projected to the teacher's
    patch_embeds: list | None                          # the same of its patch embeddings
    labels: torch.Tensor                               # (B, H, W)
    kl_labels: torch.Tensor                            # for KL every pixel of an unlabelled frame
    class_weight: torch.Tensor                         # (C,)
    args: argparse.Namespace


def wce_term(outputs):
    return weighted_cross_entropy(outputs.student.logits, outputs.labels, outputs.class_weight)


def dice_term(outputs):
    return dice_loss(outputs.student.logits, outputs.labels)


def focal_term(outputs):
    return focal_loss(outputs.student.logits, outputs.labels, outputs.class_weight)


def kl_term(outputs):
    student, teacher = outputs.student.logits, outputs.teacher.logits
    return kl_distillation(student, teacher, outputs.args.temperature, outputs.kl_labels)


def fd_term(outputs):
    args = outputs.args
    total = 0
    for student, teacher in zip(outputs.stages, outputs.teacher.stages, strict=True):
        total = total + cskd(student, teacher, args.lambda_m, args.lambda_s)
    return total


def pe_term(outputs):
    return pekd(outputs.patch_embeds, outputs.teacher.patch_embeds)


class Option(NamedTuple):
    """A flag that only one loss term reads."""
    name: str
    type: Callable
    default: float
    help: str


class Term(NamedTuple):
    """A term of the loss: its flag (if it is of distillation), checks and log column follow."""
    name: str                                          # its column; its flag is --lambda-NAME
    compute: Callable                                  # compute(Outputs) -> scalar
    mean_over: str                                     # see Objective.denominators
    teacher_reads: str | None = None                   # "logits", "stages" or "patch_embeds"
    default: float = 0.0                               # its weight where there is a teacher
    takes_log_probabilities: bool = True               # for logits, which an ensemble has
    help: str = ""
    options: tuple = ()                                # of Option

    @property
    def weight_name(self):
        """Where args has a distillation term's weight: lambda_kl, from --lambda-kl."""
        return f"lambda_{self.name}"


SUPERVISION = (
    Term("wce", wce_term, mean_over="class weights"),
    Term("dice", dice_term, mean_over="parts with labels"),
    Term("focal", focal_term, mean_over="pixels"),
)
DISTILLATION = (
    Term("kl", kl_term, mean_over="kl pixels", teacher_reads="logits",
         help="weight of KL distillation (default: 0)",
         options=(Option("temperature", POSITIVE, 1.0, "of KL distillation"),)),
    Term("fd", fd_term, mean_over="images", teacher_reads="stages", default=1.0,
         help="weight of CSKD on the stages (default: 1 with a teacher)",
         options=(Option("lambda_m", NOT_NEGATIVE, 1.0, "weight of CSKD's guided squared error"),
                  Option("lambda_s", NOT_NEGATIVE, 0.5, "weight of CSKD's cosines"))),
    Term("pe", pe_term, mean_over="images", teacher_reads="patch_embeds", default=1.0,
         help="weight of PEKD on the patch embeddings (default: 1 with a teacher)"),
    # What others use, to compare with.
    Term("cosine", other_losses.cosine_term, mean_over="images", teacher_reads="stages",
         help="weight of plain cosines of the stages' pixels (default: 0)"),
    Term("gcos", other_losses.global_cosine_term, mean_over="images", teacher_reads="stages",
         help="weight of one cosine a stage and image (default: 0)"),
    Term("cwd", other_losses.channel_term, mean_over="images", teacher_reads="logits",
         help="weight of CWD on the logits (default: 0)", takes_log_probabilities=False,
         options=(Option("cwd_temperature", POSITIVE, 4.0, "of CWD"),)),
    Term("dist", other_losses.relation_term, mean_over="images", teacher_reads="logits",
         help="weight of DIST on the logits (default: 0)"),
    Term("zkl", other_losses.standardised_kl_term, mean_over="kl pixels",
         teacher_reads="logits", help="weight of KL on z-scored logits (default: 0)",
         options=(Option("zkl_temperature", POSITIVE, 2.0, "of KL on z-scored logits"),)),
)
TERMS = {term.name: term for term in (*SUPERVISION, *DISTILLATION)}


def loss_weights(args):
    """{term: its weight in the total}, eq. 9 and 14. A term of weight 0 is not computed."""
    supervision = {
        "wce": {"wce": 1.0},
        "wce-dice": {"wce": 1.0, "dice": args.lambda_dice},
        "dice-focal": {"dice": args.lambda_dice, "focal": 1 - args.lambda_dice},
        "none": {},                                    # the teacher alone
    }
    weights = supervision[args.loss]
    if args.teacher:
        for term in DISTILLATION:
            weights[term.name] = getattr(args, term.weight_name)
    return {name: weight for name, weight in weights.items() if weight}


def reads_teachers_logits(args):
    return any(TERMS[name].teacher_reads == "logits" for name in loss_weights(args))


def reads_student_logits(term):
    """Supervision does, and what compares logits with the teacher's."""
    return term.teacher_reads in (None, "logits")


class Objective(nn.Module):
    """All that is trained, in one module: the student, and the projections to its teacher's widths.

    Called, it computes the loss terms.
    """

    def __init__(self, student, projections, args, class_weight):
        super().__init__()
        self.student = student
        self.projections = projections                            # None without a teacher
        self.args = args
        self.weights = loss_weights(args)
        self.teacher_parts = {TERMS[name].teacher_reads for name in self.weights}
        self.register_buffer("class_weight", class_weight)
        # What no loss reads gets no gradient: it is not trained.
        reads_logits = any(reads_student_logits(TERMS[name]) for name in self.weights)
        student.decoder.requires_grad_(reads_logits)
        if projections is not None:
            projections.stages.requires_grad_("stages" in self.teacher_parts)
            projections.patch_embeds.requires_grad_("patch_embeds" in self.teacher_parts)

    def forward(self, images, labels, teacher=None):
        """Images (B, 3, H, W), labels (B, H, W), the teacher's Features -> {term: scalar}."""
        student = self.student.features(images)
        stages = None
        patch_embeds = None
        if "stages" in self.teacher_parts or "patch_embeds" in self.teacher_parts:
            stages, patch_embeds = self.projections(student.stages, student.patch_embeds)
        outputs = Outputs(
            student=student,
            teacher=teacher,
            stages=stages,
            patch_embeds=patch_embeds,
            labels=labels,
            kl_labels=self.kl_labels(labels),
            class_weight=self.class_weight,
            args=self.args,
        )
        return {name: TERMS[name].compute(outputs) for name in self.weights}

    @torch.no_grad()
    def ask_teacher(self, teacher, images):
        """-> the teacher's Features, or None without a teacher.

        Its decoder runs only if a loss reads its logits.
        """
        if teacher is None:
            return None
        if "logits" in self.teacher_parts:
            return teacher.features(images)
        stages, patch_embeds = teacher.encode(images)
        return Features(None, stages, patch_embeds)

    def denominators(self, labels):
        """What each term's mean is taken over, in this part of the batch. (B, H, W) -> (terms,).

        A mean over labelled pixels must stay one when the batch is cut into parts (--accum,
        torchrun): the mean of the parts' means would let a pixel in a half-void part count double.
        Weighted by these numbers, the parts add up to the whole.
        """
        is_labelled = labels != IGNORE
        # Not class_weight[labels[is_labelled]]: a GPU would have to tell how many these are first.
        weight_of_pixels = self.class_weight[labels.where(is_labelled, 0).long()] * is_labelled
        denominators = {
            "class weights": weight_of_pixels.sum(),
            "pixels": is_labelled.sum(),
            "kl pixels": (self.kl_labels(labels) != IGNORE).sum(),
            # Equal parts, so the mean of their values. Exact for means over images; DIST, which is
            # none, is computed on each part.
            "images": torch.ones((), device=labels.device),
            # Dice is no such mean either. Of a part without labels it is 0, which says nothing.
            "parts with labels": is_labelled.any(),
        }
        return torch.stack([denominators[TERMS[name].mean_over].float() for name in self.weights])

    def kl_labels(self, labels):
        """The labels that KL is masked with: with --labelled it is taught everywhere in a frame
        without labels."""
        return labels_for_kl(labels) if self.args.labelled else labels


# ------------------------------ the run, and one step of it

@dataclass(frozen=True)
class Task:
    """Where a run that trains something else than the paper's segmenter differs from this file:
    what stands for its flags, networks, samples and checkpoints. extras/prompt.py has one.

    Its objective is called as `Objective` is, and has the same attributes. Its student has what
    the loop reads of a SegFormer, and a fold() that makes a network which eval.py can score.
    """
    name: str                                          # kept in last.pth: no other task resumes it
    command: str                                       # what a user types to go on
    flags: object                                      # parse, all_flags, note_unused: TrainFlags
    make_networks: Callable                            # as make_networks
    ready_teacher: Callable                            # as ready_teacher
    make_stream: Callable                              # as make_stream
    save: Callable = save_checkpoint
    load: Callable = load_checkpoint


@dataclass
class Run:
    """All that a training run holds."""
    args: argparse.Namespace
    device: torch.device
    objective: Objective                               # student, projections and loss terms
    teacher: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler                       # does something in fp16 only
    parallel: nn.Module                                # the objective; under torchrun, inside DDP
    task: Task
    average: WeightAverage | None = None               # of the student's weights, with --ema
    teacher_cache: TeacherCache | None = None          # what the teacher said, with --teacher-cache
    train_set: object = None
    unlabelled_set: object = None                      # frames that only the teacher labels
    val_set: object = None
    total_batch: int = 0                               # images of a step, over all processes
    start: int = 0                                     # steps that were done before
    progress: dict | None = None                       # see training_state.new_progress
    folder: Path | None = None
    batches: object = None                             # iterator over the rest of the stream
    loss_log: LossLog | None = None
    score_log: ScoreLog | None = None
    board: Board | None = None

    @property
    def student(self):
        return self.objective.student

    @property
    def network(self):
        """What is scored and kept: the student, or with --ema the average of its weights."""
        return self.student if self.average is None else self.average.model

    def ask_teacher(self, images):
        """-> what the losses read of the teacher's Features, or None without one."""
        if self.teacher_cache is not None:
            return self.teacher_cache.ask(images)
        return self.objective.ask_teacher(self.teacher, images)

    def autocast(self):
        """Mixed precision as --amp says; nothing when it is off."""
        dtype = AMP_DTYPES.get(self.args.amp)
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def train_step(run, images, labels):
    """One optimizer step on this process's part of the batch, in --accum micro-batches.

    images (B, 3, H, W) in [0, 1], labels (B, H, W) -> the values of the T loss terms and the
    gradient's norm before clipping, (T + 1,).

    Raises NotFinite on a CPU before a broken gradient reaches the weights. On a GPU, reading the
    norm would stall every step; there LossLog finds it up to 20 steps later.
    """
    objective = run.objective
    term_weights = torch.tensor(list(objective.weights.values()), device=images.device)     # (T,)
    micro_batches = split_batch(images, labels, run.args.accum)
    denominators = [objective.denominators(label) for _, label in micro_batches]
    denominators = torch.stack(denominators)                            # (accum, T)
    tiny = torch.finfo(torch.float32).tiny                              # not 0 / 0 if all is void
    total = all_reduce(denominators.sum(0)).clamp(min=tiny)             # (T,)

    values = torch.zeros_like(term_weights)                             # (T,)
    for i, (image, label) in enumerate(micro_batches):
        with gradient_exchange(run.parallel, is_last=i == len(micro_batches) - 1):
            with run.autocast():
                # The teacher's maps get no name here, so that they go while the losses' gradients
                # are computed.
                loss_of_terms = run.parallel(image, label, run.ask_teacher(image))
            means = torch.stack(list(loss_of_terms.values()))           # (T,)
            # From a mean over this micro-batch to its share of the mean over the whole batch.
            shares = means * denominators[i] / total                    # (T,)
            # Times the processes, since DistributedDataParallel takes the mean of their gradients.
            loss = (term_weights * shares).sum() * world_size()
            run.scaler.scale(loss).backward()
        values += shares.detach()

    run.scaler.unscale_(run.optimizer)
    # Without --grad-clip the limit is infinite: the norm is only measured.
    norm = nn.utils.clip_grad_norm_(objective.parameters(), run.args.grad_clip or math.inf)
    if norm.device.type == "cpu" and not run.scaler.is_enabled() and not norm.isfinite():
        raise NotFinite("the gradient is not finite")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return torch.cat([all_reduce(values), norm[None]])


def split_batch(images, labels, parts):
    """(B, 3, H, W), (B, H, W) -> [(images, labels)], of B / parts each"""
    return list(zip(images.chunk(parts), labels.chunk(parts), strict=True))


def gradient_exchange(parallel, is_last):
    """Under torchrun gradients are exchanged once a step: in its last piece's backward pass."""
    if is_last or not isinstance(parallel, DistributedDataParallel):
        return contextlib.nullcontext()
    return parallel.no_sync()


def find_nonfinite_terms(run, step, images, labels):
    """Which terms, or gradients of terms, are not finite? Step `step` is done once more, and each
    is computed alone. -> words"""
    trained = [parameter for parameter in run.objective.parameters() if parameter.requires_grad]
    found = {}
    seed_step(run.args.seed, step)                     # drop-path and dropout as they were
    for image, label in split_batch(images, labels, run.args.accum):
        with run.autocast():
            target = run.ask_teacher(image)
            terms = run.objective(image, label, target)
        for name, value in terms.items():
            if not value.isfinite():
                found[name] = f"{name} is {value.item()}"
                continue
            gradients = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True)
            used = [gradient for gradient in gradients if gradient is not None]
            if not all(gradient.isfinite().all() for gradient in used):
                found.setdefault(name, f"the gradient of {name} is not finite")
    return " and ".join(found.values()) or "the gradient of the sum of all terms is not finite"


def learning_rate(step, iters, peak, warmup):
    """Linear up over the first `warmup` share of the steps, then linear (poly 1) down to 0."""
    ramp = warmup * iters
    if step < ramp:
        return peak * (step + 1) / (ramp + 1)
    return peak * (iters - step) / max(iters - ramp, 1)


# ------------------------------ the loop

class Result(NamedTuple):
    """What a run ends with. Scores are those of eval.scores, fractions, on the validation split."""
    scores: dict                                       # of the best checkpoint, and its "step"
    teacher_scores: dict | None
    folder: Path


def train(**flags):
    """A run from Python, with every flag of `python train.py --help` by its name. -> Result

        train(student="b0", teacher="b2.pth", data="camvid:DIR", crop=(288, 288), lambda_kl=0.5)
        train(resume=True, out="runs/camvid-b0-kd")

    None is as if the flag were not given, and so is False for a flag that takes no value. Then it
    has its default: grad_clip=0, not None, is a run without clipping.

    Raises UsageError (of extras.cli), DatasetError or CheckpointError for a mistake, NotFinite for
    a loss that broke, and Stopped, after saving, for Ctrl-C.
    """
    switches = FLAGS.switches()
    argv = []
    for name, value in flags.items():
        if value is None:
            continue
        if value is False and name in switches:
            continue
        argv.append("--" + name.replace("_", "-"))
        if isinstance(value, (list, tuple)):
            argv += [str(item) for item in value]
        elif value is not True:
            argv.append(str(value))
    return run_training(*FLAGS.parse(argv))


def run_training(args, given, task=None):
    """The whole run, from the flags to the last table. -> Result

    task: what is trained, a Task; None: the paper's segmenter
    """
    with RunLock() as lock:
        run = prepare(args, given, lock, task)
        train_all_steps(run)
        with no_compiling(run.args):
            finish(run)
    if dist.is_initialized():
        dist.destroy_process_group()
    return Result(run.progress["best_scores"], run.progress["teacher_scores"], run.folder)


def train_all_steps(run):
    """The steps, with their validations and checkpoints. Raises Stopped, after saving."""
    with contextlib.closing(run.board), Stop() as stop:
        for step in range(run.start, run.args.iters):
            done = step + 1
            lr = set_learning_rate(run, step)
            seed_step(run.args.seed, step)
            with keep_what_was_done(run, step, stop, save):
                images, labels = next_batch(run)
            values = take_step(run, step, images, labels)
            if run.average is not None:
                run.average.update(run.student, step)
            run.loss_log.add(done, lr, values)

            is_validation_due = done % run.args.eval_every == 0 or done == run.args.iters
            is_report_due = run.loss_log.is_full() or is_validation_due
            signal_number = stop.asked(run.device, may_exchange=is_report_due)
            if is_report_due or signal_number:
                run.loss_log.flush()
            if is_validation_due:
                validate(run, done)
            if is_validation_due or signal_number:
                save(run, done)
                run.loss_log.restart_clock()
            if signal_number and done < run.args.iters:
                raise stopped(signal_number, done, run)


def seed_step(seed, step):
    """Drop-path and dropout of this step are drawn as in a run that was never stopped.

    A number of its own for each (seed, step, process), as long as there are fewer than 1,000,003
    steps and 1,009 processes.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank())


def set_learning_rate(run, step):
    lr = learning_rate(step, run.args.iters, run.args.lr, run.args.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    return lr


def next_batch(run):
    """-> images (B, 3, H, W) in [0, 1] and labels (B, H, W), on the device."""
    asked = time.time()
    batch = next(run.batches)
    run.loss_log.add_waiting(time.time() - asked)
    images, labels = (part.to(run.device, non_blocking=True) for part in batch)
    return images.float() / 255, labels


def take_step(run, step, images, labels):
    """One train_step. After the run's first one, check that every parameter got a gradient, and say
    how long compiling took. -> the values of train_step
    """
    began = time.time()
    run.objective.train()
    run.optimizer.zero_grad(set_to_none=True)
    try:
        values = train_step(run, images, labels)
    except NotFinite:
        run.loss_log.flush()
        cause = find_nonfinite_terms(run, step, images, labels)
        raise NotFinite(f"step {step + 1}: {cause}; stopped, {advice(run.folder)}") from None
    if step == run.start:
        check_gradients(run.objective)
        if run.args.compile:
            seconds = time.time() - began
            run.loss_log.leave_out(seconds)
            print(f"compiled, with the first step in {seconds:.0f} s", flush=True)
    return values


def validate(run, step):
    """Score the network on the validation split, and keep it if it is the best so far."""
    # A network that is broken raises NotFinite here, before anything is saved.
    result = evaluate_together(run.network, run.val_set, show_progress("val"))
    best = run.progress["best_scores"]
    is_better = best is None or result["miou"] > best["miou"]
    if is_better:
        run.progress["best_scores"] = result | {"step": step}
    run.score_log.add(step, result, is_better)
    if is_better:
        save_best(run, result, step)


# ------------------------------ what is made before the first step

def prepare(args, given, lock, task=None):
    """Everything that the loop needs; what is wrong is said here, not after an hour. -> Run"""
    task = task or SEGMENTATION
    folder = None
    saved = None
    if args.resume or is_restart_of(args.out):
        folder, saved = find_run(args.out, task, lock)
        state = saved["training"]
        args = resumed_flags(state, given, folder, task)
        note_stretched_schedule(args, state["args"], state["step"], folder, learning_rate)
    else:
        task.flags.note_unused(args, given)
    if args.tensorboard:
        summary_writer()                               # absent: said before anything is done
    device = join_processes(args.device)
    check_memory(args, device)
    check_shared_memory(args)

    train_set, unlabelled_set, val_set = open_splits(args)
    total_batch = args.batch_size * args.accum * world_size()
    resolve_schedule(args, count_frames(train_set, unlabelled_set), total_batch)
    if saved:
        check_schedule(args, state, total_batch, folder)
        check_same_classes(saved.get("classes"), train_set.classes, folder)
    cached_pixel_counts(val_set)                       # a broken val label is found now, not later

    resumed = folder / "last.pth" if saved else None
    student, teacher, objective = task.make_networks(args, train_set, device, resumed)
    if dist.is_initialized() and device.type == "cuda":
        objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    origin = describe_origin(train_set, unlabelled_set, val_set, teacher, objective.class_weight)
    if teacher is not None:
        teacher = task.ready_teacher(teacher, student).to(device)
    run = make_run(args, device, student, teacher, objective, task)
    run.train_set = train_set
    run.unlabelled_set = unlabelled_set
    run.val_set = val_set
    run.total_batch = total_batch
    run.progress = new_progress() | {"origin": origin}
    run.folder = folder
    if saved:
        go_on_from(state, run)
        del saved, state                               # their tensors need not stay in memory
    open_run_folder(run, lock)
    open_teacher(run)
    if args.compile:
        compile_networks(run)
    run.batches = start_workers(make_loader(run))
    if dist.is_initialized():
        run.parallel = DistributedDataParallel(objective)
    open_logs(run)
    return run


def make_run(args, device, student, teacher, objective, task):
    """-> a Run with an optimizer, and without data."""
    optimizer = make_optimizer(objective, args, device)
    check_owned(objective, optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16" and device.type != "mps")
    # Before go_on_from(): on resume `student` still holds last.pth's network, which with --ema is
    # the average; go_on_from() then puts the student's own weights in.
    average = WeightAverage(student, args.ema) if args.ema else None

    return Run(
        args=args,
        device=device,
        objective=objective,
        teacher=teacher,
        optimizer=optimizer,
        scaler=scaler,
        parallel=objective,                            # prepare() puts it into DDP under torchrun
        task=task,
        average=average,
    )


def open_teacher(run):
    """Score the teacher, and open the folder that keeps what it says, if there is one."""
    score_teacher(run)
    args = run.args
    objective = run.objective
    if not args.teacher_cache:
        return
    frames = count_frames(run.train_set, run.unlabelled_set)
    run.teacher_cache = TeacherCache(
        args.teacher_cache,
        ask=lambda images: objective.ask_teacher(run.teacher, images),
        parts=objective.teacher_parts - {None},
        identity=[run.progress["origin"]["teacher"], args.flip_teacher, args.amp],
        images=2 * frames)                             # each frame, and its mirror image


def make_networks(args, train_set, device, resumed):
    """-> (student, teacher as it is in its file or None, objective on `device`).

    resumed: the last.pth that the run goes on with, or None.
    """
    student = make_student(args, train_set.classes, resumed)
    check_finite(student, resumed or args.init)
    note_training(student, args, train_set)

    teacher = None
    projections = None
    if args.teacher:
        teacher = load_teacher(args.teacher, args, train_set)
        projections = Projections(SIZES[args.student]["dims"], SIZES[teacher.variant]["dims"])
    if args.second_teacher or args.flip_teacher:
        teachers = [teacher]
        if args.second_teacher:
            teachers.append(load_teacher(args.second_teacher, args, train_set))
        teacher = TeacherEnsemble(teachers, args.flip_teacher)

    class_weight = choose_class_weights(args, train_set)
    objective = Objective(student, projections, args, class_weight).to(device)
    return student, teacher, objective


def load_teacher(path, args, train_set):
    teacher = load_checkpoint(path)
    check_finite(teacher, path)
    if reads_teachers_logits(args):                    # features may come from other classes
        check_classes(teacher, path, train_set)
    warn_of_leak(teacher, path, args)
    return teacher


def ready_teacher(teacher, student):
    """-> the teacher as it teaches: frozen, in eval mode, judged at the size it teaches at."""
    teacher.input_size = student.input_size
    return teacher.fold()


def note_training(student, args, train_set):
    """Set what a checkpoint tells of the training beside the weights."""
    student.classes = train_set.classes
    student.palette = train_set.palette
    student.input_size = args.crop if args.augment == "plain" else train_set.size
    student.trained_on = {
        # As the command saw it: a checkpoint is given away, and with it a path from the root.
        "data": relative_data(args.data),
        "fold": args.fold,
        "folds": args.folds,
        "fold_by": args.fold_by,
    }
    if args.with_val:
        student.trained_on["with_val"] = True


def choose_class_weights(args, train_set):
    """The paper's constants for Cityscapes, else counted on the training labels. -> (C,)"""
    is_whole_train = args.fold is None and args.labelled is None and not args.with_val
    # None: a run that was begun before the flag existed.
    is_paper_setting = is_whole_train and args.class_weights in (None, "enet")
    if args.data.startswith("cityscapes") and is_paper_setting:
        return torch.tensor([weight for _, _, weight in CITYSCAPES.values()])
    counts = cached_pixel_counts(train_set)            # for "none" too: it checks every label
    if args.class_weights == "none":
        return torch.ones(len(counts))
    if args.class_weights == "sqrt":
        return other_losses.square_root_weights(counts)
    return class_weights(counts)


def make_optimizer(objective, args, device):
    """AdamW over every trainable parameter; decay on matrices only, not on norms and biases."""
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    is_fused = device.type != "mps"
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=is_fused)


def make_stream(run):
    """-> the endless data set of training samples, by their numbers."""
    args = run.args
    augment = Augment(args.crop, run.train_set.size, args.scale_range, args.augment)
    stream = Stream(run.train_set, augment, args.seed)
    if run.unlabelled_set is None:
        return stream
    # Of the same seed: a labelled frame and the next unlabelled one are flipped and scaled alike.
    others = Stream(Unlabelled(run.unlabelled_set), augment, args.seed)
    return MixedStream(stream, others)


# ------------------------------ flags

FLAGS = TrainFlags(DEFAULTS, DATASET_DEFAULTS, DISTILLATION)
SEGMENTATION = Task(
    "segmentation", "python train.py", FLAGS, make_networks, ready_teacher, make_stream)


def main():
    args, given = FLAGS.parse(sys.argv[1:])
    keep_freed_memory()
    try:
        run_training(args, given)
    except RuntimeError as error:
        explain_failed_compilation(error)
        explain_lost_process(error)


if __name__ == "__main__":
    run_command(main, end=leave)
