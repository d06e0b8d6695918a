"""What a teacher says of each image, kept in a folder: train.py --teacher-cache DIR.

    cache = TeacherCache("answers/", ask, parts={"stages"}, identity=["9f3c..."], images=734)
    features = cache.ask(images)                                  # as ask(images)

With --augment plain a training image is a frame or its mirror image, and a frozen teacher says the
same of them in every epoch. So it is asked about each once; after the first epoch a distilled step
costs the student and the losses. All runs that learn from one teacher share its answers.

Each image is asked about by itself, so that an answer never depends on which others are known: a
run with the cache is the same wherever it was stopped, and is the run without it up to rounding.

A file for each image and part, DIR/TEACHER/IMAGE.stages.npz. It is a zip, whose checksums are
verified when it is read; one that is damaged is written anew.
"""

import hashlib
import json
import shutil
import zipfile

import numpy as np
import torch

from data import expand_user
from extras.cli import UsageError
from extras.distributed import rank
from model import Features, as_image, as_tokens, write_atomically

MIB = 2 ** 20


class TeacherCache:
    """ask: (B, 3, H, W) -> Features, of a frozen teacher
    parts: which of "logits", "stages" and "patch_embeds" the losses read; the others are not kept
    identity: what decides an answer beside the image, as JSON has it: the teacher, the precision
    images: how many different ones will come, to know whether they fit on the disk

    Raises UsageError.
    """

    def __init__(self, folder, ask, parts, identity, images):
        known_by = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
        self.folder = expand_user(folder) / known_by
        self.ask_teacher = ask
        self.parts = sorted(parts)
        self.images = images
        self.has_room = False                                     # looked at once
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--teacher-cache {folder}: no folder can be made there "
                             f"({error.strerror})") from None

    def ask(self, images):
        """Float images (B, 3, H, W), whole numbers / 255 -> what the teacher says of them."""
        answers = [self.answer(image[None]) for image in images]
        batch = {}
        for part in self.parts:
            batch[part] = []
            for i in range(len(answers[0][part])):
                of_images = [answer[part][i].to(images.device) for answer in answers]
                batch[part].append(torch.cat(of_images))          # (B, C_i, H_i, W_i)
        logits = batch["logits"][0] if "logits" in batch else None
        return Features(logits, batch.get("stages"), batch.get("patch_embeds"))

    def answer(self, image):
        """(1, 3, H, W) -> {part: its maps, each (1, C_i, H_i, W_i)}"""
        name = image_name(image)
        answer = {}
        for part in self.parts:
            maps = read_maps(self.folder / f"{name}.{part}.npz")
            if maps is None:
                return self.ask_and_keep(image, name)
            answer[part] = maps
        return answer

    def ask_and_keep(self, image, name):
        features = self.ask_teacher(image)
        answer = {}
        for part in self.parts:
            maps = getattr(features, part)
            maps = [maps] if part == "logits" else maps
            answer[part] = [channels_last(each) for each in maps]
        self.check_room(answer)
        for part, maps in answer.items():
            path = self.folder / f"{name}.{part}.npz"
            try:
                write_maps(path, maps)
            except OSError as error:
                raise UsageError(f"{path}: a teacher's answer cannot be kept there "
                                 f"({error.strerror or error}); make room, or leave "
                                 "--teacher-cache out") from None
        return answer

    def check_room(self, answer):
        """Raise UsageError where the answers about all images will not fit, before an hour is
        spent.

        Those that are there already are counted as room. If they are about other images (of another
        crop), a disk that is too small is found only when it is full; nothing is lost then either.
        """
        if self.has_room:
            return
        self.has_room = True
        size = 0
        for maps in answer.values():
            size += sum(each.nbytes for each in maps)
        there = 0
        for part in self.parts:
            there += sum(path.stat().st_size for path in self.folder.glob(f"*.{part}.npz"))
        free = shutil.disk_usage(self.folder).free + there
        words = (f"what the teacher says of {self.images} images takes {size / MIB:.1f} MiB each, "
                 f"{self.images * size / MIB:.0f} MiB")
        if self.images * size > free:
            raise UsageError(f"--teacher-cache: {words}; {self.folder} has room for "
                             f"{free / MIB:.0f} MiB")
        if rank() == 0:
            print(f"{words} in {self.folder}", flush=True)


def image_name(image):
    """The same for the same pixels, (1, 3, H, W) in [0, 1]."""
    pixels = (image * 255).round().to(torch.uint8).cpu().contiguous()
    content = hashlib.sha256(json.dumps(list(image.shape)).encode())
    content.update(pixels.numpy())
    return content.hexdigest()[:24]


def channels_last(image):
    """In the order in which the encoder has it, and a file: a loss must not round otherwise only
    because an answer was read.
    """
    return as_image(as_tokens(image).contiguous())


def write_maps(path, maps):
    """maps: [(1, C_i, H_i, W_i)], channels-last. Raises OSError."""
    arrays = {}
    for i, each in enumerate(maps):
        tokens = as_tokens(each).cpu()                            # (1, H_i, W_i, C_i)
        if tokens.dtype == torch.bfloat16:                        # numpy has none: its 16 bits
            arrays[f"{i}.bfloat16"] = tokens.view(torch.int16).numpy()
        else:
            arrays[str(i)] = tokens.numpy()
    with write_atomically(path, shared=True) as file:             # other processes may write it too
        np.savez(file, **arrays)


def read_maps(path):
    """-> [(1, C_i, H_i, W_i)], or None where there is no whole file."""
    if not path.is_file():                                        # opening a pipe would wait
        return None
    maps = []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for i, name in enumerate(arrays.files):
                tokens = torch.from_numpy(arrays[name])
                if name == f"{i}.bfloat16":
                    tokens = tokens.view(torch.bfloat16)
                elif name != str(i):
                    return None
                maps.append(as_image(tokens))
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, TypeError,
            zipfile.BadZipFile):
        return None
    return maps or None
