"""The command line: all flags are checked first; each learning rate and seed is a run."""

import argparse
import hashlib
import math
import os
import re
import sys
import tempfile
from pathlib import Path

from harness.process import fail, library_errors, process_index, say
from harness.rows import DEMOS, ENDINGS, HUB, LENGTHS, is_data_file
from harness.store import differences, files_sha256, finished, read_result

# Flags that decide neither a run's outcome nor its costs, or that are in its file's name.
NOT_SETTINGS = {
    *("seeds", "seed", "search", "lr", "method", "name", "out", "force", "device", "data_dir"),
    *("eval_only", "save_every", "timing", "command", "export", "plan", "changed", "test_only"),
}
# Settings that change neither data nor weights: a saved adapter may be scored with others.
SCORING = {"batch_size", "eval_batch_size", "grad_accum", "checkpointing", "precision"}


def number(kind, low, high, wanted):
    """An argparse type: `kind` within low..high, with a message that says what was wanted."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also true of NaN
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return convert


count = number(int, 1, 2**31, "a whole number of 1 or more")
count_or_zero = number(int, 0, 2**31, "a whole number of 0 or more")
few = number(int, 1, 99, "a whole number from 1 to 99")
rank = number(int, 1, 65536, "a whole number from 1 to 65536")
positive = number(float, 1e-30, 1e30, "a positive number")
non_negative = number(float, 0, 1e30, "a number of 0 or more")
fraction = number(float, 0, 1 - 1e-9, "a fraction from 0 up to, not including, 1")


class Parser(argparse.ArgumentParser):
    """Ends the program with one line where a flag is wrong."""

    source = ""  # the file that the flags come from, if not from the command line

    def error(self, message):
        fail(f"{self.source}{message} (--help lists the flags)")

    def recorded_line(self, flags):
        """A result file's flags {name: value} as a command line, to be checked as one."""
        line = []
        for action in self._actions:
            value = flags.get(action.dest)
            values = [] if action.nargs == 0 else value if isinstance(value, list) else [value]
            if value is not None and (values or value == action.const):
                flag, words = action.option_strings[-1], [str(value) for value in values]
                if any(word.startswith("-") for word in words):  # it would be another flag
                    self.error(f"argument {flag}: {words}")
                line += [flag, *words]
        return line


def adapter_args(parser):
    """Add the flags that every adapter has and the baseline has not."""
    add = parser.add_argument
    add("--rank", type=rank, default=8, help="The width r of the matrices A and B.")
    targets = "The linear layers to adapt, by the end of their names (default: query and value)."
    add("--targets", nargs="+", metavar="NAME", help=targets)
    add("--dropout", type=fraction, default=0.0, help="Dropout on the adapter's input.")


def shared_args(parser):
    """Add the flags that all scripts share, in groups."""
    add = parser.add_argument_group("data").add_argument
    dataset = "The data: demo, demo_lm, sst2, imdb, wikitext2, or your own file or folder with the "
    dataset += "columns text and label. The demos need no network."
    add("--dataset", default="demo", help=dataset)
    add("--data_dir", default="data", help="Files are read from DIR/sst2 and so on, or the hub.")
    length = "Cut texts to this many tokens (default: 128; imdb and your own data 256; demos 64)."
    add("--max_length", type=count, help=length)
    add("--train_samples", type=count, help="Train on this many examples, a sample per seed.")
    dev = "Choose by this many dev examples (default: a tenth of the training split, at most 500)."
    add("--dev_samples", type=count, help=dev)
    add("--test_samples", type=count, help="Score this many test examples, the same at all seeds.")
    heldout = "Take this many further test examples from the training split."
    add("--heldout", type=count_or_zero, default=0, help=heldout)

    add = parser.add_argument_group("model").add_argument
    model = "A hub id or a folder (default: distilbert-base-uncased; the demos have their own)."
    add("--model", help=model)
    add("--base_dropout", type=fraction, default=0.0, help="Dropout inside the pre-trained model.")
    precision = "Number format of the frozen model; auto is bf16 on a GPU that has it, else fp32."
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=precision)
    add("--checkpointing", action="store_true", help="Recompute activations: less memory, slower.")
    add("--device", default="auto", help="cpu, cuda or cuda:1; auto is a GPU if there is one.")

    add = parser.add_argument_group("training").add_argument
    seeds = "Random seeds, one run each; compare.py needs 6 for a verdict."
    add("--seeds", type=count_or_zero, nargs="+", default=[0], help=seeds)
    add("--lr", type=positive, nargs="+", default=[2e-3], help="Peak learning rates, one run each.")
    add("--search", type=few, metavar="N", help="Try N values around --lr, factors of 2 apart.")
    head_lr = "Learning rate of the classification layer beside an adapter."
    add("--head_lr", type=positive, default=1e-3, help=head_lr)
    epochs = "Passes over the training examples; 0 only scores the model."
    add("--epochs", type=count_or_zero, default=3, help=epochs)
    add("--max_steps", type=count, help="Train for this many steps instead of --epochs.")
    add("--batch_size", type=count, default=32, help="Examples of a forward pass on each device.")
    add("--grad_accum", type=count, default=1, help="Forward passes for each optimizer step.")
    add("--weight_decay", type=non_negative, default=0.0, help="AdamW's weight decay.")
    warmup = "Fraction of the steps in which the learning rate rises."
    add("--warmup", type=fraction, default=0.06, help=warmup)

    add = parser.add_argument_group("scoring").add_argument
    eval_only = "Score a saved adapter without training, with the flags of its result file."
    add("--eval_only", type=Path, metavar="FOLDER", help=eval_only)
    add("--eval_batch_size", type=count, help="--batch_size while scoring (default: the same).")
    add("--timing", action="store_true", help="Also time inference and score the merged model.")
    add("--plan", action="store_true", help="Only print the memory and FLOPs of a training step.")

    add = parser.add_argument_group("files").add_argument
    add("--out", type=Path, default=Path("results"), help="Folder for results and adapters.")
    add("--name", help="Name of the result (default: the method and its changed flags).")
    add("--force", action="store_true", help="Run again and replace a result that exists.")
    export = "Write the trained model, adapter merged, as a Hugging Face checkpoint."
    add("--export", type=Path, metavar="FOLDER", help=export)
    add("--save_every", type=count, metavar="STEPS", help="Write a checkpoint this often.")


