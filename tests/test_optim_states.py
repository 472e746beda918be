"""optim.SGD and optim.AdamW with tensors of mixed dtypes, step counts of any dtype, negated views and invalid states.

The oracle computes each element in float64 from the given numbers. The optimizer must write the oracle's result,
rounded once.
"""

import copy
import itertools
import math
import pickle

import pytest
import torch
from support.optimizers import (
    KINDS,
    PAIRS,
    AdamWOracle,
    SGDOracle,
    activated,
    assert_refused,
    assert_same_bits,
    copies,
    make_params,
    train,
)
from torch import nn

import lcw_ops
from lcw_ops import optim
from lcw_ops.ops import gradient_activation as ops

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MIXED = [(param, grad) for param, grad in itertools.product(DTYPES, repeat=2) if param is not grad]
needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has gradients of one dtype only"
)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["SGD", "AdamW"])
def pair(request):
    return PAIRS[request.param]


@pytest.fixture(params=["cpp", "reference"], autouse=True)
def backend(request):
    with lcw_ops.use_backend(request.param):
        yield request.param


def mixed_parameter(dtype, grad_dtype, size=33):
    param = nn.Parameter(torch.randn(size).to(dtype))
    param.grad_dtype = grad_dtype
    return param


def as_exact(state):
    return {name: tensor.to(torch.float64, copy=True) for name, tensor in state.items() if name != "step"}


def assert_rounded_once(name, result, exact, terms):
    """Allow half an ulp of the result's dtype, plus 8 roundings in the dtype of the computation.

    ``terms`` is the size of the numbers that the step adds.
    """
    nearest = exact.abs().to(result.dtype)
    ulp = torch.nextafter(nearest, torch.full_like(nearest, torch.inf)).double() - nearest.double()
    computed = torch.finfo(torch.float64 if result.dtype is torch.float64 else torch.float32).eps
    allowed = 0.5 * ulp + 8 * computed * terms
    error = (result.detach().double() - exact).abs()
    assert (error <= allowed).all(), f"{name}: {(error - allowed).max().item():.3g} more than a rounding"


SGD_FORMS = (
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.8, "dampening": 0.3, "maximize": True},
)


@needs_grad_dtype
@pytest.mark.parametrize("activate", ["gradient", "momentum"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "grad_dtype"), MIXED, ids=str)
def test_sgd_activates_gradients_in_their_own_dtype(dtype, grad_dtype, kind, activate):
    for form in SGD_FORMS:
        options = {"lr": 0.1, "gradient_activation": kind, "activate": activate, "alpha": 0.5, "beta": 3.0, **form}
        param, twin = (mixed_parameter(dtype, grad_dtype) for _ in range(2))
        optimizer, torchs = optim.SGD([param], **options), torch.optim.SGD([twin], lr=0.1, **form)
        for _ in range(3):
            exact = SGDOracle(param)
            exact.state = as_exact(optimizer.state[param])
            before = [exact.param, *exact.state.values()]
            gradient = (torch.randn(33, dtype=torch.float64) * 10.0 ** torch.empty(33).uniform_(-3, 1)).to(grad_dtype)
            param.grad, twin.grad = gradient.clone(), gradient.clone()
            optimizer.step()
            torchs.step()
            exact.step(gradient, **options)
            assert torch.equal(param.grad, gradient)
            terms = sum(map(torch.abs, before)) + 2 * gradient.double().abs() + 2 * exact.param.abs()
            # Where the activation is steep, it multiplies the errors of its argument.
            assert_rounded_once("parameter", param, exact.param, 2 * terms)
            for name, value in exact.state.items():
                buffer = optimizer.state[param][name]
                assert buffer.dtype is torchs.state[twin][name].dtype
                assert_rounded_once(name, buffer, value, 2 * terms)


