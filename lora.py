"""LoRA: a frozen linear layer plus a trained low-rank update.

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3.

    y = W0·x + b + (α/r)·B·A·x        A: (r, in)   B: (out, r)   W0, b frozen

    python lora.py --dataset sst2 --rank 8

B starts at zero, so training starts from the unchanged model, and the first step can move B only. A and B together are
r·(in + out) numbers instead of in·out; merged into W0 they cost nothing at inference.

Where this departs from the paper: A starts Kaiming-uniform, as in the authors' loralib, not Gaussian; α is 2·rank, a
common choice (PEFT's defaults are 8 and rank 8, a scale of 1), where the paper keeps α at the first rank tried; dropout
(off by default) acts on the adapter's input only, as in loralib.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    adapter_args, evaluate, load_adapter, load_base, load_data, measure, parse_args, positive, replace, runs, save_result,
    share, train, weight_of,
)


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    parser.add_argument("--alpha", type=positive, help="the update is scaled by alpha/rank (default: 2·rank, so by 2)")
    parser.add_argument("--dropout", type=share, default=0.0,
                        help="dropout on the adapter's input; 0 because the base already has dropout of its own")


# ------------------------------------------------------------------------------------------------ the maths


def lora_update(x, A, B, scale):
    """The low-rank update scale·B·A·x, through the r-wide middle: x (..., in), A (r, in), B (out, r) -> (..., out)."""
    return F.linear(F.linear(x, A) * scale, B)  # scaled where the tensor is narrowest


class LoRALinear(nn.Module):
    """A frozen linear layer `base` with a trained update beside it (paper, equation 3)."""

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

    def merged_weight(self):
        """W0 + (α/r)·B·A in fp32, (out, in): the one matrix that does the work of both at inference."""
        return weight_of(self.base).float() + self.scale * self.B @ self.A


# ------------------------------------------------------------------------------------------------ the method


def adapt(model, run):
    """Put a LoRA beside every target layer of `model`, in place; returns what common.py needs to know of it."""
    alpha = run.alpha or 2 * run.rank
    replace(model, run.targets, lambda layer: LoRALinear(layer, run.rank, alpha, run.dropout))
    return {"peft": {"peft_type": "LORA", "r": run.rank, "lora_alpha": alpha, "lora_dropout": run.dropout}}


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
