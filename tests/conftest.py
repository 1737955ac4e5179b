"""What the tests share: tiny models of each architecture, tiny data folders, no network.

With CI set, a missing oracle package (peft, bitsandbytes) fails the tests that need it; otherwise
they are skipped.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same tests everywhere: on a CPU, in fp32
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # before torch: threads that wait let others work
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import baseline
import common
import contextual_lora
import hira
import hybrid
import lora
import qlora
import sparse_lora
from harness import batches
from harness import models as library

torch.set_num_threads(1)  # the models are tiny, and two busy threads wait for each other

WORDS = (
    "the a film movie story plot acting scene is was not never good bad great awful dull fine "
    "bright weak strong and but with of in to it this that very so too no yes one two cat dog sat "
    "mat"
).split()
TORCH = ["--nf4_kernel", "torch"]
EVERY = {  # each way of training: its script and flags
    "head only": (baseline, []),
    "full": (baseline, ["--full", "--lr", 1e-4]),
    "lora": (lora, []),
    "hira": (hira, []),
    "qlora": (qlora, TORCH),
    "prune": (sparse_lora, []),
    "contextual": (contextual_lora, ["--dense_layers", 0]),
    "qhira": (hybrid, TORCH),
    "contextual qlora": (hybrid, ["--update", "contextual", "--dense_layers", 0, *TORCH]),
}


@pytest.fixture(autouse=True, scope="module")
def libraries_stay():
    """Each run collects garbage: a quarter second less without the libraries' objects."""
    gc.collect()
    gc.freeze()


def ready(module, out, *words):
    """What main makes of a command line before it trains: (run, data, base, method)."""
    words = ["--out", out, *words]
    args = module.parse_args(module.__doc__, module.__file__, module.add_args, words)
    module.choose_device(args)
    run = next(module.runs(args))
    data = module.load_data(run)
    base = module.load_base(run, data)
    return run, data, base, module.adapt(run, base)


def trained(module, out, *words):
    """A run up to the end of training: (run, data, base, method, history)."""
    run, data, base, method = ready(module, out, *words)
    return run, data, base, method, module.train(run, data, base, method)


def result_of(module, out, *words):
    """Run main for one seed and rate without timing: the result file as a dict, and its path."""
    [path] = module.main(["--out", out, *words])
    return json.loads(path.read_text()), path


def rows_flags(models, reviews, kind="distilbert", head=""):
    return ["--dataset", reviews, "--model", models(kind, head), "--max_length", 24]


def text_flags(models, text_dir, kind="distilbert", head="MaskedLM"):
    folder = models(kind, head)
    flags = ["--dataset", "wikitext2", "--data_dir", text_dir, "--model", folder]
    return [*flags, "--max_length", 16]


def stir(base):
    """Move B away from zero, where A has no gradient."""
    torch.manual_seed(5)
    for module in library.stand_ins(base.model).values():
        if "B" in module.keys:  # an NF4 layer has nothing of the kind
            module.B.data.normal_(0, 0.2)


def batch_of(data, n=8):
    """The first n training examples as one Batch."""
    targets = batches.predicted_tokens(data, data.train, 0)
    return batches.collate(data, data.train, torch.arange(n), targets)


def gradients(base, batch):
    """Logits, and the gradient of everything that is trained."""
    base.model.zero_grad(set_to_none=True)
    logits = common.forward(base, batch)
    F.cross_entropy(logits, batch.target).backward()
    named = common.trained_tensors(base.model).items()
    return logits.detach(), {name: tensor.grad for name, tensor in named}


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same(ours, theirs, tolerance):
    """Two results of gradients() agree; a gradient within `tolerance` of 1 or of its largest."""
    close(ours[0], theirs[0], tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert (ours[1][name] - grad).abs().max() <= tolerance * max(1, grad.abs().max()), name


def weights(path):
    """The adapter that lies beside a result file: {name: (shape, the tensor's bytes)}."""
    tensors = load_file(path.with_suffix("") / "adapter_model.safetensors")
    return {name: (tensor.shape, tensor.numpy().tobytes()) for name, tensor in tensors.items()}


def ended(capfd, module, *words):
    """The exit status of a main that must end the program, and its one line on stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main(list(words))
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n"), error
    return stop.value.code, error


def oracle(name):
    """Import an oracle package; where it is missing, skip the test, or fail it under CI."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{name} is not installed")


