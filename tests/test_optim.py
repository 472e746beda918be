"""optim.SGD and optim.AdamW: torch's bits without activation; with activation, every option against a float64 oracle.

The oracle (support/optimizers.py) computes each element from the formulas of activated gradients and from torch's
documentation. In a lower dtype the oracle is eager torch, with whose error ours is compared.
"""

import copy
import functools
import inspect
import io
import itertools
import math
import pickle

import pytest
import torch
from support.numerics import assert_as_exact_as_eager, hostile_layouts
from support.optimizers import (
    KINDS,
    PAIRS,
    AdamWOracle,
    SGDOracle,
    activated,
    assert_refused,
    assert_same_bits,
    copies,
    make_gradients,
    make_params,
    set_gradients,
    train,
)
from torch import nn

import lcw_ops
from lcw_ops import optim
from lcw_ops.ops import gradient_activation as ops

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SGD_OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"weight_decay": 0.1},
    "maximize": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.05, "maximize": True},
}
ADAMW_OPTIONS = {
    "plain": {},
    "no decay": {"weight_decay": 0.0, "betas": (0.5, 0.7)},
    "amsgrad": {"amsgrad": True, "eps": 1e-3},
    "maximize": {"maximize": True, "amsgrad": True, "weight_decay": 0.2},
}


@pytest.fixture(params=["SGD", "AdamW"])
def pair(request):
    return PAIRS[request.param]


def assert_same_state(optimizer, other):
    states = [one.state_dict()["state"] for one in (optimizer, other)]
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert states[0][key].keys() == states[1][key].keys()
        for name, value in states[0][key].items():
            expected = states[1][key][name]
            assert value.dtype == expected.dtype, name
            assert value.stride() == expected.stride(), name
            assert torch.equal(value, expected), name


def assert_by_the_oracle(name, actual, eager, exact):
    """Judge lists of tensors together: on a single number eager torch may be exact by chance."""
    actual, eager, exact = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (actual, eager, exact))
    if actual.dtype == torch.float64:
        # Twenty steps of a dozen operations each, with one rounding of the result's scale per operation.
        tolerance = 240 * torch.finfo(torch.float64).eps * exact.abs().max().item()
        torch.testing.assert_close(actual, exact, rtol=0, atol=tolerance)
    else:
        assert_as_exact_as_eager(name, actual, eager, exact)


# ---- Without activation: torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
def test_sgd_without_activation_is_torchs_bit_for_bit(options, flags):
    params = make_params()
    others = copies(params)
    ours = optim.SGD(params, 0.1, **options, **flags, gradient_activation=None)
    torchs = torch.optim.SGD(others, 0.1, **options, **flags)
    train(ours, params, 5)
    train(torchs, others, 5)
    assert_same_bits(params, others)
    assert_same_state(ours, torchs)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("options", ADAMW_OPTIONS.values(), ids=ADAMW_OPTIONS)
def test_adamw_without_activation_is_torchs_bit_for_bit(options, flags):
    params = make_params()
    others = copies(params)
    ours = optim.AdamW(params, **options, **flags, gradient_activation=None)
    torchs = torch.optim.AdamW(others, **options, **flags)
    train(ours, params, 5)
    train(torchs, others, 5)
    assert_same_bits(params, others)
    assert_same_state(ours, torchs)


def test_without_activation_autograd_records_the_step_as_torch_lets_it(pair):
    results = []
    for kind, options in ((pair[0], {"gradient_activation": None}), (pair[1], {})):
        start = torch.tensor([1.0, -2.0], requires_grad=True)
        param = start.clone()
        param.grad = start * 3
        kind([param], lr=0.1, differentiable=True, **options).step()
        results.append(torch.autograd.grad(param.sum(), start)[0])
    assert torch.equal(*results)


def test_arguments_are_torchs_in_torchs_order(pair):
    ours, torchs = (list(inspect.signature(kind).parameters.values()) for kind in pair)
    assert ours[: len(torchs)] == torchs
    assert [parameter.name for parameter in ours[len(torchs) :]][:3] == ["gradient_activation", "alpha", "beta"]


def test_a_group_without_activation_beside_others_is_torchs_bit_for_bit(pair):
    params = make_params()
    others = copies(params)
    mixed = pair[0]([{"params": params[:3]}, {"params": params[3:], "gradient_activation": None}], lr=0.1)
    train(mixed, params, 4)
    plain = pair[1]([{"params": others[:3]}, {"params": others[3:]}], lr=0.1)
    train(plain, others, 4)
    assert_same_bits(params[3:], others[3:])
    alone = make_params()[:3]
    whole = make_params()
    only = pair[0](alone, lr=0.1)
    for step in range(4):
        set_gradients(alone, make_gradients(whole, step)[:3])
        only.step()
    assert_same_bits(params[:3], alone)
    assert not torch.equal(params[2], others[2])


