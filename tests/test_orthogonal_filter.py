"""The recurrence op against the float64 reference, in every way a user of PyTorch can call it."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.numerics import assert_as_exact_as_eager, exactness_of_matmul, hostile_layouts
from support.op_calls import OpCalls
from support.recurrence import NAMES, make_arguments, make_filter, run

import lcw_ops
from lcw_ops import functional as F
from lcw_ops.ops import backends
from lcw_ops.ops.orthogonal_filter import op
from lcw_ops.reference.orthogonal_filter import ACTIVATIONS as EXACT

ACTIVATIONS = ["tanh", "relu", "sigmoid", "identity"]
FILTERS = ["matrix", "permutation", "per_layer"]
pytestmark = pytest.mark.usefixtures("kernel_under_test")

RESULTS = ["output", *(f"gradient of {name}" for name in NAMES)]


def to_float64(arguments, filter):
    exact = [tensor.detach().double().requires_grad_() for tensor in arguments]
    return exact, filter.double() if filter.is_floating_point() else filter


def results_of_three(arguments, filter, grad_output, **options):
    """Result and gradients of the kernel, of plain torch in the arguments' dtype and of plain torch in float64."""
    output = run(arguments, filter, **options)
    if grad_output is None:
        grad_output = torch.randn_like(output)
    actual = [output, *torch.autograd.grad(output, arguments, grad_output)]
    options.pop("segment", None)
    with lcw_ops.use_backend("reference"):
        output = run(arguments, filter, **options)
        eager = [output, *torch.autograd.grad(output, arguments, grad_output, materialize_grads=True)]
        arguments, filter = to_float64(arguments, filter)
        output = run(arguments, filter, **options)
        exact = [output, *torch.autograd.grad(output, arguments, grad_output.double(), materialize_grads=True)]
    return zip(actual, eager, exact, strict=True)


def redraw(arguments):
    """Other states and inputs in the same network."""
    h0, *network, inputs = arguments
    return [torch.randn_like(h0).requires_grad_(), *network, torch.randn_like(inputs).requires_grad_()]


# The most samples for which a BLAS was seen to add up the lanes of a vector in the end is 5: MKL on a Xeon
# with AMX.
FEW_ROWS = 8


def assert_matches_reference(arguments, filter, grad_output=None, **options):
    """Result and every gradient are within twice eager's error.

    On a few numbers the largest error is a matter of chance: now and then eager's gradients of seven alphas are exact.
    Small cases are therefore judged over four draws together.
    """
    draws = [results_of_three(arguments, filter, grad_output, **options)]
    if grad_output is None and min(tensor.numel() for tensor in arguments) < 64:
        draws += [results_of_three(redraw(arguments), filter, None, **options) for _ in range(3)]
    # Our kernel adds up in order. Eager torch, in float32 on a CPU, may not.
    h0 = arguments[0]
    in_order = h0.dtype != torch.float32 or h0.is_cuda or h0.shape[0] > FEW_ROWS
    allowance = 1.0 if in_order else exactness_of_matmul(*h0.shape)
    for name, *draw in zip(RESULTS, *draws, strict=True):
        assert_as_exact_as_eager(name, *(torch.stack(column) for column in zip(*draw, strict=True)), allowance)


