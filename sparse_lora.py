"""Sparse LoRA, in the two senses of the word: a pruned adapter, or sparse computation in training.

    y = W0·x + b + (α/r)·B·A·x        A: (r, in)   B: (out, r)   W0, b frozen

    python sparse_lora.py --dataset sst2                    # prune: half of A and B become zero
    python sparse_lora.py --dataset sst2 --structure rank   # prune: half of all components (bᵢ, aᵢ)
    python sparse_lora.py --dataset imdb --mode contextual  # the paper

--mode prune: A and B become sparse while they train, by magnitude on a cubic schedule (Zhu & Gupta
2017, arXiv 1710.01878), by an L1 penalty, or by whole components. Not from the paper below.

--mode contextual: Khaki et al. 2025, "SparseLoRA: Accelerating LLM Fine-Tuning with Contextual
Sparsity", arXiv 2506.16500. In each training forward pass the frozen feed-forward layers compute
only the channels that matter for the rows in it, forward and backward; the LoRA branch stays dense,
and so do the first steps, evaluation and merging. On a CPU a batch goes through in parts
(micro_batches in common.py), and each part picks channels of its own.

Departures from the paper, which treats decoders of 7B weights and more: all about encoders is our
extrapolation. CLS, or the masked tokens that are scored, stay dense, as the paper keeps a decoder's
output tokens. The paper predicts which channels matter with a rank-8 SVD of the frozen weight
(--estimator svd); on a small encoder that picks little better than chance, so by default the score
is exact, on 64 to 127 of the rows (--estimator sample). Attention projections stay dense: slicing
them gains little. The last block is left unsliced where it computes the read rows alone.
Which layers are sliced follows the paper's GLUE map, whose --channel_sparsity is 0.95;
--dense_layers moves where it begins.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common import evaluate, load_base, load_data, measure, replace, train
from harness.export import export
from harness.flags import (
    adapter_args,
    natural,
    non_negative,
    parse_args,
    positive,
    refuse_idle,
    runs,
    share,
)
from harness.models import block_linears, find_targets, is_linear, weight_of
from harness.process import fail
from harness.store import load_adapter, save_result
from plan import plan

FFN = (  # the layers into and out of a block's wide middle; a gated one has two ways in
    ("intermediate.dense", "output.dense"),  # BERT and its relatives
    ("ffn.lin1", "ffn.lin2"),  # DistilBERT
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),  # Llama and its relatives
    ("fc1", "fc2"),  # BART, OPT, Phi
    ("DenseReluDense.wi", "DenseReluDense.wo"),  # T5
    ("DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo"),  # gated T5
    ("dense_h_to_4h", "dense_4h_to_h"),  # Falcon, BLOOM
)
PRUNING = {"sparsity", "structure", "penalty"}  # flags of one mode, idle in the other
CONTEXTUAL = {"channel_sparsity", "dense_layers", "dense_tokens", "estimator"}


def add_args(parser):
    """Add this method's flags and defaults."""
    adapter_args(parser)
    add = parser.add_argument
    add("--alpha", type=positive, default=16.0, help="alpha/rank scales the update")
    add("--dropout", type=share, default=0.0, help="on the adapter's input")
    modes = "prune: a sparse adapter; contextual: sparse computation, the cited paper"
    add("--mode", choices=["prune", "contextual"], default="prune", help=modes)
    add("--sparsity", type=share, default=0.5, help="prune: share of A and B that ends as zero")
    penalty = "prune: L1 penalty, relative to Adam's step; 0.03 to 1 are useful"
    add("--penalty", type=non_negative, default=0.0, help=penalty)
    structure = "prune: none removes single numbers, rank whole components of A and B"
    add("--structure", choices=["none", "rank"], default="none", help=structure)
    contextual_args(parser)


def contextual_args(parser):
    """Add the flags of the contextual mode."""
    add = parser.add_argument
    left_out = "contextual: share of the feed-forward channels left out in the deep layers"
    add("--channel_sparsity", type=share, default=0.9, help=left_out)
    add("--dense_layers", type=natural, help="contextual: so many stay dense (default: half)")
    dense = "contextual: which tokens stay dense: scored ones (a causal LM: none) or none"
    add("--dense_tokens", choices=["scored", "none"], default="scored", help=dense)
    scores = "contextual: score channels exactly on 64 to 127 rows, or on all by a rank-8 SVD"
    add("--estimator", choices=["sample", "svd"], default="sample", help=scores)


# -------------------------------------------------------------------------------------- the maths


def lora_update(x, A, B, scale):
    """scale·B·A·x, through the r-wide middle: x (..., in), A (r, in), B (out, r) -> (..., out)."""
    return F.linear(F.linear(x, A) * scale, B)  # scaled where the tensor is narrowest


def sparsity_at(step, total, final):
    """The cubic schedule (Zhu & Gupta, equation 1).

    0 until a tenth of the steps, `final` from 70 % on, steep at first.
    """
    begin, end = 0.1 * total, 0.7 * total
    done = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return final * (1 - (1 - done) ** 3)


