"""4-bit formats by fake quantization: the weight that the codes and scales stand for, in fp32."""

import torch

import qlora

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # a sign, two bits of exponent, one of mantissa
BITSANDBYTES = [0, 1 / 16, 2, 3, 4, 6, 8, 12]  # its FP4 has another smallest number
LEVELS = {
    "NF4": qlora.NF4.tolist(),
    "FP4 (E2M1)": [sign * x / 6 for x in E2M1 for sign in (-1, 1)],
    "FP4 (bitsandbytes)": [sign * x / 12 for x in BITSANDBYTES for sign in (-1, 1)],
    "INT4": [i / 7 for i in range(-7, 8)],
    "INT4, minimum": [i / 15 for i in range(16)],
}
FORMATS = {name: torch.tensor(levels).unique() for name, levels in LEVELS.items()}  # sorted


def fake_quantize(weight, name, size, double=False, shift=0):
    """The weight (out, in) that 4 bits in this format stand for, with a scale a block of `size`.

    The scale is the block's largest magnitude; with a minimum it is its range, from the minimum on.
    double: the scales (and minima) are in 8 bits, as in QLoRA. shift: the blocks begin so many
    weights later, which is another rounding that is as good.
    """

    def stored(scales):
        return qlora.dequantize_scales(*qlora.quantize_scales(scales)) if double else scales

    blocks, table = qlora.blocks_of(weight.flatten().roll(-shift), size), FORMATS[name]
    low = blocks.amin(1) if name == "INT4, minimum" else torch.zeros(len(blocks))
    scales = (blocks - low[:, None]).abs().amax(1)
    codes = qlora.nearest((blocks - low[:, None]) * (1 / scales.clamp(min=1e-38))[:, None], table)
    if name == "INT4, minimum":
        low = stored(low)
    values = table[codes.int()] * stored(scales)[:, None] + low[:, None]
    return values.flatten()[: weight.numel()].roll(shift).view_as(weight)


def bits(name, size, double):
    """Bits a weight: its code, and its share of the block's numbers."""
    numbers = 2 if name == "INT4, minimum" else 1
    return 4 + numbers * (8 / size + 32 / (256 * size) if double else 32 / size)