# ---- With activation: the oracle -------------------------------------------------------------------------------------


@pytest.fixture(params=["automatic", "reference"])
def backend(request, monkeypatch):
    if request.param == "reference":
        with lcw_ops.use_backend("reference"):
            yield
    else:
        yield


def check_against_oracle(kind, oracle, dtype, options, steps=20):
    params = make_params(dtype)
    exact = [oracle(param) for param in params]
    eager = [oracle(param, dtype) for param in params]
    optimizer = kind(params, **options)
    for step in range(steps):
        gradients = make_gradients(params, step)
        # One parameter gets its first gradient later and then misses some.
        gradients[3] = gradients[3] if step % 5 in (2, 3) else None
        set_gradients(params, gradients)
        optimizer.step()
        for index, gradient in enumerate(gradients):
            exact[index].step(gradient, **options)
            eager[index].step(gradient, **options)
            assert gradient is None or torch.equal(params[index].grad, gradient), "a gradient was written"
    assert_by_the_oracle(
        "parameters", [param.detach() for param in params], [one.param for one in eager], [one.param for one in exact]
    )
    for name in exact[0].state:
        states = [optimizer.state[param][name] for param in params]
        assert {state.dtype for state in states} == {dtype}
        assert_by_the_oracle(name, states, [one.state[name] for one in eager], [one.state[name] for one in exact])
    for param, one in zip(params, exact, strict=True):
        assert optimizer.state[param].keys() - {"step"} == one.state.keys()
        assert optimizer.state[param].get("step", one.count) == one.count


@pytest.mark.parametrize("activate", ["gradient", "momentum"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
def test_sgd_over_20_steps(options, kind, activate, backend):
    options = {"lr": 0.1, "gradient_activation": kind, "activate": activate, **options}
    check_against_oracle(optim.SGD, SGDOracle, torch.float32, options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ADAMW_OPTIONS.values(), ids=ADAMW_OPTIONS)
def test_adamw_over_20_steps(options, kind, backend):
    options = {"lr": 0.01, "gradient_activation": kind, "alpha": 0.2, "beta": 10.0, **options}
    check_against_oracle(optim.AdamW, AdamWOracle, torch.float32, options)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_other_dtypes_over_20_steps(dtype, backend):
    for activate in ("gradient", "momentum"):
        check_against_oracle(optim.SGD, SGDOracle, dtype, {"lr": 0.1, "activate": activate, **SGD_OPTIONS["dampening"]})
    # eps is large, because squares of gradients below float16's range are lost in the state, ours and torch's.
    check_against_oracle(optim.AdamW, AdamWOracle, dtype, {"lr": 0.01, "eps": 1e-2, "amsgrad": True})


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        *itertools.product([optim.SGD, optim.AdamW], [{"foreach": True}, {"foreach": False}, {"fused": True}]),
        (optim.AdamW, {"capturable": True}),
    ],
)
def test_flags_of_torchs_kernels_change_no_bit(kind, flags):
    params, others = make_params(), make_params()
    flagged, plain = kind(params, lr=0.1, **flags), kind(others, lr=0.1)
    train(flagged, params, 3)
    train(plain, others, 3)
    assert_same_bits(params, others)


def test_a_thousand_parameters_are_one_call_of_the_op(pair, monkeypatch):
    name = "sgd_step_" if pair[0] is optim.SGD else "adamw_step_"
    calls, op = [], getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args, **kwargs: (calls.append(len(args[1])), op(*args, **kwargs)))
    params = make_params(shapes=[(3,)] * 1000)
    train(pair[0](params, lr=0.1), params, 2)
    assert calls == [1000, 1000]


# ---- Gradients in every form -----------------------------------------------------------------------------------------


def test_gradients_that_are_views_expanded_or_shared_are_read_and_never_written(pair):
    flat = torch.randn(6)
    expanded = torch.tensor([0.3]).expand(4)
    gradients = [flat[:4], flat[2:], expanded, flat[:4], *hostile_layouts(torch.randn(4, 3)).values()]
    params = [nn.Parameter(torch.randn(gradient.shape)) for gradient in gradients]
    # Above, the gradients are strided; here, the parameters are. The last parameter has gaps.
    params += [nn.Parameter(torch.randn(3, 4).mT), nn.Parameter(torch.randn(4, 6)[:, ::2])]
    gradients += [torch.randn(4, 3), torch.randn(4, 3)]
    others = [nn.Parameter(param.detach().contiguous().clone()) for param in params]
    ours, plain = pair[0](params, lr=0.1), pair[0](others, lr=0.1)
    for _ in range(3):
        before = [gradient.clone() for gradient in gradients]
        for param, other, gradient in zip(params, others, gradients, strict=True):
            param.grad, other.grad = gradient, gradient.contiguous().clone()
        ours.step()
        plain.step()
        assert_same_bits(gradients, before)
    assert_same_bits(params, others)


