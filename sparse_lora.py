"""Sparse LoRA, in the two senses of the word: a pruned adapter, or sparse computation while training.

    y = W0·x + b + (α/r)·B·A·x        A: (r, in)   B: (out, r)   W0, b frozen

    python sparse_lora.py --dataset sst2                      # prune: half of A and of B become zero
    python sparse_lora.py --dataset sst2 --structure rank     # prune: half of all components (bᵢ, aᵢ), one budget
    python sparse_lora.py --dataset imdb --mode contextual    # the paper

--mode prune: A and B become sparse while they train, by magnitude on a cubic schedule (Zhu & Gupta 2017,
arXiv 1710.01878), by an L1 penalty, or by whole components. This is not from the paper below.

--mode contextual: Khaki et al. 2025, "SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity",
arXiv 2506.16500. In each training forward pass the frozen feed-forward layers compute only the channels that matter for
the rows in it, forward and backward; the LoRA branch stays dense, and so do the first steps, evaluation and merging. On a
CPU a batch goes through in parts (parts in common.py), and each part picks channels of its own.

Where contextual departs from the paper, which treats decoders of 7B parameters and more: everything about encoders is our
extrapolation. CLS, or the masked tokens that are scored, stay dense, as the paper keeps a decoder's output tokens. The
paper predicts which channels matter with a rank-8 SVD of the frozen weight (--estimator svd); on a small encoder that
picks little better than chance, so by default the score is exact, on 64 to 127 of its rows (--estimator sample).
Attention projections stay dense: slicing them makes their products 1.6 to 2.5 times as fast where the feed-forward ones gain
9 times (slicing_gain in tests/bench_peers.py, two CPU cores), 4 to 6 % of all linear layers' time in a six-layer model.
Which layers are sliced follows the paper's GLUE map, whose --sparsity is 0.95; --dense_layers moves where it begins.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    adapter_args, evaluate, fail, load_adapter, load_base, load_data, measure, natural, non_negative, parse_args, positive,
    replace, runs, save_result, share, train, weight_of,
)

FFN = {  # the layers into and out of a block's wide middle; a gated one has two ways in
    "distilbert": ("ffn.lin1", "ffn.lin2"), "bert": ("intermediate.dense", "output.dense"),
    "roberta": ("intermediate.dense", "output.dense"), "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "mistral": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "qwen2": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    parser.add_argument("--alpha", type=positive, help="the update is scaled by alpha/rank (default: 2·rank, so by 2)")
    parser.add_argument("--dropout", type=share, default=0.0,
                        help="dropout on the adapter's input; 0 because the base already has dropout of its own")
    parser.add_argument("--mode", choices=["prune", "contextual"], default="prune",
                        help="prune: a sparse adapter; contextual: sparse computation, the cited paper")
    parser.add_argument("--sparsity", type=share,
                        help="prune: share of A and of B (or of the components) that ends as zero (default: 0.5); "
                             "contextual: share of the feed-forward channels left out in the deep layers (default: 0.9)")
    parser.add_argument("--penalty", type=non_negative, default=0.0,
                        help="prune: L1 penalty, relative to Adam's step; 0.03 to 1 are useful, 0 is off")
    parser.add_argument("--structure", choices=["none", "rank"], default="none",
                        help="prune: none removes single numbers; rank removes whole components, so that each layer keeps a "
                             "rank of its own and the adapter shrinks")
    parser.add_argument("--dense_layers", type=natural,
                        help="contextual: how many of the first layers stay dense (default: half of them)")
    parser.add_argument("--dense_tokens", choices=["scored", "none"], default="scored",
                        help="contextual: tokens that stay dense: those that the loss reads (gated decoders: none), or none")
    parser.add_argument("--estimator", choices=["sample", "svd"], default="sample",
                        help="contextual: score channels exactly on 64 to 127 rows, or on all by the paper's rank-8 SVD")


# ------------------------------------------------------------------------------------------------ the maths


def lora_update(x, A, B, scale):
    """The low-rank update scale·B·A·x, through the r-wide middle: x (..., in), A (r, in), B (out, r) -> (..., out)."""
    return F.linear(F.linear(x, A) * scale, B)  # scaled where the tensor is narrowest


def sparsity_at(step, total, final):
    """The cubic schedule: 0 until a tenth of the steps, `final` from 70 % on, steep at first (Zhu & Gupta, equation 1)."""
    begin, end = 0.1 * total, 0.7 * total
    done = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return final * (1 - (1 - done) ** 3)


def shrink(tensor, amount):
    """The proximal step of an L1 penalty: everything moves `amount` towards zero, and what would cross it becomes zero."""
    return tensor.sign() * (tensor.abs() - amount).clamp(min=0)


def largest(values, keep):
    """A bool mask of the `keep` largest entries, exactly that many; ties go to the earlier entry."""
    order = values.flatten().argsort(descending=True, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).index_fill_(0, order[:keep], True).view(values.shape)


def keep_components(norms, keep):
    """Which components stay, under one budget: norms (layers, r) -> bool (layers, r) with `keep` True, one a layer at least."""
    best = F.one_hot(norms.argmax(1), norms.shape[1]).bool()
    return largest(norms.masked_fill(best, math.inf), max(keep, len(norms)))


class LoRALinear(nn.Module):
    """A frozen linear layer `base` with a trained update beside it (the LoRA paper, equation 3)."""

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


# ------------------------------------------------------------------------------------------------ mode prune


@torch.no_grad()
def prune_step(layers, step, total, lr, run):
    """After an optimizer step: shrink by the penalty, renew the masks while the schedule climbs, apply them.

    Masked entries stay masked: each mask is drawn among what the last one left. At the last step components that are zero
    are cut out, if whole components were pruned.
    """
    now = sparsity_at(step, total, run.sparsity)
    climbing = step > 0 and now > sparsity_at(step - 1, total, run.sparsity)
    for layer in layers:
        for tensor, mask in ((layer.A, layer.mask_A), (layer.B, layer.mask_B)):
            if run.penalty:
                tensor.copy_(shrink(tensor, run.penalty * lr))
            if now > 0:
                tensor.mul_(mask)  # Adam's momentum moves masked entries, too
            if climbing and run.structure == "none":
                mask.copy_(largest(tensor.abs().masked_fill(~mask, -1), tensor.numel() - round(now * tensor.numel())))
                tensor.mul_(mask)
    if climbing and run.structure == "rank":
        norms = torch.stack([(layer.B.norm(dim=0) * layer.A.norm(dim=1)).masked_fill(~layer.mask_A[:, 0], -1)
                             for layer in layers])
        keep = keep_components(norms, norms.numel() - round(now * norms.numel()))
        for layer, kept in zip(layers, keep, strict=True):
            layer.mask_A.copy_(kept[:, None].expand_as(layer.A))
            layer.mask_B.copy_(kept.expand_as(layer.B))
            layer.A.mul_(layer.mask_A)
            layer.B.mul_(layer.mask_B)
    if step == total and run.structure == "rank":
        for layer in layers:
            kept = layer.mask_A[:, 0]
            layer.A, layer.B = nn.Parameter(layer.A[kept].clone()), nn.Parameter(layer.B[:, kept].clone())


def zeros(tensors):
    """The share of exact zeros in all the tensors together."""
    return sum((tensor == 0).sum().item() for tensor in tensors) / sum(tensor.numel() for tensor in tensors)


# ------------------------------------------------------------------------------------------------ mode contextual


class Channels:
    """What the layers of one feed-forward block share: the switch, and the channels picked for the forward pass at hand."""

    def __init__(self, keep, switch, rows, score):
        self.keep, self.switch, self.rows, self.score = keep, switch, rows, score


def sampled_scores(x, weights, biases, act):
    """‖z_j‖ of every channel j over the rows of x (T, in): (hidden,). Exact on those rows.

    z = act(x·W1ᵀ + b1), or act(gate)·up where the block is gated (section 3.1 scores channels by this norm, over all rows).
    """
    z = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return (act(z[0]) if len(z) == 1 else act(z[0]) * z[1]).norm(dim=0)


def svd_estimate(weight, k=8):
    """The paper's estimator (algorithm 1): (P (in, k), R (k, out)) with x·Wᵀ ≈ (x·P)·R, the best of rank k.

    P holds W's top right singular vectors, the top eigenvectors of WᵀW; R = (W·P)ᵀ.
    """
    top = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, -k:].contiguous()
    return top, (weight @ top).T.contiguous()


def estimated_scores(x, factors, biases, act):
    """As sampled_scores, over all rows, with each product replaced by its rank-8 estimate."""
    z = [(x @ P) @ R for P, R in factors]
    z = [part if bias is None else part + bias for part, bias in zip(z, biases, strict=True)]
    return (act(z[0]) if len(z) == 1 else act(z[0]) * z[1]).norm(dim=0)


class WayIn(nn.Module):
    """The layer into a block's wide middle: computes the picked channels only, and all of them for the dense rows.

    While sparse it returns one flat vector, the rows' picked channels and then the dense rows' full ones: the activation
    between here and the way out works entry by entry and does not mind. Unpicked channels are left out, not rescaled.
    """

    def __init__(self, base, channels, first):
        super().__init__()
        self.base, self.channels, self.first = base, channels, first

    def forward(self, x):
        c, weight, bias = self.channels, self.base.weight, self.base.bias
        if not (self.training and c.switch["on"]):
            return self.base(x)
        if self.first:
            rows, c.dense = c.rows()
            c.shape = x.shape
            with torch.no_grad():
                scores = c.score(x.flatten(0, -2)[rows].to(weight.dtype))
            c.picked = scores.topk(c.keep).indices.sort().values  # constants for the backward pass
        x = x.flatten(0, -2)
        narrow = F.linear(x, weight[c.picked], None if bias is None else bias[c.picked])  # (B·L, keep)
        if c.dense is None:
            return narrow.flatten()
        return torch.cat([narrow.flatten(), F.linear(x[c.dense], weight, bias).flatten()])


class WayOut(nn.Module):
    """The layer out of the wide middle: reads the picked channels, and all of them for the dense rows."""

    def __init__(self, base, channels):
        super().__init__()
        self.base, self.channels = base, channels

    def forward(self, z):
        c, weight, bias = self.channels, self.base.weight, self.base.bias
        if not (self.training and c.switch["on"]):
            return self.base(z)
        rows = c.shape[:-1].numel()
        y = F.linear(z[:rows * c.keep].view(rows, c.keep), weight[:, c.picked], bias)  # (B·L, out)
        if c.dense is not None:
            full = z[rows * c.keep:].view(len(c.dense), weight.shape[1])
            y = y.index_copy(0, c.dense, F.linear(full, weight, bias).to(y.dtype))
        return y.view(*c.shape[:-1], -1)


def layer_sparsity(layer, layers, sparsity, dense=None):
    """The paper's GLUE map, by depth: the first `dense` layers (half of them) dense, then `sparsity`, the last half of it."""
    dense = layers // 2 if dense is None else dense
    return 0.0 if layer < dense else sparsity / 2 if layer == layers - 1 else sparsity


