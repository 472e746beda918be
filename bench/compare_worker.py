"""One process of bench/compare.py: check or time our competitors of one case, with the library of one tree.

The library is the tree's, and the benchmarks are those beside this file, so that both trees do the same work. This file
is run by its path: another tree may not have it. The only argument is the job as JSON, and the last line of the output
is the result as JSON. A job that fails gives {"reason": ...}.
"""

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

BENCH = Path(__file__).resolve().parent

# The share of the time budget that is spent on calls before the measured ones, and the fewest measured calls.
WARM_UP, MIN_CALLS = 0.25, 3


def main(job: dict) -> dict:
    try:
        return _carry_out(job)
    except Exception as error:
        return {"reason": _one_line(error)}


def _carry_out(job: dict) -> dict:
    registry = import_benchmarks(job["tree"])
    import torch

    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    case = next(one for one in registry.cases(job["stem"], device.type) if one.label == job["case"])
    if job["competitor"] is None:
        return _check(registry, case, device)
    competitor = next(one for one in case.competitors if one.name == job["competitor"])
    # Both processes of a pair get the same inputs, and every pair others.
    torch.manual_seed(job["seed"])
    run = competitor.prepare(case.make_inputs(device))
    _seconds(lambda: registry.seconds(run, device), WARM_UP * job["budget"], 1)
    times = _seconds(lambda: registry.seconds(run, device), job["budget"], MIN_CALLS)
    return {"median_s": statistics.median(times)}


def import_benchmarks(tree: str) -> ModuleType:
    """Import lcw_ops from ``tree``, make the folder of this file its package ``bench``, and return its registry."""
    # Python puts the folder of this file first. Its modules must not be found as top-level ones.
    sys.path[:] = [tree, *(entry for entry in sys.path if Path(entry).resolve() != BENCH)]
    sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, _NoOtherTree)
    import lcw_ops

    if not Path(lcw_ops.__file__).is_relative_to(tree):
        raise ImportError(f"lcw_ops was imported from {lcw_ops.__file__}, expected {tree}")
    spec = ModuleSpec("lcw_ops.bench", None, is_package=True)
    spec.submodule_search_locations = [str(BENCH)]
    sys.modules["lcw_ops.bench"] = importlib.util.module_from_spec(spec)
    from lcw_ops.bench import registry

    return registry


class _NoOtherTree:
    """Ends the search for a module of lcw_ops that the tree lacks.

    An editable install of the package adds a finder to the end of ``sys.meta_path``, which would take the module from
    the tree that is installed.
    """

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> None:
        if name.startswith("lcw_ops."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _check(registry, case, device) -> dict:
    """Our competitors that may be timed, and why the others may not: name -> reason."""
    ours = [one for one in case.competitors if one.ours]
    missing = {one.name: reason for one in ours if (reason := one.missing()) is not None}
    errors = registry.check(case, device, [one for one in ours if one.name not in missing])
    refused = {name: _one_line(error) for name, error in errors.items() if isinstance(error, registry.WrongResult)}
    ready = [one.name for one in ours if one.name not in missing | refused]
    return {"ready": ready, "missing": missing, "refused": refused}


def _seconds(measure: Callable[[], float], budget: float, least: int) -> list[float]:
    """The seconds of calls that together take ``budget``, and of at least this number of calls."""
    times: list[float] = []
    spent = 0.0
    while spent < budget or len(times) < least:
        times.append(measure())
        spent += times[-1]
    return times


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
