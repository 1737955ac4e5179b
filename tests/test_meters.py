"""What a run costs: bytes by hand, operations by closed formulas, seconds by a planted clock."""

import copy
from argparse import Namespace
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from conftest import EVERY, SIZE, ready, result_of, rows_flags, stir, text_flags, trained
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification

import common
import lora
from harness import batches, meters
from harness import models as library

D, H, R = 32, 64, 8  # conftest's tiny models: width, feed-forward width; the default rank
ADAPTER = 2 * 2 * R * (D + D)  # A and B on query and value of two blocks


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_bytes_of_a_small_network_by_hand(frozen, fake):
    """in → hidden → out without biases, a ReLU between; n rows. The hidden tensors are largest.

    The peak of a step is where the ReLU's gradient is made: there are the gradients of the ReLU's
    output and input, y, delta, what was saved (x, the ReLU's output), and the last weight has its
    gradient. Where the first layer is frozen it is the ReLU itself: its input and its output.
    """
    n, narrow, hidden, out = 10, 8, 64, 4
    with FakeTensorMode() if fake else nullcontext():
        first, last = nn.Linear(narrow, hidden, bias=False), nn.Linear(hidden, out, bias=False)
        x, delta = torch.ones(n, narrow), torch.ones(n, out)
        first.requires_grad_(not frozen)
        trained = [last.weight] if frozen else [first.weight, last.weight]
        known = {"frozen": [first.weight] if frozen else [], "own": trained}
        known["optimizer"] = [torch.zeros_like(tensor) for tensor in trained for _ in range(2)]

        def work():
            last(first(x).relu()).backward(delta)

        peak, allocator = meters.live_bytes(work, trained, "cpu", **known)
    one, two, wide = 4 * narrow * hidden, 4 * hidden * out, 4 * n * hidden
    saved, own = 4 * n * narrow + wide, one + two
    sizes = 0, own, 2 * own, two, saved, 2 * wide + 8 * n * out
    if frozen:
        sizes = one, two, 2 * two, 0, 0, 2 * wide
    assert tuple(peak.values()) == sizes and allocator is None


def test_a_storage_counts_once_until_it_is_freed():
    known = torch.zeros(100)
    with meters.LiveBytes(weights=[known, known[:10]]) as live:
        part = torch.ones(1000)[:7].add_(1).mul_(known[:7])  # a view keeps all that it looks into
        del part
        copied = known[::2].clone()
        live.see({"a": [copied]}, "gradients")
        live.see(copied, "activations")  # known as a gradient: it stays one
        assert live.now == {"weights": 400, "gradients": 200, "activations": 0, "temporaries": 0}
    assert live.peak == {"weights": 400, "gradients": 0, "activations": 0, "temporaries": 4000}


@pytest.mark.parametrize("name", EVERY)
def test_memory_and_disk_of_a_run(name, models, reviews, tmp_path):
    """Against transformers' own model, 4-bit weights as whole ones. Counting leaves no trace."""
    module, flags = EVERY[name]
    flags = [*rows_flags(models, reviews), *flags, "--weight_decay", 0.1, "--max_steps", 2]
    run, data, base, method, _ = trained(module, tmp_path, *flags)
    before, random = copy.deepcopy(base.model.state_dict()), torch.get_rng_state()
    memory, after = common.count_memory(run, data, base, method), base.model.state_dict()
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    assert torch.equal(torch.get_rng_state(), random)
    whole = AutoModelForSequenceClassification.from_pretrained(models("distilbert"))
    sizes = {key: tensor.nbytes for key, tensor in whole.named_parameters()}
    head, report = sum(sizes[key] for key in base.head_names), method.report()
    frozen = sum(sizes.values()) - head
    adapter = {"head only": 0, "full": frozen}.get(name, 4 * ADAPTER)
    stored = frozen + sum(tensor.nbytes for tensor in whole.buffers())
    if "bytes_nf4" in report:
        stored += report["bytes_nf4"] - 4 * report["weights"]
    disk = {"base": stored + head, "merged": (frozen + head) / 2}
    assert meters.count_disk(base, torch.bfloat16) == disk
    count, total = meters.count_parameters(base), frozen + head + (name != "full") * adapter
    assert [4 * count[key] for key in ("adapter", "head", "total")] == [adapter, head, total]
    stored -= frozen if name == "full" else 0
    stored += ADAPTER if name == "prune" else 0  # masks: a byte for each number
    stored += sum(t.untyped_storage().nbytes() - t.nbytes for t in base.model.buffers())
    adam = 2 * (adapter + head) + 4 * len(common.trained_tensors(base.model))  # and a step count
    for work, optimizer in (("train", adam), ("inference", 0)):
        assert [*memory[work].values()][:3] == [stored, adapter + head, optimizer]
    assert memory["inference"]["gradients"] == memory["inference"]["activations"] == 0


