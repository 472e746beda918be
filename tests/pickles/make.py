"""Write the pickles of this folder, which later versions must be able to load: ``python tests/pickles/make.py``.

Users have such files: whole modules, optimizers and results. A pickle names classes by the module they were defined in,
so a class that moves must stay importable from its old module. The files here were written by the version that
``versions`` in results.pt names. Existing files are never written again, since a file of the version under test would
prove nothing: a new class gets a new file.

``<name>.pt`` is written by torch.save, ``<name>.pkl`` by pickle.dump, ``exported.pt2`` by torch.export.save, ``train/``
by the command lcw-ops train.
results.pt holds the results of the objects at the time when they were written.
"""

import contextlib
import copy
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lcw_ops
from lcw_ops import profile
from lcw_ops.cli import main as command

HERE = Path(__file__).parent
RESULTS = HERE / "results.pt"

# The command that wrote train/. It stopped after the first number of steps, and a test continues to the second.
TRAIN = ("train", "--depth", "3", "--width", "3", "--batch", "8", "--every", "2", "--threads", "1")
TRAIN_STEPS = ("4", "6")


def numbers(*shape: int) -> Tensor:
    """Between -1 and 1, and the same on every machine: no library function is involved."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64) * 37 % 101 / 50 - 1).reshape(shape).float()


def modules() -> dict[str, tuple[nn.Module, Tensor]]:
    """Name -> (module, input)."""
    ours = lcw_ops.nn
    orthogonal = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    per_layer = torch.linalg.qr(torch.randn(3, 4, 4, dtype=torch.float64)).Q
    found: dict[str, tuple[nn.Module, Tensor]] = {
        "LCWLinear": (ours.LCWLinear(5, 3), numbers(4, 5)),
        "LCWLinear-basis": (ours.LCWLinear(5, 3, basis=True), numbers(4, 5)),
        "GmPLinear": (ours.GmPLinear(5, 3), numbers(4, 5)),
        "GmPLinear-relu": (ours.GmPLinear(5, 3, "relu", bias=False), numbers(4, 5)),
        "GmPLinear-sign": (ours.GmPLinear(1, 3), numbers(4, 1)),
        "WeightNormLinear": (ours.WeightNormLinear(5, 3), numbers(4, 5)),
        "InputMeanNorm": (ours.InputMeanNorm(3), numbers(4, 3)),
        "OrthogonalFilterRNN": (ours.OrthogonalFilterRNN(2, 4, length=6), numbers(6, 3, 2)),
        "OrthogonalFilterRNN-packed": (
            ours.OrthogonalFilterRNN(2, 4, beta=0.2, bias=False, batch_first=True, filter="permutation"),
            numbers(3, 6, 2),
        ),
        "Sequential": (
            nn.Sequential(ours.GmPLinear(5, 4, "relu"), ours.InputMeanNorm(4), ours.LCWLinear(4, 3), nn.Tanh()),
            numbers(4, 5),
        ),
    }
    for kind in ("haar", "cyclic", "permutation", "identity"):
        found[f"OrthogonalFilterMLP-{kind}"] = (ours.OrthogonalFilterMLP(5, 4, 3, 2, kind), numbers(4, 5))
    options = {"beta": torch.full((3,), 0.25), "alpha": 0.75, "activation": "relu", "segment": 2}
    found["OrthogonalFilterMLP-tensor"] = (ours.OrthogonalFilterMLP(5, 4, 3, 2, orthogonal, **options), numbers(4, 5))
    found["OrthogonalFilterMLP-per-layer"] = (ours.OrthogonalFilterMLP(5, 4, 3, 2, per_layer), numbers(4, 5))
    parallel = ours.OrthogonalFilterMLP(5, 4, 9, 2, solver="parallel", tolerance=1e-9, window=8)
    found["OrthogonalFilterMLP-parallel"] = (parallel, numbers(4, 5))
    # A recorded graph names the functions that it calls by their modules.
    for name in ("OrthogonalFilterMLP-haar", "OrthogonalFilterRNN", "LCWLinear", "WeightNormLinear"):
        found[f"GraphModule-{name}"] = (torch.fx.symbolic_trace(found[name][0]), found[name][1])
    for rank in (1, 2, 3):
        x = numbers(2, 4, *(5, 4, 3)[:rank])
        options = {"in_channels": 4, "out_channels": 2, "kernel_size": 2, "padding": 1, "groups": 2}
        found[f"LCWConv{rank}d"] = (getattr(ours, f"LCWConv{rank}d")(**options), x)
        found[f"LCWConv{rank}d-basis"] = (getattr(ours, f"LCWConv{rank}d")(**options, basis=True), x)
        found[f"GmPConv{rank}d"] = (getattr(ours, f"GmPConv{rank}d")(**options, activation="relu"), x)
        found[f"WeightNormConv{rank}d"] = (getattr(ours, f"WeightNormConv{rank}d")(**options), x)
    return found


def optimizers() -> dict[str, object]:
    """Optimizers after two steps, alone or with the handle that activates their gradients."""

    def stepped(kind: Callable, **options) -> torch.optim.Optimizer:
        parameters = [nn.Parameter(numbers(3, 4)), nn.Parameter(numbers(5) + 2)]
        optimizer = kind(parameters, lr=0.1, **options)
        handle = (
            lcw_ops.activate_gradients(optimizer, "tanh", 0.5, 2.0) if kind.__module__.startswith("torch") else None
        )
        for _ in range(2):
            give_gradients(optimizer)
            optimizer.step()
        optimizer.zero_grad()
        return optimizer if handle is None else (optimizer, handle)

    return {
        "SGD": stepped(lcw_ops.optim.SGD, momentum=0.9),
        "SGD-momentum": stepped(lcw_ops.optim.SGD, momentum=0.9, activate="momentum", gradient_activation="log"),
        "SGD-plain": stepped(lcw_ops.optim.SGD, gradient_activation=None),
        "AdamW": stepped(lcw_ops.optim.AdamW),
        "AdamW-amsgrad": stepped(lcw_ops.optim.AdamW, amsgrad=True, gradient_activation="tanh"),
        "ActivatedGradients": stepped(torch.optim.SGD, momentum=0.9),
    }


def exported() -> tuple[nn.Module, Tensor]:
    """A model, and an input, whose exported program calls the kernels of the CPU by the names of their ops."""
    ours = lcw_ops.nn
    model = nn.Sequential(
        ours.LCWLinear(5, 4),
        ours.GmPLinear(4, 4, "relu"),
        ours.WeightNormLinear(4, 5),
        ours.OrthogonalFilterMLP(5, 4, 3, 2),
    )
    return model.eval(), numbers(4, 5)


def give_gradients(optimizer: torch.optim.Optimizer) -> None:
    for parameter in parameters_of(optimizer):
        parameter.grad = numbers(*parameter.shape) / 10


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def next_step(stored: object) -> list[Tensor]:
    """The parameters after one more step of the optimizer."""
    optimizer = stored[0] if isinstance(stored, tuple) else stored
    give_gradients(optimizer)
    optimizer.step()
    return [parameter.detach().clone() for parameter in parameters_of(optimizer)]


def others() -> dict[str, object]:
    """The other objects that can be pickled; some are made by classes that only the commands use."""
    from lcw_ops.data import Dataset
    from lcw_ops.train.job import FeatureRNN
    from lcw_ops.train.settings import ProfileSettings, TrainSettings

    model = lcw_ops.nn.OrthogonalFilterMLP(5, 4, 12, 2, "permutation", solver="parallel")
    measured = profile.profile(model, numbers(4, 5), repeats=1, matmul_rate=1e9)
    # Only the type of the machine's numbers matters here.
    measured.machine = {"threads": 1}
    return {
        "Profile": measured,
        "GradientHooks": lcw_ops.register_gradient_hook(nn.Linear(2, 2), "log"),
        "BackendError": lcw_ops.BackendError("no such backend"),
        "FeatureRNN": FeatureRNN(4, 6, 2, filter="cyclic", beta=0.2),
        "Dataset": Dataset("numbers", numbers(4, 2), torch.arange(4) % 2, numbers(2, 2), torch.arange(2), 2),
        "TrainSettings": TrainSettings(depth=7, schedule="constant"),
        "ProfileSettings": ProfileSettings(solver="parallel", window=9),
    }


def apply(module: nn.Module, x: Tensor) -> Tensor:
    """One tensor with all that the module returns: in training, then in eval mode without gradients."""
    if isinstance(module, lcw_ops.nn.OrthogonalFilterRNN) and module.batch_first:
        lengths = torch.tensor([6, 4, 1])
        x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    found = []
    for training in (True, False):
        with torch.set_grad_enabled(training):
            output = module.train(training)(x)
        parts = output if type(output) is tuple else (output,)
        found += [getattr(part, "data", part).detach().reshape(-1) for part in parts]
    return torch.cat(found)


def train(folder: Path, data: Path, steps: str, *more: str) -> int:
    """Run lcw-ops train up to this number of steps, and return its exit code."""
    before = torch.get_num_threads()
    where = ("--data", str(data), "--checkpoint", str(folder / "checkpoints"), "--out", str(folder / "out"))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return command([*TRAIN, *where, "--steps", steps, *more])
    finally:
        torch.set_num_threads(before)


def losses_of(folder: Path) -> list[float]:
    """The loss of every step, from the file that lcw-ops train has written."""
    rows = (folder / "out" / "metrics.csv").read_text().splitlines()[2:]
    return [float(row.split(",")[1]) for row in rows]


def write() -> None:
    """Write every file that is not there yet, and add its results."""
    torch.manual_seed(0)
    results = torch.load(RESULTS, weights_only=True) if RESULTS.exists() else {}
    with lcw_ops.use_backend("reference"):
        for name, (module, x) in modules().items():
            path = HERE / f"{name}.pt"
            if not path.exists():
                torch.save(module, path)
                exact = apply(copy.deepcopy(module).double(), x.double())
                results[name] = {"x": x, "eager": apply(module, x), "exact": exact}
        for name, stored in optimizers().items():
            path = HERE / f"{name}.pkl"
            if not path.exists():
                path.write_bytes(pickle.dumps(stored))
                results[name] = {"parameters": next_step(stored)}
        for name, stored in others().items():
            path = HERE / f"{name}.pkl"
            if not path.exists():
                path.write_bytes(pickle.dumps(stored))
                if name == "FeatureRNN":
                    results[name] = {"output": stored(numbers(3, 5)).detach()}
                if name == "Profile":
                    columns = {key: column.tolist() for key, column in stored.columns.items()}
                    results[name] = {"loss": stored.loss, "columns": columns, "summary": sorted(stored.summary())}
    program = HERE / "exported.pt2"
    if not program.exists():
        model, x = exported()
        with torch.no_grad():
            with lcw_ops.use_backend("cpp"):
                torch.export.save(torch.export.export(model, (x,)), program)
            with lcw_ops.use_backend("reference"):
                exact = copy.deepcopy(model).double()(x.double())
                results["exported"] = {"x": x, "eager": model(x), "exact": exact}
    folder = HERE / "train"
    if not folder.exists():
        folder.mkdir()
        # The order in which a machine adds whole numbers makes no difference.
        x = (np.arange(300) * 37 % 101).reshape(60, 5) - 50
        np.savez(folder / "data.npz", x=x, y=np.arange(60) % 3)
        first, last = TRAIN_STEPS
        assert train(folder, folder / "data.npz", first) == 0
        kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert train(folder, folder / "data.npz", last, "--resume") == 0
        results["train"] = {"losses": losses_of(folder)}
        # Restore the folder as it was after the first number of steps.
        for path in list(folder.rglob("*")):
            if path.is_file():
                path.unlink()
        for path, content in kept.items():
            if not path.name.startswith("."):
                path.write_bytes(content)
    results.setdefault("versions", {"lcw_ops": lcw_ops.__version__, "torch": str(torch.__version__)})
    torch.save(results, RESULTS)


if __name__ == "__main__":
    write()
    sys.exit(0)