@pytest.mark.parametrize("filter_kind", FILTERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("return_states", [False, True])
def test_every_kind_matches_the_reference(filter_kind, activation, shared, return_states, device):
    filter = make_filter(filter_kind, 23, 19, device=device)
    arguments = make_arguments(6, 19, 23, shared, device=device)
    assert_matches_reference(arguments, filter, activation=activation, return_states=return_states)


@pytest.mark.parametrize("width", [1, 3, 16, 17, 64, 100, 128])
@pytest.mark.parametrize("rows", [1, 5, 32, 33])
def test_every_size_matches_the_reference(width, rows, device):
    arguments = make_arguments(rows, width, 7, device=device)
    assert_matches_reference(arguments, make_filter("matrix", 7, width, device=device), return_states=True)


@pytest.mark.parametrize("segment", [1, 7, 31, 300, 10_000, 2**63 - 1, None])
@pytest.mark.parametrize("return_states", [False, True])
def test_every_segment_matches_the_reference(segment, return_states, device):
    arguments = make_arguments(4, 12, 300, device=device)
    filter = make_filter("matrix", 300, 12, device=device)
    assert_matches_reference(arguments, filter, segment=segment, return_states=return_states)


def in_long_double(arguments, filter, grad_output):
    """Result and gradients for tanh with 64-bit mantissas, by a second implementation. They judge float64 itself."""
    h0, weight, bias, alpha, beta, inputs = (t.detach().cpu().numpy().astype(np.longdouble) for t in arguments)
    rotation = filter.cpu().numpy().astype(np.longdouble)
    states, slopes, branches = [h0], [], []
    for l in range(len(alpha)):
        branches.append(np.tanh(states[l] @ weight[l].T + bias[l] + inputs[l]))
        slopes.append(beta[l] * (1 - branches[l] ** 2))
        states.append(alpha[l] * states[l] @ rotation.T + beta[l] * branches[l])
    gradient = grad_output.cpu().numpy().astype(np.longdouble)
    grad_pre, grad_alpha, grad_beta = [None] * len(alpha), np.zeros_like(alpha), np.zeros_like(beta)
    for l in reversed(range(len(alpha))):
        grad_alpha[l] = (gradient * (states[l] @ rotation.T)).sum()
        grad_beta[l] = (gradient * branches[l]).sum()
        grad_pre[l] = slopes[l] * gradient
        gradient = alpha[l] * gradient @ rotation + grad_pre[l] @ weight[l]
    grad_weight = np.stack([p.T @ h for p, h in zip(grad_pre, states[:-1], strict=True)])
    grad_pre = np.stack(grad_pre)
    return states[-1], gradient, grad_weight, grad_pre.sum(1), grad_alpha, grad_beta, grad_pre


def test_float64_against_long_double(device):
    """Our float64 is within twice eager's error, with both measured against 64-bit mantissas.

    The errors of one draw are correlated through 200 layers, and eager's gradient of alpha may be exact by chance. So
    the worst errors of four draws are compared.
    """
    if np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps:
        pytest.skip("numpy's longdouble is no wider than float64 on this platform")
    filter = make_filter("matrix", 200, 17, torch.float64, device)
    worst = {name: np.zeros(3) for name in ["output", *NAMES]}
    for _ in range(4):
        arguments = make_arguments(5, 17, 200, dtype=torch.float64, device=device)
        output = run(arguments, filter)
        grad_output = torch.randn_like(output)
        gradients = torch.autograd.grad(output, arguments, grad_output)
        with lcw_ops.use_backend("reference"):
            eager = run(arguments, filter)
            eager_gradients = torch.autograd.grad(eager, arguments, grad_output)
        exact = in_long_double(arguments, filter, grad_output)
        for name, a, e, x in zip(worst, [output, *gradients], [eager, *eager_gradients], exact, strict=True):
            errors = [np.abs(t.detach().cpu().numpy() - x).max() for t in (a, e)]
            worst[name] = np.maximum(worst[name], [*errors, np.abs(x).max()])
    for name, (error, eager_error, scale) in worst.items():
        assert error <= 2 * eager_error + np.finfo(np.float64).eps * scale, name


def test_five_thousand_layers_match_the_reference(device):
    arguments = make_arguments(4, 16, 5000, device=device)
    assert_matches_reference(arguments, make_filter("matrix", 5000, 16, device=device))


def test_plain_and_residual_nets_are_the_same_op(device):
    h0, weight, bias, *_ = make_arguments(3, 8, 2, device=device)
    identity = torch.arange(8, device=device)
    plain = F.orthogonal_filter(h0, weight, bias, identity, alpha=0.0, beta=1.0)
    residual = F.orthogonal_filter(h0, weight, bias, identity, alpha=1.0, beta=1.0)
    layers = [lambda h, l=l: torch.tanh(torch.nn.functional.linear(h, weight[l], bias[l])) for l in range(2)]
    torch.testing.assert_close(plain, layers[1](layers[0](h0)))
    h1 = h0 + layers[0](h0)
    torch.testing.assert_close(residual, h1 + layers[1](h1))


def test_default_scales_are_convex(device):
    h0, weight, bias, *_ = make_arguments(3, 8, 10, device=device)
    filter = make_filter("matrix", 10, 8, device=device)
    expected = F.orthogonal_filter(h0, weight, bias, filter, alpha=0.9, beta=0.1)
    torch.testing.assert_close(F.orthogonal_filter(h0, weight, bias, filter), expected, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("depth", [0, 4])
@pytest.mark.parametrize("return_states", [False, True])
def test_empty_batch_and_no_layers(rows, depth, return_states, device):
    arguments = make_arguments(rows, 5, depth, device=device)
    filter = make_filter("permutation", depth, 5, device=device)
    assert_matches_reference(arguments, filter, return_states=return_states)


def test_without_layers_the_result_is_a_copy(device):
    arguments = make_arguments(2, 5, 0, device=device)
    output = run(arguments, make_filter("permutation", 0, 5, device=device))
    assert torch.equal(output, arguments[0])
    assert output.data_ptr() != arguments[0].data_ptr()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed"])
def test_hostile_strides_of_every_argument(name, layout, device):
    arguments = make_arguments(4, 9, 6, device=device)
    filter = make_filter("matrix", 6, 9, device=device)
    expected = run(arguments, filter)
    index = NAMES.index(name)
    layouts = hostile_layouts(arguments[index].detach())
    if layout not in layouts:
        layout = "strided"
    arguments[index] = layouts[layout].requires_grad_()
    assert torch.equal(run(arguments, filter), expected)
    assert_matches_reference(arguments, filter)


@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "expanded"])
@pytest.mark.parametrize("return_states", [False, True])
def test_hostile_strides_of_grad_output(layout, return_states, device):
    arguments = make_arguments(4, 9, 6, device=device)
    filter = make_filter("matrix", 6, 9, device=device)
    shape = (7, 4, 9) if return_states else (4, 9)
    if layout == "expanded":
        grad_output = torch.randn((), device=device).expand(shape)
    else:
        grad_output = hostile_layouts(torch.randn(shape, device=device))[layout]
    assert_matches_reference(arguments, filter, grad_output, return_states=return_states)


