"""Figures of a row: a number, or the reason why there is none; and the table that collects them as columns."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lcw_ops import _torch

# A number, or in its place the reason why it is missing. A measured NaN is a number.
Figure = float | str

NO_PARAMETERS = "it has no parameters of its own"
FROZEN = "its parameters are frozen (requires_grad=False)"
UNREACHED = "the loss does not depend on it"
NO_GRADIENT = "it requires no gradient: nothing that is trained comes before it"
UNDER_NO_GRAD = "it was computed under torch.no_grad()"
IN_FUNCTORCH = "it was called inside a transform of torch.func"


def failed(error: BaseException) -> str:
    """The reason for a figure whose computation raised."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def attempt(compute: Callable[..., Figure], *arguments) -> Figure:
    """The figure, or the error of its computation as the reason: one figure must not cost the others."""
    try:
        return compute(*arguments)
    except Exception as error:
        return failed(error)


def norm(tensor: Tensor) -> float:
    """The 2-norm of all entries, computed in float64. A distributed tensor's is that of the whole tensor."""
    tensor = whole(tensor)
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.is_sparse else tensor.values()
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return torch.linalg.vector_norm(tensor, dtype=wide).item()


def whole(tensor: Tensor) -> Tensor:
    """The tensor without autograd; a DTensor is gathered from all ranks."""
    tensor = tensor.detach()
    return tensor.full_tensor() if _torch.has_dtensor(tensor) else tensor


class Table:
    """Columns under construction. A row is added first, and its figures are set later, in any order.

    Reasons are stored once; a missing figure takes the number of its reason. A row takes 10 bytes per column, and up to
    twice that while the table grows.
    """

    def __init__(self, reasons: dict[str, str]) -> None:
        """``reasons``: for every column the reason of a row in which nothing has been set."""
        self.reasons: list[str] = []
        self._numbers: dict[str, int] = {}
        self._default = {name: self._number(reason) for name, reason in reasons.items()}
        self._length = 0
        self._values = {name: np.full(0, math.nan) for name in reasons}
        self._missing = {name: np.zeros(0, np.uint16) for name in reasons}

    def __len__(self) -> int:
        return self._length

    def add(self, count: int = 1) -> int:
        """Append ``count`` rows without figures, and return the number of the first."""
        first, self._length = self._length, self._length + count
        if self._length > len(next(iter(self._values.values()))):
            more = max(self._length, 64)
            for name, number in self._default.items():
                self._values[name] = np.concatenate([self._values[name], np.full(more, math.nan)])
                self._missing[name] = np.concatenate([self._missing[name], np.full(more, number, np.uint16)])
        return first

    def put(self, column: str, row: int, figure: Figure) -> None:
        if isinstance(figure, str):
            self._values[column][row], self._missing[column][row] = math.nan, self._number(figure)
        else:
            self._values[column][row], self._missing[column][row] = figure, 0

    def put_rows(self, column: str, rows: Sequence[int] | slice, figures: np.ndarray | str) -> None:
        """Set a column in some rows: to one number each, or to one reason for all of them."""
        is_missing = isinstance(figures, str)
        rows = rows if isinstance(rows, slice) else np.asarray(rows)
        self._values[column][rows] = math.nan if is_missing else figures
        self._missing[column][rows] = self._number(figures) if is_missing else 0

    def combine(self, column: str, rows: Sequence[int], figures: np.ndarray, operation: np.ufunc) -> None:
        """Set a column in some rows, which may repeat; ``operation`` joins the figures of one row, new and earlier."""
        values, rows = self._values[column], np.asarray(rows)
        if self._missing[column][rows].all() and len(np.unique(rows)) == len(rows):
            values[rows] = figures
        else:
            for row, figure in zip(rows, figures, strict=True):
                values[row] = figure if self._missing[column][row] else operation(values[row], figure)
                self._missing[column][row] = 0
        self._missing[column][rows] = 0

    def explain(self, column: str, rows: np.ndarray, reason: str) -> None:
        """Give a reason for the figures of some rows, which are not known."""
        if len(rows):
            self._missing[column][rows] = self._number(reason)

    def replace_reason(self, column: str, old: str, new: str) -> None:
        """Give another reason wherever the reason is ``old``."""
        if old in self._numbers:
            missing = self._missing[column]
            missing[missing == self._numbers[old]] = self._number(new)

    def copy_column(self, column: str, to: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        """Set a column to a function of another one, missing in the same rows for the same reasons."""
        self._values[to], self._missing[to] = function(self._values[column]), self._missing[column].copy()

    def figure(self, column: str, row: int) -> Figure:
        number = self._missing[column][row]
        return self.reasons[number - 1] if number else float(self._values[column][row])

    def is_missing(self, column: str, row: int) -> bool:
        return self._missing[column][row] != 0

    def columns(self, order: Sequence[int]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(values, missing) of the rows in this order: one float64 and one uint16 array per column.

        ``missing`` is 0 or the number of the reason, counted from 1.
        """
        places = np.asarray(order, np.int64)
        values = {name: column[places] for name, column in self._values.items()}
        return values, {name: column[places] for name, column in self._missing.items()}

    def _number(self, reason: str) -> int:
        if reason not in self._numbers:
            # Reasons with numbers in them could be many; the last place is for all further ones.
            if len(self.reasons) == np.iinfo(np.uint16).max - 1:
                return len(self.reasons)
            self.reasons.append(reason)
            self._numbers[reason] = len(self.reasons)
        return self._numbers[reason]
