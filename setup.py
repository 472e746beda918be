"""Builds the two extensions on torch's stable ABI and maps kernels/ and bench/ into the package.

``lcw_ops/_C.abi3.so`` needs a C++ compiler, ``lcw_ops/_C_cuda.abi3.so`` also nvcc. Both are plain shared libraries
without a Python symbol, so one cp310-abi3 wheel serves every Python >= 3.10 and torch >= 2.10. Without a compiler the
package installs as pure Python: slower, but complete.

Environment: CXX; LCW_OPS_CUDA_ARCHS="80;90a;100" (default), or "" to leave CUDA out; LCW_OPS_NO_EXTENSIONS=1 for a
pure-Python install.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
# Folders beside lcw_ops/ that are packages inside it. In the source tree lcw_ops/ has a link to each.
MAPPED = ("kernels", "bench")
# The oldest torch whose stable ABI is used. Every later torch runs the same binary.
STABLE_ABI_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CUDA_ARCHS = "80;90a;100"


def note(message: str) -> None:
    print(f"lcw_ops: {message}", file=sys.stderr)


def find_torch() -> Path | None:
    """torch's folder. Only its headers and libraries are needed, and importing torch would take seconds.

    In pip's isolated build environment torch cannot be imported, but the torch that lcw_ops will run with is in the
    environment's site-packages.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((folder for folder in folders if _torch_version(folder) >= (2, 10)), None)


def _torch_version(folder: Path) -> tuple[int, int]:
    file = folder / "version.py"
    found = re.search(r"__version__ = '(\d+)\.(\d+)", file.read_text()) if file.exists() else None
    return (int(found[1]), int(found[2])) if found else (0, 0)


def cxx() -> list[str] | None:
    """The C++ compiler's command: $CXX with its words, or the one on the path."""
    if "CXX" in os.environ:
        command = shlex.split(os.environ["CXX"])
        if not command or shutil.which(command[0]) is None:
            raise SystemExit(f"lcw_ops: CXX={os.environ['CXX']!r} is not a command; unset it or name a C++ compiler")
        return command
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    return [found] if found else None


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (
        (home and shutil.which(f"{home}/bin/nvcc")) or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    )


def cuda_archs() -> list[str]:
    """The architectures in LCW_OPS_CUDA_ARCHS or, if it is not set, the default ones that this nvcc knows."""
    if "LCW_OPS_CUDA_ARCHS" in os.environ:
        return [arch for arch in os.environ["LCW_OPS_CUDA_ARCHS"].replace(",", ";").split(";") if arch]
    listing = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [arch for arch in CUDA_ARCHS.split(";") if f"compute_{arch.rstrip('a')}" in listing.split()]
    if len(known) < len(CUDA_ARCHS.split(";")):
        note(f"this nvcc does not know all of {CUDA_ARCHS}: building for {';'.join(known) or 'no GPU'}")
    return known


def extensions() -> list[Extension]:
    torch = find_torch()
    if os.environ.get("LCW_OPS_NO_EXTENSIONS") == "1":
        note("LCW_OPS_NO_EXTENSIONS=1: installing without compiled kernels")
        return []
    if torch is None:
        note("no torch >= 2.10 here: installing without compiled kernels. Install torch, then lcw_ops again")
        return []
    if cxx() is None:
        note("no C++ compiler: installing without compiled kernels. Install g++ or clang++, then lcw_ops again")
        return []
    shared = {
        "include_dirs": [str(torch / "include"), str(torch / "include/torch/csrc/api/include"), "csrc"],
        "library_dirs": [str(torch / "lib")],
        "libraries": ["torch_cpu", "c10"],
        "depends": sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
        "py_limited_api": True,
    }
    found = [
        Extension(
            "lcw_ops._C",
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").rglob("*.cpp")),
            **shared,
        )
    ]
    if nvcc() is None:
        note("no nvcc: installing without CUDA kernels")
    elif cuda_archs():
        found.append(
            Extension(
                "lcw_ops._C_cuda", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.cu")), **shared
            )
        )
    return found