@needs_grad_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "grad_dtype"), MIXED, ids=str)
def test_adamw_activates_gradients_in_their_own_dtype(dtype, grad_dtype, kind):
    for form in ({}, {"amsgrad": True, "weight_decay": 0.1}, {"maximize": True}):
        options = {"lr": 0.1, "eps": 1e-2, "gradient_activation": kind, "alpha": 0.5, "beta": 3.0, **form}
        param = mixed_parameter(dtype, grad_dtype)
        optimizer = optim.AdamW([param], **options)
        for count in range(3):
            exact = AdamWOracle(param)
            exact.count = count
            exact.state = as_exact(optimizer.state[param])
            before, old = exact.param.abs(), dict(exact.state)
            gradient = (torch.randn(33, dtype=torch.float64) * 10.0 ** torch.empty(33).uniform_(-3, 1)).to(grad_dtype)
            param.grad = gradient.clone()
            optimizer.step()
            exact.step(gradient, **options)
            # The step is at most about lr / sqrt(1 - beta_2) = 3.2, which 4 covers.
            assert_rounded_once("parameter", param, exact.param, before + 4)
            added = 0.1 * activated(gradient.double(), kind, 0.5, 3.0).abs()
            for name, value in exact.state.items():
                assert optimizer.state[param][name].dtype is dtype
                assert_rounded_once(name, optimizer.state[param][name], value, old.get(name, value).abs() + added)


@needs_grad_dtype
def test_a_tiny_gradient_moves_a_parameter_of_16_bits(backend):
    """If the gradient were rounded to float16 first, it would be 0."""
    param = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    param.grad_dtype = torch.float32
    optimizer = optim.SGD([param], lr=0.1, alpha=1.0, beta=1e6)
    param.grad = torch.tensor([1e-9])
    optimizer.step()
    exact = torch.tensor([-0.1 * math.atan(1e-3)], dtype=torch.float64)
    assert torch.equal(param.detach(), exact.to(torch.float16))


@needs_grad_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [{"activate": "momentum"}, {"activate": "momentum", "nesterov": True}, {}], ids=str)
def test_gradients_beyond_float16_do_not_end_in_nan(form, kind):
    param = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    param.grad_dtype = torch.float32
    optimizer = optim.SGD([param], lr=0.01, momentum=0.9, gradient_activation=kind, **form)
    for value in (1e5, -1e5, 1e36):
        exact = SGDOracle(param)
        exact.state = as_exact(optimizer.state[param])
        param.grad = torch.tensor([value, -value])
        optimizer.step()
        exact.step(param.grad, lr=0.01, momentum=0.9, gradient_activation=kind, **form)
        assert optimizer.state[param]["momentum_buffer"].dtype is torch.float32
        torch.testing.assert_close(param.detach().double(), exact.param, rtol=2**-11, atol=2**-24)
        assert param.isfinite().all()


@needs_grad_dtype
def test_only_parameters_of_two_dtypes_are_copied(pair, monkeypatch):
    """Parameters of one dtype are stepped in place, with the same bits as in an optimizer of their own."""
    options = {"momentum": 0.9} if pair[0] is optim.SGD else {"amsgrad": True}
    alone, together = make_params(torch.bfloat16), make_params(torch.bfloat16)
    mixed = [mixed_parameter(torch.bfloat16, torch.float32) for _ in range(70)]
    plain, both = pair[0](alone, lr=0.1, **options), pair[0](together + mixed, lr=0.1, **options)
    for step in range(2):
        for param in mixed:
            param.grad = torch.randn(33)
        train(plain, alone, 1, start=step)
        for param, other in zip(alone, together, strict=True):
            other.grad = param.grad.clone()
        both.step()
    assert_same_bits(alone, together)
    assert all(param.isfinite().all() for param in mixed)


