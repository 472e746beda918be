"""What a layer computes of its parameters, kept between calls of inference; never stale, but for a hash collision.

A kept value belongs to parameters with one content. An edit through ``.data`` changes neither version nor address, so
it is the content that is compared: a fingerprint of its bytes, read at the speed of memory, a fraction of computing
and writing the value anew.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lcw_ops.ops import backends, fingerprint


class DerivedWeight:
    """The last value of one function of parameters, if it is of use: on a CPU, in eval mode, without gradients.

    Not part of a module's state: a copy or a pickle begins empty.
    """

    def __init__(self) -> None:
        # Key and value in one: threads that share a module read and replace them together.
        self._kept: tuple = (None, None)

    def get(self, parameter: Tensor, compute: Callable[[Tensor], Tensor], training: bool) -> Tensor:
        """``compute(parameter)``, or what it gave for the same content before."""
        value = self.kept(compute, training, parameter)
        return compute(parameter) if value is None else value

    def kept(self, compute: Callable[..., Tensor], training: bool, *parameters: Tensor) -> Tensor | None:
        """What ``get`` gives, of several parameters; None, and nothing is computed, where no value is of use."""
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
