"""The change that addresses a finding: one line of Python, and its result on a copy of the model.

A line uses the names ``model``, ``inputs``, ``optimizer``, ``torch`` and ``lcw_ops``. It works on the user's objects,
or binds ``model`` and ``inputs`` anew.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

import lcw_ops
from lcw_ops._runs import fresh_copy
from lcw_ops.profile.figures import failed
from lcw_ops.profile.verdict import KINDS, Finding, Measured, NotJudged, Outcome, Range, Verdict

# Layers with a leaf ``weight`` of shape (units, inputs, ...) that init.lps_ can fill, by the name of their class.
_FILLABLE = ("Linear", "Conv1d", "Conv2d", "Conv3d")

# Modules that are one of the activations of init.lps_.
_ACTIVATIONS = {
    "ReLU": "relu",
    "LeakyReLU": "leaky_relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "SiLU": "silu",
    "GELU": "gelu",
    "Softplus": "softplus",
    "ELU": "elu",
}

# The most layers that are drawn one by one; if more are affected, all layers of the model are drawn.
_MOST_LAYERS = 4

# The ratio of update to weight that a new learning rate aims at: the largest, and the smallest, over the layers of
# models that train well (medians over the training half of bench/verdict).
LARGEST_RATIO, SMALLEST_RATIO = 5e-3, 5e-4

_LPS = "LPS initialisation (lcw_ops.init): pre-activations of mean square 1. The drawn layers lose what they learned"
_REDRAW_ALL = "lcw_ops.init.lps_model_(model, inputs)"


def judge(profile: Measured, kinds: Iterable[str] | None = None) -> Verdict:
    """The verdict of a profile, without tried remedies."""
    findings, judged, not_judged = [], [], {}
    for name in KINDS if kinds is None else kinds:
        kind = KINDS[name]
        try:
            ranges = kind.find(profile)
        except NotJudged as reason:
            not_judged[name] = str(reason)
            continue
        judged.append(name)
        for found in ranges:
            method, change = remedy(profile, name, found)
            findings.append(
                Finding(
                    kind=name,
                    title=kind.title,
                    first=found.first,
                    last=found.last,
                    first_name=str(profile.columns["name"][found.first]),
                    last_name=str(profile.columns["name"][found.last]),
                    figure=found.figure,
                    threshold=kind.threshold,
                    words=kind.words.format(figure=found.figure, threshold=kind.threshold),
                    method=method,
                    change=change,
                )
            )
    return Verdict(findings, judged, not_judged, len(profile), profile.failure)


def remedy(profile: Measured, kind: str, found: Range) -> tuple[str, str]:
    """(method, line) for a finding. The line is "" if no line is known to help."""
    if len(profile.modules) != len(profile):
        # A profile that was pickled before there were verdicts does not know which modules the rows are.
        return _REMEDIES[kind](_Nameless(profile), found)
    return _REMEDIES[kind](profile, found)


class _Nameless:
    """A profile whose rows belong to no known module."""

    def __init__(self, profile: Measured) -> None:
        self._profile = profile
        self.modules = [("", "")] * len(profile)

    def __len__(self) -> int:
        return len(self._profile)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._profile, name)


def _draw(profile: Measured, found: Range) -> tuple[str, str]:
    """Draw the layers of these rows anew, or all layers of the model if some of them cannot be drawn by themselves."""
    places = _layers_of(profile, found)
    if places is None or len(places) > _MOST_LAYERS:
        return _LPS, _REDRAW_ALL
    calls = []
    for row in places:
        layer = _access(profile.modules[row][0])
        calls.append(f"lcw_ops.init.lps_({layer}.weight, {layer}.bias, {_activation_before(profile, row)!r})")
    return _LPS, "; ".join(calls)


def _draw_first(profile: Measured, found: Range) -> tuple[str, str]:
    """After a dead layer the next ones are dead too, because their inputs are zero: the first is the cause."""
    return _draw(profile, found._replace(last=found.first))


def _draw_all(profile: Measured, found: Range) -> tuple[str, str]:
    return _LPS, _REDRAW_ALL


def _layers_of(profile: Measured, found: Range) -> list[int] | None:
    """The rows whose weights decide these rows: those among them, and the last one before an activation. None if not
    all of them can be filled."""
    weighted = np.flatnonzero(profile.columns["parameters"] > 0)
    begin = weighted[weighted <= found.first][-1:]
    inside = [int(row) for row in (*begin, *weighted[(weighted > found.first) & (weighted <= found.last)])]
    return inside if inside and all(profile.modules[row][1] in _FILLABLE for row in inside) else None


def _activation_before(profile: Measured, row: int) -> str | None:
    """The activation that makes the row's input, as far as modules tell; None for the first layer."""
    for before in range(row - 1, -1, -1):
        kind = profile.modules[before][1]
        if kind in _ACTIVATIONS:
            return _ACTIVATIONS[kind]
        if kind in _FILLABLE:
            # An activation that is no module: of the usual ones, ReLU.
            return "relu"
    return None


def _access(path: str) -> str:
    return f"model.get_submodule({path!r})" if path else "model"


def _lcw(profile: Measured, found: Range) -> tuple[str, str]:
    method = "LCW (lcw_ops.convert): zero-sum weights, on which a common mean of the inputs has no effect"
    has_optimizer = "update_ratio" in profile.columns and not profile.is_missing("update_ratio").all()
    optimizer = ", optimizer=optimizer" if has_optimizer else ""
    # Without inputs=: with them, the new biases would take up the very mean that is to go.
    return method, f'model = lcw_ops.convert(model, "lcw"{optimizer}).model'


