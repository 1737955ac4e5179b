"""The demo: the same rows at every call, fair splits, words that the tokenizer knows, and counting them is not enough."""

import random
from collections import Counter

import pytest
import torch

import demo


@pytest.fixture(scope="module")
def rows():
    return demo.splits()


def test_the_same_rows_at_every_call(rows):
    random.seed(5)
    state = random.getstate(), torch.get_rng_state()
    assert demo.splits() == rows and demo.splits(lm=True) == demo.splits(lm=True)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_splits_are_balanced_and_apart(rows):
    for columns in rows.values():
        assert Counter(columns["label"]) == {0: len(columns["text"]) // 2, 1: len(columns["text"]) // 2}
    assert not set(rows["train"]["text"]) & set(rows["test"]["text"])
    lm = demo.splits(lm=True)
    assert set(lm) == {"train", "validation", "test"} and not set(lm["train"]["text"]) & set(lm["test"]["text"])


def test_counting_words_is_not_enough(rows):
    """Naive Bayes on word counts: better than chance, and below what word order allows (LoRA reaches 85 % and more)."""
    counts = [Counter(), Counter()]
    for text, label in zip(rows["train"]["text"], rows["train"]["label"], strict=True):
        counts[label].update(text.replace(".", " ").replace(",", " ").split())
    words = set(counts[0]) | set(counts[1])
    logs = [{word: torch.log(torch.tensor((count[word] + 1) / (sum(count.values()) + len(words)))).item() for word in words}
            for count in counts]
    hits = [(sum(logs[1].get(w, 0) - logs[0].get(w, 0) for w in text.replace(".", " ").replace(",", " ").split()) > 0) == label
            for text, label in zip(rows["test"]["text"], rows["test"]["label"], strict=True)]
    assert 0.5 < sum(hits) / len(hits) < 0.75


def test_the_model_is_built_once_and_knows_every_word(rows):
    """Loads for all three tasks; the masked-LM head is in the checkpoint; the caller's random numbers go on undisturbed."""
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
    torch.manual_seed(3)
    state = torch.get_rng_state()
    folder = demo.model()
    assert torch.equal(torch.get_rng_state(), state)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert demo.model() == folder and (folder / "model.safetensors").stat().st_mtime_ns == made
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for columns in (*rows.values(), *demo.splits(lm=True).values()):
        assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(columns["text"])["input_ids"])
    _, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    _, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"pre_classifier", "classifier"}
