"""The verdicts on the papers' statements follow from the rows, and a stopped run goes on."""

import csv
import subprocess
from pathlib import Path

import pytest

from lcw_ops.bench.reproduce import __main__ as command
from lcw_ops.bench.reproduce import claims
from lcw_ops.bench.reproduce.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN, Sample, compare

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


@pytest.mark.parametrize(
    ("ours", "peer", "is_larger_better", "verdict"),
    [
        ([3, 4, 5], [0, 1, 2], True, HOLDS),
        ([3, 4, 5], [0, 1, 2], False, FAILS),
        ([0, 1, 2], [3, 4, 5], False, HOLDS),
        ([0, 1, 2], [3, 4, 5], True, FAILS),
        ([0, 4, 5], [0, 1, 2], True, UNDECIDED),
        ([2, 3, 4], [0, 1, 2], True, UNDECIDED),
        ([1, 1, 1], [1, 1, 1], True, UNDECIDED),
    ],
)
def test_a_verdict_needs_ranges_that_do_not_overlap(ours, peer, is_larger_better, verdict):
    outcome = compare(Sample("ours", ours), Sample("peer", peer), is_larger_better)
    assert outcome.verdict == verdict
    assert outcome.ours.startswith("ours ")


def test_every_statement_of_the_papers_has_a_line():
    counts = {"LCW": 6, "GMP": 5, "GAF": 4, "LPS": 3, "ROAF": 6}
    ids = [claim.id for claim in claims.CLAIMS]
    assert ids == [f"{paper}-{number}" for paper, count in counts.items() for number in range(1, count + 1)]


def test_without_rows_a_statement_is_unknown(tmp_path):
    lines = claims.table(tmp_path).splitlines()
    assert len(lines) == 2 + len(claims.CLAIMS)
    measured = [line for line in lines if "is missing" in line]
    assert len(measured) >= 15
    assert all(f"**{UNKNOWN}**" in line for line in measured)


def write(folder, stem, rows):
    with (folder / f"reproduce-{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_method_is_found_by_its_whole_name(tmp_path):
    write(tmp_path, "a", [{"method": "plain, rate K", "figure": 9}, {"method": "plain", "figure": 1}])
    assert claims.Rows(tmp_path, "a").sample(method="plain").figures == [1.0]
    with pytest.raises(LookupError, match="has no row of LCW"):
        claims.Rows(tmp_path, "a").sample(method="LCW")


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.9, HOLDS), (0.1, UNDECIDED)])
def test_the_verdict_on_sigmoid_nets_follows_from_the_rows(tmp_path, accuracy, verdict):
    def row(method, seed, figure):
        return {
            "experiment": "sigmoid",
            "setting": "sigmoid",
            "method": method,
            "seed": seed,
            "measure": "test accuracy",
            "figure": figure,
        }

    methods = {"plain, Glorot": 0.1, "plain, same variance": 0.11, "LCW": accuracy}
    write(tmp_path, "lcw", [row(m, seed, f + seed / 50) for m, f in methods.items() for seed in range(6)])
    assert claims.sigmoid_trains(tmp_path).verdict == verdict


def test_the_committed_table_is_that_of_the_committed_rows():
    assert (RESULTS / "claims.md").read_text() == claims.table(RESULTS) + "\n"


@pytest.fixture
def calls(monkeypatch):
    """Runs no experiment; notes them, and writes an empty file of rows for each. ``lps`` fails once."""
    made = []

    def run(arguments, check):
        module = arguments[2].rpartition(".")[2]
        made.append(module)
        if module == "lps" and made.count("lps") == 1:
            return subprocess.CompletedProcess(arguments, 3)
        Path(arguments[arguments.index("--out") + 1]).write_text("experiment,method,network,setting,stage,measure\n")
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return made


def test_a_second_call_runs_only_what_has_not_ended(tmp_path, calls, capsys):
    assert command.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "failed: lps (exit code 3)" in capsys.readouterr().err
    assert calls == [experiment.module for experiment in command.EXPERIMENTS]
    calls.append("second")
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    assert calls[calls.index("second") + 1 :] == ["lps"]
    # The figures of a quick run do not stand for those of a full one.
    calls.append("third")
    command.main(["--out", str(tmp_path), "lcw"])
    assert calls[calls.index("third") + 1 :] == ["lcw"]
    assert (tmp_path / "claims.md").read_text().count("\n") == 2 + len(claims.CLAIMS)
