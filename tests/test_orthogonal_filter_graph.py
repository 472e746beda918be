"""The recurrence in blocks of matmuls, for every kind of filter and block length; on a GPU, as CUDA graphs too."""

import contextlib
import dataclasses
import weakref

import pytest
import torch
from support.numerics import assert_as_exact_as_eager
from support.recurrence import NAMES, make_arguments, make_filter
from torch._inductor.utils import is_cudagraph_unsafe_fx_node
from torch._subclasses.fake_tensor import FakeTensorMode

import lcw_ops
from lcw_ops import _info
from lcw_ops.ops import backends, library
from lcw_ops.ops.orthogonal_filter import crossover, graph, op
from lcw_ops.reference.orthogonal_filter import orthogonal_filter, orthogonal_filter_backward

RESULTS = ("output", "h0", "weight", "bias", "alpha", "beta", "inputs", "states")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Blocks of 3 steps, so that short runs take several blocks and a remainder."""
    monkeypatch.setattr(graph, "MOST_STEPS", 3)


def problem(
    device, rows, width, depth, shared=False, kind="matrix", dtype=torch.float32, weight_dtype=None, without=()
):
    made = [tensor.detach() for tensor in make_arguments(rows, width, depth, shared, dtype, device)]
    h0, weight, bias, alpha, beta, inputs = (
        None if name in without else tensor for name, tensor in zip(NAMES, made, strict=True)
    )
    return (
        h0,
        weight.to(weight_dtype or dtype),
        bias,
        make_filter(kind, depth, width, dtype, device),
        alpha,
        beta,
        inputs,
    )


def by_graph(tensors, grad_output, depth, activation="tanh", segment=4, return_states=False):
    options = (depth, activation, segment)
    output, checkpoints = graph.orthogonal_filter(*tensors, *options, return_states)
    needs = (True, tensors[2] is not None, True, tensors[6] is not None, True)
    return [output, *graph.orthogonal_filter_backward(grad_output, checkpoints, *tensors[1:], *options, *needs)]


def by_reference(tensors, grad_output, activation, return_states, dtype):
    tensors = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
    output = orthogonal_filter(*tensors, activation, return_states)
    gradients = orthogonal_filter_backward(grad_output.to(dtype), *tensors, activation, return_states=return_states)
    return [output, *gradients]


def assert_right(tensors, depth, activation="tanh", segment=4, return_states=False):
    h0, weight = tensors[:2]
    shape = (depth + 1, *h0.shape) if return_states else h0.shape
    # On a few numbers, such as the gradients of seven alphas, the largest error is a matter of chance.
    few = min(tensor.numel() for tensor in tensors if tensor is not None) < 64
    draws = []
    for _ in range(4 if few else 1):
        grad_output = torch.randn(shape, dtype=h0.dtype, device=h0.device)
        actual = by_graph(tensors, grad_output, depth, activation, segment, return_states)
        eager = by_reference(tensors, grad_output, activation, return_states, h0.dtype)
        exact = by_reference(tensors, grad_output, activation, return_states, torch.float64)
        eager[2] = eager[2].to(weight.dtype)
        draws.append(zip(actual, eager, exact, strict=True))
    for name, *draw in zip(RESULTS, *draws, strict=True):
        if draw[0][2] is not None:
            assert all(a.dtype == e.dtype for a, e, _ in draw), name
            assert_as_exact_as_eager(name, *(torch.stack(column) for column in zip(*draw, strict=True)))


@pytest.mark.parametrize("kind", ["matrix", "permutation", "per_layer"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "identity"])
@pytest.mark.parametrize("return_states", [False, True])
def test_every_kind(kind, shared, activation, return_states, device):
    assert_right(problem(device, 6, 40, 11, shared, kind), 11, activation, return_states=return_states)


@pytest.mark.parametrize(("rows", "width", "depth"), [(0, 4, 5), (3, 4, 0), (1, 1, 1), (5, 33, 2), (2, 7, 20)])
@pytest.mark.parametrize("segment", [1, 3, 5, 100])
def test_every_size_and_segment(rows, width, depth, segment, device):
    segment = min(segment, max(depth, 1))
    assert_right(problem(device, rows, width, depth), depth, segment=segment, return_states=True)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [False, True])
def test_weights_in_16_bits(weight_dtype, shared, device):
    assert_right(problem(device, 5, 30, 7, shared, weight_dtype=weight_dtype), 7)


@pytest.mark.parametrize("without", [("bias",), ("inputs",), ("bias", "inputs")])
def test_without_optional_arguments(without, device):
    assert_right(problem(device, 5, 30, 7, without=without), 7)


def test_scales_shared_by_all_steps(device):
    """Sharing a scale equals repeating it for every step, except that the gradients of the scales are summed."""
    tensors, grad_output = list(problem(device, 5, 30, 7)), torch.randn(5, 30, device=device)
    shared = [*tensors[:4], tensors[4][:1], tensors[5][:1], tensors[6]]
    tensors[4:6] = (scale[:1].expand(7) for scale in tensors[4:6])
    for name, a, b in zip(RESULTS, by_graph(shared, grad_output, 7), by_graph(tensors, grad_output, 7), strict=True):
        if name in ("alpha", "beta"):
            torch.testing.assert_close(a, b.sum().reshape(1), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(a, b), name


def test_only_the_gradients_asked_for(device):
    tensors = problem(device, 5, 30, 7)
    grad_output = torch.randn(5, 30, device=device)
    expected = by_graph(tensors, grad_output, 7)[1:]
    _, checkpoints = graph.orthogonal_filter(*tensors, 7, "tanh", 4, False)
    nothing = graph.orthogonal_filter_backward(grad_output, checkpoints, *tensors[1:], 7, "tanh", 4, *(False,) * 5)
    assert torch.equal(nothing[0], expected[0])
    assert [gradient.numel() for gradient in nothing[1:]] == [0] * 6


def test_calls_are_independent(device):
    """A later call of the same shapes reads its own numbers, and does not overwrite the results of the earlier call."""
    first, second = problem(device, 5, 30, 9), problem(device, 5, 30, 9)
    grad_output = torch.randn(5, 30, device=device)
    once = by_graph(first, grad_output, 9)
    copies = [result.clone() for result in once]
    by_graph(second, grad_output, 9)
    for name, result, copy, again in zip(RESULTS, once, copies, by_graph(first, grad_output, 9), strict=True):
        assert torch.equal(result, copy), name
        assert torch.equal(again, copy), name


@pytest.fixture
def tf32():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield matmul
    matmul.fp32_precision = before


def test_float32_means_float32(device, tf32):
    if device.type != "cuda":
        pytest.skip("TF32 needs a GPU")
    tensors = problem(device, 64, 128, 7)
    under_tf32 = graph.orthogonal_filter(*tensors, 7, "tanh", 4, False)[0]
    tf32.fp32_precision = "ieee"
    assert torch.equal(graph.orthogonal_filter(*tensors, 7, "tanh", 4, False)[0], under_tf32)


def test_settings_are_restored(monkeypatch, tf32):
    """TF32 is off inside ``_exclusively``. Even after an error the user's choice is restored. Needs no GPU."""
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    seen = []

    def fail():
        with graph._exclusively(torch.device("cuda", 0), 1):
            seen.append(tf32.fp32_precision)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert [*seen, tf32.fp32_precision] == ["ieee", "tf32"]
    with graph._exclusively(torch.device("cpu"), 1):
        assert tf32.fp32_precision == "tf32"