@needs_grad_dtype
def test_a_float32_buffer_stays_one_when_the_activation_is_turned_on():
    param = mixed_parameter(torch.float16, torch.float32)
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9, gradient_activation=None)
    param.grad = torch.randn(33)
    optimizer.step()
    buffer = optimizer.state[param]["momentum_buffer"]
    assert buffer.dtype is torch.float32
    optimizer.param_groups[0]["gradient_activation"] = "tanh"
    expected = 0.9 * buffer.double() + 0.1 * torch.tanh(20 * param.grad.double())
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"] is buffer
    torch.testing.assert_close(buffer.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sgd_steps_on_a_buffer_of_any_dtype_as_torch_does(dtype, state_dtype):
    param, twin = (nn.Parameter(torch.ones(5, dtype=dtype)) for _ in range(2))
    optimizer, torchs = optim.SGD([param], lr=0.1, momentum=0.9), torch.optim.SGD([twin], lr=0.1, momentum=0.9)
    buffer = torch.randn(5).to(state_dtype)
    for one, own in ((optimizer, param), (torchs, twin)):
        own.grad = torch.full_like(own, 0.25)
        one.state[own]["momentum_buffer"] = buffer.clone()
        one.step()
        assert one.state[own]["momentum_buffer"].dtype is state_dtype
    value = 0.9 * buffer.double() + 0.1 * math.atan(5)
    assert_rounded_once("buffer", optimizer.state[param]["momentum_buffer"], value, value.abs() + 1)
    assert_rounded_once("parameter", param, 1 - 0.1 * value, torch.full((5,), 2.0))


@needs_grad_dtype
def test_adamw_keeps_states_of_the_gradients_dtype():
    """Torch's step does so too: it accepts states of the parameter's dtype or of the gradient's."""
    param = mixed_parameter(torch.float16, torch.float32)
    optimizer = optim.AdamW([param], lr=0.1)
    optimizer.state[param] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(33), "exp_avg_sq": torch.zeros(33)}
    exact = AdamWOracle(param)
    # The square of the gradient is far below float16's smallest number.
    param.grad = torch.full((33,), 1e-6)
    optimizer.step()
    exact.step(param.grad, lr=0.1)
    assert_rounded_once("parameter", param, exact.param, exact.param.abs() + 1)
    for name, value in exact.state.items():
        state = optimizer.state[param][name]
        assert state.dtype is torch.float32
        torch.testing.assert_close(state.double(), value, rtol=1e-6, atol=0)


@needs_grad_dtype
def test_mixed_dtypes_through_a_state_dict(pair):
    """As in torch, loading casts AdamW's states to the parameter's dtype; SGD's keep the dtype that was saved."""
    param = mixed_parameter(torch.float16, torch.float32)
    optimizer = pair[0]([param], lr=0.1, **({"momentum": 0.9} if pair[0] is optim.SGD else {}))
    for _ in range(2):
        param.grad = torch.randn(33)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    states = [state for name, state in optimizer.state[param].items() if name != "step"]
    assert {state.dtype for state in states} == {torch.float32 if pair[0] is optim.SGD else torch.float16}
    param.grad = torch.randn(33)
    optimizer.step()
    assert param.isfinite().all()


@needs_grad_dtype
@pytest.mark.parametrize("activate", ["gradient", "momentum"])
@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_momentum_beyond_float16_goes_on_where_it_was(copied, activate):
    """The bits are the same as without the copy."""
    param = mixed_parameter(torch.float16, torch.float32)
    optimizer = optim.SGD([{"params": [param]}], lr=0.1, momentum=0.9, activate=activate, alpha=1e4)
    gradients = [1e5 * torch.randn(33) for _ in range(3)]
    for gradient in gradients[:2]:
        param.grad = gradient.clone()
        optimizer.step()
    if copied == "state_dict":
        twin = nn.Parameter(param.detach().clone())
        twin.grad_dtype = torch.float32
        other = optim.SGD([twin], lr=0.1, momentum=0.9, activate=activate, alpha=1e4)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        make = {"deepcopy": copy.deepcopy, "pickle": lambda one: pickle.loads(pickle.dumps(one))}[copied]
        other = make(optimizer)
        twin = other.param_groups[0]["params"][0]
        twin.grad_dtype = torch.float32
    for one, owner in ((optimizer, param), (other, twin)):
        owner.grad = gradients[2].clone()
        one.step()
    buffer = other.state[twin]["momentum_buffer"]
    assert buffer.dtype is torch.float32
    assert buffer.isfinite().all()
    assert_same_bits([twin, buffer], [param, optimizer.state[param]["momentum_buffer"]])
    assert not other._optimizer_load_state_dict_pre_hooks
    assert not other._optimizer_load_state_dict_post_hooks


