"""What a seed draws, and running text in blocks: against plain loops over the files' own rows."""

import hashlib
import json
import math
import random
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import (
    EVERY,
    WORDS,
    ready,
    rows_flags,
    sentences,
    stir,
    text_flags,
    tiny_tokenizer,
    write_rows,
)

import common
import lora
from harness import splits
from harness.rows import Rows, read_rows

DATA = Path(__file__).parents[1] / "data"


def load(out, *words, seed=0):
    """The run and the Data of one lora.py command line."""
    words = ["--out", out, "--seeds", seed, *words]
    run = next(lora.runs(lora.parse_args(lora.__doc__, lora.__file__, lora.add_args, words)))
    return run, common.load_data(run)


def rows_of(split):
    """A split's rows as lists of tokens."""
    ends = split.starts.tolist()
    return [split.tokens[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)]


def labelled(split):
    return list(zip(map(tuple, rows_of(split)), split.labels.tolist(), strict=True))


def columns_of(folder, name):
    rows = datasets.Dataset.from_parquet(str(Path(folder) / f"{name}.parquet"))
    return {key: list(rows[key]) for key in rows.column_names}


def in_order(part, whole):
    """Whether `part` is what is left of `whole` when some items are dropped."""
    whole = iter(whole)
    return all(any(item == other for other in whole) for item in part)


# -------------------------------------------------------------------------------- one seed, others


