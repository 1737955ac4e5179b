"""compare.py: each statistic against scipy or brute force, and files that try to fool it. All results are made up."""

import base64
import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import compare  # noqa: E402

FOUR = compare.TESTED


def result(name="lora", seed=0, *, method=None, dataset="sst2", score=0.85, lm=False, dev=False, lr=3e-3, items=200,
           subset=True, quiet=True, seconds=20.0, mib=600, trainable=50_000, bits=None):
    """A complete schema-1 result. `bits` are the rows answered correctly, by default the first `score` of them."""
    method = method or name.split("-")[0]
    bits = np.arange(items) < round(score * items) if bits is None else bits
    accuracy = float(bits.mean())
    scores = {"mlm_perplexity": score} if lm else {"accuracy": accuracy, "f1": accuracy - 0.001}
    scores["loss"] = 0.4
    speed = {"latency_ms": {"mean": 3.1, "p50": 3.0, "p95": 4.0}, "samples_per_second": 330 - seconds}
    states = ("base",) if method in ("head_only", "full") else ("base", "merged", "unmerged")
    run = {
        "schema": 1, "method": method, "name": name, "dataset": dataset, "model": "models/all-MiniLM-L6-v2",
        "model_sha256": "a1" * 32, "seed": seed, "command": f"{method}.py --dataset {dataset}",
        "created": "2026-01-01T00:00:00",
        "args": {"lr": lr, "head_lr": 1e-3, "rank": 8, "targets": ["query", "value"], "epochs": 1, "max_steps": None,
                 "batch_size": 32, "grad_accum": 1, "eval_batch_size": 64, "weight_decay": 0.0, "warmup": 0.06,
                 "max_length": 128, "train_samples": 8000, "eval_samples": None, "split": "dev" if dev else "test",
                 "precision": "fp32", "checkpointing": False},
        "split": {"train": 8000, "dev": items, "eval": items, "eval_split": "validation",
                  "scored": "dev" if dev else "eval", "subset": subset, "sha256": "b2" * 32},
        "metrics": scores | {"merged": dict(scores)},
        "curve": [{"step": i, "epoch": i / 250, "lr": lr, "train_loss": 0.7 - i / 1000} for i in range(0, 250, 10)],
        "parameters": {"adapter": trainable, "head": 770, "trainable": trainable + 770, "total": 22_700_000,
                       "trainable_percent": (trainable + 770) / 227_000},
        "time": {"train_seconds": seconds, "epoch_seconds": [seconds], "skipped_steps": 5,
                 "step_ms": {"median": seconds * 4, "p10": seconds * 3, "p90": seconds * 5},
                 "samples_per_second": 8000 / seconds, "tokens_per_second": 2e5 / seconds,
                 "padded_tokens_per_second": 2.4e5 / seconds, "accelerator_hours": seconds / 3600,
                 "load": 1.0, "tokenise": 2.0, "evaluate": 3.0, "save": 0.1},
        "memory": {"device": "cpu", "base": 90 << 20, "adapter": 4 * trainable, "head": 3080,
                   "gradients": 4 * trainable, "optimizer": 8 * trainable,
                   "train_peak": mib << 20, "inference_peak": 450 << 20,
                   "before_training": 380 << 20},
        "inference": [{"batch": batch, "length": 128} | dict.fromkeys(states, speed) for batch in (1, 32)],
        "flops": {"train_step": 3e11, "train_total": 7.5e13, "inference_per_sample": 2.8e9},
        "disk": {"adapter": 4 * trainable, "base": 90 << 20, "merged": 90 << 20}, "method_info": {},
        "environment": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.0", "datasets": "4.0",
                        "bitsandbytes": "0.48", "device": "cpu", "threads": 2, "precision": "fp32",
                        "load_average": [1.0, 2.1 if quiet else 6.0], "commit": "0123abc", "dirty": False}}
    run["correct"] = None if lm else base64.b64encode(np.packbits(bits).tobytes()).decode()
    return run


