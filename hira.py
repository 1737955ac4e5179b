"""HiRA: a high-rank update from low-rank factors, multiplied element-wise by the frozen weight.

Paper: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation …", ICLR.

    y = (W0 ⊙ (1 + B·A))·x + b        A: (r, in)   B: (out, r)   W0, b frozen   (equation 6)

    python hira.py --dataset sst2 --rank 8

Why the update is not low rank: with W0 = Σᵢ σᵢ·uᵢ·vᵢᵀ (r0 terms) and B·A = Σⱼ bⱼ·aⱼᵀ, W0 ⊙ B·A is
the sum of r0·r rank-one terms σᵢ·(uᵢ⊙bⱼ)(vᵢ⊙aⱼ)ᵀ: as many numbers as LoRA's give a rank up to r0·r.
The price is a gradient as large as W0 in each backward pass: three large products where LoRA has
two. In bf16, or with --dropout, the update is a separate branch, with five.

Departures from the paper: its A and B are named the other way round; the learning rate is 2e-2, not
1e-3 (a step is multiplied by |W0|, a few hundredths); --dropout is PEFT's, the authors have none.
"""

import harness  # noqa: F401, I001 - first, so that Ctrl-C while importing prints one line
import torch
import torch.nn.functional as F
from torch import nn

from common import Method, evaluate, load_base, load_data, measure, replace, train
from harness.export import export
from harness.flags import adapter_args, parse_args, runs
from harness.models import AdapterLayer, compute_dtype, find_targets, weight_of
from harness.process import choose_device, join_process_group
from harness.store import load_adapter, save_result
from plan import plan


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    parser.set_defaults(lr=[2e-2])  # a step is multiplied by |W0|, which is small; there is no α


# -------------------------------------------------------------------------------------- the maths


def hira_weight(W0, A, B):
    """W0 ⊙ (1 + B·A), what the layer computes with: W0 (out, in), A (r, in), B (out, r)."""
    return torch.addcmul(W0, W0, B @ A)


def hira_update(W0, A, B):
    """W0 ⊙ B·A, what training adds to W0: (out, in), of rank up to r·rank(W0)."""
    return W0 * (B @ A)


def hira_forward(x, W0, b, A, B):
    """y = (W0 ⊙ (1 + B·A))·x + b, the whole method; autograd would keep two matrices like W0."""
    return F.linear(x, hira_weight(W0, A, B), b)


class HadamardProduct(torch.autograd.Function):
    """hira_forward, which keeps no dense matrix for the backward pass; x (rows, in).

    With M = (δᵀ·x) ⊙ W0: dA = Bᵀ·M, dB = M·Aᵀ, dx = δ·W with W as in the forward pass (section
    4.7). `dense` is hira_weight, or hira_update for the update's product alone, without a bias.
    """

    @staticmethod
    def forward(ctx, x, base, A, B, dense):
        ctx.base, ctx.dense, x = base, dense, x.to(compute_dtype(x))
        ctx.save_for_backward(x, A, B)
        bias = base.bias if dense is hira_weight else None
        return F.linear(x, dense(weight_of(base).to(x.dtype), A, B), bias)

    @staticmethod
    def backward(ctx, grad):
        x, *thin = ctx.saved_tensors
        A, B = (tensor.to(x.dtype) for tensor in thin)
        W0 = weight_of(ctx.base).to(x.dtype)
        dx = grad @ ctx.dense(W0, A, B) if ctx.needs_input_grad[0] else None
        M = (grad.T @ x).mul_(W0)
        return dx, None, B.T @ M, M @ A.T, None


class HiRALinear(AdapterLayer):
    """A frozen linear layer `base` whose weight is multiplied by 1 + B·A (equation 6)."""

    keys = {"A": "hira_A", "B": "hira_B"}  # their names when saved, as in PEFT

    def __init__(self, base, rank, dropout):
        super().__init__(base)
        self.A = nn.Parameter(torch.empty(rank, self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # uniform in ±1/√in
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        rows = self.dropout(x.flatten(0, -2))  # outside: models may change a result in place
        # A branch beside the base: dropout changes its input, and bf16 would round 1 + B·A to 1.
        if self.training and self.dropout.p or torch.is_autocast_enabled(x.device.type):
            y = HadamardProduct.apply(rows, self.base, self.A, self.B, hira_update)
            return self.base(x) + y.unflatten(0, x.shape[:-1])
        y = HadamardProduct.apply(rows, self.base, self.A, self.B, hira_weight)
        return y.unflatten(0, x.shape[:-1])

    def merged_weight(self):
        """W0 ⊙ (1 + B·A) in fp32, (out, in): one matrix that does the work of both."""
        return hira_weight(weight_of(self.base).float(), self.A, self.B)


# ------------------------------------------------------------------------------------- the method


def adapt(run, base):
    """Adapt every target layer of base.model, in place; returns the Method."""
    targets = find_targets(base.model, run.targets)
    layers = replace(run, base, targets, lambda layer: HiRALinear(layer, run.rank, run.dropout))

    @torch.no_grad()
    def report():
        name, layer = next(iter(layers.items()))  # of one layer: at 4,096² it takes seconds
        update = hira_update(weight_of(layer.base).float(), layer.A, layer.B).nan_to_num(0, 0, 0)
        return {"rank_of_update": {name: int(torch.linalg.matrix_rank(update))}}

    peft = {"peft_type": "HIRA", "target_modules": targets, "r": run.rank}
    return Method(peft | {"hira_dropout": run.dropout}, report=report)


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
