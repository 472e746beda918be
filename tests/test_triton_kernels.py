"""Every Triton kernel, compiled ahead of time without a GPU: compiled code must not spill, and its memory must fit.

A stem of kernels/ joins by a file of its name in tests/aot/. Its numbers are tested by tests/test_triton_<stem>.py, on
a GPU or in Triton's interpreter. Registers, shared memory and spills are printed (pytest -s, or -rP).
"""

import importlib
import importlib.util
import itertools
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter does not compile", allow_module_level=True)

import aot
from aot.compiled import chosen_targets, variant_facts
from triton.runtime.jit import JITFunction

from lcw_ops.kernels import common, orthogonal_filter

VARIANTS = [
    pytest.param(variant, target, id=f"{target}-{variant['kernel'].fn.__name__}-{variant['id']}")
    for stem in aot.STEMS
    for variant in importlib.import_module(f"aot.{stem}").VARIANTS
    for target in chosen_targets()
    if target in variant["targets"]
]


@pytest.mark.parametrize(("variant", "target"), VARIANTS)
def test_compiles_without_spills(variant, target):
    facts = variant_facts(variant, target)
    launch = {name: variant["constexprs"].get(name) for name in ("BLOCK_M", "STAGES")} | {"warps": variant["num_warps"]}
    print(f"{target} {variant['kernel'].fn.__name__} {variant['id']} {launch}: {facts}")
    assert facts["spilled"] == 0
    assert facts["shared"] <= variant["shared_memory"]


@pytest.mark.parametrize("stem", aot.STEMS)
def test_every_kernel_has_a_variant(stem):
    module = importlib.import_module(f"lcw_ops.kernels.{stem}")
    kernels = {name for name, value in vars(module).items() if isinstance(value, JITFunction) and "_kernel" in name}
    compiled = {variant["kernel"].fn.__name__ for variant in importlib.import_module(f"aot.{stem}").VARIANTS}
    assert compiled == kernels


def test_tiles_of_the_recurrence():
    """A tile has as few rows as leave every program a multiprocessor. A width that fits no such GPU is refused."""

    def rows_per_tile(width, rows, target, per_layer=1):
        device = aot.DEVICES[target]
        return orthogonal_filter.choose_launch(width, 4, rows, per_layer, 2 - per_layer, False, device)["BLOCK_M"]

    assert [rows_per_tile(64, rows, "sm_90") for rows in (1, 128, 529, 1057, 10**6)] == [4, 4, 8, 16, 16]
    assert [rows_per_tile(128, rows, "sm_90") for rows in (1, 10**6)] == [4, 8]
    assert rows_per_tile(128, 64, "sm_90", per_layer=0) == 2
    assert rows_per_tile(64, 1, "gfx942") == 16
    for device, width, itemsize, rows, per_layer in itertools.product(
        aot.DEVICES.values(), (1, 16, 17, 64, 65, 128), (4, 8), (1, 500, 5000), (0, 1, 2)
    ):
        if width * itemsize <= 512:
            launch = orthogonal_filter.choose_launch(width, itemsize, rows, per_layer, 2 - per_layer, True, device)
            assert launch["BLOCK_N"] >= max(16, width)
            assert launch["num_warps"] in (1, 2, 4, 8, 16)
    with pytest.raises(ValueError, match="needs 132 KB of shared memory for width 128, this GPU has 99"):
        orthogonal_filter.choose_launch(128, 4, 32, 1, 1, False, common.Device(84, 99 * 1024, False))
