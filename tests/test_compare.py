"""compare.py: statistics against scipy and by simulation, tuning, verdicts, cautions, bad files."""

import base64
import json
import math
import os
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

import compare
from report import results, tables

METHODS = ("lora", "qlora", "hira", "sparse_lora")
PARTS = (
    "frozen weights",
    "trained weights",
    "optimizer",
    "gradients",
    "activations",
    "temporaries",
)


def make_result(
    method="lora",
    seed=0,
    lr=1e-3,
    *,
    name=None,
    dataset="sst2",
    correct=None,
    nll=None,
    dev=0.8,
    settings=None,
    timed=False,
    untrained=False,
    peak=200,
    trainable=74_498,
    device="cpu x86_64",
    diverged=False,
):
    """A result of schema 3. correct: (rows,) booleans; or nll: (blocks,), of 20 scored tokens each.

    dev: accuracy or perplexity. peak: MiB, half of it frozen weights.
    """
    if nll is None:
        task, metric = "classification", "accuracy"
        correct = np.arange(100) % 5 > 0 if correct is None else np.asarray(correct, bool)
        examples = {"correct": base64.b64encode(np.packbits(correct).tobytes()).decode()}
        score, size = float(correct.mean()), len(correct)
    else:
        task, metric, size = "mlm", "mlm_perplexity", len(nll)
        examples = {"nll": list(map(float, nll)), "scored": [20] * size}
        score = math.exp(sum(examples["nll"]) / (20 * size))
    flags = {"epochs": 0 if untrained else 1, "max_steps": None, "batch_size": 32, "grad_accum": 1}
    flags |= {"head_lr": 0.01, "max_length": 128, "rank": 8, "weight_decay": 0.0}
    flags |= {"targets": None, "precision": "auto"}
    data = {"task": task, "test_split": "test", "train": 8000, "dev": 500, "test": size}
    data |= {"train_sha256": f"train {seed}", "dev_sha256": f"dev {seed}", "test_sha256": "test"}
    sizes = dict(zip(PARTS, (4, 0.5, 1, 0.5, 1, 1), strict=True))
    memory = {part: peak * 2**20 * x / 8 for part, x in sizes.items()}
    speed = {"latency_ms": {"mean": 10.0, "p50": 10.0, "p95": 11.0}, "samples_per_second": 320.0}
    speeds = dict.fromkeys(("base", "merged", "unmerged"), speed) | {"length": 64}
    time = {"train_seconds": 60.0, "samples_per_second": 160.0, "tokens_per_second": 2000.0}
    environment = {"device": device, "cpu": "EPYC", "processes": 1, "precision": "fp32"}
    allocator = 333 * 2**20 if "cuda" in device else None
    result = {"schema": 3, "method": method, "name": name or method, "dataset": dataset}
    result |= {"model": "models/MiniLM", "lr": lr, "seed": seed, "untrained": untrained}
    return result | {
        "diverged": diverged,
        "settings": flags | (settings or {}),
        "peft": {"target_modules": ["query", "value"]},
        "data": data,
        "base": {"sha256": "base", "weights": 22_000_000},
        "metrics": {"test": {metric: score, "loss": 0.4}, "dev": {metric: dev, "loss": 0.4}},
        "test_examples": examples,
        "report": {},
        "parameters": {"adapter": trainable - 770, "head": 770, "trainable": trainable},
        "time": time | {"accelerator_hours": 60 / 3600},
        "memory": {"train": memory, "train_allocator": allocator, "inference": dict(memory)},
        "flops": {"step": 2e10, "total": 5e12, "inference_example": 5e8},
        "inference": [speeds | {"batch": n} for n in (1, 32)] if timed else [],
        "disk": {"adapter": 300_000, "base": 9e7, "merged": 9e7},
        "environment": environment | {"torch": "2.8.0", "transformers": "5.0"},
        "created": "2026-12-01T00:00:00Z",
    }


def write(folder, *made, name=None):
    """Each result as a file of its own, named as the scripts name it, or all in one .jsonl."""
    folder.mkdir(exist_ok=True)
    if name:
        (folder / name).write_text("".join(json.dumps(result) + "\n" for result in made))
        return
    for r in made:
        stem = f"{r['dataset']}-{r['name']}-MiniLM-lr{r['lr']:g}-seed{r['seed']}"
        (folder / f"{stem}.json").write_text(json.dumps(r) + "\n")


