"""The deep recurrence over the ranks of a process group: each of them owns a contiguous range of layers.

    h_l = alpha_l O h_{l-1} + beta_l act(W_l h_{l-1} + b_l)

It is solved by the Picard sweeps of lcw_ops/ops/parallel_depth_solver.py, over all layers of all ranks at once. A sweep
is local but for the states between ranges: a rank scans its range from a zero state, all ranks gather what comes out at
the ends (M x N of each), and as the linear part across D layers is alpha^D O^D, everybody knows with which state every
range begins. Then a rank scans its range from there. The adjoint runs the same way from the other end. Derived here.
"""

import math
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

from lcw_ops.nn.orthogonal_filter import OrthogonalFilterMLP, _OrthogonalFilter
from lcw_ops.ops import backends
from lcw_ops.ops.parallel_depth import op as parallel_depth
from lcw_ops.ops.parallel_depth import solver
from lcw_ops.ops.parallel_depth.frame import Frame, get_frame
from lcw_ops.ops.precision import full_float32
from lcw_ops.reference import parallel_depth as reference
from lcw_ops.reference.orthogonal_filter import scale_tensors, state_dtype

__all__ = ["DepthParallel"]

# The state dict's entries that are split over the ranks.
_PER_LAYER = ("weight", "bias")

# A checkpoint travels in pieces, so that no device has to hold more than its range and one of them.
_PIECE_BYTES = 64 * 2**20

# How far apart the sketches of what should be one tensor may be. Rounding moves them by less, other samples by about 1.
_SKETCH_TOLERANCE = 1e-3
_SKETCH_TOLERANCE_OF_16_BITS = 1e-2