@needs_grad_dtype
def test_a_buffer_is_loaded_in_the_parameters_dtype_where_its_gradients_are():
    """Without activation the buffer is always cast, as in torch. A user's hook decides what is loaded."""
    params = [nn.Parameter(torch.zeros(3, dtype=torch.float16)) for _ in range(3)]
    for param in params[1:]:
        param.grad_dtype = torch.float32
    off = {"params": params[2:], "gradient_activation": None}
    optimizer = optim.SGD([{"params": params[:2]}, off], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(3)) for _ in params], lr=0.1, momentum=0.9)
    for param in theirs.param_groups[0]["params"]:
        param.grad = torch.full((3,), 3e5)
    theirs.step()
    saved = theirs.state_dict()
    saved["param_groups"] = [{**saved["param_groups"][0], "params": ids} for ids in ([0, 1], [2])]
    optimizer.load_state_dict(saved)
    buffers = [optimizer.state[param]["momentum_buffer"] for param in params]
    assert [buffer.dtype for buffer in buffers] == [torch.float16, torch.float32, torch.float16]
    assert torch.equal(buffers[1], torch.full((3,), 3e5))
    optimizer.register_load_state_dict_pre_hook(lambda _, given: {**given, "state": {}})
    optimizer.load_state_dict(saved)
    assert not optimizer.state


@needs_grad_dtype
def test_complex_gradients_of_real_parameters_are_refused(pair):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    params[1].grad_dtype = None
    optimizer = pair[0]([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    params[0].grad, params[1].grad = torch.ones(3), torch.ones(3, dtype=torch.complex64)
    assert_refused(optimizer, params, TypeError, r"gradient in param_groups\[1\].*complex64; expected real")


# ---- Counts of steps -------------------------------------------------------------------------------------------------

COUNTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, *DTYPES)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("dtype", COUNTS, ids=str)
def test_adamw_counts_in_any_dtype(dtype, loaded):
    """The judge is torch's AdamW on the activated gradient, with a step count of the same dtype."""
    params, others = (make_params(torch.float64, shapes=[(4,), (2, 3)]) for _ in range(2))
    optimizer, torchs = optim.AdamW(params, lr=0.1), torch.optim.AdamW(others, lr=0.1, foreach=False)
    for step in range(3):
        for param, other in zip(params, others, strict=True):
            param.grad = torch.randn(param.shape, dtype=torch.float64)
            other.grad = 0.1 * torch.atan(15 * param.grad)
        optimizer.step()
        torchs.step()
        if step == 0:
            for one in (optimizer, torchs):
                saved = one.state_dict()
                # Only one count is replaced; the others stay as they were.
                saved["state"][1]["step"] = torch.tensor(7).to(dtype)
                if loaded:
                    one.load_state_dict(saved)
                else:
                    one.state[one.param_groups[0]["params"][1]]["step"] = saved["state"][1]["step"]
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-9)
        assert optimizer.state[param]["step"] == torchs.state[other]["step"]
        assert optimizer.state[param]["step"].dtype is torchs.state[other]["step"].dtype
    assert optimizer.state[params[1]]["step"] == 9


