"""orthogonal_filter and its modules with solver="parallel" and "auto", in every way a user of PyTorch can call them.

The judge is the sequential recurrence in float64. The backends are plain torch and the CPU's sweep kernels.
"""

import copy
import itertools
import math
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from support.numerics import assert_as_exact_as_eager, hostile_layouts, saved_tensors
from support.op_calls import OpCalls
from support.pairwise import name_of, pairwise
from torch import Tensor

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import nn
from lcw_ops.bench.parallel_depth import regions
from lcw_ops.ops.library import get_overload
from lcw_ops.ops.parallel_depth import crossover, op
from lcw_ops.ops.parallel_depth.solver import record_solves

NAMES = ["h0", "weight", "bias", "alpha", "beta", "inputs"]
DID_NOT_CONVERGE = "parallel solver did not converge"

# The solver warns if it does not converge. In tests without such a case the warning is an error.
pytestmark = [pytest.mark.usefixtures("on_the_cpu", "one_thread"), pytest.mark.filterwarnings("error::RuntimeWarning")]


@pytest.fixture
def on_the_cpu(device):
    if device.type != "cpu":
        pytest.skip("plain torch and the CPU's kernels")


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    with lcw_ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def on_cpp():
    with lcw_ops.use_backend("cpp"):
        yield


