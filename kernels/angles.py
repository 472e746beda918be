"""Parts of the kernels on angles: sines and cosines of a tile, and products and recurrences along its rows.

A tile has ROWS rows of LANES columns (lanes). A thread holds groups of 8 neighbouring lanes, so that threads exchange
only one number per group. Sine and cosine take about 25 instructions an element. A product or recurrence along a row is
a scan over one number per group.
"""

import triton
import triton.language as tl

from lcw_ops.kernels.common import GROUP, computed_in, polynomial

_GROUP = tl.constexpr(GROUP)

# pi/2 as two parts and a remainder. The products of these parts with up to 2^9 quarter turns (float64: 2^20) are exact.
_QUARTER_32 = tl.constexpr((1.57073974609375, 5.657970905303955e-05, 9.920935184482005e-10))
_QUARTER_64 = tl.constexpr((1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21))
# pi/2 in three float64s, for fused multiply-adds.
_QUARTER_FULL = tl.constexpr((1.5707963267948966, 6.123233995736766e-17, -1.4973849048591698e-33))
_QUARTERS_PER_RADIAN = tl.constexpr(0.6366197723675814)
# The largest angles with so few quarter turns.
_MOST_FAST_32 = tl.constexpr(800.0)
_MOST_FAST_64 = tl.constexpr(1.6e6)
# From this size on, neighbouring floats are at least one radian apart.
_MOST_ANGLE = tl.constexpr(2.0**52)
# Adding one of these to a number rounds it to the nearest integer, which the low bits of the sum then hold.
_ROUND_32 = tl.constexpr(1.5 * 2.0**23)
_ROUND_64 = tl.constexpr(1.5 * 2.0**52)

# The coefficients of q, highest power first, by Chebyshev interpolation for z = r^2 in [0, (pi/4)^2]:
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


@triton.jit
def load_sine_cosine(row, present, count, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Sine and cosine of the first min(``count``, LANES) angles of each row.

    Beyond these angles both are 1, so that a direction's last component, the product of all sines, is no special case.
    """
    sine, cosine = _sine_cosine(load_groups(row, present, count, ROWS, LANES))
    return tl.where(tl.arange(0, LANES)[None, :] < count, sine, 1.0), cosine


@triton.jit
def load_groups(row, present, count, ROWS: tl.constexpr, LANES: tl.constexpr):
    """LANES numbers of each row: the first ``count`` are loaded, and the others are 0.

    A thread reads 8 neighbours, so that a recurrence along them needs no exchange. It reads them one by one, because
    rows of m - 1 numbers have no alignment that a wide load could use.
    """
    dtype: tl.constexpr = computed_in(row.dtype.element_ty)
    first = _GROUP * tl.arange(0, LANES // _GROUP)[None, :]
    tiles = ()
    for i in tl.static_range(_GROUP):
        tiles += (tl.load(row + first + i, mask=present & (first < count - i), other=0.0).to(dtype),)
    return _join_groups(tiles, ROWS, LANES)


@triton.jit
def _sine_cosine(t):
    """(sin t, cos t) of a tile, from one reduction t = r + quarter * pi/2 with r in [-pi/4, pi/4].

    libdevice's sin and cos would reduce the angle twice, and keep a table for large angles on the stack.
    """
    most: tl.constexpr = _MOST_FAST_64 if t.dtype == tl.float64 else _MOST_FAST_32
    turned = tl.zeros(t.shape, tl.int32)
    if tl.max(tl.abs(t)) > most:
        # Use this reduction for large angles only, so that the result for an angle does not depend on its neighbours.
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
        sine, cosine = polynomial(z, _SINE_64), polynomial(z, _COSINE_64)
    else:
        sine, cosine = polynomial(z, _SINE_32), polynomial(z, _COSINE_32)
    sine = r + (r * z) * sine
    cosine = 1.0 + z * (z * cosine - 0.5)
    swapped = (quarter & 1) != 0
    first, second = tl.where(swapped, cosine, sine), tl.where(swapped, sine, cosine)
    return tl.where((quarter & 2) != 0, -first, first), tl.where(((quarter + 1) & 2) != 0, -second, second)


@triton.jit
def _reduce_large(t):
    """(r, quarter) of angles below 2^52, in float64. r is NaN for larger angles, whose last place is at least 1."""
    wide = t.to(tl.float64)
    turns = tl.floor(wide * _QUARTERS_PER_RADIAN + 0.5)
    r = tl.fma(turns, tl.full(t.shape, -_QUARTER_FULL[0], tl.float64), wide)
    r = tl.fma(turns, tl.full(t.shape, -_QUARTER_FULL[1], tl.float64), r)
    r = tl.fma(turns, tl.full(t.shape, -_QUARTER_FULL[2], tl.float64), r)
    r = tl.where(tl.abs(wide) < _MOST_ANGLE, r, float("nan"))
    quarter = turns - 4.0 * tl.floor(turns * 0.25)
    return r.to(t.dtype), tl.where(r == r, quarter, 0.0).to(tl.int32)


@triton.jit
def prefix_products(sine, carry, ROWS: tl.constexpr, LANES: tl.constexpr):
    """(the product of carry and all sines before each lane, the product of carry and all sines of the row)."""
    sines = _split_groups(sine, ROWS, LANES)
    prefix, carry = _prefix_of_groups(_product(sines), carry)
    return _join_groups(_running_products(prefix, sines), ROWS, LANES), carry


@triton.jit
def recurrence(sine, term, carry, suffix, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Computes T_k = term_k + s_k T_{k+1}, and P_k, the product of all sines s_i before lane k, along each row.

    ``suffix`` is T beyond the last lane, and ``carry`` the product of the sines before the first lane. Returns (P_k,
    T_{k+1}, T of the first lane).
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
    """(the product of carry and all groups before each group, the product of carry and all groups)."""
    group = tl.arange(0, product.shape[1])[None, :]
    is_first = group == 0
    product = tl.where(is_first, carry * product, product)
    before = tl.where(is_first, carry, 1.0)
    product, before = tl.associative_scan((product, before), 1, _extend_product)
    return before, _sum_rows(tl.where(group == product.shape[1] - 1, product, 0.0))


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
def _extend_product(product, before, next_product, next_before):
    """Join two neighbouring parts: the product of both, and the product of all but the last element."""
    return product * next_product, product * next_before


@triton.jit
def _extend_suffix(product, term, inner, following, next_product, next_term, next_inner, next_following):
    """Join two neighbouring parts of a scan from the last group to the first.

    ``following`` is T beyond the first group of a part, and ``inner`` the product of the part's other groups.
    """
    return (
        next_product * product,
        next_term + next_product * term,
        next_inner * product,
        next_following + next_inner * term,
    )


@triton.jit
def _sum_rows(x):
    """The sum of each row, as a column, or as a scalar if there is one row.

    A scalar has no layout. If a loop carries a column, Triton 3.6 gives the column a layout in which every thread holds
    the whole row, and then runs every step of the loop in that layout too.
    """
    return tl.sum(x) if x.shape[0] == 1 else tl.sum(x, 1, keep_dims=True)


@triton.jit
def _split_groups(x, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Eight tiles: the first of every 8 neighbours, the second, ... the eighth."""
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
    """The inverse of `_split_groups`."""
    even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
    odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
    return tl.reshape(tl.join(even, odd), (ROWS, LANES))
