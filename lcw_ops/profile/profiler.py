"""``profile(model, inputs)``: a network's signal, gradient, time and memory, layer by layer.

It observes one pass with hooks, counts the arithmetic of a second one and times a few more. It replays every
orthogonal-filter recurrence, which is a single op, by chunks of layers, to get a row for each layer. It finds the
extreme singular values of the Jacobians of the recurrences and of the model. The model is left as it was: gradients,
buffers, plain attributes, hooks, mode and random state. A figure that cannot be computed is replaced by the reason; the
others stay.
"""

import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcw_ops._checks import describe
from lcw_ops._runs import kept_attributes, kept_buffers
from lcw_ops.nn import OrthogonalFilterMLP, OrthogonalFilterRNN
from lcw_ops.ops import backends
from lcw_ops.ops.orthogonal_filter import op as orthogonal_filter
from lcw_ops.ops.parallel_depth.solver import Solve, record_solves
from lcw_ops.profile import arguments as given
from lcw_ops.profile import jacobian as spectra
from lcw_ops.profile import machine, updates
from lcw_ops.profile.conditions import conditions
from lcw_ops.profile.figures import failed
from lcw_ops.profile.flops import Count, Counter
from lcw_ops.profile.layers import Observation, RecurrenceCall, floating
from lcw_ops.profile.passes import ModelError, Refused, Work, fully_sharded, place_of
from lcw_ops.profile.remedies import Experiment
from lcw_ops.profile.result import Profile, Solves, Timing
from lcw_ops.profile.rows import Gradients, Rows, first_not_finite, make_rows, new_table

# Timed passes stop after this time: by then the machine's noise has been averaged over.
TIMING_SECONDS = 10.0

_MODEL_FAILED = "the model failed"


