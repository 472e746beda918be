"""The plan of ``make gpu``: its parts, their processes with time limits, and the test files that run on a GPU.

The parts come in the order of their value. The first ones, up to and with ``bench-first``, are meant for someone who
has a card for half an hour. The minutes are estimates: no GPU has run the plan yet.
"""

import ast
import difflib
import functools
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
# Files that git ignores, and that a second run finds again.
KEPT = ROOT / "build" / "gpu"

# A part stays below eight minutes, including the time to start and to end its processes.
PART_SECONDS = 470
# The time limit of one test file: if it hangs, the other files of the part still have time to run.
FILE_SECONDS = 240
SMOKE_SECONDS = 180
# The time limits of one case of the part bench-first, and of one op under a sanitizer.
CASE_SECONDS = 150
WATCHED_SECONDS = 240

# The tests in this file call every public function on every backend, and so have a part of their own.
CONTRACT = "test_contract"

# The most important benchmarks: the stem, and a text that the names of the chosen cases contain.
FIRST_CASES = (
    ("orthogonal_filter", "over depth, forward + backward, L=50000"),
    ("orthogonal_filter", "over time, forward + backward, T=10000 M=64 N=128"),
    ("lcw_linear", "forward + backward, M=8 in=4096"),
    ("hypersphere", "GmP linear, forward + backward, M=8 in=4096"),
    ("weight_norm", "weight norm linear, forward + backward, M=8 in=4096"),
    ("gradient_activation", "arctan in place, 1000 of 100,000, tensors=1000 total=100000000, float32"),
    ("gradient_activation", "AdamW, arctan, 1000 of 100,000"),
)

# The number of parts into which the benchmarks of a method (a stem) are split. A case is measured for ten seconds, and
# torch.compile takes another ten, or minutes for long lists of tensors.
BENCH_SHARES = {"gradient_activation": 6}
USUAL_BENCH_SHARES = 3

# Module -> its name for pip, where the two differ.
PIP_NAMES = {"sklearn": "scikit-learn"}

# The beginning of a part's name -> estimated minutes. Where several fit, the longest counts.
MINUTES = {
    "build": 2.0,
    "compile": 6.0,
    "smoke": 1.0,
    "verify": 6.0,
    "test-": 4.0,
    "test-orthogonal_filter": 6.0,
    "bench-": 7.0,
    "bench-first": 6.0,
    "memcheck": 7.0,
    "racecheck": 4.0,
    "synccheck": 4.0,
    "crossover": 7.0,
}


@dataclass(frozen=True)
class Step:
    """One process of a part. Its log is named after ``name``."""

    name: str
    command: list[str]
    seconds: float = PART_SECONDS
    environment: dict[str, str] = field(default_factory=dict)
    # The modules that the step needs besides torch.
    needs: frozenset[str] = frozenset()
    # A file or folder that the step makes. Without it, a step that has passed runs again.
    makes: Path | None = None
    # Whether the step runs again although it has passed: it looks itself for the work that is left.
    repeats: bool = False
    # The file beside the log that gets the standard output; without a name, the log gets it.
    output: str | None = None
    # The tools that are played by others, for the log; empty: none.
    faked: str = ""


# ---- The plan --------------------------------------------------------------------------------------------------------


