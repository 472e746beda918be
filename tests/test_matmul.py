"""The choice of a layer's matmul on a CPU: the one requested, or the faster one, measured once and kept in a file."""

import math
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import lcw_ops
from lcw_ops import functional as F

# No other test uses a layer of this size: an earlier measurement would be reused.
SAMPLES, UNITS, INPUTS = 24, 67, 61

# Prints the bits of a layer's result and gradients.
PROGRAM = f"""
import torch
from lcw_ops import functional as F
torch.manual_seed(0)
x, weight = torch.randn({SAMPLES}, {INPUTS}, requires_grad=True), torch.randn({UNITS}, {INPUTS}, requires_grad=True)
torch.set_num_threads(1)
output = F.lcw_linear(x, weight)
tensors = output, *torch.autograd.grad(output, (x, weight), torch.randn({SAMPLES}, {UNITS}))
print(torch.cat([tensor.detach().flatten() for tensor in tensors]).view(torch.int32).tolist())
"""

MULTIPLIERS = ("own", "torch")


@pytest.fixture(autouse=True)
def _measured():
    """Use the compiled kernel or fail, outside torch's deterministic mode, in which nothing is measured."""
    torch.use_deterministic_algorithms(False)
    with lcw_ops.use_backend("cpp"):
        yield


def run_all(*environments, program=PROGRAM):
    """The program's output in each environment; the processes run side by side."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
        )
        for environment in environments
    ]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started)
    return printed


def layer(samples=SAMPLES, units=UNITS, inputs=INPUTS, dtype=torch.float32):
    x = torch.randn(samples, inputs, dtype=dtype, requires_grad=True)
    weight = torch.randn(units, inputs, dtype=dtype, requires_grad=True)
    output = F.lcw_linear(x, weight)
    return output.detach(), *torch.autograd.grad(output, (x, weight), torch.ones_like(output))


def read(folder):
    (file,) = folder.iterdir()
    return file, [line.split() for line in file.read_text().splitlines()]


def test_an_unknown_name_is_refused(monkeypatch):
    monkeypatch.setenv("LCW_OPS_MATMUL", "mkl")
    with pytest.raises(RuntimeError, match="LCW_OPS_MATMUL=mkl: expected own or torch"):
        layer()


def test_an_empty_name_requests_nothing(monkeypatch):
    monkeypatch.setenv("LCW_OPS_MATMUL", "")
    assert all(tensor.isfinite().all() for tensor in layer())


def test_measurements_are_kept_in_the_file_and_trusted(tmp_path):
    folder = tmp_path / "cache"
    environments = [{"LCW_OPS_MATMUL": name} for name in MULTIPLIERS]
    first, *bits = run_all({"LCW_OPS_CACHE_DIR": str(folder)}, *environments)
    assert len(set(bits)) > 1, "both matmuls gave the same bits; expected sums in different orders"
    file, answers = read(folder)
    # One line per pass: its name, the dtype, the threads, the samples rounded up to a power of two, the weight's sizes,
    # the answer.
    assert [answer[0] for answer in answers] == ["forward", "grad_input", "grad_weight"]
    for answer in answers:
        assert answer[2:6] == ["1", "32", str(UNITS), str(INPUTS)]
        assert answer[6] in MULTIPLIERS

    # Put other answers in the file. If a question has two answers, which two processes may write at the same time, the
    # first one counts. Malformed lines are skipped.
    def lines(name):
        return "".join(" ".join([*answer[:6], name]) + "\n" for answer in answers)

    broken = "forward\n\nforward 6 1 32 x\nforward 6 1 32 67 61 fastest\nforward 6 1 32 67 61 own more\n"
    environments = [{"LCW_OPS_CACHE_DIR": str(folder)}]
    for name, other in zip(MULTIPLIERS, MULTIPLIERS[1:] + MULTIPLIERS[:1], strict=True):
        (tmp_path / name).mkdir()
        text = broken + "nothing 6 1 32 67 61 torch\n" + lines(name) + lines(other)
        (tmp_path / name / file.name).write_text(text)
        environments.append({"LCW_OPS_CACHE_DIR": str(tmp_path / name)})
    assert run_all(*environments) == [first, *bits]
    assert read(folder) == (file, answers)


def test_location_of_the_file(tmp_path):
    """The file is in a folder that is created, in one of the usual places, or nowhere."""
    home, no_home, caches, blocked = (tmp_path / name for name in ("home", "no_home", "caches", "blocked"))
    home.mkdir(), no_home.mkdir(), blocked.touch()
    # Three samples need a measurement of their own. An empty batch needs none, and 30 samples share that of 24.
    program = (
        "import os\nif os.environ['LCW_OPS_CACHE_DIR'] == 'usual': del os.environ['LCW_OPS_CACHE_DIR']\n" + PROGRAM
    )
    program += "".join(f"F.lcw_linear(torch.randn({count}, {INPUTS}), weight)\n" for count in (3, 0, 30))
    run_all(
        {"LCW_OPS_CACHE_DIR": "usual", "HOME": str(home), "XDG_CACHE_HOME": ""},
        {"LCW_OPS_CACHE_DIR": "usual", "HOME": str(no_home), "XDG_CACHE_HOME": str(caches)},
        {"LCW_OPS_CACHE_DIR": "", "HOME": str(no_home), "XDG_CACHE_HOME": ""},
        {"LCW_OPS_CACHE_DIR": str(blocked / "folder")},
        program=program,
    )
    assert list(no_home.iterdir()) == []
    for folder in (home / ".cache" / "lcw_ops", caches / "lcw_ops"):
        _, answers = read(folder)
        passes = [(answer[0], answer[3]) for answer in answers]
        assert passes == [("forward", "32"), ("grad_input", "32"), ("grad_weight", "32"), ("forward", "4")]


@pytest.mark.parametrize(("samples", "name"), [(16, "own"), (17, "torch")])
def test_in_deterministic_mode_nothing_is_measured(monkeypatch, samples, name):
    def bits():
        torch.manual_seed(0)
        return layer(samples, 300, 1000)

    torch.use_deterministic_algorithms(True)
    by_rule = bits()
    results = {}
    for multiplier in MULTIPLIERS:
        monkeypatch.setenv("LCW_OPS_MATMUL", multiplier)
        results[multiplier] = bits()
    assert any(not torch.equal(*pair) for pair in zip(*results.values(), strict=True)), "both gave the same bits"
    assert all(torch.equal(*pair) for pair in zip(by_rule, results[name], strict=True))


def test_threads_that_measure_at_the_same_time():
    results, errors = [], []

    def work(units):
        try:
            results.append(all(tensor.isfinite().all() for tensor in layer(units=units)))
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(71 + index % 3,)) for index in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not errors
    assert results == [True] * 6


def test_a_fork_while_another_thread_measures():
    """The child inherits the lock that the measuring thread holds, but not that thread, and must not wait for it.

    Apart from that thread, the process has one thread.
    """
    program = """
