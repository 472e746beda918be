"""``make reproduce``: every experiment on the papers' statements, then one table with a verdict for each statement.

An experiment that has ended is not run again, so a run that was stopped goes on in the next call. Each experiment has a
file of rows in the folder, reproduce-<experiment>.csv; claims.md is the table.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lcw_ops.bench.reproduce import claims


@dataclass(frozen=True)
class Experiment:
    """A module of this package, its arguments, and those of a quick run, whose figures prove nothing."""

    module: str
    quick: tuple[str, ...]
    arguments: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        return self.module.replace("_", "-")


EXPERIMENTS = (
    Experiment("gradient_activation", ("--seeds", "2", "--epochs", "4"), ("--seeds", "6")),
    Experiment("hypersphere", ("--seeds", "2", "--steps", "300"), ("--seeds", "6")),
    Experiment("lcw", ("--seeds", "2", "--epochs", "2")),
    Experiment("lps", ("--nets", "60", "--seeds", "2", "--epochs", "2"), ("--seeds", "6")),
    Experiment("orthogonal_filter", ("--seeds", "2", "--depth", "2000", "--length", "500", "--steps", "20")),
    Experiment("permuted_digits", ("--trials", "1", "--search-epochs", "1", "--seeds", "2", "--epochs", "1")),
)


class Finished:
    """finished.json: the experiments that have ended, with their arguments and seconds."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "finished.json"
        self.of_stem = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def has(self, experiment: Experiment, arguments: list[str]) -> bool:
        entry = self.of_stem.get(experiment.stem)
        is_there = (self.path.parent / f"reproduce-{experiment.stem}.csv").is_file()
        return is_there and entry is not None and entry["arguments"] == arguments

    def add(self, experiment: Experiment, arguments: list[str], seconds: float) -> None:
        self.of_stem[experiment.stem] = {"arguments": arguments, "seconds": round(seconds)}
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.of_stem, indent=1) + "\n")
        partial.replace(self.path)


def carry_out(experiment: Experiment, arguments: list[str], folder: Path) -> int:
    """Run one experiment in a process of its own. Returns its exit code."""
    path = folder / f"reproduce-{experiment.stem}.csv"
    command = [sys.executable, "-m", f"lcw_ops.bench.reproduce.{experiment.module}", *arguments, "--out", str(path)]
    if experiment.module == "permuted_digits":
        command += ["--picture", str(folder / "permuted-digits.png")]
    return subprocess.run(command, check=False).returncode


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lcw_ops.bench.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = [experiment.module for experiment in EXPERIMENTS]
    parser.add_argument("experiment", nargs="*", choices=[*names, []], help="default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that all of it runs, proves nothing")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("reproduce"), help="(reproduce)")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    finished, failed = Finished(args.out), []
    wanted = [experiment for experiment in EXPERIMENTS if experiment.module in (args.experiment or names)]
    for number, experiment in enumerate(wanted, 1):
        title = f"[{number}/{len(wanted)}] {experiment.module}"
        own = list(experiment.quick if args.quick else experiment.arguments)
        if finished.has(experiment, own):
            print(f"{title}: finished before", flush=True)
            continue
        print(f"{title} {' '.join(own)}", flush=True)
        start = time.perf_counter()
        code = carry_out(experiment, own, args.out)
        if code:
            failed.append(f"{experiment.module} (exit code {code})")
        else:
            finished.add(experiment, own, time.perf_counter() - start)
    table = claims.table(args.out)
    (args.out / "claims.md").write_text(table + "\n")
    print(table, f"\nwritten: {args.out / 'claims.md'}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
