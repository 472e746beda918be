"""The mutation check, on trees of a few lines: its changes, its record of tests, its runs and its compiler."""

import ctypes
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import coverage
import mutation
import pytest
from support import line_map, mutants
from support.line_map import LineMap
from support.mutants import Mutant

# ---- Changes ---------------------------------------------------------------------------------------------------------


def changes(source):
    """The changed line of every change of a Python source, as (kind, line)."""
    source = textwrap.dedent(source)
    found = []
    for mutant in mutants._Collector("x.py", source).found:
        assert source[mutant.start : mutant.end] == mutant.before
        changed = source[: mutant.start] + mutant.text + source[mutant.end :]
        assert changed != source
        compile(changed, "x.py", "exec")
        found.append((mutant.kind, changed.splitlines()[mutant.line - 1].strip()))
    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("c = a + b", [("sign", "c = a - b")]),
        ("c = a * b", [("scale", "c = a / b")]),
        ("c = -a", [("sign", "c = a")]),
        ("c = a // b", [("index", "c = a / b")]),
        ("c = a < b", [("comparison", "c = a <= b")]),
        ("c = a is not b", [("comparison", "c = a is b")]),
        ("c = a not in b", [("mask", "c = a in b")]),
        ("c = not a", [("mask", "c = a")]),
        ("c = a and b or d", [("mask", "c = a and b and d"), ("mask", "c = a or b or d")]),
        ("c = a[3]", [("index", "c = a[4]")]),
        ("c = 0.5", [("scale", "c = 1.0")]),
        ("c = 0.0", [("scale", "c = 1.0")]),
        ("c = True", [("mask", "c = False")]),
        ("c = a.mT", [("stride", "c = a")]),
        ("c = a.contiguous()", [("stride", "c = a")]),
        ("key = (a, b)", [("cache key", "key = (None, b)"), ("cache key", "key = (a, None)")]),
        ("c = cache[a, b]", [("cache key", "c = cache[None, b]"), ("cache key", "c = cache[a, None]")]),
        # ast counts columns in bytes.
        ('c = f("\N{GREEK SMALL LETTER ALPHA}", a - b)', [("sign", 'c = f("\N{GREEK SMALL LETTER ALPHA}", a + b)')]),
        # Messages, annotations and asserts are left alone.
        ('raise ValueError(f"{1 + 2}")', []),
        ("assert a + b", []),
        ("c: tuple[1] = a", []),
        ('c = "%d" + a', []),
    ],
)
def test_the_changes_of_a_line_of_python(line, expected):
    assert sorted(changes(line)) == sorted(expected)


def test_a_change_knows_its_statement_and_whether_it_runs_at_import():
    source = textwrap.dedent(
        """\
        LIMIT = 3
        def f(a, b=2):
            if (
                a > b
            ):
                return a
        """
    )
    limit, default, comparison = sorted(mutants._Collector("x.py", source).found, key=lambda mutant: mutant.line)
    assert (limit.lines, limit.body) == (range(1, 2), range(0))
    # The body of the function has its default value.
    assert (default.before, default.body) == ("2", range(3, 7))
    assert (comparison.lines, comparison.body) == (range(3, 6), None)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("c = a + b;", ["c = a - b;"]),
        ("if (a < b && c) return x[i];", [
            "if (a <= b && c) return x[i];", "if (a < b || c) return x[i];", "if (a < b && c) return x[i + 1];",
        ]),
        ("p += row_stride;", ["p += (row_stride + 1);"]),
        ("return true;  // a + b", ["return false;  // a + b"]),
        ("template <bool wide = true>", []),
        ("#define PLUS a + b", []),
        ('LCW_CHECK(a == b, "a", "b");', []),
        ("static_assert(a == b);", []),
    ],
)  # fmt: skip
def test_the_changes_of_a_line_of_cpp(line, expected):
    source = f"first;\n{line}\n"
    found = list(mutants.cpp_mutants("x.cpp", source))
    assert all(mutant.line == 2 and mutant.lines == range(2, 3) for mutant in found)
    assert all(source[mutant.start : mutant.end] == mutant.before for mutant in found)
    changed = [(source[: mutant.start] + mutant.text + source[mutant.end :]).splitlines()[1] for mutant in found]
    assert sorted(changed) == sorted(expected)


