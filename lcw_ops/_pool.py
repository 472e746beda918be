"""A pool that keeps large blocks of memory between uses, so that the system need not map and clear them again.

Memory of a block is lent as a memoryview, and comes back by itself when the view, and whatever reads through it, has
died. Blocks that came back are idle: the next request of about the same size takes one of them. The system may take the
pages of an idle block whenever it needs memory (MADV_FREE), and finds them in place otherwise. A block costs a call of
mmap; a later use of it costs microseconds.

A block comes back without any Python code. Most tensors die inside torch, at the end of a step of training, and Python
code there would be the first that sees a pending Ctrl-C: Python would print the KeyboardInterrupt and go on.
"""

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections import deque
from functools import partial
from pathlib import Path
from weakref import WeakMethod, ref

# The size of a large page, to which blocks are aligned.
PAGE = 2 << 20
# A block serves a request if it is at most this many times as large.
MOST_SPARE = 1.25

# Only Linux has private anonymous mappings, large pages on request and lazily freed pages all together.
IS_SUPPORTED = sys.platform.startswith("linux") and hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MADV_HUGEPAGE")


class Block:
    """Private memory of ``size`` bytes, a multiple of PAGE, on large pages if the system has any."""

    def __init__(self, size: int) -> None:
        self.size = size
        # MAP_PRIVATE: with mmap's default, MAP_SHARED, a forked child would write into the memory of its parent.
        self._mapping = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._start = -ctypes.addressof(ctypes.c_char.from_buffer(self._mapping)) % PAGE
        self.memory = memoryview(self._mapping)[self._start : self._start + size]
        # The system may not know the advice. The memory can be used without it.
        with contextlib.suppress(OSError):
            self._mapping.madvise(mmap.MADV_HUGEPAGE, self._start, size)

    def lend(self, count: int, returned: "deque[Loan]") -> "tuple[memoryview, Loan]":
        """Return the first bytes of the block, and the loan that is put on the queue when they have come back."""
        lease = self.memory[:count]
        loan = Loan(lease, returned.append)
        loan.block = self
        # Python calls the youngest weak reference first. So nobody can take the block before the system has its pages.
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        loan.let_go = Loan(lease, partial(_madvise, address, self.size, mmap.MADV_FREE))
        return lease, loan


class Loan(ref):
    """A weak reference to lent memory. What it calls when the memory has come back must not be Python code."""

    __slots__ = ("block", "let_go")
    block: Block
    let_go: "Loan"

    # madvise, which gets the reference as one argument too many, ignores it as this number.
    _as_parameter_ = 0


if IS_SUPPORTED:
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class Pool:
    """Lends blocks of memory.

    A block comes back in whatever thread drops the last tensor over it, also inside the garbage collector, and so also
    in the middle of a method of the pool. A returning block is therefore only put on a queue, which needs no lock. The
    next method of the pool moves it to the idle blocks.

    Args:
        limit: the most bytes of idle blocks that are kept. Beyond it, the next method unmaps the blocks that were idle
            longest. Until then the system may take their pages, as those of all idle blocks.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Bytes of the blocks in use, and of the idle ones.
        self._lent = self._kept = 0
        self._lock = threading.Lock()
        self._idle: list[Block] = []
        self._returned: deque[Loan] = deque()
        # By id. A weak reference has the hash of its object, and writable memory has none.
        self._loans: dict[int, Loan] = {}
        start_again = WeakMethod(self._start_in_child)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: (method := start_again()) and method())

    def _start_in_child(self) -> None:
        """Start with a lock of its own and without idle blocks: the thread that held the lock was not forked.

        A block that is lent is copied page by page when one of the two processes writes to it, and comes back to the
        pool of each.
        """
        # That thread may have been in the middle of a method, so none is called here.
        self._lock = threading.Lock()
        while self._returned:
            loan = self._returned.popleft()
            self._loans.pop(id(loan), None)
            self._lent -= loan.block.size
        self._idle, self._kept = [], 0

    @property
    def limit(self) -> int:
        return self._limit

    def set_limit(self, limit: int) -> None:
        with self._lock:
            self._limit = limit
            dropped = self._sort_out()
        del dropped

    def lend(self, count: int) -> memoryview | None:
        """Return ``count`` bytes of memory with any contents, or None if the system has no more memory."""
        size = -(-count // PAGE) * PAGE
        with self._lock:
            dropped = self._sort_out()
            block = self._take_idle(size)
            self._lent += size if block is None else block.size
        del dropped
        if block is None:
            block = self._map(size)
        if block is None:
            with self._lock:
                self._lent -= size
            return None
        lease, loan = block.lend(count, self._returned)
        self._loans[id(loan)] = loan
        return lease

    def empty(self) -> None:
        """Give the memory of all idle blocks back to the system."""
        with self._lock:
            dropped = self._sort_out()
            dropped += self._idle
            self._idle, self._kept = [], 0
        del dropped

    def count_bytes(self) -> tuple[int, int]:
        """The bytes of the idle blocks, and of the blocks that are lent."""
        with self._lock:
            dropped = self._sort_out()
            counted = self._kept, self._lent
        del dropped
        return counted

    def _map(self, size: int) -> Block | None:
        for _ in range(2):
            with contextlib.suppress(OSError, MemoryError, OverflowError):
                return Block(size)
            self.empty()
        return None

    def _take_idle(self, size: int) -> Block | None:
        """Take the smallest idle block that fits, and of equal ones the last, whose pages are probably still there."""
        fitting = [block for block in reversed(self._idle) if size <= block.size <= MOST_SPARE * size]
        if not fitting:
            return None
        best = min(fitting, key=lambda block: block.size)
        self._idle.remove(best)
        self._kept -= best.size
        return best

    def _sort_out(self) -> list[Block]:
        """Move the returned blocks to the idle ones.

        Returns the blocks beyond the limit. The caller drops them when it has released the lock, since that takes time.
        """
        while self._returned:
            loan = self._returned.popleft()
            self._loans.pop(id(loan), None)
            block = loan.block
            self._lent -= block.size
            self._kept += block.size
            self._idle.append(block)
        dropped = []
        while self._kept > self._limit:
            dropped.append(self._idle.pop(0))
            self._kept -= dropped[-1].size
        return dropped


def machine_memory(root: str = "/") -> int:
    """The bytes of memory that this process may use: those of the machine, or fewer if a limit is set for its group.

    Control groups of both versions are read, with all groups around the process's own, and the limit on its address
    space.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in _read(Path(root, "proc/self/limits")).splitlines():
        # The module resource would give the number, but torch does not import it.
        if line.startswith("Max address space") and line.split()[3].isdecimal():
            limits.append(int(line.split()[3]))
    for line in _read(Path(root, "proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, name = "", "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = "memory", "memory.limit_in_bytes"
        else:
            continue
        top = Path(root, "sys/fs/cgroup", folder)
        group = top / path.lstrip("/")
        for place in (group, *group.parents):
            text = _read(place / name).strip()
            # Version 2 says "max" where there is no limit, version 1 gives a number beyond any memory.
            if text.isdecimal():
                limits.append(int(text))
            if place == top:
                break
    return min(limits)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
