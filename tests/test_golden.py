"""A golden run: 30 steps of every script give the losses and scores that were stored once.

golden.json holds the numbers of the version before the code was restructured (81bcce4). A change
that is meant to alter a result renews its cases alone, and its commit message says why:

    GOLDEN=renew python -m pytest tests/test_golden.py -k contextual
"""

import json
import os
from pathlib import Path

import pytest
from conftest import EVERY, rows_flags, text_flags, trained

import lora

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden.json")
STEPS = ["--max_steps", 30, "--batch_size", 8, "--seeds", 3, "--train_samples", 90]
TASKS = {"classification": "distilbert", "mlm": "bert", "clm": "llama"}
VARIANTS = {  # what the defaults leave out
    "components": ("prune", "mlm", ["--structure", "rank", "--sparsity", 0.75]),
    "penalty": ("prune", "classification", ["--penalty", 0.3, "--sparsity", 0]),
    "svd": ("contextual", "mlm", ["--estimator", "svd", "--dense_tokens", "none"]),
    "dropout": ("lora", "classification", ["--dropout", 0.1, "--base_dropout", 0.1]),
    "HiRA's dropout": ("hira", "mlm", ["--dropout", 0.1, "--rank", 3]),
    "parts": ("lora", "mlm", ["--batch_size", 4, "--grad_accum", 2, "--weight_decay", 0.1]),
    "checkpointing": ("qlora", "clm", ["--checkpointing", "--targets", "q_proj", "down_proj"]),
    "scales in fp32": ("qlora", "classification", ["--no_double_quant"]),
}
CASES = {f"{way} {task}": (way, task, []) for way in EVERY for task in TASKS} | VARIANTS


@pytest.mark.parametrize("case", CASES)
def test_thirty_steps_are_the_stored_ones(case, models, reviews, text_dir, tmp_path):
    way, task, more = CASES[case]
    (module, flags), kind = EVERY[way], TASKS[task]
    if task == "classification":
        data_flags = rows_flags(models, reviews, kind)
    else:
        data_flags = text_flags(models, text_dir, kind, "MaskedLM" if task == "mlm" else "CausalLM")
    run, data, base, _, history = trained(module, tmp_path, *data_flags, *STEPS, *flags, *more)
    scores = module.evaluate(run, data, base)["metrics"]
    numbers = {"losses": [loss for *_, loss in history.curve], "dev": scores["dev"]}
    numbers["test"] = scores["test"]
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("GOLDEN") == "renew":
        GOLDEN.write_text(json.dumps(stored | {case: numbers}, indent=0) + "\n")
        return
    assert len(numbers["losses"]) == len(stored[case]["losses"])
    assert numbers["losses"] == pytest.approx(stored[case]["losses"], abs=1e-4, rel=1e-4)
    for split in ("dev", "test"):
        assert numbers[split] == pytest.approx(stored[case][split], abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("dataset, seeds", [("sst2", range(10)), ("imdb", range(6))])
def test_the_study_s_splits_are_the_committed_ones(dataset, seeds, tmp_path):
    """Every seed draws the training and dev examples that the committed runs had."""
    if not (ROOT / "data" / dataset).is_dir() or not (ROOT / "models/all-MiniLM-L6-v2").is_dir():
        pytest.skip("needs data/ and models/ (docs/running.md)")
    committed = map(json.loads, (ROOT / "study" / f"{dataset}.jsonl").read_text().splitlines())
    runs = {run["seed"]: run for run in committed if run["method"] == "lora"}
    for seed in seeds:
        flags = runs[seed]["settings"]
        words = ["--dataset", dataset, "--data_dir", ROOT / "data", "--out", tmp_path]
        words += ["--model", ROOT / "models/all-MiniLM-L6-v2", "--seeds", seed]
        for key in ("train_samples", "test_samples", "heldout", "max_length"):
            words += [f"--{key}", flags[key]] if flags[key] is not None else []
        args = lora.parse_args("", "lora.py", lora.add_args, words)
        [run] = lora.runs(args)
        description = lora.load_data(run).description
        for name in ("train_sha256", "dev_sha256", "test_sha256"):
            assert description[name] == runs[seed]["data"][name], (seed, name)
