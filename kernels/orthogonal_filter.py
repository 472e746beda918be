"""The orthogonal-filter recurrence in Triton: all layers in one launch, and the gradients in one launch per segment.

    h_l = alpha_l O_l h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l)
    P_l = beta_l act'(A_l) * G_l      G_{l-1} = alpha_l G_l O_l + P_l W_l      dW_l = P_l^T h_{l-1}

The state h has M rows (samples) of N units. O_l is the filter, and u_l the input of layer l, if there is one. A_l is
the argument of act; G_l and P_l are the gradients of h_l and A_l. A segment has the layers from one checkpoint, a state
that forward keeps, to the next.

A program carries a tile of R rows through the layers. Cost per layer: like every other program, it reads N^2 weights,
through the second-level cache. It takes 4 R N^2 operations forward (2 R N^2 with a permutation), twice as many
backward, and 2 R N^2 for dW. Layers run one after another, so the total time is that of one layer in one program, times
the number of layers. It consists of the time for issuing instructions, and of latency.
Instructions per warp and layer, counted in the sm_90 code (backward: recomputing + gradient), for a dense O shared by
all layers. A scheduler has one warp at N = 64 and two warps at N = 128:
    R = 4, N = 64: 455 forward, 485 + 444 backward        R = 4, N = 128: 806 forward, 854 + 833 backward
    R = 2, N = 128, over time (W shared, with inputs): 430 forward, 457 + 444 backward
Cycles of shared memory per layer and program, from the addresses in the PTX (tests/aot/bank_conflicts.py):
    R = 4, N = 64: 652 forward, 692 + 816 backward        R = 4, N = 128: 2,584 forward, 2,664 + 3,168 backward
    R = 2, N = 128, over time: 2,320 forward, 2,344 + 2,600 backward
Times on an H200 at 1.8 GHz are predicted, not measured. To the time for issuing the instructions, latency and barriers
are assumed to add as much again if a scheduler has one warp, and half as much if it has two; a layer takes at least the
cycles of shared memory. With M = 128 a layer takes 0.5 us forward and 1.1 us backward with dW at N = 64, and 1.5 us and
3.4 us at N = 128. Over time, with M = 64 and N = 128, a step takes 1.3 us forward.

Every product reads its matrix by rows: W^T and O^T where states are computed, W and O where gradients are. If the
compiler transposed W in shared memory, the threads of a warp would read from rows of 4 N bytes, that is, 8 times from
the same banks: 4,236 cycles a layer forward at N = 64. So the launcher transposes: matrices that all layers share once
per call, and others before every launch. Forward has a launch per MOST_TRANSPOSED_BYTES of them. A 16-bit W is widened
in the same copy. These copies read and write 4 N^2 bytes a layer each, 8 ns at N = 64 from memory.

Registers hold the state and G. Shared memory holds every matrix that all layers share, for the whole launch. It also
holds W_l and the other arguments that change with l, which are copied asynchronously up to two layers ahead. On sm_90 a
thread has 54 registers and a program 50 KB of shared memory forward at N = 64; backward, these are 62 and 52 KB at
N = 64, and 48 and 200 KB at N = 128, without spills. The tests print these figures.

float32 products are multiply-adds, not TF32: a tile would use only 4 of a tensor core's 16 rows, and 3xTF32 (three TF32
products, nearly as exact as one of float32) takes 747 instructions. 3xTF32 is used if tiles have 16 rows and the user
lets torch's matmul use TF32.
A permutation is a gather inside the tile, by shuffles or through shared memory: at N = 64, 4 shuffles replace 128 of
the 278 multiply-adds per thread and layer. A product with a 0/1 matrix would be exact too, but would cost all 128.
Every sum has a fixed order, without atomics. tanh and sigmoid are computed as in csrc/cpu, with an error under 4 ulp if
basic operations are correctly rounded. On CUDA, whose float32 division is approximate, it is up to 2 ulp larger.
A. Ceni, arXiv 2210.01245 (forward); backward in the same notation as lcw_ops/reference/orthogonal_filter.py.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcw_ops.kernels.common import Device, activate, activation_slope, device_facts, is_permutation

# The most bytes of transposed matrices that one forward launch reads. Half of an H200's second-level cache holds them,
# so that the launch reads them from there. At N = 64 these are 1,536 layers, beside which a launch takes no time.
MOST_TRANSPOSED_BYTES = 24 << 20


def orthogonal_filter(
    h0: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    filter: Tensor,
    alpha: Tensor,
    beta: Tensor,
    inputs: Tensor | None,
    steps: int,
    activation: str,
    segment: int,
    return_states: bool,
) -> tuple[Tensor, Tensor]:
    """(output, checkpoints) as ``lcw_ops::orthogonal_filter`` returns them. Does not check its arguments.

    The state is float32 or float64; weight may be bfloat16 or float16 with a float32 state.
    """
    rows, width = h0.shape
    segment = min(segment, max(steps, 1))
    output = h0.new_empty((steps + 1, rows, width) if return_states else (rows, width))
    checkpoints = h0.new_empty((triton.cdiv(steps, segment) if segment else 0, rows, width))
    if output.numel() == 0:
        return output, checkpoints
    recurrence = _Recurrence(h0, weight, bias, filter, alpha, beta, inputs, activation)
    state, between = h0.contiguous(), segment or max(steps, 1)
    for first, end in recurrence.launches(steps, between):
        with torch.cuda.device_of(h0):
            orthogonal_filter_kernel[recurrence.grid](
                state,
                **recurrence.arguments(first, end),
                **recurrence.transposes(first, end),
                output=output[first:] if return_states else output,
                checkpoints=checkpoints[first // segment :] if segment and first % segment == 0 else None,
                rows=rows,
                steps=end - first,
                segment=between,
                RETURN_STATES=return_states,
                **recurrence.options,
            )
        state = output[end] if return_states else output
    return output, checkpoints


def orthogonal_filter_backward(
    grad_output: Tensor,
    checkpoints: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    filter: Tensor,
    alpha: Tensor,
    beta: Tensor,
    inputs: Tensor | None,
    steps: int,
    activation: str,
    segment: int,
    needs_weight: bool,
    needs_bias: bool,
    needs_scales: bool,
    needs_inputs: bool,
    needs_states: bool,
) -> tuple[Tensor, ...]:
    """The seven gradients of ``lcw_ops::orthogonal_filter_backward``. Does not check its arguments."""
    grad_output, checkpoints = grad_output.contiguous(), checkpoints.contiguous()
    rows, width = grad_output.shape[-2:]
    segment = min(segment, max(steps, 1))
    count = min(segment, steps)
    gradient = (grad_output[steps] if grad_output.dim() == 3 else grad_output).clone()
    # A gradient that is not needed is empty, in the dtype of its argument.
    grad_inputs = (weight if inputs is None else inputs).new_empty((steps, rows, width) if needs_inputs else 0)
    grad_states = gradient.new_empty((steps + 1, rows, width) if needs_states else 0)
    grad_weight = _ParameterGradient(weight, 2, rows) if needs_weight else None
    grad_bias = _ParameterGradient(bias, 1, rows) if needs_bias else None
    states, activated = (gradient.new_empty((count, rows, width)) for _ in range(2))
    grad_pre = None if needs_inputs else torch.empty_like(states)
    recurrence = _Recurrence(gradient, weight, bias, filter, alpha, beta, inputs, activation)
    product_shape = (steps if needs_scales else 0, *recurrence.grid)
    alpha_products, beta_products = (gradient.new_zeros(product_shape, dtype=torch.float64) for _ in range(2))
    # One launch per segment, so that the P_l and h_{l-1} of only one segment are stored. dW_l is their product.
    for first in reversed(range(0, steps if gradient.numel() else 0, segment)):
        end = min(first + segment, steps)
        delta = grad_inputs[first:end] if needs_inputs else grad_pre[: end - first]
        with torch.cuda.device_of(gradient):
            orthogonal_filter_backward_kernel[recurrence.grid](
                checkpoints[first // segment],
                **recurrence.arguments(first, end),
                **recurrence.matrices(first, end),
                **recurrence.transposes(first, end),
                grad_output=grad_output[first:] if grad_output.dim() == 3 else None,
                gradient=gradient,
                states=states,
                activated=activated,
                grad_pre=delta,
                grad_states=grad_states[first:] if needs_states else None,
                alpha_products=alpha_products[first:] if needs_scales else None,
                beta_products=beta_products[first:] if needs_scales else None,
                rows=rows,
                count=end - first,
                **recurrence.options,
            )
        if grad_weight is not None:
            grad_weight.add_products(first, delta, states[: end - first])
        if grad_bias is not None:
            grad_bias.add_sums(first, delta)
    if needs_states:
        grad_states[0] = gradient
    return (
        gradient,
        grad_weight.result() if needs_weight else weight.new_empty(0),
        grad_bias.result() if needs_bias else (weight if bias is None else bias).new_empty(0),
        _sum_products(alpha_products, alpha) if needs_scales else alpha.new_empty(0),
        _sum_products(beta_products, beta) if needs_scales else beta.new_empty(0),
        grad_inputs,
        grad_states,
    )


class _Recurrence:
    """The arguments that both kernels share, made contiguous, and the options of the launch."""

    def __init__(self, state, weight, bias, filter, alpha, beta, inputs, activation):
        rows, width = state.shape
        permutes = not filter.is_floating_point()
        self._vectors = {
            "bias": None if bias is None else bias.contiguous(),
            "alpha": alpha.contiguous(),
            "beta": beta.contiguous(),
            "inputs": None if inputs is None else inputs.contiguous(),
        }
        self._permutations = {
            "permutation": filter.contiguous() if permutes else None,
            "inverse": filter.argsort() if permutes else None,
        }
        self._dtype, self._shared = state.dtype, {}
        self._matrices = {"weight": weight, "filter": None if permutes else filter}
        strides = {
            "WEIGHT_STRIDE": width * width if weight.dim() == 3 else 0,
            "BIAS_STRIDE": width if bias is not None and bias.dim() == 2 else 0,
            "FILTER_STRIDE": width * width if filter.dim() == 3 else 0,
            "ALPHA_STRIDE": int(alpha.numel() != 1),
            "BETA_STRIDE": int(beta.numel() != 1),
        }
        self._per_layer = {name.removesuffix("_STRIDE").lower() for name, stride in strides.items() if stride}
        self._per_layer.add("inputs")
        self._changing = (weight.dim() == 3) + (filter.dim() == 3)
        kept = 2 - permutes - self._changing
        allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        device = device_facts(state.device)
        launch = choose_launch(width, state.itemsize, rows, self._changing, kept, allow_tf32, device)
        self.options = strides | launch | {"PERMUTES": permutes, "ACTIVATION": activation, "WIDTH": width}
        self.grid = (triton.cdiv(rows, launch["BLOCK_M"]),)

    def launches(self, steps: int, segment: int) -> Iterator[tuple[int, int]]:
        """(first layer, end) of every forward launch: whole segments or, if a segment is too long, a part of one."""
        layer_bytes = self._changing * self.options["WIDTH"] ** 2 * self._dtype.itemsize
        most = MOST_TRANSPOSED_BYTES // layer_bytes if layer_bytes else max(steps, 1)
        length = segment * max(1, most // segment)
        for begin in range(0, max(steps, 1), length):
            for first in range(begin, max(min(begin + length, steps), 1), most):
                yield first, min(first + most, begin + length, steps)

    def arguments(self, first: int, end: int) -> dict:
        """The arguments of layers first to end - 1, without the matrices."""
        return self._permutations | {
            name: vector[first:end] if vector is not None and name in self._per_layer else vector
            for name, vector in self._vectors.items()
        }

    def matrices(self, first: int, end: int) -> dict:
        """W_l and O_l of these layers in the state's dtype, to which a 16-bit W_l is widened."""
        return {name: self._laid_out(name, first, end, transpose=False) for name in self._matrices}

    def transposes(self, first: int, end: int) -> dict:
        return {f"transposed_{name}": self._laid_out(name, first, end, transpose=True) for name in self._matrices}

    def _laid_out(self, name: str, first: int, end: int, transpose: bool) -> Tensor | None:
        """Copy a matrix, or those of all these layers, unless it already has the layout and the dtype."""
        matrix = self._matrices[name]
        if matrix is None:
            return None
        if name not in self._per_layer:
            if (name, transpose) not in self._shared:
                self._shared[name, transpose] = self._contiguous(matrix.mT if transpose else matrix)
            return self._shared[name, transpose]
        return self._contiguous(matrix[first:end].mT if transpose else matrix[first:end])

    def _contiguous(self, matrix: Tensor) -> Tensor:
        if matrix.dtype == self._dtype:
            return matrix.contiguous()
        # One pass, where to() and contiguous() would take two.
        return torch.empty(matrix.shape, dtype=self._dtype, device=matrix.device).copy_(matrix)


