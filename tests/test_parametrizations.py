"""nn.utils.parametrizations: zero_sum and hypersphere on every kind of module, and all that torch does with them.

The oracle of a unit is the module itself: the weights of a unit are those that an output of the module depends on.
"""

import copy
import io
import pickle
import sys
import types
import warnings

import pytest
import torch
from support.numerics import assert_as_exact_as_eager, hostile_layouts
from torch import Tensor
from torch.nn.utils import parametrizations as torchs
from torch.nn.utils import parametrize, prune

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import nn, reference

pytestmark = pytest.mark.usefixtures("one_thread")

zero_sum, hypersphere = nn.utils.parametrizations.zero_sum, nn.utils.parametrizations.hypersphere

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def zero_sum_basis(module, name="weight"):
    return zero_sum(module, name, basis=True)


FORMS = (zero_sum, zero_sum_basis, hypersphere)
every_form = pytest.mark.parametrize("constrain", FORMS, ids=lambda form: form.__name__)
every_zero_sum = pytest.mark.parametrize("constrain", FORMS[:2], ids=lambda form: form.__name__)


def conv1d_of_transformers():
    """The layer of GPT-2, whose weight is (inputs, outputs)."""
    library = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers")
    layer = library.Conv1D(4, 5)
    torch.nn.init.normal_(layer.weight)
    return layer


MODULES = {
    "Linear": (lambda: torch.nn.Linear(5, 4), "weight"),
    "Bilinear": (lambda: torch.nn.Bilinear(2, 3, 4), "weight"),
    "Embedding": (lambda: torch.nn.Embedding(4, 5), "weight"),
    "Conv1d": (lambda: torch.nn.Conv1d(3, 4, 2), "weight"),
    "Conv2d of groups": (lambda: torch.nn.Conv2d(4, 6, (2, 3), groups=2), "weight"),
    "depthwise Conv2d": (lambda: torch.nn.Conv2d(4, 4, 3, groups=4), "weight"),
    "Conv3d": (lambda: torch.nn.Conv3d(2, 3, (1, 2, 3)), "weight"),
    "ConvTranspose1d": (lambda: torch.nn.ConvTranspose1d(3, 4, 2, stride=2), "weight"),
    "ConvTranspose2d": (lambda: torch.nn.ConvTranspose2d(3, 5, (2, 3)), "weight"),
    "ConvTranspose2d of groups": (lambda: torch.nn.ConvTranspose2d(4, 6, (2, 3), groups=2), "weight"),
    "depthwise ConvTranspose2d": (lambda: torch.nn.ConvTranspose2d(4, 4, 3, groups=4), "weight"),
    "ConvTranspose3d of groups": (lambda: torch.nn.ConvTranspose3d(4, 2, (1, 2, 3), groups=2), "weight"),
    "Conv1D of transformers": (conv1d_of_transformers, "weight"),
    "LSTM": (lambda: torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True), "weight_hh_l1_reverse"),
    "LSTM with a projection": (lambda: torch.nn.LSTM(3, 4, proj_size=2), "weight_hr_l0"),
    "GRU": (lambda: torch.nn.GRU(3, 4), "weight_ih_l0"),
    "LSTMCell": (lambda: torch.nn.LSTMCell(3, 4), "weight_hh"),
    "MultiheadAttention": (lambda: torch.nn.MultiheadAttention(4, 2), "in_proj_weight"),
}
every_module = pytest.mark.parametrize(("make", "name"), MODULES.values(), ids=MODULES)

INPUTS = {
    torch.nn.Linear: lambda: (torch.randn(3, 5),),
    torch.nn.Bilinear: lambda: (torch.randn(3, 2), torch.randn(3, 3)),
    torch.nn.Conv1d: lambda: (torch.randn(2, 3, 5),),
    torch.nn.Conv2d: lambda: (torch.randn(2, 4, 5, 6),),
    torch.nn.Conv3d: lambda: (torch.randn(2, 2, 3, 4, 5),),
    torch.nn.ConvTranspose1d: lambda: (torch.randn(2, 3, 5),),
    torch.nn.ConvTranspose3d: lambda: (torch.randn(2, 4, 3, 4, 5),),
}


def units_of(module, name):
    """(units, entries), bool: which entries of the tensor belong to which unit."""
    weight = getattr(module, name).detach()
    kind = parametrize.type_before_parametrizations(module)
    if not (kind.__name__.startswith("Conv") and kind.__name__.removeprefix("ConvTranspose")):
        unit = torch.arange(len(weight)).view(-1, *(1,) * (weight.dim() - 1)).expand_as(weight)
        return unit.flatten() == torch.arange(len(weight))[:, None]
    # An output channel, or feature, depends on the weights of its unit only.
    plain = copy.deepcopy(module)
    if parametrize.is_parametrized(plain):
        parametrize.remove_parametrizations(plain, name)
    leaf = getattr(plain, name)
    is_conv = isinstance(plain, torch.nn.modules.conv._ConvNd)
    shape = (plain.in_channels, *(5,) * len(plain.kernel_size)) if is_conv else (len(leaf),)
    outputs = plain(torch.rand(1, *shape) + 1)
    gradients = [
        torch.autograd.grad(outputs.select(1, unit).sum(), leaf, retain_graph=True)[0]
        for unit in range(outputs.shape[1])
    ]
    return torch.stack(gradients).flatten(1) != 0


def originals(module, name="weight"):
    return list(module.parametrizations[name].parameters(recurse=False))


def draw_(module, name):
    """Weights with a row mean, of different lengths."""
    with torch.no_grad():
        weight = getattr(module, name)
        weight.normal_().add_(0.5).mul_(torch.linspace(0.5, 3, weight.numel()).view_as(weight))
    return weight.detach().clone()


# ---- Values: units, exactness, right inverse -------------------------------------------------------------------------


@every_module
@every_zero_sum
def test_the_weights_of_a_unit_sum_to_zero_and_nothing_else_changes(constrain, make, name):
    module = make()
    before = draw_(module, name)
    units = units_of(module, name)
    assert (units.sum(0) == 1).all()
    assert constrain(module, name) is module
    weight = getattr(module, name)
    assert weight.shape == before.shape
    assert weight.is_contiguous()
    mean = (units.double() @ before.double().flatten()) / units.sum(1)
    expected = (before.double().flatten() - mean @ units.double()).view_as(before)
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=4e-7 * before.abs().max().item())
    size = originals(module, name)[0].shape
    assert size == (before.shape if constrain is zero_sum else (len(units), units[0].sum() - 1))


