"""Record what every public name of lcw_ops does, and compare two recordings bit for bit.

    python tests/support/behaviour.py record FILE [--part NAME ...] [--jobs N]
    python tests/support/behaviour.py compare BEFORE AFTER [--expect PATTERN ...] [--expect-file FILE]

This proves that a change of structure does not change behaviour: record on the commit before and on the commit after,
on the same machine, and compare. This script uses public names only, so it runs unchanged on both commits. It imports
the lcw_ops that Python finds: set PYTHONPATH to choose the tree.

A tensor is recorded with its dtype, shape and strides, a digest of its bytes, and its values (of a large tensor only
some), which show the size of a difference. An exception is recorded by the names of its classes, never by its message.
Two recordings of one commit are equal, because nothing here depends on time: in torch's deterministic mode, or with
LCW_OPS_MATMUL, measurements do not choose kernels.

A recording takes about five minutes on two idle cores. Its parts run in processes of their own, because the instruction
set, Triton's interpreter and the state right after ``import lcw_ops`` are fixed once per process. ``record`` adds parts
to an existing file; delete the file to start again.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import copy
import fnmatch
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# Tensors with more bytes are recorded by their digest and some of their values.
BYTES_IN_FULL = 128
VALUES_SHOWN = 8

# A part that takes more seconds has failed.
TIMEOUT = 1500

CASES: dict[str, object] = {}


# ---- Recording one case ----------------------------------------------------------------------------------------------


def record(name: str, function: Callable) -> None:
    """Store under ``name`` the result or exception of ``function()`` and the categories of its warnings."""
    assert name not in CASES, f"two cases are called {name}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = attempt(function)
    categories = sorted({warning.category.__name__ for warning in caught})
    CASES[name] = {"result": result, "warnings": categories} if categories else result


def attempt(function: Callable) -> object:
    try:
        return describe(function())
    except Exception as error:
        return {"raises": [kind.__name__ for kind in type(error).__mro__[:-2]]}


def describe(value: object) -> object:
    """``value`` in the types of JSON, so that equal descriptions mean equal bits."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return describe_tensor(value)
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.kind in "UO" else describe_tensor(torch.from_numpy(value.copy()))
    if isinstance(value, dict):
        return {str(key): describe(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, np.generic):
        return describe(value.item())
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return f"<{type(value).__name__}>"


def describe_tensor(tensor) -> dict:
    import torch

    form = {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "strides": list(tensor.stride()) if tensor.layout is torch.strided else str(tensor.layout),
    }
    if tensor.is_meta:
        return {**form, "device": "meta"}
    plain = tensor.detach()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    # A tensor of one element counts as contiguous whatever its stride, so take the bytes from a copy.
    flat = torch.empty(plain.numel(), dtype=plain.dtype).copy_(plain.reshape(-1))
    content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    form["digest"] = hashlib.sha256(content).hexdigest()[:16]
    if len(content) <= BYTES_IN_FULL:
        form["bytes"] = base64.b64encode(content).decode()
    else:
        places = torch.linspace(0, flat.numel() - 1, VALUES_SHOWN).long()
        form["values"] = [describe(value) for value in flat[places].tolist()]
    return form


# ---- Numbers and memory layouts --------------------------------------------------------------------------------------


def dtypes() -> list:
    import torch

    return [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Draw:
    """Random tensors and choices that depend only on a name."""

    def __init__(self, name: str) -> None:
        import torch

        seed = zlib.crc32(name.encode())
        self.generator, self.random = torch.Generator().manual_seed(seed), random.Random(seed)

    def normal(self, *shape: int, dtype=None, scale: float = 1.0):
        import torch

        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return numbers.to(torch.float32 if dtype is None else dtype)

    def permutation(self, size: int):
        import torch

        return torch.randperm(size, generator=self.generator)

    def orthogonal(self, *shape: int, dtype=None):
        import torch

        q, r = torch.linalg.qr(torch.randn(shape, generator=self.generator, dtype=torch.float64))
        return (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).to(dtype)

    def choice(self, *options):
        return self.random.choice(options)


LAYOUTS = ("contiguous", "sliced", "strided", "transposed")


def lay_out(tensor, layout: str):
    """The same values in a memory layout that a careless kernel would misread, with NaN in the gaps."""
    if layout == "contiguous" or tensor is None or not tensor.is_floating_point() or tensor.dim() == 0:
        return tensor
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if layout == "sliced":
        padded = tensor.new_full([size + 3 for size in tensor.shape], math.nan)
        return padded[tuple(slice(1, size + 1) for size in tensor.shape)].copy_(tensor)
    spread = tensor.new_full([2 * size for size in tensor.shape], math.nan)
    return spread[(slice(None, None, 2),) * tensor.dim()].copy_(tensor)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---- Derivatives -----------------------------------------------------------------------------------------------------


def derivatives(
    name: str, function: Callable, tensors: dict, second: bool = True, grad_layout: str = "contiguous", saved=False
) -> dict:
    """Output without and with gradients, gradients, second derivatives, and the tensors that autograd keeps."""
    import torch

    draw = Draw(f"derivatives of {name}")
    kept: list[int] = []

    def leaves() -> dict:
        return {
            key: tensor.detach().requires_grad_() if is_differentiable(tensor) else tensor
            for key, tensor in tensors.items()
        }

    def run(given: dict) -> list:
        output = function(**given)
        return list(output) if isinstance(output, (list, tuple)) else [output]

    def pack(tensor):
        kept.append(tensor.nbytes)
        return tensor

    given = leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run(given)
    result = {"output": describe(outputs), "requires_grad": [output.requires_grad for output in outputs]}
    with torch.no_grad():
        result["without gradients"] = attempt(lambda: run(dict(tensors)))
    if saved:
        result["saved bytes"] = sorted(kept)
    recorded = [output for output in outputs if output.requires_grad]
    wanted = {key: leaf for key, leaf in given.items() if is_differentiable(leaf)}
    if not recorded or not wanted:
        return result
    cotangents = [lay_out(draw.normal(*output.shape, dtype=output.dtype), grad_layout) for output in recorded]
    gradients = attempt(lambda: torch.autograd.grad(recorded, list(wanted.values()), cotangents, allow_unused=True))
    result["gradients"] = dict(zip(wanted, gradients, strict=True)) if isinstance(gradients, list) else gradients
    if second:
        result["second"] = attempt(lambda: second_derivatives(draw, run, leaves(), cotangents))
    return result


def is_differentiable(tensor) -> bool:
    import torch

    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not getattr(tensor, "is_fixed", False)


def fixed(tensor):
    """A tensor that does not get a gradient."""
    tensor.is_fixed = True
    return tensor


def second_derivatives(draw: Draw, run: Callable, given: dict, cotangents: list) -> list:
    import torch

    outputs = [output for output in run(given) if output.requires_grad]
    cotangents = [cotangent.detach().requires_grad_() for cotangent in cotangents]
    wanted = [leaf for leaf in given.values() if is_differentiable(leaf)]
    first = torch.autograd.grad(outputs, wanted, cotangents, create_graph=True, allow_unused=True)
    first = [gradient for gradient in first if gradient is not None and gradient.requires_grad]
    if not first:
        return []
    directions = [draw.normal(*gradient.shape, dtype=gradient.dtype) for gradient in first]
    return list(torch.autograd.grad(first, [*wanted, *cotangents], directions, allow_unused=True))


# ---- The functions of lcw_ops.functional -----------------------------------------------------------------------------


def layer_arguments(draw: Draw, function: str, samples, n: int, m: int, dtype, option) -> tuple[dict, dict]:
    """(tensors, other arguments) of a linear layer's function. ``samples`` is a number or leading dimensions."""
    leading = samples if isinstance(samples, tuple) else (samples,)
    x = draw.normal(*leading, m, dtype=dtype)
    if function == "lcw_linear":
        basis, bias = option
        weight = draw.normal(n, m - basis, dtype=dtype)
        return {"x": x, "weight": weight, "bias": draw.normal(n, dtype=dtype) if bias else None}, {"basis": basis}
    if function == "gmp_linear":
        per_unit = {name: draw.normal(n, dtype=dtype) for name in ("radius", "location")}
        return {"x": x, "angles": draw.normal(n, m - 1, dtype=dtype, scale=2.0), **per_unit}, {"activation": option}
    tensors = {"x": x, "weight": draw.normal(n, m, dtype=dtype), "scale": draw.normal(n, dtype=dtype)}
    return {**tensors, "bias": draw.normal(n, dtype=dtype) if option else None}, {}


LAYER_OPTIONS = {
    "lcw_linear": [(False, True), (True, False)],
    "gmp_linear": [None, "relu"],
    "weight_norm_linear": [True, False],
}
SAMPLES = (0, 1, 8, 16, 17, 32, 33, 64, 65, 128)
SIZES = ((1, 1), (7, 13), (31, 37), (65, 129))


def call_layer(prefix, function, samples, n, m, dtype, option, layout="contiguous", grad_layout="contiguous", **how):
    from lcw_ops import functional as F

    what = f"{samples}x{n}x{m}"
    name = f"{prefix}/{function}/{short(dtype)}/{what}/{option}"
    if (layout, grad_layout) != ("contiguous", "contiguous"):
        name += f"/{layout}, {grad_layout}"
    # The numbers do not depend on the prefix, so that results of all backends and thread counts can be compared.
    tensors, options = layer_arguments(Draw(f"{function} {what} {option}"), function, samples, n, m, dtype, option)
    tensors = {key: lay_out(tensor, layout) for key, tensor in tensors.items()}
    call = getattr(F, function)
    record(
        name,
        lambda: derivatives(
            f"{function} {what}", lambda **given: call(**given, **options), tensors, grad_layout=grad_layout, **how
        ),
    )


def record_layers(prefix: str, samples=SAMPLES, sizes=SIZES, layouts: bool = True) -> None:
    for function, options in LAYER_OPTIONS.items():
        for dtype, rows, (n, m), option in itertools.product(dtypes(), samples, sizes, options):
            call_layer(prefix, function, rows, n, m, dtype, option, second=rows in (1, 17, 33), saved=True)
        if not layouts:
            continue
        for dtype, (place, layout) in itertools.product(dtypes(), enumerate(LAYOUTS)):
            grad_layout = LAYOUTS[(place + 1) % len(LAYOUTS)]
            for rows in (3, 40, 70, (2, 3, 5), ()):
                call_layer(prefix, function, rows, 19, 23, dtype, options[place % 2], layout, grad_layout, second=False)
        for rows, (n, m) in (((3, 0), (5, 7)), (4, (0, 7)), ((2, 3), (5, 1)), (4, (3, 2))):
            for option in options:
                call_layer(prefix, function, rows, n, m, dtypes()[0], option)


def record_large_layers(prefix: str) -> None:
    """Sizes for which several threads share a product."""
    for function, options in LAYER_OPTIONS.items():
        for dtype, rows in itertools.product(dtypes()[:3:2], (5, 48, 200)):
            call_layer(prefix, function, rows, 384, 515, dtype, options[0], second=False)


ROWS = ((1, 1), (1, 2), (3, 7), (13, 31), (33, 64), (65, 257), (0, 5))


def record_row_functions(prefix: str, sizes=ROWS) -> None:
    """Functions of the rows of a matrix."""
    import torch

    from lcw_ops import functional as F

    for dtype, (n, m), layout in itertools.product(dtypes(), sizes, LAYOUTS):
        if layout != "contiguous" and (n, m) not in ((3, 7), (33, 64)):
            continue
        draw = Draw(f"rows {n}x{m}")
        weight, scale = draw.normal(n, m, dtype=dtype), draw.normal(n, dtype=dtype)
        angles, x = draw.normal(n, m - 1, dtype=dtype, scale=3.0), draw.normal(9, m, dtype=dtype)
        calls = {
            "lcw_weight": (F.lcw_weight, {"weight": weight}),
            "lcw_weight, basis": (lambda weight: F.lcw_weight(weight, basis=True), {"weight": angles}),
            "hypersphere_direction": (F.hypersphere_direction, {"angles": angles}),
            "hypersphere_angles": (F.hypersphere_angles, {"weight": weight}),
            "normalize_scale": (F.normalize_scale, {"weight": weight, "scale": scale}),
            "activation_shift": (F.activation_shift, {"x": x, "weight": weight, "bias": scale}),
        }
        for name, (function, tensors) in calls.items():
            tensors = {key: lay_out(tensor, layout) for key, tensor in tensors.items()}
            case = f"{prefix}/{name}/{short(dtype)}/{n}x{m}/{layout}"
            record(
                case,
                lambda name=name, function=function, tensors=tensors, layout=layout: derivatives(
                    name, function, tensors, grad_layout=layout, saved=True
                ),
            )
    for dtype, shape in itertools.product(dtypes(), ((4, 3, 5), (4, 3, 3, 3), (2, 3, 1, 2, 3))):
        filters = Draw(f"filters {shape}").normal(*shape, dtype=dtype)
        record(
            f"{prefix}/lcw_weight/{short(dtype)}/{shape}",
            lambda filters=filters: derivatives("filters", F.lcw_weight, {"weight": filters}),
        )
        if filters.dim() == 4:
            last = filters.to(memory_format=torch.channels_last)
            record(
                f"{prefix}/lcw_weight/{short(dtype)}/{shape}/channels last",
                lambda last=last: derivatives("filters", F.lcw_weight, {"weight": last}),
            )
    record_special_rows(prefix)


def record_special_rows(prefix: str) -> None:
    """Poles, zero rows, lengths at the ends of the range, NaN and infinity."""
    import torch

    from lcw_ops import functional as F

    for dtype in dtypes():
        least, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        values = [0.0, -0.0, math.pi, math.pi / 2, 1e3, least, -least, largest / 4, math.inf, -math.inf, math.nan, 1.0]
        draw = Draw("special rows")
        rows = draw.normal(len(values) + 2, 6, dtype=dtype)
        rows[: len(values), 2] = torch.tensor(values, dtype=torch.float64).to(dtype)
        rows[-1], rows[-2] = 0.0, rows[-2] * least * 4
        ones, x = torch.ones(len(rows), dtype=dtype), draw.normal(4, 7, dtype=dtype)
        calls = {
            "hypersphere_direction": (F.hypersphere_direction, {"angles": rows}),
            "hypersphere_angles": (F.hypersphere_angles, {"weight": rows}),
            "normalize_scale": (F.normalize_scale, {"weight": rows, "scale": ones}),
            "lcw_weight": (F.lcw_weight, {"weight": rows}),
            "gmp_linear": (F.gmp_linear, {"x": x, "angles": rows, "radius": ones, "location": ones}),
            "weight_norm_linear": (F.weight_norm_linear, {"x": x[:, :6], "weight": rows, "scale": ones}),
            "lcw_linear": (F.lcw_linear, {"x": x[:, :6], "weight": rows, "bias": ones}),
        }
        for name, (function, tensors) in calls.items():
            record(
                f"{prefix}/{name}/{short(dtype)}/special values",
                lambda name=name, function=function, tensors=tensors: derivatives(name, function, tensors),
            )


def record_gradient_activation(prefix: str, sizes=(0, 1, 2, 7, 16, 33, 64, 65, 1023, 40_000)) -> None:
    import torch

    from lcw_ops import functional as F

    special = [0.0, -0.0, 1e-30, -1e-8, 1e-3, 0.5, -3.0, 1e4, math.inf, -math.inf, math.nan]
    for kind, dtype in itertools.product(("arctan", "tanh", "log"), dtypes()):
        draw = Draw(f"gradients {kind}")
        tensors = [draw.normal(size, dtype=dtype, scale=0.1) for size in sizes]
        tensors += [lay_out(draw.normal(13, 17, dtype=dtype), layout) for layout in LAYOUTS]
        tensors += [torch.tensor(special, dtype=torch.float64).to(dtype), draw.normal(dtype=dtype)]
        for alpha, beta in ((0.1, 20.0), (2.5, 1e-3), (1e30, 1e30)):
            given = [clone_with_strides(tensor) for tensor in tensors]
            record(
                f"{prefix}/gradient_activation_/{kind}/{short(dtype)}/{alpha}, {beta}",
                lambda given=given, kind=kind, alpha=alpha, beta=beta: [
                    F.gradient_activation_(given, kind, alpha, beta),
                    given,
                ],
            )
    draw = Draw("gradients of all dtypes")
    mixed = [draw.normal(5, size, dtype=dtype) for dtype, size in itertools.product(dtypes(), (3, 40))]
    base = draw.normal(6, 8)
    views = [base[:, ::2], base[:, 1::2], torch.view_as_complex(draw.normal(5, 2)).conj().imag]
    record(f"{prefix}/gradient_activation_/all dtypes", lambda: [F.gradient_activation_(mixed), mixed])
    record(f"{prefix}/gradient_activation_/views", lambda: [F.gradient_activation_(views), views, base])
    record(f"{prefix}/gradient_activation_/tuple", lambda: [F.gradient_activation_((base,), "log"), base])
    record(f"{prefix}/gradient_activation_/none", lambda: F.gradient_activation_([]))


def clone_with_strides(tensor):
    import torch

    copied = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return copied.copy_(tensor)


def draw_recurrence(draw: Draw, dtype, smallest: bool = False) -> tuple[dict, dict]:
    """(tensors, other arguments) of one call of orthogonal_filter, drawn over all of its options."""
    import torch

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    width = draw.choice(1, 2, 3) if smallest else draw.choice(1, 2, 7, 16, 17, 32, 33, 64, 65, 130)
    rows = draw.choice(1, 2, 3) if smallest else draw.choice(0, 1, 8, 16, 17, 32, 33, 64, 65, 128)
    steps = draw.choice(1, 2, 3) if smallest else draw.choice(1, 2, 3, 5, 9, 16, 40)
    shares = draw.choice(False, True)
    filter_kind = draw.choice("permutation", "matrix", "matrix", "per layer")
    solver = draw.choice("sequential", "sequential", "parallel", "auto")
    if solver == "parallel" and filter_kind == "per layer":
        filter_kind = "matrix"
    filter = {
        "permutation": lambda: draw.permutation(width),
        "matrix": lambda: fixed(draw.orthogonal(width, width, dtype=wide)),
        "per layer": lambda: fixed(draw.orthogonal(steps, width, width, dtype=wide)),
    }[filter_kind]()
    has_inputs = draw.choice(False, True) or (shares and filter_kind != "per layer")
    bias_kind, scale_kind = (
        draw.choice("none", "shared", "per layer"),
        draw.choice("none", "numbers", "0-dim", "per layer"),
    )
    layout = draw.choice(*LAYOUTS)
    tensors = {
        "h0": draw.normal(rows, width, dtype=dtype),
        "weight": draw.normal(*(() if shares else (steps,)), width, width, dtype=dtype, scale=width**-0.5),
        "bias": {
            "none": None,
            "shared": draw.normal(width, dtype=dtype),
            "per layer": draw.normal(steps, width, dtype=dtype),
        }[bias_kind],
        "inputs": draw.normal(steps, rows, width, dtype=dtype) if has_inputs else None,
    }
    tensors = {name: lay_out(tensor, layout) for name, tensor in tensors.items()}
    scales: dict = {"none": {}, "numbers": {"alpha": 0.9, "beta": 0.1}}.get(scale_kind, {})
    if scale_kind == "0-dim":
        scales = {"beta": torch.tensor(0.05, dtype=wide)}
    if scale_kind == "per layer":
        scales = {"alpha": draw.normal(steps, dtype=wide).sigmoid(), "beta": draw.normal(steps, dtype=wide, scale=0.1)}
    options = {
        "activation": draw.choice("tanh", "relu", "sigmoid", "identity"),
        "return_states": draw.choice(False, True),
        "segment": draw.choice(None, None, 1, 3),
        "solver": solver,
    }
    if solver == "parallel":
        options |= {"tolerance": draw.choice(None, 1e-3), "window": draw.choice(None, None, 8, 3)}
    return {**tensors, "filter": filter, **scales}, options


def record_recurrence(prefix: str, draws: int, smallest: bool = False, second: bool = True) -> None:
    from lcw_ops import functional as F

    for dtype, number in itertools.product(dtypes(), range(draws)):
        draw = Draw(f"recurrence {number} {smallest}")
        tensors, options = draw_recurrence(draw, dtype, smallest)
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items() if hasattr(t, "shape"))
        words = ", ".join(f"{name}={value}" for name, value in options.items() if value not in (None, False))
        record(
            f"{prefix}/orthogonal_filter/{short(dtype)}/{number}: {shapes}; {words}",
            lambda tensors=tensors, options=options, number=number: derivatives(
                f"recurrence {number}",
                lambda **given: F.orthogonal_filter(**given, **options),
                tensors,
                second=second,
                grad_layout=LAYOUTS[number % len(LAYOUTS)],
                saved=True,
            ),
        )


def record_special_recurrences(prefix: str, quick: bool = False) -> None:
    """Long runs, wide states, missing convergence, numbers that are not finite, gradients of single arguments."""
    import torch

    from lcw_ops import functional as F

    draw = Draw("special recurrences")

    def arguments(rows=4, width=8, steps=5, scale=1.0, dtype=torch.float32, permutes=True):
        filter = draw.permutation(width) if permutes else fixed(draw.orthogonal(width, width, dtype=dtype))
        return {
            "h0": draw.normal(rows, width, dtype=dtype),
            "weight": draw.normal(steps, width, width, dtype=dtype, scale=scale / width**0.5),
            "bias": draw.normal(steps, width, dtype=dtype),
            "filter": filter,
        }

    calls = {
        "300 layers": (arguments(steps=300), {}),
        "300 layers, parallel": (arguments(steps=300), {"solver": "parallel"}),
        "300 layers, parallel, matrix": (arguments(steps=300, permutes=False), {"solver": "parallel"}),
        "300 layers, segments": (arguments(steps=300, permutes=False), {"segment": 7}),
        "wide": (arguments(rows=70, width=300, steps=6, permutes=False), {}),
        "wide, few rows": (arguments(rows=3, width=300, steps=6), {}),
        "wide, parallel": (arguments(rows=40, width=150, steps=33, permutes=False), {"solver": "parallel"}),
        "no convergence": (arguments(steps=40, scale=30.0), {"solver": "parallel", "alpha": 1.0, "beta": 1.0}),
        "auto": (arguments(steps=200, rows=8, width=16), {"solver": "auto"}),
        "overflow": (arguments(steps=50, scale=1e20), {"activation": "identity", "alpha": 1.0, "beta": 1.0}),
    }
    for name, (tensors, options) in calls.items():
        if quick and ("300" in name or "wide" in name):
            continue
        record(
            f"{prefix}/orthogonal_filter/{name}",
            lambda name=name, tensors=tensors, options=options: derivatives(
                name,
                lambda **given: F.orthogonal_filter(**given, **options),
                tensors,
                second=len(tensors["bias"]) < 50,
                saved=not quick,
            ),
        )
    for solver, wanted in itertools.product(
        ("sequential", "parallel"), ("h0", "weight", "bias", "alpha", "beta", "inputs")
    ):
        tensors = arguments(steps=9)
        tensors |= {
            "alpha": draw.normal(9).sigmoid(),
            "beta": draw.normal(9, scale=0.1),
            "inputs": draw.normal(9, 4, 8),
        }
        tensors = {key: tensor if key == wanted else fixed(tensor) for key, tensor in tensors.items()}
        record(
            f"{prefix}/orthogonal_filter/gradient of {wanted} alone, {solver}",
            lambda tensors=tensors, solver=solver: derivatives(
                "one gradient", lambda **given: F.orthogonal_filter(**given, solver=solver), tensors
            ),
        )


# ---- Parts: functions ------------------------------------------------------------------------------------------------


def part_functions() -> None:
    """The compiled kernels, with the instructions that the environment allows."""
    instructions = os.environ.get("LCW_OPS_CPU_CAPABILITY", "fastest")
    is_fastest = instructions == "fastest"
    with threads(2):
        here = f"functions/{instructions}/2 threads"
        if is_fastest:
            record_layers(here)
        else:
            record_layers(here, (1, 17, 33, 65), SIZES[1::2], layouts=False)
        for multiplier in ("own", "torch"):
            with environment(LCW_OPS_MATMUL=multiplier):
                record_layers(f"{here}, {multiplier}", (1, 8, 33, 65), SIZES[-1:], layouts=False)
        record_row_functions(here, ROWS if is_fastest else ROWS[2:4])
        record_gradient_activation(here)
        record_recurrence(here, 50 if is_fastest else 15, second=is_fastest)
        record_special_recurrences(here)
        record_large_layers(here)
    # Small sizes run on one thread anyway.
    with threads(1):
        here = f"functions/{instructions}/1 thread"
        record_large_layers(here)
        record_special_recurrences(here)
        record_recurrence(here, 15, second=False)
        record_gradient_activation(here, (7, 40_000))


def part_reference() -> None:
    import torch

    import lcw_ops

    with lcw_ops.use_backend("reference"), threads(2):
        record_layers("functions/reference", (0, 1, 33, 65), ((7, 13), (31, 37)))
        record_row_functions("functions/reference", ((1, 1), (3, 7), (33, 64)))
        record_gradient_activation("functions/reference")
        record_recurrence("functions/reference", 12)
        record_special_recurrences("functions/reference", quick=True)
    for dtype in dtypes():
        record_oracle(f"reference/{short(dtype)}", dtype)
    record_initial_laws()
    torch.manual_seed(0)


def record_oracle(prefix: str, dtype) -> None:
    """The functions of lcw_ops.reference, called directly."""
    import torch

    from lcw_ops import reference

    draw = Draw("oracle")
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return draw.normal(*shape, dtype=dtype)

    rows, angles, per_row, x = normal(5, 7), normal(5, 6), normal(5), normal(4, 7)
    calls: dict[str, tuple] = {
        "lcw_weight": (reference.lcw_weight, {"weight": rows}, {}),
        "lcw_weight, basis": (reference.lcw_weight, {"weight": angles}, {"basis": True}),
        "lcw_linear": (reference.lcw_linear, {"x": x, "weight": angles, "bias": per_row}, {"basis": True}),
        "activation_shift": (reference.activation_shift, {"x": x, "weight": rows, "bias": per_row}, {}),
        "hypersphere_direction": (reference.hypersphere_direction, {"angles": angles}, {}),
        "hypersphere_direction_backward": (
            reference.hypersphere_direction_backward,
            {"grad_direction": rows, "angles": angles},
            {},
        ),
        "hypersphere_direction_jvp": (
            reference.hypersphere_direction_jvp,
            {"tangent_angles": normal(5, 6), "angles": angles},
            {},
        ),
        "hypersphere_angles": (reference.hypersphere_angles, {"weight": rows}, {}),
        "normalize_scale": (reference.normalize_scale, {"weight": rows, "scale": per_row}, {}),
        "normalize_scale_backward": (
            reference.normalize_scale_backward,
            {"grad_output": normal(5, 7), "weight": rows, "scale": per_row},
            {},
        ),
        "normalize_scale_jvp": (
            reference.normalize_scale_jvp,
            {"tangent_weight": normal(5, 7), "tangent_scale": normal(5), "weight": rows, "scale": per_row},
            {},
        ),
        "gmp_linear": (
            reference.gmp_linear,
            {"x": x, "angles": angles, "radius": per_row, "location": normal(5)},
            {"activation": "relu"},
        ),
    }
    for kind in ("arctan", "tanh", "log"):
        calls[f"gradient_activation, {kind}"] = (reference.gradient_activation, {"gradient": rows}, {"kind": kind})
        for place in ("gradient", "momentum"):
            calls[f"sgd_step, {kind}, {place}"] = (
                reference.sgd_step,
                {"param": rows, "gradient": normal(5, 7), "momentum_buffer": normal(5, 7)},
                {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "kind": kind, "activate": place},
            )
        calls[f"adamw_step, {kind}"] = (
            reference.adamw_step,
            {"param": rows, "gradient": normal(5, 7), "exp_avg": normal(5, 7), "exp_avg_sq": normal(5, 7).square()},
            {"step": 3, "kind": kind},
        )
    for name, (function, tensors, options) in calls.items():
        record(
            f"{prefix}/{name}",
            lambda function=function, tensors=tensors, options=options: derivatives(
                "oracle", lambda **given: function(**given, **options), tensors
            ),
        )
    record(f"{prefix}/sgd_step, first", lambda: reference.sgd_step(rows, normal(5, 7), None, 0.1, 0.9))
    for m in (1, 2, 7):
        record(f"{prefix}/lcw_basis/{m}", lambda m=m: reference.lcw_basis(m, dtype=wide))
    filters = {
        "permutation": draw.permutation(6),
        "matrix": draw.orthogonal(6, 6, dtype=wide),
        "per layer": draw.orthogonal(4, 6, 6, dtype=wide),
    }
    for (kind, filter), activation, states in itertools.product(
        filters.items(), ("tanh", "relu", "sigmoid", "identity"), (False, True)
    ):
        tensors = {
            "h0": normal(3, 6),
            "weight": normal(4, 6, 6),
            "bias": normal(4, 6),
            "alpha": draw.normal(4, dtype=wide),
            "beta": draw.normal(4, dtype=wide),
            "inputs": normal(4, 3, 6),
        }
        options = {"activation": activation, "return_states": states}
        name = f"{kind}, {activation}, {states}"
        for function in (reference.orthogonal_filter, reference.orthogonal_filter_scan):
            if function is reference.orthogonal_filter_scan and activation in ("relu", "identity"):
                continue  # tracing a scan takes half a second
            record(
                f"{prefix}/{function.__name__}/{name}",
                lambda function=function, tensors=tensors, options=options, filter=filter: derivatives(
                    "oracle",
                    lambda **given: function(filter=filter, **given, **options),
                    tensors,
                    second=function is reference.orthogonal_filter,
                ),
            )
        if dtype != wide:
            continue
        primals = (*list(tensors.values())[:3], filter, *list(tensors.values())[3:])
        tangents = tuple(None if tensor is filter else draw.normal(*tensor.shape, dtype=dtype) for tensor in primals)
        grad_output = normal(5, 3, 6) if states else normal(3, 6)
        record(
            f"{prefix}/orthogonal_filter_jvp/{name}",
            lambda primals=primals, tangents=tangents, options=options: reference.orthogonal_filter_jvp(
                primals, tangents, **options
            ),
        )
        record(
            f"{prefix}/orthogonal_filter_backward/{name}",
            lambda grad_output=grad_output, primals=primals, options=options: reference.orthogonal_filter_backward(
                grad_output, *primals, **options
            ),
        )


def record_initial_laws() -> None:
    import torch

    from lcw_ops import reference

    record("reference/gaussian_expectation", lambda: reference.gaussian_expectation(torch.tanh))
    for activation in ("relu", "tanh", "sigmoid", "leaky_relu", "gelu", "silu", "elu", "softplus", "identity"):
        record(
            f"reference/activation_variance/{activation}",
            lambda activation=activation: [reference.activation_variance(activation, std) for std in (0.1, 1.0, 3.0)],
        )
        record(
            f"reference/hermite_second_moment/{activation}",
            lambda activation=activation: [reference.hermite_second_moment(activation, d) for d in (None, 1, 4, 9)],
        )
    for rule in (reference.joint, reference.heavy_tail):
        for bias in (False, True):
            record(
                f"reference/{rule.__name__}/{bias}",
                lambda rule=rule, bias=bias: rule(5, 7, 0.5, bias, torch.Generator().manual_seed(1)),
            )
    samples = Draw("samples").normal(9, 7)
    record(
        "reference/anchored", lambda: reference.anchored(5, samples, 0.1, generator=torch.Generator().manual_seed(1))
    )


def part_triton() -> None:
    """The Triton kernels in Triton's interpreter, which takes a thousand times as long. The few cases are tiny."""
    import lcw_ops

    sizes = ((1, 1), (3, 5))
    with lcw_ops.use_backend("triton"), threads(1):
        for function, options in LAYER_OPTIONS.items():
            for dtype, rows, (n, m) in itertools.product(dtypes(), (1, 3, 66), sizes):
                call_layer("triton", function, rows, n, m, dtype, options[rows % 2])
            call_layer("triton", function, 3, 0, 5, dtypes()[0], options[0])
            call_layer("triton", function, 4, 5, 7, dtypes()[0], options[1], "strided", "transposed")
        record_row_functions("triton", ((1, 1), (3, 7)))
        record_gradient_activation("triton", (0, 1, 7, 40))
        record_recurrence("triton", 6, smallest=True, second=False)
        record_optimizers("triton", quick=True)


# ---- Parts: what torch does with a call ------------------------------------------------------------------------------


def examples(dtype) -> dict[str, tuple[Callable, dict, dict]]:
    """Name -> (function, tensors, other arguments): one ordinary call of every function of lcw_ops.functional."""
    import torch

    from lcw_ops import functional as F

    draw = Draw("examples")
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return draw.normal(*shape, dtype=dtype)

    recurrence = {
        "h0": normal(4, 6),
        "weight": normal(3, 6, 6),
        "bias": normal(3, 6),
        "filter": draw.permutation(6),
        "alpha": draw.normal(3, dtype=wide).sigmoid(),
        "beta": draw.normal(3, dtype=wide),
        "inputs": normal(3, 4, 6),
    }
    dense = {**recurrence, "filter": fixed(draw.orthogonal(6, 6, dtype=wide))}
    return {
        "lcw_weight": (F.lcw_weight, {"weight": normal(5, 6)}, {"basis": False}),
        "lcw_weight, basis": (F.lcw_weight, {"weight": normal(5, 6)}, {"basis": True}),
        "lcw_linear": (
            F.lcw_linear,
            {"x": normal(4, 6), "weight": normal(5, 6), "bias": normal(5)},
            {"basis": False},
        ),
        "lcw_linear, basis": (
            F.lcw_linear,
            {"x": normal(4, 7), "weight": normal(5, 6), "bias": normal(5)},
            {"basis": True},
        ),
        "activation_shift": (F.activation_shift, {"x": normal(4, 6), "weight": normal(5, 6), "bias": normal(5)}, {}),
        "hypersphere_direction": (F.hypersphere_direction, {"angles": normal(5, 6)}, {}),
        "hypersphere_angles": (F.hypersphere_angles, {"weight": normal(5, 6)}, {}),
        "normalize_scale": (F.normalize_scale, {"weight": normal(5, 6), "scale": normal(5)}, {}),
        "gmp_linear": (
            F.gmp_linear,
            {"x": normal(4, 7), "angles": normal(5, 6), "radius": normal(5), "location": normal(5)},
            {"activation": "relu"},
        ),
        "weight_norm_linear": (
            F.weight_norm_linear,
            {"x": normal(4, 6), "weight": normal(5, 6), "scale": normal(5), "bias": normal(5)},
            {},
        ),
        "orthogonal_filter": (
            F.orthogonal_filter,
            recurrence,
            {"activation": "tanh", "return_states": False, "segment": None, "solver": "sequential"},
        ),
        "orthogonal_filter, states": (
            F.orthogonal_filter,
            dense,
            {"activation": "sigmoid", "return_states": True, "segment": 2, "solver": "sequential"},
        ),
        "orthogonal_filter, parallel": (
            F.orthogonal_filter,
            dense,
            {"activation": "tanh", "return_states": False, "solver": "parallel", "tolerance": None, "window": None},
        ),
        "orthogonal_filter, windows": (
            F.orthogonal_filter,
            recurrence,
            {"activation": "relu", "return_states": True, "solver": "parallel", "tolerance": 1e-6, "window": 2},
        ),
    }


def gradient_activation_of(tensor, kind="arctan", alpha=0.1, beta=20.0):
    """``gradient_activation_`` out of place."""
    from lcw_ops import functional as F

    copied = tensor.detach().clone()
    F.gradient_activation_([copied], kind, alpha, beta)
    return copied


def part_transforms() -> None:
    """vmap, torch.func, forward mode, autocast, function modes, meta and fake tensors, the FLOP counter."""
    import torch

    import lcw_ops

    for dtype in (torch.float32, torch.float64):
        record_transforms(f"transforms/{short(dtype)}", dtype)
    with lcw_ops.use_backend("reference"):
        record_transforms("transforms/reference", torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        record_autocast(f"autocast/{short(dtype)}", dtype)
    record_watchers()


def record_transforms(prefix: str, dtype) -> None:
    import torch

    draw = Draw("transforms")
    for name, (function, tensors, options) in examples(dtype).items():
        names = [key for key, tensor in tensors.items() if is_differentiable(tensor)]

        def call(*values, function=function, names=names, tensors=tensors, options=options):
            return function(**{**tensors, **dict(zip(names, values, strict=True))}, **options)

        def total(*values, call=call):
            output = call(*values)
            parts = output if isinstance(output, tuple) else (output,)
            return sum(part.square().sum() for part in parts)

        values = [tensors[key] for key in names]
        tangents = [draw.normal(*value.shape, dtype=value.dtype) for value in values]
        batches = [draw.normal(3, *value.shape, dtype=value.dtype) for value in values]
        everything = tuple(range(len(names)))
        for place, key in enumerate(names):
            dims = tuple(0 if other == place else None for other in everything)
            mixed = [batches[place] if other == place else value for other, value in enumerate(values)]
            record(
                f"{prefix}/{name}/vmap over {key}",
                lambda call=call, dims=dims, mixed=mixed: torch.func.vmap(call, dims)(*mixed),
            )
        run = {
            "vmap": lambda call=call, batches=batches: torch.func.vmap(call)(*batches),
            "grad": lambda total=total, values=values, e=everything: torch.func.grad(total, e)(*values),
            "jvp": lambda call=call, values=values, t=tangents: torch.func.jvp(call, tuple(values), tuple(t)),
            "vmap of grad": lambda total=total, batches=batches, e=everything: torch.func.vmap(
                torch.func.grad(total, e)
            )(*batches),
            "jvp of grad": lambda total=total, values=values, t=tangents, e=everything: torch.func.jvp(
                torch.func.grad(total, e), tuple(values), tuple(t)
            ),
            "grad of grad": lambda total=total, values=values: torch.func.grad(
                lambda *given: torch.func.grad(total)(*given).square().sum()
            )(*values),
            "jacrev": lambda call=call, values=values: torch.func.jacrev(call)(*values),
            "jacfwd": lambda call=call, values=values: torch.func.jacfwd(call)(*values),
            "forward_ad": lambda call=call, values=values, t=tangents: forward_mode(call, values, t),
        }
        for what, transformed in run.items():
            record(f"{prefix}/{name}/{what}", transformed)
    gradient = draw.normal(3, 5, dtype=dtype)

    def activate(one):
        from lcw_ops import functional as F

        one = one.clone()
        F.gradient_activation_([one], "log")
        return one

    record(f"{prefix}/gradient_activation_/vmap", lambda: torch.func.vmap(activate)(gradient))
    record(f"{prefix}/gradient_activation_/jvp", lambda: torch.func.jvp(activate, (gradient,), (gradient,)))


def forward_mode(call: Callable, values: list, tangents: list) -> list:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        output = call(*(forward_ad.make_dual(value, tangent) for value, tangent in zip(values, tangents, strict=True)))
        parts = output if isinstance(output, tuple) else (output,)
        return [list(forward_ad.unpack_dual(part)) for part in parts]


def record_autocast(prefix: str, dtype) -> None:
    import torch

    for name, (function, tensors, options) in examples(torch.float32).items():

        def call(function=function, options=options, **given):
            with torch.autocast("cpu", dtype):
                return function(**given, **options)

        record(f"{prefix}/{name}", lambda call=call, tensors=tensors: derivatives("autocast", call, tensors))
        first = next(iter(tensors))
        mixed = {**tensors, first: tensors[first].to(dtype)}
        record(
            f"{prefix}/{name}/{first} in 16 bits",
            lambda call=call, mixed=mixed: derivatives("autocast", call, mixed, second=False),
        )
        doubled = {**tensors, first: tensors[first].double()}
        record(
            f"{prefix}/{name}/{first} in float64",
            lambda call=call, doubled=doubled: derivatives("autocast", call, doubled, second=False),
        )


def record_watchers() -> None:
    """Every function as function modes, dispatch modes, FLOP counters and tensors without memory see it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Names(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen.append(getattr(function, "__name__", str(function)))
            return function(*args, **(kwargs or {}))

    class Ops(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "lcw_ops":
                self.seen.append(str(op))
            return op(*args, **(kwargs or {}))

    class Wrapped(torch.Tensor):
        pass

    for name, (function, tensors, options) in examples(torch.float32).items():

        def backward(given, function=function, options=options):
            output = function(**given, **options)
            parts = output if isinstance(output, tuple) else (output,)
            return torch.autograd.grad(
                sum(part.sum() for part in parts), [t for t in given.values() if t.requires_grad], allow_unused=True
            )

        def leaves(tensors=tensors):
            return {
                key: tensor.detach().clone().requires_grad_() if is_differentiable(tensor) else tensor
                for key, tensor in tensors.items()
            }

        def watched(mode, backward=backward, leaves=leaves):
            given = leaves()
            with mode:
                backward(given)
            return mode

        record(f"watchers/{name}/function mode", lambda watched=watched: watched(Names()).seen[:1])
        record(f"watchers/{name}/ops", lambda watched=watched: watched(Ops()).seen)
        record(f"watchers/{name}/flops", lambda w=watched: w(FlopCounterMode(display=False)).get_total_flops())
        record(
            f"watchers/{name}/meta",
            lambda function=function, tensors=tensors, options=options: function(
                **{key: tensor.to("meta") for key, tensor in tensors.items()}, **options
            ),
        )

        def on_fake_tensors(function=function, tensors=tensors, options=options):
            with FakeTensorMode() as mode:
                output = function(**{key: mode.from_tensor(t) for key, t in tensors.items()}, **options)
            parts = output if isinstance(output, tuple) else (output,)
            return [[str(part.dtype), list(part.shape), list(part.stride())] for part in parts]

        record(f"watchers/{name}/fake tensors", on_fake_tensors)

        def on_subclass(function=function, tensors=tensors, options=options):
            given = {key: tensor.as_subclass(Wrapped) for key, tensor in tensors.items()}
            output = function(**given, **options)
            parts = output if isinstance(output, tuple) else (output,)
            return [[type(part).__name__, part.as_subclass(torch.Tensor)] for part in parts]

        record(f"watchers/{name}/subclass", on_subclass)
        with torch.inference_mode():
            record(
                f"watchers/{name}/inference mode",
                lambda function=function, tensors=tensors, options=options: function(
                    **{key: t.clone() for key, t in tensors.items()}, **options
                ),
            )


def part_errors() -> None:
    """Every function with one argument at a time replaced by values that mostly do not fit."""
    import torch

    import lcw_ops

    record_wrong_calls("errors/cpp")
    with lcw_ops.use_backend("reference"):
        record_wrong_calls("errors/reference")
    with torch.autocast("cpu", torch.bfloat16):
        record_wrong_calls("errors/autocast")
    record_wrong_requests()


def wrong_values(tensor) -> dict[str, object]:
    """Values that replace an argument. For a tensor argument, changed copies of it are among them."""
    import torch

    values: dict[str, object] = {
        "None": None,
        "a number": 1.5,
        "NaN": math.nan,
        "infinity": math.inf,
        "0": 0,
        "-1": -1,
        "True": True,
        "a word": "word",
        "a list": [1.0, 2.0],
        "a 0-dim tensor": torch.tensor(0.5),
        "an empty tensor": torch.empty(0),
        "4 dimensions": torch.ones(2, 2, 2, 2),
    }
    if not isinstance(tensor, torch.Tensor):
        return values
    values |= {
        "one row more": torch.cat([tensor, tensor[:1]]),
        "a leading dimension": tensor.unsqueeze(0),
        "int32": tensor.to(torch.int32),
        "int64": tensor.to(torch.int64),
        "bool": tensor.to(torch.bool),
        "complex": tensor.to(torch.complex64),
        "float64": tensor.to(torch.float64),
        "bfloat16": tensor.to(torch.bfloat16),
        "sparse": tensor.to_sparse(),
        "meta": tensor.to("meta"),
        "numpy": tensor.numpy(),
        "flattened": tensor.reshape(-1),
        "expanded": tensor[:1].expand_as(tensor),
        "NaNs": torch.full_like(tensor.float(), math.nan),
    }
    if tensor.dim() > 1:
        values["one column more"] = torch.cat([tensor, tensor[..., :1]], -1)
        values["one column less"] = tensor[..., 1:]
        values["nested"] = torch.nested.nested_tensor(list(tensor))
        values["CSR"] = tensor.to_sparse_csr() if tensor.dim() == 2 else None
    if tensor.is_floating_point():
        values["requires a gradient"] = tensor.clone().requires_grad_()
    return values


def record_wrong_calls(prefix: str) -> None:
    import torch

    for name, (function, tensors, options) in examples(torch.float32).items():
        arguments = {**tensors, **options}
        for key, right in arguments.items():
            for what, wrong in wrong_values(right).items():
                record(
                    f"{prefix}/{name}/{key} is {what}",
                    lambda function=function, given={**arguments, key: wrong}: function(**given),
                )
            record(
                f"{prefix}/{name}/{key} is left out",
                lambda function=function, given=arguments, key=key: function(
                    **{other: value for other, value in given.items() if other != key}
                ),
            )
        record(f"{prefix}/{name}/an unknown argument", lambda f=function, given=arguments: f(**given, unknown=1))
    filter = {"not a permutation": torch.zeros(6, dtype=torch.int64), "out of range": torch.arange(1, 7)}
    function, tensors, options = examples(torch.float32)["orthogonal_filter"]
    for what, wrong in filter.items():
        record(f"{prefix}/orthogonal_filter/filter is {what}", lambda w=wrong: function(**{**tensors, "filter": w}))
    for what, changed in {
        "tolerance without parallel": {"tolerance": 1e-3},
        "window without parallel": {"window": 3},
        "tolerance 0": {"solver": "parallel", "tolerance": 0.0},
        "window 0": {"solver": "parallel", "window": 0},
        "unknown solver": {"solver": "exact"},
        "unknown activation": {"activation": "gelu"},
        "segment 0": {"segment": 0},
        "segment 1.5": {"segment": 1.5},
        "no steps": {"weight": tensors["weight"][:0], "bias": None, "alpha": None, "beta": None, "inputs": None},
        "no length": {"weight": tensors["weight"][0], "bias": None, "alpha": 0.5, "beta": 0.5, "inputs": None},
        "infinite alpha": {"alpha": math.inf},
    }.items():
        record(
            f"{prefix}/orthogonal_filter/{what}",
            lambda changed=changed: function(**{**tensors, **options, **changed}),
        )
    record_wrong_activations(prefix)


def record_wrong_activations(prefix: str) -> None:
    """gradient_activation_ with wrong arguments: an error leaves every tensor unchanged."""
    import torch

    from lcw_ops import functional as F

    base = Draw("wrong activations").normal(6, 4)
    leaf = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        inference = torch.ones(3)
    lists = {
        **{f"an entry is {what}": [base.clone(), value] for what, value in wrong_values(base).items()},
        **{f"tensors is {what}": value for what, value in wrong_values(base).items()},
        "one twice": [base] * 2,
        "overlap": [base[:3], base[2:]],
        "shares memory with itself": [torch.ones(1).expand(5)],
        "a leaf": [base.clone(), leaf],
        "inference": [base.clone(), inference],
        "a generator": (tensor for tensor in [base]),
        "a parameter": [torch.nn.Parameter(torch.ones(2))],
    }
    for what, given in lists.items():
        record(
            f"{prefix}/gradient_activation_/{what}",
            lambda given=given: [attempt(lambda: F.gradient_activation_(given)), given, base],
        )
    for what, options in {
        **{f"kind {value!r}": {"kind": value} for value in ("sin", None, 1, ["log"])},
        **{
            f"alpha {value!r}": {"alpha": value}
            for value in (0.0, -1.0, math.nan, math.inf, 1e-46, 1e39, "1", None, True, 1)
        },
        **{f"beta {value!r}": {"beta": value} for value in (0.0, -1.0, math.nan, 1e-39, torch.tensor(1.0))},
    }.items():
        given = [base.clone()]
        record(
            f"{prefix}/gradient_activation_/{what}",
            lambda given=given, options=options: [attempt(lambda: F.gradient_activation_(given, **options)), given],
        )


def record_wrong_requests() -> None:
    import torch

    import lcw_ops
    from lcw_ops import functional as F

    def on(backend: str, call: Callable) -> object:
        with lcw_ops.use_backend(backend):
            return call()

    x = torch.ones(3, 4)
    calls = {
        "lcw_weight": lambda: F.lcw_weight(x),
        "hypersphere_direction": lambda: F.hypersphere_direction(x),
        "normalize_scale": lambda: F.normalize_scale(x, x[:, 0]),
        "gradient_activation_": lambda: F.gradient_activation_([x.clone()]),
        "orthogonal_filter": lambda: F.orthogonal_filter(x, torch.ones(2, 4, 4), None, torch.arange(4)),
        "parallel": lambda: F.orthogonal_filter(x, torch.ones(2, 4, 4), None, torch.arange(4), solver="parallel"),
        "nothing": lambda: None,
    }
    for backend, (name, call) in itertools.product(
        ("cpp", "cuda", "triton", "reference", "graph", "", None, 3), calls.items()
    ):
        record(f"errors/backend {backend!r}/{name}", lambda backend=backend, call=call: on(backend, call))
    record("errors/BackendError", lambda: [kind.__name__ for kind in lcw_ops.BackendError.__mro__])
    record("errors/unknown attribute", lambda: lcw_ops.unknown)


# ---- Parts: modules --------------------------------------------------------------------------------------------------


def module_table() -> dict[str, tuple[Callable, tuple]]:
    """Name -> (constructor with dtype, shape of an input)."""
    import torch

    from lcw_ops import nn

    def conv(kind: type, rank: int, **options) -> tuple[Callable, tuple]:
        options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
        return lambda **given: kind(**options, **given), (2, options["in_channels"], *(7, 6, 5)[:rank])

    def mlp(**options) -> tuple[Callable, tuple]:
        # Several modules must not share a parameter among the options.
        return lambda **given: nn.OrthogonalFilterMLP(3, 6, 5, 2, **{**copy.deepcopy(options), **given}), (4, 3)

    def rnn(**options) -> tuple[Callable, tuple]:
        sizes = (4, 7, 3) if options.get("batch_first") else (7, 4, 3)
        return lambda **given: nn.OrthogonalFilterRNN(3, 6, **{"length": 7, **options, **given}), sizes

    draw = Draw("modules")
    table = {
        "LCWLinear": (lambda **given: nn.LCWLinear(7, 5, **given), (4, 7)),
        "LCWLinear, basis": (lambda **given: nn.LCWLinear(7, 5, bias=False, basis=True, **given), (2, 3, 7)),
        "LCWLinear, fan-in 1": (lambda **given: nn.LCWLinear(1, 5, basis=True, **given), (4, 1)),
        "GmPLinear": (lambda **given: nn.GmPLinear(7, 5, **given), (4, 7)),
        "GmPLinear, relu": (lambda **given: nn.GmPLinear(7, 5, "relu", bias=False, **given), (40, 7)),
        "GmPLinear, sign": (lambda **given: nn.GmPLinear(1, 5, "relu", **given), (4, 1)),
        "WeightNormLinear": (lambda **given: nn.WeightNormLinear(7, 5, **given), (4, 7)),
        "WeightNormLinear, no bias": (lambda **given: nn.WeightNormLinear(7, 5, bias=False, **given), (70, 7)),
        "InputMeanNorm": (lambda **given: nn.InputMeanNorm(4, **given), (5, 4, 3)),
        "InputMeanNorm, average": (lambda **given: nn.InputMeanNorm(4, momentum=None, **given), (5, 4)),
        "MLP, haar": mlp(),
        "MLP, cyclic": mlp(filter="cyclic", activation="relu"),
        "MLP, permutation": mlp(filter="permutation", beta=0.1, activation="sigmoid", segment=2),
        "MLP, identity": mlp(filter="identity", alpha=1.0, beta=0.2, activation="identity"),
        "MLP, tensor": mlp(filter=draw.orthogonal(6, 6, dtype=torch.float64), beta=draw.normal(5).sigmoid()),
        "MLP, per layer": mlp(filter=draw.orthogonal(5, 6, 6, dtype=torch.float64), alpha=torch.tensor(0.9)),
        "MLP, indices": mlp(filter=draw.permutation(6), beta=torch.nn.Parameter(draw.normal(5).sigmoid())),
        "MLP, parallel": mlp(solver="parallel", tolerance=1e-5, window=3),
        "MLP, auto": mlp(solver="auto", filter="permutation"),
        "RNN, haar": rnn(),
        "RNN, batch first": rnn(batch_first=True, bias=False, filter="permutation", activation="relu"),
        "RNN, cyclic": rnn(filter="cyclic", length=None, beta=0.3, alpha=0.7, activation="sigmoid"),
        "RNN, parallel": rnn(filter="identity", solver="parallel", activation="identity"),
    }
    for rank in (1, 2, 3):
        for family in ("LCW", "GmP", "WeightNorm"):
            kind = getattr(nn, f"{family}Conv{rank}d")
            table[f"{family}Conv{rank}d"] = conv(kind, rank)
            options = {"groups": 2, "stride": 2, "padding": 1, "dilation": 1, "bias": False, "padding_mode": "reflect"}
            extra = {"LCW": {"basis": True}, "GmP": {"activation": "relu"}, "WeightNorm": {}}[family]
            table[f"{family}Conv{rank}d, options"] = conv(kind, rank, **options, **extra)
            if family == "GmP":
                table[f"GmPConv{rank}d, sign"] = conv(
                    kind, rank, in_channels=4, groups=4, out_channels=8, kernel_size=1
                )
    return table


def part_modules() -> None:
    import torch

    import lcw_ops

    record_modules("modules/cpp", dtypes())
    with lcw_ops.use_backend("reference"):
        record_modules("modules/reference", [torch.float32])
    record_sequences()
    record_conversions()
    record_wrong_modules()
    record_initialisers()


def make(constructor: Callable, **options):
    import torch

    torch.manual_seed(0)
    return constructor(**options)


def outputs_of(module, x) -> list:
    """The tensors that a module returns."""
    output = module(x)
    return list(output) if isinstance(output, tuple) else [output]


def run_module(module, x, name: str) -> dict:
    """Output, gradients and second derivatives of a module with respect to its input and parameters."""
    import torch

    names = [name for name, _ in module.named_parameters()]

    def call(**given):
        parameters = {name: given[f"p{place}"] for place, name in enumerate(names)}
        output = torch.func.functional_call(module, parameters, (given["x"],))
        return output

    parameters = {f"p{place}": parameter.detach() for place, parameter in enumerate(module.parameters())}
    through_call = derivatives(name, call, {"x": x, **parameters})
    for parameter in module.parameters():
        parameter.grad = None
    leaf = x.detach().clone().requires_grad_()
    outputs = outputs_of(module, leaf)
    sum(output.float().square().sum() for output in outputs).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"functional_call": through_call, "output": outputs, "x": leaf.grad, "gradients": gradients}


def record_modules(prefix: str, kinds: list) -> None:
    import torch

    for (name, (constructor, shape)), dtype in itertools.product(module_table().items(), kinds):
        here = f"{prefix}/{name}/{short(dtype)}"
        draw = Draw(name)
        x = draw.normal(*shape, dtype=dtype)
        module = make(constructor, dtype=dtype)
        record(f"{here}/state_dict", lambda module=module: dict(module.state_dict()))
        record(f"{here}/parameters", lambda m=module: {n: p.requires_grad for n, p in m.named_parameters()})
        record(f"{here}/repr", lambda module=module: repr(module))
        record(f"{here}/training", lambda module=module, x=x: run_module(module, x, "module"))
        record(f"{here}/buffers", lambda module=module: dict(module.named_buffers()))

        def evaluate(module=module, x=x):
            module.eval()
            with torch.no_grad():
                found = [outputs_of(module, x), outputs_of(module, x)]
                # A cached weight must not survive an edit that autograd does not see.
                for parameter in module.parameters():
                    parameter.data.mul_(1.25)
                found.append(outputs_of(module, x))
            return found

        record(f"{here}/evaluation", evaluate)
        record(f"{here}/inference mode", lambda module=module, x=x: in_inference_mode(module, x))
        record(f"{here}/copy", lambda module=module, x=x: outputs_of(copy.deepcopy(module), x))
        record(f"{here}/pickle", lambda m=module, x=x: outputs_of(pickle.loads(pickle.dumps(m)), x))

        def reload(module=module, constructor=constructor, x=x, dtype=dtype):
            torch.manual_seed(1)
            other = constructor(dtype=dtype).eval()
            answer = other.load_state_dict(module.state_dict())
            return [list(answer.missing_keys), list(answer.unexpected_keys), outputs_of(other, x)]

        record(f"{here}/load_state_dict", reload)

        def reset(constructor=constructor, dtype=dtype):
            other = constructor(dtype=dtype)
            torch.manual_seed(2)
            other.reset_parameters()
            return dict(other.state_dict())

        record(f"{here}/reset_parameters", reset)
        for method in ("effective_weight", "direction"):
            if hasattr(module, method):
                record(f"{here}/{method}", lambda module=module, method=method: getattr(module, method)())
        if prefix.endswith("cpp") and dtype == torch.float32:
            record_moves(here, constructor, x)


def in_inference_mode(module, x):
    import torch

    with torch.inference_mode():
        return [output.clone() for output in outputs_of(module, x)]


def record_moves(here: str, constructor: Callable, x) -> None:
    """Modules that change dtype or device; skip_init, vmap, FLOP counters and autocast."""
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    for dtype in (torch.float64, torch.bfloat16):
        record(f"{here}/to {short(dtype)}", lambda dtype=dtype: outputs_of(make(constructor).to(dtype), x.to(dtype)))
        record(f"{here}/state in {short(dtype)}", lambda dtype=dtype: dict(make(constructor).to(dtype).state_dict()))
    record(
        f"{here}/meta",
        lambda: [dict((m := make(constructor, device="meta")).state_dict()), outputs_of(m, x.to("meta"))],
    )

    def to_empty():
        module = make(constructor, device="meta").to_empty(device="cpu")
        torch.manual_seed(3)
        module.reset_parameters()
        return dict(module.state_dict())

    record(f"{here}/to_empty, reset_parameters", to_empty)

    def autocast():
        module, leaf = make(constructor), x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = outputs_of(module, leaf)
        sum(output.float().sum() for output in outputs).backward()
        return [outputs, leaf.grad, [parameter.grad for parameter in module.parameters()]]

    record(f"{here}/autocast", autocast)

    def flops():
        with FlopCounterMode(display=False) as counter:
            sum(output.sum() for output in outputs_of(make(constructor), x.clone().requires_grad_())).backward()
        return counter.get_total_flops()

    record(f"{here}/flops", flops)

    def vmapped():
        module = make(constructor).eval()
        return torch.func.vmap(module)(torch.stack([x, -x]))

    record(f"{here}/vmap", vmapped)

    def ensemble():
        models = [make(constructor).eval() for _ in range(2)]
        parameters, buffers = torch.func.stack_module_state(models)
        return torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(parameters, buffers)

    record(f"{here}/ensemble", ensemble)

    def parametrized():
        module = make(constructor)
        name = next(name for name, parameter in module.named_parameters(recurse=False) if parameter.numel())
        nn.utils.parametrize.register_parametrization(module, name, nn.Tanh())
        return [list(module.state_dict()), outputs_of(module, x), outputs_of(copy.deepcopy(module), x)]

    record(f"{here}/parametrized", parametrized)


def record_sequences() -> None:
    """The RNN's forms of input (first states, sequences without a batch, packed ones) and its attributes."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

    from lcw_ops import nn

    draw = Draw("sequences")
    for batch_first, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        here = f"modules/sequences/{batch_first}, {short(dtype)}"
        rnn = make(
            lambda **given: nn.OrthogonalFilterRNN(3, 5, length=6, **given), batch_first=batch_first, dtype=dtype
        )
        x, hx = draw.normal(6, 4, 3, dtype=dtype), draw.normal(1, 4, 5, dtype=dtype)
        given = x.transpose(0, 1) if batch_first else x
        record(f"{here}/hx", lambda rnn=rnn, x=given, hx=hx: rnn(x, hx))
        record(f"{here}/no batch", lambda rnn=rnn, x=x, hx=hx: [rnn(x[:, 0]), rnn(x[:, 0], hx[:, 0])])
        for is_sorted in (True, False):
            lengths = [6, 4, 4, 1] if is_sorted else [4, 1, 6, 4]

            def packed(rnn=rnn, x=given, hx=hx, lengths=lengths, is_sorted=is_sorted, batch_first=batch_first):
                leaf, state = x.detach().clone().requires_grad_(), hx.detach().clone().requires_grad_()
                sequence = pack_padded_sequence(leaf, lengths, batch_first, enforce_sorted=is_sorted)
                output, h_n = rnn(sequence, state)
                gradients = torch.autograd.grad(
                    output.data.float().sum() + h_n.float().sum(), [leaf, state, *rnn.parameters()]
                )
                return [list(output), h_n, gradients, rnn(sequence)[1]]

            record(f"{here}/packed, {is_sorted}", packed)
        record(f"{here}/attributes", lambda rnn=rnn: [getattr(rnn, n) for n in RNN_ATTRIBUTES])
    rnn = make(lambda: nn.OrthogonalFilterRNN(3, 5, length=6))
    one = pack_sequence([draw.normal(2, 3)])
    wrong = {
        "wrong features": draw.normal(6, 4, 2),
        "no steps": draw.normal(0, 4, 3),
        "one dimension": draw.normal(3),
        "a list": [1.0],
        "packed, wrong features": pack_sequence([draw.normal(2, 2)]),
        "packed, sizes rise": one._replace(batch_sizes=torch.tensor([1, 2])),
        "packed, wrong sum": one._replace(batch_sizes=torch.tensor([1])),
        "float64": draw.normal(6, 4, 3, dtype=torch.float64),
    }
    for what, x in wrong.items():
        record(f"errors/modules/RNN/{what}", lambda x=x: rnn(x))
    for what, hx in {"shape": draw.normal(1, 3, 5), "dtype": draw.normal(1, 4, 5).double(), "list": [0.0]}.items():
        record(f"errors/modules/RNN/hx: {what}", lambda hx=hx: rnn(draw.normal(6, 4, 3), hx))


RNN_ATTRIBUTES = (
    "num_layers",
    "bidirectional",
    "dropout",
    "proj_size",
    "mode",
    "nonlinearity",
    "all_weights",
    "input_size",
    "hidden_size",
    "batch_first",
)


def record_conversions() -> None:
    """from_linear, from_conv, gmp_parameter_groups, skip_init, and loading state dicts that do not fit."""
    import torch
    from torch import nn

    import lcw_ops.nn as ours

    draw = Draw("conversions")
    for bias, features in itertools.product((True, False), (1, 7)):
        plain = make(lambda bias=bias, features=features: nn.Linear(features, 5, bias=bias)).eval()
        plain.weight.requires_grad_(False)
        x = draw.normal(4, features)
        for kind, options in (
            (ours.GmPLinear, [{}, {"activation": "relu"}]),
            (ours.WeightNormLinear, [{}]),
        ):
            for given in options:

                def convert(kind=kind, plain=plain, given=given, x=x):
                    made = kind.from_linear(plain, **given)
                    frozen = {name: parameter.requires_grad for name, parameter in made.named_parameters()}
                    return [repr(made), made.training, frozen, dict(made.state_dict()), made(x)]

                record(f"modules/conversions/{kind.__name__}/{bias}, {features}, {given}", convert)
    for rank, family, groups in itertools.product((1, 2, 3), ("GmP", "WeightNorm"), (1, 2)):
        kind = getattr(ours, f"{family}Conv{rank}d")
        plain = make(lambda rank=rank, groups=groups: getattr(nn, f"Conv{rank}d")(4, 6, 2, groups=groups, padding=1))
        x = draw.normal(2, 4, *(5, 4, 3)[:rank])

        def convert(kind=kind, plain=plain, x=x):
            made = kind.from_conv(plain)
            return [repr(made), dict(made.state_dict()), made(x)]

        record(f"modules/conversions/{kind.__name__}/{groups}", convert)
        record(f"errors/modules/{kind.__name__}.from_conv/{groups}", lambda kind=kind: kind.from_conv(nn.Linear(2, 2)))
    zero = nn.Linear(3, 4)
    with torch.no_grad():
        zero.weight[1] = 0.0
        zero.weight[2, 1] = math.nan
    for activation in (None, "relu", "gelu"):
        record(f"errors/modules/from_linear/{activation}", lambda a=activation: ours.GmPLinear.from_linear(zero, a))
    record(
        "errors/modules/from_linear/LCW",
        lambda: ours.GmPLinear.from_linear(make(lambda: ours.LCWLinear(4, 3)))(torch.ones(2, 4)),
    )
    record("errors/modules/from_linear/not linear", lambda: ours.WeightNormLinear.from_linear(nn.ReLU()))
    model = make(
        lambda: nn.Sequential(
            ours.GmPConv2d(2, 3, 3),
            nn.Flatten(),
            ours.GmPLinear(27, 4),
            ours.GmPLinear(4, 2, bias=False),
            nn.Linear(2, 2),
        )
    )

    def groups(**options):
        found = ours.gmp_parameter_groups(model, **options)
        return [{**group, "params": [list(parameter.shape) for parameter in group["params"]]} for group in found]

    record("modules/gmp_parameter_groups", lambda: groups(lr=0.1))
    record("modules/gmp_parameter_groups, decay", lambda: groups(lr=0.1, weight_decay=0.01))
    for value in (-1.0, math.nan, "1", None):
        record(f"errors/modules/gmp_parameter_groups/{value}", lambda value=value: groups(lr=value))
    for name, kind in (
        ("LCWLinear", ours.LCWLinear),
        ("GmPLinear", ours.GmPLinear),
        ("WeightNormLinear", ours.WeightNormLinear),
    ):
        record(
            f"modules/skip_init/{name}",
            lambda kind=kind: {k: list(v.shape) for k, v in nn.utils.skip_init(kind, 5, 3).state_dict().items()},
        )
    norm = ours.InputMeanNorm(3)
    record("modules/InputMeanNorm/empty", lambda: [norm(torch.empty(0, 3)), dict(norm.state_dict())])
    record(
        "modules/InputMeanNorm/reset",
        lambda: [norm(torch.ones(2, 3)), norm.reset_running_stats(), dict(norm.state_dict())],
    )
    record(
        "modules/InputMeanNorm/bfloat16",
        lambda: [norm(torch.ones(2, 3, dtype=torch.bfloat16)), dict(norm.state_dict())],
    )
    record(
        "modules/InputMeanNorm/channels last",
        lambda: norm(draw.normal(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    )
    record("errors/modules/InputMeanNorm/float64", lambda: norm(torch.ones(2, 3, dtype=torch.float64)))
    record("errors/modules/InputMeanNorm/int", lambda: norm(torch.ones(2, 3, dtype=torch.int64)))
    record("errors/modules/InputMeanNorm/shape", lambda: norm(torch.ones(2, 4)))


def record_wrong_modules() -> None:
    """Every module with one constructor argument, input or state replaced at a time by values that do not fit."""
    import torch

    from lcw_ops import nn

    right = {
        "LCWLinear": {"in_features": 4, "out_features": 3, "bias": True, "basis": False},
        "GmPLinear": {"in_features": 4, "out_features": 3, "activation": None, "bias": True},
        "WeightNormLinear": {"in_features": 4, "out_features": 3, "bias": True},
        "InputMeanNorm": {"num_features": 4, "momentum": 0.1},
        "OrthogonalFilterMLP": {
            "in_features": 4,
            "width": 3,
            "depth": 2,
            "out_features": 2,
            "filter": "haar",
            "beta": 0.5,
            "alpha": 0.5,
            "activation": "tanh",
            "segment": None,
            "solver": "sequential",
            "tolerance": None,
            "window": None,
        },
        "OrthogonalFilterRNN": {
            "input_size": 4,
            "hidden_size": 3,
            "bias": True,
            "batch_first": False,
            "filter": "haar",
            "beta": 0.5,
            "alpha": 0.5,
            "activation": "tanh",
            "length": None,
            "solver": "parallel",
            "tolerance": None,
            "window": None,
        },
    }
    for rank, family in itertools.product((1, 2, 3), ("LCW", "GmP", "WeightNorm")):
        right[f"{family}Conv{rank}d"] = {
            "in_channels": 4,
            "out_channels": 4,
            "kernel_size": 2,
            "stride": 1,
            "padding": 0,
            "dilation": 1,
            "groups": 2,
            "bias": True,
            "padding_mode": "zeros",
            **({"basis": True} if family == "LCW" else {}),
            **({"activation": "relu"} if family == "GmP" else {}),
        }
    wrong = wrong_values(None) | {
        "1": 1,
        "5": 5,
        "(2, 2)": (2, 2),
        "'same'": "same",
        "'relu'": "relu",
        "an identity": torch.eye(3),
        "ones": torch.ones(3, 3),
        "(3, 3, 3)": torch.eye(3).expand(2, 3, 3),
        "not finite": torch.full((2,), math.nan),
        "a permutation": torch.tensor([2, 0, 1]),
        "no permutation": torch.tensor([2, 0, 0]),
        "bfloat16": torch.eye(3, dtype=torch.bfloat16),
        "int32": torch.eye(3, dtype=torch.int32),
    }
    for name, arguments in right.items():
        kind = getattr(nn, name)
        for key, (what, value) in itertools.product(arguments, wrong.items()):

            def construct(kind=kind, arguments=arguments, key=key, value=value):
                module = make(kind, **{**arguments, key: value})
                return [repr(module), {name: list(tensor.shape) for name, tensor in module.state_dict().items()}]

            record(f"errors/modules/{name}/{key} is {what}", construct)
        for key in ("num_layers", "nonlinearity", "dropout", "bidirectional", "proj_size", "unknown"):
            record(
                f"errors/modules/{name}/{key}", lambda kind=kind, given=arguments, key=key: kind(**given, **{key: 1})
            )
        record(f"errors/modules/{name}/nothing", lambda kind=kind: kind())
        record(f"errors/modules/{name}/three by position", lambda kind=kind: repr(kind(3, 3, 3)))
    for name, (constructor, shape) in module_table().items():
        module, x = make(constructor), Draw(name).normal(*shape)
        for what, value in wrong_values(x).items():
            record(
                f"errors/modules/{name}/input is {what}", lambda module=module, value=value: outputs_of(module, value)
            )

            def evaluate(module=module, value=value):
                with torch.no_grad():
                    return outputs_of(copy.deepcopy(module).eval(), value)

            record(f"errors/modules/{name}/input of inference is {what}", evaluate)
        for key, tensor in module.state_dict().items():
            for what, value in {
                "missing": None,
                "longer": torch.cat([torch.atleast_1d(tensor)] * 2),
                "zeros": torch.zeros_like(tensor),
                "float64": tensor.double(),
            }.items():

                def load(module=module, key=key, value=value):
                    other = copy.deepcopy(module)
                    state = {**other.state_dict(), key: value}
                    if value is None:
                        del state[key]
                    return [attempt(lambda: str(other.load_state_dict(state))), dict(other.state_dict())]

                record(f"errors/modules/{name}/state {key} is {what}", load)


def record_initialisers() -> None:
    import torch
    from torch import nn

    from lcw_ops import init

    def generator():
        return torch.Generator().manual_seed(4)

    activations = (None, "relu", "tanh", "sigmoid", "gelu", "leaky_relu", "unknown")
    for dtype, activation in itertools.product(dtypes(), activations):
        here = f"init/{short(dtype)}/{activation}"
        for basis, shape in ((False, (5, 7)), (True, (5, 6)), (False, (4, 3, 2, 2)), (True, (4, 3, 2)), (False, (4,))):
            record(
                f"{here}/lcw_/{basis}, {shape}",
                lambda dtype=dtype, a=activation, basis=basis, shape=shape: init.lcw_(
                    torch.empty(shape, dtype=dtype), a, 1.5, basis, generator()
                ),
            )
        for rule, degree, has_bias in itertools.product(
            ("joint", "heavy_tail", "anchored", "x"), (4, None, 0), (True, False)
        ):
            record(
                f"{here}/lps_/{rule}, {degree}, {has_bias}",
                lambda dtype=dtype, a=activation, rule=rule, degree=degree, has_bias=has_bias: init.lps_(
                    torch.empty(5, 7, dtype=dtype),
                    torch.empty(5, dtype=dtype) if has_bias else None,
                    a,
                    rule,
                    degree,
                    generator=generator(),
                ),
            )
    samples = Draw("samples of lps_").normal(20, 7)
    record(
        "init/lps_/samples",
        lambda: init.lps_(torch.empty(5, 7), torch.empty(5), "relu", "anchored", 4, samples, generator()),
    )
    for what, wrong in wrong_values(torch.ones(5, 7)).items():
        record(f"init/errors/lcw_/{what}", lambda wrong=wrong: init.lcw_(wrong))
        record(f"init/errors/lps_/{what}", lambda wrong=wrong: init.lps_(wrong, None, generator=generator()))
        record(f"init/errors/gmp_/{what}", lambda wrong=wrong: init.gmp_(wrong, torch.ones(5), torch.ones(5)))
        record(f"init/errors/lps_model_/{what}", lambda wrong=wrong: init.lps_model_(wrong))
    for std in (0.0, -1.0, 1e-5, 1e3, math.nan, "1", None):
        record(f"init/errors/std {std}", lambda std=std: init.lcw_(torch.empty(3, 4), "relu", std))
    for dtype, out_features in itertools.product(dtypes(), (None, 9, 0)):

        def gmp(dtype=dtype, out_features=out_features):
            tensors = torch.empty(5, 6, dtype=dtype), torch.empty(5, dtype=dtype), torch.empty(5, dtype=dtype)
            return init.gmp_(*tensors, out_features, generator())

        record(f"init/gmp_/{short(dtype)}, {out_features}", gmp)
    for rule, with_inputs in itertools.product(("joint", "heavy_tail", "anchored"), (False, True)):

        def fill(rule=rule, with_inputs=with_inputs):
            layers = (
                nn.Conv2d(2, 4, 3, padding=1, groups=2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(64, 5),
                nn.BatchNorm1d(5),
            )
            model = make(lambda: nn.Sequential(*layers, nn.Linear(5, 3)))
            inputs = Draw("inputs of lps_model_").normal(6, 2, 4, 4) if with_inputs else None
            return dict(init.lps_model_(model, inputs, rule=rule, generator=generator()).state_dict())

        record(f"init/lps_model_/{rule}, {with_inputs}", fill)


# ---- Parts: optimizers and hooks -------------------------------------------------------------------------------------


def part_optim() -> None:
    import lcw_ops

    for count in (1, 2):
        with threads(count):
            record_optimizers(f"optim/{count} threads", quick=count == 1)
    with lcw_ops.use_backend("reference"):
        record_optimizers("optim/reference", quick=True)
    record_wrong_optimizers()
    record_hooks()


def optimizer_options(kind: str) -> list[dict]:
    activations = [{"gradient_activation": name} for name in ("arctan", "tanh", "log", None)]
    if kind == "SGD":
        own = [
            {},
            {"momentum": 0.9},
            {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
            {"momentum": 0.9, "activate": "momentum", "alpha": 2.0, "beta": 0.5},
            {"weight_decay": 0.1, "maximize": True},
            {"momentum": 0.5, "foreach": True},
        ]
    else:
        own = [
            {},
            {"amsgrad": True, "weight_decay": 0.1},
            {"betas": (0.5, 0.6), "eps": 1e-3, "maximize": True, "alpha": 2.0, "beta": 0.5},
            {"weight_decay": 0.0, "fused": True},
            {"capturable": False, "foreach": True},
        ]
    return [{**one, **activation} for one, activation in itertools.product(own, activations)]


def parameters_for(dtype, seed: int = 0) -> tuple[list, Callable]:
    """Parameters of hostile shapes and layouts, and a function that sets their gradients for a step."""
    import torch
    from torch import nn

    draw = Draw(f"parameters {seed}")
    shapes = [(), (1,), (7,), (33, 65), (0, 3), (5, 3, 2)]
    parameters = [nn.Parameter(draw.normal(*shape, dtype=dtype)) for shape in shapes]
    parameters += [nn.Parameter(lay_out(draw.normal(9, 11, dtype=dtype), layout)) for layout in LAYOUTS[1:]]
    parameters.append(nn.Parameter(torch.ones(3, dtype=dtype)))

    def give_gradients(step: int) -> None:
        gradients = Draw(f"gradients {step}")
        for place, parameter in enumerate(parameters[:-1]):
            gradient = gradients.normal(*parameter.shape, dtype=dtype, scale=10.0 ** (-place))
            parameter.grad = lay_out(gradient, LAYOUTS[(step + place) % len(LAYOUTS)])

    return parameters, give_gradients


def record_optimizers(prefix: str, quick: bool = False) -> None:
    import torch

    from lcw_ops import optim

    for kind, dtype in itertools.product(("SGD", "AdamW"), dtypes()):
        options = optimizer_options(kind)
        for given in options[:: 5 if quick else 1]:

            def train(kind=kind, dtype=dtype, given=given):
                parameters, give_gradients = parameters_for(dtype)
                optimizer = getattr(optim, kind)(parameters, lr=0.1, **given)
                for step in range(2):
                    give_gradients(step)
                    optimizer.step()
                before = copy.deepcopy(optimizer.state_dict())
                # Load the state, through a state dict and a file, into a new optimizer that makes the last step.
                file = io.BytesIO()
                torch.save(before, file)
                file.seek(0)
                resumed = getattr(optim, kind)(parameters, lr=0.2, **given)
                resumed.load_state_dict(torch.load(file))
                give_gradients(2)
                resumed.step()
                plain = getattr(torch.optim, kind)(copy.deepcopy(parameters), lr=0.3)
                plain.load_state_dict(before)
                return [parameters, before, resumed.state_dict(), sorted(plain.param_groups[0])]

            record(f"{prefix}/{kind}/{short(dtype)}/{given}", train)
    if not quick:
        record_steps(prefix)


def record_steps(prefix: str) -> None:
    """Groups, closures, schedulers, mixed dtypes, copies, gradients on request, tensor rates."""
    import torch

    from lcw_ops import optim

    for kind in ("SGD", "AdamW"):
        make_optimizer = getattr(optim, kind)

        def groups(make_optimizer=make_optimizer):
            parameters, give_gradients = parameters_for(torch.float32)
            optimizer = make_optimizer(
                [
                    {"params": parameters[:3], "gradient_activation": "tanh", "lr": 0.5},
                    {"params": parameters[3:5], "gradient_activation": None},
                ],
                lr=0.1,
                weight_decay=0.1,
            )
            optimizer.add_param_group({"params": parameters[5:], "alpha": 1.0, "beta": 2.0})
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            for step in range(3):
                give_gradients(step)
                optimizer.step()
                schedule.step()
                optimizer.param_groups[0]["gradient_activation"] = "log"
            return [parameters, optimizer.state_dict(), optimizer.defaults, repr(optimizer)]

        record(f"{prefix}/{kind}/groups", groups)

        def closure(make_optimizer=make_optimizer):
            parameters, give_gradients = parameters_for(torch.float32)
            optimizer = make_optimizer(parameters, lr=torch.tensor(0.1))

            def again():
                give_gradients(0)
                return torch.tensor(1.5)

            losses = [optimizer.step(again) for _ in range(2)]
            optimizer.zero_grad()
            optimizer.step()
            return [losses, parameters, optimizer.state_dict()]

        record(f"{prefix}/{kind}/closure", closure)

        def copied(make_optimizer=make_optimizer):
            parameters, give_gradients = parameters_for(torch.float32)
            optimizer = make_optimizer(parameters, lr=0.1)
            give_gradients(0)
            optimizer.step()
            twin = copy.deepcopy(optimizer)
            restored = pickle.loads(pickle.dumps(optimizer))
            for other in (twin, restored):
                for group in other.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = torch.ones_like(parameter)
                other.step()
            return [[group["params"] for group in other.param_groups] for other in (optimizer, twin, restored)]

        record(f"{prefix}/{kind}/copies", copied)

        def from_torch(kind=kind, make_optimizer=make_optimizer):
            parameters, give_gradients = parameters_for(torch.float32)
            plain = getattr(torch.optim, kind)(parameters, lr=0.1, **({"momentum": 0.9} if kind == "SGD" else {}))
            give_gradients(0)
            plain.step()
            ours = make_optimizer(parameters, lr=0.1, gradient_activation="log")
            ours.load_state_dict(plain.state_dict())
            give_gradients(1)
            ours.step()
            return [parameters, ours.state_dict()]

        record(f"{prefix}/{kind}/torch's state", from_torch)

        def mixed(make_optimizer=make_optimizer):
            parameters = [torch.nn.Parameter(Draw(short(dtype)).normal(6, 5, dtype=dtype)) for dtype in dtypes()]
            optimizer = make_optimizer(parameters, lr=0.1)
            for step in range(2):
                for parameter in parameters:
                    parameter.grad = Draw(f"mixed {step}").normal(6, 5, dtype=parameter.dtype)
                optimizer.step()
            return [parameters, optimizer.state_dict()]

        record(f"{prefix}/{kind}/all dtypes", mixed)

        def twice(make_optimizer=make_optimizer):
            parameter = torch.nn.Parameter(torch.ones(3))
            optimizer = make_optimizer([parameter], lr=0.1)
            optimizer.param_groups[0]["params"].append(parameter)
            parameter.grad = torch.full((3,), 0.1)
            optimizer.step()
            return [parameter, optimizer.state_dict()]

        record(f"{prefix}/{kind}/a parameter twice", twice)

        def scaled(make_optimizer=make_optimizer):
            parameter = torch.nn.Parameter(torch.ones(3))
            optimizer, scaler = make_optimizer([parameter], lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
            for factor in (1.0, math.inf, 2.0):
                optimizer.zero_grad()
                scaler.scale((parameter * factor).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
            return [parameter, scaler.get_scale(), optimizer.state_dict()]

        record(f"{prefix}/{kind}/GradScaler", scaled)


def record_wrong_optimizers() -> None:
    import torch

    from lcw_ops import optim

    values = {**wrong_values(None), "'log'": "log", "1e-46": 1e-46, "1e39": 1e39, "(0.9, 1.0)": (0.9, 1.0)}
    for kind in ("SGD", "AdamW"):
        make_optimizer = getattr(optim, kind)
        options = list(inspect.signature(make_optimizer).parameters)[1:]
        for option, (what, value) in itertools.product(options, values.items()):

            def construct(make_optimizer=make_optimizer, option=option, value=value):
                parameter = torch.nn.Parameter(torch.ones(2))
                optimizer = make_optimizer([parameter], **{option: value})
                parameter.grad = torch.tensor([0.1, -0.1])
                return [optimizer.defaults, attempt(optimizer.step), parameter]

            record(f"errors/optim/{kind}/{option} is {what}", construct)

            def write(make_optimizer=make_optimizer, option=option, value=value):
                parameter = torch.nn.Parameter(torch.ones(2))
                optimizer = make_optimizer([parameter], lr=0.1)
                optimizer.param_groups[0][option] = value
                parameter.grad = torch.tensor([0.1, -0.1])
                return [attempt(optimizer.step), parameter]

            record(f"errors/optim/{kind}/group's {option} is {what}", write)
        for option in options:

            def forget(make_optimizer=make_optimizer, option=option):
                parameter = torch.nn.Parameter(torch.ones(2))
                optimizer = make_optimizer([parameter], lr=0.1)
                del optimizer.param_groups[0][option]
                parameter.grad = torch.tensor([0.1, -0.1])
                return [attempt(optimizer.step), parameter]

            record(f"errors/optim/{kind}/group without {option}", forget)
        gradients = {
            "sparse": torch.ones(2, 3).to_sparse(),
            "float64": torch.ones(2, 3, dtype=torch.float64),
            "requires a gradient": torch.ones(2, 3, requires_grad=True),
        }
        for what, gradient in gradients.items():
            for activation in ("arctan", None):

                def step(make_optimizer=make_optimizer, gradient=gradient, activation=activation):
                    parameter = torch.nn.Parameter(torch.ones(2, 3))
                    if gradient.dtype != parameter.dtype:
                        parameter.grad_dtype = None
                    optimizer = make_optimizer([parameter], lr=0.1, gradient_activation=activation)
                    parameter.grad = gradient
                    return [attempt(optimizer.step), parameter]

                record(f"errors/optim/{kind}/gradient is {what}, {activation}", step)
        states = {"SGD": ("momentum_buffer",), "AdamW": ("exp_avg", "exp_avg_sq", "step", "max_exp_avg_sq")}[kind]
        for state, (what, value) in itertools.product(states, wrong_values(torch.ones(2, 3)).items()):

            def tamper(make_optimizer=make_optimizer, kind=kind, state=state, value=value):
                parameter = torch.nn.Parameter(torch.ones(2, 3))
                more = {"momentum": 0.9} if kind == "SGD" else {"amsgrad": True}
                optimizer = make_optimizer([parameter], lr=0.1, **more)
                parameter.grad = torch.full((2, 3), 0.1)
                optimizer.step()
                optimizer.state[parameter][state] = value
                first = attempt(optimizer.step)
                loaded = attempt(lambda: optimizer.load_state_dict(optimizer.state_dict()))
                return [first, loaded, attempt(optimizer.step), parameter]

            record(f"errors/optim/{kind}/{state} is {what}", tamper)
        record(f"errors/optim/{kind}/no parameters", lambda m=make_optimizer: m([]))
        record(f"errors/optim/{kind}/not a list", lambda m=make_optimizer: m(3))


def record_hooks() -> None:
    import torch
    from torch import nn

    import lcw_ops

    kinds = {
        "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
        "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
        "ours, plain": lambda parameters: lcw_ops.optim.SGD(parameters, lr=0.1, gradient_activation=None),
    }
    for name, make_optimizer in kinds.items():
        for kind, dtype in itertools.product(("arctan", "tanh", "log"), dtypes()):

            def train(make_optimizer=make_optimizer, kind=kind, dtype=dtype):
                parameters, give_gradients = parameters_for(dtype)
                optimizer = make_optimizer(parameters)
                handle = lcw_ops.activate_gradients(optimizer, kind, 0.5, 3.0)
                for step in range(2):
                    give_gradients(step)
                    optimizer.step()
                gradients = [parameter.grad for parameter in parameters]
                handle.remove()
                handle.remove()
                give_gradients(2)
                optimizer.step()
                return [gradients, parameters, optimizer.state_dict()]

            record(f"hooks/activate_gradients/{name}/{kind}/{short(dtype)}", train)

    def overridden():
        parameters, give_gradients = parameters_for(torch.float32)
        groups = [
            {"params": parameters[:3], "activate_gradients": False},
            {"params": parameters[3:4], "activate_gradients": {"kind": "log", "alpha": 2.0}},
            {"params": parameters[4:]},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        first = lcw_ops.activate_gradients(optimizer, params=parameters[:6])
        lcw_ops.activate_gradients(optimizer, "tanh", params=parameters[6:])
        give_gradients(0)
        optimizer.step()
        twin = pickle.loads(pickle.dumps(optimizer))
        for other in (copy.deepcopy(optimizer), twin):
            for parameter in (parameter for group in other.param_groups for parameter in group["params"]):
                parameter.grad = torch.full_like(parameter, 0.01)
            other.step()
        first.remove()
        give_gradients(1)
        optimizer.step()
        gradients = [parameter.grad for parameter in parameters]
        return [parameters, gradients, [group["params"] for group in twin.param_groups], optimizer.state_dict()]

    record("hooks/activate_gradients/groups", overridden)

    def closure():
        parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        optimizer = torch.optim.LBFGS([parameter], lr=0.5, max_iter=3)
        lcw_ops.activate_gradients(optimizer)

        def again():
            optimizer.zero_grad()
            loss = parameter.pow(4).sum()
            loss.backward()
            return loss

        return [[optimizer.step(again) for _ in range(2)], parameter]

    record("hooks/activate_gradients/LBFGS", closure)

    def shared_memory():
        parameters = [nn.Parameter(torch.ones(4)) for _ in range(2)]
        whole = torch.full((4,), 0.1)
        parameters[0].grad, parameters[1].grad = whole, whole.view(4)
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        lcw_ops.activate_gradients(optimizer, "log")
        optimizer.step()
        return [parameters, whole]

    record("hooks/activate_gradients/shared memory", shared_memory)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    wrong_calls = {
        "no optimizer": lambda: lcw_ops.activate_gradients(3),
        "a module": lambda: lcw_ops.activate_gradients(nn.Linear(2, 2)),
        "kind": lambda: lcw_ops.activate_gradients(optimizer, "sin"),
        "alpha": lambda: lcw_ops.activate_gradients(optimizer, alpha=-1.0),
        "beta": lambda: lcw_ops.activate_gradients(optimizer, beta="1"),
        "no params": lambda: lcw_ops.activate_gradients(optimizer, params=[]),
        "other params": lambda: lcw_ops.activate_gradients(optimizer, params=[torch.ones(2)]),
        "params is a tensor": lambda: lcw_ops.activate_gradients(optimizer, params=torch.ones(2)),
        "twice": lambda: [lcw_ops.activate_gradients(optimizer), lcw_ops.activate_gradients(optimizer)],
        "ours": lambda: lcw_ops.activate_gradients(lcw_ops.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)),
        "differentiable": lambda: lcw_ops.activate_gradients(
            torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, differentiable=True)
        ),
        "hook: no module": lambda: lcw_ops.register_gradient_hook(3),
        "hook: no parameters": lambda: lcw_ops.register_gradient_hook(nn.ReLU()),
        "hook: lazy": lambda: lcw_ops.register_gradient_hook(nn.LazyLinear(3)),
        "hook: kind": lambda: lcw_ops.register_gradient_hook(nn.Linear(2, 2), "sin"),
        "hook: twice": lambda: [lcw_ops.register_gradient_hook(layer) for layer in [nn.Linear(2, 2)] * 2],
    }
    for what, call in wrong_calls.items():
        record(f"errors/hooks/{what}", call)
    for what, gradient in {
        "sparse": torch.ones(2).to_sparse(),
        "a graph": torch.ones(2, requires_grad=True) * 1,
    }.items():

        def step(gradient=gradient):
            parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
            optimizer = torch.optim.SGD(parameters, lr=0.1)
            lcw_ops.activate_gradients(optimizer)
            parameters[0].grad, parameters[1].grad = torch.ones(2), gradient
            return [attempt(optimizer.step), parameters, parameters[0].grad]

        record(f"errors/hooks/gradient is {what}", step)

    def hooked(kind="arctan"):
        model = make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        x = Draw("hooked").normal(5, 3)
        handle = lcw_ops.register_gradient_hook(model, kind, 0.5, 3.0)
        found = []
        for _ in range(2):
            model(x).square().sum().backward()
            found.append([parameter.grad.clone() for parameter in model.parameters()])
        model[2] = nn.Linear(4, 2)
        nn.init.ones_(model[2].weight)
        nn.init.ones_(model[2].bias)
        twin = copy.deepcopy(model)
        twin.zero_grad()
        model.zero_grad()
        model(x).square().sum().backward()
        twin(x).square().sum().backward()
        found += [[parameter.grad for parameter in one.parameters()] for one in (model, twin)]
        handle.remove()
        model.zero_grad()
        model(x).square().sum().backward()
        return [
            found,
            [parameter.grad for parameter in model.parameters()],
            type(pickle.loads(pickle.dumps(handle))).__name__,
        ]

    for kind in ("arctan", "tanh", "log"):
        record(f"hooks/register_gradient_hook/{kind}", lambda kind=kind: hooked(kind))


# ---- Parts: compiled and exported programs ---------------------------------------------------------------------------


def part_compile() -> None:
    """torch.compile without graph breaks: functions, modules, other sizes, and a few cases with generated code."""
    import torch

    import lcw_ops

    def compiled(function: Callable, **options) -> Callable:
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, **options)

    for name, (function, tensors, options) in examples(torch.float32).items():

        def call(function=function, options=options, **given):
            return function(**given, **options)

        record(
            f"compile/aot_eager/{name}",
            lambda call=call, tensors=tensors: derivatives(
                "compiled", compiled(call, backend="aot_eager"), tensors, second=False
            ),
        )
    table = module_table()
    names = [
        "LCWLinear",
        "GmPLinear, relu",
        "WeightNormLinear",
        "LCWConv2d",
        "GmPConv2d",
        "WeightNormConv1d",
        "InputMeanNorm",
        "MLP, haar",
        "MLP, parallel",
        "RNN, batch first",
    ]
    for name in names:
        constructor, shape = table[name]

        def train(constructor=constructor, shape=shape, name=name, **options):
            module, x = make(constructor), Draw(name).normal(*shape).requires_grad_()
            outputs = outputs_of(compiled(module, **options), x)
            sum(output.square().sum() for output in outputs).backward()
            return [outputs, x.grad, [parameter.grad for parameter in module.parameters()], list(module.state_dict())]

        record(f"compile/aot_eager/{name}", lambda train=train: train(backend="aot_eager"))
        if name in ("LCWLinear", "MLP, haar"):
            record(f"compile/inductor/{name}", lambda train=train: train(backend="inductor"))

        def evaluate(constructor=constructor, shape=shape, name=name):
            module = compiled(make(constructor).eval(), backend="aot_eager", dynamic=True)
            draw = Draw(name)
            with torch.no_grad():
                return [outputs_of(module, draw.normal(rows, *shape[1:])) for rows in (shape[0], shape[0] + 3)]

        record(f"compile/dynamic/{name}", evaluate)
    for kind in ("SGD", "AdamW"):

        def step(kind=kind):
            parameters, give_gradients = parameters_for(torch.float32)
            optimizer = getattr(lcw_ops.optim, kind)(parameters, lr=0.1)
            torch._dynamo.reset()
            compiled_step = torch.compile(optimizer.step, backend="aot_eager")
            give_gradients(0)
            compiled_step()
            return parameters

        record(f"compile/optim/{kind}", step)

    def activate():
        tensors = [Draw("compiled gradients").normal(5)]

        def call(tensors):
            lcw_ops.functional.gradient_activation_(tensors, "log")
            return tensors[0] + 1

        return [compiled(call, backend="aot_eager")(tensors), tensors]

    record("compile/gradient_activation_", activate)


def part_export() -> None:
    """Exported programs: the names of their ops, their results, and programs that run without lcw_ops' kernels."""
    import torch

    import lcw_ops

    for name, (constructor, shape) in module_table().items():
        module, x = make(constructor).eval(), Draw(name).normal(*shape)

        def export(module=module, x=x, strict=False, dynamic=False):
            shapes = ({0: torch.export.Dim("rows", min=2, max=64)},) if dynamic else None
            program = torch.export.export(module, (x,), strict=strict, dynamic_shapes=shapes)
            return [ops_of(program.graph_module), list(program.state_dict), program.module()(x)]

        record(f"export/{name}", export)
        if name in ("LCWLinear", "GmPLinear", "WeightNormLinear", "MLP, haar", "RNN, haar"):
            record(f"export/{name}/strict", lambda export=export: export(strict=True))
            record(f"export/{name}/dynamic", lambda export=export: export(dynamic=True))

        def export_kernels(export=export):
            with lcw_ops.use_backend("cpp"), torch.no_grad():
                return export()

        record(f"export/{name}/cpp", export_kernels)
        record(f"export/{name}/cpp, with gradients", lambda e=export: on_backend("cpp", e))
        record(f"export/{name}/reference", lambda e=export: on_backend("reference", e))

        def trace(module=module, x=x):
            traced = torch.jit.trace(module, (x,), check_trace=False)
            return [sorted({node.kind() for node in traced.inlined_graph.nodes()}), traced(x)]

        record(f"export/{name}/jit.trace", trace)
        record(f"export/{name}/fx", lambda module=module, x=x: symbolic(module, x))
    for name, (function, tensors, options) in examples(torch.float32).items():

        class Call(torch.nn.Module):
            def __init__(self, function=function, options=options) -> None:
                super().__init__()
                self.function, self.options = function, options

            def forward(self, **given):
                return self.function(**given, **self.options)

        def export_call(kind=Call, tensors=tensors):
            program = torch.export.export(kind(), (), tensors, strict=False)
            return [ops_of(program.graph_module), program.module()(**tensors)]

        record(f"export/functional/{name}", export_call)
        record(f"export/functional/{name}/cpp", lambda e=export_call: on_backend("cpp", e))


def on_backend(backend: str, function: Callable) -> object:
    import lcw_ops

    with lcw_ops.use_backend(backend):
        return function()


def ops_of(graph_module) -> list[str]:
    """The targets of all calls, including those inside the bodies of scans."""
    return [
        str(node.target)
        for part in graph_module.modules()
        if hasattr(part, "graph")
        for node in part.graph.nodes
        if node.op == "call_function"
    ]


def symbolic(module, x) -> list:
    import torch

    traced = torch.fx.symbolic_trace(module)
    calls = [(node.op, getattr(node.target, "__name__", str(node.target))) for node in traced.graph.nodes]
    return [calls, outputs_of(traced, x)]


# ---- Parts: the profiler, the command and process groups -------------------------------------------------------------


def part_profile() -> None:
    import numpy as np
    import torch
    from torch import nn

    import lcw_ops
    from lcw_ops import profile

    table = module_table()
    models: dict[str, tuple[Callable, tuple]] = {
        **{name: table[name] for name in table if name.startswith(("MLP", "RNN"))},
        "plain": (
            lambda: nn.Sequential(
                lcw_ops.nn.GmPLinear(5, 7, "relu"),
                lcw_ops.nn.InputMeanNorm(7),
                lcw_ops.nn.LCWLinear(7, 6),
                nn.Tanh(),
                lcw_ops.nn.WeightNormLinear(6, 3),
            ),
            (8, 5),
        ),
        "convolutions": (
            lambda: nn.Sequential(
                lcw_ops.nn.LCWConv2d(2, 3, 3), nn.ReLU(), lcw_ops.nn.WeightNormConv2d(3, 2, 2), nn.Flatten()
            ),
            (3, 2, 6, 6),
        ),
        "parallel, 60 layers": (
            lambda: lcw_ops.nn.OrthogonalFilterMLP(4, 6, 60, 3, "permutation", solver="parallel"),
            (5, 4),
        ),
    }
    for name, (constructor, shape) in models.items():
        for method in ("exact", "lanczos"):

            def measure(constructor=constructor, shape=shape, name=name, method=method):
                found = profile.profile(
                    make(constructor),
                    Draw(name).normal(*shape),
                    jacobian_method=method,
                    repeats=1,
                    matmul_rate=1e9,
                    name="net",
                )
                timing = found.timing
                return {
                    "loss": found.loss,
                    "samples": found.samples,
                    "rows": len(found),
                    "backend": found.backend,
                    "columns": found.columns,
                    "jacobians": {what: vars(spectrum) for what, spectrum in found.jacobians.items()},
                    "timing": [timing.repeats, timing.layers, timing.forward_flops, timing.backward_flops],
                    "solves": {direction: vars(solves) for direction, solves in found.solves.items()},
                    "summary": sorted(found.summary()),
                    "timing's summary": sorted(found.summary()["timing"]),
                    "machine": sorted(found.machine),
                    "csv": list(found.csv_rows()),
                }

            record(f"profile/{name}/{method}", measure)

    def with_targets():
        model = make(lambda: nn.Linear(4, 3))
        x, targets = Draw("targets").normal(6, 4), torch.arange(6) % 3
        found = profile.profile(model, x, targets, jacobian=False, repeats=1, matmul_rate=1e9)
        mean = profile.profile(model, x, loss=lambda y: y.mean(), jacobian=False, repeats=1, matmul_rate=1e9)
        return [found.name, found.loss, found.columns, mean.loss, mean.columns]

    record("profile/targets", with_targets)
    draw = Draw("bounds")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape in ((5, 7), (3, 6, 6), (0, 4, 4), (1, 1)):
            weight = draw.normal(*shape, dtype=dtype)
            record(
                f"profile/spectral_norm_bound/{short(dtype)}, {shape}",
                lambda weight=weight: profile.spectral_norm_bound(weight),
            )
    record("profile/spectral_norm_bound/NaN", lambda: profile.spectral_norm_bound(torch.full((2, 2), math.nan)))
    matrix = draw.normal(80, 90, dtype=torch.float64)
    record(
        "profile/lanczos_spectrum",
        lambda: vars(profile.lanczos_spectrum(lambda v: matrix @ v, lambda u: matrix.mT @ u, (80, 90))),
    )
    for method in ("auto", "exact", "lanczos", "unknown"):
        record(
            f"profile/function_spectrum/{method}",
            lambda method=method: vars(
                profile.function_spectrum(lambda x: (matrix.float()[:70, :5] @ x).tanh(), torch.ones(5), method)
            ),
        )
    wrong_calls = {
        "no module": lambda: profile.profile(3, torch.ones(2)),
        "no tensor": lambda: profile.profile(nn.Linear(2, 2), "x"),
        "no samples": lambda: profile.profile(nn.Linear(2, 2), torch.ones(0, 2)),
        "repeats 0": lambda: profile.profile(nn.Linear(2, 2), torch.ones(2, 2), repeats=0),
        "repeats 1.5": lambda: profile.profile(nn.Linear(2, 2), torch.ones(2, 2), repeats=1.5),
        "a loss of two": lambda: profile.profile(nn.Linear(2, 2), torch.ones(2, 2), loss=lambda y: y),
        "no module called": lambda: profile.profile(nn.Module(), torch.ones(2, 2)),
    }
    for what, call in wrong_calls.items():
        record(f"errors/profile/{what}", call)
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        data = Path(folder) / "data.npz"
        np.savez(data, x=generator.normal(size=(60, 5)), y=np.arange(60) % 3)
        record_commands(Path(folder), data)


def record_commands(folder: Path, data: Path) -> None:
    """The command lcw-ops: its exit codes, its files and their numbers, and its flags."""
    import torch

    from lcw_ops.cli import main

    def run(*arguments: str) -> tuple[int, str]:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()):
            try:
                code = main(list(arguments))
            except SystemExit as stop:
                code = stop.code
        return code, text.getvalue()

    def files(place: Path) -> dict:
        found = {}
        for path in sorted(place.rglob("*")):
            if path.suffix == ".pt":
                content = path.read_bytes()
                if content[-32:] == hashlib.sha256(content[:-32]).digest():
                    content = content[:-32]
                tensors = torch.load(io.BytesIO(content), weights_only=True)
                # The configuration holds the versions of lcw_ops and torch, which may differ.
                found[path.name] = {key: tensor for key, tensor in tensors.items() if key != "configuration"}
            elif path.name == "metrics.csv":
                found[path.name] = path.read_text()
            elif path.is_file():
                found[path.name] = None
        return found

    sizes = ("--data", str(data), "--width", "6", "--batch", "8", "--threads", "1")
    for kind, more in {
        "mlp": ("--depth", "9", "--filter", "haar"),
        "rnn": ("--depth", "7", "--schedule", "constant"),
        "mlp relu": ("--depth", "4", "--filter", "permutation", "--activation", "relu", "--seed", "3"),
    }.items():
        place = folder / f"train {kind}"
        where = ("--checkpoint", str(place / "checkpoints"), "--out", str(place / "out"))

        def train(kind=kind, more=more, place=place, where=where):
            begin = ("train", "--kind", kind.split()[0], *sizes, *more)
            codes = [run(*begin, "--steps", "4", "--every", "2", *where)[0]]
            codes.append(run(*begin, "--steps", "6", *where)[0])
            codes.append(run(*begin, "--steps", "6", "--resume", *where)[0])
            return [codes, files(place)]

        record(f"command/train/{kind}", train)
    for kind in ("orthogonal-filter", "plain", "residual"):
        place = folder / f"profile {kind}"

        def profile(kind=kind, place=place):
            code, _ = run("profile", "--kind", kind, "--depth", "6", "--steps", "2", *sizes, "--out", str(place))
            return [code, sorted(path.name for path in place.rglob("*")) if place.exists() else None]

        record(f"command/profile/{kind}", profile)
    for command in ("", "profile", "train", "bench", "info", "report"):
        _, text = run(*command.split(), "--help")
        record(f"command/flags/{command}", lambda text=text: sorted(set(re.findall(r"--[a-z][a-z0-9-]*", text))))
    record("command/version", lambda: run("--version"))

    def information():
        code, text = run("info", "--json")
        facts = json.loads(text)
        chosen = {
            op: {where: facts["backend"] for where, facts in devices.items()} for op, devices in facts["ops"].items()
        }
        return [
            code,
            sorted(facts),
            chosen,
            sorted(facts["cpu"]),
            sorted(next(iter(next(iter(facts["ops"].values())).values()))),
        ]

    record("command/info", information)
    for what, arguments in {
        "unknown command": ("fly",),
        "no command": (),
        "unknown flag": ("train", "--unknown"),
        "depth 0": ("train", "--depth", "0", *sizes),
        "a word": ("train", "--steps", "many"),
        "no data": ("train", "--data", str(folder / "nothing.npz")),
        "unknown filter": ("train", "--filter", "x", *sizes),
        "unknown activation": ("profile", "--activation", "x", *sizes),
        "resume without folder": ("train", "--resume", *sizes),
        "batch too large": ("train", "--data", str(data), "--batch", "1000"),
        "steps and epochs": ("train", "--steps", "1", "--epochs", "1", *sizes),
        "unknown benchmark": ("bench", "unknown"),
        "no such device": ("train", "--device", "cuda:7", *sizes),
    }.items():
        record(f"command/errors/{what}", lambda arguments=arguments: run(*arguments)[0])


def part_distributed() -> None:
    """DepthParallel on gloo with one and two processes."""
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                subprocess.Popen(
                    [sys.executable, __file__, "rank", str(rank), str(world), folder],
                    env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
                )
                for rank in range(world)
            ]
            codes = [rank.wait(timeout=TIMEOUT) for rank in ranks]
            record(f"distributed/{world} processes/exit codes", lambda codes=codes: codes)
            for rank in range(world):
                file = Path(folder) / f"{rank}.json"
                found = json.loads(file.read_text()) if file.exists() else {}
                CASES.update(
                    {f"distributed/{world} processes/rank {rank}/{name}": case for name, case in found.items()}
                )


def run_rank(rank: int, world: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    import lcw_ops
    from lcw_ops import distributed, nn

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    options = {
        "haar": {},
        "permutation, relu": {"filter": "permutation", "activation": "relu"},
        "scales per layer": {"filter": "identity", "beta": torch.linspace(0.01, 0.05, 23), "activation": "sigmoid"},
        "tolerance": {"filter": "cyclic", "tolerance": 1e-3, "solver": "parallel"},
        "too strong": {"filter": "permutation", "alpha": 0.5, "beta": 3.0},
    }
    for (name, given), dtype in itertools.product(options.items(), (torch.float32, torch.float64, torch.bfloat16)):
        here = f"{name}/{short(dtype)}"

        def train(given=given, dtype=dtype, name=name):
            plain = make(lambda: nn.OrthogonalFilterMLP(4, 6, 23, 3, **given)).to(dtype)
            deep = distributed.DepthParallel(plain)
            optimizer = lcw_ops.optim.SGD(deep.parameters(), lr=0.1)
            x = Draw(name).normal(5, 4, dtype=dtype)
            found = [repr(deep), deep.start, deep.stop, {k: list(v.shape) for k, v in deep.state_dict().items()}]
            for _ in range(2):
                optimizer.zero_grad()
                leaf = x.clone().requires_grad_()
                output = deep(leaf)
                output.float().square().sum().backward()
                found += [output, leaf.grad, [parameter.grad for parameter in deep.parameters()]]
                optimizer.step()
            whole = deep.full_state_dict()
            found += [dict(whole), dict(deep.full_state_dict(rank0_only=True))]
            deep.load_full_state_dict(plain.state_dict() if rank == 0 else None)
            with torch.no_grad():
                found.append(deep(x))
            return found

        record(here, train)
    plain = make(lambda: nn.OrthogonalFilterMLP(4, 6, 23, 3))
    deep = distributed.DepthParallel(plain)
    record("errors/pickle", lambda: pickle.dumps(deep))
    record("errors/wrong input", lambda: deep(torch.ones(2, 3)))
    record("errors/no module", lambda: distributed.DepthParallel(torch.nn.Linear(2, 2)))
    record("errors/state", lambda: deep.load_full_state_dict({}))
    record("errors/other samples", lambda: deep(torch.ones(2 + rank, 4)))
    record(
        "errors/filter per layer",
        lambda: distributed.DepthParallel(
            make(lambda: nn.OrthogonalFilterMLP(4, 6, 3, 3, torch.eye(6).expand(3, 6, 6)))
        ),
    )
    (folder / f"{rank}.json").write_text(json.dumps(CASES))
    dist.barrier()
    dist.destroy_process_group()


# ---- Parts: names ----------------------------------------------------------------------------------------------------

PACKAGES = ("functional", "nn", "optim", "init", "reference", "distributed", "profile", "ops")

# Every module without an underscore that could be imported when recordings were introduced.
MODULES = {
    "bench": [
        "arguments",
        "crossover",
        "gpu",
        "gradient_activation",
        "hypersphere",
        "lcw_linear",
        "orthogonal_filter",
        "parallel_depth",
        "registry",
        "runner",
        "smoke",
    ],
    "cli": [],
    "data": [],
    "distributed": [],
    "functional": [],
    "gradient_hooks": [],
    "init": [],
    "kernels": ["gradient_activation", "hypersphere", "lcw_linear", "orthogonal_filter", "parallel_depth"],
    "nn": ["hypersphere", "lcw_linear", "orthogonal_filter"],
    "ops": [
        "fingerprint",
        "flops",
        "gradient_activation",
        "hypersphere",
        "lcw_linear",
        "orthogonal_filter",
        "orthogonal_filter_crossover",
        "orthogonal_filter_graph",
        "parallel_depth",
        "parallel_depth_crossover",
        "parallel_depth_frame",
        "parallel_depth_solver",
    ],
    "optim": ["adamw", "sgd"],
    "profile": [
        "bounds",
        "files",
        "jacobian",
        "layers",
        "machine",
        "main_job",
        "orthogonal_filter",
        "plot",
        "profiler",
        "progress",
        "result",
    ],
    "reference": [
        "checks",
        "gradient_activation",
        "hypersphere",
        "lcw_linear",
        "lps",
        "orthogonal_filter",
        "parallel_depth",
    ],
    "train": ["arguments", "checkpoints", "job", "loop", "schedule", "settings"],
}


def part_names() -> None:
    """Names, signatures and schemas, and the modules that importing the package imports."""
    import lcw_ops

    record("names/lcw_ops/__all__", lambda: list(lcw_ops.__all__))
    record("names/lcw_ops/dir before torch", lambda: [name for name in dir(lcw_ops) if not name.startswith("_")])
    record("names/import/torch is not imported", lambda: "torch" in sys.modules)
    import torch

    loaded = (
        "torch._dynamo",
        "torch._inductor",
        "torch.utils.flop_counter",
        "triton",
        "torch.onnx",
        "sklearn",
        "matplotlib",
    )
    before = {name for name in loaded if name in sys.modules}
    record("names/lcw_ops/dir after torch", lambda: [name for name in dir(lcw_ops) if not name.startswith("_")])
    for name in lcw_ops.__all__:
        record(f"names/lcw_ops/{name}", lambda name=name: type(getattr(lcw_ops, name)).__name__)
    record("names/import/what comes along", lambda: sorted({n for n in loaded if n in sys.modules} - before))
    record("names/version", lambda: lcw_ops.__version__)
    for package in PACKAGES:
        module = importlib.import_module(f"lcw_ops.{package}")
        names = list(getattr(module, "__all__", None) or own_names(module))
        record(f"names/{package}/__all__", lambda module=module: sorted(getattr(module, "__all__", ["has none"])))
        # Leave out names that a package only imports for its own use.
        record(f"names/{package}/dir", lambda module=module: own_names(module))
        for name in names:
            record(f"names/{package}/{name}", lambda module=module, name=name: signatures(getattr(module, name)))
    for name in ("activate_gradients", "register_gradient_hook", "use_backend", "info", "BackendError"):
        record(f"names/signature of lcw_ops.{name}", lambda name=name: signatures(getattr(lcw_ops, name)))
    for ours, theirs in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)):
        record(f"names/bases/{ours}", lambda ours=ours, t=theirs: issubclass(getattr(lcw_ops.optim, ours), t))
    for name in lcw_ops.nn.__all__:
        kind = getattr(lcw_ops.nn, name)
        if isinstance(kind, type):
            plain = [base.__name__ for base in kind.__mro__ if base.__module__.startswith("torch.")]
            record(f"names/bases/{name}", lambda plain=plain: plain)
    for op in sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lcw_ops::")):
        base, _, overload = op.removeprefix("lcw_ops::").partition(".")
        found = getattr(getattr(torch.ops.lcw_ops, base), overload or "default")
        record(f"names/ops/{op}", lambda found=found: str(found._schema))
        keys = (
            "CPU",
            "CUDA",
            "CompositeExplicitAutograd",
            "Meta",
            "AutocastCPU",
            "AutocastCUDA",
            "FuncTorchBatched",
            "Autograd",
        )
        record(
            f"names/ops/{op}/kernels",
            lambda op=op, keys=keys: [key for key in keys if torch._C._dispatch_has_kernel_for_dispatch_key(op, key)],
        )
    for package, parts in MODULES.items():
        for name in (package, *(f"{package}.{part}" for part in parts)):
            CASES[f"names/modules/{name}"] = module_names(f"lcw_ops.{name}")


def own_names(module) -> list[str]:
    """The public functions, classes and submodules of lcw_ops among a module's names."""
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (getattr(value, "__module__", None) or getattr(value, "__name__", "")).startswith("lcw_ops")
    )


def module_names(name: str) -> object:
    """The names that a module defines, and all its public names.

    A name that a module defines in the first recording must be available there in the second.
    """
    try:
        module = importlib.import_module(name)
    except Exception as error:
        return {"raises": type(error).__name__}
    public = {
        key: value for key, value in vars(module).items() if not key.startswith("_") and not inspect.ismodule(value)
    }
    defined = [key for key, value in public.items() if getattr(value, "__module__", None) == name]
    constants = [key for key in public if key.isupper()]
    return {"defined": sorted({*defined, *constants}), "available": sorted(public)}


def signatures(value: object) -> object:
    """The signature of a function. For a class, those of its constructor and public methods, and its properties."""
    if inspect.ismodule(value):
        return "a module"
    if not inspect.isclass(value):
        return str(inspect.signature(value)) if callable(value) else type(value).__name__
    found = {"(constructor)": attempt(lambda: str(inspect.signature(value)))}
    for name, member in inspect.getmembers(value):
        # Leave out torch's own methods.
        is_ours = any(name in vars(base) for base in value.__mro__ if base.__module__.startswith("lcw_ops"))
        if name.startswith("_") or not is_ours:
            continue
        found[name] = attempt(lambda m=member: str(inspect.signature(m))) if callable(member) else type(member).__name__
    return found


# ---- Recordings ------------------------------------------------------------------------------------------------------

PARTS = {
    "names": (part_names, {}),
    "functions": (part_functions, {}),
    "functions-avx2": (part_functions, {"LCW_OPS_CPU_CAPABILITY": "avx2"}),
    "functions-portable": (part_functions, {"LCW_OPS_CPU_CAPABILITY": "portable"}),
    "reference": (part_reference, {}),
    "transforms": (part_transforms, {}),
    "errors": (part_errors, {}),
    "modules": (part_modules, {}),
    "optim": (part_optim, {}),
    "compile": (part_compile, {}),
    "export": (part_export, {}),
    "triton": (part_triton, {"TRITON_INTERPRET": "1"}),
    "profile": (part_profile, {}),
    "distributed": (part_distributed, {}),
}

# The user's own settings must not affect the recording.
FIXED = {
    "LCW_OPS_CACHE_DIR": "",
    "OMP_NUM_THREADS": "2",
    # On a busy machine, threads that wait actively would block the processors for other work.
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONHASHSEED": "0",
    "COLUMNS": "80",
}
UNSET = ("LCW_OPS_BACKEND", "LCW_OPS_MATMUL", "LCW_OPS_CPU_CAPABILITY", "TRITON_INTERPRET", "MKL_CBWR")


def run_part(name: str, file: str) -> None:
    """Record one part, in this process."""
    function, _ = PARTS[name]
    if name != "names":
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_num_threads(2)
    start = time.perf_counter()
    function()
    unexpected = sum(isinstance(case, dict) and "raises" in case for case in CASES.values())
    print(f"{name}: {len(CASES)} cases, {unexpected} raise, {time.perf_counter() - start:.0f} s", flush=True)
    Path(file).write_text(json.dumps(CASES))


def record_all(file: str, parts: list[str], jobs: int) -> int:
    """Record each part in a process of its own, into the file. Other parts that the file has are kept."""
    clean = {name: value for name, value in os.environ.items() if name not in UNSET} | FIXED
    recorded = json.loads(Path(file).read_text()) if Path(file).exists() else {}
    failed = []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:

        def run(name: str) -> int:
            own = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
            command = [sys.executable, __file__, "part", name, f"{folder}/{name}.json"]
            return subprocess.run(command, env=clean | own | PARTS[name][1], timeout=TIMEOUT).returncode

        running = {pool.submit(run, name): name for name in parts}
        for done in concurrent.futures.as_completed(running):
            name = running[done]
            if done.exception() is not None or done.result() != 0:
                failed.append(name)
                continue
            recorded[name] = json.loads(Path(f"{folder}/{name}.json").read_text())
            # Save each finished part, even if others fail later.
            Path(file).write_text(json.dumps(recorded, separators=(",", ":"), sort_keys=True))
    print(f"{sum(map(len, recorded.values()))} cases in {file}")
    if failed:
        print(f"these parts failed: {', '.join(sorted(failed))}", file=sys.stderr)
    return 1 if failed else 0


# ---- Comparing -------------------------------------------------------------------------------------------------------


def differences(before: object, after: object, path: str = "") -> Iterator[str]:
    """The differences between two descriptions, one line each."""
    if before == after:
        return
    if is_tensor(before) and is_tensor(after):
        yield f"{path}: {tensor_difference(before, after)}"
    elif isinstance(before, dict) and isinstance(after, dict) and "defined" in before and "defined" in after:
        lost = sorted(set(before["defined"]) - set(after["available"]))
        if lost:
            yield f"{path}: lost {', '.join(lost)}"
    elif isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            if key not in after:
                yield f"{path}/{key}: only before"
            elif key not in before:
                yield f"{path}/{key}: only after"
            else:
                yield from differences(before[key], after[key], f"{path}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{path}/{place}")
    else:
        yield f"{path}: {shortened(before)} -> {shortened(after)}"


def shortened(value: object, longest: int = 300) -> str:
    text = json.dumps(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def is_tensor(value: object) -> bool:
    return isinstance(value, dict) and {"dtype", "shape", "strides"} <= value.keys()


def tensor_difference(before: dict, after: dict) -> str:
    for key in ("dtype", "shape", "strides", "device"):
        if before.get(key) != after.get(key):
            return f"{key} {before.get(key)} -> {after.get(key)}"
    one, other = shown_values(before), shown_values(after)
    gaps = [abs(a - b) for a, b in zip(one, other, strict=True) if not (math.isnan(a) and math.isnan(b))]
    known = [gap for gap in gaps if not math.isnan(gap)]
    largest = max(known, default=0.0)
    where = "all values" if "bytes" in before else f"{VALUES_SHOWN} of the values"
    return f"{before['dtype']}{before['shape']}: other bits; {where} differ by at most {largest:.3g}"


def shown_values(tensor: dict) -> list[float]:
    if "values" in tensor:
        return [float.fromhex(value) if isinstance(value, str) else float(value) for value in tensor["values"]]
    import torch

    raw = bytearray(base64.b64decode(tensor["bytes"]))
    if not raw:
        return []
    flat = torch.frombuffer(raw, dtype=getattr(torch, tensor["dtype"]))
    return [value.real if isinstance(value, complex) else float(value) for value in flat.tolist()]


def compare(before_file: str, after_file: str, expected: list[str]) -> int:
    before, after = (json.loads(Path(file).read_text()) for file in (before_file, after_file))
    unused, count, allowed = set(expected), 0, 0
    for part in sorted(before.keys() ^ after.keys()):
        print(f"{part}: this part is recorded in {before_file if part in before else after_file} alone")
        count += 1
    for part in sorted(before.keys() & after.keys()):
        for name in sorted(before[part].keys() | after[part].keys()):
            one, other = (cases[part].get(name, "no such case") for cases in (before, after))
            for line in differences(one, other):
                text = f"{part}: {name}{line}"
                patterns = [pattern for pattern in expected if fnmatch.fnmatchcase(text, pattern)]
                unused -= set(patterns)
                if patterns:
                    allowed += 1
                else:
                    count += 1
                    print(text)
    for pattern in sorted(unused):
        print(f"no difference matches the pattern {pattern!r}")
    cases = sum(map(len, before.values()))
    print(f"{cases} cases before, {count} differences, and {allowed} that are expected")
    return 1 if count else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="record the behaviour of the lcw_ops that Python finds")
    recording.add_argument("file")
    recording.add_argument("--part", action="append", choices=PARTS, help="record only this part; may be repeated")
    recording.add_argument("--jobs", type=int, default=2, help="the number of parts that run at a time")
    comparing = commands.add_parser("compare", help="print the differences; exit with 1 if there are any")
    comparing.add_argument("before")
    comparing.add_argument("after")
    comparing.add_argument("--expect", action="append", default=[], help="a shell-style pattern of expected lines")
    comparing.add_argument("--expect-file", help="a file of such patterns, one per line; # begins a comment")
    part = commands.add_parser("part")
    part.add_argument("name", choices=PARTS)
    part.add_argument("file")
    rank = commands.add_parser("rank")
    rank.add_argument("rank", type=int)
    rank.add_argument("world", type=int)
    rank.add_argument("folder", type=Path)
    given = parser.parse_args()
    if given.command == "record":
        return record_all(given.file, given.part or list(PARTS), given.jobs)
    if given.command == "part":
        run_part(given.name, given.file)
        return 0
    if given.command == "rank":
        run_rank(given.rank, given.world, given.folder)
        return 0
    lines = Path(given.expect_file).read_text().splitlines() if given.expect_file else []
    patterns = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return compare(given.before, given.after, given.expect + patterns)


if __name__ == "__main__":
    sys.exit(main())
