"""The profiler on models that write to their input, differentiate in forward, concatenate, cache, or draw numbers."""

import random

import numpy as np
import pytest
import torch
from support.profiles import figure, measure, row
from torch import nn
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("one_thread")


def shift(output, unit_dim):
    return output.double().movedim(unit_dim, -1).flatten(0, -2).mean(0).square().mean().sqrt().item()


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU(inplace=True)), nn.Sequential(nn.ReLU(True), nn.Linear(4, 4))])
def test_a_model_without_trained_parameters_may_write_to_its_input(model):
    x = torch.randn(8, 4)
    before = x.clone()
    result = measure(model.requires_grad_(False), x)
    assert figure(result, "gradient_norm", "0") > 0
    assert torch.equal(x, before)


class Force(nn.Module):
    """The gradient of an energy with respect to the input, as in models of molecules."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.last(self.act(self.first(x))).sum(), x, create_graph=True)[0]


def test_gradients_that_the_model_takes_itself_are_not_those_of_the_loss():
    model, x, targets = Force(), torch.randn(5, 3), torch.randn(5, 3)
    result = measure(model, x, targets)
    model, x = model.double(), x.double().requires_grad_()
    state = model.first(x)
    force = torch.autograd.grad(model.last(model.act(state)).sum(), x, create_graph=True)[0]
    (expected,) = torch.autograd.grad(functional.mse_loss(force, targets.double()), state)
    assert figure(result, "gradient_norm", "first") == pytest.approx(expected.norm().item(), rel=1e-5)
    # The loss is a function of the last layer's weight, and not of its output.
    assert result.reason("gradient_norm", row(result, "last")) == "the loss does not depend on it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lanczos_finds_the_largest_singular_value_in_16_bits(dtype):
    """200 eps of bfloat16 is more than 1, and still no product is all rounding."""
    model, x = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 200)).to(dtype), torch.randn(8, 200)
    result = measure(model, x.to(dtype)).jacobians["input -> output"]
    jacobian = torch.autograd.functional.jacobian(model.double(), x[0].to(dtype).double())
    # Each of the two layers and tanh rounds once, in J v and in J^T u.
    assert result.largest == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=6 * torch.finfo(dtype).eps)
    assert result.iterations > 1


def test_under_autocast_a_singular_value_below_the_rounding_is_not_resolved():
    model = nn.Sequential(nn.Linear(100, 4), nn.Linear(4, 100))
    with torch.autocast("cpu", torch.bfloat16):
        result = measure(model, torch.randn(8, 100)).jacobians["input -> output"]
    # The rank is 4.
    assert not result.smallest_resolved


class Concatenation(nn.Module):
    """The image is as wide as the first convolution has channels: the number of units alone would mislead."""

    def __init__(self, after):
        super().__init__()
        self.first, self.second, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, padding=1), after

    def concatenated(self, x):
        state = self.first(x)
        return torch.cat([state, self.second(state)], 1) + torch.arange(24.0).view(24, 1, 1)

    def forward(self, x):
        return self.after(self.concatenated(x)).mean((2, 3))


@pytest.mark.parametrize("after", [nn.Identity(), nn.Upsample(scale_factor=2), nn.AvgPool2d(2), nn.Dropout(0.0)])
@pytest.mark.parametrize("width", [8, 16, 24])
def test_units_of_concatenated_channels_stay_in_their_place(after, width):
    model, x = Concatenation(after), torch.randn(2, 3, 16, width)
    expected = shift(after(model.concatenated(x)), 1)
    assert figure(measure(model, x), "activation_shift", "after") == pytest.approx(expected, rel=1e-5)


class Positions(nn.Module):
    """Makes a longer buffer when a longer input comes; ``made`` may be a buffer, None or missing before."""

    def __init__(self):
        super().__init__()
        self.linear, self.longest = nn.Linear(3, 4), 0

    def forward(self, x):
        if len(x) > self.longest:
            self.longest, self.scratch = len(x), x
            self.register_buffer("made", torch.arange(float(len(x)))[:, None], persistent=False)
        return self.linear(x) + self.made[: len(x)]


@pytest.mark.parametrize("before", ["a shorter buffer", "None", "missing"])
def test_a_model_that_makes_its_buffers_longer_still_works(before):
    model = Positions()
    if before == "a shorter buffer":
        model(torch.randn(2, 3))
    elif before == "None":
        model.register_buffer("made", None)
    attributes, buffers = dict(vars(model)), dict(model._buffers)
    measure(model, torch.randn(5, 3))
    assert all(vars(model)[key] is value for key, value in attributes.items())
    assert vars(model).keys() == attributes.keys()
    assert model._buffers.keys() == buffers.keys()
    assert all(model._buffers[key] is buffer for key, buffer in buffers.items())
    assert model(torch.randn(5, 3)).shape == (5, 4)


class RandomDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * (random.random() + np.random.rand() + torch.rand(1))  # noqa: NPY002


def test_all_random_states_are_left_as_they_were():
    model, x = RandomDepth(), torch.randn(2, 4)
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    measure(model, x)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_equal(np.random.get_state(), numpy_state)  # noqa: NPY002
    assert random.getstate() == python_state


def test_a_packed_sequence_is_one_argument():
    sequences = nn.utils.rnn.pack_sequence([torch.randn(5, 4), torch.randn(3, 4)])
    result = measure(nn.GRU(4, 5), sequences)
    assert result.failure is None
    # 8 steps, with the products of W_ih (15 x 4) and W_hh (15 x 5).
    assert result.timing.forward_flops == 2 * 8 * (15 * 4 + 15 * 5)


class Graph(nn.Module):
    """One layer of a graph network; ``multiply(edges, state)``."""

    def __init__(self, edges, multiply):
        super().__init__()
        self.register_buffer("edges", edges)
        self.linear, self.multiply = nn.Linear(4, 4), multiply

    def forward(self, x):
        return self.multiply(self.edges, self.linear(x))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize(
    "multiply",
    [torch.matmul, torch.sparse.mm, lambda edges, state: (state.T @ edges).T],
    ids=["@", "sparse.mm", "right"],
)
def test_flops_of_a_sparse_matrix_are_those_of_its_entries(layout, multiply):
    edges = torch.zeros(20, 20)
    edges[torch.arange(15), torch.arange(15).flip(0)] = 1
    edges = edges.to_sparse() if layout == "coo" else edges.to_sparse_csr()
    result = measure(Graph(edges, multiply), torch.randn(20, 4), jacobian=False)
    linear, sparse = 2 * 20 * 4 * 4, 2 * 15 * 4
    assert result.timing.uncounted == ()
    assert result.timing.forward_flops == linear + sparse
    # The input requires no gradient, so the linear layer has one product again.
    assert result.timing.backward_flops == linear + sparse


class Inferred(nn.Module):
    def __init__(self):
        super().__init__()
        self.teacher, self.conv, self.student = nn.Linear(4, 6), nn.Conv1d(1, 2, 3), nn.Linear(6, 3)

    def forward(self, x):
        with torch.inference_mode():
            state = self.teacher(x)
            state = state @ state.T @ state + self.conv(state[:, None]).mean()
        return self.student(state.clone())


def test_flops_in_inference_mode_are_counted():
    result = measure(Inferred(), torch.randn(5, 4))
    products = 5 * 4 * 6 + 5 * 6 * 5 + 5 * 5 * 6 + 5 * 2 * 4 * 3 + 5 * 6 * 3
    assert result.timing.uncounted == ()
    assert result.timing.forward_flops == 2 * products


class Quantizer(nn.Module):
    """Returns the index of the nearest entry of its codebook: integers alone."""

    def __init__(self):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(7, 4))

    def forward(self, x):
        return torch.cdist(x, self.codebook).argmin(-1)


class Experts(nn.Module):
    """The second expert gets no sample."""

    def __init__(self):
        super().__init__()
        self.quantizer, self.first, self.second, self.third = Quantizer(), *(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        none = self.second(x[:0]).sum()
        return self.first(x) + torch.func.vmap(self.third)(x) + self.quantizer(x)[:, None] + none


def test_reasons_say_what_happened():
    model = Experts()
    result = measure(model, torch.randn(5, 4))
    assert result.columns["parameters"].sum() == sum(parameter.numel() for parameter in model.parameters())
    for name, column, reason in (
        ("quantizer", "state_rms", "returned no floating-point numbers"),
        ("second", "gradient_norm", "returned no floating-point numbers"),
        ("third", "gradient_norm", "inside a transform of torch.func"),
    ):
        assert reason in result.reason(column, row(result, name))
    assert figure(result, "gradient_norm", "first") == pytest.approx(1, rel=1e-6)


class Logits:
    def __init__(self, values):
        self.values = values


def test_an_output_of_a_class_of_ones_own_has_figures_but_no_jacobian():
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_hook(lambda module, args, output: Logits(output))
    result = measure(model, torch.randn(5, 4), loss=lambda output: output.values.sum())
    assert figure(result, "gradient_norm", "0") == pytest.approx(20**0.5, rel=1e-6)
    assert "holds no floating-point tensor" in result.absent["input -> output"]


class InPlaceResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x):
        result = self.branch(x)
        result += x
        return result


def test_a_block_that_adds_in_place_has_a_row_and_a_block_whose_last_child_writes_in_place_has_none():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), InPlaceResidual(), nn.Linear(4, 2))
    x, targets = torch.randn(5, 4), torch.randn(5, 2)
    result = measure(model, x, targets)
    assert list(result.columns["name"]) == ["0.0", "0.1", "1.branch.0", "1.branch.1", "1", "2"]
    model, x = model.double(), x.double()
    state = model[1](model[0](x))
    state.retain_grad()
    functional.mse_loss(model[2](state), targets.double()).backward()
    assert figure(result, "state_rms", "1") == pytest.approx(state.square().mean().sqrt().item(), rel=1e-5)
    assert figure(result, "gradient_norm", "1") == pytest.approx(state.grad.norm().item(), rel=1e-5)


class Permuted(nn.Module):
    """Channels and positions change places between plain modules, as in ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)
        self.last, self.first = nn.Dropout(0.0), nn.Identity()

    def forward(self, x):
        last = self.last(self.conv(x).permute(0, 2, 3, 1))
        return self.first(self.linear(last).permute(0, 3, 1, 2)).mean((2, 3))