@every_module
def test_the_hypersphere_keeps_the_weight_in_radii_and_angles(make, name):
    module = make()
    before = draw_(module, name)
    units = units_of(module, name)
    hypersphere(module, name)
    radius, angles = originals(module, name)
    assert list(module.parametrizations[name].state_dict()) == ["original0", "original1"]
    assert radius.shape == (len(units), *(1,) * (before.dim() - 1))
    assert angles.shape == (len(units), units[0].sum() - 1)
    rows = torch.stack([before.flatten()[unit] for unit in units]).double()
    torch.testing.assert_close(radius.double().flatten(), rows.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(angles.double(), F.hypersphere_angles(rows), rtol=0, atol=3e-7)
    torch.testing.assert_close(getattr(module, name), before, rtol=0, atol=2e-6 * before.abs().max().item())
    # Twice the radius of one unit doubles this unit.
    with torch.no_grad():
        radius[1] *= 2
    factor = units.float().T @ torch.ones(len(units)).index_fill(0, torch.tensor([1]), 2.0)
    torch.testing.assert_close(getattr(module, name).flatten(), before.flatten() * factor, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
def test_values_and_gradients_are_as_exact_as_plain_torchs(constrain, dtype):
    """The same formula in plain torch, on the module's own originals, in its dtype and in float64."""

    def formula(*tensors):
        if constrain is zero_sum:
            return tensors[0] - tensors[0].mean(1, keepdim=True)
        if constrain is zero_sum_basis:
            return tensors[0] @ reference.lcw_basis(13, tensors[0].dtype).T
        radius, angles = tensors
        ones = torch.ones_like(radius)
        sines = torch.cat([ones, angles.sin().cumprod(1)], 1)
        return radius * torch.cat([angles.cos(), ones], 1) * sines

    results = {"weight": [], "gradients": []}
    for _ in range(4):
        module = torch.nn.Linear(13, 7, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            constrain(module)
        grad_output = torch.randn(7, 13, dtype=dtype)
        ours = [module.weight, *torch.autograd.grad(module.weight, originals(module), grad_output)]
        others = []
        for kind in (dtype, torch.float64):
            leaves = [tensor.detach().to(kind).requires_grad_() for tensor in originals(module)]
            weight = formula(*leaves)
            others.append([weight, *torch.autograd.grad(weight, leaves, grad_output.to(kind))])
        for name, part in (("weight", slice(0, 1)), ("gradients", slice(1, None))):
            results[name].append([torch.cat([t.detach().flatten() for t in kind[part]]) for kind in (ours, *others)])
    for name, draws in results.items():
        actual, eager, exact = (torch.stack(kind) for kind in zip(*draws, strict=True))
        assert actual.dtype == dtype
        if dtype != torch.float64:
            assert_as_exact_as_eager(name, actual, eager, exact)
            continue
        # Float64 cannot be its own judge: allow a rounding per input.
        assert (actual - exact).abs().max() <= 13 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 2), (9, 64), (9, 3, 2, 5)], ids=str)
