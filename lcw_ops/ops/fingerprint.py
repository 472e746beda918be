"""A number that tells whether a tensor's content has changed; only on a CPU, where looking costs no waiting."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lcw_ops.ops import library

NAME = "fingerprint"

library.declare(NAME, "(Tensor tensor) -> int", backends=("cpp",))


def can_be_taken(tensor: Tensor) -> bool:
    """Not of what has no bytes to read: tensors of other devices, subclasses, and those that are being traced."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and tensor.is_contiguous()
        and library.is_implemented(NAME, "cpp")
    )


def fingerprint(tensor: Tensor) -> int:
    """64 bits that depend on every byte of a contiguous CPU tensor, and on nothing else."""
    return torch.ops.lcw_ops.fingerprint.cpp(tensor)
