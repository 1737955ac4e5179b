"""QLoRA: the base is stored in 4 bits and dequantised for each product; LoRA on top stays fp32.

Paper: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.

    y = dequantise(W)·x + b + (α/r)·B·A·x    A: (r, in)  B: (out, r)  W, b frozen  (equation 5)

    python qlora.py --dataset imdb

Every linear layer inside the encoder or decoder blocks is quantised; embeddings, norms, biases and
heads are not. A weight takes 4 bits, and its share of a scale: one number for 64 weights, itself
stored in 8 bits (double quantisation), together 4.127 bits. This saves memory, never arithmetic:
each product first rebuilds its weight, twice a step.

Departures from the paper: LoRA sits on --targets (query and value, as in the other scripts, so that
parameters are equal) where the paper adapts every linear layer; its 8-bit "FP8" is the authors' own
dynamic map; the optimizer is plain AdamW unless --paged. A paged optimizer moves its state to CPU
memory when the GPU's runs out, but bitsandbytes pages tensors of 100,000 numbers or more only: A
and B of a layer 768 wide from rank 131 on, 4096 wide from rank 25.
"""

import functools
import logging
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import evaluate, load_base, load_data, measure, replace, train
from harness.export import export
from harness.flags import adapter_args, parse_args, positive, runs, share
from harness.models import block_linears, find_targets, weight_of
from harness.process import fail, first_line, say
from harness.store import load_adapter, save_result
from plan import plan


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    parser.add_argument("--alpha", type=positive, default=16.0, help="alpha/rank scales the update")
    parser.add_argument("--dropout", type=share, default=0.0, help="on the adapter's input")
    nf4_args(parser)


def nf4_args(parser):
    """Add the flags of the 4-bit base."""
    add = parser.add_argument
    double = "keep the scales of the 4-bit blocks in fp32: 4.5 instead of 4.127 bits a weight"
    add("--no_double_quant", action="store_true", help=double)
    add("--paged", action="store_true", help="bitsandbytes' paged AdamW, CUDA only")
    add(
        "--nf4_backend",
        choices=["auto", "bitsandbytes", "torch"],
        default="auto",
        help="who packs and unpacks. The 4-bit codes are the same; of the 8-bit scales about 2 in "
        "1,000 differ by a step (ours is the nearer one). auto: bitsandbytes where installed",
    )


# -------------------------------------------------------------------------------------- the maths

# NormalFloat: quantiles of a normal distribution scaled to [-1, 1], with an exact zero (section 3).
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
# What a byte stands for: its high four bits are the first weight, its low four the second. (256, 2)
PAIRS = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], dim=1)


def dynamic_map():
    """The 256 values of bitsandbytes' signed dynamic 8-bit type.

    Decades from 1e-6 to 1, each split finer than the last.
    """
    bins = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    positive = torch.cat(
        [10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2 for i, edges in enumerate(bins)]
    )
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


DYNAMIC = dynamic_map()