def test_expanded_weight_gets_the_summed_gradient(device):
    h0, weight, bias, *_ = make_arguments(4, 6, 5, shared=True, device=device)
    filter = make_filter("matrix", 5, 6, device=device)
    output = F.orthogonal_filter(h0, weight.expand(5, 6, 6), bias, filter, beta=0.2)
    grad_output = torch.randn_like(output)
    through_expand = torch.autograd.grad(output, weight, grad_output)
    exact = [tensor.detach().double().requires_grad_() for tensor in (h0, weight, bias)]
    with lcw_ops.use_backend("reference"):
        output = F.orthogonal_filter(exact[0], exact[1].expand(5, 6, 6), exact[2], filter.double(), beta=0.2)
    expected = torch.autograd.grad(output, exact[1], grad_output.double())
    torch.testing.assert_close(through_expand[0].double(), expected[0], rtol=1e-5, atol=1e-6)


def test_only_the_gradients_asked_for(device):
    h0, weight, bias, *_ = make_arguments(4, 6, 5, device=device)
    filter = make_filter("matrix", 5, 6, device=device)
    weight.requires_grad_(False)
    F.orthogonal_filter(h0, weight, bias, filter).sum().backward()
    assert weight.grad is None
    assert h0.grad is not None
    assert bias.grad is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_row(bad, device):
    arguments = [tensor.detach() for tensor in make_arguments(3, 8, 5, device=device)]
    filter = make_filter("matrix", 5, 8, device=device)
    clean = run(arguments, filter, activation="identity")
    arguments[0][1, 2] = bad
    dirty = run(arguments, filter, activation="identity")
    assert not dirty[1].isfinite().any()
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_nan_and_saturate_at_infinity(activation, device):
    """One step with W = 1, alpha = 0 and beta = 1 is the activation alone. Its arguments run from -inf to inf."""
    values = torch.tensor([[-torch.inf, -1e30, -20.0, -1e-20, 0.0, 1e-20, 20.0, 1e30, torch.inf, torch.nan]]).mT
    values = values.to(device)
    one = torch.ones(1, 1, 1, device=device)
    identity = torch.zeros(1, dtype=torch.int64, device=device)
    actual = F.orthogonal_filter(values, one, None, identity, alpha=0.0, beta=1.0, activation=activation)
    expected = EXACT[activation](values.double())
    # In the filter branch 0 * inf is NaN, in eager torch too, so infinite inputs are not compared; 1e30 saturates.
    finite = values.isfinite()
    torch.testing.assert_close(actual[finite].double(), expected[finite], rtol=4 * torch.finfo().eps, atol=1e-37)
    assert actual[values.isnan()].isnan().all()


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_error_in_ulps(activation, dtype, device):
    """Arguments from the whole range, small ones included, against torch's functions in float64."""
    exponents = torch.linspace(-30, 7, 20_001, dtype=torch.float64)
    values = torch.cat([-(2**exponents), 2**exponents]).to(dtype).to(device).unsqueeze(1)
    one = torch.ones(1, 1, 1, dtype=dtype, device=device)
    identity = torch.zeros(1, dtype=torch.int64, device=device)
    actual = F.orthogonal_filter(values, one, None, identity, alpha=0.0, beta=1.0, activation=activation)
    expected = EXACT[activation](values.double())
    error = (actual.double() - expected).abs() / (expected.abs() * torch.finfo(dtype).eps)
    # expm1's polynomial, its reduction and one division stay below 4 ulp. The float64 oracle itself is good to 1 ulp.
    normal = expected.abs() > torch.finfo(dtype).tiny * 2**10
    assert error[normal].max() < (4 if dtype == torch.float32 else 5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_same_bits_for_the_same_number_of_threads(count, device):
    arguments = make_arguments(7, 33, 150, device=device)
    filter = make_filter("matrix", 150, 33, device=device)
    threads, results = torch.get_num_threads(), []
    try:
        torch.set_num_threads(count)
        for _ in range(3):
            output = run(arguments, filter)
            results.append([output, *torch.autograd.grad(output.sum(), arguments)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("return_states", [False, True])
def test_sixteen_bits_round_once(dtype, return_states, device):
    """The state is float32 inside, so the result is the float32 result of the same 16-bit numbers, rounded once."""
    h0, weight, bias, *_, inputs = [t.detach().to(dtype) for t in make_arguments(4, 16, 100, device=device)]
    filter = make_filter("matrix", 100, 16, device=device)
    wide = [tensor.float() for tensor in (h0, weight, bias, inputs)]
    expected = F.orthogonal_filter(*wide[:3], filter, inputs=wide[3], return_states=return_states)
    actual = F.orthogonal_filter(h0, weight, bias, filter, inputs=inputs, return_states=return_states)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected.to(dtype))


def test_sixteen_bit_gradients_have_the_arguments_dtype(device):
    h0, weight, bias, *_ = [t.detach().bfloat16().requires_grad_() for t in make_arguments(4, 8, 9, device=device)]
    F.orthogonal_filter(h0, weight, bias, make_filter("matrix", 9, 8, device=device)).sum().backward()
    assert {tensor.grad.dtype for tensor in (h0, weight, bias)} == {torch.bfloat16}


def test_autocast_computes_in_float32(device):
    h0, weight, bias, *_ = make_arguments(4, 8, 9, device=device)
    filter = make_filter("matrix", 9, 8, device=device)
    expected = F.orthogonal_filter(h0.bfloat16().float(), weight, bias, filter)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = F.orthogonal_filter(h0.bfloat16(), weight, bias, filter)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_inference_saves_nothing(device):
    arguments = make_arguments(4, 8, 9, device=device)
    filter = make_filter("matrix", 9, 8, device=device)
    expected = run(arguments, filter)
    with torch.no_grad():
        assert torch.equal(run(arguments, filter), expected)
    with torch.inference_mode():
        result = run(arguments, filter)
    assert result.is_inference()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_a_gradient_the_op_returns_the_result_alone(requires_grad, device):
    arguments = [tensor.requires_grad_(requires_grad) for tensor in make_arguments(4, 8, 9, device=device)]
    filter = make_filter("matrix", 9, 8, device=device)
    with torch.set_grad_enabled(not requires_grad), OpCalls() as inside:
        output = run(arguments, filter, segment=3)
    ((_, returned),) = inside.calls
    assert sum(tensor.numel() for tensor in returned) == output.numel()


def small_arguments(shared, device):
    return make_arguments(2, 3, 3, shared, torch.float64, device)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "identity"])
