"""compare.py: statistics against scipy and by simulation, tuning, verdicts, cautions, bad files."""

import base64
import json
import math
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import compare
from harness import results, tables

METHODS = ("lora", "qlora", "hira", "sparse_lora")
PARTS = ("frozen weights", "trained weights", "optimizer", "gradients", "activations")


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
):
    """A result of schema 2. correct: (rows,) booleans; or nll: (blocks,), of 20 scored tokens each.

    dev: accuracy or perplexity. peak: MiB, half of it frozen weights.
    """
    if nll is None:
        task, metric = "classification", "accuracy"
        correct = np.arange(100) % 5 > 0 if correct is None else np.asarray(correct, bool)
        rows = {"correct": base64.b64encode(np.packbits(correct).tobytes()).decode()}
        score, size = float(correct.mean()), len(correct)
    else:
        task, metric, size = "mlm", "mlm_perplexity", len(nll)
        rows = {"nll": list(map(float, nll)), "scored": [20] * size}
        score = math.exp(sum(rows["nll"]) / (20 * size))
    flags = {"epochs": 0 if untrained else 1, "max_steps": None, "batch_size": 32, "grad_accum": 1}
    flags |= {"head_lr": 0.01, "max_length": 128, "rank": 8, "weight_decay": 0.0}
    memory = {
        part: peak * 2**20 * x / 8 for part, x in zip(PARTS, (4, 0.5, 1, 0.5, 1), strict=True)
    }
    memory["temporaries"] = peak * 2**20 / 8
    speed = {"latency_ms": {"mean": 10.0, "p50": 10.0, "p95": 11.0}, "samples_per_second": 320.0}
    states = {"base": speed, "merged": speed, "unmerged": speed}
    metrics = {"test": {metric: score, "loss": 0.4}, "dev": {metric: dev, "loss": 0.4}}
    return {
        "schema": 2,
        "method": method,
        "name": name or method,
        "dataset": dataset,
        "model": "models/MiniLM",
        "lr": lr,
        "seed": seed,
        "untrained": untrained,
        "settings": flags | (settings or {}),
        "data": {
            "task": task,
            "test_split": "test",
            "train": 8000,
            "dev": 500,
            "test": size,
            "official": size,
            "train_sha256": f"train {seed}",
            "dev_sha256": f"dev {seed}",
            "test_sha256": "test",
        },
        "base": {"sha256": "base", "weights": 22_000_000},
        "metrics": metrics,
        "rows": rows,
        "parameters": {"adapter": trainable - 770, "head": 770, "trainable": trainable},
        "time": {
            "train_seconds": 60.0,
            "epoch_seconds": [19.0, 21.0, 20.0],
            "accelerator_hours": 60 / 3600,
        },
        "memory": {
            "train": memory,
            "train_allocator": 333 * 2**20 if "cuda" in device else None,
            "inference": dict(memory),
        },
        "flops": {"step": 2e10, "total": 5e12, "inference_row": 5e8},
        "inference": [{"batch": 32, "length": 64, **states}] if timed else [],
        "disk": {"adapter": 300_000, "base": 9e7, "merged": 9e7},
        "environment": {
            "device": device,
            "cpu": "EPYC",
            "processes": 1,
            "threads": 1,
            "torch": "2.8.0",
            "transformers": "5.0",
            "bitsandbytes": "0.48",
            "commit": "0123456789abcdef",
            "dirty": False,
        },
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
        method = name.split("-")[0]
        lucks = rng.normal(0, spread, seeds)
        for seed, luck in enumerate(lucks - lucks.mean()):
            for rate in rates:
                best = 0.82 if rate == rates[len(rates) // 2] else 0.8
                same = {"name": name, **options}
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
    return [compare.analyse(found, margin) for found in compare.group_runs(runs)]


# -------------------------------------------------------------------------------------- statistics


def two_way(rng, studies, k, n, m, seeds, rows, rest):
    """Scores (studies, k methods, n seeds, m rows) whose pairwise differences have these sds."""
    parts = [(seeds, (n, 1)), (rows, (1, m)), (rest, (n, m))]
    return sum(sd / 2**0.5 * rng.standard_normal((studies, k, *shape)) for sd, shape in parts)


def noises_of(d):
    """compare.noises for many studies at once: d (studies, n, m) -> (3, studies)."""
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
        _, p_pair, equal_pair = compare.judge(d.mean((1, 2)), noises_of(d), n, m, margin)
        p.append(p_pair)
        equal.append(equal_pair)
    return np.array([compare.holm(row) for row in np.array(p).T]) < 0.05, np.array(equal).T


def test_noises_are_the_squared_standard_errors_of_seeds_and_rows():
    d = np.random.default_rng(0).normal(1, 2, (5, 30))
    seeds, rows, rest = compare.noises(d)
    assert seeds == pytest.approx(stats.sem(d.mean(1)) ** 2)
    assert rows == pytest.approx(stats.sem(d.mean(0)) ** 2)
    left = d - d.mean(1, keepdims=True) - d.mean(0) + d.mean()
    assert rest == pytest.approx((left**2).sum() / (4 * 29) / 150)
    assert noises_of(d[None])[:, 0] == pytest.approx([seeds, rows, rest])


def test_both_noises_on_a_worked_example():
    error, df = compare.both_noises(np.array([4.0, 3.0, 1.0]), 5, 11)
    assert error == pytest.approx(6**0.5)
    assert df == pytest.approx(36 / (16 / 4 + 9 / 10 + 1 / 40))
    error, df = compare.both_noises(np.array([4.0, 0.5, 1.0]), 5, 11)  # never less than one alone
    assert error == 2
    assert compare.both_noises(np.zeros(3), 5, 11) == (0, 4)


def test_where_rows_do_not_matter_the_test_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 8), rng.normal(0, 1, 8)
    d = np.repeat((a - b)[:, None], 20, 1)
    p_seeds, p, _ = compare.judge(d.mean(), compare.noises(d), 8, 20, 1)
    assert p_seeds == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert p == pytest.approx(p_seeds)
    expected = stats.t.interval(0.95, 7, (a - b).mean(), stats.sem(a - b))
    half = compare.half_width(compare.noises(d), 8, 20)
    assert (d.mean() - half, d.mean() + half) == pytest.approx(expected)


def test_where_seeds_do_not_matter_the_test_is_that_over_rows():
    rows = np.random.default_rng(0).normal(0.3, 1, 50)
    d = np.repeat(rows[None], 6, 0)
    _, p, _ = compare.judge(d.mean(), compare.noises(d), 6, 50, 1)
    assert p == pytest.approx(stats.ttest_1samp(rows, 0).pvalue)


def test_equal_is_two_one_sided_tests_at_5_percent():
    seeds = np.random.default_rng(1).normal(0.2, 0.5, 9)
    d = np.repeat(seeds[:, None], 10, 1)
    below = stats.ttest_1samp(seeds, 0.6, alternative="less").pvalue
    above = stats.ttest_1samp(seeds, -0.6, alternative="greater").pvalue
    for margin in (0.3, 0.6, 1.0):
        below = stats.ttest_1samp(seeds, margin, alternative="less").pvalue
        above = stats.ttest_1samp(seeds, -margin, alternative="greater").pvalue
        *_, equal = compare.judge(d.mean(), compare.noises(d), 9, 10, margin)
        assert equal == (max(below, above) < 0.05)


@pytest.mark.parametrize(("mean", "p", "equal"), [(0.0, 1, True), (0.5, 0, True), (2.0, 0, False)])
def test_without_any_spread_there_is_no_doubt(mean, p, equal):
    d = np.full((6, 10), mean)
    assert compare.judge(d.mean(), compare.noises(d), 6, 10, 1.0) == (p, p, equal)


def test_holm_on_a_worked_example():
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.6, 0.9]).tolist() == [1, 1]
    adjusted = compare.holm([0.01, math.nan])
    assert adjusted[0] == pytest.approx(0.02) and math.isnan(adjusted[1])
    assert len(compare.holm([])) == 0


