"""Code that reads, sets, loads or saves the ``weight`` of a layer: it must meet the weight that the layer applies.

The code is torch's own: fused attention, the encoder's fast path, batch-norm fusion, checkpoints of weight norm. And it
is of the kind that models contain: F.linear(x, layer.weight), tied heads, penalties on weights.
"""

import copy
import inspect
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from support.constrained_layers import CONVS, GMP, LINEARS, WEIGHT_NORM, apply_plain, drift_, every_layer, rank_of
from support.numerics import assert_as_exact_as_eager

from lcw_ops import functional as F
from lcw_ops import init, nn
from lcw_ops._layer_kinds import is_conv, is_linear, plain_kind

EPS = 2**-23

linears = pytest.mark.parametrize("kind", LINEARS)
convs = pytest.mark.parametrize("kind", CONVS)


def zero_sum(weight):
    return weight - weight.mean(dim=tuple(range(1, weight.dim())), keepdim=True)


def expressible(layer, weight):
    """The weight that the layer applies once it has been given this one, from the formula in float64."""
    return zero_sum(weight.double()) if "LCW" in type(layer).__name__ else weight.double()


def without_warnings_of_projection(function, *arguments):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*do not sum to zero")
        return function(*arguments)


# ---- Reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_and_bias_are_those_that_are_applied(bias, training):
    for layer, x in every_layer(bias=bias):
        layer.train(training)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                assert (layer.bias is None) == (not bias)
                expected = apply_plain(layer, x, layer.weight, layer.bias)
                # At most 18 products below 5 x 10 are summed in two orders.
                torch.testing.assert_close(layer(x), expected, rtol=0, atol=2 * 18 * 50 * EPS)
        assert layer.weight.shape == (*layer.weight.shape[:1], *layer.effective_weight().shape[1:])
        assert torch.equal(layer.weight, layer.effective_weight())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_weight_read_is_as_exact_as_eager_torchs(dtype):
    for layer, _ in every_layer(dtype=dtype):
        results = []
        for precision in (dtype, torch.float64):
            tensors = {name: tensor.detach().to(precision) for name, tensor in layer.state_dict().items()}
            results.append(formula(layer, tensors))
        assert layer.weight.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(layer.weight, results[1], rtol=0, atol=32 * 2**-52 * results[1].abs().max())
        else:
            assert_as_exact_as_eager(type(layer).__name__, layer.weight.detach(), *results)


def formula(layer, tensors):
    """The weight by the methods' formulas, without the package's code."""
    shape = layer.weight.shape
    if "weight_u" in tensors:
        return zero_sum(tensors["weight_u"])
    if "weight_g" in tensors:
        rows = tensors["weight_v"].flatten(1)
        return (tensors["weight_g"].view(-1, 1) * rows / rows.norm(dim=1, keepdim=True)).view(shape)
    if "weight_v" in tensors:
        v = tensors["weight_v"]
        m = v.shape[1] + 1
        basis = torch.eye(m, m - 1, dtype=torch.float64) - 1 / (math.sqrt(m) * (math.sqrt(m) + 1))
        basis[-1] = -1 / math.sqrt(m)
        return (v @ basis.T.to(v.dtype)).view(shape)
    angles = tensors["angles"]
    ones = torch.ones(len(angles), 1, dtype=angles.dtype)
    sines = torch.cat([ones, angles.sin().cumprod(1)], dim=1)
    return (tensors["radius"][:, None] * sines * torch.cat([angles.cos(), ones], dim=1)).view(shape)


def test_gradients_flow_through_weight_and_bias():
    for layer, x in every_layer():
        output = layer(x)
        grad_output = torch.randn_like(output)
        parameters = list(layer.parameters())
        expected = torch.autograd.grad(output, parameters, grad_output)
        read = apply_plain(layer, x, layer.weight, layer.bias)
        for actual, gradient in zip(torch.autograd.grad(read, parameters, grad_output), expected, strict=True):
            # Sums of at most 2 x 3 x 27 x 18 products below 100, in two orders, relative to the largest.
            torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_an_edit_of_the_weight_that_was_read_changes_nothing():
    for layer, x in every_layer():
        for training in (True, False):
            layer.train(training)
            with torch.no_grad():
                expected = layer(x)
                layer.weight.data.mul_(2)
                layer.weight.zero_()
                torch.nn.init.ones_(layer.weight)
                if isinstance(layer, GMP):
                    layer.bias.add_(1)
                for _ in range(2):
                    assert torch.equal(layer(x), expected)
                assert not torch.equal(layer.weight, torch.ones_like(layer.weight))


