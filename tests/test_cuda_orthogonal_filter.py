"""The recurrence's kernels in csrc/cuda, on a GPU or on the emulator that test_cuda_emulated.py starts.

Small shapes reach every path: clusters of blocks of every size, tiles of the batch of every height, matrices that stay
in shared memory and matrices that are read in every step, rows that the copy engine takes and rows that it does not.
"""

import contextlib
import os

import pytest
import torch
from support.numerics import assert_as_exact_as_eager
from support.recurrence import NAMES, make_arguments, make_filter, run

import lcw_ops
from lcw_ops.ops import backends
from lcw_ops.ops.orthogonal_filter import op
from lcw_ops.reference.orthogonal_filter import orthogonal_filter, orthogonal_filter_backward

DEVICE = torch.device(os.environ.get("LCW_OPS_TEST_DEVICE", "cpu"))
EMULATED = os.environ.get("LCW_OPS_EMULATED_LIBRARY")
if EMULATED:
    torch.ops.load_library(EMULATED)
elif DEVICE.type != "cuda":
    pytest.skip("no GPU requested; test_cuda_emulated.py starts a process that needs none", allow_module_level=True)

on_emulator = pytest.mark.skipif(not EMULATED, reason="a GPU's shared memory is fixed, and its process cannot fork")
RESULTS = ("output", "h0", "weight", "bias", "alpha", "beta", "inputs", "states")


@pytest.fixture(params=["rows", "cluster"])
def kernel(request, monkeypatch):
    monkeypatch.setenv("LCW_OPS_CUDA_KERNEL", request.param)


@pytest.fixture
def cluster(monkeypatch):
    """Request the cluster kernel: if it cannot run, the op raises an error."""
    monkeypatch.setenv("LCW_OPS_CUDA_KERNEL", "cluster")


def problem(rows, width, depth, shared=False, kind="matrix", dtype=torch.float32, weight_dtype=None, without=()):
    """The op's tensors in the order of its arguments."""
    made = [tensor.detach() for tensor in make_arguments(rows, width, depth, shared, dtype, DEVICE)]
    h0, weight, bias, alpha, beta, inputs = (
        None if name in without else tensor for name, tensor in zip(NAMES, made, strict=True)
    )
    filter = make_filter(kind, depth, width, dtype, DEVICE)
    return h0, weight.to(weight_dtype or dtype), bias, filter, alpha, beta, inputs


def by_kernel(tensors, grad_output, depth, activation="tanh", segment=2, return_states=False):
    options = (depth, activation, segment)
    output, checkpoints = torch.ops.lcw_ops.orthogonal_filter.cuda(*tensors, *options, return_states)
    needs = (True, tensors[2] is not None, True, tensors[6] is not None, True)
    backward = torch.ops.lcw_ops.orthogonal_filter_backward.cuda
    return [output, *backward(grad_output, checkpoints, *tensors[1:], *options, *needs)]


def by_reference(tensors, grad_output, activation, return_states, dtype):
    tensors = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
    output = orthogonal_filter(*tensors, activation, return_states)
    gradients = orthogonal_filter_backward(grad_output.to(dtype), *tensors, activation, return_states=return_states)
    return [output, *gradients]


