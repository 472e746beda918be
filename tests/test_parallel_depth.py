"""The parts of the parallel solver against loops and matrix powers in float64: scans, bases of filters, stopping rule.

The last part checks the error of all states after each sweep, and the decisions of the stopping rule, for the nets in
``TABLE``. L is the number of layers, c = beta L, and D is the number of layers that are solved at once (a window).
"""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lcw_ops
from lcw_ops import functional as F
from lcw_ops.ops.parallel_depth import frame as frames
from lcw_ops.ops.parallel_depth import op, solver
from lcw_ops.ops.parallel_depth.solver import Convergence, record_solves
from lcw_ops.reference import parallel_depth as reference
from lcw_ops.reference.orthogonal_filter import ACTIVATIONS, activation_derivative, scale_tensors

EPS = torch.finfo(torch.float64).eps
FORMS = ["permutation", "matrix", "rotation"]

pytestmark = pytest.mark.usefixtures("on_the_cpu", "one_thread")


@pytest.fixture
def on_the_cpu(device):
    if device.type != "cpu":
        pytest.skip("plain torch and the CPU's kernels")


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    with lcw_ops.use_backend(request.param):
        yield request.param


def haar(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q


def make_rotation(width: int, radius: float = 1.0) -> Tensor:
    """Turn pairs of units by random angles; the last of an odd number of units is only scaled."""
    angle = 2 * math.pi * torch.rand((width + 1) // 2, dtype=torch.float64)
    cosine = radius * angle.cos().repeat_interleave(2)[:width]
    sine = radius * torch.stack((angle.sin(), -angle.sin()), 1).flatten()[:width]
    if width % 2:
        cosine[-1], sine[-1] = -radius, 0.0
    return torch.cat((cosine, sine))


def make_filter(form: str, width: int) -> Tensor:
    if form == "permutation":
        return torch.randperm(width)
    return haar(width) if form == "matrix" else make_rotation(width)


def as_matrix(filter: Tensor) -> Tensor:
    """The matrix entry by entry, from the module's description of the three forms."""
    if filter.dim() == 2:
        return filter.double()
    if filter.dtype == torch.int64:
        matrix = torch.zeros(len(filter), len(filter), dtype=torch.float64)
        for i, j in enumerate(filter.tolist()):
            matrix[i, j] = 1.0
        return matrix
    width = len(filter) // 2
    matrix = torch.zeros(width, width, dtype=torch.float64)
    for i in range(width):
        matrix[i, i] = filter[i]
        if i ^ 1 < width:
            matrix[i, i ^ 1] = filter[width + i]
    return matrix


# ---- A filter's three forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0, 1, 2, 3, 8, 9])
@pytest.mark.parametrize("form", FORMS)
def test_filters_are_their_matrices(form, width):
    filter, rows = make_filter(form, width), torch.randn(2, 3, width, dtype=torch.float64)
    matrix = as_matrix(filter)
    close = {"rtol": 0, "atol": 8 * (width + 1) * EPS}
    torch.testing.assert_close(reference.apply_filter(rows, filter), rows @ matrix.mT, **close)
    transposed = reference.transpose_filter(filter)
    assert (transposed.shape, transposed.dtype) == (filter.shape, filter.dtype)
    assert torch.equal(as_matrix(transposed), matrix.mT)
    assert torch.equal(as_matrix(reference.identity_like(filter)), torch.eye(width, dtype=torch.float64))
    other = reference.filter_power(filter, 3)
    composed = as_matrix(reference.compose_filters(filter, other))
    torch.testing.assert_close(composed, as_matrix(other) @ matrix, **close)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 7, 64, 100, 50_000])
@pytest.mark.parametrize("width", [1, 2, 9])
@pytest.mark.parametrize("form", FORMS)
def test_powers_of_filters(form, width, exponent):
    filter = make_filter(form, width)
    power = reference.filter_power(filter, exponent)
    expected = torch.linalg.matrix_power(as_matrix(filter), exponent)
    # Both powers stand for products, and each product has one rounding per term of its sums.
    tolerance = 0 if form == "permutation" else 4 * (exponent + 1) * width * EPS
    torch.testing.assert_close(as_matrix(power), expected, rtol=0, atol=tolerance)


def test_filters_in_float32_are_applied_in_the_states_dtype():
    rows = torch.randn(5, 7)
    for form in FORMS:
        assert reference.apply_filter(rows, make_filter(form, 7)).dtype == torch.float32
    assert reference.filter_power(haar(4).float(), 5).dtype == torch.float64


# ---- The linear scan -------------------------------------------------------------------------------------------------


def scan_in_steps(first, source, filter, alpha):
    matrix, alpha = as_matrix(filter), alpha.double().expand(len(source))
    states = [first.double()]
    for alpha_l, source_l in zip(alpha, source.double(), strict=True):
        states.append(alpha_l * states[-1] @ matrix.mT + source_l)
    return torch.stack(states)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 64, 100])
