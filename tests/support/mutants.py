"""The changes that tests/mutation.py makes: one wrong token on one line, of Python or of C++, drawn by a seed."""

import ast
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
IN_PACKAGE = (
    "functional", "ops", "reference", "nn", "optim", "init", "conversion", "profile", "jobs", "distributed", "_checks",
    "_torch",
)  # fmt: skip
FLOORS = {name: (f"lcw_ops/{name}/**/*.py", f"lcw_ops/{name}.py") for name in IN_PACKAGE}
# Not lcw_ops/kernels, which is a link to this folder.
FLOORS["kernels"] = ("kernels/*.py",)
FLOORS["csrc"] = ("csrc/*.h", "csrc/cpu/**/*.h", "csrc/cpu/**/*.cpp")


class Mutant(NamedTuple):
    """One change: ``source[start:end]`` of a file becomes ``text``.

    ``lines`` is the statement around it. If the line runs only at import, ``body`` is the function whose default value
    it is, or empty. Otherwise ``body`` is None.
    """

    path: str
    line: int
    kind: str
    start: int
    end: int
    before: str
    text: str
    lines: range
    body: range | None = None

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
        self.statement, self.body = range(0), range(0)
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
        self.found.append(
            Mutant(self.path, node.lineno, kind, start, end, self.source[start:end], text, self.statement, self.body)
        )

    def visit(self, node):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            # A compound statement ends where its body begins.
            end = max(body[0].lineno, node.lineno + 1) if body else node.end_lineno + 1
            outer, self.statement = self.statement, range(node.lineno, end)
            super().visit(node)
            self.statement = outer
        else:
            super().visit(node)

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
        outer, self.body = self.body, None
        for one in node.body:
            self.visit(one)
        self.body = outer if outer is None else range(node.body[0].lineno, node.end_lineno + 1)
        for default in (*node.args.defaults, *(one for one in node.args.kw_defaults if one is not None)):
            self.visit(default)
        self.body = outer

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
                    yield Mutant(
                        path, number, kind, start, end, match[0], match.expand(replacement), range(number, number + 1)
                    )
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
