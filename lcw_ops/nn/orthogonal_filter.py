"""Networks on the deep orthogonal-filter recurrence: an MLP over depth and an Elman RNN over time.

    h <- alpha O h + beta act(W h + b + u)

A. Ceni, "Random Orthogonal Additive Filters", IEEE TNNLS 2025, arXiv 2210.01245. O is fixed and random, everything else
is trained. The kinds of O are those of the author's sibling models; "permutation" is ours.
"""

import copy
import functools
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from lcw_ops import _torch
from lcw_ops import functional as F
from lcw_ops._checks import check_count, check_devices, check_solver
from lcw_ops._names import FILTERS
from lcw_ops.reference.orthogonal_filter import state_dtype

# Elements of the filters that are checked at a time: 50,000 layers of them in float64 would be several gigabytes.
_CHECKED_AT_ONCE = 2**20

# Gain g of the init std g / sqrt(N): sqrt(2) keeps the second moment through ReLU, 1 suits the other activations.
_INIT_GAIN = {"relu": math.sqrt(2.0)}


def make_filter(filter: str | Tensor, width: int, dtype: torch.dtype | None = None, device=None) -> Tensor:
    """An orthogonal filter of the given kind, checked once.

    Args:
        filter: "haar", a (width, width) matrix drawn from the Haar measure; "cyclic", the shift by one; "permutation",
            a random one; "identity", which makes the network a residual one; or a tensor: (width, width),
            (depth, width, width) or an int64 permutation (width,).
        width: N.
        dtype: of the layer; the filter itself has at least float32.
        device: the device of the result, also for a given tensor; default torch's default device.

    "haar" and "permutation" are random: ranks share a filter if they draw it with the same seed, or load it. Tensors
    without values (on the meta device, or fake) are not checked.

    Returns:
        An int64 permutation (N,) for every kind but "haar", which gives (N, N); a tensor comes back converted.

    Raises:
        ValueError: unknown kind, wrong shape, a matrix that is not orthogonal (with the measured deviation), an int64
            tensor that is not a permutation.
        TypeError: neither a string nor a floating-point or int64 tensor.
    """
    dtype = state_dtype(dtype or torch.get_default_dtype())
    if isinstance(filter, Tensor):
        return _checked_filter(filter, width, dtype, _resolve(device))
    if not isinstance(filter, str):
        raise TypeError(f"filter is {type(filter).__name__}, expected a string or a tensor")
    if filter == "haar":
        # The QR of a Gaussian matrix is Haar-distributed once the signs of R's diagonal are taken out.
        q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, device=device))
        return (q * r.diagonal().sign()).to(dtype)
    if filter == "cyclic":
        return torch.arange(width, device=device).roll(1)
    if filter == "permutation":
        return torch.randperm(width, device=device)
    if filter == "identity":
        return torch.arange(width, device=device)
    raise ValueError(f"filter is {filter!r}, expected one of {', '.join(FILTERS)} or a tensor")


def _resolve(device) -> torch.device:
    """The device on which torch's factories put a tensor; ``Tensor.to(device=None)`` would not move it."""
    return torch.get_default_device() if device is None else torch.device(device)


def _checked_filter(filter: Tensor, width: int, dtype: torch.dtype, device) -> Tensor:
    _check_filter(filter, width, torch.finfo(filter.dtype).eps if filter.is_floating_point() else 0.0)
    kept = filter.dtype if filter.dtype == torch.int64 else dtype
    return filter.detach().to(dtype=kept, device=device, copy=True)


def _check_filter(filter: Tensor, width: int, eps: float) -> None:
    """ValueError or TypeError unless it is orthogonal to rounding of relative size ``eps``, or a permutation."""
    if filter.dtype == torch.int64:
        every = torch.arange(width, device=filter.device)
        if filter.shape != (width,) or (_torch.has_values(filter) and not torch.equal(filter.sort().values, every)):
            raise ValueError(
                f"filter is an int64 tensor of shape {tuple(filter.shape)}, expected a permutation of 0..{width - 1}"
            )
        return
    if not filter.is_floating_point():
        raise TypeError(f"filter is {filter.dtype}, expected floating point, or int64 for a permutation")
    if filter.dim() not in (2, 3) or filter.shape[-2:] != (width, width):
        raise ValueError(
            f"filter has shape {tuple(filter.shape)}, expected ({width}, {width}) or (depth, {width}, {width})"
        )
    if filter.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"filter is {filter.dtype}: no matrix of so few bits is orthogonal; give it in float32 or float64"
        )
    if not _torch.has_values(filter):
        return
    deviation = _deviation(filter.detach().reshape(-1, width, width))
    # A QR in this precision leaves at most about sqrt(N) roundings in an inner product of two rows.
    limit = 4 * math.sqrt(width) * eps
    if not deviation <= limit:
        raise ValueError(
            f"filter is not orthogonal: |O O^T - I| reaches {deviation:.3g}, at most {limit:.3g} is rounding in "
            f"{filter.dtype}. Orthogonalise it first: torch.linalg.qr(filter.double()).Q"
        )