def test_compiled_code_reads_the_weight():
    for layer, x in every_layer():
        torch.compiler.reset()
        layer.eval()

        def penalised(x, layer=layer):
            return apply_plain(layer, x, layer.weight, layer.bias), layer.weight.square().sum()

        compiled = torch.compile(penalised, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            for actual, expected in zip(compiled(x), penalised(x), strict=True):
                torch.testing.assert_close(actual, expected)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.mul_(1.25)


def test_functional_call_grad_and_vmap_reach_through_the_weight():
    for layer, _ in every_layer():
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        class Penalty(torch.nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def forward(self):
                return self.layer.weight.square().sum()

        penalty = Penalty(layer)
        named = {f"layer.{name}": p for name, p in parameters.items()}
        gradients = torch.func.grad(lambda named, p=penalty: torch.func.functional_call(p, named, ()))(named)
        penalty().backward()
        for name, parameter in penalty.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradients[name], expected)
        stacked = {name: torch.stack([p, p + 0.5]) for name, p in named.items()}
        both = torch.vmap(lambda named, p=penalty: torch.func.functional_call(p, named, ()))(stacked)
        torch.testing.assert_close(both[0], penalty().detach())
        moved = {name: tensor[1] for name, tensor in stacked.items()}
        torch.testing.assert_close(both[1], torch.func.functional_call(penalty, moved, ()).detach())


def test_copies_and_pickles_have_weights_of_their_own():
    for layer, x in every_layer():
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other.weight, layer.weight)
            with torch.no_grad():
                next(other.parameters()).add_(1.5 * torch.rand_like(next(other.parameters())))
            assert not torch.equal(other.weight, layer.weight)
            assert torch.equal(copy.deepcopy(layer)(x), layer(x))


# ---- torch's code that reads it -------------------------------------------------------------------------------------


@linears
def test_encoder_layer_on_its_fast_path(kind, monkeypatch):
    make, calls = LINEARS[kind], []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a, **k: (calls.append(1), fast(*a, **k))[1])
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    layer.linear1, layer.linear2, layer.self_attn.out_proj = make(16, 32), make(32, 16), make(16, 16)
    x, target = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        optimizer.step()
    expected = layer(x)
    layer.eval()
    with torch.no_grad():
        actual = layer(x)
    assert calls
    # The fast path fuses layer norms and products: float32 roundings of numbers below 10 over about 100 terms.
    torch.testing.assert_close(actual, expected, rtol=0, atol=100 * 10 * EPS)


@linears
def test_attention_with_our_output_projection(kind):
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    attention.out_proj = drift_(LINEARS[kind](16, 16))
    plain = copy.deepcopy(attention)
    plain.out_proj = torch.nn.Linear(16, 16)
    plain.out_proj.load_state_dict(
        {"weight": attention.out_proj.weight.detach(), "bias": attention.out_proj.bias.detach()}
    )
    x = torch.randn(2, 7, 16)
    for training in (True, False):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                actual = attention.train(training)(x, x, x, need_weights=False)[0]
                expected = plain.train(training)(x, x, x, need_weights=False)[0]
            torch.testing.assert_close(actual, expected, rtol=0, atol=2 * 16 * 20 * EPS)
    attention.train()(x, x, x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in attention.out_proj.parameters())


class TiedHead(torch.nn.Module):
    """A model that multiplies by the weights of its layers itself, as vision transformers and language models do."""

    def __init__(self, make):
        super().__init__()
        self.qkv, self.head = drift_(make(8, 24)), drift_(make(8, 10))

    def forward(self, x):
        q, k, v = torch.nn.functional.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, dim=-1)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return mixed @ self.head.weight.T, self.head(mixed) - self.head.bias


@linears
def test_models_that_multiply_by_the_weight(kind):
    by_weight, by_layer = TiedHead(LINEARS[kind])(torch.randn(3, 5, 8))
    torch.testing.assert_close(by_weight, by_layer, rtol=0, atol=2 * 8 * 50 * EPS)


