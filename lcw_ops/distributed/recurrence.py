"""The recurrence by Picard sweeps over all layers of all ranks at once.

    h_l = alpha_l O h_{l-1} + beta_l act(W_l h_{l-1} + b_l)

h_l is the state after layer l, and O the filter. lcw_ops/ops/parallel_depth/solver.py explains the sweeps. Here a sweep
is local except for the states between ranges of layers. First, a rank scans its D layers from a zero state. All ranks
gather the states at the ends of the ranges, M samples by N units each. The linear part across a range is alpha^D O^D,
so every rank can compute the state with which each range begins. Then a rank scans its range from that state. The
adjoint does the same from the last layer to the first. Derived here.

Cost of a sweep: two scans and a batched matmul of the rank's own layers, one all-gather of (M, N) per rank, and one
all-reduce of a number. In small nets the latency of these two collectives takes most of the time.
"""

import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lcw_ops.distributed.group import Group
from lcw_ops.ops.parallel_depth import op as parallel_depth
from lcw_ops.ops.parallel_depth import solver
from lcw_ops.ops.parallel_depth.frame import Frame, get_frame
from lcw_ops.ops.parallel_depth.scan import multiply_exactly
from lcw_ops.ops.precision import full_float32
from lcw_ops.reference import parallel_depth as reference


class _Basis(NamedTuple):
    """The basis in which scans run: the filter's frame, in which it rotates pairs of units, or the plain one.

    Ranks may have found different frames, or none: the order and signs of eigenvectors depend on the CPU and on its
    number of threads. So ranks exchange states in the plain basis.
    """

    kernels: parallel_depth.Kernels
    filter: Tensor
    frame: Frame | None

    @classmethod
    def find(cls, filter: Tensor, backend: str) -> "_Basis":
        kernels = parallel_depth.get_kernels(backend)
        if reference.is_permutation(filter):
            return cls(kernels, filter, None)
        frame = get_frame(filter)
        if frame is None:
            return cls(parallel_depth.get_kernels("reference"), filter, None)
        return cls(kernels, frame.rotation, frame)

    def scan(self, states: Tensor, source: Tensor | None, alpha: Tensor) -> Tensor:
        # The reference's scan multiplies by a matrix, which must not happen in TF32.
        with full_float32(states.device):
            one = alpha.new_ones(1)
            return self.kernels.sweep_(states, source, None, None, self.filter, alpha, one, "identity")

    def scan_adjoint(
        self,
        gradients: Tensor,
        source: Tensor | None,
        transposed: Tensor,
        alpha: Tensor,
        slope: Tensor | None = None,
        scaled: Tensor | None = None,
    ) -> Tensor:
        with full_float32(gradients.device):
            return self.kernels.adjoint_sweep_(gradients, source, None, transposed, alpha, slope, scaled)

    def enter(self, states: Tensor, out: Tensor) -> Tensor:
        """States (..., N) in this basis; written to ``out``, unless it is the plain basis."""
        return states if self.frame is None else _multiplied(states, self.frame.inverse.mT, out)

    def leave(self, states: Tensor, out: Tensor) -> Tensor:
        return states if self.frame is None else _multiplied(states, self.frame.basis.mT, out)

    def enter_adjoint(self, gradients: Tensor, out: Tensor) -> Tensor:
        return gradients if self.frame is None else _multiplied(gradients, self.frame.basis, out)

    def leave_adjoint(self, gradients: Tensor, out: Tensor) -> Tensor:
        return gradients if self.frame is None else _multiplied(gradients, self.frame.inverse, out)

    # The same, in float64, for states (..., M, N) that enter or leave the chain of ranges.

    def enter_chain(self, state: Tensor) -> Tensor:
        return state.double() if self.frame is None else state.double() @ self.frame.exact_inverse.mT

    def leave_chain(self, state: Tensor) -> Tensor:
        return state if self.frame is None else state.double() @ self.frame.exact_basis.mT

    def enter_chain_adjoint(self, gradient: Tensor) -> Tensor:
        return gradient.double() if self.frame is None else gradient.double() @ self.frame.exact_basis

    def leave_chain_adjoint(self, gradient: Tensor) -> Tensor:
        return gradient if self.frame is None else gradient.double() @ self.frame.exact_inverse


