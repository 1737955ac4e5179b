"""QLoRA: NF4 bit for bit against bitsandbytes and brute force, then the layer against a plain LoRA on what 4 bits leave."""

import gc
from pathlib import Path

import pytest
import torch
from conftest import oracle
from test_adapters import (
    HEADS, KINDS, PAD, batch_of, close, four_bit, gradients, models, quantise_blocks, quick, randomise, start, toy_data,
)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

import common
import qlora

FIXTURES = (models, quick)  # in force here, too
MINILM = Path(__file__).parents[1] / "models" / "all-MiniLM-L6-v2"
BLOCK_LINEARS = {"distilbert": 2 * 6, "bert": 2 * 6, "gpt2": 2 * 4, "llama": 2 * 7}


def bnb():
    oracle("bitsandbytes")
    return qlora.bitsandbytes()


def weights_like_real_ones():
    """Random weights: Gaussian, heavy tails, tiny, with zero blocks and outliers, and sizes that fill no block."""
    torch.manual_seed(0)
    heavy = torch.distributions.StudentT(3.0).sample((384, 384)) * 0.04
    zeros = torch.randn(64, 64)
    zeros[3:9] = 0
    outliers = torch.randn(96, 80) * 0.03
    outliers[torch.rand_like(outliers) < 0.002] *= 50
    return {"gaussian": torch.randn(384, 384) * 0.05, "heavy tails": heavy, "tiny": torch.randn(128, 64) * 1e-7,
            "zero blocks": zeros, "outliers": outliers, "one sign": torch.rand(40, 48) + 0.1, "7x30": torch.randn(7, 30),
            "5x13": torch.randn(5, 13), "65x129": torch.randn(65, 129), "2x64": torch.randn(2, 64)}


# ------------------------------------------------------------------------------------------------ the format


def test_codebook_follows_the_generator():
    """Quantiles of a normal distribution: 8 positive, 7 negative, and zero, over the largest (papers-facts §3)."""
    positive = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    table = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    close(qlora.NF4.double(), table / table.max(), 1e-6)
    assert len(table) == 16 and qlora.NF4[7] == 0


def test_tables_equal_bitsandbytes():
    assert torch.equal(qlora.NF4, bnb().get_4bit_type("nf4", device="cpu"))
    close(qlora.DYNAMIC, bnb().create_dynamic_map(signed=True), 1e-7)
    assert len(qlora.DYNAMIC) == 256 and (qlora.DYNAMIC.diff() > 0).all()


def test_nearest_is_nearest_and_a_tie_goes_down():
    values = torch.linspace(-1.2, 1.2, 4001)
    for table in (qlora.NF4, qlora.DYNAMIC):
        distances = (values[:, None].double() - table.double()).abs()
        chosen = distances.gather(1, qlora.nearest(values, table).long()[:, None])[:, 0]
        close(chosen, distances.min(1).values, 1e-7)
    middles = (qlora.NF4[:-1] + qlora.NF4[1:]) / 2
    assert qlora.nearest(middles, qlora.NF4).tolist() == list(range(15))
    assert qlora.nearest(middles.nextafter(torch.tensor(2.0)), qlora.NF4).tolist() == list(range(1, 16))


def test_first_weight_is_in_the_high_bits():
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([-1.0, 1.0, 0.0, 1.0])
    packed, absmax = qlora.quantise(weight)
    assert packed[:2].tolist() == [0x0F, 0x7F] and absmax.tolist() == [1.0]


