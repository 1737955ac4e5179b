"""Fill docs/claims.md: redraw every picture, and write every number from results/*.json.

python -m study.claims.page
"""

import re
from pathlib import Path

from study.claims import (
    allocation,
    channels,
    cost_verdicts,
    expressive,
    formats,
    idle_rank,
    layers,
    learning_rates,
    memory,
    sparsity,
    step_times,
    storage,
    trained_verdicts,
    verdicts,
    won_back,
)

PAGE = Path(__file__).parents[2] / "docs" / "claims.md"
SCRIPTS = (expressive, idle_rank, formats, memory, channels, step_times, learning_rates)
SCRIPTS += (sparsity, won_back, storage, layers, allocation)
WORDS = vars(verdicts) | vars(cost_verdicts) | vars(trained_verdicts)


def filled(text):
    """The page with what the numbers give between its marks, one for each script."""
    for script in SCRIPTS:
        name = script.__name__.rsplit(".", 1)[1]
        words = WORDS[name]()
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = mark.sub(lambda match, words=words: f"{match[1]}\n{words}\n\n{match[2]}", text)
    return text


def main():
    """Redraw and refill."""
    for script in SCRIPTS:
        script.draw()
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
