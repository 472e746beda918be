"""The choice of backend: quiet by itself, loud on request; and what info() says about it."""

import os
import subprocess
import sys

import pytest
import torch

import lcw_ops
from lcw_ops import _info
from lcw_ops.ops import _backends, _library

OPS = sorted(_backends.IMPLEMENTED)


def run_python(code, **environment):
    """A fresh interpreter: what happens at import cannot be tested in this one."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_requests_nest_and_end():
    assert _backends.requested() is None
    with lcw_ops.use_backend("reference"):
        with lcw_ops.use_backend("cpp"):
            assert _backends.requested() == "cpp"
        assert _backends.requested() == "reference"
    assert _backends.requested() is None


def test_a_request_ends_after_an_exception():
    with pytest.raises(KeyError), lcw_ops.use_backend("reference"):
        raise KeyError
    assert _backends.requested() is None


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(lcw_ops.BackendError, match="no backend is called 'cudnn'; choose one of cpp, cuda, triton"):
        lcw_ops.use_backend("cudnn").__enter__()


def test_environment_variable_requests_for_the_whole_run():
    code = "import lcw_ops; from lcw_ops.ops import _backends; print(_backends.requested())"
    assert run_python(code, LCW_OPS_BACKEND="reference").stdout.strip() == "reference"
    use = "import lcw_ops; print(lcw_ops.info())"
    assert "none. no backend is called 'cudnn'" in run_python(use, LCW_OPS_BACKEND="cudnn").stdout


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps"])
def test_every_missing_backend_has_a_reason(op, device_type):
    for backend in _backends.BACKENDS:
        reason = _backends.missing_reason(op, backend, device_type)
        assert reason is None or len(reason) > 10
    assert _backends.missing_reason(op, "reference", device_type) is None


@pytest.mark.parametrize("op", OPS)
def test_gpu_kernels_wait_until_their_tests_have_passed(op):
    """No kernel is chosen by itself on a GPU generation without a committed test log."""
    for backend in ("cuda", "triton"):
        assert "have not passed on sm_123" in _backends.unproven_reason(op, backend, (12, 3))


@pytest.fixture
def proven_gpu(monkeypatch):
    """A choice as on a GPU whose kernels have all passed their tests; nothing runs there."""
    monkeypatch.setattr(_backends, "missing_reason", lambda op, backend, device_type: None)
    monkeypatch.setattr(_backends, "_capability", lambda device: (9, 0))
    proven = {(op, backend): frozenset({(9, 0)}) for op in OPS for backend in ("cuda", "triton")}
    monkeypatch.setattr(_backends, "PROVEN", proven)
    _backends._resolve.cache_clear()
    yield torch.device("cuda", 0)
    _backends._resolve.cache_clear()


def test_the_choice_on_a_gpu_goes_by_width(proven_gpu):
    def choose(width, itemsize=4):
        return _backends.choose("orthogonal_filter", proven_gpu, width, itemsize)

    assert [choose(width) for width in (1, 128, 129, 512, 4096)] == ["triton", "triton", "cuda", "cuda", "cuda"]
    assert [choose(width, 8) for width in (64, 65)] == ["triton", "cuda"]
    assert _backends.choose("gradient_activation_", proven_gpu) == "triton"
    lines = _info._op_lines("orthogonal_filter", proven_gpu)
    assert lines[0].endswith(": triton; above width 128 in float32 and 64 in float64: cuda")
    assert lines[2] == "  not cuda: triton comes first"


def test_nothing_unproven_is_chosen_on_a_gpu(proven_gpu, monkeypatch):
    monkeypatch.setattr(_backends, "PROVEN", {("orthogonal_filter", "cuda"): frozenset({(9, 0)})})
    assert _backends.choose("orthogonal_filter", proven_gpu, 64) == "cuda"
    monkeypatch.setattr(_backends, "PROVEN", {})
    _backends._resolve.cache_clear()
    assert _backends.choose("orthogonal_filter", proven_gpu, 64) == "reference"
    with lcw_ops.use_backend("triton"):
        assert _backends.choose("orthogonal_filter", proven_gpu, 128) == "triton"


def test_a_request_that_is_too_wide_names_the_width(proven_gpu):
    with lcw_ops.use_backend("triton"):
        with pytest.raises(lcw_ops.BackendError, match="but width 300 > 128, the most triton takes in float32"):
            _backends.choose("orthogonal_filter", proven_gpu, 300)
        with pytest.raises(lcw_ops.BackendError, match="but width 65 > 64, the most triton takes in float64"):
            _backends.choose("orthogonal_filter", proven_gpu, 65, 8)
        assert (
            "above width 128 in float32 and 64 in float64: none" in _info._op_lines("orthogonal_filter", proven_gpu)[0]
        )


def test_info_names_versions_devices_and_reasons():
    text = lcw_ops.info()
    assert f"torch {torch.__version__}" in text
    assert "CPU:" in text
    for op in OPS:
        assert f"{op} on cpu:" in text
    for line in text.splitlines():
        if line.startswith("  not "):
            assert len(line.split(":", 1)[1]) > 10


def test_info_says_what_was_requested():
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
    """The package without its shared libraries: the same results from the reference, and info() says why."""
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


def test_importing_is_light():
    """No compiler, GPU context, plotting or machine-learning library is touched by the import."""
    code = (
        "import sys, lcw_ops\n"
        "heavy = {'matplotlib', 'sklearn', 'rich', 'triton', 'jax'} & set(sys.modules)\n"
        "import torch\n"
        "print(sorted(heavy - {'triton'}), torch.cuda.is_initialized())"
    )
    assert run_python(code).stdout.split("\n")[0] == "[] False"


@pytest.mark.parametrize("op", OPS)
def test_every_implemented_backend_is_declared(op):
    for backend in _backends.IMPLEMENTED[op]:
        assert _library.get_overload(op, backend) is not None
