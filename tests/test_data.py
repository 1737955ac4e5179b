"""From files to batches: splits, tokens, masks and order, each against the tokenizer itself or a brute-force computation."""

import hashlib
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS, sentences, tiny_tokenizer, write_rows

import common
import lora

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(out, *words, seed=0):
    """The run and the Data of one lora.py command line."""
    args = lora.parse_args(
        lora.__doc__, lora.__file__, lora.add_args, ["--out", out, "--seeds", seed, *words]
    )
    run = next(common.runs(args))
    return run, common.load_data(run)


def rows_of(split, used=True):
    """The token lists of a split: of the rows that are used, or of all that it holds."""
    rows = split.rows.tolist() if used else range(len(split.starts) - 1)
    return [split.tokens[split.starts[i] : split.starts[i + 1]].tolist() for i in rows]


def labelled(split):
    return list(zip(map(tuple, rows_of(split)), split.labels[split.rows].tolist(), strict=True))


def parquet(folder, name):
    import datasets

    rows = datasets.Dataset.from_parquet(str(Path(folder) / f"{name}.parquet"))
    return {key: list(rows[key]) for key in rows.column_names}


def subsequence(short, long):
    long = iter(long)
    return all(any(item == other for other in long) for item in short)


def binomial(successes, trials, p):
    """Whether a count is within five standard deviations of what probability p gives."""
    return abs(successes - trials * p) < 5 * math.sqrt(trials * p * (1 - p))


# ------------------------------------------------------------------------------------------------ classification rows


@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_rows_are_the_tokenizers_own_output(models, reviews, tmp_path, kind):
    """Text by text, truncated at 9 tokens: what the tokenizer gives, in the file's order, with the file's labels."""
    _, data = load(tmp_path, "--dataset", reviews, "--model", models(kind), "--max_length", 9)
    tokenizer = tiny_tokenizer(kind)
    wanted = {}
    for name in ("train", "test"):
        columns = parquet(reviews, name)
        ids = [
            tuple(tokenizer(text, truncation=True, max_length=9)["input_ids"])
            for text in columns["text"]
        ]
        wanted[name] = list(zip(ids, columns["label"], strict=True))
    assert (
        max(len(ids) for ids, _ in wanted["train"])
        == 9
        > min(len(ids) for ids, _ in wanted["train"])
    )
    assert labelled(data.eval) == wanted["test"]
    assert sorted(labelled(data.train) + labelled(data.dev)) == sorted(wanted["train"])
    assert subsequence(labelled(data.train), wanted["train"]) and subsequence(
        labelled(data.dev), wanted["train"]
    )
    assert len(data.dev.rows) == 12 and data.classes == 2 and data.eval_split == "test"


def test_dev_of_a_folder(models, tmp_path):
    """A tenth of the rows; no training row has a dev row's text, however often a text is repeated; the run seed is no part."""
    texts, labels = sentences(40, 5)
    texts, labels = texts * 3, labels * 3
    for name in ("train", "validation"):
        write_rows(tmp_path / "twice", name, {"text": texts, "label": labels})
    flags = ["--dataset", tmp_path / "twice", "--model", models("distilbert"), "--max_length", 32]
    _, data = load(tmp_path, *flags)
    _, other = load(tmp_path, *flags, seed=7)
    dev, train = map(tuple, (rows_of(data.dev), rows_of(data.train)))
    assert len(dev) == 12 and not set(map(tuple, dev)) & set(map(tuple, train))
    everything = [tiny_tokenizer("distilbert")(text)["input_ids"] for text in texts]
    assert list(train) == [ids for ids in everything if ids not in dev]  # nothing else is lost
    assert data.sha256 == other.sha256 and data.eval_split == "validation"


def test_dev_is_at_most_a_thousand_rows():
    train, dev = common.cut_dev([str(i) for i in range(12_000)], phrases=False)
    assert len(dev) == 1000 and sorted(train + dev) == list(range(12_000)) and dev == sorted(dev)


