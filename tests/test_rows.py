"""Raw rows: files, columns, labels, the cut and tokens, against brute force and exact messages."""

import math
import random

import datasets
import pytest
import torch
from conftest import WORDS, ready, result_of, rows_flags, sentences, tiny_tokenizer, write_rows
from tokenizers.pre_tokenizers import WhitespaceSplit

import lora
from harness.rows import Rows, cut, read_rows, tokenize

TEXTS, LABELS = sentences(40, 0)
NAMES = [["bad", "good"][label] for label in LABELS]


def write(folder, **changes):
    """40 + 40 good rows, but for the changes: train_text=…, test_label=…, label=None …"""
    for split in ("train", "test"):
        columns = {"text": TEXTS, "label": LABELS} | changes
        for key in changes:
            if key.startswith(("train_", "test_")):
                value, (where, name) = columns.pop(key), key.split("_", 1)
                columns |= {name: value} if where == split else {}
        columns = {name: values for name, values in columns.items() if values is not None}
        write_rows(folder, split, columns)
    return folder


def lines(labels=LABELS, **changes):
    """A CSV file's lines; changes: row3="another line"."""
    rows = [f"{text},{label}" for text, label in zip(TEXTS, labels, strict=True)]
    rows = [changes.get(f"row{i}", row) for i, row in enumerate(rows)]
    return ["text,label", *rows]


def files(folder, **contents):
    """Text files by name and ending: train_csv=[line, …]. test.csv is good unless it is given."""
    folder.mkdir(parents=True)
    for name, content in ({"test_csv": lines()} | contents).items():
        if content:
            name = ".".join(name.rsplit("_", 1))
            (folder / name).write_text("\n".join(content) + "\n")
    return folder


def named(folder, train, test):
    """The same rows in both splits, with names for classes; None: as strings."""
    for split, names in (("train", train), ("test", test)):
        table = datasets.Dataset.from_dict({"text": TEXTS, "label": NAMES})
        if names:
            table = table.cast_column("label", datasets.ClassLabel(names=names))
        folder.mkdir(exist_ok=True)
        table.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def read(folder):
    return read_rows(str(folder), "nowhere")


