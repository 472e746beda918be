"""``make gpu``: build, test, sanitize and benchmark on this machine's NVIDIA card, with the torch that is installed.

Nothing is downloaded. Each part runs alone too (``make gpu PART=test``) and logs to bench/results/<generation>-<date>-
<part>.log; the benchmarks write a CSV beside it, and so does the part that finds out which kernel is the fastest at
which width. LCW_OPS_GPU_<PART>_SECONDS limits a part. Exit code 1: a part failed.
"""

import datetime
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

# part -> its time limit in seconds, unless the environment gives another.
SECONDS = {"build": 900, "test": 1800, "sanitize": 1800, "bench": 1800, "crossover": 900}

# part -> the modules it imports, by the names pip knows them by where those differ.
_TESTS = ("pytest", "hypothesis", "numpy", "sklearn", "matplotlib", "rich", "setuptools")
MODULES = {
    "build": ("pip", "setuptools"),
    "test": _TESTS,
    "sanitize": _TESTS,
    "bench": ("numpy",),
    "crossover": ("numpy",),
}
PIP_NAMES = {"sklearn": "scikit-learn"}

# A folder of kernels -> what the names of the tests begin with that only its backend has.
PREFIX = {"cuda": "cuda", "kernels": "triton"}

# Under the sanitizer a launch takes a hundred times as long, and these launch the same kernels again.
SAME_KERNELS_AGAIN = "thousand or gradcheck or compile or opcheck or more_elements"

# In front of a command: csrc/cuda's kernels that carry one row each, instead of the fastest.
BY_ROWS = ["env", "LCW_OPS_CUDA_KERNEL=rows"]


def main(arguments: list[str]) -> int:
    wanted = list(SECONDS) if arguments in ([], ["all"]) else arguments
    unknown = [part for part in wanted if part not in SECONDS]
    if unknown:
        return _refuse(f"no part is called {unknown[0]!r}; choose from {', '.join(SECONDS)}, all")
    missing = missing_modules(wanted)
    if missing:
        return _refuse(f"{sys.executable} lacks {', '.join(missing)}; pip install {' '.join(missing)}, or PYTHON=...")
    try:
        import torch
    except ImportError:
        return _refuse(f"{sys.executable} has no torch; choose another interpreter: make gpu PYTHON=...")
    if torch.version.hip or not torch.cuda.is_available():
        return _refuse(f"torch {torch.__version__} sees no NVIDIA card; this needs one, its driver and a CUDA torch")
    major, minor = torch.cuda.get_device_capability()
    print(f"{torch.cuda.get_device_name()}, sm_{major}{minor}, torch {torch.__version__}", flush=True)
    name = f"sm_{major}{minor}-{datetime.date.today()}"
    # Built for this card alone; "a" is what Hopper's own instructions need.
    os.environ.setdefault("LCW_OPS_CUDA_ARCHS", f"{major}{minor}" + "a" * (major == 9))
    RESULTS.mkdir(parents=True, exist_ok=True)
    summary = []
    for part in wanted:
        log = RESULTS / f"{name}-{part}.log"
        limit = float(os.environ.get(f"LCW_OPS_GPU_{part.upper()}_SECONDS", SECONDS[part]))
        start = time.monotonic()
        result = run_part(commands(part, RESULTS / f"{name}.csv"), log, limit)
        summary.append((part, result, f"{time.monotonic() - start:.0f} s", str(log.relative_to(ROOT))))
    print()
    for part, result, seconds, log in summary:
        print(f"{part:9} {result:24} {seconds:>7}  {log}")
    return int(any(result.startswith(("failed", "timed out")) for _, result, *_ in summary))


def missing_modules(parts: list[str]) -> list[str]:
    """What pip must install before these parts can run."""
    needed = dict.fromkeys(module for part in parts for module in MODULES[part])
    return [PIP_NAMES.get(module, module) for module in needed if importlib.util.find_spec(module) is None]


def commands(part: str, csv: Path) -> list[list[str]]:
    """What a part runs, one after the other; nothing when its tool is not there."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-p", "no:cacheprovider"]
    if part == "build":
        pip = [*python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", "."]
        return [pip, [*python, "-c", "import lcw_ops; print(lcw_ops.info())"]]
    if part == "test":
        # Every kernel of csrc/cuda: the one that a width chooses, and the one that takes every width.
        return [[*pytest, "tests"], [*BY_ROWS, *pytest, *tests_of("csrc/cuda/*.cu")]]
    if part == "bench":
        return [[*python, "-m", "lcw_ops.cli", "bench", "--device", "cuda", "--out", str(csv)]]
    if part == "crossover":
        return [[*python, "-m", "lcw_ops.bench.crossover", str(csv.with_name(f"{csv.stem}-crossover.csv"))]]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return []
    watched = [sanitizer, "--error-exitcode=1", "--target-processes=application-only"]
    once = [*pytest, "-k", f"not ({SAME_KERNELS_AGAIN})"]
    of_cuda_alone = [name for name in tests_of("csrc/cuda/*.cu") if "test_cuda_" in name]
    return [
        [*watched, "--tool=memcheck", *once, *tests_of("csrc/cuda/*.cu", "kernels/[!_]*.py")],
        # Between threads that share memory on chip: hand-written in CUDA, the compiler's business in Triton.
        *([*watched, f"--tool={tool}", *pytest, *of_cuda_alone] for tool in ("racecheck", "synccheck")),
    ]


def tests_of(*sources: str) -> list[str]:
    """The test files of these kernels: one idea has one file name everywhere; some are a backend's own."""
    paths = [path for source in sources for path in ROOT.glob(source)]
    names = {f"tests/test_{path.stem}{suffix}.py" for path in paths for suffix in ("", "_op")}
    names |= {f"tests/test_{PREFIX.get(path.parent.name)}_{path.stem}.py" for path in paths}
    return [name for name in sorted(names) if (ROOT / name).exists()]


def run_part(part_commands: list[list[str]], log: Path, limit: float) -> str:
    """Run the commands, on the screen and in ``log``, until one fails or ``limit`` seconds are over: the verdict."""
    if not part_commands:
        log.write_text("skipped: the tool is not installed\n")
        return "skipped, no such tool"
    environment = os.environ | {
        "LCW_OPS_TEST_DEVICE": "cuda",
        "PYTHONUNBUFFERED": "1",
        # A distribution's own Python refuses pip otherwise; an editable install without dependencies replaces nothing.
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
    }
    if any("--tool=memcheck" in command for command in part_commands):
        # One allocation per tensor: inside torch's cached blocks an access out of bounds is not seen.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    end = time.monotonic() + limit
    with log.open("w") as file:
        for command in part_commands:
            code = _run(command, environment, file, end - time.monotonic())
            if code is None:
                return f"timed out after {limit:.0f} s"
            if code != 0:
                return f"failed, exit code {code}"
    return "passed"


def _run(command: list[str], environment: dict[str, str], log, limit: float) -> int | None:
    """The exit code, or None when the time was over; a command is ended together with what it started."""
    log.write(f"$ {' '.join(command)}\n")
    print(f"\n$ {' '.join(command)}", flush=True)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    over = threading.Event()

    def end() -> None:
        over.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(limit, 0), end)
    timer.start()
    try:
        for line in process.stdout:
            log.write(line)
            print(line, end="", flush=True)
        code = process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
    return None if over.is_set() else code


def _refuse(message: str) -> int:
    print(f"make gpu: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
