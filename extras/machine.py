"""The machine that a command runs on: its device, its 16-bit types, its memory.

    device = pick_device("auto")
    print(device_name(device))
    keep_freed_memory()
"""

import ctypes
import platform
import sys
from pathlib import Path

import torch

from extras.cli import UsageError

AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")                  # as Linux calls them; last: Arm


def pick_device(name):
    """"auto" -> CUDA, else Apple's MPS, else the CPU; any other name must be there. Raises
    UsageError.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        torch.zeros(1, device=name).tolist()                      # "meta" has no values to give
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} is not to be had here: {reason}") from None
    return torch.device(name)


def device_name(device):
    """-> the GPU's name, or "AMD EPYC 9B14 (AVX512, avx512_bf16), 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name():
    """-> the processor, and its instructions: runs on two kinds differ in the last bits."""
    fields = read_cpuinfo()
    name = fields.get("model name", f"{platform.machine()} CPU")
    instructions = [torch.backends.cpu.get_cpu_capability()]
    flags = flags_of_cpu(fields)
    instructions += [unit for unit in BF16_UNITS if unit in flags]
    return f"{name} ({', '.join(instructions)})"


def keep_freed_memory():
    """Tell glibc to keep large freed blocks for the next allocation.

    By default they go back to the kernel, and every step pays again for fetching zeroed pages.
    Changes no result. Other C libraries are left alone.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    M_TRIM_THRESHOLD = -1
    M_MMAP_MAX = -4
    mallopt(M_MMAP_MAX, 0)  # no block gets a mapping of its own
    mallopt(M_TRIM_THRESHOLD, -1)  # never give the top of the heap back


def cpu_has_bf16():
    """Does the processor compute in bf16 (x86's AVX512 or AMX, Arm)? None: only Linux tells."""
    flags = flags_of_cpu(read_cpuinfo())
    if not flags:
        return None
    return any(unit in flags for unit in BF16_UNITS)


def read_cpuinfo():
    """-> {field: text} of the first processor in /proc/cpuinfo; {} where there is no such file."""
    fields = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return fields
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def flags_of_cpu(fields):
    """What /proc/cpuinfo lists as the processor's abilities: x86 calls them flags, Arm Features."""
    return fields.get("flags", fields.get("Features", "")).split()