def make_study(gains, seeds=6, rows=400, spread=0.5, lm=False, rates=(1e-3, 2e-3, 4e-3), **options):
    """Results with the middle rate as the best; gains: {name: points above 80 %, or % lower}.

    The methods share the rows that are right, but for `gains` and a noise of `spread` points over
    the seeds that leaves the means alone.
    """
    rng, made = np.random.default_rng(0), []
    for name, gain in gains.items():
        method, *rest = name.split("-")
        more = {"rank": int(rest[0][4:])} if rest and rest[0].startswith("rank") else {}
        lucks = rng.normal(0, spread, seeds)
        for seed, luck in enumerate(lucks - lucks.mean()):
            for rate in rates:
                best = 0.82 if rate == rates[len(rates) // 2] else 0.8
                same = {"name": name, "settings": more, **options}
                if lm:
                    nll = 80 + np.arange(rows) % 7 - 0.2 * (gain + luck)
                    made.append(make_result(method, seed, rate, nll=nll, dev=100 - best, **same))
                else:
                    right = np.arange(rows) < rows * (80 + gain + luck) / 100
                    right = right[np.random.default_rng(1).permutation(rows)]
                    made.append(make_result(method, seed, rate, correct=right, dev=best, **same))
    return made


def judged(folder, *made, margin=None):
    """The groups that compare.py makes of results."""
    write(folder, *made, name="all.jsonl")
    runs, skipped = results.load([folder])
    assert not skipped
    groups = compare.group_runs(runs)
    titles = results.titles(groups)
    return [compare.analyze(x, title, margin) for x, title in zip(groups, titles, strict=True)]


def rows_of(group):
    return {row.label: row for row in group.rows}


# -------------------------------------------------------------------------------------- statistics


def two_way(rng, studies, k, n, m, seeds, rows, rest):
    """Scores (studies, k methods, n seeds, m rows) whose pairwise differences have these sds."""
    parts = [(seeds, (n, 1)), (rows, (1, m)), (rest, (n, m))]
    return sum(sd / 2**0.5 * rng.standard_normal((studies, k, *shape)) for sd, shape in parts)


def squared_errors_of(d):
    """compare.squared_errors for many studies at once: d (studies, n, m) -> (3, studies)."""
    n, m = d.shape[1:]
    seeds, rows = d.mean(2), d.mean(1)
    left = d - seeds[:, :, None] - rows[:, None] + d.mean((1, 2))[:, None, None]
    rest = (left**2).sum((1, 2)) / ((n - 1) * (m - 1))
    return np.array([seeds.var(1, ddof=1) / n, rows.var(1, ddof=1) / m, rest / (n * m)])


def verdicts_of(y, margin):
    """(better, equal), each (studies, pairs), by compare.judge and Holm, of scores y."""
    n, m = y.shape[2:]
    p, equal = [], []
    for a, b in combinations(range(y.shape[1]), 2):
        d = y[:, a] - y[:, b]
        _, p_pair, equal_pair = compare.judge(d.mean((1, 2)), squared_errors_of(d), n, m, margin)
        p.append(p_pair)
        equal.append(equal_pair)
    return np.array([compare.holm(row) for row in np.array(p).T]) < 0.05, np.array(equal).T


def test_noises_are_the_squared_standard_errors_of_seeds_and_rows():
    d = np.random.default_rng(0).normal(1, 2, (5, 30))
    seeds, rows, rest = compare.squared_errors(d)
    assert seeds == pytest.approx(stats.sem(d.mean(1)) ** 2)
    assert rows == pytest.approx(stats.sem(d.mean(0)) ** 2)
    left = d - d.mean(1, keepdims=True) - d.mean(0) + d.mean()
    assert rest == pytest.approx((left**2).sum() / (4 * 29) / 150)
    assert squared_errors_of(d[None])[:, 0] == pytest.approx([seeds, rows, rest])


def test_both_noises_on_a_worked_example():
    error, df = compare.combined_error(np.array([4.0, 3.0, 1.0]), 5, 11)
    assert error == pytest.approx(6**0.5)
    assert df == pytest.approx(36 / (16 / 4 + 9 / 10 + 1 / 40))
    error, df = compare.combined_error(
        np.array([4.0, 0.5, 1.0]), 5, 11
    )  # never less than one alone
    assert error == 2
    assert compare.combined_error(np.zeros(3), 5, 11) == (0, 4)


def test_where_rows_do_not_matter_the_test_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 8), rng.normal(0, 1, 8)
    d = np.repeat((a - b)[:, None], 20, 1)
    p_seeds, p, _ = compare.judge(d.mean(), compare.squared_errors(d), 8, 20, 1)
    assert p_seeds == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert p == pytest.approx(p_seeds)
    expected = stats.t.interval(0.95, 7, (a - b).mean(), stats.sem(a - b))
    half = compare.half_width(compare.squared_errors(d), 8, 20)
    assert (d.mean() - half, d.mean() + half) == pytest.approx(expected)


def test_equal_is_two_one_sided_tests_at_5_percent():
    seeds = np.random.default_rng(1).normal(0.2, 0.5, 9)
    d = np.repeat(seeds[:, None], 10, 1)
    below = stats.ttest_1samp(seeds, 0.6, alternative="less").pvalue
    above = stats.ttest_1samp(seeds, -0.6, alternative="greater").pvalue
    for margin in (0.3, 0.6, 1.0):
        below = stats.ttest_1samp(seeds, margin, alternative="less").pvalue
        above = stats.ttest_1samp(seeds, -margin, alternative="greater").pvalue
        *_, equal = compare.judge(d.mean(), compare.squared_errors(d), 9, 10, margin)
        assert equal == (max(below, above) < 0.05)


@pytest.mark.parametrize(("mean", "p", "equal"), [(0.0, 1, True), (0.5, 0, True), (2.0, 0, False)])
def test_without_any_spread_there_is_no_doubt(mean, p, equal):
    d = np.full((6, 10), mean)
    assert compare.judge(d.mean(), compare.squared_errors(d), 6, 10, 1.0) == (p, p, equal)


def test_holm_on_a_worked_example():
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.6, 0.9]).tolist() == [1, 1]
    adjusted = compare.holm([0.01, math.nan])
    assert adjusted[0] == pytest.approx(0.02) and math.isnan(adjusted[1])
    assert len(compare.holm([])) == 0


