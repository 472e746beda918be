"""The recurrence over depth in parallel, with the product inside the scan: a sweep reads W once and the states once.

    h_l = alpha_l O h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l)    l = 1..D

O is a permutation of a row's N units, N is at most 64, and there are M rows (samples). parallel_depth.py has the scan
for other filters and widths, whose product is a batched matmul outside; ours.

A chunk is a range of C layers from its first state c, its carry. Within the chunk

    h_l = x_l + (alpha ... alpha) O^(l - first) c,    x_l = alpha_l O x_{l-1} + F_l,  x_first = 0

A sweep has two launches. In the first, a program takes a chunk and BLOCK_M rows. For each layer it loads x_{l-1} of the
last sweep and W_l, adds the carry of the last sweep, computes F_l and the new x_l, and stores x_l. The second launch
goes from chunk to chunk and computes the new carries. So the states of a sweep are known as x and c, and the next sweep
adds them where it loads them. Only once the carries have converged, a third launch writes the states, and measures
their largest relative change in the last sweep. The change that decides whether it is time to do so is that of the
carries: a lower bound of the states', and a contraction that is computed with it is an upper bound. The adjoint sweep
has the same form from layer D to 1, with W^T: its product is (slope_l G_l) W_l.

Bytes per number of a state, for float32 and a permutation, with M = 128 and N = 64 (W has M / N times as many numbers):

                                forward                             adjoint
    parallel_depth.py   26: 8 matmul, 2 W, 16 scan         34: 8 matmul, 2 W, 24 scan with slope
    this file           10: 4 x read, 2 W, 4 x written     14: 4 more for slope
    once per window     12: the states; 4: transposing W   20: the gradients, and slope times them

For D = 50,000 on an H200 (4.3 TB/s) these are 0.95 ms a sweep, where parallel_depth.py needs 2.5 ms. The arithmetic
takes longer. For its 8 x 32 numbers of a layer, a warp takes 1,117 instructions forward (608 of them multiply-adds, and
about 280 for tanh) and 883 in the adjoint, counted in the sm_90 code of Triton 3.7.1 with N = 64 and no u. At 0.92 T
warp instructions a second, a sweep takes 1.9 ms forward and 1.5 ms in the adjoint. A thread takes 94 and 66 registers,
so two programs of 8 warps share a multiprocessor. If N is no power of two, masks take up to 204, and there is one
program. These times are predicted, not measured: no GPU has run this yet.

Forward reads W^T, copied once per window: reading W by columns would be an 8-way bank conflict, as in
orthogonal_filter.py. x is permuted by shuffles in registers, and the carry by the addresses of its loads: row j of a
table holds the units of O^j. Products of alphas are computed in float64, and the float32 sums of a chunk begin at 0, so
that their rounding errors are those of C layers. Every sum has a fixed order. There are no atomics.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcw_ops.kernels.common import Device, activate, device_facts
from lcw_ops.kernels.parallel_depth import CARRY_STAGES, _choose_tile, _magnitude, _relative_change

# At 128 units a thread would read so often from shared memory that a sweep would take as long as with the vendor's
# matmul: 177 ns a layer, counted in the compiled code.
MAX_WIDTH = 64
# Rows of a tile, with 8 numbers per thread. With 16 numbers ptxas spills 4 KB.
MAX_ROWS = 32
# The most bytes of shared memory that a sweep may take on an NVIDIA GPU: the adjoint with three TF32 products takes
# 65,556 (Triton 3.7.1). On AMD's, a sweep takes 16 KB.
SHARED_MEMORY = 66 * 1024
# Warps that a multiprocessor holds at a time, if each thread has at most 128 registers.
WARPS_PER_PROCESSOR = 16
# Layers that one program of fused_finish_kernel computes. There, layers do not depend on each other.
FINISHED_LAYERS = 8


def takes(states: Tensor) -> bool:
    """Whether there are fused sweeps for states of this shape and dtype, on their device."""
    if states.dtype != torch.float32 or states.shape[-1] > MAX_WIDTH or states.numel() == 0:
        return False
    device = device_facts(states.device)
    return device.matrix_units or device.shared_memory >= SHARED_MEMORY


class Sweeps:
    """The sweeps of one window. All tensors are contiguous and in float32, except for ``index``.

    Args:
        first: the state from which the window starts, (M, N). With ``reverse``, the gradient of its last state.
        states: memory for the D other states (D, M, N), which :meth:`finish` fills.
        spare: as much memory, which holds no result.
        matrix: W_l^T, or W_l with ``reverse``; (D, N, N), or (N, N) for all layers.
        bias, alpha, beta: as for ``lcw_ops.reference.parallel_depth.sweep_``. No bias and beta with ``reverse``.
        added: the inputs u (D, M, N); with ``reverse``, the gradients that the states receive from outside; or None.
        slope: with ``reverse``, beta_l act'(A_l), (D, M, N).
        index: the permutation that is applied: that of O, or with ``reverse`` that of O^T; int64 (N,), valid indices.
    """

    def __init__(self, first, states, spare, matrix, bias, added, slope, index, alpha, beta, activation, reverse):
        self._steps, rows, width = states.shape
        device = device_facts(states.device)
        launch = choose_launch(width, rows, device)
        self._blocks = triton.cdiv(rows, launch["BLOCK_M"])
        self._chunk = choose_chunk(self._steps, self._blocks, launch["num_warps"], device.processors)
        self._chunks = triton.cdiv(self._steps, self._chunk)
        self._first, self._states, self._spare, self._slope = first, states, spare, slope
        # The decay of a layer is the product of the alphas of its chunk up to this layer.
        alphas = alpha.double().expand(self._steps)
        padded = alphas.new_ones(self._chunks * self._chunk)
        padded[: self._steps] = alphas.flip(0) if reverse else alphas
        self._decay = padded.view(self._chunks, self._chunk).cumprod(1)
        # Row j of the first table has the units of O^j, and row j of the second those of its inverse.
        self._powers, self._inverses = index.new_empty((2, self._chunk + 1, width), dtype=torch.int32)
        self._rest = {"bias": bias, "added": added, "slope": slope, "index": index, "alpha": alpha, "beta": beta}
        self._lengths = {"rows": rows, "steps": self._steps, "chunk": self._chunk}
        self._options = launch | {
            "MATRIX_STRIDE": width * width if matrix.dim() == 3 else 0,
            "BIAS_STRIDE": width if bias is not None and bias.dim() == 2 else 0,
            "ALPHA_STRIDE": int(alpha.numel() != 1),
            "BETA_STRIDE": int(beta is not None and beta.numel() != 1),
            "ACTIVATION": activation,
            "REVERSE": reverse,
            "WIDTH": width,
        }
        self._matrix, self._reverse, self._width = matrix, reverse, width
        self._tile = _choose_tile(width, rows)
        starts = states.new_zeros((2, self._chunks + 1, rows, width))
        # The states of the last sweep, and of the one before: x (None: it is 0), the carries, and the decays.
        self._now, self._before = (None, starts[0], self._decay), (None, starts[1], self._decay)
        with torch.cuda.device_of(states):
            tables = self._powers, self._inverses
            powers_kernel[(1,)](index, *tables, self._chunk, WIDTH=width, BLOCK_N=self._tile["BLOCK_N"])
            self._carry(None, starts[0], starts[1])
        if reverse and added is not None:
            self._run(None)

    def sweep(self) -> Tensor:
        """Make one sweep.

        Returns:
            The largest relative change of a row among the states with which chunks begin and the last state; (1,) in
            float64. It is at most that of all states.
        """
        return self._run(self._matrix)

    def finish(self, scaled: Tensor | None = None) -> Tensor:
        """Write the states of the last sweep. With ``reverse``, scaled_l <- slope_l G_l.

        At least one sweep must have been made, and more may follow.

        Returns:
            The largest relative change of a row in the last sweep, max_i |new_i - old_i| / max_i |new_i|; (1,) in
            float64.
        """
        (x, starts, decay), (old_x, old_starts, old_decay) = self._now, self._before
        groups, blocks = triton.cdiv(self._steps, FINISHED_LAYERS), triton.cdiv(len(self._first), self._tile["BLOCK_M"])
        residuals = self._decay.new_zeros(groups * blocks)
        with torch.cuda.device_of(self._states):
            fused_finish_kernel[(groups * blocks,)](
                self._states, self._first, x, starts, decay, self._states if old_x is None else old_x, old_starts,
                old_decay, int(old_x is not None), self._powers, self._slope, scaled, residuals, **self._lengths,
                LAYERS=FINISHED_LAYERS, REVERSE=self._reverse, WIDTH=self._width, **self._tile,
            )  # fmt: skip
        # ``states`` now holds whole states, to which no carry is added.
        self._now = self._states, starts, torch.zeros_like(self._decay)
        return residuals.amax(0, keepdim=True)

    def _run(self, matrix: Tensor | None) -> Tensor:
        x, starts, decay = self._now
        free = self._spare if x is self._states else self._states
        with torch.cuda.device_of(self._states):
            fused_sweep_kernel[(self._chunks * self._blocks,)](
                free, free if x is None else x, int(x is not None), starts, decay, self._powers, matrix, **self._rest,
                **self._lengths, **self._options,
            )  # fmt: skip
            other = self._before[1]
            change = self._carry(free, other, starts)
        self._now, self._before = (free, other, self._decay), self._now
        return change

    def _carry(self, x: Tensor | None, starts: Tensor, old_starts: Tensor) -> Tensor:
        blocks = triton.cdiv(len(self._first), self._tile["BLOCK_M"])
        residuals = self._decay.new_zeros(blocks)
        fused_carry_kernel[(blocks,)](
            self._first, self._states if x is None else x, int(x is not None), starts, old_starts, self._decay,
            self._inverses, residuals, self._chunks, **self._lengths, REVERSE=self._reverse, WIDTH=self._width,
            STAGES=CARRY_STAGES, **self._tile,
        )  # fmt: skip
        return residuals.amax(0, keepdim=True)


def choose_launch(width: int, rows: int, device: Device) -> dict:
    """Tile, warps and stages of a sweep."""
    block_n = max(16, triton.next_power_of_2(width))
    # Matrix units take 16 rows at a time. Multiply-adds of fewer than 4 rows would wait for the matrix.
    least_rows = 16 if device.matrix_units else 4
    block_m = min(MAX_ROWS, max(least_rows, triton.next_power_of_2(rows)))
    # The user lets torch's matmul use TF32. Three TF32 products are nearly as exact as one in float32. With 16 rows,
    # Triton 3.6.0 spills 8 bytes in the adjoint on sm_80.
    is_split = block_m == MAX_ROWS and not device.matrix_units and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        # One copy of each tile is in flight while the layer before is computed. Without copies, Triton 3.6.0 spills 2
        # KB forward, and 3.7.1 spills 2 KB in the adjoint if the rows are padded. AMD's would need more registers.
        "STAGES": 1 if device.matrix_units else 2,
        "PRECISION": "tf32x3" if is_split else "ieee",
        "num_warps": max(1, block_n * max(block_m, 16) // (512 if device.matrix_units else 256)),
    }


def choose_chunk(steps: int, blocks: int, num_warps: int, processors: int) -> int:
    """Layers per chunk, if a layer takes ``blocks`` programs.

    All chunks run at the same time, and there are at most as many as the square root of the number of layers: the
    carries are computed one after another.
    """
    programs = processors * (WARPS_PER_PROCESSOR // num_warps)
    return triton.cdiv(steps, max(1, min(programs // blocks, math.isqrt(steps))))


@triton.jit(do_not_specialize=["chunk"])
def powers_kernel(index, powers, inverses, chunk: tl.int64, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row j of ``powers`` <- the units of O^j, and row j of ``inverses`` <- the inverse permutation; j = 0..chunk."""
    unit = tl.arange(0, BLOCK_N)
    present = unit < WIDTH
    at = unit
    tl.store(powers + unit, at, mask=present)
    tl.store(inverses + unit, at, mask=present)
    for _ in range(0, chunk):
        powers += WIDTH
        inverses += WIDTH
        at = tl.load(index + at, mask=present, other=0).to(tl.int32)
        tl.store(powers + unit, at, mask=present)
        tl.store(inverses + at, unit, mask=present)


