"""Sparse LoRA: pruning against closed formulas and brute force, contextual sparsity against a masked dense layer."""

import itertools
import json
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS, tiny_config
from safetensors.torch import load_file
from test_adapters import (
    DECODERS,
    DISTILBERT,
    HEADS,
    batch_of,
    close,
    gradients,
    load_in_peft,
    models,
    peft_logits,
    quick,
    randomise,
    start,
    toy_data,
    transformers_model,
)

import common
import lora
import sparse_lora

FIXTURES = (models, quick)  # in force here, too


def pruned(kind, models, out, *flags, steps=10, watch=None):
    """(model, run, method, history) after a short training with --mode prune; watch(step, layers) is called each step."""
    model, run, method = start(
        "prune", models(kind), out, "--max_steps", steps, "--batch_size", 8, "--lr", 0.02, *flags
    )
    layers, method_step = list(common.adapters(model).values()), method["after_step"]

    def after_step(step, total, lr):
        method_step(step, total, lr)
        if watch:
            watch(step, layers)

    history = common.train(model, toy_data(kind), run, method | {"after_step": after_step})
    return model, run, method, history


def shares(layers):
    return [
        ((layer.A == 0).float().mean().item(), (layer.B == 0).float().mean().item())
        for layer in layers
    ]


# ------------------------------------------------------------------------------------------------ prune: the formulas


def test_schedule_is_the_cubic():
    """s_t = s_f·(1 - (1 - (t - t0)/(n·Δt))³) between a tenth and 70 % of the steps, 0 before, s_f after."""
    for total, final in itertools.product((1, 7, 100, 1000), (0.0, 0.5, 0.9)):
        t0, end = 0.1 * total, 0.7 * total
        for t in range(total + 1):
            s = (
                0
                if t <= t0
                else final
                if t >= end
                else final + (0 - final) * (1 - (t - t0) / (end - t0)) ** 3
            )
            assert sparse_lora.sparsity_at(t, total, final) == pytest.approx(s, abs=1e-12)
        assert (
            sparse_lora.sparsity_at(total, total, final) == final
            and sparse_lora.sparsity_at(0, total, final) == 0
        )


@pytest.mark.parametrize("amount", [0.0, 0.05, 0.4])
def test_shrink_is_the_proximal_operator_of_l1(amount):
    """argmin_z ½(z - w)² + amount·|z|, by brute force over a grid that holds zero."""
    w = torch.tensor(
        [-1.3, -0.41, -0.2, -0.05, 0.0, 0.01, 0.05, 0.3, 0.9, 2.0], dtype=torch.float64
    )
    grid = torch.arange(-2500, 2501, dtype=torch.float64) / 1000
    best = grid[((grid - w[:, None]) ** 2 / 2 + amount * grid.abs()).argmin(1)]
    shrunk = sparse_lora.shrink(w, amount)
    assert (shrunk - best).abs().max() <= 0.0005001 and torch.equal(shrunk == 0, w.abs() <= amount)


