"""The command ``lcw-ops train``: one deep network, trained on small real data, stopped and resumed at will.

A net of the kind "mlp" has ``depth`` layers. One of the kind "rnn" takes ``depth`` time steps: it reads a sample
feature by feature and then zeros, so it must remember the sample to the end. A resumed run ends with the same bits as a
run that was never stopped.
"""

import csv
import hashlib
import json
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import lcw_ops
from lcw_ops._checks import describe_argument
from lcw_ops._files import prepare_folder, write_atomically
from lcw_ops.jobs import checkpoints, data
from lcw_ops.jobs.arguments import check_memory, filter_bytes, usable_device
from lcw_ops.jobs.loop import Training, accuracy, evaluation_steps
from lcw_ops.jobs.progress import progress
from lcw_ops.jobs.schedule import SCHEDULES
from lcw_ops.jobs.settings import DEFAULTS, expect
from lcw_ops.jobs.settings import TRAIN_KINDS as KINDS  # noqa: F401 - beside Settings, whose kind it lists
from lcw_ops.jobs.settings import TrainSettings as Settings
from lcw_ops.nn import OrthogonalFilterMLP, OrthogonalFilterRNN
from lcw_ops.ops.orthogonal_filter import op
from lcw_ops.profile import machine

# A run of 50 steps ends before longer averages forget the first steps. Over 300 layers of width 32 and 64, in 12 to 40
# steps of batch 64 to 256, 5 seeds each, these betas reach 0 to 1.7 % more test accuracy than (0.9, 0.99), on average
# 0.7 %.
ADAM_BETAS = (0.8, 0.95)

# Test accuracy 96.8 %, and 96.2 % without it: the mean of 16 runs of 50 steps at 300 layers.
LABEL_SMOOTHING = 0.2

# The format of a checkpoint; a checkpoint of another format is refused.
FORMAT = 1

# The settings that decide the bits of a run, apart from the number of steps, which a resumed run may change. The data's
# content decides too, but not the file's path.
DECISIVE = ("kind", "depth", "width", "batch", "lr", "schedule", "c", "filter", "activation", "seed")

# The values of entries that the oldest checkpoints of this format lack.
FIRST_CONFIGURATION = {"schedule": "falling", "as_at_once": True}


