"""The recurrence solved in parallel over depth: ``lcw_ops.functional.orthogonal_filter(..., solver="parallel")``.

That function checks the arguments before it calls ``solve``.
"""

import torch
from torch import Tensor

from lcw_ops.ops import backends, library
from lcw_ops.ops.parallel_depth import op as _op
from lcw_ops.ops.parallel_depth.op import choose_solver
from lcw_ops.reference.orthogonal_filter import Recurrence, state_dtype

__all__ = ["choose_solver", "solve"]


def solve(
    recurrence: Recurrence, activation: str, return_states: bool, tolerance: float | None, window: int | None
) -> Tensor:
    """Solve all layers of a window at once, by Picard sweeps. Returns the last state, or all with ``return_states``."""
    h0 = recurrence.h0
    backend = backends.choose(_op.SWEEP, h0.device, h0.shape[1], state_dtype(h0.dtype).itemsize)
    recurrence, steps = recurrence.as_tensors()
    keeps = torch.is_grad_enabled() and recurrence.needs_gradient()
    options = _op.Options(steps, activation, tolerance or 0.0, window or 0, return_states, keeps, backend)
    functions = _op.ParallelOrthogonalFilter, _op.ParallelOrthogonalFilterForwardMode
    output, _ = library.apply(*functions, *recurrence, *options)
    return output.to(h0.dtype)
