"""The process around a run: one-line errors, torchrun, signals, memory that does not suffice.

torch is imported where it is needed, so that compare.py, which needs none, starts quickly.
"""

import atexit
import contextlib
import os
import signal
import sys
from pathlib import Path


def fail(message, status=2):
    """End the program with one line on stderr. Status 2: wrong input; 1: the run went wrong."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def first_line(error):
    """The first line of an exception's text, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def rank():
    """This process's number under torchrun, 0 when there is only one."""
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    """Print, once however many processes there are."""
    if rank() == 0:
        print(*words, flush=True)


def find_device(name):
    """The device that --device means, tried out, as a string; under torchrun each process's own.

    Joins the process group where torchrun started several. Status 2 where it is not to be had.
    """
    import torch
    import torch.distributed as dist

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
        if kind == "cuda" and world() > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.empty(1, device=name).item()
        if kind == "cuda" and ":" in name:
            torch.cuda.set_device(name)  # or events and all-reduces would go to the first one
    except Exception as error:  # each backend has its own way to say that it is not there
        fail(f"--device {name}: not to be had here ({first_line(error)})")
    if kind not in ("cpu", "cuda"):
        fail(f"--device {name}: only cpu and cuda are measured here")
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return name


def agree(value):
    """The first process's value in every process: it alone reads files."""
    if world() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def one_line_on_interrupt():
    """Have Ctrl-C end the program with one line, where no training catches it."""
    if world() == 1:
        signal.signal(signal.SIGINT, lambda number, frame: fail("stopped", 128 + number))


@contextlib.contextmanager
def stop_signals():
    """Collect Ctrl-C and SIGTERM in a list, so that training stops after a whole step.

    A second one stops at once. torchrun ends its processes itself.
    """
    got = []

    def note(number, frame):
        if got:
            fail(
                "stopped at once; the same command continues from the last checkpoint", 128 + number
            )
        got.append(number)

    kinds = (signal.SIGINT, signal.SIGTERM) if world() == 1 else ()
    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield got
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def explain_out_of_memory(run, scoring=None):
    """Turn running out of memory into one line: what makes a run smaller, or `scoring`, a flag."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "allocate" not in str(error):  # the words of the CPU's allocator
            raise
        half, twice = max(1, run.batch_size // 2), run.grad_accum * 2
        training = f"--batch_size {half} with --grad_accum {twice}, --max_length below "
        training += f"{run.max_length}, --checkpointing"
        what = f"{scoring}; what is trained is kept" if scoring else training
        fail(f"out of memory on {run.device}; smaller: {what}", status=1)
