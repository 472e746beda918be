"""Linearly constrained weights (LCW: rows w of zero sum), and a layer that reads its parameter once, in Triton.

    centred:  w = v - mean(v)                  basis:  w = B v:  w_j = v_j - S / (s (s+1)) for j < m,  w_m = -S / s
    linear:   y = x V^T - q(x) S^T + b;  q(x) = mean(x) or, with a basis, sum_{j<m} x_j / (s (s+1)) + x_m / s
    T. Kutsuna, ECML PKDD 2019, arXiv 2403.13833; B is Householder's; s = sqrt(m).
    V is the parameter, of n rows v, and S are the sums of its rows. x has M rows (samples) of m columns; with a basis,
    x V^T leaves out the last of them. The notation is that of lcw_ops/reference.

Cost of the weight kernels per element: 2 * itemsize bytes and 4 operations, so they are bound by memory. A row longer
than BLOCK lanes is read twice, the second time from the second-level cache.

Cost of the linear kernel: it reads V once from memory, itemsize * n m bytes. It reads x once for every block of units,
from the second-level cache: at most as many bytes. The product takes 2 M n m operations. In float32 and
float64 every element of V takes one more for its row sum, and one to be centred; in 16 bits the tensor cores sum. For
32 x 4096 x 4096 in bfloat16, a step of 128 columns takes 162 instructions a warp and 512 cycles of shared memory,
counted in the sm_90 code: 9.1 us in all, where memory takes 7.8 us. An H200 reads 4.3 TB/s, or 2.2 T
16-bit elements a second. At M = 64, multiplying at that rate takes 0.28 Pflop/s, so the kernel is bound by memory. In
float32 the H200 reads 1.1 T elements and does 33 T multiply-adds a second, so the kernel is bound by memory up to about
M = 24. If there are too few units to fill the multiprocessors, the columns are split among programs, and a second
kernel adds their sums in order, without atomics. These bounds are predicted, not measured: no GPU has run this yet.

Alignment. A load of a thread takes up to 16 bytes, if every row starts at a multiple of these: 8 numbers of 16 bits, so
rows of 1,000 are aligned. With a basis, rows of V are one number shorter than those of x, so one of both is odd. In 16
bits their elements would be loaded one by one and not ahead of their use, because asynchronous copies have at least 4
bytes: 64 steps of 0.8 us of latency each, about 60 us for 32 x 4096 x 4096. Instead, the units of a program are STARTS
apart (8 if rows are odd), so that their rows start at the same place within 16 bytes. The program reads them from the
next multiple of 16 bytes on, and takes the up to 7 columns before it, and behind the last whole vector, in one product
of their own. x has to begin at the same column, so a small kernel makes STARTS copies of it, each shifted by as much:
2.1 MB of 16-bit numbers, written to and read from the second-level cache, and 0.6 us of instructions. A step of 128
columns then takes 153 instructions a warp, with 8 loads of 16 bytes for each thread (counted, sm_90): 11 us in all, of
which the copies take 2 us. Copying V to aligned rows would read and write it once more, and take 23 us in all.
In float32 a step of 32 columns takes 217 instructions a warp at M = 8, and 323 if rows are odd (255 and 342 at M = 32,
with twice as many warps). At M = 8, the instructions take 15 us (22 us) for 4096 x 4096, and memory takes 16 us.

Rounding if means are large. <v, x> - q S is a difference of sums that grow with mean(x) mean(v). In exact arithmetic,
the difference does not change if a constant is subtracted from a row of x or V, and q and S are those of the new row.
(With a basis, a constant in V does not cancel; the kernel adds its part at the end.)
From 16-bit numbers, no constant is subtracted. Their products are exact in float32, and so is nearly every bit of the
sums: the cancellation costs an error of 2^-24 |x| |v|. Eager torch rounds the centred weight to 16 bits and so has an
error of 2^-9 |x| |v| in bfloat16 (2^-12 in float16) before anything cancels. Moreover, x minus a constant would no
longer fit the 16 bits of a tensor core's operand.
In float32 and float64, eager torch's own rounding is as fine as ours. Centring V alone would leave mean(x) in every
product, and centring x alone would leave mean(v). Therefore both are centred. A small kernel computes the means of x
first: the linear kernel would know them only at the end, and M rows are little to read in comparison with V. A row of V
is centred by the mean of its first columns. That mean may be rough: if the sum of x is zero, any constant in v cancels,
and the rest of v has the size of its spread, not of its mean.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcw_ops.kernels.common import (
    LEAST_ELEMENTS,
    LEAST_STEPS,
    MOST_COLUMNS,
    REDUCE_UNITS,
    ROW_BYTES,
    VECTOR_BYTES,
    Device,
    computed_in,
    contiguous,
    device_facts,
    row_multiple,
    wide_dtype,
)

# Bytes of a row of V that one step takes: two cache lines for aligned rows of 16-bit numbers, and otherwise one, the
# unit in which memory is fetched. Two would take too many registers: for the operands in float32 and float64, and for
# an address and a mask per element if 16-bit rows are not aligned.
TILE_ROW_BYTES, TILE_ROW_BYTES_16_BIT = 128, 256
# 32 units of 256 bytes and four steps in flight are 32 KB per multiprocessor, enough to cover a latency of 0.8 us.
LEAST_UNITS = 32
MOST_STAGES = 4
# How many of the first columns of V give the mean that is subtracted from a row. The mean of 64 columns differs from
# the row's mean by about 1/8 of the row's spread.
_CENTRE_COLUMNS = tl.constexpr(64)
_VECTOR_BYTES = tl.constexpr(VECTOR_BYTES)
# Loads of single 16-bit numbers are not asynchronous, so every step waits for its own, about 0.8 us. A kernel that
# shifts x takes about as long as this many steps (predicted). Loads of two numbers are asynchronous, but with 64
# samples there are so many that registers spill.
MOST_SINGLE_STEPS = 4
# Rows of the shifted copies of x have a multiple of this many columns, and a program makes this many of them.
SHIFT_GROUP, SHIFT_COLUMNS = 16, 1024
# Up to 7 16-bit numbers before a row's first 16 bytes, and as many behind its last ones: the depth of a tl.dot.
_EDGE = tl.constexpr(16)


def lcw_weight(weight: Tensor, basis: bool) -> Tensor:
    """Rows v (n, m, *k) -> v - mean(v); with ``basis``, v (n, m - 1) -> B v (n, m). Does not check its arguments."""
    return _map_rows(weight, "embed" if basis else "centre", 1 if basis else 0)


def lcw_weight_backward(grad_output: Tensor, basis: bool) -> Tensor:
    """The adjoint: rows g -> g - mean(g); with ``basis``, g (n, m) -> B^T g (n, m - 1). Does not check arguments."""
    return _map_rows(grad_output, "project" if basis else "centre", -1 if basis else 0)


def lcw_linear(x: Tensor, weight: Tensor, bias: Tensor | None, basis: bool) -> Tensor:
    """x (M, m) -> x @ lcw_weight(weight, basis).T + bias, (M, n). Does not check its arguments.

    One tile holds all samples, so there should be few of them: lcw_ops/ops/lcw_linear.py says how many.
    """
    rows, features = x.shape
    units, columns = weight.shape
    output = x.new_empty((rows, units))
    if rows * units * columns == 0:
        # Without features the weight is empty, and with a basis of one feature it is 0.
        return output.zero_() if bias is None else output.copy_(bias)
    x, weight = x.contiguous(), weight.contiguous()
    multiple = _common_multiple(x, weight)
    launch = choose_launch(rows, units, columns, multiple, x.itemsize, device_facts(x.device))
    splits, num_warps = launch.pop("splits"), launch.pop("num_warps")
    inner, outer = _projection(features, basis)
    shared = {
        "x": x,
        "weight": weight,
        "bias": contiguous(bias),
        "means": _means(x) if x.itemsize >= 4 else None,
        "output": output,
        "rows": rows,
        "units": units,
        "columns": columns // multiple,
        "features": features // multiple,
        "inner": inner,
        "outer": outer,
        "MULTIPLE": multiple,
        "BASIS": basis,
        "BLOCK_M": launch["BLOCK_M"],
    }
    dtype = wide_dtype(x.dtype)
    partial = splits > 1
    shared["products"] = x.new_empty((splits, units, rows), dtype=dtype) if partial else None
    shared["weight_sums"] = x.new_empty((splits, units), dtype=dtype) if partial else None
    shared["x_sums"] = x.new_empty((splits, rows), dtype=dtype) if partial else None
    starts = launch["STARTS"]
    grid = (triton.cdiv(units, launch["BLOCK_N"] * max(starts, 1)) * max(starts, 1), splits)
    # Triton launches on the current device, not on the tensor's.
    with torch.cuda.device_of(x):
        shifted = _shift(x, weight, starts) if starts else None
        lcw_linear_kernel[grid](
            shifted=shifted, stride=shifted.shape[2] if starts else 0, **shared | launch, num_warps=num_warps
        )
        if partial:
            reduce_grid = (triton.cdiv(units, REDUCE_UNITS),)
            lcw_linear_reduce_kernel[reduce_grid](**shared, splits=splits, BLOCK_N=REDUCE_UNITS, num_warps=4)
    return output


def choose_launch(rows: int, units: int, columns: int, multiple: int, itemsize: int, device: Device) -> dict:
    """Tile, warps, stages and the parts into which the columns are split.

    ``multiple`` is the largest power of two up to 16 bytes of which every row of x and V starts at a multiple, in
    elements.
    """
    if itemsize == 2 and multiple < 4:
        launch = _choose_tile(rows, units, columns, TILE_ROW_BYTES, itemsize, device, 1)
        if launch["chunk"] <= MOST_SINGLE_STEPS * launch["BLOCK_K"]:
            return launch | {"STARTS": 0}
        starts = VECTOR_BYTES // itemsize // math.gcd(columns, VECTOR_BYTES // itemsize)
        launch = _choose_tile(rows, units, columns, TILE_ROW_BYTES_16_BIT, itemsize, device, starts)
        return launch | {"STARTS": starts}
    row_bytes = TILE_ROW_BYTES_16_BIT if itemsize == 2 else TILE_ROW_BYTES
    return _choose_tile(rows, units, columns, row_bytes, itemsize, device, 1) | {"STARTS": 0}


def _choose_tile(
    rows: int, units: int, columns: int, row_bytes: int, itemsize: int, device: Device, starts: int
) -> dict:
    multiplies_add = itemsize == 4 and not device.matrix_units
    # Tensor cores take 16 samples at a time, so fewer samples are padded to 16. With multiply-adds, 4 samples are
    # enough, and more padding would only take time.
    block_m = max(4 if multiplies_add else 16, triton.next_power_of_2(rows))
    # At least BLOCK_M units, so that no more bytes of x are read than of V.
    block_n = max(LEAST_UNITS, block_m)
    block_k = row_bytes // itemsize
    stages = MOST_STAGES
    # Besides the stages, shared memory holds one more copy of a step's tiles, for their exchange between threads.
    while stages > 2 and (stages + 1) * (block_n + block_m) * row_bytes > device.shared_memory:
        stages -= 1
    # 8 warps if a program's sums, BLOCK_M x BLOCK_N, would fill the registers of 4 warps. For 16-bit numbers 4 are
    # enough, unless each element has an address and a mask.
    num_warps = 8 if block_m >= 32 and (itemsize >= 4 or row_bytes == TILE_ROW_BYTES) else 4
    if device.matrix_units and itemsize >= 4:
        # AMD's scalar registers hold a mask for every element of a thread.
        num_warps = 8 if block_m < 64 else 16
    blocks = triton.cdiv(units, block_n * starts) * starts
    # Multiply-adds wait for their operands: two programs on a multiprocessor wait at different times.
    programs = device.processors * (2 if multiplies_add else 1)
    splits = max(1, min(programs // blocks, columns // (LEAST_STEPS * block_k)))
    chunk = min(triton.cdiv(triton.cdiv(columns, splits), block_k) * block_k, MOST_COLUMNS)
    return {
        "chunk": chunk,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        # An instruction of NVIDIA's tensor cores has 8 columns, and one of AMD's has 16.
        "SUM_COLUMNS": 16 if device.matrix_units else 8,
        "STAGES": stages,
        "splits": triton.cdiv(columns, chunk),
        "num_warps": num_warps,
    }


def _common_multiple(x: Tensor, weight: Tensor) -> int:
    """See `choose_launch`. Triton tells addresses that are multiples of 16 bytes from all others."""
    if (x.data_ptr() | weight.data_ptr()) % VECTOR_BYTES:
        return 1
    return row_multiple(x.itemsize, x.shape[1], weight.shape[1])


def _shift(x: Tensor, weight: Tensor, starts: int) -> Tensor:
    """Copies of x, (starts, M, columns rounded up), each without the columns before a row's first 16 bytes of V."""
    (rows, features), columns = x.shape, weight.shape[1]
    shifted = x.new_empty((starts, rows, triton.cdiv(columns, SHIFT_GROUP) * SHIFT_GROUP))
    grid = (triton.cdiv(columns, SHIFT_COLUMNS), rows, starts)
    stride = shifted.shape[2]
    lcw_shift_kernel[grid](x, weight, shifted, rows, columns, features, stride, BLOCK=SHIFT_COLUMNS, num_warps=4)
    return shifted


