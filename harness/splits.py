"""What a seed draws: named random numbers, and the train, dev and test rows of a run as tokens.

The protocol: the test rows are the same for every seed; dev rows and the training subset are the
seed's own. No training row has a dev or held-out row's text, or stands inside one.
"""

import functools
import hashlib
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from harness.process import fail, say
from harness.rows import cut, load_tokenizer, read_rows, tokenize

COLUMNS = ("tokens", "labels", "scorable", "types")  # of a Split, beside its starts


def seed_for(*names):
    """A seed for one named use of random numbers, so that no use shifts another's."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big")


def generator_for(*names):
    """A CPU generator of its own for one named use: generator_for(seed, "order", epoch)."""
    return torch.Generator().manual_seed(seed_for(*names))


@dataclass
class Split:
    """Rows as one flat tensor: row i is tokens[starts[i]:starts[i + 1]]."""

    tokens: torch.Tensor  # (total,) int32
    starts: torch.Tensor  # (rows + 1,) int64
    labels: torch.Tensor | None  # (rows,) int64
    scorable: torch.Tensor | None  # (total,) bool, of running text: not added, not unknown
    types: torch.Tensor | None = None  # (total,) int8, segment ids where the tokenizer gives some

    @classmethod
    def concatenate(cls, splits):
        """One Split of the examples of several."""
        columns = [[getattr(split, name) for split in splits] for name in COLUMNS]
        tokens, labels, scorable, types = (
            None if parts[0] is None else torch.cat(parts) for parts in columns
        )
        starts = F.pad(torch.cat([split.lengths for split in splits]).cumsum(0), (1, 0))
        return cls(tokens, starts, labels, scorable, types)

    def example(self, i):
        """A Split of example i alone."""
        begin, end = self.starts[i], self.starts[i + 1]
        labels = None if self.labels is None else self.labels[i : i + 1]
        tokens, scorable, types = (
            None if part is None else part[begin:end]
            for part in (self.tokens, self.scorable, self.types)
        )
        return Split(tokens, torch.tensor([0, end - begin]), labels, scorable, types)

    @property
    def lengths(self):
        return self.starts.diff()

    def sha256(self):
        parts = [self.tokens, self.starts, self.labels, self.scorable]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(b"" if part is None else part.numpy().tobytes())
        return digest.hexdigest()


def describe(run, rows, task, train, dev, test, official):
    """The data's part of the result file, and a line on the terminal. Same rows, same hash."""
    found = {"task": task, "test_split": rows.test_split, "classes": rows.classes}
    found["official"] = official
    for name, split in (("train", train), ("dev", dev), ("test", test)):
        found |= {name: len(split.lengths), f"{name}_sha256": split.sha256()}
    sizes = ", ".join(f"{found[name]:,} {name}" for name in ("train", "dev", "test"))
    kind = {"classification": "rows", "mlm": "masked-LM blocks", "clm": "causal blocks"}[task]
    say(f"{run.settings['dataset']}, seed {run.seed}: {sizes} {kind} (test: {rows.test_split})")
    return found


def draw(rows, size, *names):
    """A random subset of `rows` in their own order; all of them where `size` is None or larger."""
    if size is None or size >= len(rows):
        return list(rows)
    picked = torch.randperm(len(rows), generator=generator_for(*names))[:size].sort().values
    return [rows[i] for i in picked.tolist()]


def flat(lists):
    """Lists of token ids -> (tokens (total,) int32, starts (rows + 1,) int64)."""
    starts = torch.tensor([0, *map(len, lists)]).cumsum(0)
    return torch.tensor([token for row in lists for token in row], dtype=torch.int32), starts


