"""Files, columns, labels, the cut and tokens: against brute force and exact messages."""

import math
import os
import random
import socket

import datasets
import huggingface_hub
import pytest
from conftest import (
    WORDS,
    ended,
    ready,
    result_of,
    rows_flags,
    sentences,
    tiny_tokenizer,
    write_rows,
)
from tokenizers.pre_tokenizers import WhitespaceSplit

import lora
from harness.rows import ENDINGS, TEXT_COLUMNS, Examples, read_examples, tokenize

TEXTS, LABELS = sentences(40, 0)
NAMES = [["bad", "good"][label] for label in LABELS]


def write(folder, **changes):
    """40 + 40 good examples, but for the changes: train_text=…, test_label=…, label=None …"""
    for split in ("train", "test"):
        columns = {"text": TEXTS, "label": LABELS}
        for key, values in changes.items():
            where, _, name = (
                key.rpartition("_") if key.startswith(("train_", "test_")) else ("", "", key)
            )
            columns |= {name: values} if where in ("", split) else {}
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
            (folder / ".".join(name.rsplit("_", 1))).write_text(
                "\n".join(content) + "\n", errors="surrogateescape"
            )
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
    return read_examples(str(folder), "nowhere")


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


@pytest.mark.parametrize("columns", [group for group in TEXT_COLUMNS if len(group) == 2])
def test_columns_of_text_pairs(tmp_path, columns, capsys):
    """Of QNLI, MNLI, QQP, RTE and PAWS; the order of the columns does not matter."""
    text, pair = columns
    rows = {"idx": LABELS, pair: TEXTS[::-1], "labels": LABELS, text: TEXTS}
    for split in ("train", "test"):
        write_rows(tmp_path / "pairs", split, rows)
    found = read(tmp_path / "pairs")
    assert found.train == found.test == {"text": TEXTS, "pair": TEXTS[::-1], "label": LABELS}
    assert capsys.readouterr().out == ""


def test_columns_with_words_that_are_not_read_are_named(tmp_path, capsys):
    rows = [f"{text},{i % 2},0{i},title {i}" for i, text in enumerate(TEXTS)]
    read(files(tmp_path / "films", train_csv=["sentence,label,id,title", *rows]))
    assert capsys.readouterr().out.endswith("/films: columns that are not read: id, title\n")


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
    rows = f"text{mark}label\nbad{mark} and long{mark}0\nfine{mark} and short{mark}1\n"
    (tmp_path / f"train.{kind}").write_text(rows)
    error = refused(capsys, read, tmp_path)
    assert f".{kind}: a line has more cells than the first line has names" in error


@pytest.mark.parametrize(
    "train, test, order",
    [
        (["bad", "good"], ["good", "bad"], ["bad", "good"]),
        (["good", "bad"], ["bad", "good"], ["good", "bad"]),  # the training file's own order
        (["good", "bad"], None, ["good", "bad"]),
        (None, ["good", "bad"], ["bad", "good"]),  # names without an order: by name
        (["dull", "good", "bad"], ["bad", "dull", "good"], ["dull", "good", "bad"]),
    ],
)
def test_classes_are_mapped_by_name(tmp_path, train, test, order):
    found = read(named(tmp_path / "films", train, test))
    assert found.classes == order
    assert found.train["label"] == found.test["label"] == [order.index(name) for name in NAMES]


def test_blanks_around_labels_and_column_names(tmp_path):
    rows = [
        f" {text} , {name}{' ' * (len(text) % 3)}" for text, name in zip(TEXTS, NAMES, strict=True)
    ]
    found = read(files(tmp_path / "a", train_csv=["text, label ", *rows], test_csv=lines(NAMES)))
    assert found.classes == ["bad", "good"] and found.train["label"] == found.test["label"]


def test_numbers_are_counted_and_names_sorted(tmp_path):
    """Of twelve classes 2 comes before 10; 1 to 5 stars need no 0."""
    for name, labels, classes in (
        ("zero", [i % 12 for i in range(40)], [str(i) for i in range(12)]),
        ("one", [5 - i % 5 for i in range(40)], ["1", "2", "3", "4", "5"]),
        ("names", [f"{3 - i % 3} stars" for i in range(40)], ["1 stars", "2 stars", "3 stars"]),
    ):
        found = read(write(tmp_path / name, label=labels))
        assert found.classes == classes
        assert [classes[label] for label in found.test["label"]] == [*map(str, labels)]


