"""Distil a SegFormer-B2 into a B0, and look at what was distilled. Read this first.

    python train.py --student b2 --lr 1.2e-3 --out runs/teacher      # a teacher, once
    python -m examples.distill [TEACHER] [--steps 100] [--out features.png]

Run it from the project's folder. `distill` is the loop with this project's parts: eq. 9 of the
paper without its KL term. The rest draws two frames, one row per stage: the teacher's features,
the student's, where the two agree, and where one query of the stage's last block looks.

train.py does the same with all that a long run needs: files, resuming, 16 bits, several GPUs.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from data import Augment, Stream, open_dataset, pixel_counts
from eval import evaluate, scores
from extras.cli import UsageError, number, run_command
from extras.outputs import picture_path, save_picture
from extras.pictures import grid
from extras.provenance import has_classes_of
from losses import Projections, class_weights, cosine, cskd, pekd, weighted_cross_entropy
from model import SIZES, load_checkpoint, segformer

# ---------------------------------------------------------------- distillation


def distill(teacher, train_set, steps, batch_size=4, learning_rate=2.4e-3):
    """Train a new B0 on the labels and on the teacher's features. -> (student, projections)"""
    student = segformer("b0", len(train_set.classes))
    projections = Projections(SIZES["b0"]["dims"], SIZES[teacher.variant]["dims"])
    weights = class_weights(pixel_counts(train_set))
    # stream[n] is the n-th augmented sample. It is endless, and shuffles anew in each pass.
    stream = Stream(train_set, Augment(crop=(96, 192), scale_range=(0.75, 1.5)))

    # The projections are trained too: without them here, the student would chase a random map.
    trained = [*student.parameters(), *projections.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)

    for step in range(steps):
        samples = [stream[step * batch_size + i] for i in range(batch_size)]
        images = torch.stack([image for image, _ in samples]) / 255        # (B, 3, H, W) in [0, 1]
        labels = torch.stack([label for _, label in samples])              # (B, H, W)

        with torch.no_grad():
            theirs = teacher.features(images)
        ours = student.features(images)
        stages, patch_embeds = projections(ours.stages, ours.patch_embeds)    # the teacher's widths

        wce = weighted_cross_entropy(ours.logits, labels, weights)            # eq. 3
        fd = sum(cskd(s, t) for s, t in zip(stages, theirs.stages, strict=True))      # eq. 5-7
        pe = pekd(patch_embeds, theirs.patch_embeds)                          # eq. 8
        loss = wce + fd + pe                                                  # eq. 9, lambda_KL = 0

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {loss:.3f} = {wce:.3f} labels "
                  f"+ {fd:.3f} stages + {pe:.3f} patch embeddings", flush=True)
    return student.eval(), projections


# ---------------------------------------------------------------- what it looks like

RADIUS = 6                                  # of the white square on the query, in pixels


@torch.no_grad()
def draw_frame(teacher, student, projections, image, query):
    """image (1, 3, H, W), query (row, column) in [0, 1] -> four rows of pictures, one per stage."""
    teacher_maps = teacher.features(image)
    student_maps = student.features(image)
    stages, _ = projections(student_maps.stages, student_maps.patch_embeds)

    frame = image[0].clone()                                               # (3, H, W)
    row = int(query[0] * frame.shape[1])
    column = int(query[1] * frame.shape[2])
    top = max(0, row - RADIUS)
    left = max(0, column - RADIUS)
    frame[:, top:row + RADIUS + 1, left:column + RADIUS + 1] = 1.0         # a white square

    rows = []
    for i, (ours, theirs) in enumerate(zip(stages, teacher_maps.stages, strict=True)):
        coloured_teacher, coloured_student = principal_colours(theirs[0], ours[0])
        similarity = cosine(ours, theirs, dim=1)[0]                        # S^C of eq. 5, (h, w)
        teacher_attention = attention_map(teacher, teacher.stages[i].blocks[-1], image, query)
        student_attention = attention_map(student, student.stages[i].blocks[-1], image, query)
        # heat(2 s - 1): a cosine of 0.5 is black, 1 is white
        colours = [frame, coloured_teacher, coloured_student, heat(2 * similarity - 1),
                   light(frame, teacher_attention), light(frame, student_attention)]
        rows.append([as_picture(x) for x in colours])
    return rows


