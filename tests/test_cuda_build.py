"""Every CUDA source compiles for every generation setup.py builds for; no GPU is needed, only nvcc.

The command is setup.py's own, with ptxas's report of registers, spills and shared memory printed (pytest -s, or -rP).
"""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
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
    report = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'|(Used .*|.*spill stores.*)", result.stderr)
    print("\n".join(" ".join(filter(None, line)).strip() for line in report))
    assert "Used" in result.stderr
