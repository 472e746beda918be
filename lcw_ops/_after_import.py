"""Calls a function after the import of a module. With it, ``lcw_ops`` can be imported before, or without, torch."""

import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident


def after_import(name: str, function: Callable[[], None]) -> None:
    """Call ``function()`` after every import or reload of module ``name``, and now if the module is loaded already.

    A module has only one such function, the last one given. It runs inside the import statement that loads the module.
    That statement must not fail because of the function, so an exception becomes a RuntimeWarning. If the module is
    loaded already, an exception reaches the caller of ``after_import``.
    """
    _finder.functions[name] = function
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if sys.modules.get(name) is not None:
        function()


class _Finder:
    """An entry of ``sys.meta_path``: finds the awaited modules through the other finders and wraps their loaders."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[[], None]] = {}
        # (thread, module) of each search under way: another import hook may ask all finders for the module again.
        self._searching: set[tuple[int, str]] = set()

    def find_spec(self, name, path=None, target=None):
        search = get_ident(), name
        if name not in self.functions or search in self._searching:
            return None
        self._searching.add(search)
        try:
            spec = _find_spec(name, path, target)
        finally:
            self._searching.remove(search)
        # A package without an __init__.py has no loader, and a loader of the old protocol has no exec_module to wrap.
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self.functions[name])
        return spec


def _find_spec(name, path, target):
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    specs = (finder.find_spec(name, path, target) for finder in finders)
    return next((spec for spec in specs if spec is not None), None)


class _Loader:
    """Wraps a loader to call a function after it has executed the module."""

    def __init__(self, loader, function: Callable[[], None]) -> None:
        self._loader, self._function = loader, function

    def __getattr__(self, name: str):
        # The copy module looks up __setstate__ on a copy that has no _loader yet.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module) -> None:
        # Give the module the loader that it would have without this hook.
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        try:
            self._function()
        except Exception as error:
            warn(f"lcw_ops: setup failed after the import of {module.__name__}: {type(error).__name__}: {error}")


def warn(message: str) -> None:
    """Give a RuntimeWarning, or write a line to stderr where warnings are errors.

    An error here would undo the import of a module that has already run, and torch's modules cannot run twice.
    """
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except Exception:
        # Even stderr may be closed.
        with suppress(Exception):
            print(f"RuntimeWarning: {message}", file=sys.stderr)


_finder = _Finder()
