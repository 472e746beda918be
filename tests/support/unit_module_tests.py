"""Tests that the layers of GmP and of weight norm share. Each stem's file of tests imports all of them.

``STEM`` of that file says which layers they test: pytest collects the functions there, under the file's own name.
"""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import init, nn
from support.unit_modules import EPS, PLAIN_CONVS, RANKS, assert_within


@pytest.fixture
def stem(request):
    """The layers of the file that imports the test."""
    return request.module.STEM


@pytest.fixture
def layers(stem):
    return stem.layers


# ---- Arguments and results -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", RANKS)
def test_positional_arguments_are_torchs(rank, stem):
    arguments = (4, 6, 3, 2, 1, 1, 2, False, "circular", "cpu", torch.float64)
    plain = PLAIN_CONVS[rank - 1](*arguments)
    layer = stem.convs[rank - 1](*arguments)
    assert layer.extra_repr().removesuffix(", activation=None") == plain.extra_repr()
    output = layer(torch.randn(1, 4, *(8,) * rank, dtype=torch.float64))
    assert output.dtype == torch.float64
    assert output.shape[:2] == (1, 6)


def test_double_derivatives(layers):
    for layer, x in layers(dtype=torch.float64):
        if x.dim() > 3:
            continue
        names, tensors = zip(*((n, p.detach().requires_grad_()) for n, p in layer.named_parameters()), strict=True)

        def call(x, *tensors, layer=layer, names=names):
            return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

        inputs = (x[:1, ..., :6].clone().requires_grad_(), *tensors)
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_batches_and_no_units(stem, layers):
    for layer, x in layers():
        for mode in (True, False):
            layer.train(mode)
            empty = layer(x[:0])
            assert empty.shape == (0, *layer(x).shape[1:])
            with torch.no_grad():
                assert layer(x[:0]).shape == empty.shape
        empty.sum().backward()
        assert not any(p.grad is not None and p.grad.any() for p in layer.parameters())
    assert stem.linear(5, 0)(torch.randn(2, 5)).shape == (2, 0)


def test_channels_last_inputs_and_parameters(layers):
    for layer, x in layers():
        if x.dim() != 4:
            continue
        expected = layer(x)
        moved = copy.deepcopy(layer).to(memory_format=torch.channels_last)
        output = moved(x.to(memory_format=torch.channels_last))
        assert output.is_contiguous(memory_format=torch.channels_last)
        # At most 36 products and a bias, summed in two orders.
        assert_within(layer, x, output, expected, 2 * 37, 2**-23)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training, layers):
    for layer, x in layers():
        layer.train(training)
        exact = copy.deepcopy(layer).double()(x.double())
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
            outputs = [layer(x), layer(x.bfloat16())]
        for output in outputs:
            assert output.dtype == torch.bfloat16
            # Input, weight, radius, bias, pre-activation and output are rounded to bfloat16, by half an ulp each.
            assert_within(layer, x, output, exact, 6 / 2 * (1 + 2**-6), 2**-7)
        if training:
            outputs[0].sum().backward()
            assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("inference", [False, True])
def test_inputs_that_do_not_fit(inference, stem, layers):
    for layer, x in layers():
        if x.dim() > 2:
            continue
        layer.train(not inference)
        with torch.set_grad_enabled(not inference):
            with pytest.raises(ValueError, match=rf"{stem.op}: x has shape \(2, 5\); expected \(\.\.\., 6\)"):
                layer(torch.randn(2, 5))
            with pytest.raises(TypeError, match=f"{stem.op}: .*float64"):
                layer(torch.randn(2, 6).double())
            with pytest.raises(TypeError, match=f"{stem.op}: x is a list"):
                layer([1.0, 2.0, 3.0])


# ---- torch.func ------------------------------------------------------------------------------------------------------


def _with(layer, parameters):
    other = copy.deepcopy(layer)
    other.load_state_dict(parameters)
    return other


