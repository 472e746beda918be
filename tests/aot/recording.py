"""A plugin of pytest that records what the launchers would launch on a GPU, while the tests run in the interpreter.

    PYTHONPATH=tests TRITON_INTERPRET=1 LCW_OPS_RECORDED_LAUNCHES=folder pytest -p aot.recording tests/test_triton_*.py

The launchers are told that the device is RECORDED_TARGET, so tiles and warps are those of that GPU. Every launch runs
in the interpreter as usual, so that a test goes on to its last launch. The folder gets what Triton would compile:
launches that it would compile to the same code are one, with the number of times. ``test_triton_recorded.py`` compiles
them.
"""

import importlib
import inspect
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import torch
from triton.runtime.interpreter import InterpretedFunction

from aot import DEVICES, RECORDED_TARGET, STEMS

# An integer argument of this value is neither 1 nor a multiple of 16, for which Triton compiles code of its own.
ORDINARY = 3


def described(kernel: InterpretedFunction, arguments: tuple, keywords: dict) -> str:
    """All on which the compiled code depends, as JSON: the kernel, its arguments, and the options of the launch."""
    signature = inspect.signature(kernel.fn)
    own = {name: value for name, value in keywords.items() if name in signature.parameters}
    options = {name: value for name, value in keywords.items() if name not in own}
    unspecialised = kernel.kwargs.get("do_not_specialize") or ()
    bound = signature.bind(*arguments, **own).arguments
    constants = {name for name, one in signature.parameters.items() if "constexpr" in str(one.annotation)}
    described = {
        name: value if name in constants else _argument(value, name not in unspecialised)
        for name, value in bound.items()
    }
    found = {"module": kernel.fn.__module__, "kernel": kernel.fn.__name__, "arguments": described, "options": options}
    return json.dumps(found, sort_keys=True)


def _argument(value, specialised: bool):
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % 16 == 0}
    if isinstance(value, int) and not (specialised and value == 1):
        return 16 if specialised and value % 16 == 0 else ORDINARY
    return float(ORDINARY) if isinstance(value, float) else value


class _Recorder:
    """Replaces `InterpretedFunction.run`, through which every launch goes."""

    def __init__(self):
        self.counts, self._run = Counter(), InterpretedFunction.run

    def run(self, kernel, *arguments, grid, warmup, **keywords):
        self.counts[described(kernel, arguments, keywords)] += 1
        return self._run(kernel, *arguments, grid=grid, warmup=warmup, **keywords)


_recorder = _Recorder()


def _folder() -> Path:
    return Path(os.environ["LCW_OPS_RECORDED_LAUNCHES"])


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):
        # Forget what other sources launched. The workers of pytest-xdist start later.
        shutil.rmtree(_folder(), ignore_errors=True)
        _folder().mkdir(parents=True)
    InterpretedFunction.run = lambda kernel, *arguments, **others: _recorder.run(kernel, *arguments, **others)
    for stem in STEMS:
        module = importlib.import_module(f"lcw_ops.kernels.{stem}")
        if hasattr(module, "device_facts"):
            module.device_facts = lambda _: DEVICES[RECORDED_TARGET]


def pytest_sessionfinish(session) -> None:
    (_folder() / f"{os.getpid()}.json").write_text(json.dumps(_recorder.counts))
