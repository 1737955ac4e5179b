"""Contextual LoRA: in training, frozen layers compute only the channels that matter for a batch.

Paper: Khaki et al. 2025, "SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity", arXiv
2506.16500 (we call it contextual, because sparse_lora.py prunes the adapter).

    y = act(x·W1[I]ᵀ + b1[I])·W2[:, I]ᵀ + b2        I: the channels with the largest
                                                    ‖act(x·W1ᵀ + b1)‖ (section 3.1)
    python contextual_lora.py --dataset imdb

The wide middle of a block's feed-forward layer has thousands of channels, and for one batch most of
them contribute little. In each training step every sliced block scores its channels on 256 random
tokens from the batch's first examples (at most 1,024 tokens) and computes only the best ones,
forward and backward. The LoRA branch stays dense, and so do the first steps, evaluation and
merging. Neither the device nor how a batch is cut changes the channels; under torchrun
each process picks for its own examples.

Departures from the paper, which treats decoders of 7B weights and more: [CLS], or the masked tokens
that are scored, stay dense, as a decoder's output tokens do there. The paper predicts which
channels matter with a rank-8 SVD of the frozen weight (--estimator svd); on a small encoder that
picks little better than chance, so by default the score is exact, on a random sample of tokens.
Attention is never sliced, nor is a last block that computes the output tokens alone. The layers
are those of the paper's GLUE configuration, with 90 % of the channels left out, not 95 %.
"""

import harness  # noqa: F401, I001 - first, so that Ctrl-C while importing prints one line
import torch
import torch.nn.functional as F
from torch import nn

import lora
from common import evaluate, load_base, load_data, measure, train
from harness.batches import leading_examples
from harness.export import export
from harness.flags import count_or_zero, fraction, parse_args, runs
from harness.models import activation, feed_forward_layers, is_linear
from harness.process import choose_device, fail, join_process_group
from harness.splits import generator_for
from harness.store import load_adapter, save_result
from plan import plan

CANDIDATES = 1024  # tokens at the start of a batch that a sample is drawn from
SAMPLED = 256  # tokens in the sample; study/claims/channel_energy.py compares other sizes


def add_args(parser):
    """Add this method's flags and defaults."""
    lora.add_args(parser)
    slicing_args(parser)


def slicing_args(parser):
    """Add the flags of the sliced feed-forward layers."""
    add = parser.add_argument
    left_out = "The fraction of feed-forward channels left out in the deep layers."
    add("--channel_sparsity", type=fraction, default=0.9, help=left_out)
    first = "This many first layers stay dense (default: half)."
    add("--dense_layers", type=count_or_zero, help=first)
    dense = "scored: tokens whose output the loss reads stay dense, but not in a causal LM."
    add("--dense_tokens", choices=["scored", "none"], default="scored", help=dense)
    scores = "Score channels exactly on a sample of tokens, or by a rank-8 SVD."
    add("--estimator", choices=["sample", "svd"], default="sample", help=scores)


# -------------------------------------------------------------------------------------- the maths


def sampled_scores(x, weights, biases, act):
    """‖z_j‖ of every channel j over the tokens x (T, in), as in section 3.1: (hidden,)."""
    z = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return channel_norms(z, act)


def channel_norms(z, act):
    """The norm over tokens of act(z), or of act(gate)·up in a gated block: (hidden,)."""
    return (act(z[0]) if len(z) == 1 else act(z[0]) * z[1]).norm(dim=0)


def svd_estimate(weight, k=8):
    """The paper's estimator (algorithm 1): P (in, k), R (k, out) with x·Wᵀ ≈ (x·P)·R of rank k.

    P holds W's top right singular vectors, the top eigenvectors of WᵀW; R = (W·P)ᵀ.
    """
    top = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, -k:].contiguous()
    return top, (weight @ top).T.contiguous()


def estimated_scores(x, factors, biases, act):
    """As sampled_scores, with each product replaced by its rank-8 estimate."""
    pairs = zip(factors, biases, strict=True)
    return channel_norms([F.linear(x @ P, R.T, bias) for (P, R), bias in pairs], act)


def layer_sparsity(layer, layers, sparsity, dense):
    """The fraction left out: 0 in the first `dense` layers, half of `sparsity` in the last."""
    return 0.0 if layer < dense else sparsity / 2 if layer == layers - 1 else sparsity


# ------------------------------------------------------------ sliced feed-forward layers


class StepState:
    """The training step that all sliced blocks (a list of BlockState) share."""

    def __init__(self, run, base):
        self.run, self.base, self.blocks = run, base, []
        self.sparse, self.step, self.sample = False, 0, None

    def begin(self, step, total):
        """Method.before_step: forget the last step's channels; the first steps stay dense."""
        self.sparse = step - 1 >= 0.05 * total  # section 3.3
        self.step, self.sample = step, None
        for block in self.blocks:
            block.picked = None

    def dense_positions(self, batch):
        """Flat positions of the batch's tokens that stay dense, or None."""
        if self.run.dense_tokens == "none" or self.base.task == "clm":  # of a causal LM: all
            return None
        return batch.output_positions

    def sampled_positions(self):
        """Flat positions (T,) of the tokens to score channels on: drawn once a step, without dense
        tokens, from the first CANDIDATES, which Method.tokens_together keeps in the first pass.
        """
        if self.run.plan:  # --plan's tensors have no values to look at
            return self.base.batch.token_positions[:SAMPLED]
        if self.sample is None:
            batch = self.base.batch.on_cpu or self.base.batch
            dense = self.dense_positions(batch)
            example = batch.token_positions // batch.ids.shape[1]
            first = leading_examples(example.bincount(), CANDIDATES)
            positions = batch.token_positions[example < first]
            sliced = positions if dense is None else positions[~torch.isin(positions, dense)]
            positions = sliced if len(sliced) else positions
            if self.run.estimator == "sample":
                generator = generator_for(self.run.seed, "channels", self.step)
                positions = positions[torch.randperm(len(positions), generator=generator)[:SAMPLED]]
            self.sample = positions.to(self.run.device, non_blocking=True)
        return self.sample


