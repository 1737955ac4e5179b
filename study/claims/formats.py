"""Claim 2a. Is NF4 the best 4-bit format, and does double quantization cost nothing?

    python -m study.claims.formats          half an hour on a free CPU core

Every linear layer in the blocks of minilm-mlm is rounded to 4 bits and back, with one scale for 32,
64 or 128 neighboring weights, and the untrained model is scored on 500 blocks of WikiText-2's test
text. SmolLM2's weights lie on a 4-bit grid already, so it cannot judge.
"""

import math

import torch

import baseline
import common
from harness.batches import collate, predicted_tokens
from study.claims.four_bits import FORMATS, bits, fake_quantize
from study.claims.shared import (
    COLORS,
    INK,
    WIKITEXT2,
    block_weights,
    load,
    picture,
    prepare,
    save,
    set_weights,
)

SIZES, SHIFTS, TEST_BLOCKS = (64, 32, 128), (13, 29), 500


def inputs_of(run, data, base, names):
    """{name: input (tokens, in)} of the layers for the first 32 training examples."""
    inputs, hooks = {}, []
    for name in names:

        def keep(_, x, name=name):
            inputs[name] = x[0].flatten(0, -2)

        hooks.append(base.model.get_submodule(name).register_forward_pre_hook(keep))
    targets = predicted_tokens(data, data.train, 0, 0)
    with torch.no_grad():
        common.forward(base, collate(data, data.train, torch.arange(32), targets))
    for hook in hooks:
        hook.remove()
    return inputs


def relative(error, whole):
    """‖error‖ / ‖whole‖ in percent, as a number."""
    return 100 * (error.norm() / whole.norm()).item()


def percent_more(a, b):
    """[mean, low, high] of how many percent perplexity a is above b: 95 % over test blocks."""
    difference, scored = a.nll - b.nll, a.scored.double()
    mean = (difference.sum() / scored.sum()).item()
    rest = difference - mean * scored
    n = len(rest)
    error = (rest.square().sum() * n / (n - 1)).sqrt().item() / scored.sum().item()
    return [100 * math.expm1(x) for x in (mean, mean - 1.96 * error, mean + 1.96 * error)]


def main():
    words = [*WIKITEXT2, "--test_samples", TEST_BLOCKS, "--eval_batch_size", "32"]
    run, data, base = prepare(baseline, words)
    weights = block_weights(base.model)
    inputs = inputs_of(run, data, base, weights)
    fp32 = common.score(run, data, base, data.test, "test")
    perplexity = math.exp((fp32.nll.sum() / fp32.scored.sum()).item())
    result = {"perplexity": perplexity, "test_blocks": TEST_BLOCKS, "layers": list(weights)}
    rows, scores = [], {}
    ways = [(n, size, d, 0) for size in SIZES for n in FORMATS for d in (False, True)]
    ways += [
        (n, 64, d, s) for s in SHIFTS for n in FORMATS for d in (False, True)[: 1 + (n == "NF4")]
    ]
    for way in ways:
        rough = {name: fake_quantize(weight, *way) for name, weight in weights.items()}
        set_weights(base.model, rough)
        scores[way] = common.score(run, data, base, data.test, "test")
        row = dict(zip(("format", "size", "double", "shift"), way, strict=True))
        row |= {"bits": bits(*way[:3]), "perplexity, % more": percent_more(scores[way], fp32)}
        errors = {n: (rough[n] - weights[n], weights[n], inputs[n]) for n in weights}
        row["weight error, %"] = [relative(e, w) for e, w, _ in errors.values()]
        row["output error, %"] = [relative(x @ e.T, x @ w.T) for e, w, x in errors.values()]
        if way[0] != "NF4":
            row["% more than NF4"] = percent_more(scores[way], scores[("NF4", *way[1:])])
        if way[2]:
            row["% more than single"] = percent_more(scores[way], scores[(*way[:2], False, way[3])])
        rows.append(row)
        print(*way, f"{row['perplexity, % more'][0]:+.2f} %", flush=True)
        save("formats", result | {"rows": rows})


def draw():
    """Error of the layers' outputs over bits a weight, and the price in perplexity at block 64."""
    rows = load("formats")["rows"]
    title = "NF4 and FP4 (E2M1) cost the least perplexity; double quantization costs nothing"
    note = "Hollow, dashed: with double quantization. Right: 95 % over test blocks."
    colors = COLORS["qlora"], COLORS["lora"], COLORS["hybrid"], INK, COLORS["hira"]
    looks = dict(zip(FORMATS, colors, strict=True))
    with picture("formats", title, note, 3.7, (1, 2), width=8.6) as (_, (left, right)):
        for y, (name, color) in enumerate(looks.items()):
            own = [row for row in rows if row["format"] == name]
            for double in (False, True):
                part = [row for row in own if row["double"] == double and not row["shift"]]
                points = sorted((row["bits"], row["output error, %"]) for row in part)
                means = [sum(errors) / len(errors) for _, errors in points]
                style = {"mfc": "none", "ls": "--"} if double else {}
                left.plot([x for x, _ in points], means, marker="o", color=color, ms=5, **style)
            for row in (row for row in own if row["size"] == 64 and not row["shift"]):
                mean, low, high = row["perplexity, % more"]
                place = y + (0.16 if row["double"] else -0.16)
                face = "none" if row["double"] else color
                right.plot([low, high], [place, place], color=color, lw=1.6)
                right.plot(mean, place, "o", color=color, mfc=face, ms=6)
        left.set_xlabel("bits a weight (blocks of 128, 64, 32; colors as on the right)")
        left.set_ylabel("error of a layer's output, %")
        left.grid(axis="y")
        right.set_yticks(range(len(looks)), list(looks))
        for label, color in zip(right.get_yticklabels(), looks.values(), strict=True):
            label.set_color(color)
        right.set_ylim(len(looks) - 0.5, -0.5)
        right.tick_params(axis="y", length=0)
        right.set_xlim(left=0)
        right.grid(axis="x")
        right.set_xlabel("perplexity above fp32, % (blocks of 64; left is better)")


if __name__ == "__main__":
    main()
