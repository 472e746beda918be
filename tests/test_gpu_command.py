"""The command behind ``make gpu``, without a GPU: its plan, its runner, and its smoke test, with kernels of the CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lcw_ops.bench import gpu, registry, smoke
from lcw_ops.ops import backends

ROOT = Path(__file__).parent.parent
PLAN = gpu.parts(Path("rows.csv"))
STEPS = [(part, step) for part, steps in PLAN.items() for step in steps]


def files_in(step: gpu.Step) -> list[str]:
    return [word for word in step.command if word.startswith("tests/")]


# ---- The plan --------------------------------------------------------------------------------------------------------


def test_every_gpu_test_has_a_process_of_its_own():
    run = [files_in(step) for part, step in STEPS if part.startswith("test-") and part != "test-rows"]
    assert all(len(files) == 1 for files in run)
    assert sorted(files[0] for files in run) == sorted(f"tests/{path.name}" for path in gpu.gpu_tests())
    assert not any(len(files_in(step)) > 1 for _, step in STEPS)
    assert len({(part, step.name) for part, step in STEPS}) == len(STEPS)


def test_the_order_and_the_time_of_parts():
    assert list(PLAN)[:2] == ["build", "smoke"]
    assert gpu.PART_SECONDS < 8 * 60
    assert all(step.seconds <= gpu.PART_SECONDS for _, step in STEPS)


def test_every_benchmark_is_measured_whole():
    """The shares of a method's benchmarks add up to all of them, and every method of the registry has benchmarks."""
    shares = {}
    for part, step in STEPS:
        if part.startswith("bench-"):
            shares.setdefault(step.command[step.command.index("bench") + 1], []).append(step.command[-1])
    assert set(shares) == set(registry.STEMS)
    for own in shares.values():
        assert own == [f"{number}/{len(own)}" for number in range(1, len(own) + 1)]


def test_the_sanitizer_watches_the_tests_of_every_kernel():
    watched = {word for part, step in STEPS if part.startswith("memcheck") for word in files_in(step)}
    assert watched == {f"tests/{path.name}" for path in gpu.gpu_tests()}
    for tool in ("racecheck", "synccheck"):
        files = {word for part, step in STEPS if part.startswith(tool) for word in files_in(step)}
        assert files == {f"tests/{path.name}" for path in gpu.gpu_tests() if path.stem.startswith("test_cuda_")}
    memcheck = [step for part, step in STEPS if part.startswith("memcheck")]
    assert all(step.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" for step in memcheck)


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
        (["bench-lcw_linear"], ["bench-lcw_linear-1", "bench-lcw_linear-2", "bench-lcw_linear-3"]),
        (["smoke", "build"], ["smoke", "build"]),
        ([], list(PLAN)),
        (["all"], list(PLAN)),
        (["tests/test_triton_hypersphere.py"], ["tests/test_triton_hypersphere.py"]),
    ],
)
def test_parts_by_name(wanted, expected):
    assert list(gpu.select(wanted, PLAN)) == expected


# ---- Which files run on a GPU ----------------------------------------------------------------------------------------


def test_the_rule_agrees_with_pytest(request):
    """A file of this run is selected if its tests ask for ``device``, directly or through another fixture."""
    selected = set(gpu.gpu_tests())
    for path in {item.path for item in request.session.items}:
        fixtures = {name for item in request.session.items if item.path == path for name in item.fixturenames}
        if path.parent == ROOT / "tests" and "device" in fixtures:
            assert (path in selected) == ("on_the_cpu" not in fixtures), path


