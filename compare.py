"""Tune, pair, test, judge: which method is better, is the difference real, what does it cost?

    python compare.py results/            verdicts and a table here, the page in results/README.md
    python compare.py study/ --json       every number, for a program

A replicate is a seed: of a method's rates the one that is best on that seed's dev rows, scored on
the test rows. Tested are the pairs of the four methods, in the variant that most of them have, by
seed and by row: accuracies in points, perplexities as ratios, in 100·ln(perplexity).
"""

import argparse
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats

from harness import page, plots, results, tables
from harness.process import fail
from harness.results import SIGN, in_units, natural

SEEDS = 6  # a verdict needs as many
# ------------------------------------------------------------- statistics: arrays in, numbers out


def noises(d):
    """Squared standard errors of the mean of d (n seeds, m rows), as an array [seeds, rows, rest].

    Seeds: s²/n of the n seeds' means, as in a paired t-test: training again. Rows: s²/m of the m
    rows' means: other test rows. Both hold the rest, the variance that is neither a seed's nor a
    row's, over n·m (mean squares of a two-way layout with random effects).
    """
    n, m = d.shape
    seeds, rows = d.mean(1), d.mean(0)
    rest = ((d - seeds[:, None] - rows + d.mean()) ** 2).sum() / ((n - 1) * (m - 1))
    return np.array([seeds.var(ddof=1) / n, rows.var(ddof=1) / m, rest / (n * m)])


def both_noises(noise, n, m):
    """(standard error, degrees of freedom) of a mean over new seeds and new rows at once.

    seeds + rows - rest, as both hold the rest (Cornfield & Tukey 1956), and never less than one of
    the two; degrees of freedom after Satterthwaite (1946). noise: as from noises(), or arrays.
    """
    seeds, rows, rest = noise
    total = np.maximum(seeds + rows - rest, np.maximum(seeds, rows))
    spread = seeds**2 / (n - 1) + rows**2 / (m - 1) + rest**2 / ((n - 1) * (m - 1))
    return np.sqrt(total), np.where(total > 0, total**2 / np.where(total > 0, spread, 1), n - 1)


def two_sided(mean, error, df):
    """p of Student's t-test that a mean is zero; where nothing varies 0, and 1 for zero itself."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(2 * stats.t.sf(np.abs(mean) / error, df), nan=1.0)


def half_width(noise, n, m, level=0.95):
    """Half the interval of a difference: over seeds alone or of both noises, whichever is wider."""
    (error, df), tail = both_noises(noise, n, m), (1 + level) / 2
    return np.maximum(stats.t.ppf(tail, n - 1) * noise[0] ** 0.5, stats.t.ppf(tail, df) * error)


def judge(mean, noise, n, m, margin):
    """(p over seeds, p, equal) of a mean difference; numbers or arrays. noise: as from noises().

    p over seeds: the paired t-test. p: that one or the test of both noises, whichever is larger; so
    a difference must be more than the noise of training and hold for other rows, too. equal: the
    90 % intervals, over seeds and of both, lie within the margin: two one-sided tests at 5 % each
    (TOST, Schuirmann 1987).
    """
    (error, df), alone = both_noises(noise, n, m), np.sqrt(noise[0])
    seeds, largest = two_sided(mean, alone, n - 1), np.abs(mean) + half_width(noise, n, m, 0.9)
    return seeds, np.maximum(seeds, two_sided(mean, error, df)), largest < margin


def holm(p):
    """Holm's (1979) adjusted p of p (k,): the smallest times k, the next times k - 1, and so on."""
    p, order, adjusted = np.asarray(p, float), np.argsort(p), np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted


def noises_at(noise, n, m, seeds, rows):
    """The noises to expect with `seeds` and `rows`, numbers or arrays, in place of n and m."""
    rest = noise[2] * n * m / (seeds * rows)
    own = np.maximum(noise[:2] - noise[2], 0)
    return own[0] * n / seeds + rest, own[1] * m / rows + rest, rest