@pytest.mark.parametrize("width", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("form", FORMS)
def test_scans_are_the_recurrence(form, width, steps):
    filter = make_filter(form, width)
    first = torch.randn(3, width, dtype=torch.float64)
    source = torch.randn(steps, 3, width, dtype=torch.float64)
    per_layer = 0.9 + 0.2 * torch.rand(steps, dtype=torch.float64)
    per_layer[::5] *= -1
    for alpha in (torch.tensor([0.99], dtype=torch.float64), per_layer, torch.zeros(1, dtype=torch.float64)):
        expected = scan_in_steps(first, source, filter, alpha)
        actual = reference.linear_scan(first, source, filter, alpha)
        assert actual.shape == expected.shape
        # Both results sum D terms, each multiplied by a power of the filter, whose error grows with the exponent.
        scale = expected.abs().max() if expected.numel() else 0.0
        torch.testing.assert_close(actual, expected, rtol=0, atol=float(4 * (steps + 1) * (width + 1) * EPS * scale))


def test_scans_of_permutations_round_no_more_than_steps_would():
    first, source, alpha = torch.randn(4, 16), torch.randn(1000, 4, 16), 0.99 + 0.01 * torch.rand(1000)
    filter = torch.randperm(16)
    exact = scan_in_steps(first, source, filter, alpha)
    states = [first]
    for alpha_l, source_l in zip(alpha, source, strict=True):
        states.append(alpha_l * states[-1][:, filter] + source_l)
    in_steps = (torch.stack(states).double() - exact).abs().max()
    error = (reference.linear_scan(first, source, filter, alpha).double() - exact).abs().max()
    assert error <= 2 * in_steps + torch.finfo().eps * exact.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_passes_a_layer_with_alpha_zero(form):
    """A product of scales that ends at 0 must not turn an earlier overflow into NaN."""
    source, alpha = torch.randn(20, 2, 4, dtype=torch.float64), torch.full((20,), 0.9, dtype=torch.float64)
    alpha[9] = 0.0
    scan = reference.linear_scan(torch.randn(2, 4, dtype=torch.float64), source, make_filter(form, 4), alpha)
    torch.testing.assert_close(scan[10], source[9], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ([[1.0, -2.0]], [[1.0, -2.0]], 0.0),
        ([[1.0, -2.0]], [[1.5, -2.0]], 0.25),
        ([[1.0, -2.0], [1e-3, 0.0]], [[1.0, -2.0], [2e-3, 0.0]], 1.0),  # each row has its own scale
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0),
        ([[0.0, 0.0]], [[0.0, 1.0]], math.inf),
        ([[1e-30, 0.0]], [[1.25e-30, 0.0]], 0.25),  # the squares vanish in float32
        ([[1e30, 0.0]], [[1.25e30, 0.0]], 0.25),
        ([[math.nan, 1.0]], [[1.0, 1.0]], math.nan),
        ([[1.0, 1.0]], [[math.nan, 1.0]], math.nan),
        ([[math.inf, 1.0]], [[math.inf, 1.0]], math.nan),
        ([[math.inf, 1.0]], [[1.0, 1.0]], math.nan),
        ([[-math.inf, 1.0]], [[math.inf, 1.0]], math.nan),
        ([[1.0, 1.0]], [[math.inf, 1.0]], math.inf),
        ([[1.0, 1.0], [math.nan, 0.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 0.0], [9.0, 1.0]], math.nan),
        ([[]], [[]], 0.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_change_of_hand_made_states(new, old, expected, dtype):
    new, old = torch.tensor([new], dtype=dtype), torch.tensor([old], dtype=dtype)
    change = reference.relative_change(new, old)
    assert (change.shape, change.dtype) == ((1,), torch.float64)
    assert change.item() == pytest.approx(expected, nan_ok=True, rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_the_relative_change_of_empty_states_is_zero(shape):
    assert reference.relative_change(torch.empty(shape), torch.empty(shape)).tolist() == [0.0]


# ---- Sweeps ----------------------------------------------------------------------------------------------------------


def make_sweep(steps, rows, width, bias_dim, has_inputs, per_layer):
    options = {"dtype": torch.float64}
    return {
        "product": torch.randn(steps, rows, width, **options),
        "bias": torch.randn((steps, width)[2 - bias_dim :], **options) if bias_dim else None,
        "inputs": torch.randn(steps, rows, width, **options) if has_inputs else None,
        "alpha": torch.rand(steps if per_layer else 1, **options),
        "beta": torch.randn(steps if per_layer else 1, **options),
    }


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("bias_dim", "has_inputs", "per_layer"), [(0, True, False), (1, False, True), (2, True, True)])
@pytest.mark.parametrize(("steps", "rows", "width"), [(0, 2, 3), (1, 1, 1), (5, 5, 5), (6, 2, 5)])
def test_a_sweep_is_its_formula(activation, bias_dim, has_inputs, per_layer, steps, rows, width):
    """The sizes include equal ones: a bias with one entry per layer must not be taken for one per sample."""
    made = make_sweep(steps, rows, width, bias_dim, has_inputs, per_layer)
    alpha, beta = made["alpha"].expand(steps), made["beta"].expand(steps)
    pre = made["product"].clone()
    for l in range(steps):
        pre[l] += 0 if bias_dim == 0 else made["bias"] if bias_dim == 1 else made["bias"][l]
        pre[l] += made["inputs"][l] if has_inputs else 0
    for derivative in (False, True):
        act = activation_derivative(pre, activation) if derivative else ACTIVATIONS[activation](pre)
        product = made["product"].clone()
        reference.activate_(product, made["bias"], made["inputs"], made["beta"], activation, derivative)
        torch.testing.assert_close(product, beta[:, None, None] * act, rtol=4 * EPS, atol=4 * EPS)
    for form in FORMS:
        filter = make_filter(form, width)
        states = torch.randn(steps + 1, rows, width, dtype=torch.float64)
        before, product = states.clone(), made["product"].clone()
        change = reference.sweep_(states, made["product"], made["bias"], made["inputs"], filter, made["alpha"],
                                  made["beta"], activation)  # fmt: skip
        assert torch.equal(made["product"], product)
        assert torch.equal(states[0], before[0])
        expected = scan_in_steps(before[0], beta[:, None, None] * ACTIVATIONS[activation](pre), filter, alpha)
        torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(change, reference.relative_change(states[1:], before[1:]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [0, 1, 6])
@pytest.mark.parametrize(("has_product", "has_outside", "has_slope"), [(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1)])
def test_an_adjoint_sweep_is_its_formula(form, steps, has_product, has_outside, has_slope):
    def maybe(there):
        return torch.randn(steps, 2, 5, dtype=torch.float64) if there else None

    product, outside, slope = maybe(has_product), maybe(has_outside), maybe(has_slope)
    scaled = torch.full((steps, 2, 5), math.nan, dtype=torch.float64) if has_slope else None
    filter, alpha = make_filter(form, 5), torch.rand(steps, dtype=torch.float64)
    gradients = torch.randn(steps + 1, 2, 5, dtype=torch.float64)
    before = gradients.clone()
    change = reference.adjoint_sweep_(gradients, product, outside, filter, alpha, slope, scaled)
    expected = before.clone()
    for l in reversed(range(steps)):
        expected[l] = alpha[l] * expected[l + 1] @ as_matrix(filter).mT
        expected[l] += sum(term[l] for term in (product, outside) if term is not None)
    torch.testing.assert_close(gradients, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(change, reference.relative_change(gradients[:-1], before[:-1]))
    if has_slope:
        assert torch.equal(scaled, slope * gradients[1:])


@pytest.mark.parametrize("form", FORMS)
def test_old_contents_of_the_memory_do_not_affect_the_first_sweep(form):
    filter, one = make_filter(form, 4), torch.ones(1, dtype=torch.float64)
    states = torch.empty(9, 3, 4, dtype=torch.float64)
    assert states.isnan().all()
    states[0] = 1.0
    reference.sweep_(states, None, None, None, filter, one, one, "tanh")
    torch.testing.assert_close(states, scan_in_steps(states[0], torch.zeros_like(states[1:]), filter, one))


# ---- The basis of a dense filter -------------------------------------------------------------------------------------


def householder(width):
    normal = torch.nn.functional.normalize(torch.randn(width, 1, dtype=torch.float64), dim=0)
    return torch.eye(width, dtype=torch.float64) - 2 * normal @ normal.mT


def turned(blocks):
    """The map ``blocks`` in a random orthonormal basis."""
    basis = haar(len(blocks))
    return basis @ blocks @ basis.mT


def equal_angles(width):
    return turned(as_matrix(reference.compose_filters(*[make_rotation(2)] * 2)).kron(torch.eye(width // 2)).double())


EXACT_FILTERS = {
    **{f"haar of {width}": lambda width=width: haar(width) for width in (1, 2, 3, 8, 65)},
    "identity": lambda: torch.eye(9, dtype=torch.float64),
    "minus the identity": lambda: -torch.eye(4, dtype=torch.float64),
    "permutation": lambda: as_matrix(torch.randperm(65)),
    "cyclic": lambda: as_matrix(torch.arange(64).roll(1)),
    "swaps": lambda: as_matrix(torch.arange(6) ^ 1),
    "reflection": lambda: householder(33),
    "involution": lambda: turned(torch.tensor([1.0] * 7 + [-1.0] * 9, dtype=torch.float64).diag()),
    "equal angles": lambda: equal_angles(16),
    "quarter turns": lambda: torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double().kron(torch.eye(5)),
}


@pytest.mark.parametrize("name", EXACT_FILTERS)
@pytest.mark.parametrize("rounded", [False, True])
def test_frames_hold_for_fifty_thousand_steps(name, rounded):
    """A frame is a basis in which the filter rotates pairs of units.

    It has the eigenvalues of the filter as given, rounded or not, and not those of a nearby orthogonal matrix.
    """
    matrix = EXACT_FILTERS[name]()
    matrix = matrix.float().double() if rounded else matrix
    width = len(matrix)
    frame = frames.find_frame(matrix)
    if frame is None:
        assert rounded, "an exactly orthogonal filter has a well-conditioned basis"
        return
    assert torch.linalg.cond(frame.basis) <= frames.MAX_CONDITION * (1 + 1e-9)
    torch.testing.assert_close(frame.basis @ frame.inverse, torch.eye(width).double(), rtol=0, atol=1e-13)
    one_step = frame.basis @ as_matrix(frame.rotation) @ frame.inverse
    torch.testing.assert_close(one_step, matrix, rtol=0, atol=10 * frames.MAX_RESIDUAL)
    power = frame.basis @ as_matrix(reference.filter_power(frame.rotation, 50_000)) @ frame.inverse
    # Over 50,000 steps the residual must stay below float32's rounding.
    torch.testing.assert_close(power, torch.linalg.matrix_power(matrix, 50_000), rtol=0, atol=5e-8)


@pytest.mark.parametrize("width", [1, 2, 3, 64, 65])
def test_haar_filters_in_float32_have_frames(width):
    filter = haar(width).float()
    frame = frames.find_frame(filter)
    basis, inverse, rotation = frame.basis, frame.inverse, frame.rotation
    assert (basis.dtype, inverse.dtype, rotation.dtype) == (torch.float32, torch.float32, torch.float64)
    torch.testing.assert_close(basis @ inverse, torch.eye(width), rtol=0, atol=width * torch.finfo().eps)


NOT_NORMAL = torch.eye(6, dtype=torch.float64) + torch.diag(torch.full((5,), 0.5, dtype=torch.float64), 1)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.empty(0, 0),
        torch.full((3, 3), math.nan),
        torch.full((3, 3), math.inf),
        torch.eye(3) * torch.tensor([1.0, math.nan, 1.0]),
        NOT_NORMAL,
    ],
    ids=["empty", "nan", "inf", "one nan", "not normal"],
)
def test_filters_without_a_good_frame_have_none(matrix):
    assert frames.find_frame(matrix) is None


@pytest.mark.parametrize("kind", ["not normal", "scaled", *EXACT_FILTERS])
def test_filters_with_and_without_a_frame_are_solved(kind, backend):
    """Forward and backward with filters rounded to float32, as users pass them, against the sequence in float64."""
    made = {"not normal": lambda: NOT_NORMAL * 0.5, "scaled": lambda: 0.7 * haar(5)} | EXACT_FILTERS
    filter = made[kind]().float()
    width = len(filter)
    h0 = torch.randn(3, width, requires_grad=True)
    weight = (torch.randn(60, width, width) / width**0.5).requires_grad_()
    # Without a bias the states would vanish under a filter that shrinks them.
    bias = torch.randn(60, width, requires_grad=True)
    output = F.orthogonal_filter(h0, weight, bias, filter, solver="parallel", window=30)
    grad_output = torch.randn_like(output)
    actual = [output, *torch.autograd.grad(output, (h0, weight, bias), grad_output)]
    leaves = [tensor.detach().double().requires_grad_() for tensor in (h0, weight, bias)]
    with lcw_ops.use_backend("cpp"):
        output = F.orthogonal_filter(*leaves, filter.double())
    exact = [output, *torch.autograd.grad(output, leaves, grad_output.double())]
    for a, e in zip(actual, exact, strict=True):
        # The rounding of 60 layers in the worst case, in a basis of condition 4 at most.
        assert (a - e).norm() <= 60 * torch.finfo().eps * e.norm()


def test_frames_are_remembered_until_the_filter_changes():
    filter = haar(6)
    first = frames.get_frame(filter)
    assert frames.get_frame(filter) is first
    filter.copy_(haar(6))
    second = frames.get_frame(filter)
    assert second is not first
    torch.testing.assert_close(second.basis @ as_matrix(second.rotation) @ second.inverse, filter)
    with torch.inference_mode():
        # Tensors made in inference mode have no version counter.
        filter = haar(6)
        frames.get_frame(filter)
        filter.copy_(haar(6))
        third = frames.get_frame(filter)
        torch.testing.assert_close(third.basis @ as_matrix(third.rotation) @ third.inverse, filter)


@pytest.fixture
def comparisons(monkeypatch):
    """Remember frames as on a GPU, and list the comparisons for which the host would wait."""
    made, equal = [], torch.equal
    monkeypatch.setattr(frames, "_is_slow_to_compare", lambda filter: True)
    monkeypatch.setattr(frames, "_frames", [])
    monkeypatch.setattr(torch, "equal", lambda a, b: made.append((a, b)) or equal(a, b))
    return made


def test_an_unchanged_filter_is_not_compared_on_a_gpu(comparisons):
    filter, other = haar(6), haar(6)
    first, second = frames.get_frame(filter), frames.get_frame(other)
    comparisons.clear()
    for wanted, matrix in ((first, filter), (second, other), (first, filter)):
        assert all(map(torch.equal, frames.get_frame(matrix), wanted))
    assert len(comparisons) == 3 * len(first)
    # A copy is compared once, and a filter that has changed is.
    copy = filter.clone()
    assert frames.get_frame(copy) is first
    comparisons.clear()
    assert frames.get_frame(copy).basis is first.basis
    assert not comparisons
    copy.copy_(other)
    assert frames.get_frame(copy) is second
    copy.mul_(math.nan)
    assert frames.get_frame(copy) is None
    assert frames.get_frame(copy) is None


def test_a_write_without_a_version_makes_the_frame_nan_on_a_gpu(comparisons):
    filter = haar(6)
    frames.get_frame(filter)
    filter.data.copy_(haar(6))
    assert frames.get_frame(filter).rotation.isnan().all()
    with torch.inference_mode():
        filter = haar(6)
        frames.get_frame(filter)
        filter.copy_(haar(6))
        frame = frames.get_frame(filter)
        torch.testing.assert_close(frame.basis @ as_matrix(frame.rotation) @ frame.inverse, filter)


def test_a_solver_with_a_frame_of_nan_continues_layer_by_layer(comparisons):
    h0, weight, filter = torch.randn(3, 6), torch.randn(40, 6, 6) / 10, haar(6).to(torch.get_default_dtype())
    weight.requires_grad_()
    run = functools.partial(F.orthogonal_filter, h0, weight, None, filter)
    run(solver="parallel").sum().backward()
    comparisons.clear()
    run(solver="parallel").sum().backward()
    assert not comparisons
    filter.data.neg_()
    with pytest.warns(RuntimeWarning, match="did not converge"):
        result = run(solver="parallel")
    torch.testing.assert_close(result, run())


def test_few_frames_are_remembered():
    for _ in range(20):
        frames.get_frame(haar(4))
    assert len(frames._frames) <= frames._REMEMBERED


@pytest.mark.parametrize("change", [lambda q: q.neg_(), lambda q: q.t_(), lambda q: q.data.neg_()])
def test_the_solver_follows_a_filter_that_changes_in_place(change, backend):
    h0, weight, filter = torch.randn(2, 5), torch.randn(20, 5, 5), haar(5).float()
    F.orthogonal_filter(h0, weight, None, filter, solver="parallel")
    change(filter)
    actual = F.orthogonal_filter(h0, weight, None, filter, solver="parallel")
    torch.testing.assert_close(actual, F.orthogonal_filter(h0, weight, None, filter), rtol=1e-5, atol=1e-5)


# ---- The stopping rule -----------------------------------------------------------------------------------------------


def follow(changes, layers=1000, tolerance=1e-6, dtype=torch.float32):
    """Apply the rule as the solver does, and stop when it says that the sweeps converged or will not converge."""
    convergence = Convergence(layers, tolerance, dtype)
    for change in changes:
        convergence.add(change)
        if convergence.has_converged or convergence.is_hopeless:
            break
    return convergence


GOOD, BAD = True, False


@pytest.mark.parametrize(
    ("changes", "options", "sweeps", "converged"),
    [
        # The estimated error is rho / (1 - rho) times the last change; rho is the ratio of the last two changes. After
        # two sweeps it is 1e-3 / (1 - 1e-3) 1e-3, a little over 1e-6, and after three a little over 1e-9.
        ([1.0, 1e-3, 1e-6], {}, 3, GOOD),
        ([1.0, 1e-3, 1e-6], {"tolerance": 1.01e-6}, 2, GOOD),
        ([1e-2, 9e-5, 7e-7], {}, 2, GOOD),
        ([0.5, 0.25], {"tolerance": 0.2500001}, 2, GOOD),  # rho = 1/2: the remaining error equals the last change
        ([0.5, 0.25, 0.125], {"tolerance": 0.2499999}, 3, GOOD),
        ([0.0], {}, 1, GOOD),
        ([1.0, 0.0], {"tolerance": 1e-300}, 2, GOOD),
        ([3.0], {"layers": 1}, 1, GOOD),
        ([3.0, 5.0], {"layers": 2}, 2, GOOD),  # exact after as many sweeps as layers
        ([3.0, 2.9, 2.8], {"layers": 3}, 3, GOOD),
        ([1e-9], {"layers": 2, "tolerance": 1e-3}, 1, None),  # one change alone says nothing
        ([1e-9, 1e-9], {"tolerance": 1e-3}, 2, GOOD),  # changes of an ulp are the states' rounding
        ([1e-2, 2e-9], {"tolerance": 1e-30}, 2, None),
        ([1e-2, 2e-7, 1.9e-7], {"tolerance": 1e-30}, 3, GOOD),
        ([1e-2, 2e-7, 1.9e-7], {"tolerance": 1e-30, "dtype": torch.float64}, 3, BAD),
        ([1.0, 1.0], {}, 2, None),
        ([1.0, 2.0, 1e-2, 1e-9], {}, 4, GOOD),  # a bad start is forgiven
        ([1.0, 1.0, 1.0], {"tolerance": 1e-9}, 3, BAD),
        ([1.0, 0.5, 0.6], {"tolerance": 1e-9}, 3, BAD),
        ([1.0, 2.0, 4.0], {}, 3, BAD),
        # 13 sweeps remain. The contraction of sweep k + 1 is at best k / (k + 1) of that of sweep k.
        ([1.0, 0.9, 0.81], {"tolerance": 1e-9}, 3, BAD),
        ([1.0, 0.9, 0.81], {}, 3, None),
        ([1.0, 0.3, 0.09, 0.027], {}, 4, None),
        ([math.nan], {}, 1, BAD),
        ([math.inf], {}, 1, BAD),
        ([math.nan], {"layers": 1}, 1, BAD),
        ([1.0, math.nan], {}, 2, BAD),
        ([1.0, 0.1, math.inf], {"layers": 3}, 3, BAD),
    ],
)
def test_the_stopping_rule_on_given_changes(changes, options, sweeps, converged):
    convergence = follow(changes, **options)
    assert len(convergence.changes) == sweeps
    assert convergence.has_converged == (converged is GOOD)
    assert convergence.is_hopeless == (converged is BAD) or converged is GOOD


def test_a_change_after_none_is_no_contraction():
    """A lower bound may be 0 although states change. The next change then says nothing about the remaining error."""
    convergence = Convergence(1000, 1e-6, torch.float32)
    convergence.add(0.0)
    convergence.add(1e-4)
    assert convergence.contraction == math.inf
    assert convergence.error == math.inf
    assert not convergence.has_converged
    convergence.add(0.0)
    assert convergence.contraction == 0
    assert convergence.has_converged


def test_a_lower_bound_of_the_change_does_not_decide():
    """``finish`` is called when the bounds have converged, and the change of all states then decides."""
    bounds, changes, finished = [0.5, 1e-4, 1e-8], [1e-3, 1e-9], []
    windows = solver.Windows(None, 1e-6, 1000, 1000)
    windows.direction = "forward"

    def finish() -> Tensor:
        finished.append(len(bounds))
        return torch.tensor(changes.pop(0))

    with solver.record_solves() as solves:
        assert windows.converge(0, 1000, torch.float32, lambda: torch.tensor(bounds.pop(0)), finish)
    # After the second bound the estimate is 2e-8, but the change of all states is 1e-3, whose estimate is 2e-6.
    assert finished == [1, 0]
    assert (solves[0].sweeps, solves[0].converged) == (3, True)
    assert solves[0].residual == pytest.approx(1e-9)
    assert solves[0].contraction == pytest.approx(1e-6)


@pytest.mark.parametrize("rho", [0.9, 0.7, 0.5, 0.45, 0.4, 0.3, 0.1, 1e-3])
def test_the_estimate_of_a_steady_contraction_is_right(rho):
    """The remaining error is the estimated one, and the rule does not use up 16 sweeps if they will not suffice."""
    changes = [rho**k for k in range(1, 40)]
    convergence = follow(changes)
    sweeps = len(convergence.changes)
    needed = math.ceil(math.log(1e-6 * (1 - rho)) / math.log(rho)) - 1
    if needed <= solver.MAX_SWEEPS:
        assert convergence.has_converged
        assert needed - 1 <= sweeps <= max(needed + 1, 2)
        assert sum(changes[sweeps:]) <= 1.01 * convergence.error <= 1.01e-6
    else:
        assert not convergence.has_converged
        assert 3 <= sweeps < solver.MAX_SWEEPS


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.5])
def test_a_contraction_that_gets_faster_is_not_given_up(scale):
    """The changes fall as scale^k / k!, the law of such sweeps: slowly at first, but far enough before the 16th."""
    changes = [scale**k / math.factorial(k) for k in range(1, 40)]
    convergence = follow(changes)
    assert convergence.has_converged
    assert sum(changes[len(convergence.changes) :]) <= 1e-6


@pytest.mark.parametrize("layers", [3, 8, solver.MAX_SWEEPS])
def test_a_window_of_few_layers_is_never_hopeless(layers):
    """As many sweeps as layers make every state exact, however the changes look."""
    convergence = follow([1.0 + k for k in range(20)], layers)
    assert convergence.has_converged
    assert len(convergence.changes) == layers


def test_never_more_than_the_largest_number_of_sweeps():
    """The estimate of the sweeps that remain is wrong for a contraction that keeps getting slower."""
    changes = [1.0]
    for k in range(60):
        changes.append(changes[-1] * (0.3 + 0.03 * k if k < 20 else 0.95))
    convergence = follow(changes, tolerance=1e-12, dtype=torch.float64)
    assert not convergence.has_converged
    assert len(convergence.changes) <= solver.MAX_SWEEPS


def test_a_solve_holds_the_figures_of_its_sweeps():
    convergence = follow([1e-1, 1e-4, 1e-7], layers=50, tolerance=1e-9, dtype=torch.float64)
    solve = convergence.to_solve("backward", 7)
    assert dataclasses.astuple(solve)[:4] == ("backward", 7, 50, 3)
    assert solve.contraction == pytest.approx(1e-3)
    assert (solve.residual, solve.converged) == (1e-7, True)
    assert solve.error == pytest.approx(1e-10, rel=2e-3)
    first = follow([0.0]).to_solve("forward", 0)
    assert math.isnan(first.contraction)
    assert first.error == 0.0


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2.0**-23), (torch.float64, 2.0**-52)])
def test_default_tolerance_is_the_rounding_over_the_depth(dtype, eps):
    assert [solver.default_tolerance(dtype, steps) for steps in (0, 1, 64, 6400)] == [eps, eps, eps, 10 * eps]


