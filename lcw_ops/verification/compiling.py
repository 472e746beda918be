"""Compiles the Triton kernels that the cases launch, without a device.

The launchers run on CPU tensors, with a driver that names the card and launches nothing. A compiled kernel stays in
Triton's own cache, where the process that runs the cases finds it. Spills, and long compilations, are faults.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from lcw_ops import kernels
from lcw_ops.ops import backends

# In bytes per thread: eight registers, which stay in the first-level cache. tests/test_triton_launches.py has the same.
MOST_SPILLED = 32
MOST_SECONDS = 15.0


class Fault(Exception):
    """A kernel does not compile, spills, or takes too long to compile."""


def describe_card(device: torch.device) -> dict:
    """The facts that a process without the card needs to compile for it."""
    from triton.runtime import driver

    from lcw_ops.kernels.common import device_facts

    target = driver.active.get_current_target()
    return {"target": [target.backend, target.arch, target.warp_size], "facts": list(device_facts(device))}


class _NamedCard:
    """Answers the questions that Triton asks its driver before it compiles."""

    def __init__(self, target) -> None:
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels by device.
        return str(self._target)

    def get_current_stream(self, device) -> int:
        return 0


@contextmanager
def compiling_for(card: dict, announce: Callable[[str], None]) -> Iterator[None]:
    """A context in which Triton launches on CPU tensors only compile, for the card of :func:`describe_card`.

    ``announce`` is told each kernel's name before it is compiled. A launch raises Fault for a faulty kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from lcw_ops.kernels.common import Device

    run, seen = JITFunction.run, set()

    def compile_only(self, *arguments, grid, warmup, **options):
        name = self.fn.__name__
        announce(name)
        began = time.monotonic()
        try:
            compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        except Exception as error:
            raise Fault(f"{name} does not compile: {type(error).__name__}: {_last_line(error)}") from error
        duration = time.monotonic() - began
        if duration > MOST_SECONDS:
            raise Fault(f"{name} takes {duration:.0f} s to compile; expected at most {MOST_SECONDS:.0f} s")
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            spilled = count_spilled(compiled.asm)
            if spilled > MOST_SPILLED:
                raise Fault(f"{name} spills {spilled} bytes per thread; expected at most {MOST_SPILLED}")

    facts = Device(*card["facts"])
    before = triton.runtime.driver._active
    with mock.patch.object(JITFunction, "run", compile_only):
        patches = [mock.patch.object(module, "device_facts", create=True, return_value=facts) for module in _modules()]
        for patch in patches:
            patch.start()
        triton.runtime.driver.set_active(_NamedCard(GPUTarget(*card["target"])))
        # Triton's launchers take any tensor here: nothing is launched.
        with mock.patch.object(backends, "missing_reason", return_value=None):
            try:
                yield
            finally:
                triton.runtime.driver.set_active(before)
                for patch in patches:
                    patch.stop()


def _modules() -> list[types.ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    return [importlib.import_module(f"lcw_ops.kernels.{name}") for name in names]


def _last_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[-1]


def count_spilled(asm: dict) -> int:
    """Bytes of local memory per thread. On AMD's cards, whose spills are in registers, 0."""
    if "cubin" not in asm:
        return 0
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(STACK|LOCAL):(\d+)", report))
    return sum(map(int, usage.values()))
