"""A run stopped anywhere and continued by the same command ends as if it had never stopped, bit for bit."""

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import sentences, write_rows

import common
import hira
import lora
import qlora
import sparse_lora

ROOT = Path(__file__).resolve().parent.parent
EVERY = {"lora": (lora, []), "hira": (hira, []), "qlora": (qlora, ["--nf4_backend", "torch"]), "prune": (sparse_lora, []),
         "penalty": (sparse_lora, ["--penalty", "0.3", "--sparsity", "0"]),
         "rank": (sparse_lora, ["--structure", "rank"]),
         "contextual": (sparse_lora, ["--mode", "contextual", "--dense_layers", "0"])}


def flags(models, reviews, out):
    """108 rows in batches of 16: 7 steps an epoch, 14 in all; dropout is on, so random numbers matter."""
    return ["--dataset", reviews, "--model", models("distilbert", dropout=0.1, attention_dropout=0.1), "--epochs", 2,
            "--batch_size", 16, "--max_length", 24, "--lr", 3e-3, "--out", out]


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """One thread, no timing of the inference, and imported modules out of the garbage collector's sight."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    monkeypatch.setattr(common, "time_inference", lambda *_: {})
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(models, reviews, tmp_path_factory):
    """whole(name) -> the result file of a run that never stopped, made once."""
    made = {}

    def get(name):
        if name not in made:
            module, own = EVERY[name]
            [made[name]] = module.main([*flags(models, reviews, tmp_path_factory.mktemp("whole")), *own])
        return made[name]
    return get


def outcome(path):
    """What must be equal: metrics, every point of the curve, what the method says, adapter bytes."""
    result = json.loads(Path(path).read_text())
    return (result["metrics"], result["curve"], result["correct"], result["method_info"], result["parameters"],
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


@pytest.mark.parametrize("name, step", [("lora", 1), ("lora", 13), *((name, step) for name in EVERY for step in (3, 7, 10))])
def test_stopped_and_continued_equals_never_stopped(models, reviews, whole, tmp_path, monkeypatch, capsys, name, step):
    """Step 3: within an epoch, on the pruning schedule's slope; 7: at its end; 10: in the second epoch, pruned."""
    module, own = EVERY[name]
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
    assert outcome(parts) == outcome(whole(name))
    assert not checkpoint.exists()


def test_save_every_changes_nothing(models, reviews, whole, tmp_path):
    saved = lora.main([*flags(models, reviews, tmp_path / "saved"), "--save_every", 2])[0]
    assert outcome(whole("lora")) == outcome(saved)
    assert not list((tmp_path / "saved").glob("*.checkpoint"))


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:500]),
                                    lambda file: file.write_bytes(b""), lambda file: file.write_text("not a checkpoint")])
def test_a_damaged_checkpoint_is_named_and_the_run_starts_afresh(models, reviews, whole, tmp_path, monkeypatch, capsys, damage):
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
    assert outcome(parts) == outcome(whole("lora"))


