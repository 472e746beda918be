"""Files that are either complete or absent: each is written under a hidden name, then renamed.

A reader never sees half a file: the old file stays until the new one is complete. An error or Ctrl-C leaves no hidden
file behind. A process that is killed (SIGTERM, SIGKILL) leaves its hidden .part file, which the next write of the same
file removes. The content is on the disk before the rename. After a power cut during the rename, the file system decides
whether the old or the new file is there. All commands write their files with ``write_atomically``.
"""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: str | Path, write: Callable[[IO], None], binary: bool = False) -> None:
    """Call ``write(file)`` on a hidden file beside ``path`` and rename it to ``path`` once it is on the disk.

    If ``write`` raises, KeyboardInterrupt included, an existing ``path`` keeps its content and nothing is left beside
    it. Raises OSError if the folder cannot be written to.
    """
    path = Path(path)
    _sweep(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(
            beside, "wb" if binary else "w", encoding=None if binary else "utf-8", newline=None if binary else ""
        ) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove the files that killed processes left beside ``path``, but not those of running processes."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.part")
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        match = name.fullmatch(entry.name)
        if match and not _is_running(int(match[1])):
            entry.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    # Signal 0 only asks whether the process exists, but on Windows it would end the process.
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def cache_folder() -> Path | None:
    """The package's cache folder, as docs/environment.md defines it, or None if there is none."""
    named = os.environ.get("LCW_OPS_CACHE_DIR")
    if named is not None:
        return Path(named) if named else None
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches, "lcw_ops")
    home = os.environ.get("HOME")
    return Path(home, ".cache/lcw_ops") if home else None


def no_folder_reason() -> str:
    """Why :func:`cache_folder` gives None."""
    is_empty = os.environ.get("LCW_OPS_CACHE_DIR") == ""
    return "LCW_OPS_CACHE_DIR is empty" if is_empty else "LCW_OPS_CACHE_DIR, XDG_CACHE_HOME and HOME are not set"


def prepare_folder(folder: str | Path) -> Path:
    """Create ``folder`` with its parents and prove that a file can be written there, before hours of work rely on it.

    Raises OSError, with a message that names the folder, if this fails.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # os.access reads the permission bits only: it ignores a read-only or full disk, and always allows root.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the folder {str(folder)!r}: {error.strerror or error}") from error
    return folder
