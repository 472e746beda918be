"""The initialiser of GmP's angles, radii and locations."""

import math

import torch
from torch import Tensor

from lcw_ops._checks import accumulation_dtype, check_per_unit, check_rows, describe
from lcw_ops.init._fill import check_fillable, fill_
from lcw_ops.reference import hypersphere_angles


@torch.no_grad()
def gmp_(
    angles: Tensor,
    radius: Tensor,
    location: Tensor,
    out_features: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill angles, radius and location of a GmP layer.

    A matrix W is drawn from U(+-sqrt(6 / (m + out_features))). Its rows give the angles, and their lengths the radius;
    location = 0. With fan-in m = 1 there are no angles and every direction is +1. (If the angles were drawn
    independently, the last component of a direction would shrink like 2^-(m-1).)

    Args:
        angles: (n, m-1).
        radius, location: (n,).
        out_features: None for n, the number of units.
        generator: a torch.Generator, or None for torch's default. Numbers are drawn on its device.

    Returns:
        (angles, radius, location).

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: shapes other than those above, out_features below 1, or a tensor that is computed from others.

    Source: the authors' code, but with the sign of W's last column kept.
    """
    dtype = accumulation_dtype("gmp_", angles=angles, radius=radius, location=location)
    check_rows("gmp_", "angles", angles, "(n, m-1)")
    units, fan_in = angles.shape[0], angles.shape[1] + 1
    check_per_unit("gmp_", "radius", radius, units)
    check_per_unit("gmp_", "location", location, units)
    check_fillable("gmp_", angles=angles, radius=radius, location=location)
    if out_features is None:
        out_features = units
    elif out_features < 1:
        expected = "at least 1, or None for the number of units"
        raise ValueError(describe("gmp_", "out_features", f"is {out_features}", expected))
    bound = math.sqrt(6 / (fan_in + out_features))
    empty = torch.empty(units, fan_in, dtype=dtype, device=angles.device)
    weight = fill_(empty, lambda tensor: tensor.uniform_(-bound, bound, generator=generator), generator)
    return angles.copy_(hypersphere_angles(weight)), radius.copy_(weight.norm(dim=1)), location.zero_()