def test_perplexity_is_compared_as_a_ratio_with_the_error_of_a_ratio():
    rng = np.random.default_rng(0)
    scored = rng.integers(10, 30, 200)
    runs = [{"rows": {"nll": scored * rng.normal(x, 0.3, 200), "scored": scored}} for x in (4, 4.1)]
    a, b = (results.row_values(run) for run in runs)
    totals = [run["rows"]["nll"].sum() / scored.sum() for run in runs]
    assert a.mean() - b.mean() == pytest.approx(100 * (totals[0] - totals[1]))
    ratio = results.in_units(a.mean() - b.mean(), "mlm")
    assert ratio == pytest.approx(100 * (math.exp(totals[0]) / math.exp(totals[1]) - 1))
    # The standard error against the bootstrap over blocks.
    picked = rng.integers(200, size=(4000, 200))
    losses = [run["rows"]["nll"][picked].sum(1) / scored[picked].sum(1) for run in runs]
    assert stats.sem(a - b) == pytest.approx(np.std(100 * (losses[0] - losses[1])), rel=0.05)


def test_a_margin_of_2_percent_is_a_ratio_of_1_02():
    assert results.margin_on_scale(2, "clm") == pytest.approx(100 * math.log(1.02))
    assert results.in_units(results.margin_on_scale(2, "clm"), "clm") == pytest.approx(2)
    assert results.margin_on_scale(1, "classification") == 1


