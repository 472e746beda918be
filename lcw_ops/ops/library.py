"""Declares ops. Each has one schema, one fake kernel, one set of rules, and one overload per backend.

``lcw_ops::orthogonal_filter.cpp`` and ``lcw_ops::orthogonal_filter.cuda`` have the same schema, implemented by two
backends. Python declares them. The C++ and CUDA extensions and the Triton launchers only add the implementations.
"""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import Function

from lcw_ops import _torch

library = torch.library.Library("lcw_ops", "DEF")

# Each backend's dispatch key. Compiled implementations are for one device type, implementations in Python for any.
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
    uncapturable: tuple[str, ...] = (),
) -> None:
    """Define ``lcw_ops::name.backend`` for every backend, with the rules that all of them share.

    ``vmap`` takes the overload first, then the arguments of ``torch.library.register_vmap``'s function. The overloads
    of the backends in ``uncapturable`` run outside of the CUDA graphs that torch.compile(mode="reduce-overhead") makes.
    """
    for backend in backends:
        tags = (torch.Tag.cudagraph_unsafe,) if backend in uncapturable else ()
        library.define(f"{name}.{backend}{schema}", tags=tags)
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
    """Implement an overload in Python: for a backend such as Triton, or for one dispatch ``key`` of any backend."""
    library.impl(f"{name}.{backend}", function, key or DISPATCH_KEY[backend])


def implement_in_triton(stem: str, *names: str) -> None:
    """Implement each op in ``names`` by the launcher of the same name in ``kernels/<stem>.py``.

    The module is imported at the first call, so that lcw_ops does not need Triton.
    """
    for name in names:
        implement(name, "triton", functools.partial(launch, stem, name))


def launch(stem: str, name: str, *arguments):
    """Call the launcher ``name`` of ``kernels/<stem>.py``."""
    return getattr(importlib.import_module(f"lcw_ops.kernels.{stem}"), name)(*arguments)


def get_overloads(name: str, backends: tuple[str, ...] = ("cpp", "triton")) -> dict[str, "_torch.OpOverload"]:
    return {backend: get_overload(name, backend) for backend in backends}


def get_overload(name: str, backend: str) -> "_torch.OpOverload":
    return getattr(getattr(torch.ops.lcw_ops, name), backend)


def is_implemented(name: str, backend: str) -> bool:
    return get_overload(name, backend).has_kernel_for_dispatch_key(getattr(_torch.DispatchKey, DISPATCH_KEY[backend]))


def load_extension(stem: str) -> str | None:
    """Load ``lcw_ops/<stem>.abi3.so``.

    Returns None, or why it was not loaded. A missing extension is not an error: a slower backend takes over.
    """
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


def forward_mode_twin(function: type[Function], jvp: Callable) -> type[Function]:
    """Returns a subclass of ``function`` with forward-mode derivatives, for :func:`apply`.

    torch.compile refuses to trace a Function that has a jvp, so each differentiable op has two Functions.

    Args:
        function: a Function that calls ``ctx.save_for_forward`` if ``jvp`` reads ``ctx.saved_tensors``.
        jvp: takes the context and one tangent per argument, or None for an argument without one.
    """
    members = {
        "__doc__": f"{function.__name__} with forward-mode derivatives.",
        "__module__": function.__module__,
        "jvp": staticmethod(jvp),
    }
    return type(function)(f"{function.__name__}ForwardMode", (function,), members)


def apply(function: type[Function], twin: type[Function], *arguments):
    """Returns ``function.apply(*arguments)``. Every argument must be given.

    ``twin`` comes from :func:`forward_mode_twin`, or is ``function`` itself where torch.func and forward mode never run
    it. Outside torch.func and torch.compile this skips the search for default arguments in ``Function.apply``, which
    takes tens of microseconds. If autograd does not record the call either, ``forward`` alone is enough. Its context is
    then missing, so call a Function without ``setup_context`` only if gradients are enabled.
    """
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    if _torch.in_functorch():
        return twin.apply(*arguments)
    if torch.is_grad_enabled() or _torch.in_forward_mode():
        return super(Function, twin).apply(*arguments)
    return function.forward(*arguments)


def vmap_rows(overload, info, in_dims, *tensors: Tensor):
    """The vmap rule of an op whose arguments all have one row per unit: a batch of rows is a longer list of rows."""
    batched = [
        tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]
    results = overload(*(tensor.flatten(0, 1) for tensor in batched))
    rows = batched[0].shape[:2]
    if isinstance(results, Tensor):
        return results.unflatten(0, rows), 0
    return tuple(result.unflatten(0, rows) for result in results), (0,) * len(results)


def are_alike(tensor: Tensor, other: Tensor) -> bool:
    """For fake kernels: whether both are floating point and of one dtype."""
    return tensor.dtype == other.dtype and tensor.is_floating_point()


def is_per_unit(values: Tensor, rows: Tensor) -> bool:
    """For fake kernels: whether ``values`` holds one number per row, of the rows' dtype."""
    return values.dim() == 1 and values.shape[0] == rows.shape[0] and are_alike(values, rows)


def reference_gradients(
    function: Callable, arguments: tuple[Tensor, ...], needs: tuple[bool, ...], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments that need one, by torch's own autograd through ``function``."""
    is_again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Use separate aliases: if one argument was computed from another, do not differentiate through that path.
        aliases = [argument.view_as(argument) for argument in arguments]
        needed = [alias for alias, need in zip(aliases, needs, strict=True) if need]
        gradients = iter(torch.autograd.grad(function(*aliases), needed, grad_output, create_graph=is_again))
    return tuple(next(gradients) if need else None for need in needs)