def phrases(n, seed):
    """Sentences, most followed by some of their own parts, as in SST-2, in random order."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        words = draw.choices(WORDS, k=draw.randint(4, 9))
        rows.append(" ".join(words))
        for _ in range(draw.randint(0, 6)):
            start = draw.randrange(len(words))
            rows.append(" ".join(words[start : start + draw.randint(1, 5)]))
    rows += draw.choices(rows, k=10)  # and some rows twice
    draw.shuffle(rows)
    return rows


def inside(part, whole):
    """Whether `part` stands word for word in `whole`, by plain text search."""
    return f" {part} " in f" {whole} "


@pytest.fixture(scope="module")
def phrase_dir(tmp_path_factory):
    """A --data_dir with an sst2 in the real one's columns; its test labels are hidden, as there."""
    folder = tmp_path_factory.mktemp("phrases")
    texts = phrases(50, 0)
    write_rows(
        folder / "sst2",
        "train",
        {
            "idx": list(range(len(texts))),
            "sentence": texts,
            "label": [i % 2 for i in range(len(texts))],
        },
    )
    write_rows(
        folder / "sst2",
        "validation",
        {"idx": [0, 1, 2], "sentence": phrases(1, 9)[:3], "label": [0, 1, 1]},
    )
    write_rows(folder / "sst2", "test", {"idx": [0], "sentence": ["a film"], "label": [-1]})
    return str(folder)


def test_dev_of_phrases(models, phrase_dir, tmp_path):
    """Dev rows stand in no other row; the training rows are exactly those that stand in no dev row."""
    _, data = load(
        tmp_path,
        "--dataset",
        "sst2",
        "--data_dir",
        phrase_dir,
        "--model",
        models("distilbert"),
        "--max_length",
        32,
    )
    tokenizer, texts = (
        tiny_tokenizer("distilbert"),
        parquet(Path(phrase_dir) / "sst2", "train")["sentence"],
    )
    dev, train = (
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows_of(split)]
        for split in (data.dev, data.train)
    )
    whole = {
        text for text in texts if not any(text != other and inside(text, other) for other in texts)
    }
    assert len(whole) < len(set(texts)) / 2  # the data is what this test is about
    assert len(dev) == len(set(dev)) == len(whole) // 2 and set(dev) <= whole
    assert subsequence(dev, texts)
    assert train == [text for text in texts if not any(inside(text, sentence) for sentence in dev)]
    assert data.eval_split == "validation" and len(data.eval.rows) == 3


@pytest.mark.skipif(not (DATA / "sst2").is_dir(), reason="the real data is not here")
def test_dev_of_the_real_sst2():
    """88 % of the rows stand in another row; the cut gives 1,000 whole sentences that hold no training row."""
    texts = [" ".join(text.split()) for text in parquet(DATA / "sst2", "train")["sentence"]]
    assert len(texts) == 67_349
    everything, draw = "".join(f" {text} \n" for text in texts), random.Random(0)
    sample = draw.sample(texts, 200)
    contained = sum(everything.count(f" {text} ") > 1 for text in sample) / len(sample)
    assert 0.80 < contained < 0.95
    train, dev = common.cut_dev(texts, phrases=True)
    assert len(dev) == 1000 and not set(train) & set(dev)
    for row in draw.sample(dev, 40):
        assert everything.count(f" {texts[row]} ") == 1
    in_dev, kept = "".join(f" {texts[row]} \n" for row in dev), set(train)
    for row in draw.sample(range(len(texts)), 2000):
        assert (row in kept) == (f" {texts[row]} " not in in_dev)


@pytest.mark.parametrize(
    "kind, task", [("distilbert", "rows"), ("distilbert", "masked"), ("gpt2", "causal")]
)
def test_subsets_do_not_depend_on_the_seed(models, reviews, text_dir, tmp_path, kind, task):
    """The same part of the same splits whatever the run's seed, in the files' order; the whole is what it is without."""
    flags = (
        ["--dataset", reviews, "--model", models(kind)]
        if task == "rows"
        else [
            "--dataset",
            "wikitext2",
            "--data_dir",
            text_dir,
            "--model",
            models(kind, "" if kind == "gpt2" else "MaskedLM"),
        ]
    )
    flags += ["--max_length", 12]
    _, whole = load(tmp_path, *flags)
    parts = [
        load(tmp_path, *flags, "--train_samples", 30, "--eval_samples", 9, seed=seed)[1]
        for seed in (0, 1)
    ]
    assert parts[0].sha256 == parts[1].sha256 != whole.sha256
    assert parts[0].subset and not whole.subset
    for name, size in (("train", 30), ("dev", 9), ("eval", 9)):
        part, other, full = (rows_of(getattr(data, name)) for data in (*parts, whole))
        assert part == other and len(part) == size < len(full) and subsequence(part, full)
        assert part != full[:size]  # random, not the head


