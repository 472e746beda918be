"""Runs the benchmarks: check every competitor against float64, warm up, interleave, print, append CSV rows.

Only ratios measured side by side are meaningful, so the competitors take turns (A B C, A B C, ...). The report has each
competitor's median, spread (the interquartile range) and best time. Rows in which ours is slower are printed like the
others. Noisy rows are marked and have no ratios. The floor is the least time that the work can take at the rates (the
ceilings) measured before and after the case. A row faster than its floor is an error and not a result.

On a GPU the inputs rotate through more memory than three second-level caches. A time is that of a call inside a
replayed CUDA graph, without the launches and Python; a column has what an eager call takes on top (its overhead). Work
that cannot be captured, or takes too long to capture, is timed in eager calls, and has no overhead.
"""

import argparse
import csv
import datetime
import importlib.metadata
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

import torch

from lcw_ops._files import write_atomically
from lcw_ops.bench import registry
from lcw_ops.bench.arguments import add_arguments  # noqa: F401 - the arguments of prepare()
from lcw_ops.bench.registry import Case, Competitor, Rates, WrongResult
from lcw_ops.profile.machine import describe

# The time for the rounds of one case, the fewest rounds of a slow case, and the most rounds of a fast one.
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
    noisy: bool
    peak_floor_s: float
    memory_bytes: int | None
    overhead_s: float | None


COLUMNS = [field.name for field in fields(Row)]

# The columns of older files: without the overhead, without the two before, and in the oldest files without a mark of
# noisy rows.
MEMORY_COLUMNS = COLUMNS[:-1]
MARKED_COLUMNS = COLUMNS[: COLUMNS.index("noisy") + 1]
UNMARKED_COLUMNS = MARKED_COLUMNS[:-1]


@dataclass(frozen=True)
class Plan:
    """The benchmarks that the arguments ask for. They have been checked, so a later error is not the user's mistake."""

    device: torch.device
    cases: list[Case]
    out: Path
    quick: bool


def prepare(args: argparse.Namespace) -> Plan:
    """Check the arguments of ``lcw-ops bench`` before anything is measured.

    Raises ValueError for an unknown benchmark, case or device, a number of threads below 1, a share that is not K/N
    with 1 <= K <= N, --pairs without --base, or a CSV with other columns. Raises BackendError if the requested backend
    (``LCW_OPS_BACKEND``) cannot run one of the benchmarks here.
    """
    if args.pairs is not None:
        raise ValueError(f"--pairs is {args.pairs} without --base; expected both. Name the revision to compare with")
    device, cases = select(args)
    out = args.out or _default_csv(device)
    check_csv(out, COLUMNS, MEMORY_COLUMNS, MARKED_COLUMNS, UNMARKED_COLUMNS)
    if args.threads is not None:
        _use_threads(args.threads)
    return Plan(device, cases, out, args.quick)


def select(args: argparse.Namespace) -> tuple[torch.device, list[Case]]:
    """The device and the cases that the arguments ask for. ``prepare`` says which errors are raised."""
    unknown = [stem for stem in args.stem if stem not in registry.STEMS]
    if unknown:
        raise ValueError(f"no benchmark is called {unknown[0]!r}; choose from {', '.join(registry.STEMS)}")
    device = _device(args.device)
    cases = [case for stem in args.stem or registry.STEMS for case in registry.cases(stem, device.type)]
    cases = [case for case in cases if case.quick == args.quick]
    if args.case is not None:
        names = dict.fromkeys(case.name for case in cases)
        cases = [case for case in cases if args.case in case.label]
        if not cases:
            raise ValueError(
                f"--case is {args.case!r}; expected a part of a case's name, shape and dtype. The names are: "
                f"{'; '.join(names)}"
            )
    return device, _share(cases, args.share)


def _share(cases: list[Case], share: str) -> list[Case]:
    numbers = re.fullmatch(r"(\d+)/(\d+)", share)
    first, count = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= first <= count:
        raise ValueError(f"--share is {share!r}; expected K/N with 1 <= K <= N, such as 1/3")
    return cases[first - 1 :: count]


