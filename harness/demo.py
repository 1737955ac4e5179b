"""The demo's stand-in for the hub: generated film reviews and a tiny DistilBERT, so that everything runs offline.

    python demo.py      prints a few rows, and where the model lies (which it makes, where there is none yet)

A small grammar writes reviews in which counting words is not enough: negation ("not a dull moment in the plot"), weak
words ("hardly funny"), and contrast ("the plot is weak, but the acting saves it"), where word order says which clause
decides. Six in a hundred praise one thing, blame another and stop there: a coin gives their label, so 97 % is best.

The model is pre-trained on unlabelled text of the same grammar, in which reviewers also say what they felt ("i loved
it."): predicting that word, which no labelled row holds, teaches polarity. It is always masked, as in SKEP (Tian et al.
2020, arXiv 2005.05635); of the others a tenth. Plain statements come first, then negation, then contrast: in that order
half a minute is enough. The domain of demo_lm, restaurants, is one line in fifty.
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

GOOD = ("great superb moving clever funny charming gripping fresh warm brilliant lively tender sharp vivid delightful "
        "graceful witty rich bold splendid lovely touching").split()
BAD = ("dull clumsy bland tedious boring weak messy stale shallow lifeless tiresome silly dreary hollow painful lazy "
       "flat crude stiff forced poor dreadful").split()
LOVED, HATED = "loved enjoyed praised treasured".split(), "hated regretted loathed despised".split()
FILMS = ("plot acting script cast music ending dialogue pacing camera direction story humour lead opening".split(),
         ["we saw it on a rainy sunday", "my sister chose it", "it lasts two hours", "tickets were sold out"])
FOOD = ("soup service waiter menu bread kitchen dessert steak wine sauce table salad coffee chef".split(),
        ["we sat near the window", "lunch was late", "my uncle paid the bill", "the dining room was full"])

# {n}: a noun; {x}: adjectives of the clause's own polarity, {y}: of the opposite; SHAPES: frequency in %, mixed last
PLAIN = ("the {n} is {x}", "the {n} is really {x}", "i found the {n} {x}", "the {x} {n} stands out")
NEGATED = ("the {n} is not {y}", "the {n} is hardly {y}", "the {n} is far from {y}", "the {n} is anything but {y}",
           "not a {y} moment in the {n}", "nobody would call the {n} {y}", "it is not true that the {n} is {y}")
TWICE = ("nobody would say the {n} is not {x}", "you could not call the {n} anything but {x}")
SHAPES = {"{this}": 36, "{this} and {same}": 26, "{other}, but the {n} {saves} it": 10, "{other}, but {this}": 12,
          "although {other}, {this}": 6, "{this}, even if {other}": 4, "{this} and {other}": 3, "{other} and {this}": 3}


def clause(rng, good, domain, weights):
    """One statement that is good or bad; `weights` say how often it is plain, negated, negated twice."""
    template = rng.choice(rng.choices((PLAIN, NEGATED, TWICE), weights)[0])
    x, y = (" and ".join(rng.sample(words, rng.choice((1, 1, 2)))) for words in ((GOOD, BAD) if good else (BAD, GOOD)))
    return template.format(n=rng.choice(domain[0]), x=x, y=y)


def review(rng, good, domain=FILMS):
    """One to three sentences that say, on the whole, good or bad."""
    shape = rng.choices([*SHAPES], [*SHAPES.values()])[0]
    weights = (85, 15, 0) if "other" in shape else (64, 32, 4)  # contrast is hard enough with little negation
    this, same, other = (clause(rng, side, domain, weights) for side in (good, good, not good))
    text = shape.format(this=this, same=same, other=other, n=rng.choice(domain[0]), saves="saves" if good else "ruins")
    aside = rng.choice(domain[1])
    return rng.choice((*[f"{text}."] * 3, f"{aside}. {text}.", f"{text}. {aside}."))


def confession(rng, domain, stage=1.0):
    """A line of unlabelled text: a review and what the reviewer felt. `stage` in 0…1: first plain, then harder."""
    good = rng.random() < 0.5
    hard, weights = stage > 0.35 and rng.random() < 0.9, (1, 0, 0) if stage < 0.17 else (50, 45, 5)
    text = review(rng, good, domain) if hard else clause(rng, good, domain, weights) + "."
    felt = f"i {rng.choice(LOVED if good else HATED)} it."
    return rng.choice((f"{felt} {text}", f"{text} {felt}"))


def splits(lm=False):
    """The demo's rows, the same at every call, no text twice: {"train": {"text": […], "label": […]}, "test": …}.

    With lm=True unlabelled lines about restaurants: {"train": {"text": […]}, "validation": …, "test": …}.
    """
    rng, seen, result = random.Random(2 if lm else 1), set(), {}
    sizes = {"train": 2000, "validation": 300, "test": 300} if lm else {"train": 2000, "test": 1000}
    for name, size in sizes.items():
        labels, texts = [i % 2 for i in range(size)], []
        while len(texts) < size:
            text = confession(rng, FOOD) if lm else review(rng, labels[len(texts)] == 1)
            if text not in seen:
                seen.add(text)
                texts.append(text)
        result[name] = {"text": texts} if lm else {"text": texts, "label": labels}
    return result


def pretrain(folder, steps=2000, batch=32):
    """Train the tiny DistilBERT on unlabelled text by masked language modelling; model and tokenizer go to `folder`."""
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import BertTokenizer, DistilBertConfig, DistilBertForMaskedLM, logging
    logging.disable_progress_bar()
    grammar = " ".join([*GOOD, *BAD, *LOVED, *HATED, *FILMS[0], *FILMS[1], *FOOD[0], *FOOD[1], *PLAIN, *NEGATED,
                        *TWICE, *SHAPES, "ruins i it"])
    words = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", ".", *re.findall("[a-z]+", grammar)])
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=128)
    felt = torch.tensor(tokenizer.convert_tokens_to_ids(LOVED + HATED))
    rng, threads = random.Random(0), torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain little from a second one, and on a busy machine lose tenfold
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had happened
        torch.default_generator.manual_seed(0)  # torch.manual_seed would move the GPU's generator too
        config = DistilBertConfig(
            vocab_size=len(words), dim=64, n_layers=2, n_heads=4, hidden_dim=256, max_position_embeddings=128,
            initializer_range=0.1)  # with BERT's 0.02 attention passes next to nothing at this width
        model = DistilBertForMaskedLM(config).eval()  # no dropout: in one short epoch it costs more than it gives
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
        schedule = LambdaLR(optimizer, lambda i: min(1, (i + 1) / 150, 4 * (steps - i) / steps))
        for step in range(steps):
            if step % 16 == 0:  # lines for 16 batches, of like length within a batch: half the padding
                lines = [confession(rng, rng.choice([FILMS] * 49 + [FOOD]), step / steps) for _ in range(16 * batch)]
                rows = sorted(tokenizer(lines)["input_ids"], key=len)
                parts = rng.sample([rows[i:i + batch] for i in range(0, len(rows), batch)], 16)
            part = parts[step % 16]
            if step % 4 == 0 and step > steps / 3:  # running text too: demo_lm's blocks are longer than a line
                text, size = sum((row[1:-1] for row in part), []), rng.choice((62, 126))
                part = [[2, *text[i:i + size], 3] for i in range(0, len(text), size)]
            tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in part], batch_first=True)  # (B, L)
            word, target = tokens > 4, tokens.clone()
            scored = torch.isin(tokens, felt) | (torch.rand(tokens.shape) < 0.1) & word
            inputs = tokens.masked_fill(scored, 4)
            # [CLS], which a classifier will read, predicts any one word of its row: else nothing teaches it to look
            target[:, :1], scored[:, 0] = tokens.gather(1, word.float().multinomial(1)), True
            logits = model(input_ids=inputs, attention_mask=(tokens > 0).long()).logits  # (B, L, words)
            torch.nn.functional.cross_entropy(logits[scored], target[scored]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@functools.cache  # asked for several times a run; without a cache folder each call would train anew
def model():
    """Folder of the tiny DistilBERT and its tokenizer: made at the first call, later found in the user's cache."""
    name = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # a changed grammar makes a new model
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-from-scratch"
        if (home / name).is_dir():
            return home / name
        home.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=home))
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        home = building = Path(tempfile.mkdtemp(prefix="peft-from-scratch-"))
        print(f"demo: no cache folder ({error}); the model goes to {home}, for this run only", file=sys.stderr)
    atexit.register(shutil.rmtree, building, ignore_errors=True)
    print("pre-training a tiny DistilBERT for the demo, about 30 s, once", flush=True)
    pretrain(building / "model")
    try:
        (building / "model").rename(home / name)  # whole or not at all
    except OSError:
        if not (home / name).is_dir():  # it is there where another process was faster
            raise
    return home / name


def main():
    """Print a few rows and where the model lies."""
    for name, rows in splits().items():
        for text, label in list(zip(rows["text"], rows["label"], strict=True))[:4]:
            print(f"{name}  {label}  {text}")
    print(*(f"lm     –  {text}" for text in splits(lm=True)["train"]["text"][:3]), sep="\n")
    print(model())


if __name__ == "__main__":
    main()
