"""Wrong input of every kind: one line that names it and the way out, status 2, and nothing written or overwritten."""

import errno
import gc
import json
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import sentences, tiny_tokenizer, write_rows
from safetensors.torch import load, save_file

import common
import hira
import lora
import qlora
import sparse_lora

ROOT = Path(__file__).parents[1]
SCRIPTS = {"lora": lora, "hira": hira, "qlora": qlora, "sparse_lora": sparse_lora, "common": common}


@pytest.fixture(scope="module", autouse=True)
def light():
    """One thread, and imported modules out of the garbage collector's sight: each run collects twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def good(models, reviews, tmp_path, monkeypatch):
    """A command line that works, writing into out/; each test spoils one thing of it."""
    monkeypatch.setattr(common, "time_inference", lambda *_: {})
    return ["--dataset", reviews, "--model", models("distilbert"), "--max_length", 24, "--max_steps", 2, "--out",
            tmp_path / "out"]


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refused(capfd, module, words, named, status=2):
    """Run main, which must end with this status and one line on stderr that names all of `named`, and change no file."""
    out = Path(words[len(words) - 1 - list(words)[::-1].index("--out") + 1])
    before = contents(out)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main(list(words))
    error = capfd.readouterr().err
    assert stop.value.code == status, error
    assert error.count("\n") == 1 and error.endswith("\n") and "Traceback" not in error, error
    assert len(error) < 700, f"a line of {len(error)} characters: {error}"
    for name in named:
        assert name in error, f"{name!r} is not in: {error}"
    assert contents(out) == before
    return error


# ------------------------------------------------------------------------------------------------ flags


FLAGS = [  # script, flags beside the good ones, what the line must name
    ("lora", "--dataset sst3", ["--dataset sst3", "imdb", "wikitext2", "demo"]),
    ("lora", "--rank 0", ["--rank", "'0'", "whole number"]), ("hira", "--rank -3", ["--rank", "'-3'"]),
    ("qlora", "--rank 2.5", ["--rank", "'2.5'"]), ("sparse_lora", "--rank eight", ["--rank", "'eight'"]),
    ("lora", "--lr 0", ["--lr", "'0'", "positive"]), ("hira", "--lr -1", ["--lr", "'-1'", "positive"]),
    ("qlora", "--lr nan", ["--lr", "'nan'"]), ("sparse_lora", "--lr abc", ["--lr", "'abc'"]),
    ("common", "--lr inf", ["--lr", "'inf'"]), ("common", "--head_lr 0", ["--head_lr", "'0'"]),
    ("lora", "--seeds -1", ["--seeds", "'-1'"]), ("lora", "--seeds 0 one", ["--seeds", "'one'"]),
    pytest.param("lora", "--seeds " + "9" * 400, ["--seeds"], id="lora---seeds 400 digits"),
    ("common", "--epochs 0", ["--epochs", "'0'"]), ("hira", "--max_steps 0", ["--max_steps"]),
    ("lora", "--batch_size 0", ["--batch_size"]), ("lora", "--eval_batch_size -1", ["--eval_batch_size"]),
    ("lora", "--grad_accum 1.5", ["--grad_accum", "'1.5'"]), ("lora", "--warmup 1", ["--warmup", "'1'"]),
    ("lora", "--weight_decay -0.1", ["--weight_decay"]), ("lora", "--dropout 1", ["--dropout", "'1'"]),
    ("lora", "--alpha 0", ["--alpha"]), ("lora", "--train_samples 0", ["--train_samples"]),
    ("lora", "--eval_samples none", ["--eval_samples", "'none'"]), ("lora", "--save_every 0", ["--save_every"]),
    ("lora", "--max_length 3", ["--max_length 3", "64"]), ("lora", "--max_length 65", ["--max_length 65", "64"]),
    ("sparse_lora", "--sparsity 1.0", ["--sparsity", "'1.0'"]), ("sparse_lora", "--sparsity -0.1", ["--sparsity"]),
    ("sparse_lora", "--penalty -1", ["--penalty"]), ("sparse_lora", "--mode both", ["--mode", "prune", "contextual"]),
    ("sparse_lora", "--structure column", ["--structure", "rank"]),
    ("sparse_lora", "--mode contextual --targets lin1", ["--targets", "lin1", "contextual"]),
    ("sparse_lora", "--estimator svd", ["--estimator svd", "--mode contextual"]),
    ("sparse_lora", "--dense_layers 0", ["--dense_layers 0", "--mode contextual"]),
    ("sparse_lora", "--dense_tokens none", ["--dense_tokens none", "--mode contextual"]),
    ("sparse_lora", "--mode contextual --penalty 0.1", ["--penalty 0.1", "--mode prune"]),
    ("sparse_lora", "--mode contextual --structure rank", ["--structure rank", "--mode prune"]),
    ("qlora", "--nf4_backend fp4", ["--nf4_backend", "torch"]),
    ("lora", "--targets nowhere", ["--targets nowhere", "k_lin", "lin1", "lin2", "out_lin", "q_lin", "v_lin"]),
    ("qlora", "--targets q_lin nowhere", ["--targets nowhere", "k_lin"]),
    ("hira", "--targets q_lin,nowhere", ["--targets nowhere", "k_lin"]),
    ("sparse_lora", "--targets ''", ["--targets"]), ("lora", "--targets ,", ["--targets"]),
    ("lora", "--targets", ["--targets"]),
    ("lora", "--device nowhere", ["--device nowhere"]), ("hira", "--device cuda:99", ["--device cuda:99"]),
    ("lora", "--device meta", ["--device meta"]), ("lora", "--device hpu", ["--device hpu"]),
    ("lora", "--device mps:7", ["--device mps:7"]), ("lora", "--device mps", ["--device mps"]),
    ("lora", "--precision fp8", ["--precision", "fp32", "bf16"]), ("common", "--split train", ["--split", "test", "dev"]),
    ("lora", "--name a/b", ["--name", "'a/b'"]), ("common", "--name ../x", ["--name"]), ("lora", "--name 'a b'", ["--name"]),
    ("lora", "--lerning_rate 1", ["--lerning_rate", "--help"]), ("hira", "--alpha 16", ["--alpha"]),
    ("common", "--rank 8", ["--rank"]), ("lora", "--full", ["--full"]), ("lora", "--epo 3", ["--epo"]),
    ("lora", "stray", ["stray"]), ("lora", "--lr", ["--lr", "expected one argument"]),
    ("lora", "@nowhere.txt", ["nowhere.txt"]), ("hira", "@.", ["'.'"])]


@pytest.mark.parametrize("script, flags, named", FLAGS)
def test_flags(good, capfd, script, flags, named):
    import shlex
    if "cuda:99" in flags and not torch.cuda.is_available():
        named = [*named, "CUDA"]
    refused(capfd, SCRIPTS[script], [*good, *shlex.split(flags)], named)


@pytest.mark.parametrize("content", [b'--name "never closed\n', b"\xff\xfe\x00\x81"])
def test_a_file_of_flags_that_cannot_be_read(good, tmp_path, capfd, content):
    (tmp_path / "args.txt").write_bytes(content)
    refused(capfd, lora, [*good, f"@{tmp_path / 'args.txt'}"], ["args.txt"])


def test_a_rank_that_no_machine_can_hold(good, capfd):
    """Larger than both sides of every layer: nothing is low about it."""
    for rank, named in ((10**13, "whole number"), (2 * 10**9, "wider than 64"), (65, "wider than 64")):
        refused(capfd, lora, [*good, "--rank", rank], ["--rank", str(rank), named])


def test_nothing_to_train(models, text_dir, tmp_path, capfd):
    """Head only, on a checkpoint that brings its whole head."""
    refused(capfd, common, ["--dataset", "wikitext2", "--data_dir", text_dir, "--model", models("bert", "MaskedLM"),
                            "--max_length", 16, "--out", tmp_path], ["--full"])


def test_contextual_mode_names_the_architectures_it_knows(models, reviews, tmp_path, capfd):
    refused(capfd, sparse_lora, ["--dataset", reviews, "--model", models("gpt2"), "--max_length", 16, "--mode", "contextual",
                                 "--out", tmp_path], ["contextual", "gpt2", "distilbert", "llama"])


def test_architectures_without_default_targets_are_told_their_layers(reviews, tmp_path, capfd):
    """GPT-NeoX is in no table: the line lists what can be named."""
    from transformers import GPTNeoXConfig, GPTNeoXModel
    GPTNeoXModel(GPTNeoXConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                               max_position_embeddings=64)).save_pretrained(tmp_path / "neox")
    tiny_tokenizer("llama").save_pretrained(tmp_path / "neox")
    refused(capfd, lora, ["--dataset", reviews, "--model", tmp_path / "neox", "--max_length", 16, "--out", tmp_path / "out"],
            ["--targets", "gpt_neox", "query_key_value", "dense_h_to_4h"])


# ------------------------------------------------------------------------------------------------ data


TEXTS, LABELS = sentences(40, 0)


def write(folder, *, test="test", train="train", text="text", label="label", **changes):
    """A good folder of 40 + 40 rows, but for the changes: train_text=…, test_label=… and other names."""
    for name, key in ((train, "train"), (test, "test")):
        if name:
            columns = {text: changes.get(f"{key}_text", TEXTS), label: changes.get(f"{key}_label", LABELS)}
            write_rows(folder, name, {name: values for name, values in columns.items() if name})


def rewritten(**changes):
    return lambda folder: write(folder, **changes)


def spoiled(name, content):
    """A good folder in which one file has other content."""
    def make(folder):
        write(folder)
        (folder / name).write_bytes(content)
    return make


def csv(folder, texts, test=TEXTS):
    folder.mkdir(parents=True)
    for name, column in (("train", texts), ("test", test)):
        rows = "".join(f"{text},{label}\n" for text, label in zip(column, LABELS, strict=True))
        (folder / f"{name}.csv").write_text(f"text,label\n{rows}")


def half_numbers(folder):
    csv(folder, list(range(40)), test=["the film"] * 40)


DATA = {  # what is wrong: (how to make it, what the line must name)
    "empty folder": (lambda folder: folder.mkdir(parents=True), []),
    "only a text file": (lambda folder: folder.mkdir(parents=True) or (folder / "README.md").write_text("hello"), []),
    "column of another name": (rewritten(text="review"), ["review", "text", "label"]),
    "no label column": (rewritten(label=None), ["label"]),
    "null text": (rewritten(train_text=[*TEXTS[:-1], None]), ["row 39", "train"]),
    "null text in test": (rewritten(test_text=[None, *TEXTS[1:]]), ["row 0", "test"]),
    "numbers as text": (rewritten(train_text=list(range(40)), test_text=list(range(40))), ["row 0", "train"]),
    "labels as words": (rewritten(train_label=["good" if i % 2 else "bad" for i in range(40)]), ["'bad'", "0, 1"]),
    "labels as digits in quotes": (rewritten(train_label=[str(i % 2) for i in range(40)]), ["'0'", "0, 1"]),
    "labels as floats": (rewritten(train_label=[float(i % 2) for i in range(40)]), ["0.0", "0, 1"]),
    "labels as booleans": (rewritten(train_label=[i % 2 == 0 for i in range(40)]), ["True", "0, 1"]),
    "a label that is null": (rewritten(train_label=[*LABELS[:-1], None]), ["label"]),
    "labels with a gap": (rewritten(train_label=[2 * (i % 2) for i in range(40)], test_label=[0] * 40), ["0, 2", "gap"]),
    "labels from 1": (rewritten(train_label=[1 + i % 2 for i in range(40)], test_label=[1] * 40), ["1, 2"]),
    "negative labels": (rewritten(train_label=[-(i % 2) for i in range(40)], test_label=[0] * 40), ["-1, 0"]),
    "one class": (rewritten(train_label=[0] * 40, test_label=[0] * 40), ["two"]),
    "a class in test alone": (rewritten(test_label=[i % 3 for i in range(40)]), ["0, 1, 2", "train"]),
    "hidden test labels": (rewritten(test_label=[-1] * 40), ["-1"]),
    "one example": (rewritten(train_text=TEXTS[:1], train_label=LABELS[:1]), []),
    "nine examples": (rewritten(train_text=TEXTS[:9], train_label=LABELS[:9]), ["9 training rows"]),
    "one text over and over": (rewritten(train_text=["the film"] * 40), []),
    "no training rows": (rewritten(train_text=[], train_label=[]), []),
    "no test rows": (rewritten(test_text=[], test_label=[]), ["test"]),
    "no test split": (rewritten(test=None), ["test", "validation", "train"]),
    "no train split": (rewritten(train=None), ["train"]),
    "a CSV file that is half numbers": (half_numbers, ["Failed to parse string", "the film"]),
    "a CSV file that says None": (lambda folder: csv(folder, ["None", *TEXTS[1:]]), ["row 0", "train", "None, NA"]),
    "torn parquet": (spoiled("train.parquet", b"PAR1 and then nothing"), []),
    "empty parquet": (spoiled("test.parquet", b""), [])}


@pytest.mark.parametrize("case", DATA)
def test_data_folders(good, tmp_path, capfd, case):
    make, named = DATA[case]
    make(tmp_path / "films")
    refused(capfd, lora, [*good, "--dataset", tmp_path / "films"], ["--dataset films", *named])


def lines(folder, **splits):
    """A wikitext2 folder; a split given as None is left out."""
    for name in ("train", "validation", "test"):
        texts = splits.get(name, TEXTS)
        if texts is not None:
            write_rows(folder / "wikitext2", name, {splits.get("column", "text"): texts})


TEXT = {
    "no validation split": ({"validation": None}, ["validation"]), "no train split": ({"train": None}, ["train"]),
    "another column": ({"column": "page"}, ["page", "text"]), "null line": ({"test": [None, "the film"]}, ["row 0", "test"]),
    "blank training text": ({"train": ["", " ", "\n"]}, ["train"]), "blank test text": ({"test": ["", " "]}, ["test"]),
    "only unknown words": ({"test": ["<unk> <unk>", "<unk>"]}, ["test"])}


@pytest.mark.parametrize("case", TEXT)
@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_text_folders(models, tmp_path, monkeypatch, capfd, case, kind):
    monkeypatch.setattr(common, "time_inference", lambda *_: {})
    changes, named = TEXT[case]
    lines(tmp_path, **changes)
    model = models(kind, "MaskedLM" if kind == "distilbert" else "CausalLM")
    refused(capfd, lora, ["--dataset", "wikitext2", "--data_dir", tmp_path, "--model", model, "--max_length", 16,
                          "--max_steps", 1, "--out", tmp_path / "out"], named)


def test_a_known_data_set_that_is_nowhere(models, tmp_path, capfd):
    """Neither in --data_dir nor in the hub, which the tests never reach."""
    refused(capfd, hira, ["--dataset", "imdb", "--data_dir", tmp_path / "nowhere", "--model", models("distilbert"), "--out",
                          tmp_path / "out"], ["imdb", "nowhere", "--data_dir", "--dataset demo"])


def test_a_known_data_set_whose_folder_is_empty(models, tmp_path, capfd):
    (tmp_path / "sst2").mkdir()
    refused(capfd, lora, ["--dataset", "sst2", "--data_dir", tmp_path, "--model", models("distilbert"), "--max_length", 24,
                          "--out", tmp_path / "out"], ["--data_dir", "sst2"])


# ------------------------------------------------------------------------------------------------ models


def tensors_changed(change, name="model.safetensors"):
    def spoil(folder):
        tensors = load((folder / name).read_bytes())
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})
    return spoil


def config_changed(**changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
    return spoil


def truncated(name, keep=0.5):
    def spoil(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:int(len(whole) * keep)])
    return spoil


def without(*names):
    def spoil(folder):
        for name in names:
            (folder / name).unlink()
    return spoil


def pickled(folder):
    """Weights as a pickle that would leave a mark if it were ever read."""
    class Mark:
        def __reduce__(self):
            return Path.touch, (folder / "read",)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Mark()))
    (folder / "model.safetensors").unlink()


def torch_pickled(folder):
    """Weights that torch.load could read: still not safetensors."""
    torch.save(load((folder / "model.safetensors").read_bytes()), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remote_code(folder):
    """A configuration that wants its own Python file run."""
    (folder / "evil.py").write_text(f"open({str(folder / 'read')!r}, 'w')\nfrom transformers import DistilBertConfig as Evil\n")
    config_changed(model_type="evil", auto_map={"AutoConfig": "evil.Evil"})(folder)


MODELS = {
    "no weights": (without("model.safetensors"), ["SequenceClassification"]),
    "weights of a few bytes": (lambda folder: (folder / "model.safetensors").write_bytes(b"not a tensor"), []),
    "truncated weights": (truncated("model.safetensors"), []),
    "no config": (without("config.json"), ["config"]), "torn config": (truncated("config.json"), ["config"]),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), ["tokenizer"]),
    "torn tokenizer": (truncated("tokenizer.json"), ["tokenizer"]),
    "an architecture nobody knows": (config_changed(model_type="distilbird"), []),
    "a body tensor missing": (tensors_changed(lambda t: t.pop("transformer.layer.1.ffn.lin1.weight")), ["lin1.weight"]),
    "weights of another model": (tensors_changed(lambda t: [t.pop(key) for key in list(t) if "layer" in key]), ["layer"]),
    "other sizes than the config's": (config_changed(hidden_dim=48), []),
    "more layers than the weights": (config_changed(n_layers=3), ["layer.2"]),
    "fewer words than the tokenizer": (config_changed(vocab_size=7), []),
    "a pickle": (pickled, []), "a pickle of tensors": (torch_pickled, []), "code of its own": (remote_code, [])}


@pytest.mark.parametrize("case", MODELS)
def test_model_folders(good, models, tmp_path, capfd, case):
    spoil, named = MODELS[case]
    folder = tmp_path / "mine"
    shutil.copytree(models("distilbert"), folder)
    spoil(folder)
    refused(capfd, lora, [*good, "--model", folder], ["--model", "mine", *named])
    assert not (folder / "read").exists()  # nothing was executed


def test_a_vocabulary_that_is_too_small_for_the_tokenizer(good, models, tmp_path, capfd):
    """Weights and config agree, but the tokenizer is another model's: its ids lie outside the embeddings."""
    folder = tmp_path / "mine"
    shutil.copytree(models("distilbert", vocab_size=12), folder)
    refused(capfd, lora, [*good, "--model", folder], ["--model"])