def write(folder, *runs):
    """Write results as a run would name them; returns the folder as an argument."""
    folder.mkdir(exist_ok=True)
    for run in runs:
        rate = f"-dev-lr{run['args']['lr']:g}" if run["split"]["scored"] == "dev" else ""
        (folder / f"{run['dataset']}-{run['name']}{rate}-seed{run['seed']}.json").write_text(json.dumps(run))
    return str(folder)


def noisy(n=10, shift=(0, 0, 0, 0), seed=0, **more):
    """n seeds of the four methods, with a shift of each one's perplexity by that many sd of a paired difference."""
    rng = np.random.default_rng(seed)
    return [result(name, i, lm=True, score=20 + common + rng.normal(0, 0.5**0.5) + move, **more)
            for i, common in enumerate(rng.normal(0, 3, n)) for name, move in zip(FOUR, shift, strict=True)]


def page(capsys, *args):
    """(the page, standard output, standard error) of a run of compare.py without plots."""
    compare.main([*map(str, args), "--no_plots"])
    return (Path(args[0]) / "README.md").read_text("utf-8"), *capsys.readouterr()


def refuses(capsys, *args):
    """The one line of an expected error."""
    with pytest.raises(SystemExit) as stop:
        compare.main([*map(str, args)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    return err.splitlines()[-1]


def pairs_of(runs, metric="mlm_perplexity"):
    return compare.compare_pairs(compare.by_name(runs), metric)


# ---------------------------------------------------------------------------- statistics


def samples(n):
    """Differences of n seeds: real numbers, and accuracies on 872 rows with many ties and zeros."""
    rng = np.random.default_rng(n)
    return [rng.normal(0.3, 1, n), rng.integers(-3, 4, n) / 872, rng.integers(0, 3, n) / 872]


@pytest.mark.parametrize("n", [1, 2, 5, 7, 10, 20])
def test_interval_and_t_test_equal_scipy(n):
    for d in samples(n):
        low, high = compare.t_interval(d)
        if n == 1:
            assert math.isnan(low) and math.isnan(compare.paired_t(d))
        elif d.std() > 0:
            base = np.random.default_rng(1).normal(20, 3, n)
            theirs = stats.ttest_rel(d, np.zeros(n))
            assert compare.paired_t(d) == pytest.approx(theirs.pvalue, rel=1e-9)
            assert compare.paired_t((base + d) - base) == pytest.approx(theirs.pvalue, rel=1e-6)
            assert (low, high) == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 7, 10])
def test_sign_flip_equals_scipy_and_brute_force(n):
    for d in samples(n):
        whole = np.rint(d * 872e6)  # so that ties are exact
        flips = np.array(list(product([1, -1], repeat=n))) @ whole
        assert compare.sign_flip(d) == (np.mean(np.abs(flips) >= abs(whole.sum())), True)
        if n > 1:
            theirs = stats.permutation_test((d,), lambda x, axis: x.sum(axis), permutation_type="samples",
                                            n_resamples=np.inf, vectorized=True)
            assert compare.sign_flip(d)[0] == pytest.approx(theirs.pvalue)


def test_sign_flip_of_many_seeds_is_random_fixed_and_says_so():
    for d in samples(20):
        (p, exact), sums = compare.sign_flip(d), compare.signed_sums(d)
        truth = np.mean(np.abs(sums) >= abs(d.sum()) - 1e-12)
        assert len(sums) == 2**20 and not exact and abs(p - truth) < 5 * math.sqrt(truth * (1 - truth) / 1e5) + 1e-4
        assert compare.sign_flip(d) == (p, exact)
    assert compare.sign_flip(np.ones(16)) == (2 / 2**16, True)
    assert 0 < compare.sign_flip(np.ones(40))[0] < 1e-4  # never zero


def test_no_spread():
    assert compare.paired_t(np.zeros(10)) == 1 and compare.sign_flip(np.zeros(10))[0] == 1
    same = np.arange(10) / 7 - (np.arange(10) / 7 - 0.1)  # 0.1 but for rounding
    assert math.isnan(compare.paired_t(same)) and compare.sign_flip(same)[0] == 2 / 1024
    for hira, words in ((20, "no evidence of a difference (equal in every seed)"),
                        (19, "unclear (same difference in every seed: no t-test)")):
        pair, = pairs_of([result(n, s, lm=True, score=x) for s in range(9) for n, x in (("lora", 20), ("hira", hira))])
        assert pair["verdict"] == words and not pair["better"]


