"""Compiles, without a device, every Triton kernel that ``make gpu`` will launch, into Triton's own cache.

First the launches are recorded, by as many processes as there are cores: those of the smoke test, of ``lcw-ops
verify`` and of the benchmarks on CPU tensors, which launch nothing, and those of the tests in Triton's interpreter. The
launchers are told that the device is the card. Launches that Triton compiles to the same code are one. Then they are
compiled, the first ones first, until the time is over: kernels that were not reached are compiled when they are
launched.

A kernel that does not compile makes the exit code 1. test_ahead.py checks that a launch finds what was compiled.
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch

from lcw_ops.bench.arguments import STEMS

TESTS = Path(__file__).resolve().parents[2] / "tests"
# An integer argument of this value is neither 1 nor a multiple of 16, for which Triton compiles code of its own.
ORDINARY = 3
# The values from here on take 64 bits, of which Triton takes note.
WIDE = 2**31
# The sources of launches, the most important ones first.
SOURCES = ("smoke", "verify", "bench", "tests")
# Recording takes at most this share of the time.
RECORDING_SHARE = 0.5


# ---- What a launch compiles ------------------------------------------------------------------------------------------


def described(kernel, arguments: tuple, keywords: dict) -> str:
    """All on which the compiled code depends, as JSON: the kernel, its arguments, and the options of the launch.

    ``kernel`` is a jitted function, of the compiler or of the interpreter.
    """
    signature = inspect.signature(kernel.fn)
    own = {name: value for name, value in keywords.items() if name in signature.parameters}
    options = {name: value for name, value in keywords.items() if name not in own and name not in ("grid", "warmup")}
    unspecialised = _unspecialised(kernel)
    bound = signature.bind(*arguments, **own).arguments
    constants = {name for name, one in signature.parameters.items() if "constexpr" in str(one.annotation)}
    values = {
        name: value if name in constants else _argument(value, name not in unspecialised)
        for name, value in bound.items()
    }
    found = {"module": kernel.fn.__module__, "kernel": kernel.fn.__name__, "arguments": values, "options": options}
    return json.dumps(found, sort_keys=True)


def _unspecialised(kernel) -> tuple:
    """The names of the arguments on whose value the code does not depend."""
    if hasattr(kernel, "params"):
        return tuple(one.name for one in kernel.params if one.do_not_specialize)
    return tuple(kernel.kwargs.get("do_not_specialize") or ())


def _argument(value, specialised: bool):
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % 16 == 0}
    if isinstance(value, int) and not isinstance(value, bool) and not (specialised and value == 1):
        wide = 2 * WIDE if abs(value) >= WIDE else 0
        return wide + (16 if specialised and value % 16 == 0 else ORDINARY)
    return float(ORDINARY) if isinstance(value, float) else value


def launch_again(launch: dict) -> None:
    """Make a described launch on CPU tensors, in a context that does not launch."""
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    arguments = {
        name: _tensor(value) if isinstance(value, dict) else value for name, value in launch["arguments"].items()
    }
    kernel[(1,)](**arguments, **launch["options"])


def _tensor(value: dict) -> torch.Tensor:
    memory = torch.empty(32, dtype=getattr(torch, value["dtype"]))
    # torch's allocator aligns to more than 16 bytes.
    return memory if value["aligned"] else memory[1:]


# ---- Recording -------------------------------------------------------------------------------------------------------


def record(source: str, card: dict, write: Callable[[str], None]) -> None:
    """``write`` each launch of a source on CPU tensors once. Nothing is computed, so some calls may end early."""
    from triton.runtime.jit import JITFunction

    import lcw_ops
    from lcw_ops.verification.compiling import compiling_for

    found: set[str] = set()

    def run(self, *arguments, grid, warmup, **keywords):
        text = described(self, arguments, keywords)
        if text not in found:
            found.add(text)
            write(text)
        return types.SimpleNamespace(hash="", asm={})

    # compiling_for calls the function that it finds here for every launch.
    with mock.patch.object(JITFunction, "run", run), compiling_for(card, lambda name: None):
        for call in _calls(source):
            # Without a device some calls cannot go on. Kernels behind them are compiled when they are launched.
            with contextlib.suppress(Exception), lcw_ops.use_backend("triton"):
                call()


def _calls(source: str) -> Iterator:
    from lcw_ops.bench import registry, smoke
    from lcw_ops.verification.cases import cases
    from lcw_ops.verification.child import run_once
    from lcw_ops.verification.speeds import speeds

    kind, _, name = source.partition(":")
    cpu = torch.device("cpu")
    if kind == "smoke":
        for call in smoke.calls():
            yield functools.partial(call.run, [torch.randn(shape) for shape in call.shapes])
    elif kind == "verify":
        for one in cases(name, "triton"):
            yield functools.partial(run_once, one)
        for speed in speeds(name, "triton", "cuda"):
            yield functools.partial(run_once, speed)
    else:
        for measured in registry.cases(name, "cuda"):
            for competitor in measured.competitors:
                if "(triton)" in competitor.name:
                    yield functools.partial(_prepare_and_run, measured, competitor, cpu)


def _prepare_and_run(case, competitor, device: torch.device) -> None:
    competitor.prepare(case.make_inputs(device))()


def _record_tests(path: Path, folder: Path, seconds: float) -> list[str]:
    """The launches of a file of tests, which run in Triton's interpreter, for at most so long."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "LCW_OPS_TEST_DEVICE": "cpu",
        "LCW_OPS_RECORDED_LAUNCHES": str(folder / path.stem),
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "aot.recording", "-p", "no:cacheprovider", "-k", "triton"]
    try:
        subprocess.run([*command, str(path)], env=environment, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"tests:{path.name}: not recorded within {seconds:.0f} s", flush=True)
    return [text for file in (folder / path.stem).glob("*.json") for text in json.loads(file.read_text())]


