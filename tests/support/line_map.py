"""Which tests execute which line, and for how long: a plugin of pytest, and what tests/mutation.py reads afterwards.

    LCW_OPS_LINE_MAP=folder pytest -p support.line_map ...

coverage.py traces the package, with the running test as its context. Processes that a test starts are traced too, if
their Python path still begins with the folder: a sitecustomize module there starts the tracer.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
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
    save = lambda: (tracer.stop(), tracer.save())
    atexit.register(save)
    # Ranks of a process group leave this way.
    leave = os._exit
    os._exit = lambda status: (save(), leave(status))
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
        # The first test of a file may run a fixture that another selection would run for another test.
        file = report.nodeid.partition("::")[0]
        if report.when == "setup":
            _seconds[file] = max(_seconds[file], report.duration)

    def pytest_sessionfinish() -> None:
        _tracer.stop()
        _tracer.save()
        (FOLDER / f"seconds-{os.getpid()}.json").write_text(json.dumps(_seconds))


# ---- Reading ---------------------------------------------------------------------------------------------------------

# Tests that take longer, or whose file has a fixture that does, and tests that start processes run only on lines that
# the others did not notice.
LONG_SECONDS = 3.0


class LineMap:
    """The recorded tests of every line."""

    def __init__(self, folder: Path):
        self.seconds: dict[str, float] = {}
        testers = set()
        for file in folder.glob("seconds-*.json"):
            testers.add(file.stem.partition("-")[2])
            self.seconds |= json.loads(file.read_text())
        # Path and line, to the tests that execute it in their own process, and to the files of those that start a
        # process for it: often a fixture starts it, for the first test of many.
        self.inside: dict[tuple[str, int], set[str]] = defaultdict(set)
        self.outside: dict[tuple[str, int], set[str]] = defaultdict(set)
        for file in folder.glob("lines.*"):
            process = file.name.partition(".pid")[2].partition(".")[0]
            is_inside = process in testers
            data = coverage.CoverageData(str(file))
            data.read()
            for name in data.measured_files():
                # lcw_ops/kernels is a link.
                path = name.partition("/tree/")[2].replace("lcw_ops/kernels/", "kernels/")
                for line, contexts in data.contexts_by_lineno(name).items():
                    tests = {context for context in contexts if context in self.seconds}
                    if is_inside:
                        self.inside[path, line] |= tests
                    else:
                        self.outside[path, line] |= {test.partition("::")[0] for test in tests}

    def with_fixtures(self, test: str) -> float:
        return max(self.seconds[test], self.seconds.get(test.partition("::")[0], 0.0))

    def of(self, lines: Iterable[tuple[str, int]]) -> tuple[list[str], list[str]]:
        """The quick tests that execute one of these lines, and the others."""
        lines = list(lines)
        inside = set().union(*(self.inside.get(line, ()) for line in lines))
        quick = {test for test in inside if self.with_fixtures(test) <= LONG_SECONDS}
        files = set().union(*(self.outside.get(line, ()) for line in lines))
        return self.ranked(quick), self.ranked((inside | set(self.of_files(files))) - quick)

    def of_files(self, files: Iterable[str]) -> list[str]:
        """All tests of these files."""
        files = set(files)
        return self.ranked({test for test in self.seconds if "::" in test and test.partition("::")[0] in files})

    def ranked(self, tests: set[str]) -> list[str]:
        """First the quickest case of each function, then the second case."""
        by_function = defaultdict(list)
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            by_function[test.partition("[")[0]].append(test)
        ranked = []
        for cases in by_function.values():
            ranked += [(place, self.seconds[test], test) for place, test in enumerate(cases)]
        return [test for *_, test in sorted(ranked)]

    def within(self, tests: list[str], seconds: float) -> list[str]:
        """The first test, and of the others as many as take this long together. A file's fixtures run once."""
        taken, files = [], set()
        for test in tests:
            file = test.partition("::")[0]
            if taken:
                seconds -= self.seconds[test] if file in files else self.with_fixtures(test)
            if seconds < 0:
                break
            files.add(file)
            taken.append(test)
        return taken