def make_filter(kind: str, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if kind == "dense":
        return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q.to(dtype)
    return {"permutation": torch.randperm, "identity": torch.arange}.get(kind, lambda n: torch.arange(n).roll(1))(width)


def make_arguments(
    rows, width, steps, c=1.0, tied=False, bias="per layer", inputs=True, dtype=torch.float32
) -> dict[str, Tensor]:
    """Scaled like a net in training: beta about c / steps, alpha = 1 - beta. An argument that is None is left out."""
    beta = c * (0.5 + torch.rand(steps, dtype=dtype)) / max(steps, 1)
    shapes = {"shared": (width,), "per layer": (steps, width)}
    arguments = {
        "h0": torch.randn(rows, width, dtype=dtype),
        "weight": torch.randn(*(() if tied else (steps,)), width, width, dtype=dtype) / max(width, 1) ** 0.5,
        "alpha": 1 - beta,
        "beta": beta,
    }
    if bias is not None:
        arguments["bias"] = torch.randn(shapes[bias], dtype=dtype)
    if inputs:
        arguments["inputs"] = torch.randn(steps, rows, width, dtype=dtype)
    return arguments


def run(arguments: dict, filter: Tensor, **options) -> Tensor:
    return F.orthogonal_filter(**{"bias": None, **arguments}, filter=filter, **options)


def in_parallel(arguments: dict, filter: Tensor, **options) -> Tensor:
    return run(arguments, filter, solver="parallel", **options)


def with_gradients(function, arguments: dict, filter: Tensor, grad_output: Tensor | None = None, **options) -> dict:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    output = function(leaves, filter, **options)
    grad_output = torch.ones_like(output) if grad_output is None else grad_output.to(output.dtype)
    gradients = torch.autograd.grad(output, leaves.values(), grad_output, materialize_grads=True)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def in_float64(arguments: dict, filter: Tensor) -> tuple[dict, Tensor]:
    wide = {name: tensor.detach().double() for name, tensor in arguments.items()}
    return wide, filter.double() if filter.is_floating_point() else filter


def redraw(arguments: dict) -> dict:
    return {name: torch.randn_like(arguments[name]) for name in ("h0", "inputs") if name in arguments}


def results_of_three(arguments, filter, grad_output=None, **options):
    """Result and gradients of the parallel solver, and of sequential torch in the arguments' dtype and in float64."""
    sequential = {name: value for name, value in options.items() if name not in ("window", "tolerance")}
    if grad_output is None:
        shape = arguments["h0"].shape
        steps = len(arguments["alpha"])
        grad_output = torch.randn((steps + 1, *shape) if options.get("return_states") else shape)
    actual = with_gradients(in_parallel, arguments, filter, grad_output, **options)
    with lcw_ops.use_backend("reference"):
        eager = with_gradients(run, arguments, filter, grad_output, **sequential)
    with lcw_ops.use_backend("cpp"):
        exact = with_gradients(run, *in_float64(arguments, filter), grad_output, **sequential)
    return {name: (actual[name], eager[name], exact[name]) for name in actual}


def assert_matches_the_sequence(arguments, filter, draws=1, **options):
    """Errors are within twice eager's. Results of few numbers are judged over several draws of states and inputs."""
    draws = [results_of_three(arguments, filter, **options)] + [
        results_of_three({**arguments, **redraw(arguments)}, filter, **options) for _ in range(draws - 1)
    ]
    for name in draws[0]:
        columns = zip(*(draw[name] for draw in draws), strict=True)
        assert_as_exact_as_eager(name, *(torch.stack(column) for column in columns))


# ---- Results and gradients -------------------------------------------------------------------------------------------

ACTIVATIONS = ["tanh", "relu", "sigmoid", "identity"]
FILTERS = ["permutation", "identity", "cyclic", "dense"]
BIASES = [None, "shared", "per layer"]


def is_countable(steps, tied, inputs, **_):
    """For one layer with shared arguments only the inputs give the number of steps."""
    return inputs or not (tied and steps == 1)


# Every pair of an activation and a filter meets every other choice.
CASES = pairwise(
    is_countable,
    kind=list(itertools.product(ACTIVATIONS, FILTERS)),
    steps=[1, 2, 7, 100],
    size=[(8, 8), (8, 9), (8, 16), (1, 64)],
    c=[1.0, 0.5, 3.0, 10.0],
    bias=BIASES,
    tied=[True, False],
    inputs=[True, False],
    return_states=[True, False],
)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_kind_matches_the_sequence(case, backend):
    (activation, filter_kind), (rows, width), steps, c = case["kind"], case["size"], case["steps"], case["c"]
    arguments = make_arguments(rows, width, steps, c, case["tied"], case["bias"], case["inputs"])
    with warnings.catch_warnings():
        if c == 10.0 or (c == 3.0 and case["tied"]):
            # With so large a c, 100 layers in one window may take too many sweeps. Only the result is judged.
            warnings.filterwarnings("ignore", f".*{DID_NOT_CONVERGE}")
        options = {"activation": activation, "return_states": case["return_states"]}
        assert_matches_the_sequence(arguments, make_filter(filter_kind, width), 4 if steps < 100 else 2, **options)


def keep_off_the_kink(arguments, filter):
    """Shift the inputs so that no pre-activation is so near 0 that rounding decides the slope of ReLU."""
    margin, (wide, filter) = 1e-4, in_float64(arguments, filter)
    state = wide["h0"]
    for l, weight in enumerate(wide["weight"]):
        pre = state @ weight.mT + wide["bias"][l] + wide["inputs"][l]
        shift = torch.where(pre.abs() < margin, 2 * margin * pre.sign(), 0.0)
        arguments["inputs"][l] += shift
        filtered = state @ filter.mT if filter.dim() == 2 else state[:, filter]
        state = wide["alpha"][l] * filtered + wide["beta"][l] * (pre + shift).relu()
    return arguments


@pytest.mark.parametrize(
    ("activation", "filter_kind", "c", "steps", "rows", "width", "options"),
    [
        ("tanh", "dense", 1.0, 2000, 8, 16, {"return_states": True}),
        ("relu", "dense", 3.0, 2000, 8, 8, {}),
        ("sigmoid", "cyclic", 10.0, 1000, 8, 64, {}),
        ("identity", "permutation", 3.0, 500, 1, 128, {"window": 100}),
        ("tanh", "identity", 0.5, 2000, 8, 8, {"window": 2000}),
        ("tanh", "dense", 10.0, 2000, 8, 16, {"window": 50}),
    ],
)
@pytest.mark.usefixtures("on_cpp")
def test_deep_nets_match_the_sequence(activation, filter_kind, c, steps, rows, width, options):
    filter = make_filter(filter_kind, width)
    arguments = make_arguments(rows, width, steps, c)
    if activation == "relu":
        arguments = keep_off_the_kink(arguments, filter)
    assert_matches_the_sequence(arguments, filter, activation=activation, **options)


@pytest.mark.parametrize("filter_kind", ["dense", "cyclic"])
def test_fifty_thousand_layers_are_as_exact_as_one_after_the_other(filter_kind):
    arguments = make_arguments(4, 8, 50_000, inputs=False)
    filter = make_filter(filter_kind, 8)
    with lcw_ops.use_backend("cpp"):
        with record_solves() as solves:
            actual = in_parallel(arguments, filter)
        assert all(solve.sweeps for solve in solves)
        in_sequence = run(arguments, filter)
        exact = run(*in_float64(arguments, filter))
    errors = [(output.double() - exact).abs().max().item() for output in (actual, in_sequence)]
    print(f"{filter_kind}: largest error in parallel {errors[0]:.2e}, one layer after the other {errors[1]:.2e}")
    assert_as_exact_as_eager(filter_kind, actual, in_sequence, exact)


@pytest.mark.parametrize("filter_kind", FILTERS)
@pytest.mark.parametrize("tied", [False, True])
def test_float64_keeps_its_precision(filter_kind, tied, backend):
    filter = make_filter(filter_kind, 9, torch.float64)
    arguments = make_arguments(4, 9, 300, tied=tied, dtype=torch.float64)
    grad_output = torch.randn(301, 4, 9, dtype=torch.float64)
    actual = with_gradients(in_parallel, arguments, filter, grad_output, return_states=True)
    with lcw_ops.use_backend("cpp"):
        expected = with_gradients(run, arguments, filter, grad_output, return_states=True)
    for name, tensor in expected.items():
        # 300 layers of rounding on either side; the gradient of a shared weight is a sum of 300 x 4 terms.
        tolerance = 300 * torch.finfo(torch.float64).eps * tensor.abs().max().item()
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_the_result_is_as_good_as_was_asked_for(tolerance, backend):
    arguments = make_arguments(4, 16, 500, c=5.0, dtype=torch.float64)
    filter = make_filter("dense", 16, torch.float64)
    actual = in_parallel(arguments, filter, tolerance=tolerance, window=500, return_states=True)
    error = ((actual - run(arguments, filter, return_states=True)).abs().amax(-1) / actual.abs().amax(-1)).max()
    assert error <= 2 * tolerance
    if tolerance == 1e-3:
        assert error > 1e-9, "the tolerance saves no sweep"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filter_kind", ["dense", "permutation"])
@pytest.mark.parametrize("tied", [False, True])
def test_sixteen_bits_have_float32_states(dtype, filter_kind, tied, backend):
    """Results are right to within their rounding, as in the sequential op. Gradients have their arguments' dtype."""
    filter = make_filter(filter_kind, 16)
    arguments = make_arguments(4, 16, 100, tied=tied)
    arguments = {name: t if name in ("alpha", "beta") else t.to(dtype) for name, t in arguments.items()}
    for name, three in results_of_three(arguments, filter, return_states=True).items():
        assert three[0].dtype == arguments.get(name, arguments["h0"]).dtype
        assert_as_exact_as_eager(name, *three)


@pytest.mark.parametrize("window", [1, 7, 8, 50, 99, 100, 105, 2**63 - 1])
@pytest.mark.parametrize(("filter_kind", "return_states"), [("dense", True), ("cyclic", False)])
def test_every_window_matches_the_sequence(window, filter_kind, return_states, backend):
    arguments, filter = make_arguments(8, 8, 50), make_filter(filter_kind, 8)
    assert_matches_the_sequence(arguments, filter, 3, window=window, return_states=return_states)


@pytest.mark.parametrize("window", [8, 64])
def test_many_windows_do_not_drift(window):
    """States enter and leave the filter's basis once per window, with the same error every time."""
    arguments, filter = make_arguments(8, 8, 8000, inputs=False), make_filter("dense", 8)
    with lcw_ops.use_backend("cpp"):
        results = [
            with_gradients(call, *given, return_states=False, **options)
            for call, given, options in (
                (in_parallel, (arguments, filter), {"window": window}),
                (run, (arguments, filter), {}),
                (run, in_float64(arguments, filter), {}),
            )
        ]
    for name in ("output", "h0"):
        assert_as_exact_as_eager(name, *(result[name] for result in results))


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_shared_gradients_of_one_sign_over_many_samples(activation):
    """An RNN's weight gradient sums over all samples and steps, and float32 loses accuracy in sums that only grow."""
    rows, width, steps = 1024, 8, 128
    arguments = {
        "h0": torch.rand(rows, width),
        "weight": torch.rand(width, width) / width,
        "bias": torch.rand(width),
        "alpha": torch.full((steps,), 0.99),
        "beta": torch.full((steps,), 0.01),
        "inputs": torch.rand(steps, rows, width),
    }
    grad_output, filter = torch.rand(steps + 1, rows, width), torch.arange(width)
    with lcw_ops.use_backend("cpp"):
        three = results_of_three(arguments, filter, grad_output, activation=activation, return_states=True)
    for name, results in three.items():
        assert_as_exact_as_eager(name, *results)


@pytest.mark.parametrize("count", [1, 3])
def test_same_bits_for_the_same_number_of_threads(count, backend):
    arguments, filter = make_arguments(3, 16, 200), make_filter("permutation", 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        first, second = (with_gradients(in_parallel, arguments, filter) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("window", [1, 20, None])
def test_the_gradient_of_a_shared_sixteen_bit_weight_is_rounded_once(window, backend):
    """The share of one layer in this gradient is too small for float16. The sum over all layers is not."""
    arguments, filter = make_arguments(4, 8, 400, tied=True, inputs=False), make_filter("identity", 8)
    arguments = {name: t if name in ("alpha", "beta") else t.half() for name, t in arguments.items()}
    spacing = 2.0**-24  # of the smallest numbers in float16
    wide, grad_output = in_float64(arguments, filter)[0], torch.full((4, 8), 32 * spacing)
    with lcw_ops.use_backend("cpp"):
        shares = with_gradients(run, {**wide, "weight": wide["weight"].expand(400, 8, 8)}, filter, grad_output)
    exact = shares["weight"].sum(0)
    assert shares["weight"].abs().max() < spacing / 2 < 16 * spacing < exact.abs().max()
    actual = with_gradients(in_parallel, arguments, filter, grad_output, window=window)["weight"]
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.double(), exact, rtol=2**-11, atol=0.51 * spacing)


# ---- Solves that do not converge -------------------------------------------------------------------------------------


def tied_net(steps=120, scale=1.0):
    """beta = 1 / sqrt(steps) and one weight: every layer pulls in the same direction."""
    arguments = make_arguments(4, 8, steps, tied=True, dtype=torch.float64)
    arguments["weight"] *= scale
    arguments["beta"] = torch.full((1,), steps**-0.5, dtype=torch.float64)
    arguments["alpha"] = 1 - arguments["beta"]
    return arguments


def warnings_of(function) -> tuple[object, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


@pytest.mark.parametrize("window", [None, 120])
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("filter_kind", ["identity", "dense"])
def test_a_solve_that_does_not_converge_ends_right_and_warns(window, scale, filter_kind, backend):
    arguments, filter = tied_net(scale=scale), make_filter(filter_kind, 8, torch.float64)
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    with record_solves() as solves:
        output, messages = warnings_of(lambda: in_parallel(leaves, filter, window=window, return_states=True))
    given_up = [solve for solve in solves if not solve.converged]
    assert len(messages) == bool(given_up)
    if scale == 10.0 or filter_kind == "identity":
        assert given_up
    for message in messages:
        assert message.startswith("orthogonal_filter: the " + DID_NOT_CONVERGE)
        assert "forward" in message
        assert 'solver="sequential"' in message
    grad_output = torch.randn_like(output)
    gradients, messages = warnings_of(lambda: torch.autograd.grad(output, leaves.values(), grad_output))
    assert all(DID_NOT_CONVERGE in message for message in messages)
    expected = with_gradients(run, arguments, filter, grad_output, return_states=True)
    for name, actual in zip(expected, [output, *gradients], strict=True):
        # A chaotic net magnifies the rounding of either solver.
        error = (actual - expected[name]).norm() / expected[name].norm()
        assert error < (1e-10 if scale == 1.0 else 1e-6), name


@pytest.mark.parametrize("window", [None, 120])
def test_each_pass_warns_once(window, backend):
    arguments = {name: tensor.requires_grad_() for name, tensor in tied_net(scale=10.0).items()}
    output, messages = warnings_of(lambda: in_parallel(arguments, make_filter("identity", 8), window=window))
    assert len(messages) == 1
    _, messages = warnings_of(output.sum().backward)
    assert len(messages) == 1
    assert "backward" in messages[0]


def test_a_warning_may_be_an_error(backend):
    """The RuntimeWarning is raised, and the results of the interrupted call do not disturb the next call."""
    arguments, filter = tied_net(scale=10.0), make_filter("identity", 8)
    with pytest.raises(RuntimeWarning, match=DID_NOT_CONVERGE):
        in_parallel(arguments, filter)
    leaf = arguments["h0"].requires_grad_()
    output, _ = warnings_of(lambda: in_parallel(arguments, filter))
    with pytest.raises(RuntimeWarning, match=DID_NOT_CONVERGE):
        output.sum().backward()
    assert leaf.grad is None
    small = make_arguments(2, 4, 10)
    assert in_parallel(small, make_filter("identity", 4)).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("where", ["h0", "inputs", "weight", "beta", "grad_output"])
@pytest.mark.parametrize(
    ("filter_kind", "activation"), [("dense", "tanh"), ("permutation", "tanh"), ("permutation", "identity")]
)
def test_non_finite_values_are_where_the_sequence_has_them(bad, where, filter_kind, activation, backend):
    """They are in the same rows, layers and gradients. Rows that they do not reach stay as exact as before."""
    arguments, filter = make_arguments(3, 5, 30, dtype=torch.float64), make_filter(filter_kind, 5, torch.float64)
    grad_output = torch.randn(31, 3, 5, dtype=torch.float64)
    indices = {"h0": (1, 2), "inputs": (11, 1, 2), "weight": (11, 2, 2), "beta": (11,), "grad_output": (20, 1, 2)}
    (grad_output if where == "grad_output" else arguments[where])[indices[where]] = bad
    options = {"activation": activation, "return_states": True}
    actual, messages = warnings_of(
        lambda: with_gradients(in_parallel, arguments, filter, grad_output, window=20, **options)
    )
    with lcw_ops.use_backend("cpp"):
        expected = with_gradients(run, arguments, filter, grad_output, **options)
    # tanh maps an infinite input to 1, so an infinite argument may leave all results finite.
    assert bool(messages) == any(not tensor.isfinite().all() for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-11, atol=1e-12, equal_nan=True, msg=name)


def test_overflow_is_the_sequences(backend):
    """alpha = 2 for 200 layers overflows float32; rows that start from zero stay there."""
    h0 = torch.randn(2, 4)
    h0[1] = 0.0
    weight = torch.randn(200, 4, 4)
    filter = make_filter("cyclic", 4)
    arguments = {"h0": h0, "weight": weight, "alpha": 2.0, "beta": 0.01}
    actual, messages = warnings_of(lambda: in_parallel(arguments, filter, return_states=True))
    assert len(messages) == 1
    expected = run(arguments, filter, return_states=True)
    assert not expected[-1, 0].isfinite().any()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0, equal_nan=True)


# ---- Layouts and empty sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "filter"])
@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "expanded"])
@pytest.mark.parametrize("filter_kind", ["dense", "permutation"])
def test_hostile_strides_of_every_argument(name, layout, filter_kind, backend):
    arguments, filter = make_arguments(4, 9, 12), make_filter(filter_kind, 9)
    given = filter if name == "filter" else arguments[name]
    if layout == "expanded":
        if name == "filter":
            layout = "strided"
        else:
            given = arguments[name] = given[:1].contiguous().expand_as(given)
    layouts = {"expanded": given, **hostile_layouts(given)} if given.is_floating_point() else {}
    if not layouts:
        layouts = {"strided": given.repeat_interleave(2)[::2]}
    hostile = layouts.get(layout, layouts["strided"])
    assert not hostile.is_contiguous() or layout == "expanded" or name in ("alpha", "beta", "filter")
    expected = with_gradients(in_parallel, {n: t.contiguous() for n, t in arguments.items()}, filter)
    if name == "filter":
        filter = hostile
    else:
        arguments[name] = hostile
    actual = with_gradients(in_parallel, arguments, filter)
    for result in expected:
        torch.testing.assert_close(actual[result], expected[result], rtol=1e-6, atol=1e-6, msg=result)


