"""lcw_ops.distributed: a recurrence whose layers are split over ranks gives the results of a single process.

If a rank fails, no other rank hangs. Four processes on this machine (gloo) run every case, as a group of four and as
two groups of two. Run as a script, this file is one of the processes: it stores its results, and the tests compare them
with those of the plain module. The process of the tests runs the cases too, as a group of one.
"""

import io
import itertools
import os
import pickle
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from datetime import timedelta
from functools import partial

import pytest
import torch
from support.processes import run_ranks
from torch import nn

import lcw_ops
import lcw_ops.distributed
from lcw_ops.distributed.group import Group
from lcw_ops.ops.parallel_depth import solver
from lcw_ops.ops.parallel_depth.frame import find_frame, get_frame

pytestmark = pytest.mark.usefixtures("one_thread")

PROCESSES = 4
GROUP_SIZES = (2, 4)
# In seconds: several times as long as all cases take. A process that still waits for another by then is ended.
TIMEOUT = 300
# The timeout of the groups in which a rank fails, in seconds.
PATIENCE = 5
# The exit status of the process that ends on purpose, in the middle of a forward pass.
EXIT_STATUS = 7

# In bytes: a rank's layers are sent in several pieces.
SMALL_PIECE = 1000

SIZES = {"in_features": 5, "width": 6, "out_features": 3}


def make_mlp(
    depth=103,
    dtype=torch.float64,
    filter="permutation",
    activation="tanh",
    c=1.0,
    per_layer=(),
    solver="parallel",
    tolerance=None,
    alpha=None,
    **sizes,
):
    torch.manual_seed(depth)
    scales = {"beta": c / depth, "alpha": 1 - c / depth if alpha is None else alpha}
    for name in per_layer:
        scales[name] = scales[name] * (0.75 + torch.rand(depth, dtype=torch.float64) / 2)
    if "alpha" in per_layer:
        scales["alpha"] = scales["alpha"].clamp(max=1.0)
    sizes = {**SIZES, **sizes}
    mlp = lcw_ops.nn.OrthogonalFilterMLP(
        depth=depth, filter=filter, activation=activation, solver=solver, tolerance=tolerance, **scales, **sizes
    )
    nn.init.normal_(mlp.bias, std=0.3)
    return mlp.to(dtype)


def make_samples(mlp, rows=4, step=0):
    generator = torch.Generator().manual_seed(step)
    samples, weights = (
        torch.randn(rows, size, generator=generator, dtype=torch.float64)
        for size in (mlp.in_features, mlp.out_features)
    )
    dtype = mlp.input_layer.weight.dtype
    return samples.to(dtype), weights.to(dtype)


# A frame is the basis in which a dense filter rotates pairs of units. In "by columns" the first state and the gradient
# of the last one are not contiguous.
CASES = {
    "tanh": {},
    "relu, dense": {"activation": "relu", "filter": "haar", "c": 3.0},
    "sigmoid, scales per layer": {"activation": "sigmoid", "per_layer": ("alpha", "beta"), "depth": 37},
    "identity, dense, scales per layer": {
        "activation": "identity",
        "filter": "haar",
        "per_layer": ("alpha", "beta"),
        "depth": 38,
    },
    "dense without a frame": {"filter": "haar", "depth": 38},
    "residual, alpha 1": {"filter": "identity", "depth": 50, "alpha": 1.0},
    "odd width, one sample": {"filter": "haar", "width": 7, "rows": 1},
    "width 1": {"filter": "haar", "width": 1, "depth": 21},
    "no samples": {"rows": 0, "depth": 21},
    "a layer per rank": {"depth": 4},
    "float32": {"dtype": torch.float32},
    "float32, dense, relu": {"dtype": torch.float32, "filter": "haar", "activation": "relu", "width": 16},
    "float32, sigmoid, beta per layer": {"dtype": torch.float32, "activation": "sigmoid", "per_layer": ("beta",)},
    "bfloat16": {"dtype": torch.bfloat16, "filter": "haar", "c": 3.0},
    "autocast": {"dtype": torch.float32, "filter": "haar", "autocast": True},
    "autocast without a frame": {"dtype": torch.float32, "filter": "haar", "autocast": True},
    "autocast, too strong": {"dtype": torch.float32, "filter": "haar", "autocast": True, "c": 70.0, "alpha": 0.5},
    "by columns": {"by_columns": True},
    "by columns, dense": {"by_columns": True, "filter": "haar"},
    "by columns, too strong": {"by_columns": True, "c": 70.0, "alpha": 0.5},
    "too strong": {"c": 70.0, "alpha": 0.5},
    "float32, dense, too strong": {"dtype": torch.float32, "filter": "haar", "c": 70.0, "alpha": 0.5},
}
GIVEN_UP = [name for name in CASES if "too strong" in name]

# The ranks find different frames of the filter, or one finds none.
FRAMES = {
    # From width 128 on, torch's eigenvectors depend on the number of threads.
    "dense, a number of threads per rank": {"filter": "haar", "width": 128, "depth": 11},
    "dense, a frame per rank": {"filter": "haar", "c": 3.0},
    "float32, dense, a frame on odd ranks only": {"dtype": torch.float32, "filter": "haar"},
}
CASES.update(FRAMES)

