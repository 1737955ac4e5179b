"""Compare result files: which differences are real, how large they are, and what they cost.

    python compare.py results/           tables here; results/README.md with all tables and plots
    python compare.py results/ --json    the same numbers for a program, and nothing else

Runs are compared only where data, base model, length, steps, batch sizes and library versions agree; costs only where
device, threads and precision agree too and the machine was not shared. The tests were fixed before any run: pairs of
the four methods in their default variant, paired by seed, t-test with Holm's correction at 5 %, a sign-flip test beside
it, and no winner where there are too few seeds to find one. Dev runs only tell how learning rates were chosen.
"""

import argparse
import base64
import json
import math
import os
import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

METHODS = {"head_only": "Head only", "full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA", "hira": "HiRA",
           "sparse_lora": "Sparse LoRA"}  # in the order of every table
TESTED = ("lora", "qlora", "hira", "sparse_lora")
DATASETS = {"sst2": "SST-2", "imdb": "IMDB", "wikitext2": "WikiText-2"}
DEMOS = ("demo", "demo_lm")
# metric: name, scale, format; the first one that a file has is the default
METRICS = {"accuracy": ("accuracy, %", 100, ".2f"), "mlm_perplexity": ("masked-LM perplexity", 1, ".3f"),
           "causal_perplexity": ("causal perplexity", 1, ".3f"), "f1": ("macro F1, %", 100, ".2f"),
           "loss": ("loss", 1, ".4f")}
MORE_IS_BETTER = ("accuracy", "f1")
# what must agree before two runs are compared, and its place in a result file
SAME = {"data set": "dataset", "metric": "metric", "train rows": "split.train", "dev rows": "split.dev",
        "scored rows": "split.eval", "scored split": "split.eval_split", "max length": "args.max_length",
        "epochs": "args.epochs", "max steps": "args.max_steps", "batch size": "args.batch_size",
        "accumulation": "args.grad_accum", "evaluation batch": "args.eval_batch_size", "base model": "model_sha256",
        "split": "split.sha256", "processes": "environment.processes",
        **{library: f"environment.{library}" for library in ("torch", "transformers", "datasets", "bitsandbytes")}}
PLACE = ("environment.device", "environment.threads", "environment.precision", "args.checkpointing")  # costs: these, too
REQUIRED = ("method", "name", "dataset", "model", "model_sha256", "seed", "args.lr", "args.head_lr", "split.sha256",
            "split.train", "split.dev", "split.eval", "split.eval_split", "split.scored", "metrics.loss",
            "parameters.trainable", "time.train_seconds", *PLACE)
MIB = 1 / 2**20
# table: columns of (header, place in a result file, scale, format)
QUALITY = {
    "Scores": [(name, f"metrics.{m}", *how) for m, (name, *how) in METRICS.items()]
    + [(f"merged: {METRICS[m][0]}", f"metrics.merged.{m}", *METRICS[m][1:]) for m in list(METRICS)[:3]]
    + [("learning rate", "lr", 1, "g"), ("of the head", "args.head_lr", 1, "g")],
    "Parameters": [(k, f"parameters.{k}", 1, ",.0f") for k in ("adapter", "head", "trainable", "total")]
    + [("trainable, %", "parameters.trainable_percent", 1, ".3f")]
    + [(f"zeros in {k}, %", f"parameters.sparsity.{k}", 100, ".1f") for k in ("A", "B", "BA")]}
TIME, PEAK = ("train s", "time.train_seconds", 1, ",.1f"), ("peak MiB", "memory.train_peak", MIB, ",.0f")
COSTS = {
    "Training": [
        TIME, ("s per epoch", "time.epoch_seconds", 1, ",.1f"), ("step ms", "time.step_ms.median", 1, ",.1f"),
        ("samples/s", "time.samples_per_second", 1, ",.0f"), ("tokens/s", "time.tokens_per_second", 1, ",.0f"),
        ("accelerator h", "time.accelerator_hours", 1, ".4f"), ("hours × --price", "time.cost", 1, ".4f")],
    "Memory, MiB": [
        ("training peak", *PEAK[1:]), ("above its start", "memory.above_start", MIB, ",.0f"),
        ("inference peak", "memory.inference_peak", MIB, ",.0f"),
        *((k, f"memory.{k}", MIB, ",.2f") for k in ("base", "adapter", "head", "optimizer", "gradients"))],
    "Work and disk": [
        ("GFLOP a step", "flops.train_step", 1e-9, ",.1f"), ("TFLOP in all", "flops.train_total", 1e-12, ",.1f"),
        ("GFLOP a sample, inference", "flops.inference_per_sample", 1e-9, ",.2f"),
        *((f"{k} MiB", f"disk.{k}", MIB, ",.2f") for k in ("adapter", "base", "merged"))]}
FLIPS = 100_000  # random sign flips where all 2^n would be too many
MARKERS = "os^DvP*X<>phd8"  # one shape per variant: colours are lost in print
COLOURS = ("0.6", "black", "tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown")  # as METHODS, then others
NONE = "–"
SECTION = re.compile(r"(<!-- (results|pairs|costs|search) -->).*?(<!-- /\2 -->)", re.DOTALL)


# ---------------------------------------------------------------------------- statistics: arrays in, numbers out


def t_interval(x):
    """95 % interval (low, high) of the mean of x (n,): Student's t, n - 1 degrees of freedom; nan for n < 2."""
    from scipy.special import stdtrit  # scipy.stats would take a second longer to import
    half = stdtrit(len(x) - 1, 0.975) * np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return float(np.mean(x) - half), float(np.mean(x) + half)


