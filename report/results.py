"""Result files in, runs out; every field is checked here, so that nothing fails on it later.

On the scale of comparison a difference of 1 is about 1 percent: it is the percentage of right
answers, or 100·ln(perplexity).
"""

import base64
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.process import fail, first_line
from harness.text import printable

METHODS = {"head_only": "Head only", "full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
METHODS |= {"hira": "HiRA", "sparse_lora": "Sparse LoRA", "contextual_lora": "Contextual LoRA"}
METHODS |= {"hybrid": "QHiRA"}  # in the order of every table
TESTED = ("lora", "qlora", "hira", "sparse_lora")
PARENTS = {"QHiRA": ("QLoRA", "HiRA"), "Contextual QLoRA": ("QLoRA", "Contextual LoRA")}
DATASETS = {"sst2": "SST-2", "imdb": "IMDB", "wikitext2": "WikiText-2"}
DEMOS = {"demo": "Demo", "demo_lm": "Demo text"}
METRICS = {"classification": "accuracy", "mlm": "mlm_perplexity", "clm": "causal_perplexity"}
SIGN = {"classification": 1, "mlm": -1, "clm": -1}  # -1: less is better
MARGIN = {"classification": 1.0, "mlm": 2.0, "clm": 2.0}  # points; percent of the perplexity
# Settings that say where a run found its data, or how it cut a batch: they may differ in a row.
FREE = {"dataset", "model", "dataset folder", "model folder", "train_samples", "test_samples"}
FREE |= {"dev_samples", "batch_size", "eval_batch_size", "grad_accum"}
# Settings that an untrained model ignores.
TRAINING = {"epochs", "max_steps", "head_lr", "warmup", "weight_decay", "base_dropout"}
ADAPTER = {"rank", "alpha", "dropout", "targets"}  # methods are tested where these are equal
NUMERIC = TRAINING | {"rank", "alpha", "dropout", "batch_size", "grad_accum", "max_length"}
NUMERIC |= {"heldout", "sparsity", "channel_sparsity", "penalty"}
SWITCHES = {"checkpointing", "no_double_quant", "paged"}
WORDS = {"dataset", "model", "precision", "structure", "estimator", "nf4_kernel", "update"}
MACHINE_FREE = ("metrics", "parameters", "sparsity", "flops", "disk")  # hardly depend on the device


@dataclass(eq=False)
class Run:
    """One result: a method at one learning rate and seed, trained and scored."""

    file: str  # the file's name, with the line in a .jsonl file
    path: Path  # where it was read
    created: str  # date and time
    method: str  # as METHODS has it
    kind: str  # the method's name in tables; a hybrid's depends on its settings
    name: str  # of its row: the method and its changed flags, or the user's --name
    default: bool  # whether that is the name without changed flags
    dataset: str
    model: str
    lr: float  # 0 for an untrained model
    seed: int
    untrained: bool
    diverged: bool  # the loss or a score became NaN or infinite: never picked
    task: str  # classification, mlm or clm
    dev: float  # the scores, on the scale of comparison; NaN if it diverged
    test: float
    values: np.ndarray | None  # (test examples,) on that scale, whose mean is `test`
    majority: float | None  # share of the test examples that the largest class has
    sizes: dict  # {split: number of examples}
    settings: dict  # those that all runs of a row share
    data_key: str  # JSON of what runs share that can be compared: the test examples and the base
    budget_key: str  # and how much they train
    split_key: str  # equal for runs with the same training and dev examples
    seconds: float  # of training
    costs: dict  # {dotted path in the result: number}, scores too; times only with --timing
    machine: str  # the device's name, torch and transformers
    gpu: bool
    bf16: bool


@dataclass(eq=False)
class Row:
    """One row of the tables: a method in one variant, tuned at each seed."""

    label: str  # differs from all others of the group
    run: Run  # any of its runs: its method, kind and settings are the row's
    tested: bool  # whether its pairs get a verdict
    lrs: list  # the learning rates that each of its seeds has, from small to large
    score: float  # mean of the picked runs (of perplexities geometric), 95 % interval over seeds
    interval: list
    dev: dict  # {learning rate: dev scores, one per seed that did not diverge}
    test: dict  # {learning rate: mean test score}
    costs: dict  # {dotted path: mean over the picked runs}
    left_out: list  # sentences: seeds, learning rates and runs that do not count
    picked: dict  # {seed: its Run with the best dev score}
    split_keys: dict  # {seed: the split_key of each of its runs}


@dataclass(eq=False)
class Pair:
    """Row a minus row b over the seeds of both: points of accuracy, or percent of perplexity."""

    a: str  # labels
    b: str
    seeds: list
    mean: float = math.nan
    each: list = ()  # a difference per seed; empty below two seeds
    intervals: dict = None  # "95 % interval", "95 %, seeds only" or "examples only", "90 % …"
    ahead: str = ""  # the label with the better mean, and by how much: mean, 95 % interval
    lead: list = ()
    p_seeds: float = math.nan  # of the t-test over seeds; then of both tests, and Holm's
    p: float = math.nan
    p_holm: float = math.nan
    equal: bool = False  # the 90 % intervals lie within the margin
    verdict: str = ""  # better, equal, undecided, none; "": not tested
    why: str = ""  # there is no verdict
    examples: int = 0
    variation: tuple = ()  # (squared errors on the scale of comparison, seeds, examples or groups)


@dataclass(eq=False)
class Group:
    """Comparable runs (same test examples, base and budget), and what they say."""

    title: str
    task: str
    margin: float  # points of accuracy, or percent of the perplexity
    rows: list
    pairs: list  # the tested ones
    lora: Row | None  # the one that the others are compared with
    versus_lora: dict  # {label: its Pair with that row}
    parents: list  # a Pair of each variant or hybrid with what it is made of
    detectable: tuple | None  # (difference that 80 % of studies find, Pair that varies most)
    cautions: list
    runs: list  # never empty
    times: object = None  # a report.times.Times, where times were measured
    repeats: list = ()  # Groups with one learning rate each: more data, or longer training


def shown(value):
    """A setting's value as text: 0.5, "query-value"."""
    parts = value if isinstance(value, list) else [value]
    return printable("-".join(f"{x:g}" if isinstance(x, float) else str(x) for x in parts))


def tested_runs(runs):
    """One run of each tested method, of runs that stand for rows: those that share the adapter's
    settings that most methods have, the default name first.
    """
    runs = [run for run in runs if run.method in TESTED and not run.untrained]
    keys, variants = ADAPTER.intersection(*(run.settings for run in runs)), {}
    for run in sorted(runs, key=lambda run: (not run.default, run.name)):
        settings = json.dumps([run.settings[key] for key in sorted(keys)])
        variants.setdefault(settings, {}).setdefault(run.method, run)
    return list(max(variants.values(), key=len, default={}).values())


def label_rows(runs, reference):
    """{run: label} of runs that stand for rows: the method; the settings that are not those of its
    kind's reference; and the name, where it is the user's own or nothing else tells rows apart.
    """
    labels, counts = {}, Counter()
    for run in runs:
        label, usual = run.kind, reference.get(run.kind, run).settings
        if run.untrained:
            label = "Untrained base" if run.method == "head_only" else f"{label} untrained"
            usual = run.settings
        differ = [k for k in sorted(run.settings | usual) if run.settings.get(k) != usual.get(k)]
        label += "".join(f" {key} {shown(run.settings.get(key))}" for key in differ)
        if not (run.default or run.untrained or differ and run.name.startswith(run.method)):
            label += f" ({run.name})"
        label = printable(label)
        counts[label] += 1
        labels[run] = label if counts[label] == 1 else f"{label} #{counts[label]}"
    return labels


def row_order(run):
    """Sorts rows: the untrained last; methods in their order, the default variant first, 2 < 32."""
    place = [*METHODS, run.method].index(run.method)
    padded = re.sub(r"\d+", lambda digits: digits[0].zfill(9), run.name)
    return run.untrained, place, run.method, run.kind, not run.default, padded


def group_order(runs):
    """Sorts groups of runs: our data sets, a user's own, demos; of one data set the largest."""
    run = runs[0]
    place = [*DATASETS, run.dataset].index(run.dataset)
    return run.dataset in DEMOS, place, run.dataset, -len(runs), run.data_key, run.budget_key


def facts(run):
    """{name: value} of what comparable runs share."""
    return json.loads(run.data_key) | json.loads(run.budget_key)


def titles(groups):
    """A title for each list of comparable runs; equal ones get what the groups differ in."""
    runs, texts = [runs[0] for runs in groups], []
    for run in runs:
        same = [facts(x) for x in runs if (x.dataset, x.model) == (run.dataset, run.model)]
        differ = [key for key in facts(run) if len({str(x.get(key)) for x in same}) > 1]
        differ = ", ".join(printable(f"{key} {facts(run)[key]}", 20) for key in differ)
        name = (DATASETS | DEMOS).get(run.dataset, printable(run.dataset))
        texts.append(f"{name} with {printable(run.model)}" + (f" ({differ})" if differ else ""))
    return texts


def score_on_scale(score, task):
    """A score on the scale of comparison: percent, or 100·ln(perplexity)."""
    return 100 * score if task == "classification" else 100 * math.log(score)


def score_from_scale(x, task):
    """A score from that scale: percent of right answers, or the perplexity."""
    return float(x if task == "classification" else math.exp(min(x / 100, 700)))


def difference_from_scale(x, task):
    """A difference on that scale: in points of accuracy, or in percent of the perplexity."""
    return float(x if task == "classification" else 100 * math.expm1(min(x / 100, 700)))


def margin_on_scale(margin, task):
    """A margin in points or percent of the perplexity, on the scale of comparison."""
    return margin if task == "classification" else 100 * math.log1p(margin / 100)


def number(x, name):
    """A finite number of a result as a float; refuses anything else. name: for the message."""
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
        raise ValueError(f"{name} is {printable(x)}, not a finite number")
    return float(x)


def numbers(tree, path):
    """{dotted path: number} of every finite number in nested dicts; a list counts as its mean."""
    if isinstance(tree, dict):
        parts = [numbers(part, f"{path}.{key}") for key, part in tree.items()]
        return {key: x for part in parts for key, x in part.items()}
    values = tree if isinstance(tree, list) and tree else [tree]
    if any(isinstance(x, bool) or not isinstance(x, int | float) for x in values):
        return {}
    mean = float(np.mean(np.array(values, float)))
    return {path: mean} if math.isfinite(mean) else {}


def read_costs(r):
    """{dotted path: number} of a result's scores and costs, with the peaks of memory."""
    trees = {key: r[key] for key in (*MACHINE_FREE, "memory") if key in r}
    trees["sparsity"] = r["report"].get("sparsity", {})
    if r["inference"]:  # without --timing nobody kept the machine quiet
        trees["time"] = r.get("time", {})
        trees["inference"] = {str(timing["batch"]): timing for timing in r["inference"]}
    for phase in r["memory"].keys() & {"train", "inference"}:
        peak = sum(numbers(r["memory"][phase], "").values())
        trees["memory"] = trees["memory"] | {phase: {**r["memory"][phase], "peak": peak}}
    return {path: x for key, tree in trees.items() for path, x in numbers(dict(tree), key).items()}


def read_settings(r):
    """A result's settings, each of them None, a bool, a text, a finite number, or a list of these.

    NaN would differ from itself, and "8" from 8 or "yes" from True in runs of one row.
    """
    settings = dict(r["settings"])
    if settings.get("targets") is None and r["peft"]:
        settings["targets"] = r["peft"]["target_modules"]
    for key, value in settings.items():
        kind = bool if key in SWITCHES else str if key in WORDS else None
        if kind and not isinstance(value, kind):
            wanted = "true or false" if kind is bool else "a text"
            raise ValueError(f"the setting {key} is {printable(value)}, not {wanted}")
        parts = value if isinstance(value, list) and key not in NUMERIC else [value]
        for part in parts:
            if part is not None and (key in NUMERIC or not isinstance(part, bool | str)):
                number(part, f"the setting {printable(key)}")
    return settings


def example_values(examples, count):
    """(count,) values of the test examples, whose mean is the score on the scale of comparison.

    Right answers are 100, wrong ones 0. Of a perplexity the score is 100·Σ nll / Σ tokens, and a
    block's value is that plus its part of the error (linearized ratio; Cochran 1977, chapter 6).
    """
    if "correct" in examples:
        bits = np.frombuffer(base64.b64decode(examples["correct"]), np.uint8)
        return 100.0 * np.unpackbits(bits)[:count]
    nll, tokens = (np.array(examples[key], float) for key in ("nll", "scored"))
    with np.errstate(all="ignore"):  # what is NaN does not fit the test score
        loss = nll.sum() / tokens.sum()
        return 100 * (loss + (nll - loss * tokens) / tokens.mean())


def read_run(text, file="", path=Path()):
    """One result; an exception says why it is unusable."""
    try:
        r = json.loads(text)
    except ValueError:
        raise ValueError("not JSON: torn, empty or not a text") from None
    schema = r.get("schema") if isinstance(r, dict) else None
    if schema in (1, 2):
        raise ValueError("from an older version of this program; run it again")
    if schema != 3:
        raise ValueError("not a result file of this program")
    data, environment, task = r["data"], r["environment"], r["data"]["task"]
    names = {key: Path(r[key]).name for key in ("method", "name", "dataset", "model")}
    if not all(0 < len(name) <= 200 for name in names.values()):
        raise ValueError("a name is empty or has more than 200 characters")
    settings = read_settings(r)
    method, kind = names["method"], METHODS.get(names["method"], printable(names["method"]))
    if method == "hybrid" and settings["update"] == "contextual":
        method, kind = "hybrid-contextual", "Contextual QLoRA"
    untrained, diverged = bool(r["untrained"]), bool(r["diverged"])
    sizes = {split: int(number(data[split], split)) for split in ("train", "dev", "test")}
    dev, test, values = math.nan, math.nan, None
    if not diverged:
        metric = METRICS[task]
        scores = [number(r["metrics"][split][metric], metric) for split in ("dev", "test")]
        if min(scores) < 0 or task != "classification" and 0 in scores:
            raise ValueError("a score is negative, or a perplexity zero")
        dev, test = (score_on_scale(score, task) for score in scores)
        values = example_values(r["test_examples"], sizes["test"])
        if len(values) != sizes["test"] or len(values) < 2 or not abs(values.mean() - test) < 0.01:
            raise ValueError("`test_examples` does not fit the test score")
    counts = (data.get("class_counts") or {}).get("test", [])
    counts = [number(count, "a class count") for count in counts]
    shared = {"dataset": names["dataset"], "task": task, "base": r["base"]["sha256"]}
    shared |= {"tokens": settings["max_length"], "test": sizes["test"], "of": data["test_sha256"]}
    batch = settings["batch_size"] * settings["grad_accum"] * environment["processes"]
    budget = {key: settings[key] for key in ("epochs", "max_steps", "head_lr")}
    budget |= {"train": sizes["train"], "dev": sizes["dev"], "batch": int(number(batch, "batch"))}
    device, gpu = printable(environment["device"]), environment["device"].startswith("cuda")
    versions = [(key, str(environment.get(key)).split(".")) for key in ("torch", "transformers")]
    versions = [f"{key} {printable('.'.join(version[:2]))}" for key, version in versions]
    ignored = FREE | TRAINING if untrained else FREE
    fields = names | {"kind": kind, "default": names["name"] == method, "file": file, "path": path}
    fields |= {"created": printable(r.get("created")), "seed": int(number(r["seed"], "seed"))}
    fields |= {"untrained": untrained, "lr": 0.0 if untrained else number(r["lr"], "lr")}
    fields |= {"diverged": diverged, "task": task, "dev": dev, "test": test, "values": values}
    fields |= {"majority": max(counts) / sum(counts) if counts else None, "sizes": sizes}
    fields |= {"settings": {key: x for key, x in sorted(settings.items()) if key not in ignored}}
    budget = {} if untrained else budget
    fields |= {"data_key": json.dumps(shared), "budget_key": json.dumps(budget), "gpu": gpu}
    fields |= {"split_key": json.dumps([data["train_sha256"], data["dev_sha256"]])}
    seconds = number(r.get("time", {}).get("train_seconds", 0), "train_seconds")
    fields |= {"costs": read_costs(r), "seconds": seconds}
    fields |= {"bf16": "bf16" in (environment.get("precision"), settings.get("precision"))}
    fields |= {"machine": ", ".join([device.removeprefix("cuda ") if gpu else "cpu", *versions])}
    return Run(**fields)


def read_texts(paths):
    """[(name for messages, text of one result, file)] of all files, or lines of .jsonl files."""
    texts = []
    for path in paths:
        if not path.exists():
            fail(f"{path}: no such file or folder; `python lora.py` writes into results/")
        inside = [file for end in ("*.json", "*.jsonl") for file in path.glob(end)]
        for file in inside if path.is_dir() else [path]:
            try:
                whole = file.read_bytes() if file.is_file() else b""  # a FIFO would never end
            except OSError:
                whole = b""
            lines = whole.splitlines() if file.suffix == ".jsonl" else []
            lines = [(f"{file.name}:{i + 1}", line) for i, line in enumerate(lines) if line.strip()]
            texts += [(name, text, file) for name, text in lines or [(file.name, whole)]]
    return sorted(texts)  # by name and content, wherever the files lie


def load(paths):
    """(runs, skipped): each usable run once, and one line for each text that is none.

    Two results of one run with other scores end the program.
    """
    runs, skipped = {}, []
    for name, text, file in read_texts(paths):
        try:
            run, reason = read_run(text, name, file), None
        except (ArithmeticError, RecursionError):
            reason = "a number is too large, or it is nested too deeply"
        except (TypeError, AttributeError):
            reason = "a part has the wrong type"
        except (KeyError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        if not reason:
            key = [run.data_key, run.budget_key, run.method, run.name, run.settings]
            first = runs.setdefault(json.dumps([*key, run.seed, run.lr]), run)
            if str([first.dev, first.test]) != str([run.dev, run.test]):  # NaN is equal to NaN
                both = [f"{printable(x.path, 200)} ({x.created})" for x in (first, run)]
                fail(f"one run with different scores in {' and '.join(both)}; remove one of them")
            reason = None if first is run else f"the same run as {first.file}"
        if reason:
            skipped.append(f"{printable(name, 120)}: {printable(reason, 200)}")
            folder = printable(file.parent, 120)
            print(f"compare.py: skipped {folder}/{skipped[-1]}", file=sys.stderr)
    if not runs:
        fail(f"no usable result in {', '.join(map(str, paths))}; `python lora.py` makes one")
    return list(runs.values()), skipped


def mean_costs(picked, runs, machine):
    """{dotted path: mean over the runs that have it} of the picked runs' scores and costs.

    Memory is of runs on `machine`, as a CPU takes a batch in smaller parts: at each seed of the
    picked run, or where that ran elsewhere, of another of `runs`.
    """
    seeds, values = {run.seed for run in picked}, {}
    measured = [run for run in [*runs, *picked] if run.machine == machine and run.seed in seeds]
    measured = {run.seed: run for run in measured if "memory.inference.peak" in run.costs}
    for source, kinds in ((picked, MACHINE_FREE), (measured.values(), "memory")):
        for path, x in (cost for run in source for cost in run.costs.items()):
            if path.startswith(kinds):
                values.setdefault(path, []).append(x)
    return {path: float(np.mean(x)) for path, x in values.items()}
