"""What the method scripts share: flags, data, base model, training loop, evaluation, measurement, result file.

Run by itself it is the baseline that every adapter is measured against: the head alone on the frozen base, or, with
--full, ordinary fine-tuning of every weight.

    python common.py --dataset sst2
    python common.py --dataset sst2 --full --lr 5e-5

A method script owns `main` and calls down into this file: parse_args, runs, load_data, load_base, (its own) adapt, train,
evaluate, measure, save_result. Nothing here knows a method; what a method wants differently it says in the dict that its
`adapt` returns.
"""

import argparse
import atexit
import base64
import contextlib
import ctypes
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import urlparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

HUB = {"sst2": ("stanfordnlp/sst2", None), "imdb": ("stanfordnlp/imdb", None),
       "wikitext2": ("Salesforce/wikitext", "wikitext-2-v1")}
LENGTHS = {"demo": 64, "demo_lm": 64, "sst2": 128, "imdb": 256, "wikitext2": 128}
DEMOS = ("demo", "demo_lm")
LANGUAGE_MODELLING = ("wikitext2", "demo_lm")
TARGETS = {  # the query and value projections, the LoRA paper's choice, under each architecture's names
    "distilbert": ["q_lin", "v_lin"],
    "bert": ["query", "value"], "roberta": ["query", "value"], "xlm-roberta": ["query", "value"],
    "electra": ["query", "value"],
    "gpt2": ["c_attn"],  # one Conv1D computes query, key and value
    "llama": ["q_proj", "v_proj"], "mistral": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"], "gemma": ["q_proj", "v_proj"], "phi3": ["qkv_proj"],
}


# ------------------------------------------------------------------------------------- small things used everywhere


def fail(message, status=2):
    """End the program with one line on stderr. Status 2: the input was wrong; 1: the run itself went wrong."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def rank():
    """This process's number under torchrun, 0 when there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words):
    """Print, once however many processes there are."""
    if rank() == 0:
        print(*words, flush=True)


def stream(*names):
    """A seed for one named use of random numbers, so that no use shifts another's: stream(seed, "order", epoch)."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big")


def generator(*names):
    """A CPU generator of its own for one named use of random numbers."""
    return torch.Generator().manual_seed(stream(*names))


@contextlib.contextmanager
def timed(seconds, key):
    """Add the time spent inside to seconds[key]."""
    start = time.perf_counter()
    yield
    seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start


# ------------------------------------------------------------------------------------------------ the command line


def number(kind, low, high, what):
    """An argparse type: `kind` within low..high, with a message that says what was wanted."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also true of nan
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value
    return convert


count = number(int, 1, 2**31, "a whole number of 1 or more")
natural = number(int, 0, 2**31, "a whole number of 0 or more")
positive = number(float, 1e-30, 1e30, "a positive number")
non_negative = number(float, 0, 1e30, "a number of 0 or more")
share = number(float, 0, 1 - 1e-9, "a share from 0 up to, not including, 1")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the flags)")

    def convert_arg_line_to_args(self, line):  # for @file: several words a line, # begins a comment
        return shlex.split(line, comments=True)


def adapter_args(parser):
    """Add the two flags that every adapter has and the baseline has not."""
    parser.add_argument("--rank", type=count, default=8, help="r, the width of A and B; the LoRA paper's usual value")
    parser.add_argument("--targets", nargs="+", metavar="NAME",
                        help="linear layers to adapt, by the end of their names (default: query and value projections)")


def parse_args(doc, file, add_args, argv=None):
    """Read the command line of the script `file`; `doc` is its docstring, `add_args` adds its own flags.

    Returns a Namespace with `method` (the script's stem), `device` and `precision` resolved. Wrong input ends the program
    with one line and status 2. Under torchrun it also joins the process group.
    """
    parser = Parser(prog=Path(file).name, description=doc, fromfile_prefix_chars="@", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="demo", help="demo, demo_lm, sst2, imdb, wikitext2, or a folder with train and test (or "
        "validation) files that have text and label columns; demo needs no network")
    add("--model", help="hub id or folder (default: distilbert-base-uncased; for the demos their own tiny model)")
    add("--data_dir", default="data", help="where DIR/sst2, DIR/imdb, DIR/wikitext2 hold parquet files; tried before the hub")
    add("--seeds", type=natural, nargs="+", default=[0], help="one run per seed; statistics want 8 or more")
    add("--split", choices=["test", "dev"], default="test", help="what to score: dev is for choosing flags, test for the end")
    add("--epochs", type=count, default=3, help="passes over the training rows")
    add("--max_steps", type=count, help="stop after this many optimizer steps, whatever --epochs says")
    add("--batch_size", type=count, default=32, help="rows a forward pass, on each device")
    add("--eval_batch_size", type=count, default=64, help="rows a forward pass while scoring; does not change the score")
    add("--grad_accum", type=count, default=1, help="forward passes per optimizer step")
    add("--lr", type=positive, default=1e-3, help="peak learning rate of the adapter; choose it by --split dev")
    add("--head_lr", type=positive, default=1e-3, help="peak learning rate of the head; keep it equal for all methods")
    add("--weight_decay", type=non_negative, default=0.0, help="AdamW's; 0 as in most adapter work")
    add("--warmup", type=share, default=0.06, help="share of the steps with rising learning rate; the LoRA paper's value")
    add("--max_length", type=count, help="tokens a row (default: 128; imdb and folders 256; demos 64)")
    add("--train_samples", type=count, help="train on a fixed random subset; the result is marked as such")
    add("--eval_samples", type=count, help="score a fixed random subset; the result is marked as such")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on a GPU that has it, else fp32")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, more time")
    add("--device", default="auto", help="cpu, cuda, cuda:1 …; auto is a GPU if there is one")
    add("--out", type=Path, default=Path("results"), help="folder for the result files and adapters")
    add("--name", help="the result's name (default: the script's, and each method flag that is not at its default)")
    add("--force", action="store_true", help="run again where a result exists, and replace it")
    add("--eval_only", type=Path, metavar="FOLDER", help="score a saved adapter instead of training one")
    add("--quality_only", action="store_true", help="time no inference and count no FLOPs: for runs beside other work, whose "
        "times are worth nothing; runs with --split dev never do")
    add("--save_every", type=count, metavar="STEPS", help="write a checkpoint this often; the same command continues from it")
    shared = {action.dest for action in parser._actions}
    parser.set_defaults(method=Path(file).stem)
    add_args(parser)

    for action in parser._actions:  # defaults are set in one place and shown from there, also those a script overrides
        if action.default not in (None, False, argparse.SUPPRESS) and "default" not in action.help:
            action.help += f" (default: {format_value(action.default)})"
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    try:
        args = parser.parse_args(words)
    except ValueError as error:  # an @file that is not text, or has an unclosed quote
        fail(f"{' '.join(word for word in words if word[:1] == '@')}: not a file of flags ({first_line(error)})")
    if getattr(args, "targets", None):
        args.targets = [name for word in args.targets for name in word.split(",") if name] or fail("--targets names no layer")
    own = {action.dest: action for action in parser._actions if action.dest not in shared | {"method"}}
    changed = [key if action.nargs == 0 else value if action.choices else key + value for key, action in own.items()
               if getattr(args, key) != action.default and (value := format_value(getattr(args, key))) is not None]
    args.name = args.name or "-".join([args.method, *changed])
    if not re.fullmatch(r"[\w.-]+", args.name):
        fail(f"--name {args.name!r}: use letters, digits, '.', '_' and '-' only")
    known = [*HUB, *DEMOS]
    for key in ("dataset", "model"):  # one folder is one name: my, my/ and ./my; ./imdb stays a folder beside imdb
        value = getattr(args, key)
        if value and Path(value).is_dir() and os.path.normpath(value) not in known:
            setattr(args, key, os.path.normpath(value))
    if args.dataset not in known and not Path(args.dataset).is_dir():
        fail(f"--dataset {args.dataset}: neither a folder nor one of {', '.join(known)}")
    args.model = args.model or ("demo" if args.dataset in DEMOS else "distilbert-base-uncased")
    args.max_length = args.max_length or LENGTHS.get(args.dataset, 256)
    args.seeds = list(dict.fromkeys(args.seeds))
    # A folder given by an absolute path is recorded by its name alone, so that no machine's paths get into results.
    args.command = " ".join([Path(file).name, *(re.sub(r"(^|[=@])/.*/", r"\1", word) for word in words)])

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # set by torchrun
    try:
        cuda = torch.device(args.device).type == "cuda"
        if cuda and several:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.empty(1, device=args.device).item()
        if cuda and ":" in args.device:
            torch.cuda.set_device(args.device)  # or events and all-reduces would go to the first one
    except Exception as error:  # each backend has its own way to say that it is not there
        fail(f"--device {args.device}: not to be had here ({first_line(error)})")
    if torch.device(args.device).type not in ("cpu", "cuda"):
        fail(f"--device {args.device}: only cpu and cuda are measured here")
    if several and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
        atexit.register(dist.destroy_process_group)
    if args.precision == "auto":
        args.precision = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    quiet_libraries()
    if args.dataset in HUB and not (Path(args.data_dir) / args.dataset).is_dir() or not (
            args.model == "demo" or Path(args.model).is_dir()):
        offline_if_unreachable()
    return args


