"""Weight normalization: rows of a given norm, and a linear layer of such rows, in Triton.

    normalised:  w = s v / ||v||        ds = <G, v / ||v||>,  dv = s (G - ds v / ||v||) / ||v||
    layer:       y = x w^T + b
    T. Salimans, D. P. Kingma, NeurIPS 2016, arXiv 1602.07868. v is a row of the parameter, s its scale, and G the
    gradient of w. x has M rows (samples) of m features; there are n units.

Norms: a row is divided by a power of 2 near its largest element, so that no square overflows or underflows.

Cost of normalising: 2 passes over a row. The second reads registers if the row fits a program, and otherwise the
second-level cache. Both are bound by memory: 2 * itemsize bytes per element, 3 * itemsize backward.

Cost of a layer of M <= FUSED_ROWS samples: the rows are read once, and the product's loop, of 2 M n m operations, sums
their squares too. The division by the norm comes last. If there are too few units to fill the multiprocessors, the
columns are split among programs, and a second kernel adds the partial sums in order, without atomics.
A layer of more samples takes one normalising pass and torch's matmul. No GPU has run this yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcw_ops.kernels.common import (
    FUSED_ROWS,
    REDUCE_UNITS,
    choose_fused_launch,
    choose_row_launch,
    computed_in,
    contiguous,
    device_facts,
    row_multiple,
    wide_dtype,
)


def normalize_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """(n, m), (n,) -> scale * weight / ||weight||, (n, m). Does not check its arguments."""
    units, features = weight.shape
    output = weight.new_empty((units, features))
    if output.numel() == 0:
        return output
    weight = weight.contiguous()
    launch = choose_row_launch(features, weight.itemsize)
    multiple = row_multiple(weight.itemsize, features)
    # Triton launches on the current device, not on the tensor's.
    with torch.cuda.device_of(weight):
        normalize_kernel[(triton.cdiv(units, launch["ROWS"]),)](
            weight,
            scale.contiguous(),
            output,
            units,
            features // multiple,
            MULTIPLE=multiple,
            FITS=features <= launch["LANES"],
            **launch,
        )
    return output


def normalize_scale_backward(grad_output: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight (n, m) and scale (n,). Does not check its arguments."""
    units, features = weight.shape
    grad_weight, grad_scale = weight.new_empty((units, features)), scale.new_empty((units,))
    if units == 0:
        return grad_weight, grad_scale
    if features == 0:
        return grad_weight, grad_scale.zero_()
    grad_output, weight, scale = grad_output.contiguous(), weight.contiguous(), scale.contiguous()
    launch = choose_row_launch(features, weight.itemsize)
    multiple = row_multiple(weight.itemsize, features)
    with torch.cuda.device_of(weight):
        normalize_backward_kernel[(triton.cdiv(units, launch["ROWS"]),)](
            grad_output,
            weight,
            scale,
            grad_weight,
            grad_scale,
            units,
            features // multiple,
            MULTIPLE=multiple,
            FITS=features <= launch["LANES"],
            **launch,
        )
    return grad_weight, grad_scale


def weight_norm_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, deterministic: bool) -> Tensor:
    """x (M, m) -> x @ normalize_scale(weight, scale).T + bias, (M, n).

    Sums have a fixed order, whatever ``deterministic`` is. Does not check its arguments.
    """
    if x.shape[0] <= FUSED_ROWS:
        return _fused_linear(x, weight, scale, bias)
    return torch.nn.functional.linear(x, normalize_scale(weight, scale), bias)