def test_more_samples_than_rows_is_all_rows(models, reviews, tmp_path):
    flags = ["--dataset", reviews, "--model", models("distilbert"), "--max_length", 12]
    assert (
        load(tmp_path, *flags)[1].sha256
        == load(tmp_path, *flags, "--train_samples", 5000)[1].sha256
    )


def test_split_hash_changes_with_every_label_and_token(models, tmp_path):
    """One word or one label changed in any split changes the hash; writing the same rows again does not."""
    folder, seen, again = tmp_path / "rows", set(), 0
    for change in (None, None, "train word", "train label", "test word", "test label"):
        for name, seed in (("train", 0), ("test", 1)):
            texts, labels = sentences(30, seed)
            if change == f"{name} word":
                texts[4] = "dog " + texts[4]
            if change == f"{name} label":
                labels[4] = 1 - labels[4]
            write_rows(folder / str(again), name, {"text": texts, "label": labels})
        seen.add(
            load(
                tmp_path,
                "--dataset",
                folder / str(again),
                "--model",
                models("distilbert"),
                "--max_length",
                32,
            )[1].sha256
        )
        again += 1
    assert len(seen) == again - 1


@pytest.mark.parametrize("kind", ["distilbert", "gpt2", "llama"])
def test_odd_texts_train_normally(models, tmp_path, monkeypatch, kind):
    """Empty strings, blanks, emoji, other scripts, line breaks, twenty thousand words: a finished run, finite scores."""
    monkeypatch.setattr(common, "time_inference", lambda *_: {})
    odd = [
        "",
        " ",
        "\n\t",
        "🎬🍿😀",
        "это не кино",
        "第一部电影",
        "the " * 20_000,
        "x" * 10_000,
        "\x00",
        "good\x00bad",
        "<unk>",
        "[SEP] [CLS] [MASK] [PAD]",
        "a film\r\nof two lines",
    ]
    for name, n in (("train", 3), ("test", 2)):
        texts = odd + [f"{text[:99]} {word}" for word in WORDS[: n - 1] for text in odd]
        write_rows(
            tmp_path / "odd", name, {"text": texts, "label": [i % 2 for i in range(len(texts))]}
        )
    [path] = lora.main(
        [
            "--dataset",
            tmp_path / "odd",
            "--model",
            models(kind),
            "--max_length",
            16,
            "--epochs",
            1,
            "--batch_size",
            4,
            "--out",
            tmp_path / "out",
        ]
    )
    result = json.loads(path.read_text())
    assert math.isfinite(result["metrics"]["loss"]) and result["split"]["eval"] == 26
    assert all(math.isfinite(point["train_loss"]) for point in result["curve"])


# ------------------------------------------------------------------------------------------------ text


def lines_of(text_dir, name):
    """The lines of a wikitext2 split that hold anything, as the task wants them: `<unk>` is the unknown token."""
    return [text for text in parquet(Path(text_dir) / "wikitext2", name)["text"] if text.strip()]