def test_inference_memory_is_of_the_largest_batch(models, reviews, tmp_path, monkeypatch):
    """Not of the last one, which holds the longest examples but may be all but empty."""
    flags = [*rows_flags(models, reviews), "--batch_size", 4, "--eval_batch_size", 11]
    run, data, base, method = ready(lora, tmp_path, *flags)
    lengths = data.test.lengths  # of 45 examples
    collate, calls = batches.collate, []
    monkeypatch.setattr(common, "collate", lambda *args: calls.append(args) or collate(*args))
    common.count_memory(run, data, base, method)
    [taken] = [examples for _, split, examples, _ in calls if split is data.test]
    parts = batches.scoring_batches(run, lengths)
    assert list(map(len, parts)) == [11, 11, 11, 11, 1]
    sizes = [len(part) * int(lengths[part].max()) for part in parts]
    assert len(taken) * int(lengths[taken].max()) == max(sizes) > sizes[-1]


# --------------------------------------------------------------------- floating-point operations
#
# B examples of L tokens, T = B·L. A product of (m, k) and (k, n) is 2·m·k·n operations. A block: q,
# k, v and out are (T, D)·(D, D); L×L scores an example, over all heads together of width D, and
# equally many products with the values; feed-forward (T, D)·(D, H) and (T, H)·(H, D), in the last
# block of B tokens, as [CLS] alone is used.
#
# Backward: of y = x·Wᵀ a step may need dx = δ·W, if something trained lies before x, and dW = δᵀ·x,
# if W is trained; each costs what the forward product costs. Nothing trained lies before the first
# block: no dx for its q, k and v, and no dK, as k has no adapter.


def product(m, k, n):
    return 2 * m * k * n


def formula(name, n, B, L):
    """Operations of a training pass through n blocks, and of a forward pass alone."""
    T, last, dense = B * L, 2 * product(B, D, H), product(D, R, D)
    linear, scores, wide = product(T, D, D), B * product(L, D, L), product(T, D, H)
    forward = n * (4 * linear + 2 * scores) + (n - 1) * 2 * wide + last
    dx = n * linear + (n - 1) * (3 * linear + 4 * scores + 2 * wide) + 3 * scores + last
    head = product(B, D, D) + product(B, D, 2)  # pre_classifier and classifier, trained
    if name == "head only":  # no dx below the head
        return forward + 3 * head - product(B, D, D), forward + head
    if name == "full":  # scores have two inputs and no weight: also three times
        return 3 * forward + 3 * head, forward + head
    if name == "hira":  # on q and v: B·A; backward δᵀ·x, dA, dB, and B·A again for dx
        own = 2 * n * dense, 2 * n * (linear + 2 * dense) + 2 * (n - 1) * dense
    else:  # A·x and B·h; backward dB, dh, dA, and dx but in the first block
        own = 4 * n * product(T, D, R), (6 * n + 2 * (n - 1)) * product(T, D, R)
    return forward + dx + sum(own) + 3 * head, forward + head + own[0]


