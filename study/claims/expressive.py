"""Claim 1a. "High rank makes HiRA more expressive": how much of a wanted update fits into either?

    python -m study.claims.expressive FOLDER...    of full fine-tuning; some minutes for each

With equally many weights LoRA's best update is a truncated SVD; HiRA's is found by alternating
least squares. The targets are made, or are what full fine-tuning changed in the linear layers of
the blocks. Energy is not loss, so the projected change is also put in the place of the whole one,
in the fine-tuned model, which is scored on dev examples.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import baseline
import common
from harness.splits import generator_for
from study.claims.projection import best_hira, best_lora, energy
from study.claims.shared import (
    COLORS,
    INK,
    RESULTS,
    block_weights,
    load,
    mean,
    picture,
    prepare,
    save,
    set_weights,
)

RANK = 8
NAMES = {"lora": "LoRA", "hira": "HiRA"}
RANKS = {"sst2": (2, 8, 32), "wikitext2": (8,)}


def made_targets(n=256):
    """{name: (E, W0)} of synthetic targets (n, n), with a Gaussian W0."""
    generator = generator_for("targets")

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator)

    W0 = gaussian(n, n)
    product, other = (gaussian(n, RANK) @ gaussian(RANK, n) for _ in range(2))
    sparse = gaussian(n, n) * (torch.rand(n, n, generator=generator) < 0.02)
    permutation = torch.eye(n)[torch.randperm(n, generator=generator)]
    targets = {"low rank": product, "W0 ⊙ low rank": W0 * other, "2 % sparse": sparse}
    targets |= {"permutation": permutation, "Gaussian": gaussian(n, n)}
    return {name: (E, W0) for name, E in targets.items()}


def score(run, data, base):
    """{accuracy or perplexity, loss} on the dev examples."""
    return common.summarize(data, data.dev, common.score(run, data, base, data.dev, "dev"))


def project(folder):
    """Energies and dev scores of the projected change of one full fine-tuning run."""
    settings = json.loads(folder.with_suffix(folder.suffix + ".json").read_text())
    kept = ("dataset", "model", "train_samples", "heldout", "head_lr", "precision")
    words = [word for key in kept for word in (f"--{key}", settings["settings"][key])]
    run, data, base = prepare(baseline, ["--full", *words], settings["seed"])
    W0 = block_weights(base.model)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    base.model.load_state_dict(tensors, strict=False)
    changes = {name: weight - W0[name] for name, weight in block_weights(base.model).items()}
    result = {"dataset": settings["dataset"], "lr": settings["lr"], "seed": settings["seed"]}
    result |= {"whole": score(run, data, base), "energy": {}, "dev": {}}
    set_weights(base.model, W0)
    result["none"] = score(run, data, base)
    for rank in RANKS[result["dataset"]]:
        for method in ("lora", "hira"):
            updates = {
                name: best_lora(E, rank)
                if method == "lora"
                else best_hira(E, W0[name], rank, starts=2 if rank <= 8 else 1)[0]
                for name, E in changes.items()
            }
            set_weights(base.model, {name: W0[name] + update for name, update in updates.items()})
            energies = {name: energy(updates[name], E) for name, E in changes.items()}
            result["energy"][f"{method} {rank}"] = energies
            result["dev"][f"{method} {rank}"] = score(run, data, base)
        print(folder.name, rank, result["dev"], flush=True)
    return result


def main(folders):
    """Fit the made targets, and the changes of these runs that the results do not have yet."""
    made = {}
    for name, (E, W0) in made_targets().items():
        made[name] = {"lora": energy(best_lora(E, RANK), E)}
        made[name]["hira"] = best_hira(E, W0, RANK, steps=200, starts=4)[1][-1]
    numbers = {"rank": RANK, "made": made, "runs": []}
    if (RESULTS / "expressive.json").exists():
        numbers["runs"] = load("expressive")["runs"]
    names = [f"{run['dataset']}-full-{run['seed']}" for run in numbers["runs"]]
    for folder in map(Path, folders):
        dataset, seed = folder.name.split("-")[0], folder.name.rpartition("seed")[2]
        if f"{dataset}-full-{seed}" not in names:
            numbers["runs"].append(project(folder))
            save("expressive", numbers)


def draw():
    """Captured energy for each target, and the dev accuracy of the projected change over rank."""
    numbers = load("expressive")
    bars = {name: list(row.values()) for name, row in numbers["made"].items()}
    for dataset, name in (("sst2", "real: SST-2"), ("wikitext2", "real: WikiText-2")):
        real = [run["energy"] for run in numbers["runs"] if run["dataset"] == dataset]
        if real:
            bars[name] = [mean(e for r in real for e in r[f"{m} 8"].values()) for m in NAMES]
    title = "What fine-tuning really changes fits into LoRA, and hardly into HiRA"
    note = (
        "Left: captured by the best rank-8 fit. Right: SST-2's change replaced by it; lines: seeds."
    )
    with picture("expressive", title, note, 3.9, (1, 2), width=9.4) as (_, (left, right)):
        for i, (method, label) in enumerate(NAMES.items()):
            shares = [100 * pair[i] for pair in bars.values()]
            places = [y + 0.4 * i - 0.2 for y in range(len(bars))]
            left.barh(places, shares, 0.38, color=COLORS[method], label=label)
            for y, share in zip(places, shares, strict=True):
                left.text(share + 1, y, f"{share:.0f}", va="center", size=8)
        left.set_yticks(range(len(bars)), list(bars))
        left.invert_yaxis()
        left.set_xlabel("energy captured, %")
        left.legend(loc="center right")
        runs = [run for run in numbers["runs"] if run["dataset"] == "sst2"]
        for run in runs:
            for method in NAMES:
                scores = [100 * run["dev"][f"{method} {r}"]["accuracy"] for r in RANKS["sst2"]]
                points = [score - 100 * run["whole"]["accuracy"] for score in scores]
                right.plot(RANKS["sst2"], points, "o-", color=COLORS[method], alpha=0.8, ms=5)
        without = 100 * mean(r["none"]["accuracy"] - r["whole"]["accuracy"] for r in runs)
        right.axhline(without, color=INK, ls=":", lw=1)
        right.text(32, without, "no change of these layers (mean)", va="top", ha="right")
        right.axhline(0, color=INK, ls="--", lw=1.2)
        right.text(RANKS["sst2"][0], 0.2, "the whole change")
        right.set_xscale("log", base=2)
        right.set_xticks(RANKS["sst2"], RANKS["sst2"])
        right.set_xlabel("rank of the fit")
        right.set_ylabel("change of dev accuracy, points")
        right.grid(axis="y")


if __name__ == "__main__":
    main(sys.argv[1:])
