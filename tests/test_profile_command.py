"""``lcw-ops profile --model`` and ``--compare`` on a module file in the current folder."""

import json
import sys

import pytest
import torch

from lcw_ops import cli
from lcw_ops.profile import machine, read

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = """
import torch
from torch import nn

def factory():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

model = factory()
def batch():
    return torch.ones(5, 4)
targets = torch.tensor([0, 1, 2, 0, 1])
def loss(output, targets):
    return nn.functional.cross_entropy(output, targets)
def broken():
    raise ValueError("my own mistake")
class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
    def forward(self, x):
        self.first(x)
        raise RuntimeError("my own mistake, midway")
class Space:
    batch = torch.zeros(5, 4)
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "my_own_net.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_own_net", raising=False)
    monkeypatch.setattr(machine, "matmul_rate", lambda device: 1e10)
    return tmp_path


def command(*arguments):
    return cli.main(["profile", *arguments])


def test_a_model_that_fails_midway_leaves_its_rows_and_exit_code_1(here, capsys):
    assert command("--model", "my_own_net:Failing", "--inputs", "my_own_net:batch", "--out", "out") == 1
    assert "my own mistake, midway" in capsys.readouterr().out
    assert "first" in read(here / "out" / "report.json").columns["name"]


def test_a_model_of_ones_own_is_profiled_in_all_forms(here, capsys):
    given = ["--targets", "my_own_net:targets", "--loss", "my_own_net:loss", "--out", "out"]
    assert command("--model", "my_own_net:factory", "--inputs", "my_own_net:batch", *given) == 0
    assert {path.name for path in (here / "out").iterdir()} == {
        "report.html",
        "report.json",
        "layers.csv",
        "report.png",
    }
    assert "Sequential" in capsys.readouterr().out
    import my_own_net

    torch.manual_seed(0)
    expected = my_own_net.loss(my_own_net.factory()(my_own_net.batch()), my_own_net.targets).item()
    assert read("out/report.json").loss == pytest.approx(expected)
    assert list(read("out/layers.csv").columns["name"]) == ["0", "1", "2"]


def test_a_module_itself_and_nested_names():
    assert command("--model", "my_own_net:model", "--inputs", "my_own_net:Space.batch") == 0


def test_two_profiles_are_compared(capsys):
    for seed in "00", "1":
        arguments = ["--inputs", "my_own_net:batch", "--seed", seed, "--out", seed]
        assert command("--model", "my_own_net:factory", *arguments) == 0
    capsys.readouterr()
    assert command("--compare", "00/report.json", "00/layers.csv") == 0
    assert "no difference" in capsys.readouterr().out
    assert command("--compare", "00/report.json", "1/report.json") == 0
    assert "3 of 3 matched rows differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "my_own_net:factory"], "--inputs is not given"),
        (["--inputs", "my_own_net:batch"], "--model is not given"),
        (["--model", "my_own_net", "--inputs", "my_own_net:batch"], "package.module:attribute"),
        (["--model", "my_own_net:no", "--inputs", "my_own_net:batch"], "no attribute 'no'"),
        (["--model", "no_such_net:no", "--inputs", "my_own_net:batch"], "No module named 'no_such_net'"),
        (["--model", "a:b", "--inputs", "a:c", "--depth", "7"], "--depth has no effect with --model"),
        (["--compare", "a.json", "b.json", "--steps", "7"], "--steps has no effect with --compare"),
        (["--compare", "a.json", "b.json"], "No such file"),
        (["--compare", "a.json"], "expected 2 arguments"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_error_of_the_users_own_has_its_traceback(capsys):
    assert command("--model", "my_own_net:broken", "--inputs", "my_own_net:batch") == 1
    assert "my own mistake" in capsys.readouterr().err


def test_reports_of_several_networks_are_refused(here, capsys):
    (here / "report.json").write_text(json.dumps({"settings": {}, "columns": {"kind": "which", "name": "module"}}))
    assert command("--compare", "report.json", "report.json") == 2
    assert "Read its layers.csv" in capsys.readouterr().err