def format_value(value):
    """A flag's value as part of a file name: 0.5 -> "0.5", ["q", "v"] -> "q-v"."""
    return "-".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def settings(run):
    """The flags that decide a run's outcome: all but where it runs, where it writes and how often it saves."""
    where = {"seeds", "seed", "out", "force", "device", "data_dir", "eval_only", "save_every", "name", "command",
             "quality_only"}
    flags = {key: value for key, value in sorted(vars(run).items()) if key not in where}
    for key in ("model", "dataset"):
        if Path(flags[key]).is_absolute():  # the name alone is told; a hash tells two folders of one name apart
            flags[f"{key} folder"] = hashlib.sha256(os.path.normpath(flags[key]).encode()).hexdigest()[:8]
            flags[key] = Path(flags[key]).name
    return flags


def runs(args):
    """Yield a Namespace per seed that has no finished result yet; it also has seed, settings, path, seconds, load_average.

    A result with the same settings is skipped, one with other settings is an error that names the difference.
    """
    interrupt = signal.signal(signal.SIGINT, lambda *_: fail("stopped; the same command starts this run again", 130))
    try:
        kept = settings(args)
        search = f"-dev-lr{args.lr:g}-headlr{args.head_lr:g}" if args.split == "dev" else ""
        stem = "-".join([Path(kept["dataset"]).name, args.name, Path(kept["model"]).name]) + search
        todo = [argparse.Namespace(**vars(args), seed=seed, settings=kept, seconds={},
                                   path=args.out / f"{stem}-seed{seed}.json") for seed in args.seeds]
        for run in [run for run in todo if run.eval_only or not finished(run)]:  # all are checked before the first one starts
            run.load_average = [os.getloadavg()[0]]
            yield run
    finally:
        signal.signal(signal.SIGINT, interrupt)


def finished(run):
    """Whether `run.path` holds a result of the same settings; ends the program where it holds something else."""
    done = None
    if rank() == 0:
        try:
            run.path.parent.mkdir(parents=True, exist_ok=True)
            with open(run.path.with_suffix(".tmp"), "w"):  # found out now, not after hours of training
                pass
            run.path.with_suffix(".tmp").unlink()
        except OSError as error:
            fail(f"--out {run.path.parent}: cannot write there ({error.strerror})")
        if run.path.exists() and not run.force:
            try:
                old = dict(json.loads(run.path.read_text())["args"])
            except (ValueError, KeyError, TypeError):
                fail(f"{run.path} is not a complete result file; --force replaces it")
            differ = [f"--{key} {old.get(key)} there, {run.settings.get(key)} here"
                      for key in sorted(old.keys() | run.settings) if old.get(key) != run.settings.get(key)]
            if differ:
                fail(f"{run.path} holds a run with other settings ({'; '.join(differ)}); --name NAME keeps both, --force "
                     "replaces it")
            print(f"{run.path} is there already; --force runs it again")
            done = True
    if dist.is_initialized():  # the others may not see the file
        answer = [done]
        dist.broadcast_object_list(answer)
        done = answer[0]
    return done


def quiet_libraries():
    """Keep load reports, progress bars and retry warnings of the libraries off the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")


def offline_if_unreachable():
    """Tell the hub libraries to use their cache only when the hub does not answer; their own retries take minutes."""
    hub = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if any(os.environ.get(key) for key in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy")):
        return
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


# --------------------------------------------------------------------------------------------------------- data


@dataclass
class Split:
    """Rows as one flat tensor. Row i is tokens[starts[i]:starts[i + 1]]; `rows` are those that are used."""

    tokens: torch.Tensor  # (total,) int32
    starts: torch.Tensor  # (rows + 1,) int64
    labels: torch.Tensor | None  # (rows,) int64
    rows: torch.Tensor  # (used,) int64, ascending

    @property
    def lengths(self):
        return self.starts.diff()


class Batch(NamedTuple):
    """One forward pass. `scored` marks the rows whose output counts: CLS (or the last token), or the predicted tokens."""

    ids: torch.Tensor  # (B, L) int64, padded
    attended: torch.Tensor  # (B, L) bool, False on padding
    scored: torch.Tensor  # (B, L) bool
    target: torch.Tensor  # (B,) labels, or (scored.sum(),) token ids


def load_data(run):
    """Load, split and tokenise `run.dataset`.

    Returns a namespace: train, dev, eval (Split), scored (the split that counts), task ("classification", "mlm", "clm"),
    classes, the tokenizer's special ids, sizes and hash, and the seconds that loading and tokenising took. The splits are
    cut with seed 0 whatever the run's seed. Ends the program with one line where the data cannot be used.
    """
    seconds = {}
    with timed(seconds, "load"):
        tokenizer, config = load_tokenizer(run)
        raw = read_rows(run)
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
    decoder = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    task = "classification" if run.dataset not in LANGUAGE_MODELLING else "clm" if decoder else "mlm"
    unknown = next(i for i in (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else unknown  # GPT-2 has none
    longest = getattr(config, "max_position_embeddings", run.max_length)
    if "roberta" in config.model_type or config.model_type in ("camembert", "mpnet", "longformer", "xmod", "data2vec-text"):
        longest -= pad + 1  # they count positions from there
    if not 4 <= run.max_length <= longest:
        fail(f"--max_length {run.max_length}: {run.model} takes 4 to {longest} tokens")
    size = getattr(config, "vocab_size", len(tokenizer))
    data = SimpleNamespace(
        task=task, decoder=decoder, pad=pad, unknown=unknown, mask=tokenizer.mask_token_id, vocab=min(len(tokenizer), size),
        special=torch.tensor(sorted({*tokenizer.all_special_ids, unknown})), seconds=seconds, classes=None,
        eval_split="test" if "test" in raw and run.dataset != "sst2" else "validation")
    raw["eval"] = raw[data.eval_split]
    with timed(seconds, "tokenise"):
        if task == "classification":
            load_classification(run, data, raw, tokenizer)
        else:
            load_text(run, data, raw, tokenizer)
    if (highest := max(split.tokens.max().item() for split in (data.train, data.dev, data.eval))) >= size:
        fail(f"--model {run.model}: its tokenizer is another model's: token {highest}, where the model has {size}")
    data.subset = bool(run.train_samples or run.eval_samples)
    data.scored = data.dev if run.split == "dev" else data.eval
    data.sha256 = hashlib.sha256(b"".join(
        tensor.numpy().tobytes() for split in (data.train, data.dev, data.eval)
        for tensor in (split.tokens, split.starts, split.rows, split.labels) if tensor is not None)).hexdigest()
    kind = {"classification": "rows", "mlm": "blocks, masked LM", "clm": "blocks, causal LM"}[task]
    scored = data.eval_split if run.split != "dev" else "dev, cut from train" if data.classes else "validation, which is dev"
    say(f"{run.settings['dataset']}: {len(data.train.rows):,} training {kind}; scored on {len(data.scored.rows):,} "
        f"({scored}){', a subset' if data.subset else ''}; at most {run.max_length} tokens a row")
    return data


def model_folder(run):
    """Where to load the base from: the demo's own folder, a local folder, or a hub id."""
    if run.model == "demo":
        import demo
        return demo.model()
    return run.model