@pytest.mark.parametrize("name", weights_like_real_ones())
def test_round_trip_by_brute_force(name):
    """Block by block, value by value: each becomes absmax times its nearest code; the largest of a block is kept exactly."""
    weight = weights_like_real_ones()[name][:24]
    packed, absmax = qlora.quantise(weight)
    restored = qlora.dequantise(packed, absmax, weight.shape)
    assert packed.dtype == torch.uint8 and len(packed) == -(-weight.numel() // 2) and len(absmax) == -(-weight.numel() // 64)
    for block, back in zip(weight.flatten().split(64), restored.flatten().split(64), strict=True):
        largest = block.abs().max()
        best = (block[:, None].double() - largest.double() * qlora.NF4.double()).abs().min(1).values
        assert ((block - back).abs() <= best + 1e-6 * largest).all()
        assert back.abs().max() == largest


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", weights_like_real_ones())
def test_bytes_equal_bitsandbytes(name, double_quant):
    check_bytes(weights_like_real_ones()[name], double_quant)


@pytest.mark.skipif(not MINILM.is_dir(), reason="no models/all-MiniLM-L6-v2 here")
def test_bytes_equal_bitsandbytes_on_minilm():
    from safetensors import safe_open
    with safe_open(MINILM / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".layer.1." in name and file.get_slice(name).get_shape()[1:]]
        weights = [file.get_tensor(name) for name in names]
    assert len(weights) == 6
    differing = [check_bytes(weight.float(), True) for weight in weights]
    assert sum(differing) <= 0.005 * sum(weight.numel() / 64 for weight in weights)


def check_bytes(weight, double_quant):
    """Our bytes against bitsandbytes'; returns how many of the 8-bit scale codes differ.

    Where they differ ours is the nearer one: their kernel's search is not exact. By one step, but more within 1e-5 of zero,
    where the map's steps are that small.
    """
    packed, state = bnb().quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    ours, absmax = qlora.quantise(weight)
    assert torch.equal(ours, packed.flatten())
    if not double_quant:
        assert torch.equal(absmax, state.absmax)
        if weight.numel() % 2 == 0:  # else it compiles a kernel for half a minute
            state.shape = torch.Size([1, weight.numel()])  # its CPU kernel is wrong where rows are not whole blocks
            theirs = bnb().dequantize_4bit(packed.view(-1, 1), state).view(weight.shape)
            assert torch.equal(qlora.dequantise(ours, absmax, weight.shape), theirs)
        return 0
    codes, absmax2, offset = qlora.quantise_scales(absmax)
    assert torch.equal(offset, state.offset) and torch.equal(absmax2, state.state2.absmax)
    exact = (absmax - offset) / absmax2.repeat_interleave(256)[:len(absmax)]
    differ = codes != state.absmax
    off, their_off = ((qlora.DYNAMIC[each.long()] - exact).abs() for each in (codes, state.absmax))
    assert ((off <= their_off + 1e-7) & (their_off - off < 5e-5)).all()
    assert ((codes.int() - state.absmax.int()).abs() <= torch.where(exact.abs() < 1e-5, 4, 1)).all()
    assert differ.sum() <= max(1, 0.005 * len(differ))
    scales = bnb().dequantize_blockwise(state.absmax, state.state2) + state.offset
    close(qlora.dequantise_scales(state.absmax, absmax2, offset), scales, 1e-7)
    return int(differ.sum())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(96, 64), (40, 48), (33, 10), (130, 250)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_backends_read_the_same_bytes_alike(shape, double_quant, dtype):
    """Also where a row is not a whole number of blocks."""
    torch.manual_seed(0)
    base = nn.Linear(shape[1], shape[0])
    by_torch = qlora.NF4Linear(base, double_quant, "torch")
    bnb()
    by_bnb = qlora.NF4Linear(base, double_quant, "bitsandbytes")
    assert [(name, tensor.shape, tensor.dtype) for name, tensor in by_torch.named_buffers()] == [
        (name, tensor.shape, tensor.dtype) for name, tensor in by_bnb.named_buffers()]
    for name, tensor in by_torch.named_buffers():
        getattr(by_bnb, name).copy_(tensor)
    assert by_bnb.dequantised(dtype).shape == shape and by_bnb.dequantised(dtype).dtype == dtype
    assert torch.equal(by_torch.dequantised(dtype), by_bnb.dequantised(dtype))
    x = torch.randn(5, shape[1], dtype=dtype)
    assert torch.equal(by_torch(x), by_bnb(x))


def test_error_on_gaussian_weights_is_the_known_one():
    """9.2 % relative RMS, and 8.8 % of the weights become exactly zero (papers-facts §3); double quantisation adds little."""
    torch.manual_seed(0)
    weight = torch.randn(1024, 256)
    packed, absmax = qlora.quantise(weight)
    single = qlora.dequantise(packed, absmax, weight.shape)
    double = four_bit(weight)
    errors = [((restored - weight).norm() / weight.norm()).item() for restored in (single, double)]
    assert errors[0] == pytest.approx(0.092, abs=0.002) and errors[1] == pytest.approx(errors[0], abs=0.001)
    assert (single == 0).float().mean().item() == pytest.approx(0.088, abs=0.004)


# ------------------------------------------------------------------------------------------------ the layer


def qlora_layer(kind="linear", out_features=96, in_features=64, backend="torch"):
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features) if kind == "linear" else Conv1D(out_features, in_features)
    base.requires_grad_(False).weight.normal_(0, 0.1)
    layer = qlora.QLoRALinear(qlora.NF4Linear(base, True, backend), 4, 8, 0.0)
    nn.init.normal_(layer.B, std=0.1)
    return layer, base


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_conv1d_is_quantised_along_its_rows(kind):
    """Blocks run along the rows of (out, in), whichever way round the layer stores its weight."""
    layer, base = qlora_layer(kind)
    weight = base.weight if kind == "linear" else base.weight.T
    assert torch.equal(layer.base.weight, four_bit(weight.contiguous()))
    close(layer.merged_weight(), layer.base.weight + 2 * layer.B @ layer.A, 1e-6)


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
def test_backward_keeps_no_dequantised_weight(backend):
    """Neither autograd nor any Python object holds a tensor of the weight's size between forward and backward."""
    if backend == "bitsandbytes":
        bnb()
    layer, _ = qlora_layer(out_features=112, in_features=80, backend=backend)
    saved, x = [], torch.randn(3, 7, 80, requires_grad=True)
    size = 112 * 80
    gc.collect()
    with saved_tensors_hooks(lambda tensor: saved.append((tensor.shape, tensor.dtype)) or tensor, lambda tensor: tensor):
        y = layer(x)
    assert any(shape.numel() == 4 * 80 for shape, _ in saved)  # A: the hook sees what is saved
    assert all(shape.numel() < size for shape, dtype in saved if dtype.is_floating_point)
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.is_floating_point() and o.numel() == size]
    assert alive == []
    y.sum().backward()
    close(x.grad, torch.ones(3, 7, 112) @ layer.merged_weight(), 1e-5)


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_autocast_on_cpu(kind, backend):
    """Products in bf16, gradients in fp32, and near the fp32 layer's numbers."""
    if backend == "bitsandbytes":
        bnb()
    (layer, _), (exact, _) = qlora_layer(kind, backend=backend), qlora_layer(kind)
    x = torch.randn(50, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    z = x.detach().requires_grad_(True)
    expected = exact(z)
    expected.square().sum().backward()
    for ours, theirs in ((x.grad, z.grad), (layer.A.grad, exact.A.grad), (layer.B.grad, exact.B.grad)):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.02 * theirs.norm()
    assert (y.float() - expected).norm() < 0.02 * expected.norm()


def test_input_without_gradient_costs_no_backward():
    """The first quantised layer's input needs none: the base branch must not be part of the graph."""
    layer, _ = qlora_layer()
    assert layer.base(torch.randn(3, 64)).grad_fn is None


# ------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_lora_on_the_dequantised_base(kind, backend, models, tmp_path):
    """Equal logits and equal gradients of A, B and head; the oracle's weights come from bitsandbytes where it quantised."""
    if backend == "bitsandbytes":
        bnb()
    model, run, _ = start("qlora", models(kind), tmp_path, "--nf4_backend", backend)
    twin, _, _ = start("lora", models(kind), tmp_path)
    randomise(model)
    randomise(twin)
    with torch.no_grad():
        for name in common.block_linears(twin):
            layer = twin.get_submodule(name)
            weight = common.weight_of(layer).contiguous()
            if backend == "bitsandbytes":  # its bytes and scales, but not its CPU kernel for 4 bits: see check_bytes
                packed, state = bnb().quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
                scales = bnb().dequantize_blockwise(state.absmax, state.state2) + state.offset
                weight = qlora.dequantise(packed.flatten(), scales, weight.shape)
            else:
                weight = four_bit(weight)
            common.weight_of(layer).copy_(weight)
    batch = batch_of(kind)
    close(common.forward(model, batch), common.forward(twin, batch), 1e-5)
    ours, theirs = gradients(model, batch), gradients(twin, batch)
    assert ours.keys() == theirs.keys() and all(grad.any() for grad in ours.values())
    for name, grad in ours.items():
        close(grad, theirs[name], 1e-5)


@pytest.mark.parametrize("kind", ["distilbert", "bert", "gpt2", "llama"])
def test_blocks_are_quantised_and_nothing_else(kind, models, tmp_path):
    """The known crash: a quantised head or pre_classifier. Embeddings, norms, biases and heads stay fp32."""
    model, run, method = start("qlora", models(kind), tmp_path)
    untouched, _, _ = start("lora", models(kind), tmp_path)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, qlora.NF4Linear)}
    assert len(layers) == BLOCK_LINEARS[kind] == method["info"]()["layers"]
    assert all(layer.packed.dtype == torch.uint8 for layer in layers.values())
    for name, module in model.named_modules():  # no fp32 weight is left in the blocks, and every other layer is as it was
        if isinstance(module, (nn.Linear, Conv1D)):
            assert module.weight.requires_grad or name == "bert.pooler.dense"
    for name, tensor in model.named_parameters():
        assert tensor.dtype == torch.float32
        adapter = name.endswith((".A", ".B"))
        assert tensor.requires_grad == (adapter or name in HEADS[kind, "", "classification"])
    quantised = sum(layer.shape.numel() for layer in layers.values())
    ours, theirs = (common.count_parameters(run, each) for each in (model, untouched))
    assert ours == theirs  # a 4-bit weight counts as the one that it stands for
    assert sum(tensor.numel() for tensor in model.parameters()) == ours["total"] - quantised == theirs["total"] - quantised


