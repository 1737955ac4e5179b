"""The demo, which needs no network: generated film reviews and a tiny DistilBERT.

Counting words is not enough for the reviews. There is negation ("not a dull moment in the plot")
and contrast ("the plot is weak, but the acting saves it"), where word order says which clause
decides. Six in a hundred praise one thing and blame another; a coin gives their label, so that 97 %
is the best possible score.

The model is pre-trained on unlabelled text of the same grammar, in which reviewers also say what
they felt ("i loved it."). That word is always masked, as in SKEP (Tian et al. 2020, arXiv
2005.05635); of the others a tenth. Plain statements come first, then negation, then contrast, so
that half a minute is enough. One line in fifty is about restaurants, the domain of demo_lm.
"""

import atexit
import functools
import hashlib
import os
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

GOOD = """great superb moving clever funny charming gripping fresh warm brilliant lively tender
    sharp vivid delightful graceful witty rich bold splendid lovely touching""".split()
BAD = """dull clumsy bland tedious boring weak messy stale shallow lifeless tiresome silly dreary
    hollow painful lazy flat crude stiff forced poor dreadful""".split()
LOVED, HATED = "loved enjoyed praised treasured".split(), "hated regretted loathed despised".split()
FILMS = (  # what a review is about, and what it says beside
    """plot acting script cast music ending dialogue pacing camera direction story humour lead
    opening""".split(),
    "we saw it on a rainy sunday|my sister chose it|it lasts two hours|tickets were sold out",
)
FOOD = (
    """soup service waiter menu bread kitchen dessert steak wine sauce table salad coffee
    chef""".split(),
    "we sat near the window|lunch was late|my uncle paid the bill|the dining room was full",
)
# {n}: a noun; {x}: adjectives of the clause's own polarity; {y}: of the opposite one
PLAIN = "the {n} is {x}|the {n} is really {x}|i found the {n} {x}|the {x} {n} stands out"
NEGATED = (
    "the {n} is not {y}|the {n} is hardly {y}|the {n} is far from {y}|the {n} is anything but {y}|"
    "not a {y} moment in the {n}|nobody would call the {n} {y}|it is not true that the {n} is {y}"
)
TWICE = "nobody would say the {n} is not {x}|you could not call the {n} anything but {x}"
SHAPES = {  # how often, in percent; the last two are the mixed ones
    "{this}": 36,
    "{this} and {same}": 26,
    "{other}, but the {n} {saves} it": 10,
    "{other}, but {this}": 12,
    "although {other}, {this}": 6,
    "{this}, even if {other}": 4,
    "{this} and {other}": 3,
    "{other} and {this}": 3,
}


def clause(rng, good, domain, weights):
    """A statement that is good or bad; weights: how often plain, negated, negated twice."""
    template = rng.choice(rng.choices((PLAIN, NEGATED, TWICE), weights)[0].split("|"))
    own, opposite = (GOOD, BAD) if good else (BAD, GOOD)
    x, y = (" and ".join(rng.sample(words, rng.choice((1, 1, 2)))) for words in (own, opposite))
    return template.format(n=rng.choice(domain[0]), x=x, y=y)


def review(rng, good, domain=FILMS):
    """One to three sentences that say, on the whole, good or bad."""
    shape = rng.choices([*SHAPES], [*SHAPES.values()])[0]
    weights = (85, 15, 0) if "other" in shape else (64, 32, 4)  # contrast is hard enough
    this, same, other = (clause(rng, side, domain, weights) for side in (good, good, not good))
    words = {"n": rng.choice(domain[0]), "saves": "saves" if good else "ruins"}
    text = shape.format(this=this, same=same, other=other, **words)
    aside = rng.choice(domain[1].split("|"))
    return rng.choice((*[f"{text}."] * 3, f"{aside}. {text}.", f"{text}. {aside}."))


def confession(rng, domain, stage=1.0):
    """A review and what the reviewer felt; stage, 0 to 1: plain at first, then harder."""
    good = rng.random() < 0.5
    hard, weights = stage > 0.35 and rng.random() < 0.9, (1, 0, 0) if stage < 0.17 else (50, 45, 5)
    text = review(rng, good, domain) if hard else clause(rng, good, domain, weights) + "."
    felt = f"i {rng.choice(LOVED if good else HATED)} it."
    return rng.choice((f"{felt} {text}", f"{text} {felt}"))


