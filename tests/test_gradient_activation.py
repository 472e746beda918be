"""The reference of activated gradients, f(g) = alpha atan(beta g) or tanh or log, against closed forms.

The closed forms are bounds, slopes, gain thresholds, descent, and steps with f of the gradient or of the momentum. f is
from M. Liu et al., TNNLS 2021 (arXiv 2107.04228). The tests are in float64, unless a dtype is the subject.
"""

import math

import pytest
import torch

from lcw_ops import optim
from lcw_ops.functional import gradient_activation_
from lcw_ops.reference import adamw_step, gradient_activation, sgd_step

KINDS = ["arctan", "tanh", "log"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float64).eps
# With beta this small, f(g) = alpha beta g = g, and the optimizer is the plain one: the relative difference between f
# and this line, (beta g)^2 / 3, is below 1e-16 for |g| < 17.
PLAIN = {"alpha": 1e9, "beta": 1e-9}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("arctan", lambda g: 0.2 * math.atan(10 * g)),
        ("tanh", lambda g: 0.2 * math.tanh(10 * g)),
        ("log", lambda g: math.copysign(0.2 * math.log(1 + 10 * abs(g)), g)),
    ],
)
def test_the_function_is_the_formula(kind, function):
    g = torch.cat([normal(100), normal(100) * 1e-3, scalar([0.0, 1e5, -1e5])])
    expected = torch.tensor([function(x) for x in g.tolist()], dtype=torch.float64)
    # math.log(1 + x) is off by eps for small x, hence the absolute term.
    torch.testing.assert_close(gradient_activation(g, kind, 0.2, 10), expected, atol=EPS, rtol=4 * EPS)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_odd_increasing_and_below_the_line_of_slope_alpha_beta(kind):
    g = torch.logspace(-12, 6, 200, dtype=torch.float64)
    f = gradient_activation(g, kind, 0.1, 20)
    assert torch.equal(gradient_activation(-g, kind, 0.1, 20), -f)
    assert (f.diff() >= 0).all()
    assert ((f > 0) & (f <= 2 * g * (1 + 4 * EPS))).all()


@pytest.mark.parametrize(("kind", "bound"), [("arctan", 0.1 * math.pi / 2), ("tanh", 0.1), ("log", math.inf)])
def test_infinity_becomes_the_bound(kind, bound):
    f = gradient_activation(scalar([math.inf, -math.inf]), kind, 0.1, 20)
    torch.testing.assert_close(f, scalar([bound, -bound]), atol=0, rtol=2 * EPS)


@pytest.mark.parametrize(("kind", "bound"), [("arctan", 0.1 * math.pi / 2), ("tanh", 0.1)])
def test_no_finite_gradient_exceeds_the_bound(kind, bound):
    assert gradient_activation(torch.logspace(-3, 300, 500, dtype=torch.float64), kind).max() <= bound * (1 + 2 * EPS)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_nan_in_its_place(kind):
    f = gradient_activation(scalar([1.0, math.nan, -1.0]), kind)
    assert f.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_slope_at_zero_is_alpha_beta(kind, zero):
    g = scalar(zero).requires_grad_()
    (slope,) = torch.autograd.grad(gradient_activation(g, kind, 0.3, 4.5), g)
    assert slope.item() == pytest.approx(0.3 * 4.5, rel=4 * EPS)