@pytest.mark.parametrize("name", ["head only", "full", "lora", "hira", "qlora", "prune"])
@pytest.mark.parametrize("layers", [1, 3])
def test_flops_against_closed_formulas(name, layers, models, reviews, tmp_path):
    """One padded batch, and one of inference: to the last product."""
    module, flags = EVERY[name]
    flags = ["--model", models("distilbert", n_layers=layers), "--test_samples", 5, *flags]
    run, data, base, method = ready(module, tmp_path, *rows_flags(models, reviews), *flags)
    counts = common.count_flops(run, data, base, method, [[torch.arange(4)]])
    step = formula(name, layers, 4, int(data.train.lengths[:4].max()))[0]
    inference = formula(name, layers, 5, int(data.test.lengths.max()))[1]
    assert [*counts.values()] == pytest.approx([step, step, inference / 5], rel=1e-9)


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("name", ["full", "lora", "hira", "qlora", "contextual"])
def test_fitted_flops_against_counting_all(name, task, models, reviews, text_dir, tmp_path):
    """Four passes stand for all, to 2 % or better: examples of many lengths, padded, in parts."""
    module, flags = EVERY[name]
    flags = [*(text_flags(models, text_dir) if task else rows_flags(models, reviews)), *flags]
    flags += ["--batch_size", 5, "--grad_accum", 2, "--eval_batch_size", 3]
    run, data, base, method = ready(module, tmp_path, *flags)
    steps = batches.length_grouped_batches(data.train.lengths, 10, 0, 0)
    parts = batches.steps_of(run, data, method, len(steps))
    counts = common.count_flops(run, data, base, method, parts)
    base.model.train().set_attn_implementation("eager")
    near = 0.02 if task or name in ("hira", "contextual") else 1e-9  # where all is in the prices
    targets, trained = (
        batches.predicted_tokens(data, data.train, 0, 0),
        common.trained_tensors(base.model),
    )
    with FlopCounterMode(display=False) as counter:
        for examples in steps:
            method.before_step(99, 100)  # past contextual LoRA's dense steps
            common.gradient(run, data, base, method, examples, targets, trained)
    assert len(steps) > 3 and counts["step"] == counts["total"] / len(steps)
    assert counts["total"] == pytest.approx(counter.get_total_flops(), near)
    with FlopCounterMode(display=False) as counter:
        common.score(run, data, base, data.test, "test")
    inference = counts["inference_example"] * data.official
    assert inference == pytest.approx(counter.get_total_flops(), near)


def test_passes_of_one_price_are_run_once(monkeypatch):
    """Blocks of one length and a shorter last one, as WikiText-2 has them: two passes run of 40."""
    prices, ran = [(32, 512, 2)] * 39 + [(10, 50, 2)], []
    costs = [7 * tokens + 3 * pairs + 11 * outputs for tokens, pairs, outputs in prices]
    monkeypatch.setattr(meters, "count_flops", lambda model, i: ran.append(i) or costs[i])
    assert meters.fitted_flops(None, range(40), prices) == pytest.approx(sum(costs), 1e-9)
    assert sorted(ran) == [0, 39]


def test_tied_embeddings_count_once(models, text_dir, tmp_path):
    base = ready(lora, tmp_path, *text_flags(models, text_dir))[2]
    sizes = [(tensor.data_ptr(), tensor.numel()) for tensor in base.model.state_dict().values()]
    once = sum(dict(sizes).values())
    assert sum(size for _, size in sizes) - once == SIZE * D
    assert meters.count_parameters(base)["total"] == base.weights + ADAPTER == once


@pytest.fixture
def clock(monkeypatch):
    now = Namespace(seconds=0.0)
    monkeypatch.setattr(meters, "time", Namespace(perf_counter=lambda: now.seconds))
    return now


