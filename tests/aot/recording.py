"""A plugin of pytest that records what the launchers would launch on a GPU, while the tests run in the interpreter.

    PYTHONPATH=tests TRITON_INTERPRET=1 LCW_OPS_RECORDED_LAUNCHES=folder pytest -p aot.recording tests/test_triton_*.py

The launchers are told that the device is RECORDED_TARGET, so tiles and warps are those of that GPU. Every launch runs
in the interpreter as usual, so that a test goes on to its last launch. The folder gets what Triton would compile:
launches that it would compile to the same code are one, with the number of times. ``test_triton_recorded.py`` compiles
them.
"""

import importlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

from triton.runtime.interpreter import InterpretedFunction

from aot import DEVICES, RECORDED_TARGET, STEMS
from lcw_ops.verification.ahead import described


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
