"""The profiler against independent float64 autograd, exact SVDs and its own bounds; no file is left half written."""

import csv
import itertools
import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lcw_ops import _files as files
from lcw_ops.jobs import picture
from lcw_ops.jobs import profile as main_job
from lcw_ops.jobs.report import ends
from lcw_ops.nn import GmPLinear, LCWLinear, OrthogonalFilterMLP, OrthogonalFilterRNN, WeightNormLinear
from lcw_ops.ops import use_backend
from lcw_ops.ops.parallel_depth.solver import Solve, record_solves
from lcw_ops.profile import bounds, jacobian, machine, plot, profile, spectral_norm_bound
from lcw_ops.profile import orthogonal_filter as replay
from lcw_ops.profile import result as result_module
from lcw_ops.profile.result import COLUMNS, Solves, format_log

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda a: a}

pytestmark = pytest.mark.usefixtures("one_thread")

# The difference that one float32 pass over a few dozen layers may have from float64.
CLOSE = {"rtol": 2e-4, "atol": 1e-6}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """With this size even a net of a few layers has several chunks, the last of which is shorter."""
    monkeypatch.setattr(replay, "CHUNK_BYTES", 8 * 7 * (16 * 16 + 8 * 16))


def make_mlp(**options):
    options = {"in_features": 6, "width": 16, "depth": 24, "out_features": 3, **options}
    model = OrthogonalFilterMLP(**options)
    with torch.no_grad():
        model.bias.normal_()
    return model


def float64_states(h0, weights, biases, matrix, alpha, beta, activation, inputs=None):
    """Every state with its gradient kept, and every pre-activation, by plain torch in float64."""
    states, pre_activations, weights_used = [h0], [], []
    h0.retain_grad()
    for l, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        weight = weight.clone().requires_grad_()
        pre_activation = states[-1] @ weight.T + bias + (0 if inputs is None else inputs[l])
        state = alpha * states[-1] @ matrix.T + beta * ACTIVATIONS[activation](pre_activation)
        state.retain_grad()
        states.append(state)
        pre_activations.append(pre_activation)
        weights_used.append(weight)
    return states, pre_activations, weights_used


def filter_matrix(model):
    filter = model.filter
    return torch.eye(len(filter), dtype=torch.float64)[filter] if filter.dim() == 1 else filter.double()


def check_rows(columns, states, pre_activations, weights, first):
    rows = slice(first, first + len(weights))
    expected = {
        "state_rms": [state.square().mean().sqrt() for state in states[1:]],
        "gradient_norm": [state.grad.norm() for state in states[1:]],
        "activation_shift": [pre.mean(0).square().mean().sqrt() for pre in pre_activations],
        "weight_gradient_norm": [weight.grad.norm() for weight in weights],
    }
    angles = []
    for weight, state in zip(weights, states[:-1], strict=True):
        cosine = nn.functional.cosine_similarity(weight, state.mean(0), dim=1)
        angle = (90 - torch.rad2deg(cosine.acos())).square().mean().sqrt()
        # A mean input of 0, which an RNN has at its first step, has no angle.
        angles.append(angle if state.any() else torch.tensor(math.nan))
    expected["shift_angle"] = angles
    for name, values in expected.items():
        np.testing.assert_allclose(columns[name][rows], torch.stack(values).detach(), **CLOSE, err_msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("filter", ["haar", "permutation", "identity"])
def test_mlp_rows_are_those_of_float64_autograd(filter, activation):
    model = make_mlp(filter=filter, activation=activation, beta=0.2)
    inputs, targets = torch.randn(8, 6), torch.randint(3, (8,))
    result = profile(model, inputs, targets, repeats=1, matmul_rate=1.0)
    assert list(result.columns["name"]) == ["input_layer", *(f"layer[{l}]" for l in range(1, 25)), "output_layer"]

    input_layer, output_layer = (layer.double() for layer in (model.input_layer, model.output_layer))
    h0 = input_layer(inputs.double())
    states, pre_activations, weights = float64_states(
        h0, model.weight.detach().double(), model.bias.detach().double(), filter_matrix(model), 0.8, 0.2, activation
    )
    loss = nn.functional.cross_entropy(output_layer(states[-1]), targets)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    check_rows(result.columns, states, pre_activations, weights, first=1)
    assert result.columns["gradient_norm"][0] == pytest.approx(h0.grad.norm().item(), rel=2e-4)
    assert result.columns["weight_gradient_norm"][0] == pytest.approx(input_layer.weight.grad.norm().item(), rel=2e-4)


@pytest.mark.parametrize("layout", ["time_first", "batch_first", "unbatched"])
@pytest.mark.parametrize("backend", ["automatic", "reference"])
def test_rnn_rows_are_those_of_float64_autograd(layout, backend):
    model = OrthogonalFilterRNN(3, 16, length=24, batch_first=layout == "batch_first")
    sequence = torch.randn(24, 1 if layout == "unbatched" else 8, 3)
    given = {"time_first": sequence, "batch_first": sequence.transpose(0, 1), "unbatched": sequence[:, 0]}[layout]

    def loss(result):
        output, h_n = result
        return output.square().mean() + h_n.sum()

    if backend == "reference":
        with use_backend("reference"):
            result = profile(model, given, loss=loss, repeats=1, matmul_rate=1.0)
    else:
        result = profile(model, given, loss=loss, repeats=1, matmul_rate=1.0)

    steps, width = 24, 16
    states, pre_activations, weights = float64_states(
        torch.zeros(sequence.shape[1], width, dtype=torch.float64, requires_grad=True),
        model.weight_hh.detach().double().expand(steps, width, width),
        model.bias.detach().double().expand(steps, width),
        filter_matrix(model),
        1 - 1 / 24,
        1 / 24,
        "tanh",
        (sequence.double() @ model.weight_ih.detach().double().T),
    )
    (torch.stack(states[1:]).square().mean() + states[-1].sum()).backward()
    check_rows(result.columns, states, pre_activations, weights, first=0)
    assert (result.columns["gradient_norm"] <= result.columns["gradient_upper"] * (1 + 1e-5)).all()
    assert (result.columns["gradient_norm"] >= result.columns["gradient_lower"] * (1 - 1e-5)).all()


def test_recurrence_inside_another_model_and_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = make_mlp(in_features=16, out_features=16, depth=10)

        def forward(self, x):
            return self.deep(self.deep(x))

    result = profile(Twice(), torch.randn(8, 16), repeats=1, matmul_rate=1.0)
    names = list(result.columns["name"])
    assert len(names) == 2 * (10 + 2)
    assert names[1] == "deep.layer[1]"
    assert names[13] == "deep.layer#2[1]"
    assert set(result.jacobians) == {"deep.layer: h_0 -> h_L", "deep.layer#2: h_0 -> h_L", "input -> output"}
    assert np.isfinite(result.columns["gradient_norm"]).all()


class Untidy(nn.Module):
    """Calls a module twice, modifies in place, returns a tuple from a leaf, and leaves one output unused."""

    class Pair(nn.Module):
        def forward(self, x):
            return x * 2, torch.arange(3)

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.unused = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 2)
        self.relu, self.pair = nn.ReLU(inplace=True), Untidy.Pair()

    def forward(self, x):
        x = self.relu(self.first(x))
        x, _ = self.pair(self.shared(x))
        self.unused(x)
        x = self.shared(x)
        x += 1
        return {"result": x}


