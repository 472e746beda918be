"""lcw_ops: five published remedies for badly conditioned deep networks, as drop-in PyTorch layers on fused kernels.

Importing this package imports no torch by itself, and its parts are loaded when they are first asked for. The ops,
``torch.ops.lcw_ops.*``, are there as soon as both this package and torch have been imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lcw_ops._after_import import after_import

if TYPE_CHECKING:
    from lcw_ops import distributed, functional, init, nn, optim, profile, reference
    from lcw_ops._info import info
    from lcw_ops.gradient_hooks import activate_gradients, register_gradient_hook
    from lcw_ops.ops import BackendError, use_backend

__version__ = "0.1.0"

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

# Public functions and classes of this module -> the submodule that defines them.
_DEFINED_IN = {
    "BackendError": "ops",
    "activate_gradients": "gradient_hooks",
    "info": "_info",
    "register_gradient_hook": "gradient_hooks",
    "use_backend": "ops",
}

# Attributes that are submodules: the public ones, and two that were always there after the import.
_SUBMODULES = {*__all__, "gradient_hooks", "ops"} - _DEFINED_IN.keys()


def __getattr__(name: str):
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name in _DEFINED_IN:
        value = getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
        # Found without this function from now on.
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


after_import("torch", lambda: import_module("lcw_ops.ops"))
# Whoever counts arithmetic imports the counter; torch does not, for it imports triton.
after_import("torch.utils.flop_counter", lambda: import_module("lcw_ops.ops.flops").register())
