"""The recurrence over depth, solved in parallel by Picard sweeps, in Triton: scans and activations.

    h_l = alpha_l O h_{l-1} + beta_l act(P_l + b_l + u_l)    l = 1..D

P_l = W_l h_{l-1} comes from the states of the previous sweep, by a batched matmul outside this file
(lcw_ops/ops/parallel_depth/solver.py). b is the bias and u are the inputs. O is the filter: a permutation of a row's N
units, or rotations of pairs of them. There are M rows (samples) in each of the D layers.

The adjoint is a recurrence of the same form from layer D to layer 1. A scan in chunks of C layers takes three launches.
The first computes end_k, the state that chunk k would end with if it began with 0. The second goes from chunk to chunk
and computes c_k, the state with which chunk k begins (its carry): c_{k+1} = end_k + (alpha ... alpha) O^C c_k, with the
C alphas of chunk k. The third runs every chunk again from its carry, stores the states and compares them with the old
ones. The notation is that of lcw_ops/reference/parallel_depth.py; the chunked scan is a textbook method.

Memory traffic per float32 element: 16 bytes forward (P read twice, the old state read, the new one written), and 8 more
with u. The adjoint takes 16 bytes, 8 more with a gradient from outside, and 8 more with slope (read) and scaled
(written). The chunk ends add 32 / C bytes to both: per chunk, a float64 number is written twice and read twice. If the
rows alone fill the GPU, there is one chunk, and P and u are read once.

Instructions of the sm_90 code (Triton 3.7.1) per layer, for the 4 rows of a warp, with N = 64, a permutation, tanh,
bias and u: 390 in the first launch and 512 in the third. In each of them tanh takes about 280. For D = 50,000, M = 128
and N = 64 on an H200 (4.3 TB/s, 0.92 T warp instructions a second), the traffic takes 2.3 ms (1.5 ms without u) and the
instructions take 1.6 ms. These times are predicted, not measured: no GPU has run this yet. With the matmul's 10 bytes
an element, a sweep moves 26. parallel_depth_fused.py has the product inside the scan, for permutations of at most 64
units in float32: it moves 10, but its instructions take 1.9 ms. docs/parallel_depth.md has the count.

At N = 64 a warp holds 4 rows and waits for no other warp. The residual, the largest relative change of a row, needs
reductions within the warp only: maxima of the bits of magnitudes, compared as integers. A permutation moves no numbers
between lanes (columns of the tile). Instead, a lane looks up in the table of the inverse to which unit its number
belongs now, and reads and writes at that unit. Loads of the table stay in the first-level cache. A row's units stay in
the same cache lines, whatever their order. With a permutation the scan computes in the states' dtype; with rotations it
computes in float64. If N is even, a thread loads two adjacent units at a time, and these are the partners of a
rotation. If N is odd, it loads one, and partners are exchanged by shuffles. Every sum has a fixed order. There are no
atomics.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lcw_ops._checks import describe
from lcw_ops._names import ACTIVATIONS
from lcw_ops.kernels.common import activate, activation_slope, device_facts, is_permutation

# All units of a row are in one program, because the residual is relative to the largest of them.
MAX_WIDTH = 2048

# A warp's tile: 8 elements a thread. A row of up to this many units fits one warp, which waits for no other warp.
WARP_ELEMENTS = 256
# Twice the number of one-warp blocks that a multiprocessor holds at a time.
WARPS_PER_PROCESSOR = 64
# Layers that one program of activate_kernel computes. There, layers do not depend on each other.
POINTWISE_LAYERS = 8
# Pipeline stages of carry_kernel's loop over the chunks: the next chunk ends are loaded while one is added.
CARRY_STAGES = 3


def sweep_(
    states: Tensor,
    product: Tensor | None,
    bias: Tensor | None,
    inputs: Tensor | None,
    filter: Tensor,
    alpha: Tensor,
    beta: Tensor,
    activation: str,
) -> Tensor:
    """One scan: states_l <- alpha_l O states_{l-1} + beta_l act(product_l + bias_l + inputs_l) for l = 1..D, in place.

    Shapes as for ``lcw_ops.reference.parallel_depth.sweep_``; float32 or float64, contiguous. ``filter`` is an int64
    permutation (N,) or rotations (2 N,) in float64. Indices that are no permutation give NaN and no error, because a
    check on the host would make the host wait for the device.

    Returns:
        The largest relative change of a row in a layer, max_i |new_i - old_i| / max_i |new_i|; (1,) in float64.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, or N > MAX_WIDTH.
    """
    op = "parallel_depth_sweep_"
    steps = _check_layers(op, states) - 1
    _check(op, states, steps, [product, inputs], bias, [alpha, beta])
    _check_filter(op, states, filter)
    _check_activation(op, activation)
    if product is None:
        # The whole second term is left out.
        bias = inputs = beta = None
    return _scan(states, product, bias, inputs, filter, alpha, beta, activation, None, None, reverse=False)


def adjoint_sweep_(
    gradients: Tensor,
    product: Tensor | None,
    outside: Tensor | None,
    filter: Tensor,
    alpha: Tensor,
    slope: Tensor | None,
    scaled: Tensor | None,
) -> Tensor:
    """One scan from layer D to 1: gradients_{l-1} <- alpha_l O gradients_l + product_l + outside_l, in place.

    With ``slope``, scaled_l <- slope_l gradients_l. Shapes as for
    ``lcw_ops.reference.parallel_depth.adjoint_sweep_``; the rest as for :func:`sweep_`.
    """
    op = "parallel_depth_adjoint_"
    steps = _check_layers(op, gradients) - 1
    _check(op, gradients, steps, [product, outside, slope, scaled], None, [alpha])
    _check_filter(op, gradients, filter)
    if slope is not None and scaled is None:
        raise _refusal(op, "scaled", "is None", "a tensor, as slope is given")
    return _scan(gradients, product, None, outside, filter, alpha, None, "identity", slope, scaled, reverse=True)


def activate_(
    product: Tensor, bias: Tensor | None, inputs: Tensor | None, beta: Tensor, activation: str, derivative: bool
) -> None:
    """product <- beta_l act(A_l), or beta_l act'(A_l), with A_l = product_l + bias_l + inputs_l, in place.

    Shapes as for ``lcw_ops.reference.parallel_depth.activate_``; the rest as for :func:`sweep_`.
    """
    op = "parallel_depth_activate_"
    layers = _check_layers(op, product)
    _check(op, product, layers, [inputs], bias, [beta])
    _check_activation(op, activation)
    if product.numel() == 0:
        return
    rows, width = product.shape[1:]
    tile = _choose_tile(width, rows)
    with torch.cuda.device_of(product):
        activate_kernel[(triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(layers, POINTWISE_LAYERS),)](
            product,
            bias,
            inputs,
            beta,
            rows,
            layers,
            POINTWISE_LAYERS,
            BIAS_STRIDE=_bias_stride(bias),
            BETA_STRIDE=_scale_stride(beta),
            ACTIVATION=activation,
            DERIVATIVE=derivative,
            WIDTH=width,
            **tile,
        )


def _scan(states, product, bias, inputs, filter, alpha, beta, activation, slope, scaled, reverse) -> Tensor:
    """Make a forward or an adjoint sweep. They differ in direction, activation, ``slope`` and ``scaled``."""
    steps, rows, width = states.shape[0] - 1, *states.shape[1:]
    if steps * rows * width == 0:
        return states.new_zeros(1, dtype=torch.float64)
    permutes = not filter.is_floating_point()
    inverse = _inverse_of(filter) if permutes else None
    carrier = inverse if permutes else filter
    tile = _choose_tile(width, rows)
    blocks = triton.cdiv(rows, tile["BLOCK_M"])
    chunk = choose_chunk(steps, blocks * tile["num_warps"], device_facts(states.device).processors)
    chunks = triton.cdiv(steps, chunk)
    carries = states.new_empty((chunks, rows, width), dtype=torch.float64)
    decays = carries.new_empty(chunks)
    power = torch.empty_like(inverse, dtype=torch.int32) if permutes else None
    residuals = carries.new_empty(chunks * blocks)
    lengths = {"rows": rows, "steps": steps, "chunk": chunk}
    strides = {
        "BIAS_STRIDE": _bias_stride(bias),
        "ALPHA_STRIDE": _scale_stride(alpha),
        "BETA_STRIDE": _scale_stride(beta),
    }
    options = strides | {"ACTIVATION": activation, "REVERSE": reverse, "WIDTH": width} | tile
    with torch.cuda.device_of(states):
        if chunks > 1:
            # The end of the last chunk is not needed.
            chunk_ends_kernel[((chunks - 1) * blocks,)](
                product, bias, inputs, carrier, alpha, beta, carries, decays, power, **lengths, **options
            )
        carry_kernel[(blocks,)](
            states[-1] if reverse else states, carries, decays, filter, inverse, power, rows, chunks, chunk,
            WIDTH=width, STAGES=CARRY_STAGES, **tile,
        )  # fmt: skip
        sweep_kernel[(chunks * blocks,)](
            states, product, bias, inputs, slope, scaled, carrier, alpha, beta, carries, residuals, **lengths, **options
        )
    return residuals.amax(0, keepdim=True)


# Permutation -> (its version, the stream on which its inverse was computed, the inverse), while the permutation lives.
_inverses = WeakTensorKeyDictionary()


def _inverse_of(permutation: Tensor) -> Tensor:
    """The inverse, sorted once for all sweeps with the same tensor. If it is out of date, the kernels give NaN.

    The indices are valid whatever the permutation holds, so no address is out of bounds.
    """
    # A CUDA graph must compute its own, because it outlives the kept one.
    if permutation.is_inference() or (permutation.is_cuda and torch.cuda.is_current_stream_capturing()):
        return permutation.argsort()
    stream = torch.cuda.current_stream(permutation.device) if permutation.is_cuda else None
    known = _inverses.get(permutation)
    if known is None or known[:2] != (permutation._version, stream):
        known = _inverses[permutation] = (permutation._version, stream, permutation.argsort())
    return known[2]


def _check_layers(op: str, states: Tensor) -> int:
    if states.dim() != 3 or states.dtype not in (torch.float32, torch.float64):
        raise _refusal(op, "the first tensor", _is(states), "float32 or float64 (layers, samples, units)")
    if states.shape[2] > MAX_WIDTH:
        raise _refusal(op, "width", f"is {states.shape[2]}", f"at most {MAX_WIDTH} in triton")
    return states.shape[0]


def _check(op: str, states: Tensor, layers: int, per_layer: list, bias: Tensor | None, scales: list) -> None:
    """Raise ValueError if the kernels would read or write out of bounds."""
    rows, width = states.shape[1:]
    expected = [(states, [tuple(states.shape)]), (bias, [(width,), (layers, width)])]
    expected += [(tensor, [(layers, rows, width)]) for tensor in per_layer]
    expected += [(scale, [(1,), (layers,)]) for scale in scales]
    for tensor, shapes in expected:
        if tensor is None:
            continue
        same = tensor.dtype == states.dtype and tensor.device == states.device
        if not (same and tuple(tensor.shape) in shapes and tensor.is_contiguous()):
            shape = " or ".join(map(str, shapes))
            fitting = f"contiguous {states.dtype} {shape} on {states.device}, to fit the first tensor"
            raise _refusal(op, "an argument", _is(tensor), fitting)


def _check_filter(op: str, states: Tensor, filter: Tensor) -> None:
    width = states.shape[2]
    fits = filter.dtype == torch.int64 and filter.shape == (width,)
    fits |= filter.dtype == torch.float64 and filter.shape == (2 * width,)
    if states.shape[0] == 0 or not (fits and filter.is_contiguous() and filter.device == states.device):
        forms = f"a contiguous int64 permutation ({width},) or float64 rotations ({2 * width},)"
        raise _refusal(op, "filter", _is(filter), f"{forms} to fit the first tensor, which {_is(states)}")


def _check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise _refusal(op, "activation", f"is {activation!r}", f"one of {', '.join(ACTIVATIONS)}")


def _refusal(op: str, argument: str, came: str, expected: str) -> ValueError:
    return ValueError(describe(op, argument, came, expected, "Call lcw_ops.functional.orthogonal_filter"))


def _is(tensor: Tensor) -> str:
    strides = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
    return f"is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{strides}"


def _bias_stride(bias: Tensor | None) -> int:
    return bias.shape[1] if bias is not None and bias.dim() == 2 else 0


def _scale_stride(scale: Tensor | None) -> int:
    return int(scale is not None and scale.numel() != 1)


def _choose_tile(width: int, rows: int) -> dict:
    """As many whole rows as one warp's tile holds.

    A row of more than WARP_ELEMENTS units is shared by several warps. Each then holds half as many elements as
    WARP_ELEMENTS, so that registers do not spill.
    """
    block_n = max(2, triton.next_power_of_2(width))
    block_m = max(1, min(WARP_ELEMENTS // block_n, triton.next_power_of_2(rows)))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": 1 if block_n <= WARP_ELEMENTS else 2 * block_n // WARP_ELEMENTS,
    }


def choose_chunk(steps: int, warps: int, processors: int) -> int:
    """Layers per chunk, if a layer takes ``warps`` warps.

    There are as many chunks as fill the GPU, but at most the square root of the number of layers. With more chunks, the
    pass that computes their carries one after another would take longer than the scan of one chunk.
    """
    chunks = min(processors * WARPS_PER_PROCESSOR // warps, math.isqrt(steps))
    return triton.cdiv(steps, max(chunks, 1))


@triton.jit(do_not_specialize=["rows", "steps", "chunk"])
def chunk_ends_kernel(
    product,
    bias,
    inputs,
    filter,
    alpha,
    beta,
    carries,
    decays,
    power,
    rows: tl.int64,
    steps: tl.int64,
    chunk: tl.int64,
    BIAS_STRIDE: tl.constexpr,
    ALPHA_STRIDE: tl.constexpr,
    BETA_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """For every chunk k, the state that it would end with if it began with 0, and the product of its alphas.

    The state is stored at index k + 1 of ``carries`` and the product at index k of ``decays``. The permutation of a
    whole chunk, the inverse applied once per layer, is stored in ``power``. All chunks in this launch have ``chunk``
    layers: it leaves out the last one, which may be shorter.
    """
    number, block, base, unit, present, inside = _program(rows, WIDTH, BLOCK_M, BLOCK_N)
    dtype: tl.constexpr = _scanned_in(alpha.dtype.element_ty, filter.dtype.element_ty)
    cosine = _rotation(filter, 0, unit, present)
    sine = _rotation(filter, WIDTH, unit, present)
    row_offset = tl.arange(0, BLOCK_M)[:, None] * WIDTH
    at = _first_units(filter, unit, WIDTH)
    state = tl.zeros((BLOCK_M, BLOCK_N), dtype)
    decay = tl.full((), 1, tl.float64)
    layer = steps - 1 - number * chunk if REVERSE else number * chunk
    for _ in range(0, chunk):
        scale = tl.load(alpha + layer * ALPHA_STRIDE)
        decay *= scale.to(tl.float64)
        state, at = _filtered(state, at, present, filter, cosine, sine)
        state *= scale.to(dtype)
        if product is not None or inputs is not None:
            here = layer * rows * WIDTH + base
            state += _source(
                product, bias, inputs, beta, layer, here, row_offset, at, present, inside,
                BIAS_STRIDE, BETA_STRIDE, ACTIVATION,
            ).to(dtype)  # fmt: skip
        layer += -1 if REVERSE else 1
    tl.store(carries + (number + 1) * rows * WIDTH + base + at + row_offset, state.to(tl.float64), mask=inside)
    tl.store(decays + number, decay, mask=block == 0)
    if power is not None:
        tl.store(power + _first_units(filter, unit, WIDTH), at, mask=present & (tl.program_id(0) == 0))


@triton.jit(do_not_specialize=["rows", "chunks", "chunk"])
def carry_kernel(
    initial,
    carries,
    decays,
    filter,
    inverse,
    power,
    rows: tl.int64,
    chunks: tl.int64,
    chunk: tl.int64,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The state that every chunk begins with.

    In ``carries`` it overwrites the end of the previous chunk, which chunk_ends_kernel computed from 0.
    """
    _, _, base, unit, present, inside = _program(rows, WIDTH, BLOCK_M, BLOCK_N)
    row_offset = tl.arange(0, BLOCK_M)[:, None] * WIDTH
    state = tl.load(initial + base + unit + row_offset, mask=inside, other=0.0).to(tl.float64)
    at = unit
    if inverse is not None:
        sorts = tl.min(is_permutation(filter, inverse, WIDTH, BLOCK_N).to(tl.int32), 0) == 1
        state = tl.where(sorts, state, float("nan"))
    else:
        cosine = tl.full((1, BLOCK_N), 1, tl.float64)
        sine = tl.zeros((1, BLOCK_N), tl.float64)
        cosine_square = _rotation(filter, 0, unit, present)
        sine_square = _rotation(filter, WIDTH, unit, present)
        while chunk > 0:
            if chunk % 2 == 1:
                cosine, sine = _compose(cosine_square, sine_square, cosine, sine)
            cosine_square, sine_square = _compose(cosine_square, sine_square, cosine_square, sine_square)
            chunk = chunk // 2
    place = carries + base + row_offset
    tl.store(place + at, state, mask=inside)
    for _ in tl.range(0, chunks - 1, num_stages=STAGES):
        place += rows * WIDTH
        if inverse is not None:
            at = tl.load(power + at, mask=present, other=0)
        else:
            state = cosine * state + sine * _partner(state)
        state = tl.load(decays) * state + tl.load(place + at, mask=inside, other=0.0)
        tl.store(place + at, state, mask=inside)
        decays += 1


