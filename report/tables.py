"""Numbers to sentences and tables. A table is a list of rows, a row is {header: text}."""

import math

import numpy as np

from harness.text import printable
from report.results import SIGN, TESTED, facts, margin_on_scale, shown

SCORES = {"classification": "accuracy, %", "mlm": "masked-LM perplexity"}
SCORES |= {"clm": "causal perplexity"}
MIB = 2**20
UNITS = {"memory": ("MiB", MIB), "disk": ("MiB", MIB), "flops": ("GFLOP", 1e9)}
PLAN = (
    " To detect a smaller difference, plan a new study with new seeds. Do not add seeds to this one"
    " until a verdict appears: that raises the share of false verdicts from 5 to 11 %."
)
VERDICTS = ("better", "equal", "undecided", "none")
FACTS = {"train": "training examples", "dev": "dev examples", "test": "test examples"}
FACTS |= {"tokens": "tokens per example", "epochs": "epochs", "batch": "examples per step"}


def amount(group, text, full=False):
    """A size with its unit: "1 point", "0.67 points", "2 %"; full: "2 % in perplexity"."""
    if group.task != "classification":
        return f"{text} %" + " in perplexity" * full
    return f"{text} point" + "s" * (text != "1")


def number(x, form):
    return f"{x:{form}}" if math.isfinite(x) else ""


def with_interval(x, ends, form):
    interval = f" ({ends[0]:{form}} to {ends[1]:{form}})" if math.isfinite(ends[0]) else ""
    return number(x, form) + interval


def file_size(size):
    """Bytes as text: "3.3 KiB", "0.29 MiB"."""
    return f"{size / MIB:,.2f} MiB" if size >= 0.05 * MIB else f"{size / 1024:,.1f} KiB"


