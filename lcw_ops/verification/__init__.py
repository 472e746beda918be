"""``lcw_ops.verify``: proves on the user's own machine that the kernels are right, and times them.

Child processes run every kernel against float64 and against plain torch. Their verdicts go into the cache folder, where
the automatic choice of later processes finds them (lcw_ops/ops/verdicts.py). Nothing here runs by itself.
"""

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lcw_ops import _files
from lcw_ops._checks import describe
from lcw_ops.jobs.progress import progress
from lcw_ops.ops import backends, verdicts
from lcw_ops.ops.verdicts import Kind, Verdict
from lcw_ops.verification import processes
from lcw_ops.verification.cases import cases
from lcw_ops.verification.report import Kernel, Report, name_of
from lcw_ops.verification.speeds import speeds

__all__ = ["Refused", "Report", "verify"]

# A context of CUDA alone takes a few hundred MB.
MOST_USED_BYTES = 2 << 30


class Refused(RuntimeError):
    """This is not the time or the place for a verification."""


def verify(
    device: str | torch.device | None = None,
    ops: Iterable[str] | None = None,
    resume: bool = False,
    quiet: bool = True,
    case: str | None = None,
) -> Report:
    """Run every kernel of a device against float64 and against plain torch, and keep the verdicts.

    Each op and backend runs in a process of its own, so a kernel that crashes or hangs is a verdict, not an accident.
    The verdicts are files in the cache folder (``LCW_OPS_CACHE_DIR``). Processes that start later choose by them: on a
    GPU a kernel that is right and faster becomes the automatic choice, and on a CPU a wrong kernel is switched off.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; default: the first GPU, or else the CPU. A GPU must be idle.
        ops: names of ops, as :func:`lcw_ops.info` lists them; default: all.
        resume: whether to leave out kernels that already have every verdict.
        quiet: whether to print no progress.
        case: run only cases whose name contains this, and keep no verdict. For looking into a fault.

    Returns:
        A report: print it, or see its ``right``, ``kernels``, ``table()``, ``block()`` and ``to_json()``.

    Raises:
        ValueError: an unknown device or op.
        Refused: this process belongs to a distributed job, the card is in use, another verification is running, or the
            device cannot be opened. It is a RuntimeError.
    """
    began = time.monotonic()
    _refuse_inside_a_job()
    place = _device(device)
    kernels = _kernels(place, ops)
    if place.type == "cuda":
        _refuse_a_busy_card(place)
    described = _describe(place, sorted({backend for _, backend in kernels}))
    folder = _files.cache_folder()
    notes: list[str] = []
    with _lock(folder, described["facts"]):
        verification = _Verification(place, described, folder, notes, case or "")
        results = verification.run(kernels, resume, quiet)
    facts = next(iter(described["facts"].values()), {})
    return Report(str(place), facts, results, notes, verification.cases, time.monotonic() - began)


# ---- Checks before any work ------------------------------------------------------------------------------------------


def _refuse_inside_a_job() -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed or os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise Refused(
            "verify: this process belongs to a distributed job, whose ranks would disturb the timings. Run lcw-ops verify "
            "once, before the job; all ranks read the same verdicts."
        )


def _device(device: str | torch.device | None) -> torch.device:
    count = torch.cuda.device_count()
    if device is None:
        device = "cuda:0" if count else "cpu"
    known = ["cpu", *(f"cuda:{index}" for index in range(count))]
    name = "cuda:0" if str(device) == "cuda" else str(device)
    if name not in known:
        raise ValueError(describe("verify", "device", f"is {str(device)!r}", f"one of {', '.join(known)}"))
    return torch.device(name)


def _kernels(device: torch.device, ops: Iterable[str] | None) -> list[tuple[str, str]]:
    """(op, backend) of every kernel that can run on the device."""
    chosen = list(backends.IMPLEMENTED) if ops is None else list(ops)
    for op in chosen:
        if op not in backends.IMPLEMENTED:
            expected = f"one of {', '.join(backends.IMPLEMENTED)}"
            raise ValueError(describe("verify", "ops", f"has {op!r}", expected))
    return [
        (op, backend)
        for op in chosen
        for backend in backends.IMPLEMENTED[op]
        if backends.missing_reason(op, backend, device.type) is None
    ]


