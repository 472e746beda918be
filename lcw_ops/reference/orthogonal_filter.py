"""The deep orthogonal-filter recurrence in plain PyTorch: every kernel's oracle and last fallback.

    h_l = alpha_l O_l h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l),   l = 1..L

h_l is the state after layer or time step l, O_l the fixed filter, u_l an input. Rows are samples. A. Ceni, "Random
Orthogonal Additive Filters", IEEE TNNLS 2025, arXiv 2210.01245. The forward formula and the convex choice
alpha = 1 - beta are the paper's; the backward and tangent recurrences below are derived here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lcw_ops import _checks, _torch

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda pre_activation: pre_activation,
}

# The largest slope of each activation: Lip(act) in the bounds on singular values.
LIPSCHITZ = {"tanh": 1.0, "relu": 1.0, "sigmoid": 0.25, "identity": 1.0}


class Recurrence(NamedTuple):
    """The tensors of one recurrence, in the order in which every function and op takes them.

    alpha and beta may be numbers or None until :meth:`as_tensors`.
    """

    h0: Tensor
    weight: Tensor
    bias: Tensor | None
    filter: Tensor
    alpha: Tensor | float | None
    beta: Tensor | float | None
    inputs: Tensor | None

    def needs_gradient(self) -> bool:
        """Whether a tensor requires a gradient. Dynamo of torch 2.10 cannot read a property of a named tuple."""
        # A loop, because any() over a generator takes twice as long.
        for argument in self:  # noqa: SIM110
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
        return False

    def detach(self) -> "Recurrence":
        return Recurrence._make(value.detach() if isinstance(value, Tensor) else value for value in self)

    def in_float32(self, *names: str) -> "Recurrence":
        """A copy with these tensors in float32. A float64 tensor and None stay as they are."""
        wide = {}
        for name in names:
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype != torch.float64:
                wide[name] = _torch.cast(tensor, torch.float32)
        return self._replace(**wide)

    def as_tensors(self) -> "tuple[Recurrence, int]":
        """The arguments as the ops take them, in the state's dtype, alpha and beta as tensors; and the number of steps.

        A 16-bit weight is not converted: it is nearly all of the memory, and every op reads it as it is.
        """
        steps = count_steps(*self[1:])
        alpha, beta = scale_tensors(self.alpha, self.beta, steps, self.h0)
        recurrence = Recurrence(self.h0, self.weight, self.bias, self.filter, alpha, beta, self.inputs)
        if self.h0.dtype in (torch.bfloat16, torch.float16):
            recurrence = recurrence.in_float32("h0", "bias", "inputs")
        return recurrence, steps


# The arguments that have a gradient, in the order of the gradients. The filter is fixed.
DIFFERENTIABLE = tuple(name for name in Recurrence._fields if name != "filter")


def activation_derivative(pre_activation: Tensor, activation: str) -> Tensor:
    """act'(a), differentiable in a. At the kink of ReLU the derivative is 0, as in torch."""
    if activation == "relu":
        return (pre_activation > 0).to(pre_activation.dtype)
    if activation == "identity":
        return torch.ones_like(pre_activation)
    value = ACTIVATIONS[activation](pre_activation)
    return 1 - value * value if activation == "tanh" else value * (1 - value)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state. A 16-bit alpha of 1 - 2e-5 would be 1, and a 16-bit filter would not be orthogonal."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def count_steps(weight: Tensor, bias, filter: Tensor, alpha, beta, inputs) -> int:
    """L (or T): the common length of every argument that has one entry per step.

    Raises:
        ValueError: the lengths differ, or no argument has one entry per step.
    """
    lengths = {}
    if weight.dim() == 3:
        lengths["weight"] = weight.shape[0]
    if inputs is not None:
        lengths["inputs"] = inputs.shape[0]
    if bias is not None and bias.dim() == 2:
        lengths["bias"] = bias.shape[0]
    if filter.dim() == 3:
        lengths["filter"] = filter.shape[0]
    for name, scale in (("alpha", alpha), ("beta", beta)):
        if isinstance(scale, Tensor) and scale.numel() != 1:
            lengths[name] = scale.shape[0]
    if not lengths:
        came = f"has shape {tuple(weight.shape)}, and the number of steps is unknown"
        expected = "an argument with one entry per step"
        remedy = "Pass inputs of shape (T, M, N), or expand the weight: weight.expand(L, N, N)."
        raise ValueError(_checks.describe("orthogonal_filter", "weight", came, expected, remedy))
    steps = next(iter(lengths.values()))
    for name, length in lengths.items():
        if length != steps:
            came = f"is of length {length}, but the arguments disagree on the number of steps: {lengths}"
            remedy = "Give each of them one entry per layer (or time step), or share it over all steps."
            raise ValueError(
                _checks.describe("orthogonal_filter", name, came, "the same number for all of them", remedy)
            )
    return steps


