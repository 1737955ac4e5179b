"""The demo's stand-in for the hub: generated film reviews and a tiny DistilBERT, so that everything runs offline.

    python demo.py                 a few rows, and where the model lies
    python lora.py                 uses both: --dataset demo is the default, and demo_lm is for masked language modelling

A small grammar writes reviews in which counting words is not enough: negation ("not a dull moment in the plot"), weak
words ("hardly funny"), double negation, and contrast ("the plot is weak, but the acting saves it"), where word order says
which clause decides. A twentieth of the reviews praise one thing, blame another and leave it at that; their label is the
reviewer's own coin, so no model can score 100 %.

The model is pre-trained here, once, on unlabelled text of the same grammar. There each review ends or begins with what the
reviewer felt ("i loved it."), and predicting that masked word from the rest teaches polarity; the labelled rows never say
it. As in SKEP (Tian et al. 2020, arXiv 2005.05635) the sentiment word is always masked, other words at 15 %. The first
fifth of the text is plain, the second adds negation, the rest contrast: in that order half a minute on a CPU is enough.
Text of demo_lm is of another domain, restaurants, which is one line in twenty in pre-training.
"""

import hashlib
import os
import random
import re
import shutil
import string
import sys
import tempfile
from pathlib import Path

GOOD = ("great superb moving clever funny charming gripping fresh warm brilliant lively tender sharp vivid delightful "
        "graceful witty rich bold splendid lovely touching").split()
BAD = ("dull clumsy bland tedious boring weak messy stale shallow lifeless tiresome silly dreary hollow painful lazy flat "
       "crude stiff forced poor dreadful").split()
LOVED, HATED = "loved enjoyed praised treasured".split(), "hated regretted loathed despised".split()
FILMS = ("plot acting script cast music ending dialogue pacing camera direction story humour lead opening score".split(),
         ["we saw it on a rainy sunday", "my sister chose it", "it lasts two hours", "tickets were sold out"])
FOOD = ("soup service waiter menu bread kitchen dessert steak wine sauce table salad coffee chef fish".split(),
        ["we sat near the window", "lunch was late", "my uncle paid the bill", "the dining room was full"])

# {n} is a noun, {x} adjectives of the clause's own polarity, {y} of the opposite one
PLAIN = ("the {n} is {x}", "the {n} is really {x}", "i found the {n} {x}", "the {n} stays {x} throughout",
         "the {x} {n} stands out")
NEGATED = ("the {n} is not {y}", "the {n} is hardly {y}", "the {n} is far from {y}", "the {n} is anything but {y}",
           "the {n} is never {y}", "not a {y} moment in the {n}", "there is nothing {y} about the {n}",
           "nobody would call the {n} {y}", "it is not true that the {n} is {y}")
TWICE = ("nobody would say the {n} is not {x}", "you could not call the {n} anything but {x}")
CONTRAST = ("{other}, but {this}", "{other}, but {this}", "although {other}, {this}", "{this}, even if {other}")


def clause(rng, good, domain, weights=(64, 32, 4)):
    """One statement that is good or bad; `weights` say how often it is plain, negated, negated twice."""
    template = rng.choice(rng.choices((PLAIN, NEGATED, TWICE), weights)[0])
    x, y = (" and ".join(rng.sample(words, rng.choice((1, 1, 2)))) for words in ((GOOD, BAD) if good else (BAD, GOOD)))
    return template.format(n=rng.choice(domain[0]), x=x, y=y)


def review(rng, good, domain=FILMS):
    """One to three sentences that say, on the whole, good or bad."""
    this, other, kind = clause(rng, good, domain), clause(rng, not good, domain), rng.random()
    if kind < 0.36:
        text = this
    elif kind < 0.62:
        text = f"{this} and {clause(rng, good, domain)}"
    elif kind < 0.72:
        text = f"{other}, but the {rng.choice(domain[0])} {'saves' if good else 'ruins'} it"
    elif kind < 0.95:
        text = rng.choice(CONTRAST).format(this=this, other=other)
    else:
        text = " and ".join(rng.sample((this, other), 2))  # mixed: nothing in it tells the label
    aside = rng.choice(domain[1])
    return rng.choice((f"{text}.", f"{text}.", f"{aside}. {text}.", f"{text}. {aside}."))


def confession(rng, domain, stage=1.0):
    """A line of unlabelled text: a review and what the reviewer felt. `stage` in 0…1: first plain, then harder."""
    good = rng.random() < 0.5
    if stage > 0.4 and rng.random() < 0.8:
        text = review(rng, good, domain)
    else:
        text = clause(rng, good, domain, (1, 0, 0) if stage < 0.2 else (50, 45, 5)) + "."
    felt = f"i {rng.choice(LOVED if good else HATED)} it."
    return rng.choice((f"{felt} {text}", f"{text} {felt}"))