def test_holm_equals_its_definition():
    rng = np.random.default_rng(0)
    for m in (1, 2, 3, 6):
        p = np.round(rng.random(m) ** 3, 2)  # rounded: ties
        brute = [max(min(1, (m - np.sum(p < q)) * q) for q in p if q <= p[i]) for i in range(m)]
        assert compare.holm(p) == pytest.approx(brute)
    assert compare.holm([]).tolist() == []
    adjusted = compare.holm([0.01, math.nan, 0.04])  # an untestable pair still counts
    assert adjusted[[0, 2]] == pytest.approx([0.03, 0.08]) and math.isnan(adjusted[1])


def test_item_noise_and_mcnemar():
    a, b = np.random.default_rng(0).random((2, 7, 300)) < np.array([0.8, 0.75])[:, None, None]
    mean, low, high = compare.item_noise(a, b)
    d = (a.astype(float) - b).mean(0)
    assert mean == pytest.approx(a.mean() - b.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * d.std(ddof=1) / 300**0.5)
    for x, y, p in zip(a, b, compare.mcnemar(a, b), strict=True):
        assert p == pytest.approx(stats.binomtest(int((x & ~y).sum()), int((x != y).sum())).pvalue)
    assert compare.mcnemar(a, a).tolist() == [1] * 7


def test_underpowered_is_the_rule_of_the_design():
    assert [next(n for n in range(99) if not compare.underpowered(n, m)) for m in (1, 3, 6)] == [6, 7, 8]


def test_pareto_equals_brute_force():
    points = [tuple(p) for p in np.random.default_rng(0).integers(0, 6, (30, 2))]
    beaten = {p for p, q in product(points, points) if q != p and q[0] <= p[0] and q[1] >= p[1]}
    assert {points[i] for i in compare.pareto(points)} == set(points) - beaten


def test_null_comparisons_are_rarely_significant_and_large_effects_found():
    d = np.random.default_rng(0).normal(0, 1, (1000, 10))
    assert np.mean([compare.paired_t(x) < 0.05 for x in d]) <= 0.07
    assert np.mean([compare.sign_flip(x)[0] < 0.05 for x in d]) <= 0.07
    assert np.mean([compare.paired_t(x + 2) < 0.05 for x in d]) >= 0.9


def test_family_wise_error_and_power_over_six_pairs():
    def family(rng, shift):
        scores = rng.normal(0, 0.5**0.5, (4, 10)) + rng.normal(0, 3, 10)  # a paired difference has sd 1
        scores[0] += shift
        return pairs_of([{"method": name, "name": name, "seed": i, "metrics": {"accuracy": x}}
                         for name, row in zip(FOUR, scores, strict=True) for i, x in enumerate(row)], "accuracy")

    rng = np.random.default_rng(1)
    null, real = ([family(rng, shift) for _ in range(1000)] for shift in (0, 2))
    assert np.mean([any(p["better"] for p in pairs) for pairs in null]) <= 0.07
    assert np.mean([p["better"] == FOUR[0] for pairs in real for p in pairs[:3]]) >= 0.9


# ---------------------------------------------------------------------------- verdicts


def test_a_real_difference_is_named_with_size_and_cost(tmp_path, capsys):
    runs = noisy(shift=(0, 0, -5, 0))  # hira's perplexity is lower, which is better
    for run in runs:
        run["time"]["train_seconds"] = 40.0 if run["method"] == "hira" else 20.0
    text, out, _ = page(capsys, write(tmp_path / "r", *runs))
    assert "**HiRA is better than LoRA** in masked-LM perplexity" in text and "2.00 × the training time" in text
    cells = [row for row in text.splitlines() if row.startswith("| HiRA ")]
    assert cells[0].count("**") == 2 and sum("**" in line for line in text.splitlines() if line[:1] == "|") == 1
    assert "**" not in out
    pairs = {(p["a"], p["b"]): p for p in pairs_of(runs)}
    assert pairs["lora", "hira"]["better"] == pairs["hira", "sparse_lora"]["better"] == "hira"
    assert pairs["lora", "qlora"]["better"] is None


