"""Runs the benchmarks: check every competitor against float64, warm up, interleave, print, append CSV rows.

Only ratios measured side by side count, so the competitors take turns (A B C, A B C, ...) and the median, the spread
(the interquartile range) and the best of each are reported. Rows that lose are printed like the others.
"""

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from lcw_ops.bench import registry
from lcw_ops.bench.arguments import add_arguments  # noqa: F401 - what prepare() is given
from lcw_ops.bench.registry import Case, Competitor, Rates, WrongResult
from lcw_ops.profile.machine import describe

# Time for the rounds of one case, and the rounds that a slow or a fast case gets all the same.
SECONDS_PER_CASE, QUICK_SECONDS_PER_CASE = 10.0, 1.0
MIN_ROUNDS, MAX_ROUNDS = 3, 50


@dataclass(frozen=True)
class Row:
    """One line of the CSV; times in seconds."""

    date: str
    commit: str
    device: str
    kind: str
    python: str
    torch: str
    triton: str
    jax: str
    threads: int
    stem: str
    case: str
    shape: str
    dtype: str
    competitor: str
    rounds: int
    median_s: float
    spread_s: float
    best_s: float
    floor_s: float


@dataclass(frozen=True)
class Plan:
    """What the arguments ask for, checked: nothing is the user's fault from here on."""

    device: torch.device
    cases: list[Case]
    out: Path
    quick: bool


def prepare(args: argparse.Namespace) -> Plan:
    """Check the arguments of ``lcw-ops bench`` before anything is measured.

    Raises ValueError for an unknown benchmark or device, a number of threads below 1, or a CSV with other columns;
    BackendError if a backend was requested (``LCW_OPS_BACKEND``) that cannot run one of the benchmarks here.
    """
    unknown = [stem for stem in args.stem if stem not in registry.STEMS]
    if unknown:
        raise ValueError(f"no benchmark is called {unknown[0]!r}; choose from {', '.join(registry.STEMS)}")
    device = _device(args.device)
    cases = [case for stem in args.stem or registry.STEMS for case in registry.cases(stem, device.type)]
    out = args.out or _default_csv(device)
    _check_csv(out)
    if args.threads is not None:
        _use_threads(args.threads)
    return Plan(device, [case for case in cases if case.quick == args.quick], out, args.quick)


def carry_out(plan: Plan) -> int:
    """Measure, print and append the rows. Returns 0, or 1 if a kernel of ours was wrong and therefore not timed."""
    print(_machine_line(plan.device))
    rates = registry.measure_rates(plan.device)
    print(f"measured here: copy {rates.copy / 1e9:.0f} GB/s, float32 matmul {rates.matmul / 1e9:.0f} GFLOP/s\n")
    wrong = False
    for case in plan.cases:
        rows, refused = run_case(case, plan.device, rates, plan.quick)
        append_rows(plan.out, rows)
        wrong |= refused
    print(f"rows appended to {plan.out}")
    return int(wrong)


def run_case(case: Case, device: torch.device, rates: Rates, quick: bool = False) -> tuple[list[Row], bool]:
    """Check, time and print one case. Returns its rows, and whether one of our own kernels was refused."""
    shape = " ".join(f"{name}={size}" for name, size in case.shape.items())
    dtype = str(case.dtype).removeprefix("torch.")
    floor = case.floor_seconds(rates)
    print(f"{case.stem}: {case.name}, {shape}, {dtype}; floor {_time(floor)}")
    left_out = {one.name: reason for one in case.competitors if (reason := _reason_left_out(one, quick))}
    errors = registry.check(case, device, [one for one in case.competitors if one.name not in left_out])
    left_out |= {name: f"REFUSED: {error}" for name, error in errors.items() if isinstance(error, WrongResult)}
    running = [one for one in case.competitors if one.name not in left_out]
    times = interleave(running, case.make_inputs(device), device, QUICK_SECONDS_PER_CASE if quick else SECONDS_PER_CASE)
    ours = next((statistics.median(times[one.name]) for one in running if one.ours), None)
    print(f"  {'':26} {'median':>9} {'spread':>9} {'best':>9} {'vs ours':>8} {'of floor':>8} {'error':>8}")
    rows = []
    for competitor in case.competitors:
        name = competitor.name
        if name in left_out:
            print(f"  {name:26} {left_out[name]}")
            continue
        median, spread, best = statistics.median(times[name]), _spread(times[name]), min(times[name])
        ratio = f"{median / ours:.2f}x" if ours else "-"
        error = f"{errors[name]:.1e}" if name in errors else "-"
        times_shown = " ".join(f"{_time(seconds):>9}" for seconds in (median, spread, best))
        print(f"  {name:26} {times_shown} {ratio:>8} {floor / median:>8.1%} {error:>8}")
        measured = {
            "rounds": len(times[name]),
            "median_s": median,
            "spread_s": spread,
            "best_s": best,
            "floor_s": floor,
        }
        work = {"stem": case.stem, "case": case.name, "shape": shape, "dtype": dtype, "competitor": name}
        rows.append(Row(**_machine(device), **work, **measured))
    print(flush=True)
    return rows, any(one.ours and isinstance(errors.get(one.name), WrongResult) for one in case.competitors)


