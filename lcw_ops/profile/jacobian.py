"""Extreme singular values of a Jacobian J that need not be formed: Golub-Kahan-Lanczos with products J v and J^T u.

G. H. Golub, W. Kahan, "Calculating the singular values and pseudo-inverse of a matrix", SIAM J. Numer. Anal. 2 (1965).
Unlike power iteration, the method keeps every vector, fully reorthogonalised, and so converges much faster. J v is
called a JVP here, and J^T u a VJP. If there are few outputs, J is formed after all, which is exact.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcw_ops._checks import check_choice, describe

# Up to this many outputs, one VJP per output gives the exact Jacobian and needs no second derivative of the model.
EXACT_OUTPUTS = 64

_INDEPENDENT = describe(
    "jacobian", "the output", "does not depend on the input", "a result of differentiable operations on the input"
)


class NoSecondDerivative(ValueError):
    """Lanczos needs the derivative of a VJP, and an op of the function has none."""


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run attention and recurrent layers as plain operators, which have second derivatives; fused kernels have none."""
    # mkldnn.flags would set more than this switch, and warn about it.
    before = torch.backends.mkldnn.set_flags(False)[0]
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.set_flags(before)


@dataclass
class JacobianSpectrum:
    """The extreme singular values of a Jacobian, and how reliable they are.

    Attributes:
        largest, smallest: the first and the min(shape)-th singular value.
        shape: (outputs, inputs).
        method: "exact" (the matrix was formed, SVD in float64) or "lanczos".
        iterations: Lanczos steps, or VJPs of the exact method.
        converged: whether both values are within ``tolerance`` of singular values of J (always, for "exact").
        smallest_resolved: False if the smallest value is below the rounding of the largest, and only means "tiny".
        log_lower, log_upper: natural logarithms of rigorous bounds of every singular value, None without bounds.
    """

    largest: float
    smallest: float
    shape: tuple[int, int]
    method: str
    iterations: int
    converged: bool
    smallest_resolved: bool
    log_lower: float | None = None
    log_upper: float | None = None


def check_method(method: str) -> None:
    """Raise ValueError unless the method is one of :func:`function_spectrum`."""
    check_choice("jacobian", "method", method, ("auto", "exact", "lanczos"))


def matrix_spectrum(
    jacobian: Tensor, products: int, exponent: int = 0, computed_in: torch.dtype | None = None
) -> JacobianSpectrum:
    """The spectrum of 2^exponent times ``jacobian``, which ``products`` VJPs formed in precision ``computed_in``."""
    shape = tuple(jacobian.shape)
    if not jacobian.isfinite().all():
        return JacobianSpectrum(math.nan, math.nan, shape, "exact", products, False, False)
    values = torch.linalg.svdvals(jacobian.double())
    largest, smallest = values[0].item(), values[-1].item()
    resolved = smallest > _rounding(computed_in or jacobian.dtype, shape) * largest
    return JacobianSpectrum(
        _scaled(largest, exponent), _scaled(smallest, exponent), shape, "exact", products, True, resolved
    )


