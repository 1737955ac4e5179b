"""One contract for all adapter methods: PEFT as the oracle, start, merging, counts, training, saving and loading.

Also the helpers that the methods' own test files use: METHODS, start, batch_of, toy_data, randomise.
"""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import BLOCKS, WORDS, oracle, tiny_config
from safetensors.torch import load_file, save_file

import common
import hira
import lora
import qlora
import sparse_lora

ENCODERS, DECODERS = ["distilbert", "bert", "roberta"], ["gpt2", "llama"]
KINDS = ENCODERS + DECODERS
METHODS = {  # name -> the script and the flags that make it this method
    "lora": (lora, []), "hira": (hira, []), "qlora": (qlora, ["--nf4_backend", "torch"]), "prune": (sparse_lora, []),
    "rank": (sparse_lora, ["--structure", "rank"]), "contextual": (sparse_lora, ["--mode", "contextual"])}
EVERYWHERE = [(method, kind) for method in METHODS for kind in KINDS if (method, kind) != ("contextual", "gpt2")]
HEADS = {  # (architecture, checkpoint's class, task) -> the tensors that the checkpoint lacks
    ("distilbert", "", "classification"): ["pre_classifier.weight", "pre_classifier.bias", "classifier.weight",
                                           "classifier.bias"],
    ("distilbert", "MaskedLM", "mlm"): [],
    ("bert", "", "classification"): ["classifier.weight", "classifier.bias"],
    ("bert", "MaskedLM", "classification"): ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight",
                                             "classifier.bias"],
    ("bert", "", "mlm"): ["cls.predictions.bias", "cls.predictions.transform.dense.weight",
                          "cls.predictions.transform.dense.bias", "cls.predictions.transform.LayerNorm.weight",
                          "cls.predictions.transform.LayerNorm.bias"],
    ("roberta", "", "classification"): ["classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight",
                                        "classifier.out_proj.bias"],
    ("gpt2", "", "classification"): ["score.weight"], ("gpt2", "CausalLM", "clm"): [],
    ("llama", "", "classification"): ["score.weight"], ("llama", "", "clm"): []}
PAD = dict.fromkeys(KINDS, 0) | {"gpt2": 1}  # GPT-2 has no padding token: load_data takes the unknown one
AUTO = {"classification": "SequenceClassification", "mlm": "MaskedLM", "clm": "CausalLM"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No test here is about time or memory: leave out the latency runs and the garbage collections (0.6 s each).

    One thread: two of them wait for each other at every tiny product, tenfold the time on a busy machine.
    """
    import transformers
    transformers.utils.logging.set_verbosity_error()  # both as load_data does, which most tests here do without
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setattr(common, "time_inference", lambda *args: {})
    monkeypatch.setattr(common, "reset_peak", lambda device: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models(models, tmp_path_factory):
    """conftest's tiny checkpoints with random biases: zero ones, as they start, would hide that a bias is lost."""
    made = {}

    def get(*args, **changes):
        plain = Path(models(*args, **changes))
        if plain not in made:
            made[plain] = tmp_path_factory.mktemp("biased") / plain.name
            shutil.copytree(plain, made[plain])
            tensors, draw = load_file(plain / "model.safetensors"), torch.Generator().manual_seed(2)
            for name, tensor in tensors.items():
                if name.endswith("bias"):
                    tensor.normal_(0, 0.3, generator=draw)
            save_file(tensors, made[plain] / "model.safetensors", metadata={"format": "pt"})
        return str(made[plain])
    return get


# ------------------------------------------------------------------------------------------------ helpers


def parsed(script, folder, out, *flags, task="classification"):
    """The run of `script` that its own command line describes, on the CPU, with a tiny checkpoint."""
    argv = ["--dataset", "demo" if task == "classification" else "demo_lm", "--model", folder, "--out", out, "--device", "cpu",
            "--rank", 4, *flags]
    return next(common.runs(common.parse_args(script.__doc__, script.__file__, script.add_args, argv)))


def load_base(run, folder, task):
    """common.load_base, told what it wants to know of the data: two classes where they are classes."""
    kind = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    return common.load_base(run, Namespace(task=task, classes=2 if task == "classification" else None, pad=PAD[kind],
                                           decoder=kind in DECODERS))


def start(method, folder, out, *flags, task="classification"):
    """A tiny base, adapted by the method, without data: (model, run, what adapt returned)."""
    script, own = METHODS[method]
    run = parsed(script, folder, out, *own, *flags, task=task)
    model = load_base(run, folder, task)
    return model, run, script.adapt(model, run)


def base_of(folder, out, task="classification"):
    """The same base and head as `start` gives, without an adapter: (model, run)."""
    run = parsed(lora, folder, out, task=task)
    return load_base(run, folder, task), run


def batch_of(kind, task="classification", lengths=(9, 4, 7, 2), seed=5):
    """A padded batch of random words with targets, as common.collate makes it."""
    draw = torch.Generator().manual_seed(seed)
    column = torch.arange(max(lengths))
    attended = column < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, len(WORDS) + 5, attended.shape, generator=draw).masked_fill(~attended, PAD[kind])
    if task == "classification":
        read = torch.tensor(lengths)[:, None] - 1 if kind in DECODERS else 0
        return common.Batch(ids, attended, (column == read) & attended, torch.arange(len(lengths)) % 2)
    scored = attended & (column % 3 == 1) if task == "mlm" else F.pad(attended[:, 1:], (0, 1))
    target = torch.randint(5, len(WORDS) + 5, (int(scored.sum()),), generator=draw)
    return common.Batch(ids, attended, scored, target)