def _deviation(filters: Tensor) -> float:
    """The largest element of |O O^T - I| of any of some matrices (L, N, N), in float64."""
    largest = torch.zeros((), dtype=torch.float64, device=filters.device)
    at_once = max(1, _CHECKED_AT_ONCE // filters.shape[-1] ** 2)
    for first in range(0, len(filters), at_once):
        exact = filters[first : first + at_once].double()
        product = exact @ exact.mT
        product.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        # Unlike Python's max, this keeps a NaN.
        largest = torch.maximum(largest, product.abs_().max())
    return largest.item()


def _kind_of(filter: Tensor) -> str:
    """What a loaded filter can be called: a matrix does not say from which measure it was drawn."""
    if filter.dtype != torch.int64:
        return "tensor"
    for kind in ("identity", "cyclic"):
        if torch.equal(filter, make_filter(kind, len(filter), device=filter.device)):
            return kind
    return "permutation"


def _is_finite(scale: float | Tensor) -> bool:
    if not isinstance(scale, Tensor):
        return math.isfinite(scale)
    return not _torch.has_values(scale) or bool(scale.isfinite().all())


def _values_of(**scales: float | Tensor | None) -> dict[str, Tensor]:
    """Copies on the CPU of the scales that are tensors with values."""
    return {
        name: scale.detach().to("cpu", copy=True)
        for name, scale in scales.items()
        if isinstance(scale, Tensor) and _torch.has_values(scale)
    }


def _allocates(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function given to ``Module._apply`` returns new memory without the values, as ``to_empty`` does.

    Only such a function turns a tensor on the meta device into one with memory; any other raises, or stays on meta.
    """
    try:
        return not fn(torch.empty(1, device="meta")).is_meta
    except Exception:
        return False


# The attribute that marks a tensor whose values are uninitialised memory: its state when they were lost.
_LOST_AT = "_lcw_ops_lost_at"


def _mark_lost(tensor: Tensor) -> None:
    """The tensor counts as lost until autograd sees a write, its memory or itself is replaced, or it is loaded."""
    setattr(tensor, _LOST_AT, _state_of(tensor))


def _clear_mark(tensor: Tensor) -> None:
    vars(tensor).pop(_LOST_AT, None)


def _is_lost(tensor: Tensor) -> bool:
    mark = getattr(tensor, _LOST_AT, None)
    return mark is not None and mark == _state_of(tensor)


def _holds(tensor: Tensor, values: Tensor | None) -> bool:
    """Whether a state dict's values are in the tensor; torch loads one element into a tensor without dimensions."""
    if not isinstance(values, Tensor) or _distributed(values) != _distributed(tensor):
        return False
    if _distributed(tensor):
        values, tensor = values.to_local(), tensor.to_local()
    return (
        _torch.has_values(values)
        and _torch.has_values(tensor)
        and values.numel() == tensor.numel()
        and torch.equal(values.to(tensor).reshape(tensor.shape), tensor)
    )


def _state_of(tensor: Tensor) -> tuple[int, int]:
    """The version, which an in-place write raises, and the memory, which ``tensor.data = other`` replaces."""
    # An inference tensor counts no versions.
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr() if _torch.has_values(tensor) else 0


def _distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor. None exists before that module is imported, which takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _fill(tensor: Tensor, values: Tensor, mesh) -> None:
    """``tensor.copy_(values)``; with a device mesh the values of its first rank, on all of its ranks."""
    if mesh is None or not _torch.has_values(tensor):
        tensor.copy_(values)
        return
    from torch.distributed.tensor import Replicate, distribute_tensor

    if _distributed(tensor):
        tensor.copy_(distribute_tensor(values.to(tensor.dtype), tensor.device_mesh, tensor.placements))
    else:
        tensor.copy_(distribute_tensor(values, mesh, [Replicate()] * mesh.ndim).to_local())


class _OrthogonalFilter(nn.Module):
    """The base of both networks: the filter as a buffer that keeps its precision, and the two scales."""

    # True while the constructor calls reset_parameters: the filter has been drawn by then.
    _is_being_made = False

    def __init__(
        self, width, steps, filter, alpha, beta, activation, segment, device, dtype, solver, tolerance, window
    ):
        super().__init__()
        if activation not in ("tanh", "relu", "sigmoid", "identity"):
            raise ValueError(
                f"{type(self).__name__}: activation is {activation!r}, expected tanh, relu, sigmoid or identity"
            )
        for name, scale in (("alpha", alpha), ("beta", beta)):
            if scale is not None:
                self._check_scale(name, scale, steps)
        if segment is not None:
            check_count(type(self).__name__, "segment", segment)
        check_solver(type(self).__name__, solver, tolerance, window)
        # The kind that reset_parameters draws, None where a tensor was given. A state dict may change filter_kind.
        self._drawn_filter = filter if isinstance(filter, str) else None
        self.filter_kind = self._drawn_filter or "tensor"
        self.activation = activation
        self.segment = segment
        self.solver, self.tolerance, self.window = solver, tolerance, window
        filter = make_filter(filter, width, dtype, device)
        if filter.dim() == 3 and solver == "parallel":
            raise ValueError(
                f"{type(self).__name__}: filter has shape {tuple(filter.shape)}, one per layer, but the parallel "
                'solver needs one filter that all layers share; use solver="sequential"'
            )
        if filter.dim() == 3 and filter.shape[0] != steps:
            raise ValueError(
                f"{type(self).__name__}: filter has shape {tuple(filter.shape)}, expected "
                + (f"({width}, {width}) or ({steps}, {width}, {width})" if steps else f"({width}, {width})")
            )
        self.register_buffer("filter", filter)
        for name, scale in (("alpha", alpha), ("beta", beta)):
            if isinstance(scale, Tensor) and not isinstance(scale, nn.Parameter):
                self.register_buffer(name, scale.detach().to(device=_resolve(device), copy=True))
            else:
                setattr(self, name, scale)
        self._initial_scales = _values_of(alpha=alpha, beta=beta)

    def __deepcopy__(self, memo) -> "_OrthogonalFilter":
        # torch gives parametrized modules a __getstate__ that raises, and a copy without __setstate__.
        getstate = _OrthogonalFilter.__getstate__ if is_parametrized(self) else type(self).__getstate__
        replica = memo[id(self)] = self.__new__(type(self))
        replica.__setstate__(copy.deepcopy(getstate(self), memo))
        return replica

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_lost": [name for name, tensor in self._kept_tensors().items() if _is_lost(tensor)]}

    def __setstate__(self, state) -> None:
        # Modules pickled before there was a choice of solvers.
        state = {"solver": "sequential", "tolerance": None, "window": None, **state}
        lost = state.pop("_lost", ())
        super().__setstate__(state)
        if "_drawn_filter" not in state:
            # Modules pickled before reset_parameters drew the filter.
            self._drawn_filter = None if self.filter_kind == "tensor" else self.filter_kind
            self._initial_scales = _values_of(alpha=self.alpha, beta=self.beta)
        for name, tensor in self._kept_tensors().items():
            # A copied tensor has another memory and counts its versions from 0: the copied mark does not fit.
            _clear_mark(tensor)
            if name in lost:
                _mark_lost(tensor)

    def _kept_tensors(self) -> dict[str, Tensor]:
        """The filter, and alpha and beta where they are tensors."""
        kept = {name: getattr(self, name) for name in ("filter", "alpha", "beta")}
        return {name: tensor for name, tensor in kept.items() if isinstance(tensor, Tensor)}

    def _check_scale(self, name: str, scale: float | Tensor, steps: int | None) -> None:
        """A finite number, or a finite tensor with one element or one per step."""
        owner = type(self).__name__
        if not isinstance(scale, (int, float, Tensor)):
            raise TypeError(f"{owner}: {name} is {type(scale).__name__}, expected a number or a tensor")
        if isinstance(scale, Tensor) and scale.shape not in ((), (1,), (steps,)):
            expected = f"() or ({steps},)" if steps else "()"
            raise ValueError(f"{owner}: {name} has shape {tuple(scale.shape)}, expected {expected}")
        if not _is_finite(scale):
            raise ValueError(f"{owner}: {name} is {scale}, expected finite")

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) must not take these along: the filter is no longer orthogonal then, and 1 - 2e-5 becomes 1.
        kept = self._kept_tensors()
        exact = {name: tensor.detach() for name, tensor in kept.items()}
        lost = {name for name, tensor in kept.items() if _is_lost(tensor)}
        allocates = _allocates(fn)
        super()._apply(fn, recurse)
        for name, before in exact.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                moved.data = before.to(dtype=torch.float32, device=moved.device)
            if name in lost or (not moved.is_meta and (allocates or before.is_meta)):
                _mark_lost(moved)
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
                # As torch does with a tensor of the wrong size: this one stays, the others of the model are loaded,
                # and load_state_dict raises one RuntimeError with every message.
                error_msgs.append(problem)
                state_dict = {**state_dict, key: self.filter}
            else:
                is_another = loaded.shape == self.filter.shape and (
                    not _torch.has_values(self.filter)
                    or _is_lost(self.filter)
                    or not torch.equal(loaded.to(self.filter), self.filter)
                )
        # The version does not tell: in inference mode it may not count, and a refused filter is written over itself.
        lost = {name: given.get(f"{prefix}{name}") for name, tensor in self._kept_tensors().items() if _is_lost(tensor)}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, values in lost.items():
            tensor = getattr(self, name)
            (_clear_mark if _holds(tensor, values) else _mark_lost)(tensor)
        if is_another:
            self.filter_kind = _kind_of(loaded)

    def _problem_of(self, filter: Tensor, key: str) -> str | None:
        """What keeps a tensor of a state dict from being a filter of this module, None when nothing does."""
        owner = type(self).__name__
        if (filter.dtype == torch.int64) != (self.filter.dtype == torch.int64):
            return (
                f"{owner}: the state dict's {key} is {filter.dtype}, this module's is {self.filter.dtype}; make it "
                "with the other kind of filter: a permutation or a matrix"
            )
        # A module turned to float64 saves a filter that was rounded to float32 once.
        try:
            _check_filter(filter, self.filter.shape[-1], torch.finfo(torch.float32).eps)
        except (ValueError, TypeError) as error:
            return f"{owner}: the state dict's {key}: {error}"
        return None

    def _apply_input_layer(self, x: Tensor) -> Tensor:
        """The first state, (*, width).

        A layer that replaces the nn.Linear (quantized, with adapters) may take another dtype than that of its weight,
        or have no weight: its own errors pass through. The errors of an nn.Linear are put into this module's words,
        after the call, because torch.fx and torch.jit.trace cannot record a check of x before it.
        """
        layer = self.input_layer
        if type(layer) is not nn.Linear:
            return layer(x)
        # Dynamo raises the layer's errors while it compiles, past this try statement, and a fake layer takes any dtype.
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
        """TypeError or ValueError for an x that the input layer, an nn.Linear, does not take."""
        owner = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f"{owner}: input is {type(x).__name__}, expected a tensor")
        if not _goes_with(x, weight):
            raise TypeError(_dtype_message(owner, "input", x, weight))
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"{owner}: input has shape {tuple(x.shape)}, expected (*, {self.in_features})")

    @torch.no_grad()
    def _reset_fixed(self) -> None:
        """Draws the filter again and sets alpha and beta to their first values, in place; ValueError where it cannot.

        A filter that was given as a tensor stays. Everything is checked before the first number is written. This is a
        collective where a parameter is sharded over ranks: drawing their parts has left them different generators.
        """
        if self._is_being_made:
            return
        owner = type(self).__name__
        kept = self._kept_tensors()
        known = {*self._initial_scales, *([] if self._drawn_filter is None else ["filter"])}
        unknown = [name for name, tensor in kept.items() if name not in known and _is_lost(tensor)]
        if unknown:
            name = unknown[0]
            set_it, keep_it = f"module.{name} = tensor", f"module.{name} = module.{name}.clone()"
            if isinstance(kept[name], nn.Parameter):
                set_it = f"module.{name} = torch.nn.Parameter(tensor)"
                keep_it = f"module.{name} = torch.nn.Parameter(module.{name}.clone())"
            raise ValueError(
                f"{owner}: reset_parameters cannot restore {' and '.join(unknown)}: given as tensors, whose values "
                "were lost when new memory was allocated for the module (to_empty). Load a state dict instead, or "
                f"set them first: {set_it}. A write that autograd does not see (a broadcast of torch.distributed, "
                f"or through .data) does not count: if there was one, {keep_it} keeps its values"
            )
        mesh = self._device_mesh()
        if self._drawn_filter is None:
            try:
                _check_filter(self.filter, self.filter.shape[-1], torch.finfo(torch.float32).eps)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{owner}: reset_parameters cannot draw a filter that was given as a tensor, and it was changed: "
                    f"{error}"
                ) from error
        else:
            drawn = make_filter(self._drawn_filter, self.filter.shape[-1], self.filter.dtype, self.filter.device)
            _fill(self.filter, drawn, mesh)
            self.filter_kind = self._drawn_filter
        for name in sorted(kept.keys() & self._initial_scales.keys()):
            _fill(kept[name], self._initial_scales[name], mesh)

    def _device_mesh(self):
        """The largest device mesh over which a parameter is distributed, None where none is."""
        meshes = [parameter.device_mesh for parameter in self.parameters() if _distributed(parameter)]
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


