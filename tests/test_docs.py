"""The documentation holds: its code runs, its commands exist, its links lead somewhere, and every public name is in it.

tests/support/pages.py explains the comments that say how a block runs.
"""

import importlib
import importlib.util
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from support import pages
from support.pages import ROOT, Block

import lcw_ops
from lcw_ops import cli

PAGES = pages.pages()
names = {page: str(page.relative_to(ROOT)) for page in PAGES}
BLOCKS = {page: pages.blocks(page) for page in PAGES}
ALL_BLOCKS = [block for found in BLOCKS.values() for block in found]
PYTHON = {page: [block for block in found if block.language == "python"] for page, found in BLOCKS.items()}

# Reasons for which a block may stay untested, and no others.
REASONS = re.compile(r"it (needs a GPU|needs the network|needs several processes|is not a program)\b")

# Every module with public names, and the pages that list them.
PUBLIC = {
    "lcw_ops": "package.md",
    "lcw_ops.functional": "functional.md",
    "lcw_ops.nn": "nn.md",
    "lcw_ops.nn.utils": "nn.md",
    "lcw_ops.nn.utils.parametrizations": "nn.md",
    "lcw_ops.optim": "optim.md",
    "lcw_ops.init": "init.md",
    "lcw_ops.conversion": "conversion.md",
    "lcw_ops.profile": "profile.md",
    "lcw_ops.verification": "verification.md",
    "lcw_ops.distributed": "distributed.md",
    "lcw_ops.reference": "reference.md",
}


def ids(page: Path) -> str:
    return names[page]


def missing_packages(block: Block) -> list[str]:
    named = (block.comment("needs") or "").replace(",", " ").split()
    return [name for name in named if importlib.util.find_spec(name) is None]


def run(page: Path, folder: Path, monkeypatch, full_size: bool = False) -> None:
    """Run the page's blocks of Python one after the other, as a reader who types them does, in an empty folder.

    A failure's traceback has the line of the page.
    """
    monkeypatch.chdir(folder)
    # Pictures are drawn into files.
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace: dict = {"__name__": "__main__"}
    try:
        run_blocks(page, namespace, full_size)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run_blocks(page: Path, namespace: dict, full_size: bool) -> None:
    for block in PYTHON[page]:
        if block.comment("not run") or block.comment("file"):
            continue
        if missing := missing_packages(block):
            pytest.skip(f"{block.place}: not installed: {', '.join(missing)} (lcw-ops[hosts])")
        for given in block.comments.get("given", []):
            exec(compile(given, f"{block.place} (given)", "exec"), namespace)
        code = block.text if full_size else block.quick()
        exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), namespace)


def runs(page: Path) -> bool:
    return any(not block.comment("not run") and not block.comment("file") for block in PYTHON[page])


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=ids)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.comment("run as") for b in BLOCKS[page])], ids=ids)
def test_the_code_of_a_page_runs_at_the_sizes_that_it_shows(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch, full_size=True)


def test_a_block_that_is_not_run_says_why():
    for block in ALL_BLOCKS:
        reason = block.comment("not run")
        assert reason is None or REASONS.match(reason), f"{block.place}: {reason!r}"


def test_every_block_has_a_language_or_is_plain_text():
    """A block of Python that is called something else would not run."""
    known = {"python", "bash", "cpp", "", "{toctree}", "{eval-rst}"}
    assert {block.language for block in ALL_BLOCKS} <= known


def test_the_readme_and_the_pages_have_blocks_that_run():
    """The parser finds the blocks: an empty list of blocks would pass every other test."""
    readme = PYTHON[ROOT / "README.md"]
    assert len(readme) == (ROOT / "README.md").read_text().count("```python")
    assert len(readme) >= 7
    assert not any(block.comment("not run") for block in readme)
    assert len(PYTHON[ROOT / "docs/parallel_depth.md"]) == 3


def test_the_comments_of_a_block():
    text = "<!-- given: x = 1\ny = 2 -->\n<!-- run as: 50 -> 5 -->\n```python\nx + y + 50\n```\n\n```bash\nls\n```\n"
    first, second = pages.blocks(ROOT / "README.md", text)
    assert first.comments == {"given": ["x = 1\ny = 2"], "run as": ["50 -> 5"]}
    assert (first.quick(), first.line, first.language) == ("x + y + 5\n", 5, "python")
    assert (second.comments, second.text, second.line) == ({}, "ls\n", 9)
    first.comments["run as"] = ["60 -> 6"]
    with pytest.raises(ValueError, match="is not in the block"):
        first.quick()
    with pytest.raises(ValueError, match="no code block follows"):
        pages.blocks(ROOT / "README.md", "<!-- not run: it needs a GPU -->\n\nA paragraph.\n\n```python\nx\n```\n")


