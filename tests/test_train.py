"""``lcw-ops train``: runs that were killed, damaged or resumed end with the bits of one that was never stopped."""

import csv
import errno
import io
import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from lcw_ops import cli
from lcw_ops.jobs import checkpoints, data, loop
from lcw_ops.jobs import train as job
from lcw_ops.jobs.arguments import usable_device
from lcw_ops.nn import OrthogonalFilterRNN
from lcw_ops.ops import use_backend
from lcw_ops.profile import machine

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--depth", "20", "--width", "8", "--batch", "16", "--steps", "12", "--every", "3", "--threads", "1"]
SHORT_RNN = ["--kind", "rnn", *SMALL[2:], "--depth", "70"]

# The names of the checkpoints of these steps.
STEP_6, STEP_9, STEP_12 = (f"step-{step:08d}.pt" for step in (6, 9, 12))


def train(*arguments):
    return cli.main(["train", *map(str, arguments)])


def outcome(folder):
    """The weights and the log of a run. Weights are tensors, so that a message can name those that differ."""
    return torch.load(folder / "model.pt", weights_only=True), (folder / "metrics.csv").read_text()


def assert_same_outcome(folder, expected):
    (weights, log), (expected_weights, expected_log) = outcome(folder), outcome(expected)
    assert log == expected_log
    assert weights.keys() == expected_weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, one_thread):
    """flags -> the folder of a run without checkpoints; each is made once."""
    made = {}

    def folder(flags):
        if tuple(flags) not in made:
            made[tuple(flags)] = tmp_path_factory.mktemp("uninterrupted")
            assert train(*flags, "--out", made[tuple(flags)]) == 0
        return made[tuple(flags)]

    return folder


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A folder with the checkpoints of steps 6 and 9, from a run that was stopped after step 10."""
    folder = tmp_path / "checkpoints"
    stop_after(10, monkeypatch, *SMALL, "--checkpoint", folder)
    return folder


def stop_after(step, monkeypatch, *arguments, error=KeyboardInterrupt):
    """Run until ``error`` is raised between the end of this step and the next one."""
    with monkeypatch.context() as patch:
        real = loop.Training.step

        def stopping(training):
            if training.done == step:
                raise error
            return real(training)

        patch.setattr(loop.Training, "step", stopping)
        return train(*arguments)


def test_a_run_reports_its_figures_and_writes_its_files(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert train(*SMALL, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "mlp of 20 layers, width 8, tanh, filter permutation: 2,050 parameters" in printed
    assert "train 12/12  loss " in printed
    final = printed.splitlines()[-3]
    assert names(out) == ["metrics.csv", "model.pt"]
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(13))
    assert [int(row["step"]) for row in rows if row["test_accuracy"]] == [0, 2, 4, 6, 8, 10, 12]
    assert rows[0]["loss"] == ""
    loss, accuracy = float(rows[-1]["loss"]), float(rows[-1]["test_accuracy"])
    assert final.startswith(f"after 12 steps: train loss {loss:.4f}, test accuracy {accuracy:.2%}; ")
    assert final.endswith(" s")

    settings = job.complete(job.Settings(depth=20, width=8), data.load("digits"))
    model = job.make_network(settings, 64, 10)
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    assert loop.accuracy(model, data.load("digits")) == accuracy


def test_a_run_without_a_seed_has_the_seed_0(uninterrupted):
    assert_same_outcome(uninterrupted(SMALL), uninterrupted([*SMALL, "--seed", "0"]))


def test_without_folders_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(*SMALL) == 0
    assert names(tmp_path) == []


@pytest.mark.parametrize(("kind", "reached"), [("mlp", 0.95), ("rnn", 0.95)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_defaults_learn_the_digits(kind, reached, seed, tmp_path):
    """At 300 layers, which train like 50,000 because beta = c / depth, and over the 64 steps of an image."""
    depth = ["--depth", "300"] if kind == "mlp" else []
    assert train("--kind", kind, *depth, "--seed", seed, "--threads", 1, "--out", tmp_path) == 0
    accuracy = float((tmp_path / "metrics.csv").read_text().split(",")[-1])
    print(f"{kind}, seed {seed}: test accuracy {accuracy:.2%}")
    assert accuracy >= reached


# --- stopped and resumed


@pytest.mark.parametrize("step", [2, 3, 7, 11])
@pytest.mark.parametrize(
    "flags",
    [SMALL, [*SMALL, "--filter", "haar", "--activation", "relu", "--c", "2", "--seed", "5"], SHORT_RNN],
    ids=["mlp", "mlp haar", "rnn"],
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(flags, step, tmp_path, monkeypatch, uninterrupted, capsys):
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    assert stop_after(step, monkeypatch, *flags, "--checkpoint", folder) == 130
    last = step // 3 * 3
    said = capsys.readouterr().err.strip().splitlines()[-1]
    way_on = f"--resume continues after step {last}" if last else f"No checkpoint in {folder} yet"
    assert said == f"interrupted. {way_on}"
    # Other code in a process draws random numbers too.
    torch.manual_seed(99)
    torch.rand(7)
    assert train(*flags, "--checkpoint", folder, "--resume", "--out", out) == 0
    printed = capsys.readouterr().out
    assert (f"continuing after step {last}, from {folder}" if last else "starting from step 0") in printed
    assert_same_outcome(out, uninterrupted(flags))


def test_checkpoints_themselves_are_those_of_an_uninterrupted_run(stopped, tmp_path):
    assert train(*SMALL, "--checkpoint", tmp_path / "whole") == 0
    assert train(*SMALL, "--checkpoint", stopped, "--resume") == 0
    assert names(stopped) == names(tmp_path / "whole") == [STEP_9, STEP_12]
    resumed, whole = (checkpoints.read(folder / STEP_12) for folder in (stopped, tmp_path / "whole"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
    # A checkpoint holds all that a step depends on: a net, Adam's moments, the order of samples, random numbers.
    assert {"done", "order", "order_generator", "generator", "configuration", "log.loss"} < set(whole)
    assert {f"adam.weight.{name}" for name in ("step", "exp_avg", "exp_avg_sq")} < set(whole)
    # Two moments and the weights. A slice saved with its whole storage would be larger.
    assert (stopped / STEP_12).stat().st_size < 3 * 4 * 2050 + 40_000


def test_tensors_keep_their_types_and_the_file_needs_no_code(stopped):
    tensors = torch.load(stopped / STEP_9, weights_only=True)
    assert {type(tensor) for tensor in tensors.values()} == {torch.Tensor}
    assert (tensors["model.weight"].dtype, tensors["model.filter"].dtype) == (torch.float32, torch.int64)
    settings = json.loads(bytes(tensors["configuration"].tolist()))
    assert (settings["depth"], settings["filter"], settings["threads"]) == (20, "permutation", 1)


def test_a_finished_run_is_resumed_without_a_step(tmp_path, monkeypatch, uninterrupted, capsys):
    folder, out, expected = tmp_path / "checkpoints", tmp_path / "out", uninterrupted(SMALL)
    assert train(*SMALL, "--checkpoint", folder) == 0
    monkeypatch.setattr(loop.Training, "step", lambda training: pytest.fail("a step too many"))
    assert train(*SMALL, "--checkpoint", folder, "--resume", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "all 12 steps are done; give a larger --steps to continue\n" in printed
    assert "continuing" not in printed
    assert_same_outcome(out, expected)


# --- with another number of steps


def of_steps(steps, flags=SMALL):
    """The flags for a run of this many steps."""
    flags = list(flags)
    flags[flags.index("--steps") + 1] = str(steps)
    return flags


def weights(folder):
    return outcome(folder)[0]


def assert_same_weights(folder, expected):
    (found, log), (wanted, expected_log) = outcome(folder), outcome(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    # Every step has a loss; the accuracies are measured at other steps.
    losses, expected_losses = ([line.split(",")[1] for line in text.splitlines()] for text in (log, expected_log))
    assert losses == expected_losses


@pytest.mark.parametrize("flags", [SMALL, SHORT_RNN], ids=["mlp", "rnn"])
def test_a_finished_run_at_a_constant_rate_continues_bit_for_bit(flags, tmp_path, uninterrupted, capsys):
    """3 steps, then 6, then 12 give the weights of 12 at once."""
    flags = [*flags, "--schedule", "constant"]
    folder, out = ["--checkpoint", tmp_path / "checkpoints"], tmp_path / "out"
    assert train(*of_steps(3, flags), *folder) == 0
    assert train(*of_steps(6, flags), *folder, "--resume") == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "note: --steps was 3, is 6: the weights will be those of 6 steps at once; evaluations come at other steps\n"
    )
    assert "continuing after step 3" in captured.out
    assert "after 6 steps: " in captured.out
    assert train(*of_steps(12, flags), *folder, "--resume", "--out", out) == 0
    assert_same_weights(out, uninterrupted(flags))


def test_a_run_whose_rate_did_not_fall_yet_continues_bit_for_bit(tmp_path, monkeypatch, uninterrupted, capsys):
    """The first six steps are at the full rate, in a run of 12 steps and in one of 24."""
    folder, out = ["--checkpoint", tmp_path / "checkpoints"], tmp_path / "out"
    assert stop_after(7, monkeypatch, *SMALL, *folder) == 130
    capsys.readouterr()
    assert train(*of_steps(24), *folder, "--resume", "--out", out) == 0
    assert "is 24: the weights will be those of 24 steps at once" in capsys.readouterr().err
    assert_same_weights(out, uninterrupted(of_steps(24)))


def test_a_run_whose_rate_fell_continues_and_reports_what_changes(tmp_path, uninterrupted, capsys):
    folder, out = ["--checkpoint", tmp_path / "checkpoints"], tmp_path / "out"
    assert train(*of_steps(3), *folder) == 0
    assert train(*of_steps(6), *folder, "--resume", "--every", "1", "--out", out) == 0
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "--steps was 3, is 6: the result will not be that of 6 steps at once" in said
    # The checkpoint's own schedule cannot be changed.
    assert "(a new run with --schedule constant would keep it)" in said
    assert [line.split(",")[0] for line in (out / "metrics.csv").read_text().splitlines()[1:]] == list("0123456")
    assert not torch.equal(weights(out)["weight"], weights(uninterrupted(of_steps(6)))["weight"])


def test_a_rate_that_fell_once_is_remembered(tmp_path, monkeypatch, capsys):
    """A run of 3 steps is continued to 4 of 6, then to 12.

    Runs of 6 and of 12 steps have the same first four rates, but the third step was made at the rate of a run of 3.
    """
    folder = ["--checkpoint", tmp_path / "checkpoints"]
    assert train(*of_steps(3), *folder) == 0
    assert stop_after(5, monkeypatch, *of_steps(6), *folder, "--resume", "--every", "2") == 130
    capsys.readouterr()
    assert train(*of_steps(12), *folder, "--resume") == 0
    captured = capsys.readouterr()
    assert "continuing after step 4" in captured.out
    assert "the result will not be that of 12 steps at once" in captured.err


def test_epochs_extend_a_run_too(tmp_path, capsys):
    # 1438 samples make 89 whole batches of 16.
    flags = [flag for flag in SMALL if flag not in ("--steps", "12")]
    folder = ["--checkpoint", tmp_path / "checkpoints"]
    assert train(*of_steps(88), *folder) == 0
    assert train(*flags, "--epochs", "1", *folder, "--resume") == 0
    captured = capsys.readouterr()
    assert "note: --steps was 88, is 89: " in captured.err
    assert "after 89 steps: " in captured.out


def test_without_steps_the_number_is_that_of_the_checkpoint(stopped, tmp_path, uninterrupted, capsys):
    """The command's default, which is another number, does not apply."""
    flags = [flag for flag in SMALL if flag not in ("--steps", "12")]
    assert train(*flags, "--checkpoint", stopped, "--resume", "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "after 12 steps: " in captured.out
    assert_same_outcome(tmp_path / "out", uninterrupted(SMALL))


def test_fewer_steps_than_were_planned(stopped, tmp_path, capsys):
    """The accuracy after step 9 was not measured on the way: the longer run did not evaluate there."""
    assert train(*of_steps(9), "--checkpoint", stopped, "--resume", "--out", tmp_path / "out") == 0
    assert "note: --steps was 12, is 9: " in capsys.readouterr().err
    last = (tmp_path / "out" / "metrics.csv").read_text().splitlines()[-1].split(",")
    model = job.make_network(job.complete(job.Settings(depth=20, width=8), data.load("digits")), 64, 10)
    model.load_state_dict(weights(tmp_path / "out"))
    assert (last[0], float(last[2])) == ("9", loop.accuracy(model, data.load("digits")))


def test_checkpoints_without_a_schedule_have_a_falling_one(stopped, tmp_path, uninterrupted, monkeypatch):
    """Checkpoints of the first version have no schedule."""
    real = job._configuration_of

    def of_the_first_version(tensors):
        found = real(tensors)
        return job.FIRST_CONFIGURATION | {name: found[name] for name in found if name not in job.FIRST_CONFIGURATION}

    monkeypatch.setattr(job, "_configuration_of", of_the_first_version)
    assert train(*SMALL, "--checkpoint", stopped, "--resume", "--out", tmp_path / "out") == 0
    assert_same_outcome(tmp_path / "out", uninterrupted(SMALL))


def test_flags_that_may_change_on_resume(stopped, tmp_path, uninterrupted):
    """These may change: how often and where results are written, and the flags that ask for the same steps."""
    flags = [*SMALL[:6], "--steps", "12", "--every", "5", "--threads", "1"]
    assert train(*flags, "--checkpoint", stopped, "--resume", "--out", tmp_path / "elsewhere") == 0
    assert names(stopped) == ["step-00000010.pt", STEP_12]
    assert_same_outcome(tmp_path / "elsewhere", uninterrupted(SMALL))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind", "rnn", "--depth", "64"], "--kind is rnn; expected mlp, as in the checkpoint. Give --kind mlp"),
        (["--depth", "21"], "--depth is 21; expected 20, as in the checkpoint"),
        (["--width", "9"], "--width is 9; expected 8, as in the checkpoint"),
        (["--batch", "17"], "--batch is 17"),
        (["--steps", "8"], "--steps is 8; expected at least the 9 that the checkpoint has done"),
        (["--lr", "0.05"], "--lr is 0.05; expected 0.04, as in the checkpoint"),
        (
            ["--schedule", "constant"],
            "--schedule is constant; expected falling, as in the checkpoint. Give --schedule falling",
        ),
        (["--c", "1.5"], "--c is 1.5; expected 1.0, as in the checkpoint"),
        (["--filter", "cyclic"], "--filter is cyclic"),
        (["--activation", "relu"], "--activation is relu"),
        (["--seed", "1"], "--seed is 1"),
        (["--threads", "2"], "--threads is 2; expected 1, as in the checkpoint. Give --threads 1"),
    ],
)
def test_another_configuration_is_refused_and_named(flags, message, stopped, capsys):
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    try:
        assert train(*SMALL, "--checkpoint", stopped, "--resume", *flags) == 2
    finally:
        torch.set_num_threads(1)
    error = capsys.readouterr().err
    assert error.startswith("lcw-ops train: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in stopped.iterdir()} == before


def test_data_is_identified_by_its_content(tmp_path, monkeypatch, capsys):
    arrays = {"x": np.random.default_rng(0).normal(size=(60, 5)), "y": np.arange(60) % 3}
    np.savez(tmp_path / "a.npz", **arrays)
    flags = [*SMALL, "--checkpoint", tmp_path / "checkpoints"]
    assert stop_after(7, monkeypatch, *flags, "--data", tmp_path / "a.npz") == 130
    np.savez(tmp_path / "b.npz", **{**arrays, "x": arrays["x"] + np.eye(60, 5)})
    assert train(*flags, "--resume", "--data", tmp_path / "b.npz") == 2
    assert "--data has other content than the checkpoint's training data; expected the same" in capsys.readouterr().err
    os.replace(tmp_path / "a.npz", tmp_path / "moved.npz")
    assert train(*flags, "--resume", "--data", tmp_path / "moved.npz") == 0


def test_other_versions_are_reported(stopped, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert train(*SMALL, "--checkpoint", stopped, "--resume") == 0
    assert ", is 9.9: the last bits may differ" in capsys.readouterr().err


def test_other_instruction_sets_are_reported(stopped, monkeypatch, capsys):
    monkeypatch.setenv("LCW_OPS_CPU_CAPABILITY", "portable")
    assert train(*SMALL, "--checkpoint", stopped, "--resume") == 0
    note = "note: LCW_OPS_CPU_CAPABILITY was None, is portable: the last bits may differ"
    assert capsys.readouterr().err.strip() == note


def test_a_format_of_later_versions_is_refused(stopped, monkeypatch, capsys):
    monkeypatch.setattr(job, "FORMAT", 2)
    assert train(*SMALL, "--checkpoint", stopped, "--resume") == 2
    assert "have format 1; expected format 2, which this version reads" in capsys.readouterr().err


# --- kill -9


def run_and_hang(steps, *arguments):
    """Run this many steps and then hang, so that a late kill still finds a process."""
    step, done = loop.Training.step, 0

    def counted_step(training):
        nonlocal done
        if done == steps:
            time.sleep(600)
        done += 1
        return step(training)

    loop.Training.step = counted_step
    train(*arguments)


def run_and_die(place, last_write, *arguments):
    """Kill this process during checkpoint number ``last_write``: with "half" of the file written, or "before the name"
    of the checkpoint is given to the file, or "after the name".
    """
    save, replace, writes = torch.save, os.replace, 0

    def counted_save(tensors, file):
        nonlocal writes
        writes += 1
        if writes == last_write and place == "half":
            whole = io.BytesIO()
            save(tensors, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, file)

    def counted_replace(source, target):
        if writes == last_write and place == "before the name":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if writes == last_write and place == "after the name":
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save, os.replace = counted_save, counted_replace
    train(*arguments)


@pytest.fixture
def start():
    """start(function, *arguments): a process from a server that has already done the slow imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lcw_ops.cli", "lcw_ops.jobs.train"])

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return start


def test_a_killed_process_resumes_bit_for_bit(tmp_path, uninterrupted, start):
    """One run survives six deaths: three at chosen moments of a write, three at random times."""
    digits = data.load("digits")
    np.savez(tmp_path / "digits.npz", x=digits.x_train, y=digits.y_train)
    flags = ["--depth", "200", "--width", "16", "--batch", "16", "--steps", "60", "--every", "1", "--threads", "1"]
    flags += ["--data", str(tmp_path / "digits.npz")]
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    resume = [*flags, "--checkpoint", str(folder), "--out", str(out), "--resume"]

    def reached():
        return max(checkpoints.steps_in(folder), default=0)

    for place, written in (("half", 0), ("before the name", 0), ("after the name", 1)):
        before = reached()
        # The process dies in its fourth write, so three are whole.
        process = start(run_and_die, place, 4, *resume)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert reached() == before + 3 + written
        # The file being written has a name of its own, not a checkpoint's.
        assert any(name.endswith(".part") for name in names(folder)) == (not written)

    moments = random.Random(time.time_ns())
    for _ in range(3):
        before, delay = reached(), moments.uniform(0.0, 0.1)
        process = start(run_and_hang, 12, *resume)
        while reached() < before + 2:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert before + 2 <= reached() <= before + 12
        print(f"killed {delay * 1e3:.0f} ms after step {before + 2}, at step {reached()}; left {names(folder)}")

    assert train(*resume) == 0
    assert names(folder) == ["step-00000059.pt", "step-00000060.pt"]
    assert_same_outcome(out, uninterrupted(flags))


def test_the_order_of_a_write_survives_a_power_cut(tmp_path, monkeypatch):
    """Write the content to the disk, then the name, then the folder to the disk; only then remove old checkpoints."""
    calls = []
    fsync, replace, unlink = os.fsync, os.replace, checkpoints.Path.unlink

    def logged_fsync(descriptor):
        calls.append("sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("name"), replace(*paths)))

    def logged_unlink(path, *args, **kwargs):
        if path.suffix == ".pt":
            calls.append("unlink")
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(checkpoints.Path, "unlink", logged_unlink)
    for step in (1, 2, 3):
        checkpoints.write(tmp_path, step, {"done": torch.tensor(step)})
    assert calls == 2 * ["sync file", "name", "sync folder"] + ["sync file", "name", "sync folder", "unlink"]
    assert checkpoints.steps_in(tmp_path) == [2, 3]


def test_new_folders_survive_a_power_cut(tmp_path, monkeypatch):
    """The name of a new folder is in its parent, which is written to the disk as well."""
    synced = []
    monkeypatch.setattr(checkpoints, "_sync", synced.append)
    with checkpoints.owned(tmp_path / "new" / "run"):
        assert set(synced) == {tmp_path, tmp_path / "new", tmp_path / "new" / "run"}
    synced.clear()
    with checkpoints.owned(tmp_path / "new" / "run"):
        assert synced == [tmp_path / "new" / "run"]


def test_only_its_own_names_are_checkpoints(tmp_path):
    for name in ("step-40.pt", "step-0000000040.pt", "step-00000041.pt.bak", "step-x.pt", "a-step-00000042.pt"):
        (tmp_path / name).touch()
    assert checkpoints.steps_in(tmp_path) == []
    for step in (7, 123456789):
        checkpoints.write(tmp_path, step, {"done": torch.tensor(step)})
    assert checkpoints.steps_in(tmp_path) == [7, 123456789]
    assert checkpoints.newest(tmp_path)["done"] == 123456789


def test_files_of_dead_processes_are_removed(stopped):
    (stopped / ".step-00000012.pt.999999999.part").write_text("half")
    (stopped / ".other").write_text("not ours")
    with checkpoints.owned(stopped):
        assert names(stopped) == [".other", STEP_6, STEP_9]


def test_one_process_at_a_time(stopped, capsys):
    with checkpoints.owned(stopped):
        assert train(*SMALL, "--checkpoint", stopped, "--resume") == 2
        assert "another process is training in the folder" in capsys.readouterr().err
        # Only the owner looks at the contents of the folder.
        assert train(*SMALL, "--checkpoint", stopped) == 2
        assert "another process is training in the folder" in capsys.readouterr().err
    assert train(*SMALL, "--checkpoint", stopped, "--resume") == 0


def test_a_foreign_lock_file_keeps_its_content(tmp_path):
    (tmp_path / ".lock").write_text("theirs")
    (tmp_path / "file").touch()
    assert train(*SMALL, "--checkpoint", tmp_path) == 2
    assert (tmp_path / ".lock").read_text() == "theirs"


# --- damaged files


def truncated(content):
    return content[: len(content) // 2]


def emptied(content):
    return b""


def flipped(content):
    """Flip one bit in the middle of the weights."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def zeroed_end(content):
    """A state in which a file system may leave a file that was never synced."""
    return content[:-4096] + bytes(4096)


def text(content):
    return b"no checkpoint\n"


def longer(content):
    return content + b"0"


def without_a_digest(content):
    """A file that torch.save wrote without our digest, as another program would."""
    return content[:-32]


DAMAGES = [truncated, emptied, flipped, zeroed_end, text, longer, without_a_digest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, stopped, tmp_path, uninterrupted, capsys):
    path = stopped / STEP_9
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    assert train(*SMALL, "--checkpoint", stopped, "--resume", "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert f"{path} is damaged: " in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert "continuing after step 6" in captured.out
    assert_same_outcome(tmp_path / "out", uninterrupted(SMALL))
    assert names(stopped) == ["step-00000009.damaged", STEP_9, STEP_12]
    assert (stopped / "step-00000009.damaged").read_bytes() == damaged


def opening_fails_with(code, monkeypatch):
    """Make the newest checkpoint fail to open; the one before it opens."""

    def failing_open(path, *arguments, **options):
        if str(path).endswith(STEP_9):
            raise OSError(code, os.strerror(code), str(path))
        return open(path, *arguments, **options)

    monkeypatch.setattr(checkpoints, "open", failing_open, raising=False)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ENOENT])
def test_a_checkpoint_that_cannot_be_opened_is_not_damaged(code, stopped, monkeypatch, tmp_path, uninterrupted, capsys):
    """Falling back to an older one would lose steps, and renaming the newest would hide it for good."""
    with monkeypatch.context() as patch:
        opening_fails_with(code, patch)
        assert train(*SMALL, "--checkpoint", stopped, "--resume") == 2
    error = capsys.readouterr().err
    assert os.strerror(code) in error
    assert STEP_9 in error
    assert len(error.strip().splitlines()) == 1
    assert names(stopped) == [STEP_6, STEP_9]
    assert train(*SMALL, "--checkpoint", stopped, "--resume", "--out", tmp_path / "out") == 0
    assert "continuing after step 9" in capsys.readouterr().out
    assert_same_outcome(tmp_path / "out", uninterrupted(SMALL))


def test_a_read_error_of_the_disk_counts_as_damage(stopped, monkeypatch, capsys):
    opening_fails_with(errno.EIO, monkeypatch)
    assert checkpoints.newest(stopped)["done"] == 6
    assert f"{stopped / STEP_9} is damaged: {os.strerror(errno.EIO)}" in capsys.readouterr().err
    assert names(stopped) == [STEP_6, "step-00000009.damaged"]


@pytest.mark.parametrize("damage", [truncated, text])
def test_with_every_checkpoint_damaged_nothing_is_lost(damage, stopped, capsys):
    for name in (STEP_6, STEP_9):
        (stopped / name).write_bytes(damage((stopped / name).read_bytes()))
    for _ in range(2):
        assert train(*SMALL, "--checkpoint", stopped, "--resume") == 2
        error = capsys.readouterr().err
        assert "every checkpoint is damaged; expected a checkpoint that can be read. Give another" in error
        assert "Traceback" not in error
        assert names(stopped) == [STEP_6, STEP_9]


def test_no_damage_goes_unnoticed(stopped):
    """Cut the file to many lengths, and change bytes all over it."""
    path = stopped / STEP_9
    content = path.read_bytes()
    randoms = random.Random(0)
    for length in (*range(0, 100), *randoms.sample(range(len(content)), 100), *range(len(content) - 100, len(content))):
        path.write_bytes(content[:length])
        with pytest.raises(checkpoints.DamagedError):
            checkpoints.read(path)
    # The archive's own directory is at the end: a wrong byte there may lead to other tensors with valid checksums.
    places = randoms.sample(range(len(content)), 200) + randoms.sample(range(len(content) - 4000, len(content)), 200)
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ randoms.randrange(1, 256)]) + content[place + 1 :])
        with pytest.raises(checkpoints.DamagedError):
            checkpoints.read(path)