def tiny_config(kind, **changes):
    """A config of `kind`: two layers of width 32, the tiny tokenizer's vocabulary, no dropout."""
    from transformers import AutoConfig

    size = len(WORDS) + 5
    encoder = {
        "vocab_size": size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 66,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    decoder = {
        "vocab_size": size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": True,
    }
    options = {
        "distilbert": {
            "vocab_size": size,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        },
        "bert": encoder,
        "roberta": encoder | {"type_vocab_size": 1},
        "gpt2": {
            "vocab_size": size,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "llama": decoder,
        "qwen2": decoder,
    }[kind]
    return AutoConfig.for_model(kind, **(options | changes))


def tiny_tokenizer(kind):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if kind in ("distilbert", "bert", "roberta"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    if kind == "gpt2":  # as GPT-2: one special token for everything, and no padding token
        names = {"unk_token": "[UNK]", "eos_token": "[UNK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **names
    )


def make_model(folder, kind, head="", **changes):
    """Write a tiny checkpoint: head "" (body only), "MaskedLM", "SequenceClassification" …"""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(1)
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = auto.from_config(tiny_config(kind, **changes))
    with torch.no_grad():  # away from the default start, where all is near zero
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1 or name.endswith("bias"):
                tensor.normal_(0, 0.3 if tensor.ndim > 1 else 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer(kind).save_pretrained(folder)
    return str(folder)


SIZE = len(WORDS) + 5
TINY = {  # fields that most configs share; a config takes no notice of another's
    "vocab_size": SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
OWN = {  # an architecture's other names for the same
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "electra": {"embedding_size": 32},
    "albert": {"embedding_size": 32},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {},
    "mpnet": {},
    "modernbert": {},
    "eurobert": GROUPED | {"attention_dropout": 0.1},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "t5": {
        **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "decoder_start_token_id": 0,
    },
    "bart": {
        **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
        **{"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 66},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"new_decoder_architecture": False, "multi_query": False},
    "phi": {},
    "phi3": GROUPED,
    "llama": GROUPED,
    "qwen3": GROUPED,
    "gemma2": GROUPED,
    "gemma3_text": GROUPED,
    "olmo2": GROUPED,
    "mamba": {"state_size": 4},
}
ENCODERS = [*OWN][: [*OWN].index("t5")]


@pytest.fixture(scope="session")
def architecture(tmp_path_factory):
    """architecture(kind) -> folder of a tiny body with random weights, made once a session."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModel

    made = {}

    def get(kind):
        if kind not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, **(TINY | OWN[kind]))
            folder = tmp_path_factory.mktemp(kind)
            AutoModel.from_config(config).save_pretrained(folder)
            tokenizer = tiny_tokenizer("bert" if kind in ENCODERS else kind)
            if kind in ("t5", "bart"):  # they read the state of the end token
                end = {"single": "$A [SEP]", "special_tokens": [("[SEP]", 3)]}
                tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**end)
            tokenizer.save_pretrained(folder)
            made[kind] = str(folder)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """models(kind, head="", **changes) -> folder of a tiny checkpoint, made once a session."""
    made = {}

    def get(kind, head="", **changes):
        key = (kind, head, *sorted(changes.items()))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(f"tiny-{kind}"), kind, head, **changes)
        return made[key]

    return get


def sentences(n, seed):
    """n short texts with labels 0 and 1: label 1 where "good" words outnumber "bad" ones."""
    draw = torch.Generator().manual_seed(seed)
    texts, labels = [], []
    for i in range(n):
        length = int(torch.randint(3, 20, (1,), generator=draw))
        words = [WORDS[j] for j in torch.randint(len(WORDS), (length,), generator=draw)]
        words[int(torch.randint(len(words), (1,), generator=draw))] = "great" if i % 2 else "awful"
        texts.append(" ".join(words))
        labels.append(i % 2)
    return texts, labels


def write_rows(folder, name, columns):
    import datasets

    datasets.disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(str(folder / f"{name}.parquet"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A folder data set: 120 training rows, 45 test rows, two classes."""
    folder = tmp_path_factory.mktemp("data") / "reviews"
    for name, n, seed in (("train", 120, 0), ("test", 45, 1)):
        texts, labels = sentences(n, seed)
        write_rows(folder, name, {"text": texts, "label": labels})
    return str(folder)


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory):
    """A --data_dir whose wikitext2 holds a little text with `<unk>` and empty lines in it."""
    folder = tmp_path_factory.mktemp("text")
    for name, n, seed in (("train", 60, 2), ("validation", 20, 3), ("test", 25, 4)):
        lines = [text.replace("cat", "<unk>") for text in sentences(n, seed)[0]]
        write_rows(folder / "wikitext2", name, {"text": [*lines, "", " "]})
    return str(folder)