def listing(names):
    """Names as "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def detected(group):
    """The smallest difference that the study detects, rounded up."""
    return amount(group, f"{math.ceil(group.detectable[0] * 10) / 10:g}", True)


def verdicts(group):
    """[(beginning, rest)] of the sentences on top: verdicts, and what is detected."""
    sentences, pairs = [], group.pairs
    better, equal, undecided, none = ([p for p in pairs if p.verdict == x] for x in VERDICTS)
    for name in dict.fromkeys(pair.ahead for pair in better):
        beaten = []
        for pair in (pair for pair in better if pair.ahead == name):
            size, low, high = (f"{x:.2f}" for x in pair.lead)
            interval = f"95 % interval {low} to {high}"
            interval += "; the 90 % interval is inside the margin" * pair.equal
            other = pair.a if pair.b == name else pair.b
            beaten.append(f"than {other} by {amount(group, size)} ({interval})")
        of = "" if group.task == "classification" else " in perplexity"
        sentences.append((f"{name} is better", f"{of} {listing(beaten)}."))
    if equal:
        which = "; ".join(f"{pair.a} and {pair.b}" for pair in equal)
        if len(equal) == len(pairs) > 1:
            which = f"every pair of {listing([row.label for row in group.rows if row.tested])}"
        widest = max(abs(end) for pair in equal for end in pair.intervals["90 % interval"])
        rest = f" {which}. Each of these pairs differs by at most {amount(group, f'{widest:.2f}')}"
        start = f"Equal within {amount(group, f'{group.margin:g}', True)}:"
        sentences.append((start, f"{rest} (90 % intervals)."))
    if undecided:
        sizes = [f"{p.a} − {p.b}: {amount(group, f'{p.mean:+.2f}')}" for p in undecided]
        sentences.append(("Undecided:", f" {'; '.join(sizes)}."))
    for why in dict.fromkeys(pair.why for pair in none):
        which = [f"{pair.a} and {pair.b}" for pair in none if pair.why == why]
        which = "any pair" if len(which) == len(pairs) else "; ".join(which)
        sentences.append(("No verdict", f" on {which}: {why}."))
    if not pairs:
        sentences.append(("No verdict:", " fewer than two of the four methods can be compared."))
    if group.detectable:
        pair = group.detectable[1]
        text = f"With {len(pair.seeds)} seeds and {pair.examples:,} test examples this study "
        text += f"detects differences of {detected(group)} or more with 80 % power, also for the "
        text += f"pair that varies most ({pair.a} and {pair.b})." + PLAN * bool(undecided)
        sentences.append(("", text))
    return sentences


def cautions(rows, task, margin):
    """Sentences on what makes the comparison less fair than it looks."""
    sentences, trained = [], [row for row in rows if not row.run.untrained]
    tested = [row for row in trained if row.tested]

    def add(start, details):
        details = [f"{label}: {detail}" for label, detail in details.items() if detail]
        if details:
            sentences.append(f"{start} {'; '.join(details)}.")

    methods = {row.run.method for row in tested}
    if others := [row.label for row in trained if row.run.method in {*TESTED} - methods]:
        why = "because rank, alpha, dropout or target layers are not those of the other methods"
        sentences.append(f"No verdict on {listing(others)}, {why}.")
    keys = {}
    for row in trained:
        for seed, split_keys in row.split_keys.items():
            keys.setdefault(seed, set()).update(split_keys)
    if seeds := [str(seed) for seed in sorted(keys) if len(keys[seed]) > 1]:
        same = "Not all methods had the same training and dev examples"
        sentences.append(f"{same} at seed {', '.join(seeds)}.")
    once = {row.label: f"{row.lrs[0]:g}" for row in tested if len(row.lrs) == 1}
    add("Not tuned, because only one learning rate was tried.", once)
    edges, low = {}, {}
    for row in trained:
        count, runs = len(row.picked), row.picked.values()
        often = sum(run.lr in (row.lrs[0], row.lrs[-1]) for run in runs)
        if len(row.lrs) > 1 and often > count / 3:
            edges[row.label] = f"in {often} of {count} seeds"
        median = np.median([run.test for run in runs]) if runs else 0
        behind = {run.seed: SIGN[task] * (median - run.test) for run in runs}
        seeds = [str(seed) for seed, x in behind.items() if x > 3 * margin_on_scale(margin, task)]
        low[row.label] = f"seed {', '.join(seeds)}" if seeds and count > 2 else ""
    add("The learning-rate grid may be too narrow: its lowest or highest value was picked.", edges)
    limit = f"{3 * margin:g} {'points' if task == 'classification' else '%'}"
    add(f"Training went wrong: more than {limit} worse than the method's median.", low)
    add("Left out.", {row.label: ", ".join(row.left_out) for row in trained})
    for key in sorted({key for row in tested for key in row.run.settings}):
        settings = {row.label: row.run.settings for row in tested if key in row.run.settings}
        values = {label: shown(setting[key]) for label, setting in settings.items()}
        if len(set(values.values())) > 1:
            add(f"--{shown(key)} differs.", values)
    machines = {}
    for machine, label in ((run.machine, row.label) for row in rows for run in row.picked.values()):
        machines.setdefault(machine, {})[label] = None
    if len(machines) > 1:
        labels = {machine: listing(list(on)) for machine, on in sorted(machines.items())}
        add("The runs were made on different machines or versions of the libraries.", labels)
    return sentences


def main_table(group):
    """Tuned score, difference from LoRA, costs: the table below the verdicts."""
    unit = "points" if group.task == "classification" else "%"
    table, lr = [], None
    if group.lora and len(group.lora.lrs) > 1:  # the learning rate with its best mean dev score
        means = {lr: SIGN[group.task] * np.mean(dev) for lr, dev in group.lora.dev.items() if dev}
        lr = max(means, key=means.get)
    for row in group.rows:
        counts = "" if row.run.untrained else f"{len(row.lrs)} × {len(row.picked)}"
        cells = {"method": row.label, "learning rates × seeds": counts}
        cells[SCORES[group.task]] = with_interval(row.score, row.interval, ".2f")
        cells[f"at learning rate {lr:g}" if lr else ""] = number(row.test.get(lr, math.nan), ".2f")
        pair, minus = group.versus_lora.get(row.label), ""
        if pair and pair.each:
            minus = with_interval(pair.mean, pair.intervals["95 % interval"], "+.2f")
        table.append(cells | {f"minus LoRA, {unit}": minus} | main_costs(row))
    return table


def main_costs(row):
    """{header: text} of the costs in the main table."""
    paths = ("parameters.trainable", "memory.train.peak", "flops.step", "disk.adapter")
    weights, peak, flops, disk = (row.costs.get(path, math.nan) for path in paths)
    return {
        "trained weights": number(weights, ",.0f"),
        "peak MiB": number(peak / MIB, ",.0f"),
        "GFLOP per step": number(flops / 1e9, ",.1f"),
        "adapter file": file_size(disk) if math.isfinite(disk) else "",
    }


def means_table(group):
    """Means of what was measured in the tuned runs, except times: a column per row."""
    table = []
    for path in dict.fromkeys(path for row in group.rows for path in row.costs):
        kind, *parts = path.replace("_", " ").split(".")
        unit, factor = UNITS.get(kind, ("", 1))
        cells = {"mean": printable(f"{kind}: {' '.join(parts)}{', ' * bool(unit)}{unit}", 80)}
        for row in group.rows:
            x = row.costs.get(path, math.nan) / factor
            cells[row.label] = number(x, ",.0f" if abs(x) >= 1000 else ".4g")
        if {*list(cells.values())[1:]} - {"", "0"}:
            table.append(cells)
    return table


def pair_table(pairs):
    """Every statistic of every pair; pairs that are not tested have no p."""
    table = []
    for pair in (pair for pair in pairs if pair.each):
        cells = {"pair": f"{pair.a} − {pair.b}", "seeds": str(len(pair.seeds))}
        cells["difference"] = f"{pair.mean:+.2f}"
        cells |= {key: f"{x:+.2f} to {y:+.2f}" for key, (x, y) in pair.intervals.items()}
        for head, p in (("p, seeds only", pair.p_seeds), ("p", pair.p), ("Holm's p", pair.p_holm)):
            cells[head] = number(p, ".2g") if pair.verdict else ""
        better = f"{pair.ahead} better"
        table.append(cells | {"verdict": better if pair.verdict == "better" else pair.verdict})
    return table


def does_order_hold(study, repeat):
    """What a repeat changes, and whether the order of the tested methods holds."""
    ours, theirs = (facts(group.runs[0]) for group in (repeat, study))
    keys = [key for key in FACTS if ours[key] != theirs[key]]
    changes = [f"{FACTS[key]} {ours[key]} instead of {theirs[key]}" for key in keys]
    orders = []
    for group, other in ((repeat, study), (study, repeat)):
        kinds = {row.run.kind for row in other.rows if row.tested}
        rows = [row for row in group.rows if row.tested and row.run.kind in kinds]
        rows.sort(key=lambda row: -SIGN[group.task] * row.score)
        orders.append([row.run.kind for row in rows])
    text = f"Changed: {listing(changes)}. Best score first: {', '.join(orders[0])}. "
    if orders[0] == orders[1]:
        return f"{text}The order holds."
    text += f"The order does not hold: above it is {', '.join(orders[1])}."
    certain = any(pair.verdict == "better" for pair in study.pairs)
    return text if certain else f"{text} No difference is certain there, so it may be chance."


def cells_of(table):
    """[[text]] of a table with its headers, without empty columns."""
    heads = [head for head in (table or [{}])[0] if any(row[head] for row in table)]
    return [heads, *([row[head] or "–" for head in heads] for row in table)] if heads else []


def plain(table):
    """A table for the terminal."""
    lines = cells_of(table)
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [[line[0].ljust(wide[0]), *map(str.rjust, line[1:], wide[1:])] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in lines)