def profile(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None = None,
    loss: Callable | None = None,
    *,
    jacobian: bool = True,
    jacobian_method: str = "auto",
    repeats: int = 3,
    matmul_rate: float | None = None,
    name: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    try_remedies: bool = False,
) -> Profile:
    """Measure one forward and backward pass of any model.

    Every call of a module is a row if the module has no children, or has parameters or work of its own: rms of the
    output, norm of the output's gradient, activation shift (rms over units of the output's mean over samples), norm of
    the weight's gradient. A module whose parameters are read by its parent, without a call, has a row too, so the rows
    have all parameters of the model. The recurrence of ``OrthogonalFilterMLP`` or ``OrthogonalFilterRNN`` is a single
    op; still, each of its layers (or time steps) has its own row, with rigorous bounds on the state, on the gradient
    and on the singular values of the layer's Jacobian. For recurrences that were solved in parallel over depth, the
    profile reports sweeps and convergence.

    A figure that does not apply, or whose computation fails, is NaN, and the profile says why: ``Profile.reason`` for
    rows, ``Profile.absent`` for the figures of the whole model. If the model itself fails midway, the profile has the
    rows so far and ``Profile.failure``, and a RuntimeWarning is issued.

    Args:
        model: used in its present mode (train or eval), on its device. What wraps it is taken off:
            DistributedDataParallel (the gradients are this process's) and torch.compile (the timed passes run
            compiled). A model with lazy modules that have no parameters yet is copied, and the copy is profiled.
        inputs: a tensor, a tuple of positional arguments, or a dict: keyword arguments if forward takes those names,
            else one positional argument. Samples along the first dimension of the first tensor, or along the second if
            this tensor goes into a module that takes the time first.
        targets: second argument of ``loss``.
        loss: ``loss(output, targets)``, or ``loss(output)`` without targets: one number. Default: cross entropy for
            integer targets, mean squared error for others; without targets the product with a fixed random direction of
            unit norm, so that the gradient at the output has norm 1. The default takes the first floating-point tensor
            of the output that has a dimension; a model that returns only its loss is differentiated by it.
        jacobian: also find the extreme singular values of the Jacobians of the recurrences and of the model, at the
            first sample. For a recurrence of width 512 or less, this is the exact Jacobian of its last state h_L with
            respect to its first, h_0; wider recurrences are left out. For the model, it is the Jacobian of the first
            floating-point tensor that it returns (the first one with samples, if there are several) with respect to the
            first tensor that it is given, with the other samples held fixed. The model's Jacobian is left out for
            integer inputs and for ``OrthogonalFilterRNN``, where that of h_0 -> h_L matters.
        jacobian_method: for the model's Jacobian: "exact", "lanczos" or "auto", see ``jacobian.function_spectrum``.
        repeats: the largest number of timed passes; after 10 s no further pass begins. The median is reported.
        matmul_rate: this machine's float32 FLOP/s, if it has been measured before (``machine.matmul_rate``).
        name: the model's name in tables and plots; default: its class.
        kwargs: keyword arguments of the model, beside ``inputs``.
        optimizer: the optimizer of the model's parameters, for the column update_ratio. It makes no step: the update of
            SGD, Adam, AdamW and RMSprop of torch.optim, and of SGD and AdamW of lcw_ops.optim, is computed from the
            gradients and its state. Another optimizer, or one with step hooks, makes a step that is taken back bit for
            bit; one that needs a closure has no figure.
        try_remedies: also make every change that the verdict proposes on a deep copy of the model, and profile the copy
            with the same batch. The verdict then says what the change did (``Finding.outcome``). Copies are freed, and
            the profile keeps neither model nor batch.

    Raises:
        TypeError: model is not a module or is a ScriptModule, inputs hold no tensor with a dimension, optimizer is not
            a torch optimizer, or repeats is not an int.
        ValueError: inputs hold no sample, a tensor of the model has no values (meta device), the loss is not a tensor
            with one element, a given loss requires no gradient, the model has neither calls of modules nor parameters,
            repeats < 1, an unknown method, or inside torch.inference_mode(). Errors of the loss are passed on, and
            those of the model if they come before the first row.
    """
    return profile_by_parts(
        model,
        inputs,
        targets,
        loss,
        jacobian=jacobian,
        jacobian_method=jacobian_method,
        repeats=repeats,
        matmul_rate=matmul_rate,
        name=name,
        kwargs=kwargs,
        optimizer=optimizer,
        begin=lambda part: None,
        try_remedies=try_remedies,
    )


# The parts of a profile, in their order.
PARTS = ("watched pass", "timed passes", "every layer")


