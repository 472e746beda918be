"""``lcw_ops.verify``: proves on the user's own machine that the kernels are right, and times them.

Child processes run every kernel against float64 and against plain torch. Their verdicts go into the cache folder, where
the automatic choice of later processes finds them (lcw_ops/ops/verdicts.py). Nothing here runs by itself.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import torch

from lcw_ops import _files
from lcw_ops._checks import describe
from lcw_ops.ops import verdicts
from lcw_ops.verification.keeping import File, Folder
from lcw_ops.verification.preconditions import (
    Refused,
    describe_device,
    find_device,
    find_kernels,
    lock,
    refuse_a_busy_card,
    refuse_inside_a_job,
)
from lcw_ops.verification.report import Report
from lcw_ops.verification.work import Verification

__all__ = ["Refused", "Report", "verify"]


def verify(
    device: str | torch.device | None = None,
    ops: Iterable[str] | None = None,
    resume: bool = False,
    quiet: bool = True,
    case: str | None = None,
    write: str | Path | None = None,
) -> Report:
    """Run every kernel of a device against float64 and against plain torch, and keep the verdicts.

    Each op and backend runs in a process of its own, so a kernel that crashes or hangs is a verdict, not an accident.
    The verdicts are files in the cache folder (``LCW_OPS_CACHE_DIR``), or are in the file ``write``. Processes that
    start later choose by them: on a GPU the fastest kernel that is right and faster than plain torch becomes the
    automatic choice, and on a CPU a wrong kernel is switched off.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; default: the first GPU, or else the CPU. A GPU must be idle.
        ops: names of ops, as :func:`lcw_ops.info` lists them, or of stems, such as "lcw_linear"; default: all.
        resume: whether not to run kernels that already have every verdict. The report has the kept verdicts.
        quiet: whether to print no progress.
        case: run only cases whose name contains this, and keep no verdict. For looking into a fault.
        write: a file for ``LCW_OPS_VERDICTS``, in which the verdicts are kept instead of the cache folder. Verdicts
            that the file has about other devices and kernels stay.

    Returns:
        A report: print it, or see its ``right``, ``kernels``, ``notes`` (where the verdicts are kept), ``table()``,
        ``block()`` and ``to_json()``.

    Raises:
        ValueError: an unknown device or op, a ``case`` that no case contains, a ``case`` with ``write``, or a ``write``
            that cannot be written or is another kind of file.
        Refused: this process belongs to a distributed job, the card is in use, another verification is running, the
            device cannot be opened, or none of the kernels can run there. It is a RuntimeError.
    """
    began = time.monotonic()
    refuse_inside_a_job()
    place = find_device(device)
    notes: list[str] = []
    kernels = find_kernels(place, ops, case or "", notes)
    keeper = _find_keeper(case, write, notes)
    described = describe_device(place, sorted({backend for _, backend in kernels}))
    facts = next(iter(described["facts"].values()))
    if place.type == "cuda":
        refuse_a_busy_card(place, facts["device"])
    with lock(_files.cache_folder(), described["facts"]):
        verification = Verification(place, described, keeper, notes, case or "")
        results = verification.run(kernels, resume, quiet)
    return Report(str(place), facts, results, notes, verification.cases, time.monotonic() - began)


def _find_keeper(case: str | None, write: str | Path | None, notes: list[str]) -> Folder | File | None:
    """The place in which verdicts are kept. A note says so if processes of this environment read another place."""
    if case:
        if write is not None:
            raise ValueError(
                describe("verify", "write", "is given with case", "one of the two: a case keeps no verdict")
            )
        notes.append("The verdicts are not kept, because not every case has run.")
        return None
    shipped = verdicts.shipped_file()
    if write is not None:
        file = File(Path(write))
        file.check()
        if shipped is None or shipped.absolute() != Path(write).absolute():
            notes.append(f"Processes read the verdicts in {write} if LCW_OPS_VERDICTS names it.")
        return file
    if shipped is not None:
        notes.append(
            f"LCW_OPS_VERDICTS is {shipped}, so processes read that file, and not the verdicts of this run. "
            f"lcw-ops verify --write {shipped} puts them there."
        )
    return Folder(_files.cache_folder())