def carry_out(plan: Plan) -> int:
    """Measure, print and append the rows.

    Returns 0, or 1 if a kernel of ours was wrong and therefore not timed, or a row was faster than its floor.
    """
    print(f"{_machine_line(plan.device)}\n")
    failed = False
    for case in plan.cases:
        rows, case_failed = run_case(case, plan.device, plan.quick)
        append_rows(plan.out, rows)
        failed |= case_failed
    print(f"rows appended to {plan.out}")
    return int(failed)


def run_case(case: Case, device: torch.device, quick: bool = False) -> tuple[list[Row], bool]:
    """Check, time and print one case.

    Returns its rows, and whether one of our own kernels was refused or a competitor was faster than the floor.
    """
    print(f"{case.stem}: {case.label}")
    left_out = {one.name: reason for one in case.competitors if (reason := _reason_left_out(one, quick))}
    errors = registry.check(case, device, [one for one in case.competitors if one.name not in left_out])
    left_out |= {name: f"REFUSED: {error}" for name, error in errors.items() if isinstance(error, WrongResult)}
    running = [one for one in case.competitors if one.name not in left_out]
    budget = QUICK_SECONDS_PER_CASE if quick else SECONDS_PER_CASE
    times, memory, overheads, rates, steady = measure(case, running, device, budget)
    floor, peak_floor = case.floor_seconds(rates), case.peak_floor_seconds(rates)
    # On an unsteady machine the measured ceiling may be far too low: a row below the floor is then noise, not an error.
    impossible = faster_than_floor(case, running, times, rates) if steady else []
    left_out |= {
        name: f"ERROR: {_time(statistics.median(times[name]))}, measured twice, is less than the floor: the ceiling or "
        "the case's bytes or operations are wrong; not appended"
        for name in impossible
    }
    summaries = {name: (statistics.median(each), _spread(each), min(each)) for name, each in times.items()}
    noisy = {name for name, (median, spread, _) in summaries.items() if not steady or registry.is_noisy(median, spread)}
    ours = next((one.name for one in running if one.ours), None)
    unsteady = "" if steady else f"; NOISY: the rates changed by more than {registry.NOISY_RATES}x meanwhile"
    print(f"  floor {_time(floor)} at {_ceilings(rates)}{unsteady}")
    columns = f"{'median':>9} {'spread':>9} {'best':>9} {'vs ours':>8} {'of floor':>8} {'of peak':>8} {'memory':>8}"
    replayed = registry.is_replayed(device)
    columns += f" {'overhead':>9}" if replayed else ""
    print(f"  {'':26} {columns} {'error':>8}")
    rows = []
    for competitor in case.competitors:
        name = competitor.name
        if name in left_out:
            print(f"  {name:26} {left_out[name]}")
            continue
        median, spread, best = summaries[name]
        ratio = "-" if ours is None or ours in impossible else f"{_ratio(name, ours, summaries, overheads):.2f}x"
        of_floor, of_peak = ("noisy" if name in noisy else f"{least / median:.1%}" for least in (floor, peak_floor))
        held = "-" if memory[name] is None else f"{memory[name] / 1e6:.0f} MB"
        error = f"{errors[name]:.1e}" if name in errors else "-"
        times_shown = " ".join(f"{_time(seconds):>9}" for seconds in summaries[name])
        ratio = "noisy" if noisy & {name, ours} else ratio
        overhead = overheads.get(name)
        extra = f" {_time(overhead) if overhead is not None else '-':>9}" if replayed else ""
        print(f"  {name:26} {times_shown} {ratio:>8} {of_floor:>8} {of_peak:>8} {held:>8}{extra} {error:>8}")
        measured = {
            "rounds": len(times[name]),
            "median_s": median,
            "spread_s": spread,
            "best_s": best,
            "floor_s": floor,
            "noisy": name in noisy,
            "peak_floor_s": peak_floor,
            "memory_bytes": memory[name],
            "overhead_s": overhead,
        }
        rows.append(Row(**_machine(device), **work(case, name), **measured))
    print(flush=True)
    refused = any(one.ours and isinstance(errors.get(one.name), WrongResult) for one in case.competitors)
    return rows, refused or bool(impossible)