def test_perplexity_is_compared_as_a_ratio_with_the_error_of_a_ratio():
    rng = np.random.default_rng(0)
    scored = rng.integers(10, 30, 200)
    runs = [{"nll": scored * rng.normal(x, 0.3, 200), "scored": scored} for x in (4, 4.1)]
    a, b = (results.example_values(run, 200) for run in runs)
    totals = [run["nll"].sum() / scored.sum() for run in runs]
    assert a.mean() - b.mean() == pytest.approx(100 * (totals[0] - totals[1]))
    ratio = results.difference_from_scale(a.mean() - b.mean(), "mlm")
    assert ratio == pytest.approx(100 * (math.exp(totals[0]) / math.exp(totals[1]) - 1))
    # The standard error against the bootstrap over blocks.
    picked = rng.integers(200, size=(4000, 200))
    losses = [run["nll"][picked].sum(1) / scored[picked].sum(1) for run in runs]
    assert stats.sem(a - b) == pytest.approx(np.std(100 * (losses[0] - losses[1])), rel=0.05)


@pytest.mark.parametrize("rows", [0, 1, 3], ids=lambda x: f"rows' noise {x} times the seeds'")
@pytest.mark.parametrize("seeds", [6, 10])
def test_no_difference_is_called_better_in_at_most_5_percent_of_studies(seeds, rows):
    """Family-wise over six pairs, whether training or the test rows are what varies."""
    sd = rows * (60 / seeds) ** 0.5
    y = two_way(np.random.default_rng(0), 4000, 4, seeds, 60, 1, sd, 0.5)
    better, _ = verdicts_of(y, 1.0)
    assert better.any(1).mean() <= 0.05 + 2 * (0.05 * 0.95 / 4000) ** 0.5


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_difference_of_the_margin_is_called_equal_in_at_most_5_percent(rows):
    y = two_way(np.random.default_rng(0), 4000, 2, 10, 60, 1, rows * 6**0.5, 0.5)
    margin = 2.5 * (1 + rows**2) ** 0.5
    y[:, 0] += margin
    _, equal = verdicts_of(y, margin)
    assert equal.mean() <= 0.05 + 2 * (0.05 * 0.95 / 4000) ** 0.5


def test_the_detectable_difference_is_found_in_80_percent_of_whole_studies():
    """detectable() draws mean squares; here whole studies, seeds and examples drawn anew."""
    n, m, sds = 6, 60, (0.6, 2.0, 3.0)
    true = np.array([sds[0] ** 2 / n, sds[1] ** 2 / m, sds[2] ** 2 / (n * m)])
    squared = np.array([true[0] + true[2], true[1] + true[2], true[2]])
    y = two_way(np.random.default_rng(0), 3000, 2, n, m, *sds)
    d = y[:, 0] - y[:, 1]
    for alpha in (0.05, 0.05 / 6):
        size = compare.detectable(squared, n, m, alpha)
        assert compare.detectable(squared, n, m, alpha) == size
        mean = d.mean((1, 2)) + size
        p = compare.judge(mean, squared_errors_of(d), n, m, 1.5)[1]
        assert ((p < alpha) & (mean > 0)).mean() == pytest.approx(0.8, abs=0.03)


def test_neighbors_of_one_article_are_no_independent_examples():
    """Articles that differ: over blocks a difference of nothing is called one far too often."""
    rng, wrong = np.random.default_rng(0), {"blocks": 0, "groups": 0}
    for _ in range(400):
        articles = np.repeat(rng.normal(0, 0.4, 50), rng.integers(5, 35, 50))
        d = articles + rng.standard_normal((6, 1)) * 0.05 + rng.standard_normal((6, len(articles)))
        groups = compare.group_neighbors(d)
        assert groups.shape == (6, 30) and groups.mean() == pytest.approx(d.mean())
        for key, each in (("blocks", d), ("groups", groups)):
            _, p, _ = compare.judge(each.mean(), compare.squared_errors(each), *each.shape, 1)
            wrong[key] += p < 0.05
    assert wrong["groups"] / 400 < 0.12 and wrong["blocks"] / 400 > 0.25
    assert (compare.group_neighbors(d[:, :7]) == d[:, :7]).all()


# ------------------------------------------------------------------------------ tuning and verdicts


def test_each_seed_picks_by_its_own_dev_examples_and_only_that_test_score_counts(tmp_path):
    made = []
    for seed in range(3):
        for i, lr in enumerate((1e-3, 2e-3)):
            right = np.arange(100) < 50 + 10 * i + seed
            dev = 0.8 + 0.1 * (i == seed % 2)
            made.append(make_result("lora", seed, lr, correct=right, dev=dev))
    (group,) = judged(tmp_path, *made)
    (row,) = group.rows
    assert [run.lr for run in row.picked.values()] == [1e-3, 2e-3, 1e-3]
    assert [run.test for run in row.picked.values()] == pytest.approx([50, 61, 52])
    assert row.score == pytest.approx(163 / 3)
    interval = stats.t.interval(0.95, 2, 163 / 3, stats.sem([50, 61, 52]))
    assert row.interval == pytest.approx(interval)
    assert row.dev[2e-3] == pytest.approx([80, 90, 80]) and row.test[2e-3] == pytest.approx(61)


