"""A benchmark: one piece of work, the ways to do it, the float64 truth, and the least time that the work can take.

This least time is floor = max(bytes / memory rate, operations / matmul rate). Both rates are measured on this machine,
before and after the case. A kernel is timed only if its error against float64 is at most twice eager torch's plus one
unit in the last place.
"""

import ctypes
import gc
import importlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import lcw_ops
from lcw_ops.bench.arguments import STEMS  # noqa: F401 - the arguments of cases()
from lcw_ops.ops import backends
from lcw_ops.ops.multiply_adds import multiply_add_rate
from lcw_ops.profile.machine import matmul_rate

EAGER = "eager torch"

# The error that is allowed, in multiples of eager torch's: for our kernels, and for other competitors (peers). Peers
# need only compute the same function: they do not promise eager's error.
OURS_SLACK, PEER_SLACK = 2, 100

# The most draws (sets of random inputs) of a case before a competitor is refused.
MOST_DRAWS = 4

# A spread (interquartile range) above this share of the median is noise: the quartiles of such a row differ by a factor
# of 1.25 / 0.75 = 1.7 or more, and most ratios of interest in a table are smaller. 2 % of the rows in bench/results,
# from a shared machine, are noisy.
NOISY_SPREAD = 0.5

# On a CPU the memory's rate is measured on the case's own number of bytes, up to this limit: data that stays in the
# caches moves faster than memory could. On a GPU it is always measured on this number, because the cases cycle through
# more memory than the caches hold.
MOST_BUFFER_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}

# Products of these sizes are bound by arithmetic, and on a CPU they are short enough to fit between two interruptions
# (they take about 1 and 10 ms on two cores).
MATMUL_SIZES = {"cpu": (512, 1024), "cuda": (8192,)}

MATMUL_TRIES = 10

# On a GPU the inputs of a case fill this many second-level caches, and the calls take turns with them: a weight that is
# always the same would never leave the cache.
CACHES = 3
# The most sets of inputs of a case. Together they may hold less than that only if a set is smaller than 3 MB.
MOST_SETS = 64

# The most seconds of a pass over all inputs that is captured in a CUDA graph. A recurrence that launches a kernel per
# step and tensor takes longer, and its graph would have hundreds of thousands of nodes.
MOST_CAPTURED_SECONDS = 0.5

# "1" lets the CPU play the device of make gpu (gpu_fakes.py): a replay of a graph is then a call.
FAKE = "LCW_OPS_GPU_FAKE"

# A pass over memory is repeated for at least SECONDS_PER_PASS, and until none of the last STABLE_TRIES passes has
# improved the best time by LEAST_IMPROVEMENT, a share of it.
SECONDS_PER_PASS, STABLE_TRIES, LEAST_IMPROVEMENT = 0.05, 5, 0.05

# If the machine's rates before and after a case differ by more than this factor, the whole case is noisy: the machine
# changed while the case was measured, so neither the floor nor the ratios of the case hold.
NOISY_RATES = 2

Run = Callable[[], list]


class WrongResult(Exception):
    """A competitor computes something else, and is therefore not timed."""


@dataclass(frozen=True)
class Competitor:
    """One way to do the work. ``prepare(inputs)`` converts and compiles, and returns the function to time.

    ``captures`` is False for work that cannot be captured in a CUDA graph, or launches one itself.
    ``checked`` is False for a competitor that computes another function of the same size (a copy, another kind of
    network), to which the floor may not apply. ``missing()`` returns why the competitor cannot run here, or None. A
    competitor with ``slow_start`` takes tens of seconds to prepare, so --quick leaves it out.
    """

    name: str
    prepare: Callable[[dict], Run]
    ours: bool = False
    checked: bool = True
    slow_start: bool = False
    captures: bool = True
    missing: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Case:
    """One piece of work. Its competitors, a row of the table each, include ours and ``EAGER``, the yardstick.

    ``make_inputs(device)`` draws fresh random inputs, and ``expected(inputs)`` computes in float64. ``shorten(inputs)``
    gives smaller inputs for the check if float64 would take too long on all of them. ``bytes`` and ``operations`` are
    the least that the work needs.
    """

    stem: str
    name: str
    shape: dict[str, int]
    dtype: torch.dtype
    make_inputs: Callable[[torch.device], dict]
    expected: Callable[[dict], list[Tensor]]
    competitors: tuple[Competitor, ...]
    bytes: float
    operations: float
    quick: bool = False
    shorten: Callable[[dict], dict] = lambda inputs: inputs

    @property
    def shape_name(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.shape.items())

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        return f"{self.name}, {self.shape_name}, {self.dtype_name}"

    def floor_seconds(self, rates: "Rates") -> float:
        return max(self.bytes / rates.memory, self.operations / rates.matmul)

    def peak_floor_seconds(self, rates: "Rates") -> float:
        """The floor if every operation ran at the peak of the multiply-add units, which no matmul reaches."""
        return max(self.bytes / rates.memory, self.operations / rates.peak)