def parts(csv: Path, card: str = "{}") -> dict[str, list[Step]]:
    """Name -> processes, in the order in which they run. ``card`` describes the card in JSON for the part compile."""
    files = gpu_tests()
    of_stem = {stem: [path for path in files if _stem(path) == stem] for stem in (*stems(), "other")}
    contract = [path for path in of_stem["other"] if path.stem == CONTRACT]
    of_stem["other"] = [path for path in of_stem["other"] if path.stem != CONTRACT]
    chooses = [path for stem in _stems_with_a_choice() for path in of_stem[stem] if "triton" not in path.stem]
    tests = {f"test-{stem}": [_test(path) for path in own] for stem, own in of_stem.items() if own}
    first = "test-orthogonal_filter"
    plan = {"build": _build(), "compile": [_compile(card)], "smoke": [_smoke()], "verify": _verify()}
    plan |= {first: tests.pop(first), "bench-first": [_first_case(*case, csv) for case in FIRST_CASES]}
    plan |= tests
    plan |= {"test-contract": [_test(path, seconds=PART_SECONDS) for path in contract]}
    # This part runs the kernels of csrc/cuda in which a block handles one row, instead of the fastest ones.
    plan["test-rows"] = [_test(path, environment={"LCW_OPS_CUDA_KERNEL": "rows"}) for path in chooses]
    # Under the sanitizer a launch takes a hundred times as long, so it watches the small calls of the smoke test.
    plan |= {f"memcheck-{stem}": [_watched("memcheck", _smoke(stem))] for stem in stems()}
    # These tools check how threads share on-chip memory. Our CUDA kernels synchronise by hand; Triton's compiler does
    # it for Triton kernels.
    for tool in ("racecheck", "synccheck"):
        plan[tool] = [_watched(tool, _smoke(stem, "cuda")) for stem in _stems_of_cuda()]
    for stem in stems():
        shares = BENCH_SHARES.get(stem, USUAL_BENCH_SHARES)
        plan |= {
            f"bench-{stem}-{one}": [_bench(stem, csv, "--share", f"{one}/{shares}")] for one in range(1, shares + 1)
        }
    crossover = [sys.executable, "-m", "lcw_ops.bench.crossover", str(csv.with_name(f"{csv.stem}-crossover.csv"))]
    plan["crossover"] = [Step("crossover", crossover, needs=frozenset({"numpy"}))]
    return plan


def minutes(part: str) -> float:
    """The estimated minutes of a part."""
    found = max((name for name in MINUTES if part.startswith(name)), key=len, default=None)
    # A test file that was named on the command line.
    return MINUTES[found] if found else 4.0


def select(wanted: list[str], plan: dict[str, list[Step]]) -> dict[str, list[Step]]:
    """The parts that ``wanted`` names: a name, the beginning of several names ("test"), "all", or a test file's path.

    "first" stands for all parts up to bench-first. Raises ValueError for a word that is none of these.
    """
    selected = {}
    order = list(plan)
    for word in wanted or ["all"]:
        path = ROOT / word
        if path.suffix == ".py" and path.is_file():
            selected[word] = [_test(path, seconds=PART_SECONDS)]
            continue
        if word == "first":
            found = order[: order.index("bench-first") + 1]
        else:
            prefixes = {"sanitize": ("memcheck", "racecheck", "synccheck")}.get(word, (word,))
            found = [
                name for name in plan if word in ("all", name) or name.startswith(tuple(f"{p}-" for p in prefixes))
            ]
            found += [name for name in prefixes if name in plan and name not in found]
        if not found:
            raise ValueError(_unknown_part(word, plan))
        selected |= {name: plan[name] for name in plan if name in found}
    return selected


def _unknown_part(word: str, plan: dict[str, list[Step]]) -> str:
    groups = [*dict.fromkeys(name.partition("-")[0] for name in plan), "sanitize", "first", "all"]
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
    # parallel_depth.py and parallel_depth_fused.py are one method.
    others = ("angles", "common", "parallel_depth_fused")
    return sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py") if path.stem not in others)


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


def _stems_of_cuda() -> list[str]:
    """The stems that have a kernel in csrc/cuda."""
    return [stem for stem in stems() if any((ROOT / "csrc/cuda").glob(f"{stem}*.cu"))]


def _build() -> list[Step]:
    # Without pip, nothing but setuptools is needed: setup.py calls the compilers itself, and neither ninja nor wheel is
    # asked for. Every step finds the package in this source tree.
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    needs = {"setuptools"} | ({"wheel"} if _is_old_setuptools() else set())
    info = [sys.executable, "-c", "import lcw_ops; print(lcw_ops.info())"]
    # Without nvcc, setup.py builds the C++ kernels alone. Then the step runs again, when nvcc may be there.
    extension = ROOT / "lcw_ops/_C_cuda.abi3.so"
    return [Step("build", build, needs=frozenset(needs), makes=extension), Step("info", info, CASE_SECONDS)]


