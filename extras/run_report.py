"""What a training run says: its recipe, its losses, its scores, the last table and picture."""

import json
import math
import shlex
import sys
import time

import numpy as np
import torch

from extras.cli import NotFinite
from extras.comparison import draw_comparison, spread_indices
from extras.crop_advice import describe_padding, worked_sizes
from extras.distributed import of_first_process, rank, world_size
from extras.fit_log import FitLog
from extras.machine import cpu_has_bf16, device_name
from extras.outputs import save_picture, write_text
from extras.provenance import validation_name
from extras.run_folder import check_reads_back, choose_folder, git_commit, save
from extras.run_logs import Board, Log
from extras.same_run import relative_paths
from extras.score_table import table
from extras.stopping import until_written

REPORT_EVERY = 20                                      # steps between two reads from the device
MAX_SKIPS = 20                                         # in a row that fp16's scaler may skip


# ------------------------------ the recipe

def open_run_folder(run, lock):
    """Make the folder of a new run, and `lock` it; write and print what is going to happen."""
    if run.folder is None and rank() == 0:
        run.folder = choose_folder(run.args, lock)
    run.folder = of_first_process(run.folder)
    if rank() == 0:
        recipe = write_recipe(run)
        print_recipe(run, recipe)


def write_recipe(run):
    """recipe.json: the effective flags, the data, the machine and the versions. -> the recipe

    A run that goes on keeps the command that began it; each later one that trained a part of it
    stands in "resumed", with the step that it went on from.
    """
    args = run.args
    path = run.folder / "recipe.json"
    begun = read_begun(path) if run.start else None
    here = describe_call(run.device)
    recipe = vars(args) | relative_paths(vars(args))
    recipe.update(
        out=str(run.folder),
        total_batch=run.total_batch,
        processes=world_size(),
        loss_weights=run.objective.weights,
        class_weight=[round(weight, 4) for weight in run.objective.class_weight.tolist()],
        classes=run.train_set.classes,
        train_frames=len(run.train_set),
        unlabelled_frames=len(run.unlabelled_set) if run.unlabelled_set is not None else 0,
        val_frames=len(run.val_set),
        input_size=run.student.input_size,
        parameters=sum(parameter.numel() for parameter in run.student.parameters()),
    )
    if begun is None:
        recipe.update(here)
    else:
        recipe.update({name: begun.get(name) for name in here})
        recipe["resumed"] = begun.get("resumed", [])
        if run.start < args.iters:
            recipe["resumed"].append({"from_step": run.start, **here})
    write_text(path, json.dumps(recipe, indent=1))
    return recipe


def describe_call(device):
    """What trains from here on: the command, its code and its machine."""
    return {
        "device_used": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "command": shlex.join(sys.argv),
    }


def read_begun(path):
    """-> the recipe of the run that goes on, or None where there is none that can be read."""
    if not path.is_file():                             # to open a pipe would wait
        return None
    try:
        recipe = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    is_recipe = (isinstance(recipe, dict) and "command" in recipe
                 and isinstance(recipe.get("resumed", []), list))
    return recipe if is_recipe else None


def advise_precision(amp, device):
    """Print a note where another --amp makes a step on this CPU several times as fast."""
    if device.type != "cpu":
        return
    if amp == "off" and cpu_has_bf16():
        print("note: this CPU has bf16 units; --amp bf16 takes less time a step, down to half of "
              "it (docs/SPEED.md)")
    if amp == "bf16" and cpu_has_bf16() is False:
        print("note: this CPU has no bf16 units and only emulates them: --amp off takes about a "
              "tenth of the time a step (docs/SPEED.md)")


def print_recipe(run, recipe):
    args = run.args
    origin = f"from {args.init}" if args.init else "from scratch"
    parts = [f"{weight:g} {name}" for name, weight in run.objective.weights.items()]
    terms = " + ".join(parts)
    frames = recipe["train_frames"] + recipe["unlabelled_frames"]
    epochs = args.iters * run.total_batch / frames
    unlabelled = ""
    if recipe["unlabelled_frames"]:
        unlabelled = f" and {recipe['unlabelled_frames']} unlabelled"
    resuming = f"; resuming after step {run.start}" if run.start else ""

    print(f"{run.train_set.name}: {len(run.train_set)} train{unlabelled}, "
          f"{len(run.val_set)} val frames, {len(run.train_set.classes)} classes; "
          f"crops {args.crop[0]}x{args.crop[1]}, {args.augment} augmentation")
    note_padding(run)
    if args.with_val:
        print("note: val is trained on (--with-val): its scores say nothing of other frames, and "
              "the result is last.pth, to be scored on test")
    print(f"student SegFormer-{args.student.upper()} {origin}, norm {args.norm}, "
          f"{recipe['parameters']:,} parameters, on {run.device}, amp {args.amp}")
    print(f"loss = {terms}; AdamW, lr {args.lr:g} with {100 * args.warmup:g} % warm-up, "
          f"decay {args.weight_decay:g}, clip {args.grad_clip:g}")
    advise_precision(args.amp, run.device)
    print(f"{args.iters} steps of {run.total_batch} images = {args.batch_size} x {args.accum} "
          f"accumulated x {world_size()} processes, {epochs:.1f} epochs, seed {args.seed}; "
          f"writing to {run.folder}{resuming}", flush=True)


