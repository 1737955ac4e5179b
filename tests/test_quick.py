"""What makes a CPU quick must not change the mathematics: dropout from 16 bits, attention, small parts, kept memory."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_training import gradients, ready, rows_flags, text_flags

import common
import lora
import sparse_lora


def test_kept_entries_have_the_share_the_scale_and_no_pattern():
    torch.manual_seed(0)
    x = torch.empty(2000, 1001)
    for p in (0.1, 0.5, 1 / 3):
        kept, scale = common.kept_entries(x, p)
        share = kept.double().mean().item()
        assert kept.shape == x.shape and abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / x.numel())
        assert abs(scale * (1 - round(p * 65536) / 65536) - 1) < 1e-12 and abs(round(p * 65536) / 65536 - p) <= 1 / 131072
        entries = kept.flatten().double()  # four entries come from one draw: neighbours must still be independent
        for lag in (1, 2, 3, 4, 1001):
            together = (entries[lag:] * entries[:-lag]).mean().item()
            assert abs(together - (1 - p) ** 2) < 5 / math.sqrt(x.numel()), (p, lag)


def test_dropout_scales_what_it_keeps_and_its_gradient_alike():
    torch.manual_seed(0)
    x = torch.randn(33, 17, requires_grad=True)
    y = common.QuickDropout.apply(x, 0.25)
    dropped = y == 0
    assert 0.1 < dropped.double().mean() < 0.4 and torch.allclose(y[~dropped], x[~dropped] / 0.75)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(dropped, 0.0, torch.tensor(1 / 0.75)))
    assert set(common.Dropout(0.25).train()(torch.ones(999)).tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert common.Dropout(0.25).eval()(x) is x and torch.equal(common.Dropout(0.0).train()(x), x)


def heads(rows=3, count=2, length=5, width=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, length, count, width, dtype=torch.float64, generator=generator).transpose(1, 2).requires_grad_()
            for _ in range(3)]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_autograds_with_the_same_dropout(masked):
    """Output and gradients equal those of softmax, mask and product written out, and gradcheck agrees."""
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    mask[1, :, :, 3:] = False
    mask = mask if masked else None

    def ours(q, k, v):
        torch.manual_seed(5)
        return common.QuickAttention.apply(q, k, v, mask, 0.3, 0.5)

    def written_out(q, k, v):
        torch.manual_seed(5)
        w = 0.5 * q @ k.mT
        w = (w if mask is None else w.masked_fill(~mask, -math.inf)).softmax(-1)
        kept, scale = common.kept_entries(w, 0.3)
        return ((w * kept * scale) @ v).transpose(1, 2)
    q, k, v = heads()
    assert torch.autograd.gradcheck(ours, (q, k, v))
    weight = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    found = []
    for f in (ours, written_out):
        out = f(q, k, v)
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    torch.manual_seed(5)
    none_dropped = common.QuickAttention.apply(q, k, v, mask, 1e-9, 0.5)  # rounds to dropping nothing
    theirs = F.scaled_dot_product_attention(q, k, v, mask, scale=0.5).transpose(1, 2)
    assert torch.allclose(none_dropped, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind, rates", [("distilbert", {"dropout": 0.1, "attention_dropout": 0.1}),
                                         ("bert", {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1})])
def test_quickened_encoder_is_the_librarys_where_nothing_is_dropped(models, reviews, tmp_path, monkeypatch, kind, rates):
    """With dropout that keeps everything, logits and gradients are those of transformers' own model, padding included."""
    from transformers import AutoModelForSequenceClassification
    monkeypatch.setattr(common, "kept_entries", lambda x, p: (torch.ones_like(x, dtype=torch.bool), 1.0))
    run, data, model, _ = ready(common, tmp_path, "--dataset", reviews, "--model", models(kind, **rates), "--max_length", 24,
                                "--full")
    assert model.config._attn_implementation == "quick"
    model.eval()
    oracle = AutoModelForSequenceClassification.from_pretrained(run.model, num_labels=2).eval()
    oracle.load_state_dict(model.state_dict())
    assert oracle.config._attn_implementation == "sdpa"
    batch = common.collate(data, data.train, torch.arange(9), None, None)
    assert not batch.attended.all()
    found = []
    for network in (model.train(), oracle):
        network.requires_grad_(True)
        logits = common.forward(network, batch)
        F.cross_entropy(logits, batch.target).backward()
        found.append([logits, *(tensor.grad for _, tensor in sorted(network.named_parameters()) if tensor.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked_lm", [False, True])
def test_the_gradient_does_not_depend_on_the_parts(models, reviews, text_dir, tmp_path, monkeypatch, masked_lm):
    flags = text_flags(models, text_dir) if masked_lm else rows_flags(models, reviews)
    found, seen, cut = [], [], common.parts

    def small(rows, lengths, size, device):
        seen.extend(small := cut(rows, lengths * 100, size, device))
        return small
    for parts in (small, lambda rows, lengths, size, device: [rows]):
        monkeypatch.setattr(common, "parts", parts)
        run, data, model, _ = ready(lora, tmp_path, *flags)
        torch.manual_seed(0)
        for tensor in model.parameters():
            if tensor.requires_grad:
                torch.nn.init.normal_(tensor, 0, 0.3)
        rows = data.train.rows[:32]
        found.append((gradients(run, data, model, rows), common.score(model, data, run)))
    assert max(map(len, seen)) < 4  # it was cut
    ((loss, one), scores), ((other, all_at_once), others) = found
    assert abs(loss - other) < 1e-6
    assert all(torch.allclose(one[key], all_at_once[key], rtol=1e-4, atol=1e-6) for key in one)
    assert abs(scores["loss"] - others["loss"]) < 1e-6 and scores.get("correct") == others.get("correct")


@pytest.mark.parametrize("device, longest, sizes", [
    ("cpu", 32, [32, 8]), ("cpu", 100, [10, 10, 10, 10]), ("cpu", 2000, [1] * 40), ("cuda", 2000, [32, 8])])
def test_parts_hold_a_thousand_tokens_on_a_cpu_and_the_batch_on_a_gpu(device, longest, sizes):
    lengths = torch.full((100,), longest)
    lengths[60:] = 7  # the longest row decides
    rows = torch.arange(40, 80)
    cut = common.parts(rows, lengths, 32, torch.device(device))
    assert list(map(len, cut)) == sizes and torch.equal(torch.cat(cut), rows)
    assert common.parts(rows[:0], lengths, 32, torch.device(device)) == []


def test_the_batch_with_the_most_tokens_comes_first():
    lengths = torch.randint(1, 200, (1001,), generator=torch.Generator().manual_seed(0))
    for epoch in range(3):
        tokens = [len(batch) * int(lengths[batch].max()) for batch in common.order(lengths, 32, 0, epoch)]
        assert tokens[0] == max(tokens) and tokens[1:] != sorted(tokens[1:]) and tokens[1:] != sorted(tokens[1:])[::-1]


def test_freed_memory_is_kept_and_reset_peak_returns_it():
    """Another tensor of 64 MiB causes next to no page faults; in a process of its own, since malloc's settings stay."""
    if sys.platform != "linux" or not hasattr(__import__("ctypes").CDLL(None), "gnu_get_libc_version"):
        pytest.skip("glibc only")
    code = """
import resource, sys, torch, common
if sys.argv[1] == "keep": common.keep_freed_memory()
for _ in range(3): torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
full = common.resident(torch.device("cpu"))
common.reset_peak(torch.device("cpu"))
print(faults, full - common.resident(torch.device("cpu")))
"""
    found = {}
    for mode in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, check=True,
                              cwd=Path(common.__file__).parent)
        found[mode] = list(map(int, done.stdout.split()))
    assert found["keep"][0] < 100 and found["keep"][1] > 60 * 2**20
    assert found["leave"][0] > 10 * max(found["keep"][0], 1)


def test_contextual_picks_channels_for_each_part(models, reviews, tmp_path, monkeypatch):
    """Each part of a batch is a forward pass of its own, with its own channels."""
    run, data, model, method = ready(sparse_lora, tmp_path, *rows_flags(models, reviews), "--mode", "contextual")
    method["after_step"](10, 10, 0.0)
    picked = []
    inner = next(module for module in model.modules() if isinstance(module, sparse_lora.WayIn))
    inner.register_forward_hook(lambda module, *_: picked.append(module.channels.picked))
    cut = common.parts
    monkeypatch.setattr(common, "parts", lambda rows, lengths, size, device: cut(rows, lengths, 8, device))
    gradients(run, data, model, data.train.rows[:32])
    assert len(picked) == 4 and len({tuple(channels.tolist()) for channels in picked}) > 1
