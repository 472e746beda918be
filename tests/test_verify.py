"""``lcw-ops verify`` with a device that is played by a fake child: verdicts, their files, and the choices they make.

Nothing here runs on a GPU. test_verify_kernels.py runs real kernels on the CPU.
"""

import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
from support import fake_verification
from torch._dynamo.testing import CompileCounter

import lcw_ops
from lcw_ops import _files, _info, cli, verification
from lcw_ops.ops import backends, verdicts
from lcw_ops.ops.verdicts import Kind
from lcw_ops.verification import Refused, cases, child, keeping, preconditions, processes, speeds, verify, work

CARD = torch.device("cuda", 0)
GAF, LCW = "gradient_activation_", "lcw_weight"
NARROW, WIDE = Kind("float32", "up to 1024"), Kind("float32", "up to 4096")


def forget():
    """Forget what this process has read, as a new process would."""
    for cached in (verdicts._are_kept, verdicts.find, verdicts._shipped, verdicts.collect_facts):
        cached.cache_clear()
    backends._resolve.cache_clear()
    backends._warn_once.cache_clear()
    backends._has_warned_unproven = False


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LCW_OPS_CACHE_DIR", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


@pytest.fixture
def card(folder, monkeypatch):
    """A card whose kernels all could run; only the fake child knows more about it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    able = {op: (*names, "reference") for op, names in backends.IMPLEMENTED.items()}
    monkeypatch.setattr(
        backends, "missing_reason", lambda op, backend, device_type: None if backend in able[op] else "no kernel"
    )
    monkeypatch.setattr(backends, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(verdicts, "_gpu_facts", lambda device: dict(itertools.islice(FACTS.items(), 5)))
    monkeypatch.setattr(verdicts, "_hash_kernels", lambda backend: f"hash of {backend}")
    monkeypatch.setattr(verdicts, "_installed", lambda package: FACTS["triton"])
    monkeypatch.setattr(torch.version, "cuda", FACTS["cuda"])
    monkeypatch.setattr(torch, "__version__", FACTS["torch"])
    monkeypatch.setattr(preconditions.shutil, "which", lambda name: None)
    return CARD


FACTS = fake_verification.FACTS


@pytest.fixture
def behave(monkeypatch, tmp_path):
    """Call it with a behaviour of the fake child. Returns the lines of the jobs that children got."""
    log = tmp_path / "log"

    def set_behaviour(behaviour: str):
        command = [sys.executable, fake_verification.__file__, behaviour, str(log)]
        monkeypatch.setattr(processes, "COMMAND", command)
        monkeypatch.setattr(processes, "CASE_SECONDS", 0.5 if "hangs" in behaviour else 20.0)
        return lambda: log.read_text().splitlines() if log.exists() else []

    return set_behaviour


def choose(op=LCW, width=100, itemsize=4):
    forget()
    return backends.choose(op, CARD, width, itemsize, warns=False)


# ---- Verdicts --------------------------------------------------------------------------------------------------------


def test_what_is_right_and_faster_is_chosen(card, behave):
    behave("well")
    assert choose() == "reference"
    report = verify("cuda:0", ops=[LCW])
    (kernel,) = (kernel for kernel in report.kernels if kernel.backend == "triton")
    assert report.right
    assert (kernel.times, kernel.verdicts[NARROW].faster) == (1.5, True)
    assert choose(width=1024) == choose(width=4096) == "triton"
    assert kernel.verdicts[NARROW] == verdicts.find(LCW, "triton", NARROW, CARD)
    # Nothing is concluded about wider rows, or about dtypes that were not timed.
    assert choose(width=4097) == choose(itemsize=8) == choose(itemsize=2) == "reference"


def test_a_process_reads_once(card, behave, folder):
    behave("well")
    verify("cuda:0", ops=[LCW])
    assert choose() == "triton"
    for file in folder.glob("verdict-*"):
        file.unlink()
    assert backends.choose(LCW, CARD, 100, warns=False) == "triton"
    assert choose() == "reference"


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("hangs", r"^no: timed out in case beside \d+$"),
        ("hangs while timing", r"^no: timed out in speed, up to 1024$"),
        ("crashes", r"^no: crashed in case up to 4096: SIGSEGV"),
        ("raises", r"^no: crashed in case up to 4096: RuntimeError: CUDA error: an illegal memory access"),
        ("half a line", r"^no: crashed in case up to 4096: it ended in the middle of a line"),
        ("ends early", r"^no: crashed in speed, up to 4096: it ended in the middle of a line or before its last case"),
        ("no JSON", r"^no: wrote a line that is not JSON in case up to 4096: b'hello'"),
        ("no end of a line", r"^no: wrote a line without an end in case up to 4096$"),
        ("wrong", r"^no: result 0 is not finite$"),
        ("skips the last case", r"^no: the process has judged 9 of 10 cases$"),
        ("fills the error output", r"^no: crashed in case up to 4096: RuntimeError: the end$"),
        ("forgets", r"^no: the process has judged 0 of 10 cases$"),
        ("spills", r"^no: a_kernel spills 96 bytes"),
    ],
)
def test_a_kernel_that_fails_is_not_chosen(behaviour, reason, card, behave):
    behave(behaviour)
    began = time.monotonic()
    report = verify("cuda:0", ops=[LCW])
    assert time.monotonic() - began < 15
    assert not report.right
    (kernel,) = (kernel for kernel in report.kernels if kernel.backend == "triton")
    # The class in which the last case was skipped is that of the widest rows.
    verdict = kernel.verdicts[Kind("float64", "up to 4096") if behaviour == "skips the last case" else NARROW]
    assert not verdict.right
    assert re.search(reason, verdict.reason), verdict.reason
    if behaviour == "skips the last case":
        return
    assert choose() == "reference"
    assert verdict.reason in lcw_ops.ops.backends.not_chosen_reason(LCW, "triton", CARD, "reference")
    assert "NO" in report.table()
    assert verdict.reason in report.block()


BROKEN_LINES = [
    {"case": 1},
    {"case": ["any"]},
    {"kind": None, "right": True},
    {"kind": ["any"], "right": True},
    {"kind": [["any"], "any"], "right": True},
    {"kind": ["any", "any"]},
    {"kind": ["any", "any"], "right": 1},
    {"kind": ["any", "any"], "right": "yes"},
    {"kind": ["any", "any"], "right": False},
    {"kind": ["any", "any"], "right": False, "reason": None},
    {"kind": ["any", "any"], "times": "2", "faster": True, "label": "x"},
    {"kind": ["any", "any"], "times": float("nan"), "faster": True, "label": "x"},
    {"kind": ["any", "any"], "times": 2.0, "label": "x"},
    {"kind": ["any", "any"], "times": 2.0, "faster": True},
    {"kind": ["any", "any"], "untimed": 1},
]


@pytest.mark.parametrize("line", BROKEN_LINES, ids=json.dumps)
def test_a_line_that_lacks_a_part_is_a_crash(line):
    assert not processes._is_whole(line)
    with pytest.raises(processes.Lost, match="crashed in a case: it wrote a line that lacks a part"):
        processes._parse(json.dumps(line).encode(), "a case")


@pytest.mark.parametrize("line", [{"kind": ["any", "any"]}, {"kind": ["any", "any"], "times": 2.0}], ids=json.dumps)
def test_a_broken_line_ends_its_child_and_not_the_run(line, card, behave):
    behave(json.dumps(line))
    report = verify("cuda:0", ops=[GAF])
    assert len(report.kernels) == len(backends.IMPLEMENTED[GAF])
    for kernel in report.kernels:
        assert not kernel.right
        assert kernel.reason.startswith("no: crashed in case any: it wrote a line that lacks a part: b'{")


def test_a_class_that_the_op_has_not_proves_nothing(behave, folder):
    behave(json.dumps({"kind": ["float32", "up to 7"], "right": False, "reason": "an unknown class"}))
    report = verify("cpu", ops=[GAF])
    assert report.right
    assert "unknown" not in report.to_json()


@pytest.mark.parametrize("found", ["1", "{}", '{"facts": {}, "used": 0}', '{"facts": {"cpp": 1}, "used": 0}'])
def test_a_description_that_lacks_a_part_is_a_refusal(found, card, behave):
    behave(f"done: {found}")
    with pytest.raises(Refused, match="cuda:0 cannot be opened: a process crashed: its last line lacks a part"):
        verify("cuda:0", ops=[GAF])


@pytest.mark.parametrize(("behaviour", "place"), [("hangs", "case beside"), ("hangs while timing", "speed, any")])
def test_a_time_out_on_a_cpu_is_reported_and_not_kept(behaviour, place, behave, folder):
    """A busy machine may have caused it."""
    behave(behaviour)
    report = verify("cpu", ops=[GAF])
    assert not report.right
    assert f"no: timed out in {place}" in report.block()
    assert not list(folder.glob("verdict-*"))
    forget()
    assert backends.choose(GAF, torch.device("cpu")) == "cpp"


def test_a_killed_child_takes_its_children_along(card, behave):
    behave("hangs")
    report = verify("cuda:0", ops=[GAF])
    assert ends(int(report.kernels[0].verdicts[verdicts.ANY].reason.split()[-1]))


def test_an_interrupt_ends_the_compilers(card, behave, monkeypatch):
    """They run in threads, which Ctrl-C does not reach."""
    behave("compiles forever")
    begun, run = [], processes.run

    def observe(job):
        for line in run(job):
            if job["job"] == "compile":
                begun.append(int(line["case"].split()[-1]))
                threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
            yield line

    monkeypatch.setattr(processes, "run", observe)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        verify("cuda:0", ops=[GAF])
    assert time.monotonic() - began < 10
    assert len(begun) == 1
    assert ends(begun[0])
    assert not processes._running


def test_an_interrupt_keeps_no_verdict_of_a_killed_child(card, behave, folder):
    behave("interrupts")
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        verify("cuda:0", ops=[LCW])
    assert time.monotonic() - began < 10
    assert not list(folder.glob("verdict-*"))
    assert not processes._running


def test_a_process_that_does_not_die_is_left_behind(monkeypatch):
    """A killed process may hang in a driver for ever."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(processes, "_kill_group", lambda child: None)
    monkeypatch.setattr(processes, "DEATH_SECONDS", 0.1)
    began = time.monotonic()
    processes._kill(child)
    assert time.monotonic() - began < 5
    child.kill()
    child.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_child_dies_with_its_parent():
    """A parent that is killed cannot kill the child, which may hang on the device."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            child._die_with_the_parent()
            os.write(writing, str(os.getpid()).encode())
        time.sleep(60)
        os._exit(0)
    process = int(os.read(reading, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert ends(process)
    os.close(reading)
    os.close(writing)


def ends(process: int) -> bool:
    """Whether a process has ended within five seconds."""
    until = time.monotonic() + 5
    while _state(process) != "Z" and time.monotonic() < until:
        time.sleep(0.02)
    return _state(process) == "Z"


def _state(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("slow", "right, but 0.70 times as fast as plain torch in speed, any"),
        ("disturbed", "right; not timed: the time of a copy changed by 18%"),
    ],
)
def test_what_is_right_but_not_faster_is_not_chosen(behaviour, reason, card, behave):
    behave(behaviour)
    report = verify("cuda:0", ops=[GAF])
    assert report.right
    verdict = report.kernels[0].verdicts[verdicts.ANY]
    assert (verdict.right, verdict.faster, verdict.reason) == (True, False, reason)
    assert choose(GAF) == "reference"


@pytest.mark.parametrize("name", [*FACTS, "kernels", "format"])
def test_another_device_or_version_is_no_proof(name, card, behave, folder):
    behave("well")
    verify("cuda:0", ops=[LCW])
    assert choose() == "triton"
    for file in folder.glob("verdict-*"):
        written = json.loads(file.read_text())
        written["key"][name] = 0 if name == "format" else "another"
        # The file of the present key, and that of its own.
        file.write_text(json.dumps(written))
        (folder / verdicts.file_of(written["key"])).write_text(json.dumps(written))
    assert choose() == "reference"


NESTED = "[" * 100_000
DAMAGE = ["", "{", "[]", "null", "\x00\xff", '{"key": 1}', NESTED, "without right", "right is 1", "a pipe"]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: repr(damage[:12]))
def test_a_damaged_file_is_no_proof(damage, card, behave, folder):
    behave("well")
    verify("cuda:0", ops=[LCW])
    for file in folder.glob("verdict-*"):
        written = json.loads(file.read_text())
        if damage == "without right":
            del written["right"]
        if damage == "right is 1":
            written["right"] = 1
        is_json = damage in ("without right", "right is 1")
        file.write_bytes(json.dumps(written).encode() if is_json else damage.encode("latin-1"))
        if damage == "a pipe":
            file.unlink()
            os.mkfifo(file)
    assert choose() == "reference"


def test_a_verdict_overrides_a_committed_log(card, behave, monkeypatch):
    monkeypatch.setattr(backends, "PROVEN", {(LCW, "triton"): frozenset({(9, 0)})})
    assert choose() == "triton"
    behave("slow")
    verify("cuda:0", ops=[LCW])
    assert choose() == "reference"
    # The log still speaks for what has no verdict.
    assert choose(width=5000) == "triton"


@pytest.mark.parametrize(
    ("condition", "expected"), [({}, "reference"), ({"triton": "3.7"}, "reference"), ({"triton": "3.6"}, "triton")]
)
def test_the_deny_list_overrides_a_verdict(condition, expected, card, behave, monkeypatch):
    behave("well")
    verify("cuda:0", ops=[LCW])
    monkeypatch.setattr(backends, "DENIED", [{"op": LCW, "backend": "triton", "reason": "it spills", **condition}])
    assert choose() == expected
    said = backends.not_chosen_reason(LCW, "triton", CARD, "x")
    assert said == ("denied by this version of lcw_ops: it spills" if expected == "reference" else "x comes first")


@pytest.mark.parametrize(
    ("device", "ops", "expected"),
    [
        # On a GPU each is alone from the first case on. On a CPU they judge before the first one is alone.
        ("cuda:0", [GAF], "alone end alone end alone end"),
        ("cpu", [GAF, LCW], "alone end alone end"),
    ],
)
def test_no_two_children_disturb_each_other(device, ops, expected, card, behave, monkeypatch):
    monkeypatch.setattr(work, "_count_cores", lambda: 4)
    monkeypatch.setattr(verdicts, "_cpu_facts", lambda: {**fake_verification.facts_of("cpp"), "device": "cpu"})
    if device == "cpu":
        monkeypatch.setattr(backends, "missing_reason", lambda op, backend, kind: None if backend == "cpp" else "no")
    log = behave("takes its time")
    assert verify(device, ops=ops).right
    lines = [line.split() for line in log()]
    assert " ".join(word for word, *_ in lines if word in ("alone", "end")) == expected
    # All children have started before the first one is alone.
    first = next(index for index, line in enumerate(lines) if line[0] == "alone")
    assert sum(line[0] == "run" for line in lines[:first]) == expected.count("alone")


# ---- Several proved kernels ------------------------------------------------------------------------------------------


def keep_verdict(folder, op, backend, kind, times, right=True):
    key = verdicts.make_key(op, backend, kind, verdicts.collect_facts(CARD, backend))
    faster = times is not None and times > 1.05
    written = {"key": key, "right": right, "faster": faster, "times": times, "reason": "kept", "date": "2026-11-30"}
    folder.mkdir(exist_ok=True)
    (folder / verdicts.file_of(key)).write_text(json.dumps(written))


@pytest.mark.parametrize(
    ("triton", "cuda", "expected"),
    [
        (1.5, 1.8, "cuda"),
        (1.8, 1.5, "triton"),
        (1.5, 1.5, "triton"),
        (0.9, 1.2, "cuda"),
        (0.9, 0.8, "reference"),
        (None, 1.2, "cuda"),
    ],
)
def test_the_fastest_proved_kernel_is_chosen(triton, cuda, expected, card, folder):
    """By the verdicts on this card. Equal kernels stay in the order of preference."""
    op, kind = "orthogonal_filter", Kind("float32", "up to 64")
    keep_verdict(folder, op, "triton", kind, triton)
    keep_verdict(folder, op, "cuda", kind, cuda)
    forget()
    assert backends.choose(op, CARD, 64, 4, first="triton", warns=False) == expected
    # Nothing is concluded about wider rows, or about another dtype.
    assert backends.choose(op, CARD, 65, 4, first="triton", warns=False) == "reference"
    assert backends.choose(op, CARD, 64, 8, first="triton", warns=False) == "reference"


def test_a_faster_kernel_that_is_wrong_is_not_chosen(card, folder):
    kind = Kind("float32", "up to 64")
    keep_verdict(folder, "orthogonal_filter", "triton", kind, 3.0, right=False)
    keep_verdict(folder, "orthogonal_filter", "cuda", kind, 1.2)
    forget()
    assert backends.choose("orthogonal_filter", CARD, 64, 4, warns=False) == "cuda"


def test_a_measured_kernel_comes_before_one_with_a_committed_log(card, folder, monkeypatch):
    monkeypatch.setattr(backends, "PROVEN", {("orthogonal_filter", "triton"): frozenset({(9, 0)})})
    keep_verdict(folder, "orthogonal_filter", "cuda", Kind("float32", "up to 64"), 1.2)
    forget()
    assert backends.choose("orthogonal_filter", CARD, 64, 4, warns=False) == "cuda"
    assert backends.choose("orthogonal_filter", CARD, 65, 4, warns=False) == "triton"


def test_info_says_which_kernel_is_faster(card, behave):
    behave("cuda is faster")
    verify("cuda:0", ops=[GAF, "orthogonal_filter"])
    forget()
    assert backends.choose(GAF, CARD, warns=False) == "cuda"
    reason = backends.not_chosen_reason(GAF, "triton", CARD, "cuda")
    assert reason == "cuda is faster here: 1.80 times as fast as plain torch; triton: 1.50"
    assert backends.not_chosen_reason(GAF, "triton", CARD, "cuda, as requested,") == "cuda, as requested, comes first"


@pytest.mark.parametrize(("op", "widest"), [(op, widths[-1]) for op, widths in verdicts.WIDEST.items()])
def test_rows_that_are_wider_than_every_class_run_on_plain_torch(op, widest, card, folder):
    for backend in backends.IMPLEMENTED[op]:
        for kind in verdicts.kinds(op):
            keep_verdict(folder, op, backend, kind, 9.9)
    forget()
    assert backends.choose(op, CARD, widest, 4, warns=False) != "reference"
    with pytest.warns(RuntimeWarning, match="no kernel is proved there"):
        assert backends.choose(op, CARD, widest + 1, 4) == "reference"


# ---- Where verdicts are kept -----------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_to(card, behave, tmp_path, monkeypatch, capsys):
    """Files cannot be written in a read-only image. The output of --json does the same from LCW_OPS_VERDICTS."""
    behave("well")
    (tmp_path / "file").touch()
    monkeypatch.setenv("LCW_OPS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    forget()
    report = verify("cuda:0", ops=[LCW])
    assert report.right
    assert [note for note in report.notes if "The verdicts are not kept" in note and "LCW_OPS_VERDICTS" in note]
    assert len(report.notes) == 1
    assert "--write FILE" in report.notes[0]
    assert report.notes[0] in str(report)
    assert choose() == "reference"
    shipped = tmp_path / "shipped.json"
    shipped.write_text(report.to_json())
    monkeypatch.setenv("LCW_OPS_VERDICTS", str(shipped))
    assert choose() == "triton"
    assert f"read from {shipped}" in _info._verification_line()
    for damaged in ("{", NESTED):
        shipped.write_text(damaged)
        assert choose() == "reference"
    monkeypatch.setenv("LCW_OPS_VERDICTS", str(tmp_path / "missing"))
    assert choose() == "reference"


def test_a_file_for_an_administrator(card, behave, folder, tmp_path, monkeypatch, capsys):
    """--write keeps the verdicts in the file that LCW_OPS_VERDICTS names, and in no other place."""
    log = behave("well")
    shipped = tmp_path / "new" / "verdicts.json"
    command = ["verify", "--device", "cuda:0", "--ops", GAF, "--write", str(shipped)]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert f"The verdicts are kept in {shipped}.\n" in text
    assert f"Processes read the verdicts in {shipped} if LCW_OPS_VERDICTS names it.\n" in text
    assert not list(folder.glob("verdict-*"))
    assert choose(GAF) == "reference"
    monkeypatch.setenv("LCW_OPS_VERDICTS", str(shipped))
    assert choose(GAF) == "cuda"
    # Other kernels join, the same ones are replaced, and --resume reads the file.
    assert verify("cuda:0", ops=[LCW], write=shipped).notes == [f"The verdicts are kept in {shipped}."]
    assert (choose(GAF), choose(LCW)) == ("cuda", "triton")
    assert {kernel["op"] for kernel in json.loads(shipped.read_text())} == {GAF, LCW}
    count = len(log())
    verify("cuda:0", ops=[LCW], write=shipped, resume=True)
    assert [line.split()[0] for line in log()[count:]] == ["describe"]
    behave("slow")
    verify("cuda:0", ops=[LCW], write=shipped)
    assert (choose(GAF), choose(LCW)) == ("cuda", "reference")
    assert len(json.loads(shipped.read_text())) == len(backends.IMPLEMENTED[GAF]) + len(backends.IMPLEMENTED[LCW])


def test_a_run_that_processes_do_not_read_says_so(card, behave, folder, tmp_path, monkeypatch):
    behave("well")
    shipped = tmp_path / "shipped.json"
    monkeypatch.setenv("LCW_OPS_VERDICTS", str(shipped))
    said, kept = verify("cuda:0", ops=[GAF]).notes
    assert said.startswith(f"LCW_OPS_VERDICTS is {shipped}, so processes read that file, and not the verdicts of this")
    assert f"lcw-ops verify --write {shipped} puts them there" in said
    assert kept == f"The verdicts are kept in {folder}."
    assert not shipped.exists()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("a letter", [], "write is '.*'; expected a new file, or one that --write made"),
        ('{"key": 1}', [], "write is '.*'; expected a new file, or one that --write made"),
        (None, [], "write is '.*/file/x/verdicts'; expected a file to write; cannot write to the folder"),
        ("", ["--case", "300"], "write is given with case; expected one of the two"),
    ],
)
def test_a_file_that_cannot_be_written_is_a_mistake(content, arguments, message, card, behave, tmp_path, capsys):
    log = behave("well")
    file = tmp_path / "file"
    file.write_text(content or "")
    path = file if content is not None else file / "x" / "verdicts"
    assert cli.main(["verify", "--device", "cuda:0", "--write", str(path), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert file.read_text() == (content or "")
    assert log() == []


def test_two_devices_share_a_file(card, behave, tmp_path, monkeypatch):
    behave("well")
    shipped = tmp_path / "verdicts.json"
    verify("cuda:0", ops=[GAF], write=shipped)
    first = json.loads(shipped.read_text())
    for one in (verdict for kernel in first for verdict in kernel["verdicts"]):
        one["key"]["device"] = "another"
    shipped.write_text(json.dumps(first))
    verify("cuda:0", ops=[GAF], write=shipped)
    devices = [verdict["key"]["device"] for kernel in json.loads(shipped.read_text()) for verdict in kernel["verdicts"]]
    assert sorted(devices) == ["0123456789abcdef"] * 3 + ["another"] * 3


def test_a_file_that_two_write_at_once_keeps_both(tmp_path):
    """Two processes do the same: a lock belongs to an open file, not to a process."""
    path = tmp_path / "verdicts.json"

    def keep(op):
        key = {"op": op, "backend": "cuda", "dtype": "any", "size": "any", **dict.fromkeys(verdicts.UPDATED, "1")}
        keeping.File(path).keep({"op": op, "verdicts": [{"key": key}]})

    threads = [threading.Thread(target=keep, args=(f"op {index}",)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {kernel["op"] for kernel in json.loads(path.read_text())} == {f"op {index}" for index in range(12)}


# Part of a key -> whether a verdict with another one goes when a new one is kept.
GOES = {"lcw_ops": True, "kernels": True, "driver": True, "format": True}
STAYS = {"device": False, "name": False, "torch": False, "triton": False, "op": False, "backend": False}


@pytest.mark.parametrize(("part", "goes"), (GOES | STAYS).items())
def test_outdated_verdicts_go(part, goes, tmp_path):
    """Those of the same kernel and device before an update. Never those of another device or environment."""

    def make_kernel(size, **changed):
        key = verdicts.make_key(LCW, "cuda", Kind("float32", size), fake_verification.facts_of("cuda")) | changed
        return {
            "op": LCW,
            "verdicts": [{"key": key, "right": True, "faster": True, "times": 1.5, "reason": "", "date": ""}],
        }

    # An older version alone would make outdated what must stay because of the other part.
    older = make_kernel("up to 4096", **({} if goes else {"lcw_ops": "0.0.1"}), **{part: "another"})
    places = keeping.Folder(tmp_path / "folder"), keeping.File(tmp_path / "file.json")
    for place in places:
        place.keep(older)
        (tmp_path / "folder/verdict-of nobody.json").write_text("{")
        place.keep(make_kernel("up to 1024"))
        place.keep(make_kernel("up to 4096"))
        kept = [place.read(kernel["verdicts"][0]["key"]) for kernel in map(make_kernel, ("up to 1024", "up to 4096"))]
        assert None not in kept
        assert (place.read(older["verdicts"][0]["key"]) is None) == goes
    assert len(list((tmp_path / "folder").iterdir())) == (3 if goes else 4)
    assert len(json.loads((tmp_path / "file.json").read_text())) == (2 if goes else 3)


@pytest.mark.parametrize("home", ["none", "a file"])
def test_a_user_without_a_home(home, card, behave, monkeypatch, tmp_path):
    monkeypatch.delenv("LCW_OPS_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    if home == "a file":
        (tmp_path / "home").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    behave("well")
    report = verify("cuda:0", ops=[GAF])
    assert report.right
    (note,) = report.notes
    reason = "LCW_OPS_CACHE_DIR, XDG_CACHE_HOME and HOME are not set" if home == "none" else "Not a directory"
    assert note.startswith("The verdicts are not kept: ")
    assert reason in note
    assert choose(GAF) == "reference"
    if home == "none":
        assert f"nowhere, because {reason}" in _info._verification_line()
    shipped = tmp_path / "verdicts.json"
    verify("cuda:0", ops=[GAF], write=shipped)
    monkeypatch.setenv("LCW_OPS_VERDICTS", str(shipped))
    assert choose(GAF) == "cuda"


@pytest.mark.parametrize("is_cache_writable", [True, False])
def test_a_system_without_a_folder_for_temporary_files(is_cache_writable, card, behave, folder, monkeypatch, tmp_path):
    """A read-only image without /tmp. Triton's compiler gets the cache folder, or Triton's kernels are left out."""

    def refuse(*_, **__):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    if not is_cache_writable:
        (tmp_path / "file").touch()
        monkeypatch.setenv("LCW_OPS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(_files, "prepare_folder", lambda folder: folder if is_cache_writable else refuse())
    behave("well")
    report = verify("cuda:0", ops=[GAF])
    assert report.right
    found = [kernel.backend for kernel in report.kernels]
    assert found == (["cpp", "cuda", "triton"] if is_cache_writable else ["cpp", "cuda"])
    left_out = any("Triton's kernels are left out" in note for note in report.notes)
    assert left_out == (not is_cache_writable)
    expected = str(folder) if is_cache_writable else os.environ.get("TMPDIR")
    assert processes._environment({"job": "run"}).get("TMPDIR") == expected


def test_a_shipped_file_for_another_card_is_no_proof(card, behave, tmp_path, monkeypatch):
    behave("well")
    shipped = tmp_path / "shipped.json"
    shipped.write_text(verify("cuda:0", ops=[LCW]).to_json())
    monkeypatch.setenv("LCW_OPS_VERDICTS", str(shipped))
    monkeypatch.setitem(FACTS, "device", "another")
    assert choose() == "reference"


def test_an_empty_cache_folder_keeps_nothing(card, behave, monkeypatch):
    monkeypatch.setenv("LCW_OPS_CACHE_DIR", "")
    behave("well")
    assert "LCW_OPS_CACHE_DIR is empty" in verify("cuda:0", ops=[LCW]).notes[0]
    assert choose() == "reference"
    assert "nowhere" in _info._verification_line()


def test_one_verification_per_device(card, behave, folder):
    behave("well")
    verify("cuda:0", ops=[GAF])
    (lock,) = folder.glob("verify-*.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Refused, match="another verification of this device is running"):
            verify("cuda:0", ops=[GAF])
    assert verify("cuda:0", ops=[GAF]).right


def test_resume_leaves_out_what_has_its_verdicts(card, behave, folder):
    log = behave("well")
    verify("cuda:0", ops=[GAF])
    count = len(log())
    report = verify("cuda:0", ops=[GAF], resume=True)
    assert [line.split()[0] for line in log()[count:]] == ["describe"]
    assert report.right
    assert report.kernels[0].times == 1.5
    next(folder.glob("verdict-*")).unlink()
    count = len(log())
    verify("cuda:0", ops=[GAF], resume=True)
    assert sum(line.startswith("run") for line in log()[count:]) == 1


@pytest.mark.parametrize(("behaviour", "expected"), [("well", 0), ("slow", 0), ("wrong", 1)])
def test_a_kept_verdict_decides_about_the_exit_code(behaviour, expected, card, behave, capsys):
    command = ["verify", "--device", "cuda:0", "--ops", GAF, "--resume"]
    log = behave(behaviour)
    assert cli.main(command) == expected
    first, count = capsys.readouterr().out, len(log())
    assert cli.main(command) == expected
    assert [line.split()[0] for line in log()[count:]] == ["describe"]
    assert re.findall(rf"^{GAF} .*", capsys.readouterr().out, re.MULTILINE) == re.findall(
        rf"^{GAF} .*", first, re.MULTILINE
    )


def test_kernels_without_such_a_case_are_left_out(card, behave):
    behave("well")
    report = verify("cuda:0", case="GmP, M=8, m=577, float32")
    assert {kernel.op for kernel in report.kernels} == {"hypersphere_direction"}
    assert report.right


def test_a_case_alone_keeps_no_verdict(card, behave, folder):
    behave("well")
    assert verify("cuda:0", ops=[GAF], case="300 tensors").right
    assert not list(folder.glob("verdict-*"))


# ---- The choice ------------------------------------------------------------------------------------------------------


def test_one_warning_per_process_where_nothing_is_proved(card):
    forget()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for op in backends.IMPLEMENTED:
            backends.choose(op, CARD, 8)
    assert ["lcw-ops verify --device cuda:0" in str(warning.message) for warning in seen] == [True]
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # info() and requests say nothing.
        _info._op_lines(LCW, CARD)
        with lcw_ops.use_backend("reference"):
            assert backends.choose(LCW, CARD, 8) == "reference"


def test_no_warning_where_a_kernel_was_tried_and_is_slower(card, behave):
    behave("slow")
    verify("cuda:0", ops=[GAF])
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(GAF, CARD) == "reference"


def test_a_kernel_that_is_wrong_on_a_cpu_is_switched_off(folder, monkeypatch):
    if backends.missing_reason(LCW, "cpp", "cpu") is not None:
        pytest.skip(backends.missing_reason(LCW, "cpp", "cpu"))
    cpu = torch.device("cpu")
    folder.mkdir()
    weight = torch.randn(3, 40)
    kept = {"right": True, "faster": False, "times": None, "reason": "right", "date": "2026-11-30"}
    for right, chosen in ((True, "cpp"), (False, "reference")):
        key = verdicts.make_key(LCW, "cpp", WIDE, verdicts.collect_facts(cpu, "cpp"))
        (folder / verdicts.file_of(key)).write_text(json.dumps({"key": key, **kept, "right": right}))
        forget()
        assert backends.choose(LCW, cpu, warns=False) == chosen
        assert backends.is_cpp_chosen(LCW) == right
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(lcw_ops.functional.lcw_weight(weight), weight - weight.mean(1, keepdim=True))
    (warning,) = seen
    assert str(warning.message).startswith("lcw_weight: plain torch runs on the CPU. cpp: not right here, by lcw-ops")
    # Other ops, and a request, are as before.
    assert backends.is_cpp_chosen("normalize_scale")
    with lcw_ops.use_backend("cpp"):
        assert backends.choose(LCW, cpu) == "cpp"


def test_the_choice_is_constant_under_compile(card, behave, folder):
    """One program for all widths of a class, which stays when the files have gone. A width beyond makes another."""
    behave("well")
    verify("cuda:0", ops=[LCW])
    forget()

    def scale(x):
        return x * {"reference": 1, "triton": 2}[backends.choose(LCW, CARD, x.shape[1], 4, warns=False)]

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(scale, fullgraph=True, dynamic=True, backend=counter)
    assert [compiled(torch.ones(2, width))[0, 0].item() for width in (100, 200, 1000)] == [2, 2, 2]
    assert counter.frame_count == 1
    for file in folder.glob("verdict-*"):
        file.unlink()
    assert [compiled(torch.ones(2, width))[0, 0].item() for width in (300, 5000)] == [2, 1]
    assert counter.frame_count == 2


def test_without_verdicts_the_width_is_no_guard(card, monkeypatch):
    monkeypatch.setattr(backends, "_warn_unproven", lambda device: None)
    forget()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda x: x * (1 + (backends.choose(LCW, CARD, x.shape[1], 4, warns=False) == "triton")),
        fullgraph=True, dynamic=True, backend=counter,
    )  # fmt: skip
    for width in (100, 2000, 5000):
        assert compiled(torch.ones(2, width))[0, 0].item() == 1
    assert counter.frame_count == 1


def test_info_shows_the_verdicts(card, behave):
    behave("well")
    verify("cuda:0", ops=[LCW])
    forget()
    text = "\n".join(_info._op_lines(LCW, CARD))
    assert f"{LCW} on cuda:0: triton" in text
    date = verdicts.find(LCW, "triton", NARROW, CARD).date
    line = f"  verified triton, float32, up to 1024, on {date}: right, and 1.50 times as fast as plain torch"
    assert line in text.splitlines()
    shown = _info._op_report(LCW, CARD)["verdicts"]
    expected = {"backend": "triton", "dtype": "float32", "size": "up to 1024", "right": True, "faster": True}
    assert expected.items() <= next(one for one in shown if one["faster"] and one["backend"] == "triton").items()
    assert "lcw-ops verify --device cuda:0 makes them" in _info._verification_line()


UNREADABLE = {
    "missing": "there is no such file",
    "folder": "it is not a file",
    "pipe": "it is not a file",
    "damaged": "it is not a file that lcw-ops verify --write made",
    "no list": "it is not a file that lcw-ops verify --write made",
    "x" * 300: "File name too long",
}


@pytest.mark.parametrize(("name", "reason"), UNREADABLE.items(), ids=lambda text: text[:10])
def test_info_says_that_the_file_of_verdicts_cannot_be_read(name, reason, folder, tmp_path, monkeypatch):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    elif name in ("damaged", "no list"):
        path.write_text("{" if name == "damaged" else "{}")
    monkeypatch.setenv("LCW_OPS_VERDICTS", str(path))
    assert f"LCW_OPS_VERDICTS is {path}, which cannot be read: {reason}; lcw-ops verify" in lcw_ops.info()
    good = tmp_path / "good"
    good.write_text("[]")
    monkeypatch.setenv("LCW_OPS_VERDICTS", str(good))
    assert f"Verdicts about kernels are read from {good}; lcw-ops verify" in lcw_ops.info()


# ---- Conditions ------------------------------------------------------------------------------------------------------


def test_a_card_that_is_in_use_is_refused(card, behave, monkeypatch, tmp_path):
    behave("in use")
    with pytest.raises(Refused, match=r"cuda:0 is in use: 5\.0 GiB of its memory are taken; expected an idle card"):
        verify("cuda:0", ops=[GAF])
    behave("well")
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setattr(preconditions.shutil, "which", lambda name: str(tool))
    for uuid, is_refused in (("GPU-01234567-89ab-cdef", True), ("GPU-ffffffff-89ab-cdef", False)):
        tool.write_text(f"#!/bin/sh\necho '{uuid}, 4711, python'\n")
        tool.chmod(0o755)
        with pytest.raises(Refused, match="4711, python") if is_refused else contextlib.nullcontext():
            verify("cuda:0", ops=[GAF])


@pytest.mark.parametrize(
    ("user", "is_own"), [("self", True), ("child", True), ("grandchild", True), ("parent", False), ("[N/A]", False)]
)
def test_a_card_that_this_process_uses_is_not_refused(user, is_own, card, monkeypatch, tmp_path):
    """A notebook that has the card open may call lcw_ops.verify()."""
    if sys.platform != "linux" and "child" in user:
        pytest.skip("only Linux tells who has started a process")
    script = "sleep 60 & echo $!; wait" if user == "grandchild" else "echo $$; exec sleep 60"
    child = subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        started = child.stdout.readline().strip()
        number = {"self": os.getpid(), "parent": os.getppid(), "[N/A]": "[N/A]"}.get(user, started)
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\necho 'GPU-01234567-89ab-cdef, {number}, python'\n")
        tool.chmod(0o755)
        monkeypatch.setattr(preconditions.shutil, "which", lambda name: str(tool))
        refusal = re.escape(f"used by another process: {number}, python")
        with contextlib.nullcontext() if is_own else pytest.raises(Refused, match=refusal):
            preconditions.refuse_a_busy_card(CARD, FACTS["device"])
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def test_a_device_without_kernels_is_refused(card, behave, monkeypatch):
    log = behave("well")
    monkeypatch.setattr(backends, "missing_reason", lambda op, backend, device_type: "not built")
    with pytest.raises(Refused, match="no kernel of these ops can run on cuda:0"):
        verify("cuda:0", ops=[GAF])
    assert log() == []


JOB_NAMES = ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS", "SLURM_PROCID"]


@pytest.mark.parametrize(
    "job",
    [{"WORLD_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "2"}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}],
    ids=str,
)
def test_never_inside_a_job(job, card, behave, monkeypatch):
    log = behave("well")
    for name in JOB_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refused, match="belongs to a distributed job"):
        verify("cuda:0")
    assert log() == []


@pytest.mark.parametrize(
    "job",
    [{"SLURM_NTASKS": "8"}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {"SLURM_PROCID": "0"}, {"PMI_SIZE": "1"}],
    ids=str,
)
def test_one_task_is_no_job(job, monkeypatch):
    """The shell of an allocation, and srun -n 1."""
    for name in JOB_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    preconditions.refuse_inside_a_job()


def test_a_device_that_cannot_be_opened(card, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "COMMAND", [sys.executable, "-c", "raise SystemExit('no such device')"])
    with pytest.raises(Refused, match="cuda:0 cannot be opened: a process crashed in the start: no such device"):
        verify("cuda:0")


def test_slices_of_a_card_are_devices_of_their_own(monkeypatch):
    """cuDeviceGetUuid_v2 gives a MIG slice's own UUID."""

    class Driver:
        def cuInit(self, flags):
            return 0

        def cuDeviceGet(self, handle, index):
            handle._obj.value = index
            return 0

        def cuDeviceGetUuid_v2(self, uuid, handle):
            uuid.raw = bytes([handle.value] * 16)
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert verdicts._uuid(1) == "01" * 16 != verdicts._uuid(2)
    assert verdicts._uuid(0) is None
    monkeypatch.setattr(Driver, "cuInit", lambda self, flags: 100)
    assert verdicts._uuid(1) is None
    monkeypatch.delattr(Driver, "cuDeviceGetUuid_v2")
    monkeypatch.setattr(Driver, "cuInit", lambda self, flags: 0)
    assert verdicts._uuid(1) is None


