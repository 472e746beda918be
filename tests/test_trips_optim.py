"""How far one optimizer step travels: Python calls of this package, and changes from one of its files to another.

Calls and returns both count as changes. Before Python 3.12 a comprehension is a call too. The first two steps make the
states and check everything; the limits apply to the steps after them.
"""

import sys
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import lcw_ops
from lcw_ops import optim
from lcw_ops.ops import backends
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.optim import _activated

PACKAGE = str(Path(lcw_ops.__file__).parent)


def trip(function) -> tuple[int, int]:
    """The numbers of calls and of changes of file in this package while ``function`` runs."""
    files = []
    calls = 0

    def watch(frame, event, _):
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls += 1
            files.append(frame.f_code.co_filename)
        elif event == "return" and frame.f_code.co_filename.startswith(PACKAGE):
            caller = frame.f_back
            while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
                caller = caller.f_back
            if caller is not None:
                files.append(caller.f_code.co_filename)

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls, sum(one != other for one, other in pairwise(files))


@pytest.fixture(autouse=True)
def no_hooks(monkeypatch):
    """Hide hooks of other tests that are still alive. A step would look through them for optimizers around it."""
    monkeypatch.setattr(_activated, "attached_hooks", weakref.WeakSet())


def trip_of_a_step(make) -> tuple[int, int]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2))
    optimizer = make(model.parameters())
    for _ in range(2):
        model(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()
    return trip(optimizer.step)


@pytest.mark.skipif(backends.choose(ops.SGD_STEP, torch.device("cpu")) != "cpp", reason="no compiled kernels here")
@pytest.mark.parametrize(
    ("name", "options", "calls", "changes"),
    [
        ("SGD", {}, 25, 8),
        ("SGD", {"gradient_activation": "tanh", "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}, 25, 8),
        ("SGD", {"activate": "momentum", "momentum": 0.9}, 25, 8),
        # AdamW's counts of steps are checked and incremented.
        ("AdamW", {}, 28, 14),
        ("AdamW", {"gradient_activation": "log", "amsgrad": True}, 28, 14),
    ],
)
def test_an_activated_step_is_a_short_trip(name, options, calls, changes):
    counted = trip_of_a_step(lambda params: getattr(optim, name)(params, lr=0.1, **options))
    assert counted[0] <= calls
    assert counted[1] <= changes


@pytest.mark.skipif(backends.choose(ops.SGD_STEP, torch.device("cpu")) != "cpp", reason="no compiled kernels here")
@pytest.mark.parametrize(("name", "calls", "changes"), [("SGD", 25, 8), ("AdamW", 28, 14)])
def test_a_step_is_as_short_after_torch_compile(name, calls, changes):
    """The first compilation puts a wrapper around ``_init_group`` of every optimizer of torch."""
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert hasattr(getattr(torch.optim, name)._init_group, "_torchdynamo_orig_callable")
    counted = trip_of_a_step(lambda params: getattr(optim, name)(params, lr=0.1))
    assert counted[0] <= calls
    assert counted[1] <= changes


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_without_activation_the_step_is_torchs(name):
    calls, changes = trip_of_a_step(lambda params: getattr(optim, name)(params, gradient_activation=None))
    assert calls <= 5
    assert changes <= 2


def test_the_counted_step_reaches_the_parameters():
    """A step that did nothing would be short too."""
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = optim.SGD([param], lr=0.1)
    assert trip(optimizer.step)[0] > 0
    assert (param < 0).all()
