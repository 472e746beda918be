"""Measures which kernel of the orthogonal-filter recurrence is the fastest at each width.

There are two cases at every width: forward and backward over depth, and the same over time. In each case the available
kernels take turns, by the rules of bench/runner.py, and a wrong kernel is not timed. The fastest kernel is the one with
the smallest geometric mean of its two times. The times go into a CSV. The result is printed as a line of code for
lcw_ops/ops/orthogonal_filter/crossover.py.
"""

import argparse
import csv
import functools
import math
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcw_ops.bench import registry, runner
from lcw_ops.nn.orthogonal_filter import make_filter
from lcw_ops.ops import backends, library
from lcw_ops.ops.orthogonal_filter import crossover as orthogonal_filter_crossover
from lcw_ops.ops.orthogonal_filter import graph as orthogonal_filter_graph
from lcw_ops.ops.orthogonal_filter.op import BACKWARD, DEFAULT_SEGMENT, NAME
from lcw_ops.reference.orthogonal_filter import orthogonal_filter, orthogonal_filter_backward

WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
ROWS, STEPS = 64, 256

# The variable that chooses between the kernels of csrc/cuda.
CUDA_KERNEL = "LCW_OPS_CUDA_KERNEL"


@dataclass(frozen=True)
class Kernel:
    """Two functions with the signatures of the ops. The first word of ``name`` is the kernel's name in crossover.py."""

    name: str
    forward: Callable
    backward: Callable


def kernels(device_type: str) -> list[Kernel]:
    """The kernels that run on a device of this type."""
    found = []
    for backend in ("cpp", "triton", "cuda"):
        if backends.missing_reason(NAME, backend, device_type) is not None:
            continue
        overloads = [library.get_overload(name, backend) for name in (NAME, BACKWARD)]
        names = [backend] if backend != "cuda" else ["cuda cluster", "cuda rows"]
        found += [Kernel(name, *(_with_kernel(name, function) for function in overloads)) for name in names]
    graph = orthogonal_filter_graph
    return [*found, Kernel("graph", graph.orthogonal_filter, graph.orthogonal_filter_backward)]


def _with_kernel(name: str, function: Callable) -> Callable:
    """``function``; for "cuda cluster" and "cuda rows", with CUDA_KERNEL set, which C++ reads at every call."""
    if not name.startswith("cuda "):
        return function

    def run(*arguments):
        with _environment(CUDA_KERNEL, name.removeprefix("cuda ")):
            return function(*arguments)

    return run


@contextmanager
def _environment(name: str, value: str):
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def case(over_time: bool, rows: int, width: int, steps: int, device_type: str) -> registry.Case:
    """Forward and backward, with every kernel as a competitor and eager torch as the yardstick."""
    plain = Kernel(registry.EAGER, _reference_forward, _reference_backward)
    competitors = [
        registry.Competitor(
            kernel.name,
            functools.partial(_prepare, kernel),
            ours=True,
            # It replays graphs of its own.
            captures=kernel.name != "graph",
            missing=functools.partial(_reason, kernel, width, torch.device(device_type)),
        )
        for kernel in kernels(device_type)
    ]
    states, matrices = steps * rows * width, (1 if over_time else steps) * width**2
    return registry.Case(
        stem="crossover",
        name=f"over {'time' if over_time else 'depth'}, forward + backward",
        shape={"T" if over_time else "L": steps, "M": rows, "N": width},
        dtype=torch.float32,
        make_inputs=functools.partial(_make_inputs, over_time, rows, width, steps),
        expected=lambda inputs: _run(plain, {name: _double(tensor) for name, tensor in inputs.items()}),
        competitors=(*competitors, registry.Competitor(registry.EAGER, functools.partial(_prepare, plain))),
        # Forward and backward each read everything, and every gradient is written.
        bytes=4 * 3 * (matrices + (states if over_time else 0)),
        # The products O h and W h forward, and G O, P W and P^T h backward: G and P are the gradients of a state h and
        # of its pre-activation.
        operations=2 * rows * width**2 * steps * 5,
    )


