"""Weights on the hypersphere (GmP): directions from angles, and a linear layer of such directions, in Triton.

    direction:   u_k = P_k cos t_k (k < m),  u_m = P_m,  P_k = prod_{i<k} sin t_i
    backward:    T_m = g_m,  T_k = cos t_k g_k + sin t_k T_{k+1},  dL/dt_k = P_k (cos t_k T_{k+1} - sin t_k g_k)
    layer:       y = r act(x u^T + lambda)
    W. Chen, H. Ge, NeurIPS 2024, arXiv 2305.15912; the backward without divisions is ours. t are the angles and g is
    the gradient of u; P_k and T_k are running products and sums. x has M rows (samples) of m features; each of n units
    has a direction u, a radius r and a location lambda. The notation is that of lcw_ops/reference.

Cost of the direction per element: 2 * itemsize bytes and 56 instructions, of which sine and cosine take about 25. The
running product is an associative scan over one number per 8 columns, so that threads exchange little. For 4096 x 4096
float32 numbers on an H200, memory takes 31 us and the instructions take 32 us. Backward moves 3 * itemsize bytes and
takes 85 instructions per element, and reads the angles of long rows twice, the second time from the second-level cache.
For the same matrix, memory takes 47 us and the instructions take 48 us. With 69 registers per thread and 16 warps, only
one program of the backward kernel fits a multiprocessor, so less latency is hidden.

Cost of a layer of M <= FUSED_ROWS samples: the angles are read once, and the directions exist in registers only. The
product takes 2 M n m operations. For M = 32 and 4096 x 4096 float32 angles, the instructions take 32 us and memory
takes 16 us (8 us for 16-bit angles). If there are too few units to fill the multiprocessors, the columns are split
among programs. Each program begins the product of sines with its own columns. A second kernel multiplies every part by
the product of the sines before it and adds the parts in order, without atomics.
A layer of more samples takes one pass that makes the directions, torch's matmul with the location added, and a pass
over the result for ReLU and radius, because torch's matmul cannot apply a scale after a ReLU. The last pass moves 2 or
3 * itemsize bytes per output. All figures are predicted from compiled code, not measured: no GPU has run this yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcw_ops import _old_names
from lcw_ops.kernels.angles import load_groups, load_sine_cosine, prefix_products, recurrence
from lcw_ops.kernels.common import (
    FUSED_ROWS,
    REDUCE_UNITS,
    ROW_BYTES,
    WARP_LANES,
    Device,
    choose_fused_launch,
    choose_row_launch,
    computed_in,
    contiguous,
    device_facts,
    row_multiple,
    wide_dtype,
)

# With this many warps on a multiprocessor, they hide each other's latency.
WARPS_PER_PROCESSOR = 16
# Elements per program of a kernel that works on each output alone: 8 for each thread of 4 warps.
POINTWISE_ELEMENTS = 1024
# For the gradients of radius and location, the samples are split among programs, but not into parts of fewer than this.
LEAST_SUMMED_ROWS = 64


def hypersphere_direction(angles: Tensor) -> Tensor:
    """(n, m-1) -> unit rows (n, m). Does not check its arguments."""
    units, columns = angles.shape
    output = angles.new_empty((units, columns + 1))
    if units == 0:
        return output
    if columns == 0:
        return output.fill_(1.0)
    angles = angles.contiguous()
    launch = _direction_launch(units, columns + 1, angles.itemsize, device_facts(angles.device))
    multiple = row_multiple(angles.itemsize, columns + 1)
    # Triton launches on the current device, not on the tensor's.
    with torch.cuda.device_of(angles):
        direction_kernel[(triton.cdiv(units, launch["ROWS"]),)](
            angles, output, units, (columns + 1) // multiple, MULTIPLE=multiple, **launch
        )
    return output


def hypersphere_direction_backward(grad_direction: Tensor, angles: Tensor) -> Tensor:
    """The gradient of the angles, (n, m-1). Does not check its arguments."""
    units, columns = angles.shape
    output = angles.new_empty((units, columns))
    if output.numel() == 0:
        return output
    grad_direction, angles = grad_direction.contiguous(), angles.contiguous()
    launch = choose_row_launch(columns + 1, angles.itemsize)
    blocks = triton.next_power_of_2(triton.cdiv(columns + 1, launch["LANES"]))
    with torch.cuda.device_of(angles):
        direction_backward_kernel[(triton.cdiv(units, launch["ROWS"]),)](
            grad_direction, angles, output, units, columns, BLOCKS=blocks, **launch
        )
    return output


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
    """x (M, m) -> (y, a, u): y = radius * a (M, n), a = act(x u^T + location), u (n, m). Does not check its arguments.

    An output that is not kept, a or u, has the shape (0,). Sums have a fixed order, whatever ``deterministic`` is.
    """
    if x.shape[0] <= FUSED_ROWS:
        direction = hypersphere_direction(angles) if keep_direction else x.new_empty((0,))
        return *_fused_linear(x, angles, radius, location, relu, keep_activated), direction
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
    """The gradients of x, angles, radius and location, each (0,) if it is not needed.

    ReLU and the gradient of the radius need ``activated``. An empty ``direction`` is computed again. Does not check its
    arguments.
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
        # A direction is empty if it was not kept, or if there are no units.
        grad_x = grad_pre @ (direction if direction.numel() > 0 else hypersphere_direction(angles))
    if needs_angles:
        grad_angles = hypersphere_direction_backward(grad_pre.mT @ x, angles)
    return grad_x, grad_angles, grad_radius, grad_location