def test_only_steps_are_on_the_clock(clock, models, reviews, tmp_path, monkeypatch):
    """A second a step, hours of all else; speeds are of what the model saw, without padding."""
    trial, made = common.try_model, []

    def slow(function, seconds, *args):
        clock.seconds += seconds
        made.append(function(*args))
        return made[-1]

    for module, name, seconds in (
        (common, "gradient", 1),
        (common, "collate", 0),
        *((common, name, 7000) for name in ("save_checkpoint", "score", "log_losses")),
        *((common, name, 7000) for name in ("predicted_tokens", "count_flops")),
        *((batches, name, 7000) for name in ("predicted_tokens", "length_grouped_batches")),
    ):
        monkeypatch.setattr(module, name, partial(slow, getattr(module, name), seconds))
    monkeypatch.setattr(common, "try_model", lambda *args: (trial(*args), made.clear()))
    flags = [*rows_flags(models, reviews), "--epochs", 3, "--batch_size", 16, "--save_every", 2]
    times = result_of(lora, tmp_path, *flags)[0]["time"]
    assert times["train_seconds"] == 21 and times["epoch_seconds"] == [7, 7, 7]
    assert times["step_ms"] == {"median": 1000, "p10": 1000, "p90": 1000}
    seen = [batch for batch in made if isinstance(batch, batches.Batch)][:21]
    assert times["samples_per_second"] == sum(len(batch.ids) for batch in seen) / 21
    assert times["tokens_per_second"] == sum(len(batch.token_positions) for batch in seen) / 21


@pytest.mark.parametrize("steps", [0, 1, 4, 10, 11, 60])
def test_step_statistics_against_numpy(steps, monkeypatch):
    laps = np.random.default_rng(steps).uniform(0.5, 2, steps).tolist()
    monkeypatch.setenv("WORLD_SIZE", "4")
    times = meters.summarize_time(laps, 25, [(4, 40), (3, 21)] if steps else [])
    warm = 1000 * np.array(laps[min(10, steps // 5) :] or [0])  # without the first ones
    assert list(times["step_ms"].values()) == pytest.approx(np.percentile(warm, [50, 10, 90]))
    assert times["epoch_seconds"] == [sum(laps[i : i + 25]) for i in range(0, steps, 25)]
    assert times["accelerator_hours"] == pytest.approx(4 * sum(laps) / 3600)


@pytest.mark.parametrize("lasting, rounds", [(0.01, 20), (1.0, 3)])
def test_latency_of_three_states(lasting, rounds, clock, models, reviews, tmp_path, monkeypatch):
    """In turns; the longest example and the 32 longest; base, merged equal to unmerged."""
    run, data, base, _ = ready(lora, tmp_path, *rows_flags(models, reviews))
    stir(base)
    seen, draw, forward = [], np.random.default_rng(0), common.forward

    def timed(base, batch):
        seen.append((forward(base, batch), batch, lasting * draw.uniform(1, 1.2)))
        clock.seconds += seen[-1][-1]

    monkeypatch.setattr(common, "forward", timed)
    timings = common.time_inference(run, data, base)
    longest, half = data.test.lengths.sort(descending=True).values, 6 * rounds
    for timing, passes, n in zip(timings, (seen[:half], seen[half:]), (1, 32), strict=True):
        adapted, batch, _ = passes[-1]
        sizes = timing["batch"], timing["length"], len(batch.token_positions)
        assert sizes == (n, longest[0], longest[:n].sum())
        with torch.no_grad(), library.as_plain_linears(base.model, False, torch.float32):
            plain = forward(base, batch)
        assert not torch.allclose(plain, adapted, atol=1e-3)
        for i, name in enumerate(("base", "merged", "unmerged")):
            turns = [*zip(passes[2 * i :: 6], passes[2 * i + 1 :: 6], strict=True)]
            logits = torch.stack([once[0] for turn in turns for once in turn])
            assert (logits - (adapted if i else plain)).abs().max() < 1e-5
            ms = 1000 * np.array([second[-1] for _, second in turns])  # the first warms up
            wanted = [ms.mean(), *np.quantile(ms, [0.5, 0.95]), 1000 * n / np.median(ms)]
            measured = [*timing[name]["latency_ms"].values(), timing[name]["samples_per_second"]]
            assert measured == pytest.approx(wanted)
