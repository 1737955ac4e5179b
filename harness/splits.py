"""What a seed draws: named random numbers, and the train, dev and test examples of a run as tokens.

The protocol: the test examples are the same for every seed; dev examples and the training subset
are the seed's own. No training example has the tokens of a dev or held-out example; of a data set
of phrases, as SST-2, none stands word for word inside one.
"""

import functools
import hashlib
import itertools
import math
import re
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from harness.process import fail, say
from harness.rows import load_tokenizer, tokenize
from harness.text import printable


def seed_for(*names):
    """A seed for one named use of random numbers, so that no use shifts another's."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big")


def generator_for(*names):
    """A CPU generator of its own for one named use: generator_for(seed, "order", epoch)."""
    return torch.Generator().manual_seed(seed_for(*names))


# What decides a run's data: attributes of a run.
FLAGS = "dataset data_dir model seed max_length train_samples dev_samples test_samples heldout"
DataFlags = namedtuple("DataFlags", [*FLAGS.split(), "eval_only"])  # an adapter names the classes


@dataclass
class Split:
    """Examples as one flat tensor: example i is tokens[starts[i]:starts[i + 1]]."""

    tokens: torch.Tensor  # (total,) int32
    starts: torch.Tensor  # (examples + 1,) int64
    labels: torch.Tensor | None  # (examples,) int64
    scorable: torch.Tensor | None  # (total,) bool, of running text: not added, not unknown
    types: torch.Tensor | None = None  # (total,) int8, segment ids, where one is not 0
    cut: int = 0  # how many examples --max_length made shorter

    @property
    def lengths(self):
        return self.starts.diff()

    def sha256(self):
        digest = hashlib.sha256()
        for tensor in (self.tokens, self.starts, self.labels, self.scorable, self.types):
            digest.update(b"" if tensor is None else tensor.numpy().tobytes())
        return digest.hexdigest()


def describe(run, examples, task, splits, official):
    """The data's part of the result file, and lines on the terminal. Same examples, same hash."""
    data = {"task": task, "test_split": examples.test_split, "classes": examples.classes}
    data["official"] = official
    for name, split in splits.items():
        data |= {name: len(split.lengths), f"{name}_sha256": split.sha256()}
    sizes = ", ".join(f"{data[name]:,} {name}" for name in splits)
    kind = {"classification": "examples", "mlm": "masked-LM blocks", "clm": "causal blocks"}[task]
    name = f"{Path(run.dataset).name}, seed {run.seed}"
    other = examples.test_split != "test"
    say(f"{name}: {sizes} {kind}{f' (the test set is {examples.test_split})' * other}")
    if examples.classes:
        labels = {name: split.labels for name, split in splits.items()}
        size = len(examples.classes)
        data["class_counts"] = {n: v.bincount(minlength=size).tolist() for n, v in labels.items()}
        rows = [*zip(examples.classes, *data["class_counts"].values(), strict=True)]
        shown = [f"{printable(name)} {train}/{dev}/{test}" for name, train, dev, test in rows[:20]]
        say(f"classes (train/dev/test): {', '.join(shown)}{', …' * (size > 20)}")
        lacking = [name for name, train, dev, _ in rows if not train or not dev]
        if lacking:
            say(f"train or dev has no example of the class {printable(', '.join(lacking), 200)}")
        lengths = torch.cat([split.lengths for split in splits.values()])
        middle, high = np.percentile(lengths, (50, 95))
        cut = sum(split.cut for split in splits.values())
        said = f"median {middle:.0f}, 95 % have {high:.0f} or fewer; {cut:,} of {len(lengths):,}"
        say(f"tokens per example: {said} are cut at --max_length {run.max_length}")
    return data


def permuted(numbers, *names):
    """The numbers in a random order of this named use."""
    order = torch.randperm(len(numbers), generator=generator_for(*names)).tolist()
    return [numbers[i] for i in order]


class Tokens:
    """A split's labelled examples as tokens; each is tokenized when it is first asked for."""

    def __init__(self, columns, tokenizer, pad, max_length):
        self.columns, self.tokenizer, self.pad = columns, tokenizer, pad
        self.max_length, self.made = max_length, {}

    def of(self, numbers):
        """(token ids, segment ids, whether --max_length cut it) of each of these examples."""
        new, size = [n for n in dict.fromkeys(numbers) if n not in self.made], self.max_length
        texts, pairs = (
            self.columns[key] and [self.columns[key][number] for number in new]
            for key in ("text", "pair")
        )
        if not pairs:
            texts = [beginning(text, self.tokenizer, size) for text in texts]
        options = {"truncation": True, "max_length": size}
        encoded = tokenize(texts, self.tokenizer, "examples", pairs, **options)
        ids = [row or [self.pad] for row in encoded["input_ids"]]  # a text may give no token
        types = encoded["token_type_ids"] or [[0] * len(row) for row in ids]
        cut = encoded["cut"] or [len(row) == size for row in ids]
        arrays = zip(map(np.int32, ids), map(np.int8, types), cut, strict=True)
        self.made |= zip(new, arrays, strict=True)
        return [self.made[number] for number in numbers]

    def texts(self, numbers):
        """What the model reads of each of these examples, to compare."""
        return [ids.tobytes() for ids, *_ in self.of(numbers)]


