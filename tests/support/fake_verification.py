"""A child of ``lcw-ops verify`` for tests, without torch: it plays a device and behaves as its first argument says.

    python fake_verification.py BEHAVIOUR LOG JOB

It appends one line per job to the file LOG: the job's name, op and backend, and a line each when it begins and ends to
be alone.
"""

import json
import os
import signal
import subprocess
import sys
import time

FACTS = {"device": "0123456789abcdef", "name": "a card", "capability": "sm_90", "multiprocessors": 132}
FACTS |= {"driver": "580.1", "cuda": "13.0", "torch": "2.13", "triton": "3.7", "lcw_ops": "0.1.0"}


def facts_of(backend: str) -> dict:
    return {**FACTS, "kernels": f"hash of {backend}"}


def write(line: dict) -> None:
    print(json.dumps(line), flush=True)


def kinds_of(op: str) -> list[list[str]]:
    """The classes that are timed. One dtype's are enough."""
    if op == "lcw_weight":
        return [["float32", "up to 1024"], ["float32", "up to 4096"]]
    return [["any", "any"]]


def run(job: dict, behaviour: str, log: str) -> None:
    kinds = kinds_of(job["op"])
    if job["alone"] == "all":
        wait(job, behaviour, log)
    for kind in job["kinds"]:
        if behaviour == "forgets" and kind in kinds:
            continue
        write({"case": f"case {kind[1]}"})
        if behaviour == "skips the last case" and kind is job["kinds"][-1]:
            continue
        write({"kind": kind, "right": behaviour != "wrong", "reason": "result 0 is not finite"})
    if behaviour.startswith("{"):
        print(behaviour, flush=True)
    misbehave(behaviour)
    if job["alone"] == "times":
        wait(job, behaviour, log)
    for kind in kinds:
        write({"case": f"speed, {kind[1]}"})
        if behaviour == "hangs while timing":
            time.sleep(60)
        if behaviour == "disturbed":
            write({"kind": kind, "untimed": "the time of a copy changed by 18%"})
        else:
            times = {"slow": 0.7, "cuda is faster": 1.8 if job["backend"] == "cuda" else 1.5}.get(behaviour, 1.5)
            write({"kind": kind, "times": times, "faster": times > 1, "label": f"speed, {kind[1]}"})
    note(log, f"end {job['op']} {job['backend']}")
    if behaviour != "ends early":
        write({"done": True})


def wait(job: dict, behaviour: str, log: str) -> None:
    write({"waits": True})
    sys.stdin.readline()
    note(log, f"alone {job['op']} {job['backend']}")
    if behaviour == "takes its time":
        time.sleep(0.2)


def note(log: str, text: str) -> None:
    with open(log, "a") as file:
        file.write(f"{text}\n")


def misbehave(behaviour: str) -> None:
    if behaviour == "hangs":
        # A child of its own, as a compiler would be. It must die too.
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
        write({"case": f"case beside {child.pid}"})
        time.sleep(60)
    elif behaviour == "interrupts":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
    elif behaviour == "fills the error output":
        sys.stderr.write("x" * (1 << 20) + "\n")
        raise RuntimeError("the end")
    elif behaviour == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif behaviour == "raises":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    elif behaviour == "half a line":
        sys.stdout.write('{"kind": ["float32", ')
        sys.stdout.flush()
        os._exit(0)
    elif behaviour == "no end of a line":
        sys.stdout.write("x" * (2 << 20))
        sys.stdout.flush()
        time.sleep(60)
    elif behaviour == "no JSON":
        print("hello", flush=True)


def main(behaviour: str, log: str, text: str) -> None:
    job = json.loads(text)
    note(log, f"{job['job']} {job.get('op', '-')} {job.get('backend', '-')}")
    if job["job"] == "describe":
        card = {"target": ["cuda", 90, 32], "facts": [132, 232448, False]}
        used = 5 << 30 if behaviour == "in use" else 0
        if behaviour.startswith("done: "):
            write({"done": json.loads(behaviour.removeprefix("done: "))})
            return
        write({"done": {"facts": {name: facts_of(name) for name in job["backends"]}, "card": card, "used": used}})
    elif job["job"] == "compile":
        if behaviour == "compiles forever":
            write({"case": f"case beside {os.getpid()}"})
            time.sleep(60)
        if behaviour == "spills":
            write({"kind": kinds_of(job["op"])[0], "right": False, "reason": "a_kernel spills 96 bytes per thread"})
        write({"done": True})
    else:
        run(job, behaviour, log)


if __name__ == "__main__":
    main(*sys.argv[1:])