def nearest(values, table):
    """Index of the nearest entry of a sorted table; midway between two it is the lower one."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def blocks_of(values, size):
    """values (n,) -> (blocks, size), the last block filled up with zeros."""
    return F.pad(values, (0, -len(values) % size)).view(-1, size)


def quantise(weight):
    """NF4 (sections 2, 3): weight (out, in) -> packed (out·in/2,) uint8, absmax (out·in/64,) fp32.

    64 neighbouring weights share one scale, their largest magnitude; each becomes the nearest of
    the 16 values.
    """
    blocks = blocks_of(weight.float().flatten(), 64)
    absmax = blocks.abs().amax(1)
    table, inverse = tables(absmax.device)[2], 1 / absmax.clamp(min=1e-38)
    codes = nearest(blocks * inverse[:, None], table).flatten()
    return (codes[::2] << 4 | codes[1::2])[: (weight.numel() + 1) // 2], absmax


def quantise_scales(absmax):
    """Double quantisation (section 3): absmax (n,) -> codes (n,), absmax2 (n/256,), offset ().

    The scales are all positive: their mean is taken off before 256 at a time take 8 bits each.
    """
    table, offset = tables(absmax.device)[1], absmax.mean()
    blocks = blocks_of(absmax - offset, 256)
    absmax2 = blocks.abs().amax(1)
    return (
        nearest(blocks / absmax2.clamp(min=1e-38)[:, None], table).flatten()[: len(absmax)],
        absmax2,
        offset,
    )


@functools.cache
def tables(device):
    """(PAIRS, DYNAMIC, NF4) on `device`, copied there once: a GPU would wait for every copy."""
    return PAIRS.to(device), DYNAMIC.to(device), NF4.to(device)


def dequantise_scales(codes, absmax2, offset):
    """The inverse of quantise_scales, up to rounding: (n,) fp32."""
    scales = F.embedding(codes.int(), tables(codes.device)[1][:, None])[:, 0]
    return (blocks_of(scales, 256) * absmax2[:, None]).flatten()[: len(codes)] + offset


def dequantise(packed, absmax, shape):
    """The inverse of quantise, up to rounding: weight of `shape` (out, in), fp32."""
    values = F.embedding(packed.int(), tables(packed.device)[0]).flatten()
    return (blocks_of(values, 64) * absmax[:, None]).flatten()[: math.prod(shape)].view(shape)


def compute_dtype(x):
    """The dtype that products with x are computed in: autocast's inside autocast, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class NF4Product(torch.autograd.Function):
    """y = W·x + b of a 4-bit layer. The backward pass rebuilds W, it is not kept: dx = δ·W."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        x = x.to(compute_dtype(x))
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dequantised(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantised(grad.dtype), None


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is kept in 4 bits."""

    keys = {}  # nothing trained

    def __init__(self, layer, double_quant, backend, device="cpu"):
        super().__init__()
        self.shape, self.bias, self.backend = weight_of(layer).shape, layer.bias, backend
        # As whole blocks of 64: bitsandbytes' CPU kernel errs where a row ends within a block.
        blocks = blocks_of(weight_of(layer).detach().to(device).float().flatten(), 64)
        if backend == "torch":
            packed, absmax = quantise(blocks)
            scales = quantise_scales(absmax) if double_quant else (absmax,)
        else:
            packed, state = bitsandbytes().quantize_4bit(
                blocks, blocksize=64, quant_type="nf4", compress_statistics=double_quant
            )
            scales = (
                (state.absmax, state.state2.absmax, state.offset)
                if double_quant
                else (state.absmax,)
            )
        self.register_buffer("packed", packed.flatten(), persistent=False)
        for name, tensor in zip(("scales", "absmax2", "offset"), scales, strict=False):
            self.register_buffer(name, tensor, persistent=False)
        self.double_quant = double_quant

    def forward(self, x):
        y = NF4Product.apply(x.flatten(0, -2), self)  # no view: models may change it in place
        return y.unflatten(0, x.shape[:-1])

    def dequantised(self, dtype):
        """The weight (out, in) that the 4 bits stand for."""
        if self.backend == "torch":
            absmax = self.scales
            if self.double_quant:
                absmax = dequantise_scales(absmax, self.absmax2, self.offset)
            return dequantise(self.packed, absmax, self.shape).to(dtype)
        ops, absmax = torch.ops.bitsandbytes, self.scales
        if self.double_quant:
            table = tables(absmax.device)[1]
            absmax = ops.dequantize_blockwise(absmax, self.absmax2, table, 256, torch.float32)
            absmax = absmax + self.offset
        blocks = ops.dequantize_4bit(
            self.packed[:, None], absmax, 64, "nf4", (len(absmax), 64), dtype
        )
        return blocks.flatten()[: self.shape.numel()].view(self.shape)

    @property
    def weight(self):
        return self.dequantised(torch.float32)

    def merged_weight(self):
        """What the layer computes with, in fp32, (out, in)."""
        return self.weight