# A loose tolerance stops the sweeps early, far from the solution. The ranks must still agree with one process.
LOOSE = {
    "one sweep": {"tolerance": 0.9},
    "two sweeps": {"tolerance": 1e-3},
    "three sweeps, dense": {"tolerance": 1e-4, "filter": "haar", "c": 3.0},
    "to 1e-9, scales per layer": {"tolerance": 1e-9, "per_layer": ("alpha", "beta"), "depth": 38},
    "to 1e-9, relu, dense": {"tolerance": 1e-9, "filter": "haar", "activation": "relu", "depth": 41},
}


def by_columns(matrix):
    """The same numbers, column by column in memory."""
    return matrix.mT.contiguous().mT


class ByColumns(torch.autograd.Function):
    """The identity, whose output and gradient lie column by column in memory."""

    @staticmethod
    def forward(ctx, rows):
        return by_columns(rows)

    @staticmethod
    def backward(ctx, gradient):
        return by_columns(gradient)


OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=3.0, momentum=0.9),
    # A small eps, because gradients carry the factor beta.
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01, eps=1e-12),
}

TRAINED = [
    ("SGD", "permutation", torch.float64),
    ("SGD", "haar", torch.float32),
    ("Adam", "haar", torch.float64),
    ("Adam", "permutation", torch.float32),
]


def split_options(options):
    options = dict(options)
    return options.pop("rows", 4), options.pop("autocast", False), options.pop("by_columns", False), options


def run(module, samples, weights, autocast=False):
    """The output and every gradient by name; the samples' gradient is "x"."""
    samples = samples.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = module(samples)
    (output * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "x": samples.grad, **gradients}


def train(module, plain, name, part=slice(None)):
    optimizer = OPTIMIZERS[name](module.parameters())
    for step in range(4):
        samples, weights = (tensor[part] for tensor in make_samples(plain, step=step))
        optimizer.zero_grad()
        (module(samples) - weights).square().mean().backward()
        optimizer.step()


# ---- Results of the processes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results that every process stored."""
    statuses = [0] * (PROCESSES - 1) + [EXIT_STATUS]
    return run_ranks(__file__, tmp_path_factory.mktemp("gloo"), statuses, TIMEOUT, weights_only=False)


