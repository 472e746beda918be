"""A number that changes with a tensor's content, for CPU tensors only: reading them does not wait for a device."""

import torch
from torch import Tensor

from lcw_ops import _torch
from lcw_ops.ops import library

NAME = "fingerprint"

library.declare(NAME, "(Tensor tensor) -> int", backends=("cpp",))


def can_be_taken(tensor: Tensor) -> bool:
    """Whether there are bytes to read: the tensor is contiguous, on a CPU, not of a subclass and not traced."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not _torch.is_traced()
        and not _torch.in_forward_mode()
        and not _torch.in_functorch()
        and tensor.is_contiguous()
        and library.is_implemented(NAME, "cpp")
    )


def fingerprint(tensor: Tensor) -> int:
    """64 bits that depend on every byte of a contiguous CPU tensor, and on nothing else."""
    return torch.ops.lcw_ops.fingerprint.cpp(tensor)
