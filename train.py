"""Train a SegFormer, with or without a teacher.

    python train.py --student b2 --out runs/teacher                                         # 1. a teacher: a plain run
    python train.py --student b0 --teacher b2.pth --lambda-fd 1 --lambda-pe 1               # 2. distil it (CSKD + PEKD)
    python train.py --student b0 --loss dice-focal                                          # EffiSeg's refined loss
    python train.py --student b0 --norm dyt-dyl                                             # EffiSeg's norms
    python train.py --student b0 --init mit_b0.pth                                          # from an ImageNet encoder
    python train.py --student b0 --teacher b2.pth --data camvid:DIR --lambda-kl 1 --temperature 4 --lambda-fd 0 --lambda-pe 0
    torchrun --nproc-per-node 2 train.py ...                                                # several GPUs or processes
    python train.py --resume                                                                # go on where it stopped

Without --data it trains on toy scenes that are drawn on the fly. The loss is eq. 9 of the paper,

    total = supervision + lambda_KL KL + lambda_FD sum_stages CSKD + lambda_PE PEKD,        supervision = WCE, or eq. 14

A run writes to --out: best.pth (by mIoU on the validation split), last.pth (with all that --resume needs), log.csv (every
loss term of every step), scores.csv, recipe.json, pictures.png (see run.py). Every random number of step n is a function of
(seed, n), so a resumed run is the run that was never stopped.

References
  Kim et al., EffiSeg, 2025: the losses (section 3.2-3.3) and the defaults (section 4.3)
  Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, arXiv:1711.05101: AdamW
"""

import argparse
import contextlib
import json
import math
import os
import platform
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import CITYSCAPES, IGNORE, Augment, DatasetError, Stream, open_dataset, pixel_counts
from eval import (HALF, MISTAKES, NotFinite, UsageError, check_classes, draw_comparison, evaluate, keep_freed_memory, other_classes,
                  pick_device, scores, show_progress, table, warn_of_leak)
from losses import (Projections, class_weights, cskd, dice_loss, focal_loss, kl_distillation, pekd, weighted_cross_entropy)
from model import NORMS, SIZES, SMALLEST, Features, load_checkpoint, save_checkpoint, segformer
from run import (Board, Log, Stop, Stopped, choose_folder, deaf_worker, find_run, git_commit, rank, restarted, save_last, spread,
                 summary_writer)

# The paper's defaults (section 4.3; clipping at 1 and no weight decay are its trainer's), then what suits each data set.
PAPER = dict(student="b0", init=None, teacher=None, data="toy", epochs=200, batch_size=2, accum=1, crop=[512, 1024], scale_range=[0.5, 2.0],
             augment="segformer", lr=6e-4, weight_decay=0.0, warmup=0.05, grad_clip=1.0, norm="ln", loss="wce", lambda_dice=0.5,
             temperature=1.0, lambda_m=1.0, lambda_s=0.5, fold=None, folds=2, fold_by=None, amp="auto", seed=0,
             device="auto")
SUITS = {
    "toy": dict(iters=300, batch_size=4, crop=[96, 192], scale_range=[0.75, 1.5], eval_every=100),
    "camvid": dict(iters=40_000, batch_size=4, crop=[288, 288], eval_every=1000),
    "cityscapes": dict(augment="plain"),
    "folder": dict(crop=[512, 512]),
}
MAY_CHANGE = ("out", "resume", "iters", "workers", "device", "eval_every", "tensorboard", "cache", "compile")      # on resume; the rest is the experiment
SKIPS = 20                                                        # steps that fp16's scaler may leave out in a row
REPORT_EVERY = 20                                                 # steps between two reads of the losses from the device


# ---------------------------------------------------------------- the objective

def loss_weights(args):
    """{term: its weight in the total}, eq. 9 and 14; terms of weight 0 are not computed."""
    supervision = {"wce": 1.0} if args.loss == "wce" else {"dice": args.lambda_dice, "focal": 1 - args.lambda_dice}
    distillation = {"kl": args.lambda_kl, "fd": args.lambda_fd, "pe": args.lambda_pe} if args.teacher else {}
    return {term: weight for term, weight in (supervision | distillation).items() if weight}