def paired_t(d):
    """Two-sided p of the paired t-test (Student 1908) on differences d (n,).

    nan for n < 2, and where all differences are equal but not zero: without spread there is no t. All zero: p = 1.
    """
    from scipy.special import stdtr
    if len(d) < 2:
        return math.nan
    sd, largest = np.std(d, ddof=1), np.max(np.abs(d))
    if sd <= 1e-9 * largest:  # equal but for rounding
        return math.nan if largest else 1.0
    return float(2 * stdtr(len(d) - 1, -abs(np.mean(d)) / (sd / math.sqrt(len(d)))))


def signed_sums(d):
    """Sums of d (n,) under all 2^n choices of signs: (2^n,)."""
    sums = np.zeros(1)
    for x in d:
        sums = np.concatenate([sums + x, sums - x])
    return sums


def sign_flip(d):
    """(p, exact) of the two-sided sign-flip test (Fisher 1935) on differences d (n,).

    p is the share of sign choices whose sum is at least as far from zero as the observed one: of all 2^n up to n = 16,
    above that of FLIPS random ones with a fixed seed, the observed one counted in.
    """
    if exact := len(d) <= 16:
        sums = signed_sums(d)
    else:  # eight differences have 256 signed sums: a random one of them is eight random flips
        rng = np.random.default_rng(0)
        parts = np.array_split(d, math.ceil(len(d) / 8))
        sums = np.append(sum(signed_sums(part)[rng.integers(2 ** len(part), size=FLIPS)] for part in parts), np.sum(d))
    tolerance = 1e-9 * np.sum(np.abs(d))  # a tie is a tie in spite of rounding
    return float(np.mean(np.abs(sums) >= abs(np.sum(d)) - tolerance)), exact


def holm(p):
    """Holm's (1979) adjusted p for p (m,). A nan counts among the m, as the largest, and stays nan."""
    p = np.asarray(p, float)
    order, adjusted = np.argsort(p), np.empty(len(p))  # nan sorts last
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))), 1)
    return adjusted


def underpowered(n, m):
    """Whether even the smallest sign-flip p that n seeds can give, 2/2^n, would not survive m pairs."""
    return m * 2 / 2**n > 0.05


