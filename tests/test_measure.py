"""What a run costs: counted operations against closed formulas, bytes against tensors, seconds against a clock of our own.

The formulas are derived step by step below. They are worth reading: they say which products a frozen model still needs.
"""

import gc
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import hira
import lora
import qlora
import sparse_lora

EVERY = {
    "head only": (common, []),
    "full": (common, ["--full"]),
    "lora": (lora, []),
    "hira": (hira, []),
    "qlora": (qlora, ["--nf4_backend", "torch"]),
    "prune": (sparse_lora, []),
    "contextual": (sparse_lora, ["--mode", "contextual"]),
}


@pytest.fixture(scope="module", autouse=True)
def light():
    """One thread, and imported modules out of the garbage collector's sight: each run collects twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    torch.set_num_threads(threads)


def ready(module, out, *words):
    """What main makes of a command line before it trains: (run, data, model, method)."""
    args = module.parse_args(
        module.__doc__, module.__file__, module.add_args, ["--out", out, *words]
    )
    run = next(common.runs(args))
    data = common.load_data(run)
    model = common.load_base(run, data)
    return run, data, model, module.adapt(model, run)


# ------------------------------------------------------------------------------------------------ floating-point operations
#
# Sizes: B rows of L tokens, T = B·L; width d, feed-forward width h, vocabulary V, rank r. A product of (m, k) and (k, n)
# is m·n sums of k products: 2·m·k·n operations. Only products are counted: the rest (norms, softmax, GELU, dropout, the
# optimizer) is below one per cent.
#
# Forward, one block. The projections q, k, v and out are (T, d)·(d, d) each. Attention: each row of the batch has L×L scores
# over all heads together of width d, and as many products with the values: 2·B·L²·d each. The feed-forward layers are
# (T, d)·(d, h) and (T, h)·(h, d).
#
# Backward. Of y = x·Wᵀ a training step may need dx = δ·W, if something trainable lies before x, and dW = δᵀ·x, if W is
# trainable; each costs what the forward product costs. A frozen W saves dW, and no more: the gradient must still pass
# through it to reach the adapters below. Hence full fine-tuning costs three forward passes, and adapters about two.
#
# The first block is where a frozen base saves more. Its input, the embeddings, is frozen, so nothing lies before it: no dx
# for q, k and v. k has no adapter, so its output needs no gradient, and of the attention scores only dQ is computed.

SIZES = {
    "dim": 768,
    "hidden_dim": 3072,
    "n_heads": 12,
    "max_position_embeddings": 128,
}  # DistilBERT's own
B, L, D, H, R = 2, 128, 768, 3072, 8
T = B * L


def product(m, k, n):
    return 2 * m * k * n


LINEAR = product(T, D, D)  # one of q, k, v, out
WIDE = product(T, D, H)  # one of the two feed-forward layers
SCORES = B * product(
    L, D, L
)  # query·key, summed over the heads; probabilities·value costs the same


def block():
    """The forward pass of one block."""
    return 4 * LINEAR + 2 * SCORES + 2 * WIDE


def head(dw, dx):
    """pre_classifier and classifier on B rows: forward, dW where trained, dx: of the first only where the base wants it."""
    first, second = product(B, D, D), product(B, D, 2)
    return (1 + dw + dx) * first + (1 + 2 * dw) * second


def base_forward(n):
    return n * block() + head(0, 0)


def head_only_step(n):
    """The base runs forward only; the head's own dW, and dx from classifier to pre_classifier."""
    return n * block() + head(1, 0)


def full_step(n):
    """Every product three times: forward, dx, dW. Attention has two inputs and no weight: also three times."""
    return 3 * n * block() + head(1, 1)


def frozen_backward(n, first_scores=3):
    """dx through n frozen blocks with trained q and v, without the adapters' own products.

    Every block: dx of out and of both feed-forward layers. Blocks after the first: dx of q, k, v, and all four products of
    attention (dQ, dK, dP, dV). The first block: dQ, dP and dV, but no dK.
    """
    return n * (LINEAR + 2 * WIDE) + (n - 1) * (3 * LINEAR + 4 * SCORES) + first_scores * SCORES