def toy_data(kind, rows=24, seed=3):
    """Random labelled rows in the form that load_data returns."""
    draw = torch.Generator().manual_seed(seed)
    lists = [torch.randint(5, len(WORDS) + 5, (3 + i % 8,), generator=draw).tolist() for i in range(rows)]
    split = common.Split(*common.flat(lists), torch.arange(rows) % 2, torch.arange(rows))
    return Namespace(task="classification", decoder=kind in DECODERS, classes=2, pad=PAD[kind], train=split, dev=split,
                     eval=split, scored=split, eval_split="test")


def randomise(model, seed=7):
    """Draw everything trained: A, B and the head, none of it zero or too small to be seen."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.normal_(0, 0.2, generator=draw)


def gradients(model, batch):
    """Gradients of the mean loss, by name."""
    model.zero_grad()
    F.cross_entropy(common.forward(model, batch), batch.target).backward()
    return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def four_bit(weight):
    """The weight that NF4 with double quantisation stands for; test_qlora.py proves these functions."""
    packed, absmax = qlora.quantise(weight)
    return qlora.dequantise(packed, qlora.dequantise_scales(*qlora.quantise_scales(absmax)), weight.shape)


def quantise_blocks(model):
    """Replace every block's weights by what 4 bits leave of them: QLoRA's oracle is the dequantised base."""
    with torch.no_grad():
        for name in common.block_linears(model):
            layer = model.get_submodule(name)
            common.weight_of(layer).copy_(four_bit(common.weight_of(layer).contiguous()))
    return model


def transformers_model(folder, task):
    """The checkpoint as transformers gives it, with a head of no known numbers."""
    import transformers
    model = getattr(transformers, f"AutoModelFor{AUTO[task]}").from_pretrained(folder, dtype=torch.float32)
    model.config.pad_token_id = PAD[model.config.model_type]
    return model


def our_name(name):
    """The name in our model of a tensor that PEFT calls `name`."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    for theirs, ours in ((".lora_A.default.weight", ".A"), (".lora_B.default.weight", ".B"), (".hira_A.default", ".A"),
                         (".hira_B.default", ".B")):
        name = name.replace(theirs, ours)
    return name


def peft_config(method, kind, run, **options):
    peft = oracle("peft")
    common_options = {"r": run.rank, "target_modules": run.targets, "task_type": "SEQ_CLS"} | options
    if method == "hira":
        return peft.HiraConfig(**common_options)
    return peft.LoraConfig(**{"lora_alpha": 2 * run.rank, "fan_in_fan_out": kind == "gpt2"} | common_options)