class Objective(nn.Module):
    """The student, the projections to its teacher's widths, and the loss terms: all that is trained, in one module."""

    def __init__(self, student, projections, args, class_weight):
        super().__init__()
        self.student, self.projections, self.args = student, projections, args
        self.weights = loss_weights(args)
        self.register_buffer("class_weight", class_weight)
        if projections is not None:                               # what no loss uses gets no gradient: it is not trained
            projections.stages.requires_grad_("fd" in self.weights)
            projections.patch_embeds.requires_grad_("pe" in self.weights)

    def forward(self, images, labels, target=None):
        """Images (B, 3, H, W), labels (B, H, W), the teacher's Features -> {term: scalar}."""
        args, own = self.args, self.student.features(images)
        if "fd" in self.weights or "pe" in self.weights:
            stages, patch_embeds = self.projections(own.stages, own.patch_embeds)
        formulas = {
            "wce": lambda: weighted_cross_entropy(own.logits, labels, self.class_weight),
            "dice": lambda: dice_loss(own.logits, labels),
            "focal": lambda: focal_loss(own.logits, labels, self.class_weight),
            "kl": lambda: kl_distillation(own.logits, target.logits, args.temperature, labels),
            "fd": lambda: sum(cskd(s, t, args.lambda_m, args.lambda_s) for s, t in zip(stages, target.stages)),
            "pe": lambda: pekd(patch_embeds, target.patch_embeds),
        }
        return {term: formulas[term]() for term in self.weights}


def shares(labels, class_weight, terms):
    """What each term's mean is taken over, in this part of the batch -> {term: scalar}.

    A mean over labelled pixels must stay one when the batch is cut into parts (--accum, torchrun): the mean of the parts'
    means would let a pixel in a half-void part count double. Weighted by these shares, the parts add up to the whole.
    """
    valid = labels != IGNORE
    weighted = class_weight[labels[valid].long()].sum()
    over = {"wce": weighted, "focal": valid.sum(), "kl": valid.sum()}              # the others: the parts are equally large
    return torch.stack([over.get(term, torch.ones_like(weighted)).float() for term in terms])


def learning_rate(step, iters, peak, warmup):
    """Linear from 0 over the first `warmup` share of the steps, then linear (polynomial of power 1) to 0."""
    ramp = warmup * iters
    if step < ramp:
        return peak * (step + 1) / (ramp + 1)
    return peak * (iters - step) / max(iters - ramp, 1)


def make_optimizer(objective, args, device):
    """AdamW over every trainable parameter; decay on matrices only, not on norms and biases."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if p.ndim > 1], weight_decay=args.weight_decay),
              dict(params=[p for p in trained if p.ndim <= 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=device.type != "mps")


def check_owned(objective, optimizer):
    """Every trainable parameter is the optimizer's: the published code forgot its projections."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    forgotten = [name for name, p in objective.named_parameters() if p.requires_grad and id(p) not in owned]
    if forgotten:
        raise RuntimeError(f"the optimizer does not own {len(forgotten)} trainable parameters, first {', '.join(forgotten[:5])}")


def check_gradients(objective):
    """After the first backward every trainable parameter has a gradient, or it would never move."""
    still = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    if still:
        raise RuntimeError(f"{len(still)} trainable parameters get no gradient, first {', '.join(still[:5])}")


# ---------------------------------------------------------------- one step

@torch.no_grad()
def ask_teacher(teacher, images, wants_logits):
    """-> the teacher's Features, None without a teacher; no logits where no loss reads them: its decoder costs an eighth of it."""
    if teacher is None:
        return None
    return teacher.features(images) if wants_logits else Features(None, *teacher.encode(images))


def train_step(objective, teacher, optimizer, scaler, images, labels, args, cast):
    """One optimizer step on this process's part of the batch, in --accum pieces. -> the terms' values and the gradient's norm
    before clipping, (terms + 1,). On a CPU a gradient that is not finite is a NotFinite before it reaches the weights; on a
    GPU that would be a wait in every step, so there the caller finds it in the norm."""
    module = objective.module if isinstance(objective, DistributedDataParallel) else objective
    weights = torch.tensor(list(module.weights.values()), device=images.device)
    pieces = list(zip(images.chunk(args.accum), labels.chunk(args.accum)))
    over = torch.stack([shares(part, module.class_weight, module.weights) for _, part in pieces])         # (accum, terms)
    total = all_reduce(over.sum(0)).clamp(min=torch.finfo(torch.float32).tiny)                            # (terms,)
    values = torch.zeros_like(weights)
    for i, (image, label) in enumerate(pieces):
        last = i == len(pieces) - 1
        with contextlib.nullcontext() if last or objective is module else objective.no_sync():
            with cast():
                # the teacher's maps get no name here, so that they go while the losses' gradients are computed
                terms = objective(image, label, ask_teacher(teacher, image, "kl" in module.weights))
            terms = torch.stack(list(terms.values())) * over[i] / total                                   # (terms,)
            scaler.scale((weights * terms).sum() * world_size()).backward()                               # DDP averages
        values += terms.detach()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(module.parameters(), args.grad_clip or math.inf)
    if norm.device.type == "cpu" and not scaler.is_enabled() and not norm.isfinite():
        raise NotFinite(blame(module, teacher, pieces, cast))
    scaler.step(optimizer)
    scaler.update()
    return torch.cat([all_reduce(values), norm[None]])


