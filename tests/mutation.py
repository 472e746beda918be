"""Mutation check: do the quick tests notice a wrong line? ``python tests/mutation.py --lines 60`` (hours).

On every floor this program draws lines by a seed and changes one thing on each (a sign, an index, a mask, a stride, a
scale, a comparison, a cache's key). It then runs the quick tests of that module until one fails. It works on a copy of
the tree, so the checkout never changes. The outcomes of a line:

    killed          a test failed that passes on the unchanged copy
    survived        every test passed
    timed out       the tests took too long, so nothing is known: a slow machine does the same as an endless loop
    unclear         the test that failed fails on the unchanged copy too
    does not build  the compiler refused the line

A floor's share is killed / (killed + survived). The exit status is 1 if a floor's share is below 85 %, or if no line of
a floor was judged.

csrc/ needs a compiler: it rebuilds the CPU extension for every line. kernels/ runs in Triton's interpreter, without a
GPU, so it cannot see a fault that only compiled kernels have. csrc/cuda/ is not drawn: it needs nvcc and a GPU.

    --floor functional     this floor alone; may be repeated
    --skip csrc            every floor but this one; may be repeated
    --seed 1               other lines
    --dry-run              show the changes that would be made
    --out mutants.csv      append a row for every line
"""

import argparse
import ast
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
IN_PACKAGE = (
    "functional", "ops", "reference", "nn", "optim", "init", "profile", "jobs", "distributed", "_checks", "_torch",
)  # fmt: skip
FLOORS = {name: (f"lcw_ops/{name}/**/*.py", f"lcw_ops/{name}.py") for name in IN_PACKAGE}
# Not lcw_ops/kernels, which is a link to this folder.
FLOORS["kernels"] = ("kernels/*.py",)
FLOORS["csrc"] = ("csrc/*.h", "csrc/cpu/**/*.h", "csrc/cpu/**/*.cpp")
STEMS = ("lcw_linear", "hypersphere", "weight_norm", "gradient_activation", "orthogonal_filter", "parallel_depth")
# Modules that only one stem uses.
PARTS_OF = {"kernels/angles.py": "hypersphere", "csrc/cpu/sincos.h": "hypersphere"}
# The words in the names of a floor's test files, besides the stem. The dot ends a name.
WORDS = {
    "functional": ("contract", "_op."),
    "ops": ("contract", "_op.", "_cpp.", "backends"),
    "reference": ("contract",),
    "nn": ("modules",),
    "optim": ("optim", "activated_steps", "gradient_hooks"),
    "init": ("test_init",),
    "profile": ("profile",),
    "jobs": ("train", "profile", "cli"),
    "distributed": ("distributed", "ranks"),
    # The callers' tests: these two modules have few of their own.
    "_checks": ("_op.", "modules", "gradient_hooks", "test_init", "optim_states", "distributed", "lps"),
    "_torch": ("contract", "_op.", "torch_", "backends", "gradient_hooks", "activated_steps", "export", "trips"),
    "kernels": ("triton", "_op."),
    "csrc": ("contract", "_op.", "_cpp.", "matmul", "proof"),
}
# The least share of killed lines.
LEAST_SHARE = 0.85
OUTCOMES = ("killed", "survived", "timed out", "unclear", "does not build")
# The most test files to run for a mutant. Those named after the module come first.
MOST_FILES = 16


class Mutant(NamedTuple):
    """One change: ``source[start:end]`` of a file becomes ``text``."""

    path: str
    line: int
    kind: str
    start: int
    end: int
    before: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.kind}: {self.before!r} -> {self.text!r}"


# ---- Changes of Python -----------------------------------------------------------------------------------------------

