"""The initialiser of whole models by the linear product structure."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lcw_ops._checks import check_choice, describe
from lcw_ops._runs import fresh_copy, kept_attributes, kept_buffers
from lcw_ops.init import _inputs, _layers
from lcw_ops.init.lps import RULES, assumed_samples, draw_roots, draw_units, roots_to_draw
from lcw_ops.reference import anchored, hermite_second_moment, hermite_variance
from lcw_ops.reference.lps import Activation, check_activation


@torch.no_grad()
def lps_model_(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | None = None,
    activation: Activation | None = "relu",
    rule: str = "joint",
    degree: int | None = 4,
    generator: torch.Generator | None = None,
    root: float | str = 0.0,
) -> nn.Module:
    """`lps_` on every linear and convolution layer of a model, layer by layer, so that pre-activations have E z^2 = 1.

    The layers are nn.Linear, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, the lazy forms of these, and the layers of
    lcw_ops.nn in their place. In a layer whose rows sum to zero (LCW), rows of this kind are drawn, and the inputs'
    variance takes the place of their second moment; the formulas are in lcw_ops.reference.joint.

    Without inputs, the first layer is assumed to see standardised data (q = 1 in `lps_`), and every other layer the
    output of ``activation`` for a standard normal input. That suits chains of layers and activations, with batch norm
    or without. With residual branches or several activations, give inputs. Give them too for heavy tails in LCW
    layers: a ReLU has a larger variance there than on a normal input, by a factor of about 1.2 in each layer.

    With inputs, every rule takes the layer's real input instead, in one forward pass. The joint and the heavy-tailed
    rule measure what they assume otherwise: E of the sum over a unit's inputs a of a^2 (for zero-sum rows, of their
    squared deviations), over all samples and positions, in each group of a convolution by itself. So E z^2 = 1 in
    every layer, whatever precedes it, where the expectation is over the data and the draw; ``activation`` is not used.
    The anchored rule takes its anchors and its scale from the input (convolutions: from up to 1024 patches of it). A
    layer's pre-activations have the standard deviation 1 around their root, over all its units.

    Args:
        model: filled in place.
        inputs: the inputs of the forward pass: a tensor, a tuple or list of positional or a mapping of keyword
            arguments. The pass gets copies of them. It runs in eval mode, and buffers are restored, so that no running
            statistics change; a batch norm without statistics passes its input on. Each layer is filled just before it
            runs for the first time, on the output of the filled layers before it. Layers that the pass does not call
            are filled without data. They may be used all the same, as nn.MultiheadAttention uses out_proj, so the pass
            is then repeated with them, and the others are drawn again. A layer after a dead one (its inputs are 0, or
            all equal, up to rounding) is filled as without inputs. Lazy layers are initialised by the pass.
        activation: the activation in between: a name, or any elementwise function of a tensor.
        rule, degree, generator, root: as in `lps_`. For root="polynomial" the polynomial is that of ``activation``.

    Layers with torch's weight norm, in both forms, and other parametrizations are set through them. A weight that two
    layers share is filled for the first one; the second one gets its own bias.

    A weight that is tied to a module of another kind, such as an nn.Embedding, is left as it is, and the layer's bias
    becomes zero. So its pre-activations keep the scale that the tied weight gives them. The other layers are filled on
    that basis.

    Returns:
        The model.

    Raises:
        ValueError: an unknown rule or activation, a model without such layers, anchored with a layer that has no bias
            or that shares its weight, inputs of a layer that are not finite. A layer that could not apply the drawn
            weight, with its name and the reason: it is pruned; it has a parametrization that has no right_inverse or
            cannot express the weight, such as spectral norm and orthogonal; it is lazy and no input reaches it; its
            class has a forward pass of its own that computes something else. An error of the forward pass is passed
            on. After an error the model is unchanged.

    Source: derived here, not in the paper.
    """
    check_activation("lps_model_", activation, None)
    check_choice("lps_model_", "rule", rule, RULES)
    roots = roots_to_draw("lps_model_", root, rule, activation, degree)
    layers = _layers.find_layers(model)
    if not layers:
        came = "has no nn.Linear, nn.ConvNd or nn.ConvTransposeNd layer"
        raise ValueError(describe("lps_model_", "model", came, "at least one", "Use lps_ on tensors."))
    lazy = [layer for layer in layers if _layers.is_uninitialised(layer)]
    if lazy and inputs is None:
        names = ", ".join(layers[layer] for layer in lazy)
        came = f"has lazy layers that are not initialised ({names})"
        raise ValueError(describe("lps_model_", "model", came, "initialised layers", "Give inputs."))
    snapshot = _layers.Snapshot(model, layers)
    try:
        _Filling(model, layers, inputs, activation, rule, degree, generator, roots).run()
    except BaseException:
        snapshot.restore()
        raise
    return model


class _Filling:
    """One call of `lps_model_`."""

    def __init__(self, model, layers, inputs, activation, rule, degree, generator, roots) -> None:
        self.model, self.layers, self.inputs, self.generator = model, layers, inputs, generator
        self.activation, self.rule, self.roots = activation, rule, roots
        self.pending = dict(layers)
        # E a^2 and Var a of the activation's output, under its polynomial.
        self.moments = (1.0, 1.0)
        if activation is not None:
            self.moments = hermite_second_moment(activation, degree), hermite_variance(activation, degree)
        inside = {module for layer in layers for module in layer.modules()}
        others = [module for module in model.modules() if module not in inside]
        # The modules whose buffers the pass alone can change: ours and parametrizations may compute weights from them.
        self.bystanders = [*others, *(layer for layer in layers if not hasattr(type(layer), "_plain"))]
        # The parameters that others hold too, which are not to be overwritten.
        self.foreign = _layers.foreign_parameters(layers, others)
        self.tied = {layer for layer in layers if _layers.has_foreign_weight(layer, self.foreign)}
        # The parameters that have been filled, and the layer that each was filled for.
        self.filled: dict[nn.Parameter, nn.Module] = {}

    def run(self) -> None:
        drawn = {layer: name for layer, name in self.layers.items() if layer not in self.tied}
        refused = {name: _layers.reason_against(layer) for layer, name in drawn.items()}
        reasons = {name: reason for name, reason in refused.items() if reason is not None}
        if reasons:
            raise _layers.refusals(reasons)
        without_bias = [name for layer, name in drawn.items() if not _layers.has_bias(layer)]
        if self.rule == "anchored" and without_bias:
            came = f"has layers without bias ({', '.join(without_bias)})"
            expected = "a bias in every layer for rule 'anchored'"
            raise ValueError(describe("lps_model_", "model", came, expected, "Use rule='joint', or give them a bias."))
        if self.inputs is not None:
            self.call_model()
        missed = list(self.pending)
        for layer in missed:
            self.fill(layer, None)
        if self.inputs is not None and missed and len(missed) < len(self.layers):
            # Fill the layers that the pass has called once more: the missed ones may have had an effect on it.
            self.pending = {layer: name for layer, name in self.layers.items() if layer not in missed}
            self.filled = {parameter: layer for parameter, layer in self.filled.items() if layer in missed}
            self.call_model()
            for layer in list(self.pending):
                self.fill(layer, None)

    def call_model(self) -> None:
        def fill_on_data(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.fill(layer, args[0] if args else kwargs["input"])

        training = [(module, module.training) for module in self.model.modules()]
        hooks = [layer.register_forward_pre_hook(fill_on_data, with_kwargs=True) for layer in self.layers]
        try:
            self.model.eval()
            # The model may write into its inputs and its buffers, and may be called twice.
            inputs = fresh_copy(self.inputs, self.model)
            # An attribute of a layer may be computed from the weight that the layer just got.
            others = (module for module in self.bystanders if module not in self.layers)
            with kept_attributes(others), kept_buffers(self.bystanders):
                if isinstance(inputs, Mapping):
                    self.model(**inputs)
                else:
                    self.model(*inputs) if isinstance(inputs, (tuple, list)) else self.model(inputs)
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in training:
                module.training = mode

    def fill(self, layer: Any, x: Tensor | None) -> None:
        is_first = len(self.pending) == len(self.layers)
        name = self.pending.pop(layer, None)
        if name is None:
            return
        if _layers.is_uninitialised(layer):
            raise _layers.refusals({name: "it is lazy, and no input reaches it"})
        if layer in self.tied:
            bias = layer._parameters.get("bias")
            if bias is not None:
                self.assign(layer, "bias", torch.zeros_like(bias))
            return
        try:
            shared = self.filled.get(layer._parameters.get("weight"))
            if shared is not None and self.rule == "anchored":
                raise _layers.CannotTake(f"it shares its weight with {self.layers[shared]}, which has other anchors")
            zero_sum = shared is None and _layers.prepare(layer)
            rows, offset = self.draw(layer, name, x, zero_sum, is_first)
            if shared is None:
                weight = layer.weight
                self.assign(layer, "weight", _layers.weight_of(layer, rows, weight))
            if offset is not None:
                self.assign(layer, "bias", offset.to(layer.bias))
        except _layers.CannotTake as error:
            raise _layers.refusals({name: str(error)}) from error

    def assign(self, layer: Any, name: str, value: Tensor) -> None:
        own = layer._parameters.get(name)
        if own is not None and (own in self.filled or id(own) in self.foreign):
            return
        _layers.assign(layer, name, value)
        if own is not None:
            self.filled[own] = layer

    def draw(
        self, layer: Any, name: str, x: Tensor | None, zero_sum: bool, is_first: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The units' weights as rows (units, inputs), and their biases, in float64."""
        weight = layer.weight
        units, inputs = _layers.rows_of(layer, weight).shape
        second_moment, variance = (1.0, 1.0) if is_first else self.moments
        assumed = _inputs.assumed_moment(layer, inputs, second_moment, variance, zero_sum)
        options: Any = {"generator": self.generator, "device": weight.device, "zero_sum": zero_sum}
        has_bias = _layers.has_bias(layer)
        rows: Tensor
        offset: Tensor | None
        if x is not None and not x.is_meta and not x.isfinite().all():
            came = f"give the layer {name or 'itself'} NaN or infinite numbers"
            raise ValueError(describe("lps_model_", "inputs", came, "finite inputs of every layer"))
        if x is None or x.is_meta or (not is_first and _inputs.is_dead(layer, x)):
            samples = None
            if self.rule == "anchored":
                previous = None if is_first else self.activation
                samples = assumed_samples(previous, inputs, self.generator, weight.device)
                samples = _inputs.without_missed(layer, samples, self.generator)
            rows, offset = draw_units(units, inputs, self.rule, assumed, has_bias, samples, **options)
        elif self.rule == "anchored":
            samples_of_group = _inputs.samples_of(layer, x, self.generator)
            rows, offset = _anchored_groups(units, samples_of_group, self.generator, zero_sum)
        else:
            # The power of a unit's inputs is divided among its free weights.
            powers = _inputs.measured_power(layer, x, zero_sum) / max(inputs - zero_sum, 1)
            moments = [power or assumed for power in powers.tolist()]
            of_group = units // len(moments)
            parts = [draw_units(of_group, inputs, self.rule, m, has_bias, None, **options) for m in moments]
            rows = torch.cat([of_units for of_units, _ in parts])
            offset = torch.cat([of_units for _, of_units in parts if of_units is not None]) if has_bias else None
        if offset is not None:
            offset += draw_roots(self.roots, units, self.generator, weight.device)
        return rows, offset


def _anchored_groups(
    units: int, samples: tuple[Tensor, ...], generator: torch.Generator | None, zero_sum: bool
) -> tuple[Tensor, Tensor]:
    """The anchored rule for every group by itself, then one scale, so that the whole layer has the deviation 1.

    A group's own scale does not see that the means of its pre-activations differ from those of other groups. In a
    depthwise convolution a group is one unit, and E z^2 would be 2.
    """
    of_group = units // len(samples)
    parts = [anchored(of_group, of_samples, generator=generator, zero_sum=zero_sum) for of_samples in samples]
    rows, offsets = (torch.cat(part) for part in zip(*parts, strict=True))
    if len(samples) == 1:
        return rows, offsets
    z = torch.cat([x.double() @ w.T + b for x, (w, b) in zip(samples, parts, strict=True)])
    spread = z.std(correction=0)
    scale = torch.where(spread > 0, 1 / spread, 1.0)
    return scale * rows, scale * offsets
