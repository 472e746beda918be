"""The layers of a window, and one sweep over them with each kind of filter.

A scan object makes the sweeps of one pass. `DirectScan` applies the filter as it is. `FusedScan` does the same with a
permutation, and can compute the product inside the scan (kernels/parallel_depth_fused.py). `FrameScan` takes a dense
filter, in the basis in which it rotates pairs of units.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lcw_ops.ops.parallel_depth.frame import Frame, get_frame
from lcw_ops.ops.precision import full_float32
from lcw_ops.reference import parallel_depth as reference


class Layers(NamedTuple):
    """The arguments of D consecutive layers, each with one entry per layer or shared by all of them.

    weight (D, N, N) or (N, N), of the states' dtype or in 16 bits; bias (D, N), (N,) or None; alpha, beta (1,) or (D,);
    inputs (D, M, N) or None. ``first`` is the number of the first of these layers in the whole net.
    """

    weight: Tensor
    bias: Tensor | None
    alpha: Tensor
    beta: Tensor
    inputs: Tensor | None
    activation: str
    first: int = 0

    def part(self, start: int, stop: int) -> "Layers":
        def cut(tensor: Tensor | None, shared_dim: int) -> Tensor | None:
            return tensor if tensor is None or tensor.dim() == shared_dim else tensor[start:stop]

        def cut_scale(scale: Tensor) -> Tensor:
            return scale if scale.numel() == 1 else scale[start:stop]

        return Layers(
            cut(self.weight, 2),
            cut(self.bias, 1),
            cut_scale(self.alpha),
            cut_scale(self.beta),
            None if self.inputs is None else self.inputs[start:stop],
            self.activation,
            self.first + start,
        )

    def to_dtype(self, dtype: torch.dtype) -> "Layers":
        return self._replace(weight=self.weight.to(dtype))

    def multiply(self, states: Tensor, out: Tensor) -> None:
        """Write W_l h_{l-1} for all layers l into ``out``; ``states`` (D, M, N) are h_0 to h_{D-1}."""
        if self.weight.dim() == 3:
            torch.bmm(states, self.weight.mT, out=out)
        else:
            torch.mm(states.flatten(0, 1), self.weight.mT, out=out.flatten(0, 1))

    def multiply_transposed(self, grad_pre: Tensor, out: Tensor) -> None:
        """Write P_l W_l for all layers l into ``out``; P (D, M, N) is ``grad_pre``, the pre-activations' gradients."""
        if self.weight.dim() == 3:
            torch.bmm(grad_pre, self.weight, out=out)
        else:
            torch.mm(grad_pre.flatten(0, 1), self.weight, out=out.flatten(0, 1))


class Workspace:
    """Memory that windows and sweeps reuse."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor) -> Tensor:
        """An uninitialised tensor with the shape of ``like``."""
        buffer = self.buffers.get(name)
        if buffer is None or len(buffer) < len(like):
            buffer = self.buffers[name] = torch.empty_like(like)
        return buffer[: len(like)]


class DirectScan:
    """Sweeps with a filter that the kernels apply directly."""

    def __init__(self, kernels, filter: Tensor) -> None:
        # Kernels may keep the inverse for as long as this tensor lives. As the tensor is new, that is one call.
        self.kernels, self.filter = kernels, filter.contiguous().detach()
        self.transposed = reference.transpose_filter(filter).contiguous()

    def begin(self, continues: bool) -> None:
        """Begin a window. ``continues`` says whether it starts from the state with which the previous one ended."""

    def finish(self, states: Tensor) -> None:
        """End a window that has converged."""

    finish_adjoint = finish

    def start_fused(self, layers: Layers, states: Tensor, spare: Tensor):
        """Sweeps with the product inside the scan, or None if the kernels have none. ``spare`` is like states[1:]."""
        return None

    def start_fused_adjoint(self, layers: Layers, gradients: Tensor, outside: Tensor | None, slope: Tensor, spare):
        return None

    def sweep(self, layers: Layers, states: Tensor, product: Tensor | None) -> Tensor:
        arguments = (product, layers.bias, layers.inputs, self.filter, layers.alpha, layers.beta, layers.activation)
        # The reference's scan multiplies by a matrix, which must not happen in TF32.
        with full_float32(states.device):
            return self.kernels.sweep_(states, *arguments)

    def adjoint_sweep(self, layers, gradients, product, outside, slope, scaled) -> Tensor:
        with full_float32(gradients.device):
            return self.kernels.adjoint_sweep_(
                gradients, product, outside, self.transposed, layers.alpha, slope, scaled
            )


class FusedScan(DirectScan):
    """Sweeps with a permutation, whose product is inside the scan if ``fused`` takes the states.

    ``fused`` is the module lcw_ops.kernels.parallel_depth_fused.
    """

    def __init__(self, kernels, filter: Tensor, fused) -> None:
        super().__init__(kernels, filter)
        self.fused = fused
        # Sorting gives valid indices, whatever the filter holds. If it is no permutation, the result is NaN.
        self.index = self.transposed.argsort()
        self.is_valid = (self.index == self.filter).all()

    def start_fused(self, layers: Layers, states: Tensor, spare: Tensor):
        if not self.fused.takes(states):
            return None
        return self.fused.Sweeps(
            torch.where(self.is_valid, states[0], math.nan),
            states[1:],
            spare,
            _laid_out(layers.weight.mT, states.dtype),
            layers.bias,
            layers.inputs,
            None,
            self.index,
            layers.alpha,
            layers.beta,
            layers.activation,
            reverse=False,
        )

    def start_fused_adjoint(self, layers: Layers, gradients: Tensor, outside: Tensor | None, slope: Tensor, spare):
        if not self.fused.takes(gradients):
            return None
        return self.fused.Sweeps(
            torch.where(self.is_valid, gradients[-1], math.nan),
            gradients[:-1],
            spare,
            _laid_out(layers.weight, gradients.dtype),
            None,
            outside,
            slope,
            self.transposed,
            layers.alpha,
            None,
            "identity",
            reverse=True,
        )


def _laid_out(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous in ``dtype``, by at most one copy."""
    if matrix.dtype == dtype:
        return matrix.contiguous()
    return torch.empty(matrix.shape, dtype=dtype, device=matrix.device).copy_(matrix)