@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "expanded"])
@pytest.mark.parametrize("return_states", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_hostile_strides_of_grad_output(layout, return_states, window, backend):
    shape = (13, 4, 9) if return_states else (4, 9)
    layouts = {"expanded": torch.randn(()).expand(shape), **hostile_layouts(torch.randn(shape))}
    grad_output = layouts[layout]
    filter = make_filter("dense", 9)
    kept = grad_output.clone()
    options = {"return_states": return_states, "window": window}
    arguments = make_arguments(4, 9, 12)
    actual = with_gradients(in_parallel, arguments, filter, grad_output, **options)
    expected = with_gradients(in_parallel, arguments, filter, kept.contiguous(), **options)
    assert torch.equal(grad_output, kept)
    for result in expected:
        torch.testing.assert_close(actual[result], expected[result], rtol=1e-6, atol=1e-6, msg=result)


@pytest.mark.parametrize(("rows", "width", "steps"), [(0, 4, 9), (3, 0, 9), (3, 4, 0), (0, 0, 0), (1, 1, 1), (1, 1, 9)])
@pytest.mark.parametrize("filter_kind", ["dense", "permutation"])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 8, "return_states": True}, {"return_states": True}])
def test_empty_and_single_sizes(rows, width, steps, filter_kind, options, backend):
    arguments, filter = make_arguments(rows, width, steps), make_filter(filter_kind, width)
    actual = with_gradients(in_parallel, arguments, filter, **options)
    with lcw_ops.use_backend("reference"):
        options.pop("window", None)
        expected = with_gradients(run, arguments, filter, **options)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6)
    if not steps and rows * width and not options:
        assert in_parallel(arguments, filter).data_ptr() != arguments["h0"].data_ptr()


