"""The profiler with default arguments on every model of the zoo: all parameters, a reason for every missing figure."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from torch.nn.parameter import is_lazy
from zoo import MODELS, SLOW_MODELS

from lcw_ops.profile import machine, profile
from lcw_ops.profile.result import COLUMNS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def known_matmul_rate(monkeypatch):
    """The default measures it at every profile, which would take most of the time of these tests."""
    monkeypatch.setattr(machine, "matmul_rate", lambda device: 1e10)


def values_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not is_lazy(tensor)}


def check(entry):
    model, before = entry.model, values_of(entry.model)
    inputs, random_state = copy.deepcopy(entry.inputs), torch.get_rng_state()
    result = profile(model, entry.inputs, kwargs=entry.kwargs)

    # Every parameter is counted once.
    names = list(result.columns["name"])
    assert len(set(names)) == len(names) == len(result) > 0
    assert set(entry.rows) <= set(names)
    if not any(map(is_lazy, model.parameters())):
        assert result.columns["parameters"].sum() == sum(parameter.numel() for parameter in model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert np.isfinite(result.columns["weight_gradient_norm"]).any() or not trained

    # A missing figure has a reason, which is never an error, and all others are finite.
    for column in COLUMNS:
        if column == "name":
            continue
        reasons = [result.reason(column, row) for row in range(len(result))]
        for value, reason in zip(result.columns[column], reasons, strict=True):
            assert math.isfinite(value) if reason is None else math.isnan(value) and len(reason) > 10
            assert not re.match(r"\w*(Error|Exception)\b", reason or ""), f"{column}: {reason}"

    assert result.absent.keys() == entry.absent.keys(), result.absent
    for figure, part in entry.absent.items():
        assert part in result.absent[figure]
    assert set(result.timing.uncounted) >= set(entry.uncounted)
    assert bool(result.timing.uncounted) == bool(entry.uncounted), result.timing.uncounted
    assert result.timing.forward_flops > 0
    assert result.timing.backward_flops > 0
    assert math.isfinite(result.timing.forward_seconds)
    assert result.peak_memory_bytes > 1e7
    assert (result.failure, result.not_finite) == (None, None)

    # Nothing was left behind.
    assert values_of(model).keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in values_of(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
    assert str(inputs) == str(entry.inputs)
    table = " ".join(result.table().split())
    assert all(reason in table for reason in result.absent.values())
    return result


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("error")
def test_every_model_has_all_its_figures_or_reasons(name):
    check(MODELS[name]())


@pytest.mark.parametrize("name", SLOW_MODELS)
def test_every_slow_model_has_all_its_figures_or_reasons(name):
    if name in ("bert", "gpt2"):
        pytest.importorskip("transformers", reason="the extra [hosts] is not installed")
    check(SLOW_MODELS[name]())


def test_the_zoo_is_large_enough():
    assert len({*MODELS, *SLOW_MODELS}) >= 25
