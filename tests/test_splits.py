"""What a seed draws, and running text in blocks: against plain loops over the files' own rows."""

import hashlib
import json
import math
import random
import shutil
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import EVERY, WORDS, ready, rows_flags, sentences, stir, text_flags, tiny_tokenizer
from conftest import write_rows as write
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import EsmTokenizer, PreTrainedTokenizerFast, pipeline

import common
import lora
from harness import batches, splits
from harness.export import export
from harness.rows import Examples, read_examples

DATA = Path(__file__).parents[1] / "data"


def load(out, *words, seed=0):
    """The run and the Data of one lora.py command line."""
    words = ["--out", out, "--seeds", seed, *words]
    run = next(lora.runs(lora.parse_args(lora.__doc__, lora.__file__, lora.add_args, words)))
    return run, common.load_data(run)


def folder_flags(models, folder, length, columns):
    """Flags for a folder whose train and test files hold these columns."""
    for name in ("train", "test"):
        write(folder, name, columns)
    return ["--dataset", folder, "--model", models("distilbert"), "--max_length", length]


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
    collate, splits_of, heads, seen_by = common.collate, {}, {}, {}
    for name, (module, more) in EVERY.items():
        words = [*flags, *more, "--seeds", 2, "--epochs", 2, "--batch_size", 20]
        run, data, base, method = ready(module, tmp_path / name, *words)
        named, seen = dict(base.model.named_parameters()), []
        splits_of[name] = data.description
        heads[name] = {key: named[key].detach().clone() for key in base.head_names}

        def record(data, split, rows, targets, seen=seen):
            seen.append((rows, *collate(data, split, rows, targets)))
            return collate(data, split, rows, targets)

        with monkeypatch.context() as patch:
            patch.setattr(common, "collate", record)
            common.train(run, data, base, method)
        seen_by[name] = seen[1:]  # but for the example that is tried first
    steps = 2 * math.ceil(len(data.train.lengths) / 20)
    assert steps > 3 and len(heads["lora"]) > 2
    first, second = torch.cat([batch[0] for batch in seen_by["lora"]]).chunk(2)
    assert sorted(first) == sorted(second) and not torch.equal(first, second)  # a new order
    for name in EVERY:
        assert splits_of[name] == splits_of["lora"] and len(seen_by[name]) == steps
        for ours, theirs in zip(seen_by[name], seen_by["lora"], strict=True):
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
        order = batches.length_grouped_batches(data.train.lengths, 8, run.seed, 0)
        u = torch.rand(99, generator=splits.generator_for(run.seed, 0, "masks"))
        tensors = [named[base.head_names[0]].detach(), named[adapter].detach(), torch.cat(order), u]
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
    some = ["--train_samples", 9, "--test_samples", 5]
    (_, one), (_, two) = (load(tmp_path, *flags, *some, seed=seed) for seed in (0, 1))
    _, whole = load(tmp_path, *flags)
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
        scores[heldout] = common.evaluate(run, data, base)
    plain, more = scores[0]["metrics"], scores[30]["metrics"]
    assert "official" not in plain and more["official"] == pytest.approx(plain["test"], rel=1e-6)
    assert more["test"]["loss"] != pytest.approx(plain["test"]["loss"], rel=1e-4)


@pytest.mark.parametrize("split", ["heldout", "validation", "test"])
def test_what_running_text_cannot_give(split, models, tmp_path, capsys):
    """Held-out examples; a score, where no token of dev or test is predicted."""
    for name in ("train", "validation", "test"):
        text = [" ".join(WORDS)] * 50 if name != split else ["the film"]
        write(tmp_path / "wikitext2", name, {"text": text})
    flags = text_flags(models, tmp_path) + ["--heldout", 5] * (split == "heldout")
    with pytest.raises(SystemExit):
        for seed in range(20):  # one of the masks leaves both words alone
            load(tmp_path, *flags, seed=seed)
    name = {"validation": "dev"}.get(split, split)
    line = "--heldout 5: only for labelled" if name == "heldout" else f"no token of its {name} text"
    assert line in capsys.readouterr().err