class _ParameterGradient:
    """The gradient of a parameter: an entry per layer, or one entry for all layers, which is summed in float64."""

    def __init__(self, parameter: Tensor, shared_dim: int, rows: int):
        self._parameter = parameter
        self._shared = parameter.dim() == shared_dim
        if self._shared:
            self._gradient = torch.zeros_like(parameter, dtype=torch.float64)
        else:
            # `_add` fills the entries of a segment after its launch. Without rows nothing is launched, and all are 0.
            self._gradient = parameter.new_empty(parameter.shape) if rows else parameter.new_zeros(parameter.shape)

    def add_products(self, first: int, delta: Tensor, states: Tensor) -> None:
        """dW_l = P_l^T h_{l-1}, in TF32 only if the user lets torch's matmul use it.

        The gradient of a shared W is the sum of the dW_l, in float64: a single product over the rows of all layers
        would have twice the error.
        """
        self._add(first, torch.bmm(delta.mT, states))

    def add_sums(self, first: int, delta: Tensor) -> None:
        self._add(first, delta.sum(1, dtype=torch.float64))

    def _add(self, first: int, per_layer: Tensor) -> None:
        if self._shared:
            self._gradient += per_layer.sum(0, dtype=torch.float64)
        else:
            self._gradient[first : first + len(per_layer)] = per_layer

    def result(self) -> Tensor:
        return self._gradient.to(self._parameter.dtype)