def test_expanded_weight_gets_the_summed_gradient(backend):
    arguments, filter = make_arguments(4, 6, 20, tied=True), make_filter("dense", 6)
    weight = arguments["weight"].requires_grad_()
    outputs = [in_parallel({**arguments, "weight": given}, filter) for given in (weight, weight.expand(20, 6, 6))]
    gradients = [torch.autograd.grad(output.sum(), weight)[0] for output in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needed", [*([name] for name in NAMES), ["h0", "bias"], ["weight", "beta"]])
@pytest.mark.parametrize("window", [None, 8])
def test_only_the_gradients_asked_for(needed, window, backend):
    arguments, filter = make_arguments(4, 6, 20), make_filter("dense", 6)
    full = with_gradients(in_parallel, arguments, filter, window=window)
    leaves = {name: tensor.requires_grad_(name in needed) for name, tensor in arguments.items()}
    in_parallel(leaves, filter, window=window).sum().backward()
    for name, tensor in leaves.items():
        if name in needed:
            torch.testing.assert_close(tensor.grad, full[name])
        else:
            assert tensor.grad is None


# ---- Saved tensors ---------------------------------------------------------------------------------------------------


def kept_beside(arguments, filter, **options) -> tuple[Tensor, int]:
    """The result, and how many numbers are saved besides those of the arguments."""
    output, saved = saved_tensors(lambda: in_parallel(arguments, filter, **options))
    given = {tensor.untyped_storage().data_ptr() for tensor in (*arguments.values(), filter)}
    return output, sum(tensor.numel() for tensor in saved if tensor.untyped_storage().data_ptr() not in given)


@pytest.mark.parametrize("filter_kind", ["dense", "permutation"])
def test_windows_keep_one_state_each(filter_kind, backend):
    arguments = {name: tensor.requires_grad_() for name, tensor in make_arguments(4, 6, 1000).items()}
    filter = make_filter(filter_kind, 6)
    numbers = 4 * 6
    assert kept_beside(arguments, filter, window=100)[1] == 10 * numbers
    assert kept_beside(arguments, filter, window=300)[1] == 4 * numbers
    assert kept_beside(arguments, filter)[1] == 1001 * numbers
    # States that are the result are not saved twice.
    output, kept = kept_beside(arguments, filter, return_states=True)
    assert kept == output.numel() == 1001 * numbers


def test_nothing_is_kept_without_a_gradient(backend):
    arguments, filter = make_arguments(4, 6, 20), make_filter("dense", 6)
    expected = in_parallel({**arguments, "h0": arguments["h0"].clone().requires_grad_()}, filter)
    assert expected.requires_grad
    output, kept = kept_beside(arguments, filter)
    assert kept == 0
    assert torch.equal(output, expected)
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    with torch.no_grad():
        output, kept = kept_beside(leaves, filter)
    assert (kept, output.requires_grad) == (0, False)
    assert torch.equal(output, expected)
    with torch.inference_mode():
        output = in_parallel(leaves, filter.clone())
    assert output.is_inference()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_without_a_gradient_the_op_returns_the_result_alone(window, requires_grad, backend):
    arguments = {name: tensor.requires_grad_(requires_grad) for name, tensor in make_arguments(4, 6, 20).items()}
    filter = make_filter("dense", 6)
    with torch.set_grad_enabled(not requires_grad), OpCalls() as inside:
        output = in_parallel(arguments, filter, window=window)
    ((_, returned),) = inside.calls
    assert sum(tensor.numel() for tensor in returned) == output.numel()


def test_the_op_keeps_nothing_when_told_so(backend):
    h0, weight, one = torch.randn(2, 4), torch.randn(20, 4, 4), torch.ones(1)
    arguments = (h0, weight, None, torch.arange(4), one, one / 20, None, 20, "tanh", 0.0, 0)
    counts = [len(get_overload(op.NAME, backend)(*arguments, states, keeps)[1]) for states, keeps in
              itertools.product((False, True), repeat=2)]  # fmt: skip
    assert counts == [0, 21, 0, 0]


def test_states_changed_in_place_before_backward(backend):
    """The gradient is never wrong: either torch raises, or backward has states of its own."""
    arguments, filter = make_arguments(4, 6, 20), make_filter("permutation", 6)
    weight = arguments["weight"].requires_grad_()
    states = in_parallel(arguments, filter, return_states=True)
    states.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(states.sum(), weight)
    expected = torch.autograd.grad(2 * in_parallel(arguments, filter, window=8, return_states=True).sum(), weight)
    states = in_parallel(arguments, filter, window=8, return_states=True).mul_(2)
    torch.testing.assert_close(torch.autograd.grad(states.sum(), weight), expected)


def test_backward_uses_the_backend_of_its_forward():
    arguments, filter = make_arguments(4, 6, 20), make_filter("permutation", 6)
    weight = arguments["weight"].requires_grad_()
    with lcw_ops.use_backend("cpp"):
        expected = torch.autograd.grad(in_parallel(arguments, filter).sum(), weight)
        output = in_parallel(arguments, filter)
    with lcw_ops.use_backend("triton"):
        assert torch.equal(torch.autograd.grad(output.sum(), weight)[0], expected[0])


@pytest.mark.parametrize("window", [4, 20])
def test_layers_left_to_the_sequence_run_on_the_backend_of_the_forward(window, backend):
    """They are all layers in windows too small to sweep, and the last three in windows of 20."""
    arguments, filter = make_arguments(4, 6, 23), make_filter("permutation", 6)
    arguments["weight"].requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = in_parallel(arguments, filter, window=window)
        with lcw_ops.use_backend("reference" if backend == "cpp" else "cpp"):
            output.sum().backward()
    compiled = {"lcw_ops::orthogonal_filter", "lcw_ops::orthogonal_filter_backward"}
    called = {event.key for event in profile.key_averages()} & compiled
    assert called == (compiled if backend == "cpp" else set())


# ---- Derivatives of every kind ---------------------------------------------------------------------------------------


def small(tied=False, bias="per layer", inputs=True):
    return make_arguments(2, 3, 3, tied=tied, bias=bias, inputs=inputs, dtype=torch.float64)


@pytest.mark.parametrize(
    ("backend", "filter_kind", "return_states", "window"),
    [
        ("cpp", "dense", False, None),
        ("cpp", "permutation", True, 8),
        ("reference", "dense", False, 8),
        ("reference", "permutation", True, None),
    ],
    indirect=["backend"],
)
def test_gradcheck_and_gradgradcheck(backend, filter_kind, return_states, window):
    """First and second derivatives, forward mode included, against finite differences."""
    filter = make_filter(filter_kind, 3, torch.float64)
    arguments = {name: tensor.requires_grad_() for name, tensor in small(tied=return_states).items()}

    def function(*tensors):
        given = dict(zip(arguments, tensors, strict=True))
        return in_parallel(given, filter, return_states=return_states, window=window, tolerance=1e-13)

    leaves = tuple(arguments.values())
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("batched", [*NAMES, "filter", "h0 and weight"])
def test_vmap_over_each_argument(batched, backend):
    arguments, filter = make_arguments(3, 5, 10, dtype=torch.float64), make_filter("permutation", 5)
    given = {**arguments, "filter": filter}
    names = batched.split(" and ")
    stacks = []
    for name in names:
        tensor = given[name]
        others = [tensor[torch.randperm(5)] if name == "filter" else tensor * factor for factor in (0.5, -1.0)]
        stacks.append(torch.stack([tensor, *others], dim=-1))

    def function(*tensors):
        call = {**given, **dict(zip(names, tensors, strict=True))}
        return in_parallel({name: call[name] for name in arguments}, call["filter"], return_states=True)

    actual = torch.vmap(function, in_dims=-1)(*stacks)
    expected = torch.stack([function(*tensors) for tensors in zip(*(s.unbind(-1) for s in stacks), strict=True)])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"window": 8}, {"return_states": True}])
