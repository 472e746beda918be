"""The functions of the linear layers on DTensors: tensors that are spread over a mesh of processes.

For every dimension of the mesh, the arguments of a layer y = x w^T + b fit one of these patterns ("vectors" are scale,
bias, radius and location). A column says how a tensor is placed, and the last one whose gradients are sums over ranks:

    pattern   x                      weight, angles  vectors    y           gradients that are Partial
    same      Replicate              Replicate       Replicate  Replicate   none
    units     Replicate              Shard(0)        Shard(0)   Shard(-1)   x
    samples   Shard(d), d not last   Replicate       Replicate  Shard(d)    weight, angles, vectors
    fan-in    Shard(-1)              Shard(1)        Replicate  Partial     none

In the first three, every rank runs the same function on the parts that it holds, with its own kernels, and nothing is
communicated. Under "fan-in" every rank holds a part of each row: plain torch constrains it, with one number per row
summed over the ranks (LCW), or two numbers (weight norm: the largest entry and the sum of squares). The directions of
GmP and the basis form of LCW take products or the last entry from the whole row, so they refuse the pattern.

The functions that compute a weight have the same patterns without x. Derived here; the patterns are those of M.
Shoeybi et al., "Megatron-LM", arXiv 1909.08053.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcw_ops import _torch
from lcw_ops._checks import describe
from lcw_ops.reference.weight_norm import square_root

_PATTERNS_OF_LAYERS = (
    "for every dimension of the mesh: weights and vectors Shard(0) and x Replicate; or weights and vectors Replicate "
    "and x Replicate or sharded over samples"
)
_PATTERNS_OF_WEIGHTS = "for every dimension of the mesh: all tensors Shard(0), or all Replicate"


def run_layer(
    op: str,
    function: Callable[..., Tensor],
    make_weight: Callable[[], Tensor] | None,
    x: Tensor,
    rows: tuple[str, Tensor],
    **vectors: Tensor | None,
) -> Tensor:
    """A linear layer on DTensors.

    Args:
        op: the layer's function, for messages.
        function: called with the local tensors, as ``function(x, rows, *vectors)``.
        make_weight: gives the constrained weight, a DTensor, if the rows are split. None if they must be whole.
        x: (..., m).
        rows: the name and the tensor (n, ...) of weight or angles.
        vectors: one value per unit, or None. If the rows are split, "bias" is added to the product.

    Returns:
        A DTensor (..., n).

    Raises:
        TypeError: some tensors are DTensors and others are not.
        ValueError: tensors on different meshes, or placements that fit no pattern.
    """
    name, weight = rows
    tensors: dict[str, Any] = {"x": x, name: weight, **vectors}
    patterns = _find_patterns(op, tensors, name, make_weight is not None)
    if make_weight is not None and "fan-in" in patterns:
        tensors = {"x": x, name: make_weight(), "bias": vectors["bias"]}
        function = _PartOfProduct(weight, patterns)
    own = [
        None if tensor is None else _local(tensor, patterns, {"units"} if each == "x" else {"samples"})
        for each, tensor in tensors.items()
    ]
    results = {"same": _replicate(), "units": _shard(x.dim() - 1), "fan-in": _partial()}
    placements = [results.get(pattern, placed) for pattern, placed in zip(patterns, x.placements, strict=True)]  # type: ignore[attr-defined]
    return _global(function(*own), weight, placements, (*x.shape[:-1], weight.shape[0]))


def run_weight(
    op: str, function: Callable[..., Tensor], constrain: Callable[..., Tensor] | None, fan_in: int, **tensors: Tensor
) -> Tensor:
    """A layer's weight from DTensors: rows (n, ...), and vectors of one value per unit.

    Args:
        op: the function that computes the weight, for messages.
        function: called with the local tensors.
        constrain: called instead if the rows are split, with a :class:`_Split` and the local tensors. None if they must
            be whole.
        fan_in: m. If the rows are whole, the result is (n, m).
        tensors: the first is the rows.

    Returns:
        A DTensor, placed as the rows are.

    Raises:
        TypeError, ValueError: as :func:`run_layer`.
    """
    name, rows = next(iter(tensors.items()))
    patterns = _find_patterns(op, tensors, name, constrain is not None)
    if constrain is not None and "fan-in" in patterns:
        # A rank's gradient of a scale comes from its own part of the row. The redistribution, which does nothing in the
        # forward pass, adds the gradients up, so that an optimizer need not do it in every one of its operations.
        own = [
            _local(tensor, patterns, set())
            if each == name
            else _local(tensor.redistribute(placements=tensor.placements), patterns, {"fan-in"})  # type: ignore[attr-defined]
            for each, tensor in tensors.items()
        ]
        result = constrain(_Split(rows, patterns), *own)
    else:
        result = function(*(_local(tensor, patterns, set()) for tensor in tensors.values()))
    shape = tuple(rows.shape) if rows.dim() != 2 else (rows.shape[0], fan_in)
    return _global(result, rows, rows.placements, shape)  # type: ignore[attr-defined]


class _Split:
    """Rows of which every rank holds a part, and the reductions over the whole rows."""

    def __init__(self, rows: Any, patterns: list[str]) -> None:
        self.fan_in = math.prod(rows.shape[1:])
        self._ranks = _Ranks(rows, patterns)

    def sum(self, own: Tensor) -> Tensor:
        """The sum over ranks of one number per row, (n, 1, ...). It is differentiable."""
        return self._ranks.sum(own)

    def max(self, own: Tensor) -> Tensor:
        return self._ranks.reduce(own.detach(), "max")


class _Ranks:
    """The ranks that hold parts of the same rows."""

    def __init__(self, rows: Any, patterns: list[str]) -> None:
        self.mesh = rows.device_mesh
        self._is_split = [pattern == "fan-in" for pattern in patterns]

    def sum(self, own: Tensor) -> Tensor:
        """The sum of the ranks' tensors. Its gradient is the sum of the ranks' gradients."""
        return self.reduce(self.summand(own), "sum")

    def summand(self, own: Tensor) -> Tensor:
        """``own``, to be added up over the ranks. Its second derivatives are added up too."""
        return _Summand.apply(own, self)

    def reduce(self, own: Tensor, operation: str) -> Tensor:
        # Along the other dimensions of the mesh, nothing is communicated. So it does not matter how they cut tensors.
        before, after = self._placed(_partial(operation)), self._placed(_replicate())
        own = own.contiguous()
        whole = _dtensor().from_local(own, self.mesh, before, run_check=False, shape=own.shape, stride=own.stride())
        # The second redistribution does nothing in the forward pass. In the backward pass it adds up the ranks'
        # gradients. Without it, torch keeps them as Partial, and only its newer versions add them up in from_local.
        whole = whole.redistribute(placements=after).redistribute(placements=after)
        return whole.to_local(grad_placements=self._placed(_partial()))

    def is_first(self) -> bool:
        """Whether this rank is the one that adds what all of them have."""
        place = self.mesh.get_coordinate() or [1] * self.mesh.ndim
        return all(index == 0 for index, is_split in zip(place, self._is_split, strict=True) if is_split)

    def _placed(self, of_split: Any) -> list:
        return [of_split if is_split else _replicate() for is_split in self._is_split]


class _Summand(torch.autograd.Function):
    """A rank's part of a sum over ranks, unchanged. The gradient is the same on all ranks."""

    @staticmethod
    def forward(ctx, own: Tensor, ranks: _Ranks) -> Tensor:
        ctx.ranks = ranks
        return own.view_as(own)

    @staticmethod
    def backward(ctx, *grads):
        return _Copies.apply(grads[0], ctx.ranks), None