def test_any_module_tuples_in_place_and_several_calls():
    model, inputs = Untidy(), torch.randn(8, 5)
    result = profile(model, inputs, loss=lambda output: output["result"].square().sum(), repeats=1, matmul_rate=1.0)
    assert list(result.columns["name"]) == ["first", "relu", "shared", "pair", "unused", "shared#2", "Untidy"]

    first = model.first(inputs)
    shared = model.shared(first.relu())
    last = model.shared(shared * 2)
    values = [first, first.relu(), shared, shared * 2, model.unused(shared * 2), last, last + 1]
    for tensor in (first, shared, last):
        tensor.retain_grad()
    (last + 1).square().sum().backward()
    np.testing.assert_allclose(
        result.columns["state_rms"], [value.square().mean().sqrt().item() for value in values], **CLOSE
    )
    gradient = result.columns["gradient_norm"]
    np.testing.assert_allclose(gradient[[0, 2, 5]], [t.grad.norm().item() for t in (first, shared, last)], **CLOSE)
    assert math.isnan(gradient[4])
    assert result.columns["weight_gradient_norm"][2] == pytest.approx(model.shared.weight.grad.norm().item(), rel=1e-4)
    mean = first.mean(0)
    assert result.columns["activation_shift"][0] == pytest.approx(mean.square().mean().sqrt().item(), rel=1e-4)


def make_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 10)
    )


def test_cnn_is_counted_and_left_as_it_was():
    model, images, labels = make_cnn(), torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    model(images).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    result = profile(model, images, labels, repeats=2, matmul_rate=1e9)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(grad, p.grad) for grad, p in zip(gradients, model.parameters(), strict=True))
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # Convolution 8 x 4 x 6 x 6 outputs of 9 products, linear 8 x 10 outputs of 144; backward has no image gradient.
    conv, linear = 2 * 8 * 4 * 36 * 9, 2 * 8 * 10 * 144
    assert result.timing.forward_flops == conv + linear
    assert result.timing.backward_flops == conv + 2 * linear
    assert result.timing.repeats == 2
    # A channel's mean is over samples and positions; batch norm makes it 0.
    assert result.columns["activation_shift"][1] < 1e-6 < result.columns["activation_shift"][0]


def test_a_model_without_trainable_parameters_is_differentiated_by_its_input():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).requires_grad_(False)
    result = profile(model, torch.randn(3, 4), repeats=1, matmul_rate=1.0)
    assert result.columns["gradient_norm"][1] == pytest.approx(1.0, rel=1e-5)


def test_a_model_without_trainable_parameters_may_take_integers_and_numbers_too():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x, index, scale):
            return self.layer(x + scale * self.embedding(index))

    model, x = Shifted().requires_grad_(False), torch.randn(3, 4)
    result = profile(model, (x, torch.tensor([0, 3, 1]), 0.5), repeats=1, matmul_rate=1.0)
    assert list(result.columns["name"]) == ["embedding", "layer"]
    exact = torch.linalg.svdvals(model.layer.weight)
    spectrum = result.jacobians["input -> output"]
    assert (spectrum.largest, spectrum.smallest) == pytest.approx((exact[0].item(), exact[-1].item()), rel=1e-5)
    assert result.columns["gradient_norm"][1] == pytest.approx(1.0, rel=1e-5)
    assert not x.requires_grad


@pytest.mark.parametrize("filter", ["haar", "cyclic"])
def test_flops_do_not_depend_on_the_backend(filter):
    model, inputs = make_mlp(filter=filter), torch.randn(8, 6)
    automatic = profile(model, inputs, repeats=1, matmul_rate=1.0).timing
    with use_backend("reference"):
        reference = profile(model, inputs, repeats=1, matmul_rate=1.0).timing
    product, ends = 2 * 8 * 16 * 16 * 24, 2 * 8 * (6 * 16 + 16 * 3)
    dense = filter == "haar"
    assert automatic.forward_flops == reference.forward_flops == product * (1 + dense) + ends
    assert automatic.backward_flops == product * (2 + dense) + 2 * 8 * (6 * 16 + 2 * 16 * 3)


@pytest.mark.parametrize("samples", [3, 40])
@pytest.mark.parametrize("basis", [False, True])
def test_flops_of_an_lcw_layer_are_a_plain_layers(basis, samples):
    layers = LCWLinear(6, 5, basis=basis), nn.Linear(6 - basis, 5)
    lcw, plain = (
        profile(
            nn.Sequential(layer, nn.Linear(5, 3)), torch.randn(samples, features), repeats=1, matmul_rate=1.0
        ).timing
        for layer, features in zip(layers, (6, 6 - basis), strict=True)
    )
    assert lcw.forward_flops == plain.forward_flops
    assert lcw.backward_flops == plain.backward_flops


@pytest.mark.parametrize("samples", [3, 40])
@pytest.mark.parametrize("layer_class", [GmPLinear, WeightNormLinear])
@pytest.mark.parametrize("frozen", [False, True])
def test_flops_of_a_hypersphere_layer_are_a_plain_layers(layer_class, frozen, samples):
    timings = [
        profile(
            nn.Sequential(nn.Linear(4, 6), layer.requires_grad_(not frozen), nn.Linear(5, 3)),
            torch.randn(samples, 4),
            repeats=1,
            matmul_rate=1.0,
        ).timing
        for layer in (layer_class(6, 5), nn.Linear(6, 5))
    ]
    hypersphere, plain = timings
    assert hypersphere.forward_flops == plain.forward_flops
    assert hypersphere.backward_flops == plain.backward_flops


