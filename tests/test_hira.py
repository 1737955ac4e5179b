"""HiRA's own arithmetic: against autograd of the dense formula and fp64, and what it keeps.

That the whole model's logits and gradients are PEFT's is in test_models.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import close, ready, rows_flags, stir
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

import hira
from harness import models as library

LAYERS = ["linear", "no bias", "conv1d"]


def layer_of(kind, out_features=24, in_features=20, rank=3, dropout=0.0):
    """A HiRALinear over a Linear, a Linear without bias, or a Conv1D; A and B random."""
    torch.manual_seed(0)
    base = {
        "linear": lambda: nn.Linear(in_features, out_features),
        "conv1d": lambda: Conv1D(out_features, in_features),
        "no bias": lambda: nn.Linear(in_features, out_features, bias=False),
    }[kind]().requires_grad_(False)
    base.weight.normal_(0, 0.3)
    if base.bias is not None:
        base.bias.normal_()
    layer = hira.HiRALinear(base, rank, dropout)
    nn.init.normal_(layer.A, std=0.5)
    nn.init.normal_(layer.B, std=0.5)
    return layer


def dense_weight(layer):
    """W0 + W0 ⊙ (B·A), element by element as the paper writes it."""
    weight = library.weight_of(layer.base)
    return weight + weight * (layer.B @ layer.A)


def all_close(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, tolerance)


def saved_by(work):
    """What autograd saves while work() runs, and what work() returns."""
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        result = work()
    return saved, result


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", [(7, 20), (2, 5, 20), (2, 3, 4, 20)])
def test_layer_formula_and_merged_weight_agree(kind, shape):
    """The layer, hira_forward by autograd and the merged weight against the paper's formula.

    Output and gradients of A, B and x, for flat and batched inputs, contiguous or not.
    """
    layer, x = layer_of(kind), torch.randn(shape[-1], *shape[:-1]).movedim(0, -1)
    x.requires_grad_(True)
    weights, wanted = torch.randn(*shape[:-1], 24), (layer.A, layer.B, x)
    W0, bias = library.weight_of(layer.base), layer.base.bias
    expected = F.linear(x, dense_weight(layer), bias)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for y in (layer(x), hira.hira_forward(x, W0, bias, layer.A, layer.B)):
        close(y, expected, 1e-6)
        all_close(torch.autograd.grad((y * weights).sum(), wanted), theirs, 1e-5)
    close(F.linear(x, layer.merged_weight(), bias), expected, 1e-6)
    close(W0 + hira.hira_update(W0, layer.A, layer.B), layer.merged_weight(), 1e-6)
    layer.base.weight.data = layer.base.weight.bfloat16()  # merged in fp32 all the same
    assert layer.merged_weight().dtype == torch.float32
    close(layer.merged_weight(), dense_weight(layer), 1e-6)


@pytest.mark.parametrize("needs", ["A and B", "x"])
def test_gradients_when_only_some_are_wanted(needs):
    """The first layer's input has none; a frozen adapter passes its output's on."""
    layer, x = layer_of("linear"), torch.randn(6, 20)
    layer.requires_grad_(needs != "x")
    layer.base.requires_grad_(False)
    x.requires_grad_(needs == "x")
    layer(x).square().sum().backward()
    assert (x.grad is not None) == (needs == "x") and (layer.A.grad is not None) == (needs != "x")
    wanted = (x,) if needs == "x" else (layer.A, layer.B)
    expected = F.linear(x, dense_weight(layer), layer.base.bias).square().sum()
    all_close([tensor.grad for tensor in wanted], torch.autograd.grad(expected, wanted), 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_no_dense_product_is_kept_for_the_backward_pass(kind):
    """Nothing of the weight's size is saved; autograd alone would keep one."""
    layer, x = layer_of(kind), torch.randn(7, 20, requires_grad=True)
    saved, y = saved_by(lambda: layer(x))
    assert {tensor.data_ptr() for tensor in saved} == {
        x.data_ptr(),
        layer.A.data_ptr(),
        layer.B.data_ptr(),
    }
    y.sum().backward()
    saved, _ = saved_by(lambda: F.linear(x, dense_weight(layer)))
    W0 = library.weight_of(layer.base)
    assert any(t.numel() == W0.numel() and t.data_ptr() != W0.data_ptr() for t in saved)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_takes_two_products_with_one_mask(kind):
    """In training y = W0·x + b + (W0 ⊙ B·A)·(mask·x/(1 - p)); W0·x + b is whole.

    The mask is read off the output: W0 ⊙ B·A has full column rank.
    """
    layer, p = layer_of(kind, dropout=0.25, out_features=60), 0.25
    x = torch.randn(50, 20)
    y = layer.train()(x)
    update = library.weight_of(layer.base) * (layer.B @ layer.A)
    left = (y - layer.base(x)).detach().double().T
    dropped = torch.linalg.lstsq(update.detach().double(), left).solution.T.float()  # (50, 20)
    mask = dropped / x > 0.5
    close(dropped, x * mask / (1 - p), 1e-4)
    assert 0.65 < mask.float().mean() < 0.85
    weights, wanted = torch.randn_like(y), (layer.A, layer.B)
    expected = layer.base(x) + F.linear(x * mask / (1 - p), update)
    ours = torch.autograd.grad((y * weights).sum(), wanted)
    all_close(ours, torch.autograd.grad((expected * weights).sum(), wanted), 1e-4)
    close(layer.eval()(x), F.linear(x, dense_weight(layer), layer.base.bias), 1e-6)


