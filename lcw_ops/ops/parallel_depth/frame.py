"""The frame of a dense orthogonal filter: its real eigenbasis, in which the filter rotates pairs of units.

    O = B R B^-1,    R with 2 x 2 blocks r [cos t, sin t; -sin t, cos t] and real numbers on its diagonal

O is the filter, a matrix (N, N) for N units, and the columns of B are the basis. For an exactly orthogonal O this is
the real Schur form, and B is orthogonal. A filter rounded to float32 is orthogonal only to 1e-7, which would show after
50,000 steps. So the frame uses the rounded filter's own eigenvalues and eigenvectors, in float64.

Cost: one eigendecomposition per filter, on the CPU, in a time that grows like N^3. A power of the filter then takes a
number of operations that grows like N, instead of a matmul.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The largest condition number that B may have. Rounding errors of a state that is taken into the basis and back grow by
# at most this factor.
MAX_CONDITION = 4.0

# The largest entry that B^-1 O B - R may have; the entries of R are at most about 1. Over 50,000 steps such an error
# stays below float32's rounding.
MAX_RESIDUAL = 1e-12


class Frame(NamedTuple):
    """The matrices B, B^-1 and R. A state h has the coordinates h' in the frame, with h = B h'.

    States are rows: h = h' ``basis``^T and h' = h ``inverse``^T. ``rotation`` (2 N,) is R in float64: N cosines, then N
    sines. ``basis`` and ``inverse`` are in the filter's dtype, ``exact_basis`` and ``exact_inverse`` in float64.
    """

    basis: Tensor
    inverse: Tensor
    rotation: Tensor
    exact_basis: Tensor
    exact_inverse: Tensor


# Copies of the last few filters, and their frames. A training loop asks for the same filter in every call.
_REMEMBERED = 8
_frames: list[tuple[Tensor, Frame | None]] = []


def get_frame(filter: Tensor) -> Frame | None:
    """The frame of a matrix (N, N), or None if no well-conditioned frame was found. Results are cached."""
    kind = filter.dtype, filter.device, filter.shape
    for known, frame in _frames:
        if (known.dtype, known.device, known.shape) == kind and torch.equal(known, filter):
            return frame
    frame = find_frame(filter)
    _frames.insert(0, (filter.detach().clone(), frame))
    del _frames[_REMEMBERED:]
    return frame


def find_frame(filter: Tensor) -> Frame | None:
    matrix = filter.detach().to("cpu", torch.float64)
    if not len(matrix) or not matrix.isfinite().all():
        return None
    for find_basis in (_eigenbasis, _eigenbasis_of_normal):
        try:
            frame = _checked_frame(matrix, find_basis(matrix))
        except torch.linalg.LinAlgError:
            continue
        if frame is not None:
            return Frame(*(part.to(filter.device) for part in frame))._replace(
                basis=frame.basis.to(filter), inverse=frame.inverse.to(filter)
            )
    return None


def _checked_frame(matrix: Tensor, basis: Tensor) -> Frame | None:
    width = len(matrix)
    if basis.shape != matrix.shape or not basis.isfinite().all():
        return None
    singular_values = torch.linalg.svdvals(basis)
    if not singular_values[0] <= MAX_CONDITION * singular_values[-1]:
        return None
    inverse = torch.linalg.inv(basis)
    blocks = inverse @ matrix @ basis
    cosine, sine = blocks.diagonal().clone(), torch.zeros(width, dtype=torch.float64)
    even, odd = torch.arange(0, width - 1, 2), torch.arange(1, width, 2)
    sine[even], sine[odd] = blocks[even, odd], blocks[odd, even]
    rest = blocks - cosine.diag()
    rest[even, odd], rest[odd, even] = 0.0, 0.0
    if not rest.abs().max() <= MAX_RESIDUAL:
        return None
    return Frame(basis, inverse, torch.cat((cosine, sine)), basis, inverse)


def _eigenbasis(matrix: Tensor) -> Tensor:
    """The eigenbasis of any matrix. It is ill-conditioned if eigenvalues coincide."""
    values, vectors = torch.linalg.eig(matrix)
    pairs = vectors[:, values.imag > 0]
    return _real_basis(pairs, vectors[:, values.imag == 0].real)


def _eigenbasis_of_normal(matrix: Tensor) -> Tensor:
    """The eigenbasis of an exactly normal matrix (a permutation, a reflection), even if eigenvalues coincide.

    For a complex z of modulus 1, an eigenvector v with O v = l v is also an eigenvector of the Hermitian matrix
    (z O + (z O)^H) / 2, to the eigenvalue Re(z l). At a generic angle of z, two of these coincide only if two l do.
    """
    angle = 1.0
    rotated = complex(math.cos(angle), math.sin(angle)) * matrix
    _, vectors = torch.linalg.eigh((rotated + rotated.mH) / 2)
    values = ((vectors.conj() * (matrix.to(vectors.dtype) @ vectors)).sum(0)).imag
    is_real = values.abs() < 1e-8
    real = vectors[:, is_real]
    # The span of the eigenvectors with real eigenvalues contains their conjugates, so it has a real basis. On this
    # space O is symmetric.
    space = torch.linalg.svd(torch.cat((real.real, real.imag), 1), full_matrices=False).U[:, : real.shape[1]]
    _, inner = torch.linalg.eigh(space.mT @ ((matrix + matrix.mT) / 2) @ space)
    return _real_basis(vectors[:, values > 1e-8], space @ inner)


def _real_basis(pairs: Tensor, singles: Tensor) -> Tensor:
    """Real and imaginary parts of complex unit eigenvectors, side by side, then the real eigenvectors."""
    parts = torch.stack((pairs.real, pairs.imag), 2).flatten(1) * math.sqrt(2.0)
    return torch.cat((parts, singles), 1)