def test_flops_of_an_rnn_are_counted_once():
    model, inputs = OrthogonalFilterRNN(3, 16, length=24), torch.randn(24, 8, 3)

    def loss(result):
        return result[0].sum()

    automatic = profile(model, inputs, loss=loss, repeats=1, matmul_rate=1.0).timing
    with use_backend("reference"):
        reference = profile(model, inputs, loss=loss, repeats=1, matmul_rate=1.0).timing
    product, read_in = 2 * 8 * 16 * 16 * 24, 2 * 24 * 8 * 3 * 16
    assert automatic.forward_flops == reference.forward_flops == 2 * product + read_in
    assert automatic.backward_flops == 3 * product + read_in


# --- bounds


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_filter_deviation_is_an_upper_bound(stored, monkeypatch):
    many = torch.linalg.qr(torch.randn(5, 32, 32)).Q.to(stored) * (1 + 1e-3)
    exact = (torch.linalg.svdvals(many.double()).square() - 1).abs().amax(1).numpy()
    one = np.array([bounds.filter_deviation(matrix)[0] for matrix in many])
    assert ((one >= exact) & (one <= exact * (1 + 1e-6))).all()
    monkeypatch.setattr(bounds, "PART_BYTES", 8 * 32 * 32 * 2)
    assert (bounds.filter_deviation(many) >= exact).all()
    assert bounds.filter_deviation(many).shape == (5,)
    assert bounds.filter_deviation(torch.randperm(32)) == 0


def test_bounds_hold_where_only_the_filters_rounding_matters():
    """O^20000, where O is orthogonal only to within 1e-7. Bounds that ignored this deviation would not hold."""
    model = OrthogonalFilterMLP(6, 16, 20_000, 3, beta=1e-9)
    result = profile(model, torch.randn(4, 6), repeats=1, matmul_rate=1.0)
    columns = {name: column[1:-1] for name, column in result.columns.items() if name != "name"}
    spectrum = result.jacobians["h_0 -> h_L"]
    exact = torch.linalg.svdvals(torch.linalg.matrix_power(model.filter.double(), 20_000))
    decay = 20_000 * math.log(float(torch.tensor(1 - 1e-9)))
    # The stored filter's own powers lie within the bounds; 20,000 float32 roundings move the measured values by 1e-5.
    for value in (exact[0].item(), exact[-1].item()):
        assert spectrum.log_lower <= math.log(value) + decay <= spectrum.log_upper
    assert spectrum.log_lower - 2e-5 <= math.log(spectrum.smallest)
    assert math.log(spectrum.largest) <= spectrum.log_upper + 2e-5
    assert (columns["gradient_norm"] <= columns["gradient_upper"] * (1 + 2e-5)).all()
    assert (columns["gradient_norm"] >= columns["gradient_lower"] * (1 - 2e-5)).all()
    # The bounds are still narrow enough to be useful.
    assert spectrum.log_upper - spectrum.log_lower < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schatten_bound_is_an_upper_bound_within_its_factor(dtype):
    for width, scale in ((1, 1.0), (5, 1e-25), (64, 1.0), (64, 1e15)):
        weight = (torch.randn(20, width, width, dtype=torch.float64) * scale).to(dtype)
        weight[0] = scale * torch.eye(width)
        weight[1] = 0
        exact = torch.linalg.matrix_norm(weight.double(), 2)
        for squarings in (1, 3, bounds.SQUARINGS):
            bound = spectral_norm_bound(weight, squarings)
            assert (bound >= exact).all()
            assert (bound <= exact * width ** (1 / 2 ** (squarings + 1)) * 1.001).all()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_schatten_bound_is_computed_in_float64_where_torch_may_round_the_factors(precision):
    weight = torch.randn(20, 64, 64)
    in_float32 = spectral_norm_bound(weight)
    torch.set_float32_matmul_precision(precision)
    try:
        bound = spectral_norm_bound(weight)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(bound, spectral_norm_bound(weight.double()))
    # The bound in float32 leaves room for the roundings of float32.
    assert (in_float32 > bound).all()


def test_schatten_bound_where_rounding_could_lower_it():
    """The bound is sharpest for an orthogonal matrix, a matrix of rank 1 and a scaled mixture of the two."""
    q = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
    u = torch.randn(64, 1, dtype=torch.float64)
    for matrix in (q, u @ u.T, q[:, :1] @ q[:1] * 1e3 + q):
        weight = matrix.float()
        assert spectral_norm_bound(weight) >= torch.linalg.matrix_norm(weight.double(), 2)
    assert spectral_norm_bound(torch.full((3, 3), math.nan)) == math.inf