def test_a_model_that_is_a_file(good, tmp_path, capfd):
    (tmp_path / "weights.bin").write_bytes(b"0")
    refused(capfd, lora, [*good, "--model", tmp_path / "weights.bin"], ["--model"])


def test_a_model_that_is_nowhere(good, capfd):
    refused(capfd, lora, [*good, "--model", "nobody/nothing-of-this-name"], ["nobody/nothing-of-this-name", "--model", "demo"])


def test_masked_lm_needs_a_mask_token(models, text_dir, tmp_path, capfd):
    folder = tmp_path / "mine"
    shutil.copytree(models("distilbert", "MaskedLM"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("mask_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused(capfd, lora, ["--dataset", "wikitext2", "--data_dir", text_dir, "--model", folder, "--max_length", 16, "--out",
                          tmp_path / "out"], ["--model", "mask token"])


def test_an_untied_missing_lm_head(models, text_dir, tmp_path, capfd):
    model = models("qwen2", tie_word_embeddings=False)
    refused(capfd, qlora, ["--dataset", "wikitext2", "--data_dir", text_dir, "--model", model, "--max_length", 16, "--out",
                           tmp_path], ["--model", "output embeddings"])


# ------------------------------------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def saved(models, reviews, tmp_path_factory):
    """A trained LoRA adapter's folder."""
    out = tmp_path_factory.mktemp("saved")
    [path] = lora.main(["--dataset", reviews, "--model", models("distilbert"), "--max_length", 24, "--max_steps", 2,
                        "--out", out])
    return path.with_suffix("")


def adapter_changed(change):
    return tensors_changed(change, "adapter_model.safetensors")


def first(tensors, part):
    return next(name for name in sorted(tensors) if part in name)


def pickled_adapter(folder):
    torch.save(load((folder / "adapter_model.safetensors").read_bytes()), folder / "adapter_model.safetensors")


ADAPTERS = {  # what is wrong: (how to spoil the folder, flags, what the line must name)
    "missing folder": (lambda folder: shutil.rmtree(folder), [], ["adapter_model.safetensors"]),
    "empty folder": (without("adapter_model.safetensors", "adapter_config.json"), [], ["adapter_model.safetensors"]),
    "no config": (without("adapter_config.json"), [], ["adapter_config.json"]),
    "torn config": (truncated("adapter_config.json"), [], ["adapter_config.json"]),
    "truncated": (truncated("adapter_model.safetensors"), [], ["adapter_model.safetensors"]),
    "truncated in its header": (truncated("adapter_model.safetensors", 0.01), [], ["adapter_model.safetensors"]),
    "a pickle": (pickled_adapter, [], ["adapter_model.safetensors"]),
    "other rank": (lambda folder: None, ["--rank", 4], ["8", "4", "--rank"]),
    "other alpha": (lambda folder: None, ["--alpha", 3], ["16", "3", "--alpha"]),
    "other targets": (lambda folder: None, ["--targets", "q_lin"], ["--targets"]),
    "more targets": (lambda folder: None, ["--targets", "q_lin,v_lin,out_lin"], ["--targets", "out_lin"]),
    "missing tensor": (adapter_changed(lambda t: t.pop(first(t, "lora_B"))), [], ["1 tensors missing", "lora_B"]),
    "missing head": (adapter_changed(lambda t: t.pop(first(t, "pre_classifier"))), [], ["1 tensors missing", "pre_classifier"]),
    "unexpected tensor": (adapter_changed(lambda t: t.update(more=torch.zeros(1))), [], ["1 unexpected", "more"]),
    "other shape": (adapter_changed(lambda t: t.update({first(t, "lora_A"): torch.zeros(4, 32)})), [], ["[4, 32]", "[8, 32]"])}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(good, saved, tmp_path, capfd, case):
    spoil, flags, named = ADAPTERS[case]
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    spoil(folder)
    refused(capfd, lora, [*good, "--eval_only", folder, *flags], ["--eval_only", *named])


@pytest.mark.parametrize("script", ["hira", "common", "sparse_lora"])
def test_adapters_of_another_script(good, saved, capfd, script):
    """A LoRA is no HiRA and no head; for Sparse LoRA, which saves a LoRA too, the rank decides."""
    flags = ["--rank", 2] if script == "sparse_lora" else []
    refused(capfd, SCRIPTS[script], [*good, "--eval_only", saved, *flags], ["--eval_only"])


def test_adapters_beside_other_bits(good, saved, tmp_path, capfd):
    """LoRA's and QLoRA's files look alike, but each was trained beside another weight."""
    refused(capfd, SCRIPTS["qlora"], [*good, "--eval_only", saved], ["--eval_only", "other bits", "the script"])
    [path] = SCRIPTS["qlora"].main([*good, "--out", tmp_path])
    capfd.readouterr()
    refused(capfd, lora, [*good, "--eval_only", path.with_suffix("")], ["--eval_only", "other bits", "the script"])


@pytest.mark.parametrize("flags", [["--no_double_quant"], ["--precision", "bf16"]])
def test_adapters_beside_four_other_bits(good, tmp_path, capfd, flags):
    """One scale in 32 bits or in 8, the base rounded to 16 bits first or not: W0 is another one each time."""
    [path] = qlora.main([*good, "--out", tmp_path])
    capfd.readouterr()
    refused(capfd, qlora, [*good, "--eval_only", path.with_suffix(""), *flags], ["--eval_only", "other bits"])


def test_adapters_of_another_base(good, models, saved, capfd):
    refused(capfd, lora, [*good, "--eval_only", saved, "--model", models("distilbert", activation="relu", n_heads=2, dim=32,
                                                                         seq_classif_dropout=0.1, hidden_dim=96)],
            ["--eval_only", "another base", "--model"])


def test_adapters_of_another_data_set(good, saved, tmp_path, capfd):
    """Three classes instead of two: the head has another shape."""
    write(tmp_path / "films", train_label=[i % 3 for i in range(40)])
    refused(capfd, lora, [*good, "--eval_only", saved, "--dataset", tmp_path / "films"], ["--eval_only", "[2", "[3"])


def test_a_good_adapter_scores_as_it_did(good, saved, capfd):
    """The same rows, the same score, and no file written: what the cases above differ from."""
    lora.main([*good, "--eval_only", saved])
    result = json.loads(saved.with_suffix(".json").read_text())
    out = capfd.readouterr().out
    assert f"accuracy {result['metrics']['accuracy']:.4f}" in out and f"loss {result['metrics']['loss']:.4f}" in out
    assert not contents(good[-1])


# ------------------------------------------------------------------------------------------------ result files


def path_of(good, module=lora):
    args = module.parse_args(module.__doc__, module.__file__, module.add_args, good)
    return next(common.runs(args)).path


@pytest.mark.parametrize("content, named", [
    (b"", ["--force"]), (b'{"schema": 1, "args": {"lr"', ["--force"]), (b"[]", ["--force"]), (b"null", ["--force"]),
    (b'{"schema": 1}', ["--force"]), (b'{"args": null}', ["--force"]), (b'{"args": [1, 2]}', ["--force"]),
    (b"\xff\xfe\x00", ["--force"])])
def test_result_files_that_are_in_the_way(good, capfd, content, named):
    path = path_of(good)
    path.write_bytes(content)
    refused(capfd, lora, good, [path.name, *named])


def test_other_settings_are_found_before_any_training(good, capfd, monkeypatch):
    """Of all seeds at once: not after the first one's hours."""
    lora.main([*good, "--seeds", 1])
    monkeypatch.setattr(lora, "load_data", lambda run: pytest.fail("went on to work"))
    refused(capfd, lora, [*good, "--seeds", 0, 1, "--lr", 0.5], ["--lr", "seed1", "--name", "--force"])


@pytest.mark.parametrize("flag", ["--model", "--dataset"])
def test_another_folder_of_the_same_name_is_another_run(good, models, tmp_path, capfd, flag):
    """Only the name of an absolute folder is on record, and a hash that tells it from its namesakes."""
    here, there = tmp_path / "a" / "same", tmp_path / "b" / "same"
    for folder in (here, there):
        shutil.copytree(good[good.index(flag) + 1], folder)
    [path] = lora.main([*good, flag, here])
    assert lora.main([*good, flag, here]) == [] and str(tmp_path) not in path.read_text()
    capfd.readouterr()
    refused(capfd, lora, [*good, flag, there], [f"{flag} folder", "other settings", "--name"])


def test_an_output_folder_that_is_a_file(good, tmp_path, capfd):
    (tmp_path / "out").write_text("mine")
    refused(capfd, lora, good, ["--out"])
    assert (tmp_path / "out").read_text() == "mine"
    refused(capfd, lora, [*good, "--out", tmp_path / "out" / "deeper"], ["--out"])


# ------------------------------------------------------------------------------------------------ faults on the way


def failing(error):
    def fail(*_, **__):
        raise error
    return fail


@pytest.mark.parametrize("where, name", [("safetensors.torch", "save_file"), ("pathlib.Path", "write_text")])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   OSError(errno.EROFS, "Read-only file system")])
def test_a_full_output_folder(good, capfd, monkeypatch, where, name, error):
    """At the end of a run, while the adapter or the result is written: one line, no result, no half-written file."""
    monkeypatch.setattr(f"{where}.{name}", failing(error))
    with pytest.raises(SystemExit) as stop:
        lora.main(good)
    line = capfd.readouterr().err
    assert stop.value.code == 1 and line.count("\n") == 1 and "--out" in line and error.strerror in line
    assert not [path for path in contents(good[-1]) if path.suffix in (".tmp", ".json")]