def _multiplied(rows: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    multiply_exactly(rows, matrix, out)
    return out


class _Carry:
    """The step from one range of layers to the next, in float64: x <- alpha^D O^D x + the range's own addition.

    x is the state, D the number of layers in the range. The addition is the range's last state if it starts from zero.
    """

    def __init__(self, powers: list[Tensor], decays: list[Tensor]) -> None:
        self.powers, self.decays = powers, decays

    @classmethod
    def over(cls, bounds: list[int], filter: Tensor, alpha: Tensor) -> "_Carry":
        lengths = [stop - start for start, stop in pairwise(bounds)]
        powers = {length: reference.filter_power(filter, length) for length in set(lengths)}
        every = alpha.double().expand(bounds[-1])
        decays = [every[start:stop].prod() for start, stop in pairwise(bounds)]
        return cls([powers[length] for length in lengths], decays)

    def adjoint(self) -> "_Carry":
        """The same for gradients, from the last range to the first."""
        return _Carry([reference.transpose_filter(power) for power in self.powers[::-1]], self.decays[::-1])

    def run(self, first: Tensor, added: Tensor | None = None) -> list[Tensor]:
        """The states between ranges, from ``first`` to the state that leaves the last range."""
        between = [first]
        for number, (power, decay) in enumerate(zip(self.powers, self.decays, strict=True)):
            state = decay * reference.apply_filter(between[-1], power)
            between.append(state if added is None else state + added[number])
        return between


class _Sweeps(solver.Windows):
    """The stopping rule of the sweeps, for one window that has all layers."""

    def __init__(self, direction: str, tolerance: float, layers: int) -> None:
        super().__init__(None, tolerance, layers, layers)
        self.direction = direction


class DepthRecurrence:
    """One forward pass of all ranks, and its backward pass."""

    def __init__(
        self,
        group: Group,
        bounds: list[int],
        filter: Tensor,
        alpha: Tensor,
        beta: Tensor,
        activation: str,
        tolerance: float,
        backend: str,
    ) -> None:
        self.group, self.bounds, self.filter, self.alpha, self.beta = group, bounds, filter, alpha, beta
        self.activation, self.tolerance, self.backend = activation, tolerance, backend
        self.depth = bounds[-1]
        self.start, self.stop = bounds[group.rank : group.rank + 2]
        self.basis = _Basis.find(filter, backend)
        self.carry = _Carry.over(bounds, self.basis.filter, alpha)
        self.is_sequential = False

    def _own_layers(self, weight: Tensor, bias: Tensor) -> solver.Layers:
        alpha, beta = (
            scale if scale.numel() == 1 else scale[self.start : self.stop] for scale in (self.alpha, self.beta)
        )
        return solver.Layers(weight, bias.contiguous(), alpha, beta, None, self.activation, self.start)

    def run_forward(self, h0: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """h_L, the same on every rank, and the states of this rank's layers, (D + 1, M, N)."""
        layers = self._own_layers(weight, bias)
        found = self._sweep_forward(h0, layers.to_dtype(h0.dtype))
        if found is None:
            found = self._run_in_order(h0, layers)
            self._warn("forward")
        return found

    def _sweep_forward(self, h0: Tensor, layers: solver.Layers) -> tuple[Tensor, Tensor] | None:
        basis, kernels, rank = self.basis, self.basis.kernels, self.group.rank
        states = h0.new_empty((self.stop - self.start + 1, *h0.shape))
        work, other = torch.empty_like(states), torch.empty_like(states)
        product = work[1:]
        # In a frame the source is a copy of the product, so the scan from zero may use the product's memory.
        inside, from_zero = (states, other) if basis.frame is None else (torch.empty_like(states), work)
        first = basis.enter_chain(h0)
        between = self.carry.run(first)

        def scan(source: Tensor | None) -> Tensor:
            inside[0] = between[rank]
            change = basis.scan(inside, source, layers.alpha)
            basis.leave(inside, states)
            return change

        scan(None)
        sweeps = _Sweeps("forward", self.tolerance, self.depth)
        count = 0

        def sweep() -> Tensor:
            nonlocal between, count
            count += 1
            layers.multiply(states[:-1], product)
            kernels.activate_(product, layers.bias, None, layers.beta, layers.activation, False)
            source = basis.enter(product, other[1:])
            from_zero[0] = 0
            basis.scan(from_zero, source, layers.alpha)
            own = basis.leave_chain(from_zero[-1]).to(h0.dtype)
            added = self.group.gather(own, f"the all-gather of the states between ranks in sweep {count}")
            between = self.carry.run(first, basis.enter_chain(added))
            return self.group.largest(scan(source), f"the all-reduce of the residual of sweep {count}")

        if not sweeps.converge(0, self.depth, h0.dtype, sweep):
            return None
        return basis.leave_chain(between[-1]).to(h0.dtype), states

    def run_backward(
        self, gradient: Tensor, states: Tensor, weight: Tensor, bias: Tensor, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradients of h_0, the same on every rank, and of this rank's weight and bias."""
        self.group.agree("the output's gradient", {}, gradient, gradient.device)
        layers = self._own_layers(weight, bias)
        into = solver.Gradients(
            torch.zeros_like(weight) if needs_weight else None,
            torch.zeros_like(layers.bias) if needs_bias else None,
            alpha=None,
            beta=None,
            inputs=None,
        )
        found = None
        # If the states did not converge, the gradients would not either.
        may_converge = not self.is_sequential
        if may_converge:
            found = self._sweep_backward(gradient, states, layers.to_dtype(states.dtype), into)
        if found is None:
            found = self._run_back_in_order(gradient, states[0], layers, into)
            if may_converge:
                self._warn("backward")
        return found, into.weight, into.bias

    def _sweep_backward(
        self, gradient: Tensor, states: Tensor, layers: solver.Layers, into: solver.Gradients
    ) -> Tensor | None:
        basis, kernels = self.basis, self.basis.kernels
        transposed = reference.transpose_filter(basis.filter).contiguous()
        carry, place = self.carry.adjoint(), self.group.size - 1 - self.group.rank
        slope, grad_pre = torch.empty_like(states[1:]), torch.empty_like(states[1:])
        layers.multiply(states[:-1], slope)
        kernels.activate_(slope, layers.bias, None, layers.beta, layers.activation, True)
        adjoint, work, other = (torch.empty_like(states) for _ in range(3))
        product = work[1:]
        inside, from_zero = (adjoint, other) if basis.frame is None else (torch.empty_like(adjoint), work)
        last = basis.enter_chain_adjoint(gradient)
        between = carry.run(last)

        def scan(source: Tensor | None) -> Tensor:
            inside[-1] = between[place]
            if basis.frame is None:
                return basis.scan_adjoint(inside, source, transposed, layers.alpha, slope, grad_pre)
            change = basis.scan_adjoint(inside, source, transposed, layers.alpha)
            basis.leave_adjoint(inside, adjoint)
            torch.mul(slope, adjoint[1:], out=grad_pre)
            return change

        scan(None)
        sweeps = _Sweeps("backward", self.tolerance, self.depth)
        count = 0

        def sweep() -> Tensor:
            nonlocal between, count
            count += 1
            layers.multiply_transposed(grad_pre, product)
            source = basis.enter_adjoint(product, other[1:])
            from_zero[-1] = 0
            basis.scan_adjoint(from_zero, source, transposed, layers.alpha)
            own = basis.leave_chain_adjoint(from_zero[0]).to(states.dtype)
            added = self.group.gather(own, f"the all-gather of the gradients between ranks in adjoint sweep {count}")
            between = carry.run(last, basis.enter_chain_adjoint(added).flip(0))
            return self.group.largest(scan(source), f"the all-reduce of the residual of adjoint sweep {count}")

        if not sweeps.converge(0, self.depth, states.dtype, sweep):
            return None
        if into.weight is not None:
            into.weight.copy_(torch.bmm(grad_pre.mT, states[:-1]))
        if into.bias is not None:
            torch.sum(grad_pre, 1, out=into.bias)
        return basis.leave_chain_adjoint(between[-1]).to(gradient.dtype)

    def _warn(self, direction: str) -> None:
        """Warn once, after the pass. If the user has made the warning an error, all ranks raise."""
        self.is_sequential = True
        error = None
        if self.group.rank == 0:
            try:
                # Use the same text every time, so that Python shows it only once.
                warnings.warn(
                    f"DepthParallel: sweeps over {self.depth} layers did not converge ({direction}). The ranks "
                    "continued in order: the result is correct but took longer. A smaller beta converges "
                    "faster.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            except RuntimeWarning as raised:
                error = raised
        self.group.agree("sweeps that do not converge", {}, None, self.alpha.device, error)

    def _run_in_order(self, h0: Tensor, layers: solver.Layers) -> tuple[Tensor, Tensor]:
        run = parallel_depth.sequential_forward(self.backend, self.filter)
        states = h0

        def run_own(state: Tensor) -> Tensor:
            nonlocal states
            states = run(state, layers, self.stop - self.start)
            _Sweeps("forward", self.tolerance, self.depth).record_sequential(self.start, self.stop - self.start)
            return states[-1].clone()

        last = self._pass_on(h0, range(self.group.size), run_own, "state")
        return last, states

    def _run_back_in_order(
        self, gradient: Tensor, first: Tensor, layers: solver.Layers, into: solver.Gradients
    ) -> Tensor:
        run = parallel_depth.sequential_backward(self.backend, self.filter)

        def run_own(gradient: Tensor) -> Tensor:
            _Sweeps("backward", self.tolerance, self.depth).record_sequential(self.start, self.stop - self.start)
            return run(gradient, first, layers, None, into, self.stop - self.start)

        return self._pass_on(gradient, range(self.group.size - 1, -1, -1), run_own, "gradient")

    def _pass_on(self, value: Tensor, order: Iterable[int], run_own: Callable[[Tensor], Tensor], name: str) -> Tensor:
        """Run the ranks in order. Returns, on all of them, the value that leaves the last one."""
        for rank in order:
            value = run_own(value) if rank == self.group.rank else torch.empty_like(value)
            self.group.broadcast(value, rank, f"the broadcast of the {name} that leaves rank {rank}")
        return value


class DepthRecurrenceFunction(Function):
    """(h0, weight, bias, recurrence) -> h_L."""

    @staticmethod
    def forward(ctx, h0, weight, bias, recurrence):
        with torch.autocast(h0.device.type, enabled=False):
            last, states = recurrence.run_forward(h0, weight, bias)
        ctx.save_for_backward(states, weight, bias)
        ctx.recurrence = recurrence
        return last

    @staticmethod
    def backward(ctx, gradient):
        needs = ctx.needs_input_grad[1:3]
        return *_Gradients.apply(gradient, *ctx.saved_tensors, ctx.recurrence, *needs), None


class _Gradients(Function):
    """The gradients. They cannot be differentiated again."""

    @staticmethod
    def forward(ctx, gradient, states, weight, bias, recurrence, needs_weight, needs_bias):
        with torch.autocast(gradient.device.type, enabled=False):
            return recurrence.run_backward(gradient, states, weight, bias, needs_weight, needs_bias)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "DepthParallel: derivatives of second order are not computed over ranks. Use the plain "
            "lcw_ops.nn.OrthogonalFilterMLP in one process."
        )