def test_per_sample_gradients(options, backend):
    arguments, filter = make_arguments(3, 5, 10, inputs=False, dtype=torch.float64), make_filter("dense", 5).double()

    def loss(weight, sample):
        call = {**arguments, "weight": weight, "h0": sample.unsqueeze(0)}
        return in_parallel(call, filter, **options).square().sum()

    actual = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(arguments["weight"], arguments["h0"])
    for sample, gradient in zip(arguments["h0"], actual, strict=True):
        leaf = arguments["weight"].clone().requires_grad_()
        loss(leaf, sample).backward()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-11, atol=1e-13)


def test_hessian_and_jacobians_through_torch_func(backend):
    arguments, filter = make_arguments(1, 3, 6, dtype=torch.float64), make_filter("dense", 3).double()

    def function(h0, call=in_parallel):
        return call({**arguments, "h0": h0.unsqueeze(0)}, filter).squeeze(0)

    h0 = arguments["h0"][0]
    backward, forward = torch.func.jacrev(function)(h0), torch.func.jacfwd(function)(h0)
    torch.testing.assert_close(backward, forward, rtol=1e-11, atol=1e-13)
    actual = torch.func.hessian(lambda h: function(h).sum())(h0)
    expected = torch.func.hessian(lambda h: function(h, run).sum())(h0)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("on_cpp")
