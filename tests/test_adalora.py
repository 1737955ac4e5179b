"""study/adalora.py: allocation against PEFT's, penalty and schedule against closed formulas."""

import json

import peft
import pytest
import torch
from conftest import result_of, rows_flags, text_flags
from torch import nn

from study import adalora
from study.claims import allocation

STEPS, START, TARGET = 60, 3, 2
SIZES = {"first": (8, 6), "second": (6, 10), "third": (10, 5)}


def both(seed=0):
    """(PEFT's model, our layers), with the same start."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    for name, (n_in, n_out) in SIZES.items():
        model.add_module(name, nn.Linear(n_in, n_out))
    ours = [adalora.AdaLoRALinear(layer, START, 6.0, 0.0) for layer in model]
    first, last = adalora.phases(STEPS)
    config = peft.AdaLoraConfig(
        init_r=START,
        target_r=TARGET,
        tinit=first,
        tfinal=last,
        deltaT=1,
        total_step=STEPS,
        lora_alpha=6,
        target_modules=[*SIZES],
    )
    theirs = peft.get_peft_model(model, config)
    for layer, other in zip(ours, theirs.base_model.model, strict=True):
        for name, key in {"A": "lora_A", "lam": "lora_E", "B": "lora_B"}.items():
            getattr(other, key)["default"].data.copy_(getattr(layer, name).data)
    return theirs, ours


def test_lambda_masks_and_ranks_are_peft_s_in_each_step():
    """The same gradients are given to both; every step moves every number."""
    theirs, ours = both()
    generator, reached = torch.Generator().manual_seed(1), set()
    for step in range(1, STEPS + 1):
        for layer, other in zip(ours, theirs.base_model.model, strict=True):
            pairs = {"A": other.lora_A, "lam": other.lora_E, "B": other.lora_B}
            for name, entry in pairs.items():
                ours_and_theirs = getattr(layer, name), entry["default"]
                gradient = torch.randn(ours_and_theirs[0].shape, generator=generator)
                for tensor in ours_and_theirs:
                    tensor.grad = gradient.clone()
                    tensor.data -= 0.1 * gradient
        adalora.allocate(ours, step, STEPS, TARGET * len(ours))
        theirs.base_model.update_and_allocate(step)
        pattern = theirs.peft_config["default"].rank_pattern
        for (name, _), layer, other in zip(
            SIZES.items(), ours, theirs.base_model.model, strict=True
        ):
            torch.testing.assert_close(layer.lam.data, other.lora_E["default"].data)
            if pattern:
                [mask] = [mask for key, mask in pattern.items() if f"{name}.lora_E" in key]
                assert layer.mask[:, 0].bool().tolist() == mask
        reached.add(sum(int(layer.mask.sum()) for layer in ours))
    assert reached == {9, 8, 7, 6}


def test_the_penalty_is_the_mean_of_two_norms():
    """Of c·U with orthonormal U it is |c² − 1|·√r, with a gradient along U."""
    P, Q = (nn.init.orthogonal_(torch.empty(7, 3)) for _ in range(2))
    P, Q = nn.Parameter(2 * P), nn.Parameter(0.5 * Q.T.contiguous())
    penalty = adalora.orthogonality(P, Q)
    assert penalty.item() == pytest.approx((3 + 0.75) * 3**0.5 / 2, rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(P.grad, P.data / 3**0.5)  # 4·P·(PᵀP − I)/(2·‖PᵀP − I‖)/2


def test_the_budget_at_its_corners():
    budgets = {step: adalora.budget_at(step, 100, 90, 60) for step in (1, 10, 35, 60, 100)}
    assert budgets == {1: 90, 10: 90, 35: 60 + int(30 / 8), 60: 60, 100: 60}


def test_a_run_saves_a_plain_lora_of_different_ranks(models, reviews, tmp_path):
    """It scores the same when it is loaded again."""
    line = [*rows_flags(models, reviews), "--rank", 2, "--max_steps", 20]
    line += ["--targets", "q_lin", "v_lin", "lin1"]
    result, path = result_of(adalora, tmp_path, *line)
    config = json.loads((path.with_suffix("") / "adapter_config.json").read_text())
    ranks = config["rank_pattern"]
    assert sum(ranks.values()) == 2 * len(ranks) and max(ranks.values()) <= 3
    assert result["report"]["ranks"] == ranks
    adapter = peft.LoraConfig.from_pretrained(path.with_suffix(""))
    assert adapter.rank_pattern == ranks
    copy = path.with_suffix("").rename(tmp_path / "copy")
    again = adalora.main([*map(str, line), "--eval_only", str(copy), "--out", str(tmp_path)])
    assert again == []


SHAPES = {"a": (6, 6), "b": (6, 6), "c": (6, 6), "d": (24, 6), "e": (24, 6)}


def test_rank_patterns_have_equal_budgets():
    """Permuting keeps the ranks of each shape; the gradient's largest singular values win."""
    ranks = {"a": 5, "b": 1, "c": 0, "d": 7, "e": 3}
    budget = allocation.count_weights(ranks, SHAPES)
    assert budget == 6 * 12 + 10 * 30
    orders = {
        tuple(allocation.permuted(ranks, SHAPES, torch.Generator().manual_seed(i)).items())
        for i in range(20)
    }
    assert len(orders) > 5
    for order in map(dict, orders):
        assert sorted(order[name] for name in "abc") == [0, 1, 5]
        assert sorted(order[name] for name in "de") == [3, 7]
    gradients = {name: torch.diag(torch.ones(6)) for name in "abc"}
    gradients |= {name: torch.eye(24, 6) for name in "de"}
    gradients["a"][2, 2] = 9
    pattern = allocation.by_gradient(gradients, SHAPES, budget)
    assert budget - allocation.count_weights(pattern, SHAPES) < 12
    assert allocation.by_gradient(gradients, SHAPES, 12) == {**dict.fromkeys(SHAPES, 0), "a": 1}


def test_lora_trains_with_adalora_s_ranks(models, text_dir, tmp_path):
    line = [*text_flags(models, text_dir), "--rank", 2, "--max_steps", 2, "--out", tmp_path]
    [path] = adalora.main([*map(str, line)])
    ranks = json.loads(path.read_text())["report"]["ranks"]
    for pattern in allocation.PATTERNS:
        words = [*line, "--pattern", pattern, "--adalora", tmp_path, "--name", pattern]
        [path] = allocation.main([*map(str, words)])
        result = json.loads(path.read_text())
        assert 0.98 < result["parameters"]["adapter"] / sum(ranks.values()) / 64 <= 1
