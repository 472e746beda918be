"""Initialisers in the manner of torch.nn.init: they fill tensors in place, under no_grad, and return them.

lcw_ draws linearly constrained weights (Kutsuna 2019) from N(0, sv^2) with m sv^2 = s^2 / Var f(s Z). Here m is the
fan-in, f the previous layer's activation, s the standard deviation of pre-activations, and Z ~ N(0, 1). lps_ and
lps_model_ draw a unit's weights and bias as one group (linear product structure; Chen, Hao, He 2022). gmp_ gives a
GmP layer the angles of uniform weights (Chen, Ge 2024, from the authors' code). The scale of lcw_ and the rules of lps_
are derived here.
"""

from lcw_ops.init.gmp import gmp_
from lcw_ops.init.lcw import lcw_
from lcw_ops.init.lps import RULES, lps_
from lcw_ops.init.model import lps_model_

__all__ = ["RULES", "gmp_", "lcw_", "lps_", "lps_model_"]