def _direction_launch(units: int, length: int, itemsize: int, device: Device) -> dict:
    """One warp for every row, so that it waits for no other warp; more warps per row if there are few rows."""
    lanes, most = WARP_LANES, ROW_BYTES // max(itemsize, 4)
    while lanes < most and units * lanes < WARPS_PER_PROCESSOR * device.processors * WARP_LANES:
        lanes *= 2
    return choose_row_launch(length, itemsize, lanes)


def _fused_linear(
    x: Tensor, angles: Tensor, radius: Tensor, location: Tensor, relu: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """The layer for M <= FUSED_ROWS: (output, the activations or, unless ``keep``, (0,))."""
    rows, features = x.shape
    units = angles.shape[0]
    output = x.new_empty((rows, units))
    kept = x.new_empty(output.shape) if keep else x.new_empty((0,))
    if output.numel() == 0:
        return output, kept
    launch = choose_fused_launch(rows, units, features, x.itemsize, device_facts(x.device))
    splits, num_warps = launch.pop("splits"), launch.pop("num_warps")

    def sums(*shape):
        return x.new_empty((splits, *shape), dtype=wide_dtype(x.dtype)) if splits > 1 else None

    shared = {
        "radius": radius.contiguous(),
        "location": location.contiguous(),
        "output": output,
        "kept": kept if keep else None,
        "products": sums(units, rows),
        "sines": sums(units),
        "rows": rows,
        "units": units,
        "RELU": relu,
        "BLOCK_M": launch["BLOCK_M"],
    }
    x, angles = x.contiguous(), angles.contiguous()
    multiple = row_multiple(x.itemsize, features)
    grid = (triton.cdiv(units, launch["BLOCK_N"]), splits)
    with torch.cuda.device_of(x):
        gmp_linear_kernel[grid](
            x=x,
            angles=angles,
            features=features // multiple,
            MULTIPLE=multiple,
            **shared | launch,
            num_warps=num_warps,
        )
        if splits > 1:
            gmp_linear_reduce_kernel[(triton.cdiv(units, REDUCE_UNITS),)](
                **shared, splits=splits, BLOCK_N=REDUCE_UNITS, num_warps=4
            )
    return output, kept


def _scale(product: Tensor, scale: Tensor, relu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """(scale * act(product), act(product) or, unless ``keep``, (0,)). Overwrites ``product``."""
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
    """The gradients of pre-activation (M, n), radius (n,) and location (n,), each (0,) if it is not needed."""
    rows, units = grad_output.shape
    grad_pre = grad_output.new_empty((rows, units) if needs_pre else (0,))
    grad_radius = grad_output.new_empty((units if needs_radius else 0,))
    grad_location = grad_output.new_empty((units if needs_location else 0,))
    if units == 0 or not (needs_pre or needs_radius or needs_location):
        return grad_pre, grad_radius, grad_location
    launch = _pointwise_launch(min(units, 64))
    blocks = triton.cdiv(units, launch["BLOCK_N"])
    splits = max(1, min(device_facts(grad_output.device).processors * 4 // blocks, rows // LEAST_SUMMED_ROWS))
    chunk = triton.cdiv(triton.cdiv(rows, splits), launch["BLOCK_M"]) * launch["BLOCK_M"]
    splits = max(1, triton.cdiv(rows, chunk)) if rows else 1

    def sums(gradient):
        return gradient if splits == 1 else gradient.new_empty((splits, units), dtype=wide_dtype(gradient.dtype))

    radius_sums = sums(grad_radius) if needs_radius else None
    location_sums = sums(grad_location) if needs_location else None
    with torch.cuda.device_of(grad_output):
        sum_gradients_kernel[(blocks, splits)](
            grad_output.contiguous(),
            contiguous(activated),
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
        # torch's sum over a dimension has a fixed order too.
        grad_radius = radius_sums.sum(0).to(grad_radius.dtype) if needs_radius else grad_radius
        grad_location = location_sums.sum(0).to(grad_location.dtype) if needs_location else grad_location
    return grad_pre, grad_radius, grad_location


def _pointwise_launch(units: int) -> dict:
    block_n = min(triton.next_power_of_2(units), POINTWISE_ELEMENTS)
    return {"BLOCK_M": POINTWISE_ELEMENTS // block_n, "BLOCK_N": block_n}


@triton.jit(do_not_specialize=["count", "length"])
def direction_kernel(
    angles,
    output,
    count: tl.int64,
    length: tl.int64,
    MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Computes ROWS directions, LANES columns in a step. Each step starts from the product of the sines before it.

    A direction has ``length`` * MULTIPLE components.
    """
    length = length * MULTIPLE
    columns = length - 1
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    present = row < count
    dtype: tl.constexpr = computed_in(angles.dtype.element_ty)
    angles += row * columns
    output += row * length
    carry = tl.full((), 1.0, dtype) if ROWS == 1 else tl.full((ROWS, 1), 1.0, dtype)
    for start in range(0, length, LANES):
        # 32 bits are enough to count within a step.
        left = tl.cast(min(columns - start, LANES), tl.int32)
        sine, cosine = load_sine_cosine(angles + start, present, left, ROWS, LANES)
        prefix, carry = prefix_products(sine, carry, ROWS, LANES)
        values = (prefix * cosine).to(output.dtype.element_ty)
        stored = tl.cast(min(length - start, LANES), tl.int32)
        tl.store(output + start + lane, values, mask=present & (lane < stored))


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
    """Computes the gradients of the angles of ROWS rows, from the last columns to the first.

    Long rows take several steps. For these, the product of the sines before every step is computed first.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    present = row < count
    dtype: tl.constexpr = computed_in(angles.dtype.element_ty)
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
            sine, _ = load_sine_cosine(angles + tl.cast(step, tl.int64) * LANES, present, LANES, ROWS, LANES)
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
    """Stores dL/dt_k = P_k (cos t_k T_{k+1} - sin t_k g_k) for LANES columns. Returns T of the first column."""
    lane = tl.arange(0, LANES)[None, :]
    left = tl.cast(min(columns, LANES), tl.int32)
    sine, cosine = load_sine_cosine(angles, present, left, ROWS, LANES)
    gradient = load_groups(grad_direction, present, left + 1, ROWS, LANES)
    prefix, following, suffix = recurrence(sine, cosine * gradient, prefix, suffix, ROWS, LANES)
    result = prefix * (cosine * following - sine * gradient)
    tl.store(grad_angles + lane, result.to(grad_angles.dtype.element_ty), mask=present & (lane < left))
    return suffix


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit(do_not_specialize=["rows", "units", "features"])
def gmp_linear_kernel(
    x,
    angles,
    radius,
    location,
    output,
    kept,
    products,
    sines,
    rows: tl.int64,
    units: tl.int64,
    features: tl.int64,
    chunk: tl.int64,
    MULTIPLE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiplies BLOCK_N units by all samples, over ``chunk`` features. The product of sines begins with the chunk.

    ``features`` counts MULTIPLE elements each.
    """
    dtype: tl.constexpr = computed_in(angles.dtype.element_ty)
    features = features * MULTIPLE
    columns = features - 1
    unit = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.arange(0, BLOCK_M)
    unit_present, sample_present = (unit < units)[:, None], (sample < rows)[:, None]
    first = tl.program_id(1) * chunk
    count = min(chunk, features - first).to(tl.int32)
    # The last component of a direction has no angle of its own.
    angle_count = min(chunk, columns - first).to(tl.int32)
    angle_rows = angles + first + unit[:, None] * columns
    x_rows = x + first + sample.to(tl.int64)[:, None] * features
    lane = tl.arange(0, BLOCK_K)[None, :]
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype)
    sines_product = tl.full((BLOCK_N, 1), 1.0, dtype)
    for start in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        x_tile = tl.load(x_rows + start + lane, mask=sample_present & (start + lane < count), other=0.0)
        sine, cosine = load_sine_cosine(angle_rows + start, unit_present, angle_count - start, BLOCK_N, BLOCK_K)
        prefix, sines_product = prefix_products(sine, sines_product, BLOCK_N, BLOCK_K)
        tile = (prefix * cosine).to(x_tile.dtype)
        product = tl.dot(tile, tl.trans(x_tile), product, input_precision="ieee", out_dtype=dtype)
    inside = unit_present & (sample < rows)[None, :]
    if products is None:
        _store_output(product, radius, location, output, kept, unit[:, None], sample[None, :], inside, units, RELU)
    else:
        split = tl.program_id(1).to(tl.int64)
        tl.store(products + (split * units + unit[:, None]) * rows + sample[None, :], product, mask=inside)
        tl.store(sines + (split * units + unit[:, None]), sines_product, mask=unit_present)


@triton.jit(do_not_specialize=["rows", "units", "splits"])
def gmp_linear_reduce_kernel(
    radius,
    location,
    output,
    kept,
    products,
    sines,
    rows: tl.int64,
    units: tl.int64,
    splits: tl.int64,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Joins the partial results over the features, in order: (z, P) o (z', P') = (z + P z', P P').

    z is the partial sum of a part of the features, and P the product of its sines.
    """
    dtype: tl.constexpr = products.dtype.element_ty
    unit = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    sample = tl.arange(0, BLOCK_M)[None, :]
    unit_present = unit < units
    inside = unit_present & (sample < rows)
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype)
    sines_product = tl.full((BLOCK_N, 1), 1.0, dtype)
    for _ in range(0, splits):
        part = tl.load(products + unit * rows + sample, mask=inside, other=0.0)
        part_sines = tl.load(sines + unit, mask=unit_present, other=0.0)
        product += sines_product * part
        sines_product *= part_sines
        products += units * rows
        sines += units
    _store_output(product, radius, location, output, kept, unit, sample, inside, units, RELU)


@triton.jit
def _store_output(product, radius, location, output, kept, unit, sample, inside, units, RELU: tl.constexpr):
    """Stores radius * act(product + location), and the activation itself in ``kept``."""
    dtype: tl.constexpr = product.dtype
    present = unit < units
    factor = tl.load(radius + unit, mask=present, other=0.0).to(dtype)
    if location is not None:
        product += tl.load(location + unit, mask=present, other=0.0).to(dtype)
    if RELU:
        # tl.maximum would turn a NaN into 0.
        product = tl.where(product <= 0.0, 0.0, product)
    at = sample.to(tl.int64) * units + unit
    if kept is not None:
        tl.store(kept + at, product.to(kept.dtype.element_ty), mask=inside)
    result = product * factor
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
    """Computes scale * act(product), after the vendor's matmul."""
    dtype: tl.constexpr = computed_in(product.dtype.element_ty)
    sample = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    unit = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (sample < rows) & (unit < units)
    values = tl.load(product + sample * units + unit, mask=inside, other=0.0).to(dtype)
    _store_output(values, scale, None, output, kept, unit, sample, inside, units, RELU)


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
    """Computes dz = radius dy, with ReLU 0 where ``activated`` is 0, and the sums of dz and dy * activated.

    A program takes BLOCK_N units and ``chunk`` samples. dy and dz are the gradients of y and of act's argument.
    """
    dtype: tl.constexpr = computed_in(grad_output.dtype.element_ty)
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
            # A NaN passes, as in torch.
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


# The functions of weight normalization have moved from this file to weight_norm.py. Here are their old names.
_old_names.keep(
    globals(),
    dict.fromkeys(
        (
            "normalize_backward_kernel",
            "normalize_kernel",
            "normalize_scale",
            "normalize_scale_backward",
            "weight_norm_linear",
            "weight_norm_linear_backward",
        ),
        "lcw_ops.kernels.weight_norm",
    ),
)