@pytest.mark.parametrize("rows", [0, 1, 3], ids=lambda x: f"rows' noise {x} times the seeds'")
@pytest.mark.parametrize("seeds", [6, 10])
def test_no_difference_is_called_better_in_at_most_5_percent_of_studies(seeds, rows):
    """Family-wise over six pairs, whether training or the test rows are what varies."""
    sd = rows * (60 / seeds) ** 0.5
    y = two_way(np.random.default_rng(0), 4000, 4, seeds, 60, 1, sd, 0.5)
    better, _ = verdicts_of(y, 1.0)
    assert better.any(1).mean() <= 0.05 + 2 * (0.05 * 0.95 / 4000) ** 0.5


def test_both_intervals_apart_would_not_be_enough():
    """Why p is not that of the seeds alone with an interval over rows beside it."""
    y = two_way(np.random.default_rng(0), 4000, 4, 10, 60, 1, 3 * 6**0.5, 0.5)
    wrong = np.zeros(4000, bool)
    p = []
    for a, b in combinations(range(4), 2):
        d = y[:, a] - y[:, b]
        p.append(stats.ttest_1samp(d.mean(2), 0, axis=1).pvalue)
    seeds = np.array([compare.holm(row) for row in np.array(p).T]) < 0.05
    for i, (a, b) in enumerate(combinations(range(4), 2)):
        d = (y[:, a] - y[:, b]).mean(1)
        wrong |= seeds[:, i] & (stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05)
    assert wrong.mean() > 0.1


def test_a_difference_of_2_sd_is_found_in_90_percent_of_studies():
    y = two_way(np.random.default_rng(0), 4000, 4, 10, 60, 1, 0, 0.1)
    y[:, 0] += 2
    better, _ = verdicts_of(y, 1.0)
    assert better[:, :3].mean() >= 0.9


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_difference_of_the_margin_is_called_equal_in_at_most_5_percent(rows):
    y = two_way(np.random.default_rng(0), 4000, 2, 10, 60, 1, rows * 6**0.5, 0.5)
    margin = 2.5 * (1 + rows**2) ** 0.5
    y[:, 0] += margin
    _, equal = verdicts_of(y, margin)
    assert equal.mean() <= 0.05 + 2 * (0.05 * 0.95 / 4000) ** 0.5


def test_the_power_on_the_page_is_that_of_whole_studies():
    """power() draws mean squares; here whole studies, seeds and rows drawn as in a pilot."""
    n, m, sds = 6, 60, (0.6, 2.0, 3.0)
    y = two_way(np.random.default_rng(0), 3000, 2, n, m, *sds)
    true = np.array([sds[0] ** 2 / n, sds[1] ** 2 / m, sds[2] ** 2 / (n * m)])
    noise = np.array([true[0] + true[2], true[1] + true[2], true[2]])
    found, equal = compare.power(noise, n, m, 1.5, 0.05)
    d = y[:, 0] - y[:, 1]
    p = compare.judge(d.mean((1, 2)) + 1.5, noises_of(d), n, m, 1.5)[1]
    assert found == pytest.approx((p < 0.05).mean(), abs=0.03)
    assert equal == pytest.approx(verdicts_of(y, 1.5)[1].mean(), abs=0.03)
    assert compare.power(noise, n, m, 1.5, 0.05) == (found, equal)


def test_what_decides_names_seeds_rows_or_both():
    # one noise large, the other small; a difference of 0.9 with a margin of 1
    many, none = 0.8, 1e-4
    seeds, rows = compare.what_decides(0.9, np.array([many, none, none / 2]), 6, 500, 1, 0.05 / 6)
    assert seeds > 6 and rows == 500
    noise = compare.noises_at(np.array([many, none, none / 2]), 6, 500, seeds, rows)
    assert compare.judge(0.9, noise, seeds, rows, 1)[1] < 0.05 / 6
    noise = compare.noises_at(np.array([many, none, none / 2]), 6, 500, seeds - 1, rows)
    assert compare.judge(0.9, noise, seeds - 1, rows, 1)[1] > 0.05 / 6
    seeds, rows = compare.what_decides(0.9, np.array([none, many, none / 2]), 6, 500, 1, 0.05 / 6)
    assert seeds == 6 and rows > 500
    seeds, rows = compare.what_decides(0.9, np.array([many, many, none]), 6, 500, 1, 0.05 / 6)
    assert seeds > 6 and rows > 500
    assert compare.what_decides(0.01, np.array([100.0, 100, 1]), 6, 500, 0.01, 0.001) is None


