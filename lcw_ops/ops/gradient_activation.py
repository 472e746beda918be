"""Activated gradients (GAF) in place over a list of tensors, as a registered op.

f(g) = alpha atan(beta g), alpha tanh(beta g) or alpha sign(g) ln(1 + beta |g|), by element. M. Liu, L. Chen, X. Du,
L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lcw_ops import reference
from lcw_ops.ops import _backends, _library

NAME = "gradient_activation_"

# At once in plain torch: many, for a foreach call costs what one tensor's does; few, for float32 copies of 16-bit ones.
FOREACH_TENSORS = 32


def is_dense(tensor: Tensor) -> bool:
    """No gaps and no overlap, in any order of dimensions: element by element, the memory is one flat array."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def may_overlap(tensor: Tensor) -> bool:
    """Whether two elements may share memory; exact for everything torch's views make, cautious for odd as_strided."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def find_shared(tensors: list[Tensor]) -> tuple[int, int] | None:
    """The places of two tensors that may share memory, or None: none do.

    Exact where no two ranges of addresses meet, and for the slices and interleaved views of one tensor (columns,
    channels, every second element); what else lies within each other counts as shared.
    """
    spans = []
    for index, tensor in enumerate(tensors):
        start = _address(tensor)
        if start:
            spans.append((start, start + _span(tensor), index))
    spans.sort()
    # Thousands of gradients before every step: nearly always this is all there is to do.
    if all(first[1] <= second[0] for first, second in pairwise(spans)):
        return None
    by_device: dict[torch.device, list[tuple[int, int, int]]] = {}
    for span in spans:
        by_device.setdefault(tensors[span[2]].device, []).append(span)
    clusters = (cluster for on_device in by_device.values() for cluster in _clusters(on_device))
    found = (_find_shared_in_cluster([(start, index, tensors[index]) for start, _, index in one]) for one in clusters)
    return next((pair for pair in found if pair is not None), None)


def _address(tensor: Tensor) -> int:
    """Of the first element, or 0 for a tensor without memory: empty, meta, fake, or one of vmap's."""
    if isinstance(tensor, FakeTensor):
        return 0
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _span(tensor: Tensor, period: int = 0) -> int:
    """Bytes from the first element to the end of the last; with ``period``, in steps that are no multiple of it."""
    if not period and tensor.is_contiguous():
        return tensor.nbytes
    itemsize = tensor.itemsize
    steps = ((size - 1, stride * itemsize) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return itemsize + sum(count * step for count, step in steps if not period or step % period)


def _clusters(spans: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Sorted spans, parted wherever no span reaches across."""
    clusters, end = [], 0
    for span in spans:
        if span[0] >= end:
            clusters.append([])
        clusters[-1].append(span)
        end = max(end, span[1])
    return clusters


def _find_shared_in_cluster(cluster: list[tuple[int, int, Tensor]]) -> tuple[int, int] | None:
    """Disjoint if for one period, a stride of the first two, all addresses modulo it lie in ranges that do not meet."""
    if len(cluster) == 1:
        return None
    (origin, first, one), (_, second, other) = cluster[:2]
    for period in sorted({step * tensor.itemsize for tensor in (one, other) for step in tensor.stride() if step}):
        ranges = sorted(
            (offset, offset + _span(tensor, period))
            for offset, tensor in (((start - origin) % period, tensor) for start, _, tensor in cluster)
        )
        # The first range starts at 0, so a range that ends after the period meets it again.
        if ranges[-1][1] <= period and all(left[1] <= right[0] for left, right in pairwise(ranges)):
            return None
    return first, second


def _fake(tensors, kind, alpha, beta):
    return None


def _vmap(overload, info, in_dims, tensors, kind, alpha, beta):
    """By element: a batch dimension is a dimension like any other."""
    overload(tensors, kind, alpha, beta)
    return None, None


def _triton(tensors: list[Tensor], kind: str, alpha: float, beta: float) -> None:
    # Here and not above: importing lcw_ops must not need Triton.
    from lcw_ops.kernels.gradient_activation import gradient_activation

    for tensor in tensors:
        if is_dense(tensor):
            gradient_activation(tensor, kind, alpha, beta)
            if not tensor.is_inference():
                # The kernel writes through a pointer: nothing else tells autograd, which may have saved the tensor.
                torch.autograd.graph.increment_version(tensor)
        else:
            dense = tensor.contiguous()
            gradient_activation(dense, kind, alpha, beta)
            tensor.copy_(dense)


def activate_(backend: str, tensors: list[Tensor], kind: str, alpha: float, beta: float) -> None:
    """The op on ``backend``; the tensors are on one device, and everything has been checked."""
    if backend != "reference":
        _library.get_overload(NAME, backend)(tensors, kind, alpha, beta)
        return
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # The compiler fuses these itself, and foreach calls have no vmap rules.
        for tensor in tensors:
            tensor.copy_(reference.gradient_activation(tensor, kind, alpha, beta))
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for dtype, same in by_dtype.items():
        for start in range(0, len(same), FOREACH_TENSORS):
            group = same[start : start + FOREACH_TENSORS]
            if dtype in (torch.bfloat16, torch.float16):
                wide = [tensor.float() for tensor in group]
                _foreach_activate_(wide, kind, alpha, beta)
                torch._foreach_copy_(group, wide)
            else:
                _foreach_activate_(group, kind, alpha, beta)


def _foreach_activate_(tensors: list[Tensor], kind: str, alpha: float, beta: float) -> None:
    """lcw_ops.reference.gradient_activation in place, by as few calls as there are operations."""
    if kind == "log":
        signs = torch._foreach_sign(tensors)
        torch._foreach_abs_(tensors)
    torch._foreach_mul_(tensors, beta)
    {"arctan": torch._foreach_atan_, "tanh": torch._foreach_tanh_, "log": torch._foreach_log1p_}[kind](tensors)
    if kind == "log":
        torch._foreach_mul_(tensors, signs)
    torch._foreach_mul_(tensors, alpha)


_library.declare(
    NAME,
    "(Tensor(a!)[] tensors, str kind, float alpha, float beta) -> ()",
    backends=("triton",),
    fake=_fake,
    vmap=_vmap,
)
_library.implement(NAME, "triton", _triton)
_backends.IMPLEMENTED[NAME] = ("triton",)