def test_gradients_of_every_sample(layers):
    for layer, x in layers(dtype=torch.float64):
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def loss(parameters, x, layer=layer):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        actual = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        for k, sample in enumerate(x):
            layer.zero_grad()
            layer(sample).square().sum().backward()
            for name, parameter in layer.named_parameters():
                # Sums of at most 100 products of 100, in two orders.
                torch.testing.assert_close(actual[name][k], parameter.grad, rtol=0, atol=2 * 100 * 1e3 * EPS, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_an_ensemble_by_vmap_is_never_stale(training, layers):
    for layer, x in layers():
        layer.train(training)
        stacked = {name: torch.randn(3, *p.shape) for name, p in layer.named_parameters()}
        with torch.no_grad():
            layer(x)
            outputs = torch.vmap(partial(torch.func.functional_call, layer), in_dims=(0, None))(stacked, (x,))
            for k in range(3):
                one = {name: tensor[k] for name, tensor in stacked.items()}
                expected = torch.func.functional_call(copy.deepcopy(layer), one, (x,))
                assert torch.equal(torch.func.functional_call(layer, one, (x,)), expected)
                # At most 36 products and a bias, summed in two orders.
                assert_within(_with(layer, one), x, outputs[k], expected, 2 * 37, 2**-23)


# ---- From a trained layer --------------------------------------------------------------------------------------------


class Doubled(torch.nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def test_the_weight_that_a_layer_applies_is_converted(stem):
    """The converted weight is the result of the constraint or of torch's weight norm, not the trained parameter."""
    x = torch.randn(5, 6, dtype=torch.float64)
    constrained = [nn.LCWLinear(6, 5, basis=basis, dtype=torch.float64) for basis in (False, True)]
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 5, dtype=torch.float64))
    with torch.no_grad():
        normed.parametrizations.weight.original0.mul_(2)
    for plain in (*constrained, normed):
        made = stem.linear.from_linear(plain)
        torch.testing.assert_close(made(x), plain(x), rtol=0, atol=32 * 6 * 5 * EPS)
        assert all(p.requires_grad and p.is_leaf for p in made.parameters())
    convolution = nn.LCWConv2d(2, 3, 2, basis=True, dtype=torch.float64)
    images = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    made = stem.convs[1].from_conv(convolution)
    torch.testing.assert_close(made(images), convolution(images), rtol=0, atol=32 * 8 * 5 * EPS)


