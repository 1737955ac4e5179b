"""Batches, training and scoring: against plain loops, transformers' own losses, closed formulas."""

import base64
import json
import math
import random
import weakref
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    EVERY,
    ready,
    result_of,
    rows_flags,
    stir,
    text_flags,
    weights,
)

import common
import compare
import lora
from harness import results
from harness.splits import Split, flat

ADAPTED = [name for name in EVERY if name not in ("head only", "full")]


def binomial(successes, trials, p):
    """Whether a count is within five standard deviations of what probability p gives."""
    return abs(successes - trials * p) < 5 * math.sqrt(trials * p * (1 - p))


def blocks(task, n=200_000, vocab=1000, length=50):
    """A Data and a Split of random tokens in blocks of `length`; tokens 0 to 4 are not scored."""
    tokens = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(0))
    split = Split(tokens.int(), torch.arange(0, n + 1, length), None, tokens > 4)
    return Namespace(task=task, vocab=vocab, mask=4, pad=0, classes=None, reads_last=False), split


# ------------------------------------------------------------------------------- predicted tokens


def test_shares_of_masked_tokens():
    """15 % are predicted; of these 80 % read as the mask, 10 % as any token, 10 % as themselves."""
    data, split = blocks("mlm")
    inputs, flags, counts = batches.predicted_tokens(data, split, 0, 0)
    tokens, n = split.tokens, int(flags.sum())
    assert torch.equal(counts, flags.view(-1, 50).sum(1)) and torch.equal(
        inputs[~flags], tokens[~flags]
    )
    assert not flags[~split.scorable].any() and binomial(n, int(split.scorable.sum()), 0.15)
    masked, same = (inputs == data.mask) & flags, (inputs == tokens) & flags
    swapped = flags & ~masked & ~same
    # A random token is the mask, or by chance the same one, once in a thousand each.
    for kind, share in ((masked, 0.8001), (same, 0.1001), (swapped, 0.0998)):
        assert binomial(int(kind.sum()), n, share)
    drawn = inputs[swapped].long()
    assert drawn.min() >= 0 and drawn.max() < 1000
    for count in torch.histc(drawn.float(), 10, 0, 1000).tolist():  # all over the vocabulary
        assert binomial(count, len(drawn), 0.1)


