"""The command line: what a run may be told, checked first; one run a learning rate and seed."""

import argparse
import hashlib
import math
import os
import re
import shlex
import sys
from pathlib import Path

from harness.process import fail, first_line, one_line_on_interrupt
from harness.rows import DEMOS, HUB, LENGTHS
from harness.store import finished

# What decides neither a run's outcome nor its costs, and what its file name says already.
NOT_SETTINGS = {
    *("seeds", "seed", "search", "lr", "method", "name", "out", "force", "device", "data_dir"),
    *("eval_only", "save_every", "timing", "command", "export", "plan", "changed"),
}


def number(kind, low, high, what):
    """An argparse type: `kind` within low..high, with a message that says what was wanted."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also true of nan
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return convert


count = number(int, 1, 2**31, "a whole number of 1 or more")
natural = number(int, 0, 2**31, "a whole number of 0 or more")
positive = number(float, 1e-30, 1e30, "a positive number")
non_negative = number(float, 0, 1e30, "a number of 0 or more")
share = number(float, 0, 1 - 1e-9, "a share from 0 up to, not including, 1")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that reads files of flags (@file)."""

    def error(self, message):
        fail(f"{message} (--help lists the flags)")

    def convert_arg_line_to_args(self, line):  # for @file: several words a line, # begins a comment
        return shlex.split(line, comments=True)


def adapter_args(parser):
    """Add the two flags that every adapter has and the baseline has not."""
    parser.add_argument(
        "--rank",
        type=count,
        default=8,
        help="r, the width of A and B; the LoRA paper's usual value",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="linear layers to adapt, by the end of their names (default: query and value; key too "
        "where one layer holds all)",
    )


def shared_args(parser):
    """Add the flags that all scripts share."""
    add = parser.add_argument
    add(
        "--dataset",
        default="demo",
        help="demo, demo_lm, sst2, imdb, wikitext2, or a folder with train and test (or "
        "validation) files that have text and label columns; demo needs no network",
    )
    add("--model", help="hub id or folder (default: distilbert-base-uncased; the demos' own)")
    add("--data_dir", default="data", help="DIR/sst2 and so on hold parquet files; tried first")
    add("--seeds", type=natural, nargs="+", default=[0], help="runs to make; verdicts want 6")
    add(
        "--lr",
        type=positive,
        nargs="+",
        default=[2e-3],
        help="peak learning rates, a run each; compare.py takes the one that is best on dev",
    )
    add("--search", type=count, metavar="N", help="N rates, factors of 2 apart, around --lr")
    head_lr = "of the head, equal for all methods; where only the head is trained it is --lr"
    add("--head_lr", type=positive, default=1e-3, help=head_lr)
    add("--epochs", type=natural, default=3, help="passes over the training rows; 0 only scores")
    add("--max_steps", type=count, help="stop after this many steps, whatever --epochs says")
    add("--batch_size", type=count, default=32, help="rows a forward pass, on each device")
    scoring = "rows a forward pass while scoring (default: --batch_size)"
    add("--eval_batch_size", type=count, help=scoring)
    add("--grad_accum", type=count, default=1, help="forward passes per optimizer step")
    add("--weight_decay", type=non_negative, default=0.0, help="AdamW's; 0 as in most adapter work")
    add("--warmup", type=share, default=0.06, help="share of the steps with rising rate; LoRA's")
    add("--base_dropout", type=share, default=0.0, help="the base's own; a frozen base needs none")
    add("--max_length", type=count, help="tokens a row (default: 128; imdb, folders 256; demos 64)")
    add("--train_samples", type=count, help="train on so many random rows, others at each seed")
    add("--test_samples", type=count, help="score so many random test rows, the same at each seed")
    add("--heldout", type=natural, default=0, help="further test rows, cut from the training split")
    add(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="auto: bf16 on a GPU that has it, else fp32",
    )
    add("--checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--device", default="auto", help="cpu, cuda, cuda:1 …; auto is a GPU if there is one")
    add("--out", type=Path, default=Path("results"), help="folder for result files and adapters")
    add("--name", help="the result's name (default: the script's and its changed method flags)")
    add("--force", action="store_true", help="run again where a result exists, and replace it")
    add("--eval_only", type=Path, metavar="FOLDER", help="score a saved adapter, train nothing")
    add("--export", type=Path, metavar="FOLDER", help="write the merged model as a checkpoint")
    add("--plan", action="store_true", help="print memory and operations of a step; load nothing")
    add("--timing", action="store_true", help="time inference, score the merged model, too")
    add("--save_every", type=count, metavar="STEPS", help="write a checkpoint this often")


