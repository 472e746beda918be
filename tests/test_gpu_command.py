"""The command behind ``make gpu``, without a GPU: its plan, its runner, its fakes, and its smoke test on the CPU."""

import ast
import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from lcw_ops.bench import gpu, gpu_fakes, gpu_plan, gpu_runner, registry, smoke
from lcw_ops.bench.gpu_plan import Step
from lcw_ops.ops import backends

ROOT = Path(__file__).parent.parent
PLAN = gpu_plan.parts(Path("rows.csv"))
STEPS = [(part, step) for part, steps in PLAN.items() for step in steps]


def files_in(step: Step) -> list[str]:
    return [word for word in step.command if word.startswith("tests/")]


# ---- The plan --------------------------------------------------------------------------------------------------------


def test_every_gpu_test_has_a_process_of_its_own():
    run = [files_in(step) for part, step in STEPS if part.startswith("test-") and part != "test-rows"]
    assert all(len(files) == 1 for files in run)
    assert sorted(files[0] for files in run) == sorted(f"tests/{path.name}" for path in gpu_plan.gpu_tests())
    assert not any(len(files_in(step)) > 1 for _, step in STEPS)
    assert len({(part, step.name) for part, step in STEPS}) == len(STEPS)


def test_the_order_and_the_time_of_parts():
    """The first half hour has a build, the compiled kernels, both proofs, the recurrence's tests and the first rows."""
    first = list(gpu_plan.select(["first"], PLAN))
    assert first == ["build", "compile", "smoke", "verify", "test-orthogonal_filter", "bench-first"]
    assert list(PLAN)[: len(first)] == first
    assert sum(map(gpu_plan.minutes, first)) <= 30
    assert gpu_plan.PART_SECONDS < 8 * 60
    assert all(step.seconds <= gpu_plan.PART_SECONDS for _, step in STEPS)
    assert all(0 < gpu_plan.minutes(part) < 8 for part in PLAN)
    # Then tests, sanitizers and benchmarks.
    kinds = [part.partition("-")[0] for part in list(PLAN)[len(first) :]]
    assert list(dict.fromkeys(kinds)) == ["test", "memcheck", "racecheck", "synccheck", "bench", "crossover"]
    assert kinds == sorted(kinds, key=list(dict.fromkeys(kinds)).index)


def test_the_first_benchmarks_exist():
    """Each text selects one or two cases in full size, so the step ends within its limit."""
    for stem, text in gpu_plan.FIRST_CASES:
        chosen = [case for case in registry.cases(stem, "cuda") if text in case.label and not case.quick]
        assert len(chosen) == 1, (stem, text, [case.label for case in chosen])


def test_every_kernel_is_verified():
    steps = [step.command for step in PLAN["verify"]]
    assert [command[-1] for command in steps] == [*gpu_plan.stems(), "--json"]
    assert all("--resume" in command for command in steps)
    assert PLAN["verify"][-1].output == "verdicts.json"


def test_every_benchmark_is_measured_whole():
    """The shares of a method's benchmarks add up to all of them, and every method of the registry has benchmarks."""
    shares = {}
    for part, step in STEPS:
        if part.startswith("bench-") and part != "bench-first":
            shares.setdefault(step.command[step.command.index("bench") + 1], []).append(step.command[-1])
    assert set(shares) == set(registry.STEMS)
    for own in shares.values():
        assert own == [f"{number}/{len(own)}" for number in range(1, len(own) + 1)]


