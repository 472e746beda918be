"""Activated gradients (GAF) over a list of tensors, in place or inside the steps of SGD and AdamW, in Triton.

f(g) of a gradient g is alpha atan(beta g) (arctan), alpha tanh(beta g) (tanh) or alpha sign(g) ln(1 + beta |g|) (log).
M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228.
The update rules are those of torch.optim. The polynomials for atan, tanh and log are our own.

Cost of f per element: 2 * itemsize bytes (one read, one write), and 34 / 28 / 40 instructions for arctan / tanh / log
in float32, 1.5 more for 16-bit numbers, 67 / 87 / 75 in float64 (counted in the sm_90 code). An H200 issues 33 T
instructions/s and copies 4.3 TB/s, or 0.54 T 4-byte elements/s. So f is bound by memory in float32 and float64; for
16-bit numbers the two bounds meet. A whole step of SGD with momentum accesses memory 5 times per element (each array is
read and written at most once), a step of AdamW 7 times, or 9 times with amsgrad.

Launches: tensors that are neighbours in memory, as the views of one flat buffer are, form one run. If there are more
than a few runs, their addresses go to the GPU in a table, and runs of similar size share a launch. A CUDA graph cannot
record the copy of the table, so every run has its own launch while a graph is recorded.

Accuracy: with correctly rounded basic operations, the error of f / alpha over all arguments is at most 1.4 (arctan),
2.0 (tanh) and 1.1 (log) units in the last place in float32, and 1.4 each in float64. On CUDA the approximate float32
division and exponential add at most 2 for arctan, 2.5 for tanh, 0.5 for log. The relative error is as small near 0:
f(1e-20) is 1e-20 alpha beta.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcw_ops.kernels.common import computed_in, polynomial

# Elements per program: 4 warps with 8 elements per thread, one 16-byte load of 16-bit numbers or two of float32.
BLOCK = 1024
NUM_WARPS = 4
# AdamW's five arrays need twice as many registers as four warps have; with four, some would spill to memory.
ADAMW_WARPS = 8

# Above this number, launches cost more than the table of addresses, which is built in Python and copied to the GPU.
MOST_LAUNCHES = 4

# Below this value tanh is a polynomial, because 1 - 2 / (exp(2x) + 1) cancels near 0. Above it the cancellation costs
# less than 1 ulp.
_TANH_SERIES_END = tl.constexpr(0.5625)
_PI_2 = tl.constexpr(1.5707963267948966)
# pi/2 minus its rounding to float32: the next 24 bits.
_PI_2_LOW_32 = tl.constexpr(-4.371139000186241e-08)
_PI_2_LOW_64 = tl.constexpr(6.123233995736766e-17)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOG_SCALE = tl.constexpr(2.0**64)

# q by Chebyshev interpolation, highest power first. The error of q stays below 0.1 ulp of the result:
#   atan(t) = t + t z q(z), z = t^2 in [0, 1];  tanh(t) = t + t z q(z), z in [0, 0.5625^2];
#   ln((1 + s) / (1 - s)) = 2 s + s z q(z), z = s^2 in [0, 0.04].
# fmt: off
_ATAN_32 = tl.constexpr((
    0.00148869194, -0.00914462976, 0.0263050011, -0.048960514, 0.0703191425,
    -0.0893182678, 0.110882616, -0.142840038, 0.199999493, -0.333333331,
))
_ATAN_64 = tl.constexpr((
    -1.1832505417555692e-05, 0.0001368724853148122, -0.0007518472526973822, 0.002622977891906089,
    -0.006575683344151699, 0.012756172907694298, -0.020238706986393514, 0.027567942297344678,
    -0.033750132001619734, 0.03872640214042632, -0.04308119655330471, 0.04752086773576656,
    -0.05261265735709454, 0.05882074956371294, -0.06666636435777692, 0.07692305354678655,
    -0.09090908969557403, 0.11111111107234799, -0.14285714285648404, 0.19999999999999554, -0.3333333333333333,
))
_TANH_32 = tl.constexpr((-0.00652557217, 0.0212633534, -0.0539017532, 0.133330738, -0.333333317))
_TANH_64 = tl.constexpr((
    -2.0026740085317684e-05, 8.426522203958066e-05, -0.00023410556936672797, 0.0005887537111834804,
    -0.0014556239774192678, 0.003592105532132769, -0.008863234021529514, 0.021869488476962563,
    -0.0539682539670594, 0.13333333333332392, -0.3333333333333333,
))
_LOG_32 = tl.constexpr((0.237473445, 0.285327448, 0.400003113, 0.666666663))
_LOG_64 = tl.constexpr((
    0.13604015707124079, 0.1321036048513262, 0.15388834677801916, 0.18181738454723026,
    0.22222223037807243, 0.2857142856733919, 0.400000000000078, 0.6666666666666666,
))
# fmt: on


def gradient_activation(gradient: Tensor, kind: str, alpha: float, beta: float) -> None:
    """Apply f to ``gradient`` in place. Does not check its arguments.

    ``gradient`` may have any shape, but must be dense in memory: no gaps and no overlap, with its dimensions in any
    order. float64 is computed in float64, and float32, bfloat16 and float16 in float32. NaN stays NaN, and +-inf
    becomes f's limit, which is +-inf for log.
    """
    gradient_activation_many([gradient], kind, alpha, beta)


def gradient_activation_many(tensors: Sequence[Tensor], kind: str, alpha: float, beta: float) -> None:
    """Apply `gradient_activation` to each tensor. All are on one device; dtypes and sizes may differ."""
    _launch_over(gradient_activation_kernel, [tensors], (alpha, beta), {"KIND": kind})


def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    is_first: bool,
    on_momentum: bool,
    kind: str,
    alpha: float,
    beta: float,
) -> None:
    """One step of SGD, in place; ``grads`` are only read. ``is_first``: the buffers are uninitialised.

    All tensors are dense and on one device. A gradient and a buffer have the dtype, shape and strides of their
    parameter. ``momentum_buffers`` is empty if ``momentum`` is 0. Does not check its arguments.
    """
    flags = {
        "HAS_BUFFER": momentum != 0,
        "NESTEROV": nesterov,
        "MAXIMIZE": maximize,
        "IS_FIRST": is_first,
        "ON_MOMENTUM": on_momentum,
    }
    numbers = (lr, momentum, 1 - dampening, weight_decay, alpha, beta)
    # The kernel takes all arguments, and ignores those that a flag turns off.
    buffers = momentum_buffers if momentum != 0 else params
    _launch_over(sgd_step_kernel, [params, grads, buffers], numbers, {"KIND": kind, **flags})


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    kind: str,
    alpha: float,
    beta: float,
) -> None:
    """One step of AdamW, in place; ``grads`` and ``state_steps`` are only read.

    The tensors are as for `sgd_step`; ``max_exp_avg_sqs`` is empty without ``amsgrad``. ``state_steps`` are 0-dim
    float32, on the CPU or on the parameters' device, and already count this step.
    """
    if not params:
        return
    numbers = (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, alpha, beta)
    flags = {"KIND": kind, "AMSGRAD": amsgrad, "MAXIMIZE": maximize, "num_warps": ADAMW_WARPS}
    maxima = max_exp_avg_sqs if amsgrad else exp_avg_sqs
    # Group the tensors by step count. Reading a counter on a GPU would wait for the GPU, so there the counter's address
    # stands for the count.
    counts = [step.data_ptr() if step.is_cuda else step.item() for step in state_steps]
    corrections = _bias_corrections(state_steps, lr, beta1, beta2).to(params[0].device)
    lists = [params, grads, exp_avgs, exp_avg_sqs, maxima]
    _launch_over(adamw_step_kernel, lists, numbers, flags, counts, corrections)


def _bias_corrections(state_steps: Sequence[Tensor], lr: float, beta1: float, beta2: float) -> Tensor:
    """(n, 2) float64: lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t), computed on the counters' device."""
    steps = torch.stack(list(state_steps)).double()
    biases = [-torch.expm1(steps * (math.log(b) if b > 0 else -math.inf)) for b in (beta1, beta2)]
    return torch.stack([lr / biases[0], biases[1].rsqrt()], 1)