# ------------------------------------------------------------------------------------ sizes, texts


@pytest.fixture
def by_text(monkeypatch):
    """Let an example's tokens be its text's own number, whatever the tokenizer; the texts."""
    texts = {}

    def tokenize(rows, *_, **__):
        return defaultdict(list, input_ids=[[texts.setdefault(row, len(texts))] for row in rows])

    monkeypatch.setattr(splits, "tokenize", tokenize)
    monkeypatch.setattr(splits, "load_tokenizer", lambda model: (None, None))
    return texts


def cut_in_three(texts, **changes):
    """(train, dev, test) of these training texts and one test text, as tokens, and `official`."""
    rows = texts
    if isinstance(texts, list):
        columns = [{"text": t, "pair": None, "label": [0] * len(t)} for t in (texts, ["x"])]
        rows = Examples(*columns, None, ["0", "1"], "test")
    run = dict.fromkeys(splits.DataFlags._fields) | {"seed": 0, "heldout": 0, "max_length": 999}
    parts, official = splits.split_examples(Namespace(**(run | changes)), rows, 0)
    return *parts.values(), official


@pytest.mark.parametrize(
    "n, asked, dev",
    [
        *((n, None, dev) for n, dev in ((20, 2), (59, 5), (4000, 400), (5000, 500), (12_000, 500))),
        *((4000, asked, dev) for asked, dev in ((7, 7), (1500, 1500), (9999, 2000))),
    ],
)
def test_dev_is_a_tenth_and_at_most_500_examples_or_what_is_asked_for(by_text, n, asked, dev):
    *parts, official = cut_in_three([f"{i} {i}" for i in range(n)], dev_samples=asked)
    assert [len(part.lengths) for part in parts] == [n - dev, dev, 1] and official == 1


def test_dev_samples_of_running_text_and_in_the_settings(models, text_dir, tmp_path):
    flags = text_flags(models, text_dir)
    for asked, size in ((3, 3), (9999, 19)):  # all that there are
        run, data = load(tmp_path, *flags, "--dev_samples", asked)
        assert len(data.dev.lengths) == size and run.settings["dev_samples"] == asked
    assert load(tmp_path, *flags)[0].settings["dev_samples"] is None


@pytest.mark.parametrize("change", ["nothing", "capitals", "spelling", "ends", "pairs"])
def test_no_training_example_has_a_dev_or_heldout_ones_tokens(change, models, tmp_path):
    """Equal texts, and others where the tokenizer or --max_length leaves no difference."""
    other = {
        "nothing": str,
        "capitals": str.title,
        "spelling": lambda text: text.replace("lion", "zebra"),  # both are the unknown token
        "ends": lambda text: f"{text} mat",
        "pairs": str.upper,
    }[change]
    once = [" ".join(["lion", *random.Random(i).choices(WORDS, k=30)]) for i in range(60)]
    texts = [text for text in once for text in (text, other(text))]
    columns = {"text": texts, "label": [i % 2 for i in range(120)]}
    columns |= {"text_pair": texts[::-1]} if change == "pairs" else {}
    flags = folder_flags(models, tmp_path / "twice", 24, columns)
    for more in ([], ["--train_samples", 20]):
        _, data = load(tmp_path, *flags, "--heldout", 20, *more)
        train, dev, test = (set(map(tuple, rows_of(s))) for s in (data.train, data.dev, data.test))
        held = set(map(tuple, rows_of(data.test)[data.official :]))
        assert len(rows_of(data.dev)) == 12 and not dev & held and not train & (dev | held)
        assert len(rows_of(data.train)) == 20 if more else train | dev | held == test


def test_a_collision_takes_the_next_of_the_same_permutation(by_text):
    """So that a seed's draw changes by the colliding examples alone."""
    texts = [f"{i} {i}" for i in range(400)]
    train, dev, *_ = cut_in_three(texts, train_samples=100)
    names = [*by_text]
    dev, train = ([names[i] for i in part.tokens.tolist()] for part in (dev, train))
    by_text[train[7]] = by_text[dev[3]]  # now the same tokens
    again, *_ = cut_in_three(texts, train_samples=100)
    again = [[*by_text][i] for i in again.tokens.tolist()]
    assert len(again) == 100 and len(set(train) - set(again)) == len(set(again) - set(train)) == 1
    assert train[7] not in again


