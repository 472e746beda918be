"""Which parameters share memory: one object in two places, two objects on the same memory, or parts that overlap."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def sharing(tensors: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    """By the id of each tensor, all those of the tensors, itself included, with which it shares an element."""
    distinct = list({id(tensor): tensor for tensor in tensors}.values())
    found = {id(tensor): [tensor] for tensor in distinct}
    ranges = sorted(((*bounds, tensor) for tensor in distinct if (bounds := _range(tensor))), key=lambda one: one[:3])
    for place, (device, _, end, tensor) in enumerate(ranges):
        # By index, because a slice of all that follow would take quadratic time.
        for following in range(place + 1, len(ranges)):
            other_device, other_start, _, other = ranges[following]
            if other_device != device or other_start >= end:
                break
            if _meet(tensor, other):
                found[id(tensor)].append(other)
                found[id(other)].append(tensor)
    return found


def _range(tensor: Tensor) -> tuple[str, int, int] | None:
    """The device and the addresses of the first byte and after the last one; None if the tensor has no addresses."""
    # Tensors without elements have the address 0, and those without values or of another class may have none.
    if type(tensor) not in (nn.Parameter, Tensor) or tensor.is_meta or is_lazy(tensor):
        return None
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    start = tensor.data_ptr()
    return str(tensor.device), start, start + tensor.element_size() * (_reach(tensor) + 1)


def _reach(tensor: Tensor) -> int:
    """How many elements the last one is after the first one."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _meet(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors whose ranges overlap have an element in common. ``first`` starts no later."""
    distance, remainder = divmod(second.data_ptr() - first.data_ptr(), first.element_size())
    is_dense = first.numel() == _reach(first) + 1 and second.numel() == _reach(second) + 1
    if is_dense or remainder or first.element_size() != second.element_size():
        return True
    # Columns of one matrix, for example, lie between each other.
    taken = torch.zeros(max(_reach(first), distance + _reach(second)) + 1, dtype=torch.bool)
    taken.as_strided(first.shape, first.stride()).fill_(True)
    return bool(taken.as_strided(second.shape, second.stride(), distance).any())