class BlockState:
    """What a block's SparseUp and SparseDown share; SparseUp sets picked, dense and shape."""

    def __init__(self, step, keep, score):
        self.step = step  # StepState
        self.keep, self.score = keep, score  # how many channels; the function that scores them
        self.picked = None  # (keep,) the channels of this step, sorted
        self.dense = None  # (D,) flat positions that stay dense, or None
        self.shape = None  # of the hidden states, (B, L, hidden)


class SparseUp(nn.Module):
    """The layer into a block's wide middle: computes the picked channels, all for dense tokens.

    While sparse it returns one flat vector: all tokens' picked channels, then all channels of the
    dense tokens. The activation before SparseDown is element-wise, so it takes any shape.
    """

    def __init__(self, base, block, first):
        super().__init__()
        self.base, self.block, self.first = base, block, first

    def forward(self, x):
        block, step = self.block, self.block.step
        weight, bias = self.base.weight, self.base.bias
        if not (self.training and step.sparse):
            return self.base(x)
        if self.first:
            block.dense, block.shape = step.dense_positions(step.base.batch), x.shape
            if block.picked is None:
                with torch.no_grad():  # so that --checkpointing recomputes what autograd saw
                    sample = x.flatten(0, -2)[step.sampled_positions()].to(weight.dtype)
                    scores = block.score(sample)
                block.picked = scores.topk(block.keep).indices.sort().values
        x, picked = x.flatten(0, -2), block.picked
        narrow = F.linear(x, weight[picked], None if bias is None else bias[picked])  # (B·L, keep)
        if block.dense is None:
            return narrow.flatten()
        return torch.cat([narrow.flatten(), F.linear(x[block.dense], weight, bias).flatten()])


class SparseDown(nn.Module):
    """The layer out of the wide middle: reads the picked channels, all for the dense tokens."""

    def __init__(self, base, block):
        super().__init__()
        self.base, self.block = base, block

    @property
    def weight(self):  # T5 reads its dtype
        return self.base.weight

    def forward(self, z):
        block, weight, bias = self.block, self.base.weight, self.base.bias
        if not (self.training and block.step.sparse):
            return self.base(z)
        tokens = block.shape[:-1].numel()
        narrow = z[: tokens * block.keep].view(tokens, block.keep)
        y = F.linear(narrow, weight[:, block.picked], bias)  # (B·L, out)
        if block.dense is not None:
            full = z[tokens * block.keep :].view(len(block.dense), weight.shape[1])
            y = y.index_copy(0, block.dense, F.linear(full, weight, bias).to(y.dtype))
        return y.view(*block.shape[:-1], -1)


def scoring_function(run, layers, act):
    """x (T, in) -> scores (hidden,) for a block's layers into the wide middle."""
    biases = [layer.bias for layer in layers]
    if run.estimator == "sample":
        return lambda x: sampled_scores(x, [layer.weight for layer in layers], biases, act)
    pairs = [svd_estimate(layer.weight.float()) for layer in layers]
    factors = [[part.to(run.device) for part in pair] for pair in pairs]
    return lambda x: estimated_scores(x.float(), factors, biases, act)


def slice_blocks(run, base):
    """Wrap the feed-forward layers of the deep blocks; returns (StepState, {block: channels})."""
    model, step, counts = base.model, StepState(run, base), {}
    act, blocks = activation(model.config), feed_forward_layers(model)
    if not blocks:
        kind = model.config.model_type
        fail(f"--model {run.model}: no plain feed-forward layers known in {kind}")
    for name, ends in blocks.items():
        for end in ends:
            if not is_linear(model.get_submodule(name + end)):
                fail(f"--targets: {end} is sliced here, so it cannot be adapted; leave it out")
    sliceable = len(blocks) - base.last_block_cut
    first = run.dense_layers
    if first is None:  # half, but at least one block is sliced
        first = max(0, min(len(blocks) // 2, sliceable - 1))
    if first >= sliceable:
        layers = f"the model has {len(blocks)} layers, {sliceable} of which can be sliced"
        fail(f"--dense_layers {first}: {layers}, so none would be")
    for i, (name, ends) in enumerate(blocks.items()):
        left_out = layer_sparsity(i, len(blocks), run.channel_sparsity, first)
        if left_out == 0 or i >= sliceable:
            continue
        *up, down = (model.get_submodule(name + end) for end in ends)
        keep = max(1, round(up[0].out_features * (1 - left_out)))
        block = BlockState(step, keep, scoring_function(run, up, act))
        for end, layer in zip(ends, up, strict=False):
            model.set_submodule(name + end, SparseUp(layer, block, first=layer is up[0]))
        model.set_submodule(name + ends[-1], SparseDown(down, block))
        step.blocks.append(block)
        counts[name.rstrip(".")] = keep
    if not counts:
        fail(f"--channel_sparsity {run.channel_sparsity:g}: no channel would be left out")
    return step, counts


# ------------------------------------------------------------------------------------- the method


def adapt(run, base):
    """Adapt every target layer as LoRA does, slice the feed-forward layers; returns the Method."""
    method = lora.adapt(run, base)
    step, counts = slice_blocks(run, base)
    method.tokens_together, method.before_step = CANDIDATES, step.begin
    method.report = lambda: {"channels_kept": counts}
    return method


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