# ------------------------------------------------------------------------- one file, first lines


NAMES = ("bad", "dull", "good")


def tickets(path, copies=1):
    """A CSV file of 50 different texts for each of three classes, every text `copies` times."""
    rows = [f"{name} {a} {b}" for name in NAMES for a in WORDS[:10] for b in WORDS[20:25]]
    rows += [row.replace(" ", "  ").upper() for row in rows * (copies - 1)]
    random.Random(0).shuffle(rows)
    path.write_text("\n".join(["text,label", *(f"{r},{r.split()[0].lower()}" for r in rows)]))
    return path


@pytest.mark.parametrize("copies", [1, 3])
def test_a_fifth_of_each_class_is_the_test_set_of_one_file(copies, models, tmp_path):
    """The same for every seed; a text and its copies are on one side; the rest is train and dev."""
    path = tickets(tmp_path / "tickets.csv", copies=copies)
    flags = ["--dataset", path, "--model", models("distilbert"), "--max_length", 16]
    (run, one), (_, two) = (load(tmp_path, *flags, seed=seed) for seed in (0, 1))
    assert labelled(one.test) == labelled(two.test) and labelled(one.dev) != labelled(two.dev)
    assert one.test.labels.bincount().tolist() == [10, 10, 10] and one.official == 30
    for data in (one, two):
        left = labelled(data.train) + labelled(data.dev)
        assert not set(left) & set(labelled(data.test))
        assert len(set(left)) == 120 and len(left) <= 120 * copies
    assert one.description["test_split"] == "a fifth of train"
    assert run.settings["dataset"] == "tickets.csv" and run.path.name.startswith("tickets-lora-")
    _, some = load(tmp_path, *flags, "--test_samples", 7, "--heldout", 9)
    assert some.official == 7 and len(some.test.lengths) == 16
    assert in_order(labelled(some.test)[:7], labelled(one.test))
    assert not set(labelled(some.test)) & set(labelled(some.train) + labelled(some.dev))


def test_names_and_sizes_of_one_file(models, tmp_path, capsys):
    """A file is known by its stem, if no known data set has that name; small classes are named."""
    flags = ["--model", models("distilbert"), "--max_length", 16]
    run, _ = load(tmp_path, "--dataset", tickets(tmp_path / "imdb.csv"), *flags)
    assert run.settings["dataset"] == "imdb.csv"
    path = tickets(tmp_path / "tickets.csv")
    path.write_text(path.read_text() + "".join(f"\nrare {i},rare" for i in range(9)))
    with pytest.raises(SystemExit):
        load(tmp_path, "--dataset", path, *flags)
    error = capsys.readouterr().err
    assert "the class rare has 9 different examples; 10 give a test set, or add a test fi" in error


def test_the_first_lines_of_a_run(models, tmp_path, capsys):
    """Sizes, classes with counts, tokens; and a class without an example in train or dev."""
    texts = [" ".join(["the"] * (1 + i % 30)) + f" {WORDS[i % 36]}" for i in range(100)]
    columns = {"text": texts, "label": [" usual", "rare"] * 30 + ["usual"] * 40}
    flags = folder_flags(models, tmp_path / "films", 30, columns)
    write(tmp_path / "films", "train", columns | {"label": ["rare"] * 2 + ["usual"] * 98})
    _, data = load(tmp_path, *flags, "--train_samples", 20, "--dev_samples", 10)
    lengths = torch.cat([split.lengths for split in (data.train, data.dev, data.test)]).tolist()
    sizes, classes, lacking, tokens = capsys.readouterr().out.splitlines()
    assert sizes == "films, seed 0: 20 train, 10 dev, 100 test examples"
    assert classes == "classes (train/dev/test): rare 0/0/30, usual 20/10/70"
    assert lacking == "train or dev has no example of the class rare"
    middle = f"tokens per example: median {np.median(lengths):.0f}, 95 % have 30 or fewer; "
    assert tokens.startswith(middle) and tokens.endswith(" of 130 are cut at --max_length 30")
    whole = [len(text.split()) + 2 for text in texts]
    assert data.test.cut == sum(n > 30 for n in whole) < sum(n >= 30 for n in whole)
    parts = {"train": data.train, "dev": data.dev, "test": data.test}
    assert data.description == {
        **{"task": "classification", "test_split": "test", "classes": ["rare", "usual"]},
        **{"official": 100, "train": 20, "dev": 10, "test": 100},
        **{f"{name}_sha256": split.sha256() for name, split in parts.items()},
        "class_counts": {"train": [0, 20], "dev": [0, 10], "test": [30, 70]},
    }


