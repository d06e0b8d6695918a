"""How long a computation must take on this device: its MACs and bytes, the device's rates of both.

Both limits are measured, not read in a data sheet. The arithmetic limit is the time of as many MACs
in one large matrix product; the memory limit is the time of copying as many bytes as the operations
read and write, each tensor once per operation (what stays in a cache beats it).
"""

import math
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from extras.measure import seconds_of

# ---------------------------------------------------------------- what a computation takes

def convolution_backward_flops(grad, x, weight, *args, **kwargs):
    """FLOPs from the shapes. Each gradient that is asked for costs a forward.

    torch's own formula takes a depthwise convolution for a dense one.
    """
    wanted = args[7]                                              # of input, weight, bias: bools
    forward = 2 * math.prod(grad) * math.prod(weight[1:])
    return forward * sum(wanted[:2])


class Macs(NamedTuple):
    dense: int          # of linear layers and convolutions
    attention: int      # of the products Q K^T and A V


def count_macs(run):
    """MACs of run() -> Macs."""
    formulas = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    dense = attention = 0
    for operation, flops in counter.get_flop_counts()["Global"].items():
        if "bmm" in str(operation):                               # in batches: only attention
            attention += flops
        else:
            dense += flops
    return Macs(dense // 2, attention // 2)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, each tensor once per operation.

    Views cost nothing, and neither does memory that is not filled yet.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        if not op.is_view and "empty" not in str(op):
            for leaf in tree_leaves((args, kwargs, result)):
                if isinstance(leaf, torch.Tensor):
                    self.total += leaf.nbytes
        return result


def count_bytes(run):
    with Traffic() as traffic:
        run()
    return traffic.total


# ---------------------------------------------------------------- what the device can do

def best_time(run, device, tries=5):
    """The shortest of some runs, in seconds: a limit is what the device can do.

    After two seconds there is no other try: 16 bits on a CPU without units for them are slow.
    """
    times = []
    while len(times) < tries and sum(times) < 2:
        times.append(seconds_of(run, device))
    return min(times)


class Rates(NamedTuple):
    macs: float         # per second, in a matrix product
    bytes: float        # per second, read or written by a copy


def measure_rates(device, dtype):
    """-> Rates of this device, in `dtype`."""
    if device.type == "cuda":
        side = 8192
        size = 2 ** 30
    else:
        side = 2048
        size = 2 ** 28
    a = torch.rand(side, side, device=device, dtype=dtype)
    b = torch.rand(side, side, device=device, dtype=dtype)
    product = best_time(lambda: a @ b, device)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones(size, dtype=torch.uint8, device=device)
    copy = best_time(lambda: target.copy_(source), device)
    return Rates(side ** 3 / product, 2 * size / copy)


def roofline(name, run, seconds, rates):
    """Print how far `seconds`, the time of run(), are from the device's limits. -> a row"""
    macs = sum(count_macs(run))
    touched = count_bytes(run)
    arithmetic = macs / rates.macs
    memory = touched / rates.bytes
    print(f"{name}: {macs / 1e9:.1f} G MACs with attention at {rates.macs / 1e9:.3g} G/s are "
          f"{1e3 * arithmetic:.0f} ms, {arithmetic / seconds:.0%} of the time taken "
          f"(arithmetic limit); {touched / 1e9:.1f} GB at {rates.bytes / 1e9:.1f} GB/s are "
          f"{1e3 * memory:.0f} ms, {memory / seconds:.0%} (memory limit)", flush=True)
    return {"name": name, "macs": macs, "bytes": touched,
            "arithmetic_limit": arithmetic / seconds, "memory_limit": memory / seconds,
            "macs_a_second": rates.macs, "bytes_a_second": rates.bytes}