def _map_rows(tensor: Tensor, kind: str, grow: int) -> Tensor:
    tensor = tensor.contiguous()
    count = tensor.shape[0]
    length = math.prod(tensor.shape[1:])
    output = tensor.new_empty((count, length + grow) if grow else tensor.shape)
    if output.numel() == 0:
        return output
    if length == 0:
        # For one feature, B has no columns, and the weight is 0.
        return output.zero_()
    inner, outer = _projection(max(length, length + grow), bool(grow))
    launch = _row_launch(length, tensor.itemsize)
    multiple = row_multiple(tensor.itemsize, length)
    grid = (triton.cdiv(count, launch["ROWS"]),)
    with torch.cuda.device_of(tensor):
        lcw_rows_kernel[grid](
            tensor, output, count, length // multiple, inner, outer, KIND=kind, MULTIPLE=multiple, **launch
        )
    return output


def _means(x: Tensor) -> Tensor:
    means = x.new_empty(x.shape[0])
    launch = _row_launch(x.shape[1], x.itemsize)
    multiple = row_multiple(x.itemsize, x.shape[1])
    with torch.cuda.device_of(x):
        lcw_means_kernel[(triton.cdiv(x.shape[0], launch["ROWS"]),)](
            x, means, x.shape[0], x.shape[1] // multiple, 1 / x.shape[1], MULTIPLE=multiple, **launch
        )
    return means


