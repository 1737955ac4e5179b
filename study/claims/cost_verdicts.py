"""What the results about 4 bits and sparsity say, as Markdown: a function for each mark."""

from study.claims.shared import RESULTS, WAITS, decided, load, mean, span, table

CHOICES = ("exact", "sample", "svd", "chance")


def formats():
    rows, cells = load("formats")["rows"], []
    for row in (row for row in rows if not row["double"] and not row["shift"]):
        versus = span(row["% more than NF4"]) if "% more than NF4" in row else "–"
        errors = [f"{mean(row[f'{kind} error, %']):.1f}" for kind in ("weight", "output")]
        more = span(row["perplexity, % more"])
        cells.append([row["format"], row["size"], f"{row['bits']:.2f}", *errors, more, versus])
    head = ["format", "block", "bits", "error of weights, %", "of outputs, %"]
    head += ["perplexity above fp32, %", "above NF4, %"]
    verdicts = {"NF4 is better": [], "NF4 is worse": [], "undecided": []}
    for row in (row for row in rows if not row["double"] and row["size"] == 64):
        if "% more than NF4" in row and not row["shift"]:
            word = decided(row["% more than NF4"], "NF4 is better", "NF4 is worse")
            verdicts[word].append(f"{row['format']} {span(row['% more than NF4'])} %")
    words = "; ".join(f"{word} ({', '.join(names)})" for word, names in verdicts.items() if names)
    ends = {}
    for row in (row for row in rows if row["double"]):
        ends.setdefault(row["format"], []).extend(row["% more than single"][1:])
    moved = [f"{name} {min(x):+.2f} to {max(x):+.2f} %" for name, x in ends.items()]
    return (
        f"{table(head, cells)}\n\n**In blocks of 64, compared by perplexity with "
        f"NF4's:** {words}.\n\n"
        "**Double quantization saves 0.37 bits a weight in blocks of 64 and changes the perplexity "
        f"by** (widest ends of the intervals) {', '.join(moved)}."
    )


def memory():
    rows, lines, verdicts = load("memory")["rows"], [], []
    ways = sorted({(row["recomputed"], row["tokens"]) for row in rows})
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = {(row["recomputed"], row["tokens"]): row for row in rows if row["shape"] == shape}
        saved = [1 - own[way]["qlora GiB"] / own[way]["lora GiB"] for way in ways]
        lines.append([shape, *(f"{100 * part:.0f}" for part in saved)])
    for tokens in sorted({row["tokens"] for row in rows}):
        sizes = []
        for again in (False, True):
            part = [r for r in rows if (r["recomputed"], r["tokens"]) == (again, tokens)]
            enough = [row["shape"] for row in part if row["qlora GiB"] < 0.75 * row["lora GiB"]]
            sizes.append(enough[0] if enough else "no size here")
        verdicts.append(f"with {tokens:,} tokens a batch {sizes[0]} ({sizes[1]} if recomputed)")
    head = ["saved, %", *(f"{tokens:,} tokens{', recomputed' * again}" for again, tokens in ways)]
    return (
        f"{table(head, lines)}\n\n**From which size does QLoRA save a quarter or more?** "
        f"{'; '.join(verdicts)}."
    )


def channels():
    lines = []
    for dataset, word in (("sst2", "SST-2"), ("wikitext2", "WikiText-2")):
        shares = load("channels")["shares"][dataset]
        best, *others = ([mean(block) for block in shares[way]] for way in CHOICES)
        parts = [100 * mean(a / b for a, b in zip(way, best, strict=True)) for way in others]
        lines.append([word, f"{100 * min(best):.0f} to {100 * max(best):.0f}"])
        lines[-1] += [f"{part:.0f}" for part in parts]
    head = ["", "best choice, % of all energy", "% of the best: our sample", "rank-8 SVD", "random"]
    return table(head, lines)


def step_times():
    if not (RESULTS / "step_times.json").exists():
        return WAITS
    names = {"qlora": "QLoRA", "hira": "HiRA", "contextual_lora": "contextual LoRA"}
    rows = [row for row in load("step_times")["rows"] if row["way"] in names]
    speeds = [[1 / row["time"][i] for i in (0, 2, 1)] for row in rows]  # median, quartiles
    cells = [
        [f"{row['width']:,}", names[row["way"]], span(speed, "{:.2f}"), f"{1 / row['flops']:.2f}"]
        for row, speed in zip(rows, speeds, strict=True)
    ]
    head = ["width", "method", "relative speed (quartiles), LoRA = 1", "predicted by operations"]
    faster = [
        f"{1 / row['time'][0]:.2f} at width {row['width']:,}"
        for row in rows
        if row["way"] == "contextual_lora" and row["time"][2] < 1
    ]
    verdict = "Contextual LoRA is not faster than LoRA at any width here."
    if faster:
        verdict = f"Contextual LoRA is faster than LoRA: by a factor of {', '.join(faster)}."
    image = "![Relative speed over the width](../study/claims/results/step_times.png)"
    return f"{image}\n\n{table(head, cells)}\n\n**{verdict}**"