def test_blocks_of_masked_lm(models, text_dir, tmp_path):
    """[CLS] … [SEP], 12 tokens each but the last; together the tokenizer's own stream, one unknown token per `<unk>`."""
    _, data = load(
        tmp_path,
        "--dataset",
        "wikitext2",
        "--data_dir",
        text_dir,
        "--model",
        models("distilbert", "MaskedLM"),
        "--max_length",
        12,
    )
    tokenizer = tiny_tokenizer("distilbert")
    for name, source in (("train", "train"), ("dev", "validation"), ("eval", "test")):
        lines, blocks = lines_of(text_dir, source), rows_of(getattr(data, name))
        words = [word for line in lines for word in line.split()]
        wanted = [
            tokenizer.unk_token_id if word == "<unk>" else tokenizer.convert_tokens_to_ids(word)
            for word in words
        ]
        assert all(
            block[0] == tokenizer.cls_token_id and block[-1] == tokenizer.sep_token_id
            for block in blocks
        )
        assert all(len(block) == 12 for block in blocks[:-1]) and 3 <= len(blocks[-1]) <= 12
        assert [token for block in blocks for token in block[1:-1]] == wanted
        assert (
            wanted.count(tokenizer.unk_token_id) == sum(line.count("<unk>") for line in lines) > 5
        )
    assert data.task == "mlm" and data.unknown == tokenizer.unk_token_id


def test_blocks_of_causal_lm(models, text_dir, tmp_path):
    _, data = load(
        tmp_path,
        "--dataset",
        "wikitext2",
        "--data_dir",
        text_dir,
        "--model",
        models("llama", "CausalLM"),
        "--max_length",
        12,
    )
    tokenizer = tiny_tokenizer("llama")
    blocks, words = (
        rows_of(data.train),
        [word for line in lines_of(text_dir, "train") for word in line.split()],
    )
    assert all(len(block) == 12 for block in blocks[:-1]) and data.task == "clm"
    assert [token for block in blocks for token in block] == [
        tokenizer.unk_token_id if word == "<unk>" else tokenizer.convert_tokens_to_ids(word)
        for word in words
    ]


def test_blocks_begin_with_the_token_that_the_tokenizer_puts_before_every_text(
    models, text_dir, tmp_path
):
    """As Llama's and Gemma's do. It is read in each block, and never predicted: [CLS] plays its part."""
    import shutil

    from tokenizers import processors

    folder = shutil.copytree(models("llama", "CausalLM"), tmp_path / "model")
    tokenizer = tiny_tokenizer("llama")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    tokenizer.bos_token = "[CLS]"
    tokenizer.save_pretrained(folder)
    options = ["--dataset", "wikitext2", "--data_dir", text_dir, "--max_length", 12]
    _, data = load(tmp_path / "a", *options, "--model", folder)
    _, plain = load(tmp_path / "b", *options, "--model", models("llama", "CausalLM"))
    blocks = rows_of(data.train)
    assert all(block[0] == 2 for block in blocks) and all(len(block) == 12 for block in blocks[:-1])
    assert [token for block in blocks for token in block[1:]] == [
        token for block in rows_of(plain.train) for token in block
    ]
    _, flags = common.predicted_tokens(data, data.train, 0, 0)
    assert not flags[data.train.tokens == 2].any() and flags.sum() == (data.train.tokens > 2).sum()


def test_tokenising_loses_nothing_between_its_chunks():
    tokenizer, texts = (
        tiny_tokenizer("bert"),
        [" ".join(WORDS[i % 7 : i % 11]) for i in range(2345)],
    )
    assert common.tokenise(texts, tokenizer, "train") == [
        tokenizer(text)["input_ids"] for text in texts
    ]