# ------------------------------------------------------------------------------ tuning and verdicts


@pytest.mark.parametrize(("sign", "rate"), [(1, 2e-3), (-1, 1e-3)])
def test_tuning_takes_the_best_dev_score(sign, rate):
    dev = {4e-3: 0.7, 1e-3: 0.6, 2e-3: 0.8}
    by_rate = {lr: {"lr": lr, "dev": x} for lr, x in dev.items()}
    assert compare.tune(by_rate, sign)["lr"] == rate


@pytest.mark.parametrize("sign", [1, -1])
def test_of_equal_dev_scores_the_smaller_rate_counts(sign):
    by_rate = {lr: {"lr": lr, "dev": 0.8} for lr in (4e-3, 1e-3, 2e-3)}
    assert compare.tune(by_rate, sign)["lr"] == 1e-3


def test_each_seed_chooses_by_its_own_dev_rows_and_only_that_test_score_counts(tmp_path):
    made = []
    for seed in range(3):
        for i, lr in enumerate((1e-3, 2e-3)):
            right = np.arange(100) < 50 + 10 * i + seed
            made.append(
                make_result("lora", seed, lr, correct=right, dev=0.8 + 0.1 * (i == seed % 2))
            )
    (group,) = judged(tmp_path, *made)
    (row,) = group["rows"]
    assert row["chosen"] == [1e-3, 2e-3, 1e-3]
    assert row["scores"] == pytest.approx([50, 61, 52])
    assert row["score"] == pytest.approx(163 / 3)
    assert row["interval"] == pytest.approx(
        stats.t.interval(0.95, 2, 163 / 3, stats.sem([50, 61, 52]))
    )
    assert row["dev"][2e-3] == pytest.approx([80, 90, 80])


def test_the_less_perplexity_the_better(tmp_path):
    (group,) = judged(tmp_path, *make_study({"lora": 0, "hira": 9}, lm=True))
    (pair,) = group["pairs"]
    assert (pair["verdict"], pair["better"]) == ("better", "HiRA")
    assert pair["lead"][1] < pair["lead"][0] < pair["lead"][2]
    assert pair["mean"] > 0 and {lr for row in group["rows"] for lr in row["chosen"]} == {2e-3}
    assert pair["lead"] == pytest.approx([pair["mean"], *pair["intervals"]["both"]])  # LoRA - HiRA


def test_verdicts_better_equal_undecided(tmp_path):
    gains = {"lora": 0, "qlora": 5, "hira": 0, "sparse_lora": 0.7}
    (group,) = judged(tmp_path, *make_study(gains, seeds=8, rows=1000, spread=0.7))
    found = {(pair["a"], pair["b"]): pair for pair in group["pairs"]}
    assert len(found) == 6
    assert found["LoRA", "QLoRA"]["better"] == "QLoRA"
    assert found["LoRA", "HiRA"]["verdict"] == "equal"
    assert found["LoRA", "Sparse LoRA"]["verdict"] == "undecided"
    seeds, rows = found["LoRA", "Sparse LoRA"]["needs"]
    assert 8 < seeds < 30 and rows == 1000
    for pair in group["pairs"]:
        assert pair["p_holm"] >= pair["p"] >= pair["p_seeds"] - 1e-12
        d = np.array(pair["each"])
        assert pair["p_seeds"] == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
        assert pair["intervals"]["seeds"] == pytest.approx(
            stats.t.interval(0.95, 7, d.mean(), stats.sem(d))
        )


def test_below_six_shared_seeds_there_is_no_verdict(tmp_path):
    (group,) = judged(tmp_path, *make_study({"lora": 0, "hira": 9}, seeds=5))
    (pair,) = group["pairs"]
    assert pair["verdict"] == "none" and "found: 5" in pair["why"]
    assert group["power"] is None


def test_the_power_on_the_page_holds_for_every_pair(tmp_path):
    made = make_study({"lora": 0, "qlora": 0, "hira": 0}, seeds=8, rows=1000, spread=0.2)
    made = [r for r in made if r["method"] != "hira"] + make_study({"hira": 0}, 7, 1000, 3)
    (group,) = judged(tmp_path, *made)
    each = [compare.power(*pair["_seen"][1:], 1, 0.05 / 3) for pair in group["pairs"]]
    assert group["power"]["found"] == min(found for found, _ in each) < 0.5
    assert group["power"]["equal"] == min(equal for _, equal in each)
    assert max(found for found, _ in each) > 0.9 and group["power"]["seeds"] == 7