@pytest.mark.parametrize("filter_kind", FILTERS)
@pytest.mark.parametrize("return_states", [False, True])
def test_gradcheck_and_gradgradcheck(activation, filter_kind, return_states, device):
    """First and second derivatives, forward mode included, against finite differences."""
    filter = make_filter(filter_kind, 3, 3, torch.float64, device)
    arguments = small_arguments(False, device)

    def function(*arguments):
        return run(arguments, filter, activation=activation, return_states=return_states, segment=2)

    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def test_gradgradcheck_with_shared_weight_and_no_bias(device):
    filter = make_filter("matrix", 3, 3, torch.float64, device)
    h0, weight, _, _, _, inputs = small_arguments(True, device)

    def function(h0, weight, inputs):
        return F.orthogonal_filter(h0, weight, None, filter, beta=0.3, inputs=inputs)

    assert torch.autograd.gradcheck(function, (h0, weight, inputs), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (h0, weight, inputs))


@pytest.mark.parametrize("batched", NAMES)
def test_vmap_over_each_argument_is_a_loop(batched, device):
    filter = make_filter("matrix", 4, 5, torch.float64, device)
    arguments = [t.detach() for t in make_arguments(3, 5, 4, dtype=torch.float64, device=device)]
    index = NAMES.index(batched)
    stack = torch.stack([arguments[index], arguments[index] * 0.5, arguments[index] * -1], dim=1)

    def function(argument):
        return run([*arguments[:index], argument, *arguments[index + 1 :]], filter, return_states=True)

    actual = torch.vmap(function, in_dims=1)(stack)
    expected = torch.stack([function(argument) for argument in stack.unbind(1)])
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("solver", ["sequential", "parallel"])
@pytest.mark.parametrize("return_states", [False, True])
@pytest.mark.parametrize("is_shared", [False, True], ids=["own weights", "shared weight"])
def test_backward_outside_of_vmap(is_shared, return_states, solver, device):
    filter = make_filter("matrix", 9, 5, torch.float64, device)
    h0, weight, bias, *_ = [t.detach() for t in make_arguments(3, 5, 9, dtype=torch.float64, device=device)]
    leaf = (weight[0] if is_shared else weight).clone().requires_grad_()

    def function(rows):
        return F.orthogonal_filter(rows, leaf, bias, filter, return_states=return_states, solver=solver).sin()

    parts = h0.unsqueeze(1)
    (actual,) = torch.autograd.grad(torch.vmap(function)(parts).sum(), leaf)
    (expected,) = torch.autograd.grad(sum(function(part).sum() for part in parts), leaf)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("scale", "buffers"), [(None, 2), ("alpha", 1), ("beta", 1)])
