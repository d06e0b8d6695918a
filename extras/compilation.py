"""train.py --compile: the networks through torch.compile.

    compile_networks(run)
    with no_compiling(args): ...
    except RuntimeError as error: explain_failed_compilation(error)
"""

import contextlib

import torch

from extras.cli import UsageError


def compile_networks(run):
    """The student with its losses, and the teacher. Validation stays eager."""
    torch._inductor.config.fallback_random = True      # eager's random numbers: the same curve
    run.objective.compile(dynamic=False)
    if run.teacher is not None:
        run.teacher.features = torch.compile(run.teacher.features, dynamic=False)
        run.teacher.encode = torch.compile(run.teacher.encode, dynamic=False)


def no_compiling(args):
    """A context for what is not worth a compilation: a run's last four pictures."""
    if args.compile:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def explain_failed_compilation(error):
    """Raise UsageError if `error`, a RuntimeError, is torch.compile's.

    It is told by its module's name: to import its class takes a second.
    """
    if type(error).__module__.startswith("torch._"):
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--compile failed ({reason}); it needs a C++ compiler on a CPU, Triton "
                         "on CUDA: install it, or leave --compile out") from None
