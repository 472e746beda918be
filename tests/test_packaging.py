"""Wheel, source distribution and editable install have each package file once, and tools find it in the source.

In the source tree ``lcw_ops/kernels`` and ``lcw_ops/bench`` are links to the folders beside ``lcw_ops``, so that
editors and type checkers find ``lcw_ops.kernels``. The packages are built from the folders themselves.
"""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = ("kernels", "bench")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree, links as links."""
    folder = tmp_path_factory.mktemp("source") / "lcw_ops"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "*.so", "__pycache__", "results")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    return folder


def run(*command, cwd) -> str:
    environment = {**os.environ, "LCW_OPS_NO_EXTENSIONS": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def installed_files(folder: Path) -> set[str]:
    """The paths that an installed package of this source tree must have."""
    own = {path for path in (folder / "lcw_ops").rglob("*.py") if path.relative_to(folder).parts[1] not in LINKS}
    mapped = {f"lcw_ops/{path.relative_to(folder)}" for name in LINKS for path in (folder / name).rglob("*.py")}
    page = set((folder / "lcw_ops/profile/page").iterdir())
    return {str(path.relative_to(folder)) for path in own | page} | mapped | {"lcw_ops/py.typed"}


def assert_holds_each_file_once(wheel: Path, folder: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")]
    assert Counter(names) == Counter(installed_files(folder))


@pytest.fixture(scope="module")
def source_distribution(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_a_wheel_holds_each_file_once(source, tmp_path):
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-w", tmp_path, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    assert_holds_each_file_once(wheel, source)


def test_a_source_distribution_holds_each_file_once(source, source_distribution):
    with tarfile.open(source_distribution) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in members), "a link would not be unpacked everywhere"
    names = [member.name.partition("/")[2] for member in members]
    assert max(Counter(names).values()) == 1
    assert not any(name.startswith(tuple(f"lcw_ops/{link}/" for link in LINKS)) for name in names)
    expected = {name.replace(f"lcw_ops/{link}/", f"{link}/") for link in LINKS for name in installed_files(source)}
    expected = {name for name in expected if not name.startswith(tuple(f"lcw_ops/{link}/" for link in LINKS))}
    assert expected <= set(names)
    assert {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()} <= set(names)


def test_a_wheel_from_the_source_distribution_holds_each_file_once(source, source_distribution, tmp_path):
    command = ["-m", "pip", "wheel", source_distribution, "--no-build-isolation", "--no-deps", "-w", tmp_path]
    run(sys.executable, *command, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert_holds_each_file_once(wheel, source)


def test_an_editable_install_uses_the_source(source, tmp_path):
    """In a fresh environment that borrows this one's torch."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # .pth files in the outer folder are not read, so an editable install of the outer environment stays out.
    (Path(own) / "outside.pth").write_text(sysconfig.get_path("purelib"))
    install = ["install", "--no-build-isolation", "--no-deps", "-e", source]
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    code = (
        "import lcw_ops, lcw_ops.kernels, lcw_ops.bench.runner, importlib.util, sys\n"
        "for module in (lcw_ops, lcw_ops.kernels, lcw_ops.bench.runner): print(module.__file__)\n"
        # Packages of these names outside lcw_ops must not be hidden.
        "print([name for name in ('kernels', 'bench') if importlib.util.find_spec(name)])"
    )
    *files, hidden = run(python, "-c", code, cwd=tmp_path).splitlines()
    expected = ["lcw_ops/__init__.py", "kernels/__init__.py", "bench/runner.py"]
    assert [Path(file).resolve() for file in files] == [(source / name).resolve() for name in expected]
    assert hidden == "[]"


@pytest.mark.parametrize("name", LINKS)
def test_the_source_tree_has_the_links(name):
    assert (ROOT / "lcw_ops" / name).resolve() == (ROOT / name).resolve()


def test_tools_that_read_the_source_find_every_module():
    """An editor follows ``import lcw_ops.kernels.common`` to ``lcw_ops/kernels/common.py``."""
    folders = ("lcw_ops", *LINKS, "tests")
    for file in (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in names:
                if name.split(".")[0] == "lcw_ops":
                    path = ROOT / name.replace(".", "/")
                    assert (path / "__init__.py").is_file() or path.with_suffix(".py").is_file(), f"{file}: {name}"
