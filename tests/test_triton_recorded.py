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

from aot import RECORDED_TARGET
from aot.compiled import EVERY_LAUNCH, remembered
from aot.launching import assert_fits, compiling, kernel_names
from aot.recorded import recorded

from lcw_ops.verification.ahead import launch_again

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


@pytest.mark.parametrize("launch", CHOSEN)
def test_compiles_and_hardly_spills(launch):
    text = json.dumps(launch, sort_keys=True)
    print(text)
    assert_fits(RECORDED_TARGET, remembered(f"{RECORDED_TARGET} {text}", lambda: compiled_facts(launch)))


def test_every_kernel_was_recorded():
    launches = Counter()
    for launch, count in EVERY:
        launches[launch["kernel"]] += count
    print(len(EVERY), "different launches;", launches)
    assert launches.keys() == kernel_names()
