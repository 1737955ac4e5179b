"""Models that cannot be used as asked: one line before training, or right numbers after all."""

import json

import pytest
import torch
import transformers
from conftest import ended, ready, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import baseline
import lora
import qlora

SMALL = {
    **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 64, "max_position_embeddings": 66, "pad_token_id": 0},
}


def write(folder, auto, kind, tokenizer="bert", **fields):
    """A tiny model with random weights of class Auto… and a tokenizer in a folder."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SMALL | fields))
    getattr(transformers, auto).from_config(config).save_pretrained(folder)
    tiny_tokenizer(tokenizer).save_pretrained(folder)
    return folder


def text(text_dir, folder):
    flags = ["--dataset", "wikitext2", "--data_dir", text_dir, "--model", folder]
    return [*flags, "--max_length", 16, "--max_steps", 2]


def rows(reviews, folder):
    return ["--dataset", reviews, "--model", folder, "--max_length", 24, "--max_steps", 2]


def test_a_causal_lm_that_sees_the_future_has_no_perplexity(text_dir, tmp_path, capfd):
    grouped = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
    for sees, name in ((False, "causal"), (True, "sees")):
        fields = {**grouped, "use_bidirectional_attention": sees}
        write(tmp_path / name, "AutoModelForCausalLM", "gemma3_text", "llama", **fields)
    code, error = ended(capfd, baseline, *text(text_dir, tmp_path / "sees"), "--out", tmp_path)
    assert code == 2 and "sees later tokens" in error
    assert baseline.main([*map(str, text(text_dir, tmp_path / "causal")), "--out", str(tmp_path)])


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_broken_weights_are_named(value, reviews, tmp_path, capfd):
    folder = write(tmp_path / "broken", "AutoModel", "bert")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][0, 0] = float(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, error = ended(capfd, lora, *rows(reviews, folder), "--out", tmp_path)
    assert code == 2 and "encoder.layer.1.output.dense.weight" in error


@pytest.mark.parametrize("more", [[], ["--plan"]])
def test_a_config_with_millions_of_layers_is_refused(more, reviews, tmp_path, capfd):
    """Building them would never end."""
    folder = write(tmp_path / "deep", "AutoModel", "bert")
    config = json.loads((folder / "config.json").read_text()) | {"decoder_layers": 10**7}
    (folder / "config.json").write_text(json.dumps(config))
    code, error = ended(capfd, lora, *rows(reviews, folder), "--out", tmp_path, *more)
    assert code == 2 and "decoder_layers 10000000 in its config.json" in error


def test_huge_weights_are_not_called_a_fault_of_the_batch(reviews, tmp_path, capfd):
    folder = write(tmp_path / "huge", "AutoModel", "bert")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, error = ended(capfd, lora, *rows(reviews, folder), "--out", tmp_path)
    assert code == 2 and "NaN or infinite logits: its weights are too large" in error


def test_new_tensors_that_come_uninitialized_are_drawn_again(tmp_path):
    from harness.models import check_values

    model = torch.nn.Linear(4, 4)
    model.weight.data.fill_(1e37)
    model.bias.data.fill_(float("nan"))
    check_values("x", model, {"weight", "bias"})
    assert model.bias.eq(0).all() and model.weight.abs().max() < 1 and model.weight.std() > 0


def test_layers_that_no_gradient_reaches_are_named(text_dir, tmp_path, capfd):
    """Longformer's queries of global attention are idle where no token has it."""
    fields = {"attention_window": 16, "type_vocab_size": 1}
    folder = write(tmp_path / "longformer", "AutoModelForMaskedLM", "longformer", **fields)
    words = [*text(text_dir, folder), "--targets", "query", "query_global", "--out", tmp_path]
    code, error = ended(capfd, lora, *words)
    assert code == 2 and "no gradient reaches longformer.encoder.layer.0.attention.self" in error
    assert "query_global" in error


def test_a_library_error_is_one_line(reviews, tmp_path, capfd):
    """DeBERTa masks with fp32's lowest number, which bf16 does not have."""
    fields = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    folder = write(tmp_path / "deberta", "AutoModel", "deberta", **fields)
    words = [*rows(reviews, folder), "--precision", "bf16", "--out", tmp_path]
    code, error = ended(capfd, lora, *words)
    assert code == 2 and "deberta cannot be trained in bf16" in error


@pytest.mark.parametrize("module", [lora, qlora])
def test_layers_whose_output_a_model_changes_in_place(module, reviews, tmp_path):
    """Longformer divides its queries in place."""
    folder = write(tmp_path / "longformer", "AutoModel", "longformer", attention_window=16)
    flags = ["--nf4_kernel", "torch"] if module is qlora else []
    run, data, base, method = ready(module, tmp_path, *rows(reviews, folder), *flags)
    assert module.train(run, data, base, method).step == 2


def test_experts_outside_linear_layers_are_told(reviews, tmp_path, capsys):
    fields = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
    folder = write(tmp_path / "mixtral", "AutoModelForCausalLM", "mixtral", "llama", **fields)
    *_, method = ready(qlora, tmp_path, *rows(reviews, folder), "--nf4_kernel", "torch")
    experts = 2 * 4 * 3 * 32 * 64  # layers · experts · matrices
    assert method.report()["weights_not_quantized"] == experts
    assert f"not in NF4: {experts:,} weights" in capsys.readouterr().out


def test_a_tokenizer_without_special_tokens(text_dir, reviews, tmp_path, capfd):
    words = {word: i for i, word in enumerate(["a", "good", "bad", "film", "the"])}
    bare = Tokenizer(models.WordLevel(words, unk_token="a"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fields = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 66}
    for auto, kind, name in (
        ("AutoModelForCausalLM", "gpt2", "decoder"),
        ("AutoModelForMaskedLM", "bert", "encoder"),
    ):
        folder = write(tmp_path / name, auto, kind, **(fields if kind == "gpt2" else {}))
        transformers.PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(folder)
    assert lora.main([*map(str, rows(reviews, tmp_path / "decoder")), "--out", str(tmp_path)])
    code, error = ended(capfd, lora, *text(text_dir, tmp_path / "encoder"), "--out", tmp_path)
    assert code == 2 and "lacks a mask, cls or sep token" in error