def test_the_sanitizer_watches_the_small_calls_of_every_kernel():
    """memcheck watches the smoke test of every method; the others only kernels that synchronise by hand."""
    by_tool = {}
    for part, step in STEPS:
        if part.startswith(("memcheck", "racecheck", "synccheck")):
            assert f"--tool={part.partition('-')[0]}" in step.command
            assert "lcw_ops.bench.smoke" in step.command
            stem = step.command[step.command.index("--stem") + 1]
            by_tool.setdefault(part.partition("-")[0], set()).add((stem, step.command[-1] == "cuda"))
    cuda = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    with_kernels = {stem for stem in gpu_plan.stems() if any(name.startswith(stem) for name in cuda)}
    assert by_tool["memcheck"] == {(stem, False) for stem in smoke.OPS_OF}
    assert by_tool["racecheck"] == by_tool["synccheck"] == {(stem, True) for stem in with_kernels}
    memcheck = [step for part, step in STEPS if part.startswith("memcheck")]
    assert all(step.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" for step in memcheck)


def test_every_op_has_a_stem():
    assert sorted(op for ops in smoke.OPS_OF.values() for op in ops) == sorted(backends.IMPLEMENTED)
    assert sorted(smoke.OPS_OF) == gpu_plan.stems() == sorted(registry.STEMS)


def test_the_kernels_of_rows_have_a_part():
    assert {step.environment["LCW_OPS_CUDA_KERNEL"] for step in PLAN["test-rows"]} == {"rows"}
    files = [word for step in PLAN["test-rows"] for word in files_in(step)]
    assert "tests/test_cuda_orthogonal_filter.py" in files
    assert not any("triton" in file or "gradient_activation" in file for file in files)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["smoke"], ["smoke"]),
        (["test"], [part for part in PLAN if part.startswith("test-")]),
        (["sanitize"], [part for part in PLAN if part.startswith(("memcheck", "racecheck", "synccheck"))]),
        (["memcheck"], [part for part in PLAN if part.startswith("memcheck")]),
        (["first"], ["build", "compile", "smoke", "verify", "test-orthogonal_filter", "bench-first"]),
        (["bench-lcw_linear"], ["bench-lcw_linear-1", "bench-lcw_linear-2", "bench-lcw_linear-3"]),
        (["smoke", "build"], ["smoke", "build"]),
        ([], list(PLAN)),
        (["all"], list(PLAN)),
        (["tests/test_triton_hypersphere.py"], ["tests/test_triton_hypersphere.py"]),
    ],
)
def test_parts_by_name(wanted, expected):
    assert list(gpu_plan.select(wanted, PLAN)) == expected


# ---- Which files run on a GPU ----------------------------------------------------------------------------------------


def test_the_rule_agrees_with_pytest(request):
    """A file of this run is selected if its tests ask for ``device``, directly or through another fixture."""
    selected = set(gpu_plan.gpu_tests())
    for path in {item.path for item in request.session.items}:
        fixtures = {name for item in request.session.items if item.path == path for name in item.fixturenames}
        if path.parent == ROOT / "tests" and "device" in fixtures:
            assert (path in selected) == ("on_the_cpu" not in fixtures), path


def test_every_file_that_makes_tensors_on_a_gpu_is_chosen():
    """A test file that makes tensors on "cuda" is one that make gpu runs."""
    assert makes_cuda_tensors('x = torch.ones(3, device="cuda:1")')
    assert makes_cuda_tensors("y = x.cuda()")
    assert not makes_cuda_tensors("y = x.to(device)")
    chosen = {path.name for path in gpu_plan.gpu_tests()}
    for path in (ROOT / "tests").glob("test_*.py"):
        source = path.read_text()
        if makes_cuda_tensors(source) and path.name not in chosen:
            raise AssertionError(f"{path.name} makes tensors on a GPU, but make gpu does not run it")


def makes_cuda_tensors(source: str) -> bool:
    """Whether a call of this source is given device="cuda", or is tensor.cuda() or torch.device("cuda")."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        named = [one.value for one in node.keywords if one.arg == "device"]
        if any(isinstance(one, ast.Constant) and str(one.value).startswith("cuda") for one in named):
            return True
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda" and not node.args:
            return True
    return False


def test_a_chosen_file_is_not_skipped_on_a_gpu():
    """In a process whose device is a GPU, the chosen files have tests; with a driver's error, but not with a skip."""
    paths = [str(path) for path in gpu_plan.gpu_tests() if "triton" not in path.stem and "cuda" not in path.stem]
    code = (
        "import sys, pytest\n"
        "class Count:\n"
        "    def pytest_collection_modifyitems(self, items):\n"
        "        self.files = {item.path.name for item in items}\n"
        "count = Count()\n"
        "pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *sys.argv[1:]], plugins=[count])\n"
        "print('FILES', *sorted(count.files))\n"
    )
    environment = os.environ | {"LCW_OPS_TEST_DEVICE": "cuda"}
    result = subprocess.run([sys.executable, "-c", code, *paths], env=environment, capture_output=True, text=True)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("FILES ")]
    assert line.split()[1:] == sorted(Path(path).name for path in paths), result.stdout[-2000:]