def _goes_with(input: Tensor, weight: Tensor) -> bool:
    """Whether the dtypes are the same, or autocast makes them so: it casts all but float64."""
    if input.dtype == weight.dtype:
        return True
    castable = input.is_floating_point() and torch.float64 not in (input.dtype, weight.dtype)
    # Autocast does not know the meta device.
    return castable and not input.is_meta and torch.is_autocast_enabled(input.device.type)


def _dtype_message(owner: str, name: str, input: Tensor, weight: Tensor) -> str:
    return (
        f"{owner}: {name} is {input.dtype}, the parameters are {weight.dtype}; convert one of them, for instance "
        f"{name}.to({weight.dtype})"
    )


class OrthogonalFilterMLP(_OrthogonalFilter):
    """A deep network that trains at 50,000 layers: h_0 = W_in x + b_in, ``depth`` steps, y = W_out h + b_out.

    Args:
        in_features: size of one sample.
        width: N, units per layer.
        depth: L, number of layers.
        out_features: size of one output.
        filter: O, see :func:`make_filter`; a buffer, never trained. "haar" and "permutation" are random: on several
            ranks draw them with one seed, or broadcast the state dict. The ranks of a sharded module agree in
            :meth:`reset_parameters`.
        beta: weight of the nonlinear branch, a number or (depth,) tensor; default 1 / depth. A constant beta lets the
            gradient vanish like (1 - beta)^depth.
        alpha: weight of the filter branch; default 1 - beta.
        activation: "tanh", "relu", "sigmoid" or "identity".
        segment: states kept for backward, one in so many; see :func:`lcw_ops.functional.orthogonal_filter`.
        solver, tolerance, window: "sequential", or "parallel" over depth; the same.

    Shapes:
        input (*, in_features) -> output (*, out_features).

    Attributes:
        input_layer, output_layer: ``nn.Linear``. weight: (depth, width, width), std 1/sqrt(width), for ReLU
        sqrt(2/width). bias: (depth, width), zero. filter: buffer, in float32 at least.

    Gradients of weight carry the factor beta: use Adam with eps <= 1e-12, or SGD with a rate that grows with depth. The
    module does not see its optimizer and cannot warn. At 50,000 layers of width 32 the entries' median is 5e-8 before
    the first step (digits, batch 64) and falls with the loss: Adam's default eps of 1e-8 is not small beside them.

    Raises:
        ValueError, TypeError: a size below 1, a filter that is not orthogonal, non-finite alpha or beta.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        out_features: int,
        filter: str | Tensor = "haar",
        *,
        beta: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
        activation: str = "tanh",
        segment: int | None = None,
        device=None,
        dtype=None,
        solver: str = "sequential",
        tolerance: float | None = None,
        window: int | None = None,
    ) -> None:
        _check_sizes(self, in_features=in_features, width=width, depth=depth, out_features=out_features)
        beta = 1.0 / depth if beta is None else beta
        super().__init__(
            width, depth, filter, alpha, beta, activation, segment, device, dtype, solver, tolerance, window
        )
        options = {"device": device, "dtype": dtype}
        self.in_features, self.width, self.depth, self.out_features = in_features, width, depth, out_features
        self.input_layer = nn.Linear(in_features, width, **options)
        self.weight = nn.Parameter(torch.empty(depth, width, width, **options))
        self.bias = nn.Parameter(torch.empty(depth, width, **options))
        self.output_layer = nn.Linear(width, out_features, **options)
        # Not reset_parameters, which would draw the linear layers a second time: seeded models would change.
        self._init_recurrent(self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Draws parameters and filter as the constructor did, and sets alpha and beta to their first values.

        A filter that was given as a tensor stays. The constructor itself does not call this method.

        Where a parameter is a ``DTensor`` (FSDP2, tensor parallelism), all ranks of its mesh have to call this; the
        filter is that of the mesh's first rank. Otherwise ranks share a filter only if they call it with one seed.

        Raises:
            ValueError: a filter, alpha or beta that was given as a tensor and is uninitialised memory since
                ``to_empty``: it has to be loaded, or set. An input_layer or output_layer without a
                ``reset_parameters``. Nothing has been written then.
        """
        for name in ("input_layer", "output_layer"):
            layer = getattr(self, name)
            if not callable(getattr(layer, "reset_parameters", None)):
                raise ValueError(
                    f"{type(self).__name__}: reset_parameters cannot initialise {name}: {type(layer).__name__} has no "
                    "reset_parameters. Give it one, or call reset_parameters before the layer is replaced"
                )
        self._reset_fixed()
        self.input_layer.reset_parameters()
        self.output_layer.reset_parameters()
        self._init_recurrent(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        h0 = self._apply_input_layer(x).reshape(-1, self.width)
        h = F.orthogonal_filter(
            h0,
            self.weight,
            self.bias,
            self.filter,
            self.alpha,
            self.beta,
            activation=self.activation,
            segment=self.segment,
            solver=self.solver,
            tolerance=self.tolerance,
            window=self.window,
        )
        return self.output_layer(h).reshape(x.shape[:-1] + (self.out_features,))  # noqa: RUF005

    def extra_repr(self) -> str:
        return f"width={self.width}, depth={self.depth}, {self._scales_repr()}"


def _refuse_arguments_of_rnn(init: Callable) -> Callable:
    """A constructor whose TypeError says what to do about arguments that only ``torch.nn.RNN`` has."""

    @functools.wraps(init)
    def checked(self, *args, **kwargs) -> None:
        owner = type(self).__name__
        if len(args) > 2:
            raise TypeError(
                f"{owner}: {len(args)} arguments by position, expected two, input_size and hidden_size (torch.nn.RNN's "
                "third is num_layers, and this is one layer); give the others by name, for instance batch_first=True"
            )
        for name, remedy in _INSTEAD_OF.items():
            if name in kwargs:
                raise TypeError(f"{owner}: {name} is an argument of torch.nn.RNN only; {remedy}")
        init(self, *args, **kwargs)

    return checked


_INSTEAD_OF = {
    "num_layers": "this is one layer: run several of these modules, each on the output of the one before",
    "bidirectional": "run a second module on the input flipped over time, input.flip(0), and flip its output back",
    "dropout": "apply torch.nn.Dropout to the output",
    "nonlinearity": 'give activation="tanh", "relu", "sigmoid" or "identity"',
    "proj_size": "apply torch.nn.Linear(hidden_size, proj_size) to the output",
}


class OrthogonalFilterRNN(_OrthogonalFilter):
    """An Elman network that remembers 10,000 steps: h_t = alpha O h_{t-1} + beta act(W h_{t-1} + U x_t + b).

    Called like ``torch.nn.RNN``: ``output, h_n = rnn(input, hx)``.

    Args:
        input_size: size of x_t.
        hidden_size: N.
        bias: False leaves b out.
        batch_first: input and output are (batch, time, features) instead of (time, batch, features).
        filter, alpha, activation, segment, solver, tolerance, window: as in :class:`OrthogonalFilterMLP`.
        beta: weight of the nonlinear branch; or give ``length``.
        length: number of steps to remember; then beta = 1 / length.

    Shapes:
        input (T, B, input_size), T >= 1, or (T, input_size) without a batch; hx (1, B, N) or (1, N), default zero;
        output (T, B, N) or (T, N), h_n (1, B, N) or (1, N).
        A ``PackedSequence`` gives a packed output, and h_n (1, B, N) holds the last state of every sequence; hx and
        h_n are in the order of the sequences before they were sorted.

    Attributes:
        weight_ih (N, input_size), weight_hh (N, N), bias (N,) or None; filter: buffer.

    Every step's gradient carries the factor beta: on Adam's eps see :class:`OrthogonalFilterMLP`.

    Raises:
        ValueError: neither or both of beta and length, or as in :class:`OrthogonalFilterMLP`. In a call: shapes or
            dtypes that do not fit, an empty sequence, a ``PackedSequence`` whose sizes contradict each other, or one
            that would be exported.
        TypeError: arguments that only ``torch.nn.RNN`` has, a third argument by position, a bias or batch_first that
            is not a bool. In a call: an input or hx that is not a tensor, or on another device than the parameters.

    Differences from ``torch.nn.RNN``:

    ======================  ================================  ==========================================================
    subject                 ``torch.nn.RNN``                  here
    ======================  ================================  ==========================================================
    arguments by position   all                               input_size and hidden_size
    num_layers              several in one module             TypeError: run several modules; the attribute is 1
    bidirectional           both directions in one module     TypeError: run a second one on the flipped input; False
    dropout                 between layers                    TypeError: apply ``nn.Dropout``; the attribute is 0.0
    nonlinearity            "tanh", "relu"                    TypeError: ``activation=``, also "sigmoid" and "identity"
    proj_size               LSTM only                         TypeError: apply ``nn.Linear``; the attribute is 0
    parameters              ``weight_ih_l0``, ..., two        ``weight_ih``, ``weight_hh``, one ``bias``; the state dict
                            biases                            has the filter too
    attribute ``bias``      bool                              the parameter, or None
    attribute ``mode``      RNN_TANH, RNN_RELU                also RNN_SIGMOID, RNN_IDENTITY
    initial values          all uniform, +-1/sqrt(N)          normal: ``weight_ih`` with std 1/sqrt(input_size),
                                                              ``weight_hh`` as in the MLP; ``bias`` zero
    errors in a call        RuntimeError; wrong dtype of the  shapes and dtypes: ValueError; another device, or not a
                            input: ValueError                 tensor: TypeError
    autocast                output and h_n in its dtype       both in float32: rounded to 16 bits, a state that is
                                                              carried on as hx would lose steps of size beta
    output edited in place  allowed on a CPU, on a GPU        backward raises an error where it reads these states, as
    before backward         backward raises an error          the CPU's kernel does, for instance after
                                                              ``torch.nn.functional.dropout(output, inplace=True)``; a
                                                              packed output may be edited. Edit ``output.clone()``: a
                                                              copy in every call takes 3 to 5 % of forward + backward on
                                                              two CPU cores (T = 784 and 10,000), so none is made
    PackedSequence          yes                               yes: one run per stretch of time in which no sequence ends
    exporting a             ``torch.jit.trace`` keeps its     ValueError: the lengths would become constants; export
    PackedSequence          lengths as inputs                 with padded input
    TorchScript             ``torch.jit.script`` and          ``torch.jit.trace`` only
                            ``torch.jit.trace``
    ======================  ================================  ==========================================================
    """

    # Attributes of torch.nn.RNN that generic code reads.
    num_layers = 1
    bidirectional = False
    dropout = 0.0
    proj_size = 0

    @_refuse_arguments_of_rnn
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        batch_first: bool = False,
        filter: str | Tensor = "haar",
        beta: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
        activation: str = "tanh",
        length: int | None = None,
        segment: int | None = None,
        device=None,
        dtype=None,
        solver: str = "sequential",
        tolerance: float | None = None,
        window: int | None = None,
    ) -> None:
        _check_sizes(self, input_size=input_size, hidden_size=hidden_size)
        for name, flag in (("bias", bias), ("batch_first", batch_first)):
            if not isinstance(flag, bool):
                raise TypeError(f"{type(self).__name__}: {name} is {flag!r}, expected True or False")
        if (beta is None) == (length is None):
            raise ValueError(
                f"{type(self).__name__}: beta is {beta} and length is {length}; give exactly one of them: length=T "
                "for sequences of T steps sets beta = 1/T"
            )
        if length is not None:
            _check_sizes(self, length=length)
            beta = 1.0 / length
        super().__init__(
            hidden_size, None, filter, alpha, beta, activation, segment, device, dtype, solver, tolerance, window
        )
        options = {"device": device, "dtype": dtype}
        self.input_size, self.hidden_size, self.batch_first = input_size, hidden_size, batch_first
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size, **options))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size, **options))
        self.register_parameter("bias", nn.Parameter(torch.empty(hidden_size, **options)) if bias else None)
        # A subclass may override it, as one of torch's modules. The filter is not drawn a second time.
        self._is_being_made = True
        self.reset_parameters()
        del self._is_being_made

    @property
    def nonlinearity(self) -> str:
        return self.activation

    @property
    def mode(self) -> str:
        return f"RNN_{self.activation.upper()}"

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        return [[self.weight_ih, self.weight_hh, *([] if self.bias is None else [self.bias])]]

    def flatten_parameters(self) -> None:
        """Does nothing: there is no cuDNN whose layout the parameters could take."""

    def reset_parameters(self) -> None:
        """See :meth:`OrthogonalFilterMLP.reset_parameters`; here the constructor calls it, once the filter is drawn."""
        self._reset_fixed()
        nn.init.normal_(self.weight_ih, std=1.0 / math.sqrt(self.input_size))
        self._init_recurrent(self.weight_hh, self.bias)

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        options = {
            "activation": self.activation,
            "segment": self.segment,
            "solver": self.solver,
            "tolerance": self.tolerance,
            "window": self.window,
        }
        recurrence = self.weight_hh, self.bias, self.filter, self.alpha, self.beta
        if isinstance(input, PackedSequence):
            return _run_packed(input, hx, self.weight_ih, *recurrence, **options)
        h0, drive = _start_sequence(input, hx, self.weight_ih, self.batch_first)
        states = F.orthogonal_filter(h0, *recurrence, inputs=drive, return_states=True, **options)
        return _finish_sequence(states, input, self.batch_first)

    def extra_repr(self) -> str:
        flags = (", bias=False" if self.bias is None else "") + (", batch_first=True" if self.batch_first else "")
        return f"{self.input_size}, {self.hidden_size}{flags}, {self._scales_repr()}"