def _record_in_a_process(source: str, card: str, seconds: float) -> list[str]:
    """The launches that a process has written, also if it was stopped, or ended early."""
    command = [sys.executable, "-m", "lcw_ops.verification.ahead", "--card", card, "--record", source]
    with tempfile.TemporaryFile("w+") as lines, tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(command, stdout=lines, stderr=errors, timeout=seconds, env=_without_a_device())
        except subprocess.TimeoutExpired:
            print(f"{source}: stopped after {seconds:.0f} s", flush=True)
        else:
            errors.seek(0)
            if done.returncode != 0:
                reason = (errors.read().strip() or "no message").splitlines()[-1]
                print(f"{source}: ended early: {reason}", flush=True)
        lines.seek(0)
        # A process that was stopped may have left half a line.
        return [line.rstrip("\n") for line in lines if line.startswith("{") and line.endswith("}\n")]


def _without_a_device() -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def names(sources: Iterable[str]) -> list[str]:
    """The sources, taken apart into pieces for a process each."""
    from lcw_ops.ops import backends

    ops = [op for op, able in backends.IMPLEMENTED.items() if "triton" in able]
    pieces = {
        "smoke": ["smoke"],
        "verify": [f"verify:{op}" for op in ops],
        "bench": [f"bench:{stem}" for stem in STEMS],
        "tests": [f"tests:{path.name}" for path in sorted(TESTS.glob("test_triton_*.py")) if _runs_kernels(path)],
    }
    return [piece for source in sources for piece in pieces[source]]


def _runs_kernels(path: Path) -> bool:
    return "import_kernels" in path.read_text()


def record_all(sources: list[str], card: str, workers: int, seconds: float) -> dict[str, list[str]]:
    """Source -> its launches, in the order of ``sources``."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:

        def one(source: str) -> list[str]:
            kind, _, name = source.partition(":")
            if kind == "tests":
                return _record_tests(TESTS / name, Path(folder), seconds)
            return _record_in_a_process(source, card, seconds)

        return dict(zip(sources, pool.map(one, sources), strict=True))


# ---- Compiling -------------------------------------------------------------------------------------------------------


def compile_one(text: str, card: dict) -> tuple[str, float, str | None]:
    """(the kernel's name, seconds, the reason why it is faulty, or None)."""
    from lcw_ops.verification.compiling import Fault, compiling_for

    launch = json.loads(text)
    began, fault = time.monotonic(), None
    try:
        with compiling_for(card, lambda name: None):
            launch_again(launch)
    except Fault as error:
        fault = str(error)
    return launch["kernel"], time.monotonic() - began, fault


def compile_all(launches: list[str], card: dict, workers: int, until: float) -> bool:
    """Compile these launches, and print a line for each kernel. True if some were, and all are right."""
    counts: dict[str, int] = {}
    times: dict[str, float] = {}
    faults = []
    os.environ |= _without_a_device()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(compile_one, text, card) for text in launches]
        try:
            for done in as_completed(running, timeout=max(until - time.monotonic(), 1)):
                name, seconds, fault = done.result()
                counts[name] = counts.get(name, 0) + 1
                times[name] = times.get(name, 0.0) + seconds
                if fault is not None:
                    faults.append(fault)
                    print(f"FAULT {fault}", flush=True)
        except BrokenProcessPool:
            faults.append("a process that compiled has crashed")
            print(f"FAULT {faults[-1]}; the rest will be compiled when it is launched", flush=True)
        except FutureTimeout:
            print("the time is over: the rest will be compiled when it is launched", flush=True)
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(pool._processes.values()):
                process.kill()
    for name in sorted(counts):
        print(f"{name}: {counts[name]} variants, {times[name]:.1f} s")
    print(f"{sum(counts.values())} of {len(launches)} variants compiled, {len(faults)} faulty")
    return not faults and bool(counts)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcw_ops.verification.ahead", description=__doc__)
    parser.add_argument("--card", required=True, help='{"target": ["cuda", 90, 32], "facts": [132, 232448, false]}')
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--seconds", type=float, default=450.0, help="the time for all of it; default: 450")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    parser.add_argument("--most", type=int, help="compile at most so many variants; default: all")
    parser.add_argument(
        "--record", metavar="SOURCE", help="print the launches of one source, each in a line of JSON; compile nothing"
    )
    args = parser.parse_args(arguments)
    began = time.monotonic()
    card = json.loads(args.card)
    if args.record:
        record(args.record, card, functools.partial(print, flush=True))
        return 0
    found = record_all(names(args.sources), args.card, args.workers, RECORDING_SHARE * args.seconds)
    for source, own in found.items():
        print(f"{source}: {len(own)} launches")
    launches = list(dict.fromkeys(text for own in found.values() for text in own))[: args.most]
    print(f"{len(launches)} different launches, recorded in {time.monotonic() - began:.0f} s", flush=True)
    right = compile_all(launches, card, args.workers, began + args.seconds)
    return 0 if right and launches else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
