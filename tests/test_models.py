"""The base and what is put into it: heads, targets, counts, unused outputs."""

import json
import shutil

import pytest
import torch
from conftest import (
    EVERY,
    batch_of,
    ended,
    gradients,
    make_model,
    ready,
    rows_flags,
    same,
    stir,
    text_flags,
    trained,
)

import common
import lora
from harness import batches, meters, output_positions
from harness import models as library

ADAPTERS = [name for name in EVERY if name not in ("head only", "full")]
SLICED = ("contextual", "contextual qlora")  # GPT-2 has no feed-forward layers that are sliced
MERGED = [("distilbert", n) for n in ADAPTERS] + [("gpt2", n) for n in ADAPTERS if n not in SLICED]


# ------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize(
    "kind, checkpoint, head",
    [
        ("distilbert", "", {"pre_classifier.weight", "pre_classifier.bias"}),
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
    assert set(base.head_names) == head | {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("labels", [2, 3])
def test_a_checkpoint_s_head_is_the_start_or_replaced(labels, models, reviews, tmp_path, capsys):
    """With equally many labels its weights are the start; with others it is new, in a line."""
    from safetensors.torch import load_file

    folder = make_model(tmp_path / "head", "bert", "SequenceClassification", num_labels=labels)
    base = ready(lora, tmp_path, *rows_flags(models, reviews), "--model", folder)[2]
    theirs = load_file(f"{folder}/model.safetensors")["classifier.weight"]
    ours = base.model.classifier.weight.detach()
    assert torch.equal(theirs, ours) if labels == 2 else ours.shape == (2, 32)
    assert ("another number of labels" in capsys.readouterr().out) == (labels == 3)


@pytest.mark.parametrize("kind, head", [("distilbert", "MaskedLM"), ("gpt2", "CausalLM")])
def test_a_tied_output_projection_stays_frozen(kind, head, models, text_dir, tmp_path):
    base = ready(lora, tmp_path, *text_flags(models, text_dir, kind, head))[2]
    assert base.head_names == [] and not base.model.get_output_embeddings().weight.requires_grad


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


@pytest.mark.parametrize(
    "kind, rank, targets, adapter, head, total",
    [
        ("distilbert", 8, None, 147_456, 592_130, 66_955_010),
        ("distilbert", 32, None, 589_824, 592_130, 66_955_010),
        ("bert", 8, ["query", "key", "value"], 442_368, 1_538, 109_483_778),
    ],
)
@pytest.mark.parametrize("name", ["lora", "hira", "prune", "contextual"])
def test_known_counts_at_real_size(name, kind, rank, targets, adapter, head, total):
    """On the meta device: nothing is allocated. 739,586, 1,181,954 and 443,906 trained weights."""
    import transformers

    module, flags = EVERY[name]
    words = ["--dataset", "demo", "--rank", rank, *flags]
    args = module.parse_args(module.__doc__, module.__file__, module.add_args, words)
    args.targets = targets
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(kind)  # the real sizes
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        heads = [n for n, _ in model.named_parameters() if "classifier" in n]
        base = common.make_base(args, model, heads, "classification", reads_last=False)
        module.adapt(args, base)
    counts = meters.count_parameters(base)
    assert (counts["adapter"], counts["head"]) == (adapter, head)
    assert counts["trainable"] == adapter + head and counts["total"] == total + adapter


@pytest.mark.parametrize("kind, name", MERGED)
def test_start_merging_and_what_is_trained(kind, name, models, reviews, tmp_path):
    """The start is the base; merged equals unmerged; as_plain_linears puts everything back."""
    module, flags = EVERY[name]
    _, data, base, _ = ready(module, tmp_path, *rows_flags(models, reviews, kind), *flags)
    model, batch = base.model.eval(), batch_of(data)
    adapters = [path for path, layer in library.stand_ins(model).items() if layer.keys]
    names = {f"{path}.{key}" for path in adapters for key in "AB"}
    assert set(common.trained_tensors(model)) == names | set(base.head_names)
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


def test_targets_by_name_by_end_and_by_commas(models, reviews, tmp_path, capfd):
    words = rows_flags(models, reviews)
    one = "distilbert.transformer.layer.1.attention.q_lin"
    cases = (([], 4), (["--targets", "q_lin,k_lin", "v_lin"], 6), (["--targets", one], 1))
    for flags, count in cases:
        run, _, base, method = ready(lora, tmp_path, *words, *flags)
        assert len(library.stand_ins(base.model)) == count
    assert method.peft["target_modules"] == [one]
    with pytest.raises(RuntimeError, match="has adapters already"):
        lora.adapt(run, base)
    code, error = ended(capfd, lora, *words, "--targets", "lin", "--out", tmp_path)
    assert code == 2 and "k_lin, lin1, lin2, out_lin, q_lin, v_lin" in error


@pytest.mark.parametrize("kind, keys", [("bart", ("encoder_", "decoder_")), ("opt", ("",))])
def test_no_layer_is_dropped_in_training(kind, keys, architecture, reviews, tmp_path):
    """A config that drops every layer: every adapter gets a gradient all the same."""
    folder = shutil.copytree(architecture(kind), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {f"{key}layerdrop": 1.0 for key in keys}
    (folder / "config.json").write_text(json.dumps(config))
    words = ["--dataset", reviews, "--model", folder, "--max_length", 24, "--max_steps", 1]
    base, history = trained(lora, tmp_path, *words)[2::2]
    assert history.step == 1
    for name, layer in library.stand_ins(base.model).items():
        assert layer.B.any(), name


# -------------------------------------------------------------------------------- unused outputs

CUT = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "gpt2"]
CUT += ["llama", "qwen3", "phi3"]
CUT_CASES = [
    *((kind, "classification", "lora", []) for kind in CUT),
    *((kind, "mlm", "lora", []) for kind in CUT[: CUT.index("gpt2")]),
    *((kind, "classification", n, []) for kind in ("bert", "gpt2") for n in ("hira", "qlora")),
    *((kind, "classification", "lora", ["--checkpointing"]) for kind in ("distilbert", "llama")),
    ("bert", "mlm", "lora", ["--checkpointing"]),
]


@pytest.mark.parametrize("kind, task, name, flags", CUT_CASES)
def test_computing_used_outputs_only_is_exact(
    kind, task, name, flags, architecture, reviews, text_dir, tmp_path, monkeypatch
):
    """Logits and every gradient, to 1e-6, also of adapters that have their own arithmetic."""
    words = ["--dataset", reviews, "--model", architecture(kind), "--max_length", 24]
    if task == "mlm":
        words = text_flags(lambda *_: architecture(kind), text_dir)
    module, more = EVERY[name]
    words += [*flags, *more]
    _, data, base, _ = ready(module, tmp_path, *words)
    monkeypatch.setattr(output_positions, "AFTER_ATTENTION", {})
    whole = ready(module, tmp_path, *words)[2]
    assert base.last_block_cut and not whole.last_block_cut
    for each in (base, whole):
        stir(each)
        each.model.train()
    same(gradients(base, batch_of(data)), gradients(whole, batch_of(data)), 1e-6)


def test_a_decoder_reads_its_last_token_whatever_it_is(models, reviews, tmp_path):
    """A text that ends in the pad token: the library's own rule would read one token early."""
    _, data, base, _ = ready(lora, tmp_path, *rows_flags(models, reviews, "gpt2"))
    ids = torch.tensor([[5, 6, 7, data.pad_id], [5, 6, data.pad_id, data.pad_id]])
    mask, last = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.tensor([3, 4 + 2])
    batch = batches.Batch(ids, mask, None, mask.flatten().nonzero()[:, 0], last, None)
    base.model.eval()
    with torch.no_grad():
        ours = common.forward(base, batch)
        states = base.model.base_model(input_ids=ids, attention_mask=batch.attention_mask)[0]
        torch.testing.assert_close(ours, states.flatten(0, 1)[last] @ base.model.score.weight.T)


def test_class_names_go_by_number_whatever_their_order_in_the_config():
    from transformers import BertConfig

    config = BertConfig(architectures=["BertForSequenceClassification"])
    config.id2label = {1: "pos", 0: "neg"}
    assert library.class_names(config) == ["neg", "pos"]


@pytest.mark.parametrize(
    "names, classes, order",
    [
        (["POS", "NEG"], ["neg", "pos"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),  # names that differ in case alone
        (["2", "1"], ["1", "2"], [1, 0]),  # names that are numbers
        (["1", "2"], ["0", "1"], None),
    ],
)
def test_a_head_s_classes_are_found_by_name(names, classes, order):
    assert library.head_order(names, classes) == order
