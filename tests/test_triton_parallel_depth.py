"""The Triton kernels of the recurrence in parallel over depth, against plain numpy in higher precision.

Without a GPU they run in Triton's interpreter (see support/triton_process.py), which is slow: every shape is as small
as its test allows.
"""

import itertools

import numpy as np
import pytest
import torch
from support.exact_scan import EXACT_ACTIVATIONS, exact, exact_scan, normal, scale
from support.numerics import assert_by_the_rule, needs_more_digits
from support.pairwise import name_of, pairwise
from support.triton_process import DEVICE_TYPE, import_kernels

import lcw_ops
from lcw_ops import functional as F
from lcw_ops.ops.parallel_depth import op
from lcw_ops.reference import parallel_depth as reference

kernels = import_kernels("parallel_depth", op.SWEEP)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "made_on_device"),
    # numpy warns if a number is not finite.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

ACTIVATIONS = ("tanh", "relu", "sigmoid", "identity")
DTYPES = (torch.float32, torch.float64)
KINDS = [
    *itertools.product(("random", "rotations"), DTYPES),
    *itertools.product(("identity", "cyclic", "pairs"), DTYPES[:1]),
]
CHUNK = 3
# (layers, samples, units): one layer, one chunk, a layer less and a layer more, and several chunks.
SHAPES = ((1, 1, 1), (CHUNK - 1, 1, 16), (CHUNK, 3, 33), (CHUNK + 1, 17, 7), (2 * CHUNK + 1, 3, 2))


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "choose_chunk", lambda steps, warps, processors: CHUNK)


def make_filter(kind, width):
    if kind == "rotations":
        angle = 6 * torch.rand((width + 1) // 2, dtype=torch.float64).repeat_interleave(2)[:width]
        sign = torch.tensor([1.0, -1.0]).repeat((width + 1) // 2)[:width]
        cosine, sine = angle.cos(), sign * angle.sin()
        if width % 2:
            cosine[-1], sine[-1] = -1, 0
        return torch.cat((cosine, sine))
    unit = torch.arange(width)
    # Each pair of neighbours changes places. The last of an odd number of units stays.
    pairs = (unit ^ 1).clamp(max=width - 1)
    return {"random": torch.randperm(width), "identity": unit, "cyclic": unit.roll(1), "pairs": pairs}[kind]


def judge(name, results):
    """Judge triples of results: (the kernel's, plain torch's, the exact one)."""
    dtype = results[0][0].dtype
    digits = np.longdouble if dtype == torch.float64 else np.float64
    triples = [(actual.cpu(), eager.cpu(), exact.astype(digits)) for actual, eager, exact in results]
    assert_by_the_rule(f"{name} in {dtype}", *zip(*triples, strict=True))


EXACT_DERIVATIVES = {
    "tanh": lambda a: 1 - np.tanh(a) ** 2,
    "relu": lambda a: (a > 0).astype(a.dtype),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)) * (1 / (1 + np.exp(a))),
    "identity": np.ones_like,
}


def exact_activation(product, bias, inputs, beta, activation, table=EXACT_ACTIVATIONS):
    total = exact(product)
    if bias is not None:
        total = total + (exact(bias)[:, None] if bias.dim() == 2 else exact(bias))
    if inputs is not None:
        total = total + exact(inputs)
    return exact(beta)[:, None, None] * table[activation](total)


def assert_same_change(actual, new, old):
    """Check that ``actual`` is the change of the stored states. A GPU's float32 division is accurate to 2 ulp."""
    assert actual.shape == (1,)
    assert actual.dtype == torch.float64
    expected = reference.relative_change(new, old)
    torch.testing.assert_close(actual, expected, rtol=3 * torch.finfo(new.dtype).eps, atol=0, equal_nan=True)


