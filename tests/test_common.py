"""Batches, training and scoring: against plain loops, transformers' own losses, closed formulas."""

import base64
import json
import math
import random
import statistics
import weakref
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import EVERY, ready, result_of, rows_flags, stir, text_flags, trained

import baseline
import common
import lora
from harness import batches
from harness.models import compute_logits_in_fp32
from harness.splits import Split, flat
from harness.store import changing

HEADS = {"mlm": ("distilbert", "MaskedLM"), "clm": ("llama", "CausalLM")}


def binomial(successes, trials, p):
    """Whether a count is within five standard deviations of what probability p gives."""
    return abs(successes - trials * p) < 5 * math.sqrt(trials * p * (1 - p))


def blocks(task, n=200_000, vocab=1000, length=50):
    """A Data and a Split of random tokens in blocks of `length`; tokens 0 to 4 are not scored."""
    tokens = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(0))
    split = Split(tokens.int(), torch.arange(0, n + 1, length), None, tokens > 4)
    return Namespace(task=task, vocab_size=vocab, mask_id=4), split


def flags_of(task, models, reviews, text_dir):
    if task == "classification":
        return rows_flags(models, reviews)
    return text_flags(models, text_dir, *HEADS[task])


# ------------------------------------------------------------------------------- predicted tokens


def test_shares_of_masked_tokens():
    """15 % are predicted; of these 80 % read as the mask, 10 % as any token, 10 % as themselves."""
    data, split = blocks("mlm")
    inputs, flags, counts = batches.predicted_tokens(data, split, 0, 0)
    tokens, n = split.tokens, int(flags.sum())
    assert torch.equal(counts, flags.view(-1, 50).sum(1))
    assert torch.equal(inputs[~flags], tokens[~flags])
    assert not flags[~split.scorable].any() and binomial(n, int(split.scorable.sum()), 0.15)
    masked, same = (inputs == data.mask_id) & flags, (inputs == tokens) & flags
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
    seeds = ((0, 1), (1, 0), ("test",), ("dev",))
    others = [batches.predicted_tokens(data, split, *seed).is_predicted for seed in seeds]
    assert all(not torch.equal(first.is_predicted, flags) for flags in others)
    both = int((first.is_predicted & others[0]).sum())
    # Independent: 15 % of the first ones.
    assert binomial(both, int(first.is_predicted.sum()), 0.15)


# ---------------------------------------------------------------------------------------- batches


def batch_by_loop(task, last, examples, types, labels, inputs, flags):
    """The fields of a Batch as lists, token by token."""
    width = max(map(len, examples))
    ids, mask, segments, positions, outputs, target = [], [], [], [], [], []
    for i, example in enumerate(examples):
        n = len(example)
        ids.append([*inputs[i], *[0] * (width - n)])
        mask.append([int(j < n) for j in range(width)])
        segments.append([*types[i], *[0] * (width - n)])
        positions += [i * width + j for j in range(n)]
        if task == "classification":
            outputs.append(i * width + (n - 1 if last else 0))
            target.append(labels[i])
            continue
        for j in range(n):
            if flags[i][j]:
                outputs.append(i * width + j - (task == "clm"))  # the output before predicts it
                target.append(example[j])
    return ids, mask, segments, positions, outputs, target