@pytest.mark.parametrize(
    ("alpha", "beta", "threshold"), [(0.1, 20, 0.1166), (0.2, 10, 0.2331), (0.3, 4.5, 0.258)], ids=str
)
def test_gradients_below_the_threshold_are_enlarged(alpha, beta, threshold):
    digit = 1e-4 if threshold != 0.258 else 1e-3
    below, above = scalar(threshold - digit / 2), scalar(threshold + digit / 2)
    assert gradient_activation(below, "arctan", alpha, beta) > below
    assert gradient_activation(above, "arctan", alpha, beta) < above


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_enlarged_with_alpha_beta_at_most_1(kind):
    g = torch.logspace(-6, 3, 100, dtype=torch.float64)
    assert (gradient_activation(g, kind, 0.5, 2) <= g * (1 + 4 * EPS)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_right_twice(kind):
    # Away from 0, where the second derivative of log jumps.
    g = (normal(7).abs() + 0.05) * scalar([1, -1, 1, -1, 1, -1, 1])
    assert torch.autograd.gradcheck(lambda g: gradient_activation(g, kind, 0.3, 4.5), [g.requires_grad_()])
    assert torch.autograd.gradgradcheck(lambda g: gradient_activation(g, kind, 0.3, 4.5), [g])


def quadratic():
    a = normal(6, 6)
    hessian = a @ a.T
    return lambda w: 0.5 * w @ hessian @ w, torch.linalg.eigvalsh(hessian)[-1].item()


def log_cosh():
    # Second derivative 1 - tanh^2 <= 1.
    return lambda w: w.cosh().log().sum(), 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [quadratic, log_cosh])
@pytest.mark.parametrize("share", [0.1, 0.9, 1.9])
def test_descent_is_guaranteed_below_two_over_lk(kind, make, share):
    function, smoothness = make()
    gain = 0.1 * 20
    lr = share / (smoothness * gain)
    for seed in range(20):
        w = normal(6, seed=seed).requires_grad_()
        (g,) = torch.autograd.grad(function(w), w)
        step = gradient_activation(g, kind, 0.1, 20)
        promised = function(w) - lr * (1 - smoothness * lr * gain / 2) * (g @ step)
        assert function(w - lr * step) <= promised + 16 * EPS * function(w)


@pytest.mark.parametrize("kind", ["arctan", "tanh"])
@pytest.mark.parametrize("place", ["gradient", "momentum"])
def test_a_step_moves_a_coordinate_by_at_most_lr_times_the_bound(kind, place):
    bound = 0.1 * (math.pi / 2 if kind == "arctan" else 1)
    w, g = normal(50), normal(50, seed=1) * 1e6
    moved, _ = sgd_step(w, g, None, lr=0.5, momentum=0.9, activate=place, kind=kind)
    assert (moved - w).abs().max() <= 0.5 * bound + 4 * EPS * w.abs().max()


@pytest.mark.parametrize(("kind", "order"), [("arctan", 2), ("tanh", 2), ("log", 1)])
def test_near_a_stationary_point_it_is_plain_descent_at_lr_times_alpha_beta(kind, order):
    g = normal(50) * 1e-7
    activated, _ = sgd_step(torch.zeros_like(g), g, None, lr=0.1, kind=kind)
    # With K = alpha beta, the first terms of f(g) are K g (1 - (beta g)^2 / 3) for the bounded kinds and
    # K g (1 - beta |g| / 2) for log.
    first_error = (20 * g.abs()).pow(order) / (3 if order == 2 else 2)
    assert ((activated + 0.1 * 2 * g).abs() <= 0.2 * g.abs() * (first_error + 8 * EPS)).all()


def steps_to_escape(mu, start, end, step):
    """Count the steps y <- y + 0.1 step(mu y) from start to end: descent in y on the saddle F = (x^2 - mu y^2) / 2."""
    y, count = start, 0
    while y < end:
        y, count = y + 0.1 * step(mu * y), count + 1
    return count


@pytest.mark.parametrize(("mu", "plain", "activated"), [(1.0, 145, 76), (0.1, 1389, 698), (0.01, 13823, 6915)])
def test_saddle_escape_takes_the_predicted_steps(mu, plain, activated):
    # y grows by a factor of a million, and its gradient stays small. This takes ln(1e6) / ln(1 + 0.1 mu) plain steps,
    # and ln(1e6) / ln(1 + 0.2 mu) activated ones.
    assert steps_to_escape(mu, 1e-8, 1e-2, lambda g: g) == plain
    assert steps_to_escape(mu, 1e-8, 1e-2, lambda g: gradient_activation(scalar(g)).item()) == activated


def test_far_from_the_saddle_the_bound_slows_the_escape():
    assert steps_to_escape(1.0, 1e-6, 1.0, lambda g: gradient_activation(scalar(g)).item()) == 129


