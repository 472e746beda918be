"""Hooks that observe a forward and backward pass of any model: every layer's output and the output's gradient.

Rows are the calls of leaf modules, and of modules with children that have parameters or work of their own: their output
is another tensor than any that a child returned, or was changed in place since. Forward hooks hand a copy of an output
to :class:`Statistics`, so that a later in-place operation cannot change the figures; tensor hooks hand it the gradient.
Orthogonal-filter networks are recorded as a ``Recurrence``, to be replayed layer by layer.
"""

import dataclasses
import gc
import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from lcw_ops import _torch
from lcw_ops.nn import OrthogonalFilterMLP, OrthogonalFilterRNN
from lcw_ops.profile import units
from lcw_ops.profile.activations import Activation, Flat, Watching, has_only_known_activations
from lcw_ops.profile.arguments import WRAPPED, readable
from lcw_ops.profile.figures import (
    IN_FUNCTORCH,
    NO_GRADIENT,
    UNDER_NO_GRAD,
    UNREACHED,
    Table,
    attempt,
    failed,
    norm,
    whole,
)
from lcw_ops.profile.orthogonal_filter import Recurrence, from_mlp, from_ranks, from_rnn, time_first
from lcw_ops.profile.statistics import Statistics

# The most recent results of children with which a module's own result is compared.
_RECENT = 32

# Modules that take (time, samples, features) unless they are told otherwise.
_TIME_FIRST = (nn.RNNBase, nn.MultiheadAttention, OrthogonalFilterRNN)


class LayerCall(NamedTuple):
    """One call of a module, and the number of its row in the observation's table.

    State, mean and shift describe its first floating-point output, the gradient all of them.
    """

    name: str
    module: nn.Module
    row: int

    @property
    def rows(self) -> int:
        return 1


@dataclass(slots=True)
class RecurrenceCall:
    """One call of an orthogonal-filter network; ``recurrence`` is complete after the backward pass."""

    name: str
    module: nn.Module
    recurrence: Recurrence
    # Whether its recurrent weight requires no gradient.
    is_frozen: bool
    no_gradient: str = UNREACHED
    # The layers before this rank's, and the ranks that have the others, of a network whose layers are spread.
    before: int = 0
    group: Any = None

    @property
    def rows(self) -> int:
        return self.recurrence.steps


class _Value(NamedTuple):
    """A tensor's memory, by a reference that keeps its key unique, and its version, which in-place operations raise."""

    reference: Any
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_Value | None":
        """None for a tensor whose memory cannot be told apart."""
        reference = _torch.storage_reference(tensor)
        return None if reference is None else cls(reference, 0 if tensor.is_inference() else tensor._version)

    @property
    def key(self) -> tuple[int, int]:
        return self.reference.cdata, self.version


@dataclass(slots=True)
class _Frame:
    """A call in progress of a module with children: its recent results, and the row of its activation functions."""

    results: deque[_Value | None]
    row: int | None = None


