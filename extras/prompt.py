"""A student that is told what to segment: train it, ask it, compare it.

    python -m extras.prompt train --student b2 --tokenizer bytes --out runs/prompt-b2   # a teacher
    python -m extras.prompt train --phase 1 --teacher runs/prompt-b2/best.pth --out runs/phase-1
    python -m extras.prompt train --phase 2 --teacher runs/prompt-b2/best.pth \\
                                  --init runs/phase-1/last.pth --out runs/phase-2
    python -m extras.prompt predict runs/phase-2/best.pth photo.jpg --prompts "car, person" \\
                                  --out pictures
    python -m extras.prompt compare runs/phase-2/best.pth --teacher runs/prompt-b2/best.pth --gate
    python -m extras.prompt quantize runs/phase-2/best.pth --bits 4 --out small.pth
    python -m extras.prompt export runs/phase-2/best.pth model.onnx --prompts "car, person, road"
    python -m extras.prompt write-teacher runs/prompt-b2/best.pth --data toy --out stored

Each command has --help. docs/PROMPTS.md tells the idea, the figures and what this is not.

    extras/prompt_words.py          tokenizers, and what a word means in a data set
    extras/prompt_model.py          the network; prompt_text: its words; prompt_checkpoint: its file
    extras/prompt_losses.py         what it learns from
    extras/prompt_training.py       the loop of train.py, with this objective (flags: prompt_flags)
    extras/prompt_metrics.py        what is counted; prompt_scores asks a network
    extras/prompt_compare.py        the table, the gate, the pictures
    extras/prompt_predict.py        photos; files for other runtimes
    extras/prompt_teacher_files.py  a teacher that is not here; prompt_sam3: SAM 3's answers
"""

import sys

from extras.cli import UsageError, run_command
from extras.distributed import explain_lost_process, leave
from extras.machine import keep_freed_memory

COMMANDS = ("train", "predict", "compare", "quantize", "export", "write-teacher")


def main():
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
        return None
    if command not in COMMANDS:
        raise UsageError(f"there is no command {command!r}: use one of {', '.join(COMMANDS)}")
    keep_freed_memory()
    argv = sys.argv[2:]
    if command == "train":
        return train(argv)
    if command == "compare":
        from extras.prompt_compare import main as compare
        return compare(argv)
    from extras import prompt_predict
    run = getattr(prompt_predict, command.replace("-", "_"))
    return run(argv)


def train(argv):
    """The loop of train.py, with the objective of prompts."""
    from extras.prompt_training import PROMPT_TASK
    from train import run_training

    args, given = PROMPT_TASK.flags.parse(argv)
    try:
        run_training(args, given, PROMPT_TASK)
    except RuntimeError as error:
        explain_lost_process(error)


if __name__ == "__main__":
    run_command(main, end=leave)