def check_sweeps(cases):
    """Judge a sweep of each case (states, product, bias, inputs, filter, alpha, beta, activation)."""
    results = []
    for states, *arguments in cases:
        product, bias, inputs, filter, alpha, beta, activation = arguments
        new, eager = states.clone(), states.clone()
        given = product.clone()
        assert_same_change(kernels.sweep_(new, *arguments), new[1:], states[1:])
        reference.sweep_(eager, *arguments)
        assert torch.equal(product, given)
        assert torch.equal(new[0], states[0])
        source = exact_activation(product, bias, inputs, beta, activation)
        results.append((new, eager, exact_scan(states[0], source, filter, alpha)))
    judge("states", results)


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=str)
def test_sweep_matches_the_recurrence(kind, dtype, short_chunks):
    needs_more_digits(dtype)
    cases = []
    activations = ("tanh", "relu", "sigmoid", "sigmoid", "tanh")
    for (steps, rows, width), activation in zip(SHAPES, activations, strict=True):
        cases.append(
            (
                normal(steps + 1, rows, width, dtype=dtype),
                normal(steps, rows, width, dtype=dtype),
                normal(steps, width, dtype=dtype),
                normal(steps, rows, width, dtype=dtype),
                make_filter(kind, width),
                scale(steps, dtype),
                scale(steps, dtype),
                activation,
            )
        )
    check_sweeps(cases)


BIASES = (None, "shared", "per layer")
# Every pair of values. The scales are one option, so that each combination of theirs meets every other value.
FORMS = pairwise(
    scales_per_layer=list(itertools.product((False, True), repeat=2)),
    bias=BIASES,
    inputs=(False, True),
    kind=("random", "rotations"),
)
GIVEN = (False, True)
ADJOINTS = pairwise(shape=SHAPES, product=GIVEN, outside=GIVEN, slope=GIVEN, alpha_per_layer=(True, False))
ACTIVATED = pairwise(
    shape=((1, 17, 7), (9, 1, 16), (2, 3, 33)),
    activation=ACTIVATIONS,
    bias=BIASES,
    inputs=(False, True),
    beta_per_layer=(True, False),
)


def some_bias(form, steps, width, dtype):
    shape = {"shared": (width,), "per layer": (steps, width)}.get(form)
    return None if shape is None else normal(*shape, dtype=dtype)


@pytest.mark.parametrize("case", FORMS, ids=name_of)
def test_every_form_of_the_arguments(case, short_chunks):
    dtype, steps, rows, width = torch.float32, 4, 3, 5
    alpha_per_layer, beta_per_layer = case["scales_per_layer"]
    arguments = (
        normal(steps + 1, rows, width, dtype=dtype),
        normal(steps, rows, width, dtype=dtype),
        some_bias(case["bias"], steps, width, dtype),
        normal(steps, rows, width, dtype=dtype) if case["inputs"] else None,
        make_filter(case["kind"], width),
        scale(steps, dtype, alpha_per_layer),
        scale(steps, dtype, beta_per_layer),
        "relu",
    )
    check_sweeps([arguments])


@pytest.mark.parametrize(("kind", "dtype"), KINDS[:4], ids=str)
def test_adjoint_matches_the_recurrence(kind, dtype, short_chunks):
    needs_more_digits(dtype)
    results = []
    for (steps, rows, width), *given, per_layer in (case.values() for case in ADJOINTS):
        product, outside, slope = (normal(steps, rows, width, dtype=dtype) if here else None for here in given)
        gradients, scaled = normal(steps + 1, rows, width, dtype=dtype), normal(steps, rows, width, dtype=dtype)
        filter, alpha = make_filter(kind, width), scale(steps, dtype, per_layer)
        new, eager = gradients.clone(), gradients.clone()
        arguments, before = (product, outside, filter, alpha), scaled.clone()
        assert_same_change(kernels.adjoint_sweep_(new, *arguments, slope, scaled), new[:-1], gradients[:-1])
        reference.adjoint_sweep_(eager, *arguments, None, None)
        assert torch.equal(new[-1], gradients[-1])
        # ``scaled`` has the bits of slope times the stored gradients.
        assert torch.equal(scaled, before if slope is None else slope * new[1:])
        source = np.zeros((steps, rows, width), np.longdouble)
        for term in (product, outside):
            if term is not None:
                source = source + exact(term)
        wanted = exact_scan(gradients[-1], source[::-1], filter, alpha.flip(0))[::-1]
        results.append((new, eager, wanted))
    judge("gradients", results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("derivative", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activate(activation, derivative, dtype):
    needs_more_digits(dtype)
    table = EXACT_DERIVATIVES if derivative else EXACT_ACTIVATIONS
    results = []
    for case in [case for case in ACTIVATED if case["activation"] == activation]:
        steps, rows, width = case["shape"]
        product = normal(steps, rows, width, dtype=dtype)
        bias = some_bias(case["bias"], steps, width, dtype)
        inputs = normal(steps, rows, width, dtype=dtype) if case["inputs"] else None
        beta = scale(steps, dtype, case["beta_per_layer"])
        actual, eager = product.clone(), product.clone()
        assert kernels.activate_(actual, bias, inputs, beta, activation, derivative) is None
        reference.activate_(eager, bias, inputs, beta, activation, derivative)
        results.append((actual, eager, exact_activation(product, bias, inputs, beta, activation, table)))
    judge(activation, results)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 2, 0)])