def test_the_hypersphere_keeps_the_function_within_twice_eagers_error(shape, dtype):
    """Eager: the inverse and the formula in plain torch, both in the tensor's dtype."""
    weight = torch.randn(shape, dtype=dtype)
    rows = weight.flatten(1)
    tails = rows.square().flip(1).cumsum(1).flip(1).sqrt()
    angles = torch.atan2(tails[:, 1:], rows[:, :-1])
    angles[:, -1] = torch.atan2(rows[:, -1], rows[:, -2])
    ones = torch.ones_like(rows[:, :1])
    eager = tails[:, :1] * torch.cat([angles.cos(), ones], 1) * torch.cat([ones, angles.sin().cumprod(1)], 1)
    module = torch.nn.Module()
    module.register_parameter("weight", torch.nn.Parameter(weight.clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        hypersphere(module)
    assert_as_exact_as_eager("weight", module.weight.detach().flatten(1), eager, rows.double())


@every_module
@every_form
def test_an_assigned_tensor_is_what_the_module_has(constrain, make, name):
    module = make()
    constrain(module, name)
    weight = draw_(make(), name).double()
    units = units_of(module, name).double()
    if constrain is not hypersphere:
        weight = (weight.flatten() - (units @ weight.flatten() / units.sum(1)) @ units).view_as(weight)
    identities = [id(tensor) for tensor in originals(module, name)]
    given = weight.float()
    kept = given.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setattr(module, name, given)
    assert [id(tensor) for tensor in originals(module, name)] == identities
    torch.testing.assert_close(getattr(module, name).double(), weight, rtol=0, atol=2e-6 * weight.abs().max().item())
    # The assigned tensor is the caller's still.
    given.fill_(torch.nan)
    assert getattr(module, name).isfinite().all()
    assert kept.isfinite().all()


@every_zero_sum
def test_a_tensor_of_another_name_has_its_units_along_dim_0(constrain):
    """Only the weight of a transposed convolution is stored the other way round."""
    module = torch.nn.ConvTranspose2d(4, 6, 3, groups=2)
    module.adapter = torch.nn.Parameter(torch.randn(4, 6))
    assert constrain(module, "adapter").adapter.sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("fan_in", [1, 2, 3, 17])
def test_the_inverse_of_the_basis_form_is_its_transpose(fan_in):
    module = zero_sum(torch.nn.Linear(fan_in, 4, dtype=torch.float64), basis=True)
    basis = reference.lcw_basis(fan_in)
    weight = torch.randn(4, fan_in, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        module.weight = weight
    (original,) = originals(module)
    torch.testing.assert_close(original, weight @ basis, rtol=0, atol=1e-14)
    torch.testing.assert_close(module.weight, weight @ basis @ basis.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
def test_tensors_of_any_layout(constrain, dtype):
    """At registration and on assignment; originals are never views of a tensor of the caller's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        weight = torch.randn(4, 5, dtype=dtype)
        weight = weight - weight.mean(1, keepdim=True)
        expected = constrain(torch.nn.Linear(5, 4, dtype=dtype))
        expected.weight = weight
        for layout, tensor in hostile_layouts(weight).items():
            module = torch.nn.Linear(5, 4, dtype=dtype)
            module.weight = torch.nn.Parameter(tensor)
            constrain(module)
            assigned = constrain(torch.nn.Linear(5, 4, dtype=dtype))
            assigned.weight = tensor
            tensor.fill_(torch.nan)
            for made in (module, assigned):
                assert torch.equal(made.weight, expected.weight), layout
                assert all(original.is_contiguous() for original in originals(made))
        expanded = constrain(torch.nn.Linear(5, 4, dtype=dtype))
        expanded.weight = weight[:1].expand(4, 5)
        assert torch.equal(expanded.weight, expected.weight[:1].expand(4, 5))


# ---- Warnings --------------------------------------------------------------------------------------------------------


@every_zero_sum
@pytest.mark.parametrize("kind", [torch.nn.Linear, torch.nn.LSTM])
def test_one_warning_says_that_an_assigned_tensor_is_projected(kind, constrain):
    name = "weight" if kind is torch.nn.Linear else "weight_hh_l0"
    module = kind(4, 4)
    weight = torch.randn_like(getattr(module, name)) + 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        constrain(module, name)
        assert caught == []
        setattr(module, name, weight)
        setattr(module, name, weight)
        setattr(module, name, weight * 2)
    (warning,) = caught
    largest = weight.sum(1).abs().max().item()
    assert str(warning.message) == (
        f"zero_sum: {name} is assigned rows that sum to up to {largest:.3g}; expected rows that sum to zero. The mean "
        "of each row is subtracted."
    )
    assert (warning.category, warning.filename) == (UserWarning, __file__)
    torch.testing.assert_close(getattr(module, name), 2 * (weight - weight.mean(1, keepdim=True)), rtol=0, atol=2e-6)
    with pytest.warns(UserWarning, match="sum to up to"):
        setattr(constrain(kind(4, 4), name), name, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fan_in", [2, 17, 512, 4096])
@every_zero_sum
def test_rounding_is_not_worth_a_warning(constrain, fan_in, dtype):
    source = constrain(torch.nn.Linear(fan_in, 8, dtype=dtype))
    target = constrain(torch.nn.Linear(fan_in, 8, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.weight = source.weight
        target.weight = source.weight.detach()
        target.weight = torch.zeros(8, fan_in, dtype=dtype)
        target.weight = (source.weight.double() * 1e-3).to(dtype)
        if fan_in > 2:
            # The mean that is subtracted may be larger than what it leaves.
            target.weight = F.lcw_weight(torch.randn(8, fan_in, dtype=dtype) + 10)
    changed = source.weight.detach().clone()
    changed[3] += changed[3].abs().mean() * 100 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    with pytest.warns(UserWarning, match="sum to up to"):
        target.weight = changed


def test_coarse_angles_are_worth_a_warning():
    """The figure is that of the module's own change. Where rounding to 16 bits changes as much, there is no warning."""
    weight = torch.randn(64, 512).bfloat16()
    module = torch.nn.Linear(512, 64, dtype=torch.bfloat16)
    module.weight = torch.nn.Parameter(weight.clone())
    with pytest.warns(UserWarning, match="angles are coarse") as caught:
        hypersphere(module)
    change = ((module.weight.double() - weight.double()).norm() / weight.double().norm()).item()
    assert 0.02 < change < 0.06
    said = float(str(caught[0].message).split("changed by ")[1].split(" ")[0])
    assert abs(said - change) < 0.2 * change
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.weight = weight
        hypersphere(torch.nn.Linear(512, 64))
        hypersphere(torch.nn.Linear(1, 64, dtype=torch.bfloat16))
        hypersphere(torch.nn.Linear(2, 64, dtype=torch.bfloat16))
        zero_sum(torch.nn.Linear(512, 64, dtype=torch.bfloat16))


# ---- Edge cases ------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (1, 1), (3, 1), (2, 1, 1, 1), (1, 2)], ids=str)
def test_empty_and_single(constrain, shape):
    module = torch.nn.Module()
    weight = torch.randn(shape)
    module.register_parameter("weight", torch.nn.Parameter(weight.clone()))
    constrain(module)
    expected = weight if constrain is hypersphere else weight - weight.mean(tuple(range(1, len(shape))), keepdim=True)
    torch.testing.assert_close(module.weight, expected)
    module.weight.sum().backward()
    module.weight = module.weight.detach()
    torch.testing.assert_close(module.weight, expected)
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is torch.nn.Module
    torch.testing.assert_close(module.weight, expected)


def test_units_without_inputs():
    """Their sum is 0 in the centred form; the other forms have no parameter for them."""
    module = torch.nn.Module()
    module.register_parameter("weight", torch.nn.Parameter(torch.empty(3, 0)))
    for constrain in (zero_sum_basis, hypersphere):
        with pytest.raises(ValueError, match="a unit of weight has no inputs; expected at least one"):
            constrain(module)
        assert not parametrize.is_parametrized(module)
    assert zero_sum(module).weight.shape == (3, 0)


def test_a_unit_of_one_input_keeps_its_sign_without_an_empty_parameter():
    module = torch.nn.Linear(1, 4, bias=False)
    weight = torch.tensor([[1.5], [-2.0], [0.0], [-0.25]])
    module.weight = torch.nn.Parameter(weight.clone())
    hypersphere(module)
    assert torch.equal(module.weight, weight)
    (radius,) = module.parameters()
    assert torch.equal(radius, weight.abs())
    assert sorted(module.state_dict()) == ["parametrizations.weight.0.sign", "parametrizations.weight.original0"]
    assert module.parametrizations.weight[0].sign.tolist() == [1, -1, 1, -1]
    module.weight.sum().backward()
    assert radius.grad.flatten().tolist() == [1, -1, 1, -1]
    other = hypersphere(torch.nn.Linear(1, 4, bias=False))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, weight)
    module.weight = -weight
    assert torch.equal(module.weight, -weight)
    assert torch.equal(copy.deepcopy(module).double().weight, -weight.double())
    depthwise = torch.nn.ConvTranspose2d(3, 3, 1, groups=3)
    before = depthwise.weight.detach().clone()
    assert torch.equal(hypersphere(depthwise).weight, before)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_tensors_of_16_bits_are_computed_in_float32(dtype):
    module = hypersphere(torch.nn.Linear(4, 64, dtype=dtype))
    radius, angles = (tensor.detach().float() for tensor in originals(module))
    assert torch.equal(module.weight, (radius * F.hypersphere_direction(angles)).to(dtype))


def test_zero_rows_and_rows_of_any_length():
    lengths = torch.tensor([0.0, 1e-300, 1e-160, 1.0, 1e160, 1e300], dtype=torch.float64)[:, None]
    weight = torch.randn(6, 5, dtype=torch.float64) * lengths
    module = torch.nn.Linear(5, 6, dtype=torch.float64)
    module.weight = torch.nn.Parameter(weight.clone())
    hypersphere(module)
    radius, angles = originals(module)
    assert (radius[0].item(), angles[0].tolist()) == (0, [0] * 4)
    assert ((module.weight - weight).abs() <= 1e-14 * lengths).all()
    module.weight.sum().backward()
    assert radius.grad.isfinite().all()
    # A zero row leaves 0 in the direction (1, 0, ..).
    assert (radius.grad[0].item(), angles.grad[0].abs().sum().item()) == (1, 0)


def test_a_norm_that_overflows_is_refused_and_changes_nothing():
    module = hypersphere(torch.nn.Linear(4, 3, dtype=torch.float16))
    before = module.weight.detach().clone()
    weight = before.clone()
    weight[2] = 4e4
    with pytest.raises(ValueError, match=r"weight has rows whose norms overflow torch.float16: \[2\]; expected rows"):
        module.weight = weight
    assert torch.equal(module.weight, before)
    plain = torch.nn.Linear(4, 3, dtype=torch.float16)
    plain.weight = torch.nn.Parameter(weight)
    with pytest.raises(ValueError, match="norms overflow"):
        hypersphere(plain)
    assert type(plain) is torch.nn.Linear
    assert plain.weight[2, 0] == 4e4


@every_form
def test_a_value_that_is_not_finite_stays_in_its_row(constrain):
    weight = torch.randn(4, 5)
    weight[1, 2], weight[2, 0] = torch.nan, torch.inf
    module = torch.nn.Linear(5, 4)
    module.weight = torch.nn.Parameter(weight.clone())
    constrain(module)
    assert module.weight.isfinite().all(1).tolist() == [True, False, False, True]


@every_form
def test_frozen_tensors_and_buffers(constrain):
    module = torch.nn.Linear(5, 4)
    module.weight.requires_grad_(False)
    constrain(module)
    assert not module.weight.requires_grad
    assert not any(tensor.requires_grad for tensor in originals(module))
    module = torch.nn.Module()
    module.register_buffer("table", torch.randn(4, 5))
    constrain(module, "table")
    assert list(module.parameters()) == []
    assert not module.table.requires_grad
    assert len(list(module.parametrizations.table.buffers())) == (2 if constrain is hypersphere else 1)


def test_the_training_mode_is_the_modules():
    for training in (True, False):
        module = zero_sum(torch.nn.Linear(3, 2).train(training))
        assert module.parametrizations.weight[0].training == training


# ---- Removal, copies, state ------------------------------------------------------------------------------------------


@every_module
@every_form
def test_removal_leaves_the_constrained_tensor(constrain, make, name):
    module = make()
    kind, names = type(module), list(module.state_dict())
    constrain(module, name)
    weight = getattr(module, name).detach().clone()
    parametrize.remove_parametrizations(module, name)
    assert type(module) is kind
    assert sorted(module.state_dict()) == sorted(names)
    left = getattr(module, name)
    assert isinstance(left, torch.nn.Parameter)
    assert left.requires_grad
    assert torch.equal(left, weight)
    # Nothing of the constraint is left.
    constrain(module, name)


def test_removal_without_the_constraint():
    module = torch.nn.Linear(5, 4)
    trained = module.weight
    zero_sum(module)
    with torch.no_grad():
        trained.add_(1)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert module.weight is trained
    assert (module.weight.sum(1) > 4).all()
    zero_sum(module, basis=True)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert module.weight.shape == (4, 4)
    module = hypersphere(torch.nn.Linear(5, 4))
    with pytest.raises(ValueError, match="leave_parametrized=False"):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert module.weight.shape == (4, 5)


@every_form
def test_an_optimizer_keeps_the_constraint(constrain):
    """The centred form trains the parameter that an earlier optimizer has already."""
    module = torch.nn.Linear(5, 4)
    earlier = torch.optim.SGD(module.parameters(), lr=0.1)
    constrain(module)
    optimizer = earlier if constrain is zero_sum else torch.optim.AdamW(module.parameters(), lr=0.1)
    before = module.weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        module(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()
    assert (module.weight - before).abs().max() > 0.01
    if constrain is not hypersphere:
        assert module.weight.sum(1).abs().max() < 1e-6


@every_module
@every_form
def test_the_state_dict_restores_the_tensor(constrain, make, name):
    module, other = constrain(make(), name), constrain(make(), name)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(getattr(module, name), getattr(other, name))
    prefix = f"parametrizations.{name}.original"
    kinds = {"zero_sum": [""], "zero_sum_basis": [""], "hypersphere": ["0", "1"]}[constrain.__name__]
    assert [key for key in module.state_dict() if "parametrizations" in key] == [prefix + kind for kind in kinds]
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(module)


@every_module
@every_form
def test_a_copy_stands_alone(constrain, make, name):
    """Also after a forward pass, under parametrize.cached(), and when a parametrization is removed from one of them."""
    module = constrain(make(), name)
    if isinstance(module, torch.nn.RNNBase):
        module(torch.randn(2, 1, 3))
    copied = copy.deepcopy(module)
    assert torch.equal(getattr(module, name), getattr(copied, name))
    assert {id(p) for p in module.parameters()}.isdisjoint(id(p) for p in copied.parameters())
    with torch.no_grad():
        originals(copied, name)[0].mul_(2)
    with parametrize.cached():
        expected = 2 * getattr(module, name)
        torch.testing.assert_close(getattr(copied, name), expected, rtol=0, atol=1e-6)
        assert getattr(copied, name) is getattr(copied, name)
    again = copy.deepcopy(copied)
    parametrize.remove_parametrizations(copied, name)
    assert not parametrize.is_parametrized(copied)
    for still in (module, again):
        assert parametrize.is_parametrized(still, name)
        getattr(still, name).sum().backward()
    assert torch.equal(getattr(again, name), getattr(copied, name))


def test_copies_of_a_model_with_several_parametrizations():
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4), torch.nn.Linear(4, 2))
    torchs.weight_norm(model[0], "weight_ih_l0")
    zero_sum(model[0], "weight_hh_l0")
    model[0](torch.randn(2, 1, 3))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    x = torch.randn(2, 1, 3)
    assert torch.equal(averaged.module[0](x)[0], model[0](x)[0])
    parametrize.remove_parametrizations(averaged.module[0], "weight_ih_l0")
    assert parametrize.is_parametrized(averaged.module[0], "weight_hh_l0")
    assert torch.equal(copy.deepcopy(averaged.module[0])(x)[0], model[0](x)[0])


@every_form
def test_one_of_several_copies_is_constrained(constrain):
    """torch's copies of a parametrized module have one class. A property in that class would be a property of all."""
    module = torchs.weight_norm(torch.nn.LSTM(3, 4), "weight_ih_l0")
    copies = [copy.deepcopy(module) for _ in range(3)]
    assert type(copies[0]) is type(copies[1])
    constrain(copies[0], "weight_hh_l0")
    x = torch.randn(2, 1, 3)
    for other in (module, *copies[1:]):
        assert not parametrize.is_parametrized(other, "weight_hh_l0")
        other(x)[0].sum().backward()
    constrain(copies[1], "weight_hh_l0")
    assert torch.equal(copies[0](x)[0], copies[1](x)[0])
    assert isinstance(copies[0], torch.nn.LSTM)
    assert parametrize.type_before_parametrizations(copies[0]) is torch.nn.LSTM


def test_a_module_that_copies_itself_still_does():
    class Layer(torch.nn.Linear):
        def __deepcopy__(self, memo):
            return "copied"

    assert copy.deepcopy(zero_sum(Layer(3, 2))) == "copied"


@every_form
def test_parametrizations_can_be_transferred(constrain):
    module, other = constrain(torch.nn.Linear(5, 4)), torch.nn.Linear(5, 4)
    parametrize.transfer_parametrizations_and_params(module, other)
    assert torch.equal(module.weight, other.weight)


@every_form
def test_conversions_of_a_module(constrain):
    for module, name in ((torch.nn.Linear(5, 4), "weight"), (torch.nn.LSTM(3, 4), "weight_hh_l0")):
        constrain(module, name)
        weight = getattr(module, name).detach()
        module.double()
        assert getattr(module, name).dtype == torch.float64
        torch.testing.assert_close(getattr(module, name), weight.double(), rtol=0, atol=1e-6)
        module.to(torch.bfloat16)
        assert getattr(module, name).dtype == torch.bfloat16
        module.to("meta")
        assert getattr(module, name).is_meta
        module.to_empty(device="cpu")
        assert getattr(module, name).shape == weight.shape


@every_form
def test_on_the_meta_device(constrain):
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ConvTranspose2d(4, 2, 3, groups=2))
    for layer in module:
        constrain(layer)
        assert layer.weight.is_meta
        assert all(tensor.is_meta for tensor in originals(layer))
        layer.weight = torch.empty(layer.weight.shape, device="meta")
    real = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ConvTranspose2d(4, 2, 3, groups=2))
    for layer in real:
        constrain(layer)
    module.load_state_dict(real.state_dict(), assign=True)
    for ours, theirs in zip(module, real, strict=True):
        assert torch.equal(ours.weight, theirs.weight)


