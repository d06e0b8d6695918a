"""A network that is told what to segment, asked about every frame of a data set.

    result = score(model, dataset, ask(dataset.classes))          # see extras/prompt_metrics.py
"""

import time

import torch
import torch.nn.functional as F

from data import resize_pair
from eval import evaluate, scores
from extras.cli import NotFinite
from extras.prompt_data import empty_images
from extras.prompt_metrics import Tally, mean_of

EMPTY_IMAGES = 20


@torch.no_grad()
def probabilities(model, image, words, out_size):
    """uint8 image (3, H, W), words (K, D) -> mask (K, *out_size), presence (K,), on the CPU.

    The image is seen at the model's input size. Raises NotFinite.
    """
    size = model.input_size or image.shape[1:]
    blank = torch.zeros(image.shape[1:], dtype=torch.uint8)
    image, _ = resize_pair(image, blank, tuple(size))
    device = words.device
    pixels = model.look(image[None].to(device).float() / 255)
    answer = model.compare(pixels, words)
    if not answer.mask.isfinite().all() or not answer.presence.isfinite().all():
        raise NotFinite("the network's output is not finite: its weights are broken")
    mask = F.interpolate(answer.mask, size=tuple(out_size), mode="bilinear", align_corners=False)
    return mask[0].sigmoid().cpu(), answer.presence[0].sigmoid().cpu()


def score(model, dataset, questions, teacher=None, progress=None):
    """-> what Tally.result gives; also "argmax" (mIoU of the class prompts against each other, by
    an ordinary confusion matrix), "empty" (share of yes about images of nothing) and "ms".

    teacher: a PromptSegmenter, for "agreement"
    """
    model.eval()
    with torch.no_grad():
        words = model.read(questions.prompts)
        teacher_words = teacher.read(questions.prompts) if teacher is not None else None
    tally = Tally(questions)
    for i in range(len(dataset)):
        image, label = dataset[i]
        mask, presence = probabilities(model, image, words, label.shape)
        said = None
        if teacher is not None:
            soft, sure = probabilities(teacher, image, teacher_words, label.shape)
            said = (soft > 0.5) & (sure > 0.5)[:, None, None]
        tally.add(mask, presence, label, said)
        if progress:
            progress(i + 1, len(dataset))
    result = tally.result()

    network = model.fold()
    result["argmax"] = scores(evaluate(network, dataset, model.input_size))["miou"]
    result["empty"] = yes_about_nothing(model, words, dataset[0][0].shape[1:])
    result["ms"] = milliseconds(model, dataset, words)
    return result


def yes_about_nothing(model, words, size):
    """The share of prompts that are said to be there in images of nothing."""
    shares = []
    for image in empty_images(EMPTY_IMAGES, size):
        _, presence = probabilities(model, image, words, size)
        shares.append((presence > 0.5).float().mean().item())
    return mean_of(shares)


def milliseconds(model, dataset, words, frames=5):
    """The median time of an image with all prompts; the first is not counted."""
    taken = []
    for i in range(min(frames + 1, len(dataset))):
        image, label = dataset[i]
        began = time.perf_counter()
        probabilities(model, image, words, label.shape)
        taken.append(1000 * (time.perf_counter() - began))
    later = sorted(taken[1:] or taken)
    return later[len(later) // 2]
