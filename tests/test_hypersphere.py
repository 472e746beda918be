"""GmP directions against the definition, the metric of the sphere, and finite differences, at the poles too.

W. Chen, H. Ge, NeurIPS 2024. A unit of m inputs has the angles t_1 .. t_(m-1) and the direction u, with
P_k = sin t_1 ... sin t_(k-1), u_k = P_k cos t_k and u_m = P_m. Tolerances in float64 count roundings. Random angles are
those of seeded Gaussian rows.
"""

import itertools
import math

import pytest
import torch

from lcw_ops.reference import (
    gmp_linear,
    hypersphere_angles,
    hypersphere_direction,
    hypersphere_direction_backward,
    hypersphere_direction_jvp,
)

EPS = torch.finfo(torch.float64).eps
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
POLES = torch.tensor(
    [[0.0, 0.0, 0.0, 0.0], [0.7, 0.0, 1.1, -0.4], [0.0, 1.3, 0.0, 2.0], [1.0, 2.0, -1.0, 0.0], [0.3, 0.9, 1.7, -2.2]],
    dtype=torch.float64,
)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unit(w):
    return w / w.norm(dim=1, keepdim=True)


def angles_between(u, v):
    return 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))


def direction_by_the_definition(t):
    sine = [math.sin(x) for x in t]
    return [math.cos(x) * math.prod(sine[:k]) for k, x in enumerate(t)] + [math.prod(sine)]


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 9, 31])
def test_direction_is_the_definition(m):
    t = normal(4, m - 1) * 3
    expected = torch.tensor([direction_by_the_definition(row) for row in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(hypersphere_direction(t), expected, atol=m * EPS, rtol=0)


@pytest.mark.parametrize("m", [1, 2, 3, 1152])
def test_directions_have_length_1(m):
    length = hypersphere_direction(hypersphere_angles(normal(20, m))).norm(dim=1)
    # The m squares sum to 1, and each has a relative error of about eps.
    torch.testing.assert_close(length, torch.ones(20, dtype=torch.float64), atol=math.sqrt(m) * 2 * EPS, rtol=0)


@pytest.mark.parametrize("m", [2, 3, 7, 1152])
def test_angles_and_direction_are_inverse(m):
    w = normal(20, m)
    # Components of about 1/sqrt(m) have sqrt(m) random roundings, one eps in all. The largest of 20 m is within 4 eps.
    assert (hypersphere_direction(hypersphere_angles(w)) - unit(w)).abs().max() <= 4 * EPS


def test_every_orthant_comes_back_with_its_signs():
    w = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    assert torch.equal(hypersphere_direction(hypersphere_angles(w)).sign(), w)


def test_axes_come_back():
    w = torch.cat([torch.eye(5, dtype=torch.float64), -torch.eye(5, dtype=torch.float64)])
    torch.testing.assert_close(hypersphere_direction(hypersphere_angles(w)), w, atol=5 * EPS, rtol=0)


def test_zero_rows_get_the_first_axis_and_zero_derivatives():
    w = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    angles = hypersphere_angles(w)
    assert torch.equal(angles, torch.zeros(2, 3, dtype=torch.float64))
    angles.sum().backward()
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_fan_in_1_has_the_fixed_direction_plus_one():
    assert hypersphere_angles(torch.tensor([[-2.0], [3.0]])).shape == (2, 0)
    assert torch.equal(hypersphere_direction(torch.empty(2, 0)), torch.ones(2, 1))


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_lengths_whose_squares_overflow_are_safe(scale):
    w = normal(3, 6)
    # scale itself is rounded, so entries differ by half an ulp before anything is computed.
    torch.testing.assert_close(hypersphere_angles(scale * w), hypersphere_angles(w), atol=8 * EPS, rtol=0)


def test_the_columns_of_the_jacobian_are_orthogonal_with_lengths_P():
    t = hypersphere_angles(normal(1, 9))
    jacobian = torch.func.jacrev(lambda t: hypersphere_direction(t[None])[0])(t[0])
    lengths = torch.cat([torch.ones(1, dtype=torch.float64), t[0].sin()[:-1].cumprod(0)])
    torch.testing.assert_close(jacobian.T @ jacobian, torch.diag(lengths.square()), atol=9 * EPS, rtol=0)


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 10.0])
def test_a_step_of_the_angles_turns_the_direction_by_no_more(size):
    t = hypersphere_angles(normal(200, 12))
    e = unit(normal(200, 11, seed=1)) * size
    turn = angles_between(hypersphere_direction(t), hypersphere_direction(t + e))
    assert (turn <= size + 12 * EPS).all()
    assert turn.max() > min(size, 1) / 10


