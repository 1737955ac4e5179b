"""Every method on every architecture: trains, loads in PEFT, merges, or one line says why not."""

import json

import pytest
import torch
from conftest import EVERY, OWN, oracle, ready

import common
import qlora
from harness import batches
from harness import models as library
from harness.store import save_adapter

REFUSED = {  # one line says why
    ("mamba", "every adapter"): "cannot load it for SequenceClassification",
    ("albert", "contextual"): "no plain feed-forward layers known",
    ("modernbert", "contextual"): "no plain feed-forward layers known",
    ("gpt2", "contextual"): "no plain feed-forward layers known",
    ("phi3", "contextual"): "no plain feed-forward layers known",
}
METHODS = [name for name in EVERY if name not in ("head only", "full")]


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
    history = module.train(run, data, base, adapted)
    assert history.step == 4 and torch.tensor([loss for *_, loss in history.curve]).isfinite().all()
    base.model.eval()
    targets = batches.predicted_tokens(data, data.test, "test")
    batch = batches.collate(data, data.test, torch.arange(6), targets)
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
    for path, module in base.model.named_modules():  # QLoRA's oracle is the dequantized base
        if isinstance(module, qlora.NF4Linear):
            layer = model.get_submodule(path.removesuffix(".base"))
            library.weight_of(layer).copy_(module.weight)
    loaded = peft.PeftModel.from_pretrained(model, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == run.rank
    return loaded.eval()(input_ids=batch.ids, attention_mask=batch.mask).logits
