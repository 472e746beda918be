"""Compiles kernels without a GPU, and caches the facts on which tests assert.

The key of an entry is a hash of kernels/, this file, Triton's version, the variant and the target. A second run on the
same sources asserts on the same facts without compiling. The cache is the folder LCW_OPS_AOT_CACHE, by default
.pytest_cache/aot; it is always safe to delete it. LCW_OPS_EVERY_TARGET=1 compiles for all targets, and
LCW_OPS_EVERY_LAUNCH=1 also compiles every launch of test_triton_launches.py and test_triton_recorded.py.
"""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aot import DEVICES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
assert TARGETS.keys() == DEVICES.keys()
# One target of each vendor.
EVERY_RUN = ("sm_90", "gfx942")
EVERY_LAUNCH = os.environ.get("LCW_OPS_EVERY_LAUNCH") == "1"
EVERY_TARGET = EVERY_LAUNCH or os.environ.get("LCW_OPS_EVERY_TARGET") == "1"

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("LCW_OPS_AOT_CACHE") or ROOT / ".pytest_cache/aot")


def _hash_sources() -> str:
    digest = hashlib.sha256(triton.__version__.encode())
    for path in (*sorted((ROOT / "kernels").glob("*.py")), Path(__file__)):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


SOURCES = _hash_sources()


def chosen_targets() -> tuple[str, ...]:
    """The targets of this run: EVERY_RUN, or all if the sources have changed or EVERY_TARGET is set.

    The sources have changed if the cache has entries of other sources, but none of these. So a new cache counts as
    unchanged. The answer is cached by sources: a second run does not leave out a target on which the first one failed.
    """
    if EVERY_TARGET:
        return tuple(TARGETS)
    CACHE.mkdir(parents=True, exist_ok=True)
    # The workers of one run must agree on the answer.
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = CACHE / f"{SOURCES}.targets"
        if not answer.exists():
            changed = any(CACHE.glob("*.targets"))
            answer.write_text(" ".join(TARGETS if changed else EVERY_RUN))
        return tuple(answer.read_text().split())


def remembered(key: str, compile: Callable):
    """The value of ``compile()``, which JSON can hold, or its value in an earlier run with the same sources."""
    path = CACHE / SOURCES / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        pass
    # Triton's own cache may hold results of another compiler of the same version.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", folder)
        result = compile()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(result))
    part.replace(path)
    return result


def variant_facts(variant: dict, target: str) -> dict[str, int]:
    """Registers, spilled bytes (AMD: spilled registers) and bytes of shared memory of a variant from `aot.variant`."""
    kernel = variant["kernel"].fn
    described = {name: value for name, value in sorted(variant.items()) if name not in ("kernel", "targets")}
    key = f"{target} {kernel.__module__}.{kernel.__name__} {described}"
    return remembered(key, lambda: facts(compile_variant(variant, TARGETS[target])))


def compile_variant(variant: dict, target: GPUTarget):
    kernel = variant["kernel"]
    signature = variant["signature"] | dict.fromkeys(variant["constexprs"], "constexpr")
    # As the launcher does, treat pointers from torch's allocator and some lengths as multiples of 16.
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in variant["aligned"]}
    source = ASTSource(kernel, signature, variant["constexprs"], attributes)
    return triton.compile(source, target=target, options={"num_warps": variant["num_warps"]})


def facts(compiled) -> dict[str, int]:
    found = _cuda_facts(compiled.asm["cubin"]) if "cubin" in compiled.asm else _hip_facts(compiled.asm["amdgcn"])
    return found | {"shared": compiled.metadata.shared}


def _cuda_facts(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report))
    return {
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]) + int(usage["LOCAL"]),
        "static_shared": int(usage["SHARED"]),
    }


def _hip_facts(assembly: str) -> dict[str, int]:
    usage = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly))
    return {
        "registers": int(usage["vgpr_count"]),
        "spilled": int(usage["vgpr_spill_count"]) + int(usage["sgpr_spill_count"]),
    }