@dataclass
class Observation:
    """The calls of one pass, in the order in which they ended, with the modules that were not called among them.

    Attributes:
        names: id of the module -> its name; "" is the model.
        own: id of the module -> the parameters of that module itself and of its parametrizations.
        sample_dim: 1 if the model's input goes into a module that takes the time first, else 0.
        table: the figures of the calls of layers.
        without_figures: ids of modules that were called and returned no floating-point numbers.
    """

    model: nn.Module
    input_shape: torch.Size
    table: Table
    calls: list[LayerCall | RecurrenceCall] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    own: dict[int, list[nn.Parameter]] = field(default_factory=dict)
    sample_dim: int = 0
    without_figures: set[int] = field(default_factory=set)
    networks: dict[type[nn.Module], Callable] = field(default_factory=lambda: _networks())
    is_backward: bool = False
    statistics: Statistics = field(init=False)
    _times_called: Counter = field(default_factory=Counter)
    _handles: list = field(default_factory=list)
    _axes: units.UnitAxes = field(default_factory=units.UnitAxes)
    _kinds: dict[type[nn.Module], units.ModuleKind] = field(default_factory=dict)
    _frames: list[_Frame] = field(default_factory=list)
    # The last call of an activation function, until the next hook decides whose it is.
    _activation: tuple[Activation, int] | None = None
    # The last recorded output and its row, and the rows of activations in modules that have got no row themselves.
    _last_state: Tensor | None = None
    _last_row: int | None = None
    _last_version: int = 0
    _is_last_by_units: bool = False
    # Whether the class of a module tells its activation function, and no other is called.
    knows_activations: bool = False
    _orphans: list[tuple[int, int | None]] = field(default_factory=list)
    # Calls under no_grad, which reentrant checkpointing repeats in the backward pass.
    _to_be_repeated: dict[int, list[LayerCall | RecurrenceCall]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.statistics = Statistics(self.table)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every module, in this order: a recurrence's rows come between those of its ends."""
        try:
            kinds, networks = tuple(self.networks), []
            for name, module in _observable(self.model):
                self._watch(name, module, kinds)
                if isinstance(module, kinds):
                    networks.append(module)
            for module in networks:
                for kind, watch in self.networks.items():
                    if isinstance(module, kind):
                        watch(self, self.names[id(module)], module)
            with _without_collections():
                yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._finish()

    @contextmanager
    def in_forward(self) -> Iterator[None]:
        """Watch calls of activation functions too, unless all of them are modules of torch."""
        modules = list(self.model.modules())
        self.knows_activations = all(map(has_only_known_activations, modules))
        with nullcontext() if self.knows_activations else Watching(self._found_activation):
            yield

    def _finish(self) -> None:
        self._settle()
        self._last_state = None
        self._axes.forget_latest()
        self.statistics.flush()
        for row, fallback in self._orphans:
            for column in ("dead", "saturated"):
                figure = self.table.figure(column, row)
                if fallback is not None and not isinstance(figure, str):
                    self.table.combine(column, [fallback], np.array([figure]), np.fmax)
        self._orphans.clear()

    def call_name(self, module: nn.Module, suffix: str = "") -> str:
        """The module's name, with #2, #3, ... from the second call on."""
        name = self.names[id(module)]
        name = (f"{name}.{suffix}" if name else suffix) if suffix else name or type(module).__name__
        self._times_called[name] += 1
        count = self._times_called[name]
        return name if count == 1 else f"{name}#{count}"

    def add_recurrence(self, module: nn.Module, recurrence: Recurrence, weight: Tensor) -> RecurrenceCall:
        call = RecurrenceCall(self.call_name(module, "layer"), module, recurrence, not weight.requires_grad)
        self.calls.append(call)
        return call

    def _watch(self, name: str, module: nn.Module, networks: tuple[type[nn.Module], ...]) -> None:
        self.names[id(module)] = name
        is_leaf = not module._modules
        parametrizations = module.parametrizations.parameters() if not is_leaf and is_parametrized(module) else ()
        # Not module.parameters(recurse=False), which takes as long as a call of a small layer.
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        self.own[id(module)] = [*own, *parametrizations]
        if isinstance(module, (*networks, torch.jit.ScriptModule)):
            return
        if is_leaf or _is_leaf(module):
            self._handles.append(module.register_forward_hook(self._after_leaf, with_kwargs=True))
            return
        self._handles += [
            module.register_forward_pre_hook(self._before_children, with_kwargs=True),
            # Remove the entry too if the forward pass raises and the model continues without it.
            module.register_forward_hook(self._after_children, with_kwargs=True, always_call=True),
        ]

    def _after_leaf(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        with _torch.without_function_modes():
            self._record(module, args, kwargs, output, None)
            if self._frames:
                self._frames[-1].results += map(_Value.of, _tensors(output))

    def _before_children(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        with _torch.without_function_modes():
            self._settle()
            self._frames.append(_Frame(deque(map(_Value.of, floating((args, kwargs))), maxlen=_RECENT)))

    def _after_children(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        with _torch.without_function_modes():
            frame = self._frames.pop()
            known = {value.key for value in frame.results if value is not None}
            results = [_Value.of(tensor) for tensor in floating(output)]
            is_a_childs = not results or results[0] is None or results[0].key in known
            if self.own[id(module)] or not is_a_childs:
                self._record(module, args, kwargs, output, frame)
            elif frame.row is not None:
                self._orphans.append((frame.row, self._last_row))
            if self._frames:
                self._frames[-1].results += results

    def _pass_on(self, module: nn.Module, args: tuple, output) -> None:
        """Let the module around this one know this one's results."""
        if self._frames:
            self._frames[-1].results += map(_Value.of, floating(output))

    def _record(self, module: nn.Module, args: tuple, kwargs: dict, output, frame: _Frame | None) -> None:
        tensors = _tensors(output)
        if not all(map(Tensor.numel, tensors)):
            tensors = [tensor for tensor in tensors if tensor.numel()]
        if not tensors:
            self.without_figures.add(id(module))
            return
        state = tensors[0] if len(tensors) == 1 else first_floating(tensors)
        if self.is_backward:
            call = self._repeated(module, lambda call: self._has_rms(call, state))
        else:
            input = args[0] if args else None
            if type(input) is not Tensor or not input.is_floating_point():
                input = next(iter(floating((args, kwargs))), None)
            call = self._described(module, input, state, frame)
            if _torch.in_functorch():
                # Tensor hooks would see the transform's own tensors.
                self.table.put("gradient_norm", call.row, IN_FUNCTORCH)
                return
            reason = self.expect_gradient(call, state.requires_grad or any(tensor.requires_grad for tensor in tensors))
            if reason is not UNREACHED:
                self.table.put("gradient_norm", call.row, reason)
        if call is not None:
            for tensor in tensors:
                if tensor.requires_grad:
                    self._add_gradient_of(tensor, call.row)

    def _add_gradient_of(self, tensor: Tensor, row: int) -> None:
        # A function of its own, and not on_gradient: every row has one.
        def hook(gradient):
            if gradient is not None and self.is_backward:
                self.statistics.add_gradient(row, gradient)

        _torch.hook_gradient(tensor, hook)

    def _has_rms(self, call: LayerCall, state: Tensor) -> bool:
        """Whether a call that is repeated now has computed the same: the two rms differ by float64's rounding."""
        self.statistics.flush()
        known, length = self.table.figure("state_rms", call.row), attempt(norm, state)
        if isinstance(known, str) or isinstance(length, str):
            return False
        return math.isclose(known, length / math.sqrt(state.numel()), rel_tol=1e-12)

    def _described(self, module: nn.Module, input: Tensor | None, output: Tensor, frame: _Frame | None) -> LayerCall:
        row = self.table.add() if frame is None or frame.row is None else frame.row
        call = LayerCall(self.call_name(module), module, row)
        self.calls.append(call)
        kind = self._kinds.get(type(module))
        if kind is None:
            kind = self._kinds[type(module)] = units.ModuleKind.of(module)
        if input is not None and isinstance(module, _TIME_FIRST) and not module.batch_first and input.dim() == 3:
            self._see_time_first(input)
        dim = None
        try:
            if output.dim() > 1:
                dim = self._axes.dimension(module, kind, input, output)
        except Exception as error:
            self.table.put("activation_shift", row, failed(error))
        flat = self._flat(module, kind, input, output, row, dim)
        if kind.no_angle is None:
            self._add_angle(row, module, input)
        elif kind.no_angle is not units.NO_LINEAR_LAYER:
            self.table.put("shift_angle", row, kind.no_angle)
        self.statistics.add_state(row, output, dim, flat)
        self._last_state, self._last_row, self._last_version = output, row, _version(output)
        self._is_last_by_units = dim is not None and dim == output.dim() - 1
        return call

    def _add_angle(self, row: int, module: nn.Module, input: Tensor | None) -> None:
        reason = units.no_mean_input(input)
        if reason is None:
            try:
                weight = whole(module.weight)
                if "torch.distributed.fsdp" in sys.modules:
                    # FSDP frees the whole weight after the module's forward pass.
                    weight = weight.clone()
                is_last = (
                    input is self._last_state
                    and self._is_last_by_units
                    and self._last_version == _version(input)
                    and self.statistics.has_last(self._last_row)
                )
                self.statistics.add_angle(row, weight, input, self._last_row if is_last else None)
            except Exception as error:
                reason = failed(error)
        if reason is not None:
            self.table.put("shift_angle", row, reason)

    def _flat(
        self, module: nn.Module, kind: units.ModuleKind, input: Tensor | None, output: Tensor, row: int, dim: int | None
    ) -> Flat | None:
        """The flat parts of the module's activation function, if ``output`` is its result. Others are settled here."""
        if self.knows_activations:
            if kind.activation is None:
                return None
            of_argument, flat = kind.activation(module)
            if not of_argument:
                return flat
            if dim is not None and input is not None and input.shape == output.shape:
                self.statistics.add_flat(row, input, dim, flat)
        elif self._activation is not None:
            activation, version = self._activation
            if activation.values is output and activation.version == version:
                self._activation = None
                return activation.flat
            self._settle(output, row, dim)
        return None

    def _found_activation(self, activation: Activation) -> None:
        if not self.is_backward and not _torch.in_functorch():
            with _torch.without_function_modes():
                self._settle()
                self._activation = activation, activation.version

    def _settle(self, output: Tensor | None = None, row: int | None = None, dim: int | None = None) -> None:
        """Decide to whose row the last activation belongs, now that a module begins, or ``row`` has had its output.

        It is the module's whose output it computed; or else that of the module whose output it has read; or else that
        of the module around it.
        """
        if self._activation is None:
            return
        (activation, version), self._activation = self._activation, None
        if activation.version != version:
            return
        if activation.result is not output:
            try:
                dim = self._axes.dimension(None, None, activation.argument, activation.values)
            except Exception:
                return
            if activation.argument is self._last_state:
                row = self._last_row
            elif self._frames:
                frame = self._frames[-1]
                if frame.row is None:
                    frame.row = self.table.add()
                row = frame.row
        if row is not None and dim is not None:
            self.statistics.add_flat(row, activation.values, dim, activation.flat)

    def _see_time_first(self, input: Tensor) -> None:
        if input.shape[:2] == self.input_shape[:2]:
            self.sample_dim = 1

    def on_gradient(self, tensor: Tensor, record: Callable[[Tensor], None]) -> None:
        """Call ``record`` on the tensor's gradient in the backward pass of the loss.

        A forward pass may differentiate too, as an energy model does; those gradients are not the loss's.
        """

        # The hook must return None: a tensor hook's result replaces the gradient.
        def hook(gradient):
            # The gradient is None if the next operation does not pass one back, as in a dynamically quantized layer.
            if gradient is not None and self.is_backward:
                record(gradient)

        if tensor.requires_grad:
            _torch.hook_gradient(tensor, hook)

    def expect_gradient(self, call: LayerCall | RecurrenceCall, requires_grad: bool) -> str:
        """The reason for a missing gradient, should none arrive."""
        if requires_grad:
            return UNREACHED
        if torch.is_grad_enabled():
            return NO_GRADIENT
        self._to_be_repeated.setdefault(id(call.module), []).append(call)
        return UNDER_NO_GRAD

    def _repeated(self, module: nn.Module, is_same: Callable) -> LayerCall | RecurrenceCall | None:
        """The call that reentrant checkpointing repeats now, to take the gradient; None for other recomputations.

        Segments are repeated from the last to the first, and calls of one segment in their order. So the same values
        decide, and then the last call.
        """
        waiting = self._to_be_repeated.get(id(module))
        if not waiting or not torch.is_grad_enabled():
            return None
        call = next((call for call in waiting if is_same(call)), waiting[-1])
        waiting.remove(call)
        return call


@contextmanager
def _without_collections() -> Iterator[None]:
    """Switch Python's garbage collector off: it would search the growing graph and all hooks, again and again.

    It takes a third of the watched pass of a network of 1000 layers otherwise. What has no reference is freed at once
    all the same.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _observable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(readable name, module), without the modules that only wrap another one, and without parametrizations."""
    # A module without submodules neither wraps another one nor has parametrizations.
    modules = list(model.named_modules())
    containers = [module for _, module in modules if module._modules]
    inside = {
        id(part) for module in containers if is_parametrized(module) for part in module.parametrizations.modules()
    }
    wrappers = {id(module) for module in containers if any(wrapped in module._modules for wrapped in WRAPPED)}
    return [
        (readable(name), module) for name, module in modules if id(module) not in inside and id(module) not in wrappers
    ]


def _is_leaf(module: nn.Module) -> bool:
    return all(name == "parametrizations" and is_parametrized(module) for name in module._modules)


def _watch_mlp(observation: Observation, name: str, module: OrthogonalFilterMLP) -> None:
    """Take the first state from the input layer, and the last state's gradient from the output layer.

    The hooks act only inside a call of the network: its two layers may be called on their own as well.
    """
    # One entry per call in progress: its record, once the input layer has been called.
    under_way: list[RecurrenceCall | None] = []

    def before_forward(*_):
        under_way.append(None)

    def after_input_layer(_, args, output):
        if not under_way:
            return
        if observation.is_backward:
            h0 = output.detach().reshape(-1, module.width)
            under_way[-1] = observation._repeated(module, lambda call: torch.equal(call.recurrence.h0, h0))
        else:
            under_way[-1] = observation.add_recurrence(module, from_mlp(module, output), module.weight)

    def before_output_layer(_, args):
        call = under_way[-1] if under_way else None
        if call is None:
            return
        if not observation.is_backward:
            call.no_gradient = observation.expect_gradient(call, args[0].requires_grad)
        recurrence = call.recurrence
        observation.on_gradient(args[0], lambda gradient: setattr(recurrence, "grad_states", gradient.detach().clone()))

    def after_forward(*_):
        under_way.pop()

    observation._handles += [
        module.register_forward_pre_hook(before_forward),
        module.input_layer.register_forward_hook(after_input_layer),
        module.output_layer.register_forward_pre_hook(before_output_layer),
        # Remove the entry too if the forward pass raises and the model continues without it.
        module.register_forward_hook(after_forward, always_call=True),
        module.register_forward_hook(observation._pass_on),
    ]


def _watch_ranks(observation: Observation, name: str, module: nn.Module) -> None:
    """This rank's layers of a DepthParallel. The gradient of the last state is the same on all ranks."""

    def before_output_layer(_, args):
        recurrence = None if observation.is_backward else from_ranks(module, args[0])
        if recurrence is None:
            # Nothing requires a gradient, so the states were not kept.
            return
        call = observation.add_recurrence(module, recurrence, module.weight)
        call.before, call.group = module.start, module.group
        observation.on_gradient(args[0], lambda gradient: setattr(recurrence, "grad_states", gradient.detach().clone()))

    def after_forward(_, args, kwargs, output):
        if not any(call.module is module for call in observation.calls):
            observation._record(module, args, kwargs, output, None)

    observation._handles += [
        module.output_layer.register_forward_pre_hook(before_output_layer),
        module.register_forward_hook(after_forward, with_kwargs=True),
        module.register_forward_hook(observation._pass_on),
    ]


def _watch_rnn(observation: Observation, name: str, module: OrthogonalFilterRNN) -> None:
    """Collect the gradients that reach every state through the output, and the last state through h_n as well."""

    def after_forward(_, args, kwargs, result):
        bound = dict(zip(("input", "hx"), args, strict=False), **kwargs)
        sequence, (output, h_n) = bound["input"], result
        if isinstance(sequence, PackedSequence):
            # The sequences end at different steps, so the whole call is one row.
            observation._record(module, args, kwargs, result, None)
            return
        recurrence = from_rnn(module, sequence.detach(), bound.get("hx"))
        if observation.is_backward:
            h0 = recurrence.h0
            call = observation._repeated(module, lambda call: torch.equal(call.recurrence.h0, h0))
            if call is None:
                return
            recurrence = call.recurrence
        else:
            if sequence.dim() == 3 and not module.batch_first:
                observation._see_time_first(sequence)
            call = observation.add_recurrence(module, recurrence, module.weight_hh)
            call.no_gradient = observation.expect_gradient(call, output.requires_grad)

        def grad_states() -> Tensor:
            if recurrence.grad_states is None:
                recurrence.grad_states = recurrence.h0.new_zeros((recurrence.steps + 1, *recurrence.h0.shape))
            return recurrence.grad_states

        def add_output(gradient):
            grad_states()[1:] += time_first(module, gradient)

        def add_last(gradient):
            grad_states()[-1] += gradient.reshape(recurrence.h0.shape)

        observation.on_gradient(output, add_output)
        observation.on_gradient(h_n, add_last)

    observation._handles += [
        module.register_forward_hook(after_forward, with_kwargs=True),
        module.register_forward_hook(observation._pass_on),
    ]


def _networks() -> dict[type[nn.Module], Callable]:
    """The networks whose layers are rows, and the functions that hook them."""
    networks: dict[type[nn.Module], Callable] = {OrthogonalFilterMLP: _watch_mlp, OrthogonalFilterRNN: _watch_rnn}
    # If the module has not been imported, there is no such network.
    distributed = sys.modules.get("lcw_ops.distributed.module")
    return networks if distributed is None else {**networks, distributed.DepthParallel: _watch_ranks}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _tensors(output) -> list[Tensor]:
    """:func:`floating` as a list, without a generator for the usual output: a tensor."""
    if type(output) is Tensor:
        return [output] if output.is_floating_point() or output.is_complex() else []
    return list(floating(output))


def floating(output) -> Iterator[Tensor]:
    """The floating-point and complex tensors of a module's output: itself, or those in tuples, dicts, dataclasses."""
    if isinstance(output, Tensor):
        if output.is_floating_point() or output.is_complex():
            yield output
        return
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = [getattr(output, entry.name) for entry in dataclasses.fields(output)]
    else:
        return
    for part in parts:
        yield from floating(part)


def first_floating(output) -> Tensor | None:
    """The first floating-point tensor with a dimension in a module's output, else the first one; None without any."""
    tensors = list(floating(output))
    return next((tensor for tensor in tensors if tensor.dim()), tensors[0] if tensors else None)
