"""Replace the layers of a model by layers of this package, and come back: :func:`convert` and :func:`fold`.

Users call them as ``lcw_ops.convert`` and ``lcw_ops.fold``.
"""

from lcw_ops.conversion.folding import fold
from lcw_ops.conversion.plain import PlainOrthogonalFilterMLP, PlainOrthogonalFilterRNN, UnitScale
from lcw_ops.conversion.replacing import convert
from lcw_ops.conversion.report import Change, Changed, Left, Report, StepTime

__all__ = [
    "Change",
    "Changed",
    "Left",
    "PlainOrthogonalFilterMLP",
    "PlainOrthogonalFilterRNN",
    "Report",
    "StepTime",
    "UnitScale",
    "convert",
    "fold",
]
