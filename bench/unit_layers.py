"""The parts that the benchmarks of GmP and weight normalization share: both compute their weight row by row."""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lcw_ops.bench.registry import Case, Competitor, Run, rotated_bytes

# A sine and a cosine of one angle in float32: four multiply-adds subtract the nearest multiple of pi/2, and two
# polynomials of three coefficients take four multiply-adds each. A multiply-add is two operations.
SINCOS_OPERATIONS = 2 * (4 + 4 + 4)

Layer = Callable[..., Tensor]


def make_case(
    stem: str,
    name: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    draw: Callable[[torch.device], list[Tensor]],
    draw_cotangent: Callable[..., Tensor],
    exact: Layer,
    competitors: tuple[Competitor, ...],
    elements: int,
    product: int,
    sincos: int,
    backward: bool,
    quick: bool,
) -> Case:
    """A case of a layer or of its rows.

    ``draw`` makes the arguments of ``exact`` and of ``draw_cotangent``. ``elements`` is the number of elements that are
    read and written, ``product`` the operations of matrix products, and ``sincos`` the number of angles.
    """

    def make_inputs(device: torch.device) -> dict:
        arguments = [argument.to(dtype) for argument in draw(device)]
        # The calls take the copies of the arguments in turns.
        copies = rotated_bytes(device) // max(argument.nbytes for argument in arguments) + 1
        return {
            "copies": copies,
            "calls": [[argument.clone().requires_grad_() for argument in arguments] for _ in range(copies)],
            "turns": itertools.cycle(range(copies)),
            "cotangent": draw_cotangent(*(argument.float() for argument in arguments)).to(dtype),
            "backward": backward,
        }

    return Case(
        stem=stem,
        name=f"{name}, forward + backward" if backward else f"{name}, forward",
        shape=shape,
        dtype=dtype,
        make_inputs=make_inputs,
        expected=functools.partial(_expected, exact),
        competitors=competitors,
        bytes=dtype.itemsize * elements,
        # registry.py measures float32's matmul rate. 16-bit products are faster, so only their bytes count. Sines and
        # cosines are float32 for every dtype, and count once, because forward may keep them for backward. The few other
        # operations per element of a row (products of sines, a recurrence in backward, sums of squares) are left out.
        operations=(product if dtype == torch.float32 else 0) + SINCOS_OPERATIONS * sincos,
        quick=quick,
    )


def rows_case(units: int, fan_in: int, backward: bool, **rest) -> Case:
    """A case whose result is the rows of the weight, without the layer's product."""
    return make_case(
        shape={"units": units, "fan_in": fan_in},
        dtype=torch.float32,
        draw_cotangent=lambda rows, *_: torch.randn(units, fan_in, device=rows.device),
        elements=count_moved(units * fan_in, units * fan_in, backward),
        product=0,
        backward=backward,
        **rest,
    )


def count_moved(arguments: int, result: int, backward: bool) -> int:
    """The number of elements read and written.

    Forward reads the arguments and writes the result. Backward reads the arguments and the result's gradient and writes
    the arguments' gradients. Arguments with one value per unit, and the record of which units fired, are left out.
    """
    return 3 * arguments + 2 * result if backward else arguments + result


def count_product(result: int, fan_in: int, backward: bool) -> int:
    """The operations of x times weight, and in backward of one product of that size for the gradient of each."""
    return 2 * result * fan_in * (3 if backward else 1)


def run_on_torch(layer: Layer, inputs: dict) -> Run:
    return run_passes([(functools.partial(layer, *arguments), arguments) for arguments in inputs["calls"]], inputs)


def run_passes(calls: list[tuple[Callable[[], Tensor], list[Tensor]]], inputs: dict) -> Run:
    """``calls`` holds functions, each with the tensors whose gradients it needs."""
    turns, cotangent = inputs["turns"], inputs["cotangent"]

    def forward() -> list[Tensor]:
        layer, _ = calls[next(turns)]
        return [layer()]

    def forward_backward() -> list[Tensor]:
        layer, arguments = calls[next(turns)]
        result = layer()
        return [result, *torch.autograd.grad(result, arguments, cotangent)]

    return forward_backward if inputs["backward"] else torch.no_grad()(forward)


def run_compiled(layer: Layer, inputs: dict) -> Run:
    # torch compiles a function for eight shapes. From the ninth on, the uncompiled function would run and be timed.
    torch.compiler.reset()
    return run_on_torch(torch.compile(layer, dynamic=False, fullgraph=True), inputs)


def _expected(layer: Layer, inputs: dict) -> list[Tensor]:
    arguments = [argument.detach().double().requires_grad_() for argument in inputs["calls"][0]]
    exact = {"calls": [arguments], "turns": itertools.repeat(0), "cotangent": inputs["cotangent"].double()}
    return [result.detach() for result in run_on_torch(layer, inputs | exact)()]