def item_noise(a, b):
    """(mean, low, high) of a - b, both (seeds, items) booleans: averaged over the seeds item by item, then mean and
    1.96 sd/√items. It is the noise of the test set, where the t-interval is the noise of the seeds."""
    d = (a.sum(0, dtype=float) - b.sum(0, dtype=float)) / len(a)
    half = 1.96 * np.std(d, ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.nan
    return float(d.mean()), float(d.mean() - half), float(d.mean() + half)


def mcnemar(a, b):
    """Exact two-sided p of McNemar's test (1947) for each seed: a, b (seeds, items) booleans -> (seeds,)."""
    from scipy.special import bdtr
    only_a, only_b = (a & ~b).sum(1), (b & ~a).sum(1)
    return np.minimum(2 * bdtr(np.minimum(only_a, only_b).astype(float), only_a + only_b, 0.5), 1)


def pareto(points):
    """Indices of the points (cost, score) that no other one beats in one without losing in the other, by cost."""
    front, best = [], -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            front, best = [*front, i], points[i][1]
    return front


# ---------------------------------------------------------------------------- reading


def fail(message):
    """An expected error: one line, status 2."""
    print(f"compare.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def value(run, path):
    """What a dotted path leads to in a result; None where it leads nowhere, the mean where it leads to a list."""
    for key in path.split("."):
        run = run.get(key) if isinstance(run, dict) else None
    return sum(run) / len(run) if isinstance(run, list) and run else run


def read(path):
    """One result file as a dict with a few derived entries; an error with the reason where it cannot be used."""
    run = json.loads(path.read_bytes())
    if not isinstance(run, dict) or "schema" not in run:
        raise ValueError("not a result file, it has no schema")
    if run["schema"] != 1:
        raise ValueError(f"schema {run['schema']}, and this compare.py reads schema 1")
    if lacking := [p for p in REQUIRED if value(run, p) is None]:
        raise ValueError(f"lacks {', '.join(lacking)}")
    args, split, memory, method, name = run["args"], run["split"], run["memory"], run["method"], run["name"]
    run["label"] = METHODS.get(method, method) + name[len(method):] if name.startswith(method) else name
    run["metric"] = next(m for m in METRICS if m in run["metrics"])
    if not all(math.isfinite(x) for x in (
            run["seed"], args["lr"], args["head_lr"], split["train"], split["dev"], split["eval"],
            memory.get("train_peak") or 0, *(run["metrics"].get(m, 0) for m in METRICS), value(run, "parameters.trainable"),
            value(run, TIME[1]))):
        raise ValueError("a metric or a cost is not finite")
    run["data"], run["base"] = (Path(run[key]).name for key in ("dataset", "model"))
    run["dev"] = split["scored"] == "dev"
    run["lr"] = args["head_lr"] if method == "head_only" else args["lr"]  # what a search varies
    run["same"], run["place"] = (tuple(value(run, p) for p in where) for where in (SAME.values(), PLACE))
    run["id"] = run["same"], name, run["seed"], run["dev"] and (run["lr"], args["head_lr"])
    hash((run["id"], run["place"]))
    if memory.get("train_peak") and memory.get("before_training"):  # macOS tells neither
        memory["above_start"] = memory["train_peak"] - memory["before_training"]
    run["inference"] = {f"batch {e['batch']}, length {e['length']}": e for e in run.get("inference") or []}
    for e in run["inference"].values():  # within a run the states took turns: most of the machine's drift cancels
        e["ratio"] = {state: e[state]["latency_ms"]["p50"] / e["base"]["latency_ms"]["p50"]
                      for state in ("merged", "unmerged") if state in e}
    load = run["environment"].get("load_average") or [0]
    threads = run["environment"]["threads"] * (run["environment"].get("processes") or 1)  # the load that a run makes by itself
    run["quiet"] = max(load) <= threads + 0.5 and bool(run["inference"])  # --quality_only says that its times are worth nothing
    if run.setdefault("correct") is not None:
        bits, items = base64.b64decode(run["correct"]), split["dev" if run["dev"] else "eval"]
        run["correct"] = np.unpackbits(np.frombuffer(bits, np.uint8))[:items].view(bool)
        if len(bits) != math.ceil(items / 8) or abs(run["correct"].mean() - run["metrics"]["accuracy"]) > 1e-4:
            raise ValueError("`correct` does not fit the accuracy or the number of scored rows")
    return run


def load(paths):
    """(runs, skipped) from files and folders; skipped is [{file, reason}]. Two files of one run are an error."""
    files, runs, skipped = {}, {}, []
    for path in map(Path, paths):
        if not path.exists():
            fail(f"no such file or folder: {path}")
        files |= {os.path.abspath(file): file for file in (path.glob("*.json") if path.is_dir() else [path])}
    for path in sorted(files.values(), key=lambda path: (path.name, path)):
        try:
            run = read(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{'' if isinstance(error, OSError | ValueError) else 'malformed, '}{error}"
            skipped.append({"file": path.name, "reason": reason})
            print(f"compare.py: skipped {path}: {reason}", file=sys.stderr)
            continue
        if run["id"] in runs:
            fail(f"{runs[run['id']][0]} and {path} are one run ({run['name']}, seed {run['seed']}): remove one")
        runs[run["id"]] = path, run
    if not runs:
        fail(f"no usable result file in {', '.join(map(str, paths))}: `python lora.py` makes one")
    return [run for _, run in runs.values()], skipped


# ---------------------------------------------------------------------------- from runs to numbers


def by_name(runs):
    """{name: its runs by seed}: methods in their order, the default variant first, numbers in names as numbers."""
    found = {}
    for run in sorted(runs, key=lambda run: (
            [*METHODS, run["method"]].index(run["method"]), run["name"] != run["method"],
            re.sub(r"\d+", lambda number: number[0].zfill(9), run["name"]), run["seed"])):
        found.setdefault(run["name"], []).append(run)
    return found


def spread(numbers):
    """{n, mean, sd, low, high} of the numbers among `numbers`; low and high are the mean's 95 % interval."""
    x = [v for v in numbers if isinstance(v, int | float) and math.isfinite(v)]
    (low, high), sd = t_interval(x) if x else (math.nan, math.nan), np.std(x, ddof=1) if len(x) > 1 else math.nan
    sd = 0.0 if len(x) > 1 and math.isclose(min(x), max(x), rel_tol=1e-9) else sd  # not what rounding leaves of it
    return {"n": len(x), "mean": float(np.mean(x)) if x else math.nan, "sd": float(sd), "low": low, "high": high}


def summarise(runs, tables):
    """{place: spread over the runs} for every column of the tables."""
    return {path: spread([value(run, path) for run in runs]) for columns in tables.values() for _, path, *_ in columns}


def compare_pairs(variants, metric):
    """Every pair of tested methods in their default variant: differences by shared seed, tests, verdict."""
    tested = {n: {run["seed"]: run for run in runs} for n, runs in variants.items() if n == runs[0]["method"] in TESTED}
    pairs = []
    for a, b in combinations(tested, 2):
        seeds = [seed for seed in tested[a] if seed in tested[b]]
        x, y = ([tested[name][seed] for seed in seeds] for name in (a, b))
        d = np.array([i["metrics"][metric] - j["metrics"][metric] for i, j in zip(x, y, strict=True)], float)
        p_flip, exact = sign_flip(d)
        pairs.append({"a": a, "b": b, "seeds": seeds, "difference": spread(d), "p": paired_t(d), "p_flip": p_flip,
                      "all_flips": exact, "items": None, "mcnemar": None, "better": None})
        if metric == "accuracy" and seeds and all(run.get("correct") is not None for run in x + y):
            bits = [np.array([run["correct"] for run in side]) for side in (x, y)]
            pairs[-1]["items"] = dict(zip(("mean", "low", "high"), item_noise(*bits), strict=True))
            pairs[-1]["mcnemar"] = mcnemar(*bits).tolist()
    for pair, p in zip(pairs, holm([pair["p"] for pair in pairs]).tolist(), strict=True):
        pair["p_holm"], d = p, pair["difference"]
        if underpowered(len(pair["seeds"]), len(pairs)):
            pair["verdict"] = "underpowered" if pair["seeds"] else "no shared seed"
        elif (p < 0.05) != (pair["p_flip"] < 0.05):
            pair["verdict"] = "unclear" + " (same difference in every seed: no t-test)" * math.isnan(p)
        elif p < 0.05:
            pair["better"] = pair["a"] if (d["mean"] > 0) == (metric in MORE_IS_BETTER) else pair["b"]
            pair["verdict"] = f"{METHODS[pair['better']]} better"
        else:
            pair["verdict"] = "no evidence of a difference" + " (equal in every seed)" * (d["sd"] == 0)
    return pairs


def compare_labelled(variants, metric):
    """Each labelled row beside its method's default variant and beside LoRA, by shared seed. Looked at, not tested."""
    rows = {}
    for name, runs in variants.items():
        method = runs[0]["method"]
        for other in dict.fromkeys((method, "lora")) if name != method else ():
            there = {run["seed"]: run["metrics"][metric] for run in variants.get(other, ())}
            rows.setdefault(name, {})[other] = spread([run["metrics"][metric] - there[run["seed"]]
                                                       for run in runs if run["seed"] in there])
    return rows


def cost_groups(runs):
    """Costs of the quiet runs for each device, number of threads and precision; the place with most of them first."""
    places, groups = {}, []
    for run in runs:
        places.setdefault(run["place"], []).append(run)
    for place, found in places.items():
        quiet = by_name(run for run in found if run["quiet"])
        shapes = list(dict.fromkeys(shape for runs in quiet.values() for run in runs for shape in run["inference"]))
        columns = COSTS | {f"Inference, {shape}": [
            (f"{state}, {unit}", f"inference.{shape}.{state}.{what}", 1, form)
            for unit, what, form in (("p50 ms", "latency_ms.p50", ",.2f"), ("samples/s", "samples_per_second", ",.0f"))
            for state in ("base", "merged", "unmerged")] + [
            (f"{state} / base, ms", f"inference.{shape}.ratio.{state}", 1, ".3f") for state in ("merged", "unmerged")]
            for shape in shapes}
        groups.append({"place": "{}, {} threads, {}".format(*place) + ", --checkpointing" * place[3],
                       "runs": len(found), "shapes": shapes,
                       "left_out": len(found) - sum(map(len, quiet.values())), "_quiet": quiet, "_columns": columns,
                       "variants": {name: summarise(runs, columns) for name, runs in quiet.items()}})
    return sorted(groups, key=lambda c: (c["left_out"] - c["runs"], c["place"]))


def learning_rates(runs, metric):
    """{name: candidates with their mean dev score over the seeds that all of them have, the chosen one} from dev runs."""
    search = {}
    for name, found in by_name(runs).items():
        seeds = {lr: {run["seed"] for run in found if run["lr"] == lr} for lr in sorted({run["lr"] for run in found})}
        shared = set.intersection(*seeds.values())
        scores = {lr: float(np.mean([run["metrics"][metric] for run in found
                                     if run["lr"] == lr and run["seed"] in (shared or seeds[lr])])) for lr in seeds}
        search[name] = {"label": found[0]["label"], "adapter": found[0]["method"] not in ("head_only", "full"),
                        "scores": scores, "chosen": (max if metric in MORE_IS_BETTER else min)(scores, key=scores.get),
                        "alike": bool(shared) and (found[0]["method"] == "head_only"
                                                   or len({run["args"]["head_lr"] for run in found}) == 1)}
    return search


def cautions(variants, search):
    """Sentences on what makes a group's comparison less fair than it looks."""
    tested = {name: runs for name, runs in variants.items() if name == runs[0]["method"] in TESTED}
    every = {run["seed"] for runs in tested.values() for run in runs}
    rates = {name: sorted({run["lr"] for run in runs}) for name, runs in variants.items()}
    found = {f"`--{flag}` differs": {name: sorted({str(run["args"][flag]) for run in runs if flag in run["args"]})
                                     for name, runs in tested.items()}
             for flag in ("head_lr", "rank", "alpha", "dropout", "targets", "weight_decay", "warmup", "precision")}
    found["Costs are of different CPUs"] = {
        name: sorted({cpu for run in runs if run["quiet"] and (cpu := run["environment"].get("cpu"))})
        for name, runs in tested.items() if runs[0]["place"][0].startswith("cpu")}
    found["The methods had different learning rates to choose from"] = {
        name: [", ".join(map(str, s["scores"]))] for name, s in search.items() if s["adapter"]}
    found = {words: what for words, what in found.items()  # a method without the flag has nothing to differ in
             if len(set(map(tuple, filter(None, what.values())))) > 1 or any(len(x) > 1 for x in what.values())}
    found |= {
        "Learning rate not the search's choice, or not one": {
            n: x for n, x in rates.items() if x != [search[n]["chosen"] if n in search else x[0]]},
        "Chosen at the edge of the candidates, the best may lie beyond": {
            n: [f"{s['chosen']:g}"] for n, s in search.items() if n in variants and s["chosen"] in (
                min(s["scores"]), max(s["scores"])) and len(s["scores"]) > 1},
        "Candidates with other seeds or another --head_lr than their rivals": {
            n: map("{:g}".format, s["scores"]) for n, s in search.items() if not s["alike"]},
        "No learning-rate search on record": {n: rates[n] for n in tested if n not in search},
        "Missing seeds, so that pairs use the shared ones": {
            n: sorted(lacking) for n, runs in tested.items() if (lacking := every - {run["seed"] for run in runs})}}
    return [f"{words}: " + "; ".join(f"{name} {', '.join(map(str, x))}" for name, x in what.items()) + "."
            for words, what in found.items() if what]


def analyse(runs, metric=None):
    """A dict per group of comparable runs: real data first, demos last, a data set's largest group first."""
    together, groups = {}, []
    for run in runs:
        together.setdefault(run["same"], []).append(run)
    for same, found in sorted(together.items(), key=lambda item: (
            item[0][0] in DEMOS, [*DATASETS, item[0][0]].index(item[0][0]), item[0][0], -len(item[1]), str(item[0]))):
        m = metric if all(metric in run["metrics"] for run in found) else found[0]["metric"]
        scored, search = [r for r in found if not r["dev"]], learning_rates([r for r in found if r["dev"]], m)
        variants = by_name(scored)
        g = {"same": dict(zip(SAME, same, strict=True)), "data": DATASETS.get(same[0], found[0]["data"]),
             "model": found[0]["base"], "metric": m, "subset": any(run["split"].get("subset") for run in found),
             "search": search, "_runs": variants,
             "variants": {name: summarise(runs, QUALITY) | {"seeds": [run["seed"] for run in runs]} | {
                 k: runs[0][k] for k in ("label", "method")} for name, runs in variants.items()},
             "pairs": compare_pairs(variants, m),
             "labelled": compare_labelled(variants, m), "costs": cost_groups(scored), "cautions": cautions(variants, search)}
        for twin in [t["same"] for t in groups if t["same"]["data set"] == same[0] and t["model"] == g["model"]][:1]:
            other = [f"{k} ({str(v)[:8]}, there {str(twin[k])[:8]})" for k, v in g["same"].items() if v != twin[k]]
            g["cautions"].append(f"Not comparable with the first group above because of other {', '.join(other)}.")
        groups.append(g)
    return groups


# ---------------------------------------------------------------------------- from numbers to words, tables and plots


INTRO = """# Results

Written by `python compare.py results/` from the result files beside it; do not edit. Scores: mean ± sd over seeds, 95
% t-interval. Tested are the pairs of the four methods in their default variant, by shared seed, first minus second.
The t-test's p, adjusted by Holm over a group's pairs, decides at 5 %. The sign-flip p stands beside it; where only
one of the two is below 5 % the verdict is *unclear*. *Underpowered*: too few seeds for the sign-flip test to reach 5
% over all pairs. The intervals of pairs are not adjusted. A large p is no evidence of a difference, and no proof that
there is none. Only what beats each of the other methods is bold. *95 % over test rows* is the noise of the test set:
the difference on each row, averaged over seeds. McNemar's test is made for each seed alone and decides nothing. Costs
are means over quiet runs; on a CPU, memory is that of the whole process. In plots a large mark is the mean score over
all seeds with its interval, a small dot a seed (in plots of costs: a quiet run), a grey disc the Pareto front:
nothing beats it in both. Times have no front, they drift; the head alone is left out."""
DEMO = "Generated text, to see everything work. It says nothing about real data."
MANY = f"With more than 16 seeds the sign-flip p is from {FLIPS:,} random flips with a fixed seed."
NOISY = "No run was quiet enough, so there are no costs to compare and no plots of them."
LABELLED = "The labelled rows, by shared seed: looked at, not tested."
SEARCH = "Scores on the dev split, which no other table has. ← marks the choice. Head only: the head's learning rate."
SAME_RATE = """The same records at one learning rate for all, and with each method's own choice. This shows how much
the choice matters. It is no evidence about the methods."""


def num(x, form, scale=1):
    """A number, or a mean with its sd if there is one, for a table."""
    mean, sd = (x["mean"], x["sd"]) if isinstance(x, dict) else (x, 0)
    if mean is None or math.isnan(mean):
        return NONE
    plus = f"{sd * scale:{form}}" if sd > 0 else ""
    return f"{mean * scale:{form}}" + f" ± {plus}" * bool(plus.strip("0."))  # none where it rounds to zero


def span(x, form, scale=1):
    """An interval for a table."""
    if x is None or math.isnan(x["low"]) or x.get("sd") == 0:  # equal numbers do not make it certain
        return NONE
    return f"{x['low'] * scale:{form}} to {x['high'] * scale:{form}}"


def title(g):
    """Data set and model; a subset is marked wherever they are named."""
    s = g["same"]
    rows = f" (subset: {s['train rows']:,} train rows, {s['scored rows']:,} {s['scored split']} rows)"
    return f"{g['data']} with {g['model']}{rows * g['subset']}"


def verdict(g):
    """What is really different, by how much and at what cost: the sentences on top of a group."""
    if not g["pairs"]:
        return ["No pair to test: fewer than two of the four methods ran in their default variant."]
    name, scale, form = METRICS[g["metric"]]
    costs, lines, unit = g["costs"][0]["variants"], [], " points" * (scale == 100)
    for p in (p for p in g["pairs"] if p["better"]):
        good, bad = sorted((p["a"], p["b"]), key=lambda n: n != p["better"])
        low, high = sorted(abs(p["difference"][k]) * scale for k in ("low", "high"))
        ratios = {what: where[good][path]["mean"] / where[bad][path]["mean"] for what, where, path in (
            ("training time", costs, TIME[1]), ("peak memory", costs, PEAK[1]),
            ("trainable parameters", g["variants"], "parameters.trainable")) if good in where and bad in where}
        ratios = {what: ratio for what, ratio in ratios.items() if not math.isnan(ratio)}  # macOS tells no peak
        if max(time := ratios.get("training time", 1), 1 / time) < drift(g["costs"][0])[0]:
            ratios.pop("training time", None)  # it says more of the machine
        ratios = [f"{ratio:.2f} × the {what}" for what, ratio in ratios.items()]
        size = f"{abs(p['difference']['mean']) * scale:{form}}{unit} (95 % interval {low:{form}} to {high:{form}}, "
        lines.append(f"**{METHODS[good]} is better than {METHODS[bad]}** in {name.split(',')[0]}, by {size}adjusted p "
                     f"{p['p_holm']:.2g}, {len(p['seeds'])} seeds). It takes {', '.join(ratios)}.")
        if p["items"] and p["items"]["low"] <= 0 <= p["items"]["high"]:
            lines[-1] += " But the interval over the test rows includes zero: other rows could turn it round."
    need = next(n for n in range(99) if not underpowered(n, len(g["pairs"])))
    for kind, words in (("no evidence", "No evidence of a difference"), ("unclear", "Unclear, the two tests disagree"),
                        ("underpowered", f"Underpowered, no winner below {need} shared seeds"),
                        ("no shared", "No shared seed")):
        found = [f"{METHODS[p['a']]} and {METHODS[p['b']]}" for p in g["pairs"] if p["verdict"].startswith(kind)]
        lines += [f"{words}: {'; '.join(found)}."] if found else []
    for what, (_, path, factor, form) in {"training time, s": TIME, "peak memory in training, MiB": PEAK}.items():
        ranked = sorted((costs[n][path]["mean"] * factor, METHODS[n]) for n in TESTED if n in costs and costs[n][path]["n"])
        if len(ranked) > 1:
            order = ", then ".join(f"{n} {x:{form}}" for x, n in ranked)
            lines.append(f"Least {what} (order of means, not tested): {order}.")
    return lines


def table(g, variants, columns):
    """Rows {header: cell} of a table with the columns (header, place, scale, format) for {name: numbers}."""
    return [{"method": g["variants"][n]["label"], "runs": str(max(v[path]["n"] for _, path, *_ in columns))} | {
        head: num(v[path], form, scale) for head, path, scale, form in columns} for n, v in variants.items()]


def summary(g):
    """The main table: score, size and the main costs."""
    name, scale, form = METRICS[g["metric"]]
    costs, rows = g["costs"][0]["variants"] if g["costs"] else {}, []
    for n, v in g["variants"].items():
        x, others = v[f"metrics.{g['metric']}"], [p["better"] for p in g["pairs"] if n in (p["a"], p["b"])]
        bold = "**" * (set(others) == {n})  # only what beats each of the others
        rows.append({
            "method": v["label"], "seeds": str(x["n"]), name: bold + num(x, form, scale) + bold,
            "95 % interval": span(x, form, scale), "trainable": num(v["parameters.trainable"]["mean"], ",.0f"),
            **{head: num(costs.get(n, {}).get(path), f, factor) for head, path, factor, f in (TIME, PEAK)}})
    return rows


def pair_table(g):
    """Every statistic of every pair."""
    _, scale, form = METRICS[g["metric"]]
    return [{"pair": f"{METHODS[p['a']]} − {METHODS[p['b']]}", "seeds": str(len(p["seeds"])),
             "difference": num(p["difference"]["mean"], "+" + form, scale),
             "95 % interval": span(p["difference"], "+" + form, scale), "p, t-test": num(p["p"], ".2g"),
             "p, Holm": num(p["p_holm"], ".2g"), "p, sign flips": num(p["p_flip"], ".2g"),
             "95 % over test rows": span(p["items"], "+.2f", 100),
             "McNemar p < 0.05": f"{sum(x < 0.05 for x in p['mcnemar'])} of {len(p['seeds'])}" if p["items"] else NONE,
             "verdict": p["verdict"]} for p in g["pairs"]]


def labelled_table(g):
    """The labelled rows' differences, where there are any."""
    _, scale, form = METRICS[g["metric"]]
    rows = []
    for name, beside in g["labelled"].items():
        v, (*own, lora) = g["variants"][name], beside.values()  # a LoRA row has LoRA alone beside it
        own = own[0] if own else spread([])
        rows.append({"row": v["label"], "seeds": str(max(own["n"], lora["n"])),
                     "minus its method": num(own["mean"], "+" + form, scale), "95 %": span(own, "+" + form, scale),
                     "minus LoRA": num(lora["mean"], "+" + form, scale), "95 % of that": span(lora, "+" + form, scale)})
    return rows


def drift(costs):
    """How far the machine itself changed its speed between the runs whose costs are compared: (the factor, in words)."""
    shape = costs["shapes"][-1] if costs["shapes"] else None
    base = [v[f"inference.{shape}.base.latency_ms.p50"]["mean"] for v in costs["variants"].values()] if shape else []
    base = [ms for ms in base if not math.isnan(ms)]
    if len(base) < 2:
        return 1.0, ""
    return max(base) / min(base), (
        f"The same base model took {min(base):,.0f} to {max(base):,.0f} ms for the same {shape} in these rows: the machine's "
        f"doing, not a method's. Times of two rows within {100 * (max(base) / min(base) - 1):.0f} % may not differ at all. "
        "Within a row, base, merged and unmerged took turns.")


def search_tables(g):
    """All candidates of the learning-rate search, and from the same records the methods at one rate for all."""
    _, scale, form = METRICS[g["metric"]]
    search, tested = g["search"], [n for n in g["search"] if n in TESTED]
    rates = sorted({lr for s in search.values() for lr in s["scores"]})
    every = [{"method": s["label"]} | {str(lr): num(s["scores"].get(lr), form, scale) + " ←" * (lr == s["chosen"])
                                       for lr in rates} for s in search.values()]
    at = {f"{lr} for all": [lr] * 4 for lr in rates if all(lr in search[n]["scores"] for n in tested)}
    at["each its choice"] = [search[n]["chosen"] for n in tested]
    same = []
    for words, chosen in at.items() if len(tested) > 1 else ():
        first, *others = [search[n]["scores"][lr] for n, lr in zip(tested, chosen, strict=False)]
        same.append({"learning rate": words} | {
            f"{METHODS[n]} − {METHODS[tested[0]]}": num(x - first, "+" + form, scale)
            for n, x in zip(tested[1:], others, strict=True)})
    return every, same


def render(blocks, plain=False):
    """Blocks as Markdown, or plain for the terminal: a string is prose, a tuple a list, a list of dicts a table."""
    out = []
    for block in filter(None, blocks):
        if isinstance(block, list):
            heads = [h for h in block[0] if any(row[h] != NONE for row in block)]  # columns without any entry go
            wide = {h: max(len(h), *(len(row[h]) for row in block)) for h in heads}
            side = {h: "<" if h in ("method", "pair", "row", "verdict") else ">" for h in heads}
            lines = [[f"{row[h]:{side[h]}{wide[h]}}" for h in heads] for row in [{h: h for h in heads}, *block]]
            lines.insert(1, ["-" * (wide[h] - 1) + ("-" if plain or side[h] == "<" else ":") for h in heads])
            block = "\n".join("  ".join(line).rstrip() if plain else f"| {' | '.join(line)} |" for line in lines)
        elif isinstance(block, tuple):
            block = "\n".join(f"- {line}" for line in block)
        out.append(block.replace("**", "") if plain else block)
    return "\n\n".join(out) + "\n"


def page(g, plots):
    """A group's part of the results page, as blocks."""
    s, (search, same_rate) = g["same"], search_tables(g)
    settings = [f"{k} {f'{v:,}' if isinstance(v, int) else str(v)[:12 if len(str(v)) == 64 else None]}"  # a hash's start
                for k, v in s.items() if v is not None]
    blocks = [f"## {title(g)}", DEMO * (s["data set"] in DEMOS), ", ".join(settings) + "."]
    if g["variants"]:
        blocks += [summary(g), "### Verdict", (*verdict(g), *g["cautions"]), "### Pairs" * bool(g["pairs"]),
                   pair_table(g), MANY * any(not p["all_flips"] for p in g["pairs"])]
        blocks += [LABELLED, labelled_table(g)] if g["labelled"] else []
        for head, columns in QUALITY.items():
            blocks += [f"### {head}", table(g, g["variants"], columns)]
    for c in g["costs"]:
        if c is not g["costs"][0] and c["left_out"] > c["runs"] / 2:
            blocks += [f"Not shown: costs on {c['place']}, where {c['left_out']} of {c['runs']} runs were not quiet."]
            continue
        shared = f"{c['left_out']} of {c['runs']} runs left out: not quiet, by their load average or --quality_only."
        blocks += [f"### Cost: {c['place']}", shared * (c["left_out"] > 0), NOISY * (not c["variants"]), drift(c)[1]]
        for head, columns in c["_columns"].items() if c["variants"] else ():
            blocks += [f"**{head}**", table(g, c["variants"], columns)]
    blocks += ["### Plots" * bool(plots), *(f"![{title(g)}: {g['metric']}, {words}]({file})" for file, words in plots)]
    blocks += ["### Learning-rate search", SEARCH, search] if search else []
    return blocks + ([SAME_RATE, same_rate] if same_rate else [])


def excerpts(g, words):
    """The parts of a group that other pages show, by the name of the place between whose marks they go."""
    costs = g["costs"][0] if g["costs"] else {"variants": {}}
    tables = [block for head, columns in costs["_columns"].items() for block in (
        f"{head}:", table(g, costs["variants"], columns))] if costs["variants"] else []
    every, same_rate = search_tables(g)
    labelled = [LABELLED, labelled_table(g)] if g["labelled"] else []
    return {"results": [summary(g), words] if g["variants"] else [], "pairs": [pair_table(g), *labelled] if g["pairs"] else [],
            "costs": [f"Means of the quiet runs on {costs['place']}. {drift(costs)[1]}", *tables] if tables else [],
            "search": [every, same_rate] if every else []}


def plot(g, kind, path):
    """One PNG, score against a cost: a dot for each seed, the mean with its interval, the Pareto front.

    False, and no file, where there is nothing to draw."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
    name, scale, _ = METRICS[g["metric"]]
    more, c = g["metric"] in MORE_IS_BETTER, g["costs"][0]
    shape = c["shapes"][-1] if c["shapes"] else ""
    words, where, factor = {
        "parameters": ("trainable parameters (equal ones side by side)", "parameters.trainable", 1),
        "speed": (f"samples/s, not merged, {shape}", f"inference.{shape}.unmerged.samples_per_second", 1),
        "training time": ("training time, s", *TIME[1:3]), "memory": ("peak memory in training, MiB", *PEAK[1:3])}[kind]
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes, drawn, points = figure.subplots(), [], []
    variants = {n: v for n, v in g["variants"].items() if v["parameters.adapter"]["mean"]}  # without the head alone
    sizes = [max(v["parameters.trainable"]["mean"], 1) for v in variants.values()]
    wide = max(math.log(max(sizes, default=1) / min(sizes, default=1)), 1)
    for i, (n, v) in enumerate(variants.items()):
        runs = g["_runs"][n] if kind == "parameters" else c["_quiet"].get(n, [])
        costs = [(value(run, where) or value(run, where.replace("unmerged", "base")), run) for run in runs]
        measured = [(cost, run) for cost, run in costs if cost is not None]  # --quality_only leaves inference out
        if not measured:
            continue
        x, runs = np.array([cost for cost, _ in measured]) * factor, [run for _, run in measured]
        y = {k: number * scale for k, number in v[f"metrics.{g['metric']}"].items()}
        points.append((x.mean() * (-1 if kind == "speed" else 1), y["mean"] * (1 if more else -1)))
        if kind == "parameters":  # side by side, or variants of one size would hide each other
            x = x * math.exp(wide / 70 * (sizes[:i].count(sizes[i]) - (sizes.count(sizes[i]) - 1) / 2))
        drawn.append((x.mean(), y["mean"]))
        colour = COLOURS[[*METHODS, v["method"]].index(v["method"])]
        look = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "ls": ""}
        axes.errorbar(*drawn[-1], y["high"] - y["mean"], fmt="none", ecolor=colour, elinewidth=1, capsize=4)
        axes.plot(*drawn[-1], ms=9, mew=1.5, mfc="none", label=v["label"], **look)
        axes.plot(x, [run["metrics"][g["metric"]] * scale for run in runs], ms=3, alpha=0.7, **look)
    if not drawn:
        return False
    if kind in ("parameters", "memory"):
        front = np.transpose([drawn[i] for i in pareto(points)])
        axes.plot(*front, "--o", color="0.8", ms=18, zorder=0, label="Pareto front")
    if kind == "parameters":
        axes.set(xscale="log", xlim=(min(sizes) * math.exp(-wide / 6), max(sizes) * math.exp(wide / 6)))
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5) if wide < 5 else (1,)), major_formatter=EngFormatter(),
                       minor_locator=NullLocator())
    axes.set(xlabel=words, ylabel=name + " (less is better)" * (not more))
    quiet = f"\nquiet runs on {c['place']}" * (kind != "parameters")
    times, told = drift(c)
    if kind in ("speed", "training time") and told:
        quiet += f"; two within {100 * (times - 1):.0f} % may not differ"
    figure.suptitle(title(g) + quiet, fontsize=10, x=0.01, ha="left")
    figure.legend(loc="outside right center", markerscale=0.7, fontsize=9)
    figure.savefig(path, metadata={"Software": None})  # the same bytes whatever wrote them
    return True


def clean(x):
    """Numbers and words for JSON: no runs, null for nan."""
    if isinstance(x, dict):
        return {k: clean(v) for k, v in x.items() if not str(k).startswith("_")}
    return [clean(v) for v in x] if isinstance(x, list) else None if x != x else x


def main(argv=None):
    """Read, analyse, write the page, print the short tables."""
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = fail, parser.add_argument
    add("paths", nargs="+", help="folders (their *.json, not deeper) or files; the page goes into the first folder")
    add("--json", action="store_true", help="print all numbers as JSON and write nothing")
    add("--metric", choices=METRICS, help="what to test (default: accuracy or perplexity; groups without it keep that)")
    add("--price", type=float, help="price of an accelerator hour: adds what a run costs")
    add("--readme", type=Path, nargs="+", default=[], metavar="FILE", help="also renew the main table that stands between "
        "<!-- results --> and <!-- /results --> in these files, and likewise pairs, costs and search")
    add("--no_plots", action="store_true", help="write the page without plots")
    args = parser.parse_args(argv)
    texts = {file: file.read_text("utf-8") if file.is_file() else "" for file in args.readme}
    for file, text in texts.items():
        if not SECTION.search(text):
            fail(f"{file} has no <!-- results --> with <!-- /results --> after it")
    runs, skipped = load(args.paths)
    known = [m for m in METRICS if any(m in run["metrics"] for run in runs)]
    if args.metric not in [None, *known]:
        fail(f"--metric {args.metric}: no result has it; they have {', '.join(known)}")
    for run in runs if args.price else ():
        run["time"]["cost"] = args.price * (value(run, "time.accelerator_hours") or math.nan)
    groups = analyse(runs, args.metric)
    if args.json:
        print(json.dumps({"groups": clean(groups), "skipped": skipped}, indent=1))
        return

    price = f" --price {args.price:g}" if args.price else ""
    home, stems, blocks, short = Path(args.paths[0]), [], [INTRO.replace("results/`", f"results/{price}`")], []
    sections = {name: [] for name in ("results", "pairs", "costs", "search")}
    home = home if home.is_dir() else home.parent
    for g in groups:
        stems.append(re.sub(r"[^\w.-]+", "-", f"{g['data']}-{g['model']}".lower()))
        stem, plots = stems[-1] + f"-{stems.count(stems[-1])}" * (stems[-1] in stems[:-1]), []
        for kind in ("parameters", "speed", "training time", "memory") if g["variants"] and not args.no_plots else ():
            file = f"{stem}-{kind.split()[-1]}.png"
            plots += [(file, kind)] if plot(g, kind, home / file) else []
        blocks += page(g, plots)
        words = (*verdict(g), *g["cautions"]) if g["variants"] else ()
        pairs = [{h: x for h, x in row.items() if not re.search("test|McNemar", h)} for row in pair_table(g)]
        short += [f"== {title(g)}", summary(g), pairs, search_tables(g)[0], words or tuple(g["cautions"])]
        for name, part in excerpts(g, words).items() if g["same"]["data set"] not in DEMOS else ():
            sections[name] += [f"**{title(g)}**", *part] * any(part)
    commits = [f"{str(value(run, 'environment.commit'))[:12]}{' (changed)' * bool(value(run, 'environment.dirty'))}"
               for run in runs]
    blocks += ["## Notes", (*(f"Code at commit {c}: {commits.count(c)} runs" for c in sorted(set(commits))),
                            *(f"Skipped `{s['file']}`: {s['reason']}" for s in skipped))]
    (home / "README.md").write_text(render(blocks), "utf-8", newline="\n")
    for file, text in texts.items():
        filled = SECTION.sub(lambda found: f"{found[1]}\n\n{render(sections[found[2]] or ['Nothing on real data yet.'])}\n"
                             f"{found[3]}", text)
        file.write_text(filled, "utf-8", newline="\n")
    print(render([*short, f"All tables{' and plots' * (not args.no_plots)}: {home / 'README.md'}"], plain=True), end="")


if __name__ == "__main__":
    main()
