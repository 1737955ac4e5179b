"""Claim 3. SparseLoRA (our contextual_lora.py): are the right channels picked, and does it save time?

    python -m study.claims.contextual energy           two minutes
    python -m study.claims.contextual times            half an hour, on a machine with nothing else
    python -m study.claims.contextual times 256 2      widths up to 256, 2 rounds: to try it

energy: what a tenth of the feed-forward channels computes of all energy, the sum of squares after
the activation: chosen by the paper's rank-8 SVD, by our sample of 128 tokens, or exactly.
times: a training step of two decoder blocks with random weights on 1,024 tokens, over their width.
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
from contextual_lora import CANDIDATES, SAMPLED, estimated_scores, sampled_scores, svd_estimate
from harness import batches, flags, meters, models
from harness.splits import generator_for
from plan import fake_base
from study.claims.shared import COLORS, INK, RESULTS, SST2, WIKITEXT2, load, picture, prepare, save

KEEP, BATCHES = 0.1, 6
WIDTHS, ROUNDS, LENGTH = (256, 512, 1024, 2048), 9, 128
WAYS = {"lora": (lora, []), "qlora": (qlora, []), "hira": (hira, [])}
WAYS["contextual_lora"] = contextual_lora, ["--dense_layers", "0"]


def choices(x, weight, bias, act, generator):
    """{estimator: score of each channel} for the tokens x (T, in) of a layer into the middle."""
    first = x[:CANDIDATES]
    sample = first[torch.randperm(len(first), generator=generator)[:SAMPLED]]
    exact = sampled_scores(x, [weight], [bias], act)
    svd = estimated_scores(first, [svd_estimate(weight)], [bias], act)
    chance = torch.rand(len(exact), generator=generator)
    ours = sampled_scores(sample, [weight], [bias], act)
    return {"exact": exact, "sample": ours, "svd": svd, "chance": chance}


@torch.no_grad()
def energy(words):
    """{estimator: [per block, [per batch, share of the energy of all channels]]}."""
    run, data, base = prepare(contextual_lora, words)
    act, shares, inputs = models.activation(base.model.config), {}, {}
    blocks = models.feed_forward_layers(base.model)
    names = [name + ends[0] for name, ends in blocks.items()]
    names = names[: len(names) - base.last_block_cut]  # the last one sees the output tokens alone
    for name in names:

        def keep(_, x, name=name):
            inputs[name] = x[0]

        base.model.get_submodule(name).register_forward_pre_hook(keep)
    steps = [*batches.training_batches(run, data, 1, BATCHES + 1)][1:]  # the first is the longest
    for step, examples, targets in steps:
        batch = batches.collate(data, data.train, examples, targets)
        common.forward(base, batch)
        sliced = batch.token_positions
        sliced = sliced[~torch.isin(sliced, batch.output_positions)]
        for i, name in enumerate(names):
            layer, x = base.model.get_submodule(name), inputs[name].flatten(0, 1)[sliced]
            generator = generator_for("claim 3", step, i)
            scores = choices(x, layer.weight, layer.bias, act, generator)
            squares, kept = scores["exact"].square(), round(KEEP * layer.out_features)
            for way, score in scores.items():
                share = (squares[score.topk(kept).indices].sum() / squares.sum()).item()
                shares.setdefault(way, [[] for _ in names])[i].append(share)
    return shares


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


def draw_energy():
    """The energy of the picked channels by block."""
    numbers = load("energy")
    title = "The paper's rank-8 SVD picks channels hardly better than chance here"
    note = (
        "Share of the energy that 10 % of a block's feed-forward channels hold; mean of 6 batches."
    )
    looks = {"exact": ("best possible choice", INK, "--"), "chance": ("at random", INK, ":")}
    looks["sample"] = "exact scores on 128 sampled tokens (ours)", COLORS["contextual_lora"], "o-"
    looks["svd"] = "rank-8 SVD of the weight (paper)", COLORS["hybrid"], "s-"
    names = {"sst2": "all-MiniLM-L6-v2, SST-2", "wikitext2": "minilm-mlm, WikiText-2"}
    with picture("energy", title, note, 3.6, (1, 2), width=8.6, sharey=True) as (figure, panels):
        for axes, (dataset, shares) in zip(panels, numbers["shares"].items(), strict=True):
            for way, (label, color, line) in looks.items():
                means = [100 * sum(block) / len(block) for block in shares[way]]
                axes.plot(range(1, len(means) + 1), means, line, color=color, label=label)
            axes.set_title(names[dataset], size=10)
            axes.set_xlabel("block, from the input")
            axes.set_xticks(range(1, len(means) + 1))
            axes.grid(axis="y")
        panels[0].set_ylim(0)
        panels[0].set_ylabel("energy kept, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def draw_times():
    """Step time and FLOPs relative to LoRA over the width; nothing before the quiet run."""
    if not (RESULTS / "times.json").exists():
        return
    rows = load("times")["rows"]
    title = "How much of the saved arithmetic becomes saved time"
    note = "A training step relative to LoRA's, two decoder blocks, 1,024 tokens. Bars: quartiles."
    with picture("times", title, note, 3.6) as (_, axes):
        for way, label in {
            "contextual_lora": "contextual LoRA",
            "qlora": "QLoRA",
            "hira": "HiRA",
        }.items():
            part = [row for row in rows if row["way"] == way]
            widths, (mid, low, high) = [r["width"] for r in part], zip(*(r["time"] for r in part))
            bars = [[m - x for m, x in zip(mid, low)], [x - m for m, x in zip(mid, high)]]
            axes.errorbar(widths, mid, bars, fmt="o-", color=COLORS[way], label=f"{label}: time")
            flops = [r["flops"] for r in part]
            axes.plot(widths, flops, ":", color=COLORS[way], label=f"{label}: operations")
        axes.axhline(1, color=COLORS["lora"], lw=1.5, label="LoRA")
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, [f"{width:,}" for width in widths])
        axes.set_ylim(0)
        axes.set_xlabel("width of the model")
        axes.set_ylabel("relative to LoRA (lower is faster)")
        axes.grid(axis="y")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    kind, *numbers = sys.argv[1:]
    if kind == "energy":
        shares = {"sst2": energy(SST2), "wikitext2": energy(WIKITEXT2)}
        save("energy", {"keep": KEEP, "batches": BATCHES, "shares": shares})
    else:
        name = "times" if not numbers else "times-try"
        save(name, {"threads": torch.get_num_threads(), "rows": times(*map(int, numbers))})