def test_a_seed_s_learning_rates_share_their_data(models, tmp_path, monkeypatch):
    """And the seeds what they have in common: no text is tokenized twice in a process."""
    seen, tokenize = [], splits.tokenize

    def count(texts, *args, **options):
        seen.extend(texts)
        return tokenize(texts, *args, **options)

    monkeypatch.setattr(splits, "tokenize", count)
    flags = ["--dataset", tickets(tmp_path / "t.csv"), "--model", models("distilbert")]
    flags += ["--max_length", 16]
    one, two = (load(tmp_path, *flags, "--lr", lr)[1] for lr in (1e-3, 2e-3))
    assert one is two is not load(tmp_path, *flags, seed=1)[1]
    assert len(seen) == len(set(seen)) == 150


# ------------------------------------------------------------------- what the tokenizer gives else


def typed(models, tmp_path, kind="bert", head="", **form):
    """A tiny model that tells two texts apart, with a tokenizer that gives segment ids."""
    tokenizer, special = tiny_tokenizer(kind), [("[CLS]", 2), ("[SEP]", 3)]
    pair = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"} | form
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**pair, special_tokens=special)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    model = models(kind, head, type_vocab_size=3)
    return with_tokenizer(model, tokenizer, tmp_path / "typed")


@pytest.mark.parametrize("form", [{}, {"single": "$A [SEP] [CLS]:2", "pair": "$A $B:1"}])
@pytest.mark.parametrize("second", [True, False])
def test_what_is_scored_is_what_pipeline_serves(second, form, models, tmp_path):
    """With the segment ids that the tokenizer gives for pairs, and XLNet's for a single text."""
    texts, labels = sentences(40, 7)
    columns = {"text": texts, "label": labels} | ({"text_pair": texts[::-1]} if second else {})
    flags = folder_flags(models, tmp_path / "pairs", 64, columns)
    flags += ["--model", typed(models, tmp_path, **form)]
    run, data, base, _ = ready(lora, tmp_path, *flags, "--export", tmp_path / "exported")
    wanted = None if not second and not form else {0, 1} if second else {0, 2}
    assert wanted == (None if data.test.types is None else set(data.test.types.tolist()))
    stir(base)
    scored = common.evaluate(run, data, base)["metrics"]["test"]["loss"]
    export(run, base)
    serve = pipeline("text-classification", str(tmp_path / "exported"), top_k=None)
    given = [{"text": a, "text_pair": b} for a, b in zip(texts, texts[::-1], strict=True)]
    chances = [{c["label"]: c["score"] for c in row} for row in serve(given if second else texts)]
    losses = [-math.log(row[str(y)]) for row, y in zip(chances, labels, strict=True)]
    assert scored == pytest.approx(sum(losses) / 40, rel=1e-5)


def test_segment_ids_of_blocks(models, text_dir, tmp_path):
    """Funnel's [CLS] has a segment of its own."""
    folder = typed(models, tmp_path, head="MaskedLM", single="[CLS]:2 $A [SEP]", pair="$A $B")
    _, data = load(tmp_path, *text_flags(models, text_dir), "--model", folder)
    first = torch.zeros_like(data.test.tokens)
    first[data.test.starts[:-1]] = 2
    assert torch.equal(data.test.types, first)