def _gaf(profile: Measured, found: Range) -> tuple[str, str]:
    method = (
        "activated gradients (GAF): small entries grow, large ones are bounded. Before training, "
        "lcw_ops.init.lps_model_(model, inputs) mends more"
    )
    return method, "lcw_ops.activate_gradients(optimizer)"


def _rate(profile: Measured, found: Range) -> tuple[str, str]:
    target = LARGEST_RATIO if found.figure > LARGEST_RATIO else SMALLEST_RATIO
    if found.figure == 0:
        return "none of the learning rate's: the step is zero. Look for the layer at which the gradient ends", ""
    method = f"a learning rate at which a step changes the weights by about {target:.0e} of their size"
    factor = target / found.figure
    paths = _paths(profile, found)
    if not paths or len(paths) == len(_paths(profile, Range(0, len(profile) - 1, 0.0))):
        return method, f'[group.update(lr={factor:.1g} * group["lr"]) for group in optimizer.param_groups]'
    modules = ", ".join(map(_access, paths))
    return method, f"lcw_ops.profile.scale_learning_rate(optimizer, {factor:.1g}, {modules})"


def _paths(profile: Measured, found: Range) -> list[str]:
    """The modules with parameters in these rows."""
    counts = profile.columns["parameters"]
    return list(dict.fromkeys(profile.modules[row][0] for row in range(found.first, found.last + 1) if counts[row] > 0))


def scale_learning_rate(optimizer: torch.optim.Optimizer, factor: float, *modules: nn.Module) -> None:
    """Multiply the learning rate of these modules' parameters by ``factor``; the other parameters keep theirs.

    A group that holds parameters of both kinds is divided in two. State stays with its parameter.
    """
    scaled = {id(parameter) for module in modules for parameter in module.parameters()}
    for group in list(optimizer.param_groups):
        inside = [parameter for parameter in group["params"] if id(parameter) in scaled]
        others = [parameter for parameter in group["params"] if id(parameter) not in scaled]
        if inside and others:
            group["params"] = others
            optimizer.add_param_group({**group, "params": inside, "lr": factor * group["lr"]})
        elif inside:
            group["lr"] = factor * group["lr"]


def _thaw(profile: Measured, found: Range) -> tuple[str, str]:
    reason = "train them, if they are not frozen on purpose"
    paths = _paths(profile, found)
    if len(paths) > _MOST_LAYERS:
        return reason, "model.requires_grad_(True)"
    return reason, "; ".join(f"{_access(path)}.requires_grad_(True)" for path in paths)


def _unused(profile: Measured, found: Range) -> tuple[str, str]:
    return "call the layers in the model's forward pass, or remove them: no line does that", ""


def _wider_range(profile: Measured, found: Range) -> tuple[str, str]:
    method = "bfloat16, which has float32's range; or torch.amp.GradScaler, which activate_gradients works with"
    return method, "model, inputs = model.bfloat16(), inputs.bfloat16()"


_REMEDIES: dict[str, Callable[[Measured, Range], tuple[str, str]]] = {
    "non-finite": _draw,
    "dying": _draw_first,
    "saturation": _draw,
    "underflow": _wider_range,
    "ill-conditioned": _gaf,
    "activation shift": _lcw,
    "exploding": _draw_all,
    "vanishing": _draw_all,
    "learning rate too large": _rate,
    "learning rate too small": _rate,
    "frozen": _thaw,
    "unused": _unused,
}


# ---- Trying a change ------------------------------------------------------------------------------------------------


class Experiment:
    """Runs changes on copies of a model. It lives only as long as ``profile`` runs."""

    def __init__(self, measure: Callable[..., Measured], model: nn.Module, inputs: Any, optimizer: Any) -> None:
        self._measure, self._model, self._inputs, self._optimizer = measure, model, inputs, optimizer
        self._after: dict[str, Measured | str] = {}

    def tried(self, verdict: Verdict, before: Measured) -> Verdict:
        """The verdict with the outcomes of all changes. The caller's random state is the caller's to keep."""
        findings = [dataclasses.replace(one, outcome=self._outcome(one, before)) for one in verdict.findings]
        return dataclasses.replace(verdict, findings=findings)

    def _outcome(self, finding: Finding, before: Measured) -> Outcome | None:
        if not finding.change:
            return None
        if finding.change not in self._after:
            self._after[finding.change] = self._profile_after(finding.change)
        after = self._after[finding.change]
        if isinstance(after, str):
            return Outcome(error=after)
        kind = KINDS[finding.kind]
        names = set(before.columns["name"][finding.first : finding.last + 1])
        try:
            figure = kind.at(after, names)
            found = kind.find(after)
        except NotJudged as reason:
            return Outcome(error=f"the figure is missing after the change: {reason}")
        remaining = {name for one in found for name in after.columns["name"][one.first : one.last + 1]}
        return Outcome(figure, before.loss, after.loss, len(names & remaining), len(names))

    def _profile_after(self, change: str) -> Measured | str:
        if self._optimizer is None and "optimizer" in change:
            return "it changes the optimizer, and profile was given none (optimizer=...)"
        try:
            # Together, so that the copied optimizer has the copied model's parameters.
            model, optimizer = copy.deepcopy((self._model, self._optimizer))
            names = {
                "model": model,
                "inputs": fresh_copy(self._inputs, self._model),
                "optimizer": optimizer,
                "torch": torch,
                "lcw_ops": lcw_ops,
            }
            exec(change, names)
            return self._measure(names["model"], names["inputs"], names["optimizer"])
        except Exception as error:
            return failed(error)
