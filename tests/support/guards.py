"""Tensors with unreadable pages on either side: a kernel that reads or writes beyond an argument crashes the process.

pytest-xdist reports such a crash as a failed test and starts a new process. Without xdist the whole run ends. On a
GPU, whose memory cannot be protected, tensors lie between NaN instead.
"""

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
PROT_NONE, MAP_PRIVATE_ANONYMOUS = 0, 0x22


def between_guards(tensor: Tensor, flush: str) -> Tensor:
    """The same tensor in read-only memory with an unreadable page on either side, flush with one of them.

    Args:
        tensor: any dtype and shape; it is copied in C order. A tensor without elements is returned unchanged.
        flush: "front" or "back", the guard page that the tensor touches.
    """
    if not tensor.numel():
        return tensor
    address, inside, start = _guarded_memory(tensor, flush)
    guarded = _view(start, tensor)
    guarded.copy_(tensor)
    assert _libc().mprotect(address, inside, mmap.PROT_READ) == 0
    return guarded


def writable_between_guards(tensor: Tensor, flush: str) -> Tensor:
    """As `between_guards`, but in writable memory, for an argument to which the op writes."""
    if not tensor.numel():
        return tensor
    guarded = _view(_guarded_memory(tensor, flush)[2], tensor)
    return guarded.copy_(tensor)


def between_nans(tensor: Tensor, flush: str) -> Tensor:
    """The same tensor, of any device, with a page of NaN (integers: of their largest number) on either side.

    Args:
        tensor: any dtype and shape; it is copied in C order. A tensor without elements is returned unchanged.
        flush: "front": the tensor begins at a multiple of PAGE bytes. "back": it ends at one, and begins anywhere.
    """
    if not tensor.numel():
        return tensor
    per_page = PAGE // tensor.element_size()
    start = per_page if flush == "front" else per_page + -tensor.numel() % per_page
    wrong = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    memory = tensor.new_full([start + tensor.numel() + per_page], wrong)
    return memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def _guarded_memory(tensor: Tensor, flush: str) -> tuple[int, int, int]:
    """Allocate writable memory. Returns its first page's address, its bytes between the guards, the tensor's address.

    The memory is never freed: tensors in it may live on in autograd's graph.
    """
    libc = _libc()
    size = tensor.numel() * tensor.element_size()
    inside = -(-size // PAGE) * PAGE
    address = libc.mmap(None, inside + 2 * PAGE, PROT_NONE, MAP_PRIVATE_ANONYMOUS, -1, 0) + PAGE
    assert libc.mprotect(address, inside, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    return address, inside, address if flush == "front" else address + inside - size


def _view(start: int, tensor: Tensor) -> Tensor:
    size = tensor.numel() * tensor.element_size()
    return torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=tensor.dtype).view(tensor.shape)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
