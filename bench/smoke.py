"""Run every GPU kernel once on small tensors, and compare the results with float64.

The command is ``make gpu PART=smoke``, or ``python -m lcw_ops.bench.smoke``. It takes a minute and shows whether the
other parts of ``make gpu`` are worth their time. The rule is that of the benchmarks: at most twice the error of plain
torch in the same dtype, plus one unit in the last place. If a kernel is not built, does not compile, does not run or is
wrong, a line says so and the exit code is 1; the other kernels still run. On the CPU (``--device cpu``, with
TRITON_INTERPRET=1) the same calls run the C++ kernels, and the Triton kernels in Triton's interpreter.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import optim
from lcw_ops.bench import crossover, registry
from lcw_ops.bench.arguments import STEMS
from lcw_ops.nn.orthogonal_filter import make_filter
from lcw_ops.ops import backends, gradient_activation, hypersphere, lcw_linear, weight_norm
from lcw_ops.ops.orthogonal_filter import op as orthogonal_filter
from lcw_ops.ops.parallel_depth import op as parallel_depth

# Device type -> the backends that must be available.
EXPECTED = {"cuda": ("triton", "cuda"), "cpu": ("triton", "cpp")}

# Stem -> its ops.
OPS_OF = {
    "gradient_activation": (gradient_activation.NAME, gradient_activation.SGD_STEP, gradient_activation.ADAMW_STEP),
    "hypersphere": (hypersphere.NAME,),
    "lcw_linear": (lcw_linear.NAME,),
    "orthogonal_filter": (orthogonal_filter.NAME,),
    "parallel_depth": (parallel_depth.SWEEP,),
    "weight_norm": (weight_norm.NAME,),
}

# Enough tensors to share launches: up to four tensors get a launch each.
TENSORS = 6


@dataclass(frozen=True)
class Call:
    """One use of an op. ``run`` takes tensors of these shapes and returns all results."""

    op: str
    name: str
    shapes: list[tuple[int, ...]]
    run: Callable[[list[Tensor]], list[Tensor]]


def calls() -> list[Call]:
    """Calls that together launch every kernel of kernels/ and csrc/cuda."""
    # With few units, 600 columns are enough to be split among programs. 80 samples are too many for the fused kernel.
    few, many, weight, free, units = (5, 600), (80, 600), (20, 600), (20, 599), (20,)
    # h0, weight, bias, alpha, beta, inputs
    layers = [(5, 24), (20, 24, 24), (20, 24), (20,), (20,), (20, 5, 24)]
    haar, permutation = make_filter("haar", 24), make_filter("permutation", 24)
    tensors = [(700 + index,) for index in range(TENSORS)]
    zero_sum, sphere, parallel = lcw_linear.NAME, hypersphere.NAME, parallel_depth.SWEEP
    return [
        Call(zero_sum, "weight", [weight], _with_gradients(F.lcw_weight)),
        Call(zero_sum, "weight, basis", [free], _with_gradients(F.lcw_weight, basis=True)),
        Call(zero_sum, "linear", [few, weight, units], _with_gradients(F.lcw_linear)),
        Call(zero_sum, "linear, basis", [few, free, units], _with_gradients(F.lcw_linear, basis=True)),
        Call(zero_sum, "linear, 16 bits, odd rows", [(3, 2301), (33, 2301), (33,)], _in_float16(F.lcw_linear)),
        Call(sphere, "direction", [free], _with_gradients(F.hypersphere_direction)),
        Call(weight_norm.NAME, "normalised rows", [weight, units], _with_gradients(F.normalize_scale)),
        *(
            Call(
                sphere,
                f"GmP, {x[0]} samples",
                [x, free, units, units],
                _with_gradients(F.gmp_linear, activation="relu"),
            )
            for x in (few, many)
        ),
        Call(weight_norm.NAME, "linear", [few, weight, units, units], _with_gradients(F.weight_norm_linear)),
        Call(orthogonal_filter.NAME, "all states", layers, _with_gradients(_layers(haar), return_states=True)),
        Call(orthogonal_filter.NAME, "permutation", layers, _with_gradients(_layers(permutation))),
        Call(parallel, "rotations", layers, _with_gradients(_layers(haar), solver="parallel")),
        Call(parallel, "permutation", layers, _with_gradients(_layers(permutation), solver="parallel")),
        *(
            Call(gradient_activation.NAME, f"{kind}, {count} of them", tensors[:count], _activate(kind))
            for kind in ("arctan", "tanh", "log")
            for count in (1, TENSORS)
        ),
        Call(gradient_activation.SGD_STEP, "SGD", tensors, _steps(_sgd("gradient"))),
        Call(gradient_activation.SGD_STEP, "SGD, on the momentum", tensors, _steps(_sgd("momentum"))),
        Call(gradient_activation.ADAMW_STEP, "AdamW", tensors, _steps(_adamw)),
    ]


def _in_float16(function: Callable) -> Callable:
    """``function`` of the inputs rounded to float16; in float64, of the same numbers."""

    def run(inputs: list[Tensor]) -> list[Tensor]:
        rounded = [tensor.half() for tensor in inputs]
        if inputs[0].dtype == torch.float64:
            rounded = [tensor.double() for tensor in rounded]
        return [function(*rounded).to(inputs[0].dtype)]

    return run


def _with_gradients(function: Callable[..., Tensor], **options) -> Callable[[list[Tensor]], list[Tensor]]:
    """The result of ``function`` and its gradients for all inputs; the output's gradient is a cosine."""

    def run(inputs: list[Tensor]) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = function(*leaves, **options)
        places = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
        cotangent = places.cos().to(output.dtype).view(output.shape)
        return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]

    return run