class DepthParallel(_OrthogonalFilter):
    """An :class:`lcw_ops.nn.OrthogonalFilterMLP` over a process group: every rank owns a contiguous range of layers.

    Every rank passes the same x, gets the same y and computes the same loss. A sweep costs one all-gather of (M, N)
    per rank and one all-reduce of a number, a pass one more of a few numbers, by which ranks find out whether they make
    the same call; there is no pipeline to fill, and no micro-batches. The result of a sweep is that of one process to
    rounding. See docs/parallel_depth.md; derived by us.

    Args:
        mlp: the plain module, with the same arguments on every rank, and left as it is. A rank copies its range of
            layers from its own ``mlp``; everything else comes from rank 0's. ``tolerance`` holds as for the parallel
            solver, whatever the module's ``solver``; ``segment`` does not matter.
        process_group: gloo or nccl; default: the default group.

    Shapes:
        input (*, in_features) -> output (*, out_features), as of the plain module.

    Attributes:
        weight, bias: (D, width, width) and (D, width), the D layers of this rank; ranges differ by at most one layer.
        start, stop: this rank's layers are start..stop - 1 of the plain module's.
        input_layer, output_layer: ``nn.Linear``, the same on every rank. They stay equal without communication, since
            their gradients are: use one kind of machine and one number of threads, or they part by rounding.

    Sweeps that do not converge are given up by all ranks alike: then the layers run one after the other in the order of
    the ranks, with one RuntimeWarning, on rank 0, after the pass; where the user has made it an error all ranks raise.
    Memory: all states of a rank's range, (D + 1, M, N), are kept for backward.

    Training:
        Any torch optimizer on ``parameters()``: what it does must not depend on other layers' gradients. To clip by the
        norm take the group's: the sum of the squares of ``weight.grad`` and ``bias.grad`` all-reduced, plus that of the
        other gradients. A gradient scaler must skip a step on all ranks or none:
        ``torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler``.
        ``state_dict()`` is this rank's; :meth:`full_state_dict` and :meth:`load_full_state_dict` are the plain
        module's. The module itself cannot be pickled. It has no ``reset_parameters``: after ``to_empty`` call
        :meth:`load_full_state_dict`.
        Data parallelism: ``DistributedDataParallel(depth_parallel, process_group=other)``, where ``other`` has the
        ranks with the same range of layers, one of each depth group. Over a group with two ranks of this one, as the
        default group is, it overwrites the layers of one by the other's when it is made; its first call raises.

    Raises:
        ValueError: at construction: no process group, more ranks than layers, modules that differ between ranks, one
            filter per layer, alpha or beta that require a gradient, a window. In a call, on every rank alike: another
            shape, dtype, gradient mode, activation, tolerance or other numbers than the other ranks', and whatever the
            plain module refuses. Numbers of the first state and of the output's gradient are compared by their norm and
            two projections: differences below 1e-3 of the whole (1e-2 in 16 bits) are not noticed. Or data parallelism
            over ranks of this group.
        TypeError: at construction: another kind of module. In a call: dtypes that do not fit. When it is pickled.
        RuntimeError: a rank stopped answering: with gloo raised within the group's timeout, from its own error; with
            nccl torch's watchdog ends the process after the timeout instead. Or derivatives of second order, which the
            plain module has.
    """

    def __init__(self, mlp: OrthogonalFilterMLP, process_group: dist.ProcessGroup | None = None) -> None:
        group = _Group(process_group)
        group.check_alike(mlp)
        alpha, beta = (scale.detach() if isinstance(scale, Tensor) else scale for scale in (mlp.alpha, mlp.beta))
        super().__init__(
            mlp.width,
            mlp.depth,
            "identity",
            alpha,
            beta,
            mlp.activation,
            segment=None,
            device=mlp.weight.device,
            dtype=mlp.weight.dtype,
            solver="parallel",
            tolerance=mlp.tolerance,
            window=None,
        )
        # It was checked when the plain module was made.
        self.filter, self.filter_kind = mlp.filter.detach().clone(), mlp.filter_kind
        self._drawn_filter = mlp._drawn_filter
        for name in ("in_features", "width", "depth", "out_features"):
            setattr(self, name, getattr(mlp, name))
        self.group = group
        self.bounds = [mlp.depth * rank // group.size for rank in range(group.size + 1)]
        self.start, self.stop = self.bounds[group.rank : group.rank + 2]
        self.input_layer, self.output_layer = deepcopy(mlp.input_layer), deepcopy(mlp.output_layer)
        for name in _PER_LAYER:
            whole = getattr(mlp, name)
            own = whole.detach()[self.start : self.stop].clone()
            setattr(self, name, nn.Parameter(own, requires_grad=whole.requires_grad))
        for key, tensor in self.state_dict().items():
            if key not in _PER_LAYER:
                group.broadcast(tensor, 0, f"the broadcast of {key} at construction")

    def forward(self, x: Tensor) -> Tensor:
        h0, recurrence, error = None, None, None
        try:
            self._refuse_same_group()
            h0 = self._first_state(x)
            dtype = state_dtype(h0.dtype)
            recurrence = self._make_recurrence(dtype)
        except Exception as refusal:
            # Raised below, once the other ranks know.
            error = refusal
        needs_gradient = self._agree_on_call(h0, error)
        if needs_gradient and not any(tensor.requires_grad for tensor in (h0, self.weight, self.bias)):
            # Other ranks take part in a backward pass, which has to come by here too.
            h0 = h0.detach().requires_grad_()
        h = _Recurrence.apply(h0.to(dtype), self.weight, self.bias.to(dtype), recurrence)
        # As of the plain module: under autocast it stays as it is.
        result_dtype = dtype if torch.is_autocast_enabled(h0.device.type) else h0.dtype
        return self.output_layer(h.to(result_dtype)).reshape(*x.shape[:-1], self.out_features)

    def _refuse_same_group(self) -> None:
        """ValueError inside of a DistributedDataParallel that has given these layers to other ranks of the group."""
        # Only the wrapper tells: equal layers on all ranks may be meant.
        wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is None or not any(
            tensor is self.weight and name not in wrapper.parameters_to_ignore
            for name, tensor in wrapper.module.named_parameters()
        ):
            return
        own, theirs = (dist.get_process_group_ranks(over.process_group) for over in (self.group, wrapper))
        shared = sorted({*own} & {*theirs})
        if len(shared) > 1:
            raise ValueError(
                f"DepthParallel: DistributedDataParallel is over ranks {shared}, each of which has other layers, and "
                "has overwritten them with one rank's. Make the module again, and give DistributedDataParallel a "
                "process_group that has one rank of each depth group"
            )

    def _first_state(self, x: Tensor) -> Tensor:
        h0 = self._apply_input_layer(x).reshape(-1, self.width)
        if self.weight.dtype == torch.float64 != h0.dtype:
            raise TypeError(f"DepthParallel: the first state is {h0.dtype}, weight is float64; convert one of them")
        return h0

    def _agree_on_call(self, h0: Tensor | None, error: Exception | None) -> bool:
        """Whether any rank needs a gradient; ValueError on all of them unless they call alike."""
        enabled = torch.is_grad_enabled()
        tensors = (self.weight, self.bias) if h0 is None else (h0, self.weight, self.bias)
        return self.group.agree(
            "the input",
            {
                "the number of samples": -1 if h0 is None else len(h0),
                "the dtype": -1 if h0 is None else _code(h0.dtype),
                "the parameters' dtype": _code(self.weight.dtype),
                "the activation": _code(self.activation),
                "the tolerance": _code(self.tolerance),
                "whether gradients are enabled": enabled,
            },
            h0,
            self.weight.device,
            error,
            enabled and any(tensor.requires_grad for tensor in tensors),
        )

    def _make_recurrence(self, dtype: torch.dtype) -> "_DepthRecurrence":
        device, like = self.weight.device, torch.empty((), dtype=dtype, device=self.weight.device)
        alpha, beta = scale_tensors(self.alpha, self.beta, self.depth, like)
        tolerance = self.tolerance or solver.default_tolerance(dtype, self.depth)
        backend = backends.choose(parallel_depth.SWEEP, device, self.width, dtype.itemsize)
        return _DepthRecurrence(self.group, self.bounds, self.filter, alpha, beta, self.activation, tolerance, backend)

    def full_state_dict(self, rank0_only: bool = False) -> "OrderedDict[str, Tensor]":
        """The plain module's state dict, same keys and values, on the CPU; every rank has to call this.

        Args:
            rank0_only: give it on rank 0 alone, and an empty one elsewhere: only one process holds all layers then.

        Raises:
            RuntimeError: a rank stopped answering.
        """
        keeps = self.group.rank == 0 or not rank0_only
        full = OrderedDict()
        for key, tensor in self.state_dict().items():
            if key not in _PER_LAYER:
                full[key] = tensor.to("cpu", copy=True)
                continue
            if keeps:
                full[key] = torch.empty((self.depth, *tensor.shape[1:]), dtype=tensor.dtype, device="cpu")
            for owner, start, stop in self._pieces(tensor):
                if owner == self.group.rank:
                    piece = tensor[start - self.start : stop - self.start].contiguous()
                else:
                    piece = tensor.new_empty((stop - start, *tensor.shape[1:]))
                self.group.broadcast(piece, owner, f"the broadcast of {key} of layers {start}..{stop - 1}")
                if keeps:
                    full[key][start:stop] = piece
        return full if keeps else OrderedDict()

    def load_full_state_dict(self, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Loads the plain module's state dict; every rank has to call this.

        Args:
            state_dict: on rank 0, on any device. Other ranks' is not read and may be None.

        Everything is checked before the first number is written.

        Raises:
            RuntimeError: on every rank alike: missing or unexpected keys, wrong shapes, a filter that is not
                orthogonal. Or a rank stopped answering.
        """
        is_first = self.group.rank == 0
        problems = self.group.broadcast_object(
            self._problems_of_full(state_dict) if is_first else None, "the broadcast of what a state dict lacks"
        )
        if problems:
            raise RuntimeError("DepthParallel: rank 0's state dict does not fit:\n    " + "\n    ".join(problems))
        local = self.state_dict()
        for key, tensor in local.items():
            if key not in _PER_LAYER:
                local[key] = torch.empty_like(tensor)
                if is_first:
                    local[key].copy_(state_dict[key])
                self.group.broadcast(local[key], 0, f"the broadcast of {key}")
                continue
            for owner, start, stop in self._pieces(tensor):
                piece = tensor.new_empty((stop - start, *tensor.shape[1:]))
                if is_first:
                    piece.copy_(state_dict[key][start:stop])
                self.group.broadcast(piece, 0, f"the broadcast of {key} of layers {start}..{stop - 1}")
                if owner == self.group.rank:
                    tensor[start - self.start : stop - self.start] = piece
        self.load_state_dict(local)

    def _problems_of_full(self, state_dict: Mapping[str, Tensor] | None) -> list[str]:
        if not isinstance(state_dict, Mapping):
            return [f"it is {type(state_dict).__name__}, expected a mapping of names to tensors"]
        expected = {
            key: (self.depth, *tensor.shape[1:]) if key in _PER_LAYER else tuple(tensor.shape)
            for key, tensor in self.state_dict().items()
        }
        problems = [f"{key} is missing" for key in expected if key not in state_dict]
        problems += [f"{key} is unexpected" for key in state_dict if key not in expected]
        for key, shape in expected.items():
            if key not in state_dict:
                continue
            tensor = state_dict[key]
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                problems.append(f"{key} is {type(tensor).__name__}, expected a tensor with values")
            elif tensor.shape != shape:
                problems.append(f"{key} has shape {tuple(tensor.shape)}, expected {shape}")
            elif key == "filter" and (problem := self._problem_of(tensor, key)) is not None:
                problems.append(problem)
        return problems

    def _pieces(self, tensor: Tensor) -> Iterator[tuple[int, int, int]]:
        """(owner, start, stop) of consecutive layers that travel together."""
        at_once = max(1, _PIECE_BYTES // max(tensor[0].nbytes, 1))
        for owner, (first, end) in enumerate(pairwise(self.bounds)):
            for start in range(first, end, at_once):
                yield owner, start, min(start + at_once, end)

    def extra_repr(self) -> str:
        layers = f"layers {self.start}..{self.stop - 1} of {self.depth}"
        return f"width={self.width}, {layers}, rank {self.group.rank} of {self.group.size}, {self._scales_repr()}"


# ---- The process group -----------------------------------------------------------------------------------------------


class _Group:
    """The collectives, each of which says what it was for when it fails."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "DepthParallel: there is no process group; call torch.distributed.init_process_group first, or use the "
                "plain lcw_ops.nn.OrthogonalFilterMLP in one process"
            )
        self.process_group = dist.group.WORLD if process_group is None else process_group
        self.rank = dist.get_rank(self.process_group)
        self.size = dist.get_world_size(self.process_group)
        if self.rank < 0:
            raise ValueError("DepthParallel: this process is no member of the process group; make it on members only")

    def __deepcopy__(self, memo) -> "_Group":
        """A copied module is one of the same ranks."""
        return self

    def __reduce__(self):
        raise TypeError(
            "DepthParallel: the module belongs to a process group and cannot be pickled; save its full_state_dict(), "
            "or every rank's state_dict()"
        )

    @contextmanager
    def _answered(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"DepthParallel: {what} failed on rank {self.rank} of {self.size}: a rank of the process group stopped "
                "answering. It ended, raised an error of its own, or did not make the same call. The group is of no "
                "more use: end its processes and start them again from a checkpoint"
            ) from error

    def check_alike(self, mlp: OrthogonalFilterMLP) -> None:
        """ValueError or TypeError on every rank alike unless all of them have the same kind of module."""
        problem = _problem_of_module(mlp, self.size)
        described = [None] * self.size
        with self._answered("the all-gather of the modules' sizes at construction"):
            dist.all_gather_object(
                described, problem if problem is not None else _describe(mlp), group=self.process_group
            )
        for rank, theirs in enumerate(described):
            if isinstance(theirs, Exception):
                raise theirs if rank == self.rank else type(theirs)(f"{theirs} (on rank {rank})")
        for rank, theirs in enumerate(described):
            for name in {**described[0], **theirs}:
                expected, value = described[0].get(name), theirs.get(name)
                if value != expected:
                    raise ValueError(
                        f"DepthParallel: {name} of the module is {value} on rank {rank} and {expected} on rank 0; make "
                        "it with the same arguments on every rank"
                    )

    def agree(
        self,
        what: str,
        facts: dict[str, float],
        sample: Tensor | None,
        device: torch.device,
        error: Exception | None = None,
        wants: bool = False,
    ) -> bool:
        """Whether any rank ``wants``; an error on all of them where one has it or they differ in facts or numbers."""
        failed = self.rank + 1 if error is not None else 0
        told = torch.tensor([failed, wants, *facts.values()], dtype=torch.float64, device=device)
        sketch = told.new_zeros(3) if sample is None else _sketch(sample)
        told = torch.cat((told, sketch))
        told = torch.cat((told, -told))
        with self._answered(f"the agreement on {what}"):
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self.process_group)
            most, least = (half.tolist() for half in told.chunk(2))
        if error is not None:
            raise error
        if most[0]:
            raise ValueError(
                f"DepthParallel: rank {int(most[0]) - 1} refused {what}, see its error; so do all ranks of the group"
            )
        least = [-value for value in least]
        for name, high, low in zip(facts, most[2:], least[2:], strict=False):
            if high != low:
                raise ValueError(f"DepthParallel: {what}: ranks differ in {name}; every rank has to make the same call")
        # The norm is compared relative to itself, the others' size is about 1.
        *apart, norms_apart = (high - low for high, low in zip(most[-3:], least[-3:], strict=True))
        has_16_bits = sample is not None and sample.itemsize == 2
        tolerance = _SKETCH_TOLERANCE_OF_16_BITS if has_16_bits else _SKETCH_TOLERANCE
        if max(apart) > tolerance or norms_apart > tolerance * most[-1]:
            raise ValueError(
                f"DepthParallel: {what}: the numbers differ between ranks; every rank has to pass the same samples and "
                "compute the same loss (parts of a batch are for data parallelism, over another group)"
            )
        return bool(most[1])

    def gather(self, own: Tensor, what: str) -> Tensor:
        """(ranks, M, N) of every rank's (M, N)."""
        gathered = own.new_empty((self.size, *own.shape))
        if own.numel():
            with self._answered(what):
                dist.all_gather(list(gathered.unbind()), own.contiguous(), group=self.process_group)
        return gathered

    def largest(self, change: Tensor, what: str) -> Tensor:
        """The largest of all ranks, on the host; infinity stands for NaN, which a maximum may lose."""
        change = change.nan_to_num(nan=math.inf, posinf=math.inf)
        with self._answered(what):
            dist.all_reduce(change, dist.ReduceOp.MAX, group=self.process_group)
            return change.cpu()

    def broadcast(self, tensor: Tensor, source: int, what: str) -> None:
        """In place, from the rank ``source`` of this group."""
        if tensor.numel():
            with self._answered(what):
                dist.broadcast(tensor, group=self.process_group, group_src=source)

    def broadcast_object(self, value, what: str):
        """Rank 0's."""
        values = [value]
        with self._answered(what):
            dist.broadcast_object_list(values, group=self.process_group, group_src=0)
        return values[0]