# ---- Layouts of convolutions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d])
@every_form
def test_channels_last_is_kept(constrain, kind, groups):
    """From the registered or the assigned tensor, from ``module.to(memory_format=...)``, in copies, and back."""
    rank = 2 if "2d" in kind.__name__ else 3
    channels_last = torch.channels_last if rank == 2 else torch.channels_last_3d
    layer = kind(4, 6, 3, groups=groups)
    constrained = constrain(copy.deepcopy(layer)).weight.detach()
    early = constrain(copy.deepcopy(layer).to(memory_format=channels_last))
    late = constrain(copy.deepcopy(layer)).to(memory_format=channels_last)
    for made in (early, late, copy.deepcopy(late), copy.deepcopy(late).double()):
        assert made.weight.is_contiguous(memory_format=channels_last)
        torch.testing.assert_close(made.weight.float(), constrained, rtol=0, atol=1e-6)
        made.weight = constrained.to(made.weight.dtype)
        assert made.weight.is_contiguous(memory_format=channels_last)
        made.weight.sum().backward()
        made.to(memory_format=torch.contiguous_format)
        assert made.weight.is_contiguous()
    x = torch.randn(2, 4, *(5,) * rank)
    torch.testing.assert_close(early(x), late(x))
    left = parametrize.remove_parametrizations(early, "weight").weight
    torch.testing.assert_close(left, constrained, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", [(4, 6, 1), (6, 6, 3), (6, 6, 1), (4, 1, 2), (1, 4, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("depthwise", [False, True])
@every_form
def test_strides_are_those_of_the_plain_layer(constrain, depthwise, sizes):
    """Filters of size 1, or of one channel, are contiguous in both layouts. torch.nn goes by their strides."""
    groups = sizes[0] if depthwise and sizes[0] == sizes[1] else 1
    for kind in (torch.nn.Conv2d, torch.nn.ConvTranspose2d):
        plain = kind(*sizes, groups=groups)
        constrained = constrain(copy.deepcopy(plain))
        for memory_format in (torch.channels_last, torch.contiguous_format, torch.channels_last):
            plain.to(memory_format=memory_format)
            for made in (constrained.to(memory_format=memory_format), constrain(copy.deepcopy(plain))):
                assert made.weight.stride() == plain.weight.stride()


# ---- Recurrent layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
@every_form
def test_recurrent_layers_use_the_constrained_tensor(constrain, kind):
    """torch keeps a list of their tensors. After every change of the module, the list has to be the right one."""
    options = {"num_layers": 2, "bidirectional": True}
    module = kind(3, 4, **options)
    listed = list(module._flat_weights_names)
    x = torch.randn(5, 2, 3)

    def assert_right(module, x=x):
        plain = kind(3, 4, **options, dtype=x.dtype)
        plain.load_state_dict({name: getattr(module, name).detach() for name in listed})
        outputs, expected = module(x)[0], plain(x)[0]
        assert torch.equal(outputs, expected)
        grad_output = torch.randn_like(outputs)
        for original in module.parametrizations.parameters():
            original.grad = None
        outputs.backward(grad_output)
        expected.backward(grad_output)
        for name in ("weight_hh_l0", "weight_ih_l1_reverse"):
            found = [original.grad for original in originals(module, name)]
            wanted = torch.autograd.grad(getattr(module, name), originals(module, name), getattr(plain, name).grad)
            torch.testing.assert_close(found, list(wanted), rtol=0, atol=1e-12 if x.dtype == torch.float64 else 2e-5)

    constrain(module, "weight_hh_l0")
    constrain(module, "weight_ih_l1_reverse")
    assert_right(module)
    module.flatten_parameters()
    assert_right(module)
    with torch.no_grad():
        for original in originals(module, "weight_hh_l0"):
            original.add_(torch.randn_like(original))
    assert_right(module)
    assert_right(copy.deepcopy(module))
    other = constrain(constrain(kind(3, 4, **options), "weight_hh_l0"), "weight_ih_l1_reverse")
    other(x)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], module(x)[0])
    module.double()
    assert_right(module, x.double())
    module.float().flatten_parameters()
    assert_right(module)
    module.weight_hh_l0 = other.weight_hh_l0.detach() * 2
    assert_right(module)
    module.eval()
    with torch.no_grad():
        expected = module(x)[0]
        with parametrize.cached():
            assert torch.equal(module(x)[0], expected)
            assert torch.equal(module(x)[0], expected)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    parametrize.remove_parametrizations(module, "weight_ih_l1_reverse")
    assert torch.equal(module(x)[0], expected)
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    assert not torch.equal(module(x)[0], expected)


