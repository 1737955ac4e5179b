"""Pruning against closed formulas and brute force, contextual sparsity against a masked layer."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import ended, ready, result_of, rows_flags, stir, text_flags, tiny_config, weights

import common
import lora
import sparse_lora
from harness import models as library


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------ prune: the formulas


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
    """Of all ways to keep so many with one a layer at least, the one with the largest sum."""
    for keep in range(1, 10):
        norms = torch.rand((3, 3), generator=torch.Generator().manual_seed(keep))
        kept = sparse_lora.keep_components(norms, keep).flatten().nonzero()[:, 0].tolist()
        ways = itertools.combinations(range(9), max(keep, 3))
        ways = [way for way in ways if {i // 3 for i in way} == {0, 1, 2}]
        assert kept == list(max(ways, key=lambda way: norms.flatten()[list(way)].sum().item()))
    ties = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    for keep in range(3, 10):  # a layer of zeros keeps one, and ties do not break the budget
        kept = sparse_lora.keep_components(ties, keep)
        assert kept.sum() == keep and kept.any(1).all()
        mask = sparse_lora.largest(ties, keep)
        assert mask.sum() == keep
        assert ties[mask].sum() == ties.flatten().sort(descending=True).values[:keep].sum()


# -------------------------------------------------------------------------------- prune: training


def pruning(models, reviews, out, *flags, kind="distilbert"):
    """(run, data, base, method, layers) with every number of A and B away from zero."""
    words = [*rows_flags(models, reviews, kind), "--rank", 4, "--lr", 0.02, "--batch_size", 8]
    run, data, base, method = ready(sparse_lora, out, *words, *flags)
    stir(base)
    return run, data, base, method, library.stand_ins(base.model)


def test_without_sparsity_and_penalty_it_is_lora_bit_for_bit(models, reviews, tmp_path):
    words = [*rows_flags(models, reviews), "--max_steps", 6, "--batch_size", 8, "--dropout", 0.1]
    ours, path = result_of(sparse_lora, tmp_path, *words, "--sparsity", 0)
    theirs, other = result_of(lora, tmp_path, *words)
    assert weights(path) == weights(other)
    assert ours["metrics"] == theirs["metrics"] and ours["curve"] == theirs["curve"]


@pytest.mark.parametrize("sparsity, steps", [(0.5, 1), (0.5, 3), (0.3, 20), (0.9, 20)])
def test_zeros_follow_the_schedule_and_stay_zero(sparsity, steps, models, reviews, tmp_path):
    """In each A and each B exactly the cubic's share after each step; none ever comes back."""
    flags = ["--sparsity", sparsity, "--max_steps", steps]
    run, data, base, method, layers = pruning(models, reviews, tmp_path, *flags)
    seen = []

    def watch(step, total, lr):
        method["after_step"](step, total, lr)
        pairs = [(layer.A == 0, layer.B == 0) for layer in layers.values()]
        seen.append([zeros for pair in pairs for zeros in pair])
        wanted = sparse_lora.sparsity_at(step, total, sparsity)
        assert [each.sum() for each in seen[-1]] == [round(wanted * t.numel()) for t in seen[-1]]
        for before, now in zip(seen[max(0, step - 1)], seen[-1], strict=True):
            assert not (before & ~now).any()

    assert common.train(base, data, run, method | {"after_step": watch}).step == steps
    info = method["report"]()["sparsity"]
    products = torch.stack([layer.B @ layer.A for layer in layers.values()])
    assert len(seen) == steps + 1
    assert info["A"] == info["B"] == pytest.approx(sparsity, abs=0.005)
    assert info["BA"] == pytest.approx((products == 0).float().mean().item())


