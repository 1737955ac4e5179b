"""Claim 1b. Is HiRA's high rank used? Cut a trained update to a low rank and score it again.

    python -m study.claims.idle_rank FOLDER...     of adapters on SST-2; seconds for each

If the best matrix of rank r does the work of HiRA's whole update, the rest of its rank was idle.
"""

import json
import sys
from pathlib import Path

import torch

import hira
import lora
from harness import models
from harness.store import load_adapter
from study.claims.expressive import score
from study.claims.projection import best_lora
from study.claims.shared import COLORS, RESULTS, SST2, load, picture, prepare, save, set_weights

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)


@torch.no_grad()
def cut(folder):
    """Dev scores of an adapter whose update is cut to each rank, and its singular values."""
    record = json.loads(folder.with_suffix(folder.suffix + ".json").read_text())
    script = {"lora": lora, "hira": hira}[record["method"]]
    run, data, base = prepare(script, [*SST2, "--eval_only", folder], record["seed"])
    method = script.adapt(run, base)
    load_adapter(run, base, method)
    layers = models.stand_ins(base.model)
    W0 = {f"{name}.base": models.weight_of(layer.base).clone() for name, layer in layers.items()}
    updates = {f"{name}.base": layer.merged_weight() for name, layer in layers.items()}
    updates = {name: merged - W0[name] for name, merged in updates.items()}
    for layer in layers.values():
        layer.B.zero_()  # from here on the update is in the base's weight
    result = {"method": record["method"], "lr": record["lr"], "seed": record["seed"], "dev": {}}
    for rank in (0, *RANKS, "whole"):
        weights = {
            name: W0[name] + (update if rank == "whole" else best_lora(update, rank))
            for name, update in updates.items()
        }
        set_weights(base.model, weights)
        result["dev"][rank] = score(run, data, base)
    spectra = {name: torch.linalg.svdvals(update) for name, update in updates.items()}
    energies = torch.stack([s.square().cumsum(0) / s.square().sum() for s in spectra.values()])
    result["energy"] = {rank: energies[:, rank - 1].mean().item() for rank in RANKS}
    first = next(iter(spectra.values()))
    result["spectrum"] = (first / first[0]).tolist()  # of the first layer
    print(folder.name, {rank: row["accuracy"] for rank, row in result["dev"].items()}, flush=True)
    return result


def draw():
    """Dev accuracy and energy of the update over the rank that it is cut to."""
    if not (RESULTS / "idle_rank.json").exists():
        return
    runs, ranks = load("idle_rank")["runs"], [str(rank) for rank in RANKS]
    title = "Cut to a low rank, LoRA keeps its accuracy and HiRA loses it; whole, they end level"
    note = "Updates of rank 8 (HiRA: W0 ⊙ rank 8), cut to a lower rank. A line is a seed."
    with picture("idle_rank", title, note, 3.6, (1, 2), width=8.6) as (_, (left, right)):
        for run in runs:
            color = COLORS[run["method"]]
            dev = [100 * run["dev"][rank]["accuracy"] for rank in ("0", *ranks, "whole")]
            left.plot(range(len(dev)), dev, "o-", color=color, ms=4, alpha=0.8)
            right.plot(range(len(ranks)), [100 * run["energy"][r] for r in ranks], color=color)
        left.set_xticks(range(len(ranks) + 2), ["0", *ranks, "whole"])
        left.set_xlabel("rank that is left of the update")
        left.set_ylabel("dev accuracy on SST-2, %")
        right.set_xticks(range(len(ranks)), ranks)
        right.set_xlabel("rank that is left of the update")
        right.set_ylabel("energy of the update that is left, %")
        right.set_ylim(0)
        for axes in (left, right):
            axes.grid(axis="y")
        for method, label in (("lora", "LoRA"), ("hira", "HiRA")):
            left.plot([], [], color=COLORS[method], label=label)
        left.legend(loc="lower right")


if __name__ == "__main__":
    runs = [cut(Path(folder)) for folder in sys.argv[1:]]
    save("idle_rank", {"runs": runs})
