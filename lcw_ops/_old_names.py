"""Names that have moved out of a module and can still be imported from it.

The new module is imported when a name is looked up, not when the old module is imported. So a module may list a name
that has moved to a floor above its own (see docs/glossary.md). Nothing in the package needs the old names.
"""

import sys
from collections.abc import Collection, Mapping


def keep(namespace: dict, homes: Mapping[str, str], submodules: Collection[str] = ()) -> None:
    """Give the module of this namespace a ``__getattr__`` for names that have moved.

    Type checkers do not see it, and so still report wrong names.

    Args:
        namespace: ``globals()`` of the old module.
        homes: name -> the module that defines it now.
        submodules: old modules that importing their package made attributes of it.
    """
    module = namespace["__name__"]

    def __getattr__(name: str):
        if name in homes:
            return getattr(_import(homes[name]), name)
        if name in submodules:
            return _import(f"{module}.{name}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    namespace["__getattr__"] = __getattr__


def _import(name: str):
    # Not importlib.import_module, which may raise a deadlock error while another thread imports the same modules.
    __import__(name)
    return sys.modules[name]