def test_the_list_of_a_recurrent_layers_tensors_has_the_right_shapes_at_once():
    """flatten_parameters() on a GPU gives the list to cuDNN, which must not find the original of another shape."""
    copied = copy.deepcopy(zero_sum_basis(torch.nn.LSTM(3, 4), "weight_ih_l0"))
    for layer in (torch.nn.LSTM(3, 4), copied):
        module = zero_sum_basis(layer, "weight_hh_l0")
        assert [weight.shape for weight in module._flat_weights][:2] == [(16, 3), (16, 4)]


# ---- Attention -------------------------------------------------------------------------------------------------------


@every_form
def test_attention_in_eval_mode_uses_the_constrained_tensor(constrain, monkeypatch):
    """Without gradients, torch reads ``in_proj_weight`` in a fast path of its own."""
    fast_path, calls = torch._native_multi_head_attention, []
    monkeypatch.setattr(
        torch, "_native_multi_head_attention", lambda *arguments: calls.append(1) or fast_path(*arguments)
    )
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    constrain(attention, "in_proj_weight")
    constrain(attention.out_proj)
    plain = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    plain.load_state_dict(
        {name: tensor for name, tensor in attention.state_dict().items() if "parametrizations" not in name}
        | {"in_proj_weight": attention.in_proj_weight, "out_proj.weight": attention.out_proj.weight}
    )
    x = torch.randn(2, 5, 8)
    for mode in (True, False):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                ours, expected = (module.train(mode)(x, x, x)[0] for module in (attention, plain))
                torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert len(calls) == 2
    attention.train()(x, x, x)[0].sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in originals(attention, "in_proj_weight"))


