"""Several processes under torchrun: joining, reducing, leaving cleanly. Without torchrun each
function does the obvious.

    torchrun --nproc-per-node 2 train.py ...

Each process has one GPU, or shares the CPU. Only the first one, rank 0, writes and speaks.
"""

import os
import sys

import torch
import torch.distributed as dist

from extras.cli import ProcessLost, UsageError
from extras.machine import pick_device


def rank():
    """This process's number under torchrun; 0 alone. Only number 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """Sum (or another reduction) over all processes, in place. -> tensor"""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def broadcast_buffers(model):
    """Give every process the first one's buffers: BatchNorm's statistics differ by what each has
    seen.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def of_first_process(value):
    """-> what the first process has as `value`, the same in every one."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def is_started_by_torchrun():
    return "RANK" in os.environ


def is_first_process():
    """Is this the one that writes? Known before `join_processes`, unlike rank()."""
    return os.environ.get("RANK", "0") == "0"


def check_environment():
    """Raise UsageError where torchrun's variables are there in part, or are no numbers."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ.get(name, "").isdecimal():
            raise UsageError(f"RANK is set, as torchrun does, but {name} is no number: start it "
                             "with torchrun, or unset RANK")
    if not os.environ.get("MASTER_ADDR"):
        raise UsageError("RANK is set, as torchrun does, but MASTER_ADDR is not: start it with "
                         "torchrun, or unset RANK")


def join_processes(device_name):
    """Under torchrun: join the others. -> this process's device. Raises UsageError."""
    if not is_started_by_torchrun():
        return pick_device(device_name)
    check_environment()
    device = device_of_process(device_name)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, **rendezvous_store())
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
    return device


def device_of_process(device_name):
    """One GPU for each process of this machine, or the CPU for all: gloo knows no MPS."""
    if torch.cuda.is_available() and device_name in ("auto", "cuda"):
        local_rank = int(os.environ["LOCAL_RANK"])
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UsageError(f"process {local_rank} has no GPU of its own: there are {count}")
        torch.cuda.set_device(local_rank)                         # before anything is allocated
        return torch.device("cuda", local_rank)
    if device_name == "auto":
        return pick_device("cpu")
    return pick_device(device_name)


def rendezvous_store():
    """Where torchrun's processes find each other: a place of its own for each attempt.

    After a restart gloo would find the addresses of the dead processes in the common place.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = dist.TCPStore(address, port, is_master=False)
    return {
        "store": dist.PrefixStore(f"attempt {attempt}", store),
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }


def was_restarted():
    """Did torchrun (--max-restarts) start this process again?"""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def explain_lost_process(error):
    """Raise ProcessLost if `error`, a RuntimeError, is a broken connection to another process; else
    `error` itself.
    """
    words = ("gloo", "NCCL", "peer", "onnection")                 # Connection or connection
    if dist.is_initialized() and any(word in str(error) for word in words):
        raise ProcessLost("the connection to another process of this run broke: that one failed, "
                          "and its own message says why") from None
    raise error


def leave(code):
    """End this process with `code`, under torchrun without Python's own end.

    gloo's thread may still hold the last reduced tensor. It needs the interpreter's lock to drop
    it, and asking for that lock while Python is being finalised ends the process with SIGABRT after
    all work is done.
    """
    if not is_started_by_torchrun():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
