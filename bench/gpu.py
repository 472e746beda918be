"""``make gpu``: build, test, sanitize and benchmark on this machine's NVIDIA card, with the torch that is installed.

Nothing is downloaded. A part (``make gpu PART=smoke``) takes under eight minutes; a process that still runs then is
killed. Each test file has its own process and time limit, so that a crash or a hang costs one file, and a failure does
not stop the rest. Every process writes its log in bench/results/<generation>-<date>-logs while it runs, and a line in
summary.txt there says how it ended. The exit code is 1 if a process failed, was cut off, was not reached in time or
needs a program that is not installed.
"""

import argparse
import ast
import contextlib
import datetime
import difflib
import functools
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TESTS = ROOT / "tests"

# A part stays below eight minutes, including the time to start and to end its processes.
PART_SECONDS = 470
# The time limit of one test file: if it hangs, the other files of the part still have time to run.
FILE_SECONDS = 240
SMOKE_SECONDS = 180

ENVIRONMENT = {
    "LCW_OPS_TEST_DEVICE": "cuda",
    "PYTHONUNBUFFERED": "1",
    # A distribution's own Python would refuse pip, but an editable install without dependencies replaces nothing.
    "PIP_BREAK_SYSTEM_PACKAGES": "1",
    # JAX, a competitor in the benchmarks, would reserve three quarters of the card's memory at its first use.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}

# Tests that memcheck leaves out, by words in their names: they launch kernels that other tests launch too, and under
# the sanitizer a launch takes a hundred times as long.
SAME_KERNELS_AGAIN = "thousand or gradcheck or compile or opcheck or more_elements"

# The number of parts into which the benchmarks of a method (a stem) are split. A case is measured for ten seconds, and
# torch.compile takes another ten, or minutes for long lists of tensors.
BENCH_SHARES = {"gradient_activation": 6}
USUAL_BENCH_SHARES = 3

# Module -> its name for pip, where the two differ.
PIP_NAMES = {"sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Step:
    """One process of a part. Its log is named after ``name``."""

    name: str
    command: list[str]
    seconds: float = PART_SECONDS
    environment: dict[str, str] = field(default_factory=dict)
    # The modules that the step needs besides torch.
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Outcome:
    part: str
    step: str
    result: str
    seconds: float

    @property
    def is_bad(self) -> bool:
        return self.result != "passed"

    def __str__(self) -> str:
        return f"{self.part:30} {self.step:38} {self.result:28} {self.seconds:5.0f} s"


# ---- The plan --------------------------------------------------------------------------------------------------------


def parts(csv: Path) -> dict[str, list[Step]]:
    """Name -> processes, in the order in which they run."""
    files = gpu_tests()
    of_stem = {stem: [path for path in files if _stem(path) == stem] for stem in (*stems(), "other")}
    chooses = [path for stem in _stems_with_a_choice() for path in of_stem[stem] if "triton" not in path.stem]
    plan = {"build": _build(), "smoke": [_smoke()]}
    plan |= {f"test-{stem}": [_test(path) for path in own] for stem, own in of_stem.items() if own}
    # This part runs the kernels of csrc/cuda in which a block handles one row, instead of the fastest ones.
    plan["test-rows"] = [_test(path, environment={"LCW_OPS_CUDA_KERNEL": "rows"}) for path in chooses]
    plan["memcheck"] = [_watched("memcheck", _smoke())]
    plan |= {
        f"memcheck-{stem}": [_watched("memcheck", _test(path, "-k", f"not ({SAME_KERNELS_AGAIN})")) for path in own]
        for stem, own in of_stem.items()
        if own
    }
    # These tools check how threads share on-chip memory. Our CUDA kernels synchronise by hand; Triton's compiler does
    # it for Triton kernels.
    for tool in ("racecheck", "synccheck"):
        for path in files:
            if path.stem.startswith("test_cuda_"):
                plan[f"{tool}-{path.stem.removeprefix('test_cuda_')}"] = [_watched(tool, _test(path))]
    for stem in stems():
        shares = BENCH_SHARES.get(stem, USUAL_BENCH_SHARES)
        plan |= {f"bench-{stem}-{one}": [_bench(stem, f"{one}/{shares}", csv)] for one in range(1, shares + 1)}
    crossover = [sys.executable, "-m", "lcw_ops.bench.crossover", str(csv.with_name(f"{csv.stem}-crossover.csv"))]
    plan["crossover"] = [Step("crossover", crossover, needs=frozenset({"numpy"}))]
    return plan


def select(wanted: list[str], plan: dict[str, list[Step]]) -> dict[str, list[Step]]:
    """The parts that ``wanted`` names: a name, the beginning of several names ("test"), "all", or a test file's path.

    Raises ValueError for a word that is none of these.
    """
    selected = {}
    for word in wanted or ["all"]:
        path = ROOT / word
        if path.suffix == ".py" and path.is_file():
            selected[word] = [_test(path, seconds=PART_SECONDS)]
            continue
        prefixes = {"sanitize": ("memcheck", "racecheck", "synccheck")}.get(word, (word,))
        found = [name for name in plan if word in ("all", name) or name.startswith(tuple(f"{p}-" for p in prefixes))]
        found += [name for name in prefixes if name in plan and name not in found]
        if not found:
            raise ValueError(_unknown_part(word, plan))
        selected |= {name: plan[name] for name in plan if name in found}
    return selected


def _unknown_part(word: str, plan: dict[str, list[Step]]) -> str:
    groups = [*dict.fromkeys(name.partition("-")[0] for name in plan), "sanitize", "all"]
    names = [*dict.fromkeys([*groups, *plan])]
    # The user may have typed the beginning of some names, or misspelled one.
    meant = [name for name in names if name.startswith(word)] or difflib.get_close_matches(word, names, 1, 0.7)
    hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
    return (
        f"no part is called {word!r}{hint or ';'} choose from {', '.join(groups)}, a test file's path, or a part that "
        "--help lists"
    )


def stems() -> list[str]:
    """The methods that have a Triton kernel, by the names of their files in kernels/."""
    return sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py") if path.stem not in ("angles", "common"))


def _stem(path: Path) -> str:
    """The stem that a test file is named after."""
    return max((stem for stem in stems() if stem in path.stem), key=len, default="other")


def _stems_with_a_choice() -> list[str]:
    """The stems that have several kernels in csrc/cuda, one of which LCW_OPS_CUDA_KERNEL chooses."""
    return [
        stem
        for stem in stems()
        if any("LCW_OPS_CUDA_KERNEL" in path.read_text() for path in (ROOT / "csrc/cuda").glob(f"{stem}*.cu"))
    ]


def _build() -> list[Step]:
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", "."]
    info = [sys.executable, "-c", "import lcw_ops; print(lcw_ops.info())"]
    return [Step("build", pip, needs=frozenset({"pip", "setuptools"})), Step("info", info)]


def _smoke() -> Step:
    return Step("smoke", [sys.executable, "-m", "lcw_ops.bench.smoke"], SMOKE_SECONDS, needs=frozenset({"numpy"}))


def _test(path: Path, *options: str, seconds: float = FILE_SECONDS, environment: dict | None = None) -> Step:
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--durations=10", "-p", "no:cacheprovider"]
    command = [*pytest, *options, str(path.relative_to(ROOT))]
    return Step(path.stem, command, seconds, environment or {}, frozenset(imports({path})) | {"pytest"})


def _watched(tool: str, step: Step) -> Step:
    """The step, run under a tool of NVIDIA's sanitizer."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [sanitizer, "--error-exitcode=1", "--target-processes=application-only", f"--tool={tool}"]
    # Without caching, each tensor is its own allocation: memcheck cannot see a wrong access inside a cached block.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    return Step(step.name, [*command, *step.command], PART_SECONDS, step.environment | environment, step.needs)


def _bench(stem: str, share: str, csv: Path) -> Step:
    command = [sys.executable, "-m", "lcw_ops.cli", "bench", stem, "--device", "cuda", "--out", str(csv)]
    return Step("bench", [*command, "--share", share], needs=frozenset({"numpy"}))


# ---- Which test files run on a GPU -----------------------------------------------------------------------------------


@functools.cache
def gpu_tests() -> list[Path]:
    """The test files that use the device of LCW_OPS_TEST_DEVICE; the kernels' own files come first."""
    fixtures = device_fixtures((TESTS / "conftest.py").read_text())
    found = [path for path in TESTS.glob("test_*.py") if uses_device(path.read_text(), fixtures)]
    return sorted(found, key=lambda path: (not path.stem.startswith(("test_cuda_", "test_triton_")), path.stem))


def device_fixtures(conftest: str) -> set[str]:
    """The fixture ``device`` and the fixtures that use it, directly or through others."""
    found = {"device"}
    while (
        more := {
            function.name for function in _functions(conftest) if _is_fixture(function) and _arguments(function) & found
        }
        - found
    ):
        found |= more
    return found


def uses_device(source: str, fixtures: set[str]) -> bool:
    """Whether a file reads LCW_OPS_TEST_DEVICE itself, or a test or fixture in it uses one of these fixtures.

    A file that uses the fixture ``on_the_cpu`` skips all its tests on other devices.
    """
    asked = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            strings = {one.value for one in node.args if isinstance(one, ast.Constant)}
            called = ast.unparse(node.func)
            if called == "os.environ.get" and "LCW_OPS_TEST_DEVICE" in strings:
                return True
            if called == "pytest.mark.usefixtures":
                asked |= strings
    for function in _functions(source):
        if function.name.startswith("test_") or _is_fixture(function):
            asked |= _arguments(function)
    return bool(asked & fixtures) and "on_the_cpu" not in asked


def _functions(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def _arguments(function: ast.FunctionDef) -> set[str]:
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}


def _is_fixture(function: ast.FunctionDef) -> bool:
    return any("fixture" in ast.unparse(decorator) for decorator in function.decorator_list)


def imports(paths: Iterable[Path]) -> set[str]:
    """The packages that these files import at the top, directly or through the tests' own modules.

    torch and lcw_ops are left out. So is Triton: the tests of Triton kernels are skipped if it is not installed.
    """
    waiting, seen, modules = {TESTS / "conftest.py", *paths}, set(), set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for name in _imported(path):
            prefixes = (name, name.rpartition(".")[0] or name, name.split(".")[0])
            own = [TESTS / f"{prefix.replace('.', '/')}.py" for prefix in prefixes]
            local = next((one for one in own if one.is_file()), None)
            if local is None:
                modules.add(name.split(".")[0])
            elif local not in seen:
                waiting.add(local)
    return modules - set(sys.stdlib_module_names) - {"torch", "triton", "lcw_ops"}


@functools.cache
def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # The imported names may be modules of that package.
            names |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
    return names


# ---- Running it ------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    today = datetime.date.today()
    plan = parts(RESULTS / f"GENERATION-{today}.csv")
    args = _parser(plan).parse_args(arguments)
    try:
        selected = select(args.part, plan)
    except ValueError as error:
        return _refuse(str(error))
    if args.dry_run:
        print(describe(selected))
        return 0
    missing = missing_modules(step for steps in selected.values() for step in steps)
    if missing:
        return _refuse(
            f"{sys.executable} lacks {', '.join(missing)}; pip install {' '.join(missing)}, or choose another "
            "interpreter: make gpu PYTHON=..."
        )
    card = find_card()
    if "error" in card:
        return _refuse(card["error"])
    print(f"{card['name']}, sm_{card['generation']}, torch {card['torch']}", flush=True)
    name = f"sm_{card['generation']}-{today}"
    # Build for this card alone.
    os.environ.setdefault("LCW_OPS_CUDA_ARCHS", architecture(card["generation"]))
    return run(select(args.part, parts(RESULTS / f"{name}.csv")), RESULTS / f"{name}-logs")


def architecture(generation: str) -> str:
    """The name for LCW_OPS_CUDA_ARCHS. Some instructions of Hopper (sm_90) exist only under the name sm_90a."""
    return generation + "a" * generation.startswith("9")


def _parser(plan: dict[str, list[Step]]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make gpu, or python bench/gpu.py",
        description=__doc__,
        epilog="parts, in this order:\n  " + "\n  ".join(plan),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "part", nargs="*", help="one of the parts below, the beginning of several (test, memcheck, bench), sanitize, a "
        "test file's path, or all (default)"
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the processes and their time limits, run nothing")
    return parser


def describe(plan: dict[str, list[Step]]) -> str:
    lines = []
    for part, steps in plan.items():
        lines.append(f"{part}, at most {PART_SECONDS} s:")
        for step in steps:
            settings = "".join(f"{name}={value} " for name, value in step.environment.items())
            lines.append(f"  {step.seconds:.0f} s  {settings}{shlex.join(step.command)}")
    return "\n".join(lines)


def missing_modules(steps: Iterable[Step]) -> list[str]:
    """The packages that pip must install before these steps can run."""
    needed = sorted(set().union(*(step.needs for step in steps)))
    return [PIP_NAMES.get(module, module) for module in needed if importlib.util.find_spec(module) is None]


# This runs in its own process: otherwise ``make gpu`` itself would hold some of the card's memory while its steps run.
_FIND_CARD = """
import torch
if torch.version.hip or not torch.cuda.is_available():
    print(torch.__version__)
else:
    print(torch.__version__, "%d%d" % torch.cuda.get_device_capability(), torch.cuda.get_device_name(), sep="\\n")
"""


def find_card() -> dict[str, str]:
    """Return torch's version, the card's generation and name, or an error."""
    found = subprocess.run([sys.executable, "-c", _FIND_CARD], capture_output=True, text=True)
    if found.returncode != 0:
        lines = found.stderr.strip().splitlines() or ["no message"]
        return {
            "error": f"{sys.executable} has no torch that can be imported ({lines[-1]}); choose another interpreter: "
            "make gpu PYTHON=..."
        }
    version, *rest = found.stdout.splitlines()
    if not rest:
        return {"error": f"torch {version} sees no NVIDIA card; expected a card, its driver and a CUDA build of torch"}
    return {"torch": version, "generation": rest[0], "name": rest[1]}


def run(plan: dict[str, list[Step]], folder: Path) -> int:
    """Run every step, even after a failure, and print a summary. Returns 0 if all passed, else 1."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    # On SIGTERM, for example from a time limit on this command, still end the running process and print the summary.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for part, steps in plan.items():
            run_part(part, steps, folder, outcomes.append)
    except KeyboardInterrupt:
        print("\nended from outside", flush=True)
        outcomes.append(Outcome("-", "-", "the rest was not reached", 0))
    finally:
        signal.signal(signal.SIGTERM, before)
    bad = [outcome for outcome in outcomes if outcome.is_bad]
    print("\n" + "\n".join(map(str, outcomes)))
    print(f"\n{len(outcomes) - len(bad)} passed, {len(bad)} did not; logs in {folder}", flush=True)
    return int(bool(bad))


def run_part(part: str, steps: list[Step], folder: Path, report: Callable[[Outcome], None]) -> None:
    end = time.monotonic() + PART_SECONDS
    for step in steps:
        start = time.monotonic()
        log = folder / f"{part.replace('/', '-')}.{step.name}.log"
        print(f"{part}: {step.name}, log {log.name}", flush=True)
        try:
            result = _run_step(step, log, min(step.seconds, end - start))
        except KeyboardInterrupt:
            _record(folder, Outcome(part, step.name, "ended from outside", time.monotonic() - start), report)
            raise
        _record(folder, Outcome(part, step.name, result, time.monotonic() - start), report)


def _record(folder: Path, outcome: Outcome, report: Callable[[Outcome], None]) -> None:
    """Report and record the outcome at once, because a later step may end this process."""
    now = datetime.datetime.now().isoformat(timespec="seconds")
    with (folder / "summary.txt").open("a") as file:
        file.write(f"{now} {outcome}\n")
    print(f"  {outcome.result}, {outcome.seconds:.0f} s", flush=True)
    report(outcome)


def _run_step(step: Step, log: Path, limit: float) -> str:
    """Run one step and return the verdict. Its process appends to the log, which an earlier run may have begun."""
    if limit <= 0:
        return "not reached in time"
    if shutil.which(step.command[0]) is None:
        return f"not installed: {Path(step.command[0]).name}"
    with log.open("a") as file:
        settings = "".join(f"{name}={value} " for name, value in step.environment.items())
        now = datetime.datetime.now().isoformat(timespec="seconds")
        print(f"\n===== {now}, at most {limit:.0f} s\n$ {settings}{shlex.join(step.command)}", file=file, flush=True)
        begin = file.tell()
        # The process gets its own session, so that it can be killed together with its children.
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | step.environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        verdict = {None: f"timed out after {limit:.0f} s", 0: "passed"}.get(code, f"failed, exit code {code}")
        print(f"===== {verdict}", file=file)
    if code != 0:
        print("".join(f"    {line}\n" for line in _tail(log, begin)), end="", flush=True)
    return verdict


def _end(process: subprocess.Popen) -> None:
    """Kill the process and its children, if any are left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, begin: int, lines: int = 25) -> list[str]:
    with log.open(errors="replace") as file:
        file.seek(begin)
        return file.read().splitlines()[-lines:]


def _refuse(message: str) -> int:
    print(f"make gpu: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
