"""Arguments for orthogonal_filter, scaled like a network that trains."""

import torch
from torch import Tensor

from lcw_ops import functional as F

NAMES = ["h0", "weight", "bias", "alpha", "beta", "inputs"]


def make_filter(kind, depth, width, dtype=torch.float32, device="cpu") -> Tensor:
    if kind == "permutation":
        return torch.randperm(width, device=device)
    shape = (depth, width, width) if kind == "per_layer" else (width, width)
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64, device=device)).Q.to(dtype)


def make_arguments(rows, width, depth, shared=False, dtype=torch.float32, device="cpu") -> list[Tensor]:
    """h0, weight, bias, alpha, beta, inputs; beta is about 1 / depth, alpha = 1 - beta."""
    options = {"dtype": dtype, "device": device}
    beta = (0.5 + torch.rand(depth, **options)) / max(depth, 1)
    tensors = [
        torch.randn(rows, width, **options),
        torch.randn(*(() if shared else (depth,)), width, width, **options) / width**0.5,
        torch.randn(*(() if shared else (depth,)), width, **options),
        1 - beta,
        beta,
        torch.randn(depth, rows, width, **options),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def run(arguments, filter, **options) -> Tensor:
    h0, weight, bias, alpha, beta, inputs = arguments
    return F.orthogonal_filter(h0, weight, bias, filter, alpha, beta, inputs, **options)
