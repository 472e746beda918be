"""The Triton kernels of the recurrence against the float64 reference, through the public function and the ops.

Without a GPU they run in Triton's interpreter (see support/triton_process.py), which is slow: every shape is as small
as its test allows.
"""

import itertools

import pytest
import torch
from support.numerics import assert_as_exact_as_eager, hostile_layouts
from support.recurrence import NAMES, make_arguments, make_filter, run
from support.triton_process import import_kernels

import lcw_ops
from lcw_ops import functional as F
from lcw_ops.ops.orthogonal_filter import op
from lcw_ops.reference.orthogonal_filter import ACTIVATIONS as EXACT

ACTIVATIONS = ("tanh", "relu", "sigmoid", "identity")
kernels = import_kernels("orthogonal_filter", op.NAME)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _on_triton():
    with lcw_ops.use_backend("triton"):
        yield


def overload(name):
    return op.library.get_overload(name, "triton")


def results_and_gradients(arguments, filter, grad_output, options):
    output = run(arguments, filter, **options)
    present = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    gradients = torch.autograd.grad(output, present, grad_output.to(output.dtype), materialize_grads=True)
    names = [name for name, argument in zip(NAMES, arguments, strict=True) if isinstance(argument, torch.Tensor)]
    return dict(zip(["output", *names], [output, *gradients], strict=True))


def to_float64(arguments, filter):
    wide = [
        argument.detach().double().requires_grad_() if isinstance(argument, torch.Tensor) else argument
        for argument in arguments
    ]
    return wide, filter.double() if filter.is_floating_point() else filter


