"""Numbers to words and tables. A table is a list of rows, a row is {header: text}.

The numbers come from compare.analyse (a group is one of its dicts); here they get their form.
"""

import math

from harness.results import DATASETS, DEMOS, METRICS

SCORES = {"accuracy": "accuracy, %", "mlm_perplexity": "masked-LM perplexity"}
SCORES |= {"causal_perplexity": "causal perplexity"}
MIB = 1 / 2**20
# columns: (header, place in a row's costs, factor, form)
COLUMNS = (
    ("trained weights", "parameters.trainable", 1, ",.0f"),
    ("peak MiB", "memory.train.peak", MIB, ",.0f"),
    ("GFLOP a step", "flops.step", 1e-9, ",.1f"),
    ("adapter MiB", "disk.adapter", MIB, ",.2f"),
    ("training s", "time.train_seconds", 1, ",.1f"),
    ("inference rows/s", "inference.32.as trained.samples_per_second", 1, ",.0f"),
)
DETAILS = (  # (heading, beginning of the places, factor)
    ("Scores", "metrics", 1),
    ("Parameters", "parameters", 1),
    ("Memory in training, MiB", "memory.train", MIB),
    ("Memory in inference, MiB", "memory.inference", MIB),
    ("Work, GFLOP", "flops", 1e-9),
    ("Disk, MiB", "disk", MIB),
    ("Training time", "time", 1),
    ("Inference, one row", "inference.1", 1),
    ("Inference, 32 rows", "inference.32", 1),
)


# ---------------------------------------------------------------------------------- words, numbers


def title(g):
    name = (DATASETS | DEMOS).get(g["dataset"], g["dataset"])
    return f"{name} with {g['model']}{g.get('apart', '')}"


def tell_apart(groups):
    """Where groups have one title, add to each what they differ in."""
    titles = [title(g) for g in groups]
    for words in set(titles):
        alike = [g for g, own in zip(groups, titles, strict=True) if own == words]
        facts = list(zip(*map(group_facts, alike), strict=True))  # of each kind, the groups' own
        for i, g in enumerate(alike):
            differ = [found[i] for found in facts if len(set(found)) > 1]
            g["apart"] = f" ({', '.join(differ)})" if differ else ""


def group_facts(g):
    """What two groups of runs may differ in, in words."""
    run, data = g["_runs"][0], g["data"]
    flags = run["settings"]
    return [
        f"{data['train']:,} rows",
        f"{data['dev']:,} dev rows",
        f"{flags['epochs']} epochs",
        f"--max_steps {flags['max_steps']}",
        f"{run['rows_a_step']} rows a step",
        f"{flags['max_length']} tokens",
        f"--head_lr {flags['head_lr']:g}",
        f"base {run['base']['sha256'][:6]}",
        f"{data['test']:,} test rows, {data['test_sha256'][:6]}",
    ]


def score_words(g):
    return SCORES[METRICS[g["task"]]]


def amount(g, text):
    """A size with its unit: "1 point", "0.67 points", "2 %"."""
    if g["task"] != "classification":
        return f"{text} %"
    return f"{text} point" if text == "1" else f"{text} points"


def kind(g):
    """What a percentage is of, once in a sentence."""
    return "" if g["task"] == "classification" else " in perplexity"


def margin(g):
    return amount(g, f"{g['margin']:g}") + kind(g)


def number(x, form):
    return f"{x:{form}}" if x is not None and math.isfinite(x) else ""


def span(ends, form):
    return f"{ends[0]:{form}} to {ends[1]:{form}}" if math.isfinite(ends[0]) else ""


def with_span(x, ends, form):
    inside = span(ends, form)
    return f"{x:{form}} ({inside})" if inside else number(x, form)


def minus(pair):
    """A difference and its interval, where there are two shared seeds or more."""
    return with_span(pair["mean"], pair["intervals"]["both"], "+.2f") if pair["intervals"] else ""


