"""Claim 3a. Does SparseLoRA's estimator pick the channels that matter?

    python -m study.claims.channels          two minutes

What a tenth of a block's feed-forward channels computes of all energy, the sum of squares after the
activation: chosen by the paper's rank-8 SVD, by the energies of a sample of tokens (ours, in
contextual_lora.py), by those of the whole batch, or at random. channel_energy.py beside this asks
how large the sample must be.
"""

import torch

import common
import contextual_lora
from contextual_lora import CANDIDATES, SAMPLED, estimated_scores, sampled_scores, svd_estimate
from harness import batches, models
from harness.splits import generator_for
from study.claims.shared import COLORS, INK, SST2, WIKITEXT2, load, picture, prepare, save

KEEP, BATCHES = 0.1, 6


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


def draw():
    """The energy of the picked channels by block."""
    numbers = load("channels")
    title = "The paper's rank-8 SVD picks hardly better than chance after block 1"
    note = (
        "Share of the energy that 10 % of a block's feed-forward channels hold; mean of 6 batches."
    )
    looks = {"exact": ("best possible choice", INK, "--"), "chance": ("at random", INK, ":")}
    looks["sample"] = (
        f"exact scores on {numbers['sampled']} sampled tokens (ours)",
        COLORS["contextual_lora"],
        "o-",
    )
    looks["svd"] = "rank-8 SVD of the weight (paper)", COLORS["hybrid"], "s-"
    names = {"sst2": "all-MiniLM-L6-v2, SST-2", "wikitext2": "minilm-mlm, WikiText-2"}
    with picture("channels", title, note, 3.6, (1, 2), width=8.6, sharey=True) as (figure, panels):
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


def main():
    """Measure on both bases."""
    shares = {"sst2": energy(SST2), "wikitext2": energy(WIKITEXT2)}
    settings = {"keep": KEEP, "batches": BATCHES, "sampled": SAMPLED}
    save("channels", settings | {"shares": shares})


if __name__ == "__main__":
    main()