def test_compiles_into_one_graph_with_dynamic_shapes():
    """Forward and backward, also with solver="auto", for which the value of beta is unknown during tracing."""
    filter = make_filter("dense", 8)

    def loss(h0, weight, beta):
        call = {"h0": h0, "weight": weight, "beta": beta}
        states = in_parallel(call, filter, return_states=True)
        return states.square().sum() + run(call, filter, solver="auto").sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, steps in ((4, 20), (7, 11)):
        made = make_arguments(rows, 8, steps)
        leaves = [made[name].requires_grad_() for name in ("h0", "weight", "beta")]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        actual = torch.autograd.grad(compiled(*leaves), leaves)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", [[0, 1, 2, 2], [0, 1, 2, 9], [0, 0, 0, 0], [-1, 0, 1, 2]])
def test_a_wrong_permutation_is_refused_even_inside_torch_compile(wrong):
    compiled = torch.compile(F.orthogonal_filter, fullgraph=True, backend="eager")
    h0, weight = torch.randn(2, 4), torch.randn(9, 4, 4)
    with lcw_ops.use_backend("cpp"), pytest.raises(RuntimeError, match="permutation"):
        compiled(h0, weight, None, torch.tensor(wrong), solver="parallel")


@pytest.mark.parametrize(
    ("backend", "return_states", "window", "filter_kind"),
    [("cpp", False, 0, "dense"), ("reference", True, 8, "permutation")],
    indirect=["backend"],
)
def test_opcheck(backend, return_states, window, filter_kind):
    made = make_arguments(3, 5, 9)
    shared = (made["weight"], made["bias"], make_filter(filter_kind, 5), made["alpha"], made["beta"], made["inputs"])
    options = (9, "tanh", 0.0, window)
    forward, backward = get_overload(op.NAME, backend), get_overload(op.BACKWARD, backend)
    torch.library.opcheck(forward, (made["h0"], *shared, *options, return_states, True))
    torch.library.opcheck(forward, (made["h0"], *shared, *options, return_states, False))
    output, _ = forward(made["h0"], *shared, *options, return_states, True)
    _, checkpoints = forward(made["h0"], *shared, *options, False, True)
    for needs in (True, False):
        torch.library.opcheck(backward, (torch.randn_like(output), checkpoints, *shared, *options, *[needs] * 4))


def test_the_op_itself_checks_what_it_is_given(backend):
    """An op that is called directly, with arguments that do not fit, raises an error instead of guessing."""
    h0, weight, one, eye = torch.randn(2, 4), torch.randn(9, 4, 4), torch.ones(1), torch.eye(4)
    right = (h0, weight, None, eye, one, one / 900, None, 9, "tanh", 0.0, 0, False, False)
    forward, backward = get_overload(op.NAME, backend), get_overload(op.BACKWARD, backend)
    forward(*right)
    for place, wrong in (
        (0, torch.randn(3, 2, 4)), (1, weight.double()), (1, torch.randn(9, 5, 4)), (2, torch.randn(8, 4)),
        (3, eye.expand(9, 4, 4)), (3, torch.eye(5)), (4, torch.ones(2)), (6, torch.randn(9, 2, 3)), (7, 8), (8, "gelu"),
        (9, -1.0), (9, math.nan), (10, -3),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match="orthogonal_filter"):
            forward(*right[:place], wrong, *right[place + 1 :])
    for checkpoints in (torch.randn(9, 2, 4), torch.randn(10, 2, 5), torch.randn(10, 2, 4).double()):
        with pytest.raises((ValueError, RuntimeError), match="orthogonal_filter"):
            backward(torch.randn(2, 4), checkpoints, *right[1:11], True, False, True, False)


# ---- Autocast, the meta device, anomaly mode -------------------------------------------------------------------------


def test_autocast_computes_in_float32(backend):
    arguments, filter = make_arguments(4, 8, 20), make_filter("dense", 8)
    half = {**arguments, "h0": arguments["h0"].bfloat16()}
    expected = in_parallel({**half, "h0": half["h0"].float()}, filter)
    with torch.autocast("cpu", torch.bfloat16):
        actual = in_parallel(half, filter)
        leaves = {name: tensor.float().requires_grad_() for name, tensor in half.items()}
        in_parallel(leaves, filter).sum().backward()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    assert {tensor.grad.dtype for tensor in leaves.values()} == {torch.float32}


