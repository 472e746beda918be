"""The recurrence in parallel over depth, in plain PyTorch: the functions of a Picard sweep over all layers at once.

    h_l = alpha_l O h_{l-1} + F_l,    F_l = beta_l act(W_l h_{l-1} + b_l + u_l),    l = 1..D

The first term is a linear recurrence, which a scan solves in parallel; F is small for beta = c/L. A sweep computes
every F_l from the states of the sweep before, which takes one batched matmul, and scans once. The gradients G_l of h_l
satisfy G_{l-1} = alpha_l O^T G_l + W_l^T (beta_l act'(A_l) * G_l), where A_l is the argument of act. This adjoint
recurrence has the same structure, and runs from layer D to 1. Derived here; the idea is that of Picard-Lindelof and of
waveform relaxation. DEER and ELK are near relatives.

A filter is a linear map of rows, in one of three forms: an int64 permutation p (N,) with (O h)_i = h_{p_i}; a matrix
(N, N); or rotations (2 N,), N cosines and then N sines of (O h)_i = cosine_i h_i + sine_i h_{i xor 1}: the matrices
with 2 x 2 blocks on the diagonal. (If N is odd, the last unit has no partner, and its sine is 0.)
"""

import torch
from torch import Tensor

from lcw_ops.reference.orthogonal_filter import ACTIVATIONS, activation_derivative


def is_permutation(filter: Tensor) -> bool:
    return filter.dtype == torch.int64


def is_rotation(filter: Tensor) -> bool:
    return filter.dim() == 1 and not is_permutation(filter)


def apply_filter(states: Tensor, filter: Tensor) -> Tensor:
    """O h for every row h of ``states`` (..., N), in any of the three forms; computed in the states' dtype."""
    if is_permutation(filter):
        return states[..., filter]
    filter = filter.to(states.dtype)
    if not is_rotation(filter):
        return states @ filter.mT
    cosine, sine = filter.chunk(2)
    return cosine * states + sine * states[..., partners(cosine)]


def partners(units: Tensor) -> Tensor:
    """i xor 1 for every unit i of (N,). If N is odd, the last unit is its own partner."""
    width = units.shape[0]
    return (torch.arange(width, device=units.device) ^ 1).clamp(max=width - 1)


def transpose_filter(filter: Tensor) -> Tensor:
    """O^T, in the form of O."""
    if is_permutation(filter):
        return filter.argsort()
    if not is_rotation(filter):
        return filter.mT
    cosine, sine = filter.chunk(2)
    return torch.cat((cosine, sine[partners(sine)]))


def compose_filters(first: Tensor, second: Tensor) -> Tensor:
    """The map that applies ``first`` and then ``second``, in their common form."""
    if is_permutation(first):
        return first[second]
    if not is_rotation(first):
        return second @ first
    (cosine, sine), (other_cosine, other_sine) = first.chunk(2), second.chunk(2)
    partner = partners(cosine)
    return torch.cat(
        (
            cosine * other_cosine + other_sine * sine[partner],
            other_cosine * sine + other_sine * cosine[partner],
        )
    )


def filter_power(filter: Tensor, exponent: int) -> Tensor:
    """O^exponent in O's form. Matrices and rotations are in float64."""
    if not is_permutation(filter):
        filter = filter.double()
    power = None
    while exponent:
        if exponent & 1:
            power = filter if power is None else compose_filters(power, filter)
        exponent >>= 1
        if exponent:
            filter = compose_filters(filter, filter)
    return identity_like(filter) if power is None else power


def identity_like(filter: Tensor) -> Tensor:
    if is_permutation(filter):
        return torch.arange(len(filter), device=filter.device)
    if not is_rotation(filter):
        return torch.eye(len(filter), dtype=filter.dtype, device=filter.device)
    cosine, sine = filter.chunk(2)
    return torch.cat((torch.ones_like(cosine), torch.zeros_like(sine)))