@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_every_method_sees_the_same_rows_batches_masks_and_head(
    models, reviews, text_dir, tmp_path, monkeypatch, task
):
    """At one seed: splits, each training batch of two epochs in order, the head at the start."""
    flags = rows_flags(models, reviews)
    if task == "mlm":  # a checkpoint without an LM head
        flags = [*text_flags(models, text_dir, head=""), "--train_samples", 40]
    collate, splits_of, heads, batches = common.collate, {}, {}, {}
    for name, (module, more) in EVERY.items():
        words = [*flags, *more, "--seeds", 2, "--epochs", 2, "--batch_size", 20]
        run, data, base, method = ready(module, tmp_path / name, *words)
        named, seen = dict(base.model.named_parameters()), []
        splits_of[name] = data.description
        heads[name] = {key: named[key].detach().clone() for key in base.head}

        def record(data, split, rows, targets, seen=seen):
            seen.append((rows, *collate(data, split, rows, targets)))
            return collate(data, split, rows, targets)

        with monkeypatch.context() as patch:
            patch.setattr(common, "collate", record)
            common.train(base, data, run, method)
        batches[name] = seen[1:]  # but for the one row that is tried first
    steps = 2 * math.ceil(len(data.train.lengths) / 20)
    assert steps > 3 and len(heads["lora"]) > 2
    first, second = torch.cat([batch[0] for batch in batches["lora"]]).chunk(2)
    assert sorted(first) == sorted(second) and not torch.equal(first, second)  # a new order
    for name in EVERY:
        assert splits_of[name] == splits_of["lora"] and len(batches[name]) == steps
        for ours, theirs in zip(batches[name], batches["lora"], strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert one is other is None or torch.equal(one, other), name
        assert heads[name].keys() == heads["lora"].keys()
        assert all(torch.equal(heads[name][key], heads["lora"][key]) for key in heads["lora"])


def test_other_seeds_draw_other_rows_heads_adapters_orders_and_masks(models, reviews, tmp_path):
    """Training and dev rows are the seed's own, the test rows are not; each in the file's order."""
    flags = [*rows_flags(models, reviews), "--train_samples", 50, "--test_samples", 20]
    whole = {name: columns_of(reviews, name) for name in ("train", "test")}
    tokenizer = tiny_tokenizer("distilbert")
    for columns in whole.values():
        ids = [tuple(tokenizer(text)["input_ids"]) for text in columns["text"]]
        columns["rows"] = list(zip(ids, columns["label"], strict=True))
    found = []
    for seed in (0, 1):
        run, data, base, _ = ready(lora, tmp_path, *flags, "--seeds", seed)
        for name, split, size in (("train", data.train, 50), ("dev", data.dev, 12)):
            assert len(labelled(split)) == size, name
            assert in_order(labelled(split), whole["train"]["rows"])
        assert not set(labelled(data.train)) & set(labelled(data.dev))
        assert in_order(labelled(data.test), whole["test"]["rows"]) and data.official == 20
        named = dict(base.model.named_parameters())
        adapter = next(name for name in named if name.endswith(".A"))
        batches = common.order(data.train.lengths, 8, run.seed, 0)
        u = torch.rand(99, generator=splits.generator_for(run.seed, 0, "masks"))
        tensors = [named[base.head[0]].detach(), named[adapter].detach(), torch.cat(batches), u]
        found.append((data, tensors))
    (one, ours), (two, theirs) = found
    assert labelled(one.test) == labelled(two.test) != whole["test"]["rows"][:20]
    assert one.description["test_sha256"] == two.description["test_sha256"]
    for name in ("train", "dev"):
        assert one.description[f"{name}_sha256"] != two.description[f"{name}_sha256"]
        assert set(labelled(getattr(one, name))) != set(labelled(getattr(two, name)))
    assert not any(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind, head", [("distilbert", "MaskedLM"), ("gpt2", "CausalLM")])
def test_seeds_draw_training_blocks_and_score_the_same(models, text_dir, tmp_path, kind, head):
    flags = text_flags(models, text_dir, kind, head)
    (_, whole), (_, one), (_, two) = (
        load(tmp_path, *flags, *more, seed=seed)
        for seed, more in (
            (0, []),
            *((s, ["--train_samples", 9, "--test_samples", 5]) for s in (0, 1)),
        )
    )
    assert [len(data.train.lengths) for data in (one, two)] == [9, 9]
    assert rows_of(one.train) != rows_of(two.train) and len(one.test.lengths) == 5
    assert rows_of(one.test) == rows_of(two.test) and rows_of(one.dev) != rows_of(two.dev)
    for data in (one, two):
        assert in_order(rows_of(data.train), rows_of(whole.train))
        assert in_order(rows_of(data.test), rows_of(whole.test))
        assert in_order(rows_of(data.dev), rows_of(whole.dev))  # as many as train has
        assert len(data.dev.lengths) == 9
    assert load(tmp_path, *flags, "--train_samples", 9999)[1].description == whole.description


def test_random_numbers_have_seeds_of_their_own():
    """A plain function of the names: the same in every process, and hashes apart."""
    digest = hashlib.sha256(b"(0, 'order', 1)").digest()[:7]
    assert splits.seed_for(0, "order", 1) == int.from_bytes(digest, "big")
    uses = ("order", "batches", "masks", "dev", "train", "head", "adapter")
    names = [(seed, use, epoch) for seed in range(5) for use in uses for epoch in range(5)]
    assert len({splits.seed_for(*name) for name in names}) == len(names)


# --------------------------------------------------------------------------------------- held out


def test_heldout_rows(models, reviews, tmp_path):
    """The same for all seeds, behind the official rows, and no training or dev row of any."""
    flags = [*rows_flags(models, reviews), "--heldout", 30]
    _, plain = load(tmp_path, *rows_flags(models, reviews))
    (_, one), (_, two) = (load(tmp_path, *flags, seed=seed) for seed in (0, 1))
    assert one.official == plain.official == 45 and len(one.test.lengths) == 75
    assert labelled(one.test) == labelled(two.test) and one.description["official"] == 45
    assert labelled(one.test)[:45] == labelled(plain.test)
    held = labelled(one.test)[45:]
    everything = labelled(plain.train) + labelled(plain.dev)
    assert set(held) <= set(everything) and len(set(held)) == 30
    for data in (one, two):
        left = labelled(data.train) + labelled(data.dev)
        assert not set(left) & set(held) and sorted(left + held) == sorted(everything)
    assert labelled(one.dev) != labelled(two.dev)


def test_official_metrics_are_those_of_a_run_without_heldout_rows(models, reviews, tmp_path):
    flags, scores = rows_flags(models, reviews), {}
    for heldout in (0, 30):
        run, data, base, _ = ready(lora, tmp_path, *flags, "--heldout", heldout)
        stir(base)
        scores[heldout] = common.evaluate(base, data, run)
    plain, more = scores[0]["metrics"], scores[30]["metrics"]
    assert "official" not in plain and more["official"] == pytest.approx(plain["test"], rel=1e-6)
    assert more["test"]["loss"] != pytest.approx(plain["test"]["loss"], rel=1e-4)


def test_text_has_no_heldout_rows(models, text_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load(tmp_path, *text_flags(models, text_dir), "--heldout", 5)
    assert "--heldout 5: only for labelled rows" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ sizes, texts


def by_text(monkeypatch):
    """Let a row's tokens be its text's own number, whatever the tokenizer; returns the texts."""
    texts = {}

    def tokenize(rows, *_, **__):
        return [[texts.setdefault(text, len(texts))] for text in rows]

    monkeypatch.setattr(splits, "tokenize", tokenize)
    return texts


def wanted(**changes):
    """A run of split_rows' wishes."""
    defaults = {"seed": 0, "heldout": 0, "train_samples": None, "test_samples": None}
    return Namespace(dataset="rows", max_length=9, **(defaults | changes))


@pytest.mark.parametrize("n, dev", [(20, 2), (59, 5), (4000, 400), (5000, 500), (12_000, 500)])
def test_dev_is_a_tenth_and_at_most_500_rows(monkeypatch, n, dev):
    by_text(monkeypatch)
    train = {"text": [str(i) for i in range(n)], "pair": None, "label": [0] * n}
    rows = Rows(train, {"text": ["x"], "pair": None, "label": [1]}, None, ["0", "1"], "test")
    parts = splits.split_rows(wanted(), rows, None, 0)
    assert [len(part.lengths) for part in parts[:3]] == [n - dev, dev, 1] and parts[3] == 1


def test_no_training_row_has_a_dev_or_heldout_rows_text(monkeypatch):
    """However often a text stands in the file, and nothing else is lost."""
    by_text(monkeypatch)
    texts = sentences(40, 5)[0] * 3
    train = {"text": texts, "pair": None, "label": [0] * 120}
    rows = Rows(train, {"text": ["x"], "pair": None, "label": [1]}, None, ["0", "1"], "test")
    train, dev, test, _ = splits.split_rows(wanted(heldout=10), rows, None, 0)
    train, dev, held = (rows_of(part) for part in (train, dev, test))
    held = held[1:]
    assert len(dev) == 12 and len(held) == 10
    assert not any(row in dev or row in held for row in train)
    assert not any(row in held for row in dev)
    gone = {row for (row,) in dev + held}
    assert len(train) == 120 - 3 * len(gone)


@pytest.mark.skipif(not (DATA / "sst2").is_dir(), reason="the real data is not here")
def test_the_real_sst2(monkeypatch):
    """Dev is 500 whole sentences; no training row stands word for word in one, or in a held one."""
    texts = by_text(monkeypatch)
    rows = read_rows("sst2", str(DATA))
    train, dev, test, official = splits.split_rows(wanted(heldout=3000), rows, None, 0)
    other = splits.split_rows(wanted(heldout=3000, seed=1), rows, None, 0)
    assert len(rows.plain) == 67_349 and official == 872 and len(test.lengths) == 3872
    assert len(dev.lengths) == 500 and torch.equal(test.tokens, other[2].tokens)
    words = [" ".join(text.split()) for text in texts]
    train, dev, held, dev1 = (
        [words[i] for i in part.tokens.tolist()] for part in (train, dev, test, other[1])
    )
    held, everything = held[872:], "".join(f" {text} \n" for text in rows.plain)
    draw = random.Random(0)
    for text in draw.sample(dev, 20) + draw.sample(held, 20):
        assert everything.count(f" {text} ") == 1  # a whole sentence stands in no other row
    inside = sum(everything.count(f" {text} ") > 1 for text in draw.sample(rows.plain, 60))
    assert inside > 40  # where most rows stand in another
    taken = "".join(f" {text} \n" for text in dev + held)
    kept = set(train)
    for text in draw.sample(rows.plain, 1500):
        assert (text in kept) == (f" {text} " not in taken)
    assert len(set(dev) & set(dev1)) < 120 and not set(held) & (set(dev) | set(dev1))


def test_a_hash_changes_with_every_token_label_and_boundary():
    starts, scorable = torch.tensor([0, 2, 5]), torch.ones(5, dtype=torch.bool)
    tokens, labels = torch.arange(5, dtype=torch.int32), torch.tensor([0, 1])
    parts = [
        (tokens, starts, labels, None),
        (tokens.flip(0), starts, labels, None),
        (tokens, torch.tensor([0, 3, 5]), labels, None),
        (tokens, starts, labels.flip(0), None),
        (tokens, starts, None, scorable),
        (tokens, starts, None, scorable & (tokens > 0)),
    ]
    hashes = [splits.Split(*part).sha256() for part in parts]
    assert len(set(hashes)) == len(parts)
    again = splits.Split(tokens.clone(), starts.clone(), labels.clone(), None)
    run = SimpleNamespace(settings={"dataset": "x"}, seed=0)
    rows = SimpleNamespace(test_split="test", classes=["a", "b"])
    assert splits.describe(run, rows, "classification", again, again, again, 1) == {
        **{"task": "classification", "test_split": "test", "classes": ["a", "b"]},
        **{"official": 1, "train": 2, "dev": 2, "test": 2},
        **{f"{name}_sha256": hashes[0] for name in ("train", "dev", "test")},
    }


@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_rows_are_the_tokenizers_own_output(models, reviews, tmp_path, kind):
    """Text by text, cut at 9 tokens, in the file's order with the file's labels."""
    flags = ["--dataset", reviews, "--model", models(kind), "--max_length", 9]
    _, data = load(tmp_path, *flags)
    tokenizer = tiny_tokenizer(kind)
    rows = {}
    for name in ("train", "test"):
        columns = columns_of(reviews, name)
        ids = [tokenizer(text)["input_ids"] for text in columns["text"]]
        if kind == "distilbert":  # the last of the nine is [SEP]
            ids = [row if len(row) <= 9 else [*row[:8], 3] for row in ids]
        rows[name] = list(zip((tuple(row[:9]) for row in ids), columns["label"], strict=True))
    assert {len(ids) for ids, _ in rows["train"]} > {5, 9}
    assert labelled(data.test) == rows["test"]
    assert sorted(labelled(data.train) + labelled(data.dev)) == sorted(rows["train"])


def test_a_folder_is_a_folder_whatever_its_name_begins_with(models, tmp_path, monkeypatch):
    """And one folder is one name: my, my/ and ./my."""
    monkeypatch.chdir(tmp_path)
    texts, _ = sentences(60, 0)
    for name in ("demographics", "imdb"):
        for split in ("train", "test"):
            write_rows(tmp_path / name, split, {"text": texts, "label": [i % 3 for i in range(60)]})
    (tmp_path / "base").symlink_to(models("distilbert"))
    made = set()
    for slash in ("{}", "{}/", "./{}"):
        flags = ["--dataset", slash.format("demographics"), "--model", slash.format("base")]
        run, data = load("out", *flags, "--max_length", 24)
        made.add(json.dumps(run.settings))
        assert data.classes == ["0", "1", "2"] and data.official == 60
    assert len(made) == 1 and '"dataset": "demographics"' in made.pop()


# ----------------------------------------------------------------------------------- running text


def words_of(text_dir, name):
    return [
        word
        for text in columns_of(Path(text_dir) / "wikitext2", name)["text"]
        for word in text.split()
    ]


@pytest.mark.parametrize("kind, head", [("distilbert", "MaskedLM"), ("llama", "CausalLM")])
def test_blocks_are_the_whole_text_once(models, text_dir, tmp_path, kind, head):
    """[CLS] … [SEP] for an encoder; 12 tokens each but the last; `<unk>` is one unknown token."""
    _, data = load(tmp_path, *text_flags(models, text_dir, kind, head), "--max_length", 12)
    tokenizer, ends = tiny_tokenizer(kind), 2 if kind == "distilbert" else 0
    for split, source in ((data.train, "train"), (data.dev, "validation"), (data.test, "test")):
        blocks, ids = rows_of(split), tokenizer.convert_tokens_to_ids(words_of(text_dir, source))
        assert ids.count(tokenizer.unk_token_id) == words_of(text_dir, source).count("<unk>") > 5
        flags = rows_of(splits.Split(split.scorable, split.starts, None, None))
        if ends:
            assert all((block[0], block[-1]) == (2, 3) for block in blocks)
            assert not any(row[0] or row[-1] for row in flags)
            blocks, flags = ([row[1:-1] for row in rows] for rows in (blocks, flags))
        assert {len(block) for block in blocks[:-1]} == {12 - ends} and len(blocks[-1]) <= 12
        assert [token for block in blocks for token in block] == ids
        known = [token != tokenizer.unk_token_id for token in ids]
        assert [bool(flag) for row in flags for flag in row] == known


def test_blocks_begin_with_the_token_that_the_tokenizer_puts_before_a_text(
    models, text_dir, tmp_path
):
    """As Llama's and Gemma's do: read in each block, never predicted. [CLS] plays its part."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer("llama")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    tokenizer.bos_token = "[CLS]"
    folder = with_tokenizer(models("llama", "CausalLM"), tokenizer, tmp_path / "model")
    flags = text_flags(models, text_dir, "llama", "CausalLM")
    _, data = load(tmp_path, *flags, "--model", folder, "--max_length", 12)
    _, plain = load(tmp_path, *flags, "--max_length", 12)
    blocks = rows_of(data.train)
    assert all(block[0] == 2 for block in blocks) and {len(block) for block in blocks[:-1]} == {12}
    without = [token for block in blocks for token in block[1:]]
    assert without == plain.train.tokens.tolist() and 2 not in without
    flags = common.predicted_tokens(data, data.train, 0, 0).flags
    assert flags.tolist() == data.train.tokens.gt(2).tolist()  # [PAD], [UNK], [CLS] come first


def with_tokenizer(model, tokenizer, folder):
    """A copy of a checkpoint with another tokenizer."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(Path(model) / name)
    tokenizer.save_pretrained(folder)
    return str(folder)


def word_tokenizer(unk, **special):
    """A word-level tokenizer that knows `<`, `unk` and `>` as words, as GPT-2 has their bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[END]", "<", "unk", ">", *WORDS[:-1]]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if unk:
        special["unk_token"] = unk
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", **special)


@pytest.mark.parametrize(
    "unk, eos, text, tokens, known",
    [  # the words of "the a film" are 6 7 8
        ("[UNK]", "[END]", "the <unk> a<unk> film", [6, 1, 7, 1, 8], "10101"),
        ("[END]", "[END]", "the <unk> a<unk> film", [6, 3, 4, 5, 7, 3, 4, 5, 8], "100010001"),
        (None, "[END]", "the <unk> a<unk> film", [6, 3, 4, 5, 7, 3, 4, 5, 8], "100010001"),
        # What the tokenizer does not know beside `<unk>` is unknown, too, where it can say so.
        ("[UNK]", "[END]", "the zebra < unk >", [6, 1, 3, 4, 5], "10111"),
        ("[END]", "[END]", "the < unk > a", [6, 3, 4, 5, 7], "11111"),
    ],
)
def test_unk_by_hand(models, tmp_path, unk, eos, text, tokens, known):
    """One unknown token where that is a token of its own; else spelled out and not scored.

    The perplexity is exp of the mean over the known tokens that have one before them.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = word_tokenizer(unk, eos_token=eos)
    folder = with_tokenizer(models("gpt2", "CausalLM"), tokenizer, tmp_path / "model")
    for name in ("train", "validation", "test"):
        write_rows(tmp_path / "wikitext2", name, {"text": ["", f" {text} \n", " \n"]})
    flags = ["--dataset", "wikitext2", "--data_dir", tmp_path, "--model", folder]
    run, data, base, _ = ready(common, tmp_path, *flags, "--max_length", 16)
    assert rows_of(data.test) == [tokens] and data.test.scorable.tolist() == [
        c == "1" for c in known
    ]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        chances = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    losses = [
        -chances[i - 1, token].item()
        for i, (token, flag) in enumerate(zip(tokens, known, strict=True))
        if i and flag == "1"
    ]
    metrics = common.evaluate(base, data, run)["metrics"]["test"]
    expected = math.exp(sum(losses) / len(losses))
    assert metrics["causal_perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("unknown, own", [("[UNK]", True), ("<|endoftext|>", False)])
def test_unk_in_byte_level_vocabularies(tmp_path, unknown, own):
    """RoBERTa's and GPT-2's way of writing tokens: every byte of the rest stays, once."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), unknown, "Ġ<"]
    core = Tokenizer(BPE({token: i for i, token in enumerate(letters)}, merges=[("Ġ", "<")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    eos = "[END]" if own else unknown
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unknown, eos_token=eos)
    unk, texts = tokenizer.unk_token_id, ["thé <unk> sat on <unk> mats\n", "", "<unk>\n"]
    with pytest.MonkeyPatch.context() as patch:
        columns = {"text": texts, "pair": None, "label": None}
        rows = Rows(columns, columns, columns, None, "test")
        patch.setattr(splits, "load_tokenizer", lambda model: (tokenizer, None))
        patch.setattr(splits, "read_rows", lambda *_: rows)
        splits.read_streams.cache_clear()
        tokens, scorable = splits.read_streams("made", "here", unknown)["train"]
        splits.read_streams.cache_clear()
    known = tokens[scorable].tolist()
    assert tokenizer.decode(known) == "thé sat on mats\n\n"  # the blank goes with the piece " <"
    others = tokens[~scorable].tolist()
    assert others == [unk] * 3 if own else tokenizer.decode(others) == " <unk> <unk><unk>"
