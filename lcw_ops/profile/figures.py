"""Figures of a row: a number, or the reason why there is none; and the table that collects them as columns."""

import math
from array import array
from collections.abc import Callable

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
    """Columns under construction. Reasons are stored once; a missing figure takes the number of its reason."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.reasons: list[str] = []
        self._numbers: dict[str, int] = {}
        # Arrays of numbers that grow: a row has few bytes.
        self._values = {name: array("d") for name in names}
        self._missing = {name: array("H") for name in names}

    def add(self, figures: dict[str, Figure], otherwise: str) -> None:
        """Append a row. Columns without a figure get the reason ``otherwise``."""
        for name in self.names:
            figure = figures.get(name, otherwise)
            is_missing = isinstance(figure, str)
            self._values[name].append(math.nan if is_missing else figure)
            self._missing[name].append(self._number(figure) if is_missing else 0)

    def add_rows(self, length: int, columns: dict[str, np.ndarray | str], otherwise: str) -> None:
        """Append rows. A string is the reason for all of them."""
        for name in self.names:
            figures = columns.get(name, otherwise)
            is_missing = isinstance(figures, str)
            values = np.full(length, math.nan) if is_missing else figures.astype(np.float64)
            self._values[name].frombytes(values.tobytes())
            number = self._number(figures) if is_missing else 0
            self._missing[name].frombytes(np.full(length, number, np.uint16).tobytes())

    def explain(self, column: str, rows: np.ndarray, reason: str) -> None:
        """Give a reason for some rows (a mask) of the part that was added last."""
        if rows.any():
            np.frombuffer(self._missing[column], np.uint16)[-len(rows) :][rows] = self._number(reason)

    def columns(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(values, missing): one float64 array and one uint16 array per column. ``missing`` is 0 or 1 + the reason."""
        values = {name: np.array(column, np.float64) for name, column in self._values.items()}
        return values, {name: np.array(column, np.uint16) for name, column in self._missing.items()}

    def _number(self, reason: str) -> int:
        if reason not in self._numbers:
            # Reasons with numbers in them could be many; the last place is for all further ones.
            if len(self.reasons) == np.iinfo(np.uint16).max - 1:
                return len(self.reasons)
            self.reasons.append(reason)
            self._numbers[reason] = len(self.reasons)
        return self._numbers[reason]
