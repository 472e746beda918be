"""Plays the tools of ``make gpu`` on a machine without a card: LCW_OPS_GPU_FAKE=1.

Every part runs its process, on the CPU's kernels and in Triton's interpreter, on few and small cases. The logs say what
was played. Nothing of it is a result of a GPU: rows and logs go to build/gpu-faked, and every one is marked.

As a program, this file plays NVIDIA's sanitizer. As a plugin of pytest, it leaves a sample of a file's tests.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from .gpu_plan import ROOT, Step

VARIABLE = "LCW_OPS_GPU_FAKE"
MODULE = "lcw_ops.bench.gpu_fakes"
HEADING = "FAKED: no GPU was used; programs played the card and its tools. This is no result of a GPU."
# The facts of an H200, without the card. The versions are those of no torch, so nothing is taken for a real run.
CARD = {
    "torch": "FAKED",
    "generation": "90",
    "name": "FAKED card",
    "processors": "132",
    "shared_memory": "232448",
}
SAMPLE = 2

# A case of lcw-ops verify for each stem, one that is quick in the C++ kernels.
VERIFY_CASES = {
    "gradient_activation": "misaligned, float64",
    "hypersphere": "direction, m=1,",
    "lcw_linear": "linear, M=1, m=1024, bfloat16",
    "orthogonal_filter": "N=17, M=5, 40 layers",
    "parallel_depth": "N=64, M=1, 300 layers, permutation",
    "weight_norm": "normalised rows, m=1,",
}
# A part of the name of one quick benchmark for each stem.
BENCH_CASES = {
    "gradient_activation": "arctan in place",
    "hypersphere": "GmP linear, forward,",
    "lcw_linear": "linear, forward,",
    "orthogonal_filter": "over time, forward,",
    "parallel_depth": "over time, haar, forward,",
    "weight_norm": "weight norm linear, forward,",
}
DEVICE = "the device: C++ kernels on the CPU play CUDA's, and Triton's interpreter plays Triton"


def is_asked_for() -> bool:
    return os.environ.get(VARIABLE) == "1"


def play(plan: dict[str, list[Step]], folder: Path) -> dict[str, list[Step]]:
    """The same parts and steps, with commands that need no card. Files are written to ``folder``."""
    played = {part: [_play(step, folder) for step in steps] for part, steps in plan.items()}
    environment = {VARIABLE: "1", "LCW_OPS_TEST_DEVICE": "cpu", "LCW_OPS_CACHE_DIR": str(folder / "cache")}
    return {
        part: [dataclasses.replace(step, environment=environment | step.environment) for step in steps]
        for part, steps in played.items()
    }


def _play(step: Step, folder: Path) -> Step:
    command = step.command
    if step.name == "build":
        names = [name for name in ("_C.abi3.so", "_C_cuda.abi3.so") if (ROOT / "lcw_ops" / name).exists()]
        code = f"print('the extensions that are there: {', '.join(names) or 'none'}')"
        return _with(step, [sys.executable, "-c", code], "nvcc and the C++ compiler: nothing was built", makes=None)
    if step.name == "compile":
        own = {"TRITON_CACHE_DIR": str(folder / "triton")}
        command = [*command, "--sources", "smoke", "--most", "2"]
        return _with(step, command, "the card's facts; the kernels were compiled for it", own, makes=folder / "triton")
    if "lcw_ops.cli" in command and "verify" in command:
        stem = command[command.index("--ops") + 1] if "--ops" in command else "lcw_linear"
        verify = [*command[:4], "--device", "cpu", "--ops", stem, "--case", VERIFY_CASES[stem]]
        return _with(step, [*verify, *(["--json"] if "--json" in command else [])], DEVICE)
    if "lcw_ops.cli" in command and "bench" in command:
        stem = command[command.index("bench") + 1]
        bench = [*command[:5], "--device", "cpu", "--quick", "--case", BENCH_CASES[stem]]
        out = command[command.index("--out") + 1]
        return _with(step, [*bench, "--out", out], "the device, and the replay of CUDA graphs: calls on the CPU")
    if "lcw_ops.bench.crossover" in command:
        small = ["--device", "cpu", "--widths", "8", "--rows", "2", "--steps", "3"]
        return _with(step, [*command, *small], DEVICE)
    if "pytest" in command:
        plugin = command.index("pytest") + 1
        pytest = [*command[:plugin], "-p", MODULE, *command[plugin:]]
        interpreter = {"TRITON_INTERPRET": "1"} if "triton" in step.name else {}
        return _with(step, pytest, f"{DEVICE}; {SAMPLE} tests of the file ran", interpreter)
    if "lcw_ops.bench.smoke" in command:
        tools = [word for word in command if word.startswith("--tool=")]
        smoke = command[command.index("lcw_ops.bench.smoke") - 2 :]
        if "--stem" not in smoke:
            smoke += ["--stem", "lcw_linear"]
        smoke = [word if word != "cuda" else "cpp" for word in smoke] + ["--device", "cpu"]
        # Every stem under memcheck would take minutes in the interpreter.
        if tools and "--backend" not in smoke:
            smoke += ["--backend", "cpp"]
        faked = f"compute-sanitizer; {DEVICE}" if tools else DEVICE
        sanitizer = [sys.executable, "-m", MODULE, *tools] if tools else []
        return _with(step, [*sanitizer, *smoke], faked, {"TRITON_INTERPRET": "1"})
    return dataclasses.replace(step, faked="")


def _with(step: Step, command: list[str], faked: str, environment: dict | None = None, **others) -> Step:
    return dataclasses.replace(
        step, command=command, faked=faked, environment=step.environment | (environment or {}), **others
    )


def pytest_collection_modifyitems(config, items: list) -> None:
    """Leave the first tests of the file that are not slow."""
    quick = [item for item in items if item.get_closest_marker("slow") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in quick[:SAMPLE]])
    items[:] = quick[:SAMPLE]


def pytest_sessionfinish(session) -> None:
    """A file whose tests all need a card has none here."""
    no_tests = 5
    if session.exitstatus == no_tests:
        print("\nFAKED: every test of this file needs a card")
        session.exitstatus = 0


def main(arguments: list[str]) -> int:
    """Play compute-sanitizer: run the command, and watch nothing."""
    options = [word for word in arguments if word.startswith("--tool=")]
    print(f"FAKED compute-sanitizer, {' '.join(options)}: the command runs, and nothing watches it", flush=True)
    return subprocess.run(arguments[len(options) :]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