def note_padding(run):
    """Say that the crop is larger than the frames, where it is."""
    args = run.args
    if args.augment == "plain":                        # which scales frames to the crop
        return
    sentence = describe_padding(worked_sizes(run.train_set), args.crop, args.scale_range)
    if sentence:
        print(f"note: {sentence}")


# ------------------------------ losses, every few steps

class LossLog:
    """The losses of the steps: kept on the device, read from it once for REPORT_EVERY steps,
    written and printed.
    """

    def __init__(self, run):
        self.run = run
        self.columns = ["lr", "loss", *run.objective.weights, "grad_norm"]
        self.log = Log(run.folder, "log.csv", ["step", *self.columns], run.start)
        self.pending = []  # (step, lr, values) since the last report
        self.restart_clock()

    def restart_clock(self):
        """What came before counts neither as training nor as waiting."""
        self.clock = time.time()
        self.seconds_waited = 0.0

    def leave_out(self, seconds):
        """Compiling has no place in images per second."""
        self.clock += seconds

    def add_waiting(self, seconds):
        """A GPU works on what was queued while its process waits for data: that is no time lost,
        until it is idle.
        """
        if gpu_is_idle(self.run.device):
            self.seconds_waited += seconds

    def add(self, step, lr, values):
        """values: the terms and the gradient's norm, (terms + 1,), still on the device."""
        self.pending.append((step, lr, values))

    def is_full(self):
        return len(self.pending) == REPORT_EVERY

    def flush(self):
        """Write and print what is pending. Raises NotFinite."""
        if not self.pending:
            return
        run = self.run
        skips = run.progress if run.scaler.is_enabled() else None
        rows = read_losses(self.pending, run.objective.weights, run.folder, skips)
        self.log.add(rows)
        run.board.add_rows("train", self.columns, rows)

        seconds = time.time() - self.clock
        run.progress["seconds"] += seconds
        images_per_second = len(self.pending) * run.total_batch / seconds
        waited = self.seconds_waited / seconds
        print_progress(rows[-1], run, images_per_second, waited)
        self.pending.clear()
        self.restart_clock()


def gpu_is_idle(device):
    """Has the GPU nothing left to do? A CPU has nothing to do while its process waits."""
    return device.type != "cuda" or torch.cuda.current_stream(device).query()


def read_losses(pending, weights, folder, skips):
    """[(step, lr, values)] -> rows of the log: step, lr, loss, its terms, the gradient's norm.

    All are read from the device at once.
    skips: the dict that counts the steps which the fp16 scaler left out, or None without a scaler.
    Raises NotFinite, naming the term and the step, for a loss that is not finite, for a gradient
    that is not finite without a scaler, and for MAX_SKIPS steps left out in a row.
    """
    all_values = torch.stack([values for _, _, values in pending]).tolist()
    rows = []
    for (step, lr, _), values in zip(pending, all_values, strict=True):
        *terms, norm = values
        named_terms = dict(zip(weights, terms, strict=True))
        problem = find_problem(named_terms, norm, skips)
        if problem:
            raise NotFinite(f"step {step}: {problem}; stopped, {advice(folder)}")
        total = sum(weights[name] * value for name, value in named_terms.items())
        numbers = [lr, total, *terms, norm]
        rows.append([step] + [f"{number:.8g}" for number in numbers])
    return rows