def _problem_of_module(mlp, ranks: int) -> Exception | None:
    if not isinstance(mlp, OrthogonalFilterMLP):
        return TypeError(f"DepthParallel: mlp is {type(mlp).__name__}, expected lcw_ops.nn.OrthogonalFilterMLP")
    if mlp.depth < ranks:
        return ValueError(
            f"DepthParallel: {ranks} ranks for {mlp.depth} layers; every rank needs one: make a group of at most "
            f"{mlp.depth} ranks"
        )
    if mlp.filter.dim() == 3:
        return ValueError(
            f"DepthParallel: filter has shape {tuple(mlp.filter.shape)}, one per layer; sweeps need one filter that "
            "all layers share"
        )
    for name in ("alpha", "beta"):
        scale = getattr(mlp, name)
        if isinstance(scale, Tensor) and scale.requires_grad:
            return ValueError(
                f"DepthParallel: {name} requires a gradient, which is not computed over ranks; call "
                f"mlp.{name}.requires_grad_(False), or train it in the plain module"
            )
    if mlp.window is not None:
        return ValueError(
            f"DepthParallel: window is {mlp.window}, but a sweep is over all layers of all ranks; leave it None"
        )
    return None


def _describe(mlp: OrthogonalFilterMLP) -> dict[str, object]:
    """What has to be the same on every rank, as plain values."""

    def describe(value):
        return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value

    names = ("in_features", "width", "depth", "out_features", "activation", "tolerance", "alpha", "beta")
    values = {name: getattr(mlp, name) for name in names} | mlp.state_dict()
    return {name: describe(value) for name, value in values.items()}


