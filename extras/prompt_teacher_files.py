"""A teacher that is not here: what it said, one .npz for each frame.

    python -m extras.prompt write-teacher TEACHER.pth --data SPEC --out DIR     # of our own
    python -m extras.prompt train --teacher-files DIR ...                       # learn from it

DIR/STEM.npz belongs to the frame STEM of the data and has

    prompts     K strings
    presence    float (K,)              logits: is the thing there?
and its masks in one of three ways, of the whole frame at any resolution:
    mask        float (K, h, w)         logits
    instances   uint8 (N, h, ceil(w / 8))   N masks, packed by numpy.packbits along the last axis
    width       int                     w, which packing does not tell
    scores      float (N,)              0 to 1
    of_prompt   int (N,)                the prompt that each instance answers
or the same three without of_prompt, as a segmenter of "everything" leaves them: masks without
names. These are matched with the regions of the frame's label, cheapest pairs first.

Of instances, those with a score below 0.05 teach nothing (but the best of a prompt always does),
and at most 30 are used. A prompt that a file does not have is an error: a student cannot be asked
what its teacher was not.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import DatasetError, resize_pair
from extras.outputs import output_file
from extras.prompt_data import NOTHING
from extras.prompt_words import members, plain

LOWEST_SCORE = 0.05
MOST_INSTANCES = 30
SURE = 10.0                                                       # the logit of a certain yes


# ---------------------------------------------------------------- instances

def confident(scores, lowest=LOWEST_SCORE, most=MOST_INSTANCES):
    """-> indices of the scores to keep, best first: at least `lowest`, at most `most`, and never
    fewer than one where there is any.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    kept = [int(i) for i in order if scores[i] >= lowest]
    return (kept or order[:1].tolist())[:most]


def greedy_match(cost, most=MOST_INSTANCES):
    """Pairs of a row and a column, the cheapest first, each used once -> [(row, column)].

    At most `most` pairs. Greedy is not optimal: of [[1, 2], [1.5, 100]] it takes the 1 and has to
    pay the 100, where 2 + 1.5 would have been cheaper. It is simple, and for masks, where a good
    pair is far cheaper than any other, it is right. Infinite costs are never paired.
    """
    cost = np.array(cost, float)
    pairs = []
    while len(pairs) < most and np.isfinite(cost).any():
        row, column = np.unravel_index(np.argmin(cost), cost.shape)
        pairs.append((int(row), int(column)))
        cost[row, :] = np.inf
        cost[:, column] = np.inf
    return pairs


def regions_of(label, num_classes):
    """Connected parts of one class -> [(class, bool (h, w))]. label: uint8 (h, w), a small one."""
    regions = []
    for c in range(num_classes):
        left = label == c
        while left.any():
            start = np.unravel_index(np.argmax(left), left.shape)
            region = grow(left, start)
            regions.append((c, region))
            left = left & ~region
    return regions


def grow(mask, start):
    """The part of `mask` that is connected with the pixel `start` -> bool of its shape."""
    region = np.zeros_like(mask)
    todo = [start]
    region[start] = True
    height, width = mask.shape
    while todo:
        y, x = todo.pop()
        for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= near[0] < height and 0 <= near[1] < width
            if inside and mask[near] and not region[near]:
                region[near] = True
                todo.append(near)
    return region


def match_with_regions(instances, label, num_classes):
    """Masks without names get those of the label's regions that they fit best.

    instances bool (N, h, w), label uint8 (h, w) -> [(instance, class)]; the cost of a pair is
    1 - IoU, and masks that do not meet are no pair.
    """
    regions = regions_of(label, num_classes)
    cost = np.full((len(instances), len(regions)), np.inf)
    for n, instance in enumerate(instances):
        for r, (_, region) in enumerate(regions):
            overlap = (instance & region).sum()
            if overlap:
                cost[n, r] = 1 - overlap / (instance | region).sum()
    return [(n, regions[r][0]) for n, r in greedy_match(cost)]