def bitsandbytes():
    """bitsandbytes' functions, and torch.ops.bitsandbytes with them; the import takes seconds."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


def lora_update(x, A, B, scale):
    """scale·B·A·x, through the r-wide middle: x (..., in), A (r, in), B (out, r) -> (..., out)."""
    return F.linear(F.linear(x, A) * scale, B)  # scaled where the tensor is narrowest


class QLoRALinear(nn.Module):
    """A 4-bit linear layer `base` with a trained update beside it (equation 5)."""

    keys = {"A": "lora_A.weight", "B": "lora_B.weight"}  # parameter -> its name in PEFT's file

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        out_features, in_features = weight_of(base).shape
        self.base = base
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # uniform in ±1/√in
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.base(x) + lora_update(self.dropout(x), self.A, self.B, self.scale)

    @property
    def weight(self):  # some models look at a layer's weight, T5 for its dtype
        return self.base.weight

    def merged_weight(self):
        """Dequantised W + (α/r)·B·A in fp32, (out, in): what training saw."""
        return weight_of(self.base).float() + self.scale * self.B @ self.A


# ------------------------------------------------------------------------------------- the method


def find_backend(wanted):
    """Who packs and unpacks: "bitsandbytes" where wanted and importable, else "torch"."""
    if wanted == "torch":
        return "torch"
    try:
        bitsandbytes()
        return "bitsandbytes"
    except (ImportError, RuntimeError, OSError) as error:
        if wanted == "bitsandbytes":
            fail(f"--nf4_backend bitsandbytes: pip install bitsandbytes ({first_line(error)})")
        return "torch"


def quantise_blocks(base, run):
    """Put every linear layer inside base.model's blocks into 4 bits, one by one, in place.

    Returns the part of a method's dict that is about the base.
    """
    model, backend = base.model, find_backend(run.nf4_backend)
    names, weights, stored = block_linears(model), 0, 0
    for name in names:
        layer = model.get_submodule(name)
        layer = NF4Linear(layer, not run.no_double_quant, backend, run.device)
        model.set_submodule(name, layer)
        weights += layer.shape.numel()
        stored += sum(tensor.nbytes for tensor in layer.buffers())
    mib, fp32 = stored / 2**20, weights * 4 / 2**20
    say(f"{len(names)} linear layers in NF4 by {backend}: {mib:.1f} MiB, {fp32:.1f} in fp32")
    # A mixture of experts keeps its experts as parameters of three dimensions, not as layers.
    other = sum(t.numel() for n, t in model.named_parameters() if t.ndim > 2 and n not in base.head)
    if other:
        share = 100 * other / (other + weights)
        say(f"not in NF4: {other:,} weights in no linear layer, {share:.0f} % of the blocks'")
    info = {
        "backend": backend,
        "double_quant": not run.no_double_quant,
        "layers": len(names),
        "weights": weights,
        "weights_not_quantised": other,
        "bytes_nf4": stored,
        "paged": run.paged and "cuda" in run.device,
    }
    method = {"info": lambda: info, "stored": ":nf4-single" if run.no_double_quant else ":nf4"}
    if info["paged"]:
        try:
            from bitsandbytes.optim import PagedAdamW32bit
        except (ImportError, RuntimeError, OSError) as error:
            fail(f"--paged: bitsandbytes cannot be imported ({first_line(error)}); leave it out")
        method["optimizer"] = PagedAdamW32bit
    elif run.paged:
        say("--paged needs CUDA; going on with plain AdamW, whose steps are the same")
    return method


def adapt(base, run):
    """Adapt every target layer of base.model, in place; returns what the experiment must know."""
    method, targets = quantise_blocks(base, run), find_targets(base.model, run.targets)
    replace(base.model, targets, lambda layer: QLoRALinear(layer, run.rank, run.alpha, run.dropout))
    peft = {"peft_type": "LORA", "target_modules": targets, "r": run.rank}
    peft |= {"lora_alpha": run.alpha, "lora_dropout": run.dropout}
    return method | {"peft": peft, "settings": {"targets": targets}}


def main(argv=None):
    """Adapt, train, score and measure once per seed and rate; returns the result files' paths."""
    args, paths = parse_args(__doc__, __file__, add_args, argv), []
    if args.plan:
        return plan(args, adapt)
    for run in runs(args):
        data = load_data(run)
        base = load_base(run, data)
        method = adapt(base, run)
        if run.eval_only:
            load_adapter(run, base, method)
            evaluate(base, data, run)
        else:
            history = train(base, data, run, method)
            scores = evaluate(base, data, run)
            save_result(base, data, run, method, history, scores)  # what follows cannot lose it
            costs = measure(base, data, run, method, history)
            paths.append(save_result(base, data, run, method, history, scores, costs))
        if run.export:
            export(run, base)
    return paths


if __name__ == "__main__":
    main()
