"""The benchmarks: every entry runs, wrong kernels are refused, competitors take turns, rows are well formed."""

import argparse
import contextlib
import csv
import dataclasses
import gc
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import lcw_ops
from lcw_ops.bench import parallel_depth, registry, runner
from lcw_ops.ops.parallel_depth.crossover import Call, Region

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
TWO_SHAPES = [(50,), (3, 7)]
RATES = registry.Rates(memory=1e10, matmul=1e11)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    return parser.parse_args(arguments)


def competitor(name, run, **options) -> registry.Competitor:
    return registry.Competitor(name, lambda inputs: lambda: run(inputs["x"]) or [], **options)


def doubling(*competitors: registry.Competitor) -> registry.Case:
    return registry.Case(
        stem="doubling",
        name="forward",
        shape={"N": 100},
        dtype=torch.float32,
        make_inputs=lambda device: {"x": torch.randn(100, device=device)},
        expected=lambda inputs: [2 * inputs["x"].double()],
        competitors=(*competitors, competitor(registry.EAGER, lambda x: [2 * x])),
        bytes=800,
        operations=100,
    )


@pytest.fixture
def tiny(monkeypatch):
    """Shrink every entry of the registry to milliseconds, and do not measure the machine."""
    from lcw_ops.bench import gradient_activation, hypersphere, lcw_linear, orthogonal_filter, weight_norm

    tiny_cases = {
        "orthogonal_filter": [
            orthogonal_filter._case("cpu", over_time, 20, 3, 8, quick=True, backward=backward)
            for over_time in (False, True)
            for backward in (False, True)
        ],
        "gradient_activation": [
            gradient_activation._in_place("cpu", "two", TWO_SHAPES, kind, dtype, quick=True)
            for kind in ("arctan", "tanh", "log")
            for dtype in (torch.float32, torch.bfloat16)
        ]
        + [gradient_activation._sgd("cpu", "two", TWO_SHAPES, place, quick=True) for place in ("gradient", "momentum")]
        + [gradient_activation._adamw("cpu", "two", TWO_SHAPES, quick=True)],
        "lcw_linear": [
            lcw_linear._linear("cpu", rows, 12, 7, dtype, backward, quick=True)
            for rows in (3, 9)
            for dtype in (torch.float32, torch.bfloat16)
            for backward in (False, True)
        ]
        + [lcw_linear._convolution("cpu", 2, 3, 5, 6, quick=True)],
        "hypersphere": [
            hypersphere._gmp_linear("cpu", rows, 50, 30, dtype, backward, quick=True)
            for rows in (9, 40)
            for dtype in (torch.float32, torch.bfloat16)
            for backward in (False, True)
        ]
        + [hypersphere._directions("cpu", 30, 50, backward, quick=True) for backward in (False, True)]
        + [hypersphere._convolution("cpu", 2, 3, 5, 6, quick=True)],
        "weight_norm": [
            weight_norm._weight_norm_linear("cpu", rows, 50, 30, dtype, backward, quick=True)
            for rows in (9, 40)
            for dtype in (torch.float32, torch.bfloat16)
            for backward in (False, True)
        ]
        + [weight_norm._normalized_rows("cpu", 30, 50, backward, quick=True) for backward in (False, True)],
        "parallel_depth": [
            parallel_depth._case("cpu", over_time, 20, 3, 8, filter, backward, quick=True)
            for over_time, filter, backward in (
                (False, "haar", True),
                (True, "haar", False),
                (False, "cyclic", False),
                (True, "cyclic", True),
            )
        ],
    }
    monkeypatch.setattr(registry, "cases", lambda stem, device_type: tiny_cases[stem])
    monkeypatch.setattr(registry, "measure_rates", lambda device, case: RATES)
    monkeypatch.setattr(runner, "QUICK_SECONDS_PER_CASE", 0.0)


def read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_entry_end_to_end(tiny, tmp_path, capsys):
    out = tmp_path / "rows.csv"
    arguments = parse("--quick", "--device", "cpu", "--out", str(out))
    assert runner.carry_out(runner.prepare(arguments)) == 0
    rows = read(out)
    assert list(rows[0]) == [field.name for field in dataclasses.fields(runner.Row)]
    assert {row["stem"] for row in rows} == set(registry.STEMS)
    for row in rows:
        assert float(row["median_s"]) > 0
        assert float(row["spread_s"]) >= 0
        assert 0 < float(row["best_s"]) <= float(row["median_s"])
        assert float(row["floor_s"]) > 0
        assert int(row["rounds"]) >= runner.MIN_ROUNDS
        assert row["torch"] == torch.__version__
        assert int(row["threads"]) == torch.get_num_threads()
        assert row["commit"]
        assert row["device"]
    printed = capsys.readouterr().out
    for row in rows:
        assert row["competitor"] in printed
    # A second run appends below the same header.
    assert runner.carry_out(runner.prepare(arguments)) == 0
    assert len(read(out)) == 2 * len(rows)


def test_ours_and_eager_in_every_case(tiny):
    for stem in registry.STEMS:
        for case in registry.cases(stem, "cpu"):
            names = [one.name for one in case.competitors]
            assert names.count(registry.EAGER) == 1
            assert len(set(names)) == len(names)
            assert any(one.ours for one in case.competitors)