@dataclass(frozen=True)
class Rates:
    """The measured ceilings: bytes read and written per second, and float32 operations per second of a matmul.

    ``matmul`` is infinite for a case without operations, where it is not measured. ``peak`` is the rate of a loop of
    multiply-adds on numbers in registers; infinite where it is not measured, as on a GPU.
    """

    memory: float
    matmul: float
    peak: float = math.inf

    def best(self, other: "Rates") -> "Rates":
        return Rates(max(self.memory, other.memory), max(self.matmul, other.matmul), max(self.peak, other.peak))

    def is_far_from(self, other: "Rates") -> bool:
        pairs = ((self.memory, other.memory), (self.matmul, other.matmul))
        return any(max(pair) > NOISY_RATES * min(pair) for pair in pairs)


def is_noisy(median: float, spread: float) -> bool:
    return spread > NOISY_SPREAD * median


def cases(stem: str, device_type: str) -> list[Case]:
    return importlib.import_module(f"lcw_ops.bench.{stem}").cases(device_type)


def ours(op: str, device_type: str, prepare: Callable[[dict], Run], width: int = 0) -> tuple[Competitor, ...]:
    """Our op as a competitor, once per backend that can run here, on float32 rows of ``width`` elements.

    Plain torch competes only if there is no kernel. An explicit request (``use_backend``, ``LCW_OPS_BACKEND``)
    selects one backend. Raises BackendError if that backend cannot run here.
    """
    if backends.requested() is not None:
        names = [backends.choose(op, torch.device(device_type), width)]
    else:
        names = [
            name
            for name in backends.BACKENDS
            if name != "reference"
            and backends.missing_reason(op, name, device_type) is None
            and backends.width_reason(op, name, width, itemsize=4) is None
        ] or ["reference"]

    def on(backend: str) -> Callable[[dict], Run]:
        def prepared(inputs: dict) -> Run:
            run = prepare(inputs)

            def run_on_backend() -> list:
                with lcw_ops.use_backend(backend):
                    return run()

            return run_on_backend

        return prepared

    return tuple(Competitor(f"lcw_ops ({name})", on(name), ours=True) for name in names)


