"""Raw rows from parquet, csv, tsv or json files, the hub or the demo: checked, cut, tokenized.

What cannot be used ends the program with one line that names the flag, the split and the row.
"""

import csv
import functools
import logging
import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
from tqdm import tqdm

from harness import demo
from harness.process import fail, first_line, library_errors

HUB = {
    "sst2": ("stanfordnlp/sst2", None),
    "imdb": ("stanfordnlp/imdb", None),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-v1"),
}
DEMOS = ("demo", "demo_lm")
TEXT = ("wikitext2", "demo_lm")  # running text, without labels
LENGTHS = {"demo": 64, "demo_lm": 64, "sst2": 128, "imdb": 256, "wikitext2": 128}  # else 256
COLUMNS = {  # under which names a column may come
    "text": ("text", "sentence", "sentence1"),
    "pair": ("text_pair", "sentence2"),
    "label": ("label", "labels"),
}


@dataclass
class Rows:
    """A data set's splits, each {"text": [str], "pair": [str] or None, "label": [int] or None}."""

    train: dict
    test: dict
    validation: dict | None  # of running text only
    classes: list | None  # names by number; None for running text
    test_split: str  # what `test` was read from: "test" or "validation"
    phrases: bool = False  # rows are phrases of one another

    @functools.cached_property
    def plain(self):
        """Each training row as one string, its words a blank apart; equal rows are equal here."""
        texts = [" ".join(text.split()) for text in self.train["text"]]
        if self.train["pair"] is None:
            return texts
        pairs = [" ".join(text.split()) for text in self.train["pair"]]
        return [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)]

    def within(self, text, known):
        """Those of the plain texts `known` that `text` holds word for word, itself included."""
        if not self.phrases:
            return {text}
        words = text.split(" ")
        ends = range(1, len(words) + 1)
        return known & {" ".join(words[start:end]) for end in ends for start in range(end)}

    @functools.cached_property
    def whole(self):
        """Numbers of the training rows that stand in no other row, or None where none could."""
        if not self.phrases:
            return None
        known, inside, whole = set(self.plain), set(), []
        # Longest first: a row inside a row that was seen has no part that is not inside it too.
        for row in sorted(range(len(self.plain)), key=lambda row: -len(self.plain[row])):
            if self.plain[row] not in inside:
                whole.append(row)
                inside |= self.within(self.plain[row], known)
        return sorted(whole)


