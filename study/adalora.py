"""AdaLoRA: LoRA that moves its rank to the layers that need it, while it trains.

    y = W0·x + b + (α/r0)·P·diag(λ)·Q·x        Q: (r0, in)   λ: (r0, 1)   P: (out, r0)

    python study/adalora.py --dataset sst2 --rank 4         # ends with a mean rank of 4

Paper: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
arXiv 2303.10512. A triplet is one column of P, one λ and one row of Q. Each has a score of its
importance. All layers share one budget of triplets, and the λ of those outside it are set to zero.
A penalty keeps the columns of P and the rows of Q close to orthogonal, so that λ resembles singular
values.

As in the authors' code and PEFT, and unlike the paper's text: the penalty is the norm of PᵀP − I,
not its square; a step's importance is its new weight times its old gradient. Departures from both:
after training the triplets that are left become a plain LoRA of different ranks, which PEFT loads,
and a layer keeps one triplet at least.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Method, evaluate, load_base, load_data, measure, replace, train  # noqa: E402
from harness.export import export  # noqa: E402
from harness.flags import adapter_args, non_negative, parse_args, positive, runs  # noqa: E402
from harness.models import AdapterLayer, find_targets, weight_of  # noqa: E402
from harness.process import choose_device, join_process_group, process_index  # noqa: E402
from harness.store import load_adapter, save_result  # noqa: E402
from plan import plan  # noqa: E402

BETA = 0.85  # of both moving averages (the paper's β1 and β2)
TENSORS = ("A", "lam", "B")  # Q, λ and P under LoRA's names


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    add = parser.add_argument
    add("--alpha", type=positive, default=16.0, help="The update is scaled by alpha/r0.")
    orthogonal = "Weight of the penalty that keeps P and Q orthogonal (the paper's γ)."
    add("--orthogonal", type=non_negative, default=0.1, help=orthogonal)


# -------------------------------------------------------------------------------------- the maths


def orthogonality(P, Q):
    """The mean of ‖PᵀP − I‖ and ‖QQᵀ − I‖ (equation 4, not squared): P (out, r), Q (r, in)."""
    identity = torch.eye(len(Q), device=Q.device)
    return (torch.linalg.norm(P.T @ P - identity) + torch.linalg.norm(Q @ Q.T - identity)) / 2


def phases(total):
    """(t_i, t_f): the first steps, which keep all triplets, and the last, which keep the masks."""
    return int(0.1 * total), int(0.4 * total)


def budget_at(step, total, start, target):
    """How many triplets are left at a step (equation 12): a cubic fall from `start` to `target`."""
    first, last = phases(total)
    left = 1 - (step - first) / (total - last - first)
    return int((start - target) * min(max(left, 0.0), 1.0) ** 3 + target)


def smoothed(value, average):
    """The moving average after one more value (equations 9 and 10)."""
    return BETA * average + (1 - BETA) * value


def triplet_scores(lam, A, B):
    """(r,) scores of triplets from those of their numbers: lam (r, 1), A (r, in), B (out, r)."""
    return lam[:, 0] + A.mean(dim=1) + B.mean(dim=0)  # equation 7


# ------------------------------------------------------------------------------------- the module


class AdaLoRALinear(AdapterLayer):
    """A frozen linear layer `base` with an update of r0 triplets beside it (equation 3)."""

    keys = {"A": "lora_A.weight", "B": "lora_B.weight"}  # their names when saved, as in PEFT

    def __init__(self, base, rank, alpha, dropout):
        super().__init__(base)
        self.A = nn.Parameter(0.02 * torch.randn(rank, self.in_features))
        self.B = nn.Parameter(0.02 * torch.randn(self.out_features, rank))
        self.lam = nn.Parameter(torch.zeros(rank, 1))  # None when the triplets are a plain LoRA
        for name in TENSORS:  # buffers, so that a checkpoint has them
            tensor = getattr(self, name)
            self.register_buffer(f"importance_{name}", torch.zeros_like(tensor))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(tensor))
        self.register_buffer("mask", torch.ones_like(self.lam))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)

    def scaled_A(self):
        """diag(λ)·Q, (r, in)."""
        return self.A if self.lam is None else self.lam * self.A

    def forward(self, x):
        return self.base(x) + F.linear(
            F.linear(self.dropout(x), self.scaled_A()) * self.scale, self.B
        )

    def merged_weight(self):
        """W0 + (α/r0)·P·diag(λ)·Q in fp32, (out, in)."""
        return weight_of(self.base).float() + self.scale * self.B @ self.scaled_A()

    def update_importance(self):
        """Smooth |weight · gradient| and its deviation, for every number (equations 8 to 10)."""
        for name in TENSORS:
            tensor = getattr(self, name)
            importance = getattr(self, f"importance_{name}")
            uncertainty = getattr(self, f"uncertainty_{name}")
            now = (tensor * tensor.grad).abs()
            importance.copy_(smoothed(now, importance))
            uncertainty.copy_(smoothed((now - importance).abs(), uncertainty))

    def scores(self):
        """(r,) scores of this layer's triplets; a number's is importance times uncertainty."""
        product = {
            name: getattr(self, f"importance_{name}") * getattr(self, f"uncertainty_{name}")
            for name in TENSORS
        }
        return triplet_scores(**product)

    def become_lora(self):
        """Keep the triplets inside the budget, one at least, as the A and B of a plain LoRA."""
        mask = self.mask[:, 0].bool()
        kept = mask if mask.any() else torch.arange(len(mask)) == 0
        self.A = nn.Parameter(self.scaled_A()[kept].detach().clone())
        self.B = nn.Parameter(self.B[:, kept].detach().clone())
        self.lam = None


@torch.no_grad()
def allocate(layers, step, total, target):
    """After an optimizer step: renew importance and masks, and set λ outside the budget to zero.

    target: how many triplets all layers have together in the end.
    """
    first, last = phases(total)
    if step < total - last:
        for layer in layers:
            layer.update_importance()
    start = sum(len(layer.lam) for layer in layers)
    budget = budget_at(step, total, start, target)
    if first < step <= total - last and budget < start:
        scores = [layer.scores() for layer in layers]
        threshold = torch.cat(scores).kthvalue(start - budget).values
        for layer, score in zip(layers, scores, strict=True):
            layer.mask.copy_((score > threshold)[:, None])
    for layer in layers:
        layer.lam.mul_(layer.mask)


# ------------------------------------------------------------------------------------- the method


def adapt(run, base):
    """Adapt every target layer of base.model, in place; returns the Method."""
    targets = find_targets(base.model, run.targets)
    rank = -(-3 * run.rank // 2)  # the paper starts with 1.5 times the budget
    layers = replace(
        run, base, targets, lambda layer: AdaLoRALinear(layer, rank, run.alpha, run.dropout)
    )
    if run.eval_only:  # a saved adapter is a plain LoRA
        for layer in layers.values():
            layer.lam = None

    def before_step(step, total):
        """Leave the penalty's gradient in .grad, where the loss's is added; once a step."""
        if run.orthogonal and process_index() == 0:
            norms = [orthogonality(layer.B, layer.A) for layer in layers.values()]
            (run.orthogonal * sum(norms) / len(norms)).backward()

    def after_step(step, total, lr):
        allocate([*layers.values()], step, total, run.rank * len(layers))

    def finish():
        for layer in layers.values():
            layer.become_lora()
        ranks = {name: len(layer.A) for name, layer in layers.items()}
        alphas = {name: run.alpha * r / rank for name, r in ranks.items()}
        return {"rank_pattern": ranks, "alpha_pattern": alphas}

    def report():
        return {"ranks": {name: len(layer.A) for name, layer in layers.items()}}

    peft = {"peft_type": "LORA", "target_modules": targets, "r": rank}
    peft |= {"lora_alpha": run.alpha, "lora_dropout": run.dropout}
    return Method(
        peft, before_step=before_step, after_step=after_step, finish=finish, report=report
    )


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