def profile_by_parts(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None = None,
    loss: Callable | None = None,
    *,
    jacobian: bool = True,
    jacobian_method: str = "auto",
    repeats: int = 3,
    matmul_rate: float | None = None,
    name: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    begin: Callable[[str], None],
    weight_norms: np.ndarray | None = None,
    try_remedies: bool = False,
) -> Profile:
    """:func:`profile`, which calls ``begin`` with the name of each of ``PARTS`` before it begins.

    ``weight_norms``: the column weight_norm_bound of the model's only recurrence, if it is known already.
    """
    if torch.is_inference_mode_enabled():
        remedy = "Call profile outside of it."
        raise ValueError(describe("profile", "the mode", "is torch.inference_mode()", "a mode with gradients", remedy))
    if isinstance(repeats, bool) or not isinstance(repeats, int):
        raise TypeError(describe("profile", "repeats", f"is a {type(repeats).__name__}", "an int"))
    if repeats < 1:
        raise ValueError(describe("profile", "repeats", f"is {repeats}", "at least 1"))
    spectra.check_method(jacobian_method)
    given.check_model(model)
    updates.check(optimizer)
    model = given.initialised(model)
    plain = given.unwrapped(model)
    work = Work(plain, given.bind(plain, inputs, kwargs), targets, loss, accumulates=bool(fully_sharded(plain)))
    compiled = given.is_compiled(model)
    with _left_as_it_was(plain, work.device):
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            begin("watched pass")
            watched = _watched_pass(work, optimizer)
            for call in watched.recurrences:
                call.recurrence.weight_norms = weight_norms
            count = _counted_pass(work, watched)
        begin("timed passes")
        timing, peak = _timed_passes(work, repeats, watched, count, model if compiled else None)
        begin("every layer")
        samples = work.arguments.first_tensor().shape[watched.sample_dim]
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            rows = make_rows(watched.observation, watched.gradients, jacobian, samples)
            if jacobian:
                _add_model_jacobian(work, jacobian_method, watched, rows)
    timing.matmul_rate = machine.matmul_rate(work.device) if matmul_rate is None else matmul_rate
    watched.absent |= rows.absent
    columns, missing = rows.columns()
    result = Profile(
        name=name or type(plain).__name__,
        loss=watched.loss,
        samples=samples,
        columns={"name": np.array(rows.names), **columns},
        jacobians={what: spectrum for what, (spectrum, _, _) in rows.jacobians.items()},
        timing=timing,
        peak_memory_bytes=peak,
        backend=_backend(watched.recurrences, work.device),
        machine=machine.describe(work.device),
        solves=watched.solves,
        missing=missing,
        reasons=rows.table.reasons,
        absent=watched.absent,
        failure=watched.failure,
        not_finite=first_not_finite(rows, watched.observation),
        modules=rows.modules,
    )
    if try_remedies:

        def measure(copied: nn.Module, same_inputs: Any, of_copy: torch.optim.Optimizer | None) -> Profile:
            options: dict[str, Any] = {"jacobian": False, "repeats": 1, "matmul_rate": 1.0, "kwargs": kwargs}
            return profile(copied, same_inputs, targets, loss, optimizer=of_copy, **options)

        with _left_as_it_was(plain, work.device):
            result.tried = Experiment(measure, plain, inputs, optimizer).tried(result.verdict(), result)
    return result


@dataclass
class _Watched:
    """The findings of the watched pass. ``absent``: figures of the whole model -> why they are missing."""

    observation: Observation
    loss: float = math.nan
    gradients: Gradients = field(default_factory=Gradients)
    solves: dict[str, Solves] = field(default_factory=dict)  # by direction
    absent: dict[str, str] = field(default_factory=dict)
    failure: str | None = None

    @property
    def recurrences(self) -> list[RecurrenceCall]:
        return [call for call in self.observation.calls if isinstance(call, RecurrenceCall)]

    @property
    def sample_dim(self) -> int:
        return self.observation.sample_dim


