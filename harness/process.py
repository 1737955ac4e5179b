"""The process around a run: one-line errors, device, torchrun, signals, running out of memory.

torch is imported where it is needed, so that compare.py, which needs none, starts quickly.
"""

import atexit
import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path

from harness.text import printable

ROOT = Path(__file__).resolve().parents[1]


def fail(message, status=2):
    """End the program with one line on stderr. Status 2: wrong input; 1: the run went wrong."""
    print(f"{Path(sys.argv[0]).name}: error: {printable(message, 2000)}", file=sys.stderr)
    raise SystemExit(status)


def first_line(error):
    """The first line of an exception's text, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def is_our_mistake(error):
    """Whether an exception was raised in a line of this repository, not inside a library.

    What the system refuses (OSError) is no mistake: the built-in functions have no line of theirs.
    """
    if isinstance(error, OSError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    # A misspelled attribute of a module or a config: their own __getattr__ raises the error.
    file = Path([f for f in frames if not f.name.startswith("__getattr")][-1].filename).resolve()
    # A library's compiled code names its files by relative paths, which lie nowhere.
    return ROOT in file.parents and "site-packages" not in file.parts and file.is_file()


@contextlib.contextmanager
def library_errors(message, status=2):
    """Turn an error raised inside a library into one line, `message` and the error's first line.

    It ends the program with this status, or with status 0 only says so. An error raised in our own
    code stays an exception, so that its traceback names file and line.
    """
    try:
        yield
    except Exception as error:  # the libraries raise every kind of exception
        if is_our_mistake(error):
            raise
        line = f"{message} ({type(error).__name__}: {first_line(error)})"
        fail(line, status) if status else say(line)


def process_index():
    """This process's number under torchrun, 0 when there is only one."""
    return int(os.environ.get("RANK", 0))


def process_count():
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def say(*parts):
    """Print one line, once, however many processes there are."""
    if process_index() == 0:
        print(*(printable(part, 2000) for part in parts), flush=True)


def choose_device(args):
    """Set args.device to the device that --device means, and args.precision where it is "auto".

    Tries the device out: status 2 where it is not available. Under torchrun every process gets the
    GPU of its number.
    """
    import torch

    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
        if kind == "cuda" and process_count() > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.empty(1, device=name).item()
        if kind == "cuda" and ":" in name:
            torch.cuda.set_device(name)  # or events and all-reduces would use the first GPU
    except (RuntimeError, AssertionError) as error:  # torch's own; it has no line of its own
        fail(f"--device {name}: not available ({first_line(error)})")
    if kind not in ("cpu", "cuda"):
        fail(f"--device {name}: only cpu and cuda are supported")
    if kind == "cpu" and os.getloadavg()[0] > os.cpu_count() and "GOMP_SPINCOUNT" not in os.environ:
        say("this machine is busy: GOMP_SPINCOUNT=30000 before the command may make it faster")
    args.device = name
    if args.precision == "auto":
        cuda = kind == "cuda"
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if bf16 else "fp32"


def join_process_group(args):
    """Connect the processes that torchrun started; does nothing for a single process."""
    import torch.distributed as dist

    if process_count() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if "cuda" in args.device else "gloo")
        atexit.register(dist.destroy_process_group)


def agree(value):
    """The first process's value in every process: it alone reads files."""
    if process_count() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def is_running(number):
    """Whether a process of this machine has this number, given as text."""
    try:
        os.kill(int(number), 0)  # signal 0 only asks
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        pass
    return True


@contextlib.contextmanager
def stop_signals():
    """Collect Ctrl-C and SIGTERM in a list, so that training stops after a whole step.

    A second signal stops at once. Under torchrun nothing is collected: it ends its processes.
    """
    received = []

    def note(number, frame):
        if received:
            line = "stopped at once; the same command continues from the last checkpoint"
            fail(line, 128 + number)
        received.append(number)

    kinds = (signal.SIGINT, signal.SIGTERM) if process_count() == 1 else ()
    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def explain_out_of_memory(run, advice=None):
    """Turn running out of memory into one line: which flags need less, or another `advice`."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # A CPU's allocator raises a plain RuntimeError with these words.
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error)
        if not full:
            raise
        flags = f"--batch_size {max(1, run.batch_size // 2)} with --grad_accum {run.grad_accum * 2}"
        flags += f", --max_length below {run.max_length}, --checkpointing"
        fail(f"out of memory on {run.device}; these need less: {advice or flags}", status=1)
