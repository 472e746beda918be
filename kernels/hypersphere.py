"""Weights on the hypersphere: directions of angles, normalised rows, and linear layers of both, in Triton.

    direction:   u_k = P_k cos t_k (k < m),  u_m = P_m,  P_k = prod_{i<k} sin t_i
    backward:    T_m = g_m,  T_k = cos t_k g_k + sin t_k T_{k+1},  dL/dt_k = P_k (cos t_k T_{k+1} - sin t_k g_k)
    normalised:  w = s v / ||v||        ds = <g, v / ||v||>,  dv = s (g - ds v / ||v||) / ||v||
    layers:      y = r act(x u^T + lambda),   y = x w^T + b
    W. Chen, H. Ge, NeurIPS 2024, arXiv 2305.15912, the division-free backward is lcw_ops' own; T. Salimans, D. P.
    Kingma, 2016. Notation of lcw_ops/reference.

Cost of the direction: 2 itemsize bytes an element; about 25 instructions for sine and cosine, and a running product by
associative scan over one number per 8 columns, so that threads exchange little: 56 instructions an element in all.
4096 x 4096 float32 on an H200: 31 us of memory beside 32 us of instructions. Backward: 3 itemsize bytes, angles of long
rows twice (the second time from the second-level cache), 85 instructions: 47 us beside 48 us; at 69 registers and 16
warps a multiprocessor holds one program, which hides less. Normalising: 2 passes, bound by memory.

Cost of a layer of M <= FUSED_ROWS samples: angles once, directions in registers alone; 2 M n m operations of the
product. M = 32, 4096 x 4096 float32: 32 us of instructions beside 16 us of memory, 8 in 16 bits. Few units leave
multiprocessors idle: then the columns are split among programs, each as if the products began with it, and a second
kernel adds the parts in order, times the products before them; no atomics. Larger M: one direction pass, torch's matmul
with the location, and a pass over its result for ReLU and scale, of 2 or 3 itemsize bytes an output: torch's matmul has
no place for a scale behind the ReLU. All of it predicted from compiled code, not measured: no GPU has run this yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcw_ops.kernels.gradient_activation import _polynomial
from lcw_ops.kernels.orthogonal_filter import AOT_DEVICES, Device, _device

# Samples up to which directions are made inside the product. The vendor's matmul, which should win from there on, wants
# them in memory; what it reads of them is little beside its multiplications.
FUSED_ROWS = 64

# Lanes of a row that one program holds, in bytes of the accumulator: 16 warps x 32 threads x 8 lanes of 4 bytes.
ROW_BYTES = 16384
# Lanes of a warp. Rows of fewer share a program of 4 warps.
WARP_LANES = 256
LEAST_ELEMENTS = 1024
# Warps that hide each other's latency on a multiprocessor.
WARPS_PER_PROCESSOR = 16
# Neighbours of which a thread makes one number before threads exchange any.
GROUP = 8
_GROUP = tl.constexpr(GROUP)

# 32 units x 64 columns are 16 elements a thread of 4 warps. The sine and the recurrence of more would spill.
TILE_UNITS = 32
TILE_ROW_BYTES = 256
MOST_STAGES = 3
# A step waits for its loads, then for its own arithmetic: four programs on a multiprocessor do so at different times.
PROGRAMS_PER_PROCESSOR = 4
# A program with fewer steps than these would spend more on starting than on its columns.
LEAST_STEPS = 4
# A part of the columns is counted in 32 bits: 64 would take the registers that the tile needs.
MOST_COLUMNS = 2**30
# Units per program of the kernel that adds parts: its sums are short, what counts is that there are many programs.
REDUCE_UNITS = 16
# Elements per program of what is done to every output: 8 per thread of 4 warps.
POINTWISE_ELEMENTS = 1024
# Rows that a program sums in the gradients of radius and location, before there are enough programs.
LEAST_SUMMED_ROWS = 64

# pi/2 in parts whose products with up to 2^9 quarter turns (float64: 2^20) are exact, and the rest.
_QUARTER_32 = tl.constexpr((1.57073974609375, 5.657970905303955e-05, 9.920935184482005e-10))
_QUARTER_64 = tl.constexpr((1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21))
# pi/2 in three float64s, for fused multiply-adds.
_QUARTER_FULL = tl.constexpr((1.5707963267948966, 6.123233995736766e-17, -1.4973849048591698e-33))
_QUARTERS_PER_RADIAN = tl.constexpr(0.6366197723675814)
_MOST_FAST_32 = tl.constexpr(800.0)
_MOST_FAST_64 = tl.constexpr(1.6e6)
# Neighbouring floats of this size are whole turns apart.
_MOST_ANGLE = tl.constexpr(2.0**52)
# Added to a float and taken off again, they leave the nearest integer; its last bits are those of the sum.
_ROUND_32 = tl.constexpr(1.5 * 2.0**23)
_ROUND_64 = tl.constexpr(1.5 * 2.0**52)

# Chebyshev interpolation of q, highest power first, for z = r^2 in [0, (pi/4)^2]:
#   sin(r) = r + r z q(z), cos(r) = 1 - z / 2 + z^2 q(z).
_SINE_32 = tl.constexpr((-0.000195873871, 0.00833274594, -0.166666647))
_COSINE_32 = tl.constexpr((2.45474372e-5, -0.00138883007, 0.0416666646))
# fmt: off
_SINE_64 = tl.constexpr((
    1.5917848524808261e-10, -2.5051127944014188e-8, 2.7557316083816359e-6, -0.00019841269836722418,
    0.0083333333333309246, -0.16666666666666665,
))
_COSINE_64 = tl.constexpr((
    -1.1382456778061306e-11, 2.0876143827993132e-9, -2.7557317260008838e-7, 2.4801587298743069e-5,
    -0.0013888888888887382, 0.041666666666666665,
))
# fmt: on


def hypersphere_direction(angles: Tensor) -> Tensor:
    """(n, m-1) -> unit rows (n, m). Nothing is checked here."""
    units, columns = angles.shape
    output = angles.new_empty((units, columns + 1))
    if units == 0:
        return output
    if columns == 0:
        return output.fill_(1.0)
    angles = angles.contiguous()
    launch = _direction_launch(units, columns + 1, angles.itemsize, _device(angles.device))
    # Triton launches on the current device, not on the tensor's.
    with torch.cuda.device_of(angles):
        direction_kernel[(triton.cdiv(units, launch["ROWS"]),)](angles, output, units, columns, **launch)
    return output


def hypersphere_direction_backward(grad_direction: Tensor, angles: Tensor) -> Tensor:
    """The gradient of the angles, (n, m-1). Nothing is checked here."""
    units, columns = angles.shape
    output = angles.new_empty((units, columns))
    if output.numel() == 0:
        return output
    grad_direction, angles = grad_direction.contiguous(), angles.contiguous()
    launch = _row_launch(columns + 1, angles.itemsize)
    blocks = triton.next_power_of_2(triton.cdiv(columns + 1, launch["LANES"]))
    with torch.cuda.device_of(angles):
        direction_backward_kernel[(triton.cdiv(units, launch["ROWS"]),)](
            grad_direction, angles, output, units, columns, BLOCKS=blocks, **launch
        )
    return output


def normalize_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """(n, m), (n,) -> scale * weight / ||weight||. Nothing is checked here."""
    units, features = weight.shape
    output = weight.new_empty((units, features))
    if output.numel() == 0:
        return output
    weight = weight.contiguous()
    launch = _row_launch(features, weight.itemsize)
    with torch.cuda.device_of(weight):
        normalize_kernel[(triton.cdiv(units, launch["ROWS"]),)](
            weight, scale.contiguous(), output, units, features, FITS=features <= launch["LANES"], **launch
        )
    return output


def normalize_scale_backward(grad_output: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight (n, m) and scale (n,). Nothing is checked here."""
    units, features = weight.shape
    grad_weight, grad_scale = weight.new_empty((units, features)), scale.new_empty((units,))
    if units == 0:
        return grad_weight, grad_scale
    if features == 0:
        return grad_weight, grad_scale.zero_()
    grad_output, weight, scale = grad_output.contiguous(), weight.contiguous(), scale.contiguous()
    launch = _row_launch(features, weight.itemsize)
    fits = features <= launch["LANES"]
    with torch.cuda.device_of(weight):
        normalize_backward_kernel[(triton.cdiv(units, launch["ROWS"]),)](
            grad_output, weight, scale, grad_weight, grad_scale, units, features, FITS=fits, **launch
        )
    return grad_weight, grad_scale