def splits(lm=False):
    """The demo's examples, always the same, no text twice: {split: {"text": […], "label": […]}}.

    With lm=True unlabelled lines about restaurants: {split: {"text": […]}}.
    """
    rng, seen, result = random.Random(2 if lm else 1), set(), {}
    sizes = {"train": 2000, "validation": 300, "test": 300} if lm else {"train": 2000, "test": 1000}
    for name, size in sizes.items():
        texts = {}  # a dict keeps their order
        while len(texts) < size:
            text = confession(rng, FOOD) if lm else review(rng, len(texts) % 2 == 1)
            texts |= {} if text in seen else {text: len(texts) % 2}
        seen |= texts.keys()
        result[name] = {"text": [*texts]} | ({} if lm else {"label": [*texts.values()]})
    return result


def pretrain(folder, steps=2000, batch=32):
    """Train the tiny DistilBERT as a masked LM; model and tokenizer go to `folder`."""
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import BertTokenizer, DistilBertConfig, DistilBertForMaskedLM, logging

    logging.disable_progress_bar()
    lists = [*GOOD, *BAD, *LOVED, *HATED, *FILMS[0], *FOOD[0], *SHAPES]
    grammar = " ".join([*lists, FILMS[1], FOOD[1], PLAIN, NEGATED, TWICE, "ruins i it"])
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "."]
    words = dict.fromkeys([*special, *re.findall("[a-z]+", grammar)])
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=128)
    felt = torch.tensor(tokenizer.convert_tokens_to_ids(LOVED + HATED))
    config = DistilBertConfig(vocab_size=len(words), dim=64, n_layers=2, n_heads=4, hidden_dim=256)
    config.max_position_embeddings = 128
    config.initializer_range = 0.1  # with BERT's 0.02 attention passes next to nothing here
    rng, generator = random.Random(0), torch.random.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine a second one costs more than it gives
    torch.default_generator.manual_seed(0)
    model = DistilBertForMaskedLM(config).eval()  # no dropout: one short epoch gains nothing by it
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    schedule = LambdaLR(optimizer, lambda i: min(1, (i + 1) / 150, 4 * (steps - i) / steps))
    for step in range(steps):
        if step % 16 == 0:  # 16 batches, of like length within a batch: half the padding
            domains = [rng.choice([FILMS] * 49 + [FOOD]) for _ in range(16 * batch)]
            lines = [confession(rng, domain, step / steps) for domain in domains]
            rows = sorted(tokenizer(lines)["input_ids"], key=len)
            parts = rng.sample([rows[i : i + batch] for i in range(0, len(rows), batch)], 16)
        part = parts[step % 16]
        if step % 4 == 0 and step > steps / 3:  # running text too: demo_lm's blocks are long
            text, size = sum((row[1:-1] for row in part), []), rng.choice((62, 126))
            part = [[2, *text[i : i + size], 3] for i in range(0, len(text), size)]
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in part], batch_first=True)
        word, target = tokens > 4, tokens.clone()  # (B, L)
        scored = torch.isin(tokens, felt) | (torch.rand(tokens.shape) < 0.1) & word
        inputs = tokens.masked_fill(scored, 4)
        # [CLS], which a classifier reads, predicts any word of its row: or it learns nothing.
        target[:, :1], scored[:, 0] = tokens.gather(1, word.float().multinomial(1)), True
        logits = model(input_ids=inputs, attention_mask=(tokens > 0).long()).logits
        torch.nn.functional.cross_entropy(logits[scored], target[scored]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.random.set_rng_state(generator)  # the caller's random numbers go on as before
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@functools.cache  # asked for several times a run
def model():
    """Folder of the tiny DistilBERT and its tokenizer, in the user's cache; made if missing."""
    name = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # other code, other model
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        home = cache / "peft-from-scratch"
        if (home / name).is_dir():
            return home / name
        home.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=home))
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        home = building = Path(tempfile.mkdtemp(prefix="peft-from-scratch-"))
        print(f"demo: no cache folder ({error}); for this run: {home}", file=sys.stderr)
    atexit.register(shutil.rmtree, building, ignore_errors=True)
    print("pre-training a tiny DistilBERT for the demo, about 30 s, once", flush=True)
    pretrain(building / "model")
    try:
        (building / "model").rename(home / name)  # whole or not at all
    except OSError:
        if not (home / name).is_dir():  # it is there where another process was faster
            raise
    return home / name