def test_the_real_registry_has_quick_and_full_cases_for_both_devices():
    for stem in registry.STEMS:
        for device_type in ("cpu", "cuda"):
            assert {case.quick for case in registry.cases(stem, device_type)} == {True, False}


def test_a_requested_backend_is_the_only_competitor_of_ours():
    with lcw_ops.use_backend("reference"):
        for stem in registry.STEMS:
            for case in registry.cases(stem, "cpu"):
                # In a competitor's name the solver follows a comma.
                assert {one.name.split(",")[0] for one in case.competitors if one.ours} == {"lcw_ops (reference)"}


def test_an_explicit_request_that_cannot_be_met_raises_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "measure_rates", lambda device, case: pytest.fail("measured"))
    out = tmp_path / "rows.csv"
    with lcw_ops.use_backend("cuda"), pytest.raises(RuntimeError, match=r"backend 'cuda' was requested, but"):
        runner.carry_out(runner.prepare(parse("--quick", "--device", "cpu", "--out", str(out))))
    assert not out.exists()


def tensors_of(inputs: dict) -> list[torch.Tensor]:
    """Every float tensor of the inputs, including those in lists."""
    return [one for one in tree_leaves(inputs) if isinstance(one, torch.Tensor) and one.is_floating_point()]


def test_inputs_are_fresh_and_not_zero(tiny):
    for stem in registry.STEMS:
        for case in registry.cases(stem, "cpu"):
            first, second = (tensors_of(case.make_inputs(CPU)) for _ in range(2))
            for one, other in zip(first, second, strict=True):
                assert one.abs().min() > 0
                assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: [2.001 * x],
        lambda x: [torch.zeros_like(x)],
        lambda x: [torch.full_like(x, torch.nan)],
        lambda x: [2 * x[:50]],
        lambda x: [],
    ],
    ids=["slightly off", "zeros", "NaN", "half of it", "nothing"],
)
def test_a_wrong_kernel_is_not_timed(wrong, tiny, capsys):
    case = doubling(competitor("wrong", wrong, ours=True))
    rows, refused = runner.run_case(case, CPU, quick=True)
    assert refused
    assert [row.competitor for row in rows] == [registry.EAGER]
    assert "REFUSED" in capsys.readouterr().out


def test_a_wrong_peer_is_left_out_but_is_not_our_failure(tiny, capsys):
    case = doubling(competitor("ours", lambda x: [x + x], ours=True), competitor("peer", lambda x: [3 * x]))
    rows, refused = runner.run_case(case, CPU, quick=True)
    assert not refused
    assert [row.competitor for row in rows] == ["ours", registry.EAGER]
    assert "REFUSED" in capsys.readouterr().out


def test_a_refused_kernel_of_ours_makes_the_exit_code_1(tiny, monkeypatch, tmp_path):
    case = dataclasses.replace(doubling(competitor("wrong", lambda x: [3 * x], ours=True)), quick=True)
    monkeypatch.setattr(registry, "cases", lambda stem, device_type: [case])
    arguments = parse("--quick", "--device", "cpu", "--out", str(tmp_path / "rows.csv"))
    assert runner.carry_out(runner.prepare(arguments)) == 1


def test_a_missing_peer_says_why(tiny, capsys):
    case = doubling(
        competitor("ours", lambda x: [x + x], ours=True),
        competitor("peer", lambda x: [x + x], missing=lambda: "peer is not installed"),
    )
    rows, refused = runner.run_case(case, CPU, quick=True)
    assert not refused
    assert len(rows) == 2
    assert "not run: peer is not installed" in capsys.readouterr().out