def test_activations_are_kept_only_if_backward_reads_them(scale, buffers, device):
    if device.type != "cpu":
        pytest.skip("only the C++ kernel reads the states that forward returns")
    steps, rows, width = 6, 3, 4
    arguments = {"alpha": torch.rand(steps), "beta": torch.rand(steps)}
    if scale:
        arguments[scale].requires_grad_()
    weight = torch.randn(width, width, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        F.orthogonal_filter(torch.randn(rows, width), weight, None, torch.eye(width), **arguments, return_states=True)
    assert sum(tensor.numel() >= steps * rows * width for tensor in kept) == buffers


def test_per_sample_gradients(device):
    filter = make_filter("matrix", 4, 5, torch.float64, device)
    h0, weight, bias, *_ = [t.detach() for t in make_arguments(3, 5, 4, dtype=torch.float64, device=device)]

    def loss(weight, sample):
        return F.orthogonal_filter(sample.unsqueeze(0), weight, bias, filter).square().sum()

    actual = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, h0)
    for sample, gradient in zip(h0, actual, strict=True):
        leaf = weight.clone().requires_grad_()
        loss(leaf, sample).backward()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-14)


def test_hessian_and_jacobian_through_torch_func(device):
    filter = make_filter("matrix", 4, 3, torch.float64, device)
    h0, weight, bias, *_ = [t.detach() for t in make_arguments(1, 3, 4, dtype=torch.float64, device=device)]

    def function(h0):
        return F.orthogonal_filter(h0.unsqueeze(0), weight, bias, filter).squeeze(0)

    backward = torch.func.jacrev(function)(h0[0])
    forward = torch.func.jacfwd(function)(h0[0])
    torch.testing.assert_close(backward, forward, rtol=1e-12, atol=1e-14)
    hessian = torch.func.hessian(lambda h: function(h).sum())(h0[0])
    with lcw_ops.use_backend("reference"):
        expected = torch.func.hessian(lambda h: function(h).sum())(h0[0])
    torch.testing.assert_close(hessian, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("return_states", [False, True])
def test_compiles_into_one_graph_with_dynamic_shapes(return_states, device):
    filter = make_filter("matrix", 6, 8, device=device)

    def loss(h0, weight, bias):
        return F.orthogonal_filter(h0, weight, bias, filter, return_states=return_states).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7, 1):
        h0, weight, bias, *_ = make_arguments(rows, 8, 6, device=device)
        leaves = (h0, weight, bias)
        expected = torch.autograd.grad(loss(*leaves), leaves)
        actual = torch.autograd.grad(compiled(*leaves), leaves)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("return_states", [False, True])
