"""Sphinx's configuration. ``make docs`` builds the pages; docs/build.py starts Sphinx.

Sphinx's source folder is the repository, so that README and the pages beside the sources are part of the site, and a
link between pages is the same here and on GitHub.
"""

import importlib
import inspect
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import lcw_ops  # noqa: E402

project = "lcw_ops"
author = "the authors of lcw_ops"
version = release = lcw_ops.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
source_suffix = {".md": "markdown"}
include_patterns = ["*.md", "docs/**.md", "bench/results/*.md", "csrc/**.md"]
# These folders are not searched for pages. "lcw_ops" has links to other folders of the repository.
exclude_patterns = [".*", "build", "dist", "demo", "lcw_ops", "kernels", "tests", "**/*-logs"]

# GitHub's anchors of headings, down to this level.
myst_heading_anchors = 4

# A reference that finds nothing is a warning, and a warning is an error.
nitpicky = True
# The documentation of these packages would be needed from the network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|pathlib|collections|typing|os|matplotlib)\..*"),
    # A function may return an object of a class that users do not make, and that has no page. Public classes are at
    # most two levels down: lcw_ops.nn.LCWLinear.
    ("py:class", r"lcw_ops\.\w+\.\w+\..+"),
    # A type hint that Sphinx cannot parse: dict[str, ...].
    ("py:class", r"dict\[\w+"),
    # A sentence that follows the list of errors in a section "Raises": no name of a class has a blank or ends in a dot.
    ("py:exc", r".* .*|.*\."),
]

# "Returns" is a paragraph here. Napoleon would take the words before its first colon for a type.
napoleon_custom_sections = ["Returns"]

autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "extra_repr, forward"}
add_module_names = False
toc_object_entries_show_parents = "hide"

# A block without a language is a formula or a program's output.
highlight_language = "none"

html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme = "pydata_sphinx_theme"
html_title = "lcw_ops"
html_show_copyright = False
html_theme_options = {
    # docs/build.py writes this file beside the folders of the versions.
    "switcher": {"json_url": "../switcher.json", "version_match": version},
    "check_switcher": False,
    "navbar_end": ["version-switcher", "theme-switcher", "navbar-icon-links"],
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
}

# Characters that have a meaning in reStructuredText, and none in the docstrings' sentences and formulas. Literals and
# roles, which are in backquotes, stay as they are.
_LITERAL = re.compile(r"(``.+?``|:\w+:`[^`]+`|`[^`]+`)")


def _escape(app, what, name, value, options, lines: list[str]) -> None:
    """autodoc-process-docstring: let ``|x|``, ``*k`` and ``name_`` stand for themselves."""
    for index, line in enumerate(lines):
        pieces = _LITERAL.split(line)
        pieces[::2] = [re.sub(r"(?<!\\)(\*(?!\*)|\|)|(?<=\w)_(?=\W|$)", r"\\\g<0>", piece) for piece in pieces[::2]]
        lines[index] = "".join(pieces)


def _check_public_names(app: Sphinx, environment) -> None:
    """Every name of an ``__all__`` is on a page, found through Sphinx's own index."""
    indexed = set(environment.domains["py"].objects) if hasattr(environment, "domains") else set()
    for path in sorted((ROOT / "docs/api").glob("*.md")):
        for module in re.findall(r"^\.\. module:: ([\w.]+)$", path.read_text(), re.M):
            for name in importlib.import_module(module).__all__:
                value = getattr(importlib.import_module(module), name)
                is_elsewhere = module != "lcw_ops" and value is getattr(lcw_ops, name, None)
                if not inspect.ismodule(value) and not is_elsewhere and f"{module}.{name}" not in indexed:
                    logging.getLogger(__name__).warning("%s.%s is not documented", module, name)


def _add_title(app: Sphinx, page: str, source: list[str]) -> None:
    """source-read: a file that a command writes is a table alone, and a page needs a title."""
    if page == "bench/results/claims":
        source[0] = f"# The papers' statements\n\n{source[0]}"


def setup(app: Sphinx) -> None:
    app.connect("source-read", _add_title)
    # After napoleon, which reads the sections of the docstring.
    app.connect("autodoc-process-docstring", _escape, priority=600)
    app.connect("env-check-consistency", _check_public_names)