@convs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_is_fused_into_a_convolution(kind, bias, groups):
    layer = drift_(CONVS[kind](4, 6, 3, bias=bias, groups=groups)).eval()
    rank = rank_of(layer)
    norm = getattr(torch.nn, f"BatchNorm{rank}d")(6).eval()
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, *(5,) * rank)
    fused = torch.nn.utils.fuse_conv_bn_eval(layer, norm)
    assert type(fused) is type(layer)
    # Up to 108 products below 10 x 5, and one more factor below 3.
    torch.testing.assert_close(fused(x), norm(layer(x)), rtol=0, atol=2 * 108 * 150 * EPS)


@linears
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_is_fused_into_a_linear_layer(kind, bias):
    layer, norm = drift_(LINEARS[kind](6, 5, bias=bias)).eval(), torch.nn.BatchNorm1d(5).eval()
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_()
    x = torch.randn(4, 6)
    fused = torch.nn.utils.fusion.fuse_linear_bn_eval(layer, norm)
    torch.testing.assert_close(fused(x), norm(layer(x)), rtol=0, atol=2 * 6 * 150 * EPS)


def test_attributes_are_those_of_the_plain_layer():
    for layer, _ in every_layer():
        arguments = (6, 5) if is_linear(layer) else (4, 6, 3)
        options = {} if is_linear(layer) else {"groups": 2}
        plain = plain_kind(layer)(*arguments, **options)
        names = [name for name in vars(plain) if not name.startswith("_")]
        assert len(names) > 2
        for name in names:
            assert getattr(layer, name) == getattr(plain, name), name
        for name in ("weight", "bias"):
            assert getattr(layer, name).shape == getattr(plain, name).shape
        assert not isinstance(layer, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))


def test_kinds():
    for layer in (torch.nn.Bilinear(2, 3, 4), torch.nn.ConvTranspose1d(2, 3, 1), torch.nn.ReLU(), nn.InputMeanNorm(3)):
        assert not is_linear(layer)
        assert not is_conv(layer)
        assert plain_kind(layer) is type(layer)
    for layer, _ in every_layer():
        assert is_linear(layer) != is_conv(layer)


# ---- Setting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [torch.nn.Parameter, torch.Tensor.clone], ids=["parameter", "tensor"])
def test_the_weight_that_was_set_is_applied(wrap):
    for layer, x in every_layer():
        parameters = list(layer.parameters())
        weight = zero_sum(torch.randn_like(layer.weight))
        bias = layer.bias.detach().clone()
        layer.weight = wrap(weight)
        # The parameters are the same objects, so an optimizer goes on with them.
        assert all(new is old for new, old in zip(layer.parameters(), parameters, strict=True))
        # A few roundings of numbers below 5.
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=8 * 5 * EPS)
        torch.testing.assert_close(layer.bias.detach(), bias, rtol=4 * EPS, atol=0)
        # The bias of LCW and weight norm is a parameter, as in the plain layers.
        layer.bias = (wrap if isinstance(layer, GMP) else torch.nn.Parameter)(torch.ones_like(bias))
        torch.testing.assert_close(layer.bias.detach(), torch.ones_like(bias), rtol=4 * EPS, atol=0)
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=8 * 5 * EPS)
        expected = apply_plain(layer, x, weight, torch.ones_like(bias))
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=4 * 18 * 50 * EPS)