def peft_twin(folder, model, config):
    """PEFT's model over the same checkpoint, everything trained copied from our `model`."""
    twin = oracle("peft").get_peft_model(transformers_model(folder, "classification"), config)
    ours = dict(model.named_parameters())
    trained = {our_name(name): tensor for name, tensor in twin.named_parameters() if tensor.requires_grad}
    assert trained.keys() == {name for name, tensor in ours.items() if tensor.requires_grad}
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(ours[name])
    return twin


def peft_logits(model, batch, task="classification"):
    logits = model(input_ids=batch.ids, attention_mask=batch.attended.long()).logits.detach()
    return logits if task == "classification" else logits[batch.scored]


# ------------------------------------------------------------------------------------------------ PEFT


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_lora_equals_peft(kind, models, tmp_path):
    """Equal logits and equal gradients of A, B and the head, with random A and B."""
    model, run, _ = start("lora", models(kind), tmp_path, "--alpha", 6)
    randomise(model)
    twin = peft_twin(models(kind), model, peft_config("lora", kind, run, lora_alpha=6))
    batch = batch_of(kind)
    close(common.forward(model, batch), common.forward(twin, batch), 1e-5)
    ours, theirs = gradients(model, batch), {our_name(name): grad for name, grad in gradients(twin, batch).items()}
    assert ours.keys() == theirs.keys()
    assert all(grad.abs().max() > 1e-6 for grad in ours.values())
    for name, grad in ours.items():
        close(grad, theirs[name], 1e-5)


# ------------------------------------------------------------------------------------------------ start and merging


@pytest.mark.parametrize("method, kind", EVERYWHERE)
def test_output_at_start_is_the_bases(method, kind, models, tmp_path):
    """B starts at zero, so nothing has changed yet; QLoRA's base is the dequantised one."""
    model, _, _ = start(method, models(kind), tmp_path)
    base, _ = base_of(models(kind), tmp_path)
    if method == "qlora":
        quantise_blocks(base)
    batch = batch_of(kind)
    close(common.forward(model.train(), batch), common.forward(base.train(), batch), 1e-6)
    close(common.forward(model.eval(), batch), common.forward(base.eval(), batch), 1e-6)