@pytest.mark.parametrize("place", ["gradient", "momentum"])
def test_sgd_with_f_the_identity_is_torchs_sgd(place):
    w = normal(20)
    theirs = w.clone().requires_grad_()
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01)
    buffer = None
    for step in range(30):
        theirs.grad = normal(20, seed=step)
        optimizer.step()
        w, buffer = sgd_step(w, theirs.grad, buffer, 0.1, 0.9, 0.01, place, **PLAIN)
    # 30 steps with up to 4 roundings each, of numbers of up to 10.
    torch.testing.assert_close(w, theirs.detach(), atol=30 * 10 * 4 * EPS, rtol=0)


def test_the_two_places_differ_in_what_f_sees():
    w, g, v = normal(5), normal(5, seed=1), normal(5, seed=2)
    by_gradient, buffer_of_gradient = sgd_step(w, g, v, 0.1, 0.9, 0.01, "gradient", "tanh", 0.2, 10)
    by_momentum, buffer_of_momentum = sgd_step(w, g, v, 0.1, 0.9, 0.01, "momentum", "tanh", 0.2, 10)
    exact = {"atol": 16 * EPS, "rtol": 0}
    torch.testing.assert_close(buffer_of_gradient, 0.9 * v + 0.2 * torch.tanh(10 * g) + 0.01 * w, **exact)
    torch.testing.assert_close(by_gradient, w - 0.1 * buffer_of_gradient, **exact)
    torch.testing.assert_close(buffer_of_momentum, 0.9 * v + g + 0.01 * w, **exact)
    torch.testing.assert_close(by_momentum, w - 0.1 * 0.2 * torch.tanh(10 * buffer_of_momentum), **exact)


def test_without_momentum_and_decay_both_places_are_one():
    w, g = normal(5), normal(5, seed=1)
    assert torch.equal(sgd_step(w, g, None, 0.1)[0], sgd_step(w, g, None, 0.1, activate="momentum")[0])


def adamw_run(gradient_scale=1.0, **options):
    w, m, v = normal(20), torch.zeros(20).double(), torch.zeros(20).double()
    for step in range(1, 31):
        w, m, v = adamw_step(w, gradient_scale * normal(20, seed=step), m, v, step, lr=0.01, **options)
    return w


def test_adamw_with_f_the_identity_is_torchs_adamw():
    theirs = normal(20).requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for step in range(1, 31):
        theirs.grad = normal(20, seed=step)
        optimizer.step()
    torch.testing.assert_close(adamw_run(weight_decay=0.1, **PLAIN), theirs.detach(), atol=30 * 16 * EPS, rtol=0)


def test_default_options_are_those_of_the_optimizers():
    by_sgd, by_adamw = (normal(20).requires_grad_() for _ in range(2))
    optimizers = optim.SGD([by_sgd], lr=0.1), optim.AdamW([by_adamw])
    w, buffer = normal(20), None
    state = normal(20), torch.zeros(20).double(), torch.zeros(20).double()
    for step in range(1, 4):
        g = by_sgd.grad = by_adamw.grad = normal(20, seed=step)
        for optimizer in optimizers:
            optimizer.step()
        w, buffer = sgd_step(w, g, buffer, 0.1)
        state = adamw_step(state[0], g, *state[1:], step)
    for actual, expected in ((by_sgd, w), (by_adamw, state[0])):
        torch.testing.assert_close(actual.detach(), expected, atol=3 * 16 * EPS, rtol=0)


def test_the_default_function_is_that_of_the_op():
    g, activated = normal(20), normal(20)
    gradient_activation_([activated])
    torch.testing.assert_close(activated, gradient_activation(g), atol=16 * EPS, rtol=0)


def test_alpha_cancels_in_adamw_but_for_eps():
    base = adamw_run(alpha=0.1, eps=0.0)
    # 30 steps of lr 0.01, each with the few roundings of m / sqrt(v).
    torch.testing.assert_close(adamw_run(alpha=7.0, eps=0.0), base, atol=30 * 0.01 * 64 * EPS, rtol=0)
    assert (adamw_run(alpha=7.0, eps=1e-2) - base).abs().max() > 1e-4