def test_a_row_sum_is_projected_with_one_warning_per_layer():
    for layer, _ in every_layer():
        weight = torch.randn_like(layer.weight) + 1
        if "LCW" in type(layer).__name__:
            with pytest.warns(UserWarning, match="rows that do not sum to zero. The layer applies the projection"):
                layer.weight = weight
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer.weight = weight
        expected = expressible(layer, weight)
        torch.testing.assert_close(layer.weight.double(), expected, rtol=0, atol=8 * 5 * EPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_weight_that_was_read_can_be_set_without_a_warning(dtype):
    for (layer, _), (other, _) in zip(every_layer(dtype=dtype), every_layer(dtype=dtype), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.weight = layer.weight
        unit = torch.finfo(dtype).eps * layer.weight.abs().max().item()
        # Once as it is read, once as the trained tensors are rounded, once as it is read again: up to 6 angles each.
        torch.testing.assert_close(other.weight, layer.weight, rtol=0, atol=16 * unit)


def test_weights_that_cannot_be_set():
    for layer, _ in every_layer():
        before = copy.deepcopy(layer.state_dict())
        for value, error, words in (
            (torch.randn(2, 2), ValueError, r"weight has shape \(2, 2\); expected \("),
            (None, TypeError, "weight is set to a NoneType; expected a tensor"),
            (3.0, TypeError, "weight is set to a float"),
            (torch.ones(layer.weight.shape, dtype=torch.int64), TypeError, "weight is torch.int64"),
        ):
            with pytest.raises(error, match=words):
                layer.weight = value
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        assert "weight" not in {*layer._parameters, *vars(layer)}


def test_a_parametrized_or_pruned_tensor_is_not_assigned_in_vain():
    class Doubled(torch.nn.Module):
        def forward(self, tensor):
            return 2 * tensor

        def right_inverse(self, tensor):
            return tensor / 2

    from torch.nn.utils import parametrize, prune

    for layer, _ in every_layer():
        weight = zero_sum(torch.randn_like(layer.weight))
        trained = [name for name, _ in layer.named_parameters() if name != "bias"]
        for name in trained:
            parametrized = copy.deepcopy(layer)
            parametrize.register_parametrization(parametrized, name, Doubled(), unsafe=True)
            parametrized.weight = weight
            torch.testing.assert_close(parametrized.weight, weight, rtol=0, atol=16 * 5 * EPS)
        pruned = copy.deepcopy(layer)
        prune.random_unstructured(pruned, trained[-1], amount=0.5)
        before = pruned.weight.detach().clone()
        with pytest.raises(ValueError, match=f"is computed from {trained[-1]}, which is computed itself"):
            pruned.weight = weight
        assert torch.equal(pruned.weight, before)


def test_functional_call_takes_the_trained_tensors_alone():
    for layer, x in every_layer():
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        weight = torch.randn(layer.weight.shape, requires_grad=True)
        with pytest.raises(
            TypeError, match="is given weight, which the layer computes; expected the names of the tensors"
        ):
            torch.func.functional_call(layer, {"weight": weight}, (x,))
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("value", [math.inf, math.nan, 6e4])
def test_lengths_that_are_not_finite_are_refused(value):
    layer = nn.WeightNormLinear(4, 3, dtype=torch.float16)
    weight = torch.ones(3, 4, dtype=torch.float16)
    weight[1] = value
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"units \[1\] of weight have no finite length"):
        layer.weight = weight
    with pytest.raises(RuntimeError, match="have no finite length"):
        layer.load_state_dict({"weight": weight, "bias": torch.zeros(3, dtype=torch.float16)})
    assert torch.equal(layer.weight, before)


def test_a_merged_adapter_is_applied():
    """W + B A, in place of an edit of weight.data, which changes nothing."""
    for layer, x in every_layer():
        if is_linear(layer):
            update = torch.randn(5, 2) @ torch.randn(2, 6)
            expected = x @ expressible(layer, layer.weight.detach() + update).float().T + layer.bias
            without_warnings_of_projection(setattr, layer, "weight", layer.weight + update)
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=4 * 6 * 50 * EPS)


def test_a_gmp_unit_that_is_constant_or_not_finite_is_refused():
    layer = drift_(nn.GmPLinear(3, 2))
    before = copy.deepcopy(layer.state_dict())
    for weight, words in (
        (torch.zeros(2, 3), r"units \[0, 1\] of layer are constant"),
        (torch.tensor([[1.0, 2, 3], [math.inf, 0, 0]]), r"units \[1\] of layer have a weight or a location"),
    ):
        with pytest.raises(ValueError, match=words):
            layer.weight = weight
        with pytest.raises(RuntimeError, match=words):
            layer.load_state_dict({"weight": weight, "bias": torch.ones(2)})
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.bias = torch.zeros(2)
    layer.weight = torch.zeros(2, 3)
    assert not layer.weight.any()
    assert not layer.bias.any()
    with pytest.raises(ValueError, match="are constant"):
        layer.bias = torch.ones(2)


def test_a_gmp_layer_gains_and_loses_its_bias():
    layer = nn.GmPLinear(4, 3, bias=False)
    assert layer.bias is None
    assert "bias=False" in repr(layer)
    layer.bias = torch.nn.Parameter(torch.tensor([1.0, -2, 3]))
    assert [name for name, _ in layer.named_parameters()] == ["angles", "radius", "location"]
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + torch.tensor([1.0, -2, 3]), rtol=0, atol=8 * 20 * EPS)
    layer.bias = None
    assert layer.bias is None
    assert [name for name, _ in layer.named_parameters()] == ["angles", "radius"]
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=0, atol=8 * 20 * EPS)


