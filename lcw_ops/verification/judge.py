"""Judges a case against float64, by the twice-eager rule of docs/numerics.md.

New memory is full of NaN, every buffer lies between guard bands, and two runs on equal inputs must give equal bits.
"""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

import lcw_ops
from lcw_ops import _torch
from lcw_ops.bench.registry import OURS_SLACK, WrongResult
from lcw_ops.ops.backends import FORM_OF
from lcw_ops.verification.cases import Case

# Bytes on either side of a buffer. A multiple of 512, the alignment of torch's allocator on a GPU.
BAND = 512
# All bits set: a NaN in every floating dtype, and -1 as an integer.
FILL = 255
# Rounding errors of a sum of K terms grow like a random walk, with sqrt(K) if the sum is one chain, and hardly at all
# if it is a tree. The order of a sum therefore changes them by at most sqrt(4096), for the longest rows of the cases.
ORDERS = 64
# With 32 draws, even a result of one number is judged by as many numbers as the tests judge together.
FEW_DRAWS, MOST_DRAWS = 4, 32
HOPELESS = 8.0
MOST_SECONDS = 10.0

aten = torch.ops.aten
# New memory without content, and with content.
_EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default}
_FILLED = {aten.zeros_like.default, aten.clone.default, aten.zeros.default}


class Guards(_torch.DispatchMode):
    """Puts the memory that our kernels allocate between guard bands.

    ``everywhere``: also the memory that torch allocates outside of our ops, such as an optimizer's states.
    """

    def __init__(self, device_type: str, everywhere: bool = False) -> None:
        super().__init__()
        self._device_type, self._everywhere = device_type, everywhere
        self._inside = 0
        self._bands: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "lcw_ops":
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
        self._bands += [buffer[:start], buffer[end:]]
        if not like.numel():
            return torch.empty_like(like)
        return buffer[start:end].view(like.dtype).as_strided(like.shape, like.stride(), start // like.itemsize)

    def check(self) -> None:
        """Raise WrongResult if a kernel has written to a band."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for band in self._bands:
            by_device.setdefault(band.device, []).append(band)
        # One comparison per device: on a GPU each makes the host wait.
        if any((torch.cat(bands) != FILL).any() for bands in by_device.values()):
            raise WrongResult("a kernel wrote outside of its memory")


def judge(case: Case, backend: str, device: torch.device) -> None:
    """Raise WrongResult if the backend is not right on fresh inputs.

    The error of a result with few numbers is a matter of luck, for eager torch too. A result that would be refused is
    therefore judged again, by the largest errors over more and more draws.
    """
    pooled: list[Measured] = []
    began = time.monotonic()
    for draw in range(MOST_DRAWS):
        inputs = [tensor.to(device) for tensor in case.make_inputs()]
        now = _measure(case, inputs, _run_guarded(case, inputs, backend, device.type))
        pooled = [Measured(*map(max, *pair)) for pair in zip(pooled, now, strict=True)] if pooled else now
        over = max((result.excess for result in pooled), default=0.0)
        if over <= 1:
            return
        # Luck explains no error that is many times too large after a few draws.
        if draw + 1 >= FEW_DRAWS and (over > HOPELESS or time.monotonic() - began > MOST_SECONDS):
            break
    index = max(range(len(pooled)), key=lambda index: pooled[index].excess)
    worst = pooled[index]
    if math.isinf(worst.error):
        raise WrongResult(f"result {index} is not finite")
    raise WrongResult(
        f"result {index} differs from float64 by {worst.error:.3g}; expected at most {worst.allowed:.3g}, for numbers "
        f"of up to {worst.scale:.3g}"
    )


class Measured(NamedTuple):
    """The largest error of a result, eager torch's times the factor that is allowed, and the result's scale."""

    error: float
    eager: float
    scale: float
    last_place: float

    @property
    def allowed(self) -> float:
        return self.eager + self.last_place * self.scale

    @property
    def excess(self) -> float:
        """The error in multiples of what is allowed."""
        return self.error / self.allowed if self.allowed else (math.inf if self.error else 0.0)


def _measure(case: Case, inputs: list[Tensor], results: list[Tensor]) -> list[Measured]:
    """Compare the results, and those of eager torch on the same inputs, with float64.

    For float64 there are no more exact results. Rounding errors are proportional to the unit in the last place, so
    eager's error in float64 is taken as its error in float32, scaled, and times ORDERS, because torch may add in
    another order. A sum in float32 still fails by a factor of millions.
    """
    exact = _run_plainly(case, [_double(tensor) for tensor in inputs])
    if len(results) != len(exact):
        raise WrongResult(f"{len(results)} results, expected {len(exact)}")
    slack, eager_exact = float(OURS_SLACK), exact
    if case.dtype == torch.float64:
        inputs = [tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs]
        eager_exact = _run_plainly(case, [_double(tensor) for tensor in inputs])
        slack *= ORDERS * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    eager = _run_plainly(case, inputs)
    for index, (result, plain) in enumerate(zip(results, exact if case.dtype == torch.float64 else eager, strict=True)):
        if result.dtype != plain.dtype:
            raise WrongResult(f"result {index} has {result.dtype}, expected {plain.dtype}")
    return [
        Measured(
            _largest_error(index, result, wanted),
            slack * _largest_error(index, plain, plain_wanted),
            wanted.abs().max().item() if wanted.numel() else 0.0,
            torch.finfo(result.dtype).eps,
        )
        for index, (result, wanted, plain, plain_wanted) in enumerate(
            zip(results, exact, eager, eager_exact, strict=True)
        )
    ]


def _largest_error(index: int, result: Tensor, wanted: Tensor) -> float:
    """Infinity, not NaN, if the error is NaN."""
    if result.shape != wanted.shape:
        raise WrongResult(f"result {index} has shape {tuple(result.shape)}, expected {tuple(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    error = (result.double() - wanted).abs().max().item()
    return math.inf if math.isnan(error) else error


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
    # torch.use_deterministic_algorithms would import torch's compiler, for seconds in every child.
    def __enter__(self) -> None:
        torch.set_deterministic_debug_mode("warn")

    def __exit__(self, *_) -> None:
        torch.set_deterministic_debug_mode("default")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _run_plainly(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    with lcw_ops.use_backend("reference"):
        return [result.detach() for result in (case.plain or case.run)([tensor.clone() for tensor in inputs])]


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