@pytest.mark.parametrize("method, kind", EVERYWHERE)
def test_merged_equals_unmerged_and_plain_restores(method, kind, models, tmp_path):
    model, _, _ = start(method, models(kind), tmp_path)
    randomise(model)
    model.eval()
    batch = batch_of(kind)
    with torch.no_grad():
        modules, before = dict(model.named_modules()), common.forward(model, batch)
        stand_ins = common.adapters(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with common.plain(model, True, torch.float32) as merged:
            assert not common.adapters(merged)
            assert not any(hasattr(module, "A") for module in merged.modules())
            assert not any(list(merged.get_submodule(path).children()) for path in stand_ins)
            close(common.forward(merged, batch), before, 1e-5)
        with common.plain(model, False, torch.float32) as bare:
            unadapted = common.forward(bare, batch)
        with pytest.raises(KeyError), common.plain(model, True, torch.bfloat16):
            raise KeyError
        assert (unadapted - before).abs().max() > 1e-2
        assert torch.equal(common.forward(model, batch), before)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys() and all(after[name] is module for name, module in modules.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_plain_without_merging_is_the_base(kind, models, tmp_path):
    model, _, _ = start("lora", models(kind), tmp_path)
    with torch.no_grad():
        for module in common.adapters(model).values():
            module.B.fill_(1)
    base, batch = base_of(models(kind), tmp_path)[0].eval(), batch_of(kind)
    with torch.no_grad(), common.plain(model.eval(), False, torch.float32):
        close(common.forward(model, batch), common.forward(base, batch), 1e-6)


# ------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("kind, checkpoint, task", HEADS)
def test_head_is_what_the_checkpoint_lacks(kind, checkpoint, task, models, tmp_path):
    _, run = base_of(models(kind, checkpoint), tmp_path, task)
    assert sorted(run.head) == sorted(HEADS[kind, checkpoint, task])


DISTILBERT = {"vocab_size": 30522, "max_position_embeddings": 512, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072}
BERT = {"vocab_size": 30522, "max_position_embeddings": 512, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072}
MINILM = BERT | {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}


@pytest.mark.parametrize("kind, size, checkpoint, task, rank, targets, adapter, head, total", [
    ("distilbert", DISTILBERT, "", "classification", 8, None, 147_456, 592_130, 66_955_010),
    ("distilbert", DISTILBERT, "", "classification", 32, None, 589_824, 592_130, 66_955_010),
    ("distilbert", DISTILBERT, "MaskedLM", "mlm", 8, None, 147_456, 0, 66_985_530),
    ("bert", BERT, "", "classification", 8, ["query", "key", "value"], 442_368, 1_538, 109_483_778),
    ("bert", MINILM, "", "mlm", 8, None, 73_728, 179_130, None),
])
@pytest.mark.parametrize("method", ["lora", "hira", "prune", "contextual"])
def test_known_counts_at_real_size(method, kind, size, checkpoint, task, rank, targets, adapter, head, total):
    """On the meta device: nothing is allocated. QLoRA cannot quantise nothing; its counts are compared at small size."""
    import transformers
    script, flags = METHODS[method]
    with torch.device("meta"):
        auto = getattr(transformers, f"AutoModelFor{AUTO[task]}")
        model = auto.from_config(tiny_config(kind, **size)).requires_grad_(False)
        run = Namespace(head=HEADS[kind, checkpoint, task], rank=rank, alpha=None, dropout=0.0, device="meta", penalty=0.0,
                        targets=targets or common.TARGETS[kind], mode=method, sparsity=None, structure="none",
                        dense_tokens="scored", estimator="sample", dense_layers=None,
                        base_parameters=sum(tensor.numel() for tensor in model.parameters()))
        for name, tensor in model.named_parameters():
            tensor.requires_grad_(name in run.head)
        script.adapt(model, run)
    counts = common.count_parameters(run, model)
    assert (counts["adapter"], counts["head"], counts["trainable"]) == (adapter, head, adapter + head)
    assert total is None or counts["total"] == total + adapter
    assert counts["trainable_percent"] == pytest.approx(100 * (adapter + head) / counts["total"])


@pytest.mark.parametrize("method, kind", EVERYWHERE)
def test_counts_and_trained_tensors_are_adapter_and_head(method, kind, models, tmp_path):
    """The same numbers for every method, 4-bit weights counted as what they stand for; what is trained is floating."""
    model, run, _ = start(method, models(kind), tmp_path)
    stand_ins = {path: module for path, module in common.adapters(model).items() if module.keys}
    owned = {f"{path}.{key}" for path in stand_ins for key in ("A", "B")}
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert trained == owned | set(HEADS[kind, "", "classification"])
    assert all(path.endswith(tuple(BLOCKS[kind])) for path in stand_ins)
    assert all(tensor.dtype == torch.float32 for tensor in model.parameters())

    untouched, _ = base_of(models(kind), tmp_path)
    shapes = [common.weight_of(untouched.get_submodule(path)).shape for path in stand_ins]
    counts = common.count_parameters(run, model)
    assert counts["adapter"] == sum(4 * (rows + columns) for rows, columns in shapes)
    assert counts["total"] == sum(tensor.numel() for tensor in untouched.parameters()) + counts["adapter"]


@pytest.mark.parametrize("method", METHODS)
def test_second_adapt_is_an_error(method, models, tmp_path):
    model, run, _ = start(method, models("distilbert"), tmp_path)
    trained = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
    with pytest.raises(RuntimeError, match="adapters already"):
        METHODS[method][0].adapt(model, run)
    assert trained == [name for name, tensor in model.named_parameters() if tensor.requires_grad]


def test_targets_by_spaces_or_commas(models, tmp_path):
    """`--targets query,key,value` means `--targets query key value`, also in the result's name."""
    ours = [start("lora", models("bert"), tmp_path, "--targets", *words)
            for words in (["query", "key", "value"], ["query,key,value"], ["query,key", "value"])]
    assert len({run.path for _, run, _ in ours}) == 1
    assert [len(common.adapters(model)) for model, _, _ in ours] == [6, 6, 6]


@pytest.mark.parametrize("method", METHODS)
def test_target_that_matches_nothing_names_the_candidates(method, models, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        start(method, models("distilbert"), tmp_path, "--targets", "q_lin", "query")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) == 1
    assert "--targets query" in message and all(name in message for name in ("q_lin", "out_lin", "lin1"))


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("method, kind", [(method, "distilbert") for method in METHODS] + [
    (method, kind) for method in ("lora", "hira", "qlora") for kind in ("gpt2", "llama")])
def test_first_step_moves_b_second_moves_a_and_the_base_never_moves(method, kind, models, tmp_path):
    model, run, recipe = start(method, models(kind), tmp_path, "--max_steps", 20, "--batch_size", 8)
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    masks = {name for name, _ in model.named_buffers() if "mask_" in name}
    frozen = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]
              if name not in trained | masks}
    steps, method_step = [], recipe.get("after_step", lambda step, total, lr: None)

    def after_step(step, total, lr):
        if step < 3:
            now = dict(model.named_parameters())
            steps.append({name: (now[name].detach().clone(), None if now[name].grad is None else now[name].grad.clone())
                          for name in trained})
        method_step(step, total, lr)
    history = common.train(model, toy_data(kind), run, recipe | {"after_step": after_step})
    assert history.step == 20 and len(history.curve) == 20

    for name in sorted(trained):
        (start_value, _), (first, first_grad), (second, _) = (step[name] for step in steps)
        if name.endswith(".A"):
            assert not first_grad.any() and torch.equal(first, start_value)
            assert (second != first).any()
        else:
            assert first_grad.any() and (first != start_value).any() and (second != first).any()
        if name.endswith(".B"):
            assert not start_value.any()
    after = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in frozen.items():
        assert torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("kind", KINDS)
