"""Sizes that cannot be had are refused before anything is allocated.

    check_memory(args, device)
    check_shared_memory(args)
"""

import os
import shutil
from pathlib import Path

import torch

from extras.cli import UsageError

# Bytes of a pixel: as the loader gives it (image and label), and as the network reads it (three
# floats). All that the network computes from it comes on top, so what is refused is surely too
# large, and what is not may still be.
AS_READ = 4
AS_FLOATS = 12
SHARED_MEMORY = "/dev/shm"                             # where Linux keeps it; a container: 64 MiB
BATCHES_AHEAD = 4                                      # that each of the --workers keeps ready


def check_memory(args, device):
    """Raise UsageError where a step's images alone, or one frame at --size, are more than the
    memory.
    """
    images = args.batch_size * args.accum
    height, width = args.crop
    pixels = {f"the {images:,} images of a step, {height}x{width} pixels each,":
              images * height * width}
    if args.size:
        height, width = args.size
        pixels[f"a frame of {height}x{width} pixels and its network"] = height * width

    memory = device_memory(device)
    for what, number in pixels.items():
        needed = number * (AS_READ + AS_FLOATS)
        if memory and needed > memory:
            raise UsageError(f"{what} need {needed / 2**30:,.0f} GiB and more, and {device} has "
                             f"{memory / 2**30:,.0f}: take a smaller --batch-size, --accum, --crop "
                             "or --size")


def check_shared_memory(args):
    """Raise UsageError where the batches that --workers keep ready have no room.

    The system ends a worker that writes beyond it, be it hours later, at a validation, when they
    are first ready all at once.
    """
    if not args.workers or not os.path.isdir(SHARED_MEMORY):
        return
    height, width = args.crop
    batch = args.batch_size * args.accum * height * width * AS_READ
    batches = args.workers * BATCHES_AHEAD
    if args.iters:
        batches = min(batches, args.iters)
    needed = batches * batch
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UsageError(f"the batches that --workers {args.workers} keep ready need "
                         f"{needed / 2**20:,.1f} MiB of {SHARED_MEMORY}, where {free / 2**20:,.1f} "
                         "are free: take fewer --workers, or give it more (docker run --shm-size)")


def device_memory(device):
    """-> bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):      # Windows has no sysconf
        return None
    limit = container_limit()
    return min(memory, limit) if limit else memory


def container_limit():
    """-> the bytes that a container may use; None where there is no limit."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
