"""The cases on which ``lcw-ops verify`` judges every kernel.

A case draws fresh random inputs and calls the public function. Under ``use_backend("reference")``, the same call in
float64 gives the exact results, and in the case's own dtype those of plain eager torch.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lcw_ops import functional as F
from lcw_ops import optim
from lcw_ops.nn.orthogonal_filter import make_filter
from lcw_ops.ops import backends, gradient_activation, hypersphere, lcw_linear, verdicts, weight_norm
from lcw_ops.ops.orthogonal_filter import op as orthogonal_filter
from lcw_ops.ops.parallel_depth import op as parallel_depth
from lcw_ops.ops.verdicts import Kind
from lcw_ops.reference.orthogonal_filter import state_dtype

Draw = Callable[[], list[Tensor]]
Run = Callable[[list[Tensor]], list[Tensor]]

DTYPES = {"16-bit": (torch.bfloat16, torch.float16), "float32": (torch.float32,), "float64": (torch.float64,)}
EVERY_DTYPE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Widths that are not a multiple of 8, in the class of this widest row.
ODD = {1024: 577, 4096: 3001}


@dataclass(frozen=True)
class Case:
    """One call of an op. ``draw`` returns CPU tensors in float64, which are rounded to ``dtype``.

    ``in_place``: ``run`` writes to its inputs. ``offset``: the number of elements by which every input misses its
    alignment. ``width``: the recurrence's, which decides about the kernel. ``plain``: the call in plain torch, if that
    is not ``run`` on the reference: the parallel solver is measured by the recurrence layer by layer.
    """

    op: str
    kind: Kind
    name: str
    dtype: torch.dtype
    draw: Draw
    run: Run
    in_place: bool = False
    offset: int = 0
    width: int = 0
    plain: Run | None = None

    @property
    def label(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}"

    def make_inputs(self) -> list[Tensor]:
        """Fresh inputs on the CPU. Integer tensors, such as a permutation, keep their dtype."""
        return [tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in self.draw()]


def cases(op: str, backend: str) -> list[Case]:
    """The cases of the op that the backend takes."""
    found = [case for kind in verdicts.kinds(op) for case in _OF_OP[op](kind)]
    return [case for case in found if takes(op, backend, case.width, case.dtype)]


def takes(op: str, backend: str, width: int, dtype: torch.dtype) -> bool:
    """Whether a request for the backend runs rows of this width on the kernel that is judged."""
    itemsize = max(dtype.itemsize, torch.float32.itemsize)
    if backends.width_reason(op, backend, width, itemsize) is not None:
        return False
    # On a GPU, the recurrence's widest rows go to CUDA graphs of torch's matmuls, a form of the backend "cuda".
    is_graph = op == orthogonal_filter.NAME and width * itemsize > GRAPH_ABOVE * torch.float32.itemsize
    return backend == "cpp" or (backend == "graph") == is_graph


# The widest float32 rows of the kernels in csrc/cuda.
GRAPH_ABOVE = 512


# ---- Layers and their rows -------------------------------------------------------------------------------------------


def draw_normal(*shapes: tuple[int, ...], mean: float = 0.0) -> Draw:
    """Normal numbers; ``mean`` is that of the first tensor."""

    def draw() -> list[Tensor]:
        drawn = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        return [drawn[0] + mean, *drawn[1:]]

    return draw


def with_gradients(function: Callable[..., Tensor], learned: int | None = None, **options) -> Run:
    """The result of ``function``, and its gradients for the first ``learned`` inputs (default: all).

    The result's gradient is a cosine of the place times the result. So it vanishes at the kink of a ReLU, where
    rounding decides whether a gradient passes.
    """

    def run(inputs: list[Tensor]) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs[:learned]]
        rest = [] if learned is None else inputs[learned:]
        output = function(*leaves, *rest, **options)
        places = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
        cotangent = places.cos().to(output.dtype).view(output.shape) * output.detach()
        # With the cotangent as grad_outputs, torch.autograd.grad would import sympy, for a second in every child.
        return [output.detach(), *torch.autograd.grad((output * cotangent).sum(), leaves)]

    return run


def _unit_cases(op: str, kind: Kind, calls: list[tuple[str, Draw, Run]]) -> Iterator[Case]:
    for dtype in DTYPES[kind.dtype]:
        for name, draw, run in calls:
            yield Case(op, kind, name, dtype, draw, run)


def _lcw(kind: Kind) -> Iterator[Case]:
    widest = widest_of(kind)
    odd, units = ODD[widest], 65
    rows = with_gradients(F.lcw_weight), with_gradients(F.lcw_weight, basis=True)
    linear = with_gradients(F.lcw_linear), with_gradients(F.lcw_linear, basis=True)

    def layer(samples: int, fan_in: int, basis: bool, mean: float = 0.0) -> tuple[str, Draw, Run]:
        name = f"linear, M={samples}, m={fan_in}{', basis' * basis}{', mean 100' * (mean > 0)}"
        return name, draw_normal((samples, fan_in), (units, fan_in - basis), (units,), mean=mean), linear[basis]

    yield from _unit_cases(
        lcw_linear.NAME,
        kind,
        [
            (f"weight, m={widest}", draw_normal((units, widest)), rows[0]),
            (f"weight, m={odd}, basis", draw_normal((units, odd - 1)), rows[1]),
            layer(1, widest, False),
            layer(8, widest, True),
            layer(8, odd, False, 100.0),
            layer(32, odd, True),
            layer(32, widest, False),
            layer(64, odd, False),
            layer(64, widest, True, 100.0),
            # So many samples do not run on the fused kernel.
            layer(130, widest, False),
        ],
    )


def draw_angles(units: int, fan_in: int, turns: int = 0) -> Tensor:
    """Angles of random directions, plus up to so many whole turns. Independent angles would make the rows vanish."""
    angles = F.hypersphere_angles(torch.randn(units, fan_in, dtype=torch.float64))
    return angles + 2 * torch.pi * torch.randint(-turns, turns + 1, angles.shape)


def _hypersphere(kind: Kind) -> Iterator[Case]:
    widest = widest_of(kind)
    odd, units = ODD[widest], 65
    widths = (1, odd, widest) if widest == verdicts.WIDEST[hypersphere.NAME][0] else (odd, widest)

    def layer(samples: int, fan_in: int, activation: str | None) -> tuple[str, Draw, Run]:
        def draw() -> list[Tensor]:
            return [*draw_normal((samples, fan_in))(), draw_angles(units, fan_in), *draw_normal((units,), (units,))()]

        name = f"GmP, M={samples}, m={fan_in}{', ' + activation if activation else ''}"
        return name, draw, with_gradients(F.gmp_linear, activation=activation)

    yield from _unit_cases(
        hypersphere.NAME,
        kind,
        [
            *(
                (f"direction, m={m}", lambda m=m: [draw_angles(units, m)], with_gradients(F.hypersphere_direction))
                for m in widths
            ),
            (
                f"direction, m={widest}, large angles",
                lambda: [draw_angles(units, widest, turns=1000)],
                with_gradients(F.hypersphere_direction),
            ),
            layer(8, widest, "relu"),
            layer(8, odd, None),
            layer(128, odd, "relu"),
            layer(128, widest, None),
        ],
    )


def _weight_norm(kind: Kind) -> Iterator[Case]:
    widest = widest_of(kind)
    odd, units = ODD[widest], 65
    widths = (1, odd, widest) if widest == verdicts.WIDEST[weight_norm.NAME][0] else (odd, widest)
    rows, linear = with_gradients(F.normalize_scale), with_gradients(F.weight_norm_linear)
    layers = [(samples, m) for samples in (8, 128) for m in (odd, widest)]
    yield from _unit_cases(
        weight_norm.NAME,
        kind,
        [
            *((f"normalised rows, m={m}", draw_normal((units, m), (units,)), rows) for m in widths),
            *(
                (f"linear, M={samples}, m={m}", draw_normal((samples, m), (units, m), (units,), (units,)), linear)
                for samples, m in layers
            ),
        ],
    )


def widest_of(kind: Kind) -> int:
    return int(kind.size.split()[-1])


# ---- Lists of tensors ------------------------------------------------------------------------------------------------

# (name, number of elements of each tensor, offset). Some tensors of the many are empty, and none has a round size.
LISTS: tuple[tuple[str, list[int], int], ...] = (
    ("1 tensor of 2^20", [2**20], 0),
    ("1 tensor, misaligned", [4099], 1),
    ("an empty tensor", [0], 0),
    ("300 tensors", [(37 * index) % 1500 for index in range(300)], 0),
    ("300 tensors, misaligned", [(41 * index) % 1500 for index in range(300)], 1),
)


def _list_cases(op: str, kind: Kind, runs: dict[str, Run], tensors_each: int) -> Iterator[Case]:
    """Every list in every dtype, with each run in turn. ``tensors_each``: inputs for each tensor of the list."""
    for row, (name, sizes, offset) in enumerate(LISTS):
        for column, dtype in enumerate(EVERY_DTYPE):
            # Every run meets every dtype.
            what, run = list(runs.items())[(row + column) % len(runs)]
            draw = draw_normal(*((size,) for size in sizes * tensors_each))
            yield Case(op, kind, f"{what}, {name}", dtype, draw, run, in_place=True, offset=offset)


def _gradient_activation(kind: Kind) -> Iterator[Case]:
    def activate(name: str) -> Run:
        def run(tensors: list[Tensor]) -> list[Tensor]:
            F.gradient_activation_(tensors, kind=name)
            return tensors

        return run

    runs = {name: activate(name) for name in ("arctan", "tanh", "log")}
    yield from _list_cases(gradient_activation.NAME, kind, runs, 1)


def steps(make_optimizer: Callable[[list], torch.optim.Optimizer]) -> Run:
    """The parameters after two steps. The inputs are the parameters and as many gradients."""

    def run(inputs: list[Tensor]) -> list[Tensor]:
        count = len(inputs) // 2
        params = [torch.nn.Parameter(tensor) for tensor in inputs[:count]]
        optimizer = make_optimizer(params)
        for _ in range(2):
            for param, gradient in zip(params, inputs[count:], strict=True):
                param.grad = gradient
            optimizer.step()
        return [param.detach() for param in params]

    return run


def _sgd_step(kind: Kind) -> Iterator[Case]:
    def sgd(place: str, nesterov: bool) -> Run:
        options = functools.partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
        return steps(functools.partial(options, activate=place))

    runs = {f"SGD, on the {place}": sgd(place, place == "gradient") for place in ("gradient", "momentum")}
    yield from _list_cases(gradient_activation.SGD_STEP, kind, runs, 2)


def _adamw_step(kind: Kind) -> Iterator[Case]:
    def adamw(name: str) -> Run:
        return steps(functools.partial(optim.AdamW, lr=0.01, amsgrad=name == "tanh", gradient_activation=name))

    runs = {f"AdamW, {name}": adamw(name) for name in ("arctan", "tanh", "log")}
    yield from _list_cases(gradient_activation.ADAMW_STEP, kind, runs, 2)


# ---- The recurrence --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """A recurrence of ``steps`` layers or, ``over_time``, time steps.

    ``filter`` is "haar", "permutation" or "each", a dense one per layer. ``dtype``: 16-bit tensors, whose state is
    float32; None: the tensors have the state's dtype.
    """

    width: int
    rows: int
    steps: int
    filter: str = "haar"
    over_time: bool = False
    states: bool = False
    dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        kind = {"haar": "dense", "permutation": "permutation", "each": "dense per layer"}[self.filter]
        over = "time steps" if self.over_time else "layers"
        return f"N={self.width}, M={self.rows}, {self.steps} {over}, {kind}{', all states' * self.states}"

    def draw(self) -> list[Tensor]:
        """h0, weight, bias, alpha, beta, inputs (over time), filter: scaled so that states neither grow nor vanish."""
        width, rows, count = self.width, self.rows, self.steps
        each = () if self.over_time else (count,)
        scales = 0.5 + torch.rand(2, *each or (1,), dtype=torch.float64)
        return [
            torch.randn(rows, width, dtype=torch.float64),
            torch.randn(*each, width, width, dtype=torch.float64) / width**0.5,
            torch.randn(*each, width, dtype=torch.float64),
            1 - scales[0] / (4 * count),
            scales[1] / count,
            *([torch.randn(count, rows, width, dtype=torch.float64)] if self.over_time else []),
            self._filter(),
        ]

    def _filter(self) -> Tensor:
        if self.filter == "each":
            return torch.stack([make_filter("haar", self.width, torch.float64) for _ in range(self.steps)])
        return make_filter(self.filter, self.width, torch.float64)

    def run(self, solver: str) -> Run:
        count = 6 if self.over_time else 5
        return with_gradients(functools.partial(self._call, solver), count)

    def _call(self, solver: str, h0, weight, bias, alpha, beta, *rest) -> Tensor:
        inputs, filter = rest if self.over_time else (None, *rest)
        if filter.is_floating_point():
            filter = filter.to(state_dtype(h0.dtype))
        return F.orthogonal_filter(
            h0, weight, bias, filter, alpha, beta, inputs, return_states=self.states, solver=solver
        )

    def case(self, op: str, kind: Kind, dtype: torch.dtype, solver: str) -> Case:
        plain = self.run("sequential")
        return Case(op, kind, self.name, dtype, self.draw, self.run(solver), width=self.width, plain=plain)


# A class of float32 also decides for 16-bit tensors, and for widths that are no multiple of 8: each class judges both.
NETS = {
    64: [
        Net(1, 1, 5, states=True),
        Net(17, 5, 40, "permutation"),
        Net(64, 128, 300),
        Net(64, 5, 7, "each", states=True),
        Net(64, 5, 12, over_time=True, states=True),
        Net(17, 1, 300, "permutation", over_time=True),
        Net(64, 5, 9, "permutation", dtype=torch.bfloat16),
    ],
    128: [
        Net(100, 5, 9, "permutation", over_time=True, states=True),
        Net(128, 128, 20),
        Net(128, 5, 7, "each"),
        Net(100, 1, 300),
        Net(128, 5, 6, states=True, dtype=torch.float16),
    ],
    256: [
        Net(256, 5, 6, states=True),
        Net(256, 128, 4, "permutation"),
        Net(201, 1, 9, over_time=True),
        Net(256, 5, 3, "each"),
        Net(256, 5, 3, "permutation", dtype=torch.bfloat16),
        Net(201, 5, 3, states=True, dtype=torch.float16),
    ],
    512: [
        Net(512, 5, 4, states=True),
        Net(512, 128, 3, "permutation"),
        Net(401, 1, 5, over_time=True),
        Net(512, 5, 2, "each"),
        Net(512, 5, 2, "permutation", dtype=torch.float16),
        Net(401, 5, 2, states=True, dtype=torch.bfloat16),
    ],
    1024: [
        Net(1024, 5, 2),
        Net(601, 128, 2, "permutation", over_time=True),
        Net(1024, 5, 2, "permutation", dtype=torch.bfloat16),
        Net(601, 5, 2, "permutation", states=True, dtype=torch.float16),
    ],
}


def _recurrence(kind: Kind) -> Iterator[Case]:
    (dtype,) = DTYPES[kind.dtype]
    for net in NETS[widest_of(kind)]:
        if net.dtype is None or dtype == torch.float32:
            yield net.case(orthogonal_filter.NAME, kind, net.dtype or dtype, "sequential")


# Chunks are at most a few hundred layers long, so 700 layers are several.
SWEEPS = {
    64: [Net(17, 5, 700), Net(64, 1, 300, "permutation"), Net(64, 128, 40, states=True), Net(1, 5, 700, "permutation")],
    256: [Net(256, 5, 60), Net(100, 1, 700, "permutation"), Net(200, 5, 50, over_time=True, states=True)],
}


def _sweeps(kind: Kind) -> Iterator[Case]:
    (dtype,) = DTYPES[kind.dtype]
    for net in SWEEPS[widest_of(kind)]:
        yield net.case(parallel_depth.SWEEP, kind, dtype, "parallel")


_OF_OP: dict[str, Callable[[Kind], Iterator[Case]]] = {
    lcw_linear.NAME: _lcw,
    hypersphere.NAME: _hypersphere,
    weight_norm.NAME: _weight_norm,
    gradient_activation.NAME: _gradient_activation,
    gradient_activation.SGD_STEP: _sgd_step,
    gradient_activation.ADAMW_STEP: _adamw_step,
    orthogonal_filter.NAME: _recurrence,
    parallel_depth.SWEEP: _sweeps,
}
