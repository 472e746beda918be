"""The fixed orthogonal filter O of the orthogonal-filter recurrence: drawn, or given and then checked.

The kinds of filter are those in related models by A. Ceni, the author of the recurrence; only "permutation" is ours.
"""

import math

import torch
from torch import Tensor

from lcw_ops import _torch
from lcw_ops._checks import check_choice, check_shape, describe
from lcw_ops._names import FILTERS
from lcw_ops.reference.orthogonal_filter import state_dtype

# The number of filter elements checked at a time. The check converts them to float64, in which the filters of 50,000
# layers could take gigabytes if they were all converted at once.
_CHECKED_AT_ONCE = 2**20


def make_filter(filter: str | Tensor, width: int, dtype: torch.dtype | None = None, device=None) -> Tensor:
    """An orthogonal filter of the given kind. A given tensor is checked to be orthogonal, here and not at every call.

    Args:
        filter: "haar", a (width, width) matrix drawn from the Haar measure; "cyclic", the shift by one; "permutation",
            a random permutation; "identity", which makes the network a residual one; or a tensor: (width, width),
            (depth, width, width) or an int64 permutation (width,).
        width: N.
        dtype: that of the layer. The filter itself is at least float32.
        device: the device of the result, even for a given tensor. Default: torch's default device.

    "haar" and "permutation" are random: ranks share a filter only if all of them draw it with the same seed, or load
    it. Tensors without values (on the meta device, or fake) are not checked.

    Returns:
        An int64 permutation (N,) for every kind but "haar", which gives (N, N). A given tensor is copied and converted.

    Raises:
        ValueError: unknown kind, wrong shape, a matrix that is not orthogonal (with the measured deviation), an int64
            tensor that is not a permutation.
        TypeError: neither a string nor a floating-point or int64 tensor.
    """
    dtype = state_dtype(dtype or torch.get_default_dtype())
    if isinstance(filter, Tensor):
        check_filter("make_filter", "filter", filter, width, _rounding_of(filter.dtype))
        kept = filter.dtype if filter.dtype == torch.int64 else dtype
        return filter.detach().to(dtype=kept, device=resolve_device(device), copy=True)
    if not isinstance(filter, str):
        came, expected = f"is a {type(filter).__name__}", "a string or a tensor"
        raise TypeError(describe("make_filter", "filter", came, expected))
    check_choice("make_filter", "filter", filter, FILTERS)
    if filter == "haar":
        # The QR of a Gaussian matrix is Haar-distributed after a correction by the signs of R's diagonal.
        q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, device=device))
        return (q * r.diagonal().sign()).to(dtype)
    if filter == "cyclic":
        return torch.arange(width, device=device).roll(1)
    if filter == "permutation":
        return torch.randperm(width, device=device)
    return torch.arange(width, device=device)


def resolve_device(device) -> torch.device:
    """The given device; for None, torch's default, as in its factories (``Tensor.to(device=None)`` moves nothing)."""
    return torch.get_default_device() if device is None else torch.device(device)


def _rounding_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def check_filter(owner: str, argument: str, filter: Tensor, width: int, eps: float) -> None:
    """Raise ValueError or TypeError unless the filter is a permutation or, up to rounding of size eps, orthogonal."""
    if filter.dtype == torch.int64:
        every = torch.arange(width, device=filter.device)
        if filter.shape != (width,) or (_torch.has_values(filter) and not torch.equal(filter.sort().values, every)):
            came = f"is an int64 tensor of shape {tuple(filter.shape)}"
            raise ValueError(describe(owner, argument, came, f"a permutation of 0..{width - 1}"))
        return
    if not filter.is_floating_point():
        expected = "floating point, or int64 for a permutation"
        raise TypeError(describe(owner, argument, f"is {filter.dtype}", expected))
    right = filter.dim() in (2, 3) and filter.shape[-2:] == (width, width)
    check_shape(owner, argument, filter, right, f"({width}, {width}) or (depth, {width}, {width})")
    if filter.dtype in (torch.bfloat16, torch.float16):
        expected = "float32 or float64, because a matrix in 16 bits is not orthogonal"
        raise TypeError(describe(owner, argument, f"is {filter.dtype}", expected))
    if not _torch.has_values(filter):
        return
    deviation = _deviation(filter.detach().reshape(-1, width, width))
    # After a QR with roundings of size eps, the inner product of two rows is wrong by at most about sqrt(N) eps. Four
    # times that is allowed.
    limit = 4 * math.sqrt(width) * eps
    if not deviation <= limit:
        came = f"is not orthogonal: |O O^T - I| reaches {deviation:.3g}"
        expected = f"at most {limit:.3g}, which is rounding in {filter.dtype}"
        remedy = "Orthogonalise it first: torch.linalg.qr(filter.double()).Q."
        raise ValueError(describe(owner, argument, came, expected, remedy))


def _deviation(filters: Tensor) -> float:
    """The largest element of |O O^T - I| over all matrices (L, N, N), in float64."""
    largest = torch.zeros((), dtype=torch.float64, device=filters.device)
    at_once = max(1, _CHECKED_AT_ONCE // filters.shape[-1] ** 2)
    for first in range(0, len(filters), at_once):
        exact = filters[first : first + at_once].double()
        product = exact @ exact.mT
        product.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        # Unlike Python's max, this keeps a NaN.
        largest = torch.maximum(largest, product.abs_().max())
    return largest.item()


def kind_of(filter: Tensor) -> str:
    """The kind of a loaded filter. Every matrix is a "tensor": a matrix does not show how it was drawn."""
    if filter.dtype != torch.int64:
        return "tensor"
    for kind in ("identity", "cyclic"):
        if torch.equal(filter, make_filter(kind, len(filter), device=filter.device)):
            return kind
    return "permutation"
