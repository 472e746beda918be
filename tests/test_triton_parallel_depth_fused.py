"""The Triton sweeps with the product inside the scan, against Picard's iteration in plain numpy in higher precision.

Without a GPU they run in Triton's interpreter (see support/triton_process.py), which is slow: every shape is as small
as its test allows.
"""

import numpy as np
import pytest
import torch
from support.exact_scan import EXACT_ACTIVATIONS, exact, exact_scan, normal, scale
from support.numerics import assert_by_the_rule
from support.pairwise import pairwise
from support.triton_process import import_kernels

import lcw_ops
from lcw_ops import functional as F
from lcw_ops.ops.parallel_depth import op, solver
from lcw_ops.reference import parallel_depth as reference

kernels = import_kernels("parallel_depth_fused", op.SWEEP)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "made_on_device"),
    # numpy warns if a number is not finite.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy", "ignore::RuntimeWarning:triton"),
]

CHUNK = 3
# (layers, samples, units): one layer, a chunk less a layer, one chunk and a layer more, and three chunks.
SHAPES = ((1, 1, 1), (CHUNK - 1, 5, 17), (CHUNK + 1, 33, 5), (2 * CHUNK + 1, 1, 64))
CASES = pairwise(
    shape=SHAPES,
    kind=("random", "identity", "cyclic"),
    activation=("tanh", "sigmoid", "identity"),
    bias=(None, "shared", "per layer"),
    added=(False, True),
    tied=(False, True),
    scales=(False, True),
)


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "choose_chunk", lambda *_: CHUNK)


def make_filter(kind, width):
    unit = torch.arange(width)
    return {"random": torch.randperm(width), "identity": unit, "cyclic": unit.roll(1)}[kind]


def made(case):
    (steps, rows, width), dtype = case["shape"], torch.float32
    bias = {"shared": (width,), "per layer": (steps, width)}.get(case["bias"])
    return {
        "first": normal(rows, width, dtype=dtype),
        "weight": normal(*(() if case["tied"] else (steps,)), width, width, dtype=dtype) / width**0.5,
        "bias": None if bias is None else normal(*bias, dtype=dtype),
        "added": normal(steps, rows, width, dtype=dtype) if case["added"] else None,
        "slope": normal(steps, rows, width, dtype=dtype) / steps,
        "filter": make_filter(case["kind"], width),
        "alpha": scale(steps, dtype, case["scales"]),
        "beta": scale(steps, dtype, case["scales"]) / steps,
    }


def start(arguments, activation, reverse):
    """(sweeps, the memory of the states)."""
    given = dict(arguments)
    first, weight, filter = (given.pop(name) for name in ("first", "weight", "filter"))
    steps = len(given["slope"])
    states, spare = (first.new_full((steps, *first.shape), torch.nan) for _ in range(2))
    if reverse:
        given |= {"bias": None, "beta": None}
        matrix, index, activation = weight, filter.argsort(), "identity"
    else:
        given["slope"] = None
        matrix, index = weight.mT.contiguous(), filter
    given |= {"index": index, "activation": activation, "reverse": reverse}
    return kernels.Sweeps(first, states, spare, matrix, **given), states


def picard(arguments, activation, reverse, sweeps, wide=exact, scan=exact_scan, act=EXACT_ACTIVATIONS):
    """The exact states (D, M, N) after each sweep, the start included."""
    slope, filter = wide(arguments["slope"]), arguments["filter"]
    weight = np.broadcast_to(wide(arguments["weight"]), (len(slope), *arguments["weight"].shape[-2:]))
    added = 0 if arguments["added"] is None else wide(arguments["added"])
    if reverse:
        source = np.zeros_like(slope) + added
        alpha = arguments["alpha"].flip(0)
        inverse = filter.argsort()
        states = scan(arguments["first"], source[::-1], inverse, alpha)[::-1]
    else:
        bias = 0 if arguments["bias"] is None else wide(arguments["bias"])
        bias = bias[:, None] if np.ndim(bias) == 2 else bias
        beta = np.broadcast_to(wide(arguments["beta"]), len(slope))[:, None, None]
        states = scan(arguments["first"], np.zeros_like(slope), filter, arguments["alpha"])
    found = [states[:-1] if reverse else states[1:]]
    for _ in range(sweeps):
        if reverse:
            source = np.einsum("lmn,lnk->lmk", slope * states[1:], weight) + added
            states = scan(arguments["first"], source[::-1], inverse, alpha)[::-1]
        else:
            source = beta * act[activation](np.einsum("lmk,lnk->lmn", states[:-1], weight) + bias + added)
            states = scan(arguments["first"], source, filter, arguments["alpha"])
        found.append(states[:-1] if reverse else states[1:])
    return found