def load_tokenizer(run):
    """The model's (tokenizer, config), from a folder, the cache or the hub."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(model_folder(run))
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder(run))
    except Exception as error:  # the libraries raise many kinds; each means that this name cannot be used
        if os.environ.get("HF_HUB_OFFLINE") and not Path(run.model).is_dir():
            fail(f"--model {run.model}: no such folder here, not in the hub's cache, and the hub cannot be reached; pass a "
                 "folder with --model (and one with the data by --data_dir), or try --dataset demo, which needs no network")
        fail(f"--model {run.model}: no usable config and tokenizer there ({first_line(error)})")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        fail(f"--model {run.model}: it has no tokenizer of its own")
    return tokenizer, config


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def read_rows(run):
    """The raw columns: {"train": {"text": [...], "label": [...]}, "validation": ..., "test": ...}."""
    if run.dataset in DEMOS:
        import demo
        return demo.splits(lm=run.dataset == "demo_lm")
    import datasets
    datasets.disable_progress_bars()
    local = Path(run.dataset) if run.dataset not in HUB else Path(run.data_dir) / run.dataset
    where = f"--dataset {run.settings['dataset']}" if run.dataset not in HUB else f"--data_dir {run.data_dir}"
    try:
        if local.is_dir():
            found = datasets.load_dataset(str(local))
        else:
            found = datasets.load_dataset(*HUB[run.dataset])
    except Exception as error:
        if not local.is_dir():
            fail(f"--dataset {run.dataset}: no folder {local}, and the hub ({HUB[run.dataset][0]}) gave nothing "
                 f"({first_line(error)}); put parquet files into {local}, point --data_dir elsewhere (and --model to a "
                 "folder), or try --dataset demo")
        fail(f"{where}: cannot read the files in {local.name} ({first_line(error.__cause__ or error)})")
    splits = {}
    for name in found:
        columns = {"sentence": "text", "labels": "label"}
        splits[name] = {columns.get(key, key): list(found[name][key]) for key in found[name].column_names
                        if key in ("text", "sentence", "label", "labels")}
    if "train" not in splits or not {"test", "validation"} & splits.keys():
        fail(f"{where}: needs a train file and a test or validation file, found {', '.join(splits)}")
    wanted = ["text"] if run.dataset in LANGUAGE_MODELLING else ["text", "label"]
    for name, columns in splits.items():
        missing = [key for key in wanted if key not in columns]
        if missing:
            fail(f"{where}: the {name} split has the columns {', '.join(found[name].column_names)}; needed: "
                 f"text (or sentence){' and label' if 'label' in wanted else ''}")
        if any(not isinstance(text, str) for text in columns["text"]):
            row = next(i for i, text in enumerate(columns["text"]) if not isinstance(text, str))
            fail(f"{where}: row {row} of the {name} split has no text (in a CSV file None, NA and null count as none)")
    return splits


def spans(sentence):
    """Every run of whole words in a sentence, itself included."""
    words = sentence.split()
    return {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def cut_dev(texts, phrases):
    """Choose dev rows among the training rows, with seed 0: returns (train rows, dev rows), two sorted lists.

    A random tenth, at most 1,000, and no training row with a dev row's text. Where `phrases` says that rows are parts of
    one another (SST-2: 88 % of its rows stand inside another one), dev is 1,000 whole sentences, those that stand in no
    other row, and every training row that stands inside one of them is dropped.
    """
    whole = list(range(len(texts)))
    if phrases:
        seen, whole = set(), []
        for row in sorted(range(len(texts)), key=lambda row: -len(texts[row].split())):  # longest first, ties by row
            text = " ".join(texts[row].split())
            if text not in seen:  # so no longer row holds it; its own parts need not be cut up again
                whole.append(row)
                seen |= spans(text)
        whole.sort()
    size = min(1000, len(texts) // 10) if not phrases else min(1000, len(whole) // 2)
    picked = torch.randperm(len(whole), generator=generator(0, "dev"))[:size]
    dev = sorted(whole[i] for i in picked.tolist())
    inside = set().union(*(spans(texts[row]) if phrases else {texts[row]} for row in dev))
    train = [row for row, text in enumerate(texts) if (" ".join(text.split()) if phrases else text) not in inside]
    return train, dev


def draw(rows, size, *names):
    """A fixed random subset of `rows` in their own order; all of them where `size` is None or larger."""
    if size is None or size >= len(rows):
        return list(rows)
    picked = torch.randperm(len(rows), generator=generator(0, *names))[:size].sort().values
    return [rows[i] for i in picked.tolist()]


def flat(lists):
    """Lists of token ids -> (tokens (total,) int32, starts (rows + 1,) int64)."""
    lengths = torch.tensor([0, *map(len, lists)])
    return torch.tensor([token for row in lists for token in row], dtype=torch.int32), lengths.cumsum(0)


def tokenise(texts, tokenizer, what, **options):
    """Token ids of every text, a thousand texts at a time, with a progress bar where a person watches."""
    ids = []
    for i in tqdm(range(0, len(texts), 1000), f"tokenising {what}", disable=None, leave=False):
        ids += tokenizer(texts[i:i + 1000], **options)["input_ids"]
    return ids


def load_classification(run, data, raw, tokenizer):
    """Check the labels, cut dev from train, draw subsets, tokenise: sets data.train, data.dev, data.eval, data.classes."""
    for name in ("train", "eval"):
        labels = raw[name]["label"]
        if any(isinstance(label, bool) or not isinstance(label, int) for label in labels):
            odd = next(label for label in labels if isinstance(label, bool) or not isinstance(label, int))
            fail(f"--dataset {run.settings['dataset']}: label {odd!r} is not a whole number; number the classes 0, 1, …")
    classes = sorted(set(raw["train"]["label"]))
    if classes != list(range(len(classes))) or len(classes) < 2 or not set(raw["eval"]["label"]) <= set(classes):
        found = sorted({*classes, *raw["eval"]["label"]})
        fail(f"--dataset {run.settings['dataset']}: the labels are {', '.join(map(str, found[:8]))}; wanted: at least two "
             "classes, numbered 0, 1, … without a gap, all of them in train")
    data.classes = len(classes)
    train, dev = cut_dev(raw["train"]["text"], phrases=run.dataset == "sst2")
    if not train or not dev:
        fail(f"--dataset {run.settings['dataset']}: {len(raw['train']['text'])} training rows are too few; 20 or more")
    chosen = {"train": ("train", draw(train, run.train_samples, "train")),
              "dev": ("train", draw(dev, run.eval_samples, "eval")),
              "eval": ("eval", draw(range(len(raw["eval"]["text"])), run.eval_samples, "eval"))}
    for name, (source, rows) in chosen.items():
        texts, labels = raw[source]["text"], raw[source]["label"]
        ids = tokenise([texts[row] for row in rows], tokenizer, name, truncation=True, max_length=run.max_length)
        ids = [row or [data.unknown] for row in ids]  # a decoder's tokenizer makes nothing of an empty text
        setattr(data, name, Split(*flat(ids), torch.tensor([labels[row] for row in rows]), torch.arange(len(rows))))


def load_text(run, data, raw, tokenizer):
    """Tokenise each split as one stream and cut it into blocks: sets data.train, data.dev, data.eval.

    An encoder's block is [CLS] … [SEP], max_length tokens in all; a decoder's is max_length tokens, the first of them the
    one that its tokenizer puts before every text, if it does (Llama and Gemma need it, GPT-2 has none). WikiText's `<unk>`
    becomes the tokenizer's own unknown token, which is one symbol and is never scored.
    """
    if data.task == "mlm" and data.mask is None:
        fail(f"--model {run.model}: its tokenizer has no mask token, so it cannot be trained with masked tokens")
    start, end = ([tokenizer.cls_token_id], [tokenizer.sep_token_id]) if data.task == "mlm" else ([], [])
    if data.task == "clm" and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        start = [tokenizer.bos_token_id]
    if "validation" not in raw:
        fail(f"--dataset {run.dataset}: needs a validation split, which is dev here")
    unknown = tokenizer.convert_ids_to_tokens(data.unknown)
    for name, source in (("train", "train"), ("dev", "validation"), ("eval", "eval")):
        lines = [text.rstrip("\n").replace("<unk>", unknown) + "\n" for text in raw[source]["text"] if text.strip()]
        tokens, _ = flat(tokenise(lines, tokenizer, name, add_special_tokens=False))
        if not (~torch.isin(tokens, data.special)).any():
            fail(f"--dataset {run.dataset}: the {source if source != 'eval' else data.eval_split} split has no known word")
        blocks = [start + block.tolist() + end for block in tokens.split(run.max_length - len(start + end))]
        samples = run.train_samples if name == "train" else run.eval_samples
        rows = draw(range(len(blocks)), samples, "train" if name == "train" else "eval")
        setattr(data, name, Split(*flat(blocks), None, torch.tensor(rows)))


def predicted_tokens(data, split, *seed):
    """Which tokens a language model must predict, and what it reads: (inputs (total,), flags (total,) bool).

    Masked LM (BERT §3.1): 15 % of the tokens, of which 80 % are replaced by the mask, 10 % by a random token, 10 % kept.
    One vector of random numbers over the flat stream decides, so that neither batch size nor order nor a subset moves a
    mask. Causal LM: every token that has one before it in its block. Special and unknown tokens are never predicted.
    """
    tokens = split.tokens
    if data.task == "classification":
        return None, None
    if data.task == "clm":
        flags = tokens != data.unknown
        flags[split.starts[:-1]] = False
        return tokens, flags
    u = torch.rand(len(tokens), dtype=torch.float64, generator=generator(*seed, "masks"))
    flags = (u < 0.15) & ~torch.isin(tokens, data.special)
    inputs = torch.where(flags & (u < 0.12), data.mask, tokens)
    swapped = flags & (u >= 0.12) & (u < 0.135)
    inputs[swapped] = ((u[swapped] - 0.12) / 0.015 * data.vocab).to(inputs.dtype)
    return inputs, flags


def collate(data, split, rows, inputs, flags):
    """The rows (n,) of a split as one padded Batch; `inputs` and `flags` come from predicted_tokens (None: classification)."""
    lengths = split.lengths[rows]
    column = torch.arange(int(lengths.max()))
    attended = column < lengths[:, None]  # (B, L)
    index = (split.starts[rows][:, None] + column).clamp(max=len(split.tokens) - 1)

    def gather(values, fill):
        return torch.where(attended, values[index], fill)
    if data.task == "classification":
        read = lengths - 1 if data.decoder else torch.zeros_like(lengths)  # the one position that the head reads
        return Batch(gather(split.tokens, data.pad).long(), attended, column == read[:, None], split.labels[rows])
    ids, scored = gather(inputs, data.pad).long(), gather(flags, False)
    target = gather(split.tokens, data.pad)[scored].long()
    if data.task == "clm":  # the output at a token predicts the next one
        scored = F.pad(scored[:, 1:], (0, 1))
    return Batch(ids, attended, scored, target)


def order(lengths, size, *seed):
    """Batches of `size` rows for one epoch: rows of like length together (little padding), batches in random order.

    Returns a list of index tensors that covers every row once; the last batch by length may be smaller. The one with the
    most tokens comes first: memory that does not suffice shows at once, and later batches fit into what it leaves behind.
    """
    shuffled = torch.randperm(len(lengths), generator=generator(*seed, "order"))
    groups = shuffled[lengths[shuffled].argsort(stable=True)].split(size)
    batches = torch.randperm(len(groups), generator=generator(*seed, "batches")).tolist()
    largest = max(batches, key=lambda i: len(groups[i]) * lengths[groups[i][-1]])
    return [groups[i] for i in sorted(batches, key=lambda i: i != largest)]


# --------------------------------------------------------------------------------------------------- the base model


def load_base(run, data):
    """The pre-trained model with a head for the task: on the CPU, all frozen but what the checkpoint lacks (the head).

    Sets run.head (names of the head's tensors), run.targets, run.base_parameters and run.model_sha256, and leaves the
    global generator seeded for the adapter. Safetensors only, no remote code. One line and status 2 where the checkpoint
    cannot be used.
    """
    import transformers
    with timed(run.seconds, "load"):
        kind = {"classification": "SequenceClassification", "mlm": "MaskedLM", "clm": "CausalLM"}[data.task]
        options = {"num_labels": data.classes} if data.classes else {}
        torch.manual_seed(stream(run.seed, "head"))  # what is missing is drawn inside from_pretrained
        try:
            model, info = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
                model_folder(run), dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options)
        except Exception as error:  # many kinds again: no weights, a torn file, other sizes, an unknown architecture
            fail(f"--model {run.model}: cannot load it for {kind} ({first_line(error)})")
        model.config.pad_token_id, model.config.use_cache = data.pad, False
        named = dict(model.named_parameters(remove_duplicate=False))
        missing = set(info["missing_keys"]) & named.keys()
        body = [name for name in missing if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name]
        if body:
            fail(f"--model {run.model}: the checkpoint lacks {len(body)} tensors of the model itself, {min(body)} among them")
        model.requires_grad_(False)
        for name in missing:
            named[name].requires_grad_(True)
        output = model.get_output_embeddings() if data.task != "classification" else None
        if output is not None and output.weight.requires_grad:
            fail(f"--model {run.model}: the checkpoint has no output embeddings and does not tie them to the input's; this "
                 "would train a whole vocabulary from nothing")
        run.head = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
        if getattr(run, "rank", None) and not run.targets:
            run.targets = TARGETS.get(model.config.model_type) or fail(
                f"--targets: none known for {model.config.model_type}; name some of {', '.join(candidates(model))}")
        widest = max((max(weight_of(module).shape) for module in model.modules() if is_linear(module)), default=0)
        if getattr(run, "rank", 0) > widest:
            fail(f"--rank {run.rank}: no layer of {run.model} is wider than {widest}")
        digest = hashlib.sha256()
        for _, tensor in sorted(model.named_parameters()):
            digest.update(b"" if tensor.requires_grad else tensor.numpy().data)
        run.model_sha256 = digest.hexdigest()
        run.base_parameters = sum(tensor.numel() for tensor in model.parameters())
        if run.precision == "bf16":  # frozen matrices only: what is trained, and the small norms and biases, stay fp32
            for tensor in model.parameters():
                if tensor.ndim > 1 and not tensor.requires_grad:
                    tensor.data = tensor.bfloat16()
        if run.checkpointing:
            try:
                (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
            except ValueError as error:
                fail(f"--checkpointing: {run.model} cannot do it ({first_line(error)})")
    if torch.device(run.device).type == "cpu":
        keep_freed_memory()
        if not data.decoder:
            quicken(model)
    if data.task != "classification":
        def keep_scored(module, inputs, output):  # logits of unscored rows would be most of the memory: 500 MB a batch
            output.last_hidden_state = output.last_hidden_state[model.rows[1]][None]  # (1, scored, hidden)
            return output
        model.base_model.register_forward_hook(keep_scored)
    torch.manual_seed(stream(run.seed, "adapter"))
    return model


def is_linear(module):
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's, a transposed linear layer


def weight_of(layer):
    """A linear layer's weight as (out, in), whichever way round the layer stores it."""
    return layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight


def block_linears(model):
    """Names of the linear layers inside the encoder or decoder blocks: not embeddings, poolers or heads."""
    return [name for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
            if is_linear(module) and re.search(r"\.\d+\.", name)]


def candidates(model):
    return sorted({name.rsplit(".", 1)[-1] for name in block_linears(model)})


def adapters(model):
    """The modules that stand in for a linear layer: {path: module with keys and merged_weight()}."""
    found = {}
    for name, module in model.named_modules():  # parents before children: a stand-in inside another is part of that one
        if hasattr(module, "merged_weight") and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def replace(model, targets, make):
    """Put make(layer) in the place of every frozen linear layer whose name is, or ends with, one of `targets`.

    Returns the layers' names. A target that matches nothing ends the program with the candidates; a model that has
    adapters already raises RuntimeError.
    """
    if any(module.keys for module in adapters(model).values()):
        raise RuntimeError("this model has adapters already; load the base again for new ones")
    layers = {name: module for name, module in model.named_modules()
              if is_linear(module) and not any(tensor.requires_grad for tensor in module.parameters())}
    names = []
    for target in targets:
        hits = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not hits:
            fail(f"--targets {target}: no linear layer has this name; there are {', '.join(candidates(model))}")
        names += hits
    names = list(dict.fromkeys(names))
    for name in names:
        model.set_submodule(name, make(layers[name]))
    return names


@contextlib.contextmanager
def plain(model, merged, dtype):
    """Inside, every adapter is one ordinary linear layer: of the merged weight, or of the base's where not `merged`."""
    stand_ins = adapters(model)
    for path, module in stand_ins.items():
        base = getattr(module, "base", module)
        weight = module.merged_weight() if merged else weight_of(base).float()
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)
        layer.bias = base.bias
        model.set_submodule(path, layer.train(module.training))
    try:
        yield model
    finally:
        for path, module in stand_ins.items():
            model.set_submodule(path, module)


