"""LoRA: a frozen linear layer plus a trained low-rank update.

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    y = W0·x + b + (α/r)·B·A·x        A: (r, in)   B: (out, r)   W0, b frozen   (equation 3)

    python lora.py --dataset sst2 --rank 8

A and B are r·(in + out) numbers instead of in·out. B starts at zero, so that training starts from
the unchanged model. A starts at random: were it zero too, neither would ever get a gradient. In the
first step A's gradient, which passes through B, is zero, and only B moves. The factor α/r is there
so that another rank needs less tuning of the learning rate (section 4.1). Added to W0, "merged",
the update is one matrix with it, and inference costs what it cost before.

Departures from the paper: A starts Kaiming-uniform, as in the authors' loralib, not Gaussian; α is
16 at every rank, not the first rank that was tried; dropout, off by default, acts on the input.
"""

import harness  # noqa: F401, I001 - first, so that Ctrl-C while importing prints one line
import torch
import torch.nn.functional as F
from torch import nn

from common import Method, evaluate, load_base, load_data, measure, replace, train
from harness.export import export
from harness.flags import adapter_args, parse_args, positive, runs
from harness.models import AdapterLayer, find_targets, weight_of
from harness.process import choose_device, join_process_group
from harness.store import load_adapter, save_result
from plan import plan


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    scaling = "The update is scaled by alpha/rank."
    parser.add_argument("--alpha", type=positive, default=16.0, help=scaling)


# -------------------------------------------------------------------------------------- the maths


def lora_update(x, A, B, scale):
    """scale·B·A·x, through the r-wide middle: x (..., in), A (r, in), B (out, r) -> (..., out)."""
    return F.linear(F.linear(x, A) * scale, B)  # scaled in the middle, where it is cheapest


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


# ------------------------------------------------------------------------------------- the method


def adapt(run, base):
    """Adapt every target layer of base.model, in place; returns the Method."""
    targets = find_targets(base.model, run.targets)
    replace(run, base, targets, lambda layer: LoRALinear(layer, run.rank, run.alpha, run.dropout))
    peft = {"peft_type": "LORA", "target_modules": targets, "r": run.rank}
    return Method(peft | {"lora_alpha": run.alpha, "lora_dropout": run.dropout})


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
