"""``lcw_ops.verify``: proves on the user's own machine that the kernels are right, and times them.

Child processes run every kernel against float64 and against plain torch. Their verdicts go into the cache folder, where
the automatic choice of later processes finds them (lcw_ops/ops/verdicts.py). Nothing here runs by itself.
"""

import time
from collections.abc import Iterable

import torch

from lcw_ops import _files
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
) -> Report:
    """Run every kernel of a device against float64 and against plain torch, and keep the verdicts.

    Each op and backend runs in a process of its own, so a kernel that crashes or hangs is a verdict, not an accident.
    The verdicts are files in the cache folder (``LCW_OPS_CACHE_DIR``). Processes that start later choose by them: on a
    GPU a kernel that is right and faster becomes the automatic choice, and on a CPU a wrong kernel is switched off.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; default: the first GPU, or else the CPU. A GPU must be idle.
        ops: names of ops, as :func:`lcw_ops.info` lists them, or of stems, such as "lcw_linear"; default: all.
        resume: whether to leave out kernels that already have every verdict.
        quiet: whether to print no progress.
        case: run only cases whose name contains this, and keep no verdict. For looking into a fault.

    Returns:
        A report: print it, or see its ``right``, ``kernels``, ``table()``, ``block()`` and ``to_json()``.

    Raises:
        ValueError: an unknown device or op, or a ``case`` that no case contains.
        Refused: this process belongs to a distributed job, the card is in use, another verification is running, the
            device cannot be opened, or none of the kernels can run there. It is a RuntimeError.
    """
    began = time.monotonic()
    refuse_inside_a_job()
    place = find_device(device)
    kernels = find_kernels(place, ops, case or "")
    described = describe_device(place, sorted({backend for _, backend in kernels}))
    facts = next(iter(described["facts"].values()))
    if place.type == "cuda":
        refuse_a_busy_card(place, facts["device"])
    folder = _files.cache_folder()
    notes: list[str] = []
    with lock(folder, described["facts"]):
        verification = Verification(place, described, folder, notes, case or "")
        results = verification.run(kernels, resume, quiet)
    return Report(str(place), facts, results, notes, verification.cases, time.monotonic() - began)
