"""Every layer of an orthogonal-filter network as a row, though the network is one op.

The recurrence h_l = alpha O h_{l-1} + beta act(W_l h_{l-1} + b_l + u_l) is replayed in chunks of layers. The forward
replay holds all states of one chunk at a time, and keeps the state at which each chunk begins. The backward replay goes
from the last chunk to the first, and holds the state gradients of one chunk at a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lcw_ops import functional as F
from lcw_ops.nn import OrthogonalFilterMLP
from lcw_ops.ops import backends
from lcw_ops.ops.orthogonal_filter import op
from lcw_ops.ops.parallel_depth import op as parallel_depth
from lcw_ops.profile import bounds, jacobian
from lcw_ops.profile.units import mean_input_angle, root_mean_square
from lcw_ops.reference.orthogonal_filter import LIPSCHITZ, count_steps, scale_tensors, state_dtype

# The bytes of weights, weight gradients, states and state gradients of one chunk. They suffice for 1000 layers of 64
# units with 64 samples.
CHUNK_BYTES = 64 * 2**20

# The columns of :func:`layer_columns`.
COLUMNS = (
    "state_mean",
    "state_rms",
    "gradient_norm",
    "activation_shift",
    "shift_angle",
    "weight_gradient_norm",
    "weight_norm_bound",
    "gain_lower",
    "gain_upper",
    "gradient_lower",
    "gradient_upper",
    "state_rms_bound",
)

# The exact N x N Jacobian takes one backward pass of N rows. Beyond this width it costs more than the profiled run.
EXACT_WIDTH = 512


@dataclass
class Recurrence:
    """One call of an orthogonal-filter module: everything needed to replay it.

    With M samples, N units and L layers or T = L time steps: h0 is (M, N), weight (L, N, N) or (N, N), inputs (T, M, N)
    or None, alpha and beta (1,) or (L,). grad_states holds the gradients that reach states from outside the recurrence:
    (M, N) if only the last state has one, or (L+1, M, N) for all states. solver is the module's, "sequential" or
    "parallel". The replay is always sequential.
    """

    h0: Tensor
    weight: Tensor
    bias: Tensor | None
    filter: Tensor
    alpha: Tensor
    beta: Tensor
    activation: str
    inputs: Tensor | None = None
    grad_states: Tensor | None = None
    solver: str = "sequential"
    # The states at which the chunks begin, filled by the forward replay.
    boundaries: list[Tensor] = field(default_factory=list)
    # The column weight_norm_bound, (L,), if it is known. To compute it takes most of the forward replay's time.
    weight_norms: np.ndarray | None = None
    # The gradient of h0, (M, N), which the backward replay leaves here.
    grad_h0: Tensor | None = None

    @property
    def steps(self) -> int:
        return count_steps(*self._arguments())

    @property
    def backend(self) -> str:
        """The backend that runs the replay."""
        return op.choose_kernel(*self._kernel_arguments())

    @property
    def solved_on(self) -> str:
        """The backend that ran the module's own passes."""
        if self.solver == "sequential":
            return self.backend
        return backends.choose(parallel_depth.SWEEP, *self._kernel_arguments())

    def _kernel_arguments(self):
        return self.h0.device, self.h0.shape[1], self.h0.dtype.itemsize

    def _arguments(self):
        return self.weight, self.bias, self.filter, self.alpha, self.beta, self.inputs

    def chunks(self) -> list[slice]:
        rows, width = self.h0.shape
        bytes_per_layer = 8 * (width * width + rows * width)
        length = max(1, min(1000, CHUNK_BYTES // bytes_per_layer))
        return [slice(start, min(start + length, self.steps)) for start in range(0, self.steps, length)]

    def chunk(self, steps: slice) -> tuple:
        """(weight, bias, filter, alpha, beta, inputs) of some steps, in the state's dtype.

        A weight or bias that is shared over time is repeated, so that every step has its own gradient. A shared filter,
        alpha or beta is not.
        """
        length, width = steps.stop - steps.start, self.h0.shape[1]
        dtype = self.h0.dtype
        weight = self.weight[steps] if self.weight.dim() == 3 else self.weight.expand(length, width, width)
        bias = self.bias
        if bias is not None:
            bias = (bias[steps] if bias.dim() == 2 else bias.expand(length, width)).to(dtype)
        filter = self.filter[steps] if self.filter.dim() == 3 else self.filter
        alpha, beta = (scale if scale.numel() == 1 else scale[steps] for scale in (self.alpha, self.beta))
        inputs = None if self.inputs is None else self.inputs[steps].to(dtype)
        return weight.to(dtype), bias, filter, alpha, beta, inputs


def from_mlp(module: OrthogonalFilterMLP, h0: Tensor) -> Recurrence:
    """The recurrence inside an MLP, from the output of its input layer."""
    return _recurrence(module, h0.reshape(-1, module.width), module.weight, module.depth, None)


def from_rnn(module, input: Tensor, hx: Tensor | None) -> Recurrence:
    """The recurrence inside an RNN, from the arguments of its call."""
    inputs = torch.nn.functional.linear(time_first(module, input), module.weight_ih)
    h0 = inputs.new_zeros(inputs.shape[1:]) if hx is None else hx.reshape(inputs.shape[1:])
    return _recurrence(module, h0, module.weight_hh, inputs.shape[0], inputs)


def from_ranks(module, last: Tensor) -> Recurrence | None:
    """This rank's layers of a ``DepthParallel``, from its last state, whose graph has the states of the rank's layers.

    None if the graph has none, because nothing requires a gradient.
    """
    node = last.grad_fn
    while node is not None and not hasattr(node, "recurrence"):
        node = node.next_functions[0][0] if node.next_functions else None
    if node is None:
        return None
    states = node.saved_tensors[0]
    recurrence = _recurrence(module, states[0], module.weight, module.depth, None)
    own = slice(module.start, module.stop)
    for name in ("alpha", "beta"):
        scale = getattr(recurrence, name)
        if scale.numel() > 1:
            setattr(recurrence, name, scale[own])
    recurrence.solver = "parallel"
    return recurrence


def time_first(module, sequence: Tensor) -> Tensor:
    """An RNN's input or output as (T, B, features), whatever its layout."""
    if sequence.dim() == 2:
        return sequence.unsqueeze(1)
    return sequence.transpose(0, 1) if module.batch_first else sequence


@torch.no_grad()
def _recurrence(module, h0, weight, steps, inputs) -> Recurrence:
    h0 = h0.detach().to(state_dtype(h0.dtype))
    alpha, beta = scale_tensors(module.alpha, module.beta, steps, h0)
    inputs = None if inputs is None else inputs.detach()
    bias = None if module.bias is None else module.bias.detach()
    tensors = weight.detach(), bias, module.filter, alpha.detach(), beta.detach()
    solver = parallel_depth.choose_solver(h0, *tensors, inputs) if module.solver == "auto" else module.solver
    return Recurrence(h0, *tensors, module.activation, inputs, solver=solver)


def layer_columns(recurrence: Recurrence) -> dict[str, np.ndarray]:
    """All measured figures and their bounds, one value per layer, (L,) each; see ``result.COLUMNS``.

    Without ``grad_states`` there are no gradients and no bounds of them.
    """
    columns = _forward(recurrence)
    deviation = bounds.filter_deviation(recurrence.filter)
    lower, upper = gain_bounds(recurrence, columns["weight_norm_bound"], deviation)
    alpha, beta = _scales(recurrence)
    columns |= {
        "gain_lower": lower,
        "gain_upper": upper,
        "state_rms_bound": bounds.state_rms_bound(
            alpha, beta, recurrence.h0, recurrence.steps, recurrence.activation, deviation
        ),
    }
    if recurrence.grad_states is not None:
        log_lower, log_upper = bounds.gradient_norm_bounds(lower, upper, _injected_norms(recurrence))
        columns |= _backward(recurrence)
        with np.errstate(over="ignore"):
            columns |= {"gradient_lower": np.exp(log_lower[1:]), "gradient_upper": np.exp(log_upper[1:])}
    return columns


@torch.no_grad()
def signal_norms(recurrence: Recurrence, gradient_at_end: Callable[[Tensor], Tensor]) -> dict[str, np.ndarray]:
    """Only state_rms and gradient_norm of :func:`layer_columns`, in a tenth of its time.

    The loss E must depend on the last state h_L only: ``gradient_at_end(h_L)`` is dE/dh_L.
    """
    backend = recurrence.backend
    chunks, boundaries, parts = recurrence.chunks(), [recurrence.h0], []
    for steps in chunks:
        states = F.orthogonal_filter(
            boundaries[-1], *recurrence.chunk(steps), recurrence.activation, return_states=True
        )
        parts.append(_norms(states[1:]) / math.sqrt(recurrence.h0.numel()))
        boundaries.append(states[-1].clone())
    gradient, gradient_parts = gradient_at_end(boundaries.pop()), []
    for steps, state in reversed(list(zip(chunks, boundaries, strict=True))):
        *_, grad_chunk = op.state_gradients(
            gradient, state, *recurrence.chunk(steps), recurrence.activation, op.DEFAULT_SEGMENT, backend
        )
        gradient_parts.append(_norms(grad_chunk[1:]))
        gradient = grad_chunk[0].clone()
    joined = {"state_rms": parts, "gradient_norm": gradient_parts[::-1]}
    return {name: torch.cat(part).cpu().numpy() for name, part in joined.items()}


def _norms(layers: Tensor) -> Tensor:
    """The norm of every layer, in float64. Divides by the largest entry: squares would leave the range of float32."""
    layers = layers.flatten(1)
    largest = layers.abs().amax(1)
    scale = torch.where(largest > 0, largest, 1)
    return (layers / scale[:, None]).norm(dim=1).double() * scale.double()


def state_jacobian(recurrence: Recurrence) -> tuple[Tensor, int]:
    """The exact Jacobian of h_0 -> h_L at the first sample, as (J', e) with J = J' 2^e: (N, N), float32 or wider.

    Samples are independent: N copies of one sample, with the identity as their gradients, give all rows of J in one
    backward pass. The pass runs chunk by chunk from the states that :func:`layer_columns` kept. After each chunk the
    rows are scaled by a power of two, because the Jacobian of a deep plain net is far below the smallest float32.
    """
    width = recurrence.h0.shape[1]
    rows, exponent = torch.eye(width, dtype=recurrence.h0.dtype, device=recurrence.h0.device), 0
    for steps, states in reversed(list(zip(recurrence.chunks(), recurrence.boundaries, strict=True))):
        weight, bias, filter, alpha, beta, inputs = recurrence.chunk(steps)
        if inputs is not None:
            inputs = inputs[:, :1].expand(-1, width, -1)
        with torch.enable_grad():
            state = states[:1].repeat(width, 1).requires_grad_()
            output = F.orthogonal_filter(state, weight, bias, filter, alpha, beta, inputs, recurrence.activation)
            (rows,) = torch.autograd.grad(output, state, rows)
        largest = rows.abs().max().item()
        if 0 < largest < math.inf:
            shift = math.frexp(largest)[1]
            # Multiply in float64: 2^148, which scales the smallest float32 to 1, is not a float32 itself.
            rows, exponent = (rows.double() * 2.0**-shift).to(rows.dtype), exponent + shift
    return rows, exponent


def state_spectrum(columns: dict[str, np.ndarray], rows: Tensor, exponent: int) -> jacobian.JacobianSpectrum:
    """The singular values of :func:`state_jacobian`'s result, with their bounds."""
    spectrum = jacobian.matrix_spectrum(rows, products=rows.shape[0], exponent=exponent)
    spectrum.log_lower, spectrum.log_upper = bounds.jacobian_bounds(columns["gain_lower"], columns["gain_upper"])
    return spectrum


@torch.no_grad()
def _forward(recurrence: Recurrence) -> dict[str, np.ndarray]:
    state, parts = recurrence.h0, []
    recurrence.boundaries.clear()
    for steps in recurrence.chunks():
        recurrence.boundaries.append(state)
        weight, bias, filter, alpha, beta, inputs = recurrence.chunk(steps)
        states = F.orthogonal_filter(
            state, weight, bias, filter, alpha, beta, inputs, recurrence.activation, return_states=True
        )
        # Multiply the weight by the mean over samples, so that no pre-activation is formed.
        mean_input = states[:-1].mean(1)
        mean_projection = torch.einsum("loi,li->lo", weight, mean_input)
        mean_pre_activation = mean_projection
        for shift in (bias, None if inputs is None else inputs.mean(1)):
            if shift is not None:
                mean_pre_activation = mean_pre_activation + shift
        known = recurrence.weight_norms
        parts.append(
            {
                "state_mean": states[1:].mean((1, 2), dtype=torch.float64),
                "state_rms": states[1:].double().square().mean((1, 2)).sqrt(),
                "activation_shift": root_mean_square(mean_pre_activation),
                "shift_angle": mean_input_angle(mean_projection, weight, mean_input),
                "weight_norm_bound": bounds.spectral_norm_bound(weight)
                if known is None
                else torch.from_numpy(known[steps]),
            }
        )
        # Copy it, because a view would keep the chunk's states alive.
        state = states[-1].clone()
    return _joined(parts)


@torch.no_grad()
def _backward(recurrence: Recurrence) -> dict[str, np.ndarray]:
    backend = recurrence.backend
    grad_states = recurrence.grad_states.to(recurrence.h0.dtype)
    everywhere = grad_states.dim() == 3
    gradient, parts = grad_states[-1] if everywhere else grad_states, []
    for steps, state in reversed(list(zip(recurrence.chunks(), recurrence.boundaries, strict=True))):
        if everywhere:
            grad_output = grad_states[steps.start : steps.stop + 1].clone()
            grad_output[-1] = gradient
        else:
            grad_output = gradient
        _, grad_weight, *_, grad_chunk = op.state_gradients(
            grad_output, state, *recurrence.chunk(steps), recurrence.activation, op.DEFAULT_SEGMENT, backend
        )
        parts.append(
            {
                "gradient_norm": grad_chunk[1:].double().flatten(1).norm(dim=1),
                "weight_gradient_norm": grad_weight.flatten(1).double().norm(dim=1),
            }
        )
        gradient = grad_chunk[0].clone()
    recurrence.grad_h0 = gradient
    return _joined(parts[::-1])


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def gain_bounds(
    recurrence: Recurrence, weight_norm_bound: np.ndarray, deviation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(lower, upper) bounds of every layer's singular values, (L,) each; ``deviation`` is the filter's."""
    lipschitz = LIPSCHITZ[recurrence.activation]
    return bounds.layer_gain_bounds(*_scales(recurrence), weight_norm_bound, lipschitz, deviation)


def _scales(recurrence: Recurrence) -> tuple[np.ndarray, np.ndarray]:
    return recurrence.alpha.double().cpu().numpy(), recurrence.beta.double().cpu().numpy()


def _injected_norms(recurrence: Recurrence) -> np.ndarray:
    """The norms of the gradients that reach each state from outside, (L+1,)."""
    grad_states = recurrence.grad_states.double()
    if grad_states.dim() == 3:
        return grad_states.flatten(1).norm(dim=1).cpu().numpy()
    injected = np.zeros(recurrence.steps + 1)
    injected[-1] = grad_states.norm().item()
    return injected
