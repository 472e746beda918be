"""The memory of large results: CPU kernels take it from a pool, which keeps it from one training step to the next.

The gradient of 50,000 layers of 64 x 64 has 819 MB. malloc gives memory of this size back to the system when the tensor
dies, and the next step maps and clears it again, which may take longer than computing the gradient. The C++ kernels
call ``lcw_ops::new_large`` for results of at least LEAST_BYTES (new_large in csrc/cpu/tensors.h).

The tensors are ordinary ones, except that torch cannot resize their storage: see :func:`set_memory_pool_limit`.
"""

import contextlib
import math
import os
import re

import torch
from torch import Tensor

from lcw_ops import _pool, _torch
from lcw_ops._after_import import warn
from lcw_ops._checks import describe
from lcw_ops.ops import backends, library

# The least size of a result that the pool serves. glibc maps every larger request by itself (M_MMAP_THRESHOLD is at
# most 32 MB), and unmaps it when it is freed. Smaller requests it serves from memory that it keeps.
LEAST_BYTES = 32 << 20
# No result is as large.
_NEVER = 2**63 - 1
# Whether the compiled kernels know the pool. They are loaded before start() is called.
_has_kernels = False

UNITS = {"": 1, "B": 1, **{f"{k}B": 1000**n for n, k in enumerate("KMGT", 1)}}
UNITS.update({f"{k}iB": 1024**n for n, k in enumerate("KMGT", 1)})

library.declare("set_least_pooled", "(int bytes) -> int", backends=("cpp",))
library.library.define("new_large(Tensor like, int[] sizes) -> Tensor?")

pool = _pool.Pool(0)


def new_large(like: Tensor, sizes: list[int]) -> Tensor | None:
    """A tensor of the dtype of ``like`` in memory of the pool, or None if torch has to allocate it."""
    # torch fills tensors that it allocates.
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fills and torch.are_deterministic_algorithms_enabled():
        return None
    with _torch.without_function_modes():
        lease = pool.lend(math.prod(sizes) * like.element_size())
        # resize_ gives the shape, and no view of another tensor.
        return None if lease is None else torch.frombuffer(lease, dtype=like.dtype).resize_(sizes)


library.library.impl("new_large", new_large, "CPU")
# Nothing is differentiated here. Without this line, torch would attach a warning to the result.
library.library.impl("new_large", torch.library.fallthrough_kernel, "Autograd")


def set_memory_pool_limit(limit: int | None = None) -> None:
    """Set the most bytes of idle memory that the pool for large results of CPU kernels keeps.

    Results of at least 32 MB, above all gradients of weights, get their memory from the pool (on Linux). When the last
    tensor over a block of memory has died, the block is idle, and the next result of about its size takes it. The
    system may take the pages of idle blocks when it needs memory. :func:`lcw_ops.empty_memory_pool` gives all of them
    back at once, and :func:`lcw_ops.info` says how many bytes are idle.

    torch cannot resize the storage of such a tensor. ``grad.resize_`` to a larger size and
    ``grad.untyped_storage().resize_`` raise RuntimeError. Code that relies on them needs a limit of 0.

    Args:
        limit: a number of bytes. 0 switches the pool off: later results get their memory from torch. None stands for
            the default, a quarter of the machine's memory, or of the limit for this process's control group.
    """
    if limit is None:
        limit = _pool.machine_memory() // 4 if _pool.IS_SUPPORTED else 0
    elif isinstance(limit, bool) or not isinstance(limit, int):
        expected = "an int, the number of bytes, or None for the default"
        raise TypeError(describe("set_memory_pool_limit", "limit", f"is {limit!r}", expected))
    elif limit < 0:
        remedy = "0 switches the pool off."
        raise ValueError(describe("set_memory_pool_limit", "limit", f"is {limit}", "at least 0", remedy))
    pool.set_limit(limit)
    if _has_kernels:
        _set_least_pooled(LEAST_BYTES if limit > 0 else _NEVER)


def empty_memory_pool() -> None:
    """Give the idle memory of the pool for large results back to the system: ``torch.cuda.empty_cache`` for the CPU.

    Tensors keep their memory. :func:`lcw_ops.set_memory_pool_limit` describes the pool.
    """
    pool.empty()


def missing_reason() -> str | None:
    """Why this process has no pool, or None. A limit of 0 is a choice, not a reason."""
    if not _pool.IS_SUPPORTED:
        return "it needs Linux"
    if _has_kernels:
        return None
    return backends.missing_reason("lcw_weight", "cpp", "cpu") or "_C.abi3.so is an older build"


def start() -> None:
    """Set the limit that LCW_OPS_MEMORY_POOL asks for. Called once, after the extensions are loaded."""
    global _has_kernels
    # Another thread may be importing lcw_ops._torch, so its names cannot be used here to ask whether there is a kernel.
    with contextlib.suppress(NotImplementedError):
        _set_least_pooled(_NEVER)
        _has_kernels = _pool.IS_SUPPORTED
    text = os.environ.get("LCW_OPS_MEMORY_POOL", "")
    try:
        limit = parse_size(text) if text else None
    except ValueError as error:
        # Importing never fails.
        warn(f"LCW_OPS_MEMORY_POOL: {error} The pool has its default size.")
        limit = None
    set_memory_pool_limit(limit)


def parse_size(text: str) -> int:
    """The number of bytes in ``0``, ``1000000``, ``500MB`` or ``1.5GiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = None if match is None else next((u for u in UNITS if u.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size; expected 0, a number of bytes, or a size such as 500MB or 4GiB.")
    return int(float(match[1]) * UNITS[unit])


_set_least_pooled = library.get_overload("set_least_pooled", "cpp")