def test_distilberts_36_linears_take_20_9_mib():
    """Arithmetic over one layer of each real size: 22.8 MiB without double quantisation, 162 MiB in fp32."""
    square, wide = nn.Linear(768, 768, bias=False), nn.Linear(768, 3072, bias=False)
    for double_quant, expected in ((True, 20.89), (False, 22.78)):
        stored = [sum(tensor.nbytes for tensor in qlora.NF4Linear(layer, double_quant, "torch").buffers())
                  for layer in (square, wide)]
        assert (24 * stored[0] + 12 * stored[1]) / 2**20 == pytest.approx(expected, abs=0.005)
    assert 4 * (24 * square.weight.numel() + 12 * wide.weight.numel()) / 2**20 == pytest.approx(162.0, abs=0.05)


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
def test_no_double_quant_keeps_the_scales(backend, models, tmp_path):
    """4 + 32/64 bits a weight, and the numbers of single quantisation."""
    if backend == "bitsandbytes":
        bnb()
    model, _, method = start("qlora", models("distilbert"), tmp_path, "--no_double_quant", "--nf4_backend", backend)
    info = method["info"]()
    assert info["bytes_nf4"] == info["weights"] * 4.5 / 8 and not info["double_quant"]
    base, _, _ = start("lora", models("distilbert"), tmp_path)
    for name in common.block_linears(base):
        weight = common.weight_of(base.get_submodule(name))
        layer = model.get_submodule(name)
        layer = getattr(layer, "base", layer)
        assert torch.equal(layer.weight, qlora.dequantise(*qlora.quantise(weight), weight.shape))