def _row_launch(length: int, itemsize: int) -> dict:
    lanes = min(triton.next_power_of_2(length), ROW_BYTES // max(itemsize, 4))
    rows = max(1, LEAST_ELEMENTS // lanes)
    return {"ROWS": rows, "BLOCK": lanes, "FITS": length <= lanes, "num_warps": 8 if lanes > LEAST_ELEMENTS else 4}


def _projection(features: int, basis: bool) -> tuple[float, float]:
    """(inner, outer) of q(x) = inner * sum(x) + outer * x_m. With ``basis``, the sum leaves out x_m."""
    s = math.sqrt(features)
    return (1 / (s * (s + 1)), 1 / s) if basis else (1 / features, 0.0)


@triton.jit(do_not_specialize=["count", "length"])
def lcw_rows_kernel(
    rows,
    output,
    count: tl.int64,
    length: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    KIND: tl.constexpr,
    MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FITS: tl.constexpr,
):
    """Maps ROWS rows: sums each row, then subtracts a number from all its elements. ``KIND`` is the map.

    A row has ``length`` * MULTIPLE elements.
    """
    length = length * MULTIPLE
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    present = row < count
    values, centre, remainder = _row_sums(rows + row * length, lane, present, length, BLOCK, FITS)
    dtype: tl.constexpr = values.dtype
    inner = tl.full((), inner, dtype)
    outer = tl.full((), outer, dtype)
    # sum(row) = length * centre + remainder. The large part, centre, is subtracted exactly; then rest, the small part.
    # ``kept`` lanes of a row are stored; ``stride`` is the length of a row of the output.
    kept = length - 1 if KIND == "project" else length
    stride = length + 1 if KIND == "embed" else kept
    output += row * stride
    if KIND == "centre":
        rest = remainder * inner
    elif KIND == "embed":
        # sum / (s (s+1)) = centre - centre / s + remainder / (s (s+1)), for s^2 = length + 1.
        rest = remainder * inner - centre * outer
        last = -(centre * length + remainder) * outer
        tl.store(output + length, last.to(output.dtype.element_ty), mask=present)
    else:
        # B^T maps a constant row to 0, so it maps the centred row to the same result.
        last = tl.load(rows + row * length + kept, mask=present, other=0.0).to(dtype) - centre
        rest = (remainder - last) * inner + last * outer
    _store_shifted(output, values, centre, rest, lane, present, kept)
    if not FITS:
        for start in range(BLOCK, length, BLOCK):
            inside = present & (start + lane < length)
            values = tl.load(rows + row * length + (start + lane), mask=inside, other=0.0).to(dtype)
            _store_shifted(output, values, centre, rest, start + lane, present, kept)


@triton.jit
def _store_shifted(output, values, centre, rest, lane, present, kept):
    shifted = (values - centre) - rest
    tl.store(output + lane, shifted.to(output.dtype.element_ty), mask=present & (lane < kept))


@triton.jit(do_not_specialize=["count", "length"])
def lcw_means_kernel(
    rows,
    means,
    count: tl.int64,
    length: tl.int64,
    inverse_length: tl.float64,
    MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FITS: tl.constexpr,
):
    length = length * MULTIPLE
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    present = row < count
    values, centre, remainder = _row_sums(rows + row * length, lane, present, length, BLOCK, FITS)
    mean = centre + remainder * tl.full((), inverse_length, values.dtype)
    tl.store(means + row, mean, mask=present)


@triton.jit
def _row_sums(row, lane, present, length, BLOCK: tl.constexpr, FITS: tl.constexpr):
    """(the first BLOCK values, their mean, the sum of the row's differences from that mean), the last two as columns.

    The mean of a part of the row is good enough: it has to be near the row's numbers only if these are near each other.
    Only the upper half of its bits is used. With bits below the last places of the row's numbers, all differences would
    be rounded in the same direction, and the error would grow with their count.
    """
    dtype: tl.constexpr = computed_in(row.dtype.element_ty)
    inside = present & (lane < length)
    values = tl.load(row + lane, mask=inside, other=0.0).to(dtype)
    centre = _upper_half(tl.sum(values, 1, keep_dims=True) / min(length, BLOCK))
    excess = tl.where(inside, values - centre, 0.0)
    if not FITS:
        for start in range(BLOCK, length, BLOCK):
            inside = present & (start + lane < length)
            more = tl.load(row + (start + lane), mask=inside, other=0.0).to(dtype)
            excess += tl.where(inside, more - centre, 0.0)
    return values, centre, tl.sum(excess, 1, keep_dims=True)


@triton.jit
def _upper_half(value):
    if value.dtype == tl.float64:
        return (value.to(tl.int64, bitcast=True) >> 26 << 26).to(tl.float64, bitcast=True)
    else:
        return (value.to(tl.int32, bitcast=True) >> 12 << 12).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "columns", "features"])
