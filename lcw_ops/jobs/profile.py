"""The command ``lcw-ops profile``: train a very deep network on real images, then show its gradient layer by layer.

One class makes three kinds of nets of L layers. From a state h, a layer of the orthogonal-filter net computes
alpha O h + beta act(W h + b), with a fixed orthogonal O, beta = 1/L and alpha = 1 - beta. A layer of the residual net
computes h + act(W h + b), and one of the plain net act(W h + b). All three nets are measured at initialisation. The
chosen one is also trained, and measured in full afterwards.
"""

import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lcw_ops._files import prepare_folder, write_atomically
from lcw_ops.jobs import data
from lcw_ops.jobs.arguments import check_memory, filter_bytes, usable_device
from lcw_ops.jobs.loop import Training, accuracy, evaluation_steps
from lcw_ops.jobs.progress import Estimate, progress
from lcw_ops.jobs.report import IN_WORDS, History, Report, summary, table, write_layers
from lcw_ops.jobs.settings import PROFILE_KINDS as KINDS
from lcw_ops.jobs.settings import ProfileSettings as Settings
from lcw_ops.jobs.settings import expect
from lcw_ops.nn import OrthogonalFilterMLP
from lcw_ops.nn.orthogonal_filter import make_filter
from lcw_ops.ops.orthogonal_filter import op
from lcw_ops.profile import machine
from lcw_ops.profile import orthogonal_filter as replay
from lcw_ops.profile.profiler import PARTS, profile_by_parts
from lcw_ops.profile.result import write_json

REPORT_FILES = ("layers.csv", "report.json", "report.png")

# How long each part of the run takes, in training steps of the default sizes. The time that is left is estimated from
# these numbers and from the speed of the last parts.
WORK = {
    "matmul rate": 0.3,
    "network": 0.2,
    "initialisation": 1.5,
    "test set": 0.5,
    "watched pass": 0.9,
    "timed passes": 2.2,
    "every layer": 3.0,
    "layers.csv": 0.3,
    "report.json": 0.02,
    "report.png": 0.15,
}

# The memory of one layer in the report, in bytes: its rows in four tables, as numbers and as CSV text.
ROW_BYTES = 2000


def make_network(kind: str, settings: Settings, features: int, classes: int) -> OrthogonalFilterMLP:
    """A network of one kind. The same seed gives all kinds the same weights, input and output layers.

    Raises ValueError for an unknown filter or activation.
    """
    torch.manual_seed(settings.seed)
    filter = make_filter(settings.filter, settings.width, device="cpu")
    solver = {name: getattr(settings, name) for name in ("solver", "tolerance", "window")}
    scales = {
        "orthogonal-filter": {"filter": filter, **solver},
        # h + act(W h + b): the identity as filter, both branches in full.
        "residual": {"filter": "identity", "alpha": 1.0, "beta": 1.0},
        # act(W h + b): without the filter's branch.
        "plain": {"filter": "identity", "alpha": 0.0, "beta": 1.0},
    }[kind]
    # Seed again: drawing the filter took random numbers, and the kinds of filters take different amounts of them.
    torch.manual_seed(settings.seed)
    model = OrthogonalFilterMLP(
        features, settings.width, settings.depth, classes, activation=settings.activation, device="cpu", **scales
    )
    return model.to(settings.device)