def test_a_checkpoint_of_other_settings_is_not_used(models, reviews, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            lora.main(flags(models, reviews, tmp_path))
    lora.main([*flags(models, reviews, tmp_path), "--lr", 1e-3])
    assert "starting afresh" in capsys.readouterr().out


def test_a_run_whose_scoring_was_too_large_continues_with_a_smaller_one(models, reviews, whole, tmp_path, monkeypatch, capsys):
    """As the message says; the batch that scoring takes changes nothing that was trained."""
    words = [*flags(models, reviews, tmp_path), "--save_every", 13]

    def hungry(model, data, run):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(common, "score", hungry)
        lora.main(words)
    assert stop.value.code == 1 and "--eval_batch_size" in capsys.readouterr().err
    [path] = lora.main([*words, "--eval_batch_size", 8])
    assert "continuing at step 13" in capsys.readouterr().out
    assert outcome(path)[-1] == outcome(whole("lora"))[-1] and outcome(path)[2] == outcome(whole("lora"))[2]


def test_a_checkpoint_of_other_rows_is_not_used(models, tmp_path, monkeypatch, capsys):
    """The folder is the same, its rows are not: half a run on each would be neither."""
    words = [*flags(models, tmp_path / "rows", tmp_path / "out"), "--batch_size", 8]
    for seed in (1, 2):
        for split in ("train", "test"):
            write_rows(tmp_path / "rows", split, dict(zip(("text", "label"), sentences(60, seed), strict=True)))
        if seed == 1:
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                stop_at(patch, 3, signal.SIGTERM)
                lora.main(words)
    lora.main(words)
    out = capsys.readouterr().out
    assert "other settings" in out and "starting afresh" in out and "continuing" not in out


def test_ctrl_c_while_scoring_is_one_line(models, reviews, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "score", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stopped:
        lora.main(flags(models, reviews, tmp_path))
    assert stopped.value.code == 130
    error = capsys.readouterr().err.strip()
    assert "stopped" in error and error.count("\n") == 0
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("data", ["rows on dev", "masked tokens", "many steps"])
@pytest.mark.parametrize("step", [7, 9])
def test_the_whole_curve_continues(models, reviews, text_dir, tmp_path, monkeypatch, data, step):
    """dev_loss after each epoch also where the run stopped just then; masks of the right epoch; means over several steps."""
    flags = {"rows on dev": ["--dataset", reviews, "--model", models("distilbert"), "--epochs", 3, "--split", "dev",
                             "--batch_size", 16],
             "masked tokens": ["--dataset", "wikitext2", "--data_dir", text_dir, "--model", models("distilbert", "MaskedLM"),
                               "--epochs", 2, "--batch_size", 4, "--grad_accum", 2, "--train_samples", 56],
             "many steps": ["--dataset", reviews, "--model", models("distilbert"), "--max_steps", 100, "--batch_size", 2]}[data]
    flags += ["--max_length", 16, "--lr", 3e-3, "--out"]
    [path] = lora.main([*flags, tmp_path / "whole"])
    with monkeypatch.context() as patch:
        stop_at(patch, step, signal.SIGTERM)
        with pytest.raises(SystemExit):
            lora.main([*flags, tmp_path / "parts"])
    [parts] = lora.main([*flags, tmp_path / "parts"])
    one, two = outcome(path), outcome(parts)
    assert len(one[1]) >= 14 and (data != "rows on dev" or sum("dev_loss" in point for point in one[1]) == 2)
    assert one[1] == two[1]
    assert one == two


def test_seconds_go_on_where_they_stopped(models, reviews, tmp_path, monkeypatch):
    """A second a step on a clock of our own: stopped twice, still 14 seconds, 7 an epoch, and the same rates."""
    now, backward = [0.0], common.backward
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])

    def slow(*args):
        now[0] += 1
        return backward(*args)
    monkeypatch.setattr(common, "backward", slow)
    for step, number in ((3, signal.SIGINT), (4, signal.SIGTERM)):  # after 3, and 4 later at the epoch's end
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, step, number)
            lora.main(flags(models, reviews, tmp_path / "parts"))
        now[0] += 5000
    for out in ("parts", "whole"):
        [path] = lora.main(flags(models, reviews, tmp_path / out))
        times = json.loads(path.read_text())["time"]
        assert times["train_seconds"] == 14 and times["epoch_seconds"] == [7, 7]
        assert times["samples_per_second"] == 2 * 108 / 14 and times["step_ms"]["p90"] == 1000


def test_stopped_in_the_last_step(models, reviews, whole, tmp_path, monkeypatch, capsys):
    """There is no step left to save for, but the signal is heard: no other seed is begun, and nothing is lost."""
    again = [*flags(models, reviews, tmp_path), "--seeds", 0, 1]
    with monkeypatch.context() as patch:
        stop_at(patch, 14, signal.SIGINT)
        with pytest.raises(SystemExit) as stopped:
            lora.main(again)
    assert stopped.value.code == 130 and not list(tmp_path.glob("*seed1*"))
    assert capsys.readouterr().err.count("\n") == 1
    lora.main(again)
    [path] = tmp_path.glob("*seed0.json")
    assert outcome(path) == outcome(whole("lora"))


