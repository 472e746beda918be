"""The cases of bench/registry.py under pytest-benchmark: ``pytest bench/ --benchmark-only``.

It measures the quick sizes and prints one row per competitor. LCW_OPS_TEST_DEVICE names the device. A competitor whose
result is wrong fails before it is timed.
"""

import os

import pytest
import torch

from lcw_ops.bench import registry

DEVICE = torch.device(os.environ.get("LCW_OPS_TEST_DEVICE", "cpu"))
WORK = [
    pytest.param(case, competitor, id=f"{case.stem}-{case.name}-{competitor.name}")
    for stem in registry.STEMS
    for case in registry.cases(stem, DEVICE.type)
    if case.quick
    for competitor in case.competitors
    if not competitor.slow_start
]


@pytest.mark.parametrize(("case", "competitor"), WORK)
def test_speed(case, competitor, benchmark):
    if reason := competitor.missing():
        pytest.skip(reason)
    for error in registry.check(case, DEVICE, [competitor]).values():
        if isinstance(error, registry.WrongResult):
            raise error
    run = competitor.prepare(case.make_inputs(DEVICE))

    def finished() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = f"{case.stem}: {case.name}"
    benchmark.pedantic(finished, warmup_rounds=1, rounds=3)
