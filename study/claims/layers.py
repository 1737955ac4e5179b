"""Claim 9. Which layers need an adapter? Attention alone, MLP alone or all, with equal weights.

bash study/claims/run.sh layers
"""

from study.claims.tuned import draw_differences

PLACES = {"lora-r8": "all layers, rank 8"}
PLACES |= {"attention-r18": "attention only, rank 18", "mlp-r14": "MLP only, rank 14"}


def draw():
    """Perplexity relative to an adapter on all layers."""
    title = "Where equally many adapter weights are worth most"
    draw_differences("layers", title, PLACES, "lora-r8")