@pytest.mark.parametrize("make", [nn.GmPLinear, partial(nn.GmPConv2d, kernel_size=1)], ids=["linear", "conv"])
def test_no_weight_exists_behind_a_relu_with_a_negative_radius(make):
    layer = make(3, 2, activation="relu")
    x = torch.randn(4, 3, 1, 1) if is_conv(layer) else torch.randn(4, 3)
    torch.testing.assert_close(layer(x), apply_plain(layer, x, layer.weight, layer.bias).relu(), atol=1e-5, rtol=0)
    layer.radius.data[1] = -0.5
    for name in ("weight", "bias"):
        with pytest.raises(ValueError, match=f"{name} does not exist: a unit has a negative radius after a ReLU"):
            getattr(layer, name)
    assert layer.effective_weight().shape[0] == 2
    repr(layer), copy.deepcopy(layer), layer(x)

    compiled = torch.compile(lambda: layer.weight * 1, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="negative radius"):
        compiled()
    layer.radius.data.abs_()
    assert torch.equal(compiled(), layer.weight)
    layer.radius.data[0] = math.nan
    assert layer.weight[0].isnan().all()


# ---- State dicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_of_a_plain_layer_loads(bias, assign):
    for layer, x in every_layer(bias=bias):
        arguments = (6, 5) if is_linear(layer) else (4, 6, 3)
        options = {} if is_linear(layer) else {"groups": 2}
        plain = plain_kind(layer)(*arguments, bias=bias, **options)
        holder = torch.nn.Sequential(torch.nn.ReLU(), layer)
        without_warnings_of_projection(
            partial(holder.load_state_dict, {f"1.{k}": v for k, v in plain.state_dict().items()}, assign=assign)
        )
        expected = expressible(layer, plain.weight.detach())
        torch.testing.assert_close(layer.weight.double(), expected, rtol=0, atol=8 * EPS)
        if bias:
            torch.testing.assert_close(layer.bias, plain.bias, rtol=4 * EPS, atol=0)
        layer(x).sum().backward()
        assert all(p.is_leaf and p.grad is not None for p in layer.parameters())


def test_a_weight_without_its_bias_keeps_the_bias_and_a_bias_alone_is_set():
    for layer, _ in every_layer():
        bias, weight = layer.bias.detach().clone(), layer.weight.detach().clone()
        other = zero_sum(torch.randn_like(weight))
        result = layer.load_state_dict({"weight": other}, strict=False)
        assert [*result.missing_keys] == ["bias"]
        torch.testing.assert_close(layer.weight, other, rtol=0, atol=8 * 5 * EPS)
        torch.testing.assert_close(layer.bias, bias, rtol=8 * EPS, atol=0)
        result = layer.load_state_dict({"bias": bias + 1}, strict=False)
        assert "bias" not in result.missing_keys
        assert not result.unexpected_keys
        torch.testing.assert_close(layer.bias, bias + 1, rtol=8 * EPS, atol=0)
        with pytest.raises(RuntimeError, match='Missing key\\(s\\) in state_dict: "bias"'):
            layer.load_state_dict({"weight": other})


def test_a_bias_for_a_layer_without_one_is_unexpected():
    for layer, _ in every_layer(bias=False):
        other = zero_sum(torch.randn_like(layer.weight))
        state = {"weight": other, "bias": torch.ones(len(other))}
        with pytest.raises(RuntimeError, match='Unexpected key\\(s\\) in state_dict: "bias"'):
            layer.load_state_dict(state)
        assert [*layer.load_state_dict(state, strict=False).unexpected_keys] == ["bias"]
        torch.testing.assert_close(layer.weight, other, rtol=0, atol=8 * 5 * EPS)


def test_hooks_that_rename_keys_come_first():
    for layer, _ in every_layer():
        layer.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: state.update({prefix + "weight": state.pop(prefix + "kernel")})
        )
        other = zero_sum(torch.randn_like(layer.weight))
        for _ in range(2):
            layer.load_state_dict({"kernel": other, "bias": torch.ones(len(other))})
            torch.testing.assert_close(layer.weight, other, rtol=0, atol=8 * 5 * EPS)


