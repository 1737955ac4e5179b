"""Batches: which examples and tokens go through the model at once, and what it must predict.

Nothing here depends on a method or a model. `data` is common.Data, `split` one of its Splits.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from harness.process import process_count
from harness.splits import Split, generator_for


class Targets(NamedTuple):
    """What is read and what is to be predicted in one pass over a split."""

    inputs: torch.Tensor  # (total,) int32, tokens with masks in them
    is_predicted: torch.Tensor | None  # (total,) bool; None for labels
    counts: torch.Tensor  # (examples,) int64, how many of them an example has; 1 for a label


class Batch(NamedTuple):
    """One forward pass. Positions count through the flattened (B·L) batch."""

    ids: torch.Tensor  # (B, L) int64, padded
    attention_mask: torch.Tensor | None  # (B, L) int64, 0 on padding; None where there is none
    types: torch.Tensor | None  # (B, L) int64, which of an example's two texts a token is of
    token_positions: torch.Tensor  # (tokens,) int64, positions that are not padding
    output_positions: torch.Tensor  # (R,) int64, positions whose output is used
    target: torch.Tensor  # (R,) int64, labels or token ids
    on_cpu: "Batch | None" = None  # the batch before `to`: reading its values waits for no GPU

    def to(self, device):
        """The batch on `device`; pinned memory lets the copy to a GPU return at once."""
        tensors = [t.pin_memory() if "cuda" in device and t is not None else t for t in self[:-1]]
        moved = (t if t is None else t.to(device, non_blocking=True) for t in tensors)
        return Batch(*moved, on_cpu=self)


def predicted_tokens(data, split, *seed):
    """Which tokens a language model must predict, and what it reads, as Targets.

    Masked LM (BERT §3.1): 15 % of the tokens, of which 80 % are replaced by the mask, 10 % by a
    random token, 10 % kept. One vector of random numbers over the flat tokens decides, so that
    neither batch size nor order moves a mask. Causal LM: every token that has one before it.
    """
    tokens = split.tokens
    if data.task == "classification":
        return Targets(tokens, None, torch.ones_like(split.labels))
    if data.task == "clm":
        inputs, is_predicted = tokens, split.scorable.clone()
        is_predicted[split.starts[:-1]] = False
    else:
        u = torch.rand(len(tokens), dtype=torch.float64, generator=generator_for(*seed, "masks"))
        is_predicted = (u < 0.15) & split.scorable
        inputs = torch.where(is_predicted & (u < 0.12), data.mask_id, tokens)
        swapped = is_predicted & (u >= 0.12) & (u < 0.135)
        inputs[swapped] = ((u[swapped] - 0.12) / 0.015 * data.vocab_size).to(inputs.dtype)
    before = F.pad(is_predicted.cumsum(0), (1, 0))
    return Targets(inputs, is_predicted, before[split.starts[1:]] - before[split.starts[:-1]])


def collate(data, split, examples, targets):
    """The examples (n,) of a split as one padded Batch."""
    lengths = split.lengths[examples]
    column = torch.arange(int(lengths.max()))
    attended = column < lengths[:, None]  # (B, L)
    index = (split.starts[examples][:, None] + column).clamp(max=len(split.tokens) - 1)
    ids = torch.where(attended, targets.inputs[index], data.pad_id).long()
    attention_mask = None if attended.all() else attended.long()
    types = None if split.types is None else split.types[index].long() * attended
    token_positions = attended.flatten().nonzero()[:, 0]
    if data.task == "classification":  # the head reads one position: [CLS], or the last token
        output_positions = torch.arange(len(examples)) * len(column)
        if data.reads_last:
            output_positions += lengths - 1
        target = split.labels[examples]
    else:
        scored = attended & targets.is_predicted[index]
        target = split.tokens[index][scored].long()
        if data.task == "clm":  # the output at a token predicts the next one
            scored = F.pad(scored[:, 1:], (0, 1))
        output_positions = scored.flatten().nonzero()[:, 0]
    return Batch(ids, attention_mask, types, token_positions, output_positions, target)


def global_batch(run):
    """Examples of an optimizer step, over all micro-batches and processes."""
    return run.batch_size * run.grad_accum * process_count()


def length_grouped_batches(lengths, size, *seed):
    """Batches of `size` examples for one epoch: similar lengths together, batches in random order.

    Returns a list of index tensors that covers every example once; the last batch by length may be
    smaller. The batch with the most tokens comes first, so that running out of memory shows in the
    first step.
    """
    shuffled = torch.randperm(len(lengths), generator=generator_for(*seed, "order"))
    groups = shuffled[lengths[shuffled].argsort(stable=True)].split(size)
    batches = torch.randperm(len(groups), generator=generator_for(*seed, "batches")).tolist()
    largest = max(batches, key=lambda i: len(groups[i]) * lengths[groups[i][-1]])
    return [groups[i] for i in sorted(batches, key=lambda i: i != largest)]


def leading_examples(lengths, tokens):
    """How many of the first examples have at most `tokens` tokens in all; at least one."""
    return max(1, int((lengths.cumsum(0) <= tokens).sum()))


def micro_batches(run, lengths, examples, size, together=0):
    """Cut the examples (n,) of a batch into what goes through the model at once: `size` examples.

    On a CPU about 1,024 tokens, which takes less memory and as much time as whole batches
    (docs/speed.md). `lengths` is of all the split's examples. The leading examples with `together`
    tokens are not cut apart (Method.tokens_together).
    """
    if not len(examples):
        return []
    if "cpu" in run.device:
        size = max(1, min(size, 1024 // int(lengths[examples].max())))
    first = max(size, leading_examples(lengths[examples], together))
    return [batch for batch in (examples[:first], *examples[first:].split(size)) if len(batch)]


def count_steps(run, data):
    """Optimizer steps of the whole training."""
    per_epoch = math.ceil(len(data.train.lengths) / global_batch(run))
    return 0 if run.epochs == 0 else run.max_steps or run.epochs * per_epoch


def training_batches(run, data, first, total):
    """Yield (step, examples (n,), targets) of the steps first … total.

    Seed and epoch decide order and masks, so that a run that continues sees what it would have.
    """
    per_epoch = math.ceil(len(data.train.lengths) / global_batch(run))
    for step in range(first, total + 1):
        epoch, place_in_epoch = divmod(step - 1, per_epoch)
        if step == first or place_in_epoch == 0:
            targets = predicted_tokens(data, data.train, run.seed, epoch)
            lengths, size = data.train.lengths, global_batch(run)
            batches = length_grouped_batches(lengths, size, run.seed, epoch)
        yield step, batches[place_in_epoch], targets


def steps_of(run, data, method, steps):
    """The micro-batches of every step that ran, of all processes: [[examples (n,), …], …]."""
    steps_cut, lengths, processes = [], data.train.lengths, range(process_count())
    for _, examples, _ in training_batches(run, data, 1, steps):
        shares = (examples[number :: process_count()] for number in processes)
        cut = (
            micro_batches(run, lengths, share, run.batch_size, method.tokens_together)
            for share in shares
        )
        steps_cut.append(list(itertools.chain.from_iterable(cut)))
    return steps_cut


def scoring_batches(run, lengths):
    """What goes through the model at once while scoring: examples of similar length together."""
    batches = lengths.argsort(stable=True).split(run.eval_batch_size)
    cut = (micro_batches(run, lengths, batch, run.eval_batch_size) for batch in batches)
    return list(itertools.chain.from_iterable(cut))


def longest_and_shortest(data):
    """A Split of the longest example and the shortest of its split, and Targets: every token."""
    split = max((data.train, data.dev, data.test), key=lambda split: int(split.lengths.max()))
    pair = torch.stack([split.lengths.argmax(), split.lengths.argmin()])
    index = torch.cat([torch.arange(split.starts[i], split.starts[i + 1]) for i in pair])
    tokens, types = split.tokens[index], None if split.types is None else split.types[index]
    starts, labels = F.pad(split.lengths[pair].cumsum(0), (1, 0)), torch.zeros_like(pair)
    pair = Split(tokens, starts, labels, torch.ones_like(tokens, dtype=torch.bool), types)
    if data.task == "mlm":
        return pair, Targets(tokens, pair.scorable, pair.lengths)
    return pair, predicted_tokens(data, pair)