@pytest.mark.parametrize("kind", ["random", "rotations"])
def test_nothing_to_do(shape, kind):
    steps, rows, width = shape
    states, product = torch.randn(steps + 1, rows, width), torch.randn(shape)
    before, filter, one = states.clone(), make_filter(kind, width), torch.ones(1)
    change = kernels.sweep_(states, product, None, None, filter, one, one, "tanh")
    assert torch.equal(change, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(kernels.adjoint_sweep_(states, product, None, filter, one, None, None), change)
    kernels.activate_(product, None, None, one, "tanh", False)
    assert torch.equal(states, before)


@pytest.mark.parametrize("kind", ["random", "rotations"])
def test_nothing_drifts(kind):
    """If the states are only filtered, 25 permutations are exact, and 25 rotations are rounded once."""
    steps, width = 25, 6
    filter, first = make_filter(kind, width), torch.randn(1, width)
    states = torch.full((steps + 1, 1, width), torch.nan)
    states[0] = first
    # The memory of the new states holds NaN, and does not affect the result.
    kernels.sweep_(states, None, None, None, filter, torch.ones(1), torch.ones(1), "tanh")
    wanted = exact_scan(first, np.zeros((steps, 1, width)), filter, torch.ones(1))
    if kind == "random":
        assert (exact(states) == wanted).all()
    else:
        # With cosines in float32 the error would be many times as large.
        assert (np.abs(exact(states) - wanted) <= 0.501 * torch.finfo().eps * np.abs(wanted).max()).all()


@pytest.mark.parametrize("kind", ["random", "rotations"])
def test_a_second_sweep_changes_nothing_and_has_the_same_bits(kind):
    states, product, filter = torch.randn(6, 5, 7), torch.randn(5, 5, 7), make_filter(kind, 7)
    arguments = (product, torch.randn(7), None, filter, torch.rand(5), torch.rand(5), "sigmoid")
    assert kernels.sweep_(states, *arguments) > 0
    first = states.clone()
    assert torch.equal(kernels.sweep_(states, *arguments), torch.zeros(1, dtype=torch.float64))
    assert torch.equal(states, first)
    gradients, scaled = torch.randn(6, 5, 7), torch.empty(5, 5, 7)
    arguments = (product, None, filter, torch.rand(5), torch.randn(5, 5, 7), scaled)
    kernels.adjoint_sweep_(gradients, *arguments)
    first = gradients.clone(), scaled.clone()
    assert kernels.adjoint_sweep_(gradients, *arguments) == 0
    assert torch.equal(gradients, first[0])
    assert torch.equal(scaled, first[1])


def test_one_changed_number_is_found_wherever_it_is(short_chunks):
    """The change is relative to the largest number of its row. The changed number is next to padding."""
    new, filter = torch.randn(2 * CHUNK + 2, 3, 5), make_filter("random", 5)
    arguments = (torch.randn(2 * CHUNK + 1, 3, 5), None, None, filter, torch.ones(1), torch.ones(1), "sigmoid")
    kernels.sweep_(new, *arguments)
    for layer in (CHUNK, 2 * CHUNK + 1):
        old = new.clone()
        old[layer, 2, 4] += 1
        states = old.clone()
        change = kernels.sweep_(states, *arguments)
        assert torch.equal(states, new)
        expected = (old[layer, 2, 4] - new[layer, 2, 4]) / new[layer, 2].abs().max()
        torch.testing.assert_close(change[0], expected.double(), rtol=3 * torch.finfo().eps, atol=0)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "bad", "kind"),
    [
        ("first", NAN, "random"),
        ("first", -INF, "rotations"),
        ("old", NAN, "random"),
        ("old", INF, "random"),
        ("product", -NAN, "rotations"),
        ("product", INF, "random"),
    ],
)
def test_non_finite_numbers_are_reported_and_stay_in_their_row(name, bad, kind, short_chunks):
    states, product, filter = torch.randn(7, 3, 5), torch.randn(6, 3, 5), make_filter(kind, 5)
    arguments = (None, None, filter, torch.full((1,), 0.5), torch.ones(1), "identity")
    clean = states.clone()
    kernels.sweep_(clean, product, *arguments)
    {"first": states[0], "old": states[6], "product": product[1]}[name][1, 2] = bad
    dirty = states.clone()
    change = kernels.sweep_(dirty, product, *arguments)
    if name == "old":
        assert torch.equal(dirty, clean)
        assert change.isnan() if bad != bad else change.isinf()
    else:
        assert change.isnan()
        assert not dirty[6, 1].isfinite().all()
        assert torch.equal(dirty[1:, [0, 2]], clean[1:, [0, 2]])