class FrameScan:
    """Sweeps with a dense filter, in the basis in which it rotates pairs of units.

    The state at the end of a window leaves the basis in float64. It is carried to the next window inside the basis,
    because leaving and entering again would multiply it by a rounded identity, the same one for every window.
    """

    def __init__(self, kernels, frame: Frame) -> None:
        self.kernels, self.frame = kernels, frame
        self.basis, self.inverse = frame.basis, frame.inverse
        self.transposed = reference.transpose_filter(frame.rotation)
        self.one = self.basis.new_ones(1)
        self.workspace = Workspace()
        self.inside: Tensor | None = None
        self.carried: Tensor | None = None

    start_fused, start_fused_adjoint = DirectScan.start_fused, DirectScan.start_fused_adjoint

    def begin(self, continues: bool) -> None:
        self.inside = self.outside = None
        if not continues:
            self.carried = None

    def finish(self, states: Tensor) -> None:
        self.carried = self.inside[-1].clone()
        states[-1] = self.carried.double() @ self.frame.exact_basis.mT

    def finish_adjoint(self, gradients: Tensor) -> None:
        self.carried = self.inside[0].clone()
        gradients[0] = self.carried.double() @ self.frame.exact_inverse

    def sweep(self, layers: Layers, states: Tensor, product: Tensor | None) -> Tensor:
        if self.inside is None:
            self.inside = self.workspace.take("inside", states)
            self.inside[0] = self._entered(states[0], self.frame.exact_inverse.mT)
        source = None
        if product is not None:
            self.kernels.activate_(product, layers.bias, layers.inputs, layers.beta, layers.activation, False)
            source = self.workspace.take("source", product)
            multiply_exactly(product, self.inverse.mT, source)
        change = self.kernels.sweep_(
            self.inside, source, None, None, self.frame.rotation, layers.alpha, self.one, "identity"
        )
        multiply_exactly(self.inside[1:], self.basis.mT, states[1:])
        return change

    def adjoint_sweep(self, layers, gradients, product, outside, slope, scaled) -> Tensor:
        if self.inside is None:
            self.inside = self.workspace.take("inside", gradients)
            self.inside[-1] = self._entered(gradients[-1], self.frame.exact_basis)
            if outside is not None:
                self.outside = self.workspace.take("outside", outside)
                multiply_exactly(outside, self.basis, self.outside)
        source = None
        if product is not None:
            source = self.workspace.take("source", product)
            multiply_exactly(product, self.basis, source)
        change = self.kernels.adjoint_sweep_(
            self.inside, source, self.outside, self.transposed, layers.alpha, None, None
        )
        multiply_exactly(self.inside[:-1], self.inverse, gradients[:-1])
        torch.mul(slope, gradients[1:], out=scaled)
        return change

    def _entered(self, state: Tensor, matrix: Tensor) -> Tensor:
        return state.double() @ matrix if self.carried is None else self.carried


def multiply_exactly(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """rows @ matrix, never in TF32, so that states do not lose precision from layer to layer."""
    with full_float32(rows.device):
        torch.mm(rows.reshape(-1, rows.shape[-1]), matrix, out=out.view(-1, out.shape[-1]))


def make_scan(kernels, reference_kernels, filter: Tensor, fused=None):
    """The scan for this filter: an int64 permutation (N,) or a matrix (N, N). ``fused`` is as in `FusedScan`."""
    if reference.is_permutation(filter):
        return DirectScan(kernels, filter) if fused is None else FusedScan(kernels, filter, fused)
    frame = get_frame(filter)
    # Without a frame, the reference's scan multiplies by powers of the matrix.
    return DirectScan(reference_kernels, filter) if frame is None else FrameScan(kernels, frame)