def test_same_head_and_same_adapter_start_for_all_methods(kind, models, tmp_path):
    """At one seed the methods differ in the method only; at another seed head and A are others."""
    def drawn(method, *flags):
        model, run, _ = start(method, models(kind), tmp_path, *flags)
        return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    first, other = drawn("lora"), drawn("lora", "--seeds", 1)
    for method in METHODS:
        if (method, kind) in EVERYWHERE:
            values = drawn(method)
            assert values.keys() == first.keys() and all(torch.equal(values[name], first[name]) for name in first)
    drawn_names = [name for name, tensor in first.items() if tensor.any()]
    assert drawn_names and all(not torch.equal(first[name], other[name]) for name in drawn_names)


# ------------------------------------------------------------------------------------------------ saving and loading


@pytest.fixture(scope="module")
def trained(models, reviews, text_dir, tmp_path_factory):
    """trained(method, kind, checkpoint, task) -> what a short run by the script's own main left behind, made once.

    A namespace: argv, folder of the adapter, result, metrics, and the trained model's logits on batch_of(kind, task), also
    those of its head on the bare base.
    """
    made = {}

    def get(method, kind, checkpoint="", task="classification"):
        key = (method, kind, checkpoint, task)
        if key not in made:
            script, flags = METHODS[method]
            base = models(kind, checkpoint)
            argv = ["--dataset", reviews if task == "classification" else "wikitext2", "--data_dir", text_dir, "--model", base,
                    "--rank", 4, "--max_steps", 6, "--batch_size", 8, "--max_length", 32, "--lr", 0.1,
                    "--head_lr", 0.02, "--device", "cpu", *flags]
            out, caught = tmp_path_factory.mktemp("out"), {}

            def spy(model, data, run):
                caught["metrics"] = common.evaluate(model, data, run)
                with torch.no_grad():
                    caught["logits"] = common.forward(model.eval(), batch_of(kind, task))
                    with common.plain(model, False, torch.float32):
                        caught["bare"] = common.forward(model, batch_of(kind, task))
                return caught["metrics"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(script, "evaluate", spy)
                patch.setattr(common, "time_inference", lambda *args: {})
                patch.setattr(common, "reset_peak", lambda device: None)
                path, = script.main([*argv, "--out", out])
            made[key] = Namespace(script=script, argv=argv, base=base, folder=path.with_suffix(""),
                                  result=json.loads(path.read_text()), **caught)
        return made[key]
    return get


def load_in_peft(base, folder):
    model = oracle("peft").PeftModel.from_pretrained(base, str(folder))
    return model.eval()


BY_PEFT = [(method, kind, checkpoint, "classification") for method in ("lora", "hira", "prune", "rank")
           for kind, checkpoint in [("distilbert", ""), ("bert", "MaskedLM"), ("roberta", ""), ("gpt2", ""), ("llama", "")]]
BY_PEFT += [("lora", "bert", "", "classification"), ("contextual", "distilbert", "", "classification"),
            ("contextual", "llama", "", "classification"), ("lora", "distilbert", "MaskedLM", "mlm"),
            ("hira", "distilbert", "MaskedLM", "mlm"), ("lora", "gpt2", "CausalLM", "clm"), ("rank", "llama", "", "clm")]
BY_PEFT += [("qlora", kind, "", "classification") for kind in ("distilbert", "gpt2", "llama")]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method, kind, checkpoint, task", BY_PEFT)
def test_adapter_of_main_loads_in_peft(method, kind, checkpoint, task, trained):
    """Equal logits, head included; adapter and head each count, or loading nothing would pass."""
    run = trained(method, kind, checkpoint, task)
    base = transformers_model(run.base, task)
    if method == "qlora":
        quantise_blocks(base)
    batch = batch_of(kind, task)
    with torch.no_grad():
        other_head = peft_logits(base.eval(), batch, task)
        loaded = peft_logits(load_in_peft(base, run.folder), batch, task)
    close(loaded, run.logits, 1e-5)
    assert (run.bare - run.logits).abs().max() > 1e-3
    assert task != "classification" or (other_head - run.bare).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method, checkpoint", [("lora", ""), ("lora", "MaskedLM"), ("hira", "MaskedLM")])
def test_peft_would_go_on_training_the_same_tensors(method, checkpoint, trained, tmp_path):
    """The saved config names adapter and head, also a missing pooler, as PEFT's trainable modules."""
    run = trained(method, "bert", checkpoint)
    theirs = oracle("peft").PeftModel.from_pretrained(transformers_model(run.base, "classification"), str(run.folder),
                                                      is_trainable=True)
    ours, _, _ = start(method, run.base, tmp_path)
    assert {our_name(name) for name, tensor in theirs.named_parameters() if tensor.requires_grad} == {
        name for name, tensor in ours.named_parameters() if tensor.requires_grad}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method, kind", [(method, kind) for method in ("lora", "hira") for kind in KINDS])
def test_adapter_of_peft_loads_here(method, kind, models, tmp_path):
    """An adapter and head that PEFT drew and saved give PEFT's logits when load_adapter puts them into our model."""
    torch.manual_seed(11)
    folder = tmp_path / "theirs"
    empty, run, _ = start(method, models(kind), tmp_path)
    theirs = oracle("peft").get_peft_model(transformers_model(models(kind), "classification"), peft_config(method, kind, run))
    with torch.no_grad():
        for tensor in theirs.parameters():
            if tensor.requires_grad:
                tensor.normal_(0, 0.2)
    theirs.save_pretrained(folder)
    model, run, recipe = start(method, models(kind), tmp_path, "--eval_only", folder)
    common.load_adapter(model, toy_data(kind), run, recipe)
    batch = batch_of(kind)
    with torch.no_grad():
        close(common.forward(model.eval(), batch), peft_logits(theirs.eval(), batch), 1e-5)
        assert (common.forward(model, batch) - common.forward(empty.eval(), batch)).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", [
    {"use_rslora": True}, {"rank_pattern": {"q_lin": 2}},
    {"rank_pattern": {"distilbert.transformer.layer.0.attention.q_lin": 2}}, {"alpha_pattern": {"q_lin": 3}},
    {"alpha_pattern": {".*q_lin": 3}}, {"alpha_pattern": {r"distilbert\.transformer\.layer\.0\.attention\.q_lin": 3}},
    {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"init_lora_weights": "gaussian"},
    {"use_dora": True}, {"bias": "all"}, {"target_modules": ["q_lin"]}], ids=str)
