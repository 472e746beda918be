"""A user's own FlopCounterMode counts the matrix products inside the ops, in every order of import."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from lcw_ops import functional as F
from lcw_ops import nn, use_backend
from lcw_ops.ops import flops

# Samples, units, layers, and the inputs and outputs of a net. PRODUCT: the flops of one product in each of the layers.
M, N, L, IN, OUT = 5, 8, 12, 3, 2
PRODUCT = 2 * M * N * N * L

COUNT = """
import json, sys, torch
from lcw_ops import nn
from torch.utils.flop_counter import FlopCounterMode
counts = {}
def count(name, module, x):
    with FlopCounterMode(display=False) as forward:
        result = module(x)
    with FlopCounterMode(display=False) as backward:
        (result[0] if isinstance(result, tuple) else result).sum().backward()
    counts[name] = forward.get_total_flops(), backward.get_total_flops()
torch.manual_seed(0)
x = torch.randn(5, 3)
count("lcw", nn.LCWLinear(3, 4), x)
count("gmp", nn.GmPLinear(3, 4), x)
count("weight_norm", nn.WeightNormLinear(3, 4), x)
count("haar", nn.OrthogonalFilterMLP(3, 8, 12, 2), x)
count("cyclic", nn.OrthogonalFilterMLP(3, 8, 12, 2, filter="cyclic"), x)
count("parallel", nn.OrthogonalFilterMLP(3, 8, 12, 2, solver="parallel"), x)
count("rnn", nn.OrthogonalFilterRNN(3, 8, length=12), torch.randn(12, 5, 3))
assert not any(name.startswith("lcw_ops.profile") for name in sys.modules)
print(json.dumps(counts))
"""

# x needs no gradient: a layer has one product forward, for W x, and one backward, for the weight's gradient.
LAYER = [2 * M * IN * 4] * 2
# The flops of a net's input and output layers, forward and backward.
ENDS = [2 * M * N * (IN + OUT), 2 * M * N * (IN + 2 * OUT)]
MLP = [2 * PRODUCT + ENDS[0], 3 * PRODUCT + ENDS[1]]
EXPECTED = {
    "lcw": LAYER,
    "gmp": LAYER,
    "weight_norm": LAYER,
    "haar": MLP,
    "cyclic": [PRODUCT + ENDS[0], 2 * PRODUCT + ENDS[1]],
    "parallel": MLP,
    "rnn": [2 * PRODUCT + 2 * L * M * IN * N, 3 * PRODUCT + 2 * L * M * IN * N],
}


@pytest.mark.parametrize(
    "before",
    [
        "import lcw_ops",
        "import torch.utils.flop_counter, lcw_ops",
        "import lcw_ops; from torch.utils.flop_counter import FlopCounterMode",
        "import lcw_ops, torch; lcw_ops.functional.lcw_linear(torch.randn(2, 3), torch.randn(4, 3))",
        "import lcw_ops, importlib, torch.utils.flop_counter as counter; importlib.reload(counter)",
    ],
)
def test_in_every_order_of_import(before):
    result = subprocess.run([sys.executable, "-c", before + COUNT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == EXPECTED


def count(function, *arguments):
    """The flops of the function, and those of the backward pass from the sum of its result."""
    with FlopCounterMode(display=False) as forward:
        result = function(*arguments)
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def make_recurrence(filter_kind, shared, frozen):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*(() if shared else (L,)), N, N, generator=generator) / N**0.5
    filters = {
        "matrix": torch.eye(N),
        "per layer": torch.eye(N).repeat(L, 1, 1),
        "permutation": torch.arange(N).roll(1),
    }
    h0 = torch.randn(M, N, generator=generator).requires_grad_()
    inputs = torch.randn(L, M, N, generator=generator)
    return h0, weight.requires_grad_(not frozen), None, filters[filter_kind], None, None, inputs


@pytest.mark.parametrize("filter_kind", ["matrix", "per layer", "permutation"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("return_states", [True, False])
def test_the_recurrence_counts_as_torchs_own_operations_do(filter_kind, shared, frozen, return_states):
    arguments = *make_recurrence(filter_kind, shared, frozen), "tanh", return_states
    dense = filter_kind != "permutation"
    expected = (1 + dense) * PRODUCT, (1 + dense + (not frozen)) * PRODUCT
    assert count(F.orthogonal_filter, *arguments) == expected
    with use_backend("reference"):
        assert count(F.orthogonal_filter, *arguments) == expected
    if filter_kind != "per layer":
        for window in (None, 5):
            assert count(F.orthogonal_filter, *arguments, None, "parallel", None, window) == expected


@pytest.mark.parametrize("samples", [1, 70])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("scale",)])
@pytest.mark.parametrize("needs_x", [True, False])
def test_a_constrained_layer_counts_as_a_plain_one(samples, frozen, needs_x):
    x = torch.randn(samples, 6, requires_grad=needs_x)

    def parameter(name, *shape):
        return torch.randn(*shape).requires_grad_(name not in frozen)

    weight, bias = parameter("weight", 4, 6), parameter("bias", 4)
    plain = count(torch.nn.functional.linear, x, weight, bias)
    assert plain == (2 * samples * 24, (needs_x + ("weight" not in frozen)) * 2 * samples * 24)
    assert count(F.lcw_linear, x, weight, bias) == plain
    assert count(F.gmp_linear, x, parameter("weight", 4, 5), parameter("scale", 4), bias) == plain
    # One product gives the gradients of both weight and scale.
    product = 2 * samples * 24
    weight_or_scale = product * (needs_x + 1)
    assert count(F.weight_norm_linear, x, weight, parameter("scale", 4), bias) == (product, weight_or_scale)


def test_a_users_own_formula_stays(monkeypatch):
    registry = {torch.ops.lcw_ops.lcw_linear: lambda *args, **kwargs: 7}
    monkeypatch.setattr(flop_counter, "flop_registry", registry)
    flops.register()
    assert len(registry) == len(flops.FORMULAS)
    with FlopCounterMode(display=False) as counter:
        nn.LCWLinear(3, 2)(torch.randn(4, 3))
    assert counter.get_total_flops() == 7


def test_every_op_with_a_product_inside_has_a_formula():
    """The other ops go element by element over weights, gradients or the states of one sweep, or return a constant."""
    schemas = (schema.name for schema in torch._C._jit_get_all_schemas())
    ops = {name.removeprefix("lcw_ops::").split(".")[0] for name in schemas if name.startswith("lcw_ops::")}
    assert ops - flops.FORMULAS.keys() == {
        "activated_adamw_step_",
        "activated_sgd_step_",
        "fingerprint",
        "gmp_linear_few_samples",
        "gradient_activation_",
        "hypersphere_direction",
        "hypersphere_direction_backward",
        "lcw_weight",
        "lcw_weight_backward",
        "multiply_adds",
        "new_large",
        "normalize_scale",
        "normalize_scale_backward",
        "parallel_depth_activate_",
        "parallel_depth_adjoint_",
        "parallel_depth_sweep_",
        "set_least_pooled",
        "try_activated_adamw_step_",
        "try_activated_sgd_step_",
        "try_gradient_activation_",
    }