@triton.jit(do_not_specialize=["rows", "steps", "chunk"])
def sweep_kernel(
    states,
    product,
    bias,
    inputs,
    slope,
    scaled,
    filter,
    alpha,
    beta,
    carries,
    residuals,
    rows: tl.int64,
    steps: tl.int64,
    chunk: tl.int64,
    BIAS_STRIDE: tl.constexpr,
    ALPHA_STRIDE: tl.constexpr,
    BETA_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One chunk of BLOCK_M rows from its carry: the new states, and how much they differ from the old ones."""
    number, _, base, unit, present, inside = _program(rows, WIDTH, BLOCK_M, BLOCK_N)
    element: tl.constexpr = states.dtype.element_ty
    dtype: tl.constexpr = _scanned_in(alpha.dtype.element_ty, filter.dtype.element_ty)
    cosine = _rotation(filter, 0, unit, present)
    sine = _rotation(filter, WIDTH, unit, present)
    row_offset = tl.arange(0, BLOCK_M)[:, None] * WIDTH
    at = _first_units(filter, unit, WIDTH)
    size = rows * WIDTH
    state = tl.load(carries + number * size + base + at + row_offset, mask=inside, other=0.0).to(dtype)
    first = number * chunk
    layer = steps - 1 - first if REVERSE else first
    if slope is not None:
        # The gradient that the recurrence begins with is scaled here; each chunk scales the gradients that it computes.
        here = layer * size + base
        factor = tl.load(slope + here + at + row_offset, mask=inside & (first == 0), other=0.0)
        tl.store(scaled + here + at + row_offset, factor * state.to(element), mask=inside & (first == 0))
    worst = _magnitude(tl.zeros((BLOCK_M,), element))
    # 32 bits are enough to count the layers of a chunk. With 64 bits ptxas spills for rows of MAX_WIDTH.
    for _ in range(0, min(chunk, steps - first).to(tl.int32)):
        scale = tl.load(alpha + layer * ALPHA_STRIDE).to(dtype)
        state, at = _filtered(state, at, present, filter, cosine, sine)
        state *= scale
        here = layer * size + base
        if product is not None or inputs is not None:
            state += _source(
                product, bias, inputs, beta, layer, here, row_offset, at, present, inside,
                BIAS_STRIDE, BETA_STRIDE, ACTIVATION,
            ).to(dtype)  # fmt: skip
        place = states + (here if REVERSE else here + size) + at + row_offset
        new = state.to(element)
        worst = tl.maximum(worst, _relative_change(new, tl.load(place, mask=inside, other=0.0), inside))
        tl.store(place, new, mask=inside)
        if slope is not None:
            factor = tl.load(slope + (here - size) + at + row_offset, mask=inside & (layer > 0), other=0.0)
            tl.store(scaled + (here - size) + at + row_offset, factor * new, mask=inside & (layer > 0))
        layer += -1 if REVERSE else 1
    tl.store(residuals + tl.program_id(0), tl.max(worst, 0).to(element, bitcast=True).to(tl.float64))


@triton.jit(do_not_specialize=["rows", "layers", "chunk"])
def activate_kernel(
    product,
    bias,
    inputs,
    beta,
    rows: tl.int64,
    layers: tl.int64,
    chunk: tl.int64,
    BIAS_STRIDE: tl.constexpr,
    BETA_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    number, _, base, unit, present, inside = _program(rows, WIDTH, BLOCK_M, BLOCK_N)
    row_offset = tl.arange(0, BLOCK_M)[:, None] * WIDTH
    layer = number * chunk
    for _ in range(layer, min(layer + chunk, layers)):
        here = layer * rows * WIDTH + base
        total = _pre_activation(product, bias, inputs, layer, here, row_offset, unit, present, inside, BIAS_STRIDE)
        y = activate(total, ACTIVATION)
        if DERIVATIVE:
            y = activation_slope(y, ACTIVATION)
        tl.store(product + here + unit + row_offset, tl.load(beta + layer * BETA_STRIDE) * y, mask=inside)
        layer += 1


@triton.constexpr_function
def _scanned_in(element, filter):
    """The scan's dtype: float64 for rotations, because the error of a cosine in float32 adds up over 50,000 layers."""
    return element if filter.is_int() else tl.float64


@triton.jit
def _program(rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's chunk, block of rows, offset of the block in a layer, unit of every lane, and two masks.

    A lane is a column of the tile. The masks say which lanes have a unit, and which elements have a row and a unit.
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    number = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    unit = tl.arange(0, BLOCK_N)[None, :]
    present = unit < WIDTH
    return number, block, block * BLOCK_M * WIDTH, unit, present, (row < rows) & present


@triton.jit
def _rotation(filter, FIRST: tl.constexpr, unit, present):
    """Cosines or sines by unit; None for a permutation."""
    if filter.dtype.element_ty.is_int():
        return
    else:
        return tl.load(filter + FIRST + unit, mask=present, other=0.0)


@triton.jit
def _partner(x):
    """x_{i xor 1} at index i."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(odd, even), x.shape)


@triton.jit
def _compose(cosine, sine, other_cosine, other_sine):
    """The product of two rotations."""
    return (
        cosine * other_cosine + sine * _partner(other_sine),
        cosine * other_sine + sine * _partner(other_cosine),
    )


@triton.jit
def _first_units(filter, unit, WIDTH: tl.constexpr):
    """The unit that every lane begins with. For a permutation, adjacent lanes do not begin with adjacent units.

    If they did, the compiler would choose the layout of the whole tile for wide loads of adjacent units, and then move
    the numbers between threads in every layer. For the same reason the table is loaded here in one dimension and not
    in the tile's two: loads of one shape share a layout, and the layout of this load is for adjacent units.
    """
    if filter.dtype.element_ty.is_int():
        lane = tl.arange(0, unit.shape[1])
        return tl.load(filter + lane, mask=lane < WIDTH, other=0).to(tl.int32)[None, :]
    else:
        return unit


@triton.jit
def _filtered(state, at, present, filter, cosine, sine):
    """(O h, the unit of every lane). With a permutation only the units change: the number at unit i goes to inverse_i.

    ``filter`` is then the table of the inverse.
    """
    if cosine is None:
        at = tl.load(filter + at, mask=present, other=0).to(tl.int32)
    else:
        state = cosine * state + sine * _partner(state)
    return state, at


@triton.jit
def _pre_activation(product, bias, inputs, layer, here, row_offset, at, present, inside, BIAS_STRIDE: tl.constexpr):
    """P_l + b_l + u_l without those that are None."""
    if product is None:
        total = tl.load(inputs + here + at + row_offset, mask=inside, other=0.0)
    else:
        total = tl.load(product + here + at + row_offset, mask=inside, other=0.0)
        if bias is not None:
            total += tl.load(bias + layer * BIAS_STRIDE + at, mask=present, other=0.0)
        if inputs is not None:
            total += tl.load(inputs + here + at + row_offset, mask=inside, other=0.0)
    return total


@triton.jit
def _source(
    product,
    bias,
    inputs,
    beta,
    layer,
    here,
    row_offset,
    at,
    present,
    inside,
    BIAS_STRIDE: tl.constexpr,
    BETA_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """beta_l act(A_l), or A_l itself if there is no beta."""
    total = _pre_activation(product, bias, inputs, layer, here, row_offset, at, present, inside, BIAS_STRIDE)
    if beta is None:
        return total
    else:
        return tl.load(beta + layer * BETA_STRIDE) * activate(total, ACTIVATION)


@triton.jit
def _magnitude(x):
    """The bits of |x|: integers in the same order as |x|, with NaN above infinity."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _relative_change(new, old, inside):
    """For each row the bits (_magnitude) of max_i |new_i - old_i| / max_i |new_i|; of NaN if the row is not finite."""
    # The padding may differ from 0: sigmoid(0) is 1/2.
    change = tl.max(tl.where(inside, _magnitude(new - old), 0), 1).to(new.dtype, bitcast=True)
    scale = tl.max(tl.where(inside, _magnitude(new), 0), 1).to(new.dtype, bitcast=True)
    ratio = change / tl.where(change == 0, 1.0, scale)
    return _magnitude(tl.where(scale < float("inf"), ratio, float("nan")))