def assert_matches_reference(draw, draws=1, **options):
    """The result and every gradient have at most twice eager's error, over several draws of (arguments, filter).

    One draw is not enough, because eager torch may by chance be exact on a few numbers. Over 60 draws of 5 x 16, its
    mean error was as large as the kernel's, and its largest error was larger.
    """
    judged = {}
    for _ in range(draws):
        arguments, filter = draw()
        rows, width = arguments[0].shape
        steps = arguments[1].shape[0] if arguments[1].dim() == 3 else arguments[-1].shape[0]
        shape = (steps + 1, rows, width) if options.get("return_states") else (rows, width)
        grad_output = torch.randn(shape, device=arguments[0].device)
        actual = results_and_gradients(arguments, filter, grad_output, options)
        with lcw_ops.use_backend("reference"):
            plain = {name: value for name, value in options.items() if name != "segment"}
            eager = results_and_gradients(arguments, filter, grad_output, plain)
            exact = results_and_gradients(*to_float64(arguments, filter), grad_output, plain)
        for name, value in exact.items():
            assert actual[name].shape == value.shape
            judged.setdefault(name, []).append([tensor.flatten() for tensor in (actual[name], eager[name], value)])
    for name, triples in judged.items():
        assert_as_exact_as_eager(name, *(torch.cat(column) for column in zip(*triples, strict=True)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("filter_kind", ["matrix", "permutation", "per_layer"])
@pytest.mark.parametrize("shared", [False, True])
def test_every_kind_matches_the_reference(activation, filter_kind, shared, device):
    def draw():
        return make_arguments(5, 17, 4, shared, device=device), make_filter(filter_kind, 4, 17, device=device)

    # Each pair of an activation and a value of ``shared`` is tested with one of the two values.
    return_states = (activation in ("tanh", "identity")) != shared
    assert_matches_reference(draw, 4, activation=activation, return_states=return_states, segment=3)


@pytest.mark.parametrize(
    ("rows", "width"), [*itertools.product([1, 5], [1, 3, 16, 17, 64, 100]), (33, 3), (33, 17), (33, 64), (5, 128)]
)
def test_every_size_matches_the_reference(rows, width, device):
    def draw():
        return make_arguments(rows, width, 3, device=device), make_filter("matrix", 3, width, device=device)

    assert_matches_reference(draw, 8 if rows * width < 100 else 3, return_states=True)


@pytest.mark.parametrize("segment", [1, 7, 8, 2**63 - 1, None])
def test_every_segment_matches_the_reference(segment, device):
    def draw():
        return make_arguments(3, 5, 9, device=device), make_filter("per_layer", 9, 5, device=device)

    assert_matches_reference(draw, 2, segment=segment, return_states=segment == 7)


def test_many_segments_match_the_reference(device):
    def draw():
        return make_arguments(3, 8, 60, device=device), make_filter("matrix", 60, 8, device=device)

    assert_matches_reference(draw, segment=8)


@pytest.mark.parametrize("segment", [1, 2, 3, 7, 20, None])
@pytest.mark.parametrize("filter_kind", ["per_layer", "permutation"])
@pytest.mark.parametrize("return_states", [False, True])
def test_several_forward_launches_have_the_bits_of_one(segment, filter_kind, return_states, device, monkeypatch):
    """Each launch has the transposes of three layers: parts of a segment, a segment, or several."""
    arguments, filter = make_arguments(3, 5, 10, device=device), make_filter(filter_kind, 10, 5, device=device)
    matrices = 2 if filter_kind == "per_layer" else 1
    options = {"segment": segment, "return_states": return_states}

    def results():
        shape = (11, 3, 5) if return_states else (3, 5)
        return results_and_gradients(arguments, filter, torch.ones(shape, device=device), options).values()

    one = results()
    launched = []
    launches = kernels._Recurrence.launches
    monkeypatch.setattr(
        kernels._Recurrence, "launches", lambda *given: launched.extend(launches(*given)) or launches(*given)
    )
    monkeypatch.setattr(kernels, "MOST_TRANSPOSED_BYTES", 3 * matrices * 5 * 5 * 4 + 1)
    several = results()
    assert all(torch.equal(a, b) for a, b in zip(several, one, strict=True))
    assert len(launched) >= 4
    assert [end - first for first, end in launched if end - first > 3] == []
    assert [first for first, _ in launched] + [10] == [0] + [end for _, end in launched]


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("return_states", [False, True])
def test_empty_batch_and_no_layers(rows, depth, return_states, device):
    def draw():
        return make_arguments(rows, 5, depth, device=device), make_filter("permutation", depth, 5, device=device)

    assert_matches_reference(draw, return_states=return_states)


@pytest.mark.parametrize("processors", [4, 132])
@pytest.mark.parametrize("shared", [False, True])
def test_every_tile_matches_the_reference(processors, shared, device, monkeypatch):
    """Tiles are chosen as for a GPU with this number of multiprocessors. The last tile is not full."""
    monkeypatch.setattr(kernels, "device_facts", lambda device: kernels.Device(processors, 227 * 1024, False))

    def draw():
        return make_arguments(21, 17, 3, shared, device=device), make_filter("matrix", 3, 17, device=device)

    assert_matches_reference(draw, return_states=True)


@pytest.mark.parametrize("scale", ["number", "shared", "per_layer"])
@pytest.mark.parametrize("shared", [False, True])
def test_every_form_of_the_scales(scale, shared, device):
    """There is no bias here, and there are no inputs if the weight gives the number of steps."""
    make_scale = {
        "number": lambda: 0.3,
        "shared": lambda: torch.rand(1, device=device, requires_grad=True),
        "per_layer": lambda: torch.rand(4, device=device, requires_grad=True),
    }[scale]

    def draw():
        h0, weight, _, _, _, inputs = make_arguments(5, 6, 4, shared, device=device)
        arguments = [h0, weight, None, make_scale(), make_scale(), inputs if shared else None]
        return arguments, make_filter("matrix", 4, 6, device=device)

    assert_matches_reference(draw, 2 if scale == "number" else 6, segment=3)


@pytest.mark.parametrize("shared_dim", [1, 2])
def test_shared_parameters_are_summed_in_float64(shared_dim, device):
    """A float32 sum that only grows loses accuracy: a part of each of 3000 segments would be rounded away."""
    parameter = torch.zeros((3,) * shared_dim, device=device)
    delta, states = torch.rand(2, 5, 3, device=device), torch.rand(2, 5, 3, device=device)
    gradient = kernels._ParameterGradient(parameter, shared_dim, rows=5)
    for segment in range(3000):
        if shared_dim == 2:
            gradient.add_products(2 * segment, delta, states)
        else:
            gradient.add_sums(2 * segment, delta)
    wide = delta.double()
    once = torch.einsum("lmo,lmi->oi", wide, states.double()) if shared_dim == 2 else wide.sum((0, 1))
    # The bound covers five products of one sign in float32, and the last rounding.
    torch.testing.assert_close(gradient.result().double(), 3000 * once, rtol=6 * torch.finfo().eps, atol=0)


@pytest.mark.parametrize("name", [*NAMES, "filter", "grad_output"])
def test_hostile_strides(name, device):
    """Every layout of every argument gives the same bits as a contiguous argument."""
    arguments = make_arguments(4, 9, 3, device=device)
    filter = make_filter("matrix", 3, 9, device=device)
    grad_output = torch.randn(4, 9, device=device)

    def results(arguments, filter, grad_output):
        output = run(arguments, filter)
        return [output, *torch.autograd.grad(output, arguments, grad_output)]

    expected = results(arguments, filter, grad_output)
    values = {**dict(zip(NAMES, arguments, strict=True)), "filter": filter, "grad_output": grad_output}
    for layout in hostile_layouts(values[name].detach()).values():
        changed = values | {name: layout.requires_grad_(name in NAMES)}
        actual = results([changed[name] for name in NAMES], changed["filter"], changed["grad_output"])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    if name == "grad_output":
        expanded = torch.randn((), device=device).expand(4, 9)
        actual = results(arguments, filter, expanded)
        expected = results(arguments, filter, expanded.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_same_bits_every_time(device):
    arguments = make_arguments(33, 20, 4, device=device)
    filter = make_filter("matrix", 4, 20, device=device)
    results = []
    for _ in range(2):
        output = run(arguments, filter)
        results.append([output, *torch.autograd.grad(output.sum(), arguments)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_activation_error_in_ulps(activation, dtype, device):
    """Arguments from the whole range, with W = I and alpha = 0, so that the products are exact."""
    exponents = torch.linspace(-30, 7, 64 * 48, dtype=torch.float64)
    values = torch.cat([-(2**exponents), 2**exponents]).to(device, dtype).reshape(-1, 64)
    eye = torch.eye(64, dtype=dtype, device=device).unsqueeze(0)
    identity = torch.arange(64, device=device)
    actual = F.orthogonal_filter(values, eye, None, identity, alpha=0.0, beta=1.0, activation=activation)
    expected = EXACT[activation](values.double())
    error = (actual.double() - expected).abs() / (expected.abs() * torch.finfo(dtype).eps)
    normal = expected.abs() > torch.finfo(dtype).tiny * 2**10
    # The float64 oracle itself is accurate to 1 ulp; a GPU's float32 division adds up to 2.
    allowed = 5 if dtype == torch.float64 else 4 + 2 * (device.type == "cuda")
    print(f"{activation} {dtype}: {error[normal].max():.2f} ulp")
    assert error[normal].max() < allowed


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_nan_and_saturate(activation, device):
    values = torch.tensor([[-torch.inf, -1e30, -20.0, 0.0, 1e-20, 20.0, 1e30, torch.inf, torch.nan]], device=device).mT
    one, identity = torch.ones(1, 1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    actual = F.orthogonal_filter(values, one, None, identity, alpha=0.0, beta=1.0, activation=activation)
    finite = values.isfinite()
    expected = EXACT[activation](values.double())
    torch.testing.assert_close(actual[finite].double(), expected[finite], rtol=6 * torch.finfo().eps, atol=1e-37)
    assert actual[values.isnan()].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_row(bad, device):
    arguments = [tensor.detach() for tensor in make_arguments(3, 9, 3, device=device)]
    filter = make_filter("matrix", 3, 9, device=device)
    clean = run(arguments, filter, activation="identity")
    arguments[0][1, 2] = bad
    dirty = run(arguments, filter, activation="identity")
    assert not dirty[1].isfinite().any()
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])


def test_padding_never_reaches_the_result(device):
    """17 of a tile's 32 columns exist. The weights of the others are 0, but with an infinite state 0 * inf is NaN."""
    h0, weight, bias, *_ = [tensor.detach() for tensor in make_arguments(1, 17, 3, device=device)]
    h0[0, 0] = torch.inf
    filter = torch.arange(17, device=device).roll(1)
    actual = F.orthogonal_filter(h0, weight, bias, filter)
    with lcw_ops.use_backend("reference"):
        expected = F.orthogonal_filter(h0, weight, bias, filter)
    assert expected.isfinite().sum() == 16
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wrong", [[0, 1, 2, 2], [0, 1, 2, 4], [0, -1, 2, 3], [0, 1, 2, 10**6], [-(10**6), 1, 2, 3]])
def test_a_wrong_permutation_gives_nan(wrong, device):
    """The op, which does not have the public function's check, gives NaN and never reads out of bounds."""
    h0, weight, bias, alpha, beta, _ = [t.detach() for t in make_arguments(2, 4, 3, device=device)]
    filter = torch.tensor(wrong, device=device)
    output, _ = overload(op.NAME)(h0, weight, bias, filter, alpha, beta, None, 3, "identity", 0, False)
    assert output.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_sixteen_bit_weight_beside_a_float32_state(dtype, shared, device):
    """The result has the same bits as for the weight in float32. The weight's gradient is rounded once."""
    h0, weight, bias, alpha, beta, inputs = [t.detach() for t in make_arguments(5, 17, 4, shared, device=device)]
    filter = make_filter("matrix", 4, 17, device=device)
    narrow = weight.to(dtype)
    grad_output = torch.randn_like(h0)
    results = []
    for weight in (narrow, narrow.float()):
        shared_arguments = (weight, bias, filter, alpha, beta, inputs, 4, "tanh", 3)
        output, checkpoints = overload(op.NAME)(h0, *shared_arguments, False)
        gradients = overload(op.BACKWARD)(grad_output, checkpoints, *shared_arguments, *(True,) * 5)
        results.append([output, checkpoints, *gradients])
    narrow_results, wide_results = results
    assert narrow_results[3].dtype == dtype
    wide_results[3] = wide_results[3].to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(narrow_results, wide_results, strict=True))


def sixteen_bit_arguments(device, dtype=torch.bfloat16):
    h0, weight, bias, *_ = [t.detach().to(dtype).requires_grad_() for t in make_arguments(3, 5, 4, device=device)]
    return h0, weight, bias, make_filter("matrix", 4, 5, device=device)


def test_the_kernels_take_a_sixteen_bit_weight_as_it_is(device, monkeypatch):
    """The public function makes no float32 copy of the weight, and the gradient has the weight's dtype."""
    seen = []
    for name in ("orthogonal_filter", "orthogonal_filter_backward"):
        launch = getattr(kernels, name)
        # weight is the second argument forward and the third argument backward.
        place = 1 if name == "orthogonal_filter" else 2
        monkeypatch.setattr(
            kernels, name, lambda *a, launch=launch, place=place: seen.append(a[place].dtype) or launch(*a)
        )
    h0, weight, bias, filter = sixteen_bit_arguments(device)
    output = F.orthogonal_filter(h0, weight, bias, filter)
    output.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert output.dtype == torch.bfloat16
    assert {tensor.grad.dtype for tensor in (h0, weight, bias)} == {torch.bfloat16}
    wide = [tensor.detach().float().requires_grad_() for tensor in (h0, weight, bias)]
    expected = F.orthogonal_filter(*wide, filter)
    assert torch.equal(output, expected.bfloat16())
    expected.sum().backward()
    for narrow, tensor in zip((h0, weight, bias), wide, strict=True):
        assert torch.equal(narrow.grad, tensor.grad.bfloat16())


def test_second_order_and_forward_mode_in_sixteen_bits(device):
    """Compares with float32 on the same numbers. In 16 bits, every result is rounded a few times."""
    h0, weight, bias, filter = sixteen_bit_arguments(device)
    wide = [tensor.detach().float().requires_grad_() for tensor in (h0, weight, bias)]
    direction = [torch.randn_like(tensor) for tensor in wide]

    def derivatives(arguments):
        output = F.orthogonal_filter(*arguments, filter)
        first = torch.autograd.grad(output.float().square().sum(), arguments, create_graph=True)
        second = torch.autograd.grad(sum(gradient.float().square().sum() for gradient in first), arguments)
        tangents = tuple(tangent.to(argument.dtype) for tangent, argument in zip(direction, arguments, strict=True))
        primals = tuple(argument.detach() for argument in arguments)
        _, moved = torch.func.jvp(lambda *primals: F.orthogonal_filter(*primals, filter), primals, tangents)
        return [*second, moved]

    for name, narrow, exact in zip(
        ("h0", "weight", "bias", "jvp"), derivatives([h0, weight, bias]), derivatives(wide), strict=True
    ):
        assert narrow.dtype == torch.bfloat16
        error = (narrow.float() - exact).abs().max() / exact.abs().max()
        # Output, first gradients, tangents and result each add a rounding error of half of 2^-8, and a square doubles
        # the error of its argument.
        assert error < 8 * 2**-8, f"{name}: {error:.3g}"


def test_per_sample_gradients_in_sixteen_bits(device):
    h0, weight, bias, filter = sixteen_bit_arguments(device)
    h0, weight, bias = h0.detach(), weight.detach(), bias.detach()

    def loss(weight, sample):
        return F.orthogonal_filter(sample.unsqueeze(0), weight, bias, filter).float().square().sum()

    actual = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, h0)
    assert actual.dtype == torch.bfloat16
    for sample, gradient in zip(h0, actual, strict=True):
        leaf = weight.clone().requires_grad_()
        loss(leaf, sample).backward()
        assert torch.equal(gradient, leaf.grad)


def test_autocast_computes_in_float32(device):
    h0, weight, bias, filter = sixteen_bit_arguments(device)
    expected = F.orthogonal_filter(h0.float(), weight.float(), bias.float(), filter)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = F.orthogonal_filter(h0, weight, bias, filter)
        gradients = torch.autograd.grad(actual.sum(), (h0, weight, bias))
    assert torch.equal(actual, expected)
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}


@pytest.mark.parametrize("filter_kind", ["matrix", "permutation"])
def test_gradcheck_and_gradgradcheck(filter_kind, device):
    filter = make_filter(filter_kind, 2, 3, torch.float64, device)
    arguments = make_arguments(2, 3, 2, dtype=torch.float64, device=device)

    def function(*arguments):
        return run(arguments, filter, segment=2)

    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True, fast_mode=True)
    if filter_kind == "matrix":  # the reference computes second order, whatever the filter
        assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("batched", ["h0", "weight"])