# ---- Windows ---------------------------------------------------------------------------------------------------------


def solve_net(steps, width=4, rows=2, scale=1.0, dtype=torch.float64, with_gradients=False, **options):
    """The recorded solves, the result, and the sequential result."""
    h0 = torch.randn(rows, width, dtype=dtype)
    weight = (scale * torch.randn(steps, width, width, dtype=dtype) / width**0.5).requires_grad_(with_gradients)
    filter = torch.arange(width).roll(1)
    with record_solves() as solves:
        output = F.orthogonal_filter(h0, weight, None, filter, solver="parallel", return_states=True, **options)
        if with_gradients:
            torch.autograd.grad(output.sum(), weight)
    beta = options.get("beta")
    expected = F.orthogonal_filter(h0, weight.detach(), None, filter, beta=beta, return_states=True)
    return solves, output.detach(), expected


@pytest.mark.parametrize("window", [8, 9, 30, 99, 100, 101, 2**62])
def test_windows_cover_every_layer_once(window, backend):
    solves, output, expected = solve_net(100, window=window, with_gradients=True)
    for direction, order in (("forward", 1), ("backward", -1)):
        chosen = [solve for solve in solves if solve.direction == direction]
        assert all(solve.converged and solve.layers <= window for solve in chosen)
        if direction == "forward":
            # The backward pass solves forward once more for the states inside each window.
            assert len(chosen) == 2 * -(-100 // window)
            chosen = chosen[: len(chosen) // 2]
        covered = [range(solve.first_layer, solve.first_layer + solve.layers) for solve in chosen[::order]]
        assert list(itertools.chain(*covered)) == list(range(100))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("window", range(1, solver.LEAST_WINDOW))
def test_windows_too_small_to_pay_are_sequential(window, backend):
    solves, output, expected = solve_net(20, window=window)
    assert {solve.sweeps for solve in solves} == {0}
    assert sum(solve.layers for solve in solves) == 20
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.filterwarnings("ignore:orthogonal_filter. the parallel solver did not converge:RuntimeWarning")
def test_a_window_that_does_not_converge_is_halved_for_good(backend):
    solves, output, expected = solve_net(256, width=16, scale=3.0, beta=0.06, window=256)
    sizes = [solve.layers for solve in solves if not solve.converged]
    assert sizes
    assert all(size == 256 >> k for k, size in enumerate(sizes))
    later = [solve for solve in solves if solve.converged]
    assert later
    assert all(solve.layers <= sizes[-1] // 2 or solve.sweeps == 0 for solve in later)
    assert sum(solve.layers for solve in later) == 256
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


def test_recorders_nest_and_end():
    with lcw_ops.use_backend("reference"):
        with record_solves() as outer:
            with record_solves() as inner:
                solve_net(10)
            assert len(inner) == len(outer) == 1
            solve_net(10)
            assert (len(inner), len(outer)) == (1, 2)
        with pytest.raises(ValueError, match="shape"), record_solves() as failed:
            F.orthogonal_filter(torch.ones(2), torch.ones(3, 2, 2), None, torch.arange(2), solver="parallel")
        solve_net(10)
    assert (len(outer), len(failed)) == (2, 0)
    assert not solver._recorders


def test_the_default_window_fits_into_the_cache():
    for rows, width, shape in [(8, 64, (100_000, 64, 64)), (128, 128, (128, 128)), (1, 1, (1, 1)), (0, 0, (0, 0))]:
        weight = torch.empty(1).expand(shape)
        window = solver.default_window(weight, rows, 100_000)
        assert solver.LEAST_DEFAULT_WINDOW <= window <= 100_000
        per_layer = 4 * (4 * rows * width + (width * width if len(shape) == 3 else 0))
        assert window * per_layer <= solver.CACHED_BYTES or window == solver.LEAST_DEFAULT_WINDOW
    assert solver.default_window(torch.empty(50, 4, 4), 2, 50) == 50
    assert solver.default_window(torch.empty(50_000, 64, 64, device="meta"), 8, 50_000) == 50_000


def test_a_shared_weights_gradient_is_summed_in_parts(monkeypatch):
    """Five parts of up to three sums of 64 outer products each, and 32 outer products that remain."""
    monkeypatch.setattr(solver, "SUMMED_BYTES", 3 * 4 * 5 * 5)
    grad_pre, before = torch.randn(2, 16, 54, 5).unbind()
    gradient = torch.ones(5, 5, dtype=torch.float64)
    solver._add_outer_products(gradient, grad_pre, before)
    exact = 1 + torch.einsum("lmo,lmi->oi", grad_pre.double(), before.double())
    torch.testing.assert_close(gradient, exact, rtol=0, atol=864 * torch.finfo().eps)


class LargestResult(TorchDispatchMode):
    """The bytes of the largest tensor that any operator returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self.bytes = max(self.bytes, *(tensor.nbytes for tensor in tensors), 0)
        return result


def test_the_sums_for_a_shared_weight_take_little_memory():
    """At most 64 MiB; all sums at once would be 1 GiB. On the meta device nothing is computed."""
    grad_pre, before = (torch.empty(32, 128, 2048, device="meta") for _ in range(2))
    gradient = torch.empty(2048, 2048, dtype=torch.float64, device="meta")
    with LargestResult() as largest:
        solver._add_outer_products(gradient, grad_pre, before)
    assert gradient.nbytes <= largest.bytes <= 64 * 2**20


# ---- The errors after each sweep -------------------------------------------------------------------------------------

LAYERS, WIDTH, ROWS = 2000, 64, 8


@dataclasses.dataclass
class Row:
    """One net of ``TABLE``: its settings, the errors after sweeps 1, 2, ..., and the number of sweeps to 1e-6.

    ``input_scale`` is set for an RNN, which starts from 0.
    """

    errors: list[float]
    sweeps: int
    filter: str = "haar"
    c: float = 1.0
    gain: float = 1.0
    tied: bool = False
    activation: str = "tanh"
    steps: int = LAYERS
    alpha: float | None = None
    beta: float | None = None
    input_scale: float = 0.0

    def make(self) -> dict:
        """The arguments of the public function."""
        filters = {"haar": haar, "identity": torch.arange, "cyclic": lambda width: torch.arange(width).roll(1)}
        shape = (WIDTH, WIDTH) if self.tied else (self.steps, WIDTH, WIDTH)
        h0 = torch.randn(ROWS, WIDTH, dtype=torch.float64)
        inputs = torch.randn(self.steps, ROWS, WIDTH, dtype=torch.float64)
        return {
            "h0": torch.zeros_like(h0) if self.input_scale else h0,
            "weight": self.gain / WIDTH**0.5 * torch.randn(shape, dtype=torch.float64),
            "bias": None,
            "filter": filters[self.filter](WIDTH),
            "alpha": self.alpha,
            "beta": self.c / self.steps if self.beta is None else self.beta,
            "inputs": self.input_scale * inputs if self.input_scale or self.tied else None,
            "activation": self.activation,
        }


TABLE = {
    "per-layer W": Row([9e-5, 7e-7, 6e-9, 4e-11], 2),
    "per-layer W, ReLU": Row([1e-4, 1e-6, 1e-8], 2, activation="relu"),
    "per-layer W, identity": Row([9e-5, 8e-7, 6e-9], 2, filter="identity"),
    "c = 3": Row([5e-4, 1e-5, 3e-7], 3, c=3.0),
    "c = 10": Row([2e-3, 8e-5, 4e-6, 2e-7], 4, c=10.0),
    "4 W": Row([3e-4, 6e-6, 1e-7], 3, gain=4.0),
    "4 W, cyclic, c = 3": Row([3e-3, 2e-4, 2e-5, 1e-6], 4, gain=4.0, filter="cyclic", c=3.0),
    "tied W": Row([2e-3, 1e-4, 5e-6, 2e-7], 4, tied=True),
    "tied W, identity": Row([8e-2, 2e-2, 2e-3, 3e-4, 4e-5, 4e-6, 4e-7], 7, tied=True, filter="identity"),
    "RNN": Row(
        [1e-1, 1e-2, 2e-3, 5e-4, 1e-4, 2e-5, 4e-6, 8e-7], 8, tied=True, steps=784, alpha=0.99, beta=0.01,
        input_scale=0.1,
    ),
}  # fmt: skip
SLOW = {
    "RNN, beta = 1/sqrt(T)": Row([], 22, "identity", tied=True, steps=784, beta=784**-0.5, input_scale=1.0),
    "RNN, beta = .05": Row([], 25, tied=True, steps=784, alpha=0.998, beta=0.05, input_scale=0.1),
}


class FixedSweeps(solver.Forward):
    """A fixed number of sweeps over all layers, without the stopping rule. Keeps each sweep's change and error."""

    def __init__(self, made: dict, exact: Tensor, count: int) -> None:
        steps = len(exact) - 1
        super().__init__(op._make_scan("cpp", made["filter"]), 1e-6, steps, steps, sequential=None)
        alpha, beta = scale_tensors(made["alpha"], made["beta"], steps, made["h0"])
        self.states, self.exact, self.count = torch.empty_like(exact), exact, count
        self.states[0] = made["h0"]
        self.changes, self.errors, self.largest_errors = [], [], []
        self.run(
            self.states,
            solver.Layers(made["weight"], made["bias"], alpha, beta, made["inputs"], made["activation"]),
        )

    def converge(self, first_layer, layers, dtype, sweep) -> bool:
        for _ in range(self.count):
            self.changes.append(sweep().item())
            self.errors.append(((self.states - self.exact).norm() / self.exact.norm()).item())
            # The solver measures a change in the same way: in the worst state of the worst sample.
            self.largest_errors.append(reference.relative_change(self.exact[1:], self.states[1:]).item())
        return True


@pytest.mark.parametrize("name", TABLE)
def test_errors_fall_with_the_sweeps_as_in_the_table(name):
    """Besides, when the estimated error falls below the tolerance, the true error does so too, up to a factor of 2."""
    row = TABLE[name]
    made = row.make()
    exact = F.orthogonal_filter(**made, return_states=True)
    sweeps = FixedSweeps(made, exact, len(row.errors) + 2)
    print(name, *(f"{error:.1e}" for error in sweeps.errors))
    for error, expected in zip(sweeps.errors, row.errors, strict=False):
        assert error <= 10 * expected
        # One W for all layers is a single draw, whose error may be smaller. The errors of 2,000 draws average out.
        assert row.tied or error >= expected / 10
    needed = next(k for k, error in enumerate(sweeps.errors, start=1) if error <= 1e-6)
    assert needed <= row.sweeps + 1
    assert row.tied or needed >= row.sweeps - 1
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6):
        convergence = follow(sweeps.changes, row.steps, tolerance, torch.float64)
        assert convergence.has_converged
        accepted = len(convergence.changes) - 1
        rounding = 100 * EPS
        assert sweeps.largest_errors[accepted] <= 10 * convergence.error + rounding
        # The rule stops at most one sweep late: two sweeps earlier the error was still too large.
        assert sweeps.errors[accepted] <= tolerance
        assert sweeps.largest_errors[accepted] <= 2 * tolerance
        assert accepted < 2 or sweeps.largest_errors[accepted - 2] > tolerance


@pytest.mark.parametrize("name", SLOW)
def test_nets_that_converge_slowly_are_right_in_windows(name):
    row = SLOW[name]
    made = row.make()
    exact = F.orthogonal_filter(**made, return_states=True)
    sweeps = FixedSweeps(made, exact, row.sweeps)
    print(name, *(f"{error:.1e}" for error in sweeps.errors))
    assert sweeps.errors[solver.MAX_SWEEPS] > 1e-6
    given_up = follow(sweeps.changes, row.steps)
    assert not given_up.has_converged
    assert len(given_up.changes) < solver.MAX_SWEEPS
    with record_solves() as solves, pytest.warns(RuntimeWarning, match="did not converge"):
        actual = F.orthogonal_filter(**made, return_states=True, solver="parallel", tolerance=1e-6, window=row.steps)
    assert sum(solve.layers for solve in solves if solve.converged) == row.steps
    assert any(solve.converged and 0 < solve.sweeps <= solver.MAX_SWEEPS for solve in solves)
    assert (actual - exact).norm() <= 1e-6 * exact.norm()


def test_smaller_windows_take_fewer_sweeps():
    """A window of D layers behaves like a net with c D / L instead of c."""
    made = TABLE["tied W, identity"].make()
    counts = {}
    for window in (LAYERS, 200, 20):
        with record_solves() as solves:
            F.orthogonal_filter(**made, solver="parallel", tolerance=1e-6, window=window)
        counts[window] = max(solve.sweeps for solve in solves)
    assert counts[LAYERS] > counts[200] > counts[20]
