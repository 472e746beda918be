"""``lcw-ops profile --model package.module:factory``: profile a model of the user's own, and write all forms of it."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lcw_ops._checks import describe_argument
from lcw_ops._files import prepare_folder
from lcw_ops.jobs.arguments import usable_device
from lcw_ops.jobs.settings import ModelSettings as Settings
from lcw_ops.profile import Profile, profile

FILES: dict[str, Callable[[Profile, Path], None]] = {
    "report.html": Profile.to_html,
    "report.json": Profile.to_json,
    "layers.csv": Profile.to_csv,
    "report.png": Profile.plot,
}


def run(settings: Settings) -> int:
    """Run the command: print a table, and write ``FILES`` into ``settings.out``. Returns the exit code.

    It is 1 if the model failed; the rows before the failure are written all the same.

    Raises:
        ValueError, OSError: before any work, if an argument or the folder is wrong.
    """
    settings.check()
    device = usable_device(settings.device)
    # A console script does not search the current folder.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    names = ("model", "inputs", "targets", "loss", "optimizer")
    parts = {name: _imported(name, getattr(settings, name)) for name in names}
    folder = prepare_folder(settings.out)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        result = _measure(parts, settings.seed, device)
        written = _write(result, folder)
    except Exception:
        traceback.print_exc()
        return 1
    print(f"{result.table()}\n\nwritten to {folder}: {', '.join(written)}")
    return 0 if result.failure is None else 1


def _imported(flag: str, place: str | None) -> Any:
    if place is None:
        return None
    name, _, attribute = place.partition(":")
    try:
        found = importlib.import_module(name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(describe_argument(f"--{flag}", f"is {place} ({error})", "a place to import from")) from error
    return found


def _measure(parts: dict[str, Any], seed: int, device: torch.device) -> Profile:
    torch.manual_seed(seed)
    model = parts["model"] if isinstance(parts["model"], nn.Module) else parts["model"]()
    model = model.to(device)
    inputs, targets = (_made(parts[name], device) for name in ("inputs", "targets"))
    options = {} if parts["optimizer"] is None else {"optimizer": parts["optimizer"](model.parameters())}
    return profile(model, inputs, targets, parts["loss"], **options)


def _made(value: Any, device: torch.device) -> Any:
    value = value() if callable(value) else value
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


def _write(result: Profile, folder: Path) -> list[str]:
    written = []
    for name, write in FILES.items():
        try:
            write(result, folder / name)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
        else:
            written.append(name)
    return written
