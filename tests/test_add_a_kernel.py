"""docs/add-a-kernel.md: its listings, added to a copy of the package as it says, are a kernel that passes its tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import pages
from support.pages import ROOT, Block

PAGE = ROOT / "docs/add-a-kernel.md"
BLOCKS = pages.blocks(PAGE)
FILES: dict[str, Block] = {block.comment("file"): block for block in BLOCKS if block.comment("file")}


def test_the_listings_are_the_files_of_the_table():
    text = PAGE.read_text()
    assert len(FILES) == 10
    for name in FILES:
        assert f"`{name}`" in text, name
        assert not (ROOT / name).exists(), "the toy is not part of the package"
    assert {f"`{name}`" for name in FILES if not name.startswith("tests/")} <= set(re.findall(r"`[\w/.]+`", text))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".py")])
def test_a_listing_is_python(name):
    block = FILES[name]
    compile("\n" * (block.line - 1) + block.text, str(PAGE), "exec")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path}: {old!r} is there {text.count(old)} times"
    path.write_text(text.replace(old, new))


def export(path: Path, line: str, name: str) -> None:
    """One import, one entry in ``__all__``."""
    edit(path, "__all__ = [\n", f'{line}\n\n__all__ = [\n    "{name}",\n')


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the repository with the toy in it, and its C++ kernel compiled by the page's command."""
    tree = tmp_path_factory.mktemp("toy") / "lcw_ops"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "*.so", "__pycache__", "results")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    for name, block in FILES.items():
        (tree / name).write_text(block.text)
    export(
        tree / "lcw_ops/reference/__init__.py",
        "from lcw_ops.reference.row_mean import remove_row_mean",
        "remove_row_mean",
    )
    export(
        tree / "lcw_ops/functional/__init__.py",
        "from lcw_ops.functional.row_mean import remove_row_mean",
        "remove_row_mean",
    )
    export(tree / "lcw_ops/nn/__init__.py", "from lcw_ops.nn.row_mean import RemoveRowMean", "RemoveRowMean")
    ops = tree / "lcw_ops/ops/__init__.py"
    edit(ops, "    parallel_depth,\n    weight_norm,\n", "    parallel_depth,\n    row_mean,\n    weight_norm,\n")
    edit(ops, '    "parallel_depth",\n', '    "parallel_depth",\n    "row_mean",\n')
    edit(
        tree / "bench/arguments.py", '"parallel_depth", "weight_norm")', '"parallel_depth", "row_mean", "weight_norm")'
    )
    (entry,) = [block for block in BLOCKS if block.text.startswith('    "remove_row_mean": Op(')]
    edit(tree / "tests/test_contract.py", "OPS = {\n", f"OPS = {{\n{entry.text}")
    compile_kernel(tree)
    return tree


def compile_kernel(tree: Path) -> None:
    """Compile the toy alone: the other kernels are those of the tests, and the toy's library is loaded beside them."""
    sources = tree / "csrc/cpu"
    for path in sources.rglob("*.cpp"):
        if path.name != "row_mean.cpp":
            path.unlink()
    (command,) = [line for block in BLOCKS for line in block.text.splitlines() if "build_ext" in line]
    variable, python, *arguments = command.split()
    assert (variable, python) == ("LCW_OPS_CUDA_ARCHS=", "python")
    run(tree, *arguments, LCW_OPS_CUDA_ARCHS="")
    (tree / "lcw_ops/_C.abi3.so").rename(tree / "lcw_ops/_row_mean.abi3.so")
    for path in (ROOT / "lcw_ops").glob("*.so"):
        (tree / "lcw_ops" / path.name).symlink_to(path)
    edit(
        tree / "lcw_ops/ops/__init__.py",
        "load_extensions()\n",
        'load_extensions()\nimport torch\n\ntorch.ops.load_library(__path__[0] + "/../_row_mean.abi3.so")\n',
    )


def run(tree: Path, *arguments: str, **variables: str) -> str:
    path = os.pathsep.join([str(tree), str(tree / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "LCW_OPS_CACHE_DIR": "", **variables}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return result.stdout


def passed(output: str) -> int:
    return int(re.search(r"(\d+) passed", output)[1])


@pytest.mark.slow
def test_the_kernel_passes_the_listed_tests(tree):
    assert passed(run(tree, "-m", "pytest", "-x", "-q", "-n", "0", "tests/test_row_mean_op.py")) == 40


@pytest.mark.slow
def test_the_kernel_passes_them_on_portable_code(tree):
    arguments = ("-m", "pytest", "-x", "-q", "-n", "0", "tests/test_row_mean_op.py")
    assert passed(run(tree, *arguments, LCW_OPS_CPU_CAPABILITY="portable")) == 40


@pytest.mark.slow
def test_the_triton_kernel_passes_its_tests_in_the_interpreter(tree):
    arguments = ("-m", "pytest", "-x", "-q", "-n", "0", "tests/test_triton_row_mean.py")
    assert passed(run(tree, *arguments, TRITON_INTERPRET="1", LCW_OPS_TEST_DEVICE="cpu")) == 16


@pytest.mark.slow
def test_the_triton_variants_compile(tree):
    assert (
        passed(run(tree, "-m", "pytest", "-x", "-q", "-n", "0", "tests/test_triton_kernels.py", "-k", "row_mean")) > 0
    )


@pytest.mark.slow
def test_the_op_passes_the_contract(tree):
    assert passed(run(tree, "-m", "pytest", "-x", "-q", "-n", "0", "tests/test_contract.py", "-k", "row_mean")) > 5


@pytest.mark.slow
def test_the_layer_calls_the_function(tree):
    code = "import torch; from lcw_ops import nn; print(nn.RemoveRowMean(0.5)(torch.tensor([[1.0, 3.0]])).tolist())"
    assert run(tree, "-c", code) == "[[0.0, 2.0]]\n"


@pytest.mark.slow
def test_the_benchmark_times_it(tree, tmp_path):
    arguments = ("-m", "lcw_ops.cli", "bench", "row_mean", "--quick", "--out", str(tmp_path / "rows.csv"))
    run(tree, *arguments)
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert any("row_mean" in row and "lcw_ops (cpp)" in row for row in rows[1:])