def run(settings: Settings) -> int:
    """Run the command: print progress and a table, and write ``REPORT_FILES`` into ``settings.out``.

    Returns the exit code: 0; 130 after Ctrl-C and 1 after a failure, both with a line that lists the files written.

    Raises:
        ValueError, OSError, ImportError: before any work, if an argument, the data or the folder is wrong.
    """
    settings.check()
    device = usable_device(settings.device)
    # Refuse a backend request that cannot be met before the work, not after an hour of it.
    op.choose_kernel(device, settings.width, torch.float32.itemsize)
    dataset = data.load(settings.data, settings.seed)
    expect(
        settings.batch <= len(dataset.x_train), "batch", settings.batch, f"at most the {len(dataset.x_train)} samples"
    )
    check_memory(settings, *needed_bytes(settings, dataset.features + dataset.classes), device)
    # A net of one layer shows a wrong filter or activation too, without the 800 MB of a deep net.
    make_network(settings.kind, Settings(**{**asdict(settings), "depth": 1}), dataset.features, dataset.classes)
    folder = prepare_folder(settings.out)
    _require_matplotlib()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)

    written: list[str] = []
    try:
        estimate = Estimate(total_work(settings))
        report = _work(settings, dataset.to(device), device, estimate)
        _write(report, folder, written, estimate)
    except KeyboardInterrupt:
        print(f"\ninterrupted. {_what_was_written(folder, written)}", file=sys.stderr)
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"failed: {type(error).__name__}: {error}. {_what_was_written(folder, written)}", file=sys.stderr)
        return 1
    print(f"\n{table(report)}\n\nwritten to {folder}: {', '.join(written)}  ({report.seconds:.0f} s)")
    return 0


def needed_bytes(settings: Settings, ends: int) -> tuple[int, int]:
    """The least memory of a run: (bytes on the device, bytes of the filter on the CPU). ``ends``: features + classes.

    It counts weights, their gradients, Adam's two moments if the run trains, and the rows of the report.
    """
    width = settings.width
    parameters = settings.depth * width * (width + 1) + ends * (width + 1)
    network = 4 * parameters * (4 if settings.steps else 2) + ROW_BYTES * settings.depth
    # The filter of the other kinds is the identity.
    filter = settings.filter if settings.kind == "orthogonal-filter" else "identity"
    return network, filter_bytes(filter, width)


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "report.png needs matplotlib, which is not installed: pip install lcw-ops[profile]"
        ) from error


def total_work(settings: Settings) -> float:
    """The work of a run, in the unit of ``WORK``."""
    before = ["matmul rate", "network", *(["initialisation"] if settings.steps else [])]
    evaluations = ["test set"] * len(evaluation_steps(settings.steps))
    after = ["matmul rate", *PARTS * len(KINDS), *["network"] * (len(KINDS) - 1), *REPORT_FILES]
    return settings.steps + sum(WORK[part] for part in (*before, *evaluations, *after))


