"""The process group: its collectives, and the agreement of all ranks on a call."""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lcw_ops._checks import describe
from lcw_ops.nn.orthogonal_filter import OrthogonalFilterMLP

_OWNER = "DepthParallel"

# The largest difference that is allowed between the ranks' sketches of one tensor (see _sketch). Rounding causes
# smaller differences. Different samples cause differences of about 1.
_SKETCH_TOLERANCE = 1e-3
_SKETCH_TOLERANCE_OF_16_BITS = 1e-2


class Group:
    """The collectives. If one fails, its error says what the call was for."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            remedy = (
                "Call torch.distributed.init_process_group first, or use the plain lcw_ops.nn.OrthogonalFilterMLP in "
                "one process."
            )
            raise ValueError(describe(_OWNER, "process_group", "is missing", "an initialised process group", remedy))
        self.process_group = dist.group.WORLD if process_group is None else process_group
        self.rank = dist.get_rank(self.process_group)
        self.size = dist.get_world_size(self.process_group)
        if self.rank < 0:
            came, expected = "does not contain this process", "a group of which it is a member"
            raise ValueError(describe(_OWNER, "process_group", came, expected, "Make the module on members only."))

    def __deepcopy__(self, memo) -> "Group":
        """Return self: a copied module uses the same process group, which cannot be copied."""
        return self

    def __reduce__(self):
        came, expected = "belongs to a process group and cannot be pickled", "a state dict"
        remedy = "Save its full_state_dict(), or every rank's state_dict()."
        raise TypeError(describe(_OWNER, "the module", came, expected, remedy))

    @contextmanager
    def _answered(self, what: str) -> Iterator[None]:
        """Replace the RuntimeError of a collective that fails by one that names the call and the rank."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"DepthParallel: {what} failed on rank {self.rank} of {self.size}: a rank of the process group stopped "
                "answering. It ended, raised its own error, or did not make the same call. The group cannot be "
                "used any more: end its processes and start them again from a checkpoint."
            ) from error

    def check_alike(self, mlp: OrthogonalFilterMLP) -> None:
        """Raise ValueError or TypeError on every rank unless all ranks have modules of the same sizes and settings."""
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
                    came, right = f"is {value} on rank {rank}", f"{expected}, as on rank 0"
                    remedy = "Make it with the same arguments on every rank."
                    raise ValueError(describe(_OWNER, f"{name} of the module", came, right, remedy))

    def agree(
        self,
        what: str,
        facts: dict[str, float],
        sample: Tensor | None,
        device: torch.device,
        error: Exception | None = None,
        wants: bool = False,
    ) -> bool:
        """Return whether ``wants`` is true on any rank; in a forward pass, whether the rank needs a gradient.

        All ranks raise if one has an ``error``, or if they differ in ``facts`` or in the numbers of ``sample``.
        """
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
                f"DepthParallel: rank {int(most[0]) - 1} refused {what}, so all ranks of the group raise. "
                "See that rank's error."
            )
        least = [-value for value in least]
        for name, high, low in zip(facts, most[2:], least[2:], strict=False):
            if high != low:
                came, expected = f"comes from ranks that differ in {name}", "the same call on every rank"
                raise ValueError(describe(_OWNER, what, came, expected))
        # The tolerance of the norm is relative to the largest norm. The other two numbers are about 1 and have
        # an absolute tolerance.
        *apart, norms_apart = (high - low for high, low in zip(most[-3:], least[-3:], strict=True))
        has_16_bits = sample is not None and sample.itemsize == 2
        tolerance = _SKETCH_TOLERANCE_OF_16_BITS if has_16_bits else _SKETCH_TOLERANCE
        if max(apart) > tolerance or norms_apart > tolerance * most[-1]:
            came, expected = "has numbers that differ between ranks", "the same samples and the same loss on every rank"
            remedy = "To split a batch between ranks, use data parallelism over another process group."
            raise ValueError(describe(_OWNER, what, came, expected, remedy))
        return bool(most[1])

    def gather(self, own: Tensor, what: str) -> Tensor:
        """Gather ``own``, (samples, units), from every rank into one tensor (ranks, samples, units)."""
        gathered = own.new_empty((self.size, *own.shape))
        if own.numel():
            with self._answered(what):
                dist.all_gather(list(gathered.unbind()), own.contiguous(), group=self.process_group)
        return gathered

    def largest(self, change: Tensor, what: str) -> Tensor:
        """The largest of all ranks' values, on the host. NaN, which a maximum may lose, counts as infinity."""
        change = change.nan_to_num(nan=math.inf, posinf=math.inf)
        with self._answered(what):
            dist.all_reduce(change, dist.ReduceOp.MAX, group=self.process_group)
            return change.cpu()

    def broadcast(self, tensor: Tensor, source: int, what: str) -> None:
        """Overwrite the tensor with that of rank ``source`` of this group."""
        if tensor.numel():
            # gloo sends the memory, and strides may differ between ranks.
            sent = tensor.contiguous()
            with self._answered(what):
                dist.broadcast(sent, group=self.process_group, group_src=source)
            # The source's own tensor stays untouched: autograd may have saved it.
            if sent is not tensor and self.rank != source:
                tensor.copy_(sent)

    def broadcast_object(self, value, what: str):
        """Return rank 0's value on every rank."""
        values = [value]
        with self._answered(what):
            dist.broadcast_object_list(values, group=self.process_group, group_src=0)
        return values[0]


