"""Raw rows: files, columns, labels, the cut and tokens, against brute force and exact messages."""

from pathlib import Path

import datasets
import pytest
import torch
from conftest import sentences, write_rows

from harness.rows import read_rows

DATA = Path(__file__).parents[1] / "data"
TEXTS, LABELS = sentences(40, 0)


def read(folder):
    return read_rows(str(folder), "nowhere")


def refused(capsys, call, *words):
    """The one line, without the script's name, with which `call` ends the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*map(str, words))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and len(error) < 600, error
    return error.split(": error: ")[1].rstrip("\n")


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------ columns and labels


def write(folder, test="test", **changes):
    """A folder of 40 + 40 good rows, but for the changes: train=…, test_label=…, label=None …"""
    for split, file in (("train", "train"), (test, test)):
        columns = {"text": TEXTS, "label": LABELS}
        for key, value in changes.items():
            where, _, name = key.rpartition("_")
            if where in ("", split):
                columns[name] = value
        columns = {name: values for name, values in columns.items() if values is not None}
        write_rows(folder, file, columns)
    return folder


def csv(folder, ending, train, test=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("train", train), ("test", test or train)):
        (folder / f"{name}.{ending}").write_text("\n".join(lines) + "\n")
    return folder


def good_lines(separator):
    lines = [f"{text}{separator}{label}" for text, label in zip(TEXTS, LABELS, strict=True)]
    return [f"text{separator}label", *lines]


def test_plain_rows(tmp_path):
    found = read(write(tmp_path / "films"))
    assert found.train == found.test == {"text": TEXTS, "pair": None, "label": LABELS}
    assert (found.classes, found.test_split, found.validation) == (["0", "1"], "test", None)
    assert found.whole is None and read(tmp_path / "films") is found  # read once


def test_rows_of_glue(tmp_path):
    """A TSV file whose quotes are letters, a hidden test split, dev for validation, two texts."""
    lines = [f'{i}\t" {text}\tNone\t{i % 2}' for i, text in enumerate(TEXTS)]
    folder = csv(tmp_path / "mrpc", "tsv", ["idx\tsentence1\tsentence2\tlabel", *lines])
    (folder / "test.tsv").rename(folder / "dev.tsv")
    (folder / "test.tsv").write_text("idx\tsentence1\tsentence2\n0\ta\tb\n")
    found = read(folder)
    assert found.train["text"] == [f'" {text}' for text in TEXTS]
    assert found.train["pair"] == ["None"] * 40 and found.test_split == "validation"


@pytest.mark.parametrize("column, other", [("sentence", "text_pair"), ("text", "sentence2")])
def test_columns_by_other_names(tmp_path, column, other):
    changes = {"text": None, "label": None, "labels": LABELS, column: TEXTS, other: TEXTS[::-1]}
    if column == "text":
        del changes["label"], changes["labels"]
        changes["text"] = TEXTS
    found = read(write(tmp_path / "pairs", **changes))
    assert found.test == {"text": TEXTS, "pair": TEXTS[::-1], "label": LABELS}


def test_hidden_test_labels(tmp_path):
    write(tmp_path / "films", test_label=[-1] * 40)
    assert "row 0 of the test split has no label" in refused_text(tmp_path / "films")
    write_rows(tmp_path / "hidden", "train", {"text": TEXTS, "label": LABELS})
    write_rows(tmp_path / "hidden", "validation", {"text": TEXTS[:9], "label": LABELS[:9]})
    write_rows(tmp_path / "hidden", "test", {"text": TEXTS, "label": [-1] * 40})
    found = read(tmp_path / "hidden")
    assert found.test_split == "validation" and len(found.test["text"]) == 9


def refused_text(folder):
    with pytest.raises(SystemExit):
        read(folder)
    return ""


def parquet(folder, train_names, test_names):
    """Rows of which the same texts have the same class in both splits; the numbers differ."""
    for split, names in (("train", train_names), ("test", test_names)):
        table = datasets.Dataset.from_dict(
            {"text": TEXTS, "label": [["neg", "pos"][label] for label in LABELS]}
        )
        if names:
            table = table.cast_column("label", datasets.ClassLabel(names=names))
        folder.mkdir(exist_ok=True)
        table.to_parquet(str(folder / f"{split}.parquet"))
    return folder