@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_one_step_drops_the_smallest_and_shrinks_by_penalty_times_rate(
    kind, models, reviews, tmp_path
):
    for flags in (["--sparsity", 0.25], ["--sparsity", 0, "--penalty", 0.5]):
        run, *_, method, layers = pruning(models, reviews, tmp_path, *flags, kind=kind)
        before = [tensor.clone() for layer in layers.values() for tensor in (layer.A, layer.B)]
        method["after_step"](1, 1, 0.1)
        after = [tensor for layer in layers.values() for tensor in (layer.A, layer.B)]
        for old, now in zip(before, after, strict=True):
            kept = now != 0
            if run.penalty:
                close(now, torch.where(old.abs() <= 0.05, 0, old - 0.05 * old.sign()), 1e-7)
                continue
            assert (~kept).sum() == old.numel() // 4 and torch.equal(now[kept], old[kept])
            assert old[~kept].abs().max() < old[kept].abs().min()


@pytest.mark.parametrize("structure", ["none", "rank"])
def test_masked_stays_masked_among_the_penaltys_zeros(structure, models, reviews, tmp_path):
    """A zero that the penalty made is as small as a masked one, and must stay trainable."""
    flags = ["--sparsity", 0.5, "--penalty", 0.5, "--structure", structure]
    *_, method, layers = pruning(models, reviews, tmp_path, *flags)

    def masks():
        pairs = [(layer.mask_A, layer.mask_B) for layer in layers.values()]
        return [mask.clone() for pair in pairs for mask in pair]

    method["after_step"](2, 10, 0.0)
    before = masks()
    assert not all(mask.all() for mask in before)
    method["after_step"](3, 10, 100.0)  # shrinks everything to zero
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
    method["after_step"](1, 1, 0.0)
    method["finish"]()
    ranks = {path: len(layer.A) for path, layer in layers.items()}
    assert sum(ranks.values()) == expected and min(ranks.values()) >= 1
    assert (len(set(ranks.values())) > 1) == (sparsity in (0.4, 0.5))
    for path, (A, B) in full.items():
        best = (B.norm(dim=0) * A.norm(dim=1)).topk(ranks[path]).indices.sort().values
        assert torch.equal(layers[path].A, A[best]) and torch.equal(layers[path].B, B[:, best])
    assert method["report"]()["ranks"] == ranks == method["peft"]["rank_pattern"]
    assert method["report"]()["sparsity"]["A"] == 0  # the zeros are gone, not stored
    alphas = method["peft"]["alpha_pattern"]
    assert all(alphas[path] / rank == 6 / 4 for path, rank in ranks.items())


# --------------------------------------------------------------------- contextual: the estimators


@pytest.mark.parametrize("act", [F.gelu, F.silu])
@pytest.mark.parametrize("gated", [False, True])
def test_scores_find_the_channels_that_matter(act, gated):
    """Against the norm over all rows by a plain loop. Keeping a tenth, chance would be 0.1."""
    torch.manual_seed(0)
    x, bias, hidden, keep = torch.randn(1000, 64), torch.randn(512) * 0.1, 512, 51
    weight = torch.randn(hidden, 64) * 0.05
    weight[torch.randperm(hidden)[:keep]] += torch.randn(keep, 4) @ torch.randn(4, 64) * 0.3
    pairs = [(weight, bias)] + ([(weight.roll(1, 1), None)] if gated else [])

    def channel(j):
        z = [x @ weight[j] + (0 if bias is None else bias[j]) for weight, bias in pairs]
        return act(z[0]) * (z[1] if gated else 1)

    true = torch.stack([channel(j).square().sum().sqrt() for j in range(hidden)])
    found, biases = [weight for weight, _ in pairs], [bias for _, bias in pairs]
    close(sparse_lora.sampled_scores(x, found, biases, act), true, 1e-4)
    whole = [sparse_lora.svd_estimate(weight, k=64) for weight in found]  # no longer an estimate
    close(sparse_lora.estimated_scores(x, whole, biases, act), true, 1e-3)
    factors = [sparse_lora.svd_estimate(weight) for weight in found]
    for scores in (
        sparse_lora.sampled_scores(x[::15], found, biases, act),
        sparse_lora.estimated_scores(x, factors, biases, act),
    ):
        best, ours = (set(each.topk(keep).indices.tolist()) for each in (true, scores))
        assert len(best & ours) > 0.85 * keep