@triton.jit(do_not_specialize=["rows", "steps", "chunk", "known"])
def fused_sweep_kernel(
    x,
    old_x,
    known: tl.int32,
    starts,
    decay,
    powers,
    matrix,
    bias,
    added,
    slope,
    index,
    alpha,
    beta,
    rows: tl.int64,
    steps: tl.int64,
    chunk: tl.int64,
    MATRIX_STRIDE: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
    ALPHA_STRIDE: tl.constexpr,
    BETA_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x of one chunk of BLOCK_M rows, from the x, carries and decays of the last sweep. ``known`` is 0 if x was 0.

    Without ``matrix``, F_l is what is added from outside.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    blocks = tl.cdiv(rows, BLOCK_M)
    number = tl.program_id(0) // blocks
    first = number * chunk
    block = tl.program_id(0) % blocks
    row = tl.arange(0, BLOCK_M)[:, None]
    unit = tl.arange(0, BLOCK_N)
    present = unit < WIDTH
    inside = (row < rows - block * BLOCK_M) & present[None, :]
    tile = row * WIDTH + unit[None, :]
    size = rows * WIDTH
    base = block * BLOCK_M * WIDTH
    start = starts + (number * size + base) + row * WIDTH
    turn = tl.broadcast_to(tl.load(index + unit, mask=present, other=0).to(tl.int32)[None, :], (BLOCK_M, BLOCK_N))
    kept = _kept(matrix, MATRIX_STRIDE, WIDTH, BLOCK_N)
    before = 1 if REVERSE else -1
    partial = tl.zeros((BLOCK_M, BLOCK_N), dtype)
    for j in tl.range(0, min(chunk, steps - first).to(tl.int32), num_stages=STAGES):
        layer = steps - 1 - first - j if REVERSE else first + j
        here = layer * size + base
        if matrix is None:
            source = tl.load(added + here + tile, mask=inside, other=0.0)
        else:
            at = tl.load(powers + j * WIDTH + unit, mask=present, other=0)
            factor = tl.load(decay + first + j - 1, mask=j > 0, other=1.0).to(dtype)
            state = factor * tl.load(start + at[None, :], mask=inside, other=0.0)
            state += tl.load(old_x + (here + before * size) + tile, mask=inside & ((j > 0) & (known > 0)), other=0.0)
            if REVERSE:
                state *= tl.load(slope + here + tile, mask=inside, other=0.0)
            weight = kept if MATRIX_STRIDE == 0 else _load_matrix(matrix + layer * MATRIX_STRIDE, WIDTH, BLOCK_N)
            source = tl.dot(state, weight, input_precision=PRECISION, out_dtype=dtype)
            if bias is not None:
                source += tl.load(bias + layer * BIAS_STRIDE + unit, mask=present, other=0.0)[None, :]
            if added is not None:
                source += tl.load(added + here + tile, mask=inside, other=0.0)
            if not REVERSE:
                source = tl.load(beta + layer * BETA_STRIDE) * activate(source, ACTIVATION)
        partial = tl.load(alpha + layer * ALPHA_STRIDE) * tl.gather(partial, turn, 1) + source
        tl.store(x + here + tile, partial, mask=inside)


@triton.jit(do_not_specialize=["rows", "steps", "chunk", "chunks", "known"])
def fused_carry_kernel(
    initial,
    x,
    known: tl.int32,
    starts,
    old_starts,
    decay,
    inverses,
    residuals,
    chunks: tl.int64,
    rows: tl.int64,
    steps: tl.int64,
    chunk: tl.int64,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The carry of every chunk, the state after the last chunk, and their largest relative change.

    No number changes its lane (column of the tile): a lane looks up to which unit its number belongs now.
    """
    dtype: tl.constexpr = starts.dtype.element_ty
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    at = tl.arange(0, BLOCK_N)[None, :]
    present = at < WIDTH
    inside = (row < rows) & present
    row_offset = row.to(tl.int64) * WIDTH
    size = rows * WIDTH
    carry = tl.load(initial + row_offset + at, mask=inside, other=0.0).to(tl.float64)
    tl.store(starts + row_offset + at, carry.to(dtype), mask=inside)
    worst = _magnitude(tl.zeros((BLOCK_M,), dtype))
    for number in tl.range(0, chunks.to(tl.int32), num_stages=STAGES):
        last = tl.minimum((number + 1) * chunk, steps) - 1
        at = tl.load(inverses + (last + 1 - number * chunk) * WIDTH + at, mask=present, other=0)
        layer = steps - 1 - last if REVERSE else last
        carry = tl.load(decay + last) * carry
        carry += tl.load(x + layer * size + row_offset + at, mask=inside & (known > 0), other=0.0).to(tl.float64)
        new = carry.to(dtype)
        place = (number + 1) * size + row_offset + at
        old = tl.load(old_starts + place, mask=inside, other=0.0)
        worst = tl.maximum(worst, _relative_change(new, old, inside))
        tl.store(starts + place, new, mask=inside)
    tl.store(residuals + tl.program_id(0), tl.max(worst, 0).to(dtype, bitcast=True).to(tl.float64))


@triton.jit(do_not_specialize=["rows", "steps", "chunk", "known"])
def fused_finish_kernel(
    states,
    initial,
    x,
    starts,
    decay,
    old_x,
    old_starts,
    old_decay,
    known: tl.int32,
    powers,
    slope,
    scaled,
    residuals,
    rows: tl.int64,
    steps: tl.int64,
    chunk: tl.int64,
    LAYERS: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The states of LAYERS layers of BLOCK_M rows, and their largest relative change. ``states`` may be x or old_x."""
    dtype: tl.constexpr = states.dtype.element_ty
    blocks = tl.cdiv(rows, BLOCK_M)
    block = tl.program_id(0) % blocks
    row = tl.arange(0, BLOCK_M)[:, None]
    unit = tl.arange(0, BLOCK_N)[None, :]
    present = unit < WIDTH
    inside = (row < rows - block * BLOCK_M) & present
    size = rows * WIDTH
    base = block * BLOCK_M * WIDTH
    row_offset = row * WIDTH
    tile = row_offset + unit
    begin = tl.program_id(0) // blocks * LAYERS
    worst = _magnitude(tl.zeros((BLOCK_M,), dtype))
    for position in range(begin, min(begin + LAYERS, steps)):
        layer = steps - 1 - position if REVERSE else position
        here = layer * size + base
        number = position // chunk
        at = tl.load(powers + (position - number * chunk + 1) * WIDTH + unit, mask=present, other=0)
        start = number * size + base
        turned = row_offset + at
        new = tl.load(decay + position).to(dtype) * tl.load(starts + start + turned, mask=inside, other=0.0)
        new += tl.load(x + here + tile, mask=inside, other=0.0)
        old = tl.load(old_decay + position).to(dtype) * tl.load(old_starts + start + turned, mask=inside, other=0.0)
        old += tl.load(old_x + here + tile, mask=inside & (known > 0), other=0.0)
        worst = tl.maximum(worst, _relative_change(new, old, inside))
        tl.store(states + here + tile, new, mask=inside)
        if scaled is not None:
            if position == 0:
                state = tl.load(initial + base + tile, mask=inside, other=0.0)
                factor = tl.load(slope + here + tile, mask=inside, other=0.0)
                tl.store(scaled + here + tile, factor * state, mask=inside)
            below = inside & (layer > 0)
            factor = tl.load(slope + (here - size) + tile, mask=below, other=0.0)
            tl.store(scaled + (here - size) + tile, factor * new, mask=below)
    tl.store(residuals + tl.program_id(0), tl.max(worst, 0).to(dtype, bitcast=True).to(tl.float64))


@triton.jit
def _kept(matrix, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """A matrix that all layers share, on chip for the whole loop; else None."""
    if matrix is None or STRIDE != 0:
        return
    else:
        return _load_matrix(matrix, WIDTH, BLOCK_N)


@triton.jit
def _load_matrix(matrix, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    if WIDTH == BLOCK_N:
        return tl.load(matrix + (row * WIDTH + column))
    else:
        return tl.load(matrix + (row * WIDTH + column), mask=(row < WIDTH) & (column < WIDTH), other=0.0)
