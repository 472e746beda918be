"""Weight normalization against its formula and finite differences. Float64 tolerances count roundings.

T. Salimans, D. P. Kingma, NeurIPS 2016, arXiv 1602.07868.
"""

import math

import pytest
import torch

from lcw_ops.reference import hypersphere, normalize_scale, normalize_scale_backward, normalize_scale_jvp

EPS = torch.finfo(torch.float64).eps
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unit(w):
    return w / w.norm(dim=1, keepdim=True)


def angles_between(u, v):
    return 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))


def test_normalize_scale_is_differentiable_twice():
    w, scale = normal(3, 5).requires_grad_(), normal(3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(normalize_scale, [w, scale])
    assert torch.autograd.gradgradcheck(normalize_scale, [w, scale])


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_lengths_whose_squares_overflow_are_safe(scale):
    w = normal(3, 6)
    # scale * w is rounded, so entries differ by half an ulp before anything is computed.
    torch.testing.assert_close(normalize_scale(scale * w, torch.ones(3).double()), unit(w), atol=8 * EPS, rtol=0)


def test_weight_norm_is_the_formula_and_its_gradient_is_tangent():
    w, scale = normal(6, 7).requires_grad_(), normal(6, seed=1)
    out = normalize_scale(w, scale)
    torch.testing.assert_close(out.detach(), scale[:, None] * unit(w.detach()), atol=8 * EPS, rtol=0)
    out.backward(normal(6, 7, seed=2))
    # The output does not depend on ||w||, so no row of the gradient has a component along w.
    assert (w.grad * w.detach()).sum(1).abs().max() < 7 * EPS * 32


def test_weight_norm_of_a_zero_row_is_zero_with_zero_derivatives():
    w = torch.zeros(1, 3, requires_grad=True)
    out = normalize_scale(w, torch.ones(1))
    out.sum().backward()
    assert torch.equal(out.detach(), torch.zeros(1, 3))
    assert torch.equal(w.grad, torch.zeros(1, 3))


@pytest.mark.parametrize("m", [1, 2, 5, 1152])
def test_weight_norm_backward_is_the_vector_jacobian_product(m):
    w, scale, g = normal(6, m).requires_grad_(), normal(6, seed=1).requires_grad_(), normal(6, m, seed=2)
    expected = torch.autograd.grad(normalize_scale(w, scale), [w, scale], g)
    for mine, autograd in zip(normalize_scale_backward(g, w, scale), expected, strict=True):
        # Sums of m products below 16, divided by the length of a row, which may be as small as 0.1 for m = 1.
        torch.testing.assert_close(mine, autograd, atol=16 * 16 * math.sqrt(m) * EPS, rtol=0)


@pytest.mark.parametrize("m", [1, 2, 5, 65])
def test_weight_norm_jvp_is_the_adjoint_of_the_backward(m):
    w, scale, g = normal(6, m), normal(6, seed=1), normal(6, m, seed=2)
    dw, dscale = normal(6, m, seed=3), normal(6, seed=4)
    grad_weight, grad_scale = normalize_scale_backward(g, w, scale)
    jvp = normalize_scale_jvp(dw, dscale, w, scale)
    left, right = (jvp * g).sum(), (grad_weight * dw).sum() + (grad_scale * dscale).sum()
    torch.testing.assert_close(left, right, atol=g.numel() * 16 * EPS, rtol=0)
    _, forward_mode = torch.func.jvp(normalize_scale, (w, scale), (dw, dscale))
    torch.testing.assert_close(jvp, forward_mode, atol=16 * 16 * EPS, rtol=0)


def test_weight_norm_backward_and_jvp_are_differentiable_twice():
    w, scale, g = normal(3, 5).requires_grad_(), normal(3, seed=1).requires_grad_(), normal(3, 5, seed=2)
    g.requires_grad_()
    dw, dscale = normal(3, 5, seed=3).requires_grad_(), normal(3, seed=4).requires_grad_()
    for function, arguments in (
        (normalize_scale_backward, [g, w, scale]),
        (normalize_scale_jvp, [dw, dscale, w, scale]),
    ):
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("length", [1e-300, 1e-160, 1e160, 1e300])
def test_weight_norm_derivatives_of_any_length(length):
    w, scale, g = normal(3, 6), normal(3, seed=1), normal(3, 6, seed=2)
    expected, grad_scale = normalize_scale_backward(g, w, scale)
    found, found_scale = normalize_scale_backward(g, length * w, scale)
    # The gradient of a row is inversely proportional to its length; `length` itself is rounded.
    torch.testing.assert_close(found * length, expected, atol=32 * EPS, rtol=0)
    torch.testing.assert_close(found_scale, grad_scale, atol=32 * EPS, rtol=0)
    dw, dscale = normal(3, 6, seed=3), normal(3, seed=4)
    jvp, found_jvp = (normalize_scale_jvp(size * dw, dscale, size * w, scale) for size in (1, length))
    torch.testing.assert_close(found_jvp, jvp, atol=32 * EPS, rtol=0)


def test_weight_norm_backward_and_jvp_of_a_zero_row_are_zero():
    w, scale = torch.cat([torch.zeros(1, 4), torch.ones(1, 4)]).double(), torch.ones(2).double()
    results = *normalize_scale_backward(normal(2, 4), w, scale), normalize_scale_jvp(normal(2, 4), normal(2), w, scale)
    for result in results:
        assert torch.equal(result[0], torch.zeros_like(result[0]))
        assert result[1].abs().sum() > 0


def test_weight_norm_turns_by_at_most_the_arcsine_of_the_relative_step():
    w = normal(300, 6)
    e = unit(normal(300, 6, seed=1)) * w.norm(dim=1, keepdim=True) * 0.6
    one = torch.ones(300, dtype=torch.float64)
    turn = angles_between(normalize_scale(w, one), normalize_scale(w + e, one))
    assert (turn <= math.asin(0.6) + 8 * EPS).all()
    assert (angles_between(normalize_scale(w, one), normalize_scale(-w, one)) > math.pi - 8 * EPS).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_kept_and_gives_finite_results(dtype):
    w = unit(normal(5, 33)).to(dtype)
    for out in (
        normalize_scale(w, w[:, 0]),
        *normalize_scale_backward(w, w, w[:, 0]),
        normalize_scale_jvp(w, w[:, 0], w, w[:, 0]),
    ):
        assert out.dtype == dtype
        assert out.isfinite().all()


def test_empty_inputs():
    assert normalize_scale(torch.empty(0, 5), torch.empty(0)).shape == (0, 5)


def test_the_stem_keeps_its_old_address():
    """Users import the functions from lcw_ops.reference.hypersphere."""
    for function in (normalize_scale, normalize_scale_backward, normalize_scale_jvp):
        assert getattr(hypersphere, function.__name__) is function


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: normalize_scale(torch.ones(3, 2), torch.ones(2)), ValueError, "scale has shape"),
        (
            lambda: normalize_scale_backward(torch.ones(3, 3), torch.ones(3, 2), torch.ones(3)),
            ValueError,
            "normalize_scale_backward: grad_output has",
        ),
        (
            lambda: normalize_scale_backward(torch.ones(3, 2), torch.ones(3, 2), torch.ones(2)),
            ValueError,
            "normalize_scale_backward: scale has",
        ),
        (
            lambda: normalize_scale_jvp(torch.ones(3, 3), torch.ones(3), torch.ones(3, 2), torch.ones(3)),
            ValueError,
            "tangent_weight has",
        ),
        (
            lambda: normalize_scale_jvp(torch.ones(3, 2), torch.ones(2), torch.ones(3, 2), torch.ones(3)),
            ValueError,
            "tangent_scale has",
        ),
        (
            lambda: normalize_scale_jvp(torch.ones(3, 2), torch.ones(3), torch.ones(3, 2), torch.ones(2)),
            ValueError,
            "scale has",
        ),
        (
            lambda: normalize_scale_jvp(torch.ones(3, 2), torch.ones(3), torch.ones(3, 2), torch.ones(3).double()),
            TypeError,
            "scale is torch.float64",
        ),
    ],
)
def test_errors_name_the_argument_and_what_came(call, error, words):
    with pytest.raises(error, match=words):
        call()
