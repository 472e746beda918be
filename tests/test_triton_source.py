"""Searches the source of the Triton kernels for constructs that the oldest supported Triton cannot compile."""

import ast
from pathlib import Path

import pytest

KERNELS = sorted(path for path in (Path(__file__).parent.parent / "kernels").glob("*.py") if path.stem != "__init__")


def jitted_functions(source: str) -> list[ast.FunctionDef]:
    """The functions decorated with triton.jit, or with triton.jit(...)."""

    def is_jit(decorator: ast.expr) -> bool:
        return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator) == "triton.jit"

    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [function for function in functions if any(map(is_jit, function.decorator_list))]


def returns_of_none(function: ast.FunctionDef) -> list[str]:
    """The return statements that return None: alone, in a tuple, by a condition or by a name.

    Triton 3.6 makes a tensor of every value that is returned, and cannot make one of None. A bare ``return`` has no
    value.
    """
    assignments = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    names = {target.id for node in assignments if _may_be_none(node.value, set()) for target in _names(node)}
    returned = [node for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
    return [f"{node.lineno}: {ast.unparse(node)}" for node in returned if _may_be_none(node.value, names)]


def _names(node: ast.Assign) -> list[ast.Name]:
    return [target for target in node.targets if isinstance(target, ast.Name)]


def _may_be_none(value: ast.expr, names: set[str]) -> bool:
    if isinstance(value, ast.IfExp):
        return _may_be_none(value.body, names) or _may_be_none(value.orelse, names)
    if isinstance(value, ast.Tuple):
        return any(_may_be_none(element, names) for element in value.elts)
    return (isinstance(value, ast.Constant) and value.value is None) or (
        isinstance(value, ast.Name) and value.id in names
    )


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_jitted_function_returns_none(path):
    functions = jitted_functions(path.read_text())
    assert functions
    found = {function.name: returns for function in functions if (returns := returns_of_none(function))}
    assert not found, "a bare return compiles with every Triton from 3.6 on"


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ("return None", 1),
        ("return x if c else None", 1),
        ("return x, None", 1),
        ("y = None\n    return y", 1),
        ("y = x if c else None\n    return x, y", 1),
        ("if c:\n        return None\n    else:\n        return x", 1),
        ("return", 0),
        ("if x is None:\n        return\n    else:\n        return x", 0),
        ("y = None\n    return f(x, y)", 0),
    ],
)
@pytest.mark.parametrize("decorator", ["triton.jit", 'triton.jit(do_not_specialize=["c"])'])
def test_returns_of_none_are_found(body, count, decorator):
    (function,) = jitted_functions(f"@{decorator}\ndef helper(x, c):\n    {body}\n\ndef host():\n    return None\n")
    assert len(returns_of_none(function)) == count