@every_form
def test_an_encoder_gives_the_same_in_training_and_in_eval_mode(constrain):
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    constrain(layer.self_attn, "in_proj_weight")
    for linear in (layer.linear1, layer.linear2):
        constrain(linear)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    expected = encoder(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), expected, rtol=0, atol=1e-5)


# ---- torch.func, torch.compile, autocast -----------------------------------------------------------------------------


@pytest.mark.parametrize("fan_in", [1, 5])
@every_form
def test_compiled_as_one_graph(constrain, fan_in):
    torch._dynamo.reset()
    module = constrain(torch.nn.Linear(fan_in, 4))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, fan_in)
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-6)
    if not module.weight.requires_grad:
        return
    (gradients,) = (torch.autograd.grad(kind(x).square().sum(), originals(module)) for kind in (compiled,))
    expected = torch.autograd.grad(module(x).square().sum(), originals(module))
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-5)
    # The program reads the parameters at every call.
    with torch.no_grad():
        originals(module)[0].mul_(2)
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-6)


@every_form
def test_a_compiled_transposed_convolution_in_channels_last(constrain):
    torch._dynamo.reset()
    module = constrain(torch.nn.ConvTranspose2d(4, 6, 3, groups=2)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(5, 4), lambda: torch.nn.ConvTranspose2d(4, 6, 3, groups=2)])
@pytest.mark.parametrize("channels_last", [False, True])
@every_form
def test_functional_calls_and_stacked_parameters(constrain, make, channels_last):
    modules = [constrain(make()) for _ in range(3)]
    if channels_last:
        for module in modules:
            module.to(memory_format=torch.channels_last)
    stacked = {
        name: torch.stack([module.get_parameter(name) for module in modules]).detach()
        for name, _ in modules[0].named_parameters()
    }
    x = torch.randn(2, 5) if isinstance(modules[0], torch.nn.Linear) else torch.randn(2, 4, 5, 5)

    def call(parameters):
        return torch.func.functional_call(modules[0], parameters, (x,))

    outputs = torch.func.vmap(call)(stacked)
    torch.testing.assert_close(outputs, torch.stack([module(x) for module in modules]), rtol=0, atol=1e-5)
    gradients = torch.func.vmap(torch.func.grad(lambda parameters: call(parameters).square().sum()))(stacked)
    for number, module in enumerate(modules):
        module.zero_grad()
        module(x).square().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(gradients[name][number], parameter.grad, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(3, 2), lambda: torch.nn.ConvTranspose1d(2, 4, 2, groups=2)])