# A process that ends with its parent, however the parent ends. The system kills it even while it stands still
# (PR_SET_PDEATHSIG, 1). It writes a line when that is settled.
_BUSY = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
print(flush=True)
while os.getppid() == int(sys.argv[1]): pass
"""


def beside_busy_processes(prepare: Callable[[dict], Run]) -> Callable[[dict], Run]:
    """The same work while other processes keep one of every two cores busy. They stand still between the calls."""

    def prepared(inputs: dict) -> Run:
        run = prepare(inputs)
        cores = sorted(os.sched_getaffinity(0))[::2]
        command = [sys.executable, "-c", _BUSY, str(os.getpid())]
        others = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in cores]
        weakref.finalize(run, _end, others)
        for other, core in zip(others, cores, strict=True):
            if other.stdout is not None:
                other.stdout.readline()
            other.send_signal(signal.SIGSTOP)
            os.sched_setaffinity(other.pid, {core})

        def run_beside() -> list:
            for other in others:
                other.send_signal(signal.SIGCONT)
            try:
                return run()
            finally:
                for other in others:
                    other.send_signal(signal.SIGSTOP)

        return run_beside

    return prepared


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


def check(case: Case, device: torch.device, competitors: list[Competitor]) -> dict[str, float | WrongResult]:
    """Return each checked competitor's error on fresh inputs, or a WrongResult: why it must not be timed.

    The error is the largest one of any result, relative to that result's largest value. The errors of a gradient with a
    hundred numbers come from the same few roundings, so the largest of them is a matter of luck, for eager torch too.
    A competitor that would be refused is therefore judged again by the largest errors over more draws.
    """
    errors, eager_errors = {}, []
    for _ in range(MOST_DRAWS):
        inputs = case.shorten(case.make_inputs(device))
        expected = case.expected(inputs)
        eager = next(competitor for competitor in case.competitors if competitor.name == EAGER)
        eager_results = eager.prepare(inputs)()
        eager_errors = _largest(eager_errors, _relative_errors(eager_results, expected))
        last_place = torch.finfo(eager_results[0].dtype).eps
        verdicts = {}
        for competitor in competitors:
            if not competitor.checked:
                continue
            name, slack = competitor.name, OURS_SLACK if competitor.ours else PEER_SLACK
            try:
                results = [as_tensor(result) for result in competitor.prepare(inputs)()]
                errors[name] = _largest(errors.get(name, []), _relative_errors(results, expected))
                verdicts[name] = _judge(errors[name], eager_errors, slack, last_place)
            except WrongResult as wrong:
                verdicts[name] = wrong
        if not any(isinstance(verdict, WrongResult) for verdict in verdicts.values()):
            break
    return verdicts


def _largest(before: list[float], now: list[float]) -> list[float]:
    return list(map(max, before, now)) if before else now


def _relative_errors(results: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Each result's largest error, divided by the largest exact value; infinity, not NaN, if the error is NaN."""
    if len(results) != len(expected):
        raise WrongResult(f"{len(results)} results, expected {len(expected)}")
    relative = []
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        if result.shape != wanted.shape:
            raise WrongResult(f"result {index} has shape {tuple(result.shape)}, expected {tuple(wanted.shape)}")
        error, scale = (result.double() - wanted).abs().max().item(), wanted.abs().max().item()
        relative.append(math.inf if math.isnan(error) else error / scale if scale else math.inf if error else 0.0)
    return relative


def _judge(errors: list[float], eager_errors: list[float], slack: float, last_place: float) -> float:
    """The largest of the errors, relative to the scale of its result. Raises WrongResult if one is too large."""
    for index, (error, eager_error) in enumerate(zip(errors, eager_errors, strict=True)):
        allowed = slack * eager_error + last_place
        if not error <= allowed:
            raise WrongResult(
                f"result {index} differs from float64 by {error:.3g} of its scale; expected at most {allowed:.3g} "
                f"(eager torch: {eager_error:.3g})"
            )
    return max(errors, default=0.0)


def as_tensor(array) -> Tensor:
    return array.detach() if isinstance(array, Tensor) else torch.from_dlpack(array)


def measure_rates(device: torch.device, case: Case) -> Rates:
    """Measure the machine's current rates for a case of this size, as the best of several tries."""
    matmul = peak = math.inf
    if case.operations:
        matmul = max(matmul_rate(device, size, MATMUL_TRIES) for size in MATMUL_SIZES[device.type])
        peak = multiply_add_rate() or math.inf if device.type == "cpu" else math.inf
    return Rates(_memory_rate(device, case.bytes), matmul, peak)


