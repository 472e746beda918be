"""Runs the plan of ``make gpu``: one process after another, with logs, and with a record of what passed.

A process that passed is not run again on the same sources, card and versions. So a run that was killed goes on with the
process that was cut.
"""

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from . import gpu_plan
from .gpu_plan import KEPT, ROOT, Step

# The steps that ended, one JSON object a line. It stands beside the logs, and in KEPT.
RECORD = "steps.jsonl"
# A file in KEPT, locked while ``make gpu`` or one of its steps runs. It has the process id of the step.
LOCK = "running"
# The sources on which the outcome of a step depends.
SOURCES = ("bench", "csrc", "kernels", "lcw_ops", "tests")
SUFFIXES = (".py", ".h", ".cpp", ".cu")

ENVIRONMENT = {
    "LCW_OPS_TEST_DEVICE": "cuda",
    "PYTHONUNBUFFERED": "1",
    # JAX, a competitor in the benchmarks, would reserve three quarters of the card's memory at its first use.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


@dataclass(frozen=True)
class Outcome:
    part: str
    step: str
    result: str
    seconds: float

    @property
    def is_bad(self) -> bool:
        return not self.result.startswith("passed")

    def __str__(self) -> str:
        return f"{self.part:30} {self.step:38} {self.result:28} {self.seconds:5.0f} s"


class History:
    """The steps that passed, and those of this run. ``key`` stands for the sources, the card and the versions."""

    def __init__(self, folder: Path, key: str, kept: Path = KEPT) -> None:
        self._files, self._key = (folder / RECORD, kept / RECORD), key
        self.lock: IO[str] | None = None
        # Logs that were brought back from another machine count too.
        found = {*self._files, *folder.parent.glob(f"*-logs/{RECORD}")}
        lines = [line for path in sorted(found) for line in _lines(path) if line["key"] == key]
        # The last result counts: with --again, a step that passed may have failed since.
        last = {(line["part"], line["step"]): line for line in sorted(lines, key=lambda line: str(line["time"]))}
        self._passed = {place: line["time"] for place, line in last.items() if line["result"] == "passed"}

    def passed(self, part: str, step: Step) -> str | None:
        """When the step passed, or None if it must run."""
        is_there = step.makes is None or step.makes.exists()
        return self._passed.get((part, step.name)) if is_there and not step.repeats else None

    def add(self, outcome: Outcome) -> None:
        line = {"key": self._key, "time": _now(), "part": outcome.part, "step": outcome.step}
        line |= {"result": outcome.result, "seconds": round(outcome.seconds, 1)}
        for path in self._files:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                # A run that was killed may have left half a line.
                file.write("\n" * (file.tell() > 0) + json.dumps(line))

    def open(self) -> str | None:
        """Why nothing can be run and recorded now, or None.

        The lock is held until the last process that inherited it has ended: after SIGKILL of ``make gpu`` its step goes
        on, and would disturb the steps of a second run.
        """
        try:
            for path in self._files:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
            self.lock = self._files[-1].with_name(LOCK).open("a+")
        except OSError as error:
            return f"cannot write {error.filename} ({error.strerror}); choose a folder for logs with --out"
        # Some network file systems have no locks.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.lock.seek(0)
                group = self.lock.read()
                hint = f"; if that make gpu was killed, end it with: kill -9 -- -{group}" if group else ""
                return f"another make gpu, or a process that it started, still runs{hint}"
        self.lock.truncate(0)
        return None


def _lines(path: Path) -> Iterator[dict]:
    """The objects in a record. A line that a killed run has not finished is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            found = json.loads(line)
            yield {name: found[name] for name in ("key", "time", "part", "step", "result")}


def sources_key(*facts: str) -> str:
    """A hash of these facts and of all sources, whether they are committed or not."""
    digest = hashlib.sha256("\0".join((sys.version, _triton(), *facts)).encode())
    paths = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    for name in SOURCES:
        for folder, _, names in os.walk(ROOT / name):
            paths += [Path(folder, one) for one in names if one.endswith(SUFFIXES)]
    for path in sorted(paths):
        digest.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


# This runs in its own process: otherwise ``make gpu`` itself would hold some of the card's memory while its steps run.
_FIND_CARD = """
import torch
if torch.version.hip or not torch.cuda.is_available():
    print(torch.__version__)
else:
    facts = torch.cuda.get_device_properties(0)
    shared = getattr(facts, "shared_memory_per_block_optin", 227 * 1024)
    known = ("%d%d" % torch.cuda.get_device_capability(), facts.name, facts.multi_processor_count, shared)
    print(torch.__version__, *known, sep="\\n")
"""


def find_card() -> dict[str, str]:
    """torch's version, and the card's generation, name, multiprocessors and shared memory, all as text; or an error."""
    found = subprocess.run([sys.executable, "-c", _FIND_CARD], capture_output=True, text=True)
    if found.returncode != 0:
        lines = found.stderr.strip().splitlines() or ["no message"]
        return {
            "error": f"{sys.executable} has no torch that can be imported ({lines[-1]}); choose another interpreter: "
            "make gpu PYTHON=..."
        }
    version, *rest = found.stdout.splitlines()
    if not rest:
        return {"error": f"torch {version} sees no NVIDIA card; expected a card, its driver and a CUDA build of torch"}
    names = ("generation", "name", "processors", "shared_memory")
    return {"torch": version, **dict(zip(names, rest, strict=True))}


def run(plan: dict[str, list[Step]], folder: Path, history: History, again: bool = False, heading: str = "") -> int:
    """Run every step that has not passed, even after a failure, and print a summary. Returns 0 if all passed, else 1.

    ``again`` runs also those that have passed. ``heading`` is the first line of the summary and of every log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    if heading:
        print(heading, flush=True)
    for line in _missing_lines(plan):
        print(line, flush=True)
    # On SIGTERM, for example from a time limit on this command, still end the running process and print the summary.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for part, steps in plan.items():
            _Part(part, folder, history, again, heading, outcomes.append).run(steps)
    except KeyboardInterrupt:
        print("\nended from outside", flush=True)
        outcomes.append(Outcome("-", "-", "the rest was not reached", 0))
    finally:
        signal.signal(signal.SIGTERM, before)
    bad = [outcome for outcome in outcomes if outcome.is_bad]
    print("\n" + "\n".join(map(str, outcomes)))
    if heading:
        print(heading)
    print(f"\n{len(outcomes) - len(bad)} passed, {len(bad)} did not; logs in {folder}", flush=True)
    return int(bool(bad))


def _missing_lines(plan: dict[str, list[Step]]) -> Iterator[str]:
    """One line for each reason that keeps steps from running, with their parts."""
    reasons: dict[str, list[str]] = {}
    for part, steps in plan.items():
        for step in steps:
            if reason := gpu_plan.missing(step):
                reasons.setdefault(reason, []).append(part)
    for reason, parts in reasons.items():
        names = list(dict.fromkeys(parts))
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        yield f"cannot run: {', '.join(names[:5])}{more}: {reason}"


@dataclass(frozen=True)
class _Part:
    name: str
    folder: Path
    history: History
    again: bool
    heading: str
    report: Callable[[Outcome], None]

    def run(self, steps: list[Step]) -> None:
        end = time.monotonic() + gpu_plan.PART_SECONDS
        for step in steps:
            start = time.monotonic()
            when = None if self.again else self.history.passed(self.name, step)
            if when is not None:
                print(f"{self.name}: {step.name} passed on {when}", flush=True)
                self.report(Outcome(self.name, step.name, "passed before", 0))
                continue
            log = self.folder / f"{self.name.replace('/', '-')}.{step.name}.log"
            print(f"{self.name}: {step.name}, log {log.name}", flush=True)
            try:
                result = _run_step(step, log, min(step.seconds, end - start), self.heading, self.history.lock)
            except KeyboardInterrupt:
                self._record(Outcome(self.name, step.name, "ended from outside", time.monotonic() - start))
                raise
            self._record(Outcome(self.name, step.name, result, time.monotonic() - start))

    def _record(self, outcome: Outcome) -> None:
        """Report and record the outcome at once, because a later step may end this process."""
        self.history.add(outcome)
        summary = self.folder / "summary.txt"
        with summary.open("a") as file:
            if self.heading and not file.tell():
                file.write(f"{self.heading}\n")
            file.write(f"{_now()} {outcome}\n")
        print(f"  {outcome.result}, {outcome.seconds:.0f} s", flush=True)
        self.report(outcome)


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")


def _run_step(step: Step, log: Path, limit: float, heading: str = "", lock: IO[str] | None = None) -> str:
    """Run one step and return the verdict. Its process appends to the log, which an earlier run may have begun."""
    if limit <= 0:
        return "not reached in time"
    if reason := gpu_plan.missing(step):
        return reason
    with contextlib.ExitStack() as files:
        file = files.enter_context(log.open("a"))
        settings = "".join(f"{name}={value} " for name, value in step.environment.items())
        print(f"\n===== {_now()}, at most {limit:.0f} s\n$ {settings}{shlex.join(step.command)}", file=file, flush=True)
        if heading or step.faked:
            print(f"{heading}\nFAKED in this step: {step.faked or 'nothing'}", file=file, flush=True)
        begin = file.tell()
        output = files.enter_context(log.with_name(step.output).open("w")) if step.output else file
        # The process gets its own session, so that it can be killed together with its children.
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=_environment(step),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=file if step.output else subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.fileno()] if lock else [],
        )
        if lock:
            lock.truncate(0)
            print(process.pid, end="", file=lock, flush=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        verdict = {None: f"timed out after {limit:.0f} s", 0: "passed"}.get(code, f"failed, exit code {code}")
        print(f"===== {verdict}", file=file)
    if code != 0:
        print("".join(f"    {line}\n" for line in _tail(log, begin)), end="", flush=True)
    return verdict


def _environment(step: Step) -> dict[str, str]:
    """The package is that of this source tree. Triton's compiled kernels stay in KEPT unless the user has a folder."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or str(KEPT / "triton")}
    return os.environ | own | ENVIRONMENT | step.environment


def _end(process: subprocess.Popen) -> None:
    """Kill the process and its children, if any are left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, begin: int, lines: int = 25) -> list[str]:
    with log.open(errors="replace") as file:
        file.seek(begin)
        return file.read().splitlines()[-lines:]