def test_the_location_of_the_boundary_moves_no_more_than_the_bound():
    t, lam = hypersphere_angles(normal(200, 12)), normal(200, seed=1)
    e_t, e_lam = normal(200, 11, seed=2) * 0.3, normal(200, seed=3) * 0.3
    moved = -(lam + e_lam)[:, None] * hypersphere_direction(t + e_t) + lam[:, None] * hypersphere_direction(t)
    assert (moved.norm(dim=1) <= e_lam.abs() + lam.abs() * e_t.norm(dim=1)).all()


def test_a_sign_step_rotates_by_lr_times_root_of_half_the_fan_in():
    m, rows, lr = 200, 400, 1e-4
    t = hypersphere_angles(normal(rows, m))
    step = lr * normal(rows, m - 1, seed=1).sign()
    turn = angles_between(hypersphere_direction(t), hypersphere_direction(t + step)) / lr
    # For uniform rows, E turn^2 = sum_k E P_k^2 = sum_k (m-k+1)/m = (m^2+m-2)/(2m). A row's P_k^2 deviate together, by
    # less than sqrt(2/m) of their size, so 5 standard errors of the mean over the rows are below 2.5 %.
    assert abs(turn.square().mean() / ((m * m + m - 2) / (2 * m)) - 1) < 5 * math.sqrt(2 / m / rows)


def test_uniform_iid_angles_shrink_the_last_component_like_powers_of_two():
    m, rows = 64, 2000
    t = 2 * math.pi * torch.rand(rows, m - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_last = hypersphere_direction(t)[:, -1].abs().log()
    # ln|u_m| is a sum of m - 1 independent ln|sin t|, each of mean -ln 2 and variance pi^2 / 12.
    standard_error = math.pi / math.sqrt(12) * math.sqrt((m - 1) / rows)
    assert abs(log_last.mean() + (m - 1) * math.log(2)) < 5 * standard_error


def test_backward_is_exact_at_the_poles():
    t = POLES.clone().requires_grad_()
    g = normal(5, 5)
    h = 1e-6
    steps = torch.eye(4, dtype=torch.float64) * h
    differences = torch.stack(
        [((hypersphere_direction(POLES + e) - hypersphere_direction(POLES - e)) * g).sum(1) / (2 * h) for e in steps], 1
    )
    backward = hypersphere_direction_backward(g, POLES)
    # A central difference is off by h^2 in truncation and eps / h in rounding: 1e-12 + 2e-10, times ||g||.
    torch.testing.assert_close(backward, differences, atol=3 * EPS / h, rtol=0)
    (autograd,) = torch.autograd.grad((hypersphere_direction(t) * g).sum(), t)
    torch.testing.assert_close(backward, autograd, atol=16 * EPS, rtol=0)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 64, 1152])
def test_backward_recurrence_is_the_vector_jacobian_product(m):
    t = hypersphere_angles(normal(6, m)).requires_grad_()
    g = normal(6, m, seed=1)
    (autograd,) = torch.autograd.grad((hypersphere_direction(t) * g).sum(), t)
    # Measured: 9e-16. The recurrence ends with <g, u>, about 1; its sums, of about sqrt(m), have log2(m) roundings.
    torch.testing.assert_close(hypersphere_direction_backward(g, t), autograd, atol=32 * EPS, rtol=0)