def lora_step(n, adapted=2):
    """LoRA on q and v. h = A·x and B·h forward; backward dB, dh and dA, and dx through A in all blocks but the first."""
    narrow = product(T, D, R)  # each of them: (T, d)·(d, r) or (T, r)·(r, d)
    forward = n * (block() + adapted * 2 * narrow)
    backward = frozen_backward(n) + n * adapted * 3 * narrow + (n - 1) * adapted * narrow
    return forward + backward + head(1, 1)


def hira_step(n, adapted=2):
    """HiRA on q and v: one full product forward, as the base; B·A costs the same whatever the batch.

    Backward: G = δᵀ·x as large as a dW, dA = Bᵀ·M and dB = M·Aᵀ. dx takes a second B·A, in all blocks but the first.
    """
    dense = product(D, R, D)  # B·A; Bᵀ·M and M·Aᵀ are as large
    forward = n * (block() + adapted * dense)
    backward = frozen_backward(n) + n * adapted * (LINEAR + 2 * dense) + (n - 1) * adapted * dense
    return forward + backward + head(1, 1)


def contextual_step(n):
    """LoRA, with the feed-forward layers of the deep half cut to `keep` channels, but for the B rows of CLS.

    Half of the blocks are dense; then 90 % of the channels are left out, in the last block 45 %. Forward and backward each
    take both layers at (T, d, keep) and, for the dense rows, at (B, d, h); scores are taken on 64 rows or so, forward only.
    """
    total = lora_step(n)
    for i in range(n // 2, n):
        keep = int(H * (1 - (0.45 if i == n - 1 else 0.9)))
        sampled = len(range(0, T, max(1, T // 64)))
        total -= 4 * WIDE  # two layers, forward and dx
        total += 4 * (product(T, D, keep) + product(B, D, H)) + product(sampled, D, H)
    return total


def inference(n, extra=0):
    """One row, unmerged."""
    return base_forward(n) / B + n * extra


FORMULAS = {  # per method: operations of a training step, of one row's inference
    "head only": (head_only_step, lambda n: inference(n)),
    "full": (full_step, lambda n: inference(n)),
    "lora": (lora_step, lambda n: inference(n, 2 * 2 * product(L, D, R))),
    "hira": (hira_step, lambda n: inference(n, 2 * product(D, R, D))),
    "contextual": (contextual_step, lambda n: inference(n, 2 * 2 * product(L, D, R))),  # dense
    "prune": (
        lora_step,
        lambda n: inference(n, 2 * 2 * product(L, D, R)),
    ),  # zeros are multiplied like any number
    "qlora": (lora_step, lambda n: inference(n, 2 * 2 * product(L, D, R))),
}  # the memory is saved, not the arithmetic


@pytest.mark.parametrize(
    "name, layers",
    [*((name, 2) for name in FORMULAS if name != "contextual"), ("lora", 1), ("contextual", 4)],
)
def test_flops_against_closed_formulas(models, reviews, tmp_path, name, layers):
    """DistilBERT's width at length 128, to 1 % as promised, and in fact to the last product."""
    module, flags = EVERY[name]
    run, data, model, method = ready(
        module,
        tmp_path,
        *flags,
        "--dataset",
        reviews,
        "--batch_size",
        B,
        "--max_length",
        L,
        "--model",
        models("distilbert", n_layers=layers, **SIZES),
    )
    assert model.config.n_layers == layers and run.rank == R if module is not common else True
    method.get("after_step", lambda *_: None)(9, 10, 0.0)  # contextual: past its dense steps
    kept = model.config._attn_implementation
    counts = common.count_flops(model, data, run)
    step, one = FORMULAS[name]
    assert counts["train_step"] == pytest.approx(step(layers), rel=1e-4)
    assert counts["inference_per_sample"] == pytest.approx(one(layers), rel=1e-4)
    assert model.config._attn_implementation == kept and all(
        tensor.grad is None for tensor in model.parameters()
    )


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("length, rows", [(64, 7), (24, 18), (24, 5)])
def test_flops_of_few_rows_stand_for_a_batch(models, reviews, tmp_path, name, length, rows):
    """A count of the whole batch, which takes the memory that count_flops spares, gives the same number."""
    from torch.utils.flop_counter import FlopCounterMode

    module, flags = EVERY[name]
    run, data, model, method = ready(
        module,
        tmp_path,
        *flags,
        "--dataset",
        reviews,
        "--batch_size",
        rows,
        "--max_length",
        length,
        "--model",
        models("distilbert", n_layers=4),
    )
    method.get("after_step", lambda *_: None)(9, 10, 0.0)
    counts = common.count_flops(model, data, run)
    batch = common.fixed_batch(data, rows, length)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(
            common.forward(model.train(), batch), batch.target
        ).backward()
    tokens = rows * length  # contextual sparsity's estimate takes 64 tokens or some more
    more = (
        len(range(0, tokens, max(1, tokens // 64))) - 64 if name == "contextual" and rows > 5 else 0
    )
    assert (
        counts["train_step"] == counter.get_total_flops() - 2 * more * 2 * 32 * 64
    )  # in two of the four layers


def test_a_model_that_the_counter_cannot_follow_costs_no_run(
    models, reviews, tmp_path, monkeypatch, capsys
):
    def raises(*_, **__):
        raise RuntimeError("Expected gradient function to be set\nmore")

    monkeypatch.setattr("torch.utils.flop_counter.FlopCounterMode.__enter__", raises)
    monkeypatch.setattr(common, "time_inference", lambda *_: {})
    [path] = lora.main(
        [
            "--dataset",
            reviews,
            "--model",
            models("distilbert"),
            "--max_length",
            24,
            "--max_steps",
            2,
            "--out",
            tmp_path,
        ]
    )
    result = json.loads(path.read_text())
    assert result["flops"] == {} and result["metrics"] and path.with_suffix("").is_dir()
    assert (
        "no FLOPs" in (out := capsys.readouterr().out)
        and "Expected gradient" in out
        and "more" not in out
    )


def test_what_the_formulas_say():
    """The figures that the derivation is for, at DistilBERT's six layers."""
    assert full_step(6) / base_forward(6) == pytest.approx(3, rel=1e-3)
    assert (
        1.9 < lora_step(6) / base_forward(6) < 2.05
    )  # two thirds of full fine-tuning, not a hundredth
    assert hira_step(6) > lora_step(6)  # the dense gradient
    assert head_only_step(6) / base_forward(6) < 1.001


def test_flops_of_masked_lm(models, text_dir, tmp_path):
    """One token in seven is scored; the LM head sees these S rows only: d×d, then the frozen, tied d×V with a dx."""
    run, data, model, _ = ready(
        lora,
        tmp_path,
        "--dataset",
        "wikitext2",
        "--data_dir",
        text_dir,
        "--batch_size",
        B,
        "--max_length",
        L,
        "--model",
        models("distilbert", "MaskedLM", n_layers=2, **SIZES),
    )
    rows = B * len(range(3, L, 7))
    head_of = 2 * (
        product(rows, D, D) + product(rows, D, data.vocab)
    )  # forward and dx, nothing is trained in it
    counts = common.count_flops(model, data, run)
    assert counts["train_step"] == pytest.approx(lora_step(2) - head(1, 1) + head_of, rel=1e-4)


def test_flops_of_a_whole_run(models, reviews, tmp_path, monkeypatch):
    """A step counts all its micro-batches; a run counts the padded tokens that it really computed."""
    monkeypatch.setattr(common, "time_inference", lambda *_: {})
    flags = [
        "--dataset",
        reviews,
        "--model",
        models("distilbert"),
        "--max_length",
        24,
        "--epochs",
        2,
    ]
    [path] = lora.main([*flags, "--batch_size", 16, "--out", tmp_path / "a"])
    [other] = lora.main([*flags, "--batch_size", 16, "--grad_accum", 2, "--out", tmp_path / "b"])
    one, two = (json.loads(file.read_text()) for file in (path, other))
    assert two["flops"]["train_step"] == 2 * one["flops"]["train_step"]
    assert two["flops"]["inference_per_sample"] == one["flops"]["inference_per_sample"]
    for result, rows in ((one, 16), (two, 32)):
        padded = result["time"]["padded_tokens_per_second"] * result["time"]["train_seconds"]
        share = result["flops"]["train_total"] / result["flops"]["train_step"]
        assert share == pytest.approx(padded / (rows * 24), rel=1e-6), rows


# ------------------------------------------------------------------------------------------------ memory


def base_bytes(folder, head="SequenceClassification"):
    """(bytes of the base without what its checkpoint lacks, bytes of that) by transformers alone."""
    import transformers

    model, info = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
        folder, output_loading_info=True
    )
    tensors = {id(t): (name, t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    missing = sum(4 * t.numel() for name, t in tensors.values() if name in info["missing_keys"])
    return sum(t.numel() * t.element_size() for _, t in tensors.values()) - missing, missing


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("task", ["rows", "mlm"])
def test_bytes_are_the_tensors_own(models, reviews, text_dir, tmp_path, monkeypatch, name, task):
    """base, adapter, head, gradients and optimizer from first principles: the same base for every method that keeps fp32."""
    monkeypatch.setattr(common, "time_inference", lambda *_: {})
    module, more = EVERY[name]
    flags = (
        ["--dataset", reviews, "--max_length", 24]
        if task == "rows"
        else ["--dataset", "wikitext2", "--data_dir", text_dir, "--max_length", 16]
    )
    [path] = module.main(
        [*more, *flags, "--model", models("distilbert"), "--max_steps", 3, "--out", tmp_path]
    )
    result = json.loads(path.read_text())
    memory, n = result["memory"], result["parameters"]
    base, missing = base_bytes(
        models("distilbert"), "SequenceClassification" if task == "rows" else "MaskedLM"
    )
    # LoRA on q and v, two layers: (r, 32) and (32, r) each, four bytes a number.
    adapter = {"head only": 0, "full": 0}.get(name, 2 * 2 * (8 * 32 + 32 * 8) * 4)
    adapter += adapter // 4 * (name == "prune")  # masks, a byte for each number
    assert memory["head"] == missing == 4 * n["head"] and memory["adapter"] == adapter
    if name == "qlora":
        info = result["method_info"]
        assert memory["base"] == base - info["bytes_fp32"] + info["bytes_nf4"]
    else:
        assert memory["base"] == base
    trained = n["trainable"]
    tensors = sum(1 for part in trained_shapes(path))
    assert memory["gradients"] == 4 * trained
    # AdamW keeps two fp32 numbers for each trained one, and its step count, one fp32 number a tensor.
    assert memory["optimizer"] == 8 * trained + 4 * tensors
    assert result["disk"]["base"] == memory["base"] + memory["head"]
    assert result["disk"]["merged"] == base + missing  # QLoRA's too: merging gives up the four bits


def trained_shapes(path):
    """What a run trained: the tensors of its adapter file."""
    from safetensors import safe_open

    with safe_open(path.with_suffix("") / "adapter_model.safetensors", "pt") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]


def test_bf16_halves_the_frozen_matrices(models, reviews, tmp_path):
    sizes = {}
    for precision in ("fp32", "bf16"):
        run, data, model, _ = ready(
            lora,
            tmp_path,
            "--dataset",
            reviews,
            "--model",
            models("distilbert"),
            "--max_length",
            24,
            "--precision",
            precision,
        )
        matrices = sum(t.numel() for t in model.parameters() if not t.requires_grad and t.ndim > 1)
        sizes[precision] = sum(t.nbytes for t in model.parameters())
    assert sizes["fp32"] - sizes["bf16"] == 2 * matrices


resettable = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="no peak to reset on this system"
)


@resettable
def test_reset_peak_forgets_what_was_freed():
    device = torch.device("cpu")
    big = torch.ones(64 << 20)  # 256 MiB
    del big
    before = common.peak(device)
    common.reset_peak(device)
    assert before - common.peak(device) > 200 << 20
    big = torch.ones(32 << 20)
    assert common.peak(device) - common.resident(device) < 16 << 20 and len(big)
    high = common.resident(device)
    assert common.peak(device) > high - (16 << 20)
    del big
    common.reset_peak(device)  # only now: what is freed is kept for the next tensor
    assert high - common.resident(device) > 100 << 20


@resettable
def test_a_second_seed_does_not_inherit_the_first_ones_peak(models, reviews, tmp_path, monkeypatch):
    """256 MiB planted in seed 0's training, and in seed 1's scoring: each is seen there and nowhere else."""
    monkeypatch.setattr(common, "time_inference", lambda *_: {})
    backward, score = common.backward, common.score

    def heavy(function, seed, position):
        def planted(*args):
            if args[position].seed == seed:
                assert len(torch.ones(64 << 20))
            return function(*args)

        return planted

    monkeypatch.setattr(common, "backward", heavy(backward, 0, 2))
    monkeypatch.setattr(common, "score", heavy(score, 1, 2))
    paths = lora.main(
        [
            "--dataset",
            reviews,
            "--model",
            models("distilbert"),
            "--max_length",
            24,
            "--max_steps",
            2,
            "--seeds",
            0,
            1,
            "--out",
            tmp_path,
        ]
    )
    first, second = (json.loads(path.read_text())["memory"] for path in paths)
    room = 150 << 20
    assert (
        first["train_peak"] - second["train_peak"] > room
        and first["train_peak"] - first["before_training"] > room
    )
    assert first["train_peak"] - first["inference_peak"] > room
    assert second["inference_peak"] - first["inference_peak"] > room
    assert abs(second["before_training"] - first["before_training"]) < room / 2


# ------------------------------------------------------------------------------------------------ time


class Clock:
    """A clock that stands still but for the work planted in functions of common.py and of a script."""

    def __init__(self, monkeypatch):
        self.now, self.monkeypatch = 1000.0, monkeypatch
        monkeypatch.setattr(common.time, "perf_counter", lambda: self.now)

    def plant(self, where, name, seconds):
        """Let every call of where.name take `seconds`, or seconds() if it is a function."""
        function = getattr(where, name)

        def slow(*args, **options):
            self.now += seconds() if callable(seconds) else seconds
            return function(*args, **options)

        self.monkeypatch.setattr(where, name, slow)


def test_work_outside_training_is_not_on_its_clock(models, reviews, tmp_path, monkeypatch):
    """A second a step, hours of everything else: train_seconds and epoch_seconds are the steps', the rest is booked apart."""
    clock = Clock(monkeypatch)
    clock.plant(common, "backward", 1.0)
    clock.plant(common, "read_rows", 300.0)
    clock.plant(common, "tokenise", 50.0)
    clock.plant(common, "score", 7000.0)
    clock.plant(common, "save_checkpoint", 20_000.0)
    clock.plant(common, "save_adapter", 11.0)
    monkeypatch.setattr(common, "time_inference", lambda *_: {})
    clock.plant(common, "time_inference", 400.0)
    clock.plant(common, "count_flops", 800.0)
    clock.plant(lora, "load_data", 5e5)
    clock.plant(lora, "load_base", 5e5)
    paths = lora.main(
        [
            "--dataset",
            reviews,
            "--model",
            models("distilbert"),
            "--max_length",
            24,
            "--epochs",
            3,
            "--split",
            "dev",
            "--batch_size",
            16,
            "--save_every",
            2,
            "--seeds",
            0,
            1,
            "--out",
            tmp_path,
        ]
    )
    for path in paths:
        times = json.loads(path.read_text())["time"]
        assert times["train_seconds"] == 21 and times["epoch_seconds"] == [7, 7, 7]
        assert (
            times["step_ms"] == {"median": 1000, "p10": 1000, "p90": 1000}
            and times["skipped_steps"] == 4
        )
        assert times["load"] == 300 and times["tokenise"] == 150
        assert times["evaluate"] == 7_000 and times["save"] == 11
        assert times["accelerator_hours"] == pytest.approx(21 / 3600)


def test_a_load_that_came_and_went_while_training_is_on_record(
    models, reviews, tmp_path, monkeypatch
):
    """Quiet at both ends, shared for most of the steps: compare.py takes the largest of the three."""
    loads = iter([0.5, *[9.0] * 8, *[1.5] * 6, 0.5])  # 14 steps, one look at each
    monkeypatch.setattr(common.os, "getloadavg", lambda: (next(loads), 0, 0))
    [path] = lora.main(
        [
            "--dataset",
            reviews,
            "--model",
            models("distilbert"),
            "--max_length",
            24,
            "--batch_size",
            16,
            "--epochs",
            2,
            "--quality_only",
            "--out",
            tmp_path,
        ]
    )
    assert json.loads(path.read_text())["environment"]["load_average"] == [
        0.5,
        9.0,
        0.5,
    ] and not list(loads)


def test_quality_only_scores_and_measures_no_inference(models, reviews, tmp_path, capsys):
    flags = [
        "--dataset",
        reviews,
        "--model",
        models("distilbert"),
        "--max_length",
        24,
        "--max_steps",
        2,
        "--out",
        tmp_path,
    ]
    [path] = lora.main([*flags, "--quality_only"])
    result = json.loads(path.read_text())
    assert (
        result["inference"] == []
        and result["flops"] == {}
        and "merged" in result["metrics"]
        and result["time"]
    )
    assert (
        lora.main(flags) == [] and "there already" in capsys.readouterr().out
    )  # the flag changes no outcome


@pytest.mark.parametrize("steps", [1, 4, 10, 11, 60, 75])
def test_step_statistics_against_numpy(models, reviews, tmp_path, monkeypatch, steps):
    """Each step takes another time; the first ones are left out, a fifth or ten at most."""
    monkeypatch.setattr(common, "time_inference", lambda *_: {})
    clock, lasting = (
        Clock(monkeypatch),
        np.random.default_rng(steps).uniform(0.5, 2, steps).tolist(),
    )
    upcoming = iter(lasting)
    clock.plant(common, "backward", lambda: next(upcoming))
    [path] = common.main(
        [
            "--dataset",
            reviews,
            "--model",
            models("distilbert"),
            "--max_length",
            24,
            "--max_steps",
            steps,
            "--batch_size",
            4,
            "--out",
            tmp_path,
        ]
    )
    times = json.loads(path.read_text())["time"]
    skipped = min(10, steps // 5)
    assert times["skipped_steps"] == skipped and times["train_seconds"] == pytest.approx(
        sum(lasting)
    )
    wanted = 1000 * np.array(lasting[skipped:])
    assert times["step_ms"]["p10"] == pytest.approx(np.percentile(wanted, 10))
    assert times["step_ms"]["p90"] == pytest.approx(np.percentile(wanted, 90))
    assert times["step_ms"]["median"] == pytest.approx(np.median(wanted))


@pytest.mark.parametrize(
    "flags", [["--epochs", 2], ["--max_steps", 10, "--grad_accum", 3], ["--max_steps", 1]]
)
@pytest.mark.parametrize("task", ["rows", "mlm"])
def test_rates_against_counts(models, reviews, text_dir, tmp_path, monkeypatch, flags, task):
    """Rows, real tokens and padded tokens a second, against what the model was really given."""
    monkeypatch.setattr(common, "time_inference", lambda *_: {})
    monkeypatch.setattr(common, "count_flops", lambda *_: {"train_step": 1})
    clock, forward, batches = Clock(monkeypatch), common.forward, []
    clock.plant(common, "backward", 0.5)

    def counting(model, batch):
        if model.training:
            batches.append((len(batch.ids), int(batch.attended.sum()), batch.ids.numel()))
        return forward(model, batch)

    monkeypatch.setattr(common, "forward", counting)
    data = (
        ["--dataset", reviews, "--model", models("distilbert")]
        if task == "rows"
        else [
            "--dataset",
            "wikitext2",
            "--data_dir",
            text_dir,
            "--model",
            models("distilbert", "MaskedLM"),
        ]
    )
    [path] = lora.main([*data, "--max_length", 24, "--batch_size", 16, *flags, "--out", tmp_path])
    times = json.loads(path.read_text())["time"]
    given = [sum(column) for column in zip(*batches, strict=True)]
    assert given[1] <= given[2] and given[0] > 0
    for key, value in zip(
        ("samples_per_second", "tokens_per_second", "padded_tokens_per_second"), given, strict=True
    ):
        assert times[key] == pytest.approx(value / times["train_seconds"]), key


def test_latency_is_of_three_states_in_turns(models, reviews, tmp_path, monkeypatch):
    """Full-length batches of 1 and 32; base without the adapter, merged equal to unmerged; statistics are numpy's."""
    flags = ["--dataset", reviews, "--model", models("distilbert"), "--max_length", 24]
    run, data, model, _ = ready(lora, tmp_path, *flags)
    for module in common.adapters(model).values():
        module.B.data.normal_(0, 0.5)
    plain = ready(common, tmp_path / "plain", *flags)[2].eval()
    clock, forward, seen = Clock(monkeypatch), common.forward, []
    draw = np.random.default_rng(0)

    def recording(model, batch):
        with torch.inference_mode():
            logits = forward(model, batch)
        lasting = draw.uniform(0.01, 0.03)
        clock.now += lasting
        kind = (
            "unmerged"
            if any(hasattr(module, "merged_weight") for module in model.modules())
            else "plain"
        )
        seen.append((kind, lasting, tuple(batch.ids.shape), logits, batch))
        return logits

    monkeypatch.setattr(common, "forward", recording)
    for rows in (1, 32):
        seen.clear()
        result = common.time_inference(model, data, run, torch.float32, rows)
        assert {shape for _, _, shape, _, _ in seen} == {(rows, 24)} and all(
            batch.attended.all() for *_, batch in seen
        )
        with torch.inference_mode():
            want = forward(plain, seen[0][4])
        laps, turns, merged = {"base": [], "merged": [], "unmerged": []}, [], None
        for kind, lasting, _, logits, _ in seen:
            name = (
                "unmerged"
                if kind == "unmerged"
                else "base"
                if torch.allclose(logits, want, atol=1e-5)
                else "merged"
            )
            if turns[-1:] != [name]:
                turns.append(name)  # the first pass of each turn warms up
            else:
                laps[name].append(lasting)
            if name == "merged":
                merged = logits
            assert name != "unmerged" or torch.allclose(logits, merged, atol=1e-5)
        for name, values in laps.items():
            ms = 1000 * np.array(values)
            assert len(ms) >= 8
            assert result[name]["latency_ms"]["mean"] == pytest.approx(ms.mean())
            assert result[name]["latency_ms"]["p50"] == pytest.approx(np.median(ms)), name
            assert result[name]["latency_ms"]["p95"] == pytest.approx(np.percentile(ms, 95))
            assert result[name]["samples_per_second"] == pytest.approx(rows / np.median(ms) * 1000)
    assert common.adapters(model).keys() == {
        f"distilbert.transformer.layer.{i}.attention.{name}"
        for i in range(2)
        for name in ("q_lin", "v_lin")
    }


def test_environment_says_what_the_figures_depend_on(monkeypatch):
    monkeypatch.setattr(common.os, "getloadavg", lambda: (3.5, 0, 0))
    found = common.environment(
        SimpleNamespace(device="cpu", precision="fp32", load_average=[1.25, 1.5])
    )
    assert (
        found["load_average"] == [1.25, 1.5, 3.5]
        and found["threads"] == torch.get_num_threads() == 1
    )
    assert (
        found["torch"] == torch.__version__.split("+")[0]
        and found["python"] == sys.version.split()[0]
    )
    assert found["commit"] is None or len(found["commit"]) == 40
    assert "cpu" in found and (
        sys.platform != "linux" or found["cpu"] in Path("/proc/cpuinfo").read_text()
    )
    assert found["device"].startswith("cpu") and math.isfinite(found["load_average"][0])
