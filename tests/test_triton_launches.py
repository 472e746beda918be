"""Compile, without a GPU, the kernels that the launchers would compile on a GPU, with the tiles that these choose.

test_triton_kernels.py compiles a list of variants in which registers and shared memory are scarcest. Here the launchers
themselves run, on CPU tensors and with a driver that names a GPU and launches nothing. Their cases combine every dtype,
width, activation, direction and optional argument: for any two options, every pair of values occurs. All of these
launches take hours, so ``make test`` runs one launch of each kind; ``make test-release`` sets LCW_OPS_EVERY_LAUNCH=1
for all of them. Facts about compiled code are kept (aot/compiled.py), so that a long run can be resumed.
"""

import importlib.util
import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterator

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter (TRITON_INTERPRET=1) compiles nothing", allow_module_level=True)

from aot.compiled import EVERY_LAUNCH, TARGETS, remembered
from aot.launching import KERNELS, MAX_SPILLED_BYTES, assert_fits, compiling, kernel_names
from support.pairwise import pairwise
from triton.runtime.jit import JITFunction

activations, hypersphere, weight_norm = (KERNELS[s] for s in ("gradient_activation", "hypersphere", "weight_norm"))
lcw_linear, recurrence, parallel = KERNELS["lcw_linear"], KERNELS["orthogonal_filter"], KERNELS["parallel_depth"]
fused = KERNELS["parallel_depth_fused"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
YES_OR_NO = (True, False)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# There is one function per launcher. Its arguments are the options, and ``OPTIONS`` has their values.
def activate(dtype, kind, tensors, offset):
    """A few tensors get a launch each; many share launches. With an offset, no address is a multiple of 16."""
    memory = [empty(100 + offset, dtype=dtype)[offset:] for _ in range(tensors)]
    activations.gradient_activation_many(memory, kind, 0.1, 20.0)


def sgd(dtype, kind, tensors, momentum, nesterov, maximize, is_first, on_momentum):
    params, grads, buffers = ([empty(100, dtype=dtype) for _ in range(tensors)] for _ in range(3))
    activations.sgd_step(
        params, grads, buffers, lr=0.1, momentum=momentum, dampening=0.0, weight_decay=0.1, nesterov=nesterov,
        maximize=maximize, is_first=is_first, on_momentum=on_momentum, kind=kind, alpha=0.1, beta=20.0,
    )  # fmt: skip


def adamw(dtype, kind, tensors, amsgrad, maximize):
    params, grads, *states = ([empty(100, dtype=dtype) for _ in range(tensors)] for _ in range(5))
    steps = [torch.tensor(1.0) for _ in range(tensors)]
    activations.adamw_step(
        params, grads, *states, steps, lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8, amsgrad=amsgrad,
        maximize=maximize, kind=kind, alpha=0.1, beta=20.0,
    )  # fmt: skip


def rows_on_the_sphere(dtype, features, units):
    """Compile the forward and backward kernels of directions and of normalised rows."""
    angles, rows, scale = (empty(units, n, dtype=dtype) for n in (features - 1, features, 1))
    hypersphere.hypersphere_direction(angles)
    hypersphere.hypersphere_direction_backward(rows, angles)
    weight_norm.normalize_scale(rows, scale[:, 0])
    weight_norm.normalize_scale_backward(rows, rows, scale[:, 0])


def gmp(dtype, rows, units, features, relu, keep, needs_angles):
    x, angles = empty(rows, features, dtype=dtype), empty(units, features - 1, dtype=dtype)
    radius, location = (empty(units, dtype=dtype) for _ in range(2))
    output, activated, direction = hypersphere.gmp_linear(x, angles, radius, location, relu, True, keep, keep)
    if keep or not relu:
        activated = activated if keep else output
        needs = (needs_angles, needs_angles, keep, not needs_angles)
        hypersphere.gmp_linear_backward(output, x, angles, radius, activated, direction, relu, True, *needs)


def normalised(dtype, rows, units, features, has_bias):
    x, weight, scale = (
        empty(rows, features, dtype=dtype),
        empty(units, features, dtype=dtype),
        empty(units, dtype=dtype),
    )
    output = weight_norm.weight_norm_linear(x, weight, scale, scale if has_bias else None, True)
    weight_norm.weight_norm_linear_backward(output, x, weight, scale, True, True, True, True, has_bias)


def zero_sum_rows(dtype, features, units, basis):
    weight, gradient = empty(units, features - basis, dtype=dtype), empty(units, features, dtype=dtype)
    lcw_linear.lcw_weight(weight, basis)
    lcw_linear.lcw_weight_backward(gradient, basis)


def lcw(dtype, rows, units, features, has_bias, basis):
    bias = empty(units, dtype=dtype) if has_bias else None
    x, weight = empty(rows, features, dtype=dtype), empty(units, features - basis, dtype=dtype)
    lcw_linear.lcw_linear(x, weight, bias, basis)


def layers(dtypes, width, rows, filter, activation, per_layer, everything, tf32):
    """Compile the forward and backward kernels of the recurrence, with every optional argument if ``everything``."""
    state, weight_dtype = dtypes
    steps = 3
    # In float64 the largest width is 64, half of float32's.
    width = min(width, 64) if state == torch.float64 else width
    each = (steps,) if per_layer else ()
    h0, weight = empty(rows, width, dtype=state), empty(*each, width, width, dtype=weight_dtype)
    bias = empty(*each, width, dtype=state) if everything or per_layer else None
    filters = {
        "shared": empty(width, width, dtype=state),
        "per_layer": empty(steps, width, width, dtype=state),
        "permutation": torch.arange(width),
    }
    alpha = beta = empty(steps if everything else 1, dtype=state)
    inputs = empty(steps, rows, width, dtype=state) if everything or not per_layer else None
    tensors = (weight, bias, filters[filter], alpha, beta, inputs)
    precision, torch.backends.cuda.matmul.fp32_precision = (
        torch.backends.cuda.matmul.fp32_precision,
        "tf32" if tf32 else "ieee",
    )
    try:
        output, checkpoints = recurrence.orthogonal_filter(h0, *tensors, steps, activation, 2, everything)
        recurrence.orthogonal_filter_backward(
            output, checkpoints, *tensors, steps, activation, 2, True, bias is not None, everything,
            inputs is not None, everything,
        )  # fmt: skip
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


def sweeps(dtype, width, rows, steps, permutes, activation, everything, per_layer):
    """Compile both sweeps and the activation or, if ``everything``, its derivative. 500 steps are several chunks."""
    states = empty(steps + 1, rows, width, dtype=dtype)
    product, scale = states[1:].clone(), empty(steps if per_layer else 1, dtype=dtype)
    filter = torch.arange(width) if permutes else empty(2 * width, dtype=torch.float64)
    bias = empty(*((steps, width) if per_layer else (width,)), dtype=dtype) if everything else None
    optional = product.clone() if everything else None
    parallel.sweep_(states, product, bias, optional, filter, scale, scale, activation)
    parallel.adjoint_sweep_(states, product, optional, filter, scale, optional, optional)
    parallel.activate_(product, bias, optional, scale, activation, everything)


def fused_sweeps(width, rows, tied, activation, reverse, everything, tf32):
    """Compile a sweep with the product inside the scan, and what writes the states."""
    steps = 500
    states, first, matrix = (
        empty(*shape, dtype=F32)
        for shape in ((steps, rows, width), (rows, width), (*(() if tied else (steps,)), width, width))
    )
    scale, index = empty(steps if everything else 1, dtype=F32), torch.arange(width)
    bias = empty(*((steps, width) if everything else (width,)), dtype=F32)
    added, slope, beta = states if everything else None, states if reverse else None, None if reverse else scale
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        sweeps = fused.Sweeps(
            first, states, states.clone(), matrix, None if reverse else bias, added, slope, index, scale, beta,
            "identity" if reverse else activation, reverse,
        )  # fmt: skip
        sweeps.sweep()
        sweeps.finish(slope)
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


FEATURES = {"features": (2, 3, 17, 100, 255, 256, 1024, 4096, 16384, 20000), "units": (3, 64, 4096)}
PRODUCT = {"dtype": DTYPES, "rows": (1, 5, 16, 32, 64), "units": (10, 1000, 4096), "features": (7, 500, 1024, 4096)}
TENSORS = {"dtype": DTYPES, "kind": ("arctan", "tanh", "log"), "tensors": (1, 100)}
ACTIVATIONS = ("tanh", "relu", "sigmoid", "identity")
F32, F64 = torch.float32, torch.float64
OPTIONS: dict[Callable, dict] = {
    activate: TENSORS | {"offset": (0, 1)},
    sgd: TENSORS
    | {"momentum": (0.0, 0.9)}
    | dict.fromkeys(("nesterov", "maximize", "is_first", "on_momentum"), YES_OR_NO),
    adamw: TENSORS | dict.fromkeys(("amsgrad", "maximize"), YES_OR_NO),
    rows_on_the_sphere: {"dtype": DTYPES} | FEATURES,
    gmp: PRODUCT | {"rows": (1, 16, 64, 65, 300)} | dict.fromkeys(("relu", "keep", "needs_angles"), YES_OR_NO),
    normalised: PRODUCT | {"rows": (1, 16, 32, 64, 65), "has_bias": YES_OR_NO},
    zero_sum_rows: {"dtype": DTYPES} | FEATURES | {"basis": YES_OR_NO},
    lcw: PRODUCT | {"has_bias": YES_OR_NO, "basis": YES_OR_NO},
    layers: {
        "dtypes": ((F32, F32), (F32, torch.bfloat16), (F32, torch.float16), (F64, F64)),
        "width": (1, 16, 17, 64, 100, 128),
        "rows": (1, 600, 4096),
        "filter": ("shared", "per_layer", "permutation"),
        "activation": ACTIVATIONS,
    }
    | dict.fromkeys(("per_layer", "everything", "tf32"), YES_OR_NO),
    sweeps: {
        "dtype": (F32, F64),
        "width": (1, 2, 33, 64, 256, 1000, parallel.MAX_WIDTH),
        "rows": (1, 64),
        "steps": (1, 500),
        "permutes": YES_OR_NO,
        "activation": ACTIVATIONS,
    }
    | dict.fromkeys(("everything", "per_layer"), YES_OR_NO),
    fused_sweeps: {
        "width": (64, 1, 16, 17, 32, 33),
        "rows": (128, 1, 5, 16),
        "tied": (False, True),
        "activation": ACTIVATIONS,
    }
    | dict.fromkeys(("reverse", "everything", "tf32"), YES_OR_NO),
}


def launches() -> Iterator:
    for target in ("sm_90", *(("sm_80", "sm_100") if EVERY_LAUNCH else ())):
        for launch, options in OPTIONS.items():
            for chosen in pairwise(**options) if EVERY_LAUNCH else [{name: each[0] for name, each in options.items()}]:
                words = "-".join(f"{name}={value}".replace("torch.", "") for name, value in chosen.items())
                yield pytest.param(target, launch, chosen, id=f"{target}-{launch.__name__}-{words}")


def compiled_facts(target: str, launch: Callable, options: dict) -> list[dict]:
    with compiling(target) as compiled:
        launch(**options)
    # The first of the same kernels is the one that was compiled.
    different = {one.kernel.hash: one for one in reversed(compiled)}.values()
    return [one.facts() for one in different]


def facts_of(target: str, launch: Callable, options: dict) -> list[dict]:
    key = f"{target} {inspect.getsource(launch)} {options}"
    compiled = remembered(key, lambda: compiled_facts(target, launch, options))
    assert compiled
    return compiled


@pytest.mark.parametrize(("target", "launch", "options"), list(launches()))
def test_compiles_and_hardly_spills(target, launch, options):
    for kernel in facts_of(target, launch, options):
        assert_fits(target, kernel)


# Tiles of the fewest and of the most rows. A permutation leaves room for more stages than a second matrix.
WIDENED = {"rows": (1, 4096), "filter": ("shared", "per_layer", "permutation"), "width": (128, 65, 64)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("chosen", list(itertools.product(*WIDENED.values())) if EVERY_LAUNCH else [(1, "shared", 128)])
def test_a_16_bit_weight_per_layer_fits_the_shared_memory_of_every_card(target, chosen):
    """Shared memory holds its float32 copy too, in which it is multiplied. Spills on AMD's cards are not judged."""
    options = dict(zip(WIDENED, chosen, strict=True)) | {"activation": "tanh", "per_layer": True, "everything": True}
    options |= {"dtypes": (F32, torch.bfloat16), "tf32": False}
    for kernel in facts_of(target, layers, options):
        assert_fits(target, kernel, MAX_SPILLED_BYTES if target.startswith("sm_") else math.inf)


def test_every_kernel_is_launched(monkeypatch):
    """No kernel is missing from the launches above."""
    launched = set()
    with compiling("sm_90"):
        monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: launched.add(self))
        for launch, options in OPTIONS.items():
            for index in range(5):
                launch(**{name: each[index % len(each)] for name, each in options.items()})
    assert {kernel.fn.__name__ for kernel in launched} == kernel_names()
