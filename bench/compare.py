"""``lcw-ops bench --base REV``: are our kernels faster or slower than those of another git revision?

The working tree and the revision run in fresh processes, which alternate: A B B A A B B A ... (A is the revision), at
least ten pairs. A process times one competitor of one case (bench/compare_worker.py) and gives its median. Each pair
gives one ratio, new time / base time. The result is the median of these ratios, with a 95 % confidence interval:
"faster" if the interval lies below 1, "slower" if it lies above, and "undecided" otherwise.

Both trees run the benchmarks of the working tree, and both are checked against float64 once per case, in processes of
their own, before anything is timed. The check is not repeated in every process: in float64 a case of 50,000 layers
takes longer than all its pairs.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import lcw_ops
from lcw_ops.bench import base_tree, gpu, runner
from lcw_ops.bench.arguments import MIN_PAIRS
from lcw_ops.bench.base_tree import BaseTree
from lcw_ops.bench.registry import Case

ROOT = Path(lcw_ops.__file__).resolve().parent.parent
WORKER = Path(__file__).resolve().with_name("compare_worker.py")

# The time for the measured calls of one process.
SECONDS_PER_PROCESS, QUICK_SECONDS_PER_PROCESS = 1.0, 0.2

FASTER, SLOWER, UNDECIDED = "faster", "slower", "undecided"


@dataclass(frozen=True)
class Comparison:
    """One line of the CSV; times in seconds, ``ratio`` = new / base with its interval from ``low`` to ``high``."""

    date: str
    base_commit: str
    commit: str
    device: str
    kind: str
    python: str
    torch: str
    triton: str
    threads: int
    stem: str
    case: str
    shape: str
    dtype: str
    competitor: str
    pairs: int
    base_median_s: float
    median_s: float
    ratio: float
    low: float
    high: float
    outcome: str


COLUMNS = [field.name for field in fields(Comparison)]


@dataclass(frozen=True)
class Plan:
    """The comparison that the arguments ask for. The base has been built."""

    device: torch.device
    cases: list[Case]
    out: Path
    quick: bool
    pairs: int
    base: BaseTree
    commit: str


class Failure(Exception):
    """A process of one of the trees could not check or time its case."""


class Progress:
    """Counts the processes and estimates the time that is left."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()

    def advance(self, count: int = 1) -> None:
        self.done += count
        if sys.stderr.isatty():
            print(f"\r\x1b[K{self}", end="\r", file=sys.stderr, flush=True)

    def skip(self, count: int) -> None:
        self.total -= count

    def __str__(self) -> str:
        counted = f"process {self.done} of {self.total}"
        if self.done == 0:
            return counted
        left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
        return f"{counted}, about {f'{left / 60:.0f} min' if left >= 90 else f'{left:.0f} s'} left"


def prepare(args: argparse.Namespace) -> Plan:
    """Check the arguments of ``lcw-ops bench --base`` and build the base.

    Raises the errors of ``runner.prepare``. Raises ValueError also for fewer than ten pairs, a base that is not a
    revision or does not build, and an extension of the working tree that is older than its sources.
    """
    pairs = MIN_PAIRS if args.pairs is None else args.pairs
    if pairs < MIN_PAIRS:
        raise ValueError(f"--pairs is {pairs}; expected at least {MIN_PAIRS}")
    device, cases = runner.select(args)
    out = args.out or runner._default_csv(device, "compare-")
    runner.check_csv(out, COLUMNS)
    if args.threads is not None:
        runner._use_threads(args.threads)
    commit = base_tree.find_commit(ROOT, args.base)
    base_tree.check_extension(ROOT, device.type)
    return Plan(device, cases, out, args.quick, pairs, base_tree.build(ROOT, commit, _cuda_archs()), runner._commit())


def _cuda_archs() -> str:
    """This machine's GPU generation; empty, so that no CUDA is built, if there is no GPU."""
    if not torch.cuda.is_available():
        return ""
    return gpu.architecture("".join(map(str, torch.cuda.get_device_capability())))


def carry_out(plan: Plan) -> int:
    """Compare, print and append the rows.

    Returns 0 whatever the outcomes are, or 1 if a kernel of the working tree was wrong or could not be measured.
    """
    try:
        return _compare_all(plan)
    finally:
        plan.base.release()


def _compare_all(plan: Plan) -> int:
    print(f"{runner._machine_line(plan.device)}\nnew: {plan.commit}; base: {plan.base.commit}\n")
    progress = Progress(sum(2 + 2 * plan.pairs * len(_ours(case)) for case in plan.cases))
    failed, outcomes = False, []
    for case in plan.cases:
        print(f"{case.stem}: {case.label} ({progress})", flush=True)
        rows, case_failed = compare_case(case, plan, progress)
        append_rows(plan.out, rows)
        failed |= case_failed
        outcomes += [row.outcome for row in rows]
    counted = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in (FASTER, SLOWER, UNDECIDED))
    print(f"\n{counted}; rows appended to {plan.out}")
    return int(failed)