@pytest.mark.parametrize(
    ("options", "convex"),
    [({}, True), ({"beta": 0.3}, True), ({"alpha": 1.0, "beta": 1.0}, False), ({"alpha": 0.0, "beta": 1.0}, False)],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bounds_hold(options, convex, activation):
    result = profile(make_mlp(activation=activation, **options), torch.randn(8, 6), repeats=1, matmul_rate=1.0)
    columns = {name: column[1:-1] for name, column in result.columns.items() if name != "name"}
    assert (columns["gradient_norm"] <= columns["gradient_upper"] * (1 + 1e-4)).all()
    assert (columns["gradient_norm"] >= columns["gradient_lower"] * (1 - 1e-4)).all()
    assert (columns["gain_lower"] >= 0).all()
    spectrum = result.jacobians["h_0 -> h_L"]
    assert math.log(spectrum.largest) <= spectrum.log_upper + 1e-4
    assert math.log(max(spectrum.smallest, 1e-300)) >= spectrum.log_lower - 1e-4
    if activation in ("tanh", "sigmoid"):
        assert (columns["state_rms"] <= columns["state_rms_bound"] * (1 + 1e-5)).all()
        if convex:
            highest = max(1.0, result.columns["state_rms"][0] * math.sqrt(8))
            # In each of the 24 layers the filter is orthogonal up to float32's rounding.
            assert (columns["state_rms_bound"] <= highest + 1e-5).all()
    else:
        assert np.isnan(columns["state_rms_bound"]).all()


def test_a_filter_without_a_stated_deviation_is_exactly_orthogonal():
    lower, upper = bounds.layer_gain_bounds(np.array([0.8, 0.2]), np.array([-0.2, 0.8]), np.array([2.0, 1.0]), 0.5)
    np.testing.assert_allclose((lower, upper), ([0.6, 0.0], [1.0, 0.6]), rtol=1e-15)
    # All samples have rms 3, so rms(h_l) is at most 0.8^l 3 + (1 - 0.8^l).
    rms = bounds.state_rms_bound(0.8, 0.2, torch.full((5, 4), 3.0), 30, "tanh")
    carried = 0.8 ** np.arange(1, 31)
    np.testing.assert_allclose(rms, 3 * carried + 1 - carried, rtol=1e-13)


def test_gradient_bounds_in_closed_form():
    lower, upper = bounds.gradient_norm_bounds(np.full(50_000, 0.5), np.full(50_000, 3.0), np.r_[np.zeros(50_000), 2.0])
    assert upper[0] == pytest.approx(50_000 * math.log(3) + math.log(2))
    assert lower[0] == pytest.approx(50_000 * math.log(0.5) + math.log(2))
    assert format_log(upper[0]) == "10^23856"
    # A gradient of 1 enters at the last state and one of 0.25 at the state before. There the sum is at most
    # 3 x 1 + 0.25 and at least 0.5 x 1 - 0.25.
    lower, upper = bounds.gradient_norm_bounds(np.full(2, 0.5), np.full(2, 3.0), np.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(np.exp(upper), [9.75, 3.25, 1.0])
    np.testing.assert_allclose(np.exp(lower), [0.125, 0.25, 1.0])


# --- Jacobian


@pytest.mark.parametrize("shape", [(30, 30), (20, 45), (45, 20)])
def test_lanczos_is_exact_at_full_length(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    exact = torch.linalg.svdvals(matrix)
    spectrum = jacobian.lanczos_spectrum(lambda v: matrix @ v, lambda u: matrix.T @ u, shape, tolerance=0.0)
    assert spectrum.converged
    assert spectrum.iterations == min(shape)
    assert spectrum.largest == pytest.approx(exact[0].item(), rel=1e-10)
    assert spectrum.smallest == pytest.approx(exact[-1].item(), rel=1e-8)


def test_lanczos_says_when_it_has_not_converged():
    matrix = torch.diag(torch.logspace(0, -12, 300, dtype=torch.float64))
    spectrum = jacobian.lanczos_spectrum(lambda v: matrix @ v, lambda u: matrix.T @ u, (300, 300), iterations=12)
    assert not spectrum.converged
    assert spectrum.iterations == 12
    assert spectrum.largest == pytest.approx(1.0, rel=1e-3)


def test_the_start_vector_of_lanczos_is_that_of_seed_0():
    """Before it has converged, the result depends on the start vector. A user can choose another one."""
    matrix = torch.randn(40, 40, dtype=torch.float64)
    operator = lambda v: matrix @ v, lambda u: matrix.T @ u, (40, 40)
    for found in (
        lambda **seed: jacobian.lanczos_spectrum(*operator, iterations=5, **seed),
        lambda **seed: jacobian.function_spectrum(lambda v: matrix @ v, matrix[0], "lanczos", iterations=5, **seed),
    ):
        assert found() == found(seed=0) != found(seed=1)


def test_lanczos_finds_an_invariant_space():
    """With two distinct singular values, one possibly 0, Lanczos needs two or three steps, whatever the size."""
    for values in ((2.0, 0.5), (2.0, 0.0)):
        diagonal = torch.tensor(values, dtype=torch.float64).repeat(20)
        spectrum = jacobian.lanczos_spectrum(lambda v: diagonal * v, lambda u: diagonal * u, (40, 40))  # noqa: B023
        assert spectrum.converged
        assert spectrum.iterations <= 3
        assert (spectrum.largest, spectrum.smallest) == pytest.approx(values, abs=1e-12)


def test_function_lanczos_agrees_with_the_exact_svd():
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 30)).double()
    point = torch.randn(20, dtype=torch.float64)
    exact = torch.linalg.svdvals(torch.autograd.functional.jacobian(model, point))
    for method in ("lanczos", "exact"):
        spectrum = jacobian.function_spectrum(model, point, method)
        assert (spectrum.method, spectrum.converged, spectrum.shape) == (method, True, (30, 20))
        assert spectrum.largest == pytest.approx(exact[0].item(), rel=1e-3)
        assert spectrum.smallest == pytest.approx(exact[-1].item(), rel=1e-3)


def test_state_jacobian_agrees_with_lanczos_and_autograd():
    model = make_mlp(beta=0.1)
    inputs = torch.randn(8, 6)
    result = profile(model, inputs, repeats=1, matmul_rate=1.0)

    def state_map(h0):
        for weight, bias in zip(model.weight.detach(), model.bias.detach(), strict=True):
            h0 = 0.9 * h0 @ model.filter.T + 0.1 * torch.tanh(h0 @ weight.T + bias)
        return h0

    h0 = model.input_layer(inputs[:1]).detach()
    lanczos = jacobian.function_spectrum(state_map, h0, "lanczos", tolerance=1e-5)
    exact = result.jacobians["h_0 -> h_L"]
    assert lanczos.largest == pytest.approx(exact.largest, rel=1e-4)
    assert lanczos.smallest == pytest.approx(exact.smallest, rel=1e-3)
    whole = torch.autograd.functional.jacobian(model, inputs[:1]).reshape(3, 6)
    values = torch.linalg.svdvals(whole)
    composed = result.jacobians["input -> output"]
    assert (composed.largest, composed.smallest) == pytest.approx((values[0].item(), values[-1].item()), rel=1e-3)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("case", ["a wide net", "an end that does more than its weight"])
def test_jacobian_of_an_mlp_that_the_chain_rule_does_not_give(case, monkeypatch):
    model, inputs = make_mlp(), torch.randn(8, 6)
    if case == "a wide net":
        monkeypatch.setattr(replay, "EXACT_WIDTH", 15)
    else:
        model.input_layer = Doubled(6, 16)
    jacobians = profile(model, inputs, repeats=1, matmul_rate=1.0).jacobians
    exact = torch.linalg.svdvals(torch.autograd.functional.jacobian(model, inputs[:1]).reshape(3, 6))
    composed = jacobians.pop("input -> output")
    assert (composed.largest, composed.smallest) == pytest.approx((exact[0].item(), exact[-1].item()), rel=1e-3)
    assert list(jacobians) == ([] if case == "a wide net" else ["h_0 -> h_L"])


def test_jacobian_of_one_sample_with_batch_norm():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    inputs = torch.randn(8, 6)
    spectrum = profile(model, inputs, repeats=1, matmul_rate=1.0).jacobians["input -> output"]
    whole = torch.autograd.functional.jacobian(model, inputs)[0, :, 0]
    assert spectrum.largest == pytest.approx(torch.linalg.svdvals(whole)[0].item(), rel=1e-4)


# --- what vanishes


def test_a_plain_net_vanishes_and_is_reported(tmp_path):
    """Below the smallest float32 the gradient is lost, but the Jacobian's singular values are not."""
    model = make_mlp(depth=400, filter="identity", alpha=0.0, beta=0.2)
    with torch.no_grad():
        model.bias.zero_()
    result = profile(model, torch.randn(8, 6), repeats=1, matmul_rate=1.0)
    norms = result.columns["gradient_norm"][1:-1]
    assert norms[0] == 0.0
    assert norms[-1] > 0.1
    spectrum = result.jacobians["h_0 -> h_L"]
    assert 0 < spectrum.largest < 1e-200
    assert not spectrum.smallest_resolved
    assert picture.gradient_fate(norms).startswith("underflows at layer ")
    result.plot(tmp_path / "vanished.png")
    assert (tmp_path / "vanished.png").read_bytes().startswith(b"\x89PNG")
    assert "below rounding" in result.table()


def test_fates_in_words():
    assert picture.gradient_fate(np.array([0.5, 1.0])) == "keeps 50% of its size"
    assert picture.gradient_fate(np.array([0.11, 1.0])) == "keeps 11% of its size"
    assert picture.gradient_fate(np.array([0.09, 1.0])) == "shrinks by a factor of 10^1.0"
    assert picture.gradient_fate(np.array([1.5, 1.0])) == "grows by 50%"
    assert picture.gradient_fate(np.array([9.0, 1.0])) == "grows by 800%"
    assert picture.gradient_fate(np.array([11.0, 1.0])) == "grows by a factor of 10^1.0"
    assert picture.gradient_fate(np.array([1e-5, 1.0])) == "shrinks by a factor of 10^5.0"
    assert picture.gradient_fate(np.array([1e5, 1.0])) == "grows by a factor of 10^5.0"
    assert picture.gradient_fate(np.array([math.nan, math.inf, 1e30, 1.0])) == "overflows at layer 2"
    assert picture.gradient_fate(np.array([0.0, 1e-42, 1e-30, 1.0])) == "underflows at layer 2"


def axes_of_a_picture(**options):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(**options)).figure.subplots()