@pytest.fixture
def small_files():
    """Inside, no file can grow beyond a number of bytes: a real full disk, as far as the writer can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("place", ["save_result", "save_checkpoint"])
def test_a_disk_that_really_is_full(good, capfd, monkeypatch, small_files, place):
    """The libraries' own errors of a write that fails half-way, which are not all OSErrors."""
    function = getattr(common, place)

    def limited(*args):
        small_files(2048)
        return function(*args)
    monkeypatch.setattr(lora if place == "save_result" else common, place, limited)
    flags = [*good, "--save_every", 1]
    before = contents(good[-1])
    with pytest.raises(SystemExit) as stop:
        lora.main(flags)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    error = capfd.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "--out" in error, error
    assert {path.name for path in contents(good[-1]).keys() - before.keys()} <= {path_of(good).with_suffix(".checkpoint").name}


def test_force_keeps_the_old_result_until_the_new_one_is_whole(good, capfd, monkeypatch):
    """The new run fails while it is saved: the old file and the old adapter stay what they were, and stay together."""
    [path] = lora.main(good)
    old = contents(good[-1])
    write_text = Path.write_text

    def full(self, text, *more, **options):
        if "schema" in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(self, text, *more, **options)
    monkeypatch.setattr(Path, "write_text", full)
    refused(capfd, lora, [*good, "--force", "--lr", 0.01], ["--out"], status=1)
    assert contents(good[-1]) == old and path in old


