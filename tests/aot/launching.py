"""Launches that only compile: on CPU tensors, with a driver that names a GPU and launches nothing."""

import importlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from aot import DEVICES, STEMS
from aot.compiled import TARGETS, facts

KERNELS = {stem: importlib.import_module(f"lcw_ops.kernels.{stem}") for stem in STEMS}
# In bytes per thread. 32 bytes are eight registers, and spills of that size stay in the first-level cache. The limit
# for csrc/cuda is the same (test_cuda_build.py). The spills of Triton 3.6 and 3.7 differ by up to as many bytes.
MAX_SPILLED_BYTES = 32
# The longest that a user should wait for one kernel at the first call, in seconds of processor time.
MAX_SECONDS = 15
# The most warps of a block on an NVIDIA GPU.
MAX_WARPS = 32


class NamedGpu:
    """Answers the questions that Triton asks its driver before it compiles."""

    def __init__(self, target: str):
        self._target = target

    def get_current_target(self):
        return TARGETS[self._target]

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels by device.
        return self._target

    def get_current_stream(self, device) -> int:
        return 0


class Compiled(NamedTuple):
    kernel: CompiledKernel
    seconds: float  # of processor time, those of ptxas included; 0 for a kernel that was compiled before

    def facts(self) -> dict:
        names = {"name": self.kernel.name, "warps": self.kernel.metadata.num_warps}
        return names | facts(self.kernel) | {"seconds": round(self.seconds, 2)}


@contextmanager
def compiling(target: str) -> Iterator[list[Compiled]]:
    """A context in which a launch on CPU tensors only compiles, for ``target``. The list collects the kernels."""
    compiled = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        begin = _processor_seconds()
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled.append(Compiled(kernel, _processor_seconds() - begin))

    driver, before = triton.runtime.driver, triton.runtime.driver._active
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        for module in KERNELS.values():
            patch.setattr(module, "device_facts", lambda _: DEVICES[target], raising=False)
        driver.set_active(NamedGpu(target))
        try:
            yield compiled
        finally:
            driver.set_active(before)


def kernel_names() -> set[str]:
    """Every kernel that a launcher may launch."""
    return {
        name for module in KERNELS.values() for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }  # fmt: skip


def assert_fits(target: str, found: dict, spilled: float = MAX_SPILLED_BYTES) -> None:
    """Judge the facts of a kernel. ``spilled`` is the most bytes that a thread may spill."""
    print(target, found)
    assert found["shared"] <= DEVICES[target].shared_memory
    assert found["seconds"] <= MAX_SECONDS
    assert found["warps"] <= MAX_WARPS
    assert found["spilled"] <= spilled


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