@pytest.mark.parametrize("rows, verdict", [(50, "undecided"), (1000, "equal")])
def test_few_rows_that_no_run_moves_are_no_proof(tmp_path, rows, verdict):
    """One row of 50 is two points: that none moved does not make a point out of the question."""
    (group,) = judged(tmp_path, *make_study({"lora": 0, "hira": 0}, rows=rows, spread=0))
    (pair,) = group["pairs"]
    assert pair["mean"] == 0 and pair["verdict"] == verdict
    assert pair["intervals"]["rows"][1] == pytest.approx(stats.t.ppf(0.975, rows - 1) * 100 / rows)


def test_a_diverged_language_model_is_no_traceback(tmp_path):
    made = make_study({"lora": 0}, seeds=2, lm=True)
    made += (
        make_study({"hira": -30_000}, seeds=1, lm=True) + make_study({"hira": 0}, 2, lm=True)[3:]
    )
    write(tmp_path, *made)
    compare.main([str(tmp_path), "--no_plots"])


def test_a_single_seed_and_no_shared_seed_are_no_error(tmp_path):
    made = [make_result("lora", 0), make_result("hira", 1), make_result("qlora", 1)]
    (group,) = judged(tmp_path, *made)
    assert [pair["verdict"] for pair in group["pairs"]] == ["none"] * 3


def test_only_default_variants_are_tested_the_others_stand_beside_lora(tmp_path):
    gains = {"lora": 0, "qlora": 0, "lora-rank32": 3, "hira-x": 1, "qlora-x": 3}
    made, right = make_study(gains), np.arange(400) % 2 > 0
    made.append(
        make_result("lora", 0, name="lora-untrained", untrained=True, correct=right),
    )
    (group,) = judged(tmp_path, *made)
    assert [(pair["a"], pair["b"]) for pair in group["pairs"]] == [("LoRA", "QLoRA")]
    rows = {row["label"]: row for row in group["rows"]}
    assert list(rows) == ["LoRA", "LoRA rank32", "QLoRA", "QLoRA x", "HiRA x", "LoRA untrained"]
    beside = rows["LoRA rank32"]["beside"]
    assert beside["mean"] == pytest.approx(3, abs=1) and beside["p_holm"] is None
    assert rows["LoRA"]["beside"] is None and rows["LoRA untrained"]["beside"] is None
    [parent] = rows["QLoRA x"]["parents"]  # a variant stands beside its own method, too
    assert (parent["a"], parent["b"]) == ("QLoRA x", "QLoRA")
    scores = {label: np.array(rows[label]["scores"]) for label in ("QLoRA x", "QLoRA")}
    assert parent["mean"] == pytest.approx((scores["QLoRA x"] - scores["QLoRA"]).mean())
    assert not any(rows[x]["parents"] for x in ["LoRA rank32", "HiRA x", "QLoRA", "LoRA untrained"])


@pytest.mark.parametrize("name", ["{}-rank16", "mine", "{}-targetsq-v"])
def test_one_changed_flag_for_all_four_is_tested_as_the_default_is(name, tmp_path):
    """As where the model's layers have names of their own and --targets must be given."""
    made = make_study({"lora": 0, "full": 0})[:18]
    for method, gain in {"lora": 0, "qlora": 0, "hira": 5, "sparse_lora": 0}.items():
        own = make_study({method: gain}, name=name.format(method))
        made += [run | {"method": method} for run in own]
    (group,) = judged(tmp_path, *made)
    tested = [row for row in group["rows"] if row["tested"]]
    assert [row["method"] for row in tested] == list(METHODS)
    assert {row["name"] for row in tested} == {name.format(method) for method in METHODS}
    assert len(group["pairs"]) == 6 and all(pair["verdict"] != "none" for pair in group["pairs"])
    hira = next(row for row in tested if row["method"] == "hira")
    assert hira["beside"]["b"] == tested[0]["label"]
    words = " ".join(tables.verdicts(group))
    assert f"**{hira['label']} is better**" in words
    assert tables.versus_lora(group).startswith(f"{hira['label']} better than LoRA")
    default = next(row for row in group["rows"] if row["name"] == "lora")
    assert not default["tested"] and default["beside"]["b"] == tested[0]["label"]


def test_of_two_variants_that_as_many_have_the_default_is_tested(tmp_path):
    made = make_study(dict.fromkeys(["lora", "lora-rank2", "hira", "hira-rank2", "qlora-x"], 0))
    (group,) = judged(tmp_path, *made)
    assert [row["name"] for row in group["rows"] if row["tested"]] == ["lora", "hira"]
    (group,) = judged(tmp_path / "other", *[run for run in made if run["method"] != "hira"])
    assert not group["pairs"] and "fewer than two of the four" in tables.verdicts(group)[0]