# ------------------------------------------------------------------------------------------------ speed on a CPU


def keep_freed_memory():
    """Have glibc keep what is freed for the next tensor. It returns each tensor above 32 MiB to the system and asks for it
    anew; at IMDB's lengths those page faults take as long as the mathematics."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself
            ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is returned unasked; reset_peak asks


def kept_entries(x, p):
    """Which entries of x dropout keeps, and the scale that makes up for the others: (uint8 0 or 1 like x, float).

    16 random bits an entry, four entries a draw: on a CPU torch draws a number per entry, which takes longer than the linear
    layers around it. The share dropped is p rounded to 1/65,536, and the scale is that of the share kept.
    """
    dropped = round(p * 65536)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
    kept = (bits[:x.numel()] >= dropped - 32768).view(torch.uint8)  # a product with bytes is twice as fast as one with bools
    return kept.view(x.shape), 65536 / (65536 - dropped)


class QuickDropout(torch.autograd.Function):
    """Dropout of x with the share p, by kept_entries."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.kept, ctx.scale = kept_entries(x, p)
        return (x * ctx.kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.kept).mul_(ctx.scale), None


class Dropout(nn.Dropout):
    def forward(self, x):
        return QuickDropout.apply(x, self.p) if self.training and self.p and x.device.type == "cpu" else super().forward(x)