@pytest.fixture
def cached_blocks(monkeypatch):
    """On a CPU, cache blocks as on a GPU, but run them without a capture. Their memory starts full of NaN."""
    cached, get = {}, graph._get_block

    def get_block(kind):
        if kind.device.type == "cuda":
            return get(kind)
        if kind not in cached:
            cached[kind] = graph.Block(kind, capture=False)
            for buffer in vars(cached[kind]).values():
                if isinstance(buffer, torch.Tensor) and buffer.is_floating_point():
                    buffer.fill_(torch.nan)
        return cached[kind]

    graph.clear()
    monkeypatch.setattr(graph, "_get_block", get_block)
    return cached


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["permutation", "per_layer"])
def test_cached_blocks_serve_every_length(cached_blocks, shared, kind, device):
    """Depths that take blocks of one to three steps share two sets of buffers, one forward and one backward."""
    for depth in (7, 11, 9):
        assert_right(problem(device, 5, 30, depth, shared, kind), depth, segment=5, return_states=True)
    if device.type != "cuda":
        assert {(block.steps, block.adds_outer) for block in cached_blocks} == {(3, False), (3, True)}


def test_first_called_in_inference_mode(cached_blocks, device):
    """Buffers made in inference mode serve later calls, outside that mode and inside it."""
    tensors = problem(device, 5, 30, 7)
    grad_output = torch.randn(5, 30, device=device)
    with torch.inference_mode():
        first = by_graph(tensors, grad_output, 7)
    second = by_graph(tensors, grad_output, 7)
    with torch.inference_mode():
        third = by_graph(tensors, grad_output, 7)
    for name, a, b, c in zip(RESULTS, first, second, third, strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(b, c), name


def test_arguments_shared_by_all_steps_are_copied_once(device, monkeypatch):
    calls = []
    load_shared = graph.Block.load_shared
    monkeypatch.setattr(graph.Block, "load_shared", lambda *arguments: calls.append(load_shared(*arguments)))
    by_graph(problem(device, 5, 30, 11, shared=True), torch.randn(5, 30, device=device), 11)
    assert len(calls) == 2  # forward, backward


def test_only_arguments_per_step_shorten_a_block(monkeypatch):
    """With width 8 and 2 rows, a step holds 64 numbers for each matrix of its own and 128 for its eight states."""
    monkeypatch.setattr(graph, "MOST_STEPS", 10**6)
    monkeypatch.setattr(graph, "MOST_BYTES", 4 * 128 * 12)

    def steps(shared, kind):
        tensors = problem(torch.device("cpu"), 2, 8, 100, shared, kind)
        return graph._Call(*tensors, 100, "tanh").kind.steps

    assert steps(True, "permutation") == steps(True, "matrix") == 12
    assert steps(False, "matrix") == steps(True, "per_layer") == 8
    assert steps(False, "per_layer") == 6


def test_graphs_are_cached_and_the_least_recently_used_is_evicted(monkeypatch):
    """Blocks are cached unless the caller is capturing a graph. Needs no GPU."""
    monkeypatch.setattr(graph, "_cached", graph.OrderedDict())
    monkeypatch.setattr(graph, "Block", lambda kind, capture: [kind, capture])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kinds = [
        graph.Kind(3, 2, width, torch.float32, torch.device("cuda"), 0, "tanh", True, "matrix", True, False)
        for width in range(1, graph.MOST_BLOCKS + 2)
    ]
    blocks = [graph._get_block(kind) for kind in kinds[:-1]]
    assert all(capture for _, capture in blocks)
    assert graph._get_block(kinds[0]) is blocks[0]
    graph._get_block(kinds[-1])
    assert graph._get_block(kinds[0]) is blocks[0]
    assert graph._get_block(kinds[1]) is not blocks[1]
    assert len(graph._cached) == graph.MOST_BLOCKS
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert graph._get_block(kinds[0]) == [kinds[0], False]
    graph.clear()
    assert not graph._cached


def test_info_counts_the_kept_buffers(monkeypatch):
    monkeypatch.setattr(graph, "_cached", graph.OrderedDict())
    assert "Buffers kept" not in lcw_ops.info()
    kind = graph.Kind(10, 20, 50, torch.float64, torch.device("cpu"), 0, "tanh", True, "permutation", True, False)
    graph._cached[kind] = graph.Block(kind, capture=False)
    numbers = 10 * 50 * 50 + 2 * 50 + 2 * 10 + (1 + 4) * 10 * 20 * 50 + 2 * 11 * 20 * 50
    assert graph.count_cached() == (1, 8 * numbers)
    assert _info.report()["graph_buffers"] == {"blocks": 1, "bytes": 8 * numbers}
    assert f"orthogonal_filter: {8 * numbers / 1e6:.0f} MB in 1 blocks; lcw_ops" in lcw_ops.info()
    graph.clear()
    assert graph.count_cached() == (0, 0)


@pytest.fixture
def full_gpu(monkeypatch):
    """A GPU with too little memory beside the kept blocks: every call fails while there is one. Needs no GPU."""
    monkeypatch.setattr(graph, "_cached", graph.OrderedDict(kept=object()))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    calls, load = [], graph.Block.load

    def load_if_room(*arguments):
        calls.append(bool(graph._cached))
        if graph._cached:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        load(*arguments)

    monkeypatch.setattr(graph.Block, "load", load_if_room)
    return calls


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kept_blocks_make_room(direction, full_gpu):
    tensors = problem(torch.device("cpu"), 5, 30, 3)
    grad_output = torch.randn(5, 30)
    kept = graph._cached.pop("kept")
    expected = by_graph(tensors, grad_output, 3)
    _, checkpoints = graph.orthogonal_filter(*tensors, 3, "tanh", 4, False)
    graph._cached["kept"] = kept
    full_gpu.clear()
    if direction == "forward":
        assert torch.equal(graph.orthogonal_filter(*tensors, 3, "tanh", 4, False)[0], expected[0])
    else:
        arguments = (grad_output, checkpoints, *tensors[1:], 3, "tanh", 4)
        gradients = graph.orthogonal_filter_backward(*arguments, *(True,) * 5)
        assert all(map(torch.equal, gradients, expected[1:]))
    assert full_gpu[:2] == [True, False]
    assert not graph._cached


def test_without_kept_blocks_there_is_no_second_try(full_gpu, monkeypatch):
    tensors = problem(torch.device("cpu"), 5, 30, 3)

    def fail(*_):
        full_gpu.append("failed")
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graph.Block, "load", fail)
    # The second try fails too, and there is no third.
    for tries in (2, 3):
        with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
            graph.orthogonal_filter(*tensors, 3, "tanh", 4, False)
        assert full_gpu == ["failed"] * tries
        assert caught.value.__context__ is None
    graph._cached["kept"] = object()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        graph.orthogonal_filter(*tensors, 3, "tanh", 4, False)
    assert len(full_gpu) == 4
    assert graph._cached


