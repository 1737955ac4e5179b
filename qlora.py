"""QLoRA: the base is stored in 4 bits and dequantized for each product; LoRA on top stays fp32.

Paper: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.

    y = dequantize(W)·x + b + (α/r)·B·A·x    A: (r, in)  B: (out, r)  W, b frozen  (equation 5)

    python qlora.py --dataset imdb

Every linear layer inside the encoder or decoder blocks is quantized; embeddings, norms, biases and
heads are not. A weight takes 4 bits, and its share of a scale: one number for 64 weights, itself
stored in 8 bits (double quantization), together 4.127 bits. This saves memory, never arithmetic:
each product first rebuilds its weight, twice a step.

Departures from the paper: LoRA sits on --targets (query and value, as in the other scripts, so that
parameters are equal) where the paper adapts every linear layer; its 8-bit "FP8" is the authors' own
dynamic map; the optimizer is plain AdamW unless --paged. A paged optimizer moves its state to CPU
memory when the GPU's runs out, but bitsandbytes pages tensors of 100,000 numbers or more only:
A and B from rank 131 on at a width of 768, from rank 25 on at 4096. The code below packs the
weights; bitsandbytes' kernel unpacks them faster than ours, with the same values (--nf4_kernel).
"""

import harness  # noqa: F401, I001 - first, so that Ctrl-C while importing prints one line
import functools
import logging
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import Method, evaluate, load_base, load_data, measure, replace, train
from harness import models
from harness.export import export
from harness.flags import adapter_args, parse_args, positive, runs
from harness.models import AdapterLayer, StandIn, compute_dtype, features, weight_of
from harness.process import choose_device, explain_out_of_memory, fail, join_process_group, say
from harness.store import load_adapter, save_result
from plan import plan


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    scaling = "The update is scaled by alpha/rank."
    parser.add_argument("--alpha", type=positive, default=16.0, help=scaling)
    nf4_args(parser)


def nf4_args(parser):
    """Add the flags of the 4-bit base."""
    add = parser.add_argument
    double = "Keep the 4-bit blocks' scales in fp32: 4.5 instead of 4.127 bits a weight."
    add("--no_double_quant", action="store_true", help=double)
    add("--paged", action="store_true", help="Use bitsandbytes' paged AdamW (CUDA only).")
    kernel = "What unpacks the weights; auto is bitsandbytes where installed: it is faster."
    add("--nf4_kernel", choices=["auto", "bitsandbytes", "torch"], default="auto", help=kernel)


# -------------------------------------------------------------------------------------- the maths

# NormalFloat: quantiles of a normal distribution scaled to [-1, 1], with an exact zero (section 3).
LEVELS = """-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
    -0.18477343022823334 -0.09105003625154495 0 0.07958029955625534 0.16093020141124725
    0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941
    0.7229568362236023 1"""
NF4 = torch.tensor([float(level) for level in LEVELS.split()])
# What a byte stands for: its high four bits are the first weight, its low four the second. (256, 2)
PAIRS = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], dim=1)


def dynamic_map():
    """bitsandbytes' signed 8-bit values: decades from 1e-6 to 1, each finer than the last."""
    bins = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    decades = [10.0 ** (i - 6) * (bin[:-1] + bin[1:]) / 2 for i, bin in enumerate(bins)]
    upper = torch.cat(decades)
    return torch.cat([-upper, upper, torch.tensor([0.0, 1.0])]).sort().values


DYNAMIC = dynamic_map()


