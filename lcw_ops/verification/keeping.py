"""The places where verdicts are kept: the cache folder, or one file for ``LCW_OPS_VERDICTS``.

Both are read by lcw_ops/ops/verdicts.py. A new verdict replaces those about the same kernel and device that an update
has made out of date. Verdicts about other devices, and of environments with another torch, stay.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from lcw_ops import _files
from lcw_ops._checks import describe
from lcw_ops.ops import verdicts
from lcw_ops.ops.verdicts import Verdict


class Folder:
    """One file for each verdict. ``path`` is None where there is no cache folder."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read(self, key: dict) -> Verdict | None:
        return None if self._path is None else verdicts.read(self._path, key)

    def keep(self, kernel: dict) -> None:
        """Keep the verdicts of ``Kernel.as_dict``. Raises OSError if the folder cannot be written to."""
        if self._path is None:
            raise OSError(_files.no_folder_reason())
        self._path.mkdir(parents=True, exist_ok=True)
        for verdict in kernel["verdicts"]:
            path = self._path / verdicts.file_of(verdict["key"])
            _files.write_atomically(path, lambda file, verdict=verdict: json.dump(verdict, file, indent=1))  # type: ignore[misc]
        if kernel["verdicts"]:
            self._remove_outdated(kernel["verdicts"][0]["key"])

    def _remove_outdated(self, key: dict) -> None:
        assert self._path is not None
        for path in self._path.glob("verdict-*.json"):
            written = verdicts.load(path)
            old = written.get("key") if isinstance(written, dict) else None
            if isinstance(old, dict) and verdicts.is_outdated(old, key):
                path.unlink(missing_ok=True)


class File:
    """One file for all kernels, and for several devices: what ``lcw-ops verify --json`` prints."""

    def __init__(self, path: Path) -> None:
        # A link stays a link: the file that it names is written.
        self._path = Path(os.path.realpath(path))

    def __str__(self) -> str:
        return str(self._path)

    def check(self) -> None:
        """Raise ValueError if the file cannot be written, or is another kind of file."""
        try:
            _files.prepare_folder(self._path.parent)
            is_new = not self._path.exists()
            # Neither a folder nor a pipe nor a device is replaced.
            is_ours = is_new or (
                self._path.is_file() and (not self._path.stat().st_size or _is_ours(verdicts.load(self._path)))
            )
        except OSError as error:
            raise ValueError(describe("verify", "write", f"is '{self._path}'", f"a file to write; {error}")) from error
        if not is_ours:
            raise ValueError(describe("verify", "write", f"is '{self._path}'", "a new file, or one that --write made"))

    def read(self, key: dict) -> Verdict | None:
        return verdicts.verdict_in(verdicts.verdicts_of(verdicts.load(self._path)).get(verdicts.file_of(key)), key)

    def keep(self, kernel: dict) -> None:
        """Put a kernel's verdicts beside those that the file has about other kernels and devices."""
        new = [verdict["key"] for verdict in kernel["verdicts"]]
        if not new:
            return

        def is_replaced(verdict) -> bool:
            key = verdict.get("key") if isinstance(verdict, dict) else None
            return isinstance(key, dict) and (key in new or verdicts.is_outdated(key, new[0]))

        with _locked(self._path.parent):
            found = verdicts.load(self._path)
            kernels = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
            for one in kernels:
                if isinstance(one.get("verdicts"), list):
                    one["verdicts"] = [verdict for verdict in one["verdicts"] if not is_replaced(verdict)]
            kernels = [*(one for one in kernels if one.get("verdicts")), kernel]
            _files.write_atomically(self._path, lambda file: json.dump(kernels, file, indent=1))


def _is_ours(content) -> bool:
    """Whether it is a list of ``Kernel.as_dict``. Any other list is a file about something else."""
    return isinstance(content, list) and all(
        isinstance(one, dict) and isinstance(one.get("verdicts"), list) for one in content
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Verifications of two devices may write to one file. Without locks on this system, go on without one."""
    descriptor = None
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
