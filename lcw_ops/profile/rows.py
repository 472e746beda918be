"""The rows of a profile: every observed call, every layer of a recurrence, and every module that was only read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lcw_ops.nn import OrthogonalFilterRNN
from lcw_ops.profile import orthogonal_filter as replay
from lcw_ops.profile import updates
from lcw_ops.profile.conditions import NO_MATRIX, OF_A_RECURRENCE
from lcw_ops.profile.figures import FROZEN, NO_PARAMETERS, UNREACHED, Figure, Table, failed
from lcw_ops.profile.layers import LayerCall, Observation, RecurrenceCall
from lcw_ops.profile.result import COLUMNS
from lcw_ops.profile.statistics import norms
from lcw_ops.profile.units import NO_LINEAR_LAYER

_ONLY_OF_RECURRENCES = "it is known only for the layers of an orthogonal-filter recurrence"
_READ = "the module was not called: its parent reads its parameters"
_NOT_CALLED = "the module was not called in this pass"
_RETURNED_NONE = "the module returned no floating-point numbers"
_UNINITIALISED = "the module was not called, and has no parameters before its first call"
_SCRIPTED = "a ScriptModule takes no hooks"

_FUSED = "the recurrence is one fused op, and its replay does not form the activations"
NO_OPTIMIZER = "no optimizer was given"

# Why a row has no figure in which nothing else is said.
_REASONS = {
    "gradient_norm": UNREACHED,
    "shift_angle": NO_LINEAR_LAYER,
    **dict.fromkeys(("dead", "saturated"), "no activation function with a flat part computes or reads its output"),
    "gradient_condition": OF_A_RECURRENCE,
    "underflow": "its gradient is not float16",
    "update_ratio": NO_OPTIMIZER,
}


def new_table() -> Table:
    """An empty table with the columns of a profile."""
    return Table({name: _REASONS.get(name, _ONLY_OF_RECURRENCES) for name in COLUMNS if name != "name"})


@dataclass
class Rows:
    """The table, and what was found beside it.

    Attributes:
        names: one per row. order: their rows in the table.
        jacobians: {what: (spectrum, J', e)}, the Jacobians J' 2^e of the recurrences.
        absent: what -> the reason why a Jacobian is missing.
        modules: for each row the path of its module and the name of its class.
    """

    table: Table
    names: list[str] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    jacobians: dict = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    modules: list[tuple[str, str]] = field(default_factory=list)

    def columns(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(values, missing) of all rows in their order; see :meth:`Table.columns`."""
        return self.table.columns(self.order)


@dataclass
class Gradients:
    """Figures of the parameters' gradients and updates by the parameter's id, or the reason why there are none."""

    norms: dict[int, Figure] = field(default_factory=dict)
    missing: str | None = None
    # By the parameter's id, the norms of its update and of its values; None without an optimizer.
    next_updates: dict[int, updates.Ratio] | None = None
    conditions: dict[int, Figure] = field(default_factory=dict)

    @classmethod
    def of(cls, parameters: list[Tensor], gradients: list[Tensor | None]) -> "Gradients":
        pairs = [pair for pair in zip(parameters, gradients, strict=True) if pair[1] is not None]
        found = norms([gradient for _, gradient in pairs])
        norms_by_id = {id(parameter): figure for (parameter, _), figure in zip(pairs, found, strict=True)}
        return cls(norms_by_id)

    def of_module(self, own: list[nn.Parameter]) -> tuple[Figure, Figure]:
        """(norm of the gradient, update-to-weight ratio) over the module's matrices, or over all of its parameters.

        All of them count if it has no matrix with a gradient.
        """
        if not own:
            return NO_PARAMETERS, NO_PARAMETERS
        trained = [parameter for parameter in own if parameter.requires_grad]
        if not trained:
            return FROZEN, FROZEN
        if self.missing is not None:
            return self.missing, self.missing
        reached = [parameter for parameter in trained if id(parameter) in self.norms]
        reached = [parameter for parameter in reached if parameter.dim() > 1] or reached
        if not reached:
            return UNREACHED, UNREACHED
        found = [self.norms[id(parameter)] for parameter in reached]
        unknown = [figure for figure in found if isinstance(figure, str)]
        gradient = unknown[0] if unknown else math.hypot(*found) if len(found) > 1 else found[0]
        if self.next_updates is None:
            return gradient, NO_OPTIMIZER
        return gradient, updates.ratio([self.next_updates[id(parameter)] for parameter in reached])

    def condition_of_module(self, own: list[nn.Parameter]) -> Figure:
        """The largest condition of the module's matrices."""
        norm_of_module, _ = self.of_module(own)
        if isinstance(norm_of_module, str):
            return norm_of_module
        found = [self.conditions[id(parameter)] for parameter in own if id(parameter) in self.conditions]
        numbers = [figure for figure in found if not isinstance(figure, str)]
        return max(numbers) if numbers else found[0] if found else NO_MATRIX


class _Parameters:
    """Counts every parameter once: in the first row that has it."""

    def __init__(self) -> None:
        self._counted: set[int] = set()

    def new(self, own: list[nn.Parameter]) -> list[nn.Parameter]:
        fresh = [parameter for parameter in own if id(parameter) not in self._counted and not is_lazy(parameter)]
        self._counted.update(map(id, fresh))
        return fresh

    def count(self, own: list[nn.Parameter]) -> float:
        return float(sum(parameter.numel() for parameter in self.new(own)))

    def by_layer(self, own: list[nn.Parameter], call: RecurrenceCall) -> np.ndarray:
        """The parameters that every layer has, in its row; those that all layers share, in the first row."""
        counts = np.zeros(call.rows)
        for parameter in self.new(own):
            is_per_layer = not isinstance(call.module, OrthogonalFilterRNN) and len(parameter) == call.rows
            counts[slice(None) if is_per_layer else 0] += parameter.numel() / (call.rows if is_per_layer else 1)
        return counts


def make_rows(observation: Observation, gradients: Gradients, jacobian: bool, samples: int) -> Rows:
    """All rows. ``jacobian``: also find the Jacobian h_0 -> h_L of every recurrence that is not too wide."""
    rows, parameters = Rows(observation.table), _Parameters()
    paths = {id(module): path for path, module in observation.model.named_modules()}
    for call in _with_uncalled(observation, gradients):
        own = observation.own[id(call.module)]
        if isinstance(call, LayerCall):
            rows.names.append(call.name)
            rows.order.append(call.row)
            rows.table.put("parameters", call.row, parameters.count(own))
            gradient, ratio = gradients.of_module(own)
            rows.table.put("weight_gradient_norm", call.row, gradient)
            rows.table.put("update_ratio", call.row, ratio)
            rows.table.put("gradient_condition", call.row, gradients.condition_of_module(own))
        else:
            _add_recurrence(rows, call, parameters.by_layer(own, call), gradients, jacobian)
        rows.modules += [(paths[id(call.module)], type(call.module).__name__)] * call.rows
    if gradients.missing is not None:
        rows.table.replace_reason("gradient_norm", UNREACHED, gradients.missing)
    for column in ("dead", "saturated"):
        rows.table.copy_column(column, f"{column}_error", lambda share: np.sqrt(share * (1 - share) / samples))
    return rows


def _gradient(figure: Figure, gradients: Gradients) -> Figure:
    return gradients.missing if figure == UNREACHED and gradients.missing is not None else figure


def _with_uncalled(observation: Observation, gradients: Gradients) -> Iterator[LayerCall | RecurrenceCall]:
    """The calls, and before the row of a module those of the modules inside it that have parameters and no row."""
    called = {id(call.module) for call in observation.calls}
    modules = dict(observation.model.named_modules())
    names = {observation.names[id(call.module)] for call in observation.calls}
    inside: dict[str | None, list[LayerCall]] = {}
    for module in modules.values():
        if id(module) in called or not observation.own.get(id(module)):
            continue
        name = observation.names[id(module)]
        inside.setdefault(_nearest(name, names), []).append(_uncalled(observation, gradients, module))
    for call in observation.calls:
        yield from inside.pop(observation.names[id(call.module)], ())
        yield call
    yield from inside.pop(None, ())


def _nearest(name: str, names: set[str]) -> str | None:
    """The innermost module around ``name`` that is one of ``names``."""
    while name:
        name = name.rpartition(".")[0]
        if name in names:
            return name
    return None


def _uncalled(observation: Observation, gradients: Gradients, module: nn.Module) -> LayerCall:
    own = observation.own[id(module)]
    reason = _READ if any(id(parameter) in gradients.norms for parameter in own) else _NOT_CALLED
    if id(module) in observation.without_figures:
        reason = _RETURNED_NONE
    elif any(map(is_lazy, own)):
        reason = _UNINITIALISED
    elif isinstance(module, torch.jit.ScriptModule):
        reason = _SCRIPTED
    call = LayerCall(observation.call_name(module), module, observation.table.add())
    for column in ("state_mean", "state_rms", "activation_shift", "shift_angle", "gradient_norm", "dead", "saturated"):
        observation.table.put(column, call.row, reason)
    return call


def _add_recurrence(
    rows: Rows, call: RecurrenceCall, parameters: np.ndarray, gradients: Gradients, jacobian: bool
) -> None:
    recurrence, steps = call.recurrence, call.rows
    first = rows.table.add(steps)
    places = slice(first, first + steps)
    rows.order += range(first, first + steps)
    rows.names += [f"{call.name}[{call.before + step}]" for step in range(1, steps + 1)]
    try:
        columns: dict[str, np.ndarray | str] = dict(_layer_columns(call))
        reason = _gradient(call.no_gradient, gradients)
    except Exception as error:
        columns, reason = {}, failed(error)
    if call.is_frozen:
        columns["weight_gradient_norm"] = FROZEN
    for column in ("dead", "saturated"):
        rows.table.put_rows(column, places, _FUSED)
    rows.table.put_rows("parameters", places, parameters)
    rows.table.put_rows("update_ratio", places, _recurrent_updates(call, gradients))
    for column in replay.COLUMNS:
        rows.table.put_rows(column, places, columns.get(column, reason))
    _explain(rows.table, columns, first)
    # The Jacobian of a part would not be that of h_0 -> h_L.
    if jacobian and columns and (call.group is None or call.group.size == 1):
        what = "h_0 -> h_L" if call.name == "layer" else f"{call.name}: h_0 -> h_L"
        try:
            if recurrence.h0.shape[1] > replay.EXACT_WIDTH:
                rows.absent[what] = f"the recurrence is wider than {replay.EXACT_WIDTH}"
            elif len(recurrence.h0):
                matrix, exponent = replay.state_jacobian(recurrence)
                rows.jacobians[what] = (replay.state_spectrum(columns, matrix, exponent), matrix, exponent)
        except Exception as error:
            rows.absent[what] = failed(error)
    # Free the states at which the chunks of layers begin: the replay of the next recurrence keeps its own.
    recurrence.boundaries.clear()


def _recurrent_updates(call: RecurrenceCall, gradients: Gradients) -> np.ndarray | str:
    """The update ratio of every layer's weight; of a weight that is shared over time, the same in every row."""
    if call.is_frozen:
        return FROZEN
    if gradients.missing is not None:
        return gradients.missing
    if gradients.next_updates is None:
        return NO_OPTIMIZER
    weight = getattr(call.module, "weight", None)
    weight = call.module.weight_hh if weight is None else weight
    found = gradients.next_updates.get(id(weight), UNREACHED)
    if isinstance(found, str):
        return found
    update, norm = (norms.cpu().numpy() for norms in found)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.broadcast_to(update / norm, call.rows)


def _layer_columns(call: RecurrenceCall) -> dict[str, np.ndarray]:
    """The columns of a recurrence. Ranks with parts of it take turns: each needs the gradient of the next one."""
    recurrence, group = call.recurrence, call.group
    if group is None or recurrence.grad_states is None:
        return replay.layer_columns(recurrence)
    gradient = recurrence.grad_states.clone()
    for rank in reversed(range(group.size)):
        if rank == group.rank:
            recurrence.grad_states = gradient.clone()
            columns = replay.layer_columns(recurrence)
            gradient.copy_(recurrence.grad_h0)
        group.broadcast(gradient, rank, "the profiler's broadcast of a state's gradient")
    return columns


def _explain(table: Table, columns: dict, first: int) -> None:
    """Reasons for the NaN of a recurrence's columns that do not come from the network's numbers."""
    for column, reason in (
        ("state_rms_bound", "the activation is not bounded"),
        ("shift_angle", "the mean input is zero"),
    ):
        if column in columns:
            unknown = np.isnan(columns[column]) & np.isfinite(columns["state_rms"])
            table.explain(column, first + np.flatnonzero(unknown), reason)


def first_not_finite(rows: Rows, observation: Observation) -> str | None:
    """The layer at which NaN or infinity begins: in the forward pass, or else in the backward pass; None if nowhere."""
    columns, missing = rows.columns()

    def where(column: str) -> np.ndarray:
        return np.flatnonzero(~np.isfinite(columns[column]) & (missing[column] == 0))

    for column, end, words in (("state_rms", 0, "output"), ("gradient_norm", -1, "output's gradient")):
        places = where(column)
        if len(places):
            row = places[end]
            kind = "NaN" if np.isnan(columns[column][row]) else "infinite"
            holds = " (its parameters are not finite)" if _holds_non_finite(observation, rows.names[row]) else ""
            return f"the {words} of {rows.names[row]}, row {row + 1} of {len(rows.names)}, is {kind}{holds}"
    return None


def _holds_non_finite(observation: Observation, name: str) -> bool:
    """Whether a parameter of the called module of this name holds NaN or infinity."""
    for call in observation.calls:
        if call.name == name or name.startswith(f"{call.name}["):
            return any(not bool(parameter.isfinite().all()) for parameter in observation.own[id(call.module)])
    return False
