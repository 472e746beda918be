"""Utilities for modules of any kind, in the manner of ``torch.nn.utils``."""

from lcw_ops.nn.utils import parametrizations

__all__ = ["parametrizations"]