def own_layers(depth, size, rank):
    rank %= size
    return slice(depth * rank // size, depth * (rank + 1) // size)


@pytest.fixture
def alone():
    """This process, as a group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield Process(None, 1, {})
    torch.distributed.destroy_process_group()


@pytest.fixture(params=GROUP_SIZES, ids="{} ranks".format)
def size(request):
    return request.param


def by_rank(found, *key):
    return [results[key] for results in found]


def assert_near_one_process(name, results, size):
    """``results`` are those of every rank, in groups of this size."""
    rows, autocast, _, options = split_options(CASES[name])
    mlp = make_mlp(**options)
    samples, weights = make_samples(mlp, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        one = run(mlp, samples, weights, autocast)
    plain = make_mlp(**{**options, "solver": "sequential"})
    sequential = run(plain, samples, weights, autocast)
    exact = run(deepcopy(plain).double(), samples.double(), weights.double())
    dtype = torch.bfloat16 if autocast else options.get("dtype", torch.float64)
    for rank, result in enumerate(results):
        assert result.keys() == exact.keys()
        for key, right in exact.items():
            cut = own_layers(mlp.depth, size, rank) if key in ("weight", "bias") else slice(None)
            right, actual = right[cut], result[key]
            assert actual.dtype == sequential[key].dtype
            assert actual.shape == right.shape
            if not right.numel():
                continue
            # Allow twice the error of one process (the larger of both solvers'), plus an ulp, plus for every layer the
            # rounding of a sum of ``width`` products.
            errors = [(kept[key][cut].double() - right).abs().max() for kept in (one, sequential)]
            rounding = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps * mlp.depth * mlp.width**0.5
            allowed = 2 * max(errors) + (rounding + torch.finfo(dtype).eps) * exact[key].abs().max()
            error = (actual.double() - right).abs().max()
            assert error <= allowed, f"{key} on rank {rank}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient_are_those_of_one_process(found, name, size):
    assert_near_one_process(name, by_rank(found, size, name), size)


@pytest.mark.parametrize("name", [name for name in CASES if name not in FRAMES])
def test_output_and_every_gradient_of_a_group_of_one(alone, name):
    alone.run_case(name)
    assert_near_one_process(name, [alone.results[1, name]], 1)
    messages, _ = alone.results[1, name, "solves"]
    assert len(messages) == (name in GIVEN_UP)


def test_ranks_had_different_frames(found):
    """The frames do differ. The case of two threads is not checked, because its effect depends on the machine."""
    frames = [found[rank][2, "dense, a frame per rank", "frame"] for rank in range(2)]
    assert not torch.allclose(*frames)
    frames = [found[rank][2, "float32, dense, a frame on odd ranks only", "frame"] for rank in range(2)]
    assert frames[0] is None
    assert frames[1] is not None


@pytest.mark.parametrize("name", [name for name in CASES if name not in FRAMES])
def test_shared_results_are_the_same_to_the_last_bit_on_every_rank(found, name, size):
    for rank in range(PROCESSES):
        for key, value in found[rank][size, name].items():
            if key not in ("weight", "bias"):
                assert torch.equal(value, found[0][size, name][key]), key


def assert_sweeps_of_one_process(name, results, size):
    mlp = make_mlp(**LOOSE[name])
    samples, weights = make_samples(mlp)
    with solver.record_solves() as solves:
        one = run(mlp, samples, weights)
    exact = run(make_mlp(**{**LOOSE[name], "solver": "sequential", "tolerance": None}), samples, weights)
    assert len(solves) == 2
    assert (one["output"] - exact["output"]).abs().max() > 1e-13, "converged, so single sweeps are not tested"
    for rank, (result, theirs) in enumerate(results):
        assert len(theirs) == len(solves)
        for actual, expected in zip(theirs, solves, strict=True):
            for field in ("direction", "first_layer", "layers", "sweeps", "converged"):
                assert actual[field] == getattr(expected, field), field
            for field in ("contraction", "residual", "error"):
                # A sweep's change carries the states' rounding, which is relative to the states, not to the change.
                right = getattr(expected, field)
                assert actual[field] == pytest.approx(right, rel=1e-4, abs=1e-13, nan_ok=True), field
        for key, right in one.items():
            cut = own_layers(mlp.depth, size, rank) if key in ("weight", "bias") else slice(None)
            error = (result[key] - right[cut]).abs().max()
            # One process and the ranks each round once per layer.
            assert error <= 2 * mlp.depth * torch.finfo(torch.float64).eps * right.abs().max(), key


@pytest.mark.parametrize("name", LOOSE)
def test_every_sweep_equals_that_of_one_process(found, name, size):
    assert_sweeps_of_one_process(name, by_rank(found, size, name), size)


def test_a_broadcast_does_not_write_to_the_source(alone):
    """autograd may have saved the tensor, and a write in place would end the backward pass with an error."""
    tensor = torch.arange(6.0).view(2, 3).T
    version = tensor._version
    Group(None).broadcast(tensor, 0, "a test")
    assert tensor._version == version


@pytest.mark.parametrize("name", LOOSE)
def test_every_sweep_of_a_group_of_one(alone, name):
    alone.run_loosely(name)
    assert_sweeps_of_one_process(name, [alone.results[1, name]], 1)


def assert_given_up_with_one_warning(results, size):
    for rank, (messages, solves) in enumerate(results):
        assert [solve["converged"] for solve in solves] == [False, True, True]
        assert [solve["direction"] for solve in solves] == ["forward", "forward", "backward"]
        assert solves[0]["sweeps"] == results[0][1][0]["sweeps"] > 0
        layers = own_layers(103, size, rank)
        for solve in solves[1:]:
            assert (solve["first_layer"], solve["layers"], solve["sweeps"]) == (
                layers.start,
                layers.stop - layers.start,
                0,
            )
        if rank % size == 0:
            (message,) = messages
            assert "sweeps over 103 layers did not converge (forward)" in message
        else:
            assert not messages


@pytest.mark.parametrize("name", GIVEN_UP)
def test_ranks_give_up_alike_with_one_warning(found, name, size):
    assert_given_up_with_one_warning(by_rank(found, size, name, "solves"), size)


@pytest.mark.parametrize("name", GIVEN_UP)
def test_a_group_of_one_gives_up_with_one_warning(alone, name):
    alone.run_case(name)
    assert_given_up_with_one_warning([alone.results[1, name, "solves"]], 1)


def assert_backward_given_up(results, size):
    """Only the backward pass is given up: the forward states come from sweeps."""
    mlp = make_mlp(solver="sequential")
    samples, weights = make_samples(mlp)
    right = run(mlp, samples, weights)
    for rank, (result, messages, solves) in enumerate(results):
        assert [(solve["direction"], solve["converged"]) for solve in solves] == [
            ("forward", True),
            ("backward", False),
            ("backward", True),
        ]
        assert len(messages) == (rank % size == 0)
        for key, expected in right.items():
            cut = own_layers(mlp.depth, size, rank) if key in ("weight", "bias") else slice(None)
            allowed = 2 * mlp.depth * torch.finfo(torch.float64).eps * expected.abs().max()
            assert (result[key] - expected[cut]).abs().max() <= allowed, key


def test_a_backward_pass_that_does_not_converge_is_right_too(found, size):
    assert_backward_given_up(by_rank(found, size, "backward given up"), size)


def test_a_backward_pass_that_does_not_converge_is_right_in_a_group_of_one(alone):
    alone.give_up_backward()
    assert_backward_given_up([alone.results[1, "backward given up"]], 1)


def test_a_nan_weight_on_one_rank_makes_every_rank_give_up(found, size):
    for rank in range(PROCESSES):
        output, messages, solves = found[rank][size, "not a number"]
        assert output.isnan().all()
        assert [(solve["sweeps"], solve["converged"]) for solve in solves] == [(1, False), (0, True)]
        assert solves[0]["residual"] == float("inf")
        assert len(messages) == (rank % size == 0)


@pytest.mark.parametrize(("name", "filter", "dtype"), TRAINED)
def test_ranks_train_to_the_parameters_of_one_process(found, name, filter, dtype, size):
    plain = make_mlp(filter=filter, dtype=dtype, solver="sequential")
    start = deepcopy(plain.state_dict())
    train(plain, plain, name)
    # Adam divides a gradient by its size, which may be near zero, and so magnifies the gradient's rounding.
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-3 if name == "Adam" else 1e-4}[dtype]
    for rank in range(PROCESSES):
        trained = found[rank][size, "trained", name, filter, dtype]
        assert trained.keys() == start.keys()
        for key, expected in plain.state_dict().items():
            if key == "filter":
                assert torch.equal(trained[key], expected)
                continue
            moved = (expected - start[key]).abs().max()
            assert moved > 1e-3, f"{key}: nothing was learned"
            assert (trained[key] - expected).abs().max() <= tolerance * moved, key
            # The parameters are gathered from all ranks, and are the same on all of them.
            assert torch.equal(trained[key], found[0][size, "trained", name, filter, dtype][key])


def test_data_parallelism_over_another_group(found):
    """Two groups of two ranks, each with half of every batch, in torch's own DistributedDataParallel."""
    plain = make_mlp(solver="sequential")
    start = deepcopy(plain.state_dict())
    train(plain, plain, "SGD")
    for rank in range(PROCESSES):
        for key, trained in found[rank]["data parallel"].items():
            expected = plain.state_dict()[key]
            assert key == "filter" or (trained - start[key]).abs().max() > 1e-3
            assert (trained - expected).abs().max() <= 1e-10 * expected.abs().max(), key


def test_a_group_of_one(found):
    mlp = make_mlp(filter="haar", solver="sequential")
    one = run(mlp, *make_samples(mlp))
    for rank in range(PROCESSES):
        for key, right in one.items():
            error = (found[rank]["alone"][key] - right).abs().max()
            assert error <= 2 * mlp.depth * torch.finfo(torch.float64).eps * right.abs().max(), key


# ---- Checkpoints


def test_a_checkpoint_is_that_of_the_plain_module(found, size):
    """A new module's checkpoint has the shared parameters of rank 0, and each layer's from the rank that owns it."""
    for name in ("sigmoid, scales per layer", "bfloat16"):
        expected = make_mlp(**split_options(CASES[name])[-1]).state_dict()
        for rank in range(PROCESSES):
            full, on_first = found[rank][size, name, "checkpoint"]
            assert list(full) == list(expected)
            for key, value in expected.items():
                assert full[key].dtype == value.dtype
                assert torch.equal(full[key], value), key
            if rank % size == 0:
                assert all(torch.equal(on_first[key], value) for key, value in expected.items())
            else:
                assert not on_first


def test_parameters_may_have_other_strides_on_every_rank(found, size):
    expected = make_mlp().state_dict()
    for made, loaded in by_rank(found, size, "by columns, checkpoint"):
        for key, value in expected.items():
            assert torch.equal(made[key], value), key
            assert torch.equal(loaded[key], value), key


def test_a_plain_checkpoint_is_loaded(found, size):
    plain = make_mlp(filter="haar", solver="sequential", per_layer=("beta",))
    samples, weights = make_samples(plain)
    right = run(plain, samples, weights)["output"]
    for rank in range(PROCESSES):
        before, after, full, of_local = found[rank][size, "loaded"]
        assert (before - right).abs().max() > 1e-2
        assert (after - right).abs().max() <= 2 * plain.depth * torch.finfo(torch.float64).eps * right.abs().max()
        assert torch.equal(after, of_local)
        for key, value in plain.state_dict().items():
            assert torch.equal(full[key], value)


@pytest.mark.parametrize("name", ["sigmoid, scales per layer", "bfloat16"])
def test_a_checkpoint_of_a_group_of_one_is_a_copy(alone, name, monkeypatch):
    monkeypatch.setattr(lcw_ops.distributed.module, "_PIECE_BYTES", SMALL_PIECE)
    mlp = make_mlp(**split_options(CASES[name])[-1])
    expected = deepcopy(mlp.state_dict())
    module = alone.distribute(mlp)
    for full in (module.full_state_dict(), module.full_state_dict(rank0_only=True)):
        with torch.no_grad():
            for tensor in module.state_dict().values():
                tensor.zero_()
        assert list(full) == list(expected)
        for key, value in expected.items():
            assert full[key].dtype == value.dtype
            assert torch.equal(full[key], value), key
        module.load_full_state_dict(expected)


def test_a_plain_checkpoint_is_loaded_by_a_group_of_one(alone, monkeypatch):
    monkeypatch.setattr(lcw_ops.distributed.module, "_PIECE_BYTES", SMALL_PIECE)
    plain, trained = make_mlp(filter="haar", per_layer=("beta",)), make_mlp(filter="haar", per_layer=("beta",))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(0.5)
        trained.beta.mul_(0.5)
    samples, _ = make_samples(plain)
    module, expected = alone.distribute(plain), alone.distribute(trained)(samples)
    module.load_full_state_dict(trained.state_dict())
    assert torch.equal(module(samples), expected)


MISFITS = [
    ("missing", ["bias is missing", "extra is unexpected"]),
    ("depth", ["weight has shape (102, 6, 6); expected (103, 6, 6)"]),
    ("filter", ["is not orthogonal"]),
    ("None", ["bias is a NoneType; expected a tensor"]),
    ("meta", ["bias is a Tensor; expected a tensor with values"]),
    ("nothing", ["it is a NoneType"]),
]


@pytest.mark.parametrize(("problem", "words"), MISFITS)
def test_a_checkpoint_that_does_not_fit_changes_nothing_on_any_rank(found, problem, words, size):
    for message, unchanged in by_rank(found, size, "refused", problem):
        assert all(word in message for word in words), message
        assert unchanged


@pytest.mark.parametrize(("problem", "words"), MISFITS)
def test_a_checkpoint_that_does_not_fit_changes_nothing_in_a_group_of_one(alone, problem, words):
    plain = make_mlp(filter="haar", per_layer=("beta",))
    alone.refuse_checkpoint(problem, alone.distribute(plain), plain.state_dict())
    message, unchanged = alone.results[1, "refused", problem]
    assert all(word in message for word in words), message
    assert unchanged


# ---- Errors


@pytest.mark.parametrize(
    ("name", "type_name", "words"),
    [
        ("too few layers", "ValueError", "ranks for 1 layers"),
        ("filter per layer", "ValueError", "one filter that all layers share"),
        ("trained alpha", "ValueError", "mlp.alpha.requires_grad_(False)"),
        ("window", "ValueError", "window is 10"),
        ("other module", "TypeError", "mlp is a Linear; expected lcw_ops.nn.OrthogonalFilterMLP"),
        ("other module on one rank", "TypeError", "mlp is a Linear"),
        ("other depth on one rank", "ValueError", "depth of the module is 20 on rank 1; expected 21, as on rank 0"),
        ("other bias on one rank", "ValueError", "bias of the module is torch.float32 (103, 6) on rank 1"),
        (
            "other layer on one rank",
            "ValueError",
            "output_layer.weight of the module is torch.float32 (3, 6) on rank 1",
        ),
        ("shape", "ValueError", "input has shape (4, 6); expected (*, 5)"),
        ("dtype", "TypeError", "input is torch.float32"),
        ("rows on one rank", "ValueError", "the input comes from ranks that differ in the number of samples"),
        ("numbers on one rank", "ValueError", "the input has numbers that differ between ranks"),
        ("gradient mode on one rank", "ValueError", "whether gradients are enabled"),
        ("scale on one rank", "ValueError", "the input has numbers that differ between ranks"),
        ("loss on one rank", "ValueError", "the output's gradient has numbers that differ between ranks"),
        ("loss's scale on one rank", "ValueError", "the output's gradient has numbers that differ between ranks"),
        ("tolerance on one rank", "ValueError", "the input comes from ranks that differ in the tolerance"),
        ("activation on one rank", "ValueError", "the input comes from ranks that differ in the activation"),
        ("twice", "RuntimeError", "derivatives of second order"),
        ("no member", "ValueError", "does not contain this process"),
        ("data parallel", "ValueError", "DistributedDataParallel is over ranks ["),
    ],
)
def test_every_rank_raises_alike(found, name, type_name, words, size):
    for rank in range(PROCESSES):
        error = found[rank][size, "error", name]
        assert error[0] == type_name, error
        assert words in error[1]


@pytest.mark.parametrize(
    ("name", "at", "type_name", "words", "others"),
    [
        ("shape on one rank", 1, "ValueError", "input has shape (4, 6)", "rank 1 refused the input"),
        ("backend on one rank", 1, "BackendError", "triton", "rank 1 refused the input"),
        ("warning", 0, "RuntimeWarning", "did not converge", "rank 0 refused sweeps that do not converge"),
    ],
)
def test_a_refusal_on_one_rank_is_a_refusal_on_every_rank(found, name, at, type_name, words, others, size):
    for rank in range(PROCESSES):
        error = found[rank][size, "error", name]
        expected = (type_name, words) if rank % size == at else ("ValueError", others)
        assert error[0] == expected[0], error
        assert expected[1] in error[1]


def test_a_module_is_not_pickled(found, size):
    for rank in range(PROCESSES):
        for how in ("pickle", "torch.save"):
            error = found[rank][size, "error", how]
            assert error[0] == "TypeError"
            assert "full_state_dict()" in error[1]


def test_after_these_errors_the_group_still_works(found, size):
    """A rank that has frozen its layers still takes part in the others' backward pass."""
    for rank in range(PROCESSES):
        again, gradient = found[rank][size, "afterwards"]
        assert torch.equal(again, found[rank][size, "tanh"]["output"])
        if rank % size == 0:
            assert gradient is None
        else:
            assert torch.equal(gradient, found[rank][size, "tanh"]["weight"])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x: torch.cat((x, x[:, :1]), 1), ValueError, r"input has shape \(4, 6\); expected \(\*, 5\)"),
        (torch.Tensor.float, TypeError, "input is torch.float32"),
    ],
    ids=["shape", "dtype"],
)
def test_a_group_of_one_refuses_what_the_plain_module_refuses(alone, change, error, words):
    module = alone.distribute(make_mlp())
    with pytest.raises(error, match=words):
        module(change(make_samples(module)[0]))