@pytest.mark.parametrize(("old", "expected"), [(0.0, 0.0), (1.0, INF)])
def test_states_of_zero(old, expected):
    """0 / 0 counts as no change; a change from 1 to 0 is infinite."""
    states = torch.zeros(4, 2, 3)
    states[2, 1, 1] = old
    change = kernels.sweep_(states, None, None, None, make_filter("cyclic", 3), torch.ones(1), torch.ones(1), "relu")
    assert change == expected
    assert not states.any()


def test_tiny_and_huge_changes_are_reported():
    """Squares of these numbers would underflow or overflow."""
    for size in (1e-30, 1e30):
        states = torch.full((3, 1, 2), size)
        states[1:] *= 2
        change = kernels.sweep_(states, None, None, None, torch.arange(2), torch.ones(1), torch.ones(1), "relu")
        torch.testing.assert_close(change.item(), 1.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["random", "rotations"])
def test_rows_longer_than_a_warps_tile(kind):
    states, product = torch.randn(4, 2, 301), torch.randn(3, 2, 301)
    case = (states, product, None, None, make_filter(kind, 301), scale(3, torch.float32), torch.ones(1), "tanh")
    check_sweeps([case])


def test_chunks_cover_all_layers_and_fill_the_machine():
    for steps, warps, processors in itertools.product((1, 2, 99, 784, 50_000), (1, 32, 10**6), (1, 132)):
        chunk = kernels.choose_chunk(steps, warps, processors)
        chunks = -(-steps // chunk)
        assert 1 <= chunks <= steps
        assert chunks == 1 or chunks * warps <= processors * kernels.WARPS_PER_PROCESSOR
    # 128 samples of 64 units are 32 tiles of one warp.
    assert kernels.choose_chunk(50_000, 32, 132) == 225
    # The rows alone fill the GPU, so the layers are not split.
    assert kernels.choose_chunk(50_000, 10**6, 132) == 50_000


@pytest.mark.parametrize("wrong", [[0, 1, 2, 2], [0, 1, 2, 4], [0, -1, 2, 3], [0, 1, 2, 10**6], [-(10**6), 1, 2, 3]])
def test_a_wrong_permutation_gives_nan(wrong):
    """The result is NaN, and nothing is read or written out of bounds."""
    states, one = torch.randn(4, 2, 4), torch.ones(1)
    change = kernels.sweep_(states, torch.randn(3, 2, 4), None, None, torch.tensor(wrong), one, one, "tanh")
    assert change.isnan()
    assert states[1:].isnan().all()


def test_wrong_arguments_are_refused_before_anything_is_written():
    states, product, one = torch.randn(4, 2, 5), torch.randn(3, 2, 5), torch.ones(1)
    permutation = torch.arange(5)
    good = [states, product, torch.randn(5), torch.randn(3, 2, 5), permutation, one, one, "tanh"]
    for place, bad in (
        (0, states[0]),
        (0, states.bfloat16()),
        (0, states.mT.contiguous().mT),
        (0, states[:0]),
        (1, product[:2]),
        (1, product.double()),
        (1, product[..., ::2]),
        (2, torch.randn(3)),
        (2, torch.randn(2, 5)),
        (3, torch.randn(3, 2, 4)),
        (4, torch.arange(4)),
        (4, permutation.int()),
        (4, torch.eye(5)),
        (4, torch.randn(10)),
        (4, torch.arange(10)[::2]),
        (5, torch.ones(2)),
        (6, torch.ones(())),
        (7, "gelu"),
    ):
        before = states.clone()
        with pytest.raises(ValueError, match=r"parallel_depth_sweep_.*Call lcw_ops\.functional\.orthogonal_filter$"):
            kernels.sweep_(*good[:place], bad, *good[place + 1 :])
        assert torch.equal(states, before)
    for slope, scaled in ((product, None), (product[:2], product), (product, product.double())):
        with pytest.raises(ValueError, match=r"parallel_depth_adjoint_.*Call lcw_ops\.functional\.orthogonal_filter$"):
            kernels.adjoint_sweep_(states, product, None, permutation, one, slope, scaled)
    for arguments in ((product, None, None, torch.ones(2), "tanh"), (product, None, None, one, "gelu")):
        with pytest.raises(ValueError, match=r"parallel_depth_activate_.*Call lcw_ops\.functional\.orthogonal_filter$"):
            kernels.activate_(*arguments, False)
    wide = kernels.MAX_WIDTH + 1
    with pytest.raises(ValueError, match=f"width is {wide}; expected at most {kernels.MAX_WIDTH}"):
        kernels.sweep_(torch.zeros(1, 1, wide), None, None, None, torch.arange(wide), one, one, "tanh")


def test_the_inverse_is_sorted_once_per_call(monkeypatch):
    """All sweeps share it. The other sort of a call is the solver's, which transposes the filter."""
    sorts, argsort = [], torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda *arguments: sorts.append(1) or argsort(*arguments))
    h0, weight, filter = torch.randn(2, 5), torch.randn(12, 5, 5) / 4, torch.randperm(5)
    for _ in range(2):
        with lcw_ops.use_backend("triton"):
            F.orthogonal_filter(h0, weight, None, filter, solver="parallel")
        assert len(sorts) == 2
        sorts.clear()