def _layers(filter: Tensor) -> Callable[..., Tensor]:
    """The recurrence, scaled so that its states neither grow nor vanish."""

    def run(h0, weight, bias, alpha, beta, inputs, **options) -> Tensor:
        given = filter.to(h0.device, h0.dtype if filter.is_floating_point() else filter.dtype)
        alpha, beta = 1 - torch.sigmoid(alpha) / 100, torch.sigmoid(beta) / 20
        return F.orthogonal_filter(h0, weight / 5, bias, given, alpha, beta, inputs, **options)

    return run


def _activate(kind: str) -> Callable[[list[Tensor]], list[Tensor]]:
    def run(inputs: list[Tensor]) -> list[Tensor]:
        tensors = [tensor.clone() for tensor in inputs]
        F.gradient_activation_(tensors, kind=kind)
        return tensors

    return run


def _sgd(place: str) -> Callable[[list], torch.optim.Optimizer]:
    return lambda params: optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, activate=place)


def _adamw(params: list) -> torch.optim.Optimizer:
    return optim.AdamW(params, lr=0.01, amsgrad=True)


def _steps(make_optimizer: Callable[[list], torch.optim.Optimizer]) -> Callable[[list[Tensor]], list[Tensor]]:
    """The parameters after two steps, with gradients computed from their first values."""

    def run(inputs: list[Tensor]) -> list[Tensor]:
        params = [torch.nn.Parameter(tensor.clone()) for tensor in inputs]
        optimizer = make_optimizer(params)
        for step in range(2):
            for tensor, param in zip(inputs, params, strict=True):
                param.grad = tensor.flip(0) / (step + 1)
            optimizer.step()
        return [param.detach() for param in params]

    return run


def case(call: Call, device_type: str) -> registry.Case:
    """A case for the benchmarks' check: our op on every available backend, beside plain torch in the same dtype."""
    return registry.Case(
        stem=call.op,
        name=call.name,
        shape={},
        dtype=torch.float32,
        make_inputs=lambda device: {"tensors": [torch.randn(shape, device=device) for shape in call.shapes]},
        expected=lambda inputs: _plainly(call, [tensor.double() for tensor in inputs["tensors"]]),
        competitors=(
            *registry.ours(call.op, device_type, lambda inputs: lambda: call.run(inputs["tensors"])),
            registry.Competitor(registry.EAGER, lambda inputs: lambda: _plainly(call, inputs["tensors"])),
        ),
        bytes=0,
        operations=0,
    )


def _plainly(call: Call, inputs: list[Tensor]) -> list[Tensor]:
    with lcw_ops.use_backend("reference"):
        return call.run(inputs)


def cases(device_type: str, stem: str | None = None) -> list[registry.Case]:
    # Every kernel of the recurrence over depth and over time, including those that users cannot name.
    each = [crossover.case(over_time, 5, 24, 7, device_type) for over_time in (False, True)]
    found = [*(each if stem in (None, "orthogonal_filter") else []), *(case(call, device_type) for call in calls())]
    return [one for one in found if stem is None or one.stem == "crossover" or one.stem in OPS_OF[stem]]


def missing(device_type: str, stem: str | None = None, only: str | None = None) -> Iterator[str]:
    """One line for each op and backend for which we have kernels that cannot run here."""
    for op, implemented in backends.IMPLEMENTED.items():
        if stem is not None and op not in OPS_OF[stem]:
            continue
        for backend in EXPECTED[device_type] if only is None else (only,):
            reason = backends.missing_reason(op, backend, device_type) if backend in implemented else None
            if reason is not None:
                yield f"MISSING {op}, {backend}: {reason}"


def check(one: registry.Case, device: torch.device, only: str | None = None) -> Iterator[tuple[bool, str]]:
    """(whether it is right, a line to print) for each of our kernels in a case, or for those of one backend."""
    for competitor in one.competitors:
        # Names are "lcw_ops (cuda)" and, of the recurrence's kernels, "cuda rows".
        if not competitor.ours or (
            only is not None and only not in competitor.name.strip("()").replace("(", "").split()
        ):
            continue
        place = f"{one.stem}, {one.name}: {competitor.name}"
        reason = competitor.missing()
        if reason is not None:
            yield False, f"FAILED  {place}: {reason}"
            continue
        try:
            verdict = registry.check(one, device, [competitor])[competitor.name]
        except Exception as error:
            # A compiler or a driver may raise anything, and the other kernels should still run.
            yield False, f"FAILED  {place}: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[-1]}"
            continue
        wrong = isinstance(verdict, registry.WrongResult)
        yield not wrong, f"WRONG   {place}: {verdict}" if wrong else f"ok      {place}, error {verdict:.1e}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcw_ops.bench.smoke", description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda", choices=sorted(EXPECTED))
    parser.add_argument("--stem", choices=STEMS, help="only the kernels of this method; default: all")
    parser.add_argument("--backend", choices=backends.BACKENDS[:-1], help="only this backend's kernels; default: all")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    torch.manual_seed(0)
    print(lcw_ops.info(), flush=True)
    failed = checked = 0
    for line in missing(device.type, args.stem, args.backend):
        failed += 1
        print(line, flush=True)
    for one in cases(device.type, args.stem):
        for right, line in check(one, device, args.backend):
            checked += 1
            failed += not right
            print(line, flush=True)
    if not checked:
        print("no kernel was chosen")
        return 1
    chosen = f" ({', '.join(filter(None, (args.stem, args.backend)))})" if args.stem or args.backend else ""
    print(f"{failed} failed" if failed else f"every kernel{chosen} is right")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
