"""QLoRA: the frozen base is stored in 4 bits and dequantised for each product; LoRA on top stays in full precision.

Paper: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, equations 5 and 6.

    y = dequantise(W_nf4)·x + b + (α/r)·B·A·x        A: (r, in)   B: (out, r)   W_nf4, b frozen

    python qlora.py --dataset imdb

Every linear layer inside the encoder or decoder blocks is quantised; embeddings, norms, biases and heads are not. A
weight takes 4 bits, and its share of a scale: one number for 64 weights, itself stored in 8 bits (double quantisation),
together 4.127 bits. This saves memory, never arithmetic: each product first rebuilds its weight, twice per step.

Where this departs from the paper: LoRA sits on --targets (query and value by default, as in the other scripts, so that
parameters are equal) where the paper adapts every linear layer; its 8-bit "FP8" is the authors' own dynamic map; the
optimizer is plain AdamW unless --paged. A paged optimizer moves its state to CPU memory when the GPU's runs out, but
bitsandbytes pages tensors of 100,000 numbers or more only: A and B of a layer 768 wide from rank 131 on, 4096 wide from
rank 25.
"""

import functools
import logging
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    adapter_args, block_linears, compute_dtype, evaluate, fail, first_line, load_adapter, load_base, load_data, measure,
    parse_args, positive, replace, runs, save_result, say, share, train, weight_of,
)


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    parser.add_argument("--alpha", type=positive, help="the update is scaled by alpha/rank (default: 2·rank, so by 2)")
    parser.add_argument("--dropout", type=share, default=0.0,
                        help="dropout on the adapter's input; 0 because the base already has dropout of its own")
    parser.add_argument("--no_double_quant", action="store_true",
                        help="keep the scales of the 4-bit blocks in fp32: 4.5 instead of 4.127 bits a weight")
    parser.add_argument("--paged", action="store_true",
                        help="bitsandbytes' paged AdamW, CUDA only; it pages tensors of 100,000 numbers or more: A and B of a "
                             "layer 768 wide from rank 131 on")
    parser.add_argument("--nf4_backend", choices=["auto", "bitsandbytes", "torch"], default="auto",
                        help="who packs and unpacks: the same numbers, bitsandbytes is faster (auto: where it is installed)")


# ------------------------------------------------------------------------------------------------ the maths

# The 16 values of NormalFloat: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (section 3).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
# What a byte stands for: its high four bits are the first weight, its low four the second. (256, 2)
PAIRS = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], dim=1)


def dynamic_map():
    """The 256 values of bitsandbytes' signed dynamic 8-bit type: decades from 1e-6 to 1, each split finer than the last."""
    bins = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    positive = torch.cat([10.0**(i - 6) * (edges[:-1] + edges[1:]) / 2 for i, edges in enumerate(bins)])
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


DYNAMIC = dynamic_map()