@pytest.mark.parametrize(
    "task, last",
    [("classification", False), ("classification", True), ("mlm", False), ("clm", True)],
)
def test_collate_equals_a_plain_loop(task, last):
    draw = random.Random(0)
    examples = [[draw.randrange(12) for _ in range(draw.randint(1, 9))] for _ in range(40)]
    types = [[draw.randrange(2) for _ in example] for example in examples]
    labels = [draw.randrange(3) for _ in examples]
    tokens, starts = flat(examples)
    split = Split(tokens, starts, torch.tensor(labels), tokens > 4, flat(types)[0].to(torch.int8))
    data = Namespace(task=task, reads_last=last, pad_id=0, mask_id=4, vocab_size=12)
    targets = batches.predicted_tokens(data, split, 3, 0)
    inputs = [targets.inputs[part].tolist() for part in parts_of(split)]
    masked = torch.zeros_like(tokens) if targets.is_predicted is None else targets.is_predicted
    flags = [masked[part].tolist() for part in parts_of(split)]
    same = [i for i in range(40) if len(examples[i]) == 4]
    assert len(same) > 1
    for picked in ([7], [3, 1, 2], draw.sample(range(40), 40), [39, 0], same):
        batch = batches.collate(data, split, torch.tensor(picked), targets)
        columns = ([x[i] for i in picked] for x in (examples, types, labels, inputs, flags))
        wanted = batch_by_loop(task, last, *columns)
        if len({len(examples[i]) for i in picked}) == 1:  # nothing is padded: no mask
            assert batch.attention_mask is None
            batch = batch._replace(attention_mask=torch.tensor(wanted[1]))
        assert tuple(tensor.tolist() for tensor in batch[:-1]) == wanted
        assert {tensor.dtype for tensor in batch[:-1]} == {torch.int64}
        assert targets.counts[picked].sum() == len(batch.output_positions)
    split.types = None
    assert batches.collate(data, split, torch.tensor([7]), targets).types is None