def gmp_linear(
    x: Tensor,
    angles: Tensor,
    radius: Tensor,
    location: Tensor,
    relu: bool,
    deterministic: bool,
    keep_activated: bool,
    keep_direction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, m) -> (radius * act(x u^T + location) (M, n), act(..) or (0,), u (n, m) or (0,)).

    Nothing is checked here. Sums are in a fixed order, ``deterministic`` or not.
    """
    if x.shape[0] <= FUSED_ROWS:
        direction = hypersphere_direction(angles) if keep_direction else x.new_empty((0,))
        return *_fused_linear(x, angles, radius, location, True, relu, keep_activated), direction
    direction = hypersphere_direction(angles)
    pre_activation = torch.addmm(location, x, direction.mT)
    output, activated = _scale(pre_activation, radius, relu, keep_activated)
    return output, activated, direction if keep_direction else x.new_empty((0,))


def gmp_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    angles: Tensor,
    radius: Tensor,
    activated: Tensor,
    direction: Tensor,
    relu: bool,
    deterministic: bool,
    needs_x: bool,
    needs_angles: bool,
    needs_radius: bool,
    needs_location: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, angles, radius and location, (0,) where not needed. Nothing is checked here.

    ``activated`` is needed for relu and for the radius; ``direction`` is made anew if it is empty.
    """
    grad_pre, grad_radius, grad_location = _sum_gradients(
        grad_output,
        activated if relu or needs_radius else None,
        radius,
        relu,
        needs_x or needs_angles,
        needs_radius,
        needs_location,
    )
    grad_x, grad_angles = x.new_empty((0,)), x.new_empty((0,))
    if needs_x:
        # An empty direction is one that was not kept, or that of no units.
        grad_x = grad_pre @ (direction if direction.numel() > 0 else hypersphere_direction(angles))
    if needs_angles:
        grad_angles = hypersphere_direction_backward(grad_pre.mT @ x, angles)
    return grad_x, grad_angles, grad_radius, grad_location


def weight_norm_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, deterministic: bool) -> Tensor:
    """x (M, m) -> x @ normalize_scale(weight, scale).T + bias, (M, n).

    Nothing is checked here. Sums are in a fixed order, ``deterministic`` or not.
    """
    if x.shape[0] <= FUSED_ROWS:
        return _fused_linear(x, weight, scale, bias, False, False, False)[0]
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
    """The gradients of x, weight, scale and bias, (0,) where not needed. Nothing is checked here."""
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


