"""The demo: the same examples at every call, fair splits, and counting words is not enough."""

import random
import re
from collections import Counter

import pytest
import torch

from harness import demo

SPLITS, TEXT = demo.splits(), demo.splits(lm=True)
TEST = SPLITS["test"]["text"]


def words(text):
    return re.findall("[a-z]+", text)


def states():
    return random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads()


def rule(text):
    """What the grammar itself says of a review: 1 or 0, and None for a mixed one."""
    if "saves" in text or "ruins" in text:
        return int("saves" in text)
    contrast = r".*(?<!anything) but |although .*?, |, even if .*"
    text, verdicts = re.sub(contrast, "", text), set()  # what a contrast leaves standing
    for part in re.split(r"[.,] ?| and (?=the |i |not |nobody |it |you )", text):
        good = len(set(words(part)) & set(demo.GOOD)) > 0
        if good or set(words(part)) & set(demo.BAD):
            turns = len(re.findall("not|hardly|far from|anything but|nobody", part))
            verdicts.add(int(good) ^ turns % 2)
    return verdicts.pop() if len(verdicts) == 1 else None


def test_the_same_fair_splits_at_every_call():
    """Balanced, no text twice, and no labelled one says what the reviewer felt."""
    before = states()
    assert demo.splits() == SPLITS and demo.splits(lm=True) == TEXT and states() == before
    assert set(SPLITS) == {"train", "test"} and set(TEXT) == {"train", "validation", "test"}
    for columns in SPLITS.values():
        half = len(columns["text"]) // 2
        assert Counter(columns["label"]) == {0: half, 1: half}
        said = {word for text in columns["text"] for word in words(text)}
        assert not said & {*demo.LOVED, *demo.HATED}
    for splits in (SPLITS, TEXT):
        texts = [text for columns in splits.values() for text in columns["text"]]
        assert len(texts) == len(set(texts))


def test_the_grammar_decides_all_but_the_mixed_reviews():
    pairs = [pair for s in SPLITS.values() for pair in zip(s["text"], s["label"], strict=True)]
    verdicts = [(rule(text), label) for text, label in pairs]
    decided = [verdict == label for verdict, label in verdicts if verdict is not None]
    assert all(decided)
    assert 0.04 < 1 - len(decided) / len(verdicts) < 0.08  # six in a hundred are mixed


def test_counting_words_is_not_enough():
    """Logistic regression on word counts: better than chance, far worse than 97 %."""
    known = sorted({word for text in SPLITS["train"]["text"] for word in words(text)})

    def counts(name):
        rows = [[words(text).count(word) for word in known] for text in SPLITS[name]["text"]]
        return torch.tensor(rows, dtype=torch.float32), torch.tensor(SPLITS[name]["label"])

    (x, y), weight = counts("train"), torch.zeros(len(known), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100)

    def loss():
        optimizer.zero_grad()
        fit = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight, y.float())
        value = fit + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    x, y = counts("test")
    assert 0.55 < ((x @ weight > 0) == y).float().mean() < 0.75


def test_the_model_knows_every_word_and_which_are_loved():
    """Its checkpoint has the masked-LM head, which tells a good review from a bad one untrained."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    before = states()
    folder = demo.model()
    assert states() == before
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for columns in (*SPLITS.values(), *TEXT.values()):
        ids = tokenizer(columns["text"])["input_ids"]
        assert not any(tokenizer.unk_token_id in row for row in ids)
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    masked = [f"i [MASK] it. {text}" for text in TEST[:300]]
    batch = tokenizer(masked, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], batch["attention_mask"]).logits
    chances = logits[batch["input_ids"] == tokenizer.mask_token_id].softmax(-1)
    sides = [tokenizer.convert_tokens_to_ids(side) for side in (demo.LOVED, demo.HATED)]
    loved, hated = (chances[:, side].sum(1) for side in sides)
    right = (loved > hated) == torch.tensor(SPLITS["test"]["label"][:300]).bool()
    assert right.float().mean() > 0.8


def test_a_short_pre_training_leaves_random_numbers_and_threads_alone(tmp_path):
    torch.manual_seed(3)
    before = states()
    demo.pretrain(tmp_path / "model", steps=3, batch=4)
    assert states() == before
    made = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= made


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """A cache of its own and a pre-training that takes no time; the folders that it filled."""
    folders = []

    def pretrain(folder):
        folder.mkdir()
        (folder / "config.json").write_text(str(len(folders)))
        folders.append(folder)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "pretrain", pretrain)
    return folders


def test_the_model_is_built_once(builds, tmp_path):
    build = demo.model.__wrapped__  # each call like that of a new process
    folder = build()
    assert build() == folder and len(builds) == 1 and not builds[0].exists()  # renamed, not copied
    assert folder.parent == tmp_path / "cache" / "peft-from-scratch"


def test_two_processes_may_build_at_the_same_time(builds, monkeypatch):
    build, one = demo.model.__wrapped__, demo.pretrain

    def overtaken(folder):
        one(folder)
        monkeypatch.setattr(demo, "pretrain", one)
        build()  # another process starts later and is ready first

    monkeypatch.setattr(demo, "pretrain", overtaken)
    assert (build() / "config.json").read_text() == "1" and len(builds) == 2


def test_without_a_cache_folder_the_model_goes_to_a_temporary_one(builds, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the cache folder should be")
    folder = demo.model.__wrapped__()
    assert (folder / "config.json").exists() and tmp_path not in folder.parents
    assert len(capsys.readouterr().err.splitlines()) == 1