def listing(words):
    """Words as "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def needs(pair):
    """What would bring an undecided pair a verdict."""
    if pair["needs"] is None:
        return "not even 100 seeds and a million test rows would decide"
    seeds, rows = pair["needs"]
    more = [f"{seeds} seeds"] if seeds > len(pair["seeds"]) else []
    more += [f"{float(f'{rows:.2g}'):,.0f} test rows"] if rows > pair["test_rows"] else []
    return f"about {listing(more)} would decide"


def verdicts(g):
    """The sentences on top: who is better, who is equal, what is undecided and why."""
    said, pairs = [], g["pairs"]
    for name in dict.fromkeys(pair["better"] for pair in pairs if pair["verdict"] == "better"):
        beaten = []
        for pair in (pair for pair in pairs if pair["better"] == name):
            other = pair["b"] if pair["a"] == name else pair["a"]
            mean, low, high = pair["lead"]
            inside = "; the 90 % one lies within the margin" if pair["equal"] else ""
            size = f"{amount(g, f'{mean:.2f}')} (95 % interval {low:.2f} to {high:.2f}{inside})"
            beaten.append(f"than {other} by {size}")
        said.append(f"**{name} is better**{kind(g)} {listing(beaten)}.")
    equal = [pair for pair in pairs if pair["verdict"] == "equal"]
    if equal:
        which = "; ".join(f"{pair['a']} and {pair['b']}" for pair in equal)
        if len(equal) == len(pairs) > 1:
            which = f"every pair of {listing([row['label'] for row in g['rows'] if row['tested']])}"
        ends = [abs(end) for pair in equal for end in pair["intervals"]["both, 90 %"]]
        widest = amount(g, f"{max(ends):.2f}")
        said.append(
            f"**Equal within {margin(g)}:** {which}. No 90 % interval goes beyond {widest}."
        )
    found = []
    for pair in (pair for pair in pairs if pair["verdict"] == "undecided"):
        size = amount(g, f"{pair['mean']:+.2f}")
        found.append(f"{pair['a']} − {pair['b']}: {size} ({needs(pair)})")
    if found:
        said.append(f"**Undecided:** {'; '.join(found)}.")
    for why in dict.fromkeys(pair["why"] for pair in pairs if pair["verdict"] == "none"):
        found = [f"{pair['a']} and {pair['b']}" for pair in pairs if pair["why"] == why]
        which = "on any pair" if len(found) == len(pairs) else f"on {'; '.join(found)}"
        said.append(f"**No verdict** {which}: {why}.")
    if not pairs:
        said.append("**No verdict:** fewer than two of the four methods have runs of one variant.")
    if g["power"]:
        seeds, rows = g["power"]["seeds"], g["power"]["rows"]
        found, equal = (min(99, int(100 * g["power"][key])) for key in ("found", "equal"))
        said.append(
            f"At this spread, with {seeds} seeds and {rows:,} test rows, a true difference of "
            f"{margin(g)} is found in at least {found} % of studies, and a true 0 called equal in "
            f"at least {equal} %."
        )
    return said


def versus_lora(g):
    """How the other tested methods stand to LoRA, as the title of a picture."""
    found, tested = {}, [row for row in g["rows"] if row["tested"]]
    lora = [row["label"] for row in tested if row["method"] == "lora"]
    for pair in (pair for pair in g["pairs"] if pair["a"] in lora):
        verdict = "worse" if pair["better"] in lora else pair["verdict"]
        found.setdefault(verdict, []).append(pair["b"])
    unit = "point" if g["task"] == "classification" else "%"
    words = {"better": "better than LoRA", "worse": "worse than LoRA"}
    words |= {"equal": f"within {g['margin']:g} {unit} of LoRA", "undecided": "undecided"}
    said = [f"{listing(found[key])} {words[key]}" for key in words if key in found]
    return "; ".join(said) or "Beside LoRA, no verdict"


# ----------------------------------------------------------------------------------------- tables


def detail_table(g, start, factor):
    """Every mean number of the tuned runs whose place begins with `start`."""
    places = {place: None for row in g["rows"] for place in row["costs"]}
    places = [place for place in places if place.startswith(f"{start}.")]
    places = [place for place in places if "as trained" not in place]  # unmerged, or the base
    table = []
    for row in g["rows"]:
        cells = {"method": row["label"]}
        for place in places:
            x = row["costs"].get(place, math.nan) * factor
            head = place.removeprefix(f"{start}.").replace(".", " ").replace("_", " ")
            cells[head] = number(x, ",.0f" if abs(x) >= 1000 else ".4g")
        table.append(cells)
    return table if places else []


def main_table(g):
    """Tuned score, difference from LoRA, costs: the table below the verdicts."""
    score, unit = score_words(g), "points" if g["task"] == "classification" else "%"
    table = []
    for row in g["rows"]:
        cells = {
            "method": row["label"],
            "rates × seeds": ""
            if row["untrained"]
            else f"{len(row['rates'])} × {len(row['seeds'])}",
        }
        cells[score] = with_span(row["score"], row["interval"], ".2f")
        cells[f"minus LoRA, {unit}"] = minus(row["beside"]) if row["beside"] else ""
        for head, place, factor, form in COLUMNS:
            cells[head] = number(row["costs"].get(place, math.nan) * factor, form)
        table.append(cells)
    return table


def rate_table(g):
    """Mean dev score at each rate, and in how many seeds it was chosen."""
    table = []
    for row in (row for row in g["rows"] if not row["untrained"]):
        cells = []
        for rate, dev in row["dev"].items():
            often = row["chosen"].count(rate)
            cells.append(
                f"{rate:g}: {sum(dev) / len(dev):.2f}" + (f" ({often} ×)" if often else "")
            )
        table.append({"method": row["label"], "rate: dev score (chosen)": "; ".join(cells)})
    return table


def pair_table(pairs):
    """Every statistic of every pair; rows beside LoRA have no p."""
    table = []
    for pair in (pair for pair in pairs if pair["intervals"]):
        tested = pair["p_holm"] is not None
        verdict = f"{pair['better']} better" if pair["better"] else pair["verdict"]
        table.append(
            {
                "pair": f"{pair['a']} − {pair['b']}",
                "seeds": str(len(pair["seeds"])),
                "difference": f"{pair['mean']:+.2f}",
                "95 %, both noises": span(pair["intervals"]["both"], "+.2f"),
                "95 %, seeds": span(pair["intervals"]["seeds"], "+.2f"),
                "95 %, test rows": span(pair["intervals"]["rows"], "+.2f"),
                "90 %, both": span(pair["intervals"]["both, 90 %"], "+.2f"),
                "p, seeds": number(pair["p_seeds"], ".2g") if tested else "",
                "p, both": number(pair["p"], ".2g") if tested else "",
                "p, Holm": number(pair["p_holm"], ".2g") if tested else "",
                "verdict": verdict if tested else "",
            }
        )
    return table


def filled(table):
    """The headers of the columns that have an entry."""
    return [head for head in (table or [{}])[0] if any(row[head] for row in table)]


def markdown(table):
    """A table in Markdown, without empty columns."""
    heads = filled(table)
    if not heads:
        return ""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    lines += [[row[head] or "–" for head in heads] for row in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(table):
    """A table for the terminal."""
    heads = filled(table)
    if not heads:
        return ""
    lines = [heads, *([row[head] or "–" for head in heads] for row in table)]
    wide = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    lines = [[line[0].ljust(wide[0]), *map(str.rjust, line[1:], wide[1:])] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def settings_table(g):
    """The settings of each row, in groups of what the row has."""
    keys = sorted({key for row in g["rows"] for key in row["settings"]})
    table = []
    for row in g["rows"]:
        texts = {key: str(row["settings"].get(key, "")) for key in keys}
        table.append({"method": row["label"], **texts})
    return table


def environment_table(g):
    """Where the runs were made, with which code: a line for each place, with its number of runs."""
    keys = ("device", "cpu", "processes", "threads", "torch", "transformers", "bitsandbytes")
    places = []
    for run in g["_runs"]:
        found = run["environment"]
        commit = str(found.get("commit"))[:12] + (" (changed)" if found.get("dirty") else "")
        places.append((*(str(found.get(key)) for key in keys), commit))
    heads = (*keys, "commit", "runs")
    lines = [(*place, str(places.count(place))) for place in sorted(set(places))]
    return [dict(zip(heads, line, strict=True)) for line in lines]