def complete(settings: Settings, dataset: data.Dataset) -> Settings:
    """Fill in the kind's defaults and the data's sizes. Raises ValueError for settings that do not fit the data."""
    samples, features = len(dataset.x_train), dataset.features
    expect(settings.batch <= samples, "batch", settings.batch, f"at most the {samples} samples")
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    settings = Settings(**{**DEFAULTS[settings.kind], **given})
    if settings.epochs is not None:
        # The samples at the end of an epoch that do not fill a batch are not used.
        settings = replace(settings, steps=settings.epochs * (samples // settings.batch))
    if settings.kind == "rnn":
        settings = replace(settings, depth=settings.depth or features)
        expect(settings.depth >= features, "depth", settings.depth, f"at least {features} time steps, one per feature")
    expect(settings.c <= settings.depth, "c", settings.c, f"at most the depth of {settings.depth}: beta = c / depth")
    return settings


class FeatureRNN(nn.Module):
    """Reads the features of a sample one by one, then zeros up to ``length`` steps, and classifies the last state.

    x (samples, features) -> (samples, classes). A step adds at most beta = c / length to a state that starts at 0. So
    the state is scaled by length / features before the linear output layer: this is its size in a run without zeros.
    """

    def __init__(self, width: int, length: int, classes: int, **options) -> None:
        super().__init__()
        self.length = length
        self.recurrence = OrthogonalFilterRNN(1, width, **options)
        self.output_layer = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        sequence = nn.functional.pad(x.T, (0, 0, 0, self.length - x.shape[1]))
        _, h_n = self.recurrence(sequence.unsqueeze(-1))
        return self.output_layer(h_n.squeeze(0) * (self.length / x.shape[1]))


def make_network(settings: Settings, features: int, classes: int) -> nn.Module:
    """The network of ``settings.kind``, drawn by the seed. Raises ValueError for an unknown filter or activation."""
    torch.manual_seed(settings.seed)
    options = {
        "filter": settings.filter,
        "beta": settings.c / settings.depth,
        "activation": settings.activation,
    }
    if settings.kind == "mlp":
        model = OrthogonalFilterMLP(features, settings.width, settings.depth, classes, **options)
    else:
        model = FeatureRNN(settings.width, settings.depth, classes, **options)
    return model.to(settings.device)


def parameter_count(settings: Settings, features: int, classes: int) -> int:
    width = settings.width
    ends = classes * (width + 1)
    if settings.kind == "mlp":
        return settings.depth * width * (width + 1) + (features + 1) * width + ends
    return width * (width + 2) + ends


def needed_bytes(settings: Settings, dataset: data.Dataset) -> int:
    """The least bytes of a training on its device: weights, gradients, Adam's two moments, an RNN's states."""
    needed = 4 * 4 * parameter_count(settings, dataset.features, dataset.classes)
    if settings.kind == "rnn":
        # Four tensors: the inputs' part U x_t of the pre-activations, the states, and the gradients of both.
        needed += 4 * 4 * settings.depth * settings.batch * settings.width
    return needed


@dataclass
class Log:
    """The training curve: loss of every step; (steps done, accuracy) of every evaluation.

    It has no times, so that a repeated run has the same log.
    """

    loss: list[float] = field(default_factory=list)
    test_accuracy: list[tuple[int, float]] = field(default_factory=list)

    def state(self) -> dict[str, Tensor]:
        return {
            "log.loss": torch.tensor(self.loss, dtype=torch.float64),
            "log.test_accuracy": torch.tensor(self.test_accuracy, dtype=torch.float64),
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Log":
        evaluations = [(int(step), share) for step, share in tensors["log.test_accuracy"].tolist()]
        return cls(tensors["log.loss"].tolist(), evaluations)

    def write_csv(self, file) -> None:
        """Write one row per step from 0 on: its loss, and the test accuracy after it if that was measured."""
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "test_accuracy"])
        measured = dict(self.test_accuracy)
        writer.writerows(
            [step, "" if step == 0 else self.loss[step - 1], measured.get(step, "")]
            for step in range(len(self.loss) + 1)
        )


def configuration(settings: Settings, dataset: data.Dataset, device: torch.device) -> dict:
    """The settings that decide the bits of a run, by flag, and the versions in use, which may change the bits."""
    digest = hashlib.sha256()
    for tensor in (dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test):
        digest.update(tensor.numpy().tobytes())
    return {
        "format": FORMAT,
        **{name: getattr(settings, name) for name in DECISIVE},
        "steps": settings.steps,
        # Whether every step had the learning rate that it would have in a single run of this many steps.
        "as_at_once": True,
        "data": digest.hexdigest(),
        "device": device.type,
        # The order of sums depends on the number of threads.
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "made_with": {
            "torch": torch.__version__,
            "lcw_ops": lcw_ops.__version__,
            "backend": op.choose_kernel(device, settings.width, torch.float32.itemsize),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            # This limits the instructions of the CPU kernels only.
            "LCW_OPS_CPU_CAPABILITY": os.environ.get("LCW_OPS_CPU_CAPABILITY"),
        },
    }


def check_same(saved: dict, current: dict, folder: Path) -> None:
    """Raise a ValueError that names the first argument that differs.

    For versions that differ, print a line instead: they may change the last bits.
    """
    if saved["format"] != FORMAT:
        came = f"is {folder}, whose checkpoints have format {saved['format']}"
        raise ValueError(describe_argument("--checkpoint", came, f"format {FORMAT}, which this version reads"))
    if saved["data"] != current["data"]:
        came, expected = "has other content than the checkpoint's training data", "the same data"
        raise ValueError(describe_argument("--data", came, expected, "Give it, or another --checkpoint folder."))
    for name in (*DECISIVE, "device", "threads"):
        if saved[name] != current[name]:
            expected = f"{saved[name]}, as in the checkpoint"
            remedy = f"Give --{name} {saved[name]}, or another --checkpoint folder."
            raise ValueError(describe_argument(f"--{name}", f"is {current[name]}", expected, remedy))
    for name, made_with in saved["made_with"].items():
        if made_with != current["made_with"][name]:
            now = current["made_with"][name]
            print(f"note: {name} was {made_with}, is {now}: the last bits may differ", file=sys.stderr)


def run(settings: Settings) -> int:
    """Run the command. Returns the exit code: 0; 130 after Ctrl-C and 1 after a failure, with advice how to continue.

    Raises:
        ValueError, OSError, ImportError: before any work, if an argument, the data or a folder is wrong.
    """
    start = time.perf_counter()
    steps_given = settings.steps is not None or settings.epochs is not None
    settings, dataset, device = _checked(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with nullcontext() if settings.checkpoint is None else checkpoints.owned(settings.checkpoint) as folder:
        current = configuration(settings, dataset, device)
        saved = None
        if folder is not None:
            # Until the lock is taken, another process may still write here.
            if not settings.resume:
                _expect_empty(folder)
            _check_disk(settings, dataset, folder)
            saved = _saved(folder, current) if settings.resume else None
            if saved is not None:
                done, steps = int(saved["done"]), settings.steps if steps_given else None
                current = going_on(_configuration_of(saved), current, done, steps)
                settings = replace(settings, steps=current["steps"])
                if done == settings.steps:
                    print(f"all {done} steps are done; give a larger --steps to continue", flush=True)
                else:
                    print(f"continuing after step {done}, from {folder}", flush=True)
        out = None if settings.out is None else prepare_folder(settings.out)
        try:
            training, log = _begin(settings, dataset.to(device), saved)
            # The optimizer now holds its moments; the rest would only take memory.
            del saved
            _work(settings, training, log, _saver(folder, current))
            written = [] if out is None else _write(out, training.model, log)
        except KeyboardInterrupt:
            print(f"\ninterrupted. {_way_on(folder)}", file=sys.stderr)
            return 130
        except Exception as error:
            traceback.print_exc()
            print(f"failed: {type(error).__name__}: {error}. {_way_on(folder)}", file=sys.stderr)
            return 1
    print(
        f"after {training.done} steps: train loss {log.loss[-1]:.4f}, test accuracy {log.test_accuracy[-1][1]:.2%}; "
        f"{time.perf_counter() - start:.1f} s" + "".join(f"\nwritten: {path}" for path in written)
    )
    return 0


def _checked(settings: Settings) -> tuple[Settings, data.Dataset, torch.device]:
    """Check everything that can be checked before a folder is touched, and complete the settings."""
    settings.check()
    device = usable_device(settings.device)
    # Split the data in the same way for every seed, so that the accuracies of several seeds can be compared.
    dataset = data.load(settings.data)
    settings = complete(settings, dataset)
    # Refuse a backend request that cannot be met before the work, not after an hour of it.
    op.choose_kernel(device, settings.width, torch.float32.itemsize)
    check_memory(settings, needed_bytes(settings, dataset), filter_bytes(settings.filter, settings.width), device)
    # A small net shows a wrong filter or activation too.
    make_network(replace(settings, kind="mlp", depth=1), 1, 1)
    return settings, dataset, device


def _expect_empty(folder: Path) -> None:
    if all(entry.name.startswith(".") for entry in folder.iterdir()):
        return
    steps = checkpoints.steps_in(folder)
    held = f"checkpoints up to step {steps[-1]}" if steps else "files already"
    remedy = "Add --resume to continue, or give another folder." if steps else "Give another folder."
    raise ValueError(describe_argument("--checkpoint", f"is {folder}, which holds {held}", "an empty folder", remedy))


def _check_disk(settings: Settings, dataset: data.Dataset, folder: Path) -> None:
    # A checkpoint has the weights and Adam's two moments. Until the oldest is deleted, there is one more than KEPT.
    one = 3 * 4 * parameter_count(settings, dataset.features, dataset.classes)
    needed = one * max(1, checkpoints.KEPT + 1 - len(checkpoints.steps_in(folder)))
    free = shutil.disk_usage(folder).free
    if needed > free:
        came = f"is {folder}, where checkpoints of {one / 1e9:,.1f} GB need {needed / 1e9:,.1f} GB more"
        expected = f"at most the {free / 1e9:,.1f} GB that are free on this disk"
        raise ValueError(describe_argument("--checkpoint", came, expected))


def _saved(folder: Path, current: dict) -> dict[str, Tensor] | None:
    """The newest checkpoint, if it belongs to this run; None, with a message, if there is none."""
    tensors = checkpoints.newest(folder)
    if tensors is None:
        print(f"no checkpoint in {folder}: starting from step 0", flush=True)
        return None
    check_same(_configuration_of(tensors), current, folder)
    return tensors


def _configuration_of(tensors: dict[str, Tensor]) -> dict:
    return FIRST_CONFIGURATION | json.loads(bytes(tensors["configuration"].tolist()))


def going_on(saved: dict, current: dict, done: int, steps: int | None) -> dict:
    """Returns ``current`` with the number of steps to continue to: ``steps``, or if that is None, the saved number.

    Prints how a changed number affects the result. Raises ValueError if more steps have been done already.
    """
    before, steps = saved["steps"], saved["steps"] if steps is None else steps
    if steps < done:
        expected = f"at least the {done} that the checkpoint has done"
        remedy = "Give more, or another --checkpoint folder."
        raise ValueError(describe_argument("--steps", f"is {steps}", expected, remedy))
    rate = SCHEDULES[current["schedule"]]
    as_at_once = saved["as_at_once"] and all(rate(step, before) == rate(step, steps) for step in range(done))
    if steps != before:
        result = (
            f"the weights will be those of {steps} steps at once"
            if as_at_once
            else f"the result will not be that of {steps} steps at once, because earlier steps had another learning "
            "rate (a new run with --schedule constant would keep it)"
        )
        print(f"note: --steps was {before}, is {steps}: {result}; evaluations come at other steps", file=sys.stderr)
    return {**current, "steps": steps, "as_at_once": as_at_once}


def _begin(settings: Settings, dataset: data.Dataset, saved: dict[str, Tensor] | None) -> tuple[Training, Log]:
    model = make_network(settings, dataset.features, dataset.classes)
    what = "layers" if settings.kind == "mlp" else "time steps"
    parameters = parameter_count(settings, dataset.features, dataset.classes)
    print(
        f"{settings.kind} of {settings.depth:,} {what}, width {settings.width}, {settings.activation}, filter "
        f"{settings.filter}: {parameters:,} parameters; {dataset.name}: {len(dataset.x_train)} training and "
        f"{len(dataset.x_test)} test samples",
        flush=True,
    )
    training = Training(
        model,
        dataset,
        settings.steps,
        settings.batch,
        settings.lr,
        settings.seed,
        betas=ADAM_BETAS,
        label_smoothing=LABEL_SMOOTHING,
        schedule=settings.schedule,
    )
    if saved is None:
        return training, Log()
    training.restore(saved)
    return training, Log.of(saved)


def _saver(folder: Path | None, current: dict) -> Callable[[Training, Log], None] | None:
    """The function that writes a checkpoint; None without a folder."""
    if folder is None:
        return None
    described = torch.tensor(list(json.dumps(current).encode()), dtype=torch.uint8)

    def save(training: Training, log: Log) -> None:
        checkpoints.write(folder, training.done, {**training.state(), **log.state(), "configuration": described})

    return save


def _work(settings: Settings, training: Training, log: Log, save: Callable[[Training, Log], None] | None) -> None:
    """Make the remaining steps, with evaluations and checkpoints; the last step gets both."""
    # The states of the whole test set's sequences would take many times the memory of a step.
    evaluate_at_once = settings.batch if settings.kind == "rnn" else None

    def evaluate() -> None:
        log.test_accuracy.append((training.done, accuracy(training.model, training.dataset, evaluate_at_once)))

    evaluate_after = evaluation_steps(settings.steps)
    device = training.dataset.x_train.device
    # The last evaluation is missing if a resumed run is to end at the step that it had already reached.
    if training.done in (0, settings.steps) and training.done not in dict(log.test_accuracy):
        evaluate()
    title = f"train from {training.done}" if training.done else "train"
    with progress(title, settings.steps - training.done) as bar:
        while training.done < settings.steps:
            start = machine.now(device)
            log.loss.append(training.step())
            if not math.isfinite(log.loss[-1]):
                # Stop before this state replaces a good checkpoint.
                raise ArithmeticError(f"the loss is {log.loss[-1]} at step {training.done}: give a smaller --lr")
            milliseconds = (machine.now(device) - start) * 1e3
            if training.done in evaluate_after:
                evaluate()
            if save is not None and (training.done % settings.every == 0 or training.done == settings.steps):
                save(training, log)
            bar.advance(
                f"loss {log.loss[-1]:.3f}  test accuracy {log.test_accuracy[-1][1]:.1%}  {milliseconds:.0f} ms/step"
            )


def _write(out: Path, model: nn.Module, log: Log) -> list[Path]:
    metrics, weights = out / "metrics.csv", out / "model.pt"
    write_atomically(metrics, log.write_csv)
    on_cpu = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    write_atomically(weights, lambda file: torch.save(on_cpu, file), binary=True)
    return [metrics, weights]


def _way_on(folder: Path | None) -> str:
    if folder is None:
        return "Without --checkpoint nothing was kept"
    steps = checkpoints.steps_in(folder)
    return f"--resume continues after step {steps[-1]}" if steps else f"No checkpoint in {folder} yet"
