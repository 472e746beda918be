"""activate_gradients and register_gradient_hook: once per gradient, whatever optimizer, closure, copy or scaler."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import optim

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
    """An optimizer that moves nothing: what a step leaves is the activated gradient."""
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


def test_once_per_step_on_what_all_backwards_added_up():
    params = make_params()
    optimizer = still(params)
    lcw_ops.activate_gradients(optimizer)
    first, second = ([torch.randn_like(param) for param in params] for _ in range(2))
    for gradients in (first, second):
        sum((param * gradient).sum() for param, gradient in zip(params, gradients, strict=True)).backward()
    optimizer.step()
    assert_gradients(params, [f(a + b) for a, b in zip(first, second, strict=True)])


def test_remove_ends_it():
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


def test_neither_hook_nor_handle_keeps_the_optimizer():
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


def test_params_are_a_choice():
    params = make_params()
    optimizer = still(params)
    lcw_ops.activate_gradients(optimizer, params=(param for param in [params[1], params[1]]))
    lcw_ops.activate_gradients(optimizer, "tanh", params=[params[2]])
    gradients = set_gradients(params)
    optimizer.step()
    assert_gradients(params, [gradients[0], f(gradients[1]), f(gradients[2], "tanh")])


def test_groups_overrule():
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
    # The very same tensor, and in another group.
    params[-1].grad = params[3].grad
    expected.append(f(flat[:4], beta=settings.get("activate_gradients", {}).get("beta", 20.0)))
    expected[3] = expected[0]
    optimizer = still([{"params": [*params[:-1], params[0]]}, {"params": params[-1:], **settings}])
    lcw_ops.activate_gradients(optimizer)
    optimizer.step()
    assert_gradients(params, expected)


@pytest.mark.parametrize("left_out", ["by its group", "by params"])
def test_a_gradient_shared_with_a_parameter_that_is_left_out_stays_as_it_is_there(left_out):
    params, gradient = make_params((4,), (4,), (3, 2)), torch.randn(4)
    params[0].grad = params[1].grad = gradient.clone()
    # What is left out may be sparse.
    params[2].grad = torch.sparse_coo_tensor([[1]], [[1.0, 2.0]], (3, 2), check_invariants=True)
    by_group = left_out == "by its group"
    groups = [{"params": params[:1]}, {"params": params[1:], **({"activate_gradients": False} if by_group else {})}]
    optimizer = still(groups)
    lcw_ops.activate_gradients(optimizer, params=None if by_group else params[:1])
    optimizer.step()
    assert_gradients(params[:2], [f(gradient), gradient])


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
    """A class of its own, whose step torch has not wrapped: it wraps each once in a process."""

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
    # Every class of which there has been an optimizer runs the hooks around its step.
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


def test_an_optimizer_stepped_by_another_is_no_step_within_a_step():
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


def test_what_stands_before_the_closure_is_no_closure():
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
    # In any order: whichever is met first is put together around the others.
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
    # A hook that cannot be pickled: torch leaves such behind, and so do we.
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
def test_copies_of_what_has_ended_have_ended(copied, order):
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


def test_remove_ends_it_for_a_shallow_copy_too():
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


def test_hooks_of_another_process_do_not_take_its_place():
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
def test_gradients_are_unscaled_before_and_once(fused, unscale):
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


def test_all_gradients_of_a_fused_optimizer_are_unscaled_before():
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
        # Untouched, where the step was not even called.
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


def test_what_is_no_optimizer_is_refused():
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


def test_twice_is_refused():
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


def test_shared_parameters_once():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    lcw_ops.register_gradient_hook(module)
    x = torch.randn(5, 3)
    gradient = torch.autograd.grad(module(x).square().sum(), module[0].weight)[0]
    module(x).square().sum().backward()
    assert torch.equal(module[0].weight.grad, f(gradient))


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


def test_state_dicts_pass_by_the_hooks():
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
    # No process group here, which its constructor asks for; the class is what is looked at.
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


def test_what_cannot_be_hooked_is_refused():
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