OPERATORS = {
    ast.Add: ("sign", "+", "-"),
    ast.Sub: ("sign", "-", "+"),
    ast.Mult: ("scale", "*", "/"),
    ast.Div: ("scale", "/", "*"),
    ast.FloorDiv: ("index", "//", "/"),
    ast.And: ("mask", "and", "or"),
    ast.Or: ("mask", "or", "and"),
    ast.Lt: ("comparison", "<", "<="),
    ast.LtE: ("comparison", "<=", "<"),
    ast.Gt: ("comparison", ">", ">="),
    ast.GtE: ("comparison", ">=", ">"),
    ast.Eq: ("comparison", "==", "!="),
    ast.NotEq: ("comparison", "!=", "=="),
    ast.Is: ("comparison", "is", "is not"),
    ast.IsNot: ("comparison", "is not", "is"),
    ast.In: ("mask", "in", "not in"),
    ast.NotIn: ("mask", "not in", "in"),
}


class _Collector(ast.NodeVisitor):
    """Every change of one Python file. Annotations, decorators, messages and asserts are left out."""

    def __init__(self, path: str, source: str):
        self.path, self.source, self.found = path, source, []
        # ast counts columns in bytes of UTF-8.
        self.lines = [line.encode() for line in source.splitlines(keepends=True)]
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line.decode()))
        self.visit(ast.parse(source))

    def place(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1][:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.place(node.lineno, node.col_offset), self.place(node.end_lineno, node.end_col_offset)

    def add(self, node: ast.AST, kind: str, start: int, end: int, text: str) -> None:
        self.found.append(Mutant(self.path, node.lineno, kind, start, end, self.source[start:end], text))

    def between(self, left: ast.AST, right: ast.AST, operator: ast.AST) -> None:
        """Replace the operator between two operands."""
        if type(operator) not in OPERATORS:
            return
        kind, old, new = OPERATORS[type(operator)]
        start, end = self.span(left)[1], self.span(right)[0]
        word = rf"(?<!\w){re.escape(old)}(?!\w)" if old.isalpha() or " " in old else re.escape(old)
        if match := re.search(word, self.source[start:end]):
            self.add(right, kind, start + match.start(), start + match.end(), new)

    def visit_BinOp(self, node):
        if not isinstance(node.left, ast.JoinedStr) and not _is_text(node.left):
            self.between(node.left, node.right, node.op)
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, right, node.op)
        self.generic_visit(node)

    def visit_Compare(self, node):
        for left, right, operator in zip([node.left, *node.comparators], node.comparators, node.ops, strict=False):
            self.between(left, right, operator)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        kind = {ast.USub: "sign", ast.Not: "mask"}.get(type(node.op))
        if kind is not None:
            start, _ = self.span(node)
            self.add(node, kind, start, self.span(node.operand)[0], "")
        self.generic_visit(node)

    def visit_Constant(self, node):
        start, end = self.span(node)
        if isinstance(node.value, bool):
            self.add(node, "mask", start, end, str(not node.value))
        elif isinstance(node.value, int):
            self.add(node, "index", start, end, str(node.value + 1))
        elif isinstance(node.value, float):
            self.add(node, "scale", start, end, str(2 * node.value or 1.0))

    def visit_Attribute(self, node):
        if node.attr in ("mT", "T"):
            end = self.span(node)[1]
            self.add(node, "stride", end - len(node.attr) - 1, end, "")
        self.generic_visit(node)

    def visit_Call(self, node):
        is_contiguous = isinstance(node.func, ast.Attribute) and node.func.attr == "contiguous" and not node.args
        if is_contiguous and not node.keywords:
            self.add(node, "stride", self.span(node.func.value)[1], self.span(node)[1], "")
        self.generic_visit(node)

    def visit_Assign(self, node):
        names = " ".join(ast.unparse(target) for target in node.targets)
        if "key" in names and isinstance(node.value, ast.Tuple):
            self.shorten(node.value)
        self.generic_visit(node)

    def visit_Subscript(self, node):
        if isinstance(node.slice, ast.Tuple) and isinstance(node.value, ast.Name | ast.Attribute):
            name = ast.unparse(node.value).lower()
            if any(word in name for word in ("cache", "memo", "made", "known", "proven")):
                self.shorten(node.slice)
        self.generic_visit(node)

    def shorten(self, key: ast.Tuple) -> None:
        """Leave one entry out of a cache's key."""
        for entry in key.elts:
            start, end = self.span(entry)
            self.add(entry, "cache key", start, end, "None")

    def visit_FunctionDef(self, node):
        for one in node.body:
            self.visit(one)
        for default in (*node.args.defaults, *(one for one in node.args.kw_defaults if one is not None)):
            self.visit(default)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def leave_out(self, node):
        """Skip messages, and statements that a run with -O would skip."""

    visit_Raise = visit_Assert = visit_JoinedStr = visit_Import = visit_ImportFrom = leave_out


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


