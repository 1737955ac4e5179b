"""What runs leave on disk: results, adapters that PEFT exchanges with us, exact checkpoints."""

import base64
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EVERY, ended, oracle, ready, result_of, rows_flags, text_flags, weights
from safetensors.torch import load_file, save_file

import baseline
import common
import lora
import qlora
import sparse_lora
from harness import store

ROOT = Path(__file__).parents[1]


def batch_of(data, n=6):
    targets = common.predicted_tokens(data, data.test, "test")
    return common.collate(data, data.test, torch.arange(n), targets)


@torch.no_grad()
def logits_of(base, batch):
    base.model.eval()
    return common.forward(base, batch)


# ------------------------------------------------------------------------------------ result file


@pytest.mark.parametrize("name", EVERY)
def test_result_file_says_what_ran(name, models, reviews, tmp_path):
    module, flags = EVERY[name]
    words = [*rows_flags(models, reviews), *flags, "--max_steps", 6, "--heldout", 20]
    result, path = result_of(module, tmp_path, *words)
    text = path.read_text()
    assert text.count("\n") == 1 and "/" not in text.replace("/s", "").split('"environment"')[0]
    assert result["schema"] == 3 and result["seed"] == 0 and not result["untrained"]
    assert (
        path.name == f"reviews-{result['name']}-{Path(words[3]).name}-lr{result['lr']:g}-seed0.json"
    )
    sizes = result["data"]
    assert sizes["test"] == sizes["official"] + 20 and sizes["train"] + sizes["dev"] <= 120 - 20
    bits = np.frombuffer(base64.b64decode(result["test_examples"]["correct"]), np.uint8)
    right = np.unpackbits(bits)[: sizes["test"]]
    assert right.mean() == pytest.approx(result["metrics"]["test"]["accuracy"])
    assert right[: sizes["official"]].mean() == pytest.approx(
        result["metrics"]["official"]["accuracy"]
    )
    assert [step for step, *_ in result["curve"]] == [1, 2, 3, 4, 5, 6]
    tensors = load_file(path.with_suffix("") / "adapter_model.safetensors").values()
    assert result["parameters"]["trainable"] == sum(tensor.numel() for tensor in tensors)
    assert result["disk"]["adapter"] == sum(
        f.stat().st_size for f in path.with_suffix("").iterdir()
    )
    assert result["settings"].get("targets") is None
    train, inference = result["memory"]["train"], result["memory"]["inference"]
    assert train["optimizer"] > 0 == inference["optimizer"]
    if name != "head only":  # its steps keep no activations, and the test rows here are longer
        assert sum(train.values()) > sum(inference.values())
    assert result["flops"]["total"] == pytest.approx(6 * result["flops"]["step"])


def test_blocks_of_running_text_keep_their_losses(models, text_dir, tmp_path):
    words = [*text_flags(models, text_dir), "--max_steps", 2]
    result, _ = result_of(lora, tmp_path, *words)
    nll, scored = (np.array(result["test_examples"][key]) for key in ("nll", "scored"))
    assert len(nll) == len(scored) == result["data"]["test"]
    perplexity = result["metrics"]["test"]["mlm_perplexity"]
    # Stored with three decimals: a block's loss is dozens.
    assert np.exp(nll.sum() / scored.sum()) == pytest.approx(perplexity, rel=1e-4)


def test_a_failure_in_measuring_loses_nothing(models, reviews, tmp_path, monkeypatch, capsys):
    """One cost that fails leaves the others; a crash leaves scores, adapter and no half file."""
    words = [*rows_flags(models, reviews), "--max_steps", 2]

    def broken(*_):
        raise ValueError("no such count")

    monkeypatch.setattr(common, "count_flops", broken)
    result, _ = result_of(lora, tmp_path / "a", *words)
    assert "flops: not measured (ValueError: no such count)" in capsys.readouterr().out
    assert result["flops"] == {} and result["memory"] and result["disk"]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lora, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        result_of(lora, tmp_path / "b", *words)
    [path] = (tmp_path / "b").glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["metrics"]["test"] == result["metrics"]["test"] and kept["memory"] == {}
    assert weights(path) and not list((tmp_path / "b").rglob("*.tmp"))


@pytest.mark.parametrize("what", ["result", "adapter", "checkpoint"])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    what, models, reviews, tmp_path, monkeypatch, capfd
):
    replace = Path.replace

    def full(path, target):
        if what in str(target) or what == "result" and str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    words = [*rows_flags(models, reviews), "--max_steps", 4, "--save_every", 2]
    code, error = ended(capfd, lora, *words, "--out", tmp_path)
    assert code == 1 and "No space left on device" in error and "--out" in error
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": 3}', '{"schema": 1}'])
def test_a_file_in_the_way_is_named(content, models, reviews, tmp_path, capfd):
    words = [*rows_flags(models, reviews), "--max_steps", 1, "--out", tmp_path]
    [path] = lora.main([*map(str, words)])
    path.write_text(content)
    code, error = ended(capfd, lora, *words)
    assert code == 2 and path.name in error and "--force" in error and path.read_text() == content