def split_rows(run, rows, tokenizer, pad):
    """Labelled rows -> (train, dev, test, number of official test rows, which come first).

    Dev is 500 whole sentences of SST-2, whose rows are phrases of one another, or a tenth of other
    data, at most 500 rows. --heldout rows are cut from train by the same rules, once for all seeds.
    """
    every = range(len(rows.train["text"]))
    held, rest = cut(rows, every, run.heldout, generator_for("heldout"))
    size = 500 if rows.whole else min(500, len(every) // 10)
    dev, rest = cut(rows, rest, size, generator_for(run.seed, "dev"))
    train = draw(rest, run.train_samples, run.seed, "train")
    official = draw(range(len(rows.test["text"])), run.test_samples, "test")
    if not train or not dev:
        fail(f"--dataset {run.dataset}: {len(every)} training rows are too few; 20 or more")

    def split(name, *parts):  # parts: (columns, row numbers)
        columns = {key: [] for key in ("text", "pair", "label")}
        for part, numbers in parts:
            for key, values in columns.items():
                values += [part[key][row] for row in numbers] if part[key] else []
        pairs = columns["pair"] or None
        options = {"truncation": True, "max_length": run.max_length}
        ids = tokenize(columns["text"], tokenizer, name, pairs, **options)
        # A decoder's tokenizer makes nothing of an empty text.
        return Split(*flat([row or [pad] for row in ids]), torch.tensor(columns["label"]), None)

    test = split("test", (rows.test, official), (rows.train, held))
    return split("train", (rows.train, train)), split("dev", (rows.train, dev)), test, len(official)


def split_text(run, tokenizer, masked):
    """Running text -> (train, dev, test, number of test blocks): streams of tokens in blocks.

    An encoder's block (`masked`) is [CLS] … [SEP], max_length tokens in all. A decoder's begins
    with the token that its tokenizer puts before every text, if it does (Llama does, GPT-2 not).
    Dev is drawn from the validation split: as many blocks as train has, at most 500.
    """
    if run.heldout:
        fail(f"--heldout {run.heldout}: only for labelled rows, {run.dataset} has none")
    start, end = [], []
    if masked:
        start, end = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
        if None in (*start, *end, tokenizer.mask_token_id):
            fail(f"--model {run.model}: its tokenizer lacks a mask, cls or sep token, masked LM's")
    elif tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        start = [tokenizer.bos_token_id]
    size, splits = run.max_length - len(start + end), []
    samples = {"train": run.train_samples, "test": run.test_samples}
    for name, (tokens, scorable) in read_streams(run.model, run.dataset, run.data_dir).items():
        if not scorable.any():
            fail(f"--dataset {run.dataset}: its {name} split has no known word")
        blocks = range(math.ceil(len(tokens) / size))
        names = ["test"] if name == "test" else [run.seed, name]
        lists, flags = [], []
        for i in draw(blocks, samples[name], *names):
            part = slice(i * size, (i + 1) * size)
            lists.append([*start, *tokens[part].tolist(), *end])
            flags += [*(False for _ in start), *scorable[part].tolist(), *(False for _ in end)]
        splits.append(Split(*flat(lists), None, torch.tensor(flags)))
        samples.setdefault("dev", min(500, len(lists)))  # train comes first
    return *splits, len(splits[-1].lengths)


@functools.lru_cache(maxsize=1)  # every seed cuts its blocks from the same streams
def read_streams(model, dataset, data_dir):
    """{"train", "dev", "test": (tokens (n,) int32, scorable (n,) bool)} of running text.

    WikiText's `<unk>` is one unknown word. It becomes the tokenizer's unknown token where that is a
    token of its own. Where there is none, or it doubles as the end of text (GPT-2, SmolLM2), the
    text stays as it is and none of its pieces is scored.
    """
    tokenizer, _ = load_tokenizer(model)
    rows, unknown = read_rows(dataset, data_dir), tokenizer.unk_token_id
    others = ("eos_token_id", "bos_token_id", "pad_token_id", "mask_token_id")
    own = unknown is not None and unknown not in [getattr(tokenizer, name) for name in others]
    own = own and "unk" in tokenizer.unk_token.lower()  # SmolLM2's is <|endoftext|>, not its eos
    streams = {}
    for name, part in (("train", rows.train), ("dev", rows.validation), ("test", rows.test)):
        lines = [text.rstrip("\n") + "\n" for text in part["text"] if text.strip()]
        if not lines:
            fail(f"--dataset {dataset}: the {name} split has no text in it")
        ids, offsets = tokenize(lines, tokenizer, name, offsets=True)
        parts = []
        for line, tokens, places in zip(lines, ids, offsets, strict=True):
            tokens, places = np.array(tokens, np.int32), np.array(places, int).reshape(-1, 2)
            covered = np.zeros(len(line) + 1, int)  # how many characters before this are `<unk>`'s
            for found in re.finditer("<unk>", line):
                covered[found.start() + 1 : found.end() + 1] = 1
            before, after = covered.cumsum()[places].T
            piece = after > before
            if own:
                first = piece & (before % len("<unk>") == 0)
                tokens[first] = unknown
                tokens = tokens[first | ~piece]
                parts.append((tokens, tokens != unknown))
            else:
                parts.append((tokens, ~piece))
        tokens, scorable = (
            torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True)
        )
        streams[name] = tokens, scorable
    return streams