@pytest.mark.parametrize("label, scored", [([-1] * 40, "validation"), (LABELS, "test")])
def test_hidden_test_labels_beside_validation(label, scored, models, tmp_path, capsys):
    """As SST-2 has them: validation is scored, and a line says so. With labels test is scored."""
    write(tmp_path / "films", test_label=label)
    write_rows(tmp_path / "films", "validation", {"text": TEXTS[:9], "label": LABELS[:9]})
    _, data, *_ = ready(lora, tmp_path, *rows_flags(models, tmp_path / "films"))
    size = 9 if scored == "validation" else 40
    source = " (the test set is validation)" if scored == "validation" else ""
    assert f"{size} test examples{source}\n" in capsys.readouterr().out
    assert data.description["test_split"] == scored and data.official == size


# --------------------------------------------------------------------------- which files are read


@pytest.mark.parametrize("ending", ENDINGS)
def test_one_file_is_a_data_set(ending, tmp_path):
    """So is a folder with a train file alone, or one file whose name says no split."""
    table = datasets.Dataset.from_dict({"text": TEXTS, "label": NAMES})
    kind = {".tsv": "csv", ".jsonl": "json"}.get(ending, ending[1:])
    options = {".tsv": {"sep": "\t"}, ".json": {"lines": False}}.get(ending, {})
    for name in ("tickets", "alone/my", "folder/train"):
        path = (tmp_path / name).with_suffix(ending)
        path.parent.mkdir(exist_ok=True)
        getattr(table, f"to_{kind}")(str(path), **options)
        found = read(path if name == "tickets" else path.parent)
        assert found.train == {"text": TEXTS, "pair": None, "label": LABELS}
        assert (found.test["text"], found.test_split) == ([], "a fifth of train")
        assert found.classes == ["bad", "good"]


@pytest.mark.parametrize("names", ["train.csv eval.CSV", "data/train-0.csv x/test.csv notes.csv"])
def test_files_are_found_by_name(names, tmp_path):
    for path in (tmp_path / "films" / name for name in names.split()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines()))
    found = read(tmp_path / "films")
    assert found.train == found.test and found.test_split == "test"


README = """---
configs:
- config_name: default
  data_files: [{split: train, path: "%s"}, {split: test, path: "%s"}]
---"""


@pytest.mark.parametrize("path", ["../secret.csv", "{tmp}/secret.csv", "http://127.0.0.1:9/a.csv"])
@pytest.mark.parametrize("beside", [True, False])
def test_a_readme_names_no_files(path, beside, tmp_path, capsys, monkeypatch):
    """Nothing in the folder runs or names other files, and nobody asks the network."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    (tmp_path / "secret.csv").write_text("\n".join(lines()))
    folder = files(tmp_path / "films", train_csv=lines() if beside else None)
    (folder / "README.md").write_text(README % ((path.format(tmp=tmp_path),) * 2))
    (folder / "films.py").write_text("raise SystemExit('code ran')\n")
    if beside:
        assert read(folder).train["text"] == TEXTS
    else:
        assert "needs train files" in refused(capsys, read, folder)


@pytest.mark.parametrize("kind", ["file", "folder", "inside", "pipe"])
def test_links_that_leave_the_folder_are_not_followed(kind, tmp_path, capsys):
    files(tmp_path / "out", train_csv=lines(), test_csv=None)
    folder = files(tmp_path / "films")
    name, target = {
        "file": ("train.csv", "../out/train.csv"),
        "folder": ("data", tmp_path / "out"),
        "inside": ("train.csv", "test.csv"),
        "pipe": ("train.csv", None),
    }[kind]
    (folder / name).symlink_to(target) if target else os.mkfifo(folder / name)
    if kind == "inside":
        assert read(folder).train["text"] == TEXTS
    else:
        error = {
            "file": "train.csv is a link to a file outside the folder",
            "folder": "data is a link to a folder; copy the folder",
            "pipe": "train.csv is not a regular file",
        }[kind]
        assert error in refused(capsys, read, folder)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_test_set_that_cannot_be_read_is_not_replaced(kind, tmp_path, capsys):
    """A fifth of train would be scored in its place."""
    files(tmp_path / "out", test_csv=lines())
    folder = files(tmp_path / "films", train_csv=lines(), test_csv=None)
    if kind == "pipe":
        os.mkfifo(folder / "test.csv")
    else:
        (folder / "test").symlink_to(tmp_path / "out")
    assert "test" in refused(capsys, read, folder)


def parquet(folder, metadata):
    """The good examples as parquet, with this text as its metadata for `datasets`."""
    import pyarrow.parquet

    folder.mkdir()
    table = pyarrow.table({"text": TEXTS, "label": LABELS})
    table = table.replace_schema_metadata({"huggingface": metadata})
    for split in ("train", "test"):
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("metadata", ["[]", '{"info": []}', '{"info": {"features": {"label": 5}}}'])
def test_metadata_of_another_form_names_no_classes(metadata, tmp_path):
    assert read(parquet(tmp_path / "films", metadata)).classes == ["0", "1"]


def test_class_names_in_parquet_metadata(tmp_path, capsys):
    """Names that differ in blanks are one class; what is no list of names is refused."""
    text = '{"info": {"features": {"label": {"names": %s}}}}'
    examples = read(parquet(tmp_path / "a", text % '["bad", " good", "good "]'))
    assert examples.classes == ["bad", "good"] and examples.train["label"] == LABELS
    error = refused(capsys, read, parquet(tmp_path / "b", text % "5"))
    assert ".parquet: its metadata has no list of class names" in error


def test_the_hub_s_files_are_links_into_its_cache(tmp_path, monkeypatch):
    """A download's folder is a snapshot with links to blobs; only our three data sets have one."""
    cache = tmp_path / "datasets--stanfordnlp--imdb"
    (cache / "snapshots" / "1" / "plain_text").mkdir(parents=True)
    for name in ("train", "test", "unsupervised"):
        write_rows(cache / "blobs", name, {"text": TEXTS, "label": LABELS})
        link = cache / "snapshots" / "1" / "plain_text" / f"{name}-00000-of-00001.parquet"
        link.symlink_to(f"../../../blobs/{name}.parquet")
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(cache / "snapshots" / "1")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = read_examples("imdb", str(tmp_path / "no data"))
    options = {"repo_type": "dataset", "allow_patterns": "plain_text/*.parquet"}
    assert asked == [("stanfordnlp/imdb", options)] and found.test_split == "test"
    assert found.train == found.test == {"text": TEXTS, "pair": None, "label": LABELS}


