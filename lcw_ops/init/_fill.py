"""Initialisers of tensors share two things: they refuse computed tensors, and draw on the generator's device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lcw_ops import _torch
from lcw_ops._checks import describe


def fan_in(weight: Tensor) -> int:
    return math.prod(weight.shape[1:])


def check_fillable(function: str, **tensors: Tensor | None) -> None:
    """Raise ValueError if autograd has computed a tensor. None passes.

    Reading the weight of a constrained layer gives such a tensor, and filling it would not change the layer. A view of
    a parameter shares its memory, so it may be filled.
    """
    for argument, tensor in tensors.items():
        if tensor is not None and _torch.is_computed(tensor):
            came = "was computed from other tensors, so that filling it would change none of them"
            remedy = (
                "Fill the tensor that the layer trains, such as layer.weight_u, or draw a new tensor and assign it: "
                "layer.weight = tensor."
            )
            raise ValueError(describe(function, argument, came, "a parameter, a buffer or a view of one", remedy))


def fill_(tensor: Tensor, draw_: Callable[[Tensor], Tensor], generator: torch.Generator | None) -> Tensor:
    """Fill the tensor by ``draw_``, which fills a tensor on the generator's device."""
    if generator is None or generator.device == tensor.device:
        return draw_(tensor)
    return tensor.copy_(draw_(torch.empty_like(tensor, device=generator.device)))