def test_a_hybrid_stands_beside_both_its_methods(tmp_path):
    names = ["lora", "qlora", "hira", "sparse_lora-contextual", "hybrid", "hybrid-contextual"]
    (group,) = judged(tmp_path, *make_study(dict.fromkeys(names, 0)))
    found = {row["label"]: [pair["b"] for pair in row["parents"]] for row in group["rows"]}
    assert found["QHiRA"] == ["QLoRA", "HiRA"]
    assert found["Sparse QLoRA"] == ["QLoRA", "Sparse LoRA contextual"]
    assert found["Sparse LoRA contextual"] == found["LoRA"] == []


def test_groups_are_by_data_base_and_what_must_agree(tmp_path):
    other = make_result("hira", 0)
    other["base"]["sha256"] = "another"
    longer = make_result("hira", 0, settings={"epochs": 3})
    rates = make_result("hira", 0, settings={"head_lr": 0.02})
    split = make_result("hira", 1, settings={"batch_size": 16, "grad_accum": 2})
    text = make_result("hira", 0, dataset="imdb")
    groups = judged(tmp_path, make_result("lora", 0), other, longer, rates, split, text)
    assert [len(group["rows"]) for group in groups] == [2, 1, 1, 1, 1]
    assert [group["dataset"] for group in groups][-1] == "imdb"


def test_an_untrained_row_joins_every_group_of_its_data_and_base(tmp_path):
    base = make_result("head_only", 0, name="head_only-untrained", untrained=True)
    longer = make_result("lora", 0, settings={"epochs": 3})
    groups = judged(tmp_path, make_result("lora", 0), longer, base)
    assert [[row["label"] for row in group["rows"]] for group in groups] == [
        ["LoRA", "Untrained base"]
    ] * 2
    (alone,) = judged(tmp_path, base)
    assert [row["label"] for row in alone["rows"]] == ["Untrained base"]


def test_an_untrained_row_may_differ_in_what_only_training_heeds(tmp_path):
    """As from `python common.py` on a language model with and without --epochs 0."""
    same = {"name": "head_only-untrained", "untrained": True}
    made = [make_result("head_only", 0, settings={"epochs": n}, **same) for n in (0, 3)]
    write(tmp_path, make_result("lora", 0), *made, name="all.jsonl")
    runs, skipped = results.load([tmp_path])
    (group,) = [compare.analyse(found, None) for found in compare.group_runs(runs)]
    assert [row["label"] for row in group["rows"]] == ["LoRA", "Untrained base"]
    assert len(skipped) == 1 and "the same run" in skipped[0]


def test_groups_of_one_data_set_and_base_have_titles_of_their_own(tmp_path):
    made = make_study({"lora": 0}, seeds=2) + make_study({"lora": 0}, 2, settings={"epochs": 9})
    groups = judged(tmp_path, *made)
    tables.tell_apart(groups)
    titles = {tables.title(group) for group in groups}
    assert titles == {f"SST-2 with MiniLM ({number} epochs)" for number in (1, 9)}
    for other in ({"batch_size": 8}, {"head_lr": 1e-3}, {"max_steps": 7}, {"max_length": 64}):
        pair = judged(
            tmp_path / next(iter(other)), *made[:6], *make_study({"lora": 0}, 2, settings=other)
        )
        tables.tell_apart(pair)
        assert len({tables.title(group) for group in pair}) == len(pair) == 2
    tables.tell_apart(groups[:1])
    (alone,) = judged(tmp_path / "alone", *made[:3])
    tables.tell_apart([alone])
    assert tables.title(alone) == "SST-2 with MiniLM"


def test_one_name_of_two_methods_is_two_rows(tmp_path):
    (group,) = judged(tmp_path, make_result("lora", 0, name="x"), make_result("hira", 0, name="x"))
    assert [row["label"] for row in group["rows"]] == ["LoRA (x)", "HiRA (x)"]


def test_mixed_settings_in_a_row_are_refused(tmp_path, capsys):
    made = make_result("lora", 0), make_result("lora", 1, settings={"rank": 16})
    write(tmp_path, *made)
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "seed0.json" in error and "seed1.json" in error and "rank is 8 and 16" in error
    assert not (tmp_path / "README.md").exists()


# --------------------------------------------------------------------------------------- cautions


def said(group, words):
    return [caution for caution in group["cautions"] if words in caution]


def test_a_fair_study_has_no_caution(tmp_path):
    (group,) = judged(tmp_path, *make_study(dict.fromkeys(METHODS, 0)))
    assert group["cautions"] == []