def test_few_seeds_have_no_winner_and_missing_ones_are_named(tmp_path, capsys):
    runs = noisy(7, shift=(0, 0, -50, 0))
    assert {p["verdict"] for p in pairs_of(runs)} == {"underpowered"}
    runs = [run for run in noisy(10) if not (run["method"] == "hira" and run["seed"] > 6)]
    by = {(p["a"], p["b"]): p for p in pairs_of(runs)}
    assert len(by["lora", "hira"]["seeds"]) == 7 and by["lora", "hira"]["verdict"] == "underpowered"
    assert by["lora", "qlora"]["verdict"] != "underpowered"
    text, *_ = page(capsys, write(tmp_path / "r", *runs))
    assert "Missing seeds, so that pairs use the shared ones: hira 7, 8, 9." in text and "below 8 shared seeds" in text
    apart = pairs_of([result("lora", 0, lm=True), result("hira", 1, lm=True)])
    assert apart[0]["verdict"] == "no shared seed"


def test_two_tests_that_disagree_are_unclear():
    d = [1.0] * 8 + [-0.05, 12.0]  # the outlier hides the difference from the t-test only
    runs = [result(n, i, lm=True, score=20 + x * (n == "hira")) for i, x in enumerate(d) for n in ("lora", "hira")]
    pair, = pairs_of(runs)
    assert pair["p_holm"] > 0.05 > pair["p_flip"] and pair["verdict"] == "unclear" and not pair["better"]


def test_one_method_one_seed_and_variants_without_p(tmp_path, capsys):
    text, *_ = page(capsys, write(tmp_path / "a", result()))
    assert "No pair to test" in text and "85.00" in text and "±" not in text.split("## SST-2")[1]
    runs = [result(n, s, score=0.8 + s / 100) for n in ("head_only", "full", "lora-rank32", "lora") for s in (0, 1, 2)]
    text, *_ = page(capsys, write(tmp_path / "b", *runs))
    assert "No pair to test" in text and "81.00 ± 1.00" in text and "78.52 to 83.48" in text
    first = [row.split("|")[1].strip() for row in text.splitlines() if row.startswith("|")][2:6]
    assert first == ["Head only", "Full fine-tuning", "LoRA", "LoRA-rank32"]


# ---------------------------------------------------------------------------- files


def test_labelled_rows_stand_beside_their_method_and_lora_by_shared_seed(tmp_path, capsys):
    scores = {"lora": [0.80, 0.81, 0.83, 0.70], "qlora": [0.78, 0.80, 0.80], "lora-rank32": [0.79, 0.82, 0.81],
              "qlora-rank32": [0.77, 0.81, 0.82]}
    runs = [result(name, seed, score=x) for name, row in scores.items() for seed, x in enumerate(row)]
    text, _, _ = page(capsys, write(tmp_path / "r", *runs))
    table = text.split(compare.LABELLED)[1].split("###")[0]
    lora, qlora = (next(line for line in table.splitlines() if line.startswith(f"| {name} ")).split("|")[1:-1]
                   for name in ("LoRA-rank32", "QLoRA-rank32"))
    assert [cell.strip() for cell in lora][:5] == ["LoRA-rank32", "3", "–", "–", "-0.67"]  # -1, 1, -2: seed 3 is not shared
    assert [cell.strip() for cell in qlora][:3] == ["QLoRA-rank32", "3", "+0.67"]  # -1, 1, 2
    low, high = stats.t.interval(0.95, 2, np.mean([-1, 1, 2]), stats.sem([-1, 1, 2]))
    assert qlora[3].strip() == f"{low:+.2f} to {high:+.2f}" and qlora[4].strip() == "-1.33"  # -3, 0, -1


