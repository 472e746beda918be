"""Times kernels against plain torch as a user writes it, forward and backward, in turns.

A kernel is faster if its median time is at least 5 % shorter and the difference exceeds the spread of both. That must
hold for every size of a class, called eagerly and, on a GPU, replayed as a CUDA graph. The inputs are too many for the
second-level cache. A copy is timed before and after: if it changed by more than 10 %, the machine was disturbed.
"""

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import optim
from lcw_ops.bench.registry import seconds
from lcw_ops.ops import gradient_activation, hypersphere, lcw_linear, verdicts, weight_norm
from lcw_ops.ops.backends import FORM_OF
from lcw_ops.ops.orthogonal_filter import op as orthogonal_filter
from lcw_ops.ops.parallel_depth import op as parallel_depth
from lcw_ops.ops.verdicts import Kind
from lcw_ops.verification.cases import DTYPES, Draw, Net, draw_normal, takes, widest_of

LEAST_GAIN = 1.05
ROUNDS = 5
# A turn repeats its work for at least this long, so that the clock's steps and a call's overhead do not matter.
TURN_SECONDS = {"cpu": 0.02, "cuda": 0.005}
# The inputs fill this many second-level caches, but are at most MOST_SETS.
CACHES, MOST_SETS = 3, {"cpu": 8, "cuda": 32}
MOST_CHANGE = 1.1
MOST_CPU_SPEEDS = 3
COPY_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
COPIES = 10
# On a shared machine with two cores, half of the copies differed from the one before by more than 10 % if each was the
# best of 0.02 s, and a tenth of them if it was the best of 0.1 s.
COPY_SECONDS = {"cpu": 0.05, "cuda": 0.02}

# Draws inputs, and returns the work on them.
Prepare = Callable[[list[Tensor]], Callable[[], object]]


class Disturbed(Exception):
    """The machine's speed changed while a kernel was timed."""


@dataclass(frozen=True)
class Speed:
    """``captures``: whether the work can be captured in a CUDA graph. A parallel solver and optimizers cannot."""

    op: str
    kind: Kind
    name: str
    dtype: torch.dtype
    draw: Draw
    ours: Prepare
    plain: Prepare
    captures: bool = True
    width: int = 0

    @property
    def label(self) -> str:
        return f"speed, {self.name}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Ratio:
    """Plain torch's time divided by the kernel's; ``faster`` by the rule above."""

    times: float
    faster: bool


def measure(speed: Speed, backend: str, device: torch.device) -> Ratio:
    """The least ratio of eager calls and graph replays. Raises Disturbed, on a GPU after a second try."""
    # On a CPU the choice does not depend on the times, and a busy one stays busy.
    for last in (True,) if device.type == "cpu" else (False, True):
        before = _copy_seconds(device)
        ratios = list(_ratios(speed, backend, device))
        after = _copy_seconds(device)
        change = max(before, after) / min(before, after)
        if change <= MOST_CHANGE:
            return min(ratios, key=lambda ratio: (ratio.faster, ratio.times))
        if last:
            raise Disturbed(f"the time of a copy changed by {change - 1:.0%} meanwhile")
    raise AssertionError


def _ratios(speed: Speed, backend: str, device: torch.device) -> Iterator[Ratio]:
    sets = _draw_sets(speed, device)
    ours, plain = (_pass_over([prepare(inputs) for inputs in sets]) for prepare in (speed.ours, speed.plain))
    with lcw_ops.use_backend(FORM_OF.get(backend, backend)):
        yield _compare(ours, plain, device)
        if device.type == "cuda" and speed.captures:
            yield _compare(_captured(ours), _captured(plain), device)


def _draw_sets(speed: Speed, device: torch.device) -> list[list[Tensor]]:
    # On the device: a CPU takes seconds to draw the largest inputs.
    with device:
        drawn = speed.draw()
    first = [tensor.to(speed.dtype) if tensor.is_floating_point() else tensor for tensor in drawn]
    count = math.ceil(CACHES * _cache_bytes(device) / max(sum(tensor.nbytes for tensor in first), 1))
    # To draw each set afresh would take longer than to time it, and numbers in other memory are as far from the cache.
    return [first, *([tensor.clone() for tensor in first] for _ in range(min(count, MOST_SETS[device.type]) - 1))]


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (ValueError, OSError):
        return 1 << 20


