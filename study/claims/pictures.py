"""The pictures of docs/papers.md: what each method does, from real weights and short training runs.

    python -m study.claims.pictures          some minutes

LoRA, HiRA and the pruned adapter are trained for 100 steps on SST-2; contextual LoRA picks its
channels for three batches; NF4's levels lie on the histogram of a layer of the base.
"""

from statistics import median

import numpy as np
import torch

import common
import contextual_lora
import hira
import lora
import qlora
import sparse_lora
from harness import batches, models
from study.claims.shared import COLORS, INK, SST2, block_weights, picture, prepare

STEPS = ["--max_steps", "100"]
LOOKS = (0, 25, 50, 75, 100)  # steps at which the pruned adapter is looked at


def trained(script, lr, look=None):
    """The adapter layers after 100 steps; look(step, layers) is called after each."""
    run, data, base = prepare(script, [*SST2, *STEPS, "--lr", lr])
    method = script.adapt(run, base)
    layers = list(models.stand_ins(base.model).values())
    after_step = method.after_step

    def both(step, total, lr):
        after_step(step, total, lr)
        if look:
            look(step, layers)

    method.after_step = both
    if look:
        look(0, layers)
    common.train(run, data, base, method)
    return layers


def spectra():
    """LoRA and HiRA: the singular values of the trained update."""
    title = "With equally many weights: LoRA's update has 8 directions, HiRA's nearly all"
    note = "Singular values of the first query layer's update after 100 steps; counted above 1e-4."
    with picture("method-rank", title, note, 2.9) as (_, axes):
        for script, lr, label in (
            (lora, "1.5e-3", "LoRA, rank 8"),
            (hira, "1.5e-2", "HiRA, rank 8"),
        ):
            layer = trained(script, lr)[0]
            values = torch.linalg.svdvals(
                (layer.merged_weight() - models.weight_of(layer.base)).detach()
            )
            values = (values / values[0]).clamp(min=1e-5)
            above = int((values > 1e-4).sum())
            style = {
                "color": COLORS[script.__name__],
                "lw": 2,
                "label": f"{label}: {above} directions",
            }
            axes.plot(range(1, len(values) + 1), values, **style)
        axes.set_yscale("log")
        axes.set_ylim(1e-4, 1.5)
        axes.set_xlabel("direction, from the strongest to the weakest")
        axes.set_ylabel("singular value")
        axes.legend(loc="upper right")


def levels():
    """QLoRA: a layer's weights, divided by their block's largest, and what NF4 makes of them."""
    run, data, base = prepare(lora, SST2)
    weight = next(iter(block_weights(base.model).values()))
    blocks = qlora.blocks_of(weight.flatten(), 64)
    scaled = (blocks / blocks.abs().amax(1)[:, None]).flatten()
    title = "QLoRA: 16 values, dense where the weights are"
    note = "A query layer's weights, each divided by the largest of its 64; NF4's levels as lines."
    with picture("method-nf4", title, note, 2.9) as (_, axes):
        axes.hist(scaled.numpy(), bins=160, color=INK, alpha=0.45)
        axes.vlines(qlora.NF4, 0, axes.get_ylim()[1], color=COLORS["qlora"], lw=1.6)
        axes.set_xlabel("weight / largest of its block")
        axes.set_ylabel("number of weights")


def masks():
    """Sparse LoRA: which numbers of an adapter are left as training goes on."""
    shots = {}

    def look(step, layers):
        if step in LOOKS:
            shots[step] = layers[0].mask_A[:, :96].clone()

    trained(sparse_lora, "1.5e-3", look)
    title = "Sparse LoRA sets the smallest numbers of A and B to zero, step by step"
    note = "A of the first query layer: 8 rows, 96 of its 384 columns. White: pruned."
    with picture("method-pruned", title, note, 3.2, (len(LOOKS), 1)) as (_, panels):
        for axes, (step, mask) in zip(panels, shots.items(), strict=True):
            tint = np.zeros((*mask.shape, 4))
            tint[mask.numpy()] = (0.81, 0.37, 0.62, 1)
            axes.imshow(tint, aspect="auto", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[["top", "right"]].set_visible(True)
            text = f"step {step}: {100 * mask.float().mean():.0f} % left"
            axes.set_ylabel(text, rotation=0, ha="right", va="center")


@torch.no_grad()
def channels():
    """Contextual LoRA: the channels that a block picks for three batches."""
    run, data, base = prepare(contextual_lora, [*SST2, "--max_steps", "100"])
    method = contextual_lora.adapt(run, base)
    base.model.train()
    block = next(m.block for m in base.model.modules() if isinstance(m, contextual_lora.SparseUp))
    picked = []
    for step, examples, targets in [*batches.training_batches(run, data, 11, 13)]:
        method.before_step(step, 13)
        common.forward(base, batches.collate(data, data.train, examples, targets))
        picked.append(set(block.picked.tolist()))
    shared = [len(a & b) / len(a) for a in picked for b in picked if a is not b]
    title = "Contextual LoRA computes a tenth of the channels, partly others in each batch"
    note = f"First 384 of a layer's 1,536 channels. Two batches share {100 * median(shared):.0f} %."
    with picture("method-channels", title, note, 2.2, (3, 1)) as (_, panels):
        for i, (axes, kept) in enumerate(zip(panels, picked, strict=True)):
            own = sorted(c for c in kept if c < 384)
            axes.bar(range(384), 1, width=1, color=INK, alpha=0.18)
            axes.bar(own, 1, width=1, color=COLORS["contextual_lora"])
            axes.set_xlim(-1, 384)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_ylabel(f"batch {i + 1}", rotation=0, ha="right", va="center")
        panels[-1].set_xlabel("channel (colored: computed; gray: left out)")


if __name__ == "__main__":
    for draw in (levels, channels, masks, spectra):
        draw()