def weight_norm_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    deterministic: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_scale: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, scale and bias, each (0,) if it is not needed. Does not check its arguments."""
    grad_x, grad_weight, grad_scale, grad_bias = (x.new_empty((0,)) for _ in range(4))
    if needs_x:
        grad_x = grad_output @ normalize_scale(weight, scale)
    if needs_weight or needs_scale:
        weight_and_scale = normalize_scale_backward(grad_output.mT @ x, weight, scale)
        grad_weight = weight_and_scale[0] if needs_weight else grad_weight
        grad_scale = weight_and_scale[1] if needs_scale else grad_scale
    if needs_bias:
        grad_bias = grad_output.sum(0)
    return grad_x, grad_weight, grad_scale, grad_bias


def _fused_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The layer for M <= FUSED_ROWS."""
    rows, features = x.shape
    units = weight.shape[0]
    output = x.new_empty((rows, units))
    if output.numel() == 0:
        return output
    launch = choose_fused_launch(rows, units, features, x.itemsize, device_facts(x.device))
    splits, num_warps = launch.pop("splits"), launch.pop("num_warps")

    def sums(*shape):
        return x.new_empty((splits, *shape), dtype=wide_dtype(x.dtype)) if splits > 1 else None

    shared = {
        "scale": scale.contiguous(),
        "bias": contiguous(bias),
        "output": output,
        "products": sums(units, rows),
        "squares": sums(units),
        "exponents": sums(units),
        "rows": rows,
        "units": units,
        "BLOCK_M": launch["BLOCK_M"],
    }
    x, weight = x.contiguous(), weight.contiguous()
    multiple = row_multiple(x.itemsize, features)
    grid = (triton.cdiv(units, launch["BLOCK_N"]), splits)
    with torch.cuda.device_of(x):
        weight_norm_linear_kernel[grid](
            x=x,
            weight=weight,
            features=features // multiple,
            MULTIPLE=multiple,
            **shared | launch,
            num_warps=num_warps,
        )
        if splits > 1:
            weight_norm_linear_reduce_kernel[(triton.cdiv(units, REDUCE_UNITS),)](
                **shared, splits=splits, BLOCK_N=REDUCE_UNITS, num_warps=4
            )
    return output


@triton.jit(do_not_specialize=["count", "length"])
def normalize_kernel(
    weight,
    scale,
    output,
    count: tl.int64,
    length: tl.int64,
    MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    FITS: tl.constexpr,
):
    """Normalises ROWS rows of ``length`` * MULTIPLE columns per program. Longer rows than LANES are read twice."""
    length = length * MULTIPLE
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    present = row < count
    dtype: tl.constexpr = computed_in(weight.dtype.element_ty)
    weight += row * length
    output += row * length
    exponent = _exponent(tl.zeros((ROWS, 1), dtype))
    square = tl.zeros((ROWS, 1), dtype)
    scaled = tl.zeros((ROWS, LANES), dtype)
    for start in range(0, length, LANES):
        values = tl.load(weight + start + lane, mask=present & (start + lane < length), other=0.0).to(dtype)
        previous, exponent = exponent, tl.maximum(exponent, _exponent(values))
        scaled = values * _power(-exponent, dtype)
        change = _power(previous - exponent, dtype)
        square = square * change * change + tl.sum(scaled * scaled, 1, keep_dims=True)
    root = _root(square)
    reciprocal = _divide(tl.full((ROWS, 1), 1.0, dtype), root)
    factor = tl.load(scale + row, mask=present, other=0.0).to(dtype)
    inverse = _power(-exponent, dtype)
    if FITS:
        result = factor * _divide(scaled, root)
        tl.store(output + lane, result.to(output.dtype.element_ty), mask=present & (lane < length))
    else:
        for start in range(0, length, LANES):
            inside = present & (start + lane < length)
            values = tl.load(weight + start + lane, mask=inside, other=0.0).to(dtype)
            result = factor * (values * inverse * reciprocal)
            tl.store(output + start + lane, result.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "length"])
