"""Each private name of torch that the optimizers and hooks rely on exists, and works behind its plain name."""

from types import SimpleNamespace

import torch
from torch import nn

from lcw_ops import _torch


def make_optimizer(kind=torch.optim.SGD):
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    return kind([param], lr=0.5)


def test_a_running_step_is_found_from_inside():
    optimizer, seen = make_optimizer(), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(_torch.running_steps()))
    optimizer.step()
    assert seen == [[optimizer]]
    assert _torch.running_steps() == []


def test_functions_around_a_step_are_not_taken_for_one():
    """Not even one that has the name of torch's wrapper."""

    def wrapper(*args):
        return [_torch.running_steps(), optimizer.step(lambda: seen.append(_torch.running_steps()))]

    optimizer, seen = make_optimizer(), []
    assert wrapper("an argument") == [[], None]
    assert seen == [[optimizer]]


def test_hooks_are_added_under_a_key_and_removed():
    optimizer, calls = make_optimizer(), []
    assert _torch.runs_step_hooks(optimizer)
    assert _torch.has_step_hooks(optimizer)
    _torch.add_optimizer_hooks(optimizer, "key", lambda *_: calls.append("step"), lambda *_: calls.append("load"))
    assert list(_torch.step_hooks(optimizer)) == ["key"]
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["step", "load"]
    state = _torch.state_of_optimizer_hooks({"a": 1}, {"b": 2})
    assert {tuple(hooks.items()) for hooks in state.values()} == {(("a", 1),), (("b", 2),)}
    assert state.keys() <= vars(optimizer).keys()
    assert _torch.remove_optimizer_hooks(optimizer, "key")
    assert not _torch.remove_optimizer_hooks(optimizer, "key")
    optimizer.step()
    assert calls == ["step", "load"]


def test_a_class_with_a_replaced_step_is_wrapped_again():
    class Own(torch.optim.SGD):
        pass

    optimizer = make_optimizer(Own)
    Own.step = lambda self, closure=None: None
    assert not _torch.runs_step_hooks(optimizer)
    _torch.wrap_step(optimizer)
    assert _torch.runs_step_hooks(optimizer)


def test_the_step_without_hooks_is_torchs_own():
    optimizer, calls = make_optimizer(), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
    _torch.step_without_hooks(torch.optim.SGD)(optimizer)
    assert calls == []
    assert optimizer.param_groups[0]["params"][0].tolist() == [0.5, 0.5]


def test_outside_of_a_capture_every_optimizer_may_step():
    _torch.check_graph_capture(make_optimizer(torch.optim.AdamW))


def test_the_newer_name_of_the_check_for_a_capture_is_preferred():
    calls = []
    older = {"_cuda_graph_capture_health_check": lambda: calls.append("older")}
    _torch.check_graph_capture(SimpleNamespace(**older))
    newer = {"_accelerator_graph_capture_health_check": lambda: calls.append("newer")}
    _torch.check_graph_capture(SimpleNamespace(**older, **newer))
    assert calls == ["older", "newer"]


def test_gradients_are_divided_in_place():
    grads = [torch.full((3,), 8.0), torch.full((), 4.0)]
    _torch.divide_by_scale_(grads, torch.tensor(0.25))
    assert [grad.tolist() for grad in grads] == [[2.0] * 3, 1.0]


def test_hooks_on_a_parameter_are_seen():
    param = nn.Parameter(torch.ones(2))
    assert not _torch.gradient_hooks(param)
    handle = param.register_post_accumulate_grad_hook(print)
    assert _torch.gradient_hooks(param) == {handle.id: print}
    _torch.relink_gradient_hooks(param)
    assert _torch.gradient_hooks(param) == {handle.id: print}


def test_conversions_are_wrapped(monkeypatch):
    # monkeypatch restores the method afterwards.
    monkeypatch.setattr(nn.Module, "_apply", nn.Module._apply)
    calls = []

    def wrap(apply):
        def wrapped(module, *arguments, **options):
            calls.append(module)
            return apply(module, *arguments, **options)

        return wrapped

    _torch.wrap_conversions(wrap)
    layer = nn.Linear(2, 2)
    assert layer.double().weight.dtype is torch.float64
    assert calls == [layer]


def test_zeros_without_memory_are_told_apart():
    assert _torch.is_zeros_without_memory(torch._efficientzerotensor(2))
    assert not _torch.is_zeros_without_memory(torch.zeros(2))


def test_a_function_that_is_never_traced_runs_outside_of_the_program():
    traced = []

    @_torch.never_traced
    def inside():
        traced.append(torch.compiler.is_compiling())

    @torch.compile(backend="eager")
    def function(x):
        inside()
        return x + 1

    assert function(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert traced == [False]
