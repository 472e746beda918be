"""What torch's FlopCounterMode cannot see: the products inside the ops of the LCW layer, counted as a plain layer's."""

import torch
from torch.utils.flop_counter import register_flop_formula


@register_flop_formula(torch.ops.lcw_ops.lcw_linear)
def lcw_linear_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.lcw_ops.lcw_linear_backward)
def lcw_linear_backward_flops(
    grad_shape, x_shape, weight_shape, basis, deterministic, needs_x, needs_weight, needs_bias, out_shape=None
) -> int:
    return (needs_x + needs_weight) * lcw_linear_flops(x_shape, weight_shape)