def normalize_backward_kernel(
    grad_output,
    weight,
    scale,
    grad_weight,
    grad_scale,
    count: tl.int64,
    length: tl.int64,
    MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    FITS: tl.constexpr,
):
    """ds and dv, as at the head of this file, for ROWS rows of ``length`` * MULTIPLE columns per program."""
    length = length * MULTIPLE
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    present = row < count
    dtype: tl.constexpr = computed_in(weight.dtype.element_ty)
    weight += row * length
    grad_output += row * length
    grad_weight += row * length
    exponent = _exponent(tl.zeros((ROWS, 1), dtype))
    square = tl.zeros((ROWS, 1), dtype)
    product = tl.zeros((ROWS, 1), dtype)
    scaled = tl.zeros((ROWS, LANES), dtype)
    gradient = tl.zeros((ROWS, LANES), dtype)
    for start in range(0, length, LANES):
        inside = present & (start + lane < length)
        values = tl.load(weight + start + lane, mask=inside, other=0.0).to(dtype)
        gradient = tl.load(grad_output + start + lane, mask=inside, other=0.0).to(dtype)
        previous, exponent = exponent, tl.maximum(exponent, _exponent(values))
        scaled = values * _power(-exponent, dtype)
        change = _power(previous - exponent, dtype)
        square = square * change * change + tl.sum(scaled * scaled, 1, keep_dims=True)
        product = product * change + tl.sum(scaled * gradient, 1, keep_dims=True)
    root = _root(square)
    reciprocal = _divide(tl.full((ROWS, 1), 1.0, dtype), root)
    if FITS:
        # A row with a single element has the direction 1 or -1, without rounding, so its gradient is exactly 0.
        direction = _divide(scaled, root)
        product = tl.sum(direction * gradient, 1, keep_dims=True)
    else:
        product = product * reciprocal
    tl.store(grad_scale + row, product.to(grad_scale.dtype.element_ty), mask=present)
    inverse = _power(-exponent, dtype)
    factor = tl.load(scale + row, mask=present, other=0.0).to(dtype) * reciprocal
    if FITS:
        result = (gradient - direction * product) * factor * inverse
        tl.store(grad_weight + lane, result.to(grad_weight.dtype.element_ty), mask=present & (lane < length))
    else:
        for start in range(0, length, LANES):
            inside = present & (start + lane < length)
            values = tl.load(weight + start + lane, mask=inside, other=0.0).to(dtype)
            gradient = tl.load(grad_output + start + lane, mask=inside, other=0.0).to(dtype)
            result = (gradient - values * inverse * reciprocal * product) * factor * inverse
            tl.store(grad_weight + start + lane, result.to(grad_weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "units", "features"])
