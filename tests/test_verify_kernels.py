"""``lcw-ops verify`` with real kernels on the CPU: the judge, the child processes, the interpreter, the compiler.

Nothing here runs on a GPU. Triton's kernels run in its interpreter, or are compiled without a device.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import run_ranks

import lcw_ops
from lcw_ops import functional as F
from lcw_ops.bench.registry import WrongResult
from lcw_ops.ops import backends, verdicts
from lcw_ops.verification import child, compiling, processes, speeds, verify
from lcw_ops.verification.cases import Case, cases, draw_normal, with_gradients
from lcw_ops.verification.judge import Guards, judge

CPU = torch.device("cpu")
KIND = verdicts.Kind("float32", "up to 1024")
SM_90 = {"target": ["cuda", 90, 32], "facts": [132, 232448, False]}

needs_cpp = pytest.mark.skipif(
    backends.missing_reason("lcw_weight", "cpp", "cpu") is not None,
    reason=str(backends.missing_reason("lcw_weight", "cpp", "cpu")),
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def as_a_child(monkeypatch):
    """The child is in no deterministic mode. The cases choose our own matmul."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("LCW_OPS_MATMUL", "own")


def make_case(kernel, dtype=torch.float32, in_place=False, shapes=((40, 30),)) -> Case:
    """``kernel`` on a backend, and twice its argument in plain torch."""

    def run(inputs):
        return [2 * inputs[0]] if backends.requested() == "reference" else kernel(*inputs)

    return Case("lcw_weight", KIND, "a case", dtype, draw_normal(*shapes), run, in_place=in_place)


_counter = iter(range(10**9))