# ---- Changes of C++ --------------------------------------------------------------------------------------------------

CPP = [
    ("sign", r"(?<=\w )\+(?= \w)", "-"),
    ("sign", r"(?<=\w )-(?= \w)", "+"),
    ("scale", r"(?<=\w )\*(?= \w)", "+"),
    ("comparison", r"(?<= )<(?= )", "<="),
    ("comparison", r"(?<= )<=(?= )", "<"),
    ("comparison", r"(?<= )>=(?= )", ">"),
    ("comparison", r"(?<= )==(?= )", "!="),
    ("mask", r"&&", "||"),
    ("mask", r"\|\|", "&&"),
    ("index", r"(?<=\[)\w+(?=\])", r"\g<0> + 1"),
    ("stride", r"\b(row_)?stride\b(?!\()", r"(\g<0> + 1)"),
    ("mask", r"\btrue\b", "false"),
    ("mask", r"\bfalse\b", "true"),
]


def cpp_mutants(path: str, source: str) -> Iterator[Mutant]:
    place = 0
    for number, line in enumerate(source.splitlines(keepends=True), 1):
        code = line.partition("//")[0]
        if not code.lstrip().startswith(("#", "template", "using", "LCW_CHECK", '"')) and "static_assert" not in code:
            for kind, pattern, replacement in CPP:
                for match in re.finditer(pattern, code):
                    start, end = place + match.start(), place + match.end()
                    yield Mutant(path, number, kind, start, end, match[0], match.expand(replacement))
        place += len(line)


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def draw(floor: str, lines: int, seed: int) -> list[Mutant]:
    """Draw this many lines of the floor, with one change on each."""
    by_line: dict[tuple[str, int], list[Mutant]] = {}
    for pattern in FLOORS[floor]:
        for path in sorted(ROOT.glob(pattern)):
            name, source = str(path.relative_to(ROOT)), path.read_text()
            found = cpp_mutants(name, source) if floor == "csrc" else _Collector(name, source).found
            for mutant in found:
                by_line.setdefault((name, mutant.line), []).append(mutant)
    generator = random.Random(f"{floor} {seed}")
    chosen = generator.sample(sorted(by_line), min(lines, len(by_line)))
    return [generator.choice(by_line[line]) for line in chosen]


def floor_of(path: str) -> str:
    folder, second = Path(path).with_suffix("").parts[:2]
    return second if folder == "lcw_ops" else folder


def tests_of(path: str) -> list[str]:
    """The test files of a module, the likeliest first: those named after the module, its stem and floor, its stem, its
    floor, and then all that import it.
    """
    module = Path(path).with_suffix("")
    module = module.parent if module.stem == "__init__" else module
    floor = floor_of(path)
    stems = [stem for stem in STEMS if stem in PARTS_OF.get(path, path)]
    dotted = ".".join(module.parts)
    parent, _, name = dotted.rpartition(".")
    imports = re.compile(rf"{re.escape(dotted)}\b|from {re.escape(parent)} import [^\n]*\b{re.escape(name)}\b")
    ranked = []
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        of_stem = any(stem in file.stem for stem in stems)
        of_any_stem = any(stem in file.stem for stem in STEMS)
        of_floor = any(word in f"{file.stem}." for word in WORDS[floor])
        if file.stem == f"test_{module.stem.strip('_')}" or (of_floor and (of_stem or not of_any_stem)):
            rank = 0
        elif of_stem or (of_floor and not stems):
            rank = 1
        elif imports.search(file.read_text()):
            rank = 2
        else:
            continue
        # Within a rank, files that compile or start processes come last, and those that other floors skip.
        is_slow = "integration" in file.stem or ("triton" in file.stem) != (floor == "kernels")
        ranked.append((rank, is_slow, file.name))
    return [f"tests/{name}" for *_, name in sorted(ranked)][:MOST_FILES]