def test_gpu_files_of_this_tree():
    """Every kernel's own file and the contract are chosen. Builds, emulators and files that compile are not."""
    names = {path.stem for path in gpu_plan.gpu_tests()}
    sources = {path.stem: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    kernels = {
        name for name, source in sources.items() if name.startswith("test_triton_") and "import_kernels(" in source
    }
    kernels |= {f"test_cuda_{path.stem}" for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert kernels
    assert names >= kernels | {"test_contract", "test_orthogonal_filter"}
    assert not {name for name in names if name.endswith("_cpp") or "emulated" in name or "build" in name}
    compiling = {name for name, source in sources.items() if "from aot" in source}
    assert len(compiling) > 3
    assert not names & (compiling | {"test_gpu_command", "test_orthogonal_filter_proof"})


CONFTEST = """
@pytest.fixture
def device(): ...
@pytest.fixture
def on_top(made_there): ...
@pytest.fixture(autouse=False)
def made_there(device): ...
@pytest.fixture
def unrelated(tmp_path): ...
def helper(device): ...
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def test_x(device): ...", True),
        ("def test_x(on_top): ...", True),
        ("class TestX:\n    def test_x(self, made_there): ...", True),
        ("pytestmark = [pytest.mark.usefixtures('made_there')]\ndef test_x(): ...", True),
        ("DEVICE = torch.device(os.environ.get('LCW_OPS_TEST_DEVICE', 'cpu'))\ndef test_x(): ...", True),
        ("@pytest.fixture\ndef own(device): ...\ndef test_x(own): ...", True),
        ("def run(device): ...\ndef test_x(unrelated): ...", False),
        ("ENVIRONMENT = os.environ | {'LCW_OPS_TEST_DEVICE': 'cpu'}\ndef test_x(): ...", False),
        ("'''LCW_OPS_TEST_DEVICE'''\ndef test_x(): ...", False),
        (
            "pytestmark = pytest.mark.usefixtures('on_the_cpu')\n"
            "@pytest.fixture\ndef on_the_cpu(device): ...\ndef test_x(device): ...",
            False,
        ),
    ],
)
def test_which_files_use_the_device(source, expected):
    fixtures = gpu_plan.device_fixtures(CONFTEST)
    assert fixtures == {"device", "made_there", "on_top"}
    assert gpu_plan.uses_device(source, fixtures) is expected


def test_modules_that_the_tests_need():
    """The sources of tests, of the tests' own modules and of commands are searched, so nobody has to keep a list."""
    assert gpu_plan.imports([ROOT / "tests/test_cuda_gradient_activation.py"]) == {"numpy", "pytest"}
    assert "hypothesis" in gpu_plan.imports([ROOT / "tests/test_orthogonal_filter_proof.py"])
    for path in gpu_plan.gpu_tests():
        assert gpu_plan.imports([path]) <= {"numpy", "pytest"}, "README names what make gpu needs"


# ---- The runner ------------------------------------------------------------------------------------------------------


def run(plan: dict[str, list[Step]], folder: Path, **options) -> int:
    """Run a plan with its record in ``folder``."""
    return gpu_runner.run(plan, folder, gpu_runner.History(folder, "key", kept=folder / "kept"), **options)


def step(name: str, code: str, seconds: float = 60, **environment: str) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds, environment)


FAILING = {
    "first": [
        step("good", "import os; print('on', os.environ['LCW_OPS_TEST_DEVICE'], os.environ['OWN'])", OWN="mine"),
        step("bad", "print('so far so good', flush=True); raise SystemExit(3)"),
        Step("absent", ["/no/such/sanitizer", "--tool=memcheck"]),
        step("slow", "import time; print('begun', end='', flush=True); time.sleep(60)", seconds=3),
        step("last", "import os; print(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'])"),
    ],
    "second": [step("good", "print('second')")],
}


def test_failures_do_not_stop_the_rest(tmp_path, capsys):
    assert run(FAILING, tmp_path) == 1
    text = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert "on cuda mine" in text["first.good.log"]
    assert "failed, exit code 3" in text["first.bad.log"]
    assert "begun" in text["first.slow.log"]
    assert "false" in text["first.last.log"]
    assert "second" in text["second.good.log"]
    results = [line.split(maxsplit=3)[1:] for line in text["summary.txt"].splitlines()]
    assert [(part, name) for part, name, _ in results] == [
        (part, one.name) for part in FAILING for one in FAILING[part]
    ]
    assert [result.rsplit(maxsplit=2)[0].strip() for *_, result in results] == [
        "passed",
        "failed, exit code 3",
        "not installed: sanitizer",
        "timed out after 3 s",
        "passed",
        "passed",
    ]
    printed = capsys.readouterr().out
    assert "so far so good" in printed
    assert "3 passed, 3 did not" in printed


def test_success_is_exit_code_0_and_logs_are_kept(tmp_path):
    plan = {"part": [step("good", "print('once')")]}
    assert [run(plan, tmp_path), run(plan, tmp_path, again=True)] == [0, 0]
    assert (tmp_path / "part.good.log").read_text().splitlines().count("once") == 2
    assert len((tmp_path / "summary.txt").read_text().splitlines()) == 2


def test_what_has_passed_on_these_sources_is_left_out(tmp_path, capsys):
    """A failed process runs again, and so does one whose product is gone, or that passed on other sources."""
    product = tmp_path / "product"
    makes = dataclasses.replace(step("makes", f"open({str(product)!r}, 'a').write('x')"), makes=product)
    plan = {"part": [step("good", "print('good')"), step("bad", "raise SystemExit(1)"), makes]}
    folder = tmp_path / "sm_90-today-logs"

    def ran(key: str = "key", folder: Path = folder, kept: Path = tmp_path / "kept") -> list[str]:
        gpu_runner.run(plan, folder, gpu_runner.History(folder, key, kept))
        return [line.split()[1].rstrip(",") for line in capsys.readouterr().out.splitlines() if ", log " in line]

    assert ran() == ["good", "bad", "makes"]
    assert ran() == ["bad"]
    product.unlink()
    assert ran() == ["bad", "makes"]
    assert ran("other sources") == ["good", "bad", "makes"]
    # Logs of another day, or brought from another machine, beside which there is no record of this one.
    assert ran(folder=tmp_path / "sm_90-tomorrow-logs", kept=tmp_path / "fresh") == ["bad"]
    assert ran(folder=tmp_path / "elsewhere/logs", kept=tmp_path / "fresher") == ["good", "bad", "makes"]


def test_verification_runs_again_although_it_has_passed(tmp_path):
    """Its verdicts belong to one card, which the record of passed steps does not know."""
    history = gpu_runner.History(tmp_path, "key", tmp_path)
    for repeats in (False, True):
        one = dataclasses.replace(step("one", ""), repeats=repeats)
        history.add(gpu_runner.Outcome("part", "one", "passed", 1.0))
        passed = gpu_runner.History(tmp_path, "key", tmp_path).passed("part", one)
        assert (passed is None) == repeats
    assert all(one.repeats for one in gpu_plan._verify())


def test_a_step_that_failed_after_it_had_passed_runs_again(tmp_path):
    good, key = step("good", ""), "key"
    for result, expected in (("passed", True), ("failed, exit code 1", False), ("passed", True)):
        gpu_runner.History(tmp_path, key, kept=tmp_path / "kept").add(gpu_runner.Outcome("part", "good", result, 1.0))
        history = gpu_runner.History(tmp_path, key, kept=tmp_path / "kept")
        assert (history.passed("part", good) is not None) == expected


def test_a_record_with_half_a_line_is_read(tmp_path):
    line = {"key": "key", "time": "then", "part": "part", "step": "good", "result": "passed"}
    (tmp_path / gpu_runner.RECORD).write_text(json.dumps(line) + '\n[1]\n{"key": 1}\n{"key": "ke')
    history = gpu_runner.History(tmp_path, "key", kept=tmp_path / "kept")
    assert history.passed("part", step("good", "")) == "then"
    assert history.passed("part", step("other", "")) is None
    history.add(gpu_runner.Outcome("part", "other", "passed", 1.0))
    again = gpu_runner.History(tmp_path, "key", kept=tmp_path / "fresh")
    assert [again.passed("part", step(name, "")) is None for name in ("good", "other")] == [False, False]


def test_a_killed_run_goes_on_with_the_process_that_was_cut(tmp_path):
    """Nothing can be written after SIGKILL, so the record is written after every process."""
    code = (
        "from pathlib import Path; from lcw_ops.bench import gpu_plan, gpu_runner; import sys\n"
        "steps = [gpu_plan.Step('one', [sys.executable, '-c', 'print(1)'])]\n"
        "waits = 'import time; print(2, flush=True); time.sleep(300)'\n"
        "steps += [gpu_plan.Step('two', [sys.executable, '-c', waits])]\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "history = gpu_runner.History(folder, 'key', folder / 'kept')\n"
        "assert history.open() is None\n"
        "gpu_runner.run({'part': steps}, folder, history)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    log, end = tmp_path / "part.two.log", time.monotonic() + 60
    while not (log.exists() and "\n2\n" in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    child = children_of(process.pid)
    process.kill()
    process.communicate()
    (pid,) = child
    reason = gpu_runner.History(tmp_path, "key", tmp_path / "kept").open()
    assert reason is not None, "the step still runs, and would disturb another run"
    assert reason.endswith(f"kill -9 -- -{pid}")
    os.killpg(pid, signal.SIGKILL)
    assert not keeps_running(pid)
    assert gpu_runner.History(tmp_path, "key", tmp_path / "kept").open() is None
    history = gpu_runner.History(tmp_path, "key", kept=tmp_path / "fresh")
    assert history.passed("part", step("one", "")) is not None
    assert history.passed("part", step("two", "")) is None


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    reason = gpu_runner.History(tmp_path / "file/logs", "key", kept=tmp_path).open()
    assert reason is not None
    assert reason.startswith(f"cannot write {tmp_path / 'file'}")
    assert "--out" in reason


def test_a_build_without_nvcc_runs_again():
    """setup.py then builds the C++ kernels alone, and succeeds."""
    build, _ = PLAN["build"]
    assert build.makes is not None
    assert build.makes.name == "_C_cuda.abi3.so"


def children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_sources_key_follows_every_source(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_runner, "ROOT", tmp_path)
    for name in ("setup.py", "pyproject.toml", "kernels/one.py", "csrc/cuda/two.cu", "docs/page.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    of_other_triton = mock.patch.object(importlib.metadata, "version", return_value="0.0")
    before = gpu_runner.sources_key("sm_90")
    with of_other_triton:
        assert gpu_runner.sources_key("sm_90") != before
    assert gpu_runner.sources_key("sm_90") == before != gpu_runner.sources_key("sm_100")
    (tmp_path / "docs/page.md").write_text("after")
    assert gpu_runner.sources_key("sm_90") == before
    for name in ("setup.py", "kernels/one.py", "csrc/cuda/two.cu"):
        (tmp_path / name).write_text("after")
        after = gpu_runner.sources_key("sm_90")
        assert after != before
        before = after


def test_a_step_without_its_needs_says_so_and_the_others_go_on(tmp_path, capsys):
    lacks = dataclasses.replace(step("lacks", "print()"), needs=frozenset({"no_such_module", "sklearn", "os"}))
    plan = {"first": [lacks, Step("absent", ["/no/such/nvcc"])], "second": [step("good", "print()")]}
    assert run(plan, tmp_path) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("cannot run: first: needs no_such_module")
    assert "cannot run: first: not installed: nvcc\n" in printed
    assert printed.index("cannot run") < printed.index("second: good")
    results = [line.split()[3] for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert results == ["needs", "not", "passed"]
    # Nothing was lost for good: it runs when the module is there.
    assert gpu_runner.History(tmp_path, "key", kept=tmp_path / "kept").passed("first", lacks) is None


def test_the_output_of_a_step_may_have_a_file(tmp_path):
    code = "import sys; print('[]'); print('progress', file=sys.stderr)"
    plan = {"part": [dataclasses.replace(step("verdicts", code), output="verdicts.json")]}
    assert run(plan, tmp_path) == 0
    assert json.loads((tmp_path / "verdicts.json").read_text()) == []
    assert "progress" in (tmp_path / "part.verdicts.log").read_text()


def test_a_part_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_plan, "PART_SECONDS", 2)
    plan = {"part": [step("slow", "import time; time.sleep(60)"), step("next", "print()")], "other": [step("one", "")]}
    start = time.monotonic()
    # Each part has its own limit, which starts with the part.
    assert run(plan, tmp_path) == 1
    assert time.monotonic() - start < 30
    summary = (tmp_path / "summary.txt").read_text()
    assert "timed out after 2 s" in summary
    assert "not reached in time" in summary


GRANDCHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])
print(child.pid, flush=True)
child.wait()
"""


def keeps_running(pid: int) -> bool:
    """Whether the process lives for another ten seconds: it must get a processor before a signal takes effect."""
    deadline = time.monotonic() + 10
    while _is_running(pid):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.01)
    return False


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_time_limit_ends_what_a_process_started(tmp_path):
    run({"part": [step("slow", GRANDCHILD, seconds=5)]}, tmp_path)
    (pid,) = [int(line) for line in (tmp_path / "part.slow.log").read_text().splitlines() if line.isdigit()]
    assert not keeps_running(pid)


def test_ended_from_outside(tmp_path):
    """A time limit on the whole command sends SIGTERM: the child is ended; its output and the summary are kept."""
    code = (
        "from pathlib import Path; from lcw_ops.bench import gpu_plan, gpu_runner; import sys\n"
        f"steps = [gpu_plan.Step(name, [sys.executable, '-c', {GRANDCHILD!r}]) for name in ('one', 'two')]\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "sys.exit(gpu_runner.run({'part': steps}, folder, gpu_runner.History(folder, 'key', folder / 'kept')))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    log = tmp_path / "part.one.log"
    end = time.monotonic() + 120
    while not (pids := [int(one) for one in (log.read_text() if log.exists() else "").splitlines() if one.isdigit()]):
        assert time.monotonic() < end, "the child did not begin"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ended from outside" in printed
    assert "ended from outside" in (tmp_path / "summary.txt").read_text()
    assert not (tmp_path / "part.two.log").exists()
    assert not keeps_running(pids[0])


# ---- The command -----------------------------------------------------------------------------------------------------


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | environment, cwd=ROOT)


def test_a_dry_run_needs_no_card_and_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    result = command("--dry-run", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    for path in gpu_plan.gpu_tests():
        assert f"tests/{path.name}" in result.stdout
    assert "LCW_OPS_CUDA_KERNEL=rows" in result.stdout


@pytest.mark.parametrize("option", ["--help", "--plan"])
def test_the_parts_are_listed_with_their_minutes(option):
    lines = [line.strip() for line in command(option).stdout.splitlines()]
    for part in PLAN:
        assert any(line.startswith(f"{part} ") and " min, " in line and " so far" in line for line in lines), part


def test_without_a_card():
    result = command("smoke", CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "sees no NVIDIA card" in result.stderr


def test_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no such library')")
    result = command("smoke", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert "has no torch that can be imported (ImportError: no such library)" in result.stderr


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("everything", ""),
        ("tests/test_absent.py", ""),
        ("smok", " did you mean smoke?"),
        ("test-hyper", " did you mean test-hypersphere?"),
        ("mencheck", " did you mean memcheck?"),
        ("crosover", " did you mean crossover?"),
    ],
)
def test_an_unknown_part(wanted, hint, capsys):
    assert gpu.main([wanted]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    groups = (
        "build, compile, smoke, verify, test, bench, memcheck, racecheck, synccheck, crossover, sanitize, first, all"
    )
    assert f"no part is called {wanted!r};{hint} choose from {groups}, a test file's path, or a part that" in line


# ---- Tried without a card --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played() -> dict[str, list[Step]]:
    plan = gpu_plan.parts(Path("/faked/sm_90.csv"), gpu.compile_target(gpu_fakes.CARD))
    return gpu_fakes.play(plan, Path("/faked"))


def test_every_step_says_which_tool_is_faked(played):
    assert list(played) == list(PLAN)
    for part, steps in played.items():
        assert [step.name for step in steps] == [step.name for step in PLAN[part]]
        for step in steps:
            # info asks no tool.
            assert step.faked or step.name == "info", (part, step.name)
            assert step.environment[gpu_fakes.VARIABLE] == "1"
            assert step.environment["LCW_OPS_TEST_DEVICE"] == "cpu"
            if step.name != "compile":
                assert not {"cuda", "setup.py", "pip"} & set(step.command), (part, step.command)
            assert not any("compute-sanitizer" in word for word in step.command)
            assert not any(str(gpu.RESULTS) in word for word in step.command)


def test_the_faked_cases_exist(played):
    from lcw_ops.verification import cases as verified

    for stem, text in gpu_fakes.BENCH_CASES.items():
        assert any(text in case.label for case in registry.cases(stem, "cpu") if case.quick), stem
    for stem, text in gpu_fakes.VERIFY_CASES.items():
        labels = [case.label for op in smoke.OPS_OF[stem] for case in verified.cases(op, "cpp")]
        assert any(text in label for label in labels), stem


def test_a_faked_run_cannot_be_mistaken(tmp_path, monkeypatch, capsys):
    """Sanitizers and logs say what was faked, and so do the summary's first line and both ends of what is printed."""
    monkeypatch.setattr(gpu_fakes, "play", lambda plan, folder, play=gpu_fakes.play: cheap(play(plan, folder)))
    monkeypatch.setattr(gpu, "KEPT", tmp_path / "gpu")
    monkeypatch.setenv(gpu_fakes.VARIABLE, "1")
    before = {path: path.read_bytes() for path in gpu.RESULTS.rglob("*") if path.is_file()}
    assert gpu.main(["racecheck", "build"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(gpu_fakes.HEADING) == 2
    (folder,) = (tmp_path / "gpu-faked").glob("*-logs")
    assert (folder / "summary.txt").read_text().startswith(gpu_fakes.HEADING)
    logs = list(folder.glob("*.log"))
    assert len(logs) == len(PLAN["racecheck"]) + len(PLAN["build"])
    for log in logs:
        assert gpu_fakes.HEADING in log.read_text()
        assert "FAKED in this step: " in log.read_text()
    for log in folder.glob("racecheck.*.log"):
        assert "FAKED compute-sanitizer, --tool=racecheck: the command runs, and nothing watches it" in log.read_text()
    assert "sm_90" in printed
    assert "torch FAKED" in printed
    assert {path: path.read_bytes() for path in gpu.RESULTS.rglob("*") if path.is_file()} == before
    # A faked run does not count as a run: its record is apart, and its key has the faked versions.
    assert not (tmp_path / "gpu").exists()


def cheap(plan: dict[str, list[Step]]) -> dict[str, list[Step]]:
    """The same steps; the smoke test and the import of the package, which import torch, only print."""

    def cut(step: Step) -> Step:
        words = step.command
        if "lcw_ops.bench.smoke" in words:
            words = [
                sys.executable,
                str(ROOT / "bench/gpu_fakes.py"),
                "--tool=racecheck",
                sys.executable,
                "-c",
                "print()",
            ]
            words[1:2] = ["-m", "bench.gpu_fakes"]
        elif step.name == "info":
            words = [sys.executable, "-c", "print()"]
        return dataclasses.replace(step, command=words)

    return {part: [cut(step) for step in steps] for part, steps in plan.items()}


def test_a_file_whose_tests_all_need_a_card_passes_when_it_is_played(tmp_path):
    (tmp_path / "test_card.py").write_text("import pytest\npytest.skip('needs a card', allow_module_level=True)")
    (tmp_path / "test_five.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(5))\ndef test_n(n): assert n < 2"
    )
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu_fakes", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name, text in (("test_card.py", "every test of this file needs a card"), ("test_five.py", "2 passed")):
        words = [*pytest_command, "--rootdir", str(tmp_path), str(tmp_path / name)]
        result = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert result.returncode == 0, result.stdout
        assert text in result.stdout


# ---- Each kernel once ------------------------------------------------------------------------------------------------

EVERY_KERNEL = """
import importlib, pkgutil, sys
from lcw_ops import kernels
from lcw_ops.bench import smoke
from triton.runtime.interpreter import InterpretedFunction
launched, run = set(), InterpretedFunction.run
def recording(self, *arguments, **options):
    launched.add(self.__name__)
    return run(self, *arguments, **options)
InterpretedFunction.run = recording
code = smoke.main(["--device", "cpu"])
names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
modules = [importlib.import_module(f"lcw_ops.kernels.{name}") for name in names]
left = {name for module in modules for name in vars(module) if name.endswith("_kernel")} - launched
print("never launched:", sorted(left))
sys.exit(code)
"""


def test_the_smoke_test_runs_every_triton_kernel():
    """Triton's kernels run in its interpreter, beside the C++ kernels."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    words = [sys.executable, "-W", "ignore", "-c", EVERY_KERNEL]
    result = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "every kernel is right" in result.stdout
    assert result.stdout.splitlines()[-1] == "never launched: []"


@pytest.fixture
def one_call(monkeypatch):
    """Reduce the smoke test to one op, on the backend cpp alone."""
    monkeypatch.setattr(smoke, "cases", lambda device_type, stem: [smoke.case(smoke.calls()[0], device_type)] * 2)
    monkeypatch.setitem(smoke.EXPECTED, "cpu", ("cpp",))


def test_the_smoke_test_passes(one_call, capsys):
    assert smoke.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("ok      lcw_weight, weight: lcw_ops (cpp)") == 2


def test_a_wrong_kernel_fails_the_smoke_test(one_call, monkeypatch, capsys):
    call = smoke.calls()[0]
    wrong = smoke.Call(call.op, call.name, call.shapes, _off_where_it_is_not_the_reference(call.run))
    monkeypatch.setattr(smoke, "calls", lambda: [wrong])
    monkeypatch.setattr(smoke, "cases", lambda device_type, stem: [smoke.case(wrong, device_type)] * 2)
    assert smoke.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("WRONG   lcw_weight, weight: lcw_ops (cpp)") == 2
    assert "2 failed" in printed


def _off_where_it_is_not_the_reference(run):
    def off(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        exact = backends.requested() == "reference"
        return [result if exact else result * 1.00001 for result in run(inputs)]

    return off


def test_a_kernel_that_raises_does_not_end_the_smoke_test(one_call, monkeypatch, capsys):
    def raising(inputs):
        if backends.requested() != "reference":
            raise RuntimeError("at the compiler\nno such instruction")
        return call.run(inputs)

    call = smoke.calls()[0]
    broken = smoke.case(smoke.Call(call.op, "broken", call.shapes, raising), "cpu")
    monkeypatch.setattr(smoke, "cases", lambda device_type, stem: [broken, smoke.case(call, device_type)])
    assert smoke.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED  lcw_weight, broken: lcw_ops (cpp): RuntimeError: no such instruction" in printed
    assert "ok      lcw_weight, weight" in printed


def test_a_backend_that_was_not_built_fails_the_smoke_test(one_call, monkeypatch, capsys):
    monkeypatch.setitem(backends._extension_missing, "cpp", "_C.abi3.so is not built")
    backends._resolve.cache_clear()
    try:
        assert smoke.main(["--device", "cpu"]) == 1
    finally:
        backends._resolve.cache_clear()
    assert "MISSING orthogonal_filter, cpp: _C.abi3.so is not built" in capsys.readouterr().out