@pytest.mark.parametrize("angles", [POLES, hypersphere_angles(normal(4, 65))], ids=["poles", "random"])
def test_the_jvp_is_the_adjoint_of_the_backward(angles):
    tangent, g = normal(*angles.shape, seed=1), normal(len(angles), angles.shape[1] + 1, seed=2)
    left = (hypersphere_direction_jvp(tangent, angles) * g).sum()
    right = (hypersphere_direction_backward(g, angles) * tangent).sum()
    torch.testing.assert_close(left, right, atol=g.numel() * EPS * 4, rtol=0)
    _, forward_mode = torch.func.jvp(hypersphere_direction, (angles,), (tangent,))
    torch.testing.assert_close(hypersphere_direction_jvp(tangent, angles), forward_mode, atol=64 * EPS, rtol=0)


@pytest.mark.parametrize("angles", [POLES, normal(3, 6), torch.empty(2, 0).double()], ids=["poles", "random", "m=1"])
def test_direction_and_its_backward_are_differentiable_twice(angles):
    t, g = angles.clone().requires_grad_(), normal(len(angles), angles.shape[1] + 1).requires_grad_()
    assert torch.autograd.gradcheck(hypersphere_direction, [t])
    assert torch.autograd.gradgradcheck(hypersphere_direction, [t])
    assert torch.autograd.gradcheck(hypersphere_direction_backward, [g, t])
    assert torch.autograd.gradgradcheck(hypersphere_direction_backward, [g, t])


def test_angles_are_differentiable_twice():
    w = normal(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(hypersphere_angles, [w])
    assert torch.autograd.gradgradcheck(hypersphere_angles, [w])


def test_derivatives_of_the_angles_are_finite_where_a_tail_is_zero():
    w = torch.tensor([[1.0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 3], [1, -1, 0, 0]], dtype=torch.float64)
    w.requires_grad_()
    (first,) = torch.autograd.grad(hypersphere_angles(w).square().sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), w)
    assert first.isfinite().all()
    assert second.isfinite().all()


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_positive_radius_is_the_plain_unit(activation):
    x, t = normal(5, 6), hypersphere_angles(normal(4, 6, seed=1))
    r, lam = normal(4, seed=2).abs(), normal(4, seed=3)
    plain = x @ (r[:, None] * hypersphere_direction(t)).T + r * lam
    expected = plain.relu() if activation else plain
    torch.testing.assert_close(gmp_linear(x, t, r, lam, activation), expected, atol=64 * EPS, rtol=0)


def test_the_radius_acts_after_the_relu_with_its_sign():
    y = gmp_linear(normal(50, 6), hypersphere_angles(normal(4, 6, seed=1)), -torch.ones(4).double(), normal(4), "relu")
    assert (y <= 0).all()
    assert (y < 0).any()


def test_the_boundary_lies_at_minus_location_times_direction():
    t, lam = hypersphere_angles(normal(4, 6)), normal(4, seed=1)
    y = gmp_linear(-lam[:, None] * hypersphere_direction(t), t, torch.ones(4).double(), lam)
    assert y.diag().abs().max() <= 16 * EPS


def test_layer_gradients_are_those_of_the_formulas():
    x, t = normal(8, 6).requires_grad_(), hypersphere_angles(normal(4, 6, seed=1)).requires_grad_()
    r, lam, dy = normal(4, seed=2).requires_grad_(), normal(4, seed=3).requires_grad_(), normal(8, 4, seed=4)
    ours = torch.autograd.grad(gmp_linear(x, t, r, lam, "relu"), [x, t, r, lam], dy)
    with torch.no_grad():
        u = hypersphere_direction(t)
        z = x @ u.T + lam
        dz = r * dy * (z > 0)
        formulas = [dz @ u, hypersphere_direction_backward(dz.T @ x, t), (dy * z.relu()).sum(0), dz.sum(0)]
    for mine, formula in zip(ours, formulas, strict=True):
        torch.testing.assert_close(mine, formula, atol=128 * EPS, rtol=0)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_layer_is_differentiable_twice(activation):
    arguments = [normal(3, 5), normal(2, 4, seed=1), normal(2, seed=2), normal(2, seed=3)]
    arguments = [a.requires_grad_() for a in arguments]
    assert torch.autograd.gradcheck(lambda *a: gmp_linear(*a, activation), arguments)
    assert torch.autograd.gradgradcheck(lambda *a: gmp_linear(*a, activation), arguments)


