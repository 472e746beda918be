"""Run the C++ for the CPU under GCC's sanitizers, in minutes: ``python tests/sanitize/harness.py`` (make sanitize).

setup.py builds the package into a folder of its own, with the sanitizer's flags. The tests run on it with the
sanitizer's runtime loaded first:
- address and undefined behaviour, for every instruction set (on a processor without AVX-512, pairs of AVX2 instructions
  run the tiles of AVX-512): sizes, kinds, memory layouts, and every op on sizes near those of all tiles (calls.py);
- threads: the barriers of threads that share rows. This sanitizer cannot see torch's OpenMP pool, so loops run on
  std::thread instead (threads.cpp).

broken.cpp, in the same library, makes mistakes on purpose, and every one must be caught.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PROOF = ROOT / "tests/test_orthogonal_filter_proof.py"
CALLS = HERE / "calls.py"

MEMORY = "address,undefined"
THREADS = "thread"
RUNTIMES = {MEMORY: ("libasan.so", "libubsan.so", "libstdc++.so"), THREADS: ("libtsan.so", "libstdc++.so")}

# Python frees little before it ends, so leaks are not reported. Any other report ends the process with this status.
CAUGHT = 66
OPTIONS = {
    "ASAN_OPTIONS": f"detect_leaks=0:exitcode={CAUGHT}",
    "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={CAUGHT}",
    "TSAN_OPTIONS": f"halt_on_error=1:exitcode={CAUGHT}",
}

# The mistakes of broken.cpp that each sanitizer must catch.
MISTAKES = {MEMORY: range(1, 9), THREADS: (9,)}

# Portable kernels do not fuse multiply-adds, and no compiler fuses them unless it optimizes. For a fair comparison,
# these settings keep eager torch and its matrix products from fusing them too.
EAGER_WITHOUT_FMA = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}

# Tests in PROOF: accesses outside the arguments, any options and layouts, every remainder of rows and units.
MEMORY_TESTS = "nothing_but_the_arguments or any_call or every_row_count or every_width or every_kind"
THREAD_TESTS = "same_bits_twice"


def why_not(sanitizers: str) -> str | None:
    """Why the sanitizers cannot run here, or None."""
    if shutil.which("g++") is None:
        return "this machine has no g++; the sanitizers are GCC's"
    missing = [name for name in RUNTIMES[sanitizers] if not _runtime(name).is_absolute()]
    return f"this g++ comes without {', '.join(missing)}" if missing else None


def _runtime(name: str) -> Path:
    """The path of g++'s copy of this library; the bare name if g++ does not have it."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
    return Path(found.strip())


def build(folder: Path, sanitizers: str, optimize: str, without: Iterable[str] = ()) -> Path:
    """Build the package with a sanitized ``_C.abi3.so``, leaving out some ops. Returns the folder for PYTHONPATH."""
    source, package = folder / "source", folder / "package"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "*.so", "__pycache__", "results")
    shutil.copytree(ROOT, source, ignore=ignored)
    for stem in without:
        path = source / "csrc/cpu" / stem
        shutil.rmtree(path) if path.is_dir() else path.with_suffix(".cpp").unlink()
    shutil.copy(HERE / "broken.cpp", source / "csrc/cpu")
    if sanitizers == THREADS:
        shutil.copy(HERE / "threads.cpp", source / "csrc/cpu")
    watched = f"g++ -g -fno-omit-frame-pointer -fsanitize={sanitizers}"
    if sanitizers == MEMORY:
        watched += " -fno-sanitize-recover=all"
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", package, "--build-temp", folder / "objects"]
    # On a processor without AVX-512, run the tiles of AVX-512 as pairs of AVX2 instructions, so that they are tested.
    wide = "" if torch.backends.cpu.get_cpu_capability() == "AVX512" else " -DLCW_AVX512_BY_AVX2"
    environment = {**os.environ, "CXX": watched, "CXXFLAGS": optimize + wide, "LCW_OPS_CUDA_ARCHS": ""}
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the sanitized build failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return package


