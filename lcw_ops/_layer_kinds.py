"""Which torch layer a module is, or stands in for.

The constrained layers of lcw_ops.nn are not subclasses of their namesakes in torch.nn: code that goes by ``isinstance``
writes into ``weight``, as initialisers, adapters and quantizers do. Our own code asks these functions instead.
"""

from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def plain_kind(layer: nn.Module) -> type[nn.Module]:
    """The class in torch.nn in whose place one of our layers stands. For every other module, its own class."""
    kind = getattr(type(layer), "_plain", None)
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) else type(layer)


def is_linear(layer: nn.Module) -> bool:
    """Whether the module is an ``nn.Linear`` or stands in for one: an LCW, GmP or weight-norm layer."""
    return issubclass(plain_kind(layer), nn.Linear)


def is_conv(layer: nn.Module) -> bool:
    """Whether the module is an ``nn.Conv1d``, ``2d`` or ``3d``, or stands in for one."""
    return issubclass(plain_kind(layer), CONVOLUTIONS)