@pytest.mark.parametrize("shapes", [[(1,), (1,)], [(), (1,)], [(1, 1), (1,), ()]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_adamw_counts_in_one_number_of_any_shape(shapes, dtype, monkeypatch):
    """The bits are the same as with 0-dimensional counts, the only ones that backends receive."""
    params, others = (make_params(shapes=[(4,), (2, 3), (5,)][: len(shapes)]) for _ in range(2))
    optimizer, plain = optim.AdamW(params, amsgrad=True), optim.AdamW(others, amsgrad=True)
    train(optimizer, params, 2)
    train(plain, others, 2)
    counts = [optimizer.state[param]["step"] for param in params]
    for param, count, shape in zip(params, counts, shapes, strict=True):
        optimizer.state[param]["step"] = count.to(dtype).reshape(shape)
    adamw_step_, seen = ops.adamw_step_, []
    monkeypatch.setattr(ops, "adamw_step_", lambda *args, **kw: (seen.extend(args[6]), adamw_step_(*args, **kw)))
    train(optimizer, params, 3, start=2)
    assert {count.shape for count in seen} == {()}
    train(plain, others, 3, start=2)
    assert_same_bits(params, others)
    for param, shape in zip(params, shapes, strict=True):
        step = optimizer.state[param]["step"]
        assert (step.shape, step.dtype, step.item()) == (shape, dtype, 5)


def test_a_python_number_in_a_state_dict_is_loaded_as_torch_loads_it():
    params = make_params(shapes=[(3,)])
    optimizer = optim.AdamW(params, lr=0.1)
    train(optimizer, params, 1)
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = 5
    optimizer.load_state_dict(saved)
    train(optimizer, params, 1)
    assert optimizer.state[params[0]]["step"] == 6


BAD_STEPS = {
    "int": (3, TypeError, r"step of a parameter .* is a int; expected a tensor.*torch\.tensor\(3, .*load_state_dict"),
    "float": (3.0, TypeError, r"step of a parameter .* is a float; expected a tensor"),
    "None": (None, TypeError, r"step of a parameter .* is a NoneType.*torch\.tensor\(count, dtype.*state\.$"),
    "text": ("x", TypeError, r"step of a parameter .* is a str.*torch\.tensor\(count, dtype.*state\.$"),
    "zeros": (torch._efficientzerotensor(()), TypeError, "step of a parameter .* one real number with memory"),
    "bool": (torch.tensor(True), TypeError, r"step of a parameter .* torch\.bool"),
    "complex": (torch.tensor(3 + 0j), TypeError, r"step of a parameter .* torch\.complex64"),
    "several": (torch.ones(3), TypeError, r"step of a parameter .* of shape \(3,\); |step of a parameter .*one real"),
    "meta": (torch.ones((), device="meta"), TypeError, "step of a parameter .* on meta"),
    "negative": (torch.tensor(-1.0), ValueError, "step of a parameter .* is -1.0.*divide by 0"),
    "NaN": (torch.tensor(math.nan), ValueError, "step of a parameter .* is nan"),
    "full": (torch.tensor(255, dtype=torch.uint8), ValueError, "step of a parameter .* is 255 in torch.uint8"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_invalid_step_counts_change_nothing(case):
    value, error, match = BAD_STEPS[case]
    params = make_params(shapes=[(3,), (2,)])
    optimizer = optim.AdamW([{"params": [param]} for param in params], lr=0.1)
    train(optimizer, params, 1)
    optimizer.state[params[1]]["step"] = value
    assert_refused(optimizer, params, error, rf"optim\.AdamW: {match}")
    assert optimizer.state[params[0]]["step"] == 1


BAD_STATES = {
    "a number": (lambda state: 0.5, TypeError, "is a float; expected a tensor"),
    "a list": (lambda state: state.tolist(), TypeError, "is a list; expected a tensor"),
    "another shape": (lambda state: torch.zeros(1), ValueError, r"has shape \(1,\).*expected shape \(3,\)"),
    "another device": (lambda state: state.to("meta"), ValueError, "on meta; expected"),
    "sparse": (lambda state: state.to_sparse(), ValueError, "sparse_coo on cpu; expected"),
    "expanded": (lambda state: torch.zeros(1).expand(3), ValueError, "share memory"),
    "zeros without memory": (lambda state: torch._efficientzerotensor(3), ValueError, "have none"),
    "integers": (lambda state: state.long(), TypeError, "int64.*load_state_dict"),
    "complex": (lambda state: state.to(torch.complex64), TypeError, "complex64.*load_state_dict"),
}


@pytest.mark.parametrize("case", BAD_STATES)
@pytest.mark.parametrize("name", ["momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_states_that_do_not_fit_change_nothing(name, case):
    """The invalid state is in the second group, so a check that came too late would find the first group stepped."""
    change, error, match = BAD_STATES[case]
    kind, options = (optim.SGD, {"momentum": 0.9}) if name == "momentum_buffer" else (optim.AdamW, {"amsgrad": True})
    params = make_params(shapes=[(4,), (3,)])
    optimizer = kind([{"params": [param]} for param in params], lr=0.1, **options)
    train(optimizer, params, 1)
    optimizer.state[params[1]][name] = change(optimizer.state[params[1]][name])
    where = rf"optim\.{kind.__name__}: {name} of a parameter in param_groups\[1\] of shape \(3,\)"
    assert_refused(optimizer, params, error, f"{where}.*{match}")


@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_a_state_that_is_missing_is_named(name):
    params = make_params(shapes=[(4,), (3,)])
    optimizer = optim.AdamW([{"params": [param]} for param in params], lr=0.1, amsgrad=True)
    train(optimizer, params, 1)
    del optimizer.state[params[1]][name]
    assert_refused(optimizer, params, ValueError, rf"optim\.AdamW: '{name}' is missing .*param_groups\[1\]")


# ---- Views that are negated when they are read, and zeros without memory ---------------------------------------------


def negated(tensor):
    """A view of the same numbers whose memory holds the negatives."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    assert torch.equal(view, tensor)
    return view


@pytest.mark.parametrize("place", ["param", "grad", "state", "all"])
def test_negated_views_give_the_same_numbers(place, pair):
    options = {"momentum": 0.9, "weight_decay": 0.1} if pair[0] is optim.SGD else {"amsgrad": True}
    params = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(4))]
    others = copies(params)
    if place in ("param", "all"):
        params[1] = nn.Parameter(negated(params[1].detach()))
        assert params[1].is_neg()
    optimizer, plain = pair[0](params, lr=0.1, **options), pair[0](others, lr=0.1, **options)
    for step in range(3):
        gradients = [torch.randn(5), torch.randn(4)]
        for param, other, gradient in zip(params, others, gradients, strict=True):
            param.grad, other.grad = gradient.clone(), gradient.clone()
        if place in ("grad", "all"):
            params[1].grad = negated(gradients[1])
        if place in ("state", "all") and step:
            state = optimizer.state[params[1]]
            for name, value in state.items():
                state[name] = negated(value)
        optimizer.step()
        plain.step()
        assert torch.equal(params[1].grad, gradients[1])
    assert_same_bits([param.resolve_neg() for param in params], others)
    for param, other in zip(params, others, strict=True):
        for name, value in plain.state[other].items():
            assert torch.equal(optimizer.state[param][name], value)


def test_a_gradient_of_zeros_without_memory(pair):
    options = {"momentum": 0.9, "weight_decay": 0.1} if pair[0] is optim.SGD else {}
    params, others = (make_params(shapes=[(3,), (2,)]) for _ in range(2))
    optimizer, plain = pair[0](params, lr=0.1, **options), pair[0](others, lr=0.1, **options)
    for _ in range(2):
        for param, other in zip(params, others, strict=True):
            param.grad, other.grad = torch.ones_like(param), torch.ones_like(other)
        params[1].grad, others[1].grad = torch._efficientzerotensor(2), torch.zeros(2)
        optimizer.step()
        plain.step()
    assert_same_bits(params, others)


def test_a_parameter_without_memory_is_refused(pair):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch._efficientzerotensor(3))]
    optimizer = pair[0]([{"params": [param]} for param in params], lr=0.1)
    for param in params:
        param.grad = torch.ones(3)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"param_groups\[1\] of shape \(3,\) is zeros without memory"):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
def test_parameters_can_be_swapped_after_a_step(options):
    module = nn.Linear(2, 2)
    optimizer = optim.SGD(module.parameters(), lr=0.1, **options)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert module.weight.dtype is torch.float64


# ---- Tensors that were replaced since the last step ------------------------------------------------------------------


def stepped_twice(pair, shape=(2, 3)):
    param = torch.nn.Parameter(torch.randn(shape))
    optimizer = pair[0]([param], lr=0.1, **({"momentum": 0.9} if pair is PAIRS["SGD"] else {}))
    for _ in range(2):
        param.grad = torch.randn(shape)
        optimizer.step()
    return param, optimizer


def assert_refused_unchanged(optimizer, param, message):
    before, state = param.detach().clone(), copy.deepcopy(optimizer.state[param])
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    torch.testing.assert_close(param.detach(), before, rtol=0, atol=0)
    for name, value in state.items():
        torch.testing.assert_close(optimizer.state[param][name], value, rtol=0, atol=0, equal_nan=True)


def test_a_parameter_that_changed_its_shape_is_refused(pair):
    param, optimizer = stepped_twice(pair)
    param.data = param.data.t().contiguous()
    param.grad = torch.zeros(3, 2)
    assert_refused_unchanged(optimizer, param, r"of shape \(3, 2\) has shape \(2, 3\)")


def test_a_gradient_that_changed_its_shape_is_refused(pair):
    param, optimizer = stepped_twice(pair)
    param.data = param.data.t().contiguous()
    param.grad.data = torch.zeros(2, 3)
    for state in optimizer.state[param].values():
        if state.dim():
            state.data = state.data.t().contiguous()
    assert_refused_unchanged(optimizer, param, r"has shape \(3, 2\) and its gradient \(2, 3\)")


def test_a_state_that_overlaps_itself_since_the_last_step_is_refused(pair):
    param, optimizer = stepped_twice(pair)
    state = next(state for state in optimizer.state[param].values() if state.dim())
    state.data = torch.zeros(1).expand(2, 3)
    assert_refused_unchanged(optimizer, param, "share memory")


@pytest.mark.parametrize("count", [-1.0, -5.0, math.nan])
def test_a_count_that_was_written_to_is_checked(count):
    param, optimizer = stepped_twice(PAIRS["AdamW"])
    optimizer.state[param]["step"].fill_(count)
    assert_refused_unchanged(optimizer, param, "expected the count of steps made")


@pytest.mark.parametrize("count", [torch.tensor(2), torch.tensor(2.0, dtype=torch.float16), torch.tensor([2.0])])
def test_a_count_may_be_replaced_by_another_tensor(count):
    param, optimizer = stepped_twice(PAIRS["AdamW"])
    other, reference = stepped_twice(PAIRS["AdamW"])
    other.data, other.grad = param.data.clone(), param.grad.clone()
    reference.state[other] = copy.deepcopy(optimizer.state[param])
    optimizer.state[param]["step"].data = count.clone()
    optimizer.step()
    reference.step()
    torch.testing.assert_close(param, other, rtol=0, atol=0)
    assert optimizer.state[param]["step"].item() == 3


class Pickled(optim.SGD):
    def __getstate__(self):
        return self.__dict__.copy()


def test_nothing_in_an_optimizer_or_its_states_is_held_weakly():
    """A subclass may pickle its dictionary, and torch does not swap a tensor that has a weak reference."""
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = Pickled([param], lr=0.1, momentum=0.9)
    param.grad = torch.ones(4)
    optimizer.step()
    assert len(pickle.loads(pickle.dumps(optimizer)).state) == 1
    torch.utils.swap_tensors(optimizer.state[param]["momentum_buffer"], torch.zeros(4))
