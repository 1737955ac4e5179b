"""What only a GPU can show; run with CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py.

Without a GPU everything here is skipped: conftest hides GPUs unless that variable is set.
"""

import json
import weakref

import pytest
import torch
from conftest import EVERY, oracle, ready, rows_flags, stir, trained, weights

import common
import qlora
from harness import batches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
METHODS = [name for name in EVERY if name not in ("head only", "full")]


def one_gradient(module, out, *flags):
    """The gradient of one batch with B away from zero, on the CPU: {name: tensor}."""
    run, data, base, method = ready(module, out, *flags)
    stir(base)
    common.place(run, base)
    base.model.train()
    targets = batches.predicted_tokens(data, data.train, run.seed, 0)
    tensors = common.trained_tensors(base.model)
    method.before_step(10, 10)  # past contextual LoRA's dense steps
    common.gradient(run, data, base, method, torch.arange(32), targets, tensors)
    return {name: tensor.grad.double().cpu() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_gradients_are_the_cpus(name, kind, models, reviews, tmp_path):
    module, more = EVERY[name]
    flags = [*rows_flags(models, reviews, kind), *more, "--precision", "fp32", "--device"]
    cpu = one_gradient(module, tmp_path, *flags, "cpu")
    cuda = one_gradient(module, tmp_path, *flags, "cuda")
    for key, gradient in cpu.items():
        torch.testing.assert_close(cuda[key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_whole_run_in_bf16(name, models, reviews, tmp_path):
    """Trains, scores, merges and measures; a second run writes the same adapter again."""
    module, more = EVERY[name]
    flags = [*rows_flags(models, reviews), *more, "--epochs", 3, "--timing", "--out", tmp_path]
    [path] = module.main(flags)
    result = json.loads(path.read_text())
    assert result["environment"]["precision"] == "bf16" and result["time"]["train_seconds"] > 0
    for key in ("memory", "flops", "inference"):
        assert result[key], key
    metrics = result["metrics"]
    assert abs(metrics["merged"]["loss"] - metrics["test"]["loss"]) < 0.02
    before = weights(path)
    module.main([*flags, "--force"])
    assert weights(path) == before


@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_gpu(name, models, reviews, tmp_path, monkeypatch):
    """From gradient to after_step, where nothing is padded: a mask the library reads once."""
    module, more = EVERY[name]
    inner = common.gradient

    def guarded(run, data, base, method, examples, *rest):
        lengths = data.train.lengths[examples]
        torch.cuda.set_sync_debug_mode("error" if len(set(lengths.tolist())) == 1 else "default")
        return inner(run, data, base, method, examples, *rest)

    def read_losses(*args):
        torch.cuda.set_sync_debug_mode("default")
        return log_losses(*args)

    log_losses = common.log_losses
    monkeypatch.setattr(common, "gradient", guarded)
    monkeypatch.setattr(common, "log_losses", read_losses)
    flags = [*rows_flags(models, reviews), *more, "--batch_size", 2, "--max_steps", 40]
    try:
        *_, history = trained(module, tmp_path, *flags)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert history.step == 40


@pytest.mark.parametrize("double", [True, False])
def test_nf4_is_the_same_on_cpu_and_gpu_and_by_bitsandbytes(double):
    oracle("bitsandbytes")
    torch.manual_seed(0)
    layer = torch.nn.Linear(384, 1536)
    made = [
        qlora.NF4Linear(layer, double, kernel, device)
        for kernel, device in (("torch", "cpu"), ("torch", "cuda"), ("bitsandbytes", "cuda"))
    ]
    assert all(torch.equal(made[0].packed, layer.packed.cpu()) for layer in made)
    first, *others = (layer.dequantized(torch.float32).cpu() for layer in made)
    for other in others:  # a scale's code may differ by one; so may a weight's, midway between two
        far = (other - first).abs() > 2e-3 * first.abs().max()
        assert far.float().mean() < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_counted_memory_is_near_the_allocators(precision, models, reviews, tmp_path):
    wide = {"dim": 256, "hidden_dim": 1024, "n_layers": 4, "n_heads": 4}
    folder = models("distilbert", "", **wide)
    flags = ["--dataset", reviews, "--model", folder, "--max_length", 24, "--precision", precision]
    run, data, base, method, _ = trained(EVERY["lora"][0], tmp_path, *flags, "--max_steps", 3)
    memory = common.count_memory(run, data, base, method)
    for name in ("train", "inference"):
        counted, measured = sum(memory[name].values()), memory[f"{name}_allocator"]
        # cuBLAS takes two workspaces of 32 MiB on this generation, which no tensor owns.
        assert counted < measured < counted + 2**20 * 80, (name, counted, measured)


def test_moving_to_the_gpu(models, reviews, tmp_path):
    """4-bit layers lie there at once; the model of the run before is freed first."""
    module, more = EVERY["contextual qlora"]
    flags = [*rows_flags(models, reviews), *more, "--max_steps", 2]
    run, data, base, method, _ = trained(module, tmp_path, *flags)
    old = weakref.ref(base.model)
    run, data, base, method = ready(module, tmp_path, *flags, "--seeds", 1)
    layers = [m for m in base.model.modules() if isinstance(m, qlora.NF4Linear)]
    assert len(layers) == 12 and all(layer.packed.is_cuda for layer in layers)
    common.place(run, base)
    assert old() is None


def test_paged_adamw_takes_plain_adamws_steps(models, reviews, tmp_path):
    oracle("bitsandbytes")
    flags = [*rows_flags(models, reviews), "--max_steps", 4, "--precision", "fp32"]
    adapters = []
    for more in ([], ["--paged"]):
        _, _, base, _, _ = trained(qlora, tmp_path / str(len(more)), *flags, *more)
        adapters.append({k: t.detach() for k, t in common.trained_tensors(base.model).items()})
    plain, paged = adapters
    for key in plain:
        torch.testing.assert_close(paged[key], plain[key], rtol=1e-3, atol=1e-4)