# --- folders


def test_an_empty_or_absent_folder_is_a_fresh_start(tmp_path, uninterrupted, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        out = tmp_path / f"out of {name}"
        assert train(*SMALL, "--checkpoint", tmp_path / name, "--resume", "--out", out) == 0
        assert f"no checkpoint in {tmp_path / name}: starting from step 0" in capsys.readouterr().out
        assert_same_outcome(out, uninterrupted(SMALL))


def test_without_resume_a_folder_must_be_empty(stopped, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("precious")
    for folder, message in (
        (stopped, "checkpoints up to step 9; expected an empty folder. Add --resume to continue"),
        (tmp_path / "thesis", "files"),
    ):
        before = names(folder)
        assert train(*SMALL, "--checkpoint", folder) == 2
        error = capsys.readouterr().err
        assert f"--checkpoint is {folder}, which holds {message}" in error
        assert len(error.strip().splitlines()) == 1
        assert names(folder) == before


def test_a_full_disk_is_reported_before_any_work(tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(job.shutil, "disk_usage", lambda folder: usage)
    # 50,000 layers of width 32: the weights and two moments are 3 x 4 x 52.8 million bytes.
    assert train("--checkpoint", tmp_path / "a") == 2
    assert (
        "checkpoints of 0.6 GB need 1.9 GB more; expected at most the 0.0 GB that are free" in capsys.readouterr().err
    )
    assert train(*SMALL, "--checkpoint", tmp_path / "b") == 0


def test_a_failed_write_keeps_the_checkpoints_before_it(tmp_path, monkeypatch, capsys, uninterrupted):
    real, writes = torch.save, []

    def full(tensors, file):
        writes.append(file)
        if len(writes) == 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, file)

    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert train(*SMALL, "--checkpoint", folder) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == "failed: OSError: [Errno 28] No space left on device. --resume continues after step 6"
    assert names(folder) == ["step-00000003.pt", STEP_6]
    assert train(*SMALL, "--checkpoint", folder, "--resume", "--out", out) == 0
    assert_same_outcome(out, uninterrupted(SMALL))


def test_a_run_that_diverges_stops_before_it_replaces_a_checkpoint(tmp_path, capsys):
    assert train(*SMALL, "--lr", "1e38", "--every", "1", "--checkpoint", tmp_path) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    step = int(error.split(" at step ")[1].split(":")[0])
    assert "failed: ArithmeticError: the loss is nan at step" in error or "the loss is inf at step" in error
    assert checkpoints.steps_in(tmp_path)[-1] == step - 1


def test_an_unavailable_backend_is_reported(capsys):
    with use_backend("cuda"):
        assert train(*SMALL) == 2
    error = capsys.readouterr().err
    assert error.startswith("lcw-ops train: ")
    assert "backend 'cuda' was requested, but" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("flag", ["--checkpoint", "--out"])
def test_a_folder_that_cannot_be_written(flag, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert train(*SMALL, flag, folder) == 2
        error = capsys.readouterr().err
        assert "cannot write to the folder" in error
        assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--depth", "0"],
        ["--width", "-1"],
        ["--width", "300000"],
        ["--depth", "1000000000000"],
        ["--batch", "0"],
        ["--batch", "100000"],
        ["--steps", "0"],
        ["--epochs", "0"],
        ["--epochs", "2"],
        ["--every", "0"],
        ["--lr", "nan"],
        ["--lr", "0"],
        ["--c", "0"],
        ["--c", "inf"],
        ["--c", "21"],
        ["--seed", "-1"],
        ["--threads", "0"],
        ["--kind", "cnn"],
        ["--schedule", "cosine"],
        ["--kind", "rnn"],
        ["--filter", "random"],
        ["--activation", "gelu"],
        ["--device", "toaster"],
        ["--device", "meta"],
        ["--data", "absent.npz"],
        ["--checkpoint="],
        ["--out="],
        ["--unknown"],
    ],
    ids=" ".join,
)
def test_every_mistake_is_one_line_and_code_2(flags, tmp_path, capsys):
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    assert train(*SMALL, "--checkpoint", folder, "--out", out, *flags) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.err.startswith("lcw-ops train: ")
    assert names(tmp_path) == []


def test_resume_needs_a_folder(capsys):
    assert train(*SMALL, "--resume") == 2
    assert (
        capsys.readouterr().err
        == "lcw-ops train: --checkpoint is not given; expected the folder that --resume continues from.\n"
    )


def test_a_failure_without_checkpoints_says_what_is_lost(monkeypatch, capsys):
    assert stop_after(3, monkeypatch, *SMALL, error=RuntimeError("no luck")) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("failed: RuntimeError: no luck. Without --checkpoint nothing was kept\n")


# --- settings and networks


def test_epochs_are_steps():
    digits = data.load("digits")
    settings = job.complete(job.Settings(epochs=3, batch=100), digits)
    # 1438 samples make 14 whole batches.
    assert settings.steps == 42


def test_settings_may_just_fit_the_data():
    digits = data.load("digits")
    assert job.complete(job.Settings(epochs=3, batch=len(digits.x_train)), digits).steps == 3
    with pytest.raises(ValueError, match="--batch is 1439; expected at most the 1438 samples"):
        job.complete(job.Settings(epochs=3, batch=1439), digits)
    assert job.complete(job.Settings(depth=2, c=2.0), digits).c == 2.0
    with pytest.raises(ValueError, match=r"--c is 2.1; expected at most the depth of 2"):
        job.complete(job.Settings(depth=2, c=2.1), digits)


@pytest.mark.parametrize(("processors", "most"), [(8, 32), (1, 4), (None, 4)])
def test_threads_are_at_most_four_for_every_processor(processors, most, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    job.Settings(threads=most).check()
    with pytest.raises(ValueError, match=f"--threads is {most + 1}; expected from 1 to {most}"):
        job.Settings(threads=most + 1).check()


@pytest.mark.parametrize("kind", job.KINDS)
def test_parameters_are_counted_and_defaults_filled_in(kind):
    digits = data.load("digits")
    settings = job.complete(job.Settings(kind=kind, depth=70), digits)
    assert {name for name, value in vars(settings).items() if value is None} == {
        "epochs", "threads", "checkpoint", "out",
    }  # fmt: skip
    assert settings.c == job.DEFAULTS[kind]["c"]
    model = job.make_network(settings, 64, 10)
    assert job.parameter_count(settings, 64, 10) == sum(parameter.numel() for parameter in model.parameters())


def test_an_rnn_reads_pixel_by_pixel_and_then_nothing():
    settings = job.complete(job.Settings(kind="rnn", width=8, depth=100), data.load("digits"))
    model = job.make_network(settings, 64, 10)
    x = torch.randn(5, 64)
    alone = OrthogonalFilterRNN(1, 8, beta=2 / 100)
    alone.load_state_dict(model.recurrence.state_dict())
    sequence = torch.zeros(100, 5, 1)
    for t in range(64):
        sequence[t, :, 0] = x[:, t]
    expected = model.output_layer(alone(sequence)[0][-1] * (100 / 64))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    # The result depends on every pixel.
    x.requires_grad_()
    model(x).square().sum().backward()
    assert (x.grad != 0).all()


def test_depth_of_an_rnn_is_at_least_the_features():
    digits = data.load("digits")
    assert job.complete(job.Settings(kind="rnn"), digits).depth == 64
    with pytest.raises(ValueError, match="--depth is 63; expected at least 64 time steps"):
        job.complete(job.Settings(kind="rnn", depth=63), digits)


def test_too_long_a_sequence_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(machine, "available_memory_bytes", lambda device: 10**9)
    assert train("--kind", "rnn", "--depth", "100000") == 2
    # The input's part U x of every step, the states, and the gradients of both: 4 x 4 x 100000 x 64 x 64 bytes.
    assert (
        "need at least 6.6 GB of memory on cpu; expected at most the 1.0 GB that are available"
        in capsys.readouterr().err
    )


def test_a_network_may_need_all_of_the_memory(monkeypatch):
    # Weights, gradients and two moments of 2,050 parameters.
    for missing, code in ((0, 0), (1, 2)):
        monkeypatch.setattr(machine, "available_memory_bytes", lambda device, missing=missing: 4 * 4 * 2050 - missing)
        assert train(*SMALL) == code


def test_each_epoch_sees_every_sample_once():
    digits = data.Dataset("ten", torch.arange(10.0)[:, None], torch.zeros(10, dtype=torch.int64), None, None, 1)
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, 1))

        def forward(self, x):
            seen.extend(x[:, 0].tolist())
            return x * self.weight

    training = loop.Training(Spy(), digits, steps=6, batch=5, lr=0.1, seed=0)
    for _ in range(6):
        training.step()
    assert [sorted(seen[i : i + 10]) for i in (0, 10, 20)] == 3 * [list(range(10))]
    assert seen[:10] != seen[10:20]


