"""Result files in, runs out: each usable result once, one line for each text that is none.

A run is the dict of its file (schema 2) with what compare.py derives from it. Accuracies are in
percent, perplexities in 100·ln(perplexity), so that a difference of 1 is about 1 percent.
"""

import base64
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

from harness.process import fail, first_line

METHODS = {  # in the order of every table
    "head_only": "Head only",
    "full": "Full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "hira": "HiRA",
    "sparse_lora": "Sparse LoRA",
    "hybrid": "QHiRA",
}
TESTED = ("lora", "qlora", "hira", "sparse_lora")
DATASETS = {"sst2": "SST-2", "imdb": "IMDB", "wikitext2": "WikiText-2"}
DEMOS = {"demo": "Demo", "demo_lm": "Demo text"}
METRICS = {"classification": "accuracy", "mlm": "mlm_perplexity", "clm": "causal_perplexity"}
SIGN = {"classification": 1, "mlm": -1, "clm": -1}  # -1: less is better
MARGIN = {"classification": 1.0, "mlm": 2.0, "clm": 2.0}  # points; percent of the perplexity
# Settings that say where a run found its data, or how it split a batch: they may differ in a row.
FREE = {"dataset", "model", "dataset folder", "model folder", "train_samples", "test_samples"}
FREE |= {"batch_size", "eval_batch_size", "grad_accum"}
# What an untrained model takes no notice of.
TRAINING = {"epochs", "max_steps", "head_lr", "warmup", "weight_decay", "base_dropout"}
ANYWHERE = ("metrics", "parameters", "flops", "disk")  # what hardly depends on the device


def label(method, name):
    """A row's name in tables: lora-rank32 is "LoRA rank32"."""
    if name.startswith("hybrid-contextual"):
        return "Sparse QLoRA" + name.removeprefix("hybrid-contextual").replace("-", " ")
    rest = name.removeprefix(method)
    if rest == name:
        return f"{METHODS.get(method, method)} ({name})"
    if method == "head_only" and rest == "-untrained":
        return "Untrained base"
    return METHODS.get(method, method) + rest.replace("-", " ")


def compared_with(row):
    """Names of the rows that a row is set beside, LoRA apart: its own method, or a hybrid's two."""
    names = [row["method"]]
    if row["method"] == "hybrid":
        contextual = row["name"].startswith("hybrid-contextual")
        names = ["qlora", "sparse_lora-contextual" if contextual else "hira"]
    return [name for name in names if name not in ("lora", row["name"]) and not row["untrained"]]


def mark_tested(runs):
    """Mark the runs that are tested: of the four methods, in the variant that most of them have.

    The variant is what a name says beside the method's: nothing in the default one, which comes
    first where as many have it.
    """
    variants = {}  # of each method
    for run in runs:
        run["tested"] = run["method"] in TESTED and not run["untrained"]
        run["variant"] = run["name"].removeprefix(run["method"])
        if run["tested"]:
            variants.setdefault(run["method"], {})[run["variant"]] = None
    every = sorted(variant for own in variants.values() for variant in own)  # "" before others
    most = max(every, key=every.count, default="")
    for run in runs:
        run["tested"] = run["tested"] and run["variant"] == most


def row_order(row):
    """Sorts rows: the untrained last; methods in their order, the default variant first, 2 < 32."""
    place = [*METHODS, row["method"]].index(row["method"])
    number = re.sub(r"\d+", lambda digits: digits[0].zfill(9), row["name"])
    return row["untrained"], place, row["method"], row["name"] != row["method"], number


def group_order(runs):
    """Sorts groups of runs: our data sets, a user's own, demos; of one data set the largest."""
    run = runs[0]
    place = [*DATASETS, run["dataset"]].index(run["dataset"])
    return run["dataset"] in DEMOS, place, run["dataset"], -len(runs), run["scored"], run["trained"]


def on_scale(score, task):
    """A score on the scale on which scores are compared: percent, or 100·ln(perplexity)."""
    return 100 * score if task == "classification" else 100 * math.log(score)


def natural(x, task):
    """A score from that scale: percent of right answers, or the perplexity."""
    return float(x if task == "classification" else math.exp(min(x / 100, 700)))


def in_units(x, task):
    """A difference on that scale: in points of accuracy, or in percent of the perplexity."""
    return float(x if task == "classification" else 100 * math.expm1(min(x / 100, 700)))


def margin_on_scale(margin, task):
    """A margin in points or percent of the perplexity, on the scale of comparison."""
    return margin if task == "classification" else 100 * math.log1p(margin / 100)