def slice_blocks(model, run, sparsity, switch):
    """Wrap the feed-forward layers of the deep half of the blocks, in place; returns channels kept per block, by name."""
    from transformers.activations import ACT2FN
    kind = model.config.model_type
    if kind not in FFN:
        fail(f"--mode contextual: does not know the feed-forward layers of {kind}; it knows {', '.join(FFN)}")
    act = ACT2FN[getattr(model.config, "hidden_act", None) or model.config.activation]
    *ways_in, way_out = FFN[kind]
    names = [name for name, _ in model.named_modules() if re.search(rf"\.\d+\.{re.escape(ways_in[0])}$", name)]
    blocks = [name.removesuffix(ways_in[0]) for name in names]
    # A causal LM's loss reads every row, so gated decoders keep none dense.
    scored = run.dense_tokens == "scored" and len(ways_in) == 1
    seen = {}

    def rows():
        """Numbers of the rows to score channels on, and of those to keep dense; once per forward pass."""
        if seen.get("rows") is not model.rows:
            attended, dense = (flags.flatten().nonzero()[:, 0] for flags in model.rows)
            step = max(1, len(attended) // 64) if run.estimator == "sample" else 1
            seen.update(rows=model.rows, numbers=(attended[::step], dense if scored else None))
        return seen["numbers"]
    if run.dense_layers is not None and run.dense_layers >= len(blocks):
        fail(f"--dense_layers {run.dense_layers}: the model has {len(blocks)} layers, so none would be sliced")
    kept = {}
    for i, block in enumerate(blocks):
        layers = [model.get_submodule(block + name) for name in (*ways_in, way_out)]
        for name, layer in zip((*ways_in, way_out), layers, strict=True):
            if not isinstance(layer, nn.Linear):
                fail(f"--targets: {name} cannot be adapted, --mode contextual slices it; name attention layers only")
        left_out = layer_sparsity(i, len(blocks), sparsity, run.dense_layers)
        if left_out == 0:
            continue
        channels = Channels(max(1, int(layers[0].out_features * (1 - left_out))), switch, rows,
                            scorer(layers[:-1], act, run.estimator, run.device))
        for j, name in enumerate(ways_in):
            model.set_submodule(block + name, WayIn(layers[j], channels, first=j == 0))
        model.set_submodule(block + way_out, WayOut(layers[-1], channels))
        kept[block.rstrip(".")] = channels.keep
    return kept


def scorer(layers, act, estimator, device):
    """The function x (T, in) -> scores (hidden,) for one block's layers into the wide middle."""
    if estimator == "sample":
        return lambda x: sampled_scores(x, [layer.weight for layer in layers], [layer.bias for layer in layers], act)
    factors = [[part.to(device) for part in svd_estimate(layer.weight.float())] for layer in layers]
    return lambda x: estimated_scores(x.float(), factors, [layer.bias for layer in layers], act)


# ------------------------------------------------------------------------------------------------ the method


def adapt(model, run):
    """Put a LoRA beside every target layer of `model`, in place; returns what common.py needs to know of it."""
    for flag, mode, unset in (("structure", "prune", "none"), ("penalty", "prune", 0.0), ("dense_layers", "contextual", None),
                              ("dense_tokens", "contextual", "scored"), ("estimator", "contextual", "sample")):
        if run.mode != mode and (value := getattr(run, flag)) != unset:
            fail(f"--{flag} {value}: only with --mode {mode}, this is --mode {run.mode}")
    alpha = run.alpha or 2 * run.rank
    names = replace(model, run.targets, lambda layer: LoRALinear(layer, run.rank, alpha, run.dropout))
    layers = [model.get_submodule(name) for name in names]
    peft = {"peft_type": "LORA", "r": run.rank, "lora_alpha": alpha, "lora_dropout": run.dropout}

    if run.mode == "contextual":
        switch = {"on": False}
        sparsity = 0.9 if run.sparsity is None else run.sparsity
        kept = slice_blocks(model, run, sparsity, switch)

        def after_step(step, total, lr):
            switch["on"] = step >= 0.05 * total  # the first steps are dense (section 3.3)
        return {"peft": peft, "after_step": after_step,
                "info": lambda: {"channels_kept": kept, "sparsity_of_channels": sparsity, "dense_steps": 0.05}}

    run.sparsity = 0.5 if run.sparsity is None else run.sparsity
    for layer in layers:
        layer.register_buffer("mask_A", torch.ones_like(layer.A, dtype=torch.bool))
        layer.register_buffer("mask_B", torch.ones_like(layer.B, dtype=torch.bool))

    def after_step(step, total, lr):
        prune_step(layers, step, total, lr, run)
        if step == total and run.structure == "rank":
            ranks = {name: len(layer.A) for name, layer in zip(names, layers, strict=True)}
            peft["rank_pattern"] = ranks
            peft["alpha_pattern"] = {name: alpha * rank / run.rank for name, rank in ranks.items()}  # keeps the scale α/r

    def info():
        A, B = [layer.A for layer in layers], [layer.B for layer in layers]
        shares = {"A": zeros(A), "B": zeros(B), "BA": zeros([b @ a for a, b in zip(A, B, strict=True)])}
        return {"sparsity": shares, "ranks": {name: len(layer.A) for name, layer in zip(names, layers, strict=True)}}
    return {"peft": peft, "after_step": after_step, "info": info}


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
