"""The work of a verification: children judge and time the kernels, and their verdicts are written.

Triton's kernels are compiled first, by as many processes as there are cores, without the device. Then one process for
each op and backend judges and times. A few of them start side by side. On a CPU they also judge side by side, and each
is alone while it times kernels. On a GPU each is alone on the device.
"""

import contextlib
import datetime
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from lcw_ops.jobs.progress import progress
from lcw_ops.ops import verdicts
from lcw_ops.ops.verdicts import Kind, Verdict
from lcw_ops.verification import processes
from lcw_ops.verification.cases import Case, cases
from lcw_ops.verification.keeping import File, Folder
from lcw_ops.verification.report import Kernel, name_of
from lcw_ops.verification.speeds import speeds

# Each has torch loaded, in a few hundred MB.
MOST_SIDE_BY_SIDE = 4

Item = TypeVar("Item")
Found = TypeVar("Found")


class Verification:
    """One run over kernels of one device. ``place`` keeps the verdicts; None: they are not to be kept."""

    def __init__(
        self, device: torch.device, described: dict, place: Folder | File | None, notes: list[str], only: str
    ) -> None:
        self._device, self._facts, self._card = device, described["facts"], described["card"]
        self._place, self._notes, self._only = place, notes, only
        self._mutex, self._interrupted = threading.Lock(), False
        self.cases = 0
        # The classes of which nothing was proved, because only a part was run or the machine was busy.
        self._unproved: set[tuple[str, str, Kind]] = set()

    def run(self, kernels: list[tuple[str, str]], resume: bool, quiet: bool) -> list[Kernel]:
        kept = {kernel: self._read(*kernel) for kernel in kernels} if resume else {}
        left = [kernel for kernel in kernels if len(kept.get(kernel, {})) < len(self._kinds(*kernel))]
        compiled = [op for op, backend in left if backend == "triton" and self._card is not None]
        counts = {kernel: self._count(*kernel) for kernel in left}
        with _progress(quiet, sum(counts.values()) + len(compiled)) as bar:
            faults = self._compile(compiled, bar)
            found: dict[tuple[str, str], dict[Kind, Verdict]] = {}
            for start in range(0, len(left), self._side_by_side()):
                wave = left[start : start + self._side_by_side()]
                barrier, lock = threading.Barrier(len(wave)), threading.Lock()

                def judge(kernel, barrier=barrier, lock=lock):
                    turn = _Turn(barrier, lock)
                    op, backend = kernel
                    try:
                        return self._judge(op, backend, faults.get(op, {}), counts[kernel], bar, turn)
                    finally:
                        turn.end()

                found |= zip(wave, self._in_threads(judge, wave, len(wave)), strict=True)
        return [self._kernel(*kernel, found[kernel] if kernel in found else kept[kernel]) for kernel in kernels]

    def _side_by_side(self) -> int:
        return min(_count_cores(), MOST_SIDE_BY_SIDE)

    def _cases(self, op: str, backend: str) -> list[Case]:
        return [case for case in cases(op, backend) if self._only in case.label]

    def _kinds(self, op: str, backend: str) -> set[Kind]:
        return {case.kind for case in self._cases(op, backend)}

    def _count(self, op: str, backend: str) -> int:
        """The number of steps in the progress bar."""
        timed = speeds(op, backend, self._device.type) if self._is_timed(backend) else ()
        return len(self._cases(op, backend)) + sum(self._only in one.label for one in timed)

    def _is_timed(self, backend: str) -> bool:
        # Triton's interpreter, in which it runs on a CPU, is a thousand times slower than the kernels.
        return (backend, self._device.type) != ("triton", "cpu")

    def _compile(self, ops: list[str], bar) -> dict[str, dict[Kind, str]]:
        """Op -> class -> the fault of a kernel that was compiled."""
        if not ops:
            return {}
        bar.begin("compiling; later runs find the kernels in Triton's cache")
        return dict(zip(ops, self._in_threads(lambda op: self._compile_op(op, bar), ops, _count_cores()), strict=True))

    def _compile_op(self, op: str, bar) -> dict[Kind, str]:
        faults: dict[Kind, str] = {}
        try:
            for line in processes.run({"job": "compile", "op": op, "card": self._card, "only": self._only}):
                if "kind" in line:
                    faults.setdefault(Kind(*line["kind"]), line["reason"])
        except processes.Lost as error:
            faults |= dict.fromkeys(self._kinds(op, "triton") - faults.keys(), f"compiling {error}")
        with self._mutex:
            bar.advance(f"{op} compiled")
        return faults

    def _judge(
        self, op: str, backend: str, faults: dict[Kind, str], steps: int, bar, turn: "_Turn"
    ) -> dict[Kind, Verdict]:
        """The verdicts of one child. If it is lost, every class is a no: a crash may come from any of them.

        A kernel that hangs while it is timed is a no as well, although every case before was right.
        """
        expected = Counter(case.kind for case in self._cases(op, backend))
        wrong = {kind: reason for kind, reason in faults.items() if kind in expected}
        right: Counter[Kind] = Counter()
        ratios: dict[Kind, list[tuple[float, bool, str]]] = {}
        untimed: dict[Kind, str] = {}
        job: dict[str, Any] = {"job": "run", "op": op, "backend": backend, "device": str(self._device)}
        job |= {"faulty": list(wrong), "times": self._is_timed(backend), "only": self._only}
        # By it, the device that a test plays knows the number of cases.
        job["kinds"] = list(expected.elements())
        job["alone"] = "times" if self._device.type == "cpu" else "all"
        lost = None
        try:
            for line in processes.run(job, turn.wait):
                if "case" in line:
                    with self._mutex:
                        self.cases += 1
                        steps -= 1
                        bar.advance(f"{name_of(op, backend)}: {line['case']}")
                elif "kind" in line:
                    kind = Kind(*line["kind"])
                    if "times" in line:
                        ratios.setdefault(kind, []).append((line["times"], line["faster"], line["label"]))
                    elif "untimed" in line:
                        untimed.setdefault(kind, line["untimed"])
                    elif line["right"]:
                        right[kind] += 1
                    else:
                        wrong.setdefault(kind, line["reason"])
        except processes.Lost as error:
            lost = error
        if self._interrupted:
            raise KeyboardInterrupt
        date = datetime.date.today().isoformat()
        found = {}
        for kind in sorted(expected):
            if kind in wrong or lost is not None:
                found[kind] = Verdict(False, False, None, f"no: {wrong.get(kind) or lost}", date)
            elif right[kind] < expected[kind]:
                reason = f"no: the process has judged {right[kind]} of {expected[kind]} cases"
                found[kind] = Verdict(False, False, None, reason, date)
            else:
                found[kind] = _timed_verdict(ratios.get(kind, []), untimed.get(kind), date)
        # On a busy machine a case may exceed its time. That must not switch a kernel of the CPU off for good.
        is_busy = self._device.type == "cpu" and lost is not None and lost.timed_out
        with self._mutex:
            if self._only or is_busy:
                self._unproved |= {(op, backend, kind) for kind in found if self._only or kind not in wrong}
            for _ in range(steps):
                bar.advance(f"{name_of(op, backend)}: ended")
            kept = {kind: verdict for kind, verdict in found.items() if kind in wrong or not is_busy}
            self._keep(op, backend, kept, is_busy)
        return found

    def _in_threads(self, function: Callable[[Item], Found], items: Iterable[Item], threads: int) -> list[Found]:
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                # After Ctrl-C the pool would wait for its threads, and they for their children, for minutes. A child
                # that is killed here says nothing about its kernel.
                self._interrupted = True
                pool.shutdown(wait=False, cancel_futures=True)
                while futures:
                    # The user may press Ctrl-C again.
                    with contextlib.suppress(KeyboardInterrupt):
                        processes.kill_all()
                        futures = list(wait(futures, 0.1).not_done)
                raise

    # ---- Keeping ----

    def _key(self, op: str, backend: str, kind: Kind) -> dict:
        return verdicts.make_key(op, backend, kind, self._facts[backend])

    def _read(self, op: str, backend: str) -> dict[Kind, Verdict]:
        """The verdicts that are kept already."""
        if self._place is None:
            return {}
        found = {kind: self._place.read(self._key(op, backend, kind)) for kind in sorted(self._kinds(op, backend))}
        return {kind: verdict for kind, verdict in found.items() if verdict is not None}

    def _keep(self, op: str, backend: str, found: dict[Kind, Verdict], is_busy: bool) -> None:
        if self._place is None:
            return
        if is_busy:
            self._notes.append(
                f"The time-out of {name_of(op, backend)} is not kept: a busy machine may have caused it."
            )
        if not found:
            return
        reason = verdicts.unidentified_reason(self._facts[backend])
        try:
            if reason is None:
                self._place.keep(self._kernel(op, backend, found).as_dict())
                note = f"The verdicts are kept in {self._place}."
            else:
                note = f"The verdicts are not kept: {reason}."
        except OSError as error:
            note = (
                f"The verdicts are not kept: {error}. lcw-ops verify --write FILE keeps them in a file, which "
                "LCW_OPS_VERDICTS may name."
            )
        if note not in self._notes:
            self._notes.append(note)

    def _kernel(self, op: str, backend: str, found: dict[Kind, Verdict]) -> Kernel:
        written = [
            {"key": self._key(op, backend, kind), **verdict._asdict()}
            for kind, verdict in found.items()
            if (op, backend, kind) not in self._unproved
        ]
        return Kernel(op, backend, found, written)


class _Turn:
    """A child's way to be alone: it waits until all children of its wave have come so far, and then for its turn."""

    def __init__(self, barrier: threading.Barrier, lock: threading.Lock) -> None:
        self._barrier, self._lock = barrier, lock
        self._has_come = self._has_turn = False

    def wait(self) -> None:
        self._come()
        self._lock.acquire()
        self._has_turn = True

    def end(self) -> None:
        """The child has ended, perhaps before it came so far."""
        self._come()
        if self._has_turn:
            self._lock.release()

    def _come(self) -> None:
        if not self._has_come:
            self._has_come = True
            self._barrier.wait()


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