class QuickAttention(torch.autograd.Function):
    """dropout(softmax(scaling·Q·Kᵀ))·V: q, k, v (B, heads, L, width), mask (B, 1, L, L) bool or None -> (B, L, heads, width).

    Keeps the weights w before dropout and a byte for each; autograd would keep them after dropout, too.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, p, scaling):
        w = (q * scaling) @ k.mT
        w = (w if mask is None else w.masked_fill_(~mask, -math.inf)).softmax(-1)
        kept, ctx.scale = kept_entries(w, p)
        ctx.scaling = scaling
        ctx.save_for_backward(q, k, v, w, kept)
        return ((w * kept) @ (v * ctx.scale)).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, grad):
        q, k, v, w, kept = ctx.saved_tensors
        grad = grad.transpose(1, 2) * ctx.scale
        dv = (w * kept).mT @ grad
        ds = torch._softmax_backward_data((grad @ v.mT).mul_(kept), w, -1, w.dtype)
        return ds @ (k * ctx.scaling), ds.mT @ (q * ctx.scaling), dv, None, None, None


def attention(module, query, key, value, mask, scaling=None, dropout=0.0, **options):
    """The libraries' attention function: heads (B, heads, L, width) -> (B, L, heads, width), and no weights.

    Where an encoder trains on a CPU it is QuickAttention; everything else goes to torch's fused kernels, the default.
    """
    if not dropout or query.device.type != "cpu" or getattr(module, "is_causal", False):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)
    return QuickAttention.apply(query, key, value, mask, dropout, scaling or query.shape[-1] ** -0.5), None


def quicken(model):
    """Give an encoder's own dropout layers and attention the quick random numbers; the distribution stays the same."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, Dropout(module.p))
    AttentionInterface.register("quick", attention)
    AttentionMaskInterface.register("quick", sdpa_mask)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("quick")


# --------------------------------------------------------------------------------------------------------- training


def resident(device):
    """Bytes in use now: allocated on CUDA; the resident set on a CPU (None where /proc has no such file)."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else proc_status("VmRSS")


def peak(device):
    """The most bytes in use since reset_peak."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else proc_status("VmHWM")


def reset_peak(device):
    """Give freed memory back and start a new peak, so that one phase does not inherit another's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc; a sandbox without the file
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")


def proc_status(key):
    try:
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        return None


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(run):
    return torch.autocast(torch.device(run.device).type, torch.bfloat16, enabled=run.precision == "bf16")


def compute_dtype(x):
    """The dtype that products with x are computed in: autocast's inside autocast, else x's own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