def test_a_weight_of_the_shape_of_an_old_basis_is_taken_for_one_with_a_warning():
    with pytest.warns(UserWarning, match="is taken for the parameter of lcw_ops 0.1.0"):
        nn.LCWLinear(5, 3, basis=True).load_state_dict(torch.nn.Linear(4, 3).state_dict())


@pytest.mark.parametrize("wrong", [None, [1.0], torch.ones(5), torch.ones(5, 6, dtype=torch.complex64)], ids=str)
def test_what_is_no_weight_does_not_load(wrong):
    for layer, _ in every_layer()[:4]:
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(RuntimeError, match="weight"):
            layer.load_state_dict({"weight": wrong, "bias": torch.zeros(5)})
        after = layer.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name != "bias")


def test_a_warning_points_at_the_line_that_loads_or_assigns():
    layer, nested = nn.LCWLinear(4, 3), torch.nn.Sequential(torch.nn.Sequential(nn.LCWLinear(4, 3)))
    with pytest.warns(UserWarning, match="sum to zero") as assigned:
        layer.weight = torch.ones(3, 4)
    state = {f"0.0.{name}": tensor for name, tensor in torch.nn.Linear(4, 3).state_dict().items()}
    with pytest.warns(UserWarning, match="sum to zero") as loaded:
        nested.load_state_dict(state)
    assert [warning.filename for warning in (*assigned, *loaded)] == [__file__, __file__]


def test_loading_plain_rows_into_lcw_says_that_they_are_projected():
    for basis in (False, True):
        layer = nn.LCWLinear(4, 3, basis=basis)
        with pytest.warns(UserWarning, match="the state dict's weight has rows that do not sum to zero"):
            layer.load_state_dict(torch.nn.Linear(4, 3).state_dict())


def test_our_state_dict_does_not_load_into_a_plain_layer():
    for layer, _ in every_layer():
        arguments = (6, 5) if is_linear(layer) else (4, 6, 3)
        options = {} if is_linear(layer) else {"groups": 2}
        plain = plain_kind(layer)(*arguments, **options)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            plain.load_state_dict(layer.state_dict())


def test_mistakes_in_a_state_dict_are_reported():
    for layer, _ in every_layer():
        names = sorted(layer.state_dict())
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict({})
        with pytest.raises(RuntimeError, match="weight"):
            layer.load_state_dict({"weight": torch.randn(3, 3), "bias": torch.zeros_like(layer.bias)})
        with pytest.raises(RuntimeError, match="weight"):
            layer.load_state_dict({"weight": torch.randn(3, 3)}, strict=False)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            layer.load_state_dict({**layer.state_dict(), "weight": layer.weight.detach()})
        with pytest.raises(RuntimeError, match="Unexpected key"):
            layer.load_state_dict({**layer.state_dict(), "scale": torch.ones(3)})
        assert sorted(layer.state_dict()) == names


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("how", ["hook", "parametrization"])
def test_checkpoints_of_torchs_weight_norm_load(how):
    for layer, x in every_layer():
        if not isinstance(layer, WEIGHT_NORM):
            continue
        arguments = (6, 5) if is_linear(layer) else (4, 6, 3)
        options = {} if is_linear(layer) else {"groups": 2}
        theirs = plain_kind(layer)(*arguments, **options)
        norm = torch.nn.utils.weight_norm if how == "hook" else torch.nn.utils.parametrizations.weight_norm
        theirs = norm(theirs)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter))
        layer.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(layer(x), theirs(x), rtol=0, atol=2 * 18 * 50 * EPS)
        if how == "hook":
            # The keys and shapes are torch's, so it works the other way round too.
            drift_(layer)
            theirs.load_state_dict(layer.state_dict())
            torch.testing.assert_close(theirs(x), layer(x), rtol=0, atol=2 * 18 * 50 * EPS)


def test_weight_norm_along_another_dimension_does_not_load():
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 5), dim=1)
    with pytest.raises(RuntimeError, match="size mismatch for weight_g"):
        nn.WeightNormLinear(6, 5).load_state_dict(theirs.state_dict())


