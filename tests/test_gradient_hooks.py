"""activate_gradients and register_gradient_hook activate each gradient once, with any optimizer, closure or scaler."""

import contextlib
import copy
import gc
import math
import pickle
import types
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import optim
from lcw_ops.ops import backends
from lcw_ops.ops import gradient_activation as ops

pytestmark = pytest.mark.usefixtures("one_thread")


def f(gradient, kind="arctan", alpha=0.1, beta=20.0):
    result = gradient.detach().clone()
    F.gradient_activation_([result], kind, alpha, beta)
    return result


def make_params(*shapes):
    return [nn.Parameter(torch.randn(shape)) for shape in shapes or ((3, 4), (5,), ())]


def set_gradients(params):
    gradients = [torch.randn_like(param, requires_grad=False) for param in params]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()
    return gradients


def still(params, kind=torch.optim.SGD, **options):
    """An optimizer of rate 0: its step changes the gradients only."""
    return kind(params, lr=0.0, **options)


def assert_gradients(params, expected, exact=True):
    for index, (param, gradient) in enumerate(zip(params, expected, strict=True)):
        if exact:
            assert torch.equal(param.grad, gradient), f"the gradient of parameter {index}"
        else:
            torch.testing.assert_close(param.grad.double(), gradient, rtol=1e-6, atol=0)


# ---- activate_gradients ----------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, nesterov=True),
    "fused SGD": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, 0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, 0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, 0.1),
    "our SGD without activation": lambda params: optim.SGD(params, 0.1, gradient_activation=None),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("kind", ["arctan", "tanh", "log"])
def test_any_optimizer_steps_on_activated_gradients(make, kind):
    params = make_params()
    others = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer, by_hand = make(params), make(others)
    lcw_ops.activate_gradients(optimizer, kind, alpha=0.3, beta=7.0)
    for _ in range(3):
        gradients = set_gradients(params)
        optimizer.step()
        for other, gradient in zip(others, gradients, strict=True):
            other.grad = f(gradient, kind, 0.3, 7.0)
        by_hand.step()
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)


def test_once_per_step_on_the_sum_of_all_backward_passes():
    params = make_params()
    optimizer = still(params)
    lcw_ops.activate_gradients(optimizer)
    first, second = ([torch.randn_like(param) for param in params] for _ in range(2))
    for gradients in (first, second):
        sum((param * gradient).sum() for param, gradient in zip(params, gradients, strict=True)).backward()
    optimizer.step()
    assert_gradients(params, [f(a + b) for a, b in zip(first, second, strict=True)])


def test_remove_ends_the_activation():
    params = make_params()
    optimizer = still(params)
    handle = lcw_ops.activate_gradients(optimizer)
    handle.remove()
    handle.remove()
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, gradients)
    lcw_ops.activate_gradients(optimizer)
    optimizer.step()
    assert_gradients(params, map(f, gradients))


def test_neither_hook_nor_handle_keeps_the_optimizer_alive():
    optimizer = still(make_params())
    handle = lcw_ops.activate_gradients(optimizer)
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()
    handle.remove()


def test_params_select_the_parameters_to_activate():
    params = make_params()
    optimizer = still(params)
    lcw_ops.activate_gradients(optimizer, params=(param for param in [params[1], params[1]]))
    lcw_ops.activate_gradients(optimizer, "tanh", params=[params[2]])
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, [gradients[0], f(gradients[1]), f(gradients[2], "tanh")])


def test_settings_of_a_group_overrule_those_of_the_call():
    params = make_params((2,), (3,), (4,), (5,))
    overrides = [{}, {"activate_gradients": False}, {"activate_gradients": {"kind": "log"}}]
    groups = [{"params": [param], **one} for param, one in zip(params, overrides, strict=False)]
    optimizer = still(groups)
    lcw_ops.activate_gradients(optimizer, "tanh", alpha=0.5)
    optimizer.add_param_group({"params": [params[3]], "activate_gradients": {"alpha": 2.0, "beta": 3.0}})
    gradients = set_gradients(params)
    optimizer.step()
    first, second, third, last = gradients
    assert_gradients(params, [f(first, "tanh", 0.5), second, f(third, "log", 0.5), f(last, "tanh", 2.0, 3.0)])


def test_every_group_may_be_left_alone():
    params = make_params()
    optimizer = still([{"params": params, "activate_gradients": False}])
    lcw_ops.activate_gradients(optimizer)
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, gradients)


def test_overrides_stay_when_a_checkpoint_says_nothing_and_go_when_it_says_otherwise():
    params = make_params((2,), (3,))
    plain = still([{"params": [param]} for param in params], momentum=0.5).state_dict()
    optimizer = still([{"params": [params[0]], "activate_gradients": False}, {"params": [params[1]]}], momentum=0.9)
    lcw_ops.activate_gradients(optimizer)
    optimizer.load_state_dict(plain)
    gradients = set_gradients(params)
    optimizer.step()
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert "activate_gradients" not in plain["param_groups"][0]
    assert_gradients(params, [gradients[0], f(gradients[1])])
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["activate_gradients"] is False
    saved["param_groups"][0]["activate_gradients"] = {"kind": "tanh"}
    optimizer.load_state_dict(saved)
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, [f(gradients[0], "tanh"), f(gradients[1])])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(still(params).state_dict())