def _launch_over(
    kernel,
    lists: list[Sequence[Tensor]],
    numbers: tuple[float, ...],
    flags: dict[str, object],
    keys: Sequence[object] | None = None,
    corrections: Tensor | None = None,
) -> None:
    """Run ``kernel`` over all tensors of the lists. The first list gives sizes and dtypes.

    Only tensors with equal ``keys`` share a run. ``corrections`` has a row for each tensor.
    """
    indices = [i for i, tensor in enumerate(lists[0]) if tensor.numel() > 0]
    if not indices:
        return
    first = lists[0][indices[0]]
    recording = first.is_cuda and torch.cuda.is_current_stream_capturing()
    settings = {"BLOCK": BLOCK, "num_warps": NUM_WARPS, **flags}
    # Triton launches on the current device, not on the tensor's.
    with torch.cuda.device_of(first):
        for dtype in dict.fromkeys(lists[0][i].dtype for i in indices):
            runs = _find_runs(lists, [i for i in indices if lists[0][i].dtype == dtype], keys)
            if recording or len(runs) <= MOST_LAUNCHES:
                for index, numel in runs:
                    tensors = [tensors[index] for tensors in lists]
                    extra = () if corrections is None else (corrections[index],)
                    blocks = triton.cdiv(numel, BLOCK)
                    arguments = (*tensors, *extra, tensors[0], numel, blocks, *numbers)
                    kernel[(blocks,)](*arguments, TABLE=False, ALIGNED=False, **settings)
            else:
                tensors = [tensors[runs[0][0]] for tensors in lists]
                extra = () if corrections is None else (corrections,)
                for rows, blocks, aligned in _tables(lists, runs):
                    table = torch.tensor(rows, dtype=torch.int64).to(first.device)
                    arguments = (*tensors, *extra, table, 0, blocks, *numbers)
                    kernel[(blocks * len(rows),)](*arguments, TABLE=True, ALIGNED=aligned, **settings)


