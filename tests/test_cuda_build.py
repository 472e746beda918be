"""Every CUDA source compiles for every GPU generation that setup.py builds for. No GPU is needed, only nvcc.

No kernel may spill more than a few registers. The command is setup.py's own, with the option for ptxas's report. The
registers, spills and static shared memory of each kernel are printed (pytest -s, or -rP).
"""

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
# In bytes per thread. 32 bytes are eight registers, and spills of that size stay in the first-level cache. ptxas spills
# a few registers if a kernel needs slightly more than its launch bound leaves (on sm_90a 16 bytes in
# forward_rows<double> and 4 in backward_rows<float>). More spills mean that a kernel's tile has outgrown the register
# file.
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
    kernels = usage(result.stderr)
    print_table(kernels)
    assert {kernel.generation for kernel in kernels} == {f"sm_{arch}" for arch in setup.cuda_archs()}
    assert [kernel for kernel in kernels if kernel.spilled > MAX_SPILLED_BYTES] == []


@dataclass(frozen=True)
class Usage:
    """The report of ptxas on a kernel. The bytes spilled are the larger of those stored and those loaded."""

    name: str
    generation: str
    registers: int
    spilled: int
    shared: int


def usage(report: str) -> list[Usage]:
    found = []
    name = generation = ""
    spilled = 0
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name, generation = entry.groups()
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = max(map(int, spills.groups()))
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found.append(Usage(name, generation, int(used[1]), spilled, int(shared[1]) if shared else 0))
    return found


def print_table(kernels: list[Usage]) -> None:
    names = "\n".join(kernel.name for kernel in kernels)
    if shutil.which("c++filt"):
        names = subprocess.run(["c++filt", "-p"], input=names, capture_output=True, text=True, check=True).stdout
    for name, kernel in sorted(zip(names.splitlines(), kernels, strict=True), key=lambda row: row[0]):
        resources = f"{kernel.registers:3} registers, {kernel.spilled:2} bytes spilled, {kernel.shared} bytes shared"
        print(f"{kernel.generation:8} {resources}  {name.replace('lcw_ops::', '')}")


def test_the_report_is_read():
    report = """ptxas info    : Compiling entry function 'few' for 'sm_90a'
ptxas info    : Function properties for few
    48 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
ptxas info    : Compiling entry function 'many' for 'sm_80'
ptxas info    : Function properties for many
    48 bytes stack frame, 40 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
"""
    assert usage(report) == [Usage("few", "sm_90a", 128, 32, 0), Usage("many", "sm_80", 32, 40, 2048)]
