"""A loop of multiply-adds on numbers in registers: the ceiling of every CPU kernel, for the benchmarks."""

import time

import torch

from lcw_ops.ops import library

NAME = "multiply_adds"

library.declare(NAME, "(Tensor factors, int rounds) -> int", backends=("cpp",))

# About 2 ms on one core.
ROUNDS = 1 << 19


def multiply_add_rate(repeats: int = 10) -> float | None:
    """Float32 operations per second, two for each multiply-add, on torch's threads: best of ``repeats``.

    Returns None without the C++ kernels.
    """
    if not library.is_implemented(NAME, "cpp"):
        return None
    factors = torch.tensor([0.5, 1.0])

    def rate() -> float:
        start = time.perf_counter()
        operations = torch.ops.lcw_ops.multiply_adds.cpp(factors, ROUNDS)
        return operations / (time.perf_counter() - start)

    return max(rate() for _ in range(repeats))