def test_one_folder_is_one_name(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts, labels = sentences(60, 0)
    for split in ("train", "test"):
        write_rows(tmp_path / "my", split, {"text": texts, "label": labels})
    (tmp_path / "base").symlink_to(models("distilbert"))
    made = {
        json.dumps(
            load("out", "--dataset", dataset, "--model", model, "--max_length", 24)[0].settings
        )
        for dataset, model in (("my", "base"), ("my/", "base/"), ("./my", "./base"))
    }
    assert len(made) == 1 and '"dataset": "my"' in made.pop()


@pytest.mark.parametrize("name", ["demographics", "demo_2", "./demo", "imdb/"])
def test_a_folder_is_a_folder_whatever_its_name_begins_with(models, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    texts, _ = sentences(60, 0)
    for split in ("train", "test"):
        write_rows(tmp_path / name, split, {"text": texts, "label": [i % 3 for i in range(60)]})
    run, data = load("out", "--dataset", name, "--model", models("distilbert"), "--max_length", 24)
    assert data.classes == 3 and len(data.eval.rows) == 60 and run.model != "demo"


@pytest.mark.parametrize("kind", ["roberta", "camembert", "xlm-roberta-xl"])
def test_the_longest_row_that_positions_from_pad_on_allow(models, reviews, tmp_path, capsys, kind):
    import transformers

    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=len(WORDS) + 5,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        pad_token_id=0,
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "model")
    flags = [
        "--dataset",
        reviews,
        "--model",
        tmp_path / "model",
        "--targets",
        "dense",
        "--max_length",
    ]
    with pytest.raises(SystemExit):
        load(tmp_path, *flags, 40)
    longest = int(capsys.readouterr().err.split("takes 4 to ")[1].split()[0])
    run, data = load(tmp_path, *flags, longest)
    model = common.load_base(run, data).eval()
    common.forward(model, common.fixed_batch(data, 2, longest))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        common.forward(model, common.fixed_batch(data, 2, longest + 1))


def test_logits_of_a_model_whose_head_passes_its_own_base_by(text_dir, tmp_path):
    """OPT's calls the decoder inside: the rows that do not count are dropped behind it."""
    import transformers

    config = transformers.OPTConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=0,
    )
    model = transformers.OPTForCausalLM(config)
    model.save_pretrained(tmp_path / "opt")
    tiny_tokenizer("llama").save_pretrained(tmp_path / "opt")
    run, data = load(
        tmp_path,
        "--dataset",
        "wikitext2",
        "--data_dir",
        text_dir,
        "--model",
        tmp_path / "opt",
        "--targets",
        "q_proj",
        "--max_length",
        12,
    )
    batch = common.fixed_batch(data, 3, 12)
    logits = common.forward(common.load_base(run, data).eval(), batch)
    theirs = model.eval()(input_ids=batch.ids, attention_mask=batch.attended.long()).logits[:, :-1]
    assert torch.allclose(logits, theirs.flatten(0, 1), atol=1e-5) and len(batch.target) == 33