def shrink(tensor, amount):
    """The proximal step of an L1 penalty: all moves `amount` towards zero and stops there."""
    return tensor.sign() * (tensor.abs() - amount).clamp(min=0)


def largest(values, keep):
    """A bool mask of the `keep` largest entries, exactly that many; ties go to the earlier one."""
    order = values.flatten().argsort(descending=True, stable=True)
    return (
        torch.zeros_like(order, dtype=torch.bool)
        .index_fill_(0, order[:keep], True)
        .view(values.shape)
    )


def keep_components(norms, keep):
    """Which components stay under one budget: norms (layers, r) -> bool (layers, r).

    `keep` are True, one a layer at least.
    """
    best = F.one_hot(norms.argmax(1), norms.shape[1]).bool()
    return largest(norms.masked_fill(best, math.inf), max(keep, len(norms)))


class LoRALinear(nn.Module):
    """A frozen linear layer `base` with a trained update beside it (equation 3)."""

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
        """W0 + (α/r)·B·A in fp32, (out, in): one matrix that does the work of both."""
        return weight_of(self.base).float() + self.scale * self.B @ self.A


# ------------------------------------------------------------------------------------- mode prune


@torch.no_grad()
def prune_step(layers, step, total, lr, run):
    """After an optimizer step: shrink, renew the masks while the schedule climbs, apply them.

    Masked entries stay masked: each mask is drawn among what the last one left.
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


# -------------------------------------------------------------------------------- mode contextual


class Channels:
    """What the layers of one block share: the switch, and the channels picked for this pass."""

    def __init__(self, keep, switch, rows, score):
        self.keep, self.switch, self.rows, self.score = keep, switch, rows, score


def sampled_scores(x, weights, biases, act):
    """‖z_j‖ of every channel j over the rows of x (T, in): (hidden,). Exact on those rows.

    z = act(x·W1ᵀ + b1), or act(gate)·up where the block is gated (section 3.1 scores channels by
    this norm, over all rows).
    """
    z = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return (act(z[0]) if len(z) == 1 else act(z[0]) * z[1]).norm(dim=0)


def svd_estimate(weight, k=8):
    """The paper's estimator (algorithm 1): P (in, k), R (k, out) with x·Wᵀ ≈ (x·P)·R of rank k.

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
    """The layer into a block's wide middle: computes the picked channels, all for the dense rows.

    While sparse it returns one flat vector, the rows' picked channels and then the dense rows' full
    ones: the activation between here and the way out works entry by entry and does not mind.
    Unpicked channels are left out, not rescaled.
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
        picked_bias = None if bias is None else bias[c.picked]
        narrow = F.linear(x, weight[c.picked], picked_bias)  # (B·L, keep)
        if c.dense is None:
            return narrow.flatten()
        return torch.cat([narrow.flatten(), F.linear(x[c.dense], weight, bias).flatten()])


class WayOut(nn.Module):
    """The layer out of the wide middle: reads the picked channels, all for the dense rows."""

    def __init__(self, base, channels):
        super().__init__()
        self.base, self.channels = base, channels

    @property
    def weight(self):  # T5 looks at it
        return self.base.weight

    def forward(self, z):
        c, weight, bias = self.channels, self.base.weight, self.base.bias
        if not (self.training and c.switch["on"]):
            return self.base(z)
        rows = c.shape[:-1].numel()
        y = F.linear(z[: rows * c.keep].view(rows, c.keep), weight[:, c.picked], bias)  # (B·L, out)
        if c.dense is not None:
            full = z[rows * c.keep :].view(len(c.dense), weight.shape[1])
            y = y.index_copy(0, c.dense, F.linear(full, weight, bias).to(y.dtype))
        return y.view(*c.shape[:-1], -1)


def layer_sparsity(layer, layers, sparsity, dense):
    """The paper's GLUE map by depth: the first `dense` dense, the last half as sparse."""
    return 0.0 if layer < dense else sparsity / 2 if layer == layers - 1 else sparsity


