"""A value computed from a layer's parameters, kept between inference calls. Only a hash collision makes it stale.

A kept value belongs to one content of the parameters. An edit through ``.data`` changes neither version nor address, so
the content itself is compared, by a fingerprint of its bytes. Reading the parameters once for that takes a fraction of
the time of computing and writing the value again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lcw_ops.ops import backends, fingerprint


class DerivedWeight:
    """The last value of one function of parameters, kept on a CPU, in eval mode, without gradients.

    It is not part of a module's state: a copy or a pickle starts empty.
    """

    def __init__(self) -> None:
        # One tuple of key and value, so that threads that share a module read and replace both together.
        self._kept: tuple = (None, None)

    def get(self, parameter: Tensor, compute: Callable[[Tensor], Tensor], training: bool) -> Tensor:
        """``compute(parameter)``, or its earlier result for the same content."""
        value = self.kept(compute, training, parameter)
        return compute(parameter) if value is None else value

    def kept(self, compute: Callable[..., Tensor], training: bool, *parameters: Tensor) -> Tensor | None:
        """As ``get``, for several parameters. If no value can be kept, computes nothing and returns None."""
        if training or torch.is_grad_enabled() or not all(fingerprint.can_be_taken(p) for p in parameters):
            return None
        content = [(p.data_ptr(), p.shape, p.dtype, fingerprint.fingerprint(p)) for p in parameters]
        key = (backends.requested(), *content)
        kept, value = self._kept
        if key != kept:
            value = compute(*parameters)
            self._kept = (key, value)
        return value

    def __deepcopy__(self, memo) -> "DerivedWeight":
        return type(self)()

    def __reduce__(self):
        return type(self), ()