NUMBER = "01234567-89AB-cdef-0123-456789abcdef"


@pytest.mark.parametrize(
    ("name", "uuid", "expected"),
    [
        ("a card", NUMBER, NUMBER.lower().replace("-", "")),
        ("a card", f"GPU-{NUMBER}", NUMBER.lower().replace("-", "")),
        # A slice has its card's UUID here, so it cannot be told from the other slices.
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", NUMBER, None),
        ("a card", "00000000-0000-0000-0000-000000000000", None),
        ("a card", "unknown", None),
        ("a card", None, None),
    ],
)
def test_the_uuid_of_torch_where_the_driver_gives_none(name, uuid, expected, monkeypatch):
    properties = types.SimpleNamespace(name=name, major=9, minor=0, multi_processor_count=132)
    if uuid is not None:
        properties.uuid = uuid
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(verdicts, "_uuid", lambda index: None)
    assert verdicts._gpu_facts(CARD)["device"] == expected


def test_the_version_of_the_driver(monkeypatch, tmp_path):
    """On WSL there is no file in /proc, and the driver's library gives the version."""
    module = tmp_path / "version"
    module.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:14:51 UTC 2025\n")
    monkeypatch.setattr(verdicts, "NVIDIA_MODULE", module)
    assert verdicts._driver() == "580.65.06"
    module.unlink()

    class Library:
        status = 0

        def nvmlInit_v2(self):
            return self.status

        def nvmlSystemGetDriverVersion(self, version, length):
            version.value = b"581.15"
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    assert verdicts._driver() == "581.15"
    monkeypatch.setattr(Library, "status", 12)
    assert verdicts._driver() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert verdicts._driver() is None