def _problem_of_module(mlp, ranks: int) -> Exception | None:
    if not isinstance(mlp, OrthogonalFilterMLP):
        came, expected = f"is a {type(mlp).__name__}", "lcw_ops.nn.OrthogonalFilterMLP"
        return TypeError(describe(_OWNER, "mlp", came, expected))
    if mlp.depth < ranks:
        came, expected = f"has {ranks} ranks for {mlp.depth} layers", "a layer for every rank"
        remedy = f"Make a group of at most {mlp.depth} ranks."
        return ValueError(describe(_OWNER, "process_group", came, expected, remedy))
    if mlp.filter.dim() == 3:
        came, expected = f"has shape {tuple(mlp.filter.shape)}, one per layer", "one filter that all layers share"
        return ValueError(describe(_OWNER, "filter", came, expected))
    for name in ("alpha", "beta"):
        scale = getattr(mlp, name)
        if isinstance(scale, Tensor) and scale.requires_grad:
            came, expected = "requires a gradient, which is not computed over ranks", f"a fixed {name}"
            remedy = f"Call mlp.{name}.requires_grad_(False), or train it in the plain module."
            return ValueError(describe(_OWNER, name, came, expected, remedy))
    if mlp.window is not None:
        came, expected = f"is {mlp.window}", "None, because a sweep is over all layers of all ranks"
        return ValueError(describe(_OWNER, "window", came, expected))
    return None


def _describe(mlp: OrthogonalFilterMLP) -> dict[str, object]:
    """The properties that have to be the same on every rank, as plain values."""

    def describe(value):
        return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value

    names = ("in_features", "width", "depth", "out_features", "activation", "tolerance", "alpha", "beta")
    values = {name: getattr(mlp, name) for name in names} | mlp.state_dict()
    return {name: describe(value) for name, value in values.items()}


def code(value: object) -> int:
    """A number by which ranks compare a value that is not a number."""
    return zlib.crc32(repr(value).encode())


def _sketch(sample: Tensor) -> Tensor:
    """Three numbers by which ranks compare samples (M, N): two weighted sums divided by the norm, and the norm.

    The weights are cosines and sines, so the first two numbers are about 1. Different samples rarely have the same
    three. A number that is not finite is set to 0.
    """
    numbers = sample.detach().double()
    phases = [torch.arange(size, dtype=torch.float64, device=sample.device) for size in numbers.shape]
    rows, units = (torch.stack((phase.cos(), phase.sin())) for phase in phases)
    inner, norm = ((rows @ numbers) * units).sum(1), numbers.norm().reshape(1)
    return torch.cat((inner / norm, norm)).nan_to_num(0.0, 0.0, 0.0)
