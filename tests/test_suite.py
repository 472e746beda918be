"""The suite itself: the patterns of support/marks.py find tests in every choice; test modules import from support/."""

import ast
import itertools
import math
import re
import subprocess
from collections import Counter
from pathlib import Path

import mutation
import pytest
import run
import torch
from support import marks
from support.pairwise import name_of, pairwise

TESTS = Path(__file__).parent
FILES = sorted(path.name for path in TESTS.glob("test_*.py"))


CHOICES = [choice for patterns in marks.MARKS.values() for pattern in patterns for choice in marks.choices(pattern)]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_in_a_pattern_finds_a_test(choice, request, collected):
    """Checked only if all files that the pattern may mean were collected whole."""
    if any("::" in argument for argument in request.config.args):
        pytest.skip("a selection of tests was collected")
    file, _, _ = choice.partition("::")
    files = {name for name in FILES if re.search(f"{file}$", name)}
    assert files
    if not files <= {node.partition("::")[0] for node in collected}:
        pytest.skip("not all files of this pattern were collected")
    assert any(re.search(choice, node) for node in collected)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("ab", {"ab"}),
        ("a(b|c)", {"a(b)", "a(c)"}),
        ("a(b|c(d|e))f", {"a(b)f", "a(c(d))f", "a(c(e))f"}),
        ("(a|b)(?=c|d)", {"(a)(?=c)", "(a)(?=d)", "(b)(?=c)", "(b)(?=d)"}),
        ("a(?!b|c)", {"a(?!b|c)", "a(?=b)", "a(?=c)"}),
        (r"a\(b(?:c|\|)\)", {r"a\(b(?:c)\)", r"a\(b(?:\|)\)"}),
    ],
)
def test_the_choices_of_a_pattern(pattern, expected):
    assert set(marks.choices(pattern)) == expected
    assert len(marks.choices(pattern)) == len(expected)


def test_a_pattern_with_an_open_parenthesis_is_refused():
    with pytest.raises(ValueError, match="not closed"):
        marks.choices("a(b")


@pytest.mark.parametrize("file", FILES)
def test_no_test_module_imports_another(file):
    tree = ast.parse((TESTS / file).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert [name for name in imported if name.startswith("test_")] == []


def test_the_marks_of_a_test():
    assert marks.marks_of("test_sanitize.py::test_mistakes") == ["slow"]
    assert marks.marks_of("test_lcw_linear_op.py::test_small_layers[own-torch.float32-True]") == [
        "every_instruction_set"
    ]
    assert marks.marks_of("test_lcw_linear_op.py::test_small_layers[own-torch.bfloat16-True]") == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"a": [1]},
        {"a": [1, 2, 3]},
        {"a": [1, 2], "b": "xy"},
        {"a": range(5), "b": range(3), "c": range(4), "d": [True, False], "e": [None, "x"]},
        {name: range(2) for name in "abcdefgh"},
    ],
)
def test_every_two_choices_meet(options):
    cases = pairwise(**options)
    assert all(list(case) == list(options) for case in cases)
    for first, second in itertools.combinations(options, 2):
        met = {(case[first], case[second]) for case in cases}
        assert met == set(itertools.product(options[first], options[second]))
    for name, choices in options.items():
        assert {case[name] for case in cases} == set(choices)
    sizes = sorted((len(list(choices)) for choices in options.values()), reverse=True)
    # The two longest options alone need this many cases, and a good table needs little more.
    assert len(cases) <= 2 * max(1, math.prod(sizes[:2]))
    assert cases == pairwise(**options)


def test_choices_that_may_not_meet():
    cases = pairwise(lambda a, b, c: not (a == b and c), a=range(3), b=range(3), c=[True, False])
    assert not [case for case in cases if case["a"] == case["b"] and case["c"]]
    assert {(case["a"], case["b"]) for case in cases} == set(itertools.product(range(3), repeat=2))
    for name in "ab":
        assert {(case[name], case["c"]) for case in cases} == set(itertools.product(range(3), [True, False]))


def test_names_of_cases():
    assert name_of({"kind": ("tanh", 3), "dtype": torch.float32, "bias": None, "c": 0.5}) == "tanh_3-float32-None-0.5"


@pytest.mark.parametrize("door", run.DOORS)
def test_the_runs_of_a_door(door):
    names = {one.name for one in run.runs(door)}
    slow = {"portable", "recurrence", "targets", "recording", "launches"}
    assert names - {"avx2"} == {"native", "interpreter"} | (slow if door == "slow" else set())
    marks = dict.fromkeys(("native", "interpreter"), run.DOORS[door])
    marks |= dict.fromkeys(("targets", "recording", "launches"), "not slow")
    assert all(one.marks == marks.get(one.name, "every_instruction_set") for one in run.runs(door))
    # The runs of the interpreter and of other instruction sets differ from the first by their environment alone.
    assert [one.name for one in run.runs(door) if not one.environment] == ["native"]
    # A run may be empty only if every test also runs in another run.
    may_be_empty = {"avx2", "portable", "targets"} | ({"interpreter"} if door == "slow" else set())
    assert all(one.may_be_empty == (one.name in may_be_empty) for one in run.runs(door))


@pytest.mark.parametrize(
    ("status", "may_be_empty", "expected"), [(5, False, 5), (5, True, 0), (1, True, 1), (0, False, 0)]
)
def test_a_run_without_tests(status, may_be_empty, expected, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, status))
    assert run.start(run.Run("native", [], "", {}, may_be_empty), []) == expected


@pytest.mark.parametrize("floor", mutation.FLOORS)
def test_every_floor_has_lines_to_change_and_tests(floor):
    drawn = mutation.draw(floor, 5, 0)
    assert len(drawn) == 5
    for mutant in drawn:
        assert mutation.floor_of(mutant.path) == floor
        assert mutation.tests_of(mutant.path)
        assert (TESTS.parent / mutant.path).read_text()[mutant.start : mutant.end] == mutant.before


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"killed": 17, "survived": 3}, 0),
        ({"killed": 16, "survived": 3}, 1),
        ({"killed": 17, "survived": 3, "unclear": 9, "does not build": 9}, 0),
        ({"unclear": 9}, 1),
        ({}, 1),
    ],
)
def test_the_verdict_of_the_mutation_check(found, expected, capsys):
    assert mutation.report({"ops": Counter(killed=1), "csrc": Counter(found)}) == expected
    printed = capsys.readouterr().out
    assert all(outcome in printed for outcome in mutation.OUTCOMES)
    assert ("judged line: csrc\n" in printed) == bool(expected)