def _find_runs(
    lists: list[Sequence[Tensor]], indices: list[int], keys: Sequence[object] | None
) -> list[tuple[int, int]]:
    """(index of the first tensor, elements) of each run: tensors without a gap between them, in every list."""
    runs: list[tuple[int, int]] = []
    expected: list[object] = []
    for index in sorted(indices, key=lambda i: lists[0][i].data_ptr()):
        own = [tensors[index] for tensors in lists]
        key = None if keys is None else keys[index]
        if [*(tensor.data_ptr() for tensor in own), key] == expected:
            runs[-1] = (runs[-1][0], runs[-1][1] + own[0].numel())
        else:
            runs.append((index, own[0].numel()))
        expected = [*(tensor.data_ptr() + tensor.numel() * tensor.itemsize for tensor in own), key]
    return runs


def _tables(lists: list[Sequence[Tensor]], runs: list[tuple[int, int]]) -> list[tuple[list[list[int]], int, bool]]:
    """(rows, programs for each row, whether all addresses are multiples of 16) of every launch.

    A row holds a run's addresses, its number of elements and its index in the lists. Rows of one launch differ in size
    by less than a factor of 2, so that fewer than half of the programs have nothing to do.
    """
    launches: dict[tuple[int, bool], list[list[int]]] = {}
    for index, numel in runs:
        addresses = [tensors[index].data_ptr() for tensors in lists]
        aligned = all(address % 16 == 0 for address in addresses)
        size = triton.cdiv(numel, BLOCK).bit_length()
        launches.setdefault((size, aligned), []).append([*addresses, numel, index])
    return [
        (rows, triton.cdiv(max(row[-2] for row in rows), BLOCK), aligned) for (_, aligned), rows in launches.items()
    ]


