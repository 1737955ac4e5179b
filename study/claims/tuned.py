"""Runs on WikiText-2 of the claims that need training: tuned, gathered and compared.

    python -m study.claims.tuned FOLDER              gather its runs into results/tuned.json
    python -m study.claims.tuned --around FILE...    print the best learning rate, half and twice it

All of them share the base, the data and the steps, so that LoRA at rank 8 is trained once for all
claims. A pilot with a seed of its own fixes three learning rates for each way of training; then
the one with the best dev loss counts, seed by seed, with its test loss.
"""

import json
import math
import sys
from pathlib import Path

from safetensors.torch import load_file

from study.claims.shared import COLORS, RESULTS, decided, interval, load, picture, save

LEARNING_RATES, MARGIN = 3, 2  # tried by each seed; percent of perplexity that count as equal


def read_results(paths):
    """The finished runs among these result files, each with its "path"."""
    results = [json.loads(path.read_text()) | {"path": path} for path in sorted(paths)]
    return [result for result in results if "time" in result]


def best(results, split):
    """The run with the lowest loss on "dev" or "test"."""
    return min(results, key=lambda result: result["metrics"][split]["loss"])


def weights_left(path):
    """How many numbers of the adapter beside a result file are not zero; a head does not count."""
    tensors = load_file(path.with_suffix("") / "adapter_model.safetensors")
    adapters = [tensor for name, tensor in tensors.items() if "lora_" in name or "hira_" in name]
    return sum(int(tensor.count_nonzero()) for tensor in adapters)


def gather(folder):
    """Rows of the tuned runs in a folder: {name, seed, lr, edge, loss, weights}.

    edge: the best learning rate is the lowest or the highest tried. Seeds that have not run all
    their learning rates are left out.
    """
    groups, rows = {}, []
    for result in read_results(folder.glob("*.json")):
        groups.setdefault((result["name"], result["seed"]), []).append(result)
    for (name, seed), results in sorted(groups.items()):
        if len(results) < LEARNING_RATES:
            continue
        result, lrs = best(results, "dev"), [result["lr"] for result in results]
        row = {"name": name, "seed": seed, "lr": result["lr"]}
        row |= {"edge": result["lr"] in (min(lrs), max(lrs))}
        row |= {"loss": result["metrics"]["test"]["loss"], "weights": weights_left(result["path"])}
        rows.append(row)
    return rows


def tuned_rows(names):
    """The gathered rows of these ways of training; [] before they have run."""
    if not (RESULTS / "tuned.json").exists():
        return []
    return [row for row in load("tuned")["rows"] if row["name"] in names]


def difference(rows, name, other):
    """By how many percent one's perplexity is above the other's: ([mean, low, high], seeds).

    A 95 % interval over the seeds that both have run; (None, 0) where there are none.
    """
    a, b = ({row["seed"]: row["loss"] for row in rows if row["name"] == n} for n in (name, other))
    percents = [100 * math.expm1(a[seed] - b[seed]) for seed in sorted(a.keys() & b.keys())]
    return (interval(percents) if percents else None), len(percents)


def mean_weights(rows, name):
    """The mean number of weights that are left, over seeds; nan without runs."""
    weights = [row["weights"] for row in rows if row["name"] == name]
    return sum(weights) / len(weights) if weights else math.nan


def draw_differences(picture_name, title, labels, other):
    """The perplexity of each way of training relative to `other`; labels: {name: text}."""
    rows = tuned_rows(labels)
    names = [name for name in labels if difference(rows, name, other)[0]]
    if len(names) < 2:
        return
    note = f"WikiText-2, relative to {labels[other]}. Left is better. Bars: 95 % over seeds."
    with picture(picture_name, title, note, 0.9 + 0.5 * len(names)) as (_, axes):
        for y, name in enumerate(names):
            mean, low, high = difference(rows, name, other)[0]
            axes.plot([low, high], [y, y], color=COLORS["lora"], lw=2)
            axes.plot(mean, y, "o", color=COLORS["lora"])
        texts = [f"{labels[name]}\n{mean_weights(rows, name):,.0f} weights" for name in names]
        axes.set_yticks(range(len(names)), texts)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.axvline(0, color=COLORS["lora"], lw=0.8, ls=":")
        axes.set_xlabel(f"perplexity relative to {labels[other]}, %")
        axes.grid(axis="x")


def verdict(percents, seeds):
    """ "worse", "better", "equal within 2 %" or undecided for a difference in perplexity."""
    if seeds <= 3:
        return "no verdict from three seeds or fewer"
    if decided(percents, "worse", "better") in ("worse", "better"):
        return decided(percents, "worse", "better")
    inside = -MARGIN < percents[1] and percents[2] < MARGIN
    return f"equal within {MARGIN} %" if inside else "undecided"


def cautions(rows):
    """A sentence on the ways of training whose grid of learning rates may be too narrow, or ""."""
    narrow = []
    for name in dict.fromkeys(row["name"] for row in rows):
        edges = [row["edge"] for row in rows if row["name"] == name]
        if sum(edges) > len(edges) / 3:
            narrow.append(f"{name} ({sum(edges)} of {len(edges)} seeds)")
    words = "The learning-rate grid may be too narrow; the best value is its lowest or highest for "
    return f"\n\n{words}{', '.join(narrow)}." if narrow else ""


def main(words):
    """Print three learning rates, or gather a folder."""
    if words[0] == "--around":
        middle = best(read_results(map(Path, words[1:])), "dev")["lr"]
        print(*(f"{middle * factor:g}" for factor in (0.5, 1, 2)))
    else:
        save("tuned", {"rows": gather(Path(words[0]))})


if __name__ == "__main__":
    main(sys.argv[1:])
