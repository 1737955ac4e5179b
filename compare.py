"""Tune, pair, test, judge: which method is better, is the difference real, what does it cost?

    python compare.py results/            prints the verdicts; writes results/README.md

For each seed and method the learning rate with the best dev score is picked, and that run's test
score counts. Then every pair of the four methods is compared, paired by seed and by test example:
accuracies in points, perplexities by differences of 100·ln(perplexity).
"""

import argparse
import math
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats

from harness.process import fail
from harness.text import printable
from report import page, plots, results, tables, times
from report.results import (
    SIGN,
    Group,
    Pair,
    Row,
    difference_from_scale,
    margin_on_scale,
    score_from_scale,
)

SEEDS = 6  # at least as many are needed for a verdict
TEXT_GROUPS = 30  # of neighboring test blocks; study/article_noise.py compares with articles
REPEATS = ("full_data", "longer")  # beginnings of file names, as in study/run.sh


def squared_errors(d):
    """Squared standard errors of the mean of d (n seeds, m examples): [seeds, examples, rest].

    Seeds: s²/n of the seeds' means, as in a paired t-test. Examples: s²/m of the examples' means.
    Both include the rest, the variance that belongs to neither alone, over n·m (mean squares of a
    two-way layout with random effects).
    """
    n, m = d.shape
    seeds, examples = d.mean(1), d.mean(0)
    rest = ((d - seeds[:, None] - examples + d.mean()) ** 2).sum() / ((n - 1) * (m - 1))
    return np.array([seeds.var(ddof=1) / n, examples.var(ddof=1) / m, rest / (n * m)])


def combined_error(squared, n, m):
    """(standard error, degrees of freedom) of a mean over new seeds and new examples at once.

    seeds + examples - rest, as both include the rest (Cornfield & Tukey 1956), and never less than
    either; degrees of freedom after Satterthwaite (1946). squared: as from squared_errors().
    """
    seeds, examples, rest = squared
    total = np.maximum(seeds + examples - rest, np.maximum(seeds, examples))
    spread = seeds**2 / (n - 1) + examples**2 / (m - 1) + rest**2 / ((n - 1) * (m - 1))
    return np.sqrt(total), np.where(total > 0, total**2 / np.where(total > 0, spread, 1), n - 1)


def two_sided(mean, error, df):
    """p of Student's t-test that a mean is 0; with an error of 0 it is 0, or 1 if the mean is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(2 * stats.t.sf(np.abs(mean) / error, df), nan=1.0)


def half_width(squared, n, m, level=0.95):
    """Half the interval of a difference: over seeds alone or over both, whichever is wider."""
    (error, df), tail = combined_error(squared, n, m), (1 + level) / 2
    alone = stats.t.ppf(tail, n - 1) * np.sqrt(squared[0])
    return np.maximum(alone, stats.t.ppf(tail, df) * error)


def judge(mean, squared, n, m, margin):
    """(p over seeds, p, equal) of a mean difference; numbers or arrays.

    p over seeds: the paired t-test. p: that one or the test over seeds and examples, whichever is
    larger, so a difference must exceed what training again changes and hold for other examples.
    equal: the 90 % intervals, over seeds and over both, lie within the margin: two one-sided tests
    at 5 % each (TOST, Schuirmann 1987).
    """
    (error, df), alone = combined_error(squared, n, m), np.sqrt(squared[0])
    p_seeds, largest = two_sided(mean, alone, n - 1), np.abs(mean) + half_width(squared, n, m, 0.9)
    return p_seeds, np.maximum(p_seeds, two_sided(mean, error, df)), largest < margin


def holm(p):
    """Holm's (1979) adjusted p of p (k,): the smallest times k, the next times k - 1, and so on."""
    p, order, adjusted = np.asarray(p, float), np.argsort(p), np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted


def detectable(squared, n, m, alpha, studies=20_000):
    """The smallest true difference that 80 % of such studies find at the level alpha.

    Simulated with a fixed seed: normal differences, whose mean squares are independent chi-squares.
    A study finds it where its mean, the difference and an error, exceeds the interval's half width.
    """
    rng, freedom = np.random.default_rng(0), (n - 1, m - 1, (n - 1) * (m - 1))
    true = np.maximum(squared, squared[2])  # both include the rest
    drawn = [x * rng.chisquare(df, studies) / df for x, df in zip(true, freedom, strict=True)]
    error = rng.normal(0, combined_error(true, n, m)[0], studies)
    return float(np.quantile(half_width(drawn, n, m, 1 - alpha) - error, 0.8))