def test_unequal_numbers_of_rates_are_a_caution_and_no_verdict(tmp_path):
    made = make_study({"lora": 0, "qlora": 0}) + make_study({"hira": 9}, rates=(1e-3, 2e-3))
    (group,) = judged(tmp_path, *made)
    assert said(group, "Unequal numbers")
    why = {(pair["a"], pair["b"]): pair["verdict"] for pair in group["pairs"]}
    assert why == {("LoRA", "QLoRA"): "equal", ("LoRA", "HiRA"): "none", ("QLoRA", "HiRA"): "none"}


def test_choices_at_the_edge_are_a_caution_beyond_a_third_of_the_seeds(tmp_path):
    for often, warned in ((2, False), (3, True)):
        made = make_study({"lora": 0, "hira": 0})
        for result in made:
            if result["method"] == "hira" and result["seed"] < often and result["lr"] == 4e-3:
                result["metrics"]["dev"]["accuracy"] = 0.9
        (group,) = judged(tmp_path, *made)
        assert bool(said(group, "edge")) == warned
    assert "HiRA: 3 of 6 seeds" in said(group, "edge")[0]


def test_a_seed_without_all_rates_is_left_out_with_a_caution(tmp_path):
    made = make_study({"lora": 0, "hira": 0}, seeds=7)
    lost = [r for r in made if (r["method"], r["seed"]) == ("hira", 6)][1:]
    (group,) = judged(tmp_path, *(r for r in made if all(r is not x for x in lost)))
    assert "HiRA: seed 6 has 1 of 3" in said(group, "Left out")[0]
    assert "HiRA: 6" in said(group, "Missing seeds")[0]
    assert group["pairs"][0]["seeds"] == [0, 1, 2, 3, 4, 5]


def test_other_settings_that_differ_are_a_caution(tmp_path):
    made = make_study({"lora": 0}) + make_study({"hira": 0}, settings={"weight_decay": 0.1})
    made[0]["environment"]["torch"] = "2.9.0"
    for result in made[1:3]:  # all rates of a seed, so that one of them is chosen
        result["environment"]["torch"] = "2.9.0"
    (group,) = judged(tmp_path, *made)
    assert "LoRA: 0.0; HiRA: 0.1" in said(group, "--weight_decay differs")[0]
    words = said(group, "Not all ran on the same machine")[0]
    assert re.search(r" LoRA: [^;]*torch 2\.9\.0[^;]*; LoRA, HiRA: [^;]*torch 2\.8\.0", words)


def test_other_rows_at_a_seed_are_a_caution_and_no_verdict(tmp_path):
    made = make_study({"lora": 0, "hira": 9})
    made[0]["data"]["dev_sha256"] = "changed"
    (group,) = judged(tmp_path, *made)
    assert said(group, "not the same for all at seed 0")
    assert group["pairs"][0]["verdict"] == "none" and group["power"] is None


def test_other_rows_of_a_variant_leave_the_verdict_on_the_others(tmp_path):
    made = make_study({"lora": 0, "hira": 9, "lora-rank32": 0})
    made[-1]["data"]["dev_sha256"] = "changed"
    (group,) = judged(tmp_path, *made)
    assert said(group, "not the same for all at seed 5")
    assert group["pairs"][0]["verdict"] == "better"


def test_one_rate_only_is_a_caution(tmp_path):
    (group,) = judged(tmp_path, *make_study({"lora": 0, "hira": 9}, rates=(1e-3,)))
    assert said(group, "Not tuned") and group["pairs"][0]["verdict"] == "better"


# ------------------------------------------------------------------------------------------ files


def broken_results():
    """{what is wrong: text} of files that are no usable result."""
    whole, odd = json.dumps(make_result()), {}
    changes = {
        "old schema": {"schema": 1},
        "no rows": {"rows": {}},
        "rows of another size": {"rows": {"correct": "AAAA"}},
        "no base64": {"rows": {"correct": "?!"}},
        "metrics a list": {"metrics": []},
        "name a number": {"name": 3},
        "rate a word": {"lr": "fast"},
        "task unknown": {"data": {**make_result()["data"], "task": "vision"}},
        "counts as words": {"data": {**make_result()["data"], "train": "many"}},
        "time a list": {"time": [1]},
        "memory a number": {"memory": 3},
        "inference a number": {"inference": 3},
        "environment missing": {"environment": None},
        "settings empty": {"settings": {}},
    }
    for what, change in changes.items():
        odd[what] = json.dumps({**json.loads(whole), **change})
    lost = make_result()
    lost["metrics"]["test"]["accuracy"] = math.nan
    odd |= {"nan": json.dumps(lost), "torn": whole[:200], "empty": "", "a word": '"lora"'}
    odd |= {"foreign": '{"r": 8}', "deep": "[" * 100_000, "not text": "\udcff\udcfe"}
    return odd


