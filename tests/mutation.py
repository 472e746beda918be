"""Mutation check: do the quick tests notice a wrong line? ``python tests/mutation.py --lines 60`` (an hour or two).

On every floor this program draws lines by a seed and changes one thing on each (a sign, an index, a mask, a stride, a
scale, a comparison, a cache's key). It then runs the quick tests that execute the line, until one fails. A first run of
the suite under coverage.py records which tests these are; --map keeps the record. Everything happens in copies of the
tree, so the checkout never changes. The outcomes of a line:

    killed          a test failed, crashed or did not end, and the same test passes on the unchanged copy
    survived        every test passed
    unclear         the test that failed fails on the unchanged copy too
    does not build  the compiler refused the line

A floor's share is killed / (killed + survived). The exit status is 1 if a floor's share is below 85 %, or if no line of
a floor was judged.

A line that runs at import has no record; the tests of the lines that use its name stand in, or those of the file. A
line of C++ has none either: the program runs tests of all files of the source's stem. csrc/ needs a compiler, since
every line is compiled and linked again, for the fastest instruction set alone. kernels/ run in Triton's interpreter,
without a GPU, so the check cannot see a fault that only compiled kernels have. csrc/cuda/ is not drawn: it needs nvcc
and a GPU.

    --floor functional     this floor alone; may be repeated
    --skip csrc            every floor but this one; may be repeated
    --seed 1               other lines
    --jobs 2               processes side by side, each with a copy of the tree
    --dry-run              show the changes that would be made
    --out mutants.csv      append a row for every line; lines that have a row are not judged again
    --map FOLDER           keep the record of tests in this folder, or use the one that is there; a record of other
                           sources is refused
"""

import argparse
import csv
import gc
import hashlib
import json
import multiprocessing
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # OpenMP's threads of two processes would wait for each other in busy loops.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tests of each line run in a fork of this process, which has the slow imports behind it. Neither lcw_ops nor Triton
# may be among these: the one comes from the copy, and the other reads TRITON_INTERPRET when it is imported.
import hypothesis  # noqa: F401
import pytest
import torch
from support.line_map import LineMap
from support.mutants import FLOORS, ROOT, Mutant, draw

STEMS = ("lcw_linear", "hypersphere", "weight_norm", "gradient_activation", "orthogonal_filter", "parallel_depth")
# The test files of csrc/, besides those that its stem begins.
OF_EVERY_STEM = ("test_contract", "test_matmul")
OF_A_STEM = ("_op", "_cpp", "_proof", "orthogonal_filter", "activated_steps")
# Sources that files of another stem test too.
ALSO = {"gradient_activation": "activated_steps"}
# The least share of killed lines.
LEAST_SHARE = 0.85
OUTCOMES = ("killed", "survived", "unclear", "does not build")
# The most seconds of quick tests to run for a line, as recorded, and of the others.
MOST_SECONDS = (30.0, 60.0)
# A test that passes in s seconds has not ended after 10 s + 90 s: the line loops. Collecting takes its time too.
SLOWER, SPARE = 10.0, 90.0
# The environments of tests/run.py's runs.
MODES = {"native": {}, "interpreter": {"TRITON_INTERPRET": "1", "LCW_OPS_TEST_DEVICE": "cpu"}}
# torch would take the result of an unchanged line from its caches of compiled graphs.
NO_GRAPH_CACHE = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
# The file of a record that holds the digest of its sources.
FINGERPRINT = "sources.sha256"
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "dist", "build", "demo", "__pycache__", ".*_cache")


def floor_of(path: str) -> str:
    folder, second = Path(path).with_suffix("").parts[:2]
    return second if folder == "lcw_ops" else folder


def tests_of(path: str) -> list[str]:
    """The files that test a C++ source: those of its stem, or of every stem if it belongs to none."""
    stems = [stem for stem in STEMS if stem in path] or list(STEMS)
    stems += [ALSO[stem] for stem in stems if stem in ALSO]
    names = [file.stem for file in sorted((ROOT / "tests").glob("test_*.py"))]
    return [
        f"tests/{name}.py"
        for name in names
        if name in OF_EVERY_STEM
        or (any(s in name for s in stems) and name.endswith(OF_A_STEM) and "triton" not in name)
    ]


# ---- Running ---------------------------------------------------------------------------------------------------------


class Selection(NamedTuple):
    """Tests to run: whole files, or the named tests in this order."""

    mode: str
    files: list[str]
    tests: list[str]


class Found(NamedTuple):
    """How a selection ended: "passed" or "failed", and the test that failed, or "" if none could be named."""

    result: str
    test: str


