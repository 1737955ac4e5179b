"""Claim 6. What does sparsity cost: is a pruned adapter better than a small one?

    bash study/claims/run.sh sparsity

Adapters of rank 16 are pruned by magnitude while they train; beside each stands plain LoRA of a
lower rank, with as many weights as pruning leaves.
"""

from study.claims.shared import COLORS, picture
from study.claims.tuned import difference, mean_weights, tuned_rows

LORA = {f"lora-r{rank}": f"LoRA, rank {rank}" for rank in (1, 4, 8)}
PRUNED = {"pruned-0.9375": "rank 16, a sixteenth left", "pruned-0.75": "rank 16, a quarter left"}
PRUNED |= {"pruned-0.5": "rank 16, half left", "pruned-0": "rank 16, nothing pruned"}
OTHER = {"pruned-penalty0.1": "rank 16, L1 penalty alone"}
OTHER |= {"pruned-components0.5": "rank 16, half of all components pruned"}
LABELS = LORA | PRUNED | OTHER
PAIRS = dict(zip(PRUNED, LORA, strict=False))  # with equally many weights


def draw():
    """Perplexity over the number of weights that are left, relative to LoRA at rank 8."""
    rows = tuned_rows(LABELS)
    if not rows:
        return
    title = "Perplexity over the number of adapter weights that are left"
    note = "WikiText-2, relative to LoRA at rank 8. Lower is better. Bars: 95 % over seeds."
    curves = {"lora": (LORA, "LoRA, ranks 1, 4 and 8", 1)}
    curves["sparse_lora"] = PRUNED, "rank 16, pruned by magnitude", 1.03  # beside LoRA's bars
    with picture("sparsity", title, note, 3.8) as (_, axes):

        def place(names, style, color, shift=1.0, **more):
            points = [
                (shift * mean_weights(rows, n), difference(rows, n, "lora-r8")[0]) for n in names
            ]
            points = [(x, y) for x, y in points if y]
            if points:
                x, y = zip(*points, strict=True)
                middles = [mean for mean, *_ in y]
                bars = [[mean - low for mean, low, _ in y], [high - mean for mean, _, high in y]]
                axes.errorbar(x, middles, bars, fmt=style, color=COLORS[color], **more)

        for color, (names, label, shift) in curves.items():
            place(names, "o-", color, shift, label=label)
        for (name, label), style in zip(OTHER.items(), "sD", strict=True):
            place([name], style, "sparse_lora", mfc="none", label=label)
        axes.axhline(0, color=COLORS["lora"], lw=0.8, ls=":")
        axes.set_xscale("log", base=2)
        ticks = [41472 * rank for rank in (1, 2, 4, 8, 16)]  # of LoRA on all 36 layers
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlabel("adapter weights that are not zero")
        axes.set_ylabel("perplexity relative to LoRA, rank 8, %")
        axes.grid(axis="y")
        axes.legend(fontsize=8)
