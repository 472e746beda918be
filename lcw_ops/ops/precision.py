"""Matmuls in all digits of float32, whatever the user has set for his own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The flag is the process's: who sets it waits for who has set it, or the wrong one would be put back.
_lock = threading.RLock()


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """On CUDA no TF32. torch has one such flag for the process: other threads' matmuls are without it meanwhile, too.

    On a CPU the user's torch.set_float32_matmul_precision holds.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    with _lock:
        precision, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = precision
