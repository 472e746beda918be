"""Every CUDA source compiles for every generation setup.py builds for; no GPU is needed, only nvcc.

No kernel may spill more than a few registers. The command is setup.py's own, with ptxas's report of registers, spills
and shared memory printed (pytest -s, or -rP).
"""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
# Bytes per thread: eight registers, which the first-level cache answers. ptxas spills a few at the edge of a launch
# bound (on sm_90a 16 bytes in forward_rows<double>, lately 4 in backward_rows<float>); more means that a kernel's tile
# has outgrown the register file.
MAX_SPILLED_BYTES = 32
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))


@pytest.fixture(scope="module")
def setup_module_of_this_tree():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        spec = importlib.util.spec_from_file_location("lcw_ops_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_for_every_generation(source, setup_module_of_this_tree, tmp_path):
    setup = setup_module_of_this_tree
    if setup.nvcc() is None:
        pytest.skip("no nvcc found (CUDA_HOME, PATH, /usr/local/cuda); `pip install nvidia-cuda-nvcc` brings one")
    torch_headers = setup.find_torch() / "include"
    includes = [f"-I{folder}" for folder in (torch_headers, torch_headers / "torch/csrc/api/include", ROOT / "csrc")]
    compile_command = [*setup.BuildExtension._nvcc_command(None), "-Xptxas=-v", *includes, "-c", str(source)]
    result = subprocess.run([*compile_command, "-o", str(tmp_path / "object.o")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stderr)
    assert "Used" in result.stderr
    assert spilled_too_much(result.stderr) == {}


def spilled_too_much(report: str) -> dict[str, int]:
    """Bytes stored or loaded by spills, whichever are more, of each kernel above the limit; ``report`` is ptxas's."""
    spilled = {}
    kernel = ""
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel = " ".join(entry.groups())
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled[kernel] = max(map(int, spills.groups()))
    return {kernel: count for kernel, count in spilled.items() if count > MAX_SPILLED_BYTES}


def test_spills_are_found():
    report = """ptxas info    : Compiling entry function '{}' for 'sm_90a'
ptxas info    : Function properties for {}
    48 bytes stack frame, {} bytes spill stores, {} bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
"""
    few, many = report.format("few", "few", 16, 32), report.format("many", "many", 16, 40)
    assert spilled_too_much(few + many) == {"many sm_90a": 40}
