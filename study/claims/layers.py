"""Claim 9. Which layers need an adapter? Attention alone, MLP alone or all, with equal weights.

bash study/claims/run.sh layers
"""

from study.claims.shared import COLORS, picture
from study.claims.tuned import difference, mean_weights, tuned_rows

PLACES = {"lora-r8": "all layers, rank 8"}
PLACES |= {"attention-r18": "attention only, rank 18", "mlp-r14": "MLP only, rank 14"}


def draw():
    """Perplexity relative to an adapter on all layers."""
    rows = tuned_rows(PLACES)
    names = [name for name in PLACES if difference(rows, name, "lora-r8")[0]]
    if len(names) < 2:
        return
    title = "Where equally many adapter weights are worth most"
    note = "Perplexity on WikiText-2 relative to all layers. Left is better. Bars: 95 % over seeds."
    with picture("layers", title, note, 2.4) as (_, axes):
        for y, name in enumerate(names):
            mean, low, high = difference(rows, name, "lora-r8")[0]
            axes.plot([low, high], [y, y], color=COLORS["lora"], lw=2)
            axes.plot(mean, y, "o", color=COLORS["lora"])
        labels = [f"{PLACES[name]}\n{mean_weights(rows, name):,.0f} weights" for name in names]
        axes.set_yticks(range(len(names)), labels)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.axvline(0, color=COLORS["lora"], lw=0.8, ls=":")
        axes.set_xlabel("perplexity relative to all layers, %")
        axes.grid(axis="x")
