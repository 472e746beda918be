"""The processes of a verification, as their parent sees them: lines that arrive in time, or the reason why not."""

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lcw_ops import _files

# Seconds without a line before the process and its children are killed: for a case, and for the start, in which torch
# and the device's driver are loaded.
CASE_SECONDS, START_SECONDS = 20.0, 180.0

# Not "-m", which would import from the current folder first: a checkout there may hold another lcw_ops.
_START = (
    "import sys; sys.path[:] = sys.path[1:] if sys.path[0] == '' else sys.path; "
    "from lcw_ops.verification.child import main; main(sys.argv[1])"
)
COMMAND = [sys.executable, "-c", _START]


# No line of a child is longer, in bytes, and so much of the end of its error output is kept.
LONGEST_LINE = 1 << 20
KEPT_ERRORS = 1 << 14

# A killed process that hangs in a driver does not die before the driver returns, which may never happen.
DEATH_SECONDS = 5.0

_running: set[subprocess.Popen] = set()


class Lost(Exception):
    """A child crashed, timed out, or wrote something else than lines of JSON."""

    timed_out = False


class TimedOut(Lost):
    timed_out = True


def run(job: dict, wait: Callable[[], None] = lambda: None) -> Iterator[dict]:
    """The lines of a child, as they arrive. Raises Lost, with the case under way, if the job does not end properly.

    A child may write a line with "waits". It goes on when ``wait`` has returned, and its time does not count till then.
    """
    child = subprocess.Popen(
        [*COMMAND, json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A pipe, because a temporary file needs a folder that can be written to.
        stderr=subprocess.PIPE,
        env=_environment(job),
        # A group of its own, which is killed as a whole: a compiler may have been started.
        start_new_session=True,
    )
    _running.add(child)
    place, done, errors = "the start", False, bytearray()
    try:
        for line in _lines(child, errors):
            place = line.get("case", place)
            done |= "done" in line
            if "waits" in line:
                wait()
                _let_go_on(child)
            else:
                yield line
        status = child.wait(CASE_SECONDS)
    except subprocess.TimeoutExpired:
        raise TimedOut(f"did not end after {place}") from None
    finally:
        _kill(child)
        _running.discard(child)
    if status != 0 or not done:
        raise Lost(f"crashed in {place}: {_describe_end(status, errors)}")


def _let_go_on(child: subprocess.Popen) -> None:
    # A child that has died meanwhile is found by the end of its output.
    with contextlib.suppress(BrokenPipeError):
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()


def _environment(job: dict) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "LCW_OPS_BACKEND"}
    # The package that this process uses, also if it is not installed.
    paths = [str(Path(__file__).parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
    # cuBLAS needs this to give the same bits twice.
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if job["job"] == "compile":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if job.get("device") == "cpu":
        # Children run side by side. By default a thread that waits for others keeps a processor busy.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = temporary_folder()
    if folder is not None:
        environment["TMPDIR"] = folder
    return environment


def temporary_folder() -> str | None:
    """A folder for temporary files, which Triton's compiler needs: the system's, or else the cache folder. Or None."""
    try:
        return tempfile.gettempdir()
    except OSError:
        folder = _files.cache_folder()
    try:
        return None if folder is None else str(_files.prepare_folder(folder))
    except OSError:
        return None


def _lines(child: subprocess.Popen, errors: bytearray) -> Iterator[dict]:
    """The lines of a child. Raises Lost for one that is late or not JSON. ``errors`` gets the last errors."""
    assert child.stdout is not None
    assert child.stderr is not None
    output, error_output = child.stdout.fileno(), child.stderr.fileno()
    place, pending = "the start", b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        selector.register(error_output, selectors.EVENT_READ)
        until = time.monotonic() + START_SECONDS
        while True:
            ready = {key.fd for key, _ in selector.select(max(until - time.monotonic(), 0))}
            if error_output in ready and not _read_errors(error_output, errors):
                selector.unregister(error_output)
            if output not in ready:
                if time.monotonic() >= until:
                    raise TimedOut(f"timed out in {place}")
                continue
            received = os.read(output, 1 << 16)
            if not received:
                _read_last_errors(error_output, errors)
                return
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                parsed = _parse(line, place)
                place = parsed.get("case", place)
                yield parsed
            if len(pending) > LONGEST_LINE:
                raise Lost(f"wrote a line without an end in {place}")
            if lines:
                until = time.monotonic() + CASE_SECONDS


def _read_errors(file: int, errors: bytearray) -> bool:
    """Whether there was anything to read."""
    received = os.read(file, 1 << 16)
    errors += received
    del errors[:-KEPT_ERRORS]
    return bool(received)


def _read_last_errors(file: int, errors: bytearray) -> None:
    """Read what a child that has ended wrote. A process that it started may keep the pipe open."""
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while selector.select(0.2) and _read_errors(file, errors):
            pass


def _parse(line: bytes, place: str) -> dict:
    try:
        parsed = json.loads(line)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise Lost(f"wrote a line that is not JSON in {place}: {line[:80]!r}")
    if not _is_whole(parsed):
        raise Lost(f"crashed in {place}: it wrote a line that lacks a part: {line[:200]!r}")
    return parsed


def _is_whole(line: dict) -> bool:
    """Whether a line about a case or a class has every part that the parent reads, of the right type."""
    if not isinstance(line.get("case", ""), str):
        return False
    if "case" in line or "kind" not in line:
        return True
    kind = line["kind"]
    if not (isinstance(kind, list) and len(kind) == 2 and all(isinstance(part, str) for part in kind)):
        return False
    if "times" in line:
        times, faster, label = (line.get(name) for name in ("times", "faster", "label"))
        is_number = isinstance(times, float) and math.isfinite(times)
        return is_number and isinstance(faster, bool) and isinstance(label, str)
    if "untimed" in line:
        return isinstance(line["untimed"], str)
    return line.get("right") is True or (line.get("right") is False and isinstance(line.get("reason"), str))


def kill_all() -> None:
    """Kill every child with its children. The threads that read from them then get Lost."""
    for child in tuple(_running):
        _kill_group(child)


def _kill(child: subprocess.Popen) -> None:
    _kill_group(child)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(DEATH_SECONDS)
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _kill_group(child: subprocess.Popen) -> None:
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()


def _describe_end(status: int, errors: bytearray) -> str:
    last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    if status < 0:
        return f"{signal.Signals(-status).name} ({last})" if -status in set(signal.Signals) else f"signal {-status}"
    return last if status else "it ended in the middle of a line or before its last case"
