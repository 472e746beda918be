"""Activated gradients (GAF) in place, one launch per tensor, in Triton.

arctan: alpha atan(beta g);  tanh: alpha tanh(beta g);  log: alpha sign(g) ln(1 + beta |g|).  M. Liu, L. Chen, X. Du,
L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228. Approximations: ours.

Cost per element: 2 * itemsize bytes (one read, one write) and, counted in the sm_90 code, 34 / 28 / 40 instructions for
arctan / tanh / log in float32, 1.5 more in 16 bits, 67 / 87 / 75 in float64. An H200 issues 33 T a second and copies
4.3 TB/s, 0.54 T elements of 4 bytes: memory bound in float32 and float64; in 16 bits the two bounds meet.

Accuracy: the largest error of f / alpha over all arguments, in units in the last place, with correctly rounded basic
operations: arctan 1.4, tanh 2.0, log 1.1 in float32, each 1.4 in float64. On CUDA the approximate float32 division and
exponential add at most 2 for arctan, 2.5 for tanh, 0.5 for log. Relative everywhere: f(1e-20) is 1e-20 alpha beta.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements per program: with 4 warps 8 per thread, which are 16-byte loads in 16 bits and two of them in float32.
BLOCK = 1024
NUM_WARPS = 4

# Below it tanh is a polynomial, for 1 - 2 / (exp(2x) + 1) cancels towards 0; above it that costs under 1 ulp.
_TANH_SERIES_END = tl.constexpr(0.5625)
_PI_2 = tl.constexpr(1.5707963267948966)
# pi/2 less its rounding to float32: the next 24 bits.
_PI_2_LOW_32 = tl.constexpr(-4.371139000186241e-08)
_PI_2_LOW_64 = tl.constexpr(6.123233995736766e-17)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOG_SCALE = tl.constexpr(2.0**64)

# Chebyshev interpolation of q, highest power first, so that its own error stays below 0.1 ulp of the result:
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
    """Overwrite ``gradient``, any shape, dense in memory (no gaps, no overlap; any order of dimensions).

    float32, bfloat16 and float16 are computed in float32, float64 in float64. NaN stays NaN, +-inf becomes +-the bound
    (log: +-inf). Nothing is checked here.
    """
    if gradient.numel() == 0:
        return
    grid = (triton.cdiv(gradient.numel(), BLOCK),)
    # Triton launches on the current device, not on the tensor's.
    with torch.cuda.device_of(gradient):
        gradient_activation_kernel[grid](
            gradient, gradient.numel(), alpha, beta, KIND=kind, BLOCK=BLOCK, num_warps=NUM_WARPS
        )


@triton.jit(do_not_specialize=["numel"])
def gradient_activation_kernel(
    gradient, numel: tl.int64, alpha: tl.float64, beta: tl.float64, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    elements = gradient + start + lanes
    # A mask would forbid wide loads wherever numel is no multiple of 16, so only the last block has one.
    if start + BLOCK <= numel:
        tl.store(elements, _activate(tl.load(elements), alpha, beta, KIND))
    else:
        inside = start + lanes < numel
        tl.store(elements, _activate(tl.load(elements, mask=inside, other=0.0), alpha, beta, KIND), mask=inside)


@triton.jit
def _activate(gradient, alpha, beta, KIND: tl.constexpr):
    dtype: tl.constexpr = tl.float64 if gradient.dtype == tl.float64 else tl.float32
    x = gradient.to(dtype) * tl.full((), beta, dtype)
    if KIND == "arctan":
        activated = _atan(x)
    elif KIND == "tanh":
        activated = _tanh(x)
    else:
        activated = _signed_log1p(x)
    return (activated * tl.full((), alpha, dtype)).to(gradient.dtype)


@triton.jit
def _polynomial(z, coefficients: tl.constexpr):
    value = tl.full(z.shape, coefficients[0], z.dtype)
    for power in tl.static_range(1, len(coefficients.value)):
        value = value * z + coefficients[power]
    return value


@triton.jit
def _atan(x):
    """atan(x) = sign(x) pi/2 - atan(1/x) brings every argument into [-1, 1]."""
    outer = tl.abs(x) > 1
    t = tl.where(outer, 1 / x, x)
    z = t * t
    if x.dtype == tl.float64:
        inner = t + t * (z * _polynomial(z, _ATAN_64))
        low = tl.full((), _PI_2_LOW_64, x.dtype)
    else:
        inner = t + t * (z * _polynomial(z, _ATAN_32))
        low = tl.full((), _PI_2_LOW_32, x.dtype)
    # Evaluated for x > 0 and mirrored, so that the function is odd to the last bit.
    right = tl.full((), _PI_2, x.dtype) - (tl.abs(inner) - low)
    return tl.where(outer, tl.where(x > 0, right, -right), inner)


@triton.jit
def _tanh(x):
    magnitude = tl.abs(x)
    z = x * x
    q = _polynomial(z, _TANH_64) if x.dtype == tl.float64 else _polynomial(z, _TANH_32)
    series = x + x * (z * q)
    # An exponential that overflows gives 1 - 2 / inf = 1, the bound.
    right = 1 - 2 / (tl.exp(2 * magnitude) + 1)
    return tl.where(magnitude > _TANH_SERIES_END, tl.where(x > 0, right, -right), series)


@triton.jit
def _signed_log1p(x):
    """With 2^k u = 1 + |x|, u in [0.75, 1.5), and f = u - 1: ln(1 + |x|) = k ln 2 + ln(1 + f).

    f is formed as |x| 2^-k + (2^-k - 1), whose terms are exact: a tiny |x| never meets the rounding of 1 + |x|.
    """
    magnitude = tl.abs(x)
    # Near the end of the range 2^-k would be subnormal; the 1 is far below the last place there.
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
    if x.dtype == tl.float64:
        correction = s * (f - z * _polynomial(z, _LOG_64))
    else:
        correction = s * (f - z * _polynomial(z, _LOG_32))
    exponent = tl.where(huge, k + 64, k).to(x.dtype)
    logarithm = exponent * tl.full((), _LN_2, x.dtype) + (f - correction)
    # The bits of an infinity or a NaN are no power of 2.
    logarithm = tl.where(magnitude < float("inf"), logarithm, magnitude)
    return tl.where(x < 0, -logarithm, logarithm)


def _aot_variant(kind: str, dtype: str) -> dict:
    return {
        "id": f"{kind}-{dtype}",
        "kernel": gradient_activation_kernel,
        "signature": {"gradient": f"*{dtype}", "numel": "i64", "alpha": "fp64", "beta": "fp64"},
        "constexprs": {"KIND": kind, "BLOCK": BLOCK},
        "aligned": ("gradient",),
        "num_warps": NUM_WARPS,
    }


AOT_VARIANTS = [
    _aot_variant(kind, dtype) for kind in ("arctan", "tanh", "log") for dtype in ("fp32", "bf16", "fp16", "fp64")
]