def _sum_products(products: Tensor, scale: Tensor) -> Tensor:
    """The gradient of alpha or beta: products summed over the rows, and over the steps if they share ``scale``.

    The sum is in float64 until the last rounding.
    """
    shared = scale.numel() == 1
    return products.sum((0, 1) if shared else 1).reshape(scale.shape).to(scale.dtype)


def choose_launch(
    width: int,
    itemsize: int,
    rows: int,
    per_layer: int,
    kept: int,
    allow_tf32: bool,
    device: Device,
) -> dict:
    """Tile, warps and stages if ``per_layer`` matrices are read in every layer and ``kept`` matrices stay on chip."""
    block_n = max(16, triton.next_power_of_2(width))
    # Take the fewest rows with which every program has a multiprocessor of its own, because a layer takes as long as
    # one tile does. With fewer than 4 rows, too many programs would read W_l through the second-level cache. 2 rows are
    # enough if no matrix is read in every layer.
    smallest = 16 if device.matrix_units else 4 if per_layer else 2
    largest = 16 if device.matrix_units else min(16, 1024 // block_n)
    block_m = smallest
    while block_m < largest and triton.cdiv(rows, block_m) > device.processors:
        block_m *= 2
    precision = "ieee"
    # A thread has two elements of the tile, and more from 8 rows on: a block's registers are enough for no more warps.
    num_warps = min(block_n * max(block_m, 4) // 64, block_n // 8)
    if device.matrix_units:
        num_warps = block_n // 16
    elif block_m == 16 and itemsize == 4 and allow_tf32:
        # The user lets torch's matmul use TF32. Three TF32 products are nearly as exact as one in float32, and fast for
        # large batches.
        precision, num_warps = "tf32x3", block_n // 16
    matrix, tile = block_n * block_n * itemsize, block_n * block_m * itemsize
    # Without pipeline stages, AMD's compiler holds one matrix at a time in shared memory, and NVIDIA's holds all.
    needed = matrix if device.matrix_units else (kept + per_layer) * matrix + 2 * tile
    if needed > device.shared_memory:
        raise ValueError(
            f"orthogonal_filter: width is {width}, which needs {needed / 1024:.0f} KB of shared memory in triton; "
            f"expected at most {device.shared_memory / 1024:.0f} KB on this GPU. "
            "Use lcw_ops.use_backend('cuda') or 'reference'"
        )
    stages = 3
    # Shared memory holds stages - 1 copies of a pipelined matrix. Three tiles per stage are reserved for the pipelined
    # tiles and for those that threads exchange.
    while stages > 1:
        if (kept + per_layer * (stages - 1)) * matrix + 3 * stages * tile <= device.shared_memory:
            break
        stages -= 1
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "STAGES": stages,
        "PRECISION": precision,
        "num_warps": max(1, num_warps),
    }


@triton.jit(do_not_specialize=["rows", "steps", "segment"])
def orthogonal_filter_kernel(
    h0,
    transposed_weight,
    bias,
    transposed_filter,
    permutation,
    inverse,
    alpha,
    beta,
    inputs,
    output,
    checkpoints,
    rows: tl.int64,
    steps: tl.int64,
    segment: tl.int64,
    WEIGHT_STRIDE: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
    FILTER_STRIDE: tl.constexpr,
    ALPHA_STRIDE: tl.constexpr,
    BETA_STRIDE: tl.constexpr,
    PERMUTES: tl.constexpr,
    RETURN_STATES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Carries BLOCK_M rows through all layers. The pointers advance with every layer."""
    tile, inside = _tile(rows, WIDTH, BLOCK_M, BLOCK_N)
    size = rows * WIDTH
    state = tl.load(h0 + tile, mask=inside, other=0.0)
    if PERMUTES:
        index = _load_index(permutation, WIDTH, BLOCK_M, BLOCK_N)
        # A wrong permutation gives NaN. Checking it on the host would make the host wait for the device.
        state = tl.where(is_permutation(permutation, inverse, WIDTH, BLOCK_N)[None, :], state, float("nan"))
    else:
        index = None
    kept_weight = _kept_matrix(transposed_weight, WEIGHT_STRIDE, WIDTH, BLOCK_N)
    kept_filter = _kept_matrix(transposed_filter, FILTER_STRIDE, WIDTH, BLOCK_N)
    if RETURN_STATES:
        tl.store(output + tile, state, mask=inside)
        output += size
    for first in range(0, steps, segment):
        if checkpoints is not None:
            tl.store(checkpoints + tile, state, mask=inside)
            checkpoints += size
        for _ in tl.range(first, min(first + segment, steps), num_stages=STAGES):
            _, state = _step(
                state,
                _matrix(transposed_weight, kept_weight, WIDTH, BLOCK_N),
                bias,
                _matrix(transposed_filter, kept_filter, WIDTH, BLOCK_N),
                index,
                alpha,
                beta,
                inputs,
                tile,
                inside,
                ACTIVATION,
                WIDTH,
                PRECISION,
            )
            if RETURN_STATES:
                tl.store(output + tile, state, mask=inside)
                output += size
            transposed_weight += WEIGHT_STRIDE
            if bias is not None:
                bias += BIAS_STRIDE
            if transposed_filter is not None:
                transposed_filter += FILTER_STRIDE
            alpha += ALPHA_STRIDE
            beta += BETA_STRIDE
            if inputs is not None:
                inputs += size
    if not RETURN_STATES:
        tl.store(output + tile, state, mask=inside)


@triton.jit(do_not_specialize=["rows", "count"])
def orthogonal_filter_backward_kernel(
    checkpoint,
    weight,
    transposed_weight,
    bias,
    filter,
    transposed_filter,
    permutation,
    inverse,
    alpha,
    beta,
    inputs,
    grad_output,
    gradient,
    states,
    activated,
    grad_pre,
    grad_states,
    alpha_products,
    beta_products,
    rows: tl.int64,
    count: tl.int64,
    WEIGHT_STRIDE: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
    FILTER_STRIDE: tl.constexpr,
    ALPHA_STRIDE: tl.constexpr,
    BETA_STRIDE: tl.constexpr,
    PERMUTES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recompute the h_l and act(A_l) of a segment for BLOCK_M rows, then propagate G back. Stores P_l and h_{l-1}."""
    tile, inside = _tile(rows, WIDTH, BLOCK_M, BLOCK_N)
    size = rows * WIDTH
    state = tl.load(checkpoint + tile, mask=inside, other=0.0)
    if PERMUTES:
        index = _load_index(permutation, WIDTH, BLOCK_M, BLOCK_N)
        inverse_index = _load_index(inverse, WIDTH, BLOCK_M, BLOCK_N)
    else:
        index = None
    dtype: tl.constexpr = state.dtype
    kept_weight = _kept_matrix(transposed_weight, WEIGHT_STRIDE, WIDTH, BLOCK_N)
    kept_filter = _kept_matrix(transposed_filter, FILTER_STRIDE, WIDTH, BLOCK_N)
    for _ in tl.range(0, count, num_stages=STAGES):
        tl.store(states + tile, state, mask=inside)
        y, state = _step(
            state,
            _matrix(transposed_weight, kept_weight, WIDTH, BLOCK_N),
            bias,
            _matrix(transposed_filter, kept_filter, WIDTH, BLOCK_N),
            index,
            alpha,
            beta,
            inputs,
            tile,
            inside,
            ACTIVATION,
            WIDTH,
            PRECISION,
        )
        tl.store(activated + tile, y, mask=inside)
        states += size
        activated += size
        transposed_weight += WEIGHT_STRIDE
        if bias is not None:
            bias += BIAS_STRIDE
        if transposed_filter is not None:
            transposed_filter += FILTER_STRIDE
        alpha += ALPHA_STRIDE
        beta += BETA_STRIDE
        if inputs is not None:
            inputs += size
    # Threads below load numbers that other threads stored above.
    tl.debug_barrier()
    # Loaded only here, so that shared memory need not hold the transposes at the same time.
    kept_weight = _kept_matrix(weight, WEIGHT_STRIDE, WIDTH, BLOCK_N)
    kept_filter = _kept_matrix(filter, FILTER_STRIDE, WIDTH, BLOCK_N)
    weight += count * WEIGHT_STRIDE
    if filter is not None:
        filter += count * FILTER_STRIDE
    grad_pre += count * size
    if grad_states is not None:
        grad_states += count * size
    if grad_output is not None:
        grad_output += count * size
    if alpha_products is not None:
        alpha_products += count * tl.num_programs(0) + tl.program_id(0)
        beta_products += count * tl.num_programs(0) + tl.program_id(0)
    grad_state = tl.load(gradient + tile, mask=inside, other=0.0)
    for _ in tl.range(0, count, num_stages=STAGES):
        # Move the pointers back to layer l. The loop goes from the last layer of the segment to the first.
        weight -= WEIGHT_STRIDE
        if filter is not None:
            filter -= FILTER_STRIDE
        alpha -= ALPHA_STRIDE
        beta -= BETA_STRIDE
        activated -= size
        grad_pre -= size
        y = tl.load(activated + tile, mask=inside, other=0.0)
        delta = tl.load(beta) * activation_slope(y, ACTIVATION) * grad_state
        tl.store(grad_pre + tile, delta, mask=inside)
        if PERMUTES:
            rotated = tl.gather(grad_state, inverse_index, 1)
        else:
            matrix = _matrix(filter, kept_filter, WIDTH, BLOCK_N)
            rotated = tl.dot(grad_state, matrix, input_precision=PRECISION, out_dtype=dtype)
        if alpha_products is not None:
            states -= size
            alpha_products -= tl.num_programs(0)
            beta_products -= tl.num_programs(0)
            state = tl.load(states + tile, mask=inside, other=0.0)
            # <G, O h> is <G O, h>, and G O is `rotated`.
            tl.store(alpha_products, _inner_product(rotated, state))
            tl.store(beta_products, _inner_product(grad_state, y))
        if grad_states is not None:
            tl.store(grad_states + tile, grad_state, mask=inside)
            grad_states -= size
        matrix = _matrix(weight, kept_weight, WIDTH, BLOCK_N)
        # `branch` is a separate sum. If its terms were added to the far larger `rotated`, they would be rounded at the
        # scale of `rotated`.
        branch = tl.dot(delta, matrix, input_precision=PRECISION, out_dtype=dtype)
        grad_state = tl.load(alpha) * rotated + branch
        if grad_output is not None:
            grad_output -= size
            grad_state += tl.load(grad_output + tile, mask=inside, other=0.0)
    tl.store(gradient + tile, grad_state, mask=inside)


@triton.jit
def _tile(rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(offsets of this program's rows within a state (M, N), which of these elements exist)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    unit = tl.arange(0, BLOCK_N)[None, :]
    return row * WIDTH + unit, (row < rows) & (unit < WIDTH)


@triton.jit
def _load_index(index, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The permutation (or its inverse) for every row of the tile. An index out of range is replaced by 0."""
    unit = tl.arange(0, BLOCK_N)
    index = tl.load(index + unit, mask=unit < WIDTH, other=0)
    index = tl.where((index >= 0) & (index < WIDTH), index, 0).to(tl.int32)
    return tl.broadcast_to(index[None, :], (BLOCK_M, BLOCK_N))


@triton.jit
def _kept_matrix(matrix, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """A matrix that all layers share, on chip for the whole loop. None without a matrix, or with one per layer."""
    if matrix is None or STRIDE != 0:
        return
    else:
        return _load_matrix(matrix, WIDTH, BLOCK_N)


@triton.jit
def _matrix(matrix, kept, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    if matrix is None:
        return
    elif kept is not None:
        return kept
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


@triton.jit
def _step(
    state,
    transposed_weight,
    bias,
    transposed_filter,
    index,
    alpha,
    beta,
    inputs,
    tile,
    inside,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(act(A_l), h_l)."""
    BLOCK_N: tl.constexpr = state.shape[1]
    unit = tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = state.dtype
    pre_activation = tl.dot(state, transposed_weight, input_precision=PRECISION, out_dtype=dtype)
    if bias is not None:
        pre_activation += tl.load(bias + unit, mask=unit < WIDTH, other=0.0)[None, :]
    if inputs is not None:
        pre_activation += tl.load(inputs + tile, mask=inside, other=0.0)
    if index is not None:
        filtered = tl.gather(state, index, 1)
    else:
        filtered = tl.dot(state, transposed_filter, input_precision=PRECISION, out_dtype=dtype)
    y = activate(pre_activation, ACTIVATION)
    state = tl.load(alpha) * filtered + tl.load(beta) * y
    if WIDTH != BLOCK_N:
        # Reset the padding. sigmoid(0) is 1/2, so it would grow with the layers to inf, and inf times a weight's
        # padding is NaN.
        state = tl.where((unit < WIDTH)[None, :], state, 0.0)
    return y, state


@triton.jit
def _inner_product(a, b):
    return tl.sum(tl.sum(a.to(tl.float64) * b.to(tl.float64), 1), 0)
