"""Every op of the CPU on sizes around every tile, for the sanitizers: ``python calls.py``, in their process.

Results are not looked at: what reads or writes beside its arguments ends the process.
"""

import itertools
import os

import torch

from lcw_ops import functional as F

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SAMPLES = (1, 2, 5, 8, 17, 32, 33, 64, 65, 130)
UNITS = (1, 2, 7, 24, 25, 75)
INPUTS = (1, 2, 3, 15, 16, 33, 64, 65, 129)


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def backward(output: torch.Tensor, *leaves: torch.Tensor) -> None:
    torch.autograd.grad(output, leaves, torch.ones_like(output))


def linear_layers(dtype: torch.dtype, samples: int, n: int, m: int) -> None:
    x, weight, units = leaf(samples, m, dtype=dtype), leaf(n, m, dtype=dtype), leaf(n, dtype=dtype)
    backward(F.lcw_linear(x, weight, units), x, weight, units)
    if m > 1:
        part = leaf(n, m - 1, dtype=dtype)
        backward(F.lcw_linear(x, part, units, basis=True), x, part, units)
    for activation in (None, "relu"):
        angles = leaf(n, m - 1, dtype=dtype)
        backward(F.gmp_linear(x, angles, units, units, activation), x, angles, units)
    for length in (1.0, 1e-6):
        long = (weight.detach() * length).requires_grad_()
        backward(F.weight_norm_linear(x, long, units, units), x, long, units)


def rows(dtype: torch.dtype, n: int, m: int) -> None:
    weight, scale, angles = leaf(n, m, dtype=dtype), leaf(n, dtype=dtype), leaf(n, m - 1, dtype=dtype)
    backward(F.hypersphere_direction(angles), angles)
    backward(F.normalize_scale(weight, scale), weight, scale)
    backward(F.lcw_weight(weight), weight)


def main() -> None:
    for threads, dtype in itertools.product((1, 3), DTYPES):
        torch.set_num_threads(threads)
        for n, m in itertools.product((0, *UNITS), (*INPUTS, 700)):
            rows(dtype, n, m)

        os.environ["LCW_OPS_MATMUL"] = "own"
        for samples, n, m in itertools.product((0, *SAMPLES), UNITS, INPUTS):
            if threads == 1 or (samples + n + m) % 3 == 0:
                linear_layers(dtype, samples, n, m)
    os.environ["LCW_OPS_MATMUL"] = ""
    for samples, n, m in ((40, 300, 70), (40, 70, 300), (20, 700, 900), (100, 500, 1300)):
        linear_layers(torch.float32, samples, n, m)
    print("every call came back")


if __name__ == "__main__":
    main()
