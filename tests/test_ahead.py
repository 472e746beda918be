"""The part compile of ``make gpu``: the kernels that it compiles without a device are those that a launch looks up."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter (TRITON_INTERPRET=1) compiles nothing", allow_module_level=True)

from aot import DEVICES
from aot.compiled import TARGETS
from aot.launching import KERNELS, compiling

from lcw_ops import functional as F
from lcw_ops.bench import gpu, gpu_fakes
from lcw_ops.verification import ahead

CARD = json.loads(gpu.compile_target(gpu_fakes.CARD))


def test_the_faked_card_is_the_one_for_which_tests_compile():
    target = TARGETS["sm_90"]
    assert CARD["target"] == [target.backend, target.arch, target.warp_size]
    assert CARD["facts"] == list(DEVICES["sm_90"])


def entries(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_a_launch_finds_what_was_compiled_without_a_device(tmp_path, monkeypatch):
    """A launch under a driver that names the card adds nothing to the cache. A launch of another dtype does."""
    # compile_all sets these two for its processes.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def calls(source):
        yield lambda: F.lcw_weight(torch.randn(20, 600))
        yield lambda: F.gradient_activation_([torch.randn(700)])

    monkeypatch.setattr(ahead, "_calls", calls)
    launches = []
    ahead.record("two calls", CARD, launches.append)
    assert len(launches) == 2
    assert entries(tmp_path) == set()
    # The processes are new ones, as in make gpu: what this process compiles stays in its memory too.
    assert not ahead.compile_all([], CARD, workers=1, until=time.monotonic() + 200)
    assert ahead.compile_all(launches, CARD, workers=1, until=time.monotonic() + 200)
    before = entries(tmp_path)
    assert len({path.parts[0] for path in before if path.suffix == ".cubin"}) == 2
    with compiling("sm_90") as compiled:
        # Other sizes of the same kind: neither 1 nor divisible by 16 differently.
        KERNELS["lcw_linear"].lcw_weight(torch.zeros(20, 600), False)
        KERNELS["gradient_activation"].gradient_activation_many([torch.zeros(701)], "arctan", 0.2, 30.0)
        assert [one.kernel.name for one in compiled] == ["lcw_rows_kernel", "gradient_activation_kernel"]
        assert entries(tmp_path) == before
        KERNELS["lcw_linear"].lcw_weight(torch.zeros(20, 600, dtype=torch.bfloat16), False)
        assert entries(tmp_path) > before


def kernel(x, length, width: "tl.constexpr"):  # noqa: F821 - a name of Triton's language
    pass


INTERPRETED = SimpleNamespace(fn=kernel, kwargs={"do_not_specialize": ["length"]})
PARAMS = [SimpleNamespace(name=name, do_not_specialize=name == "length") for name in ("x", "length", "width")]
COMPILED = SimpleNamespace(fn=kernel, params=PARAMS)


@pytest.mark.parametrize("jitted", [INTERPRETED, COMPILED], ids=["interpreter", "compiler"])
def test_the_same_launch_has_the_same_description(jitted):
    def described(x, length, **keywords) -> dict:
        return json.loads(ahead.described(jitted, (x, length), keywords))["arguments"]

    memory = torch.zeros(40)
    assert described(memory, 5, width=7) == described(torch.ones(3), 32, width=7)
    assert described(memory, 5, width=7) != described(memory, 5, width=8)
    assert described(memory, 5, width=7) != described(memory[1:], 5, width=7)
    assert described(memory, 5, width=7) != described(memory.double(), 5, width=7)
    # Numbers beyond 32 bits are passed in 64.
    assert described(memory, 5, width=7) != described(memory, 2**31, width=7)
    specialised = {value: described(value, 5, width=7)["x"] for value in (1, 3, 5, 16, 48, 2**31, 2**31 + 5, 0.5, 7.0)}
    assert specialised[3] == specialised[5]
    assert specialised[16] == specialised[48]
    assert len({str(value) for value in specialised.values()}) == 6
    assert described(None, 5, width=7)["x"] is None


def test_the_options_of_a_launch_are_kept():
    found = json.loads(ahead.described(COMPILED, (1, 2), {"width": 3, "num_warps": 8, "grid": (1,), "warmup": True}))
    assert found["options"] == {"num_warps": 8}


def test_a_kernel_that_does_not_compile_is_a_fault(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch = {"module": "lcw_ops.kernels.lcw_linear", "kernel": "lcw_rows_kernel", "arguments": {}, "options": {}}
    name, _, fault = ahead.compile_one(json.dumps(launch), CARD)
    assert name == "lcw_rows_kernel"
    assert "lcw_rows_kernel does not compile" in fault


def test_every_source_has_its_processes():
    names = ahead.names(ahead.SOURCES)
    assert {name.partition(":")[0] for name in names} == set(ahead.SOURCES)
    assert names[0] == "smoke"
    assert "tests:test_triton_lcw_linear.py" in names
    assert "tests:test_triton_launches.py" not in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("ending", "message"),
    [("import time; time.sleep(60)", "smoke: stopped after 3 s"), ("1 / 0", "smoke: ended early: ZeroDivisionError")],
)
def test_what_a_process_has_written_counts_however_it_ends(ending, message, monkeypatch, capfd):
    """Its last line may be half a line."""
    code = "print('{}', flush=True); print('{', end='', flush=True); " + ending
    run = subprocess.run
    monkeypatch.setattr(ahead.subprocess, "run", lambda _, **others: run([sys.executable, "-c", code], **others))
    assert ahead._record_in_a_process("smoke", "a card", 3) == ["{}"]
    assert message in capfd.readouterr().out