def test_vmap(batched, device):
    filter = make_filter("matrix", 2, 5, device=device)
    arguments = [t.detach() for t in make_arguments(3, 5, 2, device=device)]
    index = NAMES.index(batched)
    stack = torch.stack([arguments[index], arguments[index] * 0.5], dim=1)

    def function(argument):
        return run([*arguments[:index], argument, *arguments[index + 1 :]], filter, return_states=True)

    actual = torch.vmap(function, in_dims=1)(stack)
    torch.testing.assert_close(actual, torch.stack([function(argument) for argument in stack.unbind(1)]))


def test_compiles_into_one_graph_with_dynamic_shapes(device):
    filters = {width: make_filter("matrix", 3, width, device=device) for width in (6, 9)}

    def loss(h0, weight, bias, filter):
        return F.orthogonal_filter(h0, weight, bias, filter).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, width in ((4, 6), (7, 9)):
        *leaves, _, _, _ = make_arguments(rows, width, 3, device=device)
        expected = torch.autograd.grad(loss(*leaves, filters[width]), leaves)
        actual = torch.autograd.grad(compiled(*leaves, filters[width]), leaves)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("weight_dtype", "filter_kind"), [(torch.float32, "permutation"), (torch.bfloat16, "matrix")], ids=str
)
def test_opcheck(weight_dtype, filter_kind, device):
    h0, weight, bias, alpha, beta, inputs = [t.detach() for t in make_arguments(3, 5, 4, device=device)]
    filter = make_filter(filter_kind, 4, 5, device=device)
    shared = (weight.to(weight_dtype), bias, filter, alpha, beta, inputs, 4, "tanh", 3)
    torch.library.opcheck(overload(op.NAME), (h0, *shared, True))
    _, checkpoints = overload(op.NAME)(h0, *shared, True)
    everything = (torch.randn(5, 3, 5, device=device), checkpoints, *shared, True, True, True, True, True)
    torch.library.opcheck(overload(op.BACKWARD), everything)
    shared = (shared[0], None, filter, alpha, beta, None, 4, "tanh", 3)
    nothing = (torch.randn(3, 5, device=device), checkpoints, *shared, False, False, False, False, False)
    torch.library.opcheck(overload(op.BACKWARD), nothing)