def assert_right(tensors, depth, activation="tanh", segment=2, return_states=False):
    """Allow 100 ulp of the result's scale beside eager's error: a few steps, each a sum of up to 512 terms."""
    h0, weight = tensors[:2]
    grad_output = torch.randn((depth + 1, *h0.shape) if return_states else h0.shape, dtype=h0.dtype, device=DEVICE)
    actual = by_kernel(tensors, grad_output, depth, activation, segment, return_states)
    eager = by_reference(tensors, grad_output, activation, return_states, h0.dtype)
    exact = by_reference(tensors, grad_output, activation, return_states, torch.float64)
    for name, a, e, x in zip(RESULTS, actual, eager, exact, strict=True):
        if x is None or x.numel() == 0:
            continue
        assert a.shape == x.shape, name
        assert a.dtype == (weight.dtype if name == "weight" else h0.dtype), name
        rounding = torch.finfo(a.dtype).eps / 2 if a.dtype != h0.dtype else 0
        allowed = (100 * torch.finfo(h0.dtype).eps + rounding) * x.abs().max() + (e.double() - x).abs().max()
        error = (a.double() - x).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def test_as_exact_as_eager(cluster):
    """The error is within twice eager's. There are enough steps and rows for chance to even out."""
    tensors, grad_output = problem(12, 100, 40), torch.randn(12, 100, device=DEVICE)
    actual = by_kernel(tensors, grad_output, 40, "tanh", 8)
    eager = by_reference(tensors, grad_output, "tanh", False, torch.float32)
    exact = by_reference(tensors, grad_output, "tanh", False, torch.float64)
    for name, *results in zip(RESULTS, actual, eager, exact, strict=True):
        assert_as_exact_as_eager(name, *results)


@pytest.mark.parametrize("kind", ["matrix", "permutation", "per_layer"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "identity"])
def test_every_kind(kernel, kind, shared, activation):
    for return_states in (False, True):
        assert_right(problem(3, 37, 5, shared, kind), 5, activation, 2, return_states)