import os, threading, time, torch
from lcw_ops import functional as F
torch.set_num_threads(1)
F.lcw_linear(torch.randn(3, 5), torch.randn(2, 5))
work = threading.Thread(target=F.lcw_linear, args=[torch.randn(s, 1500, dtype=torch.float64) for s in (128, 1500)])
work.start()
time.sleep(0.05)
measuring = work.is_alive()
child = os.fork()
if not child:
    F.lcw_linear(torch.randn(3, 5), torch.randn(2, 5))
    os._exit(7)
for _ in range(200):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
    raise SystemExit("the child hangs")
work.join()
print(measuring, os.waitstatus_to_exitcode(status))
"""
    assert run_all({}, program=program) == ["True 7\n"]


def test_a_large_weight_is_measured_by_a_smaller_one():
    """A weight of 400 MB is represented by a product of 4096 by 4096."""
    weight = torch.ones(1, 1).expand(10_000, 10_000)
    output = F.lcw_linear(torch.ones(1, 10_000), weight)
    assert torch.equal(output, torch.zeros(1, 10_000))


# Our product of so small a layer takes microseconds, so the delay of torch's product decides. A machine with other work
# makes the first turns longer, and then fewer turns follow.
@pytest.mark.parametrize(
    ("units", "delays", "fewest", "most"),
    [
        # More than three times our time and more than 30 ms: the first turn decides.
        (53, [0.3], 1, 1),
        # More than three times our time and more than 5 ms in two turns.
        (56, [0.02], 1, 2),
        # The first two turns decide nothing, and the next two or three take more than 30 ms.
        (54, [0, 0.02], 2, 5),
        # Turns follow until 30 ms are over, or until there are 20.
        (55, [0], 3, 22),
    ],
    ids=["clear", "clear_twice", "slow", "fast"],
)
def test_a_choice_rests_on_few_clear_turns_or_on_more(monkeypatch, tmp_path, units, delays, fewest, most):
    """The first of torch's products takes ``delays[0]`` seconds longer, and the others ``delays[-1]``."""
    monkeypatch.setenv("LCW_OPS_CACHE_DIR", str(tmp_path))
    calls = []

    def linear(x, weight, bias=None):
        calls.append(x.shape)
        time.sleep(delays[0] if len(calls) == 1 else delays[-1])
        return x @ weight.mT

    x, weight = torch.randn(SAMPLES, INPUTS), torch.randn(units, INPUTS)
    expected = torch.nn.functional.linear(x, weight - weight.mean(1, keepdim=True))
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("linear", linear, "CPU")
        output = F.lcw_linear(x, weight)
    # 61 products below 16.
    torch.testing.assert_close(output, expected, rtol=0, atol=61 * 16 * 2**-23)
    _, [answer] = read(tmp_path)
    if delays[-1]:
        assert answer[-1] == "own"
    assert fewest <= len(calls) - (answer[-1] == "torch") <= most