def nearest(values, table):
    """Index of the nearest entry of a sorted table; midway between two it is the lower one."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def blocks_of(values, size):
    """values (n,) -> (blocks, size), the last block filled up with zeros."""
    return F.pad(values, (0, -len(values) % size)).view(-1, size)


def quantize(weight):
    """NF4 (sections 2, 3): weight (out, in) -> packed (out·in/2,) uint8, absmax (out·in/64,) fp32.

    64 neighboring weights share one scale, their largest magnitude; each becomes the nearest of
    the 16 values.
    """
    blocks = blocks_of(weight.float().flatten(), 64)
    absmax = blocks.abs().amax(1)
    table, inverse = tables(absmax.device)[2], 1 / absmax.clamp(min=1e-38)
    codes = nearest(blocks * inverse[:, None], table).flatten()
    return (codes[::2] << 4 | codes[1::2])[: (weight.numel() + 1) // 2], absmax


def quantize_scales(absmax):
    """Double quantization (section 3): absmax (n,) -> codes (n,), absmax2 (n/256,), offset ().

    The scales are all positive: their mean is subtracted, then groups of 256 get 8 bits each.
    """
    table, offset = tables(absmax.device)[1], absmax.mean()
    blocks = blocks_of(absmax - offset, 256)
    absmax2 = blocks.abs().amax(1)
    codes = nearest(blocks / absmax2.clamp(min=1e-38)[:, None], table).flatten()
    return codes[: len(absmax)], absmax2, offset


@functools.cache
def tables(device):
    """(PAIRS, DYNAMIC, NF4) on `device`, copied there once: a GPU would wait for every copy."""
    return PAIRS.to(device), DYNAMIC.to(device), NF4.to(device)


def dequantize_scales(codes, absmax2, offset):
    """The inverse of quantize_scales, up to rounding: (n,) fp32."""
    scales = F.embedding(codes.int(), tables(codes.device)[1][:, None])[:, 0]
    return (blocks_of(scales, 256) * absmax2[:, None]).flatten()[: len(codes)] + offset


def dequantize(packed, absmax, shape):
    """The inverse of quantize, up to rounding: weight of `shape` (out, in), fp32."""
    values = F.embedding(packed.int(), tables(packed.device)[0]).flatten()
    return (blocks_of(values, 64) * absmax[:, None]).flatten()[: math.prod(shape)].view(shape)


class NF4Product(torch.autograd.Function):
    """y = W·x + b of a 4-bit layer. The backward pass rebuilds W, it is not kept: dx = δ·W."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        x = x.to(compute_dtype(x))
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantized(grad.dtype), None


class NF4Linear(StandIn):
    """A frozen linear layer whose weight is kept in 4 bits."""

    def __init__(self, layer, double_quant, kernel, device="cpu"):
        super().__init__()
        self.in_features, self.out_features = features(layer)
        self.bias, self.kernel, self.double_quant = layer.bias, kernel, double_quant
        weight = weight_of(layer).detach().to(device).float()
        packed, absmax = quantize(blocks_of(weight.flatten(), 64))  # whole blocks, filled up
        scales = quantize_scales(absmax) if double_quant else (absmax,)
        self.register_buffer("packed", packed, persistent=False)
        for name, tensor in zip(("scales", "absmax2", "offset"), scales, strict=False):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x):
        y = NF4Product.apply(x.flatten(0, -2), self)  # outside: models may change a result in place
        return y.unflatten(0, x.shape[:-1])

    def dequantized(self, dtype):
        """The weight (out, in) that the 4 bits stand for."""
        shape = (self.out_features, self.in_features)
        if self.kernel == "bitsandbytes":
            return unpack_with_bitsandbytes(self, dtype)[: math.prod(shape)].view(shape)
        absmax = self.scales
        if self.double_quant:
            absmax = dequantize_scales(absmax, self.absmax2, self.offset)
        return dequantize(self.packed, absmax, shape).to(dtype)

    @property
    def weight(self):
        return self.dequantized(torch.float32)

    def merged_weight(self):
        """What the layer computes with, in fp32, (out, in)."""
        return self.weight


def unpack_with_bitsandbytes(layer, dtype):
    """The values of an NF4Linear by bitsandbytes' kernels, flat, zeros after the last weight.

    As rows of whole blocks of 64: the CPU kernel errs where a row ends within a block.
    """
    ops, absmax = torch.ops.bitsandbytes, layer.scales
    if layer.double_quant:
        table = tables(absmax.device)[1]
        absmax = ops.dequantize_blockwise(absmax, layer.absmax2, table, 256, torch.float32)
        absmax = absmax + layer.offset
    blocks = (len(absmax), 64)
    return ops.dequantize_4bit(layer.packed[:, None], absmax, 64, "nf4", blocks, dtype).flatten()


def lora_update(x, A, B, scale):
    """scale·B·A·x, through the r-wide middle: x (..., in), A (r, in), B (out, r) -> (..., out)."""
    return F.linear(F.linear(x, A) * scale, B)  # scaled in the middle, where it is cheapest


