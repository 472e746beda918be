"""csrc/cuda without a GPU: the kernels are compiled as C++ against an emulator of threads, barriers and clusters.

cuda_emulator/ is to CUDA what the interpreter is to Triton: it shows wrong indices, wrong sums, missing barriers and
deadlocks. ``make gpu`` runs the same tests on a GPU.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EMULATOR = Path(__file__).parent / "cuda_emulator"
COMPILER = shutil.which("g++")
STEMS = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
# Two warps behave like eight, and chunks of 32 columns like chunks of 128 on nets four times as wide.
SMALLER = {"block_threads": 64, "consumer_warps": 2, "chunk_columns": 32}


def emulated_sources(folder: Path) -> None:
    """Copy csrc with the emulator's device.h, the CPU's dispatch key, and smaller blocks."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(EMULATOR / "device.h", folder / "csrc/cuda/device.h")
    for path in (folder / "csrc/cuda").iterdir():
        source = path.read_text().replace("LIBRARY_IMPL(lcw_ops, CUDA, m)", "LIBRARY_IMPL(lcw_ops, CPU, m)")
        source = re.sub(r".*DeviceGuard guard.*\n", "", source)
        # Through this variable a test says that the step counters are on the GPU.
        source = source.replace("!steps[0].is_cpu()", 'emulated_number("LCW_OPS_EMULATED_STEPS_ON_GPU", 0) != 0')
        for constant, value in SMALLER.items():
            source = re.sub(rf"constexpr int {constant} = \d+;", f"constexpr int {constant} = {value};", source)
        path.write_text(source)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")
def test_kernels_under_the_emulator(stem, tmp_path):
    """Run the tests in a process of their own, where the ops' CUDA overloads run on the CPU."""
    emulated_sources(tmp_path)
    source, library = tmp_path / f"csrc/cuda/{stem}.cu", tmp_path / "emulated.so"
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    if stem == "gradient_activation":
        # These tests have tensors that begin at any address. A GPU faults on a vector that is not aligned to its size;
        # a CPU reads it, unless this sanitizer stops it.
        flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    includes = [f"-I{folder}" for folder in (EMULATOR, torch_folder / "include")]
    links = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([COMPILER, *flags, *includes, "-x", "c++", source, *links, "-o", library], check=True)
    environment = os.environ | {"LCW_OPS_EMULATED_LIBRARY": str(library), "LCW_OPS_TEST_DEVICE": "cpu"}
    tests = Path(__file__).with_name(f"test_cuda_{stem}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
