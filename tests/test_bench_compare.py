"""``lcw-ops bench --base``: the interval, the order of the processes, the outcomes, the build of the base, the rows.

The whole runs are in a small git repository with a fake package: its build writes a file, and its worker reads the
times from a file instead of measuring.
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcw_ops import _files, cli
from lcw_ops.bench import base_tree, compare, compare_worker, gpu, registry, runner

ROOT = Path(__file__).parent.parent

WORKER = """
import json, os, sys
from pathlib import Path
job = json.loads(sys.argv[1])
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(json.dumps(job | {"path": os.environ["PYTHONPATH"], "choices": os.environ["LCW_OPS_CACHE_DIR"]}) + "\\n")
facts = json.loads(Path(job["tree"], "lcw_ops/facts.json").read_text())
if job["competitor"] is None:
    print("a library prints this")
    print(json.dumps(facts["check"]))
elif facts["seconds"] is None:
    sys.exit("out of memory")
else:
    # All pairs have another time, in the same ratio.
    print(json.dumps({"median_s": facts["seconds"] * (1 + job["seed"])}))
"""

SETUP = """
import os, sys
from pathlib import Path
print(sys.argv[1:])
if Path("broken").exists():
    sys.exit("no compiler")
with open(os.environ["FAKE_LOG"] + ".builds", "a") as log:
    log.write(f"archs {os.environ['LCW_OPS_CUDA_ARCHS']!r}\\n")
"""

READY = {"ready": ["ours"], "missing": {}, "refused": {}}


class Repository:
    """A git repository with a fake package. ``commit`` returns the hash of a revision with these facts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "lcw_ops").mkdir(parents=True)
        self.git("init", "-q", "-b", "main")
        (root / "setup.py").write_text(SETUP)

    def git(self, *arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(self.root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def facts(self, seconds: float | None, check: dict = READY) -> None:
        (self.root / "lcw_ops/facts.json").write_text(json.dumps({"seconds": seconds, "check": check}))

    def commit(self, seconds: float | None, check: dict = READY, broken: bool = False) -> str:
        self.facts(seconds, check)
        if broken:
            (self.root / "broken").touch()
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "a revision")
        return self.git("rev-parse", "HEAD")

    def worktrees(self) -> int:
        return len(self.git("worktree", "list").splitlines())


@pytest.fixture
def repository(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    fake = Repository(tmp_path / "checkout")
    monkeypatch.setattr(compare, "ROOT", fake.root)
    monkeypatch.setattr(compare, "WORKER", worker)
    monkeypatch.setattr(registry, "cases", lambda stem, device_type: [case()])
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("LCW_OPS_CACHE_DIR", str(tmp_path / "cache"))
    for name in base_tree.BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return fake


def case(*names: str, **changes) -> registry.Case:
    ours = [registry.Competitor(name, lambda inputs: list, ours=True) for name in names or ("ours",)]
    plain = registry.Case(
        stem="lcw_linear",
        name="forward",
        shape={"M": 3, "N": 4},
        dtype=torch.float32,
        make_inputs=lambda device: {},
        expected=lambda inputs: [],
        competitors=(*ours, registry.Competitor(registry.EAGER, lambda inputs: list)),
        bytes=1,
        operations=1,
        quick=True,
    )
    return dataclasses.replace(plain, **changes)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    return parser.parse_args(["lcw_linear", "--quick", "--device", "cpu", *arguments])


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict]]:
    """The exit code, and all rows of the CSV."""
    out = tmp_path / "rows.csv"
    code = compare.carry_out(compare.prepare(parse("--out", str(out), *arguments)))
    with out.open(newline="") as file:
        return code, list(csv.DictReader(file))


