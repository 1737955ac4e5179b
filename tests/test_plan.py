"""--plan: what a run counts on real tensors, from a folder with nothing but a config."""

import contextlib
from argparse import Namespace

import pytest
from conftest import EVERY, ended, rows_flags, text_flags, trained

import common
import lora
import plan

METHODS = [name for name in EVERY if name != "head only"]


CASES = [*((name, "rows") for name in METHODS), ("lora", "mlm"), ("hira", "clm"), ("qlora", "clm")]


@pytest.mark.parametrize("name, task", CASES)
def test_fake_tensors_count_as_real_ones(name, task, models, reviews, text_dir, monkeypatch):
    """The same step on real tensors of random weights takes the same bytes and operations."""
    module, more = EVERY[name]
    if task == "rows":
        words = rows_flags(models, reviews)
    else:
        kind = ("distilbert", "MaskedLM") if task == "mlm" else ("llama", "CausalLM")
        words = text_flags(models, text_dir, *kind)
    counted, inner = [], plan.count
    monkeypatch.setattr(plan, "count", lambda *args: counted.append(inner(*args)) or counted[-1])
    for mode in (plan.FakeTensorMode, lambda **_: contextlib.nullcontext()):
        monkeypatch.setattr(plan, "FakeTensorMode", mode)
        assert module.main([*map(str, [*words, "--batch_size", 8, *more]), "--plan"]) is None
    (fake, operations), (real, found) = counted
    assert operations == pytest.approx(found) and operations > 0
    # Where transformers cannot look at values it makes a causal mask: much beside a tiny model.
    near = 0.13 if task == "clm" else 0.02
    for phase in ("training", "scoring"):
        assert sum(fake[phase].values()) == pytest.approx(sum(real[phase].values()), rel=near)


def test_plan_is_what_a_run_counts(models, reviews, tmp_path, capsys):
    """Beside count_memory on the largest real batch, which is as long as the plan's."""
    words = [*rows_flags(models, reviews), "--batch_size", 8, "--train_samples", 8, "--epochs", 1]
    run, data, base, method, _ = trained(lora, tmp_path, *words)
    counted = common.count_memory(run, data, base, method)
    words += ["--max_length", int(data.train.lengths.max()), "--precision", "fp32"]
    args = lora.parse_args(lora.__doc__, lora.__file__, lora.add_args, words)
    run = Namespace(**{**vars(args), "lr": 1e-3, "seed": 0})
    with plan.FakeTensorMode(allow_non_fake_inputs=True):
        base, batch = plan.fake_base(run, common)
        peaks, _ = plan.count(run, base, batch, lora.adapt(run, base), common)
    planned, real = sum(peaks["training"].values()), sum(counted["train"].values())
    assert planned == pytest.approx(real, rel=0.08)  # there rows are padded, and the mask counts


def test_what_cannot_be_planned_is_one_line(tmp_path, reviews, capfd):
    words = ["--dataset", reviews, "--model", str(tmp_path), "--plan"]
    code, error = ended(capfd, lora, *words)
    assert code == 2 and "no usable config there" in error


def test_plan_of_a_config_alone(tmp_path, capsys):
    """No weights, no tokenizer: a 4-layer Llama of 300 million weights, in 4 bits."""
    from transformers import LlamaConfig

    size = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 4}
    LlamaConfig(**size, num_attention_heads=16, vocab_size=32000).save_pretrained(tmp_path / "m")
    words = ["--dataset", "wikitext2", "--model", tmp_path / "m", "--max_length", 128]
    words += ["--batch_size", 1, "--precision", "bf16", "--plan"]
    frozen = {}
    for name in ("lora", "qlora"):
        EVERY[name][0].main([*map(str, words)])
        lines = capsys.readouterr().out.splitlines()
        [row] = [line for line in lines if line.startswith("frozen weights")]
        frozen[name] = float(row.split()[2])
    blocks, rest = 4 * (4 * 2048**2 + 3 * 2048 * 5504), 2 * 32000 * 2048
    assert frozen["lora"] == pytest.approx(2 * (blocks + rest) / 2**30, abs=0.01)
    assert frozen["qlora"] == pytest.approx((blocks * 4.127 / 8 + 2 * rest) / 2**30, abs=0.01)