def _refuse_a_busy_card(device: torch.device) -> None:
    """Ask the driver's own tool before any process of ours opens the card. Without the tool, go by the memory in use."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return
    # A card's own number may differ from torch's, which counts the visible cards. So any process on any card counts
    # unless one card is visible.
    command = [tool, "--query-compute-apps=pid,name", "--format=csv,noheader", *_visible(device)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    users = [line for line in found.stdout.splitlines() if line.strip()] if found.returncode == 0 else []
    if users:
        raise Refused(_busy(device, f"used by {len(users)} other processes, such as {users[0].strip()}"))


def _visible(device: torch.device) -> list[str]:
    """The option that names the card, if CUDA_VISIBLE_DEVICES or its absence tells its number or UUID."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    name = names[device.index].strip() if device.index is not None and device.index < len(names) else ""
    return [] if not name or name.startswith("MIG-") else ["--id", name]


def _busy(device: torch.device, how: str) -> str:
    return f"verify: {device} is {how}; expected an idle card, because others would disturb the timings. Wait for it."


def _describe(device: torch.device, names: list[str]) -> dict:
    job = {"job": "describe", "device": str(device), "backends": names}
    try:
        *_, last = processes.run(job)
    except processes.Lost as error:
        raise Refused(f"verify: {device} cannot be opened: a process {error}") from error
    found = last["done"]
    if found["used"] > MOST_USED_BYTES:
        raise Refused(_busy(device, f"in use: {found['used'] / 2**30:.1f} GiB of its memory are taken"))
    return found


