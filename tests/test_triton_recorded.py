"""Compile, without a GPU, what the launches of the interpreted tests would compile on a GPU (see aot/recording.py).

``make test-slow`` compiles the launches that each kernel's tests make most often. ``make test-release`` sets
LCW_OPS_EVERY_LAUNCH=1 and compiles all of them. Facts about compiled code are kept (aot/compiled.py), so that a long
run can be resumed.
"""

import importlib.util
import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter (TRITON_INTERPRET=1) compiles nothing", allow_module_level=True)
if "LCW_OPS_RECORDED_LAUNCHES" not in os.environ:
    pytest.skip(
        "LCW_OPS_RECORDED_LAUNCHES names no folder of launches; `make test-slow` records some", allow_module_level=True
    )

import triton
from aot import RECORDED_TARGET
from aot.compiled import EVERY_LAUNCH, remembered
from aot.launching import MAX_SPILLED_BYTES, assert_fits, compiling, kernel_names
from aot.recorded import recorded

from lcw_ops.verification.ahead import launch_again

# Bytes that a thread spills, by the versions of Triton for which every launch was compiled. ptxas spills them by
# itself, far below the limit of 255 registers. They are a few registers, and stay in the first-level cache. The option
# maxnreg=255 or other numbers of warps would avoid them. But the option does not exist for AMD's GPUs, and the numbers
# of warps follow from the tiles, for many more sizes than these. LCW of 33 to 64 samples and odd rows in float32 needs
# more than 255: an address and a mask per element; 16 warps, which have 128, spill too. A launch that is not listed may
# not spill.
KNOWN_SPILLS = {
    "3.6": {
        "lcw_linear_kernel-float32-BLOCK_M=64-BLOCK_N=64-BLOCK_K=32": 32,
        "gmp_linear_kernel-float32-BLOCK_M=8-BLOCK_N=32-BLOCK_K=64": 8,
        "orthogonal_filter_backward_kernel-float32-WIDTH=17-BLOCK_M=4-BLOCK_N=32": 8,
        "orthogonal_filter_backward_kernel-float32-WIDTH=17-BLOCK_M=8-BLOCK_N=32": 8,
        "orthogonal_filter_backward_kernel-float32-WIDTH=20-BLOCK_M=4-BLOCK_N=32": 16,
    },
    "3.7": {
        "lcw_linear_kernel-float32-BLOCK_M=64-BLOCK_N=64-BLOCK_K=32": 32,
        "lcw_rows_kernel-float32-BLOCK=64": 8,
        "orthogonal_filter_backward_kernel-float32-WIDTH=20-BLOCK_M=4-BLOCK_N=32": 8,
        "sweep_kernel-float64-WIDTH=7-BLOCK_M=32-BLOCK_N=8": 8,
    },
}
# The arguments that tell sizes of launches of a kernel apart.
SIZES = ("WIDTH", "LANES", "BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_K")
# Launches that `make test-slow` compiles of each kernel.
MOST_USED = 5
EVERY = recorded(Path(os.environ["LCW_OPS_RECORDED_LAUNCHES"]))


def chosen() -> list[dict]:
    of_kernel = defaultdict(list)
    for launch, _ in EVERY:
        of_kernel[launch["kernel"]].append(launch)
    return [
        launch for launches in of_kernel.values() for launch in (launches if EVERY_LAUNCH else launches[:MOST_USED])
    ]


def compiled_facts(launch: dict) -> dict:
    with compiling(RECORDED_TARGET) as compiled:
        launch_again(launch)
    (one,) = compiled
    return one.facts()


CHOSEN = [pytest.param(launch, id=f"{launch['kernel']}-{number}") for number, launch in enumerate(chosen())]


def name_of(launch: dict) -> str:
    """The kernel, the dtype of its first tensor and its sizes."""
    arguments = launch["arguments"]
    dtype = next(one["dtype"] for one in arguments.values() if isinstance(one, dict))
    sizes = [f"{name}={arguments[name]}" for name in SIZES if name in arguments]
    return "-".join((launch["kernel"], dtype, *sizes))


@pytest.mark.parametrize("launch", CHOSEN)
def test_compiles_without_spills(launch):
    text, name = json.dumps(launch, sort_keys=True), name_of(launch)
    print(name, text)
    version = ".".join(triton.__version__.split(".")[:2])
    # A version that is not listed has not been tuned for.
    most = KNOWN_SPILLS[version].get(name, 0) if version in KNOWN_SPILLS else MAX_SPILLED_BYTES
    assert_fits(RECORDED_TARGET, remembered(f"{RECORDED_TARGET} {text}", lambda: compiled_facts(launch)), most)


def test_every_kernel_was_recorded():
    launches = Counter()
    for launch, count in EVERY:
        launches[launch["kernel"]] += count
    print(len(EVERY), "different launches;", launches)
    assert launches.keys() == kernel_names()