def test_parameters_without_gradients_and_of_several_dtypes():
    params = [nn.Parameter(torch.randn(7).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    params += make_params((3,), (0, 4))
    optimizer = still(params)
    lcw_ops.activate_gradients(optimizer)
    optimizer.step()
    gradients = set_gradients(params)
    params[3].grad = None
    optimizer.step()
    assert params.pop(3).grad is None
    gradients.pop(3)
    assert_gradients(params, map(f, gradients))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("shared", [False, True])
def test_negated_views_are_activated(shared, backend):
    params = make_params((3,), (4,), (2,))
    gradients = [torch.randn(3), torch.randn(4), torch.randn(2)]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = torch._neg_view(gradient.clone())
    assert params[0].grad.is_neg()
    if shared:
        params[2].grad, gradients[2] = params[1].grad[:2], gradients[1][:2]
    groups = [{"params": params[:1]}, {"params": params[1:], "activate_gradients": {"beta": 3.0}}]
    optimizer = still(groups)
    lcw_ops.activate_gradients(optimizer)
    with lcw_ops.use_backend(backend):
        optimizer.step()
    assert_gradients(params, [_f64(-gradients[0]), _f64(-gradients[1], 3.0), _f64(-gradients[2], 3.0)], exact=False)
    plain = torch.randn(3)
    optimizer, params[0].grad = still(params[:1]), torch._neg_view(plain.clone())
    lcw_ops.activate_gradients(optimizer)
    with lcw_ops.use_backend(backend):
        optimizer.step()
    assert_gradients(params[:1], [_f64(-plain)], exact=False)
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(3))
    module.weight.grad = torch._neg_view(plain.clone())
    lcw_ops.register_gradient_hook(module)
    with lcw_ops.use_backend(backend):
        module.weight.sum().backward()
    assert_gradients([module.weight], [_f64(1 - plain)], exact=False)


def _f64(gradient, beta=20.0):
    return 0.1 * torch.atan(beta * gradient.double())


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize(
    "settings", [{}, {"activate_gradients": {"beta": 20.0}}, {"activate_gradients": {"beta": 3.0}}]
)
def test_gradients_that_share_memory_are_activated_once(settings):
    flat = torch.randn(8)
    views = [flat[:4], flat[4:], flat[2:6], flat[:4], torch.tensor(0.3).expand(4), flat[::2], flat[1::2]]
    expected = [f(view) for view in views]
    params = make_params(*[view.shape for view in views], (4,))
    for param, view in zip(params, views, strict=False):
        param.grad = view
    # A parameter of another group has the very same tensor as its gradient.
    params[-1].grad = params[3].grad
    expected.append(f(flat[:4], beta=settings.get("activate_gradients", {}).get("beta", 20.0)))
    expected[3] = expected[0]
    optimizer = still([{"params": [*params[:-1], params[0]]}, {"params": params[-1:], **settings}])
    lcw_ops.activate_gradients(optimizer)
    optimizer.step()
    assert_gradients(params, expected)


@pytest.mark.parametrize("left_out", ["by its group", "by params"])
def test_a_gradient_shared_with_a_parameter_that_is_left_out_stays_unchanged_there(left_out):
    params, gradient = make_params((4,), (4,), (3, 2)), torch.randn(4)
    params[0].grad = params[1].grad = gradient.clone()
    # A parameter that is left out may have a sparse gradient.
    params[2].grad = torch.sparse_coo_tensor([[1]], [[1.0, 2.0]], (3, 2), check_invariants=True)
    by_group = left_out == "by its group"
    groups = [{"params": params[:1]}, {"params": params[1:], **({"activate_gradients": False} if by_group else {})}]
    optimizer = still(groups)
    lcw_ops.activate_gradients(optimizer, params=None if by_group else params[:1])
    optimizer.step()
    assert_gradients(params[:2], [f(gradient), gradient])


@pytest.mark.skipif(backends.choose(ops.NAME, torch.device("cpu")) != "cpp", reason="no compiled kernels here")
@pytest.mark.parametrize("form", ["plain", "of a subclass", "negated"])
def test_only_plain_gradients_go_to_the_kernel_without_checks_in_python(form, monkeypatch):
    """One call of the kernel then activates all of them; it checks the layouts itself."""

    class Marked(torch.Tensor):
        pass

    params = make_params((3,), (2, 3))
    gradients = set_gradients(params)
    if form == "of a subclass":
        params[1].grad = gradients[1].clone().as_subclass(Marked)
    elif form == "negated":
        params[1].grad = torch._neg_view(-gradients[1])
    optimizer, lengths = still(params), []
    lcw_ops.activate_gradients(optimizer)
    plain = ops.activate_plain_
    monkeypatch.setattr(
        ops, "activate_plain_", lambda grads, *rest: (lengths.append(len(grads)), plain(grads, *rest))[1]
    )
    optimizer.step()
    assert lengths == ([2] if form == "plain" else [])
    assert_gradients(params, map(f, gradients))


def test_disjoint_views_of_one_buffer_stay_views():
    flat = torch.randn(12)
    expected = f(flat)
    params = make_params((4,), (2, 4))
    params[0].grad, params[1].grad = flat[:4], flat[4:].view(2, 4)
    optimizer = still(params)
    lcw_ops.activate_gradients(optimizer)
    optimizer.step()
    assert torch.equal(flat, expected)


# ---- Closures --------------------------------------------------------------------------------------------------------


def quadratic(params, optimizer, calls):
    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((param * param).sum() for param in params)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_computes_gradients_after_the_hook_and_they_are_activated(by_name):
    params = make_params()
    optimizer, calls = still(params), []
    lcw_ops.activate_gradients(optimizer, params=params[:2])
    lcw_ops.activate_gradients(optimizer, "tanh", params=params[2:])
    closure = quadratic(params, optimizer, calls)
    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    assert calls == [True]
    assert torch.equal(loss, sum((param * param).sum() for param in params))
    kinds = ["arctan", "arctan", "tanh"]
    assert_gradients(params, [f(2 * param, kind) for param, kind in zip(params, kinds, strict=True)])


def test_lbfgs_sees_activated_gradients_at_every_evaluation():
    params, calls = make_params((4,)), []
    others = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer, by_hand = (torch.optim.LBFGS(some, lr=0.2, max_iter=5) for some in (params, others))
    lcw_ops.activate_gradients(optimizer)
    closure = quadratic(others, by_hand, [])

    def closure_by_hand():
        loss = closure()
        for other in others:
            other.grad.copy_(f(other.grad))
        return loss

    optimizer.step(quadratic(params, optimizer, calls))
    by_hand.step(closure_by_hand)
    assert len(calls) > 2
    assert torch.equal(params[0], others[0])


# ---- Steps within steps ----------------------------------------------------------------------------------------------


def make_subclass(base):
    class Own(base):
        def step(self, closure=None):
            if self.defaults.get("fails"):
                raise RuntimeError("not now")
            return super().step(closure)

    return Own


@pytest.fixture(params=["torch's", "ours"])
def base(request):
    """A new class, whose step torch has not wrapped yet: torch wraps the step of a class once in a process."""

    class Base(torch.optim.SGD if request.param == "torch's" else optim.SGD):
        def __init__(self, params, lr=0.0):
            super().__init__(params, lr, **({} if request.param == "torch's" else {"gradient_activation": None}))

        def step(self, closure=None):
            return super().step(closure)

    return Base


@pytest.mark.parametrize("closure", ["none", "by place", "by name"])
@pytest.mark.parametrize("parent_first", [False, True])
def test_a_step_within_a_step_activates_once(base, parent_first, closure):
    params, own = make_params(), make_subclass(base)
    # The first instance of a class makes the class run hooks around its step.
    if parent_first:
        base(make_params())
    optimizer = own(params)
    if not parent_first:
        base(make_params())
    lcw_ops.activate_gradients(optimizer)
    gradients = []

    def compute():
        gradients[:] = set_gradients(params)
        return 1.0

    for fails in (False, True, False, False):
        optimizer.defaults["fails"] = fails
        gradients[:] = set_gradients(params)
        call = {"none": optimizer.step, "by place": lambda: optimizer.step(compute)}.get(
            closure, lambda: optimizer.step(closure=compute)
        )
        if fails:
            with pytest.raises(RuntimeError, match="not now"):
                call()
        else:
            assert call() == (None if closure == "none" else 1.0)
            assert_gradients(params, map(f, gradients))


def test_an_optimizer_stepped_by_another_is_not_a_step_within_a_step():
    params, others = make_params(), make_params()
    inner = still(params)

    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            inner.step()
            return super().step(closure)

    outer = Outer(others, lr=0.0)
    for optimizer in (inner, outer):
        lcw_ops.activate_gradients(optimizer)
    for _ in range(2):
        gradients, other_gradients = set_gradients(params), set_gradients(others)
        outer.step()
        assert_gradients(params, map(f, gradients))
        assert_gradients(others, map(f, other_gradients))


def test_an_argument_before_the_closure_is_not_the_closure():
    class Own(torch.optim.SGD):
        def step(self, zero=False, closure=None):
            self.seen = zero
            return closure() if closure is not None else None

    class Other(torch.optim.SGD):
        def step(self, *flags, closure=None):
            self.seen = flags
            return closure() if closure is not None else None

    params = make_params()
    for kind, seen in ((Own, True), (Other, (True,))):
        optimizer = kind(params, lr=0.0)
        lcw_ops.activate_gradients(optimizer)
        gradients = set_gradients(params)
        optimizer.step(True)
        assert optimizer.seen == seen
        assert_gradients(params, map(f, gradients))

        def compute(gradients=gradients):
            gradients[:] = set_gradients(params)
            return 2.0

        loss = optimizer.step(True, compute) if kind is Own else optimizer.step(True, closure=compute)
        assert (loss, optimizer.seen) == (2.0, seen)
        assert_gradients(params, map(f, gradients))


# ---- Wrappers --------------------------------------------------------------------------------------------------------


class Forwarding:
    """Looks like an instance of the inner optimizer's class, and forwards to its attributes."""

    def __init__(self, inner):
        self.inner = inner
        self.__class__ = type(f"Forwarding{type(inner).__name__}", (Forwarding, type(inner)), {})

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)

    def step(self, closure=None):
        return self.inner.step(closure)


