"""The proof of the recurrence: every depth, width, batch, kind and thread count against float64, to 50,000 layers.

h_l = alpha_l O h_{l-1} + beta_l act(A_l) with A_l = W_l h_{l-1} + b_l + u_l, for L layers, M rows (samples) and N
units. In the time form all steps share one weight. G_l is the gradient of h_l.

Rows are independent, so one net of 33 rows is traced once in float64 and once in float32 (eager torch). The traces
judge the kernel for every number of rows M <= 33: row-wise results are compared with the first M rows, sums over the
samples with the sum over these rows. The rule is that of tests/support/numerics.py. On a few numbers the rule would
depend on chance (one weight has one rounding error, and eager torch's may be 0), so small nets are judged together.

The references are costly, so not every case has every check:
- L = 1, 2, 7: every N and M with 1, 2 and 3 threads, result and all gradients, last state or all states.
- L = 1000: every N and M, result and all gradients; every number of threads with every N and with every M.
- L = 50,000, forward: N = 3, 17 and 64 with a weight per layer and every M; N = 100, 128 and 256, whose weights would
  fill 2 to 13 GB, in the time form (one weight) and with M = 1 and 5.
- L = 50,000, result and all gradients: N = 1 with M = 33, N = 16 with M = 1, 5 and 33, N = 64 with M = 5 (there the
  gradients of every 7th layer's weight and bias); in the time form N = 32 with M = 1 and 8.
"""

import itertools
import os
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.guards import between_guards
from support.numerics import hostile_layouts, threads
from support.pairwise import name_of, pairwise
from torch import Tensor

import lcw_ops
from lcw_ops import functional as F
from lcw_ops.ops.orthogonal_filter import op
from lcw_ops.reference.orthogonal_filter import (
    ACTIVATIONS,
    activation_derivative,
    apply_filter,
    apply_filter_transposed,
)

# The references are small products, on one thread. Each test sets the number of threads of its kernel calls.
pytestmark = pytest.mark.usefixtures("kernel_under_test", "on_the_cpu", "one_thread")

WIDTHS = [1, 3, 16, 17, 64, 100, 128, 256]
ROWS = [0, 1, 5, 32, 33]
THREADS = [1, 2, 3]
FILTERS = ["haar", "per_layer", "permutation", "cyclic", "identity"]
NAMES = ["h0", "weight", "bias", "alpha", "beta", "inputs"]
# Gradients with one entry per sample, and those that are sums over the samples.
ROW_WISE = ["h0", "inputs"]

SANITIZED = os.environ.get("LCW_OPS_PROOF_SANITIZED") == "1"

# Nets with few numbers are judged over this many layers, which come from several nets if one net has fewer.
POOLED = 8


@pytest.fixture
def on_the_cpu(device):
    if device.type != "cpu":
        pytest.skip("threads and instruction sets of the CPU kernel; test_orthogonal_filter.py proves the GPU's")


@dataclass
class Net:
    """The arguments of one call and the gradient of its result, with as many rows as any call needs."""

    arguments: dict[str, Tensor]
    filter: Tensor
    activation: str
    grad_output: Tensor  # (L + 1, M, N); without return_states its last entry counts

    def at(self, name, l):
        """The argument of step l; an argument that all steps share has one dimension less."""
        tensor = self.filter if name == "filter" else self.arguments[name]
        per_step = {"weight": 3, "bias": 2, "filter": 3, "inputs": 3}[name]
        return tensor[l] if tensor.dim() == per_step else tensor

    def __call__(self, rows, return_states, segment=None, with_gradients=True):
        """The kernel's result and gradients for the first ``rows`` rows of the batch."""
        narrowed = {"h0": self.arguments["h0"][:rows], "inputs": self.arguments["inputs"][:, :rows]}
        leaves = {
            name: narrowed.get(name, tensor).detach().requires_grad_(with_gradients)
            for name, tensor in self.arguments.items()
        }
        output = F.orthogonal_filter(
            **leaves, filter=self.filter, activation=self.activation, return_states=return_states, segment=segment
        )
        if not with_gradients:
            return output
        grad_output = self.grad_output[:, :rows] if return_states else self.grad_output[-1, :rows]
        return output, dict(zip(NAMES, torch.autograd.grad(output, leaves.values(), grad_output), strict=True))


def make_filter(kind, steps, width):
    if kind == "permutation":
        return torch.randperm(width)
    if kind == "cyclic":
        return torch.arange(width).roll(1)
    if kind == "identity":
        return torch.eye(width)
    if kind == "haar":
        return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q.float()
    few = torch.linalg.qr(torch.randn(min(steps, 8), width, width, dtype=torch.float64)).Q.float()
    return few[torch.arange(steps) % len(few)] if steps else torch.empty(0, width, width)


