"""The conditions of a verification: the device and its kernels, an idle card, and one verification at a time."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from lcw_ops._checks import describe
from lcw_ops.ops import backends, gradient_activation, hypersphere, lcw_linear, parallel_depth, verdicts, weight_norm
from lcw_ops.verification import processes
from lcw_ops.verification.cases import cases

# A context of CUDA alone takes a few hundred MB.
MOST_USED_BYTES = 2 << 30

MOST_TOOL_SECONDS = 30.0


class Refused(RuntimeError):
    """This is not the time or the place for a verification."""


def refuse_inside_a_job() -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    # torchrun sets the first one, Open MPI the second, and MPICH and its kin the third.
    sizes = [os.environ.get(name, "1") for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
    # The shell of an allocation has the number of tasks too, but no task has been started there.
    if os.environ.get("SLURM_PROCID"):
        sizes.append(os.environ.get("SLURM_NTASKS", "1"))
    if distributed or any(size not in ("", "1") for size in sizes):
        raise Refused(
            "verify: this process belongs to a distributed job, whose ranks would disturb the timings. Run lcw-ops "
            "verify once, before the job, in an allocation of Slurm with srun -n 1; all ranks read the same verdicts."
        )


def find_device(device: str | torch.device | None) -> torch.device:
    count = torch.cuda.device_count()
    if device is None:
        device = "cuda:0" if count else "cpu"
    known = ["cpu", *(f"cuda:{index}" for index in range(count))]
    name = "cuda:0" if str(device) == "cuda" else str(device)
    if name not in known:
        raise ValueError(describe("verify", "device", f"is {str(device)!r}", f"one of {', '.join(known)}"))
    return torch.device(name)


# A stem names all ops of its file. The recurrence's op has the name of its stem.
_OF_STEM = {
    "gradient_activation": (gradient_activation.NAME, gradient_activation.SGD_STEP, gradient_activation.ADAMW_STEP),
    "hypersphere": (hypersphere.NAME,),
    "lcw_linear": (lcw_linear.NAME,),
    "parallel_depth": (parallel_depth.SWEEP,),
    "weight_norm": (weight_norm.NAME,),
}


def find_kernels(device: torch.device, ops: Iterable[str] | None, case: str, notes: list[str]) -> list[tuple[str, str]]:
    """(op, backend) of every kernel that can run on the device and has cases whose name contains ``case``."""
    named = backends.IMPLEMENTED if ops is None else ops
    chosen = dict.fromkeys(op for name in named for op in _OF_STEM.get(name, (name,)))
    for op in chosen:
        if op not in backends.IMPLEMENTED:
            expected = f"one of {', '.join(backends.IMPLEMENTED)}, or of the stems {', '.join(_OF_STEM)}"
            raise ValueError(describe("verify", "ops", f"has {op!r}", expected))
    able = [
        (op, backend)
        for op in chosen
        for backend in backends.IMPLEMENTED[op]
        if backends.missing_reason(op, backend, device.type) is None
    ]
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        # A verdict about the interpreter would pass for one about the compiled kernels.
        notes.append("Triton's kernels are left out: TRITON_INTERPRET=1 runs them in the interpreter. Unset it.")
        able = [kernel for kernel in able if kernel[1] != "triton"]
    if processes.temporary_folder() is None and any(backend == "triton" for _, backend in able):
        # A kernel that could not be compiled for this reason would be called wrong.
        notes.append("Triton's kernels are left out: no folder for temporary files can be written to. Set TMPDIR.")
        able = [kernel for kernel in able if kernel[1] != "triton"]
    if not able:
        raise Refused(f"verify: no kernel of these ops can run on {device}. lcw-ops info says why.")
    found = [kernel for kernel in able if any(case in one.label for one in cases(*kernel))]
    if not found:
        raise ValueError(describe("verify", "case", f"is {case!r}", "a text that some case's name contains"))
    return found


def refuse_a_busy_card(device: torch.device, uuid: str | None) -> None:
    """Ask the driver's own tool, while no process of ours has the card open. ``uuid`` is the key's, in hexadecimal."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return
    # Not subprocess.run: after a time-out it waits for the process, which may hang in the driver and not die.
    try:
        users = subprocess.Popen(
            [tool, "--query-compute-apps=gpu_uuid,pid,name", "--format=csv,noheader"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # The name of a process may be any bytes.
            errors="replace",
            start_new_session=True,
        )
    except OSError:
        return
    try:
        found, _ = users.communicate(timeout=MOST_TOOL_SECONDS)
    except subprocess.TimeoutExpired as error:
        users.kill()
        raise Refused(f"verify: nvidia-smi has not answered for {error.timeout} s. Is {device} in order?") from error
    for line in found.splitlines() if users.returncode == 0 else ():
        user, _, process = line.partition(",")
        # "GPU-" or "MIG-" before the number, and dashes in it.
        if user.strip()[4:].replace("-", "").lower() == uuid and not _is_own(process.partition(",")[0].strip()):
            raise Refused(_busy(device, f"used by another process: {process.strip()}"))


def _is_own(process: str) -> bool:
    """Whether the number is that of this process or, on Linux, of one that it started."""
    seen: set[str] = set()
    while process not in seen:
        if process == str(os.getpid()):
            return True
        seen.add(process)
        try:
            # The name, in parentheses, may have any characters. The state and the parent follow.
            process = Path(f"/proc/{int(process)}/stat").read_text(errors="replace").rpartition(")")[2].split()[1]
        except (OSError, ValueError, IndexError):
            return False
    return False


def _busy(device: torch.device, how: str) -> str:
    return f"verify: {device} is {how}; expected an idle card, because others would disturb the timings. Wait for it."


def describe_device(device: torch.device, names: list[str]) -> dict:
    """Parts of the keys by backend, the card for which Triton compiles, and the bytes of its memory in use."""
    if device.type == "cpu":
        # No kernel runs here, and there is no device to open.
        return {"facts": {name: verdicts.collect_facts(device, name) for name in names}, "card": None, "used": 0}
    job = {"job": "describe", "device": str(device), "backends": names}
    try:
        *_, last = processes.run(job)
        found = _described(last, names)
    except processes.Lost as error:
        raise Refused(f"verify: {device} cannot be opened: a process {error}") from error
    if found["used"] > MOST_USED_BYTES:
        raise Refused(_busy(device, f"in use: {found['used'] / 2**30:.1f} GiB of its memory are taken"))
    return found


def _described(line: dict, names: list[str]) -> dict:
    """The findings in a child's line. Raises Lost if a part is missing."""
    found = line["done"] if isinstance(line.get("done"), dict) else {}
    facts = found.get("facts")
    # The parts of a key that this process reads.
    parts = ("device", "name", "driver")
    is_whole = isinstance(facts, dict) and all(
        isinstance(facts.get(name), dict) and facts[name].keys() >= set(parts) for name in names
    )
    if not is_whole or not isinstance(found.get("used"), int) or not isinstance(found.get("card", ""), dict | None):
        raise processes.Lost(f"crashed: its last line lacks a part: {json.dumps(line)[:200]}")
    return found


@contextlib.contextmanager
def lock(folder: Path | None, facts: dict) -> Iterator[None]:
    """At most one verification per device. Without a folder to write to, go on without the lock."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                # The same for every choice of ops, and so of backends.
                device = hashlib.sha256(json.dumps(next(iter(facts.values()))["device"]).encode()).hexdigest()
                file = stack.enter_context(open(folder / f"verify-{device[:16]}.lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused("verify: another verification of this device is running. Wait for it to end.") from error
        except (ImportError, OSError):
            pass
        yield