class _Copies(torch.autograd.Function):
    """A tensor that is the same on all ranks, unchanged. Every rank uses its copy, so their gradients are added up."""

    @staticmethod
    def forward(ctx, tensor: Tensor, ranks: _Ranks) -> Tensor:
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *grads):
        return ctx.ranks.sum(grads[0]), None


def centre(rows: _Split, weight: Tensor) -> Tensor:
    """A rank's part of the LCW weight, centred: minus the mean of the whole row."""
    u = _torch.cast(weight, torch.promote_types(weight.dtype, torch.float32))
    mean = rows.sum(u.sum(dim=tuple(range(1, u.dim())), keepdim=True)) / rows.fan_in
    return _torch.cast(u - mean, weight.dtype)


def normalize_scale(rows: _Split, weight: Tensor, scale: Tensor) -> Tensor:
    """A rank's part of ``scale * weight / ||weight||``, with the norm of the whole row; zero for a zero row."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    v = _torch.cast(weight, dtype)
    # A rank may hold no column. Dividing by the largest entry keeps the squares from overflow and underflow.
    largest = rows.max(v.detach().abs().amax(dim=1, keepdim=True) if v.shape[1] else v.new_zeros(len(v), 1))
    v = v / largest.masked_fill(largest == 0, 1.0)
    length = square_root(rows.sum(v.square().sum(dim=1, keepdim=True)))
    direction = v / length.masked_fill(length == 0, torch.inf)
    return _torch.cast(_torch.cast(scale, dtype)[:, None] * direction, weight.dtype)


class _PartOfProduct:
    """A rank's part of ``x @ weight.T + bias`` where the fan-in is split: the ranks' parts add up to the whole."""

    def __init__(self, rows: Any, patterns: list[str]) -> None:
        self._ranks = _Ranks(rows, patterns)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._ranks.summand(self._part(x, weight, bias))

    def _part(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            bias = _Once.apply(bias, self._ranks.is_first())
        if torch.is_autocast_enabled(x.device.type):
            return torch.nn.functional.linear(x, weight, bias)
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if bias is None else _torch.cast(bias, dtype)
        product = torch.nn.functional.linear(_torch.cast(x, dtype), _torch.cast(weight, dtype), bias)
        return _torch.cast(product, x.dtype)


class _Once(torch.autograd.Function):
    """A replicated tensor as a summand: one rank adds it, the others add 0, and all of them get its whole gradient."""

    @staticmethod
    def forward(ctx, tensor: Tensor, is_added: bool) -> Tensor:
        ctx.is_added = is_added
        return tensor.clone() if is_added else torch.zeros_like(tensor)

    @staticmethod
    def backward(ctx, *grads):
        return _OnceBackward.apply(grads[0], ctx.is_added), None


class _OnceBackward(torch.autograd.Function):
    """The gradient of :class:`_Once`. Its own gradient is counted once among the ranks."""

    @staticmethod
    def forward(ctx, grad: Tensor, is_added: bool) -> Tensor:
        ctx.is_added = is_added
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *grads):
        return _Once.apply(grads[0], ctx.is_added), None


def _find_patterns(op: str, tensors: dict[str, Any], rows: str, may_be_split: bool) -> list[str]:
    """The pattern of every dimension of the mesh. Raises TypeError or ValueError if there is none."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, mesh = next((name, t.device_mesh) for name, t in given.items() if isinstance(t, _dtensor()))
    for name, tensor in given.items():
        if not isinstance(tensor, _dtensor()):
            remedy = f"Convert it first, for instance torch.distributed.tensor.distribute_tensor({name}, mesh)."
            raise TypeError(describe(op, name, "is a plain tensor", f"a DTensor, as {first} is", remedy))
        if tensor.device_mesh != mesh:
            came, expected = f"is on the mesh {tensor.device_mesh}", f"{mesh}, as {first} is"
            raise ValueError(describe(op, name, came, expected, "Distribute both over one mesh."))
    found = [_pattern(given, rows, dimension, may_be_split) for dimension in range(mesh.ndim)]
    if None in found:
        came = ", ".join(f"{name} as {tuple(tensor.placements)}" for name, tensor in given.items())
        expected = _PATTERNS_OF_LAYERS if "x" in given else _PATTERNS_OF_WEIGHTS
        if may_be_split:
            expected += f"; or {rows} Shard(1){', x Shard(-1)' if 'x' in given else ''} and the rest Replicate"
            remedy = "Use redistribute."
        else:
            remedy = "This function needs whole rows. Use redistribute."
        raise ValueError(describe(op, "the DTensors", f"are placed {came}", expected, remedy))
    return found  # type: ignore[return-value]