class OwnHooks(torch.optim.Optimizer):
    """Has dictionaries of hooks, but nothing runs the hooks, because the class skips torch's constructor."""

    def __new__(cls, inner):
        # A new class: torch's zero_grad wraps the step of the class.
        return super().__new__(type("OwnHooks", (OwnHooks,), {}))

    def __init__(self, inner):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.inner, self.param_groups = inner, inner.param_groups
        self.state, self.defaults = {}, inner.defaults

    def step(self, closure=None):
        return self.inner.step(closure)


class Delegating(torch.optim.Optimizer):
    """Has methods, but no state of its own."""

    def __init__(self, inner):
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)
    defaults = property(lambda self: self.inner.defaults)

    def zero_grad(self):
        self.inner.zero_grad()

    def step(self, closure=None):
        return self.inner.step(closure)

    def __getstate__(self):
        return self.__dict__

    def __setstate__(self, state):
        self.__dict__.update(state)


def post_local_sgd(inner):
    from torch.distributed.optim import PostLocalSGDOptimizer

    return PostLocalSGDOptimizer(inner, types.SimpleNamespace(average_parameters=lambda params: None, step=0))


class Listing(torch.optim.Optimizer):
    """Keeps its optimizers in a list."""

    def __init__(self, *inner):
        self.inner = list(inner)

    param_groups = property(lambda self: [group for inner in self.inner for group in inner.param_groups])

    def step(self):
        for inner in self.inner:
            inner.step()


WRAPPERS = {
    "forwards": Forwarding,
    "own hooks": OwnHooks,
    "delegates": Delegating,
    "PostLocalSGDOptimizer": post_local_sgd,
    "in a list": Listing,
    "a wrapper's wrapper": lambda inner: OwnHooks(Delegating(Forwarding(inner))),
}


class Around(torch.optim.Optimizer):
    """Runs hooks of its own before the steps of the optimizer inside."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_stands_for_the_optimizer_that_steps(wrap):
    param = nn.Parameter(torch.ones(1))
    optimizer = wrap(torch.optim.SGD([param], lr=1.0))
    handle = lcw_ops.activate_gradients(optimizer)
    param.grad = torch.ones(1)
    optimizer.step()
    assert param.item() == pytest.approx(1 - 0.1 * math.atan(20), rel=1e-6)
    handle.remove()
    param.grad = torch.ones(1)
    with torch.no_grad():
        param.fill_(1.0)
    optimizer.step()
    assert param.item() == 0.0


@pytest.mark.parametrize("wrap", [Forwarding, OwnHooks, Delegating, Around])
def test_a_closure_passes_through_a_wrapper(wrap):
    params = make_params()
    optimizer, calls = wrap(still(params)), []
    lcw_ops.activate_gradients(optimizer, "tanh", params=params[:2])
    optimizer.step(quadratic(params, optimizer, calls))
    assert len(calls) == 1
    assert_gradients(params, [*(f(2 * param, "tanh") for param in params[:2]), 2 * params[2]])


@pytest.mark.parametrize("zero_first", [False, True])
def test_a_wrapper_whose_step_is_wrapped_later_activates_once(zero_first):
    """torch's zero_grad makes the step of the class run hooks, if the constructor has not."""
    params = make_params()
    optimizer = OwnHooks(still(params))
    if zero_first:
        optimizer.zero_grad()
    handle = lcw_ops.activate_gradients(optimizer)
    optimizer.zero_grad()
    assert type(optimizer).step.hooked
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, map(f, gradients))
    with pytest.raises(ValueError, match=r"remove\(\)"):
        lcw_ops.activate_gradients(optimizer)
    handle.remove()
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, gradients)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("order", [1, -1])
def test_a_wrapper_and_the_optimizer_inside_are_not_both_activated(wrap, order):
    params = make_params()
    inner = still(params)
    optimizer = wrap(inner)
    first, second = [inner, optimizer][::order]
    lcw_ops.activate_gradients(first)
    with pytest.raises(ValueError, match=r"already.*remove\(\)"):
        lcw_ops.activate_gradients(second)
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, map(f, gradients))


@pytest.mark.parametrize("wrap", [Around, lambda inner: Around(Delegating(inner))], ids=["direct", "deeper"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_wrapper_with_hooks_of_its_own_is_taken_as_it_is_and_once(wrap, order):
    params = make_params()
    inner = still(params)
    optimizer = wrap(inner)
    first, second = [inner, optimizer][::order]
    handle = lcw_ops.activate_gradients(first)
    with pytest.raises(ValueError, match=r"SGD.*inside the other.*remove\(\)"):
        lcw_ops.activate_gradients(second)
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, map(f, gradients))
    handle.remove()
    lcw_ops.activate_gradients(second, "tanh")
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, [f(gradient, "tanh") for gradient in gradients])


def test_a_wrapper_and_the_optimizer_inside_may_have_a_part_each():
    params = make_params()
    inner = still(params)
    optimizer = Around(inner)
    lcw_ops.activate_gradients(optimizer, params=params[:1])
    lcw_ops.activate_gradients(inner, "tanh", params=params[1:])
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, [f(gradients[0]), *(f(gradient, "tanh") for gradient in gradients[1:])])


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_a_wrapper_around_an_optimizer_that_activates_itself_is_refused(kind):
    params = make_params()
    inner = kind(params, lr=0.0)
    with pytest.raises(ValueError, match="second time"):
        lcw_ops.activate_gradients(Forwarding(inner))
    optimizer = Around(inner)
    with pytest.raises(ValueError, match="gradient_activation=None"):
        lcw_ops.activate_gradients(optimizer)
    for group in inner.param_groups:
        group["gradient_activation"] = None
    lcw_ops.activate_gradients(optimizer)
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, map(f, gradients))
    inner.param_groups[0]["gradient_activation"] = "tanh"
    gradients = set_gradients(params)
    with pytest.raises(ValueError, match="gradient_activation=None"):
        optimizer.step()
    assert_gradients(params, gradients)


@pytest.mark.parametrize("by", ["hooks", "ours"])
def test_activation_twice_is_noticed_at_the_step_if_it_was_hidden_before(by):
    params = make_params()
    inner = still(params)

    class Hidden(optim.SGD if by == "ours" else torch.optim.SGD):
        def step(self, closure=None):
            inner.step()

    outer = Hidden(params[1:], lr=0.0)
    lcw_ops.activate_gradients(inner)
    if by == "hooks":
        lcw_ops.activate_gradients(outer)
    gradients = set_gradients(params)
    with pytest.raises(ValueError, match=r"a SGD and a Hidden, one of which steps inside the other"):
        outer.step()
    done = map(f, gradients[1:]) if by == "hooks" else gradients[1:]
    assert_gradients(params, [gradients[0], *done])


class Stepping(torch.optim.Optimizer):
    """Hides its optimizer: keeps only a function that steps one."""

    def __init__(self, params, step_inside):
        super().__init__(params, {})
        self.step_inside = step_inside

    def step(self, closure=None):
        return self.step_inside(closure)


