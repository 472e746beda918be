"""The C++ kernels of the recurrence solved in parallel over depth: exactness, threads, memory, refusals.

The oracle is a loop over the layers in long double. It shares no code with the kernels or with their reference.
"""

import numpy as np
import pytest
import torch
from support.guards import between_guards, writable_between_guards
from support.numerics import as_exact, assert_by_the_rule, needs_more_digits, threads
from support.pairwise import pairwise

from lcw_ops.ops import backends
from lcw_ops.ops.parallel_depth import op as ops
from lcw_ops.reference import parallel_depth as reference

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        backends.missing_reason(ops.SWEEP, "cpp", "cpu") is not None, reason="the C++ extension is not built"
    ),
]

DTYPES = (torch.float32, torch.float64)
FILTERS = ("random", "cycles", "cyclic", "identity", "rotations")
ACTIVATIONS = {
    "tanh": (np.tanh, lambda a: 1 - np.tanh(a) ** 2),
    "relu": (lambda a: np.maximum(a, 0), lambda a: (a > 0).astype(a.dtype)),
    "sigmoid": (lambda a: 1 / (1 + np.exp(-a)), lambda a: 1 / (1 + np.exp(-a)) * (1 - 1 / (1 + np.exp(-a)))),
    "identity": (lambda a: a, np.ones_like),
}
# (layers D, rows M, units N): empty, one, primes, widths near those of vectors, more rows than pass through the layers
# together, long rows.
SHAPES = (
    *((0, 3, 5), (5, 0, 7), (7, 2, 0), (1, 1, 1), (7, 3, 1), (5, 3, 2), (3, 2, 3), (11, 4, 7), (3, 1, 8), (5, 3, 9)),
    *((4, 3, 13), (3, 2, 16), (2, 2, 17), (5, 1, 31), (2, 3, 33), (4, 3, 64), (3, 2, 131), (3, 47, 130), (2, 1, 5003)),
)


def kernels():
    return ops.get_kernels("cpp")