@pytest.mark.parametrize("keep", range(1, 10))
def test_keep_components_by_brute_force(keep):
    """Of all ways to keep that many with one a layer at least, the one with the largest sum of norms."""
    norms = torch.rand((3, 3), generator=torch.Generator().manual_seed(keep))
    kept = sparse_lora.keep_components(norms, keep)
    best = max(
        (
            choice
            for choice in itertools.combinations(range(9), max(keep, 3))
            if {i // 3 for i in choice} == {0, 1, 2}
        ),
        key=lambda choice: norms.flatten()[list(choice)].sum().item(),
    )
    assert kept.flatten().nonzero()[:, 0].tolist() == sorted(best)


def test_keep_components_with_an_empty_layer_and_ties():
    """A layer whose components are all zero keeps one, and ties do not break the budget."""
    norms = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    for keep in range(3, 10):
        kept = sparse_lora.keep_components(norms, keep)
        assert kept.sum() == keep and kept.any(1).all()


def test_largest_keeps_exactly_so_many():
    values = torch.tensor([[3.0, 1.0, 2.0], [2.0, 2.0, 0.0]])
    for keep in range(7):
        mask = sparse_lora.largest(values, keep)
        assert (
            mask.sum() == keep
            and values[mask].sum() == values.flatten().sort(descending=True).values[:keep].sum()
        )


# ------------------------------------------------------------------------------------------------ prune: training


def test_without_sparsity_and_penalty_it_is_lora_bit_for_bit(models, reviews, tmp_path):
    argv = [
        "--dataset",
        reviews,
        "--model",
        models("distilbert"),
        "--max_steps",
        8,
        "--batch_size",
        8,
        "--max_length",
        32,
        "--dropout",
        0.1,
        "--lr",
        0.02,
        "--device",
        "cpu",
        "--out",
        tmp_path,
    ]
    ours, theirs = sparse_lora.main([*argv, "--sparsity", 0, "--penalty", 0])[0], lora.main(argv)[0]
    saved, expected = (
        load_file(path.with_suffix("") / "adapter_model.safetensors") for path in (ours, theirs)
    )
    assert saved.keys() == expected.keys() and all(
        torch.equal(saved[name], expected[name]) for name in expected
    )
    ours, theirs = json.loads(ours.read_text()), json.loads(theirs.read_text())
    assert ours["metrics"] == theirs["metrics"] and ours["curve"] == theirs["curve"]


@pytest.mark.parametrize(
    "sparsity, steps", [(0.5, 1), (0.5, 2), (0.5, 3), (0.5, 12), (0.3, 12), (0.9, 12)]
)
def test_share_of_zeros_is_exact(sparsity, steps, models, tmp_path):
    """In each A and each B, saved and reported; also after a single step."""
    model, run, method, _ = pruned(
        "distilbert", models, tmp_path, "--sparsity", sparsity, steps=steps
    )
    for path, final in common.save_adapter(model, toy_data("distilbert"), run, method).items():
        path.replace(final)
    saved = load_file(run.path.with_suffix("") / "adapter_model.safetensors")
    factors = [tensor for name, tensor in saved.items() if "lora_" in name]
    assert len(factors) == 8
    for tensor in factors:
        assert (tensor == 0).sum() == round(sparsity * tensor.numel())
    reported = method["info"]()["sparsity"]
    products = [layer.B @ layer.A for layer in common.adapters(model).values()]
    assert reported["A"] == pytest.approx(sparsity, abs=0.005) and reported["B"] == pytest.approx(
        sparsity, abs=0.005
    )
    assert reported["BA"] == pytest.approx(
        sum((each == 0).sum().item() for each in products) / sum(each.numel() for each in products)
    )


def test_zeros_follow_the_schedule_and_stay_zero(models, tmp_path):
    """After each step A and B hold the cubic's share of zeros, and an entry once zero never comes back."""
    seen, total = [], 20

    def watch(step, layers):
        seen.append([(layer.A.detach() == 0, layer.B.detach() == 0) for layer in layers])
        wanted = sparse_lora.sparsity_at(step, total, 0.6)
        for i, zeros in enumerate(seen[-1] if step else []):  # before step 1 all of B is zero
            assert [each.sum() for each in zeros] == [
                round(wanted * each.numel()) for each in zeros
            ]
            assert step == 1 or not any(
                (before & ~now).any() for before, now in zip(seen[-2][i], zeros, strict=True)
            )

    pruned("distilbert", models, tmp_path, "--sparsity", 0.6, steps=total, watch=watch)
    assert len(seen) == total + 1


def test_what_is_dropped_is_the_smallest(models, tmp_path):
    """prune_step on given numbers: the kept entries of each matrix are its largest by magnitude."""
    model, run, _ = start("prune", models("distilbert"), tmp_path, "--sparsity", 0.25)
    randomise(model)
    layers = list(common.adapters(model).values())
    before = [(layer.A.clone(), layer.B.clone()) for layer in layers]
    sparse_lora.prune_step(layers, 1, 1, 0.0, run)
    for layer, originals in zip(layers, before, strict=True):
        for now, original in zip((layer.A, layer.B), originals, strict=True):
            kept = now != 0
            assert (
                torch.equal(now[kept], original[kept])
                and original[~kept].abs().max() < original[kept].abs().min()
            )
            assert (~kept).sum() == original.numel() // 4


@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_penalty_shrinks_after_the_step_by_penalty_times_rate(kind, models, tmp_path):
    model, run, _ = start("prune", models(kind), tmp_path, "--sparsity", 0, "--penalty", 0.5)
    randomise(model)
    layers = list(common.adapters(model).values())
    before = [(layer.A.clone(), layer.B.clone()) for layer in layers]
    sparse_lora.prune_step(layers, 3, 10, 0.1, run)
    for layer, originals in zip(layers, before, strict=True):
        for now, original in zip((layer.A, layer.B), originals, strict=True):
            expected = torch.where(original.abs() <= 0.05, 0, original - 0.05 * original.sign())
            close(now, expected, 1e-7)


def test_penalty_alone_gives_real_zeros(models, tmp_path):
    """More of them the larger it is; none without it."""
    zeros = []
    for penalty in (0, 0.3, 1.5):
        model, *_ = pruned(
            "distilbert",
            models,
            tmp_path,
            "--sparsity",
            0,
            "--penalty",
            penalty,
            "--force",
            steps=15,
        )
        layers = list(common.adapters(model).values())
        zeros.append(sum(a + b for a, b in shares(layers)))
    assert zeros[0] == 0 < zeros[1] < zeros[2]


# ------------------------------------------------------------------------------------------------ prune: ranks


@pytest.mark.parametrize("structure", ["none", "rank"])
def test_masked_stays_masked_where_the_penalty_leaves_zeros_too(structure, models, tmp_path):
    """A zero that the penalty made ties with a masked one in size, and must be the one that stays trainable."""
    flags = ["--sparsity", 0.5, "--penalty", 0.5, "--structure", structure]
    model, run, _ = start("prune", models("distilbert"), tmp_path, *flags)
    randomise(model)
    layers = list(common.adapters(model).values())
    sparse_lora.prune_step(layers, 2, 10, 0.0, run)
    before = [(layer.mask_A.clone(), layer.mask_B.clone()) for layer in layers]
    assert not all(mask.all() for masks in before for mask in masks)
    sparse_lora.prune_step(layers, 3, 10, 100.0, run)  # shrinks everything to zero
    for layer, masks in zip(layers, before, strict=True):
        assert (layer.A == 0).all() and (layer.B == 0).all()
        assert not (layer.mask_A & ~masks[0]).any() and not (layer.mask_B & ~masks[1]).any()


def test_rank_structure_keeps_the_budget_and_the_scale(models, tmp_path):
    """Layers of unlike size end with unlike ranks, kept components are untouched, the file is smaller, PEFT agrees."""
    kind = "distilbert"
    model, run, method = start("rank", models(kind), tmp_path, "--alpha", 6, "--sparsity", 0.5)
    randomise(model)
    layers = common.adapters(model)
    with torch.no_grad():
        for i, layer in enumerate(layers.values()):
            layer.B *= 0.2 + i
    full = {path: (layer.A.clone(), layer.B.clone()) for path, layer in layers.items()}
    norms = torch.stack([B.norm(dim=0) * A.norm(dim=1) for A, B in full.values()])
    method["after_step"](1, 1, 0.0)

    ranks = {path: len(layer.A) for path, layer in layers.items()}
    assert sum(ranks.values()) == 8 and len(set(ranks.values())) > 1 and min(ranks.values()) >= 1
    assert method["info"]()["ranks"] == ranks
    for (path, (A, B)), component in zip(full.items(), norms, strict=True):
        best = component.topk(ranks[path]).indices.sort().values
        assert torch.equal(layers[path].A, A[best]) and torch.equal(layers[path].B, B[:, best])
    for path, final in common.save_adapter(model, toy_data(kind), run, method).items():
        path.replace(final)
    folder = run.path.with_suffix("")
    saved = load_file(folder / "adapter_model.safetensors")
    assert {path: len(saved[f"base_model.model.{path}.lora_A.weight"]) for path in ranks} == ranks
    assert (
        sum(tensor.numel() for name, tensor in saved.items() if "lora_" in name) == 8 * 64
    )  # half of rank 4's 1,024
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == ranks and config["r"] == 4 and config["lora_alpha"] == 6
    assert all(config["alpha_pattern"][path] / rank == 6 / 4 for path, rank in ranks.items())
    assert common.count_parameters(run, model)["adapter"] == 8 * 64
    with torch.no_grad():
        ours = common.forward(model.eval(), batch_of(kind))
        theirs = load_in_peft(transformers_model(models(kind), "classification"), folder)
        close(ours, peft_logits(theirs, batch_of(kind)), 1e-5)


@pytest.mark.parametrize("sparsity, expected", [(0.0, 16), (0.4, 10), (0.75, 4), (0.9, 4)])
def test_rank_budget_after_training(sparsity, expected, models, tmp_path):
    """round(16·(1 - s)) components over four layers of rank 4, but one in each at the least."""
    model, _, method, _ = pruned(
        "distilbert", models, tmp_path, "--structure", "rank", "--sparsity", sparsity, steps=8
    )
    ranks = [len(layer.A) for layer in common.adapters(model).values()]
    assert sum(ranks) == expected and min(ranks) >= 1
    assert all(layer.A.shape[0] == layer.B.shape[1] for layer in common.adapters(model).values())
    assert method["info"]()["sparsity"]["A"] == 0  # the zeros are gone, not stored


# ------------------------------------------------------------------------------------------------ contextual: the estimators


def made_up_layer(hidden=512, width=64, heavy=51, rows=1000):
    """x and a layer of which one tenth of the channels answer strongly, along a few directions: (x, weight, bias, heavy)."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(hidden, width, generator=draw) * 0.05
    picked = torch.randperm(hidden, generator=draw)[:heavy]
    weight[picked] += (
        torch.randn(heavy, 4, generator=draw) @ torch.randn(4, width, generator=draw) * 0.3
    )
    return (
        torch.randn(rows, width, generator=draw),
        weight,
        torch.randn(hidden, generator=draw) * 0.1,
        picked,
    )


def overlap(scores, others, keep):
    return (
        len(set(scores.topk(keep).indices.tolist()) & set(others.topk(keep).indices.tolist()))
        / keep
    )


@pytest.mark.parametrize("act", [F.gelu, F.silu])
def test_scores_find_the_channels_that_matter(act):
    """Against the norm over all rows by plain loops. Keeping a tenth, chance would be 0.1."""
    x, weight, bias, heavy = made_up_layer()
    true = torch.stack(
        [act(x @ row + b).square().sum().sqrt() for row, b in zip(weight, bias, strict=True)]
    )
    assert set(true.topk(40).indices.tolist()) <= set(heavy.tolist())
    close(sparse_lora.sampled_scores(x, [weight], [bias], act), true, 1e-4)
    assert overlap(sparse_lora.sampled_scores(x[::15], [weight], [bias], act), true, 51) > 0.85
    assert (
        overlap(
            sparse_lora.estimated_scores(x, [sparse_lora.svd_estimate(weight)], [bias], act),
            true,
            51,
        )
        > 0.85
    )


def test_gated_scores():
    """A gated block's channel is act(gate)·up, with or without biases."""
    x, gate, bias, _ = made_up_layer(hidden=40, width=16, heavy=4, rows=30)
    up = gate.flip(0).contiguous()
    true = (F.silu(x @ gate.T) * (x @ up.T)).square().sum(0).sqrt()
    close(sparse_lora.sampled_scores(x, [gate, up], [None, None], F.silu), true, 1e-5)
    factors = [
        sparse_lora.svd_estimate(weight, k=16) for weight in (gate, up)
    ]  # full rank: no longer an estimate
    close(sparse_lora.estimated_scores(x, factors, [None, None], F.silu), true, 1e-4)
    true = (F.silu(x @ gate.T + bias) * (x @ up.T + bias)).square().sum(0).sqrt()
    close(sparse_lora.sampled_scores(x, [gate, up], [bias, bias], F.silu), true, 1e-5)


@pytest.mark.parametrize("shape", [(96, 24), (24, 96)])
def test_svd_estimate_is_the_truncated_svd(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    P, R = sparse_lora.svd_estimate(weight)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    assert P.shape == (shape[1], 8) and R.shape == (8, shape[0])
    close((P @ R).T, U[:, :8] * S[:8] @ Vh[:8], 1e-4)


# ------------------------------------------------------------------------------------------------ contextual: the model

DEEP = {
    "distilbert": {"n_layers": 4},
    "bert": {"num_hidden_layers": 4},
    "roberta": {"num_hidden_layers": 4},
    "llama": {"num_hidden_layers": 4},
}
ARCHITECTURES = list(DEEP)
EVERYTHING = 1e-17  # a sparsity that leaves no channel out, through the sparse path all the same


def contextual(kind, models, out, *flags, checkpoint="", task="classification"):
    """A randomised model of four layers in contextual mode, switched on, and its sparse ways in: (model, run, ways)."""
    model, run, method = start(
        "contextual", models(kind, checkpoint, **DEEP[kind]), out, *flags, task=task
    )
    randomise(model)
    method["after_step"](1, 1, 0.0)
    return (
        model.train(),
        run,
        [module for module in model.modules() if isinstance(module, sparse_lora.WayIn)],
    )


@pytest.mark.parametrize("n", [0, 1, 3])
def test_dense_layers_are_the_first_ones(n, models, tmp_path):
    _, _, method = start(
        "contextual", models("distilbert", **DEEP["distilbert"]), tmp_path, "--dense_layers", n
    )
    assert list(method["info"]()["channels_kept"]) == [
        f"distilbert.transformer.layer.{i}" for i in range(n, 4)
    ]


def test_the_svd_estimate_picks_where_it_is_asked_to(models, tmp_path):
    model, _, (first, *_) = contextual(
        "distilbert", models, tmp_path, "--sparsity", 0.6, "--estimator", "svd"
    )
    inputs, batch = [], batch_of("distilbert", lengths=(40, 12, 31, 26, 40, 9, 38))
    first.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    common.forward(model, batch)
    scores = sparse_lora.estimated_scores(
        inputs[0][batch.attended],
        [sparse_lora.svd_estimate(first.base.weight)],
        [first.base.bias],
        F.gelu,
    )
    assert torch.equal(
        first.channels.picked, scores.topk(first.channels.keep).indices.sort().values
    )


def dense_twin(kind, models, out, checkpoint="", task="classification"):
    model, _, _ = start("lora", models(kind, checkpoint, **DEEP[kind]), out, task=task)
    randomise(model)
    return model.train()


def with_input_gradient(model):
    """Ask for a gradient at the very input, so that all input gradients along the way are compared."""
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


@pytest.mark.parametrize("estimator", ["sample", "svd"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_keeping_all_channels_equals_dense(kind, estimator, models, tmp_path):
    """Through the sparse path, forward and backward."""
    model, _, ways = contextual(
        kind, models, tmp_path, "--sparsity", EVERYTHING, "--estimator", estimator
    )
    twin, batch = dense_twin(kind, models, tmp_path), batch_of(kind)
    flat = []
    for way in ways:
        way.register_forward_hook(lambda module, args, output: flat.append(output.ndim))
    close(
        common.forward(with_input_gradient(model), batch),
        common.forward(with_input_gradient(twin), batch),
        1e-6,
    )
    assert len(ways) == (4 if kind == "llama" else 2) and flat == [1] * len(
        ways
    )  # the sparse path was taken
    ours, theirs = gradients(model, batch), gradients(twin, batch)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        close(ours[name], grad, 1e-5)


CASES = [
    (kind, "", "classification", tokens, estimator)
    for kind in ARCHITECTURES
    for tokens in ("scored", "none")
    for estimator in ("sample", "svd")
] + [
    ("distilbert", "MaskedLM", "mlm", "scored", "sample"),
    ("llama", "", "clm", "scored", "sample"),
]


@pytest.mark.parametrize("kind, checkpoint, task, dense_tokens, estimator", CASES)
def test_sparse_equals_autograd_of_the_masked_dense_layer(
    kind, checkpoint, task, dense_tokens, estimator, models, tmp_path
):
    """The same channels set to zero in the wide middle of a dense model, all but in the dense rows: logits and gradients."""
    model, run, ways = contextual(
        kind,
        models,
        tmp_path,
        "--sparsity",
        0.6,
        "--dense_tokens",
        dense_tokens,
        "--estimator",
        estimator,
        checkpoint=checkpoint,
        task=task,
    )
    twin, batch = dense_twin(kind, models, tmp_path, checkpoint, task), batch_of(kind, task)
    logits = common.forward(with_input_gradient(model), batch)
    firsts = [way.channels for way in ways if way.first]
    way_out = sparse_lora.FFN[kind][-1]
    layers = [
        module
        for name, module in twin.named_modules()
        if name.endswith(way_out) and "attention.output" not in name
    ]
    assert [channels.keep for channels in firsts] == [
        int(64 * (1 - 0.6)),
        int(64 * (1 - 0.3)),
    ] and len(layers) == 4
    scored = (
        batch.scored
        if dense_tokens == "scored" and kind not in DECODERS
        else torch.zeros_like(batch.scored)
    )
    for channels, layer in zip(firsts, layers[2:], strict=True):
        mask = scored[..., None].repeat(1, 1, 64)  # (B, L, hidden)
        mask[..., channels.picked] = True
        assert len(channels.picked.unique()) == channels.keep
        layer.register_forward_pre_hook(lambda module, args, mask=mask: args[0] * mask)
    close(logits, common.forward(with_input_gradient(twin), batch), 1e-5)
    ours, theirs = gradients(model, batch), gradients(twin, batch)
    assert ours.keys() == theirs.keys() and all(grad.any() for grad in ours.values())
    for name, grad in theirs.items():
        close(ours[name], grad, 1e-5)
    assert (
        logits - common.forward(dense_twin(kind, models, tmp_path, checkpoint, task), batch)
    ).abs().max() > 1e-3


@pytest.mark.parametrize(
    "kind, lengths",
    [
        *((kind, (9, 4, 7, 2)) for kind in ARCHITECTURES),
        ("distilbert", (40, 12, 31, 26, 40, 9, 38)),
    ],
)
def test_picked_channels_are_the_top_over_attended_rows(kind, lengths, models, tmp_path):
    """By hand from the block's own input: all attended rows below 128 of them, above that every so manyth, 64 or more."""
    model, _, ways = contextual(kind, models, tmp_path, "--sparsity", 0.6)
    first, inputs = ways[0], []
    first.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    batch = batch_of(kind, lengths=lengths)
    common.forward(model, batch)
    x = inputs[0][batch.attended][:: max(1, sum(lengths) // 64)]
    assert len(x) == (sum(lengths) if sum(lengths) < 128 else 66)
    gated = kind == "llama"
    z = F.linear(x, first.base.weight, first.base.bias)
    z = F.silu(z) * F.linear(x, ways[1].base.weight) if gated else F.gelu(z)
    best = z.norm(dim=0).topk(first.channels.keep).indices.sort().values
    assert torch.equal(first.channels.picked, best)


@pytest.mark.parametrize("estimator", ["sample", "svd"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_padding_never_influences_the_choice(kind, estimator, models, tmp_path):
    """Neither other tokens in the padded places nor more of them, also with more rows than the sample holds."""
    model, _, ways = contextual(kind, models, tmp_path, "--sparsity", 0.6, "--estimator", estimator)
    lengths = (40, 12, 31, 26, 40, 9)  # 158 attended rows: every second one is in the sample
    batch = batch_of(kind, lengths=lengths)
    assert batch.attended.sum() == 158

    def choice(batch):
        logits = common.forward(model, batch)
        return logits, [way.channels.picked for way in ways]

    other = batch.ids.masked_fill(~batch.attended, 17)
    longer = common.Batch(*(F.pad(each, (0, 9)) for each in batch[:3]), batch.target)
    logits, picked = choice(batch)
    changed = [batch._replace(ids=longer.ids, attended=longer.attended, scored=longer.scored)]
    if kind not in DECODERS:  # HF's decoder head finds the last token by the padding id
        changed.append(batch._replace(ids=other))
    for variant in changed:
        new_logits, new_picked = choice(variant)
        assert all(torch.equal(a, b) for a, b in zip(picked, new_picked, strict=True))
        close(new_logits, logits, 1e-5)
    words = batch._replace(
        ids=torch.where(batch.attended, (batch.ids * 7 + 3) % len(WORDS) + 5, batch.ids)
    )
    assert any(
        not torch.equal(a, b) for a, b in zip(picked, choice(words)[1], strict=True)
    )  # the words do


@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_checkpointing_recomputes_with_the_same_channels(kind, models, tmp_path):
    """--checkpointing changes memory, not gradients."""
    batch, grads = batch_of(kind), []
    for flags in ((), ("--checkpointing",)):
        model, _, _ = contextual(kind, models, tmp_path, "--sparsity", 0.6, "--force", *flags)
        grads.append(gradients(model, batch))
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        close(grads[1][name], grad, 1e-6)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_evaluation_and_merging_are_dense(kind, models, tmp_path):
    """With the switch on: in eval mode the same numbers as LoRA's with the same weights, and other ones in training."""
    model, _, _ = contextual(kind, models, tmp_path, "--sparsity", 0.9)
    twin, batch = dense_twin(kind, models, tmp_path), batch_of(kind)
    with torch.no_grad():
        dense = common.forward(twin.eval(), batch)
        assert torch.equal(common.forward(model.eval(), batch), dense)
        with common.plain(model, True, torch.float32):
            close(common.forward(model, batch), dense, 1e-5)
        assert (common.forward(model.train(), batch) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("total, dense", [(1, 1), (20, 1), (40, 2), (50, 3), (1000, 50)])
def test_first_twentieth_of_the_steps_is_dense(total, dense, models, tmp_path):
    """after_step(step) decides how the next step, number step + 1, computes."""
    model, _, method = start("contextual", models("distilbert"), tmp_path, "--sparsity", 0.9)
    way, sparse = (
        next(module for module in model.modules() if isinstance(module, sparse_lora.WayIn)),
        [],
    )
    for step in range(total):
        method["after_step"](step, total, 0.0)
        sparse.append(way.channels.switch["on"])
    assert sparse == [False] * dense + [True] * (total - dense)


def test_layer_map_is_the_papers_by_depth():
    """The first half dense, then s, the last layer half of it (papers-facts §2e for 6 and 12 layers, the paper's 32)."""
    s = 0.9
    assert [sparse_lora.layer_sparsity(i, 6, s) for i in range(6)] == [0, 0, 0, s, s, s / 2]
    assert [sparse_lora.layer_sparsity(i, 12, s) for i in range(12)] == [0] * 6 + [s] * 5 + [s / 2]
    assert [sparse_lora.layer_sparsity(i, 2, s) for i in range(2)] == [0, s / 2]
    assert [sparse_lora.layer_sparsity(i, 6, s, dense=1) for i in range(6)] == [
        0,
        s,
        s,
        s,
        s,
        s / 2,
    ]
    assert [sparse_lora.layer_sparsity(i, 3, s, dense=0) for i in range(3)] == [s, s, s / 2]


@pytest.mark.parametrize("sparsity, kept", [(0.95, 153), (0.9, 307), (0.5, 1536)])
def test_channels_kept_at_distilberts_size(sparsity, kept):
    """int(3072·(1 - s)) in layers 3 and 4, half the sparsity in the last; on the meta device."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(
            tiny_config("distilbert", **DISTILBERT)
        )
        model.requires_grad_(False)
        run = Namespace(
            head=HEADS["distilbert", "", "classification"],
            rank=8,
            alpha=None,
            dropout=0.0,
            device="meta",
            targets=["q_lin", "v_lin"],
            mode="contextual",
            sparsity=sparsity,
            dense_tokens="scored",
            estimator="sample",
            dense_layers=None,
            structure="none",
            penalty=0.0,
        )
        method = sparse_lora.adapt(model, run)
    assert method["info"]()["channels_kept"] == {
        "distilbert.transformer.layer.3": kept,
        "distilbert.transformer.layer.4": kept,
        "distilbert.transformer.layer.5": int(3072 * (1 - sparsity / 2)),
    }


@pytest.mark.parametrize("dense_tokens", ["scored", "none"])
def test_flops_are_fewer_by_the_closed_formula(dense_tokens, models, tmp_path):
    """Per sparse block: forward and input gradient of two products with keep in place of hidden, plus the scoring."""

    def flops(method, *flags):
        model, run, recipe = start(
            method,
            models("distilbert", **DEEP["distilbert"]),
            tmp_path,
            "--max_length",
            32,
            "--batch_size",
            8,
            *flags,
        )
        recipe.get("after_step", lambda *args: None)(1, 1, 0.0)
        return common.count_flops(model, toy_data("distilbert"), run)

    ours = flops("contextual", "--sparsity", 0.75, "--dense_tokens", dense_tokens)
    theirs = flops("lora")
    assert ours["inference_per_sample"] == theirs["inference_per_sample"]
    rows, dense, sample, width, hidden = 8 * 32, 8 if dense_tokens == "scored" else 0, 64, 32, 64
    saved = 0
    for keep in (int(hidden * (1 - 0.75)), int(hidden * (1 - 0.375))):
        saved += (
            2 * width * 4 * (rows * hidden - rows * keep - dense * hidden)
            - 2 * width * sample * hidden
        )
    assert theirs["train_step"] - ours["train_step"] == saved > 0


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_autocast_on_cpu(kind, stored, models, tmp_path):
    """In bf16, frozen weights stored either way, the sparse path with all channels gives dense bf16's gradients, in fp32."""
    model, _, _ = contextual(
        kind, models, tmp_path, "--sparsity", EVERYTHING, "--precision", stored
    )
    twin, _, _ = start("lora", models(kind, **DEEP[kind]), tmp_path, "--precision", stored)
    randomise(twin)
    batch = batch_of(kind)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(model, batch), gradients(twin.train(), batch)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert ours[name].dtype == torch.float32 and (ours[name] - grad).norm() < 0.01 * grad.norm()


def test_batch_without_a_scored_token(models, tmp_path):
    """A small masked-LM batch may hold no masked token: no loss, no gradient, and no error, as with plain LoRA."""
    kind, batch = "distilbert", batch_of("distilbert", "mlm")
    batch = batch._replace(scored=torch.zeros_like(batch.scored), target=batch.target[:0])
    dense = dense_twin(kind, models, tmp_path, "MaskedLM", "mlm")
    sparse, _, _ = contextual(
        kind, models, tmp_path, "--sparsity", 0.6, checkpoint="MaskedLM", task="mlm"
    )
    for model in (dense, sparse):
        F.cross_entropy(common.forward(model, batch), batch.target, reduction="sum").backward()
        assert not any(
            tensor.grad.any() for tensor in model.parameters() if tensor.grad is not None
        )


@pytest.mark.parametrize(
    "kind, flags, words",
    [
        ("gpt2", [], ["--mode contextual", "gpt2", "distilbert", "llama"]),
        ("distilbert", ["--targets", "lin1"], ["--mode contextual", "--targets"]),
        ("bert", ["--targets", "query", "output.dense"], ["--mode contextual", "--targets"]),
        ("llama", ["--targets", "down_proj"], ["--mode contextual", "--targets"]),
    ],
)
def test_what_contextual_cannot_do_is_said_in_one_line(
    kind, flags, words, models, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        start("contextual", models(kind), tmp_path, *flags)
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "error:" in message and all(word in message for word in words)


def test_attention_targets_may_share_their_end_with_feed_forward_layers(models, tmp_path):
    """`attention.output.dense` is not `output.dense` of the feed-forward layer."""
    model, _, method = start(
        "contextual", models("bert"), tmp_path, "--targets", "attention.output.dense"
    )
    assert len([module for module in common.adapters(model).values() if module.keys]) == 2
    assert list(method["info"]()["channels_kept"]) == ["bert.encoder.layer.1"]


def test_too_many_dense_layers_are_an_error(models, reviews, capfd):
    with pytest.raises(SystemExit):
        sparse_lora.main(
            [
                "--dataset",
                reviews,
                "--model",
                models("distilbert"),
                "--max_length",
                24,
                "--mode",
                "contextual",
                "--dense_layers",
                2,
            ]
        )
    assert "--dense_layers 2: the model has 2 layers" in capfd.readouterr().err