def _pass_over(runs: list[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for each in runs:
            each()

    return run


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _compare(ours: Callable, plain: Callable, device: torch.device) -> Ratio:
    runs = {"ours": ours, "plain": plain}
    repeats = {name: _count_repeats(run, device) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(_turn(run, repeats[name], device))
    median = {name: statistics.median(each) for name, each in times.items()}
    spread = max(max(each) - min(each) for each in times.values())
    gain = median["plain"] - median["ours"]
    ratio = median["plain"] / median["ours"]
    return Ratio(ratio, ratio >= LEAST_GAIN and gain > spread)


def _count_repeats(run: Callable, device: torch.device) -> int:
    """The number of calls that fill a turn. The first call warms up: it may compile, or choose a matmul."""
    seconds(run, device)
    return max(1, math.ceil(TURN_SECONDS[device.type] / max(seconds(run, device), 1e-9)))


def _turn(run: Callable, repeats: int, device: torch.device) -> float:
    return seconds(lambda: [run() for _ in range(repeats)], device) / repeats


def _copy_seconds(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    until = time.perf_counter() + COPY_SECONDS[device.type]
    best = math.inf
    for count in range(1000):
        best = min(best, seconds(lambda: target.copy_(source), device))
        if count >= COPIES and time.perf_counter() > until:
            break
    return best


# ---- The work --------------------------------------------------------------------------------------------------------


def speeds(op: str, backend: str, device_type: str) -> list[Speed]:
    """The calls of an op on a backend that are timed."""
    kinds = verdicts.kinds(op)
    if device_type == "cpu":
        # There the automatic choice does not depend on the times. A few are enough to show what a kernel is worth.
        kinds = [kind for kind in kinds if kind.dtype in ("any", "float32")][:1]
    found = [speed for kind in kinds for speed in _OF_OP[op](kind)]
    if device_type == "cpu":
        found = found[:MOST_CPU_SPEEDS]
    return [speed for speed in found if takes(op, backend, speed.width, speed.dtype)]


def _repeat(run: Callable[[list[Tensor]], object]) -> Prepare:
    return lambda inputs: functools.partial(run, inputs)


# (name, inputs, ours, plain torch)
Work = tuple[str, Draw, Callable[..., Tensor], Callable[..., Tensor]]


def _unit_speeds(op: str, kind: Kind, works: list[Work]) -> Iterator[Speed]:
    for name, draw, ours, plain in works:
        yield Speed(op, kind, name, DTYPES[kind.dtype][0], draw, _gradients(ours), _gradients(plain))


def _gradients(function: Callable[..., Tensor]) -> Prepare:
    """Forward and backward. The result is its own gradient, which takes no time to compute."""

    def run(inputs: list[Tensor]) -> object:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = function(*leaves)
        return torch.autograd.grad(output, leaves, output.detach())

    return _repeat(run)


def _samples(widest: int) -> tuple[int, ...]:
    """Numbers of samples below and above the limit of the fused kernels."""
    return (8, 64, 256) if widest <= 1024 else (8, 128)


def _lcw(kind: Kind) -> Iterator[Speed]:
    m = widest_of(kind)
    works: list[Work] = [
        (f"weight, {m} x {m}", draw_normal((m, m)), F.lcw_weight, lambda w: w - w.mean(1, keepdim=True))
    ]
    works += [
        (f"M={samples}, {m} x {m}", draw_normal((samples, m), (m, m), (m,)), F.lcw_linear, _plain_lcw)
        for samples in _samples(m)
    ]
    return _unit_speeds(lcw_linear.NAME, kind, works)


def _plain_lcw(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.linear(x, weight - weight.mean(1, keepdim=True), bias)


def _hypersphere(kind: Kind) -> Iterator[Speed]:
    m = widest_of(kind)

    def draw(samples: int) -> list[Tensor]:
        return [*draw_normal((samples, m))(), draw_many_angles(), *draw_normal((m,), (m,))()]

    def draw_many_angles() -> Tensor:
        # About those of random directions, whose computation would take longer than the timing.
        return torch.pi / 2 + torch.randn(m, m - 1, dtype=torch.float64) / m**0.5

    works: list[Work] = [
        (f"direction, {m} x {m}", lambda: [draw_many_angles()], F.hypersphere_direction, _plain_direction)
    ]
    works += [
        (
            f"GmP, M={samples}, {m} x {m}",
            functools.partial(draw, samples),
            functools.partial(F.gmp_linear, activation="relu"),
            _plain_gmp,
        )
        for samples in _samples(m)
    ]
    return _unit_speeds(hypersphere.NAME, kind, works)


def _plain_direction(angles: Tensor) -> Tensor:
    sine, cosine = angles.sin(), angles.cos()
    products = sine.cumprod(1)
    return torch.cat([cosine[:, :1], cosine[:, 1:] * products[:, :-1], products[:, -1:]], 1)


def _plain_gmp(x: Tensor, angles: Tensor, radius: Tensor, location: Tensor) -> Tensor:
    return radius * nn.functional.linear(x, _plain_direction(angles), location).relu()


def _weight_norm(kind: Kind) -> Iterator[Speed]:
    m = widest_of(kind)
    works: list[Work] = [
        (f"normalised rows, {m} x {m}", draw_normal((m, m), (m,)), F.normalize_scale, _plain_normalize)
    ]
    works += [
        (
            f"M={samples}, {m} x {m}",
            draw_normal((samples, m), (m, m), (m,), (m,)),
            F.weight_norm_linear,
            _plain_weight_norm,
        )
        for samples in _samples(m)
    ]
    return _unit_speeds(weight_norm.NAME, kind, works)


def _plain_normalize(weight: Tensor, scale: Tensor) -> Tensor:
    return scale[:, None] * weight / weight.norm(dim=1, keepdim=True)


def _plain_weight_norm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.linear(x, _plain_normalize(weight, scale), bias)


# Parameters of a model, and one large parameter.
LISTS = {"1 tensor of 2^20": [2**20], "300 tensors of 10,000": [10_000] * 300}


def _gradient_activation(kind: Kind) -> Iterator[Speed]:
    def plain(gradients: list[Tensor]) -> None:
        torch._foreach_mul_(gradients, 20.0)
        torch._foreach_atan_(gradients)
        torch._foreach_mul_(gradients, 0.1)

    for name, sizes in LISTS.items():
        for dtype in (torch.float32, torch.bfloat16):
            draw = draw_normal(*((size,) for size in sizes))
            yield Speed(
                gradient_activation.NAME, kind, name, dtype, draw, _repeat(F.gradient_activation_), _repeat(plain)
            )


def _steps(make_optimizer: Callable, activates: bool, inputs: list[Tensor]) -> Callable[[], object]:
    """A step with activated gradients. torch's optimizer gets its gradients activated before."""
    count = len(inputs) // 2
    params = [nn.Parameter(tensor) for tensor in inputs[:count]]
    optimizer = make_optimizer(params)
    for param, gradient in zip(params, inputs[count:], strict=True):
        param.grad = gradient

    def step() -> None:
        if not activates:
            gradients = inputs[count:]
            torch._foreach_mul_(gradients, 20.0)
            torch._foreach_atan_(gradients)
            torch._foreach_mul_(gradients, 0.1)
        optimizer.step()

    return step


def _optimizer_speeds(op: str, kind: Kind, ours: Callable, plain: Callable) -> Iterator[Speed]:
    for name, sizes in LISTS.items():
        draw = draw_normal(*((size,) for size in sizes * 2))
        prepare = functools.partial(_steps, ours, True), functools.partial(_steps, plain, False)
        yield Speed(op, kind, name, torch.float32, draw, *prepare, captures=False)


def _sgd_step(kind: Kind) -> Iterator[Speed]:
    ours = functools.partial(optim.SGD, lr=1e-3, momentum=0.9, gradient_activation="arctan")
    plain = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True)
    return _optimizer_speeds(gradient_activation.SGD_STEP, kind, ours, plain)


def _adamw_step(kind: Kind) -> Iterator[Speed]:
    ours = functools.partial(optim.AdamW, lr=1e-3, gradient_activation="arctan")
    return _optimizer_speeds(
        gradient_activation.ADAMW_STEP, kind, ours, functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)
    )


def _net_speed(op: str, kind: Kind, net: Net, solver: str) -> Speed:
    """A recurrence against the same call in plain torch, which is what runs where no kernel is chosen."""
    run = net.run(solver)

    def run_plainly(inputs: list[Tensor]) -> list[Tensor]:
        with lcw_ops.use_backend("reference"):
            return run(inputs)

    prepare = _repeat(run), _repeat(run_plainly)
    captures = solver == "sequential"
    return Speed(op, kind, net.name, DTYPES[kind.dtype][0], net.draw, *prepare, captures, net.width)


def _recurrence(kind: Kind) -> Iterator[Speed]:
    width = widest_of(kind)
    steps = 100 if width <= 128 else 20
    for rows, over_time in ((1, False), (128, False), (5, True)):
        net = Net(width, rows, steps, over_time=over_time)
        yield _net_speed(orthogonal_filter.NAME, kind, net, "sequential")


def _sweeps(kind: Kind) -> Iterator[Speed]:
    for net in (Net(widest_of(kind), 1, 300), Net(widest_of(kind), 16, 300, "permutation")):
        yield _net_speed(parallel_depth.SWEEP, kind, net, "parallel")


_OF_OP: dict[str, Callable[[Kind], Iterator[Speed]]] = {
    lcw_linear.NAME: _lcw,
    hypersphere.NAME: _hypersphere,
    weight_norm.NAME: _weight_norm,
    gradient_activation.NAME: _gradient_activation,
    gradient_activation.SGD_STEP: _sgd_step,
    gradient_activation.ADAMW_STEP: _adamw_step,
    orthogonal_filter.NAME: _recurrence,
    parallel_depth.SWEEP: _sweeps,
}
