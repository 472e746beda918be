"""The module: an MLP whose layers are spread over the ranks of a process group, and its state dict."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lcw_ops._checks import describe
from lcw_ops.distributed.group import Group, code
from lcw_ops.distributed.recurrence import DepthRecurrence, DepthRecurrenceFunction
from lcw_ops.nn.orthogonal_filter import OrthogonalFilterMLP, _OrthogonalFilter
from lcw_ops.ops import backends
from lcw_ops.ops.parallel_depth import op as parallel_depth
from lcw_ops.ops.parallel_depth import solver
from lcw_ops.reference.orthogonal_filter import scale_tensors, state_dtype

# The state dict's entries that are split over the ranks.
_PER_LAYER = ("weight", "bias")

# A checkpoint travels in pieces, so that no device has to hold more than its range and one piece.
_PIECE_BYTES = 64 * 2**20


class DepthParallel(_OrthogonalFilter):
    """An :class:`lcw_ops.nn.OrthogonalFilterMLP` over a process group: every rank owns a contiguous range of layers.

    Every rank passes the same x, gets the same y and computes the same loss. A sweep costs one all-gather of a state
    (samples, width) per rank and one all-reduce of a number. A pass costs one more all-reduce of a few numbers, by
    which ranks find out whether they make the same call. There is no pipeline to fill, and there are no micro-batches.
    The results are those of one process up to rounding. See docs/parallel_depth.md.

    Shapes:
        input (*, in_features) -> output (*, out_features), as in the plain module.

    Args:
        mlp: the plain module, with the same arguments on every rank. It is left as it is. A rank copies its range of
            layers from its own ``mlp``; everything else comes from rank 0's. The sweeps use ``mlp.tolerance``, whatever
            ``mlp.solver`` is; ``mlp.segment`` is ignored.
        process_group: gloo or nccl; default: the default group.

    Attributes:
        weight, bias: (D, width, width) and (D, width), the D layers of this rank; ranges differ by at most one layer.
        start, stop: this rank's layers are start..stop - 1 of the plain module's.
        input_layer, output_layer: ``nn.Linear``, the same on every rank. They stay equal without communication, because
            their gradients are equal: use one kind of machine and one number of threads, or rounding drives them apart.

    All ranks give up together if the sweeps do not converge. Then the layers run in order, rank by rank, and rank 0
    issues one RuntimeWarning after the pass. If the user has made the warning an error, all ranks raise. Memory: all
    states of a rank's range, (D + 1, samples, width), are kept for backward.

    Training:
        Use any torch optimizer on ``parameters()`` whose step does not depend on other layers' gradients. To clip by
        the norm, use the group's norm: all-reduce the sum of the squares of ``weight.grad`` and ``bias.grad``, and add
        that of the other gradients. A gradient scaler must skip a step on all ranks or none, as
        ``torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler`` does.
        ``state_dict()`` is this rank's part. :meth:`full_state_dict` and :meth:`load_full_state_dict` give and take
        the plain module's. The module itself cannot be pickled. It has no ``reset_parameters``: after ``to_empty`` call
        :meth:`load_full_state_dict`.
        Data parallelism: ``DistributedDataParallel(depth_parallel, process_group=other)``, where ``other`` has the
        ranks with the same range of layers, one of each depth group. If ``other`` has two ranks of this group, as the
        default group has, DistributedDataParallel overwrites one rank's layers with the other's when it is made, and
        its first call raises.

    Raises:
        ValueError: at construction: no process group, more ranks than layers, modules that differ between ranks, one
            filter per layer, alpha or beta that require a gradient, a window. In a call, on every rank: a shape, dtype,
            gradient mode, activation, tolerance or input values that differ from the other ranks', anything that the
            plain module refuses, and data parallelism over ranks of this group. The first state and the output's
            gradient are compared by their norm and two projections, so differences below 1e-3 of the whole (1e-2 for
            16-bit tensors) are not noticed.
        TypeError: at construction: another kind of module. In a call: dtypes that do not match. On pickling: always.
        RuntimeError: a rank stopped answering. With gloo the error comes within the group's timeout, and gloo's own is
            its cause; with nccl torch's watchdog ends the process after the timeout instead. Also raised for second
            derivatives, which only the plain module has.

    Source:
        Derived here, see lcw_ops/distributed/recurrence.py and docs/parallel_depth.md.
    """

    def __init__(self, mlp: OrthogonalFilterMLP, process_group: dist.ProcessGroup | None = None) -> None:
        group = Group(process_group)
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
        # The filter was checked when the plain module was made.
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
            # Raise it below, once the other ranks know.
            error = refusal
        needs_gradient = self._agree_on_call(h0, error)
        if needs_gradient and not any(tensor.requires_grad for tensor in (h0, self.weight, self.bias)):
            # Other ranks will run a backward pass, and this rank has to take part in it.
            h0 = h0.detach().requires_grad_()
        h = DepthRecurrenceFunction.apply(h0.to(dtype), self.weight, self.bias.to(dtype), recurrence)
        # As in the plain module, the result keeps the state's dtype under autocast.
        result_dtype = dtype if torch.is_autocast_enabled(h0.device.type) else h0.dtype
        return self.output_layer(h.to(result_dtype)).reshape(*x.shape[:-1], self.out_features)

    def _refuse_same_group(self) -> None:
        """Raise ValueError inside a DistributedDataParallel that has given these layers to other ranks of the group."""
        # Only the wrapper shows the mistake: equal layers on all ranks may be intended.
        wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is None or not any(
            tensor is self.weight and name not in wrapper.parameters_to_ignore
            for name, tensor in wrapper.module.named_parameters()
        ):
            return
        own, theirs = (dist.get_process_group_ranks(over.process_group) for over in (self.group, wrapper))
        shared = sorted({*own} & {*theirs})
        if len(shared) > 1:
            came = f"is over ranks {shared}, which own different layers, and has overwritten them with one rank's"
            remedy = "Make the module again, and give DistributedDataParallel such a process_group."
            expected = "a process_group that has one rank of each depth group"
            raise ValueError(describe("DepthParallel", "DistributedDataParallel", came, expected, remedy))

    def _first_state(self, x: Tensor) -> Tensor:
        h0 = self._apply_input_layer(x).reshape(-1, self.width)
        if self.weight.dtype == torch.float64 != h0.dtype:
            expected = "torch.float64, as weight is"
            remedy = "Convert one of them."
            raise TypeError(describe("DepthParallel", "the first state", f"is {h0.dtype}", expected, remedy))
        return h0

    def _agree_on_call(self, h0: Tensor | None, error: Exception | None) -> bool:
        """Whether any rank needs a gradient. Raises ValueError on all ranks unless they make the same call."""
        enabled = torch.is_grad_enabled()
        tensors = (self.weight, self.bias) if h0 is None else (h0, self.weight, self.bias)
        return self.group.agree(
            "the input",
            {
                "the number of samples": -1 if h0 is None else len(h0),
                "the dtype": -1 if h0 is None else code(h0.dtype),
                "the parameters' dtype": code(self.weight.dtype),
                "the activation": code(self.activation),
                "the tolerance": code(self.tolerance),
                "whether gradients are enabled": enabled,
            },
            h0,
            self.weight.device,
            error,
            enabled and any(tensor.requires_grad for tensor in tensors),
        )

    def _make_recurrence(self, dtype: torch.dtype) -> DepthRecurrence:
        device, like = self.weight.device, torch.empty((), dtype=dtype, device=self.weight.device)
        alpha, beta = scale_tensors(self.alpha, self.beta, self.depth, like)
        tolerance = self.tolerance or solver.default_tolerance(dtype, self.depth)
        backend = backends.choose(parallel_depth.SWEEP, device, self.width, dtype.itemsize)
        return DepthRecurrence(self.group, self.bounds, self.filter, alpha, beta, self.activation, tolerance, backend)

    def full_state_dict(self, rank0_only: bool = False) -> "OrderedDict[str, Tensor]":
        """Return the plain module's state dict, with the same keys and values, on the CPU. Every rank has to call this.

        Args:
            rank0_only: return it on rank 0 alone, and an empty one elsewhere. Only one process then holds all layers.

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
                    piece = tensor[start - self.start : stop - self.start]
                else:
                    piece = tensor.new_empty((stop - start, *tensor.shape[1:]))
                self.group.broadcast(piece, owner, f"the broadcast of {key} of layers {start}..{stop - 1}")
                if keeps:
                    full[key][start:stop] = piece
        return full if keeps else OrderedDict()

    def load_full_state_dict(self, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Load the plain module's state dict. Every rank has to call this.

        Args:
            state_dict: on rank 0, on any device. On the other ranks it is not read and may be None.

        Everything is checked before anything is written.

        Raises:
            RuntimeError: on every rank: missing or unexpected keys, wrong shapes, a filter that is not orthogonal. Or a
                rank stopped answering.
        """
        is_first = self.group.rank == 0
        problems = self.group.broadcast_object(
            self._problems_of_full(state_dict) if is_first else None, "the broadcast of a state dict's problems"
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
            return [f"it is a {type(state_dict).__name__}; expected a mapping of names to tensors"]
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
                problems.append(f"{key} is a {type(tensor).__name__}; expected a tensor with values")
            elif tensor.shape != shape:
                problems.append(f"{key} has shape {tuple(tensor.shape)}; expected {shape}")
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
