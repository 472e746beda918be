"""LCW against the facts of its definition: zero row sums, an orthonormal basis, and variances forward and backward.

A row of m weights is w = u - mean(u) (centred), or w = B v with m - 1 numbers v and the basis B. T. Kutsuna, ECML PKDD
2019. Tolerances in float64 count roundings; those of random draws are 5 stated standard errors.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lcw_ops.reference import activation_shift, lcw_basis, lcw_linear, lcw_weight

EPS = torch.finfo(torch.float64).eps
FAN_INS = [1, 2, 3, 7, 64, 257]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 5), (4, 3, 2, 5), (2, 3, 2, 2, 3), (1, 1), (3, 1)])
def test_centred_rows_sum_to_zero_over_everything_but_dim_0(shape):
    w = lcw_weight(normal(*shape) + 3)
    assert w.shape == shape
    # A row's sum carries one rounding of size eps max|u| for each of its entries.
    assert w.flatten(1).sum(1).abs().max() <= math.prod(shape[1:]) * EPS * 8


@given(n=st.integers(0, 4), m=st.integers(1, 40), seed=st.integers(0, 99), shift=st.floats(-1e3, 1e3))
@settings(max_examples=40, deadline=None)
def test_basis_rows_sum_to_zero_for_any_shape_and_shift(n, m, seed, shift):
    w = lcw_weight(normal(n, m - 1, seed=seed) + shift, basis=True)
    assert w.shape == (n, m)
    # Each entry is rounded at the size of sum(v) / sqrt(m), which is at most sqrt(m) max|v|.
    assert (w.sum(1).abs() <= m * EPS * math.sqrt(m) * (abs(shift) + 8)).all()


@pytest.mark.parametrize("m", FAN_INS)
def test_basis_is_orthonormal_and_spans_the_zero_sum_vectors(m):
    b = lcw_basis(m)
    # Inner products of length m: m roundings of size at most eps.
    tolerance = m * EPS
    assert b.shape == (m, m - 1)
    torch.testing.assert_close(b.T @ b, torch.eye(m - 1, dtype=b.dtype), atol=tolerance, rtol=0)
    torch.testing.assert_close(b.sum(0), torch.zeros(m - 1, dtype=b.dtype), atol=tolerance, rtol=0)
    projection = torch.eye(m, dtype=b.dtype) - torch.full((m, m), 1 / m, dtype=b.dtype)
    torch.testing.assert_close(b @ b.T, projection, atol=tolerance, rtol=0)


@pytest.mark.parametrize("m", FAN_INS)
def test_basis_form_is_the_product_with_the_dense_basis(m):
    v = normal(5, m - 1)
    torch.testing.assert_close(lcw_weight(v, basis=True), v @ lcw_basis(m).T, atol=m * EPS * 4, rtol=0)


@pytest.mark.parametrize("weight", [torch.full((3, 1), 7.0), torch.empty(3, 0)])
def test_fan_in_1_leaves_only_the_zero_weight(weight):
    assert torch.equal(lcw_weight(weight, basis=weight.shape[1] == 0), torch.zeros(3, 1))


def test_projecting_twice_is_projecting_once():
    w = lcw_weight(normal(5, 31))
    torch.testing.assert_close(lcw_weight(w), w, atol=32 * EPS, rtol=0)


@pytest.mark.parametrize("basis", [False, True])
def test_inputs_of_equal_means_give_no_shift(basis):
    x = torch.full((2, 33), 5.0, dtype=torch.float64)
    bias = normal(4)
    y = lcw_linear(x, normal(4, 32 + (not basis)), bias, basis)
    torch.testing.assert_close(y, bias.expand(2, 4), atol=33 * EPS * 5 * 4, rtol=0)


def test_uneven_means_leave_the_residual_shift():
    weight, mu = normal(4, 6), torch.arange(6.0, dtype=torch.float64)
    w = lcw_weight(weight)
    torch.testing.assert_close(lcw_linear(mu, weight), w @ (mu - mu.mean()), atol=1e-14, rtol=0)
    assert (w @ (mu - mu.mean())).abs().min() > 0.1


def test_zero_padding_brings_the_shift_back_at_the_border_only():
    w = lcw_weight(normal(2, 3, 3, 3))
    y = F.conv2d(torch.ones(1, 3, 6, 6, dtype=torch.float64), w, padding=1)
    assert y[:, :, 1:-1, 1:-1].abs().max() < 27 * EPS * 4
    assert y[:, :, 0].abs().max() > 0.1


@pytest.mark.parametrize("basis", [False, True])
def test_forward_and_backward_are_a_matmul_plus_a_rank_one_term(basis):
    batch, m, n = 11, 7, 5
    s = math.sqrt(m)
    dq = torch.full((m,), 1 / (s * (s + 1)) if basis else 1 / m, dtype=torch.float64)
    if basis:
        dq[-1] = 1 / s
    x, v, b, dy = normal(batch, m), normal(n, m - basis, seed=1), normal(n, seed=2), normal(batch, n, seed=3)
    for tensor in (x, v, b):
        tensor.requires_grad_()
    y = lcw_linear(x, v, b, basis)
    y.backward(dy)
    x0, v0 = x.detach(), v.detach()
    q, row_sum, padded = x0 @ dq, v0.sum(1), F.pad(v0, (0, int(basis)))
    r, t = dy.T @ q, dy @ row_sum
    expected = {
        "y": (y.detach(), x0 @ padded.T - q[:, None] * row_sum + b.detach()),
        "dv": (v.grad, dy.T @ x0[:, : m - basis] - r[:, None]),
        "db": (b.grad, dy.sum(0)),
        "dx": (x.grad, dy @ padded - t[:, None] * dq),
    }
    for name, (ours, formula) in expected.items():
        # Sums of at most 11 products of size up to 10.
        torch.testing.assert_close(ours, formula, atol=11 * 10 * EPS, rtol=0, msg=name)


def train_50_steps(parameter, weight_of, optimizer_class, **options):
    x, target = normal(40, 9, seed=1) + 2, normal(40, 6, seed=2)
    optimizer = optimizer_class([parameter.requires_grad_()], **options)
    for _ in range(50):
        optimizer.zero_grad()
        (torch.tanh(x @ weight_of(parameter).T) - target).square().mean().backward()
        optimizer.step()
    return weight_of(parameter).detach()


@pytest.mark.parametrize(
    ("optimizer_class", "options", "equal"),
    [
        (torch.optim.SGD, {"lr": 0.1}, True),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, True),
        (torch.optim.Adam, {"lr": 0.1}, False),
    ],
    ids=["sgd", "momentum-l2", "adam"],
)
def test_both_forms_train_alike_under_sgd_but_not_under_adam(optimizer_class, options, equal):
    u = normal(6, 9)
    centred = train_50_steps(u.clone(), lcw_weight, optimizer_class, **options)
    v = u @ lcw_basis(9)
    basis = train_50_steps(v, lambda v: lcw_weight(v, basis=True), optimizer_class, **options)
    difference = (centred - basis).abs().max()
    # 50 steps round weights of about 1 by eps each: by 7 eps in a random walk, by 50 eps if all have one direction.
    assert difference < 50 * EPS if equal else difference > 1e-2


UNITS = 200_000


@pytest.mark.parametrize("form", ["plain", "centred", "basis"])
def test_forward_variance_is_that_of_the_formula(form):
    m, variance = 16, 0.3
    a = normal(m) * 2 + 1.5
    v = normal(UNITS, m - (form == "basis"), seed=1) * math.sqrt(variance)
    z = a @ (v if form == "plain" else lcw_weight(v, form == "basis")).T
    spread, mean = a.var(correction=0), a.mean()
    expected = m * variance * (spread + (mean.square() if form == "plain" else 0))
    # The units are independent and normal: the standard error of a variance is sqrt(2 / units), here 0.3 %.
    assert abs(z.square().mean() / expected - 1) < 5 * math.sqrt(2 / UNITS)


@pytest.mark.parametrize("form", ["plain", "centred", "basis"])
def test_backward_variance_is_that_of_the_formula(form):
    m, n, variance, draws = 8, 12, 0.3, 20_000
    d = normal(n)
    v = normal(draws * n, m - (form == "basis"), seed=1) * math.sqrt(variance)
    w = (v if form == "plain" else lcw_weight(v, form == "basis")).reshape(draws, n, m)
    back = torch.einsum("n,knm->km", d, w).square().mean()
    expected = n * variance * d.square().mean() * (1 if form == "plain" else 1 - 1 / m)
    # ||W^T d||^2 is chi-square with at least m - 1 degrees of freedom in every draw.
    assert abs(back / expected - 1) < 5 * math.sqrt(2 / (draws * (m - 1)))


def test_activation_shift_is_the_mean_pre_activation():
    x, weight, bias = normal(4, 50, 6) + 1, normal(3, 6, seed=1), normal(3, seed=2)
    shift, angle = activation_shift(x, weight, bias)
    mu = x.reshape(-1, 6).mean(0)
    torch.testing.assert_close(shift, F.linear(x, weight, bias).mean((0, 1)), atol=200 * EPS * 10, rtol=0)
    torch.testing.assert_close(shift - bias, weight.norm(dim=1) * mu.norm() * angle.cos(), atol=1e-14, rtol=0)


def test_shift_angles_are_exact_near_0_and_pi():
    mu = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    # arccos of the inner product would return 0 for an angle of 1e-9, whose cosine rounds to 1.
    weight = torch.tensor([[1.0, 1e-9], [-1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([1e-9, math.pi, math.pi / 2, math.pi / 4], dtype=torch.float64)
    torch.testing.assert_close(activation_shift(mu, weight)[1], expected, atol=0, rtol=4 * EPS)


@pytest.mark.parametrize(("x", "w"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_the_angle_to_a_zero_vector_is_a_right_angle(x, w):
    assert activation_shift(torch.full((2, 3), x), torch.full((1, 3), w))[1].item() == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("basis", [False, True])
def test_derivatives_are_right_twice(basis):
    arguments = [normal(3, 5), normal(4, 5 - basis, seed=1), normal(4, seed=2)]
    arguments = [a.requires_grad_() for a in arguments]
    assert torch.autograd.gradcheck(lambda x, w, b: lcw_linear(x, w, b, basis), arguments)
    assert torch.autograd.gradgradcheck(lambda x, w, b: lcw_linear(x, w, b, basis), arguments)


def test_weight_and_shift_derivatives_are_right_twice():
    u, x = normal(3, 2, 2).requires_grad_(), normal(5, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lcw_weight, [u])
    assert torch.autograd.gradcheck(activation_shift, [x, normal(3, 4, seed=1).requires_grad_()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", [False, True])
def test_every_dtype_is_rounded_once_after_a_float32_sum(dtype, basis):
    m = 257
    x, weight, bias = normal(13, m, dtype=dtype), normal(5, m - basis, dtype=dtype), normal(5, dtype=dtype)
    y = lcw_linear(x, weight, bias, basis)
    w64 = lcw_weight(weight.double(), basis)
    exact = x.double() @ w64.T + bias.double()
    accumulate = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    # The sums have 2 m roundings (m in the product, m in the row sum). The final rounding adds half an ulp.
    size = x.double().abs() @ (w64.abs() + weight.double().abs().sum(1, keepdim=True) / m).T + bias.double().abs()
    bound = 2 * m * accumulate * size + torch.finfo(dtype).eps / 2 * exact.abs()
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= bound).all()


def test_strides_do_not_matter():
    x, weight = normal(7, 2, 6).transpose(0, 1)[..., ::2], normal(3, 4, seed=1).T[:, :3]
    torch.testing.assert_close(lcw_linear(x, weight), lcw_linear(x.contiguous(), weight.contiguous()))
    expanded = normal(1, 3).expand(5, 3)
    torch.testing.assert_close(lcw_weight(expanded), lcw_weight(expanded.contiguous()))


@pytest.mark.parametrize(("batch", "n"), [((0,), 3), ((2, 0), 3), ((4,), 0), ((), 3)])
def test_empty_and_unbatched_inputs(batch, n):
    y = lcw_linear(normal(*batch, 5), normal(n, 5), normal(n))
    assert y.shape == (*batch, n)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_entry_spoils_its_own_row_only(bad):
    weight = normal(3, 5)
    clean = lcw_weight(weight)
    weight[1, 2] = bad
    w = lcw_weight(weight)
    assert w[1].isnan().any()
    assert torch.equal(w[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: lcw_weight(torch.ones(3, 4, dtype=torch.int64)), TypeError, "lcw_weight: weight is torch.int64"),
        (lambda: lcw_weight(torch.ones(3)), ValueError, r"lcw_weight: weight has shape \(3,\)"),
        (lambda: lcw_weight(torch.ones(3, 4, 2), basis=True), ValueError, r"expected \(n, m-1\)"),
        (lambda: lcw_weight([[1.0]]), TypeError, "weight is a list"),
        (lambda: lcw_linear(torch.ones(2, 5), torch.ones(3, 4)), ValueError, r"lcw_linear: x has shape \(2, 5\)"),
        (lambda: lcw_linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(2)), ValueError, "bias has shape"),
        (lambda: lcw_linear(torch.ones(2, 4), torch.ones(3, 4).double()), TypeError, "expected torch.float32, as x is"),
        (lambda: activation_shift(torch.ones(0, 4), torch.ones(3, 4)), ValueError, "at least one sample"),
        (lambda: lcw_basis(0), ValueError, "lcw_basis: m is 0"),
    ],
)
def test_errors_name_the_argument_and_what_came(call, error, words):
    with pytest.raises(error, match=words):
        call()