def blame(module, teacher, pieces, cast):
    """Which terms are not finite, or have a gradient that is not? Each is computed alone, in words."""
    found, trained = {}, [p for p in module.parameters() if p.requires_grad]
    for image, label in pieces:
        with cast():
            terms = module(image, label, ask_teacher(teacher, image, True))
        for name, value in terms.items():
            gradients = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True)
            if not value.isfinite():
                found[name] = f"{name} is {value.item()}"
            elif not all(gradient.isfinite().all() for gradient in gradients if gradient is not None):
                found.setdefault(name, f"the gradient of {name} is not finite")
    return " and ".join(found.values()) or "the gradient of the sum of all terms is not finite"


# ---------------------------------------------------------------- several processes (torchrun)

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor):
    """Sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def join_processes(name):
    """Under torchrun: join the others, one GPU each, or the CPU; only the first one speaks. -> this process's device."""
    if "RANK" not in os.environ:
        return pick_device(name)
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and name in ("auto", "cuda"):
        if local >= torch.cuda.device_count():
            raise UsageError(f"process {local} has no GPU of its own: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local)                              # before anything is allocated
        device = torch.device("cuda", local)
    else:
        device = pick_device("cpu" if name == "auto" else name)   # gloo knows no MPS
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **meeting_place())
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def meeting_place():
    """Where torchrun's processes meet. After a restart gloo would find the addresses of the dead there: a place an attempt."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return dict(store=attempt, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))


def evaluate_together(model, dataset, progress=None):
    """`evaluate` with the frames dealt to the processes -> scores of the whole data set."""
    if dist.is_initialized():
        for buffer in model.buffers():                            # BatchNorm's statistics: the first process's count
            dist.broadcast(buffer, 0)
    mine = torch.utils.data.Subset(dataset, range(rank(), len(dataset), world_size()))
    confusion = evaluate(model.fold(), mine, model.input_size, progress=progress)
    device = next(model.parameters()).device
    return scores(all_reduce(confusion.to(device)))


# ---------------------------------------------------------------- the run

def train(args):
    """The whole run, from the flags to the last table."""
    args.resume = args.resume or restarted(args) or None
    folder, saved = find_run(args) if args.resume else (None, None)
    args = settle(args, saved)
    if args.tensorboard:
        summary_writer()                                          # absent: said before anything is done
    device = join_processes(args.device)
    train_set, val_set = (open_dataset(args.data, split, args.fold, args.folds, fold_by=args.fold_by, cache=args.cache) for split in ("train", "val"))
    if args.size:
        train_set.size = val_set.size = tuple(args.size)
    total_batch = args.batch_size * args.accum * world_size()
    args.iters = args.iters or math.ceil(args.epochs * len(train_set) / total_batch)
    args.eval_every = args.eval_every or max(min(args.iters, 20), args.iters // 40)
    if saved and saved["training"]["total_batch"] != total_batch:
        raise UsageError(f"{folder} was trained with {saved['training']['total_batch']} images a step, this would be {total_batch}")
    if saved and saved["training"]["step"] > args.iters:
        raise UsageError(f"{folder} has {saved['training']['step']} steps behind it already: --iters can only grow")

    pixel_counts(val_set)                                         # what is wrong with the data is said now, not after an hour
    train_set.glance()
    val_set.glance()
    student, teacher, objective = make_networks(args, train_set, device, folder / "last.pth" if saved else None)
    optimizer = make_optimizer(objective, args, device)
    check_owned(objective, optimizer)
    half = HALF.get(args.amp)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16" and device.type != "mps")

    def cast():
        return torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)

    record = restore(saved, objective, optimizer, scaler)
    start, saved = record["step"], None                           # the file's tensors need not stay in memory
    folder = folder or choose_folder(args) if rank() == 0 else folder
    announce(args, folder, device, student, train_set, val_set, objective, total_batch, start)
    if teacher is not None:
        record["teacher_scores"] = record["teacher_scores"] or evaluate_together(teacher, val_set, show_progress("teacher"))
        print(f"teacher {args.teacher}: mIoU {100 * record['teacher_scores']['miou']:.2f} % on {val_set.name} {held_out(args)}, full resolution", flush=True)
    if args.compile:
        compile_networks(objective, teacher)
    columns = ["step", "lr", "loss", *objective.weights, "grad_norm"]
    score_columns = ["step", "miou", "macc", "aacc", *train_set.classes]
    log, score_log, board = Log(folder, "log.csv", columns, start), Log(folder, "scores.csv", score_columns, start), Board(folder, args.tensorboard, start)

    stream = Stream(train_set, Augment(args.crop, train_set.size, args.scale_range, args.augment), args.seed)
    batches = iter(make_loader(stream, start, args, total_batch, device))
    parallel = DistributedDataParallel(objective) if dist.is_initialized() else objective
    pending, clock, waited = [], time.time(), 0.0                  # since the last report

    def report():
        """Read the losses of the pending steps from the device, once for all of them, and write them down."""
        rows = read_losses(pending, objective.weights, folder, record if scaler.is_enabled() else None)
        log.add(rows)
        board.add_rows(columns[1:], rows, "train")
        seconds = time.time() - clock
        print_progress(rows[-1], args.iters, objective.weights, len(pending) * total_batch / seconds, total_batch, waited / seconds, record["skipped"])
        pending.clear()

    def save(step):
        record["step"] = step
        if rank() == 0:
            save_last(student, folder, dict(
                record, args=vars(args), total_batch=total_batch, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                projections=objective.projections.state_dict() if teacher is not None else None))

    if not start:
        save(0)                                                   # from here on there is always something to resume
    with Stop() as stop:
        for step in range(start, args.iters):
            done = step + 1
            torch.manual_seed((args.seed * 1_000_003 + step) * 1009 + rank())     # drop-path and dropout of this step
            lr = learning_rate(step, args.iters, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            asked = time.time()
            try:
                batch = next(batches)
            except (DatasetError, RuntimeError) as error:         # a broken frame; or a worker that SIGTERM ended before us
                if not stop.number and not isinstance(error, DatasetError):
                    raise
                if pending:
                    report()
                save(step)
                if stop.number:
                    raise Stopped(stop.number, step, folder) from None
                raise
            waited += (time.time() - asked) * has_nothing_to_do(device)
            images, labels = (part.to(device, non_blocking=True) for part in batch)
            objective.train()
            optimizer.zero_grad(set_to_none=True)
            began = time.time()
            try:
                values = train_step(parallel, teacher, optimizer, scaler, images.float() / 255, labels, args, cast)
            except NotFinite as error:
                if pending:
                    report()
                raise NotFinite(f"step {done}: {error}; stopped, {advice(folder)}") from None
            if step == start:
                check_gradients(objective)
                if args.compile:
                    clock += time.time() - began                  # in images/s a compilation has no place
                    print(f"compiled, with the first step in {time.time() - began:.0f} s", flush=True)
            pending.append((done, lr, values))

            evaluates = done % args.eval_every == 0 or done == args.iters
            number = stop.asked(device, done % REPORT_EVERY == 0 or evaluates)
            if len(pending) == REPORT_EVERY or evaluates or number:
                report()
            if evaluates:
                result = evaluate_together(student, val_set, show_progress("val"))    # NotFinite comes before anything is saved
                better = result["miou"] > record["best_scores"]["miou"] if record["best_scores"] else True
                record["best_scores"] = result | {"step": done} if better else record["best_scores"]
                print_scores(done, result, val_set, better, args)
                row = [done, *(f"{value:.6f}" for value in (result["miou"], result["macc"], result["aacc"], *result["iou"]))]
                score_log.add([row])
                board.add_rows(score_columns[1:], [row], "val")
                board.add_picture(done, student, val_set)
                if better and rank() == 0:
                    save_checkpoint(student, folder / "best.pth", scores=result, step=done)
            if evaluates or number:
                save(done)
            if number and done < args.iters:
                raise Stopped(number, done, folder)
            if not pending:
                clock, waited = time.time(), 0.0
    if rank() == 0:
        with torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext():      # not for four pictures
            finish(args, folder, teacher, record, val_set)
    if dist.is_initialized():
        dist.destroy_process_group()


def make_student(args, classes, resumed):
    """Fresh weights, or those of --init, or of the run that is resumed; the seed decides what is new, teacher or not."""
    torch.manual_seed(args.seed)
    path = resumed or args.init
    if not path:
        return segformer(args.student, len(classes), NORMS[args.norm])
    student = load_checkpoint(path, len(classes))
    if student.variant != args.student:
        raise UsageError(f"{path} is a SegFormer-{student.variant.upper()}: it cannot start a --student {args.student}")
    if student.norm_fn is not NORMS[args.norm]:
        found = next(name for name, norm_fn in NORMS.items() if norm_fn is student.norm_fn)
        raise UsageError(f"{path} has the norms {found!r}: its weights mean nothing to a student with --norm {args.norm}")
    if student.classes and other_classes(student.classes, classes):
        student.decoder.classifier.reset_parameters()
        print(f"{path}: its classes have other names than the data's, so the head is new")
    return student


def make_networks(args, train_set, device, resumed):
    """-> (student, teacher or None, objective) on `device`; `resumed`: the last.pth that the run goes on with, or None."""
    student = make_student(args, train_set.classes, resumed)
    student.classes, student.palette = train_set.classes, train_set.palette
    student.input_size = args.crop if args.augment == "plain" else train_set.size
    student.trained_on = {name: getattr(args, name) for name in ("data", "fold", "folds", "fold_by")}
    teacher = projections = None
    if args.teacher:
        teacher = load_checkpoint(args.teacher)
        check_classes(teacher, args.teacher, train_set)
        warn_of_leak(teacher, args.teacher, args)
        projections = Projections(SIZES[args.student]["dims"], SIZES[teacher.variant]["dims"])
        teacher.input_size = student.input_size                   # it teaches at this size, so it is judged at this size
        teacher = teacher.fold().to(device)                       # frozen: eval mode, no gradient, BatchNorm fixed
    objective = Objective(student, projections, args, choose_class_weights(args, train_set)).to(device)
    if dist.is_initialized() and device.type == "cuda":
        objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    return student, teacher, objective


def compile_networks(objective, teacher):
    """--compile: the student with its losses, and the teacher, as compiled functions of a batch; validation stays eager."""
    torch._inductor.config.fallback_random = True                 # eager's random numbers: the same drop-path, the same curve
    objective.compile(dynamic=False)
    if teacher is not None:
        teacher.features, teacher.encode = (torch.compile(function, dynamic=False) for function in (teacher.features, teacher.encode))


def restore(saved, objective, optimizer, scaler):
    """Put the state of a last.pth (or None: a new run) beside the student's. -> {"step", "best_scores", "teacher_scores",
    "skipped": steps that the scaler left out, "skipped_in_a_row"}"""
    record = dict(step=0, best_scores=None, teacher_scores=None, skipped=0, skipped_in_a_row=0)
    if not saved:
        return record
    state = saved["training"]
    if objective.projections is not None:
        objective.projections.load_state_dict(state["projections"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return {name: state.get(name, value) for name, value in record.items()}


def choose_class_weights(args, train_set):
    """The paper's constants for all of Cityscapes, else 1 / ln(1.10 + share) counted on the training labels. -> (C,)"""
    if args.data.startswith("cityscapes") and args.fold is None:
        return torch.tensor([weight for _, _, weight in CITYSCAPES.values()])
    return class_weights(pixel_counts(train_set))