def interleave(
    competitors: list[Competitor], inputs: dict, device: torch.device, budget: float
) -> dict[str, list[float]]:
    """Seconds per call and competitor, who take turns; a first round warms up and says how many rounds fit."""
    runs = {competitor.name: competitor.prepare(inputs) for competitor in competitors}
    warm_up = sum(registry.seconds(run, device) for run in runs.values())
    rounds = min(max(int(budget / max(warm_up, 1e-9)), MIN_ROUNDS), MAX_ROUNDS)
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(registry.seconds(run, device))
    return times


def append_rows(path: Path, rows: list[Row]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _check_csv(path: Path) -> None:
    """Before minutes of measuring: rows of other columns would be read wrongly ever after, or not written at all."""
    columns = [field.name for field in fields(Row)]
    new = not path.exists()
    if new and not path.parent.is_dir():
        raise ValueError(f"--out: the folder {path.parent} does not exist. Create it, or name another file")
    try:
        with path.open("a+", newline="") as file:
            file.seek(0)
            found = columns if new else next(csv.reader(file), [])
    except OSError as error:
        raise ValueError(f"--out: {path} cannot be written: {error.strerror}. Name another file") from error
    if new:
        path.unlink()
    if found != columns:
        raise ValueError(
            f"--out: {path} has columns {', '.join(found)}, expected {', '.join(columns)}. Name another file"
        )


def _reason_left_out(competitor: Competitor, quick: bool) -> str | None:
    if quick and competitor.slow_start:
        return "left out by --quick"
    reason = competitor.missing()
    return reason and f"not run: {reason}"


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    choices = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name not in choices:
        raise ValueError(f"--device is {name!r}; expected one of {', '.join(choices)}, which are what torch sees here")
    device = torch.device(name)
    if device.type == "cuda":
        # Streams, events and graphs are those of the current device.
        torch.cuda.set_device(device)
    return device


def _use_threads(count: int) -> None:
    """Every competitor in one process: torch takes a number, JAX takes the cores the process may run on."""
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(cores):
        raise ValueError(f"--threads is {count}; expected 1 to {len(cores)}, the cores of this process")
    os.sched_setaffinity(0, cores[:count])
    torch.set_num_threads(count)


def _default_csv(device: torch.device) -> Path:
    """bench/results/ of a source tree, the current folder otherwise; one file per machine."""
    results = Path(__file__).parent / "results"
    name = re.sub(r"\W+", "-", describe(device)["device_name"]).strip("-").lower()
    return (results if results.is_dir() else Path()) / f"{name}.csv"


def _machine(device: torch.device) -> dict:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": describe(device)["device_name"],
        "kind": "gpu" if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "jax": _version("jax"),
        "threads": torch.get_num_threads(),
    }


def _machine_line(device: torch.device) -> str:
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "jax"))
    threads = f"torch on {torch.get_num_threads()} threads, JAX on {len(os.sched_getaffinity(0))} cores"
    return f"{describe(device)['device_name']}; {threads}; {versions}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _spread(times: list[float]) -> float:
    lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
    return upper - lower


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
