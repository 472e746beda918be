"""Rigorous bounds for a matrix's norm, gradients, Jacobians and states, with which the measured figures are compared.

The Jacobian of one layer h -> alpha O h + beta act(W h + b) has singular values between |alpha| o_min - |beta| s and
|alpha| o_max + |beta| s. Here s = Lip(act) ||W||_2, and o_min, o_max are bounds of the singular values of O, the fixed
filter: 1 for a permutation, sqrt(1 -+ ||O^T O - I||_2) for a matrix that is orthogonal up to rounding. Over L layers
this rounding counts L times. The bounds are derived here; the paper on such networks (A. Ceni, "Random Orthogonal
Additive Filters") proves bounds of this kind.

The bounds hold for the stored network in exact arithmetic. They leave out the rounding of the measured pass: in float32
a few 1e-8 per layer, of either sign.
"""

import math

import numpy as np
import torch
from torch import Tensor

# The default of spectral_norm_bound. The bound is then at most N^(1 / 2^(SQUARINGS + 1)) times the norm of an N x N
# matrix: 3.3 % above it for N = 64.
SQUARINGS = 6

# Up to this width, the exact spectral norm of a filter takes a fraction of a second.
WIDEST_SPECTRAL = 512

# The filters of all layers are checked in parts of this size, counted in float64.
PART_BYTES = 64 * 2**20


def spectral_norm_bound(weight: Tensor, squarings: int = SQUARINGS) -> Tensor:
    """An upper bound of ||W||_2 for a batch of matrices, by Schatten norms: batched products, without iteration.

    G = W^T W has eigenvalues sigma_i^2 >= 0, so

        ||W||_2^(2 p) = max_i sigma_i^(2 p) <= sum_i sigma_i^(2 p) = tr G^p <= N ||W||_2^(2 p),    p = 2^squarings

    and tr(G^p)^(1 / 2p) lies between ||W||_2 and N^(1 / 2p) ||W||_2. G^p comes from repeated squaring. The last
    squaring is not needed, because tr G^p = ||G^(p/2)||_F^2.

    Rounding is part of the bound. Each power is divided by its Frobenius norm, so a computed product fl(X Y) satisfies
    ||fl(X Y) - X Y||_F <= gamma, where gamma = n u / (1 - n u) for inner products of n terms and unit roundoff u. With
    G_k, the k-th power after this division, from the last power back to the first,

        ||G_k||_2 = sqrt(||G_k^T G_k||_2) <= sqrt(||fl(G_k^T G_k)||_2 + gamma)

    which raises the bound by about gamma times N at worst, 1e-4 in float32 at N = 64.

    Args:
        weight: (L, N, K) or (N, K), float32 or float64 (16-bit types are widened).
        squarings: at least 1.

    Returns:
        (L,) or (), float64: at least ||W_l||_2; inf if the matrix is not finite.
    """
    # If torch may round factors of a float32 product to fewer bits (TF32, bfloat16), gamma holds only in float64.
    exact_float32 = torch.get_float32_matmul_precision() == "highest"
    matrix = weight.detach()
    matrix = matrix.to(torch.float32 if exact_float32 and matrix.dtype != torch.float64 else torch.float64)
    # 8 roundings more than in the products, for the divisions by norms and the norms' own errors.
    terms = max(matrix.shape[-2:]) + 8
    roundoff = torch.finfo(matrix.dtype).eps / 2
    gamma = terms * roundoff / (1 - terms * roundoff)

    matrix, norm = _normalised(matrix)
    power = matrix.mT @ matrix
    norms = []
    for _ in range(squarings - 1):
        power, power_norm = _normalised(power)
        norms.append(power_norm)
        # P^T P instead of P P: ||P^T P||_2 = ||P||_2^2 holds even if rounding made P slightly unsymmetric.
        power = power.mT @ power
    # ||G||_2 <= sqrt(tr G^2) = ||G||_F: the last squaring, for free.
    bound = _frobenius(power)
    for power_norm in reversed(norms):
        bound = power_norm * (bound + gamma).sqrt()
    bound = norm * (bound + gamma).sqrt()
    return torch.where(bound.isfinite(), bound, math.inf) * (1 + 4 * terms * roundoff)


def _frobenius(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix.double())


def _normalised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    # Divide by the largest entry first, so that squares neither underflow nor overflow.
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    matrix = matrix / torch.where(largest > 0, largest, 1)
    norm = _frobenius(matrix)
    matrix = matrix / torch.where(norm > 0, norm, 1)[..., None, None].to(matrix.dtype)
    return matrix, norm * largest[..., 0, 0].double()


