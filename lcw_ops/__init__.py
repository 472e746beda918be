"""lcw_ops: five published remedies for badly conditioned deep networks, as drop-in PyTorch layers on fused kernels."""

__version__ = "0.1.0"

from lcw_ops import distributed, functional, init, nn, optim, profile, reference
from lcw_ops._info import info
from lcw_ops.gradient_hooks import activate_gradients, register_gradient_hook
from lcw_ops.ops import BackendError, use_backend

__all__ = [
    "BackendError",
    "activate_gradients",
    "distributed",
    "functional",
    "info",
    "init",
    "nn",
    "optim",
    "profile",
    "reference",
    "register_gradient_hook",
    "use_backend",
]
