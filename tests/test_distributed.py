"""Several processes: two with a batch give the adapter of one with the doubled batch; scores are not sharded wrongly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import sentences, write_rows
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """57 training rows after dev is cut: batches of 16 end with 9 rows, and a last one whose second half is short."""
    folder = tmp_path_factory.mktemp("odd") / "odd"
    for name, n, seed in (("train", 63, 5), ("test", 31, 6)):
        texts, labels = sentences(n, seed)
        write_rows(folder, name, {"text": texts, "label": labels})
    return str(folder)


def launch(processes, script, *flags):
    """Run a script under torchrun; returns the finished process."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
               "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", script, *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})


def outcome(folder):
    (path,) = Path(folder).glob("*.json")
    return json.loads(path.read_text()), load_file(path.with_suffix("") / "adapter_model.safetensors")


METHODS = [("lora.py",), ("qlora.py", "--nf4_backend", "torch"), ("hira.py",), ("sparse_lora.py", "--penalty", "0.05")]


@pytest.mark.parametrize("script, own", [(script, own) for script, *own in METHODS], ids=[m[0] for m in METHODS])
def test_two_processes_equal_one_with_the_doubled_batch(models, odd, tmp_path, script, own):
    """Dropouts are 0 in the tiny models. 57 rows in global batches of 16: a last batch of 9, and with batch 8 a part of 4."""
    shared = ["--dataset", odd, "--model", models("distilbert"), "--epochs", 8, "--lr", 5e-3, "--head_lr", 5e-3,
              "--max_length", 24, *own]
    module = __import__(script.removesuffix(".py"))
    module.main([*shared, "--batch_size", 16, "--out", tmp_path / "one"])
    done = launch(2, script, *shared, "--batch_size", 8, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    (one, alone), (two, together) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert one["curve"][-1]["train_loss"] < 0.5 * one["curve"][0]["train_loss"]
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)
    assert two["environment"]["processes"] == 2
    assert [round(point["train_loss"], 4) for point in two["curve"]] == [round(p["train_loss"], 4) for p in one["curve"]]
    assert two["correct"] == one["correct"] and abs(two["metrics"]["loss"] - one["metrics"]["loss"]) < 1e-5
    assert done.stdout.count("trained") == 1  # one process speaks and writes


def test_an_empty_part_contributes_zeros(models, tmp_path):
    """17 rows in global batches of 16: the last batch has one row, so the second process has none; masked LM."""
    for name, n, seed in (("train", 24, 7), ("validation", 8, 8), ("test", 8, 9)):
        write_rows(tmp_path / "data" / "wikitext2", name, {"text": sentences(n, seed)[0]})
    shared = ["--dataset", "wikitext2", "--data_dir", tmp_path / "data", "--model", models("bert", "MaskedLM"),
              "--max_length", 18, "--epochs", 2, "--train_samples", 17, "--lr", 5e-3]
    import lora
    lora.main([*shared, "--batch_size", 16, "--out", tmp_path / "one"])
    done = launch(2, "lora.py", *shared, "--batch_size", 8, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    (one, alone), (two, together) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert one["split"]["train"] == 17
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)
    assert abs(two["metrics"]["mlm_perplexity"] / one["metrics"]["mlm_perplexity"] - 1) < 1e-5


def test_a_rank_that_dies_ends_the_job(models, odd, tmp_path):
    """Wrong input on both ranks: torchrun ends with an error, our line is there, and nothing is written."""
    done = launch(2, "lora.py", "--dataset", odd, "--model", models("distilbert"), "--targets", "nothing", "--out", tmp_path)
    assert done.returncode != 0 and "--targets nothing" in done.stderr
    assert not list(tmp_path.glob("*.json"))
