"""Another git revision of the package, checked out and built in a folder of its own, for ``lcw-ops bench --base``.

The folder is a git worktree in lcw_ops's cache folder, ``bench/<commit>``. It is built once and kept. ``git worktree
remove --force FOLDER`` deletes it. It may also be deleted by hand: the next comparison makes it again. Without a cache
folder the worktree is temporary.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lcw_ops import _files

# The variables that decide what setup.py compiles. A worktree that was built with other values is built again.
BUILD_VARIABLES = ("LCW_OPS_CUDA_ARCHS", "LCW_OPS_NO_EXTENSIONS", "CXX", "CXXFLAGS")

SOURCES = {".cpp", ".h", ".cu", ".cuh"}


@dataclass(frozen=True)
class BaseTree:
    """A revision that is built in ``folder``. ``root`` is the checkout that it belongs to.

    ``commit`` is as short as in the CSV of the benchmarks.
    """

    commit: str
    folder: Path
    root: Path
    is_temporary: bool

    def release(self) -> None:
        """Delete the folder if it is temporary."""
        if self.is_temporary:
            _remove(self.root, self.folder)
            shutil.rmtree(self.folder.parent, ignore_errors=True)


def find_commit(root: Path, revision: str) -> str:
    """The full hash of the revision.

    Raises ValueError if ``root`` is not the top folder of a git checkout, or has no such revision.
    """
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
    except ValueError:
        top = None
    if top is None or Path(top).resolve() != root:
        raise ValueError(
            f"--base is {revision!r}; expected lcw_ops to run from a git checkout, and {root} is not one. Clone the "
            "repository, and install it with pip install -e"
        )
    try:
        return _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except ValueError as error:
        raise ValueError(
            f"--base is {revision!r}; expected a revision of {root}, such as HEAD~1. Show them by git log"
        ) from error


def check_extension(root: Path, device_type: str) -> None:
    """Raise ValueError if the checkout's extension for this device is older than its sources."""
    stem, others = ("_C_cuda", "cpu") if device_type == "cuda" else ("_C", "cuda")
    library, csrc = root / "lcw_ops" / f"{stem}.abi3.so", root / "csrc"
    if not library.exists():
        return
    for path in sorted(csrc.rglob("*")):
        of_the_device = path.suffix in SOURCES and path.relative_to(csrc).parts[0] != others
        if of_the_device and path.stat().st_mtime > library.stat().st_mtime:
            raise ValueError(
                f"--base: {library.name} is older than {path.relative_to(root)}; expected it to be built from the "
                "working tree. Run: python setup.py build_ext --inplace"
            )


def build(root: Path, commit: str, cuda_archs: str) -> BaseTree:
    """Check the commit out and build it, unless an earlier comparison did so with the same settings.

    ``cuda_archs`` is the value of LCW_OPS_CUDA_ARCHS if that is not set. Raises ValueError if the build fails.
    """
    cache = _files.cache_folder()
    place = Path(tempfile.mkdtemp(prefix="lcw_ops-bench-")) if cache is None else cache / "bench"
    place.mkdir(parents=True, exist_ok=True)
    folder = place.resolve() / commit[:12]
    environment = {"LCW_OPS_CUDA_ARCHS": cuda_archs, **os.environ}
    settings = json.dumps({name: environment.get(name) for name in BUILD_VARIABLES})
    # Two comparisons with the same base must not build it at the same time.
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_built(folder, commit, settings):
            print(f"building {commit[:12]} in {folder}", flush=True)
            _build(root, commit, folder, environment)
            _mark(folder).write_text(settings)
    return BaseTree(_git(root, "rev-parse", "--short", commit), folder, root, is_temporary=cache is None)


def _is_built(folder: Path, commit: str, settings: str) -> bool:
    if not _mark(folder).exists() or _mark(folder).read_text() != settings:
        return False
    try:
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
        return not changes and _git(folder, "rev-parse", "HEAD") == commit
    except ValueError:
        return False


def _mark(folder: Path) -> Path:
    """The file that says that the build was completed, and with which settings."""
    return folder / "built.json"


def _build(root: Path, commit: str, folder: Path, environment: dict[str, str]) -> None:
    if folder.exists():
        _remove(root, folder)
    # --force: the worktree may still be registered although its folder was deleted.
    _git(root, "worktree", "add", "--force", "--detach", str(folder), commit)
    log = folder.with_suffix(".log")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    with log.open("w") as output:
        code = subprocess.run(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code != 0:
        _remove(root, folder)
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"--base: {commit[:12]} does not build: {last}. The log is {log}")


def _remove(root: Path, folder: Path) -> None:
    try:
        _git(root, "worktree", "remove", "--force", str(folder))
    except ValueError:
        # The folder belongs to another clone, or is not registered any more.
        shutil.rmtree(folder, ignore_errors=True)


def _git(folder: Path, *arguments: str) -> str:
    """The output of git. Raises ValueError if it fails or is not installed."""
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"--base: git does not run: {error.strerror}. Install git") from error
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"--base: git {arguments[0]} failed: {last}")
    return result.stdout.strip()
