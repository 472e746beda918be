"""torch.optim's SGD and AdamW with activated gradients inside the step, without a separate pass over the gradients."""

from lcw_ops.optim.adamw import AdamW
from lcw_ops.optim.sgd import SGD

__all__ = ["SGD", "AdamW"]