@pytest.mark.parametrize(
    ("rows", "width", "depth", "segment"),
    [(1, 1, 1, 1), (3, 33, 4, 1), (2, 70, 3, 3), (0, 4, 3, 2), (3, 4, 0, 2), (2, 64, 5, 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_size(rows, width, depth, segment, dtype):
    for return_states in (False, True):
        assert_right(problem(rows, width, depth, dtype=dtype), depth, "tanh", segment, return_states)


# The cases reach clusters of one, two, four and eight blocks; tiles of 4, 8 and 16 rows, full and partial; and widths
# that the copy engine takes (40, 64), takes in 32 bits only (100), or does not take (31, 99, 130).
@pytest.mark.parametrize(("width", "rows"), [(31, 17), (40, 5), (40, 9), (64, 21), (99, 3), (100, 5), (130, 1)])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clusters_and_tiles(cluster, width, rows, weight_dtype):
    for shared in (False, True):
        assert_right(problem(rows, width, 4, shared, weight_dtype=weight_dtype), 4, return_states=shared)


@pytest.mark.parametrize("kind", ["matrix", "permutation"])
@pytest.mark.parametrize(("width", "rows"), [(300, 1)] if EMULATED else [(256, 70), (360, 33), (512, 33), (512, 300)])
def test_wide(cluster, width, rows, kind):
    for shared in (False, True):
        assert_right(problem(rows, width, 4, shared, kind), 4)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_without_clusters(monkeypatch, weight_dtype):
    monkeypatch.setenv("LCW_OPS_CUDA_KERNEL", "rows")
    for shared in (False, True):
        assert_right(problem(3, 37, 4, shared, weight_dtype=weight_dtype), 4)


@pytest.mark.parametrize("kind", ["matrix", "permutation", "per_layer"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kilobytes", [27, 34, 42, 227])
def test_matrices_that_stay_on_chip_and_that_stream(cluster, monkeypatch, kind, shared, kilobytes):
    """Each matrix has four chunks. There is room for two of them, for a few more, or for all."""
    monkeypatch.setenv("LCW_OPS_EMULATED_SHARED_BYTES", str(kilobytes << 10))
    assert_right(problem(5, 100, 5, shared, kind), 5, segment=3)


@on_emulator
def test_no_room_for_a_cluster(cluster, monkeypatch):
    monkeypatch.setenv("LCW_OPS_EMULATED_SHARED_BYTES", str(20 << 10))
    with pytest.raises(RuntimeError, match="LCW_OPS_CUDA_KERNEL=cluster needs"):
        assert_right(problem(5, 100, 2), 2)
    monkeypatch.delenv("LCW_OPS_CUDA_KERNEL")
    assert_right(problem(5, 100, 2), 2)


@pytest.mark.parametrize("without", [("bias",), ("inputs",), ("bias", "inputs")])
def test_without_optional_arguments(kernel, without):
    assert_right(problem(2, 36, 3, without=without), 3)


def test_memory_that_starts_anywhere(cluster):
    """The copy engine refuses matrices that do not start at a multiple of 16 bytes."""
    tensors = list(problem(3, 40, 3))
    for index in (1, 3):
        storage = torch.empty(tensors[index].numel() + 1, device=DEVICE)
        tensors[index] = storage[1:].view_as(tensors[index]).copy_(tensors[index])
    assert_right(tensors, 3)


def test_rows_do_not_depend_on_their_tile(cluster):
    """A row has the same bits in a tile of 4 and in a tile of 16."""
    h0, *others, inputs = problem(20, 40, 5, shared=True)
    grad_output = torch.randn(20, 40, device=DEVICE)
    many = by_kernel((h0, *others, inputs), grad_output, 5)
    few = by_kernel((h0[:3], *others, inputs[:, :3]), grad_output[:3], 5)
    for name in ("output", "h0"):
        index = RESULTS.index(name)
        assert torch.equal(many[index][:3], few[index]), name
    assert torch.equal(many[-1][:, :3], few[-1])


def test_a_row_that_overflows_leaves_the_others_alone(cluster):
    tensors = problem(6, 40, 4)
    expected = by_kernel(tensors, torch.ones(6, 40, device=DEVICE), 4)[0]
    tensors[0][5] = torch.inf
    assert torch.equal(by_kernel(tensors, torch.ones(6, 40, device=DEVICE), 4)[0][:5], expected[:5])


@on_emulator
@pytest.mark.parametrize("filter", [torch.arange(40) // 2, torch.arange(40) + 1])
def test_a_filter_that_is_not_a_permutation_ends_the_kernel(cluster, filter):
    """The public function checks filters. A direct call of the op gets an error, not a GPU that waits for ever."""
    _, weight, bias, _, alpha, beta, _ = problem(2, 40, 2)
    child = os.fork()
    if child == 0:
        zeros = torch.zeros(1, 2, 40)
        arguments = (zeros[0], zeros, weight, bias, filter, alpha, beta, None, 2, "tanh", 2)
        with contextlib.suppress(RuntimeError):  # an error raised by a check in C++ is right too
            torch.ops.lcw_ops.orthogonal_filter_backward.cuda(*arguments, False, False, False, False, False)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] != 0


def test_through_the_public_function(monkeypatch):
    monkeypatch.setattr(backends, "missing_reason", lambda op, backend, device_type: None)
    backends._resolve.cache_clear()
    arguments = make_arguments(2, 40, 4, device=DEVICE)
    filter = make_filter("matrix", 4, 40, device=DEVICE)
    with lcw_ops.use_backend("cuda"):
        output = run(arguments, filter, segment=2)
        gradients = torch.autograd.grad(output.sum(), arguments)
    backends._resolve.cache_clear()
    tensors = [argument.detach() for argument in arguments]
    tensors.insert(3, filter)
    direct = by_kernel(tensors, torch.ones(2, 40, device=DEVICE), 4)
    for a, b in zip([output, *gradients], direct, strict=False):
        assert torch.equal(a, b)


@on_emulator
def test_state_gradients_equal_the_cpu_kernels():
    h0, weight, bias, filter, alpha, beta, _ = problem(2, 6, 9, dtype=torch.float64)
    shared = (weight, bias, filter, alpha, beta, None, "tanh", 4)
    grad_output = torch.randn_like(h0)
    emulated = op.state_gradients(grad_output, h0, *shared, "cuda")
    on_cpu = op.state_gradients(grad_output, h0, *shared, "cpp")
    for a, b in zip(emulated, on_cpu, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