@pytest.mark.parametrize("lm", [False, True])
def test_of_equal_dev_scores_the_smaller_learning_rate_counts(lm, tmp_path):
    made = make_study({"lora": 0}, seeds=2, lm=lm)
    for result in made:
        result["metrics"]["dev"] = dict.fromkeys(result["metrics"]["dev"], 0.8)
    (group,) = judged(tmp_path, *made[::-1])
    assert {run.lr for run in group.rows[0].picked.values()} == {1e-3}


@pytest.mark.parametrize("lm", [False, True])
@pytest.mark.parametrize("lost", [math.nan, None, 20.0])
def test_a_diverged_run_is_never_picked(lost, lm, tmp_path):
    """Whatever stands as its score: 20 nats per token beat a finite run's 560."""
    made = make_study({"lora": 0, "hira": 0}, lm=lm)
    for result in made:
        if lm:
            result["metrics"]["dev"]["mlm_perplexity"] = math.exp(300)
        if result["method"] == "hira" and (result["lr"] == 2e-3 or result["seed"] == 5):
            result["diverged"] = True
            result["metrics"]["dev"] = dict.fromkeys(result["metrics"]["dev"], lost)
    (group,) = judged(tmp_path, *made)
    lora, hira = group.rows
    assert {run.lr for run in hira.picked.values()} == {1e-3}
    assert list(hira.picked) == [0, 1, 2, 3, 4] and hira.lrs == lora.lrs and hira.dev[2e-3] == []
    assert "HiRA: 1 diverged at 0.001, 6 diverged at 0.002" in "".join(group.cautions)


def test_the_less_perplexity_the_better(tmp_path):
    (group,) = judged(tmp_path, *make_study({"lora": 0, "hira": 9}, lm=True))
    (pair,) = group.pairs
    assert (pair.verdict, pair.ahead) == ("better", "HiRA")
    assert pair.lead[1] < pair.lead[0] < pair.lead[2] and pair.mean > 0
    assert {run.lr for row in group.rows for run in row.picked.values()} == {2e-3}
    assert pair.lead == pytest.approx([pair.mean, *pair.intervals["95 % interval"]])  # LoRA - HiRA


def test_verdicts_better_equal_undecided(tmp_path):
    gains = {"lora": 0, "qlora": 5, "hira": 0, "sparse_lora": 0.7}
    (group,) = judged(tmp_path, *make_study(gains, seeds=8, rows=1000, spread=0.7))
    pairs = {(pair.a, pair.b): pair for pair in group.pairs}
    assert len(pairs) == 6
    assert pairs["LoRA", "QLoRA"].verdict == "better" and pairs["LoRA", "QLoRA"].ahead == "QLoRA"
    assert pairs["LoRA", "HiRA"].verdict == "equal"
    assert pairs["LoRA", "Sparse LoRA"].verdict == "undecided"
    for pair in group.pairs:
        assert pair.p_holm >= pair.p >= pair.p_seeds - 1e-12
        d = np.array(pair.each)
        assert pair.p_seeds == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
        expected = stats.t.interval(0.95, 7, d.mean(), stats.sem(d))
        assert pair.intervals["95 %, seeds only"] == pytest.approx(expected)


def test_the_detectable_difference_is_that_of_the_least_certain_pair(tmp_path):
    made = make_study({"lora": 0, "qlora": 0}, seeds=8, rows=1000, spread=0.2)
    (group,) = judged(tmp_path, *made, *make_study({"hira": 0}, 7, 1000, 3))
    each = {pair.b + pair.a: compare.detectable(*pair.variation, 0.05 / 3) for pair in group.pairs}
    size, pair = group.detectable
    assert size == max(each.values()) == each[pair.b + pair.a] > 3 * min(each.values())
    assert len(pair.seeds) == 7 and "HiRA" in (pair.a, pair.b)
    text = f"With 7 seeds and 1,000 test examples this study detects differences of {size:.1f}"
    assert text[:-2] in tables.verdicts(group)[-1][1]


@pytest.mark.parametrize("rows, verdict", [(50, "undecided"), (1000, "equal")])
def test_few_examples_that_no_run_moves_are_no_proof(tmp_path, rows, verdict):
    """One of 50 is two points: that none moved does not make a point out of the question."""
    (group,) = judged(tmp_path, *make_study({"lora": 0, "hira": 0}, rows=rows, spread=0))
    (pair,) = group.pairs
    assert pair.mean == 0 and pair.verdict == verdict
    half = stats.t.ppf(0.975, rows - 1) * 100 / rows
    assert pair.intervals["95 %, examples only"][1] == pytest.approx(half)


def test_a_perplexity_beyond_all_bounds_is_no_traceback(tmp_path):
    made = make_study({"lora": 0}, seeds=2, lm=True) + make_study({"hira": 0}, 2, lm=True)[3:]
    write(tmp_path, *made, *make_study({"hira": -30_000}, seeds=1, lm=True))
    compare.main([str(tmp_path), "--no_plots"])


def test_a_single_seed_and_no_shared_seed_are_no_error(tmp_path):
    made = [make_result("lora", 0), make_result("hira", 1), make_result("qlora", 1)]
    (group,) = judged(tmp_path, *made)
    assert [pair.verdict for pair in group.pairs] == ["none"] * 3


