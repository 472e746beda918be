"""Helpers for the tests of Triton kernels, which run on a GPU, or on the CPU in Triton's interpreter.

Triton chooses the interpreter when it is imported, so the interpreted tests have their own run of pytest, with
TRITON_INTERPRET=1 in its environment (see tests/run.py). In any other run on the CPU they are skipped.
"""

import importlib
import os
from types import ModuleType

import pytest
import torch

from lcw_ops.ops import backends

DEVICE_TYPE = torch.device(os.environ.get("LCW_OPS_TEST_DEVICE", "cpu")).type


def import_kernels(stem: str, op: str) -> ModuleType:
    """Import lcw_ops.kernels.<stem>, or skip the calling test module if ``op`` cannot run in Triton here.

    Raises:
        RuntimeError: instead of the skip, in a run that was started for the interpreter.
    """
    reason = backends.missing_reason(op, "triton", DEVICE_TYPE)
    if reason is None:
        return importlib.import_module(f"lcw_ops.kernels.{stem}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError(f"TRITON_INTERPRET=1, but {op}: {reason}")
    pytest.skip(f"{reason}; `make test` runs these tests in Triton's interpreter", allow_module_level=True)


def multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix tl.dot of bfloat16 in the interpreter, which multiplies the bit patterns as integers (Triton 3.7)."""
    if DEVICE_TYPE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *others):
        wide = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, *wide, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