# These functions branch on the input's sizes, so they have torch's protocol: torch.fx records them as calls.
def _start_sequence(input: Tensor, hx: Tensor | None, weight_ih: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """h_0 (B, N) and U x_t (T, B, N)."""
    arguments = (input, hx, weight_ih, batch_first)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(_start_sequence, *arguments)
    _torch.unrecorded(_check_sequence, input, hx, weight_ih, batch_first)
    if input.dim() == 2:
        input = input.unsqueeze(1)
    elif batch_first:
        input = input.transpose(0, 1)
    return _first_state(hx, input, input.shape[1], weight_ih), nn.functional.linear(input, weight_ih)


def _finish_sequence(states: Tensor, input: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """(output, h_n) in the input's layout."""
    arguments = (states, input, batch_first)
    if _torch.is_overridden(*arguments):
        return _torch.hand_over(_finish_sequence, *arguments)
    # A view would keep the memory of all states alive, and an edit of it would change the output.
    output, h_n = states[1:], states[-1:].clone()
    if input.dim() == 2:
        return output.squeeze(1), h_n.squeeze(1)
    return (output.transpose(0, 1) if batch_first else output), h_n


def _run_packed(packed, hx, weight_ih, weight_hh, bias, filter, alpha, beta, **options):
    """(output, h_n) of a packed sequence: one run per stretch of time over which the batch stays the same.

    No padding is computed, so none can overflow. ``batch_first`` does not apply to packed sequences.
    """
    if _torch.is_exporting():
        raise ValueError(
            "OrthogonalFilterRNN: input is a PackedSequence, and the lengths of a PackedSequence would become "
            "constants; export with padded input"
        )
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    _check_packed(data, batch_sizes, hx, weight_ih)
    state = _first_state(hx, data, int(batch_sizes[0]), weight_hh)
    if hx is not None and sorted_indices is not None:
        state = state.index_select(0, sorted_indices)
    # The state stays in float32 between the stretches, as it does in one run over all steps.
    dtype = state_dtype(weight_hh.dtype)
    autocast = not data.is_meta and torch.is_autocast_enabled(data.device.type)
    result_dtype = dtype if autocast else weight_hh.dtype
    state, drive = state.to(dtype), nn.functional.linear(data, weight_ih).to(dtype)
    shared = weight_hh.to(dtype), None if bias is None else bias.to(dtype), filter, alpha, beta
    sizes, lengths = (counts.tolist() for counts in torch.unique_consecutive(batch_sizes, return_counts=True))
    stretches = drive.split([size * length for size, length in zip(sizes, lengths, strict=True)])
    outputs, ended = [], []
    for size, length, inputs in zip(sizes, lengths, stretches, strict=True):
        ended.append(state[size:])
        inputs = inputs.unflatten(0, (length, size))
        states = F.orthogonal_filter(state[:size], *shared, inputs=inputs, return_states=True, **options)
        outputs.append(states[1:].flatten(0, 1))
        state = states[-1]
    # The longest sequences come first and end last.
    h_n = torch.cat([state, *ended[::-1]]).to(result_dtype)
    if unsorted_indices is not None:
        h_n = h_n.index_select(0, unsorted_indices)
    output = PackedSequence(torch.cat(outputs).to(result_dtype), batch_sizes, sorted_indices, unsorted_indices)
    return output, h_n.unsqueeze(0)


def _first_state(hx: Tensor | None, like: Tensor, batch: int, weight_hh: Tensor) -> Tensor:
    """(B, N), zeros by default; hx is (1, B, N), or (1, N) with a batch of one."""
    width = weight_hh.shape[0]
    return like.new_zeros(batch, width) if hx is None else hx.reshape(batch, width)


def _check_sequence(input: Tensor, hx: Tensor | None, weight_ih: Tensor, batch_first: bool) -> None:
    _check_tensors(input, hx, weight_ih)
    features = weight_ih.shape[1]
    if input.dim() not in (2, 3) or input.shape[-1] != features:
        raise ValueError(
            f"OrthogonalFilterRNN: input has shape {tuple(input.shape)}, expected "
            f"{'(B, T' if batch_first else '(T, B'}, {features}) or (T, {features})"
        )
    time = 1 if batch_first and input.dim() == 3 else 0
    _check_state(hx, weight_ih, *([input.shape[1 - time]] if input.dim() == 3 else []))
    if input.shape[time] == 0:
        raise ValueError(
            f"OrthogonalFilterRNN: input has shape {tuple(input.shape)}, expected a sequence length larger than 0"
        )


def _check_packed(data: Tensor, batch_sizes: Tensor, hx: Tensor | None, weight_ih: Tensor) -> None:
    _check_tensors(data, hx, weight_ih)
    features = weight_ih.shape[1]
    if data.dim() != 2 or data.shape[1] != features:
        raise ValueError(
            f"OrthogonalFilterRNN: the packed input's data has shape {tuple(data.shape)}, expected (*, {features})"
        )
    sizes = batch_sizes.tolist()
    if not sizes or sizes != sorted(sizes, reverse=True) or sizes[-1] < 1 or sum(sizes) != len(data):
        raise ValueError(
            "OrthogonalFilterRNN: the packed input's batch_sizes rise from one step to the next, or do not add up to "
            f"its {len(data)} rows; make it with torch.nn.utils.rnn.pack_padded_sequence"
        )
    _check_state(hx, weight_ih, sizes[0])


def _check_state(hx: Tensor | None, weight_ih: Tensor, *batch: int) -> None:
    width = weight_ih.shape[0]
    if hx is not None and hx.shape != (1, *batch, width):
        raise ValueError(
            f"OrthogonalFilterRNN: hx has shape {tuple(hx.shape)}, expected {(1, *batch, width)}"
            + ("" if batch else " for an input without a batch")
        )


def _check_tensors(input: Tensor, hx: Tensor | None, weight: Tensor) -> None:
    if isinstance(input, PackedSequence):
        # OrthogonalFilterRNN.forward takes another path for it, so this call comes from a recorded graph.
        raise TypeError(
            "OrthogonalFilterRNN: input is a PackedSequence, but this graph was recorded for tensors; call the module "
            "itself, or pad the input: torch.nn.utils.rnn.pad_packed_sequence"
        )
    for name, tensor in (("input", input), *([] if hx is None else [("hx", hx)])):
        if not isinstance(tensor, Tensor):
            also = " or a PackedSequence" if name == "input" else ""
            raise TypeError(f"OrthogonalFilterRNN: {name} is {type(tensor).__name__}, expected a tensor{also}")
        if not _goes_with(tensor, weight):
            # torch.nn.RNN raises ValueError too.
            raise ValueError(_dtype_message("OrthogonalFilterRNN", name, tensor, weight))
        check_devices("OrthogonalFilterRNN", weight_ih=weight, **{name: tensor})


def _check_sizes(module: nn.Module, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{type(module).__name__}: {name} is {type(size).__name__}, expected int")
        if size < 1:
            raise ValueError(f"{type(module).__name__}: {name} is {size}, expected at least 1")