def cut(rows, among, size, generator):
    """Choose `size` of the training rows `among`, at most half of them: (picked, rest), sorted.

    Of phrases only whole sentences are chosen. The rest holds no row that equals a picked one, nor
    any that stands word for word inside a picked one.
    """
    among = sorted(among)
    whole = set(rows.whole or among)
    candidates = [row for row in among if row in whole]
    size = min(size, len(candidates) // 2)
    order = torch.randperm(len(candidates), generator=generator)[:size].tolist()
    picked = sorted(candidates[i] for i in order)
    known, gone = set(rows.plain), set()
    for row in picked:
        gone |= rows.within(rows.plain[row], known)
    return picked, [row for row in among if rows.plain[row] not in gone]


def tokenize(texts, tokenizer, what, pairs=None, offsets=False, **options):
    """Token ids of every text or pair, a thousand at a time, with a bar where a person watches.

    `offsets` adds no special tokens and returns (ids, offsets), offsets (first, end) in characters.
    Text is text: a `</s>` or `[SEP]` in it is spelled out in pieces, or is the unknown token.
    """
    options |= {"split_special_tokens": True}
    if offsets:
        options |= {"return_offsets_mapping": True, "add_special_tokens": False}
    words = words_in_vocabulary(tokenizer)
    if words:
        options |= {"return_special_tokens_mask": True}
    ids, places = [], []
    for i in tqdm(range(0, len(texts), 1000), f"tokenizing {what}", disable=None, leave=False):
        part = slice(i, i + 1000)
        found = tokenizer(texts[part], pairs[part] if pairs else None, **options)
        for row, added in zip(
            found["input_ids"], found.get("special_tokens_mask", []), strict=False
        ):
            for at, token in enumerate(row):
                if token in words and not added[at]:
                    if tokenizer.unk_token_id is None:
                        fail(f"--model: its tokenizer has no way to read {words[token]} as text")
                    row[at] = tokenizer.unk_token_id
        ids += found["input_ids"]
        places += found["offset_mapping"] if offsets else []
    return (ids, places) if offsets else ids


def words_in_vocabulary(tokenizer):
    """{id: text} of the special tokens that are words of the vocabulary too, as T5's `</s>` is.

    Text gives them even where the tokenizer is told to split them.
    """
    words, options = {}, {"split_special_tokens": True, "add_special_tokens": False}
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special and number != tokenizer.unk_token_id:
            if number in tokenizer(token.content, **options)["input_ids"]:
                words[number] = token.content
    return words


def quiet_libraries():
    """Keep load reports, progress bars and retry warnings of the libraries off the terminal."""
    for name in ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@functools.cache
def offline_if_unreachable():
    """Have the libraries use their cache alone where the hub is silent: their retries take minutes.

    Asks once a process, for 3 seconds at most.
    """
    hub = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if any(os.environ.get(key) for key in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy")):
        return
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name in ("huggingface_hub.constants", "datasets.config"):
            if name in sys.modules:  # imported already, so it has read the environment
                sys.modules[name].HF_HUB_OFFLINE = True


def model_folder(name):
    """Where to load a base from: the demo's own folder, a folder, or a hub id."""
    return str(demo.model()) if name == "demo" else name


@functools.cache
def load_config(model):
    """The model's config, from a folder, the hub's cache or the hub."""
    quiet_libraries()
    folder = model_folder(model)
    if not Path(folder).is_dir():
        offline_if_unreachable()
    elif (Path(folder) / "adapter_config.json").exists():  # transformers would load its base
        fail(f"--model {model}: this folder holds an adapter; name its base, or --eval_only")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    message = f"--model {model}: no usable config there"
    if os.environ.get("HF_HUB_OFFLINE") and not Path(folder).is_dir():
        message = (
            f"--model {model}: no such folder here, not in the hub's cache, and the hub cannot be "
            "reached; pass a folder with --model (and one with the data by --data_dir), or try "
            "--dataset demo, which needs no network"
        )
    with library_errors(message):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # A config may name attention kernels to download, and another file of weights.
    config._attn_implementation = None
    vars(config).pop("transformers_weights", None)
    return config


@functools.cache
def load_tokenizer(model):
    """The model's (tokenizer, config), as load_config has the config."""
    config = load_config(model)
    import transformers

    with library_errors(f"--model {model}: no usable tokenizer there"):
        folder = model_folder(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        fail(f"--model {model}: it has no tokenizer; wanted: tokenizer.json, or what its kind has")
    return tokenizer, config


@dataclass
class Table:
    """One split as it was read, and the words for what is wrong with it."""

    where: str  # the flag that named it
    split: str
    data: object  # datasets.Dataset
    quoted: bool  # CSV, where a double quote begins a text that may hold commas and line breaks

    def refuse(self, what, row=None):
        place = f"the {self.split} split" if row is None else f"row {row} of the {self.split} split"
        fail(f"{self.where}: {place} {what}")

    def column(self, kind):
        """The name of the column of this kind of COLUMNS, or None; two are an error."""
        names = [name for name in COLUMNS[kind] if name in self.data.column_names]
        if len(names) > 1:
            self.refuse(f"has both {' and '.join(names)}; drop or rename one")
        return names[0] if names else None

    def values(self, kind):
        name = self.column(kind)
        return None if name is None else self.data[name][:]

    @property
    def classes(self):
        """The names of a ClassLabel column, else None."""
        return getattr(self.data.features[self.column("label")], "names", None)

    def read(self, kinds):
        """{"text", "pair", "label"} as lists, None for others; labels as text: "good" or "0"."""
        columns = {kind: self.values(kind) if kind in kinds else None for kind in COLUMNS}
        if any(columns[kind] is None for kind in kinds if kind != "pair"):
            names = ", ".join(self.data.column_names)[:200]
            needed = "text (or sentence) and label" if "label" in kinds else "text"
            first = "; a CSV or TSV file names them in its first line"
            self.refuse(f"has the columns {names}; needed: {needed}{first}")
        if not columns["text"]:
            self.refuse("has no rows")
        for text in (columns["text"], columns["pair"] or []):
            for row, value in enumerate(text):
                if value is None or ("label" in kinds and not str(value).strip()):
                    self.refuse("has no text; fill it or drop the row", row)
                if not isinstance(value, str):
                    self.refuse(f"has {value!r} for a text; wanted: words", row)
        if "label" in kinds:
            columns["label"] = self.label_names(columns["label"])
        if self.quoted and "label" in kinds:
            self.refuse_swallowed_rows(columns)
        return columns

    def label_names(self, labels):
        for row, label in enumerate(labels):
            if unlabelled(label):
                self.refuse("has no label (empty or -1); fill it or drop the row", row)
        for row, label in enumerate(labels):
            if isinstance(label, bool) or not isinstance(label, int | str):
                self.refuse(f"has the label {label!r}; wanted: 0, 1, … or names", row)
        return [self.classes[label] for label in labels] if self.classes else [*map(str, labels)]

    def refuse_swallowed_rows(self, columns):
        """Notice a lone double quote: the rows from there to the next one stand in one text."""
        names, known = self.data.column_names, set(columns["label"])
        place = names.index(self.column("label"))
        if place > names.index(self.column("text")):
            place -= len(names)  # counted from the right, where the text's first line is whole
        for text in (columns["text"], columns["pair"] or []):
            for row, value in enumerate(text):
                for line in value.split("\n")[:-1]:
                    cells = line.split(",")
                    if len(cells) > 1 and cells[place] in known:
                        self.refuse(
                            "holds other rows in its text, from a lone double quote to the next; "
                            "double it inside quotes, or write TSV, where a quote is a letter",
                            row,
                        )


def unlabelled(label):
    """Whether a label is none: -1, an empty cell, or what a CSV with numbers makes of one: nan."""
    return label in (None, -1) or label != label or not str(label).strip()


def read_tables(dataset, data_dir, where):
    """The splits of the files, or of the hub where there is no such folder: {split: Table}."""
    quiet_libraries()
    folder = Path(data_dir) / dataset if dataset in HUB else Path(dataset)
    if not folder.is_dir():
        offline_if_unreachable()
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors come as exceptions too
    try:
        if not folder.is_dir():
            found = datasets.load_dataset(*HUB[dataset])
            return {split: Table(where, split, found[split], False) for split in found}
        found, options = datasets.load_dataset_builder(str(folder)), {}
        tsv = found.name == "csv" and found.config.sep == "\t"
        if found.name == "csv":  # the words None, NA and null are text
            options = {"keep_default_na": False, "na_values": [""]}
        if tsv:  # GLUE's files quote nothing, and have lone quotes
            options["quoting"] = csv.QUOTE_NONE
        tables = {}
        # Split by split: read together, all would get the class names and types of the first.
        for split, files in found.config.data_files.items():
            names = sorted({Path(file).name for file in files})
            if len({re.sub(r"\d+", "", name) for name in names}) > 1:  # shards differ in numbers
                fail(f"{where}: {' and '.join(names)} would both be the {split} split; keep one")
            part = {"data_files": {split: list(files)}, "split": split}
            data = datasets.load_dataset(str(folder), **part, **options)
            if found.name == "csv" and "__index_level_0__" in data.column_names:
                more = "a row has more cells than the first line has names"
                fail(f"{where}: {names[0]}: {more}; put texts with a separator in them in quotes")
            tables[str(split)] = Table(where, str(split), data, found.name == "csv" and not tsv)
        return tables
    except Exception as error:
        cause = first_line(error.__cause__ or error)
        if folder.is_dir():
            fail(f"{where}: cannot read the files in {folder.name} ({cause})")
        fail(
            f"--dataset {dataset}: no folder {folder}, and the hub ({HUB[dataset][0]}) gave "
            f"nothing ({cause}); put parquet files into {folder}, point --data_dir elsewhere "
            "(and --model to a folder), or try --dataset demo"
        )


@functools.cache  # a process reads a data set once, whatever the seeds
def read_rows(dataset, data_dir):
    """The data set's checked Rows. Test is scored, or validation where test is hidden or absent."""
    if dataset in DEMOS:
        blank = {"pair": None, "label": None}
        splits = {name: blank | columns for name, columns in demo.splits(dataset in TEXT).items()}
        classes = None if dataset in TEXT else ["negative", "positive"]
        return Rows(splits["train"], splits["test"], splits.get("validation"), classes, "test")

    where = f"--data_dir {data_dir}" if dataset in HUB else f"--dataset {dataset}"
    tables = read_tables(dataset, data_dir, where)
    three = ("train", "validation", "test")
    missing = [name for name in three if name not in tables]
    if "train" in missing or len(missing) > (0 if dataset in TEXT else 1):
        files = "a train, a validation and a test" if dataset in TEXT else "a train and a test"
        fail(f"{where}: needs {files} file; found {', '.join(tables)}")
    if dataset in TEXT:
        train, validation, test = (tables[name].read(["text"]) for name in three)
        return Rows(train, test, validation, None, "test")

    scored = "validation" if "test" in missing else "test"
    if not missing and all(map(unlabelled, tables["test"].values("label") or [None])):
        scored = "validation"  # the test labels are hidden, as SST-2's are
    kinds = ("text", "pair", "label")
    train, test = tables["train"].read(kinds), tables[scored].read(kinds)
    if (train["pair"] is None) != (test["pair"] is None):
        fail(f"{where}: of train and {scored} only one has a second text")
    if len({*zip(train["text"], train["pair"] or train["text"], strict=True)}) == 1:
        tables["train"].refuse("has the same text in all rows")
    classes = number_classes(tables["train"], train["label"])
    for name in tables[scored].classes or test["label"]:
        if name not in classes:
            tables[scored].refuse(f"has the label {name!r}; train has {', '.join(classes[:8])}")
    for columns in (train, test):
        columns["label"] = [classes.index(name) for name in columns["label"]]
    # Nine in ten of SST-2's rows are phrases of another row.
    return Rows(train, test, None, classes, scored, phrases=dataset == "sst2")


def number_classes(table, labels):
    """The names of the classes by number, from the training rows' labels (as text)."""
    found = sorted(set(labels))
    classes = table.classes or found
    if not table.classes and isinstance(table.values("label")[0], int):
        classes = [str(number) for number in range(len(found))]
    if len(found) < 2 or set(found) != set(classes):
        table.refuse(
            f"has the labels {', '.join(found[:8])}; wanted: at least two classes, each with a "
            "row, as names or as 0, 1, … without a gap"
        )
    return classes