def make_loader(stream, start, args, total_batch, device):
    """Batches of this process from step `start` to the end: sample numbers of the stream, so resuming is starting there."""
    local = args.batch_size * args.accum
    first = [step * total_batch + rank() * local for step in range(start, args.iters)]
    return torch.utils.data.DataLoader(stream, batch_sampler=[range(n, n + local) for n in first], num_workers=args.workers,
                                       pin_memory=device.type == "cuda", prefetch_factor=4 if args.workers else None,
                                       worker_init_fn=deaf_worker)


def read_losses(pending, weights, folder, skips):
    """[(step, lr, values)] -> rows of the log; one read from the device for all.

    skips: the record that counts the steps which the fp16 scaler left out, or None without a scaler. Raises NotFinite, naming
    the term and the step, for a loss that is not finite, for a gradient without a scaler, and for SKIPS steps left out in a row.
    """
    values = torch.stack([values for _, _, values in pending]).tolist()
    rows = []
    for (step, lr, _), (*terms, norm) in zip(pending, values):
        broken = [f"{name} is {value}" for name, value in zip(weights, terms) if not math.isfinite(value)]
        if not math.isfinite(norm) and not broken:
            if skips is None:
                broken = [f"the gradient is not finite, at finite {', '.join(f'{name} {value:.4g}' for name, value in zip(weights, terms))}"]
            else:
                skips["skipped"], skips["skipped_in_a_row"] = skips["skipped"] + 1, skips["skipped_in_a_row"] + 1
        elif skips is not None:
            skips["skipped_in_a_row"] = 0
        if skips is not None and skips["skipped_in_a_row"] >= SKIPS:
            broken = [f"the gradient overflowed fp16 in {SKIPS} steps in a row, though the scaler halved its scale each time"]
        if broken:
            raise NotFinite(f"step {step}: {' and '.join(broken)}; stopped, {advice(folder)}")
        total = sum(weight * value for weight, value in zip(weights.values(), terms))
        rows.append([step, f"{lr:.8g}", f"{total:.8g}", *(f"{value:.8g}" for value in (*terms, norm))])
    return rows