# --------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", ["distilbert", "bert", "gpt2", "llama"])
@pytest.mark.parametrize("name", ["lora", "hira"])
def test_peft_adapters_load_here(name, kind, models, reviews, tmp_path):
    """PEFT makes one, with its own start and a stirred B; ours gives PEFT's logits."""
    import transformers

    peft, module = oracle("peft"), EVERY[name][0]
    run, data, base, method = ready(module, tmp_path, *rows_flags(models, reviews, kind))
    batch = batch_of(data)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        run.model, num_labels=2, dtype=torch.float32
    )
    theirs.config.pad_token_id = data.pad
    shared = {"r": 8, "target_modules": method.peft["target_modules"], "task_type": "SEQ_CLS"}
    if name == "hira":
        config = peft.HiraConfig(**shared)
    else:
        config = peft.LoraConfig(**shared, lora_alpha=16, fan_in_fan_out=kind == "gpt2")
    theirs = peft.get_peft_model(theirs, config)
    torch.manual_seed(3)
    for key, tensor in theirs.named_parameters():
        if "lora_" in key or "hira_" in key:
            tensor.data.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    before = logits_of(base, batch)
    run.eval_only = tmp_path / "theirs"
    store.load_adapter(run, base, method)
    ours = logits_of(base, batch)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=batch.ids, attention_mask=batch.mask).logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert (ours - before).abs().max() > 1e-3


def test_pruned_ranks_load_in_peft_and_here(models, reviews, tmp_path):
    import transformers

    peft = oracle("peft")
    words = [*rows_flags(models, reviews), "--structure", "rank", "--max_steps", 12, "--lr", 0.05]
    run, data, base, method = ready(sparse_lora, tmp_path, *words)
    sparse_lora.train(run, data, base, method)
    store.save_adapter(run, base, method, data.task)
    ranks = method.peft["rank_pattern"]
    assert sum(ranks.values()) == 4 * 8 // 2 and min(ranks.values()) >= 1
    batch, ours = batch_of(data), logits_of(base, batch_of(data))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        run.model, num_labels=2
    )
    theirs = peft.PeftModel.from_pretrained(theirs, run.path.with_suffix("")).eval()
    with torch.no_grad():
        expected = theirs(input_ids=batch.ids, attention_mask=batch.mask).logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    again, _, fresh, method = ready(sparse_lora, tmp_path, *words)
    again.eval_only = run.path.with_suffix("")
    store.load_adapter(again, fresh, method)
    torch.testing.assert_close(logits_of(fresh, batch), ours)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_eval_only_scores_what_the_run_scored(
    name, task, models, reviews, text_dir, tmp_path, capsys
):
    module, flags = EVERY[name]
    words = rows_flags(models, reviews)
    if task == "mlm":
        words = text_flags(models, text_dir, "bert", "")
    words = [*words, *flags, "--max_steps", 4]
    [path] = module.main([*map(str, words), "--out", str(tmp_path)])
    line = capsys.readouterr().out.splitlines()[-2]
    assert "accuracy: dev" in line or "perplexity: dev" in line
    folder = str(path.with_suffix(""))
    module.main([*map(str, words), "--eval_only", folder, "--out", str(tmp_path / "nothing")])
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert not (tmp_path / "nothing").exists()


@pytest.fixture(scope="module")
def saved(models, reviews, tmp_path_factory):
    """(flags, folder of a LoRA adapter) of one short run."""
    words = [*rows_flags(models, reviews), "--max_steps", 2]
    [path] = lora.main([*map(str, words), "--out", str(tmp_path_factory.mktemp("saved"))])
    return words, path.with_suffix("")


def edit(folder, to, tensors=None, **fields):
    """A copy of an adapter folder with other config fields or tensors."""
    to.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (to / "adapter_config.json").write_text(json.dumps(config))
    kept = load_file(folder / "adapter_model.safetensors")
    (tensors or (lambda kept: None))(kept)
    save_file(kept, to / "adapter_model.safetensors")
    return to


def drop(kept):
    del kept[sorted(kept)[0]]


def add(kept):
    kept["base_model.model.extra"] = torch.zeros(1)


def reshape(kept):
    kept["base_model.model.classifier.bias"] = torch.zeros(3)


