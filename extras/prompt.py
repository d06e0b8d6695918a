"""x"""
import sys
from train import run_training
from extras.prompt_training import PROMPT_TASK
from extras.cli import run_command, keep_freed_memory
def main():
    args, given = PROMPT_TASK.flags.parse(sys.argv[2:])
    keep_freed_memory()
    run_training(args, given, PROMPT_TASK)
run_command(main)
