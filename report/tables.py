"""Numbers to words and tables. A table is a list of rows, a row is {header: text}."""

import math
from collections import Counter

import numpy as np

from harness.text import printable
from report.results import SIGN, TESTED, margin_on_scale, shown

SCORES = {"classification": "accuracy, %", "mlm": "masked-LM perplexity"}
SCORES |= {"clm": "causal perplexity"}
MIB = 1 / 2**20
COSTS = (  # of the main table: header, path in a row's costs, factor, format
    ("trained weights", "parameters.trainable", 1, ",.0f"),
    ("peak MiB", "memory.train.peak", MIB, ",.0f"),
    ("GFLOP per step", "flops.step", 1e-9, ",.1f"),
    ("adapter MiB", "disk.adapter", MIB, ",.2f"),
    ("training s", "time.train_seconds", 1, ",.1f"),
    ("inference examples/s", "inference.32.as trained.samples_per_second", 1, ",.0f"),
)
UNITS = {"memory": (", MiB", MIB), "disk": (", MiB", MIB), "flops": (", GFLOP", 1e-9)}
PLAN = (
    " For smaller ones plan a new study with new seeds. Adding seeds to this one until a verdict "
)
PLAN += "appears raises false verdicts from 5 to 11 %."
VERDICTS = ("better", "equal", "undecided", "none")


def amount(group, text, full=False):
    """A size with its unit: "1 point", "0.67 points", "2 %"; full: "2 % in perplexity"."""
    if group.task != "classification":
        return f"{text} %" + " in perplexity" * full
    return f"{text} point" + "s" * (text != "1")


def number(x, form):
    return f"{x:{form}}" if math.isfinite(x) else ""


def with_interval(x, ends, form):
    both = f" ({ends[0]:{form}} to {ends[1]:{form}})" if math.isfinite(ends[0]) else ""
    return number(x, form) + both


