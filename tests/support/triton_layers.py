"""Random inputs and comparisons for the Triton kernels of GmP and weight normalization."""

import math

import torch

from support.numerics import assert_as_exact_as_eager

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (samples, units, features) of layers: sizes of 1, 64 and 65 samples, and more units than a tile holds.
LAYER_SHAPES = [(1, 1, 1), (1, 3, 2), (2, 1, 3), (64, 2, 7), (65, 2, 7), (7, 33, 5)]
EMPTY_SHAPES = [(0, 3, 4), (3, 0, 4), (0, 0, 1), (70, 0, 4)]


def normal(*shape, dtype=torch.float32, device):
    return torch.randn(shape, dtype=torch.float64, device=device).to(dtype)


def wide(*tensors):
    return [tensor.double() for tensor in tensors]


def compare(name, actual, eager, exact, terms):
    """Judge one or more results against eager torch in the same dtype and the float64 reference."""
    if isinstance(actual, torch.Tensor):
        actual, eager, exact = (actual,), (eager,), (exact,)
    for i, triple in enumerate(zip(actual, eager, exact, strict=True)):
        if triple[0].dtype == torch.float64:
            # The reference is float64 too. It rounds differently, because it adds and multiplies in another order.
            scale = max(1.0, triple[2].abs().max().item()) if triple[2].numel() else 1.0
            bound = 4 * math.sqrt(max(terms, 4)) * torch.finfo(torch.float64).eps * scale
            torch.testing.assert_close(triple[0], triple[2], rtol=0, atol=bound, msg=f"{name} {i}")
        else:
            assert triple[0].dtype == triple[1].dtype
            assert_as_exact_as_eager(f"{name} {i}", *triple)


def gradients(function, arguments, grad_output):
    """The output of ``function`` and the gradients of its arguments."""
    leaves = [argument.detach().requires_grad_() for argument in arguments]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def assert_only_needed(backward, arguments):
    """A gradient requested alone has the bits that it has if all four are requested. The other three are empty."""
    everything = backward(*arguments, True, True, True, True)
    for i in range(4):
        one = backward(*arguments, *(j == i for j in range(4)))
        assert torch.equal(one[i], everything[i])
        assert all(one[j].shape == (0,) for j in range(4) if j != i)


def use_short_programs(monkeypatch, kernels):
    """Let a program hold only 32 columns of a row (float64: 16), and let several programs share a product's columns.

    A step of a product has as many columns too: a compiled tl.dot takes at least 16.
    """
    from lcw_ops.kernels import common

    constants = {"ROW_BYTES": 128, "WARP_LANES": 16, "TILE_ROW_BYTES": 128, "LEAST_STEPS": 1, "LEAST_SUMMED_ROWS": 8}
    # As on a GPU, a program has 4 warps of 16 lanes if short rows share it.
    constants["LEAST_ELEMENTS"] = 64
    for module in (common, kernels):
        for name in constants.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, constants[name])
    monkeypatch.setattr(kernels, "device_facts", lambda device: common.Device(1, 227 * 1024, False))