def test_state_gradients_equal_the_references(device):
    h0, weight, bias, alpha, beta, inputs = [
        t.detach() for t in make_arguments(3, 6, 9, dtype=torch.float64, device=device)
    ]
    shared = (weight, bias, make_filter("matrix", 9, 6, torch.float64, device), alpha, beta, inputs, "tanh", 4)
    for shape in ((3, 6), (10, 3, 6)):
        grad_output = torch.randn(shape, dtype=torch.float64, device=device)
        actual = op.state_gradients(grad_output, h0, *shared, "triton")
        expected = op.state_gradients(grad_output, h0, *shared, "reference")
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [(129, torch.float32, "width 129 > 128"), (65, torch.float64, "width 65 > 64"), (300, torch.bfloat16, "> 128")],
    ids=str,
)
def test_a_net_that_is_too_wide_says_so(width, dtype, message, device):
    h0, weight, bias, *_ = [t.detach() for t in make_arguments(2, width, 1, dtype=dtype, device=device)]
    permutation = torch.arange(width, device=device)
    with pytest.raises(lcw_ops.BackendError, match=message):
        F.orthogonal_filter(h0, weight, bias, permutation)
    one = torch.ones(1, device=device)
    with pytest.raises(lcw_ops.BackendError, match="width"):
        overload(op.NAME)(
            h0.float().repeat(1, 2), weight.float(), None, permutation, one, one, None, 1, "tanh", 0, False
        )


