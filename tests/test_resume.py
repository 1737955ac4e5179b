"""A run stopped anywhere and continued by the same command ends as if it had never stopped, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common
import hira
import lora
import qlora
import sparse_lora

ROOT = Path(__file__).resolve().parent.parent
EVERY = {"lora": (lora, []), "hira": (hira, []), "qlora": (qlora, ["--nf4_backend", "torch"]), "prune": (sparse_lora, []),
         "penalty": (sparse_lora, ["--penalty", "0.3", "--sparsity", "0"]),
         "rank": (sparse_lora, ["--structure", "rank"]), "contextual": (sparse_lora, ["--mode", "contextual"])}


def flags(models, reviews, out):
    """108 rows in batches of 16: 7 steps an epoch, 14 in all; dropout is on, so random numbers matter."""
    return ["--dataset", reviews, "--model", models("distilbert", dropout=0.1, attention_dropout=0.1), "--epochs", 2,
            "--batch_size", 16, "--max_length", 24, "--lr", 3e-3, "--out", out]


def outcome(path):
    """What must be equal: metrics, losses by step, adapter bytes."""
    result = json.loads(Path(path).read_text())
    return (result["metrics"], [(p["step"], p["train_loss"]) for p in result["curve"] if p["step"] % 7 == 0],
            (Path(path).with_suffix("") / "adapter_model.safetensors").read_bytes())


def stop_at(monkeypatch, step, number):
    """Send this process a signal in the middle of step `step`."""
    original, seen = common.backward, []

    def counting(*args, **kwargs):
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)
    monkeypatch.setattr(common, "backward", counting)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("step", [3, 7, 10])
def test_stopped_and_continued_equals_never_stopped(models, reviews, tmp_path, monkeypatch, capsys, name, step):
    """Step 3: within an epoch; 7: at its end; 10: in the second one, on the pruning schedule's slope."""
    module, own = EVERY[name]
    whole = module.main([*flags(models, reviews, tmp_path / "whole"), *own])[0]
    again = [*flags(models, reviews, tmp_path / "parts"), *own]
    number = signal.SIGTERM if step == 7 else signal.SIGINT
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        with pytest.raises(SystemExit) as stopped:
            module.main(again)
    assert stopped.value.code == 128 + number
    assert f"stopped at step {step} of 14; the same command continues" in capsys.readouterr().err
    (checkpoint,) = (tmp_path / "parts").glob("*.checkpoint")
    assert not list((tmp_path / "parts").glob("*.json"))
    parts = module.main(again)[0]
    assert f"continuing at step {step}" in capsys.readouterr().out
    metrics, losses, adapter = outcome(parts)
    assert (metrics, adapter) == (outcome(whole)[0], outcome(whole)[2])
    assert not checkpoint.exists()


def test_save_every_changes_nothing(models, reviews, tmp_path):
    whole = lora.main(flags(models, reviews, tmp_path / "whole"))[0]
    saved = lora.main([*flags(models, reviews, tmp_path / "saved"), "--save_every", 2])[0]
    assert outcome(whole)[::2] == outcome(saved)[::2]
    assert not list((tmp_path / "saved").glob("*.checkpoint"))


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:500]),
                                    lambda file: file.write_bytes(b""), lambda file: file.write_text("not a checkpoint")])
def test_a_damaged_checkpoint_is_named_and_the_run_starts_afresh(models, reviews, tmp_path, monkeypatch, capsys, damage):
    again = flags(models, reviews, tmp_path / "parts")
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            lora.main(again)
    (checkpoint,) = (tmp_path / "parts").glob("*.checkpoint")
    damage(checkpoint)
    parts = lora.main(again)[0]
    said = capsys.readouterr().out
    assert checkpoint.name in said and "starting afresh" in said and "continuing" not in said
    assert outcome(parts) == outcome(lora.main(flags(models, reviews, tmp_path / "whole"))[0])


def test_a_checkpoint_of_other_settings_is_not_used(models, reviews, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            lora.main(flags(models, reviews, tmp_path))
    lora.main([*flags(models, reviews, tmp_path), "--lr", 1e-3])
    assert "starting afresh" in capsys.readouterr().out


def test_ctrl_c_while_scoring_is_one_line(models, reviews, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "score", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stopped:
        lora.main(flags(models, reviews, tmp_path))
    assert stopped.value.code == 130
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert not list(tmp_path.glob("*.json"))


def kill_and_continue(models, reviews, folder, kills):
    """Start lora.py as a process, kill -9 it at random moments, and at last let it finish; returns the outcome."""
    command = [sys.executable, "lora.py", *map(str, flags(models, reviews, folder)), "--save_every", "1"]
    rng = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = {path: path.stat().st_mtime_ns for path in Path(folder).glob("*.checkpoint")}
        while process.poll() is None and before == {  # until it trains, then a random moment more
                path: path.stat().st_mtime_ns for path in Path(folder).glob("*.checkpoint")}:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = Path(folder).glob("*.json")
    assert not list(Path(folder).glob("*.tmp"))
    return outcome(path)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_loses_nothing(models, reviews, tmp_path, kills):
    whole = lora.main(flags(models, reviews, tmp_path / "whole"))[0]
    assert kill_and_continue(models, reviews, tmp_path / "killed", kills)[::2] == outcome(whole)[::2]
