"""Facts about the recurrence in closed form: bounds on states, gradients and singular values.

The net has L layers of N units, h_l = alpha O h_{l-1} + beta act(W_l h_{l-1} + b_l), and c = beta L. A. Ceni, arXiv
2210.01245, proves bounds of this kind. These constants are ours. Let s = Lip(act) max ||W_l||_2. The singular values of
one layer's Jacobian lie in [alpha - beta s, alpha + beta s], those of L layers between the L-th powers of these bounds.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lcw_ops import functional as F
from lcw_ops import nn, use_backend
from lcw_ops.jobs import data
from lcw_ops.ops import backends
from lcw_ops.ops.orthogonal_filter import op
from lcw_ops.profile import bounds
from lcw_ops.reference.orthogonal_filter import activation_derivative

pytestmark = pytest.mark.usefixtures("kernel_under_test", "made_on_device")

LIPSCHITZ = {"tanh": 1.0, "relu": 1.0, "sigmoid": 0.25, "identity": 1.0}


def net(depth, width, filter="matrix", gain=1.0):
    weight = torch.randn(depth, width, width, dtype=torch.float64) * gain / width**0.5
    bias = 0.1 * torch.randn(depth, width, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    return weight, bias, rotation if filter == "matrix" else torch.randperm(width)


def jacobian(h0, weight, bias, filter, **options):
    """dh_L/dh_0 for one sample. Rows are independent, so one backward pass over N copies of h_0 gives the matrix."""
    width = weight.shape[-1]
    copies = h0.expand(width, width).clone().requires_grad_()
    output = F.orthogonal_filter(copies, weight, bias, filter, **options)
    return torch.autograd.grad(output, copies, torch.eye(width, dtype=output.dtype))[0]


def test_the_kernel_of_the_device_is_what_runs_here(device):
    weight, bias, rotation = net(2, 4)
    assert {tensor.device.type for tensor in (weight, bias, rotation)} == {device.type}
    assert backends.requested() == ("cuda" if device.type == "cuda" else "cpp")


def spectral_norm(weight, activation):
    return LIPSCHITZ[activation] * torch.linalg.matrix_norm(weight, ord=2).max().item()


@pytest.mark.parametrize("activation", sorted(LIPSCHITZ))
@pytest.mark.parametrize("filter", ["matrix", "permutation"])
@pytest.mark.parametrize("beta", [0.3, 0.05])
def test_singular_values_of_one_layer_lie_in_the_bounds(activation, filter, beta):
    weight, bias, rotation = net(1, 24, filter)
    h0 = torch.randn(24, dtype=torch.float64)
    values = torch.linalg.svdvals(jacobian(h0, weight, bias, rotation, beta=beta, activation=activation))
    s = spectral_norm(weight, activation)
    assert values.max() <= (1 - beta) + beta * s + 1e-12
    assert values.min() >= (1 - beta) - beta * s - 1e-12


@pytest.mark.parametrize("activation", sorted(LIPSCHITZ))
@pytest.mark.parametrize("c", [1.0, 3.0])
def test_singular_values_of_many_layers_lie_in_the_powers(activation, c):
    depth, width = 400, 16
    weight, bias, rotation = net(depth, width)
    h0 = torch.randn(width, dtype=torch.float64)
    values = torch.linalg.svdvals(jacobian(h0, weight, bias, rotation, beta=c / depth, activation=activation))
    s = spectral_norm(weight, activation)
    upper = (1 + c / depth * (s - 1)) ** depth
    lower = max(0.0, 1 - c / depth * (1 + s)) ** depth
    assert lower * (1 - 1e-9) <= values.min()
    assert values.max() <= upper * (1 + 1e-9)


def test_singular_values_concentrate_at_exp_minus_c():
    """For 1000 independent W_l and c = 1 the values lie between 0.355 and 0.38, around exp(-1) = 0.368."""
    weight, bias, rotation = net(1000, 64)
    values = torch.linalg.svdvals(jacobian(torch.randn(64, dtype=torch.float64), weight, 0 * bias, rotation))
    assert 0.33 < values.min() < math.exp(-1) < values.max() < 0.41


def test_a_constant_beta_kills_the_gradient():
    """beta must be O(1/L): with a fixed beta and W = 0, only (1 - beta)^L of the gradient remains."""
    depth, width, beta = 3000, 8, 0.01
    _, _, rotation = net(1, width)
    silent = torch.zeros(depth, width, width, dtype=torch.float64)
    h0 = torch.randn(1, width, dtype=torch.float64, requires_grad=True)
    output = F.orthogonal_filter(h0, silent, None, rotation, beta=beta)
    gradient = torch.autograd.grad(output, h0, torch.eye(width, dtype=torch.float64)[:1])[0]
    torch.testing.assert_close(gradient.norm().item(), (1 - beta) ** depth, rtol=1e-10, atol=0)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_states_of_a_bounded_activation_stay_bounded(activation):
    """If alpha + beta = 1 and |act| <= 1, then ||h_l|| <= max(||h_0||, sqrt(N)), for weights of any size."""
    depth, width = 200, 12
    weight, bias, rotation = net(depth, width, gain=30.0)
    h0 = 5 * torch.randn(20, width, dtype=torch.float64)
    states = F.orthogonal_filter(h0, weight, bias, rotation, beta=0.2, activation=activation, return_states=True)
    bound = h0.norm(dim=1).clamp(min=math.sqrt(width))
    assert (states.norm(dim=2) <= bound * (1 + 1e-12)).all()


def test_weight_gradients_obey_their_bound():
    """||dE/dW_l||_F <= beta Lip(act) ||g_l|| ||h_{l-1}|| for one sample with loss E. g_l = dE/dh_l is bounded too."""
    depth, width = 60, 10
    weight, bias, rotation = net(depth, width)
    beta = 1 / depth
    weight.requires_grad_()
    h0 = torch.randn(1, width, dtype=torch.float64)
    states = F.orthogonal_filter(h0, weight, bias, rotation, return_states=True)
    leaves = [state.detach().clone().requires_grad_() for state in states]
    gradients = []
    for l in range(depth + 1):
        tail = (weight[l:].detach(), bias[l:], rotation)
        out = F.orthogonal_filter(leaves[l], *tail, alpha=1 - beta, beta=beta) if l < depth else leaves[l]
        gradients.append(torch.autograd.grad(out.square().sum(), leaves[l])[0].norm().item())
    (grad_weight,) = torch.autograd.grad(states[-1].square().sum(), weight)
    s = spectral_norm(weight.detach(), "tanh")
    for l in range(1, depth + 1):
        bound = beta * gradients[l] * states[l - 1].norm().item()
        assert grad_weight[l - 1].norm().item() <= bound * (1 + 1e-9)
        last = gradients[depth]
        assert gradients[l] <= (1 + beta * (s - 1)) ** (depth - l) * last * (1 + 1e-9)
        assert gradients[l] >= max(0, 1 - beta * (1 + s)) ** (depth - l) * last * (1 - 1e-9)


def test_a_permutation_is_the_matrix_that_it_stands_for():
    """For a permutation p, (O h)_i = h_{p_i}: row i of O has its 1 in column p_i."""
    weight, bias, permutation = net(20, 9, "permutation")
    matrix = torch.eye(9, dtype=torch.float64)[permutation]
    h0 = torch.randn(4, 9, dtype=torch.float64)
    by_index = F.orthogonal_filter(h0, weight, bias, permutation)
    by_matrix = F.orthogonal_filter(h0, weight, bias, matrix)
    torch.testing.assert_close(by_index, by_matrix, rtol=1e-14, atol=1e-14)


def test_depth_with_shared_weights_is_time():
    """L layers with equal weights are T steps of one layer."""
    weight, bias, rotation = net(1, 9)
    h0, inputs = torch.randn(4, 9, dtype=torch.float64), torch.randn(15, 4, 9, dtype=torch.float64)
    depth = F.orthogonal_filter(h0, weight.expand(15, 9, 9), bias.expand(15, 9), rotation, inputs=inputs)
    time = F.orthogonal_filter(h0, weight[0], bias[0], rotation, inputs=inputs)
    assert torch.equal(depth, time)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "identity"])
@pytest.mark.parametrize("filter", ["matrix", "permutation"])
def test_the_reference_itself_against_finite_differences(activation, filter):
    """Plain torch, which judges the kernels, is twice differentiable, also in forward mode."""
    weight, bias, rotation = net(3, 3, filter)
    h0, inputs = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 2, 3, dtype=torch.float64)
    alpha, beta = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    arguments = [tensor.requires_grad_() for tensor in (h0, weight, bias, alpha, beta, inputs)]

    def function(h0, weight, bias, alpha, beta, inputs):
        with use_backend("reference"):
            return F.orthogonal_filter(
                h0, weight, bias, rotation, alpha, beta, inputs, activation=activation, return_states=True
            )

    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@dataclass
class Trained:
    """A network trained on images of digits in float32, and in float64 its weights, and states for some samples."""

    losses: list[float]
    growth: float  # the largest relative change of ||W_l||_2 by training
    weight: torch.Tensor
    bias: torch.Tensor
    filter: torch.Tensor
    alpha: float
    beta: float
    activation: str
    states: torch.Tensor  # (L + 1, M, N)
    grad_states: torch.Tensor  # (L + 1, M, N), of the mean loss
    grad_weight: torch.Tensor

    def gain_bounds(self):
        """Bounds of each layer's singular values, from the profiler's bound of ||W_l||_2 and the filter's rounding."""
        norms = bounds.spectral_norm_bound(self.weight).cpu().numpy()
        deviation = bounds.filter_deviation(self.filter)
        return bounds.layer_gain_bounds(self.alpha, self.beta, norms, LIPSCHITZ[self.activation], deviation)