def test_the_inverse_follows_the_permutation():
    states, one = torch.randn(3, 2, 5), torch.ones(1)
    permutation, other = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([2, 0, 1, 4, 3])

    def sweep(permutation):
        new = states.clone()
        kernels.sweep_(new, None, None, None, permutation, one, one, "identity")
        return new[1]

    assert torch.equal(sweep(permutation), states[0][:, permutation])
    permutation.copy_(other)
    assert torch.equal(sweep(permutation), states[0][:, other])
    # torch does not count this write. Numbers at wrong places would go unnoticed.
    permutation.data.copy_(other.argsort())
    assert sweep(permutation).isnan().all()
    count = len(kernels._inverses)
    del permutation
    assert len(kernels._inverses) == count - 1


@pytest.mark.skipif(DEVICE_TYPE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("kind", ["random", "rotations"])
def test_recorded_in_a_cuda_graph(kind):
    states, product, filter, one = torch.randn(200, 5, 7), torch.randn(199, 5, 7), make_filter(kind, 7), torch.ones(1)
    new = states.clone()
    change = kernels.sweep_(new, product, None, None, filter, one, one, "tanh")
    graph, replayed = torch.cuda.CUDAGraph(), states.clone()
    with torch.cuda.graph(graph):
        replayed_change = kernels.sweep_(replayed, product, None, None, filter, one, one, "tanh")
    replayed.copy_(states)
    graph.replay()
    assert torch.equal(replayed, new)
    assert torch.equal(replayed_change, change)