def group_neighbors(d):
    """d (n, m blocks of running text) as (n, at most TEXT_GROUPS groups), with the same mean.

    Neighboring blocks are of one article, so they are not independent examples.
    """
    m, count = d.shape[1], min(d.shape[1], TEXT_GROUPS)
    return np.add.reduceat(d, np.arange(count) * m // count, axis=1) * (count / m)


def common_lrs(by_seed):
    """Of {seed: {lr: run}} the learning rates that count, and the seeds that have them all.

    First they leave enough seeds for a verdict, then they use most runs: so neither an extra
    learning rate at one seed nor an unfinished seed takes the verdict away. A single learning rate
    counts only where most seeds have no other: else it is a search that has not ended.
    """
    fixed = sum(len(by_lr) == 1 for by_lr in by_seed.values()) > len(by_seed) / 2
    counts, grids = Counter(lr for by_lr in by_seed.values() for lr in by_lr), []
    for least in set(counts.values()):
        lrs = sorted(lr for lr, count in counts.items() if count >= least)
        seeds = sorted(seed for seed, by_lr in by_seed.items() if by_lr.keys() >= set(lrs))
        enough = min(len(seeds), SEEDS) if len(lrs) > 1 or fixed else 0
        grids.append((enough, len(lrs) * len(seeds), lrs, seeds))
    return max(grids)[2:]


def make_row(runs, label, tested, machine):
    """The tuned Row of runs with one method and name; refuses other settings under that name."""
    first, task, by_seed = runs[0], runs[0].task, {}
    for run in runs:
        by_seed.setdefault(run.seed, {})[run.lr] = run
        for key in sorted(run.settings | first.settings):
            values = [x.settings.get(key) for x in (first, run)]
            if values[0] != values[1]:
                files = f"{printable(first.file, 120)} and {printable(run.file, 120)}"
                values = " and ".join(map(results.shown, values))
                same_name = f"{files} have the same name, {printable(run.name)}, but "
                fail(f"{same_name}{printable(key)} is {values}; give one of them another --name")
    lrs, seeds = common_lrs(by_seed)
    tried = {lr: [by_seed[seed][lr] for seed in seeds] for lr in lrs}
    finished = {lr: [run for run in tried[lr] if not run.diverged] for lr in lrs}
    picked = {}  # of equal dev scores that of the smallest learning rate
    for run in (run for lr in lrs for run in finished[lr]):
        best = picked.setdefault(run.seed, run)
        picked[run.seed] = run if SIGN[task] * run.dev > SIGN[task] * best.dev else best
    picked = dict(sorted(picked.items()))
    scores = [run.test for run in picked.values()]
    mean, half = (np.mean(scores) if picked else math.nan), math.nan
    if len(scores) > 1:
        half = stats.t.ppf(0.975, len(scores) - 1) * stats.sem(scores)
    incomplete, extra = sorted(by_seed.keys() - seeds), {run.lr for run in runs}.difference(lrs)
    left_out = [f"seed {seed} lacks learning rates" for seed in incomplete]
    left_out += [f"learning rate {lr:g} lacks seeds" for lr in sorted(extra)]
    diverged = {lr: len(seeds) - len(finished[lr]) for lr in lrs}
    left_out += [f"{count} diverged at {lr:g}" for lr, count in diverged.items() if count]
    interval = [score_from_scale(x, task) for x in (mean - half, mean + half)]
    dev = {lr: [score_from_scale(run.dev, task) for run in finished[lr]] for lr in lrs}
    test = {lr: np.mean([run.test for run in finished[lr]]) for lr in lrs if finished[lr]}
    test = {lr: score_from_scale(x, task) for lr, x in test.items()}
    costs = results.mean_costs(list(picked.values()), runs, machine)
    split_keys = {seed: {run.split_key for run in by_seed[seed].values()} for seed in picked}
    score = score_from_scale(mean, task), interval, dev, test
    return Row(label, first, tested, lrs, *score, costs, left_out, picked, split_keys)


def difference(a, b, task, margin):
    """The Pair of two rows over the seeds that both have; without statistics below two seeds."""
    seeds = [seed for seed in a.picked if seed in b.picked]
    pair = Pair(a=a.label, b=b.label, seeds=seeds)
    if len(seeds) < 2:
        return pair
    d = np.array([a.picked[seed].values - b.picked[seed].values for seed in seeds])  # (n, m)
    pair.examples, d = d.shape[1], d if task == "classification" else group_neighbors(d)
    (n, m), mean, squared = d.shape, d.mean(), squared_errors(d)
    if task == "classification":  # accuracy moves in steps of 100/m: the error is one or more
        squared[1] = max(squared[1], (100 / m) ** 2)
    bound = margin_on_scale(margin, task)
    pair.p_seeds, pair.p, pair.equal = (x.item() for x in judge(mean, squared, n, m, bound))
    halves = {
        "95 % interval": half_width(squared, n, m),
        "95 %, seeds only": stats.t.ppf(0.975, n - 1) * math.sqrt(squared[0]),
        "95 %, examples only": stats.t.ppf(0.975, m - 1) * math.sqrt(squared[1]),
        "90 % interval": half_width(squared, n, m, 0.9),
    }
    ends = {key: (mean - half, mean + half) for key, half in halves.items()}
    pair.intervals = {key: [difference_from_scale(x, task) for x in ends[key]] for key in ends}
    pair.mean = difference_from_scale(mean, task)
    pair.each = [difference_from_scale(x, task) for x in d.mean(1)]
    pair.ahead = (a if mean * SIGN[task] > 0 else b).label
    lead = [abs(mean) + halves["95 % interval"] * sign for sign in (0, -1, 1)]
    pair.lead = [difference_from_scale(x, task) for x in lead]
    pair.variation = squared, n, m
    return pair


def judge_pairs(rows, task, margin):
    """Every Pair of the tested rows with Holm's p and a verdict, or why there is none."""
    couples = list(combinations([row for row in rows if row.tested], 2))
    pairs = [difference(a, b, task, margin) for a, b in couples]
    p_holm = holm([pair.p for pair in pairs])
    for (a, b), pair, p in zip(couples, pairs, p_holm, strict=True):
        pair.p_holm, pair.verdict = float(p), "none"
        runs = [row.picked[seed] for row in (a, b) for seed in pair.seeds]
        if len(a.lrs) != len(b.lrs):
            pair.why = f"{len(a.lrs)} and {len(b.lrs)} learning rates to choose from"
        elif len(pair.seeds) < SEEDS:
            pair.why = f"at least {SEEDS} shared seeds are needed, and there are {len(pair.seeds)}"
        elif any(len(a.split_keys[seed] | b.split_keys[seed]) > 1 for seed in pair.seeds):
            pair.why = "not the same training and dev examples at each seed"
        elif any(run.bf16 for run in runs) and len({run.machine for run in runs}) > 1:
            pair.why = "bf16 on different machines"
        elif p < 0.05:
            pair.verdict = "better"
        else:
            pair.verdict = "equal" if pair.equal else "undecided"
    return pairs


def least_certain(pairs, task):
    """(detectable() in units, Pair) of the judged pair for which it is largest, or None."""
    judged = [pair for pair in pairs if pair.verdict != "none"]
    alpha = 0.05 / max(1, len(pairs))  # Holm's strictest step
    sizes = [detectable(*pair.variation, alpha) for pair in judged]
    worst = max(zip(sizes, judged, strict=True), key=lambda x: x[0], default=None)
    return worst and (difference_from_scale(worst[0], task), worst[1])


def group_runs(runs):
    """Lists of comparable runs; untrained ones are in every group of their data and base."""
    groups = {(run.data_key, run.budget_key): [] for run in runs if not run.untrained}
    trained = {data_key for data_key, _ in groups}
    groups |= {(run.data_key, ""): [] for run in runs if run.data_key not in trained}
    for run in runs:
        for (data_key, budget_key), group in groups.items():
            if run.data_key == data_key and (run.untrained or run.budget_key == budget_key):
                group.append(run)
    groups = [sorted(group, key=lambda run: run.untrained) for group in groups.values()]
    return sorted(groups, key=results.group_order)


def with_repeats(groups):
    """[(study, its repeats)] of lists of comparable runs.

    A repeat is shown beside the study of its data set and base: it trains on all data, or for
    longer, and is read from a file named in REPEATS. Its learning rates are those that the study
    chose, so it has no verdict of its own.
    """
    studies = [(runs, []) for runs in groups if not runs[0].path.name.startswith(REPEATS)]
    alone = []
    for runs in (runs for runs in groups if runs[0].path.name.startswith(REPEATS)):
        base = runs[0].dataset, runs[0].model
        fitting = [x for study, x in studies if (study[0].dataset, study[0].model) == base]
        if fitting:
            fitting[0].append(runs)
        else:
            alone.append((runs, []))
    return studies + alone


def analyze(runs, title, margin=None):
    """The Group of these comparable runs; margin: None is the default of its task."""
    task, by_row, machines = runs[0].task, {}, [run.machine for run in runs]
    margin = margin or results.MARGIN[task]
    for run in runs:
        by_row.setdefault((run.untrained, run.method, run.name), []).append(run)
    by_row = {row_runs[0]: row_runs for row_runs in by_row.values()}
    machine = max(sorted(set(machines)), key=machines.count)
    firsts = sorted(by_row, key=results.row_order)
    tested = results.tested_runs(firsts)
    best_last = sorted(firsts[::-1], key=lambda run: (run in tested, run.default))
    reference = {run.kind: run for run in best_last if not run.untrained}
    labels = results.label_rows(firsts, reference)
    rows = {run: make_row(by_row[run], labels[run], run in tested, machine) for run in firsts}
    cautions = tables.cautions(list(rows.values()), task, margin)
    rows = {run: row for run, row in rows.items() if row.picked}
    reference_rows = {kind: rows.get(run) for kind, run in reference.items()}
    lora, versus_lora, parents = reference_rows.get("LoRA"), {}, []
    for run, row in rows.items():
        if lora and row is not lora and not run.untrained:
            versus_lora[row.label] = difference(row, lora, task, margin)
        for kind in results.PARENTS.get(run.kind, [run.kind]):
            if reference_rows.get(kind) not in (None, row, lora) and not run.untrained:
                parents.append(difference(row, reference_rows[kind], task, margin))
    rows, pairs = list(rows.values()), judge_pairs(rows.values(), task, margin)
    compared = rows, pairs, lora, versus_lora, parents, least_certain(pairs, task)
    return Group(title, task, margin, *compared, cautions, runs)


def main(argv=None):
    """Read the results, judge every group of comparable runs, show and write the page."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("compare.py", description=__doc__, formatter_class=raw)
    parser.error, add = fail, parser.add_argument
    add("paths", type=Path, nargs="+", help="folders (their *.json and *.jsonl) or such files")
    add("--out", type=Path, help="folder for README.md and plots (default: the first path's)")
    add("--margin", type=float, help="what counts as equal: points, or percent of the perplexity")
    add("--price", type=float, help="price of a GPU's hour: adds what tuning on a GPU cost")
    add("--fill", type=Path, nargs="+", default=[], help="pages with <!-- table --> marks to renew")
    add("--no_plots", action="store_true", help="write the page without plots")
    args = parser.parse_args(argv)
    if args.margin is not None and not 0 < args.margin < 100:
        fail(f"--margin {args.margin:g}: give more than 0 and less than 100")
    if args.price is not None and not 0 < args.price < math.inf:
        fail(f"--price {args.price:g}: give a positive number")
    runs, skipped = results.load(args.paths)
    measurements = times.load(args.paths, skipped)
    studies = with_repeats(group_runs(runs))
    titles = results.titles([study for study, _ in studies])
    groups = [analyze(x, title, args.margin) for (x, _), title in zip(studies, titles, strict=True)]
    for group, (_, repeats) in zip(groups, studies, strict=True):
        group.repeats = [analyze(x, group.title, args.margin) for x in repeats]
        group.times = times.of_group(group, measurements, args.price)
    out = args.out or (args.paths[0] if args.paths[0].is_dir() else args.paths[0].parent)
    page.check(out, args.fill)
    drawn = [([], []) for group in groups] if args.no_plots else plots.draw(groups, out)
    page.write_page(out, groups, skipped, drawn)
    page.fill(args.fill, groups)
    print(page.terminal(groups, out / "README.md"))


if __name__ == "__main__":
    main()
