"""Before training: a model that cannot be used is one line, our own mistake a traceback."""

import inspect
import json
import re
import traceback
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SIZE, TINY, ended, result_of, rows_flags, tiny_tokenizer, trained

import baseline
import common
import lora
import plan
from harness import meters

LIBRARY = Path(torch.__file__).with_name("planted.py")  # no such file: a name for planted code


def planted(line):
    """A function of one line that counts as a library's."""
    scope = {"torch": torch}
    exec(compile(f"def forward(*args, **more):\n    {line}", str(LIBRARY), "exec"), scope)
    return scope["forward"]


# ------------------------------------------------------------------------- mistakes of our own code


def misspell(patch, module, name, old, new):
    """Make `old` in a function or class of a module `new`; returns the line's number."""
    lines, first = inspect.getsourcelines(getattr(module, name))
    text = "".join(lines)
    assert text.count(old) == 1
    users = [each for each in (module, plan) if getattr(each, name, None)]
    code, scope = "\n" * (first - 1) + text.replace(old, new), vars(module)
    for user in users:
        patch.setattr(user, name, getattr(user, name))  # so that it is put back
    exec(compile(code, module.__file__, "exec"), scope)
    for user in users:
        setattr(user, name, scope[name])
    return first + text[: text.index(old)].count("\n")


RUN, PLAN = [], ["--plan"]
BOTH = [
    (lora, "lora_update", "* scale", "* scael"),
    (lora, "LoRALinear", "self.dropout(x)", "self.droupout(x)"),  # torch raises this one
    (lora, "adapt", "run.rank, run.alpha", "rnu.rank, run.alpha"),
    (common, "forward", "batch.types is None", "batch.tyeps is None"),
    (common, "step_memory", "memory[phase], ", "memroy[phase], "),
    (meters, "count_flops", "counter.get_total", "conuter.get_total"),
]


@pytest.mark.parametrize(
    "module, name, old, new, switch",
    [
        *((*case, switch) for case in BOTH for switch in (RUN, PLAN)),
        (common, "score", "logits.argmax", "logist.argmax", RUN),
        (plan, "fake_base", "config.is_encoder_decoder", "config.is_encdoer_decoder", PLAN),
    ],
)
def test_a_misspelled_name_is_a_traceback(
    module, name, old, new, switch, models, reviews, tmp_path, monkeypatch
):
    """With the file, the line and the name."""
    line = misspell(monkeypatch, module, name, old, new)
    flags = [*rows_flags(models, reviews), "--max_steps", 1, "--out", tmp_path, *switch]
    with pytest.raises((NameError, AttributeError)) as error:
        lora.main(flags)
    text = "".join(traceback.format_exception(error.value))
    assert f'{Path(module.__file__).name}", line {line}, in ' in text
    [wrong] = {*re.findall(r"\w+", new)} - {*re.findall(r"\w+", old)}
    assert f"'{wrong}'" in text


MODEL = transformers.DistilBertForSequenceClassification


