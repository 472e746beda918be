"""The frame of a dense orthogonal filter: its real eigenbasis, in which the filter rotates pairs of units.

    O = B R B^-1,    R with 2 x 2 blocks r [cos t, sin t; -sin t, cos t] and real numbers on its diagonal

O is the filter, a matrix (N, N) for N units, and the columns of B are the basis. For an exactly orthogonal O this is
the real Schur form, and B is orthogonal. A filter rounded to float32 is orthogonal only to 1e-7, which would show after
50,000 steps. So the frame uses the rounded filter's own eigenvalues and eigenvectors, in float64.

Cost: one eigendecomposition per filter, on the CPU, in a time that grows like N^3. A power of the filter then takes a
number of operations that grows like N, instead of a matmul.
"""

import math
import weakref
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


class _Known(NamedTuple):
    """A frame, and a copy of its filter. ``source`` and ``version`` tell whether a tensor still is that filter."""

    copy: Tensor
    source: weakref.ref[Tensor]
    version: int | None
    frame: Frame | None


# The last few filters. A training loop asks for the same filter in every call.
_REMEMBERED = 8
_frames: list[_Known] = []


def get_frame(filter: Tensor) -> Frame | None:
    """The frame of a matrix (N, N), or None if no well-conditioned frame was found. Results are cached.

    On a GPU, a filter that was written to without torch's knowledge (through ``.data``, by NCCL or by a CUDA graph)
    gets a frame of NaN. The solver then continues layer by layer. A comparison on the host would wait for the GPU.
    """
    version = None if filter.is_inference() else filter._version
    if _is_slow_to_compare(filter):
        for known in _frames:
            if known.source() is filter and version is not None and known.version == version:
                return _valid_if(known, filter)
    kind = filter.dtype, filter.device, filter.shape
    for index, known in enumerate(_frames):
        copy = known.copy
        if (copy.dtype, copy.device, copy.shape) == kind and torch.equal(copy, filter):
            _frames[index] = known._replace(source=weakref.ref(filter), version=version)
            return known.frame
    frame = find_frame(filter)
    _frames.insert(0, _Known(filter.detach().clone(), weakref.ref(filter), version, frame))
    del _frames[_REMEMBERED:]
    return frame


def _is_slow_to_compare(filter: Tensor) -> bool:
    """Whether the host would have to wait for the result."""
    return not filter.is_cpu


def _valid_if(known: _Known, filter: Tensor) -> Frame | None:
    """The frame, with NaN in its rotation if the filter no longer equals its copy. The host does not wait."""
    if known.frame is None:
        return None
    is_same = (known.copy == filter).all()
    return known.frame._replace(rotation=torch.where(is_same, known.frame.rotation, math.nan))


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