@pytest.mark.parametrize("n, size", [(1, 4), (7, 8), (64, 8), (1001, 32)])
def test_an_epoch_has_every_example_once_and_the_least_padding(n, size):
    """And begins with the batch that has the most tokens."""
    lengths = torch.randint(1, 200, (n,), generator=torch.Generator().manual_seed(n))
    epoch = batches.length_grouped_batches(lengths, size, 3, 1)
    assert sorted(torch.cat(epoch).tolist()) == list(range(n))
    rest = [n % size] if n % size else []
    assert sorted(map(len, epoch)) == sorted([size] * (n // size) + rest)
    # The least padding that batches of this size can have: sorted by length, cut into pieces.
    ranked, tokens = sorted(lengths.tolist()), [len(b) * int(lengths[b].max()) for b in epoch]
    pieces = (ranked[i : i + size] for i in range(0, n, size))
    assert sum(tokens) == sum(len(piece) * max(piece) for piece in pieces)
    assert tokens[0] == max(tokens)


@pytest.mark.parametrize(
    "device, longest, together, sizes",
    [
        ("cuda", 512, 0, [16, 16, 8]),
        ("cpu", 64, 0, [16, 16, 8]),
        ("cpu", 512, 0, [2] * 20),
        ("cuda", 5, 30, [26, 14]),  # 25 examples of one token and the one of five
        ("cpu", 512, 600, [40]),
        ("cpu", 512, 511, [3, *[2] * 18, 1]),  # the first three; the fourth is the long one
    ],
)
def test_micro_batches(device, longest, together, sizes):
    """On a CPU no more than 1,024 padded tokens; each example once, in order."""
    examples = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:40]
    lengths = torch.ones(100, dtype=torch.int64)
    lengths[examples[3]] = longest
    run = Namespace(device=device)
    parts = batches.micro_batches(run, lengths, examples, 16, together)
    assert torch.equal(torch.cat(parts), examples) and list(map(len, parts)) == sizes
    assert batches.micro_batches(run, lengths, examples[:0], 16, together) == []


# ----------------------------------------------------------------------------------- the gradient


def gradients(run, data, base, method, examples):
    """The loss and the gradients that one optimizer step over `examples` would use."""
    base.model.zero_grad(set_to_none=True)
    base.model.train()
    tensors = common.trained_tensors(base.model)
    targets = batches.predicted_tokens(data, data.train, run.seed, 0)
    loss = common.gradient(run, data, base, method, examples, targets, tensors)
    return loss.item(), {name: tensor.grad.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["lora", "hira", "qlora", "full"])
@pytest.mark.parametrize("task", ["classification", "mlm", "clm"])
def test_neither_accumulation_nor_micro_batches_change_the_gradient(
    models, reviews, text_dir, tmp_path, name, task
):
    """32 examples at once, 4 × 8, or 7 at a time, though parts score unequal numbers of tokens.

    It is the gradient of the mean loss over the examples, computed here by plain autograd.
    """
    module, more = EVERY[name]
    flags = flags_of(task, models, reviews, text_dir)
    run, data, base, method = ready(module, tmp_path, *flags, *more, "--batch_size", 32)
    stir(base)
    examples = torch.tensor(random.Random(0).sample(range(len(data.train.lengths)), 32))
    targets = batches.predicted_tokens(data, data.train, run.seed, 0)
    parts, batch = [], batches.collate(data, data.train, examples, targets)
    for run.batch_size in (32, 8, 7):
        parts.append(gradients(run, data, base, method, examples))
    if task != "classification":
        assert len(set(targets.counts[examples].view(4, 8).sum(1).tolist())) > 1
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
    results = []
    for switch in ([], ["--checkpointing"]):
        flags = [*text_flags(models, text_dir), *more, *switch]
        run, data, base, method = ready(module, tmp_path, *flags)
        method.before_step(10, 10)  # past contextual LoRA's dense steps
        stir(base)
        calls = []
        block = base.model.base_model.get_submodule("transformer.layer.0.ffn")
        block.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results.append(gradients(run, data, base, method, torch.arange(8)))
        assert len(calls) == 1 + len(switch)  # with the flag the forward pass runs twice
    (loss, plain), (other, again) = results
    assert loss == other
    for key, grad in plain.items():
        torch.testing.assert_close(again[key], grad, rtol=1e-5, atol=1e-7)


def scale_at(step, total, warm):
    """step/warm while it warms up, then a line that would be 0 after the last step."""
    return step / warm if step <= warm else (total + 1 - step) / (total - warm)


@pytest.mark.parametrize("total, warmup, warm", [(10, 0.2, 2), (50, 0.06, 3), (1, 0.0, 0)])
def test_learning_rate_at_each_step(models, reviews, tmp_path, total, warmup, warm):
    """Adapter and head each rise to a peak of their own; the method hears of every step.

    The optimizer gets the mean loss's gradient, scaled to norm 1 where it is longer.
    """
    flags = ["--max_steps", total, "--warmup", warmup, "--lr", 3e-3, "--head_lr", 2e-4]
    flags += [*rows_flags(models, reviews), "--batch_size", 4, "--weight_decay", 0.1]
    run, data, base, method = ready(lora, tmp_path, *flags)
    heard, used, groups, got = [], [], [], {}
    with torch.no_grad():
        base.model.classifier.weight.mul_(200)  # so that the gradient is long
    examples = batches.length_grouped_batches(data.train.lengths, 4, run.seed, 0)[0]
    _, raw = gradients(run, data, base, method, examples)
    base.model.zero_grad()

    class Recorder(torch.optim.SGD):
        def step(self):
            if not heard[1:]:  # the first step
                got.update({name: tensor.grad.clone() for name, tensor in tensors.items()})
            heard.append("optimizer")
            used.append([group["lr"] for group in self.param_groups])
            groups.append([({*map(id, g["params"])}, g["weight_decay"]) for g in self.param_groups])

    method = replace(
        method,
        optimizer=Recorder,
        before_step=lambda *now: heard.append(now),
        after_step=lambda *now: heard.append(now),
    )
    tensors = common.trained_tensors(base.model)
    history = common.train(run, data, base, method)
    norm = torch.cat([grad.flatten() for grad in raw.values()]).norm()
    assert norm > 3 and got.keys() == raw.keys()
    for name, grad in raw.items():
        torch.testing.assert_close(got[name], grad / norm, rtol=1e-4, atol=1e-7)
    head = {id(tensors[name]) for name in base.head_names}
    rest = {id(tensor) for tensor in tensors.values()} - head
    assert all(each == [(rest, 0.1), (head, 0.1)] for each in groups) and len(head) == 4
    scales = [scale_at(step, total, warm) for step in range(1, total + 1)]
    if (total, warm) == (10, 2):
        assert scales == [1 / 2, 1, *(n / 8 for n in range(8, 0, -1))]
    np.testing.assert_allclose(used, [[3e-3 * scale, 2e-4 * scale] for scale in scales])
    steps = [(i + 1, lr) for i, (lr, _) in enumerate(used)]
    assert [(step, lr) for step, lr, _ in history.curve] == steps
    wanted = [((step, total), "optimizer", (step, total, lr)) for step, lr in steps]
    assert heard == [event for events in wanted for event in events]


@pytest.mark.parametrize("flags, lrs", [([], [5e-3]), (["--full"], [5e-3, 2e-4])])
def test_the_baselines_learning_rates(models, reviews, tmp_path, flags, lrs):
    """Where only the head is trained --lr is the head's; with --full it is the base's."""
    flags = [*rows_flags(models, reviews), *flags, "--lr", 5e-3, "--head_lr", 2e-4]
    run, _, base, method = ready(baseline, tmp_path, *flags)
    optimizer = common.make_optimizer(run, base, method)
    assert [group["lr"] for group in optimizer.param_groups] == lrs
    assert type(optimizer) is torch.optim.AdamW


def test_logits_are_gone_before_the_backward_pass(models, text_dir, tmp_path, monkeypatch):
    """A decoder's logits are its largest tensor: the loss keeps a copy of its own."""
    flags = text_flags(models, text_dir, "llama", "CausalLM")
    run, data, base, method = ready(lora, tmp_path, *flags)
    logits, alive, inner = [], [], common.forward

    def forward(base, batch):
        result = inner(base, batch)
        logits.append(weakref.ref(result))
        return result

    monkeypatch.setattr(common, "forward", forward)
    tensor = next(iter(common.trained_tensors(base.model).values()))
    tensor.register_hook(lambda _: alive.append(logits[-1]() is not None))
    gradients(run, data, base, method, torch.arange(2))
    assert alive and not any(alive)


@pytest.mark.parametrize("share", [None, 0.1])
def test_base_dropout(models, reviews, tmp_path, share):
    """Off by default whatever the checkpoint says; the flag brings it back, in training alone."""
    folder = models("distilbert", dropout=0.3, attention_dropout=0.2, seq_classif_dropout=0.4)
    flags = ["--dataset", reviews, "--max_length", 24, "--model", folder]
    flags += ["--base_dropout", share] if share else []
    run, data, base, method = ready(baseline, tmp_path, *flags)
    layers = [m.p for m in base.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert set(layers) == {share or 0.0} and len(layers) >= 4
    assert base.model.config.attention_dropout == (share or 0.0)
    examples = torch.arange(8)
    losses = {gradients(run, data, base, method, examples)[0] for _ in range(3)}
    assert (len(losses) > 1) == (share is not None)
    one, two = (common.evaluate(run, data, base) for _ in range(2))
    assert one == two  # scoring knows no dropout, whatever mode training left the model in


# ----------------------------------------------------------------------------------------- losses


def parts_of(split):
    """The slice of flat tokens of each example."""
    return [slice(int(a), int(b)) for a, b in zip(split.starts, split.starts[1:], strict=False)]


@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta", "gpt2", "llama"])
def test_perplexity_is_transformers_own(models, text_dir, tmp_path, kind):
    """Its losses of the test blocks, one by one, with labels of −100 where no token is scored.

    Perplexity is over tokens: the mean over blocks is another number.
    """
    causal = kind in ("gpt2", "llama")
    flags = text_flags(models, text_dir, kind, "CausalLM" if causal else "MaskedLM")
    run, data, base, _, history = trained(baseline, tmp_path, *flags)
    assert history.step == 0 and not common.trained_tensors(base.model)  # an LM has no new head
    auto = f"AutoModelFor{'CausalLM' if causal else 'MaskedLM'}"
    oracle = getattr(transformers, auto).from_pretrained(run.model).eval()
    split, targets = data.test, batches.predicted_tokens(data, data.test, "test")
    predicted = split.scorable if causal else targets.is_predicted
    labels = torch.where(predicted, split.tokens, -100).long()
    scored = [int((labels[part][causal:] != -100).sum()) for part in parts_of(split)]
    with torch.no_grad():
        losses = [
            oracle(input_ids=targets.inputs[None, part], labels=labels[None, part]).loss.item()
            for part in parts_of(split)
        ]
    nll = [loss * n if n else 0.0 for loss, n in zip(losses, scored, strict=True)]
    assert 0 < sum(scored) < len(split.tokens) and len(set(scored)) > 2
    shapes, head = [], base.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape.numel()))
    name = "causal_perplexity" if causal else "mlm_perplexity"
    for run.eval_batch_size in (1, 64):
        shapes.clear()
        result = common.evaluate(run, data, base)
        dev = batches.predicted_tokens(data, data.dev, "dev").counts.sum()
        assert sum(shapes) == 32 * (dev + sum(scored))  # only scored tokens reach the LM head
        metrics, examples = result["metrics"]["test"], result["test_examples"]
        assert metrics.keys() == {"loss", name} and not result["diverged"]
        assert metrics["loss"] == pytest.approx(sum(nll) / sum(scored), rel=1e-5)
        assert metrics[name] == pytest.approx(math.exp(metrics["loss"]))
        assert examples["scored"] == scored
        assert examples["nll"] == pytest.approx(nll, rel=1e-4, abs=1e-3)
    means = [loss for loss, n in zip(losses, scored, strict=True) if n]
    assert abs(np.mean(means) - metrics["loss"]) > 1e-4