@pytest.mark.parametrize(
    ("samples", "units", "inputs", "dtype"),
    [
        (3, 4096, 4096, torch.float32),
        (100, 4096, 4096, torch.float32),
        (100, 4096, 4096, torch.float64),
        (100, 4096, 4096, torch.bfloat16),
        (100, 20_000, 500, torch.float32),
        (100, 500, 20_000, torch.float32),
        (1000, 600, 5000, torch.float32),
    ],
    ids=str,
)
def test_the_operations_of_a_measurement_have_a_limit(monkeypatch, tmp_path, samples, units, inputs, dtype):
    """Each part takes at most 2^26 multiply-adds and 8 MB of the weight for one thread; all of a pass, 8.25 times that.

    Only a gradient of 8 MB may take more; three turns follow the first two then.
    torch's products are counted. Our own are as many, in turns with them.
    """
    monkeypatch.setenv("LCW_OPS_CACHE_DIR", str(tmp_path))
    passes = {"forward": [], "backward": []}
    calls = passes["forward"]

    def linear(x, weight, bias=None):
        # The samples of a measurement are a power of two, so these are not the layer's own products.
        if samples not in (*x.shape, *weight.shape):
            calls.append((*x.shape, len(weight)))
        return x @ weight.mT

    x = torch.randn(samples, inputs, dtype=dtype, requires_grad=True)
    weight = torch.randn(units, inputs, dtype=dtype, requires_grad=True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("linear", linear, "CPU")
        output = F.lcw_linear(x, weight)
        calls = passes["backward"]
        torch.autograd.grad(output, (x, weight), torch.ones_like(output))
    threads = torch.get_num_threads()
    rounded = [int(answer[3]) for answer in read(tmp_path)[1]]
    assert len(rounded) == 3
    # A part of the weight's gradient may always have 8 MB.
    part = threads * 2**26
    gradient_part = max(part, rounded[0] * 2**23 // dtype.itemsize)
    all_turns = 8.25 * part
    all_gradient_turns = max(8 * part, 3 * gradient_part) + part / 4
    limits = (part, all_turns), (gradient_part, all_turns + all_gradient_turns)
    for calls, (most, most_together) in zip(passes.values(), limits, strict=True):
        operations = [math.prod(call) for call in calls]
        assert operations
        assert max(operations) <= most
        assert sum(operations) <= most_together
        assert max(operations) // rounded[0] * dtype.itemsize <= threads * 2**23


@pytest.mark.parametrize("name", MULTIPLIERS)
def test_the_ops_alone_are_not_differentiable(monkeypatch, name):
    """A direct call, past ``functional``, gives torch's warning instead of half a graph."""
    monkeypatch.setenv("LCW_OPS_MATMUL", name)
    x, weight = torch.randn(20, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    output = torch.ops.lcw_ops.lcw_linear.cpp(x, weight, None, False, False)
    assert "NotImplemented" in output.grad_fn.name()
    assert torch.is_grad_enabled()
