"""Figures of a row: a number, or the reason why there is none; and the table that collects them as columns."""

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


def failed(error: BaseException) -> str:
    """The reason for a figure whose computation raised."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def attempt(compute: Callable[..., Figure], *arguments) -> Figure:
    """The figure, or the error of its computation as the reason: one figure must not cost the others."""
    try:
        return compute(*arguments)
    except Exception as error:
        return failed(error)


@torch.no_grad()
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
        self._values: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self._missing: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def add(self, length: int, figures: dict[str, Figure | np.ndarray], otherwise: str) -> None:
        """Append rows. A figure that is not an array is the same for all; columns without one get ``otherwise``."""
        for name in self.names:
            figure = figures.get(name, otherwise)
            missing = isinstance(figure, str)
            values = figure if isinstance(figure, np.ndarray) else np.full(length, np.nan if missing else figure)
            self._values[name].append(values)
            self._missing[name].append(np.full(length, self._number(figure) if missing else 0, np.uint16))

    def explain(self, column: str, rows: np.ndarray, reason: str) -> None:
        """Give a reason for some rows (a mask) of the part that was added last."""
        if rows.any():
            self._missing[column][-1][rows] = self._number(reason)

    def columns(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(values, missing): one float64 array and one uint16 array per column. ``missing`` is 0 or 1 + the reason."""
        return tuple(
            {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in columns.items()}
            for columns in (self._values, self._missing)
        )

    def _number(self, reason: str) -> int:
        if reason not in self._numbers:
            # Reasons with numbers in them could be many; the last place is for all further ones.
            if len(self.reasons) == np.iinfo(np.uint16).max - 1:
                return len(self.reasons)
            self.reasons.append(reason)
            self._numbers[reason] = len(self.reasons)
        return self._numbers[reason]
