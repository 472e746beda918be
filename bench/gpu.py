"""``make gpu``: build, test, sanitize and benchmark on this machine's NVIDIA card, with the torch that is installed.

Nothing is downloaded. A part (``make gpu PART=smoke``) takes under eight minutes; a process that still runs then is
killed. Each test file has its own process and time limit, so that a crash or a hang costs one file, and a failure does
not stop the rest. Every process writes its log in bench/results/<generation>-<date>-logs while it runs, and a line in
summary.txt there says how it ended. The exit code is 1 if a process failed, was cut off, was not reached in time or
needs something that is not installed.

A process that has passed is left out when the command is given again, as long as the sources, the card and the versions
are the same; --again runs it all the same. The first parts fit into half an hour (PART=first): --plan shows them.

LCW_OPS_GPU_FAKE=1 tries the whole plan on a machine without a card, on the smallest sizes. Programs play the card and
its tools, and every log says which. It proves nothing about a GPU, and writes nothing into bench/results.
"""

import argparse
import datetime
import json
import os
import sys
from pathlib import Path

from . import gpu_fakes, gpu_runner
from .gpu_plan import KEPT, ROOT, Step, describe, parts, select

RESULTS = ROOT / "bench" / "results"


def main(arguments: list[str]) -> int:
    faked = gpu_fakes.is_asked_for()
    today = datetime.date.today()
    args = _parser().parse_args(arguments)
    try:
        selected = select(args.part, parts(RESULTS / f"GENERATION-{today}.csv"))
    except ValueError as error:
        return _refuse(str(error))
    if args.plan or args.dry_run:
        print(describe(selected, commands=args.dry_run))
        return 0
    card = gpu_fakes.CARD if faked else gpu_runner.find_card()
    if "error" in card:
        return _refuse(card["error"])
    print(f"{card['name']}, sm_{card['generation']}, torch {card['torch']}", flush=True)
    name = f"sm_{card['generation']}-{today}"
    results = KEPT.with_name("gpu-faked") if faked else args.out
    csv, folder = results / f"{name}.csv", results / f"{name}-logs"
    plan = select(args.part, parts(csv.resolve(), compile_target(card)))
    # Build for this card alone.
    os.environ.setdefault("LCW_OPS_CUDA_ARCHS", architecture(card["generation"]))
    key = gpu_runner.sources_key(*card.values())
    history = gpu_runner.History(folder, key, kept=results if faked else KEPT)
    if reason := history.open():
        return _refuse(reason)
    if not faked:
        return gpu_runner.run(plan, folder, history, args.again)
    return gpu_runner.run(gpu_fakes.play(plan, results), folder, history, args.again, gpu_fakes.HEADING)


def architecture(generation: str) -> str:
    """The name for LCW_OPS_CUDA_ARCHS. Some instructions of Hopper (sm_90) exist only under the name sm_90a."""
    return generation + "a" * generation.startswith("9")


def compile_target(card: dict[str, str]) -> str:
    """The card as verification/ahead.py takes it: Triton's target, and the facts by which launchers choose tiles."""
    facts = [int(card["processors"]), int(card["shared_memory"]), False]
    return json.dumps({"target": ["cuda", int(card["generation"]), 32], "facts": facts})


def _parser() -> argparse.ArgumentParser:
    plan: dict[str, list[Step]] = parts(RESULTS / "GENERATION.csv")
    parser = argparse.ArgumentParser(
        prog="make gpu, or python -m bench.gpu",
        description=__doc__,
        epilog="parts, in this order, with estimated minutes:\n  "
        + describe(plan, commands=False).replace("\n", "\n  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "part", nargs="*", help="one of the parts below, the beginning of several (test, memcheck, bench), first (the "
        "parts up to bench-first), sanitize, a test file's path, or all (default)"
    )  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="print the parts and their estimated minutes, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="the same with the processes and their time limits")
    parser.add_argument("--again", action="store_true", help="run also what has passed on these sources")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the folder for logs and rows; default: bench/results"
    )
    return parser


def _refuse(message: str) -> int:
    print(f"make gpu: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