def test_info_reports_bytes(models, tmp_path):
    """What the layers hold, against what they would hold in 16 and 32 bits."""
    model, _, method = start("qlora", models("distilbert"), tmp_path)
    layers = [module for module in model.modules() if isinstance(module, qlora.NF4Linear)]
    info = method["info"]()
    weights = [layer.shape.numel() for layer in layers]
    assert info["weights"] == sum(weights) and info["bytes_fp32"] == 2 * info["bytes_bf16"] == 4 * sum(weights)
    # packed, a byte for each 64, and for each tensor fp32 scales of 256 blocks and one offset
    assert info["bytes_nf4"] == sum(n / 2 + n / 64 + 4 * -(-n // (64 * 256)) + 4 for n in weights)
    assert info["compute_dtype"] == "fp32" and info["backend"] == "torch" and info["double_quant"]


def test_paged_on_a_cpu_says_so_and_goes_on(models, tmp_path, capsys):
    model, run, method = start("qlora", models("distilbert"), tmp_path, "--paged", "--max_steps", 1)
    assert len([line for line in capsys.readouterr().out.splitlines() if "--paged needs CUDA" in line]) == 1
    assert "optimizer" not in method
    assert common.train(model, toy_data("distilbert"), run, method).step == 1


def test_auto_falls_back_to_torch(models, tmp_path, monkeypatch):
    def missing():
        raise ImportError("No module named 'bitsandbytes'")
    monkeypatch.setattr(qlora, "bitsandbytes", missing)
    model, _, method = start("qlora", models("distilbert"), tmp_path, "--nf4_backend", "auto")
    assert method["info"]()["backend"] == "torch"
    with torch.no_grad():
        assert common.forward(model, batch_of("distilbert")).isfinite().all()


def test_missing_bitsandbytes_is_one_line_when_asked_for(models, tmp_path, monkeypatch, capsys):
    def missing():
        raise ImportError("No module named 'bitsandbytes'")
    monkeypatch.setattr(qlora, "bitsandbytes", missing)
    with pytest.raises(SystemExit) as stop:
        start("qlora", models("distilbert"), tmp_path, "--nf4_backend", "bitsandbytes")
    assert stop.value.code == 2 and "--nf4_backend" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_model_in_bf16_trains(kind, models, tmp_path):
    """Quantised from the fp32 weights or their bf16 rounding; embeddings in bf16, adapter, norms and head in fp32."""
    model, run, method = start("qlora", models(kind), tmp_path, "--precision", "bf16")
    randomise(model)
    with common.autocast(run):
        grads = gradients(model, batch_of(kind))
    assert method["info"]()["compute_dtype"] == "bf16" and PAD[kind] == model.config.pad_token_id
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in model.parameters() if tensor.requires_grad or tensor.ndim == 1)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() and grad.any() for grad in grads.values())


def test_merging_goes_onto_the_dequantised_weight(models, tmp_path):
    """Not onto the weight before quantising, and in fp32."""
    model, _, _ = start("qlora", models("distilbert"), tmp_path)
    base, _, _ = start("lora", models("distilbert"), tmp_path)
    quantise_blocks(base)
    randomise(model)
    weights = {name.removesuffix(".base"): base.get_submodule(name).weight for name in common.block_linears(base)}
    updates = {name: 2 * module.B @ module.A for name, module in common.adapters(model).items() if module.keys}
    assert len(weights) == 12 and len(updates) == 4
    with common.plain(model, True, torch.float32):
        for name, weight in weights.items():
            close(model.get_submodule(name).weight, weight + updates.get(name, 0), 1e-6)