@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta", "gpt2", "llama", "qwen2"])
def test_classification_loss_is_transformers_own(models, reviews, tmp_path, kind):
    """The mean over the test examples, each alone, of a checkpoint with its own head."""
    flags = rows_flags(models, reviews, kind, "SequenceClassification")
    run, data, base, _ = ready(baseline, tmp_path, *flags)
    assert base.head_names  # it is trained on
    auto, losses, right = transformers.AutoModelForSequenceClassification, [], []
    oracle = auto.from_pretrained(run.model).eval()
    for label, part in zip(data.test.labels, parts_of(data.test), strict=True):
        with torch.no_grad():
            output = oracle(input_ids=data.test.tokens[None, part], labels=label[None])
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
        ([i % 5 for i in range(203)], [i**2 % 4 for i in range(203)], 5),
    ],
)
def test_metrics_against_counting(monkeypatch, labels, predictions, classes):
    """score, summarize and evaluate over planted logits, examples of unequal length."""
    n = len(labels)
    split = Split(*flat([[i] * (1 + i % 3) for i in range(n)]), torch.tensor(labels), None)
    table = F.one_hot(torch.tensor(predictions), classes).float() * 3
    monkeypatch.setattr(common, "forward", lambda base, batch: table[batch.ids[:, 0]])
    names = [str(i) for i in range(classes)]
    data = Namespace(task="classification", reads_last=False, classes=names, pad_id=0)
    data.train = data.dev = data.test = split
    data.official = n - 1
    run = Namespace(device="cpu", precision="fp32", eval_batch_size=5, batch_size=5, lr=1.0, seed=0)
    run.test_only = False
    run.name, run.eval_only = "planted", None
    result = common.evaluate(
        run, data, common.Base(torch.nn.Identity(), [], "", 0, "classification")
    )
    right = -math.log(math.e**3 / (math.e**3 + classes - 1))
    for name, size in (("dev", n), ("test", n), ("official", n - 1)):
        pairs, f1 = list(zip(labels, predictions, strict=True))[:size], []
        for c in range(classes):
            precision = [y == c for y, p in pairs if p == c]
            recall = [p == c for y, p in pairs if y == c]
            if precision or recall:
                both = [sum(part) / max(1, len(part)) for part in (precision, recall)]
                f1.append(statistics.harmonic_mean(both))
        metrics = result["metrics"][name]
        hits = [y == p for y, p in pairs]
        assert metrics["accuracy"] == pytest.approx(np.mean(hits))
        assert metrics["f1"] == pytest.approx(np.mean(f1))
        losses = [right if hit else right + 3 for hit in hits]
        assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    hits = [y == p for y, p in zip(labels, predictions, strict=True)]
    assert bits(result["test_examples"]["correct"], n) == hits


