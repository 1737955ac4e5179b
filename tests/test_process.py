"""The process around a run: out of memory, signals, the hub, quiet libraries, model folders."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from conftest import ended, ready, rows_flags
from safetensors.torch import load_file

import common
import lora
import qlora
from harness import rows
from harness.models import configure
from harness.process import explain_out_of_memory, fail, say, stop_signals

ROOT = Path(__file__).parents[1]
RUN = Namespace(batch_size=32, grad_accum=1, max_length=128, device="cpu")
CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
FULL = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(CPU)]


@pytest.mark.parametrize("error", FULL)
def test_out_of_memory_is_one_line_that_says_what_is_smaller(error, capfd):
    with pytest.raises(SystemExit) as stop, explain_out_of_memory(RUN):
        raise error
    said = capfd.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1
    assert "--batch_size 16 with --grad_accum 2" in said and "--checkpointing" in said


def test_no_line_holds_what_a_terminal_would_act_on(capfd):
    with pytest.raises(SystemExit):
        fail("--model \x1b]0;title\x07: a\nb \u202ec \ud800 " + "d" * 9999)
    say("\x1b[2Ja", 3)
    shown, error = capfd.readouterr()
    assert "--model �]0;title�: a�b �c � ddd" in error and len(error) < 2100
    assert shown == "�[2Ja 3\n" and error.count("\n") == 1


def test_other_errors_pass(capfd):
    for error in (RuntimeError("shapes cannot be multiplied"), ValueError("x")):
        with pytest.raises(type(error)), explain_out_of_memory(RUN):
            raise error
    assert capfd.readouterr().err == ""


PLACES = [(common, "gradient", "--batch_size 16"), (common, "score", "--eval_batch_size 16")]
PLACES += [(lora, "LoRALinear", "a smaller --rank"), (qlora, "NF4Linear", "a smaller --model")]


@pytest.mark.parametrize("module, name, less", PLACES)
def test_a_run_needs_too_much(module, name, less, models, reviews, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, name, mock.Mock(side_effect=RuntimeError(CPU)))
    line = [*rows_flags(models, reviews), "--max_steps", 1]
    code, error = ended(capfd, qlora if module is qlora else lora, *line, "--out", tmp_path)
    assert code == 1 and f"out of memory on cpu; these need less: {less}" in error
    assert not list(tmp_path.glob("*.json"))


def test_a_second_signal_stops_at_once_and_handlers_are_handed_back(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, stop_signals() as got:
        os.kill(os.getpid(), signal.SIGTERM)
        assert got == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.value.code == 128 + signal.SIGINT and "at once" in capfd.readouterr().err
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def process(tmp_path, *line, **environment):
    """(status, stdout, stderr) of lora.py started as a user would, without a hub's cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    kept = {k: v for k, v in kept.items() if "proxy" not in k.lower()}
    done = subprocess.run(
        [sys.executable, ROOT / "lora.py", *map(str, line), "--out", tmp_path / "out"],
        cwd=tmp_path,
        timeout=90,
        capture_output=True,
        text=True,
        env=kept | {"HF_HOME": str(tmp_path / "hf")} | environment,
    )
    return done.returncode, done.stdout, done.stderr


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    """A stand-in for torch presses it; every script sets the handler before it imports torch."""
    stand_in = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    for name in ("torch", "numpy", "safetensors"):  # whichever is imported first
        (tmp_path / f"{name}.py").write_text(stand_in)
    status, out, error = process(tmp_path, PYTHONPATH=str(tmp_path))
    assert (status, out) == (130, "") and error == (
        "lora.py: error: stopped; the same command continues\n"
    )
    for script in ("hira", "qlora", "sparse_lora", "contextual_lora", "hybrid", "baseline"):
        first = next(line for line in (ROOT / f"{script}.py").open() if line.startswith("import"))
        assert first.startswith("import harness  #")


def test_a_hub_that_cannot_be_reached_is_one_line_and_soon(tmp_path):
    """The libraries' own retries take minutes; the limit of 90 s is theirs not to be reached."""
    with socket.socket() as closed:  # taken, and not listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        hub = f"http://127.0.0.1:{closed.getsockname()[1]}"
        line = ["--dataset", "sst2", "--data_dir", "nowhere"]
        status, out, error = process(tmp_path, *line, HF_ENDPOINT=hub)
    assert status == 2 and out == "" and error.count("\n") == 1, error
    for name in ("distilbert-base-uncased", "--model", "--data_dir", "--dataset demo"):
        assert name in error