def _work(settings: Settings, dataset: data.Dataset, device: torch.device, estimate: Estimate) -> Report:
    start = time.perf_counter()
    # All kinds are measured on the same batch.
    inputs, targets = dataset.x_train[: settings.batch], dataset.y_train[: settings.batch]
    with progress("prepare", 3 if settings.steps else 2, estimate) as bar:
        bar.begin("matmul rate of this machine", WORK["matmul rate"])
        matmul_rate = machine.matmul_rate(device)
        bar.advance("matmul rate of this machine", WORK["matmul rate"])
        bar.begin("weights of the network", WORK["network"])
        model = make_network(settings.kind, settings, dataset.features, dataset.classes)
        bar.advance("weights of the network", WORK["network"])
        initial = {}
        if settings.steps:
            bar.begin("signal and gradient at initialisation", WORK["initialisation"])
            initial[settings.kind] = initial_norms(model, inputs, targets)
            bar.advance("signal and gradient at initialisation", WORK["initialisation"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{settings.kind} net of {settings.depth:,} layers, width {settings.width}, {settings.activation}: "
        f"{parameters:,} parameters; {dataset.name}: {len(dataset.x_train)} training and {len(dataset.x_test)} test "
        "samples",
        flush=True,
    )
    history = train(model, dataset, settings, estimate)
    profiles, weight_norms = {}, None
    kinds = (settings.kind, *(kind for kind in KINDS if kind != settings.kind))
    with progress("measure", len(kinds), estimate) as bar:
        # Measure again: on a shared machine the better of two measurements is closer to the machine's peak.
        bar.begin("matmul rate of this machine", WORK["matmul rate"])
        matmul_rate = max(matmul_rate, machine.matmul_rate(device))
        bar.part_done(WORK["matmul rate"])
        for kind in kinds:
            net, current = f"{IN_WORDS[kind]} net", ""

            def begin(part: str, net: str = net) -> None:
                nonlocal current
                if current:
                    bar.part_done(WORK[current])
                current = part
                bar.begin(f"{net}: {part}", WORK[part])

            if kind != settings.kind:
                begin("network")
                model = make_network(kind, settings, dataset.features, dataset.classes)
            profiles[kind] = profile_by_parts(
                model, inputs, targets, matmul_rate=matmul_rate, name=net, begin=begin, weight_norms=weight_norms
            )
            if kind != settings.kind:
                # At initialisation all kinds have the same weights.
                weight_norms = profiles[kind].columns["weight_norm_bound"][1:-1]
            # The first and the last row are those of the input and the output layer.
            layers = {name: profiles[kind].columns[name][1:-1] for name in ("state_rms", "gradient_norm")}
            initial.setdefault(kind, layers)
            # Free this network before the next one of this depth is made.
            del model
            gc.collect()
            bar.advance(net, WORK[current])
    peak = machine.peak_memory_bytes(device)
    return Report(settings, dataset, history, profiles, initial, peak, time.perf_counter() - start)


def initial_norms(model: OrthogonalFilterMLP, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    """state_rms and gradient_norm of every layer, as in a profile but ten times as fast."""

    def gradient_at_end(state: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            state = state.requires_grad_()
            loss = nn.functional.cross_entropy(model.output_layer(state), targets)
            return torch.autograd.grad(loss, state)[0]

    with torch.no_grad():
        recurrence = replay.from_mlp(model, model.input_layer(inputs))
    return replay.signal_norms(recurrence, gradient_at_end)


def train(model: nn.Module, dataset: data.Dataset, settings: Settings, estimate: Estimate | None = None) -> History:
    """``settings.steps`` steps of Adam on batches shuffled by the seed, without replacement within an epoch.

    ``estimate``: of the run that this training is a part of.
    """
    evaluate_after = evaluation_steps(settings.steps)
    if estimate is None:
        estimate = Estimate(settings.steps + len(evaluate_after) * WORK["test set"])
    device = dataset.x_train.device
    with progress("train", settings.steps, estimate) as bar:
        bar.begin("test set before the first step", WORK["test set"])
        history = History(test_accuracy=[(0, accuracy(model, dataset))])
        bar.part_done(WORK["test set"])
        if settings.steps == 0:
            return history
        training = Training(model, dataset, settings.steps, settings.batch, settings.lr, settings.seed)
        for step in range(1, settings.steps + 1):
            start = machine.now(device)
            history.loss.append(training.step())
            history.milliseconds.append((machine.now(device) - start) * 1e3)
            bar.part_done(1.0)
            if step in evaluate_after:
                history.test_accuracy.append((step, accuracy(model, dataset)))
                bar.part_done(WORK["test set"])
            rate = settings.depth / history.milliseconds[-1] * 1e3
            bar.advance(
                f"loss {history.loss[-1]:.3f}  test accuracy {history.test_accuracy[-1][1]:.1%}  "
                f"{history.milliseconds[-1]:.0f} ms/step  {rate:,.0f} layers/s",
                work=0,
            )
    return history


def _write(report: Report, folder: Path, written: list[str], estimate: Estimate) -> None:
    """Write the three files, each whole or not at all. Append the name of each to ``written`` once it is there."""
    from lcw_ops.jobs.picture import plot_report

    writers: dict[str, Callable[[Path], None]] = {
        "layers.csv": lambda path: write_layers(report, path),
        "report.json": lambda path: write_atomically(path, lambda file: write_json(file, summary(report))),
        "report.png": lambda path: plot_report(report, path),
    }
    with progress("write", len(REPORT_FILES), estimate) as bar:
        for name in REPORT_FILES:
            bar.begin(name, WORK[name])
            writers[name](folder / name)
            written.append(name)
            bar.advance(name, WORK[name])


def _what_was_written(folder: Path, written: list[str]) -> str:
    missing = [name for name in REPORT_FILES if name not in written]
    older = [name for name in missing if (folder / name).exists()]
    text = f"Written to {folder}: {', '.join(written) or 'nothing'}. Not written: {', '.join(missing) or 'nothing'}"
    return text + (f" (an earlier run's {', '.join(older)} still there)" if older else "")