def test_a_draw_has_one_change_on_each_line_and_follows_the_seed(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "a.py").write_text("".join(f"x{i} = {i} + {i}\n" for i in range(30)))
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setitem(mutants.FLOORS, "toy", ("toy/*.py",))
    drawn = mutants.draw("toy", 10, 0)
    assert len({mutant.line for mutant in drawn}) == 10
    assert {mutant.path for mutant in drawn} == {"toy/a.py"}
    assert drawn == mutants.draw("toy", 10, 0)
    assert drawn != mutants.draw("toy", 10, 1)
    assert len(mutants.draw("toy", 99, 0)) == 30


# ---- The record ------------------------------------------------------------------------------------------------------


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))


TREE = {
    "pyproject.toml": "[tool.pytest.ini_options]\n",
    "lcw_ops/__init__.py": "",
    "lcw_ops/ops/__init__.py": "",
    "lcw_ops/ops/toy.py": """\
        LIMIT = 3


        def add(a, b):
            return a + b


        def double(a):
            return a * 2


        def is_small(a):
            return a < LIMIT


        def unused(a):
            return a * 5
        """,
    "tests/test_toy.py": """\
        import subprocess
        import sys

        from lcw_ops.ops import toy


        def test_add():
            assert toy.add(2, 3) == 5


        def test_double():
            assert toy.double(2) == 4


        def test_is_small():
            assert toy.is_small(3) is False


        def test_double_in_a_process():
            subprocess.run([sys.executable, "-c", "from lcw_ops.ops import toy; toy.double(2)"], check=True)
        """,
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A tree with the record of its tests, made by the plugin in a pytest run of its own."""
    root, folder = tmp_path_factory.mktemp("recorded") / "tree", tmp_path_factory.mktemp("record")
    write(root, TREE)
    (root / "tests/support").mkdir()
    (root / "tests/support/__init__.py").touch()
    shutil.copy(line_map.__file__, root / "tests/support/line_map.py")
    path = os.pathsep.join([str(root / "tests"), str(root)])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": path, "LCW_OPS_LINE_MAP": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "support.line_map", "tests"]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return root, folder


def line_of(text):
    return ("lcw_ops/ops/toy.py", textwrap.dedent(TREE["lcw_ops/ops/toy.py"]).splitlines().index(text) + 1)


def test_the_record_names_the_tests_that_execute_a_line(recorded):
    lines = LineMap(recorded[1])
    prefix = "tests/test_toy.py::test_"
    assert lines.of([line_of("    return a + b")]) == ([f"{prefix}add"], [])
    assert lines.of([line_of("    return a < LIMIT")]) == ([f"{prefix}is_small"], [])
    assert lines.of([line_of("    return a * 5")]) == ([], [])
    # A process of a test executes this line too, so all tests of its file may notice a change.
    quick, others = lines.of([line_of("    return a * 2")])
    assert quick == [f"{prefix}double"]
    assert set(others) == {f"{prefix}{name}" for name in ("add", "is_small", "double_in_a_process")}
    assert set(lines.of_files(["tests/test_toy.py"])) == {*quick, *others}
    assert all(lines.seconds[test] > 0 for test in (*quick, *others))


def a_record(folder, seconds, contexts):
    """Write a record by hand: the seconds of tests, and the tests that execute each line of /tree/a.py."""
    folder.mkdir()
    (folder / "seconds-7.json").write_text(line_map.json.dumps(seconds))
    data = coverage.CoverageData(str(folder / "lines.host.pid7.x"))
    for test, numbers in contexts.items():
        data.set_context(test)
        data.add_lines({"/copy/tree/a.py": numbers})
    data.write()
    return LineMap(folder)


def test_slow_tests_and_tests_with_slow_fixtures_come_last(tmp_path):
    seconds = {"t.py::fast": 0.1, "t.py::slow": 9.0, "u.py::fast": 0.1, "u.py": 5.0, "t.py": 0.0}
    tests = [test for test in seconds if "::" in test]
    lines = a_record(tmp_path / "map", seconds, {test: [1] for test in tests})
    assert lines.of([("a.py", 1)]) == (["t.py::fast"], ["u.py::fast", "t.py::slow"])
    assert lines.of([("a.py", 2)]) == ([], [])


def test_a_selection_starts_with_a_case_of_every_function_and_ends_in_time(tmp_path):
    seconds = {"t.py::f[0]": 0.2, "t.py::f[1]": 0.1, "t.py::g": 0.4, "u.py::h": 0.3, "u.py": 2.0, "t.py": 0.0}
    lines = a_record(tmp_path / "map", seconds, {})
    ranked = lines.ranked({test for test in seconds if "::" in test})
    assert ranked == ["t.py::f[1]", "u.py::h", "t.py::g", "t.py::f[0]"]
    # The first test runs whatever it takes. A file's fixture counts once.
    assert lines.within(ranked, 0.0) == ranked[:1]
    assert lines.within(ranked, 1.9) == ranked[:1]
    assert lines.within(ranked, 2.5) == ranked[:3]
    assert lines.within(["u.py::h", "u.py::h", "t.py::g"], 0.75) == ["u.py::h", "u.py::h", "t.py::g"]


@pytest.fixture
def small_tree(tmp_path, monkeypatch):
    """The mutation check's tree is a small one."""
    write(tmp_path / "small", TREE)
    for module in (mutation, mutants):
        monkeypatch.setattr(module, "ROOT", tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("name", ["lcw_ops/ops/toy.py", "tests/test_toy.py", "kernels/new.py", "tests/support/new.py"])
def test_a_record_of_other_sources_is_refused(name, small_tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mutation.subprocess, "run", lambda *args, **options: None)
    folder = tmp_path / "map"
    mutation.record(folder, 1)
    assert mutation.is_record(folder)
    (small_tree / name).parent.mkdir(parents=True, exist_ok=True)
    with open(small_tree / name, "a") as file:
        file.write("\n")
    assert not mutation.is_record(folder)
    with pytest.raises(SystemExit) as raised:
        mutation.main(["--floor", "ops", "--lines", "1", "--map", str(folder)])
    assert raised.value.code == 2
    assert f"--map is {folder}, which has no whole record of these sources" in capsys.readouterr().err


def test_a_record_that_was_not_finished_is_refused(small_tree, tmp_path):
    (tmp_path / "map").mkdir()
    with pytest.raises(SystemExit):
        mutation.main(["--floor", "ops", "--lines", "1", "--map", str(tmp_path / "map")])


# ---- The runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(recorded, tmp_path, monkeypatch):
    """A copy of the recorded tree. Its lcw_ops takes the place of ours in the processes that run its tests."""
    root, folder = recorded
    monkeypatch.setattr(mutation, "ROOT", root)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lcw_ops", "support", "conftest")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return mutation.Tree(tmp_path, {mode: LineMap(folder) for mode in mutation.MODES})


def change(before, text, place="", body=None):
    """The change of the first ``before`` after ``place``."""
    source = textwrap.dedent(TREE["lcw_ops/ops/toy.py"])
    start = source.index(before, source.index(place))
    line = source[:start].count("\n") + 1
    lines = range(line, line + 1)
    return Mutant("lcw_ops/ops/toy.py", line, "", start, start + len(before), before, text, lines, body)


@pytest.mark.parametrize(
    ("mutant", "expected"),
    [
        (change("+", "-"), ("killed", "tests/test_toy.py::test_add")),
        (change("*", "+", "return a * 2"), ("survived", "")),
        (change("2", "3", "return a * 2"), ("killed", "tests/test_toy.py::test_double")),
        # No test executes the line.
        (change("5", "6", "return a * 5"), ("survived", "")),
        # The line runs at import: the tests of the lines that use its name stand in.
        (change("3", "4", "LIMIT", body=range(0)), ("killed", "tests/test_toy.py::test_is_small")),
        # The process ends before the test does.
        (change("a + b", "__import__('os').abort()"), ("killed", "tests/test_toy.py::test_add")),
        (change("a + b", "__import__('os')._exit(0)"), ("killed", "tests/test_toy.py::test_add")),
    ],
    ids=["sign", "equal", "index", "no test", "import", "crash", "exit"],
)
def test_the_outcome_of_a_changed_line(mutant, expected, tree):
    original = (tree.root / mutant.path).read_text()
    assert tree.outcome(mutant) == expected
    assert (tree.root / mutant.path).read_text() == original


def test_a_file_that_cannot_be_imported_kills_the_line(tree):
    """No test is named then: the whole file must pass on the unchanged copy."""
    mutant = change("def add", "def ad d")._replace(lines=range(4, 6))
    assert tree.outcome(mutant) == ("killed", "tests/test_toy.py")


def test_a_test_that_fails_on_the_unchanged_tree_kills_nothing(tree):
    test = tree.root / "tests/test_toy.py"
    test.write_text(test.read_text().replace("== 5", "== 6"))
    assert tree.outcome(change("+", "-")) == ("unclear", "tests/test_toy.py::test_add")


def test_a_test_that_does_not_end_kills_the_line(tree, monkeypatch):
    monkeypatch.setattr(mutation, "SPARE", 2.0)
    assert tree.outcome(change("return a + b", "while True: 1")) == ("killed", "tests/test_toy.py::test_add")


# ---- The compiler ----------------------------------------------------------------------------------------------------

SETUP = """\
import pathlib, shlex, shutil, subprocess
pathlib.Path("build").mkdir(exist_ok=True)
def run(command):
    print(command)
    subprocess.run(shlex.split(command), check=True)
for name in ("one", "two"):
    run(f"g++ -fPIC -I csrc -c csrc/{name}.cpp -o build/{name}.o")
run("g++ -shared build/one.o build/two.o -o build/_C.so")
shutil.copy("build/_C.so", "lcw_ops/_C.abi3.so")
"""


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    root = tmp_path_factory.mktemp("compiled")
    files = {
        "setup.py": SETUP,
        "lcw_ops/__init__.py": "",
        "csrc/both.h": "inline int step() { return 10; }\n",
        "csrc/one.cpp": '#include "both.h"\nextern "C" int one() { return step() + 1; }\n',
        "csrc/two.cpp": 'extern "C" int two() { return 2; }\n',
    }
    write(root, files)
    return mutation.Compiler(root)


def answers(compiler, folder):
    """The numbers that the library returns. A library is loaded once, so each call loads another copy."""
    library = ctypes.CDLL(shutil.copy(compiler.library, folder / f"{len(list(folder.iterdir()))}.so"))
    return library.one(), library.two()


@pytest.mark.parametrize(
    ("path", "before", "text", "expected"),
    [
        ("csrc/both.h", "10", "20", (21, 2)),
        ("csrc/one.cpp", "+ 1", "+ 5", (15, 2)),
        ("csrc/two.cpp", "2;", "3;", (11, 3)),
    ],
)
def test_a_changed_source_is_compiled_and_linked_with_the_others(compiler, path, before, text, expected, tmp_path):
    source = compiler.root / path
    original = source.read_text()
    source.write_text(original.replace(before, text))
    try:
        assert compiler.build(path)
        assert answers(compiler, tmp_path) == expected
    finally:
        source.write_text(original)
        compiler.restore()
    assert answers(compiler, tmp_path) == (11, 2)
    assert compiler.library.read_bytes() == compiler.kept


def test_only_the_sources_that_a_file_reaches_are_compiled(compiler, monkeypatch):
    assert [{Path(name).name for name in names} for names in compiler.depends] == [{"one.cpp", "both.h"}, {"two.cpp"}]
    started = []
    monkeypatch.setattr(
        mutation.subprocess, "run", lambda words, **_: started.append(words) or SimpleNamespace(returncode=0)
    )
    assert compiler.build("csrc/both.h")
    compiled, linked = started
    assert "csrc/one.cpp" in compiled
    assert [word for word in linked if word.endswith(".o")] == ["build/one.o.changed.o", "build/two.o"]


def test_a_line_that_does_not_compile_is_no_library(compiler):
    source = compiler.root / "csrc/two.cpp"
    original = source.read_text()
    source.write_text("not C++")
    try:
        assert not compiler.build("csrc/two.cpp")
    finally:
        source.write_text(original)
        compiler.restore()