def test_the_failed_call_keeps_no_memory(full_gpu, monkeypatch):
    """When the second try begins, the buffers of the first are gone."""
    made, alive = [], []
    make = graph.Block.__init__

    def remember(block, *arguments, **options):
        alive.append([reference() is not None for reference in made])
        make(block, *arguments, **options)
        made.append(weakref.ref(block))

    monkeypatch.setattr(graph.Block, "__init__", remember)
    graph.orthogonal_filter(*problem(torch.device("cpu"), 5, 30, 3), 3, "tanh", 4, False)
    assert alive == [[], [False]]


@pytest.mark.parametrize("empty", [{"rows": 0}, {"width": 0}, {"rows": 0, "width": 0}])
def test_nothing_is_captured_for_empty_states(empty, monkeypatch):
    """They need no graph, and do not evict one. Needs no GPU."""
    monkeypatch.setattr(graph, "_cached", graph.OrderedDict())
    monkeypatch.setattr(graph, "Block", lambda kind, capture: capture)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kind = graph.Kind(3, 2, 4, torch.float32, torch.device("cuda"), 0, "tanh", True, "matrix", True, False)
    assert graph._get_block(kind)
    assert not graph._get_block(dataclasses.replace(kind, **empty))
    assert list(graph._cached) == [kind]