def row_values(run):
    """What each test row says of a run's score: (rows,), whose mean is the score.

    Accuracy: 100 for a right answer, 0 for a wrong one. Perplexity: 100·ln is a ratio of sums,
    100·Σ nll / Σ scored; a block's value is that ratio and the block's part of its first-order
    error (linearised ratio estimator; Cochran 1977, chapter 6).
    """
    if "correct" in run["rows"]:
        bits = np.frombuffer(base64.b64decode(run["rows"]["correct"]), np.uint8)
        return 100.0 * np.unpackbits(bits)[: run["data"]["test"]]
    nll, scored = (np.array(run["rows"][key], float) for key in ("nll", "scored"))
    loss = nll.sum() / scored.sum()
    return 100 * (loss + (nll - loss * scored) / scored.mean())


def read_run(text):
    """One result as a dict, with what is derived from it; an exception says why it is unusable."""
    try:
        run = json.loads(text)
    except ValueError:
        raise ValueError("not JSON: torn, empty or not a text") from None
    if not isinstance(run, dict) or run.get("schema") != 2:
        raise ValueError("not a result of this version (schema 2)")
    data, flags = run["data"], run["settings"]
    for split in ("dev", "test"):
        score = run["metrics"][split][METRICS[data["task"]]]
        run[split] = on_scale(score, data["task"])
    values = row_values(run)
    if len(values) != data["test"] or not abs(values.mean() - run["test"]) < 0.01:
        raise ValueError("`rows` does not fit the test score")
    run["drawn"] = str(data["train_sha256"]), str(data["dev_sha256"])  # differ from seed to seed
    run["seconds"] = run.get("time", {}).get("train_seconds", 0)
    sums = run["seconds"] + data["train"] + data["dev"] + data["official"]  # numbers, or it fails
    if not math.isfinite(run["dev"] + run["lr"] + run["seed"] + sums) or len(values) < 2:
        raise ValueError("a number is not finite, or there are fewer than two test rows")
    for key in ("method", "name", "dataset", "model"):
        run[key] = Path(run[key]).name
    run["lr"] = 0.0 if run["untrained"] else run["lr"]
    if run["untrained"] and run["name"] == "head_only":  # a language model has no head to train
        run["name"] = "head_only-untrained"
    rows_a_step = flags["batch_size"] * flags["grad_accum"] * run["environment"]["processes"]
    run["rows_a_step"] = rows_a_step
    scored = [run["dataset"], data["task"], run["base"]["sha256"], data["test_sha256"]]
    scored += [data["test"], flags["max_length"]]
    trained = [data["train"], data["dev"], flags["epochs"], flags["max_steps"], rows_a_step]
    trained = [] if run["untrained"] else [*trained, flags["head_lr"]]
    run["scored"], run["trained"] = json.dumps(scored), json.dumps(trained)
    free = FREE | TRAINING if run["untrained"] else FREE
    run["kept"] = {key: x for key, x in sorted(flags.items()) if key not in free}
    for timing in run["inference"]:
        timing["as trained"] = timing.get("unmerged", timing["base"])
    run["inference"] = {str(timing["batch"]): timing for timing in run["inference"]}
    if "epoch_seconds" in run.get("time", {}):  # a list; tables show means
        epochs = run["time"]["epoch_seconds"]
        run["time"]["epoch_seconds"] = sum(epochs) / max(1, len(epochs))
    if not run["environment"]["device"].startswith("cuda"):
        run.get("time", {}).pop("accelerator_hours", None)  # of a GPU alone
    for phase in ("train", "inference"):
        if phase in run["memory"]:  # nothing is trained in an untrained language model
            run["memory"][phase]["peak"] = sum(run["memory"][phase].values())
            run["memory"][phase]["allocator"] = run["memory"].pop(f"{phase}_allocator", None)
    return run


def texts_of(file):
    """[(name, text, file)]: a .json file is one text, a .jsonl file one a line."""
    try:
        whole = file.read_bytes()
    except OSError:  # a folder of that name, or not ours to read
        whole = b""
    lines = whole.splitlines() if file.suffix == ".jsonl" else []
    lines = [(f"{file.name}:{i + 1}", line) for i, line in enumerate(lines) if line.strip()]
    return [(name, text, file) for name, text in lines or [(file.name, whole)]]


def load(paths, price=None):
    """(runs, skipped): each usable run once, and one line for each text that is none."""
    texts, runs, skipped = [], {}, []
    if price is not None and not 0 < price < math.inf:
        fail(f"--price {price:g}: give a positive number")
    for path in paths:
        if not path.exists():
            fail(f"{path}: no such file or folder; `python lora.py` writes into results/")
        inside = [file for end in ("*.json", "*.jsonl") for file in path.glob(end)]
        for file in inside if path.is_dir() else [path]:
            texts += texts_of(file)
    for name, text, file in sorted(texts):  # by name and content, wherever the files lie
        try:
            run = read_run(text) | {"file": name}
            if price and "accelerator_hours" in run.get("time", {}):
                run["time"]["cost"] = price * run["time"]["accelerator_hours"]
            keys = ("scored", "trained", "method", "name", "seed", "lr", "kept")
            first = runs.setdefault(json.dumps([run[key] for key in keys]), run)
            reason = None if first is run else f"the same run as {first['file']}"
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else first_line(error)
        except RecursionError:
            reason = "not a result file"
        if reason:
            skipped.append(f"{name}: {reason}")
            print(f"compare.py: skipped {file.parent / name}: {reason}", file=sys.stderr)
    if not runs:
        fail(f"no usable result in {', '.join(map(str, paths))}; `python lora.py` makes one")
    if price and not any(run["inference"] and "cost" in run["time"] for run in runs.values()):
        print("compare.py: --price: no run here was timed on a GPU", file=sys.stderr)
    return list(runs.values()), skipped


