"""Runs of the model on given inputs: which layers are called, what they are given, and how the outputs change.

A run leaves the model as it was: it is made in eval mode without gradients, and buffers, training flags and torch's
random state are restored.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lcw_ops._checks import describe
from lcw_ops._layer_kinds import is_linear
from lcw_ops._runs import fresh_copy, kept_attributes, kept_buffers
from lcw_ops.conversion.exchange import Exchange, placed
from lcw_ops.conversion.report import Change, StepTime

_TIMED_STEPS = 5


class Inputs:
    """A model's arguments: a tensor, a tuple of positional arguments, or a mapping of keyword arguments."""

    def __init__(self, function: str, inputs: object) -> None:
        self.args: tuple = ()
        self.kwargs: dict = {}
        if isinstance(inputs, Tensor):
            self.args = (inputs,)
        elif isinstance(inputs, (tuple, list)):
            self.args = tuple(inputs)
        elif isinstance(inputs, Mapping):
            self.kwargs = dict(inputs)
        else:
            expected = "a tensor, a tuple of positional arguments, or a dict of keyword arguments"
            raise TypeError(describe(function, "inputs", f"is a {type(inputs).__name__}", expected))

    def call(self, model: nn.Module) -> Any:
        """The model's output on a copy, because a model may write into what it is given, as a cache of keys does."""
        args, kwargs = self.copied(model)
        return model(*args, **kwargs)

    def copied(self, model: nn.Module) -> tuple[tuple, dict]:
        copied: tuple[tuple, dict] = fresh_copy((self.args, self.kwargs), model)
        return copied


def input_of(args: tuple, kwargs: dict) -> Tensor:
    """The input of a call of a linear layer or a convolution."""
    return args[0] if args else kwargs["input"]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore training flags, attributes, buffers and torch's random state afterwards.

    torch's older weight norm, for example, puts a new ``weight`` beside the parameters in every call. In a call with
    gradients it carries a graph, and the model could not be copied any more.
    """
    flags = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices), kept_attributes(model.modules()), kept_buffers(model.modules()):
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def run(model: nn.Module, inputs: Inputs, hooks: Mapping[nn.Module, Callable]) -> list[Tensor]:
    """The numbers in the model's output in eval mode, as copies: an output may be a buffer, which is restored.

    ``hooks`` are called as forward hooks with the raw output of each layer.
    """
    handles = []
    with undisturbed(model), torch.no_grad():
        model.eval()
        try:
            for layer, hook in hooks.items():
                # Prepended, so that another hook has not changed the output yet.
                handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
            return [tensor.clone() for tensor in _floats(inputs.call(model))]
        finally:
            for handle in handles:
                handle.remove()


def called_layers(model: nn.Module, inputs: Inputs, layers: list[nn.Module]) -> list[nn.Module]:
    """The layers that a call of the model calls, in the order of their last call."""
    order: dict[nn.Module, None] = {}

    def note(layer, args, kwargs, output) -> None:
        order.pop(layer, None)
        order[layer] = None

    run(model, inputs, dict.fromkeys(layers, note))
    return list(order)


class _Norms:
    """Sums of squares, for ||a - b|| / ||b|| over several tensors."""

    def __init__(self) -> None:
        self.difference = self.difference_without = self.scale = 0.0

    def add(self, old: Tensor, new: Tensor, without: Tensor | None = None) -> None:
        old = _wide(old)
        self.scale += float(old.abs().square().sum())
        self.difference += float((_wide(new) - old).abs().square().sum())
        if without is not None:
            self.difference_without += float((_wide(without) - old).abs().square().sum())

    def change(self, has_without: bool) -> Change:
        return Change(self._relative(self.difference), self._relative(self.difference_without) if has_without else None)

    def _relative(self, difference: float) -> float:
        return 0.0 if difference == 0 else math.inf if self.scale == 0 else math.sqrt(difference / self.scale)


def layer_changes(
    model: nn.Module, inputs: Inputs, exchanges: list[Exchange], corrections: Mapping[nn.Module, Tensor]
) -> tuple[dict[str, Change], list[Tensor]]:
    """How much each new layer's output differs from the old one's on the old one's inputs; and the model's output.

    ``corrections`` has, by old layer, what was added to the new layer's bias: (units,).
    """
    norms: dict[str, _Norms] = {}

    def hook_of(exchange: Exchange) -> Callable:
        correction = corrections.get(exchange.old)

        def compare(layer, args, kwargs, output) -> None:
            # In eval mode a layer would keep its weight, which nobody needs here.
            with _training(exchange.new):
                new = exchange.new.forward(*args, **kwargs)
            without = None
            if correction is not None:
                without = new - _along_channels(correction.to(new), exchange.old)
            outputs = zip(_floats(output), _floats(new), strict=True)
            total = norms.setdefault(exchange.name, _Norms())
            for old_output, new_output in outputs:
                total.add(old_output, new_output, without)

        return compare

    output = run(model, inputs, {exchange.old: hook_of(exchange) for exchange in exchanges})
    has_correction = {exchange.name: exchange.old in corrections for exchange in exchanges}
    return {name: total.change(has_correction[name]) for name, total in norms.items()}, output


@contextmanager
def _training(layer: nn.Module) -> Iterator[None]:
    flag, layer.training = layer.training, True
    try:
        yield
    finally:
        layer.training = flag


def output_change(
    inputs: Inputs,
    old_output: list[Tensor],
    root_of: nn.Module,
    exchanges: list[Exchange],
    corrections: Mapping[nn.Module, Tensor],
) -> Change:
    """How much the model's output differs from its earlier one while the new layers are in their places."""
    norms = _Norms()
    for old_tensor, new_tensor in zip(old_output, _run_placed(inputs, root_of, exchanges), strict=True):
        norms.add(old_tensor, new_tensor)
    if not corrections:
        return norms.change(False)
    with _without(exchanges, corrections):
        output = _run_placed(inputs, root_of, exchanges)
    without = _Norms()
    for old_tensor, new_tensor in zip(old_output, output, strict=True):
        without.add(old_tensor, new_tensor)
    return Change(norms.change(False).value, without.change(False).value)