def _code(value: object) -> int:
    """A number by which ranks compare what is none."""
    return zlib.crc32(repr(value).encode())


def _sketch(sample: Tensor) -> Tensor:
    """Two numbers of size about 1 and the norm, which hardly two samples (M, N) share; 0 where it is not finite."""
    numbers = sample.detach().double()
    phases = [torch.arange(size, dtype=torch.float64, device=sample.device) for size in numbers.shape]
    rows, units = (torch.stack((phase.cos(), phase.sin())) for phase in phases)
    inner, norm = ((rows @ numbers) * units).sum(1), numbers.norm().reshape(1)
    return torch.cat((inner / norm, norm)).nan_to_num(0.0, 0.0, 0.0)


# ---- The recurrence --------------------------------------------------------------------------------------------------


class _Basis(NamedTuple):
    """Where scans run: in the filter's frame, in which it rotates pairs of units, or with the filter as it is.

    Ranks may have found different frames, or none: the order and signs of eigenvectors depend on the CPU and on its
    number of threads. So what ranks exchange is in the plain basis.
    """

    kernels: parallel_depth.Kernels
    filter: Tensor
    frame: Frame | None

    @classmethod
    def find(cls, filter: Tensor, backend: str) -> "_Basis":
        kernels = parallel_depth.get_kernels(backend)
        if reference.is_permutation(filter):
            return cls(kernels, filter, None)
        frame = get_frame(filter)
        if frame is None:
            return cls(parallel_depth.get_kernels("reference"), filter, None)
        return cls(kernels, frame.rotation, frame)

    def scan(self, states: Tensor, source: Tensor | None, alpha: Tensor) -> Tensor:
        # The plain scan multiplies by a matrix.
        with full_float32(states.device):
            one = alpha.new_ones(1)
            return self.kernels.sweep_(states, source, None, None, self.filter, alpha, one, "identity")

    def scan_adjoint(
        self,
        gradients: Tensor,
        source: Tensor | None,
        transposed: Tensor,
        alpha: Tensor,
        slope: Tensor | None = None,
        scaled: Tensor | None = None,
    ) -> Tensor:
        with full_float32(gradients.device):
            return self.kernels.adjoint_sweep_(gradients, source, None, transposed, alpha, slope, scaled)

    def enter(self, states: Tensor, out: Tensor) -> Tensor:
        """States (..., N) in this basis; ``out`` is for them where they are not these."""
        return states if self.frame is None else _multiplied(states, self.frame.inverse.mT, out)

    def leave(self, states: Tensor, out: Tensor) -> Tensor:
        return states if self.frame is None else _multiplied(states, self.frame.basis.mT, out)

    def enter_adjoint(self, gradients: Tensor, out: Tensor) -> Tensor:
        return gradients if self.frame is None else _multiplied(gradients, self.frame.basis, out)

    def leave_adjoint(self, gradients: Tensor, out: Tensor) -> Tensor:
        return gradients if self.frame is None else _multiplied(gradients, self.frame.inverse, out)

    # The same for what goes into the chain of ranges and comes out of it, (..., M, N), in float64.

    def enter_chain(self, state: Tensor) -> Tensor:
        return state.double() if self.frame is None else state.double() @ self.frame.exact_inverse.mT

    def leave_chain(self, state: Tensor) -> Tensor:
        return state if self.frame is None else state.double() @ self.frame.exact_basis.mT

    def enter_chain_adjoint(self, gradient: Tensor) -> Tensor:
        return gradient.double() if self.frame is None else gradient.double() @ self.frame.exact_basis

    def leave_chain_adjoint(self, gradient: Tensor) -> Tensor:
        return gradient if self.frame is None else gradient.double() @ self.frame.exact_inverse