def test_captured_once_and_replayed(monkeypatch):
    """The first run warms up the libraries, captures, and replays, because a capture executes nothing. Needs no GPU."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def capturing(captured, capture_error_mode):
        calls.append("capture")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(graph.Block, "_forward", lambda self: calls.append("forward"))
    kind = graph.Kind(3, 2, 4, torch.float32, torch.device("cpu"), 0, "tanh", True, "matrix", True, False)
    block = graph.Block(kind, capture=True)
    block.run("forward")
    assert calls == ["forward", "capture", "forward", "replay"]
    block.run("forward")
    assert calls[4:] == ["replay"]
    block.count = 2
    block.run("forward")
    block.run("forward")
    assert calls[5:] == ["forward", "capture", "forward", "replay", "replay"]


def test_captured_by_the_caller(device):
    """While the caller captures a graph, the code makes none of its own and takes memory from the caller's graph."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    tensors = problem(device, 5, 30, 7)
    expected = graph.orthogonal_filter(*tensors, 7, "tanh", 4, False)[0]
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        output = graph.orthogonal_filter(*tensors, 7, "tanh", 4, False)[0]
    tensors[0].neg_()
    captured.replay()
    assert not torch.equal(output, expected)
    assert torch.equal(output, graph.orthogonal_filter(*tensors, 7, "tanh", 4, False)[0])


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_long_capture_is_refused(direction, monkeypatch):
    """On fake CUDA tensors. Needs no GPU."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(graph, "full_float32", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(graph, "MOST_CAPTURED_STEPS", 7)

    def run(steps):
        with FakeTensorMode():
            h0, weight, filter, one = (torch.ones(size, device="cuda") for size in ((2, 4), (4, 4), (4, 4), 1))
            arguments = (weight, None, filter, one, one, None, steps, "tanh", 5)
            if direction == "forward":
                return graph.orthogonal_filter(h0, *arguments, False)
            checkpoints = torch.ones(2, 2, 4, device="cuda")
            return graph.orthogonal_filter_backward(h0, checkpoints, *arguments, True, *(False,) * 4)

    graph._refuse_long_capture(7)
    with pytest.raises(RuntimeError, match="has 8 steps while a CUDA graph is captured; expected at most 7"):
        run(8)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    graph._refuse_long_capture(8)


@pytest.mark.parametrize("name", [op.NAME, op.BACKWARD])
def test_compiled_cuda_graphs_leave_it_out(name):
    """torch.compile(mode="reduce-overhead") puts the other kernels into its graphs, but not this one."""
    program = torch.fx.Graph()
    for backend in op.BACKENDS:
        node = program.call_function(library.get_overload(name, backend))
        assert is_cudagraph_unsafe_fx_node(node) == (backend == op.GRAPH)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("without", [(), ("bias",), ("inputs",)])
def test_the_registered_op(device, weight_dtype, without):
    tensors = problem(device, 3, 5, 4, weight_dtype=weight_dtype, without=without)
    is_there = (True, tensors[2] is not None, True, tensors[6] is not None, True)
    output, checkpoints = library.get_overload(op.NAME, op.GRAPH)(*tensors, 4, "tanh", 2, False)
    gradients = library.get_overload(op.BACKWARD, op.GRAPH)(
        torch.ones_like(output), checkpoints, *tensors[1:], 4, "tanh", 2, *is_there
    )
    direct = by_graph(tensors, torch.ones_like(output), 4, segment=2)
    assert all(torch.equal(a, b) for a, b in zip([output, *gradients], direct, strict=True))
    torch.library.opcheck(library.get_overload(op.NAME, op.GRAPH), (*tensors, 4, "tanh", 2, False))
    arguments = (torch.ones_like(output), checkpoints, *tensors[1:], 4, "tanh", 2)
    for needs in (is_there, (False,) * 5):
        torch.library.opcheck(library.get_overload(op.BACKWARD, op.GRAPH), (*arguments, *needs))


def test_the_op_checks_its_arguments(device):
    h0, weight, bias, *rest = problem(device, 3, 5, 4)
    forward = library.get_overload(op.NAME, op.GRAPH)
    with pytest.raises(ValueError, match="shapes that do not fit"):
        forward(h0, weight[..., :4], bias, *rest, 4, "tanh", 2, False)
    with pytest.raises(ValueError, match="dtypes or devices that do not fit"):
        forward(h0.double(), weight, bias, *rest, 4, "tanh", 2, False)


@pytest.mark.parametrize(
    ("table", "chosen"),
    [
        (None, {8: "triton", 64: "triton", 65: "cuda", 512: "cuda", 513: "graph", 4096: "graph"}),
        ((("cuda", 32), ("triton", 64), ("graph", None)), {32: "cuda", 33: "triton", 65: "graph", 2000: "graph"}),
    ],
)
def test_the_crossover_table_decides(monkeypatch, table, chosen):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backends, "missing_reason", lambda op, backend, device_type: None)
    names = ("cuda", "triton", "graph")
    monkeypatch.setattr(backends, "PROVEN", {(op.NAME, name): frozenset({(9, 0)}) for name in names})
    if table is not None:
        monkeypatch.setattr(crossover, "MEASURED", {(9, 0): table})
    backends._resolve.cache_clear()
    try:
        assert {width: op.choose_kernel(card, width, 4) for width in chosen} == chosen
        assert op.choose_kernel(card, 512, 8) == "graph"
        with lcw_ops.use_backend("cuda"):
            assert op.choose_kernel(card, 8, 4) == "cuda"
            assert op.choose_kernel(card, 4096, 4) == "graph"
        with lcw_ops.use_backend("reference"):
            assert op.choose_kernel(card, 8, 4) == "reference"
    finally:
        backends._resolve.cache_clear()


def test_nothing_is_automatic_before_it_is_proven(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 3))
    monkeypatch.setattr(backends, "missing_reason", lambda op, backend, device_type: None)
    backends._resolve.cache_clear()
    try:
        assert {op.choose_kernel(torch.device("cuda", 0), width, 4) for width in (8, 300, 1000)} == {"reference"}
    finally:
        backends._resolve.cache_clear()