def test_a_step_without_gradients_changes_nothing(pair):
    params = make_params()
    before = copies(params)
    optimizer = pair[0](params, lr=0.1)
    assert optimizer.step() is None
    assert_same_bits(params, before)
    assert not optimizer.state_dict()["state"]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_given_twice_is_stepped_once(pair):
    param, other = make_params(shapes=[(9,)]) + make_params(shapes=[(9,)])
    train(pair[0]([param, param], lr=0.1), [param], 3)
    train(pair[0]([other], lr=0.1), [other], 3)
    assert torch.equal(param, other)


def test_non_finite_gradients(pair):
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.tensor([math.nan, math.inf, 1.0])
    pair[0]([param], lr=0.1).step()
    assert param[0].isnan()
    assert param[1:].isfinite().all()


# ---- Refusals: nothing has changed -----------------------------------------------------------------------------------


def test_sparse_gradients_are_refused_before_any_group_changes(pair):
    params = make_params(shapes=[(3, 2), (4, 2)])
    optimizer = pair[0]([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    params[0].grad = torch.ones(3, 2)
    params[1].grad = torch.sparse_coo_tensor([[1]], [[1.0, 2.0]], (4, 2), check_invariants=True)
    assert_refused(optimizer, params, TypeError, r"param_groups\[1\].*sparse.*dense.*sparse=False")


@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=str)
def test_sparse_gradients_of_plain_groups_are_refused_where_torch_would_after_other_groups(pair, flags):
    params = make_params(shapes=[(3, 2), (4, 2), (5, 2)])
    off = {"gradient_activation": None}
    groups = [{"params": params[:1]}, {"params": params[1:2], **off}, {"params": params[2:], **off}]
    optimizer = pair[0](groups, lr=0.1, **flags)
    set_gradients(params[:2], make_gradients(params[:2], 0))
    params[2].grad = torch.sparse_coo_tensor([[1]], [[1.0, 2.0]], (5, 2), check_invariants=True)
    if pair[0] is optim.SGD and not flags:
        before = copies(params)
        optimizer.step()
        assert all(not torch.equal(param, old) for param, old in zip(params, before, strict=True))
        return
    assert_refused(optimizer, params, RuntimeError, "without activation is sparse.*sparse=False")
    assert not optimizer.state


def test_parameters_whose_elements_share_memory_are_refused(pair):
    params = [*make_params(shapes=[(3,)]), nn.Parameter(torch.ones(1).expand(4)), *make_params(shapes=[(2,)])]
    optimizer = pair[0]([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    set_gradients(params, [torch.ones(param.shape) for param in params])
    assert_refused(optimizer, params, ValueError, r"param_groups\[1\] of shape \(4,\).*share memory.*clone")
    params[1].grad = None
    optimizer.step()


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_two_parameters_in_the_same_memory_are_stepped_in_sequence(pair):
    oracle = SGDOracle if pair[0] is optim.SGD else AdamWOracle
    size = 300_000
    for repeat in range(5):
        generator = torch.Generator().manual_seed(repeat)
        start, *gradients = (torch.randn(size, generator=generator) for _ in range(3))
        first = nn.Parameter(start.clone())
        second = nn.Parameter(first.data.view(2, -1))
        optimizer = pair[0]([first, second], lr=0.5)
        first.grad, second.grad = gradients[0], gradients[1].view(2, -1)
        optimizer.step()
        one = oracle(start)
        one.step(gradients[0], lr=0.5)
        other = oracle(one.param)
        other.step(gradients[1], lr=0.5)
        torch.testing.assert_close(first.detach().double(), other.param, rtol=1e-6, atol=1e-6)


def test_complex_parameters_are_refused(pair):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = pair[0](params, lr=0.1)
    assert_refused(optimizer, params, TypeError, r"complex64; expected float32.*gradient_activation=None")
    optimizer.param_groups[0]["gradient_activation"] = None
    optimizer.step()


def test_an_unavailable_backend_changes_nothing(pair):
    params = make_params(shapes=[(3,)])
    params[0].grad = torch.ones(3)
    optimizer = pair[0](params, lr=0.1)
    with lcw_ops.use_backend("cuda"):
        assert_refused(optimizer, params, lcw_ops.BackendError, "cuda")
    optimizer.step()
    assert optimizer.state[params[0]].get("step", 1) == 1


def test_a_failing_op_leaves_no_momentum(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no memory")

    param = make_params(shapes=[(3,)])[0]
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9)
    monkeypatch.setattr(ops, "sgd_step_", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        train(optimizer, [param], 1)
    assert not optimizer.state[param]


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_a_failing_op_does_not_count_as_a_step(monkeypatch, default):
    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(torch, "get_default_dtype", lambda: default)
    params = make_params(shapes=[(3,), (4,)])
    optimizer = optim.AdamW(params, lr=0.1)
    train(optimizer, params, 2)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "adamw_step_", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            train(optimizer, params, 1)
    assert [optimizer.state[param]["step"] for param in params] == [2, 2]
    assert optimizer.state[params[0]]["step"].dtype is default
    train(optimizer, params, 1)
    assert [optimizer.state[param]["step"] for param in params] == [3, 3]


def test_adamw_state_of_another_dtype_is_refused_and_can_be_converted():
    param = nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([param], lr=0.1)
    train(optimizer, [param], 1)
    param.data = param.data.double()
    param.grad = torch.ones(3, dtype=torch.float64)
    assert_refused(optimizer, [param], TypeError, "exp_avg of a parameter.*differ in dtype.*load_state_dict")
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


def test_options_are_validated_again_only_when_they_have_changed(pair, monkeypatch):
    params = make_params(shapes=[(3,)] * 3)
    checked = []
    check = pair[0]._check_options
    monkeypatch.setattr(pair[0], "_check_options", lambda self, group: (checked.append(1), check(self, group)))
    optimizer = pair[0]([{"params": [param]} for param in params[:2]], lr=0.1)
    assert len(checked) == 2
    optimizer.add_param_group({"params": params[2:]})
    train(optimizer, params, 2)
    assert len(checked) == 3
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(checked) == 6
    train(optimizer, params, 2)
    assert len(checked) == 6
    copy.deepcopy(optimizer).step()
    assert len(checked) == 9
    del checked[3:]
    optimizer.param_groups[1]["alpha"] = 0.2
    train(optimizer, params, 2)
    assert len(checked) == 4
    # 1.0 is a valid alpha. True equals 1.0, but is not accepted as a number.
    optimizer.param_groups[1]["alpha"] = 1.0
    train(optimizer, params, 1)
    set_gradients(params, make_gradients(params, 0))
    optimizer.param_groups[1]["alpha"] = True
    assert_refused(optimizer, params, TypeError, "alpha is a bool")
    # An invalid alpha is refused at every attempt, and a valid one is accepted again. A copy checks its options too.
    assert_refused(optimizer, params, TypeError, "alpha is a bool")
    optimizer.param_groups[1]["alpha"] = 0.3
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.param_groups[2]["beta"] = -1.0
    for group in twin.param_groups:
        set_gradients(group["params"], [torch.ones(3)])
    assert_refused(twin, params, ValueError, "beta is -1.0")


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in (optim.SGD, optim.AdamW) for name in ("gradient_activation", "alpha", "differentiable")]
    + [(optim.SGD, "activate"), (optim.AdamW, "amsgrad")],
)
def test_an_option_that_was_deleted_from_a_group_is_named(kind, name):
    params = make_params(shapes=[(3,)] * 2)
    optimizer = kind([{"params": [param]} for param in params], lr=0.1)
    saved = optimizer.state_dict()
    del optimizer.param_groups[1][name]
    set_gradients(params, make_gradients(params, 0))
    match = rf"optim\.{kind.__name__}: param_groups\[1\] has no '{name}'; .*default is {optimizer.defaults[name]!r}"
    assert_refused(optimizer, params, ValueError, match)
    optimizer.load_state_dict(saved)
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gradient_activation": "sigmoid"}, ValueError, "gradient_activation is 'sigmoid'.*'arctan'.*None"),
        ({"alpha": 0.0}, ValueError, "alpha is 0.0"),
        ({"alpha": -1.0}, ValueError, "alpha is -1.0"),
        ({"beta": math.inf}, ValueError, "beta is inf"),
        ({"beta": 1e39}, ValueError, "beta is 1e[+]39"),
        ({"beta": "20"}, TypeError, "beta is a str"),
        ({"differentiable": True}, ValueError, "differentiable.*gradient_activation=None.*reference"),
    ],
    ids=str,
)
def test_options_are_checked_wherever_they_come_from(pair, options, error, match):
    params = make_params(shapes=[(3,), (4,)])
    match = rf"optim\.{pair[0].__name__}: .*{match}"
    with pytest.raises(error, match=match):
        pair[0](params, lr=0.1, **options)
    with pytest.raises(error, match=match):
        pair[0]([{"params": params, **options}], lr=0.1)
    optimizer = pair[0](params[:1], lr=0.1)
    with pytest.raises(error, match=match):
        optimizer.add_param_group({"params": params[1:], **options})
    assert len(optimizer.param_groups) == 1
    before, checkpoint = optimizer.state_dict(), optimizer.state_dict()
    checkpoint["param_groups"][0].update(options)
    with pytest.raises(error, match=match):
        optimizer.load_state_dict(checkpoint)
    assert optimizer.state_dict() == before
    optimizer.param_groups[0].update(options)
    set_gradients(params[:1], [torch.ones(3)])
    assert_refused(optimizer, params[:1], error, match)