def slice_blocks(base, run, switch):
    """Wrap the feed-forward layers of the deep half of the blocks, in place.

    switch["on"] says whether the step at hand is sparse. Returns channels kept per block, by name.
    """
    from transformers.activations import ACT2FN

    model, config = base.model, base.model.config
    linears = block_linears(model)
    found = [layers for layers in FFN if any(name.endswith(f".{layers[0]}") for name in linears)]
    keys = ("hidden_act", "activation", "activation_function", "hidden_activation", "dense_act_fn")
    acts = [getattr(config, key, None) for key in keys]
    act = next((ACT2FN[name] for name in acts if name), nn.GELU(approximate="tanh"))  # BLOOM's
    *ways_in, way_out = found[0] if found else [None, None]
    names = [name for name in linears if name.endswith(f".{ways_in[0]}")]
    every = [name for name, _ in model.named_modules() if name.endswith(f".{ways_in[0]}")]
    if not names or len(names) < len(every):
        where = f"no plain feed-forward layers known in {config.model_type}"
        fail(f"--mode contextual: {where}; --targets may name attention layers only")
    blocks = [name.removesuffix(ways_in[0]) for name in names]
    sliceable = len(blocks) - base.last_block_cut
    first = run.dense_layers
    if first is None:  # half, but in a model of two blocks one is sliced
        first = max(0, min(len(blocks) // 2, sliceable - 1))
    if first >= sliceable:
        has = f"the model has {len(blocks)} layers, {sliceable} of which can be sliced"
        fail(f"--dense_layers {first}: {has}, so none would be")

    def rows():
        """Positions of the rows to score channels on, and of those to keep dense."""
        real, read = base.batch.real, base.batch.read
        step = max(1, len(real) // 64) if run.estimator == "sample" else 1
        few = 2 * len(read) < len(real)  # a causal LM reads every row: none would stay sparse
        return real[::step], read if few and run.dense_tokens == "scored" else None

    kept = {}
    for i, block in enumerate(blocks):
        layers = [model.get_submodule(block + name) for name in (*ways_in, way_out)]
        for name, layer in zip((*ways_in, way_out), layers, strict=True):
            if not is_linear(layer):
                fail(f"--targets: {name} is sliced by --mode contextual; name attention layers")
        left_out = layer_sparsity(i, len(blocks), run.channel_sparsity, first)
        if left_out == 0 or i >= sliceable:
            continue
        keep = max(1, round(len(layers[0].weight) * (1 - left_out)))
        channels = Channels(keep, switch, rows, scorer(layers[:-1], act, run))
        for name, layer in zip(ways_in, layers, strict=False):
            model.set_submodule(block + name, WayIn(layer, channels, first=layer is layers[0]))
        model.set_submodule(block + way_out, WayOut(layers[-1], channels))
        kept[block.rstrip(".")] = keep
    if not kept:
        fail(f"--channel_sparsity {run.channel_sparsity:g}: no channel would be left out")
    return kept


def scorer(layers, act, run):
    """The function x (T, in) -> scores (hidden,) for a block's layers into the wide middle."""
    biases = [layer.bias for layer in layers]
    if run.estimator == "sample":
        return lambda x: sampled_scores(x, [layer.weight for layer in layers], biases, act)
    pairs = [svd_estimate(layer.weight.float()) for layer in layers]
    factors = [[part.to(run.device) for part in pair] for pair in pairs]
    return lambda x: estimated_scores(x.float(), factors, biases, act)


# ------------------------------------------------------------------------------------- the method


def add_loras(base, run):
    """Put a LoRA beside every target layer, in place: (their names, a method's dict so far)."""
    targets = find_targets(base.model, run.targets)

    def adapted(layer):
        return LoRALinear(layer, run.rank, run.alpha, run.dropout)

    names = replace(base.model, targets, adapted)
    peft = {"peft_type": "LORA", "target_modules": targets, "r": run.rank}
    peft |= {"lora_alpha": run.alpha, "lora_dropout": run.dropout}
    return names, {"peft": peft, "settings": {"targets": targets}}


def add_contextual(base, run):
    """Slice the feed-forward layers, in place; returns a method's dict without the adapter."""
    switch = {"on": False}
    kept = slice_blocks(base, run, switch)

    def after_step(step, total, lr):
        switch["on"] = step >= 0.05 * total  # the first steps are dense (section 3.3)

    return {"after_step": after_step, "info": lambda: {"channels_kept": kept}}


def add_pruning(base, run, names, peft):
    """Prune the LoRAs of these names while they train; returns a method's dict without the rest."""
    layers = [base.model.get_submodule(name) for name in names]
    for layer in layers:
        layer.register_buffer("mask_A", torch.ones_like(layer.A, dtype=torch.bool))
        layer.register_buffer("mask_B", torch.ones_like(layer.B, dtype=torch.bool))

    def after_step(step, total, lr):
        prune_step(layers, step, total, lr, run)

    def ranks():
        return {name: len(layer.A) for name, layer in zip(names, layers, strict=True)}

    def finish():
        """Cut the components that are zero out of the adapter, if whole ones were pruned."""
        if run.structure == "rank":
            for layer in layers:
                kept = layer.mask_A[:, 0]
                layer.A = nn.Parameter(layer.A[kept].detach().clone())
                layer.B = nn.Parameter(layer.B[:, kept].detach().clone())
            peft["rank_pattern"] = ranks()
            peft["alpha_pattern"] = {n: run.alpha * r / run.rank for n, r in ranks().items()}

    @torch.no_grad()
    def info():
        A, B = [layer.A for layer in layers], [layer.B for layer in layers]
        updates = (layer.B @ layer.A for layer in layers)  # one at a time: they are dense
        return {"sparsity": {"A": zeros(A), "B": zeros(B), "BA": zeros(updates)}, "ranks": ranks()}

    return {"after_step": after_step, "finish": finish, "info": info}


def adapt(base, run):
    """Adapt every target layer of base.model, in place; returns what the experiment must know."""
    refuse_idle(run, CONTEXTUAL if run.mode == "prune" else PRUNING, f"--mode {run.mode}")
    names, method = add_loras(base, run)
    if run.mode == "contextual":
        return method | add_contextual(base, run)
    return method | add_pruning(base, run, names, method["peft"])


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
