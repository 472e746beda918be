"""A 64-bit hash of a tensor's bytes, which shows whether a value computed from the tensor is still current.

For CPU tensors only: to read a GPU tensor, the host would have to wait.
"""

import torch
from torch import Tensor

from lcw_ops import _torch
from lcw_ops.ops import library

NAME = "fingerprint"

library.declare(NAME, "(Tensor tensor) -> int", backends=("cpp",))


def can_be_taken(tensor: Tensor) -> bool:
    """Whether :func:`fingerprint` can read the tensor.

    The tensor is contiguous, on a CPU and not of a subclass, and the call is not traced, in forward mode or under
    torch.func.
    """
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and not _torch.is_traced()
        and not _torch.in_forward_mode()
        and not _torch.in_functorch()
        and tensor.is_contiguous()
        and library.is_implemented(NAME, "cpp")
    )


def fingerprint(tensor: Tensor) -> int:
    """64 bits that depend on every byte of a contiguous CPU tensor, and on nothing else."""
    return torch.ops.lcw_ops.fingerprint.cpp(tensor)