def test_sgd_checks_the_place_of_the_activation():
    with pytest.raises(ValueError, match=r"optim\.SGD: activate is 'both'; expected one of 'gradient', 'momentum'"):
        optim.SGD(make_params(), activate="both")


def test_torchs_own_checks_hold(pair):
    with pytest.raises(ValueError, match="learning rate"):
        pair[0](make_params(), lr=-1.0)
    with pytest.raises(ValueError, match="empty parameter list"):
        pair[0]([])
    optimizer = pair[0](make_params(), lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": optimizer.param_groups[0]["params"]})


def test_adamw_without_decoupled_decay_is_refused():
    with pytest.raises(ValueError, match=r"decoupled_weight_decay is False.*activate_gradients"):
        optim.AdamW([{"params": make_params(), "decoupled_weight_decay": False}])


# ---- State -----------------------------------------------------------------------------------------------------------


def stateful(kind, params, **options):
    return kind(params, lr=0.05, **({"momentum": 0.9} if kind in PAIRS["SGD"] else {"amsgrad": True}), **options)


def test_a_run_resumed_from_a_state_dict_gives_the_same_bits(pair):
    params, others = make_params(), make_params()
    train(stateful(pair[0], params), params, 10)
    first = stateful(pair[0], others)
    train(first, others, 5)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = stateful(pair[0], others)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, others, 5, start=5)
    assert_same_bits(params, others)


