"""Methods on every architecture: they train, save PEFT's adapter and merge, or one line says no."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY, OWN, batch_of, close, gradients, oracle, ready

import common
import qlora
from harness import models as library
from harness.store import save_adapter

REFUSED = {  # one line says why
    ("mamba", "every adapter"): "cannot load it for SequenceClassification",
    ("albert", "contextual"): "no plain feed-forward layers known",
    ("modernbert", "contextual"): "no plain feed-forward layers known",
    ("gpt2", "contextual"): "no plain feed-forward layers known",
    ("phi3", "contextual"): "no plain feed-forward layers known",
}
CASES = [(kind, name) for kind in OWN for name in ("lora", "hira", "qlora", "contextual")]
UNLIKE = ("bert", "gpt2", "t5", "llama", "falcon")  # for methods composed of the four's parts
CASES += [(kind, name) for kind in UNLIKE for name in ("prune", "qhira", "contextual qlora")]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind, name", CASES)
def test_trains_and_saves_what_peft_loads_and_merges(
    kind, name, architecture, reviews, tmp_path, capsys
):
    """Logits merged, in PEFT, and the gradients of A and B there."""
    module, flags = EVERY[name]
    words = ["--dataset", reviews, "--model", architecture(kind), "--max_length", 24]
    words += ["--max_steps", 4, "--batch_size", 8, "--lr", 0.02, *flags]
    method_of = name.replace("contextual qlora", "contextual")
    refusal = REFUSED.get((kind, method_of)) or REFUSED.get((kind, "every adapter"))
    try:
        run, data, base, method = ready(module, tmp_path, *words)
        assert not refusal, "works, though it is listed as refused"
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code == 2 and error.count("\n") == 1 and refusal in error
        return
    history = module.train(run, data, base, method)
    assert history.step == 4 and torch.tensor([loss for *_, loss in history.curve]).isfinite().all()
    base.model.eval()
    batch = batch_of(data, 6)
    ours, grads = gradients(base, batch)
    with torch.no_grad(), library.as_plain_linears(base.model, True, torch.float32):
        torch.testing.assert_close(common.forward(base, batch), ours, atol=2e-5, rtol=2e-4)
    save_adapter(run, data, base, method)
    twin = in_peft(run, data, base)
    theirs = twin(input_ids=batch.ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=2e-4)
    F.cross_entropy(theirs, batch.target).backward()
    named = dict(twin.named_parameters())
    for path, layer in library.stand_ins(base.model).items():
        for key, file_name in layer.keys.items():
            peft_name = file_name.replace(f"_{key}", f"_{key}.default")
            grad = named[f"base_model.model.{path}.{peft_name}"].grad
            assert grad.any()
            close(grads[f"{path}.{key}"] / grad.abs().max(), grad / grad.abs().max(), 1e-3)


@torch.no_grad()
def in_peft(run, data, base):
    """The saved adapter in PEFT, on the base as the method keeps it."""
    import transformers

    peft = oracle("peft")
    folder = run.path.with_suffix("")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        run.model, num_labels=len(data.classes), dtype=torch.float32
    )
    model.config.pad_token_id = data.pad_id
    for path, module in base.model.named_modules():  # QLoRA's oracle is the dequantized base
        if isinstance(module, qlora.NF4Linear):
            layer = model.get_submodule(path.removesuffix(".base"))
            library.weight_of(layer).copy_(module.weight)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == run.rank
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()
