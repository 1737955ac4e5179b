"""--plan: what a run counts on real tensors, from a folder with nothing but a config."""

import contextlib

import pytest
from conftest import EVERY, ended, rows_flags, text_flags, trained

import common
import lora
import plan
from harness import meters

METHODS = [name for name in EVERY if name != "head only"]
CASES = [*((name, "rows") for name in METHODS), ("lora", "mlm"), ("hira", "clm"), ("qlora", "clm")]


@pytest.fixture
def counted(monkeypatch):
    """What plan measures: ([memory, …], [operations, …]), an entry for each call."""
    memory, operations = [], []

    def recorded(function, calls):
        return lambda *args: calls.append(function(*args)) or calls[-1]

    monkeypatch.setattr(plan, "step_memory", recorded(plan.step_memory, memory))
    monkeypatch.setattr(meters, "count_flops", recorded(meters.count_flops, operations))
    return memory, operations


@pytest.mark.parametrize("name, task", CASES)
def test_fake_tensors_count_as_real_ones(
    name, task, models, reviews, text_dir, monkeypatch, counted
):
    """The same step on real tensors of random weights takes the same bytes and operations."""
    module, more = EVERY[name]
    if task == "rows":
        flags = rows_flags(models, reviews)
    else:
        kind = ("distilbert", "MaskedLM") if task == "mlm" else ("llama", "CausalLM")
        flags = text_flags(models, text_dir, *kind)
    for mode in (plan.FakeTensorMode, lambda **_: contextlib.nullcontext()):
        monkeypatch.setattr(plan, "FakeTensorMode", mode)
        assert module.main([*flags, "--batch_size", 8, *more, "--plan"]) is None
    memory, (fake, real) = counted
    assert fake == pytest.approx(real) and fake > 0
    # Where transformers cannot look at values it makes a causal mask: much beside a tiny model.
    near = 0.13 if task == "clm" else 0.02
    fake, real = memory
    for phase in ("train", "inference"):
        assert sum(fake[phase].values()) == pytest.approx(sum(real[phase].values()), rel=near)


def test_plan_is_what_a_run_counts(models, reviews, tmp_path, counted):
    """Beside count_memory on the largest real batch, which is as long as the plan's."""
    flags = [*rows_flags(models, reviews), "--batch_size", 8, "--train_samples", 8, "--epochs", 1]
    run, data, base, method, _ = trained(lora, tmp_path, *flags)
    memory = common.count_memory(run, data, base, method)
    lora.main([*flags, "--max_length", int(data.train.lengths.max()), "--plan"])
    planned, real = (sum(each["train"].values()) for each in (counted[0][0], memory))
    assert planned == pytest.approx(real, rel=0.08)  # there examples are padded: the mask counts


def test_a_folder_without_a_config_is_one_line(tmp_path, reviews, capfd):
    code, error = ended(capfd, lora, "--dataset", reviews, "--model", str(tmp_path), "--plan")
    assert code == 2 and "no usable config there" in error


def test_plan_of_a_config_alone(tmp_path, capsys):
    """No weights, no tokenizer: a 2-layer Llama of 230 million weights, in 4 bits."""
    from transformers import LlamaConfig

    size = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 2}
    LlamaConfig(**size, num_attention_heads=16, vocab_size=32000).save_pretrained(tmp_path / "m")
    flags = ["--dataset", "wikitext2", "--model", tmp_path / "m", "--max_length", 128]
    flags += ["--batch_size", 1, "--precision", "bf16", "--plan"]
    frozen = {}
    for name in ("lora", "qlora"):
        EVERY[name][0].main(flags)
        lines = capsys.readouterr().out.splitlines()
        assert any(line.endswith("MiB:") for line in lines)  # below a GiB
        [line] = [line for line in lines if line.startswith("frozen weights")]
        frozen[name] = float(line.split()[2])
    blocks, rest = 2 * (4 * 2048**2 + 3 * 2048 * 5504), 2 * 32000 * 2048
    assert frozen["lora"] == pytest.approx(2 * (blocks + rest) / 2**20, abs=1)
    assert frozen["qlora"] == pytest.approx((blocks * 4.127 / 8 + 2 * rest) / 2**20, abs=1)