def step_of_a_subclass(inner):
    class Subclass(type(inner)):
        def step(self, closure=None):
            return super().step(closure)

    return Subclass(inner.param_groups, lr=1.0).step


def step_in(holder, find):
    return lambda closure: find(holder).step(closure)


HIDDEN = {
    "its step": lambda inner: inner.step,
    "a dict of dicts": lambda inner: step_in({"a": {"b": inner}}, lambda holder: holder["a"]["b"]),
    "a plain object": lambda inner: step_in(types.SimpleNamespace(inner=inner), lambda holder: holder.inner),
    "a subclass": step_of_a_subclass,
}


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_an_optimizer_that_activates_itself_looks_for_hooks_around_its_step(kind, hide, closure):
    params = make_params()
    optimizer = Stepping(params, hide(kind([{"params": params}], lr=1.0)))
    handle = lcw_ops.activate_gradients(optimizer)
    before = [param.detach().clone() for param in params]
    gradients = set_gradients(params)
    arguments = [lambda: gradients.__setitem__(slice(None), set_gradients(params))] if closure else []
    with pytest.raises(ValueError, match=r"a Stepping and a \w+, one of which steps inside the other.*remove"):
        optimizer.step(*arguments)
    assert all(map(torch.equal, params, before))
    handle.remove()
    gradients[:] = set_gradients(params)
    optimizer.step(*arguments)
    assert_gradients(params, gradients)
    assert not any(map(torch.equal, params, before))


def test_an_optimizer_that_activates_itself_may_step_inside_one_with_other_parameters():
    params = make_params()
    off = {"params": params[:1], "gradient_activation": None}
    inner = optim.SGD([off, {"params": params[1:]}], lr=0.0)
    optimizer = Stepping(params[:1], inner.step)
    lcw_ops.activate_gradients(optimizer)
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, [f(gradients[0]), *gradients[1:]])
    inner.param_groups[0]["gradient_activation"] = "tanh"
    with pytest.raises(ValueError, match="one of which steps inside the other"):
        optimizer.step()


def test_two_optimizers_may_step_the_same_parameters_in_turn():
    params = make_params()
    optimizers = [still(params), still(params, torch.optim.AdamW)]
    for optimizer in optimizers:
        lcw_ops.activate_gradients(optimizer)
    for optimizer in 2 * optimizers:
        gradients = set_gradients(params)
        optimizer.step()
        assert_gradients(params, map(f, gradients))


def test_hooks_that_a_wrapper_forwards_run_once():
    """The step of the wrapper's class runs hooks, but finds those of the optimizer inside."""
    params = make_params()
    optimizer = Forwarding(optim.SGD(params, lr=0.0, gradient_activation=None))
    torch.optim.Optimizer._patch_step_function(optimizer)
    lcw_ops.activate_gradients(optimizer)
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, map(f, gradients))


def test_a_wrapper_without_a_single_optimizer_of_its_parameters_is_refused():
    params = make_params()
    one, other = still(params[:1]), still(params[1:])
    with pytest.raises(TypeError, match=r"Give optimizer\.inner\[0\] and optimizer\.inner\[1\], each in a call"):
        lcw_ops.activate_gradients(Listing(one, other))
    partly = OwnHooks(one)
    partly.param_groups = [*one.param_groups, *other.param_groups]
    with pytest.raises(TypeError, match=r"is a OwnHooks.*Give optimizer\.inner\."):
        lcw_ops.activate_gradients(partly)
    empty = Delegating(None)
    with pytest.raises(TypeError, match=r"is a Delegating.*not run hooks.*Give the optimizer whose step"):
        lcw_ops.activate_gradients(empty)
    with pytest.raises(TypeError, match=r"is a SGD.*calls torch\.optim\.Optimizer\.__init__"):
        lcw_ops.activate_gradients(torch.optim.SGD.__new__(torch.optim.SGD))
    with pytest.raises(TypeError, match=r"is a SimpleNamespace; expected.*Give optimizer\.inside\."):
        lcw_ops.activate_gradients(types.SimpleNamespace(inside=one))


def test_an_optimizer_inside_that_knows_its_wrapper_is_found():
    params = make_params()
    middle = Delegating(still(params))
    optimizer = middle.outer = OwnHooks(middle)
    lcw_ops.activate_gradients(optimizer)
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, map(f, gradients))


@pytest.mark.parametrize("calls_before", [False, True])
def test_a_step_assigned_to_the_class_later_runs_the_hooks(calls_before):
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            raise AssertionError("replaced")

    params, count = make_params(), []
    optimizer = Own(params, lr=0.0)
    parent = torch.optim.SGD.step if calls_before else torch.optim.SGD.step.__wrapped__

    def step(self, closure=None):
        count.append(1)
        return parent(self, closure)

    Own.step = step
    lcw_ops.activate_gradients(optimizer)
    gradients = set_gradients(params)
    optimizer.step()
    assert count == [1]
    assert_gradients(params, map(f, gradients))


@pytest.mark.parametrize("wrap", [lambda inner: inner, Forwarding, OwnHooks, Delegating])
@pytest.mark.parametrize("inside", [False, True])
def test_a_scheduler_that_replaces_step_changes_nothing(wrap, inside):
    params = make_params()
    inner = still(params)
    optimizer = wrap(inner)
    # The scheduler assigns a step that counts its calls to the instance.
    scheduler = torch.optim.lr_scheduler.StepLR(inner if inside else optimizer, 5)
    lcw_ops.activate_gradients(optimizer)
    for _ in range(2):
        gradients = set_gradients(params)
        optimizer.step()
        scheduler.step()
        assert_gradients(params, map(f, gradients))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deep", "pickle"])
def test_copies_of_a_wrapper_act_on_their_own_parameters(copied):
    optimizer = Delegating(still(make_params()))
    lcw_ops.activate_gradients(optimizer, "tanh")
    twin = copied(optimizer)
    params = twin.param_groups[0]["params"]
    gradients = set_gradients(params)
    twin.step()
    assert_gradients(params, [f(gradient, "tanh") for gradient in gradients])
    with pytest.raises(ValueError, match="already"):
        lcw_ops.activate_gradients(twin)


def test_gradients_that_a_step_writes_itself_can_be_written_before_as_documented():
    """As in Horovod, the gradients of two processes are averaged in step(), or by hand before it."""

    class Averaging(torch.optim.SGD):
        is_skipped = False

        def synchronize(self):
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad = (param.grad + 3.0) / 2

        @contextlib.contextmanager
        def skip_synchronize(self):
            self.is_skipped = True
            yield
            self.is_skipped = False

        def step(self, closure=None):
            if not self.is_skipped:
                self.synchronize()
            return super().step(closure)

    params = make_params()
    optimizer = Averaging(params, lr=0.0)
    lcw_ops.activate_gradients(optimizer)
    gradients = set_gradients(params)
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        optimizer.step()
    assert_gradients(params, [f((gradient + 3.0) / 2) for gradient in gradients])


# ---- Copies ----------------------------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda objects: pickle.loads(pickle.dumps(objects)),
    "a copy of a copy": lambda objects: copy.deepcopy(pickle.loads(pickle.dumps(objects))),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]], ids=str)
