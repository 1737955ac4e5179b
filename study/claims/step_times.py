"""Claim 3b. Does SparseLoRA save time? A training step of two random blocks, over their width.

    python -m study.claims.step_times          half an hour, on a machine with nothing else to do
    python -m study.claims.step_times 256 2    widths up to 256, 2 rounds: to try it; saves nothing

Two decoder blocks with random weights and 1,024 tokens; the methods take their steps in turns, and
a round's times are divided by LoRA's. Contextual LoRA slices both blocks here, its best case.
"""

import sys
import tempfile
import time
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

import common
import contextual_lora
import hira
import lora
import qlora
from harness import flags, meters
from plan import fake_base
from study.claims.shared import COLORS, RESULTS, load, picture, save

WIDTHS, ROUNDS, LENGTH = (256, 512, 1024, 2048), 9, 128
WAYS = {"lora": (lora, []), "qlora": (qlora, []), "hira": (hira, [])}
WAYS["contextual_lora"] = contextual_lora, ["--dense_layers", "0"]


def training_step(way, width):
    """(step, FLOPs) of a method: step() trains two random decoder blocks once on 1,024 tokens."""
    script, more = WAYS[way]
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        words = ["--dataset", "wikitext2", "--model", folder, "--precision", "fp32"]
        words += ["--batch_size", 8, "--max_length", LENGTH, *more]
        args = flags.parse_args(script.__doc__, script.__file__, script.add_args, words)
        run = Namespace(**{**vars(args), "lr": 1e-4, "seed": 0, "device": "cpu"})
        torch.manual_seed(0)
        base, batch = fake_base(run)  # of real tensors here
        method = script.adapt(run, base)
    base.model.train()
    batch = batch._replace(ids=torch.randint(512, batch.ids.shape))
    optimizer = common.make_optimizer(run, base, method)

    def backward():
        F.cross_entropy(common.forward(base, batch), batch.target).backward()

    def step():
        method.before_step(100, 100)
        backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    method.before_step(100, 100)
    return step, meters.count_flops(base.model, backward)


def times(widest=WIDTHS[-1], rounds=ROUNDS):
    """Rows of {width, way, flops, time}: of LoRA's, time as [median, quartiles] over the rounds."""
    rows = []
    for width in (w for w in WIDTHS if w <= widest):
        steps = {way: training_step(way, width) for way in WAYS}
        seconds = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, (step, _) in steps.items():
                start = time.perf_counter()
                step()
                seconds[way].append(time.perf_counter() - start)
        for way, (_, flops) in steps.items():
            ratios = np.array(seconds[way]) / np.array(seconds["lora"])
            row = {"width": width, "way": way, "flops": flops / steps["lora"][1]}
            row["time"] = [float(x) for x in np.quantile(ratios, (0.5, 0.25, 0.75))]
            rows.append(row | {"seconds": float(np.median(seconds[way]))})
            print(rows[-1], flush=True)
    return rows


def draw():
    """Step time and FLOPs relative to LoRA over the width; nothing before the quiet run."""
    if not (RESULTS / "step_times.json").exists():
        return
    rows = load("step_times")["rows"]
    title = "Contextual LoRA is faster, but by less than its operations promise"
    note = "Two decoder blocks, 1,024 tokens. Dotted: if only operations counted. Bars: quartiles."
    names = {"contextual_lora": "contextual LoRA", "hira": "HiRA", "qlora": "QLoRA"}
    with picture("step_times", title, note, 3.6) as (_, axes):
        for way, label in names.items():
            measured = [row for row in rows if row["way"] == way]
            widths = [row["width"] for row in measured]
            mid, high, low = 1 / np.array([row["time"] for row in measured]).T
            style = {"color": COLORS[way], "label": label}
            axes.errorbar(widths, mid, [mid - low, high - mid], fmt="o-", **style)
            promised = [1 / row["flops"] for row in measured]
            axes.plot(widths, promised, ":", color=COLORS[way])
        axes.axhline(1, color=COLORS["lora"], lw=1.5, label="LoRA")
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, [f"{width:,}" for width in widths])
        axes.set_ylim(0.7)
        axes.set_xlabel("width of the model")
        axes.set_ylabel("relative speed (higher is faster)")
        axes.grid(axis="y")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def main(numbers):
    """Measure; with numbers only up to this width, in so many rounds."""
    rows = times(*map(int, numbers))
    if not numbers:
        save("step_times", {"threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
