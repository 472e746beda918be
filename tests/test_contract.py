"""Every public function against the checks of contract.py. One entry in OPS gives a new function all of them.

They run on the device of LCW_OPS_TEST_DEVICE, with every backend that can run there.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import contract
import pytest
import torch
from contract import DEVICE, Op, normal, scaled
from support import pretended_device
from support.triton_process import multiply_bfloat16

from lcw_ops import functional as F
from lcw_ops import reference
from lcw_ops.ops import backends, gradient_activation, hypersphere, lcw_linear, weight_norm
from lcw_ops.ops.orthogonal_filter import op as orthogonal_filter
from lcw_ops.ops.parallel_depth import op as parallel_depth

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error::RuntimeWarning")]

# Sizes are (samples, units, inputs) for a layer and (units, inputs) for a weight. The inputs do not fill whole vectors.
# One layer has fewer samples than units, the other has more: LCW's constraint acts on the inputs or on the weight.
LAYER = {"sizes": ((6, 16, 21), (33, 7, 13)), "one": (1, 1, 1), "empty": ((0, 5, 7), (4, 0, 7)), "double": (3, 4, 5)}
ROWS = {"sizes": ((16, 21), (7, 33)), "one": (1, 1), "empty": ((0, 5),), "double": (3, 4)}


def draw_weight(size, dtype):
    return {"weight": normal(*size, dtype=dtype)}, normal(*size, dtype=dtype)


def draw_basis(size, dtype):
    n, m = size
    return {"weight": normal(n, max(m - 1, 0), dtype=dtype)}, normal(n, max(m, 1), dtype=dtype)


def draw_linear(size, dtype):
    rows, n, m = size
    arguments = {"x": (rows, m), "weight": (n, m), "bias": (n,)}
    return {name: normal(*shape, dtype=dtype) for name, shape in arguments.items()}, normal(rows, n, dtype=dtype)


def per_unit(n, dtype):
    """Lengths of either sign and of similar size, so that no unit sets the scale of another's result."""
    return ((torch.rand(n, dtype=torch.float64) + 0.5) * torch.randn(n).sign()).to(DEVICE, dtype)


def angles(n, m, dtype):
    """The angles of Gaussian rows, which are uniform on the sphere.

    A direction's last components are products of all sines; with random angles they would vanish.
    """
    return reference.hypersphere_angles(normal(n, m, dtype=torch.float64)).to(dtype)


def draw_direction(size, dtype):
    return {"angles": angles(*size, dtype)}, normal(*size, dtype=dtype)


def draw_angles(size, dtype):
    n, m = size
    # Gaussian rows lie away from the axes, where the angles have no derivative.
    return {"weight": normal(n, m, dtype=dtype)}, normal(n, m - 1, dtype=dtype)


def draw_normalize(size, dtype):
    return {"weight": normal(*size, dtype=dtype), "scale": per_unit(size[0], dtype)}, normal(*size, dtype=dtype)


def draw_gmp(size, dtype):
    rows, n, m = size
    arguments = {"x": normal(rows, m, dtype=dtype), "angles": angles(n, m, dtype), "radius": per_unit(n, dtype)}
    return {**arguments, "location": normal(n, dtype=dtype)}, normal(rows, n, dtype=dtype)


def draw_weight_norm(size, dtype):
    arguments, grad_output = draw_linear(size, dtype)
    x, weight, bias = arguments.values()
    return {"x": x, "weight": weight, "scale": per_unit(size[1], dtype), "bias": bias}, grad_output


def draw_recurrence(size, dtype):
    """Draw scales like those of a network that trains: beta about 1 / L, alpha = 1 - beta."""
    rows, width, steps = size
    beta = (0.5 + torch.rand(steps, dtype=torch.float64)).to(DEVICE) / max(steps, 1)
    wide = torch.promote_types(dtype, torch.float32)
    arguments = {
        "h0": normal(rows, width, dtype=dtype),
        "weight": scaled(steps, width, width, dtype=dtype),
        "bias": normal(steps, width, dtype=dtype),
        "alpha": (1 - beta).to(wide),
        "beta": beta.to(wide),
        "inputs": normal(steps, rows, width, dtype=dtype),
        "filter": torch.linalg.qr(normal(width, width, dtype=torch.float64)).Q.to(wide),
    }
    return arguments, normal(steps + 1, rows, width, dtype=dtype)


def plain_lcw_weight(weight):
    return weight - weight.mean(1, keepdim=True)


def plain_basis(weight):
    row_sum, s = weight.sum(1, keepdim=True), (weight.shape[1] + 1) ** 0.5
    return torch.cat([weight - row_sum / (s * (s + 1)), -row_sum / s], dim=1)


def plain_gmp(x, angles, radius, location):
    direction = reference.hypersphere_direction(angles)
    return radius * (torch.nn.functional.linear(x, direction) + location)


def plain_normalize(weight, scale):
    return scale[:, None] * weight / weight.norm(dim=1, keepdim=True)


def activate(gradient):
    """The op writes in place, so it gets a copy."""
    gradient = gradient.clone()
    F.gradient_activation_([gradient], "arctan", 0.1, 20.0)
    return gradient


def recurrence(solver):
    return lambda **arguments: F.orthogonal_filter(**arguments, return_states=True, solver=solver)


def plain_recurrence(h0, weight, bias, alpha, beta, inputs, filter):
    state, states = h0, [h0]
    for l, pre in enumerate(inputs):
        branch = torch.tanh(state @ weight[l].mT + bias[l] + pre)
        # alpha and beta, which are float32 for 16-bit states, keep this sum in float32.
        state = alpha[l] * (state.to(filter.dtype) @ filter.mT) + beta[l] * branch
        states.append(state.to(h0.dtype))
        state = state.to(h0.dtype)
    return torch.stack(states)