class QLoRALinear(AdapterLayer):
    """A 4-bit linear layer `base` with a trained update beside it (equation 5)."""

    keys = {"A": "lora_A.weight", "B": "lora_B.weight"}  # their names when saved, as in PEFT

    def __init__(self, base, rank, alpha, dropout):
        super().__init__(base)
        self.A = nn.Parameter(torch.empty(rank, self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # uniform in ±1/√in
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.base(x) + lora_update(self.dropout(x), self.A, self.B, self.scale)

    def merged_weight(self):
        """Dequantized W + (α/r)·B·A in fp32, (out, in): what training saw."""
        return weight_of(self.base).float() + self.scale * self.B @ self.A


# ------------------------------------------------------------------------------------- the method


def find_kernel(run):
    """What unpacks: "bitsandbytes" where --nf4_kernel allows it and it is installed, or "torch".

    --plan measures on tensors without values, which bitsandbytes' kernels cannot take.
    """
    if run.nf4_kernel == "torch" or run.plan:
        return "torch"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional  # noqa: F401 - registers torch.ops.bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        if run.nf4_kernel == "bitsandbytes":
            fail(f"--nf4_kernel bitsandbytes: pip install bitsandbytes ({error})")
        return "torch"
    return "bitsandbytes"


def find_optimizer(run):
    """The Method's field for bitsandbytes' paged AdamW, with --paged on a GPU; else {}."""
    if run.paged and "cuda" not in run.device:
        say("--paged needs CUDA; training with plain AdamW, whose steps are the same")
    if not run.paged or "cuda" not in run.device:
        return {}
    try:
        from bitsandbytes.optim import PagedAdamW32bit
    except (ImportError, RuntimeError, OSError) as error:
        fail(f"--paged: bitsandbytes cannot be imported; leave it out ({error})")

    class ResumedPagedAdamW(PagedAdamW32bit):
        """bitsandbytes 0.50 loads a checkpoint's state into ordinary GPU memory: page it again."""

        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            for parameter, state in self.state.items():
                for name in ("state1", "state2"):
                    paged = self.get_state_buffer(parameter, dtype=state[name].dtype)
                    state[name] = paged.copy_(state[name])

    return {"optimizer": ResumedPagedAdamW}


def quantize_blocks(run, base):
    """Put every linear layer inside the blocks into 4 bits, in place; returns a Method's fields."""
    model, kernel, double_quant = base.model, find_kernel(run), not run.no_double_quant
    names, weights, stored = models.block_linears(model), 0, 0
    with explain_out_of_memory(run, "a smaller --model"):
        for name in names:
            layer = NF4Linear(model.get_submodule(name), double_quant, kernel, run.device)
            model.set_submodule(name, layer)
            weights += layer.in_features * layer.out_features
            stored += sum(tensor.nbytes for tensor in layer.buffers())
    mib, fp32 = stored / 2**20, weights * 4 / 2**20
    say(f"{len(names)} linear layers in NF4: {mib:.1f} MiB, {fp32:.1f} in fp32; kernel: {kernel}")
    # A mixture of experts keeps its experts as parameters of three dimensions, not as layers.
    frozen = [t for n, t in model.named_parameters() if n not in base.head_names]
    other = sum(tensor.numel() for tensor in frozen if tensor.ndim > 2)
    if other:
        say(f"not in NF4: {other:,} weights outside linear layers beside {weights:,} inside")
    numbers = {"kernel": kernel, "double_quant": double_quant, "layers": len(names)}
    numbers |= {"weights": weights, "weights_not_quantized": other, "bytes_nf4": stored}
    numbers["paged"] = run.paged and "cuda" in run.device
    base_format = "nf4" if double_quant else "nf4-single"
    return {"base_format": base_format, "report": lambda: numbers, **find_optimizer(run)}


def adapt(run, base):
    """Adapt every target layer of base.model, in place; returns the Method."""
    quantized, targets = quantize_blocks(run, base), models.find_targets(base.model, run.targets)
    replace(run, base, targets, lambda layer: QLoRALinear(layer, run.rank, run.alpha, run.dropout))
    peft = {"peft_type": "LORA", "target_modules": targets, "r": run.rank}
    peft |= {"lora_alpha": run.alpha, "lora_dropout": run.dropout}
    return Method(peft, **quantized)


def main(argv=None):
    """Adapt, train, score and measure once per seed and learning rate; returns the result files."""
    args, paths = parse_args(__doc__, __file__, add_args, argv), []
    choose_device(args)
    join_process_group(args)
    if args.plan:
        return plan(args, adapt)
    for run in runs(args):
        data = load_data(run)
        base = load_base(run, data)
        method = adapt(run, base)
        if run.eval_only:
            load_adapter(run, base, method)
            evaluate(run, data, base)
        else:
            history = train(run, data, base, method)
            scores = evaluate(run, data, base)
            save_result(run, data, base, method, history, scores)  # measuring may be interrupted
            costs = measure(run, data, base, method, history)
            paths.append(save_result(run, data, base, method, history, scores, costs))
        if run.export:
            export(run, base)
    return paths


if __name__ == "__main__":
    main()