def test_state_dicts_of_version_0_1_0_load():
    """Their trained tensors were called weight and scale; a basis had the shape (n, m - 1)."""
    old_names = {"weight_u": "weight", "weight_v": "weight", "weight_g": "scale"}
    for layer, x in every_layer():
        expected = layer(x)
        state = {old_names.get(name, name): value.clone() for name, value in layer.state_dict().items()}
        if "scale" in state:
            state["scale"] = state["scale"].flatten()
        drift_(layer)
        without_warnings_of_projection(layer.load_state_dict, state)
        assert torch.equal(layer(x), expected)


def test_layers_on_the_meta_device_are_set_and_loaded():
    for layer, _ in every_layer():
        empty = copy.deepcopy(layer).to("meta")
        empty.weight = torch.empty(layer.weight.shape, device="meta")
        empty.bias = torch.nn.Parameter(torch.empty(layer.bias.shape, device="meta"))
        empty.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(empty.weight, layer.weight)


# ---- Training wrappers ----------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def layers_for_wrappers():
    of_one_input = [(nn.GmPLinear(1, 4), torch.randn(3, 1)), (nn.GmPConv2d(1, 4, 1), torch.randn(2, 1, 3, 3))]
    return [*every_layer(), *of_one_input]


def train(module, x, steps=2):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("wrapper", ["FSDP2", "DDP"])
def test_sharded_and_replicated_layers_train_as_the_layer_alone(wrapper, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer, x in layers_for_wrappers():
        alone, module = copy.deepcopy(layer), torch.nn.Sequential(layer)
        if wrapper == "FSDP2":
            fully_shard(module, mesh=mesh)
        else:
            module = torch.nn.parallel.DistributedDataParallel(module)
        train(module, x)
        train(alone, x)
        assert torch.equal(module(x), alone(x))
        with torch.no_grad():
            assert torch.equal(module.eval()(x), alone.eval()(x))


def test_averaged_models_average_the_trained_tensors():
    for layer, x in layers_for_wrappers():
        average = torch.optim.swa_utils.AveragedModel(layer)
        before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
        average.update_parameters(layer)
        train(layer, x)
        average.update_parameters(layer)
        for name, parameter in average.module.named_parameters():
            expected = (before[name] + dict(layer.named_parameters())[name]) / 2
            torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=4 * EPS, atol=4 * EPS)


def test_trained_tensors_are_pruned_and_the_weight_is_not():
    from torch.nn.utils import prune

    for layer, x in every_layer():
        name = next(name for name, _ in layer.named_parameters())
        prune.l1_unstructured(layer, name, amount=0.5)
        assert (getattr(layer, name) == 0).sum() == round(0.5 * getattr(layer, name).numel())
        expected = apply_plain(layer, x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=2 * 18 * 50 * EPS)
        prune.remove(layer, name)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=2 * 18 * 50 * EPS)
        with pytest.raises(TypeError, match="weight_orig"):
            prune.l1_unstructured(layer, "weight", amount=0.5)


# ---- The small ones -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(("rank", "memory_format"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_outputs_are_channels_last_as_torchs_are(rank, memory_format, channels, kernel):
    for name in ("LCW", "WeightNorm"):
        layer = getattr(nn, f"{name}Conv{rank}d")(channels, 6, kernel).to(memory_format=memory_format)
        plain = getattr(torch.nn, f"Conv{rank}d")(channels, 6, kernel).to(memory_format=memory_format)
        x = torch.randn(2, channels, *(5,) * rank)
        for training in (True, False):
            for mode in (torch.enable_grad, torch.no_grad):
                with mode():
                    assert layer.train(training)(x).stride() == plain(x).stride()
                    assert layer.weight.stride() == plain.weight.stride()
        layer(x).sum().backward()
        if min(channels, kernel) > 1:
            assert all(p.grad.stride() == p.stride() for p in layer.parameters())