def make_net(rows, width, steps, filter="haar", activation="tanh", shared=False):
    """Scaled like a network in training: beta about 1 / L, alpha = 1 - beta."""
    beta = (0.5 + torch.rand(steps)) / max(steps, 1)
    depth = () if shared else (steps,)
    arguments = {
        "h0": torch.randn(rows, width),
        "weight": torch.randn(*depth, width, width) / width**0.5,
        "bias": torch.randn(*depth, width),
        "alpha": 1 - beta,
        "beta": beta,
        "inputs": torch.randn(steps, rows, width),
    }
    # Without return_states only the last entry is used. The others are not 0, so a kernel that reads them is caught.
    net = Net(arguments, make_filter(filter, steps, width), activation, torch.randn(steps + 1, rows, width))
    if activation == "relu":
        keep_off_the_kink(net)
    return net


def keep_off_the_kink(net):
    """Shift the inputs so that no pre-activation is so near 0 that rounding decides the slope of ReLU."""
    margin = 1e-3

    def away(l, pre_activation):
        shift = torch.where(pre_activation.abs() < margin, 2 * margin * pre_activation.sign(), 0.0)
        net.arguments["inputs"][l] += shift
        return pre_activation + shift

    for _ in forward_steps(net, torch.float64, away):
        pass


def forward_steps(net, dtype, adjust=lambda l, pre_activation: pre_activation):
    """(state, O h, A) of each step and then the last state, as eager torch computes them in this dtype."""
    act = ACTIVATIONS[net.activation]
    alpha, beta = net.arguments["alpha"].to(dtype), net.arguments["beta"].to(dtype)
    state = net.arguments["h0"].to(dtype)
    for l in range(len(alpha)):
        filter = net.at("filter", l)
        filtered = apply_filter(state, filter.to(dtype) if filter.is_floating_point() else filter)
        weight, bias, step_input = (net.at(name, l).to(dtype) for name in ("weight", "bias", "inputs"))
        pre_activation = adjust(l, state @ weight.mT + bias + step_input)
        yield state, filtered, pre_activation
        state = alpha[l] * filtered + beta[l] * act(pre_activation)
    yield state, None, None


def last_state(net, dtype):
    for state, _, _ in forward_steps(net, dtype):  # noqa: B007
        pass
    return state


class Trace:
    """All states of a net and their gradients, step by step in plain torch. Other gradients are computed from these."""

    def __init__(self, net, dtype, return_states):
        steps, *shape = net.arguments["inputs"].shape
        self.states, self.grad_states = (torch.empty(steps + 1, *shape, dtype=dtype) for _ in range(2))
        self.filtered, self.activated, self.grad_pre = (torch.empty(steps, *shape, dtype=dtype) for _ in range(3))
        alpha, beta = net.arguments["alpha"].to(dtype), net.arguments["beta"].to(dtype)
        for l, (state, filtered, pre_activation) in enumerate(forward_steps(net, dtype)):
            self.states[l] = state
            if l < steps:
                self.filtered[l] = filtered
                self.activated[l] = ACTIVATIONS[net.activation](pre_activation)
                self.grad_pre[l] = beta[l] * activation_derivative(pre_activation, net.activation)
        injected = net.grad_output.to(dtype)
        gradient = self.grad_states[steps] = injected[steps]
        for l in reversed(range(steps)):
            filter, weight = net.at("filter", l), net.at("weight", l).to(dtype)
            self.grad_pre[l] *= gradient
            through_filter = apply_filter_transposed(
                gradient, filter.to(dtype) if filter.is_floating_point() else filter
            )
            gradient = alpha[l] * through_filter + self.grad_pre[l] @ weight
            if return_states:
                gradient = gradient + injected[l]
            self.grad_states[l] = gradient

    def row_wise(self, return_states):
        output = self.states if return_states else self.states[-1]
        return {"output": output, "h0": self.grad_states[0], "inputs": self.grad_pre}

    def sums(self, rows, layers):
        """The gradients of these layers' weights and biases that come from the first ``rows`` rows."""
        grad_pre, states = self.grad_pre[layers, :rows], self.states[:-1][layers, :rows]
        return {"weight": grad_pre.mT @ states, "bias": grad_pre.sum(1)}

    def sums_over_time(self, batches):
        """The gradients of a weight and a bias that all steps share, (N, N, count) and (N, count).

        Each column of ``batches`` (33, count) is one batch of rows. One batch would be too few to judge: an error of a
        state stays in all states that follow, so the terms of a batch's sum do not err independently.
        """
        by_row = {
            "weight": self.grad_pre.permute(1, 2, 0) @ self.states[:-1].transpose(0, 1),
            "bias": self.grad_pre.sum(0),
        }
        return {name: torch.einsum("m...,mb->...b", sums.double(), batches) for name, sums in by_row.items()}

    def scale_sums(self, batches):
        """The gradients of alpha and beta, (L, count). Each column of ``batches`` (33, count) is one batch of rows.

        <G_l, O h_{l-1}> hardly changes from layer to layer, and neither does its error. So the error of a batch counts
        as one number, however many layers there are. Further batches of the same net supply more numbers.
        """
        gradient = self.grad_states[1:]
        return {
            "alpha": (gradient * self.filtered).sum(2).double() @ batches,
            "beta": (gradient * self.activated).sum(2).double() @ batches,
        }