@pytest.mark.parametrize("unknown", ["<unk>", "<|endoftext|>"])
def test_unk_is_one_token_in_byte_level_vocabularies(tmp_path, unknown):
    """GPT-2's and RoBERTa's way of writing tokens: `<unk>` is one unknown token, and adds no token of its own beside it."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), unknown])
    }
    core = Tokenizer(BPE(vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unknown, eos_token=unknown)
    unk = tokenizer.unk_token_id
    data = SimpleNamespace(task="clm", unknown=unk, mask=None, special=torch.tensor([unk]))
    run = SimpleNamespace(
        dataset="wikitext2", model="made here", max_length=8, train_samples=None, eval_samples=None
    )
    texts = ["the <unk> sat on <unk> mats\n", "", "<unk>\n"]
    raw = {name: {"text": texts} for name in ("train", "validation", "eval")}
    common.load_text(run, data, raw, tokenizer)
    tokens = [token for block in rows_of(data.train) for token in block]
    assert tokens.count(tokenizer.unk_token_id) == 3
    others = sum(len(part.encode()) for text in texts for part in text.split("<unk>"))
    assert len(tokens) - 3 in (
        others,
        others - 2,
    )  # each byte of the rest once; the blank before `<unk>` may go with it


def made_up(task, n=200_000, vocab=1000, length=50):
    """A Data and a Split of random tokens in blocks of `length`, special and unknown tokens among them."""
    tokens = torch.randint(
        vocab, (n,), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    data = SimpleNamespace(
        task=task,
        vocab=vocab,
        mask=4,
        pad=0,
        unknown=1,
        special=torch.arange(5),
        classes=None,
        decoder=task == "clm",
    )
    starts = torch.arange(0, n + 1, length)
    return data, common.Split(tokens, starts, None, torch.arange(len(starts) - 1))


def test_shares_of_masked_tokens():
    """15 % are predicted; of these 80 % read as the mask, 10 % as any token at random, 10 % as themselves (BERT, §3.1)."""
    data, split = made_up("mlm")
    inputs, flags = common.predicted_tokens(data, split, 0, 0)
    tokens, open_ = split.tokens, split.tokens > 4
    assert not flags[~open_].any() and torch.equal(inputs[~flags], tokens[~flags])
    n = int(flags.sum())
    assert binomial(n, int(open_.sum()), 0.15)
    masked, same = (inputs == data.mask) & flags, (inputs == tokens) & flags
    swapped = flags & ~masked & ~same
    # A random token is the mask, or by chance the same one, once in a thousand each.
    assert binomial(int(masked.sum()), n, 0.8 + 0.1 / 1000)
    assert binomial(int(same.sum()), n, 0.1 + 0.1 / 1000)
    assert binomial(int(swapped.sum()), n, 0.1 * 998 / 1000)
    drawn = inputs[swapped].long()
    assert drawn.min() >= 0 and drawn.max() < 1000
    for low in range(0, 1000, 100):  # spread over the whole vocabulary
        assert binomial(int(((drawn >= low) & (drawn < low + 100)).sum()), len(drawn), 0.1)


def test_masks_move_with_seed_and_epoch_only():
    data, split = made_up("mlm", n=5000)
    first = common.predicted_tokens(data, split, 0, 0)
    torch.manual_seed(99)  # whatever the global generator does
    again = common.predicted_tokens(data, split, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [
        common.predicted_tokens(data, split, *names)[1]
        for names in ((0, 1), (1, 0), ("evaluation",))
    ]
    assert all(not torch.equal(first[1], flags) for flags in others)
    overlap = int((first[1] & others[0]).sum())
    assert binomial(
        overlap, int(first[1].sum()), 0.15
    )  # a new epoch masks afresh, not the rest or the same


def test_masks_depend_on_neither_batch_size_nor_order_nor_subset(models, text_dir, tmp_path):
    """Row by row the same input, predictions and targets in batches of 1, 7 and 32, backwards, and within a subset."""
    flags = [
        "--dataset",
        "wikitext2",
        "--data_dir",
        text_dir,
        "--model",
        models("distilbert", "MaskedLM"),
        "--max_length",
        12,
    ]
    seen = []
    for size, backwards, more in (
        (1, False, []),
        (7, True, []),
        (32, False, []),
        (5, False, ["--train_samples", 20]),
    ):
        run, data = load(tmp_path, *flags, *more, "--batch_size", size)
        inputs, predicted = common.predicted_tokens(data, data.train, run.seed, 1)
        rows, found = data.train.rows.flip(0) if backwards else data.train.rows, {}
        for part in rows.split(size):
            batch = common.collate(data, data.train, part, inputs, predicted)
            targets = iter(batch.target.tolist())
            for i, row in enumerate(part.tolist()):
                length = int(batch.attended[i].sum())
                scored = batch.scored[i, :length].tolist()
                found[row] = (
                    batch.ids[i, :length].tolist(),
                    scored,
                    [next(targets) for hit in scored if hit],
                )
        seen.append(found)
    assert seen[0] == seen[1] == seen[2] and len(seen[3]) == 20
    assert all(seen[0][row] == value for row, value in seen[3].items())


def test_what_a_causal_model_predicts():
    """Every token but the first of its block and unknown ones; what it reads stays as it is."""
    data, split = made_up("clm", n=3000, vocab=12)
    inputs, flags = common.predicted_tokens(data, split, 0, 0)
    assert torch.equal(inputs, split.tokens)
    assert flags.tolist() == [
        i % 50 != 0 and token != 1 for i, token in enumerate(split.tokens.tolist())
    ]


# ------------------------------------------------------------------------------------------------ batches


def naive(task, decoder, rows, labels, inputs, flags, pad):
    """A Batch built token by token: lists of ids, attended, scored, target."""
    width = max(map(len, rows))
    ids, attended, scored, target = [], [], [], []
    for i, row in enumerate(rows):
        n = len(row)
        read = row if task == "classification" else inputs[i]
        ids.append([read[j] if j < n else pad for j in range(width)])
        attended.append([j < n for j in range(width)])
        if task == "classification":
            scored.append([j == (n - 1 if decoder else 0) for j in range(width)])
            target.append(labels[i])
        elif task == "mlm":
            scored.append([j < n and flags[i][j] for j in range(width)])
            target += [row[j] for j in range(n) if flags[i][j]]
        else:  # the output at j predicts token j + 1
            scored.append([j + 1 < n and flags[i][j + 1] for j in range(width)])
            target += [row[j + 1] for j in range(n - 1) if flags[i][j + 1]]
    return ids, attended, scored, target


@pytest.mark.parametrize(
    "task, decoder",
    [("classification", False), ("classification", True), ("mlm", False), ("clm", True)],
)
def test_collate_equals_a_plain_loop(task, decoder):
    draw = random.Random(0)
    rows = [[draw.randrange(12) for _ in range(draw.randint(1, 9))] for _ in range(40)]
    labels = [draw.randrange(3) for _ in rows]
    data = SimpleNamespace(
        task=task, decoder=decoder, pad=0, unknown=1, mask=4, vocab=12, special=torch.arange(5)
    )
    split = common.Split(*common.flat(rows), torch.tensor(labels), torch.arange(40))
    inputs, flags = common.predicted_tokens(data, split, 3, 0)
    cut = [(int(a), int(b)) for a, b in zip(split.starts, split.starts[1:], strict=False)]
    by_row = [
        [values[a:b].tolist() for a, b in cut] if values is not None else [None] * 40
        for values in (inputs, flags)
    ]
    for picked in ([7], [3, 1, 2], draw.sample(range(40), 40), [39, 0]):
        batch = common.collate(data, split, torch.tensor(picked), inputs, flags)
        wanted = naive(
            task,
            decoder,
            [rows[i] for i in picked],
            [labels[i] for i in picked],
            *([values[i] for i in picked] for values in by_row),
            pad=0,
        )
        assert tuple(tensor.tolist() for tensor in batch) == wanted
        assert batch.ids.dtype == batch.target.dtype == torch.int64
        assert batch.attended.dtype == batch.scored.dtype == torch.bool


@pytest.mark.parametrize("n, size", [(1, 4), (7, 8), (64, 8), (1001, 32)])
def test_order_covers_every_row_once_with_the_least_padding(n, size):
    lengths = torch.randint(1, 200, (n,), generator=torch.Generator().manual_seed(n))
    batches = common.order(lengths, size, 3, 1)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(n))
    assert sorted(map(len, batches)) == sorted(
        [size] * (n // size) + ([n % size] if n % size else [])
    )
    # The least padding that batches of this size can have: rows sorted by length, cut into pieces.
    ranked = sorted(lengths.tolist())
    least = sum(len(part) * max(part) for part in (ranked[i : i + size] for i in range(0, n, size)))
    assert sum(len(batch) * int(lengths[batch].max()) for batch in batches) == least


def test_order_depends_on_seed_and_epoch_only():
    lengths = torch.randint(1, 30, (300,), generator=torch.Generator().manual_seed(0))
    flat = [batch.tolist() for batch in common.order(lengths, 16, 5, 2)]
    torch.manual_seed(123)
    random.seed(5)
    assert flat == [batch.tolist() for batch in common.order(lengths, 16, 5, 2)]
    others = [
        [batch.tolist() for batch in common.order(lengths, 16, *names)]
        for names in ((5, 3), (6, 2))
    ]
    assert flat not in others and others[0] != others[1]
    means = [float(lengths[batch].float().mean()) for batch in flat]
    assert means != sorted(means) and means != sorted(
        means, reverse=True
    )  # long and short batches are mixed
    assert {frozenset(batch) for batch in flat} != {
        frozenset(batch) for batch in others[0]
    }  # other company each epoch


def test_batches_of_random_numbers_have_seeds_of_their_own():
    """stream() is a plain function of its names: hashes apart, the same in every process."""
    assert common.stream(0, "order", 1) == int.from_bytes(
        hashlib.sha256(b"(0, 'order', 1)").digest()[:7], "big"
    )
    names = [
        (seed, use, epoch)
        for seed in range(5)
        for use in ("order", "batches", "masks")
        for epoch in range(5)
    ]
    assert len({common.stream(*name) for name in names}) == len(names)