@pytest.mark.parametrize("filter_kind", FILTERS)
def test_opcheck(return_states, filter_kind, device):
    backend = "cuda" if device.type == "cuda" else "cpp"
    h0, weight, bias, alpha, beta, inputs = [t.detach() for t in make_arguments(3, 5, 4, device=device)]
    filter = make_filter(filter_kind, 4, 5, device=device)
    shared = (weight, bias, filter, alpha, beta, inputs, 4, "tanh", 3)
    forward = op.library.get_overload(op.NAME, backend)
    torch.library.opcheck(forward, (h0, *shared, return_states))
    output, checkpoints = forward(h0, *shared, return_states)
    backward = op.library.get_overload(op.BACKWARD, backend)
    grad_output = torch.randn_like(output)
    torch.library.opcheck(backward, (grad_output, checkpoints, *shared, True, True, True, True, True))
    torch.library.opcheck(backward, (grad_output, checkpoints, *shared, False, False, False, False, False))
    if backend == "cpp" and return_states:
        kept = (weight[0], None, filter, alpha, beta, inputs, 4, "tanh")
        torch.library.opcheck(forward, (h0, *kept, op.KEEP_ACTIVATED, True))
        states, activated = forward(h0, *kept, op.KEEP_ACTIVATED, True)
        torch.library.opcheck(
            backward, (grad_output, states[:-1], *kept, 3, True, False, False, True, False, activated)
        )


def test_state_gradients_are_the_gradients_of_every_state(device):
    depth, width = 9, 6
    filter = make_filter("matrix", depth, width, torch.float64, device)
    h0, weight, bias, alpha, beta, _ = [
        t.detach() for t in make_arguments(4, width, depth, dtype=torch.float64, device=device)
    ]
    grad_output = torch.randn_like(h0)
    backend = "cuda" if device.type == "cuda" else "cpp"
    *_, actual = op.state_gradients(grad_output, h0, weight, bias, filter, alpha, beta, None, "tanh", 4, backend)
    states = [h0.clone().requires_grad_()]
    for l in range(depth):
        branch = torch.tanh(torch.nn.functional.linear(states[-1], weight[l], bias[l]))
        states.append(alpha[l] * states[-1] @ filter.mT + beta[l] * branch)
    expected = torch.autograd.grad(states[-1], states, grad_output)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-12, atol=1e-14)


def test_explicit_request_that_cannot_be_met_raises(device):
    arguments = make_arguments(2, 3, 3, device=device)
    with lcw_ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*interpreter"):
        run(arguments, make_filter("matrix", 3, 3, device=device))


def test_backward_uses_the_backend_of_its_forward(device):
    arguments = make_arguments(2, 3, 3, device=device)
    output = run(arguments, make_filter("matrix", 3, 3, device=device))
    with lcw_ops.use_backend("triton"):
        gradients = torch.autograd.grad(output.sum(), arguments)
    assert all(gradient.isfinite().all() for gradient in gradients)