def scale_tensors(alpha, beta, steps: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and beta as tensors of shape (1,) or (L,), in the state's dtype. Default beta = 1/L, alpha = 1 - beta.

    If beta is a Python number, 1 - beta is computed in float64 and rounded once.
    """
    if beta is None:
        beta = 1.0 / max(steps, 1)
    if alpha is None:
        alpha = 1.0 - beta
    dtype = state_dtype(like.dtype)
    return _scale_tensor(alpha, dtype, like.device), _scale_tensor(beta, dtype, like.device)


def _scale_tensor(scale: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(scale, Tensor):
        # In ONNX torch.full would round its number to float32.
        if torch.compiler.is_exporting():
            return _torch.constant(scale, dtype=dtype, device=device)
        return torch.full((1,), scale, dtype=dtype, device=device)
    if scale.device != device:
        scale = scale.to(device)
    return _torch.cast(scale, dtype).reshape(-1)


def apply_filter(state: Tensor, filter: Tensor) -> Tensor:
    """O h for rows h of ``state`` (M, N): ``filter`` is a matrix (N, N) or a permutation p with (O h)_i = h_{p_i}."""
    return state.index_select(1, filter) if filter.dim() == 1 else state @ filter.transpose(-2, -1)


def apply_filter_transposed(gradient: Tensor, filter: Tensor) -> Tensor:
    """O^T g for rows g of ``gradient`` (M, N)."""
    return gradient[:, filter.argsort()] if filter.dim() == 1 else gradient @ filter


def orthogonal_filter(
    h0, weight, bias, filter, alpha=None, beta=None, inputs=None, activation="tanh", return_states=False
):
    """The recurrence, step by step, through torch's own autograd.

    Arguments as in :func:`lcw_ops.functional.orthogonal_filter`. Any floating dtype, twice differentiable. With 16-bit
    arguments the state is float32, and the result is rounded once at the end.
    """
    steps = _torch.unrecorded(count_steps, weight, bias, filter, alpha, beta, inputs)
    alpha, beta = scale_tensors(alpha, beta, steps, h0)
    result_dtype, dtype = h0.dtype, state_dtype(h0.dtype)
    state = _torch.cast(h0, dtype)
    states = [state]
    for weight_l, bias_l, filter_l, alpha_l, beta_l, input_l in _per_step(
        steps, dtype, weight, bias, filter, alpha, beta, inputs
    ):
        pre_activation = _pre_activation(state, weight_l, bias_l, input_l)
        state = alpha_l * apply_filter(state, filter_l) + beta_l * ACTIVATIONS[activation](pre_activation)
        states.append(state)
    result = _torch.cast(torch.stack(states) if return_states else state, result_dtype)
    # With zero steps the result would be h0 itself, and an op must not return its argument.
    return result if steps or return_states else result.clone()


def orthogonal_filter_scan(
    h0, weight, bias, filter, alpha=None, beta=None, inputs=None, activation="tanh", return_states=False
):
    """The recurrence by torch's ``scan``, for exporting: one node instead of about ten per step.

    Arguments, results and gradients as in :func:`orthogonal_filter`.
    """
    steps = count_steps(weight, bias, filter, alpha, beta, inputs)
    if steps == 0:
        # scan refuses a length of 0.
        return (h0.unsqueeze(0) if return_states else h0).clone()
    dtype = state_dtype(h0.dtype)
    first = _torch.ready_for_scan(_to_state(h0, dtype), weight, bias, alpha, beta, inputs)
    alpha, beta = scale_tensors(alpha, beta, steps, h0)
    shared, per_step = {}, {}
    for name, argument, shared_dim in (
        ("weight", weight, 2),
        ("bias", bias, 1),
        ("filter", filter, 1 if filter.dim() == 1 else 2),
        ("inputs", inputs, None),
    ):
        if argument is None:
            continue
        if argument.dim() == shared_dim:
            shared[name] = _to_state(argument, dtype)
        else:
            per_step[name] = argument
    for name, scale in (("alpha", alpha), ("beta", beta)):
        if scale.shape[0] == 1:
            # Shape (), not (1,): scan may trace the step with sizes of 1 as symbols, which do not broadcast.
            shared[name] = scale.squeeze(0)
        else:
            per_step[name] = scale

    def step(state, arguments):
        here = {name: _to_state(argument, dtype) for name, argument in arguments.items()}
        pre_activation = _pre_activation(state, here["weight"], here.get("bias"), here.get("inputs"))
        filtered = apply_filter(state, here["filter"])
        state = here["alpha"] * filtered + here["beta"] * ACTIVATIONS[activation](pre_activation)
        return state, [state.clone()] if return_states else []

    last, states = _torch.scan(step, first, per_step, shared)
    return _torch.cast(torch.cat([first.unsqueeze(0), *states]) if return_states else last, h0.dtype)


def orthogonal_filter_backward(
    grad_output, h0, weight, bias, filter, alpha, beta, inputs=None, activation="tanh", return_states=False
):
    """Gradients by the explicit recurrence. Every line is differentiable, so this also gives second derivatives.

        P_l = beta_l act'(A_l) * G_l      G_{l-1} = alpha_l G_l O_l + P_l W_l
        dW_l = P_l^T h_{l-1}    db_l = sum_rows P_l    du_l = P_l
        dalpha_l = <G_l, h_{l-1} O_l^T>   dbeta_l = <G_l, act(A_l)>

    A_l is the argument of act; G_l and P_l are the gradients of h_l and A_l.

    ``grad_output`` is (M, N), or (L+1, M, N) with ``return_states``.

    Returns:
        The gradients of (h0, weight, bias, alpha, beta, inputs), each of its argument's shape, None for an argument
        that is None; then the gradients of all states, (L+1, M, N).
    """
    steps = count_steps(weight, bias, filter, alpha, beta, inputs)
    dtype = h0.dtype
    states = orthogonal_filter(h0, weight, bias, filter, alpha, beta, inputs, activation, return_states=True)
    gradient = grad_output[-1] if return_states else grad_output
    grad_states = [gradient]
    per_step = list(_per_step(steps, dtype, weight, bias, filter, alpha, beta, inputs))
    grad_pre, grad_alpha, grad_beta = [], [], []
    for l in reversed(range(steps)):
        weight_l, bias_l, filter_l, alpha_l, beta_l, input_l = per_step[l]
        pre_activation = _pre_activation(states[l], weight_l, bias_l, input_l)
        grad_alpha.append((gradient * apply_filter(states[l], filter_l)).sum())
        grad_beta.append((gradient * ACTIVATIONS[activation](pre_activation)).sum())
        grad_pre.append(beta_l * activation_derivative(pre_activation, activation) * gradient)
        gradient = alpha_l * apply_filter_transposed(gradient, filter_l) + grad_pre[-1] @ weight_l
        if return_states:
            gradient = gradient + grad_output[l]
        grad_states.append(gradient)
    grad_pre = torch.stack(grad_pre[::-1]) if steps else h0.new_zeros((0, *h0.shape))
    grad_weight = torch.einsum("lmo,lmi->loi", grad_pre, states[:-1])
    return (
        gradient,
        grad_weight if weight.dim() == 3 else grad_weight.sum(0),
        None if bias is None else grad_pre.sum(1) if bias.dim() == 2 else grad_pre.sum((0, 1)),
        _stack_scales(grad_alpha, alpha),
        _stack_scales(grad_beta, beta),
        None if inputs is None else grad_pre,
        torch.stack(grad_states[::-1]),
    )


def orthogonal_filter_jvp(primals, tangents, activation="tanh", return_states=False):
    """The tangent recurrence: the directional derivative of the output.

        dh_l = dalpha O h + alpha O dh + dbeta act(A) + beta act'(A) * (dW h + W dh + db + du)

    ``primals`` and ``tangents`` are ``Recurrence`` tuples. The filter has no tangent, and None is a tangent of 0.
    """
    h0, weight, bias, filter, alpha, beta, inputs = primals
    dh0, dweight, dbias, _, dalpha, dbeta, dinputs = tangents
    steps = count_steps(weight, bias, filter, alpha, beta, inputs)
    state, tangent = h0, torch.zeros_like(h0) if dh0 is None else dh0
    tangents = [tangent]
    moving = list(_per_step(steps, h0.dtype, dweight, dbias, filter, dalpha, dbeta, dinputs))
    for l, (weight_l, bias_l, filter_l, alpha_l, beta_l, input_l) in enumerate(
        _per_step(steps, h0.dtype, weight, bias, filter, alpha, beta, inputs)
    ):
        dweight_l, dbias_l, _, dalpha_l, dbeta_l, dinput_l = moving[l]
        filtered = apply_filter(state, filter_l)
        pre_activation = _pre_activation(state, weight_l, bias_l, input_l)
        activated = ACTIVATIONS[activation](pre_activation)
        dpre = tangent @ weight_l.mT
        if dweight_l is not None:
            dpre = dpre + state @ dweight_l.mT
        for shift in (dbias_l, dinput_l):
            if shift is not None:
                dpre = dpre + shift
        tangent = alpha_l * apply_filter(tangent, filter_l)
        tangent = tangent + beta_l * activation_derivative(pre_activation, activation) * dpre
        if dalpha_l is not None:
            tangent = tangent + dalpha_l * filtered
        if dbeta_l is not None:
            tangent = tangent + dbeta_l * activated
        state = alpha_l * filtered + beta_l * activated
        tangents.append(tangent)
    return torch.stack(tangents) if return_states else tangent


def _pre_activation(state, weight, bias, step_input):
    # The TorchScript exporter to ONNX does not know .mT.
    pre_activation = state @ weight.transpose(-2, -1)
    for shift in (bias, step_input):
        if shift is not None:
            pre_activation = pre_activation + shift
    return pre_activation


def _to_state(argument: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return argument if argument is None or not argument.is_floating_point() else _torch.cast(argument, dtype)


def _per_step(steps, dtype, weight, bias, filter, alpha, beta, inputs):
    """(W_l, b_l, O_l, alpha_l, beta_l, u_l) for every step, by unbind: autograd of L indexings would take O(L^2)."""

    def over_steps(argument, shared_dim):
        if argument is None:
            return [None] * steps
        argument = _to_state(argument, dtype)
        return [argument] * steps if argument.dim() == shared_dim else argument.unbind(0)

    def scales(scale):
        if scale is None:
            return [None] * steps
        return scale.expand(steps).unbind(0)

    filter_dim = 1 if filter.dim() == 1 else 2
    return zip(
        over_steps(weight, 2),
        over_steps(bias, 1),
        over_steps(filter, filter_dim),
        scales(alpha),
        scales(beta),
        over_steps(inputs, -1),
        strict=True,
    )


def _stack_scales(reversed_gradients, scale):
    if not reversed_gradients:
        return torch.zeros_like(scale)
    gradients = torch.stack(reversed_gradients[::-1])
    return gradients if scale.shape[0] == gradients.shape[0] else gradients.sum().reshape(1)