@pytest.mark.parametrize("shape", [(96, 24), (24, 96)])
def test_svd_estimate_is_the_truncated_svd(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    P, R = sparse_lora.svd_estimate(weight)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    assert P.shape == (shape[1], 8) and R.shape == (8, shape[0])
    close((P @ R).T, U[:, :8] * S[:8] @ Vh[:8], 1e-4)


# -------------------------------------------------------------------------- contextual: the model

LAYERS = {"distilbert": "n_layers", "bert": "num_hidden_layers", "llama": "num_hidden_layers"}
EVERYTHING = 1e-17  # a sparsity that leaves no channel out, through the sparse path all the same


@pytest.fixture
def words_of(models, architecture, reviews, text_dir):
    """words_of(kind, task) -> flags of a model of three layers, or of `architecture`'s two."""

    def get(kind, task="classification"):
        words = rows_flags(models, reviews)
        if task != "classification":
            words = text_flags(models, text_dir)
        head = {"mlm": "MaskedLM", "clm": "CausalLM"}.get(task, "")
        folder = models(kind, head, **{LAYERS[kind]: 3}) if kind in LAYERS else architecture(kind)
        return [*words, "--model", folder]

    return get


def started(module, words, out, *flags):
    """(run, data, base, {block: channels}) in training, past the dense steps."""
    if module is sparse_lora:
        words = [*words, "--mode", "contextual", "--dense_layers", 0]
    run, data, base, method = ready(module, out, *words, *flags)
    stir(base)
    with torch.no_grad():  # `architecture` draws weights so small that no channel would matter
        for name, tensor in base.model.named_parameters():
            if base.model.config.model_type not in LAYERS and tensor.ndim == 2:
                tensor *= 1 if tensor.requires_grad or "emb" in name else 6
    method.get("after_step", lambda *_: None)(1, 1, 0.0)
    base.model.train()
    ways = {n: m for n, m in base.model.named_modules() if isinstance(m, sparse_lora.SparseDown)}
    return run, data, base, {name: way.channels for name, way in ways.items()}


def batch_of(data, *rows):
    targets = batches.predicted_tokens(data, data.train, 0)
    return batches.collate(data, data.train, torch.arange(*(rows or (8,))), targets)


def gradients(base, batch):
    """Logits and gradients, that of the very input among them."""
    base.model.get_input_embeddings().weight.requires_grad_(True)
    base.model.zero_grad()
    logits = common.forward(base, batch)
    F.cross_entropy(logits, batch.target, reduction="sum").backward()
    named = common.trained_tensors(base.model).items()
    return logits.detach(), {name: tensor.grad for name, tensor in named}


def same(ours, theirs):
    close(ours[0], theirs[0], 1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert (ours[1][name] - grad).abs().max() <= 1e-5 * max(1, grad.abs().max()), name


CASES = [
    *itertools.product(["distilbert", "bert"], ["classification"], ["scored", "none"]),
    *(("distilbert", "mlm", tokens) for tokens in ("scored", "none")),
    *((kind, "classification", "scored") for kind in ("llama", "t5", "bart", "opt", "falcon")),
    *((kind, "clm", "scored") for kind in ("llama", "opt")),  # every row is read: none is dense
]


@pytest.mark.parametrize("kind, task, dense_tokens", CASES)
def test_equals_autograd_of_the_masked_dense_layer(kind, task, dense_tokens, words_of, tmp_path):
    """Zeros for the unpicked channels in the wide middle, but in the rows that are read.

    Logits and gradients, the input's too. With all channels kept, and while scoring, it is dense.
    """
    words, flags = words_of(kind, task), ["--dense_tokens", dense_tokens]
    _, data, base, blocks = started(sparse_lora, words, tmp_path, "--channel_sparsity", 0.6, *flags)
    twin, batch = started(lora, words, tmp_path)[2], batch_of(data)
    ours, dense = gradients(base, batch), gradients(twin, batch)
    for path, channels in blocks.items():
        layer = twin.model.get_submodule(path)
        mask = torch.zeros(batch.ids.numel(), layer.weight.shape[1])
        mask[:, channels.picked] = 1
        if dense_tokens == "scored" and task != "clm":  # CLS, the last or the masked tokens
            mask[batch.output_positions] = 1
        layer.register_forward_pre_hook(lambda _, x, mask=mask: x[0] * mask.view(x[0].shape))
        assert len(channels.picked) == channels.keep == channels.picked.unique().numel()
    same(ours, gradients(twin, batch))
    assert blocks and (ours[0] - dense[0]).abs().max() > 1e-3
    base.model.eval()
    close(common.forward(base, batch), dense[0], 1e-5)
    base = started(sparse_lora, words, tmp_path, "--channel_sparsity", EVERYTHING, *flags)[2]
    same(gradients(base, batch), dense)


@pytest.mark.parametrize("estimator", ["sample", "svd"])
@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_picked_channels_are_the_top_over_the_real_rows(kind, estimator, words_of, tmp_path):
    """By hand from the block's own input: "sample" takes 64 to 127 rows of all, or all below."""
    flags = ["--channel_sparsity", 0.6, "--estimator", estimator]
    _, data, base, blocks = started(sparse_lora, words_of(kind), tmp_path, *flags)
    channels, inputs, sizes, picks = next(iter(blocks.values())), [], [], []
    ways = [m for m in base.model.modules() if getattr(m, "channels", 0) is channels][:-1]
    ways[0].register_forward_pre_hook(lambda module, x: inputs.append(x[0].detach()))
    weights = [way.base.weight for way in ways]
    if estimator == "svd":
        weights = [torch.matmul(*sparse_lora.svd_estimate(weight)).T for weight in weights]
    for rows in ((3,), (8,), (8, 16), (30,)):  # each part of a batch picks its own
        batch = batch_of(data, *rows)
        common.forward(base, batch)
        x = inputs[-1].flatten(0, 1)[batch.mask.flatten().bool()]  # no padding
        x = x[:: max(1, len(x) // 64)] if estimator == "sample" else x
        z = [F.linear(x, w, way.base.bias) for w, way in zip(weights, ways, strict=True)]
        z = F.silu(z[0]) * z[1] if len(z) > 1 else F.gelu(z[0])
        sizes.append(len(x))
        picks.append(channels.picked)
        assert torch.equal(picks[-1], z.norm(dim=0).topk(channels.keep).indices.sort().values)
    assert not torch.equal(picks[1], picks[2]) and sizes[0] < 64 <= sizes[-1]
    assert (max(sizes) < 128) == (estimator == "sample")


@pytest.mark.parametrize("total, dense", [(1, 1), (20, 1), (40, 2), (50, 3), (1000, 50)])
def test_first_twentieth_of_the_steps_is_dense(total, dense, words_of, tmp_path):
    """after_step(step) decides how the next step, number step + 1, computes."""
    words = [*words_of("distilbert"), "--mode", "contextual"]
    *_, base, method = ready(sparse_lora, tmp_path, *words)
    way = next(m for m in base.model.modules() if isinstance(m, sparse_lora.SparseDown))
    sparse = []
    for step in range(total):
        method["after_step"](step, total, 0.0)
        sparse.append(way.channels.switch["on"])
    assert sparse == [False] * dense + [True] * (total - dense)


@pytest.mark.parametrize(
    "width, sparsity, kept, last",
    [
        (3072, 0.95, 154, 1613),
        (3072, 0.9, 307, 1690),
        (3072, 0.5, 1536, 2304),
        (1000, 0.9, 100, 550),
    ],
)
def test_channels_kept_at_distilberts_depth(width, sparsity, kept, last):
    """Deep half only, the last block half as sparse. Rounded: 1 - 0.9 is less than a tenth."""
    import transformers

    parts = (sparse_lora.__doc__, sparse_lora.__file__, sparse_lora.add_args)
    words = ["--dataset", "demo", "--mode", "contextual", "--channel_sparsity", sparsity]
    for cut, flags in itertools.product((False, True), ([], ["--dense_layers", 1])):
        run = sparse_lora.parse_args(*parts, [*map(str, [*words, *flags])])
        with torch.device("meta"):
            config = tiny_config("distilbert", n_layers=6, hidden_dim=width)
            model = transformers.AutoModelForSequenceClassification.from_config(config)
            base = common.Base(model.requires_grad_(False), [], "", 0, last_block_cut=cut)
            found = sparse_lora.adapt(run, base)["report"]()["channels_kept"]
        wanted = dict.fromkeys(range(1 if flags else 3, 5), kept) | ({} if cut else {5: last})
        assert found == {f"distilbert.transformer.layer.{i}": n for i, n in wanted.items()}


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_autocast_on_cpu(kind, stored, words_of, tmp_path):
    """In bf16 all channels give dense bf16's gradients, in fp32."""
    words, found = [*words_of(kind), "--precision", stored], []
    for module, flags in ((sparse_lora, ["--channel_sparsity", EVERYTHING]), (lora, [])):
        run, data, base, _ = started(module, words, tmp_path, *flags)
        common.place(run, base)
        with torch.autocast("cpu", torch.bfloat16):
            logits = common.forward(base, batch_of(data))
        F.cross_entropy(logits, batch_of(data).target).backward()
        found.append({n: t.grad for n, t in common.trained_tensors(base.model).items()})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[1].items():
        assert grad.dtype == found[0][name].dtype == torch.float32
        assert (found[0][name] - grad).norm() < 0.01 * grad.norm()


def test_batch_without_a_masked_token(words_of, tmp_path):
    """A part of a batch may hold none: no loss, no gradient, and no error."""
    _, data, base, _ = started(sparse_lora, words_of("distilbert", "mlm"), tmp_path)
    batch = batch_of(data)
    _, grads = gradients(
        base, batch._replace(read=batch.output_positions[:0], target=batch.target[:0])
    )
    assert not any(grad.any() for grad in grads.values() if grad is not None)


@pytest.mark.parametrize(
    "kind, flags, named",
    [
        ("distilbert", ["--targets", "lin2"], "--targets: ffn.lin2 is sliced"),
        ("bert", ["--targets", "query", "output.dense"], "--targets: output.dense is sliced"),
        ("llama", ["--targets", "down_proj"], "--targets: mlp.down_proj is sliced"),
        ("distilbert", ["--dense_layers", 3], "--dense_layers 3: the model has 3 layers"),
        ("distilbert", ["--dense_layers", 2], "the model has 3 layers, 2 of which can be sliced"),
        ("distilbert", ["--channel_sparsity", 0], "--channel_sparsity 0: no channel"),
    ],
)
def test_what_contextual_cannot_do_is_one_line(kind, flags, named, words_of, tmp_path, capfd):
    words = [*words_of(kind), "--mode", "contextual", *flags, "--out", tmp_path]
    code, error = ended(capfd, sparse_lora, *words)
    assert code == 2 and named in error


def test_of_two_blocks_one_is_sliced(tmp_path):
    """The demo's own model: with half of its blocks dense and the last one cut, none would be."""
    _, _, base, _ = started(sparse_lora, [], tmp_path, "--mode", "contextual")
    ways_in = [n for n, m in base.model.named_modules() if isinstance(m, sparse_lora.SparseUp)]
    assert len(ways_in) == 1 and base.last_block_cut


def test_attention_targets_may_end_as_feed_forward_layers_do(words_of, tmp_path):
    """`attention.output.dense` is not `output.dense` of the feed-forward layer."""
    flags = ["--targets", "attention.output.dense"]
    _, _, base, blocks = started(sparse_lora, words_of("bert"), tmp_path, *flags)
    assert sum(bool(module.keys) for module in library.stand_ins(base.model).values()) == 3
    assert [*blocks] == [f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)]
