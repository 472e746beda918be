"""The rule every backend is judged by (design: Numerics), and inputs with hostile memory layouts."""

import torch
from torch import Tensor


def assert_as_exact_as_eager(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Against the float64 result: at most twice the error of eager torch in this dtype, plus one ulp of the scale."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed = 2 * (eager.double() - exact).abs().max() + ulp
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"{name}: error {error:.3g}, eager torch's rule allows {allowed:.3g}"


def hostile_layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in every layout that a careless kernel reads wrongly."""
    padded = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
    inner = padded[tuple(slice(1, size + 1) for size in tensor.shape)]
    strided = tensor.new_full([2 * size for size in tensor.shape], torch.nan)[(slice(None, None, 2),) * tensor.dim()]
    layouts = {"sliced": inner.copy_(tensor), "strided": strided.copy_(tensor)}
    if tensor.dim() >= 2:
        layouts["transposed"] = tensor.mT.contiguous().mT
    return layouts