def test_values_off_the_scale_are_drawn_faded_and_named():
    """Subnormal noise is not drawn as a curve, and NaN is reported as an overflow."""
    values = np.array([1e-45, 3e-45, 0.0, 1e-42, 1e-30, 1.0])
    overflowing = np.array([math.nan, math.inf, 1e30, 1e20, 1e10, 1.0])
    axes = axes_of_a_picture()
    lines = [plot.Line("small", values, "k"), plot.Line("large", overflowing, "r")]
    plot.log_lines(axes, np.arange(1, 7), lines)
    small_faded, small, large_faded, large = (line.get_ydata() for line in axes.get_lines()[:4])
    assert len(set(small_faded[:4])) == 1
    assert np.isnan(small[:4]).all()
    np.testing.assert_allclose(small[4:], [-30, 0], atol=1e-12)
    assert len(set(large_faded[:2])) == 1
    assert np.isnan(large[:2]).all()
    words = [label.get_text() for label in axes.get_yticklabels()]
    assert "overflow" in words
    assert "inf" not in words


@pytest.mark.parametrize(
    ("values", "lowest", "highest"), [([2e4, 3e6, 5e9], 4, 10), ([2e-9, 1e-8], -11, -7), ([], -2, 2)]
)
def test_the_picture_shows_the_decades_of_its_values(values, lowest, highest):
    """It shows at least four decades, and those around 1 if there are no values."""
    axes = axes_of_a_picture()
    lines = [plot.Line("values", np.array(values), "k")] if values else []
    plot.log_lines(axes, np.arange(1, max(len(values), 1) + 1), lines)
    bottom, top = axes.get_ylim()
    assert bottom == lowest
    assert highest <= top < highest + 1


def test_a_label_stands_beside_its_own_line():
    axes = axes_of_a_picture()
    heights = {"low": -4.0, "middle": 0.0, "high": 4.0}
    lines = [plot.Line(label, np.full(50, 10.0**height), "k") for label, height in heights.items()]
    plot.log_lines(axes, np.arange(1, 51), lines)
    assert axes.get_legend() is None
    places = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert places.keys() == heights.keys()
    for label, place in places.items():
        assert 0 < abs(place - heights[label]) < 1


def test_labels_without_room_beside_their_lines_are_in_a_legend():
    """The note on underflow is then left out."""
    axes = axes_of_a_picture(figsize=(1.5, 1))
    plot.log_lines(axes, np.arange(1, 4), [plot.Line("a label longer than the axis", np.array([1e-42, 1.0, 1.0]), "k")])
    assert not axes.texts
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a label longer than the axis"]


@pytest.mark.parametrize("words", ["a few words", "many words " * 20])
def test_a_line_of_text_is_as_wide_as_the_figure_at_most(words):
    figure = axes_of_a_picture(figsize=(6, 2)).figure
    plot.line_of_text(figure, 0.5, words, fontsize=14)
    (text,) = figure.texts
    share = text.get_window_extent(figure.canvas.get_renderer()).width / figure.bbox.width
    assert share < 1 - plot.LEFT
    assert text.get_fontsize() == 14 or share > 0.8


@pytest.mark.parametrize("depth", range(1, 6))
def test_profiles_of_a_few_layers_are_drawn(depth, tmp_path):
    profile(make_mlp(depth=depth), torch.randn(8, 6), repeats=1, matmul_rate=1.0).plot(tmp_path / "a.png")
    profile(nn.Linear(2, 2), torch.randn(8, 2), repeats=1, matmul_rate=1.0).plot(tmp_path / "b.png")


# --- results and files


