"""Networks built on the deep orthogonal-filter recurrence: an MLP over depth and an Elman RNN over time.

    h <- alpha O h + beta act(W h + b + u)

A. Ceni, "Random Orthogonal Additive Filters", IEEE TNNLS 2025, arXiv 2210.01245. O is fixed and, by default, random.
The weights and biases are trained; alpha and beta are trained only if each is given as an ``nn.Parameter``.
"""

from lcw_ops import _old_names
from lcw_ops.nn.orthogonal_filter.base import _OrthogonalFilter
from lcw_ops.nn.orthogonal_filter.filters import make_filter
from lcw_ops.nn.orthogonal_filter.mlp import OrthogonalFilterMLP
from lcw_ops.nn.orthogonal_filter.rnn import OrthogonalFilterRNN

# Recorded torch.fx graphs look for these two in this module.
from lcw_ops.nn.orthogonal_filter.sequence import _finish_sequence, _start_sequence
from lcw_ops.nn.orthogonal_filter.stages import OrthogonalFilterStage

__all__ = [
    "OrthogonalFilterMLP",
    "OrthogonalFilterRNN",
    "OrthogonalFilterStage",
    "_OrthogonalFilter",
    "_finish_sequence",
    "_start_sequence",
    "make_filter",
]

# Pickles and recorded graphs look for these in the package, whichever file defines them.
for _name in __all__:
    globals()[_name].__module__ = __name__

_old_names.keep(globals(), {"FILTERS": "lcw_ops._names"})