def listing(words):
    """Words as "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def detected(group):
    """The smallest difference that the study detects, rounded up."""
    return amount(group, f"{math.ceil(group.detectable[0] * 10) / 10:g}", True)


def verdicts(group):
    """[(beginning, rest)] of the sentences on top: verdicts, and what is detected."""
    said, pairs = [], group.pairs
    better, equal, undecided, none = ([p for p in pairs if p.verdict == x] for x in VERDICTS)
    for name in dict.fromkeys(pair.ahead for pair in better):
        beaten = []
        for pair in (pair for pair in better if pair.ahead == name):
            size, low, high = (f"{x:.2f}" for x in pair.lead)
            span = f"95 % interval {low} to {high}" + "; the 90 % one is in the margin" * pair.equal
            other = pair.a if pair.b == name else pair.b
            beaten.append(f"than {other} by {amount(group, size)} ({span})")
        of = "" if group.task == "classification" else " in perplexity"
        said.append((f"{name} is better", f"{of} {listing(beaten)}."))
    if equal:
        which = "; ".join(f"{pair.a} and {pair.b}" for pair in equal)
        if len(equal) == len(pairs) > 1:
            which = f"every pair of {listing([row.label for row in group.rows if row.tested])}"
        widest = max(abs(end) for pair in equal for end in pair.intervals["90 %, both"])
        rest = f" {which}. No 90 % interval exceeds {amount(group, f'{widest:.2f}')}."
        said.append((f"Equal within {amount(group, f'{group.margin:g}', True)}:", rest))
    if undecided:
        sizes = [f"{p.a} − {p.b}: {amount(group, f'{p.mean:+.2f}')}" for p in undecided]
        said.append(("Undecided:", f" {'; '.join(sizes)}."))
    for why in dict.fromkeys(pair.why for pair in none):
        which = [f"{pair.a} and {pair.b}" for pair in none if pair.why == why]
        which = "any pair" if len(which) == len(pairs) else "; ".join(which)
        said.append(("No verdict", f" on {which}: {why}."))
    if not pairs:
        said.append(("No verdict:", " fewer than two of the four methods can be compared."))
    if group.detectable:
        pair = group.detectable[1]
        seen = f"With {len(pair.seeds)} seeds and {pair.examples:,} test examples this study "
        seen += f"detects differences of {detected(group)} or more (80 % power; worst pair: "
        seen += f"{pair.a} − {pair.b})." + PLAN * bool(undecided)
        said.append(("", seen))
    return said


def versus_lora(group):
    """How the other tested methods compare with LoRA, as the title of a plot."""
    words, near = {"better": "better than LoRA", "worse": "worse than LoRA"}, f"{group.margin:g}"
    words |= {"equal": f"within {amount(group, near)} of LoRA", "undecided": "undecided"}
    labels = {verdict: [] for verdict in [*words, "none"]}
    for pair in (pair for pair in group.pairs if group.lora and pair.a == group.lora.label):
        worse = pair.verdict == "better" and pair.ahead == pair.a
        labels["worse" if worse else pair.verdict].append(pair.b)
    said = [f"{listing(labels[key])} {words[key]}" for key in words if labels[key]]
    return "; ".join(said) or "Difference from LoRA, no verdict"


def cautions(rows, task, margin):
    """Sentences on what makes the comparison less fair than it looks."""
    said, trained = [], [row for row in rows if not row.run.untrained]
    tested = [row for row in trained if row.tested]

    def say(words, facts):
        facts = [f"{label}: {fact}" for label, fact in facts.items() if fact]
        if facts:
            said.append(f"{words} {'; '.join(facts)}.")

    methods = {row.run.method for row in tested}
    others = [row.label for row in trained if row.run.method in {*TESTED} - methods]
    if others:
        said.append(f"Not tested, as rank, alpha, dropout or layers differ: {listing(others)}.")
    keys = {}
    for row in trained:
        for seed, seen in row.split_keys.items():
            keys.setdefault(seed, set()).update(seen)
    if odd := [str(seed) for seed in sorted(keys) if len(keys[seed]) > 1]:
        said.append(f"Not all saw the same training and dev examples at seed {', '.join(odd)}.")
    once = {row.label: f"{row.lrs[0]:g}" for row in tested if len(row.lrs) == 1}
    say("Not tuned: there is one learning rate only.", once)
    edges, far = {}, {}
    for row in trained:
        count, runs = len(row.picked), row.picked.values()
        often = sum(run.lr in (row.lrs[0], row.lrs[-1]) for run in runs)
        if len(row.lrs) > 1 and often > count / 3:
            edges[row.label] = f"in {often} of {count} seeds"
        median = np.median([run.test for run in runs]) if runs else 0
        lost = {run.seed: SIGN[task] * (median - run.test) for run in runs}
        lost = [str(seed) for seed, x in lost.items() if x > 3 * margin_on_scale(margin, task)]
        far[row.label] = f"seed {', '.join(lost)}" if lost and count > 2 else ""
    say("The learning-rate grid may be too narrow: its lowest or highest value was picked.", edges)
    say("Far out: more than three margins worse than the method's median.", far)
    say("Left out.", {row.label: ", ".join(row.left_out) for row in trained})
    for key in sorted({key for row in tested for key in row.run.settings}):
        known = {row.label: row.run.settings for row in tested if key in row.run.settings}
        values = {label: shown(settings[key]) for label, settings in known.items()}
        if len(set(values.values())) > 1:
            say(f"--{shown(key)} differs.", values)
    machines = {}
    for machine, label in ((run.machine, row.label) for row in rows for run in row.picked.values()):
        machines.setdefault(machine, {})[label] = None
    if len(machines) > 1:
        on = {machine: listing(list(labels)) for machine, labels in sorted(machines.items())}
        say("Not all ran on the same machine and libraries.", on)
    return said


def main_table(group):
    """Tuned score, difference from LoRA, costs: the table below the verdicts."""
    score, unit = SCORES[group.task], "points" if group.task == "classification" else "%"
    table, lr = [], None
    if group.lora:  # the learning rate with its best mean dev score
        means = {lr: SIGN[group.task] * np.mean(dev) for lr, dev in group.lora.dev.items() if dev}
        lr = max(means, key=means.get)
    for row in group.rows:
        counts = "" if row.run.untrained else f"{len(row.lrs)} × {len(row.picked)}"
        cells = {"method": row.label, "lrs × seeds": counts}
        cells[score] = with_interval(row.score, row.interval, ".2f")
        cells[f"same settings: lr {lr:g}" if lr else ""] = number(row.test.get(lr, math.nan), ".2f")
        cells[f"minus LoRA, {unit}"] = ""
        if (pair := group.versus_lora.get(row.label)) and pair.each:
            minus = with_interval(pair.mean, pair.intervals["95 %, both"], "+.2f")
            cells[f"minus LoRA, {unit}"] = minus
        table.append(cells | main_costs(row))
    return table


def main_costs(row):
    """{header: text} of the costs in the main table."""
    costs = [(head, row.costs.get(path, math.nan) * x, form) for head, path, x, form in COSTS]
    return {head: number(cost, form) for head, cost, form in costs}


def means_table(group):
    """Means of all that was measured in the tuned runs, and settings: a column per row."""
    table = []
    for path in dict.fromkeys(path for row in group.rows for path in row.costs):
        kind, *parts = path.replace("_", " ").split(".")
        if "as trained" not in parts:  # unmerged, or the base
            unit, factor = UNITS.get(kind, ("", 1))
            cells = {"mean": printable(f"{kind}: {' '.join(parts)}{unit}", 80)}
            for row in group.rows:
                x = row.costs.get(path, math.nan) * factor
                cells[row.label] = number(x, ",.0f" if abs(x) >= 1000 else ".4g")
            table.append(cells)
    for key in sorted({key for row in group.rows for key in row.run.settings}):
        cells = {row.label: shown(row.run.settings.get(key, "")) for row in group.rows}
        table.append({"mean": printable(f"--{key}")} | cells)
    return table


def lr_table(group):
    """Mean dev score at each learning rate, and in how many seeds it was picked."""
    table = []
    for row in (row for row in group.rows if not row.run.untrained):
        picked, cells = Counter(run.lr for run in row.picked.values()), []
        for lr, dev in row.dev.items():
            mean = f"{sum(dev) / len(dev):.2f}" if dev else "diverged"
            cells.append(f"{lr:g}: {mean}" + (f" ({picked[lr]} ×)" if picked[lr] else ""))
        table.append({"method": row.label, "learning rate: dev score (picked)": "; ".join(cells)})
    return table


def pair_table(pairs):
    """Every statistic of every pair; pairs that are not tested have no p."""
    table = []
    for pair in (pair for pair in pairs if pair.each):
        cells = {"pair": f"{pair.a} − {pair.b}", "seeds": str(len(pair.seeds))}
        cells["difference"] = f"{pair.mean:+.2f}"
        cells |= {key: f"{x:+.2f} to {y:+.2f}" for key, (x, y) in pair.intervals.items()}
        for head, p in (("seeds", pair.p_seeds), ("both", pair.p), ("Holm", pair.p_holm)):
            cells[f"p, {head}"] = number(p, ".2g") if pair.verdict else ""
        better = f"{pair.ahead} better"
        table.append(cells | {"verdict": better if pair.verdict == "better" else pair.verdict})
    return table


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