def valid_call(device):
    h0, weight, bias, alpha, beta, inputs = [t.detach() for t in make_arguments(2, 4, 3, device=device)]
    return {
        "h0": h0,
        "weight": weight,
        "bias": bias,
        "filter": make_filter("matrix", 3, 4, device=device),
        "alpha": alpha,
        "beta": beta,
        "inputs": inputs,
    }


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"h0": torch.randn(4)}, ValueError, r"h0 has shape \(4,\); expected \(M, N\)"),
        ({"h0": torch.randint(3, (2, 4))}, TypeError, "h0 is torch.int64"),
        ({"h0": [[1.0]]}, TypeError, "h0 is a list; expected a torch.Tensor"),
        ({"weight": torch.randn(3, 4, 5)}, ValueError, r"weight has shape \(3, 4, 5\); expected \(L, 4, 4\)"),
        (
            {"weight": torch.randn(3, 4, 4).double()},
            TypeError,
            "weight is torch.float64; expected torch.float32, as h0 is",
        ),
        ({"weight": torch.randn(5, 4, 4)}, ValueError, "disagree on the number of steps"),
        ({"bias": torch.randn(3, 5)}, ValueError, "bias has shape"),
        ({"inputs": torch.randn(3, 1, 4)}, ValueError, r"inputs has shape \(3, 1, 4\); expected \(T, 2, 4\)"),
        ({"filter": torch.eye(5)}, ValueError, "filter has shape"),
        ({"filter": torch.eye(4).bfloat16()}, TypeError, "filter is torch.bfloat16; expected torch.float32"),
        (
            {"filter": torch.tensor([0, 1, 2])},
            ValueError,
            r"filter has shape \(3,\); expected \(4,\) for a permutation",
        ),
        ({"filter": torch.tensor([0, 1, 2, 4])}, ValueError, "not a permutation"),
        ({"filter": torch.tensor([0, 1, 2, 2])}, ValueError, "not a permutation"),
        ({"filter": torch.eye(4).requires_grad_()}, ValueError, r"Pass filter.detach\(\)"),
        ({"alpha": float("nan")}, ValueError, "alpha is nan; expected a finite number"),
        ({"beta": float("inf")}, ValueError, "beta is inf"),
        ({"beta": torch.randn(3, 1)}, ValueError, "beta is a torch.float32 tensor of shape"),
        ({"beta": torch.ones(3, dtype=torch.int64)}, ValueError, "beta is a torch.int64 tensor of shape"),
        ({"alpha": torch.ones((), dtype=torch.bool)}, ValueError, "alpha is a torch.bool tensor of shape"),
        ({"alpha": torch.ones(3, device="meta")}, ValueError, r"alpha is .* on meta; expected .*, \(L,\), on"),
        ({"beta": torch.randn(2)}, ValueError, "disagree on the number of steps"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'; expected one of 'tanh'"),
        ({"activation": ["tanh"]}, ValueError, "activation is \\['tanh'\\]; expected one of"),
        ({"segment": 0}, ValueError, "segment is 0; expected at least 1"),
        ({"segment": 2**63}, ValueError, "segment is 9223372036854775808"),
        ({"segment": 1.5}, TypeError, "segment is 1.5; expected an int"),
        ({"bias": [0.0]}, TypeError, "bias is a list; expected a torch.Tensor"),
        ({"inputs": [0.0]}, TypeError, "inputs is a list; expected a torch.Tensor"),
        ({"inputs": torch.randn(3, 2, 4, dtype=torch.float16)}, TypeError, "inputs is .*float16.*, as h0 is"),
        ({"alpha": math.inf}, ValueError, "alpha is inf; expected a finite number"),
        ({"beta": -math.inf}, ValueError, "beta is -inf; expected a finite number"),
        ({"solver": "magic"}, ValueError, "solver is 'magic'"),
        ({"tolerance": 1e-6}, ValueError, "tolerance is 1e-06"),
        ({"weight": torch.randn(3, 4, 4, device="meta")}, TypeError, "weight is on meta; expected .*, as h0 is"),
    ],
)
def test_bad_input_says_what_to_do(changed, error, message, device):
    changed = {
        name: value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for name, value in changed.items()
    }
    with pytest.raises(error, match=message):
        F.orthogonal_filter(**{**valid_call(device), **changed})


def test_unknown_number_of_steps_says_what_to_do(device):
    h0, weight, bias, *_ = make_arguments(2, 4, 3, shared=True, device=device)
    with pytest.raises(ValueError, match=r"number of steps is unknown.*weight.expand"):
        F.orthogonal_filter(h0, weight, bias, make_filter("matrix", 3, 4, device=device))


def test_the_op_itself_never_reads_out_of_bounds():
    """An op that is called directly, with arguments that do not fit, raises an error instead of crashing."""
    forward = op.library.get_overload(op.NAME, "cpp")
    h0, weight, one = torch.randn(2, 4), torch.randn(3, 4, 4), torch.ones(1)
    eye = torch.eye(4)
    for arguments in (
        (h0, weight, None, torch.tensor([0, 1, 2, 9]), one, one, None, 3),
        (h0, weight, None, eye, one, one, None, 5),
        (h0, weight, torch.randn(3, 5), eye, one, one, None, 3),
        (h0, weight, None, eye, torch.ones(2), one, None, 3),
        (h0, weight.double(), None, eye, one, one, None, 3),
        (h0, weight, None, eye, one, one, torch.randn(3, 2, 3), 3),
    ):
        with pytest.raises(RuntimeError, match="orthogonal_filter"):
            forward(*arguments, "tanh", 2, False)


@pytest.mark.parametrize("wrong", [[0, 1, 2, 2], [0, 1, 2, 9], [0, 0, 0, 0]])
def test_a_wrong_permutation_is_refused_even_inside_torch_compile(wrong, device):
    if device.type != "cpu":
        pytest.skip("a GPU kernel cannot look at the permutation without waiting; it traps instead")
    h0, weight, bias, *_ = [t.detach() for t in make_arguments(2, 4, 3)]
    compiled = torch.compile(F.orthogonal_filter, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="not a permutation"):
        compiled(h0, weight, bias, torch.tensor(wrong))