def test_copies_act_on_their_own_parameters(copied, order):
    originals = [nn.Linear(3, 2), None, None]
    originals[1] = still(originals[0].parameters(), torch.optim.SGD)
    originals[2] = lcw_ops.activate_gradients(originals[1], "tanh", params=[originals[0].weight])
    # The order decides which object is rebuilt first; the others are rebuilt with it.
    found = dict(zip(order, copied([originals[index] for index in order]), strict=True))
    model, optimizer, handle = (found[index] for index in range(3))
    assert type(optimizer) is torch.optim.SGD
    own = list(originals[0].parameters())
    before = set_gradients(own)
    params = list(model.parameters())
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, [f(gradients[0], "tanh"), gradients[1]])
    assert_gradients(own, before)
    handle.remove()
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, gradients)
    originals[1].step()
    assert_gradients(own, [f(before[0], "tanh"), before[1]])


@pytest.mark.parametrize("copied", [*COPIES.values(), copy.copy], ids=[*COPIES, "copy"])
def test_an_optimizer_copied_alone_keeps_its_activation_and_its_overrides(copied):
    optimizer = still([{"params": make_params((3,)), "activate_gradients": {"beta": 2.0}}])
    # This hook cannot be pickled. torch leaves hooks out of copies, and so do we.
    optimizer.register_step_pre_hook(lambda *_: None)
    lcw_ops.activate_gradients(optimizer)
    twin = copied(optimizer)
    del optimizer
    twin.load_state_dict(still(make_params((3,))).state_dict())
    params = twin.param_groups[0]["params"]
    gradients = set_gradients(params)
    twin.step()
    assert_gradients(params, [f(gradients[0], beta=2.0)])


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=str)
def test_copies_of_a_removed_activation_are_removed(copied, order):
    originals = [still(make_params()), None]
    originals[1] = lcw_ops.activate_gradients(originals[0])
    originals[1].remove()
    found = dict(zip(order, copied([originals[index] for index in order]), strict=True))
    params = found[0].param_groups[0]["params"]
    gradients = set_gradients(params)
    found[0].step()
    assert_gradients(params, gradients)
    found[1].remove()
    lcw_ops.activate_gradients(found[0])
    found[0].step()
    assert_gradients(params, map(f, gradients))


def test_a_handle_outlives_its_optimizer_and_can_be_copied():
    handle = lcw_ops.activate_gradients(still(make_params()))
    gc.collect()
    for copied in COPIES.values():
        copied(handle).remove()
    assert copy.copy(handle) is handle


def test_removing_leaves_the_optimizer_as_it_was():
    params = make_params()
    optimizer = still(params)
    before = set(optimizer.__dict__)
    handles = [lcw_ops.activate_gradients(optimizer, params=[param]) for param in params[:2]]
    handles[0].remove()
    twin = copy.deepcopy(optimizer)
    gradients = set_gradients(twin.param_groups[0]["params"])
    twin.step()
    expected = [gradients[0], f(gradients[1]), gradients[2]]
    assert_gradients(twin.param_groups[0]["params"], expected)
    handles[1].remove()
    assert set(optimizer.__dict__) == before


def test_remove_ends_the_activation_of_a_shallow_copy_too():
    params = make_params()
    optimizer = still(params)
    handle = lcw_ops.activate_gradients(optimizer)
    twin = copy.copy(optimizer)
    gradients = set_gradients(params)
    twin.step()
    assert_gradients(params, map(f, gradients))
    handle.remove()
    gradients = set_gradients(params)
    twin.step()
    assert_gradients(params, gradients)
    lcw_ops.activate_gradients(twin)


def test_hooks_of_another_process_do_not_take_the_place_of_ours():
    optimizer = pickle.loads(pickle.dumps(_with_activation()))
    for _ in range(3):
        optimizer.register_step_pre_hook(lambda *_: None)
    params = optimizer.param_groups[0]["params"]
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, map(f, gradients))


def _with_activation():
    optimizer = still(make_params())
    lcw_ops.activate_gradients(optimizer)
    return optimizer


def test_state_dict_is_torchs():
    params = make_params()
    assert _with_activation().state_dict() == still(params).state_dict()


# ---- GradScaler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_gradients_are_unscaled_before_the_activation_and_once(fused, unscale):
    params = make_params()
    others = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], 0.1, fused=fused)
    lcw_ops.activate_gradients(optimizer, params=params[:1])
    lcw_ops.activate_gradients(optimizer, "tanh", params=params[1:2])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    gradients = [torch.randn_like(param) for param in params]
    scaler.scale(sum((p * g).sum() for p, g in zip(params, gradients, strict=True))).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert not hasattr(optimizer, "grad_scale")
    expected = [f(gradients[0]), f(gradients[1], "tanh"), gradients[2]]
    assert_gradients(params, expected)
    for other, gradient in zip(others, expected, strict=True):
        other.grad = gradient
    torch.optim.SGD(others, 0.1, fused=fused).step()
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)


def test_all_gradients_of_a_fused_optimizer_are_unscaled_before_the_activation():
    params = make_params()
    optimizer = still(params, fused=True)
    lcw_ops.activate_gradients(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    gradients = [torch.randn_like(param, requires_grad=False) for param in params]
    scaler.scale(sum((p * g).sum() for p, g in zip(params, gradients, strict=True))).backward()
    scaler.step(optimizer)
    assert_gradients(params, map(f, gradients))


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_skips_the_step(fused):
    params = make_params()
    before = [param.detach().clone() for param in params]
    optimizer = torch.optim.AdamW(params, 0.1, fused=fused)
    lcw_ops.activate_gradients(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    scaler.scale(sum((p * 1e20).sum() for p in params)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**99
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)
        # The gradient is untouched if the step was not even called.
        assert fused or param.grad.isinf().all()


def test_an_optimizer_that_unscales_by_itself_is_refused():
    class Own(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure=None, grad_scaler=None):
            return super().step(closure)

    params = make_params()
    optimizer = Own(params, 0.1)
    lcw_ops.activate_gradients(optimizer)
    gradients = set_gradients(params)
    with pytest.raises(RuntimeError, match=r"Own.step takes grad_scaler"):
        optimizer.step(grad_scaler=object())
    assert_gradients(params, gradients)


# ---- Refusals --------------------------------------------------------------------------------------------------------


def test_sparse_gradients_are_refused_before_any_gradient_changes():
    params = make_params((3,), (4, 2))
    optimizer = still([{"params": params[:1]}, {"params": params[1:]}])
    handle = lcw_ops.activate_gradients(optimizer)
    gradients = set_gradients(params[:1])
    params[1].grad = torch.sparse_coo_tensor([[1]], [[1.0, 2.0]], (4, 2), check_invariants=True)
    with pytest.raises(TypeError, match=r"activate_gradients: param_groups\[1\].*sparse.*dense.*sparse=False"):
        optimizer.step()
    assert_gradients(params[:1], gradients)
    handle.remove()
    lcw_ops.activate_gradients(optimizer, params=params[:1])
    optimizer.step()
    assert_gradients(params[:1], map(f, gradients))


def test_complex_gradients_are_refused():
    params = [*make_params((3,)), nn.Parameter(torch.ones(2, dtype=torch.complex64))]
    optimizer = still(params)
    lcw_ops.activate_gradients(optimizer)
    gradients = set_gradients(params)
    with pytest.raises(TypeError, match=r"shape \(2,\) is torch.complex64; expected float32"):
        optimizer.step()
    assert_gradients(params, gradients)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_gradients_with_a_graph_are_refused_before_any_changes():
    params = [*make_params((3,)), nn.Parameter(torch.randn(4))]
    optimizer = still([{"params": params[:1]}, {"params": params[1:], "activate_gradients": {"beta": 3.0}}])
    lcw_ops.activate_gradients(optimizer)
    gradients = set_gradients(params[:1])
    params[1].pow(4).sum().backward(create_graph=True)
    with pytest.raises(ValueError, match=r"param_groups\[1\].*create_graph=True.*reference\.gradient_activation"):
        optimizer.step()
    assert_gradients(params[:1], gradients)
    gradients.append(params[1].grad.detach().clone())
    params[1].grad = params[1].grad.detach()
    optimizer.step()
    assert_gradients(params, [f(gradients[0]), f(gradients[1], beta=3.0)])


def test_differentiable_steps_are_refused():
    params = make_params()
    match = r"differentiable=True.*reference\.gradient_activation"
    with pytest.raises(ValueError, match=match):
        lcw_ops.activate_gradients(still(params, differentiable=True))
    optimizer = still([{"params": params[:2]}, {"params": params[2:]}])
    lcw_ops.activate_gradients(optimizer)
    optimizer.param_groups[1]["differentiable"] = True
    gradients = set_gradients(params)
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert_gradients(params, gradients)


def test_inference_tensors_are_refused_outside_of_inference_mode():
    params = make_params((3,), (4,))
    optimizer = still(params)
    lcw_ops.activate_gradients(optimizer)
    gradients = set_gradients(params)
    with torch.inference_mode():
        params[1].grad = gradients[1].clone()
    with pytest.raises(ValueError, match=r"shape \(4,\) is an inference tensor"):
        optimizer.step()
    assert_gradients(params, gradients)
    with torch.inference_mode():
        optimizer.step()
    assert_gradients(params, map(f, gradients))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"kind": "sigmoid"}, ValueError, "activate_gradients: kind is 'sigmoid'"),
        ({"alpha": 0}, ValueError, "alpha is 0"),
        ({"beta": float("nan")}, ValueError, "beta is nan"),
        ({"beta": 1e39}, ValueError, "beta is 1e[+]39"),
        ({"params": []}, ValueError, "params is empty"),
        ({"params": nn.Parameter(torch.ones(2))}, TypeError, "params is a Parameter; expected a list"),
        ({"params": 3}, TypeError, "params is a int"),
        ({"params": [3]}, TypeError, r"params\[0\] is a int"),
        ({"params": [nn.Parameter(torch.ones(2))]}, ValueError, r"params\[0\] of shape \(2,\) is in no parameter"),
    ],
)
def test_arguments_are_checked(arguments, error, match):
    optimizer = still(make_params())
    with pytest.raises(error, match=match):
        lcw_ops.activate_gradients(optimizer, **arguments)
    assert not optimizer._optimizer_step_pre_hooks


