"""What a layer computes from its weight alone, kept between calls of inference; never stale.

A kept value belongs to one parameter with one content. An edit through ``.data`` changes neither version nor
address, so it is the content that is compared: a fingerprint of its bytes, read at the speed of memory, a fraction
of computing and writing the value anew.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lcw_ops.ops import fingerprint


class DerivedWeight:
    """The last value of one function of one parameter, if it is of use: on a CPU, in eval mode, without gradients.

    Not part of a module's state: a copy or a pickle begins empty.
    """

    def __init__(self) -> None:
        self._key = self._value = None

    def get(self, parameter: Tensor, compute: Callable[[Tensor], Tensor], training: bool) -> Tensor:
        """``compute(parameter)``, or what it gave for the same content before."""
        if training or torch.is_grad_enabled() or not fingerprint.can_be_taken(parameter):
            self._key = self._value = None
            return compute(parameter)
        key = (parameter.data_ptr(), parameter.shape, parameter.dtype, fingerprint.fingerprint(parameter))
        if key != self._key:
            self._key, self._value = None, compute(parameter)
            self._key = key
        return self._value

    def __deepcopy__(self, memo) -> "DerivedWeight":
        return type(self)()

    def __reduce__(self):
        return type(self), ()
