"""An exported model is an ordinary checkpoint: the library loads it, and it gives our logits."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import EVERY, batch_of, ended, ready, rows_flags, sentences, text_flags, trained

import common
import lora
from harness import export

TASKS = {
    "classification": ("SequenceClassification", ["distilbert", "bert", "gpt2", "llama"]),
    "mlm": ("MaskedLM", ["bert"]),
    "clm": ("CausalLM", ["gpt2", "llama"]),
}
CASES = [
    (task, kind, name)
    for task, (_, kinds) in TASKS.items()
    for kind in kinds
    for name in EVERY
    if not (task != "classification" and name == "head only")
    and not (kind == "gpt2" and name in ("contextual", "contextual qlora"))
]


@pytest.mark.parametrize("task, kind, name", CASES)
def test_the_library_loads_it_and_gives_our_logits(
    task, kind, name, models, reviews, text_dir, tmp_path
):
    module, flags = EVERY[name]
    head = TASKS[task][0]
    line = rows_flags(models, reviews, kind)
    if task != "classification":
        line = text_flags(models, text_dir, kind, head)
    line += ["--max_steps", 3, "--lr", 0.02, "--export", tmp_path / "whole", *flags]
    run, data, base, method = ready(module, tmp_path, *line)
    start = {name: tensor.clone() for name, tensor in common.trained_tensors(base.model).items()}
    module.train(run, data, base, method)
    export.export(run, base)
    loaded, info = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
        tmp_path / "whole", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert getattr(loaded.config, "use_cache", True)
    assert loaded.dtype == torch.float32
    batch = batch_of(data)

    @torch.no_grad()
    def theirs(model):
        logits = model.eval()(input_ids=batch.ids, attention_mask=batch.attention_mask).logits
        return logits if task == "classification" else logits.flatten(0, 1)[batch.output_positions]

    base.model.eval()
    with torch.no_grad():
        ours = common.forward(base, batch)
        torch.testing.assert_close(theirs(loaded), ours, atol=1e-5, rtol=1e-4)
        for key, tensor in start.items():  # the control: training moved the logits
            base.model.get_parameter(key).copy_(tensor)
        assert (common.forward(base, batch) - ours).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone(kind, models, text_dir, tmp_path):
    head, layer = ("MaskedLM", "decoder") if kind == "bert" else ("CausalLM", "lm_head")
    line = [*text_flags(models, text_dir, kind, head), "--targets", layer, "--max_steps", 3]
    line += ["--lr", 0.05, "--export", tmp_path / "whole"]
    run, data, base, _, _ = trained(lora, tmp_path, *line)
    export.export(run, base)
    loaded = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path / "whole")
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        theirs, read = loaded.eval()(ids).logits[0], torch.arange(12)
        ours = common.forward(base, common.Batch(ids, None, None, read, read, read))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    embedding = loaded.get_input_embeddings().weight
    assert torch.equal(embedding, base.model.get_input_embeddings().weight)
    assert not torch.equal(embedding, loaded.get_output_embeddings().weight)


def test_the_size_told_is_that_of_the_file(models, reviews, tmp_path, capsys):
    folder = tmp_path / "bf16"
    source = models("distilbert")
    small = transformers.AutoModel.from_pretrained(source, dtype=torch.bfloat16)
    small.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    line = ["--dataset", reviews, "--model", folder, "--max_length", 24, "--max_steps", 1]
    line += ["--out", tmp_path, "--export", tmp_path / "whole"]
    lora.main([*map(str, line)])
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size / 2**20
    told = re.search(r"([\d.]+) MiB, bfloat16", capsys.readouterr().out)[1]
    assert float(told) == pytest.approx(size, abs=0.06)


def test_what_the_checkpoint_says_of_generation_and_of_its_old_head(
    models, reviews, text_dir, tmp_path
):
    """Stop tokens may stand in generation_config.json alone; a regression head is none any more."""
    line = [*text_flags(models, text_dir, "llama", "CausalLM"), "--max_steps", 1]
    source = shutil.copytree(line[5], tmp_path / "source")
    transformers.GenerationConfig(eos_token_id=[3, 7], max_new_tokens=5).save_pretrained(source)
    line += ["--model", source, "--out", tmp_path, "--export", tmp_path / "text"]
    lora.main([*map(str, line)])
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "text")
    assert config.eos_token_id == [3, 7] and config.max_new_tokens == 5

    changes = {"num_labels": 1, "problem_type": "regression"}
    model = models("bert", "SequenceClassification", **changes)
    line = [*rows_flags(models, reviews), "--model", model, "--max_steps", 1, "--out", tmp_path]
    lora.main([*map(str, line), "--export", str(tmp_path / "classes")])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "classes")
    assert config.problem_type == "single_label_classification" and config.num_labels == 2
    scores = transformers.pipeline("text-classification", str(tmp_path / "classes"), top_k=None)
    assert sum(entry["score"] for entry in scores("a great film")[0]) == pytest.approx(1)


def test_pipeline_knows_the_label_names(models, tmp_path):
    line = ["--dataset", "demo", "--max_steps", 2, "--export", tmp_path / "whole"]
    lora.main([*map(str, line), "--model", models("bert"), "--out", str(tmp_path)])
    classify = transformers.pipeline("text-classification", str(tmp_path / "whole"))
    assert classify("a great film")[0]["label"] in ("negative", "positive")


def test_from_a_saved_adapter(models, reviews, tmp_path):
    line = [*rows_flags(models, reviews), "--max_steps", 3, "--out", tmp_path]
    lora.main([*map(str, line), "--export", str(tmp_path / "a")])
    [adapter] = tmp_path.glob("*-seed0/")
    lora.main([*map(str, line), "--eval_only", str(adapter), "--export", str(tmp_path / "b")])
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_nothing_is_overwritten_and_nothing_is_left_half(
    models, reviews, tmp_path, capfd, monkeypatch
):
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    line = [*rows_flags(models, reviews), "--max_steps", 1, "--out", tmp_path]
    code, error = ended(capfd, lora, *line, "--export", folder)
    assert code == 2 and "not an empty folder" in error and (folder / "mine.txt").exists()
    code, error = ended(capfd, lora, *line, "--export", folder, "--force")
    assert code == 2 and "not an empty folder" in error and (folder / "mine.txt").exists()
    code, error = ended(capfd, lora, *line, "--seeds", 0, 1, "--export", tmp_path / "new")
    assert code == 2 and "of one run" in error

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "empty"
    folder.mkdir()
    with monkeypatch.context() as broken:
        broken.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        code, error = ended(capfd, lora, *line, "--export", folder)
    assert code == 1 and "No space left" in error and not [*folder.iterdir()]
    code, error = ended(capfd, lora, *line, "--export", folder)  # the run itself is finished
    assert code == 2 and "--eval_only" in error and not [*folder.iterdir()]
    monkeypatch.chdir(folder)
    lora.main([*map(str, line), "--force", "--export", "."])
    assert (folder / "model.safetensors").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_from_one_csv_file_to_a_pipeline(models, tmp_path, monkeypatch):
    """The command that compare.py prints exports a run on a file, without further flags."""
    monkeypatch.chdir(tmp_path)
    texts, labels = sentences(200, 5)
    names = ["bad", "good"]
    lines = [f"{text},{names[label]}" for text, label in zip(texts, labels, strict=True)]
    Path("tickets.csv").write_text("\n".join(["text,label", *lines]))
    shutil.copytree(models("distilbert"), "model")
    flags = ["--dataset", "tickets.csv", "--model", "model", "--max_length", 16]
    [path] = lora.main([*flags, "--max_steps", 60, "--lr", "0.01"])
    lora.main(["--eval_only", str(path.with_suffix("")), "--export", "my-model"])
    classify = transformers.pipeline("text-classification", "my-model")
    predicted = [answer["label"] for answer in classify(texts)]
    right = [name == names[label] for name, label in zip(predicted, labels, strict=True)]
    scores = json.loads(path.read_text())["metrics"]
    assert sum(right) / len(right) > 0.8 and scores["test"]["accuracy"] > 0.7
