"""Every Triton kernel, compiled ahead of time without a GPU: no register may spill, and the shared memory must fit.

A new file kernels/<stem>.py needs a file tests/aot/<stem>.py. That file lists the variants to compile: a variant is a
kernel with its constants and the types of its arguments. The kernels' results are tested by
tests/test_triton_<stem>.py, on a GPU or in Triton's interpreter. Registers, shared memory and spills are printed
(pytest -s, or -rP).
"""

import importlib
import importlib.util
import itertools
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter (TRITON_INTERPRET=1) compiles nothing", allow_module_level=True)

import aot
import triton
from aot import compiled
from triton.runtime.jit import JITFunction

from lcw_ops.kernels import common, orthogonal_filter

TARGETS = compiled.chosen_targets()
VARIANTS = [
    pytest.param(variant, target, id=f"{target}-{variant['kernel'].fn.__name__}-{variant['id']}")
    for stem in aot.STEMS
    for variant in importlib.import_module(f"aot.{stem}").VARIANTS
    for target in TARGETS
    if target in variant["targets"]
]


# Spilled bytes (AMD: registers), as measured: of Triton 3.7 where ptxas spills of its own accord, far below the limit
# of registers, and of 3.8, on which the kernels have not been tuned yet. No variant may spill more.
KNOWN_SPILLS = {
    "3.7": {
        "sm_80-orthogonal_filter_backward_kernel-64-tf32x3": 24,
        "sm_80-orthogonal_filter_backward_kernel-128": 8,
        "sm_100-orthogonal_filter_backward_kernel-128": 8,
    },
    "3.8": {
        "sm_80-orthogonal_filter_backward_kernel-64-tf32x3": 8,
        "sm_80-orthogonal_filter_backward_kernel-128": 8,
        "sm_100-orthogonal_filter_backward_kernel-128": 8,
        "sm_100-orthogonal_filter_backward_kernel-128-everything-4096-rows": 16,
        "gfx942-orthogonal_filter_kernel-128-everything": 139,
        "gfx942-orthogonal_filter_backward_kernel-128": 396,
        "gfx942-orthogonal_filter_backward_kernel-128-everything-4096-rows": 192,
    },
}.get(".".join(triton.__version__.split(".")[:2]), {})


@pytest.mark.parametrize(("variant", "target"), VARIANTS)
def test_compiles_without_spills(variant, target):
    name = f"{target}-{variant['kernel'].fn.__name__}-{variant['id']}"
    facts = compiled.variant_facts(variant, target)
    launch = {name: variant["constexprs"].get(name) for name in ("BLOCK_M", "STAGES")} | {"warps": variant["num_warps"]}
    print(f"{target} {variant['kernel'].fn.__name__} {variant['id']} {launch}: {facts}")
    assert facts["spilled"] <= KNOWN_SPILLS.get(name, 0)
    assert facts["shared"] <= variant["shared_memory"]


@pytest.mark.parametrize("stem", aot.STEMS)
def test_every_kernel_has_a_variant(stem):
    module = importlib.import_module(f"lcw_ops.kernels.{stem}")
    kernels = {name for name, value in vars(module).items() if isinstance(value, JITFunction) and "_kernel" in name}
    assert {variant["kernel"].fn.__name__ for variant in importlib.import_module(f"aot.{stem}").VARIANTS} == kernels


@pytest.fixture
def new_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "CACHE", tmp_path)
    monkeypatch.setattr(compiled, "EVERY_TARGET", False)
    return tmp_path


def test_a_variant_is_compiled_once(new_cache, monkeypatch):
    """Another variant, changed sources, or a cache file that cannot be read cause a new compilation."""
    made = []

    def ask(key):
        return compiled.remembered(key, lambda: made.append(key) or {"registers": len(made)})

    assert ask("a") == ask("a") == {"registers": 1}
    assert ask("b") == {"registers": 2}
    monkeypatch.setattr(compiled, "SOURCES", "others")
    assert ask("a") == {"registers": 3}
    (entry,) = (new_cache / "others").iterdir()
    entry.write_text("{")
    assert ask("a") == ask("a") == {"registers": 4}
    assert made == ["a", "b", "a", "a"]


def test_changed_sources_are_compiled_for_every_target(new_cache, monkeypatch):
    assert compiled.chosen_targets() == compiled.EVERY_RUN
    monkeypatch.setattr(compiled, "SOURCES", "others")
    # A second run on the changed sources has every target too. Otherwise, it would leave out a variant that failed in
    # the first run.
    assert compiled.chosen_targets() == compiled.chosen_targets() == tuple(compiled.TARGETS)
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "CACHE", new_cache)
    monkeypatch.setattr(compiled, "EVERY_TARGET", True)
    assert compiled.chosen_targets() == tuple(compiled.TARGETS)


def test_tiles_of_the_recurrence():
    """A tile has the fewest rows with which every program gets a multiprocessor of its own, within limits.

    A width whose matrices do not fit in the GPU's shared memory is refused.
    """

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
            assert isinstance(launch["num_warps"], int)
            assert launch["num_warps"] in (1, 2, 4, 8, 16)
    # Shared memory for two matrices of 16 KB in turn, for one and a half, and for no copy.
    memories = (64 * 1024, 48 * 1024, 36 * 1024)
    launches = [orthogonal_filter.choose_launch(64, 4, 1, 1, 1, False, common.Device(84, m, False)) for m in memories]
    assert [launch["STAGES"] for launch in launches] == [3, 2, 1]
    with pytest.raises(ValueError, match=r"width is 128, which needs 132 KB of shared memory.*at most 99 KB"):
        orthogonal_filter.choose_launch(128, 4, 32, 1, 1, False, common.Device(84, 99 * 1024, False))