# --------------------------------------------------------------------------------- what is refused


TRAIN, TEST = "of the train split has", "of the test split has"
A, HALF = lines(), [f"{text};{label}" for text, label in zip(TEXTS, LABELS, strict=True)]
SWALLOWED = lines(row3=f'"{TEXTS[3]},{LABELS[3]}', row9=f'{TEXTS[9]}",{LABELS[9]}')
OTHER_LINES = f"example 3 {TRAIN[:-4]} holds other lines in its text, from a lone double quote to"
UNLABELLED = lines(labels=NAMES, row3=f"{TEXTS[3]},")
NO_TRAIN = "needs train files (.parquet, .csv, .tsv, .json, .jsonl); it has"
PAIR = {"test_sentence2": TEXTS, "test_text": None, "test_sentence1": TEXTS}
REFUSED = [  # how the folder is made, what the line says
    (write, PAIR, "of train and test only one has a second text"),
    (write, {"text_pair": [*TEXTS[1:], None]}, f"39 {TRAIN} no text; fill it or drop the example"),
    (write, {"text": None, "review": TEXTS}, "split has the columns label, review; needed: text"),
    (write, {"test_label": None}, "test split has the columns text; needed: text (or sentence) an"),
    (files, {"train_csv": A[1:]}, "and label; a CSV file separates them by commas and names them"),
    (files, {"train_csv": ["text;label", *HALF]}, "has the columns text;label; needed: text (or s"),
    (files, {"train_csv": A[:1]}, "the train split has no examples"),
    (write, {"test_text": [None, *TEXTS[1:]]}, f"example 0 {TEST} no text; fill it or drop the"),
    (write, {"train_text": [*TEXTS[1:], " "]}, f"example 39 {TRAIN} no text; fill it or drop the"),
    (files, {"train_csv": lines(row3=",1")}, f"example 3 {TRAIN} no text; fill it or drop the ex"),
    (write, {"train_text": [*range(40)]}, f"example 0 {TRAIN} 0 for a text; wanted: words"),
    (files, {"train_csv": UNLABELLED}, f"3 {TRAIN} no label (empty or -1); fill it or drop the"),
    (files, {"train_csv": lines(row3=TEXTS[3])}, f"example 3 {TRAIN} no label (empty or -1); fill"),
    (write, {"test_label": [*LABELS[1:], -1]}, f"39 {TEST} no label (empty or -1); fill it or"),
    (write, {"label": [i / 2 for i in LABELS]}, f"0 {TRAIN} the label 0.0; wanted: 0, 1, … or"),
    (write, {"label": [0] * 40}, "train split has the label 0 alone; wanted: two or more classes"),
    (write, {"test_label": [i % 3 for i in range(40)]}, "has the label 2; train has 0, 1"),
    (files, {"train_csv": SWALLOWED}, OTHER_LINES),
    (files, {"train_csv": lines(row3='"a,1')}, OTHER_LINES),
    (files, {"train_csv": A, "train_old_csv": A}, "train.csv and train_old.csv would both be the"),
    (files, {"train_csv": A, "train_tsv": A}, "train.csv and train.tsv would both be the train sp"),
    (files, {}, f"{NO_TRAIN} test"),
    (files, {"test_csv": None}, f"{NO_TRAIN} none"),
    (write, {"test_text": [], "test_label": []}, "the test split has no examples"),
    (files, {"train_parquet": ["torn"]}, "cannot read train.parquet (Arrow"),
    (files, {"train_json": ['[{"text": "a"']}, "cannot read train.json (JSONDecodeError"),
    (files, {"train_json": ["[" * 100_000]}, "cannot read train.json (RecursionError"),
    (files, {"train_csv": ["text,label", "cin\udce9,0"]}, "must be in UTF-8 (UnicodeDecodeError"),
    (files, {"train_jsonl": ["[1, 2]"]}, "train.jsonl: wanted: one list of objects, or one object"),
]


