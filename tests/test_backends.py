"""The choice of backend: silent by default, an error if the requested backend cannot run; and how info() reports it."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import lcw_ops
from lcw_ops import _info
from lcw_ops import functional as F
from lcw_ops.ops import backends, library
from lcw_ops.ops.gradient_activation import ADAMW_STEP, NAME, SGD_STEP
from lcw_ops.ops.orthogonal_filter import crossover
from lcw_ops.ops.orthogonal_filter import op as orthogonal_filter
from lcw_ops.ops.verdicts import Verdict

OPS = sorted(backends.IMPLEMENTED)


def run_python(code, **environment):
    """Run code in a fresh interpreter: an import cannot be tested in this one."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_requests_nest_and_end():
    assert backends.requested() is None
    with lcw_ops.use_backend("reference"):
        with lcw_ops.use_backend("cpp"):
            assert backends.requested() == "cpp"
        assert backends.requested() == "reference"
    assert backends.requested() is None


def test_a_request_ends_after_an_exception():
    with pytest.raises(KeyError), lcw_ops.use_backend("reference"):
        raise KeyError
    assert backends.requested() is None


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(lcw_ops.BackendError, match="no backend is called 'cudnn'; choose one of cpp, cuda, triton"):
        lcw_ops.use_backend("cudnn").__enter__()


def test_environment_variable_requests_for_the_whole_run():
    code = "import lcw_ops; from lcw_ops.ops import backends; print(backends.requested())"
    assert run_python(code, LCW_OPS_BACKEND="reference").stdout.strip() == "reference"
    use = "import lcw_ops; print(lcw_ops.info())"
    assert "none. no backend is called 'cudnn'" in run_python(use, LCW_OPS_BACKEND="cudnn").stdout


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps"])
def test_every_missing_backend_has_a_reason(op, device_type):
    for backend in backends.BACKENDS:
        reason = backends.missing_reason(op, backend, device_type)
        assert reason is None or len(reason) > 10
    assert backends.missing_reason(op, "reference", device_type) is None


@pytest.mark.parametrize("op", OPS)
def test_gpu_kernels_wait_until_their_tests_have_passed(op):
    """No kernel is chosen automatically on a GPU generation without a committed test log."""
    for backend in ("cuda", "triton"):
        assert "have not passed on sm_123" in backends.unproven_reason(op, backend, (12, 3))


@pytest.fixture
def proven_gpu(monkeypatch):
    """Choose as on a GPU whose kernels have all passed their tests. Nothing runs on it."""
    monkeypatch.setattr(backends, "missing_reason", lambda op, backend, device_type: None)
    monkeypatch.setattr(backends, "compute_capability", lambda device: (9, 0))
    proven = {(op, backend): frozenset({(9, 0)}) for op in OPS for backend in ("cuda", "triton", "graph")}
    monkeypatch.setattr(backends, "PROVEN", proven)
    backends._resolve.cache_clear()
    yield torch.device("cuda", 0)
    backends._resolve.cache_clear()


def test_the_choice_on_a_gpu_depends_on_the_width(proven_gpu):
    def choose(width, itemsize=4):
        return backends.choose("orthogonal_filter", proven_gpu, width, itemsize)

    assert [choose(width) for width in (1, 128, 129, 512, 4096)] == ["triton", "triton", "cuda", "cuda", "cuda"]
    assert [choose(width, 8) for width in (64, 65)] == ["triton", "cuda"]
    lines = _info._op_lines("orthogonal_filter", proven_gpu)
    assert lines[0].endswith(
        ": triton; above width 64 in float32 and 64 in float64: cuda; above width 512 in float32 and 256 in float64: "
        "graph"
    )
    assert lines[2] == "  not cuda: triton comes first"