def work(case: Case, competitor: str) -> dict:
    """The columns that say which work a row is about."""
    named = {"stem": case.stem, "case": case.name, "shape": case.shape_name, "dtype": case.dtype_name}
    return named | {"competitor": competitor}


def _ratio(name: str, ours: str, summaries: dict[str, tuple], overheads: dict[str, float]) -> float:
    """The median relative to ours. Where only one of the two was replayed, both are compared in eager calls."""
    alike = (name in overheads) == (ours in overheads)
    eager = [summaries[one][0] + (0.0 if alike else overheads.get(one, 0.0)) for one in (name, ours)]
    return eager[0] / eager[1]


def measure(
    case: Case, competitors: list[Competitor], device: torch.device, budget: float
) -> tuple[dict[str, list[float]], dict[str, int | None], dict[str, float], Rates, bool]:
    """The two results of :func:`interleave`, each competitor's overhead, the best ceilings, and whether they agree.

    On a GPU the times are those of :func:`replay` where it has some, and the overhead is an eager call's time on top.

    The case is measured again if a competitor was faster than the floor: the machine may have been slow when the
    ceilings were measured.
    """
    sets = registry.draw_sets(case, device)
    before = best = registry.measure_rates(device, case)
    for _ in range(2):
        runs = {one.name: registry.rotated(one, sets) for one in competitors}
        times, memory = interleave({name: run for name, (run, _) in runs.items()}, device, budget)
        replays = replay(competitors, runs, times, device, budget) if registry.is_replayed(device) else {}
        overheads = {name: statistics.median(times[name]) - statistics.median(own) for name, own in replays.items()}
        times |= replays
        after = registry.measure_rates(device, case)
        best, steady = best.best(after), not after.is_far_from(before)
        if not faster_than_floor(case, competitors, times, best):
            break
        before = after
    return times, memory, overheads, best, steady


def faster_than_floor(
    case: Case, competitors: list[Competitor], times: dict[str, list[float]], rates: Rates
) -> list[str]:
    """The names of competitors whose median is impossible on a machine with these ceilings."""
    floor = case.floor_seconds(rates)
    return [one.name for one in competitors if one.checked and statistics.median(times[one.name]) < floor]


