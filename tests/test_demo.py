"""The demo: the same rows at every call, fair splits, and counting words is not enough."""

import random
import re
from collections import Counter

import pytest
import torch

from harness import demo


@pytest.fixture(scope="module")
def rows():
    return demo.splits()


def words(text):
    return re.findall("[a-z]+", text)


def rule(text):
    """What the grammar itself says of a review: 1 or 0, and None for a mixed one."""
    if "saves" in text or "ruins" in text:
        return int("saves" in text)
    text = re.sub(
        r".*(?<!anything) but |although .*?, |, even if .*", "", text
    )  # what a contrast leaves standing
    verdicts = set()
    for part in re.split(r"[.,] ?| and (?=the |i |not |nobody |it |you )", text):
        good = len(set(words(part)) & set(demo.GOOD)) > 0
        if good or set(words(part)) & set(demo.BAD):
            turns = len(re.findall("not|hardly|far from|anything but|nobody", part))
            verdicts.add(int(good) ^ turns % 2)
    return verdicts.pop() if len(verdicts) == 1 else None


def test_the_same_rows_at_every_call(rows):
    random.seed(5)
    state = random.getstate(), torch.get_rng_state()
    assert demo.splits() == rows and demo.splits(lm=True) == demo.splits(lm=True)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_splits_are_balanced_and_apart(rows):
    for columns in rows.values():
        assert Counter(columns["label"]) == {
            0: len(columns["text"]) // 2,
            1: len(columns["text"]) // 2,
        }
    lm = demo.splits(lm=True)
    assert set(rows) == {"train", "test"} and set(lm) == {"train", "validation", "test"}
    for splits in (rows, lm):
        texts = [text for columns in splits.values() for text in columns["text"]]
        assert len(texts) == len(set(texts))


def test_no_labelled_row_says_what_the_reviewer_felt(rows):
    said = {word for columns in rows.values() for text in columns["text"] for word in words(text)}
    assert not said & {*demo.LOVED, *demo.HATED}


def test_the_grammar_decides_all_but_the_mixed_reviews(rows):
    found = [
        (rule(text), label)
        for columns in rows.values()
        for text, label in zip(columns["text"], columns["label"], strict=True)
    ]
    decided = [verdict == label for verdict, label in found if verdict is not None]
    assert all(decided)
    assert 0.04 < 1 - len(decided) / len(found) < 0.08  # six in a hundred are mixed


def test_counting_words_is_not_enough(rows):
    """Logistic regression on word counts: better than chance, far worse than 97 %."""
    index = {
        word: i
        for i, word in enumerate(
            sorted({word for text in rows["train"]["text"] for word in words(text)})
        )
    }

    def counts(name):
        return torch.stack(
            [
                torch.bincount(
                    torch.tensor([index[word] for word in words(text) if word in index]),
                    minlength=len(index),
                ).float()
                for text in rows[name]["text"]
            ]
        )

    x, y = counts("train"), torch.tensor(rows["train"]["label"]).float()
    model = torch.nn.utils.skip_init(torch.nn.Linear, len(index), 1)
    for tensor in model.parameters():
        torch.nn.init.zeros_(tensor)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100)

    def loss():
        optimizer.zero_grad()
        value = (
            torch.nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y)
            + 1e-3 * model.weight.square().sum()
        )
        value.backward()
        return value

    optimizer.step(loss)
    right = (model(counts("test"))[:, 0] > 0) == torch.tensor(rows["test"]["label"]).bool()
    assert 0.55 < right.float().mean() < 0.75


def test_the_model_knows_every_word_and_leaves_random_numbers_alone(rows):
    """Loads for all three tasks; the masked-LM head is in the checkpoint."""
    from transformers import (
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    torch.manual_seed(3)
    state = torch.get_rng_state(), random.getstate()
    folder = demo.model()
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for columns in (*rows.values(), *demo.splits(lm=True).values()):
        assert not any(
            tokenizer.unk_token_id in ids for ids in tokenizer(columns["text"])["input_ids"]
        )
    _, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    _, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"pre_classifier", "classifier"}
    assert not AutoModel.from_pretrained(folder, output_loading_info=True)[1]["missing_keys"]


def test_the_model_has_learned_which_words_are_loved(rows):
    """Before any fine-tuning the masked-LM head tells a good review from a bad one."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.model())
    model = AutoModelForMaskedLM.from_pretrained(demo.model()).eval()
    batch = tokenizer(
        [f"i [MASK] it. {text}" for text in rows["test"]["text"][:300]],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
    chances = logits[batch["input_ids"] == tokenizer.mask_token_id].softmax(-1)
    loved, hated = (
        chances[:, tokenizer.convert_tokens_to_ids(words)].sum(1)
        for words in (demo.LOVED, demo.HATED)
    )
    assert (
        (loved > hated) == torch.tensor(rows["test"]["label"][:300]).bool()
    ).float().mean() > 0.8


def test_a_short_pre_training_leaves_random_numbers_and_threads_alone(tmp_path):
    torch.manual_seed(3)
    state = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    demo.pretrain(tmp_path / "model", steps=3, batch=4)
    assert (
        torch.equal(torch.get_rng_state(), state[0])
        and (random.getstate(), torch.get_num_threads()) == state[1:]
    )
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "model").iterdir()
    }


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
    assert build() == folder and len(builds) == 1
    assert (
        folder.parent == tmp_path / "cache" / "peft-from-scratch" and not builds[0].exists()
    )  # renamed, not copied


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
