"""The hybrids: each equals its parent on the weights that the 4 bits stand for, in all it does."""

import pytest
import torch
from conftest import EVERY, batch_of, gradients, ready, rows_flags, same, stir, trained

import common
import hybrid
import qlora
from harness import models as library

PARENT = {"qhira": "hira", "contextual qlora": "contextual"}


def one_step(data, base, method):
    """Logits and gradients of a training step at fixed A and B."""
    stir(base)
    method.before_step(100, 100)  # contextual: past the dense steps
    base.model.train()
    return gradients(base, batch_of(data))


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
    assert len(ours[1]) > 4
    same(ours, one_step(data, parent, method), 2e-6)


@pytest.mark.parametrize("name", PARENT)
def test_report_and_merged_score(name, models, reviews, tmp_path):
    """The report has both halves' numbers; merged, the trained model scores the same."""
    module, flags = EVERY[name]
    words = [*rows_flags(models, reviews), *flags, "--max_steps", 6, "--batch_size", 8]
    run, data, base, method, _ = trained(module, tmp_path, *words)
    report = method.report()
    assert (method.base_format, report["layers"], report["kernel"]) == ("nf4", 12, "torch")
    assert ("rank_of_update" in report) == (name == "qhira") != ("channels_kept" in report)
    loss = common.evaluate(run, data, base)["metrics"]["test"]["loss"]
    assert common.score_merged(run, data, base)["loss"] == pytest.approx(loss)


def test_the_learning_rate_follows_the_update():
    for flags, lr in (
        ("", 2e-2),
        ("--update contextual", 2e-3),
        ("--update contextual --lr 0.5", 0.5),
        ("--lr 0.5 --update hira", 0.5),
        ("--lr 0.02 --update contextual", 0.02),  # HiRA's, but asked for
    ):
        words = "", hybrid.__file__, hybrid.add_args, flags.split()
        assert hybrid.parse_args(*words).lr == [lr]
