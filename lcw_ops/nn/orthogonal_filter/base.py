"""The base class of both networks: it holds the filter (a buffer that keeps its precision) and the two scales."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lcw_ops import _torch
from lcw_ops._checks import check_choice, check_count, check_shape, check_solver, describe
from lcw_ops.nn.orthogonal_filter.filters import check_filter, kind_of, make_filter, resolve_device
from lcw_ops.nn.orthogonal_filter.memory import (
    allocates,
    clear_mark,
    fill,
    holds,
    is_distributed,
    is_lost,
    mark_lost,
    values_of,
)
from lcw_ops.reference.orthogonal_filter import ACTIVATIONS

# The gain g of the initial std g / sqrt(width): sqrt(2) keeps the second moment through ReLU, 1 suits the others.
_INIT_GAIN = {"relu": math.sqrt(2.0)}


def _is_finite(scale: float | Tensor) -> bool:
    if not isinstance(scale, Tensor):
        return math.isfinite(scale)
    return not _torch.has_values(scale) or bool(scale.isfinite().all())


class _OrthogonalFilter(nn.Module):
    """The base class of both networks: it holds the filter (a buffer that keeps its precision) and the two scales."""

    filter: Tensor
    alpha: float | Tensor | None
    beta: float | Tensor | None
    bias: nn.Parameter | None
    # Only the MLP has these.
    input_layer: Any
    in_features: int

    # True while the constructor calls reset_parameters: the filter has already been drawn.
    _is_being_made = False

    def __init__(
        self, width, steps, filter, alpha, beta, activation, segment, device, dtype, solver, tolerance, window
    ):
        super().__init__()
        owner = type(self).__name__
        check_choice(owner, "activation", activation, ACTIVATIONS)
        for name, scale in (("alpha", alpha), ("beta", beta)):
            if scale is not None:
                self._check_scale(name, scale, steps)
        if segment is not None:
            check_count(owner, "segment", segment)
        check_solver(owner, solver, tolerance, window)
        # The kind that reset_parameters draws, or None if a tensor was given. A state dict may change filter_kind.
        self._drawn_filter = filter if isinstance(filter, str) else None
        self.filter_kind = self._drawn_filter or "tensor"
        self.activation = activation
        self.segment = segment
        self.solver, self.tolerance, self.window = solver, tolerance, window
        filter = make_filter(filter, width, dtype, device)
        if filter.dim() == 3 and solver == "parallel":
            expected = "one filter that all layers share, for the parallel solver"
            check_shape(owner, "filter", filter, False, expected, 'Use solver="sequential".')
        expected = f"({width}, {width})" + (f" or ({steps}, {width}, {width})" if steps else "")
        check_shape(owner, "filter", filter, filter.dim() != 3 or filter.shape[0] == steps, expected)
        self.register_buffer("filter", filter)
        for name, scale in (("alpha", alpha), ("beta", beta)):
            if isinstance(scale, Tensor) and not isinstance(scale, nn.Parameter):
                self.register_buffer(name, scale.detach().to(device=resolve_device(device), copy=True))
            else:
                setattr(self, name, scale)
        self._initial_scales = values_of(alpha=alpha, beta=beta)

    def __deepcopy__(self, memo) -> "_OrthogonalFilter":
        # torch's own copy of a parametrized module would skip __setstate__, and its __getstate__ raises.
        getstate = _OrthogonalFilter.__getstate__ if is_parametrized(self) else type(self).__getstate__
        replica = memo[id(self)] = self.__new__(type(self))
        replica.__setstate__(copy.deepcopy(getstate(self), memo))
        return replica

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_lost": [name for name, tensor in self._kept_tensors().items() if is_lost(tensor)]}

    def __setstate__(self, state) -> None:
        # Modules pickled before there was a choice of solvers lack these.
        state = {"solver": "sequential", "tolerance": None, "window": None, **state}
        lost = state.pop("_lost", ())
        super().__setstate__(state)
        if "_drawn_filter" not in state:
            # Modules pickled before reset_parameters drew the filter lack these.
            self._drawn_filter = None if self.filter_kind == "tensor" else self.filter_kind
            self._initial_scales = values_of(alpha=self.alpha, beta=self.beta)
        for name, tensor in self._kept_tensors().items():
            # A copied tensor has other memory and counts versions from 0, so the copied mark does not apply.
            clear_mark(tensor)
            if name in lost:
                mark_lost(tensor)

    def _kept_tensors(self) -> dict[str, Tensor]:
        """The filter, and alpha and beta if they are tensors."""
        kept = {name: getattr(self, name) for name in ("filter", "alpha", "beta")}
        return {name: tensor for name, tensor in kept.items() if isinstance(tensor, Tensor)}

    def _check_scale(self, name: str, scale: float | Tensor, steps: int | None) -> None:
        """Raise TypeError or ValueError unless ``scale`` is a finite number, or a tensor of one or ``steps`` such."""
        owner = type(self).__name__
        if not isinstance(scale, (int, float, Tensor)):
            raise TypeError(describe(owner, name, f"is a {type(scale).__name__}", "a number or a tensor"))
        if isinstance(scale, Tensor):
            expected = f"() or ({steps},)" if steps else "()"
            check_shape(owner, name, scale, scale.shape in ((), (1,), (steps,)), expected)
        if not _is_finite(scale):
            raise ValueError(describe(owner, name, f"is {scale}", "finite numbers"))

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) must not convert filter and scales: O would not be orthogonal, and alpha = 1 - 2e-5 would be 1.
        kept = self._kept_tensors()
        exact = {name: tensor.detach() for name, tensor in kept.items()}
        lost = {name for name, tensor in kept.items() if is_lost(tensor)}
        gets_memory = allocates(fn)
        super()._apply(fn, recurse)
        for name, before in exact.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                moved.data = before.to(dtype=torch.float32, device=moved.device)
            if name in lost or (not moved.is_meta and (gets_memory or before.is_meta)):
                mark_lost(moved)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        key = f"{prefix}filter"
        given, loaded = state_dict, state_dict.get(key)
        is_another = False
        if isinstance(loaded, Tensor) and _torch.has_values(loaded):
            problem = self._problem_of(loaded, key)
            if problem is not None:
                # As with a tensor of the wrong size, this module's filter stays, the model's other tensors are loaded,
                # and load_state_dict raises one RuntimeError with every message.
                error_msgs.append(problem)
                state_dict = {**state_dict, key: self.filter}
            else:
                is_another = loaded.shape == self.filter.shape and (
                    not _torch.has_values(self.filter)
                    or is_lost(self.filter)
                    or not torch.equal(loaded.to(self.filter), self.filter)
                )
        # Version counters cannot tell whether a tensor was loaded: inference mode may not count, and a refused filter
        # is copied onto itself. So the values are compared after the call.
        lost = {name: given.get(f"{prefix}{name}") for name, tensor in self._kept_tensors().items() if is_lost(tensor)}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, values in lost.items():
            tensor = getattr(self, name)
            (clear_mark if holds(tensor, values) else mark_lost)(tensor)
        if is_another:
            self.filter_kind = kind_of(loaded)

    def _problem_of(self, filter: Tensor, key: str) -> str | None:
        """Why a tensor of a state dict cannot be the filter of this module; None if it can."""
        owner = type(self).__name__
        if (filter.dtype == torch.int64) != (self.filter.dtype == torch.int64):
            expected = f"{self.filter.dtype}, as in this module"
            remedy = "Make the module with a filter of the state dict's kind, a permutation or a matrix."
            return describe(owner, f"the state dict's {key}", f"is {filter.dtype}", expected, remedy)
        # A module converted to float64 saves a filter that was once rounded to float32.
        try:
            check_filter(
                owner, f"the state dict's {key}", filter, self.filter.shape[-1], torch.finfo(torch.float32).eps
            )
        except (ValueError, TypeError) as error:
            return str(error)
        return None

    def _apply_input_layer(self, x: Tensor) -> Tensor:
        """The first state, (*, width).

        A layer that replaces the nn.Linear (a quantized one, one with adapters) may take another dtype than its
        weight's, or have no weight, so its own errors pass through. The errors of an nn.Linear are explained in this
        module's terms. That is done after the call, because torch.fx and torch.jit.trace cannot record a check of x
        before it.
        """
        layer = self.input_layer
        if type(layer) is not nn.Linear:
            return layer(x)
        # While Dynamo compiles, the layer's errors are raised outside this try, and a fake layer takes any dtype. So x
        # is checked before the call.
        if torch.compiler.is_compiling():
            self._check_input(x, layer.weight)
            return layer(x)
        try:
            return layer(x)
        except (RuntimeError, TypeError) as error:
            try:
                self._check_input(x, layer.weight)
            except (ValueError, TypeError) as problem:
                raise problem from error
            raise

    def _check_input(self, x: Tensor, weight: Tensor) -> None:
        """Raise TypeError or ValueError if the input layer, an nn.Linear, does not take x."""
        owner = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(describe(owner, "input", f"is a {type(x).__name__}", "a tensor"))
        if not goes_with(x, weight):
            raise TypeError(dtype_message(owner, "input", x, weight))
        if x.shape[-1:] != (self.in_features,):
            check_shape(owner, "input", x, False, f"(*, {self.in_features})")

    @torch.no_grad()
    def _reset_fixed(self) -> None:
        """Draw the filter again and set alpha and beta to their initial values, in place, or raise ValueError.

        A filter that was given as a tensor stays. Everything is checked before anything is written. If a parameter is
        sharded over ranks, all of them have to call this, and they get the first rank's filter: drawing their parts of
        the parameters has left their generators in different states.
        """
        if self._is_being_made:
            return
        owner = type(self).__name__
        kept = self._kept_tensors()
        known = {*self._initial_scales, *([] if self._drawn_filter is None else ["filter"])}
        unknown = [name for name, tensor in kept.items() if name not in known and is_lost(tensor)]
        if unknown:
            name = unknown[0]
            set_it, keep_it = f"module.{name} = tensor", f"module.{name} = module.{name}.clone()"
            if isinstance(kept[name], nn.Parameter):
                set_it = f"module.{name} = torch.nn.Parameter(tensor)"
                keep_it = f"module.{name} = torch.nn.Parameter(module.{name}.clone())"
            came = "was given as a tensor, and its values were lost when the module got new memory (to_empty)"
            expected = f"values: reset_parameters cannot restore {' and '.join(unknown)}"
            remedy = (
                f"Load a state dict instead, or set them first: {set_it}. A write that autograd does not see (a "
                f"broadcast of torch.distributed, or through .data) does not count: if there was one, {keep_it} keeps "
                "the values written."
            )
            raise ValueError(describe(owner, name, came, expected, remedy))
        mesh = self._device_mesh()
        if self._drawn_filter is None:
            try:
                check_filter(owner, "filter", self.filter, self.filter.shape[-1], torch.finfo(torch.float32).eps)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{error} reset_parameters cannot draw a filter that was given as a tensor, and its values changed."
                ) from error
        else:
            drawn = make_filter(self._drawn_filter, self.filter.shape[-1], self.filter.dtype, self.filter.device)
            fill(self.filter, drawn, mesh)
            self.filter_kind = self._drawn_filter
        for name in sorted(kept.keys() & self._initial_scales.keys()):
            fill(kept[name], self._initial_scales[name], mesh)

    def _device_mesh(self):
        """The largest device mesh over which a parameter is distributed, or None."""
        sharded: Iterable[Any] = filter(is_distributed, self.parameters())
        meshes = [parameter.device_mesh for parameter in sharded]
        return max(meshes, key=lambda mesh: mesh.size(), default=None)

    def _init_recurrent(self, weight: Tensor, bias: Tensor | None) -> None:
        gain = _INIT_GAIN.get(self.activation, 1.0)
        nn.init.normal_(weight, std=gain / math.sqrt(weight.shape[-1]))
        if bias is not None:
            nn.init.zeros_(bias)

    def _scales_repr(self) -> str:
        shown = {
            name: f"tensor{tuple(scale.shape)}" if isinstance(scale, Tensor) else scale
            for name in ("alpha", "beta")
            if (scale := getattr(self, name)) is not None
        }
        scales = "".join(f", {name}={scale}" for name, scale in shown.items())
        options = "" if self.solver == "sequential" else f", solver={self.solver!r}"
        for name in ("segment", "tolerance", "window"):
            if getattr(self, name) is not None:
                options += f", {name}={getattr(self, name)}"
        return f"filter={self.filter_kind!r}{scales}, activation={self.activation!r}{options}"


def goes_with(input: Tensor, weight: Tensor) -> bool:
    """Whether the dtypes are equal, or autocast makes them so: it casts all but float64."""
    if input.dtype == weight.dtype:
        return True
    castable = input.is_floating_point() and torch.float64 not in (input.dtype, weight.dtype)
    # Autocast does not know the meta device.
    return castable and not input.is_meta and torch.is_autocast_enabled(input.device.type)


def dtype_message(owner: str, name: str, input: Tensor, weight: Tensor) -> str:
    expected = f"{weight.dtype}, as the parameters are"
    remedy = f"Convert one of them, for instance {name}.to({weight.dtype})."
    return describe(owner, name, f"is {input.dtype}", expected, remedy)


def check_sizes(module: nn.Module, **sizes: int) -> None:
    """Raise TypeError or ValueError unless every size is an int of at least 1."""
    owner = type(module).__name__
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(describe(owner, name, f"is a {type(size).__name__}", "an int"))
        if size < 1:
            raise ValueError(describe(owner, name, f"is {size}", "at least 1"))
