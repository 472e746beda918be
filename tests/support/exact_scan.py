"""Inputs of a scan over depth, and its exact states in numpy, layer by layer."""

import numpy as np
import torch

EXACT_ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda a: np.maximum(a, 0),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "identity": lambda a: a,
}


def normal(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def scale(steps, dtype, per_layer=True):
    return (1 - torch.rand(steps if per_layer else 1, dtype=torch.float64) / max(steps, 2)).to(dtype)


def exact(tensor):
    """The numbers in numpy's highest precision, in which float64 results are judged."""
    return tensor.cpu().double().numpy().astype(np.longdouble)


def exact_scan(first, source, filter, alpha):
    """The exact states, layer by layer."""
    states = [exact(first)]
    alpha = np.broadcast_to(exact(alpha), len(source))
    if not filter.is_floating_point():
        index = filter.cpu().numpy()
    else:
        cosine, sine = exact(filter).reshape(2, -1)
        partner = np.minimum(np.arange(len(cosine)) ^ 1, len(cosine) - 1)
    for scale_l, source_l in zip(alpha, source, strict=True):
        state = states[-1]
        turned = state[:, index] if not filter.is_floating_point() else cosine * state + sine * state[:, partner]
        states.append(scale_l * turned + source_l)
    return np.stack(states)