def test_adamw_activates_the_raw_gradient_before_the_moments():
    g = normal(5)
    _, m, v = adamw_step(normal(5), g, torch.zeros(5).double(), torch.zeros(5).double(), 1, alpha=0.1, beta=15)
    f = 0.1 * torch.atan(15 * g)
    torch.testing.assert_close(m, 0.1 * f, atol=4 * EPS, rtol=0)
    torch.testing.assert_close(v, 0.001 * f * f, atol=4 * EPS, rtol=0)


def test_steps_change_nothing_in_place():
    tensors = [normal(5, seed=seed) for seed in range(4)]
    copies = [tensor.clone() for tensor in tensors]
    sgd_step(*tensors[:3], lr=0.1, momentum=0.9)
    adamw_step(*tensors[:3], tensors[3].square(), 1)
    gradient_activation(tensors[0])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_is_rounded_once_after_float32(dtype, kind):
    g = (normal(500) * 3).to(dtype)
    f = gradient_activation(g, kind)
    exact = gradient_activation(g.double(), kind)
    assert f.dtype == dtype
    # In float32 (or float64), beta g, the function (a few ulp) and the product with alpha are rounded; the result is
    # rounded to its dtype. In float16, 2^-25 is half the smallest number.
    bound = (8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps + torch.finfo(dtype).eps) * exact.abs()
    assert ((f.double() - exact).abs() <= bound + 2**-25 * (dtype == torch.float16)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_keep_the_dtype(dtype):
    tensors = [normal(5, seed=seed).to(dtype) for seed in range(3)]
    outputs = [*sgd_step(*tensors, lr=0.1), *adamw_step(*tensors, tensors[0].square(), 1)]
    assert {tensor.dtype for tensor in outputs} == {dtype}
    assert all(tensor.isfinite().all() for tensor in outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_empty_and_scalar_tensors(kind):
    g = normal(6, 10).T[::3, 1::2]
    assert torch.equal(gradient_activation(g, kind), gradient_activation(g.contiguous(), kind))
    assert gradient_activation(torch.empty(0, 3), kind).shape == (0, 3)
    assert gradient_activation(torch.tensor(0.5), kind).shape == ()


ONE = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gradient_activation(ONE.int()), TypeError, "gradient is torch.int32"),
        (
            lambda: gradient_activation(ONE, "atan"),
            ValueError,
            "kind is 'atan'; expected one of 'arctan', 'tanh', 'log'",
        ),
        (lambda: gradient_activation(ONE, alpha=-0.1), ValueError, "alpha is -0.1; expected a finite number > 0"),
        (lambda: gradient_activation(ONE, beta=math.nan), ValueError, "beta is nan"),
        (lambda: gradient_activation(ONE, beta=math.inf), ValueError, "beta is inf"),
        (lambda: gradient_activation(ONE, alpha="0.1"), TypeError, "alpha is a str; expected a Python number"),
        (lambda: sgd_step(ONE, ONE[:2], None, 0.1), ValueError, r"sgd_step: gradient has shape \(2,\)"),
        (lambda: sgd_step(ONE, ONE, ONE.double(), 0.1), TypeError, "momentum_buffer is torch.float64"),
        (lambda: sgd_step(ONE, ONE, None, 0.1, activate="both"), ValueError, "activate is 'both'"),
        (lambda: sgd_step(ONE, ONE, None, -0.1), ValueError, "lr is -0.1; expected a finite number >= 0"),
        (lambda: adamw_step(ONE, ONE, ONE, ONE, 0), ValueError, "step is 0; expected at least 1"),
        (lambda: adamw_step(ONE, ONE, ONE, ONE, 1, betas=(0.9, 1.0)), ValueError, "betas is"),
    ],
)
def test_errors_name_the_argument_and_what_came(call, error, words):
    with pytest.raises(error, match=words):
        call()