def test_adapter_of_peft_that_means_something_else_is_refused_or_right(options, models, tmp_path):
    """Never other logits without a word: PEFT's options that change the formula load rightly or end with one line."""
    torch.manual_seed(11)
    folder, kind = tmp_path / "theirs", "distilbert"
    _, run, _ = start("lora", models(kind), tmp_path)
    config = peft_config("lora", kind, run, **options)
    theirs = oracle("peft").get_peft_model(transformers_model(models(kind), "classification"), config)
    with torch.no_grad():
        for tensor in theirs.parameters():
            if tensor.requires_grad:
                tensor.normal_(0, 0.2)
    theirs.save_pretrained(folder)
    model, run, recipe = start("lora", models(kind), tmp_path, "--eval_only", folder)
    try:
        common.load_adapter(model, toy_data(kind), run, recipe)
    except SystemExit as stop:
        assert stop.code == 2
        return
    with torch.no_grad():
        close(common.forward(model.eval(), batch_of(kind)), peft_logits(theirs.eval(), batch_of(kind)), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_acts_on_the_adapters_input_only(method, models, tmp_path):
    model, _, _ = start(method, models("distilbert"), tmp_path, "--dropout", 0.5)
    layer, x = next(module for module in common.adapters(model).values() if module.keys), torch.randn(5, 32)
    assert torch.allclose(layer.train()(x), layer.eval()(x), atol=1e-6)  # B is zero: what the base reads is whole
    layer.B.data.normal_()
    assert not torch.allclose(layer.train()(x), layer.eval()(x), atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_a_starts_uniform_and_b_at_zero(method, models, tmp_path):
    """A within ±1/√in, Kaiming's bound for a = √5, with the spread of a uniform draw."""
    model, _, _ = start(method, models("distilbert"), tmp_path, "--rank", 32)
    for layer in common.adapters(model).values():
        if layer.keys:
            assert 0.95 < layer.A.abs().max() * 32**0.5 <= 1 and abs(layer.A.std() * (3 * 32)**0.5 - 1) < 0.06
            assert not layer.B.any()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "hira"])
