"""The test suite as separate runs of pytest: ``python tests/run.py fast`` (make test) or ``slow`` (make test-slow).

Triton and the CPU kernels read their mode when a process starts, so the interpreter and each slower instruction set
have a run of their own. pytest-xdist splits every run over processes:

    native        every test, on the fastest instruction set of this CPU
    interpreter   the Triton kernels' tests, in Triton's interpreter
    avx2          the tests marked every_instruction_set, with AVX2; only on a CPU that also has AVX-512
    portable      the tests marked every_instruction_set, without vector instructions; eager torch, with which they
                  compare, does not fuse multiply-adds either
    recurrence    the same for test_orthogonal_filter.py, which portable leaves out; here eager torch may fuse them
    targets       test_triton_kernels.py, which compiles ahead of time, for every generation of GPUs
    recording     the run interpreter of "fast", with the tiles of a GPU; the launches are recorded
    launches      test_triton_recorded.py, which compiles the launches that were recorded most often

"fast" is the first two runs without the tests marked slow. "slow" is these two with only the tests marked slow, and
then the others. Every run starts, even if one before it has failed, and the seconds of each are printed at the
end. A run that selects no test has failed, except for interpreter, targets, avx2 and portable in "slow".
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from sanitize.harness import EAGER_WITHOUT_FMA

TESTS = Path(__file__).parent
# The folder of the launches that the run "recording" records.
LAUNCHES = TESTS.parent / ".pytest_cache/launches"
# pytest's exit status for an empty selection.
NO_TESTS = 5
# The two doors, that is, ways to run the suite, and the tests that they select by their marks.
DOORS = {"fast": "not slow", "slow": "slow"}


class Run(NamedTuple):
    name: str
    selection: list[str]
    marks: str
    environment: dict[str, str]
    may_be_empty: bool = False


def runs(door: str) -> Iterator[Run]:
    marks = DOORS[door]
    yield Run("native", [str(TESTS)], marks, {})
    # "-k triton" selects the tests of that backend in files that test an op on every backend.
    interpreted = [str(path) for path in sorted((*TESTS.glob("test_triton_*.py"), *TESTS.glob("test_*_op.py")))]
    interpreter = {"TRITON_INTERPRET": "1", "LCW_OPS_TEST_DEVICE": "cpu"}
    yield Run("interpreter", ["-k", "triton", *interpreted], marks, interpreter, may_be_empty=door == "slow")
    if door == "fast":
        return
    # The quick run compiles for two of the four generations of GPUs unless the kernels changed.
    every = {"LCW_OPS_EVERY_TARGET": "1"}
    recorded = {"LCW_OPS_RECORDED_LAUNCHES": str(LAUNCHES)}
    # A plugin is imported before pytest adds the folder of the tests to the path.
    path = {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])}
    selection = ["-p", "aot.recording", "-k", "triton", *interpreted]
    yield Run("recording", selection, "not slow", interpreter | recorded | path)
    yield Run("launches", [str(TESTS / "test_triton_recorded.py")], "not slow", recorded)
    yield Run("targets", [str(TESTS / "test_triton_kernels.py")], "not slow", every, may_be_empty=True)
    marks = "every_instruction_set"
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        yield Run("avx2", [str(TESTS)], marks, {"LCW_OPS_CPU_CAPABILITY": "avx2"}, may_be_empty=True)
    portable = {"LCW_OPS_CPU_CAPABILITY": "portable"}
    recurrence = str(TESTS / "test_orthogonal_filter.py")
    yield Run(
        "portable", [str(TESTS), f"--ignore={recurrence}"], marks, portable | EAGER_WITHOUT_FMA, may_be_empty=True
    )
    yield Run("recurrence", [recurrence], marks, portable)


def start(run: Run, more: list[str]) -> int:
    """Run pytest, and return its exit status, or 0 if no test was selected and the run allows that.

    Processes that share the cores have one thread each, unless OMP_NUM_THREADS says otherwise: OpenMP's threads wait
    for each other in busy loops, and would block a core that another process needs. Tests that need several threads
    set the number themselves.
    """
    one_thread = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, "-m", "pytest", "-q", "--dist", "loadfile", "-m", run.marks, *more, *run.selection]
    print(f"\n---- {run.name}: {' '.join(f'{k}={v}' for k, v in run.environment.items())}", flush=True)
    status = subprocess.run(command, cwd=TESTS.parent, env=os.environ | one_thread | run.environment).returncode
    return 0 if status == NO_TESTS and run.may_be_empty else status


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("door", choices=DOORS)
    parser.add_argument("--only", help="the name of the only run to start")
    args, more = parser.parse_known_args(arguments)
    results = []
    for run in runs(args.door):
        if args.only in (None, run.name):
            begin = time.monotonic()
            status = start(run, more)
            results.append((run.name, status, time.monotonic() - begin))
    if not results:
        parser.error(f"no run is called {args.only!r}")
    print()
    for name, status, seconds in results:
        print(f"{name:12} {'passed' if status == 0 else f'failed, exit status {status}':24} {seconds:6.0f} s")
    print(f"{'all':37} {sum(seconds for *_, seconds in results):6.0f} s")
    return max(status for _, status, _ in results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
