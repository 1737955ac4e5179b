"""HiRA: against PEFT, against autograd of the dense formula, and what its own backward pass keeps."""

import pytest
import torch
import torch.nn.functional as F
from conftest import oracle
from test_adapters import KINDS, batch_of, close, gradients, models, our_name, peft_config, peft_twin, quick, randomise, start
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

import common
import hira

FIXTURES = (models, quick)  # in force here, too


def layer_of(kind, out_features=24, in_features=20, rank=3, dropout=0.0, dtype=torch.float32):
    """A HiRALinear over a Linear, a Linear without bias, or a Conv1D; A and B random."""
    torch.manual_seed(0)
    base = {"linear": lambda: nn.Linear(in_features, out_features), "conv1d": lambda: Conv1D(out_features, in_features),
            "no bias": lambda: nn.Linear(in_features, out_features, bias=False)}[kind]().requires_grad_(False)
    base.weight.normal_(0, 0.3)
    layer = hira.HiRALinear(base, rank, dropout).to(dtype)
    with torch.no_grad():
        layer.A.normal_(0, 0.5)
        layer.B.normal_(0, 0.5)
    return layer


def dense_weight(layer):
    """W0 + W0 ⊙ (B·A) as the paper writes it, by autograd's own means."""
    weight = common.weight_of(layer.base)
    return weight + weight * (layer.B @ layer.A)


LAYERS = ["linear", "no bias", "conv1d"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft(kind, models, tmp_path):
    """Equal logits and equal gradients of A, B and head, GPT-2's Conv1D included."""
    oracle("peft")
    model, run, _ = start("hira", models(kind), tmp_path)
    randomise(model)
    twin = peft_twin(models(kind), model, peft_config("hira", kind, run))
    batch = batch_of(kind)
    close(common.forward(model, batch), common.forward(twin, batch), 1e-5)
    ours, theirs = gradients(model, batch), {our_name(name): grad for name, grad in gradients(twin, batch).items()}
    assert ours.keys() == theirs.keys() and all(grad.any() for grad in ours.values())
    for name, grad in ours.items():
        close(grad, theirs[name], 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", [(7, 20), (2, 5, 20)])
def test_forward_and_gradients_equal_the_dense_formula(kind, shape):
    """Also the input's gradient, for flat and batched inputs."""
    layer, x = layer_of(kind), torch.randn(shape, requires_grad=True)
    weights = torch.randn(*shape[:-1], 24)
    wanted = (layer.A, layer.B, x)
    ours = torch.autograd.grad((layer(x) * weights).sum(), wanted)
    expected = F.linear(x, dense_weight(layer), layer.base.bias)
    close(layer(x), expected, 1e-6)
    for grad, other in zip(ours, torch.autograd.grad((expected * weights).sum(), wanted), strict=True):
        close(grad, other, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_in_double_precision(bias):
    torch.manual_seed(0)
    x, A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (2, 5), (4, 2)))
    weight, b = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64) if bias else None
    assert torch.autograd.gradcheck(lambda x, A, B: hira.HadamardLinear.apply(x, weight, b, A, B), (x, A, B))