def test_alpha_reaches_the_scale_and_the_file(method, models, tmp_path):
    model, run, recipe = start(method, models("distilbert"), tmp_path, "--alpha", 6)
    assert {layer.scale for layer in common.adapters(model).values() if layer.keys} == {6 / run.rank}
    assert recipe["peft"]["lora_alpha"] == 6


@pytest.mark.parametrize("kind", common.TARGETS)
def test_default_targets_are_in_every_block(kind):
    from transformers import AutoConfig, AutoModel
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind)).requires_grad_(False)
    found = common.replace(model, common.TARGETS[kind], lambda layer: layer)
    assert len(found) == len(common.TARGETS[kind]) * model.config.num_hidden_layers


SCORED = [(method, "distilbert", "", "classification") for method in METHODS] + [
    ("lora", "bert", "MaskedLM", "classification"), ("lora", "gpt2", "CausalLM", "clm"), ("rank", "llama", "", "clm"),
    ("lora", "distilbert", "MaskedLM", "mlm"), ("lora", "bert", "", "mlm"), ("hira", "llama", "", "classification"),
    ("qlora", "gpt2", "", "classification")]


@pytest.mark.parametrize("method, kind, checkpoint, task", SCORED)
def test_eval_only_scores_what_the_run_scored(method, kind, checkpoint, task, trained, tmp_path, monkeypatch, capsys):
    """Every metric to the last bit, merged ones and the bitmap included, and nothing is written."""
    run, scored = trained(method, kind, checkpoint, task), []
    monkeypatch.setattr(run.script, "evaluate", lambda *args: scored.append(common.evaluate(*args)) or scored[-1])
    assert run.script.main([*run.argv, "--out", tmp_path / "none", "--eval_only", run.folder]) == []
    assert scored == [run.metrics] and "merged" in run.metrics
    assert not (tmp_path / "none").exists()
    assert {key: run.metrics[key] for key in run.result["metrics"]} == run.result["metrics"]