def lcw_shift_kernel(
    x,
    weight,
    shifted,
    rows: tl.int64,
    columns: tl.int64,
    features: tl.int64,
    stride: tl.int64,
    BLOCK: tl.constexpr,
):
    """shifted[start, row, k] = x[row, head + k], for the head of the units ``start``, ``start`` + STARTS, ..."""
    start = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    head = _head(weight, start, columns)
    values = tl.load(x + row * features + head + column, mask=head + column < columns, other=0.0)
    tl.store(shifted + (start * rows + row) * stride + column, values, mask=column < stride)


@triton.jit
def _head(weight, unit, columns):
    """How many elements of a row of V precede the first one at a multiple of 16 bytes."""
    SIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    address = weight.to(tl.int64) + unit * columns * SIZE
    next_vector = (address + (_VECTOR_BYTES - 1)) // _VECTOR_BYTES * _VECTOR_BYTES
    return min((next_vector - address) // SIZE, columns)


@triton.jit
def _whole_vectors(weight, unit, columns, head, first):
    """The address of column ``head`` + ``first`` in each row of V. It is a multiple of 16 bytes."""
    SIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    address = weight.to(tl.int64)
    base = (address // _VECTOR_BYTES * _VECTOR_BYTES).to(weight.dtype)
    # The hint has to stand at the last addition: the compiler joins additions and forgets hints in between.
    at = base + (address % _VECTOR_BYTES // SIZE + unit * columns + head + first)
    return tl.multiple_of(at, [_VECTOR_BYTES, _VECTOR_BYTES])


@triton.jit(do_not_specialize=["rows", "units", "columns", "features"])
def lcw_linear_kernel(
    x,
    shifted,
    weight,
    bias,
    means,
    output,
    products,
    weight_sums,
    x_sums,
    rows: tl.int64,
    units: tl.int64,
    columns: tl.int64,
    features: tl.int64,
    stride: tl.int64,
    chunk: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    MULTIPLE: tl.constexpr,
    BASIS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    STARTS: tl.constexpr,
):
    """Multiplies BLOCK_N units by all samples, over ``chunk`` columns.

    Units, not samples, are the rows of the product, because the instruction wgmma takes 64 rows. ``columns`` and
    ``features`` count MULTIPLE elements each. With STARTS, the units of a program are STARTS apart, so that their rows
    start at the same place within 16 bytes.
    """
    dtype: tl.constexpr = computed_in(weight.dtype.element_ty)
    columns, features = columns * MULTIPLE, features * MULTIPLE
    if STARTS == 0:
        unit = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    else:
        start = tl.program_id(0).to(tl.int64) % STARTS
        unit = start + (tl.program_id(0).to(tl.int64) // STARTS * BLOCK_N + tl.arange(0, BLOCK_N)) * STARTS
    sample = tl.arange(0, BLOCK_M)
    unit_present, sample_present = (unit < units)[:, None], (sample < rows)[:, None]
    if means is not None:
        mean = tl.load(means + sample[:, None], mask=sample_present, other=0.0)
        centre = _first_mean(weight + unit[:, None] * columns, unit_present, columns)
    first = tl.program_id(1) * chunk
    lane = tl.arange(0, BLOCK_K)[None, :]
    if STARTS == 0:
        weight_rows = weight + first + unit[:, None] * columns
        x_rows = x + first + sample.to(tl.int64)[:, None] * features
        length = columns
    else:
        # Whole vectors of 16 bytes, between ``head`` and fewer than a vector of columns behind them.
        VECTOR: tl.constexpr = _VECTOR_BYTES // (weight.dtype.element_ty.primitive_bitwidth // 8)
        head = _head(weight, start, columns)
        length = (columns - head) // VECTOR * VECTOR
        weight_rows = _whole_vectors(weight, unit[:, None], columns, head, first)
        x_rows = shifted + first + (start * rows + sample.to(tl.int64)[:, None]) * stride
        # The columns before and behind these vectors. The loop hides the latency of these loads.
        side = tl.arange(0, _EDGE)[None, :]
        before = side < _EDGE // 2
        edge = tl.where(before, side, head + length + (side - _EDGE // 2))
        present = (first == 0) & tl.where(before, side < head, edge < columns)
        w_edge = tl.load(weight + unit[:, None] * columns + edge, mask=unit_present & present, other=0.0)
        x_edge = tl.load(x + sample.to(tl.int64)[:, None] * features + edge, mask=sample_present & present, other=0.0)
    count = min(chunk, length - first).to(tl.int32)
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype)
    if means is None:
        # The sums of 16-bit rows are products with ones. If tl.sum read the tiles too, the compiler would lay them out
        # in shared memory for that sum, and the tensor cores would read them with bank conflicts.
        ones = tl.full((BLOCK_K, SUM_COLUMNS), 1.0, dtype).to(weight.dtype.element_ty)
        weight_sum = tl.zeros((BLOCK_N, SUM_COLUMNS), dtype)
        x_sum = tl.zeros((BLOCK_M, SUM_COLUMNS), dtype)
    elif BLOCK_M < 64:
        # Each lane has a sum of its own, so that threads exchange sums only once, behind the loop.
        weight_sum = tl.zeros((BLOCK_N, BLOCK_K), dtype)
        x_sum = tl.zeros((BLOCK_M, BLOCK_K), dtype)
    else:
        # With so many samples, the registers of the lanes' sums would spill.
        weight_sum = tl.zeros((BLOCK_N,), dtype)
        x_sum = tl.zeros((BLOCK_M,), dtype)
    for start_column in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        column = start_column + lane
        w_inside, x_inside = unit_present & (column < count), sample_present & (column < count)
        w_tile = tl.load(weight_rows + column, mask=w_inside, other=0.0)
        x_tile = tl.load(x_rows + column, mask=x_inside, other=0.0)
        if means is not None:
            w_tile = tl.where(w_inside, w_tile - centre, 0.0)
            x_tile = tl.where(x_inside, x_tile - mean, 0.0)
        product = tl.dot(w_tile, tl.trans(x_tile), product, input_precision="ieee", out_dtype=dtype)
        if means is None:
            weight_sum = tl.dot(w_tile, ones, weight_sum, out_dtype=dtype)
            x_sum = tl.dot(x_tile, ones, x_sum, out_dtype=dtype)
        elif BLOCK_M < 64:
            weight_sum += w_tile
            x_sum += x_tile
        else:
            weight_sum += tl.sum(w_tile, 1)
            x_sum += tl.sum(x_tile, 1)
    if STARTS != 0:
        edge_ones = tl.full((_EDGE, SUM_COLUMNS), 1.0, dtype).to(weight.dtype.element_ty)
        product = tl.dot(w_edge, tl.trans(x_edge), product, out_dtype=dtype)
        weight_sum = tl.dot(w_edge, edge_ones, weight_sum, out_dtype=dtype)
        x_sum = tl.dot(x_edge, edge_ones, x_sum, out_dtype=dtype)
    if means is None:
        # All columns are equal.
        weight_sum, x_sum = tl.max(weight_sum, 1), tl.max(x_sum, 1)
    elif BLOCK_M < 64:
        weight_sum, x_sum = tl.sum(weight_sum, 1), tl.sum(x_sum, 1)
    if products is None:
        _store_output(
            product,
            weight_sum,
            x_sum,
            x,
            weight,
            bias,
            means,
            output,
            unit,
            sample,
            rows,
            units,
            columns,
            features,
            inner,
            outer,
            BASIS,
        )
    else:
        split = tl.program_id(1).to(tl.int64)
        at = products + (split * units + unit[:, None]) * rows + sample[None, :]
        tl.store(at, product, mask=unit_present & (sample < rows)[None, :])
        tl.store(weight_sums + split * units + unit, weight_sum, mask=unit < units)
        # Every block of units has the same sums of x, so only one block writes them.
        tl.store(x_sums + split * rows + sample, x_sum, mask=(sample < rows) & (tl.program_id(0) == 0))


@triton.jit(do_not_specialize=["rows", "units", "columns", "features", "splits"])
def lcw_linear_reduce_kernel(
    x,
    weight,
    bias,
    means,
    output,
    products,
    weight_sums,
    x_sums,
    rows: tl.int64,
    units: tl.int64,
    columns: tl.int64,
    features: tl.int64,
    splits: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    MULTIPLE: tl.constexpr,
    BASIS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the partial sums over the columns, in order."""
    dtype: tl.constexpr = products.dtype.element_ty
    columns, features = columns * MULTIPLE, features * MULTIPLE
    unit = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.arange(0, BLOCK_M)
    unit_present, sample_present = unit < units, sample < rows
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype)
    weight_sum = tl.zeros((BLOCK_N,), dtype)
    x_sum = tl.zeros((BLOCK_M,), dtype)
    at = unit[:, None] * rows + sample[None, :]
    inside = unit_present[:, None] & sample_present[None, :]
    for _ in range(0, splits):
        product += tl.load(products + at, mask=inside, other=0.0)
        weight_sum += tl.load(weight_sums + unit, mask=unit_present, other=0.0)
        x_sum += tl.load(x_sums + sample, mask=sample_present, other=0.0)
        products += units * rows
        weight_sums += units
        x_sums += rows
    _store_output(
        product,
        weight_sum,
        x_sum,
        x,
        weight,
        bias,
        means,
        output,
        unit,
        sample,
        rows,
        units,
        columns,
        features,
        inner,
        outer,
        BASIS,
    )


@triton.jit
def _store_output(
    product,
    weight_sum,
    x_sum,
    x,
    weight,
    bias,
    means,
    output,
    unit,
    sample,
    rows,
    units,
    columns,
    features,
    inner,
    outer,
    BASIS: tl.constexpr,
):
    """Stores y, with the constraint and the bias, from sums over all columns."""
    dtype: tl.constexpr = product.dtype
    inner = tl.full((), inner, dtype)
    outer = tl.full((), outer, dtype)
    unit_present, sample_present = unit < units, sample < rows
    q = x_sum * inner
    if BASIS:
        at = x + sample.to(tl.int64) * features + columns
        last = tl.load(at, mask=sample_present, other=0.0).to(dtype)
        if means is not None:
            last -= tl.load(means + sample, mask=sample_present, other=0.0)
        q += last * outer
    y = product - weight_sum[:, None] * q[None, :]
    if BASIS and means is not None:
        # The constant that was subtracted from V does not cancel here, because the sum of B^T x is not 0. Add its part.
        centre = _first_mean(weight + unit[:, None] * columns, unit_present[:, None], columns)
        y += centre * (outer * (x_sum - columns * last))[None, :]
    if bias is not None:
        y += tl.load(bias + unit, mask=unit_present, other=0.0).to(dtype)[:, None]
    at = output + sample.to(tl.int64)[None, :] * units + unit[:, None]
    tl.store(at, y.to(output.dtype.element_ty), mask=unit_present[:, None] & sample_present[None, :])


@triton.jit
def _first_mean(weight_rows, present, columns):
    """The mean of each row's first columns, as a column. Every program that needs it gets the same numbers."""
    lane = tl.arange(0, _CENTRE_COLUMNS)[None, :]
    first = tl.load(weight_rows + lane, mask=present & (lane < columns), other=0.0)
    return tl.sum(first, 1, keep_dims=True) / min(columns, _CENTRE_COLUMNS)
