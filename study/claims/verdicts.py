"""What results/*.json say, as Markdown: a function for each mark of docs/claims.md."""

import math
from pathlib import Path

from study.claims.shared import RESULTS, interval, load, mean, span, table

WAITS = "*Not measured yet: see [run.sh](../study/claims/run.sh).*"
BOTH = ("lora", "hira")
CHOICES = ("exact", "sample", "svd", "chance")


def decided(difference, above, below):
    """`above` or `below` for a difference [mean, low, high] beyond zero, else that it is open."""
    low, high = difference[1:]
    return above if low > 0 else below if high < 0 else "this does not decide"


def expressive():
    numbers, lines = load("expressive"), []
    rows = [[name, *(f"{made[m]:.2f}" for m in BOTH)] for name, made in numbers["made"].items()]
    for dataset, word, key, sign, unit in (
        ("sst2", "SST-2", "accuracy", 100, "points of dev accuracy"),
        ("wikitext2", "WikiText-2", "mlm_perplexity", -1, "of dev perplexity (minus: worse)"),
    ):
        runs = [run for run in numbers["runs"] if run["dataset"] == dataset]
        if not runs:
            continue
        parts = [[e for run in runs for e in run["energy"][f"{m} 8"].values()] for m in BOTH]
        cells = [f"{mean(part):.2f} ({min(part):.2f} to {max(part):.2f})" for part in parts]
        rows.append([f"real, {word}: mean and range of {len(parts[0])} matrices", *cells])
        whole = [run["whole"][key] for run in runs]
        change = {}
        for way in ("lora 8", "hira 8", "none"):
            scores = [run["none"] if way == "none" else run["dev"][way] for run in runs]
            pairs = zip(scores, whole, strict=True)
            change[way] = [sign * (score[key] - best) for score, best in pairs]
        pairs = zip(change["lora 8"], change["hira 8"], strict=True)
        ahead = interval([a - b for a, b in pairs])
        words = decided(
            ahead, "LoRA can express this change, HiRA less", "HiRA expresses it better"
        )
        lora, hira, none = (span(interval(values)) for values in change.values())
        lines.append(
            f"- **{word}: {words}.** Against the whole change, LoRA's rank 8 scores {lora} {unit}, "
            f"HiRA's {hira}, no change at all {none}; LoRA minus HiRA: {span(ahead)} "
            f"(seeds: {len(runs)})."
        )
    return "\n".join([table(["energy captured at rank 8", "LoRA", "HiRA"], rows), "", *lines])


def idle_rank():
    if not (RESULTS / "idle_rank.json").exists():
        return WAITS
    lines = []
    for method, name, ranks in (("hira", "HiRA", (1, 4, 8, 16, 64)), ("lora", "LoRA", (1, 4))):
        runs = [run for run in load("idle_rank")["runs"] if run["method"] == method]
        for rank in map(str, ranks):
            pairs = [(run["dev"][rank], run["dev"]["whole"]) for run in runs]
            lost = interval([100 * (cut["accuracy"] - all_["accuracy"]) for cut, all_ in pairs])
            kept = f"{100 * mean(run['energy'][rank] for run in runs):.0f}"
            lines.append([name, rank, kept, span(lost), len(runs)])
    head = ["update", "cut to rank", "energy left, %", "change of dev accuracy, points", "seeds"]
    return table(head, lines)


def formats():
    rows, cells, lines = load("formats")["rows"], [], []
    for row in (row for row in rows if not row["double"] and not row["shift"]):
        versus = span(row["% more than NF4"]) if "% more than NF4" in row else "–"
        errors = [f"{mean(row[f'{kind} error, %']):.1f}" for kind in ("weight", "output")]
        more = span(row["perplexity, % more"])
        cells.append([row["format"], row["size"], f"{row['bits']:.2f}", *errors, more, versus])
    head = ["format", "block", "bits", "error of weights, %", "of outputs, %"]
    head += ["perplexity above fp32, %", "above NF4, %"]
    for row in (row for row in rows if not row["double"] and row["size"] == 64):
        if "% more than NF4" in row and not row["shift"]:
            word = decided(row["% more than NF4"], "NF4 is better", "NF4 is worse")
            lines.append(f"{row['format']} {span(row['% more than NF4'])} %: {word}")
    double = [row["% more than single"] for row in rows if row["double"]]
    low, high = min(low for _, low, _ in double), max(high for *_, high in double)
    return (
        f"{table(head, cells)}\n\nPerplexity above NF4's, blocks of 64: {'; '.join(lines)}.\n"
        f"**Double quantization** changes the perplexity by {low:+.2f} to {high:+.2f} % "
        f"(widest ends of {len(double)} intervals) and saves 0.37 bits a weight in blocks of 64."
    )