def test_frozen_layers_pass_on_the_gradient_of_the_samples(alone):
    mlp = make_mlp()
    samples, weights = make_samples(mlp)
    expected = run(mlp, samples, weights)
    module = alone.distribute(make_mlp().requires_grad_(False))
    result = run(module, samples, weights)
    assert (result["x"] - expected["x"]).abs().max() <= 1e-12 * expected["x"].abs().max()
    assert all(result[name] is None for name, _ in module.named_parameters())


def test_data_parallelism_over_a_group_of_one(alone):
    """The wrapper has one rank of the module's group, itself, and so has overwritten nothing."""
    mlp = make_mlp()
    samples, weights = make_samples(mlp)
    expected = run(alone.distribute(mlp), samples, weights)
    result = run(nn.parallel.DistributedDataParallel(alone.distribute(mlp)), samples, weights)
    for key, right in expected.items():
        assert torch.equal(result[key if key in result else f"module.{key}"], right), key


@pytest.mark.parametrize(
    ("collective", "call", "words"),
    [
        ("all_gather", 2, "the all-gather of the states between ranks in sweep 2"),
        # Before the sweeps, the ranks agree on the call.
        ("all_reduce", 3, "the all-reduce of the residual of sweep 2"),
    ],
)
def test_an_error_names_the_sweep_in_which_a_collective_failed(alone, collective, call, words, monkeypatch):
    module = alone.distribute(make_mlp())
    samples, weights = make_samples(module)
    output = module(samples)
    collect, calls = getattr(torch.distributed, collective), itertools.count(1)

    def collect_or_fail(*args, **kwargs):
        if next(calls) == call:
            raise RuntimeError("gone")
        return collect(*args, **kwargs)

    monkeypatch.setattr(torch.distributed, collective, collect_or_fail)
    with pytest.raises(RuntimeError, match=f"{words} failed on rank 0 of 1"):
        module(samples)
    calls = itertools.count(1)
    words = words.replace("states", "gradients").replace("sweep", "adjoint sweep")
    with pytest.raises(RuntimeError, match=f"{words} failed on rank 0 of 1"):
        (output * weights).sum().backward()


