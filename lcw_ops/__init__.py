"""lcw_ops: five published remedies for badly conditioned deep networks, as drop-in PyTorch layers on fused kernels.

Importing this package does not import torch, and its parts are loaded when they are first used. The ops,
``torch.ops.lcw_ops.*``, exist as soon as both this package and torch have been imported.
"""

import sys
from typing import TYPE_CHECKING

from lcw_ops._after_import import after_import

if TYPE_CHECKING:
    from lcw_ops import distributed, functional, init, nn, optim, profile, reference
    from lcw_ops import gradient_hooks as gradient_hooks
    from lcw_ops import ops as ops
    from lcw_ops._info import info
    from lcw_ops.conversion import convert, fold
    from lcw_ops.ops import BackendError, empty_memory_pool, set_memory_pool_limit, use_backend
    from lcw_ops.optim.hooks import activate_gradients, register_gradient_hook
    from lcw_ops.verification import verify

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "activate_gradients",
    "convert",
    "distributed",
    "empty_memory_pool",
    "fold",
    "functional",
    "info",
    "init",
    "nn",
    "optim",
    "profile",
    "reference",
    "register_gradient_hook",
    "set_memory_pool_limit",
    "use_backend",
    "verify",
]

# Public functions and classes of this module -> the submodule that defines them.
_DEFINED_IN = {
    "BackendError": "ops",
    "activate_gradients": "optim.hooks",
    "convert": "conversion",
    "empty_memory_pool": "ops",
    "fold": "conversion",
    "info": "_info",
    "register_gradient_hook": "optim.hooks",
    "set_memory_pool_limit": "ops",
    "use_backend": "ops",
    "verify": "verification",
}

# Attributes that are submodules: the public ones, and two that ``import lcw_ops`` has always provided.
_SUBMODULES = {*__all__, "gradient_hooks", "ops"} - _DEFINED_IN.keys()


def __getattr__(name: str):
    if name in _SUBMODULES:
        return _import(name)
    if name in _DEFINED_IN:
        value = getattr(_import(_DEFINED_IN[name]), name)
        # Later look-ups find the value without calling this function.
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    dunders = {name for name in globals() if name.startswith("__")}
    loaded = {name for name in globals() if f"{__name__}.{name}" in sys.modules and not name.startswith("_")}
    return sorted({*__all__, *_SUBMODULES, *dunders, *loaded})


def _import(submodule: str):
    """Import the submodule as an import statement does, and return it.

    While one thread imports torch, and so loads the ops, another thread may be importing a module of the ops and wait
    for torch. An import statement in the first thread then goes on with the unfinished module, as in a circular import
    within one thread, and the other thread completes the module. ``importlib.import_module`` raises a deadlock error
    instead.
    """
    name = f"{__name__}.{submodule}"
    __import__(name)
    return sys.modules[name]


def _register_flop_formulas() -> None:
    # This statement waits for ops that another thread is importing; importing lcw_ops.ops.flops alone would not.
    from lcw_ops.ops import flops

    flops.register()


after_import("torch", lambda: _import("ops"))
# Wait for the FLOP counter: registering imports it, and ``import torch`` does not, because the counter imports triton.
after_import("torch.utils.flop_counter", _register_flop_formulas)