@triton.jit(do_not_specialize=["numel", "blocks"])
def gradient_activation_kernel(
    gradient,
    table,
    numel: tl.int64,
    blocks: tl.int64,
    alpha: tl.float64,
    beta: tl.float64,
    KIND: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    if TABLE:
        row = table + (block // blocks) * 3
        gradient = _pointer(row, gradient.dtype, ALIGNED)
        numel = tl.load(row + 1)
        block = block % blocks
    start = block * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # A mask would forbid wide loads if numel is not a multiple of 16, so only the last block has one.
    if start + BLOCK <= numel:
        tl.store(gradient + offsets, _activate(tl.load(gradient + offsets), alpha, beta, KIND))
    elif start < numel:
        inside = offsets < numel
        value = tl.load(gradient + offsets, mask=inside, other=0.0)
        tl.store(gradient + offsets, _activate(value, alpha, beta, KIND), mask=inside)


@triton.jit(do_not_specialize=["numel", "blocks"])
def sgd_step_kernel(
    param,
    gradient,
    buffer,
    table,
    numel: tl.int64,
    blocks: tl.int64,
    lr: tl.float64,
    momentum: tl.float64,
    undamped: tl.float64,
    weight_decay: tl.float64,
    alpha: tl.float64,
    beta: tl.float64,
    KIND: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    IS_FIRST: tl.constexpr,
    ON_MOMENTUM: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    if TABLE:
        row = table + (block // blocks) * 5
        param = _pointer(row, param.dtype, ALIGNED)
        gradient = _pointer(row + 1, gradient.dtype, ALIGNED)
        buffer = _pointer(row + 2, buffer.dtype, ALIGNED)
        numel = tl.load(row + 3)
        block = block % blocks
    dtype: tl.constexpr = computed_in(param.dtype.element_ty)
    lr, momentum, undamped = _number(lr, dtype), _number(momentum, dtype), _number(undamped, dtype)
    weight_decay = _number(weight_decay, dtype)
    start = block * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        _sgd_block(
            param + offsets, gradient + offsets, buffer + offsets, None, lr, momentum, undamped, weight_decay,
            alpha, beta, KIND, HAS_BUFFER, NESTEROV, MAXIMIZE, IS_FIRST, ON_MOMENTUM,
        )  # fmt: skip
    elif start < numel:
        _sgd_block(
            param + offsets, gradient + offsets, buffer + offsets, offsets < numel, lr, momentum, undamped,
            weight_decay, alpha, beta, KIND, HAS_BUFFER, NESTEROV, MAXIMIZE, IS_FIRST, ON_MOMENTUM,
        )  # fmt: skip


@triton.jit
def _sgd_block(
    params,
    gradients,
    buffers,
    inside,
    lr,
    momentum,
    undamped,
    weight_decay,
    alpha,
    beta,
    KIND: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    IS_FIRST: tl.constexpr,
    ON_MOMENTUM: tl.constexpr,
):
    """d = f(g) + wd w, v = mu v + (1 - dampening) d, w -= lr v; ON_MOMENTUM: d = g + wd w, w -= lr f(v)."""
    element: tl.constexpr = params.dtype.element_ty
    dtype: tl.constexpr = computed_in(element)
    w = tl.load(params, mask=inside).to(dtype)
    d = tl.load(gradients, mask=inside).to(dtype)
    if MAXIMIZE:
        d = -d
    if not ON_MOMENTUM:
        d = _activate(d, alpha, beta, KIND)
    d += weight_decay * w
    step = d
    if HAS_BUFFER:
        # Before the first step a buffer holds uninitialised memory.
        v = d if IS_FIRST else momentum * tl.load(buffers, mask=inside).to(dtype) + undamped * d
        tl.store(buffers, v.to(element), mask=inside)
        step = d + momentum * v if NESTEROV else v
    if ON_MOMENTUM:
        step = _activate(step, alpha, beta, KIND)
    tl.store(params, (w - lr * step).to(element), mask=inside)


@triton.jit(do_not_specialize=["numel", "blocks"])
def adamw_step_kernel(
    param,
    gradient,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    corrections,
    table,
    numel: tl.int64,
    blocks: tl.int64,
    kept: tl.float64,
    added: tl.float64,
    beta2: tl.float64,
    added_sq: tl.float64,
    eps: tl.float64,
    alpha: tl.float64,
    beta: tl.float64,
    KIND: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    if TABLE:
        row = table + (block // blocks) * 7
        param = _pointer(row, param.dtype, ALIGNED)
        gradient = _pointer(row + 1, gradient.dtype, ALIGNED)
        exp_avg = _pointer(row + 2, exp_avg.dtype, ALIGNED)
        exp_avg_sq = _pointer(row + 3, exp_avg_sq.dtype, ALIGNED)
        max_exp_avg_sq = _pointer(row + 4, max_exp_avg_sq.dtype, ALIGNED)
        numel = tl.load(row + 5)
        corrections += 2 * tl.load(row + 6)
        block = block % blocks
    dtype: tl.constexpr = computed_in(param.dtype.element_ty)
    step_size, root_scale = tl.load(corrections).to(dtype), tl.load(corrections + 1).to(dtype)
    kept, added, beta2 = _number(kept, dtype), _number(added, dtype), _number(beta2, dtype)
    added_sq, eps = _number(added_sq, dtype), _number(eps, dtype)
    start = block * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        _adamw_block(
            param + offsets, gradient + offsets, exp_avg + offsets, exp_avg_sq + offsets, max_exp_avg_sq + offsets,
            None, step_size, root_scale, kept, added, beta2, added_sq, eps, alpha, beta, KIND, AMSGRAD, MAXIMIZE,
        )  # fmt: skip
    elif start < numel:
        _adamw_block(
            param + offsets, gradient + offsets, exp_avg + offsets, exp_avg_sq + offsets, max_exp_avg_sq + offsets,
            offsets < numel, step_size, root_scale, kept, added, beta2, added_sq, eps, alpha, beta, KIND, AMSGRAD,
            MAXIMIZE,
        )  # fmt: skip


@triton.jit
def _adamw_block(
    params,
    gradients,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    inside,
    step_size,
    root_scale,
    kept,
    added,
    beta2,
    added_sq,
    eps,
    alpha,
    beta,
    KIND: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """g' = f(g), m += (1 - b1) (g' - m), v = b2 v + (1 - b2) g'^2, w = kept w - step_size m / (sqrt(v) scale + eps)."""
    element: tl.constexpr = params.dtype.element_ty
    dtype: tl.constexpr = computed_in(element)
    w = tl.load(params, mask=inside).to(dtype)
    g = tl.load(gradients, mask=inside).to(dtype)
    m = tl.load(exp_avgs, mask=inside).to(dtype)
    v = tl.load(exp_avg_sqs, mask=inside).to(dtype)
    g = _activate(-g if MAXIMIZE else g, alpha, beta, KIND)
    m += added * (g - m)
    v = beta2 * v + added_sq * g * g
    tl.store(exp_avgs, m.to(element), mask=inside)
    tl.store(exp_avg_sqs, v.to(element), mask=inside)
    if AMSGRAD:
        most = tl.load(max_exp_avg_sqs, mask=inside).to(dtype)
        # A NaN stays NaN, as in torch.maximum.
        v = tl.where((most >= v) | (most != most), most, v)
        tl.store(max_exp_avg_sqs, v.to(element), mask=inside)
    # tl.sqrt is approximate in float32, and flushes subnormal numbers to 0.
    root = tl.sqrt(v) if dtype == tl.float64 else tl.sqrt_rn(v)
    tl.store(params, (kept * w - step_size * (m / (root * root_scale + eps))).to(element), mask=inside)


@triton.jit
def _number(value, dtype: tl.constexpr):
    return tl.full((), value, dtype)


@triton.jit
def _pointer(entry, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in an entry of the table. Triton sees the alignment of arguments, but not of a loaded address."""
    pointer = tl.load(entry).to(dtype)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _activate(gradient, alpha, beta, KIND: tl.constexpr):
    dtype: tl.constexpr = computed_in(gradient.dtype)
    x = gradient.to(dtype) * tl.full((), beta, dtype)
    if KIND == "arctan":
        activated = _atan(x)
    elif KIND == "tanh":
        activated = _tanh(x)
    else:
        activated = _signed_log1p(x)
    return (activated * tl.full((), alpha, dtype)).to(gradient.dtype)


@triton.jit
def _atan(x):
    """atan(x) = sign(x) pi/2 - atan(1/x) brings every argument into [-1, 1]."""
    outer = tl.abs(x) > 1
    t = tl.where(outer, 1 / x, x)
    z = t * t
    if x.dtype == tl.float64:
        inner = t + t * (z * polynomial(z, _ATAN_64))
        low = tl.full((), _PI_2_LOW_64, x.dtype)
    else:
        inner = t + t * (z * polynomial(z, _ATAN_32))
        low = tl.full((), _PI_2_LOW_32, x.dtype)
    # For |x| > 1 the result is computed for |x| and mirrored, so that the function is odd to the last bit.
    right = tl.full((), _PI_2, x.dtype) - (tl.abs(inner) - low)
    return tl.where(outer, tl.where(x > 0, right, -right), inner)


@triton.jit
def _tanh(x):
    magnitude = tl.abs(x)
    z = x * x
    q = polynomial(z, _TANH_64) if x.dtype == tl.float64 else polynomial(z, _TANH_32)
    series = x + x * (z * q)
    # If the exponential overflows, this is 1 - 2 / inf = 1, the limit.
    right = 1 - 2 / (tl.exp(2 * magnitude) + 1)
    return tl.where(magnitude > _TANH_SERIES_END, tl.where(x > 0, right, -right), series)


@triton.jit
def _signed_log1p(x):
    """sign(x) ln(1 + |x|). With 2^k u = 1 + |x|, u in [0.75, 1.5), and f = u - 1: ln(1 + |x|) = k ln 2 + ln(1 + f).

    f is formed as |x| 2^-k + (2^-k - 1), whose terms are exact, so a tiny |x| is not lost in rounding 1 + |x|.
    """
    magnitude = tl.abs(x)
    # For the largest |x|, 2^-k would be subnormal. There the 1 in 1 + |x| is far below an ulp of |x|, and is dropped.
    huge = magnitude > _LOG_SCALE
    scaled = tl.where(huge, magnitude * (1 / _LOG_SCALE), magnitude)
    one = tl.where(huge, tl.full((), 0.0, x.dtype), tl.full((), 1.0, x.dtype))
    if x.dtype == tl.float64:
        k = ((scaled + one).to(tl.int64, bitcast=True) - 0x3FE8000000000000) >> 52
        power = ((1023 - k) << 52).to(tl.float64, bitcast=True)
    else:
        k = ((scaled + one).to(tl.int32, bitcast=True) - 0x3F400000) >> 23
        power = ((127 - k) << 23).to(tl.float32, bitcast=True)
    f = scaled * power + (one * power - 1)
    s = f / (2 + f)
    z = s * s
    q = polynomial(z, _LOG_64) if x.dtype == tl.float64 else polynomial(z, _LOG_32)
    correction = s * (f - z * q)
    exponent = tl.where(huge, k + 64, k).to(x.dtype)
    logarithm = exponent * tl.full((), _LN_2, x.dtype) + (f - correction)
    # The exponent bits of an infinity or a NaN do not give a power of 2.
    logarithm = tl.where(magnitude < float("inf"), logarithm, magnitude)
    return tl.where(x < 0, -logarithm, logarithm)