@every_form
def test_derivatives_of_first_and_second_order(constrain, make):
    module = constrain(make().double())
    names = [f"parametrizations.weight.{name}" for name, _ in module.parametrizations.weight.named_parameters()]
    leaves = [module.get_parameter(name).detach().requires_grad_() for name in names]
    x = torch.randn(2, 3) if isinstance(module, torch.nn.Linear) else torch.randn(1, 2, 3)

    def call(*tensors):
        return torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), (x.double(),))

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


@every_form
def test_autocast_rounds_the_constrained_tensor(constrain):
    """The constraint itself is computed in the tensor's own dtype."""
    module = constrain(torch.nn.Linear(64, 8))
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        weight, output = module.weight, module(x)
    assert (weight.dtype, output.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(weight, module.weight)
    expected = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), module.bias.bfloat16())
    assert torch.equal(output, expected)


@every_form
def test_within_the_cache_the_tensor_is_computed_once(constrain):
    module = constrain(torch.nn.Linear(5, 4))
    calls = []
    module.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    with parametrize.cached():
        assert module.weight is module.weight
        module(torch.randn(2, 5)).sum().backward()
    assert len(calls) == 1
    assert all(tensor.grad is not None for tensor in originals(module))
    assert module.weight is not module.weight


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@every_form
def test_the_constraint_runs_on_the_requested_backend(constrain, backend):
    module = constrain(torch.nn.Conv2d(4, 6, 3))
    with lcw_ops.use_backend(backend):
        weight = module.weight
    functions, ops = [weight.grad_fn], set()
    while functions:
        function = functions.pop()
        ops.add(function.name().startswith(("ConstrainedWeight", "Direction")))
        functions += [parent for parent, _ in function.next_functions if parent is not None]
    assert (True in ops) == (backend == "cpp")


# ---- Chains and sharing ----------------------------------------------------------------------------------------------


def test_zero_sum_after_spectral_norm_and_before_it():
    module = torch.nn.Linear(5, 4)
    torchs.spectral_norm(module).eval()
    zero_sum(module)
    assert [type(part).__name__ for part in module.parametrizations.weight] == ["_SpectralNorm", "ZeroSum"]
    assert module.weight.sum(1).abs().max() < 1e-6
    assert torch.linalg.matrix_norm(module.weight, 2) < 1.01
    module = zero_sum(torch.nn.Linear(5, 4))
    torchs.spectral_norm(module, n_power_iterations=100).eval()
    assert module.weight.sum(1).abs().max() < 1e-6
    torch.testing.assert_close(torch.linalg.matrix_norm(module.weight, 2).item(), 1.0, rtol=0, atol=1e-3)
    with pytest.warns(UserWarning, match="sum to up to"):
        module.weight = torch.randn(4, 5) + 1
    assert module.weight.sum(1).abs().max() < 1e-6
    parametrize.remove_parametrizations(module, "weight")
    assert module.weight.sum(1).abs().max() < 1e-6