@pytest.mark.parametrize(
    ("part", "reason"),
    [("device", "does not give the UUID of a card"), ("driver", "the driver of a card is not known")],
)
def test_a_device_that_cannot_be_identified_has_no_verdicts(part, reason, card, behave, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(FACTS, part, None)
    describe = preconditions.describe_device

    def describe_unknown(device, names):
        found = describe(device, names)
        for facts in found["facts"].values():
            facts[part] = None
        return found

    monkeypatch.setattr(verification, "describe_device", describe_unknown)
    behave("well")
    report = verify("cuda:0", ops=[GAF])
    assert report.right
    (note,) = report.notes
    assert note.startswith("The verdicts are not kept: ")
    assert reason in note
    assert not list(folder.glob("verdict-*"))
    # A file that was written somewhere else is no proof either.
    shipped = tmp_path / "shipped.json"
    shipped.write_text(report.to_json())
    monkeypatch.setenv("LCW_OPS_VERDICTS", str(shipped))
    assert choose(GAF) == "reference"


# ---- The command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_a_block(card, behave, capsys):
    behave("well")
    assert cli.main(["verify", "--device", "cuda", "--ops", GAF, LCW]) == 0
    text = capsys.readouterr().out
    header = next(line for line in text.splitlines() if line.startswith("op "))
    assert re.split(r" {2,}", header) == ["op", "backend", "right", "times plain torch", "verdict"]
    assert "verify " in text
    # The progress has a line for the compilation and reaches its end, although one class may be left out.
    assert "compiling; later runs find the kernels in Triton's cache" in text
    last = re.findall(r"^verify (\d+)/(\d+) ", text, re.MULTILINE)[-1]
    assert last[0] == last[1]
    # One block, in Markdown, with all that an issue needs: the device, the versions, and the table.
    assert text.count("```") == 2
    block = text.split("```")[1]
    for part in (*FACTS.values(), header, "--device cuda:0"):
        assert str(part) in block
    for op in (GAF, LCW):
        for backend in backends.IMPLEMENTED[op]:
            assert re.search(rf"^{op} +{backend} +yes +1\.50 +right in", block, re.MULTILINE)


def test_the_command_for_programs(card, behave, capsys):
    behave("wrong")
    assert cli.main(["verify", "--device", "cuda:0", "--ops", GAF, "--json"]) == 1
    captured = capsys.readouterr()
    kernels = json.loads(captured.out)
    assert [kernel["backend"] for kernel in kernels] == ["cpp", "cuda", "triton"]
    for kernel in kernels:
        assert list(kernel) == ["op", "backend", "right", "times", "reason", "verdicts"]
        assert (kernel["op"], kernel["right"], kernel["times"]) == (GAF, False, None)
        assert kernel["reason"] == "no: result 0 is not finite"
    assert "verify" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "lcw"], "lcw-ops verify: ops has 'lcw'; expected one of "),
        (["--device", "cuda:7"], "lcw-ops verify: device is 'cuda:7'; expected one of cpu, cuda:0"),
        (["--case", "no such"], "lcw-ops verify: case is 'no such'; expected a text that some case's name contains"),
        (["--device", "mps"], "lcw-ops verify: device is 'mps'; expected one of cpu, cuda:0"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, card, behave, capsys):
    behave("well")
    assert cli.main(["verify", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_a_stem_names_all_of_its_ops(behave):
    behave("well")
    report = verify("cpu", ops=["gradient_activation", "lcw_linear", LCW])
    steps = {"activated_sgd_step_", "activated_adamw_step_"}
    assert {kernel.op for kernel in report.kernels} == {"gradient_activation_", LCW} | steps


def test_an_nvidia_smi_that_hangs_is_a_refusal(card, behave, monkeypatch, tmp_path):
    behave("well")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nsleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr(preconditions.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(preconditions, "MOST_TOOL_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(Refused, match=r"nvidia-smi has not answered for 0\.3 s"):
        verify("cuda:0", ops=[LCW])
    assert time.monotonic() - began < 10


def test_an_nvidia_smi_that_fails_is_no_refusal(card, behave, monkeypatch, tmp_path):
    behave("well")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU-01234567-89ab-cdef, 4711, python'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setattr(preconditions.shutil, "which", lambda name: str(tool))
    assert verify("cuda:0", ops=[GAF]).right


# ---- The list of cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", backends.IMPLEMENTED)
def test_every_class_has_cases_and_speeds(op):
    for backend in backends.IMPLEMENTED[op]:
        judged = {case.kind for case in cases.cases(op, backend)}
        assert judged <= set(verdicts.kinds(op))
        assert {speed.kind for speed in speeds.speeds(op, backend, "cuda")} == judged
    everywhere = {case.kind for backend in backends.IMPLEMENTED[op] for case in cases.cases(op, backend)}
    assert everywhere == set(verdicts.kinds(op))
    labels = [(case.kind, case.label) for case in cases.cases(op, "cpp")]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("op", backends.IMPLEMENTED)
def test_inputs_of_timings_are_drawn_on_the_device(op):
    with torch.device("meta"):
        for backend in backends.IMPLEMENTED[op]:
            for speed in speeds.speeds(op, backend, "cuda"):
                assert all(tensor.is_meta for tensor in speed.draw())


@pytest.mark.parametrize("op", verdicts.WIDEST)
def test_a_width_belongs_to_one_class(op):
    assert op in backends.IMPLEMENTED
    widest = verdicts.WIDEST[op]
    assert [verdicts.classify(op, width, 4).size for width in widest] == [f"up to {width}" for width in widest]
    assert verdicts.classify(op, widest[0] + 1, 4).size == f"up to {widest[1]}"
    assert verdicts.classify(op, widest[-1] + 1, 4) is None


def test_wide_recurrences_on_a_gpu_are_judged_as_the_form_that_runs_them():
    widths = {
        name: {case.width for case in cases.cases("orthogonal_filter", name)} for name in ("triton", "cuda", "graph")
    }
    assert max(widths["triton"]) == 128
    assert max(widths["cuda"]) == 512
    assert {1024, 601} <= widths["graph"]
    in_float32 = {case.width for case in cases.cases("orthogonal_filter", "graph") if case.dtype == torch.float32}
    assert min(in_float32) == 601


@pytest.mark.parametrize("backend", backends.IMPLEMENTED["orthogonal_filter"])
def test_every_class_that_decides_for_16_bits_judges_them(backend):
    """The class of a recurrence is that of its state, so float32's decides for 16-bit tensors of any width in it."""
    found = cases.cases("orthogonal_filter", backend)
    for kind in {case.kind for case in found}:
        of_class = [case for case in found if case.kind == kind]
        assert {case.dtype.itemsize for case in of_class} == ({2, 4} if kind.dtype == "float32" else {8}), kind
        # Kernels read rows of such a width element by element.
        assert any(case.width % 8 for case in of_class), kind


# ---- Mistakes and accidents ------------------------------------------------------------------------------------------


def test_the_lock_does_not_depend_on_the_ops(folder):
    with (
        preconditions.lock(folder, {"cuda": FACTS, "triton": FACTS}),
        pytest.raises(Refused, match="another verification of this device"),
        preconditions.lock(folder, {"triton": FACTS}),
    ):
        pass


def test_only_a_file_of_verdicts_is_replaced(card, behave, tmp_path):
    behave("well")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "packages.json").write_text('[{"name": "a package"}]')
    for name in ("pipe", "packages.json", ".", "x" * 300):
        with pytest.raises(ValueError, match="write is"):
            verify("cuda", ops=[GAF], write=tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert "a package" in (tmp_path / "packages.json").read_text()


def test_a_link_stays_a_link(card, behave, tmp_path):
    behave("well")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    verify("cuda", ops=[GAF], write=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "file").read_text())


def test_a_part_of_the_cases_is_no_proof_in_a_file_either(card, behave, tmp_path, monkeypatch):
    behave("well")
    report = verify("cuda", ops=[LCW], case="M=8")
    assert report.right
    (tmp_path / "file").write_text(report.to_json())
    monkeypatch.setenv("LCW_OPS_VERDICTS", str(tmp_path / "file"))
    assert choose() == "reference"


def test_a_time_out_on_a_cpu_is_not_in_the_file_either(behave, folder, tmp_path, monkeypatch):
    behave("hangs")
    report = verify("cpu", ops=[GAF])
    assert not report.right
    assert json.loads(report.to_json())[0]["verdicts"] == []
    assert [note for note in report.notes if "is not kept: a busy machine" in note]
    assert not [note for note in report.notes if "are kept in" in note]


@pytest.mark.parametrize("times", [float("nan"), float("inf")])
def test_times_that_are_no_number_are_no_verdict(times, card, folder):
    keep_verdict(folder, LCW, "triton", NARROW, times)
    assert choose() == "reference"


@pytest.mark.parametrize(("condition", "is_denied"), [({"dtype": "float32"}, True), ({"size": "up to 4096"}, False)])
def test_the_deny_list_may_name_a_class(condition, is_denied, card, folder, monkeypatch):
    keep_verdict(folder, LCW, "triton", NARROW, 1.5)
    monkeypatch.setattr(backends, "DENIED", [{"op": LCW, "backend": "triton", "reason": "a fault", **condition}])
    assert (choose() == "reference") == is_denied


def test_the_interpreter_proves_nothing_about_a_card(card, behave, monkeypatch):
    behave("well")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report = verify("cuda", ops=[GAF])
    assert "triton" not in [kernel.backend for kernel in report.kernels]
    assert [note for note in report.notes if "TRITON_INTERPRET" in note]


@pytest.mark.parametrize("program", [b"#!/bin/sh\nprintf 'GPU-1, 12, \\377\\n'\n", b"\x7fELF"])
def test_an_nvidia_smi_that_writes_bytes_or_is_damaged(program, card, behave, monkeypatch, tmp_path):
    behave("well")
    tool = tmp_path / "nvidia-smi"
    tool.write_bytes(program)
    tool.chmod(0o755)
    monkeypatch.setattr(preconditions.shutil, "which", lambda name: str(tool))
    assert verify("cuda", ops=[GAF]).right
