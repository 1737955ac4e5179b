"""Examples as text, from parquet, csv, tsv or json files, the hub or the demo; and the tokenizer.

Only files that lie inside the data set's folder are read, and nothing in them can name another.
What cannot be used ends the program with one line that names the flag, the split and the example.
"""

import csv
import functools
import io
import json
import logging
import os
import re
import socket
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from tqdm import tqdm

from harness import demo
from harness.process import fail, library_errors, say
from harness.text import printable

HUB = {  # repository on the hub, and its folder of parquet files
    "sst2": ("stanfordnlp/sst2", "data"),
    "imdb": ("stanfordnlp/imdb", "plain_text"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-v1"),
}
DEMOS = ("demo", "demo_lm")
TEXT = ("wikitext2", "demo_lm")  # running text, without labels
LENGTHS = {"demo": 64, "demo_lm": 64, "sst2": 128, "imdb": 256, "wikitext2": 128}  # else 256
MAX_LAYERS = 2000  # ten times what published models have; building millions would never end
ENDINGS = (".parquet", ".csv", ".tsv", ".json", ".jsonl")
SPLITS = {  # words in a file's name -> its split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
TEXT_COLUMNS = (  # the first that a table has: GLUE's pairs of texts, or one text
    *(("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis")),
    *(("question", "sentence"), ("question1", "question2"), ("text",), ("sentence",)),
)


@dataclass(eq=False)  # hashed by identity
class Examples:
    """A data set's splits, each {"text": [str], "pair": [str] or None, "label": [int] or None}."""

    train: dict
    test: dict  # without texts where a fifth of train has to serve
    validation: dict | None  # of running text only
    classes: list | None  # names by number; None for running text
    test_split: str  # what `test` was read from: "test", "validation" or "a fifth of train"

    @functools.cached_property
    def plain(self):
        """Each training example as one string; two are equal but for blanks and capitals."""
        columns = [self.train[key] for key in ("text", "pair") if self.train[key]]
        plain = (map(" ".join, map(str.split, texts)) for texts in zip(*columns, strict=True))
        return ["\n".join(texts).casefold() for texts in plain]

    @functools.cached_property
    def whole(self):
        """Numbers of the training examples that stand word for word in no other one.

        None unless a quarter of a sample do, as most of SST-2's phrases; long texts are not tried.
        """
        unique, numbers = dict.fromkeys(self.plain), range(len(self.plain))
        sample = [*unique][:: max(1, len(unique) // 100)]
        joined = "".join(f" {text} \n" for text in unique)
        if self.train["pair"] or len(joined) > 500 * len(unique):
            return None
        if sum(joined.count(f" {text} ") > 1 for text in sample) < len(sample) / 4:
            return None
        inside, whole = set(), []
        # Longest first: a text inside one that was seen has no part that is not inside it, too.
        for number in sorted(numbers, key=lambda number: -len(self.plain[number])):
            if self.plain[number] not in inside:
                whole.append(number)
                inside |= parts_of(self.plain[number]) & unique.keys()
        return sorted(whole)

    def cut(self, among, choose):
        """Cut the training examples `among` in two: (picked, rest), sorted numbers.

        choose(candidates) picks; of phrases the candidates are whole sentences. The rest holds no
        example that equals a picked one, or stands word for word inside one.
        """
        whole = set(self.whole or among)
        picked, taken = sorted(choose([number for number in among if number in whole])), set()
        for text in {self.plain[number] for number in picked}:
            taken |= parts_of(text) if self.whole else {text}
        return picked, [number for number in among if self.plain[number] not in taken]


def parts_of(text):
    """All runs of words in a plain text, itself included."""
    starts = [0, *(match.end() for match in re.finditer(" ", text))]
    ends = [*(start - 1 for start in starts[1:]), len(text)]
    return {text[start:end] for i, start in enumerate(starts) for end in ends[i:]}


# ------------------------------------------------------------------------------------- tokenizer


def tokenize(texts, tokenizer, name, pairs=None, **options):
    """What the tokenizer makes of every text or pair: lists by name, `input_ids` for one.

    `cut` says which had more than max_length tokens; it is empty where the tokenizer, written in
    Python, does not tell. Text is text: a `</s>` or `[SEP]` in it is spelled out in pieces, or
    becomes the unknown token. A bar shows where a person watches.
    """
    split = {"split_special_tokens": True} if tokenizer.is_fast else {}  # else: all added tokens
    special, unknown = special_tokens_in_text(tokenizer, split), tokenizer.unk_token_id
    options |= {"return_special_tokens_mask": bool(special), "return_attention_mask": False}
    result = defaultdict(list)
    for i in tqdm(range(0, len(texts), 1000), f"tokenizing {name}", disable=None, leave=False):
        encoded = tokenizer(texts[i : i + 1000], pairs and pairs[i : i + 1000], **options, **split)
        masks = encoded.pop("special_tokens_mask", ())  # 1 for what the tokenizer added itself
        for ids, added in zip(encoded["input_ids"], masks, strict=False):
            for place, token in enumerate(ids):
                if token in special and not added[place]:
                    if unknown is None:
                        fail(f"--model: its tokenizer cannot read {special[token]} as text")
                    ids[place] = unknown
        for key, values in encoded.items():
            result[key] += values
        result["cut"] += [bool(encoding.overflowing) for encoding in encoded.encodings or ()]
    return result


def special_tokens_in_text(tokenizer, split):
    """{id: token} of the special tokens that a text can give: as T5's `</s>`, a word of its own."""
    return {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number != tokenizer.unk_token_id
        if number in tokenizer(token.content, add_special_tokens=False, **split)["input_ids"]
    }


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
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True  # it may have read the environment before


def model_folder(name):
    """Where to load a base from: the demo's own folder, a folder, or a hub id."""
    return str(demo.model()) if name == "demo" else name


@functools.cache
def load_config(model):
    """The model's config, from a folder, the hub's cache or the hub. No remote code."""
    for key in ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(key, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    folder, problem = model_folder(model), "no usable config there"
    if not Path(folder).is_dir():
        offline_if_unreachable()
        if os.environ.get("HF_HUB_OFFLINE"):
            problem = "no such folder, nor in the hub's cache, and the hub is not reached; --model "
            problem += "and --data_dir take folders, and --dataset demo needs no network"
    elif (Path(folder) / "adapter_config.json").exists():  # transformers would load its base
        fail(f"--model {model}: this folder holds an adapter; name its base, or --eval_only")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with library_errors(f"--model {model}: {problem}"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for key in ("num_hidden_layers", "decoder_layers", "num_decoder_layers"):
        layers = getattr(config, key, None) or 0
        if not isinstance(layers, int) or layers > MAX_LAYERS:
            odd = f"{key} {printable(layers)} in its config.json"
            fail(f"--model {model}: {odd}; wanted: at most {MAX_LAYERS:,}")
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


# ----------------------------------------------------------------------------------------- files


def is_data_file(path):
    """Whether a path is a file with an ending that read_file knows."""
    return path.suffix.lower() in ENDINGS and path.is_file()


def find_files(where, dataset, data_dir):
    """{split: its files} of a file, a folder, or the hub where there is no such folder."""
    source = Path(data_dir) / dataset if dataset in HUB else Path(dataset)
    inside = source.resolve()
    if is_data_file(source):
        return {"train": [source]}
    if not source.is_dir():
        offline_if_unreachable()
        import huggingface_hub

        (repository, part), advice = HUB[dataset], "put parquet files there, or try --dataset demo"
        options = {"repo_type": "dataset", "allow_patterns": f"{part}/*.parquet"}
        with library_errors(f"{where}: no folder {source}, and the hub gave nothing; {advice}"):
            snapshot = Path(huggingface_hub.snapshot_download(repository, **options))
        source, inside = snapshot / part, snapshot.resolve().parents[1]  # links into the cache
    files = defaultdict(list)
    for file in sorted(source.rglob("[!.]*")):
        if file.is_symlink() and file.is_dir():
            fail(f"{where}: {file.name} is a link to a folder; copy the folder, or remove the link")
        if file.suffix.lower() not in ENDINGS or file.is_dir():
            continue
        if inside not in file.resolve().parents:
            fail(f"{where}: {file.name} is a link to a file outside the folder; copy the file")
        if not file.is_file():
            fail(f"{where}: {file.name} is not a regular file; put a copy of the data there")
        words = re.split("[^a-z]+", str(file.relative_to(source)).lower())
        files[next((SPLITS[word] for word in words[::-1] if word in SPLITS), "")].append(file)
    # Files whose name says no split are training data where there are no others.
    return {split or "train": files[split] for split in files if split or len(files) == 1}


def read_file(where, file):
    """([{column: value}, …] of a file, the class names that a parquet file has for its labels)."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet

        with library_errors(f"{where}: cannot read {file.name}"):
            table = pyarrow.parquet.ParquetFile(file).read()
            info = json.loads((table.schema.metadata or {}).get(b"huggingface", "{}"))
        features = entry(entry(info, "info"), "features")
        names = entry(entry(features, "label") or entry(features, "labels"), "names")
        if names and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
            fail(f"{where}: {file.name}: its metadata has no list of class names")
        return table.to_pylist(), names and [name.strip() for name in names]
    with library_errors(f"{where}: cannot read {file.name}; a text file must be in UTF-8"):
        content = file.read_text("utf-8-sig")
    with library_errors(f"{where}: cannot read {file.name}"):
        if kind in (".csv", ".tsv"):
            # GLUE's tsv files quote nothing, and have lone quotes.
            form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
            csv.field_size_limit(2**31 - 1)
            reader = csv.DictReader(io.StringIO(content), **form)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            if len(set(reader.fieldnames)) < len(reader.fieldnames):
                fail(f"{where}: {file.name} has two columns of one name; rename one")
            examples = list(reader)
        else:
            try:
                examples = json.loads(content)
            except json.JSONDecodeError:  # not one list, but an object a line
                examples = [json.loads(line) for line in content.split("\n") if line.strip()]
    if not isinstance(examples, list) or not all(isinstance(e, dict) for e in examples):
        fail(f"{where}: {file.name}: wanted: one list of objects, or one object a line")
    if any(None in example for example in examples):
        problem = "a line has more cells than the first line has names"
        fail(f"{where}: {file.name}: {problem}; put texts with a separator in them in quotes")
    return examples, None


def entry(value, key):
    """value[key] of a stranger's JSON; None if there is none, or the value is no object."""
    return value.get(key) if isinstance(value, dict) else None


@dataclass
class Table:
    """One split as it was read."""

    where: str  # the flag that named it
    split: str
    examples: list  # of {column: value}
    class_names: list | None
    quoted: bool  # CSV, where a double quote begins a text that may hold commas and line breaks

    def refuse(self, problem, number=None):
        example = "" if number is None else f"example {number} of "
        fail(f"{self.where}: {example}the {self.split} split {problem}")

    def read(self, labelled):
        """{"text", "pair", "label"}: lists or None; labels as text, "good" or "0"."""
        columns = [*dict.fromkeys(name for example in self.examples for name in example)]
        text = next((group for group in TEXT_COLUMNS if {*group} <= {*columns}), ())
        if not self.examples:
            self.refuse("has no examples")
        if not text or labelled and "label" not in columns:
            form = "a CSV file separates them by commas and names them in its first line"
            needed = f"text (or sentence){' and label' * labelled}; {form}"
            self.refuse(f"has the columns {printable(', '.join(columns), 200)}; needed: {needed}")
        texts = {n for e in self.examples for n, v in e.items() if isinstance(v, str)}
        unread = [name for name in columns if name in texts - {*text, "label"}]
        if unread and self.split == "train":
            say(f"{self.where}: columns that are not read: {printable(', '.join(unread), 200)}")
        for number, example in enumerate(self.examples):
            for value in map(example.get, text):
                if value is None or labelled and not str(value).strip():
                    self.refuse("has no text; fill it or drop the example", number)
                if not isinstance(value, str):
                    self.refuse(f"has {printable(value)} for a text; wanted: words", number)
        if labelled and self.quoted:
            self.refuse_swallowed_lines(columns, text)
        # A JSON file may hold half a character, a lone surrogate, which no tokenizer takes.
        whole = [
            [e[name].encode(errors="replace").decode() for e in self.examples] for name in text
        ]
        labels = self.read_labels() if labelled else None
        return {"text": whole[0], "pair": whole[1] if whole[1:] else None, "label": labels}

    def read_labels(self):
        """The labels as text without blanks around it."""
        names, labels = self.class_names, [example.get("label") for example in self.examples]
        for number, label in enumerate(labels):
            if unlabelled(label):
                self.refuse("has no label (empty or -1); fill it or drop the example", number)
            if label not in range(len(names)) if names else not isinstance(label, int | str):
                self.refuse(f"has the label {printable(label)}; wanted: 0, 1, … or names", number)
        return [names[int(label)] if names else str(label).strip() for label in labels]

    def refuse_swallowed_lines(self, columns, text):
        """Notice a lone double quote: the lines from there to the next one stand in one text."""
        labels, place = {str(e["label"]).strip() for e in self.examples}, columns.index("label")
        if place > columns.index(text[0]):
            place -= len(columns)  # counted from the right, where the text's first line is whole
        for number, example in enumerate(self.examples):
            for line in (line for name in text for line in example[name].split("\n")[:-1]):
                cells = [cell.strip() for cell in line.split(",")]
                if len(cells) > 1 and labels & {*cells[place:][:1]}:
                    problem = "holds other lines in its text, from a lone double quote to the next"
                    self.refuse(f"{problem}; double it inside quotes, or write TSV", number)


def unlabelled(label):
    """Whether a label is none: -1, or an empty cell, which numbers make nan."""
    return label is None or str(label).strip() in ("", "-1", "nan")


def read_tables(where, dataset, data_dir):
    """{split: Table} of all files; those of one split are shards, whose names differ in numbers."""
    tables = {}
    for split, files in find_files(where, dataset, data_dir).items():
        names = sorted({file.name for file in files})
        if len({re.sub(r"\d+", "", name) for name in names}) > 1:
            fail(f"{where}: {' and '.join(names)} would both be the {split} split; keep one")
        shards, class_names = zip(*(read_file(where, file) for file in files), strict=True)
        if any(names != class_names[0] for names in class_names):
            fail(f"{where}: the files of the {split} split name their classes differently")
        examples = [example for shard in shards for example in shard]
        for example in examples:
            if "labels" in example and "label" in example:
                fail(f"{where}: the {split} split has both label and labels; drop one")
            if "labels" in example:
                example["label"] = example.pop("labels")
        quoted = files[0].suffix.lower() == ".csv"
        tables[split] = Table(where, split, examples, class_names[0], quoted)
    return tables


@functools.cache  # a process reads a data set once, whatever the seeds
def read_examples(dataset, data_dir):
    """The data set's checked Examples; validation serves as test where test is hidden or absent."""
    if dataset in DEMOS:
        blank = {"pair": None, "label": None}
        splits = {name: blank | columns for name, columns in demo.splits(dataset in TEXT).items()}
        classes = None if dataset in TEXT else ["negative", "positive"]
        return Examples(splits["train"], splits["test"], splits.get("validation"), classes, "test")

    where = f"--data_dir {data_dir}" if dataset in HUB else f"--dataset {dataset}"
    tables = read_tables(where, dataset, data_dir)
    needed = ("train", "validation", "test") if dataset in TEXT else ("train",)
    if not {*needed} <= tables.keys():
        files = f"{' and '.join(needed)} files ({', '.join(ENDINGS)})"
        fail(f"{where}: needs {files}; it has {' and '.join(sorted(tables)) or 'none'}")
    if dataset in TEXT:
        train, validation, test = (tables[name].read(labelled=False) for name in needed)
        return Examples(train, test, validation, None, "test")

    hidden = "test" not in tables or all(
        unlabelled(e.get("label")) for e in tables["test"].examples
    )
    scored = "validation" if "validation" in tables and hidden else "test"
    splits = {n: tables[n].read(labelled=True) for n in ("train", scored) if n in tables}
    used = sorted(set(splits["train"]["label"]))
    if len(used) < 2:
        tables["train"].refuse(
            f"has the label {printable(used[0])} alone; wanted: two or more classes"
        )
    kind = int if all(name.isdecimal() for name in used) else str
    classes = [*dict.fromkeys(tables["train"].class_names or sorted(used, key=kind))]
    for name, columns in splits.items():
        if (columns["pair"] is None) != (splits["train"]["pair"] is None):
            fail(f"{where}: of train and {name} only one has a second text")
        for label in map(printable, set(columns["label"]) - set(classes)):
            others = printable(", ".join(classes), 200)
            tables[name].refuse(f"has the label {label}; train has {others}")
        columns["label"] = [classes.index(label) for label in columns["label"]]
    source = scored if scored in splits else "a fifth of train"
    test = splits.get(scored, {"text": [], "pair": None, "label": []})
    return Examples(splits["train"], test, None, classes, source)
