"""What a student makes of each prompt, to look at: a picture a prompt, and a page index.html.

    from extras.prompt_pictures import draw_pictures
    draw_pictures(student, teacher, dataset, Path("pictures"))
"""

import html

import numpy as np
import torch

from data import IGNORE
from extras.comparison import spread_indices
from extras.outputs import save_picture, write_text
from extras.pictures import grid
from extras.prompt_scores import probabilities
from extras.prompt_words import GENERIC, absent_words, class_prompts, file_words, members

FRAMES = 4
ABSENT_SHOWN = 2
FOUND = np.array((255, 160, 0))                                   # the colour of a mask
STRENGTH = 0.6                                                    # of that colour over the image
FADED = 0.4                                                       # how dark all else is


def paint(image, mask):
    """RGB uint8 (H, W, 3), bool (H, W) -> the mask in colour over the image, all else darker."""
    image = np.asarray(image, float)
    coloured = (1 - STRENGTH) * image + STRENGTH * FOUND
    painted = np.where(np.asarray(mask)[:, :, None], coloured, FADED * image)
    return painted.astype(np.uint8)


def prompts_to_draw(classes):
    return [GENERIC[1], *class_prompts(classes), *absent_words(classes, ABSENT_SHOWN)]


@torch.no_grad()
def masks_of(model, image, prompts, size):
    """-> bool (K, H, W): where the network sees each prompt; nowhere where presence says no."""
    mask, presence = probabilities(model, image, model.read(prompts), size)
    return (mask > 0.5) & (presence > 0.5)[:, None, None]


def draw_pictures(student, teacher, dataset, folder):
    """PROMPT.png for each prompt: image, truth, teacher where there is one, student, in some
    frames; and index.html, which shows them all.
    """
    prompts = prompts_to_draw(dataset.classes)
    table = members(prompts, dataset.classes)                     # (K, C)
    networks = [student] if teacher is None else [teacher, student]
    captions = ["image", "truth", "student"] if teacher is None else [
        "image", "truth", "teacher", "student"]
    rows = {prompt: [] for prompt in prompts}
    for i in spread_indices(len(dataset), FRAMES):
        image, label = dataset[i]
        frame = image.permute(1, 2, 0).numpy()                    # (H, W, 3)
        truth = truth_masks(label, table)
        answers = [masks_of(network, image, prompts, label.shape) for network in networks]
        for k, prompt in enumerate(prompts):
            painted = [paint(frame, said[k]) for said in (truth, *answers)]
            rows[prompt].append([frame, *painted])

    names = {}
    for prompt, cells in rows.items():
        name = file_words(prompt) + ".png"
        if name in names.values():
            name = f"{len(names)}_{name}"
        names[prompt] = name
        save_picture(grid(cells, captions, width=240), folder / name)
    write_text(folder / "index.html", page(names, dataset.name))
    print(f"{len(names)} pictures in {folder}, all of them in {folder / 'index.html'}")


def truth_masks(label, table):
    """Label (H, W), table bool (K, C) -> bool (K, H, W); void is of no prompt."""
    K, C = table.shape
    names = torch.zeros(K, 256, dtype=torch.bool)
    names[:, :C] = table
    names[:, IGNORE] = False
    return names[:, label.long()]


def page(names, data):
    """-> HTML of {prompt: file}."""
    title = f"Prompts on {html.escape(data)}"
    parts = ["<!DOCTYPE html>", "<meta charset='utf-8'>", f"<title>{title}</title>",
             f"<h1>{title}</h1>",
             "<p>Orange: where the network sees what it was asked for.</p>"]
    for prompt, name in names.items():
        parts.append(f"<h2>{html.escape(prompt)}</h2>")
        parts.append(f"<img src='{html.escape(name)}' alt='{html.escape(prompt)}'>")
    return "\n".join(parts) + "\n"
