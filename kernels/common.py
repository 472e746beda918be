"""Parts that several kernel files share: facts about the device, launch constants, wide types and device functions.

Triton looks up a global of a jitted function in the module that defines the function. Device functions are therefore
jitted here, their constants are tl.constexpr, and other files import the functions alone.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The most bytes of a row that one program holds at a time: 16 warps x 32 threads x 8 lanes (columns) of 4 bytes.
ROW_BYTES = 16384
# The widest load of a thread.
VECTOR_BYTES = 16
# Short rows share a program, up to this many elements: 8 for each thread of 4 warps, a 16-byte load of 16-bit numbers.
LEAST_ELEMENTS = 1024
# The number of neighbouring lanes that a thread holds, and that a warp holds.
GROUP = 8
WARP_LANES = 32 * GROUP

# A GmP or weight-norm layer of up to this many samples makes its weight inside the product. For more samples, the
# vendor's matmul should be faster: its multiplications then take much longer than reading the weight from memory.
FUSED_ROWS = 64
# A tile of 32 units x 64 columns has 16 elements for each thread of 4 warps. With more, the computation of the sine and
# of the recurrence would spill registers.
TILE_UNITS = 32
TILE_ROW_BYTES = 256
MOST_STAGES = 3
# A step of a program waits for its loads, then for its own arithmetic. Four programs on a multiprocessor do so at
# different times.
PROGRAMS_PER_PROCESSOR = 4
# A program with fewer steps would take longer to start than to work on its columns.
LEAST_STEPS = 4
# A program counts its part of the columns in 32 bits, because 64 bits would take registers that the tile needs.
MOST_COLUMNS = 2**30
# Units per program of a kernel that adds partial results. These sums are short, so many small programs are best.
REDUCE_UNITS = 16

_LOG2_E = tl.constexpr(1.4426950408889634)
# ln(2) in two parts. In `_exponential`, n times the first part is exact for every n that occurs.
_LN_2_HIGH_32, _LN_2_LOW_32 = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)
_LN_2_HIGH_64, _LN_2_LOW_64 = tl.constexpr(6.93147180369123816490e-01), tl.constexpr(1.90821492927058770002e-10)
# Adding 1.5 * 2^(bits of the mantissa) to a number rounds it to an integer, which the low bits of the sum then hold.
_ROUND_SHIFT_32, _ROUND_SHIFT_64 = tl.constexpr(12582912.0), tl.constexpr(6755399441055744.0)


class Device(NamedTuple):
    """The facts on which the choice of tile and stages depends."""

    processors: int
    shared_memory: int  # bytes that a block may have
    matrix_units: bool  # whether matrix units multiply float32 without rounding it: AMD's do, NVIDIA's do not


@functools.cache
def device_facts(device: torch.device) -> Device:
    if device.type != "cuda":
        # Triton's interpreter runs the programs one after another in Python, so there should be few.
        return Device(1, 1 << 20, False)
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return Device(properties["multiprocessor_count"], properties["max_shared_mem"], torch.version.hip is not None)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of numbers of ``dtype``: float64 for float64, and float32 for the others."""
    return torch.promote_types(dtype, torch.float32)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def row_multiple(itemsize: int, *lengths: int) -> int:
    """The largest power of two that divides all ``lengths``, up to the elements of a 16-byte load.

    Kernels take a row's length as a count of such multiples. Of a whole length, the compiler would only know whether 16
    divides it, and would load rows of 1,000 16-bit numbers one by one.
    """
    return math.gcd(VECTOR_BYTES // itemsize, *lengths)


def choose_row_launch(length: int, itemsize: int, most_lanes: int | None = None) -> dict:
    """Tile and warps, with 8 lanes per thread. A program takes one row, or several short rows."""
    lanes = min(triton.next_power_of_2(length), most_lanes or ROW_BYTES // max(itemsize, 4))
    lanes = max(lanes, GROUP)
    rows = LEAST_ELEMENTS // lanes if lanes < WARP_LANES else 1
    return {"ROWS": rows, "LANES": lanes, "num_warps": rows * lanes // WARP_LANES}


def choose_fused_launch(rows: int, units: int, features: int, itemsize: int, device: Device) -> dict:
    """Tile, warps, stages and parts of the columns for a product that makes its own GmP or weight-norm weight."""
    multiplies_add = itemsize == 4 and not device.matrix_units
    # Tensor cores take 16 samples at a time, so fewer samples are padded to 16. With multiply-adds, 4 samples are
    # enough, and more padding would only take time.
    block_m = max(4 if multiplies_add else 16, triton.next_power_of_2(rows))
    block_k = TILE_ROW_BYTES // max(itemsize, 4)
    blocks = triton.cdiv(units, TILE_UNITS)
    splits = max(1, min(PROGRAMS_PER_PROCESSOR * device.processors // blocks, features // (LEAST_STEPS * block_k)))
    chunk = min(triton.cdiv(triton.cdiv(features, splits), block_k) * block_k, MOST_COLUMNS)
    # Whether a program's sums would leave 4 warps too few registers for the rest of a step. In 16 bits they would if
    # rows are not aligned, because then each element has an address and a mask.
    is_aligned = row_multiple(itemsize, features) * itemsize == VECTOR_BYTES
    is_crowded = block_m >= 32 if itemsize >= 4 else block_m >= 64 and not is_aligned
    return {
        "chunk": chunk,
        "BLOCK_M": block_m,
        "BLOCK_N": TILE_UNITS,
        "BLOCK_K": block_k,
        "STAGES": MOST_STAGES,
        "splits": triton.cdiv(features, chunk),
        "num_warps": 8 if is_crowded else 4,
    }


@triton.constexpr_function
def computed_in(element):
    """The type in which numbers of type ``element`` are computed."""
    return tl.float64 if element == tl.float64 else tl.float32


@triton.jit
def polynomial(z, coefficients: tl.constexpr):
    """The polynomial at z, by Horner's scheme. ``coefficients`` begin with the highest power."""
    value = tl.full(z.shape, coefficients[0], z.dtype)
    for power in tl.static_range(1, len(coefficients.value)):
        value = value * z + coefficients[power]
    return value


@triton.jit
def is_permutation(permutation, inverse, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """For each unit i, whether permutation[inverse[i]] is i.

    ``inverse`` comes from ``argsort``, so its indices are valid even if ``permutation`` is not a permutation.
    """
    unit = tl.arange(0, BLOCK_N)
    present = unit < WIDTH
    back = tl.load(permutation + tl.load(inverse + unit, mask=present, other=0), mask=present, other=0)
    return (back == unit) | (unit >= WIDTH)


@triton.jit
def activate(a, ACTIVATION: tl.constexpr):
    """The recurrence's activation, act(a)."""
    # Up to this limit, exp(x) and exp(-x) are normal numbers. tanh(x / 2) rounds to 1 long before it.
    limit: tl.constexpr = 708.0 if a.dtype == tl.float64 else 87.0
    if ACTIVATION == "tanh":
        twice = 2 * tl.abs(a)
        power, fraction = _exponential(tl.where(twice > limit, limit, twice))
        e = power * fraction + (power - 1)
        y = e / (e + 2)
        return tl.where(a < 0, -y, y)
    elif ACTIVATION == "sigmoid":
        # Computed from exp(-|a|), which decays.
        magnitude = tl.abs(a)
        power, fraction = _exponential(-tl.where(magnitude > limit, limit, magnitude))
        e = power * fraction + power
        return tl.where(a < 0, e, tl.full((), 1, a.dtype)) / (1 + e)
    elif ACTIVATION == "relu":
        return tl.where(a < 0, 0.0, a)
    else:
        return a


@triton.jit
def activation_slope(y, ACTIVATION: tl.constexpr):
    """act'(a) from y = act(a)."""
    if ACTIVATION == "tanh":
        return 1 - y * y
    elif ACTIVATION == "sigmoid":
        return y * (1 - y)
    elif ACTIVATION == "relu":
        return tl.where(y > 0, tl.full((), 1, y.dtype), tl.full((), 0, y.dtype))
    else:
        return tl.full(y.shape, 1, y.dtype)


@triton.jit
def _exponential(x):
    """(power, fraction) of exp(x) = power + power * fraction: power = 2^n, fraction = expm1(r), x = n ln(2) + r."""
    if x.dtype == tl.float64:
        shift = tl.full((), _ROUND_SHIFT_64, x.dtype)
        shifted = x * tl.full((), _LOG2_E, x.dtype) + shift
        n = shifted - shift
        r = (x - n * tl.full((), _LN_2_HIGH_64, x.dtype)) - n * tl.full((), _LN_2_LOW_64, x.dtype)
        # The shift to the left drops the bits that come from _ROUND_SHIFT_64.
        power = ((shifted.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
        return power, r * _expm1_series(r, 13)
    else:
        shift = tl.full((), _ROUND_SHIFT_32, x.dtype)
        shifted = x * tl.full((), _LOG2_E, x.dtype) + shift
        n = shifted - shift
        r = (x - n * tl.full((), _LN_2_HIGH_32, x.dtype)) - n * tl.full((), _LN_2_LOW_32, x.dtype)
        power = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
        return power, r * _expm1_series(r, 7)


@triton.jit
def _expm1_series(r, DEGREE: tl.constexpr):
    """expm1(r) / r for |r| <= ln(2) / 2, by Taylor's series. The omitted terms are below the result's last place."""
    series = tl.full(r.shape, 1, r.dtype)
    for k in tl.static_range(DEGREE, 1, -1):
        series = 1 + series * (r * tl.full((), 1 / k, r.dtype))
    return series