def jobs(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def builds(tmp_path: Path) -> list[str]:
    return (tmp_path / "log.builds").read_text().splitlines()


# ---- The interval


@pytest.mark.parametrize(
    ("count", "rank"), [(6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (15, 4), (20, 6), (25, 8), (30, 10), (100, 40)]
)
def test_the_interval_is_the_one_in_tables_of_the_sign_test(count, rank):
    ratios = [float(number) for number in range(1, count + 1)]
    random.Random(0).shuffle(ratios)
    assert compare.interval(ratios) == (rank, count + 1 - rank)


def test_the_interval_of_ten_by_hand():
    """2 (1 + 10) / 1024 = 2.1 % is at most 5 %, and 2 (1 + 10 + 45) / 1024 = 10.9 % is not: the second on each side."""
    ratios = [0.9, 5.0, 0.97, 0.91, 0.95, 0.96, 0.1, 0.92, 0.94, 0.93]
    assert compare.interval(ratios) == (0.9, 0.97)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_too_few_ratios_have_no_interval(count):
    with pytest.raises(ValueError, match=f"{count} ratios; expected at least 6"):
        compare.interval([1.0] * count)


def test_thousands_of_ratios_have_an_interval():
    low, high = compare.interval([float(number) for number in range(3000)])
    # The normal approximation: 1.96 standard deviations of the binomial distribution, sqrt(3000) / 2.
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(3000) / 2, rel=0.02)


def test_the_interval_covers_the_median_of_a_skewed_distribution():
    """For ten ratios the level is 1 - 22 / 1024 exactly. Bounds: four standard deviations of 4000 trials."""
    draws, trials = random.Random(1), 4000
    # A time is 1 plus an exponential delay, divided by its own median.
    median, outside = 1 + math.log(2), 0
    for _ in range(trials):
        low, high = compare.interval([(1 + draws.expovariate(1)) / median for _ in range(10)])
        outside += not low <= 1 <= high
    miss = 22 / 1024
    assert abs(outside / trials - miss) < 4 * math.sqrt(miss * (1 - miss) / trials)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.8, 0.99, "faster"),
        (1.01, 1.2, "slower"),
        (0.9, 1.1, "undecided"),
        (0.9, 1.0, "undecided"),
        (1.0, 1.1, "undecided"),
    ],
)
def test_the_outcome_follows_from_the_interval(low, high, expected):
    assert compare.outcome(low, high) == expected


# ---- Whole runs


def test_processes_alternate():
    assert compare.order(4) == ["base", "new", "new", "base", "base", "new", "new", "base"]
    assert compare.order(11).count("new") == compare.order(11).count("base") == 11