def splits(lm=False):
    """The demo's rows, the same at every call and no text twice: {"train": {"text": […], "label": […]}, "test": …}.

    With lm=True lines of unlabelled text about restaurants: {"train": {"text": […]}, "validation": …, "test": …}.
    """
    rng, seen, result = random.Random(2 if lm else 1), set(), {}
    for name, size in (("train", 2000), ("validation", 300), ("test", 300)) if lm else (("train", 2000), ("test", 1000)):
        labels, texts = [i % 2 for i in range(size)], []
        rng.shuffle(labels)
        while len(texts) < size:
            text = confession(rng, FOOD) if lm else review(rng, labels[len(texts)] == 1)
            if text not in seen:
                seen.add(text)
                texts.append(text)
        result[name] = {"text": texts} if lm else {"text": texts, "label": labels}
    return result


def pretrain(folder, steps=2000, batch=32):
    """Train the tiny DistilBERT on unlabelled text by masked language modelling; writes model and tokenizer to `folder`."""
    import torch
    from transformers import BertTokenizer, DistilBertConfig, DistilBertForMaskedLM
    from transformers.utils import logging
    logging.disable_progress_bar()

    grammar = " ".join([*GOOD, *BAD, *LOVED, *HATED, *FILMS[0], *FILMS[1], *FOOD[0], *FOOD[1], *PLAIN, *NEGATED, *TWICE,
                        *CONTRAST, "saves ruins and i it"])
    letters = string.ascii_lowercase + string.digits + string.punctuation  # so that any English text can be tokenised
    words = [*dict.fromkeys(re.findall("[a-z]+", grammar)), *letters, *(f"##{letter}" for letter in letters)]
    words = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=128)
    felt = torch.tensor(tokenizer.convert_tokens_to_ids(LOVED + HATED))

    rng = random.Random(0)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had happened
        torch.default_generator.manual_seed(0)  # torch.manual_seed would move the GPU's generator too
        # At this width BERT's usual initial spread of 0.02 lets attention pass nearly nothing: it would not learn in time.
        config = DistilBertConfig(vocab_size=len(words), dim=64, n_layers=2, n_heads=4, hidden_dim=256,
                                  max_position_embeddings=128, initializer_range=0.1)
        model = DistilBertForMaskedLM(config).eval()  # without dropout, which costs more than it gives in one short epoch
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
        for step in range(steps):
            if step % 16 == 0:  # lines of 16 batches, sorted by length: half the padding
                lines = [confession(rng, rng.choices((FILMS, FOOD), (19, 1))[0], step / steps) for _ in range(16 * batch)]
                rows = sorted(tokenizer(lines)["input_ids"], key=len)
            part = rows[step % 16 * batch:][:batch]
            if step % 16 == 0 and step > steps / 2:  # sometimes running text, for positions that no single line reaches
                text = sum((row[1:-1] for row in part), [])
                part = [[2, *text[i:i + 126], 3] for i in range(0, len(text), 126)]
            tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in part], batch_first=True)  # (B, L)
            masked = torch.isin(tokens, felt) | (torch.rand(tokens.shape) < 0.15) & (tokens > 4)
            logits = model(input_ids=tokens.masked_fill(masked, 4), attention_mask=(tokens > 0).long()).logits
            torch.nn.functional.cross_entropy(logits[masked], tokens[masked]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model():
    """Folder of the tiny DistilBERT and its tokenizer; made at the first call, then found in the user's cache.

    It lies under the hash of this file, so that a change of the grammar makes a new one. Where the cache cannot be written
    it goes to a temporary folder.
    """
    name = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-from-scratch"
    if (home / name).is_dir():
        return home / name
    try:
        home.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=home))
    except OSError as error:
        building = Path(tempfile.mkdtemp(prefix="peft-from-scratch-"))
        print(f"demo: cannot write to {home} ({error.strerror}); the model goes to {building}", file=sys.stderr)
        home = building
    print("pre-training a tiny DistilBERT for the demo, about 30 s, once", flush=True)
    pretrain(building / "model")
    try:
        (building / "model").rename(home / name)  # whole or not at all
    except OSError:  # another process was faster
        pass
    if building != home:
        shutil.rmtree(building)
    return home / name


def main():
    """Print a few rows and where the model lies."""
    for name, rows in splits().items():
        for text, label in list(zip(rows["text"], rows["label"], strict=True))[:4]:
            print(f"{name}  {label}  {text}")
    for text in splits(lm=True)["train"]["text"][:3]:
        print(f"lm     –  {text}")
    print(model())


if __name__ == "__main__":
    main()