def test_masks_move_with_seed_and_epoch_only():
    data, split = blocks("mlm", n=5000)
    first = batches.predicted_tokens(data, split, 0, 0)
    torch.manual_seed(99)  # whatever the global generator does
    again = batches.predicted_tokens(data, split, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    names = ((0, 1), (1, 0), ("test",), ("dev",))
    others = [batches.predicted_tokens(data, split, *each).flags for each in names]
    assert all(not torch.equal(first.flags, flags) for flags in others)
    both = int((first.flags & others[0]).sum())
    assert binomial(both, int(first.flags.sum()), 0.15)  # afresh: neither the rest nor the same


def test_what_a_causal_model_predicts():
    """Every scorable token that has one before it in its block; what it reads stays as it is."""
    data, split = blocks("clm", n=3000, vocab=12)
    inputs, flags, counts = batches.predicted_tokens(data, split, 0, 0)
    assert torch.equal(inputs, split.tokens) and counts.sum() == flags.sum()
    wanted = [i % 50 != 0 and token > 4 for i, token in enumerate(split.tokens.tolist())]
    assert flags.tolist() == wanted


# ---------------------------------------------------------------------------------------- batches


def by_loop(task, reads_last, rows, labels, inputs, flags):
    """(ids, mask, positions of real tokens, positions read, targets) of a batch, token by token."""
    width = max(map(len, rows))
    ids, mask, real, read, target = [], [], [], [], []
    for i, row in enumerate(rows):
        n = len(row)
        ids.append([*inputs[i], *[0] * (width - n)])
        mask.append([int(j < n) for j in range(width)])
        real += [i * width + j for j in range(n)]
        if task == "classification":
            read.append(i * width + (n - 1 if reads_last else 0))
            target.append(labels[i])
            continue
        for j in range(n):
            if flags[i][j]:
                read.append(i * width + j - (task == "clm"))  # the output before it predicts it
                target.append(row[j])
    return ids, mask, real, read, target


@pytest.mark.parametrize(
    "task, reads_last",
    [("classification", False), ("classification", True), ("mlm", False), ("clm", True)],
)
def test_collate_equals_a_plain_loop(task, reads_last):
    draw = random.Random(0)
    rows = [[draw.randrange(12) for _ in range(draw.randint(1, 9))] for _ in range(40)]
    labels = [draw.randrange(3) for _ in rows]
    tokens, starts = flat(rows)
    split = Split(tokens, starts, torch.tensor(labels), tokens > 4)
    data = Namespace(task=task, reads_last=reads_last, pad=0, mask=4, vocab=12)
    targets = batches.predicted_tokens(data, split, 3, 0)
    parts = [slice(int(a), int(b)) for a, b in zip(starts, starts[1:], strict=False)]
    inputs = [targets.inputs[part].tolist() for part in parts]
    flags = [None if targets.flags is None else targets.flags[part].tolist() for part in parts]
    same = [i for i in range(40) if len(rows[i]) == 4]
    assert len(same) > 1
    for picked in ([7], [3, 1, 2], draw.sample(range(40), 40), [39, 0], same):
        batch = batches.collate(data, split, torch.tensor(picked), targets)
        wanted = by_loop(
            task, reads_last, *([each[i] for i in picked] for each in (rows, labels, inputs, flags))
        )
        if len({len(rows[i]) for i in picked}) == 1:  # nothing is padded: no mask
            assert batch.mask is None
            batch = batch._replace(mask=torch.tensor(wanted[1]))
        assert tuple(tensor.tolist() for tensor in batch) == wanted
        assert {tensor.dtype for tensor in batch} == {torch.int64}
        assert targets.counts[picked].sum() == len(batch.output_positions)


@pytest.mark.parametrize("n, size", [(1, 4), (7, 8), (64, 8), (1001, 32)])
def test_order_covers_every_row_once_with_the_least_padding(n, size):
    """And begins with the batch that has the most tokens."""
    lengths = torch.randint(1, 200, (n,), generator=torch.Generator().manual_seed(n))
    batches = batches.length_grouped_batches(lengths, size, 3, 1)
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    rest = [n % size] if n % size else []
    assert sorted(map(len, batches)) == sorted([size] * (n // size) + rest)
    # The least padding that batches of this size can have: rows sorted by length, cut into pieces.
    ranked, tokens = sorted(lengths.tolist()), [len(b) * int(lengths[b].max()) for b in batches]
    pieces = (ranked[i : i + size] for i in range(0, n, size))
    assert sum(tokens) == sum(len(piece) * max(piece) for piece in pieces)
    assert tokens[0] == max(tokens)


def test_order_depends_on_seed_and_epoch_only():
    lengths = torch.randint(1, 30, (300,), generator=torch.Generator().manual_seed(0))

    def batches(*seed):
        return [batch.tolist() for batch in batches.length_grouped_batches(lengths, 16, *seed)]

    first = batches(5, 2)
    torch.manual_seed(123)
    assert first == batches(5, 2) and first not in (batches(5, 3), batches(6, 2))
    means = [float(lengths[batch].float().mean()) for batch in first[1:]]
    assert means != sorted(means) and means != sorted(means, reverse=True)  # long and short mixed
    company = {frozenset(batch) for batch in first}
    assert company != {frozenset(batch) for batch in batches(5, 3)}  # another one each epoch


@pytest.mark.parametrize(
    "device, longest, sizes",
    [
        ("cuda", 512, [16, 16, 8]),
        ("cpu", 64, [16, 16, 8]),
        ("cpu", 512, [2] * 20),
        ("cpu", 2000, [1] * 40),
    ],
)
def test_micro_batches(device, longest, sizes):
    """So many rows, on a CPU no more than 1,024 padded tokens; each row once, in order."""
    rows = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:40]
    lengths = torch.ones(100, dtype=torch.int64)
    lengths[rows[3]] = longest
    parts = batches.micro_batches(rows, lengths, 16, Namespace(device=device))
    assert torch.equal(torch.cat(parts), rows) and list(map(len, parts)) == sizes
    assert batches.micro_batches(rows[:0], lengths, 16, Namespace(device=device)) == []


@pytest.mark.parametrize("size, sizes", [(2, [2] * 5), (8, [8, 2]), (64, [10])])
def test_scoring_takes_its_own_batch_size(size, sizes):
    """--eval_batch_size may be above --batch_size; rows of like length go together."""
    run = Namespace(device="cuda", batch_size=4, eval_batch_size=size)
    lengths = torch.arange(10, 0, -1)
    parts = batches.scoring_parts(lengths, run)
    assert list(map(len, parts)) == sizes and torch.cat(parts).tolist() == [*range(9, -1, -1)]


# ----------------------------------------------------------------------------------- the gradient


def gradients(base, data, run, rows):
    """The loss and the gradients that one optimizer step over `rows` would use."""
    base.model.zero_grad(set_to_none=True)
    base.model.train()
    tensors = common.trained_tensors(base.model)
    targets = batches.predicted_tokens(data, data.train, run.seed, 0)
    loss = common.gradient(base, data, run, rows, targets, tensors)
    return loss.item(), {name: tensor.grad.clone() for name, tensor in tensors.items()}


def flags_of(task, models, reviews, text_dir):
    if task == "classification":
        return rows_flags(models, reviews)
    kind = ("distilbert", "MaskedLM") if task == "mlm" else ("llama", "CausalLM")
    return text_flags(models, text_dir, *kind)


@pytest.mark.parametrize("name", ["lora", "hira", "qlora", "full"])
@pytest.mark.parametrize("task", ["classification", "mlm", "clm"])
def test_neither_accumulation_nor_micro_batches_change_the_gradient(
    models, reviews, text_dir, tmp_path, monkeypatch, name, task
):
    """32 rows at once, 4 × 8, or 7 at a time, though the parts score unequal numbers of tokens.

    It is the gradient of the mean loss over the rows, computed here by plain autograd.
    """
    module, more = EVERY[name]
    flags = flags_of(task, models, reviews, text_dir)
    run, data, base, _ = ready(module, tmp_path, *flags, *more, "--batch_size", 32)
    stir(base)
    rows = torch.randperm(len(data.train.lengths), generator=torch.Generator().manual_seed(0))[:32]
    targets = batches.predicted_tokens(data, data.train, run.seed, 0)
    parts, batch = [], batches.collate(data, data.train, rows, targets)
    for size in (32, 8, 7):
        run.batch_size = size
        parts.append(gradients(base, data, run, rows))
    if task != "classification":
        assert len(set(targets.counts[rows].view(4, 8).sum(1).tolist())) > 1
    base.model.zero_grad()
    expected = F.cross_entropy(common.forward(base, batch), batch.target)
    expected.backward()
    for loss, grads in parts:
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for key, tensor in common.trained_tensors(base.model).items():
            assert tensor.grad.any() or tensor.ndim < 2, key
            torch.testing.assert_close(grads[key], tensor.grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["lora", "hira", "qlora", "contextual", "full"])
def test_checkpointing_gives_the_same_gradients(models, text_dir, tmp_path, name):
    module, more = EVERY[name]
    found = []
    for flag in ([], ["--checkpointing"]):
        words = [*text_flags(models, text_dir), *more, *flag]
        run, data, base, method = ready(module, tmp_path, *words)
        method.get("after_step", lambda *_: None)(10, 10, 0.0)  # contextual: past the dense steps
        stir(base)
        calls = []
        block = base.model.base_model.get_submodule("transformer.layer.0.ffn")
        handle = block.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append(gradients(base, data, run, torch.arange(8)))
        handle.remove()
        assert len(calls) == 1 + len(flag)  # with the flag the forward pass runs twice
    (loss, plain), (other, again) = found
    assert loss == other
    for key, grad in plain.items():
        torch.testing.assert_close(again[key], grad, rtol=1e-5, atol=1e-7)


def rate(step, total, warm):
    """step/warm while it warms up, then a line that would be 0 after the last step."""
    return step / warm if step <= warm else (total + 1 - step) / (total - warm)


@pytest.mark.parametrize(
    "total, warmup, warm", [(10, 0.2, 2), (50, 0.06, 3), (8, 0.0, 0), (1, 0.0, 0), (6, 0.5, 3)]
)
def test_learning_rate_at_each_step(models, reviews, tmp_path, total, warmup, warm):
    """Adapter and head each rise to a peak of their own; after_step hears the adapter's rate."""
    flags = ["--max_steps", total, "--warmup", warmup, "--lr", 3e-3, "--head_lr", 2e-4]
    words = [*rows_flags(models, reviews), *flags, "--batch_size", 4, "--weight_decay", 0.1]
    run, data, base, method = ready(lora, tmp_path, *words)
    heard, used, groups = [], [], []

    class Recorder(torch.optim.SGD):
        def step(self):
            used.append([group["lr"] for group in self.param_groups])
            groups.append(
                [(set(map(id, g["params"])), g["weight_decay"]) for g in self.param_groups]
            )

    recording = {"optimizer": Recorder, "after_step": lambda *now: heard.append(now)}
    history = common.train(base, data, run, method | recording)
    named = common.trained_tensors(base.model)
    head = {id(named[name]) for name in base.head}
    rest = {id(tensor) for tensor in named.values()} - head
    assert all(each == [(rest, 0.1), (head, 0.1)] for each in groups) and len(head) == 4
    scales = [rate(step, total, warm) for step in range(1, total + 1)]
    if (total, warm) == (10, 2):
        assert scales == [1 / 2, 1, *(n / 8 for n in range(8, 0, -1))]
    np.testing.assert_allclose(used, [[3e-3 * scale, 2e-4 * scale] for scale in scales])
    rates = [used[step][0] for step in range(total)]
    assert heard == [(0, total, 0.0), *((i + 1, total, lr) for i, lr in enumerate(rates))]
    assert [(step, lr) for step, lr, _ in history.curve] == [
        (i + 1, lr) for i, lr in enumerate(rates)
    ]


@pytest.mark.parametrize("flags, lr", [([], 5e-3), (["--full"], 5e-3)])
def test_the_baselines_rate(models, reviews, tmp_path, flags, lr):
    """Where only the head is trained --lr is the head's; with --full it is the base's."""
    words = [*rows_flags(models, reviews), *flags, "--lr", lr, "--head_lr", 2e-4]
    run, _, base, method = ready(common, tmp_path, *words)
    groups = common.make_optimizer(run, base, method).param_groups
    assert [group["lr"] for group in groups] == ([lr, 2e-4] if flags else [lr])
    assert type(common.make_optimizer(run, base, method)) is torch.optim.AdamW


def test_logits_are_gone_before_the_backward_pass(models, text_dir, tmp_path, monkeypatch):
    """A decoder's logits are its largest tensor: the loss keeps a copy of its own."""
    words = text_flags(models, text_dir, "llama", "CausalLM")
    run, data, base, _ = ready(lora, tmp_path, *words)
    logits, alive, inner = [], [], common.forward

    def forward(base, batch):
        result = inner(base, batch)
        logits.append(weakref.ref(result))
        return result

    monkeypatch.setattr(common, "forward", forward)
    tensors = common.trained_tensors(base.model)
    next(iter(tensors.values())).register_hook(lambda _: alive.append(logits[-1]() is not None))
    targets = batches.predicted_tokens(data, data.train, 0, 0)
    common.gradient(base, data, run, torch.arange(2), targets, tensors)
    assert alive and not any(alive)


def test_gradients_are_clipped_at_norm_one(models, reviews, tmp_path):
    """What the optimizer gets is the mean loss's gradient, scaled to norm 1 where it is longer."""
    words = [*rows_flags(models, reviews), "--full", "--max_steps", 1]
    run, data, base, _ = ready(common, tmp_path, *words)
    got = {}

    class Recorder(torch.optim.SGD):
        def step(self):
            named = common.trained_tensors(base.model).items()
            got.update({name: tensor.grad.clone() for name, tensor in named})

    with torch.no_grad():
        base.model.classifier.weight.mul_(200)  # so that the gradient is long
    rows = batches.length_grouped_batches(data.train.lengths, 32, run.seed, 0)[0]
    _, raw = gradients(base, data, run, rows)
    norm = torch.cat([grad.flatten() for grad in raw.values()]).norm()
    assert norm > 3
    base.model.zero_grad()
    common.train(base, data, run, {"optimizer": Recorder})
    for name, grad in raw.items():
        torch.testing.assert_close(got[name], grad / norm, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rate", [None, 0.1])
def test_base_dropout(models, reviews, tmp_path, rate):
    """Off by default whatever the checkpoint says; the flag brings it back, in training alone."""
    folder = models("distilbert", dropout=0.3, attention_dropout=0.2, seq_classif_dropout=0.4)
    words = ["--dataset", reviews, "--max_length", 24, "--model", folder]
    run, data, base, _ = ready(lora, tmp_path, *words, *(["--base_dropout", rate] if rate else []))
    modules = [m for m in base.model.modules() if isinstance(m, torch.nn.Dropout)]
    layers = [module.p for module in modules if "lora" not in str(type(module))]
    assert set(layers) == {rate or 0.0} | {0.0} and layers.count(rate or 0.0) >= 4
    assert base.model.config.attention_dropout == (rate or 0.0)
    rows = torch.arange(8)
    losses = {gradients(base, data, run, rows)[0] for _ in range(3)}
    assert (len(losses) > 1) == (rate is not None)
    one, two = (common.evaluate(run, data, base) for _ in range(2))
    assert one == two  # scoring knows no dropout, whatever mode training left the model in


def test_every_step_draws_its_own_dropout(models, reviews, tmp_path, monkeypatch):
    """The generator is seeded before each step by seed and step, alike for all methods."""
    gradient, seeds = common.gradient, {}
    for name, seed in (("lora", 0), ("hira", 0), ("lora", 1)):
        module, more = EVERY[name]
        drawn = seeds[name, seed] = []

        def record(*args, drawn=drawn):
            drawn.append(torch.initial_seed())
            return gradient(*args)

        words = [*rows_flags(models, reviews), *more, "--seeds", seed, "--max_steps", 6]
        run, data, base, method = ready(module, tmp_path, *words)
        monkeypatch.setattr(common, "gradient", record)
        common.train(run, data, base, method)
    one, hira, two = (drawn[1:] for drawn in seeds.values())  # but for the row tried first
    assert one == hira and len({*one, *two}) == 12


# ----------------------------------------------------------------------------------------- losses


def row_by_row(split):
    for start, end, row in zip(split.starts, split.starts[1:], range(10**9), strict=False):
        yield row, split.tokens[start:end].long()[None]


@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta"])
def test_masked_loss_is_transformers_own(models, text_dir, tmp_path, kind):
    """Only scored rows reach the LM head; the loss is that with labels of −100 elsewhere."""
    from transformers import AutoModelForMaskedLM

    run, data, base, _ = ready(common, tmp_path, *text_flags(models, text_dir, kind), "--full")
    oracle = AutoModelForMaskedLM.from_pretrained(run.model).eval()
    targets, shapes = batches.predicted_tokens(data, data.train, 0, 0), []
    rows = torch.arange(len(data.train.lengths))[-9:]
    batch = batches.collate(data, data.train, rows, targets)
    head = base.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape.numel()))
    base.model.eval()
    logits, n = common.forward(base, batch), len(batch.target)
    assert 0 < n < len(batch.token_positions) < batch.ids.numel() and shapes == [n * 32]
    labels = torch.full_like(batch.ids, -100)
    labels.view(-1)[batch.output_positions] = batch.target
    theirs = oracle(input_ids=batch.ids, attention_mask=batch.mask, labels=labels)
    assert abs(F.cross_entropy(logits, batch.target) - theirs.loss) < 1e-5
    torch.testing.assert_close(
        logits, theirs.logits.flatten(0, 1)[batch.output_positions], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_causal_loss_is_transformers_own(models, text_dir, tmp_path, kind):
    """As with labels = input ids, −100 where a token is not scored, over the whole test split.

    Perplexity is over tokens: the mean over blocks would be another number.
    """
    from transformers import AutoModelForCausalLM

    run, data, base, _ = ready(common, tmp_path, *text_flags(models, text_dir, kind, "CausalLM"))
    oracle = AutoModelForCausalLM.from_pretrained(run.model).eval()
    split, nll, scored = data.test, [], []
    for row, ids in row_by_row(split):
        flags = split.scorable[split.starts[row] : split.starts[row + 1]]
        labels = ids.masked_fill(~flags, -100)
        scored.append(int((labels[:, 1:] != -100).sum()))
        with torch.no_grad():
            loss = oracle(input_ids=ids, labels=labels).loss.item() if scored[-1] else 0.0
        nll.append(loss * scored[-1])
    assert not split.scorable.all() and len(set(scored)) > 2
    for run.eval_batch_size in (1, 64):
        result = common.evaluate(run, data, base)
        metrics, rows = result["metrics"]["test"], result["test_examples"]
        assert metrics.keys() == {"loss", "causal_perplexity"}
        assert metrics["loss"] == pytest.approx(sum(nll) / sum(scored), rel=1e-5)
        assert metrics["causal_perplexity"] == pytest.approx(math.exp(metrics["loss"]))
        assert rows["scored"] == scored and rows["nll"] == pytest.approx(nll, rel=1e-4)
    means = [loss / n for loss, n in zip(nll, scored, strict=True) if n]
    assert abs(np.mean(means) - metrics["loss"]) > 1e-4


def test_masked_perplexity_is_over_tokens_not_batches(models, text_dir, tmp_path):
    """exp(sum of negative log-likelihoods / scored tokens), each block by itself."""
    run, data, base, _ = ready(lora, tmp_path, *text_flags(models, text_dir))
    targets = batches.predicted_tokens(data, data.test, "test")
    base.model.eval()
    nll = []
    for row in range(len(data.test.lengths)):
        batch = batches.collate(data, data.test, torch.tensor([row]), targets)
        with torch.no_grad():
            chances = common.forward(base, batch).double().log_softmax(-1)
        nll.append(-sum(chances[i, token].item() for i, token in enumerate(batch.target)))
    counts = targets.counts.tolist()
    assert len(set(counts)) > 2
    for run.eval_batch_size in (1, 8, 64):
        result = common.evaluate(run, data, base)
        value = result["metrics"]["test"]["mlm_perplexity"]
        assert value == pytest.approx(math.exp(sum(nll) / sum(counts)), rel=1e-5)
        assert result["test_examples"]["scored"] == counts
        assert result["test_examples"]["nll"] == pytest.approx(nll, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta", "gpt2", "llama", "qwen2"])
def test_classification_loss_is_transformers_own(models, reviews, tmp_path, kind):
    """The mean over the test rows, one by one and unpadded, of a checkpoint with its own head."""
    from transformers import AutoModelForSequenceClassification

    words = rows_flags(models, reviews, kind, "SequenceClassification")
    run, data, base, _ = ready(common, tmp_path, *words)
    assert base.head  # it is trained on
    oracle, losses, right = AutoModelForSequenceClassification.from_pretrained(run.model), [], []
    oracle.eval()
    for row, ids in row_by_row(data.test):
        label = data.test.labels[row]
        with torch.no_grad():
            output = oracle(input_ids=ids, labels=label[None])
        losses.append(output.loss.item())
        right.append(output.logits.argmax().item() == label.item())
    for run.eval_batch_size in (1, 64):
        result = common.evaluate(run, data, base)
        metrics = result["metrics"]["test"]
        assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert metrics["accuracy"] == np.mean(right)
        assert bits(result["test_examples"]["correct"], 45) == right


def bits(text, n):
    unpacked = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))
    assert len(unpacked) == -(-n // 8) * 8 and not unpacked[n:].any()
    return unpacked[:n].astype(bool).tolist()


@pytest.mark.parametrize(
    "labels, predictions, classes",
    [
        ([0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 1, 0, 0, 0, 1, 1], 3),  # class 2 is never predicted
        ([0, 0, 1, 1], [0, 2, 1, 1], 3),  # class 2 is predicted, and nowhere right
        ([0, 0, 0, 1], [0, 0, 0, 0], 4),  # two classes nowhere at all: left out
        ([1, 1], [1, 1], 2),
        ([0, 1, 0, 1], [1, 0, 1, 0], 2),
        (torch.arange(203) % 5, torch.arange(203) ** 2 % 4, 5),
    ],
)
def test_metrics_against_counting(monkeypatch, labels, predictions, classes):
    """score, summarize and evaluate over planted logits, rows of unlike length."""
    labels, predictions = (torch.as_tensor(each).tolist() for each in (labels, predictions))
    n = len(labels)
    split = Split(*flat([[i] * (1 + i % 3) for i in range(n)]), torch.tensor(labels), None)
    table = F.one_hot(torch.tensor(predictions), classes).float() * 3
    monkeypatch.setattr(common, "forward", lambda base, batch: table[batch.ids[:, 0]])
    official = n - 1
    names = [str(i) for i in range(classes)]
    data = common.Data(
        "classification", False, names, 0, None, n, split, split, split, official, {}
    )
    run = Namespace(device="cpu", precision="fp32", eval_batch_size=5, batch_size=5, lr=1.0, seed=0)
    run.name = "planted"
    base = common.Base(torch.nn.Identity(), [], "", 0)
    result = common.evaluate(run, data, base)
    right = -math.log(math.e**3 / (math.e**3 + classes - 1))
    for name, size in (("dev", n), ("test", n), ("official", official)):
        pairs, f1 = list(zip(labels, predictions, strict=True))[:size], []
        for c in range(classes):
            tp = sum(y == c == p for y, p in pairs)
            fp, fn = (sum(pair[i] == c != pair[1 - i] for pair in pairs) for i in (1, 0))
            if tp + fp + fn:
                precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
                f1.append(2 * precision * recall / (precision + recall) if tp else 0)
        metrics = result["metrics"][name]
        hits = [y == p for y, p in pairs]
        assert metrics["accuracy"] == pytest.approx(np.mean(hits))
        assert metrics["f1"] == pytest.approx(np.mean(f1))
        losses = [right if hit else right + 3 for hit in hits]
        assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert bits(result["test_examples"]["correct"], n) == [
        y == p for y, p in zip(labels, predictions, strict=True)
    ]


# ----------------------------------------------------------------------- losses that are not finite


@pytest.mark.parametrize("steps", [100, 2])
def test_a_loss_that_is_not_finite_ends_the_training(
    models, reviews, tmp_path, monkeypatch, capsys, steps
):
    """Planted at step 2: a line with that step and its rate; the run is scored as it is."""
    gradient, calls = common.gradient, []

    def broken(*args):
        calls.append(1)
        return gradient(*args) * (math.nan if len(calls) == 3 else 1)  # the first is a trial

    monkeypatch.setattr(common, "gradient", broken)
    words = [*rows_flags(models, reviews), "--max_steps", steps, "--warmup", 0.5, "--lr", 1e-3]
    result, path = result_of(lora, tmp_path, *words)
    lr = 1e-3 * rate(2, steps, steps / 2)
    assert f"not finite at step 2, rate {lr:.3g}: training ends" in capsys.readouterr().out
    assert len(calls) == 5  # memory's two
    assert len(result["curve"]) == (steps == 2) and not path.with_suffix(".checkpoint").exists()
    assert result["time"]["train_seconds"] > 0 and not result["untrained"]


def compare_all(folder):
    return [compare.analyse(runs, None) for runs in compare.group_runs(results.load([folder])[0])]


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", EVERY)
def test_a_rate_far_too_high_is_a_run_that_dev_never_chooses(
    name, steps, models, reviews, tmp_path, capsys
):
    """All rows wrong, at 20 nats; the next rate runs. The last step may be what breaks it."""
    module, more = EVERY[name]
    words = [*rows_flags(models, reviews), *more, "--max_steps", steps, "--head_lr", 1e-2]
    paths = module.main([*map(str, words), "--lr", "1e30", "1e-3", "--out", str(tmp_path)])
    lost, other = (json.loads(path.read_text(), parse_constant=pytest.fail) for path in paths)
    assert "rows have a loss that is not finite" in capsys.readouterr().out
    for split in ("dev", "test", "merged"):
        if lost["metrics"][split]:  # a baseline has nothing to merge
            assert lost["metrics"][split] == {"accuracy": 0.0, "f1": 0.0, "loss": 20.0}
    assert set(bits(lost["test_examples"]["correct"], lost["data"]["test"])) == {False}
    assert lost["memory"].keys() == other["memory"].keys() and lost["flops"] and lost["parameters"]
    (group,) = compare_all(tmp_path)
    [row] = group["test_examples"]
    assert row["chosen"] == [1e-3] and row["dev"][1e30] == [0.0]


def test_a_lost_language_model_scores_as_a_guess_among_e_to_the_20(models, text_dir, tmp_path):
    words = [
        *text_flags(models, text_dir),
        "--max_steps",
        1,
        "--lr",
        1e30,
    ]
    result, _ = result_of(lora, tmp_path, *words)
    assert result["metrics"]["dev"]["mlm_perplexity"] == pytest.approx(math.exp(20))
    nll, scored = (np.array(result["test_examples"][key]) for key in ("nll", "scored"))
    assert (nll == 20 * scored).all() and compare_all(tmp_path)[0]["test_examples"]


# ------------------------------------------------------------------------------ nothing is trained


def test_an_untrained_base_is_scored_as_it_is(models, text_dir, tmp_path):
    """python common.py on an LM: there is no head to train."""
    words = text_flags(models, text_dir, "gpt2", "CausalLM")
    result, path = result_of(common, tmp_path, *words)
    run, data, base, _ = ready(common, tmp_path / "again", *words)
    assert common.evaluate(run, data, base)["metrics"]["test"] == result["metrics"]["test"]
    assert result["untrained"] and result["curve"] == [] and result["parameters"]["trainable"] == 0
    assert result["name"] == "head_only" and result["metrics"]["merged"] is None


@pytest.mark.parametrize("name", EVERY)
def test_no_epochs_score_the_adapted_model_before_training(models, reviews, tmp_path, name):
    """The base's own scores, as B is zero; QLoRA's are those of the base in 4 bits."""
    module, more = EVERY[name]
    words = [*rows_flags(models, reviews, "distilbert", "SequenceClassification"), "--epochs", 0]
    result, path = result_of(module, tmp_path, *words, *more, "--lr", 1e-3, 2e-3)
    assert (
        result["untrained"] and "-untrained" in path.name and result["time"]["train_seconds"] == 0
    )
    base, *_ = result_of(common, tmp_path / "base", *words)
    close = result["metrics"]["test"]["loss"] == pytest.approx(
        base["metrics"]["test"]["loss"], rel=1e-5
    )
    assert close != (name in ("qlora", "qhira", "sparse qlora"))


# -------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_ours_whatever_the_checkpoint_is_stored_in(
    models, reviews, tmp_path, stored, precision
):
    words = [*rows_flags(models, reviews), "--precision", precision]
    run, _, base, _ = ready(lora, tmp_path, *words)
    for tensor in base.model.parameters():
        tensor.data = tensor.data.to(stored)
    common.place(run, base)
    for name, tensor in base.model.named_parameters():
        rounded = precision == "bf16" and not tensor.requires_grad and tensor.ndim > 1
        assert tensor.dtype == (torch.bfloat16 if rounded else torch.float32), name


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_bf16_on_a_cpu(models, reviews, text_dir, tmp_path, name, task):
    """Frozen matrices are bf16; what is trained is fp32, was never rounded, and moves."""
    module, more = EVERY[name]
    flags = rows_flags(models, reviews)
    if task == "mlm":
        flags = text_flags(models, text_dir, head="")
    words = [*flags, *more, "--precision", "bf16", "--max_steps", 2, "--warmup", 0]
    run, data, base, method = ready(module, tmp_path, *words)
    before = {key: tensor.detach().clone() for key, tensor in base.model.named_parameters()}
    common.place(run, base)
    for key, tensor in base.model.named_parameters():
        frozen_matrix = not tensor.requires_grad and tensor.ndim > 1
        assert tensor.dtype == (torch.bfloat16 if frozen_matrix else torch.float32), key
        assert frozen_matrix or torch.equal(tensor, before[key]), key
    common.train(run, data, base, method)
    for key, tensor in common.trained_tensors(base.model).items():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()
        moved = not torch.equal(tensor, before[key])
        assert moved or tensor.ndim < 2, key  # a key's bias has no gradient
    first, second = common.evaluate(run, data, base), common.evaluate(run, data, base)
    assert first == second and math.isfinite(first["metrics"]["test"]["loss"])


# ------------------------------------------------------------------------------- the same, again


@pytest.mark.parametrize("name", EVERY)
def test_same_seed_same_run_bit_for_bit(models, reviews, tmp_path, name):
    """With dropout in base and adapter; after another seed in one process, or alone."""
    module, flags = EVERY[name]
    flags = [*flags, *rows_flags(models, reviews), "--max_steps", 5, "--batch_size", 8]
    flags += [
        "--base_dropout",
        0.1,
        *(["--dropout", 0.1] if name in ADAPTED else []),
    ]
    _, first = module.main([*flags, "--out", tmp_path / "a", "--seeds", 4, 3])
    [again] = module.main([*flags, "--out", tmp_path / "b", "--seeds", 3])
    one, two = (json.loads(path.read_text()) for path in (first, again))
    for key in ("curve", "metrics", "rows", "info", "parameters", "settings", "data", "flops"):
        assert one[key] == two[key], key
    assert one["memory"] == two["memory"] and weights(first) == weights(again)
