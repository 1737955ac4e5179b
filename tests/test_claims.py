"""The claims' mathematics against closed forms and plain loops; the page against its numbers."""

import json
import math

import pytest
import torch

import hira
import lora
import qlora
from study.claims import first_step, formats, four_bits, page, projection, shared


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_best_lora_keeps_the_largest_singular_values():
    """Eckart and Young: the energy of the first r of them."""
    E, squares = gaussian(20, 30), torch.linalg.svdvals(gaussian(20, 30)).square()
    for rank in (1, 5, 20):
        share = (squares[:rank].sum() / squares.sum()).item()
        assert projection.energy(projection.best_lora(E, rank), E) == pytest.approx(share, abs=1e-5)


def test_the_best_hira_recovers_what_hira_can_make():
    W0 = gaussian(40, 30)
    E = hira.hira_update(W0, gaussian(3, 30, seed=1), gaussian(40, 3, seed=2))
    update, path = projection.best_hira(E, W0, 3, steps=200)
    assert path[-1] == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(update, E, rtol=0, atol=0.02)


def test_the_best_hira_never_gets_worse_and_its_rank_is_high():
    E, W0 = gaussian(40, 30), gaussian(40, 30, seed=1)
    update, path = projection.best_hira(E, W0, 3, steps=40, starts=1)
    assert all(after >= before - 1e-6 for before, after in zip(path, path[1:], strict=False))
    assert 3 * 70 / 1200 < path[-1] < 1  # more than so many free numbers fit by chance
    assert torch.linalg.matrix_rank(update) == 30


def test_with_a_frozen_weight_of_ones_the_best_hira_is_the_best_lora():
    E = gaussian(30, 20)
    update, _ = projection.best_hira(E, torch.ones(30, 20), 4, steps=300)
    torch.testing.assert_close(update, projection.best_lora(E, 4), rtol=0, atol=0.02)


def test_a_row_is_the_least_squares_solution():
    A, W0, E = gaussian(3, 30), gaussian(5, 30, seed=1), gaussian(5, 30, seed=2)
    rows = projection.rows_given(A, torch.zeros(5, 3), W0, E, damping=1e-8)
    for b, w, e in zip(rows, W0, E, strict=True):
        torch.testing.assert_close(
            b, torch.linalg.lstsq((A * w).T, e).solution, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_the_scripts_own(double):
    weight = gaussian(32, 128)
    packed, absmax = qlora.quantize(weight)
    if double:
        absmax = qlora.dequantize_scales(*qlora.quantize_scales(absmax))
    expected = qlora.dequantize(packed, absmax, weight.shape)
    assert torch.equal(four_bits.fake_quantize(weight, "NF4", 64, double), expected)


def rounded_by_hand(block, name):
    """A block rounded number by number, to the nearest of the format's multiples of its scale."""
    if name == "INT4, minimum":
        low, step = min(block), (max(block) - min(block)) / 15
        return [low + step * round((x - low) / step) for x in block]
    if name == "INT4":
        step = max(map(abs, block)) / 7
        return [step * round(x / step) for x in block]
    largest = {"FP4 (E2M1)": 6, "FP4 (bitsandbytes)": 12}[name]
    sizes = {"FP4 (E2M1)": four_bits.E2M1, "FP4 (bitsandbytes)": four_bits.BITSANDBYTES}[name]
    unit = max(map(abs, block)) / largest
    return [
        math.copysign(unit * min(sizes, key=lambda s: abs(s - abs(x) / unit)), x) for x in block
    ]


@pytest.mark.parametrize("name", [name for name in four_bits.FORMATS if name != "NF4"])
@pytest.mark.parametrize("size", [32, 64])
def test_a_format_is_what_a_plain_loop_gives(name, size):
    weight = gaussian(4, 64)
    loops = [rounded_by_hand(b.tolist(), name) for b in weight.flatten().split(size)]
    expected = torch.tensor(loops).view(4, 64)
    torch.testing.assert_close(four_bits.fake_quantize(weight, name, size), expected)
    rolled = four_bits.fake_quantize(weight.flatten().roll(5), name, size, shift=5).roll(-5)
    torch.testing.assert_close(rolled.view(4, 64), expected)


def test_bitsandbytes_has_the_same_fp4():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(8, 64)
    quantized, state = functional.quantize_fp4(weight, blocksize=64)
    expected = functional.dequantize_fp4(quantized, state)
    ours = four_bits.fake_quantize(weight, "FP4 (bitsandbytes)", 64)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_bits_a_weight_are_those_of_the_qlora_paper():
    assert four_bits.bits("NF4", 64, False) == 4.5
    assert four_bits.bits("NF4", 64, True) == pytest.approx(4.127, abs=5e-4)
    assert four_bits.bits("INT4, minimum", 64, False) == 5


def test_percent_more_is_the_ratio_of_perplexities_with_a_paired_error():
    scored = torch.tensor([10, 20, 10, 40])
    a, b = (formats.common.Scores(nll, scored, None, False) for nll in gaussian(2, 4).double() + 30)
    mean, low, high = formats.percent_more(a, b)
    ratio = math.exp((a.nll.sum() / 80).item()) / math.exp((b.nll.sum() / 80).item())
    assert mean == pytest.approx(100 * (ratio - 1))
    assert low < mean < high
    assert formats.percent_more(a, a) == [0, 0, 0]


def test_the_update_of_a_layer_is_what_merging_adds():
    base = torch.nn.Linear(12, 8)
    for layer in (lora.LoRALinear(base, 2, 16.0, 0.0), hira.HiRALinear(base, 2, 0.0)):
        torch.nn.init.normal_(layer.B)
        added = layer.merged_weight() - base.weight
        torch.testing.assert_close(first_step.update_of(layer).float(), added, atol=1e-5, rtol=1e-4)


def test_interval_is_a_t_interval():
    assert shared.interval([1.0, 2.0, 3.0]) == pytest.approx([2, 2 - 2.4841, 2 + 2.4841], abs=1e-3)


def test_the_page_is_what_the_numbers_give():
    """docs/claims.md and results/*.json are committed together."""
    assert page.PAGE.read_text("utf-8") == page.filled(page.PAGE.read_text("utf-8"))
    for path in shared.RESULTS.glob("*.json"):
        assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=1) + "\n"