def run(package: Path, sanitizers: str, arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """``python arguments`` on the sanitized package."""
    environment = {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": " ".join(str(_runtime(name)) for name in RUNTIMES[sanitizers]),
        "PYTHONPATH": str(package),
        **environment,
    }
    # Do not run in the checkout, whose lcw_ops would be imported instead.
    return subprocess.run(
        [sys.executable, *arguments], cwd=package, env=environment, capture_output=True, text=True, timeout=3000
    )


def run_tests(package: Path, sanitizers: str, selection: str, **environment: str) -> subprocess.CompletedProcess:
    """On the sanitized package, run the tests in PROOF that ``selection`` names."""
    arguments = ["-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", str(PROOF), "-k", selection]
    proof = {"LCW_OPS_PROOF_SANITIZED": "1"}
    return run(package, sanitizers, arguments, **proof, **EAGER_WITHOUT_FMA, **environment)


# Each mistake runs in a child, because the first finding ends the process. Forking avoids importing torch each time.
MAKE_MISTAKES = """
import ctypes, os, sys, torch, lcw_ops
from pathlib import Path
library = ctypes.CDLL(str(Path(lcw_ops.__file__).parent / "_C.abi3.so"))
library.lcw_ops_broken.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int64]
tensor = torch.ones(64)
for mistake in map(int, sys.argv[1:]):
    child = os.fork()
    if not child:
        library.lcw_ops_broken(mistake, tensor.data_ptr(), 64)
        os._exit(0)
    print(mistake, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def make_mistakes(package: Path, sanitizers: str, mistakes: Iterable[int]) -> tuple[dict[int, int], str]:
    """({mistake: exit status of the process that made it}, all reports). Mistake 0 of broken.cpp is correct code."""
    result = run(package, sanitizers, ["-c", MAKE_MISTAKES, *map(str, mistakes)])
    if result.returncode:
        raise RuntimeError(f"the sanitized package does not run:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return {int(mistake): int(status) for mistake, status in map(str.split, result.stdout.splitlines())}, result.stderr


def main() -> None:
    """Run everything on every instruction set of this processor. Exits with status 1 at the first finding."""
    jobs = [(MEMORY, "-O1", MEMORY_TESTS, ("", "avx2", "portable")), (THREADS, "-O1", THREAD_TESTS, ("", "portable"))]
    for sanitizers, optimize, selection, capabilities in jobs:
        if reason := why_not(sanitizers):
            raise SystemExit(f"{sanitizers}: {reason}")
        with tempfile.TemporaryDirectory() as folder:
            print(f"{sanitizers}: building ...", flush=True)
            package = build(Path(folder), sanitizers, optimize)
            found, _ = make_mistakes(package, sanitizers, [0, *MISTAKES[sanitizers]])
            if found != {0: 0, **dict.fromkeys(MISTAKES[sanitizers], CAUGHT)}:
                raise SystemExit(f"{sanitizers}: broken.cpp: unexpected exit status; for each mistake: {found}")
            for capability in capabilities:
                result = run_tests(package, sanitizers, selection, LCW_OPS_CPU_CAPABILITY=capability)
                summary = result.stdout.strip().splitlines()[-1:]
                print(f"{sanitizers}, {capability or 'fastest'}: {' '.join(summary)}", flush=True)
                if result.returncode:
                    raise SystemExit(result.stdout[-8000:] + result.stderr[-8000:])
                if sanitizers == MEMORY:
                    result = run(
                        package, sanitizers, [str(CALLS)], LCW_OPS_CPU_CAPABILITY=capability, LCW_OPS_CACHE_DIR=""
                    )
                    print(f"{sanitizers}, {capability or 'fastest'}: {result.stdout.strip()}", flush=True)
                    if result.returncode:
                        raise SystemExit(result.stdout[-8000:] + result.stderr[-8000:])


if __name__ == "__main__":
    main()