@contextlib.contextmanager
def room(run):
    """Turn running out of memory into one line that names what makes a run smaller."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
            fail(f"out of memory on {run.device}; smaller: --batch_size {max(1, run.batch_size // 2)} with --grad_accum "
                 f"{run.grad_accum * 2}, --max_length below {run.max_length}, --eval_batch_size, --checkpointing", status=1)
        raise


def forward(model, batch):
    """Logits: (B, classes), or (scored tokens, vocabulary). Sets model.rows = (attended, scored) for whoever needs them."""
    model.rows = (batch.attended, batch.scored)
    logits = model(input_ids=batch.ids, attention_mask=batch.attended.long()).logits
    if logits.ndim == 3 and logits.shape[:2] == batch.ids.shape:  # OPT's head does not call what keep_scored watches
        logits = logits[batch.scored]
    return logits.float().flatten(0, -2)


def train(model, data, run, method):
    """Train what requires a gradient; returns the history: curve, time and memory (namespaces of plain numbers).

    AdamW with linear warm-up and decay, gradients clipped at norm 1. A step's loss is the sum over its scored examples or
    tokens, divided by their number over all micro-batches and processes, so that neither accumulation nor the number of
    processes changes the gradient (but for work that is picked for each part, as in contextual sparsity). Only training steps
    are on the clock. A loss that is not finite ends the run.
    """
    device = torch.device(run.device)
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    if not trained:
        fail("nothing to train: no adapter, and the checkpoint lacks no head; choose an adapter script or --full")
    groups = [{"params": params, "lr": lr, "weight_decay": run.weight_decay} for params, lr in (
        ([t for n, t in trained.items() if n not in run.head], run.lr),
        ([t for n, t in trained.items() if n in run.head], run.head_lr)) if params]
    report_size(run, model)
    with room(run):
        model.to(device)
    reset_peak(device)
    history = SimpleNamespace(curve=[], laps=[], window=[], loads=[], epoch_seconds=[], seconds=0.0, rows=0, tokens=0,
                              padded=0, step=0, before=resident(device), memory={})
    optimizer = method["optimizer"](groups) if "optimizer" in method else torch.optim.AdamW(groups, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    after_step = method.get("after_step", lambda step, total, lr: None)

    size = run.batch_size * run.grad_accum * world()
    lengths = data.train.lengths[data.train.rows]
    per_epoch = math.ceil(len(lengths) / size)
    total = run.max_steps or run.epochs * per_epoch
    every = max(1, total // 50)
    resume(run, data, model, optimizer, history)
    after_step(history.step, total, 0.0)
    bar = tqdm(total=total, initial=history.step, desc=f"{run.name} seed {run.seed}", leave=False,
               disable=None if rank() == 0 else True)
    clock = Clock(device, history)
    with room(run), stop_signals() as stop, bar:
        while history.step < total:
            epoch, done = divmod(history.step, per_epoch)
            if run.split == "dev" and history.step and not done:
                history.curve[-1]["dev_loss"] = score(model, data, run)["loss"]
            inputs, flags = predicted_tokens(data, data.train, run.seed, epoch)
            batches = order(lengths, size, run.seed, epoch)[done:]
            model.train()
            clock.start()
            for step, picked in enumerate(batches, history.step + 1):
                scale = min(step / max(1, run.warmup * total), (total - step + 1) / max(1, (1 - run.warmup) * total), 1.0)
                for group, lr in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = lr * scale
                lr = optimizer.param_groups[0]["lr"]
                torch.manual_seed(stream(run.seed, "dropout", step, rank()))  # so that a continued run draws the same
                loss = backward(model, data, run, data.train.rows[picked], inputs, flags, history, trained)
                history.window.append((step, lr, loss))
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                if step == 1:
                    history.memory["gradients"] = sum(tensor.grad.nbytes for tensor in trained.values())
                optimizer.step()
                after_step(step, total, lr)
                optimizer.zero_grad(set_to_none=True)
                history.step = step
                clock.lap()
                bar.update()
                epoch_ends = step == total or step % per_epoch == 0
                if epoch_ends or step % every == 0:
                    look(history, per_epoch, bar)
                if step == 20:
                    announce((total - step) * clock.elapsed() / step)
                save = step < total and (stop or run.save_every and step % run.save_every == 0)
                if epoch_ends or save:
                    clock.stop()
                    if epoch_ends:
                        history.epoch_seconds.append(history.seconds - sum(history.epoch_seconds))
                    if save:
                        save_checkpoint(run, data, model, optimizer, history)
                    clock.start()
                if stop:
                    bar.close()
                    fail(f"stopped at step {step} of {total}; the same command continues from "
                         f"{'there' if save else 'the last checkpoint'}", 128 + stop[0])
                if step == total:
                    break
            clock.stop()
    history.memory |= {
        "device": device.type, "before_training": history.before, "train_peak": peak(device),
        "reserved_peak": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "optimizer": sum(value.nbytes for state in optimizer.state.values() for value in state.values()
                         if torch.is_tensor(value))}
    return history


def backward(model, data, run, rows, inputs, flags, history, trained):
    """Leave the gradient of the mean loss over the global batch `rows` in .grad; returns that mean loss, a 0-d tensor.

    Each process takes every world()-th row, in parts that go through the model one by one. One without rows adds zeros.
    """
    device = torch.device(run.device)
    scored = len(rows) if data.classes else scored_per_row(data.train, flags)[rows].sum().clamp(min=1).item()
    lengths = data.train.lengths
    mine = [parts(rows[number::world()], lengths, run.batch_size, device) for number in range(world())]
    history.rows += len(rows)
    history.tokens += int(lengths[rows].sum())
    history.padded += sum(len(part) * int(lengths[part].max()) for part in itertools.chain(*mine))
    loss = torch.zeros((), device=device)
    for part in mine[rank()]:
        batch = Batch(*(tensor.to(device) for tensor in collate(data, data.train, part, inputs, flags)))
        with autocast(run):
            part_loss = F.cross_entropy(forward(model, batch), batch.target, reduction="sum") / scored
        part_loss.backward()
        loss += part_loss.detach()
    if world() > 1:  # adapters are small: one flat tensor, one all-reduce, nothing else is ever sent
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in trained.values()]
        everything = torch.cat([loss[None], *(grad.flatten() for grad in grads)])
        dist.all_reduce(everything)
        loss = everything[0]
        for tensor, grad in zip(trained.values(), everything[1:].split([g.numel() for g in grads]), strict=True):
            tensor.grad = grad.view_as(tensor)
    unreached = [name for name, tensor in trained.items() if tensor.grad is None]
    if unreached:
        raise RuntimeError(f"no gradient reaches {', '.join(unreached)}: trained, but not part of the forward pass")
    return loss


def parts(rows, lengths, size, device):
    """Cut the rows (n,) of a batch into what goes through the model at once: `size` rows, and on a CPU about 1,024 tokens, so
    that what one layer writes is still in the cache when the next one reads it. `lengths` is of all rows of the split."""
    if device.type == "cpu" and len(rows):
        size = max(1, min(size, 1024 // int(lengths[rows].max())))
    return [part for part in rows.split(size) if len(part)]


def scored_per_row(split, flags):
    """How many tokens of each row are predicted: (rows,) int64."""
    before = F.pad(flags.cumsum(0), (1, 0))
    return before[split.starts[1:]] - before[split.starts[:-1]]


class Clock:
    """Adds up the time of training steps alone, between start and stop; a lap is one step.

    On CUDA a lap ends with an event, which is read only at stop, so that timing never makes the GPU wait.
    """

    def __init__(self, device, history):
        self.device, self.history = device, history

    def mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self):
        synchronise(self.device)
        self.begin, self.marks = time.perf_counter(), [self.mark()]

    def elapsed(self):
        return self.history.seconds + time.perf_counter() - self.begin

    def lap(self):
        self.marks.append(self.mark())

    def stop(self):
        synchronise(self.device)
        self.history.seconds += time.perf_counter() - self.begin
        self.begin = time.perf_counter()
        for a, b in itertools.pairwise(self.marks):
            self.history.laps.append(a.elapsed_time(b) / 1000 if self.device.type == "cuda" else b - a)
        self.marks = self.marks[-1:]


def look(history, per_epoch, bar):
    """Check the losses since the last look and put their mean into the curve. A loss that is not finite ends the run.

    history.window holds (step, learning rate, loss). It is read now and then only: each reading makes a GPU wait.
    """
    losses = torch.tensor([float(loss) for _, _, loss in history.window])
    for (step, lr, _), finite in zip(history.window, losses.isfinite().tolist(), strict=True):
        if not finite:
            bar.close()
            fail(f"the loss is no longer finite at step {step}, learning rate {lr:.3g}; try a smaller --lr or --head_lr",
                 status=1)
    step, lr, _ = history.window[-1]
    history.curve.append({"step": step, "epoch": round(step / per_epoch, 4), "lr": lr, "train_loss": losses.mean().item()})
    bar.set_postfix(loss=f"{history.curve[-1]['train_loss']:.3f}", lr=f"{lr:.1e}")
    history.loads.append(os.getloadavg()[0])
    history.window.clear()


def announce(seconds):
    """Say once how long a long run will take, and what makes it shorter."""
    if seconds > 60:
        say(f"about {seconds / 60:.0f} more minutes of training; shorter with --train_samples, --epochs, --max_steps or "
            "--max_length")


@contextlib.contextmanager
def stop_signals():
    """Collect Ctrl-C and SIGTERM in a list, so that training stops after a whole step; a second one stops at once."""
    got = []

    def note(number, frame):
        if got:
            fail("stopped at once; the same command continues from the last checkpoint", 128 + number)
        got.append(number)
    kinds = (signal.SIGINT, signal.SIGTERM) if world() == 1 else ()  # torchrun ends its processes itself
    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield got
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def checkpoint_path(run):
    return run.path.with_suffix(".checkpoint")


def identity(run, data):
    """What a checkpoint must share with the run that continues it: all but the batch that scoring takes afterwards."""
    kept = {key: value for key, value in run.settings.items() if key != "eval_batch_size"}
    return json.dumps([kept, run.seed, run.model_sha256, data.sha256, world()])


def changing(model):
    """What a run changes: trained tensors, and buffers (a method's masks); the frozen base is not among them."""
    frozen = {name for name, tensor in model.named_parameters(remove_duplicate=False) if not tensor.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def save_checkpoint(run, data, model, optimizer, history):
    """Write all that a stopped run needs, by atomic rename. Random numbers depend on (seed, step) alone: none to keep."""
    if rank() == 0:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in vars(history).items() if key not in ("before", "memory")}
        kept["memory"] = {"gradients": history.memory["gradients"]}
        kept["window"] = [(step, lr, float(loss)) for step, lr, loss in history.window]
        unfinished = checkpoint_path(run).with_suffix(".tmp")
        try:
            torch.save({"run": identity(run, data), "model": changing(model),
                        "optimizer": optimizer.state_dict(), "history": kept}, unfinished)
            unfinished.replace(checkpoint_path(run))
        except (OSError, RuntimeError) as error:  # torch has its own words for a full disk
            unfinished.unlink(missing_ok=True)
            fail(f"--out {run.path.parent}: cannot write the checkpoint ({first_line(error)})", status=1)


def resume(run, data, model, optimizer, history):
    """Go on from this run's checkpoint, if there is one; one that cannot be used is named, and the run starts afresh."""
    path, saved = checkpoint_path(run), None
    if rank() == 0 and path.exists():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if saved["run"] != identity(run, data):
                raise ValueError("it is of other settings")
        except Exception as error:  # torn files fail in many ways
            say(f"{path}: not usable ({first_line(error)}); starting afresh")
            saved = None
    if dist.is_initialized():
        answer = [saved]
        dist.broadcast_object_list(answer)
        saved = answer[0]
    if saved:
        model.load_state_dict(saved["model"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        vars(history).update(saved["history"])
        say(f"continuing at step {history.step} from {path}")


# ------------------------------------------------------------------------------------------- scoring and measuring


def evaluate(model, data, run):
    """Score the model on data.scored and, outside a search, again with its adapters merged; prints and returns the metrics.

    Classification: accuracy, f1 (macro), loss, correct (base64 of a bitmap in the split's order). Language modelling:
    loss (mean over scored tokens) and mlm_perplexity or causal_perplexity = exp(loss). `merged` holds the same after
    merging. Memory at its peak goes to run.inference_peak.
    """
    device = torch.device(run.device)
    with room(run):
        model.to(device)
    reset_peak(device)
    with room(run), timed(run.seconds, "evaluate"):
        metrics = score(model, data, run)
        run.inference_peak = peak(device)
        if adapters(model) and run.split != "dev":
            with plain(model, True, torch.bfloat16 if run.precision == "bf16" else torch.float32):
                metrics["merged"] = {key: value for key, value in score(model, data, run).items() if key != "correct"}
    first = next(key for key in metrics if key.endswith("perplexity") or key == "accuracy")
    parts = [f"{key.replace('_', ' ')} {metrics[key]:.4f}" for key in (first, "f1", "loss") if key in metrics]
    merged = f" · merged {metrics['merged'][first]:.4f}" if "merged" in metrics else ""
    say(f"seed {run.seed}: {' · '.join(parts)}{merged}, on {len(data.scored.rows):,} "
        f"{'rows' if data.classes else 'blocks'} of {'dev' if run.split == 'dev' else data.eval_split}")
    return metrics


@torch.inference_mode()
def score(model, data, run):
    """One pass over data.scored; every row once, whatever the batch size or number of processes."""
    model.eval()
    device, split = torch.device(run.device), data.scored
    inputs, flags = predicted_tokens(data, split, "evaluation")
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # negative log-likelihood, number scored
    predicted = torch.zeros(len(split.rows), dtype=torch.int64, device=device)
    lengths = split.lengths[split.rows]
    batches = [part for batch in lengths.argsort(stable=True).split(run.eval_batch_size)[rank()::world()]
               for part in parts(batch, lengths, run.eval_batch_size, device)]
    for places in tqdm(batches, "scoring", disable=None if rank() == 0 else True, leave=False):
        batch = Batch(*(t.to(device) for t in collate(data, split, split.rows[places], inputs, flags)))
        with autocast(run):
            logits = forward(model, batch)
        nll = F.cross_entropy(logits, batch.target, reduction="none")
        sums += torch.stack([nll.double().sum(), torch.tensor(float(len(nll)), device=device).double()])
        if data.classes:
            predicted[places.to(device)] = logits.argmax(-1)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(predicted)
    loss = (sums[0] / sums[1]).item()
    if not math.isfinite(loss):
        fail("the loss on the scored rows is not finite: training broke the weights; try a smaller --lr or --head_lr", status=1)
    if not data.classes:
        return {"loss": loss, "mlm_perplexity" if data.task == "mlm" else "causal_perplexity": math.exp(min(loss, 700))}
    labels, predicted = split.labels[split.rows], predicted.cpu()
    hits = predicted == labels
    f1 = []  # macro F1: the mean over classes of 2·TP / (rows of the class + rows predicted as it)
    for label in range(data.classes):
        either = (labels == label).sum() + (predicted == label).sum()
        if either:
            f1.append(2 * (hits & (labels == label)).sum().item() / either.item())
    return {"accuracy": hits.double().mean().item(), "f1": sum(f1) / len(f1), "loss": loss, "correct": bitmap(hits)}


def bitmap(hits):
    """A bool tensor (N,) as base64 of its bits, the first in the highest place of the first byte."""
    bits = F.pad(hits.int(), (0, -len(hits) % 8)).view(-1, 8) * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])
    return base64.b64encode(bytes(bits.sum(1).tolist())).decode()


def tensor_bytes(tensors):
    """Bytes that distinct tensors take."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def count_parameters(run, model):
    """Numbers of weights: adapter, head, trainable, total. A 4-bit weight counts as the one that it stands for."""
    trained = {name: tensor.numel() for name, tensor in model.named_parameters() if tensor.requires_grad}
    head = sum(size for name, size in trained.items() if name in run.head)
    adapter = sum(trained.values()) - head
    added = sum(getattr(module, key).numel() for module in adapters(model).values() for key in module.keys)
    total = run.base_parameters + added
    return {"adapter": adapter, "head": head, "trainable": adapter + head, "total": total,
            "trainable_percent": 100 * (adapter + head) / total}


def report_size(run, model):
    n = count_parameters(run, model)
    say(f"{run.name} on {run.settings['model']}: {n['adapter']:,} adapter + {n['head']:,} head = {n['trainable']:,} trainable "
        f"of {n['total']:,} ({n['trainable_percent']:.2f} %), {run.precision} on {run.device}")


def fixed_batch(data, rows, length):
    """A full batch of `rows` × `length` real tokens without padding, the same for every method."""
    tokens = data.eval.tokens
    ids = tokens.repeat(rows * length // len(tokens) + 1)[:rows * length].view(rows, length).long()
    column = torch.arange(length).expand(rows, length)
    if data.classes:
        scored, target = column == (length - 1 if data.decoder else 0), torch.zeros(rows, dtype=torch.int64)
    else:
        scored = column % 7 == 3 if data.task == "mlm" else column < length - 1  # 1/7 is near the 15 % of training
        target = ids[scored]
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), scored, target)


def measure(model, data, run, history):
    """The costs of a trained model: a dict with parameters, time, memory, inference, flops, disk, as in the result file.

    Seconds, bytes and floating-point operations (one multiply-add is two).
    """
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    stand_ins = adapters(model).values()
    adapter = [tensor for module in stand_ins if module.keys  # what is trained, and a method's masks over it
               for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    head = [tensor for name, tensor in model.named_parameters() if name in run.head]
    rest = [tensor for tensor in (*model.parameters(), *model.buffers())
            if id(tensor) not in {id(tensor) for tensor in (*adapter, *head)}]
    memory = {"base": tensor_bytes(rest), "adapter": tensor_bytes(adapter), "head": tensor_bytes(head), **history.memory,
              "inference_peak": run.inference_peak}

    skipped = min(10, len(history.laps) // 5)
    laps = torch.tensor(history.laps[skipped:], dtype=torch.float64) * 1000
    seconds = max(history.seconds, 1e-9)
    times = {
        "train_seconds": history.seconds, "epoch_seconds": history.epoch_seconds, "skipped_steps": skipped,
        "step_ms": {"median": laps.quantile(0.5).item(), "p10": laps.quantile(0.1).item(), "p90": laps.quantile(0.9).item()},
        "samples_per_second": history.rows / seconds, "tokens_per_second": history.tokens / seconds,
        "padded_tokens_per_second": history.padded / seconds, "accelerator_hours": history.seconds * world() / 3600}

    inference, flops = [], {}
    if not run.quality_only and run.split != "dev":  # a search has no use for them
        with room(run):
            inference = [time_inference(model, data, run, dtype, rows) for rows in (1, 32)]
            flops = count_flops(model, data, run)
    if flops:
        # A step of the fixed shape, scaled to the tokens that the run really computed; attention's square is left out here.
        flops["train_total"] = flops["train_step"] * history.padded / (
            run.batch_size * run.grad_accum * world() * run.max_length)
    stored = tensor_bytes(rest) + tensor_bytes(head)
    merged = stored
    if adapters(model):
        with plain(model, True, dtype):
            merged = tensor_bytes([*model.parameters(), *model.buffers()])
    return {"parameters": count_parameters(run, model), "time": times, "memory": memory, "inference": inference,
            "flops": flops, "disk": {"base": stored, "merged": merged}}


@torch.inference_mode()
def time_inference(model, data, run, dtype, rows):
    """Latency of one batch of `rows` full-length rows: base, merged, unmerged in turns, so that drift hits all alike."""
    device, length = torch.device(run.device), run.max_length
    batch = Batch(*(tensor.to(device) for tensor in fixed_batch(data, rows, length)))
    kinds = ["base", "merged", "unmerged"] if adapters(model) else ["base"]
    laps = {kind: [] for kind in kinds}
    model.eval()

    for _ in range(20):
        for kind in kinds:
            with contextlib.ExitStack() as stack, autocast(run):
                if adapters(model) and kind != "unmerged":
                    stack.enter_context(plain(model, kind == "merged", dtype))
                for counted in (False, True):  # the first pass warms up
                    synchronise(device)
                    start = time.perf_counter()
                    forward(model, batch)
                    synchronise(device)
                    if counted:
                        laps[kind].append(time.perf_counter() - start)
        if sum(map(sum, laps.values())) > 3 * len(kinds):  # a slow machine: fewer passes, seconds instead of minutes
            break
    result = {"batch": rows, "length": length}
    for kind, values in laps.items():
        ms = torch.tensor(values, dtype=torch.float64) * 1000
        p50, p95 = ms.quantile(0.5).item(), ms.quantile(0.95).item()
        result[kind] = {"latency_ms": {"mean": ms.mean().item(), "p50": p50, "p95": p95},
                        "samples_per_second": rows / (p50 / 1000)}
    return result


def count_flops(model, data, run):
    """torch's own count of one training step (forward and backward) and of one row's inference, at the longest length.

    Eager attention: the fused kernels are invisible to the counter on a CPU. It takes much memory, so a few rows and twice as
    many are counted, and every further row adds the same. The count is of matrix products, of the model as training left it:
    what was pruned in the last step is not in it, nor are steps of a warm-up that are computed in another way. A model that
    the counter cannot follow has no count, and the run goes on: {}.
    """
    from torch.utils.flop_counter import FlopCounterMode
    device = torch.device(run.device)
    attention = model.config._attn_implementation
    few = 64 // math.gcd(64, run.max_length)  # a multiple of 64 tokens: estimates from about 64 of them cost the same in both
    sizes = [few, 2 * few] if run.batch_size > 2 * few else [run.batch_size]
    counts = []
    try:
        model.set_attn_implementation("eager")
        for rows, training in (*((rows, True) for rows in sizes), (1, False)):
            batch = Batch(*(tensor.to(device) for tensor in fixed_batch(data, rows, run.max_length)))
            model.train(training)
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training), autocast(run):
                loss = F.cross_entropy(forward(model, batch), batch.target)
                if training:
                    loss.backward()
            counts.append(counter.get_total_flops())
    except (RuntimeError, AssertionError, ValueError) as error:
        say(f"no FLOPs: torch's counter cannot follow this model ({first_line(error)})")
        return {}
    finally:
        model.set_attn_implementation(attention)
        model.zero_grad(set_to_none=True)
    *steps, inference = counts
    step = steps[-1] + (steps[-1] - steps[0]) * (run.batch_size - sizes[-1]) // few
    return {"train_step": step * run.grad_accum * world(), "inference_per_sample": inference}


# ------------------------------------------------------------------------------------------------- adapters on disk


def adapter_tensors(model, run):
    """What was trained under the names of PEFT's file: {"base_model.model.<path>.lora_A.weight": tensor, …}."""
    tensors = {f"base_model.model.{path}.{key}": getattr(module, name)
               for path, module in adapters(model).items() for name, key in module.keys.items()}
    owned = {id(tensor) for tensor in tensors.values()}
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in model.named_parameters()
                if tensor.requires_grad and id(tensor) not in owned}
    return tensors