FAULTS = {  # what is changed in the folder, what the line names
    "no tensor": (drop, {}, "1 tensors missing"),
    "one more tensor": (add, {}, "1 unexpected"),
    "another shape": (reshape, {}, "[3] there, [2] here"),
    "another rank": (None, {"r": 4}, "change --rank"),
    "another alpha": (None, {"lora_alpha": 8}, "change --alpha"),
    "another method": (None, {"peft_type": "HIRA"}, "change the script"),
    "rsLoRA": (None, {"use_rslora": True}, "rsLoRA"),
    "PiSSA": (None, {"init_lora_weights": "pissa"}, "changes the base itself"),
    "foreign ranks": (None, {"rank_pattern": {"q_lin": 4}}, "not one of ours"),
    "foreign alphas": (None, {"alpha_pattern": {"q_lin": 4}}, "not one of ours"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_eval_only_is_strict(fault, saved, tmp_path, capfd):
    words, folder = saved
    tensors, fields, named = FAULTS[fault]
    spoiled = edit(folder, tmp_path / "spoiled", tensors, **fields)
    code, error = ended(capfd, lora, *words, "--eval_only", spoiled)
    assert code == 2 and "--eval_only" in error and named in error


def test_eval_only_wants_the_base_that_was_trained_on(saved, models, tmp_path, capfd):
    words, folder = saved
    other = [*words, "--model", models("distilbert", vocab_size=60), "--eval_only", folder]
    code, error = ended(capfd, lora, *other)
    assert code == 2 and "another base" in error
    code, error = ended(capfd, qlora, *words, "--nf4_kernel", "torch", "--eval_only", folder)
    assert code == 2 and "in other bits" in error
    code, error = ended(capfd, lora, *words, "--eval_only", tmp_path)
    assert code == 2 and "no adapter that can be read" in error


def test_a_foreign_adapter_on_a_4_bit_base_is_told(saved, tmp_path, capsys):
    words, folder = saved
    foreign = edit(folder, tmp_path / "foreign")  # as PEFT writes it: no hash of the base
    words = [*words, "--nf4_kernel", "torch", "--eval_only", foreign]
    qlora.main([*map(str, words), "--out", str(tmp_path)])
    assert "scored on the base in nf4" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize(
    "name, kind", [*((name, signal.SIGINT) for name in EVERY), ("lora", signal.SIGTERM)]
)
def test_stopped_and_continued_equals_never_stopped(
    name, kind, models, reviews, tmp_path, monkeypatch, capfd
):
    """Bit for bit, with dropout in base and adapter: curve, scores and what is saved."""
    module, flags = EVERY[name]
    words = [*rows_flags(models, reviews), *flags, "--max_steps", 7, "--batch_size", 16]
    words += ["--base_dropout", 0.1] + (["--dropout", 0.1] if module is not baseline else [])
    whole, path = result_of(module, tmp_path / "whole", *words)
    gradient = common.gradient
    calls = []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 5:  # the first is the trial of one row
            os.kill(os.getpid(), kind)
        return gradient(*args)

    monkeypatch.setattr(common, "gradient", stopping)
    out = tmp_path / "stopped"
    code, error = ended(capfd, module, *words, "--out", out)
    assert code == 128 + kind and "stopped at step 4 of 7" in error
    assert list(out.glob("*.checkpoint")) and not list(out.glob("*.json"))
    monkeypatch.setattr(common, "gradient", gradient)
    again, other = result_of(module, out, *words)
    assert "continuing at step 4" in capfd.readouterr().out
    for key in ("curve", "metrics", "test_examples", "parameters", "report"):
        assert again[key] == whole[key], key
    assert weights(other) == weights(path) and not list(out.glob("*.checkpoint"))


@pytest.mark.parametrize("where", ["gradient", "score", "count_memory"])
@pytest.mark.parametrize("name, flags", [("full", []), ("prune", ["--structure", "rank"])])
def test_what_is_trained_outlives_a_stop(
    name, flags, where, models, reviews, tmp_path, monkeypatch, capfd
):
    """In the last step, while scoring, while measuring: going on trains nothing, ends the same."""
    module, more = EVERY[name]
    words = [*rows_flags(models, reviews), *more, *flags, "--max_steps", 3]
    whole, path = result_of(module, tmp_path / "whole", *words)
    plain, calls, last = getattr(common, where), [], 4 if where == "gradient" else 1

    def stopping(*args):
        calls.append(1)
        if len(calls) == last and where == "gradient":  # the first is the trial of one row
            os.kill(os.getpid(), signal.SIGINT)
        elif len(calls) == last:
            common.fail("stopped", 128 + signal.SIGINT)  # as one_line_on_interrupt has it
        return plain(*args)

    monkeypatch.setattr(common, where, stopping)
    out = tmp_path / "stopped"
    code, error = ended(capfd, module, *words, "--out", out)
    assert code == 128 + signal.SIGINT and "stopped" in error
    assert list(out.glob("*.checkpoint"))
    assert bool(list(out.glob("*.json"))) == (where == "count_memory")  # which has the scores
    monkeypatch.setattr(common, where, plain)
    gradient, steps = common.gradient, []
    monkeypatch.setattr(common, "gradient", lambda *args: steps.append(1) or gradient(*args))
    again, other = result_of(module, out, *words)
    assert "continuing at step 3" in capfd.readouterr().out
    assert len(steps) == 3  # the trial of one row and the memory's two: none of training's
    for key in ("curve", "metrics", "test_examples", "parameters", "report"):
        assert again[key] == whole[key], key
    assert weights(other) == weights(path) and not list(out.glob("*.checkpoint"))


@pytest.mark.parametrize("during", ["score", "count_memory"])
def test_ctrl_c_after_training_is_one_line(during, models, reviews, tmp_path):
    """As a user types it: no result is left, or scores without costs; the same command goes on."""
    words = [*rows_flags(models, reviews), "--max_steps", 1, "--out", tmp_path / "o"]
    code = f"""
import os, signal, sys
import common, lora
common.{during} = lambda *_: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["lora.py", *{[*map(str, words)]!r}]
lora.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.count("\n") == 1 and "stopped" in done.stderr
    assert len([*(tmp_path / "o").glob("*.json")]) == (during == "count_memory")
    if during == "count_memory":
        command = [sys.executable, "lora.py", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert "lacks its costs: going on" in done.stdout
        assert "continuing at step 1" in done.stdout
        [path] = (tmp_path / "o").glob("*.json")
        assert json.loads(path.read_text())["memory"]["train"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert "is there already" in done.stdout and "trained" not in done.stdout


def test_an_untrained_run_stopped_while_it_is_measured_gets_its_costs(
    models, reviews, tmp_path, monkeypatch
):
    words = [*rows_flags(models, reviews), "--epochs", 0]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lora, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        result_of(lora, tmp_path, *words)
    monkeypatch.setattr(lora, "measure", common.measure)
    result, _ = result_of(lora, tmp_path, *words)
    assert result["untrained"] and result["memory"]["inference"]


@pytest.mark.parametrize("damage", ["torn", "code", "other settings", "other rows"])
def test_an_unusable_checkpoint_is_named_and_the_run_starts_afresh(
    damage, models, reviews, tmp_path, monkeypatch, capsys
):
    words = [*rows_flags(models, reviews), "--max_steps", 6, "--batch_size", 16]
    whole, _ = result_of(lora, tmp_path / "whole", *words)
    saved = common.save_checkpoint

    def stop(*args):
        saved(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        result_of(lora, tmp_path / "a", *words, "--save_every", 3)
    monkeypatch.setattr(common, "save_checkpoint", saved)
    [path] = (tmp_path / "a").glob("*.checkpoint")
    state = torch.load(path, weights_only=True)
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "code":
        import pickle

        path.write_bytes(pickle.dumps(copy.deepcopy))
    else:
        kept = json.loads(state["run"])
        place, key = (0, "warmup") if damage == "other settings" else (4, "train_sha256")
        kept[place][key] = 0
        torch.save(state | {"run": json.dumps(kept)}, path)
    capsys.readouterr()
    again, _ = result_of(lora, tmp_path / "a", *words)
    out = capsys.readouterr().out
    assert f"{path.name}: not usable" in out and "continuing" not in out
    assert again["curve"] == whole["curve"] and again["metrics"] == whole["metrics"]


def test_kill_9_loses_nothing(models, reviews, tmp_path):
    """A process killed without a word, twice, ends as one that was left alone."""
    words = [*rows_flags(models, reviews), "--max_steps", 40, "--batch_size", 8]
    whole, path = result_of(lora, tmp_path / "whole", *words)
    command = [sys.executable, ROOT / "lora.py", *words, "--save_every", 1, "--out", tmp_path / "b"]
    for _ in range(2):
        alone = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: two threads sum in another order
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, env=alone)
        for _ in range(600):
            found = list((tmp_path / "b").glob("*.checkpoint"))
            if found or process.poll() is not None:
                break
            time.sleep(0.05)
        process.kill()
        process.wait()
    again, other = result_of(lora, tmp_path / "b", *words, "--save_every", 1)
    for key in ("curve", "metrics", "test_examples"):
        assert again[key] == whole[key], key
    assert weights(other) == weights(path)