def parse_args(doc, file, add_args, argv=None):
    """Read the command line of the script `file`; `doc` is its docstring, `add_args` adds its own.

    Returns a Namespace with `method` (the script's stem), `changed` (the method's flags that are
    not at their default) and `test_only` (an adapter whose dev examples are unknown). Wrong input
    ends the program with one line and status 2.
    """
    name = Path(file).name
    options = {"prog": name, "usage": f"{name} [flags]", "allow_abbrev": False}
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=doc, formatter_class=style, **options)
    parser._optionals.title = "this method"
    shared_args(parser)
    shared = {action.dest for action in parser._actions}
    parser.set_defaults(method=Path(file).stem)
    add_args(parser)
    for action in parser._actions:  # a default is set in one place and shown from there
        if action.default not in (None, False, argparse.SUPPRESS) and "default" not in action.help:
            action.help += f" (default: {as_word(action.default)})"

    line = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    if broken := [word for word in line if any("\ud800" <= letter <= "\udfff" for letter in word)]:
        fail(f"{broken[0]}: the name is not in UTF-8; rename it")
    args = parser.parse_args(line)
    recorded = trained_run(args.eval_only) if args.eval_only else {}
    if recorded:
        parser.source = f"--eval_only {args.eval_only}, its result file: "
        args = parser.parse_args([*parser.recorded_line(recorded), *line])
    if getattr(args, "targets", None):
        targets = [layer for word in args.targets for layer in word.split(",") if layer]
        args.targets = targets or fail("--targets names no layer")
    method_flags = [action for action in parser._actions if action.dest not in shared | {"method"}]
    args.changed = {a.dest for a in method_flags if getattr(args, a.dest) != a.default}
    args.name = args.name or default_name(args, method_flags)
    if not re.fullmatch(r"[\w.-]+", args.name):
        fail(f"--name {args.name!r}: use letters, digits, '.', '_' and '-' only")
    if args.search:
        if len(args.lr) > 1:
            fail(f"--search {args.search}: around one --lr, not {len(args.lr)}")
        args.lr = [args.lr[0] * 2.0 ** (i - (args.search - 1) // 2) for i in range(args.search)]
        if not 1e-30 <= args.lr[0] <= args.lr[-1] <= 1e30:
            fail(f"--search {args.search}: {args.lr[0]:g} to {args.lr[-1]:g} are no learning rates")

    built_in = [*HUB, *DEMOS]
    for key in ("dataset", "model"):  # one folder is one name: my, my/ and ./my
        value = getattr(args, key)
        if value and Path(value).exists() and os.path.normpath(value) not in built_in:
            setattr(args, key, os.path.normpath(value))
    source = Path(args.dataset)
    if args.dataset not in built_in and not source.is_dir() and not is_data_file(source):
        kinds = f"a file ({', '.join(ENDINGS)}), a folder nor one of {', '.join(built_in)}"
        fail(f"--dataset {args.dataset}: neither {kinds}")
    args.model = args.model or ("demo" if args.dataset in DEMOS else "distilbert-base-uncased")
    args.max_length = args.max_length or LENGTHS.get(args.dataset, 256)
    args.eval_batch_size = args.eval_batch_size or args.batch_size
    # A folder given by an absolute path is recorded by its name alone: no machine's paths.
    args.command = " ".join([name, *(re.sub(r"(^|=)/.*/", r"\1", word) for word in line)])
    args.test_only = bool(args.eval_only) and not recorded
    if recorded:
        refuse_contradictions(args, recorded)

    if args.export:
        if args.export.is_file() or args.export.is_dir() and any(args.export.iterdir()):
            fail(f"--export {args.export}: it is not an empty folder; name a new one")
        if len(args.seeds) > 1 or len(args.lr) > 1 and not args.eval_only:
            fail(f"--export {args.export}: of one run; give one of --seeds and one --lr")
    return args


def trained_run(folder):
    """The flags of the run that saved the adapter in `folder`, from the result file beside it.

    {} if there is no such file. "data files" is the hash of the data.
    """
    path = Path(f"{os.path.abspath(folder)}.json")
    if not path.exists():
        say(f"--eval_only {folder}: no {path.name} beside it, so its dev examples are unknown")
        return {}
    if not (result := read_result(path)):
        fail(f"--eval_only {folder}: {path.name} beside it is not a complete result file")
    left_out = NOT_SETTINGS | SCORING | {"dataset folder", "model folder"}  # a folder may move
    flags = {key: value for key, value in result["settings"].items() if key not in left_out}
    flags |= {"method": result.get("method"), "data files": result["data"].get("files_sha256")}
    return flags | {"seeds": [result.get("seed")], "lr": [result.get("lr")]}


def refuse_contradictions(args, recorded):
    """End the program where a flag, or the data, is not what the adapter's result file says."""
    files = recorded["data files"]  # without a hash of its own a data set cannot be compared
    files = files and (files_sha256(args.dataset, args.data_dir) or files)
    flags = settings(args) | {"seeds": args.seeds, "lr": args.lr, "data files": files}
    if differ := differences(recorded, {key: flags.get(key, recorded[key]) for key in recorded}):
        advice = "for test scores on other data copy the folder away from that file"
        fail(f"--eval_only {args.eval_only}: not what its result file says ({differ}); {advice}")


def as_word(value):
    """A flag's value as part of a file name: 0.5 -> "0.5", ["q", "v"] -> "q-v"."""
    if isinstance(value, list):
        return "-".join(as_word(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def refuse_idle(run, flags, where):
    """End the program where one of these flags, which do nothing here, is not at its default."""
    for flag in sorted(run.changed & flags):
        fail(f"--{flag} {getattr(run, flag)}: not with {where}")


def default_name(args, method_flags):
    """The method's name and each of its flags (argparse actions) that is not at its default."""
    parts = [args.method]
    for action in method_flags:
        value = getattr(args, action.dest)
        if value != action.default:
            shown = "" if action.nargs == 0 else as_word(value)
            parts.append(shown if action.choices else action.dest + shown)
    return "-".join(parts + ["untrained"] * (args.epochs == 0))


def settings(args):
    """The flags that decide a run's outcome: not where it runs, writes, or how it is timed."""
    flags = {key: value for key, value in sorted(vars(args).items()) if key not in NOT_SETTINGS}
    for key in ("model", "dataset"):
        if Path(flags[key]).is_absolute():  # a hash tells two folders of one name apart
            path = os.path.normpath(flags[key])
            flags[f"{key} folder"] = hashlib.sha256(path.encode()).hexdigest()[:8]
            flags[key] = Path(path).name
    return flags


def planned_runs(args):
    """A Namespace per seed and learning rate: all flags, one `lr`, `seed`, `settings`, and `path`
    of its result file, whether or not that exists.
    """
    flags, planned = settings(args), []
    dataset, ending = os.path.splitext(Path(flags["dataset"]).name)
    if ending.lower() not in ENDINGS or dataset in (*HUB, *DEMOS):  # a file goes by its stem
        dataset += ending
    stem = f"{dataset}-{args.name}-{Path(flags['model']).name}"
    untrained = args.eval_only or args.epochs == 0  # so that one learning rate will do
    for seed in dict.fromkeys(args.seeds):  # a seed's learning rates in a row: they share data
        for lr in args.lr[:1] if untrained else dict.fromkeys(args.lr):
            path = args.out / f"{stem}-lr{lr:g}-seed{seed}.json"
            if len(os.fsencode(path.name)) > 210:  # temporary files get longer names
                fail(f"{path.name[:40]} …: too long for a file's name; give a short --name")
            run = {"seed": seed, "lr": lr, "settings": flags, "path": path}
            planned.append(argparse.Namespace(**{**vars(args), **run}))
    return planned


def runs(args):
    """Yield the planned runs that have no finished result yet.

    Each has its `number` of `count`. All results are looked at before the first run starts: one
    with other settings ends the program.
    """
    if not args.eval_only and process_index() == 0:
        with library_errors(f"--out {args.out}: no folder that can be written; name another"):
            args.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.out).close()
    todo = [run for run in planned_runs(args) if args.eval_only or not finished(run)]
    for number, run in enumerate(todo, 1):
        run.number, run.count = number, len(todo)
        if args.eval_only or not finished(run):  # another process may have done it meanwhile
            yield run
