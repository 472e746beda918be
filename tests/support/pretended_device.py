"""A device without memory, to show without a GPU that tests leave no tensor on the CPU: torch refuses a mixture.

Its tensors have shapes and a device, but no numbers. Comparisons of numbers are true. It needs a process of its own,
with LCW_OPS_TEST_DEVICE=card:0, and ``register`` before the tests' modules are imported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import backend_registration

NAME = "card:0"


def is_possible() -> bool:
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def register() -> None:
    backend_registration._setup_privateuseone_for_python_backend("card")


@contextmanager
def pretending() -> Iterator[None]:
    """A context in which every tensor is one without numbers."""
    device = torch.device(NAME)

    def assert_close(actual, expected, **_) -> None:
        assert actual.device == expected.device == device

    def is_true(self) -> bool:
        return True

    with (
        mock.patch.object(FakeTensor, "__bool__", is_true, create=True),
        mock.patch.object(torch, "equal", lambda one, other: one.device == other.device == device),
        mock.patch.object(torch.testing, "assert_close", assert_close),
        FakeTensorMode(),
    ):
        yield