def test_the_op_itself_never_reads_out_of_bounds(device):
    h0, weight, eye, one = torch.randn(2, 4), torch.randn(3, 4, 4), torch.eye(4), torch.ones(1)
    for arguments in (
        (h0[0], weight, None, eye, one, one, None, 3),
        (h0, weight, None, eye, one, one, None, 5),
        (h0, weight, torch.randn(3, 5), eye, one, one, None, 3),
        (h0, weight, None, eye[:3], one, one, None, 3),
        (h0, weight, None, torch.arange(5), one, one, None, 3),
        (h0, weight, None, eye, torch.ones(2), one, None, 3),
        (h0, weight, None, eye, one, one, torch.randn(3, 2, 3), 3),
        (h0, weight.double(), None, eye, one, one, None, 3),
        (h0.bfloat16(), weight, None, eye, one, one, None, 3),
        (h0.double(), weight.bfloat16(), None, eye.double(), one.double(), one.double(), None, 3),
    ):
        arguments = [argument.to(device) if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        with pytest.raises(ValueError, match="orthogonal_filter"):
            overload(op.NAME)(*arguments, "tanh", 2, False)
    h0, weight, eye, one = (tensor.to(device) for tensor in (h0, weight, eye, one))
    shared = (weight, None, eye, one, one, None, 3, "tanh")
    for grad_output, checkpoints, segment, needs in (
        (h0, h0.expand(1, 2, 4), 2, (False,) * 5),
        (h0.expand(3, 2, 4), h0.expand(2, 2, 4), 2, (False,) * 5),
        (h0, h0.expand(2, 2, 4), 0, (False,) * 5),
        (h0, h0.expand(2, 2, 4), 2, (False, True, False, False, False)),
        (h0, h0.expand(2, 2, 4), 2, (False, False, False, True, False)),
    ):
        with pytest.raises(ValueError, match="orthogonal_filter_backward"):
            overload(op.BACKWARD)(grad_output, checkpoints, *shared, segment, *needs)
