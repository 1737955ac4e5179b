"""The hybrids: each equals its parent on the weights that the 4 bits stand for, in all it does."""

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY, ready, rows_flags, stir, trained

import common
import hybrid
import qlora
from harness import batches
from harness import models as library

PARENT = {"qhira": "hira", "sparse qlora": "contextual"}


def one_step(data, base, method):
    """Logits and gradients of a training step at fixed A and B."""
    stir(base)
    method.before_step(100, 100)  # contextual: past the dense steps
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
    _, data, base, method = ready(module, tmp_path, *words, *flags)
    ours = one_step(data, base, method)
    module, flags = EVERY[PARENT[name]]
    _, data, parent, method = ready(module, tmp_path, *words, *flags)
    with torch.no_grad():
        for path, layer in base.model.named_modules():
            if isinstance(layer, qlora.NF4Linear):
                library.weight_of(parent.model.get_submodule(path)).copy_(layer.weight)
    theirs = one_step(data, parent, method)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-6)
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 4
    for key, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][key], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PARENT)
def test_merge_report_and_resume(name, models, reviews, tmp_path, monkeypatch):
    """Merged scores are unmerged ones; a run that is stopped and continues ends with its curve."""
    module, flags = EVERY[name]
    words = [*rows_flags(models, reviews), *flags, "--max_steps", 6, "--batch_size", 8]
    run, data, base, method, history = trained(module, tmp_path / "a", *words)
    report = method.report()
    assert method.base_format == "nf4" and report["layers"] == 12 and report["kernel"] == "torch"
    assert ("rank_of_update" in report) == (name == "qhira") != ("channels_kept" in report)
    loss = common.evaluate(run, data, base)["metrics"]["test"]["loss"]
    assert common.score_merged(run, data, base)["loss"] == pytest.approx(loss)
    save = common.save_checkpoint

    def stop(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(module, tmp_path / "b", *words, "--save_every", 3)
    monkeypatch.setattr(common, "save_checkpoint", save)
    again = trained(module, tmp_path / "b", *words)
    assert again[-1].curve == history.curve
    tensors = common.trained_tensors(again[2].model)
    for key, tensor in common.trained_tensors(base.model).items():
        assert torch.equal(tensors[key], tensor)


def test_the_learning_rate_follows_the_update():
    def rates(*words):
        words = [hybrid.__doc__, hybrid.__file__, hybrid.add_args, ["--dataset", "demo", *words]]
        return hybrid.parse_args(*words).lr

    assert rates() == rates("--update", "hira") == hybrid.RATES["hira"]
    assert rates("--update", "contextual") == [2e-3]
    for words in (["--update", "contextual", "--lr", "0.5"], ["--lr", "0.5", "--update", "hira"]):
        assert rates(*words) == [0.5]
    # HiRA's default, but asked for
    assert rates("--lr", "0.02", "--update", "contextual") == [0.02]
