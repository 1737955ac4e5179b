"""What a run would need, from the model's config alone: no weights, no data, no GPU.

    python qlora.py --model bert-large-uncased --dataset imdb --batch_size 4 --plan
    python lora.py --model my-7b/ --dataset wikitext2 --precision bf16 --max_length 512 --plan

The script's own code takes one training step on fake tensors, which have shapes and no values, and
the instruments that measure a real run count it. `my-7b/` need hold nothing but its config.json.
"""

from argparse import Namespace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from harness import meters, models
from harness.process import fail, first_line, say
from harness.rows import TEXT, load_config


def fake_base(run, common):
    """(Base, Batch) as load_base and collate would make them, of fake tensors; no row is padded."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    config = load_config(run.model)
    masked = config.model_type in MASKED
    task = "classification" if run.dataset not in TEXT else "mlm" if masked else "clm"
    config = models.configure(config, run.base_dropout, 0, task == "classification" and ["0", "1"])
    kind = {"classification": "SequenceClassification", "mlm": "MaskedLM", "clm": "CausalLM"}[task]
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config, dtype=torch.float32)
    model.to = lambda device: model  # fake tensors need not move
    names, prefix = [name for name, _ in model.named_parameters()], f"{model.base_model_prefix}."
    head = [n for n in names if task == "classification" and not n.startswith(prefix)]
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in head)
    base = common.Base(model, head, "", sum(t.numel() for t in model.parameters()))
    last = not masked or config.is_encoder_decoder
    cut = models.compute_read_rows_only(model, task, lambda: base.batch.read, last)
    base.last_block_cut = cut
    if run.checkpointing:
        models.checkpoint_activations(run.model, model)

    rows, length = run.batch_size, run.max_length
    real = torch.arange(rows * length)
    if task == "classification":
        read = torch.arange(rows) * length + (length - 1 if last else 0)
    else:  # a masked LM predicts 15 % of the tokens, a causal one all but each row's first
        read = real[::7] if masked else real[rows:]
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return base, common.Batch(ids, None, real, read, torch.zeros_like(read))


def plan(args, adapt):
    """Print the bytes at the peak of a training step and of scoring, by kind, and a step's FLOPs.

    Of whole batches, as on a GPU: a CPU's are cut into parts. 4-bit layers are unpacked by torch.
    """
    import common  # here: its own main calls this

    run = Namespace(**{**vars(args), "lr": args.lr[0], "seed": 0, "device": "cpu"})
    run.nf4_backend = "torch"  # bitsandbytes' kernels want values
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            base, batch = fake_base(run, common)
            method = adapt(base, run)
            common.place(base, run)
            peaks, operations = count(run, base, batch, method, common)
    except Exception as error:  # a model that looks at its values, a config that is not to be had
        fail(f"--plan: not of --model {run.model} ({type(error).__name__}: {first_line(error)})")
    more = "with" if run.checkpointing else "without"
    say(f"{run.name}: {meters.describe(base)}")
    say(f"{run.batch_size} × {run.max_length} tokens, {run.precision}, {more} checkpointing, GiB:")
    say(f"{'':16}" + "".join(f"{phase:>12}" for phase in peaks))
    for kind in peaks["scoring"]:
        say(f"{kind:16}" + "".join(f"{peak[kind] / 2**30:12.2f}" for peak in peaks.values()))
    say(f"{'peak':16}" + "".join(f"{sum(p.values()) / 2**30:12.2f}" for p in peaks.values()))
    say(f"{operations / 1e12:,.2f} TFLOP a training pass")


def count(run, base, batch, method, common):
    """Take a step on the instruments: {"training", "scoring": {kind: bytes}}, and its FLOPs."""
    model, trained = base.model.train(), common.trained_tensors(base.model)
    method.get("after_step", lambda *_: None)(6, 100, 0.0)  # past the dense first twentieth

    def forward():
        with common.autocast(run):
            return common.forward(base, batch)

    def loss():
        return F.cross_entropy(forward(), batch.target)

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    known = {"frozen weights": frozen, "trained weights": list(trained.values()), "optimizer": []}
    peaks, operations = {}, 0.0
    if trained:
        optimizer = common.make_optimizer(base, run, method)
        step()
        states = [t for state in optimizer.state.values() for t in state.values()]
        known["optimizer"] = [t for t in states if torch.is_tensor(t)]
        peaks["training"], _ = meters.live_bytes(step, trained.values(), "cpu", **known)
        operations = meters.fitted_flops(model, lambda _: loss().backward(), [(1.0,)])
        known["optimizer"] = []
        del optimizer, states  # or they would count in scoring
    model.eval()
    with torch.no_grad():
        peaks["scoring"], _ = meters.live_bytes(forward, [], "cpu", **known)
    return peaks, operations