def beginning(text, tokenizer, length):
    """The text, or of a very long one a beginning with twice the tokens that are read.

    A token depends on the text around it alone, so that the first `length` stay the same.
    """
    size, options = 100 * length, {"add_special_tokens": False}
    while size < len(text) and tokenizer.truncation_side == "right":
        if len(tokenizer(text[:size], **options)["input_ids"]) >= 2 * length:
            return text[:size]
        size *= 10
    return text


@functools.lru_cache(maxsize=1)  # every seed draws from the same tokens
def labelled_tokens(examples, model, max_length, pad):
    """(Tokens of the training examples, Tokens of the test examples)."""
    options = (load_tokenizer(model)[0], pad, max_length)
    return Tokens(examples.train, *options), Tokens(examples.test, *options)


def split_examples(run, examples, pad):
    """Labelled examples -> ({"train", "dev", "test": Split}, number of official test examples).

    Without a test file a fifth of each class, the same for every seed, is the official test set.
    --heldout examples come behind it. Dev is --dev_samples, or a tenth of train, at most 500.
    """
    tokens, test_tokens = labelled_tokens(examples, run.model, run.max_length, pad)
    numbers, taken = range(len(examples.train["text"])), set()

    def apart(candidates, size, *names):
        """The first `size` in random order of the candidates whose tokens are not `taken`."""
        order, picked = permuted(candidates, *names), []
        while order and len(picked) < size:
            batch, order = order[: size - len(picked)], order[size - len(picked) :]
            texts = zip(batch, tokens.texts(batch), strict=True)
            picked += [number for number, text in texts if text not in taken]
        return picked

    def half(size, *names):
        return lambda candidates: apart(candidates, min(size, len(candidates) // 2), *names)

    def fifth(candidates):
        picked, once = [], {examples.plain[number]: number for number in candidates}.values()
        for label, name in enumerate(examples.classes):
            members = [number for number in once if examples.train["label"][number] == label]
            if 0 < len(members) < 10:
                few = f"the class {printable(name)} has {len(members)} different examples"
                fail(f"--dataset {run.dataset}: {few}; 10 give a test set, or add a test file")
            picked += permuted(members, "fifth")[: len(members) // 5]
        return picked

    def cut(rest, choose):
        picked, rest = examples.cut(rest, choose)
        taken.update(tokens.texts(picked))
        return picked, rest

    official, rest = range(len(examples.test["text"])), numbers
    if not official:
        (official, rest), test_tokens = cut(numbers, fifth), tokens
    official = sorted(permuted(official, "test")[: run.test_samples])
    held, rest = cut(rest, half(run.heldout, "heldout"))
    dev, rest = cut(rest, half(run.dev_samples or min(500, len(numbers) // 10), run.seed, "dev"))
    train = sorted(apart(rest, run.train_samples or len(rest), run.seed, "train"))
    if not train or not dev:
        few = f"{len(numbers)} training examples are too few, or too many are equal; 20 or more"
        fail(f"--dataset {run.dataset}: {few}")
    splits = {"train": [(tokens, train)], "dev": [(tokens, dev)]}
    splits["test"] = [(test_tokens, official), (tokens, held)]
    return {name: as_split(*sources) for name, sources in splits.items()}, len(official)


def as_split(*sources):
    """A Split of examples; each source is (Tokens, numbers of its examples)."""
    labels = [tokens.columns["label"][number] for tokens, numbers in sources for number in numbers]
    rows = [row for tokens, numbers in sources for row in tokens.of(numbers)]
    ids, types, cut = zip(*rows, strict=True)
    types, _ = flat(types)
    return Split(*flat(ids), torch.tensor(labels), None, types if types.any() else None, sum(cut))


def flat(lists):
    """Lists of token ids -> (tokens (total,) int32, starts (examples + 1,) int64)."""
    tokens = np.concatenate(lists, dtype=np.int32, casting="unsafe")
    return torch.from_numpy(tokens), torch.tensor([0, *map(len, lists)]).cumsum(0)


def split_text(run, examples, masked):
    """Running text in blocks -> ({"train", "dev", "test": Split}, number of test blocks).

    An encoder's block (`masked`) is [CLS] … [SEP], max_length tokens in all. A decoder's begins
    with the token that its tokenizer puts before every text, if it does (Llama does, GPT-2 not).
    Dev is --dev_samples blocks of validation, or as many as train has, at most 500.
    """
    tokenizer, _ = load_tokenizer(run.model)
    if run.heldout:
        fail(f"--heldout {run.heldout}: only for labelled examples, {run.dataset} has none")
    start, end, splits = [], [], {}
    if masked:
        start, end = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
        if None in (*start, *end, tokenizer.mask_token_id):
            fail(f"--model {run.model}: its tokenizer lacks a mask, cls or sep token, masked LM's")
    elif tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        start = [tokenizer.bos_token_id]
    kinds = masked and tokenizer("a").get("token_type_ids") or [0]  # of [CLS], text and [SEP]
    size, sizes = run.max_length - len(start + end), {"dev": run.dev_samples}
    sizes |= {"train": run.train_samples, "test": run.test_samples}
    for name, (tokens, scorable) in read_streams(examples, run.model).items():
        if name == "dev" and not run.dev_samples:
            sizes["dev"] = min(500, len(splits["train"].lengths))
        names = ["test"] if name == "test" else [run.seed, name]
        blocks = permuted(range(math.ceil(len(tokens) / size)), *names)[: sizes[name]]
        slices = [slice(i * size, (i + 1) * size) for i in sorted(blocks)]
        is_word = [np.pad(scorable[words], (len(start), len(end))) for words in slices]
        ids, starts = flat([np.concatenate([start, tokens[words], end]) for words in slices])
        types = torch.full_like(ids, kinds[len(kinds) // 2])
        types[starts[:-1]], types[starts[1:] - 1] = kinds[0], kinds[-1]
        types = types if any(kinds) else None
        splits[name] = Split(ids, starts, None, torch.from_numpy(np.concatenate(is_word)), types)
    return splits, len(splits["test"].lengths)


@functools.lru_cache(maxsize=1)  # every seed cuts its blocks from the same streams
def read_streams(examples, model):
    """{"train", "dev", "test": (tokens (n,) int32, scorable (n,) bool)} of running text, in numpy.

    WikiText's `<unk>` is one unknown word. It becomes the tokenizer's unknown token where that is a
    token of its own. Where there is none, or it doubles as the end of text (GPT-2, SmolLM2), the
    text stays as it is and none of its pieces is scored.
    """
    tokenizer, _ = load_tokenizer(model)
    unknown = tokenizer.unk_token_id
    others = ("eos_token_id", "bos_token_id", "pad_token_id", "mask_token_id")
    distinct = unknown is not None and unknown not in [getattr(tokenizer, o) for o in others]
    # SmolLM2's unknown token is <|endoftext|>, which is not its end of text.
    distinct = distinct and "unk" in tokenizer.unk_token.lower()
    options = {"add_special_tokens": False, "return_offsets_mapping": tokenizer.is_fast}
    splits = {"train": examples.train, "dev": examples.validation, "test": examples.test}
    for name, columns in splits.items():
        lines = [text.rstrip("\n") + "\n" for text in columns["text"] if text.strip()]
        if not tokenizer.is_fast:  # written in Python: no offsets, but it reads its own `<unk>`
            if not distinct and any("<unk>" in line for line in lines):
                fail(f"--model {model}: its tokenizer does not tell what becomes of `<unk>`")
            lines = [line.replace("<unk>", tokenizer.unk_token or "") for line in lines]
        encoded = tokenize(lines, tokenizer, name, **options)
        ids = encoded["input_ids"] or [[]]
        tokens = flat(ids)[0].numpy()
        piece = np.zeros(len(tokens), bool)  # whether a token is part of an `<unk>`
        if tokenizer.is_fast and len(tokens):
            text, begin = "".join(lines), np.cumsum([0, *map(len, lines)])[:-1]
            covered = np.zeros(len(text) + 1, int)  # how many characters before this are `<unk>`'s
            for match in re.finditer("<unk>", text):
                covered[match.start() + 1 : match.end() + 1] = 1
            places = np.array([*itertools.chain(*encoded["offset_mapping"])])  # in their lines
            places += np.repeat(begin, [*map(len, ids)])[:, None]
            before, after = covered.cumsum()[places].T
            piece = after > before
            if distinct:  # the first piece of each becomes the unknown token, the others go
                first = piece & (before % len("<unk>") == 0)
                tokens[first] = unknown
                tokens, piece = tokens[first | ~piece], piece[first | ~piece]
        scorable = tokens != unknown if distinct else ~piece
        if not scorable.any():
            fail(f"--model {model}: its tokenizer knows no word of the {name} text")
        splits[name] = tokens, scorable
    return splits