def test_tokenizers_written_in_python(tmp_path, monkeypatch):
    """ESM's reads a protein letter by letter and gives no offsets; `<eos>` in a text is text."""
    names = ["<cls>", "<pad>", "<eos>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    tokenizer = EsmTokenizer(str(tmp_path / "vocab.txt"))
    assert not tokenizer.is_fast
    parts = [random.Random(i).choices(names[4:24], k=9 + i) for i in range(40)]
    parts[3] += ["<eos>", "A", "<mask>"]
    parts[5] = ["A", "C", "<unk>", "D", "<unk>"]
    ids = [[3 if name[0] == "<" else names.index(name) for name in part] for part in parts]
    rows = {"text": [*map("".join, parts)], "pair": None, "label": [0] * 40}
    data = Examples(rows, rows, rows, None, "test")
    monkeypatch.setattr(splits, "load_tokenizer", lambda model: (tokenizer, None))
    made = splits.labelled_tokens(data, "esm", 30, 1)[0].of(range(40))
    assert [row.tolist() for row, *_ in made] == [[0, *row[:28], 2] for row in ids]
    assert [cut for *_, cut in made] == [len(row) >= 28 for row in ids]  # it does not tell
    tokens, known = stream(tokenizer, rows["text"])
    assert tokens.tolist() == [token for row in ids for token in row]
    assert known.tolist() == [token != 3 for token in tokens.tolist()]


@pytest.mark.parametrize("fill", [" ", "the ", "x"])
def test_a_very_long_text_is_cut_before_it_is_tokenized(fill, monkeypatch):
    """Where that changes no token that is read: blanks in front or one long word need more."""
    tokenizer, sizes = tiny_tokenizer("bert"), []
    text = fill * 40_000 + " a film was not so good " * 20_000
    columns = {"text": [text, "a film"], "pair": None, "label": [0, 1]}
    plain = tokenizer(text, truncation=True, max_length=16)["input_ids"]
    tokenize = splits.tokenize

    def record(texts, *args, **options):
        sizes.append(len(texts[0]))
        return tokenize(texts, *args, **options)

    monkeypatch.setattr(splits, "tokenize", record)
    (ids, _, cut), (short, *_) = splits.Tokens(columns, tokenizer, 0, 16).of([0, 1])
    assert ids.tolist() == plain and cut and short.tolist() == tokenizer("a film")["input_ids"]
    assert sizes[0] == (1600 if fill == "the " else 160_000)


@pytest.mark.skipif(not (DATA / "sst2").is_dir(), reason="the real data is not here")
def test_the_real_sst2(by_text, tmp_path):
    """Dev is 500 whole sentences; no training row stands word for word in one, or in a held one.

    The phrases are recognized by the data: a copy in another folder is cut alike.
    """
    rows, copy = read_examples("sst2", DATA), tmp_path / "mine"
    shutil.copytree(DATA / "sst2", copy)
    assert read_examples(str(copy), "").whole == rows.whole
    train, dev, test, official = cut_in_three(rows, heldout=3000)
    _, dev1, again, _ = cut_in_three(rows, heldout=3000, seed=1)
    assert len(rows.plain) == 67_349 and official == 872 and len(test.lengths) == 3872
    assert len(dev.lengths) == 500 and torch.equal(test.tokens, again.tokens)
    words, draw = [" ".join(text.split()) for text in by_text], random.Random(0)
    train, dev, held, dev1 = (
        [words[i] for i in part.tokens.tolist()] for part in (train, dev, test, dev1)
    )
    held, everything = held[872:], "".join(f" {text} \n" for text in rows.plain)
    for text in draw.sample(dev, 20) + draw.sample(held, 20):
        assert everything.count(f" {text} ") == 1  # a whole sentence stands in no other row
    inside = sum(everything.count(f" {text} ") > 1 for text in draw.sample(rows.plain, 60))
    assert inside > 40  # where most rows stand in another
    left, taken = set(train), "".join(f" {text} \n" for text in dev + held)
    for text in draw.sample(rows.plain, 1500):
        assert (text in left) == (f" {text} " not in taken)
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
        (tokens, starts, labels, None, tokens),
    ]
    hashes = [splits.Split(*part).sha256() for part in parts]
    assert len(set(hashes)) == len(parts)
    copy = splits.Split(tokens.clone(), starts.clone(), labels.clone(), None)
    assert copy.sha256() == hashes[0]


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
    columns = {"text": sentences(60, 0)[0], "label": [i % 3 for i in range(60)]}
    for name in ("demographics", "imdb"):
        flags = folder_flags(models, tmp_path / name, 24, columns)
    (tmp_path / "base").symlink_to(models("distilbert"))
    made = set()
    for form in ("{}", "{}/", "./{}"):
        names = ["--dataset", form.format("demographics"), "--model", form.format("base")]
        run, data = load("out", *flags, *names)
        made.add(json.dumps(run.settings))
        assert data.classes == ["0", "1", "2"] and data.official == 60
    assert len(made) == 1 and '"dataset": "demographics"' in made.pop()