# ---------------------------------------------------------------- one file

class TeacherFile(NamedTuple):
    """What a file says: prompts, presence logits (K,), and mask logits (K, h, w)."""
    prompts: list
    presence: np.ndarray
    mask: np.ndarray


def read_teacher_file(path, label=None, table=None):
    """-> TeacherFile. Raises DatasetError, in a sentence, for a file that is not as said above.

    label uint8 (H, W) and table bool (K, C) (extras.prompt_words.members) of the file's prompts are
    what instances without names are matched by.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise DatasetError(f"{path}: there is no such file, and every frame needs one") from None
    except (OSError, ValueError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DatasetError(f"{path}: not an .npz that can be read ({reason})") from None
    prompts = [str(prompt) for prompt in np.atleast_1d(content.get("prompts", []))]
    presence = content.get("presence")
    if not prompts or presence is None or presence.shape != (len(prompts),):
        raise DatasetError(f"{path}: it needs `prompts` (K strings) and `presence` (K logits)")
    if "mask" in content:
        mask = content["mask"]
        if mask.ndim != 3 or len(mask) != len(prompts):
            raise DatasetError(f"{path}: `mask` must be logits (K, h, w), a map for each prompt")
    else:
        mask = mask_of_instances(content, len(prompts), path, label, table)
    if not np.isfinite(mask).all() or not np.isfinite(presence).all():
        raise DatasetError(f"{path}: it has logits that are not finite")
    return TeacherFile(prompts, presence.astype(np.float32), mask.astype(np.float32))


def mask_of_instances(content, count, path, label, table):
    """Instances of a file -> mask logits (K, h, w): where one of a prompt is, a certain yes."""
    needed = {"instances", "width", "scores"}
    if not needed <= content.keys():
        raise DatasetError(f"{path}: it has neither `mask` nor `instances`, `width` and `scores`")
    packed = content["instances"]
    scores = content["scores"]
    width = int(content["width"])
    fits = (packed.dtype == np.uint8 and packed.ndim == 3 and len(packed) == len(scores)
            and packed.shape[2] == -(-width // 8))
    if not fits:
        raise DatasetError(f"{path}: `instances` must be uint8 (N, h, ceil(width / 8)), with a "
                           f"score for each")
    instances = np.unpackbits(packed, axis=2, count=width).astype(bool)      # (N, h, w)
    mask = np.full((count, *instances.shape[1:]), -SURE, np.float32)
    for n, k in named_instances(content, instances, path, label, table):
        mask[k][instances[n]] = SURE
    return mask


def named_instances(content, instances, path, label, table):
    """-> [(instance, prompt)] of those to learn from."""
    scores = content["scores"]
    if "of_prompt" not in content:
        if label is None:
            raise DatasetError(f"{path}: its instances have no names (`of_prompt`)")
        kept = confident(scores, most=len(scores))
        small = resize_label(label, instances.shape[1:])
        pairs = match_with_regions(instances[kept], small, table.shape[1])
        return [(kept[n], k) for n, c in pairs for k in np.flatnonzero(table[:, c])]

    of_prompt = content["of_prompt"]
    if len(of_prompt) != len(scores) or (len(of_prompt) and of_prompt.min() < 0):
        raise DatasetError(f"{path}: `of_prompt` must name a prompt for each instance")
    if len(of_prompt) and of_prompt.max() >= len(content["prompts"]):
        raise DatasetError(f"{path}: `of_prompt` names prompt {of_prompt.max()}, "
                           f"which the file does not have")
    named = []
    for k in np.unique(of_prompt):
        mine = np.flatnonzero(of_prompt == k)
        for place in confident(scores[mine]):
            named.append((int(mine[place]), int(k)))
    return named


def resize_label(label, size):
    """uint8 (H, W) at `size`, nearest neighbours."""
    small = F.interpolate(torch.from_numpy(label)[None, None], size=tuple(size), mode="nearest")
    return small[0, 0].numpy()


def write_teacher_file(path, prompts, mask, presence):
    """Logits (K, h, w) and (K,) of one frame, in 16 bits."""
    with output_file(path) as file:
        np.savez_compressed(file, prompts=np.array(prompts), mask=np.float16(mask),
                            presence=np.float16(presence))


def write_instances_file(path, prompts, presence, found):
    """Instances of one frame. found: for each prompt (masks bool (N, h, w), scores (N,))."""
    masks = np.concatenate([np.asarray(masks, bool) for masks, _ in found])
    scores = np.concatenate([np.asarray(scores, np.float32) for _, scores in found])
    counts = [len(scores) for _, scores in found]
    with output_file(path) as file:
        np.savez_compressed(
            file,
            prompts=np.array(prompts),
            presence=np.asarray(presence, np.float32),
            instances=np.packbits(masks, axis=2),
            width=np.array(masks.shape[2]),
            scores=scores,
            of_prompt=np.repeat(np.arange(len(prompts)), counts),
        )


# ---------------------------------------------------------------- as training samples

class StoredTargets(NamedTuple):
    """A label, and what a teacher said about its frame; moves and splits as a label does."""
    label: torch.Tensor                                           # (..., H, W)
    mask: torch.Tensor                                            # (..., K, h, w)
    presence: torch.Tensor                                        # (..., K)

    def to(self, *args, **options):
        return StoredTargets(*[part.to(*args, **options) for part in self])

    def chunk(self, count):
        parts = zip(*[part.chunk(count) for part in self], strict=True)
        return [StoredTargets(*part) for part in parts]

    def nothing(self):
        """What a teacher should have said about an image that shows nothing."""
        return StoredTargets(
            torch.full_like(self.label, NOTHING),
            torch.full_like(self.mask, -SURE),
            torch.full_like(self.presence, -SURE))


class WithTeacher(torch.utils.data.Dataset):
    """dataset[i] -> (image, StoredTargets), with the masks for `prompts`, in their order."""

    def __init__(self, dataset, folder, prompts):
        self.dataset = dataset
        self.folder = Path(folder)
        self.prompts = [plain(prompt) for prompt in prompts]
        self[0]                                                   # what is wrong shows at once

    def __len__(self):
        return len(self.dataset)

    def read(self, i, label):
        """-> (mask (K, h, w), presence (K,)). Raises DatasetError."""
        path = self.folder / f"{self.dataset.stems[i]}.npz"
        table = members(read_prompts(path), self.dataset.classes).numpy()
        said = read_teacher_file(path, label, table)
        places = {plain(prompt): k for k, prompt in enumerate(said.prompts)}
        lacking = [prompt for prompt in self.prompts if prompt not in places]
        if lacking:
            raise DatasetError(f"{path}: its teacher was not asked for {lacking[0]!r} "
                               f"({len(lacking)} such prompts)")
        order = [places[prompt] for prompt in self.prompts]
        return torch.from_numpy(said.mask[order]), torch.from_numpy(said.presence[order])

    def __getitem__(self, i):
        image, label = self.dataset[i]
        mask, presence = self.read(i, label.numpy())
        return image, StoredTargets(label, mask, presence)


def read_prompts(path):
    """The prompts of a file; () for one that read_teacher_file will complain of."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return [str(prompt) for prompt in archive["prompts"]]
    except (OSError, ValueError, EOFError, KeyError):
        return []


class WholeFrame:
    """The frame resized to `crop`, flipped half of the time, and its masks with it."""

    def __init__(self, crop):
        self.crop = tuple(crop)

    def __call__(self, image, target, rng):
        image, label = resize_pair(image, target.label, self.crop)
        height, width = self.crop
        size = (-(-height // 4), -(-width // 4))                  # of the student's logits
        mask = F.interpolate(target.mask[None], size=size, mode="bilinear", align_corners=False)[0]
        if rng.random() < 0.5:
            image = image.flip(2)
            label = label.flip(1)
            mask = mask.flip(2)
        return image, StoredTargets(label, mask, target.presence)