@pytest.mark.parametrize("optimizer", ["Adafactor", "Muon"])
def test_a_gmp_layer_of_one_input_has_no_empty_parameter(optimizer):
    if not hasattr(torch.optim, optimizer):
        pytest.skip(f"this torch has no torch.optim.{optimizer}")
    of_one_input = (nn.GmPLinear(1, 4), nn.GmPConv2d(1, 4, 1), nn.LCWLinear(1, 4, basis=True))
    for layer, name in zip(of_one_input, ("angles", "angles", "weight_v"), strict=True):
        assert all(parameter.numel() for parameter in layer.parameters())
        assert layer.state_dict()[name].shape == (4, 0)
        first = torch.nn.Linear(2, 1)
        model = torch.nn.Sequential(
            first, torch.nn.Unflatten(1, (1, 1, 1)) if is_conv(layer) else torch.nn.Identity(), layer
        )
        # Muon takes matrices alone.
        matrices = [p for p in model.parameters() if p.dim() == 2]
        steps = getattr(torch.optim, optimizer)(matrices if optimizer == "Muon" else model.parameters(), lr=0.1)
        model(torch.randn(3, 2)).square().sum().backward()
        before = first.weight.detach().clone()
        steps.step()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        if name == "angles":
            # Behind LCW's weight of 0, there is no gradient.
            assert not torch.equal(first.weight, before)


def test_scripting_is_refused_and_tracing_works():
    for layer, x in every_layer():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(TypeError, match=r"torch\.jit\.script: \w+ calls a function in Python; expected torch"):
                torch.jit.script(torch.nn.Sequential(layer))
            traced = torch.jit.trace(layer, x)
        torch.testing.assert_close(traced(x), layer(x), rtol=0, atol=2 * 18 * 50 * EPS)


def test_scales_in_torchs_shape():
    weight, scale = torch.randn(4, 3), torch.randn(4)
    x, bias = torch.randn(5, 3), torch.randn(4)
    assert torch.equal(F.normalize_scale(weight, scale[:, None]), F.normalize_scale(weight, scale))
    expected = F.weight_norm_linear(x, weight, scale, bias)
    assert torch.equal(F.weight_norm_linear(x, weight, scale[:, None], bias), expected)
    for wrong in (scale[None], torch.randn(4, 2), torch.randn(2, 2)):
        for call in (lambda s: F.normalize_scale(weight, s), lambda s: F.weight_norm_linear(x, weight, s, bias)):
            with pytest.raises(ValueError, match="scale has shape"):
                call(wrong)


@convs
def test_signatures_are_torchs(kind):
    make = CONVS[kind]
    layer_class = make.func
    plain = list(inspect.signature(getattr(torch.nn, layer_class.__name__[-6:])).parameters)
    assert list(inspect.signature(layer_class).parameters)[: len(plain)] == plain


def test_lcw_from_a_trained_layer_is_its_projection():
    for basis in (False, True):
        plain = torch.nn.Linear(6, 5)
        plain.weight.requires_grad_(False)
        layer = nn.LCWLinear.from_linear(plain.eval(), basis=basis)
        torch.testing.assert_close(layer.weight.double(), zero_sum(plain.weight.double()), rtol=0, atol=8 * EPS)
        assert torch.equal(layer.bias, plain.bias)
        assert not layer.training
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
        for rank in (1, 2, 3):
            conv = getattr(torch.nn, f"Conv{rank}d")(4, 6, 3, groups=2, bias=False, stride=2, padding_mode="circular")
            made = getattr(nn, f"LCWConv{rank}d").from_conv(conv, basis=basis)
            torch.testing.assert_close(made.weight.double(), zero_sum(conv.weight.double()), rtol=0, atol=8 * EPS)
            assert (made.bias, made.stride, made.groups) == (None, conv.stride, 2)
    with pytest.raises(TypeError, match=r"layer is a ReLU; expected a torch\.nn\.Linear"):
        nn.LCWLinear.from_linear(torch.nn.ReLU())


def test_layers_are_made_of_our_own_layers():
    for source, x in every_layer():
        prefixes = ("LCW", "WeightNorm", "GmP")
        suffix = "Linear" if is_linear(source) else f"Conv{rank_of(source)}d"
        for prefix in prefixes:
            target = getattr(nn, prefix + suffix)
            made = (target.from_linear if is_linear(source) else target.from_conv)(source)
            expected = apply_plain(source, x, expressible(made, source.weight.detach()).float(), source.bias)
            torch.testing.assert_close(made(x), expected, rtol=0, atol=4 * 18 * 50 * EPS)
    with pytest.raises(ValueError, match="with an activation"):
        nn.WeightNormLinear.from_linear(nn.GmPLinear(3, 4, activation="relu"))


def test_initialisers_are_given_the_trained_tensor():
    layer = nn.LCWConv2d(3, 4, 3)
    before = layer.weight.detach().clone()
    init.lcw_(layer.weight_u, "relu")
    assert not torch.equal(layer.weight, before)