def test_an_object_that_is_not_an_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"optimizer is a Linear; expected a torch\.optim\.Optimizer"):
        lcw_ops.activate_gradients(nn.Linear(2, 2))


@pytest.mark.parametrize("override", [True, "tanh", {"slope": 1.0}, {"kind": "sigmoid"}, {"alpha": -1.0}], ids=str)
def test_overrides_are_checked_at_once_and_at_every_step(override):
    params = make_params()
    optimizer = still([{"params": params, "activate_gradients": override}])
    with pytest.raises(ValueError, match="activate_gradients"):
        lcw_ops.activate_gradients(optimizer)
    del optimizer.param_groups[0]["activate_gradients"]
    lcw_ops.activate_gradients(optimizer)
    optimizer.param_groups[0]["activate_gradients"] = override
    gradients = set_gradients(params)
    with pytest.raises(ValueError, match="activate_gradients"):
        optimizer.step()
    assert_gradients(params, gradients)


@pytest.fixture
def checked(monkeypatch):
    """A list of the numbers that are checked."""
    from lcw_ops import _checks as checks

    values, check = [], checks.check_positive_float32
    monkeypatch.setattr(checks, "check_positive_float32", lambda name, *rest: (values.append(rest), check(name, *rest)))
    return values


def test_numbers_are_checked_only_where_they_have_changed(checked):
    params = make_params((2,), (3,), (4,))
    groups = [{"params": [param], "activate_gradients": {"beta": float(i + 2)}} for i, param in enumerate(params[:2])]
    optimizer = still(groups)
    lcw_ops.activate_gradients(optimizer)
    assert [entry for entry in checked if entry[0] == "beta"] == [("beta", 20.0), ("beta", 2.0), ("beta", 3.0)]
    checked.clear()
    for _ in range(2):
        gradients = set_gradients(params)
        optimizer.step()
        assert_gradients(params[:2], [f(gradients[0], beta=2.0), f(gradients[1], beta=3.0)])
    assert not checked
    # The number changes in the same dictionary, in a new one, and in a new group.
    optimizer.param_groups[0]["activate_gradients"]["alpha"] = 0.7
    optimizer.param_groups[1]["activate_gradients"] = {"kind": "tanh"}
    optimizer.add_param_group({"params": params[2:], "activate_gradients": {"beta": 5.0}})
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, [f(gradients[0], alpha=0.7, beta=2.0), f(gradients[1], "tanh"), f(gradients[2], beta=5.0)])
    assert len(checked) == 6
    checked.clear()
    optimizer.step()
    assert not checked


@pytest.mark.parametrize("value", [True, torch.tensor(1.0), [1.0], "1.0", -1.0, math.nan], ids=repr)
def test_a_number_that_has_changed_is_checked_before_any_gradient_changes(value):
    params = make_params((2,), (3,))
    optimizer = still([{"params": params[:1]}, {"params": params[1:], "activate_gradients": {"alpha": 1.0}}])
    lcw_ops.activate_gradients(optimizer)
    optimizer.step()
    optimizer.param_groups[1]["activate_gradients"]["alpha"] = value
    gradients = set_gradients(params)
    with pytest.raises((TypeError, ValueError), match=r"activate_gradients: param_groups\[1\]: alpha is"):
        optimizer.step()
    assert_gradients(params, gradients)