def test_a_run_may_pass_through_torchs_optimizer_in_the_middle(pair):
    params, others = make_params(), make_params()
    ours = stateful(pair[0], params)
    train(ours, params, 5)
    between = stateful(pair[1], others)
    between.load_state_dict(ours.state_dict())
    assert_same_state(between, ours)
    back = stateful(pair[0], params)
    back.load_state_dict(between.state_dict())
    train(back, params, 5, start=5)
    straight = make_params()
    train(stateful(pair[0], straight), straight, 10)
    assert_same_bits(params, straight)


@pytest.mark.parametrize("first", ["ours", "torchs"])
def test_our_optimizer_and_torchs_on_activated_gradients_continue_each_other(first, pair):
    """The test runs in float64, because the two round differently, by a few units in the last place per step."""
    straight, changed = make_params(torch.float64), make_params(torch.float64)

    def train_torchs(optimizer, params, steps, start=0):
        for step in range(start, start + steps):
            gradients = [activated(g, "arctan", 0.1, 20.0) for g in make_gradients(params, step)]
            set_gradients(params, gradients)
            optimizer.step()

    train_torchs(stateful(pair[1], straight), straight, 10)
    ours, torchs = stateful(pair[0], changed, alpha=0.1, beta=20.0), stateful(pair[1], changed)
    if first == "ours":
        train(ours, changed, 5)
        torchs.load_state_dict(ours.state_dict())
        train_torchs(torchs, changed, 5, start=5)
    else:
        train_torchs(torchs, changed, 5)
        ours.load_state_dict(torchs.state_dict())
        train(ours, changed, 5, start=5)
    for param, expected in zip(changed, straight, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-13, atol=1e-13)


def test_a_checkpoint_without_activation_keeps_that_of_each_group(pair):
    params = make_params()
    groups = [{"params": params[:2], "gradient_activation": "tanh", "alpha": 0.5}, {"params": params[2:]}]
    optimizer = pair[0](groups, lr=0.1, gradient_activation=None)
    others = copies(params)
    torchs = pair[1]([{"params": others[:2]}, {"params": others[2:]}], lr=0.3)
    optimizer.load_state_dict(torchs.state_dict())
    first, second = optimizer.param_groups
    assert (first["gradient_activation"], first["alpha"], first["lr"]) == ("tanh", 0.5, 0.3)
    assert (second["gradient_activation"], second["alpha"], second["lr"]) == (None, 0.1, 0.3)


def test_a_checkpoint_of_an_older_torch_has_fewer_options(pair):
    params = make_params()
    others = copies(params)
    ours, straight = stateful(pair[0], params), stateful(pair[0], others)
    train(ours, params, 2)
    saved = ours.state_dict()
    for group in saved["param_groups"]:
        for name in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            group.pop(name, None)
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["differentiable"] is False
    train(ours, params, 2, start=2)
    train(straight, others, 4)
    assert_same_bits(params, others)