# ----------------------------------------------------------------- losses that are NaN or infinite


@pytest.mark.parametrize("steps", [100, 2])
def test_a_loss_of_nan_ends_the_training(models, reviews, tmp_path, monkeypatch, capsys, steps):
    """Planted at step 2: a line with that step and learning rate; the run is scored as it is."""
    gradient, calls = common.gradient, []

    def broken(*args):
        calls.append(1)
        return gradient(*args) * (math.nan if len(calls) == 3 else 1)  # the first is a trial

    monkeypatch.setattr(common, "gradient", broken)
    flags = [*rows_flags(models, reviews), "--max_steps", steps, "--warmup", 0.5, "--lr", 1e-3]
    result, path = result_of(lora, tmp_path, *flags)
    lr = 1e-3 * scale_at(2, steps, steps / 2)
    assert f"the loss became NaN or infinite by step 2 (lr {lr:.3g}): " in capsys.readouterr().out
    assert len(calls) == 5  # memory's two
    assert len(result["curve"]) == (steps == 2) and not path.with_suffix(".checkpoint").exists()
    assert result["time"]["train_seconds"] > 0 and result["diverged"] and not result["untrained"]


@pytest.mark.parametrize("name, steps", [*((name, 5) for name in EVERY), ("lora", 1)])
def test_a_learning_rate_far_too_high(name, steps, models, reviews, tmp_path, capsys):
    """All examples are wrong, at 20 nats, and costs are measured. The last step may break it."""
    module, more = EVERY[name]
    flags = [*rows_flags(models, reviews), *more, "--max_steps", steps, "--head_lr", 1e-2]
    lrs = ["1e30", "1e-3"] if name == "lora" else ["1e30"]
    paths = module.main([*flags, "--timing", "--lr", *lrs, "--out", tmp_path])
    lost, *others = (json.loads(path.read_text(), parse_constant=pytest.fail) for path in paths)
    assert "have a loss of NaN or infinity and count as wrong" in capsys.readouterr().out
    for split in ("dev", "test", "merged"):
        if lost["metrics"][split]:  # a baseline has nothing to merge
            assert lost["metrics"][split] == {"accuracy": 0.0, "f1": 0.0, "loss": 20.0}
    assert not any(bits(lost["test_examples"]["correct"], lost["data"]["test"]))
    assert lost["diverged"] and all(lost[key] for key in ("memory", "flops", "parameters"))
    for other in others:  # the command continues
        assert not other["diverged"] and other["metrics"]["test"]["accuracy"] > 0


