"""What each method costs in time: training steps and inference, measured in turns in one process.

    python study/times.py --dataset sst2 --model models/all-MiniLM-L6-v2
    python study/times.py --dataset sst2 --model models/all-MiniLM-L6-v2 --peers --choices
    python study/times.py --page                    write the tables of docs/speed.md

Times of separate runs cannot be compared, because a machine drifts. Here all methods take turns:
drift hits all alike, and a relative speed is of one round. It refuses to start at a load above 0.5.

A round of a method is a few training steps, and then inference. The steps take batches of the
study's first epoch, evenly spaced by length: their mean stands for the epoch. Contextual LoRA's
steps are all sparse, as 95 % of a run's are. Inference takes test examples, one and 32 at a time,
spaced in the same way: of the base, and of the adapter unmerged and merged. Flags are those of
study/run.sh for this data set and base; the scripts' defaults where it has none. A line of JSON in
study/times/<dataset>-<model>.jsonl is a round of a method; study/times_page.py reads them.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import baseline  # noqa: E402
import common  # noqa: E402
import contextual_lora  # noqa: E402
import hira  # noqa: E402
import hybrid  # noqa: E402
import lora  # noqa: E402
import qlora  # noqa: E402
import sparse_lora  # noqa: E402
from harness import batches, meters, models  # noqa: E402
from harness.process import fail  # noqa: E402
from study import peers, times_page  # noqa: E402

METHODS = {"Head only": (baseline, []), "Full fine-tuning": (baseline, ["--full"])}  # script, flags
METHODS |= {"LoRA": (lora, []), "QLoRA": (qlora, []), "HiRA": (hira, [])}
METHODS |= {"Sparse LoRA": (sparse_lora, []), "Contextual LoRA": (contextual_lora, [])}
METHODS |= {"QHiRA": (hybrid, ["--update", "hira"])}
METHODS |= {"Contextual QLoRA": (hybrid, ["--update", "contextual"])}


class Entry(NamedTuple):
    """A method or peer that is loaded and ready to be measured."""

    batches: list  # the examples of each measured training step, as index tensors
    train: Callable | None  # trains these batches once; returns seconds
    infer: Callable | None  # returns a line's "inference"
    flops: float = 0.0  # of the batches, 0 if unknown


def study_flags(dataset, model):
    """The flags of LoRA's first run in study/run.sh on this data set and base, if it has one."""
    command = ["bash", ROOT / "study" / "run.sh", "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        _, script, *flags = shlex.split(line)
        if script == "lora.py" and flags[:4] == ["--dataset", dataset, "--model", model]:
            return flags
    return ["--dataset", dataset, *(["--model", model] if model else [])]


def first_run(flags, name):
    """(the script of a method, its first run, how many learning rates each seed has)."""
    script, more = METHODS[name]
    args = script.parse_args(script.__doc__, script.__file__, script.add_args, [*flags, *more])
    script.choose_device(args)
    return script, next(script.runs(args)), len(args.lr)


def evenly(groups, lengths, n):
    """n of the groups of examples, evenly spaced by padded tokens, from few to many."""
    ordered = sorted(groups, key=lambda group: len(group) * int(lengths[group].max()))
    n = min(n, len(ordered))
    return [ordered[int((i + 0.5) * len(ordered) / n)] for i in range(n)]


def ours(flags, name, data, n):
    """The Entry of one of METHODS or of peers.REPLACED, on n batches."""
    script, run, _ = first_run(flags, name.split(", ")[0])
    replaced = peers.REPLACED.get(name)
    patch = mock.patch.object(*replaced) if replaced else contextlib.nullcontext()
    with patch:
        base = common.load_base(run, data)
        method = script.adapt(run, base)
        common.place(run, base)
        infer = functools.partial(time_inference, run, data, base, n)
        if name == peers.PLAIN or not common.trained_tensors(base.model):
            return Entry([], None, infer)  # also a language model's head, which no checkpoint lacks
        lengths, size = data.train.lengths, batches.global_batch(run)
        groups = batches.length_grouped_batches(lengths, size, run.seed, 0)
        chosen = evenly(groups, lengths, n)
        cut = functools.partial(batches.micro_batches, run, lengths)
        steps = [cut(group, run.batch_size, method.tokens_together) for group in chosen]
        flops = common.count_flops(run, data, base, method, steps)["total"]

    def few_batches(run, data, first, total):
        """The longest batch, which warms up, and all of them, in the middle of the run."""
        targets = batches.predicted_tokens(data, data.train, run.seed, 0)
        for i, examples in enumerate([chosen[-1], *chosen]):
            yield max(1, min(total - 1, total // 2 + i)), examples, targets

    def train():
        with patch, mock.patch.object(common, "training_batches", few_batches):
            laps = common.train(run, data, base, method).laps
        assert len(laps) == len(chosen) + 1, f"{name}: the loss became NaN or infinite"
        return sum(laps[1:])

    return Entry(chosen, train, infer if name in METHODS else None, flops)


@torch.inference_mode()
def time_inference(run, data, base, n):
    """{"base", "unmerged", "merged": {"single_ms": […], "examples", "seconds"}}.

    Milliseconds of n test examples, one at a time; examples and seconds of n / 4 batches of 32.
    """
    model, clock, lengths = base.model.eval(), meters.Clock(run.device), data.test.lengths
    targets, ordered = batches.predicted_tokens(data, data.test, "test"), lengths.argsort()
    states, numbers = {"base": contextlib.nullcontext()}, {}
    if models.stand_ins(model):
        plain = functools.partial(models.as_plain_linears, model, dtype=common.frozen_dtype(run))
        states = {"base": plain(merged=False), "unmerged": contextlib.nullcontext()}
        states["merged"] = plain(merged=True)

    def laps(groups):
        for examples in [groups[-1], *groups]:  # the first one warms up
            batch = batches.collate(data, data.test, examples, targets).to(run.device)
            clock.start()
            with common.autocast(run):
                common.forward(base, batch)
            clock.stop()
        return clock.read()[1:]

    singles = evenly(ordered.split(1), lengths, n)
    many = evenly(ordered.split(32), lengths, math.ceil(n / 4))
    for name, state in states.items():
        with state:
            numbers[name] = {"single_ms": [1000 * seconds for seconds in laps(singles)]}
            numbers[name] |= {"examples": sum(map(len, many)), "seconds": sum(laps(many))}
    return numbers


def product_rate(run, width):
    """Floating-point operations per second of one product of a feed-forward layer's shape."""
    rows = run.batch_size * run.max_length if "cuda" in run.device else 1024  # as micro_batches
    options = {"dtype": common.frozen_dtype(run), "device": run.device}
    x, weight = (torch.randn(n, width, **options) for n in (rows, 4 * width))
    clock = meters.Clock(run.device)
    for _ in range(20):
        clock.start()
        for _ in range(5):
            x @ weight.T
        clock.stop()
    return 5 * 2 * rows * weight.numel() / min(clock.read())


def describe_machine(run):
    """What the times depend on, for a line."""
    cpus = Path("/proc/cpuinfo")  # on Linux
    names = re.findall(r"model name\s*: (.*)", cpus.read_text() if cpus.exists() else "")
    name = torch.cuda.get_device_name() if "cuda" in run.device else [*names, platform.machine()][0]
    machine = {"name": name, "device": run.device.split(":")[0], "cores": os.cpu_count()}
    machine |= {"threads": torch.get_num_threads(), "precision": run.precision}
    return machine | {"torch": torch.__version__.split("+")[0]}


def measure(args):
    """Append a line per round and method to the file; returns its path."""
    load = os.getloadavg()[0]
    if load > 0.5 and not args.busy:
        fail(f"the load is {load:.2f}: wait until nothing else runs, or try it out with --busy")
    flags = study_flags(args.dataset, args.model)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags += ["--precision", args.precision, "--device", args.device, "--out", folder]
        _, run, learning_rates = first_run(flags, "LoRA")
        data = common.load_data(run)
        names = [*METHODS, *(peers.CHOICES if args.choices else [])]
        names += [peers.PLAIN] if args.peers else []
        entries = {name: ours(flags, name, data, args.steps) for name in names}
        lengths, width = data.train.lengths, common.load_tokenizer(run.model)[1].hidden_size
        choose = functools.partial(evenly, lengths=lengths, n=args.steps)
        for name, sampler in peers.PEERS if args.peers else ():
            peer = peers.peft_trainer(first_run(flags, name)[1], data, name, sampler, choose)
            entries[f"{name} / PEFT, {sampler}"] = Entry(*peer, None)
        dataset, model = (Path(name).name for name in (args.dataset, run.model))
        session = {"dataset": dataset, "model": model, "busy": args.busy}
        session |= {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "load": load}
        session |= {"machine": describe_machine(run), "learning_rates": learning_rates}
        session["extra"] = [key for key in ("peers", "choices") if vars(args)[key]]
        session["epoch_steps"] = math.ceil(len(lengths) / batches.global_batch(run))
        session["run_steps"] = batches.count_steps(run, data)
        path = args.out / f"{dataset}-{model}.jsonl"
        args.out.mkdir(parents=True, exist_ok=True)
        for number in range(args.rounds):
            rate = product_rate(run, width)
            for name, entry in entries.items():
                line = session | {"method": name, "round": number, "product_rate": rate}
                if entry.train:
                    examples, steps = torch.cat(entry.batches), len(entry.batches)
                    line |= {"seconds": entry.train(), "steps": steps, "flops": entry.flops}
                    line |= {"examples": len(examples), "tokens": int(lengths[examples].sum())}
                if entry.infer:
                    line["inference"] = entry.infer()
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    return path


def main(argv=None):
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", default="sst2")
    add("--model", help="as in study/run.sh, so that the study's flags are found")
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=16, help="training steps and single examples of a round")
    add("--device", default="auto")
    add("--precision", default="auto")
    add("--peers", action="store_true", help="add PEFT with the Trainer (study/peers.py)")
    add("--choices", action="store_true", help="add each of our choices switched off (the same)")
    add("--busy", action="store_true", help="start at any load; the lines are never published")
    add("--out", type=Path, default=ROOT / "study" / "times", help="folder of the .jsonl files")
    add("--page", action="store_true", help="write the tables of docs/speed.md; measure nothing")
    args = parser.parse_args(argv)
    return times_page.write(args.out) if args.page else measure(args)


if __name__ == "__main__":
    main()
