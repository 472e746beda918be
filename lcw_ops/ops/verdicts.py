"""The verdicts of ``lcw-ops verify``: which kernels are right, and faster than plain torch, on this very device.

A verdict holds for its key alone: the device by its UUID, the op, the backend, a class of dtypes and a class of sizes,
the driver, the versions, and a hash of the kernels. lcw_ops/verification writes one JSON file per key into the cache
folder; this module reads them. A file that is missing, unreadable, or of another key counts as no verdict.

Everything is read once per process, so a choice stays the same while torch.compile traces.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from lcw_ops import _files, _torch

# Increase this number when the cases or the rules of the verification change: older verdicts then no longer hold.
FORMAT = 3

# The parts of a key that an update changes for good. A verdict that differs from a new one in these alone is outdated.
# torch, Triton and CUDA are none of them: two environments with other versions may share a cache folder.
UPDATED = ("format", "lcw_ops", "kernels", "driver")

# Element size in bytes -> the class of dtypes. The recurrence's class is that of its state, which is never 16-bit.
DTYPES = {2: "16-bit", 4: "float32", 8: "float64"}
STATES = ("orthogonal_filter", "parallel_depth_sweep_")

# Op -> the widest row of each class of sizes. Wider rows have no verdict. An op without an entry works element by
# element on lists of tensors: it has one class, of every size and dtype.
WIDEST: dict[str, tuple[int, ...]] = {
    "lcw_weight": (1024, 4096),
    "hypersphere_direction": (1024, 4096),
    "normalize_scale": (1024, 4096),
    "orthogonal_filter": (64, 128, 256, 512, 1024),
    "parallel_depth_sweep_": (64, 256),
}


class Kind(NamedTuple):
    """A class of dtypes and a class of sizes."""

    dtype: str
    size: str


ANY = Kind("any", "any")


class Verdict(NamedTuple):
    """``times`` is plain torch's time divided by the kernel's, the least of all sizes of the class; None: not timed."""

    right: bool
    faster: bool
    times: float | None
    reason: str
    date: str


def kinds(op: str) -> list[Kind]:
    """Every class of the op."""
    if op not in WIDEST:
        return [ANY]
    dtypes = [name for name in DTYPES.values() if op not in STATES or name != DTYPES[2]]
    return [Kind(dtype, _up_to(widest)) for dtype in dtypes for widest in WIDEST[op]]


def classify(op: str, width: int, itemsize: int) -> Kind | None:
    """The class of rows of ``width`` elements of ``itemsize`` bytes, or None if they are wider than every class."""
    if op not in WIDEST:
        return ANY
    # Under torch.compile the width may be a symbol. Each comparison then becomes a guard.
    for widest in WIDEST[op]:
        if width <= widest:
            return Kind(DTYPES[itemsize], _up_to(widest))
    return None


def _up_to(widest: int) -> str:
    return f"up to {widest}"


# ---- The key ---------------------------------------------------------------------------------------------------------


def make_key(op: str, backend: str, kind: Kind, facts: dict) -> dict:
    """The key of a verdict. ``facts`` are those of :func:`collect_facts` for the same backend."""
    return {"format": FORMAT, "op": op, "backend": backend, "dtype": kind.dtype, "size": kind.size, **facts}


@functools.cache
def collect_facts(device: torch.device, backend: str) -> dict:
    """The device, its driver, the versions and the kernels' hash: the part of a key that all ops share."""
    return {
        **(_gpu_facts(device) if device.type == "cuda" else _cpu_facts()),
        "cuda": torch.version.cuda or torch.version.hip,
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "lcw_ops": sys.modules["lcw_ops"].__version__,
        "kernels": _hash_kernels(backend),
    }


def unidentified_reason(facts: dict) -> str | None:
    """Returns why no verdict can be about the device of these facts, or None if it is known which device it is."""
    if facts["device"] is None:
        return f"the driver does not give the UUID of {facts['name']}, so it cannot be told from another device"
    if facts["device"] != "cpu" and facts["driver"] is None:
        return f"the version of the driver of {facts['name']} is not known, so an update would go unseen"
    return None


def is_outdated(key: dict, new: dict) -> bool:
    """Whether ``key`` is about the kernel and the device of the key ``new``, before an update."""
    of_class = ("dtype", "size")
    same = all(key.get(name) == part for name, part in new.items() if name not in (*of_class, *UPDATED))
    return same and any(key.get(name) != new[name] for name in UPDATED)


def _cpu_facts() -> dict:
    # The variable limits the instructions of our kernels only, and torch's answer is about torch's.
    capability = f"{torch.backends.cpu.get_cpu_capability()} {os.environ.get('LCW_OPS_CPU_CAPABILITY') or ''}".strip()
    return {"device": "cpu", "name": cpu_name(), "capability": capability, "multiprocessors": None, "driver": None}