def test_gpu_files_of_this_tree():
    names = {path.stem for path in gpu.gpu_tests()}
    kernels = {path.stem for path in (ROOT / "tests").glob("test_triton_*.py")}
    # These compile kernels, or read their code.
    compiled = ("bank_conflicts", "kernels", "launches", "loads", "recorded", "source")
    kernels -= {f"test_triton_{name}" for name in compiled}
    kernels |= {f"test_cuda_{path.stem}" for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert names >= kernels | {"test_orthogonal_filter", "test_gradient_activation_op", "test_activated_steps"}
    on_the_cpu = {"test_triton_kernels", "test_cuda_build", "test_cuda_emulated", "test_distributed", "test_bench"}
    assert not names & (on_the_cpu | {"test_orthogonal_filter_proof", "test_triton_launches", "test_gpu_command"})


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
    fixtures = gpu.device_fixtures(CONFTEST)
    assert fixtures == {"device", "made_there", "on_top"}
    assert gpu.uses_device(source, fixtures) is expected


def test_modules_that_the_tests_need():
    """The sources of tests, of the tests' own modules and of commands are searched, so nobody has to keep a list."""
    assert gpu.imports([ROOT / "tests/test_cuda_gradient_activation.py"]) == {"numpy", "pytest"}
    assert "hypothesis" in gpu.imports([ROOT / "tests/test_orthogonal_filter_proof.py"])
    for path in gpu.gpu_tests():
        assert gpu.imports([path]) <= {"numpy", "pytest"}, "README names what make gpu needs"


# ---- The runner ------------------------------------------------------------------------------------------------------


def step(name: str, code: str, seconds: float = 60, **environment: str) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-c", code], seconds, environment)


FAILING = {
    "first": [
        step("good", "import os; print('on', os.environ['LCW_OPS_TEST_DEVICE'], os.environ['OWN'])", OWN="mine"),
        step("bad", "print('so far so good', flush=True); raise SystemExit(3)"),
        gpu.Step("absent", ["/no/such/sanitizer", "--tool=memcheck"]),
        step("slow", "import time; print('begun', end='', flush=True); time.sleep(60)", seconds=3),
        step("last", "import os; print(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'])"),
    ],
    "second": [step("good", "print('second')")],
}


def test_failures_do_not_stop_the_rest(tmp_path, capsys):
    assert gpu.run(FAILING, tmp_path) == 1
    text = {path.name: path.read_text() for path in tmp_path.iterdir()}
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
    assert [gpu.run(plan, tmp_path), gpu.run(plan, tmp_path)] == [0, 0]
    assert (tmp_path / "part.good.log").read_text().splitlines().count("once") == 2
    assert len((tmp_path / "summary.txt").read_text().splitlines()) == 2


def test_a_part_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PART_SECONDS", 2)
    plan = {"part": [step("slow", "import time; time.sleep(60)"), step("next", "print()")], "other": [step("one", "")]}
    start = time.monotonic()
    # Each part has its own limit, which starts with the part.
    monkeypatch.setattr(gpu, "_run_step", lambda step, log, limit, run=gpu._run_step: run(step, log, max(limit, -1)))
    assert gpu.run(plan, tmp_path) == 1
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
    gpu.run({"part": [step("slow", GRANDCHILD, seconds=5)]}, tmp_path)
    (pid,) = [int(line) for line in (tmp_path / "part.slow.log").read_text().splitlines() if line.isdigit()]
    assert not keeps_running(pid)


def test_ended_from_outside(tmp_path):
    """A time limit on the whole command sends SIGTERM: the child is ended; its output and the summary are kept."""
    code = (
        "from pathlib import Path; from lcw_ops.bench import gpu; import sys\n"
        f"steps = [gpu.Step(name, [sys.executable, '-c', {GRANDCHILD!r}]) for name in ('one', 'two')]\n"
        f"sys.exit(gpu.run({{'part': steps}}, Path({str(tmp_path)!r})))"
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
    words = [sys.executable, str(ROOT / "bench/gpu.py"), *arguments]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | environment)


def test_a_dry_run_needs_no_card_and_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    result = command("--dry-run", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    for path in gpu.gpu_tests():
        assert f"tests/{path.name}" in result.stdout
    assert "LCW_OPS_CUDA_KERNEL=rows" in result.stdout


def test_the_help_lists_the_parts():
    result = command("--help")
    assert [part for part in PLAN if f"\n  {part}\n" not in result.stdout] == []


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
    groups = "build, smoke, test, memcheck, racecheck, synccheck, bench, crossover, sanitize, all"
    assert f"no part is called {wanted!r};{hint} choose from {groups}, a test file's path, or a part that" in line


def test_without_the_packages_that_the_tests_need(monkeypatch, capsys):
    find_spec = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "numpy" else find_spec(name))
    monkeypatch.setattr(gpu, "find_card", lambda: pytest.fail("looked for a card"))
    assert gpu.main(["test"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "lacks numpy; pip install numpy" in error
    assert gpu.missing_modules(PLAN["build"]) == []


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
    monkeypatch.setattr(smoke, "cases", lambda device_type: [smoke.case(smoke.calls()[0], device_type)] * 2)
    monkeypatch.setitem(smoke.EXPECTED, "cpu", ("cpp",))


def test_the_smoke_test_passes(one_call, capsys):
    assert smoke.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("ok      lcw_weight, weight: lcw_ops (cpp)") == 2


def test_a_wrong_kernel_fails_the_smoke_test(one_call, monkeypatch, capsys):
    call = smoke.calls()[0]
    wrong = smoke.Call(call.op, call.name, call.shapes, _off_where_it_is_not_the_reference(call.run))
    monkeypatch.setattr(smoke, "calls", lambda: [wrong])
    monkeypatch.setattr(smoke, "cases", lambda device_type: [smoke.case(wrong, device_type)] * 2)
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
    monkeypatch.setattr(smoke, "cases", lambda device_type: [broken, smoke.case(call, device_type)])
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