def _memory_rate(device: torch.device, case_bytes: float) -> float:
    """Bytes per second of the fastest pass: a copy, a negation in place, or a sum, which writes nothing.

    On a CPU the passes run on all threads, and then on one. On a busy machine every pass on all threads waits for a
    thread that is not running. For small sizes this wait is a thousand times as long as the pass itself.
    """
    most = MOST_BUFFER_BYTES[device.type]
    # Use half of the bytes that the case moves: it moves most of them more than once.
    size = most if device.type == "cuda" else min(case_bytes / 2, most)
    buffer = torch.ones(2 * max(1, int(size) // 8), device=device)
    source, target = buffer.chunk(2)
    passes = (
        (buffer.nbytes, lambda: target.copy_(source)),
        (2 * buffer.nbytes, buffer.neg_),
        (buffer.nbytes, buffer.sum),
    )
    threads = torch.get_num_threads()
    best = 0.0
    for count in {threads, 1} if device.type == "cpu" else {threads}:
        with _threads(count):
            best = max(best, *(moved / _best_seconds(run, device) for moved, run in passes))
    return best


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    best, spent, stable = math.inf, 0.0, 0
    while spent < SECONDS_PER_PASS or stable < STABLE_TRIES:
        duration = seconds(run, device)
        stable = stable + 1 if duration > (1 - LEAST_IMPROVEMENT) * best else 0
        best, spent = min(best, duration), spent + duration
    return best


def first_call(run: Run, device: torch.device) -> tuple[float, int | None]:
    """(seconds, bytes): the duration of a call, and the most memory that it held at once beyond its results.

    The bytes include those that are allocated once, such as a library's buffers. They are None where they are not
    known: outside of Linux, on a CPU.
    """
    results: list = []
    old = _storages([found for found in gc.get_objects() if type(found) in (Tensor, torch.nn.Parameter)])
    before = _reset_peak_memory(device)
    duration = seconds(lambda: results.extend(run()), device)
    if before is None:
        return duration, None
    held = _storages([result for result in results if isinstance(result, Tensor)])
    # A step in place returns tensors that were there before.
    fresh = sum(size for address, size in held.items() if address not in old)
    return duration, max(0, _peak_memory(device) - before - fresh)


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    """The address and the bytes of the memory of each of these tensors that has one."""
    found = {}
    for tensor in tensors:
        # Sparse, meta and traced tensors have none.
        with suppress(NotImplementedError, RuntimeError):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _reset_peak_memory(device: torch.device) -> int | None:
    """The bytes in use now, from which on the peak counts; None where the peak is not known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # Memory that earlier calls have freed may still be the process's own, and would serve this call unseen.
    lcw_ops.empty_memory_pool()
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        # See proc(5): 5 resets the peak of the resident memory.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident_bytes("VmRSS")


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_bytes("VmHWM")


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


# ---- Rotated inputs and replayed graphs, on a GPU --------------------------------------------------------------------


def rotated_bytes(device: torch.device) -> int:
    """The bytes that the inputs of a case should fill; 0 on a CPU, where they do not rotate."""
    return CACHES * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def draw_sets(case: Case, device: torch.device) -> list[dict]:
    """Inputs of the case that together fill ``rotated_bytes``; on a CPU, one set."""
    first = case.make_inputs(device)
    count = math.ceil(rotated_bytes(device) / max(_count_bytes(first), 1))
    return [first, *(case.make_inputs(device) for _ in range(min(count, MOST_SETS) - 1))]


def _count_bytes(inputs) -> int:
    """The bytes of all tensors in these dictionaries and lists."""
    if isinstance(inputs, Tensor):
        return inputs.nbytes
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (list, tuple)) else ()
    return sum(map(_count_bytes, values))


def rotated(competitor: Competitor, sets: list[dict]) -> tuple[Run, int]:
    """(the work on one set of inputs after another, the number of calls that see every input once).

    A competitor with ``slow_start`` would compile for every set, so it keeps the first one.
    """
    own = sets[:1] if competitor.slow_start else sets
    # Some cases hold copies of their largest input, which the calls take in turns themselves.
    turns = own[0].get("copies", 1) if isinstance(own[0], dict) else 1
    runs = [competitor.prepare(inputs) for inputs in own]
    if len(runs) == 1:
        return runs[0], turns
    order = itertools.cycle(runs)
    return lambda: next(order)(), turns * len(runs)


def is_replayed(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get(FAKE) == "1"


def capture(run: Run, calls: int, device: torch.device) -> Callable[[], None]:
    """A function that replays a CUDA graph of so many calls. Raises RuntimeError if they cannot be captured."""

    def work() -> None:
        for _ in range(calls):
            run()

    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # After a failed capture, torch.cuda.graph leaves its own stream as the current one. The outer context does not.
    with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph):
        work()
    return graph.replay


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time one call. On a GPU, measure between two events of the stream: a host clock would add the synchronisation."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    before = time.perf_counter()
    run()
    return time.perf_counter() - before