FAULTS = {
    "differs from float64": lambda x: [2.00001 * x],
    "is not finite": lambda x: [2 * x + torch.tensor([torch.nan] + [0.0] * 29)],
    "has shape": lambda x: [2 * x[:-1]],
    "has torch.float64, expected torch.float32": lambda x: [(2 * x).double()],
    "2 results, expected 1": lambda x: [2 * x, x],
    "an argument has changed": lambda x: [x.mul_(2)],
    "different bits": lambda x: [2 * x + next(_counter) * 1e-9],
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_is_found(message):
    with pytest.raises(WrongResult, match=message):
        judge(make_case(FAULTS[message]), "cpp", CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_right_passes(dtype):
    judge(make_case(lambda x: [x + x], dtype), "cpp", CPU)
    judge(make_case(lambda x: [x + x], dtype, shapes=((0, 3),)), "cpp", CPU)


def test_a_sum_in_float32_is_no_float64():
    with pytest.raises(WrongResult, match="differs from float64"):
        judge(make_case(lambda x: [(2 * x.float()).double()], torch.float64), "cpp", CPU)


@pytest.mark.parametrize("place", [-1, 0])
def test_a_write_beyond_an_argument_is_found(place):
    """``place``: just before the argument, or just behind it."""

    def kernel(x):
        bytes = x.new_empty(0).set_(x.untyped_storage())
        bytes[x.storage_offset() - 1 if place else x.storage_offset() + x.numel()] = 1.0
        return [2 * x]

    with pytest.raises(WrongResult, match="wrote outside of its memory"):
        judge(make_case(kernel), "cpp", CPU)


# ---- Kernels that break one rule each --------------------------------------------------------------------------------


def _elements_around(tensor):
    """The memory of a tensor as elements, with what lies before and behind it, and the place of the first element."""
    return tensor.new_empty(0).set_(tensor.untyped_storage()), tensor.storage_offset()


def _write_behind(x, result, scratch):
    memory, first = _elements_around(result)
    memory[first + result.numel()] = 1


def _write_before(x, result, scratch):
    memory, first = _elements_around(result)
    memory[first - 1] = 1


def _write_behind_the_scratch(x, result, scratch):
    memory, first = _elements_around(scratch)
    memory[first + scratch.numel()] = 1


def _write_behind_the_argument(x, result, scratch):
    memory, first = _elements_around(x)
    memory[first + x.numel()] = 1


def _leave_one_unwritten(x, result, scratch):
    # The last element is the one that the memory held before.
    result[-1, -1] = torch.empty_like(result)[-1, -1]


def _read_unwritten_memory(x, result, scratch):
    result[0, 0] += scratch[0]


def _change_an_argument(x, result, scratch):
    x[0, 0] += 1


def _differ_between_runs(x, result, scratch):
    # Within the error that is allowed.
    direction = torch.tensor((-1) ** next(_counter) * torch.inf, dtype=result.dtype)
    result[0, 0] = torch.nextafter(result[0, 0], direction)


def _write_a_nan(x, result, scratch):
    result[0, 0] = torch.nan


BROKEN = {
    _write_behind: "wrote outside of its memory",
    _write_before: "wrote outside of its memory",
    _write_behind_the_scratch: "wrote outside of its memory",
    _write_behind_the_argument: "wrote outside of its memory",
    _leave_one_unwritten: "is not finite",
    _read_unwritten_memory: "is not finite",
    _change_an_argument: "an argument has changed",
    _differ_between_runs: "different bits",
    _write_a_nan: "is not finite",
}


@pytest.fixture
def doubling():
    """A case of an op whose kernel, which doubles, breaks a rule afterwards: call it with that function, or None."""
    library = torch.library.Library("lcw_ops", "FRAGMENT")
    library.define("doubling_for_a_test(Tensor x) -> Tensor")
    rule = None

    def kernel(x):
        result, scratch = torch.empty_like(x), x.new_empty(5)
        torch.mul(x, 2, out=result)
        if rule is not None:
            rule(x, result, scratch)
        return result

    library.impl("doubling_for_a_test", kernel, "CPU")

    def make(broken, dtype):
        nonlocal rule
        rule = broken
        return make_case(lambda x: [torch.ops.lcw_ops.doubling_for_a_test(x)], dtype, shapes=((7, 5),))

    yield make
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__.strip("_"))
def test_a_kernel_that_breaks_one_rule_is_found(broken, dtype, doubling):
    judge(doubling(None, dtype), "cpp", CPU)
    with pytest.raises(WrongResult, match=BROKEN[broken]):
        judge(doubling(broken, dtype), "cpp", CPU)


@pytest.mark.parametrize(("factor", "is_right"), [(0.0, True), (1.9, True), (2.1, False), (-2.1, False), (30.0, False)])
def test_twice_the_error_of_eager_torch_is_allowed(factor, is_right):
    """Eager torch's error is 2^-10 here, thousands of units in the last place."""
    error = 2.0**-10

    def run(inputs):
        x = inputs[0]
        if backends.requested() != "reference":
            return [2 * x + factor * error]
        return [2 * x if x.dtype == torch.float64 else 2 * x + error]

    case = Case("lcw_weight", KIND, "a case", torch.float32, draw_normal((40, 30)), run)
    with contextlib.nullcontext() if is_right else pytest.raises(WrongResult, match="result 0 differs from float64"):
        judge(case, "cpp", CPU)


@needs_cpp
def test_memory_of_a_kernel_is_guarded_and_poisoned():
    """The memory that C++ allocates comes from the guards, and is NaN until the kernel writes."""
    weight = torch.randn(7, 33)
    guards = Guards("cpu")
    with lcw_ops.use_backend("cpp"):
        torch.use_deterministic_algorithms(True)
        try:
            with guards:
                rows = F.lcw_weight(weight)
        finally:
            torch.use_deterministic_algorithms(False)
    guards.check()
    storage = rows.new_empty(0).set_(rows.untyped_storage())
    assert storage.numel() > rows.numel()
    assert storage[: rows.storage_offset()].isnan().all()
    assert torch.equal(rows, F.lcw_weight(weight))
    storage[-1] = 0
    with pytest.raises(WrongResult, match="wrote outside"):
        guards.check()


def test_inputs_are_fresh_and_misaligned_where_they_should_be():
    case = next(case for case in cases("gradient_activation_", "cpp") if "misaligned" in case.name)
    first, second = case.make_inputs(), case.make_inputs()
    assert not torch.equal(first[0], second[0])
    guards = Guards("cpu")
    assert guards.copy(first[0], case.offset).data_ptr() % 16 == case.offset * first[0].itemsize
    assert guards.copy(first[0]).data_ptr() % 16 == 0


QUICK = {
    "lcw_weight": "linear, M=8, m=1024, basis",
    "hypersphere_direction": "GmP, M=8, m=1024, relu",
    "normalize_scale": "linear, M=8, m=577",
    "gradient_activation_": "300 tensors",
    "activated_sgd_step_": "300 tensors",
    "activated_adamw_step_": "300 tensors",
    "orthogonal_filter": "M=5",
    "parallel_depth_sweep_": "N=17",
}


@needs_cpp
@pytest.mark.parametrize("op", backends.IMPLEMENTED)
def test_kernels_of_the_cpu_are_right(op):
    """A part of the cases. The whole list runs in test_the_command_on_the_cpu."""
    chosen = [case for case in cases(op, "cpp") if QUICK[op] in case.label and "300 layers" not in case.label]
    assert chosen
    for case in chosen:
        judge(case, "cpp", CPU)


@needs_cpp
def test_a_real_child(tmp_path, monkeypatch):
    monkeypatch.setenv("LCW_OPS_CACHE_DIR", str(tmp_path))
    report = verify("cpu", ops=["normalize_scale"], case="m=577, float32")
    assert [kernel.backend for kernel in report.kernels] == ["cpp"]
    assert report.right
    assert report.cases == 3
    assert "normalised rows" not in report.block()
    assert report.facts["name"] == verdicts.cpu_name()
    # The parts of the key are those that a reader in another process finds.
    assert report.facts == verdicts.collect_facts(CPU, "cpp")


def test_a_speed_is_compared_in_turns(monkeypatch):
    """Twice the work takes twice as long; a busy machine may discard that."""
    work = torch.randn(300, 300)
    speed = speeds.Speed(
        "lcw_weight", KIND, "a product", torch.float32, draw_normal((2, 2)), lambda _: lambda: work @ work,
        lambda _: lambda: work @ work @ work,
    )  # fmt: skip
    monkeypatch.setattr(speeds, "MOST_CHANGE", 1e9)
    ratio = speeds.measure(speed, "cpp", CPU)
    assert 1.2 < ratio.times < 3.5
    monkeypatch.setattr(speeds, "MOST_CHANGE", 0.0)
    with pytest.raises(speeds.Disturbed, match="the time of a copy changed by"):
        speeds.measure(speed, "cpp", CPU)


@pytest.mark.parametrize(
    ("ours", "plain", "faster"),
    [
        ([1.0] * 5, [1.06] * 5, True),
        ([1.0] * 5, [1.04] * 5, False),
        ([1.0, 1.0, 1.0, 1.0, 1.3], [1.2] * 5, False),
        ([1.2] * 5, [1.0] * 5, False),
    ],
)
def test_faster_means_five_per_cent_and_more_than_the_spread(ours, plain, faster, monkeypatch):
    times = {"ours": iter(ours), "plain": iter(plain)}
    monkeypatch.setattr(speeds, "_count_repeats", lambda run, device: 1)
    monkeypatch.setattr(speeds, "_turn", lambda run, repeats, device: next(times[run]))
    assert speeds._compare("ours", "plain", CPU).faster == faster


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter compiles nothing")
def test_kernels_compile_without_a_device(monkeypatch, tmp_path):
    """The launches of a case compile into Triton's cache, and a fault names the kernel."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = next(case for case in cases("gradient_activation_", "triton") if "300" in case.name)
    announced = []

    def compile_case():
        with compiling.compiling_for(SM_90, announced.append), lcw_ops.use_backend("triton"):
            child.run_once(case)

    compile_case()
    assert set(announced) == {"gradient_activation_kernel"}
    assert list(tmp_path.rglob("*.cubin"))
    monkeypatch.setattr(compiling, "MOST_SPILLED", -1)
    with pytest.raises(compiling.Fault, match="gradient_activation_kernel spills 0 bytes per thread; expected at most"):
        compile_case()
    monkeypatch.setattr(compiling, "MOST_SECONDS", 0.0)
    with pytest.raises(compiling.Fault, match=r"gradient_activation_kernel takes 0 s to compile; expected at most 0 s"):
        compile_case()
    # The driver and the choice of backends are as before.
    assert backends.missing_reason("gradient_activation_", "triton", "cpu") is not None


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter compiles nothing")
def test_a_kernel_that_does_not_compile_is_a_fault(monkeypatch):
    from triton.runtime.jit import JITFunction

    def run(self, *arguments, **options):
        raise TypeError("\nat 5:4: cannot convert None of type NoneType to tensor")

    monkeypatch.setattr(JITFunction, "run", run)
    case = cases("gradient_activation_", "triton")[0]
    with (
        pytest.raises(compiling.Fault, match="gradient_activation_kernel does not compile: TypeError: at 5:4: cannot"),
        compiling.compiling_for(SM_90, print),
        lcw_ops.use_backend("triton"),
    ):
        child.run_once(case)


RANK = """
import os, sys
from pathlib import Path
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
os.environ["LCW_OPS_CACHE_DIR"] = str(folder / "cache")
import torch
import lcw_ops
from lcw_ops.ops import backends
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
chosen = [int(backends.is_cpp_chosen(op)) for op in ("lcw_weight", "normalize_scale")]
both = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
torch.distributed.all_gather(both, torch.tensor(chosen))
try:
    lcw_ops.verify("cpu")
    refused = False
except RuntimeError as error:
    refused = "belongs to a distributed job" in str(error)
torch.save({"both": torch.stack(both), "refused": refused}, folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


@needs_cpp
def test_ranks_read_the_same_verdict(tmp_path):
    key = verdicts.make_key("lcw_weight", "cpp", KIND, verdicts.collect_facts(CPU, "cpp"))
    written = {"key": key, "right": False, "faster": False, "times": None, "reason": "no: wrong", "date": "2026-11-30"}
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / verdicts.file_of(key)).write_text(json.dumps(written))
    (tmp_path / "rank.py").write_text(RANK)
    for rank in run_ranks(str(tmp_path / "rank.py"), tmp_path, [0, 0], timeout=60):
        assert rank["both"].tolist() == [[0, 1], [0, 1]]
        assert rank["refused"]


def run_command(*arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lcw_ops.cli", "verify", "--device", "cpu", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@needs_cpp
def test_two_verifications_at_once(tmp_path):
    """One of them may be refused. Every file is whole."""
    arguments = ["--ops", "normalize_scale", "--json"]
    command = [sys.executable, "-m", "lcw_ops.cli", "verify", "--device", "cpu", *arguments]
    environment = os.environ | {"LCW_OPS_CACHE_DIR": str(tmp_path)}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [(*one.communicate(timeout=200), one.returncode) for one in both]
    assert {status for _, _, status in ends} <= {0, 2}
    assert any(status == 0 for _, _, status in ends), ends
    for _, error, status in ends:
        assert status == 0 or "another verification of this device is running" in error
    files = [json.loads(file.read_text()) for file in tmp_path.glob("verdict-*")]
    assert len(files) == len(verdicts.kinds("normalize_scale"))
    assert all(file["right"] for file in files)


@needs_cpp
def test_the_command_on_the_cpu(tmp_path):
    """Every case of every kernel, twice: the second run finds the measured choices of a matmul in the cache."""
    for _ in range(2):
        result = run_command("--json", LCW_OPS_CACHE_DIR=str(tmp_path))
        assert result.returncode == 0, result.stdout + result.stderr
        kernels = json.loads(result.stdout)
        assert {kernel["op"] for kernel in kernels} == backends.IMPLEMENTED.keys()
        assert all(kernel["right"] for kernel in kernels)
    count = sum(len(verdicts.kinds(op)) for op in backends.IMPLEMENTED)
    assert len(list(tmp_path.glob("verdict-*"))) == count


INTERPRETED = {
    "hypersphere_direction": "direction, m=1, float32",
    "normalize_scale": "normalised rows, m=1, float32",
    "gradient_activation_": "1 tensor, misaligned, float32",
    "orthogonal_filter": "N=1, M=1, 5 layers",
    "lcw_weight": "weight, m=577, basis, float32",
}


@needs_triton
@pytest.mark.parametrize("op", INTERPRETED)
def test_kernels_in_the_interpreter(op, tmp_path):
    environment = {"TRITON_INTERPRET": "1", "LCW_OPS_CACHE_DIR": str(tmp_path)}
    result = run_command("--ops", op, "--case", INTERPRETED[op], "--json", **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = json.loads(result.stdout)
    assert "triton" in [kernel["backend"] for kernel in kernels]
    for kernel in kernels:
        assert kernel["right"], kernel
        assert kernel["verdicts"] == []
    assert not list(tmp_path.glob("verdict-*"))


def test_the_child_runs_with_the_package_of_its_parent(tmp_path, monkeypatch):
    """Also if the package is not installed, and whatever backend the caller asks for."""
    monkeypatch.setenv("LCW_OPS_BACKEND", "reference")
    environment = processes._environment({"job": "compile"})
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(Path(lcw_ops.__file__).parents[1])
    assert "LCW_OPS_BACKEND" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_a_gradient_is_judged_too():
    """A kernel whose result is right and whose gradient is not."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    run = with_gradients(lambda x: x * 1 if backends.requested() == "reference" else Wrong.apply(x))
    case = Case("lcw_weight", KIND, "a case", torch.float32, draw_normal((40, 30)), run)
    with pytest.raises(WrongResult, match="result 1 differs"):
        judge(case, "cpp", CPU)


@needs_cpp
def test_the_child_ignores_the_current_folder(tmp_path, monkeypatch):
    """A checkout of another version in the current folder must not be judged in place of the caller's package."""
    (tmp_path / "lcw_ops").mkdir()
    (tmp_path / "lcw_ops" / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    monkeypatch.setenv("LCW_OPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert verify("cpu", ops=["normalize_scale"], case="normalised rows, m=1, float32").right


def test_eager_torch_is_judged_in_full_float32(monkeypatch):
    """TF32 would make eager torch's error, and with it the allowed one, a thousand times larger."""
    seen = []
    monkeypatch.setattr(child, "cases", lambda op, backend: cases(op, backend)[:1])
    monkeypatch.setattr(child, "judge", lambda *_: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        job = {"op": "lcw_weight", "backend": "cpp", "device": "cpu", "alone": "times", "faulty": [], "only": ""}
        child.run({**job, "times": False}, lambda line: None)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]