# ---- commands


def commands(text: str) -> list[list[str]]:
    """The command lines of a block of bash, as words, without comments, variables in front and redirections."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            found.append(words)
    return found


@pytest.fixture(scope="module")
def make_targets():
    makefile = (ROOT / "Makefile").read_text()
    return {name for line in re.findall(r"^([^\s#:=]+(?: [^\s:=]+)*):(?!=)", makefile, re.M) for name in line.split()}


@pytest.fixture(scope="module")
def make_variables():
    """Those that have a default, and those that are used without one."""
    return set(re.findall(r"^\w+(?=\s*\?=)|(?<=\$\()\w+(?=\))", (ROOT / "Makefile").read_text(), re.M))


def sources(program: str) -> str:
    """The text of a script, or of a module with the modules beside it, which may declare its options."""
    if program.endswith(".py"):
        return (ROOT / program).read_text()
    path = Path(importlib.util.find_spec(program).origin)
    return "".join(file.read_text() for file in path.parent.glob("*.py"))


def check_lcw_ops(arguments: list[str], named_alone: bool = False) -> None:
    """Parse as the command does: it refuses a wrong command, option or value."""
    if arguments in (["--version"], ["--help"]):
        return
    if arguments[-1:] == ["--help"]:
        assert arguments[0] in cli.COMMANDS
        return
    if named_alone:
        # A sentence may name an option without its value: `lcw-ops profile --depth`.
        parser = cli.build_parser().parse_args(arguments[:1]).parser
        while arguments[-1] in parser._option_string_actions:
            arguments = arguments[:-1]
    parsed, unknown = cli.build_parser().parse_known_args(arguments)
    assert not unknown, f"unknown: {unknown}"
    assert parsed.run is not None, "no command"


def check_make(arguments: list[str], targets: set[str], variables: set[str]) -> None:
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals:
            assert name in variables, f"the Makefile has no variable {name}"
        else:
            assert name.replace(".venv", "$(VENV)") in targets, f"the Makefile has no target {name}"


def check_python(arguments: list[str]) -> None:
    program = arguments[:2] if arguments[0] == "-m" else arguments[:1]
    if program[0] == "-m" and program[1] == "pytest":
        return check_pytest(arguments[2:])
    if program[0] == "-m":
        assert importlib.util.find_spec(program[1]), f"no module is called {program[1]}"
    else:
        assert (ROOT / program[0]).is_file(), f"there is no file {program[0]}"
    if program == ["setup.py"]:
        return None
    for argument in arguments[len(program) :]:
        if argument.startswith("--") and argument != "--help":
            option = argument.partition("=")[0]
            assert f'"{option}"' in sources(program[-1]), f"{program} does not know {option}"
    return None


def check_pytest(arguments: list[str]) -> None:
    for argument in arguments:
        path = argument.partition("::")[0]
        # The page about a new kernel runs the tests that its reader has written.
        if path.endswith((".py", "/")) and "row_mean" not in path:
            assert (ROOT / path).exists(), f"there is no {path}"


def check_pip(arguments: list[str]) -> None:
    extras = re.findall(
        r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2], re.M
    )
    for argument in arguments:
        for extra in re.findall(r"\[(.*)\]", argument):
            assert set(extra.split(",")) <= set(extras), f"there is no extra {extra}"


def check(words: list[str], make_targets, make_variables, named_alone: bool = False) -> None:
    program, *arguments = words
    match Path(program).name:
        case "lcw-ops":
            check_lcw_ops(arguments, named_alone)
        case "make":
            check_make(arguments, make_targets, make_variables)
        case "python":
            check_python(arguments)
        case "pytest":
            check_pytest(arguments)
        case "pip":
            check_pip(arguments)
        case other:
            # pre-commit is a tool that the reader installs; the others are the system's.
            assert other in {"git", "ulimit", "pre-commit"}, f"is {other} a command?"


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "bash" for b in BLOCKS[p])], ids=ids)
def test_the_commands_of_a_page_exist(page, make_targets, make_variables):
    for block in BLOCKS[page]:
        if block.language == "bash":
            for words in commands(block.text):
                try:
                    # The toy of docs/add-a-kernel.md is a stem that its reader adds.
                    known = [
                        word.replace("row_mean", "lcw_linear") if words[0] == "lcw-ops" else word for word in words
                    ]
                    check(known, make_targets, make_variables)
                except Exception as error:
                    raise AssertionError(f"{block.place}: {shlex.join(words)}") from error


def test_the_commands_within_sentences_exist(make_targets, make_variables):
    """`lcw-ops ...`, `make ...` and `python ...` in running text. Words such as DIR and ... stand for the reader's."""
    checked = 0
    for page in PAGES:
        for line, text in pages.code_spans(page):
            if (
                not re.match(r"(lcw-ops|make|python) [\w\-.]", text)
                or "..." in text
                or "[" in text
                or page.name == "CHANGELOG.md"
            ):
                continue
            try:
                check(shlex.split(text), make_targets, make_variables, named_alone=True)
            except Exception as error:
                raise AssertionError(f"{names[page]}:{line}: {text}") from error
            checked += 1
    assert checked > 50