def test_without_a_process_group():
    with pytest.raises(ValueError, match=r"process_group is missing.*torch\.distributed\.init_process_group"):
        lcw_ops.distributed.DepthParallel(make_mlp())


def assert_stopped_answering(error, words):
    type_name, message, cause, seconds = error
    assert type_name == "RuntimeError"
    assert words in message
    assert "a rank of the process group stopped answering" in message
    assert cause is not None, "the backend's own error is lost"
    # A busy machine may add 30 seconds.
    assert seconds < PATIENCE + 30


def test_a_rank_that_ends_in_a_forward_pass(found):
    for rank in range(PROCESSES - 1):
        words = f"the all-gather of the states between ranks in sweep 2 failed on rank {rank} of 4"
        # A rank whose partners are all alive learns of the failure from one of them, at most one collective later.
        _, message, *_ = error = found[rank]["ended"]
        assert_stopped_answering(error, words if words in message else f"failed on rank {rank} of 4")
        assert "sweep 2" in message


def test_a_rank_that_raises_in_a_backward_pass(found):
    assert found[1]["raised"][:2] == ("ZeroDivisionError", "on purpose")
    assert_stopped_answering(
        found[0]["raised"], "the all-gather of the gradients between ranks in adjoint sweep 2 failed on rank 0 of 2"
    )


