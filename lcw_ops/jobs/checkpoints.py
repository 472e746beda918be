"""Checkpoints that survive ``kill -9`` and a power cut. The two newest of a run are kept, each a file of tensors only.

A file is written under another name, synced to the disk and renamed; the rename is synced too. So under its own name a
file is whole or absent. The digest at its end shows later damage (a bad disk, a copy that stopped half-way). The
checkpoint before the damaged one is then used, and the damaged file is renamed. Files are loaded by
``torch.load(path, weights_only=True)``, which runs no code from a file.
"""

import errno
import hashlib
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from lcw_ops._checks import describe_argument
from lcw_ops._files import prepare_folder, write_atomically

# The newest may be damaged, so keep one more.
KEPT = 2

# Matches exactly the names that path_of writes.
NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})\.pt")

# Bytes to read at a time for a digest.
BLOCK_BYTES = 1 << 20


class DamagedError(Exception):
    """A file that is not the checkpoint that was written."""


class _DigestedFile:
    """A file that ends with the SHA-256 of the rest. The checksums in torch's own archives do not cover every byte."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, content) -> int:
        self.sha256.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()

    def end(self) -> None:
        self.file.write(self.sha256.digest())


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def steps_in(folder: str | Path) -> list[int]:
    """The steps of the checkpoints in a folder, oldest first. The folder need not exist."""
    folder = Path(folder)
    names = (NAME.fullmatch(entry.name) for entry in (folder.iterdir() if folder.is_dir() else ()))
    return sorted(int(name[1]) for name in names if name)


@contextmanager
def owned(folder: str | Path):
    """The folder, created and writable, for this process alone while the context lasts.

    Raises OSError if the folder cannot be written to, or another process holds its lock. The system releases the lock
    of a dead process.
    """
    created = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    folder = prepare_folder(folder)
    for path in (folder / "any", *created):
        _sync(path.parent)
    with open(folder / ".lock", "a") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows does not have this lock.
        except BlockingIOError as error:
            raise OSError(f"another process is training in the folder {str(folder)!r}") from error
        # The process that was writing these is dead: otherwise it would hold the lock.
        for part in folder.glob(".step-*.part"):
            part.unlink()
        yield folder


def write(folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Write the checkpoint of this step to the disk, and only then delete the oldest ones."""

    def save(file: IO[bytes]) -> None:
        digested = _DigestedFile(file)
        torch.save(tensors, digested)
        digested.end()

    write_atomically(path_of(folder, step), save, binary=True)
    _sync(folder)
    for old in steps_in(folder)[:-KEPT]:
        path_of(folder, old).unlink()


def newest(folder: Path) -> dict[str, Tensor] | None:
    """The newest undamaged checkpoint, or None if there is no checkpoint. Damaged ones are reported and renamed.

    Raises ValueError if all checkpoints are damaged. In that case they keep their names.
    """
    damaged: list[Path] = []
    for step in reversed(steps_in(folder)):
        path = path_of(folder, step)
        try:
            tensors = read(path)
        except DamagedError as error:
            print(f"{path} is damaged: {error}", file=sys.stderr)
            damaged.append(path)
            continue
        for bad in damaged:
            # Under its own name a damaged file would count towards KEPT.
            os.replace(bad, bad.with_suffix(".damaged"))
        return tensors
    if damaged:
        came, expected = f"is {folder}, where every checkpoint is damaged", "a checkpoint that can be read"
        raise ValueError(describe_argument("--checkpoint", came, expected, "Give another folder to start afresh."))
    return None


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU.

    Raises DamagedError if the file is not as it was written, and OSError if that cannot be determined.
    """
    sha256 = hashlib.sha256()
    try:
        left = path.stat().st_size - sha256.digest_size
        with open(path, "rb") as file:
            while left > 0 and (block := file.read(min(left, BLOCK_BYTES))):
                sha256.update(block)
                left -= len(block)
            end = file.read()
    except OSError as error:
        # EIO is a bad disk. A missing permission or too many open files say nothing about the content.
        if error.errno != errno.EIO:
            raise
        raise DamagedError(error.strerror) from error
    if end != sha256.digest():
        raise DamagedError("the SHA-256 digest at its end does not match its content")
    return torch.load(path, map_location="cpu", weights_only=True)


def _sync(folder: Path) -> None:
    """Sync a folder, and with it the renames in it. Windows has no such call."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
