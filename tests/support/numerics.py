"""The rule that judges every backend (docs/numerics.md), and inputs with hostile memory layouts."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@functools.cache
def exactness_of_matmul(rows: int, width: int) -> float:
    """How many times as exact torch's sums of ``width`` float32 products are as sums in order; at least 1.

    For a few rows some processors' BLAS adds up the lanes of a vector in the end, so that each lane has a sixteenth of
    the sum. Lanes that are independent make the error of a sum up to 4 times smaller.
    """
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, width, generator=generator), torch.randn(1024, width, generator=generator)
    products = x.numpy()[:, None] * w.numpy()
    exact = products.sum(-1, dtype=np.float64)
    in_order = np.cumsum(products, -1, dtype=np.float32)[..., -1]
    by_torch = (x @ w.T).double().numpy() - x.double().numpy() @ w.double().numpy().T
    return max(1.0, float(np.sqrt(np.square(in_order - exact).mean() / max(np.square(by_torch).mean(), 1e-300))))


def assert_as_exact_as_eager(name: str, actual: Tensor, eager: Tensor, exact: Tensor, allowance: float = 1.0) -> None:
    """The error against float64 is at most twice that of eager torch in this dtype, plus one ulp of the scale.

    ``allowance``: how many times as exact eager's sums are as sums in order, from :func:`exactness_of_matmul`.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed = 2 * allowance * (eager.double() - exact).abs().max() + ulp
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"{name}: error {error:.3g}, eager torch's rule allows {allowed:.3g}"


def assert_by_the_rule(name: str, actual: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence) -> None:
    """The same rule over several draws of a result, also in float64. The exact values are numpy arrays."""
    dtype = actual[0].dtype
    for tensor, expected in zip(actual, exact, strict=True):
        assert tensor.shape == expected.shape, f"{name}: shape {tuple(tensor.shape)}, expected {expected.shape}"
    actual, eager = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (actual, eager))
    exact = np.concatenate([array.reshape(-1) for array in exact])
    assert actual.isfinite().all(), f"{name} is not finite"
    if dtype != torch.float64:
        assert_as_exact_as_eager(name, actual, eager, torch.from_numpy(exact))
    elif len(exact):
        allowed = 2 * np.abs(as_exact(eager) - exact).max() + torch.finfo(dtype).eps * np.abs(exact).max()
        error = np.abs(as_exact(actual) - exact).max()
        assert error <= allowed, f"{name}: error {error:.3g}, eager torch's rule allows {allowed:.3g}"


def as_exact(tensor: Tensor) -> np.ndarray:
    """The tensor as a numpy array in float64; a float64 tensor in long double."""
    array = tensor.detach().double().numpy()
    return array.astype(np.longdouble) if tensor.dtype == torch.float64 else array


def needs_more_digits(dtype: torch.dtype) -> None:
    if dtype == torch.float64 and np.finfo(np.longdouble).eps > torch.finfo(dtype).eps / 1000:
        pytest.skip("this processor's long double is not wider than float64")


def evaluate(function: Callable, arguments: dict[str, Tensor], grad_output: Tensor, **options) -> dict[str, Tensor]:
    """The result and every gradient, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    output = function(**leaves, **options)
    gradients = torch.autograd.grad(output, leaves.values(), grad_output)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def saved_tensors(function: Callable) -> tuple[Tensor, list[Tensor]]:
    """The result of a call, and the tensors that autograd keeps for its backward."""
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        result = function()
    return result, saved


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def hostile_layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in every memory layout that a careless kernel would misread."""
    padded = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
    inner = padded[tuple(slice(1, size + 1) for size in tensor.shape)]
    strided = tensor.new_full([2 * size for size in tensor.shape], torch.nan)[(slice(None, None, 2),) * tensor.dim()]
    layouts = {"sliced": inner.copy_(tensor), "strided": strided.copy_(tensor)}
    if tensor.dim() >= 2:
        layouts["transposed"] = tensor.mT.contiguous().mT
    return layouts