def compare_case(case: Case, plan: Plan, progress: Progress) -> tuple[list[Comparison], bool]:
    """Check, time and print one case. Returns its rows, and whether the working tree failed."""
    base_answer, new_answer = (_check(tree, case, plan, progress) for tree in (plan.base.folder, ROOT))
    failed, rows = "reason" in new_answer, []
    print(f"  {'':26} {'base':>9} {'new':>9} {'ratio':>7}  {'95 % interval':16} outcome")
    for name in _ours(case):
        reasons = [
            f"{tree}: {reason}"
            for tree, answer in (("base", base_answer), ("new", new_answer))
            if (reason := _why_not(answer, name)) is not None
        ]
        failed |= name in new_answer.get("refused", ())
        if reasons:
            progress.skip(2 * plan.pairs)
            print(f"  {name:26} not comparable: {'; '.join(reasons)}", flush=True)
            continue
        done = progress.done
        try:
            base_times, new_times = _time_pairs(case, name, plan, progress)
        except Failure as failure:
            progress.skip(2 * plan.pairs - (progress.done - done))
            failed = True
            print(f"  {name:26} failed: {failure}", flush=True)
            continue
        row = summarise(case, name, plan, base_times, new_times)
        times = f"{runner._time(row.base_median_s):>9} {runner._time(row.median_s):>9}"
        print(f"  {name:26} {times} {row.ratio:7.3f}  [{row.low:.3f}, {row.high:.3f}]   {row.outcome}", flush=True)
        rows.append(row)
    return rows, failed


def summarise(case: Case, competitor: str, plan: Plan, base_times: list[float], new_times: list[float]) -> Comparison:
    """The row of a competitor. The lists hold each process's median; entries at the same place are a pair."""
    ratios = [new / base for base, new in zip(base_times, new_times, strict=True)]
    low, high = interval(ratios)
    machine = runner._machine(plan.device) | {"base_commit": plan.base.commit, "commit": plan.commit}
    del machine["jax"]
    return Comparison(
        **machine,
        **runner.work(case, competitor),
        pairs=plan.pairs,
        base_median_s=statistics.median(base_times),
        median_s=statistics.median(new_times),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        outcome=outcome(low, high),
    )


def interval(ratios: list[float]) -> tuple[float, float]:
    """The confidence interval of the median ratio at a level of at least 95 %, from order statistics (the sign test).

    Each of n independent ratios lies below the true median with probability 1/2. The interval from the k-th smallest to
    the k-th largest misses the median with probability 2 P(Binomial(n, 1/2) < k), and k is the largest rank for which
    this is at most 5 %. For ten pairs k is 2 and the level 97.9 %. This holds for any distribution: times of a busy
    machine are skewed and have outliers, for which a normal interval is wrong. A bootstrap of ten ratios would be
    narrower, but only approximately valid. At least six ratios are needed.
    """
    count = len(ratios)
    rank, tail = 0, 1
    while 40 * tail <= 2**count:
        rank += 1
        tail += math.comb(count, rank)
    if rank == 0:
        raise ValueError(f"{count} ratios; expected at least 6")
    ordered = sorted(ratios)
    return ordered[rank - 1], ordered[-rank]


def outcome(low: float, high: float) -> str:
    return FASTER if high < 1 else SLOWER if low > 1 else UNDECIDED


def order(pairs: int) -> list[str]:
    """The order of the processes: base new new base base new new base ... A steady drift of the machine cancels."""
    return [tree for pair in range(pairs) for tree in (("base", "new") if pair % 2 == 0 else ("new", "base"))]


def _time_pairs(case: Case, competitor: str, plan: Plan, progress: Progress) -> tuple[list[float], list[float]]:
    """The medians of the processes of base and working tree. Raises Failure if a process fails."""
    folders = {"base": plan.base.folder, "new": ROOT}
    times: dict[str, list[float]] = {"base": [], "new": []}
    for index, tree in enumerate(order(plan.pairs)):
        answer = _ask(folders[tree], case, plan, competitor, seed=index // 2)
        progress.advance()
        if "reason" in answer:
            raise Failure(f"{tree}: {answer['reason']}")
        times[tree].append(answer["median_s"])
    return times["base"], times["new"]


def _check(tree: Path, case: Case, plan: Plan, progress: Progress) -> dict:
    answer = _ask(tree, case, plan, None)
    progress.advance()
    return answer


def _why_not(answer: dict, competitor: str) -> str | None:
    """Why a tree cannot time the competitor, by the answer to its check, or None if it can."""
    if "reason" in answer:
        return answer["reason"]
    reason = {**answer["missing"], **answer["refused"]}.get(competitor)
    if reason is None and competitor not in answer["ready"]:
        return f"it has {', '.join(answer['ready']) or 'no kernel'} instead"
    return reason


def _ask(tree: Path, case: Case, plan: Plan, competitor: str | None, seed: int = 0) -> dict:
    """Run one process of bench/compare_worker.py with the library of ``tree``; without a competitor, the check."""
    job = {
        "tree": str(tree),
        "stem": case.stem,
        "case": case.label,
        "competitor": competitor,
        "device": str(plan.device),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "budget": QUICK_SECONDS_PER_PROCESS if plan.quick else SECONDS_PER_PROCESS,
    }
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Without a cache folder each process measures the choice between our matmul and torch's itself. A choice that was
    # measured with the kernels of one tree would otherwise be used by the other.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LCW_OPS_CACHE_DIR": ""}
    command = [sys.executable, str(WORKER), json.dumps(job)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return {"reason": f"the process ended with code {result.returncode}: {last}"}
    return json.loads(result.stdout.splitlines()[-1])


def append_rows(path: Path, rows: list[Comparison]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        runner.write_rows(file, COLUMNS, map(asdict, rows), header=new)


def _ours(case: Case) -> list[str]:
    return [one.name for one in case.competitors if one.ours]
