"""The pool that keeps the memory of large results on the CPU from one training step to the next.

The first half tests the pool itself, the second the tensors that the ops make in its memory. There the least size is
lowered, so that small layers have "large" results. Run as a script, this file is one of two processes (gloo) that train
a model in torch's wrappers for data-parallel training.
"""

import copy
import ctypes
import functools
import gc
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from support.processes import run_ranks
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

import lcw_ops
from lcw_ops import _info, _pool, nn
from lcw_ops import functional as F
from lcw_ops.ops import memory_pool

LAYERS, SAMPLES, UNITS = 64, 8, 32
# The gradient of the weight, LAYERS x UNITS x UNITS, has four times as many bytes; a state has far fewer.
LEAST = 1 << 16
MB = 1 << 20
RANKS, TIMEOUT = 2, 120

needs_linux = pytest.mark.skipif(not _pool.IS_SUPPORTED, reason="the pool needs Linux")


@pytest.fixture
def pool():
    if not _pool.IS_SUPPORTED:
        pytest.skip("the pool needs Linux")
    return _pool.Pool(64 * MB)


def address(lease) -> int:
    return torch.frombuffer(lease, dtype=torch.uint8).data_ptr()


def in_child(function) -> str:
    """Run ``function`` in a forked process. Returns its result, or the error that it raised there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(function())
        except BaseException as error:
            text = repr(error)
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


def test_blocks_start_on_large_pages_and_are_whole(pool):
    for count in (1, 5 * MB, 2 * MB):
        lease = pool.lend(count)
        assert len(lease) == count
        assert address(lease) % _pool.PAGE == 0
        lease[0], lease[-1] = 1, 2
    # The last request took the block of the first one.
    assert pool.count_bytes() == (6 * MB, 2 * MB)


def test_memory_comes_back_when_the_last_view_has_died(pool):
    lease = pool.lend(3 * MB)
    first = address(lease)
    tensor = torch.frombuffer(lease, dtype=torch.float32)
    part = tensor[5:7]
    del lease, tensor
    assert pool.count_bytes() == (0, 4 * MB)
    assert address(pool.lend(3 * MB)) != first
    pool.empty()
    del part
    assert pool.count_bytes() == (4 * MB, 0)
    assert address(pool.lend(3 * MB)) == first


def test_the_smallest_block_that_fits_is_taken(pool):
    leases = {size: pool.lend(size * MB) for size in (8, 10, 12)}
    place = {size: address(lease) for size, lease in leases.items()}
    leases.clear()
    assert address(pool.lend(10 * MB - 5)) == place[10]
    # Blocks of 10 MB and 12 MB are more than 1.25 times as large as 6 MB and as 8 MB less a page.
    small = pool.lend(6 * MB)
    assert address(small) not in place.values()
    assert address(pool.lend(8 * MB)) == place[8]
    # A block of 10 MB serves 8 MB exactly 1.25 times.
    both = pool.lend(8 * MB), pool.lend(8 * MB)
    assert [address(lease) for lease in both] == [place[8], place[10]]


def test_blocks_beyond_the_limit_are_unmapped_the_oldest_first(pool):
    pool.set_limit(12 * MB)
    leases = [pool.lend(4 * MB) for _ in range(4)]
    place = [address(lease) for lease in leases]
    for index in (2, 0, 3, 1):
        leases[index] = None
    assert pool.count_bytes() == (12 * MB, 0)
    taken = [pool.lend(4 * MB) for _ in range(3)]
    # The last that came back is the first to be used again.
    assert [address(lease) for lease in taken] == [place[1], place[3], place[0]]
    taken.clear()
    pool.set_limit(5 * MB)
    assert pool.count_bytes() == (4 * MB, 0)
    lease = pool.lend(4 * MB)
    pool.set_limit(0)
    assert pool.count_bytes() == (0, 4 * MB)
    del lease
    assert pool.count_bytes() == (0, 0)


def test_empty_keeps_what_is_lent(pool):
    lease, other = pool.lend(2 * MB), pool.lend(2 * MB)
    lease[7] = 5
    del other
    pool.empty()
    assert pool.count_bytes() == (0, 2 * MB)
    assert lease[7] == 5


def test_a_block_may_come_back_inside_a_method_of_the_pool(pool):
    """The garbage collector may run at any time. A finalizer that waited for the lock would wait for its own thread."""
    lease = pool.lend(2 * MB)
    with pool._lock:
        del lease
    assert pool.count_bytes() == (2 * MB, 0)


def test_a_block_comes_back_from_a_reference_cycle(pool):
    lease = pool.lend(2 * MB)
    cycle = [lease]
    cycle.append(cycle)
    del lease, cycle
    gc.collect()
    assert pool.count_bytes() == (2 * MB, 0)


@pytest.fixture
def handle_interrupts():
    """Sets the handler of SIGINT for a test. Python sets none if its process was started with SIGINT ignored."""
    before = signal.getsignal(signal.SIGINT)
    yield functools.partial(signal.signal, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


class Interrupting(weakref.ref):
    """Presses Ctrl-C when its object has died. Python then has a pending signal, and has run no code since."""

    # PyErr_SetInterrupt gets the reference as an argument, and ignores it.
    _as_parameter_ = 0

    def __new__(cls, thing):
        return super().__new__(cls, thing, ctypes.pythonapi.PyErr_SetInterrupt)


def test_a_returning_block_does_not_take_an_interrupt_away(pool, handle_interrupts):
    """Python would print the KeyboardInterrupt of a finalizer and go on, and the block would never come back."""
    handle_interrupts(signal.default_int_handler)
    leases = [pool.lend(2 * MB)]
    interrupting = Interrupting(leases[0])
    with pytest.raises(KeyboardInterrupt):
        leases.clear()
    assert interrupting() is None
    assert pool.count_bytes() == (2 * MB, 0)


def test_no_two_threads_have_the_same_memory(pool):
    wrong = []

    def work(mark):
        for turn in range(100):
            lease = pool.lend((1 + turn % 3) * MB)
            tensor = torch.frombuffer(lease, dtype=torch.uint8)[:: 1 << 16]
            del lease
            tensor.fill_(mark)
            wrong.extend(tensor[tensor != mark].tolist())

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert pool.count_bytes()[1] == 0


def test_a_block_comes_back_from_another_thread(pool):
    leases = [pool.lend(2 * MB)]
    thread = threading.Thread(target=leases.clear)
    thread.start()
    thread.join()
    assert pool.count_bytes() == (2 * MB, 0)


def test_a_forked_child_starts_with_a_free_lock_and_no_idle_blocks(pool):
    lease, idle, other = (pool.lend(2 * MB) for _ in range(3))
    lease[0] = 1
    del idle
    with pool._lock:
        # The block waits for the lock, and is not the child's. In the child, nobody would release the lock.
        del other
        assert in_child(pool.count_bytes) == str((0, 2 * MB))

    def change():
        nonlocal lease
        before, lease[0] = lease[0], 9
        del lease
        return before, pool.count_bytes()

    # The child had a copy. It came back to the child's own pool, and not to the parent's.
    assert in_child(change) == str((1, (2 * MB, 0)))
    assert lease[0] == 1
    assert pool.count_bytes() == (4 * MB, 2 * MB)


def test_a_failed_mapping_empties_the_pool_and_is_tried_again(pool, monkeypatch):
    block, refusals = _pool.Block, []

    def refuse(size):
        if len(refusals) % 2 == 0 or size == 64 * MB:
            refusals.append(pool.count_bytes())
            raise OSError(12, "Cannot allocate memory")
        refusals.append(None)
        return block(size)

    idle = pool.lend(2 * MB)
    del idle
    monkeypatch.setattr(_pool, "Block", refuse)
    lease = pool.lend(8 * MB)
    assert len(lease) == 8 * MB
    assert refusals[0] == (2 * MB, 8 * MB)
    assert pool.count_bytes() == (0, 8 * MB)
    assert pool.lend(64 * MB) is None
    assert pool.count_bytes() == (0, 8 * MB)


def test_memory_that_the_system_does_not_have_is_refused(pool):
    for count in (1 << 60, 1 << 70):
        assert pool.lend(count) is None
    assert pool.count_bytes() == (0, 0)


def test_the_system_may_take_the_pages_of_idle_blocks(pool):
    lease = pool.lend(4 * MB)
    torch.frombuffer(lease, dtype=torch.uint8).fill_(1)
    start = address(lease)
    assert lazily_freed(start) == 0
    del lease
    assert lazily_freed(start) == 4 * MB


def lazily_freed(start: int) -> int:
    """The bytes of the mapping around ``start`` that the system may take, from /proc/self/smaps."""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first, _, rest = line.partition(" ")
            if "-" in first and ":" not in first:
                begin, end = (int(number, 16) for number in first.split("-"))
                inside = begin <= start < end
            elif inside and first == "LazyFree:":
                return int(rest.split()[0]) << 10
    pytest.skip("this system does not count lazily freed pages")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, None),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/\n", {"memory.max": "1000\n"}, 1000),
        # The limit of a group holds for the groups inside it.
        ("0::/a/b\n", {"a/memory.max": "2000", "a/b/memory.max": "3000"}, 2000),
        # In a container the path may be the host's, and the group's own files at the top.
        ("0::/of/the/host\n", {"memory.max": "5000"}, 5000),
        ("5:cpu:/x\n4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "700", "memory.max": "1"}, 700),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        ("3:cpu,memory:/\n0::/\n", {"memory/memory.limit_in_bytes": "800", "memory.max": "600"}, 600),
    ],
)
@needs_linux
def test_the_memory_of_the_machine_or_of_the_control_group(tmp_path, groups, files, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    everything = _pool.machine_memory(str(tmp_path / "nothing"))
    assert _pool.machine_memory(str(tmp_path)) == (everything if expected is None else expected)


@needs_linux
def test_a_limit_on_the_address_space_counts():
    code = (
        "import resource; from lcw_ops import _pool\n"
        "resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))\n"
        "print(_pool.machine_memory())"
    )
    assert run_python(code).stdout == f"{10**9}\n"


# The tensors that the ops make.


def run_python(code, *flags, **environment):
    result = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result


def use_pool(least: int = LEAST) -> None:
    memory_pool.LEAST_BYTES = least
    lcw_ops.set_memory_pool_limit(256 * MB)


@pytest.fixture
def pooled(monkeypatch):
    """The ops take every result of at least LEAST bytes from this pool, which is new."""
    if memory_pool.missing_reason() is not None:
        pytest.skip(memory_pool.missing_reason())
    # In its deterministic mode torch fills new memory, and the ops leave the allocation to it.
    torch.use_deterministic_algorithms(False)
    least = memory_pool.LEAST_BYTES
    with monkeypatch.context() as patches:
        patches.setattr(memory_pool, "pool", _pool.Pool(0))
        use_pool()
        yield memory_pool.pool
    memory_pool.LEAST_BYTES = least
    lcw_ops.set_memory_pool_limit()


@pytest.fixture
def weight():
    return torch.randn(LAYERS, UNITS, UNITS, requires_grad=True)


H0, FILTER = torch.linspace(-1, 1, SAMPLES * UNITS).view(SAMPLES, UNITS), torch.arange(UNITS).roll(5)


def recur(weight, h0=H0, **options):
    return F.orthogonal_filter(h0, weight, None, FILTER, **options)


def step(weight):
    """The gradient of the weight after a backward pass."""
    recur(weight).sum().backward()
    return weight.grad


def is_pooled(tensor) -> bool:
    return not tensor.untyped_storage().resizable()


def test_steps_share_the_memory_of_the_gradient(pooled, weight):
    first = step(weight).clone()
    place = weight.grad.data_ptr()
    assert place % _pool.PAGE == 0
    assert not weight.grad._is_view()
    for _ in range(3):
        weight.grad = None
        assert pooled.count_bytes() == (2 * MB, 0)
        assert torch.equal(step(weight), first)
        # Autograd has not copied the gradient, and no second block was needed.
        assert weight.grad.data_ptr() == place
        assert pooled.count_bytes() == (0, 2 * MB)


def test_a_gradient_outlives_its_step(pooled, weight):
    kept = [step(weight)]
    expected = kept[0].clone()
    weight.grad = None
    kept.append(step(weight)[3, :2])
    weight.grad = None
    step(weight).zero_()
    assert pooled.count_bytes() == (0, 6 * MB)
    assert torch.equal(kept[0], expected)
    assert torch.equal(kept[1], expected[3, :2])


def test_gradients_are_edited_and_summed_in_place(pooled, weight):
    expected = step(weight).clone()
    place = weight.grad.data_ptr()
    weight.grad.mul_(3)
    step(weight)
    assert torch.equal(weight.grad, 3 * expected + expected)
    torch.optim.SGD([weight], 0.1).zero_grad(set_to_none=False)
    assert torch.equal(step(weight), expected)
    assert weight.grad.data_ptr() == place
    torch.nn.utils.clip_grad_norm_([weight], 1e-3)
    weight.grad = None
    assert torch.equal(step(weight), expected)


LAYER_KINDS = {
    "lcw": lambda: nn.LCWLinear(320, 128),
    "lcw basis": lambda: nn.LCWLinear(320, 128, basis=True),
    "gmp": lambda: nn.GmPLinear(320, 128),
    "weight norm": lambda: nn.WeightNormLinear(320, 128),
}


@pytest.mark.parametrize("samples", [3, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_layers_compute_the_same_bits(pooled, every_multiplier, kind, dtype, samples):
    layer = LAYER_KINDS[kind]().to(dtype)
    x, grad_output = torch.randn(samples, 320, dtype=dtype), torch.randn(samples, 128, dtype=dtype)

    def results():
        layer.zero_grad()
        argument = x.clone().requires_grad_()
        output = layer(argument)
        output.backward(grad_output)
        return {"output": output.detach(), "x": argument.grad, **{n: p.grad for n, p in layer.named_parameters()}}

    with_pool = results()
    large = {name for name, result in with_pool.items() if result.nbytes >= LEAST}
    assert {name for name, result in with_pool.items() if is_pooled(result)} == large
    assert len(large) == (3 if samples == 300 else 1)
    for parameter in layer.parameters():
        parameter.grad = None
    lcw_ops.set_memory_pool_limit(0)
    for name, result in results().items():
        assert not is_pooled(result)
        assert torch.equal(with_pool[name], result), name


@pytest.mark.parametrize(
    "function",
    [
        lambda rows: F.lcw_weight(rows),
        lambda rows: F.lcw_weight(rows, basis=True),
        lambda rows: F.hypersphere_direction(rows),
        lambda rows: F.normalize_scale(rows, torch.ones(len(rows))),
    ],
    ids=["lcw_weight", "basis", "hypersphere_direction", "normalize_scale"],
)
def test_functions_of_rows_use_the_pool(pooled, function):
    rows = torch.randn(64, 512, requires_grad=True)
    output = function(rows)
    output.sum().backward()
    assert is_pooled(output)
    assert is_pooled(rows.grad)


def test_states_and_gradients_of_inputs_use_the_pool(pooled, weight):
    inputs = torch.randn(LAYERS, SAMPLES, UNITS, requires_grad=True)
    states = recur(weight, inputs=inputs, return_states=True)
    states.square().sum().backward()
    assert all(map(is_pooled, (states, inputs.grad, weight.grad)))
    with torch.inference_mode():
        states = recur(weight, return_states=True)
    assert states.is_inference()
    assert is_pooled(states)


def interrupted_op(weight):
    """Press Ctrl-C and call an op, which makes its result in memory of the pool, with no Python code in between."""
    one, steps = torch.ones(1), len(weight)
    op = torch.ops.lcw_ops.orthogonal_filter.cpp._op
    arguments = H0, weight.detach(), None, FILTER, one, one, None, steps, "tanh", 0, True
    calls = functools.partial(ctypes.pythonapi.PyErr_SetInterrupt), functools.partial(op, *arguments)
    return list(map(functools.partial.__call__, calls))[1][0]


def test_an_interrupt_during_an_op_is_raised_after_it(pooled, weight, handle_interrupts):
    handle_interrupts(signal.default_int_handler)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            interrupted_op(weight)
    # The pool works on.
    assert is_pooled(step(weight))


def test_an_error_of_another_handler_is_raised_after_the_op(pooled, weight, handle_interrupts):
    def out_of_time(*_):
        raise TimeoutError("5 seconds are over")

    handle_interrupts(out_of_time)
    with pytest.raises(TimeoutError, match="5 seconds are over"):
        interrupted_op(weight)


def test_a_handler_without_an_error_does_not_stop_the_op(pooled, weight, handle_interrupts):
    calls = []
    handle_interrupts(lambda *_: calls.append(1))
    assert is_pooled(interrupted_op(weight))
    assert calls == [1]


def test_small_results_are_not_pooled(pooled, weight):
    use_pool(weight.nbytes + 1)
    assert not is_pooled(step(weight))
    weight.grad = None
    use_pool(weight.nbytes)
    assert is_pooled(step(weight))


def test_the_least_size_is_that_up_to_which_glibc_keeps_memory():
    assert memory_pool.LEAST_BYTES == 32 * MB


def test_torch_fills_new_memory_in_its_deterministic_mode(pooled, weight):
    torch.use_deterministic_algorithms(True)
    assert not is_pooled(step(weight))
    weight.grad = None
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert is_pooled(step(weight))


def test_torch_allocates_what_the_pool_cannot(pooled, weight, monkeypatch):
    monkeypatch.setattr(_pool, "Block", lambda size: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")))
    gradient = step(weight)
    assert not is_pooled(gradient)
    assert pooled.count_bytes() == (0, 0)
    assert gradient.isfinite().all()


def test_the_pool_is_switched_off_and_emptied(pooled, weight):
    step(weight)
    lcw_ops.set_memory_pool_limit(0)
    weight.grad = None
    assert pooled.count_bytes() == (0, 0)
    gradient = step(weight)
    assert gradient.resize_(LAYERS + 1, UNITS, UNITS).numel() > weight.numel()
    lcw_ops.set_memory_pool_limit()
    weight.grad = None
    step(weight)
    weight.grad = None
    assert pooled.count_bytes() == (2 * MB, 0)
    lcw_ops.empty_memory_pool()
    assert pooled.count_bytes() == (0, 0)


def test_torch_cannot_resize_the_storage(pooled, weight):
    gradient = step(weight)
    for resize in (
        lambda: gradient.untyped_storage().resize_(0),
        lambda: gradient.detach().resize_(LAYERS + 1, UNITS, UNITS),
    ):
        with pytest.raises(RuntimeError, match="Trying to resize storage that is not resizable"):
            resize()
    # A smaller shape, a new tensor and an assignment need no larger storage.
    assert gradient.detach().resize_(3, 4).shape == (3, 4)
    weight.grad.data = torch.ones_like(weight)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    gradient.set_(torch.zeros(3))
    assert pooled.count_bytes() == (2 * MB, 0)


def saved(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


def test_gradients_are_copied_saved_and_read_by_numpy(pooled, weight):
    gradient = step(weight)
    for copied in (pickle.loads(pickle.dumps(gradient)), copy.deepcopy(gradient), saved(gradient)):
        assert torch.equal(copied, gradient)
        assert copied.data_ptr() != gradient.data_ptr()
    array, expected = gradient.numpy(), gradient.clone()
    del gradient
    weight.grad = None
    step(weight).zero_()
    # The array alone has kept the memory.
    assert (array == expected.numpy()).all()
    weight.grad = None
    del array
    assert pooled.count_bytes() == (4 * MB, 0)


def test_shared_memory_is_a_copy(pooled, weight):
    expected = step(weight).clone()
    assert weight.grad.share_memory_().is_shared()
    assert torch.equal(weight.grad, expected)
    assert pooled.count_bytes() == (2 * MB, 0)


def negate(received, answers):
    # The threads of OpenMP's pool do not survive a fork.
    torch.set_num_threads(1)
    gradient = received.get()
    gradient.neg_()
    answers.put(gradient.max().item())
    received.get()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_gradient_is_handed_to_another_process(pooled, weight, method):
    expected = step(weight).clone()
    context = torch.multiprocessing.get_context(method)
    queue, answers = context.Queue(), context.Queue()
    process = context.Process(target=negate, args=(queue, answers))
    process.start()
    queue.put(weight.grad)
    answer = answers.get(timeout=TIMEOUT)
    # torch puts the gradient into shared memory, so the other process has changed it.
    assert torch.equal(weight.grad, -expected)
    assert answer == weight.grad.max().item()
    queue.put(None)
    process.join()
    assert process.exitcode == 0


def test_a_forked_child_computes_and_saves(pooled, weight, tmp_path):
    expected = step(weight).clone()

    def in_the_child():
        saves = torch.equal(saved(weight.grad), expected)
        weight.grad.zero_()
        weight.grad = None
        again = torch.equal(step(weight), expected)
        return saves, again, is_pooled(weight.grad)

    assert in_child(in_the_child) == str((True, True, True))
    assert torch.equal(weight.grad, expected)


class Gradients(torch.utils.data.Dataset):
    def __init__(self, weight):
        self.weight = weight

    def __len__(self):
        return 4

    def __getitem__(self, index):
        weight = self.weight.detach().requires_grad_()
        return self.weight.grad[index], step(weight)[index]


def test_the_workers_of_a_loader_are_forked_between_steps(pooled, weight):
    expected = step(weight).clone()
    loader = DataLoader(Gradients(weight), num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        for index, (inherited, computed) in enumerate(loader):
            assert torch.equal(inherited[0], expected[index])
            assert torch.equal(computed[0], expected[index])
            weight.grad = None
            step(weight)


def test_transforms_use_the_pool(pooled, weight):
    expected, plain = step(weight).clone(), weight.detach()
    gradient = torch.func.grad(lambda weight: recur(weight).sum())(plain)
    assert is_pooled(gradient)
    assert torch.equal(gradient, expected)
    each = torch.func.vmap(torch.func.grad(lambda weight, h0: recur(weight, h0).sum()), (None, 0))(
        plain, torch.stack([H0, H0])
    )
    assert torch.equal(each, torch.stack([expected, expected]))


def test_second_derivatives_are_the_same(pooled, weight):
    def derivatives():
        (gradient,) = torch.autograd.grad(recur(weight).sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), weight)
        return gradient.detach(), second

    gradient, second = derivatives()
    assert is_pooled(gradient)
    lcw_ops.set_memory_pool_limit(0)
    for found, expected in zip((gradient, second), derivatives(), strict=True):
        assert torch.equal(found, expected)


def test_a_compiled_step_uses_the_pool(pooled, weight):
    expected = step(weight).clone()
    compiled = torch.compile(lambda weight: recur(weight).sum(), backend="aot_eager", fullgraph=True)
    places = set()
    for _ in range(3):
        weight.grad = None
        compiled(weight).backward()
        assert is_pooled(weight.grad)
        assert torch.equal(weight.grad, expected)
        places.add(weight.grad.data_ptr())
    assert len(places) == 1


def test_function_modes_do_not_see_the_pool(pooled, weight):
    class Record(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    found = []
    for limit in (256 * MB, 0):
        seen = []
        lcw_ops.set_memory_pool_limit(limit)
        with Record(), torch.no_grad():
            recur(weight, return_states=True)
        found.append(seen)
    assert found[0] == found[1]
    with torch.device("meta"), torch.no_grad():
        assert is_pooled(states := recur(weight, return_states=True)) == (limit > 0)
    assert states.device.type == "cpu"


def test_threads_train_at_the_same_time(pooled):
    weights = [torch.randn(LAYERS, UNITS, UNITS, requires_grad=True) for _ in range(3)]
    expected = [step(weight).clone() for weight in weights]
    wrong = []

    def train(index):
        for _ in range(20):
            weights[index].grad = None
            if not torch.equal(step(weights[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=train, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_info_counts_the_bytes(pooled, weight):
    step(weight)
    line = "Memory pool for large results on the CPU: 2 MB in use, 0 MB idle, of which at most 268 MB are kept"
    assert line in lcw_ops.info().splitlines()
    assert _info.report()["memory_pool"] == {"limit": 256 * MB, "idle": 0, "lent": 2 * MB, "error": None}
    weight.grad = None
    assert _info.report()["memory_pool"]["idle"] == 2 * MB
    lcw_ops.set_memory_pool_limit(0)
    assert "Memory pool for large results on the CPU: off, because its limit is 0" in lcw_ops.info().splitlines()


def test_a_process_without_the_kernels_has_no_pool(monkeypatch):
    monkeypatch.setattr(memory_pool, "_has_kernels", False)
    monkeypatch.setattr(memory_pool, "missing_reason", lambda: "a reason")
    assert "Memory pool for large results on the CPU: off, a reason" in lcw_ops.info().splitlines()
    assert _info.report()["memory_pool"]["error"] == "a reason"
    # An upper limit is kept where there is no pool at all.
    lcw_ops.set_memory_pool_limit(5)
    monkeypatch.undo()
    lcw_ops.set_memory_pool_limit()


@pytest.mark.parametrize("limit", ["4GB", 1.5, True])
def test_a_limit_that_is_not_an_int_is_refused(limit):
    message = rf"set_memory_pool_limit: limit is {limit!r}; expected an int, the number of bytes, or None"
    with pytest.raises(TypeError, match=message):
        lcw_ops.set_memory_pool_limit(limit)


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match=r"set_memory_pool_limit: limit is -1; expected at least 0\. 0 switches"):
        lcw_ops.set_memory_pool_limit(-1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("12345", 12345), ("4GB", 4 * 10**9), ("1.5gib", 3 << 29), (" 500 MB ", 5 * 10**8), ("2TiB", 2 << 40)],
)
def test_sizes_are_parsed(text, size):
    assert memory_pool.parse_size(text) == size


@pytest.mark.parametrize("text", ["4x", "-1", "GB", "1e9", "4 G B", "all"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="is not a size; expected 0, a number of bytes, or a size such as"):
        memory_pool.parse_size(text)


LIMIT = "import json, lcw_ops; from lcw_ops import _info; print(json.dumps(_info.report()['memory_pool']))"


@needs_linux
def test_the_environment_sets_the_limit(pooled):
    for text, limit in (("0", 0), ("3MiB", 3 * MB)):
        assert json.loads(run_python(LIMIT, LCW_OPS_MEMORY_POOL=text).stdout)["limit"] == limit
    # Importing never fails.
    result = run_python(LIMIT, "-W", "error", LCW_OPS_MEMORY_POOL="many")
    assert json.loads(result.stdout)["limit"] == _pool.machine_memory() // 4
    assert "RuntimeWarning: LCW_OPS_MEMORY_POOL: 'many' is not a size" in result.stderr


# torch's wrappers for data-parallel training.


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        nn.LCWLinear(64, 128), nn.GmPLinear(128, 64), nn.WeightNormLinear(64, 256), nn.LCWLinear(256, 64)
    )


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def fully_sharded(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


WRAPPERS = {
    "ddp": torch.nn.parallel.DistributedDataParallel,
    "ddp bucket view": lambda model: torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True),
    "fsdp2": shard,
    "fsdp1": fully_sharded,
}


def train(wrap, rank, limit):
    """The parameters after four steps, and the most bytes that the pool has had in use or idle."""
    lcw_ops.empty_memory_pool()
    lcw_ops.set_memory_pool_limit(limit)
    model = wrap(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    most = 0
    for turn in range(4):
        optimizer.zero_grad(set_to_none=turn % 2 == 0)
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2 * turn + rank))
        model(x).square().mean().backward()
        optimizer.step()
        most = max(most, sum(memory_pool.pool.count_bytes()))
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [parameter.detach().clone() for parameter in parameters], most


def main(rank, folder):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    memory_pool.LEAST_BYTES = 1 << 14
    found = {}
    for name, wrap in WRAPPERS.items():
        (with_pool, most), (without, none) = train(wrap, rank, 256 * MB), train(wrap, rank, 0)
        found[name] = all(map(torch.equal, with_pool, without)), most > 0, none
    dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


def test_wrappers_for_data_parallel_training_train_as_without_the_pool(tmp_path):
    if memory_pool.missing_reason() is not None:
        pytest.skip(memory_pool.missing_reason())
    for found in run_ranks(__file__, tmp_path, [0] * RANKS, TIMEOUT):
        assert found == dict.fromkeys(WRAPPERS, (True, True, 0))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
