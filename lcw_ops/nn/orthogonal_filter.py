"""Networks on the deep orthogonal-filter recurrence: an MLP over depth and an Elman RNN over time.

    h <- alpha O h + beta act(W h + b + u)

A. Ceni, "Random Orthogonal Additive Filters", IEEE TNNLS 2025, arXiv 2210.01245. O is fixed and random, everything else
is trained. The kinds of O are those of the author's sibling models; "permutation" is ours.
"""

import math

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops.reference.checks import check_count, check_solver
from lcw_ops.reference.orthogonal_filter import state_dtype

FILTERS = ("haar", "cyclic", "permutation", "identity")

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

    Returns:
        An int64 permutation (N,) for every kind but "haar", which gives (N, N); a tensor comes back converted.

    Raises:
        ValueError: unknown kind, wrong shape, a matrix that is not orthogonal (with the measured deviation), an int64
            tensor that is not a permutation.
        TypeError: neither a string nor a floating-point or int64 tensor.
    """
    dtype = state_dtype(dtype or torch.get_default_dtype())
    if isinstance(filter, Tensor):
        return _checked_filter(filter, width, dtype, device)
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


def _checked_filter(filter: Tensor, width: int, dtype: torch.dtype, device) -> Tensor:
    _check_filter(filter, width, torch.finfo(filter.dtype).eps if filter.is_floating_point() else 0.0)
    kept = filter.dtype if filter.dtype == torch.int64 else dtype
    return filter.detach().to(dtype=kept, device=device, copy=True)


def _check_filter(filter: Tensor, width: int, eps: float) -> None:
    """ValueError or TypeError unless it is orthogonal to rounding of relative size ``eps``, or a permutation."""
    if filter.dtype == torch.int64:
        if filter.shape != (width,) or not torch.equal(filter.sort().values.cpu(), torch.arange(width, device="cpu")):
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


class _OrthogonalFilter(nn.Module):
    """What both networks share: the filter as a buffer that keeps its precision, and the two scales."""

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
        self.filter_kind = filter if isinstance(filter, str) else "tensor"
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
                self.register_buffer(name, scale.detach().to(device=device, copy=True))
            else:
                setattr(self, name, scale)

    def __setstate__(self, state) -> None:
        # Modules pickled before there was a choice of solvers.
        super().__setstate__({"solver": "sequential", "tolerance": None, "window": None, **state})

    def _check_scale(self, name: str, scale: float | Tensor, steps: int | None) -> None:
        """A finite number, or a finite tensor with one element or one per step."""
        owner = type(self).__name__
        if not isinstance(scale, (int, float, Tensor)):
            raise TypeError(f"{owner}: {name} is {type(scale).__name__}, expected a number or a tensor")
        if isinstance(scale, Tensor) and scale.shape not in ((), (1,), (steps,)):
            expected = f"() or ({steps},)" if steps else "()"
            raise ValueError(f"{owner}: {name} has shape {tuple(scale.shape)}, expected {expected}")
        if not torch.as_tensor(scale).isfinite().all():
            raise ValueError(f"{owner}: {name} is {scale}, expected finite")

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) must not take these along: the filter is no longer orthogonal then, and 1 - 2e-5 becomes 1.
        exact = {name: getattr(self, name) for name in ("filter", "alpha", "beta")}
        exact = {name: kept.detach() for name, kept in exact.items() if isinstance(kept, Tensor)}
        super()._apply(fn, recurse)
        for name, kept in exact.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                moved.data = kept.to(dtype=torch.float32, device=moved.device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        key = f"{prefix}filter"
        loaded = state_dict.get(key)
        is_another = False
        if isinstance(loaded, Tensor) and not loaded.is_meta:
            problem = self._problem_of(loaded, key)
            if problem is not None:
                # As torch does with a tensor of the wrong size: this one stays, the others of the model are loaded,
                # and load_state_dict raises one RuntimeError with every message.
                error_msgs.append(problem)
                state_dict = {**state_dict, key: self.filter}
            else:
                is_another = loaded.shape == self.filter.shape and (
                    self.filter.is_meta or not torch.equal(loaded.to(self.filter), self.filter)
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
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

    def _check_input(self, name: str, input: Tensor, weight: Tensor) -> None:
        """TypeError for what would fail further below, in words of other ops."""
        owner = type(self).__name__
        if not isinstance(input, Tensor):
            raise TypeError(f"{owner}: {name} is {type(input).__name__}, expected a tensor")
        if input.dtype == weight.dtype:
            return
        # Autocast casts all but these.
        castable = input.is_floating_point() and torch.float64 not in (input.dtype, weight.dtype)
        if castable and torch.is_autocast_enabled(input.device.type):
            return
        raise TypeError(
            f"{owner}: {name} is {input.dtype}, the parameters are {weight.dtype}; convert one of them, for instance "
            f"{name}.to({weight.dtype})"
        )

    def _init_recurrent(self, weight: Tensor, bias: Tensor) -> None:
        gain = _INIT_GAIN.get(self.activation, 1.0)
        nn.init.normal_(weight, std=gain / math.sqrt(weight.shape[-1]))
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


class OrthogonalFilterMLP(_OrthogonalFilter):
    """A deep network that trains at 50,000 layers: h_0 = W_in x + b_in, ``depth`` steps, y = W_out h + b_out.

    Args:
        in_features: size of one sample.
        width: N, units per layer.
        depth: L, number of layers.
        out_features: size of one output.
        filter: O, see :func:`make_filter`; a buffer, never trained.
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

    Gradients of weight carry the factor beta: use Adam with eps <= 1e-12, or SGD with a rate that grows with depth.

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
        self._init_recurrent(self.weight, self.bias)

    def reset_parameters(self) -> None:
        self.input_layer.reset_parameters()
        self.output_layer.reset_parameters()
        self._init_recurrent(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input("input", x, self.input_layer.weight)
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"OrthogonalFilterMLP: input has shape {tuple(x.shape)}, expected (*, {self.in_features})")
        h0 = self.input_layer(x).reshape(-1, self.width)
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
        return self.output_layer(h).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"width={self.width}, depth={self.depth}, {self._scales_repr()}"