@pytest.mark.parametrize("size", [(8, 8), (8, 5), (1, 8)])
def test_units_of_a_permuted_view_move_with_it_even_if_all_dimensions_are_equal(size):
    model, x = Permuted(), torch.randn(2, 3, *size)
    state = model.conv(x).permute(0, 2, 3, 1)
    result = measure(model, x)
    assert figure(result, "activation_shift", "last") == pytest.approx(shift(state, -1), rel=1e-5)
    assert figure(result, "activation_shift", "first") == pytest.approx(shift(model.linear(state), -1), rel=1e-5)


@pytest.mark.parametrize(("kind", "shape"), [(nn.InstanceNorm1d, (9,)), (nn.InstanceNorm2d, (5, 7))])
@pytest.mark.parametrize("batch", [(), (4,)])
def test_an_instance_norm_has_no_shift_with_or_without_a_batch(kind, shape, batch):
    result = measure(kind(4), torch.randn(*batch, 4, *shape) + 3)
    # The mean of normalized float32 values is their rounding, about 1e-7.
    assert figure(result, "activation_shift", kind.__name__) < 1e-6


class HiddenCotangent(torch.autograd.Function):
    """Its backward pass is right, and hides from autograd that it depends on the gradient, as a raw kernel does."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient.detach() @ ctx.saved_tensors[0].T, None


def test_a_backward_pass_that_hides_its_cotangent_has_no_lanczos_jacobian():
    class Residual(nn.Linear):
        def forward(self, x):
            return x + HiddenCotangent.apply(x, self.weight)

    result = measure(Residual(100, 100), torch.randn(5, 100))
    assert "J v and J^T u do not agree" in result.absent["input -> output"]
