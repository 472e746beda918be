"""How often the profiler's verdict names a fault in the right layer, is silent on healthy models, and mends.

Three experiments, each on the training half of models and seeds (on which thresholds were fixed) or on the held-out
half (the published figures):

- detection: each of twelve faults in every model that can have it, at three layers, with five seeds. A fault is named
  if a finding of its kind begins within one layer of the faulty one.
- healthy: models without a fault, untrained, after 30 and after 150 steps, with SGD and with Adam, also in 16 bits. Any
  finding is a false alarm.
- mending: training with the fault, without it, with the change that the verdict proposes, and with a random change of
  another method of the verdict's. The figure is the mean loss of steps 91 to 100; inf if it is not finite. A fault
  counts as mended in a model if the median over the seeds is below that of the random other change, and closes at least
  half of the gap between the faulty and the healthy model.

A run adds its rows to the file and leaves out what the file has, so it can go on after an interruption:

    python -m lcw_ops.bench.verdict.run --half "held out" --experiment detection --fault vanishing --out CSV
"""

import argparse
import csv
import datetime
import math
import random
import statistics
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import lcw_ops
from lcw_ops.bench import runner
from lcw_ops.bench.verdict.faults import FAULTS, places
from lcw_ops.bench.verdict.models import FAMILIES, SEEDS, Subject, batches, build
from lcw_ops.profile import Profile, Verdict, profile
from lcw_ops.profile.remedies import remedy
from lcw_ops.profile.verdict import KINDS, Range

STEPS = 100
# The loss after training is a mean over this many steps: one batch's is noisy.
LAST = 10
HEALTHY_STEPS = (0, 30, 150)


@dataclass
class Row:
    """One line of the file. Which fields apply depends on the experiment; others are empty.

    layer: the index of the faulty layer. named: whether a finding of the right kind begins within one layer of it.
    found: all findings as kind@layer, in their order. treatment, change, loss: of the experiment "mending".
    """

    date: str
    commit: str
    torch: str
    half: str
    experiment: str
    fault: str
    model: str
    seed: int
    layer: int | str = ""
    steps: int | str = ""
    optimizer: str = ""
    named: bool | str = ""
    found: str = ""
    treatment: str = ""
    change: str = ""
    loss: float | str = ""