def what_decides(mean, noise, n, m, margin, alpha):
    """(seeds, rows) that bring a verdict if difference and spread stay as seen; None if none do.

    Seeds alone where at most 100 do, else rows alone, up to a million, else the smallest product.
    alpha: 5 % over the number of pairs, Holm's strictest step.
    """
    seeds = np.arange(n, 101)[:, None]
    rows = np.ceil(np.geomspace(m, max(m, 1e6), 200))
    _, p, equal = judge(mean, noises_at(noise, n, m, seeds, rows), seeds, rows, margin)
    decided = (p < alpha) | equal  # (seeds, rows)
    decided[:1, 0] = False  # what there is did not decide
    for some in (decided[:, :1], decided[:1], decided):
        if some.any():
            i, j = min(np.argwhere(some).tolist(), key=lambda at: seeds[at[0], 0] * rows[at[1]])
            return int(seeds[i, 0]), int(rows[j])
    return None


def power(noise, n, m, margin, alpha, studies=20_000):
    """How often such a study finds a true difference of one margin, and calls none at all equal.

    Simulated with a fixed seed: normal noise, whose mean squares are independent chi-squares.
    `alpha` is Holm's strictest step, so a difference is found in at least that share of studies.
    """
    rng, freedom = np.random.default_rng(0), (n - 1, m - 1, (n - 1) * (m - 1))
    true = noises_at(noise, n, m, n, m)
    seen = [x * rng.chisquare(df, studies) / df for x, df in zip(true, freedom, strict=True)]
    luck = rng.normal(0, both_noises(true, n, m)[0], studies)
    _, p, _ = judge(luck + margin, seen, n, m, margin)
    _, _, equal = judge(luck, seen, n, m, margin)
    return float(((p < alpha) & (luck > -margin)).mean()), float(equal.mean())


# ------------------------------------------------------------------------- from runs to verdicts


def tune(by_rate, sign):
    """Of {rate: run} the run with the best dev score, of equals the one with the smallest rate."""
    return max((by_rate[rate] for rate in sorted(by_rate)), key=lambda run: sign * run["dev"])


def make_row(runs, task, device):
    """One method and name of a group, tuned. Runs with other settings under one name are refused.

    A seed counts where all the row's rates are there; "incomplete" has the others. "_chosen" is
    {seed: run}, "_drawn" {seed: hashes of its rows}, "_values" {seed: a value a test row}, "dev"
    {rate: dev score at each of the seeds}; "costs" has memory and times of `device` alone.
    """
    first, by_seed = runs[0], {}
    for run in runs:
        here, there = run["kept"], first["kept"]
        for key in sorted(here.keys() | there.keys()):
            if here.get(key) != there.get(key):
                fail(
                    f"{first['file']} and {run['file']} are both {run['name']}, but {key} is "
                    f"{there.get(key)} and {here.get(key)}; give one another --name"
                )
        by_seed.setdefault(run["seed"], {})[run["lr"]] = run
    rates = sorted({run["lr"] for run in runs})
    whole = {seed: found for seed, found in sorted(by_seed.items()) if len(found) == len(rates)}
    chosen = {seed: tune(found, SIGN[task]) for seed, found in whole.items()}
    scores = np.array([run["test"] for run in chosen.values()])
    n, span = len(scores), (math.nan, math.nan)
    if n > 1:
        half = stats.t.ppf(0.975, n - 1) * stats.sem(scores)
        span = (scores.mean() - half, scores.mean() + half)
    return {
        **{key: first[key] for key in ("method", "name", "untrained")},
        "label": results.label(first["method"], first["name"]),
        "tested": first["tested"],
        "settings": first["kept"],
        "rates": rates,
        "seeds": list(chosen),
        "incomplete": {seed: len(found) for seed, found in by_seed.items() if seed not in whole},
        "chosen": [run["lr"] for run in chosen.values()],
        "score": natural(scores.mean(), task) if n else math.nan,
        "interval": [natural(x, task) for x in span],
        "scores": [natural(x, task) for x in scores],
        "dev": {r: [natural(found[r]["dev"], task) for found in whole.values()] for r in rates},
        "costs": results.mean_numbers(list(chosen.values()), runs, device),
        "_chosen": chosen,
        "_drawn": {seed: {run["drawn"] for run in found.values()} for seed, found in whole.items()},
        "_values": {seed: results.row_values(run) for seed, run in chosen.items()},
    }


