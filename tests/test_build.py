"""setup.py makes one abi3 wheel on torch's stable ABI, or a pure-Python wheel where there is no compiler."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lcw_ops

ROOT = Path(__file__).parent.parent
EXTENSIONS = sorted(Path(lcw_ops.__file__).parent.glob("*.abi3.so"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on this machine")
@pytest.mark.skipif(not EXTENSIONS, reason="no extension is built here")
@pytest.mark.parametrize("extension", EXTENSIONS, ids=lambda path: path.name)
def test_only_stable_symbols_are_needed(extension):
    """The extension needs only torch's C shim, libc and libstdc++, so any torch >= 2.10 and Python >= 3.10 load it."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", extension], check=True, capture_output=True, text=True
    ).stdout
    symbols = [line.split()[-1] for line in listing.splitlines() if line.split()[0] == "U"]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    # Symbols with a version belong to libc and the compiler's runtime. A few symbols of the runtime have no version.
    runtime = re.compile(
        r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_|_ZN?K?S[tos]|_GLOBAL_OFFSET_TABLE_|__cpu_|_ITM_|__gmon_start__"
    )
    stable = re.compile(r"aoti_torch_|torch_")
    foreign = [symbol for symbol in symbols if not stable.match(symbol) and not runtime.match(symbol)]
    assert foreign == []


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf on this machine")
@pytest.mark.skipif(not EXTENSIONS, reason="no extension is built here")
@pytest.mark.parametrize("extension", EXTENSIONS, ids=lambda path: path.name)
def test_every_extension_names_the_libraries_it_needs(extension):
    """torch is not in the global symbol scope, so an extension finds only the libraries that it names."""
    listing = subprocess.run(["readelf", "-d", extension], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", listing))
    wanted = {"libtorch_cpu.so", "libtorch_cuda.so"} if "cuda" in extension.name else {"libtorch_cpu.so"}
    assert wanted <= needed
    assert not any(name.startswith("libpython") for name in needed)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the files of a source distribution, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source") / "lcw_ops"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "*.so", "__pycache__", "results")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


TREES = {"lcw_ops": "lcw_ops", "kernels": "lcw_ops/kernels", "bench": "lcw_ops/bench"}


def modules(folder):
    """The paths that a wheel must have for the .py files of this source tree."""
    return {
        f"{target}/{path.relative_to(folder / tree)}"
        for tree, target in TREES.items()
        for path in (folder / tree).rglob("*.py")
    }


def test_every_module_is_packaged_however_deep_it_lies(source, tmp_path):
    """The benchmarks are packaged too: ``pytest --pyargs lcw_ops.bench`` runs them where the package is installed."""
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    for tree in TREES:
        for package in (folder / tree / "new", folder / tree / "new" / "deeper"):
            package.mkdir()
            (package / "__init__.py").touch()
            (package / "module.py").write_text(f"name = {package.name!r}\n")
    wheel, _ = build_wheel(folder, tmp_path / "wheel", LCW_OPS_NO_EXTENSIONS="1")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    expected = modules(folder)
    assert {f"{target}/new/deeper/module.py" for target in TREES.values()} < expected
    assert names == expected


def build_wheel(source, out, **environment):
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-v", "-w", out]
    # Not optimized: the tests only need a wheel that builds and imports.
    environment = {**os.environ, "LCW_OPS_CUDA_ARCHS": "", "CXXFLAGS": "-O0", **environment}
    if "PATH" in environment:
        environment.pop("CXX", None)
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = Path(out).glob("*.whl")
    return wheel, result.stdout + result.stderr


def import_from_wheel(wheel, folder):
    """Do the first thing a user does, from the wheel alone and outside the checkout."""
    zipfile.ZipFile(wheel).extractall(folder)
    code = (
        "import lcw_ops, lcw_ops.kernels, lcw_ops.bench, torch\n"
        "model = lcw_ops.nn.OrthogonalFilterMLP(3, 8, 5, 2)\n"
        "model(torch.randn(4, 3)).sum().backward()\n"
        "print(lcw_ops.__file__, model.weight.grad.isfinite().all().item())\n"
        "print(lcw_ops.info())"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler here")
def test_one_wheel_for_every_python_and_torch(source, tmp_path):
    wheel, _ = build_wheel(source, tmp_path / "wheel")
    assert re.fullmatch(r"lcw_ops-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "lcw_ops/_C.abi3.so" in names
    assert "lcw_ops/kernels/__init__.py" in names
    assert "lcw_ops/bench/__init__.py" in names
    assert "lcw_ops/reference/orthogonal_filter.py" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.startswith("lcw_ops")} == set(), "the wheel installs more than lcw_ops"
    result = import_from_wheel(wheel, tmp_path / "installed")
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout
    assert "True" in result.stdout
    assert "orthogonal_filter on cpu: cpp" in result.stdout


@pytest.mark.parametrize("why", ["no compiler", "on request"])
def test_without_a_compiler_the_install_is_pure_python_and_says_so(why, source, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    environment = (
        {"PATH": str(tools), "CUDA_HOME": str(tools)} if why == "no compiler" else {"LCW_OPS_NO_EXTENSIONS": "1"}
    )
    wheel, log = build_wheel(source, tmp_path / "wheel", **environment)
    assert re.fullmatch(r"lcw_ops-[\d.]+-py3-none-any\.whl", wheel.name)
    assert "lcw_ops: " in log
    assert "installing without compiled kernels" in log
    result = import_from_wheel(wheel, tmp_path / "installed")
    assert result.returncode == 0, result.stderr
    assert "orthogonal_filter on cpu: reference" in result.stdout
    assert "not cpp: _C.abi3.so is not built" in result.stdout


def test_a_compiler_that_is_named_but_not_there_is_refused(source):
    environment = {**os.environ, "CXX": "no-such-compiler -O9"}
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=source, env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "CXX='no-such-compiler -O9' is not a command" in result.stderr


def test_a_failing_compiler_fails_loudly(source, tmp_path):
    """A broken build does not become a pure-Python install."""
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    environment = {**os.environ, "CXX": str(broken), "LCW_OPS_CUDA_ARCHS": ""}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "a compiler failed" in result.stderr
    assert "LCW_OPS_NO_EXTENSIONS=1" in result.stderr


def test_editable_install_maps_kernels_and_bench():
    """kernels/ and bench/ are importable under the package's name, not as top-level packages of their own."""
    code = (
        "import importlib.util, lcw_ops.kernels, lcw_ops.bench, sys\n"
        "print(lcw_ops.kernels.__file__)\n"
        "print(lcw_ops.bench.__file__)\n"
        "for name in sys.argv[1:]: assert importlib.util.find_spec(name), name"
    )
    # Every module is found, however deep it lies; none is imported.
    names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sorted(modules(ROOT))]
    result = subprocess.run([sys.executable, "-c", code, *names], cwd="/", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels, bench = (Path(line) for line in result.stdout.split())
    assert kernels.parent.name == "kernels"
    assert bench.parent.name == "bench"


def test_metadata_asks_for_no_more_than_the_stable_abi_needs():
    metadata = importlib.metadata.metadata("lcw-ops")
    core = {requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement}
    assert core == {"torch>=2.10", "numpy"}
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Version"] == lcw_ops.__version__