def draw_batches(rows, of, count=32):
    """Batches of ``rows`` out of ``of`` rows, as columns (of, count): the first rows, then random ones.

    The gradient of each random row gets a random sign. It changes no rounding in a row, only how the rows add up.
    """
    chosen = torch.rand(of, count).argsort(0) < rows
    batches = chosen * torch.where(torch.rand(of, count) < 0.5, 1.0, -1.0).double()
    batches[:, 0] = torch.arange(of) < rows
    return batches


class Errors:
    """Collect the largest errors of the kernel (for each call) and of eager torch over several nets, and judge them.

    Eager torch's error is divided by the quantity's largest value. The largest of these ratios over all nets and batch
    sizes counts, because a sum over 5 samples is not rounded better than one over 33.
    """

    def __init__(self):
        self.kernel = defaultdict(float)  # (name, rows, call)
        self.eager, self.scale = defaultdict(float), defaultdict(float)  # (name, rows)

    def add_expected(self, name, rows, eager, exact):
        if exact.numel():
            error, scale = (eager.double() - exact).abs().max().item(), exact.abs().max().item()
            self.eager[name, rows] = max(self.eager[name, rows], error)
            self.scale[name, rows] = max(self.scale[name, rows], scale)

    def add(self, name, rows, call, actual, exact):
        assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
        if exact.numel():
            assert actual.isfinite().all(), f"{call}: {name} is not finite"
            error = (actual.double() - exact).abs().max().item()
            self.kernel[name, rows, call] = max(self.kernel[name, rows, call], error)

    def judge(self, dtype=torch.float32, times_eager=2.0):
        # A build for the sanitizers is not optimized and rounds differently; its purpose is to check addresses.
        times_eager *= 4 if SANITIZED else 1
        relative = defaultdict(float)
        for (name, rows), error in self.eager.items():
            if error:
                relative[name] = max(relative[name], error / self.scale[name, rows])
        for (name, rows, call), error in self.kernel.items():
            allowed = (times_eager * relative[name] + torch.finfo(dtype).eps) * self.scale[name, rows]
            assert error <= allowed, f"{call}: error of {name} {error:.3g}, the rule allows {allowed:.3g}"


def assert_grid(nets, calls, return_states, what):
    """Judge the result and all gradients of every net for each (rows, threads, segment) in ``calls``."""
    errors = Errors()
    for net in nets:
        eager, exact = (Trace(net, dtype, return_states) for dtype in (torch.float32, torch.float64))
        for rows, group in itertools.groupby(calls, key=lambda call: call[0]):
            compare(errors, net, eager, exact, rows, list(group), return_states, what)
    errors.judge()