def _make_inputs(over_time: bool, rows: int, width: int, steps: int, device: torch.device) -> dict[str, Tensor | None]:
    """The tensors of the op by name, and the gradient of its output."""
    each = () if over_time else (steps,)
    beta = torch.full((1,), 1 / steps, device=device)
    return {
        "h0": torch.randn(rows, width, device=device),
        "weight": torch.randn(*each, width, width, device=device) / width**0.5,
        "bias": torch.randn(*each, width, device=device),
        "filter": make_filter("haar", width, device=device),
        "alpha": 1 - beta,
        "beta": beta,
        "inputs": torch.randn(steps, rows, width, device=device) if over_time else None,
        "cotangent": torch.randn(rows, width, device=device),
    }


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def _prepare(kernel: Kernel, inputs: dict[str, Tensor | None]) -> registry.Run:
    return lambda: _run(kernel, inputs)


def _run(kernel: Kernel, inputs: dict[str, Tensor | None]) -> list[Tensor]:
    """The output and the gradients of h0, weight, bias and inputs."""
    *tensors, cotangent = inputs.values()
    over_time = inputs["inputs"] is not None
    count = len(inputs["inputs" if over_time else "weight"])
    segment = min(DEFAULT_SEGMENT, count)
    output, checkpoints = kernel.forward(*tensors, count, "tanh", segment, False)
    options = (count, "tanh", segment, True, True, False, over_time, False)
    # The reference keeps no checkpoints: it starts again from h0.
    start = tensors[0] if checkpoints is None else checkpoints
    grad_h0, grad_weight, grad_bias, _, _, grad_inputs, _ = kernel.backward(cotangent, start, *tensors[1:], *options)
    return [output, grad_h0, grad_weight, grad_bias, *([grad_inputs] if over_time else [])]


def _reason(kernel: Kernel, width: int, device: torch.device) -> str | None:
    """Try one step, and return why the kernel cannot run at this width, or None."""
    try:
        _run(kernel, _make_inputs(False, 1, width, 1, device))
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def _reference_forward(h0, weight, bias, filter, alpha, beta, inputs, steps, activation, segment, return_states):
    return orthogonal_filter(h0, weight, bias, filter, alpha, beta, inputs, activation, return_states), None


def _reference_backward(grad_output, h0, weight, bias, filter, alpha, beta, inputs, steps, activation, *_):
    return orthogonal_filter_backward(grad_output, h0, weight, bias, filter, alpha, beta, inputs, activation)


def table(path: Path) -> orthogonal_filter_crossover.Table:
    """Read from a CSV the fastest kernels in the order of width, each with the largest width at which it is fastest."""
    logs: dict[int, dict[str, list[float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["stem"] == "crossover" and row["competitor"] != registry.EAGER:
                width = int(row["shape"].split("N=")[1])
                logs.setdefault(width, {}).setdefault(row["competitor"], []).append(math.log(float(row["median_s"])))
    fastest = []
    for width, times in sorted(logs.items()):
        cases = max(map(len, times.values()))
        # A kernel that could not run both cases does not count.
        sums = {name: sum(each) for name, each in times.items() if len(each) == cases}
        fastest.append((width, min(sums, key=sums.get).split()[0]))
    ends = [
        (kernel, width)
        for (width, kernel), following in zip(fastest, [*(kernel for _, kernel in fastest[1:]), None], strict=True)
        if kernel != following
    ]
    return (*ends[:-1], (ends[-1][0], None))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="CSV to write; rows of an earlier run are replaced")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    args.out.unlink(missing_ok=True)
    wrong, noisy = False, 0
    for width in args.widths:
        for over_time in (False, True):
            one = case(over_time, args.rows, width, args.steps, device.type)
            rows, failed = runner.run_case(one, device)
            runner.append_rows(args.out, rows)
            wrong |= failed
            noisy += sum(row.noisy for row in rows)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else "CPU"
    if noisy:
        print(f"{noisy} rows are noisy: measure again before you use the line below")
    print(f"written to {args.out}\nMEASURED[{capability}] = {table(args.out)}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
