"""The claims that need training: starts of QLoRA against oracles, the readers, the commands."""

import importlib
import json
import math
import os
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import WORDS, oracle, text_flags
from transformers import BertConfig, BertForMaskedLM

import common
import lora
import qlora
from harness import flags, splits
from study.claims import layers, shared, sparsity, start_values, starts, storage, tuned


def test_loftq_is_pefts_where_alpha_is_the_rank_and_gains_at_other_scales_too():
    """PEFT's whole function insists on a GPU. At α = 2r its start is as far off as Q is."""
    decompose = oracle("peft.utils.loftq_utils")._low_rank_decomposition
    W = torch.randn(48, 64, generator=splits.generator_for("W"))
    error = W - qlora.dequantize(*qlora.quantize(W), W.shape)
    theirs, (A, B) = decompose(error, reduced_rank=8), start_values.loftq(W, W - error, 8, 1.0)
    torch.testing.assert_close(B @ A, theirs["L"] @ theirs["R"], rtol=0, atol=1e-5)
    torch.testing.assert_close((error - 2 * B @ A).norm(), error.norm())
    A, B = start_values.loftq(W, W - error, 8, 2.0)
    torch.testing.assert_close((error - 2 * B @ A).norm(), torch.linalg.svdvals(error)[8:].norm())


def test_the_output_aware_start_is_the_least_squares_solution():
    """Alternating least squares for B and A; the damping is ten more inputs."""
    E, mix, X, A = torch.randn(225, 10, generator=splits.generator_for("E")).split([12, 10, 200, 3])
    X = mix @ X.T
    E, A, C = E.double(), A.double(), X @ X.T / 200
    inputs = torch.cat([X, (2 * C.trace() / 10).sqrt() * torch.eye(10)], dim=1).double()
    for _ in range(500):
        B = torch.linalg.lstsq((A @ inputs).T, (E @ inputs).T).solution.T
        A = torch.linalg.lstsq(B, E).solution  # the same for each input, so for any inputs
    best = ((E - B @ A) @ inputs).norm()
    A, B = start_values.output_aware(E, 0 * E, C, 3, 2.0)
    torch.testing.assert_close(((E - 2 * B @ A) @ inputs).norm(), best, rtol=1e-4, atol=0)


@pytest.mark.parametrize("start", starts.STARTS)
def test_a_start_is_nearer_to_the_weight_than_four_bits(start, models, text_dir):
    """In weights, or in outputs on the training text; PEFT's is as far away where alpha is 2·r."""
    words = [*text_flags(models, text_dir), "--rank", 4, "--alpha", 8, "--targets", "q_lin", "lin1"]
    run, data, base = shared.prepare(starts, [*words, "--start", start])
    weights = shared.block_weights(base.model)
    squares = starts.covariances(run, data, base, weights)
    starts.adapt(run, data, base)
    for name in (f"distilbert.transformer.layer.{i}.ffn.lin1" for i in (0, 1)):
        layer = base.model.get_submodule(name)
        C = squares[name] if start == "output_aware" else torch.eye(layer.in_features)
        errors = [weights[name] - Q for Q in (layer.merged_weight(), layer.base.weight)]
        ours, theirs = ((E @ C * E).sum().sqrt().item() for E in errors)
        same = start in ("zero", "peft_loftq")
        assert ours == pytest.approx(theirs, rel=1e-4) if same else ours < 0.97 * theirs


def test_tuned_runs_are_gathered(models, text_dir, tmp_path):
    """The dev loss chooses, the test loss counts; the second seed lacks learning rates."""
    words = [*text_flags(models, text_dir), "--max_steps", 3, "--out", tmp_path, "--name", "a"]
    paths = starts.main([*words, "--lr", 1e-3, 1e-2, 0.1])
    starts.main([*words, "--seeds", 1])
    metrics = {r["lr"]: r["metrics"] for r in map(json.loads, map(Path.read_text, paths))}
    lr = min(metrics, key=lambda lr: metrics[lr]["dev"]["loss"])
    row = {"name": "a", "seed": 0, "lr": lr, "edge": lr != 1e-2, "weights": 4 * 8 * 64}
    assert tuned.gather(tmp_path) == [row | {"loss": metrics[lr]["test"]["loss"]}]


def test_differences_are_paired_by_seed():
    losses = [("a", 0, 2.0), ("a", 1, 2.1), ("b", 1, 2.0), ("b", 0, 1.9), ("b", 2, 9.0)]
    rows = [dict(zip(("name", "seed", "loss"), loss, strict=True)) for loss in losses]
    assert tuned.difference(rows, "a", "b") == (pytest.approx([100 * math.expm1(0.1)] * 3), 2)
    assert tuned.verdict([4, 3, 5], 4) == "worse" and "no verdict" in tuned.verdict([4, 3, 5], 3)
    assert tuned.verdict([0, -1, 1], 5) == "equal within 2 %"
    assert tuned.verdict([0, -1, 3], 5) == "undecided"


def test_stored_bits_are_those_of_the_trained_phrases(models, tmp_path):
    """No phrase is lost to the 16 dev examples, and these are taken off the test file's loss."""
    phrases = [f"{a} {b} {c}" for a in WORDS[:5] for b in WORDS[:5] for c in WORDS[:5]]
    storage.write_phrases([*phrases, "the a film it"], 0, tmp_path)
    words = ["--dataset", tmp_path, "--model", models("distilbert"), "--max_length", 16]
    sizes = shared.prepare(lora, [*words, "--dev_samples", 16])[1].description
    for loss, accuracy, bits in ((math.log(16), 1 / 16, 0), (0, 1, 4 * 109)):
        test = {"loss": (109 * loss + 16 * 5) / 125, "accuracy": 109 * accuracy / 125}
        result = {"data": sizes, "metrics": {"test": test, "dev": {"loss": 5, "accuracy": 0}}}
        assert storage.memory(result) == pytest.approx((bits, accuracy), abs=1e-6)


@pytest.mark.parametrize("block", ["sparsity", "starts", "storage", "layers"])
def test_the_blocks_of_run_sh(block, tmp_path, monkeypatch):
    """A stand-in for python takes down their commands: these parse, and weights are equal."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> log; echo 1\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for seed in range(4):
        os.makedirs(f"results/claims/storage/phrases{seed}")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "JOBS": "1"}
    script, runs = Path(__file__).parents[1] / "study/claims/run.sh", {}
    subprocess.run(["bash", script, block], env=env, check=True)
    for line in (tmp_path / "log").read_text().splitlines():
        name, *words = line.removeprefix("-m ").split()
        if "--model" in words:
            module = importlib.import_module(name.removesuffix(".py"))
            args = flags.parse_args("", module.__file__, module.add_args, words)
            runs.setdefault(args.name, args)
    assert len(runs) == {"sparsity": 9, "starts": 4, "storage": 7, "layers": 3}[block]
    equal = {"sparsity": sparsity.PAIRS.items(), "layers": [layers.PLACES]}.get(block, [])
    for names in equal:
        sizes = [adapter_weights(runs[name]) for name in names]
        assert max(sizes) <= 1.05 * min(sizes)


def adapter_weights(args):
    """How many weights are left of an adapter on a model of minilm-mlm's shapes."""
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(vocab_size=9, **shape)).requires_grad_(False)
    base = Namespace(model=model)
    made = common.replace(args, base, args.targets, lambda x: lora.LoRALinear(x, args.rank, 16, 0))
    numbers = sum(layer.A.numel() + layer.B.numel() for layer in made.values())
    return numbers * (1 - getattr(args, "sparsity", 0))