def _run_placed(inputs: Inputs, model: nn.Module, exchanges: list[Exchange]) -> list[Tensor]:
    with placed(exchanges):
        return run(new_root(model, exchanges), inputs, {})


def new_root(model: nn.Module, exchanges: list[Exchange]) -> nn.Module:
    """The model itself, or the layer that replaces it."""
    return next((exchange.new for exchange in exchanges if exchange.old is model), model)


@contextmanager
def _without(exchanges: list[Exchange], corrections: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """The new layers without the correction of their bias, which is a tensor of their own until they are committed."""
    corrected = [(exchange.new, corrections[exchange.old]) for exchange in exchanges if exchange.old in corrections]
    kept: list[Any] = [new._parameters["bias"] for new, _ in corrected]
    try:
        for (new, correction), bias in zip(corrected, kept, strict=True):
            new._parameters["bias"] = nn.Parameter(bias.detach() - correction.to(bias))
        yield
    finally:
        for (new, _), bias in zip(corrected, kept, strict=True):
            new._parameters["bias"] = bias


def step_times(model: nn.Module, inputs: Inputs, exchanges: list[Exchange]) -> StepTime:
    """The shortest of a few forward and backward passes, old and new in turns. No ``.grad`` is written."""
    before, after = [], []
    with undisturbed(model):
        # The first step of each is slower, and is not counted.
        for _ in range(_TIMED_STEPS + 1):
            before.append(_time_step(model, inputs))
            with placed(exchanges):
                after.append(_time_step(new_root(model, exchanges), inputs))
    return StepTime(min(before[1:]), min(after[1:]))


def _time_step(model: nn.Module, inputs: Inputs) -> float:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    args, kwargs = inputs.copied(model)
    start = time.perf_counter()
    with torch.enable_grad():
        outputs = [output for output in _floats(model(*args, **kwargs)) if output.requires_grad]
        if outputs and parameters:
            loss = torch.stack([output.abs().float().sum() for output in outputs]).sum()
            torch.autograd.grad(loss, parameters, allow_unused=True)
    if any(parameter.is_cuda for parameter in parameters):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def mean_sums(model: nn.Module, inputs: Inputs, layers: list[nn.Module]) -> dict[nn.Module, Tensor]:
    """E[sum of a unit's inputs] of every layer that is called: (1,) for a linear layer, (groups,) for a convolution.

    The mean is over samples and positions. At a border the sum is over the padding too, as the layer sees it.
    """
    sums: dict[nn.Module, tuple[Tensor, int]] = {}

    def add(layer, args, kwargs, output) -> None:
        total, count = _sums_of_inputs(layer, input_of(args, kwargs))
        before, counted = sums.get(layer, (0.0, 0))
        sums[layer] = before + total, counted + count

    run(model, inputs, dict.fromkeys(layers, add))
    return {layer: total / count for layer, (total, count) in sums.items() if count}


def _sums_of_inputs(layer: Any, x: Tensor) -> tuple[Tensor, int]:
    x = _wide(x)
    if is_linear(layer):
        return x.sum().reshape(1), x.numel() // layer.in_features
    # A convolution with one filter of ones per group sums each window.
    filters = x.new_ones(layer.groups, layer.in_channels // layer.groups, *layer.kernel_size)
    with torch.autocast(x.device.type, enabled=False):
        windows = layer._conv_forward(x, filters, None)
    channel = windows.dim() - len(layer.kernel_size) - 1
    per_group = windows.movedim(channel, 0).flatten(1)
    return per_group.sum(1), per_group.shape[1]


def _along_channels(values: Tensor, layer: Any) -> Tensor:
    return values if is_linear(layer) else values.view(-1, *(1,) * len(layer.kernel_size))


def _floats(output: Any) -> list[Tensor]:
    """The tensors of numbers in an output of any structure."""
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())]


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.is_complex() else tensor.double()