def test_a_rank_that_does_not_call(found):
    assert_stopped_answering(found[2]["raised"], "the agreement on the input failed on rank 0 of 2")


# ---- One of the processes


def describe_solve(solve):
    return {field: getattr(solve, field) for field in solve.__dataclass_fields__}


@contextmanager
def recorded():
    """Yield two lists, which are filled at the end: the messages of RuntimeWarnings, and the solves.

    Sweeps that do not converge give a RuntimeWarning. torch may give warnings of other categories, which are ignored.
    """
    messages, solves = [], []
    with warnings.catch_warnings(record=True) as caught, solver.record_solves() as recording:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", RuntimeWarning)
        yield messages, solves
    messages += [str(warning.message) for warning in caught]
    solves += [describe_solve(solve) for solve in recording]


def error_of(function):
    start = time.monotonic()
    try:
        function()
    except Exception as error:
        cause = None if error.__cause__ is None else str(error.__cause__)
        return type(error).__name__, str(error), cause, time.monotonic() - start
    return "nothing", "", None, time.monotonic() - start


class Process:
    """One rank, in one group."""

    def __init__(self, group, size, results):
        self.group, self.size, self.results = group, size, results
        self.rank = torch.distributed.get_rank(group)

    def distribute(self, mlp):
        """Spoil the shared parameters on all ranks but 0; then distribute the module, which takes those of rank 0."""
        if self.rank:
            with torch.no_grad():
                for parameter in (*mlp.input_layer.parameters(), *mlp.output_layer.parameters()):
                    parameter.add_(1.0)
                mlp.filter.copy_(mlp.filter.flip(0))
                for scale in (mlp.alpha, mlp.beta):
                    if isinstance(scale, torch.Tensor):
                        scale.mul_(0.5)
        return lcw_ops.distributed.DepthParallel(mlp, self.group)

    def run_all(self):
        self.run_cases()
        self.train()
        self.keep_checkpoints()
        self.meet_errors()

    def get_frame(self, name, filter):
        """The frame that this rank finds in a case."""
        if "without a frame" in name or ("odd ranks" in name and self.rank % 2 == 0):
            return None
        # Two threads for the frame only: everywhere else, two threads on one core would wait for each other.
        torch.set_num_threads(2 if "number of threads" in name and self.rank == 1 else 1)
        frame = find_frame(filter)
        torch.set_num_threads(1)
        if "a frame per rank" in name:
            # Put the pairs of units into another order.
            pairs = torch.arange(len(filter)).unflatten(0, (-1, 2)).roll(self.rank, 0).flatten()
            basis, inverse, rotation, exact_basis, exact_inverse = frame
            frame = type(frame)(
                basis[:, pairs],
                inverse[pairs],
                rotation.unflatten(0, (2, -1))[:, pairs].flatten(),
                exact_basis[:, pairs],
                exact_inverse[pairs],
            )
        if name in FRAMES:
            self.results[self.size, name, "frame"] = frame.basis
        return frame

    def run_cases(self):
        for name in CASES:
            self.run_case(name)
        for name in LOOSE:
            self.run_loosely(name)
        self.run_with_nan()
        self.give_up_backward()

    def run_case(self, name):
        rows, autocast, by_columns, options = split_options(CASES[name])
        mlp = make_mlp(**options)
        samples, weights = make_samples(mlp, rows)
        self.results[self.size, name, "frame"] = None
        lcw_ops.distributed.recurrence.get_frame = partial(self.get_frame, name)
        try:
            module = self.distribute(mlp)
            if by_columns:
                module.input_layer.register_forward_hook(lambda _, args, output: ByColumns.apply(output))
                module.output_layer.register_forward_pre_hook(lambda _, args: ByColumns.apply(*args))
            with recorded() as self.results[self.size, name, "solves"]:
                self.results[self.size, name] = run(module, samples, weights, autocast)
        finally:
            lcw_ops.distributed.recurrence.get_frame = get_frame

    def run_loosely(self, name):
        mlp = make_mlp(**LOOSE[name])
        with recorded() as (_, solves):
            result = run(self.distribute(mlp), *make_samples(mlp))
        self.results[self.size, name] = result, solves

    def run_with_nan(self):
        module = self.distribute(make_mlp())
        if self.rank == self.size - 1:
            nn.init.constant_(module.weight, torch.nan)
        with recorded() as (messages, solves), torch.no_grad():
            output = module(make_samples(module)[0])
        self.results[self.size, "not a number"] = output, messages, solves

    def give_up_backward(self):
        # The adjoint converges whenever the states do. Force its failure: pretend that its changes never shrink.
        module = self.distribute(make_mlp())
        largest = module.group.largest
        module.group.largest = lambda change, what: (
            largest(change, what) * 0 + 1 if "adjoint" in what else largest(change, what)
        )
        with recorded() as (messages, solves):
            result = run(module, *make_samples(module))
        self.results[self.size, "backward given up"] = result, messages, solves

    def train(self):
        for name, filter, dtype in TRAINED:
            mlp = make_mlp(filter=filter, dtype=dtype)
            module = self.distribute(mlp)
            train(module, mlp, name)
            self.results[self.size, "trained", name, filter, dtype] = module.full_state_dict()

    def keep_checkpoints(self):
        lcw_ops.distributed.module._PIECE_BYTES = SMALL_PIECE
        for name in ("sigmoid, scales per layer", "bfloat16"):
            module = self.distribute(make_mlp(**split_options(CASES[name])[-1]))
            full = module.full_state_dict(), module.full_state_dict(rank0_only=True)
            self.results[self.size, name, "checkpoint"] = full

        mlp = make_mlp()
        first = deepcopy(mlp.state_dict()) if self.rank == 0 else None
        mlp.weight.data = by_columns(mlp.weight.data)
        if self.rank == 0:
            mlp.input_layer.weight.data = by_columns(mlp.input_layer.weight.data)
        module = self.distribute(mlp)
        made = module.full_state_dict()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        module.load_full_state_dict(first)
        self.results[self.size, "by columns, checkpoint"] = made, module.full_state_dict()

        plain = make_mlp(filter="haar", per_layer=("beta",))
        full = plain.state_dict()
        module = self.distribute(deepcopy(plain))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.5)
            module.filter.copy_(torch.eye(6))
            module.beta.mul_(0.5)
        samples, _ = make_samples(plain)
        before = module(samples).detach()
        module.load_full_state_dict(full if self.rank == 0 else None)
        after = module(samples).detach()
        restored = self.distribute(deepcopy(plain))
        restored.load_state_dict(module.state_dict())
        copied = deepcopy(restored)
        self.results[self.size, "loaded"] = before, after, module.full_state_dict(), copied(samples).detach()

        for problem, _ in MISFITS:
            self.refuse_checkpoint(problem, module, full)

    def refuse_checkpoint(self, problem, module, full):
        kept = deepcopy(module.state_dict())
        broken = {
            "missing": {"extra": full["bias"], **{key: value for key, value in full.items() if key != "bias"}},
            "depth": {**full, "weight": full["weight"][1:]},
            "filter": {**full, "filter": 2 * full["filter"]},
            "None": {**full, "bias": None},
            "meta": {**full, "bias": full["bias"].to("meta")},
            "nothing": None,
        }[problem]
        error = error_of(lambda: module.load_full_state_dict(broken))
        unchanged = all(torch.equal(kept[key], value) for key, value in module.state_dict().items())
        self.results[self.size, "refused", problem] = error[1], unchanged

    def meet_errors(self):
        is_other = self.rank == 1

        def construct(mlp, group=self.group):
            return lambda: lcw_ops.distributed.DepthParallel(mlp, group)

        windowed = make_mlp()
        windowed.window = 10
        alpha = nn.Parameter(torch.ones(103, dtype=torch.float64))
        per_layer = torch.eye(6).expand(103, 6, 6)
        module = self.distribute(make_mlp())
        samples, weights = make_samples(module)

        def call(samples):
            return lambda: module(samples)

        def call_without_gradients():
            with torch.set_grad_enabled(not is_other):
                module(samples)

        def differentiate_twice():
            (gradient,) = torch.autograd.grad(module(samples).square().sum(), module.bias, create_graph=True)
            gradient.sum().backward()

        def call_elsewhere():
            with lcw_ops.use_backend("triton") if is_other else nullcontext():
                module(samples)

        def call_with(name, value):
            def call():
                changed = self.distribute(make_mlp())
                if is_other:
                    setattr(changed, name, value)
                changed(samples)

            return call

        def call_scaled():
            unbiased = self.distribute(make_mlp())
            nn.init.zeros_(unbiased.input_layer.bias)
            unbiased((1.01 if is_other else 1.0) * samples)

        def warn():
            strong = self.distribute(make_mlp(**CASES["too strong"]))
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                strong(samples)

        def replicate():
            # Eight layers give all ranks the same number of them: DistributedDataParallel itself refuses uneven parts.
            layers = self.distribute(make_mlp(depth=8))
            nn.parallel.DistributedDataParallel(layers, process_group=self.group)(samples)

        def with_float32(name):
            mlp = make_mlp()
            changed = mlp.get_parameter(name)
            changed.data = changed.data.float()
            return mlp

        def no_member():
            others = torch.distributed.GroupMember.NON_GROUP_MEMBER
            lcw_ops.distributed.DepthParallel(make_mlp(), others)

        wrong = {
            "too few layers": construct(make_mlp(depth=1)),
            "filter per layer": construct(make_mlp(filter=per_layer, solver="sequential")),
            "trained alpha": construct(make_mlp(alpha=alpha)),
            "window": construct(windowed),
            "other module": construct(nn.Linear(5, 3)),
            "other module on one rank": construct(nn.Linear(5, 3) if is_other else make_mlp()),
            "other depth on one rank": construct(make_mlp(depth=20 if is_other else 21)),
            "shape": call(torch.ones(4, 6, dtype=torch.float64)),
            "dtype": call(samples.float()),
            "shape on one rank": call(torch.ones(4, 6, dtype=torch.float64) if is_other else samples),
            "other bias on one rank": construct(with_float32("bias") if is_other else make_mlp()),
            "other layer on one rank": construct(with_float32("output_layer.weight") if is_other else make_mlp()),
            "backend on one rank": call_elsewhere,
            "tolerance on one rank": call_with("tolerance", 1e-3),
            "activation on one rank": call_with("activation", "relu"),
            "scale on one rank": call_scaled,
            "warning": warn,
            "data parallel": replicate,
            "pickle": lambda: pickle.dumps(module),
            "torch.save": lambda: torch.save(module, io.BytesIO()),
            "rows on one rank": call(samples[:3] if is_other else samples),
            "numbers on one rank": call(samples.flip(0) if is_other else samples),
            "gradient mode on one rank": call_without_gradients,
            "loss on one rank": lambda: (module(samples) * (weights.flip(0) if is_other else weights)).sum().backward(),
            "loss's scale on one rank": lambda: (
                ((1.01 if is_other else 1.0) * module(samples) * weights).sum().backward()
            ),
            "twice": differentiate_twice,
            "no member": no_member,
        }
        for name, function in wrong.items():
            self.results[self.size, "error", name] = error_of(function)

        module = self.distribute(make_mlp())
        module.input_layer.requires_grad_(False)
        if self.rank == 0:
            module.weight.requires_grad_(False)
            module.bias.requires_grad_(False)
        output = module(samples)
        (output * weights).sum().backward()
        self.results[self.size, "afterwards"] = output.detach(), module.weight.grad