def test_csv_json_table_and_plot(tmp_path):
    result = profile(make_mlp(), torch.randn(8, 6), repeats=1, name="a net")
    result.to_csv(tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result) == 26
    assert list(rows[0]) == list(COLUMNS)
    assert rows[0]["gain_upper"] == ""
    assert float(rows[3]["gradient_norm"]) == pytest.approx(result.columns["gradient_norm"][3], rel=1e-6)

    result.to_json(tmp_path / "profile.json")
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["rows"] == len(content["columns"]["state_rms"]) == 26
    assert content["columns"]["gain_upper"][0] == "nan"
    assert content["timing"]["matmul_rate"] > 1e8
    assert content["timing"]["layers"] == 26
    assert content["peak_memory_bytes"] > 1e7

    table = result.table()
    assert "a net: 12 of 26 rows" in table
    assert "layer[24]" not in table.splitlines()[3]
    assert "GFLOP/s" in table
    for name, start in (
        ("picture.png", b"\x89PNG"), ("picture.svg", b"<?xml"), ("picture.pdf", b"%PDF"), ("picture", b"\x89PNG"),
    ):  # fmt: skip
        result.plot(tmp_path / name)
        written = (tmp_path / name).read_bytes()
        assert written.startswith(start)
        assert len(written) > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "picture", "picture.pdf", "picture.png", "picture.svg", "profile.json", "rows.csv",
    ]  # fmt: skip


def test_rates_are_operations_by_seconds():
    timing = result_module.Timing(0.5, 0.25, 3, 10, forward_flops=2 * 10**9, backward_flops=4 * 10**9, matmul_rate=8e9)
    assert timing.summary() == {
        "forward_seconds": 0.5,
        "backward_seconds": 0.25,
        "repeats": 3,
        "layers": 10,
        "forward_flops": 2 * 10**9,
        "backward_flops": 4 * 10**9,
        "matmul_rate": 8e9,
        "microseconds_per_layer": 75_000.0,
        "forward_gflops_per_second": 4.0,
        "backward_gflops_per_second": 16.0,
        "forward_share_of_matmul_rate": 0.5,
        "backward_share_of_matmul_rate": 2.0,
    }
    table = SimpleNamespace(timing=timing, peak_memory_bytes=None, backend="cpp", machine={"threads": 2})
    assert result_module.timing_rows(table) == [
        ["forward", "500 ms (median of 3)"],
        ["backward", "250 ms (median of 3)"],
        ["forward + backward per layer", "7.5e+04 µs"],
        ["forward rate", "4 GFLOP/s, 50.0% of this machine's matmul rate"],
        ["backward rate", "16 GFLOP/s, 200.0% of this machine's matmul rate"],
        ["matmul rate (float32)", "8 GFLOP/s"],
        ["backend", "cpp, 2 threads"],
    ]


def test_no_pass_begins_after_ten_seconds(monkeypatch):
    ticks = itertools.count()
    # The clock is read before every pass, at its begin, between forward and backward, and at its end.
    monkeypatch.setattr(machine, "now", lambda device: 1.25 * next(ticks))
    timing = profile(nn.Linear(2, 2), torch.ones(3, 2), repeats=5, matmul_rate=1.0).timing
    assert (timing.forward_seconds, timing.backward_seconds, timing.repeats) == (1.25, 1.25, 2)


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({}, "0.5 ... 2"),
        ({"log_lower": -math.inf, "log_upper": math.log(3.0)}, "0.5 ... 2, bounds 0 ... 3"),
        ({"converged": False}, "0.5 ... 2 (not converged after 7 steps)"),
        ({"smallest": 1e-12, "smallest_resolved": False}, "1e-12 (below rounding) ... 2"),
        ({"largest": math.inf}, "overflows"),
    ],
    ids=str,
)
def test_spectra_in_words(figures, words):
    known = {"largest": 2.0, "smallest": 0.5, "shape": (3, 3), "method": "lanczos", "iterations": 7}
    spectrum = jacobian.JacobianSpectrum(**{**known, "converged": True, "smallest_resolved": True, **figures})
    rows = result_module.jacobian_rows(SimpleNamespace(jacobians={"x -> y": spectrum}))
    assert rows == [["singular values x -> y", words]]


def test_table_without_rich(monkeypatch):
    result = profile(nn.Linear(3, 2), torch.randn(4, 3), repeats=1, matmul_rate=1.0)
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    verdict, lines = result.table().split("\n\n")[:2]
    assert verdict == str(result.verdict())
    lines = lines.splitlines()
    assert lines[0] == "Linear: 1 of 1 rows"
    assert lines[1].split() == ["layer", "state", "rms", "gradient", "shift", "dE/dW"]
    assert lines[2].startswith("Linear")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "file.txt"
    files.write_atomically(path, lambda file: file.write("old"))

    def half(file):
        file.write("new, but only ha")
        file.flush()
        raise error

    with pytest.raises(error):
        files.write_atomically(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("no module", torch.ones(1)), TypeError, "expected a torch.nn.Module"),
        ((nn.Linear(2, 2), [1.0]), TypeError, "inputs hold list; expected a tensor"),
        ((nn.Linear(2, 2), (torch.ones(()), 1.0)), TypeError, "inputs hold a tensor of 0 dimensions, float; expected"),
        ((nn.Linear(2, 2), ()), TypeError, "inputs hold nothing; expected"),
        (
            (nn.Linear(2, 2), torch.ones(3, 2), None, lambda output: output),
            ValueError,
            r"has shape \(3, 2\); expected a tensor with one element",
        ),
        ((nn.Linear(2, 2), torch.ones(3, 2), None, lambda output: output.sum().item()), ValueError, "loss is a float"),
        (
            (nn.Linear(2, 2), torch.ones(3, 2), None, lambda output: output.sum().detach()),
            ValueError,
            "the loss does not require",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        profile(*arguments)


def test_the_file_of_a_killed_writer_is_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    stale, running = tmp_path / f".file.txt.{process.pid}.part", tmp_path / f".file.txt.{os.getppid()}.part"
    other = tmp_path / f".file.csv.{process.pid}.part"
    for path in (stale, running, other):
        path.write_text("half")
    files.write_atomically(tmp_path / "file.txt", lambda file: file.write("whole"))
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "file.txt", running, other])


class OnlyOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


