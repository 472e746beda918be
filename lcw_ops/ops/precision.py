"""Full float32 matmuls, whatever the user's TF32 setting."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# torch's TF32 flag belongs to the process. Without the lock, two threads could restore it in the wrong order.
_lock = threading.RLock()


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Switch TF32 off on CUDA inside the block. The flag is the process's, so other threads lose TF32, too.

    On a CPU the user's torch.set_float32_matmul_precision applies.
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