def test_unusable_files_are_skipped_with_a_line_each(tmp_path, capsys):
    odd = broken_results()
    for i, text in enumerate(odd.values()):
        (tmp_path / f"odd{i}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "folder.json").mkdir()
    write(tmp_path, make_result())
    runs, skipped = results.load([tmp_path])
    error = capsys.readouterr().err
    assert len(runs) == 1 and len(skipped) == len(odd) + 1 == error.count("\n")
    assert all(f"odd{i}.json: " in error for i in range(len(odd)))
    compare.main([str(tmp_path), "--no_plots"])
    assert (tmp_path / "README.md").read_text().count("odd") == len(odd)


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


def test_only_the_folder_itself_is_read(tmp_path):
    write(tmp_path, make_result("lora", 0))
    write(tmp_path / "deeper", make_result("lora", 1))
    (tmp_path / "notes.txt").write_text("{}")
    assert len(results.load([tmp_path])[0]) == 1


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_nothing_to_read_is_one_line(tmp_path, path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(tmp_path / path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and path in error


@pytest.mark.parametrize("margin", ["0", "-1", "nan", "100", "x"])
def test_a_margin_that_is_none_is_one_line(tmp_path, margin, capsys):
    write(tmp_path, make_result())
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(tmp_path), "--margin", margin])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_result_without_costs_is_read(tmp_path):
    bare = make_result()
    for key in ("parameters", "time", "disk"):
        del bare[key]
    bare |= {"memory": {}, "flops": {}, "inference": []}
    write(tmp_path, bare, make_result("hira"))
    compare.main([str(tmp_path)])


@pytest.mark.parametrize("price", ["-3", "nan", "0", "inf"])
def test_a_price_is_positive(price, tmp_path, capsys):
    write(tmp_path, make_result())
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(tmp_path), "--price", price])
    assert f"--price {price}: give a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("device, timed", [("cpu x86_64", True), ("cuda H100", False)])
def test_a_price_that_no_run_can_have_is_said(device, timed, tmp_path, capsys):
    write(tmp_path, make_result(device=device, timed=timed))
    compare.main([str(tmp_path), "--price", "2", "--no_plots"])
    assert "--price: no run here was timed on a GPU" in capsys.readouterr().err


def test_json_has_every_number_and_writes_nothing(tmp_path, capsys):
    write(tmp_path, *make_study({"lora": 0, "hira": 9}, seeds=2))
    compare.main([str(tmp_path), "--json"])
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert group["rows"][0]["costs"]["memory.train.peak"] == 200 * 2**20
    assert group["pairs"][0]["why"].endswith("found: 2")
    assert not (tmp_path / "README.md").exists()


def test_torch_is_not_loaded():
    import subprocess
    import sys

    code = "import sys, compare; assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(compare.__file__).parent)


def test_costs_of_two_devices_are_not_averaged():
    def run(seed, device, peak, accuracy):
        costs = {"metrics": {"test": accuracy}, "memory": {"train": peak}, "inference": {}}
        return costs | {"seed": seed, "environment": {"device": device}}

    runs = [run(0, "cuda", 300, 0.8), run(1, "cpu", 100, 0.9), run(2, "cuda", 320, 0.7)]
    assert results.most_common_device(runs) == "cuda"
    wanted = {"metrics.test": 0.8, "memory.train": 310}
    assert results.mean_numbers(runs, runs, "cuda") == pytest.approx(wanted)
    assert results.mean_numbers(runs[1:2], runs, "cuda") == {"metrics.test": 0.9}
    another_rate = run(1, "cuda", 340, 0.6)  # seed 1's chosen run was on the rarer device
    wanted = {"metrics.test": 0.8, "memory.train": 320}
    assert results.mean_numbers(runs, [*runs, another_rate], "cuda") == pytest.approx(wanted)
    runs[1]["environment"]["device"], runs[1]["memory"] = "cuda", {}  # or was not measured
    assert results.mean_numbers(runs, [*runs, another_rate], "cuda") == pytest.approx(wanted)
    assert results.label("hybrid", "hybrid-contextual-rank4") == "Sparse QLoRA rank4"
    assert results.label("hybrid", "hybrid-rank4") == "QHiRA rank4"


def test_an_untrained_language_model_has_no_training_memory():
    result = make_result("head_only", nll=np.full(30, 60.0), untrained=True)
    del result["memory"]["train"]
    run = results.read_run(json.dumps(result))
    assert "train" not in run["memory"] and run["memory"]["inference"]["peak"] > 0
    assert results.label(run["method"], run["name"]) == "Untrained base"