def memory():
    rows, lines, verdicts = load("memory")["rows"], [], []
    ways = sorted({(row["recomputed"], row["tokens"]) for row in rows})
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = {(row["recomputed"], row["tokens"]): row for row in rows if row["shape"] == shape}
        saved = [1 - own[way]["qlora GiB"] / own[way]["lora GiB"] for way in ways]
        lines.append([shape, *(f"{100 * part:.0f}" for part in saved)])
    for tokens in sorted({row["tokens"] for row in rows}):
        sizes = []
        for again in (False, True):
            part = [r for r in rows if (r["recomputed"], r["tokens"]) == (again, tokens)]
            enough = [row["shape"] for row in part if row["qlora GiB"] < 0.75 * row["lora GiB"]]
            sizes.append(enough[0] if enough else "no size here")
        verdicts.append(f"with {tokens:,} tokens a batch {sizes[0]} ({sizes[1]} if recomputed)")
    head = ["saved, %", *(f"{tokens:,} tokens{', recomputed' * again}" for again, tokens in ways)]
    return (
        f"{table(head, lines)}\n\n**From which size does QLoRA save a quarter or more?** "
        f"{'; '.join(verdicts)}."
    )


def channels():
    lines = []
    for dataset, word in (("sst2", "SST-2"), ("wikitext2", "WikiText-2")):
        shares = load("channels")["shares"][dataset]
        best, *others = ([mean(block) for block in shares[way]] for way in CHOICES)
        parts = [100 * mean(a / b for a, b in zip(way, best, strict=True)) for way in others]
        lines.append([word, f"{100 * min(best):.0f} to {100 * max(best):.0f}"])
        lines[-1] += [f"{part:.0f}" for part in parts]
    head = ["", "best choice, % of all energy", "our sample, % of the best", "rank-8 SVD", "chance"]
    return table(head, lines)


def step_times():
    if not (RESULTS / "step_times.json").exists():
        return WAITS
    rows = load("step_times")["rows"]
    cells = [[f"{r['width']:,}", r["way"], f"{r['flops']:.2f}"] for r in rows]
    cells = [[*c, span(r["time"], "{:.2f}")] for c, r in zip(cells, rows, strict=True)]
    own = [row for row in rows if row["way"] == "contextual_lora" and row["time"][2] < 1]
    pays = f"from width {own[0]['width']:,} on" if own else "at no width here"
    head = ["width", "method", "operations, LoRA = 1", "time (quartiles), LoRA = 1"]
    return f"{table(head, cells)}\n\n**Contextual LoRA's steps are shorter than LoRA's {pays}.**"


def learning_rates():
    rows = load("learning_rates")["rows"]
    rows = {(r["dataset"], Path(r["model"]).name, r["method"], r["rank"]): r for r in rows}
    lines, names = [], {"lora": "LoRA", "hira": "HiRA", "full": "full", "qlora": "QLoRA"}
    for (dataset, base, method, rank), row in rows.items():
        others = [("full", None)] if (method, rank) == ("lora", 8) else []
        others += [("lora", 8)] if method == "hira" and rank == 8 else []
        others += [(method, 8)] if rank not in (8, None) else []
        for other in (rows.get((dataset, base, *key)) for key in others):
            if other:
                pairs = zip(row["log2 best lr"], other["log2 best lr"], strict=False)
                ratio = [2**x for x in interval([a - b for a, b in pairs])]
                guess = f"{other['step'] / row['step']:.1f}" if "step" in row else "–"
                to = f"{names[other['method']]}{' 8' * (other['method'] == method)}"
                name = f"{names[method]}{f' {rank}' * (rank != 8)} / {to}, {dataset}, {base}"
                lines.append([name, span(ratio, "{:.1f}"), guess])
    points = [r for r in rows.values() if r["dataset"] == "sst2"]
    x, y = (
        [math.log(value) for value in values]
        for values in ([r["step"] for r in points], [r["best lr"][0] for r in points])
    )
    slope = mean((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y, strict=True))
    slope /= mean((a - mean(x)) ** 2 for a in x)
    head = ["best learning rates", "ratio (95 % over seeds)", "ratio if all steps were equally far"]
    return (
        f"{table(head, lines)}\n\nOver the {len(points)} methods and ranks on SST-2 the best "
        f"learning rate falls with the step's size to the power {-slope:.2f}; it would be 1 if "
        "the size of a step were all that counts."
    )
