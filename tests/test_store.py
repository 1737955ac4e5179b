"""What runs leave on disk: results, adapters that PEFT exchanges with us, exact checkpoints."""

import base64
import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    EVERY,
    WORDS,
    batch_of,
    ended,
    oracle,
    ready,
    result_of,
    rows_flags,
    text_flags,
    weights,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import baseline
import common
import lora
import qlora
import sparse_lora
from harness import store

ROOT = Path(__file__).parents[1]
OUTCOME = ("curve", "metrics", "test_examples", "parameters", "report")


@pytest.fixture(autouse=True)
def count_again(monkeypatch):
    monkeypatch.setattr(common, "LATEST_COSTS", common.LatestCosts())


@torch.no_grad()
def logits_of(base, batch):
    base.model.eval()
    return common.forward(base, batch)


def raising(error):
    def function(*_):
        raise error

    return function


def start(*command, **options):
    """A process that runs a script with one thread, as here: two threads sum in another order."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams, **options)


# ------------------------------------------------------------------------------------ result file


@pytest.mark.parametrize("name", EVERY)
def test_result_file_says_what_ran(name, models, reviews, tmp_path):
    module, flags = EVERY[name]
    line = [*rows_flags(models, reviews), *flags, "--max_steps", 6, "--heldout", 20]
    result, path = result_of(module, tmp_path, *line)
    text = path.read_text()
    assert text.count("\n") == 1 and "/" not in text.replace("/s", "").split('"environment"')[0]
    assert result["schema"] == 3 and result["seed"] == 0 and not result["untrained"]
    model = Path(line[3]).name
    assert path.name == f"reviews-{result['name']}-{model}-lr{result['lr']:g}-seed0.json"
    sizes, scores = result["data"], result["metrics"]
    assert sizes["test"] == sizes["official"] + 20 and sizes["train"] + sizes["dev"] <= 120 - 20
    bits = np.frombuffer(base64.b64decode(result["test_examples"]["correct"]), np.uint8)
    right = np.unpackbits(bits)[: sizes["test"]]
    assert right.mean() == pytest.approx(scores["test"]["accuracy"])
    official = right[: sizes["official"]].mean()
    assert official == pytest.approx(scores["official"]["accuracy"])
    assert [step for step, *_ in result["curve"]] == [1, 2, 3, 4, 5, 6]
    with safe_open(path.with_suffix("") / "adapter_model.safetensors", "pt") as file:
        [(key, text)] = file.metadata().items()  # two would come in random order
        tensors = [file.get_tensor(name) for name in file.keys()]
    assert key == "trained_on" and json.loads(text)["classes"] == ["0", "1"]
    assert result["parameters"]["trainable"] == sum(tensor.numel() for tensor in tensors)
    files = [file.stat().st_size for file in path.with_suffix("").iterdir()]
    assert result["disk"]["adapter"] == sum(files)
    assert result["settings"].get("targets") is None and result["settings"]["dev_samples"] is None
    assert result["flops"]["total"] == pytest.approx(6 * result["flops"]["step"])


def test_blocks_of_running_text_keep_their_losses(models, text_dir, tmp_path):
    result, _ = result_of(lora, tmp_path, *text_flags(models, text_dir), "--max_steps", 2)
    nll, scored = (np.array(result["test_examples"][key]) for key in ("nll", "scored"))
    assert len(nll) == len(scored) == result["data"]["test"]
    perplexity = result["metrics"]["test"]["mlm_perplexity"]
    # Stored with three decimals: a block's loss is dozens.
    assert np.exp(nll.sum() / scored.sum()) == pytest.approx(perplexity, rel=1e-4)


def test_a_cost_that_a_library_cannot_measure_is_left_out(
    models, reviews, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(common, "count_flops", lambda *_: torch.nn.Linear(2, 2)(torch.zeros(3)))
    result, _ = result_of(lora, tmp_path, *rows_flags(models, reviews), "--max_steps", 2)
    assert "flops: not measured (RuntimeError" in capsys.readouterr().out
    assert result["flops"] == {} and result["memory"] and result["disk"]


@pytest.mark.parametrize("flags", [["--max_steps", 2], ["--epochs", 0]])
def test_a_crash_while_measuring_loses_nothing(flags, models, reviews, tmp_path, monkeypatch):
    """Scores and adapter are there, no half file; the same command adds the costs."""
    line = [*rows_flags(models, reviews), *flags]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lora, "measure", raising(KeyboardInterrupt))
        result_of(lora, tmp_path, *line)
    [path] = tmp_path.glob("*.json")
    part, adapter = json.loads(path.read_text()), weights(path)
    assert part["memory"] == {} and not list(tmp_path.rglob("*.tmp"))
    result, _ = result_of(lora, tmp_path, *line)
    assert result["metrics"]["test"] == part["metrics"]["test"] and weights(path) == adapter
    assert result["memory"]["inference"] and result["untrained"] == ("--epochs" in flags)


@pytest.mark.parametrize("name", ["result", "adapter", "checkpoint"])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    name, models, reviews, tmp_path, monkeypatch, capfd
):
    replace = Path.replace

    def full(path, target):
        if {"result": "seed0.json", "adapter": "adapter_model"}.get(name, name) in str(target):
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    line = [*rows_flags(models, reviews), "--max_steps", 4, "--save_every", 2, "--out", tmp_path]
    code, error = ended(capfd, lora, *line)
    assert code == 1 and "No space left on device" in error and f"cannot write the {name}" in error
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.glob("*.json"))


CONTENTS = ["", "{", "[]", "{}", '{"settings": 3}', "[" * 10**5, '{"a": ' * 900 + "1" + "}" * 900]


@pytest.mark.parametrize("content", [*CONTENTS, "pipe"], ids=range(len(CONTENTS) + 1))
def test_a_file_in_the_way_is_named(content, models, reviews, tmp_path, capfd):
    line = [*rows_flags(models, reviews), "--max_steps", 1, "--out", tmp_path]
    [path] = lora.main([*map(str, line)])
    path.unlink()
    os.mkfifo(path) if content == "pipe" else path.write_text(content)
    code, error = ended(capfd, lora, *line)
    assert code == 2 and path.name in error and "--force" in error
    assert content == "pipe" or path.read_text() == content


def test_links_that_were_planted_receive_nothing(models, reviews, tmp_path, monkeypatch, capfd):
    line = [*rows_flags(models, reviews), "--max_steps", 2, "--save_every", 1, "--force"]
    path = result_of(lora, tmp_path / "first", *line)[1]
    mine, folder = tmp_path / "mine.txt", tmp_path / "out" / path.stem
    mine.write_text("mine")
    folder.mkdir(parents=True)
    machine = store.zlib.crc32(store.platform.node().encode())
    guess = f"{{}}.{machine:x}-{os.getpid()}.guess.tmp"
    for name in ("{}.json", "{}.tmp", "{}.checkpoint", "{}/adapter_model.safetensors", guess):
        (folder.parent / name.format(path.stem)).symlink_to(mine)
    code, error = ended(capfd, lora, *line, "--out", folder.parent)
    assert code == 2 and "seed0.checkpoint cannot be read; remove it" in error
    (folder.parent / f"{path.stem}.checkpoint").unlink()
    with monkeypatch.context() as patch:  # a guessed name: files are created exclusively
        patch.setattr(store.secrets, "token_hex", lambda _: "guess")
        code, error = ended(capfd, lora, *line, "--out", folder.parent)
    assert code == 1 and "File exists" in error
    [written] = lora.main([*map(str, line), "--out", str(folder.parent)])
    assert mine.read_text() == "mine" and not written.is_symlink() and weights(written)
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path / "first")
    code, error = ended(capfd, lora, *line, "--out", folder.parent)
    assert code == 2 and f"{folder} is a link" in error


def test_other_data_and_another_global_batch_are_another_run(
    models, reviews, tmp_path, monkeypatch, capfd
):
    shutil.copytree(reviews, tmp_path / "my")
    line = [*rows_flags(models, tmp_path / "my"), "--max_steps", 1, "--out", tmp_path / "out"]
    [path] = lora.main([*map(str, line)])
    assert lora.main([*map(str, line)]) == [] and "exists already" in capfd.readouterr().out
    result = json.loads(path.read_text())
    monkeypatch.setattr(lora, "train", None)
    path.write_text(json.dumps(result | {"environment": {"processes": 2}}))
    code, error = ended(capfd, lora, *line)
    assert code == 2 and "examples a step was 64, is now 32" in error
    path.write_text(json.dumps(result))
    shutil.copy(tmp_path / "my" / "test.parquet", tmp_path / "my" / "train.parquet")
    store.files_sha256.cache_clear()
    code, error = ended(capfd, lora, *line)
    assert code == 2 and "data files" in error and "--name" in error and "--force" in error


# --------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", ["distilbert", "bert", "gpt2", "llama"])
@pytest.mark.parametrize("name", ["lora", "hira"])
def test_peft_adapters_load_here(name, kind, models, reviews, tmp_path):
    """PEFT makes one, with its own start and a stirred B; ours gives PEFT's logits."""
    peft, module = oracle("peft"), EVERY[name][0]
    run, data, base, method = ready(module, tmp_path, *rows_flags(models, reviews, kind))
    batch = batch_of(data)
    auto = transformers.AutoModelForSequenceClassification
    theirs = auto.from_pretrained(run.model, num_labels=2, dtype=torch.float32)
    theirs.config.pad_token_id = data.pad_id
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
        expected = theirs.eval()(input_ids=batch.ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert (ours - before).abs().max() > 1e-3


def test_pruned_ranks_load_in_peft_and_here(models, reviews, tmp_path):
    peft = oracle("peft")
    line = [*rows_flags(models, reviews), "--structure", "rank", "--max_steps", 12, "--lr", 0.05]
    run, data, base, method = ready(sparse_lora, tmp_path, *line)
    sparse_lora.train(run, data, base, method)
    store.save_adapter(run, data, base, method)
    ranks = method.peft["rank_pattern"]
    assert sum(ranks.values()) == 4 * 8 // 2 and min(ranks.values()) >= 1
    batch, ours = batch_of(data), logits_of(base, batch_of(data))
    auto = transformers.AutoModelForSequenceClassification
    theirs = auto.from_pretrained(run.model, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(theirs, run.path.with_suffix("")).eval()
    with torch.no_grad():
        expected = theirs(input_ids=batch.ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    again, _, fresh, method = ready(sparse_lora, tmp_path, *line)
    again.eval_only = run.path.with_suffix("")
    store.load_adapter(again, fresh, method)
    torch.testing.assert_close(logits_of(fresh, batch), ours)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_eval_only_scores_what_the_run_scored(
    name, task, models, reviews, text_dir, tmp_path, capsys
):
    """Seed, lr, data, lengths and the method's flags come from the result file beside it."""
    module, flags = EVERY[name]
    line = rows_flags(models, reviews)
    if task == "mlm":
        line = text_flags(models, text_dir, "bert", "")
    folders = [*map(str, line[:-2])]
    line += [*flags, "--max_steps", 4, "--seeds", 3, "--lr", 0.004, "--train_samples", 40]
    line += [] if module is baseline else ["--rank", 4]
    [path] = module.main([*map(str, line), "--out", str(tmp_path)])
    shown = capsys.readouterr().out.splitlines()[-2]
    assert "accuracy: dev" in shown or "perplexity: dev" in shown
    folder = str(path.with_suffix(""))
    module.main([*folders, "--eval_only", folder, "--out", str(tmp_path / "nothing")])
    assert capsys.readouterr().out.splitlines()[-1] == shown
    assert not (tmp_path / "nothing").exists()


@pytest.fixture(scope="module")
def saved(models, reviews, tmp_path_factory):
    """(flags, folder of a LoRA adapter) of one short run."""
    line = [*rows_flags(models, reviews), "--max_steps", 2]
    [path] = lora.main([*map(str, line), "--out", str(tmp_path_factory.mktemp("saved"))])
    return line, path.with_suffix("")


def edit(folder, to, tensors=None, **fields):
    """A copy of an adapter's folder, without result file, with other config fields or tensors."""
    to.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (to / "adapter_config.json").write_text(json.dumps(fields.get("whole", config)))
    contents = load_file(folder / "adapter_model.safetensors")
    (tensors or (lambda contents: None))(contents)
    save_file(contents, to / "adapter_model.safetensors")
    return to


def put(key, value):
    return lambda contents: contents.update({f"base_model.model.{key}": torch.tensor(value)})


LAYER, BIAS = "distilbert.transformer.layer.0.attention.q_lin", "classifier.bias"
RANKS, ALPHAS = {LAYER: 10**9}, {LAYER: 2 * 10**9}
HUGE, OURS = {"rank_pattern": RANKS, "alpha_pattern": ALPHAS}, "not one of ours"
FAULTS = {  # what is changed in the folder, what the line names
    "no tensor": (lambda contents: contents.popitem(), {}, "1 tensors missing"),
    "one more tensor": (put("extra", [0.0]), {}, "1 unexpected"),
    "another shape": (put(BIAS, [0.0] * 3), {}, "[3] in the file, [2] in this"),
    "NaN": (put(BIAS, [0.0, torch.nan]), {}, f"{BIAS} holds integers, NaN or numbers above"),
    "infinity": (put(BIAS, [0.0, torch.inf]), {}, "NaN or numbers above 10,000"),
    "huge weights": (put(f"{LAYER}.lora_A.weight", [[1e30] * 32] * 8), {}, "above 10,000"),
    "integers": (put(BIAS, [0, 1]), {}, "holds integers"),
    "another rank": (None, {"r": 4}, "change --rank"),
    "rank in words": (None, {"r": "8"}, "its config says r '8', and this run 8"),
    "another alpha": (None, {"lora_alpha": 8}, "change --alpha"),
    "another method": (None, {"peft_type": "HIRA"}, "change the script"),
    "a list": (None, {"whole": []}, "one is missing, or is another kind of file"),
    "rsLoRA": (None, {"use_rslora": True}, "use_rslora"),
    "aLoRA": (None, {"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "PiSSA": (None, {"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
    "foreign ranks": (None, {"rank_pattern": {"q_lin": 4}}, OURS),
    "foreign alphas": (None, {"alpha_pattern": {"q_lin": 4}}, OURS),
    "ranks of text": (None, {"rank_pattern": {LAYER: "4"}}, OURS),
    "a list of ranks": (None, {"rank_pattern": [{}]}, OURS),
    "a huge rank": (None, HUGE, OURS),
    "a huge alpha": (None, {"alpha_pattern": {LAYER: 10**400}}, OURS),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_eval_only_is_strict(fault, saved, tmp_path, capfd):
    line, folder = saved
    tensors, fields, named = FAULTS[fault]
    spoiled = edit(folder, tmp_path / "spoiled", tensors, **fields)
    code, error = ended(capfd, lora, *line, "--eval_only", spoiled)
    assert code == 2 and "--eval_only" in error and named in error


def test_eval_only_wants_the_base_that_was_trained_on(saved, models, tmp_path, capfd):
    line, folder = saved
    shutil.copytree(folder, tmp_path / "copy")
    line = [*line, "--eval_only", tmp_path / "copy"]
    code, error = ended(capfd, lora, *line, "--model", models("distilbert", vocab_size=60))
    assert code == 2 and "another base" in error
    code, error = ended(capfd, qlora, *line, "--nf4_kernel", "torch")
    assert code == 2 and "in other bits" in error
    code, error = ended(capfd, lora, *line, "--eval_only", tmp_path)
    assert code == 2 and "wanted: adapter_model.safetensors" in error


def test_a_foreign_adapter_on_a_4_bit_base_is_told(saved, tmp_path, capsys):
    line, folder = saved
    foreign = edit(folder, tmp_path / "foreign")  # as PEFT writes it: no hash of the base
    qlora.main([*map(str, line), "--nf4_kernel", "torch", "--eval_only", str(foreign)])
    assert "scored on the base in nf4" in capsys.readouterr().out


CONTRADICTIONS = {
    "--seeds was [0], is now [1]": ["--seeds", 1],
    "--lr was [0.002], is now [0.5]": ["--lr", 0.5],
    "--lr was [0.002], is now": ["--search", 3],
    "--max_length was 24, is now 20": ["--max_length", 20],
    "--train_samples was None, is now 30": ["--train_samples", 30],
    "--rank was 8, is now 2": ["--rank", 2],
    "--dataset was reviews, is now demo": ["--dataset", "demo"],
}


@pytest.mark.parametrize("named", CONTRADICTIONS)
def test_a_flag_that_contradicts_the_adapters_result_is_refused(named, saved, capfd):
    line, folder = saved
    code, error = ended(capfd, lora, *line[:4], "--eval_only", folder, *CONTRADICTIONS[named])
    assert code == 2 and "not what its result file says" in error and named in error


STRANGE = {  # settings in a stranger's result file, what the line names
    "argument --rank: 'a' is not a whole number": {"rank": "a"},
    "argument --rank: ": {"rank": {}},
    "--model was @/etc/passwd, is now": {"model": "@/etc/passwd"},
    "argument --targets: ['q_lin', '--export', 'x']": {"targets": ["q_lin", "--export", "x"]},
    "--train_samples was 9, is now 9": {"train_samples": "9"},
    "argument --heldout: 'True' is not a whole number": {"heldout": True},
}


def test_without_its_result_an_adapter_has_no_dev_score(saved, tmp_path, monkeypatch, capfd):
    """Dev examples of another seed may have been trained on."""
    line, folder = saved
    shutil.copytree(folder, tmp_path / "copy")
    lora.main([*map(str, line), "--eval_only", str(tmp_path / "copy")])
    shown = capfd.readouterr().out
    assert "accuracy: test 0." in shown and ": dev" not in shown
    monkeypatch.chdir(tmp_path)
    result = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    for named, settings in STRANGE.items():
        changed = result | {"settings": result["settings"] | settings | {"export": "x", "out": 3}}
        Path("copy.json").write_text(json.dumps(changed))
        code, error = ended(capfd, lora, *line[:4], "--eval_only", "copy")
        assert code == 2 and named in error and not Path("x").exists()


# ------------------------------------------------------------------------------- names of classes


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """named(*names) -> a folder of the same examples, whose classes have these names by number."""
    import datasets

    def write(*names):
        folder = tmp_path_factory.mktemp("named")
        for split, first, last in (("train", 0, 120), ("test", 120, 154)):
            noise = [f"{WORDS[i % 7]} {WORDS[7 + i % 11]}" for i in range(first, last)]
            columns = {"text": [f"{['awful', 'great'][i % 2]} {n}" for i, n in enumerate(noise)]}
            columns["label"] = [names.index(sorted(names)[i % 2]) for i in range(len(noise))]
            data = datasets.Dataset.from_dict(columns)
            data = data.cast_column("label", datasets.ClassLabel(names=names))
            data.to_parquet(folder / f"{split}.parquet")
        return folder

    return write


def test_a_trained_head_is_read_by_the_names_of_its_classes(models, named, tmp_path, capfd):
    """Adapter and export of neg, pos score data of pos, neg as their own; in capitals, too."""
    ours, turned, other = named("neg", "pos"), named("POS", "NEG"), named("bad", "good")
    line = [*rows_flags(models, ours)[2:], "--lr", 0.02, "--max_steps", 30]
    export = ["--export", tmp_path / "whole"]
    whole, path = result_of(lora, tmp_path / "out", "--dataset", ours, *line, *export)
    score = whole["metrics"]["test"]["accuracy"]
    assert score > 0.9  # so that turned numbers would give less than 0.1
    shutil.copytree(path.with_suffix(""), tmp_path / "copy")
    scoring = [*line, "--eval_only", tmp_path / "copy"]
    for data in (ours, turned):
        lora.main([*map(str, scoring), "--dataset", str(data)])
        assert f"accuracy: test {score:.4f}" in capfd.readouterr().out
    refusal = "its head has the classes neg, pos; data: bad, good"
    code, error = ended(capfd, lora, *scoring, "--dataset", other)
    assert code == 2 and refusal in error
    result_of(lora, tmp_path / "numbers", "--dataset", named("1", "2"), *line)  # names, too
    [folder] = (path for path in (tmp_path / "numbers").iterdir() if path.is_dir())
    shutil.copytree(folder, tmp_path / "numbered")
    scoring = [*line, "--eval_only", tmp_path / "numbered"]
    lora.main([*map(str, scoring), "--dataset", str(named("2", "1"))])
    assert float(capfd.readouterr().out.split("accuracy: test ")[1].split()[0]) > 0.9
    code, error = ended(capfd, lora, *scoring, "--dataset", named("0", "1"))
    assert code == 2 and "its head has the classes 1, 2; data: 0, 1" in error

    line += ["--model", tmp_path / "whole", "--epochs", 0]
    for data in (ours, turned):
        out = tmp_path / data.name
        result, _ = result_of(lora, out, *line, "--dataset", data, "--export", out / "again")
        assert result["metrics"]["test"]["accuracy"] == score
        config = json.loads((out / "again" / "config.json").read_text())
        names = [*config["id2label"].values()]
        assert names == result["data"]["classes"] and [*map(str.lower, names)] == ["neg", "pos"]
    code, error = ended(capfd, lora, *line, "--dataset", other, "--out", tmp_path)
    assert code == 2 and f"whole: {refusal}" in error
    # Trained on, a head of other classes is drawn as a body without a head has it.
    transformers.AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "body")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "whole").save_pretrained(
        tmp_path / "body"
    )
    heads, line = [], [*line[:-2], "--dataset", other]
    for model in ("whole", "body"):
        base = ready(lora, tmp_path / "new", *line, "--model", tmp_path / model)[2]
        heads.append([base.model.get_parameter(name) for name in base.head_names])
        assert ("has other classes and is replaced" in capfd.readouterr().out) == (model == "whole")
    assert all(torch.equal(a, b) for a, b in zip(*heads, strict=True)) and len(heads[0]) == 4


def test_a_head_without_names_is_taken_by_number(models, named, tmp_path):
    model = models("distilbert", "SequenceClassification")
    results = []
    for data in (named("neg", "pos"), named("bad", "good")):
        line = [*rows_flags(models, data)[2:], "--model", model, "--epochs", 0, "--dataset", data]
        results.append(result_of(lora, tmp_path / data.name, *line)[0]["metrics"]["test"])
    assert results[0] == results[1]


# ------------------------------------------------------------------------------------ checkpoints


PRUNE = ["--structure", "rank"]
STOPS = [  # how it is trained, further flags, where it is stopped, in which call, by what
    *((name, [], "gradient", 5, signal.SIGINT) for name in EVERY),  # the first: before training
    ("lora", [], "gradient", 5, signal.SIGTERM),
    ("full", [], "gradient", 8, signal.SIGINT),
    ("prune", PRUNE, "gradient", 8, signal.SIGINT),
    ("full", [], "score", 1, signal.SIGINT),
    ("prune", PRUNE, "score", 1, signal.SIGINT),
    ("full", [], "count_memory", 1, signal.SIGINT),
    ("prune", PRUNE, "count_memory", 1, signal.SIGINT),
]


@pytest.mark.parametrize("name, flags, where, call, kind", STOPS)
def test_stopped_and_continued_equals_never_stopped(
    name, flags, where, call, kind, models, reviews, tmp_path, monkeypatch, capfd
):
    """Bit for bit, with dropout in base and adapter: curve, scores and what is saved."""
    module, more = EVERY[name]
    line = [*rows_flags(models, reviews), *more, *flags, "--max_steps", 7, "--batch_size", 16]
    line += ["--base_dropout", 0.1] + (["--dropout", 0.1] if module is not baseline else [])
    whole, path = result_of(module, tmp_path / "whole", *line)
    monkeypatch.setattr(common, "LATEST_COSTS", common.LatestCosts())
    plain, calls = {key: getattr(common, key) for key in ("gradient", where)}, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == call and where == "gradient":
            os.kill(os.getpid(), kind)
        elif len(calls) == call:
            common.fail("stopped at step 7", 128 + kind)  # as harness/__init__.py has it
        return plain[where](*args)

    monkeypatch.setattr(common, where, stopping)
    out, step = tmp_path / "stopped", call - 1 if where == "gradient" else 7
    code, error = ended(capfd, module, *line, "--out", out)
    assert code == 128 + kind and f"stopped at step {step}" in error
    assert list(out.glob("*.checkpoint"))
    assert bool(list(out.glob("*.json"))) == (where == "count_memory")  # which has the scores
    steps = []
    monkeypatch.setattr(common, where, plain[where])
    count = lambda *args: steps.append(1) or plain["gradient"](*args)  # noqa: E731
    monkeypatch.setattr(common, "gradient", count)
    again, other = result_of(module, out, *line)
    assert f"continuing at step {step}" in capfd.readouterr().out
    assert len(steps) == 7 - step + 3  # the look before training and the memory's two
    assert all(again[key] == whole[key] for key in OUTCOME)
    assert weights(other) == weights(path) and not list(out.glob("*.checkpoint"))


def test_ctrl_c_after_training_is_one_line(models, reviews, tmp_path):
    """As a user types it: scores without costs are left, and the same command continues."""
    line = [*rows_flags(models, reviews), "--max_steps", 1, "--out", tmp_path / "o"]
    line = [*map(str, line)]
    code = "import os, signal, sys, common, lora\n"
    code += "common.count_memory = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
    code += f"sys.argv = ['lora.py', *{line!r}]\nlora.main()\n"
    process = start("-c", code)
    error = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGINT
    assert error.count("\n") == 1 and "the same command continues" in error
    [path] = (tmp_path / "o").glob("*.json")
    assert json.loads(path.read_text())["memory"] == {}
    assert "continuing at step 1" in start("lora.py", *line).communicate()[0]
    assert json.loads(path.read_text())["memory"]["train"]


def moment(state, name, change):
    """Change one value of the optimizer's state of the second tensor."""
    state["optimizer"][1][name] = change(state["optimizer"][1][name])


DAMAGES = {  # what is done to a checkpoint's state, what the line names
    "torn": (None, "cannot be read; remove it"),
    "code": (None, "cannot be read; remove it"),
    "a list": (None, "it is no checkpoint"),
    "epochs": (lambda s: s["run"].update(epochs=5), "--epochs was 5, is now 3"),
    "processes": (lambda s: s["run"].update({"examples a step": 32}), "was 32, is now 16"),
    "examples": (lambda s: s["run"].update({"data files": "0"}), "data files was 0"),
    "tensors": (lambda s: s["run"].update(lr=torch.zeros(3)), "--lr was tensor([0., 0., 0.])"),
    "shape": (lambda s: s["model"].update({BIAS: torch.zeros(3)}), "its model"),
    "NaN": (lambda s: s["model"].update({BIAS: torch.tensor([0, torch.nan])}), "its model"),
    "integers": (lambda s: s["model"].update({BIAS: torch.ones(2, dtype=int)}), "its model"),
    "no tensor": (lambda s: s["model"].pop(BIAS), "its model"),
    "no key": (lambda s: s.pop("optimizer"), "its optimizer"),
    "no state": (lambda s: s["optimizer"].clear(), "its optimizer"),
    "less state": (lambda s: s["optimizer"].update({1: {}}), "its optimizer"),
    "more state": (lambda s: s["optimizer"][1].update(more=1), "its optimizer"),
    "other state": (lambda s: moment(s, "exp_avg_sq", lambda t: t - 1), "its optimizer"),
    "infinity": (lambda s: moment(s, "exp_avg", lambda t: t / 0), "its optimizer"),
    "renamed": (lambda s: s["optimizer"][1].update(a=s["optimizer"][1].pop("exp_avg")), "its opti"),
    "negative step": (lambda s: moment(s, "step", lambda t: t - 8), "its optimizer"),
    "early step": (lambda s: moment(s, "step", lambda t: t - 1), "its history"),
    "steps": (lambda s: moment(s, "step", lambda t: t.expand(3)), "its optimizer"),
    "step in words": (lambda s: moment(s, "step", str), "its optimizer"),
    "diverged": (lambda s: s["history"].update(diverged=True), "its history"),
    "far step": (lambda s: s["history"].update(step=10**9), "its history"),
    "far laps": (lambda s: s["history"].update(step=9, laps=[0.1] * 9), "its history"),
    "text": (lambda s: s["history"].update(curve=["a"]), "its history"),
}


@pytest.fixture(scope="module")
def stopped(models, reviews, tmp_path_factory):
    """(flags, the result of a whole run, the checkpoint of one that was stopped at step 3)."""
    line = [*rows_flags(models, reviews), "--max_steps", 6, "--batch_size", 16]
    folder = tmp_path_factory.mktemp("stopped")
    whole, _ = result_of(lora, folder / "whole", *line)
    save = common.save_checkpoint

    def stop(*args):
        save(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_checkpoint", stop)
        result_of(lora, folder / "part", *line, "--save_every", 3)
    [path] = (folder / "part").glob("*.checkpoint")
    return line, whole, path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(damage, stopped, tmp_path, capfd):
    """With --force the run starts afresh, and ends as if there had been no checkpoint."""
    line, whole, path = stopped
    change, named = DAMAGES[damage]
    state, path = torch.load(path, weights_only=True), Path(shutil.copy(path, tmp_path))
    if change:
        change(state)
    torch.save([1] if damage == "a list" else state, path)
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "code":
        path.write_bytes(pickle.dumps(copy.deepcopy))
    content = path.read_bytes()
    code, error = ended(capfd, lora, *line, "--out", tmp_path)
    assert code == 2 and path.name in error and named in error
    assert path.read_bytes() == content and ("--force" in error or damage in ("torn", "code"))
    if damage == "epochs":
        again, _ = result_of(lora, tmp_path, *line, "--force")
        assert again["curve"] == whole["curve"] and again["metrics"] == whole["metrics"]


def test_kill_9_loses_nothing_and_two_at_once_end_right(models, reviews, tmp_path):
    """One is killed; then two continue, or one finds all done, and both end as if left alone."""
    line = [*rows_flags(models, reviews), "--max_steps", 40, "--batch_size", 8]
    whole, path = result_of(lora, tmp_path / "whole", *line)
    out = tmp_path / "killed"
    line = ["lora.py", *line, "--save_every", 1, "--out", out]
    process = start(*line)
    while not list(out.glob("*.checkpoint")) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    shown = [process.communicate() for process in [start(*line), start(*line)]]
    assert "continuing at step" in shown[0][0] + shown[1][0] and shown[0][1] == shown[1][1] == ""
    [other] = out.glob("*.json")
    again = json.loads(other.read_text())
    assert all(again[key] == whole[key] for key in OUTCOME[:3]) and weights(other) == weights(path)
    assert [file for file in out.iterdir() if file.is_file()] == [other]


def test_what_a_killed_process_left_is_removed_and_a_running_ones_stays(tmp_path):
    """Of the same result and machine alone: another result's may be of another machine."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    machine = store.zlib.crc32(store.platform.node().encode())
    names = {number: f"a.{machine:x}-{number}.0.tmp" for number in (dead.pid, os.getppid())}
    others = [f"a.0-{dead.pid}.0.tmp", f"b.{machine:x}-{dead.pid}.0.tmp"]
    for name in (*names.values(), *others):
        (tmp_path / name).touch()
    with store.replacing(tmp_path / "a.json", "result") as path:
        path.write_text("whole")
    left = {"a.json", names[os.getppid()], *others}
    assert {file.name for file in tmp_path.iterdir()} == left


def test_a_result_that_cannot_be_printed_is_not_complete(tmp_path):
    """Half of a surrogate pair in a stranger's file would end later messages with a traceback."""
    path = tmp_path / "result.json"
    for name, complete in (("\\ud83d\\ude00", True), ("\\ud800", False)):
        path.write_text(f'{{"settings": {{"name": "{name}"}}, "environment": {{}}, "data": {{}}}}')
        assert bool(store.read_result(path)) == complete