def run_in_other_groups(rank, pair, across, alone, results):
    mlp = make_mlp()
    module = lcw_ops.distributed.DepthParallel(mlp, pair)
    half = slice(0, 2) if rank < 2 else slice(2, 4)
    train(nn.parallel.DistributedDataParallel(module, process_group=across), mlp, "SGD", half)
    results["data parallel"] = module.full_state_dict()
    mlp = make_mlp(filter="haar")
    results["alone"] = run(lcw_ops.distributed.DepthParallel(mlp, alone), *make_samples(mlp))


def fail_at(module, what, fail):
    """Call ``fail`` in place of the collective whose name ends in ``what``."""
    gather = module.group.gather

    def gather_or_fail(own, called):
        return fail() if called.endswith(what) else gather(own, called)

    module.group.gather = gather_or_fail


def divide_by_zero():
    raise ZeroDivisionError("on purpose")


def fail_in_pairs(rank, pair, results):
    """Rank 1 raises in the middle of a backward pass; rank 3 never calls the module."""
    module = lcw_ops.distributed.DepthParallel(make_mlp(), pair)
    samples, weights = make_samples(module)
    if rank == 1:
        fail_at(module, "in adjoint sweep 2", divide_by_zero)
    if rank != 3:
        results["raised"] = error_of(lambda: run(module, samples, weights))