def test_what_a_model_conversion_would_leave_alone_is_refused(stem):
    class Standardised(torch.nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    parametrized = torch.nn.Linear(6, 5)
    parametrize.register_parametrization(parametrized, "weight", Doubled())
    with pytest.raises(ValueError, match=r"from_linear: layer cannot be replaced: .* the parametrization Doubled"):
        stem.linear.from_linear(parametrized)
    with pytest.raises(ValueError, match=r"from_conv: layer cannot be replaced: .* forward of its own"):
        stem.convs[1].from_conv(Standardised(2, 3, 2))


def test_a_stale_weight_of_torchs_older_weight_norm_is_computed_again(stem):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layers = [torch.nn.utils.weight_norm(torch.nn.Linear(6, 5, dtype=torch.float64)) for _ in range(2)]
    layers[0].load_state_dict(layers[1].state_dict())
    x = torch.randn(5, 6, dtype=torch.float64)
    made = stem.linear.from_linear(layers[0])
    torch.testing.assert_close(made(x), layers[1](x), rtol=0, atol=32 * 6 * 5 * EPS)


def test_conversion_keeps_mode_dtype_and_frozen_parameters(stem):
    plain = torch.nn.Linear(4, 3, dtype=torch.bfloat16).eval()
    plain.weight.requires_grad_(False)
    before = torch.get_rng_state()
    made = stem.linear.from_linear(plain)
    assert not made.training
    assert all(p.dtype == torch.bfloat16 for p in made.parameters())
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained <= {"location", "bias"}
    assert len(trained) == 1
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert plain.weight.any()
    assert torch.equal(torch.get_rng_state(), before)
    on_meta = stem.linear.from_linear(torch.nn.Linear(4, 3, device="meta"))
    assert all(p.is_meta for p in on_meta.parameters())
    on_meta = stem.convs[1].from_conv(torch.nn.Conv2d(4, 3, 2, device="meta"))
    assert all(p.is_meta for p in on_meta.parameters())


# ---- State -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["state dict", "deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("used", [False, True])
def test_layers_are_copied_and_come_back(how, used, tmp_path, layers):
    for (layer, x), (other, _) in zip(layers(), layers(), strict=True):
        layer.eval()
        if used:
            # From now on the layer keeps its derived weight.
            with torch.inference_mode():
                layer(x)
        if how == "state dict":
            torch.save(layer.state_dict(), tmp_path / "layer.pt")
            other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
            gmp_keys, weight_norm_keys = ["angles", "radius", "location"], ["weight_v", "weight_g", "bias"]
            assert [*layer.state_dict()] == (gmp_keys if hasattr(layer, "angles") else weight_norm_keys)
        elif how == "deepcopy":
            other = copy.deepcopy(layer)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        else:
            torch.save(layer, tmp_path / "layer.pt")
            other = torch.load(tmp_path / "layer.pt", weights_only=False)
        assert torch.equal(other(x), layer(x))
        assert repr(other) == repr(layer)
        with torch.no_grad():
            next(other.parameters()).add_(1)
            assert not torch.equal(other.eval()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_layers_take_on_another_dtype(dtype, layers):
    for layer, x in layers():
        moved = copy.deepcopy(layer).to(dtype)
        # The moved layer has rounded parameters, and is judged with them.
        exact = copy.deepcopy(moved).double()(x.to(dtype).double())
        output = moved(x.to(dtype))
        assert output.dtype == dtype
        # In 16 bits, direction, radius times direction, bias, pre-activation and output are rounded by half an ulp
        # each, beside sums of 37 numbers in float32. In float64 only the order of the sums differs.
        roundings = 2 * 37 if dtype == torch.float64 else 5 / 2 * (1 + 2**-6)
        assert_within(moved, x.to(dtype), output, exact, roundings, torch.finfo(dtype).eps)


def test_layers_on_the_meta_device_are_filled_later(layers):
    for (layer, x), (source, _) in zip(layers(device="meta"), layers(), strict=True):
        assert all(p.is_meta for p in layer.parameters())
        with lcw_ops.use_backend("reference"):
            assert layer(x.to("meta")).is_meta
        layer.to_empty(device="cpu")
        layer.load_state_dict(source.state_dict())
        assert torch.equal(layer(x), source(x))


def test_skip_init(stem):
    kinds = [partial(stem.linear, 3, 4), *(partial(kind, 3, 4, 2) for kind in stem.convs)]
    kinds += [partial(stem.linear, 1, 4), *(partial(kind, 1, 4, 1) for kind in stem.convs)]
    for kind in kinds:
        before = torch.get_rng_state()
        skipped = torch.nn.utils.skip_init(kind.func, *kind.args, dtype=torch.float64)
        assert torch.equal(torch.get_rng_state(), before)
        made = kind(dtype=torch.float64)
        assert {k: (v.shape, v.dtype, v.device) for k, v in skipped.state_dict().items()} == {
            k: (v.shape, v.dtype, v.device) for k, v in made.state_dict().items()
        }


def test_lps_model_draws_the_weights_that_these_layers_apply(layers):
    made = [(layer, x) for layer, x in layers(bias=True)]
    model = torch.nn.Sequential(*(layer for layer, _ in made))
    before = [layer.effective_weight().detach().clone() for layer, _ in made]
    init.lps_model_(model)
    for (layer, _), weight in zip(made, before, strict=True):
        assert not torch.equal(layer.weight, weight)


# ---- Never stale -----------------------------------------------------------------------------------------------------


def each_parameter(edit):
    def edit_all(layer):
        for name in [name for name, _ in layer.named_parameters()]:
            edit(layer, name)

    return edit_all


def swap_two_elements(layer, name):
    flat = getattr(layer, name).data.view(-1)
    flat[[0, 1]] = flat[[1, 0]]


def edit_through_numpy(layer, name):
    getattr(layer, name).detach().numpy()[...] *= 1.5


def one_element(layer, name):
    getattr(layer, name).data.view(-1)[3] += 0.5


def set_data(layer, name):
    getattr(layer, name).data = torch.randn_like(getattr(layer, name))


def set_parameter(layer, name):
    setattr(layer, name, torch.nn.Parameter(torch.randn_like(getattr(layer, name))))


def reuse_the_address(layer, name):
    """The allocator reuses the memory: the same address and the same version, but other content."""
    shape = getattr(layer, name).shape
    delattr(layer, name)
    setattr(layer, name, torch.nn.Parameter(torch.randn(shape)))


def optimizer_step(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def load_another(layer, **options):
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()}, **options)


EDITS = {
    "optimizer step": optimizer_step,
    "load_state_dict": load_another,
    "load_state_dict(assign=True)": partial(load_another, assign=True),
    "data.mul_": each_parameter(lambda layer, name: getattr(layer, name).data.mul_(1.7)),
    "one element": each_parameter(one_element),
    "two swapped": each_parameter(swap_two_elements),
    "data = other": each_parameter(set_data),
    "numpy": each_parameter(edit_through_numpy),
    "new parameter": each_parameter(set_parameter),
    "the same address": each_parameter(reuse_the_address),
    "only the first": lambda layer: one_element(layer, next(iter(dict(layer.named_parameters())))),
    "only the second": lambda layer: one_element(layer, list(dict(layer.named_parameters()))[1]),
    "to(bfloat16)": lambda layer: layer.to(torch.bfloat16),
    "channels last": lambda layer: (
        layer.to(memory_format=torch.channels_last) if any(p.dim() == 4 for p in layer.parameters()) else None
    ),
    "reset_parameters": lambda layer: layer.reset_parameters(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("edit", EDITS)
def test_inference_is_never_stale(edit, mode, layers):
    for layer, x in layers():
        layer.eval()
        with mode():
            before = layer(x)
        for _ in range(2):
            EDITS[edit](layer)
            x = x.to(next(layer.parameters()).dtype)
            with mode():
                output = layer(x)
                # A copy has no kept weight.
                assert torch.equal(output, copy.deepcopy(layer)(x))
                assert torch.equal(layer(x), output)
            if edit not in ("channels last", "to(bfloat16)"):
                assert not torch.equal(output, before)
            before = output


def test_inference_gives_the_result_of_training(layers):
    for layer, x in layers(dtype=torch.float64):
        expected = layer.train()(x)
        layer.eval()
        with_gradients = layer(x)
        with torch.no_grad():
            kept = [layer(x) for _ in range(2)]
        # At most 36 products and a bias, summed in two orders.
        for output in (with_gradients, *kept):
            assert_within(layer, x, output, expected, 2 * 37, EPS)


@pytest.fixture
def computations(monkeypatch):
    """A list of shapes: those of the parameters from which directions or normalised rows are computed."""
    shapes = []

    def counted(compute, first, *others):
        shapes.append(tuple(first.shape))
        return compute(first, *others)

    for name in ("hypersphere_direction", "normalize_scale"):
        monkeypatch.setattr(F, name, partial(counted, getattr(F, name)))
    return shapes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_computed_again_from_an_unchanged_parameter(mode, computations, layers):
    for layer, x in layers():
        layer.eval()
        computations.clear()
        with mode():
            outputs = [layer(x) for _ in range(5)]
        assert len(computations) == 1
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        next(layer.parameters()).data.mul_(1.5)
        with mode():
            layer(x), layer(x)
        assert len(computations) == 2
        # The kept weight does not depend on bias, location and radius.
        for name in ("bias", "location", "radius"):
            if name in dict(layer.named_parameters()):
                getattr(layer, name).data.add_(1)
        with mode():
            assert torch.equal(layer(x), copy.deepcopy(layer)(x))
        assert len(computations) == 3


def test_with_gradients_or_in_training_nothing_is_kept(computations, layers):
    for layer, x in layers():
        if x.dim() == 2:
            continue
        computations.clear()
        layer.eval()
        layer(x), layer(x)
        layer.train()
        with torch.no_grad():
            layer(x), layer(x)
        assert len(computations) == 4


def test_a_kept_weight_is_not_handed_out(layers):
    """A result is a copy: an edit of it changes neither the kept weight nor the layer's input."""
    for layer, x in layers():
        layer.eval()
        with torch.no_grad():
            given, parameters = x.clone(), copy.deepcopy(layer.state_dict())
            expected = layer(x).clone()
            layer(x).zero_()
            layer.effective_weight().mul_(2)
            if hasattr(layer, "direction"):
                layer.direction().mul_(2)
            assert torch.equal(layer(x), expected)
            assert torch.equal(x, given)
        assert all(torch.equal(parameters[key], value) for key, value in layer.state_dict().items())


def test_a_kept_weight_does_not_meet_a_request_for_another_backend(layers):
    for layer, x in layers():
        layer.eval()
        with torch.no_grad():
            layer(x)
            with pytest.raises(lcw_ops.BackendError), lcw_ops.use_backend("cuda"):
                layer(x)


def test_parametrized_angles_and_weights_are_never_stale(layers):
    for (layer, x), (other, _) in zip(layers(), layers(), strict=True):
        layer.eval(), other.eval()
        other.load_state_dict(layer.state_dict())
        name = "angles" if hasattr(layer, "angles") else "weight_v"
        with torch.no_grad():
            layer(x)
            parametrize.register_parametrization(layer, name, torch.nn.Tanh(), unsafe=True)
            original = getattr(layer.parametrizations, name).original
            for _ in range(2):
                getattr(other, name).copy_(original.tanh())
                assert torch.equal(layer(x), copy.deepcopy(other)(x))
                original.mul_(3)


def traced(layer, x):
    return make_fx(lambda x: layer(x))(x)


def test_a_traced_layer_keeps_no_weight(layers):
    for layer, x in layers():
        layer.eval()
        with torch.no_grad():
            layer(x)
            program = traced(layer, x)
            next(layer.parameters()).data.mul_(2)
            assert_within(layer, x, program(x), layer(x), 2 * 37, 2**-23)