def test_a_machine_that_changed_its_speed_is_told(tmp_path, capsys):
    runs = [result(name, seed) for name in ("full", "lora", "hira") for seed in (0, 1)]
    for run in runs:
        ms = {"full": 100.0, "lora": 110.0, "hira": 120.0}[run["method"]] + 10 * run["seed"]
        run["inference"] = [part | {"base": {"latency_ms": {"p50": ms * (part["batch"] == 32) + 3}, "samples_per_second": 1}}
                            for part in run["inference"]]
    text, _, _ = page(capsys, write(tmp_path / "r", *runs))
    assert "took 108 to 128 ms for the same batch 32, length 128 in these rows" in text and "within 19 % may" in text
    text, _, _ = page(capsys, write(tmp_path / "one", runs[0]))
    assert "The same base model took" not in text


def test_broken_files_are_named_and_skipped(tmp_path, capsys):
    folder, good = Path(write(tmp_path / "r", result())), result("hira")
    (folder / "cut.json").write_text(json.dumps(good)[:500])
    (folder / "list.json").write_text("[1, 2]")
    (folder / "old.json").write_text(json.dumps(good | {"schema": 0}))
    (folder / "bare.json").write_text(json.dumps({k: v for k, v in good.items() if k != "time"}))
    (folder / "nan.json").write_text(json.dumps(good | {"metrics": {"accuracy": math.nan, "loss": 1.0}}))
    (folder / "bits.json").write_text(json.dumps(good | {"correct": "AAAA"}))
    (folder / "odd.json").write_text(json.dumps(good | {"seed": [1], "memory": {"train_peak": 1}}))
    (folder / "none.json").write_text(json.dumps(good | {"metrics": {"loss": "x", "accuracy": 0.5}}))
    (folder / "text.json").write_bytes(b"\xff\xfe")
    text, _, err = page(capsys, folder)
    for name in ("cut", "list", "old", "bare", "nan", "bits", "odd", "none", "text"):
        assert sum(f"{name}.json" in line for line in err.splitlines()) == 1 and f"`{name}.json`" in text
    assert "schema 0" in err and "lacks time.train_seconds" in err and len(err.splitlines()) == 9 and "HiRA" not in text


def test_expected_errors_are_one_line(tmp_path, capsys):
    folder = write(tmp_path / "r", result())
    assert "no such file or folder" in refuses(capsys, tmp_path / "nowhere")
    assert "python lora.py" in refuses(capsys, tmp_path)
    assert "mlm_perplexity" in refuses(capsys, folder, "--metric", "mlm_perplexity")
    assert "bleu" in refuses(capsys, folder, "--metric", "bleu")
    assert "<!-- results -->" in refuses(capsys, folder, "--readme", tmp_path / "missing.md")
    other = Path(write(tmp_path / "s", result()))
    (other / "copy.json").write_text((other / "sst2-lora-seed0.json").read_text())
    line = refuses(capsys, other)
    assert "copy.json" in line and "sst2-lora-seed0.json" in line
    compare.main([folder, str(tmp_path / "r" / "sst2-lora-seed0.json"), "--no_plots"])  # the same file twice is one


def test_what_differs_is_not_compared_and_the_page_says_why(tmp_path, capsys):
    changed = [result("hira", s) for s in range(3)]
    for run in changed:
        run["environment"]["torch"] = "2.12.0"
    text, *_ = page(capsys, write(tmp_path / "r", *(result("lora", s) for s in range(4)), *changed))
    assert text.count("## SST-2 with") == 2 and "because of other torch (2.12.0, there 2.13.0)" in text


def test_dev_runs_choose_learning_rates_and_nothing_else(tmp_path, capsys):
    best = {"lora": 1e-3, "hira": 1e-2}
    search = [result(n, dev=True, lr=lr, score=0.5 + 0.2 * (lr == best[n])) for n in best for lr in (1e-4, 1e-3, 1e-2)]
    runs = [result(n, s, lr=1e-3, score=0.9) for n in best for s in range(2)]
    text, *_ = page(capsys, write(tmp_path / "a", *search, *runs))
    quality, tuning = text.split("### Learning-rate search")
    assert "90.00" in quality and "70.00" not in quality and "50.00" not in quality
    assert "| LoRA   |  50.00 | 70.00 ← | 50.00   |".replace(" ", "") in tuning.replace(" ", "")
    assert "Learning rate not the search's choice, or not one: hira 0.001." in quality
    rows = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in tuning.splitlines() if row.startswith("|")}
    assert rows["0.001 for all"] == "-20.00" and rows["0.01 for all"] == "+20.00" and rows["each its choice"] == "+0.00"
    text, *_ = page(capsys, write(tmp_path / "b", *search[:-1], *runs))
    assert "different learning rates to choose from" in text
    text, *_ = page(capsys, write(tmp_path / "c", *search))
    assert "### Learning-rate search" in text and "### Verdict" not in text