def end_in_the_group_of_all(rank, group, results, store):
    module = lcw_ops.distributed.DepthParallel(make_mlp(), group)
    samples, weights = make_samples(module)

    def end():
        store()
        os._exit(EXIT_STATUS)

    if rank == PROCESSES - 1:
        fail_at(module, "in sweep 2", end)
    results["ended"] = error_of(lambda: run(module, samples, weights))
    store()


def run_process(rank, folder):
    import torch.distributed as dist

    # Fill new memory with NaN, as tests/conftest.py does. The public function would import torch's compiler.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=TIMEOUT))
    pairs = [[0, 1], [2, 3]]
    groups = [dist.new_group(pair) for pair in pairs]
    across = [dist.new_group([rank, rank + 2]) for rank in (0, 1)]
    alone = [dist.new_group([rank]) for rank in range(PROCESSES)]
    impatient = [dist.new_group(pair, timeout=timedelta(seconds=PATIENCE)) for pair in pairs]
    impatient_group = dist.new_group(timeout=timedelta(seconds=PATIENCE))
    results = {}
    Process(groups[rank // 2], 2, results).run_all()
    Process(None, 4, results).run_all()
    run_in_other_groups(rank, groups[rank // 2], across[rank % 2], alone[rank], results)
    dist.barrier()
    fail_in_pairs(rank, impatient[rank // 2], results)
    dist.barrier()
    end_in_the_group_of_all(rank, impatient_group, results, lambda: torch.save(results, f"{folder}/{rank}.pt"))
    # Exit without shutting down the groups: some have failed.
    os._exit(0)


if __name__ == "__main__":
    run_process(int(sys.argv[1]), sys.argv[-1])
