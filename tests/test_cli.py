"""``lcw-ops`` as a user sees it: its files, its flags, one line for every mistake, no partial file after Ctrl-C."""

import csv
import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import lcw_ops
from lcw_ops import cli
from lcw_ops.jobs import profile as main_job
from lcw_ops.profile import machine

FILES = sorted(main_job.REPORT_FILES)

SMALL = ["--depth", "30", "--width", "8", "--batch", "16", "--steps", "3"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Fix the matmul rate: measuring it is the slowest part of a small run. Restore the number of threads."""
    monkeypatch.setattr(machine, "matmul_rate", lambda device: 1e11)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def profile(*arguments, out):
    return cli.main(["profile", *SMALL, "--out", str(out), *map(str, arguments)])


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_the_main_job_writes_its_report(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert profile(out=out) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    content = report(out)
    assert content["settings"] == {
        **main_job.asdict(main_job.Settings()),
        **{"depth": 30, "width": 8, "batch": 16, "steps": 3, "out": str(out)},
    }
    assert len(content["training"]["loss"]) == 3
    assert [entry["step"] for entry in content["training"]["test_accuracy"]] == [0, 1, 2, 3]
    assert content["networks"]["orthogonal-filter"]["measured"] == "orthogonal-filter net, after 3 steps"
    assert content["networks"]["plain"]["measured"] == "plain net, at initialisation"
    # The peak of the whole run is at least the peak when the last profile ended.
    assert content["peak_memory_bytes"] >= content["networks"]["plain"]["peak_memory_bytes"] > 0
    for network in content["networks"].values():
        assert network["timing"]["layers"] == 32
        assert network["timing"]["forward_gflops_per_second"] > 0
        spectrum = network["jacobians"]["h_0 -> h_L"]
        assert 0 <= spectrum["smallest"] <= spectrum["largest"]

    with open(out / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows[: 3 * 32 : 32]] == ["orthogonal-filter", "residual", "plain"]
    assert {row["kind"] for row in rows[3 * 32 :]} == {"orthogonal-filter, at initialisation"}
    assert len(rows) == 3 * 32 + 30
    assert [row["name"] for row in rows[:2]] == ["input_layer", "layer[1]"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    for words in ("train 3/3", "test accuracy", "ms/step", "layers/s", "GFLOP/s", "peak memory", "written to"):
        assert words in printed
    # The other two nets are not trained.
    assert printed.count("same after 3 steps") == 1


def test_the_panels_of_the_picture_stand_side_by_side(tmp_path, monkeypatch):
    from lcw_ops.jobs import picture

    figures = []
    monkeypatch.setattr(picture, "save", lambda figure, path: figures.append(figure))
    assert profile("--depth", 3, out=tmp_path) == 0
    gradient, state, training, accuracy = figures[0].axes
    left, above, below, over_it = (axes.get_position() for axes in figures[0].axes)
    assert left.x1 < min(above.x0, below.x0)
    assert below.y1 < above.y0
    assert (left.y0, left.y1) == (below.y0, above.y1)
    assert (over_it.bounds, accuracy.get_ylim()[0]) == (below.bounds, 0)
    # The training curve begins at step 0 and loss 0, and every tick of a layer is a whole number.
    assert (training.get_xlim(), training.get_ylim()[0]) == ((0, 3), 0)
    for axes in (gradient, state):
        assert [tick for tick in axes.get_xticks() if 1 <= tick <= 3] == [1, 2, 3]


def test_the_picture_has_the_promised_size(tmp_path):
    from matplotlib import image

    assert profile(out=tmp_path) == 0
    assert image.imread(tmp_path / "report.png").shape[:2] == (900, 1600)


def test_a_seed_repeats_a_run(tmp_path):
    def columns(name, *flags):
        assert profile(*flags, out=tmp_path / name) == 0
        return (tmp_path / name / "layers.csv").read_text(), report(tmp_path / name)["training"]["loss"]

    first = columns("first", "--seed", 3)
    assert first == columns("again", "--seed", 3)
    assert first[1] != columns("other", "--seed", 4)[1]


@pytest.mark.parametrize("depth", range(1, 6))
@pytest.mark.parametrize("steps", [0, 1])
def test_a_net_of_a_few_layers_is_drawn(depth, steps, tmp_path):
    assert profile("--depth", depth, "--steps", steps, out=tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_the_table_has_the_peak_of_the_whole_run(tmp_path, monkeypatch, capsys):
    moments = iter([10**9, 2 * 10**9, 3 * 10**9, 4 * 10**9])
    monkeypatch.setattr(machine, "peak_memory_bytes", lambda device: next(moments))
    assert profile(out=tmp_path) == 0
    assert report(tmp_path)["peak_memory_bytes"] == 4 * 10**9
    assert "4.00 GB" in capsys.readouterr().out


@pytest.mark.parametrize("kind", main_job.KINDS)
def test_kind_chooses_the_trained_network(kind, tmp_path):
    assert profile("--kind", kind, out=tmp_path) == 0
    networks = report(tmp_path)["networks"]
    assert next(iter(networks)) == kind
    assert {name for name, network in networks.items() if "after 3 steps" in network["measured"]} == {kind}


def test_flags_reach_the_run(tmp_path):
    flags = ["--filter", "cyclic", "--activation", "relu", "--lr", "0.001", "--threads", "1", "--device", "cpu"]
    assert profile(*flags, out=tmp_path / "a") == 0
    content = report(tmp_path / "a")
    settings = content["settings"]
    assert [settings[name] for name in ("filter", "activation", "lr", "threads", "device")] == [
        "cyclic", "relu", 0.001, 1, "cpu",
    ]  # fmt: skip
    network = content["networks"]["orthogonal-filter"]
    assert network["machine"]["threads"] == 1
    # The filter, a permutation, costs no arithmetic: each layer has one product, and so have the net's two ends.
    assert network["timing"]["forward_flops"] == 2 * 16 * (30 * 8 * 8 + 64 * 8 + 8 * 10)
    with open(tmp_path / "a" / "layers.csv", newline="") as file:
        # ReLU is not bounded by 1.
        assert next(csv.DictReader(file))["state_rms_bound"] == ""
    assert profile("--lr", "0.1", out=tmp_path / "b") == 0
    assert report(tmp_path / "b")["training"]["loss"] != content["training"]["loss"]


def test_own_data_and_no_training(tmp_path):
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", x=generator.normal(size=(60, 5)), y=np.arange(60) % 3)
    assert profile("--data", tmp_path / "own.npz", "--steps", "0", "--depth", "1", out=tmp_path / "out") == 0
    content = report(tmp_path / "out")
    assert content["data"] == {
        "name": "own.npz", "training_samples": 48, "test_samples": 12, "features": 5, "classes": 3,
    }  # fmt: skip
    assert content["training"]["loss"] == []
    assert all("at initialisation" in network["measured"] for network in content["networks"].values())


@pytest.mark.parametrize(
    "flags",
    [
        ["--depth", "0"],
        ["--depth", "-5"],
        ["--depth", "many"],
        ["--width", "0"],
        ["--batch", "0"],
        ["--batch", "100000"],
        ["--steps", "-1"],
        ["--lr", "nan"],
        ["--lr", "0"],
        ["--seed", "-1"],
        ["--threads", "0"],
        ["--kind", "deep"],
        ["--filter", "random"],
        ["--activation", "gelu"],
        ["--device", "toaster"],
        ["--device", "meta"],
        ["--width", "300000"],
        ["--depth", "1000000000000"],
        ["--threads", "10000000"],
        ["--device", "cuda:99"],
        ["--data", "absent.npz"],
        ["--data", ""],
        ["--data", " "],
        ["--data", __file__],
        ["--unknown"],
    ],
    ids=" ".join,
)
def test_every_mistake_is_one_line_and_code_2(flags, tmp_path, capsys):
    assert profile(*flags, out=tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.err.startswith("lcw-ops profile: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["profile", "train"])
def test_an_empty_path_of_data_is_named(command, capsys):
    assert cli.main([command, "--data", ""]) == 2
    assert capsys.readouterr().err == (
        f"lcw-ops {command}: --data is ''; expected digits, mnist5k, or the path of an .npz file or of a folder.\n"
    )


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert profile(out=out) == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        assert "cannot write to the folder" in error
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("command", ["profile", "train"])
def test_help_says_every_default(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "None" not in printed
    for flag in ("--depth DEPTH", "--data DATA", "--filter", "--lr LR", "50000", "0.0", "order of samples"):
        assert flag in printed


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["info", "--flag"]])
def test_wrong_commands(arguments, capsys):
    assert cli.main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (RuntimeError("no luck"), 1)])
@pytest.mark.parametrize("written", range(3))
def test_interrupted_or_failed_runs_name_the_written_files(error, code, written, tmp_path, monkeypatch, capsys):
    """``written`` files are complete: none if training is interrupted. Otherwise the next file is half written."""
    (tmp_path / "layers.csv").write_text("an earlier run's")

    def fail(*args, **kwargs):
        raise error

    if written == 0:
        monkeypatch.setattr(main_job, "accuracy", fail)
    else:
        # json.dump and savefig fail after some bytes have gone into the file.
        place = {1: "lcw_ops.jobs.profile.write_json", 2: "matplotlib.figure.Figure.savefig"}[written]

        def half(first, file, *args, **kwargs):
            target = first if hasattr(first, "write") else file
            target.write("half a" if "b" not in target.mode else b"half a")
            raise error

        monkeypatch.setattr(place, half)

    assert profile(out=tmp_path) == code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    names = list(main_job.REPORT_FILES)
    assert f"Written to {tmp_path}: {', '.join(names[:written]) or 'nothing'}." in message
    assert f"Not written: {', '.join(names[written:])}" in message
    assert ("an earlier run's layers.csv" in message) == (written == 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"layers.csv", *names[:written]})
    assert ((tmp_path / "layers.csv").read_text() == "an earlier run's") == (written == 0)


def test_missing_matplotlib_is_reported_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert profile(out=tmp_path / "out") == 2
    assert "pip install lcw-ops[profile]" in capsys.readouterr().err


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    from lcw_ops.jobs.progress import PlainProgress, progress

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with progress("train", 2) as bar:
        assert not isinstance(bar, PlainProgress)
        bar.advance("loss 1.0")
        bar.advance("loss 0.5")
    assert "2/2" in capsys.readouterr().out


class FakeClock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("steps", "printed"),
    [
        (1, [1]),
        (10, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (25, [1, 3, 6, 9, 12, 15, 18, 21, 24, 25]),
        (150, [1, 15, 30, 45, 60, 75, 90, 105, 120, 135, 150]),
    ],
)
def test_progress_without_a_terminal_is_about_ten_lines(steps, printed, capsys):
    from lcw_ops.jobs.progress import Estimate, progress

    clock = FakeClock()
    with progress("train", steps, Estimate(steps, clock)) as bar:
        for _ in range(steps):
            clock.now += 1
            bar.advance("loss 1.0")
    left = {step: f"  about {steps - step} s left" if step < steps else "" for step in printed}
    for step in printed:
        if steps - step >= 90:
            left[step] = f"  about {(steps - step) / 60:.0f} min left"
    assert capsys.readouterr().out.splitlines() == [f"train {step}/{steps}  loss 1.0{left[step]}" for step in printed]


def test_a_slow_first_step_does_not_spoil_the_time_left():
    from lcw_ops.jobs.progress import LAST, Estimate

    clock = FakeClock()
    estimate = Estimate(30, clock)
    assert str(estimate) == ""
    for seconds in (500, 3, 2):
        clock.now += seconds
        estimate.done()
    assert str(estimate) == f"  about {27 * 3} s left"
    # Only the last steps count, in case the machine has become slower.
    for _ in range(LAST):
        clock.now += 10
        estimate.done()
    assert str(estimate) == "  about 3 min left"
    assert estimate.seconds() == 18 * 10


def test_parts_of_a_step_count_by_their_work(capsys):
    """A part gets a line when it begins, unless it is expected to be over at once."""
    from lcw_ops.jobs.progress import Estimate, progress

    clock = FakeClock()
    estimate = Estimate(10, clock)
    with progress("measure", 2, estimate) as bar:
        bar.begin("passes", 4)
        clock.now += 20
        bar.part_done(4)
        bar.begin("Jacobian", 0.2)
        clock.now += 1
        bar.part_done(0.2)
        bar.begin("layers", 0.8)
        clock.now += 4
        bar.advance("first net", 0.8)
        bar.begin("layers", 5)
        clock.now += 25
        bar.advance("second net", 5)
    assert capsys.readouterr().out.splitlines() == [
        "measure 1/2  passes",
        "measure 1/2  layers  about 29 s left",
        "measure 1/2  first net  about 25 s left",
        "measure 2/2  layers  about 25 s left",
        "measure 2/2  second net",
    ]


def test_long_steps_all_get_a_line(capsys):
    from lcw_ops.jobs.progress import QUIET_SECONDS, Estimate, progress

    clock = FakeClock()
    with progress("train", 1000, Estimate(1000, clock)) as bar:
        for _ in range(4):
            clock.now += QUIET_SECONDS
            bar.advance("loss 1.0")
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("steps", [0, 2])
def test_the_norms_of_equal_weights_are_computed_once(steps, tmp_path, monkeypatch):
    """The other two nets have the same weights. Their column is that of a profile of each of them."""
    from lcw_ops.profile import bounds
    from lcw_ops.profile.profiler import profile as whole_profile

    computed, compute = [], bounds.spectral_norm_bound
    monkeypatch.setattr(bounds, "spectral_norm_bound", lambda weight: computed.append(len(weight)) or compute(weight))
    reports = []
    monkeypatch.setattr(main_job, "_write", lambda report, *_: reports.append(report))
    assert profile("--steps", steps, out=tmp_path) == 0
    assert computed == [30, 30]
    (found,) = reports
    for kind in ("residual", "plain"):
        model = main_job.make_network(kind, found.settings, found.dataset.features, found.dataset.classes)
        inputs, targets = found.dataset.x_train[:16], found.dataset.y_train[:16]
        alone = whole_profile(model, inputs, targets, repeats=1, matmul_rate=1e11)
        for name, column in alone.columns.items():
            np.testing.assert_array_equal(found.profiles[kind].columns[name], column)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_phases_of_the_main_job_are_its_planned_work(steps, tmp_path, monkeypatch, capsys):
    """The time left reaches 0 with the last file, and every phase prints lines without carriage returns."""
    estimates = []

    class Recorded(main_job.Estimate):
        def __init__(self, work):
            super().__init__(work)
            self.total, self.counted = work, 0.0
            estimates.append(self)

        def done(self, work=1.0):
            super().done(work)
            self.counted += work

    monkeypatch.setattr(main_job, "Estimate", Recorded)
    assert profile("--steps", steps, out=tmp_path) == 0
    (estimate,) = estimates
    assert estimate.counted == pytest.approx(estimate.total)
    printed = capsys.readouterr().out
    assert "\r" not in printed
    for phase in (
        "prepare 1/",
        *(["train 1/"] if steps else []),
        "measure 1/3",
        "measure 3/3",
        "write 1/3",
        "write 3/3",
    ):
        assert phase in printed


def test_info_prints_the_text_of_the_library(capsys):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == lcw_ops.info() + "\n"


def keys(facts):
    """Every key of a JSON report except the names of ops and devices."""
    for key, value in facts.items():
        if key == "ops":
            value = next(iter(next(iter(value.values())).values()))
        yield key
        if isinstance(value, dict) and key != "not_chosen":
            yield from keys(value)


def test_info_for_programs(capsys):
    from lcw_ops import _info

    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == _info.report()
    with pytest.raises(SystemExit, match="0"):
        cli.main(["info", "--help"])
    described = capsys.readouterr().out
    assert [key for key in keys(report) if key not in described] == []


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_and_version_import_no_torch(arguments):
    """Help is instant; importing torch would take seconds. The installed command and ``python -m`` both call main()."""
    command = (
        "import sys\n"
        "from lcw_ops.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'numpy', 'triton', 'matplotlib', 'rich', 'sklearn'} & set(sys.modules)\n"
        "print(code, sorted(heavy), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert result.stderr == "0 []\n"
    if arguments == ["--version"]:
        assert result.stdout == f"lcw-ops {lcw_ops.__version__}\n"
    else:
        assert result.stdout.startswith(f"usage: {' '.join(['lcw-ops', *arguments[:-1]])} ")


def test_version_of_the_module():
    result = subprocess.run([sys.executable, "-m", "lcw_ops.cli", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"lcw-ops {lcw_ops.__version__}\n", "")


def flags_of(command):
    parser = cli.build_parser().parse_args([command]).parser
    return {flag for flag in parser._option_string_actions if flag.startswith("--")}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_no_flag_may_be_abbreviated(command, capsys):
    flags = flags_of(command)
    for flag in sorted(flags):
        for end in range(3, len(flag)):
            short = flag[:end]
            if short in flags:
                continue
            for arguments in ([short, "5"], [f"{short}=5"]):
                assert cli.main([command, *arguments]) == 2
                error = capsys.readouterr().err
                assert error.startswith(f"lcw-ops {command}: unknown: {arguments[0]}")
                assert "did you mean " in error
                assert flag in error
                assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "--dep", "5"], "lcw-ops profile: unknown: --dep 5; did you mean --depth? (see"),
        (["profile", "--de=5"], "lcw-ops profile: unknown: --de=5; did you mean --depth or --device? (see"),
        (["train", "--dpeth", "5"], "lcw-ops train: unknown: --dpeth 5; did you mean --depth? (see"),
        (["bench", "--qick", "lcw_linear"], "lcw-ops bench: unknown: --qick; did you mean --quick? (see"),
        (["info", "--jsn"], "lcw-ops info: unknown: --jsn; did you mean --json? (see"),
        (["info", "--nothing-like-it"], "lcw-ops info: unknown: --nothing-like-it (see"),
        (["info", "argument"], "lcw-ops info: unknown: argument (see lcw-ops info --help)"),
        (["--vers"], "lcw-ops: unknown: --vers; did you mean --version? (see lcw-ops --help)"),
        (
            ["--depth", "5", "train"],
            "lcw-ops: --depth stands before the command; flags of a command belong after it: "
            "lcw-ops train --depth ... (see lcw-ops --help)",
        ),
        (["--depth=5", "train", "--quick"], "lcw-ops: --depth stands before the command"),
        (
            ["--depth", "5"],
            "lcw-ops: --depth stands before the command; flags of a command belong after it: lcw-ops "
            "COMMAND --depth ...",
        ),
        (["trian"], "lcw-ops: argument COMMAND: invalid choice: 'trian'"),
        ([], "lcw-ops: expected a command: profile, train, bench, verify, info (see lcw-ops --help)"),
    ],
)
def test_an_unknown_flag_is_named_with_the_nearest_one(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("parallel_depth", ["rows.csv", "--ke", "sm_90"]),
        ("crossover", ["rows.csv", "--row", "3"]),
        ("reproduce.gradient_activation", ["--seed", "3"]),
        ("reproduce.hypersphere", ["--seed", "3"]),
        ("reproduce.lcw", ["--seed", "3"]),
        ("reproduce.lps", ["--seed", "3"]),
        ("reproduce.orthogonal_filter", ["--seed", "3"]),
        ("reproduce.parallel_depth", ["--dept", "3"]),
        ("reproduce.permuted_digits", ["--seed", "3"]),
    ],
)
def test_no_flag_of_the_benchmarks_own_commands_may_be_abbreviated(module, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"lcw_ops.bench.{module}").main(arguments)
    assert f"unrecognized arguments: {arguments[-2]}" in capsys.readouterr().err


def test_too_large_a_network_names_the_memory_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "available_memory_bytes", lambda device: 10**9)
    flags = ["--depth", "100000", "--width", "64"]
    assert profile(*flags, out=tmp_path / "out") == 2
    # Weights, gradients and Adam's two moments are 4 x 100000 x 64 x 65 float32 numbers, 6.66 GB.
    assert "need at least 6.9 GB of memory on cpu; expected at most the 1.0 GB that" in capsys.readouterr().err
    assert profile("--width", "8", out=tmp_path / "out") == 0


def test_a_batch_may_have_every_training_sample(tmp_path):
    flags = ["--depth", "1", "--steps", "0", "--batch"]
    assert profile(*flags, 1438, out=tmp_path) == 0
    assert profile(*flags, 1439, out=tmp_path) == 2


def test_the_ends_of_a_network_need_memory_too(tmp_path, monkeypatch, capsys):
    settings = main_job.Settings(depth=1, width=8)
    numbers = sum(parameter.numel() for parameter in main_job.make_network("plain", settings, 64, 10).parameters())
    # Weights, gradients, two moments and the report's rows of one layer, less one byte.
    available = 4 * 4 * numbers + main_job.ROW_BYTES - 1
    monkeypatch.setattr(machine, "available_memory_bytes", lambda device: available)
    assert profile("--depth", 1, out=tmp_path / "out") == 2
    assert "--depth and --width are 1 and 8, which need at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backend", "command", "message"),
    [
        ("bogus", ["info"], "no backend is called 'bogus'"),
        ("bogus", ["bench", "--quick"], "no backend is called 'bogus'"),
        ("bogus", ["profile", *SMALL], "no backend is called 'bogus'"),
        ("triton", ["profile", *SMALL], "backend 'triton' was requested, but"),
    ],
)
def test_a_missing_backend_is_one_line(backend, command, message, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "lcw_ops.cli", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "LCW_OPS_BACKEND": backend},
    )
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith(f"lcw-ops {command[0]}: ")
    assert message in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_middle_of_a_benchmark_is_not_the_users_mistake(monkeypatch, tmp_path, capsys):
    from lcw_ops.bench import registry

    def measure_rates(*args):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(registry, "measure_rates", measure_rates)
    arguments = ["bench", "--quick", "--device", "cpu", "--out", str(tmp_path / "a.csv")]
    assert cli.main(arguments) == 1
    assert "Traceback" in capsys.readouterr().err
    assert cli.main(["bench", "no such stem"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_bench_is_handed_to_the_runner(monkeypatch):
    from lcw_ops.bench import runner

    seen = []
    monkeypatch.setattr(runner, "add_arguments", lambda parser: parser.add_argument("--quick", action="store_true"))
    monkeypatch.setattr(runner, "prepare", lambda arguments: ("plan", arguments.quick))
    monkeypatch.setattr(runner, "carry_out", lambda plan: seen.append(plan) or 7)
    assert cli.main(["bench", "--quick"]) == 7
    assert seen == [("plan", True)]


def test_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "lcw_ops.cli", "profile", "--depth", "0"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.strip() == "lcw-ops profile: --depth is 0; expected at least 1."