@pytest.mark.parametrize(
    "line",
    [
        "lcw-ops profil --depth 10",
        "lcw-ops profile --dept 10",
        "lcw-ops profile --depth ten",
        "lcw-ops train --kind cnn",
        "make no-such-target",
        "make demo NO_SUCH_VARIABLE=1",
        "python bench/gpu.py --no-such-option",
        "python no/such/file.py",
        "python -m lcw_ops.no_such_module",
        "pytest tests/test_no_such_file.py",
        "pip install lcw-ops[nothing]",
        "no-such-command",
    ],
)
def test_a_command_that_does_not_exist_is_found(line, make_targets, make_variables):
    with pytest.raises((AssertionError, cli.UsageError)):
        check(shlex.split(line), make_targets, make_variables)


# ---- links


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for line, target in pages.links(page):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{names[page]}:{line}: {target}: there is no such file"
        assert file.is_relative_to(ROOT), f"{names[page]}:{line}: {target} leaves the repository"
        if anchor:
            assert anchor in pages.anchors(file), f"{names[page]}:{line}: {target}: there is no such heading"


def test_every_page_is_reached_from_the_first():
    """Following the links and the tables of contents from docs/index.md finds every page of docs/."""
    reached, waiting = set(), [ROOT / "docs/index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = [target.partition("#")[0] for _, target in pages.links(page)]
        targets += [line for b in BLOCKS[page] if b.language == "{toctree}" for line in entries(b)]
        waiting += [f for target in targets if (f := (page.parent / target).resolve()).suffix == ".md" and f in BLOCKS]
    assert set(ROOT.glob("docs/**/*.md")) <= reached


def entries(toctree: Block) -> list[str]:
    lines = [re.sub(r".*<(.*)>", r"\1", line.strip()) for line in toctree.text.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]


# ---- public names


def public_names() -> set[str]:
    """Every name of an ``__all__``, except modules, and except in a second place what ``lcw_ops`` itself has."""
    return {
        f"{module}.{name}"
        for module in PUBLIC
        for name in importlib.import_module(module).__all__
        if not inspect.ismodule(value := getattr(importlib.import_module(module), name))
        and (module == "lcw_ops" or value is not getattr(lcw_ops, name, None))
    }


def documented_names() -> list[str]:
    """The names that the pages of docs/api hand to Sphinx's autodoc."""
    found = []
    for page in sorted((ROOT / "docs/api").glob("*.md")):
        for block in BLOCKS[page]:
            module = ""
            for line in block.text.splitlines() if block.language == "{eval-rst}" else ():
                kind, _, value = line.removeprefix(".. ").partition(":: ")
                if kind == "module":
                    module = value
                    assert PUBLIC[module] == page.name
                elif kind.startswith("auto") and kind != "automodule":
                    found.append(f"{module}.{value}")
    return found


def test_every_public_name_is_documented_once():
    found = documented_names()
    assert len(found) == len(set(found))
    assert set(found) == public_names()


def test_every_module_with_an_all_is_public_or_internal():
    """A new public module must get its page. ``lcw_ops.ops`` and the modules below a public one are internal."""
    internal = {"lcw_ops.ops", "lcw_ops.nn.orthogonal_filter", "lcw_ops.functional.parallel_depth"}
    internal |= {"lcw_ops.ops.orthogonal_filter", "lcw_ops.ops.parallel_depth"}
    found = set()
    for path in (ROOT / "lcw_ops").rglob("*.py"):
        if "\n__all__ = " in path.read_text():
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.add(".".join(part for part in parts if part != "__init__"))
    assert found - internal == set(PUBLIC)


# Modules whose functions and classes describe every argument. The others refer to these, or hold records.
DESCRIBED = (
    "lcw_ops",
    "lcw_ops.functional",
    "lcw_ops.nn",
    "lcw_ops.nn.utils.parametrizations",
    "lcw_ops.optim",
    "lcw_ops.init",
)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_have_docstrings_that_name_their_arguments(module):
    checked = 0
    for name in importlib.import_module(module).__all__:
        value = getattr(importlib.import_module(module), name)
        if not callable(value):
            continue
        # A class's own docstring: the one that it inherits describes another class.
        docstring = value.__doc__
        assert docstring, name
        if inspect.isclass(value):
            assert docstring != value.__bases__[0].__doc__, name
            if issubclass(value, Exception):
                continue
        # The convolutions of one and three dimensions refer to that of two.
        if module in DESCRIBED and not re.search("Conv[13]d$", name):
            # Every module of torch has device and dtype.
            parameters = inspect.signature(value).parameters.keys() - {"self", "args", "kwargs", "device", "dtype"}
            assert [p for p in parameters if not re.search(rf"\b{p}\b", docstring)] == [], name
            checked += 1
    assert checked or module not in DESCRIBED


def signatures() -> dict[str, str]:
    """The signatures in docs/design.md, by the name of the function."""
    block = next(b for b in PYTHON[ROOT / "docs/design.md"] if "F.lcw_weight" in b.text)
    # A signature may go on in the next line.
    text = re.sub(r"#.*", "", block.text)
    return dict(re.findall(r"^([\w.]+)\(([^()]*)\)[^.\w]*$", text, re.M))


@pytest.mark.parametrize("name", signatures())
def test_the_contract_has_the_signatures_of_the_functions(name):
    """docs/design.md: the names, the order and the defaults of the arguments. "..." stands for further ones."""
    path = re.sub(r"^F\.", "functional.", name).removeprefix("lcw_ops.")
    value = lcw_ops
    for part in path.split("."):
        value = getattr(value, part)
    arguments, dots, _ = signatures()[name].partition("...")
    namespace: dict = {}
    exec(f"def written({arguments.strip().rstrip(',')}): pass", namespace)
    written = {p.name: p.default for p in inspect.signature(namespace["written"]).parameters.values()}
    actual = {p.name: p.default for p in inspect.signature(value).parameters.values()}
    if dots:
        actual = dict(list(actual.items())[: len(written)])
    assert list(written.items()) == list(actual.items())


def test_the_contract_has_every_function():
    assert {f"F.{name}" for name in lcw_ops.functional.__all__} <= signatures().keys()
    assert len(signatures()) > 20


# ---- the site


def test_the_version_switch_lists_what_was_built(tmp_path):
    build = load_build()
    for version in ("0.2.0", "0.10.0", "0.9.1"):
        (tmp_path / version / "docs").mkdir(parents=True)
        (tmp_path / version / "docs/index.html").touch()
    (tmp_path / "0.11.0").mkdir()  # its build has failed
    build.write_switcher(tmp_path, "https://host/lcw_ops/")
    entries = json.loads((tmp_path / "switcher.json").read_text())
    assert [entry["version"] for entry in entries] == ["0.10.0", "0.9.1", "0.2.0"]
    assert entries[0] == {
        "version": "0.10.0",
        "name": "0.10.0 (newest)",
        "url": "https://host/lcw_ops/0.10.0/",
        "preferred": True,
    }
    assert 'href="0.10.0/docs/index.html"' in (tmp_path / "index.html").read_text()


def test_the_site_is_not_built_without_its_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sphinx", None)
    assert load_build().main() == 2
    assert "pip install 'lcw-ops[docs]'" in capsys.readouterr().err


def load_build():
    spec = importlib.util.spec_from_file_location("build_the_documentation", ROOT / "docs/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_profile_of_a_model_takes_at_most_five_lines(page):
    """From the import to the printed table. Pictures and files are further lines."""
    block = next(block for block in PYTHON[ROOT / page] if "import profile" in block.text)
    profiling, printing, _ = block.text.partition("print(report.table())")
    assert printing
    assert len([line for line in profiling.splitlines() if line.strip()]) < 5
