"""Every method on every architecture: trains, loads in PEFT, merges, or one line says why not."""

import json

import pytest
import torch
from conftest import EVERY, WORDS, oracle, ready, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

import common
from harness import models as library
from harness.store import save_adapter

SIZE = len(WORDS) + 5
TINY = {  # fields that most configs share; a config takes no notice of another's
    "vocab_size": SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
OWN = {  # an architecture's other names for the same
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "electra": {"embedding_size": 32},
    "albert": {"embedding_size": 32},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {},
    "mpnet": {},
    "modernbert": {},
    "eurobert": GROUPED | {"attention_dropout": 0.1},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "t5": {
        **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "decoder_start_token_id": 0,
    },
    "bart": {
        **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
        **{"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 66},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"new_decoder_architecture": False, "multi_query": False},
    "phi": {},
    "phi3": GROUPED,
    "llama": GROUPED,
    "qwen3": GROUPED,
    "gemma2": GROUPED,
    "gemma3_text": GROUPED,
    "olmo2": GROUPED,
    "mamba": {"state_size": 4},
}
REFUSED = {  # one line says why
    ("mamba", "every adapter"): "cannot load it for SequenceClassification",
    ("albert", "contextual"): "no feed-forward layers known",
    ("modernbert", "contextual"): "no feed-forward layers known",
    ("gpt2", "contextual"): "no feed-forward layers known",
    ("phi3", "contextual"): "no feed-forward layers known",
}
ENCODERS = [*OWN][: [*OWN].index("t5")]
METHODS = [name for name in EVERY if name not in ("head only", "full")]


@pytest.fixture(scope="session")
def architecture(tmp_path_factory):
    """architecture(kind) -> folder of a tiny body with random weights, made once a session."""
    from transformers import AutoConfig, AutoModel

    made = {}

    def get(kind):
        if kind not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, **(TINY | OWN[kind]))
            folder = tmp_path_factory.mktemp(kind)
            AutoModel.from_config(config).save_pretrained(folder)
            tokenizer = tiny_tokenizer("bert" if kind in ENCODERS else kind)
            if kind in ("t5", "bart"):  # they read the state of the end token
                end = {"single": "$A [SEP]", "special_tokens": [("[SEP]", 3)]}
                tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**end)
            tokenizer.save_pretrained(folder)
            made[kind] = str(folder)
        return made[kind]

    return get


def refusal(kind, method):
    method = method.replace("sparse qlora", "contextual")
    return REFUSED.get((kind, method)) or REFUSED.get((kind, "every adapter"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", OWN)
def test_trains_saves_loads_in_peft_and_merges(
    kind, method, architecture, reviews, tmp_path, capsys
):
    module, flags = EVERY[method]
    words = ["--dataset", reviews, "--model", architecture(kind), "--max_length", 24]
    words += ["--max_steps", 4, "--batch_size", 8, "--lr", 0.02, *flags]
    try:
        run, data, base, adapted = ready(module, tmp_path, *words)
        assert not refusal(kind, method), "works, though it is listed as refused"
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code == 2 and error.count("\n") == 1 and refusal(kind, method) in error
        return
    history = module.train(base, data, run, adapted)
    assert history.step == 4 and torch.tensor([loss for *_, loss in history.curve]).isfinite().all()
    base.model.eval()
    targets = common.predicted_tokens(data, data.test, "test")
    batch = common.collate(data, data.test, torch.arange(6), targets)
    with torch.no_grad():
        ours = common.forward(base, batch)
        with library.as_plain_linears(base.model, True, torch.float32):
            merged = common.forward(base, batch)
    torch.testing.assert_close(merged, ours, atol=2e-5, rtol=2e-4)
    save_adapter(run, base, adapted, data.task)
    torch.testing.assert_close(in_peft(run, data, base, batch), ours, atol=2e-5, rtol=2e-4)


@torch.no_grad()
def in_peft(run, data, base, batch):
    """Logits of the saved adapter in PEFT, on the base as the method keeps it."""
    import transformers

    peft = oracle("peft")
    folder = run.path.with_suffix("")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        run.model, num_labels=len(data.classes), dtype=torch.float32
    )
    model.config.pad_token_id = data.pad
    for path, module in base.model.named_modules():  # QLoRA's oracle is the dequantised base
        if hasattr(module, "packed"):
            layer = model.get_submodule(path.removesuffix(".base"))
            library.weight_of(layer).copy_(module.weight)
    loaded = peft.PeftModel.from_pretrained(model, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == run.rank
    return loaded.eval()(input_ids=batch.ids, attention_mask=batch.mask).logits
