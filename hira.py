"""HiRA: a high-rank update from low-rank factors, multiplied by the frozen weight entry by entry.

Paper: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation …", ICLR.

    y = (W0 ⊙ (1 + B·A))·x + b        A: (r, in)   B: (out, r)   W0, b frozen   (equation 6)

    python hira.py --dataset sst2 --rank 8

Why the update is not low rank: with W0 = Σᵢ σᵢ·uᵢ·vᵢᵀ (r0 terms) and B·A = Σⱼ bⱼ·aⱼᵀ, W0 ⊙ B·A is
the sum of r0·r rank-one terms σᵢ·(uᵢ⊙bⱼ)(vᵢ⊙aⱼ)ᵀ: from as many numbers as LoRA's an update of rank
up to r0·r. The price is a gradient as large as W0 in each backward pass: three large products where
LoRA has two. In bf16, or with --dropout, the update is a branch of its own: five.

Departures from the paper: its A and B are named the other way round; the learning rate is 2e-2, not
1e-3 (a step is multiplied by |W0|, a few hundredths); --dropout is PEFT's, the authors have none.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common import evaluate, load_base, load_data, measure, replace, train
from harness.export import export
from harness.flags import adapter_args, parse_args, runs, share
from harness.models import find_targets, weight_of
from harness.store import load_adapter, save_result
from plan import plan


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    parser.set_defaults(lr=[2e-2])  # nothing is divided by r and there is no α, as in the paper
    parser.add_argument("--dropout", type=share, default=0.0, help="on the adapter's input")


# -------------------------------------------------------------------------------------- the maths


def high_rank_weight(weight, A, B, one=1):
    """W0 ⊙ (one + B·A): weight (out, in), A (r, in), B (out, r), one 1 or 0 -> (out, in)."""
    return torch.addcmul(weight, weight, B @ A) if one else weight * (B @ A)


class HadamardProduct(torch.autograd.Function):
    """y = (W0 ⊙ (1 + B·A))·x + b, x (rows, in), in one product that keeps no dense matrix.

    With M = (δᵀ·x) ⊙ W0: dA = Bᵀ·M, dB = M·Aᵀ, dx = δ·(W0 ⊙ (1 + B·A)) (section 4.7). With one = 0
    it is the update alone, (W0 ⊙ B·A)·x. Under autocast products are in its dtype.
    """

    @staticmethod
    def forward(ctx, x, base, A, B, one):
        kind, ctx.base, ctx.one = x.device.type, base, one
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)
        ctx.save_for_backward(x, A, B)
        weight = high_rank_weight(weight_of(base).to(x.dtype), A, B, one)
        return F.linear(x, weight, base.bias if one else None)

    @staticmethod
    def backward(ctx, grad):
        x, *thin = ctx.saved_tensors
        A, B = (tensor.to(x.dtype) for tensor in thin)
        weight = weight_of(ctx.base).to(x.dtype)
        dx = grad @ high_rank_weight(weight, A, B, ctx.one) if ctx.needs_input_grad[0] else None
        M = (grad.T @ x).mul_(weight)
        return dx, None, B.T @ M, M @ A.T, None


class HiRALinear(nn.Module):
    """A frozen linear layer `base` whose weight is multiplied by 1 + B·A (equation 6)."""

    keys = {"A": "hira_A", "B": "hira_B"}  # parameter -> its name in PEFT's file

    def __init__(self, base, rank, dropout):
        super().__init__()
        out_features, in_features = weight_of(base).shape
        self.base = base
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # uniform in ±1/√in
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        # The update is a branch of its own where its input differs, and in bf16, whose 8 bits
        # would round small updates of a weight away.
        branch = self.training and self.dropout.p or torch.is_autocast_enabled(x.device.type)
        rows = self.dropout(x.flatten(0, -2))  # not a view of x: models may change y in place
        y = HadamardProduct.apply(rows, self.base, self.A, self.B, 0 if branch else 1)
        y = y.unflatten(0, x.shape[:-1])
        return self.base(x) + y if branch else y

    @property
    def weight(self):  # some models look at a layer's weight, T5 for its dtype
        return self.base.weight

    def merged_weight(self):
        """W0 ⊙ (1 + B·A) in fp32, (out, in): one matrix that does the work of both."""
        return high_rank_weight(weight_of(self.base).float(), self.A, self.B)


# ------------------------------------------------------------------------------------- the method


def adapt(base, run):
    """Adapt every target layer of base.model, in place; returns what the experiment must know."""
    targets = find_targets(base.model, run.targets)
    names = replace(base.model, targets, lambda layer: HiRALinear(layer, run.rank, run.dropout))
    peft = {"peft_type": "HIRA", "target_modules": targets, "r": run.rank}
    peft |= {"hira_dropout": run.dropout}

    @torch.no_grad()
    def info():
        ranks = {}
        for name in names:
            layer = base.model.get_submodule(name)
            update = high_rank_weight(weight_of(layer.base).float(), layer.A, layer.B, one=0)
            ranks[name] = int(torch.linalg.matrix_rank(update.nan_to_num(0, 0, 0)))  # if it broke
        return {"rank_of_update": ranks}

    return {"peft": peft, "settings": {"targets": targets}, "info": info}


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