def difference(a, b, task, margin):
    """Row a minus row b over the seeds that both have, in points or percent of the perplexity.

    Intervals: 95 % of both noises (and 90 %), of the seeds and of the test rows alone.
    """
    seeds = [seed for seed in a["seeds"] if seed in b["seeds"]]
    pair = {"a": a["label"], "b": b["label"], "seeds": seeds, "intervals": {}, "p": math.nan}
    pair |= {"p_holm": None, "verdict": "none", "better": None, "why": None}
    if len(seeds) < 2:
        return pair
    d = np.array([a["_values"][seed] - b["_values"][seed] for seed in seeds])  # (seeds, test rows)
    (n, m), mean, noise = d.shape, d.mean(), noises(d)
    if task == "classification":  # a share of m rows is known to one row at best
        noise[1] = max(noise[1], (100 / m) ** 2)
    p_seeds, p, equal = judge(mean, noise, n, m, results.margin_on_scale(margin, task))
    halves = {
        "both": half_width(noise, n, m),
        "both, 90 %": half_width(noise, n, m, 0.9),
        "seeds": stats.t.ppf(0.975, n - 1) * math.sqrt(noise[0]),
        "rows": stats.t.ppf(0.975, m - 1) * math.sqrt(noise[1]),
    }
    spans = {key: (mean - half, mean + half) for key, half in halves.items()}
    return pair | {
        "mean": in_units(mean, task),
        "each": [in_units(x, task) for x in d.mean(1)],
        "intervals": {key: [in_units(x, task) for x in span] for key, span in spans.items()},
        "p_seeds": float(p_seeds),
        "p": float(p),
        "equal": bool(equal),
        "test_rows": m,
        "_seen": (mean, noise, n, m),
    }


def judge_pairs(rows, task, margin):
    """Every pair of the four methods in the variant tested: difference, Holm's p, verdict.

    An undecided pair "needs" (seeds, test rows); a better one has its "lead", mean and interval,
    as positive sizes.
    """
    found = list(combinations([row for row in rows if row["tested"]], 2))
    pairs = [difference(a, b, task, margin) for a, b in found]
    p_holm = holm([pair["p"] for pair in pairs])
    for (a, b), pair, p in zip(found, pairs, p_holm, strict=True):
        pair["p_holm"] = float(p)
        if len(a["rates"]) != len(b["rates"]):
            pair["why"] = f"{len(a['rates'])} and {len(b['rates'])} learning rates to choose from"
        elif len(pair["seeds"]) < SEEDS:
            pair["why"] = f"{SEEDS} shared seeds are needed, found: {len(pair['seeds'])}"
        elif any(len(a["_drawn"][seed] | b["_drawn"][seed]) > 1 for seed in pair["seeds"]):
            pair["why"] = "other training or dev rows at one seed"
        elif p < 0.05:
            mean, *noise = pair["_seen"]
            sizes = abs(mean) + half_width(*noise) * np.array([0, -1, 1])
            pair["lead"] = [in_units(x, task) for x in sizes]
            pair |= {"verdict": "better", "better": (a if mean * SIGN[task] > 0 else b)["label"]}
        elif pair["equal"]:
            pair["verdict"] = "equal"
        else:
            bound = results.margin_on_scale(margin, task)
            pair["verdict"] = "undecided"
            pair["needs"] = what_decides(*pair["_seen"], bound, 0.05 / len(pairs))
    return pairs


def study_power(pairs, task, margin):
    """power() of the pair for which it is least, of those with a verdict; None without one."""
    seen = [pair["_seen"][1:] for pair in pairs if pair["verdict"] != "none"]
    if not seen:
        return None
    bound = results.margin_on_scale(margin, task)
    each = [power(noise, n, m, bound, 0.05 / len(pairs)) for noise, n, m in seen]
    found, equal = np.min(each, axis=0).tolist()
    return {"found": found, "equal": equal, "seeds": min(n for _, n, _ in seen), "rows": seen[0][2]}