def interleave(
    runs: dict[str, registry.Run], device: torch.device, budget: float
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    """Competitor -> seconds of every call, taking turns, and competitor -> bytes that a call holds beyond its results.

    A first round warms up, shows the memory and decides how many rounds fit.
    """
    first = {name: registry.first_call(run, device) for name, run in runs.items()}
    warm_up = sum(duration for duration, _ in first.values())
    rounds = min(max(int(budget / max(warm_up, 1e-9)), MIN_ROUNDS), MAX_ROUNDS)
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(registry.seconds(run, device))
    return times, {name: memory for name, (_, memory) in first.items()}


def replay(
    competitors: list[Competitor],
    runs: dict[str, tuple[registry.Run, int]],
    eager: dict[str, list[float]],
    device: torch.device,
    budget: float,
) -> dict[str, list[float]]:
    """Competitor -> seconds of a call in a replayed CUDA graph, taking turns, for those that can be captured.

    ``runs`` are the work and the number of calls that a graph holds; ``eager`` the seconds of eager calls.
    """
    graphs = {}
    for one in competitors:
        run, calls = runs[one.name]
        expected = calls * statistics.median(eager[one.name])
        if not one.captures or expected > registry.MOST_CAPTURED_SECONDS:
            continue
        try:
            graphs[one.name] = registry.capture(run, calls, device)
        except RuntimeError as error:
            print(f"  {one.name:26} in eager calls: {(str(error).strip() or 'not captured').splitlines()[0]}")
    first = {name: registry.seconds(graph, device) for name, graph in graphs.items()}
    rounds = min(max(int(budget / max(sum(first.values()), 1e-9)), MIN_ROUNDS), MAX_ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(registry.seconds(graph, device) / runs[name][1])
    return times


def append_rows(path: Path, rows: list[Row]) -> None:
    """Append the rows. First, a new file gets a header, and an older file gets the columns that it lacks."""
    if is_faked() and path.resolve().parent == Path(__file__).resolve().parent / "results":
        raise ValueError(f"{path} is for measurements; expected another folder while {registry.FAKE} is set")
    new = not path.exists()
    if not new:
        _add_columns(path)
    with path.open("a", newline="") as file:
        write_rows(file, COLUMNS, map(asdict, rows), header=new)


def _add_columns(path: Path) -> None:
    """Add the columns that an older file lacks: ``noisy`` from each row's median and spread, the others empty."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames == COLUMNS:
            return
        rows = [
            {"noisy": registry.is_noisy(float(row["median_s"]), float(row["spread_s"]))}
            | {"peak_floor_s": "", "memory_bytes": "", "overhead_s": ""}
            | row
            for row in reader
        ]
    write_atomically(path, lambda file: write_rows(file, COLUMNS, rows, header=True))


def write_rows(file: IO[str], columns: list[str], rows: Iterable[dict], header: bool) -> None:
    writer = csv.DictWriter(file, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)


def check_csv(path: Path, columns: list[str], *older_columns: list[str]) -> None:
    """Check the file before minutes of measuring: rows under other columns would later be misread or lost."""
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
    if found not in (columns, *older_columns):
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
        # Streams, events and graphs belong to the current device.
        torch.cuda.set_device(device)
    return device


def _use_threads(count: int) -> None:
    """Limit every competitor in this process: torch by a number, JAX by the cores that the process may use."""
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(cores):
        raise ValueError(f"--threads is {count}; expected 1 to {len(cores)}, the cores of this process")
    os.sched_setaffinity(0, cores[:count])
    torch.set_num_threads(count)


def _default_csv(device: torch.device, prefix: str = "") -> Path:
    """One file per machine, in bench/results/ of a source tree, or else in the current folder."""
    results = Path(__file__).parent / "results"
    name = re.sub(r"\W+", "-", describe(device)["device_name"]).strip("-").lower()
    return (results if results.is_dir() else Path()) / f"{prefix}{name}.csv"


def is_faked() -> bool:
    """Whether make gpu is tried without a card: the CPU then plays it, and rows must not be kept as measured."""
    return os.environ.get(registry.FAKE) == "1"


def _machine(device: torch.device) -> dict:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": _device_name(device),
        "kind": "gpu" if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "jax": _version("jax"),
        "threads": torch.get_num_threads(),
    }


def _device_name(device: torch.device) -> str:
    return ("FAKED " if is_faked() else "") + describe(device)["device_name"]


def _machine_line(device: torch.device) -> str:
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "jax"))
    threads = f"torch on {torch.get_num_threads()} threads, JAX on {len(os.sched_getaffinity(0))} cores"
    return f"{_device_name(device)}; {threads}; {versions}"


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


def _ceilings(rates: Rates) -> str:
    matmul = f", float32 matmul {_giga(rates.matmul)}FLOP/s" if math.isfinite(rates.matmul) else ""
    return f"memory {_giga(rates.memory)}B/s{matmul}, measured beside the case"


def _giga(rate: float) -> str:
    """The number in units of 1e9: a whole number from 100 on, three digits below."""
    return f"{rate / 1e9:.0f} G" if rate >= 1e11 else f"{rate / 1e9:.3g} G"


def _spread(times: list[float]) -> float:
    lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
    return upper - lower


def _time(seconds: float) -> str:
    if seconds < 0:
        return f"-{_time(-seconds)}"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