def test_overrides_are_checked_when_they_are_loaded():
    params = make_params((2,), (3,))
    optimizer = still([{"params": params[:1]}, {"params": params[1:]}], momentum=0.9)
    lcw_ops.activate_gradients(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["momentum"] = 0.5
    saved["param_groups"][1]["activate_gradients"] = {"kind": "relu"}
    with pytest.raises(ValueError, match=r"param_groups\[1\]: kind is 'relu'"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_activating_twice_is_refused():
    params = make_params()
    optimizer = still(params)
    lcw_ops.activate_gradients(optimizer, params=params[:2])
    for again in (None, params[1:]):
        with pytest.raises(ValueError, match=r"already.*remove\(\)"):
            lcw_ops.activate_gradients(optimizer, params=again)
    lcw_ops.activate_gradients(optimizer, params=params[2:])


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_an_optimizer_that_activates_itself_is_refused(kind):
    params = make_params()
    optimizer = kind(params, lr=0.1)
    with pytest.raises(ValueError, match=r"second time.*gradient_activation=None"):
        lcw_ops.activate_gradients(optimizer)
    optimizer.param_groups[0]["gradient_activation"] = None
    lcw_ops.activate_gradients(optimizer)
    optimizer.param_groups[0]["gradient_activation"] = "tanh"
    gradients = set_gradients(params)
    with pytest.raises(ValueError, match="second time"):
        optimizer.step()
    assert_gradients(params, gradients)


# ---- register_gradient_hook ------------------------------------------------------------------------------------------


def backward(module, gradients):
    sum((param * gradient).sum() for param, gradient in zip(module.parameters(), gradients, strict=True)).backward()


def random_gradients(module):
    return [torch.randn_like(param, requires_grad=False) for param in module.parameters()]


def test_every_parameter_is_activated_after_backward():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    module[1].weight.requires_grad_(False)
    handle = lcw_ops.register_gradient_hook(module, "log", 0.3, 5.0)
    gradients = random_gradients(module)
    backward(module, gradients)
    gradients[2] = None
    for param, gradient in zip(module.parameters(), gradients, strict=True):
        assert (param.grad is None) if gradient is None else torch.equal(param.grad, f(gradient, "log", 0.3, 5.0))
    handle.remove()
    handle.remove()
    module.zero_grad()
    gradients = random_gradients(module)
    backward(module, gradients)
    assert torch.equal(module[0].weight.grad, gradients[0])


def test_two_backward_passes_activate_twice_as_documented():
    module = nn.Linear(3, 4)
    lcw_ops.register_gradient_hook(module)
    first, second = random_gradients(module), random_gradients(module)
    backward(module, first)
    backward(module, second)
    assert_gradients(module.parameters(), [f(f(a) + b) for a, b in zip(first, second, strict=True)])


def test_shared_parameters_are_activated_once():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    lcw_ops.register_gradient_hook(module)
    x = torch.randn(5, 3)
    gradient = torch.autograd.grad(module(x).square().sum(), module[0].weight)[0]
    module(x).square().sum().backward()
    assert torch.equal(module[0].weight.grad, f(gradient))


@pytest.fixture
def conversion(request):
    """Sets torch's switches for the way a conversion treats parameters."""
    switches = {
        "overwrite": torch.__future__.set_overwrite_module_params_on_conversion,
        "swap": torch.__future__.set_swap_module_params_on_conversion,
    }
    for name in request.param:
        switches[name](True)
    yield request.param
    for switch in switches.values():
        switch(False)


def with_conversions(*ways):
    return pytest.mark.parametrize("conversion", ways or [(), ("overwrite",), ("swap",)], indirect=True, ids=str)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copied_handle_removes_nothing(copied):
    module = nn.Linear(3, 4)
    handle = lcw_ops.register_gradient_hook(module)
    twin, twins_handle = copied((module, handle))
    twin.weight = nn.Parameter(torch.randn(4, 3))
    gradients = random_gradients(twin)
    backward(twin, gradients)
    assert_gradients(twin.parameters(), gradients)
    twins_handle.remove()
    backward(module, gradients)
    assert_gradients(module.parameters(), map(f, gradients))
    copy.copy(handle).remove()
    module.zero_grad()
    backward(module, gradients)
    assert_gradients(module.parameters(), gradients)


@with_conversions()
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_conversion_of_a_copy_leaves_the_module_alone(copied, conversion):
    module = nn.Linear(3, 4)
    lcw_ops.register_gradient_hook(module)
    twin = copied(module)
    assert twin.double() is twin
    assert twin.weight.dtype == torch.float64
    assert module.weight.dtype == torch.float32
    assert not twin.weight._post_accumulate_grad_hooks
    gradients = random_gradients(module)
    backward(module, gradients)
    assert_gradients(module.parameters(), map(f, gradients))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_the_module_has_no_hooks_and_can_be_given_some(copied):
    module = nn.Linear(3, 4)
    lcw_ops.register_gradient_hook(module)
    twin = copied(module)
    gradients = random_gradients(twin)
    backward(twin, gradients)
    assert_gradients(twin.parameters(), gradients)
    twin.zero_grad()
    lcw_ops.register_gradient_hook(twin)
    backward(twin, gradients)
    assert_gradients(twin.parameters(), map(f, gradients))
    backward(module, gradients)
    assert_gradients(module.parameters(), map(f, gradients))


def assign_weight(module):
    module[0].weight = nn.Parameter(torch.randn(3, 2))


def assign_layer(module):
    module[1] = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def load(module, **options):
    module.load_state_dict({name: torch.randn_like(value) for name, value in module.state_dict().items()}, **options)


def from_meta(module):
    module.to("meta")
    module.to_empty(device="cpu")
    load(module)


def change_and_restore(module):
    parametrizations.weight_norm(module[0])
    parametrize.remove_parametrizations(module[0], "weight")


REPLACEMENTS = {
    "double": lambda module: module.double(),
    "double, twice": lambda module: module.double().float().double(),
    "one part": lambda module: module[0].double(),
    "a parent": lambda module: nn.Sequential(module).double(),
    "to_empty": from_meta,
    "load": load,
    "load and assign": lambda module: load(module, assign=True),
    "assign a parameter": assign_weight,
    "assign a submodule": assign_layer,
    "append": lambda module: module.append(nn.Linear(2, 2)),
    "swap by hand": lambda module: torch.utils.swap_tensors(module[0].weight, nn.Parameter(torch.randn(3, 2))),
    "parametrize": lambda module: parametrize.register_parametrization(module[0], "weight", nn.Tanh()),
    "parametrize with new parameters": lambda module: parametrizations.weight_norm(module[0]),
    "parametrize and restore": change_and_restore,
}


@with_conversions()
@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
@pytest.mark.parametrize("is_kept", [False, True])
def test_parameters_that_take_the_place_of_others_are_activated_once(replace, conversion, is_kept):
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    handle = lcw_ops.register_gradient_hook(module, "log", 0.3, 5.0)
    kept = list(module.parameters()) if is_kept else []
    replace(module)
    gradients = random_gradients(module)
    backward(module, gradients)
    assert_gradients(module.parameters(), (f(gradient, "log", 0.3, 5.0) for gradient in gradients))
    with pytest.raises(ValueError, match=r"twice.*remove\(\)"):
        lcw_ops.register_gradient_hook(module)
    handle.remove()
    module.zero_grad()
    backward(module, gradients)
    assert_gradients(module.parameters(), gradients)
    # No hook follows a replacement any more, and replaced parameters are left alone too.
    replace(nn.Sequential(*module) if len(module) == 2 else module[:2])
    for param in [*kept, *module.parameters()]:
        assert not param._post_accumulate_grad_hooks
    lcw_ops.register_gradient_hook(module)
    module.zero_grad()
    gradients = random_gradients(module)
    backward(module, gradients)
    assert_gradients(module.parameters(), map(f, gradients))


@with_conversions(("overwrite",), ("swap",))
def test_a_conversion_before_the_forward_pass(conversion):
    module = nn.Linear(2, 1)
    lcw_ops.register_gradient_hook(module)
    module.double()
    x = torch.tensor([[0.3, -0.01]], dtype=torch.float64)
    module(x).sum().backward()
    expected = [0.1 * torch.atan(20 * x), 0.1 * torch.atan(torch.tensor([20.0], dtype=torch.float64))]
    for param, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-14, atol=0)


@with_conversions()
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_modules_that_convert_in_a_way_of_their_own(make, conversion):
    module = make(2, 3)
    lcw_ops.register_gradient_hook(module)
    module.double()
    gradients = random_gradients(module)
    backward(module, gradients)
    assert_gradients(module.parameters(), map(f, gradients))


@with_conversions()
def test_tied_parameters_are_activated_once_after_conversions(conversion):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    lcw_ops.register_gradient_hook(module)
    module.double()
    gradients = random_gradients(module)
    backward(module, gradients)
    assert_gradients(module.parameters(), map(f, gradients))


@with_conversions()
def test_two_handles_that_follow_one_module_activate_once(conversion):
    part = nn.Linear(3, 3)
    inner = lcw_ops.register_gradient_hook(part, "tanh")
    module = nn.Sequential(nn.Linear(3, 3))
    outer = lcw_ops.register_gradient_hook(module)
    module.append(part)
    module.double()
    gradients = random_gradients(module)
    backward(module, gradients)
    kinds = ["arctan", "arctan", "tanh", "tanh"]
    assert_gradients(module.parameters(), [f(g, kind) for g, kind in zip(gradients, kinds, strict=True)])
    inner.remove()
    outer.remove()
    assert not any(param._post_accumulate_grad_hooks for param in module.parameters())


@with_conversions()
def test_a_parameter_that_needed_no_gradient_has_no_hook_until_another_takes_its_place(conversion):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight.requires_grad_(False)
    lcw_ops.register_gradient_hook(module)
    module.double()
    module[1].weight.requires_grad_(True)
    gradients = random_gradients(module)
    backward(module, gradients)
    expected = [f(gradient) for gradient in gradients]
    assert_gradients(module.parameters(), [*expected[:2], gradients[2], expected[3]])
    module.zero_grad()
    module[1].weight = nn.Parameter(module[1].weight.detach().clone())
    backward(module, gradients)
    assert_gradients(module.parameters(), expected)


@with_conversions()
def test_a_parameter_frozen_after_it_was_hooked_is_activated_when_it_is_trained_again(conversion):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].bias.requires_grad_(False)
    handle = lcw_ops.register_gradient_hook(module)
    module[0].weight.requires_grad_(False)
    for convert in (module.double, module.float):
        convert()
        assert [param.requires_grad for param in module.parameters()] == [False, True, True, False]
        gradients = random_gradients(module)
        backward(nn.ParameterList([module[0].bias, module[1].weight]), gradients[1:3])
        assert module[0].weight.grad is None
        module.zero_grad()
    module.requires_grad_()
    gradients = random_gradients(module)
    backward(module, gradients)
    assert_gradients(module.parameters(), [*map(f, gradients[:3]), gradients[3]])
    handle.remove()
    assert not any(param._post_accumulate_grad_hooks for param in module.parameters())


