"""Moved to lcw_ops.ops.parallel_depth.solver."""

import sys

from lcw_ops.ops.parallel_depth.solver import *  # noqa: F403

# The module itself, so that a class or a patch is the same under both names.
sys.modules[__name__] = sys.modules["lcw_ops.ops.parallel_depth.solver"]
