"""Figures of many tensors at once, in float64: small tensors of one shape wait and are stacked, large ones are read in
parts that a core's cache holds.

A call of a small operator takes a few microseconds, whatever its size. With one call per figure and tensor, the
statistics of a network of many small layers would take several times as long as the network itself.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lcw_ops import _torch
from lcw_ops.profile.activations import Flat
from lcw_ops.profile.figures import Figure, Table, attempt, failed, norm, whole

# The entries of a block that is read at once: 512 KB in float64. Measured on a Xeon with 2 MB of cache per core:
# from 2^15 to 2^17 the time per entry is the same.
BLOCK = 2**16

# The tensors that wait for others of their shape, and the entries of all that wait.
MOST_WAITING, MOST_ENTRIES = 256, 2**22

CHANGED = "the tensor was changed in place before it was read"


class Statistics:
    """Collects tensors for the rows of a table, and writes their figures there at the latest in :meth:`flush`."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._waiting: dict[Hashable, list[tuple]] = {}
        # The entries of each tensor that waits, by key, and of all of them together.
        self._sizes: dict[Hashable, int] = {}
        self._entries = 0
        # The stacks of the states and activations that wait, and the length of the next stack of each key.
        self._stacks: dict[Hashable, _Stack] = {}
        self._lengths: dict[Hashable, int] = {}
        # The rows whose mean over samples an angle needs, and these means.
        self._wanted: set[int] = set()
        self._means: dict[int, Tensor] = {}
        self._last_waiting: int | None = None

    def add_state(self, row: int, state: Tensor, unit_dim: int | None, flat: Flat | None = None) -> None:
        """state_mean, state_rms and activation_shift of a module's output; without ``unit_dim`` no shift.

        ``flat``: it is the result of an activation function; find dead and saturated too.
        """
        if not _is_plain(state):
            self.table.put("state_rms", row, attempt(_rms, state))
            reason = "the output is not one plain tensor in memory"
            for column in ("state_mean", "activation_shift"):
                self.table.put(column, row, reason)
        elif state.numel() > BLOCK:
            with torch.no_grad():
                self._put_states([row], state.detach().unsqueeze(0), unit_dim, flat)
        else:
            # A copy: the next module may change its input in place.
            self._wait_copied(("state", *_kind(state), unit_dim, flat), row, state)

    def add_flat(self, row: int, values: Tensor, unit_dim: int, flat: Flat) -> None:
        """dead and saturated share of an activation's ``values``, its results or arguments. Rows keep their largest."""
        if not _is_plain(values) or values.is_complex() or values.dim() < 2 or not values.numel():
            return
        if values.numel() > BLOCK:
            with torch.no_grad():
                self._put_flat([row], values.detach().unsqueeze(0), 1 + unit_dim, flat)
        else:
            self._wait_copied(("flat", *_kind(values), unit_dim, flat), row, values)

    def add_gradient(self, row: int, gradient: Tensor) -> None:
        """gradient_norm, over all gradients of a row."""
        if gradient.dtype is torch.float16:
            self.table.put("underflow", row, attempt(_underflow, gradient))
        if not _is_plain(gradient) or gradient.numel() > BLOCK:
            found = attempt(norm, gradient)
            if isinstance(found, str):
                self.table.put("gradient_norm", row, found)
            else:
                self.table.combine("gradient_norm", [row], np.array([found]), np.hypot)
        else:
            # No copy: nothing may change a gradient that somebody else holds. The version tells if it happened.
            self._wait(("gradient", *_kind(gradient)), (row, gradient, gradient._version), gradient.numel())

    def add_angle(self, row: int, weight: Tensor, input: Tensor, source: int | None) -> None:
        """shift_angle of a linear layer: ``weight`` is (N, K), ``input`` (..., K) with one more dimension at least.

        ``source``: the row whose state the input is, with its units last, if that was added last; its mean is used.
        """
        if source is not None and _is_plain(weight):
            self._wanted.add(source)
            self._wait(("angle", *_kind(weight)), (row, weight, source), weight.numel())
            return
        try:
            with torch.no_grad():
                flat = whole(input).flatten(0, -2)
                parts = flat.split(max(1, BLOCK // flat.shape[1]))
                mean = sum(_wide(part).sum(0) for part in parts) / len(flat)
                self._put_angles([row], [weight], mean.unsqueeze(0))
        except Exception as error:
            self.table.put("shift_angle", row, failed(error))

    def has_last(self, row: int | None) -> bool:
        """Whether the row's state was the last to be added, and waits: its mean can still be asked for."""
        return row is not None and row == self._last_waiting

    def flush(self) -> None:
        """Write the figures of all tensors that wait."""
        # States first: angles need their means.
        for key in sorted(self._waiting, key=lambda key: key[0] == "angle"):
            if key in self._waiting:
                self._write(key)

    def _wait(self, key: tuple, entry: tuple, entries: int) -> None:
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = []
            self._sizes[key] = entries
        waiting.append(entry)
        self._entries += entries
        if len(waiting) >= MOST_WAITING or len(waiting) * entries >= BLOCK:
            self._write(key)
        elif self._entries >= MOST_ENTRIES:
            self.flush()

    def _wait_copied(self, key: tuple, row: int, values: Tensor) -> None:
        """Copy the values into their place of the stack in which they will be read, in float64."""
        stack = self._stacks.get(key)
        if stack is not None and len(stack.rows) == len(stack.places):
            # The stack is written now and not when it became full: the mean of the last state may have been asked for.
            self._write(key)
            stack = None
        if stack is None:
            entries = values.numel()
            if self._entries >= MOST_ENTRIES:
                self.flush()
            length = max(1, min(MOST_WAITING, BLOCK // max(entries, 1)))
            # Stacks of a shape grow, since most shapes of most networks occur a few times only.
            length = min(length, self._lengths.get(key, 4))
            self._lengths[key] = 4 * length
            wide = torch.complex128 if values.is_complex() else torch.float64
            tensor = torch.empty((length, *values.shape), dtype=wide, device=values.device)
            stack = self._stacks[key] = _Stack(tensor, list(tensor.unbind()), [])
            self._waiting[key], self._sizes[key] = stack.rows, entries
            self._entries += length * entries
        stack.places[len(stack.rows)].copy_(values.detach())
        stack.rows.append(row)
        self._last_waiting = row

    @torch.no_grad()
    def _write(self, key: tuple) -> None:
        waiting, entries = self._waiting.pop(key), self._sizes.pop(key)
        stack = self._stacks.pop(key, None)
        self._entries -= entries * (len(waiting) if stack is None else len(stack.places))
        if stack is not None:
            unit_dim, flat = key[-2:]
            values = stack.tensor[: len(waiting)]
            if key[0] == "state":
                self._put_states(waiting, values, unit_dim, flat)
            else:
                self._put_flat(waiting, values, 1 + unit_dim, flat)
        elif key[0] == "gradient":
            self._put_gradients(waiting)
        else:
            self._find_angles(waiting)

    def _put_states(self, rows: list[int], stack: Tensor, unit_dim: int | None, flat: Flat | None) -> None:
        # The units' dimension in the stack; None without samples to average over.
        dim = None if unit_dim is None else 1 + unit_dim
        if flat is not None and dim is not None:
            self._put_flat(rows, stack, dim, flat)
        try:
            found = _states(stack, dim)
        except Exception as error:
            for column in ("state_mean", "state_rms", "activation_shift"):
                self.table.put_rows(column, rows, failed(error))
            return
        self.table.put_rows("state_rms", rows, found.rms)
        self.table.put_rows("state_mean", rows, "the output is complex" if found.mean is None else found.mean)
        if found.shift is None:
            dims = stack.dim() - 1
            reason = f"the output has {dims} dimension{'s' if dims != 1 else ''}: no samples to average over"
            self.table.put_rows("activation_shift", rows, reason)
        else:
            self.table.put_rows("activation_shift", rows, found.shift)
        if not self._wanted.isdisjoint(rows):
            self._means |= {row: found.unit_means[i] for i, row in enumerate(rows) if row in self._wanted}
            self._wanted.difference_update(rows)

    def _put_flat(self, rows: list[int], stack: Tensor, dim: int, flat: Flat) -> None:
        try:
            dead, saturated = _flat_shares(stack, dim, flat)
        except Exception as error:
            self.table.put_rows("dead", rows, failed(error))
            self.table.put_rows("saturated", rows, failed(error))
            return
        self.table.combine("dead", rows, dead, np.fmax)
        if saturated is not None:
            self.table.combine("saturated", rows, saturated, np.fmax)
        else:
            self.table.explain("saturated", [row for row in rows if self.table.is_missing("saturated", row)], ONE_SIDED)

    @torch.no_grad()
    def _put_gradients(self, waiting: list[tuple[int, Tensor, int]]) -> None:
        changed = [row for row, gradient, version in waiting if gradient._version != version]
        kept = [(row, gradient) for row, gradient, version in waiting if gradient._version == version]
        if kept:
            rows, gradients = zip(*kept, strict=True)
            try:
                self.table.combine("gradient_norm", rows, norms_of_stack(torch.stack(gradients)), np.hypot)
            except Exception as error:
                self.table.put_rows("gradient_norm", rows, failed(error))
        self.table.explain("gradient_norm", changed, CHANGED)

    def _find_angles(self, waiting: list[tuple[int, Tensor, int]]) -> None:
        rows, weights, sources = zip(*waiting, strict=True)
        if not self._means.keys() >= set(sources):
            for key in [key for key in self._waiting if key[0] == "state"]:
                self._write(key)
        try:
            means = torch.stack([self._means.pop(source) for source in sources])
        except Exception as error:
            # The source's own figures say what failed.
            self.table.put_rows("shift_angle", rows, failed(error))
        else:
            self._put_angles(rows, weights, means)

    def _put_angles(self, rows: Sequence[int], weights: Sequence[Tensor], means: Tensor) -> None:
        try:
            self.table.put_rows("shift_angle", rows, _angles(weights, means))
        except Exception as error:
            self.table.put_rows("shift_angle", rows, failed(error))
            return
        are_zero = _numbers((means == 0).all(1))
        if are_zero.any():
            self.table.explain("shift_angle", np.asarray(rows)[are_zero], "the mean input is zero")


ONE_SIDED = "its activation is flat on one side only: see dead"


def _kind(tensor: Tensor) -> tuple:
    # The number of the device: torch makes a new object of a device at every reading.
    return tensor.shape, tensor.dtype, tensor.get_device()


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor may wait and be stacked: strided, not of a subclass such as DTensor, nor torch.func's own."""
    return not _torch.in_functorch() and tensor.layout is torch.strided and type(tensor) in (Tensor, torch.nn.Parameter)


# In float16, numbers below 8 units of its last place have a rounding error of up to 6 %.
_COARSE = 8 * 2.0**-24


def _underflow(gradient: Tensor) -> Figure:
    sizes = gradient.abs().float()
    total = sizes.sum().item()
    return sizes[sizes < _COARSE].sum().item() / total if total else "every entry of its gradient is zero"


def _rms(tensor: Tensor) -> float:
    return norm(tensor) / math.sqrt(tensor.numel())


class _Stack(NamedTuple):
    tensor: Tensor
    places: list[Tensor]
    rows: list[int]


class _States(NamedTuple):
    unit_means: Tensor | None
    rms: np.ndarray
    mean: np.ndarray | None
    shift: np.ndarray | None


def _states(stack: Tensor, dim: int | None) -> _States:
    """The figures of each tensor of a stack (B, ...), whose units are in dimension ``dim`` of the stack."""
    everything = tuple(range(1, stack.dim()))
    others = everything if dim is None else tuple(place for place in everything if place != dim)
    sums: Tensor | float = 0.0
    square: Tensor | float = 0.0
    for part in _parts(stack, dim):
        wide = _wide(part)
        sums = sums + (wide.sum(others) if others else wide)
        square = square + torch.linalg.vector_norm(wide, dim=everything).square() if everything else wide.abs().square()
    entries = stack[0].numel()
    totals = sums if sums.dim() < 2 else sums.sum(1)
    mean = None if stack.is_complex() else totals / entries
    shift = unit_means = None
    if dim is not None:
        units = stack.shape[dim]
        unit_means = sums / (entries / units)
        shift = torch.linalg.vector_norm(unit_means, dim=1) / math.sqrt(units)
    return _States(
        unit_means,
        *(None if figure is None else _numbers(figure) for figure in ((square / entries).sqrt(), mean, shift)),
    )


def _flat_shares(stack: Tensor, dim: int, flat: Flat) -> tuple[np.ndarray, np.ndarray | None]:
    """(dead, saturated): units that are flat in every sample, and flat entries; None for a flat part on one side."""
    others = tuple(place for place in range(1, stack.dim()) if place != dim)
    if flat.upper is None:
        largest = torch.stack([part.amax(others) for part in _parts(stack, dim)]).amax(0)
        return _numbers((largest <= flat.lower).double().mean(1)), None
    all_flat, count = [], 0.0
    for part in _parts(stack, dim):
        # Comparing into float32 is several times as fast as counting booleans.
        is_flat = torch.empty_like(part, dtype=torch.float32)
        if flat.lower == -flat.upper:
            torch.ge(part.abs(), flat.upper, out=is_flat)
        else:
            torch.ge(part, flat.upper, out=is_flat)
            is_flat += torch.le(part, flat.lower)
        all_flat.append(is_flat.amin(others))
        count = count + is_flat.sum((dim, *others), dtype=torch.float32).double()
    return _numbers(torch.stack(all_flat).amin(0).double().mean(1)), _numbers(count / stack[0].numel())


def _parts(stack: Tensor, dim: int | None) -> Iterator[Tensor]:
    """The stack in parts of about ``BLOCK`` entries, cut along its longest dimension that is not that of the units."""
    if stack.numel() <= BLOCK:
        yield stack
        return
    longest = max((place for place in range(1, stack.dim()) if place != dim), key=lambda place: stack.shape[place])
    yield from stack.split(max(1, stack.shape[longest] * BLOCK // stack.numel()), longest)


def _angles(weights: Sequence[Tensor], means: Tensor) -> np.ndarray:
    """Degrees by which the angles of the weights' rows to the mean inputs (B, K) differ from 90: rms over the units."""
    stack = torch.stack(weights) if len(weights) > 1 else weights[0].unsqueeze(0)
    units = stack.shape[1]
    sums: Tensor | float = 0.0
    for part in stack.split(max(1, units * BLOCK // stack.numel()), 1):
        wide = part.double()
        projections = (wide @ means.unsqueeze(2)).squeeze(2)
        lengths = torch.linalg.vector_norm(wide, dim=2) * torch.linalg.vector_norm(means, dim=1, keepdim=True)
        sums = sums + torch.asin((projections / lengths).clamp_(-1, 1)).square().sum(1)
    return _numbers(torch.rad2deg((sums / units).sqrt()))


@torch.no_grad()
def norms(tensors: list[Tensor]) -> list[float | str]:
    """The 2-norms of tensors of any shapes in float64; an error in place of a norm that cannot be computed."""
    found: list[float | str] = [math.nan] * len(tensors)
    groups: dict[tuple, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if _is_plain(tensor) and tensor.numel() <= BLOCK:
            groups.setdefault(_kind(tensor), []).append(place)
        else:
            found[place] = attempt(norm, tensor)
    for (shape, *_), places in groups.items():
        length = max(1, BLOCK // max(1, math.prod(shape)))
        for start in range(0, len(places), length):
            part = places[start : start + length]
            try:
                computed = norms_of_stack(torch.stack([tensors[place].detach() for place in part])).tolist()
            except Exception as error:
                computed = [failed(error)] * len(part)
            for place, figure in zip(part, computed, strict=True):
                found[place] = figure
    return found


def norms_of_stack(stack: Tensor) -> np.ndarray:
    return _numbers(
        torch.linalg.vector_norm(_wide(stack).flatten(1) if stack.dim() > 1 else _wide(stack)[:, None], dim=1)
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