# ------------------------------------------------------------------------------ rows and groups


def test_tested_are_the_four_at_the_settings_that_most_have_the_rest_stands_beside(tmp_path):
    gains = {"lora": 0, "qlora": 0, "lora-rank32": 3, "hira-rank4": 1, "qlora-rank4": 3}
    untrained = make_result("lora", 0, name="lora-untrained", untrained=True)
    (group,) = judged(tmp_path, *make_study(gains, rows=100), untrained)
    assert [(pair.a, pair.b) for pair in group.pairs] == [("LoRA", "QLoRA")]
    rows = rows_of(group)
    labels = ["LoRA", "LoRA rank 32", "QLoRA", "QLoRA rank 4", "HiRA (hira-rank4)"]
    assert list(rows) == [*labels, "LoRA untrained"]
    caution = "No verdict on HiRA (hira-rank4), because rank, alpha, dropout or target layers"
    assert caution in "".join(group.cautions)
    assert group.versus_lora.keys() == {*labels} - {"LoRA"} and group.lora is rows["LoRA"]
    beside = group.versus_lora["LoRA rank 32"]
    assert beside.mean == pytest.approx(3, abs=1) and beside.verdict == ""
    [parent] = group.parents  # a variant stands beside its own method, too
    assert (parent.a, parent.b) == ("QLoRA rank 4", "QLoRA")
    assert parent.mean == pytest.approx(rows["QLoRA rank 4"].score - rows["QLoRA"].score)


@pytest.mark.parametrize("name", ["{}-rank16", "mine", "{}-targetsq-v"])
def test_one_changed_flag_for_all_four_is_tested_as_the_default_is(name, tmp_path):
    """As where the model's layers have names of their own and --targets must be given."""
    made, more = make_study({"lora": 0, "full": 0}), {"settings": {"rank": 16}}
    for method, gain in {"lora": 0, "qlora": 0, "hira": 5, "sparse_lora": 0}.items():
        own = make_study({method: gain}, name=name.format(method), **more)
        made += [run | {"method": method} for run in own]
    (group,) = judged(tmp_path, *made)
    tested = [row for row in group.rows if row.tested]
    assert [row.run.method for row in tested] == list(METHODS)
    assert {row.run.name for row in tested} == {name.format(method) for method in METHODS}
    assert len(group.pairs) == 6 and all(pair.verdict != "none" for pair in group.pairs)
    hira = tested[2].label
    assert group.versus_lora[hira].b == tested[0].label
    assert (f"{hira} is better") in [start for start, _ in tables.verdicts(group)]
    default = rows_of(group)["LoRA rank 8"]
    assert not default.tested and group.versus_lora["LoRA rank 8"].b == tested[0].label


def test_labels_come_from_settings(tmp_path):
    """A user's --name is no method and no setting, and one default run under it is tested."""
    made = [make_result(method, 0) for method in ("lora", "qlora", "hira", "contextual_lora")]
    for name, update in {"mine": "contextual", "x": "hira", "hybrid-contextual": "hira"}.items():
        settings = {"update": update, "rank": 4 if name == "x" else 8}
        made.append(make_result("hybrid", 0, name=name, settings=settings))
    made.append(make_result("sparse_lora", 0, name="lora-rank99"))
    made.append(make_result("lora", 0, name="lora-rank99", settings={"rank": 2}))
    made.append(make_result("lora", 0, name="again"))
    (group,) = judged(tmp_path, *made)
    labels = ["LoRA", "LoRA (again)", "LoRA rank 2", "QLoRA", "HiRA", "Sparse LoRA (lora-rank99)"]
    labels += ["Contextual LoRA", "Contextual QLoRA (mine)", "QHiRA (hybrid-contextual)"]
    assert [row.label for row in group.rows] == [*labels, "QHiRA rank 4 (x)"]
    assert [row.label for row in group.rows if row.tested] == [labels[0], *labels[3:6]]
    parents = {}
    for pair in group.parents:
        parents.setdefault(pair.a, []).append(pair.b)
    assert parents == {
        "QHiRA (hybrid-contextual)": ["QLoRA", "HiRA"],
        "QHiRA rank 4 (x)": ["QLoRA", "HiRA"],
        "Contextual QLoRA (mine)": ["QLoRA", "Contextual LoRA"],
    }


def test_labels_that_are_cut_to_the_same_words_differ(tmp_path):
    made = [make_result("lora", 0, name=f"{'x' * 60}{i}") for i in range(3)]
    (group,) = judged(tmp_path, *made)
    assert len({row.label for row in group.rows}) == 3


def test_groups_are_by_data_base_and_what_must_agree(tmp_path):
    other = make_result("hira", 0)
    other["base"]["sha256"] = "another"
    longer = make_result("hira", 0, settings={"epochs": 3})
    head = make_result("hira", 0, settings={"head_lr": 0.02})
    split = make_result("hira", 1, settings={"batch_size": 16, "grad_accum": 2})
    text = make_result("hira", 0, dataset="imdb")
    groups = judged(tmp_path, make_result("lora", 0), other, longer, head, split, text)
    assert [len(group.rows) for group in groups] == [2, 1, 1, 1, 1]
    assert groups[-1].title == "IMDB with MiniLM" and len({group.title for group in groups}) == 5