def refused(capsys, call, *words):
    """The one line, without the script's name, with which `call` ends the program."""
    with pytest.raises(SystemExit) as stop:
        call(*words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and len(error) < 600, error
    return error.split(": error: ")[1].rstrip("\n")


def test_plain_rows(tmp_path):
    found = read(write(tmp_path / "films"))
    assert found.train == found.test == {"text": TEXTS, "pair": None, "label": LABELS}
    assert (found.classes, found.test_split, found.validation) == (["0", "1"], "test", None)
    assert found.whole is None and read(tmp_path / "films") is found  # read once


def test_rows_of_glue(tmp_path):
    """TSV files in shards, whose quotes are letters; a hidden test split, dev for validation."""
    rows = [f'{i}\t" {text}\tNone\t{i % 2}' for i, text in enumerate(TEXTS)]
    rows = ["idx\tsentence1\tsentence2\tlabel", *rows]
    parts = {f"train-0000{i}-of-00002_tsv": rows for i in range(2)}
    test = ["idx\tsentence1\tsentence2", "0\ta\tb"]
    found = read(files(tmp_path / "mrpc", **parts, dev_tsv=rows, test_tsv=test, test_csv=None))
    assert found.train["text"] == 2 * found.test["text"] == [f'" {text}' for text in 2 * TEXTS]
    assert found.train["pair"] == ["None"] * 80 and found.test_split == "validation"


@pytest.mark.parametrize("text", ["text", "sentence", "sentence1"])
@pytest.mark.parametrize("pair", ["text_pair", "sentence2"])
def test_columns_by_other_names(tmp_path, text, pair):
    columns = {text: TEXTS, pair: TEXTS[::-1], "labels": LABELS, "idx": LABELS}
    for split in ("train", "test"):
        write_rows(tmp_path / "pairs", split, columns)
    found = read(tmp_path / "pairs")
    assert found.train == found.test == {"text": TEXTS, "pair": TEXTS[::-1], "label": LABELS}


def test_quotes_and_words_for_nothing_in_a_csv_file(tmp_path):
    """Inside a text a quote is a letter; around one it keeps commas and line breaks."""
    rows = ["None,0", "NA,1", 'the 12" film,1', '"a film,\nof ""two"" lines",0', "nan,1", "null,0"]
    rows = {f"row{i}": row for i, row in enumerate(rows)}
    found = read(files(tmp_path / "films", train_csv=lines(**rows))).train
    texts = ["None", "NA", 'the 12" film', 'a film,\nof "two" lines', "nan", "null"]
    assert found["text"] == texts + TEXTS[6:]
    assert found["label"] == [0, 1, 1, 0, 1, 0] + LABELS[6:]


@pytest.mark.parametrize("kind, mark", [("csv", ","), ("tsv", "\t")])
def test_a_text_with_a_bare_separator_is_not_cut(kind, mark, tmp_path, capsys):
    """pandas would take what stands before it for the row's number."""
    rows = f"text{mark}label\nbad{mark} and long{mark}0\nfine{mark} and short{mark}1\n"
    for name in ("train", "test"):
        (tmp_path / f"{name}.{kind}").write_text(rows)
    error = refused(capsys, read_rows, str(tmp_path), "data")
    assert f".{kind}: a row has more cells than the first line has names" in error


@pytest.mark.parametrize(
    "train, test, order",
    [
        (["bad", "good"], ["good", "bad"], ["bad", "good"]),
        (["good", "bad"], ["bad", "good"], ["good", "bad"]),  # the training file's own order
        (["good", "bad"], None, ["good", "bad"]),
        (None, ["good", "bad"], ["bad", "good"]),  # names without an order: by name
    ],
)
def test_classes_are_mapped_by_name(tmp_path, train, test, order):
    found = read(named(tmp_path / "films", train, test))
    assert found.classes == order
    assert found.train["label"] == found.test["label"] == [order.index(name) for name in NAMES]


def test_numbers_are_counted_and_names_sorted(tmp_path):
    """Of twelve classes 2 comes before 10."""
    found = read(write(tmp_path / "numbers", label=[i % 12 for i in range(40)]))
    assert found.classes == [str(i) for i in range(12)]
    assert found.train["label"] == [i % 12 for i in range(40)]
    found = read(write(tmp_path / "names", label=[f"{3 - i % 3} stars" for i in range(40)]))
    assert found.classes == ["1 stars", "2 stars", "3 stars"]
    assert found.test["label"] == [2 - i % 3 for i in range(40)]


@pytest.mark.parametrize("label, scored", [([-1] * 40, "validation"), (LABELS, "test")])
def test_hidden_test_labels_beside_validation(label, scored, models, tmp_path, capsys):
    """As SST-2 has them: validation is scored, and a line says so. With labels test is scored."""
    write(tmp_path / "films", test_label=label)
    write_rows(tmp_path / "films", "validation", {"text": TEXTS[:9], "label": LABELS[:9]})
    _, data, *_ = ready(lora, tmp_path, *rows_flags(models, tmp_path / "films"))
    size = 9 if scored == "validation" else 40
    assert f"{size} test rows (test: {scored})" in capsys.readouterr().out
    assert data.description["test_split"] == scored and data.official == size


# --------------------------------------------------------------------------------- what is refused


TRAIN, TEST, DULL = "of the train split has", "of the test split has", ["bad", "dull", "good"]
A, NUMBERS = lines(), ["text,label", *(f"{i},{i % 2}" for i in range(40))]
SWALLOWED = lines(row3=f'"{TEXTS[3]},{LABELS[3]}', row9=f'{TEXTS[9]}",{LABELS[9]}')
UNLABELLED = lines(labels=NAMES, row3=f"{TEXTS[3]},")
REFUSED = [  # how the folder is made, what the line says
    (write, {"sentence": TEXTS}, "train split has both text and sentence; drop or rename one"),
    (write, {"labels": LABELS}, "train split has both label and labels; drop or rename one"),
    (write, {"text_pair": TEXTS, "sentence2": TEXTS}, "has both text_pair and sentence2; drop or"),
    (write, {"test_sentence2": TEXTS}, "of train and test only one has a second text"),
    (write, {"sentence2": [*TEXTS[1:], None]}, f"row 39 {TRAIN} no text; fill it or drop the row"),
    (write, {"text": None, "review": TEXTS}, "split has the columns label, review; needed: text"),
    (write, {"test_label": None}, "test split has the columns text; needed: text (or sentence) an"),
    (files, {"train_csv": A[1:]}, "needed: text (or sentence) and label; a CSV or TSV file names "),
    (write, {"test_text": [None, *TEXTS[1:]]}, f"row 0 {TEST} no text; fill it or drop the row"),
    (write, {"train_text": [*TEXTS[1:], " "]}, f"row 39 {TRAIN} no text; fill it or drop the row"),
    (files, {"train_csv": lines(row3=",1")}, f"row 3 {TRAIN} no text; fill it or drop the row"),
    (files, {"train_csv": NUMBERS}, f"row 0 {TRAIN} 0 for a text; wanted: words"),
    (write, {"train_text": ["the film"] * 40}, "the train split has the same text in all rows"),
    (files, {"train_csv": UNLABELLED}, f"row 3 {TRAIN} no label (empty or -1); fill it or drop th"),
    (write, {"test_label": [*LABELS[1:], -1]}, f"row 39 {TEST} no label (empty or -1); fill it or"),
    (write, {"label": [i / 2 for i in LABELS]}, f"row 0 {TRAIN} the label 0.0; wanted: 0, 1, … or"),
    (write, {"label": [i > 0 for i in LABELS]}, f"row 0 {TRAIN} the label False; wanted: 0, 1, …"),
    (write, {"label": [2 * i for i in LABELS]}, "has the labels 0, 2; wanted: at least two classe"),
    (write, {"label": [0] * 40}, "train split has the labels 0; wanted: at least two classes, eac"),
    (write, {"test_label": [i % 3 for i in range(40)]}, "has the label '2'; train has 0, 1"),
    (named, {"train": None, "test": DULL}, "test split has the label 'dull'; train has bad, good"),
    (named, {"train": DULL, "test": None}, "train split has the labels bad, good; wanted: at leas"),
    (files, {"train_csv": SWALLOWED}, f"row 3 {TRAIN[:-4]} holds other rows in its text, from a l"),
    (files, {"train_csv": lines(row3='"a,1')}, "cannot read the files in films (Error tokenizing"),
    (files, {"train_csv": A, "train_old_csv": A}, "train.csv and train_old.csv would both be the"),
    (files, {"train_csv": A, "train_tsv": A}, "train.csv and train.tsv would both be the train sp"),
    (files, {"train_csv": A, "test_csv": None}, "needs a train and a test file; found train"),
    (write, {"test_text": [], "test_label": []}, "cannot read the files in films ("),
    (files, {"test_csv": None}, "cannot read the files in films ("),
    (files, {"train_parquet": ["torn"], "test_csv": None}, "cannot read the files in films (Parqu"),
]


@pytest.mark.parametrize("make, changes, message", REFUSED)
def test_what_cannot_be_used_is_one_line(make, changes, message, tmp_path, capsys):
    make(tmp_path / "films", **changes)
    error = refused(capsys, read, tmp_path / "films")
    assert error.startswith(f"--dataset {tmp_path / 'films'}: ") and message in error


def test_an_empty_cell_among_labels_that_are_numbers(tmp_path, capsys):
    files(tmp_path / "films", train_csv=lines(row3=f"{TEXTS[3]},"))
    assert "row 3 of the train split has no label" in refused(capsys, read, tmp_path / "films")


def test_running_text(tmp_path, capsys):
    """It is read as it is, blank lines and `<unk>` too; all three splits are needed, and whole."""
    texts = {name: ["", " the <unk> film \n", name] for name in ("train", "validation", "test")}
    for split, spoiled, message in (
        ("train", [1, 2], "row 0 of the train split has 1 for a text; wanted: words"),
        ("validation", None, "needs a train, a validation and a test file; found train, test"),
        ("test", ["a", None], "row 1 of the test split has no text; fill it or drop the row"),
        (None, None, None),
    ):
        for name, column in (texts | {split: spoiled}).items():
            if column:
                write_rows(tmp_path / f"no {split}" / "wikitext2", name, {"text": column})
        if split:
            error = refused(capsys, read_rows, "wikitext2", str(tmp_path / f"no {split}"))
            assert error == f"--data_dir {tmp_path / f'no {split}'}: {message}"
    found = read_rows("wikitext2", str(tmp_path / "no None"))
    assert [getattr(found, name)["text"] for name in texts] == list(texts.values())


def test_running_text_may_come_as_csv(tmp_path):
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    for name in ("train", "validation", "test"):
        (folder / f"{name}.csv").write_text(f'text\n"a film, in {name}"\nthe end\n')
    found = read_rows("wikitext2", str(tmp_path))
    assert found.test["text"] == ["a film, in test", "the end"]


# ---------------------------------------------------------------------------------------- the cut


def phrases(n, seed):
    """Sentences, most followed by some of their own parts, as in SST-2; some rows twice."""
    draw, found = random.Random(seed), []
    for _ in range(n):
        words = draw.choices(WORDS, k=draw.randint(4, 9))
        found.append(" ".join(words))
        for _ in range(draw.randint(0, 6)):
            start = draw.randrange(len(words))
            found.append("  ".join(words[start : start + draw.randint(1, 5)]))
    return draw.sample(found, len(found)) + draw.choices(found, k=10)


@pytest.mark.parametrize("size", [5, 17, 1000])
def test_cut_of_phrases_by_text_search(size):
    """What is picked stands in no other row; the rest is what stands in no picked one."""
    texts = phrases(50, 0)
    found = Rows({"text": texts, "pair": None}, None, None, None, "test", phrases=True)
    plain = [f" {' '.join(text.split())} " for text in texts]
    whole = {a for a in plain if not any(a != b and a in b for b in plain)}
    assert len(whole) < len(set(plain)) / 2  # the data is what this test is about
    assert [plain[row] for row in found.whole] == sorted(whole, key=plain.index)
    picked, rest = cut(found, range(len(texts)), size, torch.Generator().manual_seed(0))
    assert len(picked) == min(size, len(whole) // 2) and {plain[row] for row in picked} <= whole
    joined = "\n".join(plain[row] for row in picked)
    assert rest == [row for row in range(len(texts)) if plain[row] not in joined]
    again, left = cut(found, rest, 3, torch.Generator().manual_seed(1))
    assert set(again) | set(left) <= set(rest) and not set(again) & set(left)


def test_cut_of_pairs():
    """Rows are equal where both texts are, blanks aside; at most half are picked."""
    columns = {"text": ["a", "a ", "a", "b", "b\n", "c"], "pair": ["x", "x", "y", "x", " x", "x"]}
    found, kinds = Rows(columns, None, None, None, "test"), [0, 0, 1, 2, 2, 3]
    for seed in range(9):
        picked, rest = cut(found, range(6), 9, torch.Generator().manual_seed(seed))
        gone = {kinds[row] for row in picked}
        assert len(picked) == 3 and rest == [row for row in range(6) if kinds[row] not in gone]


def test_tokenizing_loses_nothing_between_its_thousands():
    tokenizer = tiny_tokenizer("bert")
    texts = [" ".join(["the", *WORDS[i % 7 : i % 11]]) for i in range(2345)]
    wanted = [tokenizer(*both)["input_ids"] for both in zip(texts, texts[::-1], strict=True)]
    assert tokenize(texts, tokenizer, "train", texts[::-1]) == wanted


SPELLED = "the [SEP] film [CLS] [MASK] [PAD]"


def test_special_tokens_inside_a_text_are_text(capsys):
    """Spelled out in pieces; or one unknown token, where the piece is a word of the vocabulary."""
    tokenizer = tiny_tokenizer("distilbert")
    the, film, unknown = tokenizer.convert_tokens_to_ids(["the", "film", "[UNK]"])
    row = [the, *[unknown] * 3, film, *[unknown] * 9]  # `[`, `sep` and `]` are no words of its own
    assert tokenize([SPELLED], tokenizer, "train") == [[2, *row, 3]]
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    row = [the, unknown, film, *[unknown] * 3]
    assert tokenize([SPELLED, "the"], tokenizer, "train") == [[2, *row, 3], [2, the, 3]]
    ids, places = tokenize([SPELLED], tokenizer, "train", offsets=True)
    assert ids == [row] and SPELLED[slice(*places[0][1])] == "[SEP]"
    tokenizer.unk_token = None
    error = refused(capsys, tokenize, [SPELLED], tokenizer, "train")
    assert error == "--model: its tokenizer has no way to read [SEP] as text"


ODD = ["🎬🍿😀", "это не кино", "第一部电影", "the " * 20_000, "x" * 10_000, "\x00", "good\x00bad"]
ODD += ["<unk>", SPELLED, "a film\r\nof two lines", "nan", "'", '"']


@pytest.mark.parametrize("kind", ["distilbert", "gpt2", "llama"])
def test_odd_texts_train_normally(models, tmp_path, kind):
    texts = ODD + [f"{text[:99]} {word}" for word in WORDS[:2] for text in ODD]
    write(tmp_path / "odd", text=texts, label=[i % 2 for i in range(len(texts))])
    words = [*rows_flags(models, tmp_path / "odd", kind), "--epochs", 1, "--batch_size", 8]
    result, _ = result_of(lora, tmp_path, *words)
    assert all(map(math.isfinite, [*result["metrics"]["test"].values(), result["curve"][-1][2]]))
