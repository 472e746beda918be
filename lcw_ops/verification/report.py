"""The result of a verification: a table for people, JSON for programs, and a block to paste into an issue."""

import json
from dataclasses import dataclass, field

from lcw_ops.ops import backends
from lcw_ops.ops.verdicts import Kind, Verdict


@dataclass
class Kernel:
    """One op on one backend, with a verdict for each class. ``written`` holds them as they are in their files."""

    op: str
    backend: str
    verdicts: dict[Kind, Verdict] = field(default_factory=dict)
    written: list[dict] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return bool(self.verdicts) and all(verdict.right for verdict in self.verdicts.values())

    @property
    def times(self) -> float | None:
        """Plain torch's time divided by the kernel's: the least of all classes that were timed."""
        return min((verdict.times for verdict in self.verdicts.values() if verdict.times is not None), default=None)

    @property
    def reason(self) -> str:
        if not self.verdicts:
            return "nothing ran"
        wrong = [verdict for verdict in self.verdicts.values() if not verdict.right]
        if wrong:
            others = f" (and {len(wrong) - 1} of {len(self.verdicts)} classes more)" if len(wrong) > 1 else ""
            return wrong[0].reason + others
        faster = sum(verdict.faster for verdict in self.verdicts.values())
        timed = sum(verdict.times is not None for verdict in self.verdicts.values())
        times = f"faster in {faster} of {timed} that were timed" if timed else "none was timed"
        return f"right in {_count(len(self.verdicts))}; {times}"

    def as_dict(self) -> dict:
        facts = {"op": self.op, "backend": self.backend, "right": self.right, "times": self.times}
        return {**facts, "reason": self.reason, "verdicts": self.written}


def _count(classes: int) -> str:
    return "1 class" if classes == 1 else f"{classes} classes"


@dataclass
class Report:
    """The result of :func:`lcw_ops.verify`. ``facts`` name the device, driver and versions; ``notes`` are text."""

    device: str
    facts: dict
    kernels: list[Kernel]
    notes: list[str]
    cases: int
    seconds: float

    @property
    def right(self) -> bool:
        """Whether every kernel of the report was right, by this run or by a kept verdict, and there is at least one."""
        return bool(self.kernels) and all(kernel.right for kernel in self.kernels)

    def to_json(self) -> str:
        """One object per kernel: op, backend, right, times, reason, and verdicts, for LCW_OPS_VERDICTS."""
        return json.dumps([kernel.as_dict() for kernel in self.kernels], indent=1)

    def table(self) -> str:
        rows = [("op", "backend", "right", "times plain torch", "verdict")]
        for kernel in self.kernels:
            times = "-" if kernel.times is None else f"{kernel.times:.2f}"
            rows.append((kernel.op, kernel.backend, "yes" if kernel.right else "NO", times, kernel.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
                         for row in rows)  # fmt: skip

    def block(self) -> str:
        """A block of Markdown with everything that an issue about these kernels needs."""
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items() if value is not None)
        lines = [f"lcw-ops verify --device {self.device}: {facts}", self.table()]
        for kernel in self.kernels:
            for kind, verdict in kernel.verdicts.items():
                if not verdict.right:
                    lines.append(f"{kernel.op}, {kernel.backend}, {kind.dtype}, {kind.size}: {verdict.reason}")
        return "\n".join(["```", *lines, "```"])

    def __str__(self) -> str:
        return "\n".join([self.table(), *self.notes])


def name_of(op: str, backend: str) -> str:
    form = backends.FORM_OF.get(backend)
    return f"{op} on {backend}" if form is None else f"{op} on {form} ({backend})"