def function_spectrum(
    function: Callable[[Tensor], Tensor],
    point: Tensor,
    method: str = "auto",
    iterations: int = 64,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> JacobianSpectrum:
    """Extreme singular values of the Jacobian of ``function`` at ``point``.

    The function is evaluated once. Every product then walks the recorded graph, so that dropout masks and batch
    statistics stay the same. A VJP is one backward pass. A JVP is the derivative of the VJP (which is linear in its
    cotangent), and needs a function that can be differentiated twice.

    Args:
        function: tensor to tensor, differentiable.
        point: any shape.
        method: "exact" (one VJP per output), "lanczos", or "auto": exact for up to 64 outputs.
        iterations: the largest number of Lanczos steps; min(outputs, inputs) of them give the exact result.
        tolerance: Lanczos stops when the relative errors of both extreme values are at most this.
        seed: for the start vector.

    Raises:
        ValueError: unknown method; an output that does not depend on the input; Lanczos of a function that cannot be
            differentiated twice (``NoSecondDerivative``).
    """
    check_method(method)
    with torch.enable_grad():
        point = point.detach().clone().requires_grad_()
        output = function(point)
        if not output.requires_grad:
            raise ValueError(_INDEPENDENT)
        if method == "auto":
            method = "exact" if output.numel() <= EXACT_OUTPUTS else "lanczos"
        if method == "exact":
            return matrix_spectrum(_rows(output, point), output.numel())
        return _function_lanczos(output, point, iterations, tolerance, seed)


def lanczos_spectrum(
    jvp: Callable[[Tensor], Tensor],
    vjp: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    iterations: int = 64,
    tolerance: float = 1e-3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> JacobianSpectrum:
    """Golub-Kahan-Lanczos on the operator J of ``shape`` (outputs, inputs): jvp(v) = J v, vjp(u) = J^T u.

    Both functions take and return flat float64 vectors on the CPU. ``dtype`` is the precision in which they compute; it
    decides below which norm a vector counts as zero. The iteration starts on the smaller side: A, of size q x p with
    p <= q, is J or J^T. U_k and V_k have orthonormal columns, the vectors found so far; e_k is the k-th unit vector:

        A V_k = U_k B_k      A^T U_k = V_k B_k^T + beta_k v_{k+1} e_k^T,      B_k upper bidiagonal

    so a singular value of B_k with left vector y is within |beta_k y_k| of a singular value of A.
    """
    apply, apply_transposed = (jvp, vjp) if shape[1] <= shape[0] else (vjp, jvp)
    dimension = min(shape)
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(dimension, generator=generator, dtype=torch.float64)
    right_basis, left_basis = [right / right.norm()], []
    diagonal, above = [], []
    scale, complete = 0.0, False
    for k in range(min(iterations, dimension)):
        left = apply(right_basis[k])
        left = _orthogonalised(left, left_basis)
        diagonal.append(left.norm().item())
        scale = max(scale, diagonal[-1])
        negligible = _rounding(dtype, shape) * scale
        # There is no new direction. The random start vector has a part in every singular direction, so all values are
        # found.
        if diagonal[-1] <= negligible:
            complete = True
            break
        left_basis.append(left / diagonal[-1])
        right = _orthogonalised(apply_transposed(left_basis[k]), right_basis)
        residual = right.norm().item()
        values, converged = _bidiagonal_extremes(diagonal, above, residual, tolerance)
        complete = residual <= negligible or k + 1 == dimension
        if not all(map(math.isfinite, values)) or complete or converged:
            break
        above.append(residual)
        right_basis.append(right / residual)
    values, converged = _bidiagonal_extremes(
        diagonal, above[: len(diagonal) - 1], residual if not complete else 0.0, tolerance
    )
    largest, smallest = values
    finite = math.isfinite(largest) and math.isfinite(smallest)
    return JacobianSpectrum(
        largest,
        smallest,
        shape,
        "lanczos",
        len(diagonal),
        finite and (complete or converged),
        finite and smallest > _rounding(dtype, shape) * largest,
    )


def _bidiagonal_extremes(diagonal, above, residual, tolerance) -> tuple[tuple[float, float], bool]:
    """((largest, smallest) singular value of B_k, whether both are within the tolerance)."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    matrix += torch.diag(torch.tensor(above, dtype=torch.float64), 1)
    if not matrix.isfinite().all():
        return (math.nan, math.nan), False
    left, values, _ = torch.linalg.svd(matrix)
    errors = residual * left[-1].abs()
    # One direction alone proves nothing about the other end of the spectrum.
    converged = len(diagonal) > 1 and bool((errors[[0, -1]] <= tolerance * values[[0, -1]]).all())
    return (values[0].item(), values[-1].item()), converged


def _orthogonalised(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """Subtract the part in the span of the basis. Two passes are enough (Kahan, in Parlett's book)."""
    if basis:
        matrix = torch.stack(basis)
        for _ in range(2):
            vector = vector - matrix.T @ (matrix @ vector)
    return vector


def _function_lanczos(output: Tensor, point: Tensor, iterations, tolerance, seed) -> JacobianSpectrum:
    cotangent = torch.zeros_like(output, requires_grad=True)
    # The VJP is linear in its cotangent. Its own derivative in direction v, by reverse mode, is J v.
    with _second_derivative():
        pulled_back = _pull_back(output, point, cotangent, create_graph=True)

    def vjp(u: Tensor) -> Tensor:
        product = _pull_back(output, point, u.to(output).view_as(output), retain_graph=True)
        return product.flatten().double().cpu()

    def jvp(v: Tensor) -> Tensor:
        with _second_derivative():
            (product,) = torch.autograd.grad(pulled_back, cotangent, v.to(point).view_as(point), retain_graph=True)
        return product.flatten().double().cpu()

    shape = (output.numel(), point.numel())
    # Under autocast the output is in 16 bits, and so are the products.
    dtype = max(point.dtype, output.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    _check_adjoint(jvp, vjp, output.numel(), dtype)
    return lanczos_spectrum(jvp, vjp, shape, iterations, tolerance, seed, dtype=dtype)


def _check_adjoint(jvp: Callable, vjp: Callable, outputs: int, dtype: torch.dtype) -> None:
    """u^T J v = ||J^T u|| for v = J^T u / ||J^T u||. It is not if a backward of the function hides its cotangent."""
    u = torch.randn(outputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pulled_back = vjp(u / u.norm())
    length = pulled_back.norm().item()
    if not math.isfinite(length) or length < 1e3 * torch.finfo(dtype).tiny:
        return
    pushed = (u / u.norm() @ jvp(pulled_back / length)).item()
    if abs(pushed - length) > max(1e-2, 16 * torch.finfo(dtype).eps) * length:
        came = "has a backward pass that is not differentiable (J v and J^T u do not agree)"
        remedy = "Use the method 'exact', or leave the Jacobian out (profile: jacobian=False)."
        raise NoSecondDerivative(describe("jacobian", "the model", came, "one that autograd can differentiate", remedy))


@contextmanager
def _second_derivative() -> Iterator[None]:
    """Explain an error inside as a missing second derivative: the first pass of the function has succeeded by then."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        came = f"has no second derivative ({reason})"
        remedy = "Use the method 'exact', or leave the Jacobian out (profile: jacobian=False)."
        raise NoSecondDerivative(
            describe("jacobian", "the model", came, "a second derivative, which Lanczos' J v needs", remedy)
        ) from error


def _rows(output: Tensor, point: Tensor) -> Tensor:
    basis = torch.eye(output.numel(), dtype=output.dtype, device=output.device)
    return torch.stack([_pull_back(output, point, row.view_as(output), retain_graph=True).flatten() for row in basis])


def _pull_back(output: Tensor, point: Tensor, cotangent: Tensor, **keep_graph) -> Tensor:
    (product,) = torch.autograd.grad(output, point, cotangent, allow_unused=True, **keep_graph)
    if product is None:
        raise ValueError(_INDEPENDENT)
    return product


def _rounding(dtype: torch.dtype, shape: tuple[int, int]) -> float:
    """The part of the largest singular value below which another one may be rounding.

    16-bit products are summed in float32 and rounded once, by E with ||E||_2 of about 2 eps ||J||_2 (independent
    entries: at most eps ||J||_F (1/sqrt(m) + 1/sqrt(n)) for m outputs and n inputs).
    """
    eps, single = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    return max(2 * eps, max(shape) * single) if eps > single else max(shape) * eps


def _scaled(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.inf