@contextlib.contextmanager
def _lock(folder: Path | None, facts: dict) -> Iterator[None]:
    """At most one verification per device. Without a folder to write to, go on without the lock."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                device = hashlib.sha256(json.dumps([one["device"] for one in facts.values()]).encode()).hexdigest()
                file = stack.enter_context(open(folder / f"verify-{device[:16]}.lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused("verify: another verification of this device is running. Wait for it to end.") from error
        except (ImportError, OSError):
            pass
        yield


# ---- The work --------------------------------------------------------------------------------------------------------


class _Verification:
    """One run over kernels of one device."""

    def __init__(self, device: torch.device, described: dict, folder: Path | None, notes: list[str], only: str) -> None:
        self._device, self._facts, self._card = device, described["facts"], described["card"]
        self._folder, self._notes, self._only = folder, notes, only
        self.cases = 0

    def run(self, kernels: list[tuple[str, str]], resume: bool, quiet: bool) -> list[Kernel]:
        kept = {kernel: self._read(*kernel) for kernel in kernels} if resume else {}
        left = [kernel for kernel in kernels if len(kept.get(kernel, {})) < len(self._kinds(*kernel))]
        compiled = [op for op, backend in left if backend == "triton" and self._card is not None]
        counts = {kernel: self._count(*kernel) for kernel in left}
        with _progress(quiet, sum(counts.values()) + len(compiled)) as bar:
            faults = self._compile(compiled, bar)
            found = {kernel: self._judge(*kernel, faults.get(kernel[0], {}), bar) for kernel in left}
        return [self._kernel(*kernel, found.get(kernel) or kept[kernel]) for kernel in kernels]

    def _kinds(self, op: str, backend: str) -> set[Kind]:
        return {case.kind for case in cases(op, backend) if self._only in case.label}

    def _count(self, op: str, backend: str) -> int:
        found = [*cases(op, backend), *(speeds(op, backend, self._device.type) if self._is_timed(backend) else ())]
        return sum(self._only in one.label for one in found)

    def _is_timed(self, backend: str) -> bool:
        # Triton's interpreter, in which it runs on a CPU, is a thousand times slower than the kernels.
        return (backend, self._device.type) != ("triton", "cpu")

    def _compile(self, ops: list[str], bar) -> dict[str, dict[Kind, str]]:
        """Op -> class -> the fault of a kernel that was compiled, without the device, by as many processes as cores."""
        if not ops:
            return {}
        bar.begin("compiling; later runs find the kernels in Triton's cache")
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
            return dict(zip(ops, pool.map(lambda op: self._compile_op(op, bar), ops), strict=True))

    def _compile_op(self, op: str, bar) -> dict[Kind, str]:
        faults: dict[Kind, str] = {}
        try:
            for line in processes.run({"job": "compile", "op": op, "card": self._card, "only": self._only}):
                if "kind" in line:
                    faults.setdefault(Kind(*line["kind"]), line["reason"])
        except processes.Lost as error:
            faults |= {kind: f"compiling {error}" for kind in self._kinds(op, "triton") - faults.keys()}
        bar.advance(f"{op} compiled")
        return faults

    def _judge(self, op: str, backend: str, faults: dict[Kind, str], bar) -> dict[Kind, Verdict]:
        """The verdicts of one child. If it is lost, every class is a no: a crash may come from any of them.

        A child that is killed while it times kernels has found them right before.
        """
        kinds = self._kinds(op, backend)
        wrong = {kind: reason for kind, reason in faults.items() if kind in kinds}
        ratios: dict[Kind, list[tuple[float, bool, str]]] = {}
        untimed: dict[Kind, str] = {}
        job = {"job": "run", "op": op, "backend": backend, "device": str(self._device)}
        job |= {"faulty": list(wrong), "times": self._is_timed(backend), "only": self._only}
        lost, timing = None, False
        try:
            for line in processes.run(job):
                if "case" in line:
                    self.cases += 1
                    timing = line["case"].startswith("speed")
                    bar.advance(f"{name_of(op, backend)}: {line['case']}")
                elif "kind" in line:
                    kind = Kind(*line["kind"])
                    if "times" in line:
                        ratios.setdefault(kind, []).append((line["times"], line["faster"], line["label"]))
                    elif "untimed" in line:
                        untimed.setdefault(kind, line["untimed"])
                    elif not line["right"]:
                        wrong.setdefault(kind, line["reason"])
        except processes.Lost as error:
            lost = error
        slow = timing and lost is not None and lost.timed_out
        date = datetime.date.today().isoformat()
        found = {}
        for kind in sorted(kinds):
            if kind in wrong or (lost is not None and not slow):
                found[kind] = Verdict(False, False, None, f"no: {wrong.get(kind) or lost}", date)
            else:
                found[kind] = _timed_verdict(ratios.get(kind, []), str(lost) if slow else untimed.get(kind), date)
        if not self._only:
            self._keep(op, backend, found)
        return found

    # ---- Files ----

    def _key(self, op: str, backend: str, kind: Kind) -> dict:
        return verdicts.make_key(op, backend, kind, self._facts[backend])

    def _read(self, op: str, backend: str) -> dict[Kind, Verdict]:
        found = {}
        for kind in sorted(self._kinds(op, backend)):
            verdict = self._folder and verdicts.read(self._folder, self._key(op, backend, kind))
            if verdict:
                found[kind] = verdict
        return found

    def _written(self, op: str, backend: str, kind: Kind, verdict: Verdict) -> dict:
        return {"key": self._key(op, backend, kind), **verdict._asdict()}

    def _keep(self, op: str, backend: str, found: dict[Kind, Verdict]) -> None:
        try:
            if self._folder is None:
                raise OSError("LCW_OPS_CACHE_DIR is empty")
            self._folder.mkdir(parents=True, exist_ok=True)
            for kind, verdict in found.items():
                written = self._written(op, backend, kind, verdict)
                path = self._folder / verdicts.file_of(written["key"])
                _files.write_atomically(path, lambda file, written=written: json.dump(written, file, indent=1))
        except OSError as error:
            note = (
                f"The verdicts are not kept: {error}. Save the output of lcw-ops verify --json, and name the file in "
                "LCW_OPS_VERDICTS."
            )
            if note not in self._notes:
                self._notes.append(note)

    def _kernel(self, op: str, backend: str, found: dict[Kind, Verdict]) -> Kernel:
        written = [self._written(op, backend, kind, verdict) for kind, verdict in found.items()]
        return Kernel(op, backend, found, written)


def _timed_verdict(ratios: list[tuple[float, bool, str]], untimed: str | None, date: str) -> Verdict:
    """The verdict about a class that is right. It is faster only if every size was timed and faster."""
    if untimed is not None:
        return Verdict(True, False, None, f"right; not timed: {untimed}", date)
    if not ratios:
        return Verdict(True, False, None, "right; not timed", date)
    times, faster, label = min(ratios, key=lambda ratio: (ratio[1], ratio[0]))
    if faster:
        return Verdict(True, True, times, f"right, and {times:.2f} times as fast as plain torch", date)
    return Verdict(True, False, times, f"right, but {times:.2f} times as fast as plain torch in {label}", date)


def _progress(quiet: bool, steps: int):
    return contextlib.nullcontext(_Silent()) if quiet or not steps else progress("verify", steps)


class _Silent:
    def begin(self, text: str) -> None:
        pass

    def advance(self, text: str) -> None:
        pass