def train(activation, depth, width, steps, samples, batch=64):
    pytest.importorskip("sklearn", reason="the digits images come with scikit-learn")
    digits = data.load("digits").to(torch.get_default_device())
    model = nn.OrthogonalFilterMLP(digits.features, width, depth, digits.classes, activation=activation)
    norms_before = torch.linalg.matrix_norm(model.weight.detach().double(), 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-12)
    loss_of = torch.nn.functional.cross_entropy
    losses = []
    for step in range(steps):
        first = step * batch % (len(digits.x_train) - batch)
        loss = loss_of(model(digits.x_train[first : first + batch]), digits.y_train[first : first + batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    norms = torch.linalg.matrix_norm(model.weight.detach().double(), 2)
    exact = copy.deepcopy(model).double().requires_grad_(False)
    h0 = exact.input_layer(digits.x_test[:samples].double())
    alpha, beta = (torch.tensor([scale], dtype=torch.float64) for scale in (1 - 1 / depth, 1 / depth))
    arguments = (exact.weight, exact.bias, exact.filter, alpha, beta)
    states = F.orthogonal_filter(h0, *arguments, activation=activation, return_states=True)
    last = states[-1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(exact.output_layer(last), digits.y_test[:samples]), last)
    _, grad_weight, *_, grad_states = op.state_gradients(
        gradient, h0, *arguments, None, activation, op.DEFAULT_SEGMENT, backends.requested()
    )
    return Trained(
        losses,
        (norms / norms_before - 1).abs().max().item(),
        *arguments[:3],
        alpha.item(),
        beta.item(),
        activation,
        states,
        grad_states,
        grad_weight,
    )


# The errors of float64 products and singular values are far below the 1e-9 that the bounds are stretched by.
STRETCH = 1 + 1e-9


def assert_gradients_in_bounds(net):
    """Check ||g_l|| over all samples, from the last layer down. Return log(||g_1|| / ||g_L||) and its two bounds."""
    injected = np.zeros(len(net.weight) + 1)
    norms = net.grad_states.flatten(1).norm(dim=1).cpu().numpy()
    injected[-1] = norms[-1]
    lower, upper = bounds.gradient_norm_bounds(*net.gain_bounds(), injected)
    depth = len(net.weight)
    # One rounding of float64 per layer, in either direction.
    slack = math.log(STRETCH) + depth * np.finfo(np.float64).eps
    assert (np.log(norms) >= lower - slack).all()
    assert (np.log(norms) <= upper + slack).all()
    return [values[1] - values[-1] for values in (np.log(norms), lower, upper)]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_bounds_hold_on_a_trained_net(activation):
    """2000 layers, 20 steps on real images: bounds of each layer's Jacobian, the net's, gradients and states."""
    depth, width, samples = 2000, 24, 6
    net = train(activation, depth, width, steps=20, samples=samples)
    assert sum(net.losses[-3:]) < 0.7 * sum(net.losses[:3]), "this net has not learned anything"
    assert net.growth > 0.01, "the weights are still those of the initialisation"
    norms = torch.linalg.matrix_norm(net.weight, 2)
    bound = bounds.spectral_norm_bound(net.weight)
    assert (norms <= bound * STRETCH).all()

    lower, upper = (torch.from_numpy(values).unsqueeze(1) for values in net.gain_bounds())
    pre_activation = torch.einsum("lmi,loi->lmo", net.states[:-1], net.weight) + net.bias.unsqueeze(1)
    slopes = activation_derivative(pre_activation, activation)
    layers = net.alpha * net.filter + net.beta * slopes.unsqueeze(3) * net.weight.unsqueeze(1)
    values = torch.linalg.svdvals(layers).cpu()
    assert (values[..., 0] <= upper * STRETCH).all()
    assert (values[..., -1] >= lower / STRETCH).all()

    scales = {"alpha": net.alpha, "beta": net.beta, "activation": activation}
    whole = torch.linalg.svdvals(jacobian(net.states[0, 0], net.weight, net.bias, net.filter, **scales))
    log_lower, log_upper = bounds.jacobian_bounds(*net.gain_bounds())
    assert log_lower - 1e-9 <= whole[-1].log().item()
    assert whole[0].log().item() <= log_upper + 1e-9

    assert_gradients_in_bounds(net)
    # dW_l is a sum over the samples m, sum_m P_lm h_{l-1,m}^T, where P_lm is the gradient of the pre-activation.
    by_sample = net.grad_states[1:].norm(dim=2) * net.states[:-1].norm(dim=2)
    weight_bound = net.beta * LIPSCHITZ[activation] * by_sample.sum(1)
    assert (net.grad_weight.flatten(1).norm(dim=1) <= weight_bound * STRETCH).all()
    if activation == "tanh":
        rms = net.states[1:].square().mean((1, 2)).sqrt().cpu().numpy()
        deviation = bounds.filter_deviation(net.filter)
        state_bound = bounds.state_rms_bound(net.alpha, net.beta, net.states[0], depth, activation, deviation)
        assert (rms <= state_bound * STRETCH).all()


def test_gradient_norm_across_fifty_thousand_trained_layers(capsys):
    """||g_1|| / ||g_L|| stays between the bounds, which are about exp(-c (1 + s)) and exp(c (s - 1)) with c = 1."""
    net = train("tanh", 50_000, 16, steps=3, samples=8, batch=32)
    measured, lower, upper = assert_gradients_in_bounds(net)
    with capsys.disabled():
        print(
            f"\n50,000 layers of width 16 after {len(net.losses)} steps, loss {net.losses[0]:.3f} to "
            f"{net.losses[-1]:.3f}: ||g_1|| / ||g_L|| = {math.exp(measured):.4f}, bounds {math.exp(lower):.4f} to "
            f"{math.exp(upper):.4f}"
        )
    assert net.losses[-1] < net.losses[0]
    # The bounds themselves are informative: neither vanished nor exploded.
    assert math.exp(lower) > 1e-3
    assert math.exp(upper) < 100
