"""The package's floors (its layers): an import points down or stays on its floor, and no two modules need each other.

The imports are read from the source, those inside functions too, so a lazy import counts like any other. An import
under ``if TYPE_CHECKING`` counts as well, with one exception: ``lcw_ops/__init__.py`` imports every public name there,
because it loads its submodules by name when they are first used. The packages that contain a module are imported with
it, and are not counted: ``from lcw_ops.nn.lcw_linear import LCWLinear`` is an import of ``lcw_ops.nn.lcw_linear``.

The files that keep the old name of a module are the top floor, whatever folder they are in: they import the module from
any floor, and nothing imports them. ``lcw_ops/_old_names.py`` imports modules by name when a user asks for an old name;
the package asks for none.
"""

import ast
from pathlib import Path

import pytest
from support.old_names import MOVED, OLD_PACKAGES

ROOT = Path(__file__).parent.parent

# From top to bottom. The package itself, which has the version and starts the ops, is named "lcw_ops".
FLOORS = (
    ("old names",),
    ("cli",),
    ("verification",),
    ("bench",),
    ("jobs",),
    ("profile", "distributed", "conversion", "_info"),
    ("lcw_ops",),
    ("nn", "optim", "init"),
    ("functional",),
    ("ops",),
    ("kernels", "reference"),
    (
        "_checks",
        "_torch",
        "_layer_kinds",
        "_memory",
        "_pool",
        "_runs",
        "_names",
        "_files",
        "_after_import",
        "_old_names",
    ),
)
FLOOR = {name: height for height, names in enumerate(reversed(FLOORS)) for name in names}


def source_files() -> dict[str, Path]:
    """The file of every module, by the module's import name."""
    files = {}
    for package, folder in (("lcw_ops", "lcw_ops"), ("lcw_ops.kernels", "kernels"), ("lcw_ops.bench", "bench")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            # lcw_ops/kernels and lcw_ops/bench are links to folders that have their own turn in the loop.
            if package == "lcw_ops" and parts[0] in ("kernels", "bench"):
                continue
            files[".".join((package, *parts)).removesuffix(".__init__")] = file
    return files


def imports_of(name: str, source: str, is_package: bool, modules) -> set[str]:
    """The modules of this package that the source of module ``name`` imports."""
    found = set()

    def visit(node: ast.AST) -> None:
        if name == "lcw_ops" and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            around = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*around, *filter(None, [node.module])])
            members = {f"{base}.{alias.name}" for alias in node.names}
            # `from a import b` imports the module a.b if there is one. Otherwise b is a name in the module a.
            found.update(members & modules.keys())
            if members - modules.keys():
                found.add(base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found & modules.keys()


@pytest.fixture(scope="module")
def imports():
    modules = source_files()
    return {
        name: imports_of(name, file.read_text(), file.name == "__init__.py", modules) for name, file in modules.items()
    }


def unit(module: str) -> str:
    """The entry of ``FLOORS`` that a module belongs to."""
    if module in MOVED or module in OLD_PACKAGES:
        return "old names"
    return module if module == "lcw_ops" else module.split(".")[1]


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The names on a cycle: each leads to the next one, the last one to the first. [] if there is no cycle."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for target in sorted(graph[path[-1]]):
            if target in path:
                return path[path.index(target) :]
            if target not in done and (cycle := search([*path, target])):
                return cycle
        done.add(path[-1])
        return []

    return next((cycle for name in sorted(graph) if name not in done and (cycle := search([name]))), [])


def test_every_module_has_a_floor(imports):
    assert {unit(module) for module in imports} == FLOOR.keys()


def test_no_import_points_up(imports):
    upward = [
        f"{module} imports {target}"
        for module, targets in imports.items()
        for target in sorted(targets)
        if FLOOR[unit(target)] > FLOOR[unit(module)]
    ]
    assert upward == []


def test_nothing_imports_an_old_name(imports):
    old = {*MOVED, *OLD_PACKAGES}
    assert old <= imports.keys()
    assert {module: targets & old for module, targets in imports.items() if targets & old} == {}


def test_no_modules_import_each_other(imports):
    assert find_cycle(imports) == []


def test_no_packages_import_each_other(imports):
    """Packages on one floor count too: nn takes its initialisations from init, so init must not need nn."""
    units: dict[str, set[str]] = {name: set() for name in FLOOR}
    for module, targets in imports.items():
        units[unit(module)] |= {unit(target) for target in targets} - {unit(module)}
    assert find_cycle(units) == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("lcw_ops.nn.a", "import lcw_ops.ops.b", {"lcw_ops.ops.b"}),
        ("lcw_ops.nn.a", "from lcw_ops.ops import b, c", {"lcw_ops.ops.b", "lcw_ops.ops"}),
        ("lcw_ops.nn.a", "from lcw_ops.ops.b import c", {"lcw_ops.ops.b"}),
        ("lcw_ops.nn.a", "def f():\n    if x:\n        from lcw_ops import ops", {"lcw_ops.ops"}),
        ("lcw_ops.nn.a", "if TYPE_CHECKING:\n    from lcw_ops import ops", {"lcw_ops.ops"}),
        ("lcw_ops", "if TYPE_CHECKING:\n    from lcw_ops import ops", set()),
        ("lcw_ops.ops.b", "from . import d\nfrom ..nn.a import e", {"lcw_ops.ops", "lcw_ops.nn.a"}),
        ("lcw_ops.ops", "from . import b", {"lcw_ops.ops.b"}),
        ("lcw_ops.nn.a", "import torch\nfrom torch import nn", set()),
    ],
)
def test_the_imports_are_read_as_python_reads_them(name, source, expected):
    modules = dict.fromkeys(["lcw_ops", "lcw_ops.nn.a", "lcw_ops.ops", "lcw_ops.ops.b"])
    assert imports_of(name, source, name in ("lcw_ops", "lcw_ops.ops"), modules) == expected


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