@torch.no_grad()
def filter_deviation(filter: Tensor) -> np.ndarray:
    """d >= ||O^T O - I||_2 of a stored filter, (1,) or (L,): its singular values lie in [sqrt(1 - d), sqrt(1 + d)].

    ``filter`` is (N,) int64, a permutation, whose d is 0; or (N, N) or (L, N, N). d includes float64's own rounding.
    """
    if filter.dim() == 1:
        return np.zeros(1)
    matrices = filter.detach() if filter.dim() == 3 else filter.detach().unsqueeze(0)
    width = matrices.shape[-1]
    identity = torch.eye(width, dtype=torch.float64, device=filter.device)
    # One spectral norm is cheap up to this width. For many or large matrices, the Frobenius norm is the bound.
    spectral = len(matrices) == 1 and width <= WIDEST_SPECTRAL
    deviations = []
    for part in matrices.split(max(1, PART_BYTES // (8 * width * width))):
        exact = part.double()
        error = exact.mT @ exact - identity
        deviations.append(torch.linalg.matrix_norm(error, 2) if spectral else torch.linalg.matrix_norm(error))
    # Inner products of N terms and the norm's own error: at most a few N roundings of ||O||_F^2, which is about N.
    rounding = 8 * width * width * torch.finfo(torch.float64).eps
    return torch.cat(deviations).cpu().numpy() + rounding


def layer_gain_bounds(
    alpha, beta, spectral_norm, lipschitz: float, deviation: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(lower, upper) bounds of the singular values of every layer's Jacobian, (L,) each, at least 0.

    ``alpha``, ``beta`` and ``deviation`` (of the filter, from :func:`filter_deviation`) are (1,) or (L,).
    ``spectral_norm`` (L,) is at least ||W_l||_2, and ``lipschitz`` is Lip(act).
    """
    alpha, branch = np.abs(alpha), np.abs(beta) * lipschitz * spectral_norm
    lower = alpha * np.sqrt(np.maximum(1 - deviation, 0.0)) - branch
    return np.maximum(lower, 0.0), alpha * np.sqrt(1 + deviation) + branch


def gradient_norm_bounds(
    gain_lower: np.ndarray, gain_upper: np.ndarray, injected: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """log of the (lower, upper) bounds of ||g_l||, where g_l is the gradient of the state h_l, l = 0..L.

    ||g_l|| <= upper_{l+1} ||g_{l+1}|| + ||e_l|| and ||g_l|| >= lower_{l+1} ||g_{l+1}|| - ||e_l||. Here lower_l, upper_l
    are the layers' gains, and e_l is the gradient that reaches h_l directly, not through the next layer. A network that
    is read at its end has only e_L = g_L. If its gains are all equal, lower^(L-l) ||g_L|| <= ||g_l|| <= upper^(L-l)
    ||g_L||. The bounds are logarithms, because 3^50000 overflows a float.

    ``injected`` is (L+1,), the norms ||e_l||. Returns two arrays (L+1,) of natural logarithms, -inf for a bound of 0.
    """
    with np.errstate(divide="ignore"):
        log_lower_gain, log_upper_gain, log_injected = (np.log(x) for x in (gain_lower, gain_upper, injected))
    steps = len(gain_lower)
    lower, upper = np.empty(steps + 1), np.empty(steps + 1)
    lower[steps] = upper[steps] = log_injected[steps]
    for l in reversed(range(steps)):
        upper[l] = np.logaddexp(upper[l + 1] + log_upper_gain[l], log_injected[l])
        carried = lower[l + 1] + log_lower_gain[l]
        # log(exp(carried) - exp(injected)); the bound is 0 if the difference is negative.
        shrink = -math.expm1(log_injected[l] - carried) if carried > log_injected[l] else 0.0
        lower[l] = carried + math.log(shrink) if shrink > 0 else -math.inf
    return lower, upper


def jacobian_bounds(gain_lower: np.ndarray, gain_upper: np.ndarray) -> tuple[float, float]:
    """log of the (lower, upper) bounds of the singular values of h_0 -> h_L: the products of the layers' bounds."""
    with np.errstate(divide="ignore"):
        return float(np.log(gain_lower).sum()), float(np.log(gain_upper).sum())


def state_rms_bound(
    alpha, beta, h0: Tensor, steps: int, activation: str, deviation: np.ndarray | float = 0.0
) -> np.ndarray:
    """Upper bounds of rms(h_l), l = 1..L, if |act| <= 1: ||h_l|| <= |alpha| ||O||_2 ||h_{l-1}|| + |beta| sqrt(N).

    In the convex case (alpha + beta = 1, ||O||_2 = 1), ||h_l|| never exceeds max(||h_0||, sqrt(N)). For an unbounded
    activation the bounds are NaN. ``h0`` is (M, N); the rms is over M samples and N units. ``deviation`` is that of
    :func:`filter_deviation`.
    """
    if activation not in ("tanh", "sigmoid"):
        return np.full(steps, math.nan)
    alpha = np.abs(alpha) * np.sqrt(1 + deviation)
    alpha, beta = (np.broadcast_to(np.abs(scale), steps) for scale in (alpha, beta))
    # The recursion r <- alpha r + beta sqrt(N) is the same for every sample: r_l = carried_l r_0 + added_l sqrt(N).
    carried, added = 1.0, 0.0
    factors = np.empty((steps, 2))
    for l in range(steps):
        carried, added = alpha[l] * carried, alpha[l] * added + beta[l]
        factors[l] = carried, added
    rms = h0.detach().double().square().mean(1).sqrt().cpu().numpy()
    # The mean over samples of (carried r + added)^2, without an (L, M) array.
    carried, added = factors.T
    return np.sqrt(carried**2 * np.mean(rms**2) + 2 * carried * added * np.mean(rms) + added**2)