def group_runs(runs):
    """Lists of comparable runs: scored on the same and trained alike.

    Untrained ones stand in every group of their data and base, or alone where there is none.
    """
    groups = {(run["scored"], run["trained"]): [] for run in runs if not run["untrained"]}
    scored = {key for key, _ in groups}
    groups |= {(run["scored"], ""): [] for run in runs if run["scored"] not in scored}
    for run in runs:
        for (key, how), found in groups.items():
            if run["scored"] == key and (run["untrained"] or run["trained"] == how):
                found.append(run)
    groups = [sorted(found, key=lambda run: run["untrained"]) for found in groups.values()]
    return sorted(groups, key=results.group_order)


def analyse(runs, margin):
    """What the page shows of a group of comparable runs, as a dict; margin: None is the default."""
    task, named = runs[0]["data"]["task"], {}
    margin = margin or results.MARGIN[task]
    for run in runs:
        named.setdefault((run["untrained"], run["method"], run["name"]), []).append(run)
    device = results.most_common_device(runs)
    results.mark_tested(runs)
    every = sorted((make_row(x, task, device) for x in named.values()), key=results.row_order)
    rows = [row for row in every if row["seeds"]]
    pairs = judge_pairs(rows, task, margin)
    plain = {row["name"]: row for row in rows if row["name"].startswith(row["method"])}
    lora = next((row for row in rows if row["tested"] and row["method"] == "lora"), None)
    for row in rows:
        others = [plain[name] for name in results.compared_with(row) if name in plain]
        row["parents"] = [difference(row, other, task, margin) for other in others]
        alone = row["untrained"] or lora is None or lora is row
        row["beside"] = None if alone else difference(row, lora, task, margin)
    group = {"task": task, "margin": margin, "rows": rows, "pairs": pairs, "_runs": runs}
    group |= {"power": study_power(pairs, task, margin), "cautions": results.cautions(every)}
    return group | {key: runs[0][key] for key in ("dataset", "model", "data")}


def for_json(x):
    """Without what begins with "_", and null for nan."""
    if isinstance(x, dict):
        return {str(k): for_json(v) for k, v in x.items() if not str(k).startswith("_")}
    return [for_json(v) for v in x] if isinstance(x, list) else None if x != x else x


def main(argv=None):
    """Read the results, judge every group of comparable runs, show and write what was found."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("compare.py", description=__doc__, formatter_class=raw)
    parser.error, add = fail, parser.add_argument
    add("paths", type=Path, nargs="+", help="folders (their *.json and *.jsonl) or such files")
    add("--out", type=Path, help="folder for README.md and plots (default: the first path's)")
    add("--margin", type=float, help="what is small: points of accuracy, or percent of perplexity")
    add("--price", type=float, help="of an accelerator hour: adds what GPU runs cost")
    add("--fill", type=Path, nargs="+", default=[], help="pages with <!-- table --> marks to renew")
    add("--json", action="store_true", help="print every number as JSON, write nothing")
    add("--no_plots", action="store_true", help="write the page without pictures")
    args = parser.parse_args(argv)
    if args.margin is not None and not 0 < args.margin < 100:
        fail(f"--margin {args.margin:g}: give more than 0 and less than 100")
    runs, skipped = results.load(args.paths, args.price)
    groups = [analyse(found, args.margin) for found in group_runs(runs)]
    tables.tell_apart(groups)
    if args.json:
        print(json.dumps(for_json({"groups": groups, "skipped": skipped}), indent=1))
        return
    out = args.out or (args.paths[0] if args.paths[0].is_dir() else args.paths[0].parent)
    page.check(out, args.fill)
    pictures = [[] for g in groups] if args.no_plots else plots.draw(groups, out)
    page.write(out, groups, skipped, pictures)
    page.fill(args.fill, groups)
    print(f"{page.terminal(groups)}\n\nThe whole page: {out / 'README.md'}")


if __name__ == "__main__":
    main()