@pytest.mark.parametrize("needs", ["A and B", "x"])
def test_gradients_when_only_some_are_wanted(needs):
    """The first adapted layer of a frozen model has an input without gradient; a frozen adapter passes gradients on."""
    layer, x = layer_of("linear"), torch.randn(6, 20)
    if needs == "x":
        x.requires_grad_(True)
        layer.requires_grad_(False)
    layer(x).square().sum().backward()
    assert (x.grad is not None) == (needs == "x") and (layer.A.grad is not None) == (needs != "x")
    reference = layer_of("linear").requires_grad_(needs != "x")
    y = x.detach().requires_grad_(needs == "x")
    F.linear(y, dense_weight(reference), reference.base.bias).square().sum().backward()
    if needs == "x":
        close(x.grad, y.grad, 1e-5)
    else:
        close(layer.A.grad, reference.A.grad, 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_no_dense_product_is_kept_for_the_backward_pass(kind):
    """What autograd saves of the weight's size is the frozen weight itself, not a product of it."""
    layer, saved = layer_of(kind), []
    x = torch.randn(7, 20, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    assert any(tensor.data_ptr() == layer.A.data_ptr() for tensor in saved)  # the hook sees what is saved
    dense = [tensor for tensor in saved if tensor.numel() >= layer.base.weight.numel()]
    assert all(tensor.data_ptr() == layer.base.weight.data_ptr() for tensor in dense)
    y.sum().backward()
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        F.linear(x, dense_weight(layer))
    dense = [tensor for tensor in saved if tensor.numel() >= layer.base.weight.numel()]
    assert any(tensor.data_ptr() != layer.base.weight.data_ptr() for tensor in dense)  # autograd alone would keep one


@pytest.mark.parametrize("kind", LAYERS)
def test_merged_weight_is_what_forward_computes_with(kind):
    layer, x = layer_of(kind), torch.randn(9, 20)
    close(F.linear(x, layer.merged_weight(), layer.base.bias), layer(x), 1e-6)
    close(layer.merged_weight(), dense_weight(layer), 1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_unmerging_gives_back_every_bit(kind):
    """Also where 1 + B·A is zero, so that no division could bring the weight back."""
    layer = layer_of(kind)
    with torch.no_grad():
        layer.A.zero_()[0, :5] = 1.0
        layer.B.zero_()[:, 0] = -1.0
    model = nn.Sequential(layer)
    before, x = layer.base.weight.clone(), torch.randn(9, 20)
    y = model(x)
    with common.plain(model, True, torch.float32):
        assert (model[0].weight[:, :5] == 0).all()
        close(model(x), y, 1e-6)
    assert model[0] is layer and torch.equal(layer.base.weight, before) and torch.equal(model(x), y)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_takes_two_products_with_one_mask(kind):
    """In training y = W0·x + b + (W0 ⊙ B·A)·(mask·x/(1 - p)). The mask is read off the output: B·A has full column rank."""
    layer, p = layer_of(kind, dropout=0.25, out_features=60), 0.25
    x = torch.randn(50, 20)
    y = layer.train()(x)
    update = common.weight_of(layer.base) * (layer.B @ layer.A)
    dropped = torch.linalg.lstsq(update.double(), (y - layer.base(x)).double().T).solution.T.detach().float()  # (50, 20)
    kept = dropped / x > 0.5
    close(dropped, x * kept / (1 - p), 1e-4)
    assert 0.65 < kept.float().mean() < 0.85
    weights = torch.randn_like(y)
    expected = layer.base(x) + F.linear(x * kept / (1 - p), update)
    for grad, other in zip(torch.autograd.grad((y * weights).sum(), (layer.A, layer.B)),
                           torch.autograd.grad((expected * weights).sum(), (layer.A, layer.B)), strict=True):
        close(grad, other, 1e-4)
    close(layer.eval()(x), F.linear(x, dense_weight(layer), layer.base.bias), 1e-6)


def test_update_has_rank_up_to_r0_times_r():
    """W0 of rank 2 and r = 3 give an update of rank 6; a full-rank W0 gives full rank. LoRA's is never above r."""
    torch.manual_seed(0)
    A, B = torch.randn(3, 30), torch.randn(40, 3)
    low, full = torch.randn(40, 2) @ torch.randn(2, 30), torch.randn(40, 30)
    assert hira.numerical_rank(B @ A) == 3
    assert hira.numerical_rank(low * (B @ A)) == 6 == torch.linalg.matrix_rank(low * (B @ A))
    assert hira.numerical_rank(full * (B @ A)) == 30


def test_info_reports_the_ranks_of_the_trained_update(models, tmp_path):
    model, run, method = start("hira", models("gpt2"), tmp_path)
    assert set(method["info"]()["rank_of_update"].values()) == {0}  # B is zero
    randomise(model)
    ranks = method["info"]()["rank_of_update"]
    assert ranks.keys() == common.adapters(model).keys() and all(rank > run.rank for rank in ranks.values())
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        assert rank == torch.linalg.matrix_rank(layer.merged_weight() - common.weight_of(layer.base))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_autocast_on_cpu(kind, stored):
    """Products in bf16, gradients in the parameters' fp32, and the numbers within bf16's rounding of fp32's."""
    layer, exact = layer_of(kind), layer_of(kind)
    layer.base.weight.data = layer.base.weight.data.to(stored)
    x, saved = torch.randn(50, 20, requires_grad=True), []
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert [tensor.dtype for tensor in saved if tensor.shape == x.shape] == [torch.bfloat16]  # half the memory of fp32
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == layer.A.grad.dtype == layer.B.grad.dtype == torch.float32
    z = x.detach().requires_grad_(True)
    expected = exact(z)
    expected.square().sum().backward()
    for ours, theirs in ((y, expected), (x.grad, z.grad), (layer.A.grad, exact.A.grad), (layer.B.grad, exact.B.grad)):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_model_in_bf16_trains(kind, models, tmp_path):
    model, run, _ = start("hira", models(kind), tmp_path, "--precision", "bf16")
    randomise(model)
    with common.autocast(run):
        grads = gradients(model, batch_of(kind))
    layers = common.adapters(model).values()
    assert all(layer.base.weight.dtype == torch.bfloat16 and layer.A.dtype == torch.float32 for layer in layers)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() and grad.any() for grad in grads.values())