def _pattern(given: dict[str, Any], rows: str, dimension: int, may_be_split: bool) -> str | None:
    """The pattern of one dimension of the mesh, or None."""
    cuts = {name: _sharded_dimension(tensor, dimension) for name, tensor in given.items()}
    x = cuts.pop("x", None)
    of_rows = cuts.pop(rows)
    of_vectors = set(cuts.values())
    last = given["x"].dim() - 1 if "x" in given else None
    if of_rows is None and of_vectors <= {None}:
        if x is None:
            return "same"
        return "samples" if 0 <= x < last else None  # type: ignore[operator]
    if of_rows == 0 and of_vectors <= {0} and x is None:
        return "units"
    if may_be_split and of_rows is not None and of_rows > 0 and of_vectors <= {None} and x == last:
        return "fan-in"
    return None


def _sharded_dimension(tensor: Any, dimension: int) -> int | None:
    """Which dimension of the tensor this dimension of the mesh cuts; None if it holds copies, -1 for anything else."""
    placement = tensor.placements[dimension]
    if placement.is_replicate():
        return None
    # The exact type: a strided shard, as FSDP makes, is another order of the rows.
    return placement.dim % tensor.dim() if type(placement) is _distributed().Shard else -1


def _local(tensor: Any, patterns: list[str], summed: set[str]) -> Tensor:
    """This rank's part. Its gradients are summed over the ranks of the mesh dimensions of these patterns."""
    placements = [
        _partial() if pattern in summed else placed for pattern, placed in zip(patterns, tensor.placements, strict=True)
    ]
    return tensor.to_local(grad_placements=placements)


def _global(own: Tensor, like: Any, placements: Any, shape: tuple[int, ...]) -> Tensor:
    """The DTensor of this shape whose part on this rank is ``own``."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    whole = _dtensor().from_local(
        own, like.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )
    # This does nothing in the forward pass. In the backward pass it brings a gradient that is placed otherwise to these
    # placements. from_local would do so too, but no second derivative would pass through that.
    return whole.redistribute(placements=placements)


def _distributed() -> Any:
    """torch.distributed.tensor, which is loaded if there is a DTensor."""
    return torch.distributed.tensor


def _dtensor() -> Any:
    return _distributed().DTensor


def _replicate() -> Any:
    return _distributed().Replicate()


def _shard(dimension: int) -> Any:
    return _distributed().Shard(dimension)


def _partial(operation: str = "sum") -> Any:
    return _distributed().Partial(operation)