class Calls(nn.Module):
    """A model that calls the given function with itself and the output of a linear layer."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(80, 80), function
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        return self.function(self, self.layer(x))


def test_the_reason_for_a_missing_jacobian_is_kept_beside_the_other_figures():
    model, inputs = Calls(lambda _, x: OnlyOnce.apply(x)), torch.randn(2, 80)
    result = profile(model, inputs, repeats=1, matmul_rate=1.0)
    reason = result.absent["input -> output"]
    assert "no second derivative" in reason
    assert "'exact'" in reason
    assert reason in " ".join(result.table().split())
    assert result.jacobians == {}
    y = model.layer(inputs)
    expected = [y.square().mean().sqrt().item(), y.square().square().mean().sqrt().item()]
    np.testing.assert_allclose(result.columns["state_rms"], expected, **CLOSE)

    def fails_later(model, x):
        model.times = getattr(model, "times", 0) + 1
        if model.times > 3:
            raise RuntimeError("the model's own")
        return x

    # The fourth call is for the Jacobian.
    result = profile(Calls(fails_later), torch.randn(2, 80), repeats=1, matmul_rate=1.0)
    assert result.absent == {"input -> output": "RuntimeError: the model's own"}
    assert result.timing.repeats == 1


def test_a_rebound_buffer_is_restored():
    def count(model, x):
        model.count = model.count + 1
        return x

    model = Calls(count)
    buffer = model.count
    profile(model, torch.randn(2, 80), repeats=1, matmul_rate=1.0, jacobian=False)
    assert model.count is buffer
    assert model.count.item() == 0


def test_the_ends_of_a_network_can_be_called_alone():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = make_mlp()

        def forward(self, x):
            before = self.deep.output_layer(self.deep.input_layer(x))
            return before + self.deep(x) + self.deep.output_layer(torch.ones(8, 16))

    result = profile(Parts(), torch.randn(8, 6), repeats=1, matmul_rate=1.0)
    names = list(result.columns["name"])
    assert names[:3] == ["deep.input_layer", "deep.output_layer", "deep.input_layer#2"]
    # The last row is the model's own sum.
    assert names[-2:] == ["deep.output_layer#3", "Parts"]
    assert len(names) == 2 + 26 + 1 + 1
    assert (result.columns["gradient_norm"][3:27] > 0).all()


def test_bad_options():
    model, inputs = nn.Linear(2, 2), torch.ones(3, 2)
    with pytest.raises(ValueError, match="repeats is 0"):
        profile(model, inputs, repeats=0)
    for repeats in (2.5, True, "3"):
        with pytest.raises(TypeError, match="expected an int"):
            profile(model, inputs, repeats=repeats)
    with pytest.raises(ValueError, match="at least one sample"):
        profile(model, inputs[:0])
    with torch.inference_mode(), pytest.raises(ValueError, match="Call profile outside of it"):
        profile(model, inputs)
    with pytest.raises(ValueError, match="method is 'power'; expected one of 'auto', 'exact', 'lanczos'"):
        profile(model, inputs, repeats=1, matmul_rate=1.0, jacobian_method="power")
    with pytest.raises(ValueError, match="does not depend on the input"):
        jacobian.function_spectrum(lambda x: torch.ones(2, requires_grad=True) * 1, inputs)
    assert profile(model, inputs, repeats=1, matmul_rate=1.0, jacobian=False).jacobians == {}


# --- the main job


def test_kinds_match_their_names():
    settings = main_job.Settings(depth=3, width=16)
    h0 = torch.randn(5, 64)
    networks = {kind: main_job.make_network(kind, settings, 64, 10) for kind in main_job.KINDS}
    weight = networks["plain"].weight
    assert all(torch.equal(network.weight, weight) for network in networks.values())
    plain = residual = networks["plain"].input_layer(h0)
    for matrix in weight:
        plain, residual = torch.tanh(plain @ matrix.T), residual + torch.tanh(residual @ matrix.T)
    for kind, state in (("plain", plain), ("residual", residual)):
        torch.testing.assert_close(networks[kind](h0), networks[kind].output_layer(state), **CLOSE)


@pytest.mark.parametrize("kind", main_job.KINDS)
def test_initial_norms_are_those_of_a_profile(kind):
    model = main_job.make_network(kind, main_job.Settings(depth=300, width=16), 64, 10)
    inputs, targets = torch.randn(8, 64), torch.randint(10, (8,))
    columns = profile(model, inputs, targets, repeats=1, matmul_rate=1.0, jacobian=False).columns
    for name, values in main_job.initial_norms(model, inputs, targets).items():
        np.testing.assert_allclose(values, columns[name][1:-1], rtol=1e-4, err_msg=name)


def test_the_headline_compares_nets_at_initialisation():
    flat, falling = np.ones(100), np.logspace(-30, 0, 100)
    report = SimpleNamespace(
        settings=main_job.Settings(depth=100, steps=3),
        history=main_job.History(loss=[1.0] * 3, test_accuracy=[(3, 0.5)]),
        profiles={"orthogonal-filter": SimpleNamespace(columns={"gradient_norm": np.r_[1, 0.5, flat[1:], 1]})},
        initial={
            kind: {"gradient_norm": norms}
            for kind, norms in zip(main_job.KINDS, (flat, falling[::-1], falling), strict=True)
        },
    )
    headline, details = picture.findings(report)
    assert headline == "Through 100 layers, the gradient of an orthogonal-filter net keeps 100% of its size"
    assert details == (
        "All at initialisation: un-normalised residual grows by a factor of 10^30.0; plain shrinks by a factor of "
        "10^30.0.  After 3 steps (dashed): keeps 50% of its size, 50% test accuracy."
    )


def test_a_machine_that_hides_its_processors_has_one(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.describe()["cpu_count"] == 1


def test_an_overflow_is_reported_in_words():
    assert ends(np.array([0.093, math.nan])) == "0.093 -> overflows"


def test_matmul_rate_is_that_of_torchs_fastest_matmul(monkeypatch):
    def slow(left, right):
        time.sleep(0.02)
        return left

    monkeypatch.setattr(machine, "_products", lambda device: [slow])
    alone = machine.matmul_rate("cpu", size=64, repeats=2)
    monkeypatch.setattr(machine, "_products", lambda device: [slow, torch.mm])
    assert machine.matmul_rate("cpu", size=64, repeats=2) > 2 * alone
    monkeypatch.undo()
    left, right = torch.randn(2, 32, 32).unbind()
    mm, *others = machine._products(torch.device("cpu"))
    assert mm is torch.mm
    for product in others:
        torch.testing.assert_close(product(left, right), left @ right.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("filter", ["haar", "permutation"])
def test_training_on_digits_works_and_is_repeatable(filter):
    settings = main_job.Settings(depth=100, steps=30, filter=filter)
    digits = main_job.data.load("digits")

    def histories():
        model = main_job.make_network("orthogonal-filter", settings, 64, 10)
        return main_job.train(model, digits, settings)

    first, again = histories(), histories()
    assert first.loss[-1] < 0.3 * first.loss[0]
    assert first.test_accuracy[0][1] < 0.3
    assert first.test_accuracy[-1][1] > 0.88
    assert first.loss == again.loss
    assert [step for step, _ in first.test_accuracy] == [0, 5, 10, 15, 20, 25, 30]


# --- with the parallel solver


def profile_of(solver, inputs, module=make_mlp, **options):
    torch.manual_seed(1)
    return profile(module(solver=solver, **options), inputs, repeats=1, matmul_rate=1.0, jacobian=False)


@pytest.mark.parametrize("filter", ["haar", "cyclic"])
@pytest.mark.parametrize("window", [None, 12])
def test_parallel_solves_are_reported_and_nothing_else_changes(filter, window, tmp_path):
    inputs = torch.randn(8, 6)
    sequential = profile_of("sequential", inputs, filter=filter)
    with record_solves() as recorded:
        parallel = profile_of("parallel", inputs, filter=filter, window=window)
    for name, values in sequential.columns.items():
        if name != "name":
            np.testing.assert_allclose(parallel.columns[name], values, rtol=1e-4, atol=1e-7, err_msg=name)
    assert parallel.timing.forward_flops == sequential.timing.forward_flops
    assert parallel.timing.backward_flops == sequential.timing.backward_flops
    assert list(parallel.solves) == ["forward", "backward"]
    # The recorded pass and the one timed pass are alike; the backward pass solves windows forward once more.
    for direction, solves in parallel.solves.items():
        of_direction = [solve for solve in recorded if solve.direction == direction]
        assert solves.windows == (1 if window is None else 2)
        assert solves.largest_window == (24 if window is None else 12)
        assert solves.largest_sweeps == max(solve.sweeps for solve in of_direction) >= 2
        assert 2 <= solves.mean_sweeps <= solves.largest_sweeps
        for figure in ("contraction", "residual", "error"):
            largest = max(getattr(solve, figure) for solve in of_direction)
            assert getattr(solves, f"largest_{figure}") == largest
            assert 0 <= largest < 1
        assert (solves.given_up, solves.sequential_layers) == (0, 0)
    table = parallel.table()
    assert "forward in parallel" in table
    assert "backward in parallel" in table
    parallel.to_json(tmp_path / "profile.json")
    written = json.loads((tmp_path / "profile.json").read_text())["solves"]
    assert written["forward"]["windows"] == parallel.solves["forward"].windows


def test_a_sequential_profile_reports_no_solves(tmp_path):
    result = profile_of("sequential", torch.randn(8, 6))
    assert result.solves == {}
    assert "in parallel" not in result.table()
    assert "solves" not in result.summary()
    # At such sizes nothing has been measured to be faster in parallel.
    automatic = profile_of("auto", torch.randn(8, 6))
    assert automatic.solves == {}


def test_solves_of_an_rnn_in_a_larger_model():
    class Reader(nn.Module):
        def __init__(self, solver):
            super().__init__()
            self.rnn = OrthogonalFilterRNN(3, 16, length=24, solver=solver)
            self.output = nn.Linear(16, 2)

        def forward(self, sequence):
            return self.output(self.rnn(sequence)[1][0])

    sequence = torch.randn(24, 8, 3)
    sequential, parallel = (profile_of(solver, sequence, Reader) for solver in ("sequential", "parallel"))
    np.testing.assert_allclose(parallel.columns["state_rms"], sequential.columns["state_rms"], rtol=1e-4)
    assert parallel.timing.backward_flops == sequential.timing.backward_flops
    assert {direction: solves.windows for direction, solves in parallel.solves.items()} == {"forward": 1, "backward": 1}


@pytest.mark.filterwarnings("ignore:orthogonal_filter. the parallel solver did not converge:RuntimeWarning")
def test_solves_that_did_not_converge_are_reported():
    """alpha = beta = 1: only the smallest windows converge, and some layers are left to the sequential kernel."""
    result = profile_of("parallel", torch.randn(8, 6), depth=60, filter="identity", alpha=1.0, beta=1.0)
    solves = result.solves["forward"]
    assert solves.given_up > 0
    assert solves.sequential_layers > 0 or solves.windows > 1
    words = dict(result_module.solves_rows(result))["forward in parallel"]
    assert f"{solves.given_up} window" in words
    assert "given up" in words


def solve(direction="forward", layers=100, sweeps=3, contraction=0.01, residual=1e-6, error=1e-8, converged=True):
    return Solve(direction, 0, layers, sweeps, contraction, residual, error, converged)


def test_solves_in_words():
    assert Solves.of([]) is None
    few = Solves.of([solve(), solve(layers=50, sweeps=2, contraction=math.nan), solve(sweeps=4, contraction=0.02)])
    assert result_module._solves_in_words(few) == (
        "3 windows of at most 100 layers, 3 sweeps in the mean, at most 4, contraction 0.02, residual 1e-06, "
        "error estimate 1e-08"
    )
    one = Solves.of([solve(layers=50_000, sweeps=1, contraction=math.nan, residual=0.0, error=0.0)])
    assert result_module._solves_in_words(one) == "one window of 50,000 layers, 1 sweeps, residual 0, error estimate 0"
    gone = Solves.of(
        [
            solve(sweeps=16, contraction=math.nan, residual=math.nan, error=math.inf, converged=False),
            solve(layers=1000, sweeps=0, contraction=math.nan, residual=0.0, error=0.0),
        ]
    )
    assert result_module._solves_in_words(gone) == "1 window given up, 1,000 layers sequentially"
    assert (gone.windows, gone.largest_window, gone.largest_sweeps) == (0, 0, 0)
    assert math.isnan(gone.mean_sweeps)
    assert math.isnan(gone.largest_error)


def test_the_main_job_in_parallel(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main_job.machine, "matmul_rate", lambda device: 1e9)
    settings = main_job.Settings(
        depth=48, width=16, batch=8, steps=0, out=str(tmp_path), solver="parallel", window=16, tolerance=1e-5
    )
    assert main_job.run(settings) == 0
    networks = json.loads((tmp_path / "report.json").read_text())["networks"]
    assert networks["orthogonal-filter"]["solves"]["forward"]["windows"] == 3
    assert not any("solves" in networks[kind] for kind in ("residual", "plain"))
    assert "forward in parallel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "fast"}, "--solver: solver is 'fast'"),
        ({"window": 5}, "--solver: window is 5; expected None, because the sequential"),
        ({"solver": "parallel", "window": 0}, "--solver: window is 0"),
        ({"solver": "parallel", "tolerance": -1.0}, "--solver: tolerance is -1.0"),
    ],
)
def test_the_main_job_checks_the_solver_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        main_job.run(main_job.Settings(depth=3, **options))