@pytest.mark.parametrize("op", [NAME, SGD_STEP, ADAMW_STEP])
def test_each_op_has_its_own_order(proven_gpu, monkeypatch, op):
    """Triton's launcher walks the tensors in Python, so the CUDA kernel comes first. Verdicts decide as before."""
    assert backends.choose(op, proven_gpu) == "cuda"
    assert "  not triton: cuda comes first" in _info._op_lines(op, proven_gpu)
    assert backends.choose("lcw_weight", proven_gpu) == "triton"
    monkeypatch.delitem(backends.PROVEN, (op, "cuda"))
    backends._resolve.cache_clear()
    assert backends.choose(op, proven_gpu) == "triton"
    with lcw_ops.use_backend("cuda"):
        assert backends.choose(op, proven_gpu) == "cuda"
    monkeypatch.delitem(backends.PROVEN, (op, "triton"))
    backends._resolve.cache_clear()
    assert backends.choose(op, proven_gpu, warns=False) == "reference"
    assert backends.choose(op, torch.device("cpu")) == "cpp"


@pytest.mark.parametrize(
    ("cuda", "triton", "chosen"),
    [
        (None, None, "cuda"),
        ((True, True), (True, True), "cuda"),
        ((True, False), (True, True), "triton"),
        ((False, False), (True, True), "triton"),
        ((True, True), (True, False), "cuda"),
        ((True, False), (True, False), "reference"),
    ],
)
def test_verdicts_overrule_the_predicted_crossover(proven_gpu, monkeypatch, cuda, triton, chosen):
    """Clusters are predicted to be the fastest at 100 units. A verdict, (right, faster), decides whether they run."""
    given = {"cuda": cuda, "triton": triton}
    found = {name: Verdict(*one, 1.5, "as said", "2026-01-01") for name, one in given.items() if one is not None}
    monkeypatch.setattr(backends, "_kind", lambda op, device, width, itemsize: ("float32", "up to 128"))
    monkeypatch.setattr(backends.verdicts, "find", lambda op, backend, kind, device: found.get(backend))
    monkeypatch.delitem(backends.PROVEN, (orthogonal_filter.NAME, "graph"))
    first = orthogonal_filter.fastest_on(proven_gpu, 100, 4)
    assert first == "cuda"
    assert backends.choose(orthogonal_filter.NAME, proven_gpu, 100, 4, first, warns=False) == chosen


def test_info_follows_the_crossover_table(proven_gpu, monkeypatch):
    monkeypatch.setitem(crossover.MEASURED, (9, 0), (("cuda", 33), ("triton", 64), ("graph", None)))
    lines = _info._op_lines(orthogonal_filter.NAME, proven_gpu)
    assert lines[0].endswith(
        ": cuda; above width 33 in float32 and 16 in float64: triton; above width 64 in float32 and 32 in float64: "
        "graph"
    )
    in_float64 = [orthogonal_filter.choose_kernel(proven_gpu, width, 8) for width in (16, 17, 32, 33)]
    assert in_float64 == ["cuda", "triton", "triton", "graph"]
    monkeypatch.setitem(crossover.MEASURED, (9, 0), (("graph", None),))
    assert _info._op_lines(orthogonal_filter.NAME, proven_gpu)[0].endswith(": graph")
    assert "  not cuda: graph comes first" in _info._op_lines(orthogonal_filter.NAME, proven_gpu)


@pytest.fixture
def gpu_without_extension(proven_gpu, monkeypatch):
    def missing_reason(op, backend, device_type):
        return "_C_cuda.abi3.so is not built" if backend == "cuda" else None

    monkeypatch.setattr(backends, "missing_reason", missing_reason)
    monkeypatch.setattr(backends, "PROVEN", {})
    return proven_gpu