def _is_old_setuptools() -> bool:
    """Whether setuptools is older than 70.1, which brought its own bdist_wheel."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, re.findall(r"\d+", version)[:2])) < (70, 1)


def _compile(card: str) -> Step:
    command = [sys.executable, "-m", "lcw_ops.verification.ahead", "--card", card]
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or KEPT / "triton")
    return Step("compile", [*command, "--seconds", str(PART_SECONDS - 20)], needs=frozenset({"triton"}), makes=cache)


def _smoke(stem: str | None = None, backend: str | None = None) -> Step:
    options = [*(["--stem", stem] if stem else []), *(["--backend", backend] if backend else [])]
    command = [sys.executable, "-m", "lcw_ops.bench.smoke", *options]
    return Step(f"smoke-{stem}" if stem else "smoke", command, SMOKE_SECONDS, needs=frozenset({"numpy"}))


def _verify() -> list[Step]:
    """One process for each stem, so that a run that was cut goes on with the next stem; then the verdicts in JSON."""
    verify = [sys.executable, "-m", "lcw_ops.cli", "verify", "--device", "cuda", "--resume"]
    steps = [Step(f"verify-{stem}", [*verify, "--ops", stem], FILE_SECONDS, repeats=True) for stem in stems()]
    # Every kernel has its verdicts by now, so this process only reads them.
    return [*steps, Step("verdicts", [*verify, "--json"], FILE_SECONDS, output="verdicts.json", repeats=True)]


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
    seconds = PART_SECONDS if tool == "memcheck" else WATCHED_SECONDS
    return Step(step.name, [*command, *step.command], seconds, step.environment | environment, step.needs)


def _bench(stem: str, csv: Path, *options: str) -> Step:
    command = [sys.executable, "-m", "lcw_ops.cli", "bench", stem, "--device", "cuda", "--out", str(csv)]
    return Step("bench", [*command, *options], needs=frozenset({"numpy"}))


def _first_case(stem: str, case: str, csv: Path) -> Step:
    step = _bench(stem, csv, "--case", case)
    words = re.findall(r"[A-Za-z]+", case.partition(",")[0])
    number = [one for one in FIRST_CASES if one[0] == stem].index((stem, case)) + 1
    return Step(f"{stem}-{number}-{'-'.join(words)}", step.command, CASE_SECONDS, needs=step.needs)


def describe(plan: dict[str, list[Step]], commands: bool = True) -> str:
    """The parts with estimated minutes, and with their sum so far; with ``commands`` also the processes."""
    lines, so_far = [], 0.0
    for part, steps in plan.items():
        so_far += minutes(part)
        lines.append(f"{part:28} about {minutes(part):2.0f} min, {so_far:4.0f} so far, at most {PART_SECONDS} s")
        for step in steps if commands else ():
            settings = "".join(f"{name}={value} " for name, value in step.environment.items())
            faked = f"  (FAKED: {step.faked})" if step.faked else ""
            lines.append(f"  {step.seconds:.0f} s  {settings}{shlex.join(step.command)}{faked}")
    return "\n".join(lines)


def missing(step: Step) -> str | None:
    """Why the step cannot run with this interpreter, or None."""
    absent = sorted(module for module in step.needs if importlib.util.find_spec(module) is None)
    if absent:
        names = " ".join(PIP_NAMES.get(module, module) for module in absent)
        return f"needs {names}, which {sys.executable} does not have"
    if shutil.which(step.command[0]) is None:
        return f"not installed: {Path(step.command[0]).name}"
    return None


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
            places = [prefix.replace(".", "/") for prefix in prefixes]
            own = [TESTS / name for place in places for name in (f"{place}.py", f"{place}/__init__.py")]
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
