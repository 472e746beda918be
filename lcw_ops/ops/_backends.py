"""Moved to lcw_ops.ops.backends."""

import sys

from lcw_ops.ops.backends import *  # noqa: F403

# The module itself, so that a class or a patch is the same under both names.
sys.modules[__name__] = sys.modules["lcw_ops.ops.backends"]