def advice(folder):
    return f"the last good checkpoint is {folder}/last.pth. A smaller --lr, --grad-clip 1 or --amp off may help"


def has_nothing_to_do(device):
    """A GPU works on what was queued while its process waits for data: that is no time lost, until the queue is empty."""
    return device.type != "cuda" or torch.cuda.current_stream(device).query()


def print_progress(row, iters, weights, speed, total_batch, waited, skipped):
    terms = " + ".join(f"{weight:g} {name} {float(value):.4f}" for (name, weight), value in zip(weights.items(), row[3:]))
    left = round((iters - row[0]) * total_batch / speed)
    print(f"step {row[0]}/{iters}  loss {float(row[2]):.4f} = {terms}  lr {float(row[1]):.2e}  {speed:.1f} images/s "
          f"({100 * waited:.0f} % waiting for data)  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
          + (f"  {skipped} steps skipped: fp16 overflow" if skipped else ""), flush=True)


def held_out(args):
    return "val" if args.fold is None else f"fold {args.fold} of {args.folds}"


def print_scores(done, result, val_set, better, args):
    print(f"step {done}: mIoU {100 * result['miou']:.2f} %, mAcc {100 * result['macc']:.2f} %, aAcc {100 * result['aacc']:.2f} % "
          f"on {val_set.name} {held_out(args)}, full resolution{' (best so far)' if better else ''}", flush=True)


