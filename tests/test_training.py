"""The training loop, scoring and the result file, against transformers' own losses, closed formulas and plain loops."""

import base64
import gc
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, sentences, write_rows
from safetensors.torch import load_file

import common
import hira
import lora
import qlora
import sparse_lora

ROOT = Path(__file__).parents[1]
EVERY = {  # each way of training: its script and flags
    "head only": (common, []), "full": (common, ["--full"]), "lora": (lora, []), "hira": (hira, []),
    "qlora": (qlora, ["--nf4_backend", "torch"]), "prune": (sparse_lora, []),
    "contextual": (sparse_lora, ["--mode", "contextual", "--dense_layers", "0"])}


def ready(module, out, *words):
    """What main makes of a command line before it trains: (run, data, model, method)."""
    args = module.parse_args(module.__doc__, module.__file__, module.add_args, ["--out", out, *words])
    run = next(common.runs(args))
    data = common.load_data(run)
    model = common.load_base(run, data)
    return run, data, model, module.adapt(model, run)


def rows_flags(models, reviews, kind="distilbert", head=""):
    return ["--dataset", reviews, "--model", models(kind, head), "--max_length", 24]


def text_flags(models, text_dir, kind="distilbert", head="MaskedLM"):
    return ["--dataset", "wikitext2", "--data_dir", text_dir, "--model", models(kind, head), "--max_length", 16]


def stir(model):
    """Move B away from zero, where A has no gradient."""
    torch.manual_seed(5)
    for module in common.adapters(model).values():
        if "B" in module.keys:  # NF4Linear has nothing of the kind
            module.B.data.normal_(0, 0.2)


def files(folder):
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


def weights(path):
    """The adapter that lies beside a result file: {name: the tensor's bytes}."""
    tensors = load_file(path.with_suffix("") / "adapter_model.safetensors")
    return {name: (tensor.shape, tensor.numpy().tobytes()) for name, tensor in tensors.items()}


def ended(capfd, module, *words):
    """The exit status of a main that must end the program, and the one line that it wrote to stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main(list(words))
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n"), error
    return stop.value.code, error


@pytest.fixture(scope="module", autouse=True)
def light():
    """One thread, and imported modules out of the garbage collector's sight: each run collects twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick(monkeypatch):
    """Leave out what takes longest in a tiny run: timing the inference."""
    monkeypatch.setattr(common, "time_inference", lambda model, data, run, dtype, rows: {"batch": rows})


# ------------------------------------------------------------------------------------------------ seeds


@pytest.mark.parametrize("name", EVERY)
def test_same_seed_same_run(models, reviews, tmp_path, quick, name):
    """Bit for bit, with dropout in the base and in the adapter."""
    module, flags = EVERY[name]
    model = models("distilbert", dropout=0.1, attention_dropout=0.1)
    flags = [*flags, *rows_flags(models, reviews), "--model", model, "--epochs", 1]
    flags += ["--dropout", 0.1] if module is not common else []
    _, first = module.main([*flags, "--out", tmp_path / "a", "--seeds", 4, 3]) if name == "lora" else (
        None, *module.main([*flags, "--out", tmp_path / "a", "--seeds", 3]))  # after another seed in one process, or alone
    [again] = module.main([*flags, "--out", tmp_path / "b", "--seeds", 3])
    one, two = (json.loads(path.read_text()) for path in (first, again))
    for key in ("curve", "metrics", "correct", "method_info", "parameters", "args", "flops"):
        assert one[key] == two[key], key
    assert weights(first) == weights(again)


