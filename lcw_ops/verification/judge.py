"""Judges a case against float64, by the twice-eager rule of docs/numerics.md.

New memory is full of NaN, every buffer lies between guard bands, and two runs on equal inputs must give equal bits.
"""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lcw_ops
from lcw_ops import _torch
from lcw_ops.bench.registry import MOST_DRAWS, OURS_SLACK, WrongResult, relative_errors
from lcw_ops.ops.backends import FORM_OF
from lcw_ops.verification.cases import Case

# Bytes on either side of a buffer. A multiple of 512, the alignment of torch's allocator on a GPU.
BAND = 512
# All bits set: a NaN in every floating dtype, and -1 as an integer.
FILL = 255
# Rounding errors of a sum of K terms grow like a random walk, with sqrt(K) if the sum is one chain, and hardly at all
# if it is a tree. The order of a sum therefore changes them by at most sqrt(4096), for the longest rows of the cases.
ORDERS = 64

aten = torch.ops.aten
# New memory without content, and with content.
_EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default}
_FILLED = {aten.zeros_like.default, aten.clone.default, aten.zeros.default}


class Guards(TorchDispatchMode):
    """Puts the memory that our kernels allocate between guard bands.

    ``everywhere``: also the memory that torch allocates outside of our ops, such as an optimizer's states.
    """

    def __init__(self, device_type: str, everywhere: bool = False) -> None:
        super().__init__()
        self._device_type, self._everywhere = device_type, everywhere
        self._inside = 0
        self._buffers: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # An op without tensors allocates nothing, and has no kernel of a device type.
        if func.namespace == "lcw_ops" and any(isinstance(argument, (Tensor, list)) for argument in args):
            self._inside += 1
            try:
                with self:
                    return _torch.call_kernel(func, self._device_type, *args, **kwargs)
            finally:
                self._inside -= 1
        result = func(*args, **kwargs)
        if (self._inside and func in _EMPTY) or (self._everywhere and func in _FILLED):
            guarded = self._allocate(result)
            return guarded.copy_(result) if func in _FILLED else guarded
        return result

    def copy(self, tensor: Tensor, offset: int = 0) -> Tensor:
        """The same values between guard bands, ``offset`` elements after an aligned address."""
        return self._allocate(tensor, offset).copy_(tensor)

    def _allocate(self, like: Tensor, offset: int = 0) -> Tensor:
        """Memory full of NaN, with the shape and strides of ``like``."""
        last = sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        start = BAND + offset * like.itemsize
        end = start + (last + 1 if like.numel() else 0) * like.itemsize
        buffer = torch.full((end + BAND,), FILL, dtype=torch.uint8, device=like.device)
        self._buffers.append((buffer[:start], 0))
        self._buffers.append((buffer[end:], 0))
        if not like.numel():
            return torch.empty_like(like)
        return buffer[start:end].view(like.dtype).as_strided(like.shape, like.stride(), start // like.itemsize)

    def check(self) -> None:
        """Raise WrongResult if a kernel has written to a band."""
        bands = [band for band, _ in self._buffers]
        if bands and any((torch.cat(same) != FILL).any() for same in _by_device(bands)):
            raise WrongResult("a kernel wrote outside of its memory")


def _by_device(bands: list[Tensor]) -> list[list[Tensor]]:
    by_device: dict[torch.device, list[Tensor]] = {}
    for band in bands:
        by_device.setdefault(band.device, []).append(band)
    return list(by_device.values())


def judge(case: Case, backend: str, device: torch.device) -> None:
    """Raise WrongResult if the backend is not right on fresh inputs.

    Few numbers leave the comparison to luck. A result that would be refused is therefore judged again, by the largest
    errors over up to MOST_DRAWS draws.
    """
    errors: list[float] = []
    allowed: list[float] = []
    for _ in range(MOST_DRAWS):
        inputs = [tensor.to(device) for tensor in case.make_inputs()]
        results = _run_guarded(case, inputs, backend, device.type)
        exact = _run_plainly(case, [_double(tensor) for tensor in inputs])
        errors = _largest(errors, relative_errors(results, exact))
        allowed = _largest(allowed, _allowed_errors(case, inputs, exact, results))
        if all(error <= most for error, most in zip(errors, allowed, strict=True)):
            return
    for index, (error, most) in enumerate(zip(errors, allowed, strict=True)):
        if not error <= most:
            what = "is not finite" if math.isinf(error) else f"differs from float64 by {error:.3g} of its scale"
            raise WrongResult(f"result {index} {what}; expected at most {most:.3g}")


def _run_guarded(case: Case, inputs: list[Tensor], backend: str, device_type: str) -> list[Tensor]:
    """The results of the second of two runs."""
    results: list[list[Tensor]] = []
    for _ in range(2):
        guards = Guards(device_type, everywhere=case.in_place)
        given = [guards.copy(tensor, case.offset) for tensor in inputs]
        # torch fills new memory in its deterministic mode alone, in which our C++ code allocates by torch's dispatcher.
        with lcw_ops.use_backend(FORM_OF.get(backend, backend)), _Deterministic(), guards:
            results.append([result.detach() for result in case.run(given)])
        guards.check()
        if not case.in_place and not all(map(_same_bits, given, inputs)):
            raise WrongResult("an argument has changed")
    if not all(map(_same_bits, *results)):
        raise WrongResult("two runs on equal inputs gave different bits")
    return results[1]


class _Deterministic:
    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_) -> None:
        torch.use_deterministic_algorithms(False)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _run_plainly(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    with lcw_ops.use_backend("reference"):
        return [result.detach() for result in (case.plain or case.run)([tensor.clone() for tensor in inputs])]


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _allowed_errors(case: Case, inputs: list[Tensor], exact: list[Tensor], results: list[Tensor]) -> list[float]:
    """Twice eager torch's errors, plus one unit in the last place, relative to the results' scales.

    For float64 there are no more exact results. Rounding errors are proportional to the unit in the last place, so
    eager's error in float64 is taken as its error in float32, scaled, and times ORDERS, because torch may add in
    another order. A sum in float32 still fails by a factor of millions.
    """
    places = [torch.finfo(result.dtype).eps for result in results]
    slack = float(OURS_SLACK)
    if case.dtype == torch.float64:
        inputs = [tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs]
        exact = _run_plainly(case, [_double(tensor) for tensor in inputs])
        slack *= ORDERS * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    eager = relative_errors(_run_plainly(case, inputs), exact)
    return [slack * error + place for error, place in zip(eager, places, strict=True)]


def _largest(before: list[float], now: list[float]) -> list[float]:
    return list(map(max, before, now)) if before else now