# ------------------------------------------------------------------------------ nothing is trained


@pytest.mark.parametrize("name", [name for name in EVERY if name != "head only"])
def test_no_epochs_score_the_adapted_model_before_training(models, reviews, tmp_path, name):
    """The base's own scores, as B is zero; QLoRA's are those of the base in 4 bits."""
    module, more = EVERY[name]
    flags = [*rows_flags(models, reviews, "distilbert", "SequenceClassification"), "--epochs", 0]
    losses = []
    for script, own in ((module, more), (baseline, [])):
        run, data, base, method = ready(script, tmp_path, *flags, *own)
        assert common.train(run, data, base, method).step == 0 and "-untrained" in run.path.name
        losses.append(common.evaluate(run, data, base)["metrics"]["test"]["loss"])
    close = losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert close != (name in ("qlora", "qhira", "contextual qlora"))


# -------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_ours_whatever_the_checkpoint_has(models, reviews, tmp_path, precision):
    run, _, base, _ = ready(lora, tmp_path, *rows_flags(models, reviews), "--precision", precision)
    for stored in (torch.float32, torch.bfloat16, torch.float16):
        base.model.to(stored)
        common.place(run, base)
        for name, tensor in base.model.named_parameters():
            rounded = precision == "bf16" and not tensor.requires_grad and tensor.ndim > 1
            assert tensor.dtype == (torch.bfloat16 if rounded else torch.float32), name


