"""What study/times.py compares our methods with: PEFT, and our own code without one choice.

PEFT trains with transformers' Trainer: the same base, examples, batch size, length limit, precision
and fused AdamW, clipping and warm-up, no dropout. Its batches are what the Trainer's own sampler
makes of the whole training set, length-grouped or random; of these the measured ones are evenly
spaced by length, as ours are.
"""

import tempfile
import time
from unittest import mock

import torch
import torch.nn.functional as F

import common
import hira
import qlora
from harness import batches, models
from harness.process import fail
from harness.splits import generator_for, seed_for


def random_batches(lengths, size, *seed):
    """Batches of any lengths, in the place of length_grouped_batches."""
    return list(torch.randperm(len(lengths), generator=generator_for(*seed)).split(size))


def whole_batch(run, lengths, examples, *rest):
    """A batch in one forward pass, in the place of micro_batches."""
    return [examples]


def leave_uncut(*_):
    """Compute every position in the last block, too: in place of compute_output_positions_only."""
    return False


def two_products(layer, x):
    """HiRA's update as a second product beside the frozen one."""
    update = models.weight_of(layer.base) * (layer.B @ layer.A)
    return layer.base(x) + F.linear(x, update.to(x.dtype))


def weights_kept(layer, x):
    """A 4-bit layer whose unpacked weight autograd keeps for the backward pass."""
    return F.linear(x, layer.dequantized(x.dtype), layer.bias)


CHOICES = {  # name: what is replaced, and by what
    "LoRA, random batches": (batches, "length_grouped_batches", random_batches),
    "LoRA, whole batches at once": (batches, "micro_batches", whole_batch),
    "LoRA, unread positions computed": (common, "compute_output_positions_only", leave_uncut),
    "HiRA, two products": (hira.HiRALinear, "forward", two_products),
    "QLoRA, weights kept": (qlora.NF4Linear, "forward", weights_kept),
}
PEERS = [(name, kind) for name in ("LoRA", "QLoRA", "HiRA") for kind in ("grouped", "default")]
PLAIN = "Head only, in transformers"  # its own model, for inference alone
REPLACED = CHOICES | {PLAIN: (common, "compute_output_positions_only", leave_uncut)}


def peft_model(run, data, name):
    """The base with PEFT's adapter, as its documentation says; our own code changes nothing."""
    import peft
    import transformers

    with mock.patch.object(common, "compute_output_positions_only", leave_uncut):
        base = common.load_base(run, data)
    model, prefix = base.model, f"{base.model.base_model_prefix}."
    heads = sorted({path.removeprefix(prefix).split(".")[0] for path in base.head_names})
    shared = {
        "r": run.rank,
        "target_modules": models.find_targets(model, None),
        "task_type": "SEQ_CLS",
        "modules_to_save": heads,
    }
    if name == "QLoRA":
        quantized = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=common.frozen_dtype(run),
            llm_int8_skip_modules=[*heads, "pooler"],
        )
        torch.manual_seed(seed_for(run.seed, "head"))
        model = type(model).from_pretrained(
            models.model_folder(run.model),
            config=model.config,
            dtype=common.frozen_dtype(run),
            quantization_config=quantized,
            device_map={"": run.device},
        )
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if name == "HiRA":
        return peft.get_peft_model(model, peft.HiraConfig(**shared))
    config = peft.LoraConfig(lora_alpha=run.alpha, lora_dropout=0.0, **shared)
    return peft.get_peft_model(model, config)


def peft_trainer(run, data, name, sampler, choose):
    """(batches, function that trains them and returns seconds) of PEFT with the Trainer.

    name: LoRA, QLoRA or HiRA. sampler: "grouped" or "default". choose(batches) -> those to train.
    """
    import transformers
    from transformers.trainer_pt_utils import get_length_grouped_indices

    if data.task != "classification":
        fail(f"--peers: only for classification; {run.dataset} is running text")
    model, split, size = peft_model(run, data, name), data.train, run.batch_size
    order = torch.randperm(len(split.lengths), generator=generator_for(run.seed, "peer"))
    if sampler == "grouped":
        generator = generator_for(run.seed, "peer")
        lengths = split.lengths.tolist()
        order = torch.tensor(get_length_grouped_indices(lengths, size, generator=generator))
    groups = order.split(size)
    chosen = choose(groups[:-1] if len(groups[-1]) < size < len(order) else groups)
    rows = [
        {
            "input_ids": split.tokens[split.starts[i] : split.starts[i + 1]].tolist(),
            "labels": int(split.labels[i]),
        }
        for i in torch.cat([chosen[-1], *chosen])  # the first batch warms up
    ]
    marks = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            if "cuda" in run.device:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    def train():
        marks.clear()
        with tempfile.TemporaryDirectory() as folder:
            settings = transformers.TrainingArguments(
                folder,
                per_device_train_batch_size=size,
                num_train_epochs=1,
                learning_rate=run.lr,
                lr_scheduler_type="linear",
                warmup_steps=run.warmup,
                max_grad_norm=1.0,
                optim="adamw_torch_fused",
                bf16=run.precision == "bf16",
                use_cpu="cpu" in run.device,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                train_sampling_strategy="sequential",
            )
            pad = transformers.DataCollatorWithPadding(common.load_tokenizer(run.model)[0])
            trainer = transformers.Trainer(
                model, settings, train_dataset=rows, data_collator=pad, callbacks=[Clock()]
            )
            trainer.train()
        return marks[-1] - marks[0]

    return chosen, train