def eager(arguments, activation, reverse, sweeps):
    """The same by lcw_ops.reference, in the dtype of the arguments."""
    first, slope, filter = arguments["first"], arguments["slope"], arguments["filter"]
    weight = arguments["weight"].expand(len(slope), -1, -1)
    states = torch.empty(len(slope) + 1, *first.shape, dtype=first.dtype)
    if reverse:
        states[-1], scaled = first, torch.empty_like(slope)
        rest = (arguments["added"], filter.argsort(), arguments["alpha"], slope, scaled)
        reference.adjoint_sweep_(states, None, *rest)
        for _ in range(sweeps):
            reference.adjoint_sweep_(states, scaled @ weight, *rest)
        return states[:-1]
    states[0] = first
    rest = (arguments["bias"], arguments["added"], filter, arguments["alpha"], arguments["beta"], activation)
    reference.sweep_(states, None, *rest)
    for _ in range(sweeps):
        reference.sweep_(states, states[:-1] @ weight.mT, *rest)
    return states[1:]


@pytest.mark.parametrize("reverse", [False, True])
def test_two_sweeps_are_two_of_picards(reverse, short_chunks):
    triples = []
    for case in CASES:
        arguments, activation = made(case), case["activation"]
        sweeps, states = start(arguments, activation, reverse)
        scaled = torch.full_like(states, torch.nan)
        bounds = [sweeps.sweep().item() for _ in range(2)]
        change = sweeps.finish(scaled if reverse else None)
        before, after = picard(arguments, activation, reverse, 2)[1:]
        triples.append((states.cpu(), eager(arguments, activation, reverse, 2).cpu(), after.astype(np.float64)))
        wide = [torch.from_numpy(np.ascontiguousarray(one).astype(np.float64)) for one in (after, before)]
        expected = reference.relative_change(*wide).item()
        # Both states are rounded, by a few units in the last place of a row's largest number.
        slack = 64 * torch.finfo().eps
        assert abs(change.item() - expected) <= slack * max(1, expected)
        assert bounds[1] <= change.item() + slack * max(1, expected)
        if reverse:
            whole = torch.cat((states, arguments["first"].unsqueeze(0)))
            assert torch.equal(scaled, arguments["slope"] * whole[1:])
    assert_by_the_rule("two sweeps", *zip(*triples, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
def test_sweeps_may_follow_when_the_states_were_written(reverse, short_chunks):
    """They then begin with whole states instead of sums and carries."""
    case = {"shape": (7, 3, 5), "kind": "random", "bias": "per layer"}
    arguments = made(case | {"added": True, "tied": False, "scales": True})
    sweeps, states = start(arguments, "tanh", reverse)
    for count in (1, 2, 3):
        sweeps.sweep()
        sweeps.finish(torch.empty_like(states) if reverse else None)
        expected = picard(arguments, "tanh", reverse, count)[-1].astype(np.float64)
        largest = np.abs(expected).max(-1).max()
        # A state is a sum of at most 7 terms, of 5 products each.
        assert np.abs(states.double().numpy() - expected).max() <= 40 * torch.finfo().eps * largest


def test_more_sweeps_than_layers_change_nothing(short_chunks):
    case = {"shape": (4, 2, 3), "kind": "random", "bias": None}
    for reverse in (False, True):
        sweeps, states = start(made(case | {"added": False, "tied": True, "scales": False}), "tanh", reverse)
        changes = [sweeps.sweep().item() for _ in range(6)]
        assert changes[0] > 0
        assert changes[-1] == 0
        assert sweeps.finish(torch.empty_like(states) if reverse else None) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_number_that_is_not_finite_is_reported_and_stays_in_its_row(bad, reverse, short_chunks):
    case = {"shape": (7, 3, 5), "kind": "random", "bias": None}
    arguments = made(case | {"added": True, "tied": False, "scales": False})
    clean, clean_states = start(arguments, "relu", reverse)
    arguments["added"] = arguments["added"].clone()
    arguments["added"][3, 1, 2] = bad
    dirty, dirty_states = start(arguments, "relu", reverse)
    for _ in range(2):
        clean.sweep()
        assert dirty.sweep().isnan()
    for sweeps in (clean, dirty):
        sweeps.finish(torch.empty_like(clean_states) if reverse else None)
    assert torch.equal(dirty_states[:, [0, 2]], clean_states[:, [0, 2]])
    for layer in range(4) if reverse else range(3, 7):
        assert not dirty_states[layer, 1].isfinite().all()


# ---- The solver ------------------------------------------------------------------------------------------------------


def call(arguments, backend, parallel):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in arguments.items() if name != "filter"}
    with lcw_ops.use_backend(backend):
        states = F.orthogonal_filter(
            **leaves, filter=arguments["filter"], solver="parallel" if parallel else "sequential", return_states=True
        )
        gradients = torch.autograd.grad((states * states).sum(), leaves.values())
    return [states.detach(), *gradients]


@pytest.mark.parametrize(
    ("dtype", "steps", "tied"),
    [
        (torch.float32, 9, False),
        pytest.param(torch.bfloat16, 8, False, marks=pytest.mark.slow),
        pytest.param(torch.float16, 8, True, marks=pytest.mark.slow),
    ],
)
def test_the_solver_matches_the_sequence(dtype, steps, tied):
    arguments = {
        "h0": torch.randn(3, 6).to(dtype),
        "weight": (torch.randn(*(() if tied else (steps,)), 6, 6) / 3).to(dtype),
        "bias": torch.randn(6).to(dtype),
        "filter": torch.randperm(6),
        "alpha": 1 - torch.rand(steps) / steps,
        "beta": torch.rand(steps) / steps,
    }
    with solver.record_solves() as solves:
        found = call(arguments, "triton", parallel=True)
    assert [(solve.direction, solve.layers) for solve in solves] == [("forward", steps), ("backward", steps)]
    assert all(solve.sweeps >= 2 and solve.converged and solve.error <= 1e-6 for solve in solves)
    eager = call(arguments, "reference", parallel=False)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in arguments.items()}
    expected = call(wide, "reference", parallel=False)
    assert_by_the_rule("solver", *([tensor.cpu() for tensor in each] for each in (found, eager, expected)))


