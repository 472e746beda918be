"""``watch(model, optimizer)``: the cheap figures of every layer during training, from the user's own passes.

Every ``every`` optimizer steps, one step is watched: all forward and backward passes since the step before it. There
are several of them if gradients are accumulated. The hooks of the modules exist only in that time, so other steps run
as fast as without a watch, except for two calls of a function. Gradients of weights are read when the optimizer's step
begins: after a GradScaler has unscaled them, after clipping, and summed over the accumulated passes.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcw_ops._checks import describe
from lcw_ops.nn import OrthogonalFilterMLP
from lcw_ops.profile.arguments import readable, unwrapped
from lcw_ops.profile.figures import norm, whole
from lcw_ops.profile.layers import floating

WATCHED = {
    "state_rms": "rms of the output over all samples, units and calls",
    "gradient_norm": "norm of dE/d(output) over all samples and calls",
    "weight_gradient_norm": "norm of the gradient of the module's own parameters, as the optimizer gets it",
    "update_ratio": "norm of the change of the weights by the optimizer's step, divided by the norm of the weights",
}

_SUMMARIES: dict[str, Callable] = {"min": np.min, "median": np.median, "max": np.max}

# More observations than this are thinned to every second one.
MOST_OBSERVATIONS = 512

# The update ratio is that of a sample of entries at even distances, so that the copy of the weights stays small: at
# most so many entries of a row, and of all rows together, but at least so many of a row.
MOST_OF_A_ROW, MOST_OF_ALL_ROWS, LEAST_OF_A_ROW = 65_536, 1 << 24, 64


def watch(model: nn.Module, optimizer: torch.optim.Optimizer, every: int = 100, *, scaler: Any = None) -> "Watch":
    """Watch the layers of a model in training: a context manager, or a handle to ``close()``.

    ::

        with watch(model, optimizer, every=100) as watched:
            train()
        watched.plot("watched.png")

    Args:
        model: any module. Its rows are its modules without children and those with parameters of their own; a layer of
            ``OrthogonalFilterMLP`` has a row too, for the figures of its weight.
        optimizer: the one that trains it. Its first step from now on is watched, and then every ``every``-th one.
        scaler: the ``torch.amp.GradScaler``, if there is one: ``gradient_norm`` is divided by its scale. The figures of
            the weights do not need it.

    Raises:
        TypeError: an argument is of the wrong kind. ValueError: every < 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(describe("watch", "model", f"is a {type(model).__name__}", "a torch.nn.Module"))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(describe("watch", "optimizer", f"is a {type(optimizer).__name__}", "a torch.optim.Optimizer"))
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(describe("watch", "every", f"is a {type(every).__name__}", "an int"))
    if every < 1:
        raise ValueError(describe("watch", "every", f"is {every}", "at least 1"))
    return Watch(model, optimizer, every, scaler)


