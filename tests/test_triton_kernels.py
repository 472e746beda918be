"""Every Triton kernel without a GPU: compiled ahead of time for four generations, and run in Triton's interpreter.

A kernel joins by being listed in its module's ``AOT_VARIANTS`` and by being tested in tests/test_triton_<stem>.py, or
in tests/test_<stem>_op.py for all backends at once. Compiled code must not spill and its shared memory must fit;
registers, shared memory and spills are printed (pytest -s, or -rP).
"""

import importlib
import importlib.util
import itertools
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from lcw_ops import kernels

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels cannot be compiled in the interpreter's process", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

orthogonal_filter = importlib.import_module("lcw_ops.kernels.orthogonal_filter")

STEMS = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__))
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# A variant says which targets it is for when its tile depends on them.
VARIANTS = [
    pytest.param(variant, target, id=f"{target}-{variant['kernel'].fn.__name__}-{variant['id']}")
    for stem in STEMS
    for variant in importlib.import_module(f"lcw_ops.kernels.{stem}").AOT_VARIANTS
    for target in variant.get("targets", TARGETS)
]


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    """A compilation answered from the user's cache would prove nothing about this compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_variant(variant: dict, target: GPUTarget):
    kernel = variant["kernel"]
    signature = variant["signature"] | dict.fromkeys(variant["constexprs"], "constexpr")
    # What the launcher finds out about a pointer from torch's allocator: it is a multiple of 16.
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in variant["aligned"]}
    source = ASTSource(kernel, signature, variant["constexprs"], attributes)
    return triton.compile(source, target=target, options={"num_warps": variant["num_warps"]})


def cuda_resources(cubin: bytes, folder: Path) -> dict[str, int]:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report))
    return {
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]) + int(usage["LOCAL"]),
        "static_shared": int(usage["SHARED"]),
    }


def hip_resources(assembly: str) -> dict[str, int]:
    usage = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly))
    return {
        "registers": int(usage["vgpr_count"]),
        "spilled": int(usage["vgpr_spill_count"]) + int(usage["sgpr_spill_count"]),
    }


def resources_of(index: int) -> dict[str, int]:
    variant, target = VARIANTS[index].values
    compiled = compile_variant(variant, TARGETS[target])
    if "cubin" in compiled.asm:
        with tempfile.TemporaryDirectory() as folder:
            resources = cuda_resources(compiled.asm["cubin"], Path(folder))
    else:
        resources = hip_resources(compiled.asm["amdgcn"])
    return resources | {"shared": compiled.metadata.shared}


@pytest.fixture(scope="module")
def compiled(fresh_cache, request):
    """Each variant's resources, by its place in VARIANTS: the compiler takes one core, so one process for each core."""
    chosen = [item.callspec.params["index"] for item in request.session.items if "compiled" in item.fixturenames]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        futures = {index: pool.submit(resources_of, index) for index in chosen}
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=[parameter.id for parameter in VARIANTS])
def test_compiles_without_spills(index, compiled):
    variant, target = VARIANTS[index].values
    resources = compiled[index].result()
    launch = {name: variant["constexprs"].get(name) for name in ("BLOCK_M", "STAGES")} | {"warps": variant["num_warps"]}
    print(f"{target} {variant['kernel'].fn.__name__} {variant['id']} {launch}: {resources}")
    assert resources["spilled"] == 0
    assert resources["shared"] <= variant.get("shared_memory", 48 * 1024)


def test_tiles_of_the_recurrence():
    """As few rows as leave every program a multiprocessor; what fits on no GPU of that kind is refused by name."""
    devices = orthogonal_filter.AOT_DEVICES

    def rows_per_tile(width, rows, target, per_layer=1):
        launch = orthogonal_filter.choose_launch(width, 4, rows, per_layer, 2 - per_layer, False, devices[target])
        return launch["BLOCK_M"]

    assert [rows_per_tile(64, rows, "sm_90") for rows in (1, 128, 529, 1057, 10**6)] == [4, 4, 8, 16, 16]
    assert [rows_per_tile(128, rows, "sm_90") for rows in (1, 10**6)] == [4, 8]
    assert rows_per_tile(128, 64, "sm_90", per_layer=0) == 2
    assert rows_per_tile(64, 1, "gfx942") == 16
    for target, width, itemsize, rows, per_layer in itertools.product(
        devices, (1, 16, 17, 64, 65, 128), (4, 8), (1, 500, 5000), (0, 1, 2)
    ):
        if width * itemsize <= 512:
            launch = orthogonal_filter.choose_launch(
                width, itemsize, rows, per_layer, 2 - per_layer, True, devices[target]
            )
            assert launch["BLOCK_N"] >= max(16, width)
            assert launch["num_warps"] in (1, 2, 4, 8, 16)
    with pytest.raises(ValueError, match="needs 132 KB of shared memory for width 128, this GPU has 99"):
        orthogonal_filter.choose_launch(128, 4, 32, 1, 1, False, orthogonal_filter.Device(84, 99 * 1024, False))


@pytest.mark.parametrize("stem", STEMS)
def test_in_the_interpreter(stem):
    """The op's own tests with the triton backend; a process of its own, for Triton decides when it is imported."""
    folder = Path(__file__).parent
    tests = [str(path) for path in (folder / f"test_triton_{stem}.py", folder / f"test_{stem}_op.py") if path.exists()]
    command = [sys.executable, "-m", "pytest", *tests, "-k", "triton", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "LCW_OPS_TEST_DEVICE": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d+ passed", result.stdout)
    print(result.stdout.splitlines()[-1])
