"""The tests of activated gradients that every GPU backend runs in its own file: on lists, and inside optimizer steps.

f is the activation (``activated`` below). Exact results come from the same formulas in a wider dtype. The allowed error
is twice that of eager torch in the same dtype, plus one ulp of the result's scale. f itself must be accurate in every
element.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from support.numerics import as_exact, needs_more_digits

KINDS = ("arctan", "tanh", "log")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Sizes around those that a block of each dtype takes, on the emulator and on a GPU.
SIZES = (1, 2, 7, 16, 17, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4096, 4099, 8195)
GUARD = 77.0

SGD = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "is_first": False,
    "on_momentum": False,
}
ADAMW = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 1e-2,
    "eps": 1e-8,
    "amsgrad": False,
    "maximize": False,
}
ACTIVATION = {"kind": "arctan", "alpha": 0.1, "beta": 20.0}


class Ops(NamedTuple):
    """The functions to test, with the arguments of the registered ops."""

    activate: Callable
    sgd_step: Callable
    adamw_step: Callable


def activated(xp, gradient, kind, alpha, beta):
    """f(gradient); ``xp`` is torch, or numpy for exact numbers."""
    x = beta * gradient
    if kind == "log":
        return alpha * (xp.sign(x) * xp.log1p(xp.abs(x)))
    return alpha * {"arctan": xp.arctan, "tanh": xp.tanh}[kind](x)


def sgd(xp, param, gradient, buffer, options, activation):
    """(param, buffer) after a step."""
    gradient = -gradient if options["maximize"] else gradient
    d = gradient if options["on_momentum"] else activated(xp, gradient, **activation)
    d = d + options["weight_decay"] * param
    step = d
    if options["momentum"]:
        buffer = d if options["is_first"] else options["momentum"] * buffer + (1 - options["dampening"]) * d
        step = d + options["momentum"] * buffer if options["nesterov"] else buffer
    if options["on_momentum"]:
        step = activated(xp, step, **activation)
    return param - options["lr"] * step, buffer


def adamw(xp, param, gradient, first, second, most, step, options, activation):
    """(param, exp_avg, exp_avg_sq, max_exp_avg_sq) after a step."""
    beta1, beta2 = options["beta1"], options["beta2"]
    gradient = activated(xp, -gradient if options["maximize"] else gradient, **activation)
    param = param * (1 - options["lr"] * options["weight_decay"])
    first = first + (gradient - first) * (1 - beta1)
    second = beta2 * second + (1 - beta2) * gradient * gradient
    most = xp.maximum(most, second) if options["amsgrad"] else most
    root = xp.sqrt(most if options["amsgrad"] else second)
    # In 1 - beta^t digits cancel, so the exact step computes it in a wider dtype.
    bias1, bias2 = (1 - (np.longdouble(b) if xp is np else b) ** step for b in (beta1, beta2))
    denominator = root / bias2**0.5 + options["eps"]
    return param - options["lr"] / bias1 * (first / denominator), first, second, most


def assert_exact(name: str, actual: list[Tensor], eager: list[Tensor], exact: list[np.ndarray]) -> None:
    dtype = actual[0].dtype
    actual, eager = (as_exact(torch.cat([t.flatten() for t in tensors]).cpu()) for tensors in (actual, eager))
    exact = np.concatenate([array.ravel() for array in exact])
    assert np.isfinite(exact).all()
    allowed = 2 * np.abs(eager - exact).max() + torch.finfo(dtype).eps * np.abs(exact).max()
    error = np.abs(actual - exact).max()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


class Carved:
    """Tensors in one storage, each ``behind`` elements after a multiple of 16 bytes, with the number GUARD between."""

    def __init__(self, sizes, behind, dtype, device):
        unit = 16 // dtype.itemsize
        starts, end = [], unit
        for size, own in zip(sizes, behind, strict=True):
            starts.append(end + own)
            end = (starts[-1] + size + unit) // unit * unit + unit
        self.storage = torch.full((end,), GUARD, dtype=dtype, device=device)
        self.tensors = [self.storage[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    def fill(self, make):
        for tensor in self.tensors:
            tensor.copy_(make(tensor.numel()))
        return self.tensors

    def assert_guards_stand(self):
        outside = torch.ones_like(self.storage, dtype=torch.bool)
        for tensor in self.tensors:
            start = tensor.storage_offset()
            outside[start : start + tensor.numel()] = False
        assert (self.storage[outside] == GUARD).all(), "written outside of the tensors"


def gradients(size):
    """Gradients over six powers of ten around 1 / beta, where f bends, with both signs."""
    magnitude = 10.0 ** torch.empty(size, dtype=torch.float64).uniform_(-5, 1)
    return magnitude * torch.randn(size, dtype=torch.float64).sign()


def weights(size):
    return torch.randn(size, dtype=torch.float64)


def second_moments(size):
    return torch.rand(size, dtype=torch.float64) * 1e-2 + 1e-6


def exactly(tensors):
    return [as_exact(tensor.cpu()) for tensor in tensors]


class SgdCase:
    """One step of SGD over a list, the expected results, and the check."""

    def __init__(self, sizes, dtype, device, behind=(0, 0, 0), activation=ACTIVATION, **options):
        self.options, self.activation = {**SGD, **options}, activation
        self.carved = [Carved(sizes, [own] * len(sizes), dtype, device) for own in behind]
        makers = (weights, gradients, weights)
        self.params, self.grads, self.buffers = (c.fill(make) for c, make in zip(self.carved, makers, strict=True))
        if not self.options["momentum"]:
            self.buffers = []
        before = [[tensor.clone() for tensor in tensors] for tensors in (self.params, self.grads, self.buffers)]
        if self.options["is_first"]:
            for buffer in self.buffers:
                buffer.fill_(math.nan)
        self.before = before[1]
        before[2] = before[2] or before[0]
        self.eager = [sgd(torch, *one, self.options, activation) for one in zip(*before, strict=True)]
        wide = [exactly(tensors) for tensors in before]
        self.exact = [sgd(np, *one, self.options, activation) for one in zip(*wide, strict=True)]

    def run(self, ops):
        ops.sgd_step(self.params, self.grads, self.buffers, *self.options.values(), *self.activation.values())
        return self

    def check(self):
        results = (self.params, self.buffers) if self.buffers else (self.params,)
        for i, actual in enumerate(results):
            assert_exact(f"sgd {i}", actual, [e[i] for e in self.eager], [e[i] for e in self.exact])
        assert all(map(torch.equal, self.grads, self.before)), "gradients were written"
        for carved in self.carved:
            carved.assert_guards_stand()


class AdamWCase:
    """One step of AdamW over a list, in which the counts of steps differ from tensor to tensor."""

    def __init__(self, sizes, dtype, device, behind=(0,) * 5, activation=ACTIVATION, steps_device="cpu", **options):
        self.options, self.activation = {**ADAMW, **options}, activation
        self.carved = [Carved(sizes, [own] * len(sizes), dtype, device) for own in behind]
        makers = (weights, gradients, weights, second_moments, second_moments)
        self.lists = [carved.fill(make) for carved, make in zip(self.carved, makers, strict=True)]
        self.steps = [
            torch.tensor(float(step), device=steps_device)
            for step in itertools.islice(itertools.cycle((1, 2, 2, 100, 30000)), len(sizes))
        ]
        before = [[tensor.clone() for tensor in tensors] for tensors in self.lists]
        self.before = before[1]
        steps = [step.item() for step in self.steps]
        self.eager = [adamw(torch, *one, self.options, activation) for one in zip(*before, steps, strict=True)]
        wide = [exactly(tensors) for tensors in before]
        self.exact = [adamw(np, *one, self.options, activation) for one in zip(*wide, steps, strict=True)]
        self.untouched = before[4]

    def run(self, ops):
        *lists, maxima = self.lists
        maxima = maxima if self.options["amsgrad"] else []
        ops.adamw_step(*lists, maxima, self.steps, *self.options.values(), *self.activation.values())
        return self

    def check(self):
        params, grads, first, second, most = self.lists
        for i, actual in enumerate((params, first, second, most)):
            assert_exact(f"adamw {i}", actual, [e[i] for e in self.eager], [e[i] for e in self.exact])
        assert all(map(torch.equal, grads, self.before)), "gradients were written"
        if not self.options["amsgrad"]:
            assert all(map(torch.equal, most, self.untouched))
        for carved in self.carved:
            carved.assert_guards_stand()


class GradientActivationKernels:
    """A test file derives its class from this, and sets ``ops`` and the numbers below."""

    ops: Ops
    # The largest error in ulp of f / alpha: the kernel's own error, and two roundings each from alpha and beta.
    most_ulp: float
    # Numbers of tensors that are too many for one launch: of f in four dtypes, and of an optimizer's step.
    many, many_steps = 300, 140

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sizes_and_alignments(self, kind, dtype, device):
        needs_more_digits(dtype)
        behind = [i % (16 // dtype.itemsize) for i in range(len(SIZES))]
        carved = Carved(SIZES, behind, dtype, device)
        results = carved.fill(gradients)
        before = [tensor.clone() for tensor in results]
        self.ops.activate(results, kind, 0.1, 20.0)
        eager = [activated(torch, tensor, kind, 0.1, 20.0) for tensor in before]
        exact = [activated(np, tensor, kind, 0.1, 20.0) for tensor in exactly(before)]
        for one in zip(results, eager, exact, strict=True):
            assert_exact(f"{kind} of {one[0].numel()}", *([item] for item in one))
        carved.assert_guards_stand()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_every_element_is_accurate(self, kind, dtype, device):
        """The relative error is small from the smallest normal number to the largest that beta does not overflow."""
        needs_more_digits(dtype)
        info = torch.finfo(dtype)
        span = torch.linspace(math.log10(info.tiny * 10), math.log10(info.max / 100), 4000, dtype=torch.float64)
        bend = torch.linspace(-3, 1, 8000, dtype=torch.float64)
        result = torch.cat([10.0**span, -(10.0**bend)]).to(device, dtype)
        exact = activated(np, exactly([result])[0], kind, 0.1, 20.0)
        self.ops.activate([result], kind, 0.1, 20.0)
        relative = np.abs(exactly([result])[0] - exact) / np.abs(exact)
        assert relative.max() <= self.most_ulp * info.eps

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_special_values(self, kind, dtype, device):
        values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0] * 4, dtype=dtype, device=device)
        self.ops.activate([values], kind, 0.25, 20.0)
        bound = {"arctan": 0.25 * math.pi / 2, "tanh": 0.25, "log": math.inf}[kind]
        wanted = torch.tensor([math.nan, bound, -bound, 0.0, 0.0] * 4, dtype=dtype)
        torch.testing.assert_close(values.cpu(), wanted, equal_nan=True)

    def test_many_tensors_of_every_dtype(self, device):
        """The list is longer than one launch takes, and has empty tensors."""
        tensors = [
            gradients(i % 5).to(device, dtype)
            for i, dtype in zip(range(self.many), itertools.cycle((torch.float32,) * 8 + DTYPES), strict=False)
        ]
        results = [tensor.clone() for tensor in tensors]
        self.ops.activate(results, "tanh", 0.1, 20.0)
        for result, tensor in zip(results, tensors, strict=True):
            exact = 0.1 * torch.tanh(20 * tensor.double())
            torch.testing.assert_close(result.double(), exact, rtol=8 * torch.finfo(result.dtype).eps, atol=0)
        empty = [torch.empty(0, device=device)]
        self.ops.activate(empty, "tanh", 0.1, 20.0)
        self.ops.sgd_step(empty, empty, empty, *SGD.values(), *ACTIVATION.values())
        steps = [torch.tensor(1.0)]
        self.ops.adamw_step(empty, empty, empty, empty, [], steps, *ADAMW.values(), *ACTIVATION.values())

    def test_views_of_one_flat_buffer(self, device):
        """Views that are neighbours in memory are in another order in the list, and one is missing."""
        flat = gradients(5000).to(device, torch.float32)
        wanted, left_out = flat.clone(), flat[100:1300].clone()
        self.ops.activate([wanted], "arctan", 0.1, 20.0)
        parts = list(flat.split([100, 1200, 1, 699, 3000]))
        del parts[1]
        self.ops.activate(parts[::-1], "arctan", 0.1, 20.0)
        wanted[100:1300] = left_out
        assert torch.equal(flat, wanted)

    def test_bits_depend_on_the_number_alone(self, device):
        """The bits do not depend on a number's address, its list or its neighbours."""
        values = gradients(2500)
        for dtype in DTYPES:
            alone = values.to(device, dtype)
            carved = Carved([2500] * 6, range(6), dtype, device)
            self.ops.activate(carved.fill(lambda _: values), "arctan", 0.1, 20.0)
            self.ops.activate([alone], "arctan", 0.1, 20.0)
            assert all(torch.equal(tensor, alone) for tensor in carved.tensors)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_steps_in_every_dtype(self, kind, dtype, device):
        needs_more_digits(dtype)
        activation = ACTIVATION | {"kind": kind}
        sizes = (1, 5, 1024, 1030)
        for on_momentum in (False, True):
            SgdCase(
                sizes, dtype, device, activation=activation, weight_decay=0.1, on_momentum=on_momentum
            ).run(self.ops).check()  # fmt: skip
        AdamWCase(sizes, dtype, device, activation=activation, eps=1e-4).run(self.ops).check()

    @pytest.mark.parametrize("on_momentum", [False, True])
    @pytest.mark.parametrize("nesterov", [False, True])
    @pytest.mark.parametrize("is_first", [False, True])
    def test_every_option_of_sgd(self, on_momentum, nesterov, is_first, device):
        same = {"on_momentum": on_momentum, "nesterov": nesterov, "is_first": is_first}
        for options in ({}, {"maximize": True}, {"weight_decay": 0.3}, {"dampening": 0.4}):
            SgdCase((33, 2), torch.float32, device, **same, **options).run(self.ops).check()

    def test_sgd_without_momentum(self, device):
        for on_momentum in (False, True):
            options = {"momentum": 0.0, "on_momentum": on_momentum, "weight_decay": 0.1}
            SgdCase((3, 1500), torch.float32, device, **options).run(self.ops).check()

    @pytest.mark.parametrize("amsgrad", [False, True])
    @pytest.mark.parametrize("maximize", [False, True])
    def test_every_option_of_adamw(self, amsgrad, maximize, device):
        same = {"amsgrad": amsgrad, "maximize": maximize}
        for options in ({}, {"weight_decay": 0.0}, {"beta1": 0.0}, {"beta2": 0.0, "eps": 1e-3}, {"lr": 0.0}):
            AdamWCase((33, 2, 5), torch.float32, device, **same, **options).run(self.ops).check()

    @pytest.mark.parametrize("behind", [(1,) * 5, (1, 0, 2, 3, 1), (0, 0, 0, 0, 1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_steps_of_arrays_with_different_alignments(self, behind, dtype, device):
        for size in (3, 2100):
            SgdCase((size,) * 2, dtype, device, behind=behind[:3]).run(self.ops).check()
            AdamWCase((size,) * 2, dtype, device, behind=behind, amsgrad=True).run(self.ops).check()

    def test_steps_of_many_tensors(self, device):
        sizes = [i % 4 + 1 for i in range(self.many_steps)]
        SgdCase(sizes, torch.float32, device).run(self.ops).check()
        AdamWCase(sizes, torch.float32, device).run(self.ops).check()

    def test_counters_on_the_device(self, device, counters_on_device):
        for sizes in ((7, 3), (3,) * 8):
            AdamWCase(sizes, torch.float32, device, steps_device=device, amsgrad=True).run(self.ops).check()

    def test_a_nan_stays_in_its_element(self, device):
        sgd_case, adamw_case = SgdCase((40,), torch.float32, device), AdamWCase((40,), torch.float32, device)
        for grads in (sgd_case.grads, adamw_case.lists[1]):
            grads[0][3] = math.nan
        for case, results in ((sgd_case, [sgd_case.params]), (adamw_case, adamw_case.lists[:1])):
            case.run(self.ops)
            for (tensor,) in results:
                assert tensor[3].isnan()
                assert tensor.isnan().sum() == 1

    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_tiny_second_moments_are_not_zero(self, amsgrad, device):
        """The moments are subnormal, and eps is 0."""
        w, g, m, v = (torch.full((8,), value, device=device) for value in (1.0, 0.0, 1e-20, 1e-40))
        options = ADAMW | {"eps": 0.0, "amsgrad": amsgrad, "weight_decay": 0.0}
        exact = adamw(np, *exactly([w, g, m, v, v]), 1, options, ACTIVATION)[0]
        maxima = [v.clone()] if amsgrad else []
        steps = [torch.tensor(1.0)]
        self.ops.adamw_step([w], [g], [m], [v], maxima, steps, *options.values(), *ACTIVATION.values())
        torch.testing.assert_close(w.cpu().double(), torch.from_numpy(exact.astype(np.float64)), rtol=1e-3, atol=0)
