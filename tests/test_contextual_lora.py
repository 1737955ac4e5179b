"""Contextual sparsity: against a masked dense layer, and the same however a batch is cut."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    batch_of,
    close,
    ended,
    gradients,
    ready,
    rows_flags,
    same,
    stir,
    text_flags,
    tiny_config,
)

import common
import contextual_lora
import lora
from contextual_lora import SparseDown, SparseUp
from harness import batches
from harness import models as library

# ---------------------------------------------------------------------------------- the estimators


@pytest.mark.parametrize("act", [F.gelu, F.silu])
@pytest.mark.parametrize("gated", [False, True])
def test_scores_are_the_norms_of_what_a_channel_computes(act, gated):
    """By a plain loop over the channels; the estimate is that of the truncated SVD."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(100, 24), torch.randn(96, 24), torch.randn(96)
    weights, biases = [weight, weight.roll(1, 1)][: 1 + gated], [bias, None][: 1 + gated]
    factors, estimates = [contextual_lora.svd_estimate(each) for each in weights], []
    for each, (P, R) in zip(weights, factors, strict=True):
        U, S, Vh = torch.linalg.svd(each, full_matrices=False)
        estimates.append(U[:, :8] * S[:8] @ Vh[:8])
        assert P.shape == (24, 8) and R.shape == (8, 96)

    def norms(gate, up=None):
        z = [act(x @ gate[j] + bias[j]) * (1 if up is None else x @ up[j]) for j in range(96)]
        return torch.stack([channel.square().sum().sqrt() for channel in z])

    close(contextual_lora.sampled_scores(x, weights, biases, act), norms(*weights), 1e-4)
    close(contextual_lora.estimated_scores(x, factors, biases, act), norms(*estimates), 1e-3)


# --------------------------------------------------------------------------------------- the model

LAYERS = {"distilbert": "n_layers", "bert": "num_hidden_layers", "llama": "num_hidden_layers"}
ACT = {"distilbert": F.gelu, "llama": F.silu}
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
    """(run, data, base, method, {block: BlockState}) in training, past the dense steps."""
    if module is contextual_lora:
        words = [*words, "--dense_layers", 0]
    run, data, base, method = ready(module, out, *words, *flags)
    stir(base)
    base.model.get_input_embeddings().weight.requires_grad_(True)  # the input's gradient, too
    with torch.no_grad():  # `architecture` draws weights so small that no channel would matter
        for name, tensor in base.model.named_parameters():
            if base.model.config.model_type not in LAYERS and tensor.ndim == 2:
                tensor *= 1 if tensor.requires_grad or "emb" in name else 6
    method.before_step(100, 100)
    base.model.train()
    downs = {n: m for n, m in base.model.named_modules() if isinstance(m, SparseDown)}
    return run, data, base, method, {name: down.block for name, down in downs.items()}


CASES = [
    *itertools.product(["distilbert"], ["classification", "mlm"], ["scored", "none"]),
    *((kind, "classification", "scored") for kind in ("llama", "t5", "bart", "opt", "falcon")),
    *((kind, "clm", "scored") for kind in ("llama", "opt")),  # all are used: none stays dense
]


@pytest.mark.parametrize("kind, task, dense_tokens", CASES)
def test_equals_autograd_of_the_masked_dense_layer(kind, task, dense_tokens, words_of, tmp_path):
    """Zeros for the unpicked channels in the wide middle, but for the tokens that are used.

    Logits and gradients, the input's too. With all channels kept, and while scoring, it is dense.
    """
    words, flags = words_of(kind, task), ["--dense_tokens", dense_tokens]
    cut = [*flags, "--channel_sparsity", 0.6]
    _, data, base, _, blocks = started(contextual_lora, words, tmp_path, *cut)
    twin, batch = started(lora, words, tmp_path)[2], batch_of(data)
    ours, dense = gradients(base, batch), gradients(twin, batch)
    for path, block in blocks.items():
        layer = twin.model.get_submodule(path)
        mask = torch.zeros(batch.ids.numel(), layer.weight.shape[1])
        mask[:, block.picked] = 1
        if dense_tokens == "scored" and task != "clm":  # CLS, the last or the masked tokens
            mask[batch.output_positions] = 1
        layer.register_forward_pre_hook(lambda _, x, mask=mask: x[0] * mask.view(x[0].shape))
        assert len(block.picked) == block.keep == block.picked.unique().numel()
    same(ours, gradients(twin, batch), 1e-5)
    assert blocks and (ours[0] - dense[0]).abs().max() > 1e-3
    base.model.eval()
    close(common.forward(base, batch), dense[0], 1e-5)
    cut = [*flags, "--channel_sparsity", EVERYTHING]
    same(gradients(started(contextual_lora, words, tmp_path, *cut)[2], batch), dense, 1e-5)


