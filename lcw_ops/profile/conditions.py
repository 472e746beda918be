"""The condition of a weight's gradient: by how much the gradients of its units, or of its inputs, differ in size.

Badly scaled features or units give one weight gradients that differ by orders of magnitude, so that no single learning
rate suits it. The size of a unit (or input) is the rms of its row (or column) of the gradient. The figure is the ratio
of the rms of these sizes to their geometric mean, of the units or of the inputs, whichever is larger. It is 1 for equal
sizes and 23 for sizes spread evenly over four decades; one ReLU that hardly ever fires changes it little. Units without
a gradient, such as dead ones, do not count.
"""

import math

import torch
from torch import Tensor

from lcw_ops import _torch
from lcw_ops.functional import gradient_activation_
from lcw_ops.optim.hooks import ActivatedGradients
from lcw_ops.profile.figures import Figure, failed, whole

# Gradients of one shape are stacked up to this many entries, so that thousands of small layers take few operations.
_STACKED = 2**22

NO_MATRIX = "no weight with two dimensions has a gradient"
NO_ENTRY = "the weight's gradient is zero or not finite"
OF_A_RECURRENCE = "it is not computed for the layers of a recurrence"


def conditions(
    parameters: list[Tensor], gradients: list[Tensor | None], optimizer: torch.optim.Optimizer | None
) -> dict[int, Figure]:
    """id of the parameter -> condition, or the reason why it is missing, for (n, m, ...) with two dimensions or more.

    If :func:`lcw_ops.activate_gradients` acts on the optimizer, the gradients are those after the activation.
    """
    figures: dict[int, Figure] = {}
    by_kind: dict[tuple, list[tuple[int, Tensor]]] = {}
    settings = {} if optimizer is None else _activations(optimizer)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None or gradient.dim() < 2 or not gradient.numel():
            continue
        try:
            plain = _activated(whole(gradient), settings.get(id(parameter)))
            if plain.layout is not torch.strided:
                figures[id(parameter)] = "its gradient is sparse"
            else:
                by_kind.setdefault((plain.shape, plain.dtype, plain.device), []).append((id(parameter), plain))
        except Exception as error:
            figures[id(parameter)] = failed(error)
    for members in by_kind.values():
        size = max(1, _STACKED // members[0][1].numel())
        for begin in range(0, len(members), size):
            part = members[begin : begin + size]
            keys = [key for key, _ in part]
            try:
                found = _of_stack(torch.stack([gradient for _, gradient in part]))
            except Exception as error:
                found = [failed(error)] * len(part)
            figures.update(zip(keys, found, strict=True))
    return figures


def _activations(optimizer: torch.optim.Optimizer) -> dict[int, tuple[str, float, float]]:
    """id of the parameter -> kind, alpha, beta of its activation before each step."""
    found = {}
    for hook in _torch.step_hooks(optimizer).values():
        if not isinstance(hook, ActivatedGradients):
            continue
        acting = hook.acts_on(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            try:
                settings = hook.settings(optimizer, index, group)
            except (TypeError, ValueError):
                # A step with these settings would raise.
                continue
            if settings is not None:
                found.update({id(one): settings for one in group["params"] if id(one) in acting})
    return found


def _activated(gradient: Tensor, settings: tuple[str, float, float] | None) -> Tensor:
    if settings is None:
        return gradient
    changed = gradient.detach().clone()
    gradient_activation_([changed], *settings)
    return changed


def _of_stack(gradients: Tensor) -> list[Figure]:
    """The conditions of matrices (layers, n, m, ...)."""
    # Not in 16 bits, whose sums are coarse.
    sizes = gradients.abs() if gradients.is_complex() else gradients
    sizes = sizes.to(torch.promote_types(sizes.dtype, torch.float32)).reshape(*sizes.shape[:3], -1)
    largest = sizes.abs().amax((1, 2, 3), keepdim=True)
    # Squares of small gradients would underflow.
    squares = (sizes / largest).square_()
    ratios = torch.stack([_spread(squares.mean((2, 3)).sqrt()), _spread(squares.mean((1, 3)).sqrt())]).amax(0)
    return [NO_ENTRY if math.isnan(ratio) else ratio for ratio in ratios.tolist()]


def _spread(sizes: Tensor) -> Tensor:
    """(layers, k) -> (layers,): rms by geometric mean of the entries above zero; NaN without any."""
    is_on = sizes > 0
    count = is_on.sum(-1)
    geometric = (torch.where(is_on, sizes, 1.0).log().sum(-1) / count).exp()
    return (sizes.square().sum(-1) / count).sqrt() / geometric