def test_the_graph_needs_no_extension(gpu_without_extension, monkeypatch):
    """The kernel "graph", CUDA graphs of torch's matmuls, belongs to the backend cuda but needs no shared library."""

    def choose(*widths):
        backends._resolve.cache_clear()
        return [orthogonal_filter.choose_kernel(gpu_without_extension, width, 4) for width in widths]

    assert choose(128, 512, 513) == ["reference"] * 3
    with lcw_ops.use_backend("cuda"):
        assert choose(513, 4096) == ["graph", "graph"]
        with pytest.raises(lcw_ops.BackendError, match="'cuda' was requested, but _C_cuda"):
            choose(512)
        line = _info._op_lines(orthogonal_filter.NAME, gpu_without_extension)[0]
        assert ": none; above width 512 in float32 and 256 in float64: graph. orthogonal_filter: backend" in line
    with lcw_ops.use_backend("triton"), pytest.raises(lcw_ops.BackendError, match="width 513 > 128"):
        choose(513)
    monkeypatch.setitem(backends.PROVEN, (orthogonal_filter.NAME, "cuda"), frozenset({(9, 0)}))
    assert choose(128, 512, 513) == ["reference"] * 3
    monkeypatch.setitem(backends.PROVEN, (orthogonal_filter.NAME, "graph"), frozenset({(9, 0)}))
    monkeypatch.setitem(backends.PROVEN, (orthogonal_filter.NAME, "triton"), frozenset({(9, 0)}))
    assert choose(128, 512, 513) == ["triton", "graph", "graph"]


def test_the_graph_waits_for_its_own_proof(proven_gpu, monkeypatch):
    assert orthogonal_filter.choose_kernel(proven_gpu, 513, 4) == "graph"
    monkeypatch.delitem(backends.PROVEN, (orthogonal_filter.NAME, "graph"))
    backends._resolve.cache_clear()
    assert orthogonal_filter.choose_kernel(proven_gpu, 513, 4) == "cuda"
    assert "request: lcw_ops.use_backend('cuda')" in backends.unproven_reason(orthogonal_filter.NAME, "graph", (9, 0))


@pytest.mark.parametrize("widths", [(17, 20, 100), (130, 137, 200)])
def test_one_program_for_all_widths_on_a_cpu(widths):
    """torch.compile does not split the widths at the width limit of a backend that cannot run on a CPU."""
    reason = backends.missing_reason(orthogonal_filter.NAME, "cpp", "cpu")
    if reason is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lcw_ops.functional.orthogonal_filter, fullgraph=True, dynamic=True, backend=counter)
    for width in widths:
        compiled(torch.randn(2, width), torch.randn(4, width, width), None, torch.eye(width))
    assert counter.frame_count == 1


def test_a_width_leaves_no_trace_in_the_cache(proven_gpu):
    for width in range(129, 200):
        assert backends.choose(orthogonal_filter.NAME, proven_gpu, width) == "cuda"
    # One answer for rows of any width, and one for rows that are too wide for Triton.
    assert backends._resolve.cache_info().currsize == 2


def test_nothing_unproven_is_chosen_on_a_gpu(proven_gpu, monkeypatch):
    monkeypatch.setattr(backends, "PROVEN", {("orthogonal_filter", "cuda"): frozenset({(9, 0)})})
    assert backends.choose("orthogonal_filter", proven_gpu, 64) == "cuda"
    monkeypatch.setattr(backends, "PROVEN", {})
    backends._resolve.cache_clear()
    assert backends.choose("orthogonal_filter", proven_gpu, 64) == "reference"
    with lcw_ops.use_backend("triton"):
        assert backends.choose("orthogonal_filter", proven_gpu, 128) == "triton"


def test_a_request_that_is_too_wide_names_the_width(proven_gpu):
    with lcw_ops.use_backend("triton"):
        with pytest.raises(lcw_ops.BackendError, match="but width 300 > 128, the most triton takes in float32"):
            backends.choose("orthogonal_filter", proven_gpu, 300)
        with pytest.raises(lcw_ops.BackendError, match="but width 65 > 64, the most triton takes in float64"):
            backends.choose("orthogonal_filter", proven_gpu, 65, 8)
        assert (
            "above width 128 in float32 and 64 in float64: none" in _info._op_lines("orthogonal_filter", proven_gpu)[0]
        )