class BuildExtension(build_ext):
    """Calls the compilers itself: the libraries contain no Python, and CUDAExtension needs a torch with CUDA."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".abi3.so"

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        objects = Path(self.build_temp) / extension.name
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        compiler = self._nvcc_command() if extension.name.endswith("_cuda") else self._cxx_command()
        includes = [f"-I{folder}" for folder in extension.include_dirs]
        commands, outputs = [], []
        for source in extension.sources:
            outputs.append(str(objects / source.replace("/", "-")) + ".o")
            commands.append([*compiler, *includes, "-c", source, "-o", outputs[-1]])
        self._run_together(commands)
        libraries = [f"-L{folder}" for folder in extension.library_dirs] + [f"-l{name}" for name in extension.libraries]
        linker = [*cxx(), "-Wl,--no-as-needed"]
        if extension.name.endswith("_cuda"):
            # nvcc links its own runtime statically, because the one that torch loaded may be another version. If nvcc
            # is a pip package, it does not find that runtime by itself.
            linker = [nvcc(), "-ccbin", cxx()[0], "-Xlinker", "--no-as-needed", f"-L{Path(nvcc()).parents[1] / 'lib'}"]
            libraries += [f"-L{self._stand_in('libtorch_cuda.so', objects)}", "-ltorch_cuda"]
        self._run_together([[*linker, "-shared", *outputs, *libraries, "-o", str(target)]])

    def _stand_in(self, library: str, folder: Path) -> Path:
        """An empty library of that name to link with. A torch without CUDA has none, and the torch that loads the
        extension later has the symbols."""
        self._run_together([[*cxx(), "-shared", f"-Wl,-soname,{library}", "-o", str(folder / library)]])
        return folder

    def _cxx_command(self) -> list[str]:
        # Functions compiled for AVX-512 use vectors of 512 bits; GCC by itself prefers 256. Nothing here looks at
        # floating-point exceptions, and GCC must know this to vectorise a selection for AVX2.
        wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
        user = os.environ.get("CXXFLAGS", "").split()
        return [
            *cxx(),
            "-std=c++17",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
            "-fno-math-errno",
            "-fno-trapping-math",
            *wide,
            STABLE_ABI_TARGET,
            *user,
        ]

    def _nvcc_command(self) -> list[str]:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_archs()]
        host = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-ccbin", cxx()[0]]
        # Many small kernels for three generations of GPUs: compressed, they take an eighth of the size.
        small = "-Xfatbin=-compress-all"
        return [nvcc(), "-std=c++17", "-O3", "--threads=0", small, *host, *targets, "-DUSE_CUDA", STABLE_ABI_TARGET]

    def _run_together(self, commands: list[list[str]]) -> None:
        running = []
        for command in commands:
            print(" ".join(command), flush=True)
            running.append(subprocess.Popen(command))
        if any(process.wait() for process in running):
            raise SystemExit(
                "lcw_ops: a compiler failed (above). LCW_OPS_CUDA_ARCHS= leaves the CUDA kernels out, "
                "LCW_OPS_NO_EXTENSIONS=1 all of them"
            )


class AnyPythonWheel(bdist_wheel):
    """cp310-abi3 when there is compiled code, py3-none-any when there is none."""

    def finalize_options(self) -> None:
        if self.distribution.has_ext_modules():
            self.py_limited_api = "cp310"
        super().finalize_options()


def packages() -> list[str]:
    """The import names of all folders with an __init__.py, at any depth."""
    mapped = [f"lcw_ops.{package}" for name in MAPPED for package in find_packages(include=[name, f"{name}.*"])]
    # lcw_ops/kernels and lcw_ops/bench are links, for editors and type checkers: the files are packaged once.
    return find_packages(include=["lcw_ops", "lcw_ops.*"], exclude=mapped) + mapped


setup(
    version=re.search(r'__version__ = "(.+)"', (ROOT / "lcw_ops/__init__.py").read_text())[1],
    package_dir={"lcw_ops": "lcw_ops", **{f"lcw_ops.{name}": name for name in MAPPED}},
    packages=packages(),
    package_data={"lcw_ops": ["py.typed"], "lcw_ops.profile": ["page/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": AnyPythonWheel},
)