def test_groups_of_one_data_set_and_base_say_what_they_differ_in(tmp_path):
    made = make_study({"lora": 0}, seeds=2)
    for other, words in {
        "epochs": ("epochs 1", "epochs 9"),
        "batch_size": ("batch 32", "batch 9"),
        "max_steps": ("max_steps None", "max_steps 9"),
        "max_length": ("tokens 128", "tokens 9"),
    }.items():
        more = make_study({"lora": 0}, 2, settings={other: 9})
        groups = judged(tmp_path / other, *made, *more)
        assert {group.title for group in groups} == {f"SST-2 with MiniLM ({x})" for x in words}
    (alone,) = judged(tmp_path / "alone", *made)
    assert alone.title == "SST-2 with MiniLM"


def test_an_untrained_row_joins_every_group_of_its_data_and_base(tmp_path):
    base = make_result("head_only", 0, untrained=True)
    longer = make_result("lora", 0, settings={"epochs": 3})
    groups = judged(tmp_path, make_result("lora", 0), longer, base)
    labels = ["LoRA", "Untrained base"]
    assert [[row.label for row in group.rows] for group in groups] == [labels] * 2
    (alone,) = judged(tmp_path, base)
    assert [row.label for row in alone.rows] == ["Untrained base"]


def test_an_untrained_row_may_differ_in_what_only_training_reads(tmp_path):
    """As from `python baseline.py` on a language model with and without --epochs 0."""
    made = [make_result("head_only", 0, untrained=True, settings={"epochs": n}) for n in (0, 3)]
    write(tmp_path, make_result("lora", 0), *made, name="all.jsonl")
    runs, skipped = results.load([tmp_path])
    assert len(runs) == 2 and len(skipped) == 1 and "the same run" in skipped[0]


def test_mixed_settings_in_a_row_are_refused(tmp_path, capsys):
    write(tmp_path, make_result("lora", 0), make_result("lora", 1, settings={"rank": 16}))
    error = refused(capsys, tmp_path)
    assert "seed0.json" in error and "seed1.json" in error and "rank is 8 and 16" in error
    assert not (tmp_path / "README.md").exists()