def test_subset_and_demo_are_marked(tmp_path, capsys):
    runs = [result(), result(dataset="imdb", subset=False), result(dataset="demo", subset=False)]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    text, out, _ = page(capsys, write(tmp_path / "r", *runs), "--readme", readme)
    sst2 = "SST-2 with all-MiniLM-L6-v2 (subset: 8,000 train rows, 200 validation rows)"
    assert f"## {sst2}\n" in text and sst2 in out and "## IMDB with all-MiniLM-L6-v2\n" in text
    assert text.index("## demo") > text.index("## IMDB") and "says nothing about real data" in text.split("## demo")[1]
    main = readme.read_text()
    assert sst2 in main and "demo" not in main and "old" not in main
    assert main.startswith("before\n<!-- results -->") and main.endswith("<!-- /results -->\nafter\n")
    page(capsys, tmp_path / "r", "--readme", readme)
    assert readme.read_text() == main


def test_every_section_of_a_page_is_renewed_and_nothing_else(tmp_path, capsys):
    """--readme takes several files; a section of one shows the very tables of the results page."""
    runs = [result(name, s) for name in ("lora", "hira") for s in range(2)]
    runs += [result("lora", dev=True, lr=lr) for lr in (1e-3, 1e-2)]
    readme, report = tmp_path / "README.md", tmp_path / "report.md"
    readme.write_text("a <!-- results -->old<!-- /results --> b")
    report.write_text("".join(f"{name}: <!-- {name} -->old<!-- /{name} --> kept\n" for name in ("costs", "search", "pairs")))
    text, *_ = page(capsys, write(tmp_path / "r", *runs), "--readme", readme, report)
    assert readme.read_text().startswith("a <!-- results -->\n\n**SST-2") and readme.read_text().endswith("<!-- /results --> b")
    parts = report.read_text().split(" kept\n")
    assert [part.split(":")[0] for part in parts] == ["costs", "search", "pairs", ""] and "old" not in report.read_text()
    for part, wanted in zip(parts, (" train s ", " 0.001 ", "LoRA − HiRA"), strict=False):
        rows = [line for line in part.splitlines() if line.startswith("|")]
        assert any(wanted in line for line in rows) and all(line in text for line in rows)


def test_a_candidate_is_judged_by_the_seeds_that_all_candidates_have(tmp_path, capsys):
    """One lucky seed more, or another head's rate, must not choose a learning rate, and the page says so."""
    search = [result("lora", seed, dev=True, lr=lr, score=score) for seed, lr, score in (
        (0, 1e-3, 0.80), (0, 1e-2, 0.70), (1, 1e-2, 0.95))]
    text, *_ = page(capsys, write(tmp_path / "a", result("lora"), *search))
    assert "80.00 ←" in text and "| 70.00 |" in text and "rivals" not in text
    search[1]["args"]["head_lr"] = 1e-2
    text, *_ = page(capsys, write(tmp_path / "b", result("lora"), *search))
    assert "Candidates with other seeds or another --head_lr than their rivals: lora 0.001, 0.01." in text
    text, *_ = page(capsys, write(tmp_path / "c", result("lora"), search[0], search[2]))
    assert "than their rivals" in text and "95.00 ←" in text


