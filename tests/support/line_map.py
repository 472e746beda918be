"""Which tests execute which line, and for how long: a plugin of pytest, and what tests/mutation.py reads afterwards.

    LCW_OPS_LINE_MAP=folder pytest -p support.line_map ...

coverage.py traces the package, with the running test as its context. Processes that a test starts are traced too, if
their Python path still begins with the folder: a sitecustomize module there starts the tracer.
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import coverage

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ["LCW_OPS_LINE_MAP"]) if "LCW_OPS_LINE_MAP" in os.environ else None
IN_PROCESSES = """
import atexit, os
try:
    import coverage
except ImportError:
    pass
else:
    folder = os.environ["LCW_OPS_LINE_MAP"]
    tracer = coverage.Coverage(
        config_file=False, data_file=os.path.join(folder, "lines"), data_suffix=True,
        include=json_include, context=os.environ.get("LCW_OPS_LINE_MAP_TEST", ""), messages=False,
    )
    tracer.start()
    atexit.register(lambda: (tracer.stop(), tracer.save()))
"""
INCLUDE = [f"{ROOT}/lcw_ops/*", f"{ROOT}/kernels/*"]

# ---- Recording -------------------------------------------------------------------------------------------------------

if FOLDER is not None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "sitecustomize.py").write_text(IN_PROCESSES.replace("json_include", repr(INCLUDE)))
    _path = os.environ.get("PYTHONPATH", "")
    # sitecustomize would trace this process as well, so the folder joins the path only now.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *filter(None, [_path])])
    _tracer = coverage.Coverage(
        config_file=False, data_file=str(FOLDER / "lines"), data_suffix=True, include=INCLUDE, messages=False
    )
    _tracer.start()
    _seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logstart(nodeid: str) -> None:
        os.environ["LCW_OPS_LINE_MAP_TEST"] = nodeid
        _tracer.switch_context(nodeid)

    def pytest_runtest_logreport(report) -> None:
        _seconds[report.nodeid] += report.duration

    def pytest_sessionfinish() -> None:
        _tracer.stop()
        _tracer.save()
        (FOLDER / f"seconds-{os.getpid()}.json").write_text(json.dumps(_seconds))


# ---- Reading ---------------------------------------------------------------------------------------------------------


class LineMap:
    """The recorded tests of every line."""

    def __init__(self, folder: Path):
        self.seconds: dict[str, float] = {}
        for file in folder.glob("seconds-*.json"):
            self.seconds |= json.loads(file.read_text())
        self.tests: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for file in folder.glob("lines.*"):
            data = coverage.CoverageData(str(file))
            data.read()
            for name in data.measured_files():
                path = name.partition("/tree/")[2]
                # lcw_ops/kernels is a link.
                path = path.replace("lcw_ops/kernels/", "kernels/")
                for line, contexts in data.contexts_by_lineno(name).items():
                    self.tests[path][line].update(context for context in contexts if context in self.seconds)

    def of(self, path: str, lines: range) -> list[str]:
        """The tests that execute one of these lines: first the quickest case of each function, then the second case."""
        found = set().union(*(self.tests[path][line] for line in lines))
        by_function = defaultdict(list)
        for test in sorted(found, key=lambda test: (self.seconds[test], test)):
            by_function[test.partition("[")[0]].append(test)
        ranked = [
            (place, self.seconds[test], test) for cases in by_function.values() for place, test in enumerate(cases)
        ]
        return [test for *_, test in sorted(ranked)]