def linear_scan(first: Tensor, source: Tensor, filter: Tensor, alpha: Tensor) -> Tensor:
    """x_0 = first, x_l = alpha_l O x_{l-1} + source_l: all of them, (D+1, M, N), in log2(D) passes.

    ``first`` (M, N), ``source`` (D, M, N), ``alpha`` (1,) or (D,), for M samples and N units. Before the pass with the
    shift s, x_l is a sum over the last s terms. The pass adds the sum over the s terms before these:
    x_l <- x_l + (alpha_l ... alpha_{l-s+1}) O^s x_{l-s}.
    """
    steps = source.shape[0]
    sums = torch.cat((first.unsqueeze(0), source))
    # x_0 has no predecessor: the factor 0 ends every product that would reach beyond it.
    decay = torch.cat((alpha.new_zeros(1), alpha.expand(steps)))[:, None, None]
    power = filter if is_permutation(filter) else filter.double()
    shift = 1
    while shift <= steps:
        before = apply_filter(sums[:-shift], power)
        sums = torch.cat((sums[:shift], sums[shift:] + decay[shift:] * before))
        decay = torch.cat((torch.zeros_like(decay[:shift]), decay[shift:] * decay[:-shift]))
        power, shift = compose_filters(power, power), 2 * shift
    return sums


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """max over layers and samples of max_i |new_i - old_i| / max_i |new_i|, (1,) in float64.

    The result is 0 if nothing changed, and NaN or inf if a new state is not finite. Largest elements are compared, and
    not roots of squares, because squares of small states underflow.
    """
    if new.numel() == 0:
        return new.new_zeros(1, dtype=torch.float64)
    change, scale = (new - old).abs().amax(-1), new.abs().amax(-1)
    ratio = torch.where(change == 0, 0, change / scale)
    # Two infinite states cannot be compared.
    return torch.where(scale.isfinite(), ratio, torch.nan).amax().double().reshape(1)


def activate_(
    product: Tensor, bias: Tensor | None, inputs: Tensor | None, beta: Tensor, activation: str, derivative: bool
) -> None:
    """product <- beta_l act(A_l), or beta_l act'(A_l), with A_l = product_l + bias_l + inputs_l, in place.

    ``product`` (D, M, N) holds W_l h_{l-1}; ``bias`` (D, N) or (N,); ``inputs`` (D, M, N); ``beta`` (1,) or (D,).
    """
    pre_activation = product
    for shift in (bias, inputs):
        if shift is not None:
            pre_activation = pre_activation + (shift.unsqueeze(1) if shift.dim() == 2 else shift)
    act = activation_derivative(pre_activation, activation) if derivative else ACTIVATIONS[activation](pre_activation)
    product.copy_(beta[:, None, None] * act)


def sweep_(
    states: Tensor,
    product: Tensor | None,
    bias: Tensor | None,
    inputs: Tensor | None,
    filter: Tensor,
    alpha: Tensor,
    beta: Tensor,
    activation: str,
) -> Tensor:
    """One scan: states_l <- alpha_l O states_{l-1} + beta_l act(product_l + bias_l + inputs_l) for l = 1..D, in place.

    ``states`` (D+1, M, N) holds the states of the sweep before. The first, states_0, is given, not written. ``product``
    is as in :func:`activate_`, but is not written; None leaves the second term out. ``alpha``, ``beta`` (1,) or (D,).

    Returns:
        :func:`relative_change` of states_1..D.
    """
    if product is None:
        source = torch.zeros_like(states[1:])
    else:
        source = product.clone()
        activate_(source, bias, inputs, beta, activation, derivative=False)
    new = linear_scan(states[0], source, filter, alpha)
    change = relative_change(new[1:], states[1:])
    states[1:] = new[1:]
    return change


def adjoint_sweep_(
    gradients: Tensor,
    product: Tensor | None,
    outside: Tensor | None,
    filter: Tensor,
    alpha: Tensor,
    slope: Tensor | None,
    scaled: Tensor | None,
) -> Tensor:
    """One scan from the end: gradients_{l-1} <- alpha_l O gradients_l + product_l + outside_l, l = D..1, in place.

    ``gradients`` (D+1, M, N): the last one is given, not written. ``product`` (D, M, N) holds P_l W_l, where P_l is the
    gradient of A_l. ``outside`` (D, M, N) holds the gradient that state l-1 receives from outside the recurrence.
    Either may be None. ``filter``, O in this formula, is the transpose of the layers' filter. With ``slope`` (D, M, N),
    scaled_l <- slope_l gradients_l with the new gradients.

    Returns:
        :func:`relative_change` of gradients_0..D-1.
    """
    source = torch.zeros_like(gradients[1:])
    for term in (product, outside):
        if term is not None:
            source = source + term
    new = linear_scan(gradients[-1], source.flip(0), filter, alpha.flip(0)).flip(0)
    change = relative_change(new[:-1], gradients[:-1])
    gradients[:-1] = new[:-1]
    if slope is not None:
        torch.mul(slope, gradients[1:], out=scaled)
    return change