def announce(args, folder, device, student, train_set, val_set, objective, total_batch, start):
    """Print the effective recipe and write it to recipe.json."""
    if rank():
        return
    weights, class_weight = objective.weights, objective.class_weight
    recipe = dict(vars(args), out=str(folder), total_batch=total_batch, processes=world_size(), loss_weights=weights,
                  class_weights=[round(w, 4) for w in class_weight.tolist()], classes=train_set.classes,
                  train_frames=len(train_set), val_frames=len(val_set), input_size=student.input_size,
                  parameters=sum(p.numel() for p in student.parameters()), device_used=str(device),
                  device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
                  threads=torch.get_num_threads(), torch=torch.__version__, commit=git_commit(), command=" ".join(sys.argv))
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1))
    print(f"{train_set.name}: {len(train_set)} train, {len(val_set)} val frames, {len(train_set.classes)} classes; "
          f"crops {args.crop[0]}x{args.crop[1]}, {args.augment} augmentation")
    print(f"student SegFormer-{args.student.upper()} {f'from {args.init}' if args.init else 'from scratch'}, norm {args.norm}, {recipe['parameters']:,} parameters, on {device}, amp {args.amp}")
    print("loss = " + " + ".join(f"{weight:g} {name}" for name, weight in weights.items()) + f"; AdamW, lr {args.lr:g} with "
          f"{100 * args.warmup:g} % warm-up, decay {args.weight_decay:g}, clip {args.grad_clip:g}")
    print(f"{args.iters} steps of {total_batch} images = {args.batch_size} x {args.accum} accumulated x {world_size()} processes, "
          f"{args.iters * total_batch / len(train_set):.1f} epochs, seed {args.seed}; writing to {folder}"
          + (f"; resuming after step {start}" if start else ""), flush=True)


def finish(args, folder, teacher, record, val_set):
    """The table of per-class IoU and the picture, for the teacher and the student's best checkpoint."""
    models, names, results = [], [], []
    if teacher is not None:
        models, names, results = [teacher.cpu()], [f"teacher {teacher.variant}"], [record["teacher_scores"]]
    models.append(load_checkpoint(folder / "best.pth").fold())
    names.append(f"student {args.student}")
    results.append(record["best_scores"])
    some = spread(len(val_set), 4)
    draw_comparison(models, names, val_set, some).save(folder / "pictures.png")
    print(f"\n{val_set.name} {held_out(args)}, {len(val_set)} frames, full resolution; student's best checkpoint: step {record['best_scores']['step']}")
    print(table(names, results, val_set.classes))
    print(f"\npictures: {folder / 'pictures.png'}; checkpoints: {folder / 'best.pth'}, {folder / 'last.pth'}")