def save_adapter(model, data, run, method):
    """Write the adapter and the head in PEFT's layout, under temporary names: {file written: its final name}."""
    from safetensors.torch import save_file
    folder = run.path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_tensors(model, run).items()}
    written = {folder / "adapter_model.tmp": folder / "adapter_model.safetensors"}
    save_file(tensors, folder / "adapter_model.tmp", metadata={  # one key: two come in random order
        "base_sha256": run.model_sha256 + method.get("stored", "")})
    if "peft" in method:
        task = {"classification": "SEQ_CLS", "mlm": None, "clm": "CAUSAL_LM"}[data.task]
        # PEFT saves and loads whole modules: the part of a head's name below the base model, "pooler" or "classifier".
        heads = sorted({name.removeprefix(f"{model.base_model_prefix}.").split(".")[0] for name in run.head})
        config = {"task_type": task, "base_model_name_or_path": run.settings["model"], "inference_mode": True,
                  "target_modules": run.targets, "modules_to_save": heads or None, "bias": "none",
                  "fan_in_fan_out": any(type(getattr(module, "base", None)).__name__ == "Conv1D"
                                        for module in adapters(model).values())} | method["peft"]
        (folder / "adapter_config.tmp").write_text(json.dumps(config, indent=2) + "\n")
        written[folder / "adapter_config.tmp"] = folder / "adapter_config.json"
    return written


