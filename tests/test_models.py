"""The base and what is put into it: heads, targets, counts, PEFT's numbers, unread rows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY, ended, make_model, oracle, ready, rows_flags, stir, text_flags

import common
import lora
from harness import meters
from harness import models as library

ADAPTERS = [name for name in EVERY if name not in ("head only", "full")]


def batch_of(data, n=6):
    targets = batches.predicted_tokens(data, data.train, 0)
    return batches.collate(data, data.train, torch.arange(n), targets)


def gradients(base, batch):
    """Logits, and the gradient of everything that is trained."""
    base.model.zero_grad(set_to_none=True)
    logits = common.forward(base, batch)
    F.cross_entropy(logits, batch.target).backward()
    named = common.trained_tensors(base.model).items()
    return logits.detach(), {name: tensor.grad for name, tensor in named}


# ------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize(
    "kind, checkpoint, head",
    [
        ("distilbert", "", {"pre_classifier.weight", "pre_classifier.bias"}),
        ("distilbert", "MaskedLM", {"pre_classifier.weight", "pre_classifier.bias"}),
        ("bert", "", set()),
        ("bert", "MaskedLM", {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}),
        ("bert", "SequenceClassification", set()),  # its own head is trained, too
    ],
)
def test_head_is_what_the_checkpoint_lacks_or_its_own(
    kind, checkpoint, head, models, reviews, tmp_path
):
    words = rows_flags(models, reviews, kind, checkpoint)
    base = ready(lora, tmp_path, *words)[2]
    assert set(base.head) == head | {"classifier.weight", "classifier.bias"}


def test_a_head_that_the_checkpoint_brings_is_kept_or_replaced(models, reviews, tmp_path, capsys):
    """With as many labels its weights are the start; with three they give way, in a line."""
    from safetensors.torch import load_file

    for labels in (2, 3):
        folder = make_model(
            tmp_path / str(labels), "bert", "SequenceClassification", num_labels=labels
        )
        base = ready(lora, tmp_path, *rows_flags(models, reviews), "--model", folder)[2]
        theirs = load_file(f"{folder}/model.safetensors")["classifier.weight"]
        ours = base.model.classifier.weight.detach()
        said = "another number of labels" in capsys.readouterr().out
        assert torch.equal(theirs, ours) if labels == 2 else ours.shape == (2, 32)
        assert said == (labels == 3)


@pytest.mark.parametrize("kind, head", [("distilbert", "MaskedLM"), ("gpt2", "CausalLM")])
def test_a_tied_output_projection_stays_frozen(kind, head, models, text_dir, tmp_path):
    base = ready(lora, tmp_path, *text_flags(models, text_dir, kind, head))[2]
    assert base.head == [] and not base.model.get_output_embeddings().weight.requires_grad


def test_missing_bodies_and_vocabularies_are_refused(models, reviews, text_dir, tmp_path, capfd):
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "body", "distilbert")
    tensors = load_file(f"{folder}/model.safetensors")
    del tensors["transformer.layer.1.ffn.lin1.weight"]
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    words = [*rows_flags(models, reviews), "--model", folder, "--out", tmp_path]
    code, error = ended(capfd, lora, *words)
    assert code == 2 and "lacks 1 tensors of the model itself" in error and "ffn.lin1" in error
    folder = make_model(tmp_path / "untied", "llama", tie_word_embeddings=False)
    words = [*text_flags(models, text_dir, "llama", ""), "--model", folder, "--out", tmp_path]
    code, error = ended(capfd, lora, *words)
    assert code == 2 and "train a vocabulary from nothing" in error


# --------------------------------------------------------------------------------------- adapters

DISTILBERT = {
    **{"vocab_size": 30522, "max_position_embeddings": 512, "dim": 768, "n_layers": 6},
    **{"n_heads": 12, "hidden_dim": 3072},
}
BERT = {
    **{"vocab_size": 30522, "max_position_embeddings": 512, "hidden_size": 768},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}


@pytest.mark.parametrize(
    "kind, size, rank, targets, adapter, head, total",
    [
        ("distilbert", DISTILBERT, 8, None, 147_456, 592_130, 66_955_010),
        ("distilbert", DISTILBERT, 32, None, 589_824, 592_130, 66_955_010),
        ("bert", BERT, 8, ["query", "key", "value"], 442_368, 1_538, 109_483_778),
    ],
)
@pytest.mark.parametrize("name", ["lora", "hira", "prune", "contextual"])
def test_known_counts_at_real_size(name, kind, size, rank, targets, adapter, head, total):
    """On the meta device: nothing is allocated. 739,586, 1,181,954 and 443,906 trained weights."""
    import transformers

    module, flags = EVERY[name]
    words = ["--dataset", "demo", "--rank", rank, *flags]
    args = module.parse_args(module.__doc__, module.__file__, module.add_args, words)
    args.targets = targets
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(kind, **size)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        heads = [n for n, _ in model.named_parameters() if "classifier" in n]
        for key, tensor in model.named_parameters():
            tensor.requires_grad_(key in heads)
        base = common.Base(model, heads, "", sum(t.numel() for t in model.parameters()), True)
        module.adapt(base, args)
    counts = meters.count_parameters(base)
    assert (counts["adapter"], counts["head"]) == (adapter, head)
    assert counts["trainable"] == adapter + head and counts["total"] == total + adapter


@pytest.mark.parametrize("kind", ["distilbert", "bert", "gpt2", "llama"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_start_merging_and_counts(name, kind, models, reviews, tmp_path):
    """The start is the base; merged equals unmerged; as_plain_linears puts everything back."""
    if (kind, name) in (("gpt2", "contextual"), ("gpt2", "sparse qlora")):
        return
    module, flags = EVERY[name]
    run, data, base, _ = ready(module, tmp_path, *rows_flags(models, reviews, kind), *flags)
    model, batch = base.model.eval(), batch_of(data)
    trained = common.trained_tensors(model)
    found = {path: layer for path, layer in library.stand_ins(model).items() if layer.keys}
    assert set(trained) == {f"{path}.{key}" for path in found for key in "AB"} | set(base.head)
    assert all(tensor.dtype == torch.float32 for tensor in model.parameters())
    with torch.no_grad():
        start = common.forward(base, batch)
        with library.as_plain_linears(model, False, torch.float32):
            torch.testing.assert_close(common.forward(base, batch), start, atol=1e-6, rtol=1e-6)
        stir(base)
        before, modules = common.forward(base, batch), dict(model.named_modules())
        assert (before - start).abs().max() > 1e-3
        with library.as_plain_linears(model, True, torch.float32):
            assert not library.stand_ins(model)
            torch.testing.assert_close(common.forward(base, batch), before, atol=1e-5, rtol=1e-4)
        with pytest.raises(KeyError), library.as_plain_linears(model, True, torch.bfloat16):
            raise KeyError
        assert torch.equal(common.forward(base, batch), before)
    assert all(model.get_submodule(path) is module for path, module in modules.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("name", ["lora", "hira"])
def test_logits_and_gradients_are_pefts(name, kind, models, reviews, tmp_path):
    import transformers

    peft, module = oracle("peft"), EVERY[name][0]
    run, data, base, method = ready(module, tmp_path, *rows_flags(models, reviews, kind))
    stir(base)
    batch = batch_of(data)
    logits, ours = gradients(base, batch)
    auto = transformers.AutoModelForSequenceClassification
    twin = auto.from_pretrained(run.model, config=copy.deepcopy(base.model.config))
    shared = {"r": run.rank, "target_modules": method["peft"]["target_modules"]}
    if name == "hira":
        config = peft.HiraConfig(**shared)
    else:
        config = peft.LoraConfig(**shared, lora_alpha=run.alpha, fan_in_fan_out=kind == "gpt2")
    twin = peft.get_peft_model(twin, config)
    named = dict(base.model.named_parameters())

    def our_name(key):
        key = key.removeprefix("base_model.model.")
        for theirs in (".lora_A.default.weight", ".lora_B.default.weight"):
            key = key.replace(theirs, f".{theirs[6]}")
        return key.replace(".hira_A.default", ".A").replace(".hira_B.default", ".B")

    with torch.no_grad():
        for key, tensor in twin.named_parameters():
            if our_name(key) in named and named[our_name(key)].requires_grad:
                tensor.copy_(named[our_name(key)])
                tensor.requires_grad_(True)
    theirs = twin(input_ids=batch.ids, attention_mask=batch.mask).logits
    F.cross_entropy(theirs, batch.target).backward()
    torch.testing.assert_close(theirs, logits, atol=1e-5, rtol=1e-4)
    found = {our_name(key): tensor.grad for key, tensor in twin.named_parameters()}
    for key, grad in ours.items():
        assert grad.abs().max() > 1e-7, key
        torch.testing.assert_close(grad, found[key], atol=1e-5, rtol=1e-4)


def test_targets_by_name_by_end_and_by_commas(models, reviews, tmp_path, capfd):
    words = rows_flags(models, reviews)
    one = "distilbert.transformer.layer.1.attention.q_lin"
    for flags, count in (([], 4), (["q_lin,k_lin", "v_lin"], 6), ([one], 1), (["lin"], None)):
        flags = ["--targets", *flags] if flags else []
        if count is None:
            code, error = ended(capfd, lora, *words, *flags, "--out", tmp_path)
            assert code == 2 and "k_lin, lin1, lin2, out_lin, q_lin, v_lin" in error
            continue
        run, data, base, method = ready(lora, tmp_path, *words, *flags)
        assert len(library.stand_ins(base.model)) == count and method["settings"]["targets"]
    with pytest.raises(RuntimeError, match="has adapters already"):
        lora.adapt(run, base)


def test_hira_in_bf16_sees_small_updates(models, reviews, tmp_path):
    """|B| = 1e-3 in W ⊙ (1 + B·A) is rounded away in bf16; as a branch of its own it is not."""
    import hira

    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 256)
    adapted = hira.HiRALinear(layer, 8, 0.0)
    adapted.B.data.normal_(0, 1e-3)
    x = torch.randn(64, 256)
    exact = hira.hira_weight(*(t.double() for t in (layer.weight, adapted.A, adapted.B)))
    wanted = x.double() @ (exact - layer.weight.double()).T
    half = copy.deepcopy(adapted)
    half.base.weight.data = half.base.weight.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = hira.hira_weight(half.base.weight, adapted.A, adapted.B)
        assert (rounded != half.base.weight).float().mean() < 0.2  # what a single product would see
        plain = half.base(x)
        update = half(x).double() - plain.double()
        alone = F.linear(x, half.base.weight * (half.B @ half.A)).double()
    assert (alone - wanted).norm() / wanted.norm() < 0.01
    assert (update - wanted).norm() < (plain.double() * 2**-8).norm()  # the output's own rounding


# ------------------------------------------------------------------------------------ unread rows

CUT = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "gpt2"]
CUT += ["llama", "qwen3", "phi3"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("task", ["classification", "mlm"])
@pytest.mark.parametrize("kind", CUT)
def test_leaving_unread_rows_out_is_exact(
    kind,
    task,
    checkpointing,
    architecture,
    reviews,
    text_dir,
    tmp_path,
    monkeypatch,  # noqa: F811
):
    """Logits and every gradient, to 1e-6, for each way of adapting that has its own arithmetic."""
    if task == "mlm" and CUT.index(kind) >= CUT.index("gpt2"):
        return
    words = ["--dataset", reviews, "--model", architecture(kind), "--max_length", 24]
    if task == "mlm":
        words = text_flags(lambda *_: architecture(kind), text_dir)
    words += ["--checkpointing"] if checkpointing else []
    for name in ("lora", "hira", "qlora") if task == "classification" else ("lora",):
        module, flags = EVERY[name]
        _, data, base, _ = ready(module, tmp_path, *words, *flags)
        with monkeypatch.context() as patch:
            patch.setattr(library, "AFTER_ATTENTION", {})
            whole = ready(module, tmp_path, *words, *flags)[2]
        assert base.last_block_cut and not whole.last_block_cut
        batch = batch_of(data)
        results = []
        for each in (base, whole):
            stir(each)
            each.model.train()
            results.append(gradients(each, batch))
        (cut, ours), (full, theirs) = results
        torch.testing.assert_close(cut, full, atol=1e-6, rtol=1e-6)
        for key, grad in theirs.items():
            assert (ours[key] - grad).abs().max() <= 1e-6 * max(1, grad.abs().max()), key


def test_a_decoder_reads_its_last_token_whatever_it_is(models, reviews, tmp_path):
    """A text that ends in the pad token: the library's own rule would read one token early."""
    run, data, base, _ = ready(lora, tmp_path, *rows_flags(models, reviews, "gpt2"))
    ids = torch.tensor([[5, 6, 7, data.pad], [5, 6, data.pad, data.pad]])
    read = torch.tensor([3, 4 + 2])
    batch = batches.Batch(
        ids, (torch.arange(4) < torch.tensor([[4], [3]])).long(), None, read, None
    )
    base.model.eval()
    with torch.no_grad():
        ours = common.forward(base, batch)
        states = base.model.base_model(input_ids=ids, attention_mask=batch.mask)[0].flatten(0, 1)
        theirs = states[read] @ base.model.score.weight.T
    torch.testing.assert_close(ours, theirs)
