"""csrc/cuda without a GPU: the kernels, compiled as C++ against an emulator of threads, barriers and shuffles.

What the interpreter is to Triton, cuda_emulator/cuda_runtime.h is to CUDA: it shows wrong indices, sums and missing
barriers. The GPU itself is tested by ``make gpu``.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lcw_ops
from lcw_ops.ops import _backends

ROOT = Path(__file__).parent.parent
EMULATOR = Path(__file__).parent / "cuda_emulator"
COMPILER = shutil.which("g++")
IN_SUBPROCESS = os.environ.get("LCW_OPS_CUDA_EMULATED") == "1"


def as_cpp(source: str) -> str:
    """CUDA's own syntax replaced: launches, dynamic shared memory, the stream, the device guard, the dispatch key."""
    source = re.sub(
        r"(\w+<T>)<<<(.+?), (\w+), (\w+), .+?>>>\(pass\);", r"emulated_launch(\2, \3, \4, [&] { \1(pass); });", source
    )
    source = re.sub(
        r"extern __shared__ .*unsigned char memory\[\];", "unsigned char* memory = emulated_shared();", source
    )
    no_stream = "cudaStream_t current_stream(const Tensor&) { return nullptr; }\n"
    source = re.sub(r"cudaStream_t current_stream\(.*?\n}\n", no_stream, source, flags=re.S)
    source = re.sub(r".*DeviceGuard guard.*\n", "", source)
    # Two warps show what eight do, and start four times as fast.
    source = source.replace("block_threads = 256", "block_threads = 64")
    assert "<<<" not in source
    return source.replace("STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CUDA, m)", "STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m)")


@pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")
@pytest.mark.skipif(IN_SUBPROCESS, reason="this is the process that the test below starts")
def test_kernels_under_the_emulator(tmp_path):
    """In a process of its own, where the op's CUDA overload runs on the CPU."""
    generated, library = tmp_path / "emulated.cpp", tmp_path / "emulated.so"
    generated.write_text(as_cpp((ROOT / "csrc/cuda/orthogonal_filter.cu").read_text()))
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [f"-I{folder}" for folder in (EMULATOR, torch_folder / "include", ROOT / "csrc")]
    links = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-lpthread"]
    subprocess.run([COMPILER, *flags, *includes, generated, *links, "-o", library], check=True)
    environment = {**os.environ, "LCW_OPS_CUDA_EMULATED": "1", "LCW_OPS_EMULATED_LIBRARY": str(library)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


if IN_SUBPROCESS:
    from test_orthogonal_filter import NAMES, make_arguments, make_filter, op, run, to_float64

    torch.ops.load_library(os.environ["LCW_OPS_EMULATED_LIBRARY"])

    @pytest.fixture(autouse=True)
    def _emulated(monkeypatch):
        monkeypatch.setattr(_backends, "missing_reason", lambda op, backend, device_type: None)
        _backends._resolve.cache_clear()
        yield
        _backends._resolve.cache_clear()

    def assert_matches_float64(rows, width, depth, shared, kind, activation, return_states, segment, dtype):
        arguments = make_arguments(rows, width, depth, shared, dtype)
        filter = make_filter(kind, depth, width, dtype)
        options = {"activation": activation, "return_states": return_states}
        with lcw_ops.use_backend("cuda"):
            output = run(arguments, filter, segment=segment, **options)
            grad_output = torch.randn_like(output)
            gradients = torch.autograd.grad(output, arguments, grad_output)
        exact_arguments, exact_filter = to_float64(arguments, filter)
        with lcw_ops.use_backend("reference"):
            exact = run(exact_arguments, exact_filter, **options)
            expected = torch.autograd.grad(exact, exact_arguments, grad_output.double(), materialize_grads=True)
        # A few steps of sums of at most 70 terms: no more than a hundred roundings of the scale.
        tolerance = 100 * torch.finfo(dtype).eps
        for name, a, b in zip(["output", *NAMES], [output, *gradients], [exact, *expected], strict=True):
            if b.numel():
                error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)
                assert error < tolerance, f"{name}: {error:.3g}"

    @pytest.mark.parametrize("kind", ["matrix", "permutation", "per_layer"])
    @pytest.mark.parametrize(("activation", "shared"), itertools.product(["tanh", "relu", "sigmoid"], [False, True]))
    def test_every_kind(kind, activation, shared):
        for return_states in (False, True):
            assert_matches_float64(2, 19, 5, shared, kind, activation, return_states, 2, torch.float32)

    @pytest.mark.parametrize(
        ("rows", "width", "depth", "segment"),
        [(1, 1, 1, None), (3, 33, 4, 1), (2, 70, 3, None), (0, 4, 3, None), (3, 4, 0, None), (2, 64, 5, 3)],
    )
    @pytest.mark.parametrize("return_states", [False, True])
    def test_every_size(rows, width, depth, segment, return_states):
        assert_matches_float64(rows, width, depth, False, "matrix", "tanh", return_states, segment, torch.float64)

    def test_state_gradients_equal_the_cpu_kernels():
        h0, weight, bias, alpha, beta, _ = [t.detach() for t in make_arguments(2, 6, 9, dtype=torch.float64)]
        shared = (weight, bias, make_filter("matrix", 9, 6, torch.float64), alpha, beta, None, "tanh", 4)
        grad_output = torch.randn_like(h0)
        emulated = op.state_gradients(grad_output, h0, *shared, "cuda")
        on_cpu = op.state_gradients(grad_output, h0, *shared, "cpp")
        for a, b in zip(emulated, on_cpu, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
