"""HiRA: a high-rank update from low-rank factors, by multiplying with the frozen weight element by element.

Paper: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR,
equation 6.

    y = (W0 ⊙ (1 + B·A))·x + b        A: (r, in)   B: (out, r)   W0, b frozen

    python hira.py --dataset sst2 --rank 8

Why the update is not low rank: with W0 = Σᵢ σᵢ·uᵢ·vᵢᵀ (r0 terms, its rank) and B·A = Σⱼ bⱼ·aⱼᵀ, the product W0 ⊙ B·A is
the sum of r0·r rank-one terms σᵢ·(uᵢ⊙bⱼ)(vᵢ⊙aⱼ)ᵀ. So r numbers per row and per column, as many as LoRA's, give an update
of rank up to r0·r, and never more than W0's smaller side. The price is a gradient as large as W0 in every backward pass,
three large products where LoRA has two. As in the authors' code nothing is divided by r and there is no α.

Where this departs from the paper: its A and B are named the other way round; the learning rate is 1e-2, not 1e-3 (a step
on W is multiplied by |W0|, a few hundredths, so it must be higher than LoRA's); --dropout is PEFT's, the authors' code has
none.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    adapter_args, compute_dtype, evaluate, load_adapter, load_base, load_data, measure, parse_args, replace, runs, save_result,
    share, train, weight_of,
)


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    parser.set_defaults(lr=1e-2)
    parser.add_argument("--dropout", type=share, default=0.0,
                        help="dropout on the update's input; above 0 it takes a second large product")


# ------------------------------------------------------------------------------------------------ the maths


class HadamardLinear(torch.autograd.Function):
    """y = (W0 ⊙ (1 + B·A))·x + b in one product, keeping x, A and B for the backward pass but not the dense product.

    x (..., in), W0 (out, in), bias (out,) or None, A (r, in), B (out, r) -> (..., out). With G = δᵀ·x and M = G ⊙ W0:
    dA = Bᵀ·M, dB = M·Aᵀ, dx = δ·(W0 ⊙ (1 + B·A)) (paper, section 4.7).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B):
        x = x.to(compute_dtype(x))
        ctx.save_for_backward(x, weight, A, B)
        return F.linear(x, high_rank_weight(weight, A, B), bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, A, B = (tensor.to(grad.dtype) for tensor in ctx.saved_tensors)
        dx = grad @ high_rank_weight(weight, A, B) if ctx.needs_input_grad[0] else None
        M = (grad.flatten(0, -2).T @ x.flatten(0, -2)).mul_(weight)
        return dx, None, None, B.T @ M, M @ A.T


def high_rank_weight(weight, A, B):
    """W0 ⊙ (1 + B·A), (out, in): weight (out, in), A (r, in), B (out, r)."""
    return torch.addcmul(weight, weight, B @ A)


def numerical_rank(matrix):
    """How many singular values exceed the largest one times max(shape) times fp32's rounding."""
    values = torch.linalg.svdvals(matrix.detach().float())
    return int((values > values.max() * max(matrix.shape) * torch.finfo(torch.float32).eps).sum())


class HiRALinear(nn.Module):
    """A frozen linear layer `base` whose weight is multiplied by 1 + B·A (paper, equation 6)."""

    keys = {"A": "hira_A", "B": "hira_B"}  # parameter -> its name in PEFT's file

    def __init__(self, base, rank, dropout):
        super().__init__()
        out_features, in_features = weight_of(base).shape
        self.base = base
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # uniform in ±1/√in
        self.dropout = dropout

    def forward(self, x):
        weight = weight_of(self.base)
        if self.training and self.dropout:  # the update's input differs from the base's: two products
            return self.base(x) + F.linear(F.dropout(x, self.dropout), weight * (self.B @ self.A))
        return HadamardLinear.apply(x, weight, self.base.bias, self.A, self.B)

    def merged_weight(self):
        """W0 ⊙ (1 + B·A) in fp32, (out, in). W0 itself is kept: unmerging by division would fail near 1 + B·A = 0."""
        return high_rank_weight(weight_of(self.base).float(), self.A, self.B)


# ------------------------------------------------------------------------------------------------ the method


def adapt(model, run):
    """Put a HiRA over every target layer of `model`, in place; returns what common.py needs to know of it."""
    names = replace(model, run.targets, lambda layer: HiRALinear(layer, run.rank, run.dropout))

    def info():
        layers = {name: model.get_submodule(name) for name in names}
        return {"rank_of_update": {name: numerical_rank(weight_of(layer.base) * (layer.B @ layer.A))
                                   for name, layer in layers.items()}}
    return {"peft": {"peft_type": "HIRA", "r": run.rank, "hira_dropout": run.dropout}, "info": info}


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
