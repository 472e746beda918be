"""The statements of the five papers, each with a verdict that is computed from the rows of the experiments.

A statement about two methods *holds* if the median over the seeds of ours is better and the two ranges do not overlap,
*does not hold* if it is the other way round, and is *undecided* otherwise. For six seeds the range from the smallest to
the largest figure is an interval of 97 % confidence for the median. A statement that these experiments cannot decide is
*unknown*, with what would decide it.
"""

import csv
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

HOLDS, FAILS, UNDECIDED, UNKNOWN = "holds", "does not hold", "undecided", "unknown"


@dataclass(frozen=True)
class Sample:
    """The figures of one method over the seeds."""

    name: str
    figures: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.figures)

    def __str__(self) -> str:
        text = f"{self.name} {self.median:.3g}"
        return f"{text} ({min(self.figures):.3g} to {max(self.figures):.3g})" if len(self.figures) > 1 else text


@dataclass(frozen=True)
class Outcome:
    verdict: str
    ours: str = ""
    peer: str = ""
    note: str = ""


class Rows:
    """The rows of one experiment's file. Raises LookupError if the file or a figure is missing."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.path = folder / f"reproduce-{stem}.csv"
        if not self.path.is_file():
            raise LookupError(f"{self.path.name} is missing")
        with self.path.open(newline="") as file:
            self.rows = list(csv.DictReader(file))

    def sample(self, figure: str = "figure", **wanted: str) -> Sample:
        """The figures of the rows whose method equals, and whose other cells begin with, the values of ``wanted``."""
        method = wanted.pop("method", None)
        found = [row for row in self.rows if all(row[name].startswith(text) for name, text in wanted.items())]
        found = [row for row in found if method in (None, row["method"])]
        if not found:
            raise LookupError(f"{self.path.name} has no row of {method} with {wanted}")
        return Sample(found[0].get("method") or found[0]["network"], [float(row[figure]) for row in found])

    def best(self, methods: list[str], is_larger_better: bool, **wanted: str) -> Sample:
        """The method with the best median."""
        samples = [self.sample(method=method, **wanted) for method in methods]
        return (max if is_larger_better else min)(samples, key=lambda sample: sample.median)


def _first(found: Iterable, name: str):
    """The first one; LookupError if there is none."""
    for one in found:
        return one
    raise LookupError(f"there is no row of {name}")


def compare(ours: Sample, peer: Sample, is_larger_better: bool, note: str = "") -> Outcome:
    better, worse = (ours, peer) if is_larger_better else (peer, ours)
    if min(better.figures) > max(worse.figures):
        verdict = HOLDS
    elif max(better.figures) < min(worse.figures):
        verdict = FAILS
    else:
        verdict = UNDECIDED
    return Outcome(verdict, str(ours), str(peer), note)


# ---- LCW ------------------------------------------------------------------------------------------------------------

BATCH_NORM_KINDS = ("5 ReLU layers", "4 convolutions")


def shift_exists(folder: Path) -> Outcome:
    rows = Rows(folder, "lcw")
    samples = [
        rows.sample(experiment="shift", setting=kind, method="plain", measure="shift") for kind in BATCH_NORM_KINDS
    ]
    verdict = HOLDS if all(min(sample.figures) > 0.1 for sample in samples) else FAILS
    shown = "; ".join(f"{kind}: {sample}" for kind, sample in zip(BATCH_NORM_KINDS, samples, strict=True))
    return Outcome(verdict, shown, note="shift over deviation, more than 0.1 in every net")


def _both_kinds(outcomes: list[Outcome], note: str) -> Outcome:
    verdicts = {outcome.verdict for outcome in outcomes}
    verdict = verdicts.pop() if len(verdicts) == 1 else UNDECIDED
    return Outcome(verdict, "; ".join(o.ours for o in outcomes), "; ".join(o.peer for o in outcomes), note)


def shift_is_reduced(folder: Path) -> Outcome:
    rows = Rows(folder, "lcw")
    outcomes = []
    for kind in BATCH_NORM_KINDS:
        wanted = {"experiment": "shift", "setting": kind, "measure": "shift"}
        outcomes.append(compare(rows.sample(method="LCW", **wanted), rows.sample(method="plain", **wanted), False))
    return _both_kinds(outcomes, "shift over deviation in a perceptron; in a convolutional net")


def gradient_survives(folder: Path) -> Outcome:
    rows = Rows(folder, "lcw")
    wanted = {"experiment": "shift", "setting": "100 sigmoid", "measure": "gradient variance"}
    peers = [rows.sample(method=method, **wanted) for method in ("plain, Glorot", "plain, same variance")]
    peer = max(peers, key=lambda sample: sample.median)
    return compare(rows.sample(method="LCW", **wanted), peer, True, "variance of the gradient, first layer over last")


def sigmoid_trains(folder: Path) -> Outcome:
    rows = Rows(folder, "lcw")
    wanted = {"experiment": "sigmoid", "measure": "test accuracy"}
    peer = rows.best(["plain, Glorot", "plain, same variance"], True, **wanted)
    return compare(rows.sample(method="LCW", **wanted), peer, True, "test accuracy, 100 layers, digits of 8 x 8")


def generalises(kind: str) -> Callable[[Path], Outcome]:
    def decide(folder: Path) -> Outcome:
        rows = Rows(folder, "lcw")
        outcomes = []
        for share in ("10%", "100%"):
            wanted = {"experiment": "batch norm", "setting": f"{kind}, {share}", "measure": "test accuracy"}
            outcomes.append(compare(rows.sample(method="LCW", **wanted), rows.sample(method="plain", **wanted), True))
        return _both_kinds(outcomes, "test accuracy with batch norm, on a tenth of the images; on all")

    return decide


# ---- GmP ------------------------------------------------------------------------------------------------------------


def unknown(note: str) -> Callable[[Path], Outcome]:
    return lambda folder: Outcome(UNKNOWN, note=note)


def tested(note: str) -> Callable[[Path], Outcome]:
    """A statement of mathematics, which tests check."""
    return lambda folder: Outcome(HOLDS, note=note)


def gmp_learns_better(folder: Path) -> Outcome:
    rows = Rows(folder, "hypersphere")
    outcomes = []
    for name, is_larger_better in (("1-D Levy", False), ("2-D banana", True)):
        peer = rows.best(["plain", "weight norm", "batch norm"], is_larger_better, experiment=name)
        outcomes.append(compare(rows.sample(method="GmP", experiment=name), peer, is_larger_better))
    return _both_kinds(outcomes, "Levy function, RMSE; bananas, accuracy. ResNet-50 on ImageNet is out of reach here")


def gmp_with_larger_rate(folder: Path) -> Outcome:
    rows = Rows(folder, "hypersphere")
    outcomes = []
    for name, is_larger_better in (("1-D Levy", False), ("2-D banana", True)):
        ours = rows.sample(method="GmP", experiment=name)
        peer = rows.sample(method="plain, GmP's learning rate", experiment=name)
        outcomes.append(compare(ours, peer, is_larger_better))
    return _both_kinds(outcomes, "at Adam's rate 0.1, ten times the others'. Levy function, RMSE; bananas, accuracy")


# ---- GAF ------------------------------------------------------------------------------------------------------------


def gaf_converges_faster(folder: Path) -> Outcome:
    rows = Rows(folder, "gradient-activation")
    ours, peers = [], []
    for curvature in ("mu 1", "mu 0.1", "mu 0.01"):
        of_saddle = [row for row in rows.rows if row["experiment"] == "saddle" and row["setting"] == curvature]
        steps = {row["method"]: float(row["figure"]) for row in of_saddle}
        ours.append(steps["activated gradient"])
        peers.append(min(steps["plain"], steps["plain, rate K"]))
    verdict = HOLDS if all(a < b for a, b in zip(ours, peers, strict=True)) else FAILS
    note = "steps to leave a saddle. It halves them, and so does the plain optimizer with the rate times K"
    return Outcome(verdict, " ".join(f"{a:.0f}" for a in ours), " ".join(f"{b:.0f}" for b in peers), note)


def gaf_trains_deep_nets(setting: str, note: str) -> Callable[[Path], Outcome]:
    def decide(folder: Path) -> Outcome:
        rows = Rows(folder, "gradient-activation")
        wanted = {"experiment": "digits", "setting": setting, "measure": "test accuracy"}
        # A prefix would find "plain, rate K" too, so the plain methods are told apart by their whole names.
        samples = {}
        for row in rows.rows:
            if all(row[name].startswith(text) for name, text in wanted.items()):
                samples.setdefault(row["method"], []).append(float(row["figure"]))
        if not samples:
            raise LookupError(f"{rows.path.name} has no row with {wanted}")
        ranked = sorted((Sample(*item) for item in samples.items()), key=lambda sample: -sample.median)
        ours = _first((sample for sample in ranked if sample.name.startswith("activated")), "activated gradients")
        peer = _first((sample for sample in ranked if sample.name.startswith("plain")), "plain optimizers")
        return compare(ours, peer, True, note)

    return decide


# ---- LPS ------------------------------------------------------------------------------------------------------------


def fewer_dead_nets(folder: Path) -> Outcome:
    rows = Rows(folder, "lps").rows
    share: dict[tuple[str, str], tuple[float, float]] = {}
    for row in rows:
        if row["experiment"] == "dying":
            share[row["setting"], row["method"]] = (float(row["figure"]), float(row["standard_error"]))
    anchored = _first((method for _, method in share if "anchored" in method), "anchored")
    he = _first((method for _, method in share if method == "He"), "He")
    settings = list(dict.fromkeys(setting for setting, _ in share))
    wins = losses = 0
    for setting in settings:
        (a, a_error), (b, b_error) = share[setting, anchored], share[setting, he]
        far = abs(a - b) > 2 * math.hypot(a_error, b_error)
        wins, losses = wins + (far and a < b), losses + (far and a > b)
    verdict = FAILS if losses else HOLDS if wins > len(settings) / 2 else UNDECIDED
    note = (
        "rule anchored against He's, share of dead nets. The rules joint and heavy tail are as He's, and RAI has fewer"
    )
    return Outcome(verdict, f"fewer in {wins} of {len(settings)} sizes", f"fewer in {losses}", note)


def lps_trains(folder: Path) -> Outcome:
    rows = Rows(folder, "lps")
    outcomes = []
    for setting in ("10 layers", "4 convolutions"):
        samples: dict[str, list[float]] = {}
        for row in rows.rows:
            if row["setting"].startswith(setting) and row["measure"] == "test accuracy":
                samples.setdefault(row["method"], []).append(float(row["figure"]))
        ranked = sorted((Sample(*item) for item in samples.items()), key=lambda sample: -sample.median)
        ours = _first((sample for sample in ranked if sample.name.startswith("LPS")), "LPS")
        peer = _first((sample for sample in ranked if not sample.name.startswith("LPS")), "another rule")
        outcomes.append(compare(ours, peer, True))
    return _both_kinds(
        outcomes, "test accuracy of a narrow perceptron; of a convolutional net. The peer is the best rule"
    )


# ---- ROAF -----------------------------------------------------------------------------------------------------------

OURS = "orthogonal filter"
FILTERED = "orthogonal filter, c = 1"


def isometry(folder: Path) -> Outcome:
    rows = Rows(folder, "orthogonal-filter")
    smallest, largest = (
        rows.sample(experiment="isometry", method=FILTERED, measure=f"{end} singular")
        for end in ("smallest", "largest")
    )
    peer = rows.sample(experiment="isometry", method="plain tanh", measure="largest singular")
    spread = max(largest.figures) / min(smallest.figures)
    verdict = HOLDS if spread < 1.1 else FAILS
    note = "singular values over 50,000 layers are close to each other, at exp(-c) and not at 1 (c = 1)"
    shown = f"{min(smallest.figures):.3f} to {max(largest.figures):.3f}"
    return Outcome(verdict, shown, f"plain tanh, largest: {peer.median:.2g}", note)


def gradients_survive(folder: Path) -> Outcome:
    rows = Rows(folder, "orthogonal-filter")
    smallest, largest = (
        rows.sample(experiment="isometry", method=FILTERED, measure=f"{end} gradient")
        for end in ("smallest", "largest")
    )
    low, high = min(smallest.figures), max(largest.figures)
    # exp(-c (1 + s)) and exp(c (s - 1)) for c = 1. The largest singular value s of W is below 2.4 at width 64.
    within = math.exp(-3.4) < low and high < math.exp(1.4)
    note = "norm of the gradient at any of 50,000 layers over that of the last one; the bounds are exp(-3.4), exp(1.4)"
    return Outcome(HOLDS if within else FAILS, f"{low:.3f} to {high:.3f}", note=note)


def deep_net_trains(folder: Path) -> Outcome:
    rows = Rows(folder, "orthogonal-filter")
    wanted = {"experiment": "deep", "measure": "test accuracy"}
    peer = rows.best(["residual", "plain"], True, **wanted)
    note = "test accuracy, 50,000 layers, 50 steps. A residual net with branches of 1 / L trains as well"
    ours = rows.sample(method=OURS, **wanted)
    plain = rows.sample(method="plain", **wanted)
    return Outcome(
        compare(ours, plain, True).verdict, str(ours), f"{plain}; {peer}" if peer != plain else str(plain), note
    )


def remembers(folder: Path) -> Outcome:
    rows = Rows(folder, "orthogonal-filter")
    wanted = {"experiment": "memory", "measure": "test accuracy"}
    peer = rows.best(["LSTM", "plain RNN"], True, **wanted)
    adding = rows.sample(experiment="adding", method=OURS, measure="mean squared error")
    note = f"test accuracy, a digit read 10,000 steps ago. The adding task was not learned: error {adding.median:.3f}"
    if adding.median < 0.5 / 6:
        note = f"test accuracy, a digit read 10,000 steps ago. Adding task: error {adding.median:.3f}, chance 0.167"
    return compare(rows.sample(method=OURS, **wanted), peer, True, note)


def permuted(folder: Path) -> Outcome:
    rows = Rows(folder, "permuted-digits")
    of_network: dict[str, list[float]] = {}
    for row in rows.rows:
        if row["stage"] == "test" and row["epoch"] == row["epochs"]:
            of_network.setdefault(row["network"], []).append(float(row["accuracy"]))
    samples = [Sample(*item) for item in of_network.items()]
    samples.sort(key=lambda sample: -sample.median)
    ours = _first((sample for sample in samples if sample.name == OURS), OURS)
    peer = _first((sample for sample in samples if sample is not ours), "a peer")
    return compare(ours, peer, True, "permuted digits, 4000 training images, equal parameters and steps of training")


@dataclass(frozen=True)
class Claim:
    id: str
    statement: str
    decide: Callable[[Path], Outcome]


CLAIMS = (
    Claim("LCW-1", "a unit's pre-activation has a mean that is not 0", shift_exists),
    Claim("LCW-2", "LCW reduces this activation shift, in fully connected and convolutional layers", shift_is_reduced),
    Claim("LCW-3", "that changes how variance is amplified, forward and backward", gradient_survives),
    Claim("LCW-4", "a deep net with sigmoids trains", sigmoid_trains),
    Claim("LCW-5", "with batch norm it generalises better, fully connected", generalises(BATCH_NORM_KINDS[0])),
    Claim("LCW-6", "with batch norm it generalises better, convolutional", generalises(BATCH_NORM_KINDS[1])),
    Claim(
        "GMP-1",
        "a unit's boundary turns by at most the step of its angles",
        tested("tests/test_hypersphere.py"),
    ),
    Claim("GMP-2", "radius and angles are decoupled", tested("by construction; tests/test_hypersphere.py")),
    Claim("GMP-3", "it works with less careful initialisation", unknown("no experiment yet")),
    Claim("GMP-4", "it works with larger learning rates", gmp_with_larger_rate),
    Claim("GMP-5", "stability, convergence and generalisation are better", gmp_learns_better),
    Claim(
        "GAF-1",
        "tiny gradients are enlarged, large ones restricted",
        tested("by formula; tests/test_gradient_activation_facts.py"),
    ),
    Claim(
        "GAF-2",
        "it eases vanishing gradients",
        gaf_trains_deep_nets("4 sigmoid", "4 sigmoid layers, accuracy; the peer is the best plain rate and decay"),
    ),
    Claim("GAF-3", "SGD converges faster with it", gaf_converges_faster),
    Claim(
        "GAF-4",
        "it improves deep nets",
        gaf_trains_deep_nets("10 tanh", "10 tanh layers, accuracy. CIFAR, ImageNet and VOC are out of reach here"),
    ),
    Claim(
        "LPS-1", "all local minima can be reached", unknown("a theorem; its proof and constants are not known to us")
    ),
    Claim("LPS-2", "fewer ReLU nets are dead", fewer_dead_nets),
    Claim("LPS-3", "feasible, efficient, robust", lps_trains),
    Claim("ROAF-1", "singular values of the Jacobian are tightly around 1", isometry),
    Claim("ROAF-2", "gradients neither vanish nor explode", gradients_survive),
    Claim("ROAF-3", "a perceptron of 50,000 layers trains", deep_net_trains),
    Claim("ROAF-4", "an Elman network learns dependencies over 10,000 steps", remembers),
    Claim("ROAF-5", "simpler and more effective than LSTM-like networks", permuted),
    Claim(
        "ROAF-6",
        "permuted MNIST: over 94 % after one epoch, over 98 % after ten",
        unknown(
            "undecided without the 60,000 images: python -m lcw_ops.bench.reproduce.permuted_digits --data-dir FOLDER"
        ),
    ),
)


def table(folder: Path) -> str:
    """One line of Markdown for each statement."""
    lines = [
        "| statement | claimed | verdict | ours | plain or peer | what was measured |",
        "|---|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        try:
            outcome = claim.decide(folder)
        except LookupError as error:
            outcome = Outcome(UNKNOWN, note=f"not run: {error}")
        cells = (claim.id, claim.statement, f"**{outcome.verdict}**", outcome.ours, outcome.peer, outcome.note)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
