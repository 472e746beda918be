"""torch.optim's SGD and AdamW with activated gradients inside the step: no pass over the gradients of their own."""

from lcw_ops.optim.adamw import AdamW
from lcw_ops.optim.sgd import SGD

__all__ = ["SGD", "AdamW"]
