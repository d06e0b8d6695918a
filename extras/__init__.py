"""All that goes beyond the paper, one concern a file: see docs/ and the head of each file."""

import sys

# `python -m extras.predict ...`, while Python is still looking for the module.
if sys.argv[:1] == ["-m"]:
    from extras import quiet_start
    quiet_start.begin()