@pytest.mark.parametrize(
    "name, task", [*((name, "classification") for name in EVERY), ("lora", "mlm"), ("qlora", "clm")]
)
def test_bf16_on_a_cpu(models, reviews, text_dir, tmp_path, name, task):
    """Frozen matrices are bf16; what is trained is fp32, was never rounded, and moves."""
    module, more = EVERY[name]
    flags = [*flags_of(task, models, reviews, text_dir), *more, "--precision", "bf16"]
    run, data, base, method = ready(module, tmp_path, *flags, "--max_steps", 2, "--warmup", 0)
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


@pytest.mark.parametrize("task", ["classification", "mlm", "clm"])
def test_logits_are_not_rounded_to_bf16(models, reviews, text_dir, tmp_path, task):
    """They are the fp32 product of the head and its input; gradients are those of autograd."""
    flags = [*flags_of(task, models, reviews, text_dir), "--precision", "bf16"]
    run, data, base, _ = ready(lora, tmp_path, *flags)
    common.place(run, base)
    model, inputs = base.model.eval(), []
    head = model.classifier if task == "classification" else model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    targets = batches.predicted_tokens(data, data.train, 0, 0)
    batch = batches.collate(data, data.train, torch.arange(8), targets)
    with common.autocast(run):
        logits = common.forward(base, batch)
    assert head.weight.dtype == (torch.float32 if task == "classification" else torch.bfloat16)
    check_fp32(head, inputs[0].detach().flatten(0, -2), logits)
    large = torch.nn.Linear(8, 40_000, dtype=torch.bfloat16).requires_grad_(False)
    compute_logits_in_fp32(large)  # in pieces
    x = torch.randn(3, 8)
    check_fp32(large, x, large(x))


def check_fp32(head, x, logits):
    """logits (N, out) and their gradient against the fp32 product; bf16 would round them."""
    x, plain_x = (x.float().clone().requires_grad_(True) for _ in range(2))
    bias = None if head.bias is None else head.bias.float()
    plain = F.linear(plain_x, head.weight.float(), bias)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    torch.testing.assert_close(logits, plain, rtol=1e-6, atol=1e-6)
    factors = torch.randn(plain.shape)
    with torch.autocast("cpu", torch.bfloat16):
        ours = head(x)
    (ours * factors).sum().backward()
    (plain * factors).sum().backward()
    near = 1e-5 * float(plain_x.grad.abs().max())
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-5, atol=near)


# ------------------------------------------------------------------------------- the same, again


@pytest.mark.parametrize("name", EVERY)
def test_same_seed_same_run_bit_for_bit(models, reviews, tmp_path, name):
    """With dropout in base and adapter: alone, and after another seed in the same process."""
    module, more = EVERY[name]
    flags = [*rows_flags(models, reviews), *more, "--max_steps", 5, "--batch_size", 8]
    flags += ["--base_dropout", 0.1] + ["--dropout", 0.1] * (module is not baseline)
    outcomes = []
    for seed in (3, 4, 3):
        run, data, base, _, history = trained(module, tmp_path, *flags, "--seeds", seed)
        tensors = {key: tensor.clone() for key, tensor in changing(base.model).items()}
        outcomes.append((history.curve, common.evaluate(run, data, base), tensors))
    (curve, scores, tensors), (other, *_), (again, same_scores, same) = outcomes
    assert curve == again != other and scores == same_scores and tensors.keys() == same.keys()
    assert all(torch.equal(tensor, same[key]) for key, tensor in tensors.items())