def weight_norm_linear_kernel(
    x,
    weight,
    scale,
    bias,
    output,
    products,
    squares,
    exponents,
    rows: tl.int64,
    units: tl.int64,
    features: tl.int64,
    chunk: tl.int64,
    MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiplies BLOCK_N units by all samples, over ``chunk`` features.

    The product is scaled by 2^-exponent, and the row's sum of squares by 2^-(2 exponent). ``features`` counts MULTIPLE
    elements each.
    """
    dtype: tl.constexpr = computed_in(weight.dtype.element_ty)
    features = features * MULTIPLE
    unit = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.arange(0, BLOCK_M)
    unit_present, sample_present = (unit < units)[:, None], (sample < rows)[:, None]
    first = tl.program_id(1) * chunk
    count = min(chunk, features - first).to(tl.int32)
    weight_rows = weight + first + unit[:, None] * features
    x_rows = x + first + sample.to(tl.int64)[:, None] * features
    lane = tl.arange(0, BLOCK_K)[None, :]
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype)
    square = tl.full((BLOCK_N, 1), 0.0, dtype)
    exponent = _exponent(tl.zeros((BLOCK_N, 1), dtype))
    for start in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        x_tile = tl.load(x_rows + start + lane, mask=sample_present & (start + lane < count), other=0.0)
        inside = unit_present & (start + lane < count)
        values = tl.load(weight_rows + start + lane, mask=inside, other=0.0).to(dtype)
        previous, exponent = exponent, tl.maximum(exponent, _exponent(values))
        tile = values * _power(-exponent, dtype)
        change = _power(previous - exponent, dtype)
        square = square * change * change + tl.sum(tile * tile, 1, keep_dims=True)
        product = product * change
        tile = tile.to(x_tile.dtype)
        product = tl.dot(tile, tl.trans(x_tile), product, input_precision="ieee", out_dtype=dtype)
    inside = unit_present & (sample < rows)[None, :]
    if products is None:
        _store_output(product, square, scale, bias, output, unit[:, None], sample[None, :], inside, units)
    else:
        split = tl.program_id(1).to(tl.int64)
        tl.store(products + (split * units + unit[:, None]) * rows + sample[None, :], product, mask=inside)
        at = split * units + unit[:, None]
        tl.store(squares + at, square, mask=unit_present)
        tl.store(exponents + at, exponent.to(dtype), mask=unit_present)


@triton.jit(do_not_specialize=["rows", "units", "splits"])
def weight_norm_linear_reduce_kernel(
    scale,
    bias,
    output,
    products,
    squares,
    exponents,
    rows: tl.int64,
    units: tl.int64,
    splits: tl.int64,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the partial sums over the features, in order. Each addition rescales both terms to the larger exponent."""
    dtype: tl.constexpr = products.dtype.element_ty
    unit = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    sample = tl.arange(0, BLOCK_M)[None, :]
    unit_present = unit < units
    inside = unit_present & (sample < rows)
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype)
    square = tl.full((BLOCK_N, 1), 0.0, dtype)
    exponent = _exponent(tl.zeros((BLOCK_N, 1), dtype))
    for _ in range(0, splits):
        part = tl.load(products + unit * rows + sample, mask=inside, other=0.0)
        part_square = tl.load(squares + unit, mask=unit_present, other=0.0)
        part_exponent = tl.load(exponents + unit, mask=unit_present, other=0.0).to(tl.int32)
        previous, exponent = exponent, tl.maximum(exponent, part_exponent)
        change, part_change = _power(previous - exponent, dtype), _power(part_exponent - exponent, dtype)
        product = product * change + part * part_change
        square = square * change * change + part_square * part_change * part_change
        exponents += units
        products += units * rows
        squares += units
    _store_output(product, square, scale, bias, output, unit, sample, inside, units)


@triton.jit
def _store_output(product, square, scale, bias, output, unit, sample, inside, units):
    """Stores scale * product / norm + bias."""
    dtype: tl.constexpr = product.dtype
    product = product / _root(square)
    present = unit < units
    factor = tl.load(scale + unit, mask=present, other=0.0).to(dtype)
    if bias is not None:
        shift = tl.load(bias + unit, mask=present, other=0.0).to(dtype)
    at = sample.to(tl.int64) * units + unit
    result = product * factor
    if bias is not None:
        result += shift
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _exponent(values):
    """Each row's e: its largest |value| is 2^e f, 1 <= f < 2. e is clamped so that 2^e and 2^-e are normal numbers."""
    if values.dtype == tl.float64:
        bits = tl.max((values.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF) >> 52, 1, keep_dims=True)
        return tl.minimum(tl.maximum(bits, 1), 2045).to(tl.int32) - 1023
    else:
        bits = tl.max((values.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 23, 1, keep_dims=True)
        return tl.minimum(tl.maximum(bits, 1), 253) - 127


@triton.jit
def _power(exponent, dtype: tl.constexpr):
    """2^exponent; 0 if that would be below the smallest normal number."""
    if dtype == tl.float64:
        return (tl.maximum(exponent + 1023, 0).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    else:
        return (tl.maximum(exponent + 127, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _divide(a, b):
    """a / b, correctly rounded. Triton's own float32 division is approximate on CUDA."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _root(square):
    """A scaled row's norm. Infinity replaces 0, so that quotients are 0, and NaN replaces infinity."""
    root = tl.sqrt(square) if square.dtype == tl.float64 else tl.sqrt_rn(square)
    root = tl.where(root == float("inf"), float("nan"), root)
    return tl.where(root == 0.0, float("inf"), root)
