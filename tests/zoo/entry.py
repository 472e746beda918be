"""The inputs of each model of the zoo, and the figures that must be missing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Entry:
    """A model and the arguments of ``profile`` beside it.

    Attributes:
        absent: figures of the whole model that must be missing -> a part of the reason.
        uncounted: ops without a formula of their FLOPs.
        rows: names of some rows that must be there.
    """

    model: nn.Module
    inputs: Any
    kwargs: dict[str, Any] | None = None
    absent: dict[str, str] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


Factory = Callable[[], Entry]


def registry() -> tuple[dict[str, Factory], Callable[[Factory], Factory]]:
    """A dictionary of factories by name, and the decorator that fills it."""
    models: dict[str, Factory] = {}

    def add(factory: Factory) -> Factory:
        models[factory.__name__] = factory
        return factory

    return models, add
