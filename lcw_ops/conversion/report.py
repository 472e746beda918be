"""The report of a conversion: which layers changed, which did not and why, and by how much the outputs change."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn


class Changed(NamedTuple):
    """A layer that was replaced, by the name under which the model first reaches it."""

    name: str
    before: str
    after: str
    note: str = ""


class Left(NamedTuple):
    """A layer that stays as it was, and the reason."""

    name: str
    type: str
    reason: str


class Change(NamedTuple):
    """||new output - old output|| / ||old output||: with the bias that a layer has, and without the bias' correction.

    ``without`` is None where no bias was corrected.
    """

    value: float
    without: float | None = None


class StepTime(NamedTuple):
    """Seconds of a forward and a backward pass of the model on the inputs, before and after."""

    before: float
    after: float


@dataclass
class Report:
    """The changes that :func:`lcw_ops.convert` or :func:`lcw_ops.fold` made, or with ``dry_run`` would make.

    Attributes:
        model: the model to use from now on. It is a new module if the root itself was replaced, or in a copy.
        changed: the layers that were replaced, as (name, before, after, note).
        left: the layers that hold a weight and stay as they were, as (name, type, reason).
        errors: where inputs were given, by name, how far each new layer's output is from the old layer's on the old
            layer's inputs. A layer that was not called as a module has no entry.
        output_change: the same of the model's output; None without inputs.
        step_time: measured if inputs were given and layers with torch's weight norm were replaced; otherwise None.
        notes: remarks on the whole model.
    """

    model: nn.Module
    changed: list[Changed] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    errors: dict[str, Change] = field(default_factory=dict)
    output_change: Change | None = None
    step_time: StepTime | None = None
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False

    def __repr__(self) -> str:
        verb = "to be changed" if self.dry_run else "changed"
        counts = f"{_layers(len(self.changed))} {verb}, {len(self.left)} left"
        if self.errors:
            counts += f", outputs change by at most {max(error.value for error in self.errors.values()):.1e}"
        return f"Report({type(self.model).__name__}: {counts})"

    def table(self, every: bool = False) -> str:
        """The report as text, in lines.

        Layers whose names differ in their numbers alone, and that share everything else, are one row with the largest
        change. ``every`` gives each layer a row of its own.
        """
        lines = [repr(self).removeprefix("Report(").removesuffix(")")]
        if self.changed:
            lines += ["", *self._table_of_changed(every)]
        if self.left:
            lines += ["", *self._table_of_left(every)]
        lines += [""] if self.notes or self.output_change or self.step_time else []
        if self.output_change is not None:
            lines.append(f"The model's output changes by {_percent(self.output_change)}.")
        if self.step_time is not None:
            before, after = (f"{1000 * seconds:.3g} ms" for seconds in self.step_time)
            lines.append(f"A forward and backward pass took {before} before, and takes {after} after.")
        return "\n".join([*lines, *self.notes])

    def _table_of_changed(self, every: bool) -> list[str]:
        rows: dict[tuple, list[Changed]] = {}
        for layer in self.changed:
            rows.setdefault((layer.name if every else _pattern(layer.name), *layer[1:]), []).append(layer)
        header = ["layer", "", "before", "after"] + (["output changes by"] if self.errors else []) + ["note"]
        table = [header]
        for (name, before, after, note), layers in rows.items():
            row = [layers[0].name if len(layers) == 1 else name, _times(layers), before, after]
            if self.errors:
                errors = [self.errors[layer.name] for layer in layers if layer.name in self.errors]
                row.append(_percent(max(errors, key=lambda error: error.value)) if errors else "not called")
            table.append([*row, note])
        return _align(table)

    def _table_of_left(self, every: bool) -> list[str]:
        rows: dict[tuple, list[Left]] = {}
        for layer in self.left:
            rows.setdefault((layer.name if every else _pattern(layer.name), *layer[1:]), []).append(layer)
        table = [["left", "", "type", "because"]]
        for (name, kind, reason), layers in rows.items():
            table.append([layers[0].name if len(layers) == 1 else name, _times(layers), kind, reason])
        return _align(table)


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _times(layers: list) -> str:
    return "" if len(layers) == 1 else f"x {len(layers)}"


def _percent(change: Change) -> str:
    """In percent where that can be read. A correction that is lost in rounding is not mentioned."""
    value, without = change
    if without is None or abs(without - value) <= max(0.01 * value, 1e-6):
        return _share(value)
    return f"{_share(value)} ({_share(without)} without the bias' correction)"


def _share(value: float) -> str:
    return f"{value:.1e}" if value < 1e-3 else f"{100 * value:.3g} %"


def _align(table: list[list[str]]) -> list[str]:
    keep = [column for column in range(len(table[0])) if any(row[column] for row in table[1:])]
    widths = {column: max(len(row[column]) for row in table) for column in keep}
    return ["  ".join(row[column].ljust(widths[column]) for column in keep).rstrip() for row in table]
