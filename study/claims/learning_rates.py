"""Claim 4. Rules of thumb for the learning rate, from the study's runs, and one way to predict it.

    python -m study.claims.learning_rates          a minute

The best learning rate of a seed is the one with the best dev score. A method's best one is the
geometric mean over its seeds. The prediction: what differs between methods is how far one step
moves the weights. AdamW moves every trained number by about the learning rate; the RMS of the
change of W after one step, divided by the learning rate, is counted on a real batch.
"""

import json
import math
from pathlib import Path

from study.claims.first_step import SCRIPTS, first_step
from study.claims.shared import COLORS, INK, interval, load, picture, save

STUDY = Path(__file__).parents[1]
LABELS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA", "hira": "HiRA"}
LABELS |= {"sparse_lora": "pruned", "contextual_lora": "contextual"}
KEPT = (
    "dataset",
    "model",
    "train_samples",
    "heldout",
    "head_lr",
    "precision",
    "max_length",
    "batch_size",
)


def tuned():
    """One row per (data set, base, method, rank) of the committed runs without other changes."""
    groups = {}
    for path in [*STUDY.glob("*.jsonl"), *STUDY.glob("variants/*.jsonl")]:
        for line in path.read_text().splitlines():
            run = json.loads(line)
            settings, method = run["settings"], run["method"]
            rank = settings.get("rank")
            plain = run["name"] in (method, f"{method}-rank{rank}") and method in SCRIPTS
            if not plain or run["untrained"] or run["diverged"]:
                continue
            key = (run["dataset"], run["model"], method, rank)
            group = groups.setdefault(key, {"settings": settings, "seeds": {}})
            loss = run["metrics"]["dev"]
            value = loss["accuracy"] if "accuracy" in loss else -loss["loss"]
            group["seeds"].setdefault(run["seed"], {})[run["lr"]] = value
    rows = []
    for key, group in sorted(groups.items(), key=str):
        best = [max(dev, key=dev.get) for _, dev in sorted(group["seeds"].items())]
        grid = sorted({lr for dev in group["seeds"].values() for lr in dev})
        row = dict(zip(("dataset", "model", "method", "rank"), key, strict=True))
        row["log2 best lr"] = [math.log2(lr) for lr in best]
        row["best lr"] = [2**x for x in interval(row["log2 best lr"])]
        row["at the edge"] = sum(lr in (grid[0], grid[-1]) for lr in best) / len(best)
        rows.append(row | {"settings": {k: v for k, v in group["settings"].items() if k in KEPT}})
    return rows


def measure():
    rows = tuned()
    for row in rows:
        if Path(row["model"]).is_dir():
            row["step"] = first_step(row)
        print(
            row["dataset"], row["method"], row["rank"], row["best lr"], row.get("step"), flush=True
        )
    save("learning_rates", {"rows": rows})


def draw():
    """Best learning rate over the size of a step, and over the rank, on SST-2."""
    rows = [row for row in load("learning_rates")["rows"] if row["dataset"] == "sst2"]
    title = "A method with smaller steps wants a higher learning rate, but not in proportion"
    note = "Tuned on SST-2; bars: 95 % over seeds. Dashed: every method moves W as far as LoRA."
    with picture("learning_rates", title, note, 3.9, (1, 2), width=9.4) as (_, (left, right)):
        [start] = [row for row in rows if (row["method"], row["rank"]) == ("lora", 8)]
        for row in (*(row for row in rows if row is not start), start):  # LoRA on top
            mean, *ends = row["best lr"]
            color, label = COLORS[row["method"]], LABELS[row["method"]]
            left.plot([row["step"]] * 2, ends, color=color, lw=1, alpha=0.6)
            left.plot(row["step"], mean, "o", color=color, ms=6)
            if row["method"] in ("full", "lora", "hira"):
                spot = {"textcoords": "offset points", "color": color}
                if row["rank"] in (8, None):
                    label += " and its variants" * (row is start)
                    left.annotate(label, (row["step"], mean), (8 * (row is start), 13), **spot)
                if row["rank"]:
                    left.annotate(f"r={row['rank']}", (row["step"], mean), (5, -13), size=8, **spot)
        ends = [end(row["step"] for row in rows) for end in (min, max)]
        line = [start["best lr"][0] * start["step"] / x for x in ends]
        left.plot(ends, line, "--", color=INK, lw=1)
        left.set_xlim(ends[0] / 1.5, ends[1] * 3)
        left.set_xlabel("RMS change of W after one step, per unit of learning rate")
        for method, power in (("lora", 0.5), ("hira", -0.5)):
            part = [row for row in rows if row["method"] == method]
            part.sort(key=lambda row: row["rank"])
            means, ranks = [row["best lr"][0] for row in part], [row["rank"] for row in part]
            bars = [[abs(row["best lr"][i] - row["best lr"][0]) for row in part] for i in (1, 2)]
            label = {"lora": "LoRA, α/r", "hira": "HiRA, no 1/r"}[method]
            right.errorbar(ranks, means, bars, fmt="o-", color=COLORS[method], label=label)
            same = [means[1] * (rank / 8) ** power for rank in ranks]
            right.plot(ranks, same, "--", color=COLORS[method], lw=1)
        right.plot([], [], "--", color=INK, label="as far a step as at rank 8")
        right.set_xscale("log", base=2)
        right.set_xticks(ranks, ranks)
        right.set_xlabel("rank")
        right.legend(fontsize=8)
        left.set_xscale("log")
        for axes in (left, right):
            axes.set_yscale("log")
            axes.set_ylabel("best learning rate")
            axes.grid(axis="y")


if __name__ == "__main__":
    measure()
