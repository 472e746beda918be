"""What is known about the recurrence in closed form: bounds on states, gradients and singular values.

A. Ceni, arXiv 2210.01245, proves bounds of this kind; these constants are derived, with s = Lip(act) max ||W_l||_2:
one layer has its singular values in [alpha - beta s, alpha + beta s], and L layers in the L-th powers of that.
"""

import math

import pytest
import torch

from lcw_ops import functional as F
from lcw_ops import use_backend
from lcw_ops.ops import _backends

pytestmark = pytest.mark.usefixtures("kernel_under_test", "made_on_device")

LIPSCHITZ = {"tanh": 1.0, "relu": 1.0, "sigmoid": 0.25, "identity": 1.0}


def net(depth, width, filter="matrix", gain=1.0):
    weight = torch.randn(depth, width, width, dtype=torch.float64) * gain / width**0.5
    bias = 0.1 * torch.randn(depth, width, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    return weight, bias, rotation if filter == "matrix" else torch.randperm(width)


def jacobian(h0, weight, bias, filter, **options):
    """dh_L/dh_0 for one sample: its rows are independent, so N copies of it and one backward pass give all of it."""
    width = weight.shape[-1]
    copies = h0.expand(width, width).clone().requires_grad_()
    output = F.orthogonal_filter(copies, weight, bias, filter, **options)
    return torch.autograd.grad(output, copies, torch.eye(width, dtype=output.dtype))[0]


def test_the_kernel_of_the_device_is_what_runs_here(device):
    weight, bias, rotation = net(2, 4)
    assert {tensor.device.type for tensor in (weight, bias, rotation)} == {device.type}
    assert _backends.requested() == ("cuda" if device.type == "cuda" else "cpp")


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
    """1000 layers, c = 1: 0.355 to 0.38 for independent W_l, around exp(-1) = 0.368."""
    weight, bias, rotation = net(1000, 64)
    values = torch.linalg.svdvals(jacobian(torch.randn(64, dtype=torch.float64), weight, 0 * bias, rotation))
    assert 0.33 < values.min() < math.exp(-1) < values.max() < 0.41


def test_a_constant_beta_kills_the_gradient():
    """beta must be O(1/L): with beta fixed and no slope in the branch, what is left is exactly (1 - beta)^L."""
    depth, width, beta = 3000, 8, 0.01
    _, _, rotation = net(1, width)
    silent = torch.zeros(depth, width, width, dtype=torch.float64)
    h0 = torch.randn(1, width, dtype=torch.float64, requires_grad=True)
    output = F.orthogonal_filter(h0, silent, None, rotation, beta=beta)
    gradient = torch.autograd.grad(output, h0, torch.eye(width, dtype=torch.float64)[:1])[0]
    torch.testing.assert_close(gradient.norm().item(), (1 - beta) ** depth, rtol=1e-10, atol=0)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_states_of_a_bounded_activation_stay_bounded(activation):
    """Convex and |act| <= 1: ||h_l|| <= max(||h_0||, sqrt(N)), with weights however large."""
    depth, width = 200, 12
    weight, bias, rotation = net(depth, width, gain=30.0)
    h0 = 5 * torch.randn(20, width, dtype=torch.float64)
    states = F.orthogonal_filter(h0, weight, bias, rotation, beta=0.2, activation=activation, return_states=True)
    bound = h0.norm(dim=1).clamp(min=math.sqrt(width))
    assert (states.norm(dim=2) <= bound * (1 + 1e-12)).all()


def test_weight_gradients_obey_their_bound():
    """||dE/dW_l||_F <= beta Lip ||g_l|| ||h_{l-1}|| for one sample, and g_l obeys the layer bounds."""
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
    """(O h)_i = h_{p_i}: row i of O has its one in column p_i."""
    weight, bias, permutation = net(20, 9, "permutation")
    matrix = torch.eye(9, dtype=torch.float64)[permutation]
    h0 = torch.randn(4, 9, dtype=torch.float64)
    by_index = F.orthogonal_filter(h0, weight, bias, permutation)
    by_matrix = F.orthogonal_filter(h0, weight, bias, matrix)
    torch.testing.assert_close(by_index, by_matrix, rtol=1e-14, atol=1e-14)


def test_depth_with_shared_weights_is_time():
    """One recurrence, two uses: L equal layers are T steps of one layer."""
    weight, bias, rotation = net(1, 9)
    h0, inputs = torch.randn(4, 9, dtype=torch.float64), torch.randn(15, 4, 9, dtype=torch.float64)
    depth = F.orthogonal_filter(h0, weight.expand(15, 9, 9), bias.expand(15, 9), rotation, inputs=inputs)
    time = F.orthogonal_filter(h0, weight[0], bias[0], rotation, inputs=inputs)
    assert torch.equal(depth, time)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "identity"])
@pytest.mark.parametrize("filter", ["matrix", "permutation"])
def test_the_reference_itself_against_finite_differences(activation, filter):
    """Plain torch, twice differentiable, forward mode too; the kernels are judged by it."""
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
