"""The hybrids: each equals its parent on the weights that the 4 bits stand for, in all it does."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY, ready, result_of, rows_flags, stir

import common
import hybrid
from harness import models as library

PARENT = {"qhira": "hira", "sparse qlora": "contextual"}


def step(module, base, data, run, method):
    """Logits and gradients of one training step at fixed A and B."""
    stir(base)
    method.get("after_step", lambda *_: None)(1, 1, 0.0)  # contextual: sparse from here on
    base.model.train()
    targets = batches.predicted_tokens(data, data.train, 0)
    batch = batches.collate(data, data.train, torch.arange(8), targets)
    logits = common.forward(base, batch)
    F.cross_entropy(logits, batch.target).backward()
    return logits, {n: t.grad for n, t in common.trained_tensors(base.model).items()}


@pytest.mark.parametrize("kind", ["distilbert", "bert", "llama"])
@pytest.mark.parametrize("name", PARENT)
def test_equals_its_parent_on_the_dequantized_weights(name, kind, models, reviews, tmp_path):
    module, flags = EVERY[name]
    words = rows_flags(models, reviews, kind)
    run, data, base, method = ready(module, tmp_path, *words, *flags)
    ours = step(module, base, data, run, method)
    module, flags = EVERY[PARENT[name]]
    run, data, parent, method = ready(module, tmp_path, *words, *flags)
    with torch.no_grad():
        for path, layer in base.model.named_modules():
            if hasattr(layer, "packed"):
                library.weight_of(parent.model.get_submodule(path)).copy_(layer.weight)
    theirs = step(module, parent, data, run, method)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-6)
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 4
    for key, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][key], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PARENT)
def test_result_merge_reload_and_resume(name, models, reviews, tmp_path, monkeypatch, capsys):
    module, flags = EVERY[name]
    words = [*rows_flags(models, reviews), *flags, "--max_steps", 6, "--batch_size", 8]
    [path] = module.main([*map(str, words), "--out", str(tmp_path / "a")])
    result = json.loads(path.read_text())
    assert result["method"] == "hybrid" and result["report"]["layers"] == 12
    assert result["metrics"]["merged"]["loss"] == pytest.approx(result["metrics"]["test"]["loss"])
    capsys.readouterr()
    module.main([*map(str, words), "--eval_only", str(path.with_suffix("")), "--out", "x"])
    assert f"test {result['metrics']['test']['accuracy']:.4f}" in capsys.readouterr().out

    saved = common.save_checkpoint

    def stop(*args):
        saved(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        result_of(module, tmp_path / "b", *words, "--save_every", 3)
    monkeypatch.setattr(common, "save_checkpoint", saved)
    again, _ = result_of(module, tmp_path / "b", *words)
    assert (
        again["metrics"]["test"] == result["metrics"]["test"] and again["curve"] == result["curve"]
    )


def test_the_rate_follows_the_update():
    def rates(*words):
        words = [hybrid.__doc__, hybrid.__file__, hybrid.add_args, ["--dataset", "demo", *words]]
        return hybrid.parse_args(*words).lr

    assert rates() == rates("--update", "hira") == hybrid.RATES["hira"]
    assert rates("--update", "contextual") == [2e-3]
    assert rates("--lr", "0.5", "--update", "contextual") == [0.5]
    assert rates("--update", "contextual", "--lr", "0.5") == [0.5]
    assert rates("--lr", "0.02", "--update", "contextual") == [
        0.02
    ]  # HiRA's default, but asked for
