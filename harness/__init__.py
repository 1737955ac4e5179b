"""Imported first by each script: from then on Ctrl-C ends it with one line, not with a traceback.

torch takes seconds to import. Training handles Ctrl-C itself, and torchrun stops its own processes.
"""

import os
import signal
import sys
from pathlib import Path


def end_with_one_line(number, frame):
    print(f"{Path(sys.argv[0]).name}: error: stopped; the same command continues", file=sys.stderr)
    raise SystemExit(128 + number)


# Not in the tests, which are no script of this folder.
if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        signal.signal(signal.SIGINT, end_with_one_line)