def make_filter(kind, width):
    if kind == "rotations":
        angle = torch.rand((width + 1) // 2, dtype=torch.float64) * 6.3
        cosine = angle.cos().repeat_interleave(2)[:width]
        sine = torch.stack((angle.sin(), -angle.sin()), dim=1).flatten()[:width]
        sine[width - width % 2 :] = 0
        return torch.cat((cosine, sine))
    unit = torch.arange(width)
    if kind == "random":
        return torch.randperm(width)
    if kind == "cycles":  # of three units each; the remaining units stay
        return torch.where(unit < width // 3 * 3, unit // 3 * 3 + (unit + 1) % 3, unit)
    return (unit - 1) % width if kind == "cyclic" and width else unit


def wide(tensor):
    return tensor.numpy().astype(np.longdouble)


def apply(filter, states):
    if not filter.is_floating_point():
        return states[..., filter.numpy()]
    cosine, sine = wide(filter).reshape(2, -1)
    result = cosine * states
    pairs = states.shape[-1] // 2 * 2
    partner = np.arange(pairs) ^ 1
    result[..., :pairs] += sine[:pairs] * states[..., partner]
    return result


def run(first, terms, filter, alpha):
    states = [first]
    for layer in range(len(terms)):
        states.append(alpha[layer] * apply(filter, states[-1]) + terms[layer])
    return np.stack(states)


def per_layer(scale, layers):
    return np.broadcast_to(wide(scale), (layers,))


def pre_activation(product, bias, inputs):
    result = wide(product)
    if bias is not None:
        result = result + (wide(bias)[:, None] if bias.dim() == 2 else wide(bias))
    return result if inputs is None else result + wide(inputs)


def exact_sweep(states, product, bias, inputs, filter, alpha, beta, activation):
    layers = len(states) - 1
    if product is None:
        terms = np.zeros_like(wide(states[1:]))
    else:
        act = ACTIVATIONS[activation][0](pre_activation(product, bias, inputs))
        terms = per_layer(beta, layers)[:, None, None] * act
    return run(wide(states[0]), terms, filter, per_layer(alpha, layers))


def exact_adjoint(gradients, product, outside, filter, alpha):
    layers = len(gradients) - 1
    terms = sum((wide(term) for term in (product, outside) if term is not None), np.zeros_like(wide(gradients[1:])))
    return run(wide(gradients[-1]), terms[::-1], filter, per_layer(alpha, layers)[::-1])[::-1]


def eager_run(first, terms, filter, alpha):
    """The recurrence layer by layer in the states' dtype. The reference sums in pairs, which rounds less than that."""
    states = [first]
    for scale, term in zip(alpha.expand(len(terms)), terms, strict=True):
        states.append(scale * reference.apply_filter(states[-1], filter) + term)
    return torch.stack(states)


def some_scale(layers, dtype, shared, around=1.0):
    return around + (torch.rand(1 if shared else layers, dtype=dtype) - 0.5) / max(layers, 1)


# Ways to give an argument that may be left out, or be shared over the layers.
BIASES = (None, "shared", "per layer")
SWEEPS = {"bias": BIASES, "inputs": (False, True), "alpha_shared": (True, False), "beta_shared": (True, False)}
ADJOINTS = dict.fromkeys(("product", "outside", "slope"), (False, True)) | {"alpha_shared": (True, False)}
EVERY_SIZE_OF_A_SWEEP = pairwise(shape=SHAPES, activation=ACTIVATIONS, **SWEEPS)
EVERY_SIZE_OF_AN_ADJOINT = pairwise(shape=SHAPES, **ADJOINTS)
EVERY_SIZE_OF_AN_ACTIVATION = pairwise(
    shape=(*SHAPES, (40, 23, 91)),
    activation=ACTIVATIONS,
    bias=BIASES,
    inputs=(False, True),
    beta_shared=(True, False),
    thread_count=(1, 2, 3),
)


def sweep_arguments(shape, dtype, kind, activation, bias="per layer", inputs=True, alpha_shared=True, beta_shared=True):
    layers, rows, width = shape
    bias_shape = {"shared": (width,), "per layer": (layers, width)}.get(bias)
    return [
        torch.randn(layers + 1, rows, width, dtype=dtype),
        torch.randn(shape, dtype=dtype),
        None if bias_shape is None else torch.randn(bias_shape, dtype=dtype),
        torch.randn(shape, dtype=dtype) if inputs else None,
        make_filter(kind, width),
        some_scale(layers, dtype, alpha_shared),
        some_scale(layers, dtype, beta_shared, around=0.5),
        activation,
    ]


def adjoint_arguments(shape, dtype, kind, product=True, outside=True, slope=True, alpha_shared=True):
    layers, rows, width = shape
    terms = [torch.randn(shape, dtype=dtype) if given else None for given in (product, outside, slope)]
    scaled = torch.full(shape, torch.nan, dtype=dtype) if slope else None
    states = torch.randn(layers + 1, rows, width, dtype=dtype)
    alpha = some_scale(layers, dtype, alpha_shared)
    return [states, *terms[:2], make_filter(kind, width), alpha, terms[2], scaled]


def cases_of(activation, table):
    """The table's cases of this activation, without the key "activation"."""
    for case in table:
        if case["activation"] == activation:
            yield {name: value for name, value in case.items() if name != "activation"}


def carried_out(function, arguments):
    """Call the function on copies; return the copies, which it may have written, and its result."""
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    return copies, function(*copies)


def assert_residual(returned, new, old):
    """The change is right to the rounding of a division in the states' own type."""
    assert returned.shape == (1,)
    assert returned.dtype == torch.float64
    expected = reference.relative_change(new, old)
    torch.testing.assert_close(returned, expected, rtol=2 * torch.finfo(new.dtype).eps, atol=0)


def assert_unchanged(copies, arguments, written):
    for index, (copy, argument) in enumerate(zip(copies, arguments, strict=True)):
        if index not in written and isinstance(argument, torch.Tensor):
            assert torch.equal(copy, argument)


def by_the_rule(name, results, eager, exact):
    digits = as_exact(results[0]).dtype
    assert_by_the_rule(name, results, eager, [array.astype(digits) for array in exact])


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sweep_of_every_size_by_the_rule(dtype, activation, kind):
    needs_more_digits(dtype)
    results, eager, exact = [], [], []
    for case in cases_of(activation, EVERY_SIZE_OF_A_SWEEP):
        arguments = sweep_arguments(dtype=dtype, kind=kind, activation=activation, **case)
        copies, change = carried_out(kernels().sweep_, arguments)
        assert_unchanged(copies, arguments, written=(0,))
        assert torch.equal(copies[0][0], arguments[0][0])
        assert_residual(change, copies[0][1:], arguments[0][1:])
        results.append(copies[0])
        eager.append(carried_out(reference.sweep_, arguments)[0][0])
        exact.append(exact_sweep(*arguments))
    by_the_rule("states", results, eager, exact)


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adjoint_sweep_of_every_size_by_the_rule(dtype, kind):
    needs_more_digits(dtype)
    results, eager, exact = [], [], []
    for case in EVERY_SIZE_OF_AN_ADJOINT:
        arguments = adjoint_arguments(dtype=dtype, kind=kind, **case)
        copies, change = carried_out(kernels().adjoint_sweep_, arguments)
        assert_unchanged(copies, arguments, written=(0, 6))
        assert torch.equal(copies[0][-1], arguments[0][-1])
        assert_residual(change, copies[0][:-1], arguments[0][:-1])
        if arguments[5] is not None:
            assert torch.equal(copies[6], arguments[5] * copies[0][1:])
        results.append(copies[0])
        eager.append(carried_out(reference.adjoint_sweep_, arguments)[0][0])
        exact.append(exact_adjoint(*arguments[:5]))
    by_the_rule("gradients", results, eager, exact)


@pytest.mark.parametrize("derivative", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_every_size_by_the_rule(dtype, activation, derivative):
    needs_more_digits(dtype)
    results, eager, exact = [], [], []
    for case in cases_of(activation, EVERY_SIZE_OF_AN_ACTIVATION):
        thread_count, shape = case.pop("thread_count"), case["shape"]
        _, product, bias, inputs, _, _, beta, _ = sweep_arguments(
            dtype=dtype, kind="identity", activation=activation, **case
        )
        arguments = [product, bias, inputs, beta, activation, derivative]
        with threads(thread_count):
            copies, _ = carried_out(kernels().activate_, arguments)
        assert_unchanged(copies, arguments, written=(0,))
        results.append(copies[0])
        eager.append(carried_out(reference.activate_, arguments)[0][0])
        act = ACTIVATIONS[activation][derivative](pre_activation(product, bias, inputs))
        exact.append(per_layer(beta, shape[0])[:, None, None] * act)
    by_the_rule(activation, results, eager, exact)


# ---- Threads ---------------------------------------------------------------------------------------------------------

# (D, M, N) with few rows and many layers, which threads share in chunks: chunks of different lengths, an odd width, a
# small width.
LONG = ((1001, 1, 64), (600, 2, 97), (6007, 1, 8))


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_in_chunks_by_the_rule(dtype, kind):
    """Layers in chunks are as exact on any number of threads, with the same bits twice on the same number."""
    needs_more_digits(dtype)
    for shape in LONG if kind == "rotations" and dtype == torch.float32 else LONG[:2]:
        forward = sweep_arguments(shape, dtype, kind, "tanh")
        back = adjoint_arguments(shape, dtype, kind)
        start, product, bias, inputs, filter, alpha, beta, activation = forward
        terms, _ = carried_out(reference.activate_, [product, bias, inputs, beta, activation, False])
        gradients, product, outside, filter_back, alpha_back, slope, _ = back
        eager = (
            eager_run(start[0], terms[0], filter, alpha),
            eager_run(gradients[-1], (product + outside).flip(0), filter_back, alpha_back.flip(0)).flip(0),
        )
        exact = exact_sweep(*forward), exact_adjoint(*back[:5])
        for count in (1, 2, 5):
            with threads(count):
                (states, *_), change = carried_out(kernels().sweep_, forward)
                again, _ = carried_out(kernels().sweep_, forward)
                copies, back_change = carried_out(kernels().adjoint_sweep_, back)
            assert torch.equal(states, again[0])
            assert_residual(change, states[1:], forward[0][1:])
            assert_residual(back_change, copies[0][:-1], back[0][:-1])
            by_the_rule(f"states, {count} threads", [states], eager[:1], exact[:1])
            by_the_rule(f"gradients, {count} threads", [copies[0]], eager[1:], exact[1:])
            scaled = wide(slope) * exact[1][1:]
            by_the_rule(f"scaled, {count} threads", [copies[6]], [slope * eager[1][1:]], [scaled])


@pytest.mark.parametrize("kind", FILTERS)
def test_rows_have_the_same_bits_on_any_number_of_threads(kind):
    arguments = sweep_arguments(
        (60, 29, 40), torch.float32, kind, "tanh", inputs=False, alpha_shared=False, beta_shared=False
    )
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            copies, change = carried_out(kernels().sweep_, arguments)
        results.append((copies[0], change))
    assert all(torch.equal(states, results[0][0]) and change == results[0][1] for states, change in results)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_rotations_do_not_drift_over_50_000_layers(count):
    """Chunks hand their states on in float64, so layer l is turned by l times the angle to float32's rounding."""
    layers, width = 50_000, 8
    filter = make_filter("rotations", width)
    angle = torch.atan2(filter[width::2], filter[:width:2])
    states = torch.full((layers + 1, 1, width), torch.nan)
    states[0] = torch.randn(1, width)
    with threads(count):
        kernels().sweep_(states, None, None, None, filter, torch.ones(1), torch.ones(1), "tanh")
    start = torch.view_as_complex(states[0, 0].double().view(-1, 2))
    # (O h)_0 = c h_0 + s h_1 turns h_0 + i h_1 by minus the angle.
    phase = torch.arange(layers + 1)[:, None] * -angle
    exact = torch.view_as_real(torch.polar(torch.ones_like(phase), phase) * start).reshape(states.shape)
    error = (states - exact).abs().max() / exact.abs().max()
    # The limit is half an ulp of float32, once, plus the drift of float64, which is 50,000 times float64's rounding.
    assert error <= 0.5 * torch.finfo(torch.float32).eps + layers * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("count", [1, 3])
def test_a_state_of_zero_stays_zero_however_the_others_grow(count):
    """1.1 to the power of 12,000 overflows, and infinity times zero would be NaN."""
    states = torch.full((12_001, 2, 8), torch.nan, dtype=torch.float64)
    states[0] = 0
    with threads(count):
        kernels().sweep_(
            states, None, None, None, torch.arange(8), states.new_tensor([1.1]), states.new_ones(1), "tanh"
        )
    assert torch.equal(states, torch.zeros_like(states))


# ---- The relative change ---------------------------------------------------------------------------------------------


def change_of(old, new, count=1):
    """The change of a sweep from ``old`` to ``new``: with alpha = 0 and beta = 1 the new states are the product."""
    layers, _, width = new.shape
    states = torch.cat((torch.zeros_like(new[:1]), old))
    none, one = new.new_zeros(layers), new.new_ones(1)
    with threads(count):
        change = kernels().sweep_(states, new.clone(), None, None, torch.arange(width), none, one, "identity")
    torch.testing.assert_close(states[1:], new, rtol=0, atol=0, equal_nan=True)
    return change.item()


@pytest.mark.parametrize("width", [1, 5, 8, 19, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_relative_change_of_zero_infinity_and_nan(dtype, width):
    new = torch.randn(3, 2, width, dtype=dtype) + 4
    assert change_of(new, new) == 0
    assert change_of(torch.zeros_like(new), torch.zeros_like(new)) == 0
    assert change_of(torch.zeros_like(new), new) == 1
    assert change_of(new, torch.zeros_like(new)) == torch.inf
    for place in (0, width // 2, width - 1):
        for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            spoilt = new.clone()
            spoilt[-1, 1, place] = bad
            assert not np.isfinite(change_of(new, spoilt))
            assert not np.isfinite(change_of(spoilt, new))
            # An infinity that stays does not count as convergence either.
            assert np.isnan(change_of(spoilt, spoilt))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_relative_change_at_any_scale(dtype, scale):
    """Squares and products of states neither vanish nor overflow, and the largest ratio of any row counts."""
    new = torch.full((4, 3, 17), 2, dtype=dtype)
    new[:, 1] /= 1024
    old = new.clone()
    old[2, 1, 9] *= 1.5
    old[2, 0, 3] *= 1.25
    assert change_of(old * scale, new * scale) == pytest.approx(0.5, rel=0.05 if scale == 1e-40 else 1e-6)


@pytest.mark.parametrize("count", [1, 4])
def test_the_largest_change_is_found_wherever_it_is(count):
    shape = (900, 2, 40)
    for layer, row, unit in ((0, 0, 0), (899, 1, 39), (450, 0, 17), (200, 1, 33), (711, 0, 39)):
        new = torch.ones(shape)
        old = new.clone()
        old[layer, row, unit] = -2
        assert change_of(old, new, count) == 3
        old[layer, row, unit] = torch.nan
        assert np.isnan(change_of(old, new, count))


# ---- As registered ops -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["sweep_", "adjoint_sweep_", "activate_"])
@pytest.mark.parametrize("layers", [0, 4])
def test_opcheck(op, layers):
    shape = (layers, 3, 6)
    arguments = {
        "sweep_": sweep_arguments(shape, torch.float32, "random", "tanh"),
        "adjoint_sweep_": adjoint_arguments(shape, torch.float32, "random"),
        "activate_": [torch.randn(shape), None, None, torch.ones(1), "tanh", True],
    }
    torch.library.opcheck(getattr(kernels(), op), arguments[op], test_utils=("test_schema", "test_faketensor"))


# ---- Arguments that the kernels refuse -------------------------------------------------------------------------------

ADVICE = r"; call lcw_ops\.functional\.orthogonal_filter"


def good_sweep():
    return sweep_arguments((4, 3, 6), torch.float32, "random", "tanh")


def good_adjoint():
    return adjoint_arguments((4, 3, 6), torch.float32, "random")


def good_activate():
    _, product, bias, inputs, _, _, beta, activation = good_sweep()
    return [product, bias, inputs, beta, activation, False]


STATES = torch.ones(5, 3, 6)
TERMS = torch.ones(4, 3, 6)
WRONG_TERMS = (TERMS[:3], TERMS.double(), torch.ones(4, 6, 3), torch.ones(4, 3, 12)[..., ::2], TERMS[..., None])
WRONG_SCALES = (torch.ones(()), torch.ones(3), torch.ones(1, 1), torch.ones(1, dtype=torch.float64), torch.ones(8)[::2])
WRONG_FILTERS = (
    *(torch.arange(5), torch.arange(6) + 1, torch.tensor([0, 1, 2, 3, 4, -1]), torch.zeros(6, dtype=torch.int64)),
    *(torch.arange(6).int(), torch.ones(12), torch.ones(6, dtype=torch.float64), torch.ones(6, 6).double()),
    *(torch.arange(12)[::2], torch.ones(24).double()[::2], torch.tensor([0, 1, 2, 3, 4, 2**62])),
)
WRONG_BIASES = (torch.ones(5), torch.ones(3, 6), torch.ones(6, dtype=torch.float64), torch.ones(1, 6))
WRONG_STATES = (STATES.half(), STATES.int(), STATES[0], STATES.mT, STATES[:0])
REFUSED = {
    "sweep_": (
        good_sweep,
        {
            0: ("states", (*WRONG_STATES, torch.ones(6, 3, 6))),
            1: ("product", WRONG_TERMS),
            2: ("bias", WRONG_BIASES),
            3: ("inputs", WRONG_TERMS),
            4: ("filter", WRONG_FILTERS),
            5: ("alpha", WRONG_SCALES),
            6: ("beta", WRONG_SCALES),
            7: ("activation", ("gelu", "")),
        },
    ),
    "adjoint_sweep_": (
        good_adjoint,
        {
            0: ("gradients", (*WRONG_STATES, torch.ones(6, 3, 6))),
            1: ("product", WRONG_TERMS),
            2: ("outside", WRONG_TERMS),
            3: ("filter", WRONG_FILTERS),
            4: ("alpha", WRONG_SCALES),
            5: ("slope", (*WRONG_TERMS, None)),
            6: ("scaled", (*WRONG_TERMS, None)),
        },
    ),
    "activate_": (
        good_activate,
        {
            0: ("product", (TERMS.half(), TERMS[0], TERMS.mT)),
            1: ("bias", WRONG_BIASES),
            2: ("inputs", WRONG_TERMS),
            3: ("beta", WRONG_SCALES),
            4: ("activation", ("gelu", "")),
        },
    ),
}


@pytest.mark.parametrize(
    ("op", "place"), [(op, place) for op, (_, wrong) in REFUSED.items() for place in wrong], ids=str
)
def test_wrong_arguments_are_refused_before_the_first_write(op, place):
    good, wrong = REFUSED[op]
    name, values = wrong[place]
    # If the state has another shape, the error names the argument after it, which then does not fit.
    named = f"{name}|product" if place == 0 else name
    for value in values:
        arguments = good()
        arguments[place] = value
        before = [argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        with pytest.raises(RuntimeError, match=rf"parallel_depth_\w+_: .*({named}).*{ADVICE}"):
            getattr(kernels(), op)(*arguments)
        for argument, old in zip(arguments, before, strict=True):
            if isinstance(argument, torch.Tensor):
                torch.testing.assert_close(argument, old, rtol=0, atol=0, equal_nan=True)


# ---- In separate processes -------------------------------------------------------------------------------------------


GUARDED = [
    {"shape": (3, case.pop("rows"), case.pop("width")), **case}
    for case in pairwise(rows=(1, 5), width=(1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64), kind=FILTERS, **SWEEPS)
]


@pytest.mark.parametrize("flush", ["front", "back"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_nothing_but_the_arguments_is_touched(count, dtype, flush):
    """The pages beside each argument are unreadable, and arguments that are only read cannot be written to."""
    for case in [*GUARDED, *([{"shape": LONG[1], "kind": "random"}] if count > 1 else [])]:
        shape, kind, alpha_shared = case["shape"], case["kind"], case.get("alpha_shared", True)
        calls = (
            (kernels().sweep_, sweep_arguments(dtype=dtype, activation="tanh", **case), (0,)),
            (kernels().adjoint_sweep_, adjoint_arguments(shape, dtype, kind, alpha_shared=alpha_shared), (0, 6)),
            (kernels().activate_, [torch.randn(shape, dtype=dtype), None, None, torch.ones(1, dtype=dtype)], (0,)),
        )
        for function, arguments, written in calls:
            guarded = [
                (writable_between_guards if place in written else between_guards)(argument, flush)
                if isinstance(argument, torch.Tensor)
                else argument
                for place, argument in enumerate(arguments)
            ]
            with threads(count):
                function(*guarded, *(("tanh", False) if function is kernels().activate_ else ()))
            assert all(guarded[place].isfinite().all() for place in written)
