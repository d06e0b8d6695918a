"""Ctrl-C while a command is still importing ends it with a sentence, not with a traceback.

    if __name__ == "__main__":
        from extras import quiet_start     # the first import of a command
        quiet_start.begin()

Importing torch takes seconds. A KeyboardInterrupt that is raised inside them comes out as any error
there is, so here the process ends without unwinding: nothing has been begun. `cli.run_command`
takes over from there.
"""

import os
import signal


def begin():
    """Someone else's handler, and Ctrl-C ignored by `nohup` or a script, stay as they are."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)


def leave_at_once(number, frame):
    os.write(2, b"stopped at once, before anything was begun\n")
    os._exit(130)