@pytest.mark.parametrize("place", ["training", "scoring", "measuring"])
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a …"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory(good, capfd, monkeypatch, place, error):
    """One line that names batch size, accumulation, length and checkpointing."""
    forward = common.forward

    def hungry(model, batch):
        during = "training" if model.training else "scoring"
        if place == during or place == "measuring" and len(batch.ids) == 5:
            raise error
        return forward(model, batch)
    monkeypatch.setattr(common, "forward", hungry)
    if place == "measuring":
        monkeypatch.setattr(common, "time_inference", lambda model, data, run, dtype, rows: common.forward(
            model, common.fixed_batch(data, 5, 8)))
    refused(capfd, lora, good, ["out of memory", "--batch_size", "--grad_accum", "--max_length", "--checkpointing"], status=1)


def test_a_model_that_does_not_fit(good, capfd, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", failing(torch.OutOfMemoryError("CUDA out of memory. Tried to …")))
    refused(capfd, lora, good, ["out of memory", "--batch_size"], status=1)


def test_a_model_without_checkpointing(good, tmp_path, capfd):
    import transformers
    config = transformers.AlbertConfig(vocab_size=50, embedding_size=16, hidden_size=32, num_hidden_layers=1,
                                       num_attention_heads=4, intermediate_size=64, max_position_embeddings=40)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "albert")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "albert")
    words = [*good[:2], "--model", tmp_path / "albert", *good[4:], "--targets", "query"]
    lora.main([*words[:-4], "--out", tmp_path / "fine", "--targets", "query"])
    refused(capfd, lora, [*words, "--checkpointing"], ["--checkpointing", "albert"])


