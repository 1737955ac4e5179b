"""Sparse LoRA: a LoRA adapter that is pruned while it trains.

    y = W0·x + b + (α/r)·B·A·x        A: (r, in)   B: (out, r)   W0, b frozen; A, B under masks

    python sparse_lora.py --dataset sst2                    # half of A and B become zero
    python sparse_lora.py --dataset sst2 --structure rank   # half of all components (bᵢ, aᵢ)

Paper: Zhu & Gupta 2017, "To Prune, or Not to Prune", arXiv 1710.01878: entries go by magnitude, on
a cubic schedule (equation 1). --penalty shrinks all entries, too (alone with --sparsity 0), and
--structure rank removes whole components, so that the saved adapter is a smaller LoRA.

Departures from the paper, which prunes whole networks: only the adapter is pruned, the schedule
runs from 10 % to 70 % of the steps, and masked entries never come back. This is not the method
"SparseLoRA" of arXiv 2506.16500: that one is contextual_lora.py.
"""

import harness  # noqa: F401, I001 - first, so that Ctrl-C while importing prints one line
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import Method, evaluate, load_base, load_data, measure, replace, train
from harness.export import export
from harness.flags import adapter_args, fraction, non_negative, parse_args, positive, runs
from harness.models import AdapterLayer, find_targets, weight_of
from harness.process import choose_device, join_process_group
from harness.store import load_adapter, save_result
from plan import plan


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    add = parser.add_argument
    add("--alpha", type=positive, default=16.0, help="The update is scaled by alpha/rank.")
    add("--sparsity", type=fraction, default=0.5, help="The fraction of A and B that ends as zero.")
    penalty = "An L1 penalty, relative to Adam's step; 0.03 to 1 are useful."
    add("--penalty", type=non_negative, default=0.0, help=penalty)
    structure = "none removes single numbers, rank whole components of A and B."
    add("--structure", choices=["none", "rank"], default="none", help=structure)


# -------------------------------------------------------------------------------------- the maths


def lora_update(x, A, B, scale):
    """scale·B·A·x, through the r-wide middle: x (..., in), A (r, in), B (out, r) -> (..., out)."""
    return F.linear(F.linear(x, A) * scale, B)  # scaled in the middle, where it is cheapest


def sparsity_at(step, total, final):
    """The cubic schedule (Zhu & Gupta, equation 1).

    0 until a tenth of the steps, `final` from 70 % on, steep at first.
    """
    begin, end = 0.1 * total, 0.7 * total
    done = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return final * (1 - (1 - done) ** 3)


def shrink(tensor, amount):
    """The proximal step of an L1 penalty: entries move `amount` towards zero and stop there."""
    return tensor.sign() * (tensor.abs() - amount).clamp(min=0)


def largest(values, keep):
    """A bool mask of the `keep` largest entries, exactly that many; ties go to the earlier one."""
    order = values.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[order[:keep]] = True
    return mask.view(values.shape)


def keep_components(norms, keep):
    """Which components stay under one budget: norms (layers, r) -> bool (layers, r).

    `keep` are True, one a layer at least.
    """
    best = F.one_hot(norms.argmax(1), norms.shape[1]).bool()
    return largest(norms.masked_fill(best, math.inf), max(keep, len(norms)))


class LoRALinear(AdapterLayer):
    """A frozen linear layer `base` with a trained update beside it (equation 3)."""

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
        """W0 + (α/r)·B·A in fp32, (out, in): one matrix that does the work of both."""
        return weight_of(self.base).float() + self.scale * self.B @ self.A


# ---------------------------------------------------------------------------------------- pruning


@torch.no_grad()
def prune_step(layers, step, total, lr, run):
    """After an optimizer step: shrink, renew the masks while the schedule climbs, apply them.

    Masked entries stay masked: each new mask keeps a part of the last one's entries.
    """
    now = sparsity_at(step, total, run.sparsity)
    climbing = now > sparsity_at(step - 1, total, run.sparsity)
    for layer in layers:
        for tensor, mask in ((layer.A, layer.mask_A), (layer.B, layer.mask_B)):
            if run.penalty:
                tensor.copy_(shrink(tensor, run.penalty * lr))
            if now > 0:
                tensor.mul_(mask)  # Adam's momentum moves masked entries, too
            if climbing and run.structure == "none":
                keep = tensor.numel() - round(now * tensor.numel())
                mask.copy_(largest(tensor.abs().masked_fill(~mask, -1), keep))
                tensor.mul_(mask)
    if climbing and run.structure == "rank":
        norms = torch.stack([layer.B.norm(dim=0) * layer.A.norm(dim=1) for layer in layers])
        norms.masked_fill_(~torch.stack([layer.mask_A[:, 0] for layer in layers]), -1)
        keep = keep_components(norms, norms.numel() - round(now * norms.numel()))
        for layer, kept in zip(layers, keep, strict=True):
            layer.mask_A.copy_(kept[:, None].expand_as(layer.A))
            layer.mask_B.copy_(kept.expand_as(layer.B))
            layer.A.mul_(layer.mask_A)
            layer.B.mul_(layer.mask_B)


def zeros(tensors):
    """The share of exact zeros in all the tensors together."""
    counts = [((tensor == 0).sum().item(), tensor.numel()) for tensor in tensors]
    return sum(zero for zero, _ in counts) / sum(number for _, number in counts)


# ------------------------------------------------------------------------------------- the method


def adapt(run, base):
    """Adapt every target layer of base.model, in place; returns the Method."""
    targets = find_targets(base.model, run.targets)

    def make(layer):
        layer = LoRALinear(layer, run.rank, run.alpha, run.dropout)
        layer.register_buffer("mask_A", torch.ones_like(layer.A, dtype=torch.bool))
        layer.register_buffer("mask_B", torch.ones_like(layer.B, dtype=torch.bool))
        return layer

    layers = replace(run, base, targets, make)

    def after_step(step, total, lr):
        prune_step(list(layers.values()), step, total, lr, run)

    def finish():
        """Cut the components that are zero out of the adapter, if whole ones were pruned."""
        if run.structure == "none":
            return {}
        for layer in layers.values():
            kept = layer.mask_A[:, 0]
            layer.A = nn.Parameter(layer.A[kept].detach().clone())
            layer.B = nn.Parameter(layer.B[:, kept].detach().clone())
        ranks = {name: len(layer.A) for name, layer in layers.items()}
        alphas = {name: run.alpha * rank / run.rank for name, rank in ranks.items()}
        return {"rank_pattern": ranks, "alpha_pattern": alphas}

    @torch.no_grad()
    def report():
        A, B = ([getattr(layer, name) for layer in layers.values()] for name in ("A", "B"))
        updates = (layer.B @ layer.A for layer in layers.values())  # dense: one at a time
        ranks = {name: len(layer.A) for name, layer in layers.items()}
        return {"sparsity": {"A": zeros(A), "B": zeros(B), "BA": zeros(updates)}, "ranks": ranks}

    peft = {"peft_type": "LORA", "target_modules": targets, "r": run.rank}
    peft |= {"lora_alpha": run.alpha, "lora_dropout": run.dropout}
    return Method(peft, after_step=after_step, finish=finish, report=report)


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