def choose_launch(rows: int, units: int, features: int, itemsize: int, device: Device) -> dict:
    """Tile, warps, stages and the parts that the columns are split into."""
    multiplies_add = itemsize == 4 and not device.matrix_units
    # Tensor cores take 16 samples at once or pad to them; plain multiply-adds would carry out the padding.
    block_m = max(4 if multiplies_add else 16, triton.next_power_of_2(rows))
    block_k = TILE_ROW_BYTES // max(itemsize, 4)
    blocks = triton.cdiv(units, TILE_UNITS)
    splits = max(1, min(PROGRAMS_PER_PROCESSOR * device.processors // blocks, features // (LEAST_STEPS * block_k)))
    chunk = min(triton.cdiv(triton.cdiv(features, splits), block_k) * block_k, MOST_COLUMNS)
    return {
        "chunk": chunk,
        "BLOCK_M": block_m,
        "BLOCK_N": TILE_UNITS,
        "BLOCK_K": block_k,
        "STAGES": MOST_STAGES,
        "splits": triton.cdiv(features, chunk),
        # 8 where a program's sums would not leave 4 the registers for the recurrence.
        "num_warps": 8 if itemsize >= 4 and block_m >= 32 else 4,
    }


def _row_launch(length: int, itemsize: int, most_lanes: int | None = None) -> dict:
    """8 lanes a thread; one program for a row, or for some short ones."""
    lanes = min(triton.next_power_of_2(length), most_lanes or ROW_BYTES // max(itemsize, 4))
    lanes = max(lanes, GROUP)
    rows = LEAST_ELEMENTS // lanes if lanes < WARP_LANES else 1
    return {"ROWS": rows, "LANES": lanes, "num_warps": rows * lanes // WARP_LANES}


def _direction_launch(units: int, length: int, itemsize: int, device: Device) -> dict:
    """A warp for every row, which then waits for no other; more where there are few rows."""
    lanes, most = WARP_LANES, ROW_BYTES // max(itemsize, 4)
    while lanes < most and units * lanes < WARPS_PER_PROCESSOR * device.processors * WARP_LANES:
        lanes *= 2
    return _row_launch(length, itemsize, lanes)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _fused_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, is_angles: bool, relu: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """Either layer, M <= 64: (output, what the scale multiplied or (0,)). ``weight``: angles, or rows to normalise."""
    rows, features = x.shape
    units, columns = weight.shape
    output = x.new_empty((rows, units))
    kept = x.new_empty(output.shape) if keep else x.new_empty((0,))
    if output.numel() == 0:
        return output, kept
    x, weight, scale, bias = x.contiguous(), weight.contiguous(), scale.contiguous(), _contiguous(bias)
    launch = choose_launch(rows, units, features, x.itemsize, _device(x.device))
    splits, num_warps = launch.pop("splits"), launch.pop("num_warps")
    partial = splits > 1

    def sums(*shape):
        return x.new_empty((splits, *shape), dtype=_wide(x.dtype)) if partial else None

    shared = {
        "scale": scale,
        "bias": bias,
        "output": output,
        "kept": kept if keep else None,
        "products": sums(units, rows),
        "states": sums(units),
        "exponents": None if is_angles else sums(units),
        "rows": rows,
        "units": units,
        "IS_ANGLES": is_angles,
        "RELU": relu,
        "BLOCK_M": launch["BLOCK_M"],
    }
    grid = (triton.cdiv(units, launch["BLOCK_N"]), splits)
    with torch.cuda.device_of(x):
        hypersphere_linear_kernel[grid](
            x=x, weight=weight, columns=columns, features=features, **shared | launch, num_warps=num_warps
        )
        if partial:
            hypersphere_linear_reduce_kernel[(triton.cdiv(units, REDUCE_UNITS),)](
                **shared, splits=splits, BLOCK_N=REDUCE_UNITS, num_warps=4
            )
    return output, kept


def _scale(product: Tensor, scale: Tensor, relu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """(scale * act(product), act(product) or (0,)); overwrites ``product``."""
    rows, units = product.shape
    output = torch.empty_like(product) if keep else product
    if output.numel() > 0:
        launch = _pointwise_launch(units)
        grid = (triton.cdiv(rows, launch["BLOCK_M"]), triton.cdiv(units, launch["BLOCK_N"]))
        activated = product if keep and relu else None
        with torch.cuda.device_of(product):
            scale_kernel[grid](
                product,
                scale.contiguous(),
                output,
                activated,
                rows,
                units,
                RELU=relu,
                **launch,
                num_warps=4,
            )
    return output, product if keep else product.new_empty((0,))


def _sum_gradients(
    grad_output: Tensor,
    activated: Tensor | None,
    radius: Tensor,
    relu: bool,
    needs_pre: bool,
    needs_radius: bool,
    needs_location: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(radius * grad_output where it is active, (M, n); the sums over samples of grad_output * activated and of it).

    Each (0,) where not needed.
    """
    rows, units = grad_output.shape
    grad_pre = grad_output.new_empty((rows, units) if needs_pre else (0,))
    grad_radius = grad_output.new_empty((units if needs_radius else 0,))
    grad_location = grad_output.new_empty((units if needs_location else 0,))
    if units == 0 or not (needs_pre or needs_radius or needs_location):
        return grad_pre, grad_radius, grad_location
    launch = _pointwise_launch(min(units, 64))
    blocks = triton.cdiv(units, launch["BLOCK_N"])
    splits = max(1, min(_device(grad_output.device).processors * 4 // blocks, rows // LEAST_SUMMED_ROWS))
    chunk = triton.cdiv(triton.cdiv(rows, splits), launch["BLOCK_M"]) * launch["BLOCK_M"]
    splits = max(1, triton.cdiv(rows, chunk)) if rows else 1

    def sums(gradient):
        return gradient if splits == 1 else gradient.new_empty((splits, units), dtype=_wide(gradient.dtype))

    radius_sums = sums(grad_radius) if needs_radius else None
    location_sums = sums(grad_location) if needs_location else None
    with torch.cuda.device_of(grad_output):
        sum_gradients_kernel[(blocks, splits)](
            grad_output.contiguous(),
            _contiguous(activated),
            radius.contiguous(),
            grad_pre if needs_pre else None,
            radius_sums,
            location_sums,
            rows,
            units,
            chunk,
            RELU=relu,
            **launch,
            num_warps=4,
        )
    if splits > 1:
        # In order: torch's sum of a dimension, too, gives the same bits every time.
        grad_radius = radius_sums.sum(0).to(grad_radius.dtype) if needs_radius else grad_radius
        grad_location = location_sums.sum(0).to(grad_location.dtype) if needs_location else grad_location
    return grad_pre, grad_radius, grad_location


def _pointwise_launch(units: int) -> dict:
    block_n = min(triton.next_power_of_2(units), POINTWISE_ELEMENTS)
    return {"BLOCK_M": POINTWISE_ELEMENTS // block_n, "BLOCK_N": block_n}


@triton.jit(do_not_specialize=["count"])
def direction_kernel(angles, output, count: tl.int64, columns: tl.int64, ROWS: tl.constexpr, LANES: tl.constexpr):
    """ROWS rows, LANES columns a step; the product of the sines so far is carried along."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    present = row < count
    dtype: tl.constexpr = tl.float64 if angles.dtype.element_ty == tl.float64 else tl.float32
    angles += row * columns
    output += row * (columns + 1)
    carry = tl.full((), 1.0, dtype) if ROWS == 1 else tl.full((ROWS, 1), 1.0, dtype)
    for start in range(0, columns + 1, LANES):
        # Within a step 32 bits are enough to count.
        left = tl.cast(min(columns - start, LANES), tl.int32)
        sine, cosine = _load_sine_cosine(angles + start, present, left, ROWS, LANES)
        prefix, carry = _prefix_products(sine, carry, ROWS, LANES)
        tl.store(output + start + lane, (prefix * cosine).to(output.dtype.element_ty), mask=present & (lane <= left))


@triton.jit(do_not_specialize=["count"])
def direction_backward_kernel(
    grad_direction,
    angles,
    grad_angles,
    count: tl.int64,
    columns: tl.int64,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """ROWS rows, from their last columns to the first. Of longer rows, first the products of sines up to every step."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    present = row < count
    dtype: tl.constexpr = tl.float64 if angles.dtype.element_ty == tl.float64 else tl.float32
    angles += row * columns
    grad_angles += row * columns
    grad_direction += row * (columns + 1)
    if BLOCKS == 1:
        one, zero = tl.full((ROWS, 1), 1.0, dtype), tl.zeros((ROWS, 1), dtype)
        _backward_step(grad_direction, angles, grad_angles, one, zero, present, columns, ROWS, LANES)
    else:
        last = columns // LANES
        block = tl.arange(0, BLOCKS)[None, :]
        prefix = tl.full((ROWS, 1), 1.0, dtype)
        prefixes = tl.full((ROWS, BLOCKS), 1.0, dtype)
        for step in range(0, last):
            sine, _ = _load_sine_cosine(angles + tl.cast(step, tl.int64) * LANES, present, LANES, ROWS, LANES)
            prefix *= tl.reduce(sine, 1, _multiply, keep_dims=True)
            prefixes = tl.where(block == step + 1, prefix, prefixes)
        suffix = tl.zeros((ROWS, 1), dtype)
        for step in range(0, last + 1):
            start = (last - step) * LANES
            prefix = tl.sum(tl.where(block == last - step, prefixes, 0.0), 1, keep_dims=True)
            suffix = _backward_step(
                grad_direction + start,
                angles + start,
                grad_angles + start,
                prefix,
                suffix,
                present,
                columns - start,
                ROWS,
                LANES,
            )


@triton.jit
def _backward_step(
    grad_direction,
    angles,
    grad_angles,
    prefix,
    suffix,
    present,
    columns,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """dL/dt_k = P_k (c_k T_{k+1} - s_k g_k) of LANES columns. Returns T of the first."""
    lane = tl.arange(0, LANES)[None, :]
    left = tl.cast(min(columns, LANES), tl.int32)
    sine, cosine = _load_sine_cosine(angles, present, left, ROWS, LANES)
    gradient = _load_groups(grad_direction, present, left + 1, ROWS, LANES)
    prefix, following, suffix = _recurrence(sine, cosine * gradient, prefix, suffix, ROWS, LANES)
    result = prefix * (cosine * following - sine * gradient)
    tl.store(grad_angles + lane, result.to(grad_angles.dtype.element_ty), mask=present & (lane < left))
    return suffix


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _load_sine_cosine(row, present, count, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Of ``count`` angles, or LANES if it is less. Beyond them both are 1: a direction's last component is the product
    of all sines.
    """
    sine, cosine = _sine_cosine(_load_groups(row, present, count, ROWS, LANES))
    return tl.where(tl.arange(0, LANES)[None, :] < count, sine, 1.0), cosine


@triton.jit
def _load_groups(row, present, count, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The first ``count`` of LANES numbers, then zeros. A thread reads 8 neighbours one by one: rows of m - 1 numbers
    are aligned to nothing, and a recurrence within a thread needs no exchange.
    """
    dtype: tl.constexpr = tl.float64 if row.dtype.element_ty == tl.float64 else tl.float32
    first = _GROUP * tl.arange(0, LANES // _GROUP)[None, :]
    tiles = ()
    for i in tl.static_range(_GROUP):
        tiles += (tl.load(row + first + i, mask=present & (first < count - i), other=0.0).to(dtype),)
    return _join_groups(tiles, ROWS, LANES)


@triton.jit
def _sine_cosine(t):
    """Of a tile. One reduction to r in [-pi/4, pi/4] for both, t = r + quarter * pi/2.

    libdevice's functions make two, and keep a table for large angles on the stack.
    """
    most: tl.constexpr = _MOST_FAST_64 if t.dtype == tl.float64 else _MOST_FAST_32
    turned = tl.zeros(t.shape, tl.int32)
    if tl.max(tl.abs(t)) > most:
        # Of large angles alone: no angle's digits depend on its neighbours.
        is_large = tl.abs(t) > most
        reduced, turned = _reduce_large(t)
        t, turned = tl.where(is_large, reduced, t), tl.where(is_large, turned, 0)
    if t.dtype == tl.float64:
        rounded = t * _QUARTERS_PER_RADIAN + _ROUND_64
        quarter = rounded.to(tl.int64, bitcast=True).to(tl.int32) + turned
        turns = rounded - _ROUND_64
        r = ((t - turns * _QUARTER_64[0]) - turns * _QUARTER_64[1]) - turns * _QUARTER_64[2]
    else:
        rounded = t * _QUARTERS_PER_RADIAN + _ROUND_32
        quarter = rounded.to(tl.int32, bitcast=True) + turned
        turns = rounded - _ROUND_32
        r = ((t - turns * _QUARTER_32[0]) - turns * _QUARTER_32[1]) - turns * _QUARTER_32[2]
    z = r * r
    if t.dtype == tl.float64:
        sine, cosine = _polynomial(z, _SINE_64), _polynomial(z, _COSINE_64)
    else:
        sine, cosine = _polynomial(z, _SINE_32), _polynomial(z, _COSINE_32)
    sine = r + (r * z) * sine
    cosine = 1.0 + z * (z * cosine - 0.5)
    swapped = (quarter & 1) != 0
    first, second = tl.where(swapped, cosine, sine), tl.where(swapped, sine, cosine)
    return tl.where((quarter & 2) != 0, -first, first), tl.where(((quarter + 1) & 2) != 0, -second, second)


@triton.jit
def _reduce_large(t):
    """(r, quarter) of any angle below 2^52 in float64; NaN of others, whose last place is worth whole turns."""
    wide = t.to(tl.float64)
    turns = tl.floor(wide * _QUARTERS_PER_RADIAN + 0.5)
    r = tl.fma(turns, tl.full(t.shape, -_QUARTER_FULL[0], tl.float64), wide)
    r = tl.fma(turns, tl.full(t.shape, -_QUARTER_FULL[1], tl.float64), r)
    r = tl.fma(turns, tl.full(t.shape, -_QUARTER_FULL[2], tl.float64), r)
    r = tl.where(tl.abs(wide) < _MOST_ANGLE, r, float("nan"))
    quarter = turns - 4.0 * tl.floor(turns * 0.25)
    return r.to(t.dtype), tl.where(r == r, quarter, 0.0).to(tl.int32)


@triton.jit
def _prefix_products(sine, carry, ROWS: tl.constexpr, LANES: tl.constexpr):
    """(the product of carry and all sines before each lane, that of carry and all sines)."""
    sines = _split_groups(sine, ROWS, LANES)
    prefix, carry = _prefix_of_groups(_product(sines), carry)
    return _join_groups(_running_products(prefix, sines), ROWS, LANES), carry


@triton.jit
def _product(factors):
    product = factors[0]
    for i in tl.static_range(1, _GROUP):
        product = product * factors[i]
    return product


@triton.jit
def _running_products(prefix, factors):
    products = (prefix,)
    for i in tl.static_range(1, _GROUP):
        prefix = prefix * factors[i - 1]
        products += (prefix,)
    return products


@triton.jit
def _prefix_of_groups(product, carry):
    """(the product of carry and all before each group, that of carry and all)."""
    group = tl.arange(0, product.shape[1])[None, :]
    is_first = group == 0
    product = tl.where(is_first, carry * product, product)
    before = tl.where(is_first, carry, 1.0)
    product, before = tl.associative_scan((product, before), 1, _extend_product)
    return before, _sum_rows(tl.where(group == product.shape[1] - 1, product, 0.0))


@triton.jit
def _sum_rows(x):
    """The sum of each row, as a column, or as a scalar where there is one row. A scalar has no layout. Triton 3.6 gives
    a column that a loop carries a layout in which every thread holds the whole row, and then runs every step in it too.
    """
    return tl.sum(x) if x.shape[0] == 1 else tl.sum(x, 1, keep_dims=True)


@triton.jit
def _extend_product(product, before, next_product, next_before):
    """Of two neighbouring parts: their product, and that of all but the last element."""
    return product * next_product, product * next_before


@triton.jit
def _recurrence(sine, term, carry, suffix, ROWS: tl.constexpr, LANES: tl.constexpr):
    """T_k = term_k + s_k T_{k+1}, from ``suffix`` beyond the last lane; and P_k, from ``carry`` before the first.

    Returns (P_k, T_{k+1}, T of the first lane).
    """
    sines, terms = _split_groups(sine, ROWS, LANES), _split_groups(term, ROWS, LANES)
    product = _product(sines)
    prefix, _ = _prefix_of_groups(product, carry)
    term = terms[_GROUP - 1]
    for i in tl.static_range(1, _GROUP):
        term = terms[_GROUP - 1 - i] + sines[_GROUP - 1 - i] * term
    following, suffix = _suffix_of_groups(product, term, suffix)
    suffixes = (following,)
    for i in tl.static_range(1, _GROUP):
        following = terms[_GROUP - i] + sines[_GROUP - i] * following
        suffixes = (following,) + suffixes  # noqa: RUF005 (Triton knows no unpacking)
    prefixes = _running_products(prefix, sines)
    return _join_groups(prefixes, ROWS, LANES), _join_groups(suffixes, ROWS, LANES), suffix


@triton.jit
def _suffix_of_groups(product, term, suffix):
    """(T beyond each group, T of the first lane)."""
    group = tl.arange(0, product.shape[1])[None, :]
    is_last = group == product.shape[1] - 1
    term = tl.where(is_last, term + product * suffix, term)
    following = tl.where(is_last, suffix, 0.0)
    inner = tl.full(product.shape, 1.0, product.dtype)
    _, term, _, following = tl.associative_scan((product, term, inner, following), 1, _extend_suffix, reverse=True)
    return following, tl.sum(tl.where(group == 0, term, 0.0), 1, keep_dims=True)


@triton.jit
def _extend_suffix(product, term, inner, following, next_product, next_term, next_inner, next_following):
    """Of two neighbouring parts, the second before the first. ``following`` is T beyond the foremost group, ``inner``
    the product of all groups behind that one.
    """
    return (
        next_product * product,
        next_term + next_product * term,
        next_inner * product,
        next_following + next_inner * term,
    )


@triton.jit
def _split_groups(x, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The first of every 8 neighbours, the second, .. the eighth."""
    even, odd = tl.split(tl.reshape(x, (ROWS, LANES // _GROUP, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _join_groups(x, ROWS: tl.constexpr, LANES: tl.constexpr):
    even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
    odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
    return tl.reshape(tl.join(even, odd), (ROWS, LANES))


@triton.jit(do_not_specialize=["count"])
def normalize_kernel(
    weight,
    scale,
    output,
    count: tl.int64,
    length: tl.int64,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    FITS: tl.constexpr,
):
    """ROWS rows; what does not fit into LANES columns is read again."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    present = row < count
    dtype: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
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


@triton.jit(do_not_specialize=["count"])
def normalize_backward_kernel(
    grad_output,
    weight,
    scale,
    grad_weight,
    grad_scale,
    count: tl.int64,
    length: tl.int64,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    FITS: tl.constexpr,
):
    """dscale = <G, v>, dweight = scale (G - dscale v) / ||weight||."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    present = row < count
    dtype: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
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
        # A row of one number is a direction without a digit to round: its gradient is exactly 0.
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


@triton.jit
def _exponent(values):
    """e of every row's largest |value| = 2^e f, 1 <= f < 2, kept where 2^e and 2^-e are both normal numbers."""
    if values.dtype == tl.float64:
        bits = tl.max((values.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF) >> 52, 1, keep_dims=True)
        return tl.minimum(tl.maximum(bits, 1), 2045).to(tl.int32) - 1023
    else:
        bits = tl.max((values.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 23, 1, keep_dims=True)
        return tl.minimum(tl.maximum(bits, 1), 253) - 127


@triton.jit
def _power(exponent, dtype: tl.constexpr):
    """2^exponent; 0 for what would be less than the smallest normal number."""
    if dtype == tl.float64:
        return (tl.maximum(exponent + 1023, 0).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    else:
        return (tl.maximum(exponent + 127, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _divide(a, b):
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _root(square):
    """A scaled row's length; infinity if it is zero, so that what is divided by it is; NaN if it is infinite."""
    root = tl.sqrt(square) if square.dtype == tl.float64 else tl.sqrt_rn(square)
    root = tl.where(root == float("inf"), float("nan"), root)
    return tl.where(root == 0.0, float("inf"), root)


@triton.jit(do_not_specialize=["rows", "units"])
def hypersphere_linear_kernel(
    x,
    weight,
    scale,
    bias,
    output,
    kept,
    products,
    states,
    exponents,
    rows: tl.int64,
    units: tl.int64,
    columns: tl.int64,
    features: tl.int64,
    chunk: tl.int64,
    IS_ANGLES: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_N units and ``chunk`` features for all samples.

    The state of a unit is the product of its sines, or the squared length of its row, scaled by 2^-exponent.
    """
    dtype: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    unit = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.arange(0, BLOCK_M)
    unit_present, sample_present = (unit < units)[:, None], (sample < rows)[:, None]
    first = tl.program_id(1) * chunk
    count = min(chunk, features - first).to(tl.int32)
    # The last component of a direction has no angle of its own.
    weight_count = min(chunk, columns - first).to(tl.int32)
    weight_rows = weight + first + unit[:, None] * columns
    x_rows = x + first + sample.to(tl.int64)[:, None] * features
    lane = tl.arange(0, BLOCK_K)[None, :]
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype)
    state = tl.full((BLOCK_N, 1), 1.0 if IS_ANGLES else 0.0, dtype)
    exponent = _exponent(tl.zeros((BLOCK_N, 1), dtype))
    for start in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        x_tile = tl.load(x_rows + start + lane, mask=sample_present & (start + lane < count), other=0.0)
        if IS_ANGLES:
            sine, cosine = _load_sine_cosine(weight_rows + start, unit_present, weight_count - start, BLOCK_N, BLOCK_K)
            prefix, state = _prefix_products(sine, state, BLOCK_N, BLOCK_K)
            tile = prefix * cosine
        else:
            inside = unit_present & (start + lane < count)
            values = tl.load(weight_rows + start + lane, mask=inside, other=0.0).to(dtype)
            previous, exponent = exponent, tl.maximum(exponent, _exponent(values))
            tile = values * _power(-exponent, dtype)
            change = _power(previous - exponent, dtype)
            state = state * change * change + tl.sum(tile * tile, 1, keep_dims=True)
            product = product * change
        tile = tile.to(x_tile.dtype)
        product = tl.dot(tile, tl.trans(x_tile), product, input_precision="ieee", out_dtype=dtype)
    inside = unit_present & (sample < rows)[None, :]
    if products is None:
        if not IS_ANGLES:
            product = product / _root(state)
        _store_output(
            product, scale, bias, output, kept, unit[:, None], sample[None, :], inside, units, IS_ANGLES, RELU
        )
    else:
        split = tl.program_id(1).to(tl.int64)
        tl.store(products + (split * units + unit[:, None]) * rows + sample[None, :], product, mask=inside)
        at = split * units + unit[:, None]
        tl.store(states + at, state, mask=unit_present)
        if not IS_ANGLES:
            tl.store(exponents + at, exponent.to(dtype), mask=unit_present)


@triton.jit(do_not_specialize=["rows", "units", "splits"])
def hypersphere_linear_reduce_kernel(
    scale,
    bias,
    output,
    kept,
    products,
    states,
    exponents,
    rows: tl.int64,
    units: tl.int64,
    splits: tl.int64,
    IS_ANGLES: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """All parts of the features in their order: (z, P) o (z', P') = (z + P z', P P')."""
    dtype: tl.constexpr = products.dtype.element_ty
    unit = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    sample = tl.arange(0, BLOCK_M)[None, :]
    unit_present = unit < units
    inside = unit_present & (sample < rows)
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype)
    state = tl.full((BLOCK_N, 1), 1.0 if IS_ANGLES else 0.0, dtype)
    exponent = _exponent(tl.zeros((BLOCK_N, 1), dtype))
    for _ in range(0, splits):
        part = tl.load(products + unit * rows + sample, mask=inside, other=0.0)
        part_state = tl.load(states + unit, mask=unit_present, other=0.0)
        if IS_ANGLES:
            product += state * part
            state *= part_state
        else:
            part_exponent = tl.load(exponents + unit, mask=unit_present, other=0.0).to(tl.int32)
            previous, exponent = exponent, tl.maximum(exponent, part_exponent)
            change, part_change = _power(previous - exponent, dtype), _power(part_exponent - exponent, dtype)
            product = product * change + part * part_change
            state = state * change * change + part_state * part_change * part_change
            exponents += units
        products += units * rows
        states += units
    if not IS_ANGLES:
        product = product / _root(state)
    _store_output(product, scale, bias, output, kept, unit, sample, inside, units, IS_ANGLES, RELU)


@triton.jit
def _store_output(
    product,
    scale,
    bias,
    output,
    kept,
    unit,
    sample,
    inside,
    units,
    BIAS_FIRST: tl.constexpr,
    RELU: tl.constexpr,
):
    """GmP: scale * act(product + bias), and act(..) is kept; else scale * product + bias, and the product is."""
    dtype: tl.constexpr = product.dtype
    present = unit < units
    factor = tl.load(scale + unit, mask=present, other=0.0).to(dtype)
    if bias is not None:
        shift = tl.load(bias + unit, mask=present, other=0.0).to(dtype)
        if BIAS_FIRST:
            product += shift
    if RELU:
        # Not a maximum: NaN stays.
        product = tl.where(product <= 0.0, 0.0, product)
    at = sample.to(tl.int64) * units + unit
    if kept is not None:
        tl.store(kept + at, product.to(kept.dtype.element_ty), mask=inside)
    result = product * factor
    if bias is not None and not BIAS_FIRST:
        result += shift
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def scale_kernel(
    product,
    scale,
    output,
    kept,
    rows: tl.int64,
    units: tl.int64,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What follows the vendor's matmul: scale * act(product)."""
    dtype: tl.constexpr = tl.float64 if product.dtype.element_ty == tl.float64 else tl.float32
    sample = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    unit = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (sample < rows) & (unit < units)
    values = tl.load(product + sample * units + unit, mask=inside, other=0.0).to(dtype)
    _store_output(values, scale, None, output, kept, unit, sample, inside, units, True, RELU)


@triton.jit(do_not_specialize=["rows"])
def sum_gradients_kernel(
    grad_output,
    activated,
    radius,
    grad_pre,
    radius_sums,
    location_sums,
    rows: tl.int64,
    units: tl.int64,
    chunk: tl.int64,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N units and ``chunk`` samples: dz = radius dy where activated > 0, and the sums of dz and dy activated."""
    dtype: tl.constexpr = tl.float64 if grad_output.dtype.element_ty == tl.float64 else tl.float32
    unit = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    part = tl.program_id(1).to(tl.int64)
    radius_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype)
    location_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype)
    factor = tl.load(radius + unit, mask=unit < units, other=0.0).to(dtype)
    for start in range(part * chunk, min((part + 1) * chunk, rows), BLOCK_M):
        sample = start + tl.arange(0, BLOCK_M)[:, None]
        inside = (sample < rows) & (unit < units)
        at = sample * units + unit
        gradient = tl.load(grad_output + at, mask=inside, other=0.0).to(dtype)
        if activated is not None:
            active = tl.load(activated + at, mask=inside, other=0.0).to(dtype)
            radius_sum += gradient * active
        gradient *= factor
        if RELU:
            # As torch's: what is NaN passes.
            gradient = tl.where(active <= 0.0, 0.0, gradient)
        location_sum += gradient
        if grad_pre is not None:
            tl.store(grad_pre + at, gradient.to(grad_pre.dtype.element_ty), mask=inside)
    at = part * units + unit
    if radius_sums is not None:
        total = tl.sum(radius_sum, 0, keep_dims=True)
        tl.store(radius_sums + at, total.to(radius_sums.dtype.element_ty), mask=unit < units)
    if location_sums is not None:
        total = tl.sum(location_sum, 0, keep_dims=True)
        tl.store(location_sums + at, total.to(location_sums.dtype.element_ty), mask=unit < units)


def _aot_variant(kernel, id: str, pointers: dict, lengths: dict, constexprs: dict, launch: dict, **others) -> dict:
    """``pointers``: name -> type, None for one that is left out. A length divisible by 16 is compiled as such."""
    given = {name: f"*{dtype}" for name, dtype in pointers.items() if dtype is not None}
    launch = dict(launch)
    return {
        "id": id,
        "kernel": kernel,
        "signature": given | dict.fromkeys(lengths, "i64"),
        "num_warps": launch.pop("num_warps", 4),
        "constexprs": dict.fromkeys(name for name in pointers if name not in given) | constexprs | launch,
        "aligned": (*given, *(name for name, length in lengths.items() if length % 16 == 0 and length > 0)),
    } | others


def _row_variants(length: int, dtype: str, count: int = 4096, targets=tuple(AOT_DEVICES)) -> list[dict]:
    """The four kernels of rows."""
    itemsize = _ITEMSIZE[dtype]
    launch = _row_launch(length, itemsize)
    blocks = {"BLOCKS": triton.next_power_of_2(triton.cdiv(length, launch["LANES"]))}
    fits = {"FITS": length <= launch["LANES"]}
    # The number of rows is not specialised.
    angles, rows = {"count": 0, "columns": length - 1}, {"count": 0, "length": length}
    direction_launch = _direction_launch(count, length, itemsize, AOT_DEVICES["sm_90"])
    weight_names = ("grad_output", "weight", "scale", "grad_weight", "grad_scale")
    return [
        _aot_variant(kernel, f"{length}-{dtype}", pointers, lengths, flags, launch, targets=targets)
        for kernel, pointers, lengths, flags, launch in (
            (direction_kernel, dict.fromkeys(("angles", "output"), dtype), angles, {}, direction_launch),
            (
                direction_backward_kernel,
                dict.fromkeys(("grad_direction", "angles", "grad_angles"), dtype),
                angles,
                blocks,
                launch,
            ),
            (normalize_kernel, dict.fromkeys(("weight", "scale", "output"), dtype), rows, fits, launch),
            (normalize_backward_kernel, dict.fromkeys(weight_names, dtype), rows, fits, launch),
        )
    ]


def _linear_variants(shape: tuple[int, int, int], dtype: str, is_angles: bool, targets=tuple(AOT_DEVICES)) -> list:
    """One per target of the fused product, and of the sum of its parts."""
    rows, units, features = shape
    columns = features - is_angles
    wide = "fp64" if dtype == "fp64" else "fp32"
    variants = []
    for target in targets:
        device = AOT_DEVICES[target]
        launch = choose_launch(rows, units, features, _ITEMSIZE[dtype], device)
        splits, chunk = launch.pop("splits"), launch.pop("chunk")
        partial = wide if splits > 1 else None
        outputs = dict.fromkeys(("scale", "bias", "output", "kept"), dtype)
        outputs |= {"products": partial, "states": partial, "exponents": None if is_angles else partial}
        flags = {"IS_ANGLES": is_angles, "RELU": is_angles}
        id = f"{rows}x{units}x{features}-{dtype}-{'angles' if is_angles else 'norm'}-{splits}-splits"
        others = {"targets": (target,), "shared_memory": device.shared_memory}
        lengths = {"rows": 0, "units": 0, "columns": columns, "features": features, "chunk": chunk}
        pointers = {"x": dtype, "weight": dtype} | outputs
        variants.append(_aot_variant(hypersphere_linear_kernel, id, pointers, lengths, flags, launch, **others))
        if splits > 1:
            tile = {"BLOCK_M": launch["BLOCK_M"], "BLOCK_N": REDUCE_UNITS}
            lengths = dict.fromkeys(("rows", "units", "splits"), 0)
            variants.append(_aot_variant(hypersphere_linear_reduce_kernel, id, outputs, lengths, flags, tile, **others))
    return variants


def _pointwise_variants(dtype: str, relu: bool) -> list[dict]:
    """What is done to the vendor's products, with everything that may be left out."""
    lengths = {"rows": 0, "units": 4096}
    scaled = dict.fromkeys(("product", "scale", "output", "kept"), dtype)
    wide = "fp64" if dtype == "fp64" else "fp32"
    summed = dict.fromkeys(("grad_output", "activated", "radius", "grad_pre"), dtype)
    summed |= dict.fromkeys(("radius_sums", "location_sums"), wide)
    flags = {"RELU": relu}
    return [
        _aot_variant(scale_kernel, dtype, scaled, lengths, flags, _pointwise_launch(4096)),
        _aot_variant(sum_gradients_kernel, dtype, summed, lengths | {"chunk": 64}, flags, _pointwise_launch(64)),
    ]


_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}

AOT_VARIANTS = [
    *_row_variants(4096, "fp32"),
    *_row_variants(2048, "fp64", targets=("sm_90",))[:2],
    # More than one step: as many warps as a row can have, and what is carried along. Not on AMD: the masks of eight
    # loads take more scalar registers than there are, and six of them go through vector registers.
    *_row_variants(16384, "bf16", count=64, targets=("sm_90",)),
    *_linear_variants((32, 4096, 4096), "bf16", True),
    *_linear_variants((16, 4096, 4096), "fp32", True, targets=("sm_90",)),
    *_linear_variants((32, 4096, 4096), "bf16", False, targets=("sm_90", "gfx942")),
    *_pointwise_variants("fp32", True),
]
