"""What the results about HiRA and learning rates say, as Markdown: a function for a mark."""

import math
from pathlib import Path

from study.claims.shared import RESULTS, WAITS, decided, interval, load, mean, span, table

BOTH = ("lora", "hira")
RATIOS = ("LoRA / full", "HiRA / LoRA")


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
        words = words if len(runs) > 1 else "one seed, so no verdict yet"
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
    image = "![Dev accuracy over the rank that is left](../study/claims/results/idle_rank.png)"
    head = ["update", "cut to rank", "energy left, %", "change of dev accuracy, points", "seeds"]
    return f"{image}\n\n{table(head, lines)}"


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
    head = [
        "best learning rates",
        "ratio (95 % over seeds)",
        "ratio if one step moved W equally far",
    ]
    full, hira = (next(line for line in lines if line[0].startswith(f"{n}, sst2")) for n in RATIOS)
    points = [row for row in rows.values() if row["dataset"] == "sst2"]
    x = [math.log(row["step"]) for row in points]
    y = [math.log(row["best lr"][0]) for row in points]
    slope = mean((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y, strict=True))
    slope /= mean((a - mean(x)) ** 2 for a in x)
    return (
        f"{table(head, lines)}\n\n**On SST-2 LoRA wants {full[1]} times the learning rate of full "
        f"fine-tuning, and HiRA {hira[1]} times LoRA's.** If the size of a step were all that "
        f"counts, these would be {full[2]} and {hira[2]}. Over the {len(points)} methods and ranks "
        "the best learning rate falls with the step's size to the power "
        f"{-slope:.2f}. If the size of a step explained everything, this power would be 1. So it "
        "explains which learning rates are higher, and not by how much."
    )