# ---------------------------------------------------------------- flags

def settle(args, saved=None):
    """Fill in what was not given: from the run that is resumed, else the data set's defaults, else the paper's."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    if saved:
        stored = saved["training"]["args"]
        if given.get("amp") == "auto":
            del given["amp"]                                      # what it was settled to goes on
        changed = [name for name in given if name not in MAY_CHANGE and given[name] != stored.get(name)]
        if changed:
            name = changed[0]
            raise UsageError(f"--{name.replace('_', '-')} {given[name]} differs from the resumed run's {stored.get(name)}: "
                             "that would be another experiment; leave it out, or start a new run")
        return argparse.Namespace(**({name: None for name in vars(args)} | stored | given))       # an older run lacks newer flags
    kind = given.get("data", PAPER["data"]).split(":")[0]
    suits = SUITS.get(kind, {})
    if "epochs" in given:
        suits = {name: value for name, value in suits.items() if name != "iters"}
    distils = 1.0 if args.teacher else 0.0
    full = {name: None for name in vars(args)} | PAPER | dict(lambda_kl=0.0, lambda_fd=distils, lambda_pe=distils)
    full |= dict(workers=min(4, os.cpu_count() or 1)) | suits | given
    on_cuda = torch.cuda.is_available() and (full["device"] == "auto" or full["device"].startswith("cuda"))
    full["amp"] = full["amp"] if full["amp"] != "auto" else "fp16" if on_cuda else "off"
    say_what_is_idle(given, full, kind)
    return argparse.Namespace(**full)


def say_what_is_idle(given, full, kind):
    """A flag that was given and changes nothing beside the others is said."""
    idle = dict(scale_range=full["augment"] == "plain", size=full["augment"] == "plain", folds=full["fold"] is None, fold_by=full["fold"] is None,
                lambda_dice=full["loss"] == "wce", temperature=not full["lambda_kl"], lambda_m=not full["lambda_fd"],
                lambda_s=not full["lambda_fd"], cache=kind == "toy", teacher=not (full["lambda_kl"] or full["lambda_fd"] or full["lambda_pe"]))
    for name in idle:
        if name in given and idle[name]:
            print(f"note: --{name.replace('_', '-')} changes nothing in this run", file=sys.stderr)


def number(kind, low, high=math.inf, open_low=False):
    """An argparse type: a number of `kind` in [low, high], or (low, high]."""
    def parse(text):
        value = kind(text)
        if not (value > low if open_low else value >= low) or not value <= high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if open_low else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else ""))
        return value
    parse.__name__ = kind.__name__
    return parse


def build_parser():
    """All flags default to None, "not given": settle() fills them in."""
    parser = argparse.ArgumentParser(description="Train a SegFormer, with or without a teacher.",
                                     epilog="Defaults are the paper's, or what suits the data: see PAPER and SUITS in train.py.")
    add, positive, weight = parser.add_argument, number(int, 1), number(float, 0.0)
    add("--student", choices=SIZES, help="the network to train (default b0)")
    add("--init", metavar="FILE", help="start the student from these weights: an ImageNet encoder, or a segmenter, whose head is new if the "
        "classes differ (default: from scratch)")
    add("--teacher", metavar="FILE", help="checkpoint of the teacher to distil; like --init ours, Hugging Face's, NVlabs' or TransKD's")
    add("--data", help="toy, camvid:DIR, cityscapes:DIR or folder:DIR (default toy)")
    add("--out", metavar="DIR", help="the run's folder (default runs/DATA-STUDENT, numbered)")
    add("--iters", type=positive, help="optimizer steps (default: --epochs; CamVid 40,000, toy 300)")
    add("--epochs", type=positive, help="passes over the data, when --iters is not given (default 200)")
    add("--batch-size", type=positive, help="images a process and forward pass (default 2; CamVid and toy 4)")
    add("--accum", type=positive, help="forward passes a step; the batch of a step is batch-size x accum x processes (default 1)")
    add("--crop", type=number(int, SMALLEST), nargs=2, metavar=("H", "W"), help="size of a training image (default 512 1024; CamVid 288 288)")
    add("--size", type=number(int, SMALLEST), nargs=2, metavar=("H", "W"), help="resize frames to this, for training and scoring (default: CamVid 288 384, Cityscapes 512 1024, else as they are)")
    add("--scale-range", type=number(float, 0.0, 16, open_low=True), nargs=2, metavar=("LO", "HI"), help="random scale before the crop (default 0.5 2)")
    add("--augment", choices=("segformer", "plain"), help="segformer: scale, crop, flip, colours; plain: the paper's resize and flip (default "
        "segformer; Cityscapes plain)")
    add("--lr", type=number(float, 0.0, open_low=True), help="peak learning rate (default 6e-4)")
    add("--weight-decay", type=weight, help="of matrices; norms and biases have none (default 0)")
    add("--warmup", type=number(float, 0.0, 1.0), help="share of the steps with rising learning rate (default 0.05)")
    add("--grad-clip", type=weight, help="largest norm of the gradient, 0 for no clipping (default 1)")
    add("--norm", choices=NORMS, help="ln; dyt: DyT after patch embeddings; dyt-dyl: and DyL elsewhere; dyt-dyl-ln: but for stage ends (default ln)")
    add("--loss", choices=("wce", "dice-focal"), help="supervision: eq. 3, or eq. 14 (default wce)")
    add("--lambda-dice", type=number(float, 0.0, 1.0), help="weight of Dice in dice-focal, focal has the rest (default 0.5)")
    add("--lambda-kl", type=weight, help="weight of KL distillation (default 0)")
    add("--temperature", type=number(float, 0.0, open_low=True), help="of KL distillation (default 1)")
    add("--lambda-fd", type=weight, help="weight of CSKD on the stages (default 1 with a teacher)")
    add("--lambda-pe", type=weight, help="weight of PEKD on the patch embeddings (default 1 with a teacher)")
    add("--lambda-m", type=weight, help="weight of CSKD's guided squared error (default 1)")
    add("--lambda-s", type=weight, help="weight of CSKD's cosines (default 0.5)")
    add("--fold", type=number(int, 0), help="validate on this fold and train on the others; counts from 0 (default: the data's own splits)")
    add("--folds", type=number(int, 2), help="how many folds (default 2)")
    add("--fold-by", choices=("drive", "block", "shuffle"), help="whole drives, blocks of neighbours, or shuffled frames, which leak")
    add("--amp", choices=("auto", *HALF, "off"), help="mixed precision; auto: fp16 on CUDA, else off")
    add("--compile", action="store_true", default=None, help="torch.compile student, losses and teacher: minutes at the first step; meant for a GPU: on a CPU it was slower than without")
    add("--workers", type=number(int, 0), help="processes that read data (default: up to 4)")
    add("--cache", metavar="DIR", help="keep decoded frames there, 4 bytes a pixel, shared by all workers and runs (default: decode each time)")
    add("--seed", type=number(int, 0, 2 ** 31), help="of weights, order, augmentation and dropout (default 0)")
    add("--eval-every", type=positive, help="steps between validations and checkpoints (default: a fortieth of the run; CamVid 1000, toy 100)")
    add("--tensorboard", action="store_true", default=None, help="also write scalars and pictures for TensorBoard to the run's folder")
    add("--resume", action="store_true", default=None, help="go on with the run in --out, or the newest under runs/")
    add("--device", help="auto (CUDA, then MPS, then CPU), or one of them by name")
    return parser


def check_flags(parser, args):
    """What single flags cannot tell: combinations that would do nothing or make no sense."""
    for flag in ("lambda_kl", "lambda_fd", "lambda_pe"):
        if getattr(args, flag) and not args.teacher and not args.resume:
            parser.error(f"--{flag.replace('_', '-')} needs a --teacher")
    if args.scale_range and args.scale_range[0] > args.scale_range[1]:
        parser.error("--scale-range: LO is larger than HI")
    if args.iters and args.epochs:
        parser.error("--iters and --epochs say the same thing: give one")


def main():
    parser = build_parser()
    args = parser.parse_args()
    check_flags(parser, args)
    keep_freed_memory()
    try:
        train(args)
    except MISTAKES as error:
        sentence = str(error).strip().splitlines()[-1]            # from a loader's worker it comes with that worker's traceback
        print(f"error: {sentence.removeprefix('data.DatasetError: ')}", file=sys.stderr)
        sys.exit(2)
    except NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"error: --compile failed ({str(error).strip().splitlines()[0]}); it needs a C++ compiler on a CPU, Triton on CUDA: install it, or leave --compile out", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not dist.is_initialized() or not any(word in str(error) for word in ("gloo", "NCCL", "peer", "onnection")):
            raise
        print("error: the connection to another process of this run broke: that one failed, and its own message says why", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print("stopped at once; what was saved before is whole", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        print(f"error: {error.filename or 'cannot write'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