def load_adapter(model, data, run, method):
    """Put a saved adapter and head into the adapted model (--eval_only); strict about names, shapes, rank and base.

    PEFT's own folders load too. One line and status 2 where something does not fit.
    """
    from safetensors import safe_open
    folder = run.eval_only
    try:
        config = json.loads((folder / "adapter_config.json").read_text()) if "peft" in method else {}
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            base = (file.metadata() or {}).get("base_sha256")
            saved = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # no such file, a torn file, another format
        fail(f"--eval_only {folder}: no adapter that can be read ({first_line(error)}); wanted: adapter_model.safetensors "
             "and adapter_config.json")
    if str(start := config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        fail(f"--eval_only {folder}: it started from {start!r}, which changes the base itself; convert it first (PEFT: "
             "path_initial_model_for_weight_conversion)")
    flags = {"peft_type": "the script", "r": "--rank", "lora_alpha": "--alpha"}
    for key, flag in flags.items():
        if key in method.get("peft", {}) and config.get(key) != method["peft"][key]:
            fail(f"--eval_only {folder}: {key} is {config.get(key)} there and {method['peft'][key]} here; change {flag}")
    # "stored": the form in which a method keeps the base, where that is not the checkpoint's own.
    if base not in (None, run.model_sha256 + method.get("stored", "")):
        fail(f"--eval_only {folder}: trained on another base ({config.get('base_model_name_or_path', 'unnamed')}), not on "
             f"--model {run.model}, or on the same in other bits; change --model or the script")

    def setting(key, path):  # one layer's own value, by PEFT's rule for names, or everybody's
        pattern = config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]) or {}
        return next((value for name, value in pattern.items() if re.match(rf"(.*\.)?({name})$", path)), config[key])
    for path, module in adapters(model).items():  # a pruned adapter has fewer components in some layers
        if not module.keys:
            continue
        r = setting("r", path)
        module.A, module.B = (nn.Parameter(part.detach().clone()) for part in (module.A[:r], module.B[:, :r]))
        if "lora_alpha" in config:
            scale = setting("lora_alpha", path) / (math.sqrt(r) if config.get("use_rslora") else r)
            if not math.isclose(scale, module.scale, rel_tol=1e-6):
                fail(f"--eval_only {folder}: it scales the update of {path} by {scale:g}, here that is {module.scale:g}; "
                     "change --alpha")
    wanted = adapter_tensors(model, run)
    missing, unexpected = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing or unexpected:
        fail(f"--eval_only {folder}: {len(missing)} tensors missing{f' ({missing[0]})' if missing else ''}, "
             f"{len(unexpected)} unexpected{f' ({unexpected[0]})' if unexpected else ''}; same --targets and data set?")
    for name, tensor in wanted.items():
        if tensor.shape != saved[name].shape:
            fail(f"--eval_only {folder}: {name} is {list(saved[name].shape)} there, {list(tensor.shape)} here; same --rank?")
        tensor.data.copy_(saved[name])


# --------------------------------------------------------------------------------------------------- the result file


def environment(run):
    """What the figures depend on beside the code: versions, device, threads, load, commit."""
    import importlib.metadata

    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def git(*words):
        try:
            return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                                  check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None
    changes = git("status", "--porcelain", "--untracked-files=no")
    device = torch.device(run.device)
    name, cpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(), None
    with contextlib.suppress(OSError):  # not Linux
        cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {"python": platform.python_version(), "torch": torch.__version__.split("+")[0],
            **{name: version(name) for name in ("transformers", "datasets", "bitsandbytes")},
            "device": f"{device.type} {name}", "cpu": cpu[1] if cpu else platform.processor() or None,
            "processes": world(), "threads": torch.get_num_threads(), "precision": run.precision,
            "load_average": [*run.load_average, os.getloadavg()[0]],  # at the start, the median in training, at the end
            "commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def save_result(model, data, run, method, history, metrics, costs):
    """Write the adapter and, last and by rename, the result file, so that a result file means a finished run."""
    from safetensors import SafetensorError
    if rank() != 0:
        return run.path
    info = {"targets": getattr(run, "targets", None)} | method.get("info", dict)()
    costs["parameters"] |= {"sparsity": info.pop("sparsity")} if "sparsity" in info else {}
    metrics = dict(metrics)
    correct = metrics.pop("correct", None)
    run.load_average.append(torch.tensor(history.loads).median().item())
    unfinished = run.path.with_suffix(".tmp")
    try:
        with timed(run.seconds, "save"):
            written = save_adapter(model, data, run, method)
        costs["disk"] = {"adapter": sum(path.stat().st_size for path in written), **costs["disk"]}
        costs["time"] |= {"load": data.seconds["load"] + run.seconds["load"], "tokenise": data.seconds["tokenise"],
                          "evaluate": run.seconds["evaluate"], "save": run.seconds["save"]}
        result = {
            "schema": 1, "method": run.method, "name": run.name, "dataset": run.settings["dataset"],
            "model": run.settings["model"], "model_sha256": run.model_sha256, "seed": run.seed, "args": run.settings,
            "command": run.command, "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "split": {"train": len(data.train.rows), "dev": len(data.dev.rows), "eval": len(data.eval.rows),
                      "eval_split": data.eval_split, "scored": "dev" if run.split == "dev" else "eval",
                      "subset": data.subset, "sha256": data.sha256},
            "metrics": metrics, "curve": history.curve, **costs, "correct": correct, "method_info": info,
            "environment": environment(run)}
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        for path, final in [*written.items(), (unfinished, run.path)]:  # all is on disk; only now are old files replaced
            path.replace(final)
        checkpoint_path(run).unlink(missing_ok=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # the libraries have their own words for a full disk
        for path in (unfinished, *run.path.with_suffix("").glob("*.tmp")):
            path.unlink(missing_ok=True)
        fail(f"--out {run.path.parent}: cannot write the result ({getattr(error, 'strerror', None) or first_line(error)})",
             status=1)
    times, memory = costs["time"], costs["memory"]
    say(f"trained {history.step:,} steps in {times['train_seconds']:.1f} s ({times['samples_per_second']:.0f} rows/s)"
        + (f", memory peak {memory['train_peak'] / 2**20:,.0f} MiB" if memory["train_peak"] else "")
        + f"; wrote {run.path} and the adapter ({costs['disk']['adapter'] / 2**20:.1f} MiB) beside it")
    return run.path


# ------------------------------------------------------------------------------------------------------ the baseline


def add_args(parser):
    """Add the baseline's own flag."""
    parser.add_argument("--full", dest="method", action="store_const", const="full", default="head_only",
                        help="train every weight of the base instead of the head alone; wants a small --lr, about 5e-5")


def adapt(model, run):
    """The baseline: nothing is added; with --full the base is trained too."""
    if run.method == "full":
        model.float().requires_grad_(True)
    return {}


def main(argv=None):
    """Adapt, train, score and measure the model once per seed; returns the paths of the result files."""
    args = parse_args(__doc__, __file__, add_args, argv)
    data, paths = None, []
    for run in runs(args):
        data = data or load_data(run)
        model = load_base(run, data)
        method = adapt(model, run)
        if run.eval_only:
            load_adapter(model, data, run, method)
            evaluate(model, data, run)
            continue
        history = train(model, data, run, method)
        metrics = evaluate(model, data, run)
        costs = measure(model, data, run, history)
        paths.append(save_result(model, data, run, method, history, metrics, costs))
    return paths


if __name__ == "__main__":
    main()