def refused(capsys, *words):
    """The one line with which compare.py ends."""
    with pytest.raises(SystemExit) as stopped:
        compare.main([*map(str, words)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


# --------------------------------------------------------------------------------------- cautions


def changed(made, values, **where):
    """The results, in which nested `values` replace those of the results that `where` selects.

    where: {key of a result: the value, or several}.
    """
    for result in made:
        if all(result[key] in (x if isinstance(x, list) else [x]) for key, x in where.items()):
            for part, value in values.items():
                result[part] = result[part] | value
    return made


def two(hira=0, **options):
    return make_study({"lora": 0, "hira": hira}, **options)


def edges(seeds):
    best = {"dev": {"accuracy": 0.9}}
    return changed(two(), {"metrics": best}, method="hira", lr=4e-3, seed=seeds)


def low(gain, lm):
    made = two(rows=1000, spread=0, lm=lm)
    made[3:6] = make_study({"lora": gain * (1 + lm)}, 2, 1000, spread=0, lm=lm)[3:]
    return made


def on_gpu(precision):
    gpu = {"device": "cuda NVIDIA H200", "precision": precision}
    return changed(two(9), {"environment": gpu}, method="lora")


def other_examples(method, **where):
    made = two(9) + make_study({"lora-rank32": 0})
    return changed(made, {"data": {"dev_sha256": "changed"}}, name=method, **where)


EXTRA = [make_result("hira", seed, 8e-3, correct=[1] * 400, dev=0.99) for seed in range(5)]
CASES = {  # results, a caution or none, the verdict on LoRA and HiRA
    "nothing": (two(), None, "equal"),
    "2.5 points lower": (low(-2.5, False), None, "undecided"),
    "two seeds at the edge": (edges([0, 1]), None, "equal"),
    "three seeds at the edge": (edges([0, 1, 2]), "was picked. HiRA: in 3 of 6 seeds.", "equal"),
    "one rate": (two(9, rates=(1e-3,)), "one learning rate was tried. LoRA: 0.001", "better"),
    "one, and one more": (two(9, rates=(1e-3,)) + EXTRA[:1], "0.008 lacks seeds", "better"),
    "a rate at one seed": (two(9) + EXTRA[:1], "HiRA: learning rate 0.008 lacks seeds", "better"),
    "a rate at five seeds": (two(9) + EXTRA, "HiRA: learning rate 0.008 lacks seeds", "better"),
    "no whole seed": (two(seeds=7)[:-2], "HiRA: seed 6 lacks learning rates", "equal"),
    "4 points lower": (low(-4, False), "more than 3 points worse than the method", "undecided"),
    "5 % worse": (low(-2.5, True), None, "undecided"),
    "8 % worse": (low(-4, True), "than the method's median. LoRA: seed 1.", "undecided"),
    "fp32 on two machines": (on_gpu("fp32"), "different machines or versions", "better"),
    "bf16 on two machines": (on_gpu("bf16"), "different machines or versions", "none"),
    "a variant's examples": (other_examples("lora-rank32", seed=5), "examples at seed 5", "better"),
    "other examples": (other_examples("hira", seed=[0, 5]), "examples at seed 0, 5", "none"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_makes_a_comparison_less_fair_is_said(case, tmp_path):
    made, caution, verdict = CASES[case]
    (group,) = judged(tmp_path, *made)
    text = "\n".join(group.cautions)
    assert caution in text if caution else not text
    pair = next(pair for pair in group.pairs if {pair.a, pair.b} == {"LoRA", "HiRA"})
    assert pair.verdict == verdict and ("bf16" in pair.why) == (case[:4] == "bf16")
    assert (group.detectable is None) == (verdict == "none")


def test_different_numbers_of_learning_rates_have_no_verdict(tmp_path):
    made = make_study({"lora": 0, "qlora": 0}) + make_study({"hira": 9}, rates=(1e-3, 2e-3))
    (group,) = judged(tmp_path, *made)
    assert [pair.verdict for pair in group.pairs] == ["equal", "none", "none"]
    assert group.pairs[1].why == "3 and 2 learning rates to choose from"


def test_settings_and_machines_that_differ_are_named(tmp_path):
    made = make_study({"lora": 0}) + make_study({"hira": 0}, settings={"weight_decay": 0.1})
    gpu = {"torch": "2.9.1+cu128", "device": "cuda NVIDIA H200"}
    changed(made, {"environment": gpu}, method="lora", seed=0)
    changed(made, {"environment": {"torch": "2.8.1"}}, method="lora", seed=1)  # as 2.8.0
    (group,) = judged(tmp_path, *made)
    text = "\n".join(group.cautions)
    assert "--weight_decay differs. LoRA: 0; HiRA: 0.1" in text
    assert "NVIDIA H200, torch 2.9, transformers 5.0: LoRA; " in text
    assert "cpu, torch 2.8, transformers 5.0: LoRA and HiRA." in text
    assert group.pairs[0].verdict == "equal"


def test_full_data_stands_beside_its_study_with_its_order(tmp_path):
    """Two repeats of one seed: one in the study's order, one not."""
    write(tmp_path, *make_study({"lora": 0, "hira": 9, "qlora": 2}), name="sst2.jsonl")
    for name, gains in {"full_data": (0, 9, 2), "longer": (9, 0, 2)}.items():
        gains = dict(zip(("lora", "hira", "qlora"), gains, strict=True))
        made = make_study(gains, 1, rates=(2e-3,))
        changed(made, {"data": {"train": 60_000 if name == "full_data" else 70_000}})
        write(tmp_path, *made, name=f"{name}.jsonl")
    compare.main([str(tmp_path), "--no_plots"])
    text = (tmp_path / "README.md").read_text()
    assert text.count("\n## ") == 1 and text.count("### Does the order hold") == 2
    parts = text.split("### Does the order hold")[1:]
    order = "Changed: training examples {} instead of 8000. Best score first: {}."
    assert order.format(60_000, "HiRA, QLoRA, LoRA") + " The order holds." in parts[0]
    assert order.format(70_000, "LoRA, QLoRA, HiRA") in parts[1]
    assert "does not hold: above it is HiRA, QLoRA, LoRA." in parts[1]
    assert parts[0].count("| 1 × 1 |") == 3 and "| 3 × 6 |" in text
    (tmp_path / "sst2.jsonl").unlink()  # without its study it stands alone
    compare.main([str(tmp_path), "--no_plots"])
    assert "Does the order hold" not in (tmp_path / "README.md").read_text()


# ------------------------------------------------------------------------------------------ files


def broken_results():
    """{what is wrong: text} of files that are no usable result."""
    whole, data = json.dumps(make_result()), make_result()["data"]
    changes = {
        "no examples": {"test_examples": {}},
        "examples of another size": {"test_examples": {"correct": "AAAA"}},
        "no base64": {"test_examples": {"correct": "?!"}},
        "metrics a list": {"metrics": []},
        "a score beyond all numbers": {"metrics": {"dev": {"accuracy": 10**400}}},
        "name a number": {"name": 3},
        "a name of 5,000": {"dataset": "x" * 5000},
        "no name": {"model": ""},
        "lr a word": {"lr": "fast"},
        "lr of 400 digits": {"lr": 10**400},
        "seed of 400 digits": {"seed": 10**400},
        "seed not a number": {"seed": math.nan},
        "seed a bool": {"seed": True},
        "task unknown": {"data": {**data, "task": "vision"}},
        "counts as words": {"data": {**data, "train": "many"}},
        "classes as words": {"data": {**data, "class_counts": {"test": ["a"]}}},
        "time a list": {"time": [1]},
        "memory a number": {"memory": 3},
        "memory of 400 digits": {"memory": {"train": {"optimizer": 10**400}}},
        "inference a number": {"inference": 3},
        "environment missing": {"environment": None},
        "settings empty": {"settings": {}},
        "a setting with parts": {"settings": make_result()["settings"] | {"rank": {"a": 1}}},
    }
    settings = [("rank", value) for value in (math.nan, math.inf, "8", True, [8], 10**400)]
    settings += [("paged", "yes"), ("paged", 1), ("structure", math.nan), ("update", [])]
    for key, value in settings:
        changes[f"{key} {value}"] = {"settings": make_result()["settings"] | {key: value}}
    changes["schema 2"] = {"schema": 2}
    odd = {what: json.dumps({**json.loads(whole), **change}) for what, change in changes.items()}
    deep = json.dumps(make_result() | {"flops": "deep"})
    odd["nested 900 deep"] = deep.replace('"deep"', '{"a":' * 900 + "1" + "}" * 900)
    odd |= {"torn": whole[:200], "empty": "", "a word": '"lora"', "not text": "\udcff\udcfe"}
    return odd | {"foreign": '{"r": 8}', "deep": "[" * 100_000, "a number": "1" * 5000}


def test_unusable_files_are_skipped_with_a_line_each(tmp_path, capsys):
    odd = broken_results()
    for i, text in enumerate(odd.values()):
        (tmp_path / f"odd{i}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    os.mkfifo(tmp_path / "pipe.json")
    write(tmp_path, make_result())
    runs, skipped = results.load([tmp_path])
    lines = capsys.readouterr().err.splitlines()
    assert len(runs) == 1 and len(skipped) == len(lines) == len(odd) + 3
    assert all(any(f"odd{i}.json: " in line for line in lines) for i in range(len(odd)))
    assert not any(word in " ".join(lines) for word in ("object", "int too", "math domain"))
    compare.main([str(tmp_path)])
    assert (tmp_path / "README.md").read_text().count("odd") == len(odd)


def test_odd_but_usable_results_are_shown(tmp_path, capsys):
    """Text that a terminal, a page or a formula would read; a latency without a base; no costs."""
    odd = [make_result("lora", 0, timed=True), make_result("lora", 1)]
    del odd[0]["inference"][0]["base"], odd[0]["inference"][1]["unmerged"]
    for key in ("parameters", "time", "disk"):
        del odd[1][key]
    odd[1] |= {"memory": {}, "flops": {}, "inference": []}
    odd.append(make_result("hira", 0, name="\ud800\x1b]0;title\x07", settings={"odd": 10**40}))
    odd.append(make_result("qlora", 0) | {"model": r"$\frac{"})
    odd[-1]["base"] = {"sha256": "\ud800"}
    write(tmp_path, *odd, name="all.jsonl")
    compare.main([str(tmp_path)])
    shown = capsys.readouterr()
    assert "skipped" not in shown.err and "\x1b" not in shown.out and r"$\frac{" in shown.out
    assert r"\$\\frac{" in (tmp_path / "README.md").read_text()


def test_lines_of_a_jsonl_file_are_named_by_number(tmp_path, capsys):
    texts = [json.dumps(make_result("lora", 0)), "", "{", json.dumps(make_result("lora", 1))[:-9]]
    (tmp_path / "study.jsonl").write_text("\n".join(texts))
    runs, skipped = results.load([tmp_path / "study.jsonl"])
    assert len(runs) == 1
    assert [line.split(": ")[0] for line in skipped] == ["study.jsonl:3", "study.jsonl:4"]
    assert f"{tmp_path}/study.jsonl:3" in capsys.readouterr().err


def test_a_doubled_run_counts_once(tmp_path, capsys):
    made = make_study({"lora": 0, "hira": 9})
    write(tmp_path, *made)
    write(tmp_path, *made[:2], name="again.jsonl")
    runs, skipped = results.load([tmp_path])
    assert len(runs) == len(made) and len(skipped) == 2
    assert "the same run as again.jsonl:1" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["dev", "test"])
def test_one_run_with_two_scores_is_refused_with_both_paths_and_dates(split, tmp_path, capsys):
    write(tmp_path / "mine", make_result())
    other = make_result(correct=np.arange(100) < 81) if split == "test" else make_result(dev=0.7)
    write(tmp_path / "theirs", other | {"created": "2026-12-24"})
    error = refused(capsys, tmp_path / "mine", tmp_path / "theirs")
    for words in ("mine/sst2-lora", "(2026-12-01T00:00:00Z)", "theirs/sst2-lora", "(2026-12-24)"):
        assert words in error, words


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_nothing_to_read_is_one_line(tmp_path, path, capsys):
    (tmp_path / "empty").mkdir()
    assert path in refused(capsys, tmp_path / path)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x"])
@pytest.mark.parametrize("flag", ["--margin", "--price"])
def test_a_margin_or_price_that_is_none_is_one_line(tmp_path, flag, value, capsys):
    write(tmp_path, make_result())
    assert flag in refused(capsys, tmp_path, flag, value)


def test_costs_of_two_machines_are_not_averaged(tmp_path):
    def made(seed, device, peak, lr=1e-3, dev=0.8):
        return make_result("lora", seed, lr, device=device, peak=peak, dev=dev)

    gpu, mean = "cuda H200", {}
    runs = [made(0, gpu, 300), made(1, "cpu", 100), made(2, gpu, 320)]
    runs += [made(seed, gpu, 340, lr=2e-3, dev=0.1) for seed in range(3)]
    for case in ("seed 1 was measured on the GPU at the other rate", "it never was"):
        (group,) = judged(tmp_path, *runs)
        mean[case] = group.rows[0].costs["memory.train.peak"] / 2**20
        runs[4]["memory"] = {}
    assert list(mean.values()) == [320, 310]
    assert group.rows[0].costs["metrics.test.accuracy"] == pytest.approx(0.8)


def test_an_untrained_language_model_has_no_training_memory():
    result = make_result("head_only", nll=np.full(30, 60.0), untrained=True)
    del result["memory"]["train"]
    costs = results.read_run(json.dumps(result)).costs
    assert "memory.train.peak" not in costs and costs["memory.inference.peak"] == 200 * 2**20