@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_every_method_sees_the_same_batches_and_head(models, reviews, text_dir, tmp_path, monkeypatch, task):
    """At one seed: ids, masks and targets of every training batch in order, and the head before the first step."""
    flags = rows_flags(models, reviews) if task == "classification" else text_flags(models, text_dir, head="")
    seen, heads, collate = {}, {}, common.collate
    for name, (module, more) in EVERY.items():
        run, data, model, method = ready(module, tmp_path / name, *flags, *more, "--seeds", 2, "--epochs", 2,
                                         "--batch_size", 20)
        heads[name] = {key: dict(model.named_parameters())[key].detach().clone() for key in run.head}
        batches = seen[name] = []

        def record(data, split, rows, *more, batches=batches):
            batches.append((rows.clone(), *collate(data, split, rows, *more)))
            return collate(data, split, rows, *more)
        monkeypatch.setattr(common, "collate", record)
        common.train(model, data, run, method)
        monkeypatch.setattr(common, "collate", collate)
    steps = 2 * math.ceil(len(data.train.rows) / 20)
    assert steps > 4 and len(heads["lora"]) > 2
    for name in EVERY:
        assert len(seen[name]) == steps
        for ours, theirs in zip(seen[name], seen["lora"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name
        assert heads[name].keys() == heads["lora"].keys()
        assert all(torch.equal(heads[name][key], heads["lora"][key]) for key in heads["lora"]), name


@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_every_epoch_has_its_own_batches_and_masks(models, reviews, text_dir, tmp_path, monkeypatch, task):
    flags = rows_flags(models, reviews) if task == "classification" else text_flags(models, text_dir)
    run, data, model, method = ready(lora, tmp_path, *flags, "--epochs", 2, "--batch_size", 20)
    seen, collate = [], common.collate

    def record(data, split, rows, *more):
        batch = collate(data, split, rows, *more)
        seen.append({row: scored for row, scored in zip(rows.tolist(), batch.scored.tolist(), strict=True)})
        return batch
    monkeypatch.setattr(common, "collate", record)
    common.train(model, data, run, method)
    epochs = seen[:len(seen) // 2], seen[len(seen) // 2:]
    one, two = ({row: [i for i, mark in enumerate(marks) if mark] for batch in epoch for row, marks in batch.items()}
                for epoch in epochs)
    assert {frozenset(batch) for batch in epochs[0]} != {frozenset(batch) for batch in epochs[1]}
    assert one.keys() == two.keys() and (one != two) == (task == "mlm")


@pytest.mark.parametrize("kind, head", [("distilbert", "MaskedLM"), ("gpt2", "CausalLM")])
def test_a_subset_of_blocks_is_what_trains_and_what_scores(models, text_dir, tmp_path, monkeypatch, kind, head):
    run, data, model, method = ready(lora, tmp_path, *text_flags(models, text_dir, kind, head), "--train_samples", 8,
                                     "--eval_samples", 5, "--epochs", 1, "--batch_size", 4)
    used, collate = {id(data.train): [], id(data.eval): []}, common.collate

    def record(data, split, rows, *more):
        used[id(split)] += rows.tolist()
        return collate(data, split, rows, *more)
    monkeypatch.setattr(common, "collate", record)
    common.train(model, data, run, method)
    common.score(model, data, run)
    for split in (data.train, data.eval):
        assert sorted(used[id(split)]) == split.rows.tolist() != list(range(len(split.rows)))


def test_scoring_knows_no_dropout(models, reviews, tmp_path):
    """Whatever mode training left the model in."""
    rates = {"dropout": 0.5, "attention_dropout": 0.5, "seq_classif_dropout": 0.5}
    run, data, model, _ = ready(lora, tmp_path, "--dataset", reviews, "--max_length", 24, "--dropout", 0.5,
                                "--model", models("distilbert", **rates))
    assert common.score(model.train(), data, run) == common.score(model.eval(), data, run)


def test_every_step_draws_its_own_dropout(models, reviews, tmp_path, monkeypatch):
    """The generator is seeded before each step: by the run's seed and the step, alike for all methods."""
    backward, seeds = common.backward, {}
    for name, seed in (("lora", 0), ("hira", 0), ("lora", 1)):
        module, more = EVERY[name]
        drawn = seeds[name, seed] = []

        def record(*args, drawn=drawn):
            drawn.append(torch.initial_seed())
            return backward(*args)
        run, data, model, method = ready(module, tmp_path, *rows_flags(models, reviews), *more, "--seeds", seed,
                                         "--max_steps", 6)
        monkeypatch.setattr(common, "backward", record)
        common.train(model, data, run, method)
    assert seeds["lora", 0] == seeds["hira", 0] and len(set(seeds["lora", 0] + seeds["lora", 1])) == 12


def test_seeds_move_head_adapter_order_and_masks(models, text_dir, tmp_path):
    parts = []
    for seed in (0, 1):
        run, data, model, _ = ready(lora, tmp_path, *text_flags(models, text_dir, head=""), "--seeds", seed)
        named = dict(model.named_parameters())
        _, flags = common.predicted_tokens(data, data.train, run.seed, 0)
        order = torch.cat(common.order(data.train.lengths, 8, run.seed, 0))
        parts.append([named["vocab_transform.weight"], next(iter(common.adapters(model).values())).A, flags, order])
    assert all(not torch.equal(a, b) for a, b in zip(*parts, strict=True))


def test_two_seeds_are_two_runs_on_the_same_rows(models, reviews, tmp_path, quick):
    paths = lora.main([*rows_flags(models, reviews), "--max_steps", 3, "--seeds", 0, 1, "--out", tmp_path])
    one, two = (json.loads(path.read_text()) for path in paths)
    assert [point["train_loss"] for point in one["curve"]] != [point["train_loss"] for point in two["curve"]]
    assert one["split"] == two["split"] and weights(paths[0]) != weights(paths[1])


# ------------------------------------------------------------------------------------------------ gradients and schedule


def gradients(run, data, model, rows):
    """The gradients that one optimizer step over `rows` would use, and its loss."""
    model.zero_grad(set_to_none=True)
    model.train()
    inputs, flags = common.predicted_tokens(data, data.train, run.seed, 0)
    history = SimpleNamespace(rows=0, tokens=0, padded=0)
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    loss = common.backward(model, data, run, rows, inputs, flags, history, trained)
    return loss, {name: tensor.grad.clone() for name, tensor in trained.items()}


@pytest.mark.parametrize("name", ["lora", "hira", "qlora", "full"])
@pytest.mark.parametrize("task", ["classification", "mlm", "clm"])
def test_accumulation_does_not_change_the_gradient(models, reviews, text_dir, tmp_path, name, task):
    """4 × 8 rows give the gradient and loss of 32, also where the micro-batches hold unequal numbers of scored tokens."""
    module, more = EVERY[name]
    flags = {"classification": lambda: rows_flags(models, reviews), "mlm": lambda: text_flags(models, text_dir),
             "clm": lambda: text_flags(models, text_dir, "llama", "CausalLM")}[task]()
    found = []
    for split in (["--batch_size", 32], ["--batch_size", 8, "--grad_accum", 4]):
        run, data, model, _ = ready(module, tmp_path, *flags, *more, *split)
        stir(model)
        rows = torch.randperm(len(data.train.rows), generator=torch.Generator().manual_seed(0))[:32]
        found.append(gradients(run, data, model, data.train.rows[rows]))
        assert [len(b) for b in common.order(data.train.lengths, run.batch_size * run.grad_accum, 0, 0)][0] <= 32
    if task != "classification":
        _, scored = common.predicted_tokens(data, data.train, run.seed, 0)
        counts = common.scored_per_row(data.train, scored)[data.train.rows[rows]].view(4, 8).sum(1)
        assert len(set(counts.tolist())) > 1
    (loss, one), (other, four) = found
    assert abs(loss - other) < 1e-6 and all(float(g.abs().max()) > 0 for g in one.values() if g.ndim > 1)
    for key in one:
        assert torch.allclose(one[key], four[key], rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("name", ["lora", "hira", "qlora", "contextual", "full"])
def test_checkpointing_gives_the_same_gradients(models, text_dir, tmp_path, name):
    module, more = EVERY[name]
    found = []
    for flag in ([], ["--checkpointing"]):
        run, data, model, method = ready(module, tmp_path, *text_flags(models, text_dir), *more, *flag)
        method.get("after_step", lambda *_: None)(10, 10, 0.0)  # contextual: past the dense steps
        stir(model)
        calls = []
        block = model.base_model.get_submodule("transformer.layer.0.ffn")
        handle = block.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append(gradients(run, data, model, data.train.rows[:8]))
        handle.remove()
        assert len(calls) == 1 + len(flag)  # with the flag the forward pass of a block runs twice
    (loss, plain), (other, again) = found
    assert loss == other
    for key in plain:
        assert torch.allclose(plain[key], again[key], rtol=1e-5, atol=1e-7), key


def schedule(step, total, warm):
    """The closed formula: step/warm up to the last step of the warm-up, then a line that would reach 0 after the last step."""
    return step / warm if step <= warm else (total + 1 - step) / (total - warm)


@pytest.mark.parametrize("total, warmup, warm", [(10, 0.2, 2), (50, 0.06, 3), (8, 0.0, 0), (1, 0.0, 0), (6, 0.5, 3)])
def test_learning_rate_at_each_step(models, reviews, tmp_path, total, warmup, warm):
    """Adapter and head each rise to their own peak and fall in step; after_step hears the adapter's."""
    run, data, model, method = ready(lora, tmp_path, *rows_flags(models, reviews), "--max_steps", total, "--warmup", warmup,
                                     "--lr", 3e-3, "--head_lr", 2e-4, "--batch_size", 4, "--weight_decay", 0.1)
    heard, used = [], []
    head = {id(tensor) for name, tensor in model.named_parameters() if name in run.head}

    class Recorder(torch.optim.SGD):
        def step(self):
            used.append([group["lr"] for group in self.param_groups])
            assert [{id(tensor) in head for tensor in group["params"]} for group in self.param_groups] == [{False}, {True}]
            assert [group["weight_decay"] for group in self.param_groups] == [0.1, 0.1]
    history = common.train(model, data, run, method | {
        "optimizer": Recorder, "after_step": lambda *now: heard.append(now)})
    wanted = [schedule(step, total, warm) for step in range(1, total + 1)]
    if (total, warm) == (10, 2):
        assert wanted == [1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert np.allclose(used, [[3e-3 * scale, 2e-4 * scale] for scale in wanted], rtol=1e-9)
    assert [(step, of) for step, of, _ in heard] == [(step, total) for step in range(total + 1)]
    assert heard[0][2] == 0 and np.allclose([lr for *_, lr in heard[1:]], [3e-3 * scale for scale in wanted], rtol=1e-9)
    assert [point["lr"] for point in history.curve] == [lr for _, _, lr in heard[1:]]


def test_gradients_are_clipped_at_norm_one(models, reviews, tmp_path):
    """What the optimizer gets is the mean loss's gradient, scaled down to norm 1 where it is longer."""
    run, data, model, method = ready(common, tmp_path, *rows_flags(models, reviews), "--full", "--max_steps", 1)
    got = {}

    class Recorder(torch.optim.SGD):
        def step(self):
            got.update({name: tensor.grad.clone() for name, tensor in model.named_parameters()})
    with torch.no_grad():
        model.classifier.weight.mul_(200)  # so that the gradient is long
    picked = common.order(data.train.lengths, 32, run.seed, 0)[0]
    _, raw = gradients(run, data, model, data.train.rows[picked])
    norm = torch.cat([g.flatten() for g in raw.values()]).norm()
    assert norm > 3
    model.zero_grad()
    common.train(model, data, run, {"optimizer": Recorder})
    for name in raw:
        assert torch.allclose(got[name], raw[name] / norm, rtol=1e-4, atol=1e-7), name


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta"])
def test_masked_loss_is_transformers_own(models, text_dir, tmp_path, kind):
    """Only scored rows reach the LM head, and the loss is the one with labels −100 everywhere else."""
    from transformers import AutoModelForMaskedLM
    run, data, model, _ = ready(common, tmp_path, *text_flags(models, text_dir, kind), "--full")
    oracle = AutoModelForMaskedLM.from_pretrained(run.model)
    inputs, flags = common.predicted_tokens(data, data.train, 0, 0)
    batch = common.collate(data, data.train, data.train.rows[-9:], inputs, flags)
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    logits = common.forward(model.eval(), batch)
    n = int(batch.scored.sum())
    assert 0 < n < batch.attended.sum() < batch.ids.numel()
    assert logits.shape == (n, data.vocab) and shapes[0].numel() == n * 32
    labels = torch.full_like(batch.ids, -100)
    labels[batch.scored] = batch.target
    theirs = oracle.eval()(input_ids=batch.ids, attention_mask=batch.attended.long(), labels=labels)
    assert abs(F.cross_entropy(logits, batch.target) - theirs.loss) < 1e-5
    assert torch.allclose(logits, theirs.logits[batch.scored], atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_causal_loss_is_transformers_own(models, text_dir, tmp_path, kind):
    """As with labels = input ids, −100 where the token is padding or unknown; also over a whole split."""
    from transformers import AutoModelForCausalLM
    run, data, model, _ = ready(common, tmp_path, *text_flags(models, text_dir, kind, "CausalLM"), "--full")
    oracle = AutoModelForCausalLM.from_pretrained(run.model).eval()
    total, n = 0.0, 0
    for row in data.eval.rows:
        ids = data.eval.tokens[data.eval.starts[row]:data.eval.starts[row + 1]].long()[None]
        labels = ids.masked_fill(ids == data.unknown, -100)
        scored = int((labels[:, 1:] != -100).sum())
        total += oracle(input_ids=ids, labels=labels).loss.item() * scored if scored else 0.0
        n += scored
    assert (data.eval.tokens == data.unknown).any()
    metrics = common.score(model, data, run)
    assert abs(metrics["loss"] - total / n) < 1e-5
    assert metrics["causal_perplexity"] == pytest.approx(math.exp(total / n), rel=1e-5)
    inputs, flags = common.predicted_tokens(data, data.eval)
    batch = common.collate(data, data.eval, data.eval.rows[-3:], inputs, flags)
    assert not batch.attended.all()  # the last block is short
    labels = batch.ids.masked_fill(~batch.attended | (batch.ids == data.unknown), -100)
    theirs = oracle(input_ids=batch.ids, attention_mask=batch.attended.long(), labels=labels)
    ours = common.forward(model.eval(), batch)
    assert abs(F.cross_entropy(ours, batch.target) - theirs.loss) < 1e-5 and len(ours) == int((labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta", "gpt2", "llama", "qwen2"])
def test_classification_loss_is_transformers_own(models, reviews, tmp_path, kind):
    """The mean over the test rows, taken one by one and unpadded from a checkpoint that brings its head."""
    from transformers import AutoModelForSequenceClassification
    run, data, model, _ = ready(common, tmp_path, *rows_flags(models, reviews, kind, "SequenceClassification"), "--full")
    assert run.head == []
    oracle = AutoModelForSequenceClassification.from_pretrained(run.model).eval()
    losses, right = [], []
    for row in data.eval.rows:
        ids = data.eval.tokens[data.eval.starts[row]:data.eval.starts[row + 1]].long()[None]
        with torch.no_grad():
            output = oracle(input_ids=ids, labels=data.eval.labels[row][None])
        losses.append(output.loss.item())
        right.append(output.logits.argmax().item() == data.eval.labels[row].item())
    metrics = common.score(model, data, run)
    assert abs(metrics["loss"] - np.mean(losses)) < 1e-5 and metrics["accuracy"] == np.mean(right)


@pytest.mark.parametrize("kind, head", [("distilbert", "MaskedLM"), ("gpt2", "CausalLM"), ("distilbert", "")])
def test_scores_do_not_depend_on_the_evaluation_batch(models, reviews, text_dir, tmp_path, kind, head):
    flags = text_flags(models, text_dir, kind, head) if head else rows_flags(models, reviews)
    run, data, model, _ = ready(lora, tmp_path, *flags)
    stir(model)
    found = []
    for run.eval_batch_size in (1, 8, 64):
        found.append(common.score(model, data, run))
    for metrics in found[1:]:
        assert metrics.keys() == found[0].keys()
        for key, value in metrics.items():
            assert value == (pytest.approx(found[0][key], rel=1e-5) if key != "correct" else found[0][key]), key


def test_perplexity_is_over_tokens_not_batches(models, text_dir, tmp_path):
    """exp(sum of the negative log-likelihoods / scored tokens), from each block by itself."""
    run, data, model, _ = ready(lora, tmp_path, *text_flags(models, text_dir))
    metrics = common.score(model, data, run)
    inputs, flags = common.predicted_tokens(data, data.eval, "evaluation")
    sums, counts = [], []
    for row in data.eval.rows:
        batch = common.collate(data, data.eval, row[None], inputs, flags)
        with torch.no_grad():
            chances = common.forward(model, batch).double().log_softmax(-1)
        sums.append(-sum(chances[i, token].item() for i, token in enumerate(batch.target)))
        counts.append(len(batch.target))
    assert len(set(counts)) > 2
    assert metrics["mlm_perplexity"] == pytest.approx(math.exp(sum(sums) / sum(counts)), rel=1e-5)
    means = [total / n for total, n in zip(sums, counts, strict=True) if n]
    assert abs(np.mean(means) - sum(sums) / sum(counts)) > 1e-4  # the wrong formula would have been noticed


def planted(monkeypatch, classes, predictions, labels):
    """A Data of one-token rows whose logits favour `predictions`; score() of it needs no model."""
    rows = [[i] * (1 + i % 3) for i in range(len(labels))]
    split = common.Split(*common.flat(rows), torch.tensor(labels), torch.arange(len(labels)))
    table = F.one_hot(torch.tensor(predictions), classes).float() * 3
    monkeypatch.setattr(common, "forward", lambda model, batch: table[batch.ids[:, 0]])
    data = SimpleNamespace(task="classification", classes=classes, decoder=False, pad=0, scored=split)
    run = SimpleNamespace(device="cpu", precision="fp32", eval_batch_size=5)
    return common.score(torch.nn.Identity(), data, run)


@pytest.mark.parametrize("labels, predictions, classes", [
    ([0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 1, 0, 0, 0, 1, 1], 3),  # class 2 is never predicted
    ([0, 0, 1, 1], [0, 2, 1, 1], 3),  # class 2 is predicted, and nowhere right
    ([0, 0, 0, 1], [0, 0, 0, 0], 4),  # two classes nowhere at all: left out
    ([1, 1], [1, 1], 2), ([0, 1, 0, 1], [1, 0, 1, 0], 2),
    (np.random.default_rng(0).integers(0, 5, 203).tolist(), np.random.default_rng(1).integers(0, 4, 203).tolist(), 5)])
def test_metrics_against_counting(monkeypatch, labels, predictions, classes):
    metrics = planted(monkeypatch, classes, predictions, labels)
    pairs, scores = list(zip(labels, predictions, strict=True)), []
    for c in range(classes):
        tp, fp, fn = (sum(pair) for pair in zip(*(
            ((y == c and p == c), (y != c and p == c), (y == c and p != c)) for y, p in pairs), strict=True))
        if tp + fp + fn:
            precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
            scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0)
    assert metrics["accuracy"] == pytest.approx(np.mean([y == p for y, p in pairs]))
    assert metrics["f1"] == pytest.approx(np.mean(scores))
    right, wrong = -math.log(math.e**3 / (math.e**3 + classes - 1)), -math.log(1 / (math.e**3 + classes - 1))
    assert metrics["loss"] == pytest.approx(np.mean([right if y == p else wrong for y, p in pairs]), rel=1e-6)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(metrics["correct"]), np.uint8))[:len(labels)]
    assert bits.astype(bool).tolist() == [y == p for y, p in pairs]  # in the data's order, though scored by length


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 1001])
def test_bitmap_is_numpys(n):
    hits = np.random.default_rng(n).random(n) < 0.7
    text = common.bitmap(torch.tensor(hits))
    assert text == base64.b64encode(np.packbits(hits).tobytes()).decode()
    assert np.array_equal(np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:n].astype(bool), hits)


@pytest.mark.parametrize("kind, head", [("distilbert", "MaskedLM"), ("distilbert", ""), ("bert", "MaskedLM"),
                                        ("roberta", "MaskedLM"), ("gpt2", "CausalLM"), ("llama", ""), ("qwen2", "CausalLM")])
def test_tied_output_projection_stays_frozen(models, text_dir, tmp_path, kind, head):
    """It is the input embeddings' own tensor, not trained and not saved, also where the rest of the LM head is missing."""
    run, data, model, method = ready(lora, tmp_path, *text_flags(models, text_dir, kind, head), "--max_steps", 2)
    before = model.get_output_embeddings().weight.clone()
    common.train(model, data, run, method)
    output = model.get_output_embeddings().weight
    assert output is model.get_input_embeddings().weight and not output.requires_grad
    assert torch.equal(output, before) and output.grad is None
    total = sum({tensor.data_ptr(): tensor.numel() for tensor in model.parameters()}.values())
    n = common.count_parameters(run, model)
    assert n["total"] == total and n["trainable"] == sum(t.numel() for t in model.parameters() if t.requires_grad)
    assert all(tensor.shape != output.shape for tensor in common.adapter_tensors(model, run).values())


def test_untied_missing_lm_head_is_refused(models, text_dir, tmp_path, capfd):
    flags = text_flags(models, text_dir, "llama", "")
    flags[5] = models("llama", tie_word_embeddings=False)
    status, error = ended(capfd, lora, *flags, "--out", tmp_path)
    assert status == 2 and "--model" in error and "output embeddings" in error and not files(tmp_path)


# ------------------------------------------------------------------------------------------------ losses that break


@pytest.mark.parametrize("steps", [40, 2])
def test_a_loss_that_is_not_finite_ends_the_run(models, reviews, tmp_path, monkeypatch, capfd, steps):
    """Planted at step 2: one line with that step and its learning rate, status 1, and no result."""
    backward, calls = common.backward, []

    def broken(*args):
        calls.append(1)
        return backward(*args) * (math.nan if len(calls) == 2 else 1)
    monkeypatch.setattr(common, "backward", broken)
    status, error = ended(capfd, lora, *rows_flags(models, reviews), "--max_steps", steps, "--warmup", 0.5, "--lr", 1e-3,
                          "--save_every", 1, "--out", tmp_path)
    rate = 1e-3 * schedule(2, steps, steps / 2)
    assert status == 1 and "step 2," in error and f"{rate:.3g}" in error and "--lr" in error
    assert not [name for name in files(tmp_path) if name.endswith((".json", ".safetensors", ".tmp"))]


def test_the_result_file_comes_last(models, reviews, tmp_path, monkeypatch):
    """Whoever finds it may count on the adapter beside it."""
    moved, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: (moved.append(to), replace(path, to))[1])
    [path] = lora.main([*rows_flags(models, reviews), "--max_steps", 1, "--quality_only", "--out", tmp_path])
    assert len(moved) == 3 and moved[-1] == path


def test_long_runs_are_announced(capsys):
    common.announce(59)
    assert capsys.readouterr().out == ""
    common.announce(600)
    assert capsys.readouterr().out.startswith("about 10 more minutes")


def test_a_learning_rate_far_too_high(models, reviews, tmp_path, capfd):
    status, error = ended(capfd, lora, *rows_flags(models, reviews), "--lr", 1e30, "--out", tmp_path)
    assert status == 1 and re.search(r"step \d+, learning rate \d", error) and not files(tmp_path)


def test_a_score_that_is_not_finite_is_no_result(models, reviews, tmp_path, quick, capfd):
    """The last step itself may break the weights, which only scoring can notice: NaN must not reach a result file."""
    status, _ = ended(capfd, lora, *rows_flags(models, reviews), "--lr", 1e30, "--max_steps", 1, "--out", tmp_path)
    assert status == 1 and not files(tmp_path)


# ------------------------------------------------------------------------------------------------ the result file


NUMBER, LIST = (int, float), list
TOP = {"schema": int, "method": str, "name": str, "dataset": str, "model": str, "model_sha256": str, "seed": int, "args": dict,
       "command": str, "created": str, "split": dict, "metrics": dict, "curve": LIST, "parameters": dict, "time": dict,
       "memory": dict, "inference": LIST, "flops": dict, "disk": dict, "method_info": dict, "environment": dict}
PARTS = {
    "split": {"train": int, "dev": int, "eval": int, "eval_split": str, "scored": str, "subset": bool, "sha256": str},
    "parameters": {"adapter": int, "head": int, "trainable": int, "total": int, "trainable_percent": NUMBER},
    "time": {"train_seconds": NUMBER, "epoch_seconds": LIST, "skipped_steps": int, "step_ms": dict,
             "samples_per_second": NUMBER, "tokens_per_second": NUMBER, "padded_tokens_per_second": NUMBER,
             "accelerator_hours": NUMBER, "load": NUMBER, "tokenise": NUMBER, "evaluate": NUMBER, "save": NUMBER},
    "memory": {"device": str, "base": int, "adapter": int, "head": int, "optimizer": int, "gradients": int, "train_peak": int,
               "inference_peak": int, "before_training": int},
    "flops": {"train_step": NUMBER, "train_total": NUMBER, "inference_per_sample": NUMBER},
    "disk": {"adapter": int, "base": int, "merged": int},
    "environment": {"python": str, "torch": str, "transformers": str, "datasets": str, "bitsandbytes": (str, type(None)),
                    "device": str, "threads": int, "precision": str, "load_average": LIST, "commit": (str, type(None)),
                    "dirty": (bool, type(None))}}


def check_types(found, wanted, where):
    for key, kind in wanted.items():
        assert key in found, f"{where} lacks {key}"
        assert isinstance(found[key], kind) and (kind in (bool,) or kind == (bool, type(None)) or
                                                 not isinstance(found[key], bool)), f"{where}.{key}: {found[key]!r}"


def finite(value):
    """Whether every number in a JSON value is finite and, so, was valid JSON."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("name, task", [*((name, "rows") for name in EVERY), ("lora", "mlm"), ("hira", "clm"),
                                        ("prune", "dev")])
def test_result_file(models, reviews, text_dir, tmp_path, name, task):
    """Every key of DESIGN.md's schema with a sane value; no path of this machine anywhere in what is written."""
    module, flags = EVERY[name]
    flags = [*flags, *(rows_flags(models, reviews) if task in ("rows", "dev") else
                       text_flags(models, text_dir, *{"mlm": ("distilbert", "MaskedLM"), "clm": ("gpt2", "CausalLM")}[task]))]
    flags += ["--split", "dev"] if task == "dev" else []
    [path] = module.main([*flags, "--epochs", 2, "--train_samples", 40, "--seeds", 5, "--out", tmp_path / "out"])
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert not re.search(rb"/tmp|/work|/root|/home", file.read_bytes()), file.name
    result = json.loads(path.read_text())
    check_types(result, TOP, "result")
    for part, wanted in PARTS.items():
        check_types(result[part], {} if (part, task) == ("flops", "dev") else wanted, part)
    assert finite(result) and result["schema"] == 1 and result["seed"] == 5
    assert result["method"] == {"head only": "head_only", "full": "full"}.get(name, module.__name__)
    assert result["model"] == Path(flags[flags.index("--model") + 1]).name
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result["created"])
    assert re.fullmatch(r"[0-9a-f]{64}", result["model_sha256"]) and re.fullmatch(r"[0-9a-f]{64}", result["split"]["sha256"])
    assert result["split"]["train"] == 40 and result["split"]["subset"] is True
    assert result["split"]["scored"] == ("dev" if task == "dev" else "eval")

    metrics = result["metrics"]
    kinds = {"mlm": {"loss", "mlm_perplexity"}, "clm": {"loss", "causal_perplexity"}}.get(task, {"accuracy", "f1", "loss"})
    adapted = name not in ("head only", "full")
    assert metrics.keys() - {"merged"} == kinds and ("merged" in metrics) == (adapted and task != "dev")
    if "merged" in metrics:
        assert metrics["merged"].keys() == kinds
        for key in kinds:
            assert metrics["merged"][key] == pytest.approx(metrics[key], rel=1e-4), key
    if task in ("rows", "dev"):
        n = result["split"]["eval" if task == "rows" else "dev"]
        bits = np.unpackbits(np.frombuffer(base64.b64decode(result["correct"]), np.uint8))
        assert len(bits) == -(-n // 8) * 8 and bits[n:].sum() == 0 and bits.sum() / n == pytest.approx(metrics["accuracy"])
    else:
        assert result["correct"] is None

    steps = [point["step"] for point in result["curve"]]
    assert steps == sorted(set(steps)) and steps[-1] == 4 and result["curve"][-1]["epoch"] == 2
    assert all(point.keys() - {"dev_loss"} == {"step", "epoch", "lr", "train_loss"} for point in result["curve"])
    assert any("dev_loss" in point for point in result["curve"]) == (task == "dev")
    n = result["parameters"]
    assert n["trainable"] == n["adapter"] + n["head"] and n["trainable_percent"] == 100 * n["trainable"] / n["total"]
    assert (n["adapter"] > 0) == (name != "head only")
    if name == "prune":
        assert n["sparsity"].keys() == {"A", "B", "BA"} and all(0 <= share <= 1 for share in n["sparsity"].values())
    times, memory = result["time"], result["memory"]
    assert len(times["epoch_seconds"]) == 2 and 0 < sum(times["epoch_seconds"]) <= times["train_seconds"] + 1e-9
    assert 0 < times["step_ms"]["p10"] <= times["step_ms"]["median"] <= times["step_ms"]["p90"]
    assert times["accelerator_hours"] == pytest.approx(times["train_seconds"] / 3600)
    assert memory["device"] == "cpu" and min(memory["base"], memory["train_peak"], memory["inference_peak"]) > 0
    assert [row["batch"] for row in result["inference"]] == ([] if task == "dev" else [1, 32])
    for row in result["inference"]:
        assert row.keys() == {"batch", "length", "base"} | ({"merged", "unmerged"} if adapted else set())
        for kind in row.keys() - {"batch", "length"}:
            check_types(row[kind], {"latency_ms": dict, "samples_per_second": NUMBER}, kind)
            assert row[kind]["latency_ms"].keys() == {"mean", "p50", "p95"}
            assert row[kind]["latency_ms"]["p50"] <= row[kind]["latency_ms"]["p95"]
    folder = path.with_suffix("")
    assert result["disk"]["adapter"] == sum(file.stat().st_size for file in folder.iterdir())
    assert (folder / "adapter_config.json").exists() == adapted and not [f for f in files(tmp_path) if f.endswith(".tmp")]
    assert len(result["environment"]["load_average"]) == 3 and result["environment"]["precision"] == "fp32"


@pytest.mark.parametrize("module, flags, stem", [
    (lora, [], "lora"), (lora, ["--rank", 4], "lora-rank4"), (lora, ["--rank", 8], "lora"),
    (lora, ["--dropout", 0.25, "--alpha", 4], "lora-alpha4-dropout0.25"), (lora, ["--name", "mine.v2"], "mine.v2"),
    (lora, ["--targets", "q_lin,v_lin,k_lin"], "lora-targetsq_lin-v_lin-k_lin"),
    (lora, ["--targets", "q_lin", "k_lin"], "lora-targetsq_lin-k_lin"),
    (sparse_lora, ["--mode", "contextual"], "sparse_lora-contextual"),
    (sparse_lora, ["--structure", "rank", "--sparsity", 0.75], "sparse_lora-sparsity0.75-rank"),
    (qlora, ["--no_double_quant"], "qlora-no_double_quant"), (common, [], "head_only"), (common, ["--full"], "full"),
    (lora, ["--split", "dev", "--lr", 3e-3], "lora")])
def test_file_names(models, reviews, tmp_path, module, flags, stem):
    """{dataset}-{name}-{model}-seed{seed}.json, every method flag away from its default in the name; dev runs apart."""
    args = module.parse_args(module.__doc__, module.__file__, module.add_args,
                             [*rows_flags(models, reviews), *flags, "--seeds", 0, 7, "--out", tmp_path])
    names = [run.path.name for run in common.runs(args)]
    model = Path(models("distilbert")).name
    search = r"-dev-lr0\.003[\w.-]*" if "dev" in flags else ""
    for name, seed in zip(names, (0, 7), strict=True):
        assert re.fullmatch(rf"reviews-{re.escape(stem)}-{model}{search}-seed{seed}\.json", name)


def test_finished_runs_are_skipped(models, reviews, tmp_path, quick, monkeypatch, capfd):
    """Same settings: skipped. Other settings: an error that names them, nothing changed. --force: replaced."""
    flags = [*rows_flags(models, reviews), "--epochs", 1, "--out", tmp_path]
    [path] = lora.main([*flags, "--seeds", 1])
    text, adapter = path.read_text(), weights(path)
    trained, train = [], common.train
    monkeypatch.setattr(lora, "train", lambda model, data, run, method: (
        trained.append(run.seed), train(model, data, run, method))[1])
    capfd.readouterr()
    assert lora.main([*flags, "--seeds", 1]) == [] and trained == []
    assert path.name in capfd.readouterr().out
    assert len(lora.main([*flags, "--seeds", 0, 1, 2, "--device", "cpu", "--save_every", 1000])) == 2 and trained == [0, 2]
    for named, value in (("--lr", 5e-3), ("--batch_size", 16), ("--train_samples", 50)):
        status, error = ended(capfd, lora, *flags, "--seeds", 1, named, value)
        assert status == 2 and named in error and "--force" in error and "--name" in error and path.name in error
    assert path.read_text() == text and weights(path) == adapter and trained == [0, 2]
    lora.main([*flags, "--seeds", 1, "--lr", 5e-3, "--name", "hot"])
    assert path.read_text() == text and len(list(tmp_path.glob("*.json"))) == 4
    lora.main([*flags, "--seeds", 1, "--lr", 5e-3, "--force"])
    assert json.loads(path.read_text())["args"]["lr"] == 5e-3 and weights(path) != adapter


@pytest.mark.parametrize("first, second", [("head only", "full"), ("lora", "hira"), ("lora", "prune")])
def test_one_name_for_two_methods_is_an_error(models, reviews, tmp_path, quick, capfd, first, second):
    """A result of another method under the same --name is not this run's result, however alike the flags are."""
    flags = [*rows_flags(models, reviews), "--max_steps", 1, "--lr", 1e-3, "--name", "same", "--out", tmp_path]
    module, more = EVERY[first]
    module.main([*flags, *more])
    module, more = EVERY[second]
    status, error = ended(capfd, module, *flags, *more)
    assert status == 2 and "--name" in error


@pytest.mark.parametrize("place", ["score", "save_adapter", "count_flops"])
def test_nothing_is_written_when_something_fails(models, reviews, tmp_path, quick, monkeypatch, place):
    """An error nobody foresaw, after training: no result file, so that the run counts as unfinished."""
    def broken(*_):
        raise ZeroDivisionError
    monkeypatch.setattr(common, place, broken)
    with pytest.raises(ZeroDivisionError):
        lora.main([*rows_flags(models, reviews), "--max_steps", 1, "--out", tmp_path])
    assert not [name for name in files(tmp_path) if name.endswith(".json")]


# ------------------------------------------------------------------------------------------------ precision, chatter


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("task", ["rows", "mlm"])
def test_bf16_on_a_cpu(models, reviews, text_dir, tmp_path, name, task):
    """Frozen matrices in bf16, what is trained in fp32 and moved by a step; the score after it is finite."""
    module, more = EVERY[name]
    flags = rows_flags(models, reviews) if task == "rows" else text_flags(models, text_dir, head="")
    run, data, model, method = ready(module, tmp_path, *flags, *more, "--precision", "bf16", "--max_steps", 2)
    before = {key: tensor.detach().clone() for key, tensor in model.named_parameters() if tensor.requires_grad}
    common.train(model, data, run, method)
    for key, tensor in model.named_parameters():
        assert tensor.dtype == (torch.float32 if tensor.requires_grad or tensor.ndim < 2 else torch.bfloat16), key
        if tensor.requires_grad:
            assert tensor.grad is None and tensor.isfinite().all()
            assert not key.endswith(".B") or not torch.equal(tensor, before[key]), key
    metrics = common.evaluate(model, data, run)
    assert math.isfinite(metrics["loss"])
    if "merged" in metrics:
        assert metrics["merged"]["loss"] == pytest.approx(metrics["loss"], abs=0.05)


def test_only_our_own_lines_reach_the_terminal(models, reviews, text_dir, tmp_path):
    """Missing heads, new embeddings, no padding token, bitsandbytes: the libraries would report; our scripts stay quiet."""
    commands = [["lora", *rows_flags(models, reviews, "gpt2")], ["qlora", *text_flags(models, text_dir, head="")]]
    script = ("import importlib, json, sys\n"
              "for name, *words in json.loads(sys.argv[1]): importlib.import_module(name).main(words)")
    words = json.dumps([[*map(str, command), "--max_steps", "1", "--eval_samples", "9", "--out", str(tmp_path)]
                        for command in commands])
    done = subprocess.run([sys.executable, "-c", script, words], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    ours = (r"\S+: [\d,]+ training .*", r"\S+ on \S+: [\d,]+ adapter \+ .*", r"seed 0: .*", r"trained 1 steps in .*",
            r"\d+ linear layers in NF4 .*")
    strange = [line for line in done.stdout.splitlines() if not any(re.fullmatch(pattern, line) for pattern in ours)]
    assert not strange and done.stdout.count("\n") == 4 * len(commands) + 1, strange


def test_a_new_checkpoint_of_a_third_class_brings_no_chatter_in_process(tmp_path, capfd):
    """Three classes: the labels decide the head's width."""
    texts, _ = sentences(60, 3)
    for name in ("train", "test"):
        write_rows(tmp_path / "three", name, {"text": texts, "label": [i % 3 for i in range(60)]})
    model = make_model(tmp_path / "model", "distilbert")
    capfd.readouterr()
    run, data, model, _ = ready(lora, tmp_path / "out", "--dataset", tmp_path / "three", "--model", model, "--max_length", 16)
    assert model.classifier.out_features == data.classes == 3 and capfd.readouterr().err == ""