def numbers(tree, path=""):
    """{dotted path: number} of every number in nested dicts."""
    if isinstance(tree, dict):
        found = [numbers(part, f"{path}.{key}".strip(".")) for key, part in tree.items()]
        return {key: x for part in found for key, x in part.items()}
    return {path: tree} if isinstance(tree, int | float) else {}


def most_common_device(runs):
    """The device that most of these runs had."""
    devices = [run["environment"]["device"] for run in runs]
    return max(sorted(set(devices)), key=devices.count)


def mean_numbers(runs, every, device):
    """{dotted path: mean over the runs that have it} of the chosen runs' scores and costs.

    Memory and times are of runs on `device`, the one of most runs on the page, as a CPU takes a
    batch in smaller parts: at each seed of the chosen one of `runs`, or where that ran elsewhere or
    has no costs, of another of `every` run. A row that never ran on it has none. Times are of timed
    runs.
    """
    found, seeds = {}, {run["seed"] for run in runs}
    there = [run for run in [*every, *runs] if run["environment"]["device"] == device]
    there = {run["seed"]: run for run in there if run["memory"] and run["seed"] in seeds}.values()
    parts = [{key: run.get(key) for key in ANYWHERE} for run in runs]
    for run in there:
        kept = ["memory", "inference", "time"] if run["inference"] else ["memory"]
        parts.append({key: run.get(key) for key in kept})
    for part in parts:
        for path, x in numbers(part).items():
            found.setdefault(path, []).append(x)
    return {path: float(np.mean(x)) for path, x in found.items()}


def listed(found):
    return "; ".join(f"{label}: {what}" for label, what in found.items()) + "."


def cautions(rows):
    """Sentences on what makes the comparison less fair than it looks."""
    rows, said = [row for row in rows if not row["untrained"]], []
    tested = [row for row in rows if row["tested"]]

    def say(words, found):
        if found:
            said.append(f"{words} {listed(found)}")

    if len({len(row["rates"]) for row in tested}) > 1:
        found = {row["label"]: len(row["rates"]) for row in tested}
        say("Unequal numbers of learning rates to choose from, so no verdict.", found)
    drawn = {}
    for row in rows:
        for seed, found in row["_drawn"].items():
            drawn.setdefault(seed, set()).update(found)
    odd = sorted(seed for seed, found in drawn.items() if len(found) > 1)
    if odd:
        seeds = ", ".join(map(str, odd))
        said.append(f"The training or dev rows are not the same for all at seed {seeds}.")
    found = {row["label"]: f"{row['rates'][0]:g}" for row in tested if len(row["rates"]) == 1}
    say("Not tuned, one learning rate only.", found)
    found = {}
    for row in rows:
        edges = [rate for rate in row["chosen"] if rate in (row["rates"][0], row["rates"][-1])]
        if len(row["rates"]) > 1 and len(edges) > len(row["seeds"]) / 3:
            found[row["label"]] = f"{len(edges)} of {len(row['seeds'])} seeds"
    say("Chosen at the edge of the rates tried, so a better one may lie beyond.", found)
    found = {
        row["label"]: ", ".join(f"seed {seed} has {n}" for seed, n in row["incomplete"].items())
        + f" of {len(row['rates'])}"
        for row in rows
        if row["incomplete"]
    }
    say("Left out, because not all rates have run.", found)
    every = {seed for row in tested for seed in row["seeds"]}
    found = {
        row["label"]: ", ".join(map(str, sorted(every.difference(row["seeds"]))))
        for row in tested
        if every.difference(row["seeds"])
    }
    say("Missing seeds; a pair uses those that both have.", found)
    for key in sorted({key for row in tested for key in row["settings"]}):
        found = {row["label"]: row["settings"][key] for row in tested if key in row["settings"]}
        if len(set(map(str, found.values()))) > 1:
            say(f"--{key} differs.", found)
    machines = {}
    for row in rows:
        for run in row["_chosen"].values():
            where = run["environment"]
            libraries = [f"{key} {where.get(key)}" for key in ("torch", "transformers")]
            machine = ", ".join([where["device"], *libraries])
            machines.setdefault(machine, {})[row["label"]] = None
    if len(machines) > 1:
        found = {", ".join(labels): machine for machine, labels in machines.items()}
        say("Not all ran on the same machine and libraries.", found)
    return said
