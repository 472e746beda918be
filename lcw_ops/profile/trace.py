"""``trace(model, inputs, path)``: one forward and backward pass as a timeline for Chrome or Perfetto.

Forward, every call of a module is a bar, inside the bar of the module that calls it. Backward, a bar begins when the
gradient of an output of a module without children arrives, and ends when the next one does. So it holds the module's
own backward pass and what plain functions before it cost. On a GPU every bar waits for the device: bars do not overlap,
and the pass takes longer than one without a trace.

The format is Chrome's "Trace Event Format": complete events ("ph": "X") in microseconds.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcw_ops._checks import describe
from lcw_ops._files import write_atomically
from lcw_ops.profile import arguments as given
from lcw_ops.profile import machine
from lcw_ops.profile.layers import floating
from lcw_ops.profile.passes import ModelError, Work, fully_sharded
from lcw_ops.profile.profiler import _left_as_it_was

# Larger files open slowly in a browser.
MOST_BYTES = 20_000_000


def trace(
    model: nn.Module,
    inputs: Any,
    path: str | Path,
    targets: Tensor | None = None,
    loss: Callable | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    most_bytes: int = MOST_BYTES,
) -> int:
    """Write the timeline of a second pass; the first one, which warms up, is not recorded.

    Open the file at https://ui.perfetto.dev or chrome://tracing. The model is left as it was.

    Args:
        model, inputs, targets, loss, kwargs: as of ``profile``. Compiled models run uncompiled.
        most_bytes: of the file. If the pass has more calls than fit, the shortest are left out.

    Returns:
        The number of bars that were left out.

    Raises:
        TypeError, ValueError: as ``profile``, and most_bytes < 1000. OSError: the file cannot be written. Errors of the
        model and of the loss are passed on.
    """
    if not most_bytes >= 1000:
        raise ValueError(describe("trace", "most_bytes", f"is {most_bytes}", "at least 1000"))
    given.check_model(model)
    plain = given.unwrapped(given.initialised(model))
    work = Work(plain, given.bind(plain, inputs, kwargs), targets, loss, accumulates=bool(fully_sharded(plain)))
    with _left_as_it_was(plain, work.device), torch.compiler.set_stance("force_eager"):
        _one_pass(work, _Recorder(work.device))
        recorder = _Recorder(work.device)
        handles = recorder.attach(plain)
        try:
            _one_pass(work, recorder)
        finally:
            for handle in handles:
                handle.remove()
    lines, left_out = _within(recorder.events(), most_bytes - 200)
    text = f'{{"displayTimeUnit": "ms", "otherData": {{"left out": {left_out}}}, "traceEvents": [\n'
    text += ",\n".join(lines) + "\n]}\n"
    write_atomically(path, lambda file: file.write(text))
    return left_out


def _one_pass(work: Work, recorder: "_Recorder") -> None:
    one_pass = work.start()
    with recorder.bar("forward"):
        try:
            loss = one_pass.forward()
        except ModelError as error:
            raise error.__cause__ from None
    recorder.is_backward = True
    with recorder.bar("backward"):
        one_pass.backward(loss)


class _Recorder:
    """The bars so far, as (name, begin, end) in seconds, and the arrivals of gradients."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_backward = device, False
        self.start = machine.now(device)
        self.bars: list[tuple[str, float, float]] = []
        self.arrivals: list[tuple[str, float]] = []

    def bar(self, name: str) -> "_Bar":
        return _Bar(self, name)

    def attach(self, model: nn.Module) -> list:
        handles = []
        for name, module in model.named_modules():
            name = given.readable(name)
            if not name or isinstance(module, torch.jit.ScriptModule):
                continue
            # One entry per call in progress.
            begun: list[float] = []
            handles.append(module.register_forward_pre_hook(self._begin(begun)))
            is_leaf = not any(True for _ in module.children())
            handles.append(module.register_forward_hook(self._end(name, begun, is_leaf), always_call=True))
        return handles

    def _begin(self, begun: list[float]) -> Callable:
        return lambda *_: begun.append(machine.now(self.device))

    def _end(self, name: str, begun: list[float], is_leaf: bool) -> Callable:
        def end(module: nn.Module, args: tuple, output: Any) -> None:
            self.bars.append((name, begun.pop(), machine.now(self.device)))
            if is_leaf and not self.is_backward:
                for tensor in floating(output):
                    if tensor.requires_grad:
                        tensor.register_hook(lambda _: self._arrive(name))

        return end

    def _arrive(self, name: str) -> None:
        # A forward pass may differentiate too; those gradients are not the loss's.
        if self.is_backward:
            self.arrivals.append((name, machine.now(self.device)))

    def events(self) -> list[tuple[float, dict]]:
        """(seconds, event), in the order of their beginnings; outer bars before those inside them."""
        ends = [begin for _, begin in self.arrivals[1:]] + [end for name, _, end in self.bars if name == "backward"]
        of_gradients = [(name, begin, end) for (name, begin), end in zip(self.arrivals, ends, strict=False)]
        return [
            (
                end - begin,
                {
                    "name": name,
                    "ph": "X",
                    "ts": 1e6 * (begin - self.start),
                    "dur": 1e6 * (end - begin),
                    "pid": 0,
                    "tid": 0,
                },
            )
            for name, begin, end in sorted(self.bars + of_gradients, key=lambda bar: (bar[1], -bar[2]))
        ]


class _Bar:
    def __init__(self, recorder: _Recorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    def __enter__(self) -> None:
        self._begin = machine.now(self._recorder.device)

    def __exit__(self, *_) -> None:
        self._recorder.bars.append((self._name, self._begin, machine.now(self._recorder.device)))


def _within(events: list[tuple[float, dict]], most_bytes: int) -> tuple[list[str], int]:
    """(the events as lines of JSON, how many of the shortest were left out)."""
    lines = [json.dumps(event) for _, event in events]
    room, kept = most_bytes, set()
    for place in sorted(range(len(events)), key=lambda place: -events[place][0]):
        room -= len(lines[place]) + 2
        if room < 0:
            break
        kept.add(place)
    return [line for place, line in enumerate(lines) if place in kept], len(events) - len(kept)