def test_a_checkpoint_with_activation_sets_it(pair):
    params = make_params()
    saved = pair[0](params, lr=0.1, gradient_activation="log", beta=3.0).state_dict()
    optimizer = pair[0](params, lr=0.1)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["gradient_activation"] == "log"
    assert optimizer.param_groups[0]["beta"] == 3.0


def through_pickle(objects):
    return pickle.loads(pickle.dumps(objects))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_are_independent(copied, pair):
    params = make_params()
    optimizer = stateful(pair[0], params, gradient_activation="tanh")
    train(optimizer, params, 3)
    others, twin = copied((params, optimizer))
    before = copies(params)
    train(twin, others, 3, start=3)
    assert_same_bits(params, before)
    train(optimizer, params, 3, start=3)
    assert_same_bits(params, others)
    assert_same_state(optimizer, twin)


def test_state_has_torchs_form_before_and_after(pair):
    for flags in ({}, {"fused": True}):
        params = make_params()
        params[2].data = params[2].data.mT
        others = copies(params)
        ours, torchs = stateful(pair[0], params, **flags), stateful(pair[1], others, **flags)
        train(ours, params, 2)
        train(torchs, others, 2)
        for param, other in zip(params, others, strict=True):
            assert ours.state[param].keys() == torchs.state[other].keys()
            for name, value in ours.state[param].items():
                expected = torchs.state[other][name]
                form = value.dtype, value.shape, value.device, value.stride()
                assert form == (expected.dtype, expected.shape, expected.device, expected.stride()), name


def test_step_counts_under_a_float64_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        params, others = make_params(torch.float64), make_params(torch.float64)
        optimizer = optim.AdamW(params)
        train(optimizer, params, 3)
        assert optimizer.state[params[0]]["step"].dtype == torch.float64
        assert optimizer.state[params[0]]["step"] == 3
    finally:
        torch.set_default_dtype(torch.float32)
    train(optim.AdamW(others), others, 3)
    assert_same_bits(params, others)


# ---- torch's machinery -----------------------------------------------------------------------------------------------