def test_float32_error_grows_only_like_the_root_of_the_fan_in():
    m = 4608
    t = hypersphere_angles(normal(64, m, dtype=torch.float32))
    g = normal(64, m, seed=1)
    u = hypersphere_direction(t.double())
    back = hypersphere_direction_backward(g, t.double())
    u_error = (hypersphere_direction(t).double() - u).norm() / u.norm()
    back_error = (hypersphere_direction_backward(g.float(), t).double() - back).norm() / back.norm()
    # Each of up to m sines is off by at most half an ulp of 1, 2^-24, at random: 4.0e-6. Measured: 3e-6 and
    # 2.7e-6.
    assert u_error < math.sqrt(m) * 2**-24
    assert back_error < math.sqrt(m) * 2**-24


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_computed_in_float32_or_better(dtype):
    t = hypersphere_angles(normal(5, 33)).to(dtype)
    u = hypersphere_direction(t)
    exact = hypersphere_direction(t.double())
    assert u.dtype == dtype
    # 33 roundings in float32 and one in the result's dtype. The smallest float16 is 2^-24; half of it may be lost.
    bound = 33 * torch.finfo(torch.float32).eps * (dtype != torch.float64) + torch.finfo(dtype).eps * exact.abs()
    assert ((u.double() - exact).abs() <= bound + 33 * EPS + 2**-25 * (dtype == torch.float16)).all()
    for out in (
        hypersphere_angles(u),
        hypersphere_direction_backward(u, t),
        hypersphere_direction_jvp(t, t),
        gmp_linear(u, t, u[:, 0], u[:, 1], "relu"),
    ):
        assert out.dtype == dtype
        assert out.isfinite().all()


def test_strides_do_not_matter():
    t, g = normal(6, 10).T[::2, 1:], normal(5, 1).expand(5, 6)
    assert torch.equal(hypersphere_direction(t), hypersphere_direction(t.contiguous()))
    assert torch.equal(hypersphere_angles(t), hypersphere_angles(t.contiguous()))
    assert torch.equal(hypersphere_direction_backward(g, t), hypersphere_direction_backward(g.contiguous(), t))


def test_empty_inputs():
    assert hypersphere_direction(torch.empty(0, 4)).shape == (0, 5)
    assert hypersphere_angles(torch.empty(0, 5)).shape == (0, 4)
    assert gmp_linear(torch.empty(0, 5), torch.ones(3, 4), torch.ones(3), torch.ones(3)).shape == (0, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_angle_spoils_its_own_row_only(bad):
    t = normal(3, 5)
    clean = hypersphere_direction(t)
    t[1, 2] = bad
    u = hypersphere_direction(t)
    assert u[1, 2:].isnan().all()
    assert torch.equal(u[[0, 2]], clean[[0, 2]])
    # The components before the bad angle do not depend on it.
    assert torch.equal(u[1, :2], clean[1, :2])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hypersphere_direction(torch.ones(3)), ValueError, r"angles has shape \(3,\); expected \(n, m-1\)"),
        (lambda: hypersphere_direction(torch.ones(3, 2).int()), TypeError, "angles is torch.int32"),
        (lambda: hypersphere_angles(torch.ones(3, 0)), ValueError, "hypersphere_angles: weight has shape"),
        (lambda: hypersphere_direction_backward(torch.ones(3, 2), torch.ones(3, 2)), ValueError, "grad_direction has"),
        (lambda: hypersphere_direction_jvp(torch.ones(3, 3), torch.ones(3, 2)), ValueError, "tangent_angles has"),
        (
            lambda: gmp_linear(torch.ones(1, 3), torch.ones(2, 2), torch.ones(2), torch.ones(2), "tanh"),
            ValueError,
            "activation is 'tanh'; expected one of None, 'relu'",
        ),
        (
            lambda: gmp_linear(torch.ones(1, 2), torch.ones(2, 2), torch.ones(2), torch.ones(2)),
            ValueError,
            r"x has shape \(1, 2\)",
        ),
        (
            lambda: gmp_linear(torch.ones(1, 3), torch.ones(2, 2), torch.ones(3), torch.ones(2)),
            ValueError,
            "radius has shape",
        ),
    ],
)
def test_errors_name_the_argument_and_what_came(call, error, words):
    with pytest.raises(error, match=words):
        call()