def test_the_rate_is_full_for_half_of_the_steps_then_falls_to_0():
    model = torch.nn.Linear(1, 2)
    digits = data.Dataset("one", torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), None, None, 2)
    training = loop.Training(model, digits, steps=8, batch=1, lr=0.1, seed=0)
    rates = []
    for _ in range(8):
        training.step()
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1] * 5 + [0.075, 0.05, 0.025])


def test_a_constant_rate_stays():
    digits = data.Dataset("one", torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), None, None, 2)
    training = loop.Training(torch.nn.Linear(1, 2), digits, steps=4, batch=1, lr=0.1, seed=0, schedule="constant")
    for _ in range(4):
        training.step()
        assert training.optimizer.param_groups[0]["lr"] == 0.1


def test_accuracy_does_not_depend_on_the_batch_size():
    digits = data.load("digits")
    model = torch.nn.Linear(64, 10)
    exact = (model(digits.x_test).argmax(1) == digits.y_test).double().mean().item()
    assert (
        loop.accuracy(model, digits) == loop.accuracy(model, digits, 7) == loop.accuracy(model, digits, 1000) == exact
    )


def test_an_unusable_device_is_refused():
    with pytest.raises(ValueError, match="--device is meta, which cannot be used"):
        usable_device("meta")
