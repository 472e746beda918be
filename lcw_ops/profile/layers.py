"""Hooks that observe a forward and backward pass of any model: every leaf module's output and the output's gradient.

Forward hooks measure an output at once, so that a later in-place operation cannot change the figures. Tensor hooks
measure the gradient. Orthogonal-filter networks are recorded as a ``Recurrence``, to be replayed layer by layer.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lcw_ops._checks import describe
from lcw_ops.nn import OrthogonalFilterMLP, OrthogonalFilterRNN
from lcw_ops.profile.orthogonal_filter import Recurrence, from_mlp, from_rnn, root_mean_square, shift_angle, time_first

# Modules whose units are dimension 1, followed by positions. Elsewhere the units are the last dimension.
_UNITS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)


@dataclass
class LayerCall:
    """One call of one leaf module. The figures describe its first floating-point output; NaN if one does not apply."""

    name: str
    module: nn.Module
    state_rms: float = math.nan
    activation_shift: float = math.nan
    shift_angle: float = math.nan
    gradient_norm: float = math.nan


@dataclass
class RecurrenceCall:
    """One call of an orthogonal-filter network; ``recurrence`` is complete after the backward pass."""

    name: str
    module: nn.Module
    recurrence: Recurrence


@dataclass
class Observation:
    """The calls in the order in which they happened; ``remove()`` takes the hooks off the model."""

    calls: list[LayerCall | RecurrenceCall] = field(default_factory=list)
    handles: list = field(default_factory=list)
    times_called: Counter = field(default_factory=Counter)
    # The operations of the hooks' own matrix products, to be subtracted from the count.
    own_flops: int = 0

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def call_name(self, name: str) -> str:
        """``name``, with #2, #3, ... from the second call on."""
        self.times_called[name] += 1
        count = self.times_called[name]
        return name if count == 1 else f"{name}#{count}"


def observe(model: nn.Module) -> Observation:
    """Hook every leaf module and every orthogonal-filter network of ``model``. The caller removes the hooks."""
    observation = Observation()
    networks = {OrthogonalFilterMLP: _watch_mlp, OrthogonalFilterRNN: _watch_rnn}
    # Leaves first: hooks run in the order of registration, and the row of h_0 must precede those of the recurrence.
    for name, module in model.named_modules():
        if not isinstance(module, tuple(networks)) and next(module.children(), None) is None:
            _watch_leaf(observation, name or type(module).__name__, module)
    for name, module in model.named_modules():
        for kind, watch in networks.items():
            if isinstance(module, kind):
                watch(observation, name, module)
    return observation


def _watch_leaf(observation: Observation, name: str, module: nn.Module) -> None:
    def after_forward(module, args, output):
        tensor = first_floating(output)
        if tensor is None or tensor.numel() == 0:
            return
        call = LayerCall(observation.call_name(name), module)
        observation.calls.append(call)
        with torch.no_grad():
            _describe_output(call, args, tensor)
        _on_gradient(tensor, lambda gradient: setattr(call, "gradient_norm", gradient.double().norm().item()))

    observation.handles.append(module.register_forward_hook(after_forward))


def _describe_output(call: LayerCall, args: tuple, output: Tensor) -> None:
    values = output.detach().double()
    call.state_rms = values.square().mean().sqrt().item()
    unit_dim = 1 if values.dim() > 3 or isinstance(call.module, _UNITS_FIRST) else -1
    if values.dim() >= 2:
        unit_mean = values.movedim(unit_dim, -1).flatten(0, -2).mean(0)
        call.activation_shift = root_mean_square(unit_mean).item()
    # A subclass may compute with a weight other than the stored one. Only a plain nn.Linear is known to use its weight.
    if type(call.module) is nn.Linear and values.dim() >= 2:
        mean_input = args[0].detach().double().flatten(0, -2).mean(0)
        weight = call.module.weight.detach().double()
        # Not a matrix product: the operations of this pass are being counted.
        projection = (weight * mean_input).sum(1)
        call.shift_angle = shift_angle(projection, weight, mean_input).item()


def _watch_mlp(observation: Observation, name: str, module: OrthogonalFilterMLP) -> None:
    """Take the first state from the input layer, and the last state's gradient from the output layer.

    The hooks act only inside a call of the network: its two layers may be called on their own as well.
    """
    # One entry per call in progress: its recurrence, once the input layer has been called.
    under_way: list[Recurrence | None] = []

    def before_forward(*_):
        under_way.append(None)

    def after_input_layer(_, args, output):
        if under_way:
            under_way[-1] = recurrence = from_mlp(module, output)
            observation.calls.append(RecurrenceCall(observation.call_name(_layer_name(name)), module, recurrence))

    def before_output_layer(_, args):
        if under_way and (recurrence := under_way[-1]) is not None:
            _on_gradient(args[0], lambda gradient: setattr(recurrence, "grad_states", gradient.detach().clone()))

    def after_forward(*_):
        under_way.pop()

    observation.handles += [
        module.register_forward_pre_hook(before_forward),
        module.input_layer.register_forward_hook(after_input_layer),
        module.output_layer.register_forward_pre_hook(before_output_layer),
        # Remove the entry too if the forward pass raises and the model continues without it.
        module.register_forward_hook(after_forward, always_call=True),
    ]


def _watch_rnn(observation: Observation, name: str, module: OrthogonalFilterRNN) -> None:
    """Collect the gradients that reach every state through the output, and the last state through h_n as well."""

    def after_forward(_, args, kwargs, result):
        bound = dict(zip(("input", "hx"), args, strict=False), **kwargs)
        if isinstance(bound["input"], PackedSequence):
            argument = f"the input of {name or 'OrthogonalFilterRNN'}"
            came = "is a PackedSequence, whose sequences end at different steps"
            raise TypeError(
                describe("profile", argument, came, "a tensor", "Profile a batch of sequences of one length.")
            )
        recurrence = from_rnn(module, bound["input"].detach(), bound.get("hx"))
        observation.own_flops += 2 * bound["input"].numel() * module.hidden_size
        observation.calls.append(RecurrenceCall(observation.call_name(_layer_name(name)), module, recurrence))
        recurrence.grad_states = torch.zeros(
            (recurrence.steps + 1, *recurrence.h0.shape), dtype=recurrence.h0.dtype, device=recurrence.h0.device
        )

        def add_output(gradient):
            recurrence.grad_states[1:] += time_first(module, gradient)

        def add_last(gradient):
            recurrence.grad_states[-1] += gradient.reshape(recurrence.h0.shape)

        output, h_n = result
        _on_gradient(output, add_output)
        _on_gradient(h_n, add_last)

    observation.handles.append(module.register_forward_hook(after_forward, with_kwargs=True))


def _layer_name(name: str) -> str:
    return f"{name}.layer" if name else "layer"


def _on_gradient(tensor: Tensor, record: Callable[[Tensor], None]) -> None:
    """Call ``record`` on the gradient. The hook must return None: a tensor hook's result replaces the gradient."""

    def hook(gradient):
        # The gradient is None if the next operation does not pass one back, as in a dynamically quantized layer.
        if gradient is not None:
            record(gradient)

    if tensor.requires_grad:
        tensor.register_hook(hook)


def first_floating(output) -> Tensor | None:
    """The first floating-point tensor in a module's output: itself, or one inside tuples, lists and dicts."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (tuple, list)):
        return None
    return next((tensor for part in output if (tensor := first_floating(part)) is not None), None)