def test_a_time_ratio_within_the_machines_drift_is_not_told(tmp_path, capsys):
    def runs(drift):
        made = [result(n, s, score=0.80 + 0.05 * (n == "hira") + 0.005 * (s % 3) * (n == "hira"), seconds=t)
                for n, t in (("lora", 20.0), ("hira", 26.0)) for s in range(10)]
        for run in made:
            for entry in run["inference"]:
                ms = 3.0 * (drift if run["method"] == "hira" else 1)
                entry["base"] = entry["base"] | {"latency_ms": {"mean": ms, "p50": ms, "p95": ms}}
        return made
    text, *_ = page(capsys, write(tmp_path / "a", *runs(1.2)))
    assert "HiRA is better" in text and "1.30 × the training time" in text
    text, *_ = page(capsys, write(tmp_path / "b", *runs(1.4)))
    assert "HiRA is better" in text and "× the training time" not in text and "within 40 % may not differ" in text
    others = [result("qlora", s, score=0.80, seconds=20.0) for s in range(3)]
    for run in (noisy := runs(1.4)):
        if run["method"] == "hira":
            run["environment"]["load_average"] = [9.0, 9.0]
    for entry in others[0]["inference"]:
        entry["base"] = entry["base"] | {"latency_ms": {"mean": 9.0, "p50": 9.0, "p95": 9.0}}
    text, *_ = page(capsys, write(tmp_path / "c", *noisy, *others))  # no quiet run of the better one, so no time at all
    assert "HiRA is better than LoRA" in text and "1.00 × the trainable parameters" in text


def test_shared_machines_are_left_out_of_the_costs(tmp_path, capsys):
    runs = [result("lora", s, quiet=s > 0, seconds=10.0 * (s + 1)) for s in range(3)]
    text, *_ = page(capsys, write(tmp_path / "a", *runs), "--price", "3.6")
    assert "1 of 3 runs left out" in text and "25.0 ± 7.1" in text and "85.00" in text
    assert "0.0250 ± 0.0071" in text  # 25 s at 3.6 an hour
    text, *_ = page(capsys, write(tmp_path / "b", *(result("lora", s, quiet=False) for s in range(3))))
    assert "No run was quiet" in text
    runs[1]["environment"]["device"] = "H200"
    text, *_ = page(capsys, write(tmp_path / "a", *runs))
    assert "### Cost: cpu, 2 threads, fp32" in text and "### Cost: H200, 2 threads, fp32" in text


def test_what_a_load_says_depends_on_processes_and_quality_only_says_it_itself(tmp_path, capsys):
    runs = [result("lora", s, quiet=False, seconds=10.0 * (s + 1)) for s in range(3)]
    runs[0]["environment"] |= {"processes": 4, "load_average": [0.0, 8.4]}  # 4 x 2 threads: a load of their own
    runs[1]["environment"] |= {"processes": 4, "load_average": [0.0, 8.6]}
    runs[2] |= {"inference": []}
    runs[2]["environment"] |= {"processes": 4, "load_average": [0.0, 0.1]}
    text, *_ = page(capsys, write(tmp_path / "a", *runs))
    assert "2 of 3 runs left out" in text and "--quality_only" in text
    assert "| LoRA   |    1 |    10.0 |" in text


def test_checkpointing_has_costs_of_its_own(tmp_path, capsys):
    runs = [result("lora", 0, mib=400), result("hira", 0, mib=900), result("lora", 1, mib=450)]
    runs[0]["args"]["checkpointing"] = True
    text, *_ = page(capsys, write(tmp_path / "a", *runs))
    assert "### Cost: cpu, 2 threads, fp32\n" in text and "### Cost: cpu, 2 threads, fp32, --checkpointing\n" in text
    assert "Least peak memory in training, MiB (order of means, not tested): LoRA 450, then HiRA 900" in text


def test_a_machine_that_tells_no_memory_has_its_other_figures_compared(tmp_path, capsys):
    runs = [result(n, s, score=0.8 + 0.05 * (n == "hira") + 0.005 * (s % 3) * (n == "hira")) for n in ("lora", "hira")
            for s in range(8)]
    for run in runs:
        run["memory"] |= dict.fromkeys(("train_peak", "before_training", "inference_peak"))
    text, _, err = page(capsys, write(tmp_path / "a", *runs))
    assert not err and "HiRA is better than LoRA" in text and "Least training time" in text
    assert "nan" not in text and "Least peak memory" not in text and "× the peak memory" not in text
    compare.main([str(tmp_path / "a")])
    assert not list((tmp_path / "a").glob("*memory.png")) and len(list((tmp_path / "a").glob("*.png"))) == 3