# ------------------------------------------------------------------------------------------- bf16


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("size", [1e-3, 0.5])
def test_bf16_branch_against_fp64(kind, size):
    """The update W0 ⊙ B·A by itself, and the gradients of A, B and x, to 1 %, at |B| = 1e-3, too.

    In W0 ⊙ (1 + B·A), rounded to bf16, nearly all of such an update would be gone.
    """
    layer = layer_of(kind, 256, 192, rank=8)
    nn.init.normal_(layer.B, std=size)
    nn.init.uniform_(layer.A, -(192**-0.5), 192**-0.5)  # as it starts
    layer.base.weight.data = layer.base.weight.bfloat16()
    exact = copy.deepcopy(layer).double()  # of the weight as it is stored
    x, weights = torch.randn(64, 192, requires_grad=True), torch.randn(64, 256)
    wide_x, W0 = x.detach().double().requires_grad_(True), library.weight_of(exact.base)
    wide = F.linear(wide_x, W0 * (exact.B @ exact.A))
    (wide * weights.double()).sum().backward()
    layer.base.forward = lambda x: 0.0  # leaves the branch alone
    with torch.autocast("cpu", torch.bfloat16):
        saved, branch = saved_by(lambda: layer(x))
        (branch * weights).sum().backward()
        product = hira.hira_weight(library.weight_of(layer.base), layer.A, layer.B).detach()

    def error(ours, theirs):
        return ((ours.double() - theirs).norm() / theirs.norm()).item()

    assert branch.dtype == torch.bfloat16 and error(branch, wide) < 0.01
    assert {tensor.dtype for tensor in saved if tensor.shape == x.shape} == {torch.bfloat16}
    for ours, theirs in ((layer.A, exact.A), (layer.B, exact.B), (x, wide_x)):
        assert ours.grad.dtype == torch.float32 and error(ours.grad, theirs.grad) < 0.01
    left = F.linear(x.detach(), product.float() - W0.float())
    assert (error(left, wide) > 0.2) == (size == 1e-3)


# ------------------------------------------------------------------------------------------- rank


def test_update_has_rank_up_to_r0_times_r():
    """W0 of rank 2 and r = 3 give rank 6, a full-rank W0 gives full rank; B·A itself has 3."""
    torch.manual_seed(0)
    A, B = torch.randn(3, 30).double(), torch.randn(40, 3).double()
    low = torch.randn(40, 2).double() @ torch.randn(2, 30).double()
    full = torch.randn(40, 30).double()
    for weight, rank in ((torch.ones(40, 30).double(), 3), (low, 6), (full, 30)):
        update = hira.hira_update(weight, A, B)
        assert torch.linalg.matrix_rank(update, rtol=1e-10) == rank


@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_report_names_the_rank_of_one_layers_update(kind, models, reviews, tmp_path):
    words = [*rows_flags(models, reviews, kind), "--rank", 4]
    run, data, base, method = ready(hira, tmp_path, *words)
    [(name, rank)] = method.report()["rank_of_update"].items()
    assert rank == 0  # B is zero
    stir(base)
    layer = library.stand_ins(base.model)[name]
    update = dense_weight(layer) - library.weight_of(layer.base)
    wanted = torch.linalg.matrix_rank(update, rtol=1e-5)
    assert method.report() == {"rank_of_update": {name: wanted}} and wanted > run.rank