def compare(errors, net, eager, exact, rows, calls, return_states, what):
    """Compare the calls for the first rows of one net with its traces."""
    results = {}
    for _, thread_count, segment in calls:
        with threads(thread_count):
            call = f"{what}, M={rows}, {thread_count} threads, segment {segment}"
            results[call] = net(rows, return_states, segment)
    in_eager, in_exact = eager.row_wise(return_states), exact.row_wise(return_states)
    for name, expected in in_exact.items():
        errors.add_expected(name, rows, in_eager[name], expected)
        for call, (output, gradients) in results.items():
            errors.add(name, rows, call, output if name == "output" else gradients[name], expected[..., :rows, :])
    batches = draw_batches(rows, of=exact.grad_pre.shape[1])
    in_eager, in_exact = eager.scale_sums(batches), exact.scale_sums(batches)
    for name, expected in in_exact.items():
        errors.add_expected(name, rows, in_eager[name], expected)
        for call, (_, gradients) in results.items():
            errors.add(name, rows, call, gradients[name], expected[:, 0])
    steps, _, width = exact.grad_pre.shape
    if net.arguments["weight"].dim() == 2:
        in_eager, in_exact = eager.sums_over_time(batches), exact.sums_over_time(batches)
        for name, expected in in_exact.items():
            errors.add_expected(name, rows, in_eager[name], expected)
            for call, (_, gradients) in results.items():
                errors.add(name, rows, call, gradients[name], expected[..., 0])
        return
    # Take the layers in parts that fit into memory.
    part = max(1, 2**22 // width**2)
    # If there are very many weights, take every 7th layer, among them the first and the last of 50,000. All layers
    # would take a minute.
    stride = 7 if steps * width**2 > 2**27 else 1
    for first in range(0, steps, part):
        layers = slice(first, first + part, stride)
        in_eager, in_exact = eager.sums(rows, layers), exact.sums(rows, layers)
        for name, expected in in_exact.items():
            errors.add_expected(name, rows, in_eager[name], expected)
            for call, (_, gradients) in results.items():
                errors.add(name, rows, call, gradients[name][layers], expected)


# Every pair of choices. test_every_kind combines all filters, activations and results with each other.
GRID = pairwise(
    steps=[1, 2, 7, 1000], width=WIDTHS, filter=FILTERS, activation=ACTIVATIONS, return_states=[True, False]
)
THREADS_OF_A_THOUSAND = pairwise(width=WIDTHS, rows=ROWS, threads=THREADS)


def make_nets(case, count=1):
    names = ("steps", "width", "filter", "activation")
    return [make_net(max(ROWS), **{name: case[name] for name in names}) for _ in range(count)]


@pytest.mark.parametrize("case", [case for case in GRID if case["steps"] < 1000], ids=name_of)
def test_grid_of_few_layers(case):
    calls = [(*pair, None) for pair in itertools.product(ROWS, THREADS)]
    assert_grid(make_nets(case, max(1, POOLED // case["steps"])), calls, case["return_states"], f"{case}")


@pytest.mark.parametrize("case", [case for case in GRID if case["steps"] == 1000], ids=name_of)
def test_grid_of_a_thousand_layers(case):
    calls = [(one["rows"], one["threads"], None) for one in THREADS_OF_A_THOUSAND if one["width"] == case["width"]]
    assert_grid(make_nets(case), sorted(calls, key=lambda call: call[0]), case["return_states"], f"{case}")


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("return_states", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_every_kind(filter, activation, return_states, shared):
    """All filters, activations and results, over depth and over time, for one, few and many rows."""
    nets = [make_net(max(ROWS), 37 if shared else 19, 6, filter, activation, shared)]
    calls = [(1, 1, None), (1, 3, None), (2, 2, 4), (5, 2, None), (33, 2, None)]
    assert_grid(nets, calls, return_states, f"{filter}, {activation}")


@pytest.mark.parametrize("return_states", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_every_segment_of_a_thousand_layers(return_states, shared):
    net = make_net(33, 35 if shared else 17, 1000, shared=shared)
    eager, exact = (Trace(net, dtype, return_states) for dtype in (torch.float32, torch.float64))
    for rows in (1, 5, 33):
        errors = Errors()
        calls = [(rows, count, segment) for segment in (1, 7, 31, 1000, None) for count in (1, 2)]
        compare(errors, net, eager, exact, rows, calls, return_states, "L=1000")
        errors.judge()


@pytest.mark.parametrize("shared", [False, True])
def test_every_row_count(shared):
    """Every way to deal 0 to 40 rows out to the threads and to vectors of 4, 8 and 16."""
    for width in (5, 16, 33):
        calls = [(*pair, 2) for pair in itertools.product(range(41), THREADS)]
        assert_grid([make_net(40, width, 3, shared=shared)], calls, True, f"L=3, N={width}, shared: {shared}")


ALL_WIDTHS = pairwise(
    lambda shared, width, **_: shared or width < 130,
    shared=[False, True],
    width=[*range(1, 50), 63, 65, 95, 96, 97, 127, 129, 131, 257],
    filter=["permutation", "haar"],
    return_states=[True, False],
)


@pytest.mark.parametrize("shared", [False, True])
def test_every_width(shared):
    """Widths that leave every remainder of a vector, of a tile and of a panel, for few rows and for many."""
    for case in [case for case in ALL_WIDTHS if case["shared"] == shared]:
        net = make_net(12, case["width"], POOLED, filter=case["filter"], shared=shared)
        calls = [(*pair, None) for pair in itertools.product((1, 2, 12), THREADS)]
        assert_grid([net], calls, case["return_states"], f"L={POOLED}, {case}")


# ---- 50,000 layers -------------------------------------------------------------------------------------------------

DEEP = 50_000


@torch.no_grad()
def assert_deep_forward(net, calls):
    errors = Errors()
    eager, exact = last_state(net, torch.float32), last_state(net, torch.float64)
    for rows, thread_count in calls:
        errors.add_expected("output", rows, eager, exact)
        with threads(thread_count):
            call = f"L={DEEP}, N={exact.shape[1]}, M={rows}, {thread_count} threads"
            errors.add("output", rows, call, net(rows, False, with_gradients=False), exact[:rows])
    errors.judge()


THREADS_OF_DEEP_NETS = pairwise(width=[3, 17, 64], rows=ROWS, threads=THREADS)


@pytest.mark.parametrize(
    ("width", "filter", "activation"),
    [
        (3, "identity", "sigmoid"),
        (17, "per_layer", "relu"),
        (64, "haar", "tanh"),
    ],
)
def test_fifty_thousand_layers_forward(width, filter, activation):
    net = make_net(max(ROWS), width, DEEP, filter, activation)
    assert_deep_forward(net, [(one["rows"], one["threads"]) for one in THREADS_OF_DEEP_NETS if one["width"] == width])


@pytest.mark.parametrize(
    ("width", "filter", "activation"),
    [(100, "permutation", "tanh"), (128, "haar", "sigmoid"), (256, "haar", "tanh")],
)
def test_fifty_thousand_steps_of_one_weight_forward(width, filter, activation):
    assert_deep_forward(make_net(5, width, DEEP, filter, activation, shared=True), [(1, 2), (5, 1)])


@pytest.mark.parametrize(
    ("width", "filter", "calls"),
    [
        (1, "identity", [(33, 1, None)]),
        (16, "haar", [(1, 2, None), (5, 1, 224), (33, 2, DEEP)]),
        # Weights and their gradients are 0.8 GB each.
        (64, "permutation", [(5, 2, None)]),
    ],
)
def test_fifty_thousand_layers_backward(width, filter, calls):
    rows = max(rows for rows, *_ in calls)
    assert_grid([make_net(rows, width, DEEP, filter)], calls, False, f"L={DEEP}, N={width}")


def test_fifty_thousand_steps_of_one_weight_backward():
    net = make_net(8, 32, DEEP, shared=True)
    assert_grid([net], [(1, 2, None), (8, 1, None), (8, 2, None)], True, f"T={DEEP}")


# ---- Every other way to call it ------------------------------------------------------------------------------------


def tells_steps(arguments, filter):
    """Whether an argument besides the inputs has one entry per step. A single alpha or beta serves all steps."""
    ranks = {"weight": 3, "bias": 2}
    present = (name for name in ranks if arguments[name] is not None)
    return (
        filter.dim() == 3
        or any(arguments[name].dim() == ranks[name] for name in present)
        or any(arguments[name].numel() != 1 for name in ("alpha", "beta"))
    )


def draw_arguments(case):
    """Plain tensors with the shapes and options of a hypothesis example."""
    rows, width, steps, dtype = case["rows"], case["width"], case["steps"], case["dtype"]

    def tensor(name, *shape):
        return torch.randn(*(() if case["shared"][name] else (steps,)), *shape, dtype=dtype)

    def scale(name):
        return torch.rand(1 if case["shared"][name] else steps, dtype=dtype) / max(steps, 1)

    arguments = {
        "h0": torch.randn(rows, width, dtype=dtype),
        "weight": tensor("weight", width, width) / width**0.5,
        "bias": tensor("bias", width) if case["bias"] else None,
        "alpha": 1 - scale("alpha"),
        "beta": scale("beta"),
        # The inputs carry the number of steps if everything else is shared.
        "inputs": torch.randn(steps, rows, width, dtype=dtype),
    }
    filter = make_filter(case["filter"], steps, width)
    if case["activation"] == "relu":
        bias = torch.zeros(width) if arguments["bias"] is None else arguments["bias"]
        scales = {name: arguments[name].expand(steps) for name in ("alpha", "beta")}
        # This call changes the inputs in place.
        keep_off_the_kink(Net({**arguments, **scales, "bias": bias}, filter, "relu", grad_output=None))
    elif not case["inputs"] and tells_steps(arguments, filter):
        arguments["inputs"] = None
    return arguments, filter.to(dtype) if filter.is_floating_point() else filter


def evaluate(arguments, filter, grad_output, wanted, **options):
    """The result, and the gradients of the arguments that are wanted."""
    leaves = {
        name: tensor if tensor is None else tensor.detach().requires_grad_(name in wanted)
        for name, tensor in arguments.items()
    }
    output = F.orthogonal_filter(**leaves, filter=filter, **options)
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    gradients = torch.autograd.grad(output, list(present.values()), grad_output, materialize_grads=True)
    return {"output": output.detach(), **dict(zip(present, gradients, strict=True))}


def in_layout(tensor, layout):
    can_hold_nan = tensor is not None and tensor.is_floating_point()
    return hostile_layouts(tensor).get(layout, tensor) if can_hold_nan and tensor.numel() else tensor


# The function's fixtures run once for all its examples: they choose the backend. Each example sets its own seed.
PROPERTY = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}
LAYOUTS = st.sampled_from(["contiguous", "sliced", "strided", "transposed"])
CASE = {
    "rows": st.integers(0, 40),
    "steps": st.integers(0, 12),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "filter": st.sampled_from(FILTERS),
    "activation": st.sampled_from(list(ACTIVATIONS)),
    "return_states": st.booleans(),
    "segment": st.sampled_from([None, 1, 2, 5, 100]),
    "threads": st.integers(1, 4),
    "bias": st.booleans(),
    "inputs": st.booleans(),
    "shared": st.fixed_dictionaries({name: st.booleans() for name in ("weight", "bias", "alpha", "beta")}),
    "layouts": st.fixed_dictionaries(dict.fromkeys((*NAMES, "filter", "grad_output"), LAYOUTS)),
    "wanted": st.sets(st.sampled_from(NAMES), min_size=1),
    "seed": st.integers(0, 2**32 - 1),
}


@given(case=st.fixed_dictionaries({**CASE, "width": st.integers(1, 40)}))
@settings(max_examples=40 if SANITIZED else 120, **PROPERTY)
def test_any_call(case):
    """Random shapes, options, memory layouts and sets of gradients."""
    assert_any_call(case)


@given(case=st.fixed_dictionaries({**CASE, "width": st.integers(41, 300)}))
@settings(max_examples=20, **PROPERTY)
def test_any_wide_call(case):
    assert_any_call(case)


def assert_any_call(case):
    torch.manual_seed(case["seed"])
    options = {name: case[name] for name in ("activation", "return_states")}
    wanted = case["wanted"] | {"h0"}
    errors = Errors()
    # If there are few numbers, judge several draws of them.
    one_scale = any(case["shared"][name] for name in wanted & {"alpha", "beta"})
    fewest = 1 if one_scale else max(1, min(case["width"], case["steps"]))
    for _ in range(max(1, 24 // fewest)):
        arguments, filter = draw_arguments(case)
        grad_output = torch.randn(case["steps"] + 1, *arguments["h0"].shape, dtype=case["dtype"])
        grad_output = grad_output if case["return_states"] else grad_output[-1]
        hostile = {name: in_layout(tensor, case["layouts"][name]) for name, tensor in arguments.items()}
        hostile_filter = in_layout(filter, case["layouts"]["filter"])
        hostile_grad = in_layout(grad_output, case["layouts"]["grad_output"])
        with threads(case["threads"]):
            actual = evaluate(hostile, hostile_filter, hostile_grad, wanted, segment=case["segment"], **options)
        eager, exact = (
            reference(arguments, filter, grad_output, wanted, dtype, options)
            for dtype in (torch.float32, torch.float64)
        )
        for name, expected in exact.items():
            errors.add_expected(name, case["rows"], eager[name], expected)
            errors.add(name, case["rows"], "any call", actual[name], expected)
    if case["dtype"] == torch.float32:
        errors.judge()
    else:
        # No wider dtype judges float64 here: eager float64 stands for the exact result. Its error is 2^-29 times that
        # of eager float32, which also rounds its arguments. The kernel's error may be twice that plus one ulp. So the
        # two differ by at most three times that plus one ulp.
        narrowing = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        errors.judge(torch.float64, times_eager=3 * narrowing)


def reference(arguments, filter, grad_output, wanted, dtype, options):
    cast = {name: tensor if tensor is None else tensor.to(dtype) for name, tensor in arguments.items()}
    filter = filter.to(dtype) if filter.is_floating_point() else filter
    with lcw_ops.use_backend("reference"):
        return evaluate(cast, filter, grad_output.to(dtype), wanted, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "shared", "return_states"),
    [(1, False, False), (3, True, False), (20, False, True), (33, True, False), (1, True, True), (33, True, True)],
)
def test_sixteen_bits_are_rounded_once(dtype, rows, shared, return_states):
    """Result and gradients are those of the same numbers in float32, within twice eager's error, rounded at the end."""
    net = make_net(rows, 33, 30, shared=shared)
    narrow = {name: tensor.to(dtype) for name, tensor in net.arguments.items()}
    # Scales are float32 in every 16-bit net: in 16 bits alpha = 1 - 2e-5 would be 1.
    narrow.update(alpha=net.arguments["alpha"], beta=net.arguments["beta"])
    grad_output = (net.grad_output if return_states else net.grad_output[-1]).to(dtype)
    options = {"return_states": return_states}
    with threads(2):
        actual = evaluate(narrow, net.filter, grad_output, NAMES, **options)
    eager, exact = (
        reference(narrow, net.filter, grad_output, NAMES, wide, options) for wide in (torch.float32, torch.float64)
    )
    finfo = torch.finfo(dtype)
    for name in ("output", "h0", "weight", "bias", "inputs"):
        assert actual[name].dtype == dtype
        expected = exact[name]
        allowed_in_float32 = 2 * (eager[name].double() - expected).abs().max()
        allowed_in_float32 += torch.finfo(torch.float32).eps * expected.abs().max()
        # Half of the spacing of the dtype's numbers, which below the smallest normal number is the spacing at that one.
        largest = (expected.abs() + allowed_in_float32).clamp(min=finfo.smallest_normal)
        rounding = 0.5 * finfo.eps * 2 ** largest.log2().floor()
        error = (actual[name].double() - expected).abs()
        assert (error <= rounding + allowed_in_float32).all(), name


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("scale_shape", ["per_layer", "one", "no_dimension"])
@pytest.mark.parametrize("over_time", [False, True])
def test_gradients_of_the_scales(rows, scale_shape, over_time):
    """The gradients of alpha and beta, requested alone and together and without any other gradient.

    Many nets are judged, because <G_l, O h_{l-1}> hardly changes from layer to layer, and neither does its error.
    """
    errors = Errors()
    for _ in range(24):
        net = make_net(rows, 37 if over_time else 21, 12, shared=over_time)
        arguments = dict(net.arguments)
        options = {"return_states": over_time}
        grad_output = net.grad_output if over_time else net.grad_output[-1]
        if scale_shape != "per_layer":
            shape = (1,) if scale_shape == "one" else ()
            arguments.update(alpha=torch.full(shape, 0.97), beta=torch.full(shape, 0.03))
        both = {"alpha", "beta"}
        eager, exact = (
            reference(arguments, net.filter, grad_output, both, dtype, options)
            for dtype in (torch.float32, torch.float64)
        )
        for name, expected in exact.items():
            errors.add_expected(name, rows, eager[name], expected)
        for wanted in ({"alpha"}, {"beta"}, both):
            with threads(2):
                actual = evaluate(arguments, net.filter, grad_output, wanted, **options)
            assert actual.keys() == wanted | {"output"}
            for name, tensor in actual.items():
                errors.add(name, rows, f"{scale_shape}, M={rows}, {wanted}", tensor, exact[name])
    errors.judge()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [7, 64, 200])
@pytest.mark.parametrize("over_time", [False, True])
def test_same_bits_twice_however_the_rows_are_dealt_out(count, width, over_time):
    """Repeated calls of one net, with every way to share rows and units between threads. Some threads may come late."""
    net = make_net(20, width, 40, shared=over_time)
    with threads(count):
        for rows in (1, 2, 3, 4, 20):
            first_output, first = net(rows, over_time)
            for _ in range(4):
                output, gradients = net(rows, over_time)
                assert torch.equal(output, first_output)
                for name, gradient in gradients.items():
                    assert torch.equal(gradient, first[name]), f"{name}, M={rows}, N={width}, {count} threads"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("shared", [False, True])
def test_same_bits_twice_however_the_segments_are_dealt_out(count, shared):
    """Every thread takes the next part of a segment that can be done. Its buffers serve many segments in turn."""
    for width, rows, segment, return_states in [(24, 20, 3, False), (33, 40, 1, False), (40, 20, 7, True)]:
        net = make_net(rows, width, 50, shared=shared)
        with threads(count):
            first_output, first = net(rows, return_states, segment)
            for _ in range(4):
                output, gradients = net(rows, return_states, segment)
                assert torch.equal(output, first_output)
                for name, gradient in gradients.items():
                    assert torch.equal(gradient, first[name]), f"{name}, M={rows}, N={width}, {count} threads"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("filter_kind", ["haar", "per_layer", "permutation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_activations_change_no_gradient(dtype, filter_kind, activation):
    """Forward over time keeps act(A) for backward, which can also compute them again from the states."""
    forward, backward = torch.ops.lcw_ops.orthogonal_filter.cpp, torch.ops.lcw_ops.orthogonal_filter_backward.cpp
    steps = 37
    for rows, width, count in itertools.product([1, 2, 5, 33], [1, 17, 32, 70], [1, 2, 3]):
        h0, bias, one = torch.randn(rows, width, dtype=dtype), torch.randn(width, dtype=dtype), torch.ones(1).to(dtype)
        weight = torch.randn(width, width, dtype=dtype) / width**0.5
        inputs, cotangent = torch.randn(2, steps + 1, rows, width, dtype=dtype)
        filter = make_filter(filter_kind, steps, width)
        filter = filter if filter_kind == "permutation" else filter.to(dtype)
        shared = (weight, bias, filter, 0.9 * one, 0.1 * one, inputs[1:].contiguous(), steps, activation)
        with threads(count):
            states, activated = forward(h0, *shared, op.KEEP_ACTIVATED, True)
            assert torch.equal(states, forward(h0, *shared, 0, True)[0])
            arguments = (cotangent, states[:-1], *shared, 8, True, True, False, True, False)
            again, kept = backward(*arguments), backward(*arguments, activated)
        # The loops for a few rows and for many add up `width` products in different orders, and segments of other
        # lengths cut the sums over samples, of 32 terms each, elsewhere. Such a sum may be far smaller than its terms.
        largest_term = again[5].abs().max().item() * states.abs().max().item()
        for expected, actual in zip(again, kept, strict=True):
            scale = max(expected.abs().max().item() if expected.numel() else 0, largest_term)
            torch.testing.assert_close(actual, expected, rtol=0, atol=4 * (width + 32) * torch.finfo(dtype).eps * scale)


def test_activations_that_do_not_fit_are_refused():
    backward = torch.ops.lcw_ops.orthogonal_filter_backward.cpp
    one = torch.ones(1)
    cotangent, states = torch.randn(6, 2, 3), torch.randn(5, 2, 3)
    shared = (torch.randn(3, 3), None, torch.eye(3), one, one, None, 5, "tanh", 8, True, False, False, False, False)
    for activated in (torch.randn(4, 2, 3), torch.randn(5, 2, 3).double()):
        with pytest.raises(RuntimeError, match="activated does not fit"):
            backward(cotangent, states, *shared, activated)
    with pytest.raises(RuntimeError, match="activated does not fit"):
        # Checkpoints of segments are not the states that go with the activations.
        backward(cotangent, states[:1], *shared, torch.randn(5, 2, 3))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_without_gradients_the_result_has_the_same_bits(count):
    for rows, return_states, shared in itertools.product((1, 3, 5, 33), (False, True), (False, True)):
        net = make_net(rows, 70, 9, shared=shared)
        with threads(count):
            with_gradients, _ = net(rows, return_states)
            assert torch.equal(net(rows, return_states, with_gradients=False), with_gradients)


def test_calls_from_several_threads_at_once():
    """Teams of different calls never wait for each other."""
    net = make_net(2, 130, 300)
    with threads(2):
        expected, expected_gradients = net(2, False)
    found = []

    def call():
        # The number of threads is a setting of the calling thread's own OpenMP team.
        with threads(2):
            found.extend(net(2, False) for _ in range(5))

    callers = [threading.Thread(target=call, daemon=True) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=100)
    assert len(found) == 20, "a call does not return"
    for output, gradients in found:
        assert torch.equal(output, expected)
        assert all(torch.equal(gradients[name], expected_gradients[name]) for name in NAMES)


# ---- The activations -----------------------------------------------------------------------------------------------


def every_float32(stride):
    """Bit patterns from 0 to infinity and their negatives, every ``stride``-th."""
    infinity = 0x7F800000
    positive = np.arange(0, infinity + 1, stride, dtype=np.uint32)
    edges = np.arange(-5, 6)
    special = np.concatenate([anchor.view(np.uint32) + edges for anchor in SATURATIONS]).astype(np.uint32)
    positive = np.concatenate([positive, special, np.array([infinity], np.uint32)])
    return torch.from_numpy(np.concatenate([positive, positive | np.uint32(1 << 31)]).view(np.float32))


# Arguments near which kernels clamp: exp(-x) and exp(-2 x) leave the normal numbers, or tanh becomes 1.
SATURATIONS = np.array([[9.01], [43.5], [43.668], [87.0], [87.336], [88.0], [88.72], [103.97]], np.float32)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_activation_error_over_all_of_float32(activation, capsys):
    """In true ulps: the spacing of float32 at the exact value."""
    values = every_float32(stride=1021)
    columns = 64
    inputs = torch.nn.functional.pad(values, (0, -len(values) % columns)).view(1, -1, columns)
    nothing, no_weight = torch.zeros(inputs.shape[1:]), torch.zeros(1, columns, columns)
    actual = F.orthogonal_filter(nothing, no_weight, None, torch.arange(columns), 0.0, 1.0, inputs, activation)
    actual, exact = actual.flatten()[: len(values)].double(), ACTIVATIONS[activation](values.double())
    finfo = torch.finfo(torch.float32)
    is_normal = exact.abs() >= finfo.smallest_normal
    ulps = (actual - exact).abs() / (finfo.eps * 2 ** exact.abs().log2().floor())
    worst = torch.where(is_normal, ulps, 0.0).argmax()
    with capsys.disabled():
        print(f"\n{activation}: {len(values):,} floats, at most {ulps[worst]:.2f} ulp, at {values[worst]:.9g}")
    assert ulps[worst] < 4
    # Below the smallest normal number float32 has no full mantissa, and processors may be set to flush to 0.
    assert ((actual - exact).abs()[~is_normal] <= finfo.smallest_normal).all()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("rows", [1, 33])
def test_a_nan_stays_in_its_row(activation, rows):
    """A NaN in one sample makes that sample's whole result NaN. The other samples keep their bits."""
    net = make_net(rows, 19, 3, filter="permutation", activation=activation)
    expected = net(rows, False, with_gradients=False)
    net.arguments["h0"][rows // 2, 4] = torch.nan
    actual = net(rows, False, with_gradients=False)
    others = torch.arange(rows) != rows // 2
    assert actual[rows // 2].isnan().all()
    assert torch.equal(actual[others], expected[others])


# ---- In separate processes -----------------------------------------------------------------------------------------


def call_between_guards(rows, width, steps, dtype, kind, shared, flush, return_states):
    net = make_net(rows, width, steps, kind, shared=shared)
    arguments = {
        name: between_guards(tensor.to(tensor.dtype if name in ("alpha", "beta") else dtype), flush)
        for name, tensor in net.arguments.items()
    }
    grad_output = (net.grad_output if return_states else net.grad_output[-1]).to(dtype)
    filter = net.filter.to(dtype) if dtype == torch.float64 and net.filter.is_floating_point() else net.filter
    results = evaluate(
        arguments, between_guards(filter, flush), between_guards(grad_output, flush), NAMES, return_states=return_states
    )
    assert all(tensor.isfinite().all() for tensor in results.values())


GUARDED = pairwise(
    rows=[1, 2, 3, 5, 9, 17, 33],
    width=[1, 2, 5, 8, 13, 16, 31, 65, 100],
    kind=FILTERS,
    shared=[True, False],
    return_states=[True, False],
)


@pytest.mark.parametrize("flush", ["front", "back"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("thread_count", [1, 3])
def test_nothing_but_the_arguments_is_read_and_nothing_of_them_written(flush, dtype, thread_count):
    """The pages beside each argument are unreadable, so a vector too wide or a tile too high would end the process."""
    with threads(thread_count):
        for case in GUARDED:
            call_between_guards(steps=3, dtype=dtype, flush=flush, **case)


def test_fewer_threads_than_asked_for():
    """OpenMP may start fewer threads than torch requests.

    Threads that share a row do not wait for missing ones, and the bits do not depend on how many started.
    """
    code = (
        "import torch, hashlib, lcw_ops\n"
        "torch.set_num_threads(4)\n"
        "torch.manual_seed(0)\n"
        "digest = hashlib.sha256()\n"
        "for rows in (1, 2):\n"
        "    weight = (torch.randn(40, 150, 150) / 13).requires_grad_()\n"
        "    h0 = torch.randn(rows, 150, requires_grad=True)\n"
        "    states = lcw_ops.functional.orthogonal_filter(h0, weight, None, torch.eye(150), return_states=True)\n"
        "    states.sum().backward()\n"
        "    for tensor in (states.detach(), weight.grad, h0.grad):\n"
        "        digest.update(tensor.numpy().tobytes())\n"
        "print(digest.hexdigest())"
    )
    # The processes spend their time on importing torch, so start them all at once.
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "OMP_THREAD_LIMIT": str(limit), "OMP_NUM_THREADS": "4"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for limit in (1, 2, 3, 64)
    ]
    digests = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(set(digests)) == 1