def test_the_processes_of_a_run(repository, tmp_path):
    commit = repository.commit(2.0)
    repository.commit(1.0)
    assert run(tmp_path, "--base", "HEAD~1", "--pairs", "12")[0] == 0
    base = str(tmp_path / "cache/bench" / commit[:12])
    checks, timed = jobs(tmp_path)[:2], jobs(tmp_path)[2:]
    assert [(job["tree"], job["competitor"]) for job in checks] == [(base, None), (str(repository.root), None)]
    folders = {"base": base, "new": str(repository.root)}
    assert [job["tree"] for job in timed] == [folders[tree] for tree in compare.order(12)]
    # Both processes of a pair have the same inputs.
    assert [job["seed"] for job in timed] == [index // 2 for index in range(24)]
    for job in jobs(tmp_path):
        assert job["path"].split(os.pathsep)[0] == job["tree"]
        assert job["choices"] == ""
        assert job["threads"] == torch.get_num_threads()
        assert (job["stem"], job["case"], job["device"]) == ("lcw_linear", "forward, M=3 N=4, float32", "cpu")
        assert job["budget"] == compare.QUICK_SECONDS_PER_PROCESS


@pytest.mark.parametrize(("seconds", "outcome"), [(1.0, "faster"), (4.0, "slower"), (2.0, "undecided")])
def test_a_run_appends_a_row(seconds, outcome, repository, tmp_path, capsys):
    commit = repository.commit(2.0)
    repository.commit(seconds)
    arguments = ("--base", "main~1")
    code, (row,) = run(tmp_path, *arguments)
    assert code == 0
    assert list(row) == compare.COLUMNS
    assert row["base_commit"] == repository.git("describe", "--always", commit)
    assert row["commit"] == runner._commit()
    assert (row["stem"], row["case"], row["shape"], row["dtype"]) == ("lcw_linear", "forward", "M=3 N=4", "float32")
    assert (row["competitor"], row["pairs"], row["threads"]) == ("ours", "10", str(torch.get_num_threads()))
    # The k-th pair of the fake takes k times as long, for k = 1 to 10.
    assert float(row["base_median_s"]) == 2.0 * 5.5
    assert float(row["median_s"]) == seconds * 5.5
    assert [float(row[name]) for name in ("ratio", "low", "high")] == [seconds / 2] * 3
    assert row["outcome"] == outcome
    printed = capsys.readouterr().out
    assert f"{seconds / 2:.3f}  [{seconds / 2:.3f}, {seconds / 2:.3f}]   {outcome}" in printed
    assert f"1 {outcome}" in printed
    assert len(run(tmp_path, *arguments)[1]) == 2


def test_a_summary_takes_the_ratio_of_each_pair(repository, tmp_path):
    """The machine becomes ten times slower in the middle. The medians of all times hide what every pair shows."""
    repository.commit(1.0)
    plan = compare.prepare(parse("--base", "HEAD"))
    base = [1.0] * 5 + [10.0] * 5
    row = compare.summarise(case(), "ours", plan, base, [0.9 * time for time in base])
    assert (row.ratio, row.low, row.high, row.outcome) == (0.9, 0.9, 0.9, "faster")
    assert (row.base_median_s, row.median_s) == (5.5, statistics.median([0.9, 9.0]))


def test_a_kernel_that_the_base_lacks_is_not_comparable(repository, tmp_path, capsys, monkeypatch):
    both = {"ready": ["ours", "other"], "missing": {}, "refused": {}}
    monkeypatch.setattr(registry, "cases", lambda stem, device_type: [case("ours", "other")])
    repository.commit(2.0)
    repository.facts(1.0, both)
    code, rows = run(tmp_path, "--base", "HEAD")
    assert code == 0
    assert [row["competitor"] for row in rows] == ["ours"]
    assert "other                      not comparable: base: it has ours instead\n" in capsys.readouterr().out


BROKEN = {"reason": "ImportError: no such name"}
REFUSED = {"ready": [], "missing": {}, "refused": {"ours": "WrongResult: off"}}
MISSING = {"ready": [], "missing": {"ours": "it needs a card"}, "refused": {}}


@pytest.mark.parametrize(
    ("base", "new", "code", "message"),
    [
        (BROKEN, READY, 0, "not comparable: base: ImportError: no such name"),
        (REFUSED, READY, 0, "not comparable: base: WrongResult: off"),
        (READY, BROKEN, 1, "not comparable: new: ImportError: no such name"),
        (READY, REFUSED, 1, "not comparable: new: WrongResult: off"),
        (MISSING, MISSING, 0, "not comparable: base: it needs a card; new: it needs a card"),
    ],
)
def test_a_tree_that_fails_its_check_is_not_timed(base, new, code, message, repository, tmp_path, capsys):
    repository.commit(1.0, base)
    repository.facts(1.0, new)
    assert run(tmp_path, "--base", "HEAD") == (code, [])
    assert message in capsys.readouterr().out
    assert len(jobs(tmp_path)) == 2


def test_a_process_that_dies_costs_its_case_only(repository, tmp_path, capsys, monkeypatch):
    cases = [case(), case(name="backward")]
    monkeypatch.setattr(registry, "cases", lambda stem, device_type: cases)
    repository.commit(1.0)
    repository.facts(None)
    assert run(tmp_path, "--base", "HEAD") == (1, [])
    printed = capsys.readouterr().out
    assert printed.count("ours                       failed: new: the process ended with code 1: out of memory") == 2
    # The second process of a case is the working tree's. The estimate no longer counts the others.
    assert "(process 4 of 26, about " in printed


def test_the_estimate_of_the_time_left(monkeypatch):
    clock = iter([100.0, 130.0, 130.0])
    monkeypatch.setattr(compare.time, "monotonic", lambda: next(clock))
    progress = compare.Progress(20)
    assert str(progress) == "process 0 of 20"
    progress.done = 5
    assert str(progress) == "process 5 of 20, about 2 min left"
    progress.skip(10)
    assert str(progress) == "process 5 of 10, about 30 s left"


# ---- The base


def test_a_base_is_built_once(repository, tmp_path, monkeypatch, capsys):
    commit = repository.commit(1.0)
    for _ in range(2):
        run(tmp_path, "--base", commit[:9])
    assert len(builds(tmp_path)) == 1
    assert capsys.readouterr().out.count("building ") == 1
    assert repository.worktrees() == 2
    # Other flags make other code.
    monkeypatch.setenv("CXXFLAGS", "-O0")
    run(tmp_path, "--base", "HEAD")
    assert len(builds(tmp_path)) == 2


@pytest.mark.parametrize("mishap", ["deleted", "deleted and pruned", "edited", "other commit", "killed", "other clone"])
def test_a_base_that_is_not_intact_is_made_again(mishap, repository, tmp_path):
    repository.commit(2.0)
    commit = repository.commit(1.0)
    run(tmp_path, "--base", "HEAD")
    folder = tmp_path / "cache/bench" / commit[:12]
    if mishap.startswith("deleted"):
        shutil.rmtree(folder)
        if mishap.endswith("pruned"):
            repository.git("worktree", "prune")
    elif mishap == "edited":
        (folder / "lcw_ops/facts.json").write_text("{}")
    elif mishap == "other commit":
        subprocess.run(["git", "-C", str(folder), "checkout", "-q", "HEAD~1"], check=True)
    elif mishap == "killed":
        (folder / "built.json").unlink()
    else:
        (folder / ".git").write_text("gitdir: /no/such/clone\n")
    code, rows = run(tmp_path, "--base", "HEAD")
    assert (code, len(rows), len(builds(tmp_path))) == (0, 2, 2)


def test_without_a_cache_folder_the_base_is_temporary(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("LCW_OPS_CACHE_DIR", "")
    monkeypatch.setattr(base_tree.tempfile, "tempdir", str(tmp_path))
    repository.commit(1.0)
    assert len(run(tmp_path, "--base", "HEAD")[1]) == 1
    assert repository.worktrees() == 1
    assert not list(tmp_path.glob("lcw_ops-bench-*"))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LCW_OPS_CACHE_DIR": "/a"}, "/a"),
        ({"LCW_OPS_CACHE_DIR": "", "HOME": "/h"}, None),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/lcw_ops"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/lcw_ops"),
        ({}, None),
    ],
)
def test_the_cache_folder(variables, expected, monkeypatch):
    for name in ("LCW_OPS_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _files.cache_folder() == (expected and Path(expected))


def test_cuda_is_built_for_the_card_of_the_machine(repository, tmp_path, monkeypatch):
    repository.commit(1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(tmp_path, "--base", "HEAD")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    compare.prepare(parse("--base", "HEAD"))
    monkeypatch.setenv("LCW_OPS_CUDA_ARCHS", "80")
    compare.prepare(parse("--base", "HEAD"))
    assert builds(tmp_path) == ["archs ''", "archs '90a'", "archs '80'"]
    assert [gpu.architecture(generation) for generation in ("80", "90", "100")] == ["80", "90a", "100"]


def test_an_extension_that_is_older_than_its_sources_is_refused(repository):
    repository.commit(1.0)
    library, sources = repository.root / "lcw_ops/_C.abi3.so", repository.root / "csrc"
    library.touch()
    for name in ("cpu/a.cpp", "cuda/b.cu", "README.md"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).touch()
    os.utime(library, (1000, 1000))
    for name in ("cuda/b.cu", "README.md", "cpu/a.cpp"):
        os.utime(sources / name, (2000, 2000))
        if name != "cpu/a.cpp":
            os.utime(sources / "cpu/a.cpp", (500, 500))
            base_tree.check_extension(repository.root, "cpu")
            base_tree.check_extension(repository.root, "cuda")
    with pytest.raises(ValueError, match=r"_C.abi3.so is older than csrc/cpu/a.cpp; expected .*build_ext --inplace"):
        compare.prepare(parse("--base", "HEAD"))


# ---- Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "nope"], "--base is 'nope'; expected a revision of "),
        (["--base=--all"], "--base is '--all'; expected a revision of "),
        (["--base", ""], "--base is ''; expected a revision of "),
        (["--base", "HEAD", "--pairs", "9"], "--pairs is 9; expected at least 10"),
        (["--base", "HEAD", "--case", "sideways"], "--case is 'sideways'; expected .* The names are: forward$"),
        (["--base", "HEAD", "--share", "2/1"], "--share is '2/1'"),
        (["--base", "HEAD", "--threads", "0"], "--threads is 0"),
        (["--base", "HEAD", "--out", "no/such/folder/rows.csv"], "does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments(arguments, message, repository, tmp_path):
    repository.commit(1.0)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        compare.prepare(parse(*arguments))
    assert not (tmp_path / "cache").exists()


def test_pairs_need_a_base():
    with pytest.raises(ValueError, match="--pairs is 10 without --base"):
        runner.prepare(parse("--pairs", "10"))


def test_a_package_outside_a_checkout_is_refused(repository, tmp_path, monkeypatch):
    repository.commit(1.0)
    # A folder inside a checkout is not its top: the package was installed into it.
    for root in (tmp_path, repository.root / "lcw_ops"):
        monkeypatch.setattr(compare, "ROOT", root)
        with pytest.raises(ValueError, match=r"expected lcw_ops to run from a git checkout, and .* is not one"):
            compare.prepare(parse("--base", "HEAD"))


def test_a_base_that_does_not_build_is_refused(repository, tmp_path, capsys):
    commit = repository.commit(1.0, broken=True)
    arguments = ["bench", "lcw_linear", "--quick", "--device", "cpu", "--out", str(tmp_path / "rows.csv")]
    assert cli.main([*arguments, "--base", "HEAD"]) == 2
    log = tmp_path / "cache/bench" / f"{commit[:12]}.log"
    assert capsys.readouterr().err == (
        f"lcw-ops bench: --base: {commit[:12]} does not build: no compiler. The log is {log}\n"
    )
    assert "build_ext" in log.read_text()
    assert repository.worktrees() == 1


def test_rows_of_another_kind_are_not_appended_to(repository, tmp_path):
    repository.commit(1.0)
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has columns a, b"):
        run(tmp_path, "--base", "HEAD")


def test_rows_go_beside_those_of_the_benchmarks(repository):
    repository.commit(1.0)
    assert compare.prepare(parse("--base", "HEAD")).out.name.startswith("compare-")


# ---- Cases and the worker


def test_a_text_selects_cases():
    def labels(*arguments):
        return [one.label for one in runner.select(parse(*arguments))[1]]

    assert set(labels("--case", "forward + backward")) < set(labels())
    for label in labels():
        assert labels("--case", label) == [label]


def test_the_label_of_a_case_is_unique():
    for stem in registry.STEMS:
        for device_type in ("cpu", "cuda"):
            cases = registry.cases(stem, device_type)
            # A quick case and a full one with the same label are the same work.
            assert len({(one.label, one.quick) for one in cases}) == len(cases)


def test_calls_fill_the_budget():
    durations = iter([0.5, 0.25, 0.125, 0.125, 9.0])
    assert compare_worker._seconds(lambda: next(durations), budget=1.0, least=3) == [0.5, 0.25, 0.125, 0.125]
    assert compare_worker._seconds(lambda: 5.0, budget=1.0, least=3) == [5.0] * 3


def work(tree: Path, competitor: str | None) -> dict:
    stem = "lcw_linear"
    label = next(one.label for one in registry.cases(stem, "cpu") if one.quick)
    job = {"tree": str(tree), "stem": stem, "case": label, "competitor": competitor, "device": "cpu", "threads": 1}
    job |= {"seed": 0, "budget": 0.01}
    command = [sys.executable, str(compare.WORKER), json.dumps(job)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_the_worker_joins_our_benchmarks_with_the_library_of_a_tree(tmp_path):
    """The tree's own benchmarks cannot be imported."""
    library = tmp_path / "lcw_ops"
    (library / "bench").mkdir(parents=True)
    (library / "bench/__init__.py").write_text("raise ImportError('the benchmarks of the tree')\n")
    for entry in (ROOT / "lcw_ops").iterdir():
        if entry.name not in ("bench", "__pycache__"):
            (library / entry.name).symlink_to(entry)
    answer = work(tmp_path, None)
    assert answer["ready"]
    assert answer["refused"] == answer["missing"] == {}
    assert work(tmp_path, answer["ready"][0])["median_s"] > 0


def test_the_worker_says_why_a_tree_has_no_such_case(tmp_path):
    library = tmp_path / "lcw_ops"
    library.mkdir()
    (library / "__init__.py").touch()
    assert work(tmp_path, None) == {"reason": "ModuleNotFoundError: No module named 'lcw_ops.ops'"}


def test_the_worker_refuses_a_wrong_kernel_and_names_a_missing_one(monkeypatch):
    def make(name, result, **options):
        return registry.Competitor(name, lambda inputs: lambda: [result * inputs["x"]], **options)

    competitors = (
        make("right", 2, ours=True),
        make("wrong", 3, ours=True),
        make("absent", 2, ours=True, missing=lambda: "no card"),
        make("peer", 5),
        make(registry.EAGER, 2),
    )
    doubling = case(
        make_inputs=lambda device: {"x": torch.randn(9)},
        expected=lambda inputs: [2 * inputs["x"].double()],
        competitors=competitors,
    )
    answer = compare_worker._check(registry, doubling, torch.device("cpu"))
    assert answer["ready"] == ["right"]
    assert answer["missing"] == {"absent": "no card"}
    assert list(answer["refused"]) == ["wrong"]
    assert answer["refused"]["wrong"].startswith("WrongResult: result 0 differs from float64")