@pytest.mark.parametrize("make, changes, message", REFUSED)
def test_what_cannot_be_used_is_one_line(make, changes, message, tmp_path, capsys):
    make(tmp_path / "films", **changes)
    error = refused(capsys, read, tmp_path / "films")
    assert error.startswith(f"--dataset {tmp_path / 'films'}: ") and message in error


@pytest.mark.parametrize(
    "split, spoiled, message",
    [
        ("train", [1, 2], "example 0 of the train split has 1 for a text; wanted: words"),
        ("validation", None, "needs train and validation and test files (.parquet, .csv, .tsv, "),
        (
            "test",
            ["a", None],
            "example 1 of the test split has no text; fill it or drop the example",
        ),
        (None, None, None),
    ],
)
def test_running_text(split, spoiled, message, tmp_path, capsys):
    """It is read as it is, blank lines and `<unk>` too; all three splits are needed, and whole."""
    texts = {name: ["", " the <unk> film \n", name] for name in ("train", "validation", "test")}
    for name, column in (texts | {split: spoiled}).items():
        if column:
            write_rows(tmp_path / "wikitext2", name, {"text": column})
    if split:
        error = refused(capsys, read_examples, "wikitext2", str(tmp_path))
        assert error.startswith(f"--data_dir {tmp_path}: {message}")
    else:
        found = read_examples("wikitext2", str(tmp_path))
        assert [getattr(found, name)["text"] for name in texts] == list(texts.values())


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
    found = Examples({"text": texts, "pair": None}, None, None, None, "test")
    plain = [f" {' '.join(text.split())} ".lower() for text in texts]
    whole = {a for a in plain if not any(a != b and a in b for b in plain)}
    assert len(whole) < len(set(plain)) / 2  # the data is what this test is about
    assert [plain[row] for row in found.whole] == sorted(whole, key=plain.index)
    picked, rest = found.cut(range(len(texts)), pick(size, 0))
    assert len(picked) == min(size, len(whole) // 2) and {plain[row] for row in picked} <= whole
    joined = "\n".join(plain[row] for row in picked)
    assert rest == [row for row in range(len(texts)) if plain[row] not in joined]
    again, left = found.cut(rest, pick(3, 1))
    assert set(again) | set(left) <= set(rest) and not set(again) & set(left)


def pick(size, seed):
    """A choice of `size` candidates, at most half of them."""
    return lambda numbers: random.Random(seed).sample(numbers, min(size, len(numbers) // 2))


@pytest.mark.parametrize("inside, phrases", [(9, False), (11, True)])
def test_phrases_are_recognized_by_the_data(inside, phrases):
    """A quarter of the texts stand word for word inside others: 10 of 40."""
    texts = [f"{text} {WORDS[i % 30]} {i}" for i, text in enumerate(TEXTS[inside:])]
    texts += [text.split(" ", 1)[1].upper() for text in texts[:inside]]
    found = Examples({"text": texts, "pair": None}, None, None, None, "test")
    assert (found.whole is not None) == phrases
    if phrases:
        assert found.whole == [*range(40 - inside)]
    assert Examples({"text": texts, "pair": texts}, None, None, None, "test").whole is None


def test_half_a_character_in_a_json_file(tmp_path):
    """A lone surrogate, which JSON can hold and no tokenizer takes, is read as a question mark."""
    rows = [
        f'{{"text": "{text} \\ud83d", "label": {y}}}' for text, y in zip(TEXTS, LABELS, strict=True)
    ]
    found = read(files(tmp_path / "films", train_jsonl=rows))
    assert found.train["text"] == [f"{text} ?" for text in TEXTS]


def test_tokenizing_loses_nothing_between_its_thousands():
    tokenizer = tiny_tokenizer("bert")
    texts = [" ".join(["the", *WORDS[i % 7 : i % 11]]) for i in range(2345)]
    wanted = [tokenizer(*both)["input_ids"] for both in zip(texts, texts[::-1], strict=True)]
    assert tokenize(texts, tokenizer, "train", texts[::-1])["input_ids"] == wanted


SPELLED = "the [SEP] film [CLS] [MASK] [PAD]"


def ids_of(texts, tokenizer):
    return tokenize(texts, tokenizer, "train")["input_ids"]


def test_special_tokens_inside_a_text_are_text(capsys):
    """Spelled out in pieces; or one unknown token, where the piece is a word of the vocabulary."""
    tokenizer = tiny_tokenizer("distilbert")
    the, film, unknown = tokenizer.convert_tokens_to_ids(["the", "film", "[UNK]"])
    row = [the, *[unknown] * 3, film, *[unknown] * 9]  # `[`, `sep` and `]` are no words of its own
    assert ids_of([SPELLED], tokenizer) == [[2, *row, 3]]
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    row = [the, unknown, film, *[unknown] * 3]
    assert ids_of([SPELLED, "the"], tokenizer) == [[2, *row, 3], [2, the, 3]]
    options = {"return_offsets_mapping": True, "add_special_tokens": False}
    encoded = tokenize([SPELLED], tokenizer, "train", **options)
    assert encoded["input_ids"] == [row]
    assert SPELLED[slice(*encoded["offset_mapping"][0][1])] == "[SEP]"
    tokenizer.unk_token = None
    error = refused(capsys, tokenize, [SPELLED], tokenizer, "train")
    assert error == "--model: its tokenizer cannot read [SEP] as text"


ODD = ["🎬🍿😀", "это не кино", "第一部电影", "the " * 20_000, "x" * 10_000, "\x00", "good\x00bad"]
ODD += ["<unk>", SPELLED, "a film\r\nof two lines", "nan", "'", '"']


@pytest.mark.parametrize("kind", ["distilbert", "gpt2", "llama"])
def test_odd_texts_train_normally(models, tmp_path, kind):
    texts = ODD + [f"{text[:99]} {word}" for word in WORDS[:2] for text in ODD]
    write(tmp_path / "odd", text=texts, label=[i % 2 for i in range(len(texts))])
    words = [*rows_flags(models, tmp_path / "odd", kind), "--epochs", 1, "--batch_size", 8]
    result, _ = result_of(lora, tmp_path, *words)
    assert all(map(math.isfinite, [*result["metrics"]["test"].values(), result["curve"][-1][2]]))


@pytest.mark.parametrize(
    "files, named",
    [
        ({"train.csv": "text,label,label\na good film,0,1\n"}, "two columns of one name"),
        (
            {"train.jsonl": '{"text": "a good film", "label": 0, "labels": 1}\n' * 2},
            "both label and labels",
        ),
    ],
)
def test_two_label_columns_are_refused(files, named, models, tmp_path, capfd):
    """One of them would win silently."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    code, error = ended(capfd, lora, "--dataset", tmp_path, "--model", models("distilbert"))
    assert code == 2 and named in error


def test_shards_that_number_their_classes_differently_are_refused(models, tmp_path, capfd):
    """The first shard's names would be given to the numbers of all."""
    import datasets

    for i, names in enumerate((["neg", "pos"], ["pos", "neg"])):
        features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        part = {"text": ["a good film", "a bad film"], "label": [0, 1]}
        shard = datasets.Dataset.from_dict(part, features=datasets.Features(features))
        shard.to_parquet(str(tmp_path / f"train-0000{i}-of-00002.parquet"))
    code, error = ended(capfd, lora, "--dataset", tmp_path, "--model", models("distilbert"))
    assert code == 2 and "name their classes differently" in error
