"""Picard sweeps over windows of layers until they have converged, forward and backward.

A window is a range of D consecutive layers of N units; M is the number of samples. A sweep computes W_l h_{l-1} for all
layers from the states of the sweep before, and then all states by one scan. With d_k the largest relative change of a
state in sweep k and rho = d_k / d_{k-1} < 1, the remaining error is about rho / (1 - rho) d_k. A window has converged
when that is below the tolerance. A window that does not converge is halved; once it cannot be halved any more, the
sequential kernel continues, with one warning.

Cost of a sweep: one batched matmul (2 D M N^2 operations, which read D N^2 weights) and one scan over (D, M, N). The
time for small batches is that of reading the weights. On a GPU, a sweep with a permutation of at most 64 units is one
pass, which reads the states once (kernels/parallel_depth_fused.py).
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lcw_ops.ops.parallel_depth.scan import Layers, Workspace
from lcw_ops.ops.precision import full_float32
from lcw_ops.reference import parallel_depth as reference

# After this many sweeps, halving the window is cheaper than going on. A window of LEAST_WINDOW layers needs fewer: each
# sweep makes at least one more layer exact.
MAX_SWEEPS = 16
LEAST_WINDOW = 8

# The most bytes of the weights and states of a default window on a CPU, so that every sweep finds them in the cache.
CACHED_BYTES = 8 * 2**20
# The fewest layers of a default window. Wide nets would otherwise get so few that calls take longer than arithmetic.
LEAST_DEFAULT_WINDOW = 64


@dataclass(frozen=True)
class Solve:
    """How one window of layers was solved.

    Attributes:
        direction: "forward" or "backward".
        first_layer, layers: the window.
        sweeps: the number of sweeps; 0 if the sequential kernel solved it.
        contraction: rho, the last change divided by the one before; NaN after fewer than two sweeps.
        residual: d_k, the largest relative change of a state in the last sweep.
        error: the estimate of the remaining relative error.
        converged: whether the error is below the tolerance, or only rounding. False for a window that was given up.
    """

    direction: str
    first_layer: int
    layers: int
    sweeps: int
    contraction: float
    residual: float
    error: float
    converged: bool


_recorders: list[list[Solve]] = []


@contextmanager
def record_solves() -> Iterator[list[Solve]]:
    """Collect a :class:`Solve` for every window that is solved inside the ``with`` block, by any thread."""
    solves: list[Solve] = []
    _recorders.append(solves)
    try:
        yield solves
    finally:
        _recorders[:] = [recorder for recorder in _recorders if recorder is not solves]


def _record(solve: Solve) -> None:
    for recorder in _recorders:
        recorder.append(solve)


def default_tolerance(dtype: torch.dtype, steps: int) -> float:
    """About the size of rounding errors after all steps: eps sqrt(steps) / 8, and at least eps."""
    return torch.finfo(dtype).eps * max(1.0, math.sqrt(steps) / 8)


class Convergence:
    """The largest relative change of a state in each sweep of a window so far, and the conclusions from them."""

    def __init__(self, layers: int, tolerance: float, dtype: torch.dtype) -> None:
        self.layers, self.tolerance = layers, tolerance
        # Changes of an ulp or two that no longer shrink come from rounding the states, not from the sweeps.
        self.rounding = 2 * torch.finfo(dtype).eps
        self.changes: list[float] = []

    def add(self, change: float) -> None:
        self.changes.append(change)

    def correct(self, change: float) -> None:
        """Replace the last change, which was a lower bound, by the change of all states."""
        self.changes[-1] = change

    @property
    def contraction(self) -> float:
        if len(self.changes) < 2:
            return math.nan
        before, now = self.changes[-2:]
        return now / before if before > 0 else math.inf if now > 0 else 0.0

    @property
    def error(self) -> float:
        """The estimated error; infinity until there is an estimate."""
        # After as many sweeps as layers, every state is exact. If a sweep changes nothing, later ones would not either.
        if len(self.changes) >= self.layers or self.changes[-1] == 0:
            return 0.0
        if self.is_rounding:
            return self.changes[-1]
        rho = self.contraction
        return rho / (1 - rho) * self.changes[-1] if rho < 1 else math.inf

    @property
    def has_converged(self) -> bool:
        if not math.isfinite(self.changes[-1]):
            return False
        return self.error <= self.tolerance or self.is_rounding

    @property
    def is_rounding(self) -> bool:
        return self.changes[-1] <= self.rounding and self.contraction > 0.5

    @property
    def is_hopeless(self) -> bool:
        """Whether the remaining sweeps would not suffice, even if the contraction falls as fast as it can.

        After k sweeps, the error of Picard's iteration is about (c s)^k / k!, with c = beta times the number of layers
        and s the norm of the derivative of act(W h). So the contraction falls like 1 / k.
        """
        sweeps, change, rho = len(self.changes), self.changes[-1], self.contraction
        if not math.isfinite(change) or sweeps >= MAX_SWEEPS:
            return True
        if sweeps < 3 or self.layers <= MAX_SWEEPS:
            return False
        for later in range(sweeps + 1, MAX_SWEEPS + 1):
            change *= rho * sweeps / later
        rho *= sweeps / MAX_SWEEPS
        return rho >= 1 or rho / (1 - rho) * change > self.tolerance

    def to_solve(self, direction: str, first_layer: int) -> Solve:
        return Solve(
            direction,
            first_layer,
            self.layers,
            len(self.changes),
            self.contraction,
            self.changes[-1],
            self.error,
            self.has_converged,
        )


def default_window(weight: Tensor, rows: int, steps: int) -> int:
    """Layers per window: on a GPU all; on a CPU as many as fit into the cache, but at least LEAST_DEFAULT_WINDOW."""
    if not weight.is_cpu:
        return max(steps, 1)
    width = weight.shape[-1]
    per_layer = max(weight.itemsize, torch.float32.itemsize) * (
        4 * rows * width + (width * width if weight.dim() == 3 else 0)
    )
    return max(1, min(steps, max(LEAST_DEFAULT_WINDOW, CACHED_BYTES // max(per_layer, 1))))


# (h_0, layers, D) -> all their states (D+1, M, N)
SequentialForward = Callable[[Tensor, Layers, int], Tensor]


class Windows:
    """The base of Forward and Backward: the size of the window, and the sweeps in one window.

    A window of D layers gets the share sqrt(D / steps) of the tolerance for all ``steps`` layers, because the errors of
    windows add up like independent ones.
    """

    direction: str

    def __init__(self, scan, tolerance: float, window: int, steps: int) -> None:
        self.scan, self.window = scan, window
        self.tolerance, self.steps = tolerance, steps
        self.asked = window
        self.workspace = Workspace()
        self.given_up: Convergence | None = None
        # The layer boundary at which the last solved window ended, in the direction of the pass.
        self.next_layer: int | None = None

    def converge(
        self,
        first_layer: int,
        layers: int,
        dtype: torch.dtype,
        sweep: Callable[[], Tensor],
        finish: Callable[[], Tensor] | None = None,
    ) -> bool:
        """Sweep until the window has converged, or cannot converge. Returns whether it has.

        With ``finish``, the change that ``sweep`` returns is a lower bound. ``finish`` writes the states of the last
        sweep and returns the change of all of them, which decides.
        """
        convergence = Convergence(layers, self.tolerance * math.sqrt(layers / self.steps), dtype)
        while True:
            convergence.add(sweep().item())
            # Judged by changes of one kind: the corrected one may exceed the one before for its kind alone.
            is_hopeless = convergence.is_hopeless
            if finish is not None and convergence.has_converged:
                convergence.correct(finish().item())
            done = convergence.has_converged
            if done or is_hopeless:
                break
        _record(convergence.to_solve(self.direction, first_layer))
        if not done:
            self.given_up = convergence
        return done

    def halve(self, layers: int) -> None:
        self.window = min(self.window, layers) // 2

    @property
    def is_sequential(self) -> bool:
        return self.window < LEAST_WINDOW

    def record_sequential(self, first_layer: int, layers: int) -> None:
        _record(Solve(self.direction, first_layer, layers, 0, math.nan, 0.0, 0.0, True))


def warn_of_given_up(*windows: Windows) -> None:
    """Warn of the first pass that gave up a window. The text names no layer, so that Python shows it only once."""
    given_up = next((one for one in windows if one.given_up is not None), None)
    if given_up is None:
        return
    tried = f"{given_up.direction}, windows of {given_up.asked}"
    if not math.isfinite(given_up.given_up.changes[-1]):
        advice = "A state or a gradient is not finite."
    else:
        advice = 'A smaller window or a smaller beta converges faster; solver="sequential" always works.'
    warnings.warn(
        f"orthogonal_filter: the parallel solver did not converge ({tried}). It continued with smaller windows and in "
        f"the end sequentially: the result is correct but took longer. {advice}",
        RuntimeWarning,
        stacklevel=2,
    )


class Forward(Windows):
    """Computes the states of consecutive layers from h_0, window by window."""

    direction = "forward"

    def __init__(self, scan, tolerance: float, window: int, steps: int, sequential: SequentialForward) -> None:
        super().__init__(scan, tolerance, window, steps)
        self.sequential = sequential

    def run(self, states: Tensor, layers: Layers) -> None:
        """Fill states[1:] from states[0]; ``states`` (D+1, M, N) are those of all ``layers``."""
        start, steps = 0, len(states) - 1
        while start < steps:
            if self.is_sequential or steps - start < LEAST_WINDOW:
                rest = layers.part(start, steps)
                states[start:] = self.sequential(states[start], rest, steps - start)
                self.record_sequential(rest.first, steps - start)
                return
            stop = min(start + self.window, steps)
            if self._solve(states[start : stop + 1], layers.part(start, stop)):
                start = stop
            else:
                self.halve(stop - start)

    def _solve(self, states: Tensor, layers: Layers) -> bool:
        steps = len(states) - 1
        product = self.workspace.take("product", states[1:])
        fused = self.scan.start_fused(layers, states, product)
        if fused is not None:
            return self.converge(layers.first, steps, states.dtype, fused.sweep, fused.finish)
        layers = layers.to_dtype(states.dtype)
        self.scan.begin(continues=layers.first == self.next_layer)
        self.scan.sweep(layers, states, None)

        def sweep() -> Tensor:
            layers.multiply(states[:-1], product)
            return self.scan.sweep(layers, states, product)

        if not self.converge(layers.first, steps, states.dtype, sweep):
            return False
        self.scan.finish(states)
        self.next_layer = layers.first + steps
        return True


class Gradients(NamedTuple):
    """The tensors that a backward pass fills, each in its argument's shape; None for a gradient that is not needed.

    For arguments that all layers share, and for alpha and beta, the pass adds to the tensor. It overwrites the others.
    A shared weight's gradient is in float64.
    """

    weight: Tensor | None
    bias: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    inputs: Tensor | None

    def part(self, start: int, stop: int, layers: Layers) -> "Gradients":
        def cut(gradient, is_per_layer):
            return gradient[start:stop] if gradient is not None and is_per_layer else gradient

        return Gradients(
            cut(self.weight, layers.weight.dim() == 3),
            cut(self.bias, layers.bias is not None and layers.bias.dim() == 2),
            cut(self.alpha, layers.alpha.numel() != 1),
            cut(self.beta, layers.beta.numel() != 1),
            cut(self.inputs, True),
        )


# (gradient of the last state, h_0, layers, other states' gradients from outside, gradients, D) -> gradient of h_0
SequentialBackward = Callable[[Tensor, Tensor, Layers, Tensor | None, Gradients, int], Tensor]


class Backward(Windows):
    """Computes the gradients of consecutive layers with known states, from the last state back, window by window."""

    direction = "backward"

    def __init__(self, scan, tolerance: float, window: int, steps: int, kernels, filter: Tensor, sequential) -> None:
        super().__init__(scan, tolerance, window, steps)
        self.kernels, self.filter, self.sequential = kernels, filter, sequential

    def run(
        self, gradient: Tensor, states: Tensor, layers: Layers, outside: Tensor | None, gradients: Gradients
    ) -> Tensor:
        """Return the gradient of states[0]; the arguments' gradients go into ``gradients``.

        ``gradient`` (M, N) is the last state's. ``outside`` (D, M, N) are the gradients that the other states receive
        from outside the recurrence.
        """
        stop = len(states) - 1
        while stop > 0:
            if self.is_sequential or stop < LEAST_WINDOW:
                part = gradients.part(0, stop, layers)
                rest = layers.part(0, stop)
                self.record_sequential(rest.first, stop)
                reaching = None if outside is None else outside[:stop]
                return self.sequential(gradient, states[0], rest, reaching, part, stop)
            start = max(0, stop - self.window)
            found = self._solve(
                gradient,
                states[start : stop + 1],
                layers.part(start, stop),
                None if outside is None else outside[start:stop],
                gradients.part(start, stop, layers),
            )
            if found is None:
                self.halve(stop - start)
            else:
                gradient, stop = found, start
        return gradient

    def _solve(self, gradient, states, layers, outside, gradients) -> Tensor | None:
        steps = len(states) - 1
        layers = layers.to_dtype(states.dtype)
        slope, grad_pre, product = (self.workspace.take(name, states[1:]) for name in ("slope", "grad_pre", "product"))
        adjoint = self.workspace.take("adjoint", states)
        layers.multiply(states[:-1], slope)
        self.kernels.activate_(slope, layers.bias, layers.inputs, layers.beta, layers.activation, True)
        adjoint[-1] = gradient
        fused = self.scan.start_fused_adjoint(layers, adjoint, outside, slope, product)
        if fused is not None:
            sweep, finish = fused.sweep, lambda: fused.finish(grad_pre)
        else:
            self.scan.begin(continues=layers.first + steps == self.next_layer)
            self.scan.adjoint_sweep(layers, adjoint, None, outside, slope, grad_pre)
            finish = None

            def sweep() -> Tensor:
                layers.multiply_transposed(grad_pre, product)
                return self.scan.adjoint_sweep(layers, adjoint, product, outside, slope, grad_pre)

        if not self.converge(layers.first, steps, states.dtype, sweep, finish):
            return None
        self.scan.finish_adjoint(adjoint)
        self.next_layer = layers.first
        self._collect(adjoint, grad_pre, states, layers, gradients, product)
        return adjoint[0].clone()

    def _collect(self, adjoint, grad_pre, states, layers: Layers, gradients: Gradients, spare: Tensor) -> None:
        """The gradients of the arguments: one batched matmul for the weights, sums for the others."""
        before = states[:-1]
        if gradients.inputs is not None:
            gradients.inputs.copy_(grad_pre)
        if gradients.bias is not None:
            if gradients.bias.dim() == 2:
                torch.sum(grad_pre, 1, out=gradients.bias)
            else:
                gradients.bias.add_(grad_pre.sum((0, 1)))
        if gradients.weight is not None:
            if gradients.weight.dim() == 2:
                _add_outer_products(gradients.weight, grad_pre, before)
            elif gradients.weight.dtype == grad_pre.dtype:
                torch.bmm(grad_pre.mT, before, out=gradients.weight)
            else:
                gradients.weight.copy_(torch.bmm(grad_pre.mT, before))
        if gradients.alpha is not None:
            with full_float32(before.device):
                _add_inner_products(gradients.alpha, adjoint[1:], reference.apply_filter(before, self.filter))
        if gradients.beta is not None:
            layers.multiply(before, spare)
            one = spare.new_ones(1)
            self.kernels.activate_(spare, layers.bias, layers.inputs, one, layers.activation, False)
            _add_inner_products(gradients.beta, adjoint[1:], spare)


# The number of outer products in one float32 sum, one per sample and layer, and the most bytes of sums computed at a
# time.
SUMMED_SAMPLES = 64
SUMMED_BYTES = 64 * 2**20


def _add_outer_products(weight_gradient: Tensor, grad_pre: Tensor, before: Tensor) -> None:
    """Add grad_pre^T before, summed over layers, to the weight's float64 gradient. Only short sums are in float32."""
    rows = [tensor.flatten(0, 1) for tensor in (grad_pre, before)]
    sums_at_once = max(1, SUMMED_BYTES // max(weight_gradient.numel() * before.itemsize, 1))
    whole = len(rows[0]) // SUMMED_SAMPLES * SUMMED_SAMPLES
    for start in range(0, whole, sums_at_once * SUMMED_SAMPLES):
        stop = min(start + sums_at_once * SUMMED_SAMPLES, whole)
        left, right = (tensor[start:stop].unflatten(0, (-1, SUMMED_SAMPLES)) for tensor in rows)
        weight_gradient.add_(torch.bmm(left.mT, right).sum(0, dtype=torch.float64))
    left, right = (tensor[whole:] for tensor in rows)
    weight_gradient.add_(left.mT @ right)


def _add_inner_products(scale_gradient: Tensor, left: Tensor, right: Tensor) -> None:
    """Add <left_l, right_l> of each layer l to its scale's gradient, or of all layers if they share one scale."""
    products = (left * right).sum((1, 2))
    scale_gradient.add_(products if scale_gradient.numel() == len(products) else products.sum())