def test_competitors_take_turns():
    calls = []
    takes_turns = [competitor(name, lambda x, name=name: calls.append(name)) for name in "AB"]
    runs = {one.name: one.prepare({"x": None}) for one in takes_turns}
    times, _ = runner.interleave(runs, CPU, budget=0.0)
    assert calls == ["A", "B"] * (1 + runner.MIN_ROUNDS)
    assert [len(values) for values in times.values()] == [runner.MIN_ROUNDS] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no benchmark is called 'nothing'; choose from gradient_activation"),
        (["--device", "meta"], "--device is 'meta'; expected one of cpu"),
        (["--threads", "0"], "--threads is 0"),
        *((["--share", share], f"--share is '{share}'; expected K/N") for share in ("0/3", "4/3", "1", "1/0")),
        (["--out", "no/such/folder/rows.csv"], "does not exist"),
        (["--out", "/"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        runner.prepare(parse(*arguments))


def test_shares_hold_every_case_once():
    everything = runner.prepare(parse("hypersphere", "--quick")).cases
    shares = [runner.prepare(parse("hypersphere", "--quick", "--share", f"{k}/3")).cases for k in (1, 2, 3)]
    named = [[(case.name, *case.shape.items()) for case in cases] for cases in (everything, *shares)]
    assert sorted(named[0]) == sorted(named[1] + named[2] + named[3])
    assert min(map(len, shares)) > 0


def test_rows_of_another_kind_are_not_appended_to(tmp_path):
    out = tmp_path / "other.csv"
    out.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has columns a, b"):
        runner.prepare(parse("--out", str(out)))
    assert out.read_text() == "a,b\n1,2\n"


# ---- Floors and noise


class Clock:
    """Scripted measurements: every competitor's seconds per call, in a cycle; the ceilings (memory rates), in order."""

    def __init__(self, monkeypatch, times: dict[str, list[float]], memory: list[float]) -> None:
        self.called, self.measured, self.memory = None, [], list(memory)
        self.times = {name: itertools.cycle(each) for name, each in times.items()}
        self.calls = dict.fromkeys(times, 0)
        monkeypatch.setattr(registry, "seconds", self.seconds)
        monkeypatch.setattr(registry, "measure_rates", self.measure_rates)
        monkeypatch.setattr(registry, "check", lambda case, device, running: {one.name: 1e-8 for one in running})

    def competitor(self, name: str, **options) -> registry.Competitor:
        return competitor(name, lambda x: setattr(self, "called", name), **options)

    def seconds(self, run, device) -> float:
        run()
        self.calls[self.called] += 1
        return next(self.times[self.called])

    def measure_rates(self, device, case) -> registry.Rates:
        self.measured.append(case)
        return registry.Rates(self.memory[min(len(self.measured), len(self.memory)) - 1], math.inf)

    def case(self, *others: registry.Competitor, **changes) -> registry.Case:
        """A case of our kernel and eager torch. Its 800 bytes take 1 s at a ceiling of 800 bytes per second."""
        case = doubling(self.competitor("ours", ours=True), *others)
        competitors = (*case.competitors[:-1], self.competitor(registry.EAGER))
        return dataclasses.replace(case, competitors=competitors, quick=True, **changes)


def printed_rows(capsys) -> dict[str, list[str]]:
    """Name of a competitor -> the words of its row."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    return {line[2:28].strip(): line[28:].split() for line in lines}


def test_a_noisy_row_is_marked_and_has_no_ratio(monkeypatch, tmp_path, capsys):
    times = {"ours": [2.0], registry.EAGER: [1.0, 4.0, 90.0], "calm": [4.0, 5.0, 3.0]}
    clock = Clock(monkeypatch, times, memory=[800.0])
    rows, failed = runner.run_case(clock.case(clock.competitor("calm")), CPU, quick=True)
    assert not failed
    assert {row.competitor: row.noisy for row in rows} == {"ours": False, registry.EAGER: True, "calm": False}
    shown = printed_rows(capsys)
    # The times are followed by the ratio, the shares of the floor and of the peak, the memory with its unit, the error.
    assert shown[registry.EAGER][-6:-4] == ["noisy", "noisy"]
    assert shown["calm"][-6:-4] == ["2.00x", "25.0%"]
    runner.append_rows(tmp_path / "rows.csv", rows)
    assert [row["noisy"] for row in read(tmp_path / "rows.csv")] == ["False", "False", "True"]


def test_nothing_is_compared_with_a_noisy_row_of_ours(monkeypatch, capsys):
    clock = Clock(monkeypatch, {"ours": [2.0, 2.0, 90.0], registry.EAGER: [4.0]}, memory=[800.0])
    rows, failed = runner.run_case(clock.case(), CPU, quick=True)
    assert not failed
    assert [row.noisy for row in rows] == [True, False]
    shown = printed_rows(capsys)
    assert shown["ours"][-6:-4] == ["noisy", "noisy"]
    assert shown[registry.EAGER][-6:-4] == ["noisy", "25.0%"]


@pytest.mark.parametrize(("spread", "noisy"), [(0.0, False), (0.5, False), (0.51, True), (40.0, True)])
def test_the_limit_of_noise(spread, noisy):
    assert registry.is_noisy(1.0, spread) == noisy


def test_a_row_below_its_floor_is_an_error(monkeypatch, tmp_path, capsys):
    clock = Clock(monkeypatch, {"ours": [0.9], registry.EAGER: [2.0]}, memory=[800.0])
    case, out = clock.case(), tmp_path / "rows.csv"
    monkeypatch.setattr(registry, "cases", lambda stem, device_type: [case])
    plan = runner.prepare(parse("lcw_linear", "--quick", "--device", "cpu", "--out", str(out)))
    assert runner.carry_out(plan) == 1
    assert [row["competitor"] for row in read(out)] == [registry.EAGER]
    printed = capsys.readouterr().out
    (error,) = (line for line in printed.splitlines() if "ERROR" in line)
    assert "ours" in error
    assert "900 ms, measured twice, is less than the floor: the ceiling or the case's bytes or operations" in error
    # An impossible time gets no ratio.
    assert "2 s      0 us       2 s        -    50.0%    50.0%" in printed
    # The row was measured twice; the ceiling was measured before, between and after.
    assert len(clock.measured) == 3
    assert clock.calls["ours"] == 2 * (1 + runner.MIN_ROUNDS)


def test_a_ceiling_that_was_low_for_a_moment_is_measured_again(monkeypatch):
    clock = Clock(monkeypatch, {"ours": [0.9], registry.EAGER: [2.0]}, memory=[700.0, 800.0, 1600.0])
    rows, failed = runner.run_case(clock.case(), CPU, quick=True)
    assert not failed
    assert [row.floor_s for row in rows] == [0.5, 0.5]
    assert not any(row.noisy for row in rows)
    assert len(clock.measured) == 3


def test_a_case_whose_ceilings_differ_is_noisy(monkeypatch, tmp_path, capsys):
    times = {"ours": [2.0], registry.EAGER: [2.0]}
    clock = Clock(monkeypatch, times, memory=[800.0, 399.0])
    rows, failed = runner.run_case(clock.case(), CPU, quick=True)
    assert not failed
    assert [row.noisy for row in rows] == [True, True]
    printed = capsys.readouterr().out
    assert "measured beside the case; NOISY: the rates changed by more than 2x meanwhile" in printed
    assert printed.count(" noisy") == 6
    # A factor of two is within the limit.
    rows, _ = runner.run_case(Clock(monkeypatch, times, memory=[800.0, 400.0]).case(), CPU, quick=True)
    assert not any(row.noisy for row in rows)


def test_a_floor_of_an_unsteady_machine_makes_no_error(monkeypatch):
    """The ceilings differ in both measurements of the case, so the floor says nothing about the row."""
    clock = Clock(monkeypatch, {"ours": [0.9], registry.EAGER: [2.0]}, memory=[80.0, 800.0, 350.0])
    rows, failed = runner.run_case(clock.case(), CPU, quick=True)
    assert not failed
    assert [(row.competitor, row.noisy) for row in rows] == [("ours", True), (registry.EAGER, True)]
    assert len(clock.measured) == 3


def test_a_wrong_first_ceiling_costs_a_measurement_and_no_row(monkeypatch):
    clock = Clock(monkeypatch, {"ours": [0.9], registry.EAGER: [2.0]}, memory=[0.4, 0.4, 800.0, 800.0])
    rows, failed = runner.run_case(clock.case(), CPU, quick=True)
    assert not failed
    assert {row.noisy for row in rows} == {True}


@pytest.mark.parametrize(
    ("other", "far"), [((2e10, 1e11), False), ((2.1e10, 1e11), True), ((1e10, 4.9e10), True), ((1e10, math.inf), True)]
)
def test_how_far_rates_may_differ(other, far):
    other = registry.Rates(*other)
    assert RATES.is_far_from(other) == other.is_far_from(RATES) == far
    assert not registry.Rates(1e10, math.inf).is_far_from(registry.Rates(1e10, math.inf))


@pytest.mark.parametrize(
    ("rate", "shown"), [(4.2e7, "0.042 G"), (8e3, "8e-06 G"), (6.82e10, "68.2 G"), (4.1234e12, "4123 G")]
)
def test_a_small_rate_is_not_shown_as_zero(rate, shown):
    assert runner._giga(rate) == shown
    assert runner._ceilings(registry.Rates(rate, rate)).count(shown) == 2


def test_another_function_may_be_faster_than_the_floor(monkeypatch):
    clock = Clock(monkeypatch, {"ours": [2.0], registry.EAGER: [2.0], "copy": [0.5]}, memory=[800.0])
    rows, failed = runner.run_case(clock.case(clock.competitor("copy", checked=False)), CPU, quick=True)
    assert not failed
    assert {row.competitor for row in rows} == {"ours", "copy", registry.EAGER}
    assert len(clock.measured) == 2


def test_every_case_has_the_ceiling_of_its_own_moment(monkeypatch, tmp_path):
    """The machine is half as fast in the second case. The better of the ceilings before and after a case counts."""
    clock = Clock(monkeypatch, {"ours": [2.0], registry.EAGER: [3.0]}, memory=[799.0, 800.0, 400.0, 399.0])
    cases = [clock.case(name="first"), clock.case(name="second")]
    monkeypatch.setattr(registry, "cases", lambda stem, device_type: cases)
    out = tmp_path / "rows.csv"
    plan = runner.prepare(parse("lcw_linear", "--quick", "--device", "cpu", "--out", str(out)))
    assert runner.carry_out(plan) == 0
    assert clock.measured == [cases[0], cases[0], cases[1], cases[1]]
    floors = {row["case"]: float(row["floor_s"]) for row in read(out)}
    assert floors == {"first": 1.0, "second": 2.0}


def test_a_file_of_unmarked_rows_is_marked_and_appended_to(monkeypatch, tmp_path):
    clock = Clock(monkeypatch, {"ours": [2.0], registry.EAGER: [3.0]}, memory=[800.0])
    case, out = clock.case(), tmp_path / "rows.csv"
    older = [
        dict.fromkeys(runner.UNMARKED_COLUMNS, "x, y") | {"median_s": "0.50", "spread_s": spread}
        for spread in ("0.25", "0.26")
    ]
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, runner.UNMARKED_COLUMNS)
        writer.writeheader()
        writer.writerows(older)
    monkeypatch.setattr(registry, "cases", lambda stem, device_type: [case])
    arguments = parse("lcw_linear", "--quick", "--device", "cpu", "--out", str(out))
    assert runner.carry_out(runner.prepare(arguments)) == 0
    rows = read(out)
    empty = {"peak_floor_s": "", "memory_bytes": "", "overhead_s": ""}
    assert rows[:2] == [older[0] | {"noisy": "False"} | empty, older[1] | {"noisy": "True"} | empty]
    assert [row["competitor"] for row in rows[2:]] == ["ours", registry.EAGER]
    assert runner.carry_out(runner.prepare(arguments)) == 0
    assert read(out)[:4] == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_rows_without_an_overhead_keep_their_figures(tmp_path):
    out = tmp_path / "rows.csv"
    row = dict.fromkeys(runner.MEMORY_COLUMNS, "7") | {"noisy": "True"}
    with out.open("w", newline="") as file:
        runner.write_rows(file, runner.MEMORY_COLUMNS, [row], header=True)
    runner.append_rows(out, [])
    assert read(out) == [row | {"overhead_s": ""}]


# ---- Replayed graphs, which calls on the CPU play


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setenv(registry.FAKE, "1")


def test_a_replay_is_timed_and_the_rest_of_a_call_is_its_overhead(faked, monkeypatch):
    """Our eager calls take 5 s and the replays 2 s. The other two cannot be captured, or take too long."""
    clock = Clock(monkeypatch, {"ours": [0.05], "not captured": [0.05], "long": [0.6], registry.EAGER: [0.1]}, [1e5])
    monkeypatch.setattr(registry, "seconds", lambda run, device: clock.seconds(run, device) / run_of(run))

    def run_of(run) -> float:
        return 2.5 if getattr(run, "is_replay", False) else 1.0

    def capture(run, calls, device):
        def replay():
            for _ in range(calls):
                run()

        replay.is_replay = True
        return replay

    monkeypatch.setattr(registry, "capture", capture)
    case = clock.case(clock.competitor("not captured", captures=False), clock.competitor("long"))
    rows, _ = runner.run_case(case, CPU, quick=True)
    found = {row.competitor: (row.median_s, row.overhead_s) for row in rows}
    assert found["ours"] == (pytest.approx(0.02), pytest.approx(0.03))
    assert found[registry.EAGER] == (pytest.approx(0.04), pytest.approx(0.06))
    assert found["not captured"] == (0.05, None)
    assert found["long"] == (0.6, None)


def test_a_call_that_cannot_be_captured_is_timed_in_eager_calls(faked, monkeypatch, capsys):
    def refuses(run, calls, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    clock = Clock(monkeypatch, {"ours": [0.02], registry.EAGER: [0.03]}, [1e5])
    monkeypatch.setattr(registry, "capture", refuses)
    rows, _ = runner.run_case(clock.case(), CPU, quick=True)
    assert [row.overhead_s for row in rows] == [None, None]
    assert "in eager calls: operation not permitted when stream is capturing\n" in capsys.readouterr().out


def test_replays_are_compared_with_replays_and_eager_calls_with_eager_calls():
    summaries = {"ours": (2.0,), "replayed": (4.0,), "eager": (9.0,)}
    overheads = {"ours": 1.0, "replayed": 5.0}
    assert runner._ratio("replayed", "ours", summaries, overheads) == 2.0
    assert runner._ratio("eager", "ours", summaries, overheads) == 3.0
    assert runner._ratio("ours", "eager", summaries, overheads) == pytest.approx(1 / 3)


def test_a_graph_holds_one_call_for_every_set_of_inputs(monkeypatch):
    """Inputs of 400 bytes fill 1000 bytes three times over. A competitor that compiles keeps the first set."""
    monkeypatch.setattr(registry, "rotated_bytes", lambda device: 1000)
    case = doubling(competitor("compiles", lambda x: [x], slow_start=True))
    sets = registry.draw_sets(case, CPU)
    assert len(sets) == 3
    run, calls = registry.rotated(case.competitors[-1], sets)
    assert calls == 3
    results = [run()[0] for _ in range(6)]
    for result, inputs in zip(results, [*sets, *sets], strict=True):
        assert torch.equal(result, 2 * inputs["x"])
    run, calls = registry.rotated(case.competitors[0], sets)
    assert calls == 1
    assert all(torch.equal(run()[0], sets[0]["x"]) for _ in range(2))
    copies = dataclasses.replace(case, make_inputs=lambda device: {"x": torch.ones(500), "copies": 7})
    assert registry.rotated(copies.competitors[0], registry.draw_sets(copies, CPU))[1] == 7


def test_a_capture_warms_up_on_a_stream_and_replays_all_calls(monkeypatch):
    """The order of torch.cuda's calls, which are played here. The stream before is the current one again afterwards."""
    events = []

    class Played(contextlib.AbstractContextManager):
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            events.append(f"enter {self.name}")

        def __exit__(self, *_):
            events.append(f"leave {self.name}")

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

        def replay(self):
            events.append("replay")

    current = Played("the current stream")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Played("another stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Played(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Played("graph"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Played("capture"))
    replay = registry.capture(lambda: events.append("call"), 2, torch.device("cuda"))
    warm_up = ["another stream waits for the current stream", "enter another stream", "call", "call"]
    captured = [
        "enter the current stream",
        "enter capture",
        "call",
        "call",
        "leave capture",
        "leave the current stream",
    ]
    assert events == [
        *warm_up, "leave another stream", "the current stream waits for another stream", *captured
    ]  # fmt: skip
    replay()
    assert events[-1] == "replay"


def test_faked_rows_do_not_enter_the_results(faked, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="is for measurements; expected another folder"):
        runner.append_rows(ROOT / "bench/results/faked.csv", [])
    clock = Clock(monkeypatch, {"ours": [0.02], registry.EAGER: [0.03]}, [1e5])
    rows, _ = runner.run_case(clock.case(), CPU, quick=True)
    assert all(row.device.startswith("FAKED ") for row in rows)
    assert not (ROOT / "bench/results/faked.csv").exists()


@pytest.mark.parametrize("name", ["amd-epyc.csv", "amd-epyc-avx2.csv"])
def test_the_rows_of_earlier_runs_can_be_appended_to(name, tmp_path):
    out = tmp_path / name
    out.write_bytes((ROOT / "bench/results" / name).read_bytes())
    before = read(out)
    runner.prepare(parse("--quick", "--device", "cpu", "--out", str(out)))
    runner.append_rows(out, [])
    after = read(out)
    assert [{column: row[column] for column in runner.UNMARKED_COLUMNS} for row in after] == [
        {column: row[column] for column in runner.UNMARKED_COLUMNS} for row in before
    ]
    for row in after:
        # A calm row is noisy too if the rates around its case have changed.
        assert row["noisy"] == "True" or float(row["spread_s"]) <= float(row["median_s"]) / 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of the memory is known on Linux only")
def test_the_memory_of_a_call_beyond_its_results():
    def run() -> list[torch.Tensor]:
        # 80 MB at once, of which 32 MB are returned. A view of a result is no memory of its own.
        work = torch.ones(12_000_000)
        result = torch.ones(8_000_000)
        return [result.add_(work[:8_000_000]), result[:5]]

    # Freed memory of earlier calls does not hide what a call needs.
    for _ in range(3):
        _, extra = registry.first_call(run, CPU)
        assert 47e6 < extra < 55e6

    # A result that was there before the call takes nothing off what the call needs.
    param = torch.zeros(12_000_000)
    _, extra = registry.first_call(lambda: [param.add_(param * 2)], CPU)
    assert 47e6 < extra < 55e6


def test_a_row_states_the_floor_at_the_peak_of_the_units(monkeypatch):
    clock = Clock(monkeypatch, {"ours": [2.0], registry.EAGER: [3.0]}, memory=[800.0])
    monkeypatch.setattr(registry, "measure_rates", lambda device, case: registry.Rates(8000.0, 400.0, peak=800.0))
    rows, _ = runner.run_case(clock.case(operations=800.0), CPU, quick=True)
    assert [(row.floor_s, row.peak_floor_s) for row in rows] == [(2.0, 1.0)] * 2


def test_no_matmul_is_faster_than_the_multiply_add_units():
    rates = registry.measure_rates(CPU, registry.cases("orthogonal_filter", "cpu")[0])
    # Both are the best of several tries, on a machine that others may use.
    assert rates.matmul < 1.3 * rates.peak < math.inf


@pytest.mark.parametrize(("duration", "calls"), [(1.0, 8), (0.0625, 9)])
def test_a_pass_is_tried_for_a_while_and_the_fastest_counts(duration, calls, monkeypatch):
    monkeypatch.setattr(registry, "SECONDS_PER_PASS", 0.5)
    taken = []

    def seconds(run, device):
        # The third call is twice as fast.
        taken.append(duration / 2 if len(taken) == 2 else duration)
        return taken[-1]

    monkeypatch.setattr(registry, "seconds", seconds)
    assert registry._best_seconds(lambda: None, CPU) == duration / 2
    assert len(taken) == calls


@pytest.mark.parametrize("case_bytes", [8.0, 1e6, 1e8])
def test_rates_of_this_machine_are_plausible(case_bytes):
    rates = registry.measure_rates(CPU, dataclasses.replace(doubling(), bytes=case_bytes))
    assert 0 < rates.memory < 1e13
    assert 1e8 < rates.matmul < 1e15


def test_rates_come_from_the_one_place_that_measures_products(monkeypatch):
    monkeypatch.setattr(registry, "matmul_rate", lambda device, size, repeats: 123.0 * size)
    largest = max(registry.MATMUL_SIZES["cpu"])
    assert registry.measure_rates(CPU, doubling()).matmul == 123.0 * largest
    without_operations = dataclasses.replace(doubling(), operations=0)
    assert registry.measure_rates(CPU, without_operations).matmul == math.inf


def test_the_ceiling_of_memory_is_the_fastest_pass_over_as_many_bytes(monkeypatch):
    """The buffer has half of the case's bytes. A copy (half of it to the other half) and a sum move these bytes once.

    A negation in place moves them twice.
    """
    taken = iter(2 * [4.0, 4.0, 8.0])
    monkeypatch.setattr(registry, "_best_seconds", lambda run, device: next(taken))
    assert registry._memory_rate(CPU, 8000) == 2 * 4000 / 4


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_thread_that_does_not_run_leaves_the_ceiling_as_it_is(two_threads, monkeypatch):
    """Every pass on two threads waits for the second thread, because another process keeps it from running."""

    def seconds(run, device):
        run()
        return 0.04 if torch.get_num_threads() > 1 else 1e-3

    monkeypatch.setattr(registry, "seconds", seconds)
    assert registry._memory_rate(CPU, 8000) == 2 * 4000 / 1e-3
    assert torch.get_num_threads() == 2


def test_the_number_of_threads_comes_back_after_a_failure(two_threads, monkeypatch):
    def fail(run, device):
        if torch.get_num_threads() == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(registry, "seconds", lambda run, device: fail(run, device) or 1.0)
    with pytest.raises(KeyboardInterrupt):
        registry._memory_rate(CPU, 8000)
    assert torch.get_num_threads() == 2


def test_a_pass_is_tried_until_nothing_is_faster(monkeypatch):
    """Each try is a tenth faster than the one before, down to a floor. All are far slower than SECONDS_PER_PASS."""
    durations = [max(0.9**index, 0.3) for index in range(100)]
    taken = iter(durations)
    monkeypatch.setattr(registry, "seconds", lambda run, device: next(taken))
    assert registry._best_seconds(lambda: None, CPU) == 0.3


def test_parallel_windows_stand_beside_the_sequential_kernel_and_the_peers():
    """The sequential kernel, the baseline, comes first. One window for the whole depth is left out if it is too large.

    Its states must leave room for the weights and gradients of all competitors.
    """
    by_name = {}
    for case in registry.cases("parallel_depth", "cpu"):
        ours = [one.name.split(", ")[1] for one in case.competitors if one.ours]
        assert ours[:2] == ["sequential", "parallel"]
        by_name[(case.name, *case.shape.values())] = ours
        timed = [one.name for one in case.competitors if one.name == registry.EAGER and one.missing() is None]
        assert bool(timed) == ("haar" in case.name)
    assert by_name["over depth, haar, forward", 50_000, 32, 64][2:] == ["by 1000", "one window"]
    assert by_name["over depth, haar, forward", 50_000, 128, 64][2:] == ["by 1000"]
    assert by_name["over time, cyclic, forward + backward", 784, 128, 256][2:] == ["one window"]


def test_a_permutation_counts_as_no_arithmetic():
    haar, cyclic = (
        {backward: parallel_depth._case("cpu", False, 20, 3, 8, filter, backward, True) for backward in (False, True)}
        for filter in ("haar", "cyclic")
    )
    product = 2 * 20 * 3 * 8 * 8
    assert [haar[backward].operations for backward in (False, True)] == [2 * product, 5 * product]
    assert [cyclic[backward].operations for backward in (False, True)] == [product, 3 * product]


def crossover_rows(path: Path, seconds: dict, **options) -> None:
    """Append rows to the file. ``seconds``: (over, filter, layers, rows, width, pass) -> (sequential, parallel)."""
    names = [field.name for field in dataclasses.fields(runner.Row)]
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, restval="0")
        if file.tell() == 0:
            writer.writeheader()
        for (over, filter, layers, rows, width, passes), times in seconds.items():
            common = {"stem": "parallel_depth", "kind": "cpu", "threads": 2, **options}
            common |= {"case": f"over {over}, {filter}, {passes}", "shape": f"L={layers} M={rows} N={width}"}
            names_of_ours = ("lcw_ops (cpp), sequential", "lcw_ops (cpp), parallel", "lcw_ops (cpp), one window")
            for name, time in zip(names_of_ours, (*times, 0.001), strict=True):
                writer.writerow(common | {"competitor": name, "median_s": time})


PASSES = ("forward", "forward + backward")
TWO_THREADS = "cpu AVX2, 2 threads"


def measured(path: Path, won: dict, **options) -> None:
    """Append rows for ``won``: (over, filter, layers, rows, width) -> whether the parallel solver wins both passes."""
    times = {(*point, passes): (1.0, 0.3 if wins else 0.6) for point, wins in won.items() for passes in PASSES}
    crossover_rows(path, times, **options)


def test_regions_lie_between_winning_sizes(tmp_path):
    path = tmp_path / "rows.csv"
    measured(
        path,
        {
            ("depth", "haar", 10_000, 1, 128): True,
            ("depth", "haar", 50_000, 1, 128): True,
            # Here the parallel solver takes 0.6 of the sequential kernel's time, but a trained net may need three
            # times the sweeps.
            ("depth", "haar", 10_000, 32, 128): False,
            # A box around this size and the others has corners that were not measured.
            ("depth", "haar", 2000, 1, 512): True,
            ("time", "cyclic", 784, 1, 64): True,
            ("time", "cyclic", 784, 8, 64): False,
            ("time", "cyclic", 784, 32, 64): True,
        },
    )
    found = parallel_depth.regions(path, TWO_THREADS)
    assert set(found) == {
        Region(TWO_THREADS, False, False, (10_000, 50_000), (1, 1), (128, 128), 1.0),
        Region(TWO_THREADS, False, False, (2000, 2000), (1, 1), (512, 512), 1.0),
        Region(TWO_THREADS, True, True, (784, 784), (1, 1), (64, 64), 1.0),
        Region(TWO_THREADS, True, True, (784, 784), (32, 32), (64, 64), 1.0),
    }
    assert any(region.holds(Call(TWO_THREADS, False, False, 30_000, 1, 128)) for region in found)
    assert not any(region.holds(Call(TWO_THREADS, False, False, 30_000, 1, 200)) for region in found)
    assert {region.largest_c for region in found} == {1.0}


def test_a_box_needs_all_its_corners(tmp_path):
    path = tmp_path / "rows.csv"
    corners = {("depth", "haar", layers, rows, 64): True for layers in (100, 1000) for rows in (1, 4)}
    measured(path, corners)
    (region,) = parallel_depth.regions(path, TWO_THREADS)
    assert region[3:6] == ((100, 1000), (1, 4), (64, 64))
    # A size inside the box at which the solver loses splits the box into its four edges.
    measured(path, {("depth", "haar", 500, 2, 64): False})
    assert len(parallel_depth.regions(path, TWO_THREADS)) == 4


def test_regions_are_of_one_kind_of_machine_and_of_the_last_run(tmp_path):
    path, point = tmp_path / "rows.csv", ("depth", "haar", 100, 1, 64)
    measured(path, {point: True}, kind="gpu", threads=1)
    measured(path, {point: True}, stem="orthogonal_filter")
    assert parallel_depth.regions(path, TWO_THREADS) == []
    assert [region.device for region in parallel_depth.regions(path, "sm_90")] == ["sm_90"]
    measured(path, {point: True})
    assert parallel_depth.regions(path, "cpu AVX2, 1 threads") == []
    assert len(parallel_depth.regions(path, TWO_THREADS)) == 1
    measured(path, {point: False})
    assert parallel_depth.regions(path, TWO_THREADS) == []
    # A win in the forward pass alone is not enough, whether or not the backward pass was measured.
    crossover_rows(path, {(*point, "forward"): (1.0, 0.1)})
    assert parallel_depth.regions(path, TWO_THREADS) == []
    crossover_rows(path, {("depth", "haar", 7, 1, 64, "forward"): (1.0, 0.1)})
    assert parallel_depth.regions(path, TWO_THREADS) == []


def test_noisy_rows_decide_nothing(tmp_path):
    point = ("depth", "haar", 100, 1, 64)
    for noisy in ("sequential", "parallel"):
        path = tmp_path / f"{noisy}.csv"
        measured(path, {point: True})
        assert len(parallel_depth.regions(path, TWO_THREADS)) == 1
        rows = read(path)
        for row in rows:
            if row["competitor"].endswith(noisy):
                row["spread_s"] = 0.6 * float(row["median_s"])
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        assert parallel_depth.regions(path, TWO_THREADS) == []


def test_a_row_that_is_marked_as_noisy_decides_nothing(tmp_path):
    path = tmp_path / "rows.csv"
    measured(path, {("depth", "haar", 100, 1, 64): True}, noisy="True")
    assert parallel_depth.regions(path, TWO_THREADS) == []
    measured(path, {("depth", "haar", 100, 1, 64): True}, noisy="False")
    assert len(parallel_depth.regions(path, TWO_THREADS)) == 1


def test_rows_of_two_devices_are_not_mixed(tmp_path):
    path = tmp_path / "rows.csv"
    for device in ("one", "other"):
        measured(path, {("depth", "haar", 100, 1, 64): True}, device=device)
    with pytest.raises(ValueError, match="one, other"):
        parallel_depth.regions(path, TWO_THREADS)


def test_lines_for_the_crossover_are_python(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    measured(path, {("depth", "haar", 100, 1, 64): True})
    assert parallel_depth.main([str(path), "--key", TWO_THREADS]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert eval(line.strip().rstrip(",")) == parallel_depth.regions(path, TWO_THREADS)[0]
    assert parallel_depth.main([str(path), "--key", "sm_90"]) == 0
    assert "no measured size of sm_90" in capsys.readouterr().out


def test_rows_go_beside_the_benchmarks_by_default():
    """git keeps the folder only if it has a file."""
    assert (ROOT / "bench/results/README.md").is_file()
    # In a source tree lcw_ops/bench may be a link.
    assert runner._default_csv(CPU).parent.resolve() == ROOT / "bench/results"


def test_there_is_one_command_for_benchmarks():
    assert "__main__" not in (ROOT / "bench/runner.py").read_text()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to a core")
def test_other_processes_are_busy_during_a_call_alone():
    """They use processor time in the call and none between calls, and end with the competitor."""

    def child_seconds():
        return sum(sum(ticks(pid)) for pid in children)

    def ticks(pid):
        user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        return int(user), int(system)

    before = running_children()
    run = registry.beside_busy_processes(lambda inputs: lambda: [time.sleep(inputs["seconds"])])({"seconds": 1.0})
    children = running_children() - before
    assert len(children) == -(-len(os.sched_getaffinity(0)) // 2)
    time.sleep(0.2)
    idle = child_seconds()
    time.sleep(0.5)
    assert child_seconds() == idle
    run()
    busy = child_seconds() - idle
    # Ticks of 10 ms. The other cores' work may leave such a process a small share of its core.
    assert busy >= 5
    after = child_seconds()
    time.sleep(0.5)
    assert child_seconds() - after <= 1
    del run
    gc.collect()
    assert not children & running_children()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to a core")
def test_processes_that_stand_still_end_with_a_killed_parent():
    """A stopped process runs no code that could look for its parent."""
    code = (
        "import os, signal\n"
        "from lcw_ops.bench import registry\n"
        "run = registry.beside_busy_processes(lambda inputs: lambda: None)(None)\n"
        "print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # Their shared standard error reaches its end when the last of them has ended.
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == -signal.SIGKILL
    assert result.stdout.split()


def running_children():
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_a_training_step_moves_no_parameter_far_and_has_fresh_gradients():
    """Every call computes the gradients of one step, not sums over calls."""
    case = next(case for case in registry.cases("orthogonal_filter", "cpu") if "training step" in case.name)
    inputs = case.shorten(case.make_inputs(torch.device("cpu")))
    ours = next(one for one in case.competitors if one.ours)
    run = ours.prepare(inputs)
    first = [result.detach().clone() for result in run()]
    for now, then in zip(run(), first, strict=True):
        assert_close(now.detach(), then, rtol=1e-4, atol=1e-5 * then.abs().max().item())
    assert any(one.name.endswith(", busy") and not one.checked for one in case.competitors)
    in_backward = next(one for one in case.competitors if one.name.endswith(", in backward"))
    for _ in range(2):
        (output,) = in_backward.prepare(inputs)()
        assert torch.equal(output, first[0])