def test_an_unreachable_hub_is_asked_once_and_briefly(monkeypatch):
    asked = []

    def silent(address, timeout):
        asked.append((address, timeout))
        raise TimeoutError

    monkeypatch.setattr(rows.socket, "create_connection", silent)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:8443")
    for key in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(key, raising=False)
    rows.offline_if_unreachable.cache_clear()
    rows.offline_if_unreachable()
    rows.offline_if_unreachable()
    assert asked == [(("hub.example", 8443), 3)] and os.environ["HF_HUB_OFFLINE"] == "1"


def test_only_our_own_lines_reach_the_terminal(models, reviews, tmp_path):
    line = [*rows_flags(models, reviews), "--max_steps", 2]
    status, out, error = process(tmp_path, *line)
    assert status == 0 and error == ""
    starts = [
        "reviews, seed 0: ",
        "classes (train/dev/test): 0 ",
        "tokens per example: median ",
        "lora: ",
        "lora lr 0.002 seed 0: accuracy",
        "trained 2 steps in ",
    ]
    lines = [line for line in out.splitlines() if "% of all steps" not in line]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def index(folder, content):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def pickle(folder, name):
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()
    edit_json(folder / "config.json", transformers_weights=name)


def tear(path):
    path.write_bytes(path.read_bytes()[:500])


def copied_code(folder, **fields):
    edit_json(
        folder / "config.json", auto_map={"AutoConfig": "code.C", "AutoModel": "code.M"}, **fields
    )
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]})


OUTSIDE, PICKLED = "../model.safetensors", "pytorch_model.bin"
INDEX = "model.safetensors.index.json"
DAMAGES = {  # what is done to a model's folder, what the line names; whether --plan sees it, too
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safe", False),
    "torn": (lambda f: tear(f / "model.safetensors"), "cannot load it", False),
    "pickled": (lambda f: pickle(f, "adapter_model.bin"), "no file named model.safe", False),
    "outside": (lambda f: index(f, {"weight_map": {"x": OUTSIDE}}), f"names {OUTSIDE}", False),
    "bin shards": (lambda f: index(f, {"weight_map": {"x": PICKLED}}), f"names {PICKLED}", False),
    "torn index": (lambda f: index(f, []), "is not a list of files", False),
    "deep index": (lambda f: (f / INDEX).write_text("[" * 10**5), "not a list of files", False),
    "pipe index": (lambda f: os.mkfifo(f / INDEX), "is not a list of files", False),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("token*")], "tokenizer", False),
    "adapter": (lambda f: (f / "adapter_config.json").touch(), "folder holds an adapter", True),
    "code": (lambda f: copied_code(f, model_type="new"), "no usable config there", True),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "no usable config there", True),
    "a file": (lambda f: [shutil.rmtree(f), f.write_text("x")], "no such folder", True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_model_folders(damage, models, reviews, tmp_path, monkeypatch, capfd):
    """Each is one line; no code in the folder runs, though the user would say yes."""
    folder, (change, named, seen) = tmp_path / "model", DAMAGES[damage]
    shutil.copytree(models("distilbert"), folder)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    line = [*rows_flags(models, reviews), "--model", folder, "--out", tmp_path / "out"]
    for plan in [[], ["--plan"]] if seen else [[]]:
        code, error = ended(capfd, lora, *line, *plan)
        assert code == 2 and f"--model {folder}" in error and named in error
    assert not [*(tmp_path / "out").rglob("*")] and not (tmp_path / "ran").exists()


def test_a_known_model_runs_no_code_of_its_folder(models, reviews, tmp_path):
    """Nor are the attention kernels loaded that its config names."""
    folder = tmp_path / "model"
    shutil.copytree(models("distilbert"), folder)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    copied_code(folder, attn_implementation="kernels-community/flash-attn2")
    line = [*rows_flags(models, reviews), "--model", folder]
    base = ready(lora, tmp_path / "out", *line)[2]
    assert base.model.config._attn_implementation == "sdpa" and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["flaubert", "bart", "opt", "esm", "distilbert"])
def test_no_dropout_of_the_base_is_left(kind):
    """LayerDrop is dropout, too: a dropped layer's adapter would get no gradient."""
    config = transformers.AutoConfig.for_model(kind)
    names = [name for name in config.to_dict() if "drop" in name and name != "token_dropout"]
    for name in names:
        setattr(config, name, 0.3)
    for rate in (0.0, 0.1):
        after = configure(config, rate, 0, ["a", "b"])
        assert names and all(
            getattr(after, name) == (0.0 if "layerdrop" in name else rate) for name in names
        )
        assert getattr(after, "token_dropout", False) in (False, True)