def test_other_runtime_errors_are_not_called_out_of_memory(good, monkeypatch):
    monkeypatch.setattr(common, "forward", failing(RuntimeError("shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="multiplied"):
        lora.main(good)


@pytest.mark.parametrize("script", ["lora", "hira", "qlora", "common"])
@pytest.mark.parametrize("task", ["rows", "text"])
def test_gpt2_needs_no_padding_token(models, reviews, text_dir, tmp_path, monkeypatch, script, task):
    monkeypatch.setattr(common, "time_inference", lambda *_: {})
    assert tiny_tokenizer("gpt2").pad_token is None
    data = ["--dataset", reviews] if task == "rows" else ["--dataset", "wikitext2", "--data_dir", text_dir, "--full"]
    if script != "common" and task == "text":
        data.remove("--full")
    [path] = SCRIPTS[script].main([*data, "--model", models("gpt2", "" if task == "rows" else "CausalLM"), "--max_length", 16,
                                   "--max_steps", 2, "--batch_size", 8, "--out", tmp_path])
    metrics = json.loads(path.read_text())["metrics"]
    assert ("causal_perplexity" if task == "text" else "accuracy") in metrics


# ------------------------------------------------------------------------------------------------ as processes


def process(tmp_path, script, *words, **environment):
    """(status, stdout, stderr) of a script started as a user would start it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))
            and key.lower() not in ("https_proxy", "http_proxy", "all_proxy")}
    done = subprocess.run([sys.executable, ROOT / script, *map(str, words), "--out", tmp_path / "out"], cwd=tmp_path,
                          timeout=90, capture_output=True, text=True,
                          env=kept | {"HF_HOME": str(tmp_path / "hf")} | environment)
    assert not contents(tmp_path / "out")
    return done.returncode, done.stdout, done.stderr


def test_a_wrong_flag_of_a_process(tmp_path):
    status, out, error = process(tmp_path, "hira.py", "--dataset", "demo", "--rank", 0)
    assert status == 2 and out == "" and error.count("\n") == 1 and "hira.py: error: argument --rank: '0'" in error, error


def test_a_wrong_folder_of_a_process(models, tmp_path):
    write(tmp_path / "films", text="review")
    status, out, error = process(tmp_path, "qlora.py", "--dataset", "films", "--model", models("distilbert"),
                                 "--max_length", 24)
    assert status == 2 and out == "" and error.count("\n") == 1 and "--dataset films" in error and "review" in error, error


def test_a_hub_that_cannot_be_reached(tmp_path):
    """Nothing here, nothing in the cache, no answer: one line that names what was looked for and three ways out, and soon.

    The libraries' own retries take minutes; the time limit of 90 s is theirs not to be reached on a slow machine, whose
    imports alone may take 15 s.
    """
    with socket.socket() as closed:  # a port that is taken and does not listen: every connection is refused
        closed.bind(("127.0.0.1", 0))
        status, out, error = process(tmp_path, "lora.py", "--dataset", "sst2", "--data_dir", "nowhere",
                                     HF_ENDPOINT=f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert status == 2 and out == "" and error.count("\n") == 1, error
    for name in ("distilbert-base-uncased", "--model", "--data_dir", "--dataset demo"):
        assert name in error, error


def test_an_unreachable_hub_is_asked_once_and_briefly(monkeypatch):
    """One probe of at most three seconds; then the libraries are told to use their cache only."""
    asked = []

    def silent(address, timeout):
        asked.append((address, timeout))
        raise TimeoutError
    monkeypatch.setattr(common.socket, "create_connection", silent)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:8443")
    for key in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(key, raising=False)
    common.offline_if_unreachable()
    assert asked == [(("hub.example", 8443), 3)] and os.environ["HF_HUB_OFFLINE"] == "1"
    common.offline_if_unreachable()
    assert len(asked) == 1