def _gpu_facts(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return {
        "device": _uuid(index) or _uuid_of_card(properties),
        "name": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
    }


def _uuid(index: int) -> str | None:
    """The UUID of CUDA's device ``index``; of a MIG slice, the slice's own. None if the driver does not answer.

    cudaDeviceProp gives the UUID of the whole card for a slice. Only cuDeviceGetUuid_v2 tells slices apart.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        handle, uuid = ctypes.c_int(), ctypes.create_string_buffer(16)
        asked = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), index)
        asked = asked or driver.cuDeviceGetUuid_v2(uuid, handle)
    except (OSError, AttributeError):
        return None
    return None if asked or not any(uuid.raw) else uuid.raw.hex()


def _uuid_of_card(properties) -> str | None:
    """The UUID as torch knows it, in the form of :func:`_uuid`. None for a MIG slice, which has that of its card."""
    uuid = str(getattr(properties, "uuid", "")).lower().removeprefix("gpu-").replace("-", "")
    is_known = re.fullmatch("[0-9a-f]{32}", uuid) and uuid.strip("0") and "MIG" not in properties.name
    return uuid if is_known else None


NVIDIA_MODULE = Path("/proc/driver/nvidia/version")


def _driver() -> str | None:
    """The driver's version. On WSL, whose kernel has no NVIDIA module, the driver's library gives it."""
    if torch.version.hip is not None:
        # AMD's driver is a part of the kernel.
        return platform.release()
    try:
        version = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", NVIDIA_MODULE.read_text())
    except OSError:
        version = None
    return version[0] if version else _driver_by_its_library()


def _driver_by_its_library() -> str | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        version = ctypes.create_string_buffer(80)
        failed = library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(version, len(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value.decode(errors="replace") or None


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hash_kernels(backend: str) -> str:
    """A hash of what the backend runs: its sources in Python, or the library that was built from its sources."""
    package = Path(__file__).parent.parent
    files = {
        "cpp": [package / "_C.abi3.so"],
        "cuda": [package / "_C_cuda.abi3.so"],
        "graph": [package / "ops/orthogonal_filter/graph.py"],
        "triton": sorted((package / "kernels").glob("*.py")),
    }[backend]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"\0{file.name}\0".encode() + (file.read_bytes() if file.exists() else b""))
    return digest.hexdigest()[:16]


# ---- Reading ---------------------------------------------------------------------------------------------------------


def file_of(key: dict) -> str:
    """The name of a verdict's file in the cache folder."""
    return f"verdict-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"


def shipped_file() -> Path | None:
    """The file of LCW_OPS_VERDICTS, which replaces the cache folder."""
    named = os.environ.get("LCW_OPS_VERDICTS")
    return Path(named) if named else None


@_torch.constant_when_traced
def are_kept() -> bool:
    """Whether this process has any verdict to look for."""
    return _are_kept()


@functools.cache
def _are_kept() -> bool:
    if shipped_file() is not None:
        return bool(_shipped())
    folder = _files.cache_folder()
    try:
        return folder is not None and any(folder.glob("verdict-*.json"))
    except OSError:
        return False


@functools.cache
def find(op: str, backend: str, kind: Kind, device: torch.device) -> Verdict | None:
    """The verdict about a kernel on this device, or None if there is none that holds here."""
    if not are_kept():
        return None
    facts = collect_facts(device, backend)
    if unidentified_reason(facts) is not None:
        return None
    key = make_key(op, backend, kind, facts)
    if shipped_file() is not None:
        return verdict_in(_shipped().get(file_of(key)), key)
    folder = _files.cache_folder()
    return None if folder is None else read(folder, key)


def read(folder: Path, key: dict) -> Verdict | None:
    """The verdict that the folder holds for this key, read now."""
    return verdict_in(load(folder / file_of(key)), key)


def find_all(op: str, backend: str, device: torch.device) -> Iterator[tuple[Kind, Verdict]]:
    """The verdicts about all classes of a kernel."""
    for kind in kinds(op):
        verdict = find(op, backend, kind, device)
        if verdict is not None:
            yield kind, verdict


@functools.cache
def _shipped() -> dict[str, dict]:
    return verdicts_of(load(shipped_file()))


def unreadable_reason() -> str | None:
    """Returns why the file of LCW_OPS_VERDICTS cannot be read, or None if it can or the variable is unset."""
    path = shipped_file()
    if path is None:
        return None
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "it is not a file"
        with path.open("rb"):
            pass
    except FileNotFoundError:
        return "there is no such file"
    except OSError as error:
        return error.strerror or str(error)
    return None if isinstance(load(path), list) else "it is not a file that lcw-ops verify --write made"


def verdicts_of(kernels) -> dict[str, dict]:
    """The verdicts in the content of LCW_OPS_VERDICTS' file, by the names that they would have in the cache folder.

    It is the output of ``lcw-ops verify --json``, or what ``--write`` made of several.
    """
    if not isinstance(kernels, list):
        return {}
    lists = [kernel.get("verdicts") for kernel in kernels if isinstance(kernel, dict)]
    written = [verdict for verdicts in lists if isinstance(verdicts, list) for verdict in verdicts]
    keyed = [verdict for verdict in written if isinstance(verdict, dict) and isinstance(verdict.get("key"), dict)]
    return {file_of(verdict["key"]): verdict for verdict in keyed}


def load(path: Path | None):
    """The content of a JSON file, or None if it cannot be read."""
    try:
        # A pipe or a device might never end.
        return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def verdict_in(written, key: dict) -> Verdict | None:
    """The verdict, if it was written for this very key and is whole."""
    if not isinstance(written, dict) or written.get("key") != key:
        return None
    right, faster, times, reason, date = (written.get(name) for name in Verdict._fields)
    if not (isinstance(right, bool) and isinstance(faster, bool) and isinstance(reason, str) and isinstance(date, str)):
        return None
    is_number = isinstance(times, float) and math.isfinite(times)
    return Verdict(right, faster, times, reason, date) if times is None or is_number else None