@contextmanager
def _left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore random states, attributes and buffers (a batch norm's running statistics) at the end, whatever happens.

    The random states are those of torch, NumPy and Python.
    """
    random_state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    # A model may draw from NumPy's global generator.
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002
    with random_state, torch.enable_grad(), kept_attributes(model.modules()), kept_buffers(model.modules()):
        try:
            yield
        finally:
            np.random.set_state(of_numpy)  # noqa: NPY002
            random.setstate(of_python)
            # A forward pass without its backward pass leaves whole parameters behind.
            for module in fully_sharded(model):
                module.reshard()


def _watched_pass(work: Work, optimizer: torch.optim.Optimizer | None = None) -> _Watched:
    try:
        return _watched_once(work, optimizer)
    except Refused:
        # The graph of the first pass is spent.
        return _watched_once(work, optimizer)


def _watched_once(work: Work, optimizer: torch.optim.Optimizer | None) -> _Watched:
    watched = _Watched(Observation(work.model, work.arguments.first_tensor().shape, new_table()))
    observation, one_pass = watched.observation, work.start()
    with observation.watching(), record_solves() as solves:
        try:
            with observation.in_forward():
                loss = one_pass.forward()
        except ModelError as error:
            if not observation.calls:
                raise error.__cause__ from None
            watched.failure = place_of(error.__cause__, work.model, observation.names)
            warnings.warn(
                f"profile: the model failed, and only the rows before are shown: {watched.failure}",
                RuntimeWarning,
                stacklevel=4,
            )
            watched.gradients.missing = "the model failed before the backward pass"
            watched.absent["loss"] = _MODEL_FAILED
            return watched
        watched.loss, in_forward = loss.item(), len(solves)
        observation.is_backward = True
        try:
            gradients = one_pass.backward(loss)
        except Refused:
            raise
        except Exception as error:
            watched.gradients.missing = watched.absent["backward pass"] = f"the backward pass failed: {failed(error)}"
        else:
            watched.gradients = Gradients.of(one_pass.differentiated, gradients)
            watched.gradients.conditions = conditions(one_pass.differentiated, gradients, optimizer)
            if optimizer is not None:
                # The layers of a recurrence have a row each.
                stacked = [getattr(call.module, "weight", None) for call in watched.recurrences]
                by_layer = {id(weight) for weight in stacked if weight is not None}
                watched.gradients.next_updates = updates.update_norms(
                    optimizer, one_pass.differentiated, gradients, by_layer
                )
            if not loss.requires_grad:
                watched.gradients.missing = "the loss requires no gradient: nothing before it does"
        watched.solves = _by_direction(solves, in_forward)
    if not observation.calls and not any(observation.own.values()):
        expected = "calls of its modules or parameters, which are the rows of the result"
        raise ValueError(describe("profile", "the model", "has neither", expected))
    return watched


def _by_direction(solves: list[Solve], in_forward: int) -> dict[str, Solves]:
    """Summarise the solves by direction: the first ``in_forward`` of them are the forward pass's.

    The backward pass may have to solve windows (ranges of layers) forward again. Such solves are left out: their result
    is that of the forward pass.
    """
    parts = {
        "forward": solves[:in_forward],
        "backward": [solve for solve in solves[in_forward:] if solve.direction == "backward"],
    }
    return {direction: summary for direction, part in parts.items() if (summary := Solves.of(part)) is not None}


def _counted_pass(work: Work, watched: _Watched) -> Count:
    """The arithmetic of one pass. It is not the watched pass: the hooks compute too."""
    if watched.failure is not None:
        return _give_up(watched, "FLOPs", _MODEL_FAILED, Count())
    try:
        one_pass, counter = work.start(), Counter()
        with counter:
            loss = one_pass.forward()
            forward = counter.flops
            one_pass.backward(loss)
        return Count(forward, counter.flops - forward, tuple(counter.uncounted))
    except Exception as error:
        return _give_up(watched, "FLOPs", failed(error.__cause__ or error), Count())


def _give_up(watched: _Watched, figure: str, reason: str, instead):
    watched.absent[figure] = reason
    return instead


def _timed_passes(
    work: Work, repeats: int, watched: _Watched, count: Count, compiled: nn.Module | None
) -> tuple[Timing, int | None]:
    """Times, and the most memory held in these passes. ``compiled`` runs in the model's place if it is given."""
    forward, backward = [], []

    def run() -> None:
        if compiled is not None:
            # Compile before the first timed pass.
            one_pass = work.start()
            one_pass.backward(one_pass.forward(compiled))
        begin = machine.now(work.device)
        while len(forward) < repeats and (not forward or machine.now(work.device) - begin < TIMING_SECONDS):
            one_pass = work.start()
            start = machine.now(work.device)
            loss = one_pass.forward(compiled)
            middle = machine.now(work.device)
            gradients = one_pass.backward(loss)
            forward.append(middle - start)
            backward.append(machine.now(work.device) - middle)
            # Free these before the next pass allocates its own.
            del loss, gradients, one_pass

    peak: int | str = _MODEL_FAILED
    if watched.failure is not None:
        watched.absent["time"] = _MODEL_FAILED
    else:
        try:
            peak = machine.peak_memory_of(run, work.device)
        except Exception as error:
            peak = watched.absent["time"] = failed(error.__cause__ or error)
    if isinstance(peak, str):
        watched.absent["peak memory"] = peak
    timing = Timing(
        forward_seconds=statistics.median(forward) if backward else math.nan,
        backward_seconds=statistics.median(backward) if backward else math.nan,
        repeats=len(backward),
        layers=sum(call.rows for call in watched.observation.calls),
        forward_flops=count.forward,
        backward_flops=count.backward,
        uncounted=count.uncounted,
    )
    return timing, None if isinstance(peak, str) else peak


def _backend(recurrences: list[RecurrenceCall], device: torch.device) -> str:
    """The backends that ran the recurrences; for a model without any, the one that would run them."""
    used = {call.recurrence.solved_on for call in recurrences}
    return ", ".join(sorted(used)) if used else backends.choose(orthogonal_filter.NAME, device)


def _has_plain_ends(mlp: OrthogonalFilterMLP) -> bool:
    """Whether both linear layers apply the weight they hold: a replacement with adapters may not."""
    return all(type(layer) is nn.Linear for layer in (mlp.input_layer, mlp.output_layer))


def _add_model_jacobian(work: Work, method: str, watched: _Watched, rows: Rows) -> None:
    """Add the Jacobian of one sample of the first input -> its part of the output, or the reason why there is none."""
    what, point = "input -> output", work.arguments.first_tensor()
    if isinstance(work.model, OrthogonalFilterRNN):
        # That of h_0 -> h_L says more.
        return
    if watched.failure is not None:
        rows.absent[what] = _MODEL_FAILED
    elif not point.is_floating_point():
        rows.absent[what] = f"the first input is {point.dtype}, and only real floating-point inputs have a Jacobian"
    elif isinstance(work.model, OrthogonalFilterMLP) and "h_0 -> h_L" in rows.jacobians and _has_plain_ends(work.model):
        # Use the chain rule: the Jacobian of h_0 -> h_L, which has been computed, and the two linear layers' weights.
        _, inner, exponent = rows.jacobians["h_0 -> h_L"]
        read_in, read_out = (
            layer.weight.detach().double() for layer in (work.model.input_layer, work.model.output_layer)
        )
        product = read_out @ inner.double() @ read_in
        spectrum = spectra.matrix_spectrum(product, inner.shape[0], exponent, computed_in=inner.dtype)
        rows.jacobians[what] = (spectrum, product, exponent)
    else:
        try:
            rows.jacobians[what] = (_model_spectrum(work, method, watched.sample_dim), None, 0)
        except Exception as error:
            rows.absent[what] = failed(error)


def _model_spectrum(work: Work, method: str, sample_dim: int) -> spectra.JacobianSpectrum:
    def first_sample(sample: Tensor) -> Tensor:
        arguments = work.start().arguments
        point = arguments.first_tensor()
        others = point.detach().narrow(sample_dim, 1, point.shape[sample_dim] - 1)
        args, kwargs = arguments.replaced(point, torch.cat([sample, others], sample_dim))
        return _of_first_sample(work.model(*args, **kwargs), point.shape[sample_dim], sample_dim)

    point = work.arguments.first_tensor().detach().narrow(sample_dim, 0, 1)
    try:
        return spectra.function_spectrum(first_sample, point, method)
    except spectra.NoSecondDerivative:
        with spectra.twice_differentiable():
            return spectra.function_spectrum(first_sample, point, method)


def _of_first_sample(output, samples: int, sample_dim: int) -> Tensor:
    """The first sample's part of the first floating-point tensor that has samples; a tensor without samples whole."""
    tensors = list(floating(output))
    if not tensors:
        raise ValueError("the model's output holds no floating-point tensor")
    for tensor in tensors:
        # An output without times, such as the scores of a sequence, has its samples first again.
        for dim in (sample_dim, 0):
            if tensor.dim() > dim and tensor.shape[dim] == samples:
                return tensor.select(dim, 0)
    return tensors[0]
