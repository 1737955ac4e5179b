"""Pruning A and B: against closed formulas and brute force."""

import itertools

import pytest
import torch
from conftest import ready, rows_flags, stir, trained

import common
import lora
import sparse_lora
from harness import models as library

# ------------------------------------------------------------------------------------ the formulas


def test_schedule_is_the_cubic():
    """s·(1 - (1 - (t - t0)/(t1 - t0))³) from a tenth to 70 % of the steps, 0 before, s after."""
    for total, final in itertools.product((1, 7, 100, 1000), (0.0, 0.5, 0.9)):
        t0, t1 = 0.1 * total, 0.7 * total
        for t in range(total + 1):
            cubic = final + (0 - final) * (1 - (t - t0) / (t1 - t0)) ** 3
            wanted = 0 if t <= t0 else final if t >= t1 else cubic
            assert sparse_lora.sparsity_at(t, total, final) == pytest.approx(wanted, abs=1e-12)
        assert sparse_lora.sparsity_at(total, total, final) == final


def test_kept_components_by_brute_force():
    """Of all ways to keep this many with one a layer at least, the one with the largest sum."""
    for keep in range(1, 10):
        norms = torch.rand((3, 3), generator=torch.Generator().manual_seed(keep))
        chosen = sparse_lora.keep_components(norms, keep).flatten().nonzero()[:, 0].tolist()
        ways = itertools.combinations(range(9), max(keep, 3))
        ways = [way for way in ways if {i // 3 for i in way} == {0, 1, 2}]
        assert chosen == list(max(ways, key=lambda way: norms.flatten()[list(way)].sum().item()))
    ties = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    for keep in range(3, 10):  # a layer of zeros keeps one, and ties do not break the budget
        chosen = sparse_lora.keep_components(ties, keep)
        assert chosen.sum() == keep and chosen.any(1).all()
        mask = sparse_lora.largest(ties, keep)
        assert mask.sum() == keep
        assert ties[mask].sum() == ties.flatten().sort(descending=True).values[:keep].sum()


# ---------------------------------------------------------------------------------------- training


def pruning(models, reviews, out, *flags, kind="distilbert"):
    """(run, data, base, method, layers) with every number of A and B away from zero."""
    words = [*rows_flags(models, reviews, kind), "--rank", 4, "--lr", 0.02, "--batch_size", 8]
    run, data, base, method = ready(sparse_lora, out, *words, *flags)
    stir(base)
    return run, data, base, method, library.stand_ins(base.model)


def test_without_sparsity_and_penalty_it_is_lora_bit_for_bit(models, reviews, tmp_path):
    words = [*rows_flags(models, reviews), "--max_steps", 6, "--batch_size", 8, "--dropout", 0.1]
    *_, base, _, history = trained(sparse_lora, tmp_path / "pruned", *words, "--sparsity", 0)
    *_, plain, _, expected = trained(lora, tmp_path / "lora", *words)
    assert history.curve == expected.curve
    ours, theirs = (common.trained_tensors(each.model) for each in (base, plain))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("sparsity, steps", [(0.5, 1), (0.5, 3), (0.9, 20)])
def test_zeros_follow_the_schedule_and_stay_zero(sparsity, steps, models, reviews, tmp_path):
    """In each A and each B exactly the cubic's share after each step; none ever comes back."""
    flags = ["--sparsity", sparsity, "--max_steps", steps]
    run, data, base, method, layers = pruning(models, reviews, tmp_path, *flags)
    seen, prune = [], method.after_step

    def watch(step, total, lr):
        prune(step, total, lr)
        seen.append([t == 0 for layer in layers.values() for t in (layer.A, layer.B)])
        wanted = sparse_lora.sparsity_at(step, total, sparsity)
        assert [each.sum() for each in seen[-1]] == [round(wanted * t.numel()) for t in seen[-1]]
        for before, now in zip(seen[-2:][0], seen[-1], strict=True):
            assert not (before & ~now).any()

    method.after_step = watch
    assert common.train(run, data, base, method).step == len(seen) == steps
    shares = method.report()["sparsity"]
    products = torch.stack([layer.B @ layer.A for layer in layers.values()])
    assert shares["A"] == shares["B"] == pytest.approx(sparsity, abs=0.005)
    assert shares["BA"] == pytest.approx((products == 0).float().mean().item())


@pytest.mark.parametrize("flags", [["--sparsity", 0.25], ["--sparsity", 0, "--penalty", 0.5]])
@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_one_step_drops_the_smallest_or_shrinks_by_penalty_times_lr(
    kind, flags, models, reviews, tmp_path
):
    run, *_, method, layers = pruning(models, reviews, tmp_path, *flags, kind=kind)
    before = [tensor.clone() for layer in layers.values() for tensor in (layer.A, layer.B)]
    method.after_step(1, 1, 0.1)
    after = [tensor for layer in layers.values() for tensor in (layer.A, layer.B)]
    for old, now in zip(before, after, strict=True):
        if run.penalty:
            wanted = torch.where(old.abs() <= 0.05, 0, old - 0.05 * old.sign())
        else:
            smallest = old.abs().flatten().sort().values[old.numel() // 4 - 1]
            wanted = torch.where(old.abs() <= smallest, 0, old)
        torch.testing.assert_close(now.data, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("structure", ["none", "rank"])
def test_masked_stays_masked_among_the_penaltys_zeros(structure, models, reviews, tmp_path):
    """A zero that the penalty made is as small as a masked one, and must stay trainable."""
    flags = ["--sparsity", 0.5, "--penalty", 0.5, "--structure", structure]
    *_, method, layers = pruning(models, reviews, tmp_path, *flags)

    def masks():
        return [m.clone() for layer in layers.values() for m in (layer.mask_A, layer.mask_B)]

    method.after_step(2, 10, 0.0)
    before = masks()
    assert not all(mask.all() for mask in before)
    method.after_step(3, 10, 100.0)  # shrinks everything to zero
    assert not any(layer.A.any() or layer.B.any() for layer in layers.values())
    assert not any((now & ~old).any() for now, old in zip(masks(), before, strict=True))


@pytest.mark.parametrize("sparsity, expected", [(0.0, 16), (0.4, 10), (0.5, 8), (0.9, 4)])
def test_rank_structure_keeps_the_strongest_components_and_the_scale(
    sparsity, expected, models, reviews, tmp_path
):
    """round(16·(1 - s)) over four layers of rank 4, one in each at least; the patterns say so."""
    flags = ["--alpha", 6, "--structure", "rank", "--sparsity", sparsity]
    *_, method, layers = pruning(models, reviews, tmp_path, *flags)
    for i, layer in enumerate(layers.values()):
        layer.B.data *= 0.2 + i
    full = {path: (layer.A.clone(), layer.B.clone()) for path, layer in layers.items()}
    method.after_step(1, 1, 0.0)
    patterns = method.finish()
    ranks = {path: len(layer.A) for path, layer in layers.items()}
    assert sum(ranks.values()) == expected and min(ranks.values()) >= 1
    assert (len(set(ranks.values())) > 1) == (sparsity in (0.4, 0.5))
    for path, (A, B) in full.items():
        best = (B.norm(dim=0) * A.norm(dim=1)).topk(ranks[path]).indices.sort().values
        assert torch.equal(layers[path].A, A[best]) and torch.equal(layers[path].B, B[:, best])
    assert method.report()["ranks"] == ranks == patterns["rank_pattern"]
    assert method.report()["sparsity"]["A"] == 0  # the zeros are gone, not stored
    assert all(patterns["alpha_pattern"][path] / rank == 6 / 4 for path, rank in ranks.items())
