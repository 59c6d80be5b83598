"""FP8 tensors bit for bit against the formats' definition in float64: the nearest of all codes, ties to the even."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vapo.models import fp8_formats as fp8

TOP = {fp8.E4M3: 448.0, fp8.E5M2: 57344.0}
MANTISSA_BITS = {fp8.E4M3: 3, fp8.E5M2: 2}
BIAS = {fp8.E4M3: 7, fp8.E5M2: 15}


def value_of(code: int, dtype: torch.dtype) -> float:
    """A positive code's value by the format's definition (OCP 8-bit floating point specification)."""
    bits, bias = MANTISSA_BITS[dtype], BIAS[dtype]
    exponent, mantissa = code >> bits, code & (2**bits - 1)
    if exponent == 0:
        return mantissa * 2.0 ** (1 - bias - bits)
    return (1 + mantissa / 2**bits) * 2.0 ** (exponent - bias)


def grid(dtype: torch.dtype) -> np.ndarray:
    """Values of the finite positive codes 0, 1, 2, ... in order."""
    values = [value_of(code, dtype) for code in range(128)]
    return np.array([value for value in values if value <= TOP[dtype]])


def nearest_code(value: float, dtype: torch.dtype) -> int:
    """Nearest finite code of a number, the even one of two that are equally near; NaN is any code above the finite."""
    if math.isnan(value):
        return -1
    values = grid(dtype)
    size = min(abs(value), TOP[dtype])
    above = int(np.searchsorted(values, size))
    below = max(above - 1, 0)
    gap_above, gap_below = values[above] - size, size - values[below]
    code = below if gap_below < gap_above or (gap_below == gap_above and below % 2 == 0) else above
    return code | (0x80 if math.copysign(1.0, value) < 0 else 0)


def codes_of(tensor: torch.Tensor) -> list[int]:
    finite = len(grid(tensor.dtype))
    codes = tensor.view(torch.uint8).flatten().tolist()
    return [code if code & 0x7F < finite else -1 for code in codes]


def expected_scale(amax: float, dtype: torch.dtype, rule: str) -> tuple[float, float]:
    """Scale and its inverse from their definitions in float64, rounded to float32 where Transformer Engine rounds."""
    if rule == "e8m0":
        wanted = float(np.float32(np.float64(np.float32(amax)) * np.float64(np.float32(1 / TOP[dtype]))))
        exponent = 127 if math.isinf(amax) else next(e for e in range(-127, 128) if 2.0**e >= wanted)
        return 2.0**-exponent, 2.0**exponent
    if amax == 0 or math.isinf(amax):
        return 1.0, 1.0
    exact = TOP[dtype] / amax
    largest = float(np.finfo(np.float32).max)
    scale = float(np.float32(exact)) if exact < largest else largest
    if rule == "power_of_two":
        scale = 2.0 ** math.floor(math.log2(scale))
    return scale, float(np.float32(1 / scale))


def any_floats(count: int) -> st.SearchStrategy[np.ndarray]:
    """float32 of any bits at all: zeros of both signs, subnormals, huge numbers, infinities, NaN."""
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3.4028235e38, 448.0, 464.0, 57344.0, 61440.0, 2.0**-10]
    bits = st.integers(0, 2**32 - 1).map(lambda b: np.array(b, np.uint32).view(np.float32).item())
    usual = st.floats(-600, 600, width=32)
    return st.lists(st.one_of(usual, usual, st.sampled_from(special), bits), min_size=count, max_size=count).map(
        lambda numbers: np.array(numbers, np.float32)
    )


@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
def test_every_code_and_every_midpoint(dtype):
    values = grid(dtype)
    assert values[-1] == TOP[dtype]
    between = (values[1:] + values[:-1]) / 2
    near = np.concatenate([values, between, np.nextafter(between.astype(np.float32), 0), [TOP[dtype] * 2, np.inf]])
    numbers = np.concatenate([near, -near, [np.nan]]).astype(np.float32)
    codes = codes_of(fp8.cast(torch.from_numpy(numbers), torch.ones(()), dtype))
    assert codes == [nearest_code(float(number), dtype) for number in numbers]


@settings(max_examples=150, deadline=None)
@given(any_floats(12), st.sampled_from([fp8.E4M3, fp8.E5M2]), st.sampled_from(["float", "power_of_two", "e8m0"]))
def test_blocks_of_any_bits(numbers, dtype, rule):
    matrix = torch.from_numpy(numbers).view(3, 4)
    for block in (None, (1, 2), (2, 1), (2, 3)):
        made = fp8.round_blocks(matrix, dtype, block, rule)
        height, width = block or (3, 4)
        assert made.scale_inv.shape == (-(-3 // height), -(-4 // width))
        codes = codes_of(made.codes)
        for i in range(3):
            for j in range(4):
                top, left = i // height * height, j // width * width
                inside = numbers.reshape(3, 4)[top : top + height, left : left + width]
                known = np.abs(inside[~np.isnan(inside)])
                scale, inverse = expected_scale(float(known.max()) if known.size else 0.0, dtype, rule)
                assert float(made.scale_inv[i // height, j // width]) == inverse
                with np.errstate(over="ignore", invalid="ignore"):
                    product = np.float32(np.float64(numbers[4 * i + j]) * np.float64(np.float32(scale)))
                assert codes[4 * i + j] == nearest_code(float(product), dtype)


@settings(max_examples=60, deadline=None)
@given(any_floats(4), st.sampled_from(["float", "power_of_two"]))
def test_what_is_scaled_by_its_own_largest_number_stays_within_the_format(numbers, rule):
    matrix = torch.from_numpy(numbers).view(1, 4).nan_to_num(0.0, 1.0, -1.0).clamp(-1e37, 1e37)  # no 2^128
    made = fp8.round_blocks(matrix, fp8.E4M3, (1, 4), rule)
    back = made.numbers().double()
    smallest = 2.0**-10 * made.scale_inv.double()  # half of the smallest number above 0
    assert bool(((back - matrix.double()).abs() <= (matrix.double().abs() * 2**-4).maximum(smallest) * 1.0001).all())


def test_the_largest_number_of_bfloat16_stands_for_a_scale_beyond_it():
    tiny = torch.full((1, 4), 1e-40, dtype=torch.bfloat16)
    block = fp8.round_blocks(tiny, fp8.E4M3, (1, 4), "float")
    assert float(block.scale_inv) == pytest.approx(1 / torch.finfo(torch.bfloat16).max)
    whole = fp8.round_blocks(tiny, fp8.E4M3, None, "float")
    assert float(whole.scale_inv) == pytest.approx(1 / torch.finfo(torch.float32).max)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 2.0**100, width=32), max_size=3), max_size=12), st.integers(1, 4))
def test_delayed_scales_against_a_plain_history(steps, length):
    """`steps` lists the matrices' largest values of each step; a scale follows the largest of the last `length` steps,
    the one before it included where that is known."""
    delayed = fp8.DelayedScales([fp8.E4M3, fp8.E5M2])
    delayed.history = delayed.history[:length]
    seen: list[float] = []
    scale = 1.0
    for step in steps:
        assert float(delayed.scale[0]) == pytest.approx(scale, rel=1e-6)
        before = delayed.scale.clone()
        for value in step:
            delayed.record(0, torch.tensor([[value, -value / 2]]))
        assert torch.equal(delayed.scale, before)
        delayed.advance()
        seen.append(max(step, default=0.0))
        largest = max(seen[-length:])
        scale = min(448.0 / largest, float(np.finfo(np.float32).max)) if largest > 0 else scale
        assert float(delayed.scale[1]) == 1.0


def test_delayed_scaling_saturates_what_grows_and_survives_infinities():
    delayed = fp8.DelayedScales([fp8.E4M3])
    delayed.record(0, torch.tensor([[4.0, math.nan]]))
    delayed.advance()
    assert float(delayed.scale[0]) == 112.0
    made = fp8.round_with_scale(torch.tensor([[4.0, 9.0, -9.0, math.nan]]), fp8.E4M3, delayed.scale[0])
    assert made.codes.float().tolist()[0][:3] == [448.0, 448.0, -448.0] and made.codes.float()[0, 3].isnan()
    delayed.record(0, torch.tensor([[math.inf]]))
    delayed.advance()
    assert float(delayed.scale[0]) == 112.0


@pytest.mark.parametrize("rule", ["float", "power_of_two"])
def test_products_against_scaled_mm(rule):
    """torch's own FP8 product on CPU, a scale for each tensor and for each row."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(32, 64, generator=generator) * 3
    b = torch.randn(48, 64, generator=generator) * 0.02
    for dtype in (fp8.E4M3, fp8.E5M2):
        for block in (None, (1, 64)):
            x, w = fp8.round_blocks(a, dtype, block, rule), fp8.round_blocks(b, fp8.E4M3, block, rule)
            ours = x.numbers() @ w.numbers().t()
            shaped = (x.scale_inv.view(()), w.scale_inv.view(())) if block is None else (x.scale_inv, w.scale_inv.t())
            theirs = torch._scaled_mm(x.codes, w.codes.t(), *shaped, out_dtype=torch.float32)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_matrix_without_rows():
    for rule, block in (("float", None), ("power_of_two", (1, 128)), ("power_of_two", (128, 1)), ("e8m0", (32, 1))):
        assert fp8.round_blocks(torch.zeros(0, 6), fp8.E4M3, block, rule).numbers().shape == (0, 6)