class Reporter:
    """A plugin of pytest that selects and orders tests, and tells the parent process what starts and what fails."""

    def __init__(self, tests: list[str], pipe: int):
        self.order = {test: place for place, test in enumerate(tests)}
        self.pipe = pipe

    def tell(self, word: str, test: str) -> None:
        os.write(self.pipe, f"{word} {test}\n".encode())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items) -> None:
        if self.order:
            items[:] = sorted(
                (item for item in items if item.nodeid in self.order), key=lambda item: self.order[item.nodeid]
            )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tell("start", nodeid)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.tell("failed", report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.tell("failed", report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.tell("end", "")


class Tree:
    """A copy of the checkout in which one line at a time is wrong."""

    def __init__(self, folder: Path, maps: dict[str, LineMap]):
        self.root, self.maps = folder / "tree", maps
        shutil.copytree(ROOT, self.root, symlinks=True, ignore=NOT_COPIED)
        self.sources = {
            str(path.relative_to(ROOT)): path.read_text().splitlines()
            for floor in FLOORS
            if floor != "csrc"
            for pattern in FLOORS[floor]
            for path in ROOT.glob(pattern)
        }
        self.trusted: dict[str, bool] = {}
        self.compiler: Compiler | None = None
        # Python reuses a compiled file if time and size agree, and a changed line often has the same size.
        self.time = int(time.time()) - 10_000_000

    def write(self, path: Path, text: str) -> None:
        self.time += 10
        path.write_text(text)
        os.utime(path, (self.time, self.time))

    def run(self, selection: Selection) -> Found:
        """Run the tests in a fork of this process, until one fails."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            self._run_as_child(selection, writer)
        os.close(writer)
        try:
            return self._follow(child, reader, self.maps[selection.mode].seconds)
        finally:
            os.close(reader)

    def _run_as_child(self, selection: Selection, pipe: int) -> None:
        status = 70
        try:
            # pytest collects garbage at its end. Among the objects of torch's import that took a second (measured).
            gc.freeze()
            os.setsid()
            os.chdir(self.root)
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nothing, stream)
            os.environ |= {"PYTHONPATH": str(self.root)} | NO_GRAPH_CACHE | MODES[selection.mode]
            sys.path[:0] = [str(self.root), str(self.root / "tests")]
            words = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *selection.files]
            if selection.mode == "interpreter":
                words += ["-k", "triton"]
            status = int(pytest.main(words, plugins=[Reporter(selection.tests, pipe)]))
        finally:
            os._exit(status)

    def _follow(self, child: int, reader: int, seconds: dict[str, float]) -> Found:
        """Read what the child tells, and end it if a test takes too long."""
        running, failed, has_ended, rest = "", "", False, b""
        while True:
            limit = SPARE + SLOWER * seconds.get(running, 30.0)
            if not select.select([reader], [], [], limit)[0]:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Found("failed", running)
            read = os.read(reader, 65536)
            if not read:
                break
            *whole, rest = (rest + read).split(b"\n")
            for line in whole:
                word, _, test = line.decode().partition(" ")
                if word == "start":
                    running = test
                elif word == "failed":
                    failed = failed or test
                else:
                    has_ended = True
        _, status = os.waitpid(child, 0)
        # 5 means that no test was selected. Every other status but 0 is a failure, and so is an exit before the end.
        if has_ended and os.waitstatus_to_exitcode(status) in (0, 5):
            return Found("passed", "")
        return Found("failed", failed or running)

    def tests(self, mutant: Mutant, lines: LineMap) -> tuple[list[str], list[str]]:
        """The quick tests that execute the line, and the others. C++ is judged by the files of its tests."""
        if mutant.path.startswith("csrc"):
            return lines.of_files(tests_of(mutant.path)), []
        if mutant.body is None:
            return lines.of((mutant.path, number) for number in mutant.lines)
        # The line runs at import.
        if mutant.body:
            return lines.of((mutant.path, number) for number in mutant.body)
        text = self.sources[mutant.path]
        name = re.match(r"\s*(\w+)\b[^=]*=[^=]", text[mutant.lines.start - 1])
        users = (
            (path, number)
            for path, source in self.sources.items()
            for number, line in enumerate(source, 1)
            if name and re.search(rf"\b{name[1]}\b", line)
        )
        found = lines.of(users)
        return found if any(found) else lines.of((mutant.path, number) for number in range(1, len(text) + 1))

    def selections(self, mutant: Mutant) -> list[Selection]:
        """The tests of a line in every mode, as many as MOST_SECONDS allows: quick ones, then the others."""
        modes = ("interpreter", "native") if floor_of(mutant.path) == "kernels" else ("native",)
        found = []
        for mode in modes:
            for tests, seconds in zip(self.tests(mutant, self.maps[mode]), MOST_SECONDS, strict=True):
                if tests := self.maps[mode].within(tests, seconds):
                    found.append(Selection(mode, sorted({test.partition("::")[0] for test in tests}), tests))
        return found

    def outcome(self, mutant: Mutant) -> tuple[str, str]:
        """(one of OUTCOMES, the test that decided it)."""
        path, is_cpp = self.root / mutant.path, mutant.path.startswith("csrc")
        original = path.read_text()
        if is_cpp and self.compiler is None:
            self.compiler = Compiler(self.root)
        try:
            self.write(path, original[: mutant.start] + mutant.text + original[mutant.end :])
            if is_cpp and not self.compiler.build(mutant.path):
                return "does not build", ""
            found = Found("passed", "")
            for selection in self.selections(mutant):
                found = self.run(selection)
                if found.result == "failed":
                    break
        finally:
            self.write(path, original)
            if is_cpp:
                self.compiler.restore()
        if found.result == "passed":
            return "survived", ""
        # Without a name, all of the tests must pass on the unchanged copy.
        blamed = Selection(selection.mode, [found.test.partition("::")[0]], [found.test]) if found.test else selection
        if "::" not in found.test:
            blamed = blamed._replace(tests=[])
        key = json.dumps(blamed)
        if key not in self.trusted:
            self.trusted[key] = self.run(blamed).result == "passed"
        return ("killed" if self.trusted[key] else "unclear"), found.test or "all of them"


class Compiler:
    """Compiles the sources that one changed file reaches, and links them with the other objects of a whole build."""

    def __init__(self, root: Path):
        self.root, self.library = root, root / "lcw_ops/_C.abi3.so"
        command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
        environment = os.environ | {"LCW_OPS_CUDA_ARCHS": ""}
        # Only the fastest instruction set runs, so the others need not be compiled.
        fastest = {"AVX512": "Avx512", "AVX2": "Avx2"}.get(torch.backends.cpu.get_cpu_capability())
        if fastest:
            environment["CXXFLAGS"] = f"-DLCW_ONLY_ISA={fastest}"
        built = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        # setup.py prints the commands that it runs.
        commands = [shlex.split(line) for line in built.stdout.splitlines() if " -o " in line]
        (self.link,) = (words for words in commands if "-shared" in words)
        # setup.py links in its build folder and copies the library from there.
        self.link[self.link.index("-o") + 1] = str(self.library)
        self.compile = [words for words in commands if "-c" in words]
        self.depends = [self._depends(words) for words in self.compile]
        self.kept = self.library.read_bytes()

    def _depends(self, words: list[str]) -> set[str]:
        listing = subprocess.run(
            [*words[: words.index("-o")], "-MM"], cwd=self.root, capture_output=True, text=True, check=True
        )
        return {os.path.normpath(name) for name in listing.stdout.replace("\\\n", " ").split()[1:]}

    def build(self, path: str) -> bool:
        link = list(self.link)
        for words, depends in zip(self.compile, self.depends, strict=True):
            if path in depends:
                unchanged = words[-1]
                changed = unchanged + ".changed.o"
                if subprocess.run([*words[:-1], changed], cwd=self.root, capture_output=True).returncode:
                    return False
                link[link.index(unchanged)] = changed
        return subprocess.run(link, cwd=self.root, capture_output=True).returncode == 0

    def restore(self) -> None:
        self.library.unlink(missing_ok=True)
        self.library.write_bytes(self.kept)


def fingerprint() -> str:
    """A digest of the sources and the tests. If one of them changes, the lines of a record are other lines."""
    patterns = [pattern for floor in FLOORS.values() for pattern in floor] + ["tests/**/*.py"]
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def is_record(folder: Path) -> bool:
    """Whether the folder has a whole record of these sources."""
    kept = folder / FINGERPRINT
    return kept.exists() and kept.read_text() == fingerprint()


def record(folder: Path, jobs: int) -> None:
    """Run the quick suite under coverage.py, with tests/run.py, in a copy of the tree."""
    sources = fingerprint()
    with tempfile.TemporaryDirectory() as copies:
        root = Path(copies) / "tree"
        shutil.copytree(ROOT, root, symlinks=True, ignore=NOT_COPIED)
        for mode in MODES:
            path = os.pathsep.join([str(root / "tests"), str(root)])
            environment = os.environ | {"PYTHONPATH": path, "LCW_OPS_LINE_MAP": str(folder / mode)}
            command = [sys.executable, "tests/run.py", "fast", "--only", mode, "-n", str(jobs)]
            print(f"recording the tests of every line: {mode}", flush=True)
            # Tests that count calls or measure times may fail under a tracer, which does not matter here.
            subprocess.run([*command, "-p", "support.line_map"], cwd=root, env=environment, stdout=subprocess.DEVNULL)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINGERPRINT).write_text(sources)


def judge(copies: Path, folder: Path, mutants, results) -> None:
    """A job: take mutants from one queue and put the results in another, until None comes. None is the last result."""
    try:
        _judge(copies, folder, mutants, results)
    finally:
        # Without it, a job that failed would be waited for.
        results.put(None)


def _judge(copies: Path, folder: Path, mutants, results) -> None:
    tree = Tree(copies / str(os.getpid()), {mode: LineMap(folder / mode) for mode in MODES})
    while (work := mutants.get()) is not None:
        floor, mutant = work
        begin = time.monotonic()
        results.put((floor, mutant, *tree.outcome(mutant), time.monotonic() - begin))


def share_of(found: Counter) -> float | None:
    """The share of killed lines among those that were judged, or None if there are none."""
    judged = found["killed"] + found["survived"]
    return found["killed"] / judged if judged else None


def report(counts: dict[str, Counter]) -> int:
    """Print a row for every floor and one for all, and return the exit status."""
    print(f"{'':12} {'share':>6}  " + "  ".join(OUTCOMES))
    for name, found in {**counts, "all": sum(counts.values(), Counter())}.items():
        share = share_of(found)
        columns = "  ".join(f"{found[outcome]:{len(outcome)}}" for outcome in OUTCOMES)
        print(f"{name:12} {'-' if share is None else f'{share:.1%}':>6}  {columns}")
    low = [floor for floor, found in counts.items() if (share_of(found) or 0) < LEAST_SHARE]
    if low:
        print(f"below {LEAST_SHARE:.0%}, or without a judged line: {', '.join(low)}")
    return 1 if low else 0


IDENTITY = ("floor", "path", "line", "kind", "before", "text")
COLUMNS = ("floor", "outcome", "path", "line", "kind", "before", "text", "source", "test")


def judged_before(table: Path | None) -> dict[tuple, str]:
    """The outcomes in a table that --out made."""
    if table is None or not table.exists():
        return {}
    with open(table, newline="") as file:
        return {tuple(row[name] for name in IDENTITY): row["outcome"] for row in csv.DictReader(file)}


def row_of(floor: str, outcome: str, mutant: Mutant, test: str) -> dict:
    source = (ROOT / mutant.path).read_text().splitlines()[mutant.line - 1].strip()
    return dict(
        zip(
            COLUMNS,
            (floor, outcome, mutant.path, mutant.line, mutant.kind, mutant.before, mutant.text, source, test),
            strict=True,
        )
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floor", action="append", choices=FLOORS, help="default: every floor")
    parser.add_argument("--skip", action="append", choices=FLOORS, default=[])
    parser.add_argument("--lines", type=int, default=60, help="lines per floor (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--map", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="CSV")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    floors = [floor for floor in args.floor or FLOORS if floor not in args.skip]
    drawn = [(floor, mutant) for floor in floors for mutant in draw(floor, args.lines, args.seed)]
    if args.dry_run:
        for floor, mutant in drawn:
            print(f"{floor}: {mutant}")
        return 0
    if args.map and args.map.exists() and not is_record(args.map):
        came = f"is {args.map}, which has no whole record of these sources"
        parser.error(f"--map {came}; expected such a record, or a folder that does not exist yet")
    before = judged_before(args.out)
    counts = {floor: Counter() for floor in floors}
    left = []
    for floor, mutant in drawn:
        identity = (floor, mutant.path, str(mutant.line), mutant.kind, mutant.before, mutant.text)
        if identity in before:
            counts[floor][before[identity]] += 1
        else:
            left.append((floor, mutant))
    with tempfile.TemporaryDirectory() as folder:
        copies, lines = Path(folder), args.map or Path(folder) / "map"
        if not lines.exists():
            record(lines, args.jobs)
        context = multiprocessing.get_context("fork")
        mutants, results = context.Queue(), context.Queue()
        for work in (*left, *[None] * args.jobs):
            mutants.put(work)
        jobs = [context.Process(target=judge, args=(copies, lines, mutants, results)) for _ in range(args.jobs)]
        for job in jobs:
            job.start()
        running = args.jobs
        while running:
            result = results.get()
            if result is None:
                running -= 1
                continue
            floor, mutant, outcome, test, seconds = result
            counts[floor][outcome] += 1
            print(f"{outcome:14} {mutant}  {test} ({seconds:.0f} s)", flush=True)
            if args.out:
                is_new = not args.out.exists()
                with open(args.out, "a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    if is_new:
                        writer.writeheader()
                    writer.writerow(row_of(floor, outcome, mutant, test))
        for job in jobs:
            job.join()
    failed = [job for job in jobs if job.exitcode]
    if failed:
        print(f"{len(failed)} of {len(jobs)} jobs failed (above); the table lacks their lines")
    return report(counts) or bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