def test_permutations_work_in_inference_mode_and_under_vmap(device):
    h0, weight, bias, *_ = [t.detach() for t in make_arguments(2, 4, 3, device=device)]
    filters = torch.stack([torch.randperm(4, device=device) for _ in range(3)])
    expected = torch.stack([F.orthogonal_filter(h0, weight, bias, filter) for filter in filters])
    actual = torch.vmap(lambda filter: F.orthogonal_filter(h0, weight, bias, filter))(filters)
    torch.testing.assert_close(actual, expected)
    with torch.inference_mode():
        filter = filters[0].clone()
        torch.testing.assert_close(F.orthogonal_filter(h0, weight, bias, filter), expected[0])


@pytest.mark.parametrize(("rows", "width", "steps"), [(1024, 8, 128), (4096, 4, 64), (256, 64, 128), (4096, 1, 32)])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_shared_gradients_of_one_sign_over_many_samples(rows, width, steps, activation, device):
    """An RNN's weight gradient sums over all samples and steps, and float32 loses accuracy in sums that only grow."""
    h0 = torch.rand(rows, width, device=device)
    weight, bias = torch.rand(width, width, device=device) / width, torch.rand(width, device=device)
    alpha, beta = torch.full((steps,), 0.99, device=device), torch.full((steps,), 0.01, device=device)
    inputs = torch.rand(steps, rows, width, device=device)
    arguments = [tensor.requires_grad_() for tensor in (h0, weight, bias, alpha, beta, inputs)]
    grad_output = torch.rand(steps + 1, rows, width, device=device)
    filter = torch.arange(width, device=device)
    assert_matches_reference(arguments, filter, grad_output, activation=activation, return_states=True)


def test_the_meta_device_gives_shapes():
    h0, weight, bias, alpha, beta, inputs = [t.detach().to("meta") for t in make_arguments(2, 4, 3)]
    with lcw_ops.use_backend("reference"):
        output = F.orthogonal_filter(h0, weight, bias, torch.eye(4, device="meta"), alpha, beta, inputs)
    assert output.is_meta
    assert output.shape == (2, 4)


def test_permutation_is_checked_again_after_it_changed(device):
    h0, weight, bias, *_ = make_arguments(2, 4, 3, device=device)
    filter = make_filter("permutation", 3, 4, device=device)
    F.orthogonal_filter(h0, weight, bias, filter)
    filter[0] = filter[1]
    with pytest.raises(ValueError, match="not a permutation"):
        F.orthogonal_filter(h0, weight, bias, filter)


def test_automatic_choice_is_the_fastest_backend_available(device):
    if device.type != "cpu":
        pytest.skip("on a GPU the automatic choice depends on the committed log of its generation")
    assert backends._resolve(op.NAME, device, None) == "cpp"


def test_states_changed_in_place_before_backward(device):
    """The gradient is never wrong: either backward keeps states of its own, or torch raises."""
    h0, inputs = torch.randn(9, 40, device=device), torch.randn(5, 9, 40, device=device)
    weight = (torch.randn(40, 40, device=device) / 6).requires_grad_()
    filter = torch.randperm(40, device=device)

    def call():
        return F.orthogonal_filter(h0, weight, None, filter, inputs=inputs, return_states=True)

    (expected,) = torch.autograd.grad(call(), weight, torch.full((6, 9, 40), 2.0, device=device))
    states = call()
    states.mul_(2)
    if op.keeps_all_states(weight, op.choose_kernel(device, 40, 4)):
        with pytest.raises(RuntimeError, match="inplace operation"):
            torch.autograd.grad(states, weight, torch.ones_like(states))
    else:
        torch.testing.assert_close(torch.autograd.grad(states, weight, torch.ones_like(states)), (expected,))


PEAK_MEMORY = """
import re, torch
from lcw_ops import functional as F

def peak():  # not getrusage: the ru_maxrss of a child process starts at its parent's peak
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

weight = torch.randn(20_000, 64, 64).mul_(1 / 8).requires_grad_()
h0, filter = torch.randn(32, 64), torch.randperm(64)
F.orthogonal_filter(h0, torch.randn(10, 64, 64, requires_grad=True), None, filter).sum().backward()  # loads code
before = peak()
F.orthogonal_filter(h0, weight, None, filter).sum().backward()
print(peak() - before - weight.grad.nbytes)
"""


def test_memory_besides_weights_and_gradients(device):
    """Only states at segment boundaries and one segment's other tensors are kept; all states would be 164 MB here."""
    if device.type != "cpu" or sys.platform != "linux":
        pytest.skip("measures the resident memory of a process on Linux")
    result = subprocess.run([sys.executable, "-c", PEAK_MEMORY], capture_output=True, text=True, check=True)
    extra = int(result.stdout)
    print(f"{extra / 2**20:.1f} MB besides weights and gradients")
    assert 0 < extra < 40 << 20