def edited(folder, to, change):
    """A copy of an adapter whose tensors `change` has edited in place."""
    shutil.copytree(folder, to)
    file = to / "adapter_model.safetensors"
    from safetensors import safe_open
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)
    return to


def perturbed(base, to):
    """A copy of a checkpoint in which one frozen number is another."""
    shutil.copytree(base, to)
    tensors = load_file(to / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][0, 0] += 1e-3
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def first(tensors, part):
    return next(name for name in sorted(tensors) if part in name)


FAULTS = ["missing A", "missing head", "unexpected", "rank", "rank in the tensors", "alpha", "base", "targets", "no file",
          "torn file", "other method"]


@pytest.mark.parametrize("fault, method", [(fault, "lora") for fault in FAULTS] + [
    (fault, method) for method in METHODS if method != "lora" for fault in ("missing A", "rank", "base", "other method")])
def test_eval_only_is_strict(fault, method, trained, tmp_path, capsys):
    """One line, status 2, and the line names what does not fit."""
    run, folder, flags = trained(method, "distilbert"), tmp_path / "adapter", []
    if fault == "missing A":
        edited(run.folder, folder, lambda tensors: tensors.pop(first(tensors, "_A")))
        word = "_A"
    elif fault == "missing head":
        edited(run.folder, folder, lambda tensors: tensors.pop(first(tensors, "pre_classifier")))
        word = "pre_classifier"
    elif fault == "unexpected":
        edited(run.folder, folder, lambda tensors: tensors.update({"base_model.model.extra": torch.ones(1)}))
        word = "base_model.model.extra"
    elif fault == "rank in the tensors":
        def grow(tensors):
            name = first(tensors, "_B")
            tensors[name] = F.pad(tensors[name], (0, 1))
        edited(run.folder, folder, grow)
        word = "_B"
    elif fault == "torn file":
        shutil.copytree(run.folder, folder)
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:200])
        word = "adapter_model.safetensors"
    elif fault == "no file":
        word = "adapter_model.safetensors"
    else:
        shutil.copytree(run.folder, folder)
        flags = {"rank": ["--rank", 5], "alpha": ["--alpha", 5], "base": ["--model", perturbed(run.base, tmp_path / "base")],
                 "targets": ["--targets", "q_lin"], "other method": []}[fault]
        word = {"rank": "--rank", "alpha": "--alpha", "base": "another base", "targets": "unexpected",
                "other method": "peft_type"}[fault]
    script, argv = run.script, run.argv
    if fault == "other method":
        script = lora if method == "hira" else hira
        argv = argv[:len(argv) - len(METHODS[method][1])]
    with pytest.raises(SystemExit) as stop:
        script.main([*argv, *flags, "--out", tmp_path / "none", "--eval_only", folder])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) == 1 and word in message, message


def test_targets_of_a_missing_pooler_are_saved_as_peft_reads_them(models, reviews, tmp_path):
    """--targets dense on BERT without a pooler names the pooler, too, which is head here and must be so in PEFT."""
    base, logits = models("bert", "MaskedLM"), []

    def spy(model, data, run):
        with torch.no_grad():
            logits.append(common.forward(model.eval(), batch_of("bert")))
        return common.evaluate(model, data, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "evaluate", spy)
        path, = lora.main(["--dataset", reviews, "--model", base, "--targets", "dense", "--max_steps", 3, "--batch_size", 8,
                           "--max_length", 32, "--lr", 0.03, "--device", "cpu", "--out", tmp_path])
    peft_model = load_in_peft(transformers_model(base, "classification"), path.with_suffix(""))
    with torch.no_grad():
        close(peft_logits(peft_model, batch_of("bert")), logits[0], 1e-5)


def test_saved_folder_is_small_and_names_no_machine(trained):
    """Adapter and head only, in PEFT's two files, and no absolute path in the config."""
    run = trained("lora", "distilbert")
    assert sorted(file.name for file in run.folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(run.folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == run.result["parameters"]["trainable"]
    config = json.loads((run.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == Path(run.base).name