def measured(subject: Subject, seed: int, optimizer: str = "sgd") -> Profile:
    x, y = batches(seed, 1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return profile(
            subject.model,
            subject.inputs(x),
            y,
            subject.loss,
            optimizer=subject.optimizer(optimizer),
            jacobian=False,
            repeats=1,
            matmul_rate=1.0,
        )


def layer_of(result: Profile, subject: Subject, row: int) -> int:
    """The index of the layer with weights to which a row belongs: its own, or the last one before it."""
    for before in range(row, -1, -1):
        path = result.modules[before][0]
        if path in subject.layers:
            return subject.layers.index(path)
    return 0


def in_words(result: Profile, subject: Subject, verdict: Verdict) -> str:
    return " ".join(f"{one.kind.replace(' ', '_')}@{layer_of(result, subject, one.first)}" for one in verdict)


def in_half(subject: Subject, seed: int) -> Profile:
    """In float16, with the loss scaled as GradScaler does it: 2^16 to begin with, halved until nothing overflows.

    GradScaler divides the gradients before the step; here the optimizer's rate is divided.
    """
    subject.model.half()
    subject.dtype, subject.loss_scale = torch.float16, 2.0**16
    while (result := measured(subject, seed)).not_finite is not None and subject.loss_scale > 1:
        subject.loss_scale /= 2
    return result


def faulty(half: str, family: str, seed: int, fault: str, index: int) -> Subject:
    subject = build(half, family, seed)
    with torch.no_grad():
        FAULTS[fault].inject(subject, index)
    return subject


def suitable(half: str, fault: str) -> list[str]:
    """The models that can have the fault. They have 16 bits already, or get them from the fault."""
    trait = FAULTS[fault].trait
    return [name for name in FAMILIES[half] if not trait or trait in build(half, name, 0).traits]


def train(
    subject: Subject, seed: int, steps: int, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None = None
) -> float:
    """The mean loss of the last steps."""
    model, losses = model or subject.model, []
    for x, y in batches(seed, steps):
        optimizer.zero_grad()
        loss = subject.loss(model(subject.inputs(x)), y)
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
        losses.append(loss.item() / subject.loss_scale)
    last = statistics.fmean(losses[-LAST:])
    return last if math.isfinite(last) else math.inf


# ---- Experiments ----------------------------------------------------------------------------------------------------


def detection(half: str, fault: str, family: str) -> Iterator[dict]:
    for seed in SEEDS[half]:
        for index in places(build(half, family, seed), fault):
            subject = faulty(half, family, seed, fault, index)
            result = measured(subject, seed)
            verdict = result.verdict()
            right = [one for one in verdict if one.kind == FAULTS[fault].kind]
            named = any(abs(layer_of(result, subject, one.first) - index) <= 1 for one in right)
            found = in_words(result, subject, verdict)
            yield {"model": family, "seed": seed, "layer": index, "named": named, "found": found}


def healthy(half: str, _: str, family: str) -> Iterator[dict]:
    for seed in SEEDS[half]:
        for optimizer in ("sgd", "adam"):
            for steps in HEALTHY_STEPS:
                subject = build(half, family, seed)
                loss = train(subject, seed, steps, subject.optimizer(optimizer)) if steps else math.nan
                given = {"model": family, "seed": seed, "steps": steps, "optimizer": optimizer, "loss": loss}
                result = measured(subject, seed, optimizer)
                yield {**given, "found": in_words(result, subject, result.verdict())}
                if steps and "homogeneous" in subject.traits and optimizer == "sgd":
                    result = in_half(subject, seed)
                    found = in_words(result, subject, result.verdict())
                    yield {**given, "model": f"{family}, float16", "found": found}


def other_changes(result: Profile, found: Range, own: str) -> list[str]:
    """The lines of other methods that the verdict would propose for other kinds at the same rows."""
    lines = dict(reversed(remedy(result, kind, found)) for kind in KINDS)
    return sorted(line for line, method in lines.items() if line and method != lines.get(own))


def treated(subject: Subject, seed: int, change: str) -> float:
    """The loss after training with a change; inf if the change or the training raises."""
    x, _y = batches(seed, 1)[0]
    names = {
        "model": subject.model,
        "inputs": subject.inputs(x),
        "optimizer": subject.optimizer(),
        "torch": torch,
        "lcw_ops": lcw_ops,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            exec(change, names)
            subject.dtype = names["inputs"].dtype
            return train(subject, seed, STEPS, names["optimizer"], names["model"])
        except (ValueError, TypeError, RuntimeError, AttributeError):
            return math.inf


def mending(half: str, fault: str, family: str) -> Iterator[dict]:
    """The middle layer; for faults that matter only in many layers, the first."""
    for seed in SEEDS[half]:
        where = places(build(half, family, seed), fault)
        index = where[0] if fault in ("rate x 100", "rate / 1000", "frozen") else where[len(where) // 2]

        def sick(seed=seed, index=index) -> Subject:
            return faulty(half, family, seed, fault, index)

        whole, subject = build(half, family, seed), sick()
        result = measured(subject, seed)
        of_kind = [one for one in result.verdict() if one.kind == FAULTS[fault].kind]
        change = of_kind[0].change if of_kind else ""
        place = Range(of_kind[0].first, of_kind[0].last, of_kind[0].figure) if of_kind else Range(0, 0, 1.0)
        # random.Random: the same choice on every machine.
        other = random.Random(seed).choice(other_changes(result, place, change))
        given = {"model": family, "seed": seed, "layer": index}
        yield {**given, "treatment": "healthy", "loss": train(whole, seed, STEPS, whole.optimizer())}
        for treatment, line in {"none": "", "proposed": change, "random other": other}.items():
            yield {**given, "treatment": treatment, "change": line, "loss": treated(sick(), seed, line)}


# Trainings take long: the first models that can have a fault.
MENDED_MODELS = 2


def parts(half: str, experiment: str) -> list[tuple[str, str]]:
    """(fault, model) of an experiment; the fault is "" for healthy models."""
    if experiment == "healthy":
        return [("", family) for family in FAMILIES[half]]
    most = MENDED_MODELS if experiment == "mending" else None
    return [(fault, family) for fault in FAULTS for family in suitable(half, fault)[:most]]


EXPERIMENTS = {"detection": detection, "healthy": healthy, "mending": mending}


# ---- Tables ---------------------------------------------------------------------------------------------------------


def tables(rows: list[dict]) -> str:
    """The confusion table, false alarms and mending of each half in the file."""
    lines = []
    for half in FAMILIES:
        of_half = [row for row in rows if row["half"] == half]
        lines += [f"## {half}", "", *_detection(of_half), "", *_healthy(of_half), "", *_mending(of_half), ""]
    return "\n".join(lines)


def _detection(rows: list[dict]) -> list[str]:
    rows = [row for row in rows if row["experiment"] == "detection"]
    lines = [
        "| fault | profiles | named in the right layer | named first | kinds found beside it |",
        "|---|---|---|---|---|",
    ]
    total = right = 0
    for fault, of_kind in FAULTS.items():
        of_fault = [row for row in rows if row["fault"] == fault]
        if not of_fault:
            continue
        kind = of_kind.kind.replace(" ", "_")
        named = sum(row["named"] == "True" for row in of_fault)
        first = sum(row["found"].partition("@")[0] == kind for row in of_fault)
        beside: dict[str, int] = {}
        for row in of_fault:
            for other in {one.partition("@")[0] for one in row["found"].split()} - {kind}:
                beside[other] = beside.get(other, 0) + 1
        words = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(beside.items()))
        lines.append(f"| {fault} | {len(of_fault)} | {named} | {first} | {words or 'none'} |")
        total, right = total + len(of_fault), right + named
    if total:
        lines.append(f"| all | {total} | {right} ({right / total:.1%}) | | |")
    return lines


def _healthy(rows: list[dict]) -> list[str]:
    rows = [row for row in rows if row["experiment"] == "healthy"]
    alarms = [row for row in rows if row["found"]]
    if not rows:
        return []
    lines = [f"{len(rows)} healthy profiles, {len(alarms)} with a false alarm ({len(alarms) / len(rows):.1%})."]
    return lines + [f"- {row['model']}, {row['steps']} steps of {row['optimizer']}: {row['found']}" for row in alarms]


def _mending(rows: list[dict]) -> list[str]:
    rows = [row for row in rows if row["experiment"] == "mending"]
    lines = [
        "| fault | model | healthy | faulty | proposed change | random other | better than the other | mended |",
        "|---|---|---|---|---|---|---|---|",
    ]
    mended = 0
    for fault in FAULTS:
        verdicts = []
        for model in dict.fromkeys(row["model"] for row in rows if row["fault"] == fault):
            losses: dict[str, dict[str, float]] = {}
            for row in rows:
                if row["fault"] == fault and row["model"] == model:
                    losses.setdefault(row["treatment"], {})[row["seed"]] = float(row["loss"])
            medians = {treatment: statistics.median(of.values()) for treatment, of in losses.items()}
            wins = sum(losses["proposed"][seed] < losses["random other"][seed] for seed in losses["proposed"])
            closes = medians["proposed"] <= _half_way(medians["healthy"], medians["none"])
            verdicts.append(closes and medians["proposed"] < medians["random other"])
            figures = " | ".join(f"{medians[name]:.3f}" for name in ("healthy", "none", "proposed", "random other"))
            worse = ", worse than none" if medians["proposed"] > medians["none"] else ""
            words = f"{'yes' if verdicts[-1] else 'no'}{worse}"
            lines.append(f"| {fault} | {model} | {figures} | {wins} of {len(losses['proposed'])} | {words} |")
        mended += bool(verdicts) and all(verdicts)
    return [*lines, "", f"Mended in all their models: {mended} of {len(FAULTS)} faults."] if len(lines) > 2 else []


def _half_way(healthy_loss: float, faulty_loss: float) -> float:
    """The loss that closes half of the gap; a loss that is not finite counts as that of guessing, ln 10."""
    return (healthy_loss + min(faulty_loss, math.log(10))) / 2


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--half", choices=[*FAMILIES], help="default: both")
    parser.add_argument("--experiment", choices=[*EXPERIMENTS], help="default: all")
    parser.add_argument("--fault", choices=[*FAULTS], help="default: all")
    parser.add_argument("--model", help="default: all that can have the fault")
    parser.add_argument("--out", type=Path, required=True, metavar="CSV", help="rows are added to this file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    done = {(row["half"], row["experiment"], row["fault"], row["model"]) for row in rows}
    commit = runner._commit()
    for half in [args.half] if args.half else FAMILIES:
        for experiment in [args.experiment] if args.experiment else EXPERIMENTS:
            for fault, family in parts(half, experiment):
                wanted = args.fault in (None, fault) and args.model in (None, family)
                if not wanted or (half, experiment, fault, family) in done:
                    continue
                now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
                found = EXPERIMENTS[experiment](half, fault, family)
                _append(
                    args.out, [Row(now, commit, torch.__version__, half, experiment, fault, **given) for given in found]
                )
    print(tables(list(csv.DictReader(args.out.open())) if args.out.exists() else []))
    return 0


def _append(path: Path, rows: list[Row]) -> None:
    """Add the rows of one experiment, fault and model at once, so that a part in the file is complete."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(map(asdict, rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