# ----------------------------------------------------------------------------------- running text


def words_of(text_dir, name):
    return " ".join(columns_of(Path(text_dir) / "wikitext2", name)["text"]).split()


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
    tokenizer = tiny_tokenizer("llama")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
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
    flags = batches.predicted_tokens(data, data.train, 0, 0).is_predicted
    assert flags.tolist() == data.train.tokens.gt(2).tolist()  # [PAD], [UNK], [CLS] come first


def with_tokenizer(model, tokenizer, folder):
    """A copy of a checkpoint with another tokenizer."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(Path(model) / name)
    tokenizer.save_pretrained(folder)
    return str(folder)


def stream(tokenizer, texts):
    """Running text as (tokens, whether each is scored)."""
    columns = {"text": texts, "pair": None, "label": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "load_tokenizer", lambda model: (tokenizer, None))
        return splits.read_streams(Examples(*[columns] * 3, None, "test"), "made")["train"]


@pytest.mark.parametrize(
    "unk, text, tokens, known",
    [  # the words of "the a film" are 6 7 8; [END] is the end of text
        ("[UNK]", "the <unk> a<unk> film", [6, 1, 7, 1, 8], "10101"),
        ("[END]", "the <unk> a<unk> film", [6, 3, 4, 5, 7, 3, 4, 5, 8], "100010001"),
        (None, "the <unk> a<unk> film", [6, 3, 4, 5, 7, 3, 4, 5, 8], "100010001"),
        # What the tokenizer does not know beside `<unk>` is unknown, too, where it can say so.
        ("[UNK]", "the zebra < unk >", [6, 1, 3, 4, 5], "10111"),
        ("[END]", "the < unk > a", [6, 3, 4, 5, 7], "11111"),
    ],
)
def test_unk_by_hand(unk, text, tokens, known):
    """One unknown token where that is a token of its own; else spelled out and not scored."""
    names = ["[PAD]", "[UNK]", "[END]", "<", "unk", ">", *WORDS[:-1]]  # as GPT-2 has their bytes
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "[END]", "pad_token": "[PAD]"} | ({"unk_token": unk} if unk else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    ids, scorable = stream(tokenizer, ["", f" {text} \n", " \n"])
    assert ids.tolist() == tokens and scorable.tolist() == [c == "1" for c in known]


@pytest.mark.parametrize("unknown, own", [("[UNK]", True), ("<|endoftext|>", False)])
def test_unk_in_byte_level_vocabularies(unknown, own):
    """RoBERTa's and GPT-2's way of writing tokens: every byte of the rest stays, once."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), unknown, "Ġ<"]
    core = Tokenizer(BPE({token: i for i, token in enumerate(letters)}, merges=[("Ġ", "<")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"unk_token": unknown, "eos_token": "[END]" if own else unknown}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokens, known = stream(tokenizer, ["thé <unk> sat on <unk> mats\n", "", "<unk>\n"])
    text = tokenizer.decode(tokens[known].tolist())
    assert text == "thé sat on mats\n\n"  # the blank goes with the piece " <"
    others = tokens[~known].tolist()
    unk = [tokenizer.unk_token_id] * 3
    assert others == unk if own else tokenizer.decode(others) == " <unk> <unk><unk>"