def parse_args(doc, file, add_args, argv=None):
    """Read the command line of the script `file`; `doc` is its docstring, `add_args` adds its own.

    Returns a Namespace with `method` (the script's stem), `changed` (its own flags that are not at
    their default). Wrong input ends the program with one line and status 2.
    """
    parser = Parser(
        prog=Path(file).name,
        description=doc,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared_args(parser)
    shared = {action.dest for action in parser._actions}
    parser.set_defaults(method=Path(file).stem)
    add_args(parser)
    for action in parser._actions:  # a default is set in one place and shown from there
        if action.default not in (None, False, argparse.SUPPRESS) and "default" not in action.help:
            action.help += f" (default: {as_word(action.default)})"

    if argv is None:
        one_line_on_interrupt()
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    try:
        args = parser.parse_args(words)
    except ValueError as error:  # an @file that is not text, or has an unclosed quote
        files = " ".join(word for word in words if word[:1] == "@")
        fail(f"{files}: not a file of flags ({first_line(error)})")
    if getattr(args, "targets", None):
        names = [name for word in args.targets for name in word.split(",") if name]
        args.targets = names or fail("--targets names no layer")
    own = [action for action in parser._actions if action.dest not in shared | {"method"}]
    args.changed = {a.dest for a in own if getattr(args, a.dest) != a.default}
    args.name = args.name or default_name(args, own)
    if not re.fullmatch(r"[\w.-]+", args.name):
        fail(f"--name {args.name!r}: use letters, digits, '.', '_' and '-' only")
    if args.search:
        if len(args.lr) > 1:
            fail(f"--search {args.search}: around one --lr, not {len(args.lr)}")
        args.lr = [args.lr[0] * 2.0 ** (i - (args.search - 1) // 2) for i in range(args.search)]

    known = [*HUB, *DEMOS]
    for key in ("dataset", "model"):  # one folder is one name: my, my/ and ./my
        value = getattr(args, key)
        if value and Path(value).is_dir() and os.path.normpath(value) not in known:
            setattr(args, key, os.path.normpath(value))
    if args.dataset not in known and not Path(args.dataset).is_dir():
        fail(f"--dataset {args.dataset}: neither a folder nor one of {', '.join(known)}")
    args.model = args.model or ("demo" if args.dataset in DEMOS else "distilbert-base-uncased")
    args.max_length = args.max_length or LENGTHS.get(args.dataset, 256)
    args.eval_batch_size = args.eval_batch_size or args.batch_size
    # A folder given by an absolute path is recorded by its name alone: no machine's paths.
    words = [re.sub(r"(^|[=@])/.*/", r"\1", word) for word in words]
    args.command = " ".join([Path(file).name, *words])

    if args.export:
        if args.export.is_file() or args.export.is_dir() and any(args.export.iterdir()):
            fail(f"--export {args.export}: it is not an empty folder; name a new one")
        if len(args.seeds) > 1 or len(args.lr) > 1 and not args.eval_only:
            fail(f"--export {args.export}: of one run; give one of --seeds and one --lr")
    return args


def as_word(value):
    """A flag's value as part of a file name: 0.5 -> "0.5", ["q", "v"] -> "q-v"."""
    if isinstance(value, list):
        return "-".join(as_word(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def refuse_idle(run, flags, where):
    """End the program where one of these flags, which do nothing here, is not at its default."""
    for flag in sorted(run.changed & flags):
        fail(f"--{flag} {getattr(run, flag)}: not with {where}")


def default_name(args, own):
    """The method's name and each of its `own` flags (actions) that is not at its default."""
    words = [args.method]
    for action in own:
        value = getattr(args, action.dest)
        if value == action.default:
            continue
        if action.nargs == 0:  # a switch says all by its name
            words.append(action.dest)
        elif action.choices:
            words.append(value)
        else:
            words.append(action.dest + as_word(value))
    if args.epochs == 0:
        words.append("untrained")
    return "-".join(words)


def settings(args):
    """The flags that decide a run's outcome: not where it runs, writes, or how it is timed."""
    flags = {key: value for key, value in sorted(vars(args).items()) if key not in NOT_SETTINGS}
    for key in ("model", "dataset"):
        if Path(flags[key]).is_absolute():  # a hash tells two folders of one name apart
            path = os.path.normpath(flags[key])
            flags[f"{key} folder"] = hashlib.sha256(path.encode()).hexdigest()[:8]
            flags[key] = Path(path).name
    return flags


def runs(args):
    """Yield a Namespace per seed and learning rate that has no finished result yet.

    It has all flags, and `lr` (one), `seed`, `settings`, `path` (of its result file). All results
    are looked at before the first run starts: one with other settings ends the program.
    """
    kept = settings(args)
    stem = f"{Path(kept['dataset']).name}-{args.name}-{Path(kept['model']).name}"
    once = args.eval_only or args.epochs == 0  # nothing is trained: one rate is as good as another
    todo = []
    for seed in dict.fromkeys(args.seeds):  # a seed's rates in a row: they share their data
        for lr in args.lr[:1] if once else dict.fromkeys(args.lr):
            path = args.out / f"{stem}-lr{lr:g}-seed{seed}.json"
            if len(os.fsencode(path.name)) > 240:
                fail(f"{path.name[:40]} …: too long for a file's name; give a short --name")
            own = {"seed": seed, "lr": lr, "settings": kept, "path": path}
            todo.append(argparse.Namespace(**{**vars(args), **own}))
    there = next(path for path in (args.out, *args.out.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)) and not args.eval_only:
        fail(f"--out {args.out}: no folder that can be written; name another")
    todo = [run for run in todo if args.eval_only or not finished(run)]
    for number, run in enumerate(todo, 1):
        run.number, run.count = number, len(todo)
    yield from todo
