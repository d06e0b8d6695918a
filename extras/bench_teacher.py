"""What a teacher costs a step: asked in every one, or its answers kept (train.py --teacher-cache).

    python bench.py teacher [--size H W] [--batch B]

A step of train.py, B0 with DyT from a B2 by CSKD, beside the same without a teacher. What is kept
was asked before the clock runs: in a run that is one pass over the frames and their mirror images,
whose cost is said too. Then what each other loss of distillation costs in CSKD's place, by turns
with a step without a teacher: the steps that it must be worth.
"""

from functools import partial

import torch

import train
from extras.measure import Candidate, compare, mib, print_row, run_in_turns
from extras.outputs import temporary_folder
from extras.teacher_cache import TeacherCache
from losses import Projections, class_weights
from model import NORMS, SIZES, segformer

ALONE = "no teacher"
ASKED = "asked in every step"
KEPT = "answers kept"
ANSWER = "one answer, an image"
OTHER_LOSSES = {                            # in CSKD's place: how the table calls them, their flags
    "PEKD": ["--lambda-pe", "1"],
    "cosine of pixels": ["--lambda-cosine", "1"],
    "global cosine": ["--lambda-gcos", "1"],
    "CWD": ["--lambda-cwd", "1"],
    "DIST": ["--lambda-dist", "1"],
    "KL": ["--lambda-kl", "1", "--temperature", "4"],
    "KL of z-scores": ["--lambda-zkl", "1"],
}
WIDTHS = (22, 10, 18, 13, 10)                                     # of the table's columns
AMP_OF = {torch.float32: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}


def loss_flags(side):
    """The loss by which the teacher teaches: one of OTHER_LOSSES, or CSKD."""
    # Beside a teacher train.py takes CSKD and PEKD unless it is told not to. Where the loss is one
    # of them its flag comes once more, and the last one counts.
    neither = ["--lambda-fd", "0", "--lambda-pe", "0"]
    cskd = ["--lambda-fd", "1"]
    return neither + OTHER_LOSSES.get(side, cskd)


def make_run(options, side):
    """-> a Run of train.py with fresh weights, and its teacher, None for ALONE"""
    torch.manual_seed(0)
    flags = ["--student", "b0", "--norm", "dyt", "--augment", "plain", "--lr", "1e-5"]
    flags += ["--amp", AMP_OF[options.dtype]]
    student = segformer("b0", options.classes, NORMS["dyt"])
    teacher, projections = None, None
    if side != ALONE:
        flags += ["--teacher", "b2.pth", *loss_flags(side)]
        teacher = segformer("b2", options.classes, NORMS["dyt"]).fold().to(options.device)
        projections = Projections(SIZES["b0"]["dims"], SIZES["b2"]["dims"])
    args, _ = train.FLAGS.parse(flags)
    weight = class_weights(torch.arange(1, options.classes + 1))
    objective = train.Objective(student, projections, args, weight).to(options.device)
    objective.train()
    return train.make_run(args, options.device, student, teacher, objective, train.SEGMENTATION)


def make_batch(options):
    """-> images (B, 3, H, W), whole numbers / 255, and labels (B, H, W)"""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, *options.size)
    images = torch.randint(0, 256, (options.batch, 3, *options.size), generator=generator) / 255
    labels = torch.randint(0, options.classes, shape, generator=generator)
    return images.to(options.device), labels.to(options.device)


def make_step(options, side, folder):
    """-> a function that does one step, and returns the values of train.train_step"""
    run = make_run(options, side)
    images, labels = make_batch(options)
    if side not in (ALONE, ASKED):
        run.teacher_cache = TeacherCache(
            folder,
            ask=lambda batch: run.objective.ask_teacher(run.teacher, batch),
            parts=run.objective.teacher_parts - {None},
            identity=["bench"],
            images=options.batch)
        run.teacher_cache.has_room = True                         # for one batch: no word on it
        with run.autocast():
            run.teacher_cache.ask(images)

    def step():
        run.optimizer.zero_grad(set_to_none=True)
        return train.train_step(run, images, labels)
    return step


def make_answer(options):
    """-> a function that asks the teacher about one image"""
    run = make_run(options, ASKED)
    images, _ = make_batch(options)

    def answer():
        with run.autocast():
            return run.objective.ask_teacher(run.teacher, images[:1])
    return answer


def bench_teacher(options):
    """Steps with and without a teacher. -> rows"""
    options = options.with_two_images()
    rounds = max(options.rounds // 3, min(options.rounds, 3))     # a step is long
    print(f"teacher: batch {options.batch}, median of {rounds} rounds")
    print_row(("", "ms", "to no teacher", "its range", "peak MiB"), WIDTHS)
    with temporary_folder() as folder:
        candidates = step_candidates(options, (ALONE, ASKED, KEPT), folder)
        candidates[ANSWER] = Candidate(partial(make_answer, options))
        timings = run_in_turns(candidates, rounds, options.device)
        rows = [show_step(options, side, timings) for side in timings]

        print("\nin CSKD's place, answers kept")
        for side in OTHER_LOSSES:
            # In pairs: of all at once, the networks may not fit in memory
            candidates = step_candidates(options, (ALONE, side), folder)
            timings = run_in_turns(candidates, rounds, options.device)
            rows.append(show_step(options, side, timings))
    return rows


def step_candidates(options, sides, folder):
    return {side: Candidate(partial(make_step, options, side, folder)) for side in sides}


def show_step(options, side, timings):
    """Print the row of this side, of a {side: Timing} that ALONE is among. -> its row"""
    timing = timings[side]
    ratio = compare(timing, timings[ALONE])
    cells = ("", "") if side == ANSWER else ratio.cells()
    print_row((side, f"{1e3 * timing.seconds:.0f}", *cells, mib(timing.peak)), WIDTHS)
    return {"name": side, "batch": options.batch, **timing.as_row(), **ratio.as_row()}