@pytest.mark.parametrize(("solver", "op"), [("sequential", "orthogonal_filter"), ("parallel", "parallel_depth_sweep_")])
@pytest.mark.parametrize(
    ("dtype", "widest"), [(torch.float32, 16), (torch.float64, 8), (torch.bfloat16, 16), (torch.float16, 16)]
)
def test_the_width_limit_counts_the_bytes_of_the_state(dtype, widest, solver, op, monkeypatch):
    """The state of a 16-bit recurrence is float32."""
    monkeypatch.setitem(backends.MAX_ROW_BYTES, (op, "cpp"), 64)

    def run(width):
        h0, weight = torch.randn(2, width, dtype=dtype), torch.randn(9, width, width, dtype=dtype)
        return F.orthogonal_filter(h0, weight, None, torch.arange(width), solver=solver)

    with lcw_ops.use_backend("cpp"):
        assert run(widest).shape == (2, widest)
        with pytest.raises(lcw_ops.BackendError, match=f"width {widest + 1} > {widest}, the most cpp takes"):
            run(widest + 1)


def test_info_names_versions_devices_and_reasons():
    text = lcw_ops.info()
    assert f"torch {importlib.metadata.version('torch')}" in text
    assert "CPU:" in text
    for op in OPS:
        assert f"{op} on cpu:" in text
    for line in text.splitlines():
        if line.startswith("  not "):
            assert len(line.split(":", 1)[1]) > 10


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_a_reason_that_all_ops_share_is_given_once(no_gpu, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    text = lcw_ops.info()
    assert "GPU: none; the backends cuda and triton need one\n" in text
    for backend in ("cuda", "triton"):
        assert text.count(backends.missing_reason(orthogonal_filter.NAME, backend, "cpu")) == 1
    # A reason of one op alone stays with that op.
    assert "lcw_weight on cpu: " in text
    assert text.count("  not cuda: lcw_weight has no cuda kernel\n") == 1


def test_a_reason_of_some_ops_stays_with_each(no_gpu, monkeypatch):
    def missing_reason(op, backend, device_type):
        return "a reason of its own" if (op, backend) == ("lcw_weight", "cpp") else "a reason that others have too"

    monkeypatch.setattr(backends, "missing_reason", missing_reason)
    backends._resolve.cache_clear()
    text = lcw_ops.info()
    backends._resolve.cache_clear()
    assert text.count("not cpp: a reason that others have too") == len(OPS) - 1
    assert text.count("not cpp: a reason of its own") == 1
    # All ops that have such a kernel share the reason, so it is given once. An op without one has another reason.
    assert "Every op on cpu that has such a kernel:\n  not cuda: a reason that others have too\n" in text


def test_the_report_holds_the_facts_of_the_text(proven_gpu, monkeypatch):
    devices = [torch.device("cpu"), proven_gpu]
    monkeypatch.setattr(_info, "_devices", lambda: devices)
    gpu = {"device": "cuda:0", "name": "a card", "generation": "sm_90"}
    monkeypatch.setattr(_info, "_gpu", lambda device: gpu)
    report = json.loads(json.dumps(_info.report()))
    assert list(report) == [
        "versions", "platform", "cpu", "gpus", "memory_pool", "graph_buffers", "requested_backend", "ops"
    ]  # fmt: skip
    assert list(report["memory_pool"]) == ["limit", "idle", "lent", "error"]
    assert list(report["versions"]) == ["lcw_ops", "python", "torch", "triton", "numpy", "cuda"]
    # The package's version has no suffix such as +cu128, the module's may have one.
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["gpus"] == [gpu]
    assert report["requested_backend"] is None
    assert sorted(report["ops"]) == OPS
    on_gpu = report["ops"][orthogonal_filter.NAME]["cuda:0"]
    assert on_gpu["backend"] == "triton"
    assert on_gpu["wider"] == [
        {"above_width_float32": 64, "above_width_float64": 64, "backend": "cuda"},
        {"above_width_float32": 512, "above_width_float64": 256, "backend": "graph"},
    ]
    assert on_gpu["not_chosen"]["cuda"] == "triton comes first"
    text = lcw_ops.info()
    assert "GPU 0: a card, sm_90\n" in text
    for op in OPS:
        for device in devices:
            facts = report["ops"][op][str(device)]
            assert list(facts) == ["backend", "error", "wider", "not_chosen", "verdicts"]
            assert f"{op} on {device}: {facts['backend']}" in text
            for backend, reason in facts["not_chosen"].items():
                assert f"  not {backend}: {reason}\n" in text + "\n"


def test_the_report_says_what_cannot_run(no_gpu):
    reason = backends.missing_reason("lcw_weight", "cuda", "cpu")
    with lcw_ops.use_backend("cuda"):
        report = _info.report()
        assert lcw_ops.info().count(reason) == 1
    assert report["requested_backend"] == "cuda"
    facts = report["ops"]["lcw_weight"]["cpu"]
    assert (facts["backend"], facts["not_chosen"]) == (None, {})
    assert facts["error"] == f"lcw_weight: backend 'cuda' was requested, but {reason}"


@pytest.mark.parametrize("requested", backends.BACKENDS)
def test_the_text_gives_each_error_once(requested, no_gpu):
    """No two errors give the same reason, and every op is named once per device."""
    with lcw_ops.use_backend(requested):
        lines = lcw_ops.info().splitlines()
    errors = [line.partition("but ")[2] for line in lines if ": none. " in line]
    assert len(set(errors)) == len(errors)
    for op in backends.IMPLEMENTED:
        assert sum(f"{op} on cpu: " in line or line.startswith(f"{op}, ") or f", {op}, " in line for line in lines) == 1


def test_a_request_is_the_reason_not_to_choose_the_others():
    with lcw_ops.use_backend("reference"):
        reasons = _info.report()["ops"][orthogonal_filter.NAME]["cpu"]["not_chosen"]
    if backends.missing_reason(orthogonal_filter.NAME, "cpp", "cpu") is None:
        assert reasons["cpp"] == "reference, as requested, comes first"
    assert set(reasons) == {"cpp", "cuda", "triton"}


def test_info_names_the_requested_backend():
    with lcw_ops.use_backend("reference"):
        assert "Requested for every op: reference" in lcw_ops.info()


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import lcw_ops, torch\n"
        "h = torch.randn(2, 3)\n"
        "print(lcw_ops.functional.orthogonal_filter(h, torch.randn(4, 3, 3), None, torch.randperm(3)).shape)\n"
        "print(lcw_ops.info())"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([2, 3])" in result.stdout


def test_import_needs_no_extension():
    """Without its shared libraries the package gives the same results from the reference, and info() says why."""
    blocked = (
        "import torch\n"
        "def refuse(path): raise OSError(f'{path}: blocked')\n"
        "torch.ops.load_library = refuse\n"
        "import lcw_ops\n"
        "h, w = torch.randn(2, 3), torch.randn(4, 3, 3, requires_grad=True)\n"
        "lcw_ops.functional.orthogonal_filter(h, w, None, torch.randperm(3)).sum().backward()\n"
        "print(w.grad.abs().sum() > 0)\n"
        "print(lcw_ops.info())"
    )
    result = run_python(blocked)
    assert result.returncode == 0, result.stderr
    assert "tensor(True)" in result.stdout
    assert "orthogonal_filter on cpu: reference" in result.stdout
    assert "not cpp: _C.abi3.so did not load" in result.stdout


@pytest.mark.parametrize("op", OPS)
def test_every_implemented_backend_is_declared(op):
    for backend in backends.IMPLEMENTED[op]:
        assert library.get_overload(op, backend) is not None


@pytest.mark.parametrize("requested", ["reference", "cpp"])
def test_small_layers_run_on_the_requested_backend(requested):
    """The quick way into the C++ kernels must not be taken for another backend."""
    x, weight, column = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    calls = (
        lambda: F.lcw_linear(x, weight),
        lambda: F.weight_norm_linear(x, weight, column),
        lambda: F.gmp_linear(x, weight[:, :2], column, column),
    )
    for call in calls:
        with lcw_ops.use_backend(requested), torch.profiler.profile(acc_events=True) as profile:
            call()
        names = {event.name for event in profile.events()}
        assert any(name.startswith("lcw_ops::") for name in names) == (requested == "cpp"), names