def test_a_wrong_permutation_gives_nan():
    states, spare = torch.zeros(5, 2, 4), torch.zeros(4, 2, 4)
    layers = solver.Layers(torch.randn(4, 4), None, torch.ones(1), torch.ones(1), None, "tanh")
    for wrong in ([0, 1, 2, 2], [0, -1, 2, 3], [0, 1, 2, 10**6]):
        scan = op._make_scan("triton", torch.tensor(wrong))
        assert scan.start_fused(layers, states, spare).sweep().isnan()
        assert scan.start_fused_adjoint(layers, states, None, spare, spare.clone()).sweep().isnan()


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(1, kernels.MAX_WIDTH + 1, torch.float32), (1, 5, torch.float64), (1, 0, torch.float32), (0, 5, torch.float32)],
)
def test_other_states_take_the_scan_with_a_product_outside(rows, width, dtype):
    scan, states = op._make_scan("triton", torch.arange(width)), torch.zeros(3, rows, width, dtype=dtype)
    assert not kernels.takes(states)
    assert scan.start_fused(None, states, None) is None
    assert scan.start_fused_adjoint(None, states, None, None, None) is None


def test_other_filters_and_backends_take_the_scan_with_a_product_outside():
    assert kernels.takes(torch.zeros(3, 1, 5))
    for backend, filter in (("reference", torch.arange(5)), ("triton", torch.linalg.qr(torch.randn(5, 5))[0])):
        scan = op._make_scan(backend, filter)
        assert scan.start_fused(None, torch.zeros(3, 1, 5), None) is None
        assert scan.start_fused_adjoint(None, torch.zeros(3, 1, 5), None, None, None) is None


def test_a_gpu_with_little_shared_memory_takes_the_scan_with_a_product_outside(monkeypatch):
    for shared_memory, matrix_units, takes in ((64 * 1024, False, False), (64 * 1024, True, True)):
        monkeypatch.setattr(kernels, "device_facts", lambda _: kernels.Device(1, shared_memory, matrix_units))  # noqa: B023
        assert kernels.takes(torch.zeros(3, 1, 5)) == takes


def test_chunks_fill_the_machine_once():
    # 128 samples of 64 units are 4 programs of 8 warps.
    assert kernels.choose_chunk(50_000, 4, 8, 132) == -(-50_000 // 66)
    assert kernels.choose_chunk(50_000, 1, 4, 132) == -(-50_000 // 223)
    assert kernels.choose_chunk(50_000, 10**6, 8, 132) == 50_000
    assert kernels.choose_chunk(1, 1, 8, 1) == 1


@pytest.mark.parametrize(
    ("rows", "matrix_units", "allowed", "precision"),
    [
        (17, False, "tf32", "tf32x3"),
        (16, False, "tf32", "ieee"),
        (17, True, "tf32", "ieee"),
        (17, False, "ieee", "ieee"),
    ],
)
def test_full_tiles_take_three_tf32_products_if_the_user_allows_tf32(rows, matrix_units, allowed, precision):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = allowed
        launch = kernels.choose_launch(64, rows, kernels.Device(132, 227 * 1024, matrix_units))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert launch["PRECISION"] == precision


def test_auto_stays_sequential_where_nothing_was_measured():
    with lcw_ops.use_backend("triton"), solver.record_solves() as solves:
        F.orthogonal_filter(torch.randn(2, 4), torch.randn(9, 4, 4), None, torch.randperm(4), solver="auto")
    assert not solves
