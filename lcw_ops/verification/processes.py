"""The processes of a verification, as their parent sees them: lines that arrive in time, or the reason why not."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# Seconds without a line before the process and its children are killed: for a case, and for the start, in which torch
# and the device's driver are loaded.
CASE_SECONDS, START_SECONDS = 20.0, 180.0

COMMAND = [sys.executable, "-m", "lcw_ops.verification.child"]


# No line of a child is longer, in bytes.
LONGEST_LINE = 1 << 20

_running: set[subprocess.Popen] = set()


class Lost(Exception):
    """A child crashed, timed out, or wrote something else than lines of JSON."""

    timed_out = False


class TimedOut(Lost):
    timed_out = True


def run(job: dict) -> Iterator[dict]:
    """The lines of a child, as they arrive. Raises Lost, with the case under way, if the job does not end properly."""
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [*COMMAND, json.dumps(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(job),
            # A group of its own, which is killed as a whole: a compiler may have been started.
            start_new_session=True,
        )
        _running.add(child)
        place, done = "the start", False
        try:
            for line in _lines(child):
                place = line.get("case", place)
                done |= "done" in line
                yield line
            status = child.wait(CASE_SECONDS)
        except subprocess.TimeoutExpired:
            raise TimedOut(f"did not end after {place}") from None
        finally:
            _kill(child)
            _running.discard(child)
        if status != 0 or not done:
            raise Lost(f"crashed in {place}: {_describe_end(status, errors)}")


def _environment(job: dict) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "LCW_OPS_BACKEND"}
    # The package that this process uses, also if it is not installed.
    paths = [str(Path(__file__).parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
    # cuBLAS needs this to give the same bits twice.
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if job["job"] == "compile":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _lines(child: subprocess.Popen) -> Iterator[dict]:
    """The lines of a child. Raises Lost for one that is late or not JSON."""
    stdout = child.stdout
    assert stdout is not None
    place, pending = "the start", b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        until = time.monotonic() + START_SECONDS
        while True:
            if not selector.select(max(until - time.monotonic(), 0)):
                raise TimedOut(f"timed out in {place}")
            received = os.read(stdout.fileno(), 1 << 16)
            if not received:
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


def _parse(line: bytes, place: str) -> dict:
    try:
        parsed = json.loads(line)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise Lost(f"wrote a line that is not JSON in {place}: {line[:80]!r}")
    return parsed


def kill_all() -> None:
    """Kill every child with its children. The threads that read from them then get Lost."""
    for child in tuple(_running):
        _kill_group(child)


def _kill(child: subprocess.Popen) -> None:
    _kill_group(child)
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _kill_group(child: subprocess.Popen) -> None:
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()


def _describe_end(status: int, errors) -> str:
    errors.seek(0)
    last = (errors.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    if status < 0:
        return f"{signal.Signals(-status).name} ({last})" if -status in set(signal.Signals) else f"signal {-status}"
    return last if status else "it ended in the middle of a line or before its last case"
