"""``make gpu PART=crossover`` measures from which width on another kernel of the recurrence is the fastest.

These tests run the measurement on the CPU's kernels, and use tables like those that it makes.
"""

import csv
import dataclasses
import functools

import pytest

from lcw_ops.bench import crossover, registry, runner
from lcw_ops.ops.orthogonal_filter import crossover as orthogonal_filter_crossover
from lcw_ops.ops.orthogonal_filter.crossover import fastest_kernel

pytestmark = pytest.mark.usefixtures("one_thread")
COLUMNS = [field.name for field in dataclasses.fields(runner.Row)]


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(registry, "measure_rates", lambda device, case: registry.Rates(memory=1e10, matmul=1e11))
    monkeypatch.setattr(runner, "SECONDS_PER_CASE", 0.0)


def run(path, *options: str) -> int:
    return crossover.main([str(path), "--device", "cpu", "--widths", "8", "--rows", "3", "--steps", "6", *options])


def write(path, times: dict[tuple[str, int], tuple[float, ...]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for (kernel, width), medians in times.items():
            for case, median in zip(("depth", "time"), medians, strict=False):
                measured = {"case": case, "shape": f"L=256 M=64 N={width}", "competitor": kernel, "median_s": median}
                writer.writerow(dict.fromkeys(COLUMNS, "") | {"stem": "crossover"} | measured)


def test_every_kernel_is_measured(quickly, tmp_path, capsys):
    path = tmp_path / "crossover.csv"
    assert run(path) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {kernel.name for kernel in crossover.kernels("cpu")} | {registry.EAGER}
    assert "graph" in names
    assert {(row["case"], row["competitor"]) for row in rows} == {
        (f"over {case}, forward + backward", name) for case in ("depth", "time") for name in names
    }
    assert all(float(row["median_s"]) > 0 for row in rows)
    assert capsys.readouterr().out.splitlines()[-1].startswith("MEASURED[CPU] = ((")
    assert run(path) == 0
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)  # the file is overwritten


def test_noise_is_reported_before_the_line_of_code(quickly, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "is_noisy", lambda median, spread: True)
    assert run(tmp_path / "crossover.csv") == 0
    warning, line = capsys.readouterr().out.splitlines()[-3::2]
    assert warning.endswith("rows are noisy: measure again before you use the line below")
    assert line.startswith("MEASURED[CPU] = ")


def test_a_wrong_kernel_is_not_timed(quickly, tmp_path, monkeypatch, capsys):
    good = crossover.kernels("cpu")[-1]

    def off_by_a_little(*arguments):
        output, checkpoints = good.forward(*arguments)
        return output * 1.001, checkpoints

    wrong = dataclasses.replace(good, name="wrong", forward=off_by_a_little)
    monkeypatch.setattr(crossover, "kernels", lambda device_type: [wrong, good])
    assert run(tmp_path / "crossover.csv") == 1
    assert "wrong                      REFUSED" in capsys.readouterr().out
    assert crossover.table(tmp_path / "crossover.csv") == (("graph", None),)


def test_a_kernel_that_cannot_run_is_left_out(quickly, tmp_path, monkeypatch, capsys):
    def refuses(*_):
        raise RuntimeError("width 8 is too wide\nand more")

    good = crossover.kernels("cpu")[-1]
    monkeypatch.setattr(
        crossover, "kernels", lambda device_type: [dataclasses.replace(good, name="narrow", forward=refuses), good]
    )
    assert run(tmp_path / "crossover.csv") == 0
    assert "not run: width 8 is too wide\n" in capsys.readouterr().out


def test_the_fastest_at_every_width(tmp_path):
    """The geometric mean over both cases decides. A kernel that ran only one case does not count.

    The table does not distinguish the two CUDA kernels.
    """
    path = tmp_path / "crossover.csv"
    times = {("triton", 64): (1, 4), ("cuda cluster", 64): (3, 2), ("triton", 128): (1, 1), ("cuda rows", 128): (2, 2)}
    times |= {("cuda cluster", 256): (1, 1), ("graph", 256): (2, 2), ("triton", 256): (0.1,)}
    times |= {("cuda rows", 512): (1, 3), ("graph", 512): (2, 2), ("graph", 1024): (1, 1), ("cuda rows", 1024): (9, 9)}
    times |= {(registry.EAGER, 1024): (0.1, 0.1)}
    write(path, times)
    assert crossover.table(path) == (("triton", 128), ("cuda", 512), ("graph", None))
    write(path, {("graph", 64): (1, 1), ("cuda rows", 64): (2, 2)})
    assert crossover.table(path) == (("graph", None),)


def test_measurements_overrule_the_design(monkeypatch):
    widths = (1, 64, 65, 512, 513, 10**6)
    fastest = functools.partial(fastest_kernel, capability=(9, 0))
    assert [fastest(width) for width in widths] == ["triton", "triton", "cuda", "cuda", "graph", "graph"]
    # GPUs before sm_90 have no clusters, and clusters compute in float32 only.
    for capability, itemsize in (((8, 9), 4), ((8, 0), 8), ((9, 0), 8), ((10, 0), 8)):
        kernels = [fastest_kernel(width * 4 // itemsize, capability, itemsize) for width in (128, 130, 512, 514)]
        assert kernels == ["triton", "cuda", "cuda", "graph"]
    monkeypatch.setitem(orthogonal_filter_crossover.MEASURED, (9, 0), (("cuda", 200), ("graph", None)))
    assert [fastest(width) for width in widths] == ["cuda", "cuda", "cuda", "graph", "graph", "graph"]
    assert fastest(100, itemsize=8) == "cuda"
    assert fastest_kernel(64, (8, 0)) == "triton"


def test_the_choice_of_the_cuda_kernel_is_restored(monkeypatch):
    seen = []
    kernel = crossover._with_kernel("cuda rows", lambda: seen.append(crossover.os.environ[crossover.CUDA_KERNEL]))
    monkeypatch.delenv(crossover.CUDA_KERNEL, raising=False)
    kernel()
    assert crossover.CUDA_KERNEL not in crossover.os.environ
    monkeypatch.setenv(crossover.CUDA_KERNEL, "cluster")
    kernel()
    assert seen == ["rows", "rows"]
    assert crossover.os.environ[crossover.CUDA_KERNEL] == "cluster"