@every_zero_sum
def test_a_later_registration_does_not_warn(constrain):
    module = torchs.spectral_norm(torch.nn.Linear(5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if constrain is zero_sum:
            constrain(module)
        else:
            torchs.spectral_norm(constrain(torch.nn.Linear(5, 4)))


@pytest.mark.parametrize("first", [torchs.spectral_norm, torchs.weight_norm, hypersphere, zero_sum, zero_sum_basis])
def test_constraints_that_must_come_first(first):
    module = first(torch.nn.Linear(5, 4))
    weight, kinds = module.weight.detach().clone(), [type(part) for part in module.parametrizations.weight]
    refused = [hypersphere, zero_sum_basis]
    if first in (zero_sum, zero_sum_basis):
        refused.append(zero_sum)
    for constrain in refused:
        with pytest.raises(ValueError, match=r"weight already has .*; expected a tensor without "):
            constrain(module)
        assert [type(part) for part in module.parametrizations.weight] == kinds
        module.eval()
        torch.testing.assert_close(module.weight, weight, rtol=0, atol=0.2)
    if zero_sum not in refused:
        assert zero_sum(module).weight.sum(1).abs().max() < 1e-6


def test_two_modules_that_share_a_parameter():
    for constrain in FORMS:
        embedding, head = torch.nn.Embedding(4, 5), torch.nn.Linear(5, 4)
        head.weight = embedding.weight
        before = embedding.weight.detach().clone()
        constrain(head)
        if constrain is zero_sum:
            assert originals(head)[0] is embedding.weight
            assert embedding.weight.sum(1).abs().max() < 1e-6
            zero_sum(embedding)
            assert originals(embedding)[0] is originals(head)[0]
            assert torch.equal(embedding.weight, head.weight)
        else:
            assert torch.equal(embedding.weight, before)
            assert all(tensor is not embedding.weight for tensor in head.parameters())
            with torch.no_grad():
                originals(head)[0].fill_(1)
            assert torch.equal(embedding.weight, before)


@every_form
def test_one_module_that_has_a_tensor_twice_and_two_that_share_a_buffer(constrain):
    module = torch.nn.Module()
    module.first = module.second = torch.nn.Parameter(torch.randn(4, 5))
    constrain(module, "second")
    if constrain is not hypersphere:
        assert module.second.sum(1).abs().max() < 1e-6
    assert module.first.shape == module.second.shape == (4, 5)
    table = torch.randn(4, 5)
    before = table.clone()
    owner = with_tensor(table)
    constrain(with_tensor(table))
    expected = before - before.mean(1, keepdim=True) if constrain is zero_sum else before
    torch.testing.assert_close(owner.weight, expected)


# ---- Refusals --------------------------------------------------------------------------------------------------------


def pruned():
    module = torch.nn.Linear(5, 4)
    prune.l1_unstructured(module, "weight", 0.5)
    return module


def with_weight_norm_hook():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(torch.nn.Linear(5, 4))


def with_tensor(tensor):
    module = torch.nn.Module()
    module.register_buffer("weight", tensor)
    return module


def of_a_property():
    class Layer(torch.nn.Linear):
        @property
        def derived(self):
            raise RuntimeError("must not be read")

    return Layer(5, 4)


REFUSALS = {
    "no module": (lambda: torch.ones(3, 3), "weight", TypeError, r"module is a Tensor; expected a torch.nn.Module\."),
    "no string": (lambda: torch.nn.Linear(5, 4), 0, TypeError, r"name is a int; expected a string\."),
    "no such tensor": (
        lambda: torch.nn.Linear(5, 4),
        "weights",
        ValueError,
        r"weights is not there; expected a parameter or a buffer of Linear: weight, bias\.",
    ),
    "a tensor of a submodule": (
        lambda: torch.nn.Sequential(torch.nn.Linear(5, 4)),
        "0.weight",
        ValueError,
        r"0\.weight is not there; expected a parameter or a buffer of Sequential: it has none\.",
    ),
    "no bias": (lambda: torch.nn.Linear(5, 4, bias=False), "bias", ValueError, "bias is not there"),
    "bias": (
        lambda: torch.nn.Linear(5, 4),
        "bias",
        ValueError,
        r"bias has shape \(4,\); expected at least 2 dimensions, one row per unit\. .* name the layer's weight instead",
    ),
    "number": (lambda: with_tensor(torch.tensor(1.0)), "weight", ValueError, r"weight has shape \(\); expected at "),
    "pruned": (
        pruned,
        "weight",
        ValueError,
        r"weight is pruned, so that a mask multiplies weight_orig; expected a tensor without a mask\. Make it "
        r"permanent first: torch\.nn\.utils\.prune\.remove\(module, 'weight'\)\.",
    ),
    "the tensor under a mask": (pruned, "weight_orig", ValueError, "weight_orig is pruned"),
    "hook": (
        with_weight_norm_hook,
        "weight",
        ValueError,
        r"weight is computed from other tensors; expected a parameter or a buffer of Linear: bias, weight_g, weight_v",
    ),
    "property": (of_a_property, "derived", ValueError, "derived is computed from other tensors; expected a parameter"),
    "lazy": (
        lambda: torch.nn.LazyLinear(4),
        "weight",
        ValueError,
        r"weight is not initialised; expected a tensor with a shape\. Run a forward pass of the lazy module first\.",
    ),
    "complex": (
        lambda: torch.nn.Linear(5, 4, dtype=torch.complex64),
        "weight",
        TypeError,
        "weight is torch.complex64; expected float64, .*imaginary part as two tensors",
    ),
    "int8": (
        lambda: with_tensor(torch.ones(4, 5, dtype=torch.int8)),
        "weight",
        TypeError,
        "weight is torch.int8; expected float64, .*before it is quantized",
    ),
    "sparse": (
        lambda: with_tensor(torch.eye(4).to_sparse()),
        "weight",
        TypeError,
        "weight is sparse_coo; expected a dense",
    ),
    "sparse gradients": (
        lambda: torch.nn.Embedding(4, 5, sparse=True),
        "weight",
        ValueError,
        r"weight has sparse gradients; expected dense gradients\. Set module.sparse = False",
    ),
}


@pytest.mark.parametrize(("make", "name", "error", "message"), REFUSALS.values(), ids=REFUSALS)
@every_form
def test_refusals_say_why_and_change_nothing(constrain, make, name, error, message):
    module = make()
    before = dict(module.state_dict(keep_vars=True)) if isinstance(module, torch.nn.Module) else {}
    function = "hypersphere" if constrain is hypersphere else "zero_sum"
    with pytest.raises(error, match=f"^{function}: {message}"):
        constrain(module, name)
    if isinstance(module, torch.nn.Module):
        assert not parametrize.is_parametrized(module)
        after = module.state_dict(keep_vars=True)
        assert list(before) == list(after)
        assert all(after[key] is before[key] for key in before)


@every_form
def test_an_assignment_that_does_not_fit_changes_nothing(constrain):
    module = constrain(torch.nn.Linear(5, 4))
    before = module.weight.detach().clone()
    start = f"^{'hypersphere' if constrain is hypersphere else 'zero_sum'}: the tensor assigned to weight"
    with pytest.raises(ValueError, match=rf"{start} has shape \(5, 4\); expected \(4, 5\)"):
        module.weight = torch.randn(5, 4)
    with pytest.raises(ValueError, match=rf"{start} has shape \(1, 5\)"):
        module.weight = torch.randn(1, 5)
    with pytest.raises(TypeError, match=f"{start} is a float; expected a torch.Tensor"):
        module.weight = 1.0
    with pytest.raises(TypeError, match=f"{start} is torch.int64; expected float64"):
        module.weight = torch.ones(4, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="dtype"):
        module.weight = before.double()
    with pytest.raises(RuntimeError, match="device"):
        module.weight = before.to("meta")
    with pytest.raises(KeyError):
        module.weight = torch.nn.Parameter(before)
    assert torch.equal(module.weight, before)
    with torch.no_grad():
        torch.nn.init.ones_(module.weight)
    assert torch.equal(module.weight, before)


def test_transformers_is_not_imported_to_find_its_layers(monkeypatch):
    """A stand-in for the library: the weight of its Conv1D is (inputs, outputs)."""

    class Conv1D(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(5, 4))

    library = types.ModuleType("transformers.pytorch_utils")
    library.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", library)
    assert zero_sum(Conv1D()).weight.sum(0).abs().max() < 1e-6
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils")
    assert zero_sum(Conv1D()).weight.sum(1).abs().max() < 1e-6
    assert "transformers.pytorch_utils" not in sys.modules


def test_the_names_are_public():
    assert nn.utils.parametrizations.__all__ == ["hypersphere", "zero_sum"]
    assert "utils" in nn.__all__
    for function in (zero_sum, hypersphere):
        for part in ("Args:", "Returns:", "Raises:", "Source:"):
            assert part in function.__doc__
    assert isinstance(zero_sum(torch.nn.Linear(3, 2)).weight, Tensor)


def test_a_refused_assignment_leaves_the_signs():
    module = nn.utils.parametrizations.hypersphere(torch.nn.Linear(1, 4))
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match="dtype"):
        module.weight = -before.double()
    assert torch.equal(module.weight, before)
