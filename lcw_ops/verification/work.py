"""The work of a verification: children judge and time the kernels, and their verdicts are written.

Triton's kernels are compiled first, by as many processes as there are cores, without the device. Then one process after
another opens the device, for one op on one backend.
"""

import contextlib
import datetime
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lcw_ops import _files
from lcw_ops.jobs.progress import progress
from lcw_ops.ops import verdicts
from lcw_ops.ops.verdicts import Kind, Verdict
from lcw_ops.verification import processes
from lcw_ops.verification.cases import cases
from lcw_ops.verification.report import Kernel, name_of
from lcw_ops.verification.speeds import speeds


class Verification:
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
        """Op -> class -> the fault of a kernel that was compiled."""
        if not ops:
            return {}
        bar.begin("compiling; later runs find the kernels in Triton's cache")
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
            try:
                return dict(zip(ops, pool.map(lambda op: self._compile_op(op, bar), ops), strict=True))
            except BaseException:
                # After Ctrl-C the pool would wait for its threads, and they for their children, for minutes.
                pool.shutdown(wait=False, cancel_futures=True)
                processes.kill_all()
                raise

    def _compile_op(self, op: str, bar) -> dict[Kind, str]:
        faults: dict[Kind, str] = {}
        try:
            for line in processes.run({"job": "compile", "op": op, "card": self._card, "only": self._only}):
                if "kind" in line:
                    faults.setdefault(Kind(*line["kind"]), line["reason"])
        except processes.Lost as error:
            faults |= dict.fromkeys(self._kinds(op, "triton") - faults.keys(), f"compiling {error}")
        bar.advance(f"{op} compiled")
        return faults

    def _judge(self, op: str, backend: str, faults: dict[Kind, str], bar) -> dict[Kind, Verdict]:
        """The verdicts of one child. If it is lost, every class is a no: a crash may come from any of them.

        A child that is killed while it times kernels has found them right before.
        """
        kinds = self._kinds(op, backend)
        wrong = {kind: reason for kind, reason in faults.items() if kind in kinds}
        right: set[Kind] = set()
        ratios: dict[Kind, list[tuple[float, bool, str]]] = {}
        untimed: dict[Kind, str] = {}
        job = {"job": "run", "op": op, "backend": backend, "device": str(self._device)}
        job |= {"kinds": sorted(kinds), "faulty": list(wrong), "times": self._is_timed(backend), "only": self._only}
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
                    elif line["right"]:
                        right.add(kind)
                    else:
                        wrong.setdefault(kind, line["reason"])
        except processes.Lost as error:
            lost = error
        slow = timing and lost is not None and lost.timed_out
        date = datetime.date.today().isoformat()
        found = {}
        for kind in sorted(kinds):
            if kind in wrong or (lost is not None and not slow):
                found[kind] = Verdict(False, False, None, f"no: {wrong.get(kind) or lost}", date)
            elif kind not in right:
                found[kind] = Verdict(False, False, None, "no: the process has judged no case", date)
            else:
                found[kind] = _timed_verdict(ratios.get(kind, []), str(lost) if slow else untimed.get(kind), date)
        if not self._only:
            # On a busy machine a case may exceed its time. That must not switch a kernel of the CPU off for good.
            is_busy = self._device.type == "cpu" and lost is not None and lost.timed_out and not slow
            self._keep(op, backend, {kind: found[kind] for kind in wrong} if is_busy else found)
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