def _multiplied(rows: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    solver.multiply_exactly(rows, matrix, out)
    return out


class _Carry:
    """The linear part across whole ranges, in float64: x <- alpha^D O^D x + what the range adds."""

    def __init__(self, powers: list[Tensor], decays: list[Tensor]) -> None:
        self.powers, self.decays = powers, decays

    @classmethod
    def over(cls, bounds: list[int], filter: Tensor, alpha: Tensor) -> "_Carry":
        lengths = [stop - start for start, stop in pairwise(bounds)]
        powers = {length: reference.filter_power(filter, length) for length in set(lengths)}
        every = alpha.double().expand(bounds[-1])
        decays = [every[start:stop].prod() for start, stop in pairwise(bounds)]
        return cls([powers[length] for length in lengths], decays)

    def adjoint(self) -> "_Carry":
        """The ranges from the last one to the first."""
        return _Carry([reference.transpose_filter(power) for power in self.powers[::-1]], self.decays[::-1])

    def run(self, first: Tensor, added: Tensor | None = None) -> list[Tensor]:
        """The states between ranges: ``first`` comes first, what leaves the last range is the last."""
        between = [first]
        for number, (power, decay) in enumerate(zip(self.powers, self.decays, strict=True)):
            state = decay * reference.apply_filter(between[-1], power)
            between.append(state if added is None else state + added[number])
        return between


class _Sweeps(solver.Windows):
    """The stopping rule, for one window of all layers."""

    def __init__(self, direction: str, tolerance: float, layers: int) -> None:
        super().__init__(None, tolerance, layers, layers)
        self.direction = direction


class _DepthRecurrence:
    """One forward pass of all ranks, and its backward pass."""

    def __init__(
        self,
        group: _Group,
        bounds: list[int],
        filter: Tensor,
        alpha: Tensor,
        beta: Tensor,
        activation: str,
        tolerance: float,
        backend: str,
    ) -> None:
        self.group, self.bounds, self.filter, self.alpha, self.beta = group, bounds, filter, alpha, beta
        self.activation, self.tolerance, self.backend = activation, tolerance, backend
        self.depth = bounds[-1]
        self.start, self.stop = bounds[group.rank : group.rank + 2]
        self.basis = _Basis.find(filter, backend)
        self.carry = _Carry.over(bounds, self.basis.filter, alpha)
        self.is_sequential = False

    def _own_layers(self, weight: Tensor, bias: Tensor) -> solver.Layers:
        alpha, beta = (
            scale if scale.numel() == 1 else scale[self.start : self.stop] for scale in (self.alpha, self.beta)
        )
        return solver.Layers(weight, bias.contiguous(), alpha, beta, None, self.activation, self.start)

    def run_forward(self, h0: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """h_L, the same on every rank, and the states of this rank's layers, (D + 1, M, N)."""
        layers = self._own_layers(weight, bias)
        found = self._sweep_forward(h0.contiguous(), layers.to_dtype(h0.dtype))
        if found is None:
            found = self._run_in_order(h0, layers)
            self._warn("forward")
        return found

    def _sweep_forward(self, h0: Tensor, layers: solver.Layers) -> tuple[Tensor, Tensor] | None:
        basis, kernels, rank = self.basis, self.basis.kernels, self.group.rank
        states = h0.new_empty((self.stop - self.start + 1, *h0.shape))
        work, other = torch.empty_like(states), torch.empty_like(states)
        product = work[1:]
        # In a frame the source is a copy, and the product's memory is free for the scan from zero.
        inside, from_zero = (states, other) if basis.frame is None else (torch.empty_like(states), work)
        first = basis.enter_chain(h0)
        between = self.carry.run(first)

        def scan(source: Tensor | None) -> Tensor:
            inside[0] = between[rank]
            change = basis.scan(inside, source, layers.alpha)
            basis.leave(inside, states)
            return change

        scan(None)
        sweeps = _Sweeps("forward", self.tolerance, self.depth)
        count = 0

        def sweep() -> Tensor:
            nonlocal between, count
            count += 1
            layers.multiply(states[:-1], product)
            kernels.activate_(product, layers.bias, None, layers.beta, layers.activation, False)
            source = basis.enter(product, other[1:])
            from_zero[0] = 0
            basis.scan(from_zero, source, layers.alpha)
            own = basis.leave_chain(from_zero[-1]).to(h0.dtype)
            added = self.group.gather(own, f"the all-gather of the states between ranks in sweep {count}")
            between = self.carry.run(first, basis.enter_chain(added))
            return self.group.largest(scan(source), f"the all-reduce of the residual of sweep {count}")

        if not sweeps.converge(0, self.depth, h0.dtype, sweep):
            return None
        return basis.leave_chain(between[-1]).to(h0.dtype), states

    def run_backward(
        self, gradient: Tensor, states: Tensor, weight: Tensor, bias: Tensor, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradients of h_0, the same on every rank, and of this rank's weight and bias."""
        self.group.agree("the output's gradient", {}, gradient, gradient.device)
        layers, gradient = self._own_layers(weight, bias), gradient.contiguous()
        into = solver.Gradients(
            torch.zeros_like(weight) if needs_weight else None,
            torch.zeros_like(layers.bias) if needs_bias else None,
            *(None,) * 3,
        )
        found = None
        # Where the states did not converge the gradients would not either.
        may_converge = not self.is_sequential
        if may_converge:
            found = self._sweep_backward(gradient, states, layers.to_dtype(states.dtype), into)
        if found is None:
            found = self._run_back_in_order(gradient, states[0], layers, into)
            if may_converge:
                self._warn("backward")
        return found, into.weight, into.bias

    def _sweep_backward(
        self, gradient: Tensor, states: Tensor, layers: solver.Layers, into: solver.Gradients
    ) -> Tensor | None:
        basis, kernels = self.basis, self.basis.kernels
        transposed = reference.transpose_filter(basis.filter).contiguous()
        carry, place = self.carry.adjoint(), self.group.size - 1 - self.group.rank
        slope, grad_pre = torch.empty_like(states[1:]), torch.empty_like(states[1:])
        layers.multiply(states[:-1], slope)
        kernels.activate_(slope, layers.bias, None, layers.beta, layers.activation, True)
        adjoint, work, other = (torch.empty_like(states) for _ in range(3))
        product = work[1:]
        inside, from_zero = (adjoint, other) if basis.frame is None else (torch.empty_like(adjoint), work)
        last = basis.enter_chain_adjoint(gradient)
        between = carry.run(last)

        def scan(source: Tensor | None) -> Tensor:
            inside[-1] = between[place]
            if basis.frame is None:
                return basis.scan_adjoint(inside, source, transposed, layers.alpha, slope, grad_pre)
            change = basis.scan_adjoint(inside, source, transposed, layers.alpha)
            basis.leave_adjoint(inside, adjoint)
            torch.mul(slope, adjoint[1:], out=grad_pre)
            return change

        scan(None)
        sweeps = _Sweeps("backward", self.tolerance, self.depth)
        count = 0

        def sweep() -> Tensor:
            nonlocal between, count
            count += 1
            layers.multiply_transposed(grad_pre, product)
            source = basis.enter_adjoint(product, other[1:])
            from_zero[-1] = 0
            basis.scan_adjoint(from_zero, source, transposed, layers.alpha)
            own = basis.leave_chain_adjoint(from_zero[0]).to(states.dtype)
            added = self.group.gather(own, f"the all-gather of the gradients between ranks in adjoint sweep {count}")
            between = carry.run(last, basis.enter_chain_adjoint(added).flip(0))
            return self.group.largest(scan(source), f"the all-reduce of the residual of adjoint sweep {count}")

        if not sweeps.converge(0, self.depth, states.dtype, sweep):
            return None
        if into.weight is not None:
            into.weight.copy_(torch.bmm(grad_pre.mT, states[:-1]))
        if into.bias is not None:
            torch.sum(grad_pre, 1, out=into.bias)
        return basis.leave_chain_adjoint(between[-1]).to(gradient.dtype)

    def _warn(self, direction: str) -> None:
        """One warning, of a pass that has come to its end: where it is an error, it is one on all ranks."""
        self.is_sequential = True
        error = None
        if self.group.rank == 0:
            try:
                # In the same words every time: Python shows it once.
                warnings.warn(
                    f"DepthParallel: sweeps over {self.depth} layers did not converge ({direction}); the ranks went on "
                    "one after the other, and the result is right, but late. A smaller beta converges faster",
                    RuntimeWarning,
                    stacklevel=2,
                )
            except RuntimeWarning as raised:
                error = raised
        self.group.agree("sweeps that do not converge", {}, None, self.alpha.device, error)

    def _run_in_order(self, h0: Tensor, layers: solver.Layers) -> tuple[Tensor, Tensor]:
        run = parallel_depth.sequential_forward(self.backend, self.filter)
        states = h0

        def run_own(state: Tensor) -> Tensor:
            nonlocal states
            states = run(state, layers, self.stop - self.start)
            _Sweeps("forward", self.tolerance, self.depth).record_sequential(self.start, self.stop - self.start)
            return states[-1].clone()

        last = self._pass_on(h0, range(self.group.size), run_own, "state")
        return last, states

    def _run_back_in_order(
        self, gradient: Tensor, first: Tensor, layers: solver.Layers, into: solver.Gradients
    ) -> Tensor:
        run = parallel_depth.sequential_backward(self.backend, self.filter)

        def run_own(gradient: Tensor) -> Tensor:
            _Sweeps("backward", self.tolerance, self.depth).record_sequential(self.start, self.stop - self.start)
            return run(gradient, first, layers, None, into, self.stop - self.start).contiguous()

        return self._pass_on(gradient, range(self.group.size - 1, -1, -1), run_own, "gradient")

    def _pass_on(self, value: Tensor, order: Iterable[int], run_own: Callable[[Tensor], Tensor], name: str) -> Tensor:
        """What leaves the last of the ranks, on all of them."""
        for rank in order:
            value = run_own(value) if rank == self.group.rank else torch.empty_like(value)
            self.group.broadcast(value, rank, f"the broadcast of the {name} that leaves rank {rank}")
        return value


class _Recurrence(Function):
    """(h0, weight, bias, recurrence) -> h_L."""

    @staticmethod
    def forward(ctx, h0, weight, bias, recurrence):
        with torch.autocast(h0.device.type, enabled=False):
            last, states = recurrence.run_forward(h0, weight, bias)
        ctx.save_for_backward(states, weight, bias)
        ctx.recurrence = recurrence
        return last

    @staticmethod
    def backward(ctx, gradient):
        needs = ctx.needs_input_grad[1:3]
        return *_Gradients.apply(gradient, *ctx.saved_tensors, ctx.recurrence, *needs), None


class _Gradients(Function):
    """The gradients, which cannot be differentiated again."""

    @staticmethod
    def forward(ctx, gradient, states, weight, bias, recurrence, needs_weight, needs_bias):
        with torch.autocast(gradient.device.type, enabled=False):
            return recurrence.run_backward(gradient, states, weight, bias, needs_weight, needs_bias)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "DepthParallel: derivatives of second order are not computed over ranks; use the plain "
            "lcw_ops.nn.OrthogonalFilterMLP in one process"
        )