def nearest(values, table):
    """Index of the nearest entry of a sorted table; a value midway between two goes to the lower one."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def blocks_of(values, size):
    """values (n,) -> (blocks, size), the last block filled up with zeros."""
    return F.pad(values, (0, -len(values) % size)).view(-1, size)


def quantise(weight):
    """NF4 (sections 2 and 3): weight (out, in) -> packed (out·in/2,) uint8 and absmax (out·in/64,) fp32.

    64 neighbouring weights share one scale, their largest magnitude; each becomes the nearest of the 16 values.
    """
    blocks = blocks_of(weight.float().flatten(), 64)
    absmax = blocks.abs().amax(1)
    codes = nearest(blocks * (1 / absmax.clamp(min=1e-38))[:, None], NF4).flatten()
    return (codes[::2] << 4 | codes[1::2])[:(weight.numel() + 1) // 2], absmax


def quantise_scales(absmax):
    """Double quantisation (section 3): absmax (n,) -> codes (n,) uint8, absmax2 (n/256,) fp32, offset () fp32.

    The scales are all positive, so their mean is taken off before 256 at a time are stored in 8 bits.
    """
    offset = absmax.mean()
    blocks = blocks_of(absmax - offset, 256)
    absmax2 = blocks.abs().amax(1)
    return nearest(blocks / absmax2.clamp(min=1e-38)[:, None], DYNAMIC).flatten()[:len(absmax)], absmax2, offset


@functools.cache
def tables(device):
    """(PAIRS, DYNAMIC) on `device`, copied there once: a GPU would wait for every copy from the host."""
    return PAIRS.to(device), DYNAMIC.to(device)


def dequantise_scales(codes, absmax2, offset):
    """The inverse of quantise_scales, up to rounding: (n,) fp32."""
    scales = blocks_of(F.embedding(codes.int(), tables(codes.device)[1][:, None])[:, 0], 256) * absmax2[:, None]
    return scales.flatten()[:len(codes)] + offset


def dequantise(packed, absmax, shape):
    """The inverse of quantise, up to rounding: weight of `shape` (out, in), fp32."""
    values = F.embedding(packed.int(), tables(packed.device)[0]).flatten()
    return (blocks_of(values, 64) * absmax[:, None]).flatten()[:math.prod(shape)].view(shape)


class NF4Product(torch.autograd.Function):
    """y = W·x + b of a 4-bit layer (equation 5). The backward pass rebuilds W instead of keeping it: dx = δ·W."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        x = x.to(compute_dtype(x))
        return F.linear(x, layer.dequantised(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantised(grad.dtype), None


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is kept in 4 bits."""

    keys = {}  # nothing trained

    def __init__(self, layer, double_quant, backend):
        super().__init__()
        self.shape, self.bias, self.backend = weight_of(layer).shape, layer.bias, backend
        # As whole blocks of 64: bitsandbytes' CPU kernel goes wrong where a row ends within a block.
        blocks = blocks_of(weight_of(layer).detach().float().flatten(), 64)
        if backend == "torch":
            packed, absmax = quantise(blocks)
            scales = quantise_scales(absmax) if double_quant else (absmax,)
        else:
            packed, state = bitsandbytes().quantize_4bit(
                blocks, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
            scales = (state.absmax, state.state2.absmax, state.offset) if double_quant else (state.absmax,)
        self.register_buffer("packed", packed.flatten(), persistent=False)
        for name, tensor in zip(("scales", "absmax2", "offset"), scales, strict=False):
            self.register_buffer(name, tensor, persistent=False)
        self.double_quant = double_quant

    def forward(self, x):
        return NF4Product.apply(x, self)

    def dequantised(self, dtype):
        """The weight (out, in) that the 4 bits stand for."""
        if self.backend == "torch":
            absmax = dequantise_scales(self.scales, self.absmax2, self.offset) if self.double_quant else self.scales
            return dequantise(self.packed, absmax, self.shape).to(dtype)
        ops, absmax = torch.ops.bitsandbytes, self.scales
        if self.double_quant:
            absmax = ops.dequantize_blockwise(absmax, self.absmax2, tables(absmax.device)[1], 256, torch.float32) + self.offset
        blocks = ops.dequantize_4bit(self.packed[:, None], absmax, 64, "nf4", (len(absmax), 64), dtype)
        return blocks.flatten()[:self.shape.numel()].view(self.shape)

    @property
    def weight(self):
        return self.dequantised(torch.float32)

    def merged_weight(self):
        """What the layer computes with, in fp32, (out, in)."""
        return self.weight


def bitsandbytes():
    """bitsandbytes' functions and torch.ops.bitsandbytes, imported at first use: it takes seconds."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional
    return bitsandbytes.functional


def lora_update(x, A, B, scale):
    """The low-rank update scale·B·A·x, through the r-wide middle: x (..., in), A (r, in), B (out, r) -> (..., out)."""
    return F.linear(F.linear(x, A) * scale, B)  # scaled where the tensor is narrowest


class QLoRALinear(nn.Module):
    """A 4-bit linear layer `base` with a trained update beside it (paper, equation 5)."""

    keys = {"A": "lora_A.weight", "B": "lora_B.weight"}  # parameter -> its name in PEFT's file

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        out_features, in_features = base.shape
        self.base = base
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # uniform in ±1/√in
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.base(x) + lora_update(self.dropout(x), self.A, self.B, self.scale)

    def merged_weight(self):
        """The dequantised weight + (α/r)·B·A in fp32, (out, in): what training saw, not the weight before quantising."""
        return self.base.weight + self.scale * self.B @ self.A


# ------------------------------------------------------------------------------------------------ the method


def adapt(model, run):
    """Quantise the blocks of `model` and put a LoRA beside every target, in place, still on the CPU.

    Returns what common.py needs to know of it.
    """
    alpha, backend = run.alpha or 2 * run.rank, run.nf4_backend
    if backend != "torch":
        try:
            bitsandbytes()
            backend = "bitsandbytes"
        except (ImportError, RuntimeError, OSError) as error:
            if run.nf4_backend == "bitsandbytes":
                fail(f"--nf4_backend bitsandbytes: cannot be imported ({first_line(error)}); pip install bitsandbytes, or "
                     "--nf4_backend torch")
            backend = "torch"

    def quantised(layer):
        return NF4Linear(layer, not run.no_double_quant, backend)
    names = block_linears(model)
    weights = sum(weight_of(model.get_submodule(name)).numel() for name in names)
    adapted = replace(model, run.targets, lambda layer: QLoRALinear(quantised(layer), run.rank, alpha, run.dropout))
    for name in sorted(set(names) - set(adapted)):
        model.set_submodule(name, quantised(model.get_submodule(name)))

    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    stored = sum(tensor.nbytes for layer in layers for tensor in layer.buffers())
    compute = "bf16" if run.precision == "bf16" else "fp32"
    say(f"{len(layers)} linear layers in NF4 by {backend}, computing in {compute}: {stored / 2**20:.1f} MiB, "
        f"{weights * 2 / 2**20:.1f} in bf16, {weights * 4 / 2**20:.1f} in fp32")
    info = {"backend": backend, "compute_dtype": compute, "double_quant": not run.no_double_quant, "layers": len(layers),
            "weights": weights, "bytes_nf4": stored, "bytes_bf16": 2 * weights, "bytes_fp32": 4 * weights}
    method = {"peft": {"peft_type": "LORA", "r": run.rank, "lora_alpha": alpha, "lora_dropout": run.dropout},
              "stored": f":nf4{'-single' * run.no_double_quant}{'-bf16' * (run.precision == 'bf16')}", "info": lambda: info}
    info["paged"] = run.paged and "cuda" in run.device
    if info["paged"]:
        try:
            from bitsandbytes.optim import PagedAdamW32bit
            method["optimizer"] = PagedAdamW32bit
        except (ImportError, RuntimeError, OSError) as error:
            fail(f"--paged: bitsandbytes cannot be imported ({first_line(error)}); install it, or leave --paged out")
    elif run.paged:
        say("--paged needs CUDA; going on with plain AdamW, whose steps are the same")
    return method


def main(argv=None):
    """Adapt, train, score and measure the model once per seed; returns the paths of the result files."""
    args = parse_args(__doc__, __file__, add_args, argv)
    data, paths = None, []
    for run in runs(args):
        data = data or load_data(run)
        model = load_base(run, data)
        method = adapt(model, run)
        if run.eval_only:
            load_adapter(model, data, run, method)
            evaluate(model, data, run)
            continue
        history = train(model, data, run, method)
        metrics = evaluate(model, data, run)
        costs = measure(model, data, run, history)
        paths.append(save_result(model, data, run, method, history, metrics, costs))
    return paths


if __name__ == "__main__":
    main()
