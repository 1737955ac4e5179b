"""Claim 7. Can the price of 4 bits be won back by where QLoRA's adapter starts?

    python -m study.claims.won_back          minutes: the untrained perplexity
    bash study/claims/run.sh starts          hours: the trained one

minilm-mlm in NF4 with an adapter of rank 8 (α/r = 2) on every linear layer of its blocks.
"""

import math

import common
from study.claims import starts
from study.claims.formats import TEST_BLOCKS, percent_more
from study.claims.shared import COLORS, INK, RESULTS, WIKITEXT2, load, picture, prepare, save
from study.claims.tuned import difference, tuned_rows

LAYERS = ["--targets", "query", "key", "value", "intermediate.dense", "output.dense"]
LABELS = {"zero": "QLoRA: at zero", "peft_loftq": "LoftQ as in PEFT"}
LABELS |= {"loftq": "LoftQ, divided by α/r", "output_aware": "output-aware"}
TRAINED = {"zero": "qlora-r8", "loftq": "loftq-r8", "output_aware": "output_aware-r8"}


def main():
    """The untrained perplexity of each start."""
    words = [*WIKITEXT2, *LAYERS, "--test_samples", TEST_BLOCKS, "--eval_batch_size", 32]
    run, data, base = prepare(starts, words)
    fp32 = common.score(run, data, base, data.test, "test")
    perplexity = math.exp((fp32.nll.sum() / fp32.scored.sum()).item())
    result = {"perplexity": perplexity, "test_blocks": TEST_BLOCKS, "rank": run.rank}
    result |= {"alpha": run.alpha, "rows": []}
    for start in starts.STARTS:
        run, data, base = prepare(starts, [*words, "--start", start])
        starts.adapt(run, data, base)
        scores = common.score(run, data, base, data.test, "test")
        if start == "zero":
            zero = scores
        row = {"start": start, "% more": percent_more(scores, fp32)}
        result["rows"].append(row | {"% more than QLoRA": percent_more(scores, zero)})
        print(start, row, flush=True)
        save("won_back", result)


def draw():
    """Perplexity above full precision for each start, untrained and, once it has run, trained."""
    if not (RESULTS / "won_back.json").exists():
        return
    untrained = {row["start"]: row["% more"] for row in load("won_back")["rows"]}
    rows = tuned_rows(("lora-r8", *TRAINED.values()))
    trained = {start: difference(rows, name, "lora-r8")[0] for start, name in TRAINED.items()}
    trained = {start: percents for start, percents in trained.items() if percents}
    title = "Before training, the output-aware start undoes most of what 4 bits cost"
    note = "Dotted line: the fp32 weights. Left is better. Bars: 95 % over test blocks"
    note += ", after training over seeds." if trained else "."
    parts = [(untrained, "untrained: perplexity above that of the fp32 weights, %")]
    parts += [(trained, "trained: perplexity above that of LoRA, %")] if trained else []
    size = {"width": 8.6 if trained else 6.8, "squeeze": False, "sharey": True}
    with picture("won_back", title, note, 2.9, (1, len(parts)), **size) as (_, [panels]):
        for axes, (percents, label) in zip(panels, parts, strict=True):
            for y, start in enumerate(LABELS):
                if start in percents:
                    mean, *ends = percents[start]
                    color = COLORS["qlora"] if start == "zero" else COLORS["hybrid"]
                    axes.plot(ends, [y, y], color=color, lw=2)
                    axes.plot(mean, y, "o", color=color)
            axes.axvline(0, color=INK, lw=0.8, ls=":")
            axes.set_xlabel(label)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x")
        panels[0].set_ylabel("where QLoRA's adapter starts")
        panels[0].set_yticks(range(len(LABELS)), list(LABELS.values()))
        panels[0].set_ylim(len(LABELS) - 0.5, -0.5)


if __name__ == "__main__":
    main()
