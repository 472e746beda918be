"""Call every CPU op on sizes around those of all tiles, in a process with a sanitizer: ``python calls.py``.

Results are not checked: a read or write outside of the arguments ends the process.
"""

import itertools
import os

import torch

from lcw_ops import functional as F
from lcw_ops import optim

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


def gradients(dtype: torch.dtype) -> None:
    sizes = (0, 1, 3, 7, 8, 63, 64, 65, 1000, 40_000)
    for kind in ("arctan", "tanh", "log"):
        flat = torch.randn(sum(sizes) + len(sizes)).to(dtype)
        # Place the tensors one number apart: they are not aligned, and have no room behind them.
        starts = [sum(sizes[:i]) + i for i in range(len(sizes))]
        tensors = [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        F.gradient_activation_([*tensors, torch.randn(9, 14).to(dtype)[::2]], kind)
        params = [torch.nn.Parameter(tensor) for tensor in tensors]
        for options in ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "activate": "momentum"}):
            step(optim.SGD(params, 0.1, gradient_activation=kind, **options), params)
        for amsgrad in (False, True):
            step(optim.AdamW(params, amsgrad=amsgrad, gradient_activation=kind), params)


def step(optimizer: torch.optim.Optimizer, params: list[torch.Tensor]) -> None:
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()


def sweeps(dtype: torch.dtype, layers: int, samples: int, width: int) -> None:
    """Call the parts of a sweep over all layers, with every kind of filter, and each argument given or missing."""
    shape = (layers, samples, width)
    product, term = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    one, each = torch.rand(1, dtype=dtype), torch.rand(layers, dtype=dtype)
    angles = torch.rand((width + 1) // 2, dtype=torch.float64)
    sine = torch.stack((angles.sin(), -angles.sin()), dim=1).flatten()[:width]
    rotations = torch.cat((angles.cos().repeat_interleave(2)[:width], sine))
    for filter in (torch.randperm(width), torch.arange(width).roll(1), rotations):
        states = torch.randn(layers + 1, samples, width, dtype=dtype)
        for bias in (None, torch.randn(width, dtype=dtype), torch.randn(layers, width, dtype=dtype)):
            torch.ops.lcw_ops.parallel_depth_sweep_.cpp(states, product, bias, None, filter, each, one, "tanh")
            torch.ops.lcw_ops.parallel_depth_sweep_.cpp(states, product, bias, term, filter, one, each, "relu")
        torch.ops.lcw_ops.parallel_depth_sweep_.cpp(states, None, None, None, filter, one, one, "identity")
        torch.ops.lcw_ops.parallel_depth_adjoint_.cpp(states, None, None, filter, one, None, None)
        torch.ops.lcw_ops.parallel_depth_adjoint_.cpp(states, product, term, filter, each, term, term.clone())
    for activation, derivative in itertools.product(("tanh", "relu", "sigmoid", "identity"), (False, True)):
        torch.ops.lcw_ops.parallel_depth_activate_.cpp(product, None, term, each, activation, derivative)


def main() -> None:
    for threads, dtype in itertools.product((1, 3), DTYPES):
        torch.set_num_threads(threads)
        gradients(dtype)
        for n, m in itertools.product((0, *UNITS), (*INPUTS, 700)):
            rows(dtype, n, m)
        os.environ["LCW_OPS_MATMUL"] = "own"
        for samples, n, m in itertools.product((0, *SAMPLES), UNITS, INPUTS):
            if threads == 1 or (samples + n + m) % 3 == 0:
                linear_layers(dtype, samples, n, m)
        for length in (1.0, 100.0):
            x, weight, units = leaf(66, 280, dtype=dtype), leaf(5, 280, dtype=dtype), leaf(5, dtype=dtype)
            huge = (x.detach() * (torch.finfo(dtype).max / 1e3)).requires_grad_()
            long = (weight.detach() * length).requires_grad_()
            for few in (huge[:3], huge):
                backward(F.weight_norm_linear(few, long, units), huge, long, units)
    for threads, dtype in itertools.product((1, 3), (torch.float32, torch.float64)):
        torch.set_num_threads(threads)
        for layers, samples, width in itertools.product((0, 1, 7, 1000), (0, 1, 5), (0, 1, 2, 7, 8, 9, 33, 64)):
            sweeps(dtype, layers, samples, width)
    os.environ["LCW_OPS_MATMUL"] = ""
    for samples, n, m in ((40, 300, 70), (40, 70, 300), (20, 700, 900), (100, 500, 1300)):
        linear_layers(torch.float32, samples, n, m)
    print("every call came back")


if __name__ == "__main__":
    main()