def principal_colours(teacher, student):
    """Two features (C, h, w) -> the same two as colours (3, h, w), in the same three directions.

    Those in which the teacher's pixels differ most (PCA) become red, green and blue.
    """
    pixels = teacher.flatten(1)                                            # (C, h*w)
    mean = pixels.mean(1, keepdim=True)
    directions, _, _ = torch.linalg.svd(pixels - mean, full_matrices=False)
    directions = directions[:, :3].T                                       # (3, C)
    reach = (directions @ (pixels - mean)).abs().amax(1, keepdim=True)

    coloured = []
    for features in (teacher, student):
        along = directions @ (features.flatten(1) - mean) / reach          # (3, h*w) in [-1, 1]
        coloured.append((along / 2 + 0.5).unflatten(1, features.shape[1:]))
    return coloured


def attention_map(model, block, image, query):
    """softmax(q k^T / sqrt(d)) of one query of the block, a mean over its heads. -> (h, w)

    Divided by its largest value, so that the brightest key is the one that counts most.
    """
    inputs = []

    def remember(module, args):
        inputs.append(args[0])

    hook = block.attn.register_forward_pre_hook(remember)
    model(image)
    hook.remove()

    attn = block.attn
    x = inputs[0][0]                                                       # (H, W, C)
    row = int(query[0] * x.shape[0])
    column = int(query[1] * x.shape[1])
    q = attn.q(x[row, column]).unflatten(0, (attn.heads, -1))              # (heads, d)
    k = attn.k(attn.reduce(x[None]))[0].unflatten(2, (attn.heads, -1))     # (h, w, heads, d)
    # n: heads; h, w: the keys, which spatial reduction made fewer than the queries
    logits = torch.einsum("nd,hwnd->nhw", q, k) / q.shape[1] ** 0.5        # (heads, h, w)
    weights = logits.flatten(1).softmax(1).view_as(logits).mean(0)         # (h, w)
    return weights / weights.max()


def heat(values):
    """(h, w) -> colours (3, h, w): 0 is black, over red and yellow to 1, white."""
    return torch.stack([3 * values, 3 * values - 1, 3 * values - 2])


def light(frame, weights):
    """The frame (3, H, W), dark but for where weights (h, w) in [0, 1] are large."""
    wide = F.interpolate(weights[None, None], size=frame.shape[1:], mode="nearest")[0]
    return frame * (0.15 + 0.85 * wide)


def as_picture(colours):
    """Colours (3, h, w) in [0, 1] -> uint8 (256, 512, 3), each pixel of them a block."""
    large = F.interpolate(colours[None], size=(256, 512), mode="nearest")[0]
    return (large.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()


# ---------------------------------------------------------------- command

def main():
    parser = argparse.ArgumentParser(description="Distil a teacher into a B0 on toy scenes.")
    parser.add_argument("teacher", nargs="?", default="runs/teacher/best.pth", metavar="TEACHER")
    parser.add_argument("--steps", type=number(int, 1), default=100)
    parser.add_argument("--out", default="features.png", metavar="FILE", type=picture_path)
    args = parser.parse_args()
    if not Path(args.teacher).exists():
        raise UsageError(f"there is no teacher {args.teacher}: "
                         "python train.py --student b2 --lr 1.2e-3 --out runs/teacher trains one")

    torch.manual_seed(0)
    teacher = load_checkpoint(args.teacher).fold()                         # frozen, in eval mode
    train_set = open_dataset("toy", "train")
    val_set = open_dataset("toy", "val")
    student, projections = distill(teacher, train_set, args.steps)
    for name, model in (("teacher", teacher), ("student", student)):
        if has_classes_of(model, val_set):
            miou = scores(evaluate(model, val_set))["miou"]
            print(f"{name}: mIoU {100 * miou:.2f} % on {len(val_set)} val frames")
        else:
            # Its features can teach all the same.
            print(f"{name}: not scored, its classes are others than the toy scenes'")

    rows = []
    for i in (1, 2):                                                       # two frames with cars
        image, label = val_set[i]
        cars = (label == val_set.classes.index("car")).nonzero()           # (pixels, 2)
        # The query: a pixel in the middle of the list of car pixels.
        row, column = cars[len(cars) // 2].tolist()
        query = (row / label.shape[0], column / label.shape[1])
        larger = F.interpolate(image[None] / 255, scale_factor=2)          # four times the tokens
        rows += draw_frame(teacher, student, projections, larger, query)
    captions = ("frame, query in white", "teacher's features", "student's, projected",
                "their cosine, 0.5 to 1", "where the teacher looks", "where the student looks")
    save_picture(grid(rows, captions), args.out)
    print(f"{args.out}: two frames, one row per stage; colours are the teacher's main directions")


if __name__ == "__main__":
    run_command(main)