@pytest.mark.parametrize("solver", ["parallel", "auto"])
def test_the_meta_device_gives_shapes(solver):
    arguments = {name: tensor.to("meta") for name, tensor in make_arguments(2, 4, 9).items()}
    for filter in (torch.eye(4, device="meta"), torch.arange(4)):
        if filter.is_meta:
            output = run(arguments, filter, solver=solver, return_states=True)
            assert (output.device.type, output.shape) == ("meta", (10, 2, 4))


def test_anomaly_mode_and_retained_graphs(backend):
    arguments, filter = make_arguments(4, 6, 20), make_filter("dense", 6)
    weight = arguments["weight"].requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        output = in_parallel(arguments, filter, window=8)
        first = torch.autograd.grad(output.sum(), weight, retain_graph=True)
        second = torch.autograd.grad(output.sum(), weight)
    assert torch.equal(first[0], second[0])


# ---- "auto" ----------------------------------------------------------------------------------------------------------


def region_of(rows, width, steps, tied, permutes, largest_c=2.0):
    device = crossover.device_key(torch.device("cpu"))
    return crossover.Region(device, permutes, tied, (steps, steps), (rows, rows), (width, width), largest_c)


def solver_taken(arguments, filter) -> str:
    with record_solves() as solves:
        output = run(arguments, filter, solver="auto")
    taken = "parallel" if solves else "sequential"
    torch.testing.assert_close(output, run(arguments, filter, solver=taken), rtol=0, atol=0, equal_nan=True)
    return taken


def test_auto_is_sequential_where_nothing_was_measured(monkeypatch):
    monkeypatch.setattr(crossover, "MEASURED", ())
    with lcw_ops.use_backend("cpp"):
        for tied, kind in itertools.product((False, True), FILTERS):
            assert solver_taken(make_arguments(3, 8, 20, tied=tied), make_filter(kind, 8)) == "sequential"


RESULTS = Path(__file__).parents[1] / "bench/results"


def unsupported(table) -> list:
    """The rows of ``table`` that do not follow from the measurements in bench/results/."""
    files = [path for path in RESULTS.glob("*.csv") if "stem" in path.read_text().partition("\n")[0].split(",")]
    assert files
    return [row for row in table if not any(row in regions(path, row.device) for path in files)]


def test_auto_follows_committed_measurements_only():
    assert unsupported(crossover.MEASURED) == []
    # No GPU has been measured.
    predicted = crossover.Region("sm_90", True, False, (50_000, 50_000), (128, 128), (64, 64), 1.0)
    assert unsupported([predicted]) == [predicted]
    for key, permutes, tied in itertools.product(("sm_80", "sm_90", "sm_100"), (False, True), (False, True)):
        assert crossover.largest_c_faster(crossover.Call(key, permutes, tied, 50_000, 128, 64)) is None


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "parallel"),
        ({"rows": 4}, "sequential"),
        ({"rows": 2}, "sequential"),
        ({"width": 7}, "sequential"),
        ({"steps": 19}, "sequential"),
        ({"steps": 21}, "sequential"),
        ({"tied": True}, "sequential"),
        ({"filter": "dense"}, "sequential"),
        ({"filter": "identity"}, "parallel"),
        ({"beta": 2.0 / 20}, "parallel"),
        ({"beta": 2.01 / 20}, "sequential"),
        ({"beta": -1.0 / 20}, "sequential"),
        ({"beta": torch.full((20,), 1.0 / 20)}, "parallel"),
        ({"beta": torch.cat((torch.full((19,), 0.01), torch.ones(1)))}, "sequential"),
        ({"beta": torch.cat((torch.full((19,), 0.01), -torch.ones(1)))}, "sequential"),
        ({"beta": torch.tensor(1.0 / 20)}, "parallel"),
        ({"beta": torch.full((20,), math.nan)}, "sequential"),
        ({"beta": None}, "parallel"),
    ],
)
def test_auto_is_parallel_in_a_measured_region(changed, expected, monkeypatch):
    monkeypatch.setattr(crossover, "MEASURED", (region_of(3, 8, 20, tied=False, permutes=True),))
    sizes = {"rows": 3, "width": 8, "steps": 20, "tied": False}
    arguments = make_arguments(**{name: changed.get(name, value) for name, value in sizes.items()})
    del arguments["alpha"], arguments["beta"]
    filter = make_filter(changed.get("filter", "permutation"), arguments["h0"].shape[1])
    with lcw_ops.use_backend("cpp"):
        assert solver_taken({**arguments, "beta": changed.get("beta", 1 / 20)}, filter) == expected


def test_auto_leaves_filters_per_layer_to_the_sequence(monkeypatch):
    monkeypatch.setattr(crossover, "MEASURED", (region_of(3, 8, 20, tied=False, permutes=False),))
    arguments = make_arguments(3, 8, 20)
    filters = make_filter("dense", 8).expand(20, 8, 8)
    with lcw_ops.use_backend("cpp"):
        expected = run(arguments, filters)
        assert torch.equal(run(arguments, filters, solver="auto"), expected)
        # Options of the parallel solver apply only if it is chosen.
        assert torch.equal(run(arguments, filters, solver="auto", tolerance=1e-3, window=5), expected)


# ---- Modules ---------------------------------------------------------------------------------------------------------


def mlp(**options):
    return nn.OrthogonalFilterMLP(3, 8, 20, 2, **options)


def rnn(**options):
    return nn.OrthogonalFilterRNN(3, 8, length=20, **options)


