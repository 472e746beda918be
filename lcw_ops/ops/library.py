"""Where every op is declared: one schema, one fake kernel, one set of rules, and one overload per backend.

``lcw_ops::orthogonal_filter.cpp`` and ``lcw_ops::orthogonal_filter.cuda`` are the same schema carried out by two
backends. Python declares them; the C++ and CUDA extensions (or a Triton launcher) only add the implementation.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import Function

library = torch.library.Library("lcw_ops", "DEF")

# The dispatch key that an overload's implementation sits on: compiled ones have a device, those in Python take any.
DISPATCH_KEY = {
    "cpp": "CPU",
    "cuda": "CUDA",
    "triton": "CompositeExplicitAutograd",
    "graph": "CompositeExplicitAutograd",
    "reference": "CompositeExplicitAutograd",
}


def declare(
    name: str,
    schema: str,
    backends: tuple[str, ...],
    fake: Callable | None = None,
    autocast_dtype: torch.dtype | None = None,
    vmap: Callable | None = None,
) -> None:
    """Define ``lcw_ops::name.backend`` for every backend, with the rules that do not depend on who computes it.

    ``vmap`` takes the overload first, then the arguments of ``torch.library.register_vmap``'s function.
    """
    for backend in backends:
        library.define(f"{name}.{backend}{schema}")
        qualified = f"lcw_ops::{name}.{backend}"
        if fake is not None:
            torch.library.register_fake(qualified, fake, lib=library)
        if autocast_dtype is not None:
            for device_type in ("cpu", "cuda"):
                torch.library.register_autocast(qualified, device_type, autocast_dtype, lib=library)
        if vmap is not None:
            overload = get_overload(name, backend)
            torch.library.register_vmap(
                qualified,
                lambda info, in_dims, *args, overload=overload: vmap(overload, info, in_dims, *args),
                lib=library,
            )


def implement(name: str, backend: str, function: Callable, key: str | None = None) -> None:
    """Give a backend written in Python (Triton launchers) its implementation; or any, what it does on one ``key``."""
    library.impl(f"{name}.{backend}", function, key or DISPATCH_KEY[backend])


def get_overload(name: str, backend: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops.lcw_ops, name), backend)


def is_implemented(name: str, backend: str) -> bool:
    return get_overload(name, backend).has_kernel_for_dispatch_key(getattr(torch._C.DispatchKey, DISPATCH_KEY[backend]))


def load_extension(stem: str) -> str | None:
    """Load ``lcw_ops/<stem>.abi3.so``. Returns None, or the reason why it is not there: a slower backend, no error."""
    path = Path(__file__).parent.parent / f"{stem}.abi3.so"
    if not path.exists():
        return f"{path.name} is not built; it needs {'nvcc' if 'cuda' in stem else 'a C++ compiler'} at install time"
    if "cuda" in stem and torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} did not load: {str(error).splitlines()[0]}"
    return None


def apply(function: type[Function], with_forward_mode: type[Function], *arguments):
    """``function.apply(*arguments)``, every argument given.

    torch.compile refuses to trace a Function that has a jvp, so there are two of each. And outside of torch.func and
    torch.compile, ``Function.apply`` spends tens of microseconds on looking for default arguments: it is passed over.
    """
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    if torch._C._are_functorch_transforms_active():
        return with_forward_mode.apply(*arguments)
    return super(Function, with_forward_mode).apply(*arguments)
