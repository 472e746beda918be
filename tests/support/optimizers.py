"""An oracle of activated SGD and AdamW, written element by element, and helpers for the tests of both optimizers.

The oracle follows the formulas of activated gradients (f(g) is ``activated`` below) and torch's documentation. In
float64 it gives the exact result. In a lower dtype it is eager torch, whose error is the yardstick for ours.
"""

import math

import pytest
import torch
from torch import nn

from lcw_ops import optim

KINDS = ("arctan", "tanh", "log")
SHAPES = ((), (1,), (7, 5), (64,), (3, 0), (2, 3, 5))
PAIRS = {"SGD": (optim.SGD, torch.optim.SGD), "AdamW": (optim.AdamW, torch.optim.AdamW)}


def activated(gradient, kind, alpha, beta):
    x = beta * gradient
    return alpha * {"arctan": torch.atan, "tanh": torch.tanh, "log": lambda x: x.sign() * torch.log1p(x.abs())}[kind](x)


class Oracle:
    """One parameter in ``dtype``. A gradient that is None makes no step."""

    def __init__(self, param, dtype=torch.float64):
        self.param, self.state, self.count = param.detach().to(dtype, copy=True), {}, 0

    def step(self, gradient, **options):
        if gradient is not None:
            self.count += 1
            self._step(gradient.detach().to(self.param.dtype), **options)


class SGDOracle(Oracle):
    def _step(
        self,
        g,
        lr=1e-3,
        momentum=0,
        dampening=0,
        weight_decay=0,
        nesterov=False,
        maximize=False,
        gradient_activation="arctan",
        alpha=0.1,
        beta=20.0,
        activate="gradient",
    ):
        function = gradient_activation, alpha, beta
        g = -g if maximize else g
        d = (activated(g, *function) if activate == "gradient" else g) + weight_decay * self.param
        if momentum:
            old = self.state.get("momentum_buffer")
            v = self.state["momentum_buffer"] = d if old is None else momentum * old + (1 - dampening) * d
            d = d + momentum * v if nesterov else v
        self.param = self.param - lr * (activated(d, *function) if activate == "momentum" else d)


class AdamWOracle(Oracle):
    def _step(
        self,
        g,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        amsgrad=False,
        maximize=False,
        gradient_activation="arctan",
        alpha=0.1,
        beta=15.0,
    ):
        g = activated(-g if maximize else g, gradient_activation, alpha, beta)
        zeros = torch.zeros_like(g)
        beta1, beta2 = betas
        w = self.param - lr * weight_decay * self.param
        m = self.state["exp_avg"] = beta1 * self.state.get("exp_avg", zeros) + (1 - beta1) * g
        v = self.state["exp_avg_sq"] = beta2 * self.state.get("exp_avg_sq", zeros) + (1 - beta2) * g * g
        if amsgrad:
            v = self.state["max_exp_avg_sq"] = torch.maximum(self.state.get("max_exp_avg_sq", zeros), v)
        correction = 1 - beta1**self.count, math.sqrt(1 - beta2**self.count)
        self.param = w - lr * (m / correction[0]) / (v.sqrt() / correction[1] + eps)


def make_params(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)) for shape in shapes]


def copies(params):
    return [nn.Parameter(param.detach().clone()) for param in params]


def make_gradients(params, step):
    """Gradients with the parameters' strides, over four powers of ten around the bend at 1 / beta."""
    generator = torch.Generator().manual_seed(1000 + step)
    gradients = []
    for param in params:
        size, exponent = (torch.randn(param.shape, generator=generator, dtype=torch.float32) for _ in range(2))
        gradients.append(torch.empty_like(param, requires_grad=False).copy_(size * 10.0 ** (exponent - 1)))
    return gradients


def set_gradients(params, gradients):
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = None if gradient is None else gradient.clone()


def train(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(params, make_gradients(params, step))
        optimizer.step()


def assert_same_bits(params, others):
    for index, (param, other) in enumerate(zip(params, others, strict=True)):
        assert torch.equal(param, other), f"parameter {index} of shape {tuple(param.shape)} differs"


def assert_refused(optimizer, params, error, match):
    before = copies(params)
    with pytest.raises(error, match=match):
        optimizer.step()
    assert_same_bits(params, before)