def test_the_checkpoint_stays_until_the_result_is_written(models, reviews, whole, tmp_path, monkeypatch):
    """Ctrl-C, or a full disk, while scoring must not cost the training: the run is not done before its result file is."""
    again, backward, steps = [*flags(models, reviews, tmp_path), "--save_every", 5], common.backward, []
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common, "score", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        lora.main(again)
    monkeypatch.setattr(common, "backward", lambda *args: steps.append(1) or backward(*args))
    [path] = lora.main(again)
    assert outcome(path) == outcome(whole("lora")) and len(steps) <= 4, f"{len(steps)} steps trained again"
    assert not list(tmp_path.glob("*.checkpoint"))


def test_a_second_signal_stops_at_once(models, reviews, tmp_path, monkeypatch, capsys):
    backward = common.backward

    def twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return backward(*args)
    monkeypatch.setattr(common, "backward", twice)
    with pytest.raises(SystemExit) as stopped:
        lora.main(flags(models, reviews, tmp_path))
    error = capsys.readouterr().err
    assert stopped.value.code == 130 and error.count("\n") == 1 and "continue" in error
    assert not list(tmp_path.glob("*.json"))


def test_signals_are_handed_back(models, reviews, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    lora.main(flags(models, reviews, tmp_path))
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_checkpoint_is_data_not_code(models, reviews, whole, tmp_path, capsys):
    """A pickle that would run something is named and left alone."""
    class Mark:
        def __reduce__(self):
            return Path.touch, (tmp_path / "read",)
    args = lora.parse_args(lora.__doc__, lora.__file__, lora.add_args, flags(models, reviews, tmp_path))
    checkpoint = common.checkpoint_path(next(common.runs(args)))
    checkpoint.write_bytes(pickle.dumps(Mark()))
    [path] = lora.main(flags(models, reviews, tmp_path))
    assert checkpoint.name in capsys.readouterr().out and not (tmp_path / "read").exists()
    assert outcome(path) == outcome(whole("lora"))


KILLER = """
# Import once, then fork a process per kill: it runs the command until the checkpoint is renewed and a random moment more.
import json, os, random, signal, sys, time
from pathlib import Path
import torch, transformers, datasets, lora
torch.set_num_threads(1)
words, folder, kills = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
draw = random.Random(0)

def saved():
    return [path.stat().st_mtime_ns for path in folder.glob("*.checkpoint")]
for _ in range(kills):
    before, pid = saved(), os.fork()
    if pid == 0:
        lora.main(words)
        os._exit(1)  # too late: it is done
    while before == saved() and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.003)
    time.sleep(draw.random() * 0.1)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_loses_nothing(models, reviews, tmp_path, kills):
    """Killed as processes, finished in this one, against a run that was never touched: one thread each."""
    words = list(map(str, [*flags(models, reviews, tmp_path / "killed"), "--save_every", 1, "--epochs", 8 + 4 * kills]))
    killer = subprocess.run([sys.executable, "-c", KILLER, json.dumps(words), tmp_path / "killed", str(kills)], cwd=ROOT,
                            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    assert killer.returncode == 0, killer.stderr
    assert killer.stdout.count("continuing at step") == kills - 1
    checkpoints = list((tmp_path / "killed").glob("*.checkpoint"))
    assert len(checkpoints) == 1 and not list((tmp_path / "killed").glob("*.json"))
    [killed] = lora.main(words)
    [whole] = lora.main([*words, "--out", tmp_path / "whole"])
    assert outcome(killed) == outcome(whole)
    assert not [path for path in (tmp_path / "killed").rglob("*") if path.suffix in (".tmp", ".checkpoint")]