RECURRENCE = {
    "plain": plain_recurrence,
    "draw": draw_recurrence,
    "sizes": ((4, 9, 6), (5, 17, 3)),
    "one": (1, 1, 1),
    "empty": ((0, 5, 4), (3, 5, 0)),
    "double": (2, 3, 3),
    "constants": ("filter",),
}

OPS = {
    "lcw_weight": Op(F.lcw_weight, plain_lcw_weight, draw_weight, **ROWS),
    "lcw_weight basis": Op(lambda weight: F.lcw_weight(weight, basis=True), plain_basis, draw_basis, **ROWS),
    "lcw_linear": Op(
        F.lcw_linear,
        lambda x, weight, bias: torch.nn.functional.linear(x, plain_lcw_weight(weight), bias),
        draw_linear,
        **LAYER,
        autocast="narrow",
    ),
    "hypersphere_direction": Op(F.hypersphere_direction, reference.hypersphere_direction, draw_direction, **ROWS),
    "hypersphere_angles": Op(
        F.hypersphere_angles, reference.hypersphere_angles, draw_angles, **ROWS, dtypes=(torch.float32,)
    ),
    "normalize_scale": Op(F.normalize_scale, plain_normalize, draw_normalize, **ROWS),
    "gmp_linear": Op(F.gmp_linear, plain_gmp, draw_gmp, **LAYER, autocast="narrow"),
    "weight_norm_linear": Op(
        F.weight_norm_linear,
        lambda x, weight, scale, bias: torch.nn.functional.linear(x, plain_normalize(weight, scale), bias),
        draw_weight_norm,
        **LAYER,
        autocast="narrow",
    ),
    "gradient_activation_": Op(
        activate,
        lambda gradient: 0.1 * torch.atan(20.0 * gradient),
        lambda size, dtype: ({"gradient": normal(*size, dtype=dtype)}, normal(*size, dtype=dtype)),
        **ROWS,
        differentiable=False,
    ),
    "orthogonal_filter sequential": Op(recurrence("sequential"), **RECURRENCE),
    "orthogonal_filter parallel": Op(recurrence("parallel"), **RECURRENCE),
}
# The name under which the backend of a function is chosen.
CHOSEN_AS = {
    "lcw_weight": lcw_linear.NAME,
    "lcw_linear": lcw_linear.NAME,
    "hypersphere_direction": hypersphere.NAME,
    "gmp_linear": hypersphere.NAME,
    "normalize_scale": weight_norm.NAME,
    "weight_norm_linear": weight_norm.NAME,
    "gradient_activation_": gradient_activation.NAME,
    "orthogonal_filter sequential": orthogonal_filter.NAME,
    "orthogonal_filter parallel": parallel_depth.SWEEP,
}
# Our matmul or torch's computes a layer's products on a CPU, whichever is faster (LCW_OPS_MATMUL). The tests run with
# each.
PRODUCTS = {"cpp": "own", "cpp with torch's products": "torch"}


def backends_of(name: str) -> list[str]:
    """The backends that can run the function on DEVICE. "reference" runs everywhere."""
    chosen_as = CHOSEN_AS.get(name) or CHOSEN_AS.get(name.split()[0])
    # hypersphere_angles has no kernel.
    able = [
        backend
        for backend in backends.BACKENDS
        if backend != "reference" and chosen_as and backends.missing_reason(chosen_as, backend, DEVICE.type) is None
    ]
    if "cpp" in able and OPS[name].autocast == "narrow":
        able += list(PRODUCTS)[1:]
    return [*able, "reference"]


BACKENDS = {name: backends_of(name) for name in OPS}


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize(("op", "backend"), [(op, backend) for op in OPS for backend in BACKENDS[op]])
def test_contract(op, backend, check, monkeypatch, device):
    if backend == "triton":
        multiply_bfloat16(monkeypatch)
        # Triton's interpreter computes both branches of a selection in numpy, which warns.
        warnings.filterwarnings("ignore", ".* encountered in ", RuntimeWarning)
    monkeypatch.setenv("LCW_OPS_MATMUL", PRODUCTS.get(backend, ""))
    contract.run(check, OPS[op], backend.split()[0])


@pytest.mark.parametrize("op", [op for op in OPS if "cpp" in BACKENDS[op]])
def test_without_a_request_the_compiled_kernels_run(op, monkeypatch):
    monkeypatch.setattr(backends, "_requested", None)
    contract.CHECKS["backend"](OPS[op], "cpp")


def test_every_public_function_is_in_the_table():
    """Except activation_shift, a measurement with two results, which test_lcw_linear_op.py tests."""
    named = {name.split()[0] for name in OPS}
    assert named == set(F.__all__) - {"activation_shift"}


# autocast knows no such device, and gradcheck wants numbers. The other checks of gradients reach the same code.
ON_A_PRETENDED_DEVICE = """
from support import pretended_device
pretended_device.register()
import contract, test_contract
for name, op in test_contract.OPS.items():
    for check in contract.CHECKS.keys() - {"autocast", "double_backward", "opcheck"}:
        with pretended_device.pretending():
            contract.run(check, op._replace(sizes=op.sizes[:1]), "reference")
print("every tensor stayed on", contract.DEVICE)
"""


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a device is pretended where there is none")
@pytest.mark.skipif(not pretended_device.is_possible(), reason="this torch cannot pretend a device from Python")
def test_on_another_device_no_tensor_is_left_on_the_cpu():
    environment = os.environ | {"LCW_OPS_TEST_DEVICE": pretended_device.NAME}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-W", "ignore", "-c", ON_A_PRETENDED_DEVICE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "every tensor stayed on card:0" in result.stdout
