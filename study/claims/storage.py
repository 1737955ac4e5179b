"""Claim 8. How much can an adapter store? Random labels, which only memory can get right.

    bash study/claims/run.sh storage                    hours: everything below
    python -m study.claims.storage --phrases 0 FOLDER   write the phrases of seed 0
    python -m study.claims.storage --best FILE...       print the best learning rate of these
    python -m study.claims.storage FOLDER               gather its runs into results/storage.json

Phrases of SST-2 get one of 16 labels by chance, 4 bits each, more of them than the adapter can
hold. The test file holds the same phrases as the training file. With the labels coded by the
model's probabilities, a phrase saves 4 bits minus its loss in bits; what head only saves is taken
off, and the rest is divided by the adapter's weights that are not zero.
"""

import json
import math
import sys
from pathlib import Path

import torch

from harness.rows import read_examples
from harness.splits import generator_for
from study.claims.shared import COLORS, INK, RESULTS, load, picture, save
from study.claims.tuned import best, read_results, weights_left

CLASSES, WORDS, PHRASES = 16, 3, 5000
SIGNS = {"test": 1, "dev": -1}  # the test file holds the dev examples, too
METHODS = {"lora": "LoRA", "hira": "HiRA", "sparse_lora": "half pruned"}
NAMES = {f"{m}-r{rank}": f"{METHODS[m]}, rank {rank}" for m in METHODS for rank in (1, 8)}


def write_phrases(texts, seed, folder):
    """Write train.jsonl and test.jsonl, both with the same phrases and labels of this seed.

    All phrases have the same number of words, so that none stands inside another: the dev examples
    then take no training example away but themselves.
    """
    phrases = sorted({text for text in texts if len(text.split()) == WORDS})
    generator = generator_for(seed, "phrases")
    picked = torch.randperm(len(phrases), generator=generator)[:PHRASES].tolist()
    labels = torch.randint(CLASSES, (len(picked),), generator=generator).tolist()
    lines = [
        json.dumps({"text": phrases[number], "label": str(label)})
        for number, label in zip(picked, labels, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def memory(result):
    """(bits, recall) of the phrases that a run trained on: bits saved in all, share that is right.

    The test file holds them and the dev examples, whose part is subtracted.
    """
    sizes, metrics = result["data"], result["metrics"]
    trained = sizes["test"] - sizes["dev"]
    if sizes["train"] != trained:
        raise ValueError(f"{result['path']}: {sizes['train']} of {trained} phrases were trained on")

    def total(key):
        return sum(sign * sizes[split] * metrics[split][key] for split, sign in SIGNS.items())

    return trained * math.log2(CLASSES) - total("loss") / math.log(2), total("accuracy") / trained


def gather(folder):
    """Rows {name, seed, lr, weights, bits, recall}, bits and recall minus those of head only."""
    results = read_results(folder.glob("*.json"))
    heads = {result["seed"]: memory(result) for result in results if result["name"] == "head"}
    gathered = []
    for result in results:
        if result["name"] == "head" or result["seed"] not in heads:
            continue
        pairs = zip(memory(result), heads[result["seed"]], strict=True)
        bits, recall = (whole - head for whole, head in pairs)
        row = {"name": result["name"], "seed": result["seed"], "lr": result["lr"]}
        row |= {"weights": weights_left(result["path"]), "bits": bits, "recall": recall}
        gathered.append(row | {"head recall": heads[result["seed"]][1]})
    return gathered


def per_weight(name, numbers):
    """{seed: bits per weight} of "lora-r1" and so on."""
    return {row["seed"]: row["bits"] / row["weights"] for row in numbers if row["name"] == name}


def draw():
    """Bits stored per trained weight, for each method and rank."""
    if not (RESULTS / "storage.json").exists():
        return
    numbers = load("storage")["rows"]
    title = "How many bits of random labels a trained weight stores"
    note = "A dot is a seed; what the classification head stores is taken off. Right is more."
    with picture("storage", title, note, 2.8) as (_, axes):
        for y, name in enumerate(NAMES):
            x = [*per_weight(name, numbers).values()]
            axes.plot(x, [y] * len(x), "o", color=COLORS[name.rsplit("-", 1)[0]], alpha=0.8)
        axes.set_yticks(range(len(NAMES)), list(NAMES.values()))
        axes.set_ylim(len(NAMES) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.axvline(0, color=INK, lw=0.8, ls=":")
        axes.set_xlabel("bits per adapter weight that is not zero")
        axes.grid(axis="x")


def main(words):
    """Write phrases, print a learning rate, or gather a folder."""
    if words[0] == "--phrases":
        texts = read_examples("sst2", "data").plain
        write_phrases(texts, int(words[1]), Path(words[2]))
    elif words[0] == "--best":
        print(f"{best(read_results(map(Path, words[1:])), 'test')['lr']:g}")
    else:
        save("storage", {"phrases": PHRASES, "rows": gather(Path(words[0]))})


if __name__ == "__main__":
    main(sys.argv[1:])