class OrthogonalFilterRNN(_OrthogonalFilter):
    """An Elman network that remembers 10,000 steps: h_t = alpha O h_{t-1} + beta act(W h_{t-1} + U x_t + b).

    Called like ``torch.nn.RNN``: ``output, h_n = rnn(input, h_0)``.

    Args:
        input_size: size of x_t.
        hidden_size: N.
        batch_first: input and output are (batch, time, features) instead of (time, batch, features).
        filter, alpha, activation, segment, solver, tolerance, window: as in :class:`OrthogonalFilterMLP`.
        beta: weight of the nonlinear branch; or give ``length``.
        length: number of steps to remember; then beta = 1 / length.

    Shapes:
        input (T, B, input_size), or (T, input_size) without a batch; h_0 (1, B, N) or (1, N), default zero;
        output (T, B, N), h_n (1, B, N).

    Attributes:
        weight_ih (N, input_size), weight_hh (N, N), bias (N,); filter: buffer.

    Raises:
        ValueError: neither or both of beta and length, or as in :class:`OrthogonalFilterMLP`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
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
        if (beta is None) == (length is None):
            raise ValueError(
                f"OrthogonalFilterRNN: beta is {beta} and length is {length}; give exactly one of them: length=T for "
                "sequences of T steps sets beta = 1/T"
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
        self.bias = nn.Parameter(torch.empty(hidden_size, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight_ih, std=1.0 / math.sqrt(self.input_size))
        self._init_recurrent(self.weight_hh, self.bias)

    def forward(self, input: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not isinstance(input, Tensor) or not (h_0 is None or isinstance(h_0, Tensor)):
            raise TypeError(
                f"OrthogonalFilterRNN: input and h_0 are {type(input).__name__} and {type(h_0).__name__}, expected "
                "tensors; pad a packed sequence first: torch.nn.utils.rnn.pad_packed_sequence"
            )
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"OrthogonalFilterRNN: input has shape {tuple(input.shape)}, expected "
                f"{'(B, T' if self.batch_first else '(T, B'}, {self.input_size}) or (T, {self.input_size})"
            )
        self._check_input("input", input, self.weight_ih)
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(1)
        elif self.batch_first:
            input = input.transpose(0, 1)
        batch = input.shape[1]
        if h_0 is None:
            h_0 = input.new_zeros(1, batch, self.hidden_size)
        elif not batched and h_0.dim() == 2:
            h_0 = h_0.unsqueeze(1)
        if h_0.shape != (1, batch, self.hidden_size):
            raise ValueError(
                f"OrthogonalFilterRNN: h_0 has shape {tuple(h_0.shape)}, expected (1, {batch}, {self.hidden_size})"
            )
        states = F.orthogonal_filter(
            h_0.squeeze(0),
            self.weight_hh,
            self.bias,
            self.filter,
            self.alpha,
            self.beta,
            inputs=nn.functional.linear(input, self.weight_ih),
            activation=self.activation,
            return_states=True,
            segment=self.segment,
            solver=self.solver,
            tolerance=self.tolerance,
            window=self.window,
        )
        output, h_n = states[1:], states[-1:]
        if not batched:
            return output.squeeze(1), h_n.squeeze(1)
        return (output.transpose(0, 1) if self.batch_first else output), h_n

    def extra_repr(self) -> str:
        batch_first = ", batch_first=True" if self.batch_first else ""
        return f"{self.input_size}, {self.hidden_size}{batch_first}, {self._scales_repr()}"


def _check_sizes(module: nn.Module, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{type(module).__name__}: {name} is {type(size).__name__}, expected int")
        if size < 1:
            raise ValueError(f"{type(module).__name__}: {name} is {size}, expected at least 1")