# ---- Running ---------------------------------------------------------------------------------------------------------


class Tree:
    """A copy of the checkout in which one line at a time is wrong."""

    def __init__(self, folder: Path, timeout: float):
        self.root, self.timeout = folder / "tree", timeout
        ignored = shutil.ignore_patterns(".git", ".venv*", "dist", "demo", "__pycache__", ".*_cache", "results")
        shutil.copytree(ROOT, self.root, symlinks=True, ignore=ignored)
        self.trusted: dict[tuple[str, ...], bool] = {}

    def pytest(self, selection: list[str], floor: str) -> tuple[str, str]:
        """("passed" or "failed" or "timed out", the first test that failed or "")."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *selection]
        environment = os.environ | {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        if floor == "kernels":
            # The same run as tests/run.py's.
            command += ["-k", "triton"]
            environment |= {"TRITON_INTERPRET": "1", "LCW_OPS_TEST_DEVICE": "cpu"}
        process = subprocess.Popen(
            command, cwd=self.root, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return "timed out", ""
        failed = re.search(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - .*)?$", output, flags=re.MULTILINE)
        # 5 means that no test was selected. Every other status but 0 is a failure; a crash counts as one.
        return ("passed" if process.returncode in (0, 5) else "failed"), (failed[1] if failed else "")

    def build(self) -> bool:
        environment = os.environ | {"LCW_OPS_CUDA_ARCHS": ""}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        result = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        return result.returncode == 0

    def outcome(self, mutant: Mutant) -> tuple[str, str]:
        """(one of OUTCOMES, the test that decided it)."""
        path, is_cpp = self.root / mutant.path, mutant.path.startswith("csrc")
        floor, selection = floor_of(mutant.path), tests_of(mutant.path)
        original = path.read_text()
        library = self.root / "lcw_ops/_C.abi3.so"
        kept = library.read_bytes() if is_cpp else b""
        try:
            path.write_text(original[: mutant.start] + mutant.text + original[mutant.end :])
            if is_cpp and not self.build():
                return "does not build", ""
            found, test = self.pytest(selection, floor)
        finally:
            path.write_text(original)
            if is_cpp:
                library.write_bytes(kept)
        if found != "failed":
            return {"passed": "survived"}.get(found, found), ""
        # A crash names no test. Then all of the tests must pass on the unchanged copy.
        blamed = (test,) if test else tuple(selection)
        if blamed not in self.trusted:
            self.trusted[blamed] = self.pytest(list(blamed), floor)[0] == "passed"
        return ("killed" if self.trusted[blamed] else "unclear"), test or "crashed"


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


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floor", action="append", choices=FLOORS, help="default: every floor")
    parser.add_argument("--skip", action="append", choices=FLOORS, default=[])
    parser.add_argument("--lines", type=int, default=60, help="lines per floor (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for the tests of one line (900)")
    parser.add_argument("--out", type=Path, metavar="CSV")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    floors = [floor for floor in args.floor or FLOORS if floor not in args.skip]
    drawn = {floor: draw(floor, args.lines, args.seed) for floor in floors}
    if args.dry_run:
        for floor, mutants in drawn.items():
            for mutant in mutants:
                print(f"{floor}: {mutant}\n    {' '.join(tests_of(mutant.path))}")
        return 0
    counts: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder), args.timeout)
        for floor, mutants in drawn.items():
            counts[floor] = Counter()
            for mutant in mutants:
                begin = time.monotonic()
                outcome, test = tree.outcome(mutant)
                counts[floor][outcome] += 1
                print(f"{outcome:14} {mutant}  {test} ({time.monotonic() - begin:.0f} s)", flush=True)
                if args.out:
                    with open(args.out, "a", newline="") as file:
                        csv.writer(file, lineterminator="\n").writerow([floor, outcome, *mutant, test])
    return report(counts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