def find_problem(terms, norm, skips):
    """What is wrong with a step, in words, or None. terms: {name: value}. Counts in `skips`."""
    broken = [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
    if broken:
        return " and ".join(broken)

    if skips is None:
        if math.isfinite(norm):
            return None
        finite = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        return f"the gradient is not finite, at finite {finite}"

    if math.isfinite(norm):
        skips["skipped_in_a_row"] = 0
        return None
    skips["skipped"] += 1
    skips["skipped_in_a_row"] += 1
    if skips["skipped_in_a_row"] >= MAX_SKIPS:
        return (f"the gradient overflowed fp16 in {MAX_SKIPS} steps in a row, "
                "though the scaler halved its scale each time")
    return None


def note_stretched_schedule(args, stored, step, folder, learning_rate):
    """A longer --iters changes the learning rate of the steps to come: say from what to what.

    stored: the flags that the run was begun with
    learning_rate(step, iters, peak, warmup): train.py's
    """
    if not args.iters or not stored.get("iters") or args.iters == stored["iters"]:
        return
    before = learning_rate(step, stored["iters"], args.lr, args.warmup)
    now = learning_rate(step, args.iters, args.lr, args.warmup)
    print(f"note: {folder} was begun with --iters {stored['iters']}; with {args.iters} its "
          f"schedule is stretched: the next step has learning rate {now:.2e} in place of "
          f"{before:.2e}, so the run is not the one that either number alone would have made",
          file=sys.stderr)


def advice(folder):
    return (f"the last good checkpoint is {folder}/last.pth. "
            "A smaller --lr, --grad-clip 1 or --amp off may help")


def print_progress(row, run, images_per_second, waited):
    """One line about the newest row of the log."""
    step, lr, loss, *terms, _ = row
    parts = []
    for (name, weight), value in zip(run.objective.weights.items(), terms, strict=True):
        parts.append(f"{weight:g} {name} {float(value):.4f}")

    seconds_left = round((run.args.iters - step) * run.total_batch / images_per_second)
    hours, seconds_left = divmod(seconds_left, 3600)
    minutes, seconds_left = divmod(seconds_left, 60)
    terms = " + ".join(parts)
    line = f"step {step}/{run.args.iters}  loss {float(loss):.4f} = {terms}  lr {float(lr):.2e}"
    line += f"  {images_per_second:.1f} images/s ({100 * waited:.0f} % waiting for data)"
    line += f"  {hours}:{minutes:02}:{seconds_left:02} left"
    if run.progress["skipped"]:
        line += f"  {run.progress['skipped']} steps skipped: fp16 overflow"
    print(line, flush=True)


# ------------------------------ scores

class ScoreLog:
    """scores.csv: a row for each validation."""

    def __init__(self, run):
        self.run = run
        self.columns = ["miou", "macc", "aacc", *run.train_set.classes]
        self.log = Log(run.folder, "scores.csv", ["step", *self.columns], run.start)
        self.fit_log = None
        if run.args.fit_log:
            self.fit_log = FitLog(run)

    def add(self, step, result, is_better):
        run = self.run
        best = " (best so far)" if is_better else ""
        frames = f"{run.val_set.name} {validation_name(run.args)}"
        print(f"step {step}: mIoU {100 * result['miou']:.2f} %, mAcc {100 * result['macc']:.2f} %, "
              f"aAcc {100 * result['aacc']:.2f} % "
              f"on {frames}, full resolution{best}", flush=True)

        numbers = [result["miou"], result["macc"], result["aacc"], *result["iou"]]
        row = [step] + [f"{value:.6f}" for value in numbers]
        self.log.add([row])
        if self.fit_log is not None:
            self.fit_log.add(step)
        run.board.add_rows("val", self.columns, [row])
        if run.board.writer:
            picture = draw_validation(run, [run.network.fold()], ["student"], frames=2)
            run.board.add_picture(step, np.asarray(picture))


def open_logs(run):
    """The logs of a run, and the first checkpoint of a new one."""
    run.board = Board(run.folder, run.args.tensorboard, run.start)
    run.loss_log = LossLog(run)
    run.score_log = ScoreLog(run)
    if run.start == 0:
        save(run, 0)                                   # from here on there is something to resume
        if rank() == 0:
            check_reads_back(run.folder / "last.pth", run.task)
        run.loss_log.restart_clock()


def draw_validation(run, models, names, frames):
    """-> PIL picture: some frames of the validation split, their truth and what `models` say."""
    indices = spread_indices(len(run.val_set), frames)
    return draw_comparison(models, names, run.val_set, indices)


def finish(run):
    """The table of per-class IoU and the picture, for the teacher and the student's best
    checkpoint.
    """
    if rank() > 0:
        return
    models, names, results = [], [], []
    if run.progress["teacher_scores"]:
        models.append(run.teacher.cpu())
        names.append(f"teacher {run.teacher.variant}")
        results.append(run.progress["teacher_scores"])
    best = run.progress["best_scores"]
    models.append(run.task.load(run.folder / "best.pth").fold())
    names.append(f"student {run.args.student}")
    results.append(best)

    picture = run.folder / "pictures.png"
    sheet = draw_validation(run, models, names, frames=4)
    with until_written():
        save_picture(sheet, picture)
    print(f"\n{run.val_set.name} {validation_name(run.args)}, {len(run.val_set)} frames, "
          f"full resolution; student's best checkpoint: step {best['step']}")
    print(table(names, results, run.val_set.classes))
    print(f"\npictures: {picture}; "
          f"checkpoints: {run.folder / 'best.pth'}, {run.folder / 'last.pth'}")
