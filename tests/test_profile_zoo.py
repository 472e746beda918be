"""The profiler with default arguments on every model of the zoo: all parameters, a reason for every missing figure."""

import copy
import dataclasses
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


def floating(output):
    """The floating-point and complex tensors of an output."""
    if dataclasses.is_dataclass(output):
        output = vars(output)
    leaves = torch.utils._pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [
        leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    ]


def loss_of_all(output):
    """Depends on every tensor of the output, and on some entries more than on others."""
    return sum((tensor.abs().double().square() / (1 + tensor.abs().double())).sum() for tensor in floating(output))


def norm(tensors):
    wide = [tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64) for tensor in tensors]
    return math.hypot(*(tensor.abs().square().sum().sqrt().item() for tensor in wide))


def recorded(model, args, kwargs):
    """One pass: for every call of a leaf module by name the copied outputs and their gradients, in lists."""
    calls, times, handles = {}, {}, []

    def record(name):
        def hook(module, args, output):
            times[name] = times.get(name, 0) + 1
            key = name if times[name] == 1 else f"{name}#{times[name]}"
            tensors = [tensor for tensor in floating(output) if tensor.numel()]
            calls[key] = [tensor.detach().clone() for tensor in tensors], []
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: calls[key][1].append(gradient.clone()))

        return hook

    for name, module in model.named_modules():
        if not list(module.children()):
            handles.append(module.register_forward_hook(record(name or type(module).__name__)))
    loss = loss_of_all(model(*args, **kwargs))
    # Calls that a checkpoint repeats are not recorded again.
    for handle in handles:
        handle.remove()
    loss.backward()
    return calls


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_figures_of_every_model_are_those_of_the_recorded_tensors_in_float64(name):
    entry = MODELS[name]()
    model, kwargs = entry.model, dict(entry.kwargs or {})
    args = entry.inputs if isinstance(entry.inputs, tuple) else (entry.inputs,)
    if isinstance(entry.inputs, dict) and name != "dataclass_output":
        args, kwargs = (), {**entry.inputs, **kwargs}
    if name == "lazy":
        model(*args, **kwargs)
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        # Running statistics change in every pass.
        model.eval()
    torch.manual_seed(5)
    result = profile(model, entry.inputs, loss=loss_of_all, kwargs=entry.kwargs, jacobian=False, repeats=1)
    torch.manual_seed(5)
    calls = recorded(model, args, kwargs)
    rows = {row: place for place, row in enumerate(result.columns["name"])}
    compared = 0
    for call, (outputs, gradients) in calls.items():
        if call not in rows or not outputs:
            continue
        place, expected = rows[call], [tensor for tensor in outputs if tensor.dim()][:1] or outputs[:1]
        rms = norm(expected) / math.sqrt(expected[0].numel())
        assert result.columns["state_rms"][place] == pytest.approx(rms, rel=1e-5), call
        if not expected[0].is_complex():
            # float64 sums of the same numbers, in another order.
            mean, sizes = expected[0].double().mean().item(), expected[0].double().abs().mean().item()
            assert result.columns["state_mean"][place] == pytest.approx(mean, rel=1e-5, abs=1e-12 * sizes), call
        if gradients and name != "checkpointed_reentrant":
            assert result.columns["gradient_norm"][place] == pytest.approx(norm(gradients), rel=1e-5), call
        compared += 1
    for module_name, module in model.named_modules():
        parametrizations = module.parametrizations.parameters() if hasattr(module, "parametrizations") else ()
        own = [*module.parameters(recurse=False), *parametrizations]
        own = [parameter for parameter in own if parameter.grad is not None]
        own = [parameter for parameter in own if parameter.dim() > 1] or own
        place = rows.get(module_name or type(module).__name__)
        if place is not None and own:
            found = result.columns["weight_gradient_norm"][place]
            assert found == pytest.approx(norm([parameter.grad for parameter in own]), rel=1e-5), module_name
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize("name", SLOW_MODELS)
def test_every_slow_model_has_all_its_figures_or_reasons(name):
    if name in ("bert", "gpt2"):
        pytest.importorskip("transformers", reason="the extra [hosts] is not installed")
    check(SLOW_MODELS[name]())


def test_the_zoo_is_large_enough():
    assert len({*MODELS, *SLOW_MODELS}) >= 25
