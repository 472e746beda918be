"""Tensor parallelism for the linear layers of lcw_ops.nn, in plans of ``parallelize_module``.

torch's styles of the same names go by ``isinstance`` and take nn.Linear and nn.Embedding. These take our layers too and
hand everything else to torch's. Their arithmetic is in lcw_ops/functional/_shards.py.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as torchs
from torch.distributed.tensor.placement_types import Placement
from torch.nn.utils.parametrize import is_parametrized

from lcw_ops._checks import describe
from lcw_ops._layer_kinds import is_linear
from lcw_ops.nn import GmPLinear, LCWLinear

_PLAIN = (nn.Linear, nn.Embedding)

# The attribute of a parameter that holds what it was made into, for the other layers that share it.
_MADE = "_lcw_ops_distributed_as"


class _Style(torchs.ParallelStyle):
    """The code shared by both styles."""

    # The style of torch that takes plain layers.
    _torchs: Any
    # How the input of one of our layers has to be placed, and how its output is placed by default.
    _input: Placement
    _output: Placement

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        for name, layout in (("input_layouts", input_layouts), ("output_layouts", output_layouts)):
            if layout is not None and not isinstance(layout, Placement):
                expected = "a Placement, such as Replicate() or Shard(-1), or None for the default"
                raise TypeError(describe(type(self).__name__, name, f"is a {type(layout).__name__}", expected))
        self.input_layouts, self.output_layouts = input_layouts, output_layouts
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = type(self).__name__
        if is_parametrized(module):
            came = f"is a {type(module).__name__} with a parametrization, which may need whole rows"
            remedy = "Remove it first: torch.nn.utils.parametrize.remove_parametrizations."
            raise ValueError(describe(name, "the module", came, "a layer without one", remedy))
        if isinstance(module, _PLAIN):
            style = self._torchs(
                input_layouts=self.input_layouts,
                output_layouts=self.output_layouts,
                use_local_output=self.use_local_output,
            )
            return torchs.parallelize_module(module, device_mesh, style, src_data_rank=self.src_data_rank)
        if not is_linear(module):
            expected = "a linear layer of lcw_ops.nn, nn.Linear or nn.Embedding"
            raise TypeError(describe(name, "the module", f"is a {type(module).__name__}", expected))
        if device_mesh.ndim != 1:
            came, expected = f"has {device_mesh.ndim} dimensions", "one dimension"
            raise ValueError(describe(name, "device_mesh", came, expected, 'Pass a part of it, such as mesh["tp"].'))
        self._check_layer(name, module)
        self._check_shared(name, module, device_mesh)
        return distribute_module(
            module,
            device_mesh,
            self._distribute,
            partial(_place_input, self.input_layouts or self._input, self._input),
            partial(_place_output, self.output_layouts or self._output, self.use_local_output),
        )

    def _check_layer(self, name: str, layer: nn.Module) -> None:
        """Raise ValueError if the style cannot split the layer."""

    def _placement(self, name: str, tensor: Tensor, layer: Any) -> Placement:
        raise NotImplementedError

    def _check_shared(self, name: str, layer: nn.Module, mesh: DeviceMesh) -> None:
        """Raise ValueError if a parameter is shared with a layer that was split in another way."""
        for own_name, parameter in layer.named_parameters(recurse=False):
            made = getattr(parameter, _MADE, None)
            if made is not None and (made.device_mesh, *made.placements) != (
                mesh,
                self._placement(own_name, parameter, layer),
            ):
                came = f"shares {own_name} with a layer that was split as {made.placements}"
                expected = "the same split for all layers that share a parameter"
                raise ValueError(describe(name, "the module", came, expected, "Use one style and one mesh for them."))

    def _distribute(self, _: str, layer: nn.Module, mesh: DeviceMesh) -> None:
        def distribute(name: str, tensor: Tensor) -> DTensor:
            placements = [self._placement(name, tensor, layer)]
            return distribute_tensor(tensor, mesh, placements, src_data_rank=self.src_data_rank)

        for name, parameter in list(layer.named_parameters(recurse=False)):
            made = getattr(parameter, _MADE, None)
            if made is None:
                made = nn.Parameter(distribute(name, parameter), requires_grad=parameter.requires_grad)
                setattr(parameter, _MADE, made)
            layer.register_parameter(name, made)
        for name, buffer in list(layer.named_buffers(recurse=False)):
            layer.register_buffer(name, distribute(name, buffer), name not in layer._non_persistent_buffers_set)

    def __repr__(self) -> str:
        shown = ("input_layouts", "output_layouts", "use_local_output")
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in shown)})"


class ColwiseParallel(_Style):
    """Split a linear layer by its units, for a plan of ``torch.distributed.tensor.parallel.parallelize_module``.

    Every rank owns some units: all their trained tensors and buffers become DTensors, sharded along dim 0. A unit's row
    stays whole, so every constraint allows it, and constraining costs no communication. Each rank runs the layer's own
    kernels.

    Args:
        input_layouts: how the input is placed that the layer is given; default ``Replicate()``. If it is another
            placement, the input is redistributed to ``Replicate()``.
        output_layouts: how the output is to be placed; default ``Shard(-1)``, each rank's units.
        use_local_output: whether the layer returns a plain tensor, a rank's part, instead of a DTensor.

    These are the arguments of torch's ``ColwiseParallel``.

    The layer is an ``LCWLinear`` in either form, a ``WeightNormLinear``, a ``GmPLinear``, or a plain ``nn.Linear`` or
    ``nn.Embedding``, which torch's own style takes. So one plan can serve a model that has both. The number of units
    need not be a multiple of the number of ranks, as long as the next layer knows how they are split: it does if it
    is given a DTensor (``use_local_output=False``).

    Outputs and gradients are those of one process up to rounding. ``layer.weight``, ``layer.bias`` and the entries of
    ``state_dict()`` are DTensors; ``full_tensor()`` gives the whole, and ``layer.weight = tensor`` takes a DTensor.
    Draw initial values before the split: not every layer's ``reset_parameters`` works on DTensors. All ranks have to
    read ``weight`` or ``bias`` of a GmP layer with ReLU together, because its radii are checked over all ranks. Second
    derivatives are tested with torch 2.13, not with older versions.

    A parameter that several of our layers share stays shared if the plan splits all of them alike. A layer outside the
    plan keeps the whole tensor, and one that torch's style takes gets parts of its own: tie these after the split.

    Raises:
        TypeError: layouts that are not placements; in ``parallelize_module``, another kind of module, a convolution
            included; in a call of the layer, an input that is passed by keyword.
        ValueError: in ``parallelize_module``, a mesh of several dimensions, a layer with a parametrization, plain
            layers included, or a parameter that is shared with a layer that was split in another way.

    Source: M. Shoeybi et al., "Megatron-LM", arXiv 1909.08053; the rules for constrained weights are ours.
    """

    _torchs = torchs.ColwiseParallel
    _input, _output = Replicate(), Shard(-1)

    def _placement(self, name: str, tensor: Tensor, layer: Any) -> Placement:
        return Shard(0)


class RowwiseParallel(_Style):
    """Split a linear layer by its inputs, for a plan of ``torch.distributed.tensor.parallel.parallelize_module``.

    Every rank owns some columns of the weight, and multiplies them by the same columns of the input; the products add
    up. The usual pair is :class:`ColwiseParallel` before an activation and ``RowwiseParallel`` after it, with one
    all-reduce of the output.

    The constraint needs each row's sum (LCW) or its norm (weight norm). A pass sums that over the ranks: one number per
    row for LCW; for weight norm a second one, the row's largest entry, keeps squares from overflow. Each rank's part of
    the constrained weight is formed in plain torch and then multiplied.

    Args:
        input_layouts: how the input is placed that the layer is given; default ``Shard(-1)``. If it is another
            placement, the input is redistributed to ``Shard(-1)``.
        output_layouts: how the output is to be placed; default ``Replicate()``.
        use_local_output: whether the layer returns a plain tensor instead of a DTensor.

    These are the arguments of torch's ``RowwiseParallel``.

    The layer is a centred ``LCWLinear``, a ``WeightNormLinear``, or a plain ``nn.Linear`` or ``nn.Embedding``, which
    torch's own style takes. ``weight_u`` and ``weight_v`` are sharded along dim 1; ``weight_g`` and ``bias`` are
    replicated. A plain tensor as input is taken as an equal part of the features on every rank. If the fan-in is not a
    multiple of the number of ranks, give a DTensor.

    Results, ``layer.weight``, shared parameters and state dicts are as with :class:`ColwiseParallel`. All ranks have to
    read ``weight`` together, because it needs their sums. With 16-bit tensors, every rank's part of the output is
    rounded before the sum, as in torch's style.

    Raises:
        TypeError: as :class:`ColwiseParallel`.
        ValueError: in ``parallelize_module``, an ``LCWLinear`` with ``basis=True`` or a ``GmPLinear``, whose rows must
            be whole; and as :class:`ColwiseParallel`.

    Source: as :class:`ColwiseParallel`.
    """

    _torchs = torchs.RowwiseParallel
    _input, _output = Shard(-1), Replicate()

    def _check_layer(self, name: str, layer: nn.Module) -> None:
        remedy = "Use ColwiseParallel, which splits by units"
        if isinstance(layer, GmPLinear):
            came = "is a GmPLinear. Its directions are products of sines along the row, so the rows must be whole"
            expected = "a layer whose rows can be split"
            raise ValueError(describe(name, "the module", came, expected, f"{remedy}, or WeightNormLinear."))
        if isinstance(layer, LCWLinear) and layer.basis:
            came = (
                "is an LCWLinear with basis=True. Its rows have one trained number less than inputs, so the rows must "
                "be whole"
            )
            expected = "a layer whose rows can be split"
            raise ValueError(describe(name, "the module", came, expected, f"{remedy}, or the centred form."))

    def _placement(self, name: str, tensor: Tensor, layer: Any) -> Placement:
        # The rows, and the mask or original that pruning makes of them.
        is_rows = tuple(tensor.shape) == (layer.out_features, layer.in_features) and not name.startswith("weight_g")
        return Shard(1) if is_rows else Replicate()


def _place_input(
    given: Placement, wanted: Placement, module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh
) -> tuple[Any, ...]:
    """The layer's arguments, the first as a DTensor that is placed as wanted."""
    if not inputs:
        owner = type(module).__name__
        raise TypeError(describe(owner, "input", "is not the first argument of a call", "layer(x), without a keyword"))
    input, *others = inputs
    if not isinstance(input, DTensor):
        input = DTensor.from_local(input, mesh, [given], run_check=False)
    return (input.redistribute(placements=[wanted]), *others)


def _place_output(wanted: Placement, is_local: bool, module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
    output = output.redistribute(placements=[wanted])
    return output.to_local() if is_local else output