@pytest.mark.parametrize("filter", ["haar", "cyclic", "permutation", "identity"])
@pytest.mark.parametrize("options", [{}, {"tolerance": 1e-7}, {"window": 9}])
def test_modules_solve_in_parallel(filter, options, backend):
    for make, x in ((mlp, torch.randn(5, 3)), (rnn, torch.randn(20, 5, 3))):
        sequential, parallel = make(filter=filter), make(filter=filter, solver="parallel", **options)
        parallel.load_state_dict(sequential.state_dict())
        with record_solves() as solves:
            outputs = [model(x)[0] if make is rnn else model(x) for model in (parallel, sequential)]
            for output in outputs:
                output.square().sum().backward()
        assert {solve.direction for solve in solves} == {"forward", "backward"}
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
        for (name, actual), expected in zip(parallel.named_parameters(), sequential.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("make", [mlp, rnn])
def test_modules_copy_and_pickle_with_their_solver(make, clone, backend):
    model = make(solver="parallel", tolerance=1e-6, window=9)
    x = torch.randn(20, 4, 3)
    with record_solves() as solves:
        first = model(x)
        assert solves
        second = clone(model)(x)
        assert len(solves) % 2 == 0
    for a, b in zip(*((result,) if isinstance(result, Tensor) else result for result in (first, second)), strict=True):
        assert torch.equal(a, b)
    assert "solver" not in "".join(model.state_dict())


def test_modules_pickled_before_there_were_solvers():
    model = mlp()
    state = {name: value for name, value in model.__dict__.items() if name not in ("solver", "tolerance", "window")}
    old = nn.OrthogonalFilterMLP.__new__(nn.OrthogonalFilterMLP)
    old.__setstate__(state)
    x = torch.randn(4, 3)
    assert torch.equal(old(x), model(x))
    assert (old.solver, old.tolerance, old.window) == ("sequential", None, None)


def test_repr_names_the_solver():
    assert "activation='tanh', solver='parallel', tolerance=1e-06, window=9" in repr(
        mlp(solver="parallel", tolerance=1e-6, window=9)
    )
    assert repr(rnn(solver="auto")).endswith("activation='tanh', solver='auto')")
    assert "solver" not in repr(mlp())


def test_a_parallel_module_trains(backend):
    model = mlp(solver="parallel")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(32, 3), torch.randint(2, (32,))
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "magic"}, ValueError, "solver is 'magic'; expected one of 'sequential', 'parallel', 'auto'"),
        ({"solver": None}, ValueError, "solver is None"),
        ({"tolerance": 1e-6}, ValueError, "tolerance is 1e-06.*sequential.*solver='parallel'"),
        ({"window": 10}, ValueError, "window is 10.*sequential.*solver='parallel'"),
        ({"solver": "parallel", "tolerance": 0.0}, ValueError, r"tolerance is 0\.0; expected a finite number > 0"),
        ({"solver": "parallel", "tolerance": -1e-6}, ValueError, "tolerance is -1e-06"),
        ({"solver": "parallel", "tolerance": math.nan}, ValueError, "tolerance is nan"),
        ({"solver": "parallel", "tolerance": math.inf}, ValueError, "tolerance is inf"),
        ({"solver": "parallel", "tolerance": "small"}, TypeError, "tolerance is a str"),
        ({"solver": "parallel", "tolerance": True}, TypeError, "tolerance is a bool"),
        ({"solver": "parallel", "window": 0}, ValueError, "window is 0; expected at least 1"),
        ({"solver": "parallel", "window": -8}, ValueError, "window is -8"),
        ({"solver": "parallel", "window": 2**63}, ValueError, "window is 9223372036854775808"),
        ({"solver": "parallel", "window": True}, TypeError, "window is True; expected an int"),
        ({"solver": "parallel", "window": 1.5}, TypeError, "window is 1.5; expected an int"),
        ({"solver": "auto", "window": 0}, ValueError, "window is 0"),
    ],
)
def test_bad_options_say_what_to_do(options, error, message):
    with pytest.raises(error, match=f"orthogonal_filter: {message}"):
        run(make_arguments(2, 4, 9), make_filter("cyclic", 4), **options)
    for make, name in ((mlp, "OrthogonalFilterMLP"), (rnn, "OrthogonalFilterRNN")):
        with pytest.raises(error, match=f"{name}: {message}"):
            make(**options)


def test_filters_per_layer_say_what_to_do():
    filters = make_filter("dense", 8).expand(20, 8, 8).contiguous()
    with pytest.raises(ValueError, match=r"orthogonal_filter: filter has shape \(20, 8, 8\).*solver='sequential'"):
        in_parallel(make_arguments(2, 8, 20), filters)
    with pytest.raises(ValueError, match=r"""MLP: filter has shape \(20, 8, 8\).*solver=["']sequential["']"""):
        mlp(filter=filters, solver="parallel")
    assert mlp(filter=filters, solver="auto")(torch.randn(2, 3)).shape == (2, 2)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"h0": torch.randn(4)}, ValueError, r"h0 has shape \(4,\); expected \(M, N\)"),
        (
            {"weight": torch.randn(9, 4, 4).double()},
            TypeError,
            "weight is torch.float64; expected torch.float32, as h0 is",
        ),
        ({"bias": torch.randn(8, 4)}, ValueError, "disagree on the number of steps"),
        ({"alpha": math.nan}, ValueError, "alpha is nan; expected a finite number"),
        ({"filter": torch.tensor([0, 1, 2, 2])}, ValueError, "not a permutation"),
        ({"filter": torch.eye(4).bfloat16()}, TypeError, "filter is torch.bfloat16"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'"),
        ({"segment": 0}, ValueError, "segment is 0"),
    ],
)
def test_bad_input_says_what_to_do_in_parallel_too(changed, error, message):
    call = {**make_arguments(2, 4, 9), "filter": make_filter("cyclic", 4), **changed}
    with pytest.raises(error, match=message):
        F.orthogonal_filter(**call, solver="parallel")


def test_an_explicit_request_that_cannot_be_met_raises():
    with lcw_ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*interpreter"):
        in_parallel(make_arguments(2, 4, 9), make_filter("cyclic", 4))


def test_no_step_at_all_in_windows(backend):
    """The result is the same as for an empty sequence."""
    h0, weight, filter = torch.randn(3, 8), torch.randn(8, 8), torch.arange(8).roll(1)
    options = {"inputs": torch.randn(0, 3, 8), "return_states": True, "solver": "parallel", "window": 5}
    assert torch.equal(F.orthogonal_filter(h0, weight, None, filter, None, 0.1, **options), h0.unsqueeze(0))