@pytest.mark.parametrize("switch", [RUN, PLAN])
def test_an_error_inside_a_library_is_one_line(
    switch, models, reviews, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(MODEL, "forward", planted("raise ValueError('of the library')"))
    flags = [*rows_flags(models, reviews), "--max_steps", 1, "--out", tmp_path, *switch]
    code, error = ended(capfd, lora, *flags)
    assert code == 2 and "distilbert" in error and "(ValueError: of the library)" in error


def test_a_cost_that_a_library_cannot_measure_is_left_out(
    models, reviews, tmp_path, monkeypatch, capsys
):
    attention = planted("raise ValueError('no eager attention')")
    monkeypatch.setattr(transformers.PreTrainedModel, "set_attn_implementation", attention)
    result, path = result_of(lora, tmp_path, *rows_flags(models, reviews), "--max_steps", 1)
    assert result["memory"] and result["flops"] == {} and result["time"]
    line = "flops: not measured (ValueError: no eager attention)\n"
    assert line in capsys.readouterr().out and json.loads(path.read_text())["metrics"]["test"]


# --------------------------------------------------------------------------------- the trial before


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """odd(kind) -> folder of a tiny model whose logits depend on the batch, or that takes 65."""
    size = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.3}
    size |= {"vocab_size": SIZE, "pad_token_id": 0}
    bird = {"block_size": 4, "num_random_blocks": 1, "attention_type": "block_sparse"}
    bird |= {"max_position_embeddings": 128, "initializer_range": 0.3}
    configs = {
        "xlnet": ("XLNetLMHeadModel", size),
        "big_bird": ("BigBirdForMaskedLM", TINY | bird),
        "esm": ("EsmForMaskedLM", TINY | {"mask_token_id": 4}),
        "luke": ("LukeForMaskedLM", TINY | {"entity_vocab_size": 8, "entity_emb_size": 16}),
    }

    def get(kind):
        name, values = configs[kind]
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **values)
        folder = tmp_path_factory.mktemp(kind)
        getattr(transformers, name)(config).save_pretrained(folder)
        tiny_tokenizer("bert").save_pretrained(folder)
        return folder

    return get


@pytest.mark.parametrize("script", [lora, baseline])
def test_a_model_that_changes_at_a_short_batch_is_refused(script, odd, text_dir, tmp_path, capfd):
    """BigBird's attention becomes full at the first short batch, and stays so."""
    flags = ["--dataset", "wikitext2", "--data_dir", text_dir, "--max_length", 128]
    flags += ["--model", odd("big_bird"), "--max_steps", 1, "--out", tmp_path / "out"]
    code, error = ended(capfd, script, *flags)
    assert code == 2 and "big_bird gives an example other logits" in error
    assert not [*(tmp_path / "out").iterdir()]


def test_a_model_that_reads_its_padding_is_refused(odd, reviews, tmp_path, capfd):
    """XLNet's classification head reads the last place, padding or not."""
    flags = ["--dataset", reviews, "--model", odd("xlnet"), "--max_length", 24, "--out", tmp_path]
    code, error = ended(capfd, baseline, *flags)
    assert code == 2 and "xlnet gives an example other logits padded beside a longer one" in error


@pytest.mark.parametrize("kind", ["esm", "luke"])
def test_a_length_beyond_the_table_of_positions(kind, odd, text_dir, tmp_path, capfd):
    """66 positions, counted from behind the padding's: 65 tokens are the most, with --plan, too."""
    flags = ["--dataset", "wikitext2", "--data_dir", text_dir, "--model", odd(kind)]
    flags += ["--out", tmp_path, "--max_steps", 1, "--targets", "query"]
    for switch in (RUN, PLAN):
        code, error = ended(capfd, lora, *flags, "--max_length", 66, *switch)
        assert code == 2 and "--max_length 66: " in error and "takes 4 to 65 tokens" in error
        lora.main([*flags, "--max_length", 65, *switch])


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "qwen2"])
def test_ordinary_models_pass_in_bf16(kind, models, reviews, tmp_path):
    """In fp32 test_architectures.py trains many more, and test_bf16_on_a_cpu every method."""
    flags = [*rows_flags(models, reviews, kind), "--precision", "bf16", "--max_steps", 1]
    assert trained(lora, tmp_path, *flags)[-1].step == 1


def test_a_model_too_large_for_the_look_is_trained_all_the_same(
    models, reviews, tmp_path, monkeypatch, capsys
):
    """bf16 may fit into the memory where fp32 does not."""
    inner, calls = MODEL.forward, iter([planted("raise torch.OutOfMemoryError('of CUDA')")])
    monkeypatch.setattr(MODEL, "forward", lambda *args, **more: next(calls, inner)(*args, **more))
    assert trained(lora, tmp_path, *rows_flags(models, reviews), "--max_steps", 1)[-1].step == 1
    assert "not checked: whether logits depend on the batch" in capsys.readouterr().out