@with_conversions(("overwrite",))
@pytest.mark.parametrize("inference", [False, True])
def test_a_frozen_parameter_may_become_one_that_can_never_require_a_gradient(conversion, inference):
    module = nn.Linear(2, 2)
    lcw_ops.register_gradient_hook(module)
    module.requires_grad_(False)
    with torch.inference_mode(inference):
        module._apply(lambda tensor: tensor.double() if inference else tensor.to(torch.int8))
    module.float()
    assert not any(param.requires_grad for param in module.parameters())


def test_a_live_parameter_that_is_swapped_with_a_hooked_one_gets_no_hook():
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    handle = lcw_ops.register_gradient_hook(module)
    for _ in range(2):
        torch.utils.swap_tensors(module.weight, other.weight)
        for part, expected in ((module, f), (other, torch.Tensor.clone)):
            part.zero_grad()
            gradients = random_gradients(part)
            backward(part, gradients)
            assert_gradients(part.parameters(), map(expected, gradients))
    handle.remove()
    module.zero_grad()
    backward(module, gradients)
    assert_gradients(module.parameters(), gradients)


def test_a_hook_of_the_users_survives_a_swap_with_ours():
    module, seen = nn.Linear(2, 2), []
    lcw_ops.register_gradient_hook(module)
    module.weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.clone()))
    torch.utils.swap_tensors(module.weight, nn.Parameter(torch.zeros(2, 2)))
    gradients = random_gradients(module)
    backward(module, gradients)
    assert torch.equal(seen[0], f(gradients[0]))
    assert len(seen) == 1


def test_parameters_of_a_functional_call_are_left_alone():
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    lcw_ops.register_gradient_hook(module)
    params, x = dict(other.named_parameters()), torch.randn(3, 2)
    torch.func.functional_call(module, params, (x,)).sum().backward()
    assert torch.equal(other.weight.grad, x.sum(0).expand(2, 2))


def test_no_hook_keeps_a_module_alive():
    module = nn.Sequential(nn.Linear(2, 2))
    handle = lcw_ops.register_gradient_hook(module)
    alive = weakref.ref(module[0])
    gc.disable()
    try:
        del module
        assert alive() is None
    finally:
        gc.enable()
    handle.remove()


def test_a_part_that_averages_gradients_is_refused_later_too():
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    module = nn.Sequential(nn.Linear(2, 2))
    lcw_ops.register_gradient_hook(module)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        module.append(wrapped)


def test_lazy_modules_are_refused_before_any_hook_is_set():
    module = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"register_gradient_hook.*uninitialized.*Call the module once"):
        lcw_ops.register_gradient_hook(module)
    assert not module[0].weight._post_accumulate_grad_hooks
    module(torch.randn(1, 2))
    lcw_ops.register_gradient_hook(module)


@with_conversions(("overwrite",), ("swap",))
def test_a_compiled_module_is_activated_before_and_after_a_conversion(conversion):
    module = nn.Linear(2, 1)
    lcw_ops.register_gradient_hook(module)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for dtype in (torch.float32, torch.float64):
        module.to(dtype)
        module.zero_grad()
        x = torch.randn(3, 2, dtype=dtype)
        compiled(x).sum().backward()
        assert_gradients(module.parameters(), [f(x.sum(0, keepdim=True)), f(torch.full((1,), 3.0, dtype=dtype))])


def test_loading_a_state_dict_keeps_the_hooks():
    module = nn.Linear(3, 4)
    lcw_ops.register_gradient_hook(module)
    module.load_state_dict(nn.Linear(3, 4).state_dict())
    gradients = random_gradients(module)
    backward(module, gradients)
    assert_gradients(module.parameters(), map(f, gradients))


def test_sparse_gradients_are_refused_in_backward():
    module = nn.Embedding(5, 2, sparse=True)
    lcw_ops.register_gradient_hook(module)
    with pytest.raises(TypeError, match=r"register_gradient_hook.*sparse"):
        module(torch.tensor([1])).sum().backward()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_gradients_with_a_graph_are_refused_in_backward():
    module = nn.Linear(3, 1, bias=False)
    lcw_ops.register_gradient_hook(module)
    loss = module(torch.randn(4, 3)).pow(4).sum()
    with pytest.raises(ValueError, match=r"register_gradient_hook.*create_graph=True.*reference\.gradient_activation"):
        loss.backward(create_graph=True)


def test_distributed_data_parallel_is_refused_at_any_depth():
    # The constructor would need a process group. The check looks at the class only.
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Linear(2, 2)
    for module in (wrapped, nn.Sequential(nn.Linear(2, 2), nn.Sequential(wrapped))):
        with pytest.raises(ValueError, match=r"DistributedDataParallel.*activate_gradients\(optimizer\)"):
            lcw_ops.register_gradient_hook(module)


def test_compiled_autograd_runs_the_hooks():
    module = nn.Linear(3, 2)
    lcw_ops.register_gradient_hook(module)
    gradients = random_gradients(module)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: backward(module, gradients), backend="eager")()
    assert_gradients(module.parameters(), map(f, gradients))


def test_modules_that_cannot_be_hooked_are_refused():
    module = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="module is a list"):
        lcw_ops.register_gradient_hook(list(module.parameters()))
    with pytest.raises(ValueError, match="kind is 'relu'"):
        lcw_ops.register_gradient_hook(module, "relu")
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        lcw_ops.register_gradient_hook(nn.ReLU())
    lcw_ops.register_gradient_hook(module)
    with pytest.raises(ValueError, match=r"twice.*remove\(\)"):
        lcw_ops.register_gradient_hook(nn.Sequential(module))