@pytest.mark.parametrize("estimator", ["sample", "svd"])
@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_channels_are_the_best_of_the_sample(kind, estimator, words_of, tmp_path, monkeypatch):
    """By hand from the block's own input, on the sampled tokens: neither dense ones nor padding.

    "sample" draws SAMPLED of them, "svd" takes all. Another step draws others, each seed its own.
    """
    monkeypatch.setattr(contextual_lora, "SAMPLED", 100)
    flags = ["--channel_sparsity", 0.6, "--estimator", estimator]
    _, data, base, method, blocks = started(contextual_lora, words_of(kind), tmp_path, *flags)
    block, inputs = next(iter(blocks.values())), []
    ups = [m for m in base.model.modules() if isinstance(m, SparseUp) and m.block is block]
    ups[0].register_forward_pre_hook(lambda module, x: inputs.append(x[0].detach()))
    weights = [up.base.weight for up in ups]
    if estimator == "svd":
        weights = [torch.matmul(*contextual_lora.svd_estimate(weight)).T for weight in weights]
    batch = batch_of(data, 30)
    allowed = set(batch.token_positions.tolist()) - set(batch.output_positions.tolist())
    assert len(allowed) > 200

    def sample(step, seed=0):
        block.step.run.seed = seed
        method.before_step(step, 100)
        common.forward(base, batch)
        x, biases = inputs[-1].flatten(0, 1)[block.step.sample], [up.base.bias for up in ups]
        scores = contextual_lora.sampled_scores(x, weights, biases, ACT[kind])
        assert torch.equal(block.picked, scores.topk(block.keep).indices.sort().values)
        return set(block.step.sample.tolist())

    if estimator == "svd":
        assert sample(50) == allowed
        return
    first = sample(50)
    assert first <= allowed and len(first) == 100
    assert sample(50) == first != sample(51) and sample(50, seed=1) != first
    # Every token is as likely as any other: 40 samples leave none out, and no half is preferred.
    drawn = torch.tensor([position for step in range(60, 100) for position in sample(step)])
    assert set(drawn.tolist()) == allowed
    middle = sorted(allowed)[len(allowed) // 2]
    assert (drawn < middle).float().mean() == pytest.approx(0.5, abs=0.03)


CUTS = [  # the task's model, and flags
    ("distilbert", "classification", []),
    ("distilbert", "mlm", ["--checkpointing"]),
    ("distilbert", "mlm", ["--dense_tokens", "none"]),
    ("llama", "classification", ["--checkpointing"]),
    ("llama", "clm", ["--estimator", "svd"]),
]


@pytest.mark.parametrize("kind, task, flags", CUTS)
def test_channels_and_gradients_do_not_depend_on_how_a_batch_is_cut(
    kind, task, flags, words_of, tmp_path, monkeypatch
):
    """Batch sizes 1, 3, 16 and all that a CPU takes at once, against one pass of the whole batch.

    The sample is drawn from 100 tokens here, so that parts are smaller than what it is drawn from,
    and larger. Some examples have one token or two.
    """
    monkeypatch.setattr(contextual_lora, "CANDIDATES", 100)
    monkeypatch.setattr(contextual_lora, "SAMPLED", 30)
    flags = [*flags, "--channel_sparsity", 0.6, "--batch_size", 70]
    run, data, base, method, blocks = started(
        contextual_lora, words_of(kind, task), tmp_path, *flags
    )
    starts = data.train.starts.clone()
    starts[[3, 31]], starts[[6, 36]] = starts[[2, 30]] + 1, starts[[5, 35]] + 2
    data = data._replace(train=dataclasses.replace(data.train, starts=starts))
    targets = batches.predicted_tokens(data, data.train, 0)
    examples = torch.arange(70) % len(data.train.lengths)
    named, passes = common.trained_tensors(base.model), []
    base.model.register_forward_pre_hook(lambda *_: passes.append(len(base.batch.ids)))

    def outcome(size, together):
        passes.clear()
        run.batch_size, method.tokens_together = size, together
        method.before_step(7, 10)
        loss = common.gradient(run, data, base, method, examples, targets, named)
        grads = {name: tensor.grad for name, tensor in named.items()}
        base.model.zero_grad(set_to_none=True)
        channels = [block.picked.tolist() for block in blocks.values()]
        return channels, (loss, grads), len(passes)

    together = method.tokens_together
    channels, expected, count = outcome(70, 10**9)
    assert count == 1 and together == 100
    counts = []
    for size in (1, 3, 16, 70):
        ours, result, count = outcome(size, together)
        counts.append(count)
        assert ours == channels
        same(result, expected, 1e-5)
    assert counts == sorted(counts, reverse=True) and counts[0] > 40 and counts[-1] > 1


def test_first_twentieth_of_the_steps_is_dense(words_of, tmp_path):
    *_, base, method = ready(contextual_lora, tmp_path, *words_of("distilbert"))
    down = next(m for m in base.model.modules() if isinstance(m, SparseDown))
    for total, dense in ((1, 1), (20, 1), (40, 2), (50, 3), (1000, 50)):
        sparse = []
        for step in range(1, total + 1):
            method.before_step(step, total)
            sparse.append(down.block.step.sparse)
        assert sparse == [False] * dense + [True] * (total - dense)


@pytest.mark.parametrize(
    "width, sparsity, kept, last",
    [(3072, 0.95, 154, 1613), (3072, 0.9, 307, 1690), (1000, 0.9, 100, 550)],
)
def test_channels_kept_at_distilberts_depth(width, sparsity, kept, last):
    """Deep half only, the last block half as sparse. Rounded: 1 - 0.9 is less than a tenth."""
    import transformers

    parts = (contextual_lora.__doc__, contextual_lora.__file__, contextual_lora.add_args)
    words = ["--dataset", "demo", "--channel_sparsity", sparsity]
    for cut, flags in itertools.product((False, True), ([], ["--dense_layers", 1])):
        run = contextual_lora.parse_args(*parts, [*map(str, [*words, *flags])])
        with torch.device("meta"):
            config = tiny_config("distilbert", n_layers=6, hidden_dim=width)
            model = transformers.AutoModelForSequenceClassification.from_config(config)
            base = common.Base(model.requires_grad_(False), [], "", 0, "classification", cut)
            counts = contextual_lora.adapt(run, base).report()["channels_kept"]
        wanted = dict.fromkeys(range(1 if flags else 3, 5), kept) | ({} if cut else {5: last})
        assert counts == {f"distilbert.transformer.layer.{i}": n for i, n in wanted.items()}


@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_autocast_on_cpu(kind, words_of, tmp_path):
    """In bf16 all channels give dense bf16's gradients, in fp32."""
    words, grads = [*words_of(kind), "--precision", "bf16"], []
    for module, flags in ((contextual_lora, ["--channel_sparsity", EVERYTHING]), (lora, [])):
        run, data, base, *_ = started(module, words, tmp_path, *flags)
        common.place(run, base)
        with torch.autocast("cpu", torch.bfloat16):
            logits = common.forward(base, batch_of(data))
        F.cross_entropy(logits, batch_of(data).target).backward()
        grads.append({n: t.grad for n, t in common.trained_tensors(base.model).items()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        assert grad.dtype == grads[0][name].dtype == torch.float32
        assert (grads[0][name] - grad).norm() < 0.01 * grad.norm()


@pytest.mark.parametrize(
    "kind, flags, named",
    [
        ("distilbert", ["--targets", "lin1"], "--targets: ffn.lin1 is sliced"),
        ("bert", ["--targets", "query", "output.dense"], "--targets: output.dense is sliced"),
        ("llama", ["--targets", "down_proj"], "--targets: mlp.down_proj is sliced"),
        ("distilbert", ["--dense_layers", 3], "--dense_layers 3: the model has 3 layers"),
        ("distilbert", ["--dense_layers", 2], "the model has 3 layers, 2 of which can be sliced"),
        ("distilbert", ["--channel_sparsity", 0], "--channel_sparsity 0: no channel"),
    ],
)
def test_what_contextual_cannot_do_is_one_line(kind, flags, named, words_of, tmp_path, capfd):
    code, error = ended(capfd, contextual_lora, *words_of(kind), *flags, "--out", tmp_path)
    assert code == 2 and named in error


def test_of_two_blocks_one_is_sliced(tmp_path):
    """The demo's own model: with half of its blocks dense and the last one cut, none would be."""
    *_, base, _ = ready(contextual_lora, tmp_path)
    ups = [module for module in base.model.modules() if isinstance(module, SparseUp)]
    assert len(ups) == 1 and base.last_block_cut


def test_attention_targets_may_end_as_feed_forward_layers_do(words_of, tmp_path):
    """`attention.output.dense` is not `output.dense` of the feed-forward layer."""
    flags = ["--targets", "attention.output.dense"]
    *_, base, _, blocks = started(contextual_lora, words_of("bert"), tmp_path, *flags)
    assert sum(bool(module.keys) for module in library.stand_ins(base.model).values()) == 3
    assert [*blocks] == [f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)]