class Watch:
    """The figures so far; made by :func:`watch`.

    Attributes:
        names: of the rows, in the order of the modules.
        steps: the optimizer steps that were watched, counted from 0.
        columns: name of ``WATCHED`` -> (observations, rows), float32; NaN where there is no figure.
        known: name of ``WATCHED`` -> (observations, rows), bool: where there is a figure, which may be a measured NaN.
        closed: whether the hooks have been removed.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int, scaler: Any) -> None:
        self.every, self.steps, self.closed = every, list[int](), False
        self._scaler, self._optimizer = scaler, optimizer
        self._model = unwrapped(model)
        self._rows = _rows(self._model)
        self.names = [name for name, _, _, count in self._rows for name in _names(name, count)]
        self._figures: dict[str, list[np.ndarray]] = {column: [] for column in WATCHED}
        self._known: dict[str, list[np.ndarray]] = {column: [] for column in WATCHED}
        self._step, self._handles = 0, list[Any]()
        self._states: dict[int, list[tuple[Tensor, int]]] = {}
        self._gradients: dict[int, list[Tensor]] = {}
        self._is_after_backward, self._evaluates = False, False
        self._before: dict[int, Tensor] = {}
        self._observation: _Observation | None = None
        self._of_optimizer = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._attach()

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return {column: self._stacked(values, np.float32) for column, values in self._figures.items()}

    @property
    def known(self) -> dict[str, np.ndarray]:
        return {column: self._stacked(values, bool) for column, values in self._known.items()}

    def _stacked(self, values: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.stack(values) if values else np.zeros((0, len(self.names)), dtype)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook. The figures stay."""
        self._detach()
        for handle in self._of_optimizer:
            handle.remove()
        self._of_optimizer.clear()
        self._before.clear()
        self.closed = True

    def scalars(self, per_layer: bool = False) -> dict[str, float]:
        """The last observation as numbers by name, for any logger; {} before the first one.

        "gradient_norm/max", and so on with min, median and not_finite (a number of rows), or, with ``per_layer``,
        "gradient_norm/layers.3" for every row that has the figure.
        """
        found: dict[str, float] = {}
        for column in WATCHED if self.steps else ():
            values, known = self._figures[column][-1], self._known[column][-1]
            if per_layer:
                found |= {f"{column}/{self.names[row]}": float(values[row]) for row in np.flatnonzero(known)}
            elif known.any():
                finite = values[known & np.isfinite(values)]
                found[f"{column}/not_finite"] = float(known.sum() - len(finite))
                if len(finite):
                    found |= {f"{column}/{name}": float(kind(finite)) for name, kind in _SUMMARIES.items()}
        return found

    def plot(self, path: str | Path) -> None:
        """Draw a heat map of every column, depth by step. The path's ending decides the file format.

        Raises ImportError without matplotlib, ValueError before the first observation, OSError if the file cannot be
        written.
        """
        from lcw_ops.profile.heat_map import plot_watch

        if not self.steps:
            raise ValueError(describe("plot", "the watch", "has seen no step of the optimizer", "at least one"))
        plot_watch(self, path)

    # ---- The watched step ----

    def _attach(self) -> None:
        self._forget()
        self._handles = [self._model.register_forward_pre_hook(self._before_forward)]
        for place, (_, module, _, count) in enumerate(self._rows):
            if count == 1:
                self._handles.append(module.register_forward_hook(self._recorder(place)))
        # After the model's own recorder, if it has one.
        self._handles.append(self._model.register_forward_hook(self._after_forward, always_call=True))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forget(self) -> None:
        self._states.clear()
        self._gradients.clear()
        self._is_after_backward = False

    def _after_forward(self, *_) -> None:
        self._evaluates = False

    def _before_forward(self, *_) -> None:
        # The model may run parts of itself without gradients; a pass that begins without them is no training.
        self._evaluates = not torch.is_grad_enabled()
        # A GradScaler leaves out steps with infinite gradients. What was seen before then is not part of this step.
        if self._is_after_backward and all(parameter.grad is None for parameter in self._parameters()):
            self._forget()

    def _parameters(self):
        return (parameter for group in self._optimizer.param_groups for parameter in group["params"])

    def _recorder(self, place: int) -> Callable:
        def record(module: nn.Module, args: tuple, output: Any) -> None:
            tensors = [tensor for tensor in floating(output) if tensor.numel()]
            if not tensors or self._evaluates or torch.compiler.is_compiling():
                return
            state = tensors[0].detach()
            self._states.setdefault(place, []).append((_square_sum(state), state.numel()))
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(keep)

        def keep(gradient: Tensor | None) -> None:
            # A tensor may live longer than the watched step.
            if gradient is not None and self._handles:
                self._is_after_backward = True
                self._gradients.setdefault(place, []).append(_square_sum(gradient.detach()))

        return record

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not self._handles:
            return
        # An optimizer with a closure runs the passes within its step.
        closures = [value for value in (*args, *kwargs.values()) if callable(value)]
        if not closures:
            self._observation = self._read()
        self._before = {place: self._sampled(place).clone() for place in range(len(self._rows)) if self._trains(place)}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._handles:
            observation = self._observation or self._read()
            self._add_update_ratios(observation)
            self._observation = None
            self._before.clear()
            self._keep(observation)
            self._detach()
        self._step += 1
        if self._step % self.every == 0:
            self._attach()

    def _read(self) -> "_Observation":
        # All sums come to the CPU in one transfer.
        states = _read_sums({place: sum(part for part, _ in parts) for place, parts in self._states.items()})
        gradients = _read_sums({place: sum(parts) for place, parts in self._gradients.items()})
        loss_scale = float(self._scaler.get_scale()) if self._scaler is not None else 1.0
        # A fused optimizer unscales within its step.
        pending = getattr(self._optimizer, "grad_scale", None)
        weight_scale = float(pending) if pending is not None else 1.0
        observation = _Observation(len(self.names))
        for place, (rows, own) in enumerate(self._own_by_rows()):
            if place in states:
                size = sum(numel for _, numel in self._states[place])
                observation.add("state_rms", rows, math.sqrt(states[place] / size))
            if place in gradients:
                observation.add("gradient_norm", rows, math.sqrt(gradients[place]) / loss_scale)
            count = rows.stop - rows.start
            norms = [_layer_norms(parameter.grad, count) for parameter in own if parameter.grad is not None]
            if norms:
                observation.add("weight_gradient_norm", rows, np.sqrt(np.square(norms).sum(0)) / weight_scale)
        return observation

    def _own_by_rows(self) -> Iterator[tuple[slice, list[nn.Parameter]]]:
        row = 0
        for _, _, own, count in self._rows:
            yield slice(row, row + count), own
            row += count

    def _trains(self, place: int) -> bool:
        return any(parameter.requires_grad for parameter in self._rows[place][2])

    def _sampled(self, place: int) -> Tensor:
        """(rows, entries): entries of the parameters of each row at even distances; all of them if they are few."""
        _, _, own, count = self._rows[place]
        most = max(LEAST_OF_A_ROW, min(MOST_OF_A_ROW, MOST_OF_ALL_ROWS // max(len(self.names), 1)))
        parts = [whole(parameter).reshape(count, -1) for parameter in own if parameter.requires_grad]
        stride = -(-sum(part.shape[1] for part in parts) // most)
        wide = torch.complex128 if any(part.is_complex() for part in parts) else torch.float64
        return torch.cat([part[:, ::stride].to(wide) for part in parts], 1)

    def _add_update_ratios(self, observation: "_Observation") -> None:
        for place, (rows, _) in enumerate(self._own_by_rows()):
            if place in self._before:
                before = self._before[place]
                change, size = (
                    torch.linalg.vector_norm(tensor, dim=1).numpy(force=True)
                    for tensor in (self._sampled(place) - before, before)
                )
                # A weight of zeros has no ratio.
                with np.errstate(divide="ignore", invalid="ignore"):
                    observation.add("update_ratio", rows, change / size, size != 0)

    def _keep(self, observation: "_Observation") -> None:
        self.steps.append(self._step)
        with np.errstate(over="ignore"):
            for column in WATCHED:
                self._figures[column].append(observation.values[column].astype(np.float32))
                self._known[column].append(observation.known[column])
        if len(self.steps) > MOST_OBSERVATIONS:
            for values in (self.steps, *self._figures.values(), *self._known.values()):
                del values[1::2]


class _Observation:
    """The figures of one watched step: NaN, and not known, until they are added."""

    def __init__(self, rows: int) -> None:
        self.values = {column: np.full(rows, math.nan) for column in WATCHED}
        self.known = {column: np.zeros(rows, bool) for column in WATCHED}

    def add(self, column: str, rows: slice, values: float | np.ndarray, known: bool | np.ndarray = True) -> None:
        self.values[column][rows] = np.where(known, values, math.nan)
        self.known[column][rows] = known


def _rows(model: nn.Module) -> list[tuple[str, nn.Module, list[nn.Parameter], int]]:
    """(name, module, its own parameters, number of rows). A parameter that modules share belongs to the first."""
    rows, seen = [], set[int]()
    for name, module in model.named_modules():
        own = [each for each in module.parameters(recurse=False) if each is not None and id(each) not in seen]
        seen.update(map(id, own))
        if not own and any(True for _ in module.children()):
            continue
        name = readable(name) or type(module).__name__
        if isinstance(module, OrthogonalFilterMLP):
            layers = [parameter for parameter in own if parameter.dim() and len(parameter) == module.depth]
            rows.append((f"{name}.layer", module, layers, module.depth))
        else:
            rows.append((name, module, own, 1))
    return rows


def _names(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}[{row + 1}]" for row in range(count)]


def _square_sum(tensor: Tensor) -> Tensor:
    """The sum of the squares, in float64 (float32 where the device has none), without waiting for the device."""
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(whole(tensor), dtype=wide).square()


def _read_sums(sums: dict[int, Tensor]) -> dict[int, float]:
    if not sums:
        return {}
    device = next(iter(sums.values())).device
    values = torch.stack([value.to(device) for value in sums.values()]).tolist()
    return dict(zip(sums, values, strict=True))


def _layer_norms(tensor: Tensor, count: int) -> np.ndarray:
    """The norm of a whole tensor, (1,), or of every one of its ``count`` layers, (count,)."""
    if count == 1:
        return np.array([norm(tensor)])
    tensor = whole(tensor).double()
    return torch.linalg.vector_norm(tensor.reshape(count, -1), dim=1).numpy(force=True)
