"""A process of ``lcw-ops verify``: the only one that opens the device, so a crash cannot reach the caller.

It takes a job in JSON and writes JSON lines. A line with "case" names the work that begins; the parent kills the
process if no line follows for too long. After a line with "waits" the process waits for a line of the parent. The job's
last line has "done".
"""

import contextlib
import ctypes
import functools
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable

import torch

import lcw_ops
from lcw_ops.bench.registry import WrongResult
from lcw_ops.ops import verdicts
from lcw_ops.verification import compiling
from lcw_ops.verification.cases import Case, cases
from lcw_ops.verification.judge import judge
from lcw_ops.verification.speeds import Disturbed, Speed, measure, speeds

Write = Callable[[dict], None]


def describe(job: dict, write: Write) -> None:
    """The parts of the verdicts' keys on a GPU, and the card for which to compile."""
    device = torch.device(job["device"])
    facts = {backend: verdicts.collect_facts(device, backend) for backend in job["backends"]}
    free, total = torch.cuda.mem_get_info(device)
    card = compiling.describe_card(device) if "triton" in job["backends"] else None
    write({"done": {"facts": facts, "card": card, "used": total - free}})


def compile_all(job: dict, write: Write) -> None:
    """Compile what the op's cases launch in Triton. Faults are written by class."""
    op = job["op"]
    work: list[Case | Speed] = [*cases(op, "triton"), *speeds(op, "triton", "cuda")]
    for one in [one for one in work if job["only"] in one.label]:
        try:
            with (
                compiling.compiling_for(job["card"], functools.partial(_announce, one.label, write)),
                lcw_ops.use_backend("triton"),
            ):
                run_once(one)
        except compiling.Fault as fault:
            write({"kind": one.kind, "right": False, "reason": f"{one.label}: {fault}"})
        except Exception as error:
            # Without a device some calls cannot go on. The kernels behind them are then compiled when the cases run.
            write({"note": f"{one.label}: {error}"})
    write({"done": True})


def _announce(label: str, write: Write, kernel: str) -> None:
    write({"case": f"{label}: {kernel}"})


def run_once(one: Case | Speed) -> None:
    """Run the work on CPU tensors."""
    if isinstance(one, Case):
        one.run(one.make_inputs())
    else:
        drawn = [tensor.to(one.dtype) if tensor.is_floating_point() else tensor for tensor in one.draw()]
        one.ours(drawn)()


def run(job: dict, write: Write) -> None:
    """Judge every case of an op on a backend. Then time the classes that are right.

    ``job["alone"]`` names the part before which the process waits until no other one disturbs it: "all" or "times".
    """
    op, backend, device = job["op"], job["backend"], torch.device(job["device"])
    if job["alone"] == "all":
        _wait(write)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    wrong = {verdicts.Kind(*kind) for kind in job["faulty"]}
    # Otherwise torch's matmul, not ours, might be judged.
    os.environ["LCW_OPS_MATMUL"] = "own"
    # TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which some containers set, makes eager torch's error a thousand times larger.
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    for case in cases(op, backend):
        if case.kind in wrong or job["only"] not in case.label:
            continue
        write({"case": case.label})
        seed = int.from_bytes(os.urandom(4), "little")
        torch.manual_seed(seed)
        try:
            judge(case, backend, device)
            write({"kind": case.kind, "right": True})
        except WrongResult as error:
            reason = str(error)
        except Exception as error:
            # A driver or a compiler may raise anything.
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        else:
            continue
        wrong.add(case.kind)
        write({"kind": case.kind, "right": False, "reason": f"{case.label}, seed {seed}: {reason}"})
    del os.environ["LCW_OPS_MATMUL"]
    torch.set_float32_matmul_precision(precision)
    if job["times"]:
        if job["alone"] == "times":
            _wait(write)
        for speed in speeds(op, backend, device.type):
            if speed.kind not in wrong and job["only"] in speed.label:
                _time(speed, backend, device, write)
    write({"done": True})


def _wait(write: Write) -> None:
    write({"waits": True})
    if not sys.stdin.readline():
        raise SystemExit("the parent has ended")


def _time(speed: Speed, backend: str, device: torch.device, write: Write) -> None:
    write({"case": speed.label})
    try:
        ratio = measure(speed, backend, device)
    except Disturbed as error:
        write({"kind": speed.kind, "untimed": f"{speed.label}: {error}"})
    except Exception as error:
        message = (str(error).strip() or "no message").splitlines()[0]
        write({"kind": speed.kind, "untimed": f"{speed.label}: {type(error).__name__}: {message}"})
    else:
        write({"kind": speed.kind, "times": ratio.times, "faster": ratio.faster, "label": speed.label})


JOBS = {"describe": describe, "compile": compile_all, "run": run}


def _die_with_the_parent() -> None:
    """On Linux, a parent that is killed takes this process along, which may hang on the device."""
    set_death_signal = 1
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def main(text: str) -> None:
    _die_with_the_parent()
    # Text that a kernel or a compiler prints must not come between the lines.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")

    def write(line: dict) -> None:
        lines.write(json.dumps(line) + "\n")

    job = json.loads(text)
    JOBS[job["job"]](job, write)
