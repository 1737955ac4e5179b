"""What the results of the trained experiments say, as Markdown: a function for each mark."""

from study.claims import allocation as patterns
from study.claims import layers as places
from study.claims import sparsity as pruning
from study.claims import storage as stores
from study.claims import won_back as price
from study.claims.shared import RESULTS, interval, load, mean, span, table
from study.claims.tuned import cautions, difference, mean_weights, tuned_rows, verdict

HOURS = {"sparsity": 9, "starts": 5, "storage": 5, "layers": 2, "allocation": 5}  # of two processes


def waits(block):
    return (
        f"*Not run yet: `bash study/claims/run.sh {block}`, about {HOURS[block]} hours on two free "
        "CPU cores.*"
    )


def image(name, words):
    return f"![{words}](../study/claims/results/{name}.png)"


def sparsity():
    rows = tuned_rows(pruning.LABELS)
    if not rows:
        return waits("sparsity")
    lines, sentences = [], []
    for name, label in pruning.LABELS.items():
        percents, seeds = difference(rows, name, "lora-r8")
        if percents and name != "lora-r8":
            lines.append([label, f"{mean_weights(rows, name):,.0f}", span(percents), seeds])
    for name, small in pruning.PAIRS.items():
        percents, seeds = difference(rows, name, small)
        if percents:
            words = f"{pruning.LABELS[name]}, against {pruning.LABELS[small]}"
            words = f"{words}: {verdict(percents, seeds)}"
            sentences.append(f"{words}, {span(percents)} % (seeds: {seeds})")
    head = ["adapter", "weights left", "perplexity above LoRA's at rank 8, %", "seeds"]
    return (
        f"{image('sparsity', 'Perplexity over the weights that are left')}\n\n"
        f"{table(head, lines)}\n\n**A pruned adapter beside a small one with equally many weights, "
        f"by its perplexity:** {'; '.join(sentences)}.{cautions(rows)}"
    )


def won_back():
    if not (RESULTS / "won_back.json").exists():
        return waits("starts")
    rows = {row["start"]: row for row in load("won_back")["rows"]}
    cells = []
    for start, label in price.LABELS.items():
        less = "–" if start == "zero" else span(rows[start]["% more than QLoRA"])
        cells.append([label, span(rows[start]["% more"]), less])
    less = [span(rows[start]["% more than QLoRA"]) for start in ("loftq", "output_aware")]
    head = ["start", "untrained perplexity above fp32, %", "above QLoRA's, %"]
    text = (
        f"{image('won_back', 'Price of 4 bits by start')}\n\n{table(head, cells)}\n\n"
        f"**Before training, 4 bits cost {span(rows['zero']['% more'])} % of perplexity. LoftQ's "
        f"start changes QLoRA's perplexity by {less[0]} %, the output-aware start by {less[1]} %.**"
    )
    names = price.TRAINED
    trained = tuned_rows(("lora-r8", *names.values()))
    words = []
    for start in ("loftq", "output_aware"):
        percents, seeds = difference(trained, names[start], names["zero"])
        if percents:
            word = verdict(percents, seeds)
            words.append(f"{price.LABELS[start]}: {word}, {span(percents)} % (seeds: {seeds})")
    if not words:
        return f"{text}\n\nAfter training: {waits('starts')}"
    percents, seeds = difference(trained, names["zero"], "lora-r8")
    return (
        f"{text}\n\n**After training, QLoRA's perplexity is {span(percents)} % above LoRA's "
        f"(seeds: {seeds}). The starts against QLoRA's:** {'; '.join(words)}.{cautions(trained)}"
    )


def storage():
    if not (RESULTS / "storage.json").exists():
        return waits("storage")
    rows, lines = load("storage")["rows"], []
    for name, label in stores.NAMES.items():
        own = [row for row in rows if row["name"] == name]
        if own:
            shares = [f"{100 * mean(r[key] for r in own):.1f}" for key in ("recall", "head recall")]
            weights = f"{mean(row['weights'] for row in own):,.0f}"
            bits = span(interval([*stores.per_weight(name, rows).values()]), "{:.2f}")
            lines.append([label, weights, *shares, bits, len(own)])
    hira, lora = (stores.per_weight(name, rows) for name in ("hira-r8", "lora-r8"))
    more = span(interval([hira[seed] - lora[seed] for seed in hira]))
    head = ["adapter", "weights left", "labels recalled beyond the head, %", "by the head, %"]
    head += ["bits per weight", "seeds"]
    return (
        f"{image('storage', 'Bits stored per weight')}\n\n{table(head, lines)}\n\n"
        f"**At rank 8, HiRA stores {more} bits per weight more than LoRA. With three seeds this is "
        "exploratory and carries no verdict.**"
    )


def layers():
    rows = tuned_rows(places.PLACES)
    words = []
    for name in list(places.PLACES)[1:]:
        percents, seeds = difference(rows, name, "lora-r8")
        if percents:
            word = verdict(percents, seeds)
            words.append(f"{places.PLACES[name]}: {word}, {span(percents)} % (seeds: {seeds})")
    if not words:
        return waits("layers")
    return (
        f"{image('layers', 'Perplexity by the layers that are adapted')}\n\n"
        f"**Against an adapter on all layers, with equally many weights:** {'; '.join(words)}."
        f"{cautions(rows)}"
    )


def allocation():
    rows, words = tuned_rows(patterns.LABELS), []
    for name, other in (
        ("adalora_pattern-r2", "permuted-r2"),
        ("adalora_pattern-r2", "uniform-r2"),
        ("gradient-r2", "uniform-r2"),
        ("adalora-r2", "adalora_pattern-r2"),
    ):
        percents, seeds = difference(rows, name, other)
        if percents:
            pair = f"{patterns.LABELS[name]}, against {patterns.LABELS[other]}"
            words.append(f"{pair}: {verdict(percents, seeds)}, {span(percents)} % (seeds: {seeds})")
    if not words:
        return waits("allocation")
    return (
        f"{image('allocation', 'Perplexity by the pattern of ranks')}\n\n"
        f"**Plain LoRA with equally many weights:** {'; '.join(words)}.{cautions(rows)}"
    )