@pytest.mark.parametrize("flag, one, other", [
    ("rank", 8, 64), ("head_lr", 0.001, 0.01), ("precision", "fp32", "bf16"), ("alpha", None, 4.0), ("dropout", 0.0, 0.1)])
def test_settings_that_differ_are_told_between_methods_and_within_one(tmp_path, capsys, flag, one, other):
    def text(name, settings):
        runs = [result(n, s) for n in ("lora", "hira") for s in range(4)]
        for run in runs:
            run["args"][flag] = settings(run)
        return page(capsys, write(tmp_path / name, *runs))[0]
    warned = f"`--{flag}` differs: "
    assert warned not in text("a", lambda run: one)
    assert f"{warned}lora {one}; hira {other}." in text("b", lambda run: other if run["method"] == "hira" else one)
    crossed = text("c", lambda run: other if (run["seed"] < 2) == (run["method"] == "hira") else one)
    both = ", ".join(sorted((str(one), str(other))))
    assert f"{warned}lora {both}; hira {both}." in crossed  # the same values on both sides, and never in one pair


def test_a_flag_that_a_method_lacks_does_not_differ_and_cpus_do(tmp_path, capsys):
    runs = [result(n, s) for n in ("lora", "hira") for s in range(2)]
    for run in runs:
        run["environment"]["cpu"] = "A"
        if run["method"] == "lora":
            run["args"]["alpha"] = 32.0
    assert "differs" not in (text := page(capsys, write(tmp_path / "a", *runs))[0]) and "of different CPUs" not in text
    runs[-1]["environment"]["cpu"] = "B"
    assert "Costs are of different CPUs: lora A; hira A, B." in page(capsys, write(tmp_path / "b", *runs))[0]


def test_metric_and_json(tmp_path, capsys):
    folder = write(tmp_path / "r", *(result(n, s, score=0.8 + s / 100) for n in ("lora", "hira") for s in range(8)))
    compare.main([folder, "--json", "--metric", "f1"])
    out = json.loads(capsys.readouterr().out, parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
    group, = out["groups"]
    assert group["metric"] == "f1" and group["variants"]["lora"]["metrics.f1"]["n"] == 8 and group["subset"]
    assert group["pairs"][0]["verdict"].startswith("no evidence") and not list(Path(folder).glob("*.md"))


def test_page_and_plots_are_the_same_every_time(tmp_path):
    rng = np.random.default_rng(0)
    runs = [result(n, s, score=0.8 + rng.random() / 10, seconds=20 + rng.random()) for n in FOUR for s in range(2)]
    runs += [result(n, s, score=0.8) for n in ("full", "lora-rank32") for s in range(2)]
    made = []
    for folder, files in (("a", runs), ("b", runs[::-1])):
        compare.main([write(tmp_path / folder, *files)])
        made.append({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir() if path.suffix != ".json"})
    assert made[0] == made[1] and len(made[0]) == 5
    assert not any(str(tmp_path).encode() in content for content in made[0].values())


def test_the_front_of_a_metric_of_which_less_is_better(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    fronts, plot = [], Axes.plot

    def record(axes, *args, **options):
        fronts.extend([list(args[1])] if options.get("label") == "Pareto front" else [])
        return plot(axes, *args, **options)
    monkeypatch.setattr(Axes, "plot", record)
    runs = [result(n, s, lm=True, score=score, trainable=size, mib=size) for n, score, size in (
        ("lora", 20.0, 100), ("hira", 30.0, 200), ("qlora", 10.0, 400)) for s in (0, 1)]
    compare.main([write(tmp_path / "r", *runs)])
    assert fronts == [[20.0, 10.0]] * 2  # by parameters and by memory: HiRA is larger than LoRA and worse


def test_help_imports_nothing_heavy():
    code = ("import sys, compare\ntry: compare.main(['--help'])\nexcept SystemExit: pass\n"
            "assert not {'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