def test_groups_have_their_own_options():
    params = make_params(torch.float64)
    options = [
        {"lr": 0.1, "gradient_activation": "tanh", "alpha": 0.3},
        {"lr": 0.2, "momentum": 0.9, "activate": "momentum", "beta": 5.0},
        {"lr": 0.3, "gradient_activation": "log", "momentum": 0.5, "nesterov": True},
    ]
    chosen = [params[:2], params[2:4], params[4:]]
    optimizer = optim.SGD([{"params": some, **option} for some, option in zip(chosen, options, strict=True)])
    oracles = [SGDOracle(param) for param in params]
    for step in range(5):
        gradients = make_gradients(params, step)
        set_gradients(params, gradients)
        optimizer.step()
        for index, (oracle, gradient) in enumerate(zip(oracles, gradients, strict=True)):
            oracle.step(gradient, **options[min(index // 2, 2)])
    exact = [oracle.param for oracle in oracles]
    assert_by_the_oracle("parameters", [param.detach() for param in params], exact, exact)


def test_a_tensor_lr_counts_as_its_value(pair):
    for lr in (torch.tensor(0.1), torch.tensor([0.1])):
        params, others = make_params(), make_params()
        train(pair[0](params, lr=lr), params, 3)
        train(pair[0](others, lr=float(torch.tensor(0.1))), others, 3)
        assert_same_bits(params, others)


def test_learning_rate_schedulers(pair):
    params, others = make_params(), make_params()
    optimizer, by_hand = pair[0](params, lr=0.1), pair[0](others, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    for step in range(6):
        train(optimizer, params, 1, start=step)
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 0.1 * 0.5 ** (step // 2)
        train(by_hand, others, 1, start=step)
    assert_same_bits(params, others)


@pytest.mark.parametrize("activation", ["arctan", None])
def test_a_closure_is_called_once_with_gradients_on(activation, pair):
    param = nn.Parameter(torch.ones(3))
    optimizer = pair[0]([param], lr=0.1, gradient_activation=activation)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    with torch.no_grad():
        assert optimizer.step(closure=closure) < 3.0
    assert calls == [True, True]


@pytest.mark.parametrize("activations", [("arctan",), (None,), ("arctan", None)], ids=str)
def test_step_hooks_run_once(activations, pair):
    # When the first optimizer of a class is made, torch wraps the step of that class in hooks. Our step calls torch's.
    params = make_params(shapes=[(3,)] * len(activations))
    pair[1](params, lr=0.1)
    groups = [{"params": [p], "gradient_activation": a} for p, a in zip(params, activations, strict=True)]
    optimizer = pair[0](groups, lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, params, 1)
    assert calls == ["before", "after"]


def test_the_profiler_sees_the_step(pair):
    params = make_params(shapes=[(3,)])
    optimizer = pair[0](params, lr=0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, params, 1)
    names = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#{pair[0].__name__}.step" in names


def test_amp_scaling_is_claimed_by_torchs_fused_step_only(pair):
    params = make_params(shapes=[(3,), (4,)])
    assert pair[0](params, lr=0.1, fused=True, gradient_activation=None)._step_supports_amp_scaling
    assert not pair[0](params, lr=0.1, gradient_activation=None)._step_supports_amp_scaling
    fused = pair[0](params[:1], lr=0.1, fused=True, gradient_activation=None)
    fused.add_param_group({"params": params[1:], "gradient_activation": "arctan"})
    assert not fused._step_supports_amp_scaling
    assert not pair[0](params, lr=0.1, fused=True)._step_supports_amp_scaling


def test_a_subclass_gives_the_same_bits(pair):
    class Own(pair[0]):
        pass

    params, others = make_params(), make_params()
    train(Own(params, lr=0.1), params, 2)
    train(pair[0](others, lr=0.1), others, 2)
    assert_same_bits(params, others)


def filling(kind, change):
    """A subclass whose ``_init_group`` leaves out the parameters marked ``frozen`` and changes the other gradients."""

    class Own(kind):
        calls = 0

        def _init_group(self, group, params, grads, *states):
            self.calls += 1
            result = super()._init_group(group, params, grads, *states)
            kept = [not getattr(param, "frozen", False) for param in params]
            for tensors in filter(None, (params, grads, *states)):
                tensors[:] = itertools.compress(tensors, kept)
            grads[:] = map(change, grads)
            return result

    return Own


def double(gradient):
    return 2 * gradient


# With the first options of each class, ``_init_group`` leaves a list of states empty; with the others it fills all.
INIT_GROUP_OPTIONS = {
    "SGD": ({}, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}, {"momentum": 0.9, "fused": True}),
    "AdamW": ({}, {"amsgrad": True, "weight_decay": 0.1}, {"amsgrad": True, "fused": True}),
}
INIT_GROUP_CASES = [(name, options) for name, all_options in INIT_GROUP_OPTIONS.items() for options in all_options]
init_group_cases = pytest.mark.parametrize(("name", "options"), INIT_GROUP_CASES, ids=str)


def freeze(params):
    for param in params[1::2]:
        param.frozen = True
    return params


@init_group_cases
def test_an_init_group_of_a_subclass_holds_without_activation(name, options):
    kind, torchs = PAIRS[name]
    params, others = freeze(make_params()), freeze(make_params())
    ours = filling(kind, double)(params, lr=0.1, gradient_activation=None, **options)
    theirs = filling(torchs, double)(others, lr=0.1, **options)
    train(ours, params, 4)
    train(theirs, others, 4)
    assert ours.calls == theirs.calls == 4
    assert_same_bits(params, others)
    assert_same_state(ours, theirs)


@init_group_cases
@pytest.mark.parametrize("kind", KINDS)
def test_an_init_group_of_a_subclass_decides_what_is_activated_and_stepped(kind, name, options):
    params, others = freeze(make_params(torch.float64)), freeze(make_params(torch.float64))
    ours = filling(PAIRS[name][0], double)(params, lr=0.1, gradient_activation=kind, **options)
    function = kind, ours.defaults["alpha"], ours.defaults["beta"]
    theirs = filling(PAIRS[name][1], lambda gradient: activated(double(gradient), *function))(others, 0.1, **options)
    starts = copies(params)
    train(ours, params, 4)
    train(theirs, others, 4)
    assert ours.calls == theirs.calls == 4
    torch.testing.assert_close(params, others, rtol=1e-12, atol=1e-13)
    assert_same_bits(params[1::2], starts[1::2])
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(dict(ours.state[param]), dict(theirs.state[other]), rtol=1e-12, atol=1e-13)
    # The bits are those of an optimizer without the frozen parameters.
    rest = make_params(torch.float64)[::2]
    plain = PAIRS[name][0](rest, lr=0.1, gradient_activation=kind, **options)
    for step in range(4):
        set_gradients(rest, map(double, make_gradients(params, step)[::2]))
        plain.step()
    assert_same_bits(params[::2], rest)


@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("name", PAIRS)
def test_an_init_group_may_bring_states_and_options(name, activation):
    """Here ``_init_group`` passes states that the subclass keeps itself, and writes lr into the group."""

    def bringing(kind, change):
        class Own(kind):
            def _init_group(self, group, params, grads, *states):
                group["lr"] = 0.03
                kept = vars(self).setdefault("kept", {})
                for param in group["params"]:
                    if param.grad is None:
                        continue
                    params.append(param)
                    grads.append(change(param.grad))
                    names = ("buffer",) if name == "SGD" else ("average", "square", "largest", "count")
                    for tensors, own in zip(states, names, strict=True):
                        start = torch.tensor(2.0) if own == "count" else torch.full_like(param, 0.25)
                        tensors.append(kept.setdefault((param, own), start))
                return False

        return Own

    options = {"momentum": 0.9} if name == "SGD" else {"amsgrad": True}
    params, others = make_params(torch.float64), make_params(torch.float64)
    ours = bringing(PAIRS[name][0], double)(params, lr=0.1, gradient_activation=activation, **options)
    function = activation, ours.defaults["alpha"], ours.defaults["beta"]
    change = double if activation is None else lambda gradient: activated(double(gradient), *function)
    theirs = bringing(PAIRS[name][1], change)(others, lr=0.1, **options)
    train(ours, params, 3)
    train(theirs, others, 3)
    torch.testing.assert_close(params, others, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close([*ours.kept.values()], [*theirs.kept.values()], rtol=1e-12, atol=1e-13)
    if activation is None:
        assert_same_bits(params, others)


def test_an_init_group_may_leave_nothing_to_step(pair):
    class Own(pair[0]):
        calls = 0

        def _init_group(self, group, params, grads, *states):
            self.calls += 1
            return False

    params, starts = make_params(), make_params()
    optimizer = Own(params, lr=0.1)
    train(optimizer, params, 2)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.calls == 3
    assert_same_bits(params, starts)
    assert not optimizer.state


@pytest.mark.parametrize("compiled", [False, True], ids=["", "after torch.compile"])
@pytest.mark.parametrize("place", ["instance", "class", "torch's class"])
def test_a_patched_init_group_is_called_at_every_step(place, compiled, pair, monkeypatch):
    if compiled:
        # torch.compile puts a wrapper around torch's own ``_init_group``.
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    params, others = make_params(), make_params()
    patched, calls = pair[0](params, lr=0.1), []
    own = pair[1]._init_group

    @functools.wraps(own)
    def counting(*args):
        calls.append(1)
        return own(*args)

    if place == "instance":
        monkeypatch.setattr(patched, "_init_group", lambda *args: counting(patched, *args), raising=False)
    else:
        monkeypatch.setattr(pair[place == "torch's class"], "_init_group", counting, raising=False)
    train(patched, params, 3)
    monkeypatch.undo()
    assert len(calls) == 3
    train(pair[0](others, lr=0.1), others, 3)
    assert_same_bits(params, others)


def test_a_subclass_decides_which_groups_are_activated(pair):
    class Own(pair[0]):
        switched_on = False

        def is_activated(self, index):
            return self.switched_on and super().is_activated(index)

    params, others = make_params(), make_params()
    optimizer, torchs = Own(params, lr=0.1, fused=True), pair[1](others, lr=0.1, fused=True)
    assert optimizer._step_supports_amp_scaling
    train(optimizer, params, 2)
    train(torchs, others, 2)
    assert_same_bits(params, others)
    optimizer.switched_on = True
    assert not optimizer._step_supports_amp_scaling
    ours = pair[0](others, lr=0.1, fused=True)
    ours.load_state_dict(torchs.state_dict())
    train(optimizer, params, 2, start=2)
    train(ours, others, 2, start=2)
    assert_same_bits(params, others)


def test_a_step_within_a_step_is_one_step(pair):
    class Own(pair[0]):
        def step(self, closure=None):
            return super().step(closure)

    params, others = make_params(), make_params()
    # torch wraps the step of each class in hooks, so here one wrapped step calls another.
    plain, optimizer = pair[0](others, lr=0.1), Own(params, lr=0.1)
    for step in range(3):
        gradients = make_gradients(params, step)
        set_gradients(params, gradients)
        set_gradients(others, gradients)
        assert optimizer.step(lambda: 1.0) == 1.0
        plain.step()
    assert_same_bits(params, others)


def test_a_checkpoint_of_adam_is_refused():
    params = make_params(shapes=[(3,)])
    checkpoint = torch.optim.Adam(params).state_dict()
    optimizer = optim.AdamW(params)
    with pytest.raises(ValueError, match=r"decoupled_weight_decay is False.*torch\.optim\.Adam"):
        optimizer.load_state_dict(checkpoint)
    train(optimizer, params, 1)


def test_a_compiled_step_gives_the_same_bits(pair):
    params, others = make_params(shapes=[(3, 4)]), make_params(shapes=[(3, 4)])
    optimizer, plain = pair[0](params, lr=0.1), pair[0](others, lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for index in range(3):
        set_gradients(params, make_gradients(params, index))
        step()
    train(plain, others, 3)
    assert_same_bits(params, others)
