"""How far a method's first step moves the weights: the change of W, per unit of learning rate."""

import torch

import baseline
import common
import contextual_lora
import hira
import lora
import qlora
import sparse_lora
from harness import batches, models
from study.claims.shared import prepare

SCRIPTS = {"full": baseline, "lora": lora, "qlora": qlora, "hira": hira}
SCRIPTS |= {"sparse_lora": sparse_lora, "contextual_lora": contextual_lora}
TINY = 1e-6  # the learning rate of the step: so small that the change is proportional to it


def first_step(row):
    """RMS of the change of the adapted weights after one AdamW step, per unit of learning rate."""
    script, method = SCRIPTS[row["method"]], row["method"]
    words = [word for key, value in row["settings"].items() for word in (f"--{key}", value)]
    words += ["--lr", TINY, "--test_samples", 64]
    words += ["--full"] if method == "full" else ["--rank", row["rank"]]
    run, data, base = prepare(script, [str(word) for word in words])
    names = [n for n in models.block_linears(base.model) if n.endswith(("query", "value"))]
    method = script.adapt(run, base)
    before = weights_of(base.model, names)
    optimizer = common.make_optimizer(run, base, method)
    base.model.train()
    method.before_step(100, 100)
    _, examples, targets = next(batches.training_batches(run, data, 1, 1))
    trained = common.trained_tensors(base.model)
    common.gradient(run, data, base, method, examples, targets, trained)
    optimizer.step()
    after = weights_of(base.model, names)
    squares = [(new - old).square() for new, old in zip(after, before, strict=True)]
    return torch.cat([part.flatten() for part in squares]).mean().sqrt().item() / TINY


def weights_of(model, names):
    """The weights that the layers of these names compute with, in double precision.

    An adapter's update is computed from its factors: in the sum with W it would be rounded away.
    """
    layers = [model.get_submodule(name) for name in names]
    return [
        update_of(layer).detach()
        if isinstance(layer, models.AdapterLayer)
        else layer.weight.detach().double().clone()
        for layer in layers
    ]


def update_of(layer):
    """What an adapter adds to its layer's weight."""
    B, A = layer.B.double(), layer.A.double()
    if isinstance(layer, hira.HiRALinear):
        return hira.hira_update(models.weight_of(layer.base).double(), A, B)
    return layer.scale * B @ A
