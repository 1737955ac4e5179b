"""The command line: runs by learning rate and seed, names; every wrong flag is one line."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EVERY, ended, rows_flags

import baseline
import contextual_lora
import hira
import hybrid
import lora
import qlora
import sparse_lora

ROOT = Path(__file__).parents[1]
SCRIPTS = ["lora", "hira", "qlora", "sparse_lora", "contextual_lora", "hybrid", "baseline"]


def parsed(module, *line):
    line = ["--dataset", "demo", *map(str, line)]
    return module.parse_args(module.__doc__, module.__file__, module.add_args, line)


@pytest.fixture
def good(models, reviews, tmp_path):
    """A command line that works; tests spoil one thing of it."""
    line = [*rows_flags(models, reviews), "--max_steps", 2]
    return [*map(str, line), "--out", str(tmp_path / "out")]


def test_a_run_is_one_learning_rate_and_one_seed(good, capsys):
    """Seeds change train and dev; the same again runs nothing, a third learning rate two more."""
    grid = ["--lr", "1e-3", "2e-3", "--seeds", "0", "1"]
    paths = lora.main([*good, *grid])
    results = [json.loads(path.read_text()) for path in paths]
    assert [(r["seed"], r["lr"]) for r in results] == [(0, 1e-3), (0, 2e-3), (1, 1e-3), (1, 2e-3)]
    for path, result in zip(paths, results, strict=True):
        assert path.name.endswith(f"-lr{result['lr']:g}-seed{result['seed']}.json")
        assert {"dev", "test"} <= result["metrics"].keys()
    a, b, c, d = (result["data"] for result in results)
    assert a == b and c == d and a["test_sha256"] == c["test_sha256"]
    assert a["train_sha256"] != c["train_sha256"] and a["dev_sha256"] != c["dev_sha256"]
    capsys.readouterr()
    assert lora.main([*good, *grid]) == []
    assert capsys.readouterr().out.count("exists already") == 4
    more = lora.main([*good, *grid, "--lr", "1e-3", "2e-3", "4e-3"])
    assert [path.name.split("-lr")[1] for path in more] == ["0.004-seed0.json", "0.004-seed1.json"]


def test_search_is_learning_rates_a_factor_of_2_apart_around_the_default():
    for number, first, last in ((1, 2e-3, 2e-3), (2, 2e-3, 4e-3), (3, 1e-3, 4e-3), (5, 5e-4, 8e-3)):
        lrs = parsed(lora, "--search", number).lr
        assert len(lrs) == number and (lrs[0], lrs[-1]) == (first, last)
        assert all(b == 2 * a for a, b in zip(lrs, lrs[1:], strict=False))
        assert parsed(hira, "--search", number).lr == pytest.approx([10 * lr for lr in lrs])
        around_1 = parsed(lora, "--search", number, "--lr", 1.0).lr
        assert around_1 == pytest.approx([lr / 2e-3 for lr in lrs])


@pytest.mark.parametrize(
    "module, line, name",
    [
        (lora, [], "lora"),
        (lora, ["--rank", 32], "lora-rank32"),
        (lora, ["--alpha", 16], "lora"),
        (lora, ["--targets", "q_lin,k_lin", "v_lin"], "lora-targetsq_lin-k_lin-v_lin"),
        (lora, ["--lr", 0.5, "--epochs", 9, "--batch_size", 3], "lora"),
        (lora, ["--epochs", 0], "lora-untrained"),
        (lora, ["--rank", 2, "--name", "mine"], "mine"),
        (qlora, ["--no_double_quant"], "qlora-no_double_quant"),
        (contextual_lora, ["--dense_layers", 1], "contextual_lora-dense_layers1"),
        (sparse_lora, ["--structure", "rank", "--sparsity", 0.25], "sparse_lora-sparsity0.25-rank"),
        (baseline, [], "head_only"),
        (baseline, ["--full"], "full"),
    ],
)
def test_names_say_what_is_not_at_its_default(module, line, name):
    assert parsed(module, *line).name == name


@pytest.mark.parametrize("name", EVERY)
def test_untrained_models_are_scored(name, good):
    module, flags = EVERY[name]
    [path] = module.main([*good, *map(str, flags), "--epochs", "0", "--lr", "1e-3", "2e-3"])
    result = json.loads(path.read_text())
    assert result["untrained"] and result["curve"] == [] and result["name"].endswith("-untrained")
    assert result["metrics"]["test"]["accuracy"] > 0


def test_other_settings_are_an_error_before_any_training(good, capfd, monkeypatch):
    """--force runs again, --name keeps both."""
    [first] = lora.main(good)
    with monkeypatch.context() as patch:
        patch.setattr(lora, "train", None)
        code, error = ended(capfd, lora, *good, "--seeds", 1, 0, "--warmup", 0.5)
        assert code == 2 and "--warmup was 0.06, is now 0.5" in error
        assert "--name" in error and "--force" in error
        for harmless in (["--save_every", 2], ["--data_dir", "x"], ["--eval_batch_size", 3]):
            assert lora.main([*good, *map(str, harmless)]) == []
    assert lora.main([*good, "--warmup", "0.5", "--force"]) == [first]
    [other] = lora.main([*good, "--name", "other"])
    assert first != other and first.exists() and other.exists()


def test_one_folder_is_one_name(models, reviews, tmp_path, monkeypatch):
    (tmp_path / "my").symlink_to(reviews)
    monkeypatch.chdir(tmp_path)
    line = [*rows_flags(models, "my"), "--max_steps", "1", "--out", "out"]
    assert lora.main([*map(str, line)])
    for same in ("my/", "./my"):
        assert lora.main([*map(str, line), "--dataset", same]) == []


WRONG = {  # flags, what the line names
    "rank 0": (["--rank", 0], "argument --rank: '0' is not a whole number from 1 to 65536"),
    "huge rank": (["--rank", 2 * 10**9], "argument --rank: '2000000000' is not a whole number"),
    "rate": (["--lr", "fast"], "argument --lr: 'fast' is not a positive number"),
    "negative rate": (["--lr", -1], "--lr"),
    "nan": (["--head_lr", "nan"], "--head_lr"),
    "share": (["--warmup", 1], "argument --warmup: '1' is not a fraction"),
    "unknown flag": (["--ranks", 3], "--ranks"),
    "no abbreviation": (["--ran", 3], "--ran"),
    "data set": (
        ["--dataset", "nowhere"],
        "--dataset nowhere: neither a file (.parquet, .csv, .tsv, .json, .jsonl), a folder nor",
    ),
    "model": (["--model", "/nowhere"], "--model /nowhere"),
    "name": (["--name", "a/b"], "--name 'a/b'"),
    "targets": (["--targets", ","], "--targets names no layer"),
    "search": (["--search", 3, "--lr", 1, 2], "--search 3: around one --lr"),
    "long search": (["--search", 2200], "--search: '2200' is not a whole number from 1 to 99"),
    "far search": (["--search", 9, "--lr", 1e-30], "--search 9: 6.25e-32 to 1.6e-29 are no lear"),
    "half a character": (["--model", "a\ud800"], "a�: the name is not in UTF-8"),
    "no place": (["--out", "/proc/x"], "--out /proc/x: no folder that can be written"),
    "device": (["--device", "tpu"], "--device tpu"),
    "length": (["--max_length", 5000], "--max_length 5000"),
    "out, a file": (["--out", __file__], f"--out {__file__}: no folder that can be written"),
    "long name": (
        ["--targets", *["q_lin"] * 50],
        "too long for a file's name; give a short --name",
    ),
    "heldout text": (["--dataset", "demo_lm", "--heldout", 5], "--heldout 5: only for labelled"),
}


@pytest.mark.parametrize("what", WRONG)
def test_every_wrong_word_is_one_line(what, good, capfd):
    line, named = WRONG[what]
    if what == "heldout text":
        good = good[good.index("--max_steps") :]
    code, error = ended(capfd, lora, *good, *line)
    assert code == 2 and named in error


def test_flags_of_the_other_update_are_refused(good, capfd):
    idle = {"channel_sparsity": 0.3, "dense_layers": 1, "dense_tokens": "none"}
    for flag, value in (idle | {"estimator": "svd", "alpha": 3.0}).items():
        code, error = ended(capfd, hybrid, *good, "--update", "hira", f"--{flag}", value)
        assert code == 2 and f"--{flag} {value}: not with --update hira" in error


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_each_default_in_groups(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    text = capsys.readouterr().out
    shown = " ".join(text.split())
    assert stop.value.code == 0 and module.__doc__.split("\n")[0] in shown
    assert text.startswith(f"usage: {name}.py [flags]\n\n")
    assert "(default: demo)" in shown and "(default: 32)" in shown
    groups = re.findall(r"^([a-z ]+):$", text, re.M)
    assert groups == ["this method", "data", "model", "training", "scoring", "files"]
    first = {"baseline": "--full"}.get(name, "--rank")
    assert text.index("this method:") < text.index(f"  {first}") < text.index("\ndata:")


def test_help_is_quick():
    code = "import sys; sys.argv = ['x', '--help']\nimport qlora\ntry:\n    qlora.main()\n"
    code += "except SystemExit:\n    print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = set(done.stderr.split())
    assert "torch" in loaded and not loaded & {"transformers", "datasets", "bitsandbytes"}
